/* test_engine.c: engine and sessions through the public header, on the packaged tiny model: bits do
 * not depend on company, a step calls no allocator, errors change nothing. Run it under TSan too.
 * usage: test_engine [model folder] */
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "moshi.h"

#define FRAMES 24
#define FRAME_SIZE 1920
#define CALLERS 4

/* ---- counting allocations --------------------------------------------------------------- */

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_ALLOCATIONS 1
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *memory, size_t bytes);
static long allocations;

void *malloc(size_t bytes)
{
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    return __libc_calloc(count, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    return __libc_realloc(memory, bytes);
}
#endif

static struct moshi_model *model;
static struct moshi_engine *engine;

/* Something speech-like for caller `who`: a sweep whose level changes. */
static void make_frame(int who, int t, float *pcm)
{
    for (int i = 0; i < FRAME_SIZE; ++i) {
        double x = (t * FRAME_SIZE + i) / 24000.0;
        pcm[i] = (float)(0.2 * sin(6.28318 * (180 + 40 * who) * x + 3 * sin(9 * x)) *
                         (0.5 + 0.5 * sin(4 * x + who)));
    }
}

struct call {
    float pcm[FRAMES][FRAME_SIZE];
    struct moshi_frame frames[FRAMES];
};

static int open_session(uint64_t seed, struct moshi_session **session)
{
    struct moshi_session_options options;
    moshi_session_options_init(model, &options);
    options.seed = seed;
    return moshi_session_create(engine, &options, session);
}

/* Its context is read anew every few frames. */
static int open_refreshed(uint64_t seed, struct moshi_session **session)
{
    struct moshi_session_options options;
    moshi_session_options_init(model, &options);
    options.seed = seed;
    options.context_policy = MOSHI_CONTEXT_REFRESH;
    options.context_range = 20;
    options.context_keep = 8;
    return moshi_session_create(engine, &options, session);
}

static int talk(struct moshi_session *session, int who, struct call *call)
{
    float pcm[FRAME_SIZE];
    for (int t = 0; t < FRAMES; ++t) {
        make_frame(who, t, pcm);
        memset(&call->frames[t], 0, sizeof call->frames[t]);
        call->frames[t].pcm = call->pcm[t];
        int status = moshi_session_step(session, pcm, &call->frames[t]);
        if (status) return status;
    }
    return MOSHI_OK;
}

static int same(const struct call *a, const struct call *b)
{
    for (int t = 0; t < FRAMES; ++t) {
        const struct moshi_frame *x = &a->frames[t], *y = &b->frames[t];
        if (x->text_token != y->text_token || x->n_codes != y->n_codes ||
            memcmp(x->codes, y->codes, (size_t)x->n_codes * sizeof *x->codes) ||
            memcmp(x->user_codes, y->user_codes, (size_t)x->n_user_codes * sizeof *x->codes) ||
            memcmp(a->pcm[t], b->pcm[t], sizeof a->pcm[t]))
            return 0;
    }
    return 1;
}

static struct call alone[CALLERS], again;

/* ---- tests ------------------------------------------------------------------------------ */

static int test_the_same_seed_gives_the_same_conversation(void)
{
    for (int who = 0; who < CALLERS; ++who) {
        struct moshi_session *session;
        CHECK(open_session(100 + (uint64_t)who, &session) == MOSHI_OK);
        CHECK(talk(session, who, &alone[who]) == MOSHI_OK);
        moshi_session_destroy(session);
        CHECK(open_session(100 + (uint64_t)who, &session) == MOSHI_OK);
        CHECK(talk(session, who, &again) == MOSHI_OK);
        moshi_session_destroy(session);
        CHECK(same(&alone[who], &again));
    }
    CHECK(!same(&alone[0], &alone[1]));
    return 1;
}

static int test_reset_equals_fresh(void)
{
    struct moshi_session *session;
    CHECK(open_session(100, &session) == MOSHI_OK);
    CHECK(talk(session, 1, &again) == MOSHI_OK);
    CHECK(moshi_session_reset(session, NULL) == MOSHI_OK);
    CHECK(talk(session, 0, &again) == MOSHI_OK);
    moshi_session_destroy(session);
    CHECK(same(&alone[0], &again));
    return 1;
}

static int test_a_batched_step_equals_lone_steps(void)
{
    struct moshi_session *sessions[CALLERS];
    static struct call calls[CALLERS];
    static float pcm[CALLERS][FRAME_SIZE];
    for (int who = 0; who < CALLERS; ++who)
        CHECK(open_session(100 + (uint64_t)who, &sessions[who]) == MOSHI_OK);
    for (int t = 0; t < FRAMES; ++t) {
        const float *inputs[CALLERS];
        struct moshi_frame frames[CALLERS];
        memset(frames, 0, sizeof frames);
        for (int who = 0; who < CALLERS; ++who) {
            make_frame(who, t, pcm[who]);
            inputs[who] = pcm[who];
            frames[who].pcm = calls[who].pcm[t];
        }
        CHECK(moshi_sessions_step(sessions, CALLERS, inputs, NULL, frames) == MOSHI_OK);
        for (int who = 0; who < CALLERS; ++who) calls[who].frames[t] = frames[who];
    }
    for (int who = 0; who < CALLERS; ++who) {
        moshi_session_destroy(sessions[who]);
        CHECK(same(&alone[who], &calls[who]));
    }
    return 1;
}

struct caller {
    int who, status;
    struct moshi_session *session;
    struct call call;
};

static void *caller_thread(void *arg)
{
    struct caller *caller = arg;
    caller->status = talk(caller->session, caller->who, &caller->call);
    return NULL;
}

static int test_sessions_in_threads_are_independent(void)
{
    static struct caller callers[CALLERS];
    pthread_t threads[CALLERS];
    for (int who = 0; who < CALLERS; ++who) {
        callers[who].who = who;
        CHECK(open_session(100 + (uint64_t)who, &callers[who].session) == MOSHI_OK);
    }
    for (int who = 0; who < CALLERS; ++who)
        CHECK(pthread_create(&threads[who], NULL, caller_thread, &callers[who]) == 0);
    for (int who = 0; who < CALLERS; ++who) pthread_join(threads[who], NULL);
    for (int who = 0; who < CALLERS; ++who) {
        moshi_session_destroy(callers[who].session);
        CHECK(callers[who].status == MOSHI_OK);
        CHECK(same(&alone[who], &callers[who].call));
    }
    return 1;
}

/* Passes of refreshes run between the ticks of all, while sessions end and begin anew. */
static int test_refreshes_in_threads_are_independent(void)
{
    static struct caller callers[CALLERS];
    static struct call expected[CALLERS];
    pthread_t threads[CALLERS];
    struct moshi_session *session;
    for (int who = 0; who < CALLERS; ++who) {
        CHECK(open_refreshed(100 + (uint64_t)who, &session) == MOSHI_OK);
        CHECK(talk(session, who, &expected[who]) == MOSHI_OK);
        moshi_session_destroy(session);
    }
    for (int round = 0; round < 3; ++round) {
        for (int who = 0; who < CALLERS; ++who) {
            callers[who].who = who;
            CHECK(open_refreshed(100 + (uint64_t)who, &callers[who].session) == MOSHI_OK);
        }
        for (int who = 0; who < CALLERS; ++who)
            CHECK(pthread_create(&threads[who], NULL, caller_thread, &callers[who]) == 0);
        for (int who = 0; who < CALLERS; ++who) pthread_join(threads[who], NULL);
        for (int who = 0; who < CALLERS; ++who) {
            if (round == 1) CHECK(moshi_session_reset(callers[who].session, NULL) == MOSHI_OK);
            moshi_session_destroy(callers[who].session);
            CHECK(callers[who].status == MOSHI_OK);
            CHECK(same(&expected[who], &callers[who].call));
        }
    }
    return 1;
}

static int test_a_second_caller_is_refused_at_once(void)
{
    struct moshi_session *session;
    float pcm[FRAME_SIZE], out[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = out}, other = {0};
    make_frame(0, 0, pcm);
    CHECK(open_session(1, &session) == MOSHI_OK);
    CHECK(moshi_session_wait(session) == MOSHI_ERROR_SESSION);
    CHECK(moshi_session_submit(session, pcm, &frame) == MOSHI_OK);
    CHECK(moshi_session_step(session, pcm, &other) == MOSHI_ERROR_SESSION);
    CHECK(strstr(moshi_error_detail(), "another thread"));
    CHECK(moshi_session_wait(session) == MOSHI_OK);
    CHECK(moshi_session_ready(session));
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
    CHECK(frame.index == 1);
    moshi_session_destroy(session);
    return 1;
}

static int test_bad_samples_change_nothing(void)
{
    struct moshi_session *session;
    float pcm[FRAME_SIZE];
    struct moshi_frame frame = {0};
    CHECK(open_session(100, &session) == MOSHI_OK);
    make_frame(0, 0, pcm);
    pcm[7] = NAN;
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_ERROR_AUDIO);
    CHECK(strstr(moshi_error_detail(), "sample 7"));
    pcm[7] = INFINITY;
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_ERROR_AUDIO);
    pcm[7] = -12345.0f; /* a sample of 16 bits in the wrong type */
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_ERROR_AUDIO);
    CHECK(strstr(moshi_error_detail(), "sample 7 is -12345, expected -1 to 1"));
    int32_t codes[MOSHI_MAX_CODEBOOKS] = {0};
    codes[3] = moshi_model_get_info(model)->card + 1;
    CHECK(moshi_session_step_codes(session, codes, &frame) == MOSHI_ERROR_AUDIO);
    CHECK(talk(session, 0, &again) == MOSHI_OK);
    moshi_session_destroy(session);
    CHECK(same(&alone[0], &again));
    return 1;
}

