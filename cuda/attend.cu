/* attend.cu: one query over the visible positions of its lane, cut into spans of the keys: a block for
 * each span of each head of each row. The block that ends last for a query adds the spans up, in
 * their order. Blocks whose span has no visible position end at once, so that a frame reads what the
 * call has said so far and not the whole ring.
 *
 * A warp takes a position at a time, its lanes D elements each. Bytes: keys and values once. Bound:
 * the memory's read rate, and the latency of one span where a call is young.
 *
 * Of many steps, as where frames are given, a block takes TOGETHER that follow each other, over all
 * their spans: a key is read once for all of them. They have the bits that they have alone, as long as
 * their contexts begin at one position; after that they take turns. Bytes, for a prompt of S steps:
 * keys and values S / (2 TOGETHER) times, from the second cache. Bound: multiply-adds, 2 S^2 / 2 of
 * each element of a head. 500 frames of the 7B: 8 GB, some 2 to 3 ms on an H200. */
#include <math.h>

#include "attend.h"

#define WARPS ATTENDING
#define THREADS (WARPS * WARP)
#define SPAN THREADS /* positions */
#define TOGETHER 8 /* queries */

struct attend {
    struct kv_cache cache;
    const int32_t *lane, *position, *key_count;
    const uint8_t *active;
    const float *q;
    float *y;
    float *partial; /* [query][spans][2 + dim]: the largest score, the sum, values */
    int *counters; /* [query], 0 between launches */
    int steps, heads, layer, causal, context, capacity, spans;
    float scale;
};

/* Keys or values of one head, position after position. Their page is looked up where it begins, since
 * divisions and the table take longer than a row. */
template <class T> struct kv_walk {
    const struct kv_cache &cache;
    const int32_t *pages; /* of the lane */
    long plane, plane_bytes; /* in a page */
    int block, within; /* the place of the position in its page */
    const T *rows; /* of the page */

    __device__ kv_walk(const struct kv_cache &from, int lane, int layer, int value, int kv_head,
                       int position)
        : cache(from), pages(from.table + (long)lane * from.pages_per_lane)
    {
        int at = position % (from.pages_per_lane * from.page_positions);
        long row_bytes = from.head_dim * (long)sizeof(T) + (sizeof(T) == 1 ? sizeof(float) : 0);

        plane_bytes = from.page_positions * row_bytes;
        plane = ((long)(layer * 2 + value) * from.kv_heads + kv_head) * plane_bytes;
        block = at / from.page_positions;
        within = at % from.page_positions;
        look_up();
    }

    __device__ void look_up()
    {
        rows = (const T *)(const void *)((const char *)cache.pages +
                                         (size_t)pages[block] * cache.page_bytes + plane);
    }

    __device__ const T *row() const
    {
        return rows + within * cache.head_dim;
    }

    /* What an element stands for: of codes, its row's scale times as much. */
    __device__ float scale() const
    {
        const T *end = rows + (long)cache.page_positions * cache.head_dim;

        return sizeof(T) == 1 ? ((const float *)(const void *)end)[within] : 1;
    }

    /* Where the page ends for a walk that is at position j and goes no further than `to`. */
    __device__ int stop(int j, int to) const
    {
        int last = j + cache.page_positions - within;

        return last < to ? last : to;
    }

    /* To the page that `within` has come to. */
    __device__ void turn()
    {
        while (within >= cache.page_positions) {
            within -= cache.page_positions;
            block = block + 1 < cache.pages_per_lane ? block + 1 : 0;
        }
        look_up();
    }
};

