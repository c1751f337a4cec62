/* lm.c: binding, state and the step of the language model. */
#include "lm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

/* ---- binding ---------------------------------------------------------------------------- */

static void load_condition(struct lm *lm, struct weight_loader *loader, int i)
{
    const struct condition_config *config = &lm->config.conditions[i];
    struct lm_condition *condition = &lm->conditions[i];
    if (config->kind != CONDITION_LUT || !config->summed) {
        if (!loader->status)
            loader->status = moshi_fail(
                MOSHI_ERROR_CHECKPOINT,
                "condition %s is %s, expected a summed table: cross-attention models (TTS) are not "
                "part of this build",
                config->name, config->kind == CONDITION_LUT ? "cross-attended" : "a tensor");
        return;
    }
    const int width = lm->config.temporal.dim;
    const char *base = "condition_provider.conditioners";
    int64_t table[2] = {config->bins + 1, config->dim}, projection[2] = {width, config->dim};
    struct tensor *tensor = weights_need(loader, "%s.%s.embed.weight", base, config->name);
    if (!weights_check(loader, tensor, 2, table))
        condition->embedding = weights_host(loader, tensor, table[0]);
    tensor = weights_need(loader, "%s.%s.output_proj.weight", base, config->name);
    if (!weights_check(loader, tensor, 2, projection))
        condition->projection = weights_host(loader, tensor, projection[0]);
    tensor = weights_need(loader, "%s.%s.learnt_padding", base, config->name);
    int64_t padding[3] = {1, 1, width};
    if (!weights_check(loader, tensor, 3, padding))
        condition->padding = weights_host(loader, tensor, 1);
}

int lm_load(struct lm *lm, const struct lm_config *config, struct weight_loader *loader)
{
    memset(lm, 0, sizeof *lm);
    lm->config = *config;
    config = &lm->config;
    const char *unsupported = config->demux_second_stream ? "\"demux_second_stream\" (TTS)"
                              : config->cross_attention   ? "\"cross_attention\" (TTS)"
                              : config->lora_name[0]      ? "\"lora_name\" (an adapter)"
                                                          : NULL;
    if (unsupported)
        return loader->status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                           "%s: the config asks for %s, which is not part of this "
                                           "build",
                                           tensor_file_path(loader->file), unsupported);
    const int dim = config->temporal.dim;
    char name[64];
    for (int k = 0; k < config->n_q; ++k) {
        snprintf(name, sizeof name, "emb.%d", k);
        load_embedding(loader, name, config->card + 1, dim, 0, config->norm_emb,
                       &lm->audio_embedding[k]);
    }
    load_embedding(loader, "text_emb", config->text_card + 1, dim, 0, config->norm_emb,
                   &lm->text_embedding);
    if (strcmp(config->family, "hibiki") == 0 && config->text_card >= 3) {
        /* Translation models may end (EOS) too early; upstream makes them read a PAD there, where
         * the vocabulary has one. */
        lm->text_embedding.alias = 2;
        lm->text_embedding.alias_of = 3;
    }
    transformer_load(&lm->temporal, &config->temporal, loader, "transformer", "temporal");
    transformer_load_norm(loader, config->temporal.norm, config->temporal.norm_eps, dim, "out_norm",
                          &lm->out_norm);
    weights_matrix(loader, weights_need(loader, "text_linear.weight"), config->text_card_out, dim,
                   &lm->text_head);
    if (config->bias_proj)
        lm->text_head_bias = weights_vector(loader, weights_need(loader, "text_linear.bias"),
                                            config->text_card_out);
    for (int i = 0; i < config->heads; ++i)
        weights_small_matrix(loader, weights_need(loader, "extra_heads.%d.weight", i),
                             config->head_dim, dim, &lm->heads[i]);
    for (int i = 0; i < config->n_conditions; ++i) load_condition(lm, loader, i);
    if (config->dep_q > 0) {
        depth_load(&lm->depth, config, loader);
    } else { /* upstream still makes a depformer_in list, which is then empty or unused */
        lm->depth.config = config;
        for (int i = 0; weights_find(loader, "depformer_in.%d.weight", i); ++i) continue;
    }
    /* Conditioners that no fuser uses are stored all the same. */
    for (int i = 0; i < tensor_file_count(loader->file); ++i) {
        struct tensor *tensor = tensor_file_at(loader->file, i);
        if (strncmp(tensor->name, "condition_provider.", 19) == 0) tensor->used = 1;
    }
    weights_finish(loader);
    return loader->status;
}

void lm_free(struct lm *lm)
{
    transformer_free(&lm->temporal);
    depth_free(&lm->depth);
    for (int i = 0; i < CONFIG_MAX_CONDITIONS; ++i) {
        free(lm->conditions[i].embedding);
        free(lm->conditions[i].projection);
        free(lm->conditions[i].padding);
    }
    lm_config_free(&lm->config);
}

