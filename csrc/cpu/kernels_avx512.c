/* kernels_avx512.c: the kernels for x86 with AVX-512 F, BW, DQ, VL and VNNI (2019 and later); what
 * is not here is AVX2's.
 *
 * Sums. `dot` goes through a row of weights in blocks of 32, first vector, then second, into one
 * accumulator, which is folded at the end of the row. A block of bf16 is one load: its even
 * elements, then its odd ones, as in kernels_avx2.c; weights are never rounded and activations
 * neither, which the dot product of bf16 pairs would do. `panels` has one lane for each output and
 * goes through the columns in order. Tiles of several rows and outputs share loads, but each sum is
 * made in that order in any tile: the bits don't depend on the shape. */
#include "kernels_x86.h"

#if defined(MOSHI_CPU_X86)

#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))),        \
    apply_to = function)
#define UNROLL _Pragma("unroll")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Compiled for this instruction set, too. */
#include "quantise.h"
#include "shared.h"

#define AHEAD 2048 /* bytes */
#define BLOCK 32   /* weights */
#define SPAN 512   /* columns of one panel that stay in the first cache: 32 KB */

/* The first n lanes; n may be below 0 or above 16. */
INLINE __mmask16 lanes(int n)
{
    return n >= 16 ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

/* The halves, then the halves of these, then 0 + 2 and 1 + 3, then these. */
INLINE __m256 fold_half(__m512 v)
{
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

INLINE float fold(__m512 v)
{
    __m256 eight = fold_half(v);
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));

    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE __m256 fold_pair(__m512 a, __m512 e)
{
    __m256 x = fold_half(a), y = fold_half(e);

    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}

/* Eight of them, each in the same order. */
INLINE __m256 fold8(const __m512 *s)
{
    __m256 ae = fold_pair(s[0], s[4]), bf = fold_pair(s[1], s[5]);
    __m256 cg = fold_pair(s[2], s[6]), dh = fold_pair(s[3], s[7]);
    __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(ae, bf, 0x44), _mm256_shuffle_ps(ae, bf, 0xee));
    __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(cg, dh, 0x44), _mm256_shuffle_ps(cg, dh, 0xee));

    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
}

/* Four of them, likewise. */
INLINE __m128 fold4(const __m512 *s)
{
    __m256 ab = fold_pair(s[0], s[1]), cd = fold_pair(s[2], s[3]);
    __m256 four = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    __m128 ac = _mm256_castps256_ps128(four), bd = _mm256_extractf128_ps(four, 1);

    ac = _mm_add_ps(_mm_shuffle_ps(ac, bd, 0x88), _mm_shuffle_ps(ac, bd, 0xdd));
    return _mm_shuffle_ps(ac, ac, 0xd8);
}

/* ---- rows of weights times rows of activations ------------------------------------------ */

static void arrange_bf16_avx512(const float *x, int columns, float *y)
{
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                            30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));

    for (int k = 0; k < (int)padded(columns); k += BLOCK) {
        __m512 a = _mm512_maskz_loadu_ps(lanes(columns - k), x + k);
        __m512 b = _mm512_maskz_loadu_ps(lanes(columns - k - 16), x + k + 16);

        _mm512_storeu_ps(y + k, _mm512_permutex2var_ps(a, evens, b));
        _mm512_storeu_ps(y + k + 16, _mm512_permutex2var_ps(a, odds, b));
    }
}

/* One vector of a block of `left` weights, 32 at most: the first or the second sixteen; for bf16
 * the even or the odd ones. */
