/* kernels_generic.c: the plain definition of the arithmetic. The comments of kernels.h say what
 * each kernel is for. Sums run over eight interleaved partial sums, which compilers turn into
 * vectors by themselves. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "quantise.h"
#include "shared.h"

#define LANES 8

static float sum_lanes(const float *s)
{
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static void widen_f16_generic(const void *w, size_t n, float *y)
{
    const uint16_t *h = w;

    for (size_t i = 0; i < n; i++) y[i] = f16_to_f32(h[i]);
}

static void widen_bf16_generic(const void *w, size_t n, float *y)
{
    const uint16_t *h = w;

    for (size_t i = 0; i < n; i++) y[i] = bf16_to_f32(h[i]);
}

static void widen_fp8_generic(const void *w, size_t n, float *y)
{
    const uint8_t *codes = w;

    for (size_t i = 0; i < n; i++) y[i] = fp8_to_f32(codes[i]);
}

static void widen_int8_generic(const void *w, size_t n, float *y)
{
    const int8_t *codes = w;

    for (size_t i = 0; i < n; i++) y[i] = codes[i];
}

static float dot_f32(const float *w, const float *x, int columns)
{
    float sums[LANES] = {0};
    int k = 0;

    for (; k + LANES <= columns; k += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += w[k + j] * x[k + j];
    for (int j = 0; k + j < columns; j++) sums[j] += w[k + j] * x[k + j];
    return sum_lanes(sums);
}

static void dot_f32_generic(const void *w, int columns, int outputs, const float *const *x,
                            int rows, float *y, size_t stride)
{
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            y[(size_t)r * stride + (size_t)o] =
                dot_f32((const float *)w + (size_t)o * (size_t)columns, x[r], columns);
}

#define CHUNK 512 /* weights widened at a time; a multiple of LANES */

static void dot_narrow(enum weight_format format, void (*widen)(const void *, size_t, float *),
                       const char *w, int columns, int outputs, const float *const *x, int rows,
                       float *y, size_t stride)
{
    size_t bytes = weight_bytes(format);
    float wide[CHUNK];

    for (int o = 0; o < outputs; o++, w += (size_t)columns * bytes) {
        for (int r = 0; r < rows; r++) {
            float sums[LANES] = {0};

            for (int k = 0; k < columns; k += CHUNK) {
                int n = columns - k < CHUNK ? columns - k : CHUNK;
                const float *v = x[r] + k;
                int i = 0;

                widen(w + (size_t)k * bytes, (size_t)n, wide);
                for (; i + LANES <= n; i += LANES)
                    for (int j = 0; j < LANES; j++) sums[j] += wide[i + j] * v[i + j];
                for (int j = 0; i + j < n; j++) sums[j] += wide[i + j] * v[i + j];
            }
            y[(size_t)r * stride + (size_t)o] = sum_lanes(sums);
        }
    }
}

static void dot_f16_generic(const void *w, int columns, int outputs, const float *const *x,
                            int rows, float *y, size_t stride)
{
    dot_narrow(WEIGHT_F16, widen_f16_generic, w, columns, outputs, x, rows, y, stride);
}

static void dot_bf16_generic(const void *w, int columns, int outputs, const float *const *x,
                             int rows, float *y, size_t stride)
{
    dot_narrow(WEIGHT_BF16, widen_bf16_generic, w, columns, outputs, x, rows, y, stride);
}

static void dot_fp8_generic(const void *w, int columns, int outputs, const float *const *x,
                            int rows, float *y, size_t stride)
{
    dot_narrow(WEIGHT_FP8, widen_fp8_generic, w, columns, outputs, x, rows, y, stride);
}

static void dot_int8_generic(const void *w, int columns, int outputs, const float *const *x,
                             int rows, float *y, size_t stride)
{
    dot_narrow(WEIGHT_INT8, widen_int8_generic, w, columns, outputs, x, rows, y, stride);
}

