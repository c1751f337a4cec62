/* moshi.h: the public C interface of moshi-c.
 *
 * Moshi is a full-duplex spoken dialogue model. Every 80 ms a session takes one frame of what the
 * user says (frame_size float samples, 24 kHz mono, nominal range -1..1) and gives one frame of
 * what the model says, together with a text token and the codes of both sides.
 *
 * Objects. A model is immutable after open and may be shared by threads. An engine belongs to a
 * model and owns what sessions share: slots, key/value pages, the thread that runs the ticks. A
 * session is one conversation; it may be used from one thread at a time (a second one gets
 * MOSHI_ERROR_SESSION at once). A mimi_stream is the codec alone. Each object borrows the one above
 * it, which must outlive it. Destroy and close accept NULL.
 *
 * Fork. A forked child has the memory of these objects, but not the threads behind them. There every
 * call that would work gives MOSHI_ERROR_SESSION; destroy and close do nothing, since the memory is
 * shared with the parent and goes with the process. The parent goes on undisturbed, and a model that
 * the child opens itself is like any other.
 *
 * Errors. Functions return MOSHI_OK or a negative status; moshi_error_detail() then holds one
 * sentence (what, found, expected) for the calling thread. Nothing here prints, exits or aborts.
 */
#ifndef MOSHI_H
#define MOSHI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MOSHI_API __attribute__((visibility("default")))
#else
#define MOSHI_API
#endif

#define MOSHI_MAX_CODEBOOKS 64 /* audio streams of one model, both sides together */
#define MOSHI_MAX_HEADS 16     /* extra heads (e.g. the pause detector of STT models) */
#define MOSHI_MAX_HEAD_DIM 32  /* classes of one extra head */

enum moshi_status {
    MOSHI_OK = 0,
    MOSHI_ERROR_CHECKPOINT = -1, /* a file or its contents */
    MOSHI_ERROR_DEVICE = -2,     /* the machine: no such device, not enough memory */
    MOSHI_ERROR_AUDIO = -3,      /* samples or codes given by the caller */
    MOSHI_ERROR_SESSION = -4,    /* a session in the wrong state: busy, closed, no free slot */
    MOSHI_ERROR_ARGUMENT = -5,   /* an option out of range */
    MOSHI_ERROR_MEMORY = -6,     /* an allocation failed */
    MOSHI_ERROR_INTERNAL = -7    /* a promise of ours was broken */
};

/* The sentence recorded by the last failure on this thread; "" when there was none. The pointer
 * stays valid until the next call into the library on this thread. */
MOSHI_API const char *moshi_error_detail(void);

MOSHI_API const char *moshi_version(void);

/* fp8, which is e4m3fn, and int8: one scale a row; q8, q4: one scale for 32 weights. Those four are for
 * the language model's matrices; embeddings and norms stay as stored. A file that holds int8, q8 or q4
 * already opens as MOSHI_AUTO, or as what it holds; fp8 and published int8 as any of them. */
enum moshi_dtype {
    MOSHI_AUTO = 0,
    MOSHI_F32,
    MOSHI_F16,
    MOSHI_BF16,
    MOSHI_FP8,
    MOSHI_INT8,
    MOSHI_Q8,
    MOSHI_Q4
};

/* "f32", "bf16", ...; "auto" for MOSHI_AUTO. */
MOSHI_API const char *moshi_dtype_name(enum moshi_dtype dtype);
/* The reverse; MOSHI_ERROR_ARGUMENT for a name that is not supported. */
MOSHI_API int moshi_dtype_parse(const char *name, enum moshi_dtype *dtype);

/* ---- devices ---------------------------------------------------------------------------- */

struct moshi_device {
    char name[16];        /* "cpu", "cuda:0" */
    char description[96]; /* the processor's instruction set in use, or the card's name */
    int64_t memory_bytes; /* physical memory, 0 if unknown */
    int usable;
    char reason[160]; /* why not, when not usable */
};

