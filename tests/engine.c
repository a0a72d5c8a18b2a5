/* engine: the whole of run.c as a program that tests drive: its command line, and looks inside.

   engine run ARGUMENT...             the program itself
   engine memory ARGUMENT...         the same; then its peak of resident memory on standard error
   engine isa                         the instruction sets of this machine, the one in use first
   engine hash MODEL                  hashes of the logits of random tokens
   engine same MODEL                  the same, and threads and chunks compared
   engine rewinds MODEL SEED POISON   sessions that evaluate, rewind, fork, fail and generate,
                                      compared with fresh ones
   engine drafts MODEL SEED TRIALS HEADS generations with drafters that are right, wrong or random, compared with none
   engine controller MODEL            generations whose passes and guesses take simulated time: how much of the
                                      best fixed choice drafting reaches, a line for each case
   engine lookups - TRIALS            lookup against a plain search
   engine frequencies MODEL N PERCENT tokens that N seeds draw at that temperature, against their probabilities
   engine heads MODEL FILE STEPS      logits of the draft heads (requests on standard input)
   engine rows MODEL SEED             rows of several sessions in one pass, compared with each alone
   engine logits MODEL F32            float32 logits of the int32 ids on standard input
   engine sample MODEL                draws from given logits (requests on standard input)
   engine render MODEL                conversations on standard input to text and ids
   engine allocate MODEL              what decoding allocates (needs COUNT_ALLOCATIONS)
   engine parallel MODEL              two sessions in two threads, compared with each alone
   engine adapt - SIZE BAD GOOD SHARE threads that a team of SIZE uses after each of BAD runs in which all
                                      waited for SHARE per cent of the time and GOOD runs without, four times
   engine context MODEL CONTEXT       the context of a session that asks for CONTEXT (0: the default)
   engine statistics MODEL TENSOR POINT LAYER CONTEXT TOKENS FILE
                                      float32 [n, n] that quantize collects over FILE for a matrix; then
                                      the rows [n] of its inputs, for the int32 ids on standard input,
                                      where -1 begins a window
   engine bad FILE WORK FROM TO SEED  damaged copies of FILE in the file WORK; see below
   engine files WORK                  opens and uses each of the files named on standard input

   Commands that compare print "same" and what they compared, or a sentence and exit status 1. */
#ifndef ENGINE
#define ENGINE "../run.c"
#endif
#define _DEFAULT_SOURCE 1
#include <stdio.h>
#include <time.h>

/* The clock of run.c can be a simulated one. */
static double simulated = -1;           /* seconds; below 0: it is the real one */

static int any_clock(clockid_t clock, struct timespec *t)
{
    if (simulated < 0)
        return clock_gettime(clock, t);
    *t = (struct timespec){ (time_t)simulated, (long)(1e9 * (simulated - (double)(time_t)simulated)) };
    return 0;
}
#define clock_gettime(clock, t) any_clock(clock, t)

/* What the program says on standard error can be sent elsewhere, without what sanitizers say. */
static FILE *messages;
#undef stderr
#define stderr messages

#define main run_main
#include ENGINE
#undef main

/* A copy of run.c with deliberate mistakes chooses one with this; in run.c itself there is none. */
extern int mutant;
int mutant;

static run_error problem;

__attribute__((format(printf, 1, 2), noreturn))
static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    char text[2000];
    int n = vsnprintf(text, sizeof text - 1, format, arguments);
    va_end(arguments);
    n = n < (int)sizeof text - 2 ? n : (int)sizeof text - 2;
    text[n] = '\n';
    exit(write(2, text, (size_t)n + 1) < 0 ? 3 : 1);
}

static void *need(void *memory)
{
    if (!memory)
        die("engine: %s", *problem.text ? problem.text : "out of memory");
    return memory;
}

static uint64_t dice_state;

static int dice(int sides)
{
    dice_state = dice_state * 6364136223846793005u + 1442695040888963407u;
    return (int)((dice_state >> 33) % (uint64_t)sides);
}

