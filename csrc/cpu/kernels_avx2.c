/* kernels_avx2.c: the kernels for x86 with AVX2, FMA and F16C (2013 and later).
 *
 * Sums. `dot` goes through a row of weights in blocks of 16, first vector, then second, into one
 * accumulator, which is folded at the end of the row. A block of bf16 is one load: shifted left by
 * 16 its even elements are floats, with the low halves masked away its odd ones, so `arrange` sorts
 * each 16 activations into even and odd ones. `panels` has one lane for each output and goes
 * through the columns in order. Tiles of several rows and outputs share loads, but each sum is made
 * in that order in any tile: the bits don't depend on the shape. */
#include "kernels_x86.h"

#if defined(MOSHI_CPU_X86)

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

/* Compiled for this instruction set, too. */
#include "quantise.h"
#include "shared.h"

#define AHEAD 2048 /* bytes */
#define BLOCK 16   /* weights */
#define SPAN 512   /* columns that many rows work on before they go on; a multiple of 2 BLOCKs */
#define OUTPUTS 16   /* outputs in the meantime */

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

/* Eight of them, each in the same order: first the halves, then 0 + 2 and 1 + 3, then these. */
INLINE __m256 fold8(__m256 a, __m256 b, __m256 c, __m256 d, __m256 e, __m256 f, __m256 g, __m256 h)
{
    __m256 ae = _mm256_add_ps(_mm256_permute2f128_ps(a, e, 0x20),
                              _mm256_permute2f128_ps(a, e, 0x31));
    __m256 bf = _mm256_add_ps(_mm256_permute2f128_ps(b, f, 0x20),
                              _mm256_permute2f128_ps(b, f, 0x31));
    __m256 cg = _mm256_add_ps(_mm256_permute2f128_ps(c, g, 0x20),
                              _mm256_permute2f128_ps(c, g, 0x31));
    __m256 dh = _mm256_add_ps(_mm256_permute2f128_ps(d, h, 0x20),
                              _mm256_permute2f128_ps(d, h, 0x31));
    __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(ae, bf, 0x44), _mm256_shuffle_ps(ae, bf, 0xee));
    __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(cg, dh, 0x44), _mm256_shuffle_ps(cg, dh, 0xee));

    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
}

/* ---- formats ---------------------------------------------------------------------------- */

static const _Alignas(32) uint32_t high_halves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                     0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                     0xffff0000u, 0xffff0000u};

static const _Alignas(16) uint16_t all_but_14[8] = {0xbfff, 0xbfff, 0xbfff, 0xbfff,
                                                    0xbfff, 0xbfff, 0xbfff, 0xbfff};

/* Eight of e4m3, 2^8 times too small: as f16 their exponents count from 15 instead of 7. Bit 14 has a
 * second sign. */
INLINE __m256 widen_fp8(const void *w)
{
    __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(w)), 7);

    __asm__("vpand %1, %0, %0" : "+x"(half) : "m"(all_but_14));
    return _mm256_cvtph_ps(half);
}

/* One vector of a block of weights: the first or the second eight; for bf16 the even or the odd
 * ones. The mask stays in memory, since a tile has no register left for it. */
INLINE __m256 load_half(enum weight_format format, const char *w, int second)
{
    __m256i both;

    if (format == WEIGHT_F32) return _mm256_loadu_ps((const float *)w + 8 * second);
    if (format == WEIGHT_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w + second));
    if (format == WEIGHT_FP8) return widen_fp8(w + 8 * second);
    if (format == WEIGHT_INT8)
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + 8 * second))));
    both = _mm256_loadu_si256((const __m256i *)w);
    if (second)
        __asm__("vpand %1, %0, %0" : "+x"(both) : "m"(high_halves));
    else
        both = _mm256_slli_epi32(both, 16);
    return _mm256_castsi256_ps(both);
}

INLINE __m256 widen_bf16(const uint16_t *w)
{
    __m128i narrow = _mm_loadu_si128((const __m128i *)(const void *)w);

    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

void widen_f16_avx2(const void *w, size_t n, float *y)
{
    const uint16_t *h = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(h + i))));
    for (; i < n; i++) y[i] = _cvtsh_ss(h[i]);
}

void widen_bf16_avx2(const void *w, size_t n, float *y)
{
    const uint16_t *h = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, widen_bf16(h + i));
    for (; i < n; i++) y[i] = bf16_to_f32(h[i]);
}