/* Fills up to `capacity` entries, returns how many there are. */
MOSHI_API int moshi_devices(struct moshi_device *devices, int capacity);

/* What the machine can do at best, with so many threads. */
struct moshi_limits {
    double read_bytes_s; /* reading memory that no cache holds */
    double flops_s; /* f32, two for each multiply-add, with the vectors that the kernels use */
};

/* Measures both in turn for about that long, and keeps the best. threads: 0 is one per core. Takes
 * 512 MiB meanwhile. */
MOSHI_API int moshi_measure(int threads, double seconds, struct moshi_limits *limits);

/* ---- model ------------------------------------------------------------------------------ */

struct moshi_model;

/* Zero-initialise, then set what differs. Paths are UTF-8 and copied. */
struct moshi_model_options {
    const char *folder; /* laid out like a published repository; NULL if all paths given */
    const char *config_path; /* default: folder/config.json; without it the built-in 7B config */
    const char *lm_path; /* .safetensors or .safetensors.index.json; default: by config */
    const char *mimi_path; /* default: by config (mimi_name) */
    const char *mimi_config_path; /* default: by config (mimi_config_name), else the built-in one */
    const char *device; /* "cpu", "cuda", "cuda:1"; "auto" and NULL: a card that can hold it */
    enum moshi_dtype dtype; /* of the language model's matrices; MOSHI_AUTO: as stored */
    enum moshi_dtype
        mimi_dtype; /* of the codec's large matrices: MOSHI_AUTO and MOSHI_F32 are f32, MOSHI_BF16,
                                    MOSHI_INT8; its activations are f32 */
    int mimi_codebooks; /* 1..32; 0: as many as the language model's larger side, else 8 */
    int threads; /* 0: MOSHI_C_THREADS, else one per core */
    int codec_only; /* open Mimi alone; lm_path and config_path are ignored */
    /* Read the files instead of mapping them. A mapped file that another process cuts short ends this
     * one (SIGBUS) when the missing pages are read; the codec's file is never mapped for long. */
    int copy_weights;
    /* Read all weights of the language model once, and refuse one that is not finite. Without it, such
     * a weight ends the sessions whose logits it reaches. Those of the codec and of fp8 are always
     * checked. */
    int check_weights;
};

/* What a caller needs to know about an open model. Strings live as long as the model. */
struct moshi_model_info {
    const char *family; /* "moshi", "hibiki", "stt", "tts", "personaplex"; "mimi" without an LM */
    const char *device; /* "cpu" */
    const char *dtype; /* of the LM's matrices: "f32" to "q4"; "" without an LM */
    const char *mimi_dtype; /* of the codec's large matrices: "f32", "bf16", "int8"; "" without */
    const char *lm_path, *mimi_path, *config_path; /* NULL where not used */
    int threads; /* that its operations use */
    int has_lm, has_mimi;
    int sample_rate; /* Hz */
    int frame_size; /* samples of one frame (1920) */
    double frame_rate; /* frames a second (12.5) */
    int codebooks; /* of the codec as opened */
    int codebook_size; /* entries of one codebook */
    int n_q, dep_q; /* audio streams read; audio streams written */
    int user_q; /* audio streams of the user, n_q - dep_q */
    int card; /* audio vocabulary, without the initial token */
    int text_card_in, text_card; /* text vocabulary read and written, without the initial token */
    int max_delay; /* frames before the first output */
    int context; /* frames remembered by default */
    int text_padding_id, text_end_padding_id;
    int heads, head_dim; /* extra heads */
    int has_conditions; /* condition tables exist; what a session does not name gets the padding */
    float text_temperature, audio_temperature; /* the checkpoint's defaults, else upstream's */
    int text_top_k, audio_top_k;
    int64_t parameters; /* of LM and codec */
    int64_t weight_bytes; /* in the format they are read in each frame */
    int64_t mapped_bytes; /* of these, pages shared with the files */
    /* What one frame reads of them, in each stage, and the codec's f32 operations, two for each
     * multiply-add. */
    int64_t encode_bytes, temporal_bytes, depth_bytes, decode_bytes;
    int64_t encode_flops, decode_flops;
};