int64_t lm_temporal_bytes(const struct lm *lm)
{
    int64_t bytes = transformer_bytes(&lm->temporal, 0) + (int64_t)matrix_bytes(&lm->text_head);
    for (int i = 0; i < lm->config.heads; ++i) bytes += (int64_t)matrix_bytes(&lm->heads[i]);
    return bytes;
}

/* ---- conditions ------------------------------------------------------------------------- */

static int value_index(const struct condition_config *config, const char *value, int *index)
{
    for (int v = 0; v < config->n_values; ++v)
        if (strcmp(config->values[v], value) == 0) {
            *index = v;
            return MOSHI_OK;
        }
    char known[256] = "";
    for (int v = 0; v < config->n_values; ++v) {
        size_t length = strlen(known);
        snprintf(known + length, sizeof known - length, "%s%s", v ? ", " : "", config->values[v]);
    }
    return moshi_fail(MOSHI_ERROR_ARGUMENT, "condition %s: found \"%s\", expected one of: %s",
                      config->name, value, config->n_values ? known : "(the model lists none)");
}

int lm_condition_sum(const struct lm *lm, const struct moshi_condition *given, int n_given,
                     float *sum)
{
    const struct lm_config *config = &lm->config;
    const int width = config->temporal.dim;
    for (int g = 0; g < n_given; ++g) {
        int known = 0;
        for (int i = 0; i < config->n_conditions; ++i)
            known |= strcmp(config->conditions[i].name, given[g].name) == 0;
        if (!known)
            return moshi_fail(MOSHI_ERROR_ARGUMENT,
                              "condition \"%s\" is not one of this model's%s%s", given[g].name,
                              config->n_conditions ? ", e.g. " : "; it has none",
                              config->n_conditions ? config->conditions[0].name : "");
    }
    for (int d = 0; d < width; ++d) sum[d] = 0;
    for (int i = 0; i < config->n_conditions; ++i) {
        const struct lm_condition *condition = &lm->conditions[i];
        const char *value = NULL;
        for (int g = 0; g < n_given; ++g)
            if (strcmp(config->conditions[i].name, given[g].name) == 0) value = given[g].value;
        if (!value) {
            for (int d = 0; d < width; ++d) sum[d] += condition->padding[d];
            continue;
        }
        int index = 0, inner = config->conditions[i].dim;
        int status = value_index(&config->conditions[i], value, &index);
        if (status) return status;
        const float *entry = condition->embedding + (size_t)index * (size_t)inner;
        for (int d = 0; d < width; ++d) {
            float dot = 0;
            for (int c = 0; c < inner; ++c)
                dot += condition->projection[(size_t)d * (size_t)inner + (size_t)c] * entry[c];
            sum[d] += dot;
        }
    }
    return MOSHI_OK;
}

/* ---- state ------------------------------------------------------------------------------ */

static void *block(struct lm_state *state, size_t bytes)
{
    if (bytes == 0) bytes = 1;
    void *memory = state->backend->ops->allocate(state->backend, bytes);
    if (memory) state->blocks[state->n_blocks++] = (struct lm_block){memory, bytes};
    return memory;
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* Places what a step gives, one after the other. */
static int create_results(struct lm_state *state, size_t beside)
{
    const struct lm_config *config = &state->lm->config;
    const size_t r = (size_t)state->rows, s = (size_t)state->slots;
    struct {
        void **pointer;
        size_t bytes;
    } const parts[] = {
        {(void **)&state->failed, s},
        {(void **)&state->tokens, r * (size_t)state->delay.streams * 4},
        {(void **)&state->output, r * (size_t)(1 + state->delay.dep_q) * 4},
        {(void **)&state->heads, s * (size_t)(config->heads * config->head_dim) * 4},
        {&state->beside, beside},
    };
    size_t at[sizeof parts / sizeof *parts], bytes = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; ++i) {
        at[i] = bytes;
        bytes += (parts[i].bytes + 63) / 64 * 64;
    }
    state->results = block(state, bytes);
    if (!state->results) return MOSHI_ERROR_MEMORY;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; ++i)
        *parts[i].pointer = state->results + at[i];
    state->results_bytes = (size_t)((char *)state->beside - state->results);
    return MOSHI_OK;
}

static int create_host_rows(struct lm_state *state)
{
    const size_t n = (size_t)state->lanes, s = (size_t)state->slots;
    struct lm_rows *host = &state->host;
    host->lane = calloc(n, sizeof *host->lane);
    host->slot = calloc(s, sizeof *host->slot);
    host->null_row = calloc(s, sizeof *host->null_row);
    host->active = calloc(n, 1);
    host->zeros = calloc(s, 1);
    state->offset = calloc(s, sizeof *state->offset);
    state->positions = calloc(s, sizeof *state->positions);
    return host->lane && host->slot && host->null_row && host->active && host->zeros &&
                   state->offset && state->positions
               ? MOSHI_OK
               : MOSHI_ERROR_MEMORY;
}