void widen_fp8_avx2(const void *w, size_t n, float *y)
{
    const uint8_t *codes = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(widen_fp8(codes + i), _mm256_set1_ps(0x1p8f)));
    for (; i < n; i++) y[i] = fp8_to_f32(codes[i]);
}

void widen_int8_avx2(const void *w, size_t n, float *y)
{
    const int8_t *codes = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m128i narrow = _mm_loadl_epi64((const __m128i *)(const void *)(codes + i));

        _mm256_storeu_ps(y + i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow)));
    }
    for (; i < n; i++) y[i] = codes[i];
}

static void arrange_bf16_avx2(const float *x, int columns, float *y)
{
    for (int k = 0; k < (int)padded(columns); k += BLOCK) {
        __m256 a = load_some(x + k, columns - k), b = load_some(x + k + 8, columns - k - 8);
        __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);

        even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
        odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
        _mm256_storeu_ps(y + k, even);
        _mm256_storeu_ps(y + k + 8, odd);
    }
}

/* ---- rows of weights times rows of activations ------------------------------------------ */

/* Which columns a tile works on, and which weights it fetches in advance. */
struct span {
    int begin, end;
    size_t near,
        far; /* bytes from a weight to the one to fetch: below column `wrap`, and from it */
    int wrap;
    int turn,
        turns; /* the first block to fetch for, and every how many: a cache line may be several
                        blocks, and several tiles may share the weights and so the work */
};

/* The last `left` < BLOCK columns, k and on. Weights are not read past the row's end; activations
 * of f32 neither, the others are padded. */
static void dot_tail(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                     const float *const *x, int k, int left, __m256 *partial)
{
    int n = format == WEIGHT_F32 ? left : BLOCK;

    for (int o = 0; o < O; o++) {
        _Alignas(32) char block[BLOCK * 4] = {0};

        memcpy(block, w + (size_t)o * row_bytes + (size_t)k * weight_bytes(format),
               (size_t)left * weight_bytes(format));
        for (int half = 0; half < 2; half++) {
            __m256 b = format == WEIGHT_F32    ? load_half(WEIGHT_F32, block, half)
                       : format == WEIGHT_F16  ? load_half(WEIGHT_F16, block, half)
                       : format == WEIGHT_BF16 ? load_half(WEIGHT_BF16, block, half)
                       : format == WEIGHT_FP8  ? load_half(WEIGHT_FP8, block, half)
                                               : load_half(WEIGHT_INT8, block, half);

            for (int r = 0; r < R; r++)
                partial[r * OUTPUTS + o] = _mm256_fmadd_ps(
                    b, load_some(x[r] + k + 8 * half, n - 8 * half), partial[r * OUTPUTS + o]);
        }
    }
}

/* One row of activations: bound by memory, so eight rows of weights are read side by side, and
 * fetched AHEAD bytes before their use, from the next eight when these end. That reaches 94 to 98 %
 * of a plain read; one or two rows at a time, or no look into the next ones, 75 to 88 %. */
INLINE void dot_eight(enum weight_format format, const char *w, int columns, const float *x,
                      float *y)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    int wrap = columns - AHEAD / (int)bytes, k = 0;
    __m256 s[8];

    UNROLL
    for (int o = 0; o < 8; o++) s[o] = _mm256_setzero_ps();
    for (; k + BLOCK <= columns; k += BLOCK) {
        const char *at = w + (size_t)k * bytes;
        __m256 lo = _mm256_loadu_ps(x + k), hi = _mm256_loadu_ps(x + k + 8);

        if (k % (64 / (int)bytes) == 0) { /* once for a cache line */
            const char *next = at + AHEAD + (k < wrap ? 0 : 7 * row_bytes);

            UNROLL
            for (int o = 0; o < 8; o++) _mm_prefetch(next + (size_t)o * row_bytes, _MM_HINT_T0);
        }
        UNROLL
        for (int o = 0; o < 8; o++) {
            const char *row = at + (size_t)o * row_bytes;

            s[o] = _mm256_fmadd_ps(load_half(format, row, 0), lo, s[o]);
            s[o] = _mm256_fmadd_ps(load_half(format, row, 1), hi, s[o]);
        }
    }
    if (k < columns) {
        __m256 partial[8];

        UNROLL
        for (int o = 0; o < 8; o++) partial[o] = s[o];
        dot_tail(format, 1, 8, w, row_bytes, &x, k, columns - k, partial);
        UNROLL
        for (int o = 0; o < 8; o++) s[o] = partial[o];
    }
    _mm256_storeu_ps(y, fold8(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]));
}

