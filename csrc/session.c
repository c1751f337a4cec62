/* session.c: one conversation: checks at the public edge, submit and wait, forced text, logits. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "status.h"

void moshi_session_options_init(const struct moshi_model *model,
                                struct moshi_session_options *options)
{
    const struct moshi_model_info *info = &model->info;
    memset(options, 0, sizeof *options);
    options->text_temperature = info->text_temperature;
    options->audio_temperature = info->audio_temperature;
    options->text_top_k = info->text_top_k;
    options->audio_top_k = info->audio_top_k;
    options->cfg_coef = 1.0f;
    options->cfg_masked_until = -1;
}

static int check_options(const struct moshi_model *model,
                         const struct moshi_session_options *options)
{
    const struct {
        const char *name;
        float value;
    } floats[] = {{"text_temperature", options->text_temperature},
                  {"audio_temperature", options->audio_temperature},
                  {"cfg_coef", options->cfg_coef}};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; ++i)
        if (!isfinite(floats[i].value))
            return moshi_fail(MOSHI_ERROR_ARGUMENT, "%s is %f, expected a finite number",
                              floats[i].name, (double)floats[i].value);
    if (!model->info.has_lm)
        return moshi_fail(MOSHI_ERROR_SESSION,
                          "this model is a codec alone; a session needs a language model");
    if (options->n_conditions < 0 || options->n_null_conditions < 0)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "%d and %d conditions given, expected 0 or more",
                          options->n_conditions, options->n_null_conditions);
    if (options->cfg_masked_until < -1)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "cfg_masked_until is %d, expected -1 (off) or more",
                          options->cfg_masked_until);
    if (options->context_policy != MOSHI_CONTEXT_RING &&
        options->context_policy != MOSHI_CONTEXT_REFRESH)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "context_policy is %d, expected ring or refresh",
                          (int)options->context_policy);
    if (options->context_range < 0 || options->context_keep < 0)
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "context_range is %d and context_keep %d, expected 0 or more",
                          options->context_range, options->context_keep);
    if (options->cfg_coef != 1.0f && !model->info.has_conditions && !options->cfg_no_text &&
        options->cfg_masked_until < 0)
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "cfg_coef is %g, but this model has no conditions and neither "
                          "cfg_masked_until nor cfg_no_text is given: both halves would be equal",
                          (double)options->cfg_coef);
    return MOSHI_OK;
}

static void set_seed(struct moshi_session *session, uint64_t seed)
{
    session->options.seed = seed;
    session->params.seed[0] = (uint32_t)seed;
    session->params.seed[1] = (uint32_t)(seed >> 32);
}

void session_free_next(struct moshi_session *session, int first_step)
{
    const int dep_q = session->engine->dep_q;
    for (int i = first_step; i < session->next_steps; ++i) session->next_text[i] = TOKEN_FREE;
    for (int i = first_step * dep_q; i < session->next_steps * dep_q; ++i)
        session->next_audio[i] = TOKEN_FREE;
}

void session_fail(struct moshi_session *session, int status)
{
    session->status = status;
    snprintf(session->sentence, sizeof session->sentence, "%s", moshi_error_detail());
}

void session_end(struct moshi_session *session, int status)
{
    session_fail(session, status);
    session->dead = 1;
}

static void clear_forcing(struct moshi_session *session)
{
    session->forced_first = session->forced_end = 0;
    session_free_next(session, 0);
}

/* Under the backend lock. */
static void reset_slot(struct moshi_session *session)
{
    struct moshi_engine *engine = session->engine;
    const int slot = session->slot;
    lm_state_reset(&engine->lm, slot);
    if (engine->mimi.backend) mimi_state_reset(&engine->mimi, slot);
    if (session->condition) {
        const size_t width = (size_t)engine->model->lm.config.temporal.dim;
        for (int half = 0; half < 2; ++half)
            engine->backend->ops->upload(
                engine->backend,
                engine->lm.condition + (size_t)(half * engine->max_sessions + slot) * width,
                session->condition + (size_t)half * width, width * sizeof(float));
    }
    session->index = 0;
    session->has_logits = 0;
    if (session->refresh) refresh_reset(session->refresh);
    clear_forcing(session);
}

static int create_refresh(struct moshi_session *session)
{
    struct moshi_session_options *options = &session->options;
    const struct lm_state *lm = &session->engine->lm;
    if (options->context_policy == MOSHI_CONTEXT_RING) {
        if (!options->context_range) options->context_range = lm->lm->config.temporal.context;
        return MOSHI_OK;
    }
    int status = refresh_create(&lm->lm->config, lm->context, options->context_range,
                                options->context_keep, session_is_guided(session),
                                &session->refresh);
    if (status) return status;
    options->context_range = session->refresh->state.range;
    options->context_keep = session->refresh->state.keep;
    return MOSHI_OK;
}

