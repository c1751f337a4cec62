/* prefill.c: frames of which every token is given, in passes of many frames instead of steps.
 *
 * Tokens are given frame by frame as a recording has them: what belongs to one moment stands in one
 * column. The model stores a stream that is late by d frames d steps after its moment. So the last
 * codes of such a stream are stored by steps still to come, which are forced to them; and in the
 * first steps its codes are those of frames from before, which earlier forcing may know. A step that
 * has to choose a token is an ordinary one; at a conversation's beginning nothing reads what it would
 * choose. */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "snapshot.h"
#include "status.h"

/* With other sessions open a pass takes about this long, so that their steps have the time of most
 * of a frame left. */
#define PASS_SECONDS 0.02
#define FIRST_PASS 4 /* frames, before it is known how long they take */

struct prefill {
    struct moshi_session *session;
    int frames;
    const int32_t *text, *codes, *user_codes;
    int32_t *copy; /* of these, which is what is checked: a caller's arrays may change meanwhile */
    /* What each step stores, TOKEN_FREE where it has to choose; next_steps more than frames. */
    int32_t *stored_text; /* [steps] */
    int32_t *stored_audio; /* [steps][dep_q] */
    int32_t *user; /* [frames][user_q] */
    int32_t *output; /* [rows of a pass][1 + dep_q] */
    int32_t *read; /* [rows of a pass][streams] of a session that may read it again, or NULL */
    int32_t *said; /* [frames] or NULL */
};

/* Everything given, in memory of ours. */
static int take_given(struct prefill *given)
{
    const struct moshi_model_info *info = &given->session->engine->model->info;
    const size_t n = (size_t)given->frames, dep_q = (size_t)info->dep_q;
    const size_t user_q = (size_t)info->user_q;
    int32_t *copy = malloc((n * (1 + dep_q + user_q) + 1) * sizeof *copy);
    if (!copy)
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %d given frames", given->frames);
    if (n) memcpy(copy, given->text, n * sizeof *copy);
    if (n && dep_q) memcpy(copy + n, given->codes, n * dep_q * sizeof *copy);
    if (n && user_q) memcpy(copy + n * (1 + dep_q), given->user_codes, n * user_q * sizeof *copy);
    given->copy = copy;
    given->text = copy;
    given->codes = copy + n;
    given->user_codes = copy + n * (1 + dep_q);
    return MOSHI_OK;
}

static int check_given(struct prefill *given)
{
    const struct moshi_session *session = given->session;
    const struct moshi_model_info *info = &session->engine->model->info;
    const int frames = given->frames;
    if (frames < 0 || frames > MAX_FRAMES - session->index)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "%d frames given, expected 0 to %lld", frames,
                          (long long)(MAX_FRAMES - session->index));
    if (!given->text || (info->dep_q && !given->codes) || (info->user_q && !given->user_codes))
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "tokens of some streams are missing, expected those of all: frames that "
                          "are given in part have to be stepped");
    int taken = take_given(given);
    if (taken) return taken;
    for (int t = 0; t < frames; ++t) {
        int status = session_check_text(session, given->text[t]);
        for (int k = 0; k < info->dep_q && !status; ++k)
            status = session_check_code(session, k, given->codes[(int64_t)k * frames + t]);
        for (int k = 0; k < info->user_q && !status; ++k) {
            int32_t code = given->user_codes[(int64_t)k * frames + t];
            if (code < 0 || code > info->card)
                status = moshi_fail(MOSHI_ERROR_AUDIO, "user code %d is %d, expected 0 to %d", k,
                                    code, info->card);
        }
        if (status) return status;
    }
    return MOSHI_OK;
}

