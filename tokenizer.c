/* tokenizer.c: text to token ids and back. No dependencies; run.c includes it, and so can you.

A language model reads numbers. Byte pair encoding (BPE) makes them: start from the single bytes or
characters of a text, and join the neighbours that the vocabulary likes best, again and again, until
no neighbours are liked. All tokenizers of that family share this core; they differ in what is done
to the text before. Those differences are data in the model file: this file knows no tokenizer by
its name.

    text -> added tokens -> steps (normalise, split, ...) -> one word at a time -> BPE -> ids
            "<|end|>"       a list in the file               " hello"              " hel" "lo"

Map: the interface · what the file holds · UTF-8 · the tokenizer in memory · lookups · opening
(where all is checked) · merging · the pattern machine · NFC · the steps · added tokens · encoding ·
decoding

Invariants
  I1  After tokenizer_open nothing in the file can lead out of bounds: every offset, id, jump and
      set number was checked there, once. Nothing is checked again, nothing writes to a tokenizer.
  I2  Text is bytes. Invalid UTF-8 is no error: such a byte passes through as itself, and to a
      pattern it looks like U+FFFD. NUL is an ordinary byte.
  I3  A control token is recognised only where all its bytes are trusted, and nothing else ever
      produces one: neither merging nor a lookup. So no user's text can forge the end of a turn.
  I4  A merged token spells what its two parts spell. So two symbols can only ever be joined if the
      last byte of one and the first byte of the other stand side by side in some token; anywhere
      else a text may be cut (tok_word). Words stay short even where no pattern splits the text.
  I5  Time is O(n log n) in the text, times the length of the patterns. Nothing recurses deeper than
      the list of steps (64 at most).
*/
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

/* ---- The interface ------------------------------------------------------------------------- */

/* Where tokenizer_open finds the tensors and the metadata of a model. What it returns must live as
   long as the tokenizer and be aligned to its element. */
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

/* Opens the tokenizer of a model and checks all of it. NULL, and a sentence in `error`, if
   something is wrong. */
TOKENIZER_API tokenizer *tokenizer_open(const tokenizer_source *source, int vocab_size, char *error,
                                        size_t error_size);
TOKENIZER_API void tokenizer_close(tokenizer *t);

/* Encodes the spans as one text: pieces merge across span borders. Adds no BOS, no EOS. Returns 0,
   and *ids (the caller frees it) of *n_ids ids; or -1 if memory ran out or the text is longer than
   2 GB. Any number of threads may encode with one tokenizer. */
TOKENIZER_API int tokenizer_encode(const tokenizer *t, const tokenizer_span *spans, int n_spans,
                                   int **ids, int *n_ids);

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

/* Decodes one id into `out`, returns the number of bytes: whole characters, and bytes that can no
   longer become part of one (as they are). The beginning of a character waits for ids to come. */
TOKENIZER_API size_t tokenizer_stream_put(const tokenizer *t, tokenizer_stream *s, int id,
                                          char *out);

/* What still waited, at the end of the text. */
TOKENIZER_API size_t tokenizer_stream_end(tokenizer_stream *s, char *out);

/* ---- What the file holds -----------------------------------------------------------------------

Metadata (flags are 0 or 1)
  tokenizer.merge          rank: a table of pairs, the first in the table is joined first
                           score: neighbours that spell a token may be joined, highest score first
  tokenizer.symbols        bytes or chars: what BPE starts from. Of `chars` one that is no token
                           becomes its byte tokens, if all of them exist, else the unknown token
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
  tokenizer.atoms          I32 [n,2]      first code point, atom: the classes of characters that the
                                          patterns tell apart, 1..255; together all code points
  tokenizer.sets           I32 [n,8]      sets of atoms, 256 bits each; atom 0: the end of the text
  tokenizer.nfc.classes    I32 [n,3]      first, last code point, canonical combining class
  tokenizer.nfc.decompose  I32 [n,5]      code point, its full decomposition (0: no more), ascending
  tokenizer.nfc.compose    I32 [n,3]      first, second, composed, ascending

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
enum { TOK_POINTS = 0x110000 };

/* ---- UTF-8 ----------------------------------------------------------------------------------- */

/* The length of the character that s begins with: 1..4; 0 if it is none; -1 if the n bytes are a
   good beginning and more are needed. Overlong forms, surrogates, what is above 10FFFF: none. */
static int tok_utf8_length(const uint8_t *s, size_t n) {
    if (s[0] < 0x80) return 1;
    int length = s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    uint8_t low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
    uint8_t high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; i++, low = 0x80, high = 0xbf) {
        if ((size_t)i >= n) return -1;
        if (s[i] < low || s[i] > high) return 0;
    }
    return length;
}

/* The character at s and its length; an invalid byte is U+FFFD of length 1 (I2). n > 0. */
static uint32_t tok_utf8_get(const uint8_t *s, size_t n, size_t *length) {
    int k = tok_utf8_length(s, n);
    uint32_t c = k <= 0 ? 0xfffd : k == 1 ? s[0] : s[0] & (0x7fu >> k);
    for (int i = 1; i < k; i++) c = c << 6 | (s[i] & 0x3fu);
    *length = k > 0 ? (size_t)k : 1;
    return c;
}

/* The character that ends at s[n], n > 0. */
static uint32_t tok_utf8_before(const uint8_t *s, size_t n, size_t *length) {
    for (size_t k = n < 4 ? n : 4; k > 1; k--)
        if (tok_utf8_length(s + n - k, k) == (int)k) return tok_utf8_get(s + n - k, k, length);
    return tok_utf8_get(s + n - 1, 1, length);
}

static size_t tok_utf8_put(uint32_t c, uint8_t *out) {
    if (c < 0x80) return out[0] = (uint8_t)c, 1;
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (uint8_t)(0x80 | (c & 0x3f));
    out[0] = (uint8_t)((n == 2 ? 0xc0 : n == 3 ? 0xe0 : 0xf0) | c);
    return n;
}

/* Unicode's White_Space, what lstrip and rstrip strip. */
static int tok_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || c == 0x2028
        || (c >= 0x2000 && c <= 0x200a) || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* ---- The tokenizer in memory ----------------------------------------------------------------- */

typedef struct {
    int op, n;           /* operation, number of arguments */
    const int32_t *args; /* in the file */
} tok_step;

struct tokenizer {
    /* in the file */
    int vocab;
    const uint8_t *bytes, *types;
    const int32_t *offsets, *merges, *added, *sets, *decompose, *compose;
    const float *scores; /* NULL: merge=rank */
    int n_merges, n_added, n_sets, n_decompose, n_compose, n_steps;
    tok_step steps[TOK_STEPS];
    /* in the metadata */
    int chars, unknown, fuse_unknown, ignore_merges, strip_space;
    /* made when it was opened */
    size_t longest;   /* token, in bytes */
    uint32_t *pieces; /* hash table: bytes -> 1 + id of a token that merging may make; 0: empty */
    uint32_t *pairs;  /* hash table: (left, right) -> 1 + rank; 0: empty */
    uint32_t piece_mask, pair_mask;
    int word_set;             /* of STEP_WORD, -1: none */
    int longest_code;         /* instructions of the longest pattern */
    int32_t byte_tokens[256]; /* byte -> its token, -1: none. BPE starts from them, or falls back */
    uint8_t begins[256];      /* some added token begins with this byte */
    uint8_t joins[256][32];   /* bit set: these two bytes stand side by side in some token (I4) */
    uint8_t *atoms;           /* [TOK_POINTS] code point -> atom; NULL: no pattern */
    uint16_t *nfc;            /* [TOK_POINTS] code point -> combining class, NFC_ flags; or NULL */
};
enum { NFC_CLASS = 0xff, NFC_DECOMPOSES = 0x100, NFC_JOINS = 0x200 };