static int create_buffers(struct moshi_session *session, const struct moshi_model *model,
                          const struct moshi_session_options *options)
{
    const struct moshi_model_info *info = &model->info;
    session->next_steps = info->max_delay > 1 ? info->max_delay : 1;
    session->pcm = calloc((size_t)info->frame_size, sizeof *session->pcm);
    session->next_text = calloc((size_t)session->next_steps, sizeof *session->next_text);
    session->next_audio = calloc((size_t)session->next_steps * (size_t)(info->dep_q + 1),
                                 sizeof *session->next_audio);
    int failed = !session->pcm || !session->next_text || !session->next_audio;
    if (options->keep_logits) {
        size_t logits = (size_t)info->text_card + (size_t)info->dep_q * (size_t)info->card;
        session->logits = calloc(logits, sizeof *session->logits);
        failed |= !session->logits;
    }
    if (info->has_conditions) {
        const size_t width = (size_t)model->lm.config.temporal.dim;
        session->condition = calloc(2 * width, sizeof *session->condition);
        failed |= !session->condition;
    }
    if (failed) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a session");
    if (!session->condition) {
        /* Any name is one the model doesn't know. */
        if (options->n_conditions)
            return lm_condition_sum(&model->lm, options->conditions, options->n_conditions, NULL);
        if (options->n_null_conditions)
            return lm_condition_sum(&model->lm, options->null_conditions,
                                    options->n_null_conditions, NULL);
        return MOSHI_OK;
    }
    const size_t width = (size_t)model->lm.config.temporal.dim;
    int status = lm_condition_sum(&model->lm, options->conditions, options->n_conditions,
                                  session->condition);
    if (!status)
        status = lm_condition_sum(&model->lm, options->null_conditions, options->n_null_conditions,
                                  session->condition + width);
    return status;
}

static void free_session(struct moshi_session *session)
{
    free(session->pcm);
    free(session->next_text);
    free(session->next_audio);
    free(session->logits);
    free(session->condition);
    free(session->forced);
    refresh_destroy(session->refresh);
    os_event_destroy(session->event);
    free(session);
}

/* A session with its buffers and without a slot; its conditions are those of the options. */
static int new_session(struct moshi_engine *engine, const struct moshi_session_options *options,
                       struct moshi_session **result)
{
    *result = NULL;
    int status = model_check_process(engine->model);
    if (!status) status = check_options(engine->model, options);
    if (status) return status;
    struct moshi_session *session = calloc(1, sizeof *session);
    if (!session) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a session");
    session->engine = engine;
    session->slot = -1;
    session->options = *options;
    session->options.conditions = session->options.null_conditions = NULL;
    session->options.n_conditions = session->options.n_null_conditions = 0;
    struct slot_params *params = &session->params;
    params->temperature[0] = options->text_temperature;
    params->temperature[1] = options->audio_temperature;
    params->top_k[0] = options->text_top_k;
    params->top_k[1] = options->audio_top_k;
    params->cfg_coef = options->cfg_coef;
    params->cfg_no_text = options->cfg_no_text;
    params->cfg_masked_until = options->cfg_masked_until;
    set_seed(session, options->seed);
    status = create_buffers(session, engine->model, options);
    if (!status) status = create_refresh(session);
    if (status) {
        free_session(session);
        return status;
    }
    clear_forcing(session);
    *result = session;
    return MOSHI_OK;
}

/* Gives it a free slot, in the state of a conversation that has not begun. */
static int take_slot(struct moshi_session *session)
{
    struct moshi_engine *engine = session->engine;
    int status = MOSHI_OK;
    os_mutex_lock(engine->model->backend_lock);
    os_mutex_lock(engine->lock);
    for (int slot = 0; slot < engine->max_sessions && session->slot < 0; ++slot)
        if (!engine->slots[slot]) session->slot = slot;
    os_mutex_unlock(engine->lock);
    if (session->slot >= 0) {
        reset_slot(session);
        /* Without memory for a first frame it is refused now. */
        status = lm_step_room(&engine->lm, session->slot, session_is_guided(session));
        if (status) lm_state_reset(&engine->lm, session->slot);
        os_mutex_lock(engine->lock);
        if (!status) engine->slots[session->slot] = session;
        os_mutex_unlock(engine->lock);
    }
    os_mutex_unlock(engine->model->backend_lock);
    if (status) {
        session->slot = -1;
        return status;
    }
    if (session->slot < 0)
        return moshi_fail(
            MOSHI_ERROR_SESSION,
            "all %d sessions of this model are open: close one, or open the model with "
            "a larger max_sessions",
            engine->max_sessions);
    return MOSHI_OK;
}

