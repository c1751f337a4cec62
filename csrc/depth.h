/* depth.h: the depth transformer. For each frame it starts afresh and writes dep_q codes one after
 * the other. Step k, with weight set s = schedule[k]:
 *
 *   x = depformer_in[s] z + (k == 0 ? text_embedding[t] : embedding[k-1][a[k-1]])
 *   x = layers_s(x), causal over the steps of this frame, no positions
 *   a[k] = sample(linear[k] norm_k(x))
 *
 * z is the temporal transformer's normed output; the products with it need no token, and are made
 * together before the first step. Source: moshi/models/lm.py, forward_depformer. */
#ifndef MOSHI_DEPTH_H
#define MOSHI_DEPTH_H

#include "backend.h"
#include "transformer.h"

struct depth {
    const struct lm_config *config;
    struct matrix input[MOSHI_MAX_CODEBOOKS]; /* depformer_in, [weight_sets or 1], each [Dd][D] */
    struct embedding text_embedding;
    struct embedding embedding[MOSHI_MAX_CODEBOOKS]; /* [dep_q - 1] */
    struct transformer stack;
    struct norm norm[MOSHI_MAX_CODEBOOKS];   /* before each head; NORM_NONE as published */
    struct matrix head[MOSHI_MAX_CODEBOOKS]; /* linears, [dep_q], each [card][Dd] */
    const float *head_bias[MOSHI_MAX_CODEBOOKS];
};

int depth_load(struct depth *depth, const struct lm_config *config, struct weight_loader *loader);
void depth_free(struct depth *depth);
/* Bytes of matrices that a frame reads; layers that several steps share count for each of them. */
int64_t depth_bytes(const struct depth *depth);

/* Scratch for `lanes` rows. */
struct depth_work {
    struct backend *backend;
    int lanes;
    struct kv_cache cache; /* one page a lane, f32 */
    size_t cache_bytes, table_bytes, position_bytes, row_bytes, hidden_bytes, input_bytes;
    int32_t *table;     /* [lanes], the identity */
    int32_t *positions; /* [dep_q][lanes]: row k is full of k */
    float *inputs; /* [weight_sets or 1][rows][Dd]: depformer_in z */
    float *x, *query, *attended, *hidden;
};

int depth_work_create(struct depth_work *work, const struct depth *depth, struct backend *backend,
                      int lanes);
void depth_work_destroy(struct depth_work *work);
size_t depth_work_bytes(const struct depth_work *work); /* of the device */

/* rows: all halves, lanes = row numbers. slots: the conditional halves, lanes = slot numbers. */
struct depth_run {
    struct rows rows, slots;
    const float *z;          /* [rows][D] */
    const int32_t *text;     /* [rows] */
    const int32_t *null_row; /* [slots] */
    const struct slot_params *params;
    const int32_t *offset; /* [slots of the engine] */
    uint8_t *failed;       /* as op_sample has it */
    float *logits;         /* [dep_q][rows.n][card] */
    int32_t *audio;        /* [rows][dep_q] */
};
void depth_forward(const struct depth *depth, struct depth_work *work, const struct depth_run *run);

/* Binds prefix.weight, prefix.low_rank.weight and prefix.norm.*; shared with lm.c. */
void load_embedding(struct weight_loader *loader, const char *prefix, int vocabulary, int width,
                    int rank, int norm, struct embedding *embedding);

#endif
