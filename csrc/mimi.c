/* mimi.c: binding of the codec's tensors and its two streaming passes. */
#include "mimi.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

/* ---- binding ---------------------------------------------------------------------------- */

/* weight[out][in][kernel] -> rows of [kernel][in], as op_conv reads it. */
static void load_conv(struct weight_loader *loader, struct conv *conv, int in, int out, int kernel,
                      int stride, int has_bias, enum weight_format format, const char *prefix)
{
    *conv = (struct conv){.in = in, .out = out, .kernel = kernel, .stride = stride};
    struct tensor *tensor = weights_need(loader, "%s.weight", prefix);
    int64_t dims[3] = {out, in, kernel};
    if (weights_check(loader, tensor, 3, dims)) return;
    float *values = malloc((size_t)tensor->elements * sizeof *values);
    if (!values) {
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %s.weight", prefix);
        return;
    }
    for (int o = 0; o < out; ++o)
        for (int c = 0; c < in; ++c)
            for (int j = 0; j < kernel; ++j)
                values[((size_t)o * (size_t)kernel + (size_t)j) * (size_t)in + (size_t)c] =
                    tensor_element(tensor, ((int64_t)o * in + c) * kernel + j);
    weights_matrix_from(loader, values, out, kernel * in, format, &conv->weight);
    if (has_bias) conv->bias = weights_vector(loader, weights_need(loader, "%s.bias", prefix), out);
}

/* weight[in][out][2*stride] -> row p*out + o: taps p+stride (of x[t-1]) and p (of x[t]). */
static void load_conv_transposed(struct weight_loader *loader, struct conv *conv, int in, int out,
                                 int stride, enum weight_format format, const char *prefix)
{
    const int kernel = 2 * stride;
    *conv = (struct conv){.in = in, .out = out, .kernel = kernel, .stride = stride};
    struct tensor *tensor = weights_need(loader, "%s.weight", prefix);
    int64_t dims[3] = {in, out, kernel};
    if (weights_check(loader, tensor, 3, dims)) return;
    float *values = malloc((size_t)tensor->elements * sizeof *values);
    if (!values) {
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %s.weight", prefix);
        return;
    }
    for (int c = 0; c < in; ++c)
        for (int o = 0; o < out; ++o)
            for (int j = 0; j < kernel; ++j) {
                int phase = j % stride, newer = j < stride;
                size_t row = (size_t)phase * (size_t)out + (size_t)o;
                values[row * 2 * (size_t)in + (size_t)(newer ? in : 0) + (size_t)c] =
                    tensor_element(tensor, ((int64_t)c * out + o) * kernel + j);
            }
    weights_matrix_from(loader, values, stride * out, 2 * in, format, &conv->weight);
    conv->bias = weights_vector(loader, weights_need(loader, "%s.bias", prefix), out);
}

static void load_residual(struct weight_loader *loader, struct mimi_residual *residual,
                          const struct mimi_config *config, int channels, const char *prefix)
{
    char name[160];
    int inner = channels / config->compress;
    snprintf(name, sizeof name, "%s.block.1.conv.conv", prefix);
    load_conv(loader, &residual->conv1, channels, inner, config->residual_kernel, 1, 1, WEIGHT_F32,
              name);
    snprintf(name, sizeof name, "%s.block.3.conv.conv", prefix);
    load_conv(loader, &residual->conv2, inner, channels, 1, 1, 1, WEIGHT_F32, name);
}

static struct tensor *codebook_tensor(struct weight_loader *loader, const char *prefix, int level,
                                      const char *const *names)
{
    for (; names[1]; ++names) {
        struct tensor *tensor = weights_find(loader, "%s.vq.layers.%d._codebook.%s", prefix, level,
                                             names[0]);
        if (tensor) return tensor;
    }
    return weights_need(loader, "%s.vq.layers.%d._codebook.%s", prefix, level, names[0]);
}

