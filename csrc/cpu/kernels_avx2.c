/* kernels_avx2.c: the kernels for x86 with AVX2, FMA and F16C (2013 and later).
 *
 * Sums. `dot` reads a row of weights in blocks of 16; products with the first and the second vector
 * of a block go to two accumulators, which are added and folded at the end of the row. A block of
 * bf16 is one load: shifted left by 16 its even elements are floats, with the low halves masked
 * away its odd ones, so `arrange` sorts each 16 activations into even and odd ones. `panels` has
 * one lane for each output and goes through the columns in order. Tiles of several rows and outputs
 * share loads, but each sum is made in that order in any tile: the bits don't depend on the shape.
 *
 * A call with one row is bound by memory: four rows of weights are read side by side and fetched
 * AHEAD bytes before their use, from the next four rows when these end. That reached 93 % of a
 * plain read, against 80 to 88 for one, two or eight rows or without looking into the next ones.
 *
 * exp: n = round(x / ln 2), r = x - n ln 2, e^r = 1 + r + r^2 q(r), then n is added to the exponent.
 * erf: x p(x^2) below 1, else 1 - exp(-s(x)). The polynomials are minimax fits; both are within
 * 2 ulp. */
#include "kernels.h"

#if defined(MOSHI_CPU_AVX2)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#define UNROLL _Pragma("unroll")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define UNROLL _Pragma("GCC unroll 8")
#endif

#define INLINE static inline __attribute__((always_inline))

#define AHEAD 2048 /* bytes */
#define BLOCK 16   /* weights */
#define SPAN 512   /* columns that many rows work on before they go on; a multiple of 2 BLOCKs */
#define GROUP 16   /* outputs in the meantime */
#define MANY 48    /* rows */

/* Lanes below n. */
INLINE __m256i lanes(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* n floats and zeros; n may be below 0 or above 8. */
INLINE __m256 load_some(const float *x, int n)
{
    return _mm256_maskload_ps(x, lanes(n));
}

INLINE float fold(__m256 v)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* ---- formats ---------------------------------------------------------------------------- */

/* A block of weights as two vectors; for bf16 the even and the odd ones. */
INLINE void load_block(enum weight_format format, const char *w, __m256 *lo, __m256 *hi)
{
    if (format == WEIGHT_F32) {
        *lo = _mm256_loadu_ps((const float *)w);
        *hi = _mm256_loadu_ps((const float *)w + 8);
    } else if (format == WEIGHT_F16) {
        *lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w));
        *hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w + 1));
    } else {
        __m256i both = _mm256_loadu_si256((const __m256i *)w);

        *lo = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        *hi = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000u)));
    }
}

INLINE __m256 widen_bf16(const uint16_t *w)
{
    __m128i narrow = _mm_loadu_si128((const __m128i *)(const void *)w);

    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

static void widen_f32_avx2(const void *w, size_t n, float *y)
{
    memcpy(y, w, n * sizeof *y);
}

static void widen_f16_avx2(const void *w, size_t n, float *y)
{
    const uint16_t *h = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(h + i))));
    for (; i < n; i++) y[i] = _cvtsh_ss(h[i]);
}

static void widen_bf16_avx2(const void *w, size_t n, float *y)
{
    const uint16_t *h = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, widen_bf16(h + i));
    for (; i < n; i++) y[i] = bf16_to_f32(h[i]);
}

static void arrange_plain_avx2(const float *x, int columns, float *y)
{
    if (y != x) memcpy(y, x, (size_t)columns * sizeof *y);
    memset(y + columns, 0, (padded(columns) - (size_t)columns) * sizeof *y);
}

static void arrange_bf16_avx2(const float *x, int columns, float *y)
{
    for (int k = 0; k < columns; k += BLOCK) {
        __m256 a = load_some(x + k, columns - k), b = load_some(x + k + 8, columns - k - 8);
        __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);

        even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
        odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
        _mm256_storeu_ps(y + k, even);
        _mm256_storeu_ps(y + k + 8, odd);
    }
}