MOSHI_API int moshi_model_open(const struct moshi_model_options *options,
                               struct moshi_model **model);
MOSHI_API void moshi_model_close(struct moshi_model *model);
MOSHI_API const struct moshi_model_info *moshi_model_get_info(const struct moshi_model *model);
/* delays[n_q + 1], text first. */
MOSHI_API const int *moshi_model_delays(const struct moshi_model *model);
/* The i-th condition's name (e.g. "description"), NULL past the last; its j-th possible value. */
MOSHI_API const char *moshi_model_condition_name(const struct moshi_model *model, int i);
MOSHI_API const char *moshi_model_condition_value(const struct moshi_model *model, int i, int j);

/* ---- conversion ------------------------------------------------------------------------- */

/* A language model in another weight format, as the parts of one .safetensors file: part 0 is its
 * header, each other one a tensor, in the order in which they follow each other. A part is made when
 * it is read, which takes about its memory once more. One thread at a time. */
struct moshi_conversion;

/* Of the options lm_path, config_path, folder, threads and dtype count, of which MOSHI_AUTO is an
 * error. MOSHI_ERROR_CHECKPOINT also for a file that has nothing to convert. */
MOSHI_API int moshi_conversion_open(const struct moshi_model_options *options,
                                    struct moshi_conversion **conversion);
MOSHI_API void moshi_conversion_close(struct moshi_conversion *conversion);
MOSHI_API int moshi_conversion_count(const struct moshi_conversion *conversion);
MOSHI_API int64_t moshi_conversion_bytes(const struct moshi_conversion *conversion, int part);
/* Writes the bytes of a part. MOSHI_ERROR_CHECKPOINT when a block format can't hold a weight. */
MOSHI_API int moshi_conversion_read(struct moshi_conversion *conversion, int part, void *to);

/* ---- engine ----------------------------------------------------------------------------- */

struct moshi_engine;

struct moshi_engine_options {
    int max_sessions; /* 0: 8 */
    /* MOSHI_AUTO: f32 for f32 weights, else bf16. MOSHI_INT8 has one scale for each head and
     * position, and remembers twice as much in the memory of bf16. */
    enum moshi_dtype kv_dtype;
    int context; /* frames remembered; 0: the checkpoint's */
};

MOSHI_API int moshi_engine_create(struct moshi_model *model,
                                  const struct moshi_engine_options *options,
                                  struct moshi_engine **engine);
/* Ends the ticks; sessions still open refuse further steps and must still be destroyed, codec
 * streams must be destroyed before. No thread may be inside a call on this engine. */
MOSHI_API void moshi_engine_destroy(struct moshi_engine *engine);

struct moshi_memory {
    int64_t weights_bytes; /* mapped or private */
    /* One session with its context full: its keys and values, its history, and its part of what the
     * engine works with; so many times max_sessions is what the engine takes. With guidance a session
     * has the keys and values of two. */
    int64_t session_bytes;
    int64_t kv_bytes; /* of these, what each of its frames then reads beside the weights */
    int64_t session_used_bytes; /* committed by all open sessions now */
    int64_t free_bytes; /* available on the device */
};
MOSHI_API int moshi_engine_memory(struct moshi_engine *engine, struct moshi_memory *memory);

/* Where the time of all ticks so far went, in seconds; all of it is other_s where a tick is one graph. */
struct moshi_engine_stats {
    int64_t ticks, frames; /* frames >= ticks when sessions share ticks */
    double encode_s, temporal_s, depth_s, decode_s, other_s;
};
MOSHI_API int moshi_engine_get_stats(struct moshi_engine *engine, struct moshi_engine_stats *stats);

