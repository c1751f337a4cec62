/* lm.h: the language model over streams of tokens: one text stream (the inner monologue), dep_q
 * audio streams it writes, and the user's. One step: the delay cache gives the input tokens, the
 * temporal transformer reads their summed embeddings, the text token is sampled, the depth
 * transformer writes the audio codes, the delay cache gives the undelayed output.
 *
 * Source: moshi/models/lm.py (LMModel, LMGen) of the moshi Python package. */
#ifndef MOSHI_LM_H
#define MOSHI_LM_H

#include "backend.h"
#include "depth.h"
#include "snapshot.h"
#include "state.h"
#include "transformer.h"
#include "weights.h"

struct lm_condition {
    float *embedding; /* [bins + 1][dim], host */
    float *projection; /* [D][dim], host */
    float *padding;   /* [D], host: what an absent condition adds */
};

struct lm {
    struct lm_config config;
    struct embedding audio_embedding[MOSHI_MAX_CODEBOOKS]; /* [n_q] */
    struct embedding text_embedding;
    struct transformer temporal;
    struct norm out_norm;
    struct matrix text_head; /* [text_card_out][D] */
    const float *text_head_bias;
    struct depth depth;
    struct matrix heads[MOSHI_MAX_HEADS]; /* [head_dim][D] */
    struct lm_condition conditions[CONFIG_MAX_CONDITIONS];
};

/* Takes over `config` (and frees it in lm_free, also after a failure). */
int lm_load(struct lm *lm, const struct lm_config *config, struct weight_loader *loader);
void lm_free(struct lm *lm);
/* Bytes of matrices that the temporal stage of a frame reads. */
int64_t lm_temporal_bytes(const struct lm *lm);

/* sum[D] of all summed conditions: those named in `given`, the learnt padding for the rest. */
int lm_condition_sum(const struct lm *lm, const struct moshi_condition *given, int n_given,
                     float *sum);

/* State of `slots` conversations and scratch of the step. A slot has two lanes: lane s is its own
 * (or conditional) half, lane slots + s the null half of a guided session. */
struct lm_state {
    const struct lm *lm;
    struct backend *backend;
    int slots, lanes; /* lanes = 2 * slots */
    int rows;         /* that the scratch below has room for: lanes, or given_rows if more */
    int given_rows;   /* of one pass; the halves of a guided slot are rows of their own */
    int context;
    struct state_table slot_table, lane_table;
    struct kv_pages kv;
    struct delay_cache delay;
    int32_t *delays;             /* device, [streams] */
    int32_t *position;           /* device, [lanes] */
    int64_t *offset;             /* host, [slots]: frames stepped */
    int64_t *positions;          /* host, [slots]: of the context; offset unless it was renewed */
    float *condition;            /* device, [lanes][D], NULL without conditions */
    struct slot_params *params;  /* device, [slots] */
    struct depth_work depth_work;
    /* one step, all device memory */
    int32_t *tokens;   /* [rows][streams], in results */
    int32_t *text;     /* [rows] */
    int32_t *audio;    /* [rows][dep_q] */
    int32_t *output;   /* [rows][1 + dep_q], in results */
    int32_t *user;     /* [rows][user_q] */
    int32_t *null_row; /* [slots] */
    int32_t *row_lane; /* [rows] temporal rows -> lanes */
    int32_t *read_lane; /* [2] lanes that given frames go to */
    int32_t *row_number; /* [lanes] the identity, lanes of the depth pass */
    int32_t *row_slot; /* [slots] */
    uint8_t *row_active; /* [rows] all ones */
    uint8_t *step_active; /* [lanes] rows of the step that are a session's */
    uint8_t *failed;     /* [slots] a logit of this step was not finite */
    float *x, *z, *query, *attended, *hidden, *cos_sin, *text_logits, *audio_logits;
    float *raw_heads, *heads; /* [slots][heads][head_dim] before and after the softmax */
    /* What a step gives lies together, for one copy: failed, tokens, output, heads, and behind them
     * the caller's own. */
    char *results;
    size_t results_bytes; /* without the caller's */
    void *beside;
    struct lm_rows { /* host: what prepare uploads */
        int32_t *lane, *slot, *null_row;
        uint8_t *active, *zeros;
    } host;
    struct lm_block {
        void *memory;
        size_t bytes;
    } blocks[32];
    int n_blocks;
};

