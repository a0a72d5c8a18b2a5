/* logits MODEL CHUNK ID...: raw float32 logits [ids, vocab] on standard output, from a float32 cache,
   with CHUNK tokens a pass (at most as many as the engine takes at once). */
#define RUN_LIBRARY
#include "../run.c"

int main(int argc, char **argv)
{
    run_error error;
    int chunk = argc > 3 ? atoi(argv[2]) : 0, n = argc - 3;
    run_model *m = chunk > 0 ? run_open(argv[1], &error) : NULL;
    run_session *s = m ? run_session_open(m, &(run_options){ n, 0, 1 }, &error) : NULL;
    chunk = chunk < CHUNK ? chunk : CHUNK;
    for (int at = 0; s && at < n; at += chunk)
        for (int first = at; first < at + chunk && first < n; first += LOGIT_ROWS) {
            struct row rows[CHUNK] = { 0 };
            int k = n - at < chunk ? n - at : chunk;
            for (int i = 0; i < k; i++)
                rows[i] = (struct row){ s, NULL, atoi(argv[3 + at + i]), at + i,
                                        at + i >= first && at + i < first + LOGIT_ROWS };
            if (run_pass(s->pass, rows, k, &error)) {
                fprintf(stderr, "%s\n", error.text);
                return 1;
            }
            fwrite(s->pass->logits, sizeof(float), (size_t)s->pass->wanted * (size_t)m->config.vocab, stdout);
        }
    if (!s)
        fprintf(stderr, "%s\n", chunk > 0 ? error.text : "usage: logits MODEL CHUNK ID...");
    return s ? 0 : 1;
}