static const uint8_t *tok_bytes(const tokenizer *t, int id, size_t *length) {
    *length = (size_t)(t->offsets[id + 1] - t->offsets[id]);
    return t->bytes + t->offsets[id];
}

static int tok_kind(const tokenizer *t, int id) { return t->types[id] & 0x0f; }

static int tok_in_set(const tokenizer *t, int set, unsigned atom) {
    return (int)((uint32_t)t->sets[8 * set + (int)(atom >> 5)] >> (atom & 31) & 1);
}

/* ---- Lookups: two hash tables with open addressing, at most half full ------------------------ */

static uint32_t tok_hash(const uint8_t *s, size_t n) {
    uint64_t h = n * 0x9e3779b97f4a7c15u;
    for (; n >= 8; n -= 8, s += 8) {
        uint64_t x;
        memcpy(&x, s, 8);
        h = (h ^ x) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    uint64_t x = 0;
    memcpy(&x, s, n);
    h = (h ^ x) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
    return (uint32_t)(h * 0xc4ceb9fe1a85ec53u >> 32);
}

static uint32_t tok_hash_pair(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32) * 0xff51afd7ed558ccdu;
    return (uint32_t)(h >> 32);
}

/* The slot of a piece, or the empty one where it belongs; NULL if the way there is longer than any
   honest table makes it. */
static uint32_t *tok_piece_slot(const tokenizer *t, const uint8_t *s, size_t n) {
    uint32_t i = tok_hash(s, n);
    for (int probes = 0; probes < TOK_PROBES; probes++, i++) {
        uint32_t *slot = &t->pieces[i & t->piece_mask];
        size_t length;
        if (!*slot) return slot;
        const uint8_t *piece = tok_bytes(t, (int)(*slot - 1), &length);
        if (length == n && !memcmp(piece, s, n)) return slot;
    }
    return NULL;
}

/* The same for a pair of tokens. */
static uint32_t *tok_pair_slot(const tokenizer *t, int32_t left, int32_t right) {
    uint32_t i = tok_hash_pair(left, right);
    for (int probes = 0; probes < TOK_PROBES; probes++, i++) {
        uint32_t *slot = &t->pairs[i & t->pair_mask];
        if (!*slot) return slot;
        const int32_t *m = t->merges + 3 * (size_t)(*slot - 1);
        if (m[0] == left && m[1] == right) return slot;
    }
    return NULL;
}

/* The token that merging may produce and that spells these bytes; -1 if there is none. */
static int tok_lookup(const tokenizer *t, const uint8_t *s, size_t n) {
    const uint32_t *slot = n <= t->longest ? tok_piece_slot(t, s, n) : NULL;
    return slot ? (int)*slot - 1 : -1;
}

/* The rank of a pair of tokens; -1 if they do not merge. */
static int tok_lookup_pair(const tokenizer *t, int32_t left, int32_t right) {
    const uint32_t *slot = tok_pair_slot(t, left, right);
    return slot ? (int)*slot - 1 : -1;
}

/* ---- Opening --------------------------------------------------------------------------------- */

typedef struct {
    const tokenizer_source *source;
    char *error;
    size_t error_size;
} tok_opening;

/* Writes the sentence; is 0, what a function of this section returns if something is wrong. */
#define TOK_FAIL(o, ...) (snprintf((o)->error, (o)->error_size, __VA_ARGS__), 0)

static int tok_bad_row(tok_opening *o, const char *name, int row) {
    return TOK_FAIL(o, "%s: row %d is not well formed; export the model again", name, row);
}

static int tok_no_memory(tok_opening *o) {
    return TOK_FAIL(o, "not enough memory for the tokenizer");
}

/* A tensor with rows of `columns` elements. 0 if it must be there and is not, or has no whole
   number of rows. */
static int tok_tensor(tok_opening *o, const char *name, const char *dtype, size_t columns,
                      int required, const void **data, int *rows) {
    size_t bytes = 0, width = columns * (dtype[0] == 'U' ? 1 : 4);
    *data = o->source->tensor(o->source->context, name, dtype, &bytes);
    *rows = 0;
    if (!*data && !required) return 1;
    if (!*data) return TOK_FAIL(o, "the tokenizer has no tensor %s of type %s", name, dtype);
    if (bytes % width || bytes / width > INT_MAX / 8)
        return TOK_FAIL(o, "%s has %zu bytes, not a whole number of rows of %zu", name, bytes,
                        width);
    *rows = (int)(bytes / width);
    return 1;
}

/* Which of two words stands in the metadata; where it is absent, the first if `optional`. */
static int tok_choice(tok_opening *o, const char *key, const char *a, const char *b, int optional,
                      int *is_b) {
    const char *s = o->source->text(o->source->context, key);
    *is_b = s && !strcmp(s, b);
    return *is_b || (s ? !strcmp(s, a) : optional)
           || TOK_FAIL(o, "%s is \"%.20s\"; it must be %s or %s", key, s ? s : "", a, b);
}

static int tok_open_metadata(tok_opening *o, tokenizer *t) {
    const char *unknown = o->source->text(o->source->context, "tokenizer.unknown");
    t->unknown = -1;
    if (unknown) {
        char *end;
        long id = strtol(unknown, &end, 10);
        if (end == unknown || *end || id < 0 || id >= t->vocab)
            return TOK_FAIL(o, "tokenizer.unknown is \"%.20s\", not one of the %d tokens", unknown,
                            t->vocab);
        t->unknown = (int)id;
    }
    return tok_choice(o, "tokenizer.symbols", "bytes", "chars", 0, &t->chars)
           && tok_choice(o, "tokenizer.fuse_unknown", "0", "1", 1, &t->fuse_unknown)
           && tok_choice(o, "tokenizer.ignore_merges", "0", "1", 1, &t->ignore_merges)
           && tok_choice(o, "tokenizer.strip_space", "0", "1", 1, &t->strip_space);
}

