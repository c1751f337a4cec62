/* engine.c: creation of an engine, its thread, and the tick. */
#include "engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

/* Steps the sessions together, which were submitted; without the engine's lock. */
static void run_tick(struct moshi_engine *engine, struct moshi_session **sessions, int count);

/* Under the engine's lock. */
static void finish_frame(struct moshi_session *session)
{
    session->phase = SESSION_DONE;
    if (session->event) os_event_set(session->event);
}

/* One pass of a refresh; 0 when none is to be made. Between two ticks, without locks. */
static int renew_one(struct moshi_engine *engine)
{
    int slot = -1;
    for (int i = 0; i < engine->max_sessions && slot < 0; ++i) {
        const int at = (engine->next_renewed + i) % engine->max_sessions;
        if (__atomic_load_n(&engine->renewing[at], __ATOMIC_RELAXED)) slot = at;
    }
    if (slot < 0) return 0;
    engine->next_renewed = slot + 1;
    os_mutex_lock(engine->model->backend_lock);
    /* Its session may be gone since, and another one be there. */
    const int due = __atomic_exchange_n(&engine->renewing[slot], 0, __ATOMIC_RELAXED);
    os_mutex_lock(engine->lock);
    struct moshi_session *session = engine->slots[slot]; /* stays while the backend is ours */
    os_mutex_unlock(engine->lock);
    /* What fails here fails again in the tick that needs it, and is reported there. */
    if (due && session && session->refresh && session->refresh->state.left)
        refresh_pass(session->refresh, &engine->lm, slot);
    os_mutex_unlock(engine->model->backend_lock);
    return 1;
}

static void engine_loop(void *arg)
{
    struct moshi_engine *engine = arg;
    int renewing = 0; /* passes may be left to make */
    os_mutex_lock(engine->lock);
    while (!engine->stop) {
        if (engine->pending == 0 && renewing) {
            os_mutex_unlock(engine->lock);
            renewing = renew_one(engine);
            os_mutex_lock(engine->lock);
            continue;
        }
        if (engine->pending == 0) {
            os_condition_wait(engine->submitted, engine->lock);
            continue;
        }
        int n = 0;
        for (int slot = 0; slot < engine->max_sessions; ++slot) {
            struct moshi_session *session = engine->slots[slot];
            if (session && session->phase == SESSION_SUBMITTED) {
                session->phase = SESSION_RUNNING;
                engine->batch[n++] = session;
            }
        }
        engine->pending = 0;
        engine->ticking = n > 0;
        if (n == 0) { /* its session was destroyed meanwhile */
            os_condition_wake_all(engine->done);
            continue;
        }
        os_mutex_unlock(engine->lock);
        os_mutex_lock(engine->model->backend_lock);
        run_tick(engine, engine->batch, n);
        os_mutex_unlock(engine->model->backend_lock);
        os_mutex_lock(engine->lock);
        for (int i = 0; i < n; ++i) finish_frame(engine->batch[i]);
        engine->ticking = 0;
        os_condition_wake_all(engine->done);
        /* One pass in any case, so that an engine without a moment's rest gets on with it. */
        os_mutex_unlock(engine->lock);
        renewing = renew_one(engine);
        os_mutex_lock(engine->lock);
    }
    engine->pending = 0;
    /* Nobody waits for ever: what was submitted too late ends with a reason. */
    for (int slot = 0; slot < engine->max_sessions; ++slot) {
        struct moshi_session *session = engine->slots[slot];
        if (session && session->phase == SESSION_SUBMITTED) {
            session_fail(session,
                         moshi_fail(MOSHI_ERROR_SESSION, "the engine was closed during a step"));
            finish_frame(session);
        }
    }
    os_condition_wake_all(engine->done);
    os_mutex_unlock(engine->lock);
}

/* What a tick may bring to the host. */
static size_t result_bytes(const struct moshi_engine *engine)
{
    const size_t n = (size_t)engine->max_sessions;
    return engine->lm.results_bytes + n * MOSHI_MAX_CODEBOOKS * sizeof(int32_t) +
           n * (size_t)engine->frame_size * sizeof(float);
}