/* E = embedding_sum / max(cluster_usage, 1e-5); older files use other names for the buffers. */
static void load_rvq(struct weight_loader *loader, struct rvq *rvq, int levels,
                     const struct mimi_config *config, const char *prefix)
{
    static const char *const sums[] = {"embed_sum", "embed_avg", "embedding_sum", NULL};
    static const char *const usages[] = {"cluster_size", "cluster_usage", NULL};
    const int bins = config->bins, dim = config->quantizer_dim, width = config->dimension;
    *rvq = (struct rvq){.levels = levels, .bins = bins, .dim = dim};
    weights_small_matrix(loader, weights_need(loader, "%s.input_proj.weight", prefix), dim, width,
                         &rvq->in_proj);
    weights_small_matrix(loader, weights_need(loader, "%s.output_proj.weight", prefix), width, dim,
                         &rvq->out_proj);
    /* The config's sizes are claims until a tensor has them. */
    const int64_t dims[2] = {bins, dim};
    if (loader->status || weights_check(loader, codebook_tensor(loader, prefix, 0, sums), 2, dims))
        return;
    size_t entries = (size_t)levels * (size_t)bins;
    float *codebooks = weight_store_allocate(loader->store, entries * (size_t)dim * 4);
    float *half_norms = weight_store_allocate(loader->store, entries * 4);
    float *level_values = malloc((size_t)bins * ((size_t)dim + 1) * sizeof *level_values);
    if (!codebooks || !half_norms || !level_values) {
        free(level_values);
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %s", prefix);
        return;
    }
    struct backend *backend = loader->store->backend;
    for (int level = 0; level < levels && !loader->status; ++level) {
        struct tensor *sum = codebook_tensor(loader, prefix, level, sums);
        struct tensor *usage = codebook_tensor(loader, prefix, level, usages);
        if (weights_check(loader, sum, 2, dims) || weights_check(loader, usage, 1, dims)) break;
        if (!weights_find(loader, "%s.vq.layers.%d._codebook._initialized", prefix, level))
            weights_find(loader, "%s.vq.layers.%d._codebook.inited", prefix, level);
        float *half = level_values + (size_t)bins * (size_t)dim;
        for (int e = 0; e < bins; ++e) {
            float count = tensor_element(usage, e), norm = 0;
            if (!(count > 1e-5f)) count = 1e-5f;
            for (int i = 0; i < dim; ++i) {
                float value = tensor_element(sum, (int64_t)e * dim + i) / count;
                level_values[(size_t)e * (size_t)dim + (size_t)i] = value;
                norm += value * value;
            }
            half[e] = norm / 2;
        }
        backend->ops->upload(backend, codebooks + (size_t)level * (size_t)bins * (size_t)dim,
                             level_values, (size_t)bins * (size_t)dim * 4);
        backend->ops->upload(backend, half_norms + (size_t)level * (size_t)bins, half,
                             (size_t)bins * 4);
    }
    free(level_values);
    rvq->codebooks = codebooks;
    rvq->half_norms = half_norms;
}

int mimi_load(struct mimi *mimi, const struct mimi_config *config, struct weight_loader *loader)
{
    memset(mimi, 0, sizeof *mimi);
    mimi->config = *config;
    const int n = config->n_ratios, top = config->n_filters << n;
    char name[160];
    if (config->stride < 2) /* upstream has no resampling layers then */
        return loader->status =
                   moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: the ratios multiply to a whole frame of %d samples, "
                              "expected two or more steps a frame",
                              tensor_file_path(loader->file), config->frame_size);

    /* SEANet numbers its layers with the ELUs between them: 0 in, then 1+3j residual, 3+3j conv. */
    load_conv(loader, &mimi->encoder_in, 1, config->n_filters, config->kernel, 1, 1, WEIGHT_F32,
              "encoder.model.0.conv.conv");
    for (int j = 0; j < n; ++j) {
        int channels = config->n_filters << j, ratio = config->ratios[n - 1 - j];
        snprintf(name, sizeof name, "encoder.model.%d", 1 + 3 * j);
        load_residual(loader, &mimi->encoder_residual[j], config, channels, name);
        snprintf(name, sizeof name, "encoder.model.%d.conv.conv", 3 + 3 * j);
        load_conv(loader, &mimi->encoder_down[j], channels, 2 * channels, 2 * ratio, ratio, 1,
                  j == n - 1 ? loader->lean : WEIGHT_F32, name);
    }
    snprintf(name, sizeof name, "encoder.model.%d.conv.conv", 2 + 3 * n);
    load_conv(loader, &mimi->encoder_out, top, config->dimension, config->last_kernel, 1, 1,
              loader->lean, name);
    transformer_load(&mimi->encoder_transformer, &config->transformer, loader,
                     "encoder_transformer.transformer", "encoder");
    load_conv(loader, &mimi->downsample, config->dimension, config->dimension, 2 * config->stride,
              config->stride, 0, loader->lean, "downsample.conv.conv.conv");
    mimi->downsample.replicate = 1;
    load_rvq(loader, &mimi->first, 1, config, "quantizer.rvq_first");
    load_rvq(loader, &mimi->rest, config->n_q - 1, config, "quantizer.rvq_rest");

    const int taps = 2 * config->stride, width = config->dimension;
    mimi->upsample = (struct conv){
        .in = width, .out = width, .kernel = taps, .stride = config->stride, .depthwise = 1};
    struct tensor *tensor = weights_need(loader, "upsample.convtr.convtr.convtr.weight");
    int64_t dims[3] = {width, 1, taps};
    float *depthwise = weight_store_allocate(loader->store, (size_t)width * (size_t)taps * 4);
    if (!depthwise && !loader->status) loader->status = MOSHI_ERROR_MEMORY;
    if (!weights_check(loader, tensor, 3, dims))
        for (int c = 0; c < width; ++c)
            for (int j = 0; j < taps; ++j) {
                float value = tensor_element(tensor, (int64_t)c * taps + j);
                loader->store->backend->ops->upload(loader->store->backend,
                                                    depthwise + (size_t)j * (size_t)width + c,
                                                    &value, sizeof value);
            }
    mimi->upsample.depthwise_weight = depthwise;
    transformer_load(&mimi->decoder_transformer, &config->transformer, loader,
                     "decoder_transformer.transformer", "decoder");
    load_conv(loader, &mimi->decoder_in, width, top, config->kernel, 1, 1, loader->lean,
              "decoder.model.0.conv.conv");
    for (int j = 0; j < n; ++j) {
        int channels = top >> j;
        snprintf(name, sizeof name, "decoder.model.%d.convtr.convtr", 2 + 3 * j);
        load_conv_transposed(loader, &mimi->decoder_up[j], channels, channels / 2,
                             config->ratios[j], j == 0 ? loader->lean : WEIGHT_F32, name);
        snprintf(name, sizeof name, "decoder.model.%d", 3 + 3 * j);
        load_residual(loader, &mimi->decoder_residual[j], config, channels / 2, name);
    }
    snprintf(name, sizeof name, "decoder.model.%d.conv.conv", 2 + 3 * n);
    load_conv(loader, &mimi->decoder_out, config->n_filters, 1, config->last_kernel, 1, 1,
              WEIGHT_F32, name);
    weights_finish(loader);
    return loader->status;
}

