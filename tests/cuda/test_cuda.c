/* test_cuda.c: conversations of the packaged tiny model through the CUDA backend, run by the host shim,
 * beside the same ones on the CPU; and what happens when memory, the driver or the card fails. Usage:
 * test_cuda [model folder [greedy]], with MOSHI_C_CUDA_LIBRARY naming the library. With one for real cards the
 * conversations are held on the card, and nothing is made to fail. */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cuda.h"
#include "../../csrc/os.h"
#include "calls.h"
#include "fake_cublaslt.h"
#include "moshi.h"

#define FRAMES 4
#define LOGITS 40000

struct call {
    float pcm[FRAMES][FRAME_SIZE];
    struct moshi_frame frames[FRAMES];
};

/* All manners from `first` to `last` in one step a frame. */
static int converse(struct moshi_model *model, int first, int last, struct call *calls)
{
    struct moshi_engine *engine;
    struct moshi_session *sessions[MANNERS];
    float pcm[MANNERS][FRAME_SIZE];
    const float *pcms[MANNERS];
    struct moshi_frame frames[MANNERS];
    int n = last - first + 1, status = open_engine(model, n, &engine);

    for (int i = 0; i < n && !status; ++i)
        status = open_session(model, engine, (enum manner)(first + i), &sessions[i]);
    for (int t = 0; t < FRAMES && !status; ++t) {
        for (int i = 0; i < n; ++i) {
            make_frame(first + i, t, pcm[i]);
            pcms[i] = pcm[i];
            memset(&frames[i], 0, sizeof frames[i]);
            frames[i].pcm = calls[i].pcm[t];
        }
        status = moshi_sessions_step(sessions, n, pcms, NULL, frames);
        for (int i = 0; i < n; ++i) calls[i].frames[t] = frames[i];
    }
    for (int i = 0; i < n && engine; ++i) moshi_session_destroy(sessions[i]);
    moshi_engine_destroy(engine);
    return status;
}

static int same_tokens(const struct call *a, const struct call *b)
{
    for (int t = 0; t < FRAMES; ++t) {
        const struct moshi_frame *x = &a->frames[t], *y = &b->frames[t];

        if (x->text_token != y->text_token || x->n_codes != y->n_codes ||
            memcmp(x->codes, y->codes, (size_t)x->n_codes * sizeof *x->codes) ||
            memcmp(x->user_codes, y->user_codes, (size_t)x->n_user_codes * sizeof *x->codes))
            return 0;
    }
    return a->frames[FRAMES - 1].has_output;
}

static double sound_distance(const struct call *a, const struct call *b)
{
    double most = 0;

    for (int t = 0; t < FRAMES; ++t)
        for (int i = 0; i < FRAME_SIZE; ++i) {
            double distance = fabs((double)a->pcm[t][i] - b->pcm[t][i]);

            if (!(distance <= most)) most = distance;
        }
    return most;
}

static struct call here[MANNERS], there[MANNERS], alone;

static int compare_first(enum moshi_dtype dtype, int manners)
{
    struct moshi_model *model;

    CHECK(open_model("cpu", dtype, &model) == MOSHI_OK);
    CHECK(converse(model, 0, manners - 1, here) == MOSHI_OK);
    moshi_model_close(model);
    CHECK(open_model("cuda", dtype, &model) == MOSHI_OK);
    CHECK(strcmp(moshi_model_get_info(model)->device, "cuda:0") == 0);
    CHECK(converse(model, 0, manners - 1, there) == MOSHI_OK);
    for (int i = 0; i < manners; ++i) {
        CHECK(same_tokens(&here[i], &there[i]));
        CHECK(sound_distance(&here[i], &there[i]) < 1e-4);
    }
    moshi_model_close(model);
    return 1;
}

static int compare(enum moshi_dtype dtype)
{
    return compare_first(dtype, MANNERS);
}

static int test_a_greedy_stream_in_bf16_is_that_of_the_cpu(void)
{
    return compare_first(MOSHI_BF16, GREEDY + 1);
}

static int test_conversations_in_f32_are_those_of_the_cpu(void)
{
    return compare(MOSHI_F32);
}

