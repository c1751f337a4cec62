/* session MODEL_FOLDER IN.f32 OUT.f32 [SEED]: one conversation. IN holds what the user says, OUT gets
 * what the model says: raw float samples of this machine, mono, at the model's rate. */
#include "moshi.h"

#include <stdio.h>
#include <stdlib.h>

static int converse(struct moshi_session *session, const struct moshi_model_info *info, FILE *in,
                    FILE *out)
{
    size_t size = (size_t)info->frame_size, got;
    float *pcm = calloc(2 * size, sizeof *pcm);
    struct moshi_frame frame = {.pcm = pcm + size};
    int status = pcm ? MOSHI_OK : MOSHI_ERROR_MEMORY, silent = 0;

    /* All of IN, the last frame filled up with silence; then silence until the model caught up. */
    while (status == MOSHI_OK &&
           ((got = fread(pcm, sizeof *pcm, size, in)) > 0 || silent++ < info->max_delay)) {
        for (size_t i = got; i < size; i++) pcm[i] = 0.0f;
        status = moshi_session_step(session, pcm, &frame);
        if (status == MOSHI_OK) fwrite(frame.pcm, sizeof *pcm, size, out);
    }
    free(pcm);
    return status;
}

int main(int argc, char **argv)
{
    FILE *in = argc > 3 ? fopen(argv[2], "rb") : NULL;
    FILE *out = in ? fopen(argv[3], "wb") : NULL;
    if (!out) {
        fprintf(stderr, "usage: session MODEL_FOLDER IN.f32 OUT.f32 [SEED]\n");
        return 2;
    }
    struct moshi_model_options model_options = {.folder = argv[1]};
    struct moshi_engine_options engine_options = {.max_sessions = 1};
    struct moshi_session_options options;
    struct moshi_model *model = NULL;
    struct moshi_engine *engine = NULL;
    struct moshi_session *session = NULL;

    int status = moshi_model_open(&model_options, &model);
    if (status == MOSHI_OK) status = moshi_engine_create(model, &engine_options, &engine);
    if (status == MOSHI_OK) {
        moshi_session_options_init(model, &options);
        options.seed = argc > 4 ? strtoull(argv[4], NULL, 10) : 7;
        status = moshi_session_create(engine, &options, &session);
    }
    if (status == MOSHI_OK) status = converse(session, moshi_model_get_info(model), in, out);
    if (status != MOSHI_OK) fprintf(stderr, "session: %s\n", moshi_error_detail());

    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    fclose(in);
    return fclose(out) == 0 && status == MOSHI_OK ? 0 : 1;
}