static uint64_t hash_bytes(const void *data, size_t n)
{
    const unsigned char *bytes = data;
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

static run_model *open_model(const char *path)
{
    return need(run_open(path, &problem));
}

/* Small models run on one thread, since others are not worth waking. This makes them wake. */
static void wake_others(run_model *m)
{
    m->weight_bytes |= (size_t)1 << 40;
}

static run_session *open_session(const run_model *m, int context, int threads, int f32)
{
    return need(run_session_open(m, &(run_options){ context, threads, f32 }, &problem));
}

/* Appends n ids in pieces of `chunk` and stores the logits of the last LOGIT_ROWS of each piece in
   their places, [n, vocab]. */
static void feed(run_session *s, const int *ids, int n, int chunk, float *logits)
{
    size_t vocab = (size_t)s->model->config.vocab;
    for (int at = 0; at < n; at += chunk) {
        int k = n - at < chunk ? n - at : chunk, first = k > LOGIT_ROWS ? k - LOGIT_ROWS : 0;
        struct row rows[CHUNK] = { 0 };
        for (int i = 0; i < k; i++)
            rows[i] = (struct row){ s, NULL, ids[at + i], s->length + i, i >= first };
        if (run_pass(s->pass, rows, k, &problem))
            die("engine: %s", problem.text);
        memcpy(logits + (size_t)(at + first) * vocab, s->pass->logits,
               (size_t)(k - first) * vocab * sizeof *logits);
        memcpy(s->tokens + s->length, ids + at, (size_t)k * sizeof *ids);
        s->length += k;
        s->written = s->length > s->written ? s->length : s->written;
    }
}

/* The same with run_eval, which gives the logits of the last id of each piece only. */
static void eval_pieces(run_session *s, const int *ids, int n, int chunk, float *logits)
{
    size_t vocab = (size_t)s->model->config.vocab;
    for (int at = 0; at < n; at += chunk) {
        int k = n - at < chunk ? n - at : chunk;
        if (run_eval(s, ids + at, k, &problem))
            die("engine: %s", problem.text);
        memcpy(logits + (size_t)(at + k - 1) * vocab, run_logits(s), vocab * sizeof *logits);
    }
}

static void random_ids(const run_model *m, int *ids, int n)
{
    for (int i = 0; i < n; i++)
        ids[i] = dice(m->config.vocab);
}

enum { MOST = 220 };          /* more than the slots of a small window */

static int same(const char *path, int compare)
{
    run_model *m = open_model(path);
    size_t vocab = (size_t)m->config.vocab;
    int ids[MOST];
    size_t size = MOST * vocab * sizeof(float);
    float *plain = need(malloc(size)), *other = need(malloc(size));
    wake_others(m);
    random_ids(m, ids, MOST);
    for (int f32 = 0; f32 < 2; f32++) {
        run_session *s = open_session(m, MOST, 1, f32);
        feed(s, ids, MOST, compare ? 1 : LOGIT_ROWS, plain);
        printf("f%d %016llx\n", f32 ? 32 : 16, (unsigned long long)hash_bytes(plain, size));
        run_session_close(s);
        for (int threads = 1; threads <= 4 && compare; threads++) {
            static const int chunks[] = { 64, 1, 7, 33, 64 };
            for (int i = threads - 1; i <= threads; i++) {
                int n = chunks[i] == 1 && threads > 1 ? 40 : MOST; /* many barriers, little work */
                s = open_session(m, MOST, threads, f32);
                memcpy(other, plain, size);
                feed(s, ids, n, chunks[i], other);
                if (memcmp(plain, other, size))
                    die("%d threads, chunks of %d, cache f%d: other logits", threads, chunks[i],
                        f32 ? 32 : 16);
                if (run_rewind(s, 0, &problem))
                    die("engine: %s", problem.text);
                memcpy(other, plain, size);
                eval_pieces(s, ids, n, chunks[i] == 33 ? 100 : chunks[i], other);
                if (memcmp(plain, other, size))
                    die("%d threads, run_eval of %d, cache f%d: other logits", threads, chunks[i],
                        f32 ? 32 : 16);
                run_session_close(s);
            }
        }
    }
    if (compare)
        printf("same with 1 to 4 threads and chunks of 1, 7, 33, 64, 100\n");
    free(plain);
    free(other);
    run_close(m);
    return 0;
}

/* -- rewinds: timelines and what they should hold -- */

enum { TIMELINES = 3, LONG = 420 };

struct timeline {
    run_session *s;
    int ids[LONG], n;
};

static void check_timeline(const run_model *m, const struct timeline *t, const char *after)
{
    run_session *fresh;
    if (run_position(t->s) != t->n)
        die("after %s: at position %d, should be at %d", after, run_position(t->s), t->n);
    if (!t->n || !run_logits(t->s))
        return;
    fresh = open_session(m, LONG, 1, t->s->cache_f32);
    if (run_eval(fresh, t->ids, t->n, &problem))
        die("engine: %s", problem.text);
    if (memcmp(run_logits(fresh), run_logits(t->s), (size_t)m->config.vocab * sizeof(float)))
        die("after %s at position %d: other logits than a fresh session", after, t->n);
    run_session_close(fresh);
}

static int keep_id(void *context, int id, const char *text, size_t length)
{
    struct timeline *t = context;
    (void)text, (void)length;
    if (id >= 0)
        t->ids[t->n++] = id;
    return 0;
}

static void step(const run_model *m, struct timeline *all, int poison)
{
    static const int pieces[] = { 1, 1, 2, 5, 17, 64, 100, 130 };
    struct timeline *t = &all[dice(TIMELINES)];
    int kind = dice(10), k = pieces[dice(8)], room = LONG - t->n;
    char after[100];
    if (kind < 5) {
        k = k < room ? k : room;
        snprintf(after, sizeof after, "%d new tokens", k);
        if (!k)
            return;
        random_ids(m, t->ids + t->n, k);
        for (int i = 0; i < k; i++) /* never the one that breaks things */
            t->ids[t->n + i] = t->ids[t->n + i] == poison ? !poison : t->ids[t->n + i];
        if (run_eval(t->s, t->ids + t->n, k, &problem))
            die("engine: %s", problem.text);
        t->n += k;
    } else if (kind < 7) {
        int back = dice(3) ? dice(20) : dice(t->n + 1);
        t->n = t->n > back ? t->n - back : 0;
        snprintf(after, sizeof after, "a rewind of %d", back);
        if (run_rewind(t->s, t->n, &problem))
            die("engine: %s", problem.text);
    } else if (kind == 7) {
        struct timeline *from = &all[dice(TIMELINES)];
        if (from == t)
            return;
        snprintf(after, sizeof after, "a fork");
        run_session_close(t->s);
        *t = *from;
        t->s = need(run_session_fork(from->s, &problem));
    } else if (kind == 8 && poison >= 0) {
        int ids[LONG];
        if (!room)
            return;
        k = 1 + dice(room < 200 ? room : 200);
        random_ids(m, ids, k);
        ids[k - 1] = poison;
        snprintf(after, sizeof after, "%d tokens that fail", k);
        if (!run_eval(t->s, ids, k, &problem))
            die("a token with infinite weights was evaluated");
        if (run_logits(t->s))
            die("after %s: logits of what failed", after);
    } else {
        run_generation how = { { .repeat_penalty = 1, .temperature = 1, .seed = 5, .top_p = 1 },
                               .max_tokens = 3, .callback = keep_id, .context = t };
        snprintf(after, sizeof after, "a generation");
        if (!run_logits(t->s) || room < 4)
            return;
        if (poison >= 0)
            how.sampling.temperature = 0;
        if (run_generate(t->s, &how, NULL, &problem)) {
            if (poison < 0)
                die("engine: %s", problem.text);
            t->n = run_position(t->s);
        }
        if (run_rewind(t->s, t->n = run_position(t->s), &problem))
            die("engine: %s", problem.text);
    }
    check_timeline(m, t, after);
    if (t->n && t->n < LONG && !run_logits(t->s)) { /* what was forgotten must not be needed */
        t->ids[t->n] = poison ? 0 : 1;
        if (run_eval(t->s, &t->ids[t->n++], 1, &problem))
            die("engine: %s", problem.text);
        strcat(after, " and a token");
        check_timeline(m, t, after);
    }
}

static int rewinds(const char *path, int seed, int poison)
{
    run_model *m = open_model(path);
    struct timeline all[TIMELINES] = { 0 };
    dice_state = (uint64_t)seed;
    for (int i = 0; i < TIMELINES; i++)
        all[i].s = open_session(m, LONG, 1 + i % 2, seed % 2);
    for (int i = 0; i < 120; i++)
        step(m, all, poison);
    for (int i = 0; i < TIMELINES; i++)
        run_session_close(all[i].s);
    run_close(m);
    printf("same after rewinds, forks, failures, generations\n");
    return 0;
}

/* -- drafting: the same text, and the same cache, with every drafter -- */

struct told {
    int ids[LONG], n;
    uint64_t logits;          /* a hash of what every token was drawn from */
    struct text text;
    run_session *s;
};

static int note_token(void *context, int id, const char *text, size_t length)
{
    struct told *t = context;
    text_add(&t->text, text, length);
    if (id >= 0) {
        t->ids[t->n++] = id;
        t->logits = t->logits * 31 + hash_bytes(run_logits(t->s), (size_t)t->s->model->config.vocab * sizeof(float));
    }
    return 0;
}

struct guesser {
    enum { ORACLE, ADVERSARY, HALF_RIGHT, NONSENSE } kind;
    const struct told *truth;
    const struct told *sofar;
};

/* Knows what will be drawn, and says so, or something else. */
static int guess(void *context, const run_session *s, int *tokens, int most)
{
    const struct guesser *g = context;
    int at = g->sofar->n, vocab = s->model->config.vocab;
    int n = g->kind == ORACLE ? most : most ? dice(most + 1) : 0, right = g->kind == HALF_RIGHT && n ? dice(n) : 0;
    for (int i = 0; i < n; i++) {
        int truth = at + i < g->truth->n ? g->truth->ids[at + i] : -1;
        if (g->kind == ORACLE && truth < 0)
            return i;
        tokens[i] = g->kind == NONSENSE ? dice(vocab) : truth < 0 ? dice(vocab)
                  : g->kind == ORACLE || i < right ? truth : (truth + 1 + dice(vocab - 1)) % vocab;
    }
    return n;
}

static void check_cache(const run_session *a, const run_session *b, const char *how)
{
    int hd = a->model->config.hd;
    size_t size = a->cache_f32 ? 4 : 2;
    for (int layer = 0; layer < a->model->config.layers; layer++)
        for (int head = 0; head < a->model->config.kv && !a->model->layers[layer].window; head++)
            for (int i = 0; i < a->length; i++)
                for (int d = 0; d < hd; d++) {
                    const unsigned char *x = keys_of(a, layer, head, i / BLOCK), *y = keys_of(b, layer, head, i / BLOCK);
                    size_t k = (size_t)key_at(i % BLOCK, d, hd) * size, v = ((size_t)(BLOCK * hd) + value_at(i % BLOCK, d, hd)) * size;
                    if (memcmp(x + k, y + k, size) || memcmp(x + v, y + v, size))
                        die("%s: the cache differs in layer %d at position %d", how, layer, i);
                }
}

static int drafts(const char *path, int seed, int trials, const char *head_file)
{
    run_model *m = open_model(path);
    if (*head_file && run_attach_heads(m, head_file, &problem))
        die("engine: %s", problem.text);
    static const char *const stops[] = { "e", " the", "and " };
    int vocab = m->config.vocab, drafted = 0, accepted = 0, windows = 0, prophesied = 0, by_second = 0;
    dice_state = (uint64_t)seed;
    for (int trial = 0; trial < trials; trial++) {
        int ids[LONG], n = 1 + dice(90), context = dice(3) ? LONG : n + 1 + dice(30), period = 1 + dice(12);
        for (int i = 0; i < n; i++)
            ids[i] = i >= period && dice(8) ? ids[i - period] : dice(vocab);
        run_generation how = { .max_tokens = dice(4) ? 1 + dice(60) : 0, .draft = RUN_DRAFT_OFF, .callback = note_token,
                               .stops = stops, .n_stops = m->tokenizer && dice(2) ? 1 + dice(3) : 0, .draft_max = dice(16) };
        how.sampling = (run_sampling){ .temperature = (float)dice(4) * 0.4f, .top_p = dice(2) ? 0.9f : 1, .top_k = dice(2) * 20,
                                       .repeat_penalty = dice(3) ? 1 : 1.3f, .seed = (uint64_t)dice(1000), .min_p = dice(2) ? 0.05f : 0 };
        struct told truth = { .s = open_session(m, context, 1, trial & 1) };
        run_result right, r;
        how.context = &truth;
        if (run_eval(truth.s, ids, n, &problem) || run_generate(truth.s, &how, &right, &problem))
            die("engine: %s", problem.text);
        for (int kind = 0; kind < 10; kind++) {
            static const char *const names[] = { "an oracle", "an adversary", "half right", "nonsense", "auto", "auto at random",
                                                 "lookup at random", "heads at random", "a second model",
                                                 "a second model at random" };
            struct told t = { .s = open_session(m, context, 1 + kind % 2, trial & 1) };
            struct guesser g = { kind < 4 ? (int)kind : 0, &truth, &t };
            how.context = &t;
            how.draft = kind == 6 ? RUN_DRAFT_LOOKUP : kind == 7 || kind == 9 ? RUN_DRAFT_HEADS : RUN_DRAFT_AUTO;
            t.s->drafting = need(drafting_open(t.s, &problem));
            if (kind >= 8 && run_draft_model(t.s, m, &problem)) /* the model itself knows what it is going to say */
                die("engine: %s", problem.text);
            int knows = kind == 9 && how.sampling.temperature == 0 && how.sampling.repeat_penalty == 1;
            t.s->drafting->random = kind > 4 && kind != 8 ? (uint64_t)trial * 77 + 1 : 0;
            t.s->drafting->foreign = kind < 4 ? guess : NULL;
            t.s->drafting->foreign_context = &g;
            if (run_eval(t.s, ids, n, &problem) || run_generate(t.s, &how, &r, &problem))
                die("engine: %s", problem.text);
            if (t.n != truth.n || memcmp(t.ids, truth.ids, (size_t)t.n * sizeof *t.ids))
                die("trial %d, %s: other tokens than without drafting", trial, names[kind]);
            if (t.text.n != truth.text.n || (t.text.n && memcmp(t.text.data, truth.text.data, t.text.n)))
                die("trial %d, %s: another text", trial, names[kind]);
            if (t.logits != truth.logits || r.stop != right.stop || r.tokens != right.tokens)
                die("trial %d, %s: other logits, or another end", trial, names[kind]);
            if (run_position(t.s) != run_position(truth.s))
                die("trial %d, %s: at position %d, not %d", trial, names[kind], run_position(t.s), run_position(truth.s));
            check_cache(t.s, truth.s, names[kind]);
            int by_place = 0, by_drafter = 0;
            for (int i = 0; i < RUN_DRAFT_MOST; i++)
                by_place += r.accepted_at[i];
            for (int i = 0; i < RUN_DRAFTERS; i++)
                by_drafter += r.accepted_by[i];
            if (by_place != r.accepted || by_drafter != r.accepted || r.accepted > r.drafted ||
                r.passes + r.accepted < r.tokens - 1 || r.passes + r.accepted > r.tokens)
                die("trial %d, %s: %d passes, %d of %d accepted, %d tokens", trial, names[kind], r.passes, r.accepted, r.drafted, r.tokens);
            if ((kind == ADVERSARY && r.accepted) || (kind == ORACLE && r.tokens > 1 &&
                r.passes > (r.tokens - 1 + (how.draft_max ? how.draft_max : RUN_DRAFT_MOST)) / (1 + (how.draft_max ? how.draft_max : RUN_DRAFT_MOST)) + 1))
                die("trial %d, %s: %d tokens in %d passes", trial, names[kind], r.tokens, r.passes);
            if (knows && (r.drafted - r.accepted > RUN_DRAFT_MOST || (r.tokens > 30 && !r.accepted_by[RUN_MODEL])))
                die("trial %d, %s: only %d of %d accepted, %d tokens", trial, names[kind], r.accepted, r.drafted, r.tokens);
            by_second += knows ? r.accepted_by[RUN_MODEL] : 0;
            drafted += r.drafted;
            accepted += r.accepted;
            windows += r.passes;
            prophesied += r.drafted_by[RUN_HEADS];

            /* something else behind a part of it, as in a conversation: lookup must not remember what is gone */
            int back = dice(run_position(t.s) + 1), more = 1 + dice(10), room = context - back;
            struct told again = { .s = t.s }, plain = { .s = open_session(m, context, 1, trial & 1) };
            if (kind == 7 && m->n_heads) {  /* a fork's heads know nothing of what is before it */
                again.s = need(run_session_fork(t.s, &problem));
                again.s->drafting = need(drafting_open(again.s, &problem));
                again.s->drafting->random = (uint64_t)trial + 1;
            }
            if (more < room && back) {
                int past[LONG];
                memcpy(past, t.s->tokens, (size_t)back * sizeof *past);
                how.context = &again;
                again.s->drafting->foreign = NULL;
                if (run_rewind(again.s, back, &problem) || run_eval(again.s, ids, more < n ? more : n, &problem) ||
                    run_generate(again.s, &how, &r, &problem))
                    die("engine: %s", problem.text);
                if (knows && (r.drafted - r.accepted > RUN_DRAFT_MOST || (r.tokens > 30 && !r.accepted_by[RUN_MODEL])))
                    die("trial %d, %s: only %d of %d accepted after a rewind", trial, names[kind], r.accepted, r.drafted);
                how.context = &plain;
                how.draft = RUN_DRAFT_OFF;
                if (run_eval(plain.s, past, back, &problem) || run_eval(plain.s, ids, more < n ? more : n, &problem) ||
                    run_generate(plain.s, &how, NULL, &problem))
                    die("engine: %s", problem.text);
                if (plain.n != again.n || memcmp(plain.ids, again.ids, (size_t)plain.n * sizeof *plain.ids) || plain.logits != again.logits)
                    die("trial %d, %s: another text after a rewind", trial, names[kind]);
                const struct lookup *l = &again.s->drafting->text;
                if (l->n > run_position(again.s) || l->n_clones > l->room || l->n_edges > 2 * l->room)
                    die("lookup holds %d tokens of %d", l->n, run_position(again.s));
            }
            if (again.s != t.s)
                run_session_close(again.s);
            free(again.text.data);
            free(plain.text.data);
            free(t.text.data);
            run_session_close(plain.s);
            run_session_close(t.s);
        }
        free(truth.text.data);
        run_session_close(truth.s);
    }
    run_close(m);
    printf("same text with every drafter: %d of %d accepted in %d passes, %d by heads, %d by a second model\n", accepted, drafted, windows,
           prophesied, by_second);
    return 0;
}

/* The longest earlier occurrence of a text's end, and of its end with other tokens added, against a plain search. */
/* A machine and a drafter that exist in a table only: a pass over k rows takes 1 + slope (k - 1) simulated
   seconds, a question `ask`; each guess is right with probability `chance`. */
struct simulation {
    double slope, ask, chance;
    int in_pass;
    struct told truth, sofar;
};
static struct simulation world;

static void pass_takes_time(void *context, const char *point, int layer, const float *values, int position, int width)
{
    (void)context, (void)layer, (void)values, (void)position, (void)width;
    if (!strcmp(point, "embed")) {
        double time = world.in_pass ? world.slope : 1;
        simulated += time * (0.95 + 0.001 * dice(101)) * (dice(200) ? 1 : 3); /* noise; at times it is held up */
    }
    world.in_pass = !strcmp(point, "embed");
}

static int ask_table(run_session *s, int at, int before, double *p)
{
    (void)before;
    simulated += world.ask;
    *p = 0.5;
    int next = world.sofar.n + at, right = next < world.truth.n && dice(1000000) < 1e6 * world.chance;
    return right ? world.truth.ids[next] : (next < world.truth.n ? world.truth.ids[next] + 1 : 1) % s->model->config.vocab;
}

static int nothing_behind(const run_session *s) { return (void)s, 0; }

/* Tokens a second of the best fixed number of guesses. */
static double best_fixed(void)
{
    double best = 0, tokens = 1, reached = 1;
    for (int k = 0; k < RUN_DRAFT_MOST; k++) {
        double rate = tokens / (1 + (world.slope + world.ask) * k);
        best = rate > best ? rate : best;
        tokens += reached *= world.chance;
    }
    return best;
}

/* Tokens a simulated second over at least n tokens. */
static double simulate(run_session *s, const int *prompt, run_generation *how, int n)
{
    double began = 0, time = 0;
    int tokens = 0;
    while (tokens < n) {
        run_result r;
        if (run_position(s) > 1 && (run_rewind(s, 0, &problem) || run_eval(s, prompt, 1, &problem)))
            die("engine: %s", problem.text);
        world.sofar.n = 0;
        began = simulated;
        if (run_generate(s, how, &r, &problem))
            die("engine: %s", problem.text);
        time += simulated - began;
        tokens += r.tokens;
    }
    return tokens / time;
}

static int controller(const char *path)
{
    static const double slopes[] = { 0.03, 0.1, 0.25, 0.5, 0.95 }, chances[] = { 0, 0.15, 0.3, 0.45, 0.6, 0.8, 0.95 }, ask = 0.05;
    static const double changes[][2][3] = {     /* slope, ask, chance; before and after */
        { { 0.1, 0.03, 0.05 }, { 0.1, 0.03, 0.8 } }, { { 0.1, 0.03, 0.9 }, { 0.1, 0.03, 0.1 } },
        { { 0.9, 0.03, 0.5 }, { 0.05, 0.03, 0.5 } }, { { 0.05, 0.03, 0.5 }, { 0.9, 0.03, 0.5 } } };
    run_model *m = open_model(path);
    int prompt[1] = { 1 };
    run_generation how = { .max_tokens = 300, .draft = RUN_DRAFT_OFF, .callback = note_token, .sampling = { .top_p = 1, .repeat_penalty = 1 } };
    world.truth.s = open_session(m, LONG, 1, 1);
    how.context = &world.truth;
    if (run_eval(world.truth.s, prompt, 1, &problem) || run_generate(world.truth.s, &how, NULL, &problem))
        die("engine: %s", problem.text);
    how.draft = RUN_DRAFT_HEADS;
    how.context = &world.sofar;
    for (int i = 0; i < 35 + 4; i++) {
        run_session *s = open_session(m, LONG, 1, 1);
        const double change[3] = { slopes[i % 5], ask, chances[i / 5 % 7] }, *before = i < 35 ? change : changes[i - 35][0];
        dice_state = (uint64_t)i + 1;
        simulated = 1;
        world.sofar.s = s;
        world.slope = before[0], world.ask = before[1], world.chance = before[2];
        run_observe(s, pass_takes_time, NULL);
        s->drafting = need(drafting_open(s, &problem));
        s->drafting->ask = ask_table;
        s->drafting->behind = nothing_behind;
        if (run_eval(s, prompt, 1, &problem))
            die("engine: %s", problem.text);
        double rate = simulate(s, prompt, &how, i < 35 ? 2000 : 1000);
        if (i >= 35) {
            world.slope = changes[i - 35][1][0], world.ask = changes[i - 35][1][1], world.chance = changes[i - 35][1][2];
            how.max_tokens = 200;
            simulate(s, prompt, &how, 200);
            how.max_tokens = 300;
            rate = simulate(s, prompt, &how, 900);
        }
        /* passes are held up by 1 % on average */
        printf("%s slope %.2f ask %.2f chance %.2f: %.3f of the best, %.3f of none\n", i < 35 ? "steady" : "change", world.slope, world.ask,
               world.chance, 1.01 * rate / best_fixed(), 1.01 * rate);
        simulated = -1;
        run_session_close(s);
    }
    run_session_close(world.truth.s);
    run_close(m);
    return 0;
}

static int lookups(int trials)
{
    for (int trial = 0; trial < trials; trial++) {
        struct lookup l;
        int text[300], n = 1 + dice(250), letters = 1 + dice(trial % 3 ? 4 : 60);
        if (lookup_open(&l, text, n))
            die("out of memory");
        for (int i = 0; i < n; i++) {
            text[i] = i > 20 && dice(3) ? text[i - 1 - dice(20)] : dice(letters);
            lookup_add(&l);
            struct cursor c = lookup_end(&l);
            int longest = 0, added[310], k = i + 1, expected = -1;
            for (int end = 0; end < i; end++) {
                int length = 0;
                while (length <= end && text[end - length] == text[i - length])
                    length++;
                if (length >= longest && length)
                    longest = length, expected = text[end + 1];
            }
            if (c.length != longest || (i < 32 && followed(&l, c) != expected))
                die("trial %d: after %d tokens a match of %d, not %d", trial, i + 1, c.length, longest);
            memcpy(added, text, (size_t)k * sizeof *text);
            for (int j = 0; j < 6; j++) {
                int before = c.length, next = dice(3) && followed(&l, c) >= 0 ? followed(&l, c) : dice(letters);
                added[k++] = next;
                follow(&l, &c, next);
                if (c.length > before + 1)
                    die("trial %d: a match that grew by more than was added", trial);
                int found = c.length == 0;
                for (int end = c.length - 1; end <= i && !found && c.length; end++)
                    found = !memcmp(text + end - c.length + 1, added + k - c.length, (size_t)c.length * sizeof *text);
                if (!found)
                    die("trial %d: a match of %d that is not in the text", trial, c.length);
            }
        }
        if (l.n_clones > n || l.n_edges > 2 * n)
            die("trial %d: %d clones and %d edges for %d tokens", trial, l.n_clones, l.n_edges, n);
        lookup_close(&l);
    }
    printf("lookup finds what a plain search finds\n");
    return 0;
}

/* How often the first three tokens come, over many seeds, against their exact probabilities, where the
   first is always guessed to be the best and the others are guessed at random. Chi-square: its mean is the number of
   free cells, its standard deviation the square root of twice that. */
struct three { const run_session *s; int ids[3], n; };

static int keep_three(void *context, int id, const char *text, size_t length)
{
    struct three *t = context;
    (void)text, (void)length;
    if (id >= 0)
        t->ids[t->n++] = id;
    return 0;
}

static int best_first(void *context, const run_session *s, int *tokens, int most)
{
    const struct three *t = context;
    int vocab = s->model->config.vocab;
    for (int i = 0; i < most; i++)
        tokens[i] = dice(2) ? t->ids[2] : dice(vocab);
    return most;
}

static void probabilities(run_session *s, float temperature, double *p)
{
    const float *logits = run_logits(s);
    int vocab = s->model->config.vocab, best = 0;
    double sum = 0;
    for (int i = 0; i < vocab; i++)
        best = logits[i] > logits[best] ? i : best;
    for (int i = 0; i < vocab; i++)
        sum += p[i] = exp(((double)logits[i] - (double)logits[best]) / (double)temperature);
    for (int i = 0; i < vocab; i++)
        p[i] /= sum;
}

static double chi_square(const int *counts, const double *p, int n, int total, int *cells)
{
    double chi = 0, rest_p = 0, rest = 0;
    *cells = -1;
    for (int i = 0; i < n; i++) {
        double expected = p[i] * total;
        if (expected < 5) {
            rest_p += expected;
            rest += counts[i];
            continue;
        }
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        ++*cells;
    }
    if (rest_p >= 5) {
        chi += (rest - rest_p) * (rest - rest_p) / rest_p;
        ++*cells;
    }
    return chi;
}

static int frequencies(const char *path, int seeds, int percent)
{
    run_model *m = open_model(path);
    int vocab = m->config.vocab, ids[] = { 1, 5, 9 }, total = 0, cells[2];
    float temperature = (float)percent / 100;
    double *p = need(calloc((size_t)vocab, sizeof *p)), *q = need(calloc((size_t)vocab, sizeof *q));
    int *counts = need(calloc(2 * (size_t)vocab, sizeof *counts));
    run_session *s = open_session(m, 16, 1, 0);
    struct three t = { .s = s };
    s->drafting = need(drafting_open(s, &problem));
    s->drafting->foreign = best_first;
    s->drafting->foreign_context = &t;
    if (run_eval(s, ids, 3, &problem))
        die("engine: %s", problem.text);
    probabilities(s, temperature, p);
    int first = best_of(run_logits(s), vocab);
    if (run_eval(s, &first, 1, &problem))
        die("engine: %s", problem.text);
    probabilities(s, temperature, q);   /* of the second token, if the first is the best one */
    t.ids[2] = best_of(run_logits(s), vocab);
    for (int seed = 0; seed < seeds; seed++) {
        run_generation how = { .max_tokens = 3, .callback = keep_three, .context = &t,
                               .sampling = { .temperature = temperature, .top_p = 1, .repeat_penalty = 1, .seed = (uint64_t)seed } };
        int guess = t.ids[2];
        t.n = 0;
        if (run_rewind(s, 2, &problem) || run_eval(s, ids + 2, 1, &problem) || run_generate(s, &how, NULL, &problem))
            die("engine: %s", problem.text);
        if (t.n < 2 && m->config.n_eos)
            t.ids[t.n] = m->config.eos[0];  /* the end is not handed on */
        counts[t.ids[0]]++;
        if (t.n && t.ids[0] == first) {
            counts[vocab + t.ids[1]]++;
            total++;
        }
        t.ids[2] = guess;
    }
    double a = chi_square(counts, p, vocab, seeds, &cells[0]), b = chi_square(counts + vocab, q, vocab, total, &cells[1]);
    printf("first %.1f of %d cells, second %.1f of %d cells in %d\n", a, cells[0], b, cells[1], total);
    if (total < seeds / 20 || cells[0] < 5 || cells[1] < 5)
        die("too few to tell");
    if (a > cells[0] + 6 * sqrt(2.0 * cells[0]) || b > cells[1] + 6 * sqrt(2.0 * cells[1]))
        die("not the frequencies that the probabilities say");
    free(p);
    free(q);
    free(counts);
    run_session_close(s);
    run_close(m);
    return 0;
}

/* What the heads of a model (or of a file of their own) say. Standard input: for each position t of the
   sequence that is tried: the number of ids, the ids, the token drawn behind them, and whether the prompt comes in one piece. Standard
   output: float32 logits of the trunk for the last id, then of three steps of the heads, each with its own proposal. */
static int heads(const char *path, const char *file, int steps)
{
    run_model *m = open_model(path);
    int n, ids[LONG], next, piece;
    if (*file && strcmp(file, "-") && run_attach_heads(m, file, &problem))
        die("engine: %s", problem.text);
    if (!m->n_heads)
        die("engine: there are no heads");
    size_t vocab = (size_t)m->config.vocab;
    while (scanf("%d", &n) == 1 && n > 0 && n < LONG - 8) {
        run_session *s = open_session(m, LONG, 1, 1);
        for (int i = 0; i < n; i++)
            if (scanf("%d", &ids[i]) != 1)
                die("engine: ids are missing");
        if (scanf("%d %d", &next, &piece) != 2)
            die("engine: the next id is missing");
        for (int at = 0; at < n; at += piece ? n : 1)
            if (run_eval(s, ids + at, piece ? n : 1, &problem))
                die("engine: %s", problem.text);
        fwrite(run_logits(s), sizeof(float), vocab, stdout);
        s->tokens[s->length] = next;
        for (int step = 0, token = 0; step < steps; step++) {
            double sure;
            token = ask_heads(s, step, token, &sure);
            int module = m->heads[0].kind == SERIAL ? 0 : step;
            if (token < 0)
                die("engine: no proposal at step %d", step);
            fwrite(logits_of_head(s, module), sizeof(float), (size_t)m->heads[module].model.config.vocab, stdout);
        }
        run_session_close(s);
    }
    run_close(m);
    return 0;
}

/* Rows of five sessions, mixed at random into passes of one of them. */
static int mixed_rows(const char *path, int seed)
{
    enum { N = 5, EACH = 150 };
    run_model *m = open_model(path);
    size_t vocab = (size_t)m->config.vocab;
    static int ids[N][EACH];
    float *expected[N];
    run_session *s[N];
    dice_state = (uint64_t)seed;
    wake_others(m);
    for (int j = 0; j < N; j++) {
        random_ids(m, ids[j], EACH);
        expected[j] = need(malloc(EACH * vocab * sizeof(float)));
        s[j] = open_session(m, EACH, 1 + j % 3, seed % 2);
        feed(s[j], ids[j], EACH, LOGIT_ROWS, expected[j]);
        run_session_close(s[j]);
        s[j] = open_session(m, EACH, 1 + j % 3, seed % 2);
    }
    for (int done = 0; done < N * EACH;) {
        struct row rows[CHUNK] = { 0 };
        struct pass *p = s[dice(N)]->pass;
        int n = 0, most = 1 + dice(CHUNK), wanted[LOGIT_ROWS], n_wanted = 0;
        for (int tries = 0; n < most && tries < 100; tries++) {
            int j = dice(N);
            int run = 1 + dice(dice(2) ? 3 : 30);
            for (; run > 0 && n < most && s[j]->length < EACH; run--) {
                int wants = n_wanted < LOGIT_ROWS && !dice(3);
                rows[n] = (struct row){ s[j], NULL, ids[j][s[j]->length], s[j]->length, wants };
                if (wants)
                    wanted[n_wanted++] = n;
                s[j]->tokens[s[j]->length] = ids[j][s[j]->length];
                s[j]->written = ++s[j]->length;
                n++;
            }
        }
        if (!n)
            continue;
        if (run_pass(p, rows, n, &problem))
            die("engine: %s", problem.text);
        for (int i = 0; i < n_wanted; i++) {
            const struct row *r = &rows[wanted[i]];
            int j = 0;
            while (s[j] != r->session)
                j++;
            if (memcmp(p->logits + (size_t)i * vocab, expected[j] + (size_t)r->position * vocab,
                       vocab * sizeof(float)))
                die("%d rows of several sessions in a pass: other logits at position %d", n,
                    r->position);
        }
        done += n;
    }
    for (int j = 0; j < N; j++) {
        run_session_close(s[j]);
        free(expected[j]);
    }
    run_close(m);
    printf("same with rows of several sessions in one pass\n");
    return 0;
}

/* -- given by Python on standard input -- */

static int take_bytes(void *to, size_t n)
{
    return fread(to, 1, n, stdin) == n;
}

static int raw_logits(const char *path, int f32)
{
    run_model *m = open_model(path);
    int32_t ids[4096];
    int n = (int)fread(ids, sizeof *ids, 4096, stdin);
    float *logits = need(malloc((size_t)n * (size_t)m->config.vocab * sizeof *logits + 1));
    run_session *s = open_session(m, n, 1, f32);
    feed(s, ids, n, LOGIT_ROWS, logits);
    fwrite(logits, sizeof *logits, (size_t)n * (size_t)m->config.vocab, stdout);
    return 0;
}

static int samples(const char *path)
{
    run_model *m = open_model(path);
    run_session *s = open_session(m, 512, 1, 0);
    struct {
        int32_t draws, history, top_k;
        float temperature, top_p, min_p, penalty;
        uint32_t seed, stream;
    } r;
    while (take_bytes(&r, sizeof r)) {
        run_sampling how = { r.temperature, r.top_p, r.min_p, r.penalty, r.top_k,
                             r.seed, r.stream };
        if (r.history > 512 || !take_bytes(s->tokens, (size_t)r.history * sizeof(int32_t)) ||
            !take_bytes(s->pass->logits, (size_t)m->config.vocab * sizeof(float)))
            die("engine: a request is cut off");
        s->length = r.history;
        s->wanted = 1;
        for (int i = 0; i < r.draws; i++, how.seed++) {
            int32_t id = run_sample(s, &how, &problem);
            fwrite(&id, sizeof id, 1, stdout);
        }
    }
    return 0;
}

/* Conversations: int32 messages, each int32 role (0 system, 1 user, 2 assistant), int32 length,
   bytes. Answers: int32 length, text; int32 n, ids. */
static int renderings(const char *path)
{
    run_model *m = open_model(path);
    int32_t n, head[2];
    while (take_bytes(&n, sizeof n)) {
        struct chat c;
        struct rendering r;
        int *ids = NULL;
        if (chat_begin(&c, m, NULL, &problem))
            die("engine: %s", problem.text);
        for (int i = 0; i < n; i++) {
            if (!take_bytes(head, sizeof head))
                die("engine: a request is cut off");
            char *text = need(malloc((size_t)head[1] + 1));
            if (!take_bytes(text, (size_t)head[1]) ||
                chat_add(&c, (enum role)head[0], text, (size_t)head[1], &problem))
                die("engine: a request is cut off");
            free(text);
        }
        struct text out = { 0 };
        if (render_chat(&c, &r))
            die("engine: out of memory");
        for (int i = 0; i < r.n; i++)
            text_add(&out, r.spans[i].text, r.spans[i].length);
        free(r.spans);
        n = (int32_t)out.n;
        fwrite(&n, sizeof n, 1, stdout);
        fwrite(out.n ? out.data : "", 1, out.n, stdout);
        n = chat_ids(&c, &ids, &problem);
        fwrite(&n, sizeof n, 1, stdout);
        fwrite(ids, sizeof *ids, (size_t)n, stdout);
        free(ids);
        free(out.data);
        chat_drop(&c, 0);
        free(c.messages);
    }
    return 0;
}

/* -- allocations: the linker sends run.c's calls here -- */

static _Atomic long allocations;

#ifdef COUNT_ALLOCATIONS
void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *old, size_t n);
void *__real_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *old, size_t n);
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
void *__wrap_malloc(size_t n) { return allocations++, __real_malloc(n); }
void *__wrap_calloc(size_t n, size_t size) { return allocations++, __real_calloc(n, size); }
void *__wrap_realloc(void *old, size_t n) { return allocations++, __real_realloc(old, n); }
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset)
{
    return allocations++, __real_mmap(at, n, protection, flags, file, offset);
}
#endif

