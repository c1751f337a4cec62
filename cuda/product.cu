/* product.cu: rows of activations times a matrix, for few rows: every weight is read once for up to
 * four rows, and the reads are all the time there is.
 *
 * A block puts its rows into shared memory, normed. Then a warp takes pairs of outputs: o and o + 1,
 * or a gate and its value. Its lanes read 16 bytes of both rows of weights at a time, side by side;
 * `split` warps share a pair where there are few outputs, and the sums of lanes, then of warps, are
 * added in one order. That order depends on the matrix and the card alone: a row's bits are the same
 * in any company.
 *
 * Bytes: outputs * columns * element, and columns * 4 a row for each block, which the second cache
 * has. Bound: the memory's read rate. */
#include "device.h"

#define WARPS 8
#define THREADS (WARPS * WARP)
#define ROWS_AT_ONCE 4

template <class E> struct product {
    const void *weight;
    int pairs, outputs, columns;
    int second; /* rows of weights from a pair's first one to its second one */
    int split, aligned;
    const float *x;
    int rows, steps;
    long row_stride, step_stride;
    struct norm norm;
    E end;
};

/* Where column k lies in shared memory: a lane's columns in pieces of four, the same piece of all lanes
 * side by side, so that no two lanes ask one bank for different words. */
template <class T> struct placed {
    __device__ int operator()(int k) const
    {
        const int n = vector<T>::N;
        int in_chunk = k % (n * WARP), lane = in_chunk / n, piece = in_chunk % n / 4;

        return k - in_chunk + (piece * WARP + lane) * 4 + k % 4;
    }
};

template <class T> __host__ __device__ static int padded_columns(int columns)
{
    const int chunk = vector<T>::N * WARP;

    return (columns + chunk - 1) / chunk * chunk;
}

/* Sums of one pair for N rows over this warp's share of the chunks, one value a lane. */
template <class T, int N, class E>
__device__ static __forceinline__ void multiply(const struct product<E> &p, int pair, int part,
                                                const float *x, int padded, float (&sums)[2 * N])
{
    const int n = vector<T>::N, chunk = n * WARP;
    int lane = (int)threadIdx.x % WARP, first = p.second == 1 ? 2 * pair : pair;
    int other = first + p.second < p.outputs ? first + p.second : first;
    const T *a = (const T *)p.weight + (long)first * p.columns;
    const T *b = (const T *)p.weight + (long)other * p.columns;

#pragma unroll 4
    for (int k = part * chunk; k < padded; k += p.split * chunk) {
        int at = k + lane * n;
        struct vector<T> wa = load(a + at, p.columns - at, p.aligned);
        struct vector<T> wb = load(b + at, p.columns - at, p.aligned);

#pragma unroll
        for (int r = 0; r < N; r++) {
#pragma unroll
            for (int piece = 0; piece < n / 4; piece++) {
                float4 v = *(const float4 *)(const void *)(x + r * padded + k +
                                                           (piece * WARP + lane) * 4);

                sums[r] = fmaf(wa.v[4 * piece], v.x, sums[r]);
                sums[N + r] = fmaf(wb.v[4 * piece], v.x, sums[N + r]);
                sums[r] = fmaf(wa.v[4 * piece + 1], v.y, sums[r]);
                sums[N + r] = fmaf(wb.v[4 * piece + 1], v.y, sums[N + r]);
                sums[r] = fmaf(wa.v[4 * piece + 2], v.z, sums[r]);
                sums[N + r] = fmaf(wb.v[4 * piece + 2], v.z, sums[N + r]);
                sums[r] = fmaf(wa.v[4 * piece + 3], v.w, sums[r]);
                sums[N + r] = fmaf(wb.v[4 * piece + 3], v.w, sums[N + r]);
            }
        }
    }
}

