/* test_memory.c: memory that runs out while an engine is made, and while a context is read anew, on the
 * packaged tiny model. The backend's blocks, and pages of keys and values, are as many as a test says.
 * usage: test_memory [model folder] */
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/engine.h"
#include "../../csrc/status.h"
#include "harness.h"

#define FRAMES 24
#define SLOTS 3

static struct moshi_model *model;
static struct moshi_engine *engine;

/* ---- memory that runs out --------------------------------------------------------------- */

#define ENOUGH (1 << 20)

static struct backend_ops ops, scarce_ops;
static int blocks_left = ENOUGH, blocks_held;
static int pages_left = ENOUGH; /* atomic: the engine's thread takes them */

static void *count_block(void *memory)
{
    blocks_held += memory != NULL;
    return memory;
}

static void *scarce_allocate(struct backend *backend, size_t bytes)
{
    return blocks_left-- > 0 ? count_block(ops.allocate(backend, bytes)) : NULL;
}

static void *scarce_allocate_pages(struct backend *backend, size_t bytes, size_t page_bytes)
{
    return blocks_left-- > 0 ? count_block(ops.allocate_pages(backend, bytes, page_bytes)) : NULL;
}

static void scarce_release(struct backend *backend, void *memory, size_t bytes)
{
    --blocks_held;
    ops.release(backend, memory, bytes);
}

static void set_pages(int pages)
{
    __atomic_store_n(&pages_left, pages, __ATOMIC_RELAXED);
}

static int scarce_commit(struct backend *backend, void *device, size_t bytes)
{
    if (__atomic_fetch_sub(&pages_left, 1, __ATOMIC_RELAXED) > 0)
        return ops.commit(backend, device, bytes);
    set_pages(0);
    return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a page");
}

static void make_scarce(void)
{
    ops = scarce_ops = *model->backend->ops;
    scarce_ops.allocate = scarce_allocate;
    scarce_ops.allocate_pages = scarce_allocate_pages;
    scarce_ops.release = scarce_release;
    scarce_ops.commit = scarce_commit;
    model->backend->ops = &scarce_ops;
}

/* ---- calls ------------------------------------------------------------------------------ */

static int open_call(int guided, int refreshed, struct moshi_session **session)
{
    struct moshi_session_options options;
    moshi_session_options_init(model, &options);
    options.seed = 100;
    if (guided) options.cfg_coef = 1.7f, options.cfg_masked_until = 2;
    if (refreshed) {
        options.context_policy = MOSHI_CONTEXT_REFRESH;
        options.context_range = 20;
        options.context_keep = 8;
    }
    return moshi_session_create(engine, &options, session);
}

/* Frame t of what every caller says. */
static int step(struct moshi_session *session, int t, struct moshi_frame *frame)
{
    const struct moshi_model_info *info = moshi_model_get_info(model);
    int32_t codes[MOSHI_MAX_CODEBOOKS];
    for (int k = 0; k < info->user_q; ++k) codes[k] = (13 * t + 7 * k) % info->card;
    *frame = (struct moshi_frame){.index = -1};
    return moshi_session_step_codes(session, codes, frame);
}

static int step_to(struct moshi_session *session, int first, int end, struct moshi_frame *frames)
{
    int status = MOSHI_OK;
    for (int t = first; t < end && !status; ++t) status = step(session, t, &frames[t]);
    return status;
}

static int same(const struct moshi_frame *a, const struct moshi_frame *b, int first)
{
    for (int t = first; t < FRAMES; ++t)
        if (a[t].index != t || b[t].index != t || a[t].event != b[t].event ||
            a[t].text_token != b[t].text_token || a[t].n_codes != b[t].n_codes ||
            memcmp(a[t].codes, b[t].codes, (size_t)a[t].n_codes * sizeof *a->codes))
            return 0;
    return 1;
}

/* A call that always finds memory, and its first frame in a new context. */
static int make_expected(int guided, int refreshed, struct moshi_frame *frames, int *renewed)
{
    struct moshi_session *session;
    int ends = 0;
    CHECK(open_call(guided, refreshed, &session) == MOSHI_OK);
    CHECK(step_to(session, 0, FRAMES, frames) == MOSHI_OK);
    moshi_session_destroy(session);
    for (int t = 0; t < FRAMES; ++t)
        if (frames[t].event == MOSHI_EVENT_REFRESH_END) ++ends, *renewed = t;
    CHECK(ends == refreshed && *renewed < FRAMES - 2);
    return 1;
}