struct guard {
    long before;
    int tokens;
};

static int guarded(void *context, int id, const char *text, size_t length)
{
    struct guard *g = context;
    (void)id, (void)text, (void)length;
    if (!g->tokens++)
        g->before = allocations;
    else if (allocations != g->before)
        die("decoding allocated %ld times up to token %d", allocations - g->before, g->tokens);
    return 0;
}

static int allocate(const char *path)
{
    run_model *m = open_model(path);
    static const char *const stops[] = { "never said", "nor this" };
    if (!allocations)
        die("engine: allocations are not counted in this build");
    for (int threads = 1; threads <= 2; threads++)
        for (int kind = 0; kind < 3; kind++) {
            run_session *s = open_session(m, 300, threads, kind == 2);
            struct guard g = { 0 };
            run_generation how = { { .repeat_penalty = kind ? 1.1f : 1, .temperature = (float)kind,
                                     .top_p = kind == 1 ? 0.9f : 1, .top_k = kind == 2 ? 5 : 0 },
                                   .stops = stops, .n_stops = kind,
                                   .callback = guarded, .context = &g };
            int id = 1;
            if (run_eval(s, &id, 1, &problem) || run_generate(s, &how, NULL, &problem))
                die("engine: %s", problem.text);
            if (g.tokens < 30)
                die("engine: only %d tokens", g.tokens);
            long before = allocations;
            if (run_rewind(s, 5, &problem) || run_eval(s, &id, 1, &problem))
                die("engine: %s", problem.text);
            for (int i = 0; i < 100; i++)
                if ((id = run_sample(s, &how.sampling, &problem)) < 0 ||
                    run_eval(s, &id, 1, &problem))
                    die("engine: %s", problem.text);
            if (allocations != before)
                die("rewind, eval and sample allocated %ld times", allocations - before);
            run_session_close(s);
        }
    run_close(m);
    printf("decoding allocates nothing\n");
    return 0;
}