INLINE __m512 load_half(enum weight_format format, const char *w, int second, int left)
{
    __m512i both;

    if (format == WEIGHT_F32) {
        const float *from = (const float *)(const void *)w + 16 * second;

        return left >= BLOCK ? _mm512_loadu_ps(from)
                             : _mm512_maskz_loadu_ps(lanes(left - 16 * second), from);
    }
    if (format == WEIGHT_F16) {
        const char *from = w + 32 * second;

        return _mm512_cvtph_ps(left >= BLOCK
                                   ? _mm256_loadu_si256((const __m256i *)(const void *)from)
                                   : _mm256_maskz_loadu_epi16(lanes(left - 16 * second), from));
    }
    if (format == WEIGHT_FP8 || format == WEIGHT_INT8) {
        const char *from = w + 16 * second;
        __m128i codes = left >= BLOCK ? _mm_loadu_si128((const __m128i *)(const void *)from)
                                      : _mm_maskz_loadu_epi8(lanes(left - 16 * second), from);

        if (format == WEIGHT_FP8) /* as f16, without a second sign: see kernels_avx2.c */
            return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes),
                                                                      7),
                                                    _mm256_set1_epi16((short)0xbfff)));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    both = left >= BLOCK ? _mm512_loadu_si512(w)
                         : _mm512_maskz_loadu_epi16((__mmask32)((1u << left) - 1), w);
    both = second ? _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000))
                  : _mm512_slli_epi32(both, 16);
    return _mm512_castsi512_ps(both);
}

INLINE void dot_block(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                      const float *const *x, int k, int left, __m512 (*s)[8])
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        __m512 a[6];

        UNROLL
        for (int r = 0; r < R; r++)
            a[r] = format != WEIGHT_F32 || left >= BLOCK
                       ? _mm512_loadu_ps(x[r] + k + 16 * half)
                       : _mm512_maskz_loadu_ps(lanes(left - 16 * half), x[r] + k + 16 * half);
        UNROLL
        for (int o = 0; o < O; o++) {
            __m512 weights = load_half(format, w + (size_t)o * row_bytes, half, left);

            UNROLL
            for (int r = 0; r < R; r++) s[r][o] = _mm512_fmadd_ps(weights, a[r], s[r][o]);
        }
    }
}

/* R rows of activations and O rows of weights. `fetch`: the weights come from memory, and are asked
 * for AHEAD bytes before their use; from the next O rows when these end. */
INLINE void dot_tile(enum weight_format format, int R, int O, const char *w, int columns,
                     const float *const *x, int fetch, float *y, size_t stride)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    int wrap = columns - AHEAD / (int)bytes, k = 0;
    __m512 s[6][8];

    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int o = 0; o < O; o++) s[r][o] = _mm512_setzero_ps();
    }
    for (; k + BLOCK <= columns; k += BLOCK) {
        const char *at = w + (size_t)k * bytes;

        if (fetch) {
            const char *next = at + AHEAD + (k < wrap ? 0 : (size_t)(O - 1) * row_bytes);

            UNROLL
            for (int o = 0; o < O; o++) {
                _mm_prefetch(next + (size_t)o * row_bytes, _MM_HINT_T0);
                if (format == WEIGHT_F32)
                    _mm_prefetch(next + (size_t)o * row_bytes + 64, _MM_HINT_T0);
            }
        }
        dot_block(format, R, O, at, row_bytes, x, k, BLOCK, s);
    }
    if (k < columns)
        dot_block(format, R, O, w + (size_t)k * bytes, row_bytes, x, k, columns - k, s);
    UNROLL
    for (int r = 0; r < R; r++) {
        if (O == 8) {
            _mm256_storeu_ps(y + (size_t)r * stride, fold8(s[r]));
        } else if (O == 4) {
            _mm_storeu_ps(y + (size_t)r * stride, fold4(s[r]));
        } else {
            y[(size_t)r * stride] = fold(s[r][0]);
        }
    }
}

#define STREAM_AHEAD 512  /* bytes */
#define STREAM_LEAST 8192 /* streams that are shorter are better read from end to end */
#define STREAM_ROW 16384  /* rows that are longer are long streams by themselves */

/* 8 * `each` outputs of one row of activations, eight at a time: one of each eighth, so that the
 * weights are read as eight long streams. */