static int test_a_step_calls_no_allocator(void)
{
#ifdef COUNTS_ALLOCATIONS
    struct moshi_session *session;
    static float pcm[FRAME_SIZE], out[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = out};
    int refreshed = 0;
    make_frame(0, 0, pcm);
    for (int refresh = 0; refresh < 2; ++refresh) {
        CHECK((refresh ? open_refreshed(5, &session) : open_session(5, &session)) == MOSHI_OK);
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
        long before = __atomic_load_n(&allocations, __ATOMIC_RELAXED);
        for (int t = 0; t < 200; ++t) {
            CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
            refreshed += frame.event == MOSHI_EVENT_REFRESH_END;
        }
        CHECK(__atomic_load_n(&allocations, __ATOMIC_RELAXED) == before);
        CHECK(before > 0);
        moshi_session_destroy(session);
    }
    CHECK(refreshed > 10);
#endif
    return 1;
}

static int test_slots_run_out_with_a_reason_and_come_back(void)
{
    struct moshi_session *sessions[CALLERS], *extra;
    for (int i = 0; i < CALLERS; ++i) CHECK(open_session(1, &sessions[i]) == MOSHI_OK);
    CHECK(open_session(1, &extra) == MOSHI_ERROR_SESSION);
    CHECK(extra == NULL && strstr(moshi_error_detail(), "max_sessions"));
    moshi_session_destroy(sessions[2]);
    CHECK(open_session(1, &sessions[2]) == MOSHI_OK);
    for (int i = 0; i < CALLERS; ++i) moshi_session_destroy(sessions[i]);
    return 1;
}

