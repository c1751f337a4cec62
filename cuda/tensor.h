/* tensor.h: rows of activations times a matrix on the tensor cores: bf16 rows, fp8 and the block formats.
 * The weights are the 16 rows of a tile, the activations its 8 columns; for one row of activations
 * seven columns are wasted, which costs nothing, as the reads of the weights are all the time there
 * is.
 *
 * A block takes 8 pairs of outputs at a time, or some such tiles that share what is read of the
 * activations. Its warps take chunks of columns in turn, and their sums are added in the order of the
 * warps. All of that depends on the format alone: a row has the same bits alone and in any company.
 *
 * Activations are arranged first. bf16 weights meet them as two bf16 numbers, the nearest one and the
 * nearest one to what is left: 16 bits. fp8 weights become bf16 on their way, exactly. The block formats
 * meet the codes of quant.h: 8 bits and a scale for a GROUP, products of codes being exact. Few rows are
 * arranged in shared memory by every block that needs them; more, by a kernel of their own.
 *
 * Bytes: the weights once for up to MOST_ROWS rows, of more and bf16 see many.cu; arranged rows once for
 * each tile or two of outputs, which the second cache has. Bound: the memory's read rate. */
#ifndef MOSHI_CUDA_TENSOR_H
#define MOSHI_CUDA_TENSOR_H

#include "blocks.h"
#include "product.h"

#define ROWS_HERE 4 /* arranged in shared memory */
#define COLUMNS_OF_TILE 8

/* What a lane reads of one chunk of a pair: its words of both rows, and their scales. */
template <enum weight_format F> struct words {
    uint4 a[F == WEIGHT_Q4 ? 1 : 2], b[F == WEIGHT_Q4 ? 1 : 2];
    uint2 a_scales, b_scales;
};

/* Arranged rows. What becomes of one beyond the last is not stored: it is read where there is room for
 * all rows of a tile, else the last one stands for it. */
struct activations {
    const unsigned char *first;
    long row_bytes;
    int padded, last; /* columns; the last row, counted from the first */

    template <int N> __device__ __forceinline__ const unsigned char *row(int n, int i) const
    {
        if (N == 1) i = i < last ? i : last;
        return first + i * row_bytes + n * COLUMNS_OF_TILE * row_bytes;
    }
};

/* The code sums begin as these bits, and then are a float that is 0x1.8p23 too large. */
#define SHIFTED_BITS 0x4b400000
#define SHIFTED 12582912.0f