/* Compilers would rather spill sums than read weights twice, and read activations anew than keep
 * them. This ends what is known about memory, and holds three vectors in registers. */
#define HOLD(a, b, c) __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(c) : : "memory")

/* The sums of one row of weights with up to three rows of activations. */
struct sums {
    __m256 a, b, c;
};

INLINE struct sums add_products(int R, struct sums s, __m256 w, __m256 a, __m256 b, __m256 c)
{
    s.a = _mm256_fmadd_ps(w, a, s.a);
    if (R > 1) s.b = _mm256_fmadd_ps(w, b, s.b);
    if (R > 2) s.c = _mm256_fmadd_ps(w, c, s.c);
    return s;
}

/* One step of a tile: a block of R rows of activations and O rows of weights, one half after the
 * other, because 3 x 4 sums leave four registers. */
INLINE void dot_block(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                      const float *xa, const float *xb, const float *xc, struct sums s[4])
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        __m256 a = _mm256_loadu_ps(xa + 8 * half), b = a, c = a;

        if (R > 1) b = _mm256_loadu_ps(xb + 8 * half);
        if (R > 2) c = _mm256_loadu_ps(xc + 8 * half);
        HOLD(a, b, c);
        UNROLL
        for (int o = 0; o < O; o++)
            s[o] = add_products(R, s[o], load_half(format, w + (size_t)o * row_bytes, half), a, b,
                                c);
    }
}

/* The whole blocks of a span, for R rows of x and O rows of w. The sums go on from
 * partial[R][OUTPUTS] and return there. */
INLINE void dot_blocks(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                       const float *const *x, const struct span *span, __m256 *partial)
{
    int k = span->begin, turn = span->turn;
    const float *xa = x[0] + k, *xb = R > 1 ? x[1] + k : xa, *xc = R > 2 ? x[2] + k : xa;
    struct sums s[4];

    w += (size_t)k * weight_bytes(format);
    UNROLL
    for (int o = 0; o < O; o++) {
        s[o].a = partial[o];
        if (R > 1) s[o].b = partial[OUTPUTS + o];
        if (R > 2) s[o].c = partial[2 * OUTPUTS + o];
    }
    for (; k + BLOCK <= span->end; k += BLOCK) {
        if (turn-- == 0) {
            const char *next = w + (k < span->wrap ? span->near : span->far);

            turn = span->turns - 1;
            UNROLL
            for (int o = 0; o < O; o++) _mm_prefetch(next + (size_t)o * row_bytes, _MM_HINT_T0);
        }
        dot_block(format, R, O, w, row_bytes, xa, xb, xc, s);
        w += BLOCK * weight_bytes(format);
        xa += BLOCK;
        xb += BLOCK;
        xc += BLOCK;
    }
    UNROLL
    for (int o = 0; o < O; o++) {
        partial[o] = s[o].a;
        if (R > 1) partial[OUTPUTS + o] = s[o].b;
        if (R > 2) partial[2 * OUTPUTS + o] = s[o].c;
    }
}

/* The shapes of tiles: 3 x 4, 2 x 4, 1 x 1. Whoever inlines this must do nothing else, or
 * sums are spilled. */
INLINE void dot_shapes(enum weight_format format, int R, const char *w, size_t row_bytes,
                       const float *const *x, const struct span *span, __m256 *partial)
{
    if (R == 3)
        dot_blocks(format, 3, 4, w, row_bytes, x, span, partial);
    else if (R == 2)
        dot_blocks(format, 2, 4, w, row_bytes, x, span, partial);
    else
        dot_blocks(format, 1, 1, w, row_bytes, x, span, partial);
}

typedef void dot_function(int R, const char *w, size_t row_bytes, const float *const *x,
                          const struct span *span, __m256 *partial);

static void dot_tile_f32(int R, const char *w, size_t row_bytes, const float *const *x,
                         const struct span *span, __m256 *partial)
{
    dot_shapes(WEIGHT_F32, R, w, row_bytes, x, span, partial);
}

