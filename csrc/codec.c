/* codec.c: the codec without a language model: streams of a batch, and whole signals. Both use the
 * engine's backend between ticks. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "status.h"

/* Frames of one pass over whole signals, of all of them together: enough rows to use the arithmetic
 * well (two of each in the layers with most weights), few enough that memory stays constant. While
 * there are sessions or streams that may want the backend in between, a pass is shorter. */
#define WHOLE_FRAMES 24
#define WHOLE_FRAMES_SHARED 8

/* A codec state with its input and output buffers and row map on the device. */
struct codec {
    struct moshi_engine *engine;
    struct mimi_state state;
    int batch, frames, levels;
    int32_t *lanes;  /* device, [batch] */
    uint8_t *active; /* device, [batch] */
    float *pcm;      /* device, [batch][frames][frame_size] */
    int32_t *codes;  /* device, [batch][frames][MOSHI_MAX_CODEBOOKS] */
};

struct mimi_stream {
    struct codec codec;
    int32_t *room; /* of a whole signal: host memory for the codes of a pass; else NULL */
    uint32_t busy;
};

struct codec_call {
    struct codec *codec;
    int frames, levels;
};

static struct rows all_rows(const struct codec *codec)
{
    return (struct rows){.n = codec->batch, .lane = codec->lanes, .active = codec->active};
}

static void encode_stage(struct backend *backend, void *arg)
{
    const struct codec_call *call = arg;
    struct codec *codec = call->codec;
    (void)backend;
    mimi_encode(&codec->state, all_rows(codec), call->frames, codec->pcm, call->levels,
                codec->codes);
}

static void decode_stage(struct backend *backend, void *arg)
{
    const struct codec_call *call = arg;
    struct codec *codec = call->codec;
    (void)backend;
    mimi_decode(&codec->state, all_rows(codec), call->frames, codec->codes, call->levels,
                call->levels, codec->pcm);
}

static size_t pcm_bytes(const struct codec *codec)
{
    return (size_t)codec->batch * (size_t)codec->frames * (size_t)codec->engine->frame_size *
           sizeof(float);
}

static size_t code_bytes(const struct codec *codec)
{
    return (size_t)codec->batch * (size_t)codec->frames * MOSHI_MAX_CODEBOOKS * sizeof(int32_t);
}

static void codec_release(struct codec *codec)
{
    struct backend *backend = codec->engine->backend;
    const size_t n = (size_t)codec->batch;
    mimi_state_destroy(&codec->state);
    if (codec->lanes) backend->ops->release(backend, codec->lanes, n * sizeof(int32_t));
    if (codec->active) backend->ops->release(backend, codec->active, n);
    if (codec->pcm) backend->ops->release(backend, codec->pcm, pcm_bytes(codec));
    if (codec->codes) backend->ops->release(backend, codec->codes, code_bytes(codec));
}

/* Under the backend lock. */
static int codec_open(struct codec *codec, struct moshi_engine *engine, int batch, int frames,
                      int exact_window)
{
    memset(codec, 0, sizeof *codec);
    codec->engine = engine;
    codec->batch = batch;
    codec->frames = frames;
    struct backend *backend = engine->backend;
    const struct backend_ops *ops = backend->ops;
    int status = mimi_state_create(&codec->state, &engine->model->mimi, backend, batch, frames,
                                   exact_window);
    if (!status) {
        codec->lanes = ops->allocate(backend, (size_t)batch * sizeof(int32_t));
        codec->active = ops->allocate(backend, (size_t)batch);
        codec->pcm = ops->allocate(backend, pcm_bytes(codec));
        codec->codes = ops->allocate(backend, code_bytes(codec));
        if (!codec->lanes || !codec->active || !codec->pcm || !codec->codes)
            status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a codec batch of %d", batch);
    }
    if (status) {
        codec_release(codec);
        return status;
    }
    for (int32_t i = 0; i < batch; ++i) ops->upload(backend, codec->lanes + i, &i, sizeof i);
    ops->clear(backend, codec->active, 1, (size_t)batch);
    return MOSHI_OK;
}