int moshi_session_create(struct moshi_engine *engine, const struct moshi_session_options *options,
                         struct moshi_session **result)
{
    *result = NULL;
    struct moshi_session_options defaults;
    if (!options) {
        moshi_session_options_init(engine->model, &defaults);
        options = &defaults;
    }
    struct moshi_session *session;
    int status = new_session(engine, options, &session);
    if (!status) status = take_slot(session);
    if (status) {
        moshi_session_destroy(session);
        return status;
    }
    *result = session;
    return MOSHI_OK;
}

void moshi_session_destroy(struct moshi_session *session)
{
    if (!session) return;
    struct moshi_engine *engine = session->slot >= 0 ? session->engine : NULL;
    if (engine && model_check_process(engine->model)) return;
    if (engine) {
        /* A frame that was submitted and not waited for: the tick must be done with it. */
        os_mutex_lock(engine->lock);
        if (session->phase == SESSION_SUBMITTED) session->phase = SESSION_IDLE;
        while (session->phase == SESSION_RUNNING) os_condition_wait(engine->done, engine->lock);
        os_mutex_unlock(engine->lock);
        os_mutex_lock(engine->model->backend_lock);
        os_mutex_lock(engine->lock);
        engine->slots[session->slot] = NULL;
        __atomic_store_n(&engine->renewing[session->slot], 0, __ATOMIC_RELAXED);
        os_mutex_unlock(engine->lock);
        lm_state_reset(&engine->lm, session->slot); /* gives the pages back */
        if (engine->mimi.backend) mimi_state_reset(&engine->mimi, session->slot);
        os_mutex_unlock(engine->model->backend_lock);
    }
    free_session(session);
}

uint64_t moshi_session_seed(const struct moshi_session *session)
{
    return session->options.seed;
}

/* ---- submit and wait -------------------------------------------------------------------- */

/* One caller at a time: the second gets an error at once. */
int session_enter(struct moshi_session *session)
{
    int status = session->engine ? model_check_process(session->engine->model) : MOSHI_OK;
    if (status) return status;
    if (__atomic_exchange_n(&session->busy, 1u, __ATOMIC_ACQUIRE))
        return moshi_fail(MOSHI_ERROR_SESSION,
                          "the session is in use by another thread; one step at a time");
    if (!session->engine)
        status = moshi_fail(MOSHI_ERROR_SESSION, "the session's engine was closed");
    else if (session->dead)
        status = moshi_fail(MOSHI_ERROR_SESSION, "the session ended with an error: %s",
                            session->sentence);
    if (status) __atomic_store_n(&session->busy, 0u, __ATOMIC_RELEASE);
    return status;
}

void session_leave(struct moshi_session *session)
{
    __atomic_store_n(&session->busy, 0u, __ATOMIC_RELEASE);
}

static int take_pcm(struct moshi_session *session, const float *pcm, struct moshi_frame *frame)
{
    const struct moshi_model_info *info = &session->engine->model->info;
    if (!info->has_mimi)
        return moshi_fail(
            MOSHI_ERROR_SESSION,
            "the model was opened without a codec: step by codes, or name a Mimi file");
    /* What is checked is the copy: the caller's buffer may change meanwhile. */
    memcpy(session->pcm, pcm, (size_t)info->frame_size * sizeof *pcm);
    int status = check_samples(session->pcm, (size_t)info->frame_size);
    if (status) return status;
    double energy = 0;
    for (int i = 0; i < info->frame_size; ++i) {
        float sample = session->pcm[i];
        energy += (double)sample * (double)sample;
    }
    double rms = sqrt(energy / info->frame_size);
    frame->level_db = rms > 1e-6 ? (float)(20 * log10(rms)) : -120.0f;
    session->has_pcm = 1;
    return MOSHI_OK;
}

static int take_codes(struct moshi_session *session, const int32_t *codes,
                      struct moshi_frame *frame)
{
    const struct moshi_model_info *info = &session->engine->model->info;
    memcpy(session->user_codes, codes, (size_t)info->user_q * sizeof *codes);
    for (int k = 0; k < info->user_q; ++k)
        if (session->user_codes[k] < 0 || session->user_codes[k] > info->card)
            return moshi_fail(MOSHI_ERROR_AUDIO, "code %d is %d, expected 0 to %d", k,
                              session->user_codes[k], info->card);
    frame->level_db = -120.0f;
    session->has_pcm = 0;
    return MOSHI_OK;
}

/* The session must be entered; leaves it on failure. */
static int take_input(struct moshi_session *session, const float *pcm, const int32_t *codes,
                      struct moshi_frame *frame)
{
    session->frame = frame;
    if (!pcm && !codes)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "no samples were given, expected one frame");
    return pcm ? take_pcm(session, pcm, frame) : take_codes(session, codes, frame);
}

static void submit(struct moshi_session *session, double now)
{
    session->submitted_s = now;
    session->status = MOSHI_OK;
    session->phase = SESSION_SUBMITTED;
    ++session->engine->pending;
}

