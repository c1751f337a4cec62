/* kernels_neon.c: the kernels for ARM with 64 bits. Three tables: `neon` for all of them,
 * `neon_dot` where there are dot products of bytes (2018 and later), `neon_i8mm` where there are
 * products of 2 x 8 with 8 x 2 bytes, too (2021 and later). They differ in the panels of codes alone
 * (kernels_neon.h).
 *
 * Sums. `dot` goes through a row of weights in blocks of 8, first vector, then second, into one
 * accumulator, which is folded at the end of the row. `panels` has one lane for each output and
 * goes through the columns in order. Tiles of several rows and outputs share loads, but each sum is
 * made in that order in any tile: the bits don't depend on the shape.
 *
 * Nothing is fetched in advance: no such machine has been measured yet. */
#include <math.h>

#include "kernels.h"

#if defined(MOSHI_CPU_ARM)

#define MOST_ROWS 2
#define STORED_CODES 0

#include "kernels_neon.h"
#include "quantise.h"

#define BLOCK 8 /* weights */

/* n floats and zeros; n may be below 0 or above 4. */
INLINE float32x4_t load_some(const float *x, int n)
{
    float some[4] = {0};

    if (n >= 4) return vld1q_f32(x);
    if (n > 0) memcpy(some, x, (size_t)n * sizeof *x);
    return vld1q_f32(some);
}

/* The first n < 4 of them. */
INLINE void store_some(float *y, float32x4_t v, int n)
{
    float some[4];

    vst1q_f32(some, v);
    memcpy(y, some, (size_t)n * sizeof *y);
}

/* 0 + 1 and 2 + 3, then these; of four at once. */
INLINE float32x4_t fold4(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d)
{
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

INLINE float fold(float32x4_t v)
{
    return vgetq_lane_f32(fold4(v, v, v, v), 0);
}

/* ---- formats ---------------------------------------------------------------------------- */

/* Eight of e4m3 as f16, 2^8 times too small, as exponents count from 15 there instead of 7. */
INLINE uint16x8_t fp8_halves(uint8x8_t codes)
{
    int16x8_t wide = vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(codes)), 7);

    return vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xbfff)); /* bit 14: a second sign */
}

/* The first or the second vector of a block. bf16 is interleaved with zeros, because many processors
 * have more units for that than for shifts. */
INLINE float32x4_t load_half(enum weight_format format, const char *w, int second)
{
    uint16x8_t both, zeros = vdupq_n_u16(0);

    if (format == WEIGHT_F32) return load_four(WEIGHT_F32, w + 16 * second);
    if (format == WEIGHT_INT8) {
        int16x8_t wide = vmovl_s8(vld1_s8((const int8_t *)(const void *)w));

        return vcvtq_f32_s32(second ? vmovl_high_s16(wide) : vmovl_s16(vget_low_s16(wide)));
    }
    if (format == WEIGHT_FP8)
        both = fp8_halves(vld1_u8((const uint8_t *)(const void *)w));
    else
        both = vld1q_u16((const uint16_t *)(const void *)w);
    if (format == WEIGHT_F16 || format == WEIGHT_FP8)
        return second ? vcvt_high_f32_f16(vreinterpretq_f16_u16(both))
                      : vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(both)));
    both = second ? vzip2q_u16(zeros, both) : vzip1q_u16(zeros, both);
    return vreinterpretq_f32_u16(both);
}

INLINE void widen(enum weight_format format, const void *w, size_t n, float *y)
{
    const char *from = w;
    size_t i = 0;

    for (; i + 4 <= n; i += 4, from += 8) vst1q_f32(y + i, load_four(format, from));
    if (i < n) {
        uint16_t some[4] = {0};

        memcpy(some, from, (n - i) * sizeof *some);
        store_some(y + i, load_four(format, (const char *)some), (int)(n - i));
    }
}

static void widen_f16_neon(const void *w, size_t n, float *y)
{
    widen(WEIGHT_F16, w, n, y);
}

static void widen_bf16_neon(const void *w, size_t n, float *y)
{
    widen(WEIGHT_BF16, w, n, y);
}

static void widen_fp8_neon(const void *w, size_t n, float *y)
{
    const uint8_t *codes = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        for (int half = 0; half < 2; half++)
            vst1q_f32(y + i + 4 * half,
                      vmulq_n_f32(load_half(WEIGHT_FP8, (const char *)codes + i, half), 0x1p8f));
    for (; i < n; i++) y[i] = fp8_to_f32(codes[i]);
}