/* What a slot keeps from step to step. */
static int create_history(struct lm_state *state, enum moshi_dtype kv_dtype)
{
    const struct lm_config *config = &state->lm->config;
    const int streams = config->n_q + 1, columns = config->max_delay + 2;
    state_init(&state->slot_table, state->backend, state->slots);
    state_init(&state->lane_table, state->backend, state->lanes);
    state->delay = (struct delay_cache){.streams = streams,
                                        .dep_q = config->dep_q,
                                        .columns = columns,
                                        .max_delay = config->max_delay,
                                        .initial_text = config->text_card,
                                        .initial_audio = config->card};
    state->delay.tokens = state_add(&state->slot_table, FIELD_I32,
                                    (size_t)streams * (size_t)columns, TOKEN_NONE,
                                    "lm.delay.tokens");
    state->delay.offset = state_add(&state->slot_table, FIELD_I32, 1, 0, "lm.offset");
    state->position = state_add(&state->lane_table, FIELD_I32, 1, 0, "lm.position");
    if (!state->delay.tokens || !state->delay.offset || !state->position) return MOSHI_ERROR_MEMORY;
    if (config->n_conditions) {
        state->condition = state_add(&state->lane_table, FIELD_F32, (size_t)config->temporal.dim, 0,
                                     "lm.condition");
        if (!state->condition) return MOSHI_ERROR_MEMORY;
    }
    return kv_pages_create(&state->kv, state->backend, state->lanes, state->context,
                           &config->temporal, kv_dtype);
}

/* What one step needs, and gives. */
static int create_scratch(struct lm_state *state, size_t beside)
{
    const struct lm_config *config = &state->lm->config;
    const struct transformer_config *stack = &config->temporal;
    const size_t n = (size_t)state->lanes, s = (size_t)state->slots, r = (size_t)state->rows;
    const size_t width = (size_t)stack->dim, dep_q = (size_t)config->dep_q;
    const size_t user_q = (size_t)config->n_q - dep_q;
    struct {
        void **pointer;
        size_t bytes;
    } const wanted[] = {
        {(void **)&state->delays, (size_t)state->delay.streams * 4},
        {(void **)&state->params, s * sizeof *state->params},
        {(void **)&state->text, r * 4},
        {(void **)&state->audio, r * dep_q * 4},
        {(void **)&state->user, r * user_q * 4},
        {(void **)&state->null_row, s * 4},
        {(void **)&state->row_lane, r * 4},
        {(void **)&state->read_lane, 2 * 4},
        {(void **)&state->row_number, n * 4},
        {(void **)&state->row_slot, s * 4},
        {(void **)&state->row_active, r},
        {(void **)&state->step_active, n},
        {(void **)&state->x, r * width * 4},
        {(void **)&state->z, n * width * 4},
        {(void **)&state->query, r * width * 4},
        {(void **)&state->attended, r * width * 4},
        {(void **)&state->hidden, r * (size_t)stack->feedforward * 4},
        {(void **)&state->cos_sin, r * width * 4},
        {(void **)&state->text_logits, n * (size_t)config->text_card_out * 4},
        {(void **)&state->audio_logits, n * dep_q * (size_t)config->card * 4},
        {(void **)&state->raw_heads, s * (size_t)(config->heads * config->head_dim) * 4},
    };
    int failed = create_results(state, beside) || create_host_rows(state);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
        *wanted[i].pointer = block(state, wanted[i].bytes);
        failed |= !*wanted[i].pointer;
    }
    return failed ? moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the step of %d sessions",
                               state->slots)
                  : MOSHI_OK;
}

/* What no step changes. */
static void upload_constants(struct lm_state *state)
{
    const struct lm_config *config = &state->lm->config;
    const struct backend_ops *ops = state->backend->ops;
    const int streams = state->delay.streams;
    int32_t delays[MOSHI_MAX_CODEBOOKS + 1], *numbers = state->host.lane; /* not in use yet */
    for (int i = 0; i < state->lanes; ++i) numbers[i] = i;
    for (int i = 0; i < streams; ++i) delays[i] = config->delays[i];
    ops->upload(state->backend, state->row_number, numbers, (size_t)state->lanes * sizeof *numbers);
    ops->upload(state->backend, state->delays, delays, (size_t)streams * sizeof *delays);
    ops->clear(state->backend, state->row_active, 1, (size_t)state->rows);
    state->delay.delays = state->delays;
}

