/* tokenizer.c: text to token ids and back. No dependencies; run.c includes it, and so can you.

A language model reads numbers. Byte pair encoding (BPE) makes them: start from the single bytes or characters of a
text, and join the neighbours that the vocabulary likes best, again and again, until no neighbours are liked. All
tokenizers of that family share this core; they differ in what is done to the text before. Those differences are data
in the model file: this file knows no tokenizer by its name.

    text -> added tokens -> steps (normalise, split, ...) -> one word at a time -> BPE -> ids
            "<|end|>"       a list in the file               " hello"              " hel" "lo"

Map: the interface · what the file holds · UTF-8 · the tokenizer in memory · lookups · opening (where all is checked) ·
one call of tokenizer_encode · merging · the pattern machine · NFC · added tokens · the steps · encoding · decoding

Invariants
  I1  After tokenizer_open nothing in the file can lead out of bounds: every offset, id, jump and set number was
      checked there, once. Nothing is checked again, nothing writes to a tokenizer.
  I2  Text is bytes. Invalid UTF-8 is no error: such a byte passes through as itself, and to a pattern it looks like
      U+FFFD. NUL is an ordinary byte.
  I3  A control token is recognised only where all its bytes are trusted, and nothing else ever produces one: neither
      merging nor a lookup. So no user's text can forge the end of a turn.
  I4  A merged token spells what its two parts spell. So two symbols can only ever be joined if the last byte of one
      and the first byte of the other stand side by side in some token; anywhere else a text may be cut (tok_word).
      Words stay short even where no pattern splits the text.
  I5  Time is O(n log n) in the text, times the length of the patterns. Nothing recurses deeper than the steps. */
#ifndef TOKENIZER_C
#define TOKENIZER_C

#include <limits.h>
#include <stdint.h>
#include <stdio.h> /* snprintf alone, for messages */
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) /* silent if the includer does not call it */
#define TOKENIZER_API static __attribute__((unused))
#else
#define TOKENIZER_API static
#endif

/* ---- The interface -------------------------------------------------------------------------------------------- */

/* Where tokenizer_open finds the tensors and the metadata of a model. What it returns must live as long as the
   tokenizer and be aligned to its element. */
typedef struct {
    void *context;
    /* A tensor's data and size; NULL: absent or of another type. dtype: "U8" "I32" "F32" */
    const void *(*tensor)(void *context, const char *name, const char *dtype, size_t *bytes);
    /* Metadata, NUL-terminated; NULL: absent */
    const char *(*text)(void *context, const char *key);
} tokenizer_source;

/* A part of a text. Control tokens are recognised in trusted spans only. */
typedef struct {
    const char *text;
    size_t length;
    int trusted;
} tokenizer_span;

typedef struct tokenizer tokenizer;

/* The kind of a token: the low four bits of its type, numbered as in GGUF. */
enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER, TOKEN_UNUSED, TOKEN_BYTE };

/* Opens the tokenizer of a model and checks all of it. NULL, and a sentence in `error`, if something is wrong. */
TOKENIZER_API tokenizer *tokenizer_open(const tokenizer_source *source, int vocab_size, char *error, size_t error_size);
TOKENIZER_API void tokenizer_close(tokenizer *t);

/* Encodes the spans as one text: pieces merge across span borders. Adds no BOS, no EOS. Returns 0, and *ids (the
   caller frees it) of *n_ids ids; or -1 if memory ran out or the text is longer than 2 GB. Any number of threads may
   encode with one tokenizer. */
TOKENIZER_API int tokenizer_encode(const tokenizer *t, const tokenizer_span *spans, int n_spans, int **ids, int *n_ids);

/* The bytes of a token (not NUL-terminated) and its kind; NULL if there is no such id. */
TOKENIZER_API const char *tokenizer_piece(const tokenizer *t, int id, size_t *length, int *kind);

/* Decodes id after id; start with {0}. Set `controls` to see control and unknown tokens too. */
typedef struct {
    unsigned char bytes[4]; /* the beginning of a character that is not complete yet */
    int n;                  /* how many of them */
    int started;            /* something was decoded: a space is no longer a leading one */
    int controls;
} tokenizer_stream;

/* The most bytes that one tokenizer_stream_put or tokenizer_stream_end can write. */
TOKENIZER_API size_t tokenizer_stream_room(const tokenizer *t);

/* Decodes one id into `out`, returns the number of bytes: whole characters, and bytes that can no longer become part
   of one (as they are). The beginning of a character waits for ids to come. */
TOKENIZER_API size_t tokenizer_stream_put(const tokenizer *t, tokenizer_stream *s, int id, char *out);

/* What still waited, at the end of the text. */
TOKENIZER_API size_t tokenizer_stream_end(tokenizer_stream *s, char *out);

/* ---- What the file holds -----------------------------------------------------------------------------------------

Metadata (of two words the first is meant where nothing stands; flags are 0 or 1)
  tokenizer.merge          rank: a table of pairs, the first in the table is joined first
                           score: neighbours that spell a token may be joined, highest score first
  tokenizer.symbols        bytes or chars: what BPE starts from. Of `chars` one that is no token becomes its byte
                           tokens, if all of them exist, else the unknown token
  tokenizer.unknown        id of the unknown token; absent: what cannot be encoded is dropped
  tokenizer.fuse_unknown   several unknown characters in a row are one unknown token
  tokenizer.ignore_merges  a word that is a token as a whole is taken as it is
  tokenizer.strip_space    a text decoded from its start loses one leading space

Tensors
  tokenizer.bytes          U8  [*]        the bytes of all tokens in a row, as they decode
  tokenizer.offsets        I32 [vocab+1]  where each begins
  tokenizer.types          U8  [vocab]    kind (above) and flags (TYPE_, below)
  tokenizer.merges         I32 [n,3]      left, right, result, in rank order (merge=rank)
  tokenizer.scores         F32 [vocab]    (merge=score)
  tokenizer.added          I32 [n]        tokens to look for in the text, ascending by their bytes
  tokenizer.program        I32 [*]        the steps: operation, number of arguments, arguments; ...
  tokenizer.atoms          I32 [n,2]      first code point, atom: the classes of characters that the patterns tell
                                          apart, 1..255; together all code points
  tokenizer.sets           I32 [n,8]      sets of atoms, 256 bits each; atom 0: the end of the text
  tokenizer.nfc.classes    I32 [n,3]      first, last code point, combining class; ascending
  tokenizer.nfc.decompose  I32 [n,5]      code point, its full decomposition (0: no more); ascending
  tokenizer.nfc.compose    I32 [n,3]      first, second, composed

Steps are carried out in order; each works on every piece that the ones before it left. */
enum {
    STEP_PREPEND = 1, /* places, byte...      put these bytes before the piece, in these places */
    STEP_REPLACE,     /* n, n bytes, m bytes  replace the first string by the second everywhere */
    STEP_NFC,         /*                      Unicode normalisation form C */
    STEP_ADDED,       /*                      look for the added tokens with TYPE_NORMALIZED */
    STEP_SPLIT,       /* behaviour, invert, instruction (operation, x, y)... */
    STEP_WORD,        /* set                  no step: what may not touch a TYPE_WORD token */
};
/* places */
enum { AT_START = 1, AFTER_CONTROL = 2, AFTER_USER = 4, AFTER_SPLIT = 8, UNLESS_THERE = 16 };
/* behaviours: a match is dropped, a piece of its own, joined to its neighbour, to other matches */
enum { SPLIT_REMOVED, SPLIT_ISOLATED, SPLIT_PREVIOUS, SPLIT_NEXT, SPLIT_CONTIGUOUS };
/* instructions */
enum {
    OP_MATCH, /*       the pattern ends here */
    OP_SET,   /* set   read one character of this set */
    OP_AHEAD, /* set   the next character (or the end) is in this set; read nothing */
    OP_JUMP,  /* to */
    OP_FORK,  /* a b   try a; if that fails, b */
};
enum { TYPE_LSTRIP = 0x10, TYPE_RSTRIP = 0x20, TYPE_WORD = 0x40, TYPE_NORMALIZED = 0x80 };
enum { TOK_STEPS = 64, TOK_CODE = 8192, TOK_LONGEST = 65535, TOK_PROBES = 4096 }; /* limits */

