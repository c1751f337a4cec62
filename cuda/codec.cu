/* codec.cu: what Mimi needs besides transformers.
 *
 * A convolution is a product without copying, as on the CPU: `work` gets the history and the new steps
 * side by side, row t of A begins at step t * stride. Matrices that are large have few positions to
 * work on and are read by cuda_product; small ones have many and go through cuda_tiles. Which of the
 * two depends on the matrix alone, and both add a sum in an order that depends on nothing else, so that
 * a frame has the same bits alone and in a file. */
#include <math.h>

#include "device.h"

#define THREADS 256

/* ---- tiles ------------------------------------------------------------------------------ */

#define LARGE_MATRIX (1 << 20) /* elements */
#define SIDE 16 /* threads of a tile in each direction */
#define DEPTH 32 /* columns in shared memory at a time */

struct tiles {
    const void *weight;
    const float *row_scales; /* of int8 rows, or NULL */
    const float *x;
    const float *bias, *scale, *from;
    float *y;
    long row_stride, step_stride, y_stride;
    int rows, steps, outputs, columns, bias_period;
};

/* A thread makes R x O sums, each over the columns in order. Bound: multiply-adds; of one caller's frame
 * the latency of a tile, so that small tiles are better; of many callers' what shared memory gives: R + O
 * words for R O multiply-adds, a quarter of the card's rate with 2 x 2 and two thirds with 8 x 4. */
template <class T, int R, int O>
__global__ static void __launch_bounds__(THREADS) k_tiles(const __grid_constant__ struct tiles p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    const int rows = R * SIDE, outputs = O * SIDE;
    float (*a)[rows + 1] = (float (*)[rows + 1])(void *)shared; /* [DEPTH], turned */
    float (*w)[outputs + 1] = (float (*)[outputs + 1])(void *)(a + DEPTH);
    int first_row = (int)blockIdx.x * rows, first_output = (int)blockIdx.y * outputs;
    int column = (int)threadIdx.x % DEPTH, line = (int)threadIdx.x / DEPTH;
    int r = (int)threadIdx.x / SIDE, o = (int)threadIdx.x % SIDE;
    float sums[R][O] = {};

    for (int k = 0; k < p.columns; k += DEPTH) {
        int inside = k + column < p.columns;

        for (int i = line; i < rows; i += THREADS / DEPTH) {
            int row = first_row + i;

            a[column][i] =
                inside && row < p.rows
                    ? p.x[row / p.steps * p.row_stride + row % p.steps * p.step_stride + k + column]
                    : 0;
        }
        for (int i = line; i < outputs; i += THREADS / DEPTH) {
            int output = first_output + i;

            w[column][i] = inside && output < p.outputs
                               ? widen(((const T *)p.weight)[(long)output * p.columns + k + column])
                               : 0;
        }
        __syncthreads();
#pragma unroll(R + O > 4 ? 4 : 32)
        for (int c = 0; c < DEPTH; c++) {
            float left[R], right[O];

#pragma unroll
            for (int i = 0; i < R; i++) left[i] = a[c][r + i * SIDE];
#pragma unroll
            for (int j = 0; j < O; j++) right[j] = w[c][o + j * SIDE];
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int j = 0; j < O; j++) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
        }
        __syncthreads(); /* the next columns go to the same place */
    }
#pragma unroll
    for (int i = 0; i < R * O; i++) {
        int row = first_row + r + i / O * SIDE, output = first_output + o + i % O * SIDE;
        long at = row * p.y_stride + output;

        if (row >= p.rows || output >= p.outputs) continue;
        float v = sums[i / O][i % O];

        if (p.row_scales) v *= p.row_scales[output];
        if (p.bias) v += p.bias[output % p.bias_period];
        if (p.from) v += p.from[at];
        p.y[at] = v;
    }
}

template <class T, int R, int O>
static void launch_tiles(struct cuda_backend *cuda, const struct tiles &p)
{
    launch(cuda, k_tiles<T, R, O>,
           dim3((unsigned)ceil_div(p.rows, R * SIDE), (unsigned)ceil_div(p.outputs, O * SIDE)),
           THREADS, DEPTH * (R * SIDE + 1 + O * SIDE + 1) * sizeof(float), p);
}

/* Large tiles where there are enough of them. */
template <class T> static void choose_tiles(struct cuda_backend *cuda, const struct tiles &p)
{
    const int narrow = p.outputs <= 2 * SIDE,
              columns = ceil_div(p.outputs, narrow ? 2 * SIDE : 4 * SIDE);

    if (ceil_div(p.rows, 8 * SIDE) * columns < cuda->processors)
        launch_tiles<T, 2, 2>(cuda, p);
    else if (narrow)
        launch_tiles<T, 8, 2>(cuda, p);
    else
        launch_tiles<T, 8, 4>(cuda, p);
}