static void dot_tile_f16(int R, const char *w, size_t row_bytes, const float *const *x,
                         const struct span *span, __m256 *partial)
{
    dot_shapes(WEIGHT_F16, R, w, row_bytes, x, span, partial);
}

static void dot_tile_bf16(int R, const char *w, size_t row_bytes, const float *const *x,
                          const struct span *span, __m256 *partial)
{
    dot_shapes(WEIGHT_BF16, R, w, row_bytes, x, span, partial);
}

static void dot_tile_fp8(int R, const char *w, size_t row_bytes, const float *const *x,
                         const struct span *span, __m256 *partial)
{
    dot_shapes(WEIGHT_FP8, R, w, row_bytes, x, span, partial);
}

static void dot_tile_int8(int R, const char *w, size_t row_bytes, const float *const *x,
                          const struct span *span, __m256 *partial)
{
    dot_shapes(WEIGHT_INT8, R, w, row_bytes, x, span, partial);
}

static dot_function *const dot_tiles[WEIGHT_FORMATS] = {dot_tile_f32, dot_tile_f16, dot_tile_bf16,
                                                        dot_tile_fp8, dot_tile_int8};

static void dot_tile(enum weight_format format, int R, int O, const char *w, int columns,
                     const float *const *x, const struct span *span, __m256 *partial, float *y,
                     size_t stride)
{
    size_t row_bytes = (size_t)columns * weight_bytes(format);
    int left = columns % BLOCK;

    if (span->begin == 0)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) partial[r * OUTPUTS + o] = _mm256_setzero_ps();
    dot_tiles[format](R, w, row_bytes, x, span, partial);
    if (span->end < columns) return;
    if (left) dot_tail(format, R, O, w, row_bytes, x, columns - left, left, partial);
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++)
            y[(size_t)r * stride + (size_t)o] = fold(partial[r * OUTPUTS + o]);
}

/* Blocks in a cache line. */
INLINE int line_blocks(enum weight_format format)
{
    return 64 / (BLOCK * (int)weight_bytes(format));
}

/* One row of weights; two or three rows of activations take four. */
static void dot_few(enum weight_format format, const char *w, int columns, const float *const *x,
                    int rows, float *y, size_t stride)
{
    int bytes = (int)weight_bytes(format), O = rows == 1 ? 1 : 4;
    struct span span = {.end = columns,
                        .near = AHEAD,
                        .wrap = columns - AHEAD / bytes,
                        .far = AHEAD + (size_t)(O - 1) * (size_t)columns * (size_t)bytes,
                        .turns = line_blocks(format)};
    __m256 partial[3 * OUTPUTS];

    dot_tile(format, rows, O, w, columns, x, &span, partial, y, stride);
}

/* More rows, and 4 to OUTPUTS outputs, by four: the columns in spans, so that a span of all
 * activations stays in the first cache while the weights pass; while they do, their next span is
 * fetched. */
static void dot_many(enum weight_format format, const char *w, int columns, int outputs,
                     const float *const *x, int rows, float *y, size_t stride)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    int tiles = (rows + 2) / 3, line = line_blocks(format);
    __m256 partial[ROWS_MAX * OUTPUTS];

    for (int begin = 0; begin < columns; begin += SPAN) {
        int end = columns - begin < SPAN ? columns : begin + SPAN;
        size_t next = end < columns ? SPAN * bytes : OUTPUTS * row_bytes - (size_t)begin * bytes;
        struct span span = {
            .begin = begin, .end = end, .near = next, .far = next, .turns = tiles * line};

        for (int o = 0; o < outputs; o += 4) {
            for (int t = 0; t < tiles; t++) {
                int r = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - r;

                span.turn = t * line;
                dot_tile(format, height, 4, w + (size_t)o * row_bytes, columns, x + r, &span,
                         partial + r * OUTPUTS + o, y + (size_t)r * stride + o, stride);
            }
        }
    }
}

