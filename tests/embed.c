/* The smallest program around run.c: continues a text. cc -O3 tests/embed.c -lm -lpthread */
#define RUN_LIBRARY
#include "../run.c"

static int print(void *context, int id, const char *text, size_t length)
{
    (void)context, (void)id;
    fwrite(text, 1, length, stdout);
    return 0;
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "models/stories260K.bin", *prompt = argc > 2 ? argv[2] : "Once upon a time";
    run_error error;
    run_generation how = { { .repeat_penalty = 1 }, .max_tokens = 50, .callback = print };
    int *ids = NULL, bos = -1, n = -1;
    run_model *model = run_open(path, &error);
    run_session *session = model ? run_session_open(model, NULL, &error) : NULL;
    if (session)
        bos = run_bos(model), n = run_tokenize(model, prompt, strlen(prompt), 0, &ids, &error);
    printf("%s", prompt);
    if (n < 0 || (bos >= 0 && run_eval(session, &bos, 1, &error)) || (n && run_eval(session, ids, n, &error)) ||
        run_generate(session, &how, NULL, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    printf("\n");
    free(ids);
    run_session_close(session);
    run_close(model);
}