static int test_conversations_in_bf16_are_those_of_the_cpu(void)
{
    return compare(MOSHI_BF16);
}

static int test_conversations_in_fp8_are_those_of_the_cpu(void)
{
    return compare(MOSHI_FP8);
}

static int compare_coded(enum moshi_dtype dtype)
{
    int good;

    kv_dtype = MOSHI_INT8;
    good = compare(dtype);
    kv_dtype = MOSHI_AUTO;
    return good;
}

static int test_conversations_in_int8_are_those_of_the_cpu(void)
{
    return compare_coded(MOSHI_INT8);
}

static int test_conversations_in_q8_are_those_of_the_cpu(void)
{
    return compare_coded(MOSHI_Q8);
}

static int test_conversations_in_q4_are_those_of_the_cpu(void)
{
    return compare_coded(MOSHI_Q4);
}

/* After the test before. */
static int test_company_changes_no_bit(void)
{
    struct moshi_model *model;

    CHECK(open_model("cuda:0", MOSHI_BF16, &model) == MOSHI_OK);
    CHECK(converse(model, GUIDED, GUIDED, &alone) == MOSHI_OK);
    CHECK(same_tokens(&alone, &there[GUIDED]));
    CHECK(memcmp(alone.pcm, there[GUIDED].pcm, sizeof alone.pcm) == 0);
    moshi_model_close(model);
    return 1;
}

/* After the test of conversations in bf16. Three sessions, one of them guided: four rows. */
static int test_the_depth_kernel_changes_no_bit(void)
{
    struct moshi_model *model;
    const long before = count ? count(MET) : 0;
    const int is_set = getenv("MOSHI_C_DEPTH_KERNEL") != NULL;

    setenv("MOSHI_C_DEPTH_KERNEL", "1", 1);
    CHECK(open_model("cuda", MOSHI_BF16, &model) == MOSHI_OK);
    CHECK(converse(model, 0, MANNERS - 1, here) == MOSHI_OK);
    for (int i = 0; i < MANNERS; ++i) {
        CHECK(same_tokens(&here[i], &there[i]));
        CHECK(memcmp(here[i].pcm, there[i].pcm, sizeof here[i].pcm) == 0);
    }
    CHECK(converse(model, GUIDED, GUIDED, &alone) == MOSHI_OK);
    CHECK(same_tokens(&alone, &there[GUIDED]));
    CHECK(!count || count(MET) == before + 2 * FRAMES);
    moshi_model_close(model);
    if (!is_set) unsetenv("MOSHI_C_DEPTH_KERNEL");
    return 1;
}

#define GIVEN 70 /* more rows than the card's products for ticks take */
#define ROOM (size_t)(8 << 20)

/* The state after frames that are given, in calls of 1, 2, 3 ... frames or all at once. */
static int give_frames(struct moshi_model *model, struct moshi_engine *engine, int at_once,
                       char *snapshot, size_t *bytes)
{
    static int32_t text[GIVEN], codes[GIVEN * MOSHI_MAX_CODEBOOKS],
        user[GIVEN * MOSHI_MAX_CODEBOOKS];
    const struct moshi_model_info *info = moshi_model_get_info(model);
    struct moshi_session *session;

    CHECK(open_session(model, engine, GREEDY, &session) == MOSHI_OK);
    for (int first = 0, n = at_once ? GIVEN : 1; first < GIVEN; first += n, n++) {
        if (n > GIVEN - first) n = GIVEN - first;
        for (int t = 0; t < n; ++t) {
            text[t] = (first + t) * 37 % info->text_card;
            for (int k = 0; k < info->dep_q; ++k)
                codes[k * n + t] = ((first + t) * 29 + k) % info->card;
            for (int k = 0; k < info->user_q; ++k)
                user[k * n + t] = ((first + t) * 31 + k) % info->card;
        }
        CHECK(moshi_session_prefill(session, n, text, codes, user, NULL) == MOSHI_OK);
    }
    *bytes = ROOM;
    CHECK(moshi_session_snapshot(session, NULL, 0, snapshot, bytes) == MOSHI_OK);
    moshi_session_destroy(session);
    return 1;
}

