/* test_sessions.c: what sessions share on a card, through the host shim: forks and their pages,
 * snapshots, memory, launches and copies of a tick, and that company changes no bit. Usage:
 * test_sessions [model folder], with MOSHI_C_CUDA_LIBRARY naming the shim's library. */
#include <sched.h>
#include <stdlib.h>

#include "../../csrc/engine.h"
#include "calls.h"

#define SLOTS 9
#define FRAMES 3 /* of a conversation */
#define GIVEN 70 /* frames that begin a call: more than a page has */

static struct moshi_model *cpu, *card;
static struct moshi_engine *engine;

static int open_slots(int slots)
{
    CHECK(open_engine(card, slots, &engine) == MOSHI_OK);
    return 1;
}

static int close_slots(void)
{
    moshi_engine_destroy(engine);
    engine = NULL;
    return 1;
}

/* ---- conversations ---------------------------------------------------------------------- */

struct talk {
    float pcm[FRAMES][FRAME_SIZE];
    struct moshi_frame frames[FRAMES];
};

static int same_frame(const struct moshi_frame *a, const struct moshi_frame *b)
{
    return a->text_token == b->text_token && a->n_codes == b->n_codes &&
           memcmp(a->codes, b->codes, (size_t)a->n_codes * sizeof *a->codes) == 0 &&
           memcmp(a->user_codes, b->user_codes, (size_t)a->n_user_codes * sizeof *a->codes) == 0;
}

/* To the last bit, from frame `first` on. */
static int same_talk(const struct talk *a, const struct talk *b, int first)
{
    for (int t = first; t < FRAMES; ++t)
        if (!same_frame(&a->frames[t], &b->frames[t]) ||
            memcmp(a->pcm[t], b->pcm[t], sizeof a->pcm[t]))
            return 0;
    return 1;
}

static int stepped[SLOTS]; /* of the sessions of the last step */

/* Frame t of the caller `who` in each of n sessions, in one step. */
static int step(struct moshi_session *const *sessions, const int *who, int n, int t,
                struct talk *const *talks)
{
    static float pcm[SLOTS][FRAME_SIZE], unheard[SLOTS][FRAME_SIZE];
    struct moshi_frame frames[SLOTS] = {0};
    const float *pcms[SLOTS] = {NULL};

    for (int i = 0; i < n; ++i) {
        make_frame(who[i], t, pcm[i]);
        pcms[i] = pcm[i];
        frames[i].pcm = talks && talks[i] ? talks[i]->pcm[t] : unheard[i];
        frames[i].index = -1;
    }
    int status = moshi_sessions_step(sessions, n, pcms, NULL, frames);

    for (int i = 0; i < n; ++i) {
        stepped[i] = frames[i].index >= 0;
        if (talks && talks[i]) talks[i]->frames[t] = frames[i];
    }
    return status;
}

static int step_one(struct moshi_session *session, int who, int t, struct talk *talk)
{
    return step(&session, &who, 1, t, &talk);
}

static int talk_from(struct moshi_session *session, int who, int first, struct talk *talk)
{
    int status = MOSHI_OK;

    for (int t = first; t < FRAMES && !status; ++t) status = step_one(session, who, t, talk);
    return status;
}

static long since(long *before, int event)
{
    long now = count(event), more = now - before[event];

    before[event] = now;
    return more;
}

static void look(long *events)
{
    for (int event = 0; event < EVENTS; ++event) events[event] = count(event);
}

static void close_all(struct moshi_session **sessions, int n)
{
    for (int i = 0; i < n; ++i) moshi_session_destroy(sessions[i]);
}

/* ---- calls that have lasted ------------------------------------------------------------- */

/* The beginning of a call. */
static int give(struct moshi_session *session, int frames)
{
    const struct moshi_model_info *info = moshi_model_get_info(card);
    static int32_t text[GIVEN], codes[GIVEN * MOSHI_MAX_CODEBOOKS],
        user[GIVEN * MOSHI_MAX_CODEBOOKS];

    for (int t = 0; t < frames; ++t) text[t] = 5 + 7 * t % 300;
    for (int i = 0; i < frames * info->dep_q; ++i) codes[i] = 11 * i % info->card;
    for (int i = 0; i < frames * info->user_q; ++i) user[i] = 13 * i % info->card;
    return moshi_session_prefill(session, frames, text, codes, user, NULL);
}

