/* quantise.h: how weights become tiles of the block formats of quant.h, and rows of fp8. Plain C that
 * compilers turn into vectors, included by the files of the instruction sets; all of them make the same
 * tiles. */
#ifndef MOSHI_CPU_QUANTISE_H
#define MOSHI_CPU_QUANTISE_H

#include <string.h>

#include "kernels.h"

/* The largest |x|, found by the bits: infinity is above all numbers, and NaN above that. */
static inline float largest_magnitude(const float *x, size_t n)
{
    union {
        int32_t i;
        float f;
    } most = {0};

    for (size_t k = 0; k < n; k++) {
        int32_t bits;

        memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        most.i = bits > most.i ? bits : most.i;
    }
    return most.f;
}

/* The nearest codes; 0 for a scale of 0. The sum has no bits for a fraction, so adding rounds. */
static inline void encode(const float *w, int n, float scale, int32_t least, int32_t most,
                          int32_t *codes)
{
    float inverse = scale != 0 ? 1 / scale : 0;

    for (int i = 0; i < n; i++) {
        float shifted = w[i] * inverse + 0x1.8p23f;
        uint32_t bits;
        int32_t code;

        memcpy(&bits, &shifted, sizeof bits);
        code = (int32_t)(bits - 0x4b400000u);
        code = code < least ? least : code;
        codes[i] = code > most ? most : code;
    }
}

/* Codes of a group, and its scale as f16. q4: the weight farthest from 0 becomes code -8, which has
 * no opposite. Fitting the scale to the codes afterwards took half as long again and gained 2 % of
 * the divergence. */
static inline uint16_t quantise_group(enum weight_format format, const float *w, int32_t *codes)
{
    float most = largest_magnitude(w, GROUP), divisor = 127;
    uint16_t scale;

    if (format == WEIGHT_Q4) {
        int positive = 0;

        for (int i = 0; i < GROUP; i++) positive |= w[i] == most;
        divisor = positive ? -8.0f : 8.0f;
    }
    scale = f32_to_f16(most / divisor);
    if (format == WEIGHT_Q4)
        encode(w, GROUP, f16_to_f32(scale), -8, 7, codes);
    else
        encode(w, GROUP, f16_to_f32(scale), -127, 127, codes);
    return scale;
}

static inline int is_finite_half(uint16_t h)
{
    return (h & 0x7c00) != 0x7c00;
}

static inline int quantise_tile(enum weight_format format, const float (*w)[TILE],
                                const float *scales, void *tile)
{
    char *to = (char *)tile + (format == WEIGHT_INT8 ? 0 : 4 * PANEL);
    int good = 1;

    for (int row = 0; row < PANEL; row++, to += 4) {
        int32_t codes[TILE];
        uint8_t bytes[TILE];

        if (format == WEIGHT_INT8) {
            float most = largest_magnitude(w[row], TILE);

            good &= most - most == 0;
            encode(w[row], TILE, scales[row], -127, 127, codes);
        }
        for (int group = 0; group < 2 && format != WEIGHT_INT8; group++) {
            uint16_t scale = quantise_group(format, w[row] + group * GROUP, codes + group * GROUP);

            ((uint16_t *)tile)[group * PANEL + row] = scale;
            good &= is_finite_half(scale);
        }
        if (format == WEIGHT_Q4) {
            for (int c = 0; c < GROUP; c++)
                bytes[c] = (uint8_t)((codes[c] + 8) | (codes[c + GROUP] + 8) << 4);
            for (int c = 0; c < GROUP; c += 4) memcpy(to + c * PANEL, bytes + c, 4);
        } else {
            for (int c = 0; c < TILE; c++) bytes[c] = (uint8_t)(codes[c] + 128);
            for (int c = 0; c < TILE; c += 4) memcpy(to + c * PANEL, bytes + c, 4);
        }
    }
    return good;
}

static inline int quantise_int8(const float (*w)[TILE], const float *scales, void *tile)
{
    return quantise_tile(WEIGHT_INT8, w, scales, tile);
}

static inline int quantise_q8(const float (*w)[TILE], const float *scales, void *tile)
{
    return quantise_tile(WEIGHT_Q8, w, scales, tile);
}

static inline int quantise_q4(const float (*w)[TILE], const float *scales, void *tile)
{
    return quantise_tile(WEIGHT_Q4, w, scales, tile);
}

/* TILE columns of PANEL rows, row after row. */
static inline int quantise_fp8(const float (*w)[TILE], const float *scales, void *tile)
{
    uint8_t *to = tile;
    int good = 1;

    for (int row = 0; row < PANEL; row++) {
        float most = largest_magnitude(w[row], TILE);
        float inverse = scales[row] != 0 ? 1 / scales[row] : 0;

        good &= most - most == 0;
        for (int c = 0; c < TILE; c++) *to++ = f32_to_fp8(w[row][c] * inverse);
    }
    return good;
}

#endif