/* -- two sessions in two threads -- */

struct teller {
    const run_model *m;
    int threads, seed;
    struct text text;
    char sentence[512];
};

static int tell_more(void *context, int id, const char *text, size_t length)
{
    (void)id;
    text_add(&((struct teller *)context)->text, text, length);
    return 0;
}

static void *tell(void *argument)
{
    struct teller *t = argument;
    run_error error = { "" };
    run_session *s = run_session_open(t->m, &(run_options){ 120, t->threads, t->seed & 1 }, &error);
    run_generation how = { { .repeat_penalty = 1, .temperature = 1, .top_p = 0.9f,
                             .seed = (uint64_t)t->seed },
                           .max_tokens = 80, .callback = tell_more, .context = t };
    int *ids = NULL, bos = 1, n = run_tokenize(t->m, "Once upon a time", 16, 0, &ids, &error);
    if (!s || n < 1 || run_eval(s, &bos, 1, &error) || run_eval(s, ids, n, &error) ||
        run_generate(s, &how, NULL, &error) || run_rewind(s, 3, &error) ||
        run_eval(s, ids, 1, &error) ||
        run_generate(s, &how, NULL, &error))
        snprintf(t->sentence, sizeof t->sentence, "%s", error.text);
    free(ids);
    run_session_close(s);
    return NULL;
}

