/* kernels_neon_dot.c: panels of codes for ARM with sdot. The instruction is written out, because
 * compilers differ in whether they have its intrinsic in a part of a file. */
#include "kernels.h"

#if defined(MOSHI_CPU_ARM)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define MOST_ROWS 4
#define STORED_CODES 0

#include "kernels_neon.h"

#define SDOT(lane)                                                                                 \
    __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(sums) : "w"(w), "w"(a));                 \
    break

/* Adds to each of four sums its four codes times the four of `a` that `lane` says. */
INLINE int32x4_t add_dots(int32x4_t sums, uint8x16_t w, int8x16_t a, int lane)
{
    switch (lane) {
    case 0:
        SDOT(0);
    case 1:
        SDOT(1);
    case 2:
        SDOT(2);
    case 3:
        SDOT(3);
    }
    return sums;
}

INLINE void add_group(enum weight_format format, int R, const uint8_t *at, int group,
                      const int8_t *const *x, int32x4_t (*sums)[4])
{
    for (int c = 0; c < GROUP; c += 16, at += 16 * PANEL) {
        int8x16_t a[MOST_ROWS];

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

PANELS_CODES(panels_int8_neon_dot, WEIGHT_INT8)
PANELS_CODES(panels_q8_neon_dot, WEIGHT_Q8)
PANELS_CODES(panels_q4_neon_dot, WEIGHT_Q4)

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