/* The backend's own scratch for the largest operations. */
static int reserve(struct lm_state *state)
{
    const struct lm_config *config = &state->lm->config;
    const int temporal = larger(config->temporal.dim, config->temporal.feedforward);
    const int depth = larger(config->depth.dim, config->depth.feedforward);
    const int cards = larger(config->card, config->text_card_out);
    return state->backend->ops->reserve(state->backend, state->rows, larger(temporal, depth),
                                        larger(larger(state->context, config->dep_q), cards));
}

int lm_state_create(struct lm_state *state, const struct lm *lm, struct backend *backend, int slots,
                    int context, enum moshi_dtype kv_dtype, size_t beside)
{
    memset(state, 0, sizeof *state);
    state->lm = lm;
    state->backend = backend;
    state->slots = slots;
    state->lanes = 2 * slots;
    state->given_rows = larger(backend->given_rows, LM_GIVEN_ROWS);
    state->rows = larger(state->lanes, state->given_rows);
    state->context = context;
    int status = create_history(state, kv_dtype);
    if (!status && lm->config.dep_q > 0)
        status = depth_work_create(&state->depth_work, &lm->depth, backend, state->lanes);
    if (!status) status = create_scratch(state, beside);
    if (!status) {
        upload_constants(state);
        status = reserve(state);
    }
    if (status) lm_state_destroy(state);
    return status;
}

void lm_state_destroy(struct lm_state *state)
{
    if (!state->backend) return;
    state_release(&state->slot_table);
    state_release(&state->lane_table);
    kv_pages_destroy(&state->kv);
    depth_work_destroy(&state->depth_work);
    for (int i = 0; i < state->n_blocks; ++i)
        state->backend->ops->release(state->backend, state->blocks[i].memory,
                                     state->blocks[i].bytes);
    free(state->offset);
    free(state->positions);
    free(state->host.lane);
    free(state->host.slot);
    free(state->host.null_row);
    free(state->host.active);
    free(state->host.zeros);
    memset(state, 0, sizeof *state);
}

void lm_state_reset(struct lm_state *state, int slot)
{
    state_reset_lane(&state->slot_table, slot);
    for (int half = 0; half < 2; ++half) {
        int lane = half * state->slots + slot;
        state_reset_lane(&state->lane_table, lane);
        kv_pages_release(&state->kv, lane);
    }
    state->offset[slot] = state->positions[slot] = 0;
}

void lm_state_copy(struct lm_state *state, int from, int to)
{
    state_copy_lane(&state->slot_table, from, to);
    for (int half = 0; half < 2; ++half) {
        const int first = half * state->slots;
        state_copy_lane(&state->lane_table, first + from, first + to);
        kv_pages_share(&state->kv, first + from, first + to);
    }
    state->offset[to] = state->offset[from];
    state->positions[to] = state->positions[from];
}

#define POSITIONS "lm.positions" /* in snapshots of slots whose context was renewed */

void lm_state_list(struct lm_state *state, int slot, int guided, struct snapshot *snapshot)
{
    snapshot_host(snapshot, "lm.frames", TENSOR_I64, 1, &state->offset[slot]);
    if (state->positions[slot] != state->offset[slot])
        snapshot_host(snapshot, POSITIONS, TENSOR_I64, 1, &state->positions[slot]);
    snapshot_lane(snapshot, &state->slot_table, slot, "");
    for (int half = 0; half < 1 + guided; ++half) {
        const int lane = half * state->slots + slot;
        const char *suffix = half ? ".null" : "";
        snapshot_lane(snapshot, &state->lane_table, lane, suffix);
        snapshot_pages(snapshot, &state->kv, lane, state->positions[slot], "lm.keys_values",
                       suffix);
    }
}

/* Every token that may be read as an input must be one that the tables know. */
static int check_tokens(const struct lm_state *state, const int32_t *tokens, int64_t offset)
{
    const struct lm_config *config = &state->lm->config;
    const struct delay_cache *delay = &state->delay;
    for (int stream = 0; stream < delay->streams; ++stream) {
        const int32_t most = stream ? config->card : config->text_card;
        /* The model's tokens go to the next column, the user's to one that is as late as they are. */
        const int first = stream <= config->dep_q ? 1 : config->delays[stream];
        for (int i = 0; i < delay->columns; ++i) {
            int column = (first + i) % delay->columns;
            int32_t token = tokens[stream * delay->columns + column];
            if (token < (i < offset ? 0 : TOKEN_NONE) || token > most)
                return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                  "the field lm.delay.tokens has %d in stream %d, expected 0 to %d",
                                  token, stream, most);
        }
    }
    return MOSHI_OK;
}