void mimi_free(struct mimi *mimi)
{
    transformer_free(&mimi->encoder_transformer);
    transformer_free(&mimi->decoder_transformer);
}

/* ---- state ------------------------------------------------------------------------------ */

/* Of a whole signal, layers of more steps a frame than this take a slice after the other, a step of the
 * transformers (half a frame) for each thread, so that activations stay in the second cache. The others,
 * which have nearly all weights, take all frames of a call at once. */
#define FEW_STEPS 32
#define SLICE_MOST 16

/* In steps. One frame, as in a stream, is not cut. */
static int slice_of(const struct mimi_state *state, int frames)
{
    const int stride = state->mimi->config.stride, threads = state->backend->threads;
    const int most = threads < SLICE_MOST ? threads : SLICE_MOST;
    return frames == 1 ? stride : most < frames * stride ? most : frames * stride;
}

static int down_stride(const struct mimi_config *config, int j)
{
    return config->ratios[config->n_ratios - 1 - j];
}

/* The encoder is n + 1 groups, each a convolution that shortens (the first one does not) and a
 * residual block (the last one: encoder_out). Those before this one go slice by slice. */
static int encoder_cut(const struct mimi_config *config)
{
    int steps = config->frame_size, cut = 0;
    while (cut < config->n_ratios && steps > FEW_STEPS) steps /= down_stride(config, cut++);
    return cut;
}

/* The decoder's n + 1 groups: a residual block (the first one: decoder_in), then a convolution that
 * lengthens (the last one: decoder_out). From this one on they go slice by slice. */
static int decoder_cut(const struct mimi_config *config)
{
    int steps = config->stride, cut = 0;
    do steps *= config->ratios[cut++];
    while (cut < config->n_ratios && steps <= FEW_STEPS);
    return cut;
}

/* The convolutions of one side in the order of execution; the state and the passes agree on it. */
static int list_convs(const struct mimi *mimi, int decoder, const struct conv **list)
{
    int count = 0;
    list[count++] = decoder ? &mimi->decoder_in : &mimi->encoder_in;
    for (int j = 0; j < mimi->config.n_ratios; ++j) {
        const struct mimi_residual *residual = decoder ? &mimi->decoder_residual[j]
                                                       : &mimi->encoder_residual[j];
        if (decoder) list[count++] = &mimi->decoder_up[j];
        list[count++] = &residual->conv1;
        list[count++] = &residual->conv2;
        if (!decoder) list[count++] = &mimi->encoder_down[j];
    }
    list[count++] = decoder ? &mimi->decoder_out : &mimi->encoder_out;
    list[count++] = decoder ? &mimi->upsample : &mimi->downsample;
    return count;
}

#define MAX_CONVS (3 + 3 * CONFIG_MAX_RATIOS)

static int is_transposed(const struct mimi *mimi, const struct conv *conv)
{
    return conv == &mimi->upsample ||
           (conv >= mimi->decoder_up && conv < mimi->decoder_up + CONFIG_MAX_RATIOS);
}