int moshi_sessions_step(struct moshi_session *const *sessions, int count, const float *const *pcms,
                        const int32_t *const *codes, struct moshi_frame *frames)
{
    if (count < 1 || !pcms == !codes)
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "%d sessions given, expected one or more with samples or codes", count);
    int entered = 0, status = MOSHI_OK;
    for (; entered < count; ++entered) {
        status = session_enter(sessions[entered]);
        if (status) break;
        if (sessions[entered]->engine != sessions[0]->engine) {
            session_leave(sessions[entered]);
            status = moshi_fail(MOSHI_ERROR_ARGUMENT,
                                "session %d belongs to another model than session 0", entered);
            break;
        }
    }
    for (int i = 0; i < count && !status; ++i)
        status = take_input(sessions[i], pcms ? pcms[i] : NULL, codes ? codes[i] : NULL,
                            &frames[i]);
    if (status) {
        for (int i = 0; i < entered; ++i) session_leave(sessions[i]);
        return status;
    }
    struct moshi_engine *engine = sessions[0]->engine;
    double now = os_clock();
    os_mutex_lock(engine->lock);
    for (int i = 0; i < count; ++i) submit(sessions[i], now);
    os_condition_wake_all(engine->submitted);
    os_mutex_unlock(engine->lock);
    for (int i = 0; i < count; ++i) {
        int one = moshi_session_wait(sessions[i]);
        if (one && !status) status = one;
    }
    return status;
}

int moshi_session_submit(struct moshi_session *session, const float *pcm, struct moshi_frame *frame)
{
    int status = session_enter(session);
    if (status) return status;
    status = take_input(session, pcm, NULL, frame);
    if (status) {
        session_leave(session);
        return status;
    }
    struct moshi_engine *engine = session->engine;
    os_mutex_lock(engine->lock);
    submit(session, os_clock());
    os_condition_wake_all(engine->submitted);
    os_mutex_unlock(engine->lock);
    return MOSHI_OK;
}

int moshi_session_ready(struct moshi_session *session)
{
    struct moshi_engine *engine = session->engine;
    if (!engine || model_check_process(engine->model)) return 1;
    os_mutex_lock(engine->lock);
    int ready = session->phase == SESSION_DONE || session->phase == SESSION_IDLE;
    os_mutex_unlock(engine->lock);
    return ready;
}

/* Until the frame is done, which may be there already. */
static int await(struct moshi_session *session, int *submitted)
{
    struct moshi_engine *engine = session->engine;
    os_mutex_lock(engine->lock);
    while (session->phase == SESSION_SUBMITTED || session->phase == SESSION_RUNNING)
        os_condition_wait(engine->done, engine->lock);
    *submitted = session->phase == SESSION_DONE; /* else nothing was, or it was taken back */
    session->phase = SESSION_IDLE;
    if (session->event) os_event_clear(session->event);
    int status = session->status;
    os_mutex_unlock(engine->lock);
    if (!*submitted) return moshi_fail(MOSHI_ERROR_SESSION, "nothing was submitted to wait for");
    return status ? moshi_fail(status, "%s", session->sentence) : MOSHI_OK;
}

int session_step_entered(struct moshi_session *session, const int32_t *codes,
                         struct moshi_frame *frame)
{
    struct moshi_engine *engine = session->engine;
    int status = take_input(session, NULL, codes, frame);
    if (status) return status;
    os_mutex_lock(engine->lock);
    submit(session, os_clock());
    os_condition_wake_all(engine->submitted);
    os_mutex_unlock(engine->lock);
    int submitted;
    return await(session, &submitted);
}

int moshi_session_wait(struct moshi_session *session)
{
    struct moshi_engine *engine = session->engine;
    if (!engine) {
        session->phase = SESSION_IDLE;
        session_leave(session);
        return moshi_fail(MOSHI_ERROR_SESSION, "the session's engine was closed");
    }
    int status = model_check_process(engine->model);
    if (status) return status;
    int submitted = 0;
    status = await(session, &submitted);
    if (submitted) session_leave(session);
    return status;
}

int moshi_session_withdraw(struct moshi_session *session)
{
    struct moshi_engine *engine = session->engine;
    if (!engine || model_check_process(engine->model)) return 0;
    os_mutex_lock(engine->lock);
    int withdrawn = session->phase == SESSION_SUBMITTED;
    if (withdrawn) session->phase = SESSION_IDLE;
    os_mutex_unlock(engine->lock);
    if (withdrawn) session_leave(session);
    return withdrawn;
}

int moshi_session_descriptor(struct moshi_session *session, int *descriptor)
{
    *descriptor = -1;
    int status = session_enter(session);
    if (status) return status;
    if (!session->event) {
        struct os_event *event;
        status = os_event_create(&event);
        os_mutex_lock(session->engine->lock);
        session->event = event;
        os_mutex_unlock(session->engine->lock);
    }
    if (!status) *descriptor = os_event_descriptor(session->event);
    session_leave(session);
    return status;
}