/* A chunk of blocks. An arranged row is its codes, placed as those of the weights, then f32 scales. */
template <enum weight_format F> struct tensor_format {
    static const int COLUMNS = CHUNK;

    __host__ __device__ static size_t row_bytes(int columns)
    {
        size_t padded = (size_t)((columns + CHUNK - 1) / CHUNK) * CHUNK;

        return padded + padded / GROUP * sizeof(float);
    }

    /* Eight columns of a row that begin at x; the four lanes of a group do it together. */
    __device__ static void arrange(const float *x, int at, int padded, unsigned char *to,
                                   int inside, int)
    {
        unsigned most = 0, words[2] = {};

#pragma unroll
        for (int i = 0; i < 8; i++) {
            unsigned magnitude = __float_as_uint(x[i]) & 0x7fffffffu;

            most = magnitude > most ? magnitude : most;
        }
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {
            unsigned given = __shfl_xor_sync(FULL_WARP, most, other);

            most = given > most ? given : most;
        }
        float largest = __uint_as_float(most);
        float inverse = largest > LEAST_MAGNITUDE ? 127.0f / largest : 0;

#pragma unroll
        for (int i = 0; i < 8; i++)
            words[i / 4] |= ((unsigned)(int)rintf(x[i] * inverse) & 255) << i % 4 * 8;
        if (!inside) return;
        *(uint2 *)(void *)(to + at / TILE * TILE + at % GROUP * 2 +
                           at % TILE / GROUP * 8) = {words[0], words[1]};
        if (at % GROUP == 0)
            ((float *)(void *)(to + padded))[at / GROUP] = largest * (1.0f / 127.0f);
    }

    __device__ static __forceinline__ const unsigned char *octet(const void *weight, int columns,
                                                                 int row)
    {
        return (const unsigned char *)weight + (row / OCTET) * octet_bytes<F>(columns);
    }

    __device__ static __forceinline__ void read_row(const unsigned char *octet, int row, int chunk,
                                                    uint4 *codes, uint2 *scales)
    {
        const unsigned char *at = octet + block<F>::HEAD + (size_t)chunk * block<F>::BYTES;

        row %= OCTET;
        if (F != WEIGHT_INT8) *scales = ((const uint2 *)(const void *)at)[row];
        at += block<F>::SCALES + row * TILE + (int)threadIdx.x % 4 * 16;
        codes[0] = *(const uint4 *)(const void *)at;
        if (F != WEIGHT_Q4) codes[1] = *(const uint4 *)(const void *)(at + OCTET * TILE);
    }

    template <class E>
    __device__ static __forceinline__ void read(const struct product<E> &p, int a, int b, int chunk,
                                                struct words<F> *w)
    {
        read_row(octet(p.matrix(), p.columns, a), a, chunk, w->a, &w->a_scales);
        read_row(octet(p.matrix(), p.columns, b), b, chunk, w->b, &w->b_scales);
    }

    /* Two words that a lane gives for one row: of the first or second group of half a chunk. */
    __device__ static __forceinline__ uint2 group_words(const uint4 *codes, int half, int second)
    {
        if (F != WEIGHT_Q4) {
            uint4 v = half ? codes[F == WEIGHT_Q4 ? 0 : 1] : codes[0];

            return second ? uint2{v.z, v.w} : uint2{v.x, v.y};
        }
        uint2 w = half ? uint2{codes->z, codes->w} : uint2{codes->x, codes->y};

        if (!second) w = {w.x << 4, w.y << 4}; /* 16 times the codes, signs and all */
        return {w.x & 0xf0f0f0f0u, w.y & 0xf0f0f0f0u};
    }

    __device__ static __forceinline__ float group_scale(uint2 scales, int half, int second)
    {
        unsigned word = half ? scales.y : scales.x;
        float scale = half_to_float((uint16_t)(second ? word >> 16 : word));

        return F == WEIGHT_Q4 ? scale * 0.0625f : scale;
    }

    /* All rows of activations times half a chunk. */
    template <int N, int TILES>
    __device__ static __forceinline__ void multiply(const struct words<F> (&w)[TILES],
                                                    const struct activations &x, int chunk,
                                                    int half, float (&sums)[N][TILES][4])
    {
        const long codes_at = (long)chunk * CHUNK + half * TILE + (int)threadIdx.x % 4 * 16;
        const long scales_at = x.padded + ((long)chunk * CHUNK_GROUPS + half * 2) * 4;

#pragma unroll
        for (int n = 0; n < N; n++) {
            int row = (int)threadIdx.x % WARP / 4, left = (int)threadIdx.x % 4 * 2;
            const unsigned char *codes_of = x.template row<N>(n, row) + codes_at;
            const unsigned char *lefts_of = x.template row<N>(n, left) + scales_at;
            const unsigned char *rights_of = x.template row<N>(n, left + 1) + scales_at;
            uint4 codes = *(const uint4 *)(const void *)codes_of;
            float2 lefts = *(const float2 *)(const void *)lefts_of;
            float2 rights = *(const float2 *)(const void *)rights_of;

#pragma unroll(N < 8 ? 2 : 1)
            for (int second = 0; second < 2; second++) {
                float left_scale = second ? lefts.y : lefts.x;
                float right_scale = second ? rights.y : rights.x;

#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    uint2 a = group_words(w[m].a, half, second);
                    uint2 b = group_words(w[m].b, half, second);
                    const unsigned rows[4] = {a.x, b.x, a.y, b.y};
                    int dots[4] = {SHIFTED_BITS, SHIFTED_BITS, SHIFTED_BITS, SHIFTED_BITS};
                    float a_scale = 1, b_scale = 1;

                    multiply_codes(dots, rows, second ? codes.z : codes.x,
                                   second ? codes.w : codes.y);
                    if (F != WEIGHT_INT8) {
                        a_scale = group_scale(w[m].a_scales, half, second);
                        b_scale = group_scale(w[m].b_scales, half, second);
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sums[n][m][i] = fmaf(__uint_as_float((unsigned)dots[i]) - SHIFTED,
                                             (i / 2 ? b_scale : a_scale) *
                                                 (i % 2 ? right_scale : left_scale),
                                             sums[n][m][i]);
                }
            }
        }
    }

    template <class E> __device__ static float scale(const struct product<E> &p, int row)
    {
        if (F != WEIGHT_INT8) return 1;
        return ((const float *)(const void *)octet(p.matrix(), p.columns, row))[row % OCTET];
    }
};