/* ---- UTF-8 ---------------------------------------------------------------------------------------------------- */

/* Code points, and after them one for each byte that is part of no character (I2). */
enum { TOK_POINTS = 0x110000, TOK_ALL_POINTS = TOK_POINTS + 256 };

/* The length of the character that s begins with, 1..4; above n if the n > 0 bytes are but a good beginning; 0 if it
   is none. Overlong forms, surrogates and what is above 10FFFF are none. */
static size_t tok_utf8_length(const uint8_t *s, size_t n)
{
    if (s[0] < 0x80)
        return 1;
    size_t length = s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    uint8_t low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
    uint8_t high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
    for (size_t i = 1; i < length && i < n; i++, low = 0x80, high = 0xbf)
        if (s[i] < low || s[i] > high)
            return 0;
    return length;
}

/* The character at s, and its length in bytes. n > 0. */
static uint32_t tok_utf8_get(const uint8_t *s, size_t n, size_t *length)
{
    size_t k = tok_utf8_length(s, n);
    *length = k && k <= n ? k : 1;
    if (*length == 1)
        return k == 1 ? s[0] : TOK_POINTS + (uint32_t)s[0];
    uint32_t c = s[0] & (0x7fu >> k);
    for (size_t i = 1; i < k; i++)
        c = c << 6 | (s[i] & 0x3fu);
    return c;
}

/* The character that ends at s[n]. n > 0. */
static uint32_t tok_utf8_before(const uint8_t *s, size_t n, size_t *length)
{
    size_t k = n < 4 ? n : 4;
    while (k > 1 && tok_utf8_length(s + n - k, k) != k)
        k--;
    return tok_utf8_get(s + n - k, k, length);
}

/* Writes a character; returns its length in bytes. */
static size_t tok_utf8_put(uint32_t c, uint8_t *out)
{
    size_t n = c < 0x80 || c >= TOK_POINTS ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6)
        out[i] = (uint8_t)(0x80 | (c & 0x3f));
    out[0] = (uint8_t)(n == 1 ? c : c | 0xff00u >> n);
    return n;
}

/* Unicode's White_Space, what lstrip and rstrip strip. */
static int tok_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* ---- The tokenizer in memory ---------------------------------------------------------------------------------- */

typedef struct {
    int op, n;            /* operation, number of arguments */
    const int32_t *args;  /* in the file */
    const uint8_t *bytes; /* those after the first, if they are bytes */
} tok_step;

/* A hash table with open addressing, at most half full, of the rows of a tensor. */
typedef struct {
    uint32_t *slots, mask;  /* 1 + row; 0: empty */
    size_t longest;         /* key, in bytes */
    const uint8_t *rows;
    const int32_t *offsets; /* where each row begins; NULL: rows of 12 bytes, the first 8 the key */
} tok_table;

struct tokenizer {
    /* in the file */
    int vocab, n_added, n_sets, n_steps;
    const uint8_t *types;
    const int32_t *merges, *added, *sets, *decompose, *compose;
    const float *scores; /* if by_score */
    tok_step steps[TOK_STEPS];
    int by_score, chars, unknown, fuse_unknown, ignore_merges, strip_space;
    /* made when it was opened */
    tok_table pieces;         /* bytes -> a token that merging may make; has the bytes of all */
    tok_table pairs;          /* left, right -> row of merges */
    tok_table composed;       /* first, second -> row of compose */
    size_t longest;           /* token, in bytes */
    int longest_code;         /* instructions of the longest pattern */
    int word_set;             /* of STEP_WORD, -1: none */
    int32_t byte_tokens[256]; /* byte -> its token, -1: none. BPE starts from them, or falls back */
    uint8_t begins[256];      /* some added token begins with this byte */
    uint8_t joins[256][32];   /* bit set: these two bytes stand side by side in some token (I4) */
    uint8_t *step_bytes;      /* the program, each number as a byte */
    uint8_t *atoms;           /* [TOK_ALL_POINTS] atom; NULL: no pattern */
    uint32_t *nfc;            /* [TOK_ALL_POINTS] bits below; NULL: never normalises */
};
/* combining class; joins what is before it; from there on 1 + row of its decomposition */
enum { NFC_CLASS = 0xff, NFC_JOINS = 0x100, NFC_ROW_SHIFT = 9 };

static int tok_kind(const tokenizer *t, int id) { return t->types[id] & 0x0f; }

/* May merging make it? */
static int tok_is_ordinary(const tokenizer *t, int id)
{
    return tok_kind(t, id) == TOKEN_NORMAL || tok_kind(t, id) == TOKEN_USER;
}

static int tok_in_set(const tokenizer *t, int set, int atom)
{
    return (uint32_t)t->sets[8 * set + atom / 32] >> atom % 32 & 1;
}

/* ---- Lookups -------------------------------------------------------------------------------------------------- */

static uint32_t tok_hash(const uint8_t *s, size_t n)
{
    uint64_t x, h = n * 0x9e3779b97f4a7c15u;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&x, s, 8);
        h = (h ^ x) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    for (x = 0; n; n--)
        x = x << 8 | *s++;
    h = (h ^ x) * 0xff51afd7ed558ccdu;
    return (uint32_t)((h ^ h >> 32) * 0xc4ceb9fe1a85ec53u >> 32);
}