void mimi_cost(const struct mimi *mimi, int decoder, int levels, int64_t *bytes, int64_t *flops)
{
    const struct mimi_config *config = &mimi->config;
    const struct conv *convs[MAX_CONVS];
    const int count = list_convs(mimi, decoder, convs);
    int64_t rows = decoder ? config->stride : config->frame_size;
    *bytes = *flops = 0;
    for (int i = 0; i < count; ++i) {
        const struct conv *conv = convs[i];
        const int transposed = is_transposed(mimi, conv);
        const int64_t elements = conv->depthwise ? (int64_t)conv->kernel * conv->in
                                                 : (int64_t)conv->weight.rows * conv->weight.cols;
        if (i == count - 1) rows = decoder ? 1 : config->stride; /* up- and downsampling */
        *bytes += conv->depthwise ? elements * 4 : (int64_t)matrix_bytes(&conv->weight);
        *flops += 2 * elements * (transposed ? rows : rows / conv->stride);
        rows = transposed ? rows * conv->stride : rows / conv->stride;
    }
    const struct transformer *stack = decoder ? &mimi->decoder_transformer
                                              : &mimi->encoder_transformer;
    *bytes += transformer_bytes(stack, 0);
    *flops += 2 * config->stride * transformer_elements(stack, 0);
    const struct rvq *quantisers[2] = {&mimi->first, &mimi->rest};
    for (int q = 0; q < 2; ++q) {
        const struct rvq *rvq = quantisers[q];
        const int used = q ? levels - 1 : levels > 0;
        const struct matrix *projection = decoder ? &rvq->out_proj : &rvq->in_proj;
        if (used < 1) continue;
        int64_t elements = (int64_t)projection->rows * projection->cols;
        if (!decoder) elements += (int64_t)used * rvq->bins * rvq->dim; /* the search */
        *bytes += 4 * elements;
        *flops += 2 * elements;
    }
}

static int create_side(struct mimi_state *state, int decoder)
{
    const struct mimi *mimi = state->mimi;
    struct state_table *table = decoder ? &state->decoder : &state->encoder;
    float **history = decoder ? state->decoder_history : state->encoder_history;
    const char *side = decoder ? "decoder" : "encoder";
    const struct conv *convs[MAX_CONVS];
    int count = list_convs(mimi, decoder, convs);
    state_init(table, state->backend, state->lanes);
    for (int i = 0; i < count; ++i) {
        const struct conv *conv = convs[i];
        size_t columns = is_transposed(mimi, conv) ? 1 : (size_t)(conv->kernel - conv->stride);
        history[i] = state_add(table, FIELD_F32, columns * (size_t)conv->in, 0, "mimi.%s.conv.%d",
                               side, i);
        if (!history[i]) return MOSHI_ERROR_MEMORY;
    }
    int32_t *position = state_add(table, FIELD_I32, 1, 0, "mimi.%s.position", side);
    if (!position) return MOSHI_ERROR_MEMORY;
    if (decoder) {
        state->decoder_position = position;
    } else {
        state->encoder_position = position;
        state->downsample_first = state_add(table, FIELD_I32, 1, 1, "mimi.%s.first", side);
        if (!state->downsample_first) return MOSHI_ERROR_MEMORY;
    }
    return MOSHI_OK;
}

static void raise_to(size_t *most, size_t size)
{
    if (size > *most) *most = size;
}

/* In elements of one signal: the widest activation, rows x channels of any layer with a convolution's
 * history, and what is gathered of a frame between slices and all frames at once. */
static void measure_side(const struct mimi_state *state, int decoder, size_t *widest,
                         size_t *gathered)
{
    const struct mimi_config *config = &state->mimi->config;
    const struct conv *convs[MAX_CONVS];
    const int count = list_convs(state->mimi, decoder, convs);
    const int cut = decoder ? 3 * decoder_cut(config) - 1 : 3 * encoder_cut(config);
    const size_t steps = (size_t)config->stride;
    size_t slice = (size_t)slice_of(state, state->frames);
    if (slice < steps) slice = steps; /* a lone frame is not cut */
    size_t rows = decoder ? steps : (size_t)config->frame_size; /* of a frame */
    for (int i = 0; i < count; ++i) {
        const struct conv *conv = convs[i];
        const size_t in = (size_t)conv->in, stride = (size_t)conv->stride;
        const int sliced = (i < cut) != decoder && i < count - 1;
        if (i == count - 1) rows = steps; /* down- and upsampling */
        if (i == cut) raise_to(gathered, rows * in);
        const size_t at_once = sliced ? rows / steps * slice : rows * (size_t)state->frames;
        const int transposed = is_transposed(state->mimi, conv);
        const size_t given = transposed ? at_once * stride : at_once / stride;
        raise_to(widest, (at_once + (size_t)conv->kernel) * in);
        raise_to(widest, given * (size_t)conv->out);
        rows = transposed ? rows * stride : rows / stride;
    }
}

static void measure(struct mimi_state *state)
{
    const struct mimi_config *config = &state->mimi->config;
    const size_t lanes = (size_t)state->lanes, frames = (size_t)state->frames;
    const size_t steps = frames * (size_t)config->stride;
    size_t widest = 2 * (size_t)config->quantizer_dim * steps, gathered = 0;
    for (int decoder = 0; decoder < 2; ++decoder) measure_side(state, decoder, &widest, &gathered);
    state->buffer_bytes = widest * lanes * sizeof(float);
    state->gathered_bytes = gathered * lanes * frames * sizeof(float);
    state->small_bytes = lanes * steps * (size_t)config->transformer.dim * sizeof(float);
    state->hidden_bytes = lanes * steps * (size_t)config->transformer.feedforward * sizeof(float);
}