template <class T, int N, class E>
__global__ static void __launch_bounds__(THREADS, 2)
    k_product(const __grid_constant__ struct product<E> p)
{
    SHARED_BYTES(shared);
    int padded = padded_columns<T>(p.columns), warp = (int)threadIdx.x / WARP;
    int lane = (int)threadIdx.x % WARP, part = warp % p.split, groups = WARPS / p.split;
    int first = (int)blockIdx.y * N;
    int row = lane * N / (WARP / 2), keeps = lane < WARP / 2 && lane % (WARP / 2 / N) == 0;
    float *x = (float *)(void *)shared, *parts = x + N * padded;

    for (int r = 0; r < N; r++) {
        int at = first + r < p.rows ? first + r : p.rows - 1;
        const float *from = p.x + at / p.steps * p.row_stride + at % p.steps * p.step_stride;

        norm_row(p.norm, from, p.columns, x + r * padded, parts, placed<T>());
        for (int k = p.columns + (int)threadIdx.x; k < padded; k += THREADS)
            x[r * padded + placed<T>()(k)] = 0;
    }
    __syncthreads();
    for (int start = (int)blockIdx.x * groups; start < p.pairs; start += (int)gridDim.x * groups) {
        int pair = start + warp / p.split;
        float sums[2 * N] = {}, a, b;

        if (pair < p.pairs) multiply<T, N>(p, pair, part, x, padded, sums);
        a = warp_sums(sums);
        b = __shfl_xor_sync(FULL_WARP, a, WARP / 2);
        if (p.split > 1) { /* then there is a block for each pair, and no second turn */
            float *share = parts + 2 * (warp * ROWS_AT_ONCE + row);

            if (keeps) share[0] = a, share[1] = b;
            __syncthreads();
            if (keeps && part == 0)
                for (int i = 1; i < p.split; i++) {
                    a += share[2 * ROWS_AT_ONCE * i];
                    b += share[2 * ROWS_AT_ONCE * i + 1];
                }
        }
        if (part == 0 && pair < p.pairs && keeps && first + row < p.rows)
            p.end.store(first + row, pair, p.outputs, a, b);
    }
}

/* ---- what becomes of the sums ----------------------------------------------------------- */

struct row_end {
    const float *bias, *scale, *from;
    float *y;
    long y_stride;
    int bias_period, gelu;

    __device__ void one(int row, int o, float v) const
    {
        long at = row * y_stride + o;

        if (bias) v += bias[o % bias_period];
        if (gelu) v = 0.5f * v * (1.0f + erff(v * 0.70710678f));
        if (scale) v *= scale[o];
        if (from) v += from[at];
        y[at] = v;
    }

    __device__ void store(int row, int pair, int outputs, float a, float b) const
    {
        one(row, 2 * pair, a);
        if (2 * pair + 1 < outputs) one(row, 2 * pair + 1, b);
    }
};

struct gate_end {
    float *y;

    __device__ void store(int row, int pair, int outputs, float a, float b) const
    {
        y[(long)row * (outputs / 2) + pair] = a / (1.0f + expf(-a)) * b;
    }
};

/* Queries go out, keys and values into the cache, both turned. */
struct qkv_end {
    const float *cos_sin;
    const int32_t *lane, *position;
    const uint8_t *active;
    struct kv_cache cache;
    float *q;
    int steps, layer, queries, keys; /* the last two: outputs */

    __device__ void one(int row, int o, float v) const
    {
        int dim = cache.head_dim, at, value;

        if (o < queries) {
            q[(long)row * queries + o] = v;
            return;
        }
        if (!active[row / steps]) return;
        value = o >= queries + keys;
        at = o - queries - value * keys;
        int to = lane[row / steps], step = position[to] + row % steps;

        if (cache.dtype == MOSHI_BF16)
            narrow(v, kv_address<struct bf16>(cache, to, layer, value, at / dim, step) + at % dim);
        else
            narrow(v, kv_address<float>(cache, to, layer, value, at / dim, step) + at % dim);
    }

    __device__ void store(int row, int pair, int outputs, float a, float b) const
    {
        int o = 2 * pair;

        if (cos_sin && o < queries + keys) { /* dim is even: both are of one head */
            const float *angle = cos_sin + (long)row * cache.head_dim + o % cache.head_dim;
            float turned = a * angle[0] - b * angle[1];

            b = a * angle[1] + b * angle[0];
            a = turned;
        }
        one(row, o, a);
        if (o + 1 < outputs) one(row, o + 1, b);
    }
};

/* ---- the host's side -------------------------------------------------------------------- */

/* Warps that share a pair: enough that two blocks can lie on each processor, as far as there are
 * chunks to share. */
static int choose_split(const struct cuda_backend *cuda, int pairs, int chunks)
{
    int split = 1;

    while (split < WARPS && 2 * split <= chunks &&
           ceil_div(pairs, WARPS / split) < 2 * cuda->processors)
        split *= 2;
    return split;
}

template <class T, int N, class E>
static void launch_product(struct cuda_backend *cuda, const char *name, struct product<E> &p)
{
    int padded = padded_columns<T>(p.columns);
    size_t shared = ((size_t)N * (size_t)padded + 2 * WARPS * ROWS_AT_ONCE) * sizeof(float);
    int blocks;

    p.split = choose_split(cuda, p.pairs, padded / (vector<T>::N * WARP));
    blocks = ceil_div(p.pairs, WARPS / p.split);
    if (blocks > 8 * cuda->processors) blocks = 8 * cuda->processors;
    if (cuda_fits(cuda, name, shared))
        launch(cuda, k_product<T, N, E>, dim3((unsigned)blocks, (unsigned)ceil_div(p.rows, N)),
               THREADS, shared, p);
}