/* The bytes by which a row is found. */
static const uint8_t *tok_key(const tok_table *table, size_t row, size_t *n)
{
    const int32_t *offsets = table->offsets;
    *n = offsets ? (size_t)(offsets[row + 1] - offsets[row]) : 8;
    return table->rows + (offsets ? (size_t)offsets[row] : 12 * row);
}

static const uint8_t *tok_bytes(const tokenizer *t, int id, size_t *n) { return tok_key(&t->pieces, (size_t)id, n); }

/* The slot of a key, or the empty one where it belongs; NULL if the way there is longer than any honest table makes
   it. */
static uint32_t *tok_slot(const tok_table *table, const uint8_t *s, size_t n)
{
    uint32_t i = tok_hash(s, n);
    for (int probes = 0; probes < TOK_PROBES; probes++, i++) {
        uint32_t *slot = &table->slots[i & table->mask];
        size_t length;
        if (!*slot)
            return slot;
        const uint8_t *key = tok_key(table, *slot - 1, &length);
        if (length == n && (n == 8 ? !memcmp(key, s, 8) : !memcmp(key, s, n))) /* 8, known, is one instruction */
            return slot;
    }
    return NULL;
}

/* The row of a key; -1 if there is none. */
static int tok_find(const tok_table *table, const uint8_t *s, size_t n)
{
    const uint32_t *slot = n <= table->longest ? tok_slot(table, s, n) : NULL;
    return slot ? (int)*slot - 1 : -1;
}

static int tok_find_pair(const tok_table *table, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)right << 32 | (uint32_t)left; /* as it lies in the file */
    return tok_find(table, (const uint8_t *)&pair, sizeof pair);
}

static int tok_table_new(tok_table *table, int n, const void *rows, const int32_t *offsets)
{
    *table = (tok_table){ .mask = 1, .rows = rows, .offsets = offsets };
    while (table->mask < 2 * (uint32_t)n)
        table->mask = 2 * table->mask + 1;
    table->slots = calloc((size_t)table->mask + 1, sizeof *table->slots);
    return table->slots != NULL;
}

/* Of two rows with one key the first is kept. 0 if there is no place for it. */
static int tok_add(tok_table *table, int row)
{
    size_t n;
    const uint8_t *s = tok_key(table, (size_t)row, &n);
    uint32_t *slot = tok_slot(table, s, n);
    if (slot && !*slot)
        *slot = (uint32_t)row + 1;
    if (n > table->longest)
        table->longest = n;
    return slot != NULL;
}

/* ---- Opening -------------------------------------------------------------------------------------------------- */

typedef struct {
    const tokenizer_source *source;
    char *error;
    size_t error_size;
    int failed;
} tok_opening;

/* Says what is wrong, with a row or (-1) with all of it; the first failure counts. Returns 0, as the functions below
   do that look for failures. */
static int tok_bad(tok_opening *o, const char *name, int row)
{
    const char *sentence = row < 0 ? "%s is missing, damaged, or too large for the memory"
                                   : "%s is damaged in row %d, or made for a newer version";
    if (!o->failed)
        snprintf(o->error, o->error_size, sentence, name, row);
    o->failed = 1;
    return 0;
}

/* A tensor with rows of so many elements; NULL if there is none, no rows if it is bad. Integers must be 0..most,
   unless most is -1. */
static const void *tok_tensor(tok_opening *o, const char *name, const char *dtype, size_t columns, int most, int *rows)
{
    size_t bytes = 0, width = columns * (dtype[0] == 'U' ? 1 : 4);
    const int32_t *data = o->source->tensor(o->source->context, name, dtype, &bytes);
    if (data && (bytes % width || bytes / width > INT_MAX / 8))
        tok_bad(o, name, -1);
    for (size_t i = 0; data && most >= 0 && i < bytes / 4 && !o->failed; i++)
        if (data[i] < 0 || data[i] > most)
            tok_bad(o, name, (int)(i / columns));
    *rows = data && !o->failed ? (int)(bytes / width) : 0;
    return data;
}

/* Which of two words stands in the metadata: 0 the first (or nothing), 1 the second. */
static int tok_choice(tok_opening *o, const char *key, const char *first, const char *second)
{
    const char *s = o->source->text(o->source->context, key);
    if (s && strcmp(s, first) && strcmp(s, second))
        tok_bad(o, key, -1);
    return s && !strcmp(s, second);
}

static int tok_open_metadata(tok_opening *o, tokenizer *t)
{
    const char *unknown = o->source->text(o->source->context, "tokenizer.unknown");
    char *end = NULL;
    long id = unknown ? strtol(unknown, &end, 10) : -1;
    if (unknown && (end == unknown || *end || id < 0 || id >= t->vocab))
        tok_bad(o, "tokenizer.unknown", -1);
    t->unknown = (int)id;
    t->by_score = tok_choice(o, "tokenizer.merge", "rank", "score");
    t->chars = tok_choice(o, "tokenizer.symbols", "bytes", "chars");
    t->fuse_unknown = tok_choice(o, "tokenizer.fuse_unknown", "0", "1");
    t->ignore_merges = tok_choice(o, "tokenizer.ignore_merges", "0", "1");
    t->strip_space = tok_choice(o, "tokenizer.strip_space", "0", "1");
    return !o->failed;
}

/* What the tokens spell, and all that follows from it. */
static int tok_open_pieces(tok_opening *o, tokenizer *t)
{
    const char *name = "the table of tokens";
    int n_bytes, n_offsets, n_types, n_scores;
    const void *bytes = tok_tensor(o, "tokenizer.bytes", "U8", 1, -1, &n_bytes);
    const void *offsets = tok_tensor(o, "tokenizer.offsets", "I32", 1, n_bytes, &n_offsets);
    t->types = tok_tensor(o, "tokenizer.types", "U8", 1, -1, &n_types);
    t->scores = tok_tensor(o, "tokenizer.scores", "F32", 1, -1, &n_scores);
    if (o->failed || !bytes || n_offsets != t->vocab + 1 || n_types != t->vocab ||
        (t->by_score && n_scores != t->vocab) || !tok_table_new(&t->pieces, t->vocab, bytes, offsets))
        return tok_bad(o, name, -1);
    memset(t->byte_tokens, -1, sizeof t->byte_tokens);
    for (int id = 0; id < t->vocab; id++) {
        size_t length; /* huge if it is negative */
        const uint8_t *s = tok_bytes(t, id, &length);
        int kind = tok_kind(t, id), is_nan = t->by_score && t->scores[id] != t->scores[id];
        if (length > TOK_LONGEST || kind < TOKEN_NORMAL || kind > TOKEN_BYTE || is_nan ||
            (kind == TOKEN_BYTE && length != 1))
            return tok_bad(o, name, id);
        if (length > t->longest)
            t->longest = length;
        if (kind == TOKEN_BYTE)
            t->byte_tokens[s[0]] = id;
        if (!tok_is_ordinary(t, id) || !length)
            continue;
        if (!tok_add(&t->pieces, id))
            return tok_bad(o, name, id);
        for (size_t i = 1; i < length; i++)
            t->joins[s[i - 1]][s[i] >> 3] |= (uint8_t)(1 << (s[i] & 7));
    }
    for (int b = 0; !t->chars && b < 256; b++) {
        int id = tok_find(&t->pieces, &(uint8_t){ (uint8_t)b }, 1);
        if (id >= 0)
            t->byte_tokens[b] = id;
    }
    return 1;
}