/* The bytes, offsets and types of all tokens, and the table from bytes to tokens. */
static int tok_open_pieces(tok_opening *o, tokenizer *t) {
    const void *bytes, *offsets, *types;
    int n_bytes, n_offsets, n_types;
    if (!tok_tensor(o, "tokenizer.bytes", "U8", 1, 1, &bytes, &n_bytes)
        || !tok_tensor(o, "tokenizer.offsets", "I32", 1, 1, &offsets, &n_offsets)
        || !tok_tensor(o, "tokenizer.types", "U8", 1, 1, &types, &n_types))
        return 0;
    if (n_offsets != t->vocab + 1 || n_types != t->vocab)
        return TOK_FAIL(
            o, "the tokenizer has %d types and %d offsets; for %d tokens it must have %d and %d",
            n_types, n_offsets, t->vocab, t->vocab, t->vocab + 1);
    t->bytes = bytes, t->offsets = offsets, t->types = types;
    if (t->offsets[0] != 0 || t->offsets[t->vocab] != n_bytes)
        return TOK_FAIL(o, "tokenizer.offsets run from %d to %d; they must run from 0 to %d",
                        t->offsets[0], t->offsets[t->vocab], n_bytes);
    for (int id = 0; id < t->vocab; id++)
        if (t->offsets[id] > t->offsets[id + 1] || t->offsets[id + 1] > n_bytes
            || t->offsets[id + 1] - t->offsets[id] > TOK_LONGEST)
            return TOK_FAIL(o, "token %d runs from byte %d to byte %d of %d", id, t->offsets[id],
                            t->offsets[id + 1], n_bytes);
    t->piece_mask = 1;
    while (t->piece_mask < 2 * (uint32_t)t->vocab) t->piece_mask = 2 * t->piece_mask + 1;
    t->pieces = calloc((size_t)t->piece_mask + 1, sizeof *t->pieces);
    if (!t->pieces) return tok_no_memory(o);
    memset(t->byte_tokens, -1, sizeof t->byte_tokens);
    for (int id = 0; id < t->vocab; id++) {
        size_t length;
        const uint8_t *s = tok_bytes(t, id, &length);
        int kind = tok_kind(t, id);
        if (kind < TOKEN_NORMAL || kind > TOKEN_BYTE)
            return TOK_FAIL(o, "token %d is of the unknown kind %d", id, kind);
        if (kind == TOKEN_BYTE && length != 1)
            return TOK_FAIL(o, "token %d stands for a byte, but has %zu bytes", id, length);
        if (kind == TOKEN_BYTE) t->byte_tokens[s[0]] = id;
        if (length > t->longest) t->longest = length;
        if ((kind != TOKEN_NORMAL && kind != TOKEN_USER) || !length) continue;
        uint32_t *slot = tok_piece_slot(t, s, length);
        if (!slot) return TOK_FAIL(o, "the tokens look made to slow down their lookup");
        if (!*slot) *slot = (uint32_t)id + 1; /* of two that spell the same, the first is taken */
    }
    for (int b = 0; !t->chars && b < 256; b++) {
        int id = tok_lookup(t, &(uint8_t){(uint8_t)b}, 1);
        if (id >= 0) t->byte_tokens[b] = id;
    }
    return 1;
}

/* Any token that merging may make allows its inner pairs of bytes to be joined (I4). */
static void tok_allow_joins(tokenizer *t, int id) {
    size_t length;
    const uint8_t *s = tok_bytes(t, id, &length);
    for (size_t i = 1; i < length; i++) t->joins[s[i - 1]][s[i] >> 3] |= (uint8_t)(1 << (s[i] & 7));
}

static int tok_open_scores(tok_opening *o, tokenizer *t) {
    const void *scores;
    int n;
    if (!tok_tensor(o, "tokenizer.scores", "F32", 1, 1, &scores, &n)) return 0;
    if (n != t->vocab)
        return TOK_FAIL(o, "tokenizer.scores has %d entries for %d tokens", n, t->vocab);
    t->scores = scores;
    for (int id = 0; id < t->vocab; id++) {
        if (t->scores[id] != t->scores[id])
            return TOK_FAIL(o, "the score of token %d is not a number", id);
        if (tok_kind(t, id) == TOKEN_NORMAL || tok_kind(t, id) == TOKEN_USER)
            tok_allow_joins(t, id);
    }
    return 1;
}

static int tok_open_merges(tok_opening *o, tokenizer *t) {
    const void *merges;
    if (!tok_tensor(o, "tokenizer.merges", "I32", 3, 1, &merges, &t->n_merges)) return 0;
    t->merges = merges;
    t->pair_mask = 1;
    while (t->pair_mask < 2 * (uint32_t)t->n_merges) t->pair_mask = 2 * t->pair_mask + 1;
    t->pairs = calloc((size_t)t->pair_mask + 1, sizeof *t->pairs);
    if (!t->pairs) return tok_no_memory(o);
    for (int rank = 0; rank < t->n_merges; rank++) {
        const int32_t *m = t->merges + 3 * (size_t)rank;
        for (int k = 0; k < 3; k++)
            if (m[k] < 0 || m[k] >= t->vocab)
                return TOK_FAIL(o, "merge %d names token %d of %d", rank, m[k], t->vocab);
        size_t left, right, both;
        const uint8_t *a = tok_bytes(t, m[0], &left), *b = tok_bytes(t, m[1], &right),
                      *c = tok_bytes(t, m[2], &both);
        if (both != left + right || !left || !right || memcmp(c, a, left)
            || memcmp(c + left, b, right))
            return TOK_FAIL(o, "merge %d: token %d does not spell token %d and token %d", rank,
                            m[2], m[0], m[1]);
        if (tok_kind(t, m[2]) != TOKEN_NORMAL && tok_kind(t, m[2]) != TOKEN_USER)
            return TOK_FAIL(o, "merge %d makes token %d, which is not an ordinary one", rank,
                            m[2]); /* I3 */
        tok_allow_joins(t, m[2]);
        uint32_t *slot = tok_pair_slot(t, m[0], m[1]);
        if (!slot) return TOK_FAIL(o, "the merges look made to slow down their lookup");
        if (!*slot) *slot = (uint32_t)rank + 1; /* of two merges of one pair, the first is taken */
    }
    return 1;
}

static int tok_open_added(tok_opening *o, tokenizer *t) {
    const void *added;
    if (!tok_tensor(o, "tokenizer.added", "I32", 1, 0, &added, &t->n_added)) return 0;
    t->added = added;
    for (int i = 0; i < t->n_added; i++) {
        int id = t->added[i];
        if (id < 0 || id >= t->vocab)
            return TOK_FAIL(o, "added token %d is number %d of %d", i, id, t->vocab);
        size_t length, before;
        const uint8_t *s = tok_bytes(t, id, &length);
        if (!length) return TOK_FAIL(o, "the added token %d is empty", id);
        if (tok_kind(t, id) != TOKEN_USER && t->types[id] & TYPE_NORMALIZED)
            return TOK_FAIL(
                o,
                "the control token %d wants normalised text; only text as it came can be trusted",
                id);
        t->begins[s[0]] = 1;
        if (!i) continue;
        const uint8_t *last = tok_bytes(t, t->added[i - 1], &before);
        int order = memcmp(last, s, before < length ? before : length);
        if (order > 0 || (order == 0 && before >= length))
            return TOK_FAIL(o, "the added tokens %d and %d are not in ascending order",
                            t->added[i - 1], id);
    }
    return 1;
}

/* One pattern: every jump stays inside, no instruction runs off the end, sets exist, and only
   OP_AHEAD may be pleased with the end of the text. */