/* What step t stores in stream s, 0 being the text. */
static int32_t stored_token(const struct prefill *given, int t, int s)
{
    const struct moshi_session *session = given->session;
    const int dep_q = session->engine->dep_q;
    const int frame = t - moshi_model_delays(session->engine->model)[s];
    int32_t token = TOKEN_FREE;
    if (frame >= given->frames) return TOKEN_FREE;
    if (frame >= 0)
        return s ? given->codes[(int64_t)(s - 1) * given->frames + frame] : given->text[frame];
    if (t < session->next_steps)
        token = s ? session->next_audio[t * dep_q + s - 1] : session->next_text[t];
    /* Before the first frame there is nothing: no step reads this. */
    const int unread = session->index == 0 && session->options.start == MOSHI_START_LIVE;
    return unread && token == TOKEN_FREE ? 0 : token;
}

static int arrange(struct prefill *given)
{
    const struct moshi_session *session = given->session;
    const size_t frames = (size_t)given->frames, steps = frames + (size_t)session->next_steps;
    const size_t dep_q = (size_t)session->engine->dep_q, user_q = (size_t)session->engine->user_q;
    given->stored_text = malloc(steps * sizeof *given->stored_text);
    given->stored_audio = malloc(steps * (dep_q + 1) * sizeof *given->stored_audio);
    given->user = malloc((frames + 1) * (user_q + 1) * sizeof *given->user);
    const size_t rows = (size_t)session->engine->lm.given_rows, streams = 1 + dep_q + user_q;
    given->output = malloc(rows * (1 + dep_q) * sizeof *given->output);
    if (session->refresh) given->read = malloc(rows * streams * sizeof *given->read);
    if (!given->stored_text || !given->stored_audio || !given->user || !given->output ||
        (session->refresh && !given->read))
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %d given frames", given->frames);
    for (size_t t = 0; t < steps; ++t) {
        given->stored_text[t] = stored_token(given, (int)t, 0);
        for (size_t k = 0; k < dep_q; ++k)
            given->stored_audio[t * dep_q + k] = stored_token(given, (int)t, 1 + (int)k);
    }
    for (size_t t = 0; t < frames; ++t)
        for (size_t k = 0; k < user_q; ++k)
            given->user[t * user_q + k] = given->user_codes[k * frames + t];
    return MOSHI_OK;
}

/* How many frames have to be stepped until nothing is left to choose. */
static int steps_first(const struct prefill *given)
{
    const struct moshi_session *session = given->session;
    const int dep_q = session->engine->dep_q;
    if (session->index == 0 && session->options.start == MOSHI_START_OFFLINE)
        return given->frames < session->next_steps ? given->frames : session->next_steps;
    for (int t = given->frames; t > 0; --t) {
        if (given->stored_text[t - 1] == TOKEN_FREE) return t;
        for (int k = 0; k < dep_q; ++k)
            if (given->stored_audio[(t - 1) * dep_q + k] == TOKEN_FREE) return t;
    }
    return 0;
}

/* The next steps store what steps first.. of the given frames do. */
static void force_from(const struct prefill *given, int first)
{
    struct moshi_session *session = given->session;
    const size_t steps = (size_t)session->next_steps, dep_q = (size_t)session->engine->dep_q;
    memcpy(session->next_text, given->stored_text + first, steps * sizeof *session->next_text);
    memcpy(session->next_audio, given->stored_audio + (size_t)first * dep_q,
           steps * dep_q * sizeof *session->next_audio);
}

static int step_one(const struct prefill *given, int t)
{
    struct moshi_session *session = given->session;
    struct moshi_frame frame = {0};
    force_from(given, t);
    int status = session_step_entered(session,
                                      given->user + (size_t)t * (size_t)session->engine->user_q,
                                      &frame);
    if (status) session_end(session, status);
    if (!status && given->said) given->said[t] = frame.text_token;
    return status;
}