static int parallel(const char *path)
{
    run_model *m = open_model(path);
    struct teller alone[2] = { { m, 1, 1, { 0 }, "" }, { m, 2, 2, { 0 }, "" } };
    struct teller both[2] = { { m, 2, 1, { 0 }, "" }, { m, 1, 2, { 0 }, "" } };
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        tell(&alone[i]);
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, tell, &both[i]))
            die("engine: no thread");
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        if (*alone[i].sentence || *both[i].sentence)
            die("%s%s", alone[i].sentence, both[i].sentence);
        if (alone[i].text.n < 100 || alone[i].text.n != both[i].text.n ||
            memcmp(alone[i].text.data, both[i].text.data, alone[i].text.n))
            die("another text beside another session: %s\nand alone: %s", both[i].text.data,
                alone[i].text.data);
        free(alone[i].text.data);
        free(both[i].text.data);
    }
    run_close(m);
    printf("same text in two threads\n");
    return 0;
}

#ifdef COPY_FILES
/* Files are not mapped but read into memory of just their size, so that AddressSanitizer sees what
   lies behind their ends. */
void *__real_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
int __real_munmap(void *at, size_t n);
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
int __wrap_munmap(void *at, size_t n);
static void *copies[8];

void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset)
{
    void *copy;
    int i = 0;
    if (file < 0)
        return __real_mmap(at, n, protection, flags, file, offset);
    while (i < 8 && copies[i])
        i++;
    if (i == 8 || posix_memalign(&copy, 4096, n) || pread(file, copy, n, offset) != (ssize_t)n)
        return MAP_FAILED;
    return copies[i] = copy;
}

