/* test_threads.c: many threads on one model and on several, through the public header: sessions come
 * and go while others step, frames are waited for elsewhere, the codec works beside them. Each
 * conversation must be the one that its seed gives alone. Run it under TSan too. The model is the
 * smallest there is, so that threads meet often.
 * usage: test_threads [model folder] */
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "moshi.h"

#define FRAMES 20 /* beyond the model's context of 7 */
#define FRAME_SIZE 8
#define SEEDS 4
#define SLOTS 3
#define ROUNDS 40

/* ---- the little harness ----------------------------------------------------------------- */

static int passed, failed;
static char why[512];
static pthread_mutex_t why_lock = PTHREAD_MUTEX_INITIALIZER;

/* The first problem of a test, of any thread, is the one that is shown. */
static void broken(int line, const char *what)
{
    pthread_mutex_lock(&why_lock);
    if (!why[0]) snprintf(why, sizeof why, "line %d: %s (%s)", line, what, moshi_error_detail());
    pthread_mutex_unlock(&why_lock);
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            broken(__LINE__, #condition);                                                          \
            return;                                                                                \
        }                                                                                          \
    } while (0)

static void run(const char *name, void (*test)(void))
{
    why[0] = '\0';
    test();
    if (why[0])
        ++failed;
    else
        ++passed;
    printf("%s %s%s%s\n", why[0] ? "FAIL" : "ok", name, why[0] ? ": " : "", why);
    fflush(stdout);
}

/* ---- one world: a model and its engine -------------------------------------------------- */

struct world {
    struct moshi_model *model;
    struct moshi_engine *engine;
};

static const char *folder = "tests/fuzz/model";
static struct world world;

static int open_world(struct world *made, int slots)
{
    struct moshi_model_options options = {.folder = folder, .threads = 2};
    struct moshi_engine_options capacity = {.max_sessions = slots};
    int status = moshi_model_open(&options, &made->model);
    return status ? status : moshi_engine_create(made->model, &capacity, &made->engine);
}

static void close_world(struct world *made)
{
    moshi_engine_destroy(made->engine);
    moshi_model_close(made->model);
}

static int open_session(const struct world *in, int seed, struct moshi_session **session)
{
    struct moshi_session_options options;
    moshi_session_options_init(in->model, &options);
    options.seed = (uint64_t)seed;
    options.keep_logits = 1;
    return moshi_session_create(in->engine, &options, session);
}

static void make_frame(int seed, int t, float *pcm)
{
    for (int i = 0; i < FRAME_SIZE; ++i)
        pcm[i] = 0.3f * sinf((float)(seed + 1) * 0.3f * (float)(t * FRAME_SIZE + i));
}

/* What a conversation gave, frame by frame. */
struct record {
    int32_t text[FRAMES], codes[FRAMES][8], user[FRAMES][8];
    float pcm[FRAMES][FRAME_SIZE];
};

static struct record alone[SEEDS];

static void keep(struct record *record, int t, const struct moshi_frame *frame)
{
    record->text[t] = frame->text_token;
    memcpy(record->codes[t], frame->codes, (size_t)frame->n_codes * sizeof(int32_t));
    memcpy(record->user[t], frame->user_codes, (size_t)frame->n_user_codes * sizeof(int32_t));
}

static int step(struct moshi_session *session, int seed, int t, struct record *record)
{
    float pcm[FRAME_SIZE];
    struct moshi_frame frame = {.pcm = record->pcm[t]};
    make_frame(seed, t, pcm);
    int status = moshi_session_step(session, pcm, &frame);
    if (!status) keep(record, t, &frame);
    return status;
}

/* Frames first..FRAMES-1 of the conversation. */
static void go_on(struct moshi_session *session, int seed, int first)
{
    struct record record = alone[seed];
    for (int t = first; t < FRAMES; ++t) {
        memset(record.pcm[t], 0, sizeof record.pcm[t]);
        record.text[t] = -2;
        CHECK(step(session, seed, t, &record) == MOSHI_OK);
    }
    CHECK(memcmp(&record, &alone[seed], sizeof record) == 0);
}