/* A chunk of bf16 rows, and of the rows that it meets: of 8 columns, 16 bytes of the numbers, then 16
 * of what is left. For warpgroups: of the chunk, the numbers, then what is left; each in steps of 16
 * columns, 4 of each 8 of half a chunk: two of them in the step's first 16 bytes, two in the others. */
template <> struct tensor_format<WEIGHT_BF16> {
    static const int COLUMNS = ARRANGED_CHUNK;

    __host__ __device__ static size_t row_bytes(int columns)
    {
        return (size_t)((columns + COLUMNS - 1) / COLUMNS) * COLUMNS * 4;
    }

    __device__ static void arrange(const float *x, int at, int, unsigned char *to, int inside,
                                   int groups)
    {
        unsigned high[4], low[4];

        if (!inside) return;

#pragma unroll
        for (int i = 0; i < 4; i++) {
            struct bf16 near[2], rest[2];

#pragma unroll
            for (int j = 0; j < 2; j++) {
                narrow(x[2 * i + j], &near[j]);
                narrow(x[2 * i + j] - widen(near[j]), &rest[j]);
            }
            high[i] = near[0].bits | (unsigned)near[1].bits << 16;
            low[i] = rest[0].bits | (unsigned)rest[1].bits << 16;
        }
        if (groups) {
            to += (long)(at / COLUMNS) * COLUMNS * 4 + at % COLUMNS / 32 * 64 + at % 32 / 8 * 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                *(unsigned *)(void *)(to + i * 16) = high[i];
                *(unsigned *)(void *)(to + COLUMNS * 2 + i * 16) = low[i];
            }
            return;
        }
        uint4 *piece = (uint4 *)(void *)(to + (long)at * 4);

        piece[0] = {high[0], high[1], high[2], high[3]};
        piece[1] = {low[0], low[1], low[2], low[3]};
    }

    __device__ static __forceinline__ uint4 part(const uint16_t *row, int at, int columns,
                                                 int aligned)
    {
        unsigned w[4] = {};

        if (aligned) return at < columns ? *(const uint4 *)(const void *)(row + at) : uint4{};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (at + i < columns) w[i / 2] |= (unsigned)row[at + i] << i % 2 * 16;
        return {w[0], w[1], w[2], w[3]};
    }

    template <class E>
    __device__ static __forceinline__ void read(const struct product<E> &p, int a, int b, int chunk,
                                                struct words<WEIGHT_BF16> *w)
    {
        const uint16_t *rows = (const uint16_t *)p.matrix();
        int at = chunk * COLUMNS + (int)threadIdx.x % 4 * 8;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            w->a[half] = part(rows + (long)a * p.columns, at + half * 32, p.columns, p.aligned);
            w->b[half] = part(rows + (long)b * p.columns, at + half * 32, p.columns, p.aligned);
        }
    }

    template <int N, int TILES>
    __device__ static __forceinline__ void multiply(const struct words<WEIGHT_BF16> (&w)[TILES],
                                                    const struct activations &x, int chunk,
                                                    int half, float (&sums)[N][TILES][4])
    {
        const long at = ((long)chunk * COLUMNS + half * 32 + (int)threadIdx.x % 4 * 8) * 4;

#pragma unroll
        for (int n = 0; n < N; n++) {
            const unsigned char *row = x.template row<N>(n, (int)threadIdx.x % WARP / 4) + at;
            uint4 high = ((const uint4 *)(const void *)row)[0];
            uint4 low = ((const uint4 *)(const void *)row)[1];

#pragma unroll
            for (int m = 0; m < TILES; m++) {
                uint4 a = half ? w[m].a[1] : w[m].a[0], b = half ? w[m].b[1] : w[m].b[0];
                const unsigned first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};

                multiply_bf16(sums[n][m], first, low.x, low.y);
                multiply_bf16(sums[n][m], first, high.x, high.y);
                multiply_bf16(sums[n][m], second, low.z, low.w);
                multiply_bf16(sums[n][m], second, high.z, high.w);
            }
        }
    }

    template <class E> __device__ static float scale(const struct product<E> &, int)
    {
        return 1;
    }
};