int moshi_session_step(struct moshi_session *session, const float *pcm, struct moshi_frame *frame)
{
    int status = moshi_session_submit(session, pcm, frame);
    return status ? status : moshi_session_wait(session);
}

int moshi_session_step_codes(struct moshi_session *session, const int32_t *codes,
                             struct moshi_frame *frame)
{
    return moshi_sessions_step(&session, 1, NULL, &codes, frame);
}

/* ---- policy and results ----------------------------------------------------------------- */

#define MAX_FORCED (1 << 20) /* tokens waiting: most of a day */

int session_check_text(const struct moshi_session *session, int32_t token)
{
    int card = session->engine->model->info.text_card_in;
    if (token < 0 || token >= card)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "text token %d is not in 0 to %d", token, card - 1);
    return MOSHI_OK;
}

int session_check_code(const struct moshi_session *session, int k, int32_t code)
{
    int card = session->engine->model->info.card;
    if (code < 0 || code >= card)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "code %d is %d, expected 0 to %d", k, code,
                          card - 1);
    return MOSHI_OK;
}

/* Room for `count` forced tokens in all. */
static int reserve_forced(struct moshi_session *session, int count)
{
    int left = session->forced_end - session->forced_first;
    int32_t *room = session->forced;
    if (count > session->forced_capacity) {
        room = malloc((size_t)count * sizeof *room);
        if (!room) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %d tokens", count);
    }
    if (left) memmove(room, session->forced + session->forced_first, (size_t)left * sizeof *room);
    if (room != session->forced) {
        free(session->forced);
        session->forced = room;
        session->forced_capacity = count;
    }
    session->forced_first = 0;
    session->forced_end = left;
    return MOSHI_OK;
}

int moshi_session_force_text(struct moshi_session *session, const int32_t *tokens, int count)
{
    int status = session_enter(session);
    if (status) return status;
    int left = session->forced_end - session->forced_first;
    if (count < 0 || count > MAX_FORCED - left)
        status = moshi_fail(MOSHI_ERROR_ARGUMENT,
                            "%d tokens given with %d still to come, expected at most %d in all",
                            count, left, MAX_FORCED);
    for (int i = 0; i < count && !status; ++i) status = session_check_text(session, tokens[i]);
    if (!status) status = reserve_forced(session, left + count);
    if (!status && count) {
        memcpy(session->forced + session->forced_end, tokens, (size_t)count * sizeof *tokens);
        session->forced_end += count;
    }
    session_leave(session);
    return status;
}

int moshi_session_forced_left(struct moshi_session *session)
{
    return session->forced_end - __atomic_load_n(&session->forced_first, __ATOMIC_RELAXED);
}

int moshi_session_force_next(struct moshi_session *session, int32_t text, const int32_t *audio)
{
    int status = session_enter(session);
    if (status) return status;
    const struct moshi_model_info *info = &session->engine->model->info;
    if (text >= 0) status = session_check_text(session, text);
    for (int k = 0; audio && k < info->dep_q && !status; ++k)
        status = session_check_code(session, k, audio[k]);
    if (!status) {
        session->next_text[0] = text >= 0 ? text : TOKEN_FREE;
        for (int k = 0; k < info->dep_q; ++k)
            session->next_audio[k] = audio ? audio[k] : TOKEN_FREE;
    }
    session_leave(session);
    return status;
}

int moshi_session_logits(struct moshi_session *session, float *text, float *audio)
{
    int status = session_enter(session);
    if (status) return status;
    const struct moshi_model_info *info = &session->engine->model->info;
    const size_t text_card = (size_t)info->text_card;
    if (!session->logits)
        status = moshi_fail(MOSHI_ERROR_SESSION,
                            "logits were not kept: create the session with keep_logits");
    else if (!session->has_logits)
        status = moshi_fail(MOSHI_ERROR_SESSION, "there are no logits before a step has made them");
    if (!status && text) memcpy(text, session->logits, text_card * sizeof *text);
    if (!status && audio)
        memcpy(audio, session->logits + text_card,
               (size_t)info->dep_q * (size_t)info->card * sizeof *audio);
    session_leave(session);
    return status;
}

