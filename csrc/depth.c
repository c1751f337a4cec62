/* depth.c: binding and forward pass of the depth transformer. */
#include "depth.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

void load_embedding(struct weight_loader *loader, const char *prefix, int vocabulary, int width,
                    int rank, int norm, struct embedding *embedding)
{
    memset(embedding, 0, sizeof *embedding);
    weights_table(loader, weights_need(loader, "%s.weight", prefix), vocabulary,
                  rank ? rank : width, &embedding->table);
    if (rank)
        weights_small_matrix(loader, weights_need(loader, "%s.low_rank.weight", prefix), width,
                             rank, &embedding->low_rank);
    if (norm) {
        char name[200];
        snprintf(name, sizeof name, "%s.norm", prefix);
        transformer_load_norm(loader, NORM_LAYER, 1e-5f, rank ? rank : width, name,
                              &embedding->norm);
    }
}

/* Matrices of depformer_in, and which of them a weight set has. */
static int count_inputs(const struct lm_config *config)
{
    return config->depth_multi_linear ? config->depth.weight_sets : 1;
}

static int input_of(const struct lm_config *config, int set)
{
    return config->depth_multi_linear ? set : 0;
}

int depth_load(struct depth *depth, const struct lm_config *config, struct weight_loader *loader)
{
    memset(depth, 0, sizeof *depth);
    depth->config = config;
    const int dim = config->depth.dim, rank = config->depth_low_rank;
    char name[160];
    for (int i = 0; i < count_inputs(config); ++i)
        weights_matrix(loader, weights_need(loader, "depformer_in.%d.weight", i), dim,
                       config->temporal.dim, &depth->input[i]);
    load_embedding(loader, "depformer_text_emb", config->text_card + 1, dim, rank, config->norm_emb,
                   &depth->text_embedding);
    for (int k = 0; k + 1 < config->dep_q; ++k) {
        snprintf(name, sizeof name, "depformer_emb.%d", k);
        load_embedding(loader, name, config->card + 1, dim, rank, config->norm_emb,
                       &depth->embedding[k]);
    }
    for (int k = 0; k < config->dep_q; ++k) {
        snprintf(name, sizeof name, "depformer_norms.%d", k);
        transformer_load_norm(loader, config->depth_norm, config->depth_norm_eps, dim, name,
                              &depth->norm[k]);
        weights_matrix(loader, weights_need(loader, "linears.%d.weight", k), config->card, dim,
                       &depth->head[k]);
        if (config->bias_proj)
            depth->head_bias[k] = weights_vector(loader, weights_need(loader, "linears.%d.bias", k),
                                                 config->card);
    }
    transformer_load(&depth->stack, &config->depth, loader, "depformer", "depth");
    return loader->status;
}

void depth_free(struct depth *depth)
{
    transformer_free(&depth->stack);
}

int64_t depth_bytes(const struct depth *depth)
{
    const struct lm_config *config = depth->config;
    int64_t bytes = 0;
    for (int i = 0; i < count_inputs(config); ++i) bytes += (int64_t)matrix_bytes(&depth->input[i]);
    for (int k = 0; k < config->dep_q; ++k) {
        const int set = config->depth_schedule[k];
        bytes += transformer_bytes(&depth->stack, set) + (int64_t)matrix_bytes(&depth->head[k]);
    }
    return bytes;
}