INLINE void dot_streams(enum weight_format format, const char *w, int columns, int each,
                        const float *x, float *y)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    size_t apart = (size_t)each * row_bytes;

    for (int i = 0; i < each; i++, w += row_bytes) {
        float sums[8];
        __m512 s[1][8];
        int k = 0;

        UNROLL
        for (int o = 0; o < 8; o++) s[0][o] = _mm512_setzero_ps();
        for (; k + BLOCK <= columns; k += BLOCK) {
            const char *at = w + (size_t)k * bytes;

            UNROLL
            for (int o = 0; o < 8; o++) {
                _mm_prefetch(at + STREAM_AHEAD + (size_t)o * apart, _MM_HINT_T0);
                if (format == WEIGHT_F32)
                    _mm_prefetch(at + STREAM_AHEAD + (size_t)o * apart + 64, _MM_HINT_T0);
            }
            dot_block(format, 1, 8, at, apart, &x, k, BLOCK, s);
        }
        if (k < columns)
            dot_block(format, 1, 8, w + (size_t)k * bytes, apart, &x, k, columns - k, s);
        _mm256_storeu_ps(sums, fold8(s[0]));
        for (int o = 0; o < 8; o++) y[o * each + i] = sums[o];
    }
}

INLINE void dot_four(enum weight_format format, const char *w, int columns, const float *const *x,
                     int rows, int fetch, float *y, size_t stride)
{
    switch (rows) {
    case 1:
        dot_tile(format, 1, 4, w, columns, x, fetch, y, stride);
        break;
    case 2:
        dot_tile(format, 2, 4, w, columns, x, fetch, y, stride);
        break;
    case 3:
        dot_tile(format, 3, 4, w, columns, x, fetch, y, stride);
        break;
    case 4:
        dot_tile(format, 4, 4, w, columns, x, fetch, y, stride);
        break;
    case 5:
        dot_tile(format, 5, 4, w, columns, x, fetch, y, stride);
        break;
    case 6:
        dot_tile(format, 6, 4, w, columns, x, fetch, y, stride);
        break;
    }
}

INLINE void dot(enum weight_format format, const char *w, int columns, int outputs,
                const float *const *x, int rows, float *y, size_t stride)
{
    size_t row_bytes = (size_t)columns * weight_bytes(format);
    int tiles = (rows + 5) / 6, o = 0;

    if (rows == 1 && row_bytes < STREAM_ROW && (size_t)(outputs / 8) * row_bytes >= STREAM_LEAST) {
        dot_streams(format, w, columns, outputs / 8, x[0], y);
        o = outputs / 8 * 8;
    }
    for (; rows == 1 && o + 8 <= outputs; o += 8)
        dot_tile(format, 1, 8, w + (size_t)o * row_bytes, columns, x, 1, y + o, stride);
    for (; o + 4 <= outputs; o += 4) {
        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t);

            dot_four(format, w + (size_t)o * row_bytes, columns, x + r,
                     tile_start(rows, tiles, t + 1) - r, t == 0, y + (size_t)r * stride + o,
                     stride);
        }
    }
    for (; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            dot_tile(format, 1, 1, w + (size_t)o * row_bytes, columns, x + r, r == 0,
                     y + (size_t)r * stride + o, stride);
}

static void dot_f32_avx512(const void *w, int columns, int outputs, const float *const *x, int rows,
                           float *y, size_t stride)
{
    dot(WEIGHT_F32, w, columns, outputs, x, rows, y, stride);
}

static void dot_f16_avx512(const void *w, int columns, int outputs, const float *const *x, int rows,
                           float *y, size_t stride)
{
    dot(WEIGHT_F16, w, columns, outputs, x, rows, y, stride);
}

static void dot_bf16_avx512(const void *w, int columns, int outputs, const float *const *x,
                            int rows, float *y, size_t stride)
{
    dot(WEIGHT_BF16, w, columns, outputs, x, rows, y, stride);
}