INLINE void dot(enum weight_format format, const char *w, int columns, int outputs,
                const float *const *x, int rows, float *y, size_t stride)
{
    size_t row_bytes = (size_t)columns * weight_bytes(format);
    int o = 0;

    if (rows == 1) {
        for (; o + 8 <= outputs; o += 8)
            dot_eight(format, w + (size_t)o * row_bytes, columns, x[0], y + o);
    } else if (rows <= 3) {
        for (; o + 4 <= outputs; o += 4)
            dot_few(format, w + (size_t)o * row_bytes, columns, x, rows, y + o, stride);
    } else {
        for (int n; (n = (outputs - o < OUTPUTS ? outputs - o : OUTPUTS) / 4 * 4) > 0; o += n)
            dot_many(format, w + (size_t)o * row_bytes, columns, n, x, rows, y + o, stride);
    }
    for (; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            dot_few(format, w + (size_t)o * row_bytes, columns, x + r, 1,
                    y + (size_t)r * stride + o, stride);
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

static void dot_fp8_avx2(const void *w, int columns, int outputs, const float *const *x, int rows,
                         float *y, size_t stride)
{
    dot(WEIGHT_FP8, w, columns, outputs, x, rows, y, stride);
}

static void dot_int8_avx2(const void *w, int columns, int outputs, const float *const *x, int rows,
                          float *y, size_t stride)
{
    dot(WEIGHT_INT8, w, columns, outputs, x, rows, y, stride);
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

/* Up to three rows alone make too few sums to hide the latency of an addition, so they take several
 * panels at once. */
static void panels_f32_avx2(const void *weights, int columns, int panels, const float *const *x,
                            int rows, float *y, size_t stride)
{
    const float *w = weights;
    size_t panel = (size_t)columns * PANEL;
    int tiles = (rows + 5) / 6, p = 0;

    for (; rows == 1 && p + 4 <= panels; p += 4)
        panel_tile(1, 4, w + (size_t)p * panel, columns, x, y + p * PANEL, stride);
    for (; rows == 2 && p + 2 <= panels; p += 2)
        panel_tile(2, 2, w + (size_t)p * panel, columns, x, y + p * PANEL, stride);
    for (; rows == 3 && p + 2 <= panels; p += 2)
        panel_tile(3, 2, w + (size_t)p * panel, columns, x, y + p * PANEL, stride);
    for (; p < panels; p++) {
        const float *at = w + (size_t)p * panel;

        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t);
            float *to = y + (size_t)r * stride + p * PANEL;

            switch (tile_start(rows, tiles, t + 1) - r) {
            case 1:
                panel_tile(1, 1, at, columns, x + r, to, stride);
                break;
            case 2:
                panel_tile(2, 1, at, columns, x + r, to, stride);
                break;
            case 3:
                panel_tile(3, 1, at, columns, x + r, to, stride);
                break;
            case 4:
                panel_tile(4, 1, at, columns, x + r, to, stride);
                break;
            case 5:
                panel_tile(5, 1, at, columns, x + r, to, stride);
                break;
            case 6:
                panel_tile(6, 1, at, columns, x + r, to, stride);
                break;
            }
        }
    }
}

/* ---- panels of codes -------------------------------------------------------------------- */

/* One group of activations; the magnitude is compared by its bits, so that NaN is the largest. */
INLINE void arrange_group(const float *x, int8_t *codes, float *scale, int32_t *sum)
{
    __m256i magnitudes = _mm256_set1_epi32(0x7fffffff), most = _mm256_setzero_si256();
    __m256i quarters[4], packed, sums;
    __m256 v[4], inverses;
    __m128i half;
    float largest;

    UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitudes));
    }
    half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    largest = _mm_cvtss_f32(_mm_castsi128_ps(half));
    inverses = _mm256_set1_ps(largest > LEAST_MAGNITUDE ? 127.0f / largest : 0);
    UNROLL
    for (int i = 0; i < 4; i++) quarters[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverses));
    *scale = largest * (1.0f / 127.0f);
    /* Packing works in 128-bit halves; the permutation puts fours of codes in order. */
    packed = _mm256_packs_epi16(_mm256_packs_epi32(quarters[0], quarters[1]),
                                _mm256_packs_epi32(quarters[2], quarters[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(void *)codes, packed);
    sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), packed),
                             _mm256_set1_epi16(1));
    half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    *sum = _mm_cvtsi128_si32(half);
}