static int test_forced_text_comes_out_as_given(void)
{
    struct moshi_session *session;
    struct moshi_frame frame = {0};
    static float pcm[FRAME_SIZE];
    const int32_t tokens[5] = {10, 11, 12, 13, 14};
    int delay = moshi_model_get_info(model)->max_delay;
    CHECK(open_session(5, &session) == MOSHI_OK);
    CHECK(moshi_session_force_text(session, tokens, 3) == MOSHI_OK);
    CHECK(moshi_session_force_text(session, tokens + 3, 2) == MOSHI_OK);
    const int32_t bad = 1 << 30;
    CHECK(moshi_session_force_text(session, &bad, 1) == MOSHI_ERROR_ARGUMENT);
    CHECK(moshi_session_forced_left(session) == 5);
    for (int t = 0; t < 5 + delay; ++t) {
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
        if (t >= delay) CHECK(frame.text_token == tokens[t - delay]);
    }
    CHECK(moshi_session_forced_left(session) == 0);
    moshi_session_destroy(session);
    return 1;
}

static int test_a_closed_engine_refuses_steps(void)
{
    struct moshi_engine_options options = {.max_sessions = 1};
    struct moshi_engine *other;
    struct moshi_session *session;
    static float pcm[FRAME_SIZE];
    struct moshi_frame frame = {0};
    CHECK(moshi_engine_create(model, &options, &other) == MOSHI_OK);
    CHECK(moshi_session_create(other, NULL, &session) == MOSHI_OK);
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
    moshi_engine_destroy(other);
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_ERROR_SESSION);
    moshi_session_destroy(session);
    return 1;
}