int __wrap_munmap(void *at, size_t n)
{
    for (int i = 0; i < 8; i++)
        if (copies[i] == at) {
            free(at);
            copies[i] = NULL;
            return 0;
        }
    return __real_munmap(at, n);
}
#endif

/* -- damaged files: opened and, where they open, used. Nothing may crash; what is refused is
   refused in a sentence. Standard output and error of the modes go nowhere. -- */

static char now_trying[600];
static int turn;                    /* counts the files, to vary what is done with them */

static void too_long(int signal)
{
    (void)signal;
    ssize_t ignored = write(2, "takes too long: ", 16);
    ignored = write(2, now_trying, strlen(now_trying));
    ignored = write(2, "\n", 1);
    (void)ignored;
    _exit(3);
}

/* A sentence: not empty, one line, nothing that moves the cursor of a terminal. */
static void check_sentence(const char *text)
{
    size_t n = strlen(text);
    if (n < 10)
        die("%s: no sentence: \"%s\"", now_trying, text);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] < 32 || text[i] == 127)
            die("%s: a control character in: %s", now_trying, text);
}

static int use_model(const run_model *m, run_error *error)
{
    static const char text[] = "hello <|im_start|>a b\n\n 12345 \xc3\xa9\xff";
    static const char *const stops[] = { "o w", "\n\n" };
    run_session *s = run_session_open(m, &(run_options){ 40, 1, turn % 2 }, error);
    int *ids = NULL, first[3] = { 0, 1 % m->config.vocab, m->config.vocab - 1 }, n = 0, failed;
    run_generation how = { { .repeat_penalty = 1.1f, .temperature = 1, .top_p = 0.9f,
                             .top_k = turn % 3 * 5 },
                           .max_tokens = m->n_heads ? 12 : 3, .stops = stops, .n_stops = 2,
                           .show_special = turn % 2 };
    if (!s)
        return -1;
    for (int i = 0; i < 2 && m->tokenizer; i++) {
        free(ids);
        if ((n = run_tokenize(m, text, sizeof text - 1, i, &ids, error)) < 0)
            die("%s: %s", now_trying, error->text);
        for (int k = 0; k < n; k++)
            if (ids[k] < 0 || ids[k] >= m->config.vocab)
                die("%s: id %d of %d", now_trying, ids[k], m->config.vocab);
    }
    failed = run_eval(s, first, 3, error) || (n && run_eval(s, ids, n < 20 ? n : 20, error));
    if (!failed && m->n_heads) {        /* that their proposals are wrong is no error */
        s->drafting = need(drafting_open(s, error));
        s->drafting->random = 1;
    }
    failed = failed || run_generate(s, &how, NULL, error);
    free(ids);
    run_session_close(s);
    if (run_text(m, "chat.user.before") && m->tokenizer) {
        struct chat c;
        ids = NULL;
        int place = turn % 2 && *format_text(m, "chat.system.place");
        const char *system = place ? " be brief\n" : NULL;
        if (chat_begin(&c, m, system, error) || chat_add(&c, USER, " hi ", 4, error) ||
            chat_add(&c, ASSISTANT, "<think>a</think>\n\nyes ", 22, error) ||
            chat_add(&c, USER, "", 0, error) || chat_ids(&c, &ids, error) < 0)
            die("%s: %s", now_trying, error->text);
        free(ids);
        chat_drop(&c, 0);
        free(c.messages);
    }
    return failed ? -1 : 0;
}

