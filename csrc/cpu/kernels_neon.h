/* kernels_neon.h: what the files of ARM share: panels of codes for the multiplication that the file
 * defines. Before the file includes this it says how many rows of activations work side by side
 * (MOST_ROWS, 2 or 4), whether its multiplication takes codes as they are stored (STORED_CODES, else
 * it is one of signed bytes), and the name of its dot product of bytes if it has one.
 *
 * The instructions that not every processor has are written out: compilers differ in whether they
 * have intrinsics for a part of a program. */
#ifndef MOSHI_CPU_KERNELS_NEON_H
#define MOSHI_CPU_KERNELS_NEON_H

#include <arm_neon.h>
#include <string.h>

#include "kernels.h"
#include "shared.h"

/* Without "full" clang unrolls before it knows how often, and never again. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Compilers would rather read weights far ahead, and spill sums for them. Multiplications stay where
 * they are written by being volatile, and memory is read anew after this. */
#define KEEP_ORDER __asm__ volatile("" : : : "memory")

typedef void panels_function(const void *w, int columns, int panels, const float *const *x,
                             int rows, float *y, size_t stride);

panels_function panels_int8_neon, panels_q8_neon, panels_q4_neon;
panels_function panels_int8_neon_dot, panels_q8_neon_dot, panels_q4_neon_dot;
panels_function panels_int8_neon_i8mm, panels_q8_neon_i8mm, panels_q4_neon_i8mm;

/* Four weights of bf16 begin as the upper halves of floats. */
INLINE float32x4_t load_four(enum weight_format format, const char *from)
{
    const uint16_t *h = (const uint16_t *)(const void *)from;

    if (format == WEIGHT_INT8) {
        int8_t codes[8] = {0};

        memcpy(codes, from, 4);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(codes)))));
    }
    if (format == WEIGHT_F32) return vld1q_f32((const float *)(const void *)from);
    if (format == WEIGHT_F16) return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h)));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(h)), 16));
}

/* Four columns of four outputs of a group. q4: codes + 8, which all multiplications take; else codes,
 * or codes + 128. */
INLINE uint8x16_t load_codes(enum weight_format format, const uint8_t *at, int group)
{
    uint8x16_t codes = vld1q_u8(at);

    if (format == WEIGHT_Q4) return group ? vshrq_n_u8(codes, 4) : vandq_u8(codes, vdupq_n_u8(15));
    return STORED_CODES ? codes : veorq_u8(codes, vdupq_n_u8(128));
}

/* The file's own: adds to sums[R][4] the products of the codes of a group, R rows of activations and
 * the 16 outputs of a panel; `at` and each x[r] are the group's. The sums of a row come in equal. */
INLINE void add_group(enum weight_format format, int R, const uint8_t *at, int group,
                      const int8_t *const *x, int32x4_t (*sums)[4]);

#if defined(DOT_INSTRUCTION)

#define DOT_CASE(lane)                                                                             \
    case lane:                                                                                     \
        __asm__ volatile(DOT_INSTRUCTION " %0.4s, %1.16b, %2.4b[" #lane "]"                        \
                         : "+w"(sums)                                                              \
                         : "w"(w), "w"(a));                                                        \
        break;

/* Adds to each of four sums its four codes times the four of `a` that `lane` says. */
INLINE int32x4_t add_dots(int32x4_t sums, uint8x16_t w, int8x16_t a, int lane)
{
    switch (lane) {
        DOT_CASE(0)
        DOT_CASE(1)
        DOT_CASE(2)
        DOT_CASE(3)
    }
    return sums;
}

/* An add_group. */
INLINE void add_group_dots(enum weight_format format, int R, const uint8_t *at, int group,
                           const int8_t *const *x, int32x4_t (*sums)[4])
{
    for (int c = 0; c < GROUP; c += 16, at += 16 * PANEL) {
        int8x16_t a[MOST_ROWS];

        KEEP_ORDER;
        UNROLL
        for (int r = 0; r < R; r++) a[r] = vld1q_s8(x[r] + c);
        UNROLL
        for (int i = 0; i < 16; i++) {
            uint8x16_t w = load_codes(format, at + 16 * i, group);

            UNROLL
            for (int r = 0; r < R; r++) sums[r][i % 4] = add_dots(sums[r][i % 4], w, a[r], i / 4);
        }
    }
}