static int test_whole_files_and_streams_agree_on_the_first_seconds(void)
{
    enum { T = 8 };
    static float pcm[T * FRAME_SIZE], sound[T * FRAME_SIZE], streamed[FRAME_SIZE];
    int32_t codes[MOSHI_MAX_CODEBOOKS * T], one[MOSHI_MAX_CODEBOOKS];
    int levels = moshi_model_get_info(model)->codebooks;
    for (int t = 0; t < T; ++t) make_frame(1, t, pcm + t * FRAME_SIZE);
    CHECK(moshi_mimi_encode(engine, pcm, 1, T * FRAME_SIZE, codes) == MOSHI_OK);
    CHECK(moshi_mimi_decode(engine, codes, 1, levels, T, sound) == MOSHI_OK);
    struct mimi_stream *stream;
    CHECK(mimi_stream_create(engine, 1, &stream) == MOSHI_OK);
    for (int t = 0; t < T; ++t) {
        CHECK(mimi_stream_encode(stream, pcm + t * FRAME_SIZE, one) == MOSHI_OK);
        for (int k = 0; k < levels; ++k) CHECK(one[k] == codes[k * T + t]);
        CHECK(mimi_stream_decode(stream, one, levels, streamed) == MOSHI_OK);
        for (int i = 0; i < FRAME_SIZE; ++i)
            CHECK(fabsf(streamed[i] - sound[t * FRAME_SIZE + i]) < 1e-4f);
    }
    one[0] = -1;
    CHECK(mimi_stream_decode(stream, one, levels, streamed) == MOSHI_ERROR_AUDIO);
    mimi_stream_destroy(stream);
    return 1;
}