static int tok_check_code(tok_opening *o, tokenizer *t, const tok_step *step) {
    int n = (step->n - 2) / 3;
    if (step->n < 5 || (step->n - 2) % 3 || n > TOK_CODE || step->args[0] < SPLIT_REMOVED
        || step->args[0] > SPLIT_CONTIGUOUS || step->args[1] < 0 || step->args[1] > 1)
        return TOK_FAIL(o, "tokenizer.program: a split of %d numbers is not well formed", step->n);
    if (!t->atoms)
        return TOK_FAIL(o, "tokenizer.program splits by pattern, but there is no tokenizer.atoms");
    for (int pc = 0; pc < n; pc++) {
        const int32_t *c = step->args + 2 + 3 * pc;
        int jumps = c[0] == OP_FORK   ? 2
                    : c[0] == OP_JUMP ? 1
                                      : 0,
            good = c[0] >= OP_MATCH && c[0] <= OP_FORK;
        for (int k = 1; k <= jumps; k++) good = good && c[k] >= 0 && c[k] < n;
        if (c[0] == OP_SET || c[0] == OP_AHEAD)
            good = c[1] >= 0 && c[1] < t->n_sets && pc + 1 < n
                   && (c[0] == OP_AHEAD || !tok_in_set(t, c[1], 0));
        if (!good)
            return TOK_FAIL(
                o, "tokenizer.program: instruction %d of a pattern (%d %d %d) is not well formed",
                pc, c[0], c[1], c[2]);
    }
    if (n > t->longest_code) t->longest_code = n;
    return 1;
}

static int tok_open_atoms(tok_opening *o, tokenizer *t) {
    const void *atoms, *sets;
    int n;
    if (!tok_tensor(o, "tokenizer.atoms", "I32", 2, 0, &atoms, &n)) return 0;
    if (!tok_tensor(o, "tokenizer.sets", "I32", 8, 0, &sets, &t->n_sets)) return 0;
    t->sets = sets;
    if (!n) return 1;
    t->atoms = malloc(TOK_POINTS);
    if (!t->atoms) return tok_no_memory(o);
    const int32_t *a = atoms;
    for (int i = 0; i < n; i++) {
        int64_t first = a[2 * i], next = i + 1 < n ? a[2 * i + 2] : TOK_POINTS;
        if ((i == 0 && first != 0) || next <= first || next > TOK_POINTS || a[2 * i + 1] < 1
            || a[2 * i + 1] > 255)
            return tok_bad_row(o, "tokenizer.atoms", i);
        memset(t->atoms + first, a[2 * i + 1], (size_t)(next - first));
    }
    return 1;
}

static int tok_is_point(int64_t c) {
    return c >= 0 && c < TOK_POINTS && (c < 0xd800 || c > 0xdfff);
}

static int tok_open_nfc(tok_opening *o, tokenizer *t) {
    const void *classes, *decompose, *compose;
    int n;
    if (t->nfc) return 1;
    if (!tok_tensor(o, "tokenizer.nfc.classes", "I32", 3, 1, &classes, &n)
        || !tok_tensor(o, "tokenizer.nfc.decompose", "I32", 5, 1, &decompose, &t->n_decompose)
        || !tok_tensor(o, "tokenizer.nfc.compose", "I32", 3, 1, &compose, &t->n_compose))
        return 0;
    t->decompose = decompose, t->compose = compose;
    t->nfc = calloc(TOK_POINTS, sizeof *t->nfc);
    if (!t->nfc) return tok_no_memory(o);
    for (int i = 0; i < n; i++) {
        const int32_t *c = (const int32_t *)classes + 3 * (size_t)i;
        if (c[0] < 0 || c[1] < c[0] || c[1] >= TOK_POINTS || c[2] < 1 || c[2] > 255)
            return tok_bad_row(o, "tokenizer.nfc.classes", i);
        for (int p = c[0]; p <= c[1]; p++) t->nfc[p] = (uint16_t)(c[2] | NFC_JOINS);
    }
    for (int i = 0; i < t->n_decompose; i++) {
        const int32_t *d = t->decompose + 5 * (size_t)i;
        int good = !i || d[-5] < d[0];
        for (int k = 0; k < 5; k++) good = good && tok_is_point(d[k]) && (k > 1 || d[k]);
        if (!good) return tok_bad_row(o, "tokenizer.nfc.decompose", i);
        t->nfc[d[0]] |= NFC_DECOMPOSES;
    }
    for (int i = 0; i < t->n_compose; i++) {
        const int32_t *c = t->compose + 3 * (size_t)i;
        int good = !i || c[-3] < c[0] || (c[-3] == c[0] && c[-2] < c[1]);
        for (int k = 0; k < 3; k++) good = good && tok_is_point(c[k]) && c[k];
        if (!good) return tok_bad_row(o, "tokenizer.nfc.compose", i);
        t->nfc[c[1]] |= NFC_JOINS;
    }
    for (int c = 0x1161; c <= 0x11c2; c++)
        t->nfc[c] |= NFC_JOINS; /* Hangul vowels and final consonants */
    return 1;
}

static int tok_open_steps(tok_opening *o, tokenizer *t) {
    const void *program;
    int n;
    t->word_set = -1;
    if (!tok_tensor(o, "tokenizer.program", "I32", 1, 0, &program, &n)) return 0;
    for (const int32_t *p = program, *end = p + n; n && p < end;) {
        if (t->n_steps == TOK_STEPS)
            return TOK_FAIL(o, "tokenizer.program has more than %d steps", TOK_STEPS);
        if (end - p < 2 || p[1] < 0 || p[1] > end - p - 2)
            return TOK_FAIL(o, "tokenizer.program: step %d runs off its end", t->n_steps);
        tok_step *step = &t->steps[t->n_steps++];
        *step = (tok_step){p[0], p[1], p + 2};
        int strings = step->n; /* arguments from here on are bytes */
        switch (step->op) {
        case STEP_PREPEND:
            if (step->n < 2 || step->args[0] < 0 || step->args[0] > 31) goto malformed;
            strings = 1;
            break;
        case STEP_REPLACE:
            if (step->n < 2 || step->args[0] < 1 || step->args[0] > step->n - 1) goto malformed;
            strings = 1;
            break;
        case STEP_NFC:
            if (!tok_open_nfc(o, t)) return 0;
            break;
        case STEP_ADDED: break;
        case STEP_SPLIT:
            if (!tok_check_code(o, t, step)) return 0;
            break;
        case STEP_WORD:
            if (step->n != 1 || !t->atoms || step->args[0] < 0 || step->args[0] >= t->n_sets)
                goto malformed;
            t->word_set = step->args[0];
            break;
        default:
            return TOK_FAIL(o,
                            "tokenizer.program: operation %d is unknown; a newer run.c may know it",
                            step->op);
        }
        for (int i = strings; i < step->n; i++)
            if (step->args[i] < 0 || step->args[i] > 255) goto malformed;
        p = step->args + step->n;
        continue;
    malformed:
        return TOK_FAIL(o, "tokenizer.program: step %d (operation %d) is not well formed",
                        t->n_steps - 1, step->op);
    }
    return 1;
}