int depth_work_create(struct depth_work *work, const struct depth *depth, struct backend *backend,
                      int lanes)
{
    memset(work, 0, sizeof *work);
    const struct lm_config *config = depth->config;
    const struct transformer_config *stack = &config->depth;
    const struct backend_ops *ops = backend->ops;
    work->backend = backend;
    work->lanes = lanes;
    const int head_dim = stack->dim / stack->heads, dep_q = config->dep_q;
    work->cache = (struct kv_cache){.pages_per_lane = 1,
                                    .page_positions = dep_q,
                                    .layers = stack->layers,
                                    .kv_heads = stack->kv_heads,
                                    .head_dim = head_dim,
                                    .dtype = MOSHI_F32};
    work->cache.page_bytes = sizeof(float) * 2 * (size_t)stack->layers * (size_t)stack->kv_heads *
                             (size_t)head_dim * (size_t)dep_q;
    const size_t n = (size_t)lanes;
    work->cache_bytes = n * work->cache.page_bytes;
    work->table_bytes = n * sizeof(int32_t);
    work->position_bytes = n * (size_t)dep_q * sizeof(int32_t);
    work->row_bytes = n * (size_t)stack->dim * sizeof(float);
    work->hidden_bytes = n * (size_t)stack->feedforward * sizeof(float);
    work->input_bytes = (size_t)count_inputs(config) * work->row_bytes;
    work->cache.pages = ops->allocate(backend, work->cache_bytes);
    work->table = ops->allocate(backend, work->table_bytes);
    work->positions = ops->allocate(backend, work->position_bytes);
    work->inputs = ops->allocate(backend, work->input_bytes);
    work->x = ops->allocate(backend, work->row_bytes);
    work->query = ops->allocate(backend, work->row_bytes);
    work->attended = ops->allocate(backend, work->row_bytes);
    work->hidden = ops->allocate(backend, work->hidden_bytes);
    int32_t *numbers = malloc(n * (size_t)(dep_q + 1) * sizeof *numbers);
    if (!work->cache.pages || !work->table || !work->positions || !work->inputs || !work->x ||
        !work->query || !work->attended || !work->hidden || !numbers) {
        free(numbers);
        depth_work_destroy(work);
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the depth pass of %d rows", lanes);
    }
    for (size_t i = 0; i < n; ++i) numbers[i] = (int32_t)i;
    ops->upload(backend, work->table, numbers, work->table_bytes);
    for (size_t k = 0; k < (size_t)dep_q; ++k)
        for (size_t i = 0; i < n; ++i) numbers[k * n + i] = (int32_t)k;
    ops->upload(backend, work->positions, numbers, work->position_bytes);
    free(numbers);
    work->cache.table = work->table;
    return MOSHI_OK;
}

size_t depth_work_bytes(const struct depth_work *work)
{
    return work->cache_bytes + work->table_bytes + work->position_bytes + work->input_bytes +
           3 * work->row_bytes + work->hidden_bytes;
}

void depth_work_destroy(struct depth_work *work)
{
    if (!work->backend) return;
    struct {
        void *memory;
        size_t bytes;
    } const blocks[] = {{work->cache.pages, work->cache_bytes},
                        {work->table, work->table_bytes},
                        {work->positions, work->position_bytes},
                        {work->inputs, work->input_bytes},
                        {work->x, work->row_bytes},
                        {work->query, work->row_bytes},
                        {work->attended, work->row_bytes},
                        {work->hidden, work->hidden_bytes}};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; ++i)
        if (blocks[i].memory)
            work->backend->ops->release(work->backend, blocks[i].memory, blocks[i].bytes);
    memset(work, 0, sizeof *work);
}