static void dot_fp8_avx512(const void *w, int columns, int outputs, const float *const *x, int rows,
                           float *y, size_t stride)
{
    dot(WEIGHT_FP8, w, columns, outputs, x, rows, y, stride);
}

static void dot_int8_avx512(const void *w, int columns, int outputs, const float *const *x,
                            int rows, float *y, size_t stride)
{
    dot(WEIGHT_INT8, w, columns, outputs, x, rows, y, stride);
}

/* ---- panels of floats ------------------------------------------------------------------- */

/* What a tile of four panels brings nearer while others wait for it, `step` bytes further at each
 * column. */
struct stream {
    const char *from;
    size_t step;
};

/* Columns begin..end-1 of R rows and P panels, which lie `columns` * PANEL floats apart. The sums go
 * on from y, except at the first column. ahead: fetches its panels AHEAD of their use. */
INLINE void panel_tile(int R, int P, const float *w, size_t columns, size_t begin, size_t end,
                       const float *const *x, int ahead, struct stream next, float *y,
                       size_t stride)
{
    size_t panel = columns * PANEL,
           wrap = columns < AHEAD / (4 * PANEL) ? 0 : columns - AHEAD / (4 * PANEL);
    const float *rows[12];
    __m512 sums[12][4];

    UNROLL
    for (int r = 0; r < R; r++) {
        rows[r] = x[r];
        UNROLL
        for (int p = 0; p < P; p++)
            sums[r][p] = begin ? _mm512_loadu_ps(y + (size_t)r * stride + PANEL * p)
                               : _mm512_setzero_ps();
    }
    w += begin * PANEL;
    for (size_t k = begin; k < end; k++, w += PANEL) {
        __m512 weights[4];

        if (ahead) {
            size_t far = AHEAD / 4 + (k >= wrap ? (size_t)(P - 1) * panel : 0);

            UNROLL
            for (int p = 0; p < P; p++)
                _mm_prefetch((const char *)(w + (size_t)p * panel + far), _MM_HINT_T0);
        } else if (P == 4) {
            _mm_prefetch(next.from, _MM_HINT_T1);
            next.from += next.step;
        }
        UNROLL
        for (int p = 0; p < P; p++) weights[p] = _mm512_loadu_ps(w + (size_t)p * panel);
        UNROLL
        for (int r = 0; r < R; r++) {
            __m512 a = _mm512_set1_ps(rows[r][k]);

            UNROLL
            for (int p = 0; p < P; p++) sums[r][p] = _mm512_fmadd_ps(a, weights[p], sums[r][p]);
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int p = 0; p < P; p++)
            _mm512_storeu_ps(y + (size_t)r * stride + PANEL * p, sums[r][p]);
    }
}

static const struct stream no_stream = {NULL, 0};

#define PANEL_CASE(R, P, ahead, next)                                                              \
    case R:                                                                                        \
        panel_tile(R, P, w, columns, begin, end, x, ahead, next, y, stride);                       \
        break;

/* All columns of up to six rows. */
static void panels_alone_4(int R, const float *w, size_t columns, const float *const *x, float *y,
                           size_t stride)
{
    const size_t begin = 0, end = columns;

    switch (R) {
        PANEL_CASE(1, 4, 1, no_stream)
        PANEL_CASE(2, 4, 1, no_stream)
        PANEL_CASE(3, 4, 1, no_stream)
        PANEL_CASE(4, 4, 1, no_stream)
        PANEL_CASE(5, 4, 1, no_stream)
        PANEL_CASE(6, 4, 1, no_stream)
    }
}

/* One of several tiles, which have three rows or more. */
static void panels_shared_4(int R, const float *w, size_t columns, size_t begin, size_t end,
                            const float *const *x, struct stream next, float *y, size_t stride)
{
    switch (R) {
        PANEL_CASE(3, 4, 0, next)
        PANEL_CASE(4, 4, 0, next)
        PANEL_CASE(5, 4, 0, next)
        PANEL_CASE(6, 4, 0, next)
    }
}