static char *take_snapshot(struct moshi_session *session, size_t *bytes)
{
    if (moshi_session_snapshot(session, NULL, 0, NULL, bytes)) return NULL;
    char *data = malloc(*bytes);

    if (data && moshi_session_snapshot(session, NULL, 0, data, bytes) == MOSHI_OK) return data;
    free(data);
    return NULL;
}

static struct moshi_session *restore(struct moshi_engine *into, const char *data, size_t bytes)
{
    struct moshi_session *session;
    const void *note;
    size_t note_bytes;

    return moshi_session_restore(into, data, bytes, &session, &note, &note_bytes) ? NULL : session;
}

/* The same file with another device in its header. */
static char *moved_to(const char *data, size_t *bytes, const char *from, const char *to)
{
    uint64_t header, length;
    char *moved = malloc(*bytes + 16);

    memcpy(&header, data, sizeof header);
    const char *text = data + 8, *at = moved ? strstr(text, from) : NULL;

    if (!at || at >= text + header) {
        free(moved);
        return NULL;
    }
    const size_t before = (size_t)(at - text), rest = (size_t)header - before - strlen(from);

    memset(moved + 8, ' ', (size_t)header + 16);
    memcpy(moved + 8, text, before);
    memcpy(moved + 8 + before, to, strlen(to));
    memcpy(moved + 8 + before + strlen(to), at + strlen(from), rest);
    length = before + strlen(to) + rest;
    while (length > 1 && moved[8 + length - 1] == ' ') --length; /* it was filled up with spaces */
    length = (length + 7) / 8 * 8;
    memcpy(moved, &length, sizeof length);
    memcpy(moved + 8 + length, data + 8 + header, *bytes - 8 - (size_t)header);
    *bytes += (size_t)length - (size_t)header;
    return moved;
}

/* A call of so many frames as a file for the card. They were stepped on the CPU, which is quicker than
 * the shim. */
static char *make_call(enum manner manner, int frames, size_t *bytes)
{
    struct moshi_engine *other;
    struct moshi_session *session;
    char *data = NULL, *moved = NULL;

    if (open_engine(cpu, 1, &other)) return NULL;
    if (open_session(cpu, other, manner, &session) == MOSHI_OK) {
        if (give(session, frames) == MOSHI_OK) data = take_snapshot(session, bytes);
        if (data) moved = moved_to(data, bytes, "\"cpu\"", "\"cuda:0\"");
        moshi_session_destroy(session);
    }
    free(data);
    moshi_engine_destroy(other);
    return moved;
}

static int open_call(enum manner manner, int frames, struct moshi_session **session)
{
    size_t bytes;
    char *data = make_call(manner, frames, &bytes);

    *session = data ? restore(engine, data, bytes) : NULL;
    free(data);
    return *session ? MOSHI_OK : MOSHI_ERROR_INTERNAL;
}

/* ---- forks ------------------------------------------------------------------------------ */

/* Of the language model's keys and values, and of both halves of the codec's. */
static long written_bytes(void)
{
    const struct mimi_state *mimi = &engine->mimi;

    return (long)(engine->lm.kv.cache.page_bytes + mimi->encoder_kv.cache.page_bytes +
                  mimi->decoder_kv.cache.page_bytes);
}