static void widen_int8_neon(const void *w, size_t n, float *y)
{
    const int8_t *codes = w;
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        int16x8_t wide = vmovl_s8(vld1_s8(codes + i));

        vst1q_f32(y + i, vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
        vst1q_f32(y + i + 4, vcvtq_f32_s32(vmovl_high_s16(wide)));
    }
    for (; i < n; i++) y[i] = codes[i];
}

/* ---- rows of weights times rows of activations ------------------------------------------ */

/* One step of a tile: a block of R rows of activations and O rows of weights. */
INLINE void dot_block(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                      const float *const *x, int k, float32x4_t (*s)[8])
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        float32x4_t a[4];

        UNROLL
        for (int r = 0; r < R; r++) a[r] = vld1q_f32(x[r] + k + 4 * half);
        UNROLL
        for (int o = 0; o < O; o++) {
            float32x4_t weights = load_half(format, w + (size_t)o * row_bytes, half);

            UNROLL
            for (int r = 0; r < R; r++) s[r][o] = vfmaq_f32(s[r][o], weights, a[r]);
        }
    }
}

/* The last `left` < BLOCK columns, k and on, followed by zeros: nothing is read past a row's end. */
INLINE void dot_tail(enum weight_format format, int R, int O, const char *w, size_t row_bytes,
                     const float *const *x, int k, int left, float32x4_t (*s)[8])
{
    size_t bytes = weight_bytes(format);
    _Alignas(16) char weights[8][BLOCK * 4] = {{0}};
    float activations[4][BLOCK] = {{0}};
    const float *rows[4];

    for (int o = 0; o < O; o++)
        memcpy(weights[o], w + (size_t)o * row_bytes + (size_t)k * bytes, (size_t)left * bytes);
    for (int r = 0; r < R; r++)
        rows[r] = memcpy(activations[r], x[r] + k, (size_t)left * sizeof *x[r]);
    dot_block(format, R, O, weights[0], sizeof *weights, rows, 0, s);
}

/* R rows of activations and O rows of weights: 8, 4 or 1. */
INLINE void dot_tile(enum weight_format format, int R, int O, const char *w, int columns,
                     const float *const *x, float *y, size_t stride)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)columns * bytes;
    float32x4_t s[4][8];
    int k = 0;

    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int o = 0; o < O; o++) s[r][o] = vdupq_n_f32(0);
    }
    for (; k + BLOCK <= columns; k += BLOCK)
        dot_block(format, R, O, w + (size_t)k * bytes, row_bytes, x, k, s);
    if (k < columns) dot_tail(format, R, O, w, row_bytes, x, k, columns - k, s);
    UNROLL
    for (int r = 0; r < R; r++) {
        float *to = y + (size_t)r * stride;

        if (O == 1) *to = fold(s[r][0]);
        UNROLL
        for (int o = 0; o + 4 <= O; o += 4)
            vst1q_f32(to + o, fold4(s[r][o], s[r][o + 1], s[r][o + 2], s[r][o + 3]));
    }
}

INLINE void dot(enum weight_format format, const char *w, int columns, int outputs,
                const float *const *x, int rows, float *y, size_t stride)
{
    size_t row_bytes = (size_t)columns * weight_bytes(format);
    int tiles = (rows + 3) / 4, o = 0;

    for (; rows == 1 && o + 8 <= outputs; o += 8)
        dot_tile(format, 1, 8, w + (size_t)o * row_bytes, columns, x, y + o, stride);
    for (; o + 4 <= outputs; o += 4) {
        const char *from = w + (size_t)o * row_bytes;

        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - r;
            float *to = y + (size_t)r * stride + o;

            if (height == 4)
                dot_tile(format, 4, 4, from, columns, x + r, to, stride);
            else if (height == 3)
                dot_tile(format, 3, 4, from, columns, x + r, to, stride);
            else if (height == 2)
                dot_tile(format, 2, 4, from, columns, x + r, to, stride);
            else
                dot_tile(format, 1, 4, from, columns, x + r, to, stride);
        }
    }
    for (; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            dot_tile(format, 1, 1, w + (size_t)o * row_bytes, columns, x + r,
                     y + (size_t)r * stride + o, stride);
}