/* beside: bytes of device memory for the caller, behind the results of a step. */
int lm_state_create(struct lm_state *state, const struct lm *lm, struct backend *backend, int slots,
                    int context, enum moshi_dtype kv_dtype, size_t beside);
void lm_state_destroy(struct lm_state *state);
void lm_state_reset(struct lm_state *state, int slot);
/* Slot `to` becomes a copy of `from`; keys and values are shared, not copied. */
void lm_state_copy(struct lm_state *state, int from, int to);
/* Device memory that it takes at once, `beside` included. */
size_t lm_state_fixed_bytes(const struct lm_state *state);
/* Lists the state of a slot, with its null half when it is guided. */
void lm_state_list(struct lm_state *state, int slot, int guided, struct snapshot *snapshot);
/* Reads the same back from a snapshot, which may hold anything, into a slot that was reset and has
 * been given its pages by lm_state_make_room. */
int lm_state_make_room(struct lm_state *state, int slot, int guided, struct tensor_file *file);
int lm_state_restore(struct lm_state *state, int slot, int guided, struct tensor_file *file);

/* Which slots step, and what the user said. Host memory. */
struct lm_step {
    int n;
    const int32_t *slots; /* [n], ascending or not, each once */
    const uint8_t *guided; /* [n] the slot steps its null half too */
    const int32_t *user; /* [n][user_q] */
};

/* How many rows the operations of a step have. Null halves come after `slots` rows of slots, in the
 * order of their slots; rows beyond a step's own are inactive. */
struct lm_shape {
    int slots, rows;
    const int32_t *heard; /* device, [slots][user_q]: what the user said where step.user has
                             TOKEN_FREE; or NULL */
};

/* No more rows than the step has. */
struct lm_shape lm_shape_exact(const struct lm_step *step);
/* As many as the next of a few numbers, so that few shapes occur. */
struct lm_shape lm_shape_padded(const struct lm_state *state, const struct lm_step *step);

/* Makes room in the pages for a slot's next frame; lm_step_prepare then has it. */
int lm_step_room(struct lm_state *state, int slot, int guided);
/* Uploads the row map and the user's tokens and makes room in the pages. */
int lm_step_prepare(struct lm_state *state, const struct lm_step *step,
                    const struct lm_shape *shape);
/* The two stages; what a step gives is in state->results (and text_logits, audio_logits). */
int lm_step_temporal(struct lm_state *state, const struct lm_shape *shape);
int lm_step_depth(struct lm_state *state, const struct lm_shape *shape);
/* The operations of both, inside a stage of the caller's. */
void lm_step_stage(struct lm_state *state, const struct lm_shape *shape);

/* ---- frames that are given -------------------------------------------------------------- */

#define LM_GIVEN_ROWS 96 /* of one pass, at least: a backend may like more */

/* Frames of one slot of which every token is known, as its steps would store them. Host memory. */
struct lm_given {
    int slot, guided, frames;
    const int32_t *text; /* [frames] */
    const int32_t *audio; /* [frames][dep_q] */
    const int32_t *user; /* [frames][user_q] */
    int32_t *output; /* [frames][1 + dep_q], as the steps would give it */
    int32_t *read; /* [halves][frames][streams] what the steps would read, or NULL */
};

/* How many frames the next pass may have: what one of them writes must not be what another still
 * sees, and what a ring keeps beyond the context is little once it is full. */
int lm_given_room(const struct lm_state *state, int slot, int guided);
/* Steps them in one pass: the state becomes that of as many steps, bit for bit. No heads, no depth
 * pass, no sampling. */
int lm_step_given(struct lm_state *state, const struct lm_given *given);

/* A new context of a slot is read from tokens while the old one is in use: into the lane of the
 * null half, which only guided slots use; those have to wait, since theirs is read in place. Between
 * begin and end nothing but steps of the slot. */
void lm_renew_begin(struct lm_state *state, int slot, int guided);
/* tokens: host, [halves][frames][streams]; `first` of them were read before. */
int lm_renew_read(struct lm_state *state, int slot, int guided, int first, int frames,
                  const int32_t *tokens);
void lm_renew_end(struct lm_state *state, int slot, int guided, int positions);

#endif