static int check_codec(const struct moshi_engine *engine, int batch)
{
    int status = model_check_process(engine->model);
    if (status) return status;
    if (!engine->model->info.has_mimi)
        return moshi_fail(MOSHI_ERROR_SESSION, "the model was opened without a codec");
    if (batch < 1 || batch > 1024)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "batch is %d, expected 1 to 1024", batch);
    return MOSHI_OK;
}

int samples_are_finite(const float *pcm, size_t samples)
{
    int bad = 0;
    for (size_t i = 0; i < samples; ++i) bad |= !isfinite(pcm[i]);
    return !bad;
}

int check_samples(const float *pcm, size_t samples)
{
    for (size_t i = 0; i < samples; ++i) {
        if (fabsf(pcm[i]) <= MOSHI_MAX_SAMPLE) continue;
        if (isfinite(pcm[i]))
            return moshi_fail(MOSHI_ERROR_AUDIO,
                              "sample %zu is %g, expected -1 to 1 (integers of 16 bits go in as "
                              "int16, or divided by 32768)",
                              i, (double)pcm[i]);
        return moshi_fail(MOSHI_ERROR_AUDIO, "sample %zu is %s, expected finite numbers", i,
                          isnan(pcm[i]) ? "not a number" : "infinite");
    }
    return MOSHI_OK;
}

static int check_sound(const struct moshi_engine *engine, const float *pcm, size_t samples)
{
    if (samples_are_finite(pcm, samples)) return MOSHI_OK;
    return moshi_fail(
        MOSHI_ERROR_CHECKPOINT,
        "%s: the sound of these codes is not finite, expected numbers: the weights are "
        "damaged",
        engine->model->mimi_path);
}

static int check_codes(const struct moshi_engine *engine, const int32_t *codes, size_t count,
                       int n_codes)
{
    const struct mimi_config *config = &engine->model->mimi.config;
    if (n_codes < 1 || n_codes > config->n_q)
        return moshi_fail(MOSHI_ERROR_AUDIO, "%d codebooks given, expected 1 to %d", n_codes,
                          config->n_q);
    for (size_t i = 0; i < count; ++i)
        if (codes[i] < 0 || codes[i] >= config->bins)
            return moshi_fail(MOSHI_ERROR_AUDIO, "code %zu is %d, expected 0 to %d", i, codes[i],
                              config->bins - 1);
    return MOSHI_OK;
}

/* ---- streams ---------------------------------------------------------------------------- */

static int create_stream(struct moshi_engine *engine, int batch, int whole,
                         struct mimi_stream **result)
{
    const int frames = whole ? WHOLE_FRAMES : 1;
    *result = NULL;
    int status = check_codec(engine, batch);
    if (status) return status;
    struct mimi_stream *stream = calloc(1, sizeof *stream);
    if (stream && whole) stream->room = malloc((size_t)frames * MOSHI_MAX_CODEBOOKS * 4);
    if (!stream || (whole && !stream->room)) {
        free(stream);
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a codec stream");
    }
    os_mutex_lock(engine->model->backend_lock);
    status = codec_open(&stream->codec, engine, batch, frames, whole);
    os_mutex_unlock(engine->model->backend_lock);
    if (status) {
        free(stream->room);
        free(stream);
        return status;
    }
    if (!whole) __atomic_add_fetch(&engine->streams, 1, __ATOMIC_RELAXED);
    *result = stream;
    return MOSHI_OK;
}

int mimi_stream_create(struct moshi_engine *engine, int batch, struct mimi_stream **stream)
{
    return create_stream(engine, batch, 0, stream);
}

int mimi_stream_create_whole(struct moshi_engine *engine, struct mimi_stream **stream)
{
    return create_stream(engine, 1, 1, stream);
}

void mimi_stream_destroy(struct mimi_stream *stream)
{
    if (!stream || model_check_process(stream->codec.engine->model)) return;
    struct os_mutex *lock = stream->codec.engine->model->backend_lock;
    os_mutex_lock(lock);
    codec_release(&stream->codec);
    os_mutex_unlock(lock);
    if (!stream->room) __atomic_sub_fetch(&stream->codec.engine->streams, 1, __ATOMIC_RELAXED);
    free(stream->room);
    free(stream);
}