/* All steps as one operation; 0 where the backend makes them of others. */
static int forward_at_once(const struct depth *depth, struct depth_work *work,
                           const struct depth_run *run, const float *const *inputs)
{
    const struct backend_ops *ops = work->backend->ops;
    const struct lm_config *config = depth->config;
    if (!ops->depth) return 0;
    return ops->depth(work->backend, &(struct op_depth){.name = "depth",
                                                        .rows = run->rows,
                                                        .slots = run->slots,
                                                        .steps = config->dep_q,
                                                        .layers = config->depth.layers,
                                                        .width = config->depth.dim,
                                                        .heads = config->depth.heads,
                                                        .hidden = config->depth.feedforward,
                                                        .gated = config->depth.gated,
                                                        .card = config->card,
                                                        .schedule = config->depth_schedule,
                                                        .inputs = inputs,
                                                        .text_embedding = &depth->text_embedding,
                                                        .embeddings = depth->embedding,
                                                        .layer = depth->stack.layers,
                                                        .norms = depth->norm,
                                                        .head = depth->head,
                                                        .head_bias = depth->head_bias,
                                                        .text = run->text,
                                                        .null_row = run->null_row,
                                                        .params = run->params,
                                                        .offset = run->offset,
                                                        .failed = run->failed,
                                                        .logits = run->logits,
                                                        .audio = run->audio,
                                                        .cache = &work->cache,
                                                        .positions = work->positions,
                                                        .position_stride = work->lanes,
                                                        .x = work->x,
                                                        .query = work->query,
                                                        .hidden_rows = work->hidden});
}

/* The step that writes codebook k. */
static void forward_one(const struct depth *depth, struct depth_work *work,
                        const struct depth_run *run, int k, const float *input)
{
    struct backend *backend = work->backend;
    const struct backend_ops *ops = backend->ops;
    const struct lm_config *config = depth->config;
    const int n = run->rows.n;
    float *logits = run->logits + (size_t)k * (size_t)n * (size_t)config->card;
    ops->embed(backend, &(struct op_embed){.name = "depth.embedding",
                                           .rows = run->rows,
                                           .n_streams = 1,
                                           .token_stride = k == 0 ? 1 : config->dep_q,
                                           .tokens = k == 0 ? run->text : run->audio + (k - 1),
                                           .tables = k == 0 ? &depth->text_embedding
                                                            : &depth->embedding[k - 1],
                                           .from = input,
                                           .y = work->x});
    transformer_forward(&depth->stack, backend,
                        &(struct transformer_run){.rows = run->rows,
                                                  .steps = 1,
                                                  .weight_set = config->depth_schedule[k],
                                                  .context = config->dep_q,
                                                  .capacity = config->dep_q,
                                                  .x = work->x,
                                                  .position = work->positions +
                                                              (size_t)k * (size_t)work->lanes,
                                                  .cache = &work->cache,
                                                  .query = work->query,
                                                  .attended = work->attended,
                                                  .hidden = work->hidden});
    ops->linear(backend, &(struct op_linear){.name = "depth.head",
                                             .n = n,
                                             .x = work->x,
                                             .norm = depth->norm[k],
                                             .weight = depth->head[k],
                                             .bias = depth->head_bias[k],
                                             .y = logits});
    ops->sample(backend, &(struct op_sample){.name = "depth.sample",
                                             .rows = run->slots,
                                             .stream = 1 + k,
                                             .card = config->card,
                                             .logits = logits,
                                             .null_row = run->null_row,
                                             .params = run->params,
                                             .offset = run->offset,
                                             .failed = run->failed,
                                             .token = run->audio + k,
                                             .token_stride = config->dep_q});
}

void depth_forward(const struct depth *depth, struct depth_work *work, const struct depth_run *run)
{
    struct backend *backend = work->backend;
    const struct backend_ops *ops = backend->ops;
    const struct lm_config *config = depth->config;
    const int n = run->rows.n;
    ops->linear_many(backend, &(struct op_linear_many){.name = "depth.input",
                                                       .n = n,
                                                       .count = count_inputs(config),
                                                       .x = run->z,
                                                       .weights = depth->input,
                                                       .y = work->inputs});
    const float *inputs[MOSHI_MAX_CODEBOOKS];
    for (int k = 0; k < config->dep_q; ++k)
        inputs[k] = work->inputs + (size_t)input_of(config, config->depth_schedule[k]) * (size_t)n *
                                       (size_t)config->depth.dim;
    if (forward_at_once(depth, work, run, inputs)) return;
    for (int k = 0; k < config->dep_q; ++k) forward_one(depth, work, run, k, inputs[k]);
}