tokenizer *tokenizer_open(const tokenizer_source *source, int vocab_size, char *error,
                          size_t error_size) {
    tok_opening o = {source, error, error_size};
    tokenizer *t = calloc(1, sizeof *t);
    int by_score;
    if (!t) {
        (void)tok_no_memory(&o);
        return NULL;
    }
    t->vocab = vocab_size;
    if (vocab_size < 1 || vocab_size > INT_MAX / 8) {
        (void)TOK_FAIL(&o, "a vocabulary cannot have %d tokens", vocab_size);
    } else if (tok_choice(&o, "tokenizer.merge", "rank", "score", 0, &by_score)
               && tok_open_metadata(&o, t) && tok_open_pieces(&o, t)
               && (by_score ? tok_open_scores(&o, t) : tok_open_merges(&o, t))
               && tok_open_added(&o, t) && tok_open_atoms(&o, t) && tok_open_steps(&o, t)) {
        return t;
    }
    tokenizer_close(t);
    return NULL;
}

void tokenizer_close(tokenizer *t) {
    if (!t) return;
    free(t->pieces), free(t->pairs), free(t->atoms), free(t->nfc);
    free(t);
}

/* ---- One call of tokenizer_encode ------------------------------------------------------------ */

typedef struct {
    void *data;
    size_t n, room;
} tok_array;

/* Makes room for `more` elements. Capacity doubles; 0 if memory ran out. */
static int tok_reserve(tok_array *a, size_t more, size_t size) {
    if (a->room - a->n >= more) return 1;
    size_t room = a->room ? 2 * a->room : 256;
    while (room - a->n < more) room *= 2;
    if (room > PTRDIFF_MAX / size) return 0;
    void *data = realloc(a->data, room * size);
    if (!data) return 0;
    a->data = data, a->room = room;
    return 1;
}

/* A symbol is a run of bytes that BPE holds together; the symbols of a word form a list. Length 0:
   it was joined to its left neighbour. */
typedef struct {
    uint32_t start, length; /* in the word */
    int32_t id;             /* -1: no token */
    int32_t previous, next; /* -1: none */
} tok_symbol;

/* Two neighbours that may be joined. The smallest key goes first: the best, and of equals the
   leftmost. */
typedef struct {
    uint64_t key;    /* rank or score << 32 | left symbol */
    uint32_t length; /* of both together: if it still fits, neither has changed, as symbols only
                        ever grow */
    int32_t result;
} tok_join;

typedef struct {
    int32_t pc;
    size_t start; /* of the match */
} tok_thread;

typedef struct {
    const tokenizer *t;
    int failed; /* out of memory: everything still to be done is skipped */
    tok_array ids, symbols, heap;
    int last_unknown;    /* the last id of this word was the unknown token */
    tok_thread *threads; /* 2 x longest_code, then the machine's other memory */
    int32_t *stack;
    uint64_t *marks, moment;
    const tokenizer_span *spans; /* where the text is trusted: */
    int n_spans, trusted;        /* spans left; */
    size_t until;                /* [..until) has the same trust */
} tok_job;

static void tok_emit(tok_job *j, int id) {
    if (j->ids.n >= INT_MAX || !tok_reserve(&j->ids, 1, sizeof(int))) j->failed = 1;
    else ((int *)j->ids.data)[j->ids.n++] = id;
}

/* ---- Merging --------------------------------------------------------------------------------- */

static void tok_heap_push(tok_job *j, tok_join join) {
    if (!tok_reserve(&j->heap, 1, sizeof join)) {
        j->failed = 1;
        return;
    }
    tok_join *heap = j->heap.data;
    size_t i = j->heap.n++;
    for (; i && heap[(i - 1) / 2].key > join.key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = join;
}

static tok_join tok_heap_pop(tok_job *j) {
    tok_join *heap = j->heap.data, top = heap[0], last = heap[--j->heap.n];
    size_t i = 0, n = j->heap.n;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1].key < heap[child].key) child++;
        if (heap[child].key >= last.key) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

/* Scores as numbers that sort: the highest score is the smallest number. -0 and 0 are the same
   score. */
static uint32_t tok_score_key(float score) {
    uint32_t u;
    score += 0.0f;
    memcpy(&u, &score, 4);
    return u >> 31 ? u : ~(u | 0x80000000u);
}

/* If the symbols left and right may be joined, puts that on the heap. */
static void tok_consider(tok_job *j, const uint8_t *word, int32_t left, int32_t right) {
    const tokenizer *t = j->t;
    if (left < 0 || right < 0) return;
    const tok_symbol *a = (tok_symbol *)j->symbols.data + left,
                     *b = (tok_symbol *)j->symbols.data + right;
    tok_join join = {.length = a->length + b->length};
    if (t->scores) {
        join.result = tok_lookup(t, word + a->start, join.length);
        if (join.result < 0) return;
        join.key = tok_score_key(t->scores[join.result]);
    } else {
        int rank = tok_lookup_pair(t, a->id, b->id);
        if (rank < 0) return;
        join.result = t->merges[3 * (size_t)rank + 2];
        join.key = (uint64_t)rank;
    }
    join.key = join.key << 32 | (uint32_t)left;
    tok_heap_push(j, join);
}

/* Can these bytes, which are no token, be written as byte tokens? */
static int tok_has_bytes(const tokenizer *t, const uint8_t *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (t->byte_tokens[s[i]] < 0) return 0;
    return 1;
}

/* Emits what became of a symbol. One that is no token becomes its bytes' tokens if all exist, else
   unknown. */
static void tok_emit_symbol(tok_job *j, const uint8_t *word, const tok_symbol *s) {
    const tokenizer *t = j->t;
    int unknown = 0;
    if (s->id >= 0) {
        tok_emit(j, s->id);
    } else if (tok_has_bytes(t, word + s->start, s->length)) {
        for (uint32_t i = 0; i < s->length; i++) tok_emit(j, t->byte_tokens[word[s->start + i]]);
    } else {
        unknown = 1;
        if (t->unknown >= 0 && !(j->last_unknown && t->fuse_unknown)) tok_emit(j, t->unknown);
    }
    j->last_unknown = unknown;
}

/* Joins the symbols until none can be joined any more, and emits them. */
static void tok_merge(tok_job *j, const uint8_t *word) {
    tok_symbol *s = j->symbols.data;
    int32_t n = (int32_t)j->symbols.n;
    for (int32_t i = 0; i < n; i++) s[i].previous = i - 1, s[i].next = i + 1 < n ? i + 1 : -1;
    for (int32_t i = 0; i + 1 < n; i++) tok_consider(j, word, i, i + 1);
    while (j->heap.n && !j->failed) {
        tok_join join = tok_heap_pop(j);
        int32_t left = (int32_t)(join.key & 0xffffffff), right = s[left].next;
        if (!s[left].length || right < 0 || s[left].length + s[right].length != join.length)
            continue;
        s[left] =
            (tok_symbol){s[left].start, join.length, join.result, s[left].previous, s[right].next};
        if (s[left].next >= 0) s[s[left].next].previous = left;
        s[right].length = 0;
        tok_consider(j, word, s[left].previous, left);
        tok_consider(j, word, left, s[left].next);
    }
    for (int32_t i = n ? 0 : -1; i >= 0; i = s[i].next) tok_emit_symbol(j, word, &s[i]);
    j->symbols.n = j->heap.n = 0;
}

/* One word, the end of the pipeline: bytes or characters become symbols. Where two of them can
   never be joined, those before are merged at once (I4). */