static void dot_f32_neon(const void *w, int columns, int outputs, const float *const *x, int rows,
                         float *y, size_t stride)
{
    dot(WEIGHT_F32, w, columns, outputs, x, rows, y, stride);
}

static void dot_f16_neon(const void *w, int columns, int outputs, const float *const *x, int rows,
                         float *y, size_t stride)
{
    dot(WEIGHT_F16, w, columns, outputs, x, rows, y, stride);
}

static void dot_bf16_neon(const void *w, int columns, int outputs, const float *const *x, int rows,
                          float *y, size_t stride)
{
    dot(WEIGHT_BF16, w, columns, outputs, x, rows, y, stride);
}

static void dot_fp8_neon(const void *w, int columns, int outputs, const float *const *x, int rows,
                         float *y, size_t stride)
{
    dot(WEIGHT_FP8, w, columns, outputs, x, rows, y, stride);
}

static void dot_int8_neon(const void *w, int columns, int outputs, const float *const *x, int rows,
                          float *y, size_t stride)
{
    dot(WEIGHT_INT8, w, columns, outputs, x, rows, y, stride);
}

/* ---- panels of floats ------------------------------------------------------------------- */

/* R rows and P panels, which lie `columns` * PANEL floats apart. */
INLINE void panel_tile(int R, int P, const float *w, int columns, const float *const *x, float *y,
                       size_t stride)
{
    size_t panel = (size_t)columns * PANEL;
    float32x4_t sums[6][16];

    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int v = 0; v < 4 * P; v++) sums[r][v] = vdupq_n_f32(0);
    }
    for (int k = 0; k < columns; k++, w += PANEL) {
        UNROLL
        for (int v = 0; v < 4 * P; v++) {
            float32x4_t weights = vld1q_f32(w + (size_t)(v / 4) * panel + 4 * (v % 4));

            UNROLL
            for (int r = 0; r < R; r++) sums[r][v] = vfmaq_n_f32(sums[r][v], weights, x[r][k]);
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int v = 0; v < 4 * P; v++) vst1q_f32(y + (size_t)r * stride + 4 * v, sums[r][v]);
    }
}

#define PANEL_CASE(R)                                                                              \
    case R:                                                                                        \
        panel_tile(R, 1, at, columns, x + r, to, stride);                                          \
        break;

/* Few rows alone make too few sums to hide the latency of an addition, so they take several panels
 * at once. */
static void panels_f32_neon(const void *weights, int columns, int panels, const float *const *x,
                            int rows, float *y, size_t stride)
{
    const float *w = weights;
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
                PANEL_CASE(1)
                PANEL_CASE(2)
                PANEL_CASE(3)
                PANEL_CASE(4)
                PANEL_CASE(5)
                PANEL_CASE(6)
            }
        }
    }
}

/* ---- panels of codes -------------------------------------------------------------------- */

/* One group of activations; the magnitude is compared by its bits, so that NaN is the largest. */
INLINE void arrange_group(const float *x, int8_t *codes, float *scale, int32_t *sum)
{
    int32x4_t magnitudes = vdupq_n_s32(0x7fffffff), most = vdupq_n_s32(0);
    float largest, inverse;

    UNROLL
    for (int i = 0; i < GROUP; i += 4)
        most = vmaxq_s32(most, vandq_s32(vreinterpretq_s32_f32(vld1q_f32(x + i)), magnitudes));
    largest = vgetq_lane_f32(vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32(most))), 0);
    inverse = largest > LEAST_MAGNITUDE ? 127.0f / largest : 0;
    *scale = largest * (1.0f / 127.0f);
    *sum = 0;
    UNROLL
    for (int i = 0; i < GROUP; i += 8) {
        int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
        int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
        int8x8_t eight = vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high)));

        vst1_s8(codes + i, eight);
        *sum += vaddlv_s8(eight);
    }
}

static void arrange_codes_neon(const float *x, int columns, float *y)
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

