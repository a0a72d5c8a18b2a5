/* score MODEL f16|f32 < REQUESTS: raw float32 logits after every token, for tests/check_smollm2.py.

   A request is an int32 count and as many int32 ids, read from standard input; each begins with an
   empty context, and its tokens are evaluated one at a time. Only the public interface is used.  */

#define RUN_LIBRARY
#include "run.c"

static int say(const char *text)
{
    fprintf(stderr, "score: %s\n", text);
    return 1;
}

int main(int argc, char **argv)
{
    run_error error;
    if (argc != 3)
        return say("usage: score MODEL f16|f32 < REQUESTS");
    run_model *model = run_open(argv[1], &error);
    if (!model)
        return say(error.text);
    run_options options = {.cache_f32 = strcmp(argv[2], "f32") == 0};
    run_session *session = run_session_open(model, &options, &error);
    if (!session)
        return say(error.text);
    size_t vocab = (size_t)run_vocab_size(model);
    int32_t n, id;
    while (fread(&n, sizeof n, 1, stdin) == 1) {
        if (run_position(session) > 0 && run_rewind(session, 0, &error) < 0)
            return say(error.text);
        for (int i = 0; i < n; i++) {
            if (fread(&id, sizeof id, 1, stdin) != 1)
                return say("a request is cut off");
            if (run_eval(session, &(int){id}, 1, &error) < 0)
                return say(error.text);
            if (fwrite(run_logits(session), sizeof(float), vocab, stdout) != vocab)
                return say("cannot write");
        }
    }
    run_session_close(session);
    run_close(model);
    return 0;
}
