/* Drives tokenizer.c for test_tokenizer.py. It reads a tokenizer from a file in a format of its
own (see load), then

    tokenizer_driver FILE              answers requests on standard input: encode spans, decode ids
    tokenizer_driver FILE fuzz N SEED  opens N damaged copies; each must be refused with a sentence,
                                       or work

All numbers are little-endian. Exit status 1 and a sentence if the tokenizer cannot be opened. */
#include "../tokenizer.c"

typedef struct {
    char name[64], dtype[4]; /* dtype "": metadata */
    unsigned char *data;
    size_t size;
} entry;

static entry entries[64];
static int n_entries;

static void die(const char *what) {
    fprintf(stderr, "tokenizer_driver: %s\n", what);
    exit(3);
}

static void get(FILE *f, void *data, size_t size) {
    if (size && fread(data, 1, size, f) != size) die("the input ends early");
}

static uint32_t get_u32(FILE *f) {
    uint32_t x;
    get(f, &x, 4);
    return x;
}

/* name (64 bytes), dtype (4 bytes), size (u32), data; again and again */
static void load(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) die("cannot open the file");
    for (entry e; fread(e.name, 1, 64, f) == 64; entries[n_entries++] = e) {
        if (n_entries == 64) die("too many entries");
        get(f, e.dtype, 4);
        e.size = get_u32(f);
        e.data = malloc(e.size + 1);
        get(f, e.data, e.size);
        e.data[e.size] = 0;
    }
    fclose(f);
}

static const void *tensor(void *context, const char *name, const char *dtype, size_t *bytes) {
    (void)context;
    for (int i = 0; i < n_entries; i++)
        if (!strcmp(entries[i].name, name) && !strcmp(entries[i].dtype, dtype)) {
            *bytes = entries[i].size;
            return entries[i].data;
        }
    return NULL;
}

static const char *text(void *context, const char *key) {
    (void)context;
    for (int i = 0; i < n_entries; i++)
        if (!strcmp(entries[i].name, key) && !entries[i].dtype[0]) return (char *)entries[i].data;
    return NULL;
}

static tokenizer *open_entries(int vocab, char *error, size_t size) {
    tokenizer_source source = {NULL, tensor, text};
    return tokenizer_open(&source, vocab, error, size);
}

/* The text of the ids; ends[i], if wanted, is where that of id i ends. */
static size_t decode(const tokenizer *t, const int *ids, int n, char **out, uint32_t *ends) {
    tokenizer_stream stream = {.controls = 1};
    size_t size = 0, room = 0, piece = tokenizer_stream_room(t);
    *out = NULL;
    for (int i = 0; i <= n; i++) {
        if (room - size < piece) {
            room = 2 * (room + piece);
            *out = realloc(*out, room);
        }
        size += i < n ? tokenizer_stream_put(t, &stream, ids[i], *out + size)
                      : tokenizer_stream_end(&stream, *out + size);
        if (ends) ends[i] = (uint32_t)size;
    }
    return size;
}

/* A request: 'e' encode one text of several spans (u32 trusted, u32 length, bytes each); 'b' encode
   texts (u32 length, bytes each), untrusted, each on its own; 'r' the same, and decode them again;
   'd' decode ids; 's' the same with one answer for every id and one for the end. Then u32 count of
   the spans, texts or ids, u32 size of all that follows, and that. An answer: u32 count of ids and
   the ids, or u32 length and the bytes, one after the other. The whole request is read before the
   answer begins. */