static int check_restored(const struct lm_state *state, int slot, int guided)
{
    const struct backend_ops *ops = state->backend->ops;
    const size_t count = (size_t)state->delay.streams * (size_t)state->delay.columns;
    const int64_t offset = state->offset[slot], positions = state->positions[slot];
    int32_t found;
    ops->download(state->backend, &found, state->delay.offset + slot, 4);
    if (found != offset)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "the field lm.offset is %d, expected %lld as lm.frames says", found,
                          (long long)offset);
    for (int half = 0; half < 1 + guided; ++half) {
        ops->download(state->backend, &found, state->position + half * state->slots + slot, 4);
        if (found != positions)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "the field lm.position is %d, expected %lld as %s says", found,
                              (long long)positions, positions == offset ? "lm.frames" : POSITIONS);
    }
    int32_t *tokens = malloc(count * sizeof *tokens);
    if (!tokens) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %zu tokens", count);
    ops->download(state->backend, tokens, state->delay.tokens + (size_t)slot * count, 4 * count);
    int status = check_tokens(state, tokens, offset);
    free(tokens);
    return status;
}

int lm_state_make_room(struct lm_state *state, int slot, int guided, struct tensor_file *file)
{
    int64_t offset, positions;
    int status = snapshot_count(file, MAX_FRAMES, &offset, "lm.frames");
    positions = offset;
    if (!status && tensor_file_find(file, POSITIONS))
        status = snapshot_count(file, MAX_FRAMES, &positions, POSITIONS);
    for (int half = 0; half < 1 + guided && !status; ++half)
        status = snapshot_make_room(&state->kv, half * state->slots + slot, positions);
    if (status) return status;
    state->offset[slot] = offset;
    state->positions[slot] = positions;
    return MOSHI_OK;
}

int lm_state_restore(struct lm_state *state, int slot, int guided, struct tensor_file *file)
{
    struct snapshot items = {0};
    lm_state_list(state, slot, guided, &items);
    int status = snapshot_read(&items, file);
    snapshot_free(&items);
    if (status) return status;
    status = check_restored(state, slot, guided);
    return status ? moshi_fail_prefix(status, "%s", tensor_file_path(file)) : MOSHI_OK;
}

size_t lm_state_fixed_bytes(const struct lm_state *state)
{
    size_t bytes = state_table_bytes(&state->slot_table) + state_table_bytes(&state->lane_table) +
                   kv_pages_fixed_bytes(&state->kv) + depth_work_bytes(&state->depth_work);
    for (int i = 0; i < state->n_blocks; ++i) bytes += state->blocks[i].bytes;
    return bytes;
}

/* ---- the step --------------------------------------------------------------------------- */

static int guided_rows(const struct lm_step *step)
{
    int rows = 0;
    for (int i = 0; i < step->n; ++i) rows += step->guided[i] != 0;
    return rows;
}

struct lm_shape lm_shape_exact(const struct lm_step *step)
{
    return (struct lm_shape){.slots = step->n, .rows = step->n + guided_rows(step)};
}

/* The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...; no more than `most`. */
static int padded(int n, int most)
{
    int size = n < 4 ? n : 4;
    while (size < n) size = size & (size - 1) ? size / 3 * 4 : size / 2 * 3;
    return size < most ? size : most;
}

struct lm_shape lm_shape_padded(const struct lm_state *state, const struct lm_step *step)
{
    const int slots = padded(step->n, state->slots);
    return (struct lm_shape){.slots = slots,
                             .rows = slots + padded(guided_rows(step), state->slots)};
}

static struct rows slot_rows(const struct lm_state *state, const struct lm_shape *shape)
{
    return (struct rows){.n = shape->slots, .lane = state->row_slot, .active = state->step_active};
}

int lm_step_room(struct lm_state *state, int slot, int guided)
{
    int status = MOSHI_OK;
    for (int half = 0; half < 1 + guided && !status; ++half)
        status = kv_pages_grow(&state->kv, half * state->slots + slot, state->positions[slot], 1);
    return status;
}