INLINE int8x16_t four_codes(const int8_t *codes)
{
    int32_t four;

    memcpy(&four, codes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* Products of two columns are added in 16 bits, at most 2 * 128 * 127; pairs of these in 32. */
INLINE void add_group(enum weight_format format, int R, const uint8_t *at, int group,
                      const int8_t *const *x, int32x4_t (*sums)[4])
{
    int32x4_t pairs[MOST_ROWS][8];

    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int v = 0; v < 8; v++) pairs[r][v] = vdupq_n_s32(0);
    }
    for (int c = 0; c < GROUP; c += 8, at += 8 * PANEL) {
        UNROLL
        for (int v = 0; v < 4; v++) {
            int8x16_t w = vreinterpretq_s8_u8(load_codes(format, at + 16 * v, group));
            int8x16_t next = vreinterpretq_s8_u8(load_codes(format, at + 4 * PANEL + 16 * v,
                                                            group));

            UNROLL
            for (int r = 0; r < R; r++) {
                int8x16_t a = four_codes(x[r] + c), b = four_codes(x[r] + c + 4);
                int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a));
                int16x8_t high = vmull_high_s8(w, a);

                low = vmlal_s8(low, vget_low_s8(next), vget_low_s8(b));
                high = vmlal_high_s8(high, next, b);
                pairs[r][2 * v] = vpadalq_s16(pairs[r][2 * v], low);
                pairs[r][2 * v + 1] = vpadalq_s16(pairs[r][2 * v + 1], high);
            }
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int v = 0; v < 4; v++)
            sums[r][v] = vaddq_s32(sums[r][v], vpaddq_s32(pairs[r][2 * v], pairs[r][2 * v + 1]));
    }
}

PANELS_CODES(panels_int8_neon, WEIGHT_INT8)
PANELS_CODES(panels_q8_neon, WEIGHT_Q8)
PANELS_CODES(panels_q4_neon, WEIGHT_Q4)

/* ---- functions -------------------------------------------------------------------------- */

/* The polynomial of `count` terms, the highest power's first. */
INLINE float32x4_t polynomial4(const float *terms, int count, float32x4_t x)
{
    float32x4_t y = vdupq_n_f32(terms[0]);

    UNROLL
    for (int i = 1; i < count; i++) y = vfmaq_f32(vdupq_n_f32(terms[i]), y, x);
    return y;
}

/* Minimum and maximum keep NaN. */
INLINE float32x4_t exp4(float32x4_t x)
{
    float32x4_t n, r, q;

    x = vmaxq_f32(vdupq_n_f32(EXP_LEAST), x);
    x = vminq_f32(vdupq_n_f32(EXP_MOST), x);
    n = vrndnq_f32(vmulq_n_f32(x, PER_LN2));
    r = vfmsq_f32(x, n, vdupq_n_f32(LN2_HIGH));
    r = vfmsq_f32(r, n, vdupq_n_f32(LN2_LOW));
    q = vfmaq_f32(r, vmulq_f32(r, r), polynomial4(exp_terms, 5, r));
    q = vaddq_f32(q, vdupq_n_f32(1.0f));
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(q),
                                           vshlq_n_s32(vcvtq_s32_f32(n), 23)));
}

INLINE float32x4_t erf4(float32x4_t x)
{
    float32x4_t t = vminq_f32(vdupq_n_f32(4.0f), vabsq_f32(x)), one = vdupq_n_f32(1.0f);
    float32x4_t small = vmulq_f32(polynomial4(erf_small_terms, 7, vmulq_f32(x, x)), x);
    float32x4_t large = vsubq_f32(one, exp4(vnegq_f32(polynomial4(erf_large_terms, 7, t))));

    large = vbslq_f32(vdupq_n_u32(0x80000000u), x, large);
    return vbslq_f32(vcltq_f32(t, one), small, large);
}

INLINE float32x4_t elu4(float32x4_t x)
{
    float32x4_t below = vsubq_f32(exp4(x), vdupq_n_f32(1.0f));

    return vbslq_f32(vcgtq_f32(x, vdupq_n_f32(0)), x, below);
}

INLINE float32x4_t gelu4(float32x4_t x)
{
    float32x4_t erf = erf4(vmulq_n_f32(x, 0.70710678f));

    return vmulq_f32(vmulq_n_f32(x, 0.5f), vaddq_f32(vdupq_n_f32(1.0f), erf));
}

INLINE float32x4_t gate4(float32x4_t g, float32x4_t v)
{
    return vmulq_f32(vdivq_f32(g, vaddq_f32(vdupq_n_f32(1.0f), exp4(vnegq_f32(g)))), v);
}