void cuda_tiles(struct cuda_backend *cuda, const struct matrix *weight,
                const struct product_rows *rows)
{
    struct tiles p = blank<struct tiles>();

    p.weight = weight->data;
    p.row_scales = weight->scales;
    p.x = rows->x;
    p.bias = rows->bias;
    p.from = rows->from;
    p.y = rows->y;
    p.row_stride = rows->row_stride;
    p.step_stride = rows->step_stride;
    p.y_stride = rows->y_stride ? rows->y_stride : weight->rows;
    p.rows = rows->rows;
    p.steps = rows->steps;
    p.outputs = weight->rows;
    p.columns = weight->cols;
    p.bias_period = rows->bias_period ? rows->bias_period : weight->rows;
    if (p.rows == 0) return;
    if (weight->format == WEIGHT_F32)
        choose_tiles<float>(cuda, p);
    else if (weight->format == WEIGHT_F16)
        choose_tiles<struct f16>(cuda, p);
    else if (weight->format == WEIGHT_BF16)
        choose_tiles<struct bf16>(cuda, p);
    else
        choose_tiles<int8_t>(cuda, p);
}

static void convolve(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                     const struct product_rows *rows)
{
    if (!weight->packed && (long)weight->rows * weight->cols < LARGE_MATRIX)
        cuda_tiles(cuda, weight, rows);
    else
        cuda_product(cuda, name, weight, rows);
}

/* ---- history ---------------------------------------------------------------------------- */

struct fill {
    const float *x; /* [n][steps][width] */
    float *history; /* [lanes][past][width] */
    float *work;    /* [n][past + steps][width] */
    const int32_t *lane;
    const uint8_t *active;
    int32_t *first; /* [lanes] or NULL */
    int steps, width, past, elu;
};

/* The history of one row goes in front of its work, and becomes what follows: by the first block of the
 * row, a thread for each channel, step by step. */
__device__ static void turn_history(const struct fill &p, int i, float *work)
{
    int lane = p.lane[i], fresh = p.first && p.first[lane];
    float *history = p.history + (long)lane * p.past * p.width;
    const float *x = p.x + (long)i * p.steps * p.width;

    for (int c = (int)threadIdx.x; c < p.width; c += THREADS) {
        float start = fresh ? (p.elu ? elu(x[c]) : x[c]) : 0;

        for (int t = 0; t < p.past; t++)
            work[(long)t * p.width + c] = fresh ? start : history[(long)t * p.width + c];
        for (int t = 0; t < p.past;
             t++) { /* step t of the new history is step t + steps of the work */
            int from = t + p.steps - p.past;
            float value = 0;

            if (from < 0)
                value = work[(long)(t + p.steps) * p.width + c];
            else
                value = p.elu ? elu(x[(long)from * p.width + c]) : x[(long)from * p.width + c];
            history[(long)t * p.width + c] = value;
        }
    }
    if (!p.first) return;
    __syncthreads(); /* all have read whether it is the first call */
    if (threadIdx.x == 0) p.first[lane] = 0;
}

/* Grid: pieces of a row's new steps, and one block more for its history; rows. Bytes: x and work. */
__global__ static void k_fill(const __grid_constant__ struct fill p)
{
    after_earlier_kernels();
    int i = (int)blockIdx.y, pieces = (int)gridDim.x - 1;
    float *work = p.work + (long)i * (p.past + p.steps) * p.width;
    long count = (long)p.steps * p.width;

    if (!p.active[i]) return;
    if ((int)blockIdx.x == pieces) {
        turn_history(p, i, work);
        return;
    }
    work += (long)p.past * p.width;
    for (long at = (long)blockIdx.x * THREADS + threadIdx.x; at < count;
         at += (long)pieces * THREADS) {
        float value = p.x[(long)i * count + at];

        work[at] = p.elu ? elu(value) : value;
    }
}

static void launch_fill(struct cuda_backend *cuda, const struct rows *rows, struct fill &p)
{
    long pieces = ((long)p.steps * p.width + THREADS - 1) / THREADS;

    p.lane = rows->lane;
    p.active = rows->active;
    if (pieces > 2 * cuda->processors) pieces = 2 * cuda->processors;
    if (rows->n) launch(cuda, k_fill, dim3((unsigned)pieces + 1, (unsigned)rows->n), THREADS, 0, p);
}