static int create_scratch(struct mimi_state *state)
{
    struct backend *backend = state->backend;
    const struct backend_ops *ops = backend->ops;
    const size_t lanes = (size_t)state->lanes;
    measure(state);
    for (int i = 0; i < 3; ++i) state->buffer[i] = ops->allocate(backend, state->buffer_bytes);
    state->work = ops->allocate(backend, state->buffer_bytes);
    state->gathered = ops->allocate(backend, state->gathered_bytes);
    state->query = ops->allocate(backend, state->small_bytes);
    state->attended = ops->allocate(backend, state->small_bytes);
    state->cos_sin = ops->allocate(backend, state->small_bytes);
    state->hidden = ops->allocate(backend, state->hidden_bytes);
    state->encoder_offset = calloc(lanes, sizeof *state->encoder_offset);
    state->decoder_offset = calloc(lanes, sizeof *state->decoder_offset);
    if (!state->buffer[0] || !state->buffer[1] || !state->buffer[2] || !state->work ||
        !state->gathered || !state->query || !state->attended || !state->cos_sin ||
        !state->hidden || !state->encoder_offset || !state->decoder_offset)
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the codec state of %d signals",
                          state->lanes);
    return MOSHI_OK;
}

/* The longest row of a product's matrix. */
static int most_columns(const struct mimi *mimi)
{
    const struct conv *convs[MAX_CONVS];
    int columns = mimi->config.transformer.feedforward;
    for (int decoder = 0; decoder < 2; ++decoder) {
        const int count = list_convs(mimi, decoder, convs);
        for (int i = 0; i < count; ++i)
            if (convs[i]->weight.cols > columns) columns = convs[i]->weight.cols;
    }
    return columns;
}

int mimi_state_create(struct mimi_state *state, const struct mimi *mimi, struct backend *backend,
                      int lanes, int frames, int exact_window)
{
    memset(state, 0, sizeof *state);
    state->mimi = mimi;
    state->backend = backend;
    state->lanes = lanes;
    state->frames = frames;
    state->exact_window = exact_window;
    const struct mimi_config *config = &mimi->config;
    const struct transformer_config *stack = &config->transformer;
    const int steps = frames * config->stride, ring = stack->context + steps - 1;
    if ((int64_t)lanes * frames * config->frame_size > INT_MAX / 64)
        return moshi_fail(MOSHI_ERROR_MEMORY,
                          "%d signals with frames of %d samples at once are too many", lanes,
                          config->frame_size);
    int status = create_side(state, 0);
    if (!status) status = create_side(state, 1);
    if (!status)
        status = kv_pages_create(&state->encoder_kv, backend, lanes, ring, stack, MOSHI_F32);
    if (!status)
        status = kv_pages_create(&state->decoder_kv, backend, lanes, ring, stack, MOSHI_F32);
    if (!status) status = create_scratch(state);
    if (!status)
        status = backend->ops->reserve(backend, lanes * steps, most_columns(mimi), ring + steps);
    if (status) mimi_state_destroy(state);
    return status;
}

void mimi_state_destroy(struct mimi_state *state)
{
    if (!state->backend) return;
    const struct backend_ops *ops = state->backend->ops;
    state_release(&state->encoder);
    state_release(&state->decoder);
    kv_pages_destroy(&state->encoder_kv);
    kv_pages_destroy(&state->decoder_kv);
    float *const buffers[] = {state->buffer[0], state->buffer[1], state->buffer[2], state->work};
    for (int i = 0; i < 4; ++i)
        if (buffers[i]) ops->release(state->backend, buffers[i], state->buffer_bytes);
    float *const small[] = {state->query, state->attended, state->cos_sin};
    for (int i = 0; i < 3; ++i)
        if (small[i]) ops->release(state->backend, small[i], state->small_bytes);
    if (state->hidden) ops->release(state->backend, state->hidden, state->hidden_bytes);
    if (state->gathered) ops->release(state->backend, state->gathered, state->gathered_bytes);
    free(state->encoder_offset);
    free(state->decoder_offset);
    memset(state, 0, sizeof *state);
}

void mimi_encoder_reset(struct mimi_state *state, int lane)
{
    state_reset_lane(&state->encoder, lane);
    kv_pages_reset(&state->encoder_kv, lane);
    state->encoder_offset[lane] = 0;
}

void mimi_state_reset(struct mimi_state *state, int lane)
{
    state_reset_lane(&state->encoder, lane);
    kv_pages_release(&state->encoder_kv, lane);
    state->encoder_offset[lane] = 0;
    state_reset_lane(&state->decoder, lane);
    kv_pages_release(&state->decoder_kv, lane);
    state->decoder_offset[lane] = 0;
}

void mimi_state_copy(struct mimi_state *state, int from, int to)
{
    state_copy_lane(&state->encoder, from, to);
    state_copy_lane(&state->decoder, from, to);
    kv_pages_share(&state->encoder_kv, from, to);
    kv_pages_share(&state->decoder_kv, from, to);
    state->encoder_offset[to] = state->encoder_offset[from];
    state->decoder_offset[to] = state->decoder_offset[from];
}