static int tok_open_merges(tok_opening *o, tokenizer *t)
{
    int n;
    t->merges = tok_tensor(o, "tokenizer.merges", "I32", 3, t->vocab - 1, &n);
    if (o->failed || !t->merges || !tok_table_new(&t->pairs, n, t->merges, NULL))
        return tok_bad(o, "tokenizer.merges", -1);
    for (int rank = 0; rank < n; rank++) {
        const int32_t *m = t->merges + 3 * (size_t)rank;
        size_t left, right, both;
        const uint8_t *a = tok_bytes(t, m[0], &left), *b = tok_bytes(t, m[1], &right), *c = tok_bytes(t, m[2], &both);
        if (!left || !right || both != left + right || memcmp(c, a, left) || memcmp(c + left, b, right) || /* I4 */
            !tok_is_ordinary(t, m[2]) || !tok_add(&t->pairs, rank))                                        /* I3 */
            return tok_bad(o, "tokenizer.merges", rank);
    }
    return 1;
}

/* The order of bytes: < 0, 0, > 0. What another begins with comes before it. */
static int tok_order(const uint8_t *a, size_t n_a, const uint8_t *b, size_t n_b)
{
    int order = memcmp(a, b, n_a < n_b ? n_a : n_b);
    return order ? order : (n_a > n_b) - (n_a < n_b);
}

static int tok_open_added(tok_opening *o, tokenizer *t)
{
    t->added = tok_tensor(o, "tokenizer.added", "I32", 1, t->vocab - 1, &t->n_added);
    for (int i = 0; i < t->n_added; i++) {
        int id = t->added[i];
        size_t n, n_before = 0; /* the first must be greater than nothing */
        const uint8_t *s = tok_bytes(t, id, &n), *before = i ? tok_bytes(t, t->added[i - 1], &n_before) : s;
        if (tok_order(before, n_before, s, n) >= 0 || /* only text as it came can be trusted: */
            (tok_kind(t, id) != TOKEN_USER && t->types[id] & TYPE_NORMALIZED))
            return tok_bad(o, "tokenizer.added", i);
        t->begins[s[0]] = 1;
    }
    return !o->failed;
}

static int tok_open_atoms(tok_opening *o, tokenizer *t)
{
    int n;
    const int32_t *a = tok_tensor(o, "tokenizer.atoms", "I32", 2, TOK_POINTS - 1, &n);
    t->sets = tok_tensor(o, "tokenizer.sets", "I32", 8, -1, &t->n_sets);
    if (o->failed || (n && !(t->atoms = malloc(TOK_ALL_POINTS))))
        return tok_bad(o, "tokenizer.atoms", -1);
    for (int i = 0; i < n; i++, a += 2) {
        int next = i + 1 < n ? a[2] : TOK_POINTS;
        if ((i == 0 && a[0] != 0) || next <= a[0] || a[1] < 1 || a[1] > 255)
            return tok_bad(o, "tokenizer.atoms", i);
        memset(t->atoms + a[0], a[1], (size_t)(next - a[0]));
    }
    if (n) /* I2 */
        memset(t->atoms + TOK_POINTS, t->atoms[0xfffd], TOK_ALL_POINTS - TOK_POINTS);
    return 1;
}

static int tok_open_nfc(tok_opening *o, tokenizer *t)
{
    int n_classes, n_rows, n_pairs;
    const int32_t *c = tok_tensor(o, "tokenizer.nfc.classes", "I32", 3, TOK_POINTS - 1, &n_classes);
    const int32_t *d = tok_tensor(o, "tokenizer.nfc.decompose", "I32", 5, TOK_POINTS - 1, &n_rows);
    const int32_t *p = tok_tensor(o, "tokenizer.nfc.compose", "I32", 3, TOK_POINTS - 1, &n_pairs);
    t->decompose = d;
    t->compose = p;
    if (o->failed || !c || !d || !p)
        return !o->failed; /* without t->nfc there can be no STEP_NFC */
    t->nfc = calloc(TOK_ALL_POINTS, sizeof *t->nfc);
    if (!t->nfc || !tok_table_new(&t->composed, n_pairs, p, NULL))
        return tok_bad(o, "tokenizer.nfc.compose", -1);
    for (int i = 0; i < n_classes; i++, c += 3) {
        if (c[1] < c[0] || (i && c[0] <= c[-2]) || c[2] < 1 || c[2] > 255)
            return tok_bad(o, "tokenizer.nfc.classes", i);
        for (int point = c[0]; point <= c[1]; point++)
            t->nfc[point] = (uint32_t)c[2] | NFC_JOINS;
    }
    for (int i = 0; i < n_rows; i++, d += 5) {
        if (i && d[-5] >= d[0])
            return tok_bad(o, "tokenizer.nfc.decompose", i);
        t->nfc[d[0]] |= (uint32_t)(i + 1) << NFC_ROW_SHIFT;
    }
    for (int i = 0; i < n_pairs; i++, p += 3) {
        if (!tok_add(&t->composed, i))
            return tok_bad(o, "tokenizer.nfc.compose", i);
        t->nfc[p[1]] |= NFC_JOINS;
    }
    for (int jamo = 0x1161; jamo <= 0x11c2; jamo++) /* Hangul vowels and final consonants */
        t->nfc[jamo] |= NFC_JOINS;
    return 1;
}

/* Every jump of a pattern stays inside, no instruction runs off its end, its sets exist. */
static int tok_check_pattern(tokenizer *t, const tok_step *step)
{
    int n = (step->n - 2) / 3;
    if (!t->atoms || step->n < 5 || step->n != 2 + 3 * n || n > TOK_CODE || step->args[0] < SPLIT_REMOVED ||
        step->args[0] > SPLIT_CONTIGUOUS)
        return 0;
    for (int pc = 0; pc < n; pc++) {
        const int32_t *c = step->args + 2 + 3 * pc;
        int reads = c[0] == OP_SET || c[0] == OP_AHEAD, limit = reads ? t->n_sets : n;
        if (c[0] < OP_MATCH || c[0] > OP_FORK || (reads && pc + 1 == n) ||
            (c[0] != OP_MATCH && (c[1] < 0 || c[1] >= limit)) || (c[0] == OP_FORK && (c[2] < 0 || c[2] >= n)))
            return 0;
    }
    if (n > t->longest_code)
        t->longest_code = n;
    return 1;
}