/* ---- session ---------------------------------------------------------------------------- */

struct moshi_session;

struct moshi_condition {
    const char *name; /* e.g. "description" */
    const char *value; /* one of the model's values; NULL: the learnt padding */
};

enum moshi_start {
    /* As upstream's live server: the codec is cleared after the first frame, whose codes fall into
     * the slot that the model never sees. */
    MOSHI_START_LIVE = 0,
    /* As upstream's offline script: the first frame is stepped twice, nothing is cleared. */
    MOSHI_START_OFFLINE = 1
};

/* What becomes of a call that is longer than what the model remembers. */
enum moshi_context_policy {
    /* As upstream: the oldest frame is forgotten, positions go on. */
    MOSHI_CONTEXT_RING = 0,
    /* Before the range that the model was trained on ends, the context is read anew from the tokens of
     * the last frames, as that of a conversation which began there. At a pause, if there is one once
     * 80 % of the range are used; meanwhile steps go on. Nothing else in the engine has to wait for
     * it, except with guidance. The frame from which on the new context is used depends on nothing
     * but this conversation; where a step asks for no pcm, the model's voice counts as silent. */
    MOSHI_CONTEXT_REFRESH = 1
};

/* Fill by moshi_session_options_init, then change what differs. */
struct moshi_session_options {
    uint64_t seed;
    float text_temperature, audio_temperature; /* <= 0 is greedy */
    int text_top_k, audio_top_k; /* <= 0: the whole vocabulary */
    float cfg_coef; /* guidance: null + (cond - null) * cfg_coef; 1 is off */
    int cfg_masked_until; /* null half reads zeros while offset <= delay + this; -1: off */
    int cfg_no_text; /* null half never reads text; text logits come from the cond half */
    const struct moshi_condition *conditions; /* what is not named gets the learnt padding */
    int n_conditions;
    const struct moshi_condition *null_conditions; /* of the null half */
    int n_null_conditions;
    enum moshi_start start;
    int keep_logits;
    enum moshi_context_policy context_policy;
    int context_range; /* frames that the model was trained on; 0: the checkpoint's context */
    int context_keep; /* frames that a refresh keeps; 0: half of the range or context */
};

MOSHI_API void moshi_session_options_init(const struct moshi_model *model,
                                          struct moshi_session_options *options);
MOSHI_API int moshi_session_create(struct moshi_engine *engine,
                                   const struct moshi_session_options *options,
                                   struct moshi_session **session);
MOSHI_API void moshi_session_destroy(struct moshi_session *session);
/* The seed in use. */
MOSHI_API uint64_t moshi_session_seed(const struct moshi_session *session);

enum moshi_event {
    MOSHI_EVENT_NONE = 0,
    MOSHI_EVENT_CONTEXT_80, /* this frame is the one that fills 80 % of the context_range */
    MOSHI_EVENT_REFRESH_BEGIN, /* after this frame a new context is being read */
    MOSHI_EVENT_REFRESH_END /* this frame is the first one with it */
};

/* One frame of output. The caller sets `pcm` (frame_size floats, or NULL for no decoding); the
 * rest is filled in. */
struct moshi_frame {
    float *pcm;
    int64_t index; /* frames stepped before this one */
    int has_output; /* 0 for the first max_delay frames: text_token -1, n_codes 0, pcm silent */
    int32_t text_token; /* -1 before the first output */
    int n_codes; /* dep_q once there is output */
    int32_t codes[MOSHI_MAX_CODEBOOKS];
    int n_user_codes;
    int32_t user_codes[MOSHI_MAX_CODEBOOKS];
    float level_db; /* RMS of the user's frame in dBFS, floor -120; -120 when stepped by codes */
    int n_heads; /* extra heads; each is a softmax over head_dim classes */
    float heads[MOSHI_MAX_HEADS][MOSHI_MAX_HEAD_DIM];
    enum moshi_event event;
    double step_s; /* from submit to done */
};