static int test_frames_given_at_once_have_the_bits_of_few_at_a_time(void)
{
    char *snapshots = malloc(2 * ROOM);
    struct moshi_model *model;
    struct moshi_engine *engine;
    size_t once = 0, parts = 0;

    CHECK(snapshots && open_model("cuda", MOSHI_BF16, &model) == MOSHI_OK);
    CHECK(open_engine(model, 1, &engine) == MOSHI_OK);
    CHECK(give_frames(model, engine, 1, snapshots, &once));
    CHECK(give_frames(model, engine, 0, snapshots + ROOM, &parts));
    CHECK(once == parts && memcmp(snapshots, snapshots + ROOM, once) == 0);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    free(snapshots);
    return 1;
}

/* What a frame does is captured with the first ones; then it is only launched. */
static int test_a_frame_is_captured_once(void)
{
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct moshi_session *session;
    static float pcm[FRAME_SIZE], sound[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = sound};
    long before = 0;

    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
    CHECK(open_engine(model, 1, &engine) == MOSHI_OK);
    CHECK(open_session(model, engine, SAMPLED, &session) == MOSHI_OK);
    for (int t = 0; t < 4; ++t) {
        make_frame(0, t, pcm);
        if (t == 2) before = count(PREPARED); /* the first output has been decoded */
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
    }
    CHECK(frame.has_output && before > 0 && count(PREPARED) == before);
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return 1;
}

/* How often each thing of the shim's list happens in one step of the first `n` sessions. */
static int count_events(struct moshi_session *const *sessions, int n, int t, long *events)
{
    static float pcm[MANNERS][FRAME_SIZE], sound[MANNERS][FRAME_SIZE];
    const float *pcms[MANNERS];
    struct moshi_frame frames[MANNERS];

    for (int i = 0; i < n; ++i) {
        make_frame(i, t, pcm[i]);
        pcms[i] = pcm[i];
        frames[i] = (struct moshi_frame){.pcm = sound[i]};
    }
    for (int event = 0; event < EVENTS; ++event) events[event] = -count(event);
    int status = moshi_sessions_step(sessions, n, pcms, NULL, frames);

    for (int event = 0; event < EVENTS; ++event) events[event] += count(event);
    return status;
}

/* The kernel beside the graph is the one that spreads what was uploaded. */
static int test_a_tick_is_one_graph_and_one_copy_each_way_however_many_talk(void)
{
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct moshi_session *sessions[MANNERS];
    long events[EVENTS];

    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
    CHECK(open_engine(model, MANNERS, &engine) == MOSHI_OK);
    for (int i = 0; i < MANNERS; ++i)
        CHECK(open_session(model, engine, (enum manner)i, &sessions[i]) == MOSHI_OK);
    for (int t = 0; t < 5; ++t) {
        const int n = t == 4 ? 1 : MANNERS;

        CHECK(count_events(sessions, n, t, events) == MOSHI_OK);
        CHECK(events[REPLAYED] == 1 && events[FETCHED] == 1);
        /* The first frame ends with a codec that is reset. */
        CHECK(t == 0 || (events[SENT] == 1 && events[LAUNCHED] == 1 && events[MOVED] == 0));
        CHECK(t != 3 || events[PREPARED] == 0);
    }
    for (int i = 0; i < MANNERS; ++i) moshi_session_destroy(sessions[i]);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return 1;
}

/* A call by codes with an offline start, whose first frame is stepped twice, with logits; nobody
 * listens to its second frame. */
static int speak_in_codes(const char *device, struct moshi_frame *frames, float *logits)
{
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct moshi_session *session;
    struct moshi_session_options options;
    static float sound[FRAME_SIZE];

    CHECK(open_model(device, MOSHI_AUTO, &model) == MOSHI_OK);
    const struct moshi_model_info *info = moshi_model_get_info(model);

    CHECK(info->text_card + info->dep_q * info->card <= LOGITS);
    CHECK(open_engine(model, 1, &engine) == MOSHI_OK);
    moshi_session_options_init(model, &options);
    options.start = MOSHI_START_OFFLINE;
    options.keep_logits = 1;
    CHECK(moshi_session_create(engine, &options, &session) == MOSHI_OK);
    for (int t = 0; t < FRAMES; ++t) {
        int32_t codes[MOSHI_MAX_CODEBOOKS];

        for (int k = 0; k < info->user_q; ++k) codes[k] = (7 * t + 31 * k) % info->card;
        frames[t] = (struct moshi_frame){.pcm = t == 1 ? NULL : sound};
        CHECK(moshi_session_step_codes(session, codes, &frames[t]) == MOSHI_OK);
    }
    CHECK(moshi_session_logits(session, logits, logits + info->text_card) == MOSHI_OK);
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return 1;
}