static int create_state(struct moshi_engine *engine, const struct moshi_engine_options *options)
{
    struct moshi_model *model = engine->model;
    struct backend *backend = engine->backend;
    const struct moshi_model_info *info = &model->info;
    const int slots = engine->max_sessions;
    const size_t n = (size_t)slots, codes = n * MOSHI_MAX_CODEBOOKS;
    const size_t samples = n * (size_t)engine->frame_size;
    int status = MOSHI_OK;
    if (info->has_lm) {
        int context = options->context ? options->context : info->context;
        enum moshi_dtype kv_dtype = options->kv_dtype;
        if (kv_dtype == MOSHI_AUTO)
            kv_dtype = model->lm.text_head.format == WEIGHT_F32 ? MOSHI_F32 : MOSHI_BF16;
        status = lm_state_create(&engine->lm, &model->lm, backend, slots, context, kv_dtype,
                                 codes * sizeof(int32_t) + samples * sizeof(float));
    }
    if (!status && info->has_mimi && info->has_lm)
        status = mimi_state_create(&engine->mimi, &model->mimi, backend, slots, 1, 0);
    if (status) return status;

    engine->slots = calloc(n, sizeof *engine->slots);
    engine->batch = calloc(n, sizeof *engine->batch);
    engine->stepping = calloc(n, sizeof *engine->stepping);
    engine->subset = calloc(n, sizeof *engine->subset);
    engine->row_slots = calloc(n, sizeof *engine->row_slots);
    engine->guided = calloc(n, sizeof *engine->guided);
    engine->user = calloc(codes, sizeof *engine->user);
    engine->codes = calloc(codes, sizeof *engine->codes);
    engine->params = calloc(n, sizeof *engine->params);
    engine->heard = calloc(n, sizeof *engine->heard);
    engine->spoken = calloc(n, sizeof *engine->spoken);
    engine->sound = calloc(samples + 1, sizeof *engine->sound);
    engine->results = calloc(result_bytes(engine) + 1, 1);
    engine->renewing = calloc(n, sizeof *engine->renewing);
    engine->row_lane = backend->ops->allocate(backend, n * 4);
    engine->row_active = backend->ops->allocate(backend, n);
    engine->row_heard = backend->ops->allocate(backend, n);
    engine->row_spoken = backend->ops->allocate(backend, n);
    engine->device_codes = engine->lm.beside;
    engine->pcm = engine->lm.beside ? (float *)(void *)(engine->device_codes + codes) : NULL;
    engine->lock = os_mutex_create();
    engine->submitted = os_condition_create();
    engine->done = os_condition_create();
    if (!engine->slots || !engine->batch || !engine->stepping || !engine->subset ||
        !engine->row_slots || !engine->guided || !engine->user || !engine->codes ||
        !engine->params || !engine->heard || !engine->spoken || !engine->sound ||
        !engine->results || !engine->renewing || !engine->row_lane || !engine->row_active ||
        !engine->row_heard || !engine->row_spoken || !engine->lock || !engine->submitted ||
        !engine->done)
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for an engine of %d sessions", slots);
    backend->ops->clear(backend, engine->row_active, 1, n);
    return os_thread_start(&engine->thread, engine_loop, engine);
}

int moshi_engine_create(struct moshi_model *model, const struct moshi_engine_options *options,
                        struct moshi_engine **result)
{
    *result = NULL;
    int status = model_check_process(model);
    if (status) return status;
    const struct moshi_engine_options none = {0};
    if (!options) options = &none;
    int slots = options->max_sessions ? options->max_sessions : 8;
    if (slots < 1 || slots > 4096)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "max_sessions is %d, expected 1 to 4096", slots);
    if (options->context < 0 || options->context > 1 << 20)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "context is %d, expected 1 to %d frames",
                          options->context, 1 << 20);
    if (options->kv_dtype != MOSHI_AUTO && options->kv_dtype != MOSHI_F32 &&
        options->kv_dtype != MOSHI_BF16 && options->kv_dtype != MOSHI_INT8)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "kv_dtype is %s, expected auto, f32, bf16 or int8",
                          moshi_dtype_name(options->kv_dtype));
    struct moshi_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for an engine");
    engine->model = model;
    engine->backend = model->backend;
    engine->max_sessions = slots;
    engine->frame_size = model->info.frame_size;
    engine->user_q = model->info.user_q;
    engine->dep_q = model->info.dep_q;
    engine->decode_q = engine->dep_q;
    if (model->info.has_mimi && engine->decode_q > model->mimi.config.n_q)
        engine->decode_q = model->mimi.config.n_q;
    os_mutex_lock(model->backend_lock);
    status = create_state(engine, options);
    if (status) status = model_failure(model, status);
    os_mutex_unlock(model->backend_lock);
    if (status) {
        moshi_engine_destroy(engine);
        return status;
    }
    *result = engine;
    return MOSHI_OK;
}