/* Samples lie in -1..1; what is louder is taken up to this. Beyond it they are no sound but 16-bit
 * integers in the wrong type, or damage. */
#define MOSHI_MAX_SAMPLE 100.0f

/* pcm: frame_size floats. Samples that are not finite, or beyond MOSHI_MAX_SAMPLE, give
 * MOSHI_ERROR_AUDIO and change nothing. MOSHI_ERROR_MEMORY: the device has none for a longer context,
 * or for this session's own copy of one that a fork shares. Then nothing has changed either, and the
 * frame can be given again; only a session with guidance that would have renewed its context ends. */
MOSHI_API int moshi_session_step(struct moshi_session *session, const float *pcm,
                                 struct moshi_frame *frame);
/* codes: user_q of them, 0..card (card itself is the initial or end token), skipping the encoder. */
MOSHI_API int moshi_session_step_codes(struct moshi_session *session, const int32_t *codes,
                                       struct moshi_frame *frame);
/* One batched step of `count` sessions of one engine; exactly one of pcms, codes is not NULL. Either
 * all sessions step or none does, except for one that has no memory (see above). */
MOSHI_API int moshi_sessions_step(struct moshi_session *const *sessions, int count,
                                  const float *const *pcms, const int32_t *const *codes,
                                  struct moshi_frame *frames);
/* The two halves of a step, for callers with their own event loop. `frame` must stay valid between
 * them. moshi_session_wait blocks; moshi_session_ready tells whether it would not. */
MOSHI_API int moshi_session_submit(struct moshi_session *session, const float *pcm,
                                   struct moshi_frame *frame);
MOSHI_API int moshi_session_ready(struct moshi_session *session);
MOSHI_API int moshi_session_wait(struct moshi_session *session);

/* For an event loop: a descriptor of the session's, readable from the moment a submitted frame is
 * done until moshi_session_wait has taken it. It belongs to the session. */
MOSHI_API int moshi_session_descriptor(struct moshi_session *session, int *descriptor);
/* Takes a submitted frame back. 1: it has not been stepped and nothing is to be waited for; 0: too
 * late, or nothing was submitted. */
MOSHI_API int moshi_session_withdraw(struct moshi_session *session);

/* Appends tokens that the inner monologue takes from the next frame on, one a frame. */
MOSHI_API int moshi_session_force_text(struct moshi_session *session, const int32_t *tokens,
                                       int count);
/* How many of them are still to come; may be asked between submit and wait. */
MOSHI_API int moshi_session_forced_left(struct moshi_session *session);
/* Teacher forcing: the next step reads and stores these instead of what it would sample. text < 0
 * or audio == NULL leave that part free. audio: dep_q codes. */
MOSHI_API int moshi_session_force_next(struct moshi_session *session, int32_t text,
                                       const int32_t *audio);
/* Steps `frames` frames of which every token is known, many in one pass: the state becomes that of as
 * many steps by these codes that were forced to say these tokens, without a voice, bit for bit.
 * text_tokens[frames], codes[dep_q][frames], user_codes[user_q][frames], frame by frame as a recording
 * has them: what belongs to one moment stands in one column, whatever the model's delays. Of the
 * streams that are late the last codes are said by the next steps. Tokens of moments from before the
 * first frame which those streams have still to say are chosen as ever, by steps. The codec hears and
 * says nothing of it. Where context_range leaves no time to wait for a pause, a refresh is made at the
 * end, without an event. said[frames] (may be NULL): the text tokens that these steps give out, -1 before
 * the first output. MOSHI_ERROR_ARGUMENT or _AUDIO when a token is missing or out of range; then
 * nothing has changed. There are no logits afterwards. */
MOSHI_API int moshi_session_prefill(struct moshi_session *session, int frames,
                                    const int32_t *text_tokens, const int32_t *codes,
                                    const int32_t *user_codes, int32_t *said);
