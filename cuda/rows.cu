/* rows.cu: operations on rows, positions and tokens that are little work: what counts is that each is
 * one launch, and that the wide ones use the whole card. */
#include <math.h>

#include "device.h"

#define THREADS 256
#define WARPS (THREADS / WARP)

/* ---- embed ------------------------------------------------------------------------------ */

struct embed_stream {
    const void *table, *low_rank;
    const float *norm_weight, *norm_bias;
    int rows, alias, alias_of;
    uint8_t table_format, low_rank_format, norm, reserved;
    float eps;
};

struct embed {
    struct embed_stream streams[MOSHI_MAX_CODEBOOKS];
    const int32_t *tokens, *lane;
    const uint8_t *active;
    const float *condition, *from;
    float *y;
    struct cuda_report *report;
    int n_streams, token_stride, width, columns;
};

/* The value that stream s adds to output d; by the whole block, as a norm or a low rank needs the
 * token's whole row. */
__device__ static float embed_value(const struct embed &p, const struct embed_stream &stream,
                                    int token, int d, float *shared)
{
    struct norm norm = {(enum norm_kind)stream.norm, stream.eps, stream.norm_weight,
                        stream.norm_bias};
    float *row = shared + WARPS, value = 0;
    long at = (long)token * p.columns;

    if (norm.kind == NORM_NONE && !stream.low_rank)
        return d < p.width ? element(stream.table, stream.table_format, at + d) : 0;
    for (int k = (int)threadIdx.x; k < p.columns; k += THREADS)
        row[k] = element(stream.table, stream.table_format, at + k);
    norm_row(norm, row, p.columns, row, shared, in_order());
    __syncthreads();
    if (d < p.width && !stream.low_rank) value = row[d];
    /* Unrolled, registers would spill on compute capability 10.0. */
    if (d < p.width && stream.low_rank)
#pragma unroll 1
        for (int k = 0; k < p.columns; k++)
            value = fmaf(element(stream.low_rank, stream.low_rank_format, (long)d * p.columns + k),
                         row[k], value);
    __syncthreads(); /* the next stream writes the row again */
    return value;
}

/* Grid: pieces of the width, rows. Bytes: a row of each table. */
__global__ static void __launch_bounds__(THREADS) k_embed(const __grid_constant__ struct embed p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    int i = (int)blockIdx.y, d = (int)(blockIdx.x * THREADS + threadIdx.x);
    const int32_t *tokens = p.tokens + (long)i * p.token_stride;
    float *y = p.y + (long)i * p.width + d, sum = 0;

    if (p.from && d < p.width) sum = p.from[(long)i * p.width + d];
    for (int s = 0; s < p.n_streams && p.active[i]; s++) {
        const struct embed_stream &stream = p.streams[s];
        int token = tokens[s];

        if (stream.alias_of > 0 && token == stream.alias) token = stream.alias_of;
        if (token == TOKEN_ZERO) continue;
        if (!is_row_of(token, stream.rows, i, p.report)) return;
        sum += embed_value(p, stream, token, d, (float *)(void *)shared);
    }
    if (d >= p.width) return;
    if (p.condition && p.active[i]) sum += p.condition[(long)p.lane[i] * p.width + d];
    *y = sum;
}

static int readable(struct cuda_backend *cuda, const char *name, const struct matrix *w)
{
    if (w->rows == 0 || !is_block_format(w->format)) return 1;
    cuda_fail(cuda, MOSHI_ERROR_DEVICE, "%s: a table in a block format, expected f32, f16 or bf16",
              name);
    return 0;
}