void arrange_codes_avx2(const float *x, int columns, float *y)
{
    struct activation_tile *tile = (struct activation_tile *)(void *)y;

    for (int k = 0; k < columns; k += TILE, tile++) {
        float wide[TILE] = {0}; /* the tile may lie where x does */

        memcpy(wide, x + k, (size_t)(columns - k < TILE ? columns - k : TILE) * sizeof *x);
        for (int group = 0; group < 2; group++)
            arrange_group(wide + group * GROUP, tile->codes + group * GROUP, &tile->scales[group],
                          &tile->sums[group]);
    }
}

/* sums[r][2] are those of a panel's 16 rows so far. A product of an unsigned and a signed byte is
 * added to its neighbour's in 16 bits. 8-bit codes would overflow there, so the weight takes the
 * activation's sign, and the unsigned factor is the activation's magnitude: below 2 * 127^2. Codes
 * of 4 bits leave room for a whole group: below 16 * 15 * 127. */
INLINE void code_tile(enum weight_format format, int R, const char *tile,
                      const struct activation_tile *const *x, __m256 (*sums)[2])
{
    __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    __m256i flip = _mm256_set1_epi8((char)0x80);
    const char *codes = format == WEIGHT_INT8 ? tile : tile + 4 * PANEL;

    for (int group = 0; group < 2; group++) {
        __m256i dots[3][2];

        UNROLL
        for (int r = 0; r < R; r++) dots[r][0] = dots[r][1] = _mm256_setzero_si256();
        UNROLL
        for (int c = 0; c < GROUP; c += 4) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const char *at = codes + c * PANEL + 32 * half;
                __m256i w;

                if (format != WEIGHT_Q4) {
                    at += group * GROUP * PANEL;
                    w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(const void *)at),
                                         flip);
                } else {
                    w = _mm256_loadu_si256((const __m256i *)(const void *)at);
                    if (group) w = _mm256_srli_epi16(w, 4);
                    w = _mm256_and_si256(w, low);
                }
                if (half == 0) _mm_prefetch(at + AHEAD, _MM_HINT_T0);
                UNROLL
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    __m256i a;

                    memcpy(&four, x[r]->codes + group * GROUP + c, 4);
                    a = _mm256_set1_epi32(four);
                    if (format == WEIGHT_Q4)
                        a = _mm256_maddubs_epi16(w, a);
                    else
                        a = _mm256_madd_epi16(
                            _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a)), ones);
                    dots[r][half] = format == WEIGHT_Q4 ? _mm256_add_epi16(dots[r][half], a)
                                                        : _mm256_add_epi32(dots[r][half], a);
                }
            }
        }
        UNROLL
        for (int half = 0; half < 2; half++) {
            const uint16_t *scales = (const uint16_t *)(const void *)tile + group * PANEL +
                                     8 * half;
            __m256 scale;

            if (format != WEIGHT_INT8)
                scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)scales));
            UNROLL
            for (int r = 0; r < R; r++) {
                __m256 s = _mm256_set1_ps(x[r]->scales[group]);
                __m256i d = dots[r][half];

                if (format == WEIGHT_Q4)
                    d = _mm256_sub_epi32(_mm256_madd_epi16(d, ones),
                                         _mm256_set1_epi32(8 * x[r]->sums[group]));
                if (format != WEIGHT_INT8) s = _mm256_mul_ps(scale, s);
                sums[r][half] = _mm256_add_ps(sums[r][half],
                                              _mm256_mul_ps(_mm256_cvtepi32_ps(d), s));
            }
        }
    }
}

/* R rows of activations and one panel. */
INLINE void code_panel(enum weight_format format, int R, const char *panel, int columns,
                       const float *const *x, float *y, size_t stride)
{
    const char *tile = format == WEIGHT_INT8 ? panel + PANEL * sizeof(float) : panel;
    const struct activation_tile *at[3];
    __m256 sums[3][2];

    UNROLL
    for (int r = 0; r < R; r++) {
        at[r] = (const struct activation_tile *)(const void *)x[r];
        sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    }
    for (int k = 0; k < columns; k += TILE, tile += tile_bytes(format)) {
        code_tile(format, R, tile, at, sums);
        UNROLL
        for (int r = 0; r < R; r++) at[r]++;
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            if (format == WEIGHT_INT8)
                sums[r][half] = _mm256_mul_ps(
                    sums[r][half], _mm256_loadu_ps((const float *)(const void *)panel + 8 * half));
            _mm256_storeu_ps(y + (size_t)r * stride + 8 * half, sums[r][half]);
        }
    }
}