void moshi_engine_destroy(struct moshi_engine *engine)
{
    if (!engine || model_check_process(engine->model)) return;
    if (engine->thread) {
        os_mutex_lock(engine->lock);
        engine->stop = 1;
        os_condition_wake_all(engine->submitted);
        os_mutex_unlock(engine->lock);
        os_thread_join(engine->thread);
    }
    for (int slot = 0; engine->slots && slot < engine->max_sessions; ++slot)
        if (engine->slots[slot]) engine->slots[slot]->engine = NULL;
    lm_state_destroy(&engine->lm);
    mimi_state_destroy(&engine->mimi);
    const struct backend_ops *ops = engine->backend->ops;
    const size_t n = (size_t)engine->max_sessions;
    if (engine->row_lane) ops->release(engine->backend, engine->row_lane, n * 4);
    if (engine->row_active) ops->release(engine->backend, engine->row_active, n);
    if (engine->row_heard) ops->release(engine->backend, engine->row_heard, n);
    if (engine->row_spoken) ops->release(engine->backend, engine->row_spoken, n);
    free(engine->slots);
    free(engine->batch);
    free(engine->stepping);
    free(engine->subset);
    free(engine->row_slots);
    free(engine->guided);
    free(engine->user);
    free(engine->codes);
    free(engine->params);
    free(engine->heard);
    free(engine->spoken);
    free(engine->sound);
    free(engine->results);
    free(engine->renewing);
    os_mutex_destroy(engine->lock);
    os_condition_destroy(engine->submitted);
    os_condition_destroy(engine->done);
    free(engine);
}

/* What one of the sessions takes of the device: its part of what the engine took at once, and pages. */
static int64_t session_bytes(const struct moshi_engine *engine)
{
    const struct lm_state *lm = &engine->lm;
    const struct mimi_state *mimi = &engine->mimi;
    const size_t slots = (size_t)engine->max_sessions;
    size_t fixed = slots * (sizeof *engine->row_lane + 3); /* three marks of a row */
    size_t pages = kv_pages_lane_bytes(&lm->kv);
    fixed += lm_state_fixed_bytes(lm);
    if (mimi->backend) {
        fixed += mimi_state_fixed_bytes(mimi);
        pages += kv_pages_lane_bytes(&mimi->encoder_kv) + kv_pages_lane_bytes(&mimi->decoder_kv);
    }
    return (int64_t)((fixed + slots - 1) / slots + pages);
}

int moshi_engine_memory(struct moshi_engine *engine, struct moshi_memory *memory)
{
    int status = model_check_process(engine->model);
    if (status) return status;
    memset(memory, 0, sizeof *memory);
    memory->weights_bytes = engine->model->info.weight_bytes;
    memory->free_bytes = engine->backend->ops->memory_free(engine->backend);
    if (engine->lm.backend) {
        memory->session_bytes = session_bytes(engine);
        memory->kv_bytes = (int64_t)(engine->lm.kv.cache.page_bytes / KV_PAGE_POSITIONS) *
                           engine->lm.context;
        memory->session_used_bytes = (int64_t)kv_pages_used(&engine->lm.kv) *
                                     (int64_t)engine->lm.kv.cache.page_bytes;
    }
    if (engine->mimi.backend) {
        const struct mimi_state *mimi = &engine->mimi;
        memory->session_used_bytes += (int64_t)(kv_pages_used(&mimi->encoder_kv) +
                                                kv_pages_used(&mimi->decoder_kv)) *
                                      (int64_t)mimi->encoder_kv.cache.page_bytes;
    }
    return MOSHI_OK;
}

int moshi_engine_get_stats(struct moshi_engine *engine, struct moshi_engine_stats *stats)
{
    int status = model_check_process(engine->model);
    if (status) return status;
    os_mutex_lock(engine->lock);
    *stats = engine->stats;
    os_mutex_unlock(engine->lock);
    return MOSHI_OK;
}

void engine_give_way(struct moshi_engine *engine)
{
    os_mutex_lock(engine->lock);
    const int64_t ticks = engine->stats.ticks;
    while (!engine->stop && (engine->pending || engine->ticking) && engine->stats.ticks == ticks)
        os_condition_wait(engine->done, engine->lock);
    os_mutex_unlock(engine->lock);
}

int engine_is_shared(struct moshi_engine *engine, const struct moshi_session *session)
{
    int shared = __atomic_load_n(&engine->streams, __ATOMIC_RELAXED) > 0;
    os_mutex_lock(engine->lock);
    for (int i = 0; i < engine->max_sessions; ++i)
        shared |= engine->slots[i] && engine->slots[i] != session;
    os_mutex_unlock(engine->lock);
    return shared;
}

/* ---- the tick --------------------------------------------------------------------------- */

struct codec_pass {
    struct moshi_engine *engine;
    int n;
};