/* From here on a page that is needed is one too many: sessions that end give theirs back. */
static int end_memory(void)
{
    struct moshi_session *session;
    CHECK(open_call(0, 0, &session) == MOSHI_OK);
    moshi_session_destroy(session);
    set_pages(0);
    return 1;
}

/* The passes that the engine makes beside the steps are done. */
static void wait_for_passes(const struct moshi_session *session)
{
    for (int more = 1; more; sched_yield()) {
        os_mutex_lock(model->backend_lock);
        more = refresh_has_more(session->refresh);
        os_mutex_unlock(model->backend_lock);
    }
}

/* ---- tests ------------------------------------------------------------------------------ */

/* Whichever block it is that cannot be had. */
static int test_an_engine_or_stream_without_memory_is_refused_and_keeps_none(void)
{
    const struct moshi_engine_options capacity = {.max_sessions = SLOTS};
    struct moshi_engine *other = NULL;
    struct mimi_stream *stream = NULL;
    const int held = blocks_held;
    int blocks = 0, status;
    for (blocks_left = 0; (status = moshi_engine_create(model, &capacity, &other));
         blocks_left = ++blocks)
        CHECK(status == MOSHI_ERROR_MEMORY && !other && blocks_held == held && blocks < ENOUGH);
    CHECK(blocks > 50 && blocks_held == held + blocks);
    blocks = 0;
    for (blocks_left = 0; (status = mimi_stream_create(other, 1, &stream)); blocks_left = ++blocks)
        CHECK(status == MOSHI_ERROR_MEMORY && !stream && blocks < ENOUGH);
    CHECK(blocks > 20);
    blocks_left = ENOUGH;
    mimi_stream_destroy(stream);
    moshi_engine_destroy(other);
    CHECK(blocks_held == held);
    return 1;
}

static struct moshi_frame expected[FRAMES], neighbour[FRAMES];

static int test_a_refresh_without_memory_refuses_its_frame_and_no_other(void)
{
    static struct moshi_frame found[FRAMES], other[FRAMES];
    struct moshi_session *session, *beside;
    int renewed = 0;
    CHECK(make_expected(0, 0, neighbour, &renewed) && make_expected(0, 1, expected, &renewed));
    CHECK(open_call(0, 1, &session) == MOSHI_OK && open_call(0, 0, &beside) == MOSHI_OK);
    for (int t = 0; t < renewed; ++t) {
        CHECK(step(session, t, &found[t]) == MOSHI_OK && step(beside, t, &other[t]) == MOSHI_OK);
        set_pages(0);
    }
    for (int i = 0; i < 2; ++i) {
        CHECK(step(session, renewed, &found[renewed]) == MOSHI_ERROR_MEMORY);
        CHECK(strstr(moshi_error_detail(), "no memory for a page"));
    }
    CHECK(step_to(beside, renewed, FRAMES, other) == MOSHI_OK);
    set_pages(ENOUGH);
    CHECK(step_to(session, renewed, FRAMES, found) == MOSHI_OK);
    CHECK(same(expected, found, 0) && same(neighbour, other, 0));
    moshi_session_destroy(session);
    moshi_session_destroy(beside);
    return 1;
}

/* The new context is read; the page that the frame writes to is a fork's, too. */
static int test_a_frame_that_finds_no_memory_after_its_refresh_comes_again(void)
{
    static struct moshi_frame found[FRAMES], forked[FRAMES];
    struct moshi_session *session, *fork;
    int renewed = 0;
    CHECK(make_expected(0, 1, expected, &renewed));
    CHECK(open_call(0, 1, &session) == MOSHI_OK);
    CHECK(step_to(session, 0, renewed, found) == MOSHI_OK);
    wait_for_passes(session);
    CHECK(moshi_session_fork(session, NULL, &fork) == MOSHI_OK && end_memory());
    for (int i = 0; i < 2; ++i)
        CHECK(step(session, renewed, &found[renewed]) == MOSHI_ERROR_MEMORY);
    CHECK(session->refresh->renewed && !session->refresh->state.left);
    set_pages(ENOUGH);
    CHECK(step_to(session, renewed, FRAMES, found) == MOSHI_OK && same(expected, found, 0));
    CHECK(step_to(fork, renewed, FRAMES, forked) == MOSHI_OK && same(expected, forked, renewed));
    moshi_session_destroy(session);
    moshi_session_destroy(fork);
    return 1;
}