/* Two children and their parent go different ways; each as if there were no other. */
static int fork_and_compare(enum manner manner)
{
    static struct talk expected, found;
    struct moshi_session *parent, *children[2];

    if (!open_slots(3)) return 0;
    CHECK(open_call(manner, GIVEN, &parent) == MOSHI_OK);
    CHECK(talk_from(parent, 0, 0, &expected) == MOSHI_OK);
    moshi_session_destroy(parent);

    CHECK(open_call(manner, GIVEN, &parent) == MOSHI_OK);
    CHECK(step_one(parent, 0, 0, &found) == MOSHI_OK);
    for (int i = 0; i < 2; ++i) CHECK(moshi_session_fork(parent, NULL, &children[i]) == MOSHI_OK);
    CHECK(step_one(children[0], 0, 1, &found) == MOSHI_OK);
    CHECK(step_one(parent, 2, 1, NULL) == MOSHI_OK);
    moshi_session_destroy(parent);
    CHECK(step_one(children[1], 1, 1, NULL) == MOSHI_OK);
    CHECK(talk_from(children[0], 0, 2, &found) == MOSHI_OK);
    CHECK(same_talk(&expected, &found, 0));
    close_all(children, 2);
    return close_slots();
}

static int test_a_fork_goes_on_like_a_call_that_was_never_forked(void)
{
    return fork_and_compare(SAMPLED);
}

static int test_a_guided_fork_with_int8_keys_does_too(void)
{
    int good;

    kv_dtype = MOSHI_INT8;
    good = fork_and_compare(GUIDED);
    kv_dtype = MOSHI_AUTO;
    return good;
}

/* Of the two pages of a call, and of the codec's, who writes next copies the one that it writes to;
 * everything else of a session is copied by a launch or two. */
static int test_a_fork_copies_little_and_its_first_step_the_page_it_writes(void)
{
    struct moshi_session *parent, *fork;
    long events[EVENTS];

    if (!open_slots(2)) return 0;
    CHECK(open_call(SAMPLED, GIVEN, &parent) == MOSHI_OK);
    for (int t = 0; t < 2; ++t) CHECK(step_one(parent, 0, t, NULL) == MOSHI_OK);
    look(events);
    CHECK(moshi_session_fork(parent, NULL, &fork) == MOSHI_OK);
    CHECK(engine->backend->ops->sync(engine->backend) == MOSHI_OK);
    CHECK(since(events, COPIED_BYTES) == 0);
    CHECK(since(events, LAUNCHED) + since(events, MOVED) <= 4);
    CHECK(since(events, SENT) <= 3);
    CHECK(since(events, FETCHED) == 0);
    CHECK(step_one(fork, 0, 2, NULL) == MOSHI_OK);
    CHECK(since(events, COPIED_BYTES) == written_bytes());
    for (int t = 2; t < 4; ++t) CHECK(step_one(parent, 0, t, NULL) == MOSHI_OK);
    CHECK(step_one(fork, 0, 3, NULL) == MOSHI_OK);
    CHECK(since(events, COPIED_BYTES) == 0); /* nobody else reads those pages */
    moshi_session_destroy(fork);
    moshi_session_destroy(parent);
    return close_slots();
}

/* Memory comes with pages, and all of it is back when the last reader of a page is gone, whoever
 * that is. */
static int test_memory_goes_back_with_the_last_sharer(void)
{
    struct moshi_session *parent, *fork;

    if (!open_slots(3)) return 0;
    const long before = count(TAKEN_BYTES);

    for (int parent_first = 0; parent_first < 2; ++parent_first) {
        CHECK(open_call(SAMPLED, GIVEN, &parent) == MOSHI_OK);
        CHECK(step_one(parent, 0, 0, NULL) == MOSHI_OK);
        const long alone = count(TAKEN_BYTES);

        CHECK(alone == before + written_bytes() + (long)engine->lm.kv.cache.page_bytes);
        CHECK(moshi_session_fork(parent, NULL, &fork) == MOSHI_OK);
        CHECK(step_one(fork, 0, 1, NULL) == MOSHI_OK);
        CHECK(count(TAKEN_BYTES) == alone + written_bytes());
        moshi_session_destroy(parent_first ? parent : fork);
        CHECK(count(TAKEN_BYTES) == alone);
        CHECK(moshi_session_fork(parent_first ? fork : parent, NULL,
                                 parent_first ? &parent : &fork) == MOSHI_OK);
        moshi_session_destroy(parent_first ? fork : parent);
        moshi_session_destroy(parent_first ? parent : fork);
        CHECK(count(TAKEN_BYTES) == before);
    }
    return close_slots();
}

