/* attend.h: what the kernels share that let a query meet keys and values. */
#ifndef MOSHI_CUDA_ATTEND_H
#define MOSHI_CUDA_ATTEND_H

#include <math.h>

#include "device.h"

/* Values are added in so many sums, position j in sum j % ATTENDING, and those in their order. */
#define ATTENDING 4

/* D elements, read at once. */
template <class T, int COUNT> struct alignas(COUNT * sizeof(T)) piece {
    T elements[COUNT];
};

/* Elements lane * D .. of a row of head_dim; beyond it 0. */
template <class T, int D>
__device__ static __forceinline__ void load_row(const T *row, int dim, float (&to)[D])
{
    int first = (int)(threadIdx.x % WARP) * D;

    if (dim == D * WARP) {
        struct piece<T, D> read = *(const struct piece<T, D> *)(const void *)(row + first);

#pragma unroll
        for (int d = 0; d < D; d++) to[d] = widen(read.elements[d]);
        return;
    }
#pragma unroll
    for (int d = 0; d < D; d++) to[d] = first + d < dim ? widen(row[first + d]) : 0;
}

/* y[dim] of one query over keys and values 0 .. count - 1, at most WARP of them, by one warp. */
template <int D>
__device__ static void attend_few(const struct kv_cache &cache, int lane, int layer, int kv_head,
                                  int count, float scale, const float *q, float *y)
{
    int thread = (int)threadIdx.x % WARP, dim = cache.head_dim;
    float query[D], value[D] = {}, score = -INFINITY, largest, sum;

    load_row(q, dim, query);
    for (int j = 0; j < count; j++) {
        float key[D], dot = 0;

        load_row(kv_address<float>(cache, lane, layer, 0, kv_head, j), dim, key);
#pragma unroll
        for (int d = 0; d < D; d++) dot = fmaf(query[d], key[d], dot);
        dot = warp_sum(dot) * scale;
        if (j == thread) score = dot;
    }
    largest = warp_max(score);
    score = expf(score - largest);
    sum = warp_sum(score);
    for (int w = 0; w < ATTENDING; w++) {
        float sums[D] = {};

        for (int j = w; j < count; j += ATTENDING) {
            float row[D], weight = __shfl_sync(FULL_WARP, score, j);

            load_row(kv_address<float>(cache, lane, layer, 1, kv_head, j), dim, row);
#pragma unroll
            for (int d = 0; d < D; d++) sums[d] = fmaf(weight, row[d], sums[d]);
        }
#pragma unroll
        for (int d = 0; d < D; d++) value[d] += sums[d];
    }
#pragma unroll
    for (int d = 0; d < D; d++)
        if (thread * D + d < dim) y[thread * D + d] = value[d] / sum;
}

#endif