static struct rows codec_rows(const struct codec_pass *pass)
{
    return (struct rows){
        .n = pass->n, .lane = pass->engine->row_lane, .active = pass->engine->row_active};
}

static void encode_stage(struct backend *backend, void *arg)
{
    const struct codec_pass *pass = arg;
    struct moshi_engine *engine = pass->engine;
    (void)backend;
    mimi_encode(&engine->mimi, codec_rows(pass), 1, engine->pcm, engine->user_q,
                engine->device_codes);
}

static void decode_stage(struct backend *backend, void *arg)
{
    const struct codec_pass *pass = arg;
    struct moshi_engine *engine = pass->engine;
    (void)backend;
    mimi_decode(&engine->mimi, codec_rows(pass), 1, engine->device_codes, engine->decode_q,
                engine->decode_q, engine->pcm);
}

/* After a session's frame has been encoded. The first frame's codes fall into the slot that the model
 * never sees; clearing the codec lets the next frame start with the padding that a first frame has. Its
 * other half has not begun. */
static void take_codes(struct moshi_engine *engine, struct moshi_session *session,
                       const int32_t *codes)
{
    memcpy(session->user_codes, codes, (size_t)engine->user_q * sizeof *codes);
    if (session->index == 0 && session->options.start == MOSHI_START_LIVE)
        mimi_encoder_reset(&engine->mimi, session->slot);
}

/* Encodes the frames of the sessions that gave samples; codes go to session->user_codes. */
static int encode(struct moshi_engine *engine, struct moshi_session **batch, int n)
{
    const struct backend_ops *ops = engine->backend->ops;
    const size_t frame_bytes = (size_t)engine->frame_size * sizeof(float);
    int rows = 0, status = MOSHI_OK;
    for (int i = 0; i < n && !status; ++i) {
        if (!batch[i]->has_pcm) continue;
        int32_t slot = batch[i]->slot;
        ops->upload(engine->backend, engine->row_lane + rows, &slot, sizeof slot);
        ops->upload(engine->backend, engine->pcm + (size_t)rows * (size_t)engine->frame_size,
                    batch[i]->pcm, frame_bytes);
        status = mimi_encode_grow(&engine->mimi, slot, 1);
        engine->subset[rows++] = batch[i];
    }
    if (status || rows == 0) return status;
    status = ops->run(engine->backend, STAGE_ENCODE, encode_stage,
                      &(struct codec_pass){engine, rows}, 0);
    if (status) return status;
    const size_t codes = (size_t)engine->user_q;
    ops->download(engine->backend, engine->codes, engine->device_codes,
                  (size_t)rows * codes * sizeof(int32_t));
    status = ops->sync(engine->backend);
    if (status) return status;
    for (int i = 0; i < rows; ++i)
        take_codes(engine, engine->subset[i], engine->codes + (size_t)i * codes);
    return MOSHI_OK;
}

/* Where the host has what the last step gave at that place of the device. */
static const void *result(const struct moshi_engine *engine, const void *device)
{
    return engine->results + ((const char *)device - engine->lm.results);
}

static int32_t next_text(const struct moshi_session *session)
{
    if (session->next_text[0] == TOKEN_FREE && session->forced_first < session->forced_end)
        return session->forced[session->forced_first];
    return session->next_text[0];
}

/* What is stored instead of what is sampled; nothing without `policy`. */
static void set_policy(struct moshi_session *session, int policy)
{
    struct slot_params *params = &session->params;
    params->forced_text = policy ? next_text(session) : TOKEN_FREE;
    for (int k = 0; k < MOSHI_MAX_CODEBOOKS; ++k)
        params->forced_audio[k] = policy && k < session->engine->dep_q ? session->next_audio[k]
                                                                       : TOKEN_FREE;
}

void engine_upload_params(struct moshi_engine *engine, struct moshi_session *session)
{
    set_policy(session, 0);
    engine->backend->ops->upload(engine->backend, engine->lm.params + session->slot,
                                 &session->params, sizeof session->params);
}

/* Fills the engine's arrays for a step of the sessions, and uploads their settings. */
static struct lm_step describe_step(struct moshi_engine *engine, struct moshi_session **batch,
                                    int n, int policy)
{
    for (int i = 0; i < n; ++i) {
        engine->row_slots[i] = batch[i]->slot;
        engine->guided[i] = (uint8_t)session_is_guided(batch[i]);
        memcpy(engine->user + (size_t)i * (size_t)engine->user_q, batch[i]->user_codes,
               (size_t)engine->user_q * sizeof(int32_t));
        set_policy(batch[i], policy);
        engine->params[batch[i]->slot] = batch[i]->params;
    }
    engine->backend->ops->upload(engine->backend, engine->lm.params, engine->params,
                                 (size_t)engine->max_sessions * sizeof *engine->params);
    return (struct lm_step){
        .n = n, .slots = engine->row_slots, .guided = engine->guided, .user = engine->user};
}