/* Three calls that step together: one that begins a page, one that is forked, and its fork; then
 * another fork. With `fails` memory runs out wherever it is asked for, and what is refused is done
 * again. */
static int fork_and_step(int fails, struct talk *talks)
{
    struct moshi_session *calls[3];
    const int who[3] = {0, 1, 1}, expected = fails ? MOSHI_ERROR_MEMORY : MOSHI_OK;
    struct talk *const heard[3] = {&talks[0], &talks[1], &talks[2]};

    CHECK(open_slots(3));
    CHECK(open_call(SAMPLED, KV_PAGE_POSITIONS - 1, &calls[0]) == MOSHI_OK);
    CHECK(open_call(GREEDY, 4, &calls[1]) == MOSHI_OK);
    CHECK(step(calls, who, 2, 0, heard) == MOSHI_OK);
    if (fails) {
        inject(FAULT_MALLOC, 0);
        CHECK(moshi_session_fork(calls[1], NULL, &calls[2]) == MOSHI_ERROR_MEMORY);
    }
    CHECK(moshi_session_fork(calls[1], NULL, &calls[2]) == MOSHI_OK);
    if (fails) inject(FAULT_MALLOC, 0);
    CHECK(step(calls, who, 3, 1, heard) == expected);
    CHECK(stepped[0] && stepped[1] == !fails && stepped[2]);
    if (fails) CHECK(step_one(calls[1], 1, 1, heard[1]) == MOSHI_OK);
    moshi_session_destroy(calls[2]);
    CHECK(moshi_session_fork(calls[1], NULL, &calls[2]) == MOSHI_OK);
    for (int half = 0; half < 2 && fails; ++half) { /* of the codec */
        inject(FAULT_MALLOC, half);
        CHECK(step_one(calls[2], 1, 2, NULL) == MOSHI_ERROR_MEMORY);
    }
    repair();
    CHECK(step(calls, who, 3, 2, heard) == MOSHI_OK);
    close_all(calls, 3);
    return close_slots();
}

/* Nobody loses a bit, of what was on its way to the card for others neither. */
static int test_memory_that_runs_out_in_a_fork_or_at_its_copy_loses_nothing(void)
{
    static struct talk expected[3], found[3];

    if (!fork_and_step(0, expected) || !fork_and_step(1, found)) return 0;
    CHECK(same_talk(&expected[0], &found[0], 0) && same_talk(&expected[1], &found[1], 0));
    CHECK(same_talk(&expected[1], &expected[2], 1) && same_talk(&expected[1], &found[2], 1));
    return 1;
}

/* ---- snapshots -------------------------------------------------------------------------- */

/* Places of the session's history on the card: as many copies as it would take one by one. */
static long places(int guided)
{
    const struct kv_cache *cache = &engine->lm.kv.cache;

    return (1 + guided) * 2L * cache->layers * 2 * cache->kv_heads; /* two pages */
}

/* A call's snapshot, and a session made of it, cross in few copies; it goes on to the bit. */
static int test_a_snapshot_crosses_in_few_copies_and_goes_on(void)
{
    static struct talk expected, found;
    struct moshi_session *session, *restored;
    long events[EVENTS];
    size_t bytes;

    if (!open_slots(2)) return 0;
    CHECK(open_call(GUIDED, GIVEN, &session) == MOSHI_OK);
    for (int t = 0; t < 2; ++t) CHECK(step_one(session, 0, t, &expected) == MOSHI_OK);
    look(events);
    char *data = take_snapshot(session, &bytes);

    CHECK(data != NULL);
    const long megabytes = (long)(bytes >> 20) + 1, many = places(1);
    const long pages = 6; /* each is made when the list has come to it */

    CHECK(many > 100 && since(events, FETCHED) <= 2 * megabytes && since(events, SENT) <= 1);
    CHECK(since(events, LAUNCHED) + since(events, MOVED) <= many / 64 + 4 * megabytes);
    restored = restore(engine, data, bytes);
    CHECK(restored != NULL);
    CHECK(since(events, SENT) <= many / 64 + 4 * megabytes + pages);
    CHECK(since(events, LAUNCHED) <= many / 64 + 4 * megabytes + pages);
    CHECK(since(events, FETCHED) <= 8); /* what is used as an index is looked at */
    CHECK(talk_from(session, 0, 2, &expected) == MOSHI_OK);
    CHECK(talk_from(restored, 0, 2, &found) == MOSHI_OK);
    CHECK(same_talk(&expected, &found, 2));
    free(data);
    moshi_session_destroy(restored);
    moshi_session_destroy(session);
    return close_slots();
}