static int test_codes_offline_starts_and_logits_are_those_of_the_cpu(void)
{
    static struct moshi_frame on_cpu[FRAMES], on_card[FRAMES];
    static float expected[LOGITS], found[LOGITS];

    if (!speak_in_codes("cpu", on_cpu, expected) || !speak_in_codes("cuda", on_card, found))
        return 0;
    for (int t = 0; t < FRAMES; ++t) {
        CHECK(on_cpu[t].text_token == on_card[t].text_token);
        CHECK(memcmp(on_cpu[t].codes, on_card[t].codes, sizeof on_cpu[t].codes) == 0);
        CHECK(memcmp(on_cpu[t].user_codes, on_card[t].user_codes, sizeof on_cpu[t].codes) == 0);
    }
    for (int i = 0; i < LOGITS; ++i) CHECK(fabsf(expected[i] - found[i]) < 1e-3f);
    return 1;
}

/* The memory that is told is the card's. */
static int test_memory_is_that_of_the_card(void)
{
    struct moshi_model *model;
    struct moshi_engine *engines[2];
    struct moshi_memory before, after;

    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
    CHECK(open_engine(model, 1, &engines[0]) == MOSHI_OK);
    CHECK(moshi_engine_memory(engines[0], &before) == MOSHI_OK);
    CHECK(open_engine(model, 8, &engines[1]) == MOSHI_OK);
    CHECK(moshi_engine_memory(engines[0], &after) == MOSHI_OK);
    CHECK(after.free_bytes > 0 && after.free_bytes < before.free_bytes);
    moshi_engine_destroy(engines[1]);
    CHECK(moshi_engine_memory(engines[0], &after) == MOSHI_OK);
    CHECK(after.free_bytes == before.free_bytes);
    moshi_engine_destroy(engines[0]);
    moshi_model_close(model);
    return 1;
}

static int64_t free_bytes(struct moshi_engine *engine)
{
    struct moshi_memory memory;

    return moshi_engine_memory(engine, &memory) == MOSHI_OK ? memory.free_bytes : -1;
}

/* An engine for many long calls takes little until they are held, and has it back afterwards. */
static int test_keys_and_values_come_with_the_calls_and_go(void)
{
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct moshi_session *session, *other;
    struct moshi_memory memory;
    static float pcm[FRAME_SIZE], sound[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = sound};

    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
    CHECK(moshi_engine_create(model,
                              &(struct moshi_engine_options){.max_sessions = 4, .context = 40000},
                              &engine) == MOSHI_OK);
    const int64_t before = free_bytes(engine);

    CHECK(moshi_engine_memory(engine, &memory) == MOSHI_OK);
    CHECK(memory.session_bytes > 100 << 20 && (6ll << 30) - before < memory.session_bytes);
    CHECK(open_session(model, engine, GREEDY, &session) == MOSHI_OK);
    const int64_t open = free_bytes(engine);

    CHECK(open < before && before - open < memory.session_bytes / 8);
    make_frame(0, 0, pcm);
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
    const int64_t stepped = free_bytes(engine);

    CHECK(moshi_session_fork(session, NULL, &other) == MOSHI_OK);
    CHECK(moshi_session_step(other, pcm, &frame) == MOSHI_OK);
    CHECK(free_bytes(engine) < stepped); /* it writes to pages of its own */
    moshi_session_destroy(other);
    moshi_session_destroy(session);
    CHECK(open_session(model, engine, GREEDY, &session) == MOSHI_OK);
    CHECK(free_bytes(engine) >= open - memory.session_bytes / 8);
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return 1;
}