/* Keeps what the sessions have read that may have to read it again. */
static void record_tokens(struct moshi_engine *engine, struct moshi_session **batch, int n,
                          const struct lm_shape *shape)
{
    const int32_t *read = result(engine, engine->lm.tokens);
    const size_t streams = (size_t)engine->lm.delay.streams;
    size_t null_row = (size_t)shape->slots;
    for (int i = 0; i < n; ++i) {
        if (batch[i]->refresh)
            refresh_record(batch[i]->refresh, 1,
                           (const int32_t *const[2]){read + (size_t)i * streams,
                                                     read + null_row * streams});
        null_row += engine->guided[i] != 0;
    }
}

/* Seconds of one tick's parts. */
struct tick_times {
    double encode_s, temporal_s, depth_s, decode_s;
};

/* One step of the language model; what it gives lands in engine->results. */
static int language_step(struct moshi_engine *engine, struct moshi_session **batch, int n,
                         int policy, struct lm_shape *shape, struct tick_times *times)
{
    const struct lm_step step = describe_step(engine, batch, n, policy);
    *shape = lm_shape_exact(&step);
    double start = os_clock();
    int status = lm_step_prepare(&engine->lm, &step, shape);
    if (!status) status = lm_step_temporal(&engine->lm, shape);
    double middle = os_clock();
    if (!status) status = lm_step_depth(&engine->lm, shape);
    times->temporal_s += middle - start;
    times->depth_s += os_clock() - middle;
    if (!status)
        engine->backend->ops->download(engine->backend, engine->results, engine->lm.results,
                                       engine->lm.results_bytes);
    if (!status) status = engine->backend->ops->sync(engine->backend);
    if (!status) record_tokens(engine, batch, n, shape);
    return status;
}

static void keep_logits(struct moshi_engine *engine, struct moshi_session *session, int row,
                        int rows)
{
    const struct moshi_model_info *info = &engine->model->info;
    const struct backend_ops *ops = engine->backend->ops;
    const size_t text = (size_t)info->text_card, card = (size_t)info->card;
    ops->download(engine->backend, session->logits, engine->lm.text_logits + (size_t)row * text,
                  text * sizeof(float));
    for (size_t k = 0; k < (size_t)engine->dep_q; ++k)
        ops->download(engine->backend, session->logits + text + k * card,
                      engine->lm.audio_logits + (k * (size_t)rows + (size_t)row) * card,
                      card * sizeof(float));
    session->has_logits = 1;
}

static void fill_frame(struct moshi_engine *engine, struct moshi_session *session, int row)
{
    const struct moshi_model_info *info = &engine->model->info;
    struct moshi_frame *frame = session->frame;
    const size_t heads = (size_t)(info->heads * info->head_dim);
    const int32_t *output = (const int32_t *)result(engine, engine->lm.output) +
                            (size_t)row * (size_t)(1 + engine->dep_q);
    const float *classes = (const float *)result(engine, engine->lm.heads) + (size_t)row * heads;
    frame->index = session->index;
    frame->event = MOSHI_EVENT_NONE;
    frame->n_user_codes = engine->user_q;
    memcpy(frame->user_codes, session->user_codes, (size_t)engine->user_q * sizeof(int32_t));
    frame->has_output = output[0] != TOKEN_NONE;
    frame->text_token = frame->has_output ? output[0] : -1;
    frame->n_codes = frame->has_output ? engine->dep_q : 0;
    memcpy(frame->codes, output + 1, (size_t)frame->n_codes * sizeof(int32_t));
    frame->n_heads = info->heads;
    for (int h = 0; h < info->heads; ++h)
        memcpy(frame->heads[h], classes + h * info->head_dim,
               (size_t)info->head_dim * sizeof(float));
}

/* A frame's sound has come, where it was wanted. */
static void check_voice(struct moshi_engine *engine, struct moshi_session *session)
{
    if (!samples_are_finite(session->frame->pcm, (size_t)engine->frame_size))
        session_end(session, moshi_fail(MOSHI_ERROR_SESSION,
                                        "the voice of frame %lld is not finite, expected numbers: "
                                        "the weights of the codec are damaged",
                                        (long long)session->index));
}