static void serve(const tokenizer *t) {
    for (int request; (request = getchar()) != EOF; fflush(stdout)) {
        uint32_t n = get_u32(stdin), size = get_u32(stdin), length, trusted = 0;
        unsigned char *body = malloc(size + 1), *p = body;
        tokenizer_span *spans = malloc((n + 1) * sizeof *spans);
        get(stdin, body, size);
        for (uint32_t i = 0; request != 'd' && request != 's' && i < n; i++) {
            if (request == 'e') memcpy(&trusted, p, 4), p += 4;
            memcpy(&length, p, 4);
            spans[i] = (tokenizer_span){(char *)p + 4, length, (int)trusted};
            p += 4 + length;
        }
        for (uint32_t i = 0; i < (request == 'b' || request == 'r' ? n : 1); i++) {
            int *ids = (int *)(void *)body, n_ids = (int)n;
            int given = request == 'd' || request == 's';
            if (!given && tokenizer_encode(t, spans + i, request == 'e' ? (int)n : 1, &ids, &n_ids))
                die("encode failed");
            if (request == 'e' || request == 'b') {
                fwrite(&n_ids, 4, 1, stdout);
                fwrite(ids, 4, (size_t)n_ids, stdout);
            } else {
                char *out;
                uint32_t *ends = calloc(n + 1, 4),
                         all = (uint32_t)decode(t, ids, n_ids, &out, given ? ends : NULL);
                for (uint32_t k = request == 's' ? 0 : n, begin = 0; k <= n; begin = ends[k++]) {
                    length = request == 's' ? ends[k] - begin : all;
                    fwrite(&length, 4, 1, stdout);
                    fwrite(out + begin, 1, length, stdout);
                }
                free(ends);
                free(out);
            }
            if (!given) free(ids);
        }
        free(spans);
        free(body);
    }
}

static uint64_t seed;
static uint32_t draw(uint32_t n) { /* 0..n-1 */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((seed >> 33) % n);
}

/* Damages one entry; the copy has its exact size: a sanitizer sees the byte beyond. */
static void damage(entry *e) {
    size_t size = e->size, keep = draw(4) ? size : draw((uint32_t)size + 1);
    unsigned char *copy = malloc(keep + !e->dtype[0]);
    memcpy(copy, e->data, keep);
    if (!e->dtype[0]) copy[keep] = 0;
    for (int k = (int)draw(4); keep && k >= 0; k--) {
        static const int32_t values[] = {-1,    0,        1,        2,       255,    256,
                                         65535, 0x10ffff, 0x110000, INT_MAX, INT_MIN};
        int32_t value = draw(3) ? values[draw(11)] : (int32_t)draw(1000);
        if (e->dtype[0] == 'I' && keep >= 4 && draw(2))
            memcpy(copy + draw((uint32_t)(keep / 4)) * 4, &value, 4);
        else copy[draw((uint32_t)keep)] = (unsigned char)draw(256);
    }
    e->data = copy, e->size = keep;
    if (!draw(20)) memcpy(e->dtype, "X", 2);
}

static void fuzz(int vocab, int n) {
    int opened = 0;
    for (int i = 0; i < n; i++) {
        entry *e = &entries[draw((uint32_t)n_entries)], saved = *e;
        char error[256] = "";
        damage(e);
        tokenizer *t = open_entries(draw(30) ? vocab : (int)draw(1000) - 5, error, sizeof error);
        if (!t && (!error[0] || !strchr(error, ' '))) die("refused without a sentence");
        if (t) {
            static const char sample[] =
                "<|im_start|>Hello  world's 123\xc3\xa9\xcc\x81 \xf0\x9f\x98\x80\xff\0 <s>\n\n x";
            tokenizer_span spans[2] = {{sample, sizeof sample, 1}, {sample, sizeof sample, 0}};
            char *out;
            int *ids, n_ids, all[64];
            opened++;
            if (!tokenizer_encode(t, spans, 2, &ids, &n_ids)) {
                for (int k = 0; k < n_ids; k++)
                    if (ids[k] < 0 || ids[k] >= vocab) die("an id out of range");
                decode(t, ids, n_ids, &out, NULL);
                free(out);
            }
            for (int k = 0; k < 64; k++) all[k] = (int)draw((uint32_t)vocab + 2) - 1;
            decode(t, all, 64, &out, NULL);
            free(out);
            free(ids);
        }
        tokenizer_close(t);
        free(e->data);
        *e = saved;
    }
    printf("%d opened, %d refused\n", opened, n - opened);
}

int main(int argc, char **argv) {
    char error[256];
    if (argc < 2) die("usage: tokenizer_driver FILE [fuzz N SEED]");
    load(argv[1]);
    const char *size = text(NULL, "vocab_size");
    int vocab = size ? atoi(size) : 0;
    tokenizer *t = open_entries(vocab, error, sizeof error);
    if (!t) {
        fprintf(stderr, "%s\n", error);
        return 1;
    }
    seed = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;
    if (argc > 3) fuzz(vocab, atoi(argv[3]));
    else serve(t);
    tokenizer_close(t);
    for (int i = 0; i < n_entries; i++) free(entries[i].data);
    return 0;
}