/* fp8: blocks that lie as those of int8, and rows arranged as for bf16. */
template <> struct words<WEIGHT_FP8> : words<WEIGHT_INT8> {};

template <> struct tensor_format<WEIGHT_FP8> {
    static const int COLUMNS = CHUNK;

    __host__ __device__ static size_t row_bytes(int columns)
    {
        return (size_t)((columns + CHUNK - 1) / CHUNK) * CHUNK * 4;
    }

    __device__ static void arrange(const float *x, int at, int padded, unsigned char *to,
                                   int inside, int groups)
    {
        tensor_format<WEIGHT_BF16>::arrange(x, at, padded, to, inside, groups);
    }

    template <class E>
    __device__ static __forceinline__ void read(const struct product<E> &p, int a, int b, int chunk,
                                                struct words<WEIGHT_FP8> *w)
    {
        tensor_format<WEIGHT_INT8>::read(p, a, b, chunk, w);
    }

    template <int N, int TILES>
    __device__ static __forceinline__ void multiply(const struct words<WEIGHT_FP8> (&w)[TILES],
                                                    const struct activations &x, int chunk,
                                                    int half, float (&sums)[N][TILES][4])
    {
        const long at = ((long)chunk * CHUNK + half * TILE + (int)threadIdx.x % 4 * 8) * 4;

#pragma unroll(N < 2 ? 2 : 1)
        for (int second = 0; second < 2; second++) {
            struct {
                unsigned words[4];
            } pairs[TILES][2]; /* of 4 columns of both rows */

#pragma unroll
            for (int m = 0; m < TILES; m++) {
                uint4 a = half ? w[m].a[1] : w[m].a[0], b = half ? w[m].b[1] : w[m].b[0];
                uint2 a0 = widen_fp8(second ? a.z : a.x), a1 = widen_fp8(second ? a.w : a.y);
                uint2 b0 = widen_fp8(second ? b.z : b.x), b1 = widen_fp8(second ? b.w : b.y);

                pairs[m][0] = {{a0.x, b0.x, a0.y, b0.y}};
                pairs[m][1] = {{a1.x, b1.x, a1.y, b1.y}};
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                const unsigned char *row = x.template row<N>(n, (int)threadIdx.x % WARP / 4) + at +
                                           second * GROUP * 4;
                uint4 high = ((const uint4 *)(const void *)row)[0];
                uint4 low = ((const uint4 *)(const void *)row)[1];

#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    multiply_bf16(sums[n][m], pairs[m][0].words, low.x, low.y);
                    multiply_bf16(sums[n][m], pairs[m][0].words, high.x, high.y);
                    multiply_bf16(sums[n][m], pairs[m][1].words, low.z, low.w);
                    multiply_bf16(sums[n][m], pairs[m][1].words, high.z, high.w);
                }
            }
        }
    }

    template <class E> __device__ static float scale(const struct product<E> &p, int row)
    {
        return tensor_format<WEIGHT_INT8>::scale(p, row);
    }
};

template <enum weight_format F> __host__ __device__ static int padded_columns(int columns)
{
    const int chunk = tensor_format<F>::COLUMNS;

    return (columns + chunk - 1) / chunk * chunk;
}

/* One row, by the whole block; work: a float for each padded column, and as many again as warps. */
template <enum weight_format F>
__device__ static void arrange_row(const struct norm &norm, const float *x, int columns,
                                   float *work, unsigned char *to, int groups)
{
    int padded = padded_columns<F>(columns);

    norm_row(norm, x, columns, work, work + padded, in_order());
    for (int k = columns + (int)threadIdx.x; k < padded; k += THREADS) work[k] = 0;
    __syncthreads();
    for (int base = 0; base < padded; base += 8 * THREADS) {
        int at = base + (int)threadIdx.x * 8, inside = at < padded;

        tensor_format<F>::arrange(work + (inside ? at : 0), at, padded, to, inside, groups);
    }
    __syncthreads(); /* work may be written again, and the row may be read */
}