static int enter(struct mimi_stream *stream)
{
    int status = model_check_process(stream->codec.engine->model);
    if (status) return status;
    if (__atomic_exchange_n(&stream->busy, 1u, __ATOMIC_ACQUIRE))
        return moshi_fail(MOSHI_ERROR_SESSION,
                          "the codec stream is in use by another thread; one call at a time");
    return MOSHI_OK;
}

static void leave(struct mimi_stream *stream)
{
    __atomic_store_n(&stream->busy, 0u, __ATOMIC_RELEASE);
}

int mimi_stream_encode(struct mimi_stream *stream, const float *pcm, int32_t *codes)
{
    int status = enter(stream);
    if (status) return status;
    struct codec *codec = &stream->codec;
    struct moshi_engine *engine = codec->engine;
    const struct backend_ops *ops = engine->backend->ops;
    const int levels = engine->model->info.codebooks;
    const size_t samples = (size_t)codec->batch * (size_t)engine->frame_size;
    status = check_samples(pcm, samples);
    if (!status) {
        os_mutex_lock(engine->model->backend_lock);
        for (int lane = 0; lane < codec->batch && !status; ++lane)
            status = mimi_encode_grow(&codec->state, lane, 1);
        ops->upload(engine->backend, codec->pcm, pcm, samples * sizeof *pcm);
        if (!status)
            status = ops->run(engine->backend, STAGE_ENCODE, encode_stage,
                              &(struct codec_call){codec, 1, levels}, sizeof(struct codec_call));
        ops->download(engine->backend, codes, codec->codes,
                      (size_t)codec->batch * (size_t)levels * sizeof *codes);
        if (!status) status = ops->sync(engine->backend);
        os_mutex_unlock(engine->model->backend_lock);
    }
    leave(stream);
    return status;
}

int mimi_stream_decode(struct mimi_stream *stream, const int32_t *codes, int n_codes, float *pcm)
{
    int status = enter(stream);
    if (status) return status;
    struct codec *codec = &stream->codec;
    struct moshi_engine *engine = codec->engine;
    const struct backend_ops *ops = engine->backend->ops;
    const size_t count = (size_t)codec->batch * (size_t)(n_codes > 0 ? n_codes : 0);
    status = check_codes(engine, codes, count, n_codes);
    if (!status) {
        os_mutex_lock(engine->model->backend_lock);
        for (int lane = 0; lane < codec->batch && !status; ++lane)
            status = mimi_decode_grow(&codec->state, lane, 1);
        ops->upload(engine->backend, codec->codes, codes, count * sizeof *codes);
        if (!status)
            status = ops->run(engine->backend, STAGE_DECODE, decode_stage,
                              &(struct codec_call){codec, 1, n_codes}, sizeof(struct codec_call));
        ops->download(engine->backend, pcm, codec->pcm,
                      (size_t)codec->batch * (size_t)engine->frame_size * sizeof *pcm);
        if (!status) status = ops->sync(engine->backend);
        os_mutex_unlock(engine->model->backend_lock);
        if (!status)
            status = check_sound(engine, pcm, (size_t)codec->batch * (size_t)engine->frame_size);
    }
    leave(stream);
    return status;
}

static void reset_lanes(struct codec *codec)
{
    for (int lane = 0; lane < codec->batch; ++lane) mimi_state_reset(&codec->state, lane);
}

int mimi_stream_reset(struct mimi_stream *stream)
{
    int status = enter(stream);
    if (status) return status;
    struct os_mutex *lock = stream->codec.engine->model->backend_lock;
    os_mutex_lock(lock);
    reset_lanes(&stream->codec);
    os_mutex_unlock(lock);
    leave(stream);
    return MOSHI_OK;
}