static int tok_open_steps(tok_opening *o, tokenizer *t)
{
    int n;
    const int32_t *p = tok_tensor(o, "tokenizer.program", "I32", 1, -1, &n);
    t->word_set = -1;
    if (o->failed || !(t->step_bytes = malloc((size_t)n + 1)))
        return tok_bad(o, "tokenizer.program", -1);
    for (int i = 0; i < n; i++)
        t->step_bytes[i] = (uint8_t)p[i];
    for (int at = 0; at < n; at += 2 + p[at + 1], t->n_steps++) {
        tok_step *s = &t->steps[t->n_steps];
        if (t->n_steps == TOK_STEPS || n - at < 2 || p[at + 1] < 0 || p[at + 1] > n - at - 2)
            return tok_bad(o, "tokenizer.program", at);
        *s = (tok_step){ p[at], p[at + 1], p + at + 2, t->step_bytes + at + 3 };
        int good = s->op == STEP_PREPEND   ? s->n >= 1
                   : s->op == STEP_REPLACE ? s->n >= 1 && s->args[0] >= 1 && s->args[0] < s->n
                   : s->op == STEP_NFC     ? t->nfc != NULL
                   : s->op == STEP_SPLIT   ? tok_check_pattern(t, s)
                   : s->op == STEP_WORD    ? t->atoms && s->n == 1 && s->args[0] >= 0 && s->args[0] < t->n_sets
                                           : s->op == STEP_ADDED;
        if (!good)
            return tok_bad(o, "tokenizer.program", at);
        if (s->op == STEP_WORD)
            t->word_set = s->args[0];
    }
    return 1;
}

tokenizer *tokenizer_open(const tokenizer_source *source, int vocab_size, char *error, size_t error_size)
{
    tok_opening o = { source, error, error_size, 0 };
    tokenizer *t = calloc(1, sizeof *t);
    if (t)
        t->vocab = vocab_size;
    if (!t || vocab_size < 1 || vocab_size > INT_MAX / 8)
        tok_bad(&o, "the vocabulary", -1);
    else if (tok_open_metadata(&o, t) && tok_open_pieces(&o, t) && (t->by_score || tok_open_merges(&o, t)) &&
             tok_open_added(&o, t) && tok_open_atoms(&o, t) && tok_open_nfc(&o, t) && tok_open_steps(&o, t))
        return t;
    tokenizer_close(t);
    return NULL;
}

void tokenizer_close(tokenizer *t)
{
    if (!t)
        return;
    free(t->pieces.slots);
    free(t->pairs.slots);
    free(t->composed.slots);
    free(t->step_bytes);
    free(t->atoms);
    free(t->nfc);
    free(t);
}

/* ---- One call of tokenizer_encode ----------------------------------------------------------------------------- */

typedef struct {
    void *data;
    size_t n, room;
} tok_array;

/* A symbol is a run of bytes that BPE holds together; the symbols of a word form a list. */
typedef struct {
    uint32_t start, length; /* in the word; length 0: it was joined to its left neighbour */
    int32_t id;             /* -1: no token */
    int32_t previous, next; /* -1 and the number of symbols at the ends */
} tok_symbol;

/* Two neighbours that may be joined. The smallest key goes first: the best, and of equals the leftmost. */
typedef struct {
    uint64_t key;    /* rank or score << 32 | left symbol */
    uint32_t length; /* of both: if it still fits, neither has changed, as symbols only grow */
    int32_t result;
} tok_join;

typedef struct {
    int32_t pc;
    size_t start; /* of the match */
} tok_thread;

typedef struct {
    const tokenizer *t;
    int failed;                   /* out of memory: all that is still to be done is skipped */
    tok_array ids, symbols, heap; /* of int, tok_symbol, tok_join */
    tok_array points;             /* of uint32_t: code points, for NFC */
    tok_array texts[TOK_STEPS];   /* of bytes: what a step makes of a piece */
    int last_unknown;             /* the last symbol of this word was unknown */
    tok_thread *threads;          /* [2][longest_code + 1] of the pattern machine, and */
    int32_t *stack;               /* [longest_code + 1] alternatives still to be followed */
    uint64_t *marks, moment;      /* [longest_code + 1] when a thread was last there; now */
} tok_job;

/* Appends `count` elements to be filled in; NULL, and j->failed, if memory ran out. */
static void *tok_more(tok_job *j, tok_array *a, size_t count, size_t size)
{
    if (!a->data || a->room - a->n < count) {
        size_t room = 2 * a->room + count + 256;
        void *data = room <= PTRDIFF_MAX / size ? realloc(a->data, room * size) : NULL;
        if (!data) {
            j->failed = 1;
            return NULL;
        }
        a->data = data;
        a->room = room;
    }
    a->n += count;
    return (char *)a->data + (a->n - count) * size;
}

static void tok_emit(tok_job *j, int id)
{
    int *out = tok_more(j, &j->ids, 1, sizeof *out);
    if (out)
        *out = id;
}

/* ---- Merging -------------------------------------------------------------------------------------------------- */

static void tok_heap_push(tok_job *j, tok_join join)
{
    if (!tok_more(j, &j->heap, 1, sizeof join))
        return;
    tok_join *heap = j->heap.data;
    size_t i = j->heap.n - 1;
    for (; i && heap[(i - 1) / 2].key > join.key; i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = join;
}

static tok_join tok_heap_pop(tok_job *j)
{
    tok_join *heap = j->heap.data, top = heap[0], last = heap[--j->heap.n];
    size_t i = 0, n = j->heap.n;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1].key < heap[child].key)
            child++;
        if (heap[child].key >= last.key)
            break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

/* Scores as numbers that sort: the highest score is the smallest number. -0 is 0. */
static uint32_t tok_score_key(float score)
{
    uint32_t u;
    score += 0.0f;
    memcpy(&u, &score, 4);
    return u >> 31 ? u : ~(u | 0x80000000u);
}

/* If the symbols left and right may be joined, puts that on the heap. */
static void tok_consider(tok_job *j, const uint8_t *word, int32_t left, int32_t right)
{
    const tokenizer *t = j->t;
    if (left < 0 || right >= (int32_t)j->symbols.n)
        return;
    const tok_symbol *s = j->symbols.data, *a = s + left, *b = s + right;
    uint32_t length = a->length + b->length;
    int found = t->by_score ? tok_find(&t->pieces, word + a->start, length) : tok_find_pair(&t->pairs, a->id, b->id);
    if (found < 0)
        return;
    int result = t->by_score ? found : t->merges[3 * (size_t)found + 2];
    uint64_t key = t->by_score ? tok_score_key(t->scores[found]) : (uint32_t)found;
    tok_heap_push(j, (tok_join){ key << 32 | (uint32_t)left, length, result });
}