static void panels_f32_generic(const void *weights, int columns, int panels, const float *const *x,
                               int rows, float *y, size_t stride)
{
    const float *w = weights;

    for (int p = 0; p < panels; p++, w += (size_t)columns * PANEL) {
        for (int r = 0; r < rows; r++) {
            float sums[PANEL] = {0};

            for (int k = 0; k < columns; k++)
                for (int j = 0; j < PANEL; j++) sums[j] += x[r][k] * w[(size_t)k * PANEL + j];
            memcpy(y + (size_t)r * stride + (size_t)p * PANEL, sums, sizeof sums);
        }
    }
}

static void arrange_codes_generic(const float *x, int columns, float *y)
{
    struct activation_tile *tile = (struct activation_tile *)(void *)y;

    for (int k = 0; k < columns; k += TILE, tile++) {
        float wide[TILE] = {0}; /* the tile may lie where x does */
        int n = columns - k < TILE ? columns - k : TILE;

        memcpy(wide, x + k, (size_t)n * sizeof *x);
        for (int group = 0; group < 2; group++) {
            const float *from = wide + group * GROUP;
            float most = largest_magnitude(from, GROUP);
            float inverse = most > LEAST_MAGNITUDE ? 127.0f / most : 0;
            int32_t sum = 0;

            for (int i = 0; i < GROUP; i++) {
                int8_t code = (int8_t)lrintf(from[i] * inverse);

                tile->codes[group * GROUP + i] = code;
                sum += code;
            }
            tile->scales[group] = most * (1.0f / 127.0f);
            tile->sums[group] = sum;
        }
    }
}

/* Sums of products of codes over group 0 or 1 of a tile, for all rows of the panel. */
static void dot_codes(enum weight_format format, const uint8_t *codes, int group,
                      const struct activation_tile *x, int32_t *sums)
{
    int shift = format == WEIGHT_Q4 ? 4 * group : 0, mask = format == WEIGHT_Q4 ? 15 : 255;

    if (format != WEIGHT_Q4) codes += group * GROUP * PANEL;
    for (int o = 0; o < PANEL; o++) sums[o] = -CODE_OFFSET(format) * x->sums[group];
    for (int c = 0; c < GROUP; c += 4, codes += 4 * PANEL)
        for (int o = 0; o < PANEL; o++)
            for (int i = 0; i < 4; i++)
                sums[o] += (codes[4 * o + i] >> shift & mask) * x->codes[group * GROUP + c + i];
}

static void panels_codes(enum weight_format format, const void *w, int columns, int panels,
                         const float *const *x, int rows, float *y, size_t stride)
{
    size_t header = format == WEIGHT_INT8 ? PANEL * sizeof(float) : 0;
    size_t scale_bytes = format == WEIGHT_INT8 ? 0 : 2 * PANEL * sizeof(uint16_t);

    for (int p = 0; p < panels; p++) {
        const char *panel = (const char *)w + (size_t)p * panel_bytes(format, columns);

        for (int r = 0; r < rows; r++) {
            const struct activation_tile *tiles =
                (const struct activation_tile *)(const void *)x[r];
            float sums[PANEL] = {0};

            for (int t = 0; t * TILE < columns; t++) {
                const char *tile = panel + header + (size_t)t * tile_bytes(format);
                const uint16_t *scales = (const uint16_t *)(const void *)tile;

                for (int group = 0; group < 2; group++) {
                    int32_t dots[PANEL];

                    dot_codes(format, (const uint8_t *)tile + scale_bytes, group, &tiles[t], dots);
                    for (int o = 0; o < PANEL; o++) {
                        float scale = tiles[t].scales[group];

                        if (format != WEIGHT_INT8)
                            scale = f16_to_f32(scales[group * PANEL + o]) * scale;
                        sums[o] += (float)dots[o] * scale;
                    }
                }
            }
            if (format == WEIGHT_INT8)
                for (int o = 0; o < PANEL; o++) sums[o] *= ((const float *)(const void *)panel)[o];
            memcpy(y + (size_t)r * stride + (size_t)p * PANEL, sums, sizeof sums);
        }
    }
}

static void panels_int8_generic(const void *w, int columns, int panels, const float *const *x,
                                int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_INT8, w, columns, panels, x, rows, y, stride);
}

static void panels_q8_generic(const void *w, int columns, int panels, const float *const *x,
                              int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_Q8, w, columns, panels, x, rows, y, stride);
}

