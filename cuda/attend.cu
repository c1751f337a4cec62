/* attend.cu: one query over the visible positions of its lane, cut into spans of the keys: a block for
 * each span of each head of each row. The block that ends last for a query adds the spans up, in
 * their order. Blocks whose span has no visible position end at once, so that a frame reads what the
 * call has said so far and not the whole ring.
 *
 * A warp takes a position at a time, its lanes D elements each. Bytes: keys and values once. Bound:
 * the memory's read rate, and the latency of one span where a call is young. */
#include <math.h>

#include "attend.h"

#define WARPS ATTENDING
#define THREADS (WARPS * WARP)
#define SPAN 128 /* positions */

struct attend {
    struct kv_cache cache;
    const int32_t *lane, *position, *key_count;
    const uint8_t *active;
    const float *q;
    float *y;
    float *partial; /* [query][spans][2 + dim]: the largest score, the sum, values */
    int *counters; /* [query], 0 between launches */
    int steps, heads, layer, causal, context, capacity;
    float scale;
};

/* What an element of the cache stands for: of codes, its row's scale times as much. */
template <class T>
__device__ static __forceinline__ float scale_of(const struct kv_cache &, const T *, int)
{
    return 1;
}

__device__ static __forceinline__ float scale_of(const struct kv_cache &cache, const int8_t *row,
                                                 int position)
{
    return *kv_scale(cache, row, position);
}

/* scores[] of the span's keys become exp(score - largest); gives back the largest and the sum. */
template <class T, int D>
__device__ static void score(const struct attend &p, int lane, int kv_head, const float (&query)[D],
                             int from, int to, float *scores, float *parts, float *most, float *sum)
{
    int warp = (int)threadIdx.x / WARP;
    float largest = -INFINITY, total = 0;

#pragma unroll 4
    for (int j = from + warp; j < to; j += WARPS) {
        float key[D], dot = 0;

        const T *row = kv_address<T>(p.cache, lane, p.layer, 0, kv_head, j);

        load_row(row, p.cache.head_dim, key);
#pragma unroll
        for (int d = 0; d < D; d++) dot = fmaf(query[d], key[d], dot);
        dot = warp_sum(dot) * scale_of(p.cache, row, j) * p.scale;
        if (threadIdx.x % WARP == 0) scores[j - from] = dot;
    }
    __syncthreads();
    for (int j = (int)threadIdx.x; j < to - from; j += THREADS) largest = fmaxf(largest, scores[j]);
    largest = block_max(largest, parts);
    for (int j = (int)threadIdx.x; j < to - from; j += THREADS) {
        scores[j] = expf(scores[j] - largest);
        total += scores[j];
    }
    *sum = block_sum(total, parts); /* its barriers show the scores to all */
    *most = largest;
}

/* mixed[dim] = the sum over the span of score * value. */
template <class T, int D>
__device__ static void mix(const struct attend &p, int lane, int kv_head, int from, int to,
                           const float *scores, float *mixed)
{
    int warp = (int)threadIdx.x / WARP, first = (int)(threadIdx.x % WARP) * D;
    float sums[D] = {};

#pragma unroll 4
    for (int j = from + warp; j < to; j += WARPS) {
        float value[D];

        const T *row = kv_address<T>(p.cache, lane, p.layer, 1, kv_head, j);

        load_row(row, p.cache.head_dim, value);
        float weight = scores[j - from] * scale_of(p.cache, row, j);

#pragma unroll
        for (int d = 0; d < D; d++) sums[d] = fmaf(weight, value[d], sums[d]);
    }
#pragma unroll
    for (int d = 0; d < D; d++) mixed[warp * D * WARP + first + d] = sums[d];
    __syncthreads();
}

/* y of a query from its spans' parts. */
__device__ static void combine(const struct attend &p, const float *partial, int used, float *y)
{
    int dim = p.cache.head_dim, stride = 2 + dim;
    float most = -INFINITY, sum = 0;

    for (int s = 0; s < used; s++) most = fmaxf(most, partial[s * stride]);
    for (int s = 0; s < used; s++)
        sum += partial[s * stride + 1] * expf(partial[s * stride] - most);
    for (int d = (int)threadIdx.x; d < dim; d += THREADS) {
        float value = 0;

        for (int s = 0; s < used; s++)
            value += partial[s * stride + 2 + d] * expf(partial[s * stride] - most);
        y[d] = value / sum;
    }
}