void cuda_conv(struct backend *backend, const struct op_conv *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    const struct conv *conv = op->conv;
    struct product_rows rows = {};
    struct fill fill = blank<struct fill>();

    fill.x = op->x;
    fill.history = op->history;
    fill.work = op->work;
    fill.first = conv->replicate ? op->first : NULL;
    fill.steps = op->steps;
    fill.width = conv->in;
    fill.past = conv->kernel - conv->stride;
    fill.elu = op->elu;
    rows.x = op->work;
    rows.steps = op->steps / conv->stride;
    rows.rows = op->rows.n * rows.steps;
    rows.row_stride = (long)(fill.past + op->steps) * conv->in;
    rows.step_stride = (long)conv->stride * conv->in;
    rows.bias = conv->bias;
    rows.from = op->residual;
    rows.y = op->y;
    if (fill.past == 0 && !op->elu)
        rows.x = op->x;
    else
        launch_fill(cuda, &op->rows, fill);
    convolve(cuda, op->name, &conv->weight, &rows);
}

/* ---- transposed ------------------------------------------------------------------------- */

struct depthwise {
    const float *x, *weight, *bias;
    float *history, *y;
    const int32_t *lane;
    const uint8_t *active;
    int steps, width, stride, elu;
};

/* Grid: channels, rows; a thread goes through the steps of its channel. */
__global__ static void k_depthwise(const __grid_constant__ struct depthwise p)
{
    after_earlier_kernels();
    int i = (int)blockIdx.y, c = (int)(blockIdx.x * blockDim.x + threadIdx.x);

    if (!p.active[i] || c >= p.width) return;
    float *history = p.history + (long)p.lane[i] * p.width + c, past = *history;

    for (int t = 0; t < p.steps; t++) {
        long step = (long)i * p.steps + t;
        float now = p.x[step * p.width + c];

        if (p.elu) now = elu(now);
        for (int phase = 0; phase < p.stride; phase++)
            p.y[(step * p.stride + phase) * p.width + c] =
                (p.weight[(long)phase * p.width + c] * now +
                 p.weight[(long)(p.stride + phase) * p.width + c] * past) +
                (p.bias ? p.bias[c] : 0.0f);
        past = now;
    }
    *history = past;
}

static void convolve_depthwise(struct cuda_backend *cuda, const struct op_conv_transposed *op)
{
    struct depthwise p = blank<struct depthwise>();

    p.x = op->x;
    p.weight = op->conv->depthwise_weight;
    p.bias = op->conv->bias;
    p.history = op->history;
    p.y = op->y;
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.steps = op->steps;
    p.width = op->conv->in;
    p.stride = op->conv->stride;
    p.elu = op->elu;
    if (op->rows.n)
        launch(cuda, k_depthwise, dim3((unsigned)ceil_div(p.width, 2 * WARP), (unsigned)op->rows.n),
               2 * WARP, 0, p);
}

void cuda_conv_transposed(struct backend *backend, const struct op_conv_transposed *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    const struct conv *conv = op->conv;
    struct product_rows rows = {};
    struct fill fill = blank<struct fill>();

    if (conv->depthwise) {
        convolve_depthwise(cuda, op);
        return;
    }
    fill.x = op->x;
    fill.history = op->history;
    fill.work = op->work;
    fill.steps = op->steps;
    fill.width = conv->in;
    fill.past = 1;
    fill.elu = op->elu;
    launch_fill(cuda, &op->rows, fill);
    rows.x = op->work;
    rows.steps = op->steps;
    rows.rows = op->rows.n * op->steps;
    rows.row_stride = (long)(1 + op->steps) * conv->in;
    rows.step_stride = conv->in;
    rows.bias = conv->bias;
    rows.bias_period = conv->out;
    rows.y = op->y;
    convolve(cuda, op->name, &conv->weight, &rows);
}

/* ---- quantiser -------------------------------------------------------------------------- */

#define ENTRIES 64 /* of a codebook, for a block */

struct search {
    const float *entries, *half_norms; /* of one level */
    float *residual;                   /* [n][2 * dim], the first dim of each */
    int32_t *codes;
    unsigned long long *best; /* [n], 0 between launches */
    int *arrived;             /* [n], 0 between launches */
    int bins, dim, code_stride;
};

/* Larger where the distance is less, then where the entry is earlier; 0 is none. */
__device__ static unsigned long long rank_of(float distance, int entry)
{
    unsigned u = __float_as_uint(distance + 0.0f);

    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return ~((unsigned long long)u << 32 | (unsigned)entry);
}

/* Grid: pieces of the codebook, rows. The block that ends last for a row takes the best entry away from
 * it. Bytes: the codebook once a row. */