struct arrange_rows {
    const float *x;
    int columns, steps;
    long row_stride, step_stride;
    struct norm norm;
    unsigned char *to;
    int groups; /* for warpgroups */
};

/* Grid: rows. Bytes: a row in, its arranged form out. */
template <enum weight_format F>
__global__ static void __launch_bounds__(THREADS)
    k_arrange(const __grid_constant__ struct arrange_rows p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    int row = (int)blockIdx.x;

    arrange_row<F>(p.norm, p.x + row / p.steps * p.row_stride + row % p.steps * p.step_stride,
                   p.columns, (float *)(void *)shared,
                   p.to + row * tensor_format<F>::row_bytes(p.columns), p.groups);
}

/* What a tile's warps have, added in their order; by the whole block. work: a float for each sum. */
template <enum weight_format F, int N, int TILES, class E>
__device__ static __forceinline__ void store_sums(const struct product<E> &p, float *work,
                                                  int first, int last, int start,
                                                  const float (&sums)[N][TILES][4])
{
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;

#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                work[(((warp * N + n) * TILES + m) * 4 + i) * WARP + lane] = sums[n][m][i];
    __syncthreads();
    for (int at = (int)threadIdx.x; at < N * TILES * 2 * WARP; at += THREADS) {
        int tile = at / (2 * WARP), i = at / WARP % 2, from = at % WARP;
        int row = first + tile / TILES * COLUMNS_OF_TILE + from % 4 * 2 + i;
        int pair = start + tile % TILES * OCTET + from / 4;
        float a = 0, b = 0;

        if (row > last || pair >= p.pairs) continue;
        for (int w = 0; w < WARPS; w++) {
            const float *part = work + ((w * N * TILES + tile) * 4 + i) * WARP + from;

            a += part[0];
            b += part[2 * WARP];
        }
        p.end.store(row, pair, p.outputs, a * tensor_format<F>::scale(p, p.first_of(pair)),
                    b * tensor_format<F>::scale(p, p.second_of(pair)));
    }
    __syncthreads(); /* the next sums go to the same place */
}

/* Grid: tiles of outputs, N columns of rows, matrices. N: columns of a tile / 8; TILES: of outputs. */
template <enum weight_format F, int N, int TILES, class E>
__global__ static void __launch_bounds__(THREADS, N < 4 ? 2 : 1)
    k_tensor(const __grid_constant__ struct product<E> p)
{
    after_earlier_kernels();
    typedef struct tensor_format<F> format;
    SHARED_BYTES(shared);
    float *work = (float *)(void *)shared; /* of a row that is arranged, then sums of the warps */
    const int padded = padded_columns<F>(p.columns), chunks = padded / format::COLUMNS;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int first = (int)blockIdx.y * N * COLUMNS_OF_TILE, last = p.rows - 1;
    struct activations x = {p.arranged, (long)format::row_bytes(p.columns), padded, last - first};

    if (p.arranged) {
        x.first += first * x.row_bytes;
    } else { /* then there is one piece of rows, and they are few */
        unsigned char *to = shared + p.work_bytes;

        for (int r = 0; r < p.rows; r++)
            arrange_row<F>(p.norm, p.input(r), p.columns, work, to + r * x.row_bytes, 0);
        x.first = to;
    }
    for (int start = (int)blockIdx.x * OCTET * TILES; start < p.pairs;
         start += (int)gridDim.x * OCTET * TILES) {
        float sums[N][TILES][4] = {};

        for (int chunk = warp; chunk < chunks; chunk += WARPS) {
            struct words<F> w[TILES];

#pragma unroll
            for (int m = 0; m < TILES; m++) {
                int pair = start + m * OCTET + lane / 4;

                if (pair >= p.pairs) pair = p.pairs - 1; /* its sums are not stored */
                format::read(p, p.first_of(pair), p.second_of(pair), chunk, &w[m]);
            }
#pragma unroll(N < 4 ? 2 : 1)
            for (int half = 0; half < 2; half++) format::multiply(w, x, chunk, half, sums);
        }
        store_sums<F, N, TILES>(p, work, first, last, start, sums);
    }
}

/* ---- the host's side -------------------------------------------------------------------- */