static void panel_tiles_1(int R, const float *w, size_t columns, size_t begin, size_t end,
                          const float *const *x, int ahead, float *y, size_t stride)
{
    switch (R) {
        PANEL_CASE(1, 1, ahead, no_stream)
        PANEL_CASE(2, 1, ahead, no_stream)
        PANEL_CASE(3, 1, ahead, no_stream)
        PANEL_CASE(4, 1, ahead, no_stream)
        PANEL_CASE(5, 1, ahead, no_stream)
        PANEL_CASE(6, 1, ahead, no_stream)
        PANEL_CASE(7, 1, ahead, no_stream)
        PANEL_CASE(8, 1, ahead, no_stream)
        PANEL_CASE(9, 1, ahead, no_stream)
        PANEL_CASE(10, 1, ahead, no_stream)
        PANEL_CASE(11, 1, ahead, no_stream)
        PANEL_CASE(12, 1, ahead, no_stream)
    }
}

static void panel_tiles_2(int R, const float *w, size_t columns, size_t begin, size_t end,
                          const float *const *x, int ahead, float *y, size_t stride)
{
    switch (R) {
        PANEL_CASE(1, 2, ahead, no_stream)
        PANEL_CASE(2, 2, ahead, no_stream)
        PANEL_CASE(3, 2, ahead, no_stream)
        PANEL_CASE(4, 2, ahead, no_stream)
        PANEL_CASE(5, 2, ahead, no_stream)
        PANEL_CASE(6, 2, ahead, no_stream)
        PANEL_CASE(7, 2, ahead, no_stream)
        PANEL_CASE(8, 2, ahead, no_stream)
        PANEL_CASE(9, 2, ahead, no_stream)
        PANEL_CASE(10, 2, ahead, no_stream)
        PANEL_CASE(11, 2, ahead, no_stream)
        PANEL_CASE(12, 2, ahead, no_stream)
    }
}

/* What tile t of `tiles` fetches during columns begin..end-1: of the next span of four panels, which
 * begins at column 0 of the four after these when the columns end, a panel's or, of more than four
 * tiles, half a panel's. */
static struct stream next_span(const float *w, size_t columns, size_t begin, size_t end, int t,
                               int tiles)
{
    size_t half = t & 4 ? (end - begin) / 2 : 0;
    size_t column = (size_t)(t & 3) * columns + (end < columns ? end : 4 * columns) + half;

    return (struct stream){(const char *)(w + column * PANEL), tiles > 4 ? 32 : 64};
}

/* All rows with P panels: the columns in spans, so that a span of the panels stays in the first cache
 * while the rows pass. */
static void panel_group(int P, const float *w, size_t columns, const float *const *x, int rows,
                        float *y, size_t stride)
{
    int most = P == 4 ? 6 : 12, tiles = (rows + most - 1) / most;
    size_t span = tiles > 1 ? SPAN / (size_t)P : columns;

    if (P == 4 && tiles == 1) {
        panels_alone_4(rows, w, columns, x, y, stride);
        return;
    }
    for (size_t begin = 0; begin < columns; begin += span) {
        size_t end = columns - begin < span ? columns : begin + span;

        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - r;
            float *to = y + (size_t)r * stride;

            if (P == 4)
                panels_shared_4(height, w, columns, begin, end, x + r,
                                next_span(w, columns, begin, end, t, tiles), to, stride);
            else if (P == 2)
                panel_tiles_2(height, w, columns, begin, end, x + r, t == 0, to, stride);
            else
                panel_tiles_1(height, w, columns, begin, end, x + r, t == 0, to, stride);
        }
    }
}

/* Panels four, two or one at a time, with as many rows as there are registers for. */
static void panels_f32_avx512(const void *w, int columns, int panels, const float *const *x,
                              int rows, float *y, size_t stride)
{
    for (int p = 0, P; p < panels; p += P) {
        P = panels - p >= 4 ? 4 : panels - p >= 2 ? 2 : 1;
        panel_group(P, (const float *)w + (size_t)p * (size_t)columns * PANEL, (size_t)columns, x,
                    rows, y + p * PANEL, stride);
    }
}

