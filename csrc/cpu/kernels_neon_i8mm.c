/* kernels_neon_i8mm.c: panels of codes for ARM with usdot, for one row of activations, and usmmla,
 * for more; both multiply codes as they are stored. */
#include "kernels.h"

#if defined(MOSHI_CPU_ARM)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif

#define MOST_ROWS 4
#define STORED_CODES 1
#define DOT_INSTRUCTION "usdot"

#include "kernels_neon.h"

/* sums[i][j] += w[i][8] . a[j][8] */
INLINE int32x4_t add_matrices(int32x4_t sums, uint32x4_t w, int8x16_t a)
{
    __asm__ volatile("usmmla %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(w), "w"(a));
    return sums;
}

/* A product has two outputs and two rows; a row without a neighbour is its own. Fours of columns are
 * stored, so two of them are put together. */
INLINE void add_group_pairs(enum weight_format format, int R, const uint8_t *at, int group,
                            const int8_t *const *x, int32x4_t (*sums)[4])
{
    int32x4_t pairs[MOST_ROWS / 2][8];

    UNROLL
    for (int r = 0; r < R; r += 2) {
        UNROLL
        for (int v = 0; v < 8; v++)
            pairs[r / 2][v] = vzip1q_s32(sums[r][0], sums[r + 1 < R ? r + 1 : r][0]);
    }
    for (int c = 0; c < GROUP; c += 8, at += 8 * PANEL) {
        int8x16_t a[MOST_ROWS / 2];

        KEEP_ORDER;
        UNROLL
        for (int r = 0; r < R; r += 2)
            a[r / 2] = vcombine_s8(vld1_s8(x[r] + c), vld1_s8(x[r + 1 < R ? r + 1 : r] + c));
        UNROLL
        for (int v = 0; v < 4; v++) {
            uint32x4_t w = vreinterpretq_u32_u8(load_codes(format, at + 16 * v, group));
            uint32x4_t next = vreinterpretq_u32_u8(load_codes(format, at + 4 * PANEL + 16 * v,
                                                              group));
            uint32x4_t low = vzip1q_u32(w, next), high = vzip2q_u32(w, next);

            UNROLL
            for (int r = 0; r < R; r += 2) {
                pairs[r / 2][2 * v] = add_matrices(pairs[r / 2][2 * v], low, a[r / 2]);
                pairs[r / 2][2 * v + 1] = add_matrices(pairs[r / 2][2 * v + 1], high, a[r / 2]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int v = 0; v < 4; v++) {
            int32x4_t low = pairs[r / 2][2 * v], high = pairs[r / 2][2 * v + 1];

            sums[r][v] = r % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high);
        }
    }
}

INLINE void add_group(enum weight_format format, int R, const uint8_t *at, int group,
                      const int8_t *const *x, int32x4_t (*sums)[4])
{
    if (R == 1)
        add_group_dots(format, 1, at, group, x, sums);
    else
        add_group_pairs(format, R, at, group, x, sums);
}

PANELS_CODES(panels_int8_neon_i8mm, WEIGHT_INT8)
PANELS_CODES(panels_q8_neon_i8mm, WEIGHT_Q8)
PANELS_CODES(panels_q4_neon_i8mm, WEIGHT_Q4)

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