int lm_step_prepare(struct lm_state *state, const struct lm_step *step,
                    const struct lm_shape *shape)
{
    struct backend *backend = state->backend;
    const struct backend_ops *ops = backend->ops;
    const struct lm_rows *host = &state->host;
    const size_t user_q = (size_t)(state->lm->config.n_q - state->lm->config.dep_q);
    const size_t slots = (size_t)shape->slots, rows = (size_t)shape->rows;
    int null_row = shape->slots;
    memset(host->lane, 0, rows * sizeof *host->lane);
    memset(host->slot, 0, slots * sizeof *host->slot);
    memset(host->active, 0, rows);
    for (int i = 0; i < shape->slots; ++i) host->null_row[i] = -1;
    for (int i = 0; i < step->n; ++i) {
        const int slot = step->slots[i];
        host->slot[i] = slot;
        if (step->guided[i]) host->null_row[i] = null_row++;
        for (int half = 0; half < 1 + (step->guided[i] != 0); ++half) {
            const int lane = half * state->slots + slot, row = half ? host->null_row[i] : i;
            host->lane[row] = lane;
            host->active[row] = 1;
        }
        int status = lm_step_room(state, slot, step->guided[i] != 0);
        if (status) return status;
        ++state->offset[slot];
        ++state->positions[slot];
    }
    ops->upload(backend, state->row_lane, host->lane, rows * sizeof *host->lane);
    ops->upload(backend, state->row_slot, host->slot, slots * sizeof *host->slot);
    ops->upload(backend, state->null_row, host->null_row, slots * sizeof *host->null_row);
    ops->upload(backend, state->step_active, host->active, rows);
    ops->upload(backend, state->failed, host->zeros, (size_t)state->slots);
    ops->upload(backend, state->user, step->user, (size_t)step->n * user_q * sizeof *step->user);
    return MOSHI_OK;
}

/* Without padding: its bytes name the graph. */
struct stage {
    struct lm_state *state;
    struct lm_shape shape;
};

/* Embeds the tokens of `steps` frames of each row, and runs the layers over them; `frames` are n*steps
 * rows, with the lanes whose conditions they have. A ring of `capacity` positions. */
static void read_tokens(struct lm_state *state, struct rows rows, struct rows frames, int steps,
                        int capacity)
{
    const struct lm *lm = state->lm;
    const struct lm_config *config = &lm->config;
    const struct transformer_config *stack = &config->temporal;
    struct backend *backend = state->backend;
    const struct backend_ops *ops = backend->ops;
    const int streams = config->n_q + 1;

    ops->embed(backend, &(struct op_embed){.name = "audio_embedding",
                                           .rows = frames,
                                           .n_streams = config->n_q,
                                           .token_stride = streams,
                                           .tokens = state->tokens + 1,
                                           .tables = lm->audio_embedding,
                                           .y = state->x});
    ops->embed(backend, &(struct op_embed){.name = "text_embedding",
                                           .rows = frames,
                                           .n_streams = 1,
                                           .token_stride = streams,
                                           .tokens = state->tokens,
                                           .tables = &lm->text_embedding,
                                           .condition = state->condition,
                                           .from = state->x,
                                           .y = state->x});
    if (stack->position == POSITION_ROPE)
        ops->rope(backend, &(struct op_rope){.name = "temporal.rope",
                                             .rows = rows,
                                             .steps = steps,
                                             .head_dim = stack->dim / stack->heads,
                                             .max_period = stack->max_period,
                                             .position = state->position,
                                             .cos_sin = state->cos_sin});
    transformer_forward(&lm->temporal, backend,
                        &(struct transformer_run){
                            .rows = rows,
                            .steps = steps,
                            .context = state->context,
                            .capacity = capacity,
                            .x = state->x,
                            .position = state->position,
                            .cos_sin = stack->position == POSITION_ROPE ? state->cos_sin : NULL,
                            .cache = &state->kv.cache,
                            .query = state->query,
                            .attended = state->attended,
                            .hidden = state->hidden});
    ops->advance(backend,
                 &(struct op_advance){
                     .name = "advance", .rows = rows, .steps = steps, .position = state->position});
}

static void step_temporal(struct lm_state *state, const struct lm_shape *shape)
{
    struct backend *backend = state->backend;
    const struct lm *lm = state->lm;
    const struct lm_config *config = &lm->config;
    const struct transformer_config *stack = &config->temporal;
    const struct backend_ops *ops = backend->ops;
    const struct rows slots = slot_rows(state, shape);
    const struct rows rows = {
        .n = shape->rows, .lane = state->row_lane, .active = state->step_active};

    ops->delay_input(backend,
                     &(struct op_delay_input){.name = "delay_input",
                                              .rows = slots,
                                              .cache = &state->delay,
                                              .params = state->params,
                                              .user = shape->heard ? shape->heard : state->user,
                                              .given = shape->heard ? state->user : NULL,
                                              .null_row = state->null_row,
                                              .tokens = state->tokens});
    read_tokens(state, rows, rows, 1, state->context);
    ops->norm(backend, &(struct op_norm){.name = "out_norm",
                                         .n = rows.n,
                                         .width = stack->dim,
                                         .x = state->x,
                                         .norm = lm->out_norm,
                                         .y = state->z});
    ops->linear(backend, &(struct op_linear){.name = "text_head",
                                             .n = rows.n,
                                             .x = state->z,
                                             .weight = lm->text_head,
                                             .bias = lm->text_head_bias,
                                             .y = state->text_logits});
    ops->sample(backend, &(struct op_sample){.name = "text_sample",
                                             .rows = slots,
                                             .stream = 0,
                                             .card = config->text_card_out,
                                             .padding_id = config->text_padding_id,
                                             .logits = state->text_logits,
                                             .null_row = state->null_row,
                                             .params = state->params,
                                             .offset = state->delay.offset,
                                             .failed = state->failed,
                                             .token = state->text,
                                             .token_stride = 1});
    if (config->heads) {
        for (int i = 0; i < config->heads; ++i)
            ops->linear(backend, &(struct op_linear){.name = "extra_head",
                                                     .n = slots.n,
                                                     .x = state->z,
                                                     .weight = lm->heads[i],
                                                     .y = state->raw_heads + i * config->head_dim,
                                                     .y_stride = config->heads * config->head_dim});
        ops->softmax(backend, &(struct op_softmax){.name = "extra_head",
                                                   .n = slots.n * config->heads,
                                                   .width = config->head_dim,
                                                   .x = state->raw_heads,
                                                   .y = state->heads});
    }
}