static void elu_neon(const float *x, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, elu4(vld1q_f32(x + i)));
    if (i < n) store_some(y + i, elu4(load_some(x + i, (int)(n - i))), (int)(n - i));
}

static void gelu_neon(const float *x, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, gelu4(vld1q_f32(x + i)));
    if (i < n) store_some(y + i, gelu4(load_some(x + i, (int)(n - i))), (int)(n - i));
}

static void gate_neon(const float *g, const float *v, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, gate4(vld1q_f32(g + i), vld1q_f32(v + i)));
    if (i < n) {
        int left = (int)(n - i);

        store_some(y + i, gate4(load_some(g + i, left), load_some(v + i, left)), left);
    }
}

static void add_neon(const float *u, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vaddq_f32(vld1q_f32(y + i), vld1q_f32(u + i)));
    for (; i < n; i++) y[i] += u[i];
}

static void add_scaled_neon(const float *u, const float *scale, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4)
        vst1q_f32(y + i, vfmaq_f32(vld1q_f32(y + i), vld1q_f32(scale + i), vld1q_f32(u + i)));
    for (; i < n; i++) y[i] = fmaf(scale[i], u[i], y[i]);
}

INLINE void finish_row(const float *u, const float *bias, const float *residual, size_t n, float *y)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vld1q_f32(u + i);

        if (bias) v = vaddq_f32(v, vld1q_f32(bias + i));
        if (residual) v = vaddq_f32(v, vld1q_f32(residual + i));
        vst1q_f32(y + i, v);
    }
    for (; i < n; i++) y[i] = (u[i] + (bias ? bias[i] : 0)) + (residual ? residual[i] : 0);
}

static void finish_neon(const float *u, size_t u_stride, const float *bias, const float *residual,
                        int rows, size_t n, float *y, size_t y_stride)
{
    for (; rows > 0; rows--, u += u_stride, y += y_stride) {
        finish_row(u, bias, residual, n, y);
        if (residual) residual += y_stride;
    }
}

/* ---- reductions over one row ------------------------------------------------------------ */

/* Sum of (x - mean)^2, or of x. */
INLINE float sum_row(const float *x, int n, float mean, int squared)
{
    float32x4_t sums[4], shift = vdupq_n_f32(mean);

    UNROLL
    for (int j = 0; j < 4; j++) sums[j] = vdupq_n_f32(0);
    for (int i = 0; i < n; i += 16) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            int at = i + 4 * j;
            float32x4_t v;

            if (at >= n) break;
            v = load_some(x + at, n - at);
            if (squared) {
                v = vsubq_f32(v, shift);
                if (n - at < 4) { /* what is not there has no distance from the mean */
                    float some[4] = {0};

                    store_some(some, v, n - at);
                    v = vld1q_f32(some);
                }
                sums[j] = vfmaq_f32(sums[j], v, v);
            } else {
                sums[j] = vaddq_f32(sums[j], v);
            }
        }
    }
    return fold(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])));
}

static void norm_layer_neon(const float *x, int n, float eps, const float *weight,
                            const float *bias, float *y)
{
    float mean = sum_row(x, n, 0, 0) / (float)n;
    float scale = 1.0f / sqrtf(sum_row(x, n, mean, 1) / (float)n + eps);
    float32x4_t means = vdupq_n_f32(mean);
    int i = 0;

    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vmulq_n_f32(vsubq_f32(vld1q_f32(x + i), means), scale);

        vst1q_f32(y + i, vfmaq_f32(vld1q_f32(bias + i), v, vld1q_f32(weight + i)));
    }
    for (; i < n; i++) y[i] = fmaf((x[i] - mean) * scale, weight[i], bias[i]);
}

static void norm_rms_neon(const float *x, int n, float eps, const float *weight, float *y)
{
    float scale = 1.0f / sqrtf(eps + sum_row(x, n, 0, 1) / (float)n);
    int i = 0;

    for (; i + 4 <= n; i += 4)
        vst1q_f32(y + i, vmulq_f32(vld1q_f32(x + i), vmulq_n_f32(vld1q_f32(weight + i), scale)));
    for (; i < n; i++) y[i] = x[i] * (weight[i] * scale);
}