/* A session that finds no memory is refused, or the frame with which it would grow; the others go on. */
static int test_memory_that_runs_out_ends_no_other_session(void)
{
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct moshi_session *session, *fork, *refused;
    static float pcm[FRAME_SIZE], sound[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = sound};

    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
    CHECK(open_engine(model, 3, &engine) == MOSHI_OK);
    CHECK(open_session(model, engine, GREEDY, &session) == MOSHI_OK);
    make_frame(0, 0, pcm);
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
    inject(FAULT_MALLOC, 0);
    CHECK(open_session(model, engine, GREEDY, &refused) == MOSHI_ERROR_MEMORY);
    CHECK(says("MiB more are needed") && refused == NULL);
    CHECK(moshi_session_fork(session, NULL, &fork) == MOSHI_OK);
    inject(FAULT_MALLOC, 0);
    CHECK(moshi_session_step(fork, pcm, &frame) == MOSHI_ERROR_MEMORY && says("are free"));
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
    CHECK(moshi_session_step(fork, pcm, &frame) == MOSHI_OK);
    CHECK(open_session(model, engine, GREEDY, &refused) == MOSHI_OK);
    moshi_session_destroy(refused);
    moshi_session_destroy(fork);
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return 1;
}

/* Wherever the memory runs out, the sentence says what was needed and what is free; afterwards all
 * is well. */
static int test_memory_that_runs_out_is_said(void)
{
    struct moshi_model *model = NULL;
    struct moshi_engine *engine = NULL;
    int at = 0, opened = 0;

    for (; !opened; at += 1 + at / 4) {
        inject(FAULT_MALLOC, at);
        int status = open_model("cuda", MOSHI_AUTO, &model);

        repair();
        opened = status == MOSHI_OK;
        CHECK(opened ||
              (status == MOSHI_ERROR_MEMORY && says("MiB more are needed") && says("free")));
    }
    CHECK(at > 100);
    for (at = 0, opened = 0; !opened; at += 1 + at / 4) {
        inject(FAULT_MALLOC, at);
        int status = open_engine(model, 2, &engine);

        repair();
        opened = status == MOSHI_OK;
        CHECK(opened ||
              (status == MOSHI_ERROR_MEMORY && says("MiB more are needed") && says("free")));
    }
    moshi_engine_destroy(engine);
    inject(FAULT_MALLOC, 50);
    struct moshi_model *other;

    CHECK(open_model("auto", MOSHI_AUTO, &other) == MOSHI_OK);
    CHECK(strcmp(moshi_model_get_info(other)->device, "cpu") == 0);
    moshi_model_close(other);
    repair();
    CHECK(converse(model, GREEDY, GREEDY, &alone) == MOSHI_OK);
    moshi_model_close(model);
    return 1;
}

/* In whichever stage the card fails: the sessions of its engine end with a reason, and a model
 * opened anew works. */
static int test_a_card_that_fails_ends_its_sessions_with_a_reason(void)
{
    static const int launches[] = {0, 50, 100, 180};

    for (int i = 0; i < 4; ++i) {
        struct moshi_model *model;
        struct moshi_engine *engine;
        struct moshi_session *session;
        static float pcm[FRAME_SIZE], sound[FRAME_SIZE];
        struct moshi_frame frame = {.pcm = sound};

        CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
        CHECK(open_engine(model, 1, &engine) == MOSHI_OK);
        CHECK(open_session(model, engine, GREEDY, &session) == MOSHI_OK);
        make_frame(0, 0, pcm);
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
        inject(FAULT_LAUNCH, launches[i]);
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_ERROR_DEVICE);
        CHECK(says("cuda:0 failed") && says("unspecified launch failure"));
        CHECK(moshi_session_step(session, pcm, &frame) != MOSHI_OK);
        moshi_session_destroy(session);
        CHECK(open_session(model, engine, GREEDY, &session) != MOSHI_OK ||
              moshi_session_step(session, pcm, &frame) == MOSHI_ERROR_DEVICE);
        moshi_session_destroy(session);
        moshi_engine_destroy(engine);
        moshi_model_close(model);
        repair();
        CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK);
        moshi_model_close(model);
    }
    return 1;
}