static void describe(struct mimi_stream *stream, struct snapshot *snapshot)
{
    const struct codec *codec = &stream->codec;
    const struct moshi_engine *engine = codec->engine;
    snapshot_init(snapshot,
                  stream->room ? "moshi-c codec stream of a whole signal" : "moshi-c codec stream");
    snapshot_fact(snapshot, "codec", "%016llx",
                  (unsigned long long)engine->model->mimi_fingerprint);
    snapshot_fact(snapshot, "device", "%s", engine->backend->device);
    snapshot_fact(snapshot, "batch", "%d", codec->batch);
}

static void lane_suffix(int lane, char suffix[16])
{
    snprintf(suffix, 16, ".%d", lane);
}

int mimi_stream_snapshot(struct mimi_stream *stream, void *data, size_t *bytes)
{
    int status = enter(stream);
    if (status) return status;
    struct snapshot snapshot;
    char suffix[16];
    describe(stream, &snapshot);
    for (int lane = 0; lane < stream->codec.batch; ++lane) {
        lane_suffix(lane, suffix);
        mimi_state_list(&stream->codec.state, lane, suffix, &snapshot);
    }
    status = snapshot_write(&snapshot, data, bytes);
    snapshot_free(&snapshot);
    leave(stream);
    return status;
}

int mimi_stream_restore(struct mimi_stream *stream, const void *data, size_t bytes)
{
    int status = enter(stream);
    if (status) return status;
    struct os_mutex *lock = stream->codec.engine->model->backend_lock;
    struct snapshot facts;
    struct tensor_file *file = NULL;
    char suffix[16];
    describe(stream, &facts);
    status = tensor_file_parse(data, bytes, "snapshot", &file);
    if (!status) status = snapshot_check_facts(&facts, file);
    os_mutex_lock(lock);
    reset_lanes(&stream->codec);
    for (int lane = 0; lane < stream->codec.batch && !status; ++lane) {
        lane_suffix(lane, suffix);
        status = mimi_state_make_room(&stream->codec.state, lane, suffix, file);
        if (!status) status = mimi_state_restore(&stream->codec.state, lane, suffix, file);
    }
    if (!status) status = snapshot_finish(file);
    if (status) reset_lanes(&stream->codec);
    os_mutex_unlock(lock);
    tensor_file_close(file);
    snapshot_free(&facts);
    leave(stream);
    return status;
}

/* ---- whole signals ---------------------------------------------------------------------- */

/* Signals of one pass; more would keep sessions waiting. */
#define WHOLE_BATCH 8

/* A pass over up to WHOLE_BATCH whole signals: the state, and codes of one call on the host. */
struct whole {
    struct codec codec;
    int32_t *codes; /* [batch][frames][levels] */
};

static int whole_open(struct whole *whole, struct moshi_engine *engine, int batch, int levels)
{
    const int frames = WHOLE_FRAMES / batch;
    whole->codes = malloc((size_t)batch * (size_t)frames * (size_t)levels * sizeof *whole->codes);
    if (!whole->codes) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a batch of %d", batch);
    os_mutex_lock(engine->model->backend_lock);
    int status = codec_open(&whole->codec, engine, batch, frames, 1);
    os_mutex_unlock(engine->model->backend_lock);
    if (status) free(whole->codes);
    return status;
}

static void whole_close(struct whole *whole)
{
    struct os_mutex *lock = whole->codec.engine->model->backend_lock;
    os_mutex_lock(lock);
    codec_release(&whole->codec);
    os_mutex_unlock(lock);
    free(whole->codes);
}

/* Of each signal in the next pass, with so many to go. The bits don't depend on it. */
static int pass_frames(const struct codec *codec, int64_t left)
{
    struct moshi_engine *engine = codec->engine;
    int shared = __atomic_load_n(&engine->streams, __ATOMIC_RELAXED) > 0;
    os_mutex_lock(engine->lock);
    for (int i = 0; i < engine->max_sessions; ++i) shared |= engine->slots[i] != NULL;
    os_mutex_unlock(engine->lock);
    const int most = shared ? WHOLE_FRAMES_SHARED / codec->batch : codec->frames;
    return left < most ? (int)left : most;
}