/* ---- panels of codes -------------------------------------------------------------------- */

INLINE __m512i four_codes(const int8_t *codes)
{
    int32_t four;

    memcpy(&four, codes, 4);
    return _mm512_set1_epi32(four);
}

/* sums[r] are those of a panel's 16 rows so far. The weights are the unsigned factor, so each dot
 * begins with what their offset would add. */
INLINE void code_tile(enum weight_format format, int R, const char *tile, int fetch,
                      const struct activation_tile *const *x, __m512 *sums)
{
    const char *codes = format == WEIGHT_INT8 ? tile : tile + 4 * PANEL;
    const __m512i low = _mm512_set1_epi8(15);
    __m512i dots[6][2];

    UNROLL
    for (int r = 0; r < R; r++) {
        dots[r][0] = _mm512_set1_epi32(-CODE_OFFSET(format) * x[r]->sums[0]);
        dots[r][1] = _mm512_set1_epi32(-CODE_OFFSET(format) * x[r]->sums[1]);
    }
    if (fetch && format != WEIGHT_INT8) _mm_prefetch(tile + AHEAD, _MM_HINT_T0);
    UNROLL
    for (int c = 0; c < GROUP; c += 4) {
        const char *at = codes + c * PANEL;
        __m512i first = _mm512_loadu_si512(at), second;

        if (fetch) _mm_prefetch(at + AHEAD, _MM_HINT_T0);
        if (format == WEIGHT_Q4) {
            second = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
            first = _mm512_and_si512(first, low);
        } else {
            second = _mm512_loadu_si512(at + GROUP * PANEL);
            if (fetch) _mm_prefetch(at + GROUP * PANEL + AHEAD, _MM_HINT_T0);
        }
        UNROLL
        for (int r = 0; r < R; r++) {
            dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], first, four_codes(x[r]->codes + c));
            dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], second,
                                             four_codes(x[r]->codes + GROUP + c));
        }
    }
    UNROLL
    for (int group = 0; group < 2; group++) {
        __m512 scale = _mm512_setzero_ps();

        if (format != WEIGHT_INT8)
            scale = _mm512_cvtph_ps(
                _mm256_loadu_si256((const __m256i *)(const void *)(tile + group * 2 * PANEL)));
        UNROLL
        for (int r = 0; r < R; r++) {
            __m512 s = _mm512_set1_ps(x[r]->scales[group]);

            if (format != WEIGHT_INT8) s = _mm512_mul_ps(scale, s);
            sums[r] = _mm512_add_ps(sums[r], _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][group]), s));
        }
    }
}

/* R rows of activations and one panel. */
INLINE void code_panel(enum weight_format format, int R, const char *panel, int columns,
                       const float *const *x, int fetch, float *y, size_t stride)
{
    const char *tile = format == WEIGHT_INT8 ? panel + PANEL * sizeof(float) : panel;
    const struct activation_tile *at[6];
    __m512 sums[6];

    UNROLL
    for (int r = 0; r < R; r++) {
        at[r] = (const struct activation_tile *)(const void *)x[r];
        sums[r] = _mm512_setzero_ps();
    }
    for (int k = 0; k < columns; k += TILE, tile += tile_bytes(format)) {
        code_tile(format, R, tile, fetch, at, sums);
        UNROLL
        for (int r = 0; r < R; r++) at[r]++;
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        if (format == WEIGHT_INT8) sums[r] = _mm512_mul_ps(sums[r], _mm512_loadu_ps(panel));
        _mm512_storeu_ps(y + (size_t)r * stride, sums[r]);
    }
}

#define PAIR_COLUMNS 2048 /* panels of fewer are too short */

/* One row of activations and two panels, which are read side by side, as two streams: up to 1.16
 * times as fast as one. */
