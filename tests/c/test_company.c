/* test_company.c: what sessions in company cost. The kernels of the CPU backend are replaced by ones
 * that count the bytes of weights they are given to read, on the packaged tiny model.
 * usage: test_company [model folder] */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cpu/backend_cpu.h"
#include "../../csrc/engine.h"
#include "harness.h"

#define SESSIONS 8
#define FRAMES 12

static struct moshi_model *model;
static struct moshi_engine *engine;

/* ---- counting --------------------------------------------------------------------------- */

static struct cpu_kernels kernels, counting;
static struct backend_ops ops, counting_ops;
static long read_bytes[STAGES];
static int stage;

static int inside(const char *p, const void *memory, size_t bytes)
{
    return p >= (const char *)memory && p < (const char *)memory + bytes;
}

/* Keys and queries meet in the same kernels: they are no weights. */
static int is_history(const void *p)
{
    const struct mimi_state *mimi = &engine->mimi;
    return inside(p, engine->lm.kv.cache.pages, engine->lm.kv.bytes) ||
           inside(p, engine->lm.depth_work.cache.pages, engine->lm.depth_work.cache_bytes) ||
           inside(p, mimi->encoder_kv.cache.pages, mimi->encoder_kv.bytes) ||
           inside(p, mimi->decoder_kv.cache.pages, mimi->decoder_kv.bytes);
}

static void count(const void *w, size_t bytes)
{
    if (!is_history(w)) __atomic_add_fetch(&read_bytes[stage], (long)bytes, __ATOMIC_RELAXED);
}

#define COUNTED(format, name)                                                                      \
    static void dot_##name(const void *w, int columns, int outputs, const float *const *x,         \
                           int rows, float *y, size_t stride)                                      \
    {                                                                                              \
        count(w, (size_t)columns * (size_t)outputs * weight_bytes(format));                        \
        kernels.dot[format](w, columns, outputs, x, rows, y, stride);                              \
    }                                                                                              \
    static void panels_##name(const void *w, int columns, int panels, const float *const *x,       \
                              int rows, float *y, size_t stride)                                   \
    {                                                                                              \
        count(w, panel_bytes(format, columns) * (size_t)panels);                                   \
        kernels.panels[format](w, columns, panels, x, rows, y, stride);                            \
    }

static void tiles_bf16(const void *w, int columns, int outputs, const float *x, int rows, float *y,
                       size_t stride)
{
    count(w, (size_t)columns * (size_t)outputs * weight_bytes(WEIGHT_BF16));
    kernels.tiles[WEIGHT_BF16](w, columns, outputs, x, rows, y, stride);
}

COUNTED(WEIGHT_F32, f32)
COUNTED(WEIGHT_F16, f16)
COUNTED(WEIGHT_BF16, bf16)
COUNTED(WEIGHT_FP8, fp8)
COUNTED(WEIGHT_INT8, int8)
COUNTED(WEIGHT_Q8, q8)
COUNTED(WEIGHT_Q4, q4)

static int counting_run(struct backend *backend, int number,
                        void (*stage_function)(struct backend *, void *), void *arg,
                        size_t arg_bytes)
{
    stage = number;
    return ops.run(backend, number, stage_function, arg, arg_bytes);
}

static void start_counting(void)
{
    struct cpu_backend *cpu = cpu_backend(model->backend);
    kernels = counting = *cpu->kernels;
#define COUNT(format, name)                                                                        \
    counting.dot[format] = dot_##name;                                                             \
    counting.panels[format] = panels_##name
    COUNT(WEIGHT_F32, f32);
    COUNT(WEIGHT_F16, f16);
    COUNT(WEIGHT_BF16, bf16);
    COUNT(WEIGHT_FP8, fp8);
    COUNT(WEIGHT_INT8, int8);
    COUNT(WEIGHT_Q8, q8);
    COUNT(WEIGHT_Q4, q4);
    if (kernels.tiles[WEIGHT_BF16]) counting.tiles[WEIGHT_BF16] = tiles_bf16;
    cpu->kernels = &counting;
    ops = counting_ops = *model->backend->ops;
    counting_ops.run = counting_run;
    model->backend->ops = &counting_ops;
}

/* ---- tests ------------------------------------------------------------------------------ */

static int open_sessions(int n, struct moshi_session *sessions[SESSIONS])
{
    for (int i = 0; i < n; ++i) {
        struct moshi_session_options options;
        moshi_session_options_init(model, &options);
        options.seed = (uint64_t)i;
        CHECK(moshi_session_create(engine, &options, &sessions[i]) == MOSHI_OK);
    }
    memset(read_bytes, 0, sizeof read_bytes);
    return 1;
}

static void close_sessions(int n, struct moshi_session *sessions[SESSIONS])
{
    for (int i = 0; i < n; ++i) moshi_session_destroy(sessions[i]);
}

