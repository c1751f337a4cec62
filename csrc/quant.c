/* quant.c: conversions between float formats, by the value: round to nearest, ties to even; and how
 * codes and scales lie in a panel. */
#include "quant.h"

#include <math.h>
#include <string.h>

const char *weight_format_name(enum weight_format format)
{
    static const char *const names[WEIGHT_FORMATS] = {"f32",  "f16", "bf16", "fp8",
                                                      "int8", "q8",  "q4"};

    return names[format];
}

/* Half precision: 1 sign, 5 exponent (bias 15), 10 fraction bits. */
float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ffu;
    union {
        uint32_t u;
        float f;
    } v;

    if (exponent == 0) {
        v.f = (float)fraction * 0x1p-24f; /* exact; covers zero and subnormals */
        v.u |= sign;
    } else if (exponent == 31) {
        v.u = sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0);
    } else {
        v.u = sign | (exponent + 112) << 23 | fraction << 13;
    }
    return v.f;
}

uint16_t f32_to_f16(float f)
{
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    uint32_t sign = v.u >> 16 & 0x8000u, magnitude = v.u & 0x7fffffffu, half, rest, shift;

    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and above */
    if (magnitude < 0x33000000u) return (uint16_t)sign; /* below half the least subnormal */
    if (magnitude >= 0x38800000u) { /* normal: rebias; a carry may run into the exponent */
        half = (magnitude - 0x38000000u) >> 13;
        rest = magnitude & 0x1fffu;
        shift = 13;
    } else {
        shift = 126 - (magnitude >> 23); /* 14..24 */
        magnitude = (magnitude & 0x7fffffu) | 0x800000u;
        half = magnitude >> shift;
        rest = magnitude & ((1u << shift) - 1);
    }
    if (rest > 1u << (shift - 1) || (rest == 1u << (shift - 1) && (half & 1))) half++;
    return (uint16_t)(sign | half);
}

float fp8_to_f32(uint8_t code)
{
    union {
        uint32_t u;
        float f;
    } v = {((uint32_t)(code & 0x7f) << 20) + (120u << 23)};

    if ((code & 0x78) == 0) v.f = (float)(code & 7) * 0x1p-9f;
    if ((code & 0x7f) == 0x7f) v.u = 0x7fc00000u;
    v.u |= (uint32_t)(code & 0x80) << 24;
    return v.f;
}

static float read_element(enum weight_format format, const void *source, size_t i)
{
    float f;
    uint16_t h;

    if (format == WEIGHT_F32) {
        memcpy(&f, (const char *)source + i * 4, 4);
        return f;
    }
    if (format == WEIGHT_FP8) return fp8_to_f32(((const uint8_t *)source)[i]);
    memcpy(&h, (const char *)source + i * 2, 2);
    return format == WEIGHT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

void weight_convert(enum weight_format from, const void *source, enum weight_format to,
                    void *target, size_t elements)
{
    if (from == to) {
        memcpy(target, source, elements * weight_bytes(from));
        return;
    }
    for (size_t i = 0; i < elements; i++) {
        float f = read_element(from, source, i);
        uint16_t h;

        if (to == WEIGHT_F32) {
            memcpy((char *)target + i * 4, &f, 4);
        } else {
            h = to == WEIGHT_F16 ? f32_to_f16(f) : f32_to_bf16(f);
            memcpy((char *)target + i * 2, &h, 2);
        }
    }
}

/* ---- block formats ---------------------------------------------------------------------- */

float int8_row(const float *values, int cols, int8_t *codes)
{
    float most = 0, scale;

    for (int k = 0; k < cols; k++) most = fmaxf(most, fabsf(values[k]));
    scale = most / 127;
    for (int k = 0; k < cols; k++) {
        float code = scale > 0 ? rintf(values[k] / scale) : 0;

        /* A scale below the normal range is coarse, and a code may come out larger. */
        codes[k] = (int8_t)(code > 127 ? 127 : code >= -127 ? code : -127);
    }
    return scale;
}

static size_t code_at(enum weight_format format, int row, int column)
{
    size_t in_tile = (size_t)column % TILE, chunk = in_tile / 4;

    if (format == WEIGHT_Q4) chunk %= GROUP / 4;
    return (format == WEIGHT_INT8 ? 0 : 4 * PANEL) + (chunk * PANEL + (size_t)row) * 4 +
           in_tile % 4;
}

static size_t tile_at(enum weight_format format, int column)
{
    return (format == WEIGHT_INT8 ? PANEL * sizeof(float) : 0) +
           (size_t)(column / TILE) * tile_bytes(format);
}

int panel_code(enum weight_format format, const void *panel, int row, int column)
{
    const uint8_t *tile = (const uint8_t *)panel + tile_at(format, column);
    int code = tile[code_at(format, row, column)];

    if (format == WEIGHT_Q4) code = column % TILE < GROUP ? code & 15 : code >> 4;
    return code - CODE_OFFSET(format);
}

float panel_scale(enum weight_format format, const void *panel, int row, int column)
{
    const char *tile = (const char *)panel + tile_at(format, column);

    if (format == WEIGHT_INT8) return ((const float *)panel)[row];
    return f16_to_f32(((const uint16_t *)(const void *)tile)[column % TILE / GROUP * PANEL + row]);
}