static const char *trunk_of_heads; /* files are draft heads for this model */

/* 0, or -1 and why the file is refused. */
static int try_file(const char *path, int thoroughly, run_error *error)
{
    char out[600];
    char *quantize[] = { "run", (char *)(uintptr_t)path, "-m", "quantize", "-j", "1", "--type",
                         (char *)(uintptr_t)target_names[turn % 8], "-o", out };
    char *info[] = { "run", (char *)(uintptr_t)path, "-m", "info", "-j", "1",
                     turn % 2 ? "--json" : "--verify" };
    alarm(60);
    turn++;
    error->text[0] = '\0';
    run_model *m = run_open(trunk_of_heads ? trunk_of_heads : path, error);
    if (m && trunk_of_heads && run_attach_heads(m, path, error)) {
        run_close(m);
        m = NULL;
    }
    int opened = m != NULL, failed = m ? use_model(m, error) : -1;
    if (failed)
        check_sentence(error->text);
    run_close(m);
    if (thoroughly && !trunk_of_heads) {
        run_error other = { "" };
        snprintf(out, sizeof out, "%.500s.out", path);
        struct options o = parse_options(10, quantize);
        if (mode_quantize(&o, &other) == 0) {
            if (opened && !(m = run_open(out, &other)))
                die("%s: it opens, but not when quantized to %s: %s", now_trying,
                    target_names[o.type], other.text);
            if (opened)
                run_close(m);
            if (remove(out))
                die("%s: quantize wrote nothing", now_trying);
        } else {
            check_sentence(other.text);
            if (access(out, F_OK) == 0)
                die("%s: quantize failed and left a file", now_trying);
        }
        o = parse_options(7, info);
        mode_info(&o, &other);
    }
    alarm(0);
    return failed;
}

/* FROM < TO: single-byte changes number FROM to TO - 1, drawn with SEED; FROM > TO: cut to every
   length from FROM - 1 down to TO. */