/* Grid: spans, heads, rows times steps. */
template <class T, int D>
__global__ static void __launch_bounds__(THREADS, 4)
    k_attend(const __grid_constant__ struct attend p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    float *scores = (float *)(void *)shared, *parts = scores + SPAN, *mixed = parts + WARPS;
    int *ticket = (int *)(void *)(mixed + WARPS * D * WARP);
    int row = (int)blockIdx.z, i = row / p.steps, head = (int)blockIdx.y, dim = p.cache.head_dim;
    int span = (int)blockIdx.x, spans = (int)gridDim.x;
    int query = row * p.heads + head, begin = 0, end, used;
    float *y = p.y + (long)query * dim, most, sum, q[D];

    if (!p.active[i]) return;
    int lane = p.lane[i];

    if (p.causal) {
        int position = p.position[lane];

        end = position + row % p.steps + 1;
        if (begin < end - p.context) begin = end - p.context;
        if (begin < position + p.steps - p.capacity) begin = position + p.steps - p.capacity;
    } else {
        end = p.key_count[lane];
    }
    used = (end - begin + SPAN - 1) / SPAN;
    if (span == 0 && end <= begin)
        for (int d = (int)threadIdx.x; d < dim; d += THREADS) y[d] = 0;
    if (span >= used) return;
    begin += span * SPAN;
    if (end > begin + SPAN) end = begin + SPAN;

    load_row(p.q + (long)query * dim, dim, q);
    int kv_head = head / (p.heads / p.cache.kv_heads);

    score<T, D>(p, lane, kv_head, q, begin, end, scores, parts, &most, &sum);
    mix<T, D>(p, lane, kv_head, begin, end, scores, mixed);
    float *partial = p.partial + (long)query * spans * (2 + dim),
          *mine = partial + span * (2 + dim);

    for (int d = (int)threadIdx.x; d < dim; d += THREADS) {
        float value = 0;

        for (int w = 0; w < WARPS; w++) value += mixed[w * D * WARP + d];
        if (used == 1)
            y[d] = value / sum;
        else
            mine[2 + d] = value;
    }
    if (used == 1) return;
    if (threadIdx.x == 0) mine[0] = most, mine[1] = sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *ticket = atomicAdd(&p.counters[query], 1);
    __syncthreads();
    if (*ticket != used - 1) return;
    __threadfence();
    combine(p, partial, used, y);
    if (threadIdx.x == 0) p.counters[query] = 0;
}

template <class T, int D>
static void launch_attend(struct cuda_backend *cuda, const struct attend &p, dim3 grid)
{
    launch(cuda, k_attend<T, D>, grid, THREADS,
           (SPAN + WARPS + WARPS * D * WARP) * sizeof(float) + sizeof(int), p);
}

template <class T>
static void choose_width(struct cuda_backend *cuda, const struct op_attend *op,
                         const struct attend &p, dim3 grid)
{
    int dim = p.cache.head_dim;

    if (dim <= WARP)
        launch_attend<T, 1>(cuda, p, grid);
    else if (dim <= 2 * WARP)
        launch_attend<T, 2>(cuda, p, grid);
    else if (dim <= 4 * WARP)
        launch_attend<T, 4>(cuda, p, grid);
    else if (dim <= 8 * WARP)
        launch_attend<T, 8>(cuda, p, grid);
    else
        cuda_fail(cuda, MOSHI_ERROR_DEVICE, "%s: heads of %d, expected at most %d", op->name, dim,
                  8 * WARP);
}

void cuda_attend(struct backend *backend, const struct op_attend *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    struct attend p = blank<struct attend>();
    int ring = op->cache->pages_per_lane * op->cache->page_positions, rows = op->rows.n * op->steps;
    int most = op->causal && op->context < ring ? op->context : ring, spans = ceil_div(most, SPAN);
    size_t queries = (size_t)rows * (size_t)op->heads;

    if (rows == 0) return;
    p.cache = *op->cache;
    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.position = op->position;
    p.key_count = op->key_count;
    p.q = op->q;
    p.y = op->y;
    p.steps = op->steps;
    p.heads = op->heads;
    p.layer = op->layer;
    p.causal = op->causal;
    p.context = op->context;
    p.capacity = op->capacity;
    p.scale = 1.0f / sqrtf((float)op->cache->head_dim);
    if (spans > 1) {
        size_t parts = queries * (size_t)spans * (size_t)(2 + op->cache->head_dim);

        struct cuda_scratch scratch = cuda_take_scratch(cuda, queries * sizeof(int),
                                                        parts * sizeof(float));

        p.counters = (int *)(void *)scratch.counters;
        p.partial = (float *)(void *)scratch.memory;
    }
    dim3 grid((unsigned)spans, (unsigned)op->heads, (unsigned)rows);

    if (op->cache->dtype == MOSHI_BF16)
        choose_width<struct bf16>(cuda, op, p, grid);
    else if (op->cache->dtype == MOSHI_INT8)
        choose_width<int8_t>(cuda, op, p, grid);
    else
        choose_width<float>(cuda, op, p, grid);
}