static void list_side(struct mimi_state *state, int decoder, int lane, const char *suffix,
                      struct snapshot *snapshot)
{
    int64_t *steps = decoder ? &state->decoder_offset[lane] : &state->encoder_offset[lane];
    char name[80];
    snprintf(name, sizeof name, "mimi.%s.steps%s", decoder ? "decoder" : "encoder", suffix);
    snapshot_host(snapshot, name, TENSOR_I64, 1, steps);
    snapshot_lane(snapshot, decoder ? &state->decoder : &state->encoder, lane, suffix);
    snapshot_pages(snapshot, decoder ? &state->decoder_kv : &state->encoder_kv, lane, *steps,
                   decoder ? "mimi.decoder.keys_values" : "mimi.encoder.keys_values", suffix);
}

void mimi_state_list(struct mimi_state *state, int lane, const char *suffix,
                     struct snapshot *snapshot)
{
    for (int decoder = 0; decoder < 2; ++decoder) list_side(state, decoder, lane, suffix, snapshot);
}

int mimi_state_make_room(struct mimi_state *state, int lane, const char *suffix,
                         struct tensor_file *file)
{
    int64_t *encoded = &state->encoder_offset[lane], *decoded = &state->decoder_offset[lane];
    int status = snapshot_count(file, MAX_FRAMES, encoded, "mimi.encoder.steps%s", suffix);
    if (!status) status = snapshot_count(file, MAX_FRAMES, decoded, "mimi.decoder.steps%s", suffix);
    if (!status) status = snapshot_make_room(&state->encoder_kv, lane, *encoded);
    if (!status) status = snapshot_make_room(&state->decoder_kv, lane, *decoded);
    return status;
}

int mimi_state_restore(struct mimi_state *state, int lane, const char *suffix,
                       struct tensor_file *file)
{
    struct snapshot items = {0};
    mimi_state_list(state, lane, suffix, &items);
    int status = snapshot_read(&items, file);
    snapshot_free(&items);
    for (int decoder = 0; decoder < 2 && !status; ++decoder) {
        int64_t steps = decoder ? state->decoder_offset[lane] : state->encoder_offset[lane];
        int32_t position;
        state->backend->ops->download(
            state->backend, &position,
            (decoder ? state->decoder_position : state->encoder_position) + lane, 4);
        if (position != steps)
            status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                "%s: the field mimi.%s.position is %d, expected %lld as its steps "
                                "say",
                                tensor_file_path(file), decoder ? "decoder" : "encoder", position,
                                (long long)steps);
    }
    return status;
}

size_t mimi_state_fixed_bytes(const struct mimi_state *state)
{
    return state_table_bytes(&state->encoder) + state_table_bytes(&state->decoder) +
           kv_pages_fixed_bytes(&state->encoder_kv) + kv_pages_fixed_bytes(&state->decoder_kv) +
           4 * state->buffer_bytes + state->gathered_bytes + 3 * state->small_bytes +
           state->hidden_bytes;
}

int mimi_encode_room(struct mimi_state *state, int lane, int frames)
{
    return kv_pages_grow(&state->encoder_kv, lane, state->encoder_offset[lane],
                         frames * state->mimi->config.stride);
}

int mimi_decode_room(struct mimi_state *state, int lane, int frames)
{
    return kv_pages_grow(&state->decoder_kv, lane, state->decoder_offset[lane],
                         frames * state->mimi->config.stride);
}

int mimi_encode_grow(struct mimi_state *state, int lane, int frames)
{
    int status = mimi_encode_room(state, lane, frames);
    if (!status) state->encoder_offset[lane] += frames * state->mimi->config.stride;
    return status;
}

int mimi_decode_grow(struct mimi_state *state, int lane, int frames)
{
    int status = mimi_decode_room(state, lane, frames);
    if (!status) state->decoder_offset[lane] += frames * state->mimi->config.stride;
    return status;
}

/* ---- passes ----------------------------------------------------------------------------- */

static void convolve(struct mimi_state *state, struct rows rows, int steps, const struct conv *conv,
                     const char *name, int elu, float *history, const float *x,
                     const float *residual, float *y)
{
    state->backend->ops->conv(
        state->backend, &(struct op_conv){.name = name,
                                          .rows = rows,
                                          .steps = steps,
                                          .conv = conv,
                                          .elu = elu,
                                          .x = x,
                                          .residual = residual,
                                          .history = history,
                                          .first = conv->replicate ? state->downsample_first : NULL,
                                          .work = state->work,
                                          .y = y});
}

static void convolve_transposed(struct mimi_state *state, struct rows rows, int steps,
                                const struct conv *conv, const char *name, int elu, float *history,
                                const float *x, float *y)
{
    state->backend->ops->conv_transposed(state->backend,
                                         &(struct op_conv_transposed){.name = name,
                                                                      .rows = rows,
                                                                      .steps = steps,
                                                                      .conv = conv,
                                                                      .elu = elu,
                                                                      .x = x,
                                                                      .history = history,
                                                                      .work = state->work,
                                                                      .y = y});
}