/* ---- rows of weights times rows of activations ------------------------------------------ */

/* One step of a tile: block k of R rows of activations and O rows of weights. */
INLINE void dot_block(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                      const float *const *x, int k, __m256 sums[3][8])
{
    __m256 lo[3], hi[3];

    UNROLL
    for (int r = 0; r < R; r++) {
        lo[r] = _mm256_loadu_ps(x[r] + k);
        hi[r] = _mm256_loadu_ps(x[r] + k + 8);
    }
    UNROLL
    for (int o = 0; o < O; o++) {
        __m256 w_lo, w_hi;

        load_block(format, w + (size_t)o * row_bytes, &w_lo, &w_hi);
        UNROLL
        for (int r = 0; r < R; r++) sums[r][o] = _mm256_fmadd_ps(w_lo, lo[r], sums[r][o]);
        UNROLL
        for (int r = 0; r < R; r++) sums[r][o] = _mm256_fmadd_ps(w_hi, hi[r], sums[r][o]);
    }
}

/* The last columns - k < BLOCK columns. Weights are not read past the row's end; activations of
 * f32 neither, the others are padded. */
INLINE void dot_tail(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                     const float *const *x, int k, int left, __m256 sums[3][8])
{
    UNROLL
    for (int o = 0; o < O; o++) {
        _Alignas(32) char block[BLOCK * 4] = {0};
        __m256 w_lo, w_hi;

        memcpy(block, w + (size_t)o * row_bytes, (size_t)left * weight_bytes(format));
        load_block(format, block, &w_lo, &w_hi);
        UNROLL
        for (int r = 0; r < R; r++) {
            int n = format == WEIGHT_F32 ? left : BLOCK;

            sums[r][o] = _mm256_fmadd_ps(w_lo, load_some(x[r] + k, n), sums[r][o]);
            sums[r][o] = _mm256_fmadd_ps(w_hi, load_some(x[r] + k + 8, n - 8), sums[r][o]);
        }
    }
}

/* Which weights a tile fetches in advance, and its part of the columns. */
struct span {
    int begin, end;
    size_t near, far; /* bytes from a weight to the one to fetch: below column `wrap`, and from it */
    int wrap;
    int tile, tiles; /* the tiles that share these weights fetch one line of each row in turn */
};

/* R rows of x and O rows of w, over the columns of a span. Unless it has all columns, the sums
 * rest in partial[R][GROUP] in between. */
INLINE void dot_tile(enum weight_format format, int R, int O, const char *w, int columns,
                     const float *const *x, struct span span, __m256 *partial, float *y,
                     size_t stride)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    int step = 64 / (int)bytes, k = span.begin, turn = span.tile;
    __m256 sums[3][8];

    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int o = 0; o < O; o++)
            sums[r][o] = k == 0 ? _mm256_setzero_ps() : partial[r * GROUP + o];
    }
    for (; k + step <= span.end; k += step) { /* a cache line of each row */
        const char *at = w + (size_t)k * bytes;

        if (turn-- == 0) {
            const char *next = at + (k < span.wrap ? span.near : span.far);

            turn = span.tiles - 1;
            UNROLL
            for (int o = 0; o < O; o++) _mm_prefetch(next + (size_t)o * row_bytes, _MM_HINT_T0);
        }
        dot_block(format, R, O, at, row_bytes, x, k, sums);
        if (step > BLOCK)
            dot_block(format, R, O, at + BLOCK * bytes, row_bytes, x, k + BLOCK, sums);
    }
    if (span.end < columns) {
        UNROLL
        for (int r = 0; r < R; r++) {
            UNROLL
            for (int o = 0; o < O; o++) partial[r * GROUP + o] = sums[r][o];
        }
        return;
    }
    if (k + BLOCK <= columns) {
        dot_block(format, R, O, w + (size_t)k * bytes, row_bytes, x, k, sums);
        k += BLOCK;
    }
    if (k < columns)
        dot_tail(format, R, O, w + (size_t)k * bytes, row_bytes, x, k, columns - k, sums);
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int o = 0; o < O; o++) y[(size_t)r * stride + (size_t)o] = fold(sums[r][o]);
    }
}