static void talk(struct moshi_session *session, int seed)
{
    go_on(session, seed, 0);
}

static void start(pthread_t *thread, void *(*body)(void *), void *arg)
{
    CHECK(pthread_create(thread, NULL, body, arg) == 0);
}

/* ---- threads ---------------------------------------------------------------------------- */

struct job {
    const struct world *world;
    int number, rounds;
};

/* Waits for a free slot where there are fewer than threads. */
static int open_any(const struct world *in, int seed, struct moshi_session **session)
{
    int status;
    while ((status = open_session(in, seed, session)) == MOSHI_ERROR_SESSION) sched_yield();
    return status;
}

/* Opens, talks, closes. */
static void come_and_go(const struct job *job)
{
    for (int round = 0; round < job->rounds; ++round) {
        struct moshi_session *session;
        int seed = (job->number + round) % SEEDS;
        CHECK(open_any(job->world, seed, &session) == MOSHI_OK);
        talk(session, seed);
        moshi_session_destroy(session);
    }
}

static void *come_and_go_thread(void *arg)
{
    come_and_go(arg);
    return NULL;
}

/* One session, reset again and again, now and then in the middle. */
static void start_over(const struct job *job)
{
    struct moshi_session *session;
    struct record unfinished;
    float text[64], audio[64];
    CHECK(open_session(job->world, job->number % SEEDS, &session) == MOSHI_OK);
    for (int round = 0; round < job->rounds; ++round) {
        uint64_t seed = (uint64_t)((job->number + round) % SEEDS);
        CHECK(moshi_session_reset(session, &seed) == MOSHI_OK);
        talk(session, (int)seed);
        CHECK(moshi_session_logits(session, text, audio) == MOSHI_OK);
        CHECK(moshi_session_reset(session, NULL) == MOSHI_OK);
        CHECK(moshi_session_force_next(session, 1, NULL) == MOSHI_OK);
        CHECK(step(session, 0, 0, &unfinished) == MOSHI_OK);
    }
    moshi_session_destroy(session);
}

static void *start_over_thread(void *arg)
{
    start_over(arg);
    return NULL;
}

static int fork_session(struct moshi_session *session, struct moshi_session **fork)
{
    int status;
    while ((status = moshi_session_fork(session, NULL, fork)) == MOSHI_ERROR_SESSION) sched_yield();
    return status;
}

/* Half a conversation; a fork of it, its snapshot and itself all come to the same end. */
static void branch(const struct job *job)
{
    static const int half = FRAMES / 2;
    for (int round = 0; round < job->rounds; ++round) {
        struct moshi_session *session, *other;
        struct record record;
        const void *note;
        size_t bytes, note_bytes;
        int seed = (job->number + round) % SEEDS, status;
        CHECK(open_any(job->world, seed, &session) == MOSHI_OK);
        for (int t = 0; t < half; ++t) CHECK(step(session, seed, t, &record) == MOSHI_OK);
        CHECK(moshi_session_snapshot(session, NULL, 0, NULL, &bytes) == MOSHI_OK);
        void *saved = malloc(bytes);
        CHECK(saved && moshi_session_snapshot(session, NULL, 0, saved, &bytes) == MOSHI_OK);
        CHECK(fork_session(session, &other) == MOSHI_OK);
        go_on(session, seed, half);
        moshi_session_destroy(session);
        go_on(other, seed, half);
        moshi_session_destroy(other);
        while ((status = moshi_session_restore(job->world->engine, saved, bytes, &other, &note,
                                               &note_bytes)) == MOSHI_ERROR_SESSION)
            sched_yield();
        CHECK(status == MOSHI_OK);
        free(saved);
        go_on(other, seed, half);
        moshi_session_destroy(other);
    }
}

static void *branch_thread(void *arg)
{
    branch(arg);
    return NULL;
}