int moshi_session_fork(struct moshi_session *session, const uint64_t *new_seed,
                       struct moshi_session **result)
{
    *result = NULL;
    int status = session_enter(session);
    if (status) return status;
    struct moshi_engine *engine = session->engine;
    struct moshi_session *fork;
    const int left = session->forced_end - session->forced_first;
    status = new_session(engine, &session->options, &fork);
    if (!status) status = reserve_forced(fork, left);
    if (!status) status = take_slot(fork);
    if (!status) {
        const struct moshi_model_info *info = &engine->model->info;
        if (session->condition)
            memcpy(fork->condition, session->condition,
                   2 * (size_t)engine->model->lm.config.temporal.dim * sizeof(float));
        if (session->logits)
            memcpy(fork->logits, session->logits,
                   ((size_t)info->text_card + (size_t)info->dep_q * (size_t)info->card) *
                       sizeof(float));
        if (left)
            memcpy(fork->forced, session->forced + session->forced_first,
                   (size_t)left * sizeof(int32_t));
        fork->forced_end = left;
        fork->has_logits = session->has_logits;
        fork->index = session->index;
        const size_t next = (size_t)session->next_steps;
        memcpy(fork->next_text, session->next_text, next * sizeof *fork->next_text);
        memcpy(fork->next_audio, session->next_audio,
               next * (size_t)info->dep_q * sizeof *fork->next_audio);
        if (new_seed) set_seed(fork, *new_seed);
        os_mutex_lock(engine->model->backend_lock);
        lm_state_copy(&engine->lm, session->slot, fork->slot);
        if (engine->mimi.backend) mimi_state_copy(&engine->mimi, session->slot, fork->slot);
        if (fork->refresh) refresh_copy(fork->refresh, session->refresh);
        os_mutex_unlock(engine->model->backend_lock);
        *result = fork;
    } else {
        moshi_session_destroy(fork);
    }
    session_leave(session);
    return status;
}

int moshi_session_reset(struct moshi_session *session, const uint64_t *new_seed)
{
    int status = session_enter(session);
    if (status) return status;
    if (new_seed) set_seed(session, *new_seed);
    os_mutex_lock(session->engine->model->backend_lock);
    reset_slot(session);
    os_mutex_unlock(session->engine->model->backend_lock);
    session_leave(session);
    return status;
}

/* ---- snapshots -------------------------------------------------------------------------- */

/* What a session is besides its slot, as plain arrays. */
struct saved_options {
    int64_t frames;
    uint64_t seed;
    float sampling[3];   /* text_temperature, audio_temperature, cfg_coef */
    int32_t settings[7]; /* text_top_k, audio_top_k, cfg_masked_until, cfg_no_text, start,
                            keep_logits, has_logits */
};

static void list_options(struct saved_options *saved, struct snapshot *snapshot)
{
    snapshot_host(snapshot, "session.frames", TENSOR_I64, 1, &saved->frames);
    snapshot_host(snapshot, "session.seed", TENSOR_U64, 1, &saved->seed);
    snapshot_host(snapshot, "session.sampling", TENSOR_F32, 3, saved->sampling);
    snapshot_host(snapshot, "session.settings", TENSOR_I32, 7, saved->settings);
}

/* In snapshots of sessions whose context is refreshed. */
#define REFRESH_FIELD "session.refresh"
/* In those of the others, where it is not the checkpoint's. */
#define RANGE_FIELD "session.context_range"

static void list_session(struct moshi_session *session, struct snapshot *snapshot)
{
    const struct moshi_model_info *info = &session->engine->model->info;
    snapshot_host(snapshot, "session.next_text", TENSOR_I32, session->next_steps,
                  session->next_text);
    snapshot_host(snapshot, "session.next_audio", TENSOR_I32,
                  (int64_t)session->next_steps * info->dep_q, session->next_audio);
    snapshot_host(snapshot, "session.forced", TENSOR_I32,
                  session->forced_end - session->forced_first,
                  session->forced ? session->forced + session->forced_first : NULL);
    if (session->refresh) {
        struct refresh *refresh = session->refresh;
        snapshot_host(snapshot, REFRESH_FIELD, TENSOR_I32, REFRESH_STATE, &refresh->state);
        snapshot_host(snapshot, "session.history", TENSOR_I32,
                      (int64_t)refresh->state.rows * refresh->halves * (info->n_q + 1),
                      refresh->history);
    } else if (session->options.context_range !=
               session->engine->model->lm.config.temporal.context) {
        snapshot_host(snapshot, RANGE_FIELD, TENSOR_I32, 1, &session->options.context_range);
    }
    if (session->condition)
        snapshot_host(snapshot, "session.condition", TENSOR_F32,
                      2 * (int64_t)session->engine->model->lm.config.temporal.dim,
                      session->condition);
    if (session->has_logits)
        snapshot_host(snapshot, "session.logits", TENSOR_F32,
                      info->text_card + (int64_t)info->dep_q * info->card, session->logits);
}