/* n sessions in one batched step, FRAMES times. */
static int step_together(int n)
{
    static float pcm[1920], out[SESSIONS][1920];
    struct moshi_session *sessions[SESSIONS];
    const float *inputs[SESSIONS];
    if (!open_sessions(n, sessions)) return 0;
    for (int t = 0; t < FRAMES; ++t) {
        struct moshi_frame frames[SESSIONS];
        memset(frames, 0, sizeof frames);
        for (int i = 0; i < n; ++i) {
            inputs[i] = pcm;
            frames[i].pcm = out[i];
        }
        CHECK(moshi_sessions_step(sessions, n, inputs, NULL, frames) == MOSHI_OK);
    }
    close_sessions(n, sessions);
    return 1;
}

static int test_a_tick_of_eight_sessions_reads_the_weights_of_one(void)
{
    long alone[STAGES];
    CHECK(step_together(1));
    memcpy(alone, read_bytes, sizeof alone);
    CHECK(alone[STAGE_TEMPORAL] == FRAMES * model->info.temporal_bytes);
    CHECK(alone[STAGE_DEPTH] == FRAMES * model->info.depth_bytes);
    CHECK(alone[STAGE_ENCODE] > 0 && alone[STAGE_DECODE] > 0);
    CHECK(step_together(SESSIONS));
    CHECK(read_bytes[STAGE_TEMPORAL] == alone[STAGE_TEMPORAL]);
    CHECK(read_bytes[STAGE_DEPTH] == alone[STAGE_DEPTH]);
    /* Of the codec's convolutions one session alone has more rows than a product takes at a time. */
    CHECK(read_bytes[STAGE_ENCODE] < SESSIONS * alone[STAGE_ENCODE] &&
          read_bytes[STAGE_DECODE] < SESSIONS * alone[STAGE_DECODE]);
    return 1;
}

static pthread_barrier_t together;

static void *talk(void *arg)
{
    struct moshi_session *session = arg;
    const int32_t codes[MOSHI_MAX_CODEBOOKS] = {0};
    for (int t = 0; t < FRAMES; ++t) {
        struct moshi_frame frame = {0};
        pthread_barrier_wait(&together);
        if (moshi_session_step_codes(session, codes, &frame)) return session;
    }
    return NULL;
}

static int test_concurrent_steps_share_the_weights_of_their_tick(void)
{
    struct moshi_session *sessions[SESSIONS];
    pthread_t threads[SESSIONS];
    struct moshi_engine_stats before, after;
    void *refused = NULL;
    if (!open_sessions(SESSIONS, sessions)) return 0;
    pthread_barrier_init(&together, NULL, SESSIONS);
    CHECK(moshi_engine_get_stats(engine, &before) == MOSHI_OK);
    for (int i = 0; i < SESSIONS; ++i)
        CHECK(pthread_create(&threads[i], NULL, talk, sessions[i]) == 0);
    for (int i = 0; i < SESSIONS; ++i) {
        void *result;
        pthread_join(threads[i], &result);
        if (result) refused = result;
    }
    CHECK(!refused);
    CHECK(moshi_engine_get_stats(engine, &after) == MOSHI_OK);
    const long ticks = (long)(after.ticks - before.ticks);
    CHECK(after.frames - before.frames == SESSIONS * FRAMES);
    CHECK(ticks < SESSIONS * FRAMES); /* while one steps, the others gather */
    CHECK(read_bytes[STAGE_TEMPORAL] == ticks * model->info.temporal_bytes);
    CHECK(read_bytes[STAGE_DEPTH] == ticks * model->info.depth_bytes);
    close_sessions(SESSIONS, sessions);
    pthread_barrier_destroy(&together);
    return 1;
}

static int test_given_frames_share_the_weights_of_their_pass(void)
{
    enum { GIVEN = 96 }; /* two times what a product takes, or once what tiles do */
    static int32_t text[GIVEN], codes[MOSHI_MAX_CODEBOOKS * GIVEN];
    struct moshi_session *session[SESSIONS];
    if (!open_sessions(1, session)) return 0;
    CHECK(moshi_session_prefill(session[0], GIVEN, text, codes, codes, NULL) == MOSHI_OK);
    const long layers = (long)transformer_bytes(&model->lm.temporal, 0);
    const int most = kernels.tiles[WEIGHT_BF16] ? TILE_ROWS : ROWS_MAX;
    CHECK(read_bytes[STAGE_GIVEN] == GIVEN / most * layers);
    CHECK(read_bytes[STAGE_TEMPORAL] == 0 && read_bytes[STAGE_DEPTH] == 0);
    close_sessions(1, session);
    return 1;
}

int main(int argc, char **argv)
{
    struct moshi_model_options options = {.folder = argc > 1 ? argv[1] : "moshi_c/data/moshi-tiny",
                                          .threads = 2};
    struct moshi_engine_options engine_options = {.max_sessions = SESSIONS};
    if (moshi_model_open(&options, &model) ||
        moshi_engine_create(model, &engine_options, &engine)) {
        printf("FAIL opening %s: %s\n0 passed, 1 failed\n", options.folder, moshi_error_detail());
        return 1;
    }
    start_counting();
#define RUN(test) run(#test + 5, test)
    RUN(test_a_tick_of_eight_sessions_reads_the_weights_of_one);
    RUN(test_concurrent_steps_share_the_weights_of_their_tick);
    RUN(test_given_frames_share_the_weights_of_their_pass);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