void cuda_embed(struct backend *backend, const struct op_embed *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    struct embed p = blank<struct embed>();
    const struct embedding *e = op->tables;
    size_t shared = WARPS * sizeof(float);

    p.width = e->low_rank.rows ? e->low_rank.rows : e->table.cols;
    p.columns = e->table.cols;
    p.tokens = op->tokens;
    p.token_stride = op->token_stride;
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.condition = op->condition;
    p.y = op->y;
    p.report = cuda->report;
    p.from = op->from;
    p.n_streams = op->n_streams;
    for (int s = 0; s < op->n_streams; s++, e++) {
        struct embed_stream *stream = &p.streams[s];

        if (!readable(cuda, op->name, &e->table) || !readable(cuda, op->name, &e->low_rank)) return;
        stream->table = e->table.data;
        stream->table_format = (uint8_t)e->table.format;
        stream->rows = e->table.rows;
        if (e->low_rank.rows) stream->low_rank = e->low_rank.data;
        stream->low_rank_format = (uint8_t)e->low_rank.format;
        stream->norm = (uint8_t)e->norm.kind;
        stream->eps = e->norm.eps;
        stream->norm_weight = e->norm.weight;
        stream->norm_bias = e->norm.bias;
        stream->alias = e->alias;
        stream->alias_of = e->alias_of;
        if (stream->low_rank || e->norm.kind != NORM_NONE)
            shared = ((size_t)p.columns + WARPS) * sizeof(float);
    }
    if (op->rows.n && cuda_fits(cuda, op->name, shared))
        launch(cuda, k_embed, dim3((unsigned)ceil_div(p.width, THREADS), (unsigned)op->rows.n),
               THREADS, shared, p);
}

/* ---- norm, softmax ---------------------------------------------------------------------- */

struct norm_rows {
    const float *x;
    float *y;
    struct norm norm;
    int width;
};

__global__ static void __launch_bounds__(THREADS) k_norm(const __grid_constant__ struct norm_rows p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    long at = (long)blockIdx.x * p.width;

    norm_row(p.norm, p.x + at, p.width, p.y + at, (float *)(void *)shared, in_order());
}

void cuda_norm(struct backend *backend, const struct op_norm *op)
{
    struct norm_rows p = blank<struct norm_rows>();

    p.x = op->x;
    p.y = op->y;
    p.norm = op->norm;
    p.width = op->width;
    if (op->n)
        launch(cuda_of(backend), k_norm, dim3((unsigned)op->n), THREADS, WARPS * sizeof(float), p);
}

struct softmax_rows {
    const float *x;
    float *y;
    int width;
};

__global__ static void __launch_bounds__(THREADS)
    k_softmax(const __grid_constant__ struct softmax_rows p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    float *parts = (float *)(void *)shared, most = -INFINITY, sum = 0;
    const float *x = p.x + (long)blockIdx.x * p.width;
    float *y = p.y + (long)blockIdx.x * p.width;

    for (int k = (int)threadIdx.x; k < p.width; k += THREADS) most = fmaxf(most, x[k]);
    most = block_max(most, parts);
    for (int k = (int)threadIdx.x; k < p.width; k += THREADS) {
        y[k] = expf(x[k] - most);
        sum += y[k];
    }
    sum = 1.0f / block_sum(sum, parts);
    for (int k = (int)threadIdx.x; k < p.width; k += THREADS) y[k] *= sum;
}

void cuda_softmax(struct backend *backend, const struct op_softmax *op)
{
    struct softmax_rows p = blank<struct softmax_rows>();

    p.x = op->x;
    p.y = op->y;
    p.width = op->width;
    if (op->n)
        launch(cuda_of(backend), k_softmax, dim3((unsigned)op->n), THREADS, WARPS * sizeof(float),
               p);
}

/* ---- positions -------------------------------------------------------------------------- */

#define MOST_PAIRS 512

struct rope {
    float frequencies[MOST_PAIRS];
    const int32_t *lane, *position;
    const uint8_t *active;
    float *cos_sin;
    int steps, half;
};

__global__ static void __launch_bounds__(MOST_PAIRS) k_rope(const __grid_constant__ struct rope p)
{
    after_earlier_kernels();
    int row = (int)blockIdx.x, i = row / p.steps, pair = (int)threadIdx.x;

    if (!p.active[i] || pair >= p.half) return;
    float angle = (float)(p.position[p.lane[i]] + row % p.steps) * p.frequencies[pair];
    float *out = p.cos_sin + 2 * ((long)row * p.half + pair);

    out[0] = cosf(angle);
    out[1] = sinf(angle);
}