static void describe(const struct moshi_engine *engine, struct snapshot *snapshot)
{
    const struct moshi_model *model = engine->model;
    snapshot_init(snapshot, "moshi-c session");
    snapshot_fact(snapshot, "model", "%016llx", (unsigned long long)model->lm_fingerprint);
    snapshot_fact(snapshot, "codec", "%016llx", (unsigned long long)model->mimi_fingerprint);
    snapshot_fact(snapshot, "device", "%s", engine->backend->device);
    snapshot_fact(snapshot, "dtype", "%s", model->info.dtype);
    snapshot_fact(snapshot, "kv_dtype", "%s", moshi_dtype_name(engine->lm.kv.cache.dtype));
    snapshot_fact(snapshot, "context", "%d", engine->lm.context);
}

int moshi_session_snapshot(struct moshi_session *session, const void *note, size_t note_bytes,
                           void *data, size_t *bytes)
{
    int status = session_enter(session);
    if (status) return status;
    struct moshi_engine *engine = session->engine;
    const struct moshi_session_options *options = &session->options;
    struct saved_options saved = {
        .frames = session->index,
        .seed = options->seed,
        .sampling = {options->text_temperature, options->audio_temperature, options->cfg_coef},
        .settings = {options->text_top_k, options->audio_top_k, options->cfg_masked_until,
                     options->cfg_no_text, (int32_t)options->start, options->keep_logits,
                     session->has_logits}};
    struct snapshot snapshot;
    describe(engine, &snapshot);
    list_options(&saved, &snapshot);
    list_session(session, &snapshot);
    /* The session is not stepping, and others do not write to pages that it reads: they need not
     * wait for the copy of what may be a gigabyte. */
    lm_state_list(&engine->lm, session->slot, session_is_guided(session), &snapshot);
    if (engine->mimi.backend) mimi_state_list(&engine->mimi, session->slot, "", &snapshot);
    /* The cast drops a const that the list does not use: it is only read from. */
    if (note_bytes)
        snapshot_host(&snapshot, "note", TENSOR_U8, (int64_t)note_bytes, (void *)(uintptr_t)note);
    status = snapshot_write(&snapshot, data, bytes);
    snapshot_free(&snapshot);
    session_leave(session);
    return status;
}

/* What a snapshot has of a refresh; `found` stays 0 for a session without. */
static int read_refresh(struct tensor_file *file, struct refresh_state *state, int *found)
{
    const struct tensor *tensor;
    *found = tensor_file_find(file, REFRESH_FIELD) != NULL;
    if (!*found) return MOSHI_OK;
    int status = snapshot_find(file, REFRESH_FIELD, TENSOR_I32, &tensor);
    if (status) return status;
    if (tensor->elements != REFRESH_STATE)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "snapshot: the field " REFRESH_FIELD " has %lld numbers, expected %lld",
                          (long long)tensor->elements, (long long)REFRESH_STATE);
    memcpy(state, tensor->data, sizeof *state);
    return MOSHI_OK;
}

/* The options that a snapshot claims; MOSHI_ERROR_CHECKPOINT when they cannot be a session's. */
static int read_options(struct moshi_engine *engine, struct tensor_file *file,
                        struct saved_options *saved, struct moshi_session_options *options)
{
    struct snapshot items = {0};
    list_options(saved, &items);
    int status = snapshot_read(&items, file);
    snapshot_free(&items);
    if (status) return status;
    if (saved->frames < 0 || saved->frames > MAX_FRAMES)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "snapshot: the field session.frames is %lld, expected 0 to %d",
                          (long long)saved->frames, MAX_FRAMES);
    for (int i = 3; i < 7; ++i)
        if (saved->settings[i] < 0 || saved->settings[i] > 1)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "snapshot: the field session.settings has %d at %d, expected 0 or 1",
                              saved->settings[i], i);
    moshi_session_options_init(engine->model, options);
    options->seed = saved->seed;
    options->text_temperature = saved->sampling[0];
    options->audio_temperature = saved->sampling[1];
    options->cfg_coef = saved->sampling[2];
    options->text_top_k = saved->settings[0];
    options->audio_top_k = saved->settings[1];
    options->cfg_masked_until = saved->settings[2];
    options->cfg_no_text = saved->settings[3];
    options->start = saved->settings[4] ? MOSHI_START_OFFLINE : MOSHI_START_LIVE;
    options->keep_logits = saved->settings[5];
    struct refresh_state refresh;
    int refreshed;
    status = read_refresh(file, &refresh, &refreshed);
    if (status) return status;
    if (refreshed) {
        if (refresh.range == 0 || refresh.keep == 0 || refresh.rows < 0)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "snapshot: the field " REFRESH_FIELD
                              " has a range of %d, %d frames to "
                              "keep and %d rows, expected 1 or more, and no negative rows",
                              refresh.range, refresh.keep, refresh.rows);
        options->context_policy = MOSHI_CONTEXT_REFRESH;
        options->context_range = refresh.range;
        options->context_keep = refresh.keep;
    } else if (tensor_file_find(file, RANGE_FIELD)) {
        const struct tensor *range;
        status = snapshot_find(file, RANGE_FIELD, TENSOR_I32, &range);
        if (!status && range->elements != 1)
            status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                "snapshot: the field " RANGE_FIELD " has %lld numbers, expected 1",
                                (long long)range->elements);
        if (status) return status;
        memcpy(&options->context_range, range->data, sizeof options->context_range);
    }
    if (saved->settings[6] && !options->keep_logits)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "snapshot: the field session.settings has logits and does not keep them");
    return MOSHI_OK;
}