static int test_a_whole_signal_may_come_in_pieces(void)
{
    enum { T = 61, SAMPLES = T * FRAME_SIZE - 700 };
    static const int pieces[] = {1, 25, 0, 3, T};
    static float pcm[T * FRAME_SIZE], sound[T * FRAME_SIZE], part[T * FRAME_SIZE];
    static int32_t codes[MOSHI_MAX_CODEBOOKS * T], some[MOSHI_MAX_CODEBOOKS * T];
    int levels = moshi_model_get_info(model)->codebooks;
    struct mimi_stream *stream, *frames;
    for (int t = 0; t < T; ++t) make_frame(1, t, pcm + t * FRAME_SIZE);
    CHECK(moshi_mimi_encode(engine, pcm, 1, SAMPLES, codes) == MOSHI_OK);
    CHECK(moshi_mimi_decode(engine, codes, 1, levels, T, sound) == MOSHI_OK);
    CHECK(mimi_stream_create_whole(engine, &stream) == MOSHI_OK);
    for (int round = 0; round < 2; ++round) {
        for (int i = 0, first = 0; first < T; first += pieces[i++]) {
            int n = pieces[i] < T - first ? pieces[i] : T - first, end = first + n;
            int samples = (end == T ? SAMPLES : end * FRAME_SIZE) - first * FRAME_SIZE;
            CHECK(mimi_stream_encode_piece(stream, pcm + first * FRAME_SIZE, samples, some) ==
                  MOSHI_OK);
            for (int k = 0; k < levels; ++k)
                CHECK(memcmp(some + k * n, codes + k * T + first, (size_t)n * 4) == 0);
            CHECK(mimi_stream_decode_piece(stream, some, levels, n, part) == MOSHI_OK);
            CHECK(memcmp(part, sound + first * FRAME_SIZE, (size_t)n * FRAME_SIZE * 4) == 0);
        }
        CHECK(mimi_stream_reset(stream) == MOSHI_OK);
    }
    some[0] = -1;
    CHECK(mimi_stream_decode_piece(stream, some, levels, 1, part) == MOSHI_ERROR_AUDIO);
    CHECK(mimi_stream_decode_piece(stream, codes, levels, -1, part) == MOSHI_ERROR_AUDIO);
    CHECK(mimi_stream_encode_piece(stream, pcm, -1, some) == MOSHI_ERROR_AUDIO);
    CHECK(mimi_stream_create(engine, 1, &frames) == MOSHI_OK);
    CHECK(mimi_stream_encode_piece(frames, pcm, FRAME_SIZE, some) == MOSHI_ERROR_ARGUMENT);
    mimi_stream_destroy(frames);
    mimi_stream_destroy(stream);
    return 1;
}

static int is_refused_here(int status)
{
    return status == MOSHI_ERROR_SESSION && strstr(moshi_error_detail(), "forked") != NULL;
}

/* Every call of a child on what its parent made; its exit code, 0 when each ended as promised. */
static int child_of(struct moshi_session *session, struct mimi_stream *stream)
{
    static float pcm[FRAME_SIZE];
    static int32_t codes[MOSHI_MAX_CODEBOOKS];
    struct moshi_frame frame = {0};
    struct moshi_memory memory;
    struct moshi_engine_stats stats;
    struct moshi_engine *other;
    struct moshi_session *another;
    struct mimi_stream *second;
    size_t bytes = 0;
    int descriptor;
    int good = is_refused_here(moshi_session_step(session, pcm, &frame)) &&
               is_refused_here(moshi_session_step_codes(session, codes, &frame)) &&
               is_refused_here(moshi_session_submit(session, pcm, &frame)) &&
               is_refused_here(moshi_session_wait(session)) && moshi_session_ready(session) &&
               is_refused_here(moshi_session_force_text(session, codes, 1)) &&
               is_refused_here(moshi_session_force_next(session, 1, NULL)) &&
               is_refused_here(moshi_session_logits(session, NULL, NULL)) &&
               is_refused_here(moshi_session_reset(session, NULL)) &&
               is_refused_here(moshi_session_fork(session, NULL, &another)) && !another &&
               is_refused_here(moshi_session_snapshot(session, NULL, 0, NULL, &bytes)) &&
               is_refused_here(moshi_session_descriptor(session, &descriptor)) &&
               !moshi_session_withdraw(session) &&
               is_refused_here(mimi_stream_snapshot(stream, NULL, &bytes)) &&
               is_refused_here(mimi_stream_restore(stream, pcm, sizeof pcm)) &&
               is_refused_here(moshi_session_create(engine, NULL, &another)) && !another &&
               is_refused_here(moshi_engine_create(model, NULL, &other)) && !other &&
               is_refused_here(moshi_engine_memory(engine, &memory)) &&
               is_refused_here(moshi_engine_get_stats(engine, &stats)) &&
               is_refused_here(mimi_stream_create(engine, 1, &second)) && !second &&
               is_refused_here(mimi_stream_encode(stream, pcm, codes)) &&
               is_refused_here(mimi_stream_decode(stream, codes, 8, pcm)) &&
               is_refused_here(mimi_stream_reset(stream)) &&
               is_refused_here(moshi_mimi_encode(engine, pcm, 1, FRAME_SIZE, codes)) &&
               is_refused_here(moshi_mimi_decode(engine, codes, 1, 8, 1, pcm)) &&
               moshi_model_get_info(model)->frame_size == FRAME_SIZE;
    mimi_stream_destroy(stream);
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    return good ? 0 : 1;
}