template <enum weight_format F>
static void launch_arrange(struct cuda_backend *cuda, const char *name, struct arrange_rows &rows,
                           int count)
{
    size_t work = ((size_t)padded_columns<F>(rows.columns) + WARPS) * sizeof(float);

    if (cuda_fits(cuda, name, work))
        launch(cuda, k_arrange<F>, dim3((unsigned)count), THREADS, work, rows);
}

/* All rows, behind what is kept of the scratch memory. */
template <enum weight_format F, class E>
static void arrange_all(struct cuda_backend *cuda, const char *name, struct product<E> &p,
                        size_t kept, int groups)
{
    size_t bytes = (size_t)round_up(p.rows, ARRANGED_TOGETHER) *
                   tensor_format<F>::row_bytes(p.columns);
    struct arrange_rows rows = blank<struct arrange_rows>();

    rows.x = p.x;
    rows.columns = p.columns;
    rows.steps = p.steps;
    rows.row_stride = p.row_stride;
    rows.step_stride = p.step_stride;
    rows.norm = p.norm;
    rows.groups = groups;
    rows.to = (unsigned char *)cuda_take_scratch(cuda, 0, kept + bytes).memory + kept;
    launch_arrange<F>(cuda, name, rows, p.rows);
    p.arranged = rows.to;
}

template <enum weight_format F, int N, int TILES, class E>
static void launch_tensor(struct cuda_backend *cuda, const char *name, struct product<E> &p,
                          size_t kept)
{
    size_t row_bytes = tensor_format<F>::row_bytes(p.columns);
    size_t sums = (size_t)WARPS * N * TILES * 4 * WARP * sizeof(float);
    size_t work = ((size_t)padded_columns<F>(p.columns) + WARPS) * sizeof(float), shared;
    int blocks = ceil_div(p.pairs, OCTET * TILES), most = (N < 4 ? 2 : 1) * cuda->processors;

    shared = work > sums ? work : sums;
    shared = (shared + 15) / 16 * 16;
    p.work_bytes = (int)shared;
    if (p.rows <= ROWS_HERE && shared + (size_t)p.rows * row_bytes <= cuda->shared_limit) {
        shared += (size_t)p.rows * row_bytes;
        most = ceil_div(most, p.matrices);
        blocks = blocks < most ? blocks : most; /* for several tiles each */
    } else {
        arrange_all<F>(cuda, name, p, kept, 0);
        shared = sums;
    }
    if (cuda_fits(cuda, name, shared))
        launch(cuda, k_tensor<F, N, TILES, E>,
               dim3((unsigned)blocks, (unsigned)ceil_div(p.rows, N * COLUMNS_OF_TILE),
                    (unsigned)p.matrices),
               THREADS, shared, p);
}

template <enum weight_format F, class E>
static void choose_tiles(struct cuda_backend *cuda, const char *name, struct product<E> &p,
                         size_t kept)
{
    if (p.rows <= 8)
        launch_tensor<F, 1, 1>(cuda, name, p, kept);
    else if (p.rows <= 16)
        launch_tensor<F, 2, 1>(cuda, name, p, kept);
    else if (p.rows <= 32)
        launch_tensor<F, 4, 2>(cuda, name, p, kept);
    else
        launch_tensor<F, 8, 2>(cuda, name, p, kept);
}

template <class E>
static void choose_format(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                          struct product<E> &p, size_t kept)
{
    if (weight->format == WEIGHT_FP8)
        choose_tiles<WEIGHT_FP8>(cuda, name, p, kept);
    else if (weight->format == WEIGHT_INT8)
        choose_tiles<WEIGHT_INT8>(cuda, name, p, kept);
    else if (weight->format == WEIGHT_Q8)
        choose_tiles<WEIGHT_Q8>(cuda, name, p, kept);
    else if (weight->format == WEIGHT_Q4)
        choose_tiles<WEIGHT_Q4>(cuda, name, p, kept);
    else {
        p.aligned = (uintptr_t)p.weight % 16 == 0 && p.columns % 8 == 0;
        if (p.rows > MOST_ROWS && p.aligned && many_product_fits(cuda)) {
            arrange_all<WEIGHT_BF16>(cuda, name, p, kept, cuda->groups);
            many_product(cuda, p);
        } else {
            choose_tiles<WEIGHT_BF16>(cuda, name, p, kept);
        }
    }
}

#endif