INLINE void panels_codes(enum weight_format format, const char *w, int columns, int panels,
                         const float *const *x, int rows, float *y, size_t stride)
{
    int tiles = (rows + 2) / 3;

    for (int p = 0; p < panels; p++, w += panel_bytes(format, columns), y += PANEL) {
        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - r;
            float *to = y + (size_t)r * stride;

            if (height == 3)
                code_panel(format, 3, w, columns, x + r, to, stride);
            else if (height == 2)
                code_panel(format, 2, w, columns, x + r, to, stride);
            else
                code_panel(format, 1, w, columns, x + r, to, stride);
        }
    }
}

static void panels_int8_avx2(const void *w, int columns, int panels, const float *const *x,
                             int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_INT8, w, columns, panels, x, rows, y, stride);
}

static void panels_q8_avx2(const void *w, int columns, int panels, const float *const *x, int rows,
                           float *y, size_t stride)
{
    panels_codes(WEIGHT_Q8, w, columns, panels, x, rows, y, stride);
}

static void panels_q4_avx2(const void *w, int columns, int panels, const float *const *x, int rows,
                           float *y, size_t stride)
{
    panels_codes(WEIGHT_Q4, w, columns, panels, x, rows, y, stride);
}

/* ---- functions -------------------------------------------------------------------------- */

/* The polynomial of `count` terms, the highest power's first. */
INLINE __m256 polynomial8(const float *terms, int count, __m256 x)
{
    __m256 y = _mm256_set1_ps(terms[0]);

    UNROLL
    for (int i = 1; i < count; i++) y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(terms[i]));
    return y;
}

INLINE __m256 exp8(__m256 x)
{
    __m256 n, r, q;

    x = _mm256_max_ps(_mm256_set1_ps(EXP_LEAST), x); /* this order keeps NaN */
    x = _mm256_min_ps(_mm256_set1_ps(EXP_MOST), x);
    n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(PER_LN2)),
                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    q = _mm256_fmadd_ps(_mm256_mul_ps(r, r), polynomial8(exp_terms, 5, r), r);
    q = _mm256_add_ps(q, _mm256_set1_ps(1.0f));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(q),
                                                _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

INLINE __m256 erf8(__m256 x)
{
    __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    __m256 t = _mm256_andnot_ps(sign, x), small, large;

    small = _mm256_mul_ps(polynomial8(erf_small_terms, 7, _mm256_mul_ps(x, x)), x);
    t = _mm256_min_ps(_mm256_set1_ps(4.0f), t);
    large = polynomial8(erf_large_terms, 7, t);
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

void gelu_avx2(const float *x, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, gelu8(_mm256_loadu_ps(x + i)));
    if (i < n) {
        int left = (int)(n - i);

        _mm256_maskstore_ps(y + i, lanes(left), gelu8(load_some(x + i, left)));
    }
}

void gate_avx2(const float *g, const float *v, size_t n, float *y)
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

void add_avx2(const float *u, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_loadu_ps(u + i)));
    for (; i < n; i++) y[i] += u[i];
}

INLINE void finish_row(const float *u, const float *bias, const float *residual, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(u + i);

        if (bias) v = _mm256_add_ps(v, _mm256_loadu_ps(bias + i));
        if (residual) v = _mm256_add_ps(v, _mm256_loadu_ps(residual + i));
        _mm256_storeu_ps(y + i, v);
    }
    for (; i < n; i++) y[i] = (u[i] + (bias ? bias[i] : 0)) + (residual ? residual[i] : 0);
}

static void finish_avx2(const float *u, size_t u_stride, const float *bias, const float *residual,
                        int rows, size_t n, float *y, size_t y_stride)
{
    for (; rows > 0; rows--, u += u_stride, y += y_stride) {
        finish_row(u, bias, residual, n, y);
        if (residual) residual += y_stride;
    }
}

void add_scaled_avx2(const float *u, const float *scale, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_loadu_ps(scale + i), _mm256_loadu_ps(u + i),
                                                _mm256_loadu_ps(y + i)));
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

void norm_layer_avx2(const float *x, int n, float eps, const float *weight, const float *bias,
                     float *y)
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

