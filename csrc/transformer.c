/* transformer.c: binding and forward pass of a stack of layers. */
#include "transformer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

void transformer_load_norm(struct weight_loader *loader, enum norm_kind kind, float eps, int width,
                           const char *prefix, struct norm *norm)
{
    memset(norm, 0, sizeof *norm);
    norm->kind = kind;
    norm->eps = eps;
    if (kind == NORM_RMS)
        norm->weight = weights_vector(loader, weights_need(loader, "%s.alpha", prefix), width);
    if (kind == NORM_LAYER) {
        norm->weight = weights_vector(loader, weights_need(loader, "%s.weight", prefix), width);
        norm->bias = weights_vector(loader, weights_need(loader, "%s.bias", prefix), width);
    }
}

/* Fills matrix[0..sets-1] from prefix.<packed>, the sets stacked on the rows, or from one tensor a
 * set, prefix.<single>.{i}.weight. Published files hold the first, current upstream code saves the
 * second; "in_proj.weight" is an older spelling of the first. */
static void load_sets(struct weight_loader *loader, const char *prefix, const char *packed,
                      const char *older, const char *single, int sets, int rows, int cols,
                      struct matrix *matrix)
{
    struct tensor *whole = weights_find(loader, "%s.%s", prefix, packed);
    if (!whole && older) whole = weights_find(loader, "%s.%s", prefix, older);
    if (whole) {
        weights_matrices(loader, whole, sets, rows, cols, matrix);
        return;
    }
    for (int i = 0; i < sets; ++i)
        weights_matrix(loader, weights_need(loader, "%s.%s.%d.weight", prefix, single, i), rows,
                       cols, &matrix[i]);
}

int transformer_load(struct transformer *transformer, const struct transformer_config *config,
                     struct weight_loader *loader, const char *prefix, const char *label)
{
    transformer->config = *config;
    const int dim = config->dim, sets = config->weight_sets, ff = config->feedforward;
    const int head_dim = dim / config->heads;
    const int qkv = dim + 2 * config->kv_heads * head_dim;
    transformer->layers = calloc((size_t)config->layers, sizeof *transformer->layers);
    if (!transformer->layers)
        return loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %d layers",
                                           config->layers);
    for (int i = 0; i < config->layers && !loader->status; ++i) {
        struct transformer_layer *layer = &transformer->layers[i];
        snprintf(layer->name, sizeof layer->name, "%s.%d", label, i);
        struct matrix *matrices = calloc(4 * (size_t)sets, sizeof *matrices);
        if (!matrices)
            return loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a layer");
        layer->in_proj = matrices;
        layer->out_proj = matrices + sets;
        layer->ffn_in = matrices + 2 * sets;
        layer->ffn_out = matrices + 3 * sets;

        char base[160], part[200];
        snprintf(base, sizeof base, "%s.layers.%d", prefix, i);
        snprintf(part, sizeof part, "%s.norm1", base);
        transformer_load_norm(loader, config->norm, config->norm_eps, dim, part, &layer->norm1);
        snprintf(part, sizeof part, "%s.norm2", base);
        transformer_load_norm(loader, config->norm, config->norm_eps, dim, part, &layer->norm2);
        snprintf(part, sizeof part, "%s.self_attn", base);
        load_sets(loader, part, "in_proj_weight", "in_proj.weight", "in_projs", sets, qkv, dim,
                  layer->in_proj);
        load_sets(loader, part, "out_proj.weight", NULL, "out_projs", sets, dim, dim,
                  layer->out_proj);
        for (int set = 0; set < sets; ++set) {
            if (config->gated) {
                char gate[240];
                if (sets == 1 && !weights_find(loader, "%s.gating.0.linear_in.weight", base))
                    snprintf(gate, sizeof gate, "%s.gating", base);
                else
                    snprintf(gate, sizeof gate, "%s.gating.%d", base, set);
                weights_matrix(loader, weights_need(loader, "%s.linear_in.weight", gate), 2 * ff,
                               dim, &layer->ffn_in[set]);
                weights_matrix(loader, weights_need(loader, "%s.linear_out.weight", gate), dim, ff,
                               &layer->ffn_out[set]);
            } else {
                weights_matrix(loader, weights_need(loader, "%s.linear1.weight", base), ff, dim,
                               &layer->ffn_in[set]);
                weights_matrix(loader, weights_need(loader, "%s.linear2.weight", base), dim, ff,
                               &layer->ffn_out[set]);
            }
        }
        if (config->layer_scale) {
            layer->scale1 =
                weights_vector(loader, weights_need(loader, "%s.layer_scale_1.scale", base), dim);
            layer->scale2 =
                weights_vector(loader, weights_need(loader, "%s.layer_scale_2.scale", base), dim);
        }
    }
    return loader->status;
}