static void step_depth(struct lm_state *state, const struct lm_shape *shape)
{
    struct backend *backend = state->backend;
    const struct rows slots = slot_rows(state, shape);
    if (state->lm->config.dep_q > 0)
        depth_forward(&state->lm->depth, &state->depth_work,
                      &(struct depth_run){.rows = {.n = shape->rows,
                                                   .lane = state->row_number,
                                                   .active = state->step_active},
                                          .slots = slots,
                                          .z = state->z,
                                          .text = state->text,
                                          .null_row = state->null_row,
                                          .params = state->params,
                                          .offset = state->delay.offset,
                                          .failed = state->failed,
                                          .logits = state->audio_logits,
                                          .audio = state->audio});
    backend->ops->delay_output(backend, &(struct op_delay_output){.name = "delay_output",
                                                                  .rows = slots,
                                                                  .cache = &state->delay,
                                                                  .text = state->text,
                                                                  .audio = state->audio,
                                                                  .out = state->output});
}

void lm_step_stage(struct lm_state *state, const struct lm_shape *shape)
{
    step_temporal(state, shape);
    step_depth(state, shape);
}

static void temporal_stage(struct backend *backend, void *arg)
{
    const struct stage *stage = arg;
    (void)backend;
    step_temporal(stage->state, &stage->shape);
}

static void depth_stage(struct backend *backend, void *arg)
{
    const struct stage *stage = arg;
    (void)backend;
    step_depth(stage->state, &stage->shape);
}

int lm_step_temporal(struct lm_state *state, const struct lm_shape *shape)
{
    return state->backend->ops->run(state->backend, STAGE_TEMPORAL, temporal_stage,
                                    &(struct stage){state, *shape}, sizeof(struct stage));
}

int lm_step_depth(struct lm_state *state, const struct lm_shape *shape)
{
    return state->backend->ops->run(state->backend, STAGE_DEPTH, depth_stage,
                                    &(struct stage){state, *shape}, sizeof(struct stage));
}

/* ---- frames that are given -------------------------------------------------------------- */

static int64_t ring_positions(const struct lm_state *state)
{
    return (int64_t)state->kv.cache.pages_per_lane * KV_PAGE_POSITIONS;
}

/* Lane `half` of a slot whose context is renewed is written to. */
static int renewed_lane(const struct lm_state *state, int slot, int guided, int half)
{
    return guided && half == 0 ? slot : state->slots + slot;
}

/* Uploads the row map of a pass over `frames` frames of each half: where their conditions are, and
 * where their keys and values go, with room for those. */
static int prepare_pass(struct lm_state *state, int slot, int halves, const int lanes[2],
                        int64_t position, int frames)
{
    const struct backend_ops *ops = state->backend->ops;
    for (int half = 0; half < halves; ++half) {
        const int32_t lane = lanes[half];
        int32_t own[64];
        for (int i = 0; i < 64; ++i) own[i] = half * state->slots + slot;
        for (int t = 0; t < frames; t += 64)
            ops->upload(state->backend, state->row_lane + half * frames + t, own,
                        (size_t)(frames - t < 64 ? frames - t : 64) * sizeof *own);
        ops->upload(state->backend, state->read_lane + half, &lane, sizeof lane);
        int status = kv_pages_grow(&state->kv, lane, position, frames);
        if (status) return status;
    }
    return MOSHI_OK;
}

struct pass {
    struct lm_state *state;
    int halves, frames;
    int given; /* through the delay cache, whose tokens these frames then read */
};