/* Frames taken back in time are as if they had not been given. */
static void hesitate(const struct job *job)
{
    struct moshi_session *session;
    struct record record;
    float noise[FRAME_SIZE] = {0.5f, -0.5f};
    int seed = job->number % SEEDS;
    CHECK(open_session(job->world, seed, &session) == MOSHI_OK);
    for (int round = 0; round < job->rounds; ++round) {
        struct moshi_frame frame = {.pcm = record.pcm[0]};
        CHECK(moshi_session_submit(session, noise, &frame) == MOSHI_OK);
        if (moshi_session_withdraw(session)) {
            talk(session, seed);
        } else {
            CHECK(moshi_session_wait(session) == MOSHI_OK);
        }
        CHECK(moshi_session_reset(session, NULL) == MOSHI_OK);
    }
    moshi_session_destroy(session);
}

static void *hesitate_thread(void *arg)
{
    hesitate(arg);
    return NULL;
}

/* Codec streams and whole signals: the same codes and the same sound every time. */
static void code(const struct job *job)
{
    enum { LEVELS = 2 }; /* what this model's codec gives */
    struct mimi_stream *stream;
    float pcm[FRAMES][FRAME_SIZE], sound[2][FRAMES][FRAME_SIZE], whole_sound[FRAMES * FRAME_SIZE];
    int32_t codes[2][FRAMES][LEVELS], whole[2][LEVELS * FRAMES];
    for (int t = 0; t < FRAMES; ++t) make_frame(job->number, t, pcm[t]);
    CHECK(mimi_stream_create(job->world->engine, 1, &stream) == MOSHI_OK);
    for (int round = 0; round < job->rounds; ++round) {
        int now = round > 0;
        CHECK(mimi_stream_reset(stream) == MOSHI_OK);
        for (int t = 0; t < FRAMES; ++t) {
            CHECK(mimi_stream_encode(stream, pcm[t], codes[now][t]) == MOSHI_OK);
            CHECK(mimi_stream_decode(stream, codes[now][t], LEVELS, sound[now][t]) == MOSHI_OK);
        }
        CHECK(moshi_mimi_encode(job->world->engine, pcm[0], 1, FRAMES * FRAME_SIZE, whole[now]) ==
              MOSHI_OK);
        CHECK(moshi_mimi_decode(job->world->engine, whole[now], 1, LEVELS, FRAMES, whole_sound) ==
              MOSHI_OK);
        CHECK(!now || memcmp(codes[0], codes[1], sizeof codes[0]) == 0);
        CHECK(!now || memcmp(sound[0], sound[1], sizeof sound[0]) == 0);
        CHECK(!now || memcmp(whole[0], whole[1], sizeof whole[0]) == 0);
    }
    mimi_stream_destroy(stream);
}

static void *code_thread(void *arg)
{
    code(arg);
    return NULL;
}

/* A model of its own, opened and closed again and again. */
static void open_and_close(const struct job *job)
{
    for (int round = 0; round < job->rounds; ++round) {
        struct world own;
        struct moshi_session *session;
        CHECK(open_world(&own, 1) == MOSHI_OK);
        CHECK(open_session(&own, 1, &session) == MOSHI_OK);
        talk(session, 1);
        moshi_session_destroy(session);
        close_world(&own);
    }
}

static void *open_and_close_thread(void *arg)
{
    open_and_close(arg);
    return NULL;
}

/* Everything that may be asked of a model while others use it. */
static void ask(const struct job *job)
{
    for (int round = 0; round < job->rounds; ++round) {
        struct moshi_memory memory;
        struct moshi_engine_stats stats;
        struct moshi_device device;
        CHECK(moshi_engine_memory(job->world->engine, &memory) == MOSHI_OK);
        CHECK(memory.session_used_bytes >= 0 && memory.session_bytes > 0);
        CHECK(moshi_engine_get_stats(job->world->engine, &stats) == MOSHI_OK);
        CHECK(stats.frames >= stats.ticks);
        CHECK(moshi_devices(&device, 1) == 1 && device.usable);
        CHECK(moshi_model_get_info(job->world->model)->frame_size == FRAME_SIZE);
    }
}

static void *ask_thread(void *arg)
{
    ask(arg);
    return NULL;
}

#define MAX_THREADS 8