/* A call that began on the CPU is put on the card: its snapshot there is the same file again. */
static int test_a_snapshot_has_the_bytes_that_the_cpu_makes(void)
{
    size_t bytes, again_bytes;

    kv_dtype = MOSHI_INT8;
    CHECK(open_slots(1));
    char *data = make_call(GUIDED, GIVEN, &bytes);

    kv_dtype = MOSHI_AUTO;
    CHECK(data != NULL);
    struct moshi_session *session = restore(engine, data, bytes);

    CHECK(session != NULL);
    char *again = take_snapshot(session, &again_bytes);

    CHECK(again && again_bytes == bytes && memcmp(again, data, bytes) == 0);
    free(again);
    free(data);
    moshi_session_destroy(session);
    return close_slots();
}

/* ---- memory ----------------------------------------------------------------------------- */

/* What is told of a session is what the card is asked for, so many times as there are slots. */
static int test_memory_of_a_session_is_as_computed(void)
{
    static const enum moshi_dtype dtypes[] = {MOSHI_AUTO, MOSHI_INT8};
    const long rounding[] = {2, 64 << 10}; /* pages that are no multiple of what the card gives */

    for (int i = 0; i < 2; ++i) {
        struct moshi_session *sessions[2];
        struct moshi_memory memory;
        const long before = count(TAKEN_BYTES);

        kv_dtype = dtypes[i];
        CHECK(open_slots(2));
        CHECK(moshi_engine_memory(engine, &memory) == MOSHI_OK && memory.session_used_bytes == 0);
        const int pages = engine->lm.kv.cache.pages_per_lane;
        const long fixed = count(TAKEN_BYTES) - before;

        for (int k = 0; k < 2; ++k) {
            CHECK(open_call(SAMPLED, GIVEN, &sessions[k]) == MOSHI_OK);
            CHECK(step_one(sessions[k], 0, 0, NULL) == MOSHI_OK);
        }
        CHECK(pages == 2); /* all of them are there */
        const long taken = count(TAKEN_BYTES) - before;

        CHECK(labs(taken - 2 * (long)memory.session_bytes) < rounding[i]);
        CHECK(moshi_engine_memory(engine, &memory) == MOSHI_OK);
        CHECK(labs(taken - fixed - (long)memory.session_used_bytes) < rounding[i]);
        close_all(sessions, 2);
        CHECK(count(TAKEN_BYTES) - before == fixed);
        close_slots();
        CHECK(count(TAKEN_BYTES) == before);
    }
    kv_dtype = MOSHI_AUTO;
    return 1;
}

/* ---- ticks ------------------------------------------------------------------------------ */

static const int everybody[SLOTS] = {0, 1, 2, 3, 4, 5, 6, 7, 8};

/* What n sessions that begin together cost in each of FRAMES ticks. */
static int count_ticks(enum manner manner, int n, long (*ticks)[EVENTS])
{
    struct moshi_session *sessions[SLOTS];

    for (int i = 0; i < n; ++i) CHECK(open_session(card, engine, manner, &sessions[i]) == MOSHI_OK);
    CHECK(engine->backend->ops->sync(engine->backend) == MOSHI_OK);
    for (int t = 0; t < FRAMES; ++t) {
        look(ticks[t]);
        CHECK(step(sessions, everybody, n, t, NULL) == MOSHI_OK);
        for (int event = 0; event < EVENTS; ++event)
            ticks[t][event] = count(event) - ticks[t][event];
    }
    close_all(sessions, n);
    return 1;
}