/* Few rows: a group of O outputs from the first column to the last. */
INLINE void dot_few(enum weight_format format, int O, const char *w, int columns,
                    const float *const *x, int rows, float *y, size_t stride)
{
    int bytes = (int)weight_bytes(format);
    struct span span = {.end = columns, .near = AHEAD, .wrap = columns - AHEAD / bytes,
                        .far = AHEAD + (size_t)(O - 1) * (size_t)columns * (size_t)bytes,
                        .tiles = 1};

    if (rows == 3)
        dot_tile(format, 3, O, w, columns, x, span, NULL, y, stride);
    else if (rows == 2)
        dot_tile(format, 2, O, w, columns, x, span, NULL, y, stride);
    else
        dot_tile(format, 1, O, w, columns, x, span, NULL, y, stride);
}

/* Where tile t of `tiles` begins, all nearly equal in height. */
INLINE int tile_start(int rows, int tiles, int t)
{
    return rows * t / tiles;
}

/* Many rows, up to MANY, and up to GROUP outputs: the columns in spans, so that a span of all
 * activations stays in the first cache while the weights pass; while they do, their next span is
 * fetched. */
INLINE void dot_many(enum weight_format format, const char *w, int columns, int outputs,
                     const float *const *x, int rows, float *y, size_t stride)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    int tiles = (rows + 2) / 3;
    __m256 partial[MANY * GROUP];

    for (int begin = 0; begin < columns; begin += SPAN) {
        int end = columns - begin < SPAN ? columns : begin + SPAN, o = 0;
        size_t next = end < columns ? SPAN * bytes : GROUP * row_bytes - (size_t)begin * bytes;
        struct span span = {.begin = begin, .end = end, .near = next, .far = next, .tiles = tiles};

        while (o < outputs) {
            int four = o + 4 <= outputs;

            for (int t = 0; t < tiles; t++) {
                int r = tile_start(rows, tiles, t), n = tile_start(rows, tiles, t + 1) - r;
                const char *from = w + (size_t)o * row_bytes;
                float *to = y + (size_t)r * stride + o;
                __m256 *rest = partial + r * GROUP + o;

                span.tile = t;
                if (four && n == 3)
                    dot_tile(format, 3, 4, from, columns, x + r, span, rest, to, stride);
                else if (four)
                    dot_tile(format, 2, 4, from, columns, x + r, span, rest, to, stride);
                else if (n == 3)
                    dot_tile(format, 3, 1, from, columns, x + r, span, rest, to, stride);
                else
                    dot_tile(format, 2, 1, from, columns, x + r, span, rest, to, stride);
            }
            o += four ? 4 : 1;
        }
    }
}

INLINE void dot(enum weight_format format, const void *weights, int columns, int outputs,
                const float *const *x, int rows, float *y, size_t stride)
{
    const char *w = weights;
    size_t row_bytes = (size_t)columns * weight_bytes(format);
    int o = 0;

    for (; rows > MANY; rows -= MANY, x += MANY, y += MANY * stride)
        dot(format, weights, columns, outputs, x, MANY, y, stride);
    for (; rows > 3 && o < outputs; o += GROUP)
        dot_many(format, w + (size_t)o * row_bytes, columns,
                 outputs - o < GROUP ? outputs - o : GROUP, x, rows, y + o, stride);
    for (; rows == 1 && o + 8 <= outputs; o += 8)
        dot_few(format, 8, w + (size_t)o * row_bytes, columns, x, 1, y + o, stride);
    for (; o + 4 <= outputs; o += 4)
        dot_few(format, 4, w + (size_t)o * row_bytes, columns, x, rows, y + o, stride);
    for (; o < outputs; o++)
        dot_few(format, 1, w + (size_t)o * row_bytes, columns, x, rows, y + o, stride);
}

