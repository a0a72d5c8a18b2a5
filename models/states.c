/* states: what a draft head learns from. Reads sequences from standard input, each as an int32 count and as many
   int32 token ids; for every token of each writes the model's final normed state (float32 [dim]) and the logarithm of
   the sum over its exponentiated logits (float32). train_heads.py compiles and calls it.

   cc -O3 -ffp-contract=off -std=gnu11 -fopenmp -o states states.c -lm -lpthread
   ./states MODEL THREADS LONGEST < sequences > states */
#define RUN_LIBRARY
#include "../run.c"
#include <stdio.h>

static float *found;                    /* [position, dim] */

static void keep(void *context, const char *point, int layer, const float *values, int position, int width)
{
    (void)context, (void)layer;
    if (!strcmp(point, "norm"))
        memcpy(found + (size_t)position * (size_t)width, values, (size_t)width * sizeof *values);
}

int main(int n_words, char **words)
{
    run_error error = { "" };
    run_model *m = n_words == 4 ? run_open(words[1], &error) : NULL;
    run_options options = { .context = m ? atoi(words[3]) : 0, .threads = m ? atoi(words[2]) : 0, .no_heads = 1 };
    run_session *s = m ? run_session_open(m, &options, &error) : NULL;
    if (!s) {
        fprintf(stderr, "states MODEL THREADS LONGEST: %s\n", error.text);
        return 1;
    }
    size_t dim = (size_t)m->config.dim;
    int longest = run_context(s), *ids = malloc((size_t)longest * sizeof *ids);
    float *totals = malloc((size_t)longest * sizeof *totals);
    found = malloc((size_t)longest * dim * sizeof *found);
    run_observe(s, keep, NULL);
    for (int32_t n; fread(&n, sizeof n, 1, stdin) == 1;) {
        if (n < 1 || n > longest || fread(ids, sizeof *ids, (size_t)n, stdin) != (size_t)n || run_rewind(s, 0, &error)) {
            fprintf(stderr, "states: a sequence of %d tokens is too long or incomplete\n", (int)n);
            return 1;
        }
        for (int at = 0, rows; at < n; at += rows) {
            rows = n - at < LOGIT_ROWS ? n - at : LOGIT_ROWS;
            if (eval(s, ids + at, rows, rows, &error)) {
                fprintf(stderr, "states: %s\n", error.text);
                return 1;
            }
            for (int row = 0; row < rows; row++) {
                const float *logits = s->pass->logits + (size_t)row * (size_t)m->config.vocab;
                float best = logits[best_of(logits, m->config.vocab)];
                totals[at + row] = best + (float)log(m->kernels->exp_sum(logits, m->config.vocab, best, 1));
            }
        }
        for (int i = 0; i < n; i++) {
            fwrite(found + (size_t)i * dim, sizeof *found, dim, stdout);
            fwrite(totals + i, sizeof *totals, 1, stdout);
        }
    }
    run_session_close(s);
    run_close(m);
    free(ids);
    free(totals);
    free(found);
    return fflush(stdout) || ferror(stdout);
}