/* Element (signal, codebook, frame) of codes[batch][levels][frames]. */
static int64_t code_index(int b, int k, int64_t t, int levels, int64_t frames)
{
    return ((int64_t)b * levels + k) * frames + t;
}

/* The next samples of each signal, which end it unless they are whole frames. room: for the codes of
 * a pass. */
static int encode_passes(struct codec *codec, int32_t *room, const float *pcm, int64_t samples,
                         int32_t *codes)
{
    struct moshi_engine *engine = codec->engine;
    const struct backend_ops *ops = engine->backend->ops;
    struct os_mutex *lock = engine->model->backend_lock;
    const int levels = engine->model->info.codebooks, batch = codec->batch;
    const int64_t frame_size = engine->frame_size, frames = (samples + frame_size - 1) / frame_size;
    int status = MOSHI_OK;
    for (int64_t first = 0, count; first < frames && !status; first += count) {
        count = pass_frames(codec, frames - first);
        int64_t start = first * frame_size, wanted = count * frame_size;
        int64_t have = samples - start < wanted ? samples - start : wanted;
        os_mutex_lock(lock);
        if (have < wanted) ops->clear(engine->backend, codec->pcm, 0, pcm_bytes(codec));
        for (int b = 0; b < batch && !status; ++b) {
            ops->upload(engine->backend, codec->pcm + b * wanted, pcm + b * samples + start,
                        (size_t)have * sizeof *pcm);
            status = mimi_encode_grow(&codec->state, b, (int)count);
        }
        if (!status)
            status = ops->run(engine->backend, STAGE_ENCODE, encode_stage,
                              &(struct codec_call){codec, (int)count, levels},
                              sizeof(struct codec_call));
        ops->download(engine->backend, room, codec->codes,
                      (size_t)batch * (size_t)count * (size_t)levels * sizeof *codes);
        if (!status) status = ops->sync(engine->backend);
        os_mutex_unlock(lock);
        const int32_t *from = room;
        for (int b = 0; b < batch; ++b)
            for (int t = 0; t < count; ++t)
                for (int k = 0; k < levels; ++k)
                    codes[code_index(b, k, first + t, levels, frames)] = *from++;
    }
    return status;
}

static int encode_batch(struct moshi_engine *engine, const float *pcm, int batch, int64_t samples,
                        int32_t *codes)
{
    struct whole whole;
    int status = whole_open(&whole, engine, batch, engine->model->info.codebooks);
    if (status) return status;
    status = encode_passes(&whole.codec, whole.codes, pcm, samples, codes);
    whole_close(&whole);
    return status;
}

static int check_length(int64_t samples)
{
    return samples >= 0 && samples <= INT64_MAX / 8192
               ? MOSHI_OK
               : moshi_fail(MOSHI_ERROR_AUDIO, "%lld samples given, expected 0 or more",
                            (long long)samples);
}

int moshi_mimi_encode(struct moshi_engine *engine, const float *pcm, int batch, int64_t samples,
                      int32_t *codes)
{
    int status = check_codec(engine, batch);
    if (!status) status = check_length(samples);
    if (!status) status = check_samples(pcm, (size_t)batch * (size_t)samples);
    const int64_t frames = (samples + engine->frame_size - 1) / engine->frame_size;
    const int levels = engine->model->info.codebooks;
    for (int b = 0; b < batch && !status; b += WHOLE_BATCH)
        status = encode_batch(engine, pcm + b * samples,
                              batch - b < WHOLE_BATCH ? batch - b : WHOLE_BATCH, samples,
                              codes + code_index(b, 0, 0, levels, frames));
    return status;
}

