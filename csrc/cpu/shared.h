/* shared.h: what the files of the instruction sets have in common. Plain C, compiled in each of
 * them, and the polynomials of their functions, which are minimax fits:
 *
 * exp: n = round(x / ln 2), r = x - n ln 2, e^r = 1 + r + r^2 q(r), then n is added to the
 * exponent; saturates below exp(EXP_LEAST) and above exp(EXP_MOST).
 * erf: x p(x^2) below 1, else 1 - exp(-s(x)), and 1 from 4 on. Both are within 2 ulp. */
#ifndef MOSHI_CPU_SHARED_H
#define MOSHI_CPU_SHARED_H

#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

#define EXP_LEAST -87.3f
#define EXP_MOST 88.3f
#define LN2_HIGH 0x1.62e4p-1f /* ln 2 in two pieces: n times the first one is exact */
#define LN2_LOW 0x1.7f7d1cp-20f
#define PER_LN2 1.44269504f

/* q, p and s, from the highest power. */
static const float exp_terms[5] = {1.39504788e-3f, 8.36888235e-3f, 4.16662060e-2f, 1.66665196e-1f,
                                   0.5f};
static const float erf_small_terms[7] = {7.88912294e-5f,  -8.02084222e-4f, 5.18953567e-3f,
                                         -2.68544443e-2f, 1.12836003e-1f,  -3.76126260e-1f,
                                         1.12837911f};
static const float erf_large_terms[7] = {-1.85574114e-4f, 2.93960841e-3f, -2.18053218e-2f,
                                         1.03037380e-1f,  6.38225675e-1f, 1.12704003f,
                                         3.53717682e-4f};

/* Where tile t of `tiles` begins, all nearly equal in height. */
INLINE int tile_start(int rows, int tiles, int t)
{
    return rows * t / tiles;
}

static inline void widen_f32(const void *w, size_t n, float *y)
{
    memcpy(y, w, n * sizeof *y);
}

static inline void arrange_plain(const float *x, int columns, float *y)
{
    if (y != x) memcpy(y, x, (size_t)columns * sizeof *y);
    memset(y + columns, 0, (padded(columns) - (size_t)columns) * sizeof *y);
}

/* Where `dot` reads the codes of e4m3 as f16, by a shift, weights come out 2^8 times too small. These
 * rows make up for it, exactly. */
static inline void arrange_fp8(const float *x, int columns, float *y)
{
    for (int k = 0; k < columns; k++) y[k] = x[k] * 0x1p8f;
    memset(y + columns, 0, (padded(columns) - (size_t)columns) * sizeof *y);
}

#endif
