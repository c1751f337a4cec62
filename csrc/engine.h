/* engine.h: what the sessions of a model share, and the tick.
 *
 * A step is a submit and a wait. One thread of the engine runs ticks: it takes every session that
 * has submitted, and steps them together: encode, language model, decode. A session's slot is its
 * row of all state tables. Operations, and whatever changes which pages a lane has, happen only under
 * the model's backend_lock; the list of submissions is guarded by `lock`. */
#ifndef MOSHI_ENGINE_H
#define MOSHI_ENGINE_H

#include "model.h"
#include "refresh.h"

enum session_phase { SESSION_IDLE, SESSION_SUBMITTED, SESSION_RUNNING, SESSION_DONE };

struct moshi_session {
    struct moshi_engine *engine;
    int slot;
    struct moshi_session_options options; /* the pointers in it are not kept */
    struct slot_params params;
    float *condition; /* [2][D]: conditional and null sums; NULL without conditions */
    int64_t index;    /* frames stepped */
    uint32_t busy;    /* atomic: a caller is between submit and wait */
    int dead;         /* a backend error ended this session */
    /* the frame in flight, written by the caller, read by the tick */
    enum session_phase phase; /* under engine->lock */
    int has_pcm;
    float *pcm; /* [frame_size] */
    int32_t user_codes[MOSHI_MAX_CODEBOOKS];
    struct moshi_frame *frame;
    double submitted_s;
    int status;
    char sentence[512];
    struct os_event
        *event; /* set when the frame is done; NULL until asked for; under engine->lock */
    /* policy */
    int32_t *forced; /* queue of text tokens: forced[forced_first .. forced_end-1] */
    int forced_first, forced_end, forced_capacity; /* first: atomic, asked for during a tick */
    /* Teacher forcing: what the next steps store instead of what they would sample, or TOKEN_FREE. As
     * many steps as the longest delay has, and at least one. */
    int next_steps;
    int32_t *next_text; /* [next_steps] */
    int32_t *next_audio; /* [next_steps][dep_q] */
    struct refresh *refresh; /* NULL: the context is a ring */
    float *logits; /* [text_card + dep_q * card], with keep_logits */
    int has_logits;
};

struct moshi_engine {
    struct moshi_model *model;
    struct backend *backend;
    int max_sessions;
    struct lm_state lm;
    struct mimi_state mimi; /* only with a codec */
    struct moshi_session **slots; /* [max_sessions], NULL: free; under lock */
    int streams; /* of the codec that are open; atomic */
    int frame_size, user_q, dep_q, decode_q;

    struct os_mutex *lock;
    struct os_condition *submitted, *done;
    struct os_thread *thread;
    int stop, pending;
    int ticking; /* a tick runs or waits for the backend */
    struct moshi_engine_stats stats; /* under lock */

    /* one tick; host arrays of max_sessions rows, then device arrays */
    struct moshi_session **batch, **stepping, **subset;
    int32_t *row_slots, *user, *codes;
    struct slot_params *params; /* [max_sessions] by slot */
    char *results; /* what the step gave: lm.results and what lies behind them */
    uint8_t *guided; /* rows of sessions with a null half */
    uint8_t *heard, *spoken; /* rows whose samples are encoded, whose codes are decoded */
    uint8_t *renewing; /* [max_sessions] slots with a pass of a refresh to make after the tick */
    int next_renewed; /* slot */
    float *sound; /* [rows][frame_size] */
    int32_t *row_lane; /* device, rows of a codec pass */
    uint8_t *row_active; /* device, all ones */
    uint8_t *row_heard, *row_spoken; /* device */
    int32_t *device_codes; /* device, [rows][MOSHI_MAX_CODEBOOKS], behind lm.results */
    float *pcm; /* device, [rows][frame_size], behind device_codes */
};

/* MOSHI_ERROR_AUDIO when a sample is not finite or beyond MOSHI_MAX_SAMPLE; codec.c. */
int check_samples(const float *pcm, size_t samples);
/* Whether all are numbers; what a codec of absurd weights makes may be none. */
int samples_are_finite(const float *pcm, size_t samples);

/* Whether it steps a null half beside its own. */
static inline int session_is_guided(const struct moshi_session *session)
{
    return session->params.cfg_coef != 1.0f;
}

/* Makes it the only call on the session until session_leave; else MOSHI_ERROR_SESSION. */
int session_enter(struct moshi_session *session);
void session_leave(struct moshi_session *session);
/* MOSHI_ERROR_ARGUMENT unless the model can say them: as text, in audio stream k. */
int session_check_text(const struct moshi_session *session, int32_t token);
int session_check_code(const struct moshi_session *session, int k, int32_t code);
/* Steps a frame by codes in a session that was entered and stays so. */
int session_step_entered(struct moshi_session *session, const int32_t *codes,
                         struct moshi_frame *frame);
/* Nothing is left to be forced but the queue of text. */
void session_free_next(struct moshi_session *session, int first_step);
/* The frame in flight ends with the failure that was just recorded. */
void session_fail(struct moshi_session *session, int status);
/* And every later call is refused with its sentence. */
void session_end(struct moshi_session *session, int status);

/* Uploads a session's settings for given frames, which force nothing. */
void engine_upload_params(struct moshi_engine *engine, struct moshi_session *session);
/* For who uses the backend in many short pieces: lets a tick that is due go first. Without the
 * backend's lock. */
void engine_give_way(struct moshi_engine *engine);
/* Whether another session than this one is open. */
int engine_is_shared(struct moshi_engine *engine, const struct moshi_session *session);

#endif