/* Its old context is given up before the new one is read. The fork has the pages that it had. */
static int test_a_guided_refresh_without_memory_ends_its_session_alone(void)
{
    static struct moshi_frame found[FRAMES], forked[FRAMES];
    struct moshi_session *session, *fork;
    int renewed = 0;
    CHECK(make_expected(1, 1, expected, &renewed));
    CHECK(open_call(1, 1, &session) == MOSHI_OK);
    CHECK(step_to(session, 0, renewed, found) == MOSHI_OK);
    CHECK(moshi_session_fork(session, NULL, &fork) == MOSHI_OK && end_memory());
    CHECK(step(session, renewed, &found[renewed]) == MOSHI_ERROR_MEMORY);
    set_pages(ENOUGH);
    CHECK(step(session, renewed, &found[renewed]) == MOSHI_ERROR_SESSION);
    CHECK(strstr(moshi_error_detail(), "no memory for a page"));
    CHECK(step_to(fork, renewed, FRAMES, forked) == MOSHI_OK && same(expected, forked, renewed));
    moshi_session_destroy(session);
    moshi_session_destroy(fork);
    return 1;
}

static int test_given_frames_whose_refresh_finds_no_memory_end_their_session_alone(void)
{
    static struct moshi_frame found[FRAMES], other[FRAMES];
    const struct moshi_model_info *info = moshi_model_get_info(model);
    static int32_t text[FRAMES], codes[FRAMES * MOSHI_MAX_CODEBOOKS];
    struct moshi_session *session, *beside;
    int renewed = 0;
    for (int t = 0; t < FRAMES; ++t) text[t] = 5 + t;
    for (int i = 0; i < FRAMES * MOSHI_MAX_CODEBOOKS; ++i) codes[i] = 11 * i % info->card;
    CHECK(make_expected(0, 0, neighbour, &renewed));
    CHECK(open_call(0, 1, &session) == MOSHI_OK && open_call(0, 0, &beside) == MOSHI_OK);
    CHECK(step(beside, 0, &other[0]) == MOSHI_OK);
    set_pages(0); /* the frames themselves have a page since the call was opened */
    CHECK(moshi_session_prefill(session, FRAMES, text, codes, codes, NULL) == MOSHI_ERROR_MEMORY);
    CHECK(step_to(beside, 1, FRAMES, other) == MOSHI_OK && same(neighbour, other, 0));
    set_pages(ENOUGH);
    CHECK(step(session, FRAMES, &found[0]) == MOSHI_ERROR_SESSION);
    moshi_session_destroy(session);
    moshi_session_destroy(beside);
    return 1;
}

int main(int argc, char **argv)
{
    struct moshi_model_options options = {.folder = argc > 1 ? argv[1] : "moshi_c/data/moshi-tiny",
                                          .threads = 1};
    struct moshi_engine_options capacity = {.max_sessions = SLOTS};
    int status = moshi_model_open(&options, &model);
    if (!status) make_scarce();
    if (!status) status = moshi_engine_create(model, &capacity, &engine);
    if (status) {
        printf("FAIL opening %s: %s\n0 passed, 1 failed\n", options.folder, moshi_error_detail());
        return 1;
    }
#define RUN(test) set_pages(ENOUGH), run(&#test[5], test)
    RUN(test_an_engine_or_stream_without_memory_is_refused_and_keeps_none);
    RUN(test_a_refresh_without_memory_refuses_its_frame_and_no_other);
    RUN(test_a_frame_that_finds_no_memory_after_its_refresh_comes_again);
    RUN(test_a_guided_refresh_without_memory_ends_its_session_alone);
    RUN(test_given_frames_whose_refresh_finds_no_memory_end_their_session_alone);
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