/* scores[] of the span's keys become exp(score - largest); gives back the largest and the sum. */
template <class T, int D>
__device__ static void score(const struct attend &p, int lane, int kv_head, const float (&query)[D],
                             int from, int to, float *scores, float *parts, float *most, float *sum)
{
    int warp = (int)threadIdx.x / WARP;
    float largest = -INFINITY, total = 0;

    struct kv_walk<T> keys(p.cache, lane, p.layer, 0, kv_head, from + warp);

    for (int j = from + warp; j < to; keys.turn()) {
#pragma unroll 4
        for (int stop = keys.stop(j, to); j < stop; j += WARPS, keys.within += WARPS) {
            float key[D], dot = 0;

            load_row(keys.row(), p.cache.head_dim, key);
#pragma unroll
            for (int d = 0; d < D; d++) dot = fmaf(query[d], key[d], dot);
            dot = warp_sum(dot) * keys.scale() * p.scale;
            if (threadIdx.x % WARP == 0) scores[j - from] = dot;
        }
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

    struct kv_walk<T> values(p.cache, lane, p.layer, 1, kv_head, from + warp);

    for (int j = from + warp; j < to; values.turn()) {
#pragma unroll 4
        for (int stop = values.stop(j, to); j < stop; j += WARPS, values.within += WARPS) {
            float value[D];

            load_row(values.row(), p.cache.head_dim, value);
            float weight = scores[j - from] * values.scale();

#pragma unroll
            for (int d = 0; d < D; d++) sums[d] = fmaf(weight, value[d], sums[d]);
        }
    }
#pragma unroll
    for (int d = 0; d < D; d++) mixed[warp * D * WARP + first + d] = sums[d];
    __syncthreads();
}

/* A span of a query: its part, or y where it is the only one. */
template <class T, int D>
__device__ static void attend_span(const struct attend &p, int lane, int kv_head,
                                   const float (&query)[D], int from, int to, float *shared,
                                   int only, float *part, float *y)
{
    float *scores = shared, *parts = scores + SPAN, *mixed = parts + WARPS, most, sum;

    score<T, D>(p, lane, kv_head, query, from, to, scores, parts, &most, &sum);
    mix<T, D>(p, lane, kv_head, from, to, scores, mixed);
    for (int d = (int)threadIdx.x; d < p.cache.head_dim; d += THREADS) {
        float value = 0;

        for (int w = 0; w < WARPS; w++) value += mixed[w * D * WARP + d];
        if (only)
            y[d] = value / sum;
        else
            part[2 + d] = value;
    }
    if (!only && threadIdx.x == 0) part[0] = most, part[1] = sum;
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

/* The positions that the query of a step sees. */
__device__ static __forceinline__ void visible(const struct attend &p, int lane, int step,
                                               int *begin, int *end)
{
    *begin = 0;
    if (p.causal) {
        int position = p.position[lane];

        *end = position + step + 1;
        if (*begin < *end - p.context) *begin = *end - p.context;
        if (*begin < position + p.steps - p.capacity) *begin = position + p.steps - p.capacity;
    } else {
        *end = p.key_count[lane];
    }
}

/* Grid: spans, heads, rows times steps. */
template <class T, int D>
__global__ static void __launch_bounds__(THREADS, 4)
    k_attend(const __grid_constant__ struct attend p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    float *work = (float *)(void *)shared;
    int *ticket = (int *)(void *)(work + SPAN + WARPS + WARPS * D * WARP);
    int row = (int)blockIdx.z, i = row / p.steps, head = (int)blockIdx.y, dim = p.cache.head_dim;
    int span = (int)blockIdx.x, spans = (int)gridDim.x;
    int query = row * p.heads + head, begin, end, used;
    float *y = p.y + (long)query * dim, q[D];

    if (!p.active[i]) return;
    int lane = p.lane[i];

    visible(p, lane, row % p.steps, &begin, &end);
    used = (end - begin + SPAN - 1) / SPAN;
    if (span == 0 && end <= begin)
        for (int d = (int)threadIdx.x; d < dim; d += THREADS) y[d] = 0;
    if (span >= used) return;
    begin += span * SPAN;
    if (end > begin + SPAN) end = begin + SPAN;

    load_row(p.q + (long)query * dim, dim, q);
    int kv_head = head / (p.heads / p.cache.kv_heads);

    float *partial = p.partial + (long)query * spans * (2 + dim);

    attend_span<T, D>(p, lane, kv_head, q, begin, end, work, used == 1, partial + span * (2 + dim),
                      y);
    if (used == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *ticket = atomicAdd(&p.counters[query], 1);
    __syncthreads();
    if (*ticket != used - 1) return;
    __threadfence();
    combine(p, partial, used, y);
    if (threadIdx.x == 0) p.counters[query] = 0;
}

/* ---- many steps ------------------------------------------------------------------------- */

/* Shared memory of a span of TOGETHER queries. */
template <int D> struct together {
    float scores[SPAN][TOGETHER];
    float most[TOGETHER], sum[TOGETHER];
    float mixed[WARPS][TOGETHER][D * WARP];
};

/* Steps that follow each other: the first one sees positions begin .. end - 1, step q sees q * later
 * more, and the last one all up to `last`. */
struct group {
    int lane, kv_head, count, begin, end, later, last;
    long query; /* of the first step; those of the others are p.heads apart */
};

/* scores of the span from `from` on, as score makes them for each query. */
template <class T, int D>
__device__ static void score_together(const struct attend &p, const struct group &g, int from,
                                      int to, const float (&queries)[TOGETHER][D],
                                      struct together<D> *s)
{
    int warp = (int)threadIdx.x / WARP, place = (int)threadIdx.x % WARP;

    struct kv_walk<T> keys(p.cache, g.lane, p.layer, 0, g.kv_head, from + warp);

    for (int j = from + warp; j < to; keys.turn()) {
#pragma unroll 2
        for (int stop = keys.stop(j, to); j < stop; j += WARPS, keys.within += WARPS) {
            float key[D], dots[TOGETHER] = {}, dot;

            load_row(keys.row(), p.cache.head_dim, key);
#pragma unroll
            for (int q = 0; q < TOGETHER; q++)
#pragma unroll
                for (int d = 0; d < D; d++) dots[q] = fmaf(queries[q][d], key[d], dots[q]);
            dot = warp_sums(dots) * keys.scale() * p.scale;
            if (place % (WARP / TOGETHER) == 0)
                s->scores[j - from][place / (WARP / TOGETHER)] = dot;
        }
    }
    __syncthreads();
    for (int q = warp; q < g.count; q += WARPS) {
        int count = g.end + q * g.later - from;
        float largest = -INFINITY, total = 0;

        for (int j = place; j < SPAN && j < count; j += WARP)
            largest = fmaxf(largest, s->scores[j][q]);
        largest = warp_max(largest);
#pragma unroll
        for (int i = 0; i < SPAN; i += WARP) {
            float weight = 0;

            if (i + place < count)
                weight = s->scores[i + place][q] = expf(s->scores[i + place][q] - largest);
            total += warp_sum(weight);
        }
        if (place == 0) s->most[q] = largest, s->sum[q] = total;
    }
    __syncthreads();
}

/* s->mixed, as mix makes it for each query. */
template <class T, int D>
__device__ static void mix_together(const struct attend &p, const struct group &g, int from, int to,
                                    struct together<D> *s)
{
    int warp = (int)threadIdx.x / WARP, first = (int)(threadIdx.x % WARP) * D;
    float sums[TOGETHER][D] = {};

    struct kv_walk<T> values(p.cache, g.lane, p.layer, 1, g.kv_head, from + warp);

    for (int j = from + warp; j < to; values.turn()) {
#pragma unroll 2
        for (int stop = values.stop(j, to); j < stop; j += WARPS, values.within += WARPS) {
            float value[D], scale = values.scale();

            load_row(values.row(), p.cache.head_dim, value);
#pragma unroll
            for (int q = 0; q < TOGETHER; q++) {
                float weight = s->scores[j - from][q] * scale;

                if (j >= g.end + q * g.later) continue;
#pragma unroll
                for (int d = 0; d < D; d++) sums[q][d] = fmaf(weight, value[d], sums[q][d]);
            }
        }
    }
#pragma unroll
    for (int q = 0; q < TOGETHER; q++)
#pragma unroll
        for (int d = 0; d < D; d++) s->mixed[warp][q][first + d] = sums[q][d];
    __syncthreads();
}

/* Where the part of query q's span is. */
__device__ static __forceinline__ float *part_of(const struct attend &p, long query, int span)
{
    return p.partial + (query * p.spans + span) * (2 + p.cache.head_dim);
}

template <class T, int D>
__device__ static void attend_together(const struct attend &p, const struct group &g,
                                       struct together<D> *s)
{
    const int dim = p.cache.head_dim;
    float queries[TOGETHER][D];

#pragma unroll
    for (int q = 0; q < TOGETHER; q++)
        load_row(p.q + (g.query + (q < g.count ? q : 0) * p.heads) * dim, dim, queries[q]);
    for (int from = g.begin, span = 0; from < g.last; from += SPAN, span++) {
        int to = from + SPAN < g.last ? from + SPAN : g.last;

        score_together<T, D>(p, g, from, to, queries, s);
        mix_together<T, D>(p, g, from, to, s);
        for (int at = (int)threadIdx.x; at < g.count * dim; at += THREADS) {
            int q = at / dim, d = at % dim, end = g.end + q * g.later;
            long query = g.query + q * p.heads;
            float value = 0;

            if (from >= end) continue;
            for (int w = 0; w < WARPS; w++) value += s->mixed[w][q][d];
            if (end - g.begin <= SPAN) {
                p.y[query * dim + d] = value / s->sum[q];
                continue;
            }
            part_of(p, query, span)[2 + d] = value;
            if (d == 0) {
                part_of(p, query, span)[0] = s->most[q];
                part_of(p, query, span)[1] = s->sum[q];
            }
        }
    }
}

template <class T, int D>
__device__ static void attend_in_turn(const struct attend &p, const struct group &g, int step,
                                      float *shared)
{
    const int dim = p.cache.head_dim;

    for (int q = 0; q < g.count; q++) {
        const long query = g.query + q * p.heads;
        int begin, end;
        float mine[D];

        visible(p, g.lane, step + q, &begin, &end);
        load_row(p.q + query * dim, dim, mine);
        for (int from = begin, span = 0; from < end; from += SPAN, span++)
            attend_span<T, D>(p, g.lane, g.kv_head, mine, from,
                              from + SPAN < end ? from + SPAN : end, shared, end - begin <= SPAN,
                              part_of(p, query, span), p.y + query * dim);
    }
}

/* Grid: groups of steps, the last ones first, as they see most; heads; rows. */
template <class T, int D>
__global__ static void __launch_bounds__(THREADS, D > 4 ? 2 : 4)
    k_attend_steps(const __grid_constant__ struct attend p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    const int i = (int)blockIdx.z, head = (int)blockIdx.y, dim = p.cache.head_dim;
    const int step = (int)(gridDim.x - 1 - blockIdx.x) * TOGETHER;
    struct group g = {};
    int last_begin;

    if (!p.active[i]) return;
    g.lane = p.lane[i];
    g.kv_head = head / (p.heads / p.cache.kv_heads);
    g.count = p.steps - step < TOGETHER ? p.steps - step : TOGETHER;
    g.later = p.causal != 0;
    g.query = ((long)i * p.steps + step) * p.heads + head;
    visible(p, g.lane, step, &g.begin, &g.end);
    visible(p, g.lane, step + g.count - 1, &last_begin, &g.last);
    if (g.begin == last_begin)
        attend_together<T, D>(p, g, (struct together<D> *)(void *)shared);
    else
        attend_in_turn<T, D>(p, g, step, (float *)(void *)shared);
    __syncthreads(); /* the parts are there */
    for (int q = 0; q < g.count; q++) {
        const long query = g.query + q * p.heads;
        int begin, end;

        visible(p, g.lane, step + q, &begin, &end);
        if (end - begin > SPAN)
            combine(p, part_of(p, query, 0), (end - begin + SPAN - 1) / SPAN, p.y + query * dim);
        for (int d = (int)threadIdx.x; d < dim && end <= begin; d += THREADS)
            p.y[query * dim + d] = 0;
    }
}

template <class T, int D>
static void launch_attend(struct cuda_backend *cuda, const struct attend &p, dim3 grid)
{
    if (p.steps >= TOGETHER)
        launch(cuda, k_attend_steps<T, D>,
               dim3((unsigned)ceil_div(p.steps, TOGETHER), grid.y, grid.z / (unsigned)p.steps),
               THREADS, sizeof(struct together<D>), p);
    else
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
    p.spans = spans;
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