template <class T, class E>
static void choose_rows(struct cuda_backend *cuda, const char *name, struct product<E> &p)
{
    size_t row = (size_t)padded_columns<T>(p.columns) * sizeof(float);
    size_t room = cuda->shared_limit - 2 * WARPS * ROWS_AT_ONCE * sizeof(float);

    p.aligned = (uintptr_t)p.weight % 16 == 0 && p.columns % vector<T>::N == 0;
    if (p.rows > 2 && 4 * row <= room)
        launch_product<T, 4>(cuda, name, p);
    else if (p.rows > 1 && 2 * row <= room)
        launch_product<T, 2>(cuda, name, p);
    else
        launch_product<T, 1>(cuda, name, p);
}

/* `second` as in struct product: 1, or half of the rows. */
template <class E> static struct product<E> product_of(const struct matrix *weight, int second)
{
    struct product<E> p = blank<struct product<E>>();

    p.weight = weight->data;
    p.outputs = weight->rows;
    p.columns = weight->cols;
    p.second = second;
    p.pairs = second == 1 ? ceil_div(weight->rows, 2) : second;
    return p;
}

template <class E>
static void run_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                        struct product<E> &p)
{
    if (p.rows == 0) return;
    if (weight->format == WEIGHT_F32)
        choose_rows<float>(cuda, name, p);
    else if (weight->format == WEIGHT_BF16)
        choose_rows<struct bf16>(cuda, name, p);
    else
        cuda_fail(cuda, MOSHI_ERROR_DEVICE, "%s: weights in %s, expected f32 or bf16", name,
                  weight->format == WEIGHT_F16 ? "f16" : "a block format");
}

void cuda_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                  const struct product_rows *rows)
{
    struct product<struct row_end> p = product_of<struct row_end>(weight, 1);

    p.x = rows->x;
    p.rows = rows->rows;
    p.steps = rows->steps;
    p.row_stride = rows->row_stride;
    p.step_stride = rows->step_stride;
    p.norm = rows->norm;
    p.end.bias = rows->bias;
    p.end.scale = rows->scale;
    p.end.from = rows->from;
    p.end.y = rows->y;
    p.end.y_stride = rows->y_stride ? rows->y_stride : weight->rows;
    p.end.bias_period = rows->bias_period ? rows->bias_period : weight->rows;
    p.end.gelu = rows->gelu;
    run_product(cuda, name, weight, p);
}

void cuda_linear(struct backend *backend, const struct op_linear *op)
{
    struct product_rows rows = {};

    rows.x = op->x;
    rows.rows = op->n;
    rows.steps = 1;
    rows.row_stride = op->weight.cols;
    rows.norm = op->norm;
    rows.bias = op->bias;
    rows.gelu = op->activation == ACTIVATION_GELU;
    rows.y = op->y;
    rows.y_stride = op->y_stride;
    cuda_product(cuda_of(backend), op->name, &op->weight, &rows);
}

void cuda_linear_residual(struct backend *backend, const struct op_linear_residual *op)
{
    struct product_rows rows = {};

    rows.x = op->u;
    rows.rows = op->n;
    rows.steps = 1;
    rows.row_stride = op->weight.cols;
    rows.scale = op->scale;
    rows.from = rows.y = op->x;
    cuda_product(cuda_of(backend), op->name, &op->weight, &rows);
}

void cuda_linear_gated(struct backend *backend, const struct op_linear_gated *op)
{
    struct product<struct gate_end> p = product_of<struct gate_end>(&op->weight,
                                                                    op->weight.rows / 2);

    p.x = op->x;
    p.rows = op->n;
    p.steps = 1;
    p.row_stride = op->weight.cols;
    p.norm = op->norm;
    p.end.y = op->y;
    run_product(cuda_of(backend), op->name, &op->weight, p);
}

void cuda_qkv(struct backend *backend, const struct op_qkv *op)
{
    if (!cuda_reads(cuda_of(backend), op->cache)) return;
    struct product<struct qkv_end> p = product_of<struct qkv_end>(&op->weight, 1);

    p.x = op->x;
    p.rows = op->rows.n * op->steps;
    p.steps = op->steps;
    p.row_stride = (long)op->steps * op->weight.cols;
    p.step_stride = op->weight.cols;
    p.norm = op->norm;
    p.end.cos_sin = op->cos_sin;
    p.end.lane = op->rows.lane;
    p.end.active = op->rows.active;
    p.end.position = op->position;
    p.end.cache = *op->cache;
    p.end.q = op->q;
    p.end.steps = op->steps;
    p.end.layer = op->layer;
    p.end.queries = op->heads * op->cache->head_dim;
    p.end.keys = op->cache->kv_heads * op->cache->head_dim;
    run_product(cuda_of(backend), op->name, &op->weight, p);
}
