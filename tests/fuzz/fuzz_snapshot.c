/* fuzz_snapshot.c: snapshots of sessions and of codec streams, which may come from strangers: what is
 * restored can go on, and its own snapshot is restored to the same. An input is a snapshot of
 * tests/fuzz/model, a session's or a codec stream's. Runs in the root of the repository. */
#include "fuzz.h"

#define FRAMES 3
#define FRAME_SIZE 8

static struct moshi_model *model;
static struct moshi_engine *engine;

static void open_model(void)
{
    struct moshi_model_options options = {.folder = "tests/fuzz/model", .threads = 1};
    struct moshi_engine_options capacity = {.max_sessions = 2};
    PROMISE(moshi_model_open(&options, &model) == MOSHI_OK);
    PROMISE(moshi_engine_create(model, &capacity, &engine) == MOSHI_OK);
}

struct answer {
    int status;
    int32_t text, codes[MOSHI_MAX_CODEBOOKS];
    float pcm[FRAME_SIZE];
};

static void talk(struct moshi_session *session, struct answer answers[FRAMES])
{
    const struct moshi_model_info *info = moshi_model_get_info(model);
    const float pcm[FRAME_SIZE] = {0.1f, 0.2f, 0.1f, -0.3f};
    memset(answers, 0, FRAMES * sizeof *answers);
    for (int t = 0; t < FRAMES; ++t) {
        struct moshi_frame frame = {.pcm = answers[t].pcm};
        answers[t].status = moshi_session_step(session, pcm, &frame);
        if (answers[t].status) {
            PROMISE(strstr(moshi_error_detail(), "not finite"));
            return;
        }
        PROMISE(frame.index >= 0 && frame.text_token < info->text_card);
        for (int k = 0; k < frame.n_codes; ++k)
            PROMISE(frame.codes[k] >= 0 && frame.codes[k] < info->card);
        answers[t].text = frame.text_token;
        memcpy(answers[t].codes, frame.codes, (size_t)frame.n_codes * sizeof *frame.codes);
    }
}

static void restore_session(const uint8_t *data, size_t bytes)
{
    static struct answer first[FRAMES], again[FRAMES];
    struct moshi_session *session, *copy;
    const void *note;
    size_t note_bytes, size = 0;
    int status = moshi_session_restore(engine, data, bytes, &session, &note, &note_bytes);
    promise_answer(status);
    PROMISE((status == MOSHI_OK) == (session != NULL));
    if (status) return;
    PROMISE(note_bytes == 0 ||
            ((const uint8_t *)note >= data && (const uint8_t *)note + note_bytes <= data + bytes));
    PROMISE(moshi_session_snapshot(session, note, note_bytes, NULL, &size) == MOSHI_OK);
    uint8_t *saved = malloc(size);
    PROMISE(saved && moshi_session_snapshot(session, note, note_bytes, saved, &size) == MOSHI_OK);
    status = moshi_session_restore(engine, saved, size, &copy, &note, &note_bytes);
    PROMISE(status == MOSHI_OK);
    talk(session, first);
    talk(copy, again);
    PROMISE(memcmp(first, again, sizeof first) == 0);
    moshi_session_destroy(session);
    moshi_session_destroy(copy);
    free(saved);
}

static void restore_stream(const uint8_t *data, size_t bytes)
{
    const float pcm[FRAME_SIZE] = {0.1f, 0.2f, 0.1f, -0.3f};
    float sound[FRAME_SIZE];
    int32_t codes[MOSHI_MAX_CODEBOOKS];
    struct mimi_stream *stream;
    PROMISE(mimi_stream_create(engine, 1, &stream) == MOSHI_OK);
    promise_answer(mimi_stream_restore(stream, data, bytes));
    for (int t = 0; t < FRAMES; ++t) {
        PROMISE(mimi_stream_encode(stream, pcm, codes) == MOSHI_OK);
        int status = mimi_stream_decode(stream, codes, moshi_model_get_info(model)->codebooks,
                                        sound);
        PROMISE(status == MOSHI_OK || strstr(moshi_error_detail(), "not finite"));
    }
    mimi_stream_destroy(stream);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (!model) open_model();
    restore_session(data, bytes);
    restore_stream(data, bytes);
    return 0;
}