static void run_transformer(struct mimi_state *state, const struct transformer *transformer,
                            struct rows rows, int steps, float *x, int32_t *position,
                            const struct kv_pages *kv)
{
    const struct transformer_config *config = &transformer->config;
    const struct backend_ops *ops = state->backend->ops;
    ops->rope(state->backend, &(struct op_rope){.name = "mimi.rope",
                                                .rows = rows,
                                                .steps = steps,
                                                .head_dim = config->dim / config->heads,
                                                .max_period = config->max_period,
                                                .position = position,
                                                .cos_sin = state->cos_sin});
    int ring = kv->cache.pages_per_lane * KV_PAGE_POSITIONS;
    transformer_forward(transformer, state->backend,
                        &(struct transformer_run){.rows = rows,
                                                  .steps = steps,
                                                  .context = config->context,
                                                  .capacity = state->exact_window ? ring
                                                                                  : config->context,
                                                  .x = x,
                                                  .position = position,
                                                  .cos_sin = state->cos_sin,
                                                  .cache = &kv->cache,
                                                  .query = state->query,
                                                  .attended = state->attended,
                                                  .hidden = state->hidden});
    ops->advance(state->backend,
                 &(struct op_advance){
                     .name = "mimi.advance", .rows = rows, .steps = steps, .position = position});
}

/* Names for traces. */
static const char *const residual1_names[] = {
    "residual.0.conv1", "residual.1.conv1", "residual.2.conv1", "residual.3.conv1",
    "residual.4.conv1", "residual.5.conv1", "residual.6.conv1", "residual.7.conv1"};
static const char *const residual2_names[] = {
    "residual.0.conv2", "residual.1.conv2", "residual.2.conv2", "residual.3.conv2",
    "residual.4.conv2", "residual.5.conv2", "residual.6.conv2", "residual.7.conv2"};
static const char *const resample_names[] = {"resample.0", "resample.1", "resample.2",
                                             "resample.3", "resample.4", "resample.5",
                                             "resample.6", "resample.7"};

/* x -> y, steps -> the returned number of steps; y may be x, or any memory but buffers 0 and 1. */
static int encode_group(struct mimi_state *state, struct rows rows, int steps, int group,
                        const float *x, float *y)
{
    const struct mimi *mimi = state->mimi;
    float *const *history = state->encoder_history + 3 * group;
    float *resampled = state->buffer[0], *inner = state->buffer[1];
    if (group == 0) {
        convolve(state, rows, steps, &mimi->encoder_in, "encoder.in", 0, history[0], x, NULL,
                 resampled);
    } else {
        const struct conv *down = &mimi->encoder_down[group - 1];
        convolve(state, rows, steps, down, resample_names[group - 1], 1, history[0], x, NULL,
                 resampled);
        steps /= down->stride;
    }
    if (group == mimi->config.n_ratios) {
        convolve(state, rows, steps, &mimi->encoder_out, "encoder.out", 1, history[1], resampled,
                 NULL, y);
    } else {
        const struct mimi_residual *residual = &mimi->encoder_residual[group];
        convolve(state, rows, steps, &residual->conv1, residual1_names[group], 1, history[1],
                 resampled, NULL, inner);
        convolve(state, rows, steps, &residual->conv2, residual2_names[group], 1, history[2], inner,
                 resampled, y);
    }
    return steps;
}

static int decode_group(struct mimi_state *state, struct rows rows, int steps, int group,
                        const float *x, float *y)
{
    const struct mimi *mimi = state->mimi;
    float *const *history = state->decoder_history + 3 * group;
    float *sum = state->buffer[0], *inner = state->buffer[1];
    if (group == 0) {
        convolve(state, rows, steps, &mimi->decoder_in, "decoder.in", 0, history[0], x, NULL, sum);
    } else {
        const struct mimi_residual *residual = &mimi->decoder_residual[group - 1];
        convolve(state, rows, steps, &residual->conv1, residual1_names[group - 1], 1, history[-1],
                 x, NULL, inner);
        convolve(state, rows, steps, &residual->conv2, residual2_names[group - 1], 1, history[0],
                 inner, x, sum);
    }
    if (group == mimi->config.n_ratios) {
        convolve(state, rows, steps, &mimi->decoder_out, "decoder.out", 1, history[1], sum, NULL,
                 y);
        return steps;
    }
    convolve_transposed(state, rows, steps, &mimi->decoder_up[group], resample_names[group], 1,
                        history[1], sum, y);
    return steps * mimi->decoder_up[group].stride;
}

/* Steps `first`.. of the signals `rows`, `count` of them; the first signal is number `signal`. */
struct slice {
    struct rows rows;
    int signal, first, count;
};

/* The next one of a call, in order; 0 after the last. All signals' one frame is one slice. */
static int next_slice(const struct mimi_state *state, struct rows rows, int frames,
                      struct slice *slice)
{
    const int most = slice_of(state, frames), steps = frames * state->mimi->config.stride;
    slice->first += slice->count;
    if (slice->first >= steps) {
        slice->first = 0;
        slice->signal++;
    }
    if (slice->signal >= (frames == 1 ? 1 : rows.n)) return 0;
    slice->rows = frames == 1
                      ? rows
                      : (struct rows){1, rows.lane + slice->signal, rows.active + slice->signal};
    slice->count = steps - slice->first < most ? steps - slice->first : most;
    return 1;
}