void norm_rms_avx2(const float *x, int n, float eps, const float *weight, float *y)
{
    float scale = 1.0f / sqrtf(eps + sum_row(x, n, 0, 1) / (float)n);
    __m256 scales = _mm256_set1_ps(scale);
    int i = 0;

    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(x + i),
                                              _mm256_mul_ps(_mm256_loadu_ps(weight + i), scales)));
    for (; i < n; i++) y[i] = x[i] * (weight[i] * scale);
}

void softmax_avx2(float *x, int n, float scale)
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

INLINE __m256 load_values(enum weight_format format, const char *from)
{
    if (format == WEIGHT_INT8)
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)from)));
    return format == WEIGHT_F32 ? _mm256_loadu_ps((const float *)(const void *)from)
                                : widen_bf16((const uint16_t *)(const void *)from);
}

/* y += the sum of J rows, which are read as they lie. y goes through memory once for all of them;
 * keeping it in registers would cut the rows in two, and that took twice as long. */
INLINE void mix_rows(enum weight_format format, int J, const float *p, const char *values,
                     int width, float *y)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)width * bytes;
    __m256 weights[8];
    int d = 0;

    UNROLL
    for (int j = 0; j < J; j++) weights[j] = _mm256_broadcast_ss(p + j);
    for (; d + 8 <= width; d += 8) {
        const char *at = values + (size_t)d * bytes;
        __m256 sum = _mm256_loadu_ps(y + d);

        if ((size_t)d * bytes % 64 == 0) {
            UNROLL
            for (int j = 0; j < J; j++)
                _mm_prefetch(at + (size_t)j * row_bytes + AHEAD, _MM_HINT_T0);
        }
        UNROLL
        for (int j = 0; j < J; j++)
            sum = _mm256_fmadd_ps(weights[j], load_values(format, at + (size_t)j * row_bytes), sum);
        _mm256_storeu_ps(y + d, sum);
    }
    for (; d < width; d++) {
        for (int j = 0; j < J; j++) {
            const char *at = values + (size_t)j * row_bytes + (size_t)d * bytes;
            float value = format == WEIGHT_F32 ? *(const float *)(const void *)at
                          : format == WEIGHT_INT8
                              ? *(const int8_t *)at
                              : bf16_to_f32(*(const uint16_t *)(const void *)at);

            y[d] = fmaf(p[j], value, y[d]);
        }
    }
}

INLINE void mix(enum weight_format format, const float *p, const void *values, int n, int width,
                float *y)
{
    size_t row_bytes = (size_t)width * weight_bytes(format);
    const char *from = values;
    int j = 0;

    for (; j + 8 <= n; j += 8) mix_rows(format, 8, p + j, from + (size_t)j * row_bytes, width, y);
    for (; j < n; j++) mix_rows(format, 1, p + j, from + (size_t)j * row_bytes, width, y);
}

static void mix_f32_avx2(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_F32, p, values, n, width, y);
}

static void mix_bf16_avx2(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_BF16, p, values, n, width, y);
}

static void mix_int8_avx2(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_INT8, p, values, n, width, y);
}

const struct cpu_kernels kernels_avx2 = {
    .name = "avx2",
    .arrange = {arrange_plain, arrange_plain, arrange_bf16_avx2, arrange_fp8, arrange_codes_avx2,
                arrange_codes_avx2, arrange_codes_avx2},
    .dot = {dot_f32_avx2, dot_f16_avx2, dot_bf16_avx2, dot_fp8_avx2, dot_int8_avx2},
    .panels = {panels_f32_avx2, NULL, NULL, NULL, panels_int8_avx2, panels_q8_avx2, panels_q4_avx2},
    .widen = {widen_f32, widen_f16_avx2, widen_bf16_avx2, widen_fp8_avx2, widen_int8_avx2},
    .quantise = {NULL, NULL, NULL, quantise_fp8, quantise_int8, quantise_q8, quantise_q4},
    .magnitude = largest_magnitude,
    .norm_layer = norm_layer_avx2,
    .norm_rms = norm_rms_avx2,
    .elu = elu_avx2,
    .gelu = gelu_avx2,
    .gate = gate_avx2,
    .add = add_avx2,
    .add_scaled = add_scaled_avx2,
    .finish = finish_avx2,
    .softmax = softmax_avx2,
    .mix = {mix_f32_avx2, NULL, mix_bf16_avx2, NULL, mix_int8_avx2},
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