/* Logits of the last step, after guidance: text[text_card], audio[dep_q][card]. Either may be NULL.
 * Needs keep_logits. */
MOSHI_API int moshi_session_logits(struct moshi_session *session, float *text, float *audio);
/* Back to the state after create; the seed stays unless new_seed is given. */
MOSHI_API int moshi_session_reset(struct moshi_session *session, const uint64_t *new_seed);

/* Another session of the same engine in the same state, with the same random numbers to come unless
 * new_seed is given. Keys and values are shared until one of the two writes, so it costs little. */
MOSHI_API int moshi_session_fork(struct moshi_session *session, const uint64_t *new_seed,
                                 struct moshi_session **fork);

/* The whole state of a session as the bytes of a safetensors file: fields by name, of keys and
 * values those that can still be seen, random numbers to come included. With data == NULL, *bytes
 * becomes the size, which holds until the next step; else *bytes is the room at `data`, and too
 * little is MOSHI_ERROR_ARGUMENT. `note` (may be NULL) is kept beside the state for the caller. */
MOSHI_API int moshi_session_snapshot(struct moshi_session *session, const void *note,
                                     size_t note_bytes, void *data, size_t *bytes);
/* A session that goes on where the snapshot was taken: bit for bit with the same kernels, within
 * rounding with others. The snapshot may come from a stranger. MOSHI_ERROR_CHECKPOINT when it is
 * damaged, or of another format version, model, device, dtype or context; models are told apart by
 * configs, tensor tables and a few bytes of every tensor. *note points into `data`
 * (NULL without one). */
MOSHI_API int moshi_session_restore(struct moshi_engine *engine, const void *data, size_t bytes,
                                    struct moshi_session **session, const void **note,
                                    size_t *note_bytes);

/* ---- codec alone ------------------------------------------------------------------------ */

struct mimi_stream;

MOSHI_API int mimi_stream_create(struct moshi_engine *engine, int batch,
                                 struct mimi_stream **stream);
MOSHI_API void mimi_stream_destroy(struct mimi_stream *stream);
/* pcm[batch][frame_size] -> codes[batch][codebooks] */
MOSHI_API int mimi_stream_encode(struct mimi_stream *stream, const float *pcm, int32_t *codes);
/* codes[batch][n_codes] -> pcm[batch][frame_size]; 1 <= n_codes <= codebooks in the file */
MOSHI_API int mimi_stream_decode(struct mimi_stream *stream, const int32_t *codes, int n_codes,
                                 float *pcm);
MOSHI_API int mimi_stream_reset(struct mimi_stream *stream);
/* As moshi_session_snapshot. mimi_stream_restore puts the state into an open stream of the same codec
 * and batch; on failure the stream is reset. */
MOSHI_API int mimi_stream_snapshot(struct mimi_stream *stream, void *data, size_t *bytes);
MOSHI_API int mimi_stream_restore(struct mimi_stream *stream, const void *data, size_t bytes);

/* Whole signals, equal to upstream's non-streaming calls. pcm[batch][samples] is padded with zeros
 * to a whole frame; frames = ceil(samples / frame_size); codes[batch][codebooks][frames]. */
MOSHI_API int moshi_mimi_encode(struct moshi_engine *engine, const float *pcm, int batch,
                                int64_t samples, int32_t *codes);
/* codes[batch][n_codes][frames] -> pcm[batch][frames * frame_size] */
MOSHI_API int moshi_mimi_decode(struct moshi_engine *engine, const int32_t *codes, int batch,
                                int n_codes, int64_t frames, float *pcm);

/* A stream that takes whole signals in pieces of any length, in memory that does not grow with them:
 * codes and sound are those of moshi_mimi_encode and moshi_mimi_decode, bit for bit. */
MOSHI_API int mimi_stream_create_whole(struct moshi_engine *engine, struct mimi_stream **stream);
/* pcm[samples] -> codes[codebooks][frames]. A piece of whole frames may be followed by another; the
 * last frame of one that is not is filled with zeros, and ends the signal. */
