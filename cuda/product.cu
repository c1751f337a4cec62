/* product.cu: rows of activations times a matrix of f32, f16 or int8 rows: every weight is read once for
 * up to eight rows, and the reads are all the time there is.
 *
 * A block puts its rows into shared memory, normed. Then a warp takes pairs of outputs: o and o + 1,
 * or a gate and its value. Its lanes read 16 bytes of both rows of weights at a time, side by side;
 * `split` warps share a pair where there are few outputs, and the sums of lanes, then of warps, are
 * added in one order. That order depends on the matrix and the card alone: a row's bits are the same
 * in any company.
 *
 * Bytes: outputs * columns * element for eight rows, and columns * 4 a row for each block, which the
 * second cache has. Bound: the memory's read rate; of many rows the second cache's, and shared memory's,
 * which gives four words of a row for eight multiply-adds. */
#include "product.h"

#define ROWS_AT_ONCE 8 /* at most */

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
    int lane = (int)threadIdx.x % WARP;
    const T *a = (const T *)p.matrix() + (long)p.first_of(pair) * p.columns;
    const T *b = (const T *)p.matrix() + (long)p.second_of(pair) * p.columns;

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
    after_earlier_kernels();
    SHARED_BYTES(shared);
    int padded = padded_columns<T>(p.columns), warp = (int)threadIdx.x / WARP;
    int lane = (int)threadIdx.x % WARP, part = warp % p.split, groups = WARPS / p.split;
    int first = (int)blockIdx.y * N;
    int row = lane * N / (WARP / 2), keeps = lane < WARP / 2 && lane % (WARP / 2 / N) == 0;
    float *x = (float *)(void *)shared, *parts = x + N * padded;

    for (int r = 0; r < N; r++) {
        int at = first + r < p.rows ? first + r : p.rows - 1;

        norm_row(p.norm, p.input(at), p.columns, x + r * padded, parts, placed<T>());
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
        if (part || pair >= p.pairs || !keeps || first + row >= p.rows) continue;
        if (p.row_scales) {
            a *= p.row_scales[p.first_of(pair)];
            b *= p.row_scales[p.second_of(pair)];
        }
        p.end.store(first + row, pair, p.outputs, a, b);
    }
}

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
        launch(cuda, k_product<T, N, E>,
               dim3((unsigned)blocks, (unsigned)ceil_div(p.rows, N), (unsigned)p.matrices), THREADS,
               shared, p);
}

template <class T, class E>
static void choose_rows(struct cuda_backend *cuda, const char *name, struct product<E> &p)
{
    size_t row = (size_t)padded_columns<T>(p.columns) * sizeof(float);
    size_t room = cuda->shared_limit - 2 * WARPS * ROWS_AT_ONCE * sizeof(float);

    p.aligned = (uintptr_t)p.weight % 16 == 0 && p.columns % vector<T>::N == 0;
    if constexpr (sizeof(T) > 1) /* 16 columns of codes at a time leave no registers for it */
        if (p.rows > 4 && 2 * ROWS_AT_ONCE * row <= room) { /* two blocks on each processor */
            launch_product<T, ROWS_AT_ONCE>(cuda, name, p);
            return;
        }
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

    p.weight = matrix_memory(weight);
    p.matrices = 1;
    p.row_scales = weight->scales;
    p.outputs = weight->rows;
    p.columns = weight->cols;
    p.second = second;
    p.pairs = second == 1 ? ceil_div(weight->rows, 2) : second;
    return p;
}