static void dot_f32_avx2(const void *w, int columns, int outputs, const float *const *x, int rows,
                         float *y, size_t stride)
{
    dot(WEIGHT_F32, w, columns, outputs, x, rows, y, stride);
}

static void dot_f16_avx2(const void *w, int columns, int outputs, const float *const *x, int rows,
                         float *y, size_t stride)
{
    dot(WEIGHT_F16, w, columns, outputs, x, rows, y, stride);
}

static void dot_bf16_avx2(const void *w, int columns, int outputs, const float *const *x, int rows,
                          float *y, size_t stride)
{
    dot(WEIGHT_BF16, w, columns, outputs, x, rows, y, stride);
}

/* ---- panels times rows of activations --------------------------------------------------- */

/* R rows and P panels, which lie `columns` * PANEL floats apart. */
INLINE void panel_tile(int R, int P, const float *w, int columns, const float *const *x, float *y,
                       size_t stride)
{
    size_t panel = (size_t)columns * PANEL;
    int wrap = columns - AHEAD / (4 * PANEL);
    __m256 sums[6][8];

    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int p = 0; p < 2 * P; p++) sums[r][p] = _mm256_setzero_ps();
    }
    for (int k = 0; k < columns; k++, w += PANEL) {
        if (R <= 3) { /* more rows come back to the panel, and have no loads to spare */
            size_t ahead = AHEAD / 4 + (k >= wrap ? (size_t)(P - 1) * panel : 0);

            UNROLL
            for (int p = 0; p < P; p++)
                _mm_prefetch((const char *)(w + (size_t)p * panel + ahead), _MM_HINT_T0);
        }
        UNROLL
        for (int p = 0; p < P; p++) {
            __m256 left = _mm256_loadu_ps(w + (size_t)p * panel);
            __m256 right = _mm256_loadu_ps(w + (size_t)p * panel + 8);

            UNROLL
            for (int r = 0; r < R; r++) {
                __m256 a = _mm256_broadcast_ss(x[r] + k);

                sums[r][2 * p] = _mm256_fmadd_ps(a, left, sums[r][2 * p]);
                sums[r][2 * p + 1] = _mm256_fmadd_ps(a, right, sums[r][2 * p + 1]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int p = 0; p < 2 * P; p++)
            _mm256_storeu_ps(y + (size_t)r * stride + 8 * p, sums[r][p]);
    }
}

/* One or two rows alone make too few sums to hide the latency of an addition, so they take several
 * panels at once. */
static void panels_f32_avx2(const float *w, int columns, int panels, const float *const *x,
                            int rows, float *y, size_t stride)
{
    size_t panel = (size_t)columns * PANEL;
    int tiles = (rows + 5) / 6, p = 0;

    for (; rows == 1 && p + 4 <= panels; p += 4)
        panel_tile(1, 4, w + (size_t)p * panel, columns, x, y + p * PANEL, stride);
    for (; rows == 2 && p + 2 <= panels; p += 2)
        panel_tile(2, 2, w + (size_t)p * panel, columns, x, y + p * PANEL, stride);
    for (; p < panels; p++) {
        const float *at = w + (size_t)p * panel;

        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t);
            float *to = y + (size_t)r * stride + p * PANEL;

            switch (tile_start(rows, tiles, t + 1) - r) {
            case 1: panel_tile(1, 1, at, columns, x + r, to, stride); break;
            case 2: panel_tile(2, 1, at, columns, x + r, to, stride); break;
            case 3: panel_tile(3, 1, at, columns, x + r, to, stride); break;
            case 4: panel_tile(4, 1, at, columns, x + r, to, stride); break;
            case 5: panel_tile(5, 1, at, columns, x + r, to, stride); break;
            case 6: panel_tile(6, 1, at, columns, x + r, to, stride); break;
            }
        }
    }
}