/* Can these bytes, which are no token, be written as byte tokens? */
static int tok_has_bytes(const tokenizer *t, const uint8_t *s, size_t n)
{
    while (n && t->byte_tokens[s[n - 1]] >= 0)
        n--;
    return !n;
}

/* Emits what became of a symbol. One that is no token becomes its bytes' tokens if all exist, else unknown. */
static void tok_emit_symbol(tok_job *j, const uint8_t *s, size_t n, int id)
{
    const tokenizer *t = j->t;
    int unknown = id < 0 && !tok_has_bytes(t, s, n);
    if (id >= 0)
        tok_emit(j, id);
    else if (!unknown)
        for (size_t i = 0; i < n; i++)
            tok_emit(j, t->byte_tokens[s[i]]);
    else if (t->unknown >= 0 && !(j->last_unknown && t->fuse_unknown))
        tok_emit(j, t->unknown);
    j->last_unknown = unknown;
}

/* Joins the symbols until none can be joined any more, and emits them. */
static void tok_merge(tok_job *j, const uint8_t *word)
{
    tok_symbol *s = j->symbols.data;
    int32_t n = (int32_t)j->symbols.n;
    while (j->heap.n && !j->failed) {
        tok_join join = tok_heap_pop(j);
        int32_t left = (int32_t)(join.key & 0xffffffff), right = s[left].next;
        if (!s[left].length || right == n || s[left].length + s[right].length != join.length)
            continue;
        s[left].length = join.length;
        s[left].id = join.result;
        s[left].next = s[right].next;
        if (s[left].next < n)
            s[s[left].next].previous = left;
        s[right].length = 0;
        tok_consider(j, word, s[left].previous, left);
        tok_consider(j, word, left, s[left].next);
    }
    for (int32_t i = 0; i < n; i = s[i].next)
        tok_emit_symbol(j, word + s[i].start, s[i].length, s[i].id);
    j->symbols.n = j->heap.n = 0;
}

/* One word, the end of the pipeline: bytes or characters become symbols. Where two of them can never be joined, those
   before are merged at once (I4). */
static void tok_word(tok_job *j, const uint8_t *word, size_t n)
{
    const tokenizer *t = j->t;
    int whole = t->ignore_merges ? tok_find(&t->pieces, word, n) : -1;
    size_t length = 1, end = 0; /* of the last symbol */
    j->last_unknown = 0;
    if (whole >= 0)
        tok_emit(j, whole);
    for (size_t i = 0; i < n && whole < 0 && !j->failed; i += length) {
        if (t->chars)
            tok_utf8_get(word + i, n - i, &length);
        int id = t->chars ? tok_find(&t->pieces, word + i, length) : t->byte_tokens[word[i]];
        if (id < 0 && !t->by_score && t->unknown < 0 && !tok_has_bytes(t, word + i, length))
            continue; /* dropped */
        if (end && !(t->joins[word[end - 1]][word[i] >> 3] >> (word[i] & 7) & 1))
            tok_merge(j, word);
        end = i + length;
        int32_t at = (int32_t)j->symbols.n;
        tok_symbol *s = tok_more(j, &j->symbols, 1, sizeof *s);
        if (!s)
            return;
        *s = (tok_symbol){ (uint32_t)i, (uint32_t)length, id, at - 1, at + 1 };
        tok_consider(j, word, at - 1, at);
    }
    tok_merge(j, word);
}

/* ---- The pattern machine -----------------------------------------------------------------------------------------

A pattern is a program; a thread is a place in it. All threads read the text together, one character at a time, in the
order of their priority: of two threads in one place only the first survives, so there are never more threads than
instructions, and when a thread reaches OP_MATCH all those after it are cut off. This finds exactly what a backtracking
matcher finds that tries alternatives in order, without its worst case (Pike's machine). */

/* Where the leftmost match in text[from..n) that is not empty begins and ends; if there is none, `ends` stays. */
static void tok_match(tok_job *j, const tok_step *split, const uint8_t *text, size_t n, size_t from, size_t ends[2])
{
    const tokenizer *t = j->t;
    const int32_t *code = split->args + 2;
    tok_thread *next = j->threads, *now = next + t->longest_code + 1;
    int32_t *stack = j->stack;
    uint64_t *marks = j->marks, moment = j->moment;
    int found = 0, n_next = 0;
    for (size_t at = from, length = 1; at <= n && !(found && !n_next); at += length) {
        tok_thread *swap = now;
        now = next;
        next = swap;
        int atom = at < n ? t->atoms[tok_utf8_get(text + at, n - at, &length)] : 0; /* end */
        int n_now = n_next, cut = 0;
        if (!found) /* a match may begin here; later ones have less priority */
            now[n_now++] = (tok_thread){ 0, at };
        moment++;
        n_next = 0;
        for (int i = 0; i < n_now && !cut; i++) {
            int top = 0;
            stack[top++] = now[i].pc;
            while (top && !cut) { /* follow it, alternatives in order, to where it reads */
                int32_t pc = stack[--top];
                while (marks[pc] != moment) {
                    const int32_t *c = code + 3 * pc;
                    marks[pc] = moment;
                    if (c[0] == OP_FORK) {
                        stack[top++] = c[2];
                        pc = c[1];
                    } else if (c[0] == OP_JUMP) {
                        pc = c[1];
                    } else if (c[0] == OP_AHEAD && tok_in_set(t, c[1], atom)) {
                        pc++;
                    } else if (c[0] == OP_SET && tok_in_set(t, c[1], atom)) {
                        next[n_next++] = (tok_thread){ pc + 1, now[i].start };
                    } else if (c[0] == OP_MATCH && at > now[i].start) {
                        ends[0] = now[i].start;
                        ends[1] = at;
                        found = cut = 1;
                    }
                }
            }
        }
    }
    j->moment = moment;
}

/* ---- NFC ------------------------------------------------------------------------------------------------------ */

enum { HANGUL_S = 0xac00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11a7 };

/* Appends the full decomposition of c, 1 to 4 code points, to j->points. */
static void tok_decompose(tok_job *j, uint32_t c)
{
    uint32_t row = j->t->nfc[c] >> NFC_ROW_SHIFT, s = c - HANGUL_S;
    uint32_t *out = tok_more(j, &j->points, 4, sizeof *out);
    size_t n = 1;
    if (!out)
        return;
    if (s < 11172) { /* 19 x 21 x 28 syllables: arithmetic */
        out[0] = HANGUL_L + s / 588;
        out[1] = HANGUL_V + s % 588 / 28;
        out[2] = HANGUL_T + s % 28;
        n = s % 28 ? 3 : 2;
    } else if (row) {
        const int32_t *d = j->t->decompose + 5 * (size_t)(row - 1);
        for (n = 0; n < 4 && d[n + 1]; n++)
            out[n] = (uint32_t)d[n + 1];
    } else {
        out[0] = c;
    }
    j->points.n -= 4 - n;
}

