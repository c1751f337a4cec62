/* device.h: what kernels share: sums over a block in one fixed order, and elements in each format. */
#ifndef MOSHI_CUDA_DEVICE_H
#define MOSHI_CUDA_DEVICE_H

#include "backend_cuda.h"

#define FULL_WARP 0xffffffffu

/* Bits of a number of 16 bits, as types of their own. */
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ static __forceinline__ float widen(float value)
{
    return value;
}

__device__ static __forceinline__ float widen(struct bf16 value)
{
    return __uint_as_float((unsigned)value.bits << 16);
}

__device__ static __forceinline__ float widen(struct f16 value)
{
    return half_to_float(value.bits);
}

__device__ static __forceinline__ float widen(int8_t value)
{
    return (float)value;
}

/* Of a table. */
__device__ static __forceinline__ float element(const void *data, int format, long at)
{
    return format == WEIGHT_BF16  ? widen(((const struct bf16 *)data)[at])
           : format == WEIGHT_F16 ? widen(((const struct f16 *)data)[at])
                                  : ((const float *)data)[at];
}

/* Whether a table with so many rows has one for the token; reports it otherwise. */
__device__ static __forceinline__ bool is_row_of(int token, int rows, int i,
                                                 struct cuda_report *report)
{
    if (token >= 0 && token < rows) return true;
    *report = {TROUBLE_TOKEN, i, token, rows};
    return false;
}

/* To nearest, ties to even. */
__device__ static __forceinline__ void narrow(float value, float *to)
{
    *to = value;
}

__device__ static __forceinline__ void narrow(float value, struct bf16 *to)
{
    unsigned u = __float_as_uint(value);

    to->bits = (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)(u >> 16 | 0x40u)
                                               : (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* 16 bytes: 4 to 16 elements that lie side by side. */
template <class T> struct vector {
    static const int N = 16 / (int)sizeof(T);
    float v[N];
};

__device__ static __forceinline__ void unpack(uint4 raw, struct vector<float> *to)
{
    to->v[0] = __uint_as_float(raw.x);
    to->v[1] = __uint_as_float(raw.y);
    to->v[2] = __uint_as_float(raw.z);
    to->v[3] = __uint_as_float(raw.w);
}

__device__ static __forceinline__ void unpack(uint4 raw, struct vector<struct f16> *to)
{
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};

#pragma unroll
    for (int i = 0; i < 8; i++) to->v[i] = half_to_float((uint16_t)(words[i / 2] >> i % 2 * 16));
}

__device__ static __forceinline__ void unpack(uint4 raw, struct vector<int8_t> *to)
{
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};

#pragma unroll
    for (int i = 0; i < 16; i++) to->v[i] = (float)(int8_t)(words[i / 4] >> i % 4 * 8);
}

/* Those of the first `count` elements that are there; the rest is 0. `aligned`: to 16 bytes, and then
 * count is 0 or no less than N. */
template <class T>
__device__ static __forceinline__ struct vector<T> load(const T *from, int count, int aligned)
{
    struct vector<T> to;

#pragma unroll
    for (int i = 0; i < vector<T>::N; i++) to.v[i] = 0;
    if (aligned) {
        if (count > 0) unpack(*(const uint4 *)(const void *)from, &to);
    } else {
#pragma unroll
        for (int i = 0; i < vector<T>::N; i++)
            if (i < count) to.v[i] = widen(from[i]);
    }
    return to;
}

/* Every lane gets the sum of the warp's. */
__device__ static __forceinline__ float warp_sum(float value)
{
#pragma unroll
    for (int other = WARP / 2; other; other /= 2) value += __shfl_xor_sync(FULL_WARP, value, other);
    return value;
}

/* The sums of V values at once: a lane gets that of value lane / (WARP / V), with the bits that warp_sum
 * gives it, for fewer shuffles. */
template <int V> __device__ static __forceinline__ float warp_sums(float (&values)[V])
{
    int lane = (int)threadIdx.x % WARP, other = WARP / 2;

#pragma unroll
    for (int half = V / 2; half; half /= 2, other /= 2) {
        bool upper = lane & other;

#pragma unroll
        for (int j = 0; j < half; j++) {
            float given = upper ? values[j] : values[j + half];
            float kept = upper ? values[j + half] : values[j];

            values[j] = kept + __shfl_xor_sync(FULL_WARP, given, other);
        }
    }
#pragma unroll
    for (; other; other /= 2) values[0] += __shfl_xor_sync(FULL_WARP, values[0], other);
    return values[0];
}