/* ---- functions -------------------------------------------------------------------------- */

/* Saturates below exp(-87.3) and above exp(88.3). */
INLINE __m256 exp8(__m256 x)
{
    __m256 n, r, q;

    x = _mm256_max_ps(_mm256_set1_ps(-87.3f), x); /* this order keeps NaN */
    x = _mm256_min_ps(_mm256_set1_ps(88.3f), x);
    n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x); /* ln 2 in two pieces */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    q = _mm256_set1_ps(1.39504788e-3f);
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(8.36888235e-3f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(4.16662060e-2f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(1.66665196e-1f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0.5f));
    q = _mm256_fmadd_ps(_mm256_mul_ps(r, r), q, r);
    q = _mm256_add_ps(q, _mm256_set1_ps(1.0f));
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_castps_si256(q), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

INLINE __m256 erf8(__m256 x)
{
    __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    __m256 t = _mm256_andnot_ps(sign, x), s = _mm256_mul_ps(x, x), small, large;

    small = _mm256_set1_ps(7.88912294e-5f);
    small = _mm256_fmadd_ps(small, s, _mm256_set1_ps(-8.02084222e-4f));
    small = _mm256_fmadd_ps(small, s, _mm256_set1_ps(5.18953567e-3f));
    small = _mm256_fmadd_ps(small, s, _mm256_set1_ps(-2.68544443e-2f));
    small = _mm256_fmadd_ps(small, s, _mm256_set1_ps(1.12836003e-1f));
    small = _mm256_fmadd_ps(small, s, _mm256_set1_ps(-3.76126260e-1f));
    small = _mm256_fmadd_ps(small, s, _mm256_set1_ps(1.12837911f));
    small = _mm256_mul_ps(small, x);
    t = _mm256_min_ps(_mm256_set1_ps(4.0f), t);
    large = _mm256_set1_ps(-1.85574114e-4f);
    large = _mm256_fmadd_ps(large, t, _mm256_set1_ps(2.93960841e-3f));
    large = _mm256_fmadd_ps(large, t, _mm256_set1_ps(-2.18053218e-2f));
    large = _mm256_fmadd_ps(large, t, _mm256_set1_ps(1.03037380e-1f));
    large = _mm256_fmadd_ps(large, t, _mm256_set1_ps(6.38225675e-1f));
    large = _mm256_fmadd_ps(large, t, _mm256_set1_ps(1.12704003f));
    large = _mm256_fmadd_ps(large, t, _mm256_set1_ps(3.53717682e-4f));
    large = _mm256_sub_ps(one, exp8(_mm256_xor_ps(large, sign)));
    large = _mm256_or_ps(large, _mm256_and_ps(x, sign));
    return _mm256_blendv_ps(large, small, _mm256_cmp_ps(t, one, _CMP_LT_OQ));
}

INLINE __m256 elu8(__m256 x)
{
    __m256 below = _mm256_sub_ps(exp8(x), _mm256_set1_ps(1.0f));

    return _mm256_blendv_ps(below, x, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}

INLINE __m256 gelu8(__m256 x)
{
    __m256 erf = erf8(_mm256_mul_ps(x, _mm256_set1_ps(0.70710678f)));

    return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), x),
                         _mm256_add_ps(_mm256_set1_ps(1.0f), erf));
}

INLINE __m256 gate8(__m256 g, __m256 v)
{
    __m256 down = exp8(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f)));

    return _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), down)), v);
}

static void elu_avx2(const float *x, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, elu8(_mm256_loadu_ps(x + i)));
    if (i < n) {
        int left = (int)(n - i);

        _mm256_maskstore_ps(y + i, lanes(left), elu8(load_some(x + i, left)));
    }
}

static void gelu_avx2(const float *x, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, gelu8(_mm256_loadu_ps(x + i)));
    if (i < n) {
        int left = (int)(n - i);

        _mm256_maskstore_ps(y + i, lanes(left), gelu8(load_some(x + i, left)));
    }
}