static int decode_passes(struct codec *codec, int32_t *room, const int32_t *codes, int n_codes,
                         int64_t frames, float *pcm)
{
    struct moshi_engine *engine = codec->engine;
    const struct backend_ops *ops = engine->backend->ops;
    struct os_mutex *lock = engine->model->backend_lock;
    const int64_t frame_size = engine->frame_size;
    const int batch = codec->batch;
    int status = MOSHI_OK;
    for (int64_t first = 0, count; first < frames && !status; first += count) {
        count = pass_frames(codec, frames - first);
        int32_t *to = room;
        for (int b = 0; b < batch; ++b)
            for (int t = 0; t < count; ++t)
                for (int k = 0; k < n_codes; ++k)
                    *to++ = codes[code_index(b, k, first + t, n_codes, frames)];
        os_mutex_lock(lock);
        ops->upload(engine->backend, codec->codes, room,
                    (size_t)batch * (size_t)count * (size_t)n_codes * sizeof *codes);
        for (int b = 0; b < batch && !status; ++b)
            status = mimi_decode_grow(&codec->state, b, (int)count);
        if (!status)
            status = ops->run(engine->backend, STAGE_DECODE, decode_stage,
                              &(struct codec_call){codec, (int)count, n_codes},
                              sizeof(struct codec_call));
        for (int b = 0; b < batch; ++b)
            ops->download(engine->backend, pcm + (b * frames + first) * frame_size,
                          codec->pcm + (int64_t)b * count * frame_size,
                          (size_t)count * (size_t)frame_size * sizeof *pcm);
        if (!status) status = ops->sync(engine->backend);
        os_mutex_unlock(lock);
    }
    return status;
}

static int decode_batch(struct moshi_engine *engine, const int32_t *codes, int batch, int n_codes,
                        int64_t frames, float *pcm)
{
    struct whole whole;
    int status = whole_open(&whole, engine, batch, n_codes);
    if (status) return status;
    status = decode_passes(&whole.codec, whole.codes, codes, n_codes, frames, pcm);
    whole_close(&whole);
    return status;
}

static int check_frames(int64_t frames)
{
    return frames >= 0 && frames <= INT64_MAX / ((int64_t)1 << 32)
               ? MOSHI_OK
               : moshi_fail(MOSHI_ERROR_AUDIO, "%lld frames given, expected 0 or more",
                            (long long)frames);
}

int moshi_mimi_decode(struct moshi_engine *engine, const int32_t *codes, int batch, int n_codes,
                      int64_t frames, float *pcm)
{
    int status = check_codec(engine, batch);
    if (!status) status = check_frames(frames);
    if (!status)
        status = check_codes(engine, codes,
                             n_codes > 0 ? (size_t)batch * (size_t)n_codes * (size_t)frames : 0,
                             n_codes);
    for (int b = 0; b < batch && !status; b += WHOLE_BATCH)
        status = decode_batch(engine, codes + code_index(b, 0, 0, n_codes, frames),
                              batch - b < WHOLE_BATCH ? batch - b : WHOLE_BATCH, n_codes, frames,
                              pcm + b * frames * engine->frame_size);
    if (!status)
        status = check_sound(engine, pcm,
                             (size_t)batch * (size_t)frames * (size_t)engine->frame_size);
    return status;
}

/* ---- whole signals in pieces ------------------------------------------------------------ */

static int enter_whole(struct mimi_stream *stream)
{
    if (!stream->room)
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "the codec stream goes frame by frame, expected one for a whole signal");
    return enter(stream);
}

int mimi_stream_encode_piece(struct mimi_stream *stream, const float *pcm, int64_t samples,
                             int32_t *codes)
{
    int status = enter_whole(stream);
    if (status) return status;
    status = check_length(samples);
    if (!status) status = check_samples(pcm, (size_t)samples);
    if (!status) status = encode_passes(&stream->codec, stream->room, pcm, samples, codes);
    leave(stream);
    return status;
}

int mimi_stream_decode_piece(struct mimi_stream *stream, const int32_t *codes, int n_codes,
                             int64_t frames, float *pcm)
{
    int status = enter_whole(stream);
    if (status) return status;
    const struct moshi_engine *engine = stream->codec.engine;
    status = check_frames(frames);
    if (!status)
        status = check_codes(engine, codes, n_codes > 0 ? (size_t)n_codes * (size_t)frames : 0,
                             n_codes);
    if (!status) status = decode_passes(&stream->codec, stream->room, codes, n_codes, frames, pcm);
    if (!status) status = check_sound(engine, pcm, (size_t)frames * (size_t)engine->frame_size);
    leave(stream);
    return status;
}