void cuda_rope(struct backend *backend, const struct op_rope *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    struct rope p = blank<struct rope>();

    p.half = op->head_dim / 2;
    if (p.half > MOST_PAIRS) {
        cuda_fail(cuda, MOSHI_ERROR_DEVICE, "%s: heads of %d, expected at most %d", op->name,
                  op->head_dim, 2 * MOST_PAIRS);
        return;
    }
    for (int pair = 0; pair < p.half; pair++)
        p.frequencies[pair] = (float)exp(-log(op->max_period) * 2 * pair / op->head_dim);
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.position = op->position;
    p.cos_sin = op->cos_sin;
    p.steps = op->steps;
    if (op->rows.n && p.half)
        launch(cuda, k_rope, dim3((unsigned)(op->rows.n * op->steps)),
               (unsigned)round_up(p.half, WARP), 0, p);
}

struct advance {
    const int32_t *lane;
    const uint8_t *active;
    int32_t *position;
    int n, steps;
};

__global__ static void k_advance(const __grid_constant__ struct advance p)
{
    after_earlier_kernels();
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);

    if (i < p.n && p.active[i]) p.position[p.lane[i]] += p.steps;
}

void cuda_advance(struct backend *backend, const struct op_advance *op)
{
    struct advance p = blank<struct advance>();

    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.position = op->position;
    p.n = op->rows.n;
    p.steps = op->steps;
    if (p.n) launch(cuda_of(backend), k_advance, dim3((unsigned)ceil_div(p.n, WARP)), WARP, 0, p);
}

/* ---- delays ----------------------------------------------------------------------------- */

struct delays {
    struct delay_cache cache;
    const int32_t *lane;
    const uint8_t *active;
    const struct slot_params *params;
    const int32_t *user, *given, *null_row; /* of the input */
    int32_t *tokens;
    const int32_t *text, *audio; /* of the output */
    int32_t *out;
    int n;
};

__device__ static int32_t *delay_cell(const struct delay_cache &cache, int slot, int stream,
                                      int column)
{
    return cache.tokens + ((long)slot * cache.streams + stream) * cache.columns +
           column % cache.columns;
}

__device__ static int32_t null_token(const struct slot_params &params, int stream, int offset,
                                     int delay, int32_t token)
{
    if (params.cfg_masked_until >= 0 && offset <= (int64_t)delay + params.cfg_masked_until)
        return TOKEN_ZERO;
    return stream == 0 && params.cfg_no_text ? TOKEN_ZERO : token;
}

/* A thread is a row: streams are few, and a column may be written and read in one frame. */
__global__ static void k_delay_input(const __grid_constant__ struct delays p)
{
    after_earlier_kernels();
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), users;

    if (i >= p.n) return;
    const struct delay_cache &cache = p.cache;
    int slot = p.lane[i], active = p.active[i], null_row = p.null_row[i];
    int32_t offset = active ? cache.offset[slot] : 0;

    users = cache.streams - 1 - cache.dep_q;
    for (int j = 0; j < users && active; j++) {
        int stream = 1 + cache.dep_q + j;

        int32_t token = p.given ? p.given[(long)i * users + j] : TOKEN_FREE;

        *delay_cell(cache, slot, stream, offset + cache.delays[stream]) =
            token == TOKEN_FREE ? p.user[(long)i * users + j] : token;
    }
    for (int s = 0; s < cache.streams; s++) {
        int32_t delay = cache.delays[s], token = s ? cache.initial_audio : cache.initial_text;
        int is_initial = !active || offset <= delay;

        if (!is_initial) token = *delay_cell(cache, slot, s, offset);
        p.tokens[(long)i * cache.streams + s] = token;
        if (null_row >= 0)
            p.tokens[(long)null_row * cache.streams + s] =
                is_initial ? token : null_token(p.params[slot], s, offset, delay, token);
    }
}

static struct delays delays_of(const struct op_delay_input *op)
{
    struct delays p = blank<struct delays>();

    p.cache = *op->cache;
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.params = op->params;
    p.user = op->user;
    p.given = op->given;
    p.null_row = op->null_row;
    p.tokens = op->tokens;
    p.n = op->rows.n;
    return p;
}

void cuda_delay_input(struct backend *backend, const struct op_delay_input *op)
{
    const struct delays p = delays_of(op);

    if (p.n)
        launch(cuda_of(backend), k_delay_input, dim3((unsigned)ceil_div(p.n, WARP)), WARP, 0, p);
}