/* What a and b compose to; -1 if nothing. */
static int tok_compose(const tokenizer *t, uint32_t a, uint32_t b)
{
    if (a - HANGUL_L < 19 && b - HANGUL_V < 21)
        return (int)(HANGUL_S + ((a - HANGUL_L) * 21 + b - HANGUL_V) * 28);
    if (a - HANGUL_S < 11172 && (a - HANGUL_S) % 28 == 0 && b - HANGUL_T - 1 < 27)
        return (int)(a + b - HANGUL_T);
    int row = t->nfc[b] & NFC_JOINS ? tok_find_pair(&t->composed, (int)a, (int)b) : -1;
    return row < 0 ? -1 : t->compose[3 * (size_t)row + 2];
}

/* The NFC form of a text; 0 if it is in NFC already. Decompose all, sort the marks between two characters of class 0
   by class, compose. */
static int tok_nfc(tok_job *j, const uint8_t *text, size_t n, tok_array *out)
{
    const tokenizer *t = j->t;
    size_t length, m = 0;
    uint32_t *starter = NULL;
    int last = -1; /* class of what stands between the starter and here; -1: nothing */
    int same = 1;  /* nothing from U+0300 on decomposes or joins; what is below is composed */
    for (size_t i = 0; i < n && same; i += length)
        same = !t->nfc[tok_utf8_get(text + i, n - i, &length)] || text[i] < 0xcc;
    if (same)
        return 0;
    j->points.n = 0;
    for (size_t i = 0; i < n && !j->failed; i += length)
        tok_decompose(j, tok_utf8_get(text + i, n - i, &length));
    uint32_t *c = j->points.data;
    for (size_t i = 0; i <= j->points.n && !j->failed; i++) {
        uint32_t class = i < j->points.n ? t->nfc[c[i]] & NFC_CLASS : 0;
        if (class)
            tok_heap_push(j, (tok_join){ (uint64_t)class << 32 | (uint32_t)i, 0, (int32_t)c[i] });
        for (size_t k = i - j->heap.n; !class && k < i; k++)
            c[k] = (uint32_t)tok_heap_pop(j).result;
    }
    for (size_t i = 0; i < j->points.n; i++) {
        int class = t->nfc[c[i]] & NFC_CLASS;
        int both = starter && last < class ? tok_compose(t, *starter, c[i]) : -1;
        if (both >= 0) {
            *starter = (uint32_t)both;
            continue;
        }
        if (!class)
            starter = &c[m];
        last = class ? class : -1;
        c[m++] = c[i];
    }
    uint8_t *bytes = tok_more(j, out, 4 * m, 1);
    out->n = 0;
    for (size_t i = 0; i < m && bytes; i++)
        out->n += tok_utf8_put(c[i], bytes + out->n);
    return 1;
}

/* ---- Added tokens --------------------------------------------------------------------------------------------- */

static void tok_step_on(tok_job *j, int step, const uint8_t *text, size_t n, int place);

/* The longest added token that the text begins with; -1 if there is none. trust as in tok_scan. Of those that are not
   greater than the text the last shares the most with it: a shorter one can only lie in what is shared. */
static int tok_find_added(const tokenizer *t, const uint8_t *text, const uint8_t *trust, size_t n)
{
    int normalized = trust ? 0 : TYPE_NORMALIZED;
    for (size_t length, shared; n; n = shared < length ? shared : length - 1) {
        int low = 0, high = t->n_added; /* those before `low` are not greater */
        while (low < high) {
            int middle = low + (high - low) / 2;
            const uint8_t *s = tok_bytes(t, t->added[middle], &length);
            if (tok_order(s, length, text, n) <= 0)
                low = middle + 1;
            else
                high = middle;
        }
        if (!low)
            break;
        int id = t->added[low - 1];
        const uint8_t *s = tok_bytes(t, id, &length);
        for (shared = 0; shared < length && shared < n && s[shared] == text[shared];)
            shared++;
        if (shared == length && (t->types[id] & TYPE_NORMALIZED) == normalized &&
            (tok_kind(t, id) == TOKEN_USER || !memchr(trust, 0, length))) /* I3 */
            return id;
    }
    return -1;
}

/* May this character not touch a TYPE_WORD token? */
static int tok_is_word(const tokenizer *t, uint32_t c)
{
    return t->word_set >= 0 && tok_in_set(t, t->word_set, t->atoms[c]);
}

/* Emits the added tokens of a text, and hands what is between them to the steps from number `step` on. trust: for
   each byte whether it is trusted; NULL: look for the normalised ones. */
static void tok_scan(tok_job *j, int step, const uint8_t *text, const uint8_t *trust, size_t n, int place)
{
    const tokenizer *t = j->t;
    size_t done = 0, end = 0, length;
    while (end < n && !j->failed) {
        size_t begin = end++;
        int id = t->begins[text[begin]] ? tok_find_added(t, text + begin, trust ? trust + begin : NULL, n - begin) : -1;
        if (id < 0)
            continue;
        int type = t->types[id];
        tok_bytes(t, id, &length);
        end = begin + length;
        if (type & TYPE_WORD && ((begin && tok_is_word(t, tok_utf8_before(text, begin, &length))) ||
                                 (end < n && tok_is_word(t, tok_utf8_get(text + end, n - end, &length)))))
            continue;
        while (type & TYPE_LSTRIP && begin > done && tok_is_space(tok_utf8_before(text, begin, &length)))
            begin -= length;
        while (type & TYPE_RSTRIP && end < n && tok_is_space(tok_utf8_get(text + end, n - end, &length)))
            end += length;
        tok_step_on(j, step, text + done, begin - done, place);
        tok_emit(j, id);
        place = tok_kind(t, id) == TOKEN_USER ? AFTER_USER : AFTER_CONTROL;
        done = end;
    }
    tok_step_on(j, step, text + done, n - done, place);
}

/* ---- The steps ------------------------------------------------------------------------------------------------ */

static void tok_append(tok_job *j, tok_array *out, const uint8_t *bytes, size_t n)
{
    void *to = tok_more(j, out, n, 1);
    if (to)
        memcpy(to, bytes, n);
}

/* A text with bytes put before it; 0 if that is not wanted here. */
static int tok_prepend(tok_job *j, const tok_step *step, const uint8_t *text, size_t n, int place, tok_array *out)
{
    size_t n_bytes = (size_t)step->n - 1;
    int is_there = n_bytes <= n && !memcmp(text, step->bytes, n_bytes);
    if (!(step->args[0] & place) || (step->args[0] & UNLESS_THERE && is_there))
        return 0;
    tok_append(j, out, step->bytes, n_bytes);
    tok_append(j, out, text, n);
    return 1;
}