/* Decodes the frames of the sessions that have output and want sound. */
static int decode(struct moshi_engine *engine, struct moshi_session **batch, int n)
{
    const struct backend_ops *ops = engine->backend->ops;
    const size_t frame_bytes = (size_t)engine->frame_size * sizeof(float);
    int rows = 0, status = MOSHI_OK;
    for (int i = 0; i < n && !status; ++i) {
        struct moshi_frame *frame = batch[i]->frame;
        if (!frame->pcm || batch[i]->dead) continue;
        if (frame->n_codes == 0 || !engine->mimi.backend) {
            memset(frame->pcm, 0, frame_bytes);
            continue;
        }
        int32_t slot = batch[i]->slot;
        ops->upload(engine->backend, engine->row_lane + rows, &slot, sizeof slot);
        ops->upload(engine->backend, engine->device_codes + (size_t)rows * (size_t)engine->decode_q,
                    frame->codes, (size_t)engine->decode_q * sizeof(int32_t));
        status = mimi_decode_grow(&engine->mimi, slot, 1);
        engine->subset[rows++] = batch[i];
    }
    if (status || rows == 0) return status;
    status = ops->run(engine->backend, STAGE_DECODE, decode_stage,
                      &(struct codec_pass){engine, rows}, 0);
    for (int i = 0; i < rows && !status; ++i) {
        struct moshi_session *session = engine->subset[i];
        ops->download(engine->backend, session->frame->pcm,
                      engine->pcm + (size_t)i * (size_t)engine->frame_size, frame_bytes);
        status = ops->sync(engine->backend);
        if (!status) check_voice(engine, session);
    }
    return status;
}

/* ---- the tick as one stage -------------------------------------------------------------- */

/* Without padding: its bytes name the graph. */
struct tick {
    struct moshi_engine *engine;
    struct lm_shape shape;
    size_t spoken; /* some session's codes are decoded */
};

static void tick_stage(struct backend *backend, void *arg)
{
    const struct tick *tick = arg;
    struct moshi_engine *engine = tick->engine;
    struct rows rows = {.n = tick->shape.slots, .lane = engine->lm.row_slot};
    (void)backend;
    rows.active = engine->row_heard;
    if (tick->shape.heard)
        mimi_encode(&engine->mimi, rows, 1, engine->pcm, engine->user_q, engine->device_codes);
    lm_step_stage(&engine->lm, &tick->shape);
    rows.active = engine->row_spoken;
    if (tick->spoken)
        mimi_decode(&engine->mimi, rows, 1, engine->lm.output + 1, engine->decode_q,
                    1 + engine->dep_q, engine->pcm);
}

/* Marks the rows that are encoded and decoded, with room for both; what others say is given. Whether
 * there is an output to decode follows from how many frames there were. */
static int mark_rows(struct moshi_engine *engine, struct moshi_session **batch, int n, int *heard,
                     int *spoken)
{
    const size_t samples = (size_t)engine->frame_size, user_q = (size_t)engine->user_q;
    int status = MOSHI_OK;
    *heard = *spoken = 0;
    memset(engine->heard, 0, (size_t)engine->max_sessions);
    memset(engine->spoken, 0, (size_t)engine->max_sessions);
    for (int i = 0; i < n && !status; ++i) {
        const int slot = batch[i]->slot;
        const int has_output = engine->lm.offset[slot] >= engine->lm.delay.max_delay;
        if (batch[i]->has_pcm) {
            memcpy(engine->sound + (size_t)i * samples, batch[i]->pcm, samples * sizeof(float));
            for (size_t j = 0; j < user_q; ++j) engine->user[(size_t)i * user_q + j] = TOKEN_FREE;
            engine->heard[i] = 1;
            *heard = i + 1;
            status = mimi_encode_grow(&engine->mimi, slot, 1);
        }
        if (batch[i]->frame->pcm && engine->mimi.backend && has_output && engine->dep_q &&
            !status) {
            engine->spoken[i] = 1;
            *spoken = i + 1;
            status = mimi_decode_grow(&engine->mimi, slot, 1);
        }
    }
    return status;
}