struct crowd {
    struct job jobs[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    int count;
};

static void join_in(struct crowd *crowd, void *(*body)(void *), const struct world *in, int rounds)
{
    struct job *job = &crowd->jobs[crowd->count];
    *job = (struct job){.world = in, .number = crowd->count, .rounds = rounds};
    start(&crowd->threads[crowd->count++], body, job);
}

static void wait_for_all(struct crowd *crowd)
{
    for (int i = 0; i < crowd->count; ++i) pthread_join(crowd->threads[i], NULL);
}

/* ---- tests ------------------------------------------------------------------------------ */

static void test_a_seed_gives_its_conversation_again(void)
{
    for (int seed = 0; seed < SEEDS; ++seed) {
        struct moshi_session *session;
        CHECK(open_session(&world, seed, &session) == MOSHI_OK);
        for (int t = 0; t < FRAMES; ++t) CHECK(step(session, seed, t, &alone[seed]) == MOSHI_OK);
        CHECK(moshi_session_reset(session, NULL) == MOSHI_OK);
        talk(session, seed);
        moshi_session_destroy(session);
    }
    CHECK(memcmp(alone[0].text, alone[1].text, sizeof alone[0].text) != 0);
}

static void test_sessions_come_and_go_while_others_step(void)
{
    struct crowd crowd = {.count = 0};
    for (int i = 0; i < SLOTS + 2; ++i) join_in(&crowd, come_and_go_thread, &world, ROUNDS);
    wait_for_all(&crowd);
}

static void test_resets_do_not_touch_the_others(void)
{
    struct crowd crowd = {.count = 0};
    for (int i = 0; i < SLOTS; ++i) join_in(&crowd, start_over_thread, &world, ROUNDS);
    wait_for_all(&crowd);
}

static void test_forks_and_snapshots_go_on_while_others_step(void)
{
    struct crowd crowd = {.count = 0};
    join_in(&crowd, branch_thread, &world, ROUNDS);
    for (int i = 0; i < 3; ++i) join_in(&crowd, come_and_go_thread, &world, ROUNDS);
    wait_for_all(&crowd);
}

struct half {
    struct moshi_session *session;
    int seed;
};

static void *go_on_thread(void *arg)
{
    const struct half *half = arg;
    go_on(half->session, half->seed, FRAMES / 2);
    return NULL;
}

/* The two share pages of keys and values until the fork writes to them. */
static void test_a_session_is_saved_while_its_fork_steps(void)
{
    struct moshi_session *session;
    struct record record;
    size_t bytes, same;
    CHECK(open_session(&world, 2, &session) == MOSHI_OK);
    for (int t = 0; t < FRAMES / 2; ++t) CHECK(step(session, 2, t, &record) == MOSHI_OK);
    CHECK(moshi_session_snapshot(session, NULL, 0, NULL, &bytes) == MOSHI_OK);
    char *first = malloc(bytes), *again = malloc(bytes);
    CHECK(first && again);
    same = bytes;
    CHECK(moshi_session_snapshot(session, NULL, 0, first, &same) == MOSHI_OK && same == bytes);
    for (int round = 0; round < ROUNDS; ++round) {
        struct half half = {.seed = 2};
        pthread_t thread;
        CHECK(moshi_session_fork(session, NULL, &half.session) == MOSHI_OK);
        start(&thread, go_on_thread, &half);
        for (int i = 0; i < 3; ++i) {
            CHECK(moshi_session_snapshot(session, NULL, 0, again, &same) == MOSHI_OK);
            CHECK(memcmp(first, again, bytes) == 0);
        }
        pthread_join(thread, NULL);
        moshi_session_destroy(half.session);
    }
    go_on(session, 2, FRAMES / 2);
    moshi_session_destroy(session);
    free(first);
    free(again);
}

static void test_frames_are_taken_back_while_others_step(void)
{
    struct crowd crowd = {.count = 0};
    join_in(&crowd, hesitate_thread, &world, ROUNDS);
    for (int i = 0; i < 2; ++i) join_in(&crowd, come_and_go_thread, &world, ROUNDS);
    wait_for_all(&crowd);
}

static void test_the_codec_works_beside_sessions(void)
{
    struct crowd crowd = {.count = 0};
    for (int i = 0; i < 2; ++i) {
        join_in(&crowd, code_thread, &world, ROUNDS);
        join_in(&crowd, come_and_go_thread, &world, ROUNDS);
    }
    wait_for_all(&crowd);
}

static void test_models_of_one_process_are_independent(void)
{
    struct crowd crowd = {.count = 0};
    struct world second;
    CHECK(open_world(&second, SLOTS) == MOSHI_OK);
    for (int i = 0; i < 2; ++i) {
        join_in(&crowd, come_and_go_thread, &world, ROUNDS);
        join_in(&crowd, come_and_go_thread, &second, ROUNDS);
        join_in(&crowd, open_and_close_thread, NULL, ROUNDS / 4);
    }
    wait_for_all(&crowd);
    close_world(&second);
}

static void test_a_model_answers_while_others_step(void)
{
    struct crowd crowd = {.count = 0};
    for (int i = 0; i < 2; ++i) {
        join_in(&crowd, come_and_go_thread, &world, ROUNDS);
        join_in(&crowd, ask_thread, &world, ROUNDS);
    }
    wait_for_all(&crowd);
}

/* An event loop: all sessions are submitted, then taken in the order in which their descriptors
 * become readable. */
static void test_one_thread_serves_many_sessions(void)
{
    enum { COUNT = SLOTS - 1 };
    struct crowd crowd = {.count = 0};
    struct moshi_session *sessions[COUNT];
    static struct record records[COUNT];
    struct moshi_frame frames[COUNT];
    struct pollfd waiting[COUNT];
    const int32_t forced = 2;
    join_in(&crowd, come_and_go_thread, &world, ROUNDS);
    for (int i = 0; i < COUNT; ++i) {
        CHECK(open_any(&world, i, &sessions[i]) == MOSHI_OK);
        waiting[i].events = POLLIN;
    }
    for (int t = 0; t < FRAMES; ++t) {
        for (int i = 0; i < COUNT; ++i) {
            float pcm[FRAME_SIZE];
            make_frame(i, t, pcm);
            frames[i] = (struct moshi_frame){.pcm = records[i].pcm[t]};
            CHECK(moshi_session_descriptor(sessions[i], &waiting[i].fd) == MOSHI_OK);
            CHECK(moshi_session_submit(sessions[i], pcm, &frames[i]) == MOSHI_OK);
            memset(pcm, 0, sizeof pcm); /* the samples were taken */
            CHECK(moshi_session_force_text(sessions[i], &forced, 1) == MOSHI_ERROR_SESSION);
            CHECK(moshi_session_forced_left(sessions[i]) == 0);
        }
        for (int left = COUNT; left > 0;) {
            CHECK(poll(waiting, COUNT, 60000) > 0);
            for (int i = 0; i < COUNT; ++i) {
                if (waiting[i].fd < 0 || !(waiting[i].revents & POLLIN)) continue;
                CHECK(moshi_session_ready(sessions[i]));
                CHECK(moshi_session_wait(sessions[i]) == MOSHI_OK);
                keep(&records[i], t, &frames[i]);
                waiting[i].fd = -1; /* poll passes it over */
                --left;
            }
        }
    }
    for (int i = 0; i < COUNT; ++i) {
        CHECK(memcmp(&records[i], &alone[i], sizeof alone[i]) == 0);
        moshi_session_destroy(sessions[i]);
    }
    wait_for_all(&crowd);
}

struct relay {
    struct moshi_session *session;
    int there[2], back[2]; /* pipes */
    struct record record;
    struct moshi_frame frame;
};

static void wait_for_frames(struct relay *relay)
{
    char t;
    while (read(relay->there[0], &t, 1) == 1) {
        CHECK(moshi_session_wait(relay->session) == MOSHI_OK);
        keep(&relay->record, t, &relay->frame);
        CHECK(write(relay->back[1], &t, 1) == 1);
    }
}

static void *relay_thread(void *arg)
{
    struct relay *relay = arg;
    wait_for_frames(relay);
    close(relay->back[1]);
    return NULL;
}

static void test_a_frame_may_be_waited_for_in_another_thread(void)
{
    static struct relay relay;
    pthread_t thread;
    char t;
    const int32_t tokens[4] = {1, 2, 1, 2};
    CHECK(open_any(&world, 3, &relay.session) == MOSHI_OK);
    CHECK(pipe(relay.there) == 0 && pipe(relay.back) == 0);
    start(&thread, relay_thread, &relay);
    for (t = 0; t < FRAMES; ++t) {
        float pcm[FRAME_SIZE];
        char done;
        make_frame(3, t, pcm);
        relay.frame = (struct moshi_frame){.pcm = relay.record.pcm[(int)t]};
        CHECK(moshi_session_submit(relay.session, pcm, &relay.frame) == MOSHI_OK);
        CHECK(write(relay.there[1], &t, 1) == 1);
        CHECK(read(relay.back[0], &done, 1) == 1 && done == t);
    }
    CHECK(memcmp(&relay.record, &alone[3], sizeof alone[3]) == 0);
    /* Forced text runs out while frames are under way. */
    CHECK(moshi_session_force_text(relay.session, tokens, 4) == MOSHI_OK);
    for (int left = 4; left > 0; --left) {
        float pcm[FRAME_SIZE] = {0};
        CHECK(moshi_session_submit(relay.session, pcm, &relay.frame) == MOSHI_OK);
        usleep(2000); /* a call that waited would order the two threads */
        int now = moshi_session_forced_left(relay.session);
        CHECK(now == left || now == left - 1);
        CHECK(moshi_session_wait(relay.session) == MOSHI_OK);
        CHECK(moshi_session_forced_left(relay.session) == left - 1);
    }
    close(relay.there[1]);
    pthread_join(thread, NULL);
    close(relay.there[0]);
    close(relay.back[0]);
    moshi_session_destroy(relay.session);
}

static void test_a_batch_steps_beside_lone_sessions(void)
{
    enum { BATCH = SLOTS - 1 };
    struct crowd crowd = {.count = 0};
    struct moshi_session *sessions[BATCH];
    static struct record records[BATCH];
    join_in(&crowd, come_and_go_thread, &world, ROUNDS);
    for (int i = 0; i < BATCH; ++i) CHECK(open_any(&world, i, &sessions[i]) == MOSHI_OK);
    for (int t = 0; t < FRAMES; ++t) {
        float pcm[BATCH][FRAME_SIZE];
        const float *inputs[BATCH];
        struct moshi_frame frames[BATCH];
        for (int i = 0; i < BATCH; ++i) {
            make_frame(i, t, pcm[i]);
            inputs[i] = pcm[i];
            frames[i] = (struct moshi_frame){.pcm = records[i].pcm[t]};
        }
        CHECK(moshi_sessions_step(sessions, BATCH, inputs, NULL, frames) == MOSHI_OK);
        for (int i = 0; i < BATCH; ++i) keep(&records[i], t, &frames[i]);
    }
    for (int i = 0; i < BATCH; ++i) {
        CHECK(memcmp(&records[i], &alone[i], sizeof alone[i]) == 0);
        moshi_session_destroy(sessions[i]);
    }
    wait_for_all(&crowd);
}

int main(int argc, char **argv)
{
    if (argc > 1) folder = argv[1];
    if (open_world(&world, SLOTS)) {
        printf("FAIL opening %s: %s\n0 passed, 1 failed\n", folder, moshi_error_detail());
        return 1;
    }
#define RUN(test) run(#test + 5, test)
    RUN(test_a_seed_gives_its_conversation_again);
    RUN(test_sessions_come_and_go_while_others_step);
    RUN(test_resets_do_not_touch_the_others);
    RUN(test_forks_and_snapshots_go_on_while_others_step);
    RUN(test_a_session_is_saved_while_its_fork_steps);
    RUN(test_frames_are_taken_back_while_others_step);
    RUN(test_the_codec_works_beside_sessions);
    RUN(test_models_of_one_process_are_independent);
    RUN(test_a_model_answers_while_others_step);
    RUN(test_one_thread_serves_many_sessions);
    RUN(test_a_frame_may_be_waited_for_in_another_thread);
    RUN(test_a_batch_steps_beside_lone_sessions);
    close_world(&world);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