void mimi_encode(struct mimi_state *state, struct rows rows, int frames, const float *pcm,
                 int levels, int32_t *codes)
{
    const struct mimi *mimi = state->mimi;
    const struct mimi_config *config = &mimi->config;
    const int cut = encoder_cut(config), samples = config->frame_size / config->stride;
    float *x = state->buffer[2], *y = state->buffer[0];
    const float *from = pcm;
    int steps = frames * config->frame_size;
    int width = samples; /* floats of a step, between the groups that are sliced and the others */
    for (int group = 1; group < cut; ++group) width /= down_stride(config, group - 1);
    if (cut > 0) {
        steps = frames * config->stride * width;
        width *= config->n_filters << (cut - 1);
        from = state->gathered;
    }
    for (struct slice slice = {0}; cut > 0 && next_slice(state, rows, frames, &slice);) {
        const size_t at = (size_t)slice.signal * (size_t)(frames * config->stride) +
                          (size_t)slice.first;
        int now = slice.count * samples;
        for (int group = 0; group < cut; ++group)
            now = encode_group(state, slice.rows, now, group,
                               group ? x : pcm + at * (size_t)samples,
                               group < cut - 1 ? x : state->gathered + at * (size_t)width);
    }
    for (int group = cut; group <= config->n_ratios; ++group, from = x)
        steps = encode_group(state, rows, steps, group, from, x);
    run_transformer(state, &mimi->encoder_transformer, rows, steps, x, state->encoder_position,
                    &state->encoder_kv);
    convolve(state, rows, steps, &mimi->downsample, "downsample", 0,
             state->encoder_history[2 + 3 * config->n_ratios], x, NULL, y);
    const struct backend_ops *ops = state->backend->ops;
    ops->rvq_encode(state->backend, &(struct op_rvq_encode){.name = "rvq_first",
                                                            .n = rows.n * frames,
                                                            .levels = 1,
                                                            .code_stride = levels,
                                                            .rvq = &mimi->first,
                                                            .x = y,
                                                            .codes = codes,
                                                            .work = state->work});
    if (levels > 1)
        ops->rvq_encode(state->backend, &(struct op_rvq_encode){.name = "rvq_rest",
                                                                .n = rows.n * frames,
                                                                .levels = levels - 1,
                                                                .code_stride = levels,
                                                                .rvq = &mimi->rest,
                                                                .x = y,
                                                                .codes = codes + 1,
                                                                .work = state->work});
}

void mimi_decode(struct mimi_state *state, struct rows rows, int frames, const int32_t *codes,
                 int levels, int code_stride, float *pcm)
{
    const struct mimi *mimi = state->mimi;
    const struct mimi_config *config = &mimi->config;
    const int cut = decoder_cut(config), samples = config->frame_size / config->stride;
    float *x = state->buffer[2], *y = state->buffer[0];
    const struct backend_ops *ops = state->backend->ops;
    ops->rvq_decode(state->backend, &(struct op_rvq_decode){.name = "rvq_first",
                                                            .n = rows.n * frames,
                                                            .levels = 1,
                                                            .code_stride = code_stride,
                                                            .rvq = &mimi->first,
                                                            .codes = codes,
                                                            .work = state->work,
                                                            .y = y});
    if (levels > 1)
        ops->rvq_decode(state->backend, &(struct op_rvq_decode){.name = "rvq_rest",
                                                                .n = rows.n * frames,
                                                                .levels = levels - 1,
                                                                .code_stride = code_stride,
                                                                .accumulate = 1,
                                                                .rvq = &mimi->rest,
                                                                .codes = codes + 1,
                                                                .work = state->work,
                                                                .y = y});
    convolve_transposed(state, rows, frames, &mimi->upsample, "upsample", 0,
                        state->decoder_history[2 + 3 * config->n_ratios], y, x);
    int steps = frames * config->stride;
    run_transformer(state, &mimi->decoder_transformer, rows, steps, x, state->decoder_position,
                    &state->decoder_kv);
    for (int group = 0; group < cut; ++group)
        steps = decode_group(state, rows, steps, group, x, group < cut - 1 ? x : state->gathered);
    steps /= frames * config->stride; /* of a step */
    const size_t width = (size_t)steps * (size_t)mimi->decoder_up[cut - 1].out;
    for (struct slice slice = {0}; next_slice(state, rows, frames, &slice);) {
        const size_t at = (size_t)slice.signal * (size_t)(frames * config->stride) +
                          (size_t)slice.first;
        int now = slice.count * steps;
        for (int group = cut; group <= config->n_ratios; ++group)
            now = decode_group(state, slice.rows, now, group,
                               group == cut ? state->gathered + at * width : x,
                               group < config->n_ratios ? x : pcm + at * (size_t)samples);
    }
}