MOSHI_API int mimi_stream_encode_piece(struct mimi_stream *stream, const float *pcm,
                                       int64_t samples, int32_t *codes);
/* codes[n_codes][frames] -> pcm[frames * frame_size] */
MOSHI_API int mimi_stream_decode_piece(struct mimi_stream *stream, const int32_t *codes,
                                       int n_codes, int64_t frames, float *pcm);

/* ---- Opus in Ogg ------------------------------------------------------------------------ */

/* Streams of the voice protocols: mono float samples at 8000, 12000, 16000, 24000 or 48000 Hz on one
 * side, bytes in pieces of any size on the other. A model is not needed. One thread at a time for each
 * reader and writer. */
struct moshi_opus_reader;
struct moshi_opus_writer;

MOSHI_API int moshi_opus_reader_create(int rate, struct moshi_opus_reader **reader);
MOSHI_API void moshi_opus_reader_destroy(struct moshi_opus_reader *reader);
/* Takes bytes of the stream, which moves *data and *bytes on, and gives up to `capacity` samples. To
 * be repeated until *samples is 0; then *bytes is 0 too, and the reader waits for more.
 *
 * Nothing is dropped in front, the pre-skip neither: a packet gives all of its samples at once, so
 * that frames of a live stream end where packets end. The last page's granule cuts the end.
 *
 * What the network does to a stream costs that part of it alone: damaged bytes are skipped up to the
 * next whole page, a damaged packet is replaced by what the decoder makes up for it, missing pages
 * too, up to a second. A stream joined in the middle is decoded from its next packet on. Streams may
 * follow each other. Mono and stereo, which is mixed; samples beyond -1..1 are clipped.
 *
 * MOSHI_ERROR_AUDIO ends this reader: more than two channels, or no good packet in the last 128 KiB,
 * or in the last 50. */
MOSHI_API int moshi_opus_reader_append(struct moshi_opus_reader *reader, const uint8_t **data,
                                       size_t *bytes, float *pcm, size_t capacity, size_t *samples);
/* Samples that a player of the whole stream drops in front; 0 before its OpusHead. */
MOSHI_API int moshi_opus_reader_pre_skip(const struct moshi_opus_reader *reader);

struct moshi_opus_counts {
    int64_t packets; /* decoded */
    int64_t lost; /* pages that never came, by the numbers of those that did */
    int64_t
        damaged; /* packets that could not be decoded, and stretches of bytes that are no page */
};
MOSHI_API struct moshi_opus_counts moshi_opus_reader_counts(const struct moshi_opus_reader *reader);

/* serial: of the Ogg stream. The first bytes are the pages OpusHead and OpusTags, then comes a page
 * for each 40 ms, at once, so that a frame of 80 ms leaves nothing behind. */
MOSHI_API int moshi_opus_writer_create(int rate, uint32_t serial,
                                       struct moshi_opus_writer **writer);
MOSHI_API void moshi_opus_writer_destroy(struct moshi_opus_writer *writer);
/* Takes samples, which moves *pcm and *samples on, and gives up to `capacity` bytes. To be repeated
 * until *bytes is 0; then *samples is 0 too. Samples that are not finite, or beyond MOSHI_MAX_SAMPLE,
 * give MOSHI_ERROR_AUDIO before any is taken. */
MOSHI_API int moshi_opus_writer_append(struct moshi_opus_writer *writer, const float **pcm,
                                       size_t *samples, uint8_t *data, size_t capacity,
                                       size_t *bytes);
/* Ends the stream: the rest, filled up with silence, and a last page whose granule is exact. To be
 * repeated until *bytes is 0. */
MOSHI_API int moshi_opus_writer_close(struct moshi_opus_writer *writer, uint8_t *data,
                                      size_t capacity, size_t *bytes);

#ifdef __cplusplus
}
#endif
#endif
