/* fuzz_model.c: the configs of tests/fuzz/model, changed: what opens can be talked to, and a reset
 * conversation repeats itself. An input is config.json, a line "====" and the codec's config, for
 * the model's own weights; a third part, after another such line, is the header of other weights for
 * the language model. Runs in the root of the repository. */
#include <math.h>

#include "fuzz.h"
#include "json.h"

#define MODEL "tests/fuzz/model/"
#define FRAMES 12 /* more than the contexts of the seeds */
#define MAX_FRAME 4096

struct answer {
    int status;
    int32_t text, codes[MOSHI_MAX_CODEBOOKS];
    float pcm[MAX_FRAME];
};

static void talk(const struct moshi_model_info *info, struct moshi_session *session,
                 struct answer answers[FRAMES])
{
    static float pcm[MAX_FRAME];
    for (int i = 0; i < MAX_FRAME; ++i) pcm[i] = 0.3f * sinf(0.1f * (float)i);
    memset(answers, 0, FRAMES * sizeof *answers);
    for (int t = 0; t < FRAMES; ++t) {
        struct answer *answer = &answers[t];
        struct moshi_frame frame = {.pcm = answer->pcm};
        answer->status = moshi_session_step(session, pcm, &frame);
        if (answer->status) {
            /* Numbers can overflow with these weights; nothing else can go wrong. */
            PROMISE(strstr(moshi_error_detail(), "not finite"));
            return;
        }
        PROMISE(frame.index == t && frame.text_token < info->text_card);
        PROMISE(frame.has_output == (t >= info->max_delay));
        for (int k = 0; k < frame.n_codes; ++k)
            PROMISE(frame.codes[k] >= 0 && frame.codes[k] < info->card);
        answer->text = frame.text_token;
        memcpy(answer->codes, frame.codes, (size_t)frame.n_codes * sizeof *frame.codes);
    }
}

static void converse(struct moshi_model *model, struct moshi_engine *engine)
{
    static struct answer first[FRAMES], again[FRAMES];
    const struct moshi_model_info *info = moshi_model_get_info(model);
    struct moshi_session *session;
    int status = moshi_session_create(engine, NULL, &session);
    promise_answer(status);
    if (status) return;
    talk(info, session, first);
    if (first[FRAMES - 1].status == MOSHI_OK) {
        PROMISE(moshi_session_reset(session, NULL) == MOSHI_OK);
        talk(info, session, again);
        PROMISE(memcmp(first, again, sizeof first) == 0);
    }
    moshi_session_destroy(session);
}

/* A safetensors file of this header and as many bytes as its tensors claim, within reason. */
static void write_weights(const char *name, const uint8_t *header, size_t bytes)
{
    static uint8_t file[1 << 17];
    struct json_document *document;
    int64_t claimed = 0, end;
    if (json_parse((const char *)header, bytes, "input", &document) == MOSHI_OK) {
        for (const struct json *node = json_root(document)->first; node; node = node->next) {
            const struct json *offsets = json_get(node, "data_offsets");
            const struct json *begin = offsets ? offsets->first : NULL;
            if (begin && json_integer(begin->next, &end) && end > claimed) claimed = end;
        }
        json_free(document);
    }
    size_t total = 8 + bytes + (size_t)(claimed < 1 << 16 ? claimed : 1 << 16);
    if (total > sizeof file) return;
    for (size_t i = 0; i < total; ++i) file[i] = (uint8_t)(i % 64); /* floats from 0 to 0.8 */
    for (int i = 0; i < 8; ++i) file[i] = (uint8_t)((uint64_t)bytes >> 8 * i);
    memcpy(file + 8, header, bytes);
    fuzz_write(name, file, total);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const uint8_t *part;
    struct moshi_model *model;
    struct moshi_engine *engine = NULL;
    struct moshi_model_options options = {
        .lm_path = MODEL "model.safetensors", .mimi_path = MODEL "mimi.safetensors", .threads = 1};
    struct moshi_engine_options capacity = {.max_sessions = 1};
    size_t part_bytes = fuzz_part(&data, &bytes, &part);
    fuzz_write("config.json", part, part_bytes);
    part_bytes = fuzz_part(&data, &bytes, &part);
    fuzz_write("mimi.json", part, part_bytes);
    if (bytes > 0) {
        write_weights("model.safetensors", data, bytes);
        options.lm_path = fuzz_path("model.safetensors");
    }
    options.config_path = fuzz_path("config.json");
    options.mimi_config_path = fuzz_path("mimi.json");
    int status = moshi_model_open(&options, &model);
    promise_answer(status);
    if (status == MOSHI_OK) {
        status = moshi_engine_create(model, &capacity, &engine);
        promise_answer(status);
    }
    if (status == MOSHI_OK && moshi_model_get_info(model)->frame_size <= MAX_FRAME)
        converse(model, engine);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return 0;
}