/* A text with one string replaced by another; 0 if it does not occur. */
static int tok_replace(tok_job *j, const tok_step *step, const uint8_t *text, size_t n, tok_array *out)
{
    const uint8_t *from = step->bytes;
    size_t n_from = (size_t)step->args[0], copied = 0, i = 0;
    while (i + n_from <= n) {
        if (text[i] != from[0] || memcmp(text + i, from, n_from)) {
            i++;
            continue;
        }
        tok_append(j, out, text + copied, i - copied);
        tok_append(j, out, from + n_from, (size_t)step->n - 1 - n_from);
        copied = i += n_from;
    }
    if (copied)
        tok_append(j, out, text + copied, n - copied);
    return copied > 0;
}

/* Cuts a text by a pattern. Matches and what is between them alternate; the behaviour says which of two neighbours
   stay together, or that matches are dropped. */
static void tok_split(tok_job *j, int step, const uint8_t *text, size_t n, int place)
{
    const tok_step *split = &j->t->steps[step];
    int behaviour = split->args[0], invert = split->args[1] != 0;
    int last = -1;            /* was the last part a match? */
    size_t piece = 0, at = 0; /* text[piece..at) is not passed on yet */
    while (at < n && !j->failed) {
        size_t ends[2] = { n, n }; /* of the part before the match, and of the match */
        tok_match(j, split, text, n, at, ends);
        for (int part = 0; part < 2; part++) {
            int match = part ^ invert;
            if (ends[part] == at)
                continue;
            if (!(behaviour == SPLIT_PREVIOUS && match && last == 0) &&
                !(behaviour == SPLIT_NEXT && !match && last == 1) &&
                !(behaviour == SPLIT_CONTIGUOUS && match == last)) {
                tok_step_on(j, step + 1, text + piece, at - piece, piece ? AFTER_SPLIT : place);
                piece = at;
            }
            last = match;
            at = ends[part];
            if (behaviour == SPLIT_REMOVED && match)
                piece = at;
        }
    }
    tok_step_on(j, step + 1, text + piece, at - piece, piece ? AFTER_SPLIT : place);
}

/* Carries out the steps from number `step` on for one piece of text that stands at `place`. */
static void tok_step_on(tok_job *j, int step, const uint8_t *text, size_t n, int place)
{
    const tok_step *s = &j->t->steps[step];
    if (n > INT_MAX)
        j->failed = 1;
    if (j->failed || !n)
        return;
    if (step == j->t->n_steps) {
        tok_word(j, text, n);
    } else if (s->op == STEP_SPLIT) {
        tok_split(j, step, text, n, place);
    } else if (s->op == STEP_ADDED) {
        tok_scan(j, step + 1, text, NULL, n, place);
    } else {
        tok_array *out = &j->texts[step];
        out->n = 0;
        int changed = s->op == STEP_PREPEND   ? tok_prepend(j, s, text, n, place, out)
                      : s->op == STEP_REPLACE ? tok_replace(j, s, text, n, out)
                                              : s->op == STEP_NFC && tok_nfc(j, text, n, out);
        tok_step_on(j, step + 1, changed ? out->data : text, changed ? out->n : n, place);
    }
}

/* ---- Encoding ------------------------------------------------------------------------------------------------- */

int tokenizer_encode(const tokenizer *t, const tokenizer_span *spans, int n_spans, int **ids, int *n_ids)
{
    tok_job j = { .t = t };
    size_t n = 0, code = (size_t)t->longest_code + 1;
    for (int i = 0; i < n_spans; n += spans[i++].length)
        if (spans[i].length > INT_MAX - n)
            return -1;
    uint8_t *text = malloc(n + 1), *trust = malloc(n + 1);
    j.threads = malloc(2 * code * sizeof *j.threads);
    j.stack = malloc(code * sizeof *j.stack);
    j.marks = calloc(code, sizeof *j.marks);
    j.failed = !text || !trust || !j.threads || !j.stack || !j.marks || !tok_more(&j, &j.ids, 0, sizeof **ids);
    n = 0;
    for (int i = 0; i < n_spans && !j.failed; n += spans[i++].length)
        if (spans[i].length) {
            memcpy(text + n, spans[i].text, spans[i].length);
            memset(trust + n, spans[i].trusted != 0, spans[i].length);
        }
    if (!j.failed)
        tok_scan(&j, 0, text, trust, n, AT_START);
    j.failed |= j.ids.n > INT_MAX;
    void *made[] = { text, trust, j.threads, j.stack, j.marks, j.symbols.data, j.heap.data,
                     j.points.data, j.failed ? j.ids.data : NULL };
    for (size_t i = 0; i < sizeof made / sizeof *made; i++)
        free(made[i]);
    for (int i = 0; i < t->n_steps; i++)
        free(j.texts[i].data);
    *ids = j.failed ? NULL : j.ids.data;
    *n_ids = j.failed ? 0 : (int)j.ids.n;
    return j.failed ? -1 : 0;
}

/* ---- Decoding ------------------------------------------------------------------------------------------------- */

const char *tokenizer_piece(const tokenizer *t, int id, size_t *length, int *kind)
{
    *length = 0;
    *kind = 0;
    if (id < 0 || id >= t->vocab)
        return NULL;
    *kind = tok_kind(t, id);
    return (const char *)tok_bytes(t, id, length);
}

size_t tokenizer_stream_room(const tokenizer *t) { return t->longest + sizeof((tokenizer_stream *)0)->bytes; }

size_t tokenizer_stream_put(const tokenizer *t, tokenizer_stream *s, int id, char *out)
{
    size_t length, n = (size_t)s->n;
    int kind;
    const char *piece = tokenizer_piece(t, id, &length, &kind);
    if (!length || (!s->controls && (kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN)))
        return 0;
    size_t skip = t->strip_space && !s->started && piece[0] == ' ';
    s->started = 1;
    memcpy(out, s->bytes, n);
    memcpy(out + n, piece + skip, length - skip);
    n += length - skip;
    s->n = 0;
    for (size_t k = n < 3 ? n : 3; k > 0 && !s->n; k--)
        if (tok_utf8_length((uint8_t *)out + n - k, k) > k)
            s->n = (int)k;
    n -= (size_t)s->n;
    memcpy(s->bytes, out + n, (size_t)s->n);
    return n;
}

size_t tokenizer_stream_end(tokenizer_stream *s, char *out)
{
    size_t n = (size_t)s->n;
    memcpy(out, s->bytes, n);
    s->n = 0;
    return n;
}

#endif
