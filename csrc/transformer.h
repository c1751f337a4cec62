/* transformer.h: one stack of pre-norm layers, used by the codec's two stacks, the temporal
 * transformer, and the depth transformer (whose weights differ per step).
 *
 *   x += scale1 * out_proj(attend(rope(in_proj(norm1(x)))))
 *   x += scale2 * linear_out(silu(gate) * up)     gated, (gate, up) = linear_in(norm2(x))
 *   x += scale2 * linear2(gelu(linear1(norm2(x))))     otherwise
 *
 * Source: moshi/modules/transformer.py and gating.py of the moshi Python package. */
#ifndef MOSHI_TRANSFORMER_H
#define MOSHI_TRANSFORMER_H

#include "backend.h"
#include "weights.h"

struct transformer {
    struct transformer_config config;
    struct transformer_layer *layers; /* [config.layers] */
};

/* Binds prefix.layers.{i}.*; both spellings of the attention matrices are known (packed over the
 * weight sets, or one tensor each). `label` names the stack in traces. */
int transformer_load(struct transformer *transformer, const struct transformer_config *config,
                     struct weight_loader *loader, const char *prefix, const char *label);
void transformer_free(struct transformer *transformer);

/* Of the matrices of one weight set: bytes, and weights in any format. */
int64_t transformer_bytes(const struct transformer *transformer, int set);
int64_t transformer_elements(const struct transformer *transformer, int set);

/* One forward pass in place on x. */
struct transformer_run {
    struct rows rows;
    int steps;               /* T */
    int weight_set;          /* which of the sets */
    int capacity;            /* of the ring, see op_attend; context comes from the config */
    int context;
    float *x;                /* [n*T][D] */
    const int32_t *position; /* [lanes] of the first step; not advanced here */
    const float *cos_sin;    /* [n*T][Dh/2][2], or NULL without rope */
    const struct kv_cache *cache;
    float *query, *attended; /* [n*T][D] scratch each */
    float *hidden;           /* [n*T][F] scratch */
};
void transformer_forward(const struct transformer *transformer, struct backend *backend,
                         const struct transformer_run *run);

/* Loads a norm: prefix.alpha (RMS) or prefix.weight and prefix.bias (layer norm). */
void transformer_load_norm(struct weight_loader *loader, enum norm_kind kind, float eps, int width,
                           const char *prefix, struct norm *norm);

#endif