static int test_a_forked_child_is_refused_and_its_parent_goes_on(void)
{
    struct moshi_session *session;
    struct mimi_stream *stream;
    int outcome = -1;
    CHECK(open_session(100, &session) == MOSHI_OK);
    CHECK(mimi_stream_create(engine, 1, &stream) == MOSHI_OK);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(20); /* a call that hangs is a failure, too */
        _exit(child_of(session, stream));
    }
    CHECK(child > 0 && waitpid(child, &outcome, 0) == child);
    CHECK(WIFEXITED(outcome) && WEXITSTATUS(outcome) == 0);
    CHECK(talk(session, 0, &again) == MOSHI_OK);
    CHECK(same(&alone[0], &again));
    mimi_stream_destroy(stream);
    moshi_session_destroy(session);
    return 1;
}

static int test_a_session_without_finite_numbers_ends_alone(void)
{
    struct moshi_session_options options;
    struct moshi_session *wild, *calm;
    struct moshi_frame frames[2] = {{0}, {0}};
    static float pcm[FRAME_SIZE];
    moshi_session_options_init(model, &options);
    options.cfg_coef = 3e38f;
    options.cfg_masked_until = 1000;
    CHECK(moshi_session_create(engine, &options, &wild) == MOSHI_OK);
    CHECK(open_session(100, &calm) == MOSHI_OK);
    struct moshi_session *both[2] = {wild, calm};
    const float *inputs[2] = {pcm, pcm};
    int status = MOSHI_OK;
    for (int t = 0; t < 8 && status == MOSHI_OK; ++t)
        status = moshi_sessions_step(both, 2, inputs, NULL, frames);
    CHECK(status == MOSHI_ERROR_SESSION && strstr(moshi_error_detail(), "not finite"));
    CHECK(moshi_session_step(wild, pcm, &frames[0]) == MOSHI_ERROR_SESSION);
    CHECK(moshi_session_step(calm, pcm, &frames[1]) == MOSHI_OK);
    CHECK(moshi_session_reset(calm, NULL) == MOSHI_OK);
    CHECK(talk(calm, 0, &again) == MOSHI_OK);
    CHECK(same(&alone[0], &again));
    moshi_session_destroy(wild);
    moshi_session_destroy(calm);
    return 1;
}

static int test_a_submitted_session_can_be_destroyed(void)
{
    static float pcm[FRAME_SIZE], out[FRAME_SIZE];
    for (int i = 0; i < 50; ++i) {
        struct moshi_session *session;
        struct moshi_frame frame = {.pcm = out};
        CHECK(open_session(1, &session) == MOSHI_OK);
        CHECK(moshi_session_submit(session, pcm, &frame) == MOSHI_OK);
        moshi_session_destroy(session);
    }
    return 1;
}

