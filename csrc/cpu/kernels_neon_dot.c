/* kernels_neon_dot.c: panels of codes for ARM with sdot. */
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
#define DOT_INSTRUCTION "sdot"

#include "kernels_neon.h"

INLINE void add_group(enum weight_format format, int R, const uint8_t *at, int group,
                      const int8_t *const *x, int32x4_t (*sums)[4])
{
    add_group_dots(format, R, at, group, x, sums);
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
