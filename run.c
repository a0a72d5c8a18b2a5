/* run.c - runs a language model on a CPU. One C file; libc, libm and threads.

       ./run MODEL                        chat if the file has a chat format, else generate
       ./run MODEL -i "Once upon a time"  continue a text (or answer one question, in chat)
       ./run -h                           all modes and options

   A model file is a safetensors file: weights, configuration, tokenizer and chat format in one,
   mapped into memory and used in place. export.py makes one from Hugging Face folders, GGUF and
   llama2.c files.

   To embed it: #define RUN_LIBRARY and #include "run.c"; or compile run.c with -DRUN_LIBRARY
   into an object of its own and include it with RUN_DECLARATIONS for the declarations alone.

   The map (search for "== NAME"):

     == DECLARATIONS     the public interface: a model, a session, and what one does with them
     == MODEL            the container (safetensors), the configuration, the weights
     == TRANSFORMER      arithmetic, reference kernels, threads, the cache, forward()
     == SAMPLING         from logits to a token; random numbers; log-probabilities
     == DRAFTING         guesses and their verification; generate: the loop that draws, emits and stops
     == PACKING          making model files: raw blocks and floats into packed matrices
     == SPEED            the same kernels for vector instructions, compiled once per set
     == PROGRAM          the command line: modes, options, output

   Letters used for shapes, everywhere:

     n      rows of one forward pass: tokens, each with a session and a position
     dim    width of the residual stream          hidden  width of the feed-forward layer
     heads  query heads                           kv      key/value heads (heads % kv == 0)
     hd     width of one head                     vocab   number of tokens

   The promise behind the arithmetic: the same bytes everywhere. The output is a function of the
   model file, token ids, seed, sampling settings, cache type and context size, and of nothing
   else - not of threads, chunking or instruction set. Rules that make it so, cited as [N1]..[N6]:

   [N1] Work is split across rows, heads and tokens, never along a sum.
   [N2] Packed matrices: groups of 32 columns ascending; inside a group the sum is an exact
        integer; then acc = fma(isum, d * xs, acc), with a minimum also acc = fma(m, t, acc).
   [N3] Float sums: sixteen partial sums, element k into sum k mod 16, then one tree (8-4-2-1).
        Lanes past the end of a row are left untouched.
   [N4] Attention: blocks of 64 absolute positions, merged in ascending order; a score is one fma
        chain over hd, an output one fma chain over positions; what is invisible does not enter.
   [N5] exp, log, tanh, erf, sin, cos are ours; no estimates, no contraction by the compiler.
   [N6] Activations become int8 per row and group of 32, whatever else is in the batch.      */

#ifndef RUN_KERNELS /* == SPEED includes this file again, for its own section alone */

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* POSIX, for those who compile with -std=c11 */
#endif

/* == DECLARATIONS ============================================================================

   Two nouns. A model is a mapped file: immutable, shared by any number of sessions and threads.
   A session is one timeline of tokens over a model: a cache and a position. One thread uses a
   session at a time; different sessions are independent. Nothing here prints or exits.        */

#ifndef RUN_DECLARED
#define RUN_DECLARED

#include <stddef.h>
#include <stdint.h>

typedef struct run_model run_model;
typedef struct run_session run_session;

/* What went wrong, as a sentence without a full stop. Every function that can fail takes one
   (never NULL) and returns NULL or a negative number after filling it. */
typedef struct {
    char text[512];
} run_error;

/* Maps a model file and checks all of it that is not weights. */
run_model *run_open(const char *path, run_error *error);
/* Unmaps it. Its sessions must be closed before. */
void run_close(run_model *model);

/* Draft heads from a file of their own, in place of those in the model file; before any session is opened. */
int run_attach_heads(run_model *model, const char *path, run_error *error);

int run_vocab_size(const run_model *model);
/* The token that a text begins with (BOS), or -1 if this model wants none. */
int run_bos(const run_model *model);
/* Positions the model was trained for. */
int run_context_length(const run_model *model);
/* Metadata of the file by key, or NULL. */
const char *run_text(const run_model *model, const char *key);

/* Text to token ids, without BOS. Control tokens such as <|im_end|> are recognised only if
   `trusted`. *ids is malloc'ed. Returns the number of ids. */
int run_tokenize(const run_model *model, const char *text, size_t length, int trusted, int **ids,
                 run_error *error);
/* The bytes of a token (not NUL-terminated; part of a character, perhaps). NULL if there is no
   tokenizer or no such id. */
const char *run_piece(const run_model *model, int id, size_t *length);

typedef struct {
    int context;   /* positions the cache can hold; 0: what the model was trained for */
    int threads;   /* 0: one for each physical core this process may use */
    int cache_f32; /* 0: keys and values are cached as float16 */
    int no_heads;  /* 1: do without the model's draft heads, and without the work of keeping up with them */
} run_options;

/* Starts an empty timeline. options may be NULL. */
run_session *run_session_open(const run_model *model, const run_options *options, run_error *error);
/* A second timeline with the same past (and no observer). */
run_session *run_session_fork(const run_session *session, run_error *error);
void run_session_close(run_session *session);

/* Tokens so far, and how many the cache can hold. */
int run_position(const run_session *session);
int run_context(const run_session *session);
/* Appends n >= 1 tokens. Afterwards run_logits are those that follow the last one. Fails when
   the context is full, an id is out of range or an activation is not finite; the timeline is
   then as long as before. */
int run_eval(run_session *session, const int *ids, int n, run_error *error);
/* Forgets all tokens from `position` on. If there were any, there are no logits until the next run_eval. */
int run_rewind(run_session *session, int position, run_error *error);
/* [vocab] raw logits after the last run_eval; valid until the next call with this session. NULL
   if there are none. */
const float *run_logits(const run_session *session);

/* Shows what goes on inside: run_eval calls it with one row of `width` values at a time, at the
   points "embed"; "attn_norm", "attn" (heads' outputs, before their projection), "ffn_norm", "ffn"
   (before the down projection) and "out" of each layer; "norm" (what the output matrix multiplies). */
typedef void (*run_observer)(void *context, const char *point, int layer, const float *values,
                             int position, int width);
void run_observe(run_session *session, run_observer observer, void *context);

typedef struct {
    float temperature;    /* 0: the most probable token */
    float top_p;          /* keep the most probable tokens that reach this sum; 1: all, 0: the best */
    float min_p;          /* keep tokens at least this probable relative to the best; 0: all */
    float repeat_penalty; /* divides the logits of the last 64 tokens; 1: none */
    int top_k;            /* keep this many; 0: all */
    uint64_t seed, stream; /* the random numbers are a function of (seed, stream, position) */
} run_sampling;

/* Draws the next token from the logits; it does not append it. */
int run_sample(run_session *session, const run_sampling *sampling, run_error *error);

enum run_stop { RUN_LENGTH, RUN_EOS, RUN_STOPPED, RUN_CONTEXT, RUN_CANCELLED };

/* Receives each token and the text that became whole with it (perhaps none; bytes, valid UTF-8
   as far as the model's output is); at the end, with id -1, text that waited for more. A non-zero
   return ends the generation. */
typedef int (*run_callback)(void *context, int id, const char *text, size_t length);

/* Who may propose tokens; all are checked, so that this changes speed and never the text. */
enum run_draft { RUN_DRAFT_AUTO, RUN_DRAFT_OFF, RUN_DRAFT_LOOKUP, RUN_DRAFT_HEADS };
enum run_drafter { RUN_LOOKUP, RUN_HEADS, RUN_MODEL, RUN_DRAFTERS };
enum { RUN_DRAFT_MOST = 15 };  /* proposals in one pass */

typedef struct {
    run_sampling sampling;
    int max_tokens;           /* 0: until the context is full */
    const char *const *stops; /* strings that end the generation; they are not emitted */
    int n_stops;
    int show_special;         /* control tokens appear in the text */
    run_callback callback;
    void *context;            /* for the callback */
    enum run_draft draft;
    int draft_max;            /* proposals in one pass, at most; 0: 15 */
} run_generation;

typedef struct {
    enum run_stop stop;
    int tokens;     /* drawn, without the end token */
    int passes;     /* forward passes */
    int drafted, accepted; /* proposals that were verified; those that stood and were emitted */
    int drafted_by[RUN_DRAFTERS], accepted_by[RUN_DRAFTERS];
    int drafted_at[RUN_DRAFT_MOST], accepted_at[RUN_DRAFT_MOST]; /* by place in the window */
    double seconds, draft_seconds, verify_seconds; /* in all; of them making proposals; of them in passes */
    double alone_seconds; /* estimate of what passes of one token each would have taken instead */
} run_result;

/* A text whose tokens `ids` [n] are guessed from, besides what the session holds: an answer's likely
   source, perhaps. Replaces an earlier one; n = 0 removes it. */
int run_draft_corpus(run_session *session, const int *ids, int n, run_error *error);
/* A second, smaller model with the same tokens that guesses in place of draft heads; it must outlive
   the session. NULL removes it. Fails if its tokens are others. */
int run_draft_model(run_session *session, const run_model *model, run_error *error);

/* Draws tokens after the session's last one until something ends it. Needs a run_eval before. All
   tokens but the last one drawn are then in the timeline; to go on, run_eval that one. During the
   callback run_logits are those that the token was drawn from. */
int run_generate(run_session *session, const run_generation *how, run_result *result,
                 run_error *error);

#endif
#ifndef RUN_DECLARATIONS

/* == MODEL ===================================================================================

   The container is safetensors: 8 bytes of header length, a JSON header, data. Everything in it
   may be wrong or hostile. Invariants after container_open:

   [M1] the tensors tile the data exactly: no gap, no overlap, none outside the file;
   [M2] names are unique, sizes follow from dtype and shape, data is aligned to its elements;
   [M3] tensors are sorted by name and metadata by key.                                       */

#if !defined(__GNUC__) || (!defined(__clang__) && __GNUC__ < 11) || (defined(__clang__) && __clang_major__ < 14 && !defined(__apple_build_version__))
#error "run.c needs GCC 11 or newer or Clang 14 or newer (it uses their vector extensions)"
#endif
#if !defined(__LP64__) && !defined(_WIN64)
#error "run.c needs a 64-bit target: model files are mapped whole"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "run.c needs a little-endian target: weights are used in place"
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#error "run.c is written for x86-64 and AArch64"
#endif
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile run.c without -ffast-math: its results must be the same on every machine"
#endif
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options /* until the end of this file */
#pragma GCC optimize("fp-contract=off,no-unsafe-math-optimizations,no-associative-math,no-reciprocal-math")
#pragma GCC optimize("no-trapping-math") /* which only lets comparisons be vectors */
#endif

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif

#if FLT_EVAL_METHOD != 0
#error "compile run.c with SSE arithmetic: intermediate results must have the precision of their type"
#endif

#include "tokenizer.c"

#define INLINE static inline __attribute__((always_inline))

/* Fills in the sentence and returns -1, so that `return fail(...)` is the way out. */
__attribute__((format(printf, 2, 3)))
static int fail(run_error *error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    for (char *c = error->text; *c; c++) /* names from a file may hold anything */
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    return -1;
}

/* Rounding to nearest, no flush to zero, whatever the host program has set; returns what it was. */
#ifdef __x86_64__
static const uint64_t plain_float_mode = 0x1f80;
#else
static const uint64_t plain_float_mode = 0;
#endif

static uint64_t set_float_mode(uint64_t mode)
{
    uint64_t before;
#ifdef __x86_64__
    before = _mm_getcsr();
    _mm_setcsr((unsigned)mode);
#else
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#endif
    return before;
}

struct tensor {
    const char *name;
    const unsigned char *data;
    size_t size;                /* bytes */
    int64_t shape[4];
    int n_dims;
    int used;                   /* something asked for it */
    char dtype[8];              /* as in the file: F32, F16, BF16, U8, I32, ... */
};

struct entry {                  /* of the metadata */
    const char *key, *value;
};

struct container {
    const unsigned char *map;
    size_t size;
    struct tensor *tensors;
    struct entry *entries;
    char *strings;              /* all names, keys and values, unescaped */
    int n_tensors, n_entries;
};

/* -- the JSON of a safetensors header: one object of flat things, so no recursion -- */

struct scanner {
    const char *at, *end;
    char *out;                  /* where the next unescaped string goes; never overtakes `at` */
};

static void skip_space(struct scanner *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\r' || *s->at == '\t'))
        s->at++;
}

/* Consumes c, if it is next. */
static int take(struct scanner *s, char c)
{
    skip_space(s);
    if (s->at == s->end || *s->at != c)
        return 0;
    s->at++;
    return 1;
}

static int hex4(const char *at, const char *end, unsigned *value)
{
    if (end - at < 4)
        return 0;
    *value = 0;
    for (int i = 0; i < 4; i++) {
        char c = at[i], lower = (char)(c | 32);
        int digit = c >= '0' && c <= '9' ? c - '0' : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
        if (digit < 0)
            return 0;
        *value = *value * 16 + (unsigned)digit;
    }
    return 1;
}

static char *put_utf8(char *out, unsigned c)
{
    if (c < 0x80) {
        *out++ = (char)c;
    } else if (c < 0x800) {
        *out++ = (char)(0xc0 | c >> 6);
        *out++ = (char)(0x80 | (c & 63));
    } else if (c < 0x10000) {
        *out++ = (char)(0xe0 | c >> 12);
        *out++ = (char)(0x80 | (c >> 6 & 63));
        *out++ = (char)(0x80 | (c & 63));
    } else {
        *out++ = (char)(0xf0 | c >> 18);
        *out++ = (char)(0x80 | (c >> 12 & 63));
        *out++ = (char)(0x80 | (c >> 6 & 63));
        *out++ = (char)(0x80 | (c & 63));
    }
    return out;
}

/* A JSON string, unescaped and NUL-terminated, or NULL if it is not one (or holds a NUL). */
static char *take_string(struct scanner *s)
{
    if (!take(s, '"'))
        return NULL;
    char *start = s->out;
    while (s->at < s->end && *s->at != '"') {
        unsigned char c = (unsigned char)*s->at++;
        if (c < 0x20)
            return NULL;
        if (c != '\\') {
            *s->out++ = (char)c;
            continue;
        }
        static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        const char *which = s->at < s->end && *s->at ? strchr(escapes, *s->at) : NULL;
        unsigned code, low;
        if (which) {
            *s->out++ = meanings[which - escapes];
            s->at++;
        } else if (s->at < s->end && *s->at == 'u' && hex4(s->at + 1, s->end, &code) && code) {
            s->at += 5;
            if (code >= 0xd800 && code < 0xdc00) { /* the first half of a surrogate pair */
                if (s->end - s->at < 6 || s->at[0] != '\\' || s->at[1] != 'u' ||
                    !hex4(s->at + 2, s->end, &low) || low < 0xdc00 || low > 0xdfff)
                    return NULL;
                s->at += 6;
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            } else if (code >= 0xdc00 && code <= 0xdfff) {
                return NULL;
            }
            s->out = put_utf8(s->out, code);
        } else {
            return NULL;
        }
    }
    if (s->at == s->end)
        return NULL;
    s->at++;
    *s->out++ = '\0';
    return start;
}

/* A non-negative integer below 2^62 without sign, fraction or exponent. */
static int take_integer(struct scanner *s, int64_t *value)
{
    skip_space(s);
    const char *start = s->at;
    *value = 0;
    for (; s->at < s->end && *s->at >= '0' && *s->at <= '9'; s->at++) {
        if (*value > (INT64_C(1) << 62) / 10 - 1)
            return 0;
        *value = *value * 10 + (*s->at - '0');
    }
    return s->at > start && (*start != '0' || s->at == start + 1);
}

/* [ integer, ... ] of at most `most` integers; returns how many, or -1. */
static int take_integers(struct scanner *s, int64_t *values, int most)
{
    int n = 0;
    if (!take(s, '['))
        return -1;
    if (take(s, ']'))
        return 0;
    do {
        if (n == most || !take_integer(s, &values[n++]))
            return -1;
    } while (take(s, ','));
    return take(s, ']') ? n : -1;
}

/* Bytes of an element, 0 for a type that safetensors does not have. */
static int dtype_size(const char *dtype)
{
    static const struct { const char *name; int size; } types[] = {
        { "F64", 8 }, { "F32", 4 }, { "F16", 2 }, { "BF16", 2 }, { "I64", 8 }, { "I32", 4 },
        { "I16", 2 }, { "I8", 1 }, { "U64", 8 }, { "U32", 4 }, { "U16", 2 }, { "U8", 1 },
        { "BOOL", 1 }, { "F8_E4M3", 1 }, { "F8_E5M2", 1 },
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strcmp(dtype, types[i].name))
            return types[i].size;
    return 0;
}

/* Room for one more element in an array of *n; doubles it when n is a power of two. */
static int grow(void *array, int n, size_t element)
{
    void **pointer = array;
    if (n & (n - 1))
        return 0;
    void *larger = realloc(*pointer, (n ? 2 * (size_t)n : 1) * element);
    if (!larger)
        return -1;
    *pointer = larger;
    return 0;
}

/* { "dtype": ..., "shape": [...], "data_offsets": [begin, end] } */
static int take_tensor(struct scanner *s, struct tensor *t, const unsigned char *data, size_t data_size,
                       run_error *error)
{
    int64_t offsets[2] = { -1, -1 };
    char *dtype = NULL;
    int have_shape = 0, have_offsets = 0;
    if (strlen(t->name) > 200)
        return fail(error, "a tensor's name has %zu bytes; %.40s...", strlen(t->name), t->name);
    if (!take(s, '{'))
        return fail(error, "the description of tensor %.100s is not a JSON object", t->name);
    do {
        char *key = take_string(s);
        int ok = key && take(s, ':');
        if (ok && !strcmp(key, "dtype") && !dtype)
            ok = (dtype = take_string(s)) != NULL;
        else if (ok && !strcmp(key, "shape") && !have_shape)
            ok = (t->n_dims = take_integers(s, t->shape, 4)) >= 0, have_shape = 1;
        else if (ok && !strcmp(key, "data_offsets") && !have_offsets)
            ok = take_integers(s, offsets, 2) == 2, have_offsets = 1;
        else
            ok = 0;
        if (!ok)
            return fail(error, "the description of tensor %.100s is not dtype, shape and data_offsets",
                        t->name);
    } while (take(s, ','));
    if (!take(s, '}') || !dtype || !have_shape || !have_offsets)
        return fail(error, "the description of tensor %.100s is incomplete", t->name);
    int element = dtype_size(dtype);
    if (!element)
        return fail(error, "tensor %.100s has the unknown type %.20s", t->name, dtype);
    snprintf(t->dtype, sizeof t->dtype, "%s", dtype);
    uint64_t size = (uint64_t)element;
    for (int i = 0; i < t->n_dims; i++)
        if (__builtin_mul_overflow(size, (uint64_t)t->shape[i], &size))
            return fail(error, "the shape of tensor %.100s is too large", t->name);
    if (offsets[0] > offsets[1] || (uint64_t)offsets[1] > data_size)
        return fail(error, "tensor %.100s lies at bytes %lld to %lld, but the file has %zu bytes of data: "
                    "it is cut short or damaged", t->name, (long long)offsets[0], (long long)offsets[1], data_size);
    if ((uint64_t)(offsets[1] - offsets[0]) != size)
        return fail(error, "tensor %.100s has %lld bytes where its type and shape need %llu", t->name,
                    (long long)(offsets[1] - offsets[0]), (unsigned long long)size);
    t->data = data + offsets[0];
    t->size = size;
    if ((uintptr_t)t->data % (uintptr_t)element)
        return fail(error, "tensor %.100s is not aligned to its elements of %d bytes", t->name, element);
    return 0;
}

/* { "key": "value", ... } */
static int take_metadata(struct scanner *s, struct container *c, run_error *error)
{
    if (!take(s, '{'))
        return fail(error, "__metadata__ is not a JSON object");
    if (take(s, '}'))
        return 0;
    do {
        struct entry e = { 0 };
        if (!(e.key = take_string(s)) || !take(s, ':') || !(e.value = take_string(s)))
            return fail(error, "__metadata__ is not an object of strings");
        if (grow(&c->entries, c->n_entries, sizeof e))
            return fail(error, "out of memory");
        c->entries[c->n_entries++] = e;
    } while (take(s, ','));
    return take(s, '}') ? 0 : fail(error, "__metadata__ is not closed");
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct tensor *)a)->name, ((const struct tensor *)b)->name);
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->key, ((const struct entry *)b)->key);
}

static int by_place(const void *a, const void *b)
{
    const struct tensor *x = a, *y = b;
    return x->data != y->data ? (x->data > y->data) - (x->data < y->data) : (x->size > y->size) - (x->size < y->size);
}

static int container_parse(struct container *c, run_error *error)
{
    uint64_t length;
    if (c->size < 8)
        return fail(error, "a file of %zu bytes is not a model", c->size);
    memcpy(&length, c->map, 8);
    if (!memcmp(c->map, "GGUF", 4))
        return fail(error, "this is a GGUF file; convert it with: python3 export.py FILE -o model.bin");
    if (length > c->size - 8 && length <= 100000000 && c->size > 8 && c->map[8] == '{')
        return fail(error, "the file is cut short: it has %zu bytes, but its header alone should have %llu", c->size,
                    (unsigned long long)length + 8);
    if (length > 100000000 || length > c->size - 8 || length < 2 || c->map[8] != '{')
        return fail(error, "this is not a model file (no safetensors header); "
                    "export.py makes one from llama2.c, GGUF and Hugging Face models");
    const unsigned char *data = c->map + 8 + length;
    size_t data_size = c->size - 8 - length;
    if (!(c->strings = malloc(length + 1)))
        return fail(error, "out of memory for a header of %llu bytes", (unsigned long long)length);
    struct scanner s = { (const char *)c->map + 8, (const char *)data, c->strings };
    int have_metadata = 0;
    take(&s, '{');
    if (!take(&s, '}')) {
        do {
            struct tensor t = { 0 };
            if (!(t.name = take_string(&s)) || !take(&s, ':'))
                return fail(error, "the header is damaged near byte %td", s.at - (const char *)c->map);
            if (!strcmp(t.name, "__metadata__")) {
                if (have_metadata++)
                    return fail(error, "the header has __metadata__ twice");
                if (take_metadata(&s, c, error))
                    return -1;
                continue;
            }
            if (take_tensor(&s, &t, data, data_size, error))
                return -1;
            if (grow(&c->tensors, c->n_tensors, sizeof t))
                return fail(error, "out of memory");
            c->tensors[c->n_tensors++] = t;
        } while (take(&s, ','));
        if (!take(&s, '}'))
            return fail(error, "the header is damaged near byte %td", s.at - (const char *)c->map);
    }
    skip_space(&s);
    if (s.at != s.end)
        return fail(error, "the header has something behind its end, at byte %td", s.at - (const char *)c->map);

    if (c->n_tensors) /* [M1] */
        qsort(c->tensors, (size_t)c->n_tensors, sizeof *c->tensors, by_place);
    const unsigned char *at = data;
    for (int i = 0; i < c->n_tensors; at += c->tensors[i++].size)
        if (c->tensors[i].data != at)
            return fail(error, "tensor %.100s %s", c->tensors[i].name,
                        c->tensors[i].data < at ? "overlaps the one before it" : "has a gap before it");
    if (at != data + data_size)
        return fail(error, "%td bytes at the end of the file belong to no tensor", data + data_size - at);

    if (c->n_tensors) /* [M2], [M3] */
        qsort(c->tensors, (size_t)c->n_tensors, sizeof *c->tensors, by_name);
    for (int i = 1; i < c->n_tensors; i++)
        if (!strcmp(c->tensors[i - 1].name, c->tensors[i].name))
            return fail(error, "the file has two tensors %.100s", c->tensors[i].name);
    if (c->n_entries)
        qsort(c->entries, (size_t)c->n_entries, sizeof *c->entries, by_key);
    for (int i = 1; i < c->n_entries; i++)
        if (!strcmp(c->entries[i - 1].key, c->entries[i].key))
            return fail(error, "the metadata has %.100s twice", c->entries[i].key);
    return 0;
}

static void container_close(struct container *c)
{
    if (c->map)
        munmap((void *)(uintptr_t)c->map, c->size);
    free(c->tensors);
    free(c->entries);
    free(c->strings);
    memset(c, 0, sizeof *c);
}

static int container_open(struct container *c, const char *path, run_error *error)
{
    memset(c, 0, sizeof *c);
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        return fail(error, "cannot open %.200s: %s", path, strerror(errno));
    struct stat status;
    if (fstat(file, &status) || !S_ISREG(status.st_mode)) {
        close(file);
        return fail(error, "%.200s is not a file", path);
    }
    c->size = (size_t)status.st_size;
    void *map = c->size ? mmap(NULL, c->size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    int reason = errno;
    close(file);
    if (map == MAP_FAILED)
        return fail(error, "cannot map %.200s: %s", path, c->size ? strerror(reason) : "it is empty");
    c->map = map;
    run_error inner;
    if (container_parse(c, &inner)) {
        container_close(c);
        return fail(error, "%.100s: %.400s", path, inner.text);
    }
    return 0;
}

static struct tensor *find_tensor(const struct container *c, const char *name)
{
    struct tensor key = { .name = name };
    return c->n_tensors ? bsearch(&key, c->tensors, (size_t)c->n_tensors, sizeof key, by_name) : NULL;
}

static const char *find_text(const struct container *c, const char *key)
{
    struct entry wanted = { .key = key }, *found;
    found = c->n_entries ? bsearch(&wanted, c->entries, (size_t)c->n_entries, sizeof wanted, by_key) : NULL;
    return found ? found->value : NULL;
}

/* -- numbers in text: strict, for metadata and the command line alike -- */

static int parse_integer(const char *text, int64_t low, int64_t high, int64_t *value)
{
    char *end;
    errno = 0;
    if (!*text || !strchr("-0123456789", *text))
        return -1;
    long long parsed = strtoll(text, &end, 10);
    if (*end || errno || parsed < low || parsed > high)
        return -1;
    *value = parsed;
    return 0;
}

static int parse_number(const char *text, double low, double high, double *value)
{
    char local[64], *end;
    size_t n = strlen(text);
    if (!n || n >= sizeof local || strspn(text, "+-.0123456789eE") != n)
        return -1;
    memcpy(local, text, n + 1);
    for (char *dot; (dot = strchr(local, '.')) && *localeconv()->decimal_point != '.';)
        *dot = *localeconv()->decimal_point; /* strtod expects the host's */
    double parsed = strtod(local, &end);
    if (*end || !(parsed >= low && parsed <= high))
        return -1;
    *value = parsed;
    return 0;
}

/* -- the configuration: everything in which architectures differ is data -- */

enum activation { SILU, GELU, GELU_TANH };

struct config {
    int dim, hidden, layers, heads, kv, hd, vocab, context;
    int rope_dims, rope_interleaved;
    int window;                       /* 0: every position is visible */
    int gated;                        /* attention: a row of gates beside each head's queries (Qwen3-Next) */
    enum activation activation;
    float eps, rope_base, rope_factor, embedding_scale, logit_scale, attention_scale;
    float attention_cap, logit_cap;   /* 0: none */
    int bos, add_bos;                 /* bos -1: none */
    int eos[16], n_eos;
};

struct reading {                      /* a container being read, and the first thing wrong with it */
    struct container *c;
    run_error *error;
    int failed;
    char prefix[24];                  /* of all keys and names: a draft head's, or none */
};

static const char *get_text(const struct reading *r, const char *key)
{
    char name[120];
    snprintf(name, sizeof name, "%s%s", r->prefix, key);
    return find_text(r->c, name);
}

static struct tensor *get_tensor(const struct reading *r, const char *suffix)
{
    char name[120];
    snprintf(name, sizeof name, "%s%s", r->prefix, suffix);
    return find_tensor(r->c, name);
}

static int64_t get_integer(struct reading *r, const char *key, int64_t low, int64_t high, int64_t otherwise)
{
    const char *text = get_text(r, key);
    int64_t value = otherwise;
    if (text ? parse_integer(text, low, high, &value) != 0 : otherwise < low) {
        if (!r->failed)
            fail(r->error, text ? "metadata %s%s is \"%.40s\", but should be a whole number from %lld to %lld"
                 : "metadata %s%s is missing%.0s (a whole number from %lld to %lld)", r->prefix, key, text ? text : "",
                 (long long)low, (long long)high);
        r->failed = 1;
        return low;
    }
    return value;
}

static float get_number(struct reading *r, const char *key, double low, double high, double otherwise)
{
    const char *text = get_text(r, key);
    double value = otherwise;
    if (text && parse_number(text, low, high, &value)) {
        if (!r->failed)
            fail(r->error, "metadata %s%s is \"%.40s\", but should be a number from %g to %g", r->prefix, key, text, low, high);
        r->failed = 1;
    }
    return (float)value;
}

/* Which of the words (a NULL-terminated list) the value is; the first if there is none. */
static int get_word(struct reading *r, const char *key, const char *const *words)
{
    const char *text = get_text(r, key);
    if (!text)
        return 0;
    for (int i = 0; words[i]; i++)
        if (!strcmp(text, words[i]))
            return i;
    if (!r->failed)
        fail(r->error, "metadata %s%s is \"%.40s\", which this version of run.c does not know", r->prefix, key, text);
    r->failed = 1;
    return 0;
}

/* The integers of a space-separated list; returns how many. */
static int get_list(struct reading *r, const char *key, int *values, int most, int64_t high)
{
    const char *text = get_text(r, key);
    int n = 0;
    while (text && *text) {
        char word[24];
        size_t length = strcspn(text, " ");
        int64_t value = 0;
        snprintf(word, sizeof word, "%.*s", (int)(length < 23 ? length : 23), text);
        if (n == most || parse_integer(word, 0, high, &value)) {
            if (!r->failed)
                fail(r->error, "metadata %s%s should be a list of at most %d numbers up to %lld", r->prefix, key, most,
                     (long long)high);
            r->failed = 1;
            return 0;
        }
        values[n++] = (int)value;
        text += length + (text[length] == ' ');
    }
    return n;
}

/* A draft head has its trunk's sizes where it does not say otherwise. */
static int config_read(struct config *c, struct reading *r, const struct config *trunk)
{
    const struct config none = { 0 }, *d = trunk ? trunk : &none;
    c->dim = (int)get_integer(r, "dim", 1, 1 << 20, d->dim);
    c->hidden = (int)get_integer(r, "hidden_dim", 1, 1 << 22, d->hidden);
    c->layers = (int)get_integer(r, "n_layers", !trunk, trunk ? 1 : 1 << 12, trunk != NULL);
    c->heads = (int)get_integer(r, "n_heads", 1, 1 << 12, d->heads);
    c->vocab = (int)get_integer(r, "vocab_size", 1, trunk ? d->vocab : 1 << 24, d->vocab);
    c->context = (int)get_integer(r, "context_length", 1, 1 << 26, d->context);
    c->kv = (int)get_integer(r, "n_kv_heads", 1, c->heads, trunk && c->heads == d->heads ? d->kv : c->heads);
    c->hd = (int)get_integer(r, "head_dim", 1, 1024, c->dim / c->heads);
    c->rope_dims = (int)get_integer(r, "rope.dims", 0, c->hd, c->hd);
    c->window = (int)get_integer(r, "window", 0, INT_MAX, 0);
    c->gated = (int)get_integer(r, "attention_gate", 0, 1, 0);
    c->eps = get_number(r, "norm.eps", 0, 1, trunk ? (double)d->eps : 1e-5);
    c->rope_base = get_number(r, "rope.base", 1e-3, 1e12, 10000);
    c->rope_factor = get_number(r, "rope.attention_factor", 1e-3, 1e3, 1);
    c->embedding_scale = get_number(r, "embedding.scale", -1e6, 1e6, 1);
    c->logit_scale = get_number(r, "logit.scale", -1e6, 1e6, 1);
    c->attention_scale = get_number(r, "attention.scale", 0, 1e6, 1 / sqrt((double)c->hd));
    c->attention_cap = get_number(r, "attention.soft_cap", 0, 1e6, 0);
    c->logit_cap = get_number(r, "logit.soft_cap", 0, 1e6, 0);
    c->rope_interleaved = get_word(r, "rope.pairing", (const char *const[]){ "half", "interleaved", NULL });
    c->activation = (enum activation)get_word(r, "activation",
                                              (const char *const[]){ "silu", "gelu", "gelu_tanh", NULL });
    c->bos = (int)get_integer(r, "token.bos", -1, c->vocab - 1, -1);
    c->add_bos = (int)get_integer(r, "token.add_bos", 0, 1, 0);
    c->n_eos = get_list(r, "token.eos", c->eos, 16, c->vocab - 1);
    if (r->failed)
        return -1;
    if (c->heads % c->kv)
        return fail(r->error, "%d query heads cannot share %d key heads evenly", c->heads, c->kv);
    if (c->rope_dims % 2)
        return fail(r->error, "metadata rope.dims is %d, but rotated dimensions come in pairs", c->rope_dims);
    if (c->add_bos && c->bos < 0)
        return fail(r->error, "metadata token.add_bos asks for a BOS token, but token.bos names none");
    return 0;
}

/* -- the weights: every tensor is fetched by name with the shape and type it must have --

   A packed matrix is cut into strips of 16 rows, a strip into blocks of 64 columns (two groups
   of 32), so that one vector lane is one row and every load stays inside a cache line. A block:

     q4, q4a   8 lines of 64 bytes: line j holds, for row r and c < 4 in byte 4 r + c, two
               columns of group g = j / 4: 32 g + 8 (j % 4) + c in the low nibble, + 4 in the
               high one
     q6        the same 8 lines for the lower 4 bits, then 4 lines for the upper 2: line j, byte
               4 r + c holds those of columns 16 j + 4 i + c in its bits 2 i and 2 i + 1, i < 4
     q8        16 lines of 64 bytes: line j, byte 4 r + c is column 4 j + c of row r, signed
     then      scales, half precision, [2 groups][16 rows]: 64 bytes
     q4a       minima, the same: 64 bytes

     weight = (q - 8) d in q4,   fma(q, d, m) in q4a,   (q - 32) d in q6,   q d in q8

   that is 4.5, 5, 6.5 and 8.5 bits a weight. Rows are padded to 16 and columns to 64 with zero scales. */

enum type { F32, F16, BF16, Q4, Q4A, Q6, Q8, RAW, N_TYPES = RAW };

static const char *const type_names[] = { "f32", "f16", "bf16", "q4", "q4a", "q6", "q8", "raw blocks" };

enum { STRIP = 16, GROUP = 32, BLOCK = 64 };
enum { Q4_QUANTS = STRIP * BLOCK / 2, Q6_QUANTS = STRIP * BLOCK * 3 / 4, Q8_QUANTS = STRIP * BLOCK, SCALES = 2 * STRIP * 2 };
_Static_assert(Q4_QUANTS + SCALES == 576 && Q4_QUANTS + 2 * SCALES == 640 && Q6_QUANTS + SCALES == 832 &&
               Q8_QUANTS + SCALES == 1088, "the layout of the file");

static const float no_norm[1];          /* in the place of a norm's weights: there is none */

struct matrix {
    const unsigned char *data;
    enum type type;
    int rows, cols;
};

struct layer {
    const float *attn_norm, *ffn_norm;                       /* [dim] */
    const float *q_norm, *k_norm;                            /* [hd] or NULL */
    const float *post_attn_norm, *post_ffn_norm;             /* [dim] or NULL */
    struct matrix q;                                         /* [heads hd, dim] */
    struct matrix k, v;                                      /* [kv hd, dim] */
    struct matrix o;                                         /* [dim, heads hd] */
    struct matrix gate, up;                                  /* [hidden, dim] */
    struct matrix down;                                      /* [dim, hidden] */
    const float *q_bias, *k_bias, *v_bias, *o_bias;          /* as many as rows, or NULL */
    const float *gate_bias, *up_bias, *down_bias;
    int window;                                              /* 0: every position is visible */
};

/* What a draft head does before its layer: u = e_proj . norm(embedding) + h_proj . norm(state). */
struct mixing {
    struct matrix embedding;                                 /* the trunk's [vocab, dim] */
    float embedding_scale;
    const float *e_norm, *h_norm, *bias;                     /* [dim], [state], [the head's dim], or NULL */
    struct matrix e_proj, h_proj;                            /* [the head's dim, dim], [the head's dim, state] */
    struct matrix fuse;                                      /* EAGLE-3: [the head's dim, state], in their place */
    struct matrix q_e, k_e, v_e;                             /* EAGLE-3: what attention reads of the embedding */
    int state, zero_first, residual_normed;
};

struct residual { struct matrix w; const float *bias; };     /* Medusa: x + silu(w x + bias), [dim, dim] */

struct run_model {
    struct container file;
    struct config config;
    struct mixing *mixing;                                   /* of a draft head; NULL in a trunk */
    struct residual *residuals;
    int n_residuals;
    struct head *heads;                                      /* of a trunk: its draft heads */
    int n_heads, n_taps, taps[8];                            /* layers whose inputs they want */
    struct container head_file;                              /* if they came in a file of their own */
    struct matrix embedding, output;                         /* [vocab, dim]; the same one if tied */
    const float *output_norm;                                /* [dim] */
    struct layer *layers;                                    /* [layers] */
    float *rope;                                             /* [rope_dims / 2] radians a position */
    tokenizer *tokenizer;                                    /* NULL: token ids are the interface */
    const struct kernels *kernels;
    size_t weight_bytes;                                     /* read for one token */
    double weights;                                          /* multiplied for one token */
    int has_packed;                                          /* some matrix wants int8 activations */
};

static size_t strips(int rows) { return ((size_t)rows + STRIP - 1) / STRIP; }
static size_t blocks(int cols) { return ((size_t)cols + BLOCK - 1) / BLOCK; }

/* Bytes of a block of a packed type: those before its scales, and all. */
INLINE int quant_bytes(enum type type) { return type == Q8 ? Q8_QUANTS : type == Q6 ? Q6_QUANTS : Q4_QUANTS; }
INLINE int block_bytes(enum type type) { return quant_bytes(type) + (type == Q4A ? 2 * SCALES : SCALES); }

static size_t matrix_bytes(enum type type, int rows, int cols)
{
    return type <= BF16 ? (size_t)rows * (size_t)cols * (type == F32 ? 4 : 2)
                        : strips(rows) * blocks(cols) * (size_t)block_bytes(type);
}

/* "q4 960 576": a word and two sizes; returns the word's length, or 0. */
static size_t parse_packing(const char *text, int *rows, int *cols)
{
    size_t word = strcspn(text, " ");
    char extra;
    if (!word || word > 20 || sscanf(text + word, "%9d%9d%c", rows, cols, &extra) != 2 || *rows < 1 || *cols < 1)
        return 0;
    return word;
}

/* The value of `prefix`NAME in the metadata. */
static const char *find_packing(const struct container *c, const char *prefix, const char *name)
{
    char key[300];
    snprintf(key, sizeof key, "%s%.250s", prefix, name);
    return find_text(c, key);
}

/* Describes any two-dimensional tensor. Returns -1 for one that no matrix can be. */
static int matrix_describe(const struct container *c, const struct tensor *t, struct matrix *m, run_error *error)
{
    const char *packed = find_packing(c, "packed.", t->name);
    m->data = t->data;
    if (packed || find_packing(c, "ggml.", t->name)) {
        const char *text = packed ? packed : find_packing(c, "ggml.", t->name);
        size_t word = parse_packing(text, &m->rows, &m->cols);
        m->type = RAW;
        for (enum type i = Q4; packed && i <= Q8; i++)
            if (word == strlen(type_names[i]) && !strncmp(text, type_names[i], word))
                m->type = i;
        if (!word || strcmp(t->dtype, "U8") || (packed && m->type == RAW))
            return fail(error, "tensor %.100s is said to be \"%.40s\", which is not a packing (TYPE ROWS COLUMNS) "
                        "of bytes", t->name, text);
        if (packed && t->size != matrix_bytes(m->type, m->rows, m->cols))
            return fail(error, "tensor %.100s has %zu bytes where \"%.40s\" needs %zu", t->name, t->size, text,
                        matrix_bytes(m->type, m->rows, m->cols));
        return 0;
    }
    m->type = !strcmp(t->dtype, "F32") ? F32 : !strcmp(t->dtype, "F16") ? F16 : BF16;
    if ((m->type == BF16 && strcmp(t->dtype, "BF16")) || t->n_dims != 2 || t->shape[0] < 1 || t->shape[1] < 1 ||
        t->shape[0] > INT_MAX || t->shape[1] > INT_MAX)
        return fail(error, "tensor %.100s is not a matrix of floats or a packed one", t->name);
    m->rows = (int)t->shape[0];
    m->cols = (int)t->shape[1];
    return 0;
}

static struct matrix get_matrix(struct reading *r, const char *name, int64_t rows, int64_t cols)
{
    struct matrix m = { 0 };
    if (r->failed)
        return m;
    r->failed = 1;
    struct tensor *t = get_tensor(r, name);
    if (!t) {
        fail(r->error, "tensor %s%s [%lld, %lld] is missing", r->prefix, name, (long long)rows, (long long)cols);
        return m;
    }
    if (matrix_describe(r->c, t, &m, r->error))
        return m;
    t->used = 1;
    if (m.rows != rows || m.cols != cols) {
        fail(r->error, "tensor %s%s is [%d, %d], but the configuration needs [%lld, %lld]", r->prefix, name, m.rows, m.cols,
             (long long)rows, (long long)cols);
    } else if (m.type == RAW) {
        fail(r->error, "tensor %s holds raw %.20s blocks; pack them first: ./run FILE -m quantize -o OUT", t->name,
             find_packing(r->c, "ggml.", t->name));
    } else {
        r->failed = 0;
    }
    return m;
}

static const float *get_vector(struct reading *r, const char *name, int64_t n, int required)
{
    struct tensor *t = get_tensor(r, name);
    if (r->failed || (!t && !required))
        return NULL;
    if (t && !strcmp(t->dtype, "F32") && t->n_dims == 1 && t->shape[0] == n) {
        t->used = 1;
        return (const float *)(const void *)t->data;
    }
    r->failed = 1;
    if (t)
        fail(r->error, "tensor %s should be F32 [%lld], but is %s with %d dimensions and %zu bytes", t->name,
             (long long)n, t->dtype, t->n_dims, t->size);
    else
        fail(r->error, "tensor %s%s F32 [%lld] is missing", r->prefix, name, (long long)n);
    return NULL;
}

static void read_layer(struct reading *r, const struct config *c, int number, struct layer *l)
{
    char name[80];
    int64_t dim = c->dim, hidden = c->hidden, q = (int64_t)c->heads * c->hd, kv = (int64_t)c->kv * c->hd;
#define NAME(suffix) (snprintf(name, sizeof name, "blk.%d." suffix, number), name)
    l->attn_norm = get_vector(r, NAME("attn_norm.weight"), dim, !*r->prefix);
    if (!l->attn_norm)
        l->attn_norm = no_norm;
    l->q = get_matrix(r, NAME("attn_q.weight"), q << c->gated, dim);
    l->k = get_matrix(r, NAME("attn_k.weight"), kv, dim);
    l->v = get_matrix(r, NAME("attn_v.weight"), kv, dim);
    l->o = get_matrix(r, NAME("attn_output.weight"), dim, q);
    l->q_bias = get_vector(r, NAME("attn_q.bias"), q << c->gated, 0);
    l->k_bias = get_vector(r, NAME("attn_k.bias"), kv, 0);
    l->v_bias = get_vector(r, NAME("attn_v.bias"), kv, 0);
    l->o_bias = get_vector(r, NAME("attn_output.bias"), dim, 0);
    l->q_norm = get_vector(r, NAME("attn_q_norm.weight"), c->hd, 0);
    l->k_norm = get_vector(r, NAME("attn_k_norm.weight"), c->hd, 0);
    l->post_attn_norm = get_vector(r, NAME("post_attention_norm.weight"), dim, 0);
    l->ffn_norm = get_vector(r, NAME("ffn_norm.weight"), dim, 1);
    l->gate = get_matrix(r, NAME("ffn_gate.weight"), hidden, dim);
    l->up = get_matrix(r, NAME("ffn_up.weight"), hidden, dim);
    l->down = get_matrix(r, NAME("ffn_down.weight"), dim, hidden);
    l->gate_bias = get_vector(r, NAME("ffn_gate.bias"), hidden, 0);
    l->up_bias = get_vector(r, NAME("ffn_up.bias"), hidden, 0);
    l->down_bias = get_vector(r, NAME("ffn_down.bias"), dim, 0);
    l->post_ffn_norm = get_vector(r, NAME("post_ffw_norm.weight"), dim, 0);
#undef NAME
}

static const void *tokenizer_tensor(void *context, const char *name, const char *dtype, size_t *bytes)
{
    struct tensor *t = find_tensor(context, name);
    if (!t || strcmp(t->dtype, dtype))
        return NULL;
    t->used = 1;
    *bytes = t->size;
    return t->data;
}

static const char *tokenizer_text(void *context, const char *key)
{
    return find_text(context, key);
}

static const struct kernels *choose_kernels(run_error *error);
static void rope_frequencies(float *out, int pairs, float base);
static int exact_arithmetic(void);

static void heads_close(struct run_model *m);

static void model_close(struct run_model *m)
{
    tokenizer_close(m->tokenizer);
    heads_close(m);
    container_close(&m->head_file);
    container_close(&m->file);
    free(m->layers);
    free(m->rope);
    free(m);
}

void run_close(run_model *m)
{
    if (m)
        model_close(m);
}

/* What one token reads of the weights, and whether any matrix is packed. */
static void measure_weights(struct run_model *m)
{
    for (int i = -1; i < m->config.layers; i++) {
        const struct layer *l = &m->layers[i < 0 ? 0 : i];
        const struct matrix *all[] = { &l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down };
        for (int j = 0; j < (i < 0 ? 1 : 7); j++) {
            const struct matrix *w = i < 0 ? &m->output : all[j];
            m->weight_bytes += matrix_bytes(w->type, w->rows, w->cols);
            m->weights += (double)w->rows * w->cols;
            m->has_packed |= w->type >= Q4;
        }
    }
}

/* The table of frequencies, which a rule of scaling may have changed; else computed. */
static int rope_read(struct run_model *m, struct reading *r)
{
    int pairs = m->config.rope_dims / 2;
    const float *rope = get_vector(r, "rope.freqs", pairs, 0);
    for (int i = 0; rope && i < pairs; i++)
        if (!((m->rope[i] = rope[i]) >= 0 && rope[i] <= 16))
            return fail(r->error, "rope.freqs holds %g, but should hold radians per position, from 0 to 16", (double)rope[i]);
    if (!rope && !r->failed)
        rope_frequencies(m->rope, pairs, m->config.rope_base);
    return r->failed ? -1 : 0;
}

/* -- draft heads: small models of their own, fed with states of the trunk --

   parallel  extra last layers over the input of the trunk's last one, each a token further
             (Gloeckle et al. 2024)
   serial    mixes the trunk's state with the embedding of the token that was drawn, one layer; then
             again with its own state and its own proposal (DeepSeek-V3, MiMo, Qwen3-Next, ERNIE, EAGLE)
   medusa    residual blocks over the trunk's last state, one head for each token (Cai et al. 2024)   */

enum head_kind { SERIAL, PARALLEL, MEDUSA };
static const char *const head_kinds[] = { "serial", "parallel", "medusa", NULL };
enum head_state { STATE_NORM, STATE_LAST, STATE_BEFORE, STATE_LAYERS };

struct head {
    struct run_model model;             /* its layer, norm and output rows; shares the rest with the trunk */
    struct mixing mixing;
    enum head_kind kind;
    enum head_state state;
    int chain_norm, may_chain;          /* the next step gets the state after the norm; there may be one */
    const int32_t *rows;                /* [vocab of the head] their tokens, or NULL: all in order */
    unsigned char *gathered;            /* those rows of the trunk's output matrix, if it has none of its own */
    const char *acceptance;             /* measured when it was made, or NULL */
};

/* Some rows of a matrix, side by side: `data` [matrix_bytes], all zero before. Every line of a packed
   block has 4 bytes, and every line of scales twice 2, for each of its 16 rows. */
static struct matrix gather_rows(const struct matrix *w, const int32_t *rows, int n, unsigned char *data)
{
    size_t row_bytes = matrix_bytes(w->type, 1, w->cols), n_blocks = blocks(w->cols);
    size_t quants = w->type <= BF16 ? 0 : (size_t)quant_bytes(w->type), all = w->type <= BF16 ? 0 : (size_t)block_bytes(w->type);
    for (int i = 0; i < n; i++) {
        if (w->type <= BF16) {
            memcpy(data + (size_t)i * row_bytes, w->data + (size_t)rows[i] * row_bytes, row_bytes);
            continue;
        }
        int from = rows[i] % STRIP, to = i % STRIP;
        for (size_t b = 0; b < n_blocks; b++) {
            const unsigned char *x = w->data + ((size_t)(rows[i] / STRIP) * n_blocks + b) * all;
            unsigned char *y = data + ((size_t)(i / STRIP) * n_blocks + b) * all;
            for (size_t at = 0; at < quants; at += 64)
                memcpy(y + at + 4 * to, x + at + 4 * from, 4);
            for (size_t at = quants; at < all; at += 32)
                memcpy(y + at + 2 * to, x + at + 2 * from, 2);
        }
    }
    return (struct matrix){ data, w->type, n, w->cols };
}

/* What the metadata says of a head: its kind, and which states of the trunk it wants. Returns -1 on failure. */
static int head_describe(struct run_model *trunk, struct reading *r, int number, struct head *h)
{
    const struct config *t = &trunk->config;
    struct mixing *x = &h->mixing;
    h->kind = (enum head_kind)get_word(r, "kind", head_kinds);
    h->state = (enum head_state)get_word(r, "state", (const char *const[]){ "norm", "last", "before", "layers", NULL });
    h->chain_norm = !get_word(r, "chain", (const char *const[]){ "norm", "out", NULL });
    h->may_chain = (int)get_integer(r, "may_chain", 0, 1, 1);
    h->acceptance = get_text(r, "acceptance");
    if (h->acceptance && strspn(h->acceptance, "0123456789. ") != strlen(h->acceptance))
        return fail(r->error, "metadata draft.%d.acceptance should be a list of numbers", number);
    int taps = h->state == STATE_LAYERS ? get_list(r, "layers", trunk->taps, 8, t->layers - 1) : h->state == STATE_BEFORE;
    if (h->state == STATE_BEFORE)
        trunk->taps[0] = t->layers - 1;
    if (r->failed)
        return -1;
    if (h->state == STATE_LAYERS && !taps)
        return fail(r->error, "draft head %d is fed with layers, but draft.%d.layers names none", number, number);
    if (h->state == STATE_LAYERS && h->kind != SERIAL)
        return fail(r->error, "draft head %d cannot be fed with several layers", number);
    if (number && (h->kind != trunk->heads->kind || h->state != trunk->heads->state || h->state == STATE_LAYERS))
        return fail(r->error, "draft head %d differs from the first one in its kind, or in the states of the trunk that it wants", number);
    trunk->n_taps = taps;
    x->state = t->dim * (taps ? taps : 1);
    x->embedding = trunk->embedding;
    x->embedding_scale = t->embedding_scale;
    x->zero_first = (int)get_integer(r, "zero_first", 0, 1, 0);
    x->residual_normed = get_word(r, "residual", (const char *const[]){ "state", "normed", NULL });
    return 0;
}

/* The matrices that mix an embedding with a state, of a serial head. */
static void head_mixing(const struct config *t, struct reading *r, struct head *h, int fused)
{
    const struct config *c = &h->model.config;
    struct mixing *x = &h->mixing;
    int64_t q = ((int64_t)c->heads * c->hd) << c->gated, kv = (int64_t)c->kv * c->hd;
    x->e_norm = get_vector(r, "e_norm.weight", t->dim, 0);
    x->h_norm = get_vector(r, "h_norm.weight", fused ? c->dim : x->state, fused);
    x->bias = get_vector(r, "proj.bias", c->dim, 0);
    if (fused) {
        x->fuse = get_matrix(r, "fuse.weight", c->dim, x->state);
        x->q_e = get_matrix(r, "blk.0.attn_q_e.weight", q, t->dim);
        x->k_e = get_matrix(r, "blk.0.attn_k_e.weight", kv, t->dim);
        x->v_e = get_matrix(r, "blk.0.attn_v_e.weight", kv, t->dim);
    } else {
        x->e_proj = get_matrix(r, "e_proj.weight", c->dim, t->dim);
        x->h_proj = get_matrix(r, "h_proj.weight", c->dim, x->state);
    }
}

/* The residual blocks of a Medusa head: as many as there are, 16 at most. */
static void head_residuals(struct reading *r, struct run_model *m)
{
    int dim = m->config.dim;
    for (char name[40]; m->n_residuals < 16; m->n_residuals++) {
        struct residual *a = &m->residuals[m->n_residuals];
        snprintf(name, sizeof name, "res.%d.weight", m->n_residuals);
        if (r->failed || !get_tensor(r, name))
            break;
        a->w = get_matrix(r, name, dim, dim);
        snprintf(name, sizeof name, "res.%d.bias", m->n_residuals);
        a->bias = get_vector(r, name, dim, 0);
    }
}

/* Its output rows: its own or the trunk's, all tokens or some. Returns -1 on failure. */
static int head_output(const struct run_model *trunk, struct reading *r, int number, struct head *h)
{
    struct run_model *m = &h->model;
    const struct config *c = &m->config, *t = &trunk->config;
    if (get_tensor(r, "output.weight"))
        m->output = get_matrix(r, "output.weight", c->vocab, c->dim);
    else if (c->dim == t->dim)
        m->output = trunk->output;      /* all of it, or the rows that are named below */
    else
        return r->failed ? -1 : fail(r->error, "draft head %d has no output matrix, and the trunk's does not fit", number);
    struct tensor *rows = get_tensor(r, "rows");
    if (r->failed)
        return -1;
    if (!rows)
        return c->vocab == t->vocab ? 0 : fail(r->error, "draft head %d has %d output rows, but does not say whose", number, c->vocab);
    if (strcmp(rows->dtype, "I32") || rows->n_dims != 1 || rows->shape[0] != c->vocab)
        return fail(r->error, "tensor %s should be I32 [%d]", rows->name, c->vocab);
    h->rows = (const int32_t *)(const void *)rows->data;
    for (int i = 0; i < c->vocab; i++)
        if (h->rows[i] < 0 || h->rows[i] >= t->vocab)
            return fail(r->error, "tensor %s names token %d of %d", rows->name, h->rows[i], t->vocab);
    rows->used = 1;
    if (m->output.data == trunk->output.data) {
        if (!(h->gathered = calloc(1, matrix_bytes(m->output.type, c->vocab, c->dim))))
            return fail(r->error, "out of memory for the output rows of draft head %d", number);
        m->output = gather_rows(&trunk->output, h->rows, c->vocab, h->gathered);
    }
    return 0;
}

static int head_read(struct run_model *trunk, struct container *file, int number, struct head *h, run_error *error)
{
    const struct config *t = &trunk->config;
    struct run_model *m = &h->model;
    struct config *c = &m->config;
    struct mixing *x = &h->mixing;
    struct reading r = { file, error, 0, "" };
    snprintf(r.prefix, sizeof r.prefix, "draft.%d.", number);
    if (config_read(c, &r, t) || head_describe(trunk, &r, number, h))
        return -1;
    int norm = get_word(&r, "norm", (const char *const[]){ "own", "trunk", "none", NULL });
    m->kernels = trunk->kernels;
    m->layers = calloc((size_t)c->layers + 1, sizeof *m->layers);
    m->rope = calloc((size_t)c->rope_dims / 2 + 1, sizeof *m->rope);
    m->residuals = calloc(16, sizeof *m->residuals);
    if (!m->layers || !m->rope || !m->residuals)
        return fail(error, "out of memory");

    int fused = h->kind == SERIAL && get_tensor(&r, "fuse.weight");
    if (c->dim != t->dim && (!fused || norm == 1))
        return fail(error, "draft head %d is %d wide, its trunk %d", number, c->dim, t->dim);
    if (h->kind == SERIAL) {
        m->mixing = x;
        head_mixing(t, &r, h, fused);
    }
    if (h->kind == MEDUSA) {
        c->layers = 0;
        head_residuals(&r, m);
    } else {
        read_layer(&r, c, 0, &m->layers[0]);
    }
    if (fused && !x->residual_normed)
        m->layers[0].attn_norm = x->h_norm; /* the residual is the state, what attention reads is normalised */
    m->output_norm = norm == 0 ? get_vector(&r, "output_norm.weight", c->dim, 1) : norm == 1 ? trunk->output_norm : no_norm;
    if (head_output(trunk, &r, number, h) || rope_read(m, &r))
        return -1;
    measure_weights(m);
    const struct matrix *more[] = { &x->e_proj, &x->h_proj, &x->fuse, &x->q_e, &x->k_e, &x->v_e };
    for (int i = 0; i < 6; i++)
        m->has_packed |= more[i]->rows && more[i]->type >= Q4;
    for (int i = 0; i < m->n_residuals; i++)
        m->has_packed |= m->residuals[i].w.type >= Q4;
    return 0;
}

static void heads_close(struct run_model *m)
{
    for (int i = 0; i < m->n_heads; i++) {
        free(m->heads[i].model.layers);
        free(m->heads[i].model.rope);
        free(m->heads[i].model.residuals);
        free(m->heads[i].gathered);
    }
    free(m->heads);
    m->heads = NULL;
    m->n_heads = m->n_taps = 0;
}

/* All heads in a file. */
static int heads_read(struct run_model *m, struct container *file, run_error *error)
{
    struct reading r = { file, error, 0, "" };
    int n = (int)get_integer(&r, "draft.count", 0, 16, 0);
    if (r.failed || (n && !(m->heads = calloc((size_t)n, sizeof *m->heads))))
        return r.failed ? -1 : fail(error, "out of memory");
    for (; m->n_heads < n; m->n_heads++)
        if (head_read(m, file, m->n_heads, &m->heads[m->n_heads], error)) {
            m->n_heads++;
            heads_close(m);
            return -1;
        }
    return 0;
}

static uint32_t crc32_of(uint32_t crc, const unsigned char *data, size_t n)
{
    uint32_t table[256]; /* reflected polynomial 0xedb88320, as in zlib and PNG */
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
        table[i] = c;
    }
    crc = ~crc;
    for (size_t i = 0; i < n; i++)
        crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
    return ~crc;
}

static int is_heads(const struct container *file)
{
    const char *version = find_text(file, "run.c");
    return version && !strcmp(version, "heads 1");
}

int run_attach_heads(run_model *m, const char *path, run_error *error)
{
    struct container file;
    run_error inner;
    char digits[9];
    if (container_open(&file, path, error))
        return -1;
    const char *trunk = find_text(&file, "draft.trunk");
    snprintf(digits, sizeof digits, "%08x", (unsigned)crc32_of(0, (const unsigned char *)m->output_norm,
                                                               (size_t)m->config.dim * sizeof(float)));
    heads_close(m);
    container_close(&m->head_file);
    m->head_file = (struct container){ 0 };
    int failed = !is_heads(&file) ? fail(&inner, "this is not a file of draft heads") :
                 !trunk || strcmp(trunk, digits) ? fail(&inner, "these draft heads were made for another model") :
                 heads_read(m, &file, &inner) || (!m->n_heads && fail(&inner, "it holds no draft heads"));
    if (failed) {
        container_close(&file);
        return fail(error, "%.100s: %.400s", path, inner.text);
    }
    m->head_file = file;
    return 0;
}

static int model_read(struct run_model *m, run_error *error)
{
    struct config *c = &m->config;
    struct reading r = { &m->file, error, 0, "" };
    int *windowed = NULL, n_windowed = -1;
    const char *version = find_text(&m->file, "run.c");
    if (!version)
        return fail(error, "this safetensors file is not a run.c model (its metadata lacks run.c = 1); "
                    "convert it with: python3 export.py FOLDER -o model.bin");
    if (is_heads(&m->file))
        return fail(error, "this file holds draft heads; give it with --draft to the model that they are for");
    if (strcmp(version, "1"))
        return fail(error, "this file has format version \"%.20s\"; this run.c reads version 1", version);
    if (config_read(c, &r, NULL))
        return -1;
    if (!(m->layers = calloc((size_t)c->layers, sizeof *m->layers)) ||
        !(m->rope = calloc((size_t)c->rope_dims / 2 + 1, sizeof *m->rope)) ||
        !(windowed = calloc((size_t)c->layers, sizeof *windowed)))
        return fail(error, "out of memory");
    if (find_text(&m->file, "window.layers"))
        n_windowed = get_list(&r, "window.layers", windowed, c->layers, c->layers - 1);
    for (int i = 0; i < c->layers; i++)
        m->layers[i].window = n_windowed < 0 ? c->window : 0;
    for (int i = 0; i < n_windowed; i++)
        m->layers[windowed[i]].window = c->window;
    free(windowed);

    m->embedding = get_matrix(&r, "token_embd.weight", c->vocab, c->dim);
    m->output_norm = get_vector(&r, "output_norm.weight", c->dim, 1);
    m->output = find_tensor(&m->file, "output.weight") ? get_matrix(&r, "output.weight", c->vocab, c->dim)
                                                       : m->embedding;
    for (int i = 0; i < c->layers && !r.failed; i++)
        read_layer(&r, c, i, &m->layers[i]);
    if (r.failed || rope_read(m, &r))
        return -1;
    measure_weights(m);

    if (find_tensor(&m->file, "tokenizer.bytes")) {
        tokenizer_source source = { &m->file, tokenizer_tensor, tokenizer_text };
        char sentence[300] = "";
        if (!(m->tokenizer = tokenizer_open(&source, c->vocab, sentence, sizeof sentence)))
            return fail(error, "the tokenizer is damaged: %s", sentence);
    }
    return (m->kernels = choose_kernels(error)) && heads_read(m, &m->file, error) == 0 ? 0 : -1;
}

run_model *run_open(const char *path, run_error *error)
{
    struct run_model *m = calloc(1, sizeof *m);
    run_error inner;
    if (!m) {
        fail(error, "out of memory");
    } else if (!exact_arithmetic()) {
        fail(error, "run.c was compiled with options that change sums (-funsafe-math-optimizations?); "
             "compile it without them");
    } else if (container_open(&m->file, path, error) == 0) {
        uint64_t mode = set_float_mode(plain_float_mode);
        int failed = model_read(m, &inner);
        set_float_mode(mode);
        if (!failed)
            return m;
        fail(error, "%.100s: %.400s", path, inner.text);
    }
    run_close(m);
    return NULL;
}

int run_vocab_size(const run_model *m) { return m->config.vocab; }
int run_bos(const run_model *m) { return m->config.add_bos ? m->config.bos : -1; }
int run_context_length(const run_model *m) { return m->config.context; }
const char *run_text(const run_model *m, const char *key) { return find_text(&m->file, key); }

int run_tokenize(const run_model *m, const char *text, size_t length, int trusted, int **ids, run_error *error)
{
    tokenizer_span span = { text, length, trusted };
    int n;
    if (!m->tokenizer)
        return fail(error, "this model file has no tokenizer; it takes token ids");
    if (tokenizer_encode(m->tokenizer, &span, 1, ids, &n))
        return fail(error, "out of memory for the tokens of %zu bytes", length);
    return n;
}

const char *run_piece(const run_model *m, int id, size_t *length)
{
    int kind;
    *length = 0;
    return m->tokenizer && id >= 0 && id < m->config.vocab ? tokenizer_piece(m->tokenizer, id, length, &kind) : NULL;
}

/* == TRANSFORMER =============================================================================

   What it computes, for readers who know C. A token becomes a vector of `dim` numbers, a row of
   the embedding matrix. Every layer adds something to that vector, which is therefore called the
   residual stream; in the end its products with the rows of the output matrix, the logits, say
   how well each token of the vocabulary would come next. A layer adds twice:

   - attention fetches from earlier positions. Each head makes a query, a key and a value of the
     (normalised) vector; the query's products with the keys of all positions so far become
     weights by softmax (exp, divided by the sum), and the weighted sum of their values is what
     the head found. Keys and values never change, so they are kept: the KV cache. Several query
     heads may share one key/value head, which keeps the cache small. RoPE turns pairs of numbers
     in queries and keys by angles proportional to the position, so that a product of the two
     depends on how far apart they are;
   - the feed-forward network looks at one position: three matrices, activation(gate . x) times
     (up . x), back to the stream by `down`. With silu(x) = x / (1 + exp(-x)) it is called SwiGLU.

   Before each, RMSNorm divides the vector by its root mean square and multiplies it by weights.

   First comes the arithmetic that everything shares, then one plain kernel for each operation:
   what it computes, in the order the contract fixes. == SPEED has the same operations for vector
   instructions; they must agree with these to the last bit.                                  */

/* -- numbers -- */

INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t load_u16(const unsigned char *at)
{
    uint16_t x;
    memcpy(&x, at, 2);
    return x;
}

/* Half precision is 1 sign, 5 exponent, 10 mantissa bits. Shifting exponent and mantissa to
   their places in a float leaves an exponent that is 112 too small, which one multiplication
   by 2^112 mends, subnormals included. */
INLINE float from_half(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    float magnitude = from_bits(rest) * 0x1p112f;
    magnitude = rest >= 0x0f800000 ? from_bits(rest | 0x70000000) : magnitude; /* infinity, NaN */
    return from_bits(bits_of(magnitude) | sign);
}

/* Rounds to nearest even and saturates at 65504. A half below 2^-14 is a multiple of 2^-24, which
   is the last bit of a float just above 0.5, so that an addition rounds; others lose 13 bits. */
INLINE uint16_t to_half(float x)
{
    uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
    magnitude = magnitude > 0x477fe000 ? 0x477fe000 : magnitude;
    float small = from_bits(magnitude) + 0.5f;
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
    uint32_t half = magnitude < 0x38800000 ? bits_of(small) - 0x3f000000 : rounded >> 13;
    return (uint16_t)(sign | half);
}

INLINE float from_bf16(uint16_t b) { return from_bits((uint32_t)b << 16); }


/* Round to the nearest even integer, |x| < 2^22: the sum has no bits left for a fraction. */
INLINE float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

/* a if a > b, else b. As bits: compilers turn two conditions in a row into many paths. */
INLINE float larger_of(float a, float b)
{
    uint32_t mask = 0u - (uint32_t)(a > b);
    return from_bits((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

/* exp in float: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor to r^7 (the rest is below 6e-9), and
   two powers of two since 2^n alone may be out of range. */
INLINE float exp_(float x)
{
    float y = -larger_of(-larger_of(x, -104.0f), -89.0f);   /* from -104 to 89; NaN becomes -104 */
    float n = round_even(y * 0x1.715476p+0f);
    float r = fma_(n, -0x1.62e4p-1f, y);                    /* ln 2 in two parts: the first has */
    r = fma_(n, -0x1.7f7d1cp-20f, r);                       /* few bits, so n times it is exact */
    float p = 1.0f / 5040;
    p = fma_(p, r, 1.0f / 720);
    p = fma_(p, r, 1.0f / 120);
    p = fma_(p, r, 1.0f / 24);
    p = fma_(p, r, 1.0f / 6);
    p = fma_(p, r, 0.5f);
    p = fma_(p, r, 1.0f);
    p = fma_(p, r, 1.0f);
    int32_t whole = (int32_t)n, half = whole >> 1;
    return p * from_bits((uint32_t)(half + 127) << 23) * from_bits((uint32_t)(whole - half + 127) << 23);
}

INLINE float tanh_(float x)
{
    return 1.0f - 2.0f / (1.0f + exp_(2.0f * x));
}

/* Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7. */
INLINE float erf_(float x)
{
    float a = from_bits(bits_of(x) & 0x7fffffff), t = 1.0f / fma_(0.3275911f, a, 1.0f);
    float p = 1.061405429f;
    p = fma_(p, t, -1.453152027f);
    p = fma_(p, t, 1.421413741f);
    p = fma_(p, t, -0.284496736f);
    p = fma_(p, t, 0.254829592f);
    float y = 1.0f - p * t * exp_(-(a * a));
    return from_bits(bits_of(y) | (bits_of(x) & 0x80000000));
}

INLINE float silu(float x) { return x / (1.0f + exp_(-x)); }
INLINE float gelu(float x) { return 0.5f * x * (1.0f + erf_(x * 0x1.6a09e6p-1f)); }
INLINE float gelu_tanh(float x)
{
    return 0.5f * x * (1.0f + tanh_(0x1.988454p-1f * fma_(0.044715f * x * x, x, x)));
}

/* The same in double, where time does not matter: sampling, RoPE tables. */
static double exp_double(double x)
{
    if (x < -700)
        return 0;
    if (x > 700)
        x = 700;
    double n = (x * 1.4426950408889634 + 0x1.8p52) - 0x1.8p52;
    double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    double p = 1;
    for (int k = 14; k > 0; k--)
        p = 1 + p * r / k;
    uint64_t bits = (uint64_t)((int64_t)n + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return p * power;
}

/* x > 0 and normal: x = 2^e m with m near 1, log m = 2 artanh((m - 1) / (m + 1)). */
static double log_double(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffff) | (uint64_t)1023 << 52;
    memcpy(&x, &bits, 8);
    if (x > 1.4142135623730951) {
        x /= 2;
        e++;
    }
    double s = (x - 1) / (x + 1), power = s, sum = 0;
    for (int k = 1; k <= 21; k += 2, power *= s * s)
        sum += power / k;
    return 2 * sum + e * 0.6931471805599453;
}

/* sin and cos of x >= 0: x = k pi/2 + r with |r| <= pi/4 (pi/2 in two parts, the first short
   enough that k times it is exact to k = 2^20), then Taylor. */
static void sine_cosine(double x, float *sine, float *cosine)
{
    double k = (x * 0.6366197723675814 + 0x1.8p52) - 0x1.8p52;
    double r = (x - k * 0x1.921fb544p0) - k * 0x1.0b4611a626331p-34, r2 = r * r, s = 1, c = 1;
    for (int i = 14; i > 0; i -= 2) {
        s = 1 - s * r2 / (i * (i + 1));
        c = 1 - c * r2 / (i * (i - 1));
    }
    s *= r;
    switch ((int64_t)k & 3) {
    case 0: *sine = (float)s, *cosine = (float)c; break;
    case 1: *sine = (float)c, *cosine = (float)-s; break;
    case 2: *sine = (float)-s, *cosine = (float)-c; break;
    case 3: *sine = (float)-c, *cosine = (float)s; break;
    }
}

/* base^(-i / pairs), rounded where the usual float32 code of the training frameworks rounds. */
static void rope_frequencies(float *out, int pairs, float base)
{
    for (int i = 0; i < pairs; i++) {
        float exponent = (float)(2 * i) / (float)(2 * pairs);
        out[i] = 1.0f / (float)exp_double((double)exponent * log_double((double)base));
    }
}

/* Whether the compiler left sums as they are written. */
static int exact_arithmetic(void)
{
    volatile float x = 2.5f;
    return round_even(x) == 2;
}

/* -- the operations, plainly -- */

/* One operand of a matrix product: n rows of floats and, for packed matrices, the same rows as
   int8: x = q * scale in groups of 32, stored [group][row][32] so that a tile of rows is one
   stretch of memory. Columns are padded with zeros to 64. */
struct input {
    float *x;                       /* [n, stride], readable up to whole sixteens of columns */
    int8_t *q;                      /* [groups, n, 32] */
    float *scale;                   /* [groups, n] */
    float *offset;                  /* [groups, n] scale * (float)sum */
    int32_t *sum;                   /* [groups, n] sum of q */
    size_t stride;
    int n;                          /* rows */
    int cols;
};

/* One query head against one block of positions of its cache, and the running result. */
struct query {
    const float *q;                 /* [hd] */
    float *out;                     /* [hd] sum of exp(score - max) v */
    float max, sum;                 /* of the blocks so far */
    int first, end;                 /* visible positions inside the block, 0 to 64 */
};

enum { QUERIES = 6, TILE = 16 };    /* queries, rows that a kernel takes at once */

/* The table of kernels: filled for every instruction set in == SPEED. */
struct kernels {
    const char *name;
    /* tile[r][row] = the 16 rows of a strip times rows r0.. of x, n <= TILE */
    void (*matmul[N_TYPES])(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n);
    /* x [n] / rms(x) * w; returns non-zero if the sum of squares is not finite */
    int (*rmsnorm)(float *out, const float *x, const float *w, int n, float eps);
    /* a row's groups [g0, g1) from x to int8; returns non-zero if something is not finite */
    int (*quantize)(const struct input *in, int row, int g0, int g1);
    void (*glu)(float *gate, const float *up, int n, enum activation activation);
    /* rotates a head in place; table is cos, sin, cos, sin ... [pairs] */
    void (*rope)(float *x, const float *table, int pairs, int interleaved);
    /* up to QUERIES queries against a block of 64 cached positions */
    void (*attend[2])(struct query *q, int n, const void *keys, const void *values, int hd, float scale, float cap);
    /* sum of exp((x - max) * scale) in double, sixteen partial sums */
    double (*exp_sum)(const float *x, int n, float max, float scale);
    /* g[i] -= sum over j of h[i * stride + j] delta[j], i < rows, j < n, 16 lanes each: for packing */
    void (*feed_back)(float (*g)[STRIP], const float *h, size_t stride, int rows, float (*delta)[STRIP], int n);
    /* sum of 64-bit words, as fast as memory gives them: for bench */
    uint64_t (*read)(const uint64_t *words, size_t n);
};

typedef float four_floats __attribute__((vector_size(16), aligned(4), may_alias));
typedef float eight_floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t eight_ints __attribute__((vector_size(32), aligned(4), may_alias));

/* [N3]: sums 8 apart, then 4, 2 and 1 apart. */
INLINE float tree(const float s[16])
{
    const four_floats *q = (const four_floats *)(const void *)s;
    four_floats t = (q[0] + q[2]) + (q[1] + q[3]);
    return (t[0] + t[2]) + (t[1] + t[3]);
}

/* Four of them at once: the same sums, with the last steps side by side. */
INLINE void four_trees(float *out, float s[4][16])
{
    four_floats t[4];
    for (int i = 0; i < 4; i++) {
        const four_floats *q = (const four_floats *)(const void *)s[i];
        t[i] = (q[0] + q[2]) + (q[1] + q[3]);
    }
#ifdef __x86_64__
    __m128 ab = _mm_add_ps(_mm_movelh_ps(t[0], t[1]), _mm_movehl_ps(t[1], t[0]));   /* 0 + 2, 1 + 3 of both */
    __m128 cd = _mm_add_ps(_mm_movelh_ps(t[2], t[3]), _mm_movehl_ps(t[3], t[2]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
#else
    for (int i = 0; i < 4; i++)
        out[i] = (t[i][0] + t[i][2]) + (t[i][1] + t[i][3]);
#endif
}

/* The largest of n floats, n a positive multiple of 8. */
INLINE float largest(const float *x, int n)
{
    float top[8];
    eight_floats all = *(const eight_floats *)(const void *)x;
    for (int i = 8; i < n; i += 8) {
        eight_floats next = *(const eight_floats *)(const void *)(x + i);
        eight_ints larger = next > all;
        all = (eight_floats)((larger & (eight_ints)next) | (~larger & (eight_ints)all));
    }
    memcpy(top, &all, sizeof top);
    for (int step = 4; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            top[i] = top[i + step] > top[i] ? top[i + step] : top[i];
    return top[0];
}

/* The integer weight of a packed matrix inside a block (row < 16, column < 64). */
static int quant_of(const unsigned char *block, enum type type, int row, int column)
{
    if (type == Q8)
        return (int8_t)block[column / 4 * 64 + 4 * row + column % 4];
    int byte = block[column / 8 * 64 + 4 * row + column % 4], low = column % 8 < 4 ? byte & 15 : byte >> 4;
    if (type == Q6)
        return (low | (block[Q4_QUANTS + column / 16 * 64 + 4 * row + column % 4] >> column / 4 % 4 * 2 & 3) << 4) - 32;
    return low - (type == Q4 ? 8 : 0);
}

/* Its scale (which 0) or minimum (which 1). */
static float scale_of(const unsigned char *block, enum type type, int row, int group, int which)
{
    return from_half(load_u16(block + quant_bytes(type) + which * SCALES + group * 32 + row * 2));
}

static const unsigned char *block_of(const struct matrix *w, int strip, int block)
{
    return w->data + ((size_t)strip * blocks(w->cols) + (size_t)block) * (matrix_bytes(w->type, STRIP, BLOCK));
}

/* [N2]. Also the definition of what a packed matrix means. */
static void matmul_packed(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n)
{
    for (int r = 0; r < n; r++)
        for (int row = 0; row < STRIP; row++) {
            float acc = 0;
            for (int group = 0; group < 2 * (int)blocks(w->cols); group++) {
                const unsigned char *block = block_of(w, strip, group / 2);
                size_t at = (size_t)group * (size_t)x->n + (size_t)(r0 + r);
                int32_t isum = 0;
                for (int i = 0; i < GROUP; i++)
                    isum += quant_of(block, w->type, row, group % 2 * GROUP + i) * x->q[at * GROUP + (size_t)i];
                acc = fma_((float)isum, scale_of(block, w->type, row, group % 2, 0) * x->scale[at], acc);
                if (w->type == Q4A)
                    acc = fma_(scale_of(block, w->type, row, group % 2, 1), x->offset[at], acc);
            }
            tile[r * STRIP + row] = acc;
        }
}

INLINE float float_weight(const struct matrix *w, size_t i)
{
    const unsigned char *data = w->data;
    return w->type == F32 ? ((const float *)(const void *)data)[i]
         : w->type == F16 ? from_half(load_u16(data + 2 * i)) : from_bf16(load_u16(data + 2 * i));
}

/* [N3] */
static void matmul_float(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n)
{
    for (int r = 0; r < n; r++)
        for (int row = 0; row < STRIP && strip * STRIP + row < w->rows; row++) {
            size_t at = (size_t)(strip * STRIP + row) * (size_t)w->cols;
            float s[16] = { 0 };
            for (int k = 0; k < w->cols; k++)
                s[k % 16] = fma_(float_weight(w, at + (size_t)k), x->x[(size_t)(r0 + r) * x->stride + (size_t)k], s[k % 16]);
            tile[r * STRIP + row] = tree(s);
        }
}

static void feed_back_plainly(float (*g)[STRIP], const float *h, size_t stride, int rows, float (*delta)[STRIP], int n)
{
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < STRIP; r++)
            for (int j = 0; j < n; j++)
                g[i][r] -= h[(size_t)i * stride + (size_t)j] * delta[j][r];
}

/* The operations below are written once, inline, and compiled for every instruction set: they
   are plain loops over independent elements, which compilers turn into vector code. */

INLINE int rmsnorm_(float *out, const float *x, const float *w, int n, float eps)
{
    float s[16] = { 0 };
    int k = 0;
    for (; k + 16 <= n; k += 16)
        for (int i = 0; i < 16; i++)
            s[i] = fma_(x[k + i], x[k + i], s[i]);
    for (int i = 0; k + i < n; i++)
        s[i] = fma_(x[k + i], x[k + i], s[i]);
    float sum = tree(s), scale = 1.0f / __builtin_sqrtf(sum / (float)n + eps);
    for (int i = 0; i < n; i++)
        out[i] = w[i] * (x[i] * scale);
    return !(sum <= FLT_MAX);
}

/* [N6] */
INLINE int quantize_(const struct input *in, int row, int g0, int g1)
{
    int bad = 0;
    for (int g = g0; g < g1; g++) {
        float x[GROUP];
        size_t at = (size_t)g * (size_t)in->n + (size_t)row;
        int8_t *q = in->q + at * GROUP;
        int left = in->cols - g * GROUP, valid = left < 0 ? 0 : left < GROUP ? left : GROUP;
        const float *from = in->x + (size_t)row * in->stride + (size_t)g * GROUP;
        if (valid == GROUP)
            memcpy(x, from, sizeof x);
        else
            for (int i = 0; i < GROUP; i++)
                x[i] = i < valid ? from[i] : 0;
        int32_t largest = 0; /* floats without sign compare as integers */
        for (int i = 0; i < GROUP; i++) {
            int32_t magnitude = (int32_t)(bits_of(x[i]) & 0x7fffffff);
            largest = magnitude > largest ? magnitude : largest;
        }
        float amax = from_bits((uint32_t)largest), inverse = 127.0f / amax, scale = amax / 127.0f;
        if (!(amax >= 0x1p-100f && amax <= FLT_MAX)) {
            bad |= !(amax <= FLT_MAX);
            inverse = scale = 0;
            memset(x, 0, sizeof x);
        }
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) {
            /* after this addition the low bits of the float are the rounded integer */
            int32_t rounded = (int32_t)bits_of(x[i] * inverse + 0x1.8p23f) - 0x4b400000;
            q[i] = (int8_t)rounded;
            sum += rounded;
        }
        in->scale[at] = scale;
        in->sum[at] = sum;
        in->offset[at] = scale * (float)sum;
    }
    return bad;
}

INLINE void glu_(float *gate, const float *up, int n, enum activation activation)
{
    if (activation == SILU)
        for (int i = 0; i < n; i++)
            gate[i] = silu(gate[i]) * up[i];
    else if (activation == GELU)
        for (int i = 0; i < n; i++)
            gate[i] = gelu(gate[i]) * up[i];
    else
        for (int i = 0; i < n; i++)
            gate[i] = gelu_tanh(gate[i]) * up[i];
}

/* Pairs are (i, i + pairs) as in Hugging Face's models or (2 i, 2 i + 1) as in Meta's. */
INLINE void rope_(float *x, const float *table, int pairs, int interleaved)
{
    for (int i = 0; i < pairs; i++) {
        float *a = interleaved ? x + 2 * i : x + i, *b = interleaved ? a + 1 : a + pairs;
        float cosine = table[2 * i], sine = table[2 * i + 1], first = *a, second = *b;
        *a = fma_(first, cosine, -(second * sine));
        *b = fma_(second, cosine, first * sine);
    }
}

/* The scores of n queries for a block become probabilities relative to the largest of each; sum[j]
   is theirs. Lanes of 16 that a query does not see at all are left alone. A step waits for the one
   before, so all queries take it together. [N4] */
INLINE void softmax_(float s[][64], const struct query *queries, int n, float scale, float cap, float *max, float *sum)
{
    for (int j = 0; j < n; j++) {
        int first = queries[j].first, end = queries[j].end, low = first / 16 * 16, high = (end + 15) / 16 * 16;
        for (int i = low; i < high; i++)
            s[j][i] *= scale;
        for (int i = first; cap > 0 && i < end; i++)
            s[j][i] = cap * tanh_(s[j][i] / cap);
        for (int i = low; i < first; i++)
            s[j][i] = -INFINITY;        /* of which exp_ makes exactly 0 */
        for (int i = end; i < high; i++)
            s[j][i] = -INFINITY;
        max[j] = largest(s[j] + low, high - low);
    }
    for (int j = 0; j < n; j++)
        for (int i = queries[j].first / 16 * 16; i < queries[j].end; i += 16)
            for (int k = 0; k < 16; k++)
                s[j][i + k] = exp_(s[j][i + k] - max[j]);
    for (int j = 0; j < n; j++) {
        eight_floats lanes[2] = { 0 };
        for (int i = queries[j].first / 16 * 16; i < queries[j].end; i += 16) {
            lanes[0] += *(const eight_floats *)(const void *)(s[j] + i);
            lanes[1] += *(const eight_floats *)(const void *)(s[j] + i + 8);
        }
        sum[j] = tree((const float *)lanes);
    }
}

/* Adds a block's result [hd] to the running one: both are brought to the larger maximum. [N4] */
INLINE void merge_(struct query *q, const float *out, float max, float sum, int hd)
{
    float larger = max > q->max ? max : q->max;
    float before = q->sum > 0 ? exp_(q->max - larger) : 0.0f, now = exp_(max - larger);
    q->max = larger;
    q->sum = fma_(q->sum, before, sum * now);
    for (int i = 0; i < hd; i++)
        q->out[i] = fma_(q->out[i], before, out[i] * now);
}

/* Where in a block of the cache lies dimension d of position i: keys interleave 16 positions,
   values are rows. */
INLINE size_t key_at(int i, int d, int hd) { return (size_t)(i / 16 * 16) * (size_t)hd + (size_t)(d * 16 + i % 16); }
INLINE size_t value_at(int i, int d, int hd) { return (size_t)i * (size_t)hd + (size_t)d; }

INLINE float cached(const void *cache, size_t i, int f32)
{
    return f32 ? ((const float *)cache)[i] : from_half(((const uint16_t *)cache)[i]);
}

INLINE double exp_sum_(const float *x, int n, float max, float scale)
{
    double s[16] = { 0 };
    float e[16];
    int k = 0;
    for (; k + 16 <= n; k += 16) {
        for (int i = 0; i < 16; i++)
            e[i] = exp_((x[k + i] - max) * scale);
        for (int i = 0; i < 16; i++)
            s[i] += (double)e[i];
    }
    for (int i = 0; k + i < n; i++)
        s[i] += (double)exp_((x[k + i] - max) * scale);
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            s[i] += s[i + step];
    return s[0];
}

INLINE uint64_t read_(const uint64_t *words, size_t n)
{
    uint64_t sums[8] = { 0 };
    for (size_t i = 0; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            sums[j] += words[i + (size_t)j];
    return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

/* Wraps the inline operations into functions of one instruction set. */
#define INSTANTIATE(set)                                                                                   \
    static int rmsnorm_##set(float *o, const float *x, const float *w, int n, float e)                     \
    { return rmsnorm_(o, x, w, n, e); }                                                                    \
    static int quantize_##set(const struct input *in, int row, int g0, int g1)                             \
    { return quantize_(in, row, g0, g1); }                                                                 \
    static void glu_##set(float *g, const float *u, int n, enum activation a) { glu_(g, u, n, a); }        \
    static void rope_##set(float *x, const float *t, int pairs, int i) { rope_(x, t, pairs, i); }          \
    static double exp_sum_##set(const float *x, int n, float m, float s) { return exp_sum_(x, n, m, s); }  \
    static uint64_t read_##set(const uint64_t *words, size_t n) { return read_(words, n); }                \
    static void softmax_##set(float s[][64], const struct query *q, int n, float scale, float cap,         \
                              float *max, float *sum)                                                      \
    { softmax_(s, q, n, scale, cap, max, sum); }                                                           \
    static void merge_##set(struct query *q, const float *out, float max, float sum, int hd)               \
    { merge_(q, out, max, sum, hd); }

INSTANTIATE(scalar)

INLINE void attend_plainly(struct query *queries, int n, const void *keys, const void *values, int hd,
                           float scale, float cap, int f32)
{
    for (struct query *q = queries; q < queries + n; q++) {
        float s[1][64] = { 0 }, out[1024], max, sum;
        for (int i = q->first; i < q->end; i++)
            for (int d = 0; d < hd; d++)
                s[0][i] = fma_(q->q[d], cached(keys, key_at(i, d, hd), f32), s[0][i]);
        softmax_scalar(s, q, 1, scale, cap, &max, &sum);
        for (int d = 0; d < hd; d++) {
            out[d] = 0;
            for (int i = q->first; i < q->end; i++)
                out[d] = fma_(s[0][i], cached(values, value_at(i, d, hd), f32), out[d]);
        }
        merge_scalar(q, out, max, sum, hd);
    }
}

static void attend_scalar_f16(struct query *q, int n, const void *k, const void *v, int hd, float s, float c)
{ attend_plainly(q, n, k, v, hd, s, c, 0); }
static void attend_scalar_f32(struct query *q, int n, const void *k, const void *v, int hd, float s, float c)
{ attend_plainly(q, n, k, v, hd, s, c, 1); }

static const struct kernels kernels_scalar = {
    "scalar",
    { matmul_float, matmul_float, matmul_float, matmul_packed, matmul_packed, matmul_packed, matmul_packed },
    rmsnorm_scalar, quantize_scalar, glu_scalar, rope_scalar,
    { attend_scalar_f16, attend_scalar_f32 }, exp_sum_scalar, feed_back_plainly, read_scalar,
};

/* -- threads: a team runs one function, with barriers and counted loops inside --

   A loop's pieces are shared out in stretches, one for each thread: it walks through neighbouring
   weights, which is what prefetching wants. Who is done takes pieces of the others' stretches, so
   that a slow core has fewer. [T1] Between two barriers there is at most one counted loop; the
   barrier resets the counters.

   Waiting: a thread that sleeps comes back late, and then the others have gone to sleep at the next
   barrier, and so on at all of them. So a thread spins, then offers its core to others for longer
   than waking takes, and only then sleeps.

   When another program takes a core away, a thread may be missing for milliseconds, and all others
   wait for it: two threads are then slower than one. The team notices that its threads waited for
   long in several runs, does without some of them for a while, and tries again. */

enum { MOST_THREADS = 1024 };
#define SPINS 3000                  /* some 50 microseconds */
#define PATIENT 2e-3                /* seconds before it sleeps */

struct team {
    int size;                       /* threads, the caller included */
    int active;                     /* of them in the present run */
    int usable;                     /* of them while there is a core for each */
    int patience, rest;             /* runs until more are tried: next time, and still this time */
    int steps;                      /* that went well since the last failure; each adds one more than the last */
    double waiting;                 /* threads that waited long for others, on average over some runs */
    double runs, took;              /* so far, but for small ones, and the active threads of all of them */
    atomic_llong waited;            /* nanoseconds that threads waited long in this run */
    struct {
        atomic_int taken;           /* of the stretch of one thread */
        char apart[60];             /* a cache line for each */
    } stretches[MOST_THREADS];
    atomic_int arrived, sleepers;
    atomic_uint generation;         /* of the barrier */
    pthread_mutex_t mutex;          /* for those who wait long */
    pthread_cond_t wake;
    void (*work)(void *context, int me);
    void *context;
    pthread_t *threads;             /* [size - 1]; NULL with OpenMP, which keeps its own */
    atomic_uint job;                /* 2 MOST_THREADS times the number of the run, plus its active threads; UINT_MAX: the end */
};

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

INLINE void pause_(void)
{
#ifdef __x86_64__
    _mm_pause();
#else
    __asm__ volatile("yield");
#endif
}

/* Waits until *word is no longer `old`: spins, yields, sleeps. */
static void await(struct team *t, atomic_uint *word, unsigned old)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old)
            return;
        pause_();
    }
    double start = seconds();
    while (atomic_load_explicit(word, memory_order_acquire) == old && seconds() - start < PATIENT)
        sched_yield();
    if (atomic_load(word) == old) {
        pthread_mutex_lock(&t->mutex);
        atomic_fetch_add(&t->sleepers, 1);
        while (atomic_load(word) == old)
            pthread_cond_wait(&t->wake, &t->mutex);
        atomic_fetch_sub(&t->sleepers, 1);
        pthread_mutex_unlock(&t->mutex);
    }
    if (word == &t->generation)
        atomic_fetch_add(&t->waited, (long long)(1e9 * (seconds() - start)));
}

static void announce(struct team *t, atomic_uint *word, unsigned value)
{
    atomic_store(word, value);
    if (atomic_load(&t->sleepers)) {
        pthread_mutex_lock(&t->mutex);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->mutex);
    }
}

static void reset_counters(struct team *t)
{
    for (int i = 0; i < t->active; i++)
        atomic_store_explicit(&t->stretches[i].taken, 0, memory_order_relaxed);
}

static void barrier(struct team *t)
{
    unsigned generation = atomic_load(&t->generation);
    int active = t->active; /* read before arriving: afterwards the next run may change it */
    if (active == 1) {
        reset_counters(t);
    } else if (atomic_fetch_add(&t->arrived, 1) == active - 1) {
        atomic_store(&t->arrived, 0);
        reset_counters(t);
        announce(t, &t->generation, generation + 1);
    } else {
        await(t, &t->generation, generation);
    }
}

/* The next piece [*begin, *end) of `total`, of thread `me`'s own stretch first; 0 when nothing is left. */
static int next_piece(struct team *t, int me, int total, int grain, int *begin, int *end)
{
    for (int i = 0; i < t->active; i++) {
        int owner = (me + i) % t->active;
        int first = (int)((long long)total * owner / t->active), past = (int)((long long)total * (owner + 1) / t->active);
        atomic_int *taken = &t->stretches[owner].taken;
        if (atomic_load_explicit(taken, memory_order_relaxed) >= past - first)
            continue;
        *begin = first + atomic_fetch_add_explicit(taken, grain, memory_order_relaxed);
        if (*begin < past) {
            *end = past - *begin < grain ? past : *begin + grain;
            return 1;
        }
    }
    return 0;
}

static void work_plainly(struct team *t, int me)
{
    uint64_t before = set_float_mode(plain_float_mode);
    t->work(t->context, me);
    set_float_mode(before);
}

/* Chooses how many threads take part in the next runs, after one that took so long: as many fewer as
   waited, on average, for those without a core. A single run that was held up changes nothing. */
static void adapt(struct team *t, double time)
{
    t->waiting += (1e-9 * (double)t->waited / time - t->waiting) / 8;
    if (t->active > 1 && t->waiting > 0.2 * t->active) {
        t->usable = t->waiting < 1 ? t->active - 1 : t->waiting < t->active - 1 ? t->active - (int)t->waiting : 1;
        t->rest = t->patience = t->patience < 8 ? 8 : t->patience < 512 ? 2 * t->patience : 1024;
        t->waiting = t->steps = 0;
    } else if (t->usable == t->size) {
        t->patience /= 2;
    } else if (--t->rest <= 0) {
        t->usable = t->usable + ++t->steps < t->size ? t->usable + t->steps : t->size;
        t->rest = t->patience;
    }
}

/* Runs work(context, 0 .. active - 1), on the caller alone if it is small. */
static void team_run(struct team *t, int alone, void (*work)(void *, int), void *context)
{
    double start = t->size > 1 ? seconds() : 0;
    t->work = work;
    t->context = context;
    t->active = alone ? 1 : t->usable;
    atomic_store(&t->waited, 0);
    if (t->active == 1) {
        work_plainly(t, 0);
    } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(t->usable)
        {
#pragma omp single
            t->active = omp_get_num_threads();
            if (omp_get_thread_num() == 0) /* it waited for the others to begin */
                atomic_fetch_add(&t->waited, (long long)(1e9 * (seconds() - start)));
            work_plainly(t, omp_get_thread_num());
            barrier(t);
        }
#else
        announce(t, &t->job, (atomic_load(&t->job) / (2 * MOST_THREADS) + 1) * 2 * MOST_THREADS + (unsigned)t->active);
        work_plainly(t, 0);
        barrier(t);
#endif
    }
    if (!alone && t->size > 1) {
        t->runs++;
        t->took += t->active;
        adapt(t, seconds() - start);
    }
}

#ifndef _OPENMP
struct member {
    struct team *team;
    int number;
};

static void *member_main(void *argument)
{
    struct member member = *(struct member *)argument;
    struct team *t = member.team;
    free(argument);
    for (unsigned job = 0;;) {
        await(t, &t->job, job);
        job = atomic_load(&t->job);
        if (job == UINT_MAX)
            return NULL;
        if (member.number >= (int)(job % (2 * MOST_THREADS)))
            continue;               /* not in this one */
        work_plainly(t, member.number);
        barrier(t);
    }
}
#endif

static void team_close(struct team *t)
{
#ifndef _OPENMP
    announce(t, &t->job, UINT_MAX);
    for (int i = 0; i < t->size - 1; i++)
        pthread_join(t->threads[i], NULL);
    free(t->threads);
#endif
    pthread_mutex_destroy(&t->mutex);
    pthread_cond_destroy(&t->wake);
}

static int team_open(struct team *t, int size, run_error *error)
{
    memset(t, 0, sizeof *t);
    pthread_mutex_init(&t->mutex, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->size = t->active = 1;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    t->usable = cores > 0 && size > 4 * cores ? (int)(4 * cores) : size; /* to begin with */
#ifdef _OPENMP
    (void)error;
    t->size = size;
#else
    if (!(t->threads = calloc((size_t)size, sizeof *t->threads)))
        return fail(error, "out of memory");
    for (; t->size < size; t->size++) {
        struct member *member = malloc(sizeof *member);
        if (member)
            *member = (struct member){ t, t->size };
        if (!member || pthread_create(&t->threads[t->size - 1], NULL, member_main, member)) {
            free(member);
            team_close(t);
            return fail(error, "cannot start %d threads", size);
        }
    }
#endif
    return 0;
}

#ifdef __linux__
/* The first number in a small file of the kernel's, or `otherwise`. */
static long read_number(const char *path, long otherwise)
{
    char text[64] = "";
    FILE *file = fopen(path, "r");
    if (!file)
        return otherwise;
    if (!fgets(text, sizeof text, file))
        text[0] = '\0';
    fclose(file);
    return *text >= '0' && *text <= '9' ? strtol(text, NULL, 10) : otherwise;
}
#endif

/* Physical cores that this process may use: its affinity, less hyper-threads, within the cgroup's quota. */
static int default_threads(void)
{
    int n = 0;
#ifdef __linux__
    uint64_t mask[64] = { 0 };      /* of processors, a bit each */
    if (syscall(SYS_sched_getaffinity, 0, sizeof mask, mask) > 0)
        for (int i = 0; i < 4096; i++) {
            char path[100];
            if (!(mask[i / 64] >> i % 64 & 1))
                continue;
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", i);
            long first = read_number(path, i); /* its lowest sibling stands for a core */
            n += first >= i || !(mask[first / 64] >> first % 64 & 1);
        }
    long quota = -1, period = 100000;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (file) {
        if (fscanf(file, "%ld %ld", &quota, &period) < 1)
            quota = -1;
        fclose(file);
    } else {
        quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1);
        period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 100000);
    }
    if (quota > 0 && period > 0 && (quota + period - 1) / period < n)
        n = (int)((quota + period - 1) / period);
#else
    n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return n < 1 ? 1 : n > 256 ? 256 : n;
}

/* -- a session: tokens, their keys and values, and the work space of a forward pass --

   The cache of a layer and head is a row of blocks of 64 positions: keys [64, hd] with 16
   positions interleaved, then values [64, hd]. Block i of a layer lies in slot i modulo its
   number of slots; a layer with a sliding window has just enough of them. The memory is
   reserved at once and becomes real when it is first written.

   [S1] positions 0 .. length - 1 of `tokens` are in the cache, as far as a window can see them;
   [S2] `written` positions have ever been written, so that slots hold the newest blocks below. */

/* What bench times of a pass, waiting for other threads included. */
enum part { EMBED, PREPARE, QKV, ATTENTION, OUT, GATE_UP, DOWN, LOGITS, N_PARTS };

enum { CHUNK = 64, LOGIT_ROWS = 16 };   /* rows of a forward pass; those that get logits */

struct run_session {
    const struct run_model *model;
    unsigned char *cache;
    size_t cache_bytes;
    size_t *layer_at;                   /* [layers] offset of a layer's blocks */
    int *slots;                         /* [layers] blocks that a layer keeps of each head */
    int *tokens;                        /* [context] */
    int context, length, written, cache_f32;
    int first_row, wanted;              /* rows of logits from the last pass */
    int row, ahead;                     /* the one to draw from next; positions behind `length` that hold proposals */
    struct drafting *drafting;          /* NULL until it is wanted */
    struct prophets *prophets;          /* draft heads at work; NULL without */
    struct pass *pass;
    int borrowed;                       /* the pass is another session's */
    float *candidates;                  /* [vocab] for the sampler */
    int *order;                         /* [vocab] likewise */
    void (*observer)(void *context, const char *point, int layer, const float *values, int n, int width);
    void *observer_context;
};

static void drafting_close(struct drafting *d);
static struct prophets *prophets_open(run_session *s, run_error *error);
static void prophets_close(struct prophets *h, int n);
static void prophets_rewind(run_session *s, int position);
static void keep_states(run_session *s, int first, int n, int position);
static void forget_behind(run_session *s, int position);

struct row {                            /* of a forward pass */
    run_session *session;
    const float *vector;                /* [dim] in place of a token's embedding, or NULL; a draft head's state */
    int token, position;
    int wanted;                         /* its logits are */
};

struct thread_space {                   /* what a thread has for itself */
    struct input norm, att;             /* of a pass so small that each thread prepares it alone */
    struct query *queries;              /* [TILE heads / kv] */
};

struct pass {
    const struct run_model *model;
    struct team *team;                  /* its own, or that of the pass whose heads draft */
    int own_team;
    int n, wanted, observed;
    int kept;                           /* what draft heads want of the layers' inputs */
    int chained;                        /* a draft head's states are what the step before handed on */
    int guesses;                        /* among the rows */
    int unread;                         /* rows stop before the output matrix, in `last` */
    int alone;                          /* every thread prepares all rows, without a barrier */
    int n_tiles;
    struct row rows[CHUNK];
    struct { int first, end; } tiles[CHUNK]; /* at most TILE rows of one session */
    int wanted_rows[LOGIT_ROWS];
    atomic_int bad;                     /* 0, or 1 + layer * CHUNK + row of something not finite */
    struct input norm, att, hid, last;  /* operands of matrices: [n, dim], [n, heads hd], [n, hidden], [wanted, dim] */
    struct input embedded, state;       /* of a draft head: [n, the trunk's dim], [n, state] */
    float *tapped;                      /* [n, taps, dim] inputs of the layers that draft heads ask for */
    float *x;                           /* [n, dim] the residual stream */
    float *q;                           /* [n, heads hd], with gates [n, heads, 2, hd] */
    float *k, *v;                       /* [n, kv hd] */
    float *branch;                      /* [n, dim] what a layer adds, if a norm comes before */
    float *rope;                        /* [n, rope_dims] cos, sin, cos, sin ... */
    float *logits;                      /* [LOGIT_ROWS, vocab] */
    struct thread_space *threads;
    int timed;
    double parts[N_PARTS], mark;        /* seconds so far; when the last part ended */
};

/* All memory that grows on use: zero, and real only where touched. */
static void *reserve(size_t bytes)
{
    void *memory = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static int input_open(struct input *in, int rows, int cols, int own_x)
{
    size_t cells = 2 * blocks(cols) * (size_t)rows;
    in->stride = blocks(cols) * BLOCK;
    in->cols = cols;
    if (own_x)
        in->x = calloc((size_t)rows * in->stride, sizeof *in->x);
    in->q = calloc(cells, GROUP);
    in->scale = calloc(cells, sizeof *in->scale);
    in->offset = calloc(cells, sizeof *in->offset);
    in->sum = calloc(cells, sizeof *in->sum);
    return (in->x || !own_x) && in->q && in->scale && in->offset && in->sum ? 0 : -1;
}

static void input_close(struct input *in, int own_x)
{
    if (own_x)
        free(in->x);
    free(in->q);
    free(in->scale);
    free(in->offset);
    free(in->sum);
}

enum { ALONE = 2 };                     /* so few rows that preparing them twice costs less than a barrier */

static void pass_close(struct pass *p)
{
    if (!p)
        return;
    for (int i = 0; p->threads && i < p->team->size; i++) {
        input_close(&p->threads[i].norm, 1);
        input_close(&p->threads[i].att, 0);
        free(p->threads[i].queries);
    }
    if (p->own_team && p->team)
        team_close(p->team);
    if (p->own_team)
        free(p->team);
    input_close(&p->norm, 1);
    input_close(&p->att, 1);
    input_close(&p->hid, 1);
    input_close(&p->last, 1);
    input_close(&p->embedded, 1);
    input_close(&p->state, 1);
    free(p->tapped);
    free(p->threads);
    free(p->x);
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->branch);
    free(p->rope);
    free(p->logits);
    free(p);
}

/* team: of the trunk's pass, for a draft head; NULL: a new one. */
static struct pass *pass_open(const struct run_model *m, struct team *team, int threads, run_error *error)
{
    const struct config *c = &m->config;
    const struct mixing *mix = m->mixing;
    size_t dim = (size_t)c->dim, q = (size_t)(c->heads * c->hd), kv = (size_t)(c->kv * c->hd);
    struct pass *p = calloc(1, sizeof *p);
    if (!p || !(p->team = team ? team : calloc(1, sizeof *team)) || (!team && team_open(p->team, threads, error))) {
        if (p && !team)
            free(p->team);
        free(p);
        return NULL;
    }
    p->own_team = !team;
    p->model = m;
    threads = p->team->size;
    int bad = input_open(&p->norm, CHUNK, c->dim, 1) | input_open(&p->att, CHUNK, (int)q, 1) |
              input_open(&p->hid, CHUNK, c->hidden, 1) | input_open(&p->last, LOGIT_ROWS, c->dim, 1);
    bad |= !(p->x = calloc(CHUNK * dim, sizeof(float)));
    bad |= !(p->q = calloc(CHUNK * q << c->gated, sizeof(float)));
    if (mix)
        bad |= input_open(&p->embedded, CHUNK, mix->embedding.cols, 1) | input_open(&p->state, CHUNK, mix->state, 1);
    if (m->n_taps)
        bad |= !(p->tapped = calloc(CHUNK * dim * (size_t)m->n_taps, sizeof(float)));
    bad |= !(p->k = calloc(CHUNK * kv, sizeof(float)));
    bad |= !(p->v = calloc(CHUNK * kv, sizeof(float)));
    bad |= !(p->branch = calloc(CHUNK * dim, sizeof(float)));
    bad |= !(p->rope = calloc(CHUNK * (size_t)c->rope_dims + 1, sizeof(float)));
    bad |= !(p->logits = calloc(LOGIT_ROWS * (size_t)c->vocab, sizeof(float)));
    bad |= !(p->threads = calloc((size_t)threads, sizeof *p->threads));
    for (int i = 0; i < threads && !bad; i++) {
        struct thread_space *t = &p->threads[i];
        bad |= input_open(&t->norm, ALONE, c->dim, 1) | input_open(&t->att, ALONE, (int)q, 0);
        bad |= !(t->queries = calloc((size_t)(TILE * (c->heads / c->kv)), sizeof *t->queries));
        t->att.x = p->att.x;
    }
    if (bad) {
        fail(error, "out of memory for the work space of a session");
        pass_close(p);
        return NULL;
    }
    return p;
}

/* Blocks of 64 positions that a layer keeps. */
static int slots_of(const struct layer *l, int context)
{
    int all = (int)(((int64_t)context + BLOCK - 1) / BLOCK);
    int64_t seen = ((int64_t)l->window + CHUNK + BLOCK - 1) / BLOCK + 1;
    return l->window && seen < all ? (int)seen : all;
}

static size_t cache_bytes(const struct run_model *m, int context, int f32)
{
    size_t bytes = 0;
    for (int i = 0; i < m->config.layers; i++)
        bytes += (size_t)slots_of(&m->layers[i], context) * (size_t)(m->config.kv * m->config.hd) * BLOCK * 2 * (f32 ? 4 : 2);
    return bytes;
}

void run_session_close(run_session *s)
{
    if (!s)
        return;
    if (s->cache)
        munmap(s->cache, s->cache_bytes);
    prophets_close(s->prophets, s->model->n_heads);
    drafting_close(s->drafting);
    if (!s->borrowed)
        pass_close(s->pass);
    free(s->layer_at);
    free(s->slots);
    free(s->tokens);
    free(s->candidates);
    free(s->order);
    free(s);
}

/* shared, team: the work space, or only the threads, of another session, which must outlive this one; or NULL. */
static run_session *session_open(const run_model *m, const run_options *options, struct pass *shared, struct team *team,
                                 run_error *error)
{
    run_options o = { 0 };
    if (options)
        o = *options;
    int threads = o.threads > 0 ? o.threads : default_threads();
    run_session *s = calloc(1, sizeof *s);
    if (!s || o.context < 0 || threads > MOST_THREADS) {
        fail(error, s ? "a session needs a context of at least 1 and at most 1024 threads" : "out of memory");
        free(s);
        return NULL;
    }
    s->model = m;
    s->cache_f32 = o.cache_f32 != 0;
    s->context = o.context ? o.context : m->config.context;
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    while (!o.context && pages > 0 && s->context > 512 &&
           cache_bytes(m, s->context, s->cache_f32) / 2 > (size_t)pages * (size_t)page / 4)
        s->context /= 2; /* memory permitting: half of it */
    s->cache_bytes = cache_bytes(m, s->context, s->cache_f32);
    s->layer_at = calloc((size_t)m->config.layers, sizeof *s->layer_at);
    s->slots = calloc((size_t)m->config.layers, sizeof *s->slots);
    s->tokens = calloc((size_t)s->context, sizeof *s->tokens);
    s->candidates = calloc((size_t)m->config.vocab, sizeof *s->candidates);
    s->order = calloc((size_t)m->config.vocab, sizeof *s->order);
    s->cache = reserve(s->cache_bytes);
    if (!s->layer_at || !s->slots || !s->tokens || !s->candidates || !s->order || !s->cache) {
        fail(error, "out of memory for a cache of %d positions (%zu MB); ask for a smaller context", s->context,
             s->cache_bytes >> 20);
        run_session_close(s);
        return NULL;
    }
    size_t at = 0;
    for (int i = 0; i < m->config.layers; i++) {
        s->slots[i] = slots_of(&m->layers[i], s->context);
        s->layer_at[i] = at;
        at += (size_t)s->slots[i] * (size_t)(m->config.kv * m->config.hd) * BLOCK * 2 * (s->cache_f32 ? 4 : 2);
    }
    s->borrowed = shared != NULL;
    if (!(s->pass = shared ? shared : pass_open(m, team, threads, error))) {
        run_session_close(s);
        return NULL;
    }
    if (m->n_heads && !o.no_heads && !shared && !(s->prophets = prophets_open(s, error))) {
        run_session_close(s);
        return NULL;
    }
    return s;
}

run_session *run_session_open(const run_model *m, const run_options *options, run_error *error)
{
    return session_open(m, options, NULL, NULL, error);
}

/* The keys of a head's block of positions; the values follow them. */
static unsigned char *keys_of(const run_session *s, int layer, int head, int block)
{
    size_t size = (size_t)s->model->config.hd * BLOCK * 2 * (s->cache_f32 ? 4 : 2);
    return s->cache + s->layer_at[layer] + ((size_t)head * (size_t)s->slots[layer] + (size_t)(block % s->slots[layer])) * size;
}

/* Tokens and cache of s; not its logits. */
static void copy_timeline(run_session *f, const run_session *s)
{
    const struct config *c = &s->model->config;
    size_t block = (size_t)c->hd * BLOCK * 2 * (s->cache_f32 ? 4 : 2);
    for (int i = 0; i < c->layers; i++) { /* only what has been written, so that the rest stays unreal */
        int used = (s->written + BLOCK - 1) / BLOCK;
        used = used < s->slots[i] ? used : s->slots[i];
        for (int h = 0; h < c->kv; h++)
            memcpy(keys_of(f, i, h, 0), keys_of(s, i, h, 0), (size_t)used * block);
    }
    forget_behind(f, 0);
    memcpy(f->tokens, s->tokens, (size_t)s->length * sizeof *s->tokens);
    f->length = s->length;
    f->written = s->written;
    f->wanted = f->ahead = 0;
}

run_session *run_session_fork(const run_session *s, run_error *error)
{
    run_options o = { s->context, s->pass->team->size, s->cache_f32, !s->prophets };
    run_session *f = run_session_open(s->model, &o, error);
    if (!f)
        return NULL;
    copy_timeline(f, s);
    f->wanted = s->wanted > 0;
    if (s->wanted)
        memcpy(f->pass->logits, run_logits(s), (size_t)s->model->config.vocab * sizeof(float));
    return f;
}

int run_position(const run_session *s) { return s->length; }
int run_context(const run_session *s) { return s->context; }

const float *run_logits(const run_session *s)
{
    return s->wanted ? s->pass->logits + (size_t)(s->first_row + s->row) * (size_t)s->model->config.vocab : NULL;
}

/* -- the verbs of forward() -- */

static void note(struct pass *p, int bad, int layer, int row)
{
    int mark = 1 + layer * CHUNK + row, before = atomic_load(&p->bad);
    while (bad && (!before || mark < before) && !atomic_compare_exchange_weak(&p->bad, &before, mark))
        ;
}

static void mark(struct pass *p, int me, enum part part)
{
    if (!p->timed || me)
        return;
    double now = seconds();
    p->parts[part] += now - p->mark;
    p->mark = now;
}

static int not_finite(const float *x, int n)
{
    int32_t largest_bits = 0; /* floats without sign compare as integers */
    for (int i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of(x[i]) & 0x7fffffff);
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    return largest_bits >= 0x7f800000;
}

static void embedding_of(const struct matrix *w, int token, float scale, float *x)
{
    int row = token % STRIP;
    for (int i = 0; i < w->cols; i++) {
        if (w->type <= BF16) {
            x[i] = float_weight(w, (size_t)token * (size_t)w->cols + (size_t)i);
        } else {
            const unsigned char *block = block_of(w, token / STRIP, i / BLOCK);
            float q = (float)quant_of(block, w->type, row, i % BLOCK), d = scale_of(block, w->type, row, i % BLOCK / GROUP, 0);
            x[i] = fma_(q, d, w->type == Q4A ? scale_of(block, w->type, row, i % BLOCK / GROUP, 1) : 0.0f);
        }
        x[i] *= scale;
    }
}

static void embed(struct pass *p, int me)
{
    size_t dim = (size_t)p->model->config.dim;
    for (int r = me; r < p->n; r += p->team->active) {
        float *x = p->x + (size_t)r * dim;                             /* [dim] */
        if (p->rows[r].vector)
            memcpy(x, p->rows[r].vector, dim * sizeof *x);
        else
            embedding_of(&p->model->embedding, p->rows[r].token, p->model->config.embedding_scale, x);
    }
}

/* cos and sin of every row's position, [n, rope_dims]. */
static void rope_angles(struct pass *p, int me)
{
    int pairs = p->model->config.rope_dims / 2;
    for (int r = me; r < p->n; r += p->team->active)
        for (int i = 0; i < pairs; i++) {
            float *at = p->rope + (size_t)r * (size_t)(2 * pairs) + 2 * i;
            sine_cosine((double)((float)p->rows[r].position * p->model->rope[i]), &at[1], &at[0]);
            at[0] *= p->model->config.rope_factor;
            at[1] *= p->model->config.rope_factor;
        }
}

static int normalize(const struct run_model *m, float *out, const float *x, const float *weight, int n)
{
    if (weight != no_norm)
        return m->kernels->rmsnorm(out, x, weight, n, m->config.eps);
    memmove(out, x, (size_t)n * sizeof *x);
    return not_finite(x, n);
}

/* Makes `in` ready to be multiplied: the residual stream normalised with `norm` (NULL: what is in
   there already), and as int8 too if the weights want it. Few rows are prepared by every thread for
   itself, in `own`, which saves a barrier. */
static const struct input *prepare(struct pass *p, int me, int layer, struct input *in, struct input *own, const float *norm)
{
    const struct run_model *m = p->model;
    in = p->alone ? own : in;
    if (!norm && !m->has_packed)
        return in;
    /* neighbours by one thread: their int8 shares cache lines */
    int first = p->alone ? 0 : p->n * me / p->team->active, end = p->alone ? p->n : p->n * (me + 1) / p->team->active;
    for (int r = first; r < end; r++) {
        if (norm)
            note(p, normalize(m, in->x + (size_t)r * in->stride, p->x + (size_t)r * (size_t)m->config.dim, norm,
                              m->config.dim), layer, r);
        if (m->has_packed)
            note(p, m->kernels->quantize(in, r, 0, 2 * (int)blocks(in->cols)), layer, r);
    }
    if (!p->alone)
        barrier(p->team);
    return in;
}

struct product {                    /* out [n, stride] (+)= in . w^T + bias */
    const struct matrix *w;
    float *out;
    size_t stride;
    const float *bias;
    int add;
};

/* Matrix products with one operand, side by side: strips of all of them are one list of work. */
static void multiply(struct pass *p, int me, const struct product *products, int n_products, const struct input *in)
{
    int total = 0, begin, end;
    for (int i = 0; i < n_products; i++)
        total += (int)strips(products[i].w->rows);
    int grain = total / (8 * p->team->active) + 1;
    while (next_piece(p->team, me, total, grain, &begin, &end))
        for (int piece = begin; piece < end; piece++) {
            const struct product *a = products;
            int strip = piece;
            for (; strip >= (int)strips(a->w->rows); a++)
                strip -= (int)strips(a->w->rows);
            int row = strip * STRIP, rows = a->w->rows - row < STRIP ? a->w->rows - row : STRIP;
            for (int r0 = 0; r0 < in->n; r0 += TILE) {
                float tile[TILE * STRIP];
                int n = in->n - r0 < TILE ? in->n - r0 : TILE;
                p->model->kernels->matmul[a->w->type](tile, a->w, strip, in, r0, n);
                for (int r = 0; r < n; r++) {
                    float *out = a->out + (size_t)(r0 + r) * a->stride + row, *from = tile + r * STRIP;
                    for (int i = 0; a->bias && i < rows; i++)
                        from[i] += a->bias[row + i];
                    for (int i = 0; i < rows; i++)
                        out[i] = a->add ? out[i] + from[i] : from[i];
                }
            }
        }
}

/* gate = activation(in . gate^T) * (in . up^T), as floats and int8: [n, hidden]. A piece of work is
   32 units, one group of the next operand. */
static void feed_forward(struct pass *p, int me, int layer, const struct input *in)
{
    const struct layer *l = &p->model->layers[layer];
    const struct kernels *kernels = p->model->kernels;
    int hidden = l->gate.rows, total = 2 * (int)blocks(hidden), begin, end;
    int grain = total / (8 * p->team->active) + 1;
    while (next_piece(p->team, me, total, grain, &begin, &end))
        for (int group = begin; group < end; group++)
            for (int r0 = 0; r0 < in->n; r0 += TILE) {
                int n = in->n - r0 < TILE ? in->n - r0 : TILE;
                for (int row = group * GROUP; row < hidden && row < (group + 1) * GROUP; row += STRIP) {
                    float gate[TILE * STRIP], up[TILE * STRIP];
                    int rows = hidden - row < STRIP ? hidden - row : STRIP;
                    kernels->matmul[l->gate.type](gate, &l->gate, row / STRIP, in, r0, n);
                    kernels->matmul[l->up.type](up, &l->up, row / STRIP, in, r0, n);
                    for (int r = 0; r < n; r++) {
                        float *g = gate + r * STRIP, *u = up + r * STRIP;
                        for (int i = 0; l->gate_bias && i < rows; i++)
                            g[i] += l->gate_bias[row + i];
                        for (int i = 0; l->up_bias && i < rows; i++)
                            u[i] += l->up_bias[row + i];
                        kernels->glu(g, u, rows, p->model->config.activation);
                        memcpy(p->hid.x + (size_t)(r0 + r) * p->hid.stride + row, g, (size_t)rows * sizeof *g);
                    }
                }
                for (int r = r0; p->model->has_packed && r < r0 + n; r++)
                    note(p, kernels->quantize(&p->hid, r, group, group + 1), layer, r);
            }
}

/* For one key head and the query heads that share it: norms, rotation, and the keys and
   values into the cache. */
static void rotate_and_store(struct pass *p, int layer, int head, int first, int end)
{
    const struct config *c = &p->model->config;
    const struct layer *l = &p->model->layers[layer];
    const struct kernels *kernels = p->model->kernels;
    int hd = c->hd, group = c->heads / c->kv, pairs = c->rope_dims / 2, step = hd << c->gated;
    for (int r = first; r < end; r++) {
        float *q = p->q + (size_t)r * (size_t)(c->heads * step) + head * group * step; /* [group, hd], gates between */
        float *k = p->k + (size_t)r * (size_t)(c->kv * hd) + head * hd;             /* [hd] */
        float *v = p->v + (size_t)r * (size_t)(c->kv * hd) + head * hd;             /* [hd] */
        const float *angles = p->rope + (size_t)r * (size_t)(2 * pairs);
        for (int i = 0; i < group; i++) {
            if (l->q_norm)
                kernels->rmsnorm(q + i * step, q + i * step, l->q_norm, hd, c->eps);
            kernels->rope(q + i * step, angles, pairs, c->rope_interleaved);
        }
        if (l->k_norm)
            kernels->rmsnorm(k, k, l->k_norm, hd, c->eps);
        kernels->rope(k, angles, pairs, c->rope_interleaved);

        /* the cache rounds what is not finite to something that is */
        note(p, not_finite(q, group * step) || not_finite(k, hd) || not_finite(v, hd), layer, r);

        const run_session *s = p->rows[r].session;
        int block = p->rows[r].position / BLOCK, i = p->rows[r].position % BLOCK;
        unsigned char *keys = keys_of(s, layer, head, block);
        if (s->cache_f32) {
            float *to = (float *)(void *)keys;
            for (int d = 0; d < hd; d++) {
                to[key_at(i, d, hd)] = k[d];
                to[BLOCK * hd + (int)value_at(i, d, hd)] = v[d];
            }
        } else {
            uint16_t *to = (uint16_t *)(void *)keys;
            for (int d = 0; d < hd; d++) {
                to[key_at(i, d, hd)] = to_half(k[d]);
                to[BLOCK * hd + (int)value_at(i, d, hd)] = to_half(v[d]);
            }
        }
    }
}

/* One key head, rows [first, end) of one session, all the query heads that share it: block by
   block, so that a cached key is read once for all of them. */
static void attend(struct pass *p, int me, int layer, int head, int first, int end)
{
    const struct config *c = &p->model->config;
    const run_session *s = p->rows[first].session;
    struct query *queries = p->threads[me].queries;
    int hd = c->hd, group = c->heads / c->kv, window = p->model->layers[layer].window, n = (end - first) * group;
    int calls = (n + QUERIES - 1) / QUERIES, most = (n + calls - 1) / calls; /* queries at once, evenly */
    int low = INT_MAX, high = 0;
    for (int i = 0; i < n; i++) {
        size_t at = ((size_t)(first + i / group) * (size_t)(c->heads * hd) + (size_t)((head * group + i % group) * hd)) << c->gated;
        int position = p->rows[first + i / group].position, start = window && position >= window ? position - window + 1 : 0;
        queries[i] = (struct query){ .q = p->q + at, .max = -INFINITY,
                                     .out = p->att.x + (size_t)(first + i / group) * p->att.stride + (head * group + i % group) * hd };
        memset(queries[i].out, 0, (size_t)hd * sizeof(float));
        low = start < low ? start : low;
        high = position > high ? position : high;
    }
    for (int block = low / BLOCK; block <= high / BLOCK; block++) {
        const unsigned char *keys = keys_of(s, layer, head, block);
        const unsigned char *values = keys + (size_t)(BLOCK * hd) * (s->cache_f32 ? 4 : 2);
        int ready = 0;              /* queries [i - ready, i) see something of this block */
        for (int i = 0; i <= n; i++) {
            int sees = 0;
            if (i < n) {
                int position = p->rows[first + i / group].position - block * BLOCK;
                queries[i].first = window && position >= window ? position - window + 1 : 0;
                queries[i].end = position < BLOCK ? position + 1 : BLOCK;
                sees = queries[i].first < queries[i].end;
            }
            if (ready == most || (ready && !sees)) {
                p->model->kernels->attend[s->cache_f32](queries + i - ready, ready, keys, values, hd,
                                                        c->attention_scale, c->attention_cap);
                ready = 0;
            }
            ready += sees;
        }
    }
    for (int i = 0; i < n; i++) {
        float inverse = 1.0f / queries[i].sum;
        for (int d = 0; d < hd; d++)
            queries[i].out[d] *= inverse;
        for (int d = 0; c->gated && d < hd; d++)
            queries[i].out[d] /= 1.0f + exp_(-queries[i].q[hd + d]);
    }
}

/* Rotation and attention of all heads and rows. If all rows are one tile, a head's keys are stored
   by the thread that reads them. */
static void attention(struct pass *p, int me, int layer)
{
    int heads = p->model->config.kv, begin, end;
    if (p->n_tiles > 1) {
        while (next_piece(p->team, me, heads * p->n_tiles, 1, &begin, &end))
            rotate_and_store(p, layer, begin % heads, p->tiles[begin / heads].first, p->tiles[begin / heads].end);
        barrier(p->team);
    }
    while (next_piece(p->team, me, heads * p->n_tiles, 1, &begin, &end)) {
        int first = p->tiles[begin / heads].first, last = p->tiles[begin / heads].end;
        if (p->n_tiles == 1)
            rotate_and_store(p, layer, begin, first, last);
        attend(p, me, layer, begin % heads, first, last);
    }
    barrier(p->team);
}

/* x += in . w^T + bias, which some architectures normalise before they add it. */
static void add_branch(struct pass *p, int me, int layer, const struct matrix *w, const float *bias, const float *norm,
                       const struct input *in)
{
    const struct config *c = &p->model->config;
    multiply(p, me, &(struct product){ w, norm ? p->branch : p->x, (size_t)c->dim, bias, !norm }, 1, in);
    barrier(p->team);
    if (!norm)
        return;
    for (int r = me; r < p->n; r += p->team->active) {
        float *branch = p->branch + (size_t)r * (size_t)c->dim, *x = p->x + (size_t)r * (size_t)c->dim;
        note(p, p->model->kernels->rmsnorm(branch, branch, norm, c->dim, c->eps), layer, r);
        for (int i = 0; i < c->dim; i++)
            x[i] += branch[i];
    }
    barrier(p->team);
}

/* Hands rows to the sessions' observers. Costs one branch when there are none. */
static void observe(struct pass *p, int me, const char *point, int layer, const float *values, size_t stride, int width)
{
    if (!p->observed)
        return;
    barrier(p->team);
    for (int r = 0; me == 0 && r < p->n; r++) {
        const run_session *s = p->rows[r].session;
        if (s->observer)
            s->observer(s->observer_context, point, layer, values + (size_t)r * stride, p->rows[r].position, width);
    }
    barrier(p->team);
}

/* What a draft head begins with, from the embedding of a token and a state of the trunk. [n, dim] */
static void mix(struct pass *p, int me)
{
    const struct run_model *m = p->model;
    const struct mixing *mix = m->mixing;
    size_t dim = (size_t)m->config.dim;
    int chained = mix->fuse.rows && p->chained;
    for (int r = me; r < p->n; r += p->team->active) {
        float *e = p->embedded.x + (size_t)r * p->embedded.stride, *h = p->state.x + (size_t)r * p->state.stride;
        embedding_of(&mix->embedding, p->rows[r].token, mix->embedding_scale, e);
        if (mix->zero_first && p->rows[r].position == 0)
            memset(e, 0, (size_t)mix->embedding.cols * sizeof *e);
        if (mix->e_norm)
            note(p, normalize(m, e, e, mix->e_norm, mix->embedding.cols), 0, r);
        if (chained) {
            memcpy(p->x + (size_t)r * dim, p->rows[r].vector, dim * sizeof *e);
        } else {
            memcpy(h, p->rows[r].vector, (size_t)mix->state * sizeof *h);
            if (mix->h_norm && !mix->fuse.rows)
                note(p, normalize(m, h, h, mix->h_norm, mix->state), 0, r);
        }
        if (m->has_packed)
            note(p, m->kernels->quantize(&p->embedded, r, 0, 2 * (int)blocks(p->embedded.cols)), 0, r);
        if (m->has_packed && !chained)
            note(p, m->kernels->quantize(&p->state, r, 0, 2 * (int)blocks(p->state.cols)), 0, r);
    }
    barrier(p->team);
    if (!mix->fuse.rows) {
        multiply(p, me, &(struct product){ &mix->e_proj, p->x, dim, mix->bias, 0 }, 1, &p->embedded);
        barrier(p->team);
        multiply(p, me, &(struct product){ &mix->h_proj, p->x, dim, NULL, 1 }, 1, &p->state);
    } else if (!chained) {
        multiply(p, me, &(struct product){ &mix->fuse, p->x, dim, mix->bias, 0 }, 1, &p->state);
    }
    barrier(p->team);
    for (int r = me; mix->residual_normed && r < p->n; r += p->team->active)
        note(p, normalize(m, p->x + (size_t)r * dim, p->x + (size_t)r * dim, mix->h_norm, m->config.dim), 0, r);
}

/* Logits [wanted, vocab] of the rows in p->last. */
static void read_out(void *context, int me)
{
    struct pass *p = context;
    const struct run_model *m = p->model;
    const struct config *c = &m->config;
    for (int j = me; m->has_packed && j < p->wanted; j += p->team->active)
        note(p, m->kernels->quantize(&p->last, j, 0, 2 * (int)blocks(c->dim)), c->layers, p->wanted_rows[j]);
    barrier(p->team);
    if (!p->wanted)
        return;
    multiply(p, me, &(struct product){ &m->output, p->logits, (size_t)c->vocab, NULL, 0 }, 1, &p->last);  /* [wanted, vocab] */
    barrier(p->team);
    for (size_t i = (size_t)me; (c->logit_scale != 1 || c->logit_cap > 0) && i < (size_t)p->wanted * (size_t)c->vocab;
         i += (size_t)p->team->active) {
        float x = p->logits[i] * c->logit_scale;
        p->logits[i] = c->logit_cap > 0 && fabsf(x) <= FLT_MAX ? c->logit_cap * tanh_(x / c->logit_cap) : x;
    }
    if (c->logit_scale != 1 || c->logit_cap > 0)
        barrier(p->team);
    for (int j = me; j < p->wanted; j += p->team->active)
        note(p, not_finite(p->logits + (size_t)j * (size_t)c->vocab, c->vocab), c->layers, p->wanted_rows[j]);
    mark(p, me, LOGITS);
}

/* The transformer, as one thread of the team sees it. It runs n rows through all layers; the rows
   are tokens of any sessions at any positions, and none depends on which others are there. */
static void forward(void *context, int me)
{
    struct pass *p = context;
    const struct run_model *m = p->model;
    const struct config *c = &m->config;
    size_t dim = (size_t)c->dim, q = (size_t)(c->heads * c->hd), kv = (size_t)(c->kv * c->hd);
    struct thread_space *own = &p->threads[me];
    const struct mixing *mixing = m->mixing;

    (mixing ? mix : embed)(p, me);                                     /* x [n, dim] */
    rope_angles(p, me);
    barrier(p->team);
    mark(p, me, EMBED);
    observe(p, me, "embed", -1, p->x, dim, c->dim);

    for (int i = 0; i < c->layers; i++) {
        const struct layer *l = &m->layers[i];
        const struct input *in;

        for (int k = 0; p->kept && k < m->n_taps; k++)
            for (int r = me; m->taps[k] == i && r < p->n; r += p->team->active)
                memcpy(p->tapped + (size_t)(r * m->n_taps + k) * dim, p->x + (size_t)r * dim, dim * sizeof *p->x);

        /* attention: x += o . attend(q, k, v) */
        in = prepare(p, me, i, &p->norm, &own->norm, l->attn_norm);    /* [n, dim] */
        mark(p, me, PREPARE);
        observe(p, me, "attn_norm", i, in->x, in->stride, c->dim);
        multiply(p, me, (struct product[]){ { &l->q, p->q, q << c->gated, l->q_bias, 0 },    /* [n, heads hd] */
                                            { &l->k, p->k, kv, l->k_bias, 0 },               /* [n, kv hd] */
                                            { &l->v, p->v, kv, l->v_bias, 0 } }, 3, in);     /* [n, kv hd] */
        barrier(p->team);
        if (mixing && mixing->q_e.rows) {
            multiply(p, me, (struct product[]){ { &mixing->q_e, p->q, q << c->gated, NULL, 1 },
                                                { &mixing->k_e, p->k, kv, NULL, 1 },
                                                { &mixing->v_e, p->v, kv, NULL, 1 } }, 3, &p->embedded);
            barrier(p->team);
        }
        mark(p, me, QKV);
        attention(p, me, i);                                           /* att [n, heads hd] */
        mark(p, me, ATTENTION);
        observe(p, me, "attn", i, p->att.x, p->att.stride, (int)q);
        in = prepare(p, me, i, &p->att, &own->att, NULL);
        mark(p, me, PREPARE);
        add_branch(p, me, i, &l->o, l->o_bias, l->post_attn_norm, in);
        mark(p, me, OUT);

        /* feed forward: x += down . (act(gate . x) * (up . x)) */
        in = prepare(p, me, i, &p->norm, &own->norm, l->ffn_norm);     /* [n, dim] */
        mark(p, me, PREPARE);
        observe(p, me, "ffn_norm", i, in->x, in->stride, c->dim);
        feed_forward(p, me, i, in);                                        /* hid [n, hidden] */
        barrier(p->team);
        mark(p, me, GATE_UP);
        observe(p, me, "ffn", i, p->hid.x, p->hid.stride, c->hidden);
        add_branch(p, me, i, &l->down, l->down_bias, l->post_ffn_norm, &p->hid);
        mark(p, me, DOWN);
        observe(p, me, "out", i, p->x, dim, c->dim);
    }

    for (int i = 0; i < m->n_residuals; i++) {
        const struct input *in = prepare(p, me, i, &p->norm, &own->norm, no_norm);
        multiply(p, me, &(struct product){ &m->residuals[i].w, p->branch, dim, m->residuals[i].bias, 0 }, 1, in);
        barrier(p->team);
        for (int r = me; r < p->n; r += p->team->active)
            for (size_t k = (size_t)r * dim; k < (size_t)(r + 1) * dim; k++)
                p->x[k] += p->branch[k] / (1.0f + exp_(-p->branch[k]));
        barrier(p->team);
    }

    /* logits, for the rows that want them; an observer sees the last norm of all rows */
    for (int r = me; p->observed && r < p->n; r += p->team->active)
        m->kernels->rmsnorm(p->norm.x + (size_t)r * p->norm.stride, p->x + (size_t)r * dim, m->output_norm, c->dim, c->eps);
    observe(p, me, "norm", -1, p->norm.x, p->norm.stride, c->dim);
    for (int j = me; j < p->wanted; j += p->team->active)
        note(p, normalize(m, p->last.x + (size_t)j * p->last.stride, p->x + (size_t)p->wanted_rows[j] * dim, m->output_norm,
                          c->dim), c->layers, p->wanted_rows[j]);
    if (!p->unread)
        read_out(p, me);
}

/* Runs up to CHUNK rows; p->logits then holds those of the wanted ones in order. */
static int run_pass(struct pass *p, const struct row *rows, int n, run_error *error)
{
    p->n = p->norm.n = p->att.n = p->hid.n = p->embedded.n = p->state.n = n;
    p->alone = n <= ALONE;
    for (int i = 0; i < p->team->size; i++)
        p->threads[i].norm.n = p->threads[i].att.n = n;
    p->wanted = p->n_tiles = p->observed = p->kept = 0;
    p->bad = 0;
    size_t bytes = p->model->weight_bytes, little = p->own_team ? 4 << 20 : 1 << 20; /* draft heads find the others awake */
    size_t all = p->guesses ? 32 << 20 : 2000000;                   /* guesses come and go, and the others fall asleep */
    int small = bytes < little && (n == 1 || bytes * (size_t)n < all); /* not worth waking others for */
    int threads = small ? 1 : p->team->usable, pieces = p->model->config.kv * ((n + TILE - 1) / TILE), tile = TILE;
    if (n > 1 && pieces < 4 * threads && pieces % threads)
        tile = (n < TILE ? n + 1 : TILE) / 2;   /* few pieces of attention would not come out even */
    memcpy(p->rows, rows, (size_t)n * sizeof *rows);
    for (int r = 0; r < n; r++) {
        if (rows[r].wanted)
            p->wanted_rows[p->wanted++] = r;
        p->observed |= rows[r].session->observer != NULL;
        p->kept |= rows[r].session->prophets != NULL;
        if (r == 0 || rows[r].session != rows[r - 1].session || r - p->tiles[p->n_tiles - 1].first == tile)
            p->tiles[p->n_tiles++].first = r;
        p->tiles[p->n_tiles - 1].end = r + 1;
    }
    p->last.n = p->wanted;
    p->mark = p->timed ? seconds() : 0;
    team_run(p->team, small, forward, p);
    if (p->bad) {
        int layer = (p->bad - 1) / CHUNK, position = p->rows[(p->bad - 1) % CHUNK].position;
        if (layer == p->model->config.layers)
            return fail(error, "the last activation or a logit at position %d is not finite: the weights are damaged or too large", position);
        return fail(error, "an activation in layer %d at position %d is not finite: the weights are damaged or too large",
                    layer, position);
    }
    return 0;
}

static int rewind_to(run_session *s, int position, run_error *error);

/* run_eval, with the logits of the last `wanted` <= LOGIT_ROWS tokens. */
static int eval(run_session *s, const int *ids, int n, int wanted, run_error *error)
{
    if (n < 1)
        return fail(error, "there is nothing to evaluate");
    if (n > s->context - s->length)
        return fail(error, "the context is full: %d tokens do not fit behind %d of %d positions", n, s->length, s->context);
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->config.vocab)
            return fail(error, "token id %d is outside the vocabulary of %d", ids[i], s->model->config.vocab);
    int length = s->length;
    s->wanted = 0;
    for (int done = 0; done < n;) {
        struct row rows[CHUNK];
        int chunk = n - done < CHUNK ? n - done : CHUNK;
        for (int i = 0; i < chunk; i++)
            rows[i] = (struct row){ s, NULL, ids[done + i], s->length + i, done + i >= n - wanted };
        s->written = s->length + chunk > s->written ? s->length + chunk : s->written;
        memmove(s->tokens + s->length, ids + done, (size_t)chunk * sizeof *ids); /* a rewind reads them from there */
        if (run_pass(s->pass, rows, chunk, error)) {
            run_error second;
            return rewind_to(s, length, &second), -1;
        }
        keep_states(s, 0, chunk, s->length);
        s->length += chunk;
        done += chunk;
    }
    s->wanted = wanted;
    s->first_row = s->ahead = 0;
    s->row = wanted - 1;
    return 0;
}

int run_eval(run_session *s, const int *ids, int n, run_error *error)
{
    return eval(s, ids, n, 1, error);
}

void run_observe(run_session *s, run_observer observer, void *context)
{
    s->observer = observer;
    s->observer_context = context;
}

/* Dropping rows is a matter of counting, unless a window's slots have been used again since: then
   the text is read once more. */
static int rewind_to(run_session *s, int position, run_error *error)
{
    s->wanted = 0;
    forget_behind(s, position);
    for (int i = 0; i < s->model->config.layers; i++) {
        int window = s->model->layers[i].window, first = position >= window ? position - window + 1 : 0;
        int oldest = (s->written - 1) / BLOCK - s->slots[i] + 1;    /* block that is still there */
        if (window && position > 0 && first / BLOCK < oldest) {
            s->length = s->written = 0;
            return eval(s, s->tokens, position, 0, error);
        }
    }
    s->length = position;
    return 0;
}

int run_rewind(run_session *s, int position, run_error *error)
{
    if (position < 0 || position > s->length)
        return fail(error, "cannot rewind to position %d of %d", position, s->length);
    return position == s->length ? 0 : rewind_to(s, position, error);
}

/* == SAMPLING ================================================================================

   Candidates are ordered by (logit descending, id ascending); all sums run in that order, in
   double. Temperature divides the logits first; then top-k, top-p and min-p each keep a prefix of
   the order; one random number picks from what is left.                                      */

enum { PENALTY_WINDOW = 64 };

/* Uniform in [0, 1), a function of its three arguments: a counter, mixed as in SplitMix64
   (Steele, Lea, Flood 2014). */
static double random_unit(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint64_t keys[3] = { seed, stream, index }, x = 0;
    for (int i = 0; i < 3; i++) {
        x = (x ^ keys[i]) + 0x9e3779b97f4a7c15;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
        x = (x ^ x >> 27) * 0x94d049bb133111eb;
        x ^= x >> 31;
    }
    return (double)(x >> 11) * 0x1p-53;
}

/* Candidate a comes after b. */
INLINE int after(const float *logits, int a, int b)
{
    return logits[a] < logits[b] || (logits[a] == logits[b] && a > b);
}

/* Restores a heap whose root is the last in order, after the root has changed. */
static void sift(const float *logits, int *heap, int n, int at)
{
    for (int child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && after(logits, heap[child + 1], heap[child]))
            child++;
        if (!after(logits, heap[child], heap[at]))
            return;
        int swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
    }
}

/* The first k of n candidates, in order. O(n) when k is small: few logits get past the root. */
static void select_first(const float *logits, int n, int k, int *order)
{
    for (int i = 0; i < k; i++)
        order[i] = i;
    for (int i = k / 2 - 1; i >= 0; i--)
        sift(logits, order, k, i);
    for (int i = k; i < n; i++)
        if (logits[i] > logits[order[0]]) {
            order[0] = i;
            sift(logits, order, k, 0);
        }
    for (int i = k - 1; i > 0; i--) {
        int swap = order[0];
        order[0] = order[i];
        order[i] = swap;
        sift(logits, order, i, 0);
    }
}

static int best_of(const float *logits, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* Logits with the penalty on tokens that occurred lately (as in CTRL, Keskar et al. 2019). */
static const float *penalize(run_session *s, const float *logits, float penalty)
{
    if (penalty == 1 || !(penalty > 0))
        return logits;
    int first = s->length > PENALTY_WINDOW ? s->length - PENALTY_WINDOW : 0;
    memcpy(s->candidates, logits, (size_t)s->model->config.vocab * sizeof *logits);
    for (int i = first; i < s->length; i++) {
        int id = s->tokens[i];
        s->candidates[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
    }
    return s->candidates;
}

static int draw(run_session *s, const float *logits, const run_sampling *how, run_error *error)
{
    int vocab = s->model->config.vocab, *order = s->order;
    logits = penalize(s, logits, how->repeat_penalty);
    int best = best_of(logits, vocab);
    float max = logits[best], sharpness = 1.0f / how->temperature;
    if (!(max <= FLT_MAX && max >= -FLT_MAX))
        return fail(error, "a logit at position %d is not finite: the weights are damaged or too large", s->length);
    if (!(sharpness <= FLT_MAX) || sharpness < 0)
        return best;
    double unit = random_unit(how->seed, how->stream, (uint64_t)s->length), total = 0, sum = 0, kept = 0;
    int all = how->top_k > 0 && how->top_k < vocab ? how->top_k : vocab;
    if (all == vocab)
        total = s->model->kernels->exp_sum(logits, vocab, max, sharpness);

    /* Sorting everything is rarely needed: sort a short prefix, and a longer one if it was too short. */
    for (int n = all < vocab ? all : all < 64 ? all : 64;; n = n < all / 8 ? 8 * n : all) {
        int last = n - 1, enough = n == all;
        select_first(logits, vocab, n, order);
        if (all < vocab && n == all)
            for (int i = 0; i < n; i++)
                total += (double)exp_((logits[order[i]] - max) * sharpness);
        kept = 0;
        for (int i = 0; i < n; i++) { /* the weight of the best is 1 */
            double weight = (double)exp_((logits[order[i]] - max) * sharpness);
            if (i > 0 && weight < (double)how->min_p) {
                last = i - 1;
                enough = 1;
                break;
            }
            kept += weight;
            if (kept >= (double)how->top_p * total) {
                last = i;
                enough = 1;
                break;
            }
        }
        if (how->top_p >= 1 && how->min_p <= 0)
            kept = total;           /* nothing is cut: what is not in the prefix counts too */
        sum = 0;
        for (int i = 0; i <= last; i++) {
            sum += (double)exp_((logits[order[i]] - max) * sharpness);
            if (sum > unit * kept && (enough || (how->top_p >= 1 && how->min_p <= 0)))
                return order[i];
        }
        if (enough)
            return order[last];
    }
}

/* The token that these logits and settings give at the session's present length. */
static int sample(run_session *s, const float *logits, const run_sampling *how, run_error *error)
{
    uint64_t mode = set_float_mode(plain_float_mode);
    int id = draw(s, logits, how, error);
    set_float_mode(mode);
    return id;
}

int run_sample(run_session *s, const run_sampling *sampling, run_error *error)
{
    const float *logits = run_logits(s);
    return logits ? sample(s, logits, sampling, error) : fail(error, "there are no logits: evaluate a token first");
}

/* == DRAFTING ================================================================================

   The loop of generation, and what makes it fast. A pass over several tokens costs little more
   than a pass over one, so it pays to guess: the token just drawn and some proposals for what
   comes next go through one pass in a line, and then each row's logits are sampled as they would
   have been anyway. A proposal stands if it is the token that was drawn; the first that is not,
   and all behind it, are forgotten. So the text is the same with every drafter and with none.

   [D1] What advances, advances by drawn tokens only: the timeline, the text, the search for stop
   strings, the table of lookup. Proposals lie beyond the timeline's end until they are drawn.
   [D2] Decisions depend on time; what is drawn depends on the timeline alone.                  */

/* -- lookup: what followed when the same words were there before --

   A suffix automaton (Blumer et al. 1985) of the timeline, as in SAM-Decoding (Hu et al. 2024). A
   state stands for strings that occur at the same places; its length is that of the longest. States
   1 .. n are the prefixes of the text: their length is their number, and the edge from state i to
   i + 1 is the text itself. Only other edges are stored, at most 2 a token. A cursor is the longest
   end of a text that occurs here; with one edge after another it follows what is added.

   52 bytes for each token of room, whatever the text. */

struct edge { int token, to, next; };   /* next: the same state's next edge, or 0 */

struct lookup {
    const int *tokens;
    int n, room;
    int *link;                          /* [2 room + 1] the state of the longest end that also occurs elsewhere */
    int *after;                         /* [2 room + 1] where the token stands that followed last time */
    int *first;                         /* [2 room + 1] edge, or 0 */
    int *clone_length;                  /* [room] of states beyond `room` */
    struct edge *edges;                 /* [2 room + 1] from 1 on */
    int n_clones, n_edges;
};

struct cursor { int state, length; };

static void lookup_close(struct lookup *l)
{
    free(l->link);
    free(l->after);
    free(l->first);
    free(l->clone_length);
    free(l->edges);
    memset(l, 0, sizeof *l);
}

static void lookup_clear(struct lookup *l)
{
    l->n = l->n_clones = l->n_edges = 0;
    l->link[0] = -1;
    l->first[0] = 0;
}

/* For up to `room` tokens, which the caller keeps. Memory becomes real as it is used. */
static int lookup_open(struct lookup *l, const int *tokens, int room)
{
    size_t n = (size_t)room;
    *l = (struct lookup){ .tokens = tokens, .room = room };
    l->link = calloc(2 * n + 1, sizeof *l->link);
    l->after = calloc(2 * n + 1, sizeof *l->after);
    l->first = calloc(2 * n + 1, sizeof *l->first);
    l->clone_length = calloc(n, sizeof *l->clone_length);
    l->edges = calloc(2 * n + 1, sizeof *l->edges);
    if (!l->link || !l->after || !l->first || !l->clone_length || !l->edges) {
        lookup_close(l);
        return -1;
    }
    lookup_clear(l);
    return 0;
}

static int state_length(const struct lookup *l, int state)
{
    return state <= l->room ? state : l->clone_length[state - l->room - 1];
}

/* The edge of a state for a token, brought to the front of its list; 0 if there is none stored. */
static int find_edge(struct lookup *l, int state, int token)
{
    for (int *at = &l->first[state], edge; (edge = *at); at = &l->edges[edge].next)
        if (l->edges[edge].token == token) {
            *at = l->edges[edge].next;
            l->edges[edge].next = l->first[state];
            return l->first[state] = edge;
        }
    return 0;
}

/* Where a token leads from a state, or 0. */
static int successor(struct lookup *l, int state, int token)
{
    if (state < l->n && l->tokens[state] == token)
        return state + 1;
    return l->edges[find_edge(l, state, token)].to; /* edge 0 leads to 0 */
}

static void add_edge(struct lookup *l, int state, int token, int to)
{
    l->edges[++l->n_edges] = (struct edge){ token, to, l->first[state] };
    l->first[state] = l->n_edges;
}

/* Takes in the token behind the n that are known. */
static void lookup_add(struct lookup *l)
{
    int last = l->n, token = l->tokens[last], state = last + 1, p = l->link[last];
    for (int v = last, i = 0; v > 0 && i < 32; v = l->link[v], i++)
        l->after[v] = last;
    l->n++;
    l->first[state] = 0;
    l->after[state] = state;
    for (; p >= 0 && !successor(l, p, token); p = l->link[p])
        add_edge(l, p, token, state);
    if (p < 0) {
        l->link[state] = 0;
        return;
    }
    int q = successor(l, p, token);
    if (state_length(l, q) == state_length(l, p) + 1) {
        l->link[state] = q;
        return;
    }
    int clone = l->room + ++l->n_clones; /* q's strings up to p's length + 1 have now occurred elsewhere */
    l->clone_length[l->n_clones - 1] = state_length(l, p) + 1;
    l->link[clone] = l->link[q];
    l->after[clone] = l->after[q];
    l->first[clone] = 0;
    if (q < l->n)
        add_edge(l, clone, l->tokens[q], q + 1);
    for (int edge = l->first[q]; edge; edge = l->edges[edge].next)
        add_edge(l, clone, l->edges[edge].token, l->edges[edge].to);
    for (; p >= 0 && successor(l, p, token) == q; p = l->link[p])
        l->edges[find_edge(l, p, token)].to = clone;
    l->link[q] = l->link[state] = clone;
}

/* The longest end of the text itself that occurred before. */
static struct cursor lookup_end(const struct lookup *l)
{
    int state = l->n ? l->link[l->n] : 0;
    return (struct cursor){ state, state_length(l, state) };
}

static void follow(struct lookup *l, struct cursor *c, int token)
{
    int to;
    while (!(to = successor(l, c->state, token)) && c->state) {
        c->state = l->link[c->state];
        c->length = state_length(l, c->state);
    }
    *c = (struct cursor){ to, to ? c->length + 1 : 0 };
}

/* The token that followed last time, or -1. */
static int followed(const struct lookup *l, struct cursor c)
{
    return c.length && l->after[c.state] < l->n ? l->tokens[l->after[c.state]] : -1;
}

/* -- heads: small models that go on from the states of the trunk --

   A head reads a row for every position t of the timeline: the trunk's state there and (if it is
   serial) the token at t + 1. It has a cache of its own. The trunk's latest states are kept, so
   that a head which has rested catches up in one batch; if it rested for too long, it begins anew
   with what is there. Rows of proposals are dropped before the next true ones come.            */

enum { KEPT = 512 };                    /* states */

struct prophets {
    run_session *s[16];                 /* of the heads; their length: rows that are true */
    float *states;                      /* [KEPT, state] of positions modulo KEPT */
    float *chained;                     /* [dim of the head] what the last step hands on */
    int width, from, kept;              /* of a state; positions from .. kept - 1 have theirs there */
    int base;                           /* position of the heads' first row */
    int resting;                        /* they do not promise enough to be kept up to date */
    int answered;                       /* the length of the timeline for which all of them have been asked together, or 0 */
};

static void prophets_close(struct prophets *h, int n)
{
    for (int i = 0; h && i < n; i++)
        run_session_close(h->s[i]);
    if (h) {
        free(h->states);
        free(h->chained);
    }
    free(h);
}

/* Needs the session's pass. */
static struct prophets *prophets_open(run_session *s, run_error *error)
{
    const struct run_model *m = s->model;
    struct prophets *h = calloc(1, sizeof *h);
    if (!h)
        return fail(error, "out of memory"), NULL;
    h->width = m->config.dim * (m->n_taps ? m->n_taps : 1);
    h->states = calloc((size_t)KEPT * (size_t)h->width, sizeof *h->states);
    h->chained = calloc((size_t)m->heads[0].model.config.dim, sizeof *h->chained);
    int bad = !h->states || !h->chained;
    for (int i = 0; i < m->n_heads && !bad; i++)
        bad = !(h->s[i] = session_open(&m->heads[i].model, &(run_options){ s->context, 0, s->cache_f32, 1 }, NULL, s->pass->team, error));
    if (bad) {
        fail(error, "out of memory for draft heads");
        prophets_close(h, m->n_heads);
        return NULL;
    }
    return h;
}

static int catch_up(run_session *s, int i, int end, int wanted);

/* After a pass: the states of its rows [first, first + n), which stand at `position` and behind. */
static void keep_states(run_session *s, int first, int n, int position)
{
    struct prophets *h = s->prophets;
    const struct run_model *m = s->model;
    const struct pass *p = s->pass;
    if (!h)
        return;
    if (position > h->kept || position < h->from)
        h->from = position;             /* what lies between is not known */
    for (int i = 0; i < m->n_heads; i++) /* what is overwritten has to be read before */
        if (m->heads[i].kind != MEDUSA && !h->resting && position + n - h->base - h->s[i]->length > KEPT)
            catch_up(s, i, position - 1, 0);
    for (int i = 0; i < n; i++) {
        float *to = h->states + (size_t)((position + i) % KEPT) * (size_t)h->width;
        const float *x = p->x + (size_t)(first + i) * (size_t)m->config.dim;
        if (m->n_taps)
            memcpy(to, p->tapped + (size_t)(first + i) * (size_t)h->width, (size_t)h->width * sizeof *to);
        else if (m->heads[0].state == STATE_LAST)
            memcpy(to, x, (size_t)h->width * sizeof *to);
        else
            m->kernels->rmsnorm(to, x, m->output_norm, h->width, m->config.eps);
    }
    h->kept = position + n;
    h->from = h->kept - h->from > KEPT ? h->kept - KEPT : h->from;
}

/* Heads forget what they know of positions from `position` on. */
static void prophets_rewind(run_session *s, int position)
{
    struct prophets *h = s->prophets;
    int rows = h ? position - 1 - h->base : 0; /* the row of t needs the token at t + 1 */
    rows = rows > 0 ? rows : 0;
    if (h)
        h->answered = 0;
    for (int i = 0; h && i < s->model->n_heads; i++)
        h->s[i]->length = h->s[i]->length < rows ? h->s[i]->length : rows;
    if (h && rows == 0)
        h->base = position > 0 ? position - 1 : 0;
    if (h && h->kept > position)
        h->kept = position;
    if (h && h->from > h->kept)
        h->from = h->kept;
}

static float *state_at(const struct prophets *h, int t)
{
    return h->states + (size_t)(t % KEPT) * (size_t)h->width;
}

/* One pass of a head over rows. */
static int prophesy(run_session *head, struct row *rows, int n, int chained)
{
    run_error error;
    head->pass->chained = chained;
    head->written = head->length + n > head->written ? head->length + n : head->written;
    return run_pass(head->pass, rows, n, &error);
}

/* Head i reads the positions before `end` that it has not read; if it is `wanted`, the last one gets
   logits (and is read again for them). Returns the rows of the last pass, or -1 if the state before
   `end` is not known or a pass fails. */
static int catch_up(run_session *s, int i, int end, int wanted)
{
    struct prophets *h = s->prophets;
    run_session *head = h->s[i];
    struct row rows[CHUNK];
    int n = 0;
    if (end > h->kept || end <= h->from)
        return -1;
    if (s->model->heads[i].kind == MEDUSA) { /* has no cache */
        rows[0] = (struct row){ head, state_at(h, end - 1), 0, 0, 1 };
        return prophesy(head, rows, 1, 0) ? -1 : 1;
    }
    if (h->base + head->length < h->from) {
        for (int k = 0; k < s->model->n_heads; k++)
            h->s[k]->length = 0;
        h->base = h->from;
    }
    if (wanted && h->base + head->length >= end)
        head->length = end - 1 - h->base;
    while (h->base + head->length < end) {
        int t = h->base + head->length;
        for (n = 0; n < CHUNK && t + n < end; n++)
            rows[n] = (struct row){ head, state_at(h, t + n), s->tokens[t + n + 1], head->length + n, wanted && t + n == end - 1 };
        if (prophesy(head, rows, n, 0))
            return -1;
        head->length += n;
    }
    return n;
}

/* Whether several heads, which do not wait for one another, multiply with the same output matrix. */
static int share_output(const struct run_model *m)
{
    int shared = m->n_heads > 1 && m->heads[0].kind != SERIAL;
    for (int i = 1; i < m->n_heads; i++)
        shared &= m->heads[i].model.output.data == m->heads[0].model.output.data;
    return shared;
}

/* Asks all heads, with one read of the output matrix: the logits of head i are row i of the first
   one's pass. Returns -1 if that fails. */
static int ask_together(run_session *s)
{
    struct prophets *h = s->prophets;
    struct pass *first = h->s[0]->pass;
    int n = s->model->n_heads, failed = 0;
    if (h->answered == s->length)
        return 0;
    for (int i = 0; i < n && !failed; i++) {
        struct pass *p = h->s[i]->pass;
        p->unread = 1;
        failed = catch_up(s, i, s->length, 1) < 0;
        p->unread = 0;
        if (i)
            memcpy(first->last.x + (size_t)i * first->last.stride, p->last.x, (size_t)p->model->config.dim * sizeof(float));
        first->wanted_rows[i] = 0;
    }
    if (failed)
        return -1;
    first->wanted = first->last.n = n;
    team_run(first->team, first->model->weight_bytes < 4 << 20, read_out, first);
    h->answered = first->bad ? 0 : s->length;
    return first->bad ? -1 : 0;
}

/* [vocab] of head i's last answer. */
static const float *logits_of_head(const run_session *s, int i)
{
    int row = share_output(s->model) ? i : 0;
    return s->prophets->s[row ? 0 : i]->pass->logits + (size_t)row * (size_t)s->model->heads[i].model.config.vocab;
}

/* What head i proposes after its last pass, and how sure it is. */
static int proposal_of(const run_session *s, int i, double *p)
{
    const struct head *head = &s->model->heads[i];
    const float *logits = logits_of_head(s, i);
    int best = best_of(logits, head->model.config.vocab);
    *p = 1 / head->model.kernels->exp_sum(logits, head->model.config.vocab, logits[best], 1); /* at least one term is 1 */
    return head->rows ? head->rows[best] : best;
}

/* The state that the last row of a head's last pass hands on. */
static void hand_on(run_session *s, int row)
{
    const struct head *head = &s->model->heads[0];
    const struct pass *p = s->prophets->s[0]->pass;
    size_t dim = (size_t)head->model.config.dim;
    memcpy(s->prophets->chained, head->chain_norm ? p->last.x : p->x + (size_t)row * dim, dim * sizeof(float));
}

/* The proposal for place `at` of the window (0: behind the token at tokens[length]) of the heads
   alone, given the one for the place before. -1: there is none. */
static int ask_heads(run_session *s, int at, int before, double *p)
{
    const struct run_model *m = s->model;
    struct prophets *h = s->prophets;
    if (m->heads[0].kind != SERIAL)
        return at >= m->n_heads || (share_output(m) ? ask_together(s) : catch_up(s, at, s->length, 1)) < 0 ? -1 :
               proposal_of(s, at, p);
    run_session *head = h->s[0];
    if (at == 0) {
        int n = catch_up(s, 0, s->length, 1);
        if (n < 0)
            return -1;
        hand_on(s, n - 1);
    } else {
        if (!m->heads[0].may_chain || head->length + at > head->context)
            return -1;
        struct row row = { head, h->chained, before, head->length + at - 1, 1 };
        head->length += at - 1;
        int failed = prophesy(head, &row, 1, 1);
        head->length -= at - 1;
        if (failed)
            return -1;
        hand_on(s, 0);
    }
    return proposal_of(s, 0, p);
}

/* Tokens that heads would have to read before they could guess. */
static int heads_behind(const run_session *s)
{
    return s->model->heads[0].kind == MEDUSA ? 0 : s->length - s->prophets->base - s->prophets->s[0]->length;
}

/* -- what drafting knows: how probable its proposals are, and what passes cost -- */

enum { N_ROWS = LOGIT_ROWS, MATCH_BINS = 9, SURE_BINS = 10 };

struct odds { double hits, n; };        /* both fade, so that they tell of late */

struct proposal {
    int token;
    enum run_drafter drafter;
    struct odds *odds;
    double p;                           /* of being drawn, if those before it are */
};

struct drafting {
    struct lookup text, corpus;
    struct cursor in_corpus;            /* the longest end of the text that occurs in the corpus */
    int in_corpus_at;                   /* tokens of the timeline that it has followed */
    int *corpus_tokens;
    struct odds lookup_odds[2][MATCH_BINS];

    int (*ask)(run_session *s, int at, int before, double *p); /* heads, a second model, or NULL: a token for place
                                           `at` of the window behind `before`, and how sure it is; -1 without one */
    int (*behind)(const run_session *s); /* tokens that who is asked would have to read first */
    run_session *second;                /* of the second model */
    int agreed;                         /* its tokens that are known to be the timeline's */
    struct odds sure_odds[SURE_BINS];   /* of who is asked, by how sure it was */
    struct odds place_odds[N_ROWS];     /* by place in the window */
    double share;                       /* how large who is asked is, beside the model */
    double ask_time, read_time;         /* of a question, and of a token read before it, in seconds; 0: not known */
    int left;                           /* tokens that may still be drawn */
    unsigned asked;                     /* the step in which a question last promised to pay */

    struct proposal window[N_ROWS];
    int proposed, drafted, judged;      /* of the window; judged: compared with what was drawn */
    int trying;                         /* 0, or proposals to verify although they do not promise to pay */
    double total, tried;                /* seconds in all; of them what trials are thought to have cost */
    double alone, each;                 /* seconds of a pass over one row; what another row adds */
    double bend[N_ROWS + 1];            /* how much longer than that so many rows take */
    int timed[N_ROWS + 1];              /* how often measured */
    unsigned last_timed[N_ROWS + 1], steps;
    double drawn, seconds;              /* tokens and time of late, which give the rate */
    int always;                         /* for bench: every guess is checked */
    uint64_t random;                    /* for tests: not 0 makes all decisions random */
    int (*foreign)(void *context, const run_session *s, int *tokens, int most); /* for tests: proposes */
    void *foreign_context;
};

static void drafting_close(struct drafting *d)
{
    if (!d)
        return;
    lookup_close(&d->text);
    lookup_close(&d->corpus);
    free(d->corpus_tokens);
    run_session_close(d->second);
    free(d);
}

/* -- a second model: it has a timeline of its own, which follows as far as it is asked -- */

static int second_behind(const run_session *s)
{
    return s->length + 1 - s->drafting->agreed;
}

/* What the second model puts at place `at` of the window. Ids that it does not have are beyond it. */
static int ask_second(run_session *s, int at, int before, double *p)
{
    struct drafting *d = s->drafting;
    run_session *second = d->second;
    run_error error;
    if (at == 0) {
        while (d->agreed < second->length && d->agreed < s->length && second->tokens[d->agreed] == s->tokens[d->agreed])
            d->agreed++;
        if (s->length >= second->context || run_rewind(second, d->agreed, &error) ||
            eval(second, s->tokens + d->agreed, s->length + 1 - d->agreed, 1, &error))
            return -1;
        d->agreed = s->length + 1;
    } else if (eval(second, &before, 1, 1, &error)) {
        return -1;
    }
    const float *logits = run_logits(second);
    int best = best_of(logits, second->model->config.vocab);
    *p = 1 / second->model->kernels->exp_sum(logits, second->model->config.vocab, logits[best], 1);
    return best < s->model->config.vocab ? best : -1;
}

/* The second model if there is one, else the model's own heads, else nobody. */
static void ask_whom(struct drafting *d, const run_session *s, run_session *second)
{
    run_session_close(d->second);
    d->second = second;
    d->agreed = 0;
    d->ask = second ? ask_second : s->prophets ? ask_heads : NULL;
    d->behind = second ? second_behind : heads_behind;
    d->ask_time = d->read_time = 0;
    if (d->ask)
        d->share = (double)(second ? second->model : &s->model->heads[0].model)->weight_bytes / (double)s->model->weight_bytes;
}

/* -- the decisions -- */

/* Chances to begin with, of lookup by length of the match. */
static struct drafting *drafting_open(run_session *s, run_error *error)
{
    static const double prior[MATCH_BINS] = { 0.15, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95 };
    struct drafting *d = calloc(1, sizeof *d);
    if (!d || lookup_open(&d->text, s->tokens, s->context)) {
        free(d);
        fail(error, "out of memory for drafting");
        return NULL;
    }
    ask_whom(d, s, NULL);
    for (int i = 0; i < SURE_BINS; i++)
        d->sure_odds[i] = (struct odds){ 0.6 * (i + 0.5), 6 };
    d->place_odds[0] = (struct odds){ 2, 4 };
    for (int i = 0; i < 2 * MATCH_BINS; i++)
        d->lookup_odds[i / MATCH_BINS][i % MATCH_BINS] = (struct odds){ 6 * prior[i % MATCH_BINS], 6 };
    return d;
}

/* A text to guess from: ids [n], which are copied. Returns -1 if there is no memory. */
int run_draft_corpus(run_session *s, const int *ids, int n, run_error *error)
{
    struct drafting *d = s->drafting ? s->drafting : drafting_open(s, error);
    if (!(s->drafting = d))
        return -1;
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->config.vocab)
            return fail(error, "token id %d is outside the vocabulary of %d", ids[i], s->model->config.vocab);
    lookup_close(&d->corpus);
    free(d->corpus_tokens);
    d->in_corpus = (struct cursor){ 0, 0 };
    d->in_corpus_at = 0;
    d->corpus_tokens = n > 0 ? malloc((size_t)n * sizeof *ids) : NULL;
    if (n > 0 && (!d->corpus_tokens || lookup_open(&d->corpus, d->corpus_tokens, n)))
        return fail(error, "out of memory for a text of %d tokens to draft from", n);
    for (int i = 0; i < n; i++) {
        d->corpus_tokens[i] = ids[i];
        lookup_add(&d->corpus);
    }
    return 0;
}

/* The tokens of both mean the same; one may know more of them than the other, as padding or controls. */
static int same_tokens(const run_model *a, const run_model *b)
{
    int n = a->config.vocab < b->config.vocab ? a->config.vocab : b->config.vocab;
    if (!a->tokenizer || !b->tokenizer)
        return !a->tokenizer && !b->tokenizer && a->config.vocab == b->config.vocab;
    for (int id = 0; id < n; id++) {
        size_t length, other;
        const char *piece = run_piece(a, id, &length), *theirs = run_piece(b, id, &other);
        if (length != other || (length && memcmp(piece, theirs, length)))
            return 0;
    }
    return 1;
}

int run_draft_model(run_session *s, const run_model *model, run_error *error)
{
    struct drafting *d = s->drafting ? s->drafting : drafting_open(s, error);
    run_session *second = NULL;
    if (!(s->drafting = d))
        return -1;
    if (model && !same_tokens(s->model, model))
        return fail(error, "this model cannot draft for the other: its tokens are others");
    int context = model && model->config.context < s->context ? model->config.context : s->context;
    if (model && !(second = session_open(model, &(run_options){ context, 0, s->cache_f32, 1 }, NULL, s->pass->team, error)))
        return -1;
    ask_whom(d, s, second);
    return 0;
}

static int match_bin(int length)
{
    return length < 5 ? length - 1 : length < 7 ? 4 : length < 11 ? 5 : length < 17 ? 6 : length < 33 ? 7 : 8;
}

static void judge(struct odds *o, int hit)
{
    o->hits = 0.98 * o->hits + hit;
    o->n = 0.98 * o->n + 1;
}

/* Seconds of a pass over k rows: on a straight line, as far as it is not known better. */
static double pass_time(const struct drafting *d, int k)
{
    double line = d->alone + d->each * (k - 1);
    return k == 1 ? line : line * (d->timed[k] * d->bend[k] + 4) / (d->timed[k] + 4);
}

/* Learns from a pass, the more the less is known of such. That this one was slower or faster than
   expected tells of the others too: contexts grow, machines get busy. */
static void note_time(struct drafting *d, int k, double time)
{
    int n = d->timed[k], rare = k > 1 || n < 3 || d->steps - d->last_timed[1] > 32; /* no such pass of late */
    double expected = n > 1 || d->timed[1] > 2 ? pass_time(d, k) : time; /* the first time is slow */
    double ratio = time / expected;
    ratio = ratio > 1.25 ? 1.25 : ratio < 0.8 ? 0.8 : ratio; /* a single pass proves little: it may have been held up */
    time = ratio * expected;
    for (int i = 2; i <= N_ROWS && k > 1; i++) /* any of several rows tells of them all */
        rare = rare && (!d->timed[i] || d->steps - d->last_timed[i] > 32);
    if (k == 1) {
        d->alone = expected + (time - expected) / (rare ? 2 : 8);
        d->each = n < 2 ? 0.3 * d->alone : d->each; /* a guess */
    } else {
        double weight = rare ? 0.5 : 0.125, each = (time - d->alone) / (k - 1);
        d->each += ((each > 0 ? each : 0) - d->each) * weight;
        d->bend[k] += (time / (d->alone + d->each * (k - 1)) - d->bend[k]) / (n < 7 ? n + 1 : 8);
        d->alone *= 1 + (ratio - 1) * 0.05;
        if (d->alone > time)
            d->alone += (time - d->alone) / 4;  /* fewer rows never take longer */
    }
    d->timed[k] += d->timed[k] < 1000;
    d->last_timed[k] = d->steps;
}

/* Of the answer for place `at`, if those before it are right: like that for the place before, until more is known. */
static double place_chance(const struct drafting *d, int at)
{
    double chance = d->place_odds[0].hits / d->place_odds[0].n;
    for (int i = 1; i <= at; i++)
        chance = (d->place_odds[i].hits + 6 * chance) / (d->place_odds[i].n + 6);
    return chance;
}

/* Tokens a second: of late, or with passes of one token each. */
static double rate_of(const struct drafting *d)
{
    double rate = d->seconds > 0 ? d->drawn / d->seconds : 0, alone = d->alone > 0 ? 1 / d->alone : 0;
    return rate > alone ? rate : alone;
}

/* Costs and chances change, so what does not pay is tried now and then: as long as all trials
   together cost a little of the time. */
static int may_try(struct drafting *d, double cost)
{
    cost = cost > 0.01 * d->alone ? cost : 0.01 * d->alone;
    if (d->tried + cost > 0.005 * d->total)
        return 0;
    d->tried += cost;
    return 1;
}

/* How many of the proposals to verify: those that give the most tokens for their time, time being
   worth what it brought of late. */
static int choose_width(struct drafting *d, int n)
{
    if (d->random) {
        d->random = d->random * 6364136223846793005u + 1442695040888963407u;
        return (int)((d->random >> 33) % (uint64_t)(n + 1));
    }
    if (d->always)
        return n;
    if (d->timed[1] < 2)
        return 0;
    double rate = rate_of(d);
    int best = 0, widest = N_ROWS;
    while (widest > 1 && !d->timed[widest])
        widest--;
    n = n < 2 * widest ? n : 2 * widest; /* what wider passes cost is not known */
    double value = 1.03 - rate * d->alone, reached = 1, tokens = 1; /* what is measured is not exact */
    for (int k = 1; k <= n; k++) {
        reached *= d->window[k - 1].p;
        tokens += reached;
        if (tokens - rate * pass_time(d, k + 1) > value) {
            value = tokens - rate * pass_time(d, k + 1);
            best = k;
        }
    }
    if (best && d->steps - d->last_timed[1] > 128)
        return 0;                       /* what it would cost without has to be known */
    if (best == 0 && d->trying == 0 && n > 0 && may_try(d, pass_time(d, 2) - d->alone - d->window[0].p / rate))
        return 1;
    return best < d->trying && d->trying <= n ? d->trying : best;
}

/* Whether a question promises more than it costs. */
static int worth_asking(run_session *s, int at, double reached, double rate)
{
    struct drafting *d = s->drafting;
    double read = at ? 0 : d->behind(s) * (d->read_time > 0 ? d->read_time : d->share * d->each);
    double cost = d->each + (d->ask_time > 0 ? d->ask_time : d->share * d->alone), gain = reached * place_chance(d, at) / rate;
    if (d->random || d->always || gain > cost + read / (d->left < 256 ? d->left + 1 : 256)) {
        d->asked = d->steps;
        return 1;
    }
    if (!may_try(d, cost + read - gain))
        return 0;
    d->trying = at + 1;
    return 1;
}

/* Other tokens may come at `position`. */
static void forget_behind(run_session *s, int position)
{
    if (s->drafting && s->drafting->text.n > position)
        lookup_clear(&s->drafting->text);
    if (s->drafting && s->drafting->agreed > position)
        s->drafting->agreed = position;
    if (s->drafting && s->drafting->in_corpus_at > position) {
        s->drafting->in_corpus_at = position > 64 ? position - 64 : 0; /* enough to find the place again */
        s->drafting->in_corpus = (struct cursor){ 0, 0 };
    }
    prophets_rewind(s, position);
}

/* Proposals for what follows the timeline and the token behind it, tokens[length]. */
static int propose(run_session *s, const run_generation *how, int most)
{
    struct drafting *d = s->drafting;
    int n = s->length + 1;
    d->steps++;
    d->proposed = d->drafted = d->judged = d->trying = 0;
    if (d->foreign) {
        int tokens[N_ROWS];
        d->proposed = d->foreign(d->foreign_context, s, tokens, most);
        for (int i = 0; i < d->proposed; i++)
            d->window[i] = (struct proposal){ tokens[i], RUN_LOOKUP, &d->lookup_odds[0][0], 1 };
        return d->drafted = d->random ? choose_width(d, d->proposed) : d->proposed;
    }
    if (d->text.n > n)
        lookup_clear(&d->text);
    while (d->text.n < n)
        lookup_add(&d->text);
    while (d->corpus.room && d->in_corpus_at < n)
        follow(&d->corpus, &d->in_corpus, s->tokens[d->in_corpus_at++]);
    struct cursor here = lookup_end(&d->text), there = d->in_corpus;
    int asking = d->ask && how->draft != RUN_DRAFT_LOOKUP && (d->random || d->always || d->timed[1] >= 2); /* who has seen all proposals so far */
    double rate = rate_of(d);
    int behind = asking ? d->behind(s) : 0;
    for (double reached = 1; d->proposed < most && reached > 0.02; d->proposed++) {
        struct proposal *p = &d->window[d->proposed];
        int at = d->proposed, from_corpus = d->corpus.room && there.length > here.length;
        *p = (struct proposal){ .token = -1 };
        if (how->draft != RUN_DRAFT_HEADS)
            p->token = from_corpus ? followed(&d->corpus, there) : followed(&d->text, here);
        if (p->token >= 0) {
            p->drafter = RUN_LOOKUP;
            p->odds = &d->lookup_odds[from_corpus][match_bin(from_corpus ? there.length : here.length)];
            p->p = p->odds->hits / p->odds->n;
        }
        if (asking && p->p >= place_chance(d, at))
            asking = 0;
        if (asking && (asking = worth_asking(s, at, reached, rate))) {
            double start = seconds(), sure = 0;
            int token = d->ask(s, at, at ? d->window[at - 1].token : 0, &sure);
            double time = seconds() - start;
            if (behind <= 8)
                d->ask_time += (time - d->ask_time) / (d->ask_time > 0 ? 8 : 1);
            else if (at == 0)
                d->read_time = time / behind;
            asking = token >= 0;
            int bin = (int)(sure * SURE_BINS);
            struct odds *o = &d->sure_odds[bin < SURE_BINS ? bin : SURE_BINS - 1];
            if (asking && (p->token < 0 || o->hits / o->n > p->p))
                *p = (struct proposal){ token, d->second ? RUN_MODEL : RUN_HEADS, o, o->hits / o->n };
        }
        if (p->token < 0)
            break;
        reached *= p->p;
        follow(&d->text, &here, p->token);
        if (d->corpus.room)
            follow(&d->corpus, &there, p->token);
    }
    if (s->prophets)
        s->prophets->resting = d->second || d->steps - d->asked > KEPT / 2;
    return d->drafted = choose_width(d, d->proposed);
}

/* Compares the next proposal with the token that was drawn: what was proposed but not verified
   teaches as well. */
static void judge_next(struct drafting *d, int id, run_result *r)
{
    if (d->judged >= d->proposed)
        return;
    struct proposal *p = &d->window[d->judged];
    int hit = p->token == id;
    judge(p->odds, hit);
    if (p->drafter != RUN_LOOKUP)
        judge(&d->place_odds[d->judged], hit);
    if (hit && d->judged < d->drafted) {
        r->accepted++;
        r->accepted_by[p->drafter]++;
        r->accepted_at[d->judged]++;
    }
    d->judged = hit ? d->judged + 1 : d->proposed;
}

/* -- generating -- */

/* Text on its way out. What could be the beginning of a stop string is held back. */
struct outlet {
    const run_generation *how;
    tokenizer_stream stream;
    char *held;
    size_t n, room;
};

/* Takes text in; sets *ready to how much of `held` may go out. Returns 1 at a stop string. */
static int find_stop(struct outlet *o, size_t *ready)
{
    size_t hold = 0;
    for (size_t at = 0; at < o->n; at++)
        for (int i = 0; i < o->how->n_stops; i++) {
            size_t length = strlen(o->how->stops[i]), left = o->n - at;
            if (!length || memcmp(o->held + at, o->how->stops[i], length < left ? length : left))
                continue;
            if (left >= length) {
                *ready = at;
                return 1;
            }
            hold = left > hold ? left : hold;
        }
    *ready = o->n - hold;
    return 0;
}

/* Decodes a token and hands on what is whole: 1 to stop, 2 if the callback said so. */
static int emit(struct outlet *o, const run_model *m, int id)
{
    size_t ready = 0;
    if (m->tokenizer)
        o->n += tokenizer_stream_put(m->tokenizer, &o->stream, id, o->held + o->n);
    int stop = find_stop(o, &ready);
    if (o->how->callback && o->how->callback(o->how->context, id, o->held, ready))
        stop = 2;
    memmove(o->held, o->held + ready, o->n - ready);
    o->n -= ready;
    return stop;
}

static int outlet_open(struct outlet *o, const run_session *s, const run_generation *how, run_error *error)
{
    size_t longest = 0;
    *o = (struct outlet){ .how = how };
    for (int i = 0; i < how->n_stops; i++)
        longest = strlen(how->stops[i]) > longest ? strlen(how->stops[i]) : longest;
    o->room = longest + 2 * (s->model->tokenizer ? tokenizer_stream_room(s->model->tokenizer) : 1);
    if (!(o->held = malloc(o->room)))
        return fail(error, "out of memory");
    o->stream.controls = how->show_special;
    o->stream.started = s->length > (s->length && s->tokens[0] == s->model->config.bos);
    return 0;
}

struct generator {                      /* one text being generated */
    run_session *s;
    const run_generation *how;
    struct outlet outlet;
    run_result r;
    int id;                             /* drawn, but not in the timeline yet */
    int drawn, width;                   /* since the last pass; proposals in it */
    double time, began;                 /* of the last pass; for who measures */
    int alone;                          /* in the last pass */
    int stop, done, failed;
};

static int generator_open(struct generator *g, run_session *s, const run_generation *how, run_error *error)
{
    *g = (struct generator){ .s = s, .how = how, .r = { .stop = RUN_LENGTH } };
    if (!s->wanted)
        return fail(error, "there are no logits: evaluate a token first");
    if (how->draft != RUN_DRAFT_OFF && !s->drafting && !(s->drafting = drafting_open(s, error)))
        return -1;
    if (s->drafting)
        s->drafting->proposed = s->drafting->drafted = 0;
    return outlet_open(&g->outlet, s, how, error);
}

/* Draws from the rows of logits that are there: until a pass is needed, or the text ends. */
static int draw_on(struct generator *g, run_error *error)
{
    run_session *s = g->s;
    const run_generation *how = g->how;
    const struct config *c = &s->model->config;
    for (g->drawn = 0;;) {
        g->done = 1;
        if (how->max_tokens && g->r.tokens == how->max_tokens)
            return 0;
        if (s->length == s->context)
            return g->r.stop = RUN_CONTEXT, 0;
        g->id = sample(s, run_logits(s), &how->sampling, error);
        if (g->id < 0)
            return g->failed = -1;
        for (int i = 0; i < c->n_eos; i++)
            if (g->id == c->eos[i])
                return g->r.stop = RUN_EOS, 0;
        g->r.tokens++;
        g->drawn++;
        if ((g->stop = emit(&g->outlet, s->model, g->id)) != 0)
            return g->r.stop = g->stop == 2 ? RUN_CANCELLED : RUN_STOPPED, 0;
        if (how->max_tokens && g->r.tokens == how->max_tokens)
            return 0;
        g->done = 0;
        if (s->drafting && how->draft != RUN_DRAFT_OFF)
            judge_next(s->drafting, g->id, &g->r);
        if (!s->ahead || s->tokens[s->length] != g->id)
            return s->ahead = 0;
        s->length++;                    /* a proposal stands: its row is in the cache, and the next one has logits */
        s->ahead--;
        s->row++;
    }
}

/* The row of the token just drawn, and of proposals behind it. */
static int window(struct generator *g, int width, struct row *rows)
{
    run_session *s = g->s;
    for (int i = 0; i <= width; i++) {
        if (i)
            s->tokens[s->length + i] = s->drafting->window[i - 1].token;
        rows[i] = (struct row){ s, NULL, s->tokens[s->length + i], s->length + i, 1 };
    }
    s->written = s->length + width + 1 > s->written ? s->length + width + 1 : s->written;
    return width + 1;
}

/* Counts what the last pass brought, and what passes of one token each would have taken for that. */
static void settle(struct generator *g)
{
    struct drafting *d = g->s->drafting;
    if (!g->r.passes)
        return;
    g->r.alone_seconds += g->width ? g->drawn * d->alone : g->time;
    if (d && g->alone) {
        double expected = pass_time(d, g->width + 1);
        d->drawn = 0.97 * d->drawn + g->drawn;
        d->seconds = 0.97 * d->seconds + (g->time < 2 * expected ? g->time : 2 * expected);
    }
}

/* One pass for n texts, each of which has drawn a token. Only a text that is alone is drafted for. */
static int advance(struct generator *const *g, int n, run_error *error)
{
    struct row rows[LOGIT_ROWS];
    run_session *s = g[0]->s;
    struct drafting *d = n == 1 && g[0]->how->draft != RUN_DRAFT_OFF ? s->drafting : NULL;
    double start = seconds(), drafted = start;
    int width = 0, n_rows = 0;
    for (int i = 0; i < n; i++) {
        settle(g[i]);
        g[i]->s->tokens[g[i]->s->length] = g[i]->id;
    }
    if (d) {
        run_result *r = &g[0]->r;
        int most = g[0]->how->draft_max > 0 && g[0]->how->draft_max < LOGIT_ROWS ? g[0]->how->draft_max : LOGIT_ROWS - 1;
        int left = g[0]->how->max_tokens ? g[0]->how->max_tokens - r->tokens - 1 : most, room = s->context - s->length - 1;
        most = left < most ? left : most;
        d->left = g[0]->how->max_tokens && left < room ? left : room;
        width = propose(s, g[0]->how, room < most ? room : most);
        r->drafted += width;
        for (int i = 0; i < width; i++) {
            r->drafted_at[i]++;
            r->drafted_by[d->window[i].drafter]++;
        }
        drafted = seconds();
        r->draft_seconds += drafted - start;
    }
    for (int i = 0; i < n; i++)
        n_rows += window(g[i], width, rows + n_rows);
    s->pass->guesses = width > 0;
    int failed = run_pass(s->pass, rows, n_rows, error);
    s->pass->guesses = 0;
    if (failed && width) {              /* perhaps only a proposal brought this about */
        n_rows = window(g[0], width = 0, rows);
        failed = run_pass(s->pass, rows, n_rows, error);
    }
    double time = seconds() - drafted;
    for (int i = 0, row = 0; i < n; i++, row += width + 1) {
        s = g[i]->s;
        if (failed) {
            run_error second;
            g[i]->failed = -1;
            rewind_to(s, s->length, &second);
            continue;
        }
        keep_states(s, row, width + 1, s->length);
        s->first_row = row;
        s->row = 0;
        s->wanted = width + 1;
        s->length++;
        s->ahead = width;
        g[i]->r.passes++;
        g[i]->r.verify_seconds += time;
        g[i]->width = width;
        g[i]->time = time;
        g[i]->alone = n == 1;
        if (s->drafting && n > 1)
            s->drafting->proposed = s->drafting->drafted = 0;
    }
    if (d && !failed) {
        note_time(d, width + 1, time);
        d->total += time + drafted - start;
    }
    return failed;
}

static void generator_close(struct generator *g)
{
    run_session *s = g->s;
    struct outlet *o = &g->outlet;
    settle(g);
    s->wanted = s->ahead = 0;
    if (!g->failed && !g->stop && g->how->callback) { /* what was held back in vain, and an unfinished character */
        o->n += tokenizer_stream_end(&o->stream, o->held + o->n);
        if (o->n)
            g->how->callback(g->how->context, -1, o->held, o->n);
    }
    free(o->held);
}

int run_generate(run_session *s, const run_generation *how, run_result *result, run_error *error)
{
    struct generator g, *one = &g;
    double start = seconds();
    if (generator_open(&g, s, how, error))
        return -1;
    while (draw_on(&g, error) == 0 && !g.done && advance(&one, 1, error) == 0)
        ;
    generator_close(&g);
    g.r.seconds = seconds() - start;
    if (result)
        *result = g.r;
    return g.failed;
}

/* == PACKING =================================================================================

   From any stored type to any type, strip by strip. Exact where it can be: Q4_0 -> q4,
   Q4_1 -> q4a, Q5_0 -> q6, Q8_0 -> q8, and any grid that another one contains. Everything else
   goes through floats, and the error is counted; with statistics of a text, errors are made to
   cancel in what it multiplies the weights with. All arithmetic is per element or per row in a
   fixed order, so that the file comes out the same everywhere.                               */

#ifndef RUN_LIBRARY

/* Rounds to nearest even and saturates, as to_half() does. */
static uint16_t to_bf16(float x)
{
    uint32_t rounded = bits_of(x) + 0x7fff + (bits_of(x) >> 16 & 1);
    return (uint16_t)(((rounded & 0x7fffffff) >= 0x7f800000 ? rounded - 0x10000 : rounded) >> 16);
}

/* -- decoding GGML's blocks; layouts as in ggml-quants.c of llama.cpp -- */

static float half_at(const unsigned char *b) { return from_half(load_u16(b)); }

static int four_bits(const unsigned char *b, int i) { return i < 16 ? b[i] & 15 : b[i - 16] >> 4; }

static void decode_q4_0(const unsigned char *b, float *y)
{
    for (int i = 0; i < 32; i++)
        y[i] = half_at(b) * (float)(four_bits(b + 2, i) - 8);
}

static void decode_q4_1(const unsigned char *b, float *y)
{
    for (int i = 0; i < 32; i++)
        y[i] = half_at(b) * (float)four_bits(b + 4, i) + half_at(b + 2);
}

/* The fifth bits of 32 weights lie in 4 bytes, bit i for weight i. */
static int five_bits(const unsigned char *high, const unsigned char *low, int i)
{
    return four_bits(low, i) | (high[i / 8] >> i % 8 & 1) << 4;
}

static void decode_q5_0(const unsigned char *b, float *y)
{
    for (int i = 0; i < 32; i++)
        y[i] = half_at(b) * (float)(five_bits(b + 2, b + 6, i) - 16);
}

static void decode_q5_1(const unsigned char *b, float *y)
{
    for (int i = 0; i < 32; i++)
        y[i] = half_at(b) * (float)five_bits(b + 4, b + 8, i) + half_at(b + 2);
}

static void decode_q8_0(const unsigned char *b, float *y)
{
    for (int i = 0; i < 32; i++)
        y[i] = half_at(b) * (float)(int8_t)b[2 + i];
}

static void decode_q2_k(const unsigned char *b, float *y)
{
    for (int i = 0; i < 256; i++) { /* 16 weights share a scale and a minimum of 4 bits each */
        int q = b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3, s = b[i / 16];
        y[i] = half_at(b + 80) * (float)(s & 15) * (float)q - half_at(b + 82) * (float)(s >> 4);
    }
}

static void decode_q3_k(const unsigned char *b, float *y)
{
    const unsigned char *high = b, *low = b + 32, *scales = b + 96;
    for (int i = 0; i < 256; i++) {
        int j = i / 16, q = low[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        int s = (j < 8 ? scales[j] & 15 : scales[j - 8] >> 4) | (scales[8 + j % 4] >> (j / 4 * 2) & 3) << 4;
        q -= high[i % 32] >> (i / 32) & 1 ? 0 : 4;
        y[i] = half_at(b + 108) * (float)(s - 32) * (float)q;
    }
}

/* Eight 6-bit scales and minima in 12 bytes, for Q4_K and Q5_K. */
static void scale_and_minimum(const unsigned char *s, int j, int *scale, int *minimum)
{
    *scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    *minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}

static void decode_q4_k(const unsigned char *b, float *y)
{
    for (int i = 0; i < 256; i++) {
        int byte = b[16 + i / 64 * 32 + i % 32], scale, minimum;
        scale_and_minimum(b + 4, i / 32, &scale, &minimum);
        y[i] = half_at(b) * (float)scale * (float)(i % 64 < 32 ? byte & 15 : byte >> 4) - half_at(b + 2) * (float)minimum;
    }
}

static void decode_q5_k(const unsigned char *b, float *y)
{
    for (int i = 0; i < 256; i++) {
        int byte = b[48 + i / 64 * 32 + i % 32], scale, minimum;
        int q = (i % 64 < 32 ? byte & 15 : byte >> 4) | (b[16 + i % 32] >> (i / 32) & 1) << 4;
        scale_and_minimum(b + 4, i / 32, &scale, &minimum);
        y[i] = half_at(b) * (float)scale * (float)q - half_at(b + 2) * (float)minimum;
    }
}

static void decode_q6_k(const unsigned char *b, float *y)
{
    for (int i = 0; i < 256; i++) {
        int low = b[i / 128 * 64 + i % 64], high = b[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        int q = (i % 128 < 64 ? low & 15 : low >> 4) | high << 4;
        y[i] = half_at(b + 208) * (float)(int8_t)b[192 + i / 16] * (float)(q - 32);
    }
}

static const int8_t iq4_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };

static void decode_iq4_nl(const unsigned char *b, float *y)
{
    for (int i = 0; i < 32; i++)
        y[i] = half_at(b) * (float)iq4_values[four_bits(b + 2, i)];
}

static void decode_iq4_xs(const unsigned char *b, float *y)
{
    for (int i = 0; i < 256; i++) {
        int j = i / 32, byte = b[8 + j * 16 + i % 16];
        int scale = (b[4 + j / 2] >> j % 2 * 4 & 15) | (load_u16(b + 2) >> 2 * j & 3) << 4;
        y[i] = half_at(b) * (float)(scale - 32) * (float)iq4_values[i % 32 < 16 ? byte & 15 : byte >> 4];
    }
}

static const struct raw_type {
    const char *name;
    int weights, bytes;             /* of a block */
    void (*decode)(const unsigned char *block, float *weights);
    enum type packed;               /* what --type auto makes of it */
} raw_types[] = {
    { "Q4_0", 32, 18, decode_q4_0, Q4 },       { "Q4_1", 32, 20, decode_q4_1, Q4A },
    { "Q5_0", 32, 22, decode_q5_0, Q6 },       { "Q5_1", 32, 24, decode_q5_1, Q8 },
    { "Q8_0", 32, 34, decode_q8_0, Q8 },       { "Q2_K", 256, 84, decode_q2_k, Q4A },
    { "Q3_K", 256, 110, decode_q3_k, Q4A },    { "Q4_K", 256, 144, decode_q4_k, Q4A },
    { "Q5_K", 256, 176, decode_q5_k, Q8 },     { "Q6_K", 256, 210, decode_q6_k, Q8 },
    { "IQ4_NL", 32, 18, decode_iq4_nl, Q8 },   { "IQ4_XS", 256, 136, decode_iq4_xs, Q8 },
    { "LLAMA2C_Q8", 0, 0, NULL, Q8 },          /* all int8 weights, then a float scale for each group */
};

struct source {                     /* a stored matrix of any type */
    struct matrix m;
    const struct raw_type *raw;     /* if m.type is RAW */
    int group;                      /* of LLAMA2C_Q8 */
};

static int source_open(struct source *s, const struct container *c, const struct tensor *t, run_error *error)
{
    memset(s, 0, sizeof *s);
    if (matrix_describe(c, t, &s->m, error))
        return -1;
    if (s->m.type != RAW)
        return 0;
    const char *text = find_packing(c, "ggml.", t->name);
    size_t word = strcspn(text, " :"), needed = 0;
    for (size_t i = 0; i < sizeof raw_types / sizeof *raw_types; i++)
        if (word == strlen(raw_types[i].name) && !strncmp(text, raw_types[i].name, word))
            s->raw = &raw_types[i];
    if (!s->raw)
        return fail(error, "tensor %.100s is of type %.20s, which this run.c cannot decode", t->name, text);
    size_t weights = (size_t)s->m.rows * (size_t)s->m.cols;
    if (s->raw->weights && s->m.cols % s->raw->weights == 0)
        needed = weights / (size_t)s->raw->weights * (size_t)s->raw->bytes;
    else if (!s->raw->weights && sscanf(text + word, ":%9d", &s->group) == 1 && s->group > 0 && s->m.cols % s->group == 0)
        needed = weights + weights / (size_t)s->group * 4;
    if (!needed || needed != t->size)
        return fail(error, "tensor %.100s has %zu bytes, which is not what \"%.40s\" needs", t->name, t->size, text);
    return 0;
}

/* Row `row` as floats, [cols]. */
static void decode_row(const struct source *s, int row, float *out)
{
    const struct matrix *m = &s->m;
    size_t cols = (size_t)m->cols, first = (size_t)row * cols;
    if (m->type <= BF16) {
        for (size_t i = 0; i < cols; i++)
            out[i] = float_weight(m, first + i);
    } else if (m->type < RAW) {
        for (int i = 0; i < m->cols; i++) {
            const unsigned char *block = block_of(m, row / STRIP, i / BLOCK);
            float d = scale_of(block, m->type, row % STRIP, i % BLOCK / GROUP, 0);
            float minimum = m->type == Q4A ? scale_of(block, m->type, row % STRIP, i % BLOCK / GROUP, 1) : 0;
            out[i] = fma_((float)quant_of(block, m->type, row % STRIP, i % BLOCK), d, minimum);
        }
    } else if (s->group) {
        const unsigned char *scales = m->data + (size_t)m->rows * cols;
        for (size_t i = 0; i < cols; i++) {
            float scale;
            memcpy(&scale, scales + (first + i) / (size_t)s->group * 4, 4);
            out[i] = (float)(int8_t)m->data[first + i] * scale;
        }
    } else {
        size_t n = (size_t)s->raw->weights;
        for (size_t i = 0; i < cols; i += n)
            s->raw->decode(m->data + (first + i) / n * (size_t)s->raw->bytes, out + i);
    }
}

/* -- fitting a grid to groups of n <= 32 weights, 16 rows side by side: w [n][16] -- */

struct grid {                       /* weight = (q - shift) d + m */
    float d[STRIP], m[STRIP];       /* already rounded to half precision */
    float q[GROUP][STRIP];
};

static const struct { float low, high; } levels[N_TYPES] = { [Q4] = { -8, 7 }, [Q4A] = { 0, 15 }, [Q6] = { -32, 31 },
                                                               [Q8] = { -127, 127 } };

INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* Takes over the rows of `try` that come closer to w than the best so far. */
static void keep_better(float w[GROUP][STRIP], int n, const struct grid *try, struct grid *best, float error[STRIP])
{
    float e[STRIP] = { 0 };
    for (int i = 0; i < n; i++)
        for (int r = 0; r < STRIP; r++) {
            float difference = w[i][r] - (try->q[i][r] * try->d[r] + try->m[r]);
            e[r] += difference * difference;
        }
    for (int r = 0; r < STRIP; r++) {
        if (!(e[r] < error[r]))
            continue;
        error[r] = e[r];
        best->d[r] = try->d[r];
        best->m[r] = try->m[r];
        for (int i = 0; i < GROUP; i++)
            best->q[i][r] = try->q[i][r];
    }
}

/* Many grids, each refitted by least squares; the best is kept. q4, q6: the extreme weight is put near
   either end. q4a: from 0 to 12 % are cut off each end. */
static void fit(float w[GROUP][STRIP], int n, enum type type, struct grid *best)
{
    const int minimum = type == Q4A;
    const float lowest = levels[type].low, highest = levels[type].high, step = type == Q4 ? 0.04f : 0.02f;
    float error[STRIP], low[STRIP], high[STRIP];
    struct grid try = { 0 };
    for (int r = 0; r < STRIP; r++) {
        error[r] = INFINITY;
        low[r] = high[r] = w[0][r];
        for (int i = 1; i < n; i++) {
            low[r] = w[i][r] < low[r] ? w[i][r] : low[r];
            high[r] = w[i][r] > high[r] ? w[i][r] : high[r];
        }
    }
    for (int k = 0; k < 16; k++) {
        float zero[STRIP], inverse[STRIP];
        for (int r = 0; r < STRIP; r++) {
            float range = high[r] - low[r], cut = 0.04f * (float)(k / 4), left = 1 - cut - 0.04f * (float)(k % 4);
            float extreme = low[r] + high[r] < 0 ? low[r] : high[r];
            float place = (1 + step * (float)(3 - k / 2)) * (k % 2 ? -lowest : lowest);
            zero[r] = minimum ? low[r] + cut * range : 0;
            inverse[r] = minimum ? range > 0 ? highest / (left * range) : 0 : extreme * extreme > 0 ? place / extreme : 0;
        }
        for (int refits = 0; refits <= minimum; refits++) {
            float sw[STRIP] = { 0 }, sq[STRIP] = { 0 }, swq[STRIP] = { 0 }, sqq[STRIP] = { 0 };
            for (int i = 0; i < n; i++)
                for (int r = 0; r < STRIP; r++) {
                    float q = clamp(round_even(clamp((w[i][r] - zero[r]) * inverse[r], lowest - 1, highest + 1)), lowest, highest);
                    try.q[i][r] = q;
                    sw[r] += w[i][r];
                    sq[r] += q;
                    swq[r] += w[i][r] * q;
                    sqq[r] += q * q;
                }
            for (int r = 0; r < STRIP; r++) {
                float down = minimum ? (float)n * sqq[r] - sq[r] * sq[r] : sqq[r];
                float up = minimum ? (float)n * swq[r] - sq[r] * sw[r] : swq[r];
                try.d[r] = from_half(to_half(down > 0 ? up / down : 0));
                zero[r] = try.m[r] = minimum ? from_half(to_half((sw[r] - try.d[r] * sq[r]) / (float)n)) : 0;
                inverse[r] = try.d[r] * try.d[r] > 0 ? 1 / try.d[r] : 0;
            }
            keep_better(w, n, &try, best, error);
        }
    }
}

/* q8: the smallest scale with which nothing is cut off. */
static void fit_q8(float w[GROUP][STRIP], int n, struct grid *best)
{
    for (int r = 0; r < STRIP; r++) {
        float largest = 0;
        for (int i = 0; i < n; i++) {
            float magnitude = from_bits(bits_of(w[i][r]) & 0x7fffffff);
            largest = magnitude > largest ? magnitude : largest;
        }
        uint16_t d = to_half(largest / 127.0f);
        if (from_half(d) * 127.5f < largest && d < 0x7bff)
            d++;
        best->d[r] = from_half(d);
        best->m[r] = 0;
        for (int i = 0; i < n; i++)
            best->q[i][r] = best->d[r] > 0 ? clamp(round_even(clamp(w[i][r] / best->d[r], -128, 128)), -127, 127) : 0;
    }
}

/* If the stored group lies on a grid that `type` contains, that grid: no error is added. */
static int exact_grid(const struct source *s, enum type type, int row, int group, int lane, struct grid *g)
{
    const struct matrix *m = &s->m;
    int minimum, low = 0, high = 0;
    if (m->type == RAW) {
        void (*decode)(const unsigned char *, float *) = s->raw->decode;
        if (decode != decode_q4_0 && decode != decode_q4_1 && decode != decode_q5_0 && decode != decode_q8_0)
            return 0;
        const unsigned char *b = m->data + ((size_t)row * (size_t)m->cols / GROUP + (size_t)group) * (size_t)s->raw->bytes;
        minimum = decode == decode_q4_1;
        g->d[lane] = half_at(b);
        g->m[lane] = minimum ? half_at(b + 2) : 0;
        for (int i = 0; i < GROUP; i++)
            g->q[i][lane] = (float)(decode == decode_q8_0 ? (int8_t)b[2 + i] : decode == decode_q5_0 ? five_bits(b + 2, b + 6, i) - 16
                                    : minimum ? four_bits(b + 4, i) : four_bits(b + 2, i) - 8);
    } else if (m->type >= Q4) {
        const unsigned char *b = block_of(m, row / STRIP, group / 2);
        minimum = m->type == Q4A;
        g->d[lane] = scale_of(b, m->type, row % STRIP, group % 2, 0);
        g->m[lane] = minimum ? scale_of(b, m->type, row % STRIP, group % 2, 1) : 0;
        for (int i = 0; i < GROUP; i++)
            g->q[i][lane] = (float)quant_of(b, m->type, row % STRIP, group % 2 * GROUP + i);
    } else {
        return 0;
    }
    for (int i = 0; i < GROUP; i++) {
        low = (int)g->q[i][lane] < low ? (int)g->q[i][lane] : low;
        high = (int)g->q[i][lane] > high ? (int)g->q[i][lane] : high;
    }
    if (minimum || type == Q8)
        return minimum == (type == Q4A);
    if (type == Q4A && low >= -8 && high <= 7) { /* the shift becomes the minimum */
        g->m[lane] = -8 * g->d[lane];
        for (int i = 0; i < GROUP; i++)
            g->q[i][lane] += 8;
        return from_half(to_half(g->m[lane])) == g->m[lane];
    }
    return type != Q4A && low >= levels[type].low && high <= levels[type].high;
}

/* Places q, d and m of a group of a strip into its block, which was zero. */
static void place_group(unsigned char *block, enum type type, int group, const struct grid *g)
{
    unsigned char *scales = block + quant_bytes(type) + group * 32;
    for (int r = 0; r < STRIP; r++) {
        uint16_t d = to_half(g->d[r]), m = to_half(g->m[r]);
        for (int i = 0; i < GROUP; i++) {
            int q = (int)g->q[i][r] + (type == Q4 ? 8 : type == Q6 ? 32 : 0), column = group * GROUP + i;
            if (type == Q8)
                block[column / 4 * 64 + 4 * r + column % 4] = (unsigned char)q;
            else
                block[column / 8 * 64 + 4 * r + i % 4] |= (unsigned char)((q & 15) << (i % 8 < 4 ? 0 : 4));
            if (type == Q6)
                block[Q4_QUANTS + column / 16 * 64 + 4 * r + i % 4] |= (unsigned char)(q >> 4 << column / 4 % 4 * 2);
        }
        memcpy(scales + 2 * r, &d, 2);
        if (type == Q4A)
            memcpy(scales + SCALES + 2 * r, &m, 2);
    }
}

/* -- error feedback --

   What an error of a weight costs depends on what it is multiplied with. Over the rows x of a text a row
   of errors e = w - v costs the sum of (e . x)^2 = e H e^T, with H the sum of x^T x: errors of columns
   that go together can cancel. So a group is packed for the least cost as all other columns are: first
   from left to right, where those to come have no error yet, then again, with what they have become.
   One lane is one row of the matrix; g = H e^T, half the slope of the cost, is kept up to date. Sums are
   floats in a fixed order, so that the file is the same from every machine. */

enum { SWEEPS = 4 };

static int takes_feedback(enum type type) { return type == Q4 || type == Q4A || type == Q6; }

/* The columns of a group one after another: each takes the level that is best as the others are.
   v, g: their values and slopes; h: their part of H. */
static void choose_levels(const struct kernels *kernels, enum type type, int n, float (*h)[GROUP], struct grid *grid,
                          float (*v)[STRIP], float (*g)[STRIP])
{
    float inverse[STRIP], step[1][STRIP];
    for (int r = 0; r < STRIP; r++)
        inverse[r] = grid->d[r] * grid->d[r] > 0 ? 1 / grid->d[r] : 0;
    for (int j = 0; j < n; j++) {
        float freedom = 1 / h[j][j], low = levels[type].low, high = levels[type].high;
        for (int r = 0; r < STRIP; r++) {
            float q = (v[j][r] + g[j][r] * freedom - grid->m[r]) * inverse[r];
            grid->q[j][r] = clamp(round_even(clamp(q, low - 1, high + 1)), low, high);
            step[0][r] = grid->q[j][r] * grid->d[r] + grid->m[r] - v[j][r];
            v[j][r] += step[0][r];
        }
        kernels->feed_back(g, &h[0][j], GROUP, n, step, 1);
    }
}

/* The best scale (and minimum) for the levels as they are. */
static void refit(const struct kernels *kernels, enum type type, int n, float (*h)[GROUP], struct grid *grid,
                  float (*v)[STRIP], float (*g)[STRIP])
{
    float hq[GROUP][STRIP] = { 0 }, sum = 0;                        /* -H q; 1 H 1 */
    float qhq[STRIP] = { 0 }, hq1[STRIP] = { 0 }, gq[STRIP] = { 0 }, g1[STRIP] = { 0 };
    kernels->feed_back(hq, h[0], GROUP, n, grid->q, n);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++)
            sum += h[i][j];
        for (int r = 0; r < STRIP; r++) {
            qhq[r] -= hq[i][r] * grid->q[i][r];
            hq1[r] -= hq[i][r];
            gq[r] += g[i][r] * grid->q[i][r];
            g1[r] += g[i][r];
        }
    }
    for (int r = 0; r < STRIP; r++) {
        float d = grid->d[r], up = gq[r], down = qhq[r], least = 0;
        if (type == Q4A) {
            least = 1e-5f * down * sum;     /* all levels alike: any scale would do */
            up = up * sum - hq1[r] * g1[r];
            down = down * sum - hq1[r] * hq1[r];
        }
        grid->d[r] = from_half(to_half(down > least ? d + up / down : d));
        if (type == Q4A)
            grid->m[r] = from_half(to_half(grid->m[r] + (g1[r] - hq1[r] * (grid->d[r] - d)) / sum));
        for (int i = 0; i < n; i++)
            v[i][r] = grid->q[i][r] * grid->d[r] + grid->m[r];
    }
}

/* Improves the grids of a strip. v [cols][16]: its weights, and afterwards what they became; g [cols][16]: zeros. */
static void feed_back(const struct kernels *kernels, enum type type, const float *hessian, int cols, struct grid *grids,
                      float (*v)[STRIP], float (*g)[STRIP])
{
    for (int sweep = 0; sweep < SWEEPS; sweep++)
        for (int first = 0; first < cols; first += GROUP) {
            int n = cols - first < GROUP ? cols - first : GROUP;
            float h[GROUP][GROUP], slope[GROUP][STRIP], change[GROUP][STRIP];
            for (int i = 0; i < n; i++)
                memcpy(h[i], hessian + (size_t)(first + i) * (size_t)cols + first, (size_t)n * sizeof(float));
            memcpy(slope, g + first, (size_t)n * sizeof *slope);
            memcpy(change, v + first, (size_t)n * sizeof *change);
            choose_levels(kernels, type, n, h, &grids[first / GROUP], v + first, slope);
            refit(kernels, type, n, h, &grids[first / GROUP], v + first, slope);
            for (int i = 0; i < n; i++)
                for (int r = 0; r < STRIP; r++)
                    change[i][r] = v[first + i][r] - change[i][r];
            kernels->feed_back(g, hessian + first, (size_t)cols, cols, change, n);
        }
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

struct packing {                    /* a matrix on its way from one type to another */
    struct source source;
    enum type type;
    const struct kernels *kernels;
    const float *hessian;           /* [cols, cols] of its input, or NULL */
    unsigned char *out;             /* strips [first, end) */
    int first, end;
    struct team *team;
    float *rows;                    /* [threads][3][STRIP][padded cols] */
    struct grid *grids;             /* [threads][groups] */
    double *error, *square;         /* [strips] sums of (w - packed w)^2 and of w^2 */
    atomic_int bad;                 /* 1 + a row with a weight that is not finite */
};

static void pack_strip(struct packing *p, int strip, float *rows, struct grid *grids, unsigned char *out)
{
    const struct matrix *m = &p->source.m;
    size_t width = blocks(m->cols) * BLOCK;
    float (*w)[STRIP] = (float (*)[STRIP])(rows + STRIP * width), (*g)[STRIP] = w + width; /* [width] */
    int lost = 0;                   /* groups that were fitted */
    memset(rows, 0, 3 * STRIP * width * sizeof *rows);
    memset(out, 0, matrix_bytes(p->type, STRIP, m->cols));
    for (int r = 0; r < STRIP && strip * STRIP + r < m->rows; r++) {
        decode_row(&p->source, strip * STRIP + r, rows + (size_t)r * width);
        for (int i = 0; i < m->cols; i++) {
            w[i][r] = rows[(size_t)r * width + (size_t)i];
            if (!(w[i][r] * 0 == 0))
                p->bad = strip * STRIP + r + 1;
        }
    }
    for (int group = 0; group < 2 * (int)blocks(m->cols); group++) {
        int exact = group * GROUP + (m->type < Q4 || m->type == RAW ? GROUP : 1) <= m->cols; /* packed ones are padded */
        memset(&grids[group], 0, sizeof *grids);
        for (int r = 0; r < STRIP && exact; r++)
            if (strip * STRIP + r < m->rows)
                exact = exact_grid(&p->source, p->type, strip * STRIP + r, group, r, &grids[group]);
        int left = m->cols - group * GROUP, n = left < GROUP ? left : GROUP;
        if (exact || n <= 0)
            continue;
        lost++;
        memset(&grids[group], 0, sizeof *grids);
        p->type == Q8 ? fit_q8(w + group * GROUP, n, &grids[group]) : fit(w + group * GROUP, n, p->type, &grids[group]);
    }
    if (p->hessian && lost && !p->bad)
        feed_back(p->kernels, p->type, p->hessian, m->cols, grids, w, g);
    for (int group = 0; group < 2 * (int)blocks(m->cols); group++) {
        const struct grid *q = &grids[group];
        place_group(out + (size_t)(group / 2) * matrix_bytes(p->type, STRIP, BLOCK), p->type, group % 2, q);
        for (int r = 0; r < STRIP && strip * STRIP + r < m->rows; r++)
            for (int i = 0; i < GROUP && group * GROUP + i < m->cols; i++) {
                double x = (double)rows[(size_t)r * width + (size_t)(group * GROUP + i)];
                double e = x - (double)fma_(q->q[i][r], q->d[r], q->m[r]);
                p->error[strip] += e * e;
                p->square[strip] += x * x;
            }
    }
}

/* Rows of a strip to a float type. */
static void convert_strip(struct packing *p, int strip, float *rows, struct grid *grids, unsigned char *out)
{
    const struct matrix *m = &p->source.m;
    for (int r = 0; r < STRIP && strip * STRIP + r < m->rows; r++) {
        (void)grids;
        decode_row(&p->source, strip * STRIP + r, rows);
        for (int i = 0; i < m->cols; i++) {
            float x = rows[i], back = x;
            size_t at = (size_t)r * (size_t)m->cols + (size_t)i;
            if (!(x * 0 == 0))
                p->bad = strip * STRIP + r + 1;
            if (p->type == F32) {
                memcpy(out + 4 * at, &x, 4);
            } else {
                uint16_t half = p->type == F16 ? to_half(x) : to_bf16(x);
                memcpy(out + 2 * at, &half, 2);
                back = p->type == F16 ? from_half(half) : from_bf16(half);
            }
            p->error[strip] += ((double)x - (double)back) * ((double)x - (double)back);
            p->square[strip] += (double)x * (double)x;
        }
    }
}

static void pack(void *context, int me)
{
    struct packing *p = context;
    int begin, end;
    size_t width = blocks(p->source.m.cols) * BLOCK;
    while (!interrupted && next_piece(p->team, me, p->end - p->first, 1, &begin, &end))
        (p->type >= Q4 ? pack_strip : convert_strip)(
            p, p->first + begin, p->rows + (size_t)me * 3 * STRIP * width, p->grids + (size_t)me * (width / GROUP),
            p->out + matrix_bytes(p->type, STRIP, p->source.m.cols) * (size_t)begin);
    barrier(p->team);
}

/* -- writing a model file -- */

struct text {                       /* a string that grows; `broken` once memory ran out */
    char *data;
    size_t n, room;
    int broken;
};

static void text_add(struct text *t, const char *data, size_t n)
{
    if (t->n + n + 1 > t->room) {
        size_t room = 2 * (t->n + n + 1);
        char *larger = t->broken ? NULL : realloc(t->data, room);
        if (!larger) {
            t->broken = 1;
            return;
        }
        t->data = larger;
        t->room = room;
    }
    memcpy(t->data + t->n, data, n);
    t->n += n;
    t->data[t->n] = '\0';
}

__attribute__((format(printf, 2, 3)))
static void text_print(struct text *t, const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (n < 0 || n >= (int)sizeof line)
        t->broken = 1;
    else
        text_add(t, line, (size_t)n);
}

/* How many bytes the UTF-8 character at s has, or 0 if there is none. */
static int utf8_length(const unsigned char *s, size_t left)
{
    int n = *s < 0x80 ? 1 : *s >= 0xc2 && *s < 0xe0 ? 2 : *s >= 0xe0 && *s < 0xf0 ? 3 : *s >= 0xf0 && *s < 0xf5 ? 4 : 0;
    if ((size_t)n > left || (*s == 0xe0 && s[1] < 0xa0) || (*s == 0xed && s[1] > 0x9f) ||
        (*s == 0xf0 && s[1] < 0x90) || (*s == 0xf4 && s[1] > 0x8f))
        return 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

/* A JSON string. What is not UTF-8 becomes U+FFFD. */
static void text_json(struct text *t, const char *data, size_t length)
{
    text_add(t, "\"", 1);
    for (size_t i = 0; i < length;) {
        unsigned char c = (unsigned char)data[i];
        int n = utf8_length((const unsigned char *)data + i, length - i);
        if (!n)
            text_add(t, "\xef\xbf\xbd", 3);
        else if (c == '"' || c == '\\')
            text_print(t, "\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            text_print(t, "\\u%04x", c);
        else
            text_add(t, data + i, (size_t)n);
        i += (size_t)(n ? n : 1);
    }
    text_add(t, "\"", 1);
}

struct planned {                    /* a tensor of the file to be written */
    const struct tensor *tensor;
    enum type type;                 /* if it is a matrix; RAW: copy the bytes */
    enum type from;                 /* of a matrix: what it is, and its shape */
    int rows, cols;
    size_t size, crc_at;            /* crc_at: where its checksum stands in the header */
};

static int is_weight(const struct tensor *t, const struct container *c)
{
    size_t n = strlen(t->name);
    return n > 7 && !strcmp(t->name + n - 7, ".weight") &&
           (t->n_dims == 2 || find_packing(c, "packed.", t->name) || find_packing(c, "ggml.", t->name));
}

static int is_head(const char *name) { return !strncmp(name, "draft.", 6); }

/* What a matrix becomes. Embedding and output matrix stay at 8 bits when others go to 4; draft heads
   lose most of their acceptance with less. */
static enum type planned_type(const struct source *s, const char *name, int automatic, enum type type)
{
    if (automatic)
        return s->m.type == RAW ? s->raw->packed : s->m.type;
    int end = !strcmp(name, "token_embd.weight") || !strcmp(name, "output.weight"), head = is_head(name);
    return (end && (type == Q4 || type == Q4A)) || (head && type >= Q4) ? Q8 : type;
}

/* Which matrices deserve more bits: 0 the most. Every logit depends on the output matrix, all that follows on the
   first layer's attention and down projection; keys and values are small and shared by query heads. */
static int deserves(struct container *c, const char *name)
{
    int number = strncmp(name, "blk.", 4) ? 0 : (int)strcspn(name + 4, "."), first = !strncmp(name, "blk.0.", 6);
    const char *kind = number ? name + 4 + number : name;
    if (!strcmp(kind, find_tensor(c, "output.weight") ? "output.weight" : "token_embd.weight"))
        return 0;
    if (!strncmp(kind, ".attn_", 6) && first)
        return 1;
    if (!strcmp(kind, ".ffn_down.weight"))
        return first ? 2 : 4;
    return !strcmp(kind, ".attn_v.weight") || !strcmp(kind, ".attn_k.weight") ? 3 : 5;
}

/* q4, then q6, then q8 for the most deserving, as far as an average of so many bits a weight allows. */
static void spend_bits(struct planned *plan, int n, struct container *c, double bits)
{
    double left = 0;                /* bytes; padding counts as weights */
    for (int i = 0; i < n; i++)
        if (plan[i].rows && !is_head(plan[i].tensor->name)) {
            plan[i].type = Q4;
            left += (bits / 4.5 - 1) * (double)matrix_bytes(Q4, plan[i].rows, plan[i].cols);
        }
    for (int step = 0; step < 12; step++)
        for (int i = 0; i < n; i++) {
            struct planned *p = &plan[i];
            enum type better = step < 6 ? Q6 : Q8;
            if (!p->rows || is_head(p->tensor->name) || deserves(c, p->tensor->name) != step % 6)
                continue;
            double more = (double)matrix_bytes(better, p->rows, p->cols) - (double)matrix_bytes(p->type, p->rows, p->cols);
            if (more < left + 0.5) {
                left -= more;
                p->type = better;
            }
        }
}

static int is_pad(const char *name) { return !strncmp(name, "pad.", 4); }

enum { PAGE = 4096 };

/* Bytes between tensor i, which ends at `offset`, and the next: the first of the draft heads has a page of its own. */
static size_t padding(const struct planned *plan, int n, int i, size_t offset)
{
    size_t align = i + 1 < n && is_head(plan[i + 1].tensor->name) && !is_head(plan[i].tensor->name) ? PAGE : 64;
    return (align - offset % align) % align;
}

/* The header of the new file: old metadata without what described the old packing, new tensors.
   Tensors begin on multiples of 64 bytes, with tensors pad.N in between. */
static int write_header(struct text *h, const struct container *c, struct planned *plan, int n)
{
    size_t offset = 0;
    int pads = 0;
    text_print(h, "{\"__metadata__\":{");
    int comma = 0;
    for (int i = 0; i < c->n_entries; i++) {
        const struct entry *e = &c->entries[i];
        if (!strncmp(e->key, "packed.", 7) || !strncmp(e->key, "ggml.", 5) || !strncmp(e->key, "crc32.", 6))
            continue;
        text_print(h, "%s", comma++ ? "," : "");
        text_json(h, e->key, strlen(e->key));
        text_print(h, ":");
        text_json(h, e->value, strlen(e->value));
    }
    for (int i = 0; i < n; i++) {
        struct matrix m = { 0 };
        run_error ignored;
        char key[300];
        enum type type = plan[i].type;
        if (type == RAW && find_packing(c, "packed.", plan[i].tensor->name) &&
            matrix_describe(c, plan[i].tensor, &m, &ignored) == 0)
            type = m.type;          /* copied as it is packed */
        if (type >= Q4 && type < RAW && matrix_describe(c, plan[i].tensor, &m, &ignored) == 0) {
            snprintf(key, sizeof key, "packed.%s", plan[i].tensor->name);
            text_print(h, "%s", comma++ ? "," : "");
            text_json(h, key, strlen(key));
            text_print(h, ":\"%s %d %d\"", type_names[type], m.rows, m.cols);
        }
        snprintf(key, sizeof key, "crc32.%s", plan[i].tensor->name);
        text_print(h, "%s", comma++ ? "," : "");
        text_json(h, key, strlen(key));
        text_print(h, ":\"");
        plan[i].crc_at = h->n;
        text_print(h, "00000000\"");
    }
    text_print(h, "}");
    for (int i = 0; i < n; i++) {
        const struct tensor *t = plan[i].tensor;
        struct matrix m = { 0 };
        run_error ignored;
        text_print(h, ",");
        text_json(h, t->name, strlen(t->name));
        if (plan[i].type == RAW) {
            text_print(h, ":{\"dtype\":\"%s\",\"shape\":[", t->dtype);
            for (int k = 0; k < t->n_dims; k++)
                text_print(h, "%s%lld", k ? "," : "", (long long)t->shape[k]);
        } else if (plan[i].type >= Q4) {
            text_print(h, ":{\"dtype\":\"U8\",\"shape\":[%zu", plan[i].size);
        } else if (matrix_describe(c, t, &m, &ignored) == 0) {
            static const char *const dtypes[] = { "F32", "F16", "BF16" };
            text_print(h, ":{\"dtype\":\"%s\",\"shape\":[%d,%d", dtypes[plan[i].type], m.rows, m.cols);
        }
        text_print(h, "],\"data_offsets\":[%zu,%zu]}", offset, offset + plan[i].size);
        offset += plan[i].size;
        size_t pad = padding(plan, n, i, offset);
        if (pad) {
            text_print(h, ",\"pad.%d\":{\"dtype\":\"U8\",\"shape\":[%zu],\"data_offsets\":[%zu,%zu]}", pads++, pad,
                       offset, offset + pad);
            offset += pad;
        }
    }
    text_print(h, "}");
    while ((h->n + 8) % (find_text(c, "draft.count") ? PAGE : 64) && !h->broken)
        text_add(h, " ", 1);
    return h->broken ? -1 : 0;
}

/* Packs one matrix into the file, some megabytes at a time. */
static int write_matrix(FILE *file, struct packing *p, uint32_t *crc, run_error *error, const char *name)
{
    const struct matrix *m = &p->source.m;
    int total = (int)strips(m->rows), failed = -1;
    size_t strip_bytes = matrix_bytes(p->type, STRIP, m->cols), width = blocks(m->cols) * BLOCK;
    int most = (int)((size_t)(16 << 20) / strip_bytes) + p->team->size; /* strips at a time */
    most = most < total ? most : total;
    p->out = malloc(strip_bytes * (size_t)most);
    p->rows = malloc((size_t)p->team->size * 3 * STRIP * width * sizeof *p->rows);
    p->grids = malloc((size_t)p->team->size * (width / GROUP) * sizeof *p->grids);
    p->error = calloc((size_t)total, sizeof *p->error);
    p->square = calloc((size_t)total, sizeof *p->square);
    if (!p->out || !p->rows || !p->grids || !p->error || !p->square) {
        fail(error, "out of memory for tensor %.100s", name);
    } else {
        for (p->first = 0; p->first < total; p->first = p->end) {
            p->end = total - p->first < most ? total : p->first + most;
            team_run(p->team, 0, pack, p);
            size_t bytes = p->type >= Q4 ? (size_t)(p->end - p->first) * strip_bytes
                : matrix_bytes(p->type, (p->end < total ? p->end * STRIP : m->rows) - p->first * STRIP, m->cols);
            *crc = crc32_of(*crc, p->out, bytes);
            if (p->bad || interrupted || fwrite(p->out, 1, bytes, file) != bytes)
                break;
        }
        if (p->bad)
            fail(error, "tensor %.100s holds a weight in row %d that is not finite", name, p->bad - 1);
        else if (p->first < total)
            fail(error, interrupted ? "interrupted%.0s" : "cannot write: %s", strerror(errno));
        else
            failed = 0;
    }
    return failed;
}

/* -- statistics: H of the inputs of matrices, as many at a time as there is room for -- */

enum { INPUTS = 4, FEWEST = 256 };  /* of a layer's matrices; tokens that are worth a sum */

struct site {                       /* one input, of `width` columns */
    int width;
    float *rows;                    /* [width, window] the latest tokens, one a column */
    float *hessian;                 /* [width, width], or NULL: not collected at present */
};

struct statistics {
    run_session *session;
    int *ids, n_ids;                /* of the text */
    int window;                     /* tokens that are read together */
    int n_sites;
    struct site *sites;             /* [layers INPUTS + 1], the output matrix's last */
};

/* The site of a matrix's input, or -1: an embedding that is not the output matrix has none. */
static int site_of(const struct run_model *m, const char *name)
{
    static const struct { const char *matrix; int input; } all[] = {
        { "attn_q", 0 }, { "attn_k", 0 }, { "attn_v", 0 }, { "attn_output", 1 },
        { "ffn_gate", 2 }, { "ffn_up", 2 }, { "ffn_down", 3 },
    };
    if (!strcmp(name, m->output.data == m->embedding.data ? "token_embd.weight" : "output.weight"))
        return m->config.layers * INPUTS;
    for (int i = 0; i < 7 * m->config.layers; i++) {
        char expected[80];
        snprintf(expected, sizeof expected, "blk.%d.%s.weight", i / 7, all[i % 7].matrix);
        if (!strcmp(name, expected))
            return i / 7 * INPUTS + all[i % 7].input;
    }
    return -1;
}

static void keep_row(void *context, const char *point, int layer, const float *values, int position, int width)
{
    static const char *const points[] = { "attn_norm", "attn", "ffn_norm", "ffn" };
    struct statistics *s = context;
    int input = 0;
    while (input < INPUTS && strcmp(point, points[input]))
        input++;
    if (input == INPUTS && strcmp(point, "norm"))
        return;
    struct site *site = &s->sites[input < INPUTS ? layer * INPUTS + input : s->n_sites - 1];
    for (int i = 0; site->hessian && i < width; i++)
        site->rows[(size_t)i * (size_t)s->window + (size_t)position] = values[i];
}

/* H += x^T x below and at the diagonal, a matrix product like any other. */
static void add_products(void *context, int me)
{
    struct statistics *s = context;
    struct team *team = s->session->pass->team;
    int total = 0, begin, end;
    for (int i = 0; i < s->n_sites; i++)
        total += (int)strips(s->sites[i].width);
    while (next_piece(team, me, total, 1, &begin, &end)) {
        const struct site *site = s->sites;
        int strip = begin;
        for (; strip >= (int)strips(site->width); site++)
            strip -= (int)strips(site->width);
        const struct matrix x = { (const unsigned char *)site->rows, F32, site->width, s->window };
        const struct input in = { .x = site->rows, .stride = (size_t)s->window, .n = site->width, .cols = s->window };
        for (int first = strip * STRIP; first < site->width; first += TILE) {
            float tile[TILE * STRIP], *h = site->hessian + (size_t)first * (size_t)site->width + strip * STRIP;
            int n = site->width - first < TILE ? site->width - first : TILE;
            s->session->model->kernels->matmul[F32](tile, &x, strip, &in, first, n);
            for (int r = 0; r < n; r++, h += site->width)
                for (int i = 0; i < STRIP && strip * STRIP + i < site->width; i++)
                    h[i] += tile[r * STRIP + i];
        }
    }
    barrier(team);
}

/* Reads the text once, in windows. */
static int read_text(struct statistics *s, run_error *error)
{
    int bos = s->window > 1 ? run_bos(s->session->model) : -1, n;
    for (int at = 0; at < s->n_ids; at += n) {
        if (interrupted)
            return fail(error, "interrupted");
        if (isatty(2))
            fprintf(stderr, "\r%3d %%  %-40s", (int)(100.0 * at / s->n_ids), "reading the text");
        for (int i = 0; i < s->n_sites; i++)
            if (s->sites[i].hessian)
                memset(s->sites[i].rows, 0, (size_t)s->sites[i].width * (size_t)s->window * sizeof(float));
        n = s->window - (bos >= 0);
        n = n < s->n_ids - at ? n : s->n_ids - at;
        if (run_rewind(s->session, 0, error) || (bos >= 0 && eval(s->session, &bos, 1, 0, error)) ||
            eval(s->session, s->ids + at, n, 0, error))
            return -1;
        team_run(s->session->pass->team, 0, add_products, s);
    }
    return 0;
}

/* Both halves, relative to the mean of the diagonal, to which a part of it is added: a text is only a
   sample, and a tied matrix is an embedding too. */
static int finish_site(struct site *site, float damping, run_error *error)
{
    double sum = 0;
    size_t n = (size_t)site->width;
    for (size_t i = 0; i < n; i++)
        sum += (double)site->hessian[i * n + i];
    float scale = sum > 0 ? (float)((double)n / sum) : 0;
    if (!(sum * 0 == 0) || !(scale * 0 == 0))
        return fail(error, "the activations of this text are not finite or too large for statistics; pack without -f");
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++)
            site->hessian[i * n + j] = site->hessian[j * n + i] = site->hessian[i * n + j] * scale + (i == j ? damping : 0);
    return 0;
}

/* Collects for plan[first] and as many matrices behind it as there is room for. */
static int collect_sites(struct statistics *s, const struct planned *plan, int first, int n, run_error *error)
{
    const struct run_model *m = s->session->model;
    const size_t most = (size_t)1 << 30;
    size_t bytes = 0;
    int tied = m->output.data == m->embedding.data;
    for (int i = 0; i < s->n_sites; i++) {
        free(s->sites[i].rows);
        free(s->sites[i].hessian);
        s->sites[i] = (struct site){ 0 };
    }
    for (int k = first; k < n; k++) {
        int i = takes_feedback(plan[k].type) ? site_of(m, plan[k].tensor->name) : -1;
        if (i < 0 || s->sites[i].hessian)
            continue;
        int width = i % INPUTS == 1 ? m->config.heads * m->config.hd : i % INPUTS == 3 ? m->config.hidden : m->config.dim;
        size_t more = (size_t)width * (size_t)(width + s->window) * sizeof(float);
        if (bytes && bytes + more > most)
            break;
        bytes += more;
        s->sites[i] = (struct site){ width, calloc((size_t)width * (size_t)s->window + 16, sizeof(float)),
                                     calloc((size_t)width * (size_t)width, sizeof(float)) };
        if (!s->sites[i].rows || !s->sites[i].hessian)
            return fail(error, "out of memory for statistics of %d columns", width);
    }
    run_observe(s->session, keep_row, s);
    int failed = read_text(s, error);
    run_observe(s->session, NULL, NULL);
    for (int i = 0; i < s->n_sites && !failed; i++)
        if (s->sites[i].hessian)
            failed = finish_site(&s->sites[i], i == s->n_sites - 1 && tied ? 0.3f : 0.1f, error);
    return failed;
}

/* H of a matrix's input, or NULL if there is none. */
static int find_hessian(struct statistics *s, const struct planned *plan, int k, int n, const float **hessian, run_error *error)
{
    int i = s && takes_feedback(plan[k].type) ? site_of(s->session->model, plan[k].tensor->name) : -1;
    if (i >= 0 && !s->sites[i].hessian && collect_sites(s, plan, k, n, error))
        return -1;
    *hessian = i >= 0 ? s->sites[i].hessian : NULL;
    return 0;
}

struct tally {                      /* of matrices that changed their type */
    double error, square;
    int n;
};

static int write_tensors(FILE *file, const struct container *c, struct planned *plan, int n, struct text *header,
                         struct team *team, struct statistics *statistics, struct tally tally[RAW + 1][N_TYPES], run_error *error)
{
    uint64_t length = header->n;
    size_t offset = 0;
    if (fwrite(&length, 8, 1, file) != 1 || fwrite(header->data, header->n, 1, file) != 1)
        return fail(error, "cannot write: %s", strerror(errno));
    for (int i = 0; i < n; i++) {
        static const char zeros[PAGE];
        const struct tensor *t = plan[i].tensor;
        uint32_t crc = 0;
        if (isatty(2))
            fprintf(stderr, "\r%3d %%  %-40.40s", (int)(100.0 * i / n), t->name);
        if (plan[i].type == RAW) {
            crc = crc32_of(0, t->data, t->size);
            if (t->size && fwrite(t->data, t->size, 1, file) != 1)
                return fail(error, "cannot write: %s", strerror(errno));
        } else {
            struct packing p = { .type = plan[i].type, .team = team };
            if (source_open(&p.source, c, t, error) || find_hessian(statistics, plan, i, n, &p.hessian, error))
                return -1;
            p.kernels = statistics ? statistics->session->model->kernels : NULL;
            int failed = write_matrix(file, &p, &crc, error, t->name);
            struct tally *sums = &tally[p.source.m.type][p.type];
            for (int k = 0; k < (int)strips(p.source.m.rows) && !failed; k++) {
                sums->error += p.error[k];
                sums->square += p.square[k];
            }
            sums->n++;
            free(p.out);
            free(p.rows);
            free(p.grids);
            free(p.error);
            free(p.square);
            if (failed)
                return -1;
        }
        char digits[9];
        snprintf(digits, sizeof digits, "%08x", (unsigned)crc);
        memcpy(header->data + plan[i].crc_at, digits, 8);
        offset += plan[i].size;
        size_t pad = padding(plan, n, i, offset);
        if (pad && fwrite(zeros, pad, 1, file) != 1)
            return fail(error, "cannot write: %s", strerror(errno));
        offset += pad;
    }
    if (isatty(2))
        fprintf(stderr, "\r%50s\r", "");
    if (fflush(file) || fseek(file, 8, SEEK_SET) || fwrite(header->data, header->n, 1, file) != 1 || fflush(file))
        return fail(error, "cannot write: %s", strerror(errno));
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct planned *x = a, *y = b;
    return (x->tensor->data > y->tensor->data) - (x->tensor->data < y->tensor->data);
}

/* A temporary file beside `out`, renamed when it is whole. */
static int write_model(const char *out, const struct container *c, struct planned *plan, int n, int threads,
                       struct statistics *statistics, struct tally tally[RAW + 1][N_TYPES], run_error *error)
{
    struct text header = { 0 };
    struct team team;
    char temporary[4096 + 32];
    if (strlen(out) > 4000)
        return fail(error, "the name of the output file is too long");
    snprintf(temporary, sizeof temporary, "%s.tmp-%ld", out, (long)getpid());
    qsort(plan, (size_t)n, sizeof *plan, by_offset);
    if (write_header(&header, c, plan, n)) {
        free(header.data);
        return fail(error, "out of memory for the header");
    }
    FILE *file = fopen(temporary, "wb");
    int failed = file ? 0 : fail(error, "cannot create %.300s: %s", temporary, strerror(errno));
    if (!failed && !(failed = team_open(&team, threads, error))) {
        failed = write_tensors(file, c, plan, n, &header, &team, statistics, tally, error);
        team_close(&team);
    }
    if (file && fclose(file) && !failed)
        failed = fail(error, "cannot write %.300s: %s", temporary, strerror(errno));
    if (!failed && rename(temporary, out))
        failed = fail(error, "cannot rename %.200s: %s", temporary, strerror(errno));
    if (failed && file)
        remove(temporary);
    free(header.data);
    return failed;
}

#endif /* RUN_LIBRARY */
#endif /* RUN_DECLARATIONS */
#endif /* RUN_KERNELS */

/* == SPEED ===================================================================================

   The kernels again, for vector instructions. The text below is compiled once for every
   instruction set: run.c includes itself with RUN_KERNELS defined, and only this section is seen.
   A set brings a vector width and a few one-line primitives:

     LANES       floats in a vector: 4, 8 or 16
     fma_v       a * b + c, rounded once
     halves      LANES half-precision numbers as floats; shifted: LANES bfloat16 ones
     more_u4     STEP columns: vectors of 4-bit weights (one lane = one row, 4 columns each) times
                 int8 activations, added exactly to a sum; whole_u4 makes such a sum int32
     more_u6     the same for 6-bit weights, with int32 sums
     more_i8     the same for 8-bit weights, which have a sign; begin_i8 is what their sum begins with

   A packed kernel keeps one lane per row. It takes STEP columns of its rows into registers once,
   and multiplies them with every token of the tile, so that a token more costs arithmetic but no
   decoding and no memory.                                                                     */

#ifdef RUN_KERNELS

#ifdef KERNELS_TARGET
TARGET_BEGIN(KERNELS_TARGET)
#endif

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define SET(name) JOIN(name, RUN_KERNELS)
#define PARTS (STRIP / LANES)
#define STEP (LANES < 16 ? 16 : 32)             /* columns that a packed matrix takes at a time: half a group, or one */
#define ABREAST (LANES < 16 ? 16 / LANES : 2)   /* vectors of outputs that attention sums at once */

#define vf SET(vf)      /* LANES floats */
#define vi SET(vi)      /* LANES 32-bit integers */
#define vu SET(vu)      /* the same without sign */
#define vb SET(vb)      /* as many bytes */
typedef float vf __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint8_t vb __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

/* x in every lane. (x + 0 would do, but costs an addition: -0 + 0 is +0.) */
INLINE vf SET(all)(float x) { return x - (vf){ 0 }; }

/* Four bytes in every lane. */
INLINE vb SET(four)(const int8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return (vb)((vi){ 0 } + word);
}

/* -- primitives of the sets -- */

#if defined KERNELS_AVX2 || defined KERNELS_AVXVNNI

INLINE vf SET(fma_v)(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf SET(halves)(const void *at) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(at)); }
INLINE vf SET(shifted)(const void *at) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16); }

#elif defined KERNELS_AVX512

INLINE vf SET(fma_v)(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf SET(halves)(const void *at) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(at)); }
INLINE vf SET(shifted)(const void *at) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16); }

#elif defined KERNELS_NEON || defined KERNELS_DOTPROD

INLINE vf SET(fma_v)(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vf SET(halves)(const void *at)
{
    uint16x4_t bits;
    memcpy(&bits, at, sizeof bits);
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(bits));
}
INLINE vf SET(shifted)(const void *at)
{
    uint16x4_t bits;
    memcpy(&bits, at, sizeof bits);
    return (vf)vshll_n_u16(bits, 16);
}

#endif

/* Sums of products over STEP columns: s + w . x, where w[i] holds columns 4 i .. of the rows, a row a
   lane. 4-bit sums may be of another form until whole_u4 makes them int32. */

#if defined KERNELS_AVX2

/* maddubs adds two products into 16 bits. 4-bit weights leave room for a whole group there: 16
   products of at most 15 * 127 are 30480. */
INLINE vi SET(more_u4)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    __m256i a = _mm256_maddubs_epi16((__m256i)w[0], (__m256i)SET(four)(x));
    __m256i b = _mm256_maddubs_epi16((__m256i)w[1], (__m256i)SET(four)(x + 4));
    __m256i c = _mm256_maddubs_epi16((__m256i)w[2], (__m256i)SET(four)(x + 8));
    __m256i d = _mm256_maddubs_epi16((__m256i)w[3], (__m256i)SET(four)(x + 12));
    return (vi)_mm256_add_epi16((__m256i)s, _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d)));
}

INLINE vi SET(whole_u4)(vi s) { return (vi)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi16(1)); }

/* 6-bit weights leave room for two of its sums: 4 products of at most 63 * 127 are 32004. */
INLINE vi SET(more_u6)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    for (int i = 0; i < STEP / 4; i += 2) {
        __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)w[i], (__m256i)SET(four)(x + 4 * i)),
                                        _mm256_maddubs_epi16((__m256i)w[i + 1], (__m256i)SET(four)(x + 4 * i + 4)));
        s += (vi)_mm256_madd_epi16(four, _mm256_set1_epi16(1));
    }
    return s;
}

/* 8-bit weights do not: |w| as the unsigned factor, the sign moved to x, and 32 bits at once
   (two products are at most 2 * 128 * 127 = 32512). */
INLINE vi SET(more_i8)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    for (int i = 0; i < STEP / 4; i++) {
        __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w[i]),
                                           _mm256_sign_epi8((__m256i)SET(four)(x + 4 * i), (__m256i)w[i]));
        s += (vi)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
    }
    return s;
}

INLINE vi SET(begin_i8)(int32_t sum) { return (void)sum, (vi){ 0 }; }

#elif defined KERNELS_AVX512 || defined KERNELS_AVXVNNI

#ifdef KERNELS_AVX512
#define DPBUSD(s, w, x) (vi)_mm512_dpbusd_epi32((__m512i)(s), (__m512i)(w), (__m512i)(x))
#else
#define DPBUSD(s, w, x) (vi)_mm256_dpbusd_avx_epi32((__m256i)(s), (__m256i)(w), (__m256i)(x))
#endif

/* Four products of unsigned w and signed x a lane; two chains hide the latency. */
INLINE vi SET(more_u4)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    vi t = { 0 };
    for (int i = 0; i < STEP / 4; i += 2) {
        s = DPBUSD(s, w[i], SET(four)(x + 4 * i));
        t = DPBUSD(t, w[i + 1], SET(four)(x + 4 * i + 4));
    }
    return s + t;
}
#define more_u6_AVX512 more_u4_AVX512
#define more_u6_AVXVNNI more_u4_AVXVNNI

/* Signed weights become unsigned by adding 128, which adds 128 times the sum of x. */
INLINE vi SET(more_i8)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    vb unsigned_[STEP / 4];
    for (int i = 0; i < STEP / 4; i++)
        unsigned_[i] = w[i] ^ 128;
    return SET(more_u4)(s, unsigned_, x);
}

INLINE vi SET(begin_i8)(int32_t sum) { return (vi){ 0 } - 128 * sum; }
INLINE vi SET(whole_u4)(vi s) { return s; }

#undef DPBUSD

#elif defined KERNELS_DOTPROD

/* s + four products a lane. As assembly, since old clangs have no intrinsic for one function's target. */
INLINE int32x4_t sdot(int32x4_t s, vb w, vb x)
{
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(s) : "w"((int8x16_t)w), "w"((int8x16_t)x));
    return s;
}

INLINE vi SET(more_i8)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    for (int i = 0; i < STEP / 4; i++)
        s = (vi)sdot((int32x4_t)s, w[i], SET(four)(x + 4 * i));
    return s;
}
#define more_u4_DOTPROD more_i8_DOTPROD
#define more_u6_DOTPROD more_i8_DOTPROD

INLINE vi SET(begin_i8)(int32_t sum) { return (void)sum, (vi){ 0 }; }
INLINE vi SET(whole_u4)(vi s) { return s; }

#elif defined KERNELS_NEON

/* Products of bytes in 16 bits, neighbours added into 32: two steps make four columns a lane. */
INLINE vi SET(more_i8)(vi s, const vb w[STEP / 4], const int8_t *x)
{
    int32x4_t low = vdupq_n_s32(0), high = low;
    for (int i = 0; i < STEP / 4; i++) {
        int8x16_t a = (int8x16_t)w[i], b = (int8x16_t)SET(four)(x + 4 * i);
        low = vpadalq_s16(low, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        high = vpadalq_s16(high, vmull_high_s8(a, b));
    }
    return s + (vi)vpaddq_s32(low, high);
}
#define more_u4_NEON more_i8_NEON
#define more_u6_NEON more_i8_NEON

INLINE vi SET(begin_i8)(int32_t sum) { return (void)sum, (vi){ 0 }; }
INLINE vi SET(whole_u4)(vi s) { return s; }

#endif

INLINE vf SET(floats)(vi x) { return __builtin_convertvector(x, vf); }

/* -- packed matrices -- */

/* STEP columns of LANES rows, part 0 .. of the strip, as bytes. */
INLINE void SET(unpack)(vb w[STEP / 4], const unsigned char *block, int group, int from, int part, const enum type type)
{
    const unsigned char *line = block + part * 4 * LANES + group * (type == Q8 ? 512 : 256) + from * (type == Q8 ? 16 : 8);
    const unsigned char *upper = block + Q4_QUANTS + part * 4 * LANES + group * 128 + from * 4;
    for (int i = 0; type == Q8 && i < STEP / 4; i++)
        w[i] = *(const vb *)(line + 64 * i);
    for (int i = 0; type != Q8 && i < STEP / 4; i += 2) {
        vb bytes = *(const vb *)(line + 32 * i);
        w[i] = bytes & 15;
        w[i + 1] = bytes >> 4;
    }
    for (int i = 0; type == Q6 && i < STEP / 4; i += 4) { /* bits that cross to another byte are masked */
        vu two = *(const vu *)(upper + 16 * i);
        w[i] |= (vb)(two << 4) & 48;
        w[i + 1] |= (vb)(two << 2) & 48;
        w[i + 2] |= (vb)two & 48;
        w[i + 3] |= (vb)(two >> 2) & 48;
    }
}

struct SET(sums) { vf of_floats[8][PARTS]; vi of_group[8][PARTS]; };      /* [token][LANES rows] */

/* STEP columns of a group, from `from` on, for n tokens. All parts of the strip take them together, so
   that what is loaded of the tokens serves all; loads are what limits this loop. [N2] */
INLINE void SET(take_step)(struct SET(sums) *s, const unsigned char *block, int group, const int from, const struct input *x,
                           size_t at, const int n, const enum type type)
{
    const int zero = type == Q4 ? 8 : type == Q6 ? 32 : 0;
    const unsigned char *scales = block + quant_bytes(type) + group * 32;
    vb w[PARTS][STEP / 4];              /* [part][columns 4 i ..][row, column] */
    for (int part = 0; part < PARTS; part++)
        SET(unpack)(w[part], block, group, from, part, type);
    for (int r = 0; r < n; r++) {
        const int8_t *q = x->q + (at + (size_t)r) * GROUP + from;
        for (int part = 0; part < PARTS; part++) {
            vi sum = from ? s->of_group[r][part] : type == Q8 ? SET(begin_i8)(x->sum[at + (size_t)r]) : (vi){ 0 };
            sum = type == Q8 ? SET(more_i8)(sum, w[part], q) : type == Q6 ? SET(more_u6)(sum, w[part], q) : SET(more_u4)(sum, w[part], q);
#ifndef __clang__
            if (n > 1)
                __asm__ volatile("" : "+" VECTOR_REGISTER(sum));    /* or gcc takes all products first and spills them */
#endif
            if (from + STEP < GROUP) {
                s->of_group[r][part] = sum;
                continue;
            }
            sum = (type == Q4 || type == Q4A ? SET(whole_u4)(sum) : sum) - zero * x->sum[at + (size_t)r];
            vf d = SET(halves)(scales + part * 2 * LANES), *acc = &s->of_floats[r][part];
            *acc = SET(fma_v)(SET(floats)(sum), d * x->scale[at + (size_t)r], *acc);
            if (type == Q4A)
                *acc = SET(fma_v)(SET(halves)(scales + part * 2 * LANES + SCALES), SET(all)(x->offset[at + (size_t)r]), *acc);
        }
    }
}

/* A strip times n tokens, a constant after inlining. */
INLINE void SET(packed)(float *tile, const struct matrix *w, int strip, const struct input *x, int r0,
                        const int n, const enum type type)
{
    const int bytes_each = block_bytes(type), n_blocks = (int)blocks(w->cols);
    const unsigned char *block = w->data + (size_t)strip * (size_t)n_blocks * (size_t)bytes_each;
    struct SET(sums) s;
    for (int r = 0; r < n; r++)
        for (int part = 0; part < PARTS; part++)
            s.of_floats[r][part] = (vf){ 0 };
    for (int b = 0; b < n_blocks; b++, block += bytes_each) {
        for (int line = 0; line < bytes_each; line += 64)
            __builtin_prefetch(block + PREFETCH + line);
        for (int group = 0; group < 2; group++) {
            size_t at = (size_t)(2 * b + group) * (size_t)x->n + (size_t)r0;
            SET(take_step)(&s, block, group, 0, x, at, n, type);
            if (STEP < GROUP)
                SET(take_step)(&s, block, group, STEP, x, at, n, type);
        }
    }
    for (int r = 0; r < n; r++)
        for (int part = 0; part < PARTS; part++)
            *(vf *)(tile + r * STRIP + part * LANES) = s.of_floats[r][part];
}

/* Tiles of up to 8 tokens; every size is compiled by itself, so that sums stay in registers. */
#define PACKED(name, type)                                                                                    \
    static void SET(name)(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n) \
    {                                                                                                         \
        for (; n > 0; n -= 8, r0 += 8, tile += 8 * STRIP)                                                     \
            switch (n) {                                                                                      \
            case 1: SET(packed)(tile, w, strip, x, r0, 1, type); break;                                       \
            case 2: SET(packed)(tile, w, strip, x, r0, 2, type); break;                                       \
            case 3: SET(packed)(tile, w, strip, x, r0, 3, type); break;                                       \
            case 4: SET(packed)(tile, w, strip, x, r0, 4, type); break;                                       \
            case 5: SET(packed)(tile, w, strip, x, r0, 5, type); break;                                       \
            case 6: SET(packed)(tile, w, strip, x, r0, 6, type); break;                                       \
            case 7: SET(packed)(tile, w, strip, x, r0, 7, type); break;                                       \
            default: SET(packed)(tile, w, strip, x, r0, 8, type); break;                                      \
            }                                                                                                 \
    }
PACKED(matmul_q4, Q4)
PACKED(matmul_q4a, Q4A)
PACKED(matmul_q6, Q6)
PACKED(matmul_q8, Q8)
#undef PACKED

/* -- float matrices, attention and the rest: not again for a set that only brings another dot product -- */

#ifndef KERNELS_REST

INLINE vf SET(weights)(const unsigned char *data, size_t i, const enum type type)
{
    if (type == F32)
        return *(const vf *)(data + 4 * i);
    if (type == F16)
        return SET(halves)(data + 2 * i);
    return SET(shifted)(data + 2 * i);
}

static const int32_t SET(sixteen)[16] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };

/* s[token][row] += weights * x, LANES columns; `ragged`: only lanes where `within` is -1. */
INLINE void SET(accumulate)(vf s[FLOAT_TOKENS][4], const unsigned char *const lines[4], int k, const float *x, size_t stride,
                            const int rows, const int n, const enum type type, const int ragged, vi within)
{
    vf columns[FLOAT_TOKENS];
    for (int r = 0; r < n; r++)
        columns[r] = *(const vf *)(x + (size_t)r * stride);
    for (int i = 0; i < rows; i++) {
        vf weights = SET(weights)(lines[i], (size_t)k, type);
        if (n > 1)
            __asm__("" : "+" VECTOR_REGISTER(weights));     /* or gcc loads it once for every token */
        for (int r = 0; r < n; r++) {
            vf more = SET(fma_v)(weights, columns[r], s[r][i]);
            s[r][i] = ragged ? (vf)((within & (vi)more) | (~within & (vi)s[r][i])) : more;
        }
    }
}

/* rows (1 or 4) times n tokens: sixteen partial sums each, in PARTS vectors. Several tokens have
   registers for one part at a time. at_end: nothing of the matrix lies behind these rows. [N3] */
INLINE void SET(dots)(float *tile, const unsigned char *w, int cols, int at_end, const float *x, size_t stride, const int rows,
                      const int n, const enum type type)
{
    const int size = type == F32 ? 4 : 2, together = n > 1 ? 1 : PARTS;
    const unsigned char *lines[4], *ends[4];
    int whole = cols / 16 * 16;
    float sums[FLOAT_TOKENS][4][16];
    unsigned char copies[4][64];
    for (int i = 0; i < rows; i++) {
        lines[i] = w + (size_t)i * (size_t)cols * (size_t)size;
        ends[i] = lines[i] + (size_t)whole * (size_t)size;
        if (whole < cols && (at_end || !whole)) { /* sixteen columns from there may go beyond the matrix */
            memset(copies[i], 0, sizeof copies[i]);
            ends[i] = memcpy(copies[i], ends[i], (size_t)((cols - whole) * size));
        }
    }
    for (int first = 0; first < PARTS; first += together) {
        vf s[PARTS][FLOAT_TOKENS][4];
        for (int part = 0; part < together; part++)
            for (int r = 0; r < n; r++)
                for (int i = 0; i < rows; i++)
                    s[part][r][i] = (vf){ 0 };
        for (int k = first * LANES; k < whole; k += 16) {
            for (int i = 0; first == 0 && i < rows * size / 4; i++)  /* in the order in which the rows lie in memory */
                __builtin_prefetch(w + PREFETCH + (size_t)k * (size_t)(rows * size) + 64 * i);
            for (int part = 0; part < together; part++)
                SET(accumulate)(s[part], lines, k + part * LANES, x + k + part * LANES, stride, rows, n, type, 0, (vi){ 0 });
        }
        for (int part = 0; part < together; part++) {
            int k = (first + part) * LANES;
            if (whole < cols)
                SET(accumulate)(s[part], ends, k, x + whole + k, stride, rows, n, type, 1,
                                *(const vi *)(SET(sixteen) + k) < cols - whole);
            for (int r = 0; r < n; r++)
                for (int i = 0; i < rows; i++)
                    *(vf *)(sums[r][i] + k) = s[part][r][i];
        }
        if (n > 1)
            __asm__ volatile("" :: "r"(sums) : "memory");       /* or clang keeps them in registers */
    }
    for (int r = 0; r < n; r++)
        if (rows == 4)
            four_trees(tile + r * STRIP, sums[r]);
        else
            tile[r * STRIP] = tree(sums[r][0]);
}

INLINE void SET(floating)(float *tile, const struct matrix *m, int strip, const struct input *x, int r0, int n,
                          const enum type type)
{
    int rows = m->rows - strip * STRIP < STRIP ? m->rows - strip * STRIP : STRIP, cols = m->cols;
    size_t line = (size_t)cols * (type == F32 ? 4 : 2), stride = x->stride;
    for (int i = 0; i < rows;) {
        const unsigned char *w = m->data + (size_t)(strip * STRIP + i) * line;
        const float *from = x->x + (size_t)r0 * stride;
        int step = rows - i >= 4 ? 4 : 1, at_end = strip * STRIP + i + step == m->rows, r = 0;
        for (; step == 4 && r + FLOAT_TOKENS <= n; r += FLOAT_TOKENS)
            SET(dots)(tile + r * STRIP + i, w, cols, at_end, from + (size_t)r * stride, stride, 4, FLOAT_TOKENS, type);
        for (; r < n; r++)
            if (step == 4)
                SET(dots)(tile + r * STRIP + i, w, cols, at_end, from + (size_t)r * stride, stride, 4, 1, type);
            else
                SET(dots)(tile + r * STRIP + i, w, cols, at_end, from + (size_t)r * stride, stride, 1, 1, type);
        i += step;
    }
}

static void SET(matmul_f32)(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n)
{ SET(floating)(tile, w, strip, x, r0, n, F32); }
static void SET(matmul_f16)(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n)
{ SET(floating)(tile, w, strip, x, r0, n, F16); }
static void SET(matmul_bf16)(float *tile, const struct matrix *w, int strip, const struct input *x, int r0, int n)
{ SET(floating)(tile, w, strip, x, r0, n, BF16); }

#define INSTANTIATE_SET(set) INSTANTIATE(set)
INSTANTIATE_SET(RUN_KERNELS)

/* -- attention -- */

INLINE vf SET(load)(const void *cache, size_t i, const int f32)
{
    return f32 ? *(const vf *)((const float *)cache + i) : SET(halves)((const uint16_t *)cache + i);
}

/* acc += s * value, as many vectors of dimensions from d on, for one query. */
INLINE void SET(add_value)(vf *acc, float s, const void *values, size_t at, const int f32, const int vectors)
{
    for (int v = 0; v < vectors; v++)
        acc[v] = SET(fma_v)(SET(all)(s), SET(load)(values, at + (size_t)(v * LANES), f32), acc[v]);
}

/* Some dimensions of the outputs of n queries, which all see the positions [inner, outer). */
INLINE void SET(weigh)(float out[QUERIES][1024], const struct query *queries, const int n, float s[QUERIES][64], int inner,
                       int outer, const void *values, int d, int hd, const int f32, const int vectors)
{
    vf acc[QUERIES][ABREAST];
    for (int j = 0; j < n; j++) {
        for (int v = 0; v < vectors; v++)
            acc[j][v] = (vf){ 0 };
        for (int i = queries[j].first; i < inner && i < queries[j].end; i++)
            SET(add_value)(acc[j], s[j][i], values, value_at(i, d, hd), f32, vectors);
    }
    for (int i = inner; i < outer; i++) {
        __builtin_prefetch((const char *)values + (value_at(i, d, hd) + (size_t)(BLOCK * hd)) * (f32 ? 4 : 2));
        vf value[ABREAST];
        for (int v = 0; v < vectors; v++)
            value[v] = SET(load)(values, value_at(i, d + v * LANES, hd), f32);
        for (int j = 0; j < n; j++)
            for (int v = 0; v < vectors; v++)
                acc[j][v] = SET(fma_v)(SET(all)(s[j][i]), value[v], acc[j][v]);
    }
    for (int j = 0; j < n; j++) {
        for (int i = outer > queries[j].first ? outer : queries[j].first; i < queries[j].end; i++)
            SET(add_value)(acc[j], s[j][i], values, value_at(i, d, hd), f32, vectors);
        for (int v = 0; v < vectors; v++)
            *(vf *)(out[j] + d + v * LANES) = acc[j][v];
    }
}

/* n queries (a constant) against a block: scores with one lane per position, then outputs with one
   lane per dimension. [N4] */
INLINE void SET(attend_some)(struct query *queries, const int n, const void *keys, const void *values, int hd,
                             float scale, float cap, const int f32)
{
    float s[QUERIES][64], sum[QUERIES], max[QUERIES], out[QUERIES][1024];
    int first = 64, end = 0;
    for (int j = 0; j < n; j++) {
        first = queries[j].first < first ? queries[j].first : first;
        end = queries[j].end > end ? queries[j].end : end;
    }
    for (int i = first / 16 * 16; i < end; i += 16) {
        vf acc[QUERIES][PARTS];
        for (int j = 0; j < n; j++)
            for (int part = 0; part < PARTS; part++)
                acc[j][part] = (vf){ 0 };
        for (int d = 0; d < hd; d++) {
            __builtin_prefetch((const char *)keys + (key_at(i, d, hd) + (size_t)(BLOCK * hd)) * (f32 ? 4 : 2));
            vf key[PARTS];
            for (int part = 0; part < PARTS; part++)
                key[part] = SET(load)(keys, key_at(i, d, hd) + (size_t)(part * LANES), f32);
            for (int j = 0; j < n; j++)
                for (int part = 0; part < PARTS; part++)
                    acc[j][part] = SET(fma_v)(SET(all)(queries[j].q[d]), key[part], acc[j][part]);
        }
        for (int j = 0; j < n; j++)
            for (int part = 0; part < PARTS; part++)
                *(vf *)(s[j] + i + part * LANES) = acc[j][part];
    }
    int inner = first, outer = end; /* where all n queries see */
    SET(softmax)(s, queries, n, scale, cap, max, sum);
    for (int j = 0; j < n; j++) {
        inner = queries[j].first > inner ? queries[j].first : inner;
        outer = queries[j].end < outer ? queries[j].end : outer;
    }
    if (inner > outer)
        inner = outer = end;        /* nowhere together: each by itself */
    int d = 0;
    for (; d + ABREAST * LANES <= hd; d += ABREAST * LANES)
        SET(weigh)(out, queries, n, s, inner, outer, values, d, hd, f32, ABREAST);
    for (; d + LANES <= hd; d += LANES)
        SET(weigh)(out, queries, n, s, inner, outer, values, d, hd, f32, 1);
    for (; d < hd; d++)
        for (int j = 0; j < n; j++) {
            out[j][d] = 0;
            for (int i = queries[j].first; i < queries[j].end; i++)
                out[j][d] = fma_(s[j][i], cached(values, value_at(i, d, hd), f32), out[j][d]);
        }
    for (int j = 0; j < n; j++)
        SET(merge)(&queries[j], out[j], max[j], sum[j], hd);
}

#define ATTEND(name, f32)                                                                                     \
    static void SET(name)(struct query *q, int n, const void *k, const void *v, int hd, float scale, float cap) \
    {                                                                                                         \
        switch (n) {                                                                                          \
        case 1: SET(attend_some)(q, 1, k, v, hd, scale, cap, f32); break;                                     \
        case 2: SET(attend_some)(q, 2, k, v, hd, scale, cap, f32); break;                                     \
        case 3: SET(attend_some)(q, 3, k, v, hd, scale, cap, f32); break;                                     \
        case 4: SET(attend_some)(q, 4, k, v, hd, scale, cap, f32); break;                                     \
        case 5: SET(attend_some)(q, 5, k, v, hd, scale, cap, f32); break;                                     \
        default: SET(attend_some)(q, 6, k, v, hd, scale, cap, f32); break;                                    \
        }                                                                                                     \
    }
ATTEND(attend_f16, 0)
ATTEND(attend_f32, 1)
#undef ATTEND

static void SET(feed_back)(float (*g)[STRIP], const float *h, size_t stride, int rows, float (*delta)[STRIP], int n)
{
    for (int i = 0; i < rows; i++, h += stride) {
        vf s[PARTS];
        for (int part = 0; part < PARTS; part++)
            s[part] = *(const vf *)(g[i] + part * LANES);
        for (int j = 0; j < n; j++)
            for (int part = 0; part < PARTS; part++)
                s[part] -= SET(all)(h[j]) * *(const vf *)(delta[j] + part * LANES);
        for (int part = 0; part < PARTS; part++)
            *(vf *)(g[i] + part * LANES) = s[part];
    }
}

#define REST(name) SET(name)
#else
#define REST(name) JOIN(name, KERNELS_REST)
#endif

static const struct kernels SET(kernels) = {
    KERNELS_NAME,
    { REST(matmul_f32), REST(matmul_f16), REST(matmul_bf16), SET(matmul_q4), SET(matmul_q4a),
      SET(matmul_q6), SET(matmul_q8) },
    REST(rmsnorm), REST(quantize), REST(glu), REST(rope),
    { REST(attend_f16), REST(attend_f32) }, REST(exp_sum), REST(feed_back), REST(read),
};

#undef REST
#undef KERNELS_REST

#undef JOIN2
#undef JOIN
#undef SET
#undef PARTS
#undef ABREAST
#undef STEP
#undef vf
#undef vi
#undef vu
#undef vb
#undef INSTANTIATE_SET
#undef RUN_KERNELS
#undef KERNELS_AVX2
#undef KERNELS_AVXVNNI
#undef KERNELS_AVX512
#undef KERNELS_NEON
#undef KERNELS_DOTPROD
#undef KERNELS_NAME
#undef LANES
#undef FLOAT_TOKENS

#ifdef KERNELS_TARGET
TARGET_END
#undef KERNELS_TARGET
#endif

#elif !defined RUN_DECLARATIONS

#define PREFETCH (24 * 576) /* bytes ahead: far enough for memory, near enough to stay in the first cache */

#ifdef __x86_64__
#define VECTOR_REGISTER "v" /* as inline assembly calls it */
#else
#define VECTOR_REGISTER "w"
#endif

#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET_BEGIN(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define TARGET_END PRAGMA(GCC pop_options)
#endif

#ifdef __x86_64__

#define RUN_KERNELS AVX2
#define KERNELS_AVX2
#define KERNELS_NAME "avx2"
#define KERNELS_TARGET "avx2,fma,f16c"
#define LANES 8
#define FLOAT_TOKENS 2
#include "run.c"

#define RUN_KERNELS AVXVNNI
#define KERNELS_AVXVNNI
#define KERNELS_NAME "avxvnni"
#define KERNELS_REST AVX2
#define KERNELS_TARGET "avx2,fma,f16c,avxvnni"
#define LANES 8
#define FLOAT_TOKENS 2
#include "run.c"

#define RUN_KERNELS AVX512
#define KERNELS_AVX512
#define KERNELS_NAME "avx512vnni"
#define KERNELS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define LANES 16
#define FLOAT_TOKENS 4
#include "run.c"

/* What __builtin_cpu_supports does not know in all supported compilers. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}

static int has_avxvnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

#else

#define RUN_KERNELS NEON
#define KERNELS_NEON
#define KERNELS_NAME "neon"
#define LANES 4
#define FLOAT_TOKENS 2
#include "run.c"

#define RUN_KERNELS DOTPROD
#define KERNELS_DOTPROD
#define KERNELS_NAME "dotprod"
#ifdef __clang__
#define KERNELS_TARGET "dotprod"
#else
#define KERNELS_TARGET "arch=armv8.2-a+dotprod"
#endif
#define KERNELS_REST NEON
#define LANES 4
#define FLOAT_TOKENS 2
#include "run.c"

static int has_dotprod(void)
{
#ifdef __linux__
    return getauxval(AT_HWCAP) >> 20 & 1;
#else
    return 1; /* Apple's */
#endif
}

#endif

/* What this machine can run, best first; the scalar kernels last. */
static int available_kernels(const struct kernels *list[4])
{
    int n = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        list[n++] = &kernels_AVX512;
    if (avx2 && has_avxvnni())
        list[n++] = &kernels_AVXVNNI;
    if (avx2)
        list[n++] = &kernels_AVX2;
#else
    if (has_dotprod())
        list[n++] = &kernels_DOTPROD;
    list[n++] = &kernels_NEON;
#endif
    list[n++] = &kernels_scalar;
    return n;
}

/* The best set, or the one that the environment variable RUN_ISA names. */
static const struct kernels *choose_kernels(run_error *error)
{
    const struct kernels *list[4];
    int n = available_kernels(list);
    const char *wanted = getenv("RUN_ISA");
    if (!wanted || !*wanted)
        return list[0];
    for (int i = 0; i < n; i++)
        if (!strcmp(wanted, list[i]->name))
            return list[i];
    fail(error, "this machine has no instruction set \"%.20s\" (RUN_ISA); its best is %s", wanted, list[0]->name);
    return NULL;
}

/* == PROGRAM =================================================================================

   The command line. Text goes to standard output, everything else to standard error. Exit status:
   0 done, 1 the work failed, 2 wrong usage.                                                   */

#ifndef RUN_LIBRARY

static const char usage_text[] =
    "usage: ./run MODEL [options]\n"
    "\n"
    "  -m MODE               generate, chat, perplexity, tokenize, info, bench, quantize\n"
    "                        (default: chat if the file has a chat format, else generate)\n"
    "\n"
    "text\n"
    "  -i TEXT               prompt, byte for byte\n"
    "  -f FILE               prompt from a file (- for standard input); quantize: see below\n"
    "  -y TEXT               system prompt (chat; default: the model's own)\n"
    "  -n N                  tokens to generate, 0: until the context is full (generate 256, chat 0)\n"
    "  --stop TEXT           end before this text; may be repeated\n"
    "  --special             the prompt may contain control tokens, the output shows them\n"
    "  --no-echo             generate: do not repeat the prompt\n"
    "\n"
    "sampling\n"
    "  -t NUMBER             temperature, 0: always the most probable token (0.8)\n"
    "  -k N                  keep the N most probable tokens, 0: all (40)\n"
    "  -p NUMBER             keep the most probable tokens up to this sum (0.95)\n"
    "  --min-p NUMBER        drop tokens less probable than this times the best (0.05)\n"
    "  --repeat-penalty X    divide the logits of the last 64 tokens by X (1)\n"
    "  -s N                  seed (default: drawn, and printed)\n"
    "\n"
    "engine\n"
    "  -c N                  context size in tokens (what the model was trained for, memory permitting)\n"
    "  -j N                  threads (physical cores this process may use)\n"
    "  --kv f16|f32          type of the key/value cache (f16)\n"
    "  --draft WHAT          auto: guess what comes next and check guesses together, if that saves time (default);\n"
    "                        off; lookup: only from what the text repeats; heads: only by the model's draft heads;\n"
    "                        FILE: heads from a file of their own, or a smaller model with the same tokens.\n"
    "                        The text is the same with each\n"
    "  --draft-max N         tokens to guess at most (15)\n"
    "  --draft-corpus FILE   a text to guess from, besides prompt and answer\n"
    "\n"
    "many at once (generate, chat)\n"
    "  --samples N           N answers to one prompt, which is not repeated\n"
    "  -f NAME.jsonl --json  a file of prompts, a line each: {\"prompt\":\"...\",\"chat\":true}; a result a line\n"
    "  -o FILE               where the results go; run again after an interruption, it goes on\n"
    "  --shard I/N           of the lines only every N-th, beginning with the I-th\n"
    "\n"
    "output\n"
    "  --json                one JSON object on standard output\n"
    "  --logprobs K          with --json: log-probabilities of each token and the K best\n"
    "  --verify              info: check the checksums of all tensors\n"
    "  --compare WHAT        bench: context, isa or threads: speed at each length, set or number\n"
    "  --draft WHAT          bench: what drafting gains, with three prompts or that of -i\n"
    "  -h                    this text\n"
    "\n"
    "quantize\n"
    "  -o FILE               the file to write\n"
    "  --type TYPE           auto, q4, q4a, q6, q8, f16, bf16, f32 (auto: exact where it can be)\n"
    "  --bits NUMBER         in place of --type: q4, q6 and q8 where they help most, an average of at most\n"
    "                        so many bits a weight (4.5 to 8.5; 5 is a good choice)\n"
    "  -f FILE               a text like those to come: errors that matter in it are kept small. -n tokens of\n"
    "                        it are used (8192), in windows of -c (512)\n"
    "\n"
    "environment: RUN_ISA forces an instruction set (info shows them)\n";

enum { MAX_STOPS = 64 };
enum mode { GENERATE, CHAT, PERPLEXITY, TOKENIZE, INFO, BENCH, QUANTIZE };      /* as in mode_names */

struct options {
    const char *model, *prompt, *prompt_file, *system, *output, *seed, *corpus, *shard_text, *draft_text, *stops[MAX_STOPS];
    int mode, n_stops, special, no_echo, json, verify, tokens, context, threads, kv_f32, logprobs, type, draft, draft_max, compare, samples, shard, shards;
    float bits;
    run_sampling sampling;
};

static int finish_output(void);

__attribute__((format(printf, 1, 2), noreturn))
static void wrong_usage(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "run: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (-h lists the options)\n");
    va_end(arguments);
    exit(2);
}

static int failure(const run_error *error)
{
    fprintf(stderr, "run: %s\n", error->text);
    return 1;
}

static const char *const mode_names[] = { "generate", "chat", "perplexity", "tokenize", "info", "bench", "quantize", NULL };
static const char *const target_names[] = { "auto", "f32", "f16", "bf16", "q4", "q4a", "q6", "q8", NULL };
static const char *const cache_names[] = { "f16", "f32", NULL }, *const draft_names[] = { "auto", "off", "lookup", "heads", NULL };
static const char *const compare_names[] = { "context", "isa", "threads", NULL };
enum { NOT = -1, BY_CONTEXT, BY_ISA, BY_THREADS };

/* Every option but -h and --stop: where its value goes, and what values there are. */
static const struct option {
    const char *name;
    enum { FLAG, TEXT, WORD, WHOLE, NUMBER } kind;
    size_t place;                   /* in struct options: int, const char *, int, int, float */
    double low, high;
    const char *const *words;
} all_options[] = {
#define PLACE(field) offsetof(struct options, field)
    { "-m", WORD, PLACE(mode), 0, 0, mode_names },
    { "-i", TEXT, PLACE(prompt), 0, 0, NULL },
    { "-f", TEXT, PLACE(prompt_file), 0, 0, NULL },
    { "-y", TEXT, PLACE(system), 0, 0, NULL },
    { "-n", WHOLE, PLACE(tokens), 0, INT_MAX, NULL },
    { "--special", FLAG, PLACE(special), 0, 0, NULL },
    { "--no-echo", FLAG, PLACE(no_echo), 0, 0, NULL },
    { "-t", NUMBER, PLACE(sampling.temperature), 0, 1000, NULL },
    { "-k", WHOLE, PLACE(sampling.top_k), 0, INT_MAX, NULL },
    { "-p", NUMBER, PLACE(sampling.top_p), 0, 1, NULL },
    { "--min-p", NUMBER, PLACE(sampling.min_p), 0, 1, NULL },
    { "--repeat-penalty", NUMBER, PLACE(sampling.repeat_penalty), 0.01, 100, NULL },
    { "-s", TEXT, PLACE(seed), 0, 0, NULL },
    { "-c", WHOLE, PLACE(context), 1, 1 << 26, NULL },
    { "-j", WHOLE, PLACE(threads), 1, 1024, NULL },
    { "--kv", WORD, PLACE(kv_f32), 0, 0, cache_names },
    { "--draft", TEXT, PLACE(draft_text), 0, 0, NULL },
    { "--draft-max", WHOLE, PLACE(draft_max), 1, RUN_DRAFT_MOST, NULL },
    { "--draft-corpus", TEXT, PLACE(corpus), 0, 0, NULL },
    { "--samples", WHOLE, PLACE(samples), 1, 1 << 20, NULL },
    { "--shard", TEXT, PLACE(shard_text), 0, 0, NULL },
    { "--compare", WORD, PLACE(compare), 0, 0, compare_names },
    { "--json", FLAG, PLACE(json), 0, 0, NULL },
    { "--logprobs", WHOLE, PLACE(logprobs), 0, INT_MAX, NULL },
    { "--type", WORD, PLACE(type), 0, 0, target_names },
    { "--bits", NUMBER, PLACE(bits), 4.5, 8.5, NULL },
    { "--verify", FLAG, PLACE(verify), 0, 0, NULL },
    { "-o", TEXT, PLACE(output), 0, 0, NULL },
#undef PLACE
};

static void set_option(struct options *o, const struct option *option, const char *value)
{
    char *place = (char *)o + option->place;
    int64_t whole = 1;
    double number;
    switch (option->kind) {
    case TEXT:
        memcpy(place, &value, sizeof value);
        return;
    case NUMBER:
        if (parse_number(value, option->low, option->high, &number))
            wrong_usage("%s takes a number from %g to %g, not \"%s\"", option->name, option->low, option->high, value);
        memcpy(place, &(float){ (float)number }, sizeof(float));
        return;
    case WHOLE:
        if (parse_integer(value, (int64_t)option->low, (int64_t)option->high, &whole))
            wrong_usage("%s takes a whole number from %.0f to %.0f, not \"%s\"", option->name, option->low, option->high, value);
        break;
    case WORD:
        for (whole = 0; option->words[whole] && strcmp(value, option->words[whole]); whole++)
            ;
        if (!option->words[whole]) {
            char all[200] = "";
            for (int i = 0; option->words[i]; i++)
                snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i ? ", " : "", option->words[i]);
            wrong_usage("%s takes one of %s, not \"%s\"", option->name, all, value);
        }
        break;
    case FLAG:
        break;
    }
    memcpy(place, &(int){ (int)whole }, sizeof(int));
}

static struct options parse_options(int n, char **words)
{
    struct options o = { .mode = -1, .tokens = -1, .logprobs = -1, .draft_max = RUN_DRAFT_MOST, .compare = NOT };
    o.sampling = (run_sampling){ .temperature = 0.8f, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1, .top_k = 40 };
    for (int i = 1; i < n; i++) {
        if (!strcmp(words[i], "-h") || !strcmp(words[i], "--help")) {
            fputs(usage_text, stdout);
            exit(finish_output());
        }
        if (words[i][0] != '-' || !words[i][1]) {
            if (o.model)
                wrong_usage("two model files: %s and %s", o.model, words[i]);
            o.model = words[i];
            continue;
        }
        const struct option *option = all_options, *end = option + sizeof all_options / sizeof *all_options;
        int stop = !strcmp(words[i], "--stop");
        while (option < end && strcmp(words[i], option->name))
            option++;
        if (option == end && !stop)
            wrong_usage("unknown option %s", words[i]);
        const char *value = stop || option->kind != FLAG ? words[++i] : NULL; /* words[n] is NULL */
        if (!value && (stop || option->kind != FLAG))
            wrong_usage("%s needs a value", words[i - 1]);
        if (!stop)
            set_option(&o, option, value);
        else if (!*value)
            wrong_usage("--stop needs a text that is not empty");
        else if (o.n_stops == MAX_STOPS)
            wrong_usage("at most %d --stop texts", MAX_STOPS);
        else
            o.stops[o.n_stops++] = value;
    }
    int64_t seed = 0;
    if (o.seed && parse_integer(o.seed, 0, INT64_MAX, &seed))
        wrong_usage("-s takes a whole number from 0 to %lld, not \"%s\"", (long long)INT64_MAX, o.seed);
    o.sampling.seed = (uint64_t)seed;
    if (!o.model)
        wrong_usage("which model? for example: ./run models/stories260K.bin");
    if (o.prompt && o.prompt_file)
        wrong_usage("-i and -f are two prompts; give one");
    while (o.draft_text && draft_names[o.draft] && strcmp(o.draft_text, draft_names[o.draft]))
        o.draft++;                      /* beyond the words: a file */
    FILE *file = draft_names[o.draft] ? NULL : fopen(o.draft_text, "rb");
    if (!draft_names[o.draft] && !file)
        wrong_usage("--draft takes one of auto, off, lookup, heads, or a file of draft heads or of a smaller model; \"%s\" is "
                    "none of the words and cannot be opened: %s", o.draft_text, strerror(errno));
    if (file)
        fclose(file);
    int end = 0;
    if (o.shard_text && (sscanf(o.shard_text, "%9d/%9d%n", &o.shard, &o.shards, &end) != 2 || o.shard_text[end] ||
                         o.shard < 1 || o.shard > o.shards))
        wrong_usage("--shard takes a part and the number of parts, such as 1/4, not \"%s\"", o.shard_text);
    return o;
}

/* -- input -- */

static int read_stream(FILE *file, struct text *t)
{
    char buffer[65536];
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, file)) > 0)
        text_add(t, buffer, n);
    return ferror(file) || t->broken ? -1 : 0;
}

/* The prompt of -i or -f, byte for byte. */
static int read_prompt(const struct options *o, struct text *t, run_error *error)
{
    text_add(t, "", 0);
    if (o->prompt)
        text_add(t, o->prompt, strlen(o->prompt));
    if (o->prompt_file) {
        FILE *file = strcmp(o->prompt_file, "-") ? fopen(o->prompt_file, "rb") : stdin;
        if (!file)
            return fail(error, "cannot open %.200s: %s", o->prompt_file, strerror(errno));
        errno = 0;
        int bad = read_stream(file, t);
        int reason = errno;
        if (file != stdin)
            fclose(file);
        if (bad)
            return fail(error, "cannot read %.200s: %s", o->prompt_file, strerror(reason ? reason : ENOMEM));
    }
    return t->broken ? fail(error, "out of memory for the prompt") : 0;
}

/* Without a tokenizer a prompt is a list of ids. */
static int parse_ids(const run_model *m, const struct text *t, int **ids, run_error *error)
{
    int n = 0;
    *ids = NULL;
    for (char *at = t->data; *(at += strspn(at, " \n\t\r"));) {
        char *end;
        long id = strtol(at, &end, 10);
        if (end == at || id < 0 || id >= m->config.vocab)
            return fail(error, "this model has no tokenizer, so a prompt is a list of token ids below %d", m->config.vocab);
        if (grow(ids, n, sizeof **ids))
            return fail(error, "out of memory");
        (*ids)[n++] = (int)id;
        at = end;
    }
    return n;
}

/* BOS, if the model wants one, and the tokens of a text. */
static int prompt_ids(const run_model *m, const struct text *t, int trusted, int add_bos, int **ids, run_error *error)
{
    int n = m->tokenizer ? run_tokenize(m, t->data, t->n, trusted, ids, error) : parse_ids(m, t, ids, error);
    if (n < 0)
        return -1;
    if (!add_bos)
        return n;
    int *longer = realloc(*ids, ((size_t)n + 1) * sizeof **ids);
    if (!longer) {
        free(*ids);
        return fail(error, "out of memory");
    }
    memmove(longer + 1, longer, (size_t)n * sizeof *longer);
    longer[0] = m->config.bos;
    *ids = longer;
    return n + 1;
}

/* -- chat: a conversation is rendered as one text, in which only the format's own parts are trusted -- */

enum role { SYSTEM, USER, ASSISTANT };

struct message {
    enum role role;
    char *text;
    size_t length;
};

struct chat {
    const run_model *model;
    int trusted;                    /* --special: what is said may contain control tokens */
    struct message *messages;
    int n;
};

static const char *format_text(const run_model *m, const char *key)
{
    const char *text = run_text(m, key);
    return text ? text : "";
}

/* White space as Python's str.strip() and jinja's trim see it; its length in bytes, or 0. */
static size_t space_at(const char *s, size_t left)
{
    const unsigned char *b = (const unsigned char *)s;
    if (left >= 1 && (*b == ' ' || (*b >= 9 && *b <= 13) || (*b >= 0x1c && *b <= 0x1f)))
        return 1;
    if (left >= 2 && *b == 0xc2 && (b[1] == 0x85 || b[1] == 0xa0))
        return 2;
    if (left < 3 || *b < 0xe1 || *b > 0xe3)
        return 0;
    unsigned c = (unsigned)(*b & 15) << 12 | (unsigned)(b[1] & 63) << 6 | (b[2] & 63);
    return c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000 ? 3 : 0;
}

struct rendering {
    const run_model *model;
    tokenizer_span *spans;
    int n, broken;
};

static void add_span(struct rendering *r, const char *text, size_t length, int trusted)
{
    if (!length)
        return;
    if (r->broken || grow(&r->spans, r->n, sizeof *r->spans))
        r->broken = 1;
    else
        r->spans[r->n++] = (tokenizer_span){ text, length, trusted };
}

static void add_fixed(struct rendering *r, const char *key)
{
    const char *text = format_text(r->model, key);
    add_span(r, text, strlen(text), 1);
}

/* Strips white space from the rendering's end back to span `from`, and from there on, if the format
   trims texts of this kind. */
static void trim_spans(struct rendering *r, int from, const char *kind)
{
    if (r->broken || !strstr(format_text(r->model, "chat.trim"), kind))
        return;
    for (int i = from; i < r->n; i++) {
        tokenizer_span *s = &r->spans[i];
        for (size_t n; (n = space_at(s->text, s->length)) > 0; s->text += n)
            s->length -= n;
        if (s->length)
            break;
    }
    for (int i = r->n - 1; i >= from; i--) {
        tokenizer_span *s = &r->spans[i];
        for (size_t n = 1; n <= 3 && n <= s->length;)
            if (space_at(s->text + s->length - n, n) == n)
                s->length -= n, n = 1;
            else
                n++;
        if (s->length)
            break;
    }
}

/* Of an answer in the history, what follows the thinking. */
static void cut_thinking(struct rendering *r, int from)
{
    const char *end = run_text(r->model, "chat.think.end"), *trim = format_text(r->model, "chat.think.trim");
    tokenizer_span *s = &r->spans[from];
    size_t skip = end ? strlen(end) : 0;
    if (r->broken || from == r->n || !skip)
        return;
    for (size_t at = s->length; at >= skip; at--)
        if (!memcmp(s->text + at - skip, end, skip)) {
            s->text += at;
            s->length -= at;
            while (!strcmp(trim, "newlines") && s->length && *s->text == '\n')
                s->text++, s->length--;
            if (!strcmp(trim, "space"))
                trim_spans(r, from, "");
            break;
        }
}

static void add_system(struct rendering *r, const struct message *system)
{
    add_fixed(r, "chat.system.before");
    int from = r->n;
    add_span(r, system->text, system->length, 0);
    trim_spans(r, from, "system");
    add_fixed(r, "chat.system.after");
}

/* begin, system, turns, and the beginning of the answer. An empty system prompt is none, unless the
   format keeps it. */
static int render_chat(const struct chat *c, struct rendering *r)
{
    const char *place = format_text(c->model, "chat.system.place"), *standard = run_text(c->model, "chat.system.default");
    struct message default_system = { SYSTEM, (char *)(uintptr_t)standard, standard ? strlen(standard) : 0 };
    const struct message *system = standard ? &default_system : NULL;
    int turns = 0;
    *r = (struct rendering){ .model = c->model };
    if (c->n && c->messages[0].role == SYSTEM &&
        (c->messages[0].length || !strcmp(format_text(c->model, "chat.system.empty"), "kept")))
        system = &c->messages[0];
    add_fixed(r, "chat.begin");
    if (system && !strcmp(place, "start"))
        add_system(r, system);
    for (int i = 0; i < c->n; i++) {
        const struct message *m = &c->messages[i];
        if (m->role == SYSTEM)
            continue;
        add_fixed(r, m->role == USER ? "chat.user.before" : "chat.assistant.before");
        int begin = r->n;
        if (system && ((turns == 0 && !strcmp(place, "first")) || (i == c->n - 1 && !strcmp(place, "last"))))
            add_system(r, system);
        int said = r->n;
        add_span(r, m->text, m->length, c->trusted && m->role == USER);
        trim_spans(r, said, m->role == USER ? "user" : "assistant");
        if (m->role == USER)
            trim_spans(r, begin, "turn");
        else
            cut_thinking(r, said);
        add_fixed(r, m->role == USER ? "chat.user.after" : "chat.assistant.after");
        turns++;
    }
    add_fixed(r, "chat.generate");
    return r->broken ? -1 : 0;
}

static int chat_ids(const struct chat *c, int **ids, run_error *error)
{
    struct rendering r;
    int n = 0, bad = render_chat(c, &r) || tokenizer_encode(c->model->tokenizer, r.spans, r.n, ids, &n);
    free(r.spans);
    return bad ? fail(error, "out of memory for the conversation") : n;
}

static int chat_add(struct chat *c, enum role role, const char *text, size_t length, run_error *error)
{
    char *copy = malloc(length + 1);
    if (!copy || grow(&c->messages, c->n, sizeof *c->messages)) {
        free(copy);
        return fail(error, "out of memory for the conversation");
    }
    memcpy(copy, text, length);
    c->messages[c->n++] = (struct message){ role, copy, length };
    return 0;
}

static void chat_drop(struct chat *c, int n)
{
    while (c->n > n)
        free(c->messages[--c->n].text);
}

/* Opens the conversation with a system prompt, if there is one. */
static int chat_begin(struct chat *c, const run_model *m, const char *system, run_error *error)
{
    *c = (struct chat){ .model = m };
    if (run_text(m, "chat.refused") && !run_text(m, "chat.user.before"))
        return fail(error, "this model's chat template could not be exported (%.300s); use -m generate",
                    run_text(m, "chat.refused"));
    if (!run_text(m, "chat.user.before") || !m->tokenizer)
        return fail(error, "this model file has no chat format; use -m generate");
    if (system && !*format_text(m, "chat.system.place"))
        return fail(error, "this model's chat format has no place for a system prompt");
    return system ? chat_add(c, SYSTEM, system, strlen(system), error) : 0;
}

/* -- one generation with its output -- */

struct output {                     /* what the callback collects */
    const struct options *options;
    run_session *session;
    struct text text;
    int *ids;
    int n;
    struct text logprobs;           /* JSON */
    int live;                       /* text goes to standard output as it comes */
    int broken;
    double prompt_seconds, seconds;
    int prompt_tokens;
};

/* Natural logarithm of the softmax of raw logits: *log_total is log(sum(exp(logit))). */
static int log_total(const run_model *m, const float *logits, double *result)
{
    float max = logits[best_of(logits, m->config.vocab)];
    double sum = m->kernels->exp_sum(logits, m->config.vocab, max, 1);
    if (!(sum >= 1 && sum <= DBL_MAX) || !(max <= FLT_MAX && max >= -FLT_MAX))
        return -1;
    *result = (double)max + log_double(sum);
    return 0;
}

/* {"id":..,"logprob":..,"top":[[id,logprob],...]} */
static int add_logprobs(struct text *t, run_session *s, const float *logits, int id, int k)
{
    double total;
    int vocab = s->model->config.vocab;
    if (log_total(s->model, logits, &total))
        return -1;
    k = k < vocab ? k : vocab;
    if (t->n)
        text_print(t, ",");
    text_print(t, "{\"id\":%d,\"logprob\":%.9g,\"top\":[", id, (double)logits[id] - total);
    select_first(logits, vocab, k, s->order);
    for (int i = 0; i < k; i++)
        text_print(t, "%s[%d,%.9g]", i ? "," : "", s->order[i], (double)logits[s->order[i]] - total);
    text_print(t, "]}");
    return t->broken ? -1 : 0;
}

static int collect(void *context, int id, const char *text, size_t length)
{
    struct output *o = context;
    text_add(&o->text, text, length);
    if (id >= 0) {
        if (grow(&o->ids, o->n, sizeof *o->ids))
            return o->broken = 1;
        o->ids[o->n++] = id;
        if (o->options->json && o->options->logprobs >= 0 &&
            add_logprobs(&o->logprobs, o->session, run_logits(o->session), id, o->options->logprobs))
            return o->broken = 1;
        if (o->live && !o->session->model->tokenizer)
            printf(" %d", id);
    }
    if (o->live && (length || !o->session->model->tokenizer)) {
        fwrite(text, 1, length, stdout);
        fflush(stdout);
    }
    return interrupted || o->broken || ferror(stdout);
}

/* Reads the prompt in pieces, so that it can be interrupted and a person sees that it goes on. */
static int read_in(run_session *s, const int *ids, int n, run_error *error)
{
    for (int done = 0; done < n && !interrupted;) {
        int chunk = n - done < CHUNK ? n - done : CHUNK;
        if (isatty(2) && n > 8 * CHUNK)
            fprintf(stderr, "\rreading %d of %d tokens", done, n);
        if (eval(s, ids + done, chunk, done + chunk == n, error))
            return -1;
        done += chunk;
    }
    if (isatty(2) && n > 8 * CHUNK)
        fprintf(stderr, "\r%40s\r", "");
    return 0;
}

static run_generation generation_of(const struct options *o, struct output *out, int max_tokens)
{
    return (run_generation){ .sampling = o->sampling, .max_tokens = max_tokens, .stops = o->stops, .n_stops = o->n_stops,
                             .show_special = o->special, .callback = collect, .context = out,
                             .draft = (enum run_draft)o->draft, .draft_max = o->draft_max };
}

/* Makes the session's timeline equal ids, reading only what it does not have yet; then generates. */
static int answer(struct output *o, const int *ids, int n, int max_tokens, run_result *result, run_error *error)
{
    run_session *s = o->session;
    run_generation how = generation_of(o->options, o, max_tokens);
    int common = 0;
    while (common < n - 1 && common < s->length && s->tokens[common] == ids[common])
        common++;
    *result = (run_result){ .stop = RUN_CANCELLED };
    if (n > s->context)
        return fail(error, "the prompt has %d tokens, the context only %d positions (-c; in a conversation /reset makes room)", n,
                    s->context);
    double start = seconds();
    interrupted = 0;
    if (run_rewind(s, common, error) || read_in(s, ids + common, n - common, error))
        return -1;
    o->prompt_tokens = n - common;
    o->prompt_seconds = seconds() - start;
    start = seconds();
    int failed = s->wanted ? run_generate(s, &how, result, error) : 0;
    o->seconds = seconds() - start;
    return failed ? -1 : o->broken ? fail(error, "out of memory, or a logit is not finite") : 0;
}

static double rate(int n, double time) { return n > 0 && time > 0 ? n / time : 0; }

/* A pass gives one token by itself; each guess that stood is another. */
static double tokens_per_pass(const run_result *r) { return r->passes ? 1 + (double)r->accepted / r->passes : 0; }

/* Of the speed: how much drafting added, by the estimate of what passes of one token each would take. */
static double net_gain(const run_result *r)
{
    return r->drafted && r->seconds > 0 ? (r->alone_seconds - r->draft_seconds - r->verify_seconds) / r->seconds : 0;
}

static void print_statistics(const struct output *o, const run_result *r)
{
    fprintf(stderr, "prompt: %d tokens, %.1f tok/s; generated: %d tokens, %.1f tok/s", o->prompt_tokens,
            rate(o->prompt_tokens, o->prompt_seconds), r->tokens, rate(r->tokens, o->seconds));
    if (r->drafted)
        fprintf(stderr, "; drafted: %d of %d guesses right, %.2f tokens a pass", r->accepted, r->drafted, tokens_per_pass(r));
    if (r->drafted && r->tokens >= 64)  /* an estimate: of fewer tokens it would be noise */
        fprintf(stderr, ", speed about %+.0f %%", 100 * net_gain(r));
    if (!r->drafted && o->options && o->options->draft != RUN_DRAFT_OFF && r->tokens > 16)
        fprintf(stderr, "; no guesses, as they would not pay");
    if (o->options && o->options->sampling.temperature > 0)
        fprintf(stderr, "; seed %llu", (unsigned long long)o->options->sampling.seed);
    fprintf(stderr, r->stop == RUN_CANCELLED ? "; interrupted\n" : "\n");
}

/* Prints what was put together, and frees it. */
static int print_text(struct text *t, run_error *error)
{
    int failed = t->broken ? fail(error, "out of memory for the output") : 0;
    if (!failed && t->n)
        fwrite(t->data, 1, t->n, stdout);
    free(t->data);
    return failed;
}

static void print_ids(struct text *t, const int *ids, int n)
{
    text_print(t, "[");
    for (int i = 0; i < n; i++)
        text_print(t, "%s%d", i ? "," : "", ids[i]);
    text_print(t, "]");
}

static const char *const drafter_names[RUN_DRAFTERS] = { "lookup", "heads", "model" };

/* More members of the object "stats". */
static void print_drafting(struct text *t, const run_result *r)
{
    int deepest = RUN_DRAFT_MOST;
    text_print(t, ",\"tokens_per_pass\":%.4g,\"draft_s\":%.6g,\"verify_s\":%.6g,\"tok_s_without\":%.6g,\"drafters\":{",
               tokens_per_pass(r), r->draft_seconds, r->verify_seconds, rate(r->tokens, r->seconds * (1 + net_gain(r))));
    for (int i = 0, n = 0; i < RUN_DRAFTERS; i++)
        if (r->drafted_by[i])
            text_print(t, "%s\"%s\":[%d,%d]", n++ ? "," : "", drafter_names[i], r->accepted_by[i], r->drafted_by[i]);
    text_print(t, "},\"by_position\":[");
    while (deepest > 0 && !r->drafted_at[deepest - 1])
        deepest--;
    for (int i = 0; i < deepest; i++)
        text_print(t, "%s[%d,%d]", i ? "," : "", r->accepted_at[i], r->drafted_at[i]);
    text_print(t, "]");
}

/* The members of a result. */
static void add_result(struct text *t, const struct output *o, const int *ids, int n, const run_result *r)
{
    static const char *const stops[] = { "length", "eos", "stop", "context", "cancelled" };
    text_print(t, "\"prompt_ids\":");
    print_ids(t, ids, n);
    text_print(t, ",\"ids\":");
    print_ids(t, o->ids, o->n);
    text_print(t, ",\"text\":");
    text_json(t, o->text.data ? o->text.data : "", o->text.n);
    text_print(t, ",\"stop\":\"%s\",\"stats\":{\"prompt_tok_s\":%.6g,\"decode_tok_s\":%.6g,\"passes\":%d,\"drafted\":%d,"
               "\"accepted\":%d,\"net_gain\":%.4g", stops[r->stop], rate(o->prompt_tokens, o->prompt_seconds),
               rate(r->tokens, o->seconds), r->passes, r->drafted, r->accepted, net_gain(r));
    if (r->drafted)
        print_drafting(t, r);
    text_print(t, "}");
    if (o->options->logprobs >= 0) {
        text_print(t, ",\"logprobs\":[");
        text_add(t, o->logprobs.data ? o->logprobs.data : "", o->logprobs.n);
        text_print(t, "]");
    }
}

static int print_result(const struct output *o, const int *ids, int n, const run_result *r, run_error *error)
{
    struct text t = { 0 };
    text_print(&t, "{");
    add_result(&t, o, ids, n, r);
    text_print(&t, "}\n");
    if (!o->options->seed && o->options->sampling.temperature > 0)
        fprintf(stderr, "seed %llu\n", (unsigned long long)o->options->sampling.seed);
    return print_text(&t, error);
}

static void output_close(struct output *o)
{
    free(o->text.data);
    free(o->ids);
    free(o->logprobs.data);
}

/* Everything written reached its place. */
static int finish_output(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return 0;
    fprintf(stderr, "run: cannot write the output: %s\n", strerror(errno));
    return 1;
}

/* -- modes -- */

/* The tokens of a prompt, which may be a turn of a conversation. Returns their number, or -1. */
static int tokens_of_prompt(const run_session *s, const struct options *o, const struct text *prompt, int chat, int **ids,
                            run_error *error)
{
    const run_model *m = s->model;
    struct chat c = { .model = m };
    int n = -1;
    if (!chat) {
        n = prompt_ids(m, prompt, o->special, m->config.add_bos || (!prompt->n && m->config.bos >= 0), ids, error);
    } else if (chat_begin(&c, m, o->system, error) == 0) {
        c.trusted = o->special;
        n = chat_add(&c, USER, prompt->data, prompt->n, error) ? -1 : chat_ids(&c, ids, error);
        chat_drop(&c, 0);
        free(c.messages);
    }
    if (n == 0)
        return fail(error, "the prompt is empty, and this model has no BOS token to begin with");
    return n <= s->context ? n : fail(error, "the prompt has %d tokens, the context only %d positions (-c)", n, s->context);
}

static int mode_generate(const struct options *o, run_session *s, run_error *error)
{
    struct text prompt = { 0 };
    struct output out = { .options = o, .session = s };
    run_result result;
    int *ids = NULL, n = read_prompt(o, &prompt, error) ? -1 : tokens_of_prompt(s, o, &prompt, 0, &ids, error), failed = n < 0;
    if (!failed) {
        if ((out.live = !o->json) && !o->no_echo) {
            fwrite(prompt.data, 1, prompt.n, stdout);
            fflush(stdout);
        }
        failed = answer(&out, ids, n, o->tokens < 0 ? 256 : o->tokens, &result, error);
    }
    if (!failed && o->json)
        failed = print_result(&out, ids, n, &result, error);
    if (out.live && (failed || !out.text.n || out.text.data[out.text.n - 1] != '\n'))
        putchar('\n');
    fflush(stdout);
    if (!failed && !o->json) {
        print_statistics(&out, &result);
        if (result.stop == RUN_CONTEXT)
            fprintf(stderr, "the context of %d tokens is full\n", s->context);
    }
    output_close(&out);
    free(ids);
    free(prompt.data);
    return failed ? failure(error) : finish_output();
}

/* One turn: what the user said is in the conversation already; the answer is added to it. */
static int chat_turn(struct chat *c, const struct options *o, run_session *s, struct output *last, run_result *result,
                     run_error *error)
{
    struct output out = { .options = o, .session = s, .live = !o->json };
    int *ids = NULL, n = chat_ids(c, &ids, error);
    int failed = n < 0 ? -1 : answer(&out, ids, n, o->tokens < 0 ? 0 : o->tokens, result, error);
    if (!failed && o->json)
        failed = print_result(&out, ids, n, result, error);
    if (!failed && !o->json) {
        putchar('\n');
        fflush(stdout);
        if (result->stop == RUN_CONTEXT)
            fprintf(stderr, "(the context of %d tokens is full)\n", s->context);
    }
    if (!failed)
        failed = chat_add(c, ASSISTANT, out.text.data ? out.text.data : "", out.text.n, error);
    *last = out;
    last->text = last->logprobs = (struct text){ 0 };
    last->ids = NULL;
    output_close(&out);
    free(ids);
    return failed;
}

/* A line of input without its end; lines that end in a backslash go on. 0 at the end of input. */
static int read_line(struct text *line)
{
    line->n = 0;
    text_add(line, "", 0);
    for (;;) {
        int c = getchar();
        if (c == EOF && !feof(stdin) && errno == EINTR) { /* Ctrl-C while waiting */
            clearerr(stdin);
            interrupted = 0;
            fprintf(stderr, "\n(/exit or Ctrl-D leaves)\n> ");
            line->n = 0;
            continue;
        }
        if (c == EOF)
            return line->n > 0;
        if (c == '\n') {
            if (line->n && line->data[line->n - 1] == '\\') {
                line->data[line->n - 1] = '\n';
                continue;
            }
            return 1;
        }
        text_add(line, &(char){ (char)c }, 1);
    }
}

static const char chat_help[] =
    "/help           this text\n"
    "/reset          forget the conversation\n"
    "/system TEXT    forget it and set the system prompt (no text: the model's own)\n"
    "/regen          another answer to the last question\n"
    "/stats          speed of the last answer, tokens in the context\n"
    "/exit, /quit    leave (or Ctrl-D); Ctrl-C stops an answer\n"
    "A line that ends in \\ goes on in the next one.\n";

static int converse(const struct options *o, run_session *s, struct chat *c, run_error *error)
{
    struct text line = { 0 };
    struct output last = { 0 };
    struct options now = *o;
    run_result result = { 0 };
    const char *letters = "abcdefghijklmnopqrstuvwxyz"; /* of a command; /etc/passwd is none */
    int person = isatty(0), failed = 0;
    if (person)
        fprintf(stderr, "%s - /help lists the commands (seed %llu)\n",
                run_text(s->model, "name") ? run_text(s->model, "name") : o->model, (unsigned long long)o->sampling.seed);
    for (;;) {
        int opening = c->n && c->messages[0].role == SYSTEM, ask = 0;
        if (person)
            fprintf(stderr, "> ");
        if (!read_line(&line))
            break;
        while (line.data[0] == '/' && line.data[line.n - 1] == ' ')
            line.data[--line.n] = '\0';
        if (!strcmp(line.data, "/exit") || !strcmp(line.data, "/quit")) {
            break;
        } else if (!strcmp(line.data, "/help")) {
            fputs(chat_help, stderr);
        } else if (!strcmp(line.data, "/stats")) {
            print_statistics(&last, &result);
            fprintf(stderr, "context: %d of %d tokens\n", s->length, s->context);
        } else if (!strcmp(line.data, "/reset")) {
            chat_drop(c, opening);
            fprintf(stderr, "(forgotten)\n");
            if (run_rewind(s, 0, error))
                failure(error);
        } else if (!strncmp(line.data, "/system", 7) && (line.data[7] == ' ' || !line.data[7])) {
            chat_drop(c, 0);
            free(c->messages);
            if (chat_begin(c, s->model, line.data[7] ? line.data + 8 : NULL, error))
                failure(error);
            else
                fprintf(stderr, "(forgotten; the system prompt is %s)\n", line.data[7] ? "set" : "the model's own");
            c->trusted = o->special;
        } else if (!strcmp(line.data, "/regen")) {
            if ((ask = c->n > opening + 1)) {
                chat_drop(c, c->n - 1);
                now.sampling.stream++;
            } else {
                fprintf(stderr, "(there is no answer yet)\n");
            }
        } else if (line.data[0] == '/' && line.data[1] && strcspn(line.data + 1, " ") == strspn(line.data + 1, letters)) {
            fprintf(stderr, "(no such command; /help lists them)\n");
        } else if (line.n) {
            if ((failed = chat_add(c, USER, line.data, line.n, error)))
                break;
            ask = 1;
        }
        if (ask && chat_turn(c, &now, s, &last, &result, error)) {
            chat_drop(c, c->n - 1); /* what could not be answered was not said */
            failure(error);
        }
        if (ferror(stdout))
            break;
    }
    if (person)
        fprintf(stderr, "\n");
    free(line.data);
    return failed ? failure(error) : finish_output();
}

static int mode_chat(const struct options *o, run_session *s, run_error *error)
{
    struct chat c;
    struct text prompt = { 0 };
    struct output last;
    run_result result = { 0 };
    int status = 0;
    int refused = chat_begin(&c, s->model, o->system, error);
    c.trusted = o->special;
    if (refused) {
        status = failure(error);
    } else if (!o->prompt && !o->prompt_file) {
        if (o->json)
            wrong_usage("--json needs a prompt (-i or -f)");
        status = converse(o, s, &c, error);
    } else if (read_prompt(o, &prompt, error) || chat_add(&c, USER, prompt.data, prompt.n, error) ||
               chat_turn(&c, o, s, &last, &result, error)) {
        status = failure(error);
    } else {
        if (!o->json)
            print_statistics(&last, &result);
        status = finish_output();
    }
    free(prompt.data);
    chat_drop(&c, 0);
    free(c.messages);
    return status;
}

/* -- many at once: a file of prompts, or several answers to one -- */

struct request {
    char *line;                     /* the members of the input's object, as they stand there; NULL: a sample */
    struct text prompt;
    int chat;
    struct text result;             /* its line of output, when it is done */
    int done;
};

static int take_digits(struct scanner *s)
{
    const char *start = s->at;
    while (s->at < s->end && *s->at >= '0' && *s->at <= '9')
        s->at++;
    return (int)(s->at - start);
}

/* -12.5e+3, as JSON has it. */
static int skip_number(struct scanner *s)
{
    s->at += s->at < s->end && *s->at == '-';
    int zero = s->at < s->end && *s->at == '0', n = take_digits(s);
    if (n == 0 || (zero && n > 1))
        return 0;
    if (s->at < s->end && *s->at == '.' && (s->at++, !take_digits(s)))
        return 0;
    if (s->at < s->end && (*s->at == 'e' || *s->at == 'E')) {
        s->at++;
        s->at += s->at < s->end && (*s->at == '+' || *s->at == '-');
        return take_digits(s) > 0;
    }
    return 1;
}

/* One JSON value of any kind, at most 100 deep. 1 if there was one. */
static int skip_value(struct scanner *s, int depth)
{
    static const char *const words[] = { "true", "false", "null" };
    skip_space(s);
    char c = s->at < s->end ? *s->at : '\0', close = c == '{' ? '}' : ']';
    if (c == '"')
        return take_string(s) != NULL;
    for (int i = 0; i < 3; i++)
        if ((size_t)(s->end - s->at) >= strlen(words[i]) && !memcmp(s->at, words[i], strlen(words[i])))
            return s->at += strlen(words[i]), 1;
    if (c != '{' && c != '[')
        return skip_number(s);
    if (depth == 100)
        return 0;
    s->at++;
    if (take(s, close))
        return 1;
    do
        if ((c == '{' && !(take_string(s) && take(s, ':'))) || !skip_value(s, depth + 1))
            return 0;
    while (take(s, ','));
    return take(s, close);
}

/* {"prompt":"...","chat":true, ...}: the prompt, whether it is a turn of a conversation, and all that
   stands between the braces. */
static int read_request(struct request *q, const char *line, size_t n, int number, run_error *error)
{
    static const char *const ours[] = { "prompt_ids", "ids", "text", "stop", "stats", "logprobs", "error" };
    char *strings = malloc(n + 1), *prompt = NULL;
    const char *reserved = NULL;
    struct scanner s = { line, line + n, strings };
    int utf8 = 1;
    for (size_t i = 0, length; i < n && utf8; i += length)
        utf8 = (length = (size_t)utf8_length((const unsigned char *)line + i, n - i)) > 0;
    int good = utf8 && strings && take(&s, '{');
    const char *first = s.at;
    for (int more = 1; good && more; more = take(&s, ',')) {
        char *key = take_string(&s);
        if (!(good = key && take(&s, ':')))
            break;
        skip_space(&s);
        for (int i = 0; i < 7; i++)
            reserved = strcmp(key, ours[i]) ? reserved : ours[i];
        if (!strcmp(key, "prompt")) {
            good = (prompt = take_string(&s)) != NULL;
        } else {
            const char *value = s.at;
            good = skip_value(&s, 0);
            if (good && !strcmp(key, "chat")) {
                q->chat = *value == 't';
                good = *value == 't' || *value == 'f';
            }
        }
    }
    const char *end = s.at;
    good = good && take(&s, '}') && prompt;
    skip_space(&s);
    good = good && s.at == s.end;
    if (good && !reserved) {
        text_add(&q->prompt, prompt, strlen(prompt));
        good = (q->line = malloc((size_t)(end - first) + 1)) && !q->prompt.broken;
        if (good)
            memcpy(q->line, first, (size_t)(end - first)), q->line[end - first] = '\0';
    }
    free(strings);
    return !utf8 ? fail(error, "line %d is not valid UTF-8", number) :
           !good ? fail(error, "line %d is not an object like {\"prompt\":\"...\",\"chat\":true} (without \\u0000)", number) :
           reserved ? fail(error, "line %d has a member \"%s\", as the results have: name it otherwise", number, reserved) : 0;
}

struct batch {
    const struct options *o;
    struct request *requests;
    int n, next, written;           /* requests; the first not begun; the first whose result is not written */
    run_session *base;              /* of samples: the prompt has been read there */
    FILE *out;
    int kept, failures, passes;
    long long tokens;
};

struct slot {                       /* where one text at a time is generated */
    struct generator g;
    struct output out;
    run_generation how;
    run_session *s;
    int *ids, n, request, busy;
};

/* A result as text. */
static void print_sample(struct text *t, const struct batch *b, const struct slot *slot, const char *problem)
{
    if (b->n > 1)
        text_print(t, "--- %d\n", slot->request + 1);
    if (problem)
        text_print(t, "%s\n", problem);
    if (slot->s->model->tokenizer)
        text_add(t, slot->out.text.data ? slot->out.text.data : "", slot->out.text.n);
    for (int i = 0; !slot->s->model->tokenizer && i < slot->out.n; i++)
        text_print(t, " %d", slot->out.ids[i]);
    text_print(t, "\n");
}

/* A result as a line of JSON: what came in, and what came out or what went wrong. */
static void print_line(struct text *t, const struct request *q, const struct slot *slot, const char *problem)
{
    text_print(t, "{");
    if (q->line)
        text_add(t, q->line, strlen(q->line));
    else
        text_print(t, "\"sample\":%d", slot->request);
    text_print(t, ",");
    if (problem) {
        text_print(t, "\"error\":");
        text_json(t, problem, strlen(problem));
    } else {
        add_result(t, &slot->out, slot->ids, slot->n, &slot->g.r);
    }
    text_print(t, "}\n");
}

static void finish_slot(struct batch *b, struct slot *slot, const char *problem)
{
    struct request *q = &b->requests[slot->request];
    slot->out.seconds = slot->g.r.seconds;
    if (b->o->json)
        print_line(&q->result, q, slot, problem);
    else
        print_sample(&q->result, b, slot, problem);
    b->tokens += problem ? 0 : slot->g.r.tokens;
    b->failures += problem != NULL;
    q->done = 1;
    output_close(&slot->out);
    free(slot->ids);
    *slot = (struct slot){ .s = slot->s };
}

/* Reads the next prompt in and draws its first token. */
static void begin_slot(struct batch *b, struct slot *slot)
{
    const struct options *o = b->o;
    struct request *q = &b->requests[slot->request = b->next++];
    run_error error = { "" };
    int failed = 0, most = o->tokens >= 0 ? o->tokens : q->chat ? 0 : 256;
    slot->out = (struct output){ .options = o, .session = slot->s };
    slot->how = generation_of(o, &slot->out, most);
    slot->busy = 1;
    double start = seconds();
    if (b->base) {                      /* all but the last token of the prompt are there */
        slot->n = b->base->length;
        slot->how.sampling.stream = (uint64_t)slot->request;
        failed = !(slot->ids = malloc((size_t)slot->n * sizeof *slot->ids));
        if (!failed) {
            memcpy(slot->ids, b->base->tokens, (size_t)slot->n * sizeof *slot->ids);
            copy_timeline(slot->s, b->base);
            failed = run_rewind(slot->s, slot->n - 1, &error) || run_eval(slot->s, slot->ids + slot->n - 1, 1, &error);
        }
    } else {
        slot->n = tokens_of_prompt(slot->s, o, &q->prompt, q->chat, &slot->ids, &error);
        failed = slot->n < 0 || run_rewind(slot->s, 0, &error) || read_in(slot->s, slot->ids, slot->n, &error);
    }
    if (interrupted) {                  /* it has not begun */
        slot->busy = 0;
        return;
    }
    slot->out.prompt_tokens = slot->n;
    slot->out.prompt_seconds = seconds() - start;
    if (failed || generator_open(&slot->g, slot->s, &slot->how, &error)) {
        finish_slot(b, slot, *error.text ? error.text : "out of memory");
        return;
    }
    slot->g.began = seconds();
    draw_on(&slot->g, &error);
    if (slot->g.failed || slot->g.done) {
        generator_close(&slot->g);
        finish_slot(b, slot, slot->g.failed ? error.text : NULL);
    }
}

/* Runs all requests, `n` at a time; results are written in their order. */
static int run_batch(struct batch *b, struct slot *slots, int n, run_error *error)
{
    struct generator *active[LOGIT_ROWS];
    while (b->written < b->n && !interrupted) {
        int n_active = 0;
        for (int i = 0; i < n; i++) {
            while (!slots[i].busy && b->next < b->n && !interrupted)
                begin_slot(b, &slots[i]);
            if (slots[i].busy)
                active[n_active++] = &slots[i].g;
        }
        for (; b->written < b->n && b->requests[b->written].done && !interrupted; b->written++) {
            struct text *t = &b->requests[b->written].result;
            if (t->broken || fwrite(t->data, 1, t->n, b->out) != t->n || fflush(b->out))
                return fail(error, t->broken ? "out of memory" : "cannot write a result: %s", strerror(errno));
            free(t->data);
            *t = (struct text){ 0 };
            if (isatty(2))
                fprintf(stderr, "\r%d of %d ", b->written + 1, b->n);
        }
        if (!n_active || interrupted)
            continue;
        run_error why = { "" };
        int failed = advance(active, n_active, &why);
        b->passes++;
        for (int i = 0; i < n; i++) {
            struct generator *g = &slots[i].g;
            if (!slots[i].busy)
                continue;
            if (failed && n_active > 1) { /* which of them was it? */
                g->failed = 0;
                advance(&g, 1, &why);
                b->passes++;
            }
            if (!g->failed)
                draw_on(g, &why);
            if (g->failed || g->done) {
                g->r.seconds = seconds() - g->began;
                generator_close(g);
                finish_slot(b, &slots[i], g->failed ? why.text : NULL);
            }
        }
    }
    if (isatty(2))
        fprintf(stderr, "\r%40s\r", "");
    return !interrupted ? 0 : fail(error, "interrupted: %d of %d results are written%s", b->written, b->n,
                                   b->o->output && !b->base ? "; the same command goes on from there" : "");
}

/* Whether a line [n] without its end is the result of a request, as far as it goes; *failed: an error. */
static int is_result(const char *line, size_t n, int whole, const struct request *q, int *failed)
{
    size_t length = strlen(q->line), given = n < length + 2 ? n : length + 2;
    char *start = malloc(length + 3), *strings = malloc(n + 1);
    struct scanner s = { line, line + n, strings };
    int same = start && strings && snprintf(start, length + 3, "{%s,", q->line) && !memcmp(line, start, given);
    if (same && whole)
        same = n > length + 2 && skip_value(&s, 0) && s.at == s.end;
    *failed = same && whole && n > length + 10 && !memcmp(line + length + 2, "\"error\":", 8);
    free(start);
    free(strings);
    return same;
}

/* Lines that an interrupted run has left in the output file are kept, if they answer the same
   requests; half a line is cut off. */
static int resume(struct batch *b, const char *path, run_error *error)
{
    struct text old = { 0 };
    struct stat status;
    FILE *file = stat(path, &status) == 0 && S_ISREG(status.st_mode) ? fopen(path, "rb") : NULL;
    size_t at = 0;
    if (file) {
        int bad = read_stream(file, &old);
        fclose(file);
        if (bad)
            return free(old.data), fail(error, "cannot read %.200s", path);
    }
    while (at < old.n) {
        const char *end = memchr(old.data + at, '\n', old.n - at);
        size_t n = end ? (size_t)(end - old.data) - at : old.n - at;
        int failed = 0;
        if (b->written == b->n || !is_result(old.data + at, n, end != NULL, &b->requests[b->written], &failed)) {
            free(old.data);
            return fail(error, "%.200s holds something else than results of these prompts; remove it or name another file", path);
        }
        if (!end)
            break;
        at += n + 1;
        b->written++;
        b->failures += failed;
    }
    free(old.data);
    b->next = b->kept = b->written;
    if (!(b->out = fopen(path, at ? "rb+" : "wb")) || fstat(fileno(b->out), &status) ||
        (S_ISREG(status.st_mode) && (ftruncate(fileno(b->out), (off_t)at) || fseek(b->out, 0, SEEK_END))))
        return fail(error, "cannot write %.200s: %s", path, strerror(errno));
    return 0;
}

/* Every line of the prompt file that belongs to this shard. */
static int read_requests(struct batch *b, const struct text *file, enum mode mode, run_error *error)
{
    int number = 0;
    for (size_t at = file->n >= 3 && !memcmp(file->data, "\xef\xbb\xbf", 3) ? 3 : 0; at < file->n;) { /* after a byte order mark */
        const char *line = file->data + at, *end = memchr(line, '\n', file->n - at);
        size_t n = end ? (size_t)(end - line) : file->n - at;
        at += n + 1;
        number++;
        if (strspn(line, " \t\r") >= n)
            continue;
        struct request q = { .chat = mode == CHAT };
        if (read_request(&q, line, n, number, error) || grow(&b->requests, b->n, sizeof *b->requests)) {
            free(q.line);
            free(q.prompt.data);
            return -1;
        }
        if (b->o->shards && (number - 1) % b->o->shards != b->o->shard - 1) {
            free(q.line);
            free(q.prompt.data);
        } else {
            b->requests[b->n++] = q;
        }
    }
    return 0;
}

static int mode_batch(const struct options *o, run_session *s, enum mode mode, run_error *error)
{
    struct batch b = { .o = o, .out = stdout };
    struct slot slots[LOGIT_ROWS] = { 0 };
    struct text prompt = { 0 };
    int failed = read_prompt(o, &prompt, error), n_slots = 0;
    double start = seconds();
    interrupted = 0;
    if (!failed && !o->samples) {
        failed = read_requests(&b, &prompt, mode, error) || (o->output && resume(&b, o->output, error));
    } else if (!failed) {
        int *ids = NULL, n = tokens_of_prompt(s, o, &prompt, mode == CHAT, &ids, error);
        failed = n < 0 || read_in(s, ids, n, error);
        if (!failed && !(b.requests = calloc((size_t)o->samples, sizeof *b.requests)))
            failed = fail(error, "out of memory for %d samples", o->samples);
        free(ids);
        b.n = failed ? 0 : o->samples;
        for (int i = 0; i < b.n; i++)
            b.requests[i].chat = mode == CHAT;
        b.base = s;
    }
    size_t memory = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / 2, each = cache_bytes(s->model, s->context, s->cache_f32);
    while (!failed && n_slots < LOGIT_ROWS && n_slots < b.n - b.next && (!n_slots || (size_t)(n_slots + 1) * each <= memory)) {
        slots[n_slots].s = !n_slots && !b.base ? s : session_open(s->model, &(run_options){ s->context, 0, s->cache_f32, 1 }, s->pass, NULL, error);
        if (!slots[n_slots++].s)
            failed = -1;
    }
    failed = failed || run_batch(&b, slots, n_slots, error);
    if (!failed) {
        if (b.kept)
            fprintf(stderr, "%d results of an earlier run kept; ", b.kept);
        fprintf(stderr, "%d results, %lld tokens in %d passes, %.1f tok/s", b.n - b.kept, b.tokens, b.passes,
                (double)b.tokens / (seconds() - start));
        if (b.failures)
            fprintf(stderr, "; %d of the %d failed", b.failures, b.n);
        if (o->sampling.temperature > 0)
            fprintf(stderr, "; seed %llu", (unsigned long long)o->sampling.seed);
        fprintf(stderr, "\n");
    }
    for (int i = 0; i < n_slots; i++) {
        if (slots[i].busy)
            generator_close(&slots[i].g);
        output_close(&slots[i].out);
        free(slots[i].ids);
        if (slots[i].s != s)
            run_session_close(slots[i].s);
    }
    for (int i = 0; i < b.n; i++) {
        free(b.requests[i].line);
        free(b.requests[i].prompt.data);
        free(b.requests[i].result.data);
    }
    free(b.requests);
    free(prompt.data);
    if (b.out && b.out != stdout && fclose(b.out) && !failed)
        failed = fail(error, "cannot write %.200s: %s", o->output, strerror(errno));
    return failed ? failure(error) : b.failures ? 1 : finish_output();
}

/* Scores a text in windows that do not overlap: -log p of each token given those before it. */
static int mode_perplexity(const struct options *o, run_session *s, run_error *error)
{
    const run_model *m = s->model;
    struct text text = { 0 }, logprobs = { 0 };
    int *ids = NULL, bos = m->config.add_bos, window = s->context;
    int n = read_prompt(o, &text, error) ? -1 : prompt_ids(m, &text, o->special, 0, &ids, error);
    int failed = n < 0 ? -1 : 0, scored = 0;
    double nll = 0;
    if (!failed && n + bos < 2)
        failed = fail(error, "perplexity needs a text of at least %s (-f FILE)", bos ? "one token" : "two tokens");
    if (!failed && window < 2)
        failed = fail(error, "perplexity needs a context of at least 2");
    for (int at = 0, inputs; at < n && !failed; at += inputs - bos) {
        int row[LOGIT_ROWS];
        inputs = n - at + bos < window ? n - at + bos : window;
        failed = run_rewind(s, 0, error);
        for (int done = 0; done < inputs && !failed; done += LOGIT_ROWS) {
            int chunk = inputs - done < LOGIT_ROWS ? inputs - done : LOGIT_ROWS;
            for (int i = 0; i < chunk; i++)
                row[i] = done + i < bos ? m->config.bos : ids[at + done + i - bos];
            if ((failed = eval(s, row, chunk, chunk, error)))
                break;
            for (int i = 0; i < chunk && done + i + 1 < inputs && !failed; i++) {
                const float *logits = s->pass->logits + (size_t)i * (size_t)m->config.vocab;
                int next = ids[at + done + i + 1 - bos];
                double total;
                if (log_total(m, logits, &total))
                    failed = fail(error, "a logit at position %d is not finite", done + i);
                else if (o->json && o->logprobs >= 0 && add_logprobs(&logprobs, s, logits, next, o->logprobs))
                    failed = fail(error, "out of memory");
                else
                    nll -= (double)logits[next] - total, scored++;
            }
        }
        if (isatty(2) && !o->json)
            fprintf(stderr, "\r%d of %d tokens, perplexity %.4f ", at + inputs - bos, n, exp_double(scored ? nll / scored : 0));
    }
    if (isatty(2) && !o->json && !failed)
        fprintf(stderr, "\r%60s\r", "");
    if (!failed && o->json) {
        printf("{\"tokens\":%d,\"nll\":%.9g,\"perplexity\":%.9g", scored, nll / scored, exp_double(nll / scored));
        if (o->logprobs >= 0)
            printf(",\"logprobs\":[%s]", logprobs.data ? logprobs.data : "");
        printf("}\n");
    } else if (!failed) {
        printf("perplexity %.4f (%d tokens, %.6f nats each)\n", exp_double(nll / scored), scored, nll / scored);
    }
    free(text.data);
    free(logprobs.data);
    free(ids);
    return failed ? failure(error) : finish_output();
}

static int mode_tokenize(const struct options *o, const run_model *m, run_error *error)
{
    struct text text = { 0 }, t = { 0 };
    int *ids = NULL, n = -1;
    if (!m->tokenizer)
        fail(error, "this model file has no tokenizer; it takes token ids");
    else if (!read_prompt(o, &text, error))
        n = run_tokenize(m, text.data, text.n, o->special, &ids, error);
    if (n >= 0 && o->json) {
        text_print(&t, "{\"ids\":");
        print_ids(&t, ids, n);
        text_print(&t, ",\"pieces\":[");
    }
    for (int i = 0; i < n; i++) {
        size_t length;
        const char *piece = run_piece(m, ids[i], &length);
        if (o->json) {
            text_add(&t, ",", i > 0);
            text_json(&t, piece ? piece : "", length);
        } else {
            text_print(&t, "%d ", ids[i]);
            text_json(&t, piece ? piece : "", length);
            text_print(&t, "\n");
        }
    }
    if (n >= 0 && o->json)
        text_print(&t, "]}\n");
    int failed = n < 0 ? -1 : print_text(&t, error);
    free(ids);
    free(text.data);
    return failed ? failure(error) : finish_output();
}

/* FNV-1a over the logits of 16 fixed tokens. */
static int fingerprint(run_session *s, char digits[17], run_error *error)
{
    int vocab = s->model->config.vocab, n = s->context < LOGIT_ROWS ? s->context : LOGIT_ROWS, ids[LOGIT_ROWS];
    uint64_t hash = 0xcbf29ce484222325;
    for (int i = 0; i < n; i++)
        ids[i] = (int)((int64_t)i * 7919 % vocab);
    if (run_rewind(s, 0, error) || eval(s, ids, n, n, error))
        return -1;
    for (size_t i = 0; i < (size_t)n * (size_t)vocab; i++)
        for (int k = 0; k < 32; k += 8)
            hash = (hash ^ (bits_of(s->pass->logits[i]) >> k & 255)) * 0x100000001b3;
    snprintf(digits, 17, "%016llx", (unsigned long long)hash);
    return 0;
}

/* Compares every tensor with the checksum that the metadata has for it. */
static int verify(const struct container *c, run_error *error)
{
    int checked = 0, unchecked = 0;
    for (int i = 0; i < c->n_tensors; i++) {
        const struct tensor *t = &c->tensors[i];
        const char *wanted = find_packing(c, "crc32.", t->name);
        char digits[9];
        if (!wanted) {
            unchecked += !is_pad(t->name);
            continue;
        }
        snprintf(digits, sizeof digits, "%08x", (unsigned)crc32_of(0, t->data, t->size));
        if (strcmp(digits, wanted))
            return fail(error, "tensor %.100s is damaged: its checksum is %s, not %.20s", t->name, digits, wanted);
        checked++;
    }
    fprintf(stderr, "%d tensors match their checksums", checked);
    fprintf(stderr, unchecked ? ", %d have none\n" : "\n", unchecked);
    return 0;
}

static const char *tensor_type(const struct container *c, const struct tensor *t, char word[24])
{
    const char *packing = find_packing(c, "packed.", t->name);
    if (!packing)
        packing = find_packing(c, "ggml.", t->name);
    snprintf(word, 24, "%.*s", packing ? (int)strcspn(packing, " \"\\") : 8, packing ? packing : t->dtype);
    for (char *at = word; *at; at++)
        if ((unsigned char)*at < 0x20 || (unsigned char)*at >= 0x7f)
            *at = '?';
    return word;
}

static double count_parameters(const run_model *m)
{
    double n = 0;
    for (int i = 0; i < m->file.n_tensors; i++) {
        const struct tensor *t = &m->file.tensors[i];
        struct matrix w;
        run_error ignored;
        double cells = 1;
        if (!t->used || !strncmp(t->name, "tokenizer.", 10))
            continue;
        for (int k = 0; k < t->n_dims; k++)
            cells *= (double)t->shape[k];
        n += is_weight(t, &m->file) && matrix_describe(&m->file, t, &w, &ignored) == 0 ? (double)w.rows * w.cols : cells;
    }
    return n;
}

/* Everything the file says, even if it cannot be run. */
static void add_metadata(struct text *t, const struct options *o, const struct container *c)
{
    for (int i = 0, comma = 0; i < c->n_entries; i++) {
        const struct entry *e = &c->entries[i];
        if (!strncmp(e->key, "packed.", 7) || !strncmp(e->key, "ggml.", 5) || !strncmp(e->key, "crc32.", 6))
            continue;
        if (o->json)
            text_add(t, ",", comma++ > 0);
        else
            text_print(t, "  ");
        text_json(t, e->key, strlen(e->key));
        text_print(t, o->json ? ":" : " ");
        text_json(t, e->value, strlen(e->value));
        if (!o->json)
            text_print(t, "\n");
    }
}

/* The tensors of a file; `used`: a model was made of it, so that those nobody asked for are unknown. */
static void add_tensors(struct text *t, const struct options *o, const struct container *file, int used)
{
    run_error none;
    char word[24];
    for (int i = 0, comma = 0; i < file->n_tensors; i++) {
        const struct tensor *x = &file->tensors[i];
        struct matrix shape = { 0 };
        if (is_pad(x->name))
            continue;
        if (o->json) {
            text_print(t, "%s{\"name\":", comma++ ? "," : "");
            text_json(t, x->name, strlen(x->name));
            text_print(t, ",\"type\":\"%s\",\"shape\":[", tensor_type(file, x, word));
        } else {
            run_error name;         /* without control characters */
            fail(&name, "%s", x->name);
            text_print(t, "  %-36s %-8s ", name.text, tensor_type(file, x, word));
        }
        if (is_weight(x, file) && matrix_describe(file, x, &shape, &none) == 0)
            text_print(t, o->json ? "%d,%d" : "%d x %d", shape.rows, shape.cols);
        else
            for (int k = 0; k < x->n_dims; k++)
                text_print(t, o->json ? "%s%lld" : "%.0s%lld ", k ? "," : "", (long long)x->shape[k]);
        int known = x->used || !used;
        text_print(t, o->json ? "],\"bytes\":%zu,\"known\":%s}" : "  %zu bytes%s\n", x->size,
                   o->json ? known ? "true" : "false" : known ? "" : "  UNKNOWN: nothing uses it");
    }
}

static void add_heads(struct text *t, const struct options *o, const run_model *m)
{
    for (int i = 0; i < m->n_heads; i++) {
        const struct head *h = &m->heads[i];
        const struct matrix *x[] = { &h->mixing.e_proj, &h->mixing.h_proj, &h->mixing.fuse };
        size_t bytes = h->model.weight_bytes;
        for (int k = 0; k < 3; k++)
            bytes += x[k]->rows ? matrix_bytes(x[k]->type, x[k]->rows, x[k]->cols) : 0;
        text_print(t, o->json ? "%s{\"kind\":\"%s\",\"rows\":%d,\"bytes\":%zu,\"acceptance\":[" :
                   "%.0sdraft head    %s, %d output rows, %zu bytes a proposal", i ? "," : "", head_kinds[h->kind],
                   h->model.config.vocab, bytes);
        for (const char *a = h->acceptance ? h->acceptance : ""; *a; a += strcspn(a, " ") + (a[strcspn(a, " ")] == ' '))
            text_print(t, o->json ? "%s%.*s" : "%s%.*s", a == h->acceptance ? o->json ? "" : "; acceptance when made " : o->json ? "," : " ",
                       (int)strcspn(a, " "), a);
        text_print(t, o->json ? "]}" : "\n");
    }
}

/* What the model is, and what runs it here. */
static void add_facts(struct text *t, const struct options *o, const run_model *m, const run_session *s)
{
    const struct kernels *list[4];
    int n = available_kernels(list);
    const char *kind = m->tokenizer ? run_text(m, "tokenizer.merge") : "none";
    text_print(t, o->json ? ",\"parameters\":%.0f" : "parameters    %.0f\n", count_parameters(m));
    text_print(t, o->json ? ",\"bytes_per_token\":%zu" : "bytes/token   %zu read of the weights\n", m->weight_bytes);
    text_print(t, o->json ? ",\"cache_bytes_per_token\":%zu" : "cache         %zu bytes a token\n",
               (size_t)m->config.layers * (size_t)(m->config.kv * m->config.hd) * 2 * (o->kv_f32 ? 4 : 2));
    text_print(t, o->json ? ",\"tokenizer\":\"%s\"" : "tokenizer     %s\n", kind ? kind : "rank");
    text_print(t, o->json ? ",\"chat\":%s" : "chat format   %s\n",
               run_text(m, "chat.user.before") ? o->json ? "true" : "yes" : o->json ? "false" : "none");
    text_print(t, o->json ? ",\"heads\":[" : m->n_heads ? "" : "draft heads   none\n");
    add_heads(t, o, m);
    text_print(t, o->json ? "]" : "%s", "");
    text_print(t, o->json ? ",\"isa\":\"%s\",\"isas\":[" : "instructions  %s, of", m->kernels->name);
    for (int i = 0; i < n; i++)
        text_print(t, o->json ? "%s\"%s\"" : "%.0s %s", i ? "," : "", list[i]->name);
    text_print(t, o->json ? "],\"threads\":%d" : "\nthreads       %d\n", s ? s->pass->team->size : 0);
}

static int mode_info(const struct options *o, run_error *error)
{
    struct container c;
    struct text t = { 0 };
    run_error why;
    char digits[17] = "";
    if (container_open(&c, o->model, error))
        return failure(error);
    if (o->verify && verify(&c, error)) {
        container_close(&c);
        return failure(error);
    }
    run_model *m = run_open(o->model, &why);
    run_session *s = m ? run_session_open(m, &(run_options){ 64, o->threads, o->kv_f32, 1 }, &why) : NULL;
    int unrun = !s || fingerprint(s, digits, &why);
    const struct container *file = m ? &m->file : &c;

    text_print(&t, o->json ? "{\"file\":" : "file          ");
    if (o->json)
        text_json(&t, o->model, strlen(o->model));
    else
        text_add(&t, o->model, strlen(o->model));
    text_print(&t, o->json ? ",\"bytes\":%zu,\"metadata\":{" : "\nbytes         %zu\n", c.size);
    add_metadata(&t, o, &c);
    text_print(&t, o->json ? "},\"tensors\":[" : "tensors       %d\n", c.n_tensors);
    add_tensors(&t, o, file, m != NULL);
    text_print(&t, o->json ? "]" : "%s", "");
    if (m)
        add_facts(&t, o, m, s);
    text_print(&t, o->json ? ",\"fingerprint\":\"%s\"}\n" : unrun ? "%.0s" : "fingerprint   %s\n", digits);
    int status = print_text(&t, error) ? failure(error) : finish_output();
    if (unrun && failure(&why))
        status = is_heads(&c) ? status : 1;
    run_session_close(s);
    run_close(m);
    container_close(&c);
    return status;
}

/* -- bench -- */

enum { REPEATS = 7, N_PROMPTS = 2, N_WIDTHS = 5 };
static const int prompt_lengths[N_PROMPTS] = { 128, 512 }, widths[N_WIDTHS] = { 1, 2, 4, 8, LOGIT_ROWS };

struct spread { double low, middle, high; };    /* seconds: fastest, median, slowest of REPEATS */

struct figures {
    struct spread decode;           /* of a token, greedy, sampling included */
    struct spread prompts[N_PROMPTS];           /* of a whole prompt; 0 if the context is too small */
    struct spread passes[N_WIDTHS]; /* of a pass over k tokens, logits of all of them included */
    int decoded, cached;            /* tokens of a run of decode; positions behind which passes run */
    double parts[N_PARTS], sampler; /* of decode, seconds a token */
    double bandwidth, rate;         /* bytes, multiply-adds a second: of memory, in cache */
    double cold, warm;              /* seconds from opening the file to the first token */
    char fingerprint[17];
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct spread spread_of(double times[REPEATS])
{
    qsort(times, REPEATS, sizeof *times, by_value);
    return (struct spread){ times[0], times[REPEATS / 2], times[REPEATS - 1] };
}

struct load {                       /* work for all threads that is nothing but reading or multiplying */
    run_session *session;
    const uint64_t *words;
    size_t n;
    _Atomic uint64_t sum;           /* so that reading cannot be optimised away */
};

static void read_memory(void *context, int me)
{
    struct load *l = context;
    struct team *team = l->session->pass->team;
    int begin, end;
    while (next_piece(team, me, (int)(l->n / 8192), 8, &begin, &end))
        l->sum += l->session->model->kernels->read(l->words + (size_t)begin * 8192, (size_t)(end - begin) * 8192);
    barrier(team);
}

/* Bytes a second that all threads together read from a buffer as large as the weights. */
static int read_bandwidth(run_session *s, double *bandwidth, run_error *error)
{
    size_t bytes = s->model->weight_bytes;
    bytes = bytes < 1 << 20 ? 1 << 20 : bytes > 1 << 30 ? 1 << 30 : bytes;
    uint64_t *words = malloc(bytes);
    if (!words)
        return fail(error, "out of memory for measuring the read bandwidth");
    memset(words, 1, bytes);
    struct load l = { s, words, bytes / 8, 0 };
    *bandwidth = 0;
    for (double start = seconds(), before; seconds() - start < 1;) {
        before = seconds();
        team_run(s->pass->team, 0, read_memory, &l);
        double speed = (double)(l.n / 8192 * 65536) / (seconds() - before);
        *bandwidth = speed > *bandwidth ? speed : *bandwidth;
    }
    free(words);
    return 0;
}

enum { RATE_STRIPS = 4, RATE_TIMES = 200 };

/* Every thread multiplies the same few strips with eight tokens, again and again. */
static void multiply_in_cache(void *context, int me)
{
    const struct load *l = context;
    struct pass *p = l->session->pass;
    const struct matrix *w = &p->model->layers[0].gate;
    float tile[TILE * STRIP];
    (void)me;
    for (int i = 0; i < RATE_TIMES * RATE_STRIPS; i++)
        p->model->kernels->matmul[w->type](tile, w, i % RATE_STRIPS % (int)strips(w->rows), &p->norm, 0, 8);
    barrier(p->team);
}

/* Multiply-adds a second of all threads together where nothing waits for memory. */
static double rate_in_cache(run_session *s)
{
    struct pass *p = s->pass;
    const struct matrix *w = &s->model->layers[0].gate;
    struct load l = { .session = s };
    double best = 0;
    p->norm.n = 8;                  /* whatever the last pass left there */
    for (int i = 0; i < 2 * REPEATS; i++) {
        double start = seconds();
        team_run(p->team, 0, multiply_in_cache, &l);
        double speed = 8.0 * RATE_TIMES * RATE_STRIPS * STRIP * w->cols * p->team->active / (seconds() - start);
        best = speed > best ? speed : best;
    }
    return best;
}

/* Time of one pass over k tokens behind `cached` others: with the logits of all k if that is possible,
   else of the last only. */
static int time_pass(run_session *s, int cached, int k, struct spread *time, run_error *error)
{
    int ids[1024], most = k <= LOGIT_ROWS ? 40 : 1;
    double times[REPEATS];
    if (isatty(2))
        fprintf(stderr, "\rmeasuring a pass over %d tokens behind %d %8s\r", k, cached, "");
    for (int i = 0; i < 1024; i++)
        ids[i] = (int)((int64_t)i * 7919 % s->model->config.vocab);
    if (run_rewind(s, cached < s->length ? cached : s->length, error))
        return -1;
    for (int n; s->length < cached;) {
        n = cached - s->length < 1024 ? cached - s->length : 1024;
        if (eval(s, ids, n, 0, error))
            return -1;
    }
    for (int i = 0; i < REPEATS; i++) {
        int n = 0;
        double start = seconds();
        do {
            if (run_rewind(s, cached, error) || eval(s, ids, k, k <= LOGIT_ROWS ? k : 1, error))
                return -1;
        } while (++n < most && seconds() - start < 0.25);
        times[i] = (seconds() - start) / n;
    }
    *time = spread_of(times);
    return 0;
}

/* Time of a token of greedy decoding, in runs of f->decoded tokens; the parts of it too. */
static int time_decode(run_session *s, struct figures *f, run_error *error)
{
    run_sampling greedy = { .repeat_penalty = 1 };
    double times[REPEATS];
    int tokens = 0;
    memset(s->pass->parts, 0, sizeof s->pass->parts);
    f->sampler = 0;
    f->decoded = s->context < 256 ? s->context : 256;
    for (int i = 0; i < REPEATS; i++) {
        int id = s->model->config.bos > 0 ? s->model->config.bos : 1 % s->model->config.vocab, done = 0;
        if (run_rewind(s, 0, error) || run_eval(s, &id, 1, error))
            return -1;
        double start = seconds(), before;
        for (; done < f->decoded - 1 && seconds() - start < 1; done++) {
            before = seconds();
            if ((id = run_sample(s, &greedy, error)) < 0)
                return -1;
            f->sampler += seconds() - before;
            s->pass->timed = 1;
            int failed = run_eval(s, &id, 1, error);
            s->pass->timed = 0;
            if (failed)
                return -1;
        }
        times[i] = (seconds() - start) / (done ? done : 1);
        tokens += done;
    }
    for (int i = 0; i < N_PARTS; i++)
        f->parts[i] = s->pass->parts[i] / (tokens ? tokens : 1);
    f->sampler /= tokens ? tokens : 1;
    f->decode = spread_of(times);
    return 0;
}

/* Seconds from opening the file to the logits of a first token; cold: after the system has been asked to
   forget what it has of the file. */
static int time_start(const struct options *o, int cold, double *time, run_error *error)
{
#ifdef __linux__
    int file = cold ? open(o->model, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
        close(file);
    }
#else
    (void)cold;
#endif
    double start = seconds();
    run_model *m = run_open(o->model, error);
    run_session *s = m ? run_session_open(m, &(run_options){ 64, o->threads, o->kv_f32, 1 }, error) : NULL;
    int failed = !s || run_eval(s, &(int){ 0 }, 1, error);
    *time = seconds() - start;
    run_session_close(s);
    run_close(m);
    return failed ? -1 : 0;
}

static int measure(run_session *s, struct figures *f, run_error *error)
{
    int room = s->context;
    f->cached = room - LOGIT_ROWS < 256 ? room - LOGIT_ROWS : 256;
    if (read_bandwidth(s, &f->bandwidth, error) || fingerprint(s, f->fingerprint, error) || time_decode(s, f, error))
        return -1;
    for (int i = 0; i < N_PROMPTS; i++)
        if (prompt_lengths[i] <= room && time_pass(s, 0, prompt_lengths[i], &f->prompts[i], error))
            return -1;
    for (int i = 0; i < N_WIDTHS; i++)
        if (time_pass(s, f->cached, widths[i], &f->passes[i], error))
            return -1;
    f->rate = rate_in_cache(s);
    return 0;
}

static double inverse(double x) { return x > 0 ? 1 / x : 0; }

static const char *const part_names[N_PARTS] = { "embedding", "norms", "q k v", "attention", "attention output",
    "gate, up", "down", "logits" };

/* The least time that a pass over k tokens can take: the larger of reading and multiplying. */
static double limit_of(const run_session *s, const struct figures *f, int k)
{
    double reading = (double)s->model->weight_bytes / f->bandwidth, multiplying = k * s->model->weights / f->rate;
    return reading > multiplying ? reading : multiplying;
}

static void print_figures(struct text *t, const run_session *s, const struct figures *f)
{
    const run_model *m = s->model;
    double total = f->sampler;
    text_print(t, "decode        %9.1f tok/s   (%.1f to %.1f in %d runs of up to %d tokens)\n", 1 / f->decode.middle,
               1 / f->decode.high, 1 / f->decode.low, REPEATS, f->decoded);
    for (int i = 0; i < N_PROMPTS; i++)
        if (f->prompts[i].middle > 0)
            text_print(t, "prompt %4d   %9.1f tok/s   (%.1f to %.1f)\n", prompt_lengths[i],
                       prompt_lengths[i] / f->prompts[i].middle, prompt_lengths[i] / f->prompts[i].high,
                       prompt_lengths[i] / f->prompts[i].low);
    text_print(t, "\na pass over k tokens behind %d others, with all logits: its time, c(k), which is that over the time for\n"
               "one token, and how often the least time fits in that memory and arithmetic allow\n", f->cached);
    for (int i = 0; i < N_WIDTHS; i++)
        text_print(t, "  k = %-2d      %9.3f ms   c = %.2f   %.2f times the least\n", widths[i], 1e3 * f->passes[i].middle,
                   f->passes[i].middle / f->passes[0].middle, f->passes[i].middle / limit_of(s, f, widths[i]));
    text_print(t, "\nmemory        %9.2f GB/s read; a token reads %zu bytes of weights: decode has %.0f %% of what that allows\n",
               f->bandwidth / 1e9, m->weight_bytes, 100 * (double)m->weight_bytes / f->decode.middle / f->bandwidth);
    text_print(t, "arithmetic    %9.2f G multiply-adds/s with %s weights in cache, 8 tokens\n", f->rate / 1e9,
               type_names[m->layers[0].gate.type]);
    for (int i = 0; i < N_PARTS; i++)
        total += f->parts[i];
    text_print(t, "\na token's time by part (on the first thread)\n");
    for (int i = 0; i < N_PARTS; i++)
        text_print(t, "  %-18s %8.1f us  %4.1f %%\n", part_names[i], 1e6 * f->parts[i], 100 * f->parts[i] / total);
    text_print(t, "  %-18s %8.1f us  %4.1f %%\n", "sampler", 1e6 * f->sampler, 100 * f->sampler / total);
    text_print(t, "\nstart         %9.1f ms from opening the file to the first token, %.1f ms from disk\n", 1e3 * f->warm, 1e3 * f->cold);
    const struct team *team = s->pass->team;
    text_print(t, "instructions  %s, %d threads", m->kernels->name, team->size);
    if (team->took < 0.99 * team->size * team->runs)
        text_print(t, " (%.2f took part, since others kept the cores busy)", team->took / team->runs);
    text_print(t, "; fingerprint %s\n", f->fingerprint);
}

static void print_figures_json(struct text *t, const run_session *s, const struct figures *f)
{
    const run_model *m = s->model;
    text_print(t, "{\"decode\":{\"tok_s\":%.6g,\"min\":%.6g,\"max\":%.6g},\"prompt\":{", 1 / f->decode.middle,
               1 / f->decode.high, 1 / f->decode.low);
    for (int i = 0; i < N_PROMPTS; i++)
        text_print(t, "%s\"%d\":%.6g", i ? "," : "", prompt_lengths[i], prompt_lengths[i] * inverse(f->prompts[i].middle));
    text_print(t, "},\"c\":{");
    for (int i = 0; i < N_WIDTHS; i++)
        text_print(t, "%s\"%d\":%.4g", i ? "," : "", widths[i], f->passes[i].middle / f->passes[0].middle);
    text_print(t, "},\"pass_ms\":{");
    for (int i = 0; i < N_WIDTHS; i++)
        text_print(t, "%s\"%d\":%.5g", i ? "," : "", widths[i], 1e3 * f->passes[i].middle);
    text_print(t, "},\"times_least\":{");
    for (int i = 0; i < N_WIDTHS; i++)
        text_print(t, "%s\"%d\":%.4g", i ? "," : "", widths[i], f->passes[i].middle / limit_of(s, f, widths[i]));
    text_print(t, "},\"parts_us\":{");
    for (int i = 0; i < N_PARTS; i++)
        text_print(t, "\"%s\":%.4g,", part_names[i], 1e6 * f->parts[i]);
    text_print(t, "\"sampler\":%.4g},\"read_gb_s\":%.4g,\"gmac_s\":%.4g,\"bytes_per_token\":%zu,\"roofline\":%.4g", 1e6 * f->sampler,
               f->bandwidth / 1e9, f->rate / 1e9, m->weight_bytes,
               (double)m->weight_bytes / f->decode.middle / f->bandwidth);
    text_print(t, ",\"start_ms\":{\"cold\":%.4g,\"warm\":%.4g}", 1e3 * f->cold, 1e3 * f->warm);
    text_print(t, ",\"isa\":\"%s\",\"threads\":%d,\"fingerprint\":\"%s\"}\n", m->kernels->name, s->pass->team->size, f->fingerprint);
}

/* Decode and prompt speed behind texts of several lengths, or with each instruction set, or number of threads. */
static int compare(const struct options *o, run_session *s, struct text *t, run_error *error)
{
    const struct kernels *list[4];
    int n_isas = available_kernels(list), most = s->pass->team->size;
    for (int i = 0;; i++) {
        run_session *used = s;
        struct spread one = { 0 }, prompt = { 0 };
        char label[24];
        int cached = o->compare == BY_CONTEXT && i ? 128 << i : 0;
        if (o->compare == BY_CONTEXT ? cached >= s->context : i == (o->compare == BY_ISA ? n_isas : most))
            break;
        snprintf(label, sizeof label, "%d", o->compare == BY_CONTEXT ? cached : i + 1);
        if (o->compare == BY_ISA) {
            ((run_model *)(uintptr_t)s->model)->kernels = list[i]; /* nobody else uses this model */
            snprintf(label, sizeof label, o->json ? "\"%s\"" : "%s", list[i]->name);
        }
        if (o->compare == BY_THREADS &&
            !(used = run_session_open(s->model, &(run_options){ s->context, i + 1, s->cache_f32, 1 }, error)))
            return -1;
        int failed = time_pass(used, cached, 1, &one, error) ||
                     (cached + 128 <= s->context && time_pass(used, cached, 128, &prompt, error));
        if (used != s)
            run_session_close(used);
        if (failed)
            return -1;
        text_print(t, o->json ? "%s{\"%s\":%s,\"decode_tok_s\":%.6g,\"prompt_tok_s\":%.6g}" : "%.0s%-8s %-12s decode %9.1f tok/s",
                   t->n ? "," : "{\"compare\":[", compare_names[o->compare], label, inverse(one.middle), 128 * inverse(prompt.middle));
        if (!o->json)
            text_print(t, prompt.middle > 0 ? "   prompt of 128 %9.1f tok/s\n" : "\n", 128 * inverse(prompt.middle));
    }
    text_print(t, o->json ? "]}\n" : "");
    return 0;
}

/* Generates a text and adds what came of it to *sum. */
static int bench_text(const struct options *o, run_session *s, const struct text *prompt, int draft, run_result *sum, run_error *error)
{
    struct options one = *o;
    struct output out = { .options = &one, .session = s };
    run_result r = { 0 };
    int *ids = NULL, chat = run_text(s->model, "chat.user.before") && s->model->tokenizer;
    one.draft = draft;
    int n = tokens_of_prompt(s, &one, prompt, chat, &ids, error);
    int failed = n < 0 || answer(&out, ids, n, o->tokens < 0 ? 128 : o->tokens, &r, error);
    sum->tokens += r.tokens;
    sum->passes += r.passes;
    sum->drafted += r.drafted;
    sum->accepted += r.accepted;
    sum->seconds += r.seconds;
    sum->alone_seconds += r.alone_seconds;
    sum->draft_seconds += r.draft_seconds;
    sum->verify_seconds += r.verify_seconds;
    for (int k = 0; k < RUN_DRAFT_MOST; k++) {
        sum->drafted_at[k] += r.drafted_at[k];
        sum->accepted_at[k] += r.accepted_at[k];
    }
    for (int k = 0; k < RUN_DRAFTERS; k++) {
        sum->drafted_by[k] += r.drafted_by[k];
        sum->accepted_by[k] += r.accepted_by[k];
    }
    output_close(&out);
    free(ids);
    return failed ? -1 : interrupted ? fail(error, "interrupted") : 0;
}

/* Generates the same texts with drafting and without, in turns: what it gains. Then once with every
   guess of heads or a second model checked: how good they are. */
static int bench_drafting(const struct options *o, run_session *s, const struct text *prompt, struct text *t, run_error *error)
{
    static char questions[][64] = { "Explain how a bicycle stays upright.", "Write a Python function that reverses a list.",
                                    "Once upon a time there was a little girl named Lily. She" };
    const struct text ours[] = { { .data = questions[0], .n = strlen(questions[0]) }, { .data = questions[1], .n = strlen(questions[1]) },
                                 { .data = questions[2], .n = strlen(questions[2]) } }, *texts = prompt->data ? prompt : ours;
    enum { PLACES = 4 };
    int n = prompt->data ? 1 : 3;
    double times[2][REPEATS], ratios[REPEATS];
    run_result sums[2] = { { 0 } }, checked = { 0 };
    for (int round = 0; round < REPEATS; round++) {
        double before[2] = { sums[0].seconds, sums[1].seconds };
        int tokens = sums[0].tokens;
        for (int i = 0; i < 2 * n; i++) {
            int drafts = (i + round) % 2;
            if (bench_text(o, s, &texts[i / 2], drafts ? o->draft : RUN_DRAFT_OFF, &sums[drafts], error))
                return -1;
        }
        for (int i = 0; i < 2; i++)
            times[i][round] = (sums[i].seconds - before[i]) / (sums[0].tokens - tokens + 1e-9);
        ratios[round] = times[1][round] / times[0][round];
    }
    if (s->drafting && s->drafting->ask) {
        struct options four = *o;
        four.draft_max = PLACES;
        s->drafting->always = 1;
        for (int i = 0; i < n; i++)
            if (bench_text(&four, s, &texts[i], RUN_DRAFT_HEADS, &checked, error))
                return -1;
        s->drafting->always = 0;
    }
    struct spread off = spread_of(times[0]), on = spread_of(times[1]), ratio = spread_of(ratios);
    const run_result *r = &sums[1];
    text_print(t, o->json ? "{\"draft\":{\"tok_s\":%.6g,\"tok_s_off\":%.6g,\"gain\":%.4g,\"gain_low\":%.4g,\"gain_high\":%.4g," :
               "decode            %.1f tok/s with drafting, %.1f without (medians)\n"
               "gain              %.3f times as fast, median of the rounds (%.3f to %.3f)\n", inverse(on.middle),
               inverse(off.middle), inverse(ratio.middle), inverse(ratio.high), inverse(ratio.low));
    text_print(t, o->json ? "\"passes\":%d,\"drafted\":%d,\"accepted\":%d,\"net_gain\":%.4g" :
               "by its own count  %d passes, %d guesses, %d of them right; estimated gain %.3f\n", r->passes, r->drafted, r->accepted,
               1 + net_gain(r));
    if (o->json)
        print_drafting(t, r);
    for (int k = 0; k < RUN_DRAFTERS && !o->json; k++)
        if (r->drafted_by[k])
            text_print(t, "  %-15s %d of %d right\n", drafter_names[k], r->accepted_by[k], r->drafted_by[k]);
    text_print(t, !checked.drafted ? "" : o->json ? ",\"acceptance\":[" : "acceptance        by place, of guesses behind right ones:");
    for (int k = 0, tries = checked.drafted_at[0]; k < PLACES && tries; tries = checked.accepted_at[k++])
        text_print(t, o->json && k ? ",%.3f" : o->json ? "%.3f" : " %.3f", (double)checked.accepted_at[k] / tries);
    text_print(t, !checked.drafted ? "" : o->json ? "]" : "\n");
    text_print(t, o->json ? "},\"isa\":\"%s\",\"threads\":%d}\n" : "instructions      %s, %d threads\n", s->model->kernels->name,
               s->pass->team->size);
    return 0;
}

static int mode_bench(const struct options *o, run_session *s, run_error *error)
{
    struct text t = { 0 };
    struct figures f = { 0 };
    int failed;
    if (s->context <= LOGIT_ROWS) {
        failed = fail(error, "bench needs a context of at least %d", LOGIT_ROWS + 1);
    } else if (o->draft_text) {
        struct text prompt = { 0 };
        failed = ((o->prompt || o->prompt_file) && read_prompt(o, &prompt, error)) || bench_drafting(o, s, &prompt, &t, error);
        free(prompt.data);
    } else if (o->compare != NOT) {
        failed = compare(o, s, &t, error);
    } else { /* the start comes first: what has been touched cannot be forgotten */
        failed = time_start(o, 1, &f.cold, error) || time_start(o, 0, &f.warm, error) || measure(s, &f, error);
        if (!failed)
            (o->json ? print_figures_json : print_figures)(&t, s, &f);
    }
    if (isatty(2))
        fprintf(stderr, "%60s\r", "");
    if (failed)
        free(t.data);
    return failed || print_text(&t, error) ? failure(error) : finish_output();
}

/* -- quantize -- */

/* Prepares statistics over the text of -f: windows of it, spread evenly, about as many tokens as -n. */
static int statistics_open(struct statistics *s, const struct options *o, run_error *error)
{
    struct text t = { 0 };
    run_model *m = run_open(o->model, error);
    if (!m)
        return -1;
    int window = o->context ? o->context : m->config.context < 512 ? m->config.context : 512;
    int most = o->tokens > 0 ? o->tokens : 8192, piece = run_bos(m) >= 0 && window > 1 ? window - 1 : window;
    *s = (struct statistics){ .window = window, .n_sites = m->config.layers * INPUTS + 1 };
    int failed = read_prompt(o, &t, error) || (s->n_ids = prompt_ids(m, &t, o->special, 0, &s->ids, error)) < 0;
    free(t.data);
    if (!failed && (s->n_ids < FEWEST || most < FEWEST))
        failed = fail(error, "statistics need %d tokens or more; the text has %d%s", FEWEST, s->n_ids,
                      most < FEWEST ? ", and -n says less" : "");
    if (!failed && s->n_ids > most) {
        int kept = most < piece ? 1 : most / piece, n = kept * piece < s->n_ids ? kept * piece : s->n_ids;
        for (int i = 1; i < kept; i++)
            memmove(s->ids + i * piece, s->ids + (long long)(s->n_ids - piece) * i / (kept - 1), (size_t)piece * sizeof(int));
        s->n_ids = n;
    }
    if (!failed && !(s->session = run_session_open(m, &(run_options){ window, o->threads, 0, 1 }, error)))
        failed = -1;
    if (!s->session)
        run_close(m);
    else if (!(s->sites = calloc((size_t)s->n_sites, sizeof *s->sites)))
        failed = fail(error, "out of memory");
    return failed ? -1 : 0;
}

static void statistics_close(struct statistics *s)
{
    run_model *m = s->session ? (run_model *)(uintptr_t)s->session->model : NULL;
    for (int i = 0; s->sites && i < s->n_sites; i++) {
        free(s->sites[i].rows);
        free(s->sites[i].hessian);
    }
    free(s->sites);
    free(s->ids);
    run_session_close(s->session);
    run_close(m);
}

static int mode_quantize(const struct options *o, run_error *error)
{
    struct statistics statistics = { 0 };
    struct container c;
    struct tally tally[RAW + 1][N_TYPES] = { 0 };
    if (!o->output)
        wrong_usage("quantize needs a file to write: -o FILE");
    if (o->type && o->bits > 0)
        wrong_usage("--type and --bits are two ways to choose types; give one");
    if (container_open(&c, o->model, error))
        return failure(error);
    struct stat in, out;
    int failed = 0, n = 0;
    struct planned *plan = calloc((size_t)c.n_tensors + 1, sizeof *plan);
    if (!plan)
        failed = fail(error, "out of memory");
    else if (stat(o->model, &in) == 0 && stat(o->output, &out) == 0 && in.st_dev == out.st_dev && in.st_ino == out.st_ino)
        failed = fail(error, "%.200s is the file being read; write to another one", o->output);
    else if (stat(o->output, &out) == 0 && !S_ISREG(out.st_mode))
        failed = fail(error, "%.200s is not a file that could be replaced", o->output);
    else if (!find_text(&c, "run.c"))
        failed = fail(error, "%.200s is not a run.c model (its metadata lacks run.c = 1)", o->model);
    for (int i = 0; i < c.n_tensors && !failed; i++) {
        const struct tensor *t = &c.tensors[i];
        struct planned *p = &plan[n];
        struct source source;
        if (is_pad(t->name))
            continue;
        *p = (struct planned){ .tensor = t, .type = RAW, .size = t->size };
        n++;
        if (!is_weight(t, &c))
            continue;
        if ((failed = source_open(&source, &c, t, error)))
            break;
        p->type = planned_type(&source, t->name, o->type == 0, (enum type)(o->type - 1));
        p->from = source.m.type;
        p->rows = source.m.rows;
        p->cols = source.m.cols;
    }
    if (o->bits > 0 && !failed)
        spend_bits(plan, n, &c, (double)o->bits);
    for (struct planned *p = plan; p < plan + n; p++) {
        p->size = p->rows ? matrix_bytes(p->type, p->rows, p->cols) : p->size;
        if (p->rows && p->type == p->from && p->type >= Q4)
            p->type = RAW;          /* as it is: a copy */
    }
    int text = o->prompt || o->prompt_file, helped = 0;
    for (int i = 0; i < n; i++)
        helped += takes_feedback(plan[i].type);
    if (!failed && text && !helped)
        failed = fail(error, "nothing here becomes q4, q4a or q6, so that the text of -f has no use; choose --type or --bits");
    if (!failed && text)
        failed = statistics_open(&statistics, o, error);
    if (!failed)
        failed = write_model(o->output, &c, plan, n, o->threads ? o->threads : default_threads(),
                             text ? &statistics : NULL, tally, error);
    statistics_close(&statistics);
    for (int from = 0; from <= RAW && !failed; from++)
        for (int to = 0; to < N_TYPES; to++)
            if (tally[from][to].n && from != to)
                fprintf(stderr, "%d matrices from %s to %s: relative error %.3g\n", tally[from][to].n, type_names[from],
                        type_names[to], tally[from][to].square > 0 ? sqrt(tally[from][to].error / tally[from][to].square) : 0);
    if (!failed)
        fprintf(stderr, "wrote %s\n", o->output);
    free(plan);
    container_close(&c);
    return failed ? failure(error) : 0;
}

/* A file of prompts, one a line. */
static int is_batch(const struct options *o, enum mode mode)
{
    size_t n = o->prompt_file ? strlen(o->prompt_file) : 0;
    return o->json && n > 6 && !strcmp(o->prompt_file + n - 6, ".jsonl") && (mode == GENERATE || mode == CHAT);
}

/* What only one mode can do is a mistake elsewhere. */
static void check_options(const struct options *o, enum mode mode)
{
    const struct { int given, fits; const char *name, *where; } rules[] = {
        { o->system != NULL, mode == CHAT, "-y", "chat" },
        { o->output != NULL, mode == QUANTIZE || is_batch(o, mode), "-o", "quantize and files of prompts (-f NAME.jsonl --json)" },
        { o->shards, is_batch(o, mode), "--shard", "files of prompts (-f NAME.jsonl --json)" },
        { o->samples, (mode == GENERATE || mode == CHAT) && !is_batch(o, mode), "--samples", "one prompt in generate and chat" },
        { o->corpus != NULL, (mode == GENERATE || mode == CHAT) && !is_batch(o, mode) && !o->samples, "--draft-corpus",
          "one text in generate and chat" },
        { o->draft_text != NULL, mode == GENERATE || mode == CHAT || mode == BENCH, "--draft", "generate, chat and bench" },
        { o->type, mode == QUANTIZE, "--type", "quantize" },
        { o->bits > 0, mode == QUANTIZE, "--bits", "quantize" },
        { o->verify, mode == INFO, "--verify", "info" },
        { o->compare != NOT, mode == BENCH, "--compare", "bench" },
        { o->no_echo, mode == GENERATE, "--no-echo", "generate" },
        { o->n_stops, mode == GENERATE || mode == CHAT, "--stop", "generate and chat" },
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].given && !rules[i].fits)
            wrong_usage("%s is for %s, and this is %s", rules[i].name, rules[i].where,
                        is_batch(o, mode) ? "a file of prompts" : mode_names[mode]);
    if (o->logprobs >= 0 && !o->json)
        wrong_usage("--logprobs needs --json");
    if (o->compare != NOT && o->draft_text)
        wrong_usage("bench takes --compare or --draft, not both");
    size_t n = o->prompt_file ? strlen(o->prompt_file) : 0;
    if (n > 6 && !strcmp(o->prompt_file + n - 6, ".jsonl") && !o->json && (mode == GENERATE || mode == CHAT))
        fprintf(stderr, "run: %s is read as one prompt; with --json each of its lines is one\n", o->prompt_file);
}

/* Whether a file is a model, and not draft heads or anything else. */
static int is_model(const char *path)
{
    struct container file;
    run_error error;
    if (container_open(&file, path, &error))
        return 0;
    const char *version = find_text(&file, "run.c");
    int is = version && !strncmp(version, "1", 1);
    container_close(&file);
    return is;
}

/* --draft-corpus */
static int read_corpus(const struct options *o, run_session *s, run_error *error)
{
    struct options from = { .prompt_file = o->corpus };
    struct text text = { 0 };
    int *ids = NULL, n = read_prompt(&from, &text, error) ? -1 : prompt_ids(s->model, &text, 0, 0, &ids, error);
    int failed = n < 0 || run_draft_corpus(s, ids, n, error);
    free(ids);
    free(text.data);
    return failed;
}

static int with_session(const struct options *o, const run_model *m, const run_model *second, enum mode mode, run_error *error)
{
    int drafts = (mode == CHAT || mode == GENERATE || (mode == BENCH && o->draft_text)) && o->draft != RUN_DRAFT_OFF &&
                 o->draft != RUN_DRAFT_LOOKUP;
    if (drafts && o->draft == RUN_DRAFT_HEADS && !m->n_heads) {
        fail(error, "this model has no draft heads; --draft lookup needs none, and --draft FILE takes heads from a file of "
             "their own, or a smaller model");
        return failure(error);
    }
    run_options how = { o->context, o->threads, o->kv_f32, !drafts || second };
    run_session *s = run_session_open(m, &how, error);
    if (!s)
        return failure(error);
    if (o->context > m->config.context)
        fprintf(stderr, "run: a context of %d is more than the %d that this model was trained for\n", o->context, m->config.context);
    if (o->samples && !o->prompt && !o->prompt_file)
        wrong_usage("--samples needs a prompt (-i or -f)");
    if ((o->corpus && read_corpus(o, s, error)) || (second && drafts && run_draft_model(s, second, error))) {
        run_session_close(s);
        return failure(error);
    }
    int status = o->samples || is_batch(o, mode) ? mode_batch(o, s, mode, error) :
                 (mode == CHAT ? mode_chat : mode == PERPLEXITY ? mode_perplexity : mode == BENCH ? mode_bench
                                                                              : mode_generate)(o, s, error);
    run_session_close(s);
    return status;
}

int main(int n, char **words)
{
    struct options o = parse_options(n, words);
    run_error error = { "" };
    struct sigaction action = { .sa_handler = on_interrupt }; /* without SA_RESTART: reading a line ends */
    signal(SIGXFSZ, SIG_IGN); /* a full quota is an error of fwrite like any other */
    if (o.mode >= 0)
        check_options(&o, (enum mode)o.mode);
    if (o.mode == QUANTIZE) {
        sigaction(SIGINT, &action, NULL);
        sigaction(SIGTERM, &action, NULL);
        return mode_quantize(&o, &error);
    }
    if (o.mode == INFO)
        return mode_info(&o, &error);
    run_model *m = run_open(o.model, &error);
    if (!m)
        return failure(&error);
    run_model *second = NULL;
    if (!draft_names[o.draft]) {        /* a file: of heads, or of a second model */
        o.draft = RUN_DRAFT_AUTO;
        if (is_model(o.draft_text) ? !(second = run_open(o.draft_text, &error)) : run_attach_heads(m, o.draft_text, &error)) {
            run_close(m);
            return failure(&error);
        }
    }
    enum mode mode = o.mode >= 0 ? (enum mode)o.mode : run_text(m, "chat.user.before") && m->tokenizer ? CHAT : GENERATE;
    check_options(&o, mode);
    if (mode == CHAT || mode == GENERATE)
        sigaction(SIGINT, &action, NULL);
    if (!o.seed) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        o.sampling.seed = ((uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 30 ^ (uint64_t)getpid() << 20) & 0x7fffffff;
    }
    int status = mode == TOKENIZE ? mode_tokenize(&o, m, &error) : with_session(&o, m, second, mode, &error);
    run_close(m);
    run_close(second);
    return status;
}

#endif /* RUN_LIBRARY */
#ifndef __clang__
#pragma GCC pop_options
#endif
#endif /* RUN_DECLARATIONS, RUN_KERNELS */