static void tok_word(tok_job *j, const uint8_t *word, size_t n) {
    const tokenizer *t = j->t;
    int whole = t->ignore_merges ? tok_lookup(t, word, n) : -1;
    j->last_unknown = 0;
    if (whole >= 0) {
        tok_emit(j, whole);
        return;
    }
    for (size_t i = 0, length = 1; i < n && !j->failed; i += length) {
        if (t->chars) tok_utf8_get(word + i, n - i, &length);
        int id = t->chars ? tok_lookup(t, word + i, length) : t->byte_tokens[word[i]];
        if (id < 0 && !t->scores && t->unknown < 0 && !tok_has_bytes(t, word + i, length))
            continue; /* dropped */
        if (j->symbols.n) {
            const tok_symbol *last = (tok_symbol *)j->symbols.data + j->symbols.n - 1;
            uint8_t a = word[last->start + last->length - 1], b = word[i];
            if (!(t->joins[a][b >> 3] >> (b & 7) & 1)) tok_merge(j, word);
        }
        if (!tok_reserve(&j->symbols, 1, sizeof(tok_symbol))) {
            j->failed = 1;
            return;
        }
        ((tok_symbol *)j->symbols.data)[j->symbols.n++] =
            (tok_symbol){.start = (uint32_t)i, .length = (uint32_t)length, .id = id};
    }
    tok_merge(j, word);
}

/* ---- The pattern machine ------------------------------------------------------------------------

A pattern is a program; a thread is a place in it. All threads read the text together, one character
at a time, in the order of their priority: of two threads in one place only the first survives, so
there are never more threads than instructions, and when a thread reaches OP_MATCH all those after
it are cut off. This finds exactly what a backtracking matcher finds that tries alternatives in
order, without its worst case (Pike's machine). */

/* The leftmost match in text[from..n) that is not empty; 0 if there is none. */
static int tok_find(tok_job *j, const tok_step *split, const uint8_t *text, size_t n, size_t from,
                    size_t *begin, size_t *end) {
    const tokenizer *t = j->t;
    const int32_t *code = split->args + 2;
    tok_thread *now = j->threads, *next = now + t->longest_code + 1;
    int found = 0, n_now = 0;
    for (size_t at = from, length = 0;; at += length) {
        unsigned atom =
            at < n ? t->atoms[tok_utf8_get(text + at, n - at, &length)] : 0; /* 0: the end */
        int n_next = 0;
        if (!found)
            now[n_now++] =
                (tok_thread){0, at}; /* a match may begin here; later ones have less priority */
        j->moment++;
        for (int i = 0; i < n_now; i++) {
            int top = 0;
            j->stack[top++] = now[i].pc;
            while (top) { /* follow this thread, its alternatives in order, to where it reads a
                             character */
                int32_t pc = j->stack[--top];
                while (j->marks[pc] != j->moment) {
                    const int32_t *c = code + 3 * pc;
                    j->marks[pc] = j->moment;
                    if (c[0] == OP_FORK) j->stack[top++] = c[2], pc = c[1];
                    else if (c[0] == OP_JUMP) pc = c[1];
                    else if (c[0] == OP_AHEAD && tok_in_set(t, c[1], atom)) pc++;
                    else if (c[0] == OP_SET && tok_in_set(t, c[1], atom))
                        next[n_next++] = (tok_thread){pc + 1, now[i].start};
                    else if (c[0] == OP_MATCH && at > now[i].start) {
                        found = 1, *begin = now[i].start, *end = at;
                        goto cut;
                    }
                }
            }
        }
    cut:
        if (at >= n || (found && !n_next)) return found;
        tok_thread *swap = now;
        now = next, next = swap, n_now = n_next;
    }
}

/* ---- NFC ------------------------------------------------------------------------------------- */

enum { HANGUL_S = 0xac00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11a7 };

/* Appends the full decomposition of c to the code points in `out`. */
static int tok_decompose(const tokenizer *t, uint32_t c, tok_array *out) {
    if (!tok_reserve(out, 4, sizeof c)) return 0;
    uint32_t *o = (uint32_t *)out->data + out->n;
    if (c >= HANGUL_S && c < HANGUL_S + 11172) { /* 19 x 21 x 28 syllables: arithmetic */
        uint32_t s = c - HANGUL_S;
        o[0] = HANGUL_L + s / 588, o[1] = HANGUL_V + s % 588 / 28, o[2] = HANGUL_T + s % 28;
        out->n += s % 28 ? 3 : 2;
        return 1;
    }
    int low = 0, high = t->nfc[c] & NFC_DECOMPOSES ? t->n_decompose : 0;
    while (low < high) {
        int middle = low + (high - low) / 2;
        const int32_t *d = t->decompose + 5 * (size_t)middle;
        if ((uint32_t)d[0] < c) low = middle + 1;
        else high = middle;
    }
    if (!(t->nfc[c] & NFC_DECOMPOSES)) return o[0] = c, out->n++, 1;
    const int32_t *d = t->decompose + 5 * (size_t)low;
    for (int k = 1; k < 5 && d[k]; k++) ((uint32_t *)out->data)[out->n++] = (uint32_t)d[k];
    return 1;
}

/* What a and b compose to; 0 if nothing. */
static uint32_t tok_compose(const tokenizer *t, uint32_t a, uint32_t b) {
    if (a - HANGUL_L < 19 && b - HANGUL_V < 21)
        return HANGUL_S + ((a - HANGUL_L) * 21 + b - HANGUL_V) * 28;
    if (a - HANGUL_S < 11172 && (a - HANGUL_S) % 28 == 0 && b - HANGUL_T - 1 < 27)
        return a + b - HANGUL_T;
    int low = 0, high = t->n_compose;
    while (low < high) {
        int middle = low + (high - low) / 2;
        const int32_t *c = t->compose + 3 * (size_t)middle;
        if ((uint32_t)c[0] < a || ((uint32_t)c[0] == a && (uint32_t)c[1] < b)) low = middle + 1;
        else high = middle;
    }
    const int32_t *c = t->compose + 3 * (size_t)low;
    return low < t->n_compose && (uint32_t)c[0] == a && (uint32_t)c[1] == b ? (uint32_t)c[2] : 0;
}

/* Sorts c[0..n), marks of classes 1..255, by class; marks of one class keep their order. */
static int tok_sort_marks(const tokenizer *t, uint32_t *c, size_t n) {
    if (n < 2) return 1;
    size_t begins[257] = {0}, sorted = 1;
    for (size_t i = 0; i < n; i++) begins[(t->nfc[c[i]] & NFC_CLASS) + 1]++;
    for (size_t i = 1; i < n; i++)
        sorted &= (t->nfc[c[i - 1]] & NFC_CLASS) <= (t->nfc[c[i]] & NFC_CLASS);
    if (sorted) return 1;
    uint32_t *copy = malloc(n * sizeof *copy);
    if (!copy) return 0;
    memcpy(copy, c, n * sizeof *copy);
    for (int k = 1; k <= 256; k++) begins[k] += begins[k - 1];
    for (size_t i = 0; i < n; i++) c[begins[t->nfc[copy[i]] & NFC_CLASS]++] = copy[i];
    free(copy);
    return 1;
}