INLINE void code_pair(enum weight_format format, const char *w, int columns, const float *x,
                      float *y)
{
    size_t apart = panel_bytes(format, columns);
    const char *tile = format == WEIGHT_INT8 ? w + PANEL * sizeof(float) : w;
    const struct activation_tile *at = (const struct activation_tile *)(const void *)x;
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};

    for (int k = 0; k < columns; k += TILE, tile += tile_bytes(format), at++) {
        code_tile(format, 1, tile, 1, &at, &sums[0]);
        code_tile(format, 1, tile + apart, 1, &at, &sums[1]);
    }
    UNROLL
    for (int p = 0; p < 2; p++) {
        if (format == WEIGHT_INT8)
            sums[p] = _mm512_mul_ps(sums[p], _mm512_loadu_ps(w + (size_t)p * apart));
        _mm512_storeu_ps(y + p * PANEL, sums[p]);
    }
}

INLINE void panels_codes(enum weight_format format, const char *w, int columns, int panels,
                         const float *const *x, int rows, float *y, size_t stride)
{
    int tiles = (rows + 5) / 6, p = 0;

    for (; rows == 1 && columns >= PAIR_COLUMNS && p + 2 <= panels; p += 2) {
        code_pair(format, w, columns, x[0], y);
        w += 2 * panel_bytes(format, columns);
        y += 2 * PANEL;
    }
    for (; p < panels; p++, w += panel_bytes(format, columns), y += PANEL) {
        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t), fetch = t == 0;
            float *to = y + (size_t)r * stride;

            switch (tile_start(rows, tiles, t + 1) - r) {
            case 1:
                code_panel(format, 1, w, columns, x + r, fetch, to, stride);
                break;
            case 2:
                code_panel(format, 2, w, columns, x + r, fetch, to, stride);
                break;
            case 3:
                code_panel(format, 3, w, columns, x + r, fetch, to, stride);
                break;
            case 4:
                code_panel(format, 4, w, columns, x + r, fetch, to, stride);
                break;
            case 5:
                code_panel(format, 5, w, columns, x + r, fetch, to, stride);
                break;
            case 6:
                code_panel(format, 6, w, columns, x + r, fetch, to, stride);
                break;
            }
        }
    }
}

static void panels_int8_avx512(const void *w, int columns, int panels, const float *const *x,
                               int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_INT8, w, columns, panels, x, rows, y, stride);
}

static void panels_q8_avx512(const void *w, int columns, int panels, const float *const *x,
                             int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_Q8, w, columns, panels, x, rows, y, stride);
}

static void panels_q4_avx512(const void *w, int columns, int panels, const float *const *x,
                             int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_Q4, w, columns, panels, x, rows, y, stride);
}

/* ---- element by element ----------------------------------------------------------------- */

/* As in kernels_avx2.c, bit for bit. */
INLINE __m512 exp16(__m512 x)
{
    __m512 n, r, q;

    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x); /* this order keeps NaN */
    x = _mm512_min_ps(_mm512_set1_ps(88.3f), x);
    n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x); /* ln 2 in two pieces */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    q = _mm512_set1_ps(1.39504788e-3f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(8.36888235e-3f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(4.16662060e-2f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.66665196e-1f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.5f));
    q = _mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r);
    q = _mm512_add_ps(q, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(q),
                                                _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}

static void elu_avx512(const float *x, size_t n, float *y)
{
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 some = n - i < 16 ? lanes((int)(n - i)) : (__mmask16)0xffff;
        __m512 v = _mm512_maskz_loadu_ps(some, x + i);
        __m512 below = _mm512_sub_ps(exp16(v), _mm512_set1_ps(1.0f));
        __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);

        _mm512_mask_storeu_ps(y + i, some, _mm512_mask_blend_ps(above, below, v));
    }
}