static int bad(const char *path, const char *work, int from, int to, int seed)
{
    FILE *file = need(fopen(path, "rb"));
    static unsigned char data[1 << 20];
    int size = (int)fread(data, 1, sizeof data, file), fine = 0, refused = 0;
    FILE *report = need(fdopen(dup(1), "w")), *out = need(fopen(work, "wb"));
    run_error error;
    fclose(file);
    if (fwrite(data, 1, (size_t)size, out) != (size_t)size || fclose(out) ||
        !freopen("/dev/null", "w", stdout))
        die("engine: cannot write %s", work);
    int target = open(work, O_RDWR);
    messages = need(fopen("/dev/null", "w"));
    for (int i = from; from < to ? i < to : i > to; i += from < to ? 1 : -1) {
        unsigned char byte;
        int at = 0;
        if (from < to) {
            dice_state = (uint64_t)(seed + i) * 2654435761u;
            dice(2);
            /* half of them in the header, which is small */
            int header = 8 + (int)data[0] + 256 * (int)data[1], kind = dice(4);
            at = dice(2) ? dice(header < size ? header : size) : dice(size);
            byte = (unsigned char)(kind == 0 ? data[at] ^ 1 << dice(8) : kind == 1 ? dice(256)
                                   : kind == 2 ? "0123456789\"\\{}[]:, -enu"[dice(23)]
                                   : data[dice(size)]);
            snprintf(now_trying, sizeof now_trying, "byte %d changed from %d to %d", at, data[at],
                     byte);
            if (pwrite(target, &byte, 1, at) != 1)
                die("engine: cannot write %s", work);
        } else {
            snprintf(now_trying, sizeof now_trying, "cut to %d bytes", i - 1);
            if (ftruncate(target, i - 1))
                die("engine: cannot cut %s", work);
        }
        int failed = try_file(work, i % 8 == 0, &error);
        refused += failed != 0;
        fine += failed == 0;
        if (from < to && pwrite(target, &data[at], 1, at) != 1)
            die("engine: cannot write %s", work);
    }
    remove(work);
    fprintf(report, "%d fine, %d refused\n", fine, refused);
    fclose(report);
    return 0;
}

static int files(void)
{
    char path[500];
    FILE *report = need(fdopen(dup(1), "w"));
    run_error error;
    if (!freopen("/dev/null", "w", stdout))
        die("engine: no /dev/null");
    messages = need(fopen("/dev/null", "w"));
    while (fgets(path, sizeof path, stdin)) {
        path[strcspn(path, "\n")] = '\0';
        snprintf(now_trying, sizeof now_trying, "%s", path);
        dprintf(2, "%s\n", path); /* a crash names its file */
        int failed = 0;
        for (int i = 0; i < 2; i++)
            failed = try_file(path, i, &error);
        fprintf(report, "%s\n", failed ? error.text : "");
        fflush(report);
    }
    fclose(report);
    return 0;
}

/* -- what a team and a session choose by themselves -- */

static int adaptation(int size, int bad_runs, int good_runs, int share)
{
    struct team t = { .size = size, .usable = size };
    for (int i = 0; i < 4 * (bad_runs + good_runs); i++) {
        int waits = i % (bad_runs + good_runs) < bad_runs;
        t.active = t.usable;
        if (t.active < 1 || t.active > size)
            die("%d of %d threads", t.active, size);
        t.waited = waits ? (long long)10000 * share * t.active : 1000 * t.active; /* ns of a millisecond */
        adapt(&t, 1e-3);
        printf("%d\n", t.usable);
    }
    return 0;
}

static int context_of(const char *path, int context)
{
    run_model *m = open_model(path);
    run_session *s = open_session(m, context, 1, 0);
    printf("%d\n", run_context(s));
    run_session_close(s);
    run_close(m);
    return 0;
}

struct tap {
    const char *point;
    int layer;
};

static void write_row(void *context, const char *point, int layer, const float *values, int position, int width)
{
    const struct tap *tap = context;
    (void)position;
    if (!strcmp(point, tap->point) && layer == tap->layer)
        fwrite(values, sizeof *values, (size_t)width, stdout);
}

static int statistics(const char *path, char **words)
{
    struct options o = { .model = path, .prompt_file = words[5], .context = atoi(words[3]), .tokens = atoi(words[4]) };
    struct tensor tensor = { .name = words[0] };
    struct planned plan = { .tensor = &tensor, .type = Q4 };
    struct tap tap = { words[1], atoi(words[2]) };
    struct statistics s = { 0 };
    const float *hessian = NULL;
    int id;
    if (statistics_open(&s, &o, &problem) || find_hessian(&s, &plan, 0, 1, &hessian, &problem))
        die("engine: %s", problem.text);
    if (!hessian)
        die("engine: %s has none", words[0]);
    size_t width = (size_t)s.sites[site_of(s.session->model, words[0])].width;
    fwrite(hessian, sizeof *hessian, width * width, stdout);
    run_observe(s.session, write_row, &tap);
    while (fread(&id, sizeof id, 1, stdin) == 1)
        if (id < 0 ? run_rewind(s.session, 0, &problem) : run_eval(s.session, &id, 1, &problem))
            die("engine: %s", problem.text);
    statistics_close(&s);
    return 0;
}

static int isa(void)
{
    const struct kernels *list[8], *used = choose_kernels(&problem);
    int n = available_kernels(list);
    if (!used)
        die("engine: %s", problem.text);
    printf("%s", used->name);
    for (int i = 0; i < n; i++)
        printf(" %s", list[i]->name);
    printf("\n");
    return 0;
}

int main(int n, char **words)
{
    const char *command = n > 1 ? words[1] : "", *path = n > 2 ? words[2] : "";
    int numbers[4] = { 0 };
    mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0;
    for (int i = 0; i < 4 && i + 3 < n; i++)
        numbers[i] = atoi(words[i + 3]);
    messages = fdopen(2, "w");
    setvbuf(messages, NULL, _IONBF, 0);
    signal(SIGALRM, too_long);
    if (!strcmp(command, "run"))
        return run_main(n - 1, words + 1);
    if (!strcmp(command, "memory")) {
        int status = run_main(n - 1, words + 1);
        char line[200];
        FILE *file = fopen("/proc/self/status", "r");
        while (file && fgets(line, sizeof line, file))
            if (!strncmp(line, "VmHWM:", 6))
                fputs(line, stderr);
        return status;
    }
    if (!strcmp(command, "isa"))
        return isa();
    if (!strcmp(command, "same"))
        return same(path, 1);
    if (!strcmp(command, "hash"))
        return same(path, 0);
    if (!strcmp(command, "rewinds"))
        return rewinds(path, numbers[0], numbers[1]);
    if (!strcmp(command, "drafts"))
        return drafts(path, numbers[0], numbers[1], n > 5 ? words[5] : "");
    if (!strcmp(command, "controller"))
        return controller(path);
    if (!strcmp(command, "lookups"))
        return lookups(numbers[0]);
    if (!strcmp(command, "frequencies"))
        return frequencies(path, numbers[0], numbers[1]);
    if (!strcmp(command, "heads"))
        return heads(path, n > 3 ? words[3] : "-", numbers[1]);
    if (!strcmp(command, "rows"))
        return mixed_rows(path, numbers[0]);
    if (!strcmp(command, "logits"))
        return raw_logits(path, numbers[0]);
    if (!strcmp(command, "sample"))
        return samples(path);
    if (!strcmp(command, "render"))
        return renderings(path);
    if (!strcmp(command, "allocate"))
        return allocate(path);
    if (!strcmp(command, "parallel"))
        return parallel(path);
    if (!strcmp(command, "adapt"))
        return adaptation(numbers[0], numbers[1], numbers[2], numbers[3]);
    if (!strcmp(command, "context"))
        return context_of(path, numbers[0]);
    if (!strcmp(command, "statistics") && n == 9)
        return statistics(path, words + 3);
    trunk_of_heads = getenv("HEADS_OF");
    if (!strcmp(command, "bad") && n == 7)
        return bad(path, words[3], numbers[1], numbers[2], numbers[3]);
    if (!strcmp(command, "files"))
        return files();
    die("engine: unknown command \"%s\"", command);
}