/* A frame of all sessions from samples to samples: one copy to the device, one launch, one copy back. */
static int step_at_once(struct moshi_engine *engine, struct moshi_session **batch, int n,
                        struct lm_shape *shape)
{
    const struct backend_ops *ops = engine->backend->ops;
    const size_t samples = (size_t)engine->frame_size, slots = (size_t)engine->max_sessions;
    const struct lm_step step = describe_step(engine, batch, n, 1);
    int heard, spoken;
    int status = mark_rows(engine, batch, n, &heard, &spoken);
    if (status) return status;
    *shape = lm_shape_padded(&engine->lm, &step);
    if (heard) shape->heard = engine->device_codes;
    struct tick tick = {.engine = engine, .shape = *shape, .spoken = spoken > 0};
    status = lm_step_prepare(&engine->lm, &step, shape);
    if (status) return status;
    if (heard) {
        ops->upload(engine->backend, engine->row_heard, engine->heard, slots);
        ops->upload(engine->backend, engine->pcm, engine->sound,
                    (size_t)heard * samples * sizeof(float));
    }
    if (spoken) ops->upload(engine->backend, engine->row_spoken, engine->spoken, slots);
    status = ops->run(engine->backend, STAGE_TICK, tick_stage, &tick, sizeof tick);
    if (status) return status;
    ops->download(engine->backend, engine->results, engine->lm.results,
                  (size_t)((char *)(engine->pcm + (size_t)spoken * samples) - engine->lm.results));
    status = ops->sync(engine->backend);
    if (status) return status;
    record_tokens(engine, batch, n, shape);
    for (int i = 0; i < n; ++i)
        if (engine->heard[i])
            take_codes(engine, batch[i],
                       (const int32_t *)result(engine, engine->device_codes) +
                           (size_t)i * (size_t)engine->user_q);
    return MOSHI_OK;
}

/* Gives the sessions the sound that came with the step. */
static void take_voices(struct moshi_engine *engine, struct moshi_session **batch, int n)
{
    const size_t frame_bytes = (size_t)engine->frame_size * sizeof(float);
    const char *sound = result(engine, engine->pcm);
    for (int i = 0; i < n; ++i) {
        if (!batch[i]->frame->pcm || batch[i]->dead) continue;
        if (!engine->spoken[i]) {
            memset(batch[i]->frame->pcm, 0, frame_bytes);
            continue;
        }
        memcpy(batch[i]->frame->pcm, sound + (size_t)i * frame_bytes, frame_bytes);
        check_voice(engine, batch[i]);
    }
}

/* An offline start steps its first frame twice: the first time fills the slot never seen. */
static int starts_offline(const struct moshi_session *session)
{
    return session->index == 0 && session->options.start == MOSHI_START_OFFLINE;
}

static int runs_at_once(const struct moshi_engine *engine, struct moshi_session **batch, int n)
{
    for (int i = 0; i < n; ++i)
        if (starts_offline(batch[i])) return 0;
    return engine->backend->whole_ticks;
}

/* ---- contexts that are renewed ---------------------------------------------------------- */

#define SPOKEN_DB (-45.0) /* a voice above this level is one */

/* Whether somebody speaks in the frame. */
static int is_spoken(const struct moshi_engine *engine, const struct moshi_frame *frame)
{
    const struct moshi_model_info *info = &engine->model->info;
    const int32_t text = frame->text_token;
    if (frame->level_db > SPOKEN_DB) return 1;
    if (text >= 0 && text != info->text_padding_id && text != info->text_end_padding_id) return 1;
    double energy = 0;
    for (int i = 0; frame->pcm && i < engine->frame_size; ++i)
        energy += (double)frame->pcm[i] * (double)frame->pcm[i];
    return energy > engine->frame_size * pow(10, SPOKEN_DB / 10);
}

/* Before a session's frame: reads what is left of a new context, if the frame is the first to use it. */
static int end_refresh(struct moshi_engine *engine, struct moshi_session *session)
{
    struct refresh *refresh = session->refresh;
    if (!refresh || refresh->state.left != 1) return MOSHI_OK;
    int status = refresh_end(refresh, &engine->lm, session->slot);
    refresh->renewed = !status;
    /* With guidance the old context was given up for it. */
    if (status && refresh->halves > 1) session_end(session, status);
    return status;
}

/* After a frame: what is to be told of the context, and whether a new one is to be read. */
static void watch_context(struct moshi_engine *engine, struct moshi_session *session)
{
    struct refresh *refresh = session->refresh;
    struct moshi_frame *frame = session->frame;
    const int64_t positions = engine->lm.positions[session->slot];
    const int64_t range = refresh ? refresh->state.range : session->options.context_range;
    if (positions == (range * 4 + 4) / 5) frame->event = MOSHI_EVENT_CONTEXT_80;
    if (!refresh) return;
    if (refresh->renewed) frame->event = MOSHI_EVENT_REFRESH_END;
    refresh->renewed = 0;
    const int begins = refresh_watch(refresh, positions, is_spoken(engine, frame));
    if (begins && frame->event == MOSHI_EVENT_NONE) {
        frame->event = MOSHI_EVENT_REFRESH_BEGIN;
        refresh_begin(refresh);
    }
    /* With guidance both lanes are in use until the very step. */
    __atomic_store_n(&engine->renewing[session->slot],
                     (uint8_t)(refresh->state.left && refresh->halves == 1), __ATOMIC_RELAXED);
}