INLINE void finish_row(const float *u, const float *bias, const float *residual, size_t n, float *y)
{
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 some = n - i < 16 ? lanes((int)(n - i)) : (__mmask16)0xffff;
        __m512 v = _mm512_maskz_loadu_ps(some, u + i);

        if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(some, bias + i));
        if (residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(some, residual + i));
        _mm512_mask_storeu_ps(y + i, some, v);
    }
}

static void finish_avx512(const float *u, size_t u_stride, const float *bias, const float *residual,
                          int rows, size_t n, float *y, size_t y_stride)
{
    for (; rows > 0; rows--, u += u_stride, y += y_stride) {
        finish_row(u, bias, residual, n, y);
        if (residual) residual += y_stride;
    }
}

/* ---- attention -------------------------------------------------------------------------- */

/* y += the sum of J rows; as in kernels_avx2.c, bit for bit. */
INLINE void mix_rows(enum weight_format format, int J, const float *p, const char *values,
                     int width, float *y)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)width * bytes;
    __m512 weights[8];

    UNROLL
    for (int j = 0; j < J; j++) weights[j] = _mm512_set1_ps(p[j]);
    for (int d = 0; d < width; d += 16) {
        __mmask16 some = lanes(width - d);
        __m512 sum = _mm512_maskz_loadu_ps(some, y + d);

        UNROLL
        for (int j = 0; j < J; j++) {
            const char *at = values + (size_t)j * row_bytes + (size_t)d * bytes;
            __m512 value;

            if (d % (64 / (int)bytes) == 0) _mm_prefetch(at + AHEAD, _MM_HINT_T0);
            if (format == WEIGHT_F32)
                value = _mm512_maskz_loadu_ps(some, at);
            else if (format == WEIGHT_INT8)
                value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, at)));
            else
                value = _mm512_castsi512_ps(_mm512_slli_epi32(
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, at)), 16));
            sum = _mm512_fmadd_ps(weights[j], value, sum);
        }
        _mm512_mask_storeu_ps(y + d, some, sum);
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

static void mix_f32_avx512(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_F32, p, values, n, width, y);
}

static void mix_bf16_avx512(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_BF16, p, values, n, width, y);
}

static void mix_int8_avx512(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_INT8, p, values, n, width, y);
}

#define KERNELS                                                                                    \
    .arrange = {arrange_plain,      arrange_plain,      arrange_bf16_avx512, arrange_fp8,          \
                arrange_codes_avx2, arrange_codes_avx2, arrange_codes_avx2},                       \
    .dot = {dot_f32_avx512, dot_f16_avx512, dot_bf16_avx512, dot_fp8_avx512, dot_int8_avx512},     \
    .panels = {panels_f32_avx512, NULL, NULL, NULL, panels_int8_avx512, panels_q8_avx512,          \
               panels_q4_avx512},                                                                  \
    .widen = {widen_f32, widen_f16_avx2, widen_bf16_avx2, widen_fp8_avx2, widen_int8_avx2},        \
    .quantise = {NULL, NULL, NULL, quantise_fp8, quantise_int8, quantise_q8, quantise_q4},         \
    .magnitude = largest_magnitude, .norm_layer = norm_layer_avx2, .norm_rms = norm_rms_avx2,      \
    .elu = elu_avx512, .gelu = gelu_avx2, .gate = gate_avx2, .add = add_avx2,                      \
    .add_scaled = add_scaled_avx2, .finish = finish_avx512, .softmax = softmax_avx2,               \
    .mix = {mix_f32_avx512, NULL, mix_bf16_avx512, NULL, mix_int8_avx512}

const struct cpu_kernels kernels_avx512 = {.name = "avx512", KERNELS};

#if defined(MOSHI_CPU_AMX)
/* These, and kernels_amx.c. */
const struct cpu_kernels kernels_amx = {
    .name = "amx",
    KERNELS,
    .gather = {[WEIGHT_BF16] = gather_bf16_amx},
    .tiles = {[WEIGHT_BF16] = tiles_bf16_amx},
};
#endif

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