static int test_absurd_arguments_are_refused(void)
{
    struct moshi_session_options options;
    struct moshi_session *session;
    const struct moshi_condition condition = {"description", "x"};
    const int32_t token = 5;
    float pcm[1] = {0};
    int32_t codes[MOSHI_MAX_CODEBOOKS] = {0};
    moshi_session_options_init(model, &options);
    options.null_conditions = &condition;
    options.n_null_conditions = 1;
    CHECK(moshi_session_create(engine, &options, &session) == MOSHI_ERROR_ARGUMENT);
    options.n_null_conditions = -1;
    CHECK(moshi_session_create(engine, &options, &session) == MOSHI_ERROR_ARGUMENT);
    CHECK(open_session(1, &session) == MOSHI_OK);
    CHECK(moshi_session_force_text(session, &token, -1) == MOSHI_ERROR_ARGUMENT);
    CHECK(moshi_session_submit(session, NULL, NULL) == MOSHI_ERROR_ARGUMENT);
    moshi_session_destroy(session);
    CHECK(moshi_mimi_encode(engine, pcm, 1, -1, codes) == MOSHI_ERROR_AUDIO);
    CHECK(moshi_mimi_decode(engine, codes, 1, 8, -1, pcm) == MOSHI_ERROR_AUDIO);
    return 1;
}

static int test_an_offline_start_forces_each_token_once(void)
{
    struct moshi_session_options options;
    struct moshi_session *session;
    struct moshi_frame frame = {0};
    static float pcm[FRAME_SIZE];
    const int32_t tokens[3] = {10, 11, 12};
    int delay = moshi_model_get_info(model)->max_delay;
    moshi_session_options_init(model, &options);
    options.start = MOSHI_START_OFFLINE;
    CHECK(moshi_session_create(engine, &options, &session) == MOSHI_OK);
    CHECK(moshi_session_force_text(session, tokens, 3) == MOSHI_OK);
    /* The first frame's two steps leave the output one frame nearer. */
    for (int t = 0; t < 3 + delay - 1; ++t) {
        CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK);
        if (t >= delay) CHECK(frame.text_token == tokens[t - delay]);
    }
    CHECK(moshi_session_forced_left(session) == 0);
    moshi_session_destroy(session);
    return 1;
}

/* A conversation of FRAMES frames whose second half is stepped by `session`. */
static int goes_on(struct moshi_session *session)
{
    float pcm[FRAME_SIZE];
    for (int t = FRAMES / 2; t < FRAMES; ++t) {
        make_frame(0, t, pcm);
        memset(&again.frames[t], 0, sizeof again.frames[t]);
        again.frames[t].pcm = again.pcm[t];
        if (moshi_session_step(session, pcm, &again.frames[t])) return 0;
    }
    return same(&alone[0], &again);
}

static int first_half(struct moshi_session *session)
{
    float pcm[FRAME_SIZE];
    for (int t = 0; t < FRAMES / 2; ++t) {
        make_frame(0, t, pcm);
        memset(&again.frames[t], 0, sizeof again.frames[t]);
        again.frames[t].pcm = again.pcm[t];
        if (moshi_session_step(session, pcm, &again.frames[t])) return 0;
    }
    return 1;
}

static int test_forks_and_snapshots_go_on(void)
{
    struct moshi_session *session, *fork, *restored;
    struct moshi_frame frame = {0};
    const void *note;
    size_t bytes, note_bytes, little = 10;
    CHECK(open_session(100, &session) == MOSHI_OK);
    CHECK(first_half(session));
    CHECK(moshi_session_snapshot(session, "note", 4, NULL, &bytes) == MOSHI_OK);
    char *data = malloc(bytes);
    CHECK(data);
    CHECK(moshi_session_snapshot(session, "note", 4, data, &little) == MOSHI_ERROR_ARGUMENT);
    CHECK(moshi_session_snapshot(session, "note", 4, data, &bytes) == MOSHI_OK);
    CHECK(moshi_session_fork(session, NULL, &fork) == MOSHI_OK);
    CHECK(moshi_session_restore(engine, data, bytes, &restored, &note, &note_bytes) == MOSHI_OK);
    CHECK(note_bytes == 4 && memcmp(note, "note", 4) == 0);
    /* What one does with the shared history, the others don't feel. */
    CHECK(moshi_session_step(session, again.pcm[0], &frame) == MOSHI_OK);
    moshi_session_destroy(session);
    CHECK(goes_on(fork));
    moshi_session_destroy(fork);
    CHECK(goes_on(restored));
    moshi_session_destroy(restored);
    CHECK(moshi_session_restore(engine, data, bytes - 1, &restored, &note, &note_bytes) ==
          MOSHI_ERROR_CHECKPOINT);
    free(data);
    return 1;
}