static void gate_avx2(const float *g, const float *v, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, gate8(_mm256_loadu_ps(g + i), _mm256_loadu_ps(v + i)));
    if (i < n) {
        int left = (int)(n - i);

        _mm256_maskstore_ps(y + i, lanes(left),
                            gate8(load_some(g + i, left), load_some(v + i, left)));
    }
}

static void add_avx2(const float *u, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_loadu_ps(u + i)));
    for (; i < n; i++) y[i] += u[i];
}

static void add_scaled_avx2(const float *u, const float *scale, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_loadu_ps(scale + i),
                                                _mm256_loadu_ps(u + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++) y[i] = fmaf(scale[i], u[i], y[i]);
}

/* ---- reductions over one row ------------------------------------------------------------ */

/* Sum of (x - mean)^2, or of x. */
INLINE float sum_row(const float *x, int n, float mean, int squared)
{
    __m256 sums[4], shift = _mm256_set1_ps(mean);
    int i = 0;

    for (int j = 0; j < 4; j++) sums[j] = _mm256_setzero_ps();
    for (; i < n; i += 32) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            int at = i + 8 * j;
            __m256 v;

            if (at >= n) break;
            v = n - at >= 8 ? _mm256_loadu_ps(x + at) : load_some(x + at, n - at);
            if (squared) {
                v = _mm256_sub_ps(v, shift);
                if (n - at < 8) v = _mm256_and_ps(v, _mm256_castsi256_ps(lanes(n - at)));
                sums[j] = _mm256_fmadd_ps(v, v, sums[j]);
            } else {
                sums[j] = _mm256_add_ps(sums[j], v);
            }
        }
    }
    return fold(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

static void norm_layer_avx2(const float *x, int n, float eps, const float *weight,
                            const float *bias, float *y)
{
    float mean = sum_row(x, n, 0, 0) / (float)n;
    float scale = 1.0f / sqrtf(sum_row(x, n, mean, 1) / (float)n + eps);
    __m256 means = _mm256_set1_ps(mean), scales = _mm256_set1_ps(scale);
    int i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), means), scales);

        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(v, _mm256_loadu_ps(weight + i),
                                                _mm256_loadu_ps(bias + i)));
    }
    for (; i < n; i++) y[i] = fmaf((x[i] - mean) * scale, weight[i], bias[i]);
}

static void norm_rms_avx2(const float *x, int n, float eps, const float *weight, float *y)
{
    float scale = 1.0f / sqrtf(eps + sum_row(x, n, 0, 1) / (float)n);
    __m256 scales = _mm256_set1_ps(scale);
    int i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i,
                         _mm256_mul_ps(_mm256_loadu_ps(x + i),
                                       _mm256_mul_ps(_mm256_loadu_ps(weight + i), scales)));
    for (; i < n; i++) y[i] = x[i] * (weight[i] * scale);
}

static void softmax_avx2(float *x, int n, float scale)
{
    __m256 most = _mm256_set1_ps(x[0]), sum = _mm256_setzero_ps();
    __m256 scales = _mm256_set1_ps(scale);
    __m128 half;
    int i = 0;

    for (; i + 8 <= n; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(x + i));
    for (; i < n; i++) most = _mm256_max_ps(most, _mm256_set1_ps(x[i]));
    half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    half = _mm_max_ss(half, _mm_movehdup_ps(half));
    most = _mm256_broadcastss_ps(half);
    for (i = 0; i < n; i += 8) {
        __m256i some = lanes(n - i);
        __m256 v = _mm256_sub_ps(_mm256_maskload_ps(x + i, some), most);

        v = _mm256_and_ps(exp8(_mm256_mul_ps(v, scales)), _mm256_castsi256_ps(some));
        _mm256_maskstore_ps(x + i, some, v);
        sum = _mm256_add_ps(sum, v);
    }
    scales = _mm256_set1_ps(1.0f / fold(sum));
    for (i = 0; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), scales));
    for (; i < n; i++) x[i] *= _mm256_cvtss_f32(scales);
}