/* The NFC form of a decomposed run of code points, in place; returns its length. */
static size_t tok_compose_run(const tokenizer *t, uint32_t *c, size_t n) {
    size_t starter = SIZE_MAX, m = 0;
    int last = -1; /* combining class of what stands between the starter and here; -1: nothing */
    for (size_t i = 0; i < n; i++) {
        int class = t->nfc[c[i]] & NFC_CLASS;
        uint32_t both = starter != SIZE_MAX && last < class ? tok_compose(t, c[starter], c[i]) : 0;
        if (both) {
            c[starter] = both;
            continue;
        }
        if (class == 0) starter = m;
        last = class ? class : -1;
        c[m++] = c[i];
    }
    return m;
}

/* The NFC form of a text; the caller frees it. Only runs that can change are taken apart: a run
   begins with a character that never joins what is before it. NULL: the text is in NFC already, or
   (failed) memory ran out. */
static uint8_t *tok_nfc(tok_job *j, const uint8_t *text, size_t n, size_t *n_out) {
    const tokenizer *t = j->t;
    size_t length, i = 0;
    while (i < n && !(t->nfc[tok_utf8_get(text + i, n - i, &length)] && text[i] >= 0xcc))
        i += length;
    if (i == n) return NULL; /* no character from U+0300 on that decomposes or joins */
    tok_array out = {0}, run = {0};
    for (i = 0; i < n && !j->failed;) {
        size_t begin = i, marks = 0;
        int changes = 0;
        run.n = 0;
        do { /* one run: code points, decomposed */
            uint32_t c = tok_utf8_get(text + i, n - i, &length);
            int invalid = length == 1 && text[i] >= 0x80;
            if (invalid && i > begin)
                break; /* an invalid byte is a run of its own, copied as it is */
            if (i > begin && !(t->nfc[c] & NFC_JOINS)) break;
            if (t->nfc[c]) changes = 1;
            if (!tok_decompose(t, c, &run)) j->failed = 1;
            i += length;
            if (invalid) break;
        } while (i < n && !j->failed);
        if (!tok_reserve(&out, (changes ? 4 * run.n : 0) + (i - begin), 1)) j->failed = 1;
        if (j->failed) break;
        uint8_t *o = (uint8_t *)out.data + out.n;
        if (!changes) {
            memcpy(o, text + begin, i - begin);
            out.n += i - begin;
            continue;
        }
        uint32_t *c = run.data;
        for (size_t k = 0; k <= run.n; k++) {
            if (k < run.n && t->nfc[c[k]] & NFC_CLASS) marks++;
            else if (!tok_sort_marks(t, c + k - marks, marks)) j->failed = 1;
            else marks = 0;
        }
        size_t m = tok_compose_run(t, c, run.n);
        for (size_t k = 0; k < m; k++) out.n += tok_utf8_put(c[k], (uint8_t *)out.data + out.n);
    }
    free(run.data);
    *n_out = out.n;
    return out.data;
}

/* ---- The steps ------------------------------------------------------------------------------- */

static void tok_scan(tok_job *j, int step, const uint8_t *text, size_t n, int place,
                     int normalized);
static void tok_step_on(tok_job *j, int step, const uint8_t *text, size_t n, int place);

/* A text with the bytes of `from` replaced by those of `to`; the caller frees it. NULL: nothing to
   replace, or (failed) memory ran out. */
static uint8_t *tok_replace(tok_job *j, const tok_step *step, const uint8_t *text, size_t n,
                            size_t *n_out) {
    const int32_t *from = step->args + 1, *to = from + step->args[0];
    size_t n_from = (size_t)step->args[0], n_to = (size_t)step->n - 1 - n_from, copied = 0;
    tok_array out = {0};
    for (size_t i = 0; i + n_from <= n; i++) {
        const uint8_t *hit = memchr(text + i, from[0], n - n_from + 1 - i);
        if (!hit) break;
        i = (size_t)(hit - text);
        size_t k = 1;
        while (k < n_from && text[i + k] == from[k]) k++;
        if (k < n_from) continue;
        if (!tok_reserve(&out, i - copied + n_to + 1, 1)) goto failed;
        memcpy((uint8_t *)out.data + out.n, text + copied, i - copied);
        out.n += i - copied;
        for (k = 0; k < n_to; k++) ((uint8_t *)out.data)[out.n++] = (uint8_t)to[k];
        copied = i + n_from;
        i = copied - 1;
    }
    if (!out.data) return NULL;
    if (!tok_reserve(&out, n - copied, 1)) goto failed;
    memcpy((uint8_t *)out.data + out.n, text + copied, n - copied);
    *n_out = out.n + n - copied;
    return out.data;
failed:
    j->failed = 1;
    free(out.data);
    return NULL;
}

/* The text with bytes put before it; the caller frees it. NULL: not wanted here, or (failed) no
   memory. */
static uint8_t *tok_prepend(tok_job *j, const tok_step *step, const uint8_t *text, size_t n,
                            int place, size_t *n_out) {
    const int32_t *bytes = step->args + 1;
    size_t n_bytes = (size_t)step->n - 1, there = 0;
    while (there < n_bytes && there < n && text[there] == bytes[there]) there++;
    if (!(step->args[0] & place) || (step->args[0] & UNLESS_THERE && there == n_bytes)) return NULL;
    uint8_t *out = malloc(n + n_bytes);
    if (!out) return j->failed = 1, NULL;
    for (size_t i = 0; i < n_bytes; i++) out[i] = (uint8_t)bytes[i];
    memcpy(out + n_bytes, text, n);
    *n_out = n + n_bytes;
    return out;
}

/* Cuts a text by a pattern. Matches and what is between them alternate; the behaviour says which of
   two neighbours stay together, or that matches are dropped. */
static void tok_split(tok_job *j, int step, const uint8_t *text, size_t n, int place) {
    const tok_step *split = &j->t->steps[step];
    int behaviour = split->args[0], invert = split->args[1],
        last = -1;            /* was the last part a match? */
    size_t piece = 0, at = 0; /* text[piece..at) is not passed on yet */
    while (at < n && !j->failed) {
        size_t ends[2] = {n, n}; /* of the part before the match, and of the match */
        tok_find(j, split, text, n, at, &ends[0], &ends[1]);
        for (int part = 0; part < 2; part++) {
            int match = part ^ invert;
            if (ends[part] == at) continue;
            int together = behaviour == SPLIT_PREVIOUS ? match && last == 0
                           : behaviour == SPLIT_NEXT
                               ? !match && last == 1
                               : behaviour == SPLIT_CONTIGUOUS && match == last;
            if (!together) {
                if (at > piece && !(behaviour == SPLIT_REMOVED && last == 1))
                    tok_step_on(j, step + 1, text + piece, at - piece, piece ? AFTER_SPLIT : place);
                piece = at;
            }
            last = match, at = ends[part];
        }
    }
    if (at > piece && !(behaviour == SPLIT_REMOVED && last == 1))
        tok_step_on(j, step + 1, text + piece, at - piece, piece ? AFTER_SPLIT : place);
}