static int test_a_descriptor_tells_of_a_finished_frame(void)
{
    struct moshi_session *session;
    struct pollfd watched = {.events = POLLIN};
    static float pcm[FRAME_SIZE], out[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = out};
    CHECK(open_session(100, &session) == MOSHI_OK);
    CHECK(moshi_session_descriptor(session, &watched.fd) == MOSHI_OK);
    for (int i = 0; i < 3; ++i) {
        CHECK(poll(&watched, 1, 0) == 0);
        CHECK(moshi_session_submit(session, pcm, &frame) == MOSHI_OK);
        CHECK(poll(&watched, 1, 60000) == 1);
        CHECK(moshi_session_ready(session));
        CHECK(!moshi_session_withdraw(session));
        CHECK(moshi_session_wait(session) == MOSHI_OK && frame.index == i);
    }
    moshi_session_destroy(session);
    return 1;
}

static int test_a_withdrawn_frame_was_never_stepped(void)
{
    struct moshi_session *session;
    static float pcm[FRAME_SIZE], out[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = out};
    int64_t stepped = 0;
    const int attempts = 500;
    CHECK(open_session(100, &session) == MOSHI_OK);
    CHECK(!moshi_session_withdraw(session));
    for (int i = 0; i < attempts; ++i) {
        CHECK(moshi_session_submit(session, pcm, &frame) == MOSHI_OK);
        if (!moshi_session_withdraw(session)) {
            CHECK(moshi_session_wait(session) == MOSHI_OK);
            CHECK(frame.index == stepped++);
        }
    }
    CHECK(stepped < attempts); /* the engine's thread is never that quick */
    CHECK(moshi_session_step(session, pcm, &frame) == MOSHI_OK && frame.index == stepped);
    moshi_session_destroy(session);
    return 1;
}

int main(int argc, char **argv)
{
    struct moshi_model_options options = {.folder = argc > 1 ? argv[1] : "moshi_c/data/moshi-tiny",
                                          .threads = 2};
    struct moshi_engine_options engine_options = {.max_sessions = CALLERS};
    if (moshi_model_open(&options, &model) ||
        moshi_engine_create(model, &engine_options, &engine)) {
        printf("FAIL opening %s: %s\n0 passed, 1 failed\n", options.folder, moshi_error_detail());
        return 1;
    }
#define RUN(test) run(#test + 5, test)
    RUN(test_the_same_seed_gives_the_same_conversation);
    RUN(test_reset_equals_fresh);
    RUN(test_a_batched_step_equals_lone_steps);
    RUN(test_sessions_in_threads_are_independent);
    RUN(test_refreshes_in_threads_are_independent);
    RUN(test_a_second_caller_is_refused_at_once);
    RUN(test_bad_samples_change_nothing);
    RUN(test_a_step_calls_no_allocator);
    RUN(test_slots_run_out_with_a_reason_and_come_back);
    RUN(test_forced_text_comes_out_as_given);
    RUN(test_a_closed_engine_refuses_steps);
    RUN(test_a_forked_child_is_refused_and_its_parent_goes_on);
    RUN(test_a_session_without_finite_numbers_ends_alone);
    RUN(test_a_submitted_session_can_be_destroyed);
    RUN(test_absurd_arguments_are_refused);
    RUN(test_an_offline_start_forces_each_token_once);
    RUN(test_forks_and_snapshots_go_on);
    RUN(test_a_descriptor_tells_of_a_finished_frame);
    RUN(test_a_withdrawn_frame_was_never_stepped);
    RUN(test_whole_files_and_streams_agree_on_the_first_seconds);
    RUN(test_a_whole_signal_may_come_in_pieces);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