static int test_a_missing_driver_or_card_is_said(void)
{
    static const char *const words[] = {"no NVIDIA driver is installed",
                                        "driver is too old: it knows CUDA 12.2, and 13.0 or later",
                                        "driver shows no card", "compute capability 7.0"};
    struct moshi_model *model;

    for (int fault = 0; fault < 4; ++fault) {
        struct moshi_device devices[4];

        inject(FAULT_DRIVER, fault);
        CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_ERROR_DEVICE && says(words[fault]));
        CHECK(moshi_devices(devices, 4) == 2 && devices[0].usable && !devices[1].usable);
        CHECK(strstr(devices[1].reason, words[fault]) != NULL);
        CHECK(open_model(NULL, MOSHI_AUTO, &model) == MOSHI_OK);
        CHECK(strcmp(moshi_model_get_info(model)->device, "cpu") == 0);
        moshi_model_close(model);
    }
    inject(FAULT_DRIVER, 4);
    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_ERROR_DEVICE &&
          says("built without kernels for the card host shim, whose compute capability is 9.0"));
    repair();
    CHECK(open_model("cuda:1", MOSHI_AUTO, &model) == MOSHI_ERROR_DEVICE &&
          says("there is 1 card, cuda:0"));
    CHECK(open_model("cuda:x", MOSHI_AUTO, &model) == MOSHI_ERROR_ARGUMENT && says("cuda:x"));
    CHECK(open_model("tpu", MOSHI_AUTO, &model) == MOSHI_ERROR_ARGUMENT && says("tpu"));
    return 1;
}

static int test_the_right_library_is_found_and_another_refused(void)
{
    struct moshi_model *model;
    char kept[4096];

    snprintf(kept, sizeof kept, "%s", getenv("MOSHI_C_CUDA_LIBRARY"));
    setenv("MOSHI_C_CUDA_LIBRARY", "libm.so.6", 1);
    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_ERROR_DEVICE &&
          says("from another version of this package"));
    setenv("MOSHI_C_CUDA_LIBRARY", "gone.so", 1);
    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_ERROR_DEVICE && says("gone.so"));
    unsetenv("MOSHI_C_CUDA_LIBRARY");
    CHECK(open_model("cuda", MOSHI_AUTO, &model) == MOSHI_OK); /* it lies beside this program */
    moshi_model_close(model);
    setenv("MOSHI_C_CUDA_LIBRARY", kept, 1);
    return 1;
}

static const void *fake_last; /* the weights that it should have seen last */

/* What comes of products by that library. */
static int multiply(const char *library, int copies, double *seconds, char *found)
{
    const struct cuda_library *cuda = cuda_load();
    struct cuda_peer_product product = {
        .n = 1, .rows = FAKE_ROWS, .columns = FAKE_COLUMNS, .copies = copies};
    const size_t bytes = 2 * FAKE_ROWS * FAKE_COLUMNS;
    struct backend *backend;

    setenv("MOSHI_C_CUBLASLT", library, 1);
    if (!cuda || cuda_backend_create("cuda", &backend)) return -1;
    char *weights = backend->ops->allocate(backend, bytes * (size_t)copies);
    void *x = backend->ops->allocate(backend, 2 * FAKE_COLUMNS);

    product.weights = weights;
    product.x = x;
    product.y = backend->ops->allocate(backend, 4 * FAKE_ROWS);
    int status = cuda->cublaslt(backend, &product, os_clock, seconds, found, 300);

    fake_last = weights + bytes * (size_t)(copies - 1);
    backend->ops->release(backend, weights, bytes * (size_t)copies);
    backend->ops->release(backend, x, 2 * FAKE_COLUMNS);
    backend->ops->release(backend, product.y, 4 * FAKE_ROWS);
    backend->ops->destroy(backend);
    unsetenv("MOSHI_C_CUBLASLT");
    return status;
}