static int count_manner(enum manner manner, enum moshi_dtype kv, int most)
{
    long ticks[FRAMES][EVENTS];

    kv_dtype = kv;
    CHECK(open_slots(most));
    kv_dtype = MOSHI_AUTO;
    for (int n = 1; n <= most; n += most - 1) {
        if (!count_ticks(manner, n, ticks)) return 0;
        for (int t = 0; t < FRAMES; ++t) {
            CHECK(ticks[t][REPLAYED] == 1 && ticks[t][FETCHED] == 1);
            /* The second one clears the codecs of those that have begun. */
            CHECK(ticks[t][SENT] <= 1 + (t == 1) && ticks[t][LAUNCHED] <= 1 + (t == 1));
            CHECK(t < 2 || ticks[t][MOVED] == 0);
        }
    }
    return close_slots();
}

static int test_a_tick_costs_the_same_launches_and_copies_for_nine_as_for_one(void)
{
    return count_manner(SAMPLED, MOSHI_AUTO, SLOTS);
}

static int test_a_guided_tick_with_int8_keys_does_too(void)
{
    return count_manner(GUIDED, MOSHI_INT8, 4);
}

/* What is given to one session costs the same, whoever else is open. */
static int test_given_frames_cost_the_same_launches_in_company(void)
{
    struct moshi_session *sessions[SLOTS];
    long alone[EVENTS], together[EVENTS];

    CHECK(open_slots(SLOTS));
    for (int round = 0; round < 2; ++round) {
        const int n = round ? SLOTS : 1;
        long *events = round ? together : alone;

        for (int i = 0; i < n; ++i)
            CHECK(open_session(card, engine, SAMPLED, &sessions[i]) == MOSHI_OK);
        CHECK(give(sessions[0], 4) == MOSHI_OK); /* its first frames are steps */
        look(events);
        CHECK(give(sessions[0], 4) == MOSHI_OK);
        for (int event = 0; event < EVENTS; ++event) events[event] = count(event) - events[event];
        close_all(sessions, n);
    }
    for (int event = LAUNCHED; event <= MOVED; ++event) CHECK(alone[event] == together[event]);
    return close_slots();
}

/* Sessions join and leave between ticks, so that there are always some that begin; twice. Sizes of a
 * tick are few: 4 and 6 rows here, with somebody's voice or without. */
static int test_joins_and_leaves_capture_no_more_than_the_listed_sizes(void)
{
    static const int sizes[] = {5, 6, 4};
    struct moshi_session *sessions[6];
    long events[EVENTS];
    int n = 0;

    CHECK(open_slots(6));
    for (int round = 0; round < 2; ++round) {
        look(events);
        for (int t = 0; t < 3; ++t) {
            const int leaving = n > sizes[t] ? n - sizes[t] + 1 : 0;

            close_all(sessions, leaving);
            memmove(sessions, sessions + leaving, (size_t)(n -= leaving) * sizeof *sessions);
            while (n < sizes[t])
                CHECK(open_session(card, engine, SAMPLED, &sessions[n++]) == MOSHI_OK);
            CHECK(step(sessions, everybody, n, t, NULL) == MOSHI_OK);
        }
        close_all(sessions, n);
        n = 0;
        CHECK(since(events, CAPTURED) <= (round ? 0 : 2 * 2));
    }
    return close_slots();
}

#define COMPANY 8