static void given_stage(struct backend *backend, void *arg)
{
    const struct pass *pass = arg;
    struct lm_state *state = pass->state;
    const struct backend_ops *ops = backend->ops;
    const struct delay_cache *delay = &state->delay;
    const struct rows slot = {.n = 1, .lane = state->row_slot, .active = state->row_active};
    const struct rows rows = {
        .n = pass->halves, .lane = state->read_lane, .active = state->row_active};
    struct op_delay_input in = {.name = "delay_input",
                                .rows = slot,
                                .cache = delay,
                                .params = state->params,
                                .user = state->user,
                                .null_row = state->null_row,
                                .tokens = state->tokens};
    struct op_delay_output out = {.name = "delay_output",
                                  .rows = slot,
                                  .cache = delay,
                                  .text = state->text,
                                  .audio = state->audio,
                                  .out = state->output};
    if (pass->given && ops->delay_given) ops->delay_given(backend, &in, &out, pass->frames);
    for (int t = 0; t < pass->frames && pass->given && !ops->delay_given; ++t) {
        ops->delay_input(backend, &in);
        ops->delay_output(backend, &out);
        in.user += delay->streams - 1 - delay->dep_q;
        in.tokens += delay->streams;
        out.text++;
        out.audio += delay->dep_q;
        out.out += 1 + delay->dep_q;
    }
    const struct rows frames = {
        .n = pass->halves * pass->frames, .lane = state->row_lane, .active = state->row_active};
    read_tokens(state, rows, frames, pass->frames, (int)ring_positions(state));
}

int lm_given_room(const struct lm_state *state, int slot, int guided)
{
    const int64_t ring = ring_positions(state), unused = ring - state->positions[slot];
    const int64_t beyond = ring - state->context + 1, rows = state->given_rows / (1 + guided);
    const int64_t room = unused > beyond ? unused : beyond;
    return (int)(room < rows ? room : rows);
}

int lm_step_given(struct lm_state *state, const struct lm_given *given)
{
    struct backend *backend = state->backend;
    const struct backend_ops *ops = backend->ops;
    const int frames = given->frames, halves = 1 + given->guided;
    const int32_t slot = given->slot, null_row = given->guided ? frames : -1;
    const size_t n = (size_t)frames, dep_q = (size_t)state->delay.dep_q;
    const size_t streams = (size_t)state->delay.streams, user_q = streams - 1 - dep_q;
    const int lanes[2] = {slot, state->slots + slot};
    int status = prepare_pass(state, slot, halves, lanes, state->positions[slot], frames);
    if (status) return status;
    ops->upload(backend, state->row_slot, &slot, sizeof slot);
    ops->upload(backend, state->null_row, &null_row, sizeof null_row);
    ops->upload(backend, state->text, given->text, n * sizeof *given->text);
    ops->upload(backend, state->audio, given->audio, n * dep_q * sizeof *given->audio);
    ops->upload(backend, state->user, given->user, n * user_q * sizeof *given->user);
    status = ops->run(backend, STAGE_GIVEN, given_stage, &(struct pass){state, halves, frames, 1},
                      0);
    if (status) return status;
    state->offset[slot] += frames;
    state->positions[slot] += frames;
    ops->download(backend, given->output, state->output, n * (1 + dep_q) * sizeof *given->output);
    if (given->read)
        ops->download(backend, given->read, state->tokens,
                      (size_t)halves * n * streams * sizeof *given->read);
    return ops->sync(backend);
}

void lm_renew_begin(struct lm_state *state, int slot, int guided)
{
    const int32_t start = 0;
    for (int half = 0; half < 1 + guided; ++half) {
        const int lane = renewed_lane(state, slot, guided, half);
        kv_pages_reset(&state->kv, lane);
        state->backend->ops->upload(state->backend, state->position + lane, &start, sizeof start);
    }
}

int lm_renew_read(struct lm_state *state, int slot, int guided, int first, int frames,
                  const int32_t *tokens)
{
    const struct backend_ops *ops = state->backend->ops;
    const int halves = 1 + guided;
    const int lanes[2] = {renewed_lane(state, slot, guided, 0),
                          renewed_lane(state, slot, guided, 1)};
    int status = prepare_pass(state, slot, halves, lanes, first, frames);
    if (status) return status;
    ops->upload(state->backend, state->tokens, tokens,
                (size_t)halves * (size_t)frames * (size_t)state->delay.streams * sizeof *tokens);
    status = ops->run(state->backend, STAGE_GIVEN, given_stage,
                      &(struct pass){state, halves, frames, 0}, 0);
    return status ? status : ops->sync(state->backend);
}

void lm_renew_end(struct lm_state *state, int slot, int guided, int positions)
{
    const int32_t position = positions, start = 0;
    state->positions[slot] = positions;
    if (guided) return;
    const int spare = state->slots + slot;
    kv_pages_share(&state->kv, spare, slot);
    kv_pages_reset(&state->kv, spare);
    state->backend->ops->upload(state->backend, state->position + slot, &position, sizeof position);
    state->backend->ops->upload(state->backend, state->position + spare, &start, sizeof start);
}