__global__ static void __launch_bounds__(THREADS) k_search(const __grid_constant__ struct search p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    int *last = (int *)(void *)shared;
    int i = (int)blockIdx.y, lane = (int)threadIdx.x % WARP;
    int first = (int)blockIdx.x * ENTRIES,
        end = first + ENTRIES < p.bins ? first + ENTRIES : p.bins;
    float *residual = p.residual + (long)i * 2 * p.dim;
    unsigned long long best = rank_of(INFINITY, 0);

    for (int e = first + (int)threadIdx.x / WARP; e < end; e += THREADS / WARP) {
        float dot = 0, distance;

        for (int d = lane; d < p.dim; d += WARP)
            dot = fmaf(p.entries[(long)e * p.dim + d], residual[d], dot);
        distance = p.half_norms[e] - warp_sum(dot);
        if (distance < INFINITY && rank_of(distance, e) > best) best = rank_of(distance, e);
    }
    if (lane == 0) atomicMax(&p.best[i], best);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(&p.arrived[i], 1) == (int)gridDim.x - 1;
    __syncthreads();
    if (!*last) return;
    __threadfence();
    int entry = (int)(unsigned)~*(volatile unsigned long long *)&p.best[i];

    for (int d = (int)threadIdx.x; d < p.dim; d += THREADS)
        residual[d] -= p.entries[(long)entry * p.dim + d];
    __syncthreads(); /* all have read which entry */
    if (threadIdx.x) return;
    p.codes[(long)i * p.code_stride] = entry;
    p.best[i] = 0;
    p.arrived[i] = 0;
}

void cuda_rvq_encode(struct backend *backend, const struct op_rvq_encode *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    const struct rvq *rvq = op->rvq;
    struct product_rows rows = {};
    struct search p = blank<struct search>();
    size_t n = (size_t)op->n;

    if (n == 0) return;
    rows.x = op->x;
    rows.rows = op->n;
    rows.steps = 1;
    rows.row_stride = rvq->in_proj.cols;
    rows.y = op->work;
    rows.y_stride = 2 * rvq->dim;
    cuda_product(cuda, op->name, &rvq->in_proj, &rows);
    p.best = (unsigned long long *)(void *)cuda_take_scratch(
                 cuda, n * (sizeof *p.best + sizeof *p.arrived), 0)
                 .counters;
    p.arrived = (int *)(void *)(p.best + n);
    p.residual = op->work;
    p.bins = rvq->bins;
    p.dim = rvq->dim;
    p.code_stride = op->code_stride;
    for (int level = 0; level < op->levels; level++) {
        p.entries = rvq->codebooks + (size_t)level * (size_t)rvq->bins * (size_t)rvq->dim;
        p.half_norms = rvq->half_norms + (size_t)level * (size_t)rvq->bins;
        p.codes = op->codes + level;
        launch(cuda, k_search, dim3((unsigned)ceil_div(rvq->bins, ENTRIES), (unsigned)op->n),
               THREADS, sizeof(int), p);
    }
}

struct gather {
    const float *codebooks;
    const int32_t *codes;
    float *sum; /* [n][dim] */
    int levels, bins, dim, code_stride;
};

__global__ static void k_gather(const __grid_constant__ struct gather p)
{
    after_earlier_kernels();
    int i = (int)blockIdx.y, d = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    float sum = 0;

    if (d >= p.dim) return;
    for (int level = 0; level < p.levels; level++) {
        int code = p.codes[(long)i * p.code_stride + level];

        if (code < 0 || code >= p.bins) code = 0;
        sum += p.codebooks[((long)level * p.bins + code) * p.dim + d];
    }
    p.sum[(long)i * p.dim + d] = sum;
}

void cuda_rvq_decode(struct backend *backend, const struct op_rvq_decode *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    const struct rvq *rvq = op->rvq;
    struct product_rows rows = {};
    struct gather p = blank<struct gather>();

    if (op->n == 0) return;
    p.codebooks = rvq->codebooks;
    p.codes = op->codes;
    p.sum = op->work;
    p.levels = op->levels;
    p.bins = rvq->bins;
    p.dim = rvq->dim;
    p.code_stride = op->code_stride;
    launch(cuda, k_gather, dim3((unsigned)ceil_div(p.dim, 2 * WARP), (unsigned)op->n), 2 * WARP, 0,
           p);
    rows.x = op->work;
    rows.rows = op->n;
    rows.steps = 1;
    rows.row_stride = rvq->dim;
    rows.y = op->y;
    rows.from = op->accumulate ? op->y : NULL;
    cuda_product(cuda, op->name, &rvq->out_proj, &rows);
}