/* A session talks in a slot among others who come, go and are silent. */
static int talk_in_company(enum manner manner, int slot, struct talk *talk)
{
    struct moshi_session *others[COMPANY] = {NULL}, *batch[COMPANY];

    for (int i = 0; i < COMPANY; ++i)
        CHECK(open_session(card, engine, i == slot ? manner : (enum manner)(i % MANNERS),
                           &others[i]) == MOSHI_OK);
    CHECK(others[slot]->slot == slot);
    for (int t = 0; t < FRAMES; ++t) {
        struct talk *heard[COMPANY] = {NULL};
        int who[COMPANY], n = 0;

        for (int i = 0; i < COMPANY; ++i) {
            if (i != slot && (i + t) % 3 == 0) continue;
            if (i != slot && (i + t) % 3 == 1) {
                moshi_session_destroy(others[i]);
                CHECK(open_session(card, engine, (enum manner)((i + t) % MANNERS), &others[i]) ==
                      MOSHI_OK);
            }
            if (i == slot) heard[n] = talk;
            who[n] = i == slot ? 0 : i;
            batch[n++] = others[i];
        }
        CHECK(step(batch, who, n, t, heard) == MOSHI_OK);
    }
    close_all(others, COMPANY);
    return 1;
}

static int compare_with_company(enum manner manner, enum moshi_dtype kv)
{
    static struct talk alone, together;
    struct moshi_session *session;

    kv_dtype = kv;
    CHECK(open_slots(1));
    CHECK(open_session(card, engine, manner, &session) == MOSHI_OK);
    CHECK(talk_from(session, 0, 0, &alone) == MOSHI_OK);
    moshi_session_destroy(session);
    close_slots();
    CHECK(open_slots(COMPANY));
    kv_dtype = MOSHI_AUTO;
    if (!talk_in_company(manner, 5, &together)) return 0;
    CHECK(same_talk(&alone, &together, 0) && alone.frames[FRAMES - 1].has_output);
    return close_slots();
}

static int test_neighbours_slot_and_occupancy_change_no_bit(void)
{
    return compare_with_company(SAMPLED, MOSHI_AUTO);
}

static int test_nor_with_guidance_and_int8_keys(void)
{
    return compare_with_company(GUIDED, MOSHI_INT8);
}

/* Four sessions, some guided, of which one rests in each tick. */
static int talk_with_rests(struct moshi_model *model, struct talk *talks)
{
    static const enum manner manners[4] = {SAMPLED, GUIDED, GREEDY, GUIDED};
    struct moshi_session *sessions[4], *batch[4];

    CHECK(open_engine(model, 4, &engine) == MOSHI_OK);
    for (int i = 0; i < 4; ++i)
        CHECK(open_session(model, engine, manners[i], &sessions[i]) == MOSHI_OK);
    for (int t = 0; t < FRAMES; ++t) {
        struct talk *heard[4];
        int who[4], n = 0;

        for (int i = 0; i < 4; ++i) {
            if (i == t) continue;
            batch[n] = sessions[i];
            heard[n] = &talks[i];
            who[n++] = i;
        }
        CHECK(step(batch, who, n, t, heard) == MOSHI_OK);
    }
    close_all(sessions, 4);
    return close_slots();
}

static int test_sessions_that_rest_among_guided_ones_say_what_they_say_on_the_cpu(void)
{
    static struct talk here[4], there[4];

    if (!talk_with_rests(cpu, here) || !talk_with_rests(card, there)) return 0;
    for (int i = 0; i < 4; ++i)
        for (int t = 0; t < FRAMES; ++t) CHECK(same_frame(&here[i].frames[t], &there[i].frames[t]));
    return 1;
}

#define CALLERS 4

struct caller {
    struct moshi_session *session;
    int who, status;
    struct talk talk;
};

static void call(void *arg)
{
    struct caller *caller = arg;

    caller->status = MOSHI_OK;
    for (int t = 0; t < 2 && !caller->status; ++t) {
        float pcm[FRAME_SIZE];
        struct moshi_frame *frame = &caller->talk.frames[t];

        make_frame(caller->who, t, pcm);
        *frame = (struct moshi_frame){.pcm = caller->talk.pcm[t]};
        caller->status = moshi_session_step(caller->session, pcm, frame);
    }
}

static int submitted(void)
{
    int n = 0;

    os_mutex_lock(engine->lock);
    for (int slot = 0; slot < CALLERS; ++slot) n += engine->slots[slot]->phase != SESSION_IDLE;
    os_mutex_unlock(engine->lock);
    return n;
}

/* While the card is busy four threads call; what they have submitted meanwhile is stepped together,
 * to the bit as alone. */