static void softmax_neon(float *x, int n, float scale)
{
    float32x4_t most = vdupq_n_f32(x[0]), sum = vdupq_n_f32(0);
    float inverse;
    int i = 0;

    for (; i + 4 <= n; i += 4) most = vmaxq_f32(most, vld1q_f32(x + i));
    for (; i < n; i++) most = vmaxq_f32(most, vdupq_n_f32(x[i]));
    most = vdupq_n_f32(vmaxvq_f32(most));
    for (i = 0; i + 4 <= n; i += 4) {
        float32x4_t v = exp4(vmulq_n_f32(vsubq_f32(vld1q_f32(x + i), most), scale));

        vst1q_f32(x + i, v);
        sum = vaddq_f32(sum, v);
    }
    if (i < n) {
        float32x4_t v = exp4(vmulq_n_f32(vsubq_f32(load_some(x + i, n - i), most), scale));

        store_some(x + i, v, n - i);
        sum = vaddq_f32(sum, load_some(x + i, n - i));
    }
    inverse = 1.0f / fold(sum);
    for (i = 0; i + 4 <= n; i += 4) vst1q_f32(x + i, vmulq_n_f32(vld1q_f32(x + i), inverse));
    for (; i < n; i++) x[i] *= inverse;
}

/* ---- attention and search --------------------------------------------------------------- */

/* y += the sum of J rows, in order, which are read as they lie. */
INLINE void mix_rows(enum weight_format format, int J, const float *p, const char *values,
                     int width, float *y)
{
    size_t bytes = weight_bytes(format), row_bytes = (size_t)width * bytes;

    for (int d = 0; d < width; d += 4, values += 4 * bytes) {
        int left = width - d;
        float32x4_t sum = load_some(y + d, left);

        UNROLL
        for (int j = 0; j < J; j++) {
            const char *from = values + (size_t)j * row_bytes;
            char some[16] = {0};

            if (left < 4) from = memcpy(some, from, (size_t)left * bytes);
            sum = vfmaq_n_f32(sum, load_four(format, from), p[j]);
        }
        if (left < 4)
            store_some(y + d, sum, left);
        else
            vst1q_f32(y + d, sum);
    }
}

INLINE void mix(enum weight_format format, const float *p, const char *values, int n, int width,
                float *y)
{
    size_t row_bytes = (size_t)width * weight_bytes(format);

    for (; n >= 8; n -= 8, p += 8, values += 8 * row_bytes)
        mix_rows(format, 8, p, values, width, y);
    for (; n > 0; n--, p++, values += row_bytes) mix_rows(format, 1, p, values, width, y);
}

static void mix_f32_neon(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_F32, p, values, n, width, y);
}

static void mix_bf16_neon(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_BF16, p, values, n, width, y);
}

static void mix_int8_neon(const float *p, const void *values, int n, int width, float *y)
{
    mix(WEIGHT_INT8, p, values, n, width, y);
}

#define TABLE(isa)                                                                                 \
    const struct cpu_kernels kernels_##isa = {                                                     \
        .name = #isa,                                                                              \
        .arrange = {arrange_plain, arrange_plain, arrange_plain, arrange_fp8, arrange_codes_neon,  \
                    arrange_codes_neon, arrange_codes_neon},                                       \
        .dot = {dot_f32_neon, dot_f16_neon, dot_bf16_neon, dot_fp8_neon, dot_int8_neon},           \
        .panels = {panels_f32_neon, NULL, NULL, NULL, panels_int8_##isa, panels_q8_##isa,          \
                   panels_q4_##isa},                                                               \
        .widen = {widen_f32, widen_f16_neon, widen_bf16_neon, widen_fp8_neon, widen_int8_neon},    \
        .quantise = {NULL, NULL, NULL, quantise_fp8, quantise_int8, quantise_q8, quantise_q4},     \
        .magnitude = largest_magnitude,                                                            \
        .norm_layer = norm_layer_neon,                                                             \
        .norm_rms = norm_rms_neon,                                                                 \
        .elu = elu_neon,                                                                           \
        .gelu = gelu_neon,                                                                         \
        .gate = gate_neon,                                                                         \
        .add = add_neon,                                                                           \
        .add_scaled = add_scaled_neon,                                                             \
        .finish = finish_neon,                                                                     \
        .softmax = softmax_neon,                                                                   \
        .mix = {mix_f32_neon, NULL, mix_bf16_neon, NULL, mix_int8_neon},                           \
    }
TABLE(neon);
TABLE(neon_dot);
TABLE(neon_i8mm);

#endif