static int test_cublaslt_is_found_or_what_is_missing_is_said(void)
{
    char path[4200], found[300], *slash;
    struct fake_cublaslt *fake;
    double seconds;

    snprintf(path, sizeof path, "%s", getenv("MOSHI_C_CUDA_LIBRARY"));
    slash = strrchr(path, '/');
    CHECK(slash != NULL);
    snprintf(slash, sizeof path - (size_t)(slash - path), "/libfake_cublaslt.so");
    CHECK(multiply("gone.so", 1, &seconds, found) == MOSHI_ERROR_DEVICE &&
          says("cuBLASLt is not at gone.so, which MOSHI_C_CUBLASLT names") && found[0] == '\0');
    CHECK(multiply("libm.so.6", 1, &seconds, found) == MOSHI_ERROR_DEVICE &&
          says("what was found as cuBLASLt has no function cublasLtGetVersion"));
    CHECK(multiply(path, 3, &seconds, found) == MOSHI_OK && seconds > 0);
    CHECK(strstr(found, "cuBLASLt 13.1.2, ") == found && strstr(found, "libfake_cublaslt.so"));
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);

    CHECK(library != NULL);
    fake = dlsym(library, "fake_cublaslt");
    /* Each matrix once before the capture and once in it. */
    CHECK(fake->products == 6 && fake->last == fake_last && fake->objects == 0);
    fake->fault = 15;
    CHECK(multiply(path, 3, &seconds, found) == MOSHI_ERROR_DEVICE &&
          says("cuBLASLt: a search gave status 15"));
    CHECK(fake->products == 6 && fake->objects == 0);
    fake->fault = 0;
    dlclose(library);
    return 1;
}

static void run_faults(void)
{
    run_repaired("memory that runs out is said", test_memory_that_runs_out_is_said);
    run_repaired("a card that fails ends its sessions with a reason",
                 test_a_card_that_fails_ends_its_sessions_with_a_reason);
    run_repaired("a missing driver or card is said", test_a_missing_driver_or_card_is_said);
    run_repaired("the right library is found and another refused",
                 test_the_right_library_is_found_and_another_refused);
    run_repaired("cuBLASLt is found, or what is missing is said",
                 test_cublaslt_is_found_or_what_is_missing_is_said);
}

static void run_all(void)
{
    run_repaired("conversations in f32 are those of the CPU",
                 test_conversations_in_f32_are_those_of_the_cpu);
    run_repaired("conversations in bf16 are those of the CPU",
                 test_conversations_in_bf16_are_those_of_the_cpu);
    run_repaired("company changes no bit", test_company_changes_no_bit);
    run_repaired("the depth kernel changes no bit", test_the_depth_kernel_changes_no_bit);
    run_repaired("conversations in fp8 are those of the CPU",
                 test_conversations_in_fp8_are_those_of_the_cpu);
    run_repaired("frames given at once have the bits of few at a time",
                 test_frames_given_at_once_have_the_bits_of_few_at_a_time);
    run_repaired("conversations in int8, with int8 keys and values, are those of the CPU",
                 test_conversations_in_int8_are_those_of_the_cpu);
    run_repaired("conversations in q8, with int8 keys and values, are those of the CPU",
                 test_conversations_in_q8_are_those_of_the_cpu);
    run_repaired("conversations in q4, with int8 keys and values, are those of the CPU",
                 test_conversations_in_q4_are_those_of_the_cpu);
    run_repaired("codes, offline starts and logits are those of the CPU",
                 test_codes_offline_starts_and_logits_are_those_of_the_cpu);
    if (inject) {
        run_repaired("a frame is captured once", test_a_frame_is_captured_once);
        run_repaired("a tick is one graph and one copy each way, however many talk",
                     test_a_tick_is_one_graph_and_one_copy_each_way_however_many_talk);
        run_repaired("memory is that of the card", test_memory_is_that_of_the_card);
        run_repaired("keys and values come with the calls and go",
                     test_keys_and_values_come_with_the_calls_and_go);
        run_repaired("memory that runs out ends no other session",
                     test_memory_that_runs_out_ends_no_other_session);
        run_faults();
    }
}

int main(int argc, char **argv)
{
    const char *path = getenv("MOSHI_C_CUDA_LIBRARY");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;

    if (argc > 1) folder = argv[1];
    if (library) find_shim(library);
    if (!library) {
        printf("MOSHI_C_CUDA_LIBRARY names no library\n");
        return 2;
    }
    if (argc > 2 && strcmp(argv[2], "greedy") == 0)
        run_repaired("a greedy stream in bf16 is that of the CPU",
                     test_a_greedy_stream_in_bf16_is_that_of_the_cpu);
    else
        run_all();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