static int test_steps_of_several_threads_are_one_tick(void)
{
    static struct caller callers[CALLERS];
    static struct talk expected;
    struct os_thread *threads[CALLERS];
    struct moshi_engine_stats stats;
    long events[EVENTS];

    CHECK(open_slots(CALLERS));
    for (int i = 0; i < CALLERS; ++i) {
        CHECK(open_session(card, engine, SAMPLED, &callers[i].session) == MOSHI_OK);
        callers[i].who = i;
    }
    for (int t = 0; t < 2; ++t) CHECK(step_one(callers[2].session, 2, t, &expected) == MOSHI_OK);
    CHECK(moshi_session_reset(callers[2].session, NULL) == MOSHI_OK);
    CHECK(moshi_engine_get_stats(engine, &stats) == MOSHI_OK);
    const int64_t before = stats.ticks;

    os_mutex_lock(card->backend_lock);
    for (int i = 0; i < CALLERS; ++i)
        CHECK(os_thread_start(&threads[i], call, &callers[i]) == MOSHI_OK);
    while (submitted() < CALLERS) sched_yield();
    look(events);
    os_mutex_unlock(card->backend_lock);
    for (int i = 0; i < CALLERS; ++i) os_thread_join(threads[i]);
    for (int i = 0; i < CALLERS; ++i) CHECK(callers[i].status == MOSHI_OK);
    CHECK(moshi_engine_get_stats(engine, &stats) == MOSHI_OK);
    CHECK(stats.frames == 2 + 2 * CALLERS);
    /* The first frames: those that the engine took before the card was free, and the others. */
    CHECK(stats.ticks - before <= 2 + CALLERS);
    CHECK(since(events, REPLAYED) == stats.ticks - before);
    for (int t = 0; t < 2; ++t)
        CHECK(same_frame(&expected.frames[t], &callers[2].talk.frames[t]) &&
              memcmp(expected.pcm[t], callers[2].talk.pcm[t], sizeof expected.pcm[t]) == 0);
    for (int i = 0; i < CALLERS; ++i) moshi_session_destroy(callers[i].session);
    return close_slots();
}

int main(int argc, char **argv)
{
    const char *path = getenv("MOSHI_C_CUDA_LIBRARY");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;

    if (argc > 1) folder = argv[1];
    if (library) find_shim(library);
    if (!inject || open_model("cpu", MOSHI_AUTO, &cpu) || open_model("cuda", MOSHI_AUTO, &card)) {
        printf("FAIL opening %s: %s\n0 passed, 1 failed\n", folder,
               inject ? moshi_error_detail() : "MOSHI_C_CUDA_LIBRARY names no shim");
        return 1;
    }
#define RUN(test) run_repaired(&#test[5], test)
    RUN(test_a_fork_goes_on_like_a_call_that_was_never_forked);
    RUN(test_a_guided_fork_with_int8_keys_does_too);
    RUN(test_a_fork_copies_little_and_its_first_step_the_page_it_writes);
    RUN(test_memory_goes_back_with_the_last_sharer);
    RUN(test_memory_that_runs_out_in_a_fork_or_at_its_copy_loses_nothing);
    RUN(test_a_snapshot_crosses_in_few_copies_and_goes_on);
    RUN(test_a_snapshot_has_the_bytes_that_the_cpu_makes);
    RUN(test_memory_of_a_session_is_as_computed);
    RUN(test_a_tick_costs_the_same_launches_and_copies_for_nine_as_for_one);
    RUN(test_a_guided_tick_with_int8_keys_does_too);
    RUN(test_given_frames_cost_the_same_launches_in_company);
    RUN(test_joins_and_leaves_capture_no_more_than_the_listed_sizes);
    RUN(test_neighbours_slot_and_occupancy_change_no_bit);
    RUN(test_nor_with_guidance_and_int8_keys);
    RUN(test_sessions_that_rest_among_guided_ones_say_what_they_say_on_the_cpu);
    RUN(test_steps_of_several_threads_are_one_tick);
    moshi_model_close(card);
    moshi_model_close(cpu);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