#define LAYER_MATRICES 4

static void layer_matrices(const struct transformer_layer *layer, int set,
                           const struct matrix *matrices[LAYER_MATRICES])
{
    matrices[0] = &layer->in_proj[set];
    matrices[1] = &layer->out_proj[set];
    matrices[2] = &layer->ffn_in[set];
    matrices[3] = &layer->ffn_out[set];
}

int64_t transformer_bytes(const struct transformer *transformer, int set)
{
    const struct matrix *matrices[LAYER_MATRICES];
    int64_t bytes = 0;
    for (int i = 0; i < transformer->config.layers; ++i) {
        layer_matrices(&transformer->layers[i], set, matrices);
        for (int m = 0; m < LAYER_MATRICES; ++m) bytes += (int64_t)matrix_bytes(matrices[m]);
    }
    return bytes;
}

int64_t transformer_elements(const struct transformer *transformer, int set)
{
    const struct matrix *matrices[LAYER_MATRICES];
    int64_t elements = 0;
    for (int i = 0; i < transformer->config.layers; ++i) {
        layer_matrices(&transformer->layers[i], set, matrices);
        for (int m = 0; m < LAYER_MATRICES; ++m)
            elements += (int64_t)matrices[m]->rows * matrices[m]->cols;
    }
    return elements;
}

void transformer_free(struct transformer *transformer)
{
    for (int i = 0; transformer->layers && i < transformer->config.layers; ++i)
        free(transformer->layers[i].in_proj);
    free(transformer->layers);
    transformer->layers = NULL;
}

void transformer_forward(const struct transformer *transformer, struct backend *backend,
                         const struct transformer_run *run)
{
    const struct transformer_config *config = &transformer->config;
    const struct backend_ops *ops = backend->ops;
    const int n = run->rows.n * run->steps, set = run->weight_set;
    for (int i = 0; i < config->layers; ++i) {
        const struct transformer_layer *layer = &transformer->layers[i];
        ops->qkv(backend, &(struct op_qkv){.name = layer->name,
                                           .rows = run->rows,
                                           .steps = run->steps,
                                           .heads = config->heads,
                                           .layer = i,
                                           .x = run->x,
                                           .norm = layer->norm1,
                                           .weight = layer->in_proj[set],
                                           .cos_sin = run->cos_sin,
                                           .position = run->position,
                                           .cache = run->cache,
                                           .q = run->query});
        ops->attend(backend, &(struct op_attend){.name = layer->name,
                                                 .rows = run->rows,
                                                 .steps = run->steps,
                                                 .heads = config->heads,
                                                 .layer = i,
                                                 .causal = 1,
                                                 .context = run->context,
                                                 .capacity = run->capacity,
                                                 .position = run->position,
                                                 .cache = run->cache,
                                                 .q = run->query,
                                                 .y = run->attended});
        ops->linear_residual(backend, &(struct op_linear_residual){.name = layer->name,
                                                                   .n = n,
                                                                   .u = run->attended,
                                                                   .weight = layer->out_proj[set],
                                                                   .scale = layer->scale1,
                                                                   .x = run->x});
        if (config->gated)
            ops->linear_gated(backend, &(struct op_linear_gated){.name = layer->name,
                                                                 .n = n,
                                                                 .x = run->x,
                                                                 .norm = layer->norm2,
                                                                 .weight = layer->ffn_in[set],
                                                                 .y = run->hidden});
        else
            ops->linear(backend, &(struct op_linear){.name = layer->name,
                                                     .n = n,
                                                     .x = run->x,
                                                     .norm = layer->norm2,
                                                     .weight = layer->ffn_in[set],
                                                     .activation = ACTIVATION_GELU,
                                                     .y = run->hidden});
        ops->linear_residual(backend, &(struct op_linear_residual){.name = layer->name,
                                                                   .n = n,
                                                                   .u = run->hidden,
                                                                   .weight = layer->ffn_out[set],
                                                                   .scale = layer->scale2,
                                                                   .x = run->x});
    }
}