/* One pass over `count` frames. */
static int pass(const struct prefill *given, int t, int count)
{
    struct moshi_session *session = given->session;
    struct moshi_engine *engine = session->engine;
    const size_t dep_q = (size_t)engine->dep_q, first = (size_t)t;
    engine_upload_params(engine, session);
    /* A context that is being read would end where these frames begin. */
    if (session->refresh) session->refresh->state.left = session->refresh->state.quiet = 0;
    int status = lm_step_given(
        &engine->lm, &(struct lm_given){.slot = session->slot,
                                        .guided = session_is_guided(session),
                                        .frames = count,
                                        .text = given->stored_text + first,
                                        .audio = given->stored_audio + first * dep_q,
                                        .user = given->user + first * (size_t)engine->user_q,
                                        .output = given->output,
                                        .read = given->read});
    if (!status && session->refresh)
        refresh_record(session->refresh, count,
                       (const int32_t *const[2]){given->read,
                                                 given->read + count * engine->lm.delay.streams});
    for (int i = 0; i < count && !status && given->said; ++i) {
        int32_t token = given->output[(size_t)i * (1 + dep_q)];
        given->said[t + i] = token == TOKEN_NONE ? -1 : token;
    }
    if (!status) session->index += count;
    return status;
}

/* Frames t.. to the last. */
static int pass_all(const struct prefill *given, int t)
{
    struct moshi_session *session = given->session;
    struct moshi_engine *engine = session->engine;
    struct os_mutex *lock = engine->model->backend_lock;
    int status = MOSHI_OK, most = FIRST_PASS;
    while (t < given->frames && !status) {
        const int shared = engine_is_shared(engine, session);
        if (shared) engine_give_way(engine);
        os_mutex_lock(lock);
        int count = lm_given_room(&engine->lm, session->slot, session_is_guided(session));
        if (shared && count > most) count = most;
        if (count > given->frames - t) count = given->frames - t;
        const double start = os_clock();
        status = pass(given, t, count);
        const double frame_s = (os_clock() - start) / count;
        os_mutex_unlock(lock);
        const double fit = PASS_SECONDS / frame_s;
        most = fit > engine->lm.given_rows ? engine->lm.given_rows : fit > 1 ? (int)fit : 1;
        t += count;
    }
    if (status) session_end(session, status);
    return status;
}

/* Frames were given up to where there is no time to wait for a pause: the context is read anew at
 * once. */
static int refresh_at_once(struct moshi_session *session)
{
    struct moshi_engine *engine = session->engine;
    struct refresh *refresh = session->refresh;
    struct os_mutex *lock = engine->model->backend_lock;
    if (!refresh_is_due(refresh, engine->lm.positions[session->slot])) return MOSHI_OK;
    int status = MOSHI_OK;
    for (int begun = 0, more = 1; more && !status; begun = 1) {
        engine_give_way(engine);
        os_mutex_lock(lock);
        if (!begun) refresh_begin(refresh);
        status = refresh_pass(refresh, &engine->lm, session->slot);
        more = refresh_has_more(refresh);
        if (!more && !status) status = refresh_end(refresh, &engine->lm, session->slot);
        os_mutex_unlock(lock);
    }
    if (status) session_end(session, status);
    return status;
}

int moshi_session_prefill(struct moshi_session *session, int frames, const int32_t *text_tokens,
                          const int32_t *codes, const int32_t *user_codes, int32_t *said)
{
    int status = session_enter(session);
    if (status) return status;
    struct prefill given = {.session = session,
                            .frames = frames,
                            .text = text_tokens,
                            .codes = codes,
                            .user_codes = user_codes,
                            .said = said};
    status = check_given(&given);
    if (!status && frames) {
        status = arrange(&given);
        const int first = status ? 0 : steps_first(&given);
        for (int t = 0; t < first && !status; ++t) status = step_one(&given, t);
        if (!status) {
            session->has_logits = 0;
            status = pass_all(&given, first);
        }
        if (!status) force_from(&given, frames);
        if (!status && session->refresh) status = refresh_at_once(session);
    }
    free(given.copy);
    free(given.stored_text);
    free(given.stored_audio);
    free(given.user);
    free(given.output);
    free(given.read);
    session_leave(session);
    return status;
}