#endif

/* sums[r][4] are those of a panel's 16 outputs so far. Where weights are multiplied with their
 * offset, the products begin with what that would add. */
INLINE void code_tile(enum weight_format format, int R, const char *tile,
                      const struct activation_tile *const *x, float32x4_t (*sums)[4])
{
    const uint8_t *codes = (const uint8_t *)(format == WEIGHT_INT8 ? tile : tile + 4 * PANEL);
    int offset = format == WEIGHT_Q4 || STORED_CODES ? CODE_OFFSET(format) : 0;

    UNROLL
    for (int group = 0; group < 2; group++) {
        const int8_t *rows[MOST_ROWS];
        int32x4_t dots[MOST_ROWS][4];

        UNROLL
        for (int r = 0; r < R; r++) {
            rows[r] = x[r]->codes + group * GROUP;
            UNROLL
            for (int v = 0; v < 4; v++) dots[r][v] = vdupq_n_s32(-offset * x[r]->sums[group]);
        }
        add_group(format, R, format == WEIGHT_Q4 ? codes : codes + group * GROUP * PANEL, group,
                  rows, dots);
        UNROLL
        for (int v = 0; v < 4; v++) {
            float32x4_t scale = vdupq_n_f32(0);

            if (format != WEIGHT_INT8)
                scale = load_four(WEIGHT_F16, tile + 2 * PANEL * group + 8 * v);
            UNROLL
            for (int r = 0; r < R; r++) {
                float32x4_t s = vdupq_n_f32(x[r]->scales[group]);

                if (format != WEIGHT_INT8) s = vmulq_f32(scale, s);
                sums[r][v] = vaddq_f32(sums[r][v], vmulq_f32(vcvtq_f32_s32(dots[r][v]), s));
            }
        }
    }
}

/* R rows of activations and one panel. */
INLINE void code_panel(enum weight_format format, int R, const char *panel, int columns,
                       const float *const *x, float *y, size_t stride)
{
    const char *tile = format == WEIGHT_INT8 ? panel + PANEL * sizeof(float) : panel;
    const struct activation_tile *at[MOST_ROWS];
    float32x4_t sums[MOST_ROWS][4];

    UNROLL
    for (int r = 0; r < R; r++) {
        at[r] = (const struct activation_tile *)(const void *)x[r];
        UNROLL
        for (int v = 0; v < 4; v++) sums[r][v] = vdupq_n_f32(0);
    }
    for (int k = 0; k < columns; k += TILE, tile += tile_bytes(format)) {
        code_tile(format, R, tile, at, sums);
        UNROLL
        for (int r = 0; r < R; r++) at[r]++;
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int v = 0; v < 4; v++) {
            if (format == WEIGHT_INT8)
                sums[r][v] = vmulq_f32(sums[r][v], load_four(WEIGHT_F32, panel + 16 * v));
            vst1q_f32(y + (size_t)r * stride + 4 * v, sums[r][v]);
        }
    }
}

INLINE void panels_codes(enum weight_format format, const char *w, int columns, int panels,
                         const float *const *x, int rows, float *y, size_t stride)
{
    int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;

    for (int p = 0; p < panels; p++, w += panel_bytes(format, columns), y += PANEL) {
        for (int t = 0; t < tiles; t++) {
            int r = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - r;
            float *to = y + (size_t)r * stride;

            if (height == 1)
                code_panel(format, 1, w, columns, x + r, to, stride);
            else if (height == 2)
                code_panel(format, 2, w, columns, x + r, to, stride);
#if MOST_ROWS == 4
            else if (height == 3)
                code_panel(format, 3, w, columns, x + r, to, stride);
            else
                code_panel(format, 4, w, columns, x + r, to, stride);
#endif
        }
    }
}

#define PANELS_CODES(name, format)                                                                 \
    void name(const void *w, int columns, int panels, const float *const *x, int rows, float *y,   \
              size_t stride)                                                                       \
    {                                                                                              \
        panels_codes(format, w, columns, panels, x, rows, y, stride);                              \
    }

#endif