template <class E>
static void run_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                        struct product<E> &p, size_t kept)
{
    if (p.rows == 0) return;
    if (weight->packed || weight->format == WEIGHT_BF16)
        tensor_product(cuda, name, weight, p, kept);
    else if (weight->format == WEIGHT_F32)
        choose_rows<float>(cuda, name, p);
    else if (weight->format == WEIGHT_F16)
        choose_rows<struct f16>(cuda, name, p);
    else
        choose_rows<int8_t>(cuda, name, p);
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
    run_product(cuda, name, weight, p, 0);
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

/* Whether one launch can do both. */
static bool go_together(const struct matrix *a, const struct matrix *b)
{
    return a->format == b->format && !a->packed == !b->packed && !a->scales && !b->scales &&
           (uintptr_t)matrix_memory(a) % 16 == (uintptr_t)matrix_memory(b) % 16;
}

void cuda_linear_many(struct backend *backend, const struct op_linear_many *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    const struct matrix *weight = op->weights, *end = weight + op->count;
    float *y = op->y;

    while (weight < end) {
        struct product<struct row_end> p = product_of<struct row_end>(weight, 1);

        p.x = op->x;
        p.rows = op->n;
        p.steps = 1;
        p.row_stride = weight->cols;
        p.end.y = y;
        p.end.y_stride = weight->rows;
        p.end.bias_period = weight->rows;
        p.end.next = (long)op->n * weight->rows;
        for (; p.matrices < TOGETHER && weight + p.matrices < end; p.matrices++) {
            if (!go_together(weight, weight + p.matrices)) break;
            p.end.others[p.matrices - 1] = matrix_memory(weight + p.matrices);
        }
        run_product(cuda, op->name, weight, p, 0);
        weight += p.matrices;
        y += p.matrices * p.end.next;
    }
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
    run_product(cuda_of(backend), op->name, &op->weight, p, 0);
}

/* ---- codes of keys and values ----------------------------------------------------------- */

struct code_rows {
    struct kv_cache cache;
    const float *fresh; /* [rows][key 0, value 1][kv_heads][head_dim] */
    const int32_t *lane, *position;
    const uint8_t *active;
    int steps, layer;
};

/* What int8_row makes of a head's row; a warp for each. Grid: heads of keys and of values, rows. */
__global__ static void k_code_rows(const __grid_constant__ struct code_rows p)
{
    after_earlier_kernels();
    int lane = (int)threadIdx.x, dim = p.cache.head_dim, head = (int)blockIdx.x % p.cache.kv_heads;
    int value = (int)blockIdx.x / p.cache.kv_heads, row = (int)blockIdx.y, i = row / p.steps;
    const float *from = p.fresh + ((long)row * gridDim.x + blockIdx.x) * dim;
    float most = 0, scale;

    if (!p.active[i]) return;
    int to = p.lane[i], position = p.position[to] + row % p.steps;
    int8_t *codes = kv_address<int8_t>(p.cache, to, p.layer, value, head, position);

    for (int d = lane; d < dim; d += WARP) most = fmaxf(most, fabsf(from[d]));
    scale = warp_max(most) / 127;
    for (int d = lane; d < dim; d += WARP) {
        float code = scale > 0 ? rintf(from[d] / scale) : 0;

        codes[d] = (int8_t)(code > 127 ? 127 : code >= -127 ? code : -127);
    }
    if (lane == 0) *kv_scale(p.cache, codes, position) = scale;
}

static void launch_codes(struct cuda_backend *cuda, const struct op_qkv *op, const float *fresh)
{
    struct code_rows p = blank<struct code_rows>();

    p.cache = *op->cache;
    p.fresh = fresh;
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.position = op->position;
    p.steps = op->steps;
    p.layer = op->layer;
    launch(cuda, k_code_rows,
           dim3(2 * (unsigned)p.cache.kv_heads, (unsigned)(op->rows.n * op->steps)), WARP, 0, p);
}

void cuda_qkv(struct backend *backend, const struct op_qkv *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    struct product<struct qkv_end> p = product_of<struct qkv_end>(&op->weight, 1);
    size_t fresh = 0;

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
    if (op->cache->dtype == MOSHI_INT8) {
        fresh = ((size_t)p.rows * 2 * (size_t)p.end.keys * sizeof(float) + 255) / 256 * 256;
        p.end.fresh =
            (float *)(void *)cuda_take_scratch(cuda, 0, fresh + tensor_scratch(&op->weight, p.rows))
                .memory;
    }
    run_product(cuda, op->name, &op->weight, p, fresh);
    if (fresh) launch_codes(cuda, op, p.end.fresh);
}