__global__ static void k_delay_output(const __grid_constant__ struct delays p)
{
    after_earlier_kernels();
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);

    if (i >= p.n) return;
    const struct delay_cache &cache = p.cache;
    int slot = p.lane[i], offset = 0, dep_q = cache.dep_q;

    if (p.active[i]) {
        offset = ++cache.offset[slot];
        *delay_cell(cache, slot, 0, offset) = p.text[i];
        for (int k = 0; k < dep_q; k++)
            *delay_cell(cache, slot, 1 + k, offset) = p.audio[(long)i * dep_q + k];
    }
    for (int s = 0; s <= dep_q; s++)
        p.out[(long)i * (1 + dep_q) + s] =
            offset > cache.max_delay
                ? *delay_cell(cache, slot, s, offset - cache.max_delay + cache.delays[s])
                : TOKEN_NONE;
}

static struct delays delays_of(const struct op_delay_output *op)
{
    struct delays p = blank<struct delays>();

    p.cache = *op->cache;
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.text = op->text;
    p.audio = op->audio;
    p.out = op->out;
    p.n = op->rows.n;
    return p;
}

void cuda_delay_output(struct backend *backend, const struct op_delay_output *op)
{
    const struct delays p = delays_of(op);

    if (p.n)
        launch(cuda_of(backend), k_delay_output, dim3((unsigned)ceil_div(p.n, WARP)), WARP, 0, p);
}

struct given {
    struct delays in, out;
    int frames;
};

/* Grid: streams, which know nothing of each other. What a frame reads of its stream was given so many
 * frames before, or is in the cache from before all of them; then its last columns are kept. */
__global__ static void k_delay_given(const __grid_constant__ struct given p)
{
    after_earlier_kernels();
    const struct delay_cache &cache = p.in.cache;
    const int s = (int)blockIdx.x, dep_q = cache.dep_q, said = s <= dep_q;
    const int users = cache.streams - 1 - dep_q, slot = p.in.lane[0], null_row = p.in.null_row[0];
    const int32_t offset = cache.offset[slot], delay = cache.delays[s], late = said ? 1 : delay;
    const int32_t *from = s == 0 ? p.out.text
                          : said ? p.out.audio + s - 1
                                 : p.in.user + s - 1 - dep_q;
    const int stride = s == 0 ? 1 : said ? dep_q : users;

    for (int t = (int)threadIdx.x; t < p.frames; t += (int)blockDim.x) {
        const int32_t o = offset + t;
        const int is_initial = o <= delay;
        int32_t token = s ? cache.initial_audio : cache.initial_text;

        if (!is_initial)
            token = t >= late ? from[(long)(t - late) * stride] : *delay_cell(cache, slot, s, o);
        p.in.tokens[(long)t * cache.streams + s] = token;
        if (null_row >= 0)
            p.in.tokens[(long)(null_row + t) * cache.streams + s] =
                is_initial ? token : null_token(p.in.params[slot], s, o, delay, token);
        if (!said) continue;
        const int given = t - cache.max_delay + delay; /* that frame's token comes out now */

        p.out.out[(long)t * (1 + dep_q) + s] = o + 1 <= cache.max_delay ? TOKEN_NONE
                                               : given >= 0 ? from[(long)given * stride]
                                                            : *delay_cell(cache, slot, s,
                                                                          offset + 1 + given);
    }
    __syncthreads(); /* all have read the cache */
    for (int t = p.frames - 1 - (int)threadIdx.x; t >= 0 && t >= p.frames - cache.columns;
         t -= (int)blockDim.x)
        *delay_cell(cache, slot, s, offset + t + late) = from[(long)t * stride];
}

void cuda_delay_given(struct backend *backend, const struct op_delay_input *in,
                      const struct op_delay_output *out, int frames)
{
    struct given p = blank<struct given>();
    struct op_advance advance = {};

    p.in = delays_of(in);
    p.out = delays_of(out);
    p.frames = frames;
    launch(cuda_of(backend), k_delay_given, dim3((unsigned)p.in.cache.streams), 4 * WARP, 0, p);
    advance.rows = in->rows;
    advance.position = in->cache->offset;
    advance.steps = frames;
    cuda_advance(backend, &advance);
}