static void panels_q4_generic(const void *w, int columns, int panels, const float *const *x,
                              int rows, float *y, size_t stride)
{
    panels_codes(WEIGHT_Q4, w, columns, panels, x, rows, y, stride);
}

static void norm_layer_generic(const float *x, int n, float eps, const float *weight,
                               const float *bias, float *y)
{
    float sum = 0, square = 0, mean, scale;

    for (int i = 0; i < n; i++) sum += x[i];
    mean = sum / (float)n;
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    scale = 1.0f / sqrtf(square / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

static void norm_rms_generic(const float *x, int n, float eps, const float *weight, float *y)
{
    float square = 0, scale;

    for (int i = 0; i < n; i++) square += x[i] * x[i];
    scale = 1.0f / sqrtf(eps + square / (float)n);
    for (int i = 0; i < n; i++) y[i] = x[i] * (weight[i] * scale);
}

static void elu_generic(const float *x, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) y[i] = x[i] > 0 ? x[i] : expf(x[i]) - 1.0f;
}

static void gelu_generic(const float *x, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}

static void gate_generic(const float *g, const float *v, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) y[i] = g[i] / (1.0f + expf(-g[i])) * v[i];
}

static void add_generic(const float *u, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) y[i] += u[i];
}

static void add_scaled_generic(const float *u, const float *scale, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) y[i] += scale[i] * u[i];
}

static void finish_generic(const float *u, size_t u_stride, const float *bias,
                           const float *residual, int rows, size_t n, float *y, size_t y_stride)
{
    for (; rows > 0; rows--, u += u_stride, y += y_stride) {
        for (size_t i = 0; i < n; i++)
            y[i] = (u[i] + (bias ? bias[i] : 0)) + (residual ? residual[i] : 0);
        if (residual) residual += y_stride;
    }
}

static void softmax_generic(float *x, int n, float scale)
{
    float most = x[0], sum = 0;

    for (int i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int i = 0; i < n; i++) {
        x[i] = expf((x[i] - most) * scale);
        sum += x[i];
    }
    for (int i = 0; i < n; i++) x[i] *= 1.0f / sum;
}

static void mix_f32_generic(const float *p, const void *values, int n, int width, float *y)
{
    const float *v = values;

    for (int j = 0; j < n; j++, v += width)
        for (int d = 0; d < width; d++) y[d] += p[j] * v[d];
}

static void mix_bf16_generic(const float *p, const void *values, int n, int width, float *y)
{
    const uint16_t *v = values;

    for (int j = 0; j < n; j++, v += width)
        for (int d = 0; d < width; d++) y[d] += p[j] * bf16_to_f32(v[d]);
}

static void mix_int8_generic(const float *p, const void *values, int n, int width, float *y)
{
    const int8_t *v = values;

    for (int j = 0; j < n; j++, v += width)
        for (int d = 0; d < width; d++) y[d] += p[j] * v[d];
}

const struct cpu_kernels kernels_generic = {
    .name = "generic",
    .arrange = {arrange_plain, arrange_plain, arrange_plain, arrange_plain, arrange_codes_generic,
                arrange_codes_generic, arrange_codes_generic},
    .dot = {dot_f32_generic, dot_f16_generic, dot_bf16_generic, dot_fp8_generic, dot_int8_generic},
    .panels = {panels_f32_generic, NULL, NULL, NULL, panels_int8_generic, panels_q8_generic,
               panels_q4_generic},
    .widen = {widen_f32, widen_f16_generic, widen_bf16_generic, widen_fp8_generic,
              widen_int8_generic},
    .quantise = {NULL, NULL, NULL, quantise_fp8, quantise_int8, quantise_q8, quantise_q4},
    .magnitude = largest_magnitude,
    .norm_layer = norm_layer_generic,
    .norm_rms = norm_rms_generic,
    .elu = elu_generic,
    .gelu = gelu_generic,
    .gate = gate_generic,
    .add = add_generic,
    .add_scaled = add_scaled_generic,
    .finish = finish_generic,
    .softmax = softmax_generic,
    .mix = {mix_f32_generic, NULL, mix_bf16_generic, NULL, mix_int8_generic},
};