/* Carries out the steps from number `step` on for one piece of text that stands at `place`. */
static void tok_step_on(tok_job *j, int step, const uint8_t *text, size_t n, int place) {
    const tokenizer *t = j->t;
    uint8_t *changed = NULL;
    if (n > INT_MAX) j->failed = 1;
    if (j->failed || !n) return;
    if (step == t->n_steps) {
        tok_word(j, text, n);
        return;
    }
    const tok_step *s = &t->steps[step];
    if (s->op == STEP_SPLIT) {
        tok_split(j, step, text, n, place);
    } else if (s->op == STEP_ADDED) {
        tok_scan(j, step + 1, text, n, place, TYPE_NORMALIZED);
    } else {
        if (s->op == STEP_PREPEND) changed = tok_prepend(j, s, text, n, place, &n);
        if (s->op == STEP_REPLACE) changed = tok_replace(j, s, text, n, &n);
        if (s->op == STEP_NFC) changed = tok_nfc(j, text, n, &n);
        tok_step_on(j, step + 1, changed ? changed : text, n, place);
        free(changed);
    }
}

/* ---- Added tokens ---------------------------------------------------------------------------- */

/* The longest added token that the text begins with; -1 if there is none. The sorted list serves as
   a trie: byte by byte the range of those that agree narrows, and one that is complete is the first
   of its range. */
static int tok_find_added(const tokenizer *t, const uint8_t *text, size_t n, size_t trusted,
                          int normalized, size_t *length) {
    int from = 0, to = t->n_added, best = -1;
    for (size_t depth = 0; depth < n && from < to; depth++) {
        for (int side = 0; side < 2;
             side++) { /* first the lower, then the upper end of the range */
            int low = from, high = to;
            while (low < high) {
                int middle = low + (high - low) / 2;
                size_t size;
                const uint8_t *s = tok_bytes(t, t->added[middle], &size);
                if (size <= depth || s[depth] < text[depth] + side) low = middle + 1;
                else high = middle;
            }
            *(side ? &to : &from) = low;
        }
        size_t size = 0;
        int id = from < to ? t->added[from] : -1;
        if (id >= 0) tok_bytes(t, id, &size);
        if (size == depth + 1 && (t->types[id] & TYPE_NORMALIZED) == normalized
            && (tok_kind(t, id) == TOKEN_USER || size <= trusted))
            best = id, *length = size; /* I3 */
    }
    return best;
}

/* How many bytes from `at` on are trusted without a gap. Called with rising positions only. */
static size_t tok_trusted(tok_job *j, size_t at) {
    while (j->until <= at && j->n_spans) {
        j->trusted = j->spans->trusted;
        for (; j->n_spans && (!j->spans->length || !j->spans->trusted == !j->trusted);
             j->n_spans--, j->spans++)
            j->until += j->spans->length;
    }
    return j->trusted && j->until > at ? j->until - at : 0;
}

static int tok_touches_word(const tokenizer *t, const uint8_t *text, size_t n, size_t begin,
                            size_t end) {
    size_t length;
    if (t->word_set < 0) return 0;
    return (begin && tok_in_set(t, t->word_set, t->atoms[tok_utf8_before(text, begin, &length)]))
           || (end < n
               && tok_in_set(t, t->word_set, t->atoms[tok_utf8_get(text + end, n - end, &length)]));
}

/* Emits the added tokens of a text, and hands what is between them to the steps from number `step`
   on. */
static void tok_scan(tok_job *j, int step, const uint8_t *text, size_t n, int place,
                     int normalized) {
    const tokenizer *t = j->t;
    size_t done = 0, length;
    for (size_t at = 0; at < n && !j->failed;) {
        if (!t->begins[text[at]]) {
            at++;
            continue;
        }
        int id = tok_find_added(t, text + at, n - at, normalized ? 0 : tok_trusted(j, at),
                                normalized, &length);
        if (id < 0) {
            at++;
            continue;
        }
        size_t begin = at, end = at + length;
        at = end;
        if (t->types[id] & TYPE_WORD && tok_touches_word(t, text, n, begin, end)) continue;
        while (t->types[id] & TYPE_LSTRIP && begin > done
               && tok_is_space(tok_utf8_before(text, begin, &length)))
            begin -= length;
        while (t->types[id] & TYPE_RSTRIP && end < n
               && tok_is_space(tok_utf8_get(text + end, n - end, &length)))
            end += length;
        tok_step_on(j, step, text + done, begin - done, place);
        tok_emit(j, id);
        place = tok_kind(t, id) == TOKEN_USER ? AFTER_USER : AFTER_CONTROL;
        at = done = end;
    }
    tok_step_on(j, step, text + done, n - done, place);
}

/* ---- Encoding -------------------------------------------------------------------------------- */

int tokenizer_encode(const tokenizer *t, const tokenizer_span *spans, int n_spans, int **ids,
                     int *n_ids) {
    tok_job j = {.t = t, .spans = spans, .n_spans = n_spans};
    size_t n = 0, code = (size_t)t->longest_code + 1;
    uint8_t *text = NULL;
    *ids = NULL, *n_ids = 0;
    for (int i = 0; i < n_spans; i++) {
        if (spans[i].length > INT_MAX - n) return -1;
        n += spans[i].length;
    }
    text = malloc(n + 1);
    j.threads = malloc(2 * code * sizeof *j.threads);
    j.marks = calloc(code, sizeof *j.marks);
    j.stack = malloc(code * sizeof *j.stack);
    j.failed = !text || !j.threads || !j.marks || !j.stack || !tok_reserve(&j.ids, 1, sizeof(int));
    if (!j.failed) {
        n = 0;
        for (int i = 0; i < n_spans; n += spans[i++].length)
            if (spans[i].length) memcpy(text + n, spans[i].text, spans[i].length);
        tok_scan(&j, 0, text, n, AT_START, 0);
    }
    free(text), free(j.threads), free(j.marks), free(j.stack), free(j.symbols.data),
        free(j.heap.data);
    if (j.failed) {
        free(j.ids.data);
        return -1;
    }
    *ids = j.ids.data, *n_ids = (int)j.ids.n;
    return 0;
}

/* ---- Decoding -------------------------------------------------------------------------------- */

const char *tokenizer_piece(const tokenizer *t, int id, size_t *length, int *kind) {
    *length = 0, *kind = 0;
    if (id < 0 || id >= t->vocab) return NULL;
    *kind = tok_kind(t, id);
    return (const char *)tok_bytes(t, id, length);
}

size_t tokenizer_stream_room(const tokenizer *t) {
    return t->longest + sizeof((tokenizer_stream *)0)->bytes;
}

size_t tokenizer_stream_put(const tokenizer *t, tokenizer_stream *s, int id, char *out) {
    size_t length, n = (size_t)s->n;
    int kind;
    const char *piece = tokenizer_piece(t, id, &length, &kind);
    if (!length || (!s->controls && (kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN))) return 0;
    if (t->strip_space && !s->started && piece[0] == ' ') piece++, length--;
    s->started = 1;
    memcpy(out, s->bytes, n);
    memcpy(out + n, piece, length);
    n += length, s->n = 0;
    for (size_t k = n < 3 ? n : 3; k > 0 && !s->n; k--)
        if (tok_utf8_length((uint8_t *)out + n - k, k) < 0) s->n = (int)k;
    n -= (size_t)s->n;
    memcpy(s->bytes, out + n, (size_t)s->n);
    return n;
}

size_t tokenizer_stream_end(tokenizer_stream *s, char *out) {
    size_t n = (size_t)s->n;
    memcpy(out, s->bytes, n);
    s->n = 0;
    return n;
}

#endif