/* Reads what list_session lists; the forced tokens are as many as the snapshot has. */
static int read_session(struct moshi_session *session, struct tensor_file *file)
{
    const struct moshi_model_info *info = &session->engine->model->info;
    const struct tensor *forced;
    int status = snapshot_find(file, "session.forced", TENSOR_I32, &forced);
    if (!status && forced->elements > MAX_FORCED)
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                            "snapshot: %lld forced tokens, expected at most %d",
                            (long long)forced->elements, MAX_FORCED);
    if (!status) status = reserve_forced(session, (int)forced->elements);
    if (status) return status;
    session->forced_end = (int)forced->elements;
    if (session->refresh) {
        int found;
        status = read_refresh(file, &session->refresh->state, &found);
        if (!status && session->refresh->state.rows > session->refresh->most_rows)
            session->refresh->state.rows = session->refresh->most_rows; /* refused as a shape */
        if (status) return status;
    }
    struct snapshot items = {0};
    list_session(session, &items);
    status = snapshot_read(&items, file);
    snapshot_free(&items);
    if (status) return status;
    if (session->refresh) status = refresh_check(session->refresh);
    for (int i = 0; i < session->next_steps && !status; ++i)
        if (session->next_text[i] != TOKEN_FREE)
            status = session_check_text(session, session->next_text[i]);
    for (int i = 0; i < session->forced_end && !status; ++i)
        status = session_check_text(session, session->forced[i]);
    for (int i = 0; i < session->next_steps * info->dep_q && !status; ++i)
        if (session->next_audio[i] != TOKEN_FREE)
            status = session_check_code(session, i % info->dep_q, session->next_audio[i]);
    return status ? moshi_fail_prefix(MOSHI_ERROR_CHECKPOINT, "snapshot") : MOSHI_OK;
}

static int read_slot(struct moshi_session *session, struct tensor_file *file)
{
    struct moshi_engine *engine = session->engine;
    const int slot = session->slot, guided = session_is_guided(session);
    os_mutex_lock(engine->model->backend_lock);
    int status = lm_state_make_room(&engine->lm, slot, guided, file);
    if (!status && engine->mimi.backend)
        status = mimi_state_make_room(&engine->mimi, slot, "", file);
    os_mutex_unlock(engine->model->backend_lock);
    /* From here on nobody else touches what is written: other sessions need not wait. */
    if (!status) status = lm_state_restore(&engine->lm, slot, guided, file);
    if (!status && engine->mimi.backend) status = mimi_state_restore(&engine->mimi, slot, "", file);
    return status;
}

int moshi_session_restore(struct moshi_engine *engine, const void *data, size_t bytes,
                          struct moshi_session **result, const void **note, size_t *note_bytes)
{
    *result = NULL;
    *note = NULL;
    *note_bytes = 0;
    if (!engine->model->info.has_lm)
        return moshi_fail(MOSHI_ERROR_SESSION,
                          "this model is a codec alone; a session needs a language model");
    struct snapshot facts;
    struct tensor_file *file = NULL;
    struct saved_options saved;
    struct moshi_session_options options;
    struct moshi_session *session = NULL;
    describe(engine, &facts);
    int status = tensor_file_parse(data, bytes, "snapshot", &file);
    if (!status) status = snapshot_check_facts(&facts, file);
    if (!status) status = read_options(engine, file, &saved, &options);
    if (!status) {
        status = new_session(engine, &options, &session);
        if (status == MOSHI_ERROR_ARGUMENT)
            status = moshi_fail_prefix(MOSHI_ERROR_CHECKPOINT, "snapshot");
    }
    if (!status) status = take_slot(session);
    if (!status) {
        session->index = saved.frames;
        session->has_logits = saved.settings[6];
        status = read_session(session, file);
    }
    if (!status) status = read_slot(session, file);
    if (!status && tensor_file_find(file, "note")) {
        const struct tensor *tensor;
        status = snapshot_find(file, "note", TENSOR_U8, &tensor);
        if (!status) {
            *note = tensor->data;
            *note_bytes = tensor->bytes;
        }
    }
    if (!status) status = snapshot_finish(file);
    if (status)
        moshi_session_destroy(session);
    else
        *result = session;
    tensor_file_close(file);
    snapshot_free(&facts);
    return status;
}