/* ---- attention and search --------------------------------------------------------------- */

/* y[8 * V] += sum of p[j] * values[j], one vector of y in each accumulator. */
INLINE void mix_columns(enum weight_format format, int V, const float *p, const char *values,
                        int n, size_t row_bytes, float *y)
{
    __m256 sums[8];

    UNROLL
    for (int v = 0; v < V; v++) sums[v] = _mm256_loadu_ps(y + 8 * v);
    for (int j = 0; j < n; j++, values += row_bytes) {
        __m256 weight = _mm256_broadcast_ss(p + j);

        UNROLL
        for (int line = 0; line < V * 8 * (int)weight_bytes(format); line += 64)
            _mm_prefetch(values + AHEAD + line, _MM_HINT_T0);
        UNROLL
        for (int v = 0; v < V; v++) {
            __m256 value = format == WEIGHT_F32
                               ? _mm256_loadu_ps((const float *)values + 8 * v)
                               : widen_bf16((const uint16_t *)values + 8 * v);

            sums[v] = _mm256_fmadd_ps(weight, value, sums[v]);
        }
    }
    UNROLL
    for (int v = 0; v < V; v++) _mm256_storeu_ps(y + 8 * v, sums[v]);
}

INLINE void mix(enum weight_format format, const float *p, const void *values, int n, int width,
                float *y)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)width * bytes;
    const char *from = values;
    int d = 0;

    for (; d + 64 <= width; d += 64)
        mix_columns(format, 8, p, from + (size_t)d * bytes, n, row_bytes, y + d);
    for (; d + 8 <= width; d += 8)
        mix_columns(format, 1, p, from + (size_t)d * bytes, n, row_bytes, y + d);
    for (; d < width; d++) {
        for (int j = 0; j < n; j++) {
            const char *at = from + (size_t)j * row_bytes + (size_t)d * bytes;
            float value = format == WEIGHT_F32 ? *(const float *)(const void *)at
                                               : bf16_to_f32(*(const uint16_t *)(const void *)at);

            y[d] = fmaf(p[j], value, y[d]);
        }
    }
}

static void mix_f32_avx2(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_F32, p, values, n, width, y);
}

static void mix_bf16_avx2(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_BF16, p, values, n, width, y);
}

#define SCORES 32 /* entries at a time */

static void nearest_avx2(const float *entries, const float *half_norms, int n, int width,
                         const float *x, float *least, int *index)
{
    float scores[SCORES];

    *least = INFINITY;
    *index = 0;
    for (int e = 0; e < n; e += SCORES) {
        int count = n - e < SCORES ? n - e : SCORES;

        dot_f32_avx2(entries + (size_t)e * (size_t)width, width, count, &x, 1, scores, 0);
        for (int j = 0; j < count; j++) {
            float distance = half_norms[e + j] - scores[j];

            if (distance < *least) {
                *least = distance;
                *index = e + j;
            }
        }
    }
}

const struct cpu_kernels kernels_avx2 = {
    .name = "avx2",
    .arrange = {arrange_plain_avx2, arrange_plain_avx2, arrange_bf16_avx2},
    .dot = {dot_f32_avx2, dot_f16_avx2, dot_bf16_avx2},
    .panels = panels_f32_avx2,
    .widen = {widen_f32_avx2, widen_f16_avx2, widen_bf16_avx2},
    .norm_layer = norm_layer_avx2,
    .norm_rms = norm_rms_avx2,
    .elu = elu_avx2,
    .gelu = gelu_avx2,
    .gate = gate_avx2,
    .add = add_avx2,
    .add_scaled = add_scaled_avx2,
    .softmax = softmax_avx2,
    .mix = {mix_f32_avx2, NULL, mix_bf16_avx2},
    .nearest = nearest_avx2,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