__device__ static __forceinline__ unsigned warp_max(unsigned value)
{
#pragma unroll
    for (int other = WARP / 2; other; other /= 2) {
        unsigned given = __shfl_xor_sync(FULL_WARP, value, other);

        value = given > value ? given : value;
    }
    return value;
}

__device__ static __forceinline__ float warp_max(float value)
{
#pragma unroll
    for (int other = WARP / 2; other; other /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, other));
    return value;
}

/* Every thread gets the sum over the block; parts: one float a warp. */
__device__ static __forceinline__ float block_sum(float value, float *parts)
{
    int warps = (int)blockDim.x / WARP;
    float sum = 0;

    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    for (int i = 0; i < warps; i++) sum += parts[i];
    __syncthreads(); /* parts may be written again */
    return sum;
}

__device__ static __forceinline__ float block_max(float value, float *parts)
{
    int warps = (int)blockDim.x / WARP;
    float most;

    value = warp_max(value);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    most = parts[0];
    for (int i = 1; i < warps; i++) most = fmaxf(most, parts[i]);
    __syncthreads();
    return most;
}

/* y[place(k)] = norm(x)[k] for one row, by the whole block; a thread reads again only what it wrote.
 * Place: where an element goes. */
template <class Place>
__device__ static void norm_row(const struct norm &norm, const float *x, int width, float *y,
                                float *parts, Place place)
{
    int first = (int)threadIdx.x, step = (int)blockDim.x;
    float mean = 0, square = 0, scale;

    if (norm.kind == NORM_NONE) {
        for (int k = first; k < width; k += step) y[place(k)] = x[k];
        return;
    }
    if (norm.kind == NORM_LAYER) {
        float sum = 0;

        for (int k = first; k < width; k += step) sum += x[k];
        mean = block_sum(sum, parts) / (float)width;
    }
    for (int k = first; k < width; k += step) {
        float value = x[k] - mean;

        square += value * value;
        y[place(k)] = value;
    }
    square = block_sum(square, parts) / (float)width;
    scale = 1.0f / sqrtf(square + norm.eps);
    for (int k = first; k < width; k += step) {
        float *at = y + place(k);

        if (norm.kind == NORM_LAYER)
            *at = *at * scale * norm.weight[k] + norm.bias[k];
        else
            *at = *at * (norm.weight[k] * scale);
    }
}

struct in_order {
    __device__ int operator()(int k) const
    {
        return k;
    }
};

/* Address of the key (value == 0) or value of one position of a lane. */
template <class T>
__device__ static __forceinline__ T *kv_address(const struct kv_cache &cache, int lane, int layer,
                                                int value, int head, int position)
{
    unsigned ring = (unsigned)(cache.pages_per_lane * cache.page_positions);
    unsigned at = (unsigned)position % ring, block = at / (unsigned)cache.page_positions;
    int page = cache.table[(long)lane * cache.pages_per_lane + block];
    long plane = ((long)(layer * 2 + value) * cache.kv_heads + head) * cache.page_positions;
    long row_bytes = cache.head_dim * (long)sizeof(T), scale = cache.dtype == MOSHI_INT8 ? 4 : 0;

    return (T *)(void *)((char *)cache.pages + (size_t)page * cache.page_bytes +
                         plane * (row_bytes + scale) +
                         at % (unsigned)cache.page_positions * row_bytes);
}

/* The scale of the codes there, of an int8 cache. */
__device__ static __forceinline__ float *kv_scale(const struct kv_cache &cache, const int8_t *codes,
                                                  int position)
{
    int at = (int)((unsigned)position % (unsigned)cache.page_positions);

    return (float *)(void *)(codes + (long)(cache.page_positions - at) * cache.head_dim) + at;
}

__device__ static __forceinline__ float elu(float value)
{
    return value > 0 ? value : expf(value) - 1.0f;
}

#endif