static void next_step(struct moshi_session *session)
{
    const size_t later = (size_t)session->next_steps - 1, dep_q = (size_t)session->engine->dep_q;
    memmove(session->next_text, session->next_text + 1, later * sizeof *session->next_text);
    memmove(session->next_audio, session->next_audio + dep_q,
            later * dep_q * sizeof *session->next_audio);
    session_free_next(session, session->next_steps - 1);
}

/* The same in parts: encode, language model; decode follows. */
static int step_in_parts(struct moshi_engine *engine, struct moshi_session **batch, int n,
                         struct lm_shape *shape, struct tick_times *times)
{
    double start = os_clock();
    int twice = 0, status = encode(engine, batch, n);
    times->encode_s = os_clock() - start;
    for (int i = 0; i < n; ++i)
        if (starts_offline(batch[i])) engine->subset[twice++] = batch[i];
    if (!status && twice) status = language_step(engine, engine->subset, twice, 0, shape, times);
    return status ? status : language_step(engine, batch, n, 1, shape, times);
}

static void step_all(struct moshi_engine *engine, struct moshi_session **batch, int n)
{
    const int at_once = runs_at_once(engine, batch, n);
    struct tick_times times = {0};
    struct lm_shape shape = {0};
    double start = os_clock();
    int status = at_once ? step_at_once(engine, batch, n, &shape)
                         : step_in_parts(engine, batch, n, &shape, &times);
    const uint8_t *failed = result(engine, engine->lm.failed);
    for (int i = 0; i < n && !status; ++i) {
        /* A number that is not finite ends this conversation and no other. */
        if (failed[batch[i]->slot])
            session_end(
                batch[i],
                moshi_fail(MOSHI_ERROR_SESSION,
                           "a logit of frame %lld is not finite, expected numbers: the weights are "
                           "damaged (opening the model with their check names the tensor), or the "
                           "options of this session are absurd",
                           (long long)batch[i]->index));
        fill_frame(engine, batch[i], i);
        if (batch[i]->logits) keep_logits(engine, batch[i], i, shape.rows);
    }
    double stepped = os_clock();
    if (!status && at_once) take_voices(engine, batch, n);
    if (!status && !at_once) status = decode(engine, batch, n);
    double end = os_clock();

    for (int i = 0; i < n; ++i) {
        struct moshi_session *session = batch[i];
        if (status) session_end(session, status);
        if (session->dead) continue;
        ++session->index;
        if (session->next_text[0] == TOKEN_FREE && session->forced_first < session->forced_end)
            __atomic_store_n(&session->forced_first, session->forced_first + 1, __ATOMIC_RELAXED);
        next_step(session);
        watch_context(engine, session);
        session->frame->step_s = end - session->submitted_s;
    }
    os_mutex_lock(engine->lock);
    ++engine->stats.ticks;
    engine->stats.frames += n;
    if (!at_once) times.decode_s = end - stepped;
    engine->stats.encode_s += times.encode_s;
    engine->stats.temporal_s += times.temporal_s;
    engine->stats.depth_s += times.depth_s;
    engine->stats.decode_s += times.decode_s;
    engine->stats.other_s += (end - start) - times.encode_s - times.temporal_s - times.depth_s -
                             times.decode_s;
    os_mutex_unlock(engine->lock);
}

/* Makes room for a session's next frame, where memory has to come for it. */
static int make_room(struct moshi_engine *engine, const struct moshi_session *session)
{
    const int slot = session->slot;
    int status = lm_step_room(&engine->lm, slot, session_is_guided(session));
    if (!status && session->has_pcm) status = mimi_encode_room(&engine->mimi, slot, 1);
    if (!status && session->frame->pcm && engine->mimi.backend)
        status = mimi_decode_room(&engine->mimi, slot, 1);
    return status;
}

static void run_tick(struct moshi_engine *engine, struct moshi_session **sessions, int count)
{
    struct moshi_session **batch = engine->stepping;
    int n = 0;
    /* Who finds no memory does not step, and nobody else is touched. */
    for (int i = 0; i < count; ++i) {
        struct refresh *refresh = sessions[i]->refresh;
        int status = end_refresh(engine, sessions[i]);
        if (!status) status = make_room(engine, sessions[i]);
        if (status) {
            session_fail(sessions[i], status);
            continue;
        }
        if (refresh && refresh->state.left) --refresh->state.left;
        batch[n++] = sessions[i];
    }
    if (n) step_all(engine, batch, n);
}
