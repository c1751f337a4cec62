/* kernels.h: the inner loops of the CPU backend, one table per instruction set.
 *
 * kernels_generic.c defines what each one computes; kernels_<isa>.c computes the same within the
 * bounds in tests/c/test_kernels.c. Inside one table the value of every output depends only on its
 * own inputs: never on how many rows or outputs the call has, nor on where the call began. That is
 * what makes row b of a batch equal to a batch of one, and any number of threads equal to one. */
#ifndef MOSHI_CPU_KERNELS_H
#define MOSHI_CPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../quant.h"

#define ROWS_MAX 48 /* rows of activations in one call of dot or panels */
#define TOGETHER 16 /* rows that lie side by side for `tiles` */
#define TILE_ROWS 96 /* in one call of `tiles` */
#define TILE_OUTPUTS 256
#define ROW_PAD 64  /* an arranged row has a multiple of this many floats */

static inline size_t padded(int columns)
{
    return ((size_t)columns + ROW_PAD - 1) / ROW_PAD * ROW_PAD;
}

/* Floats that a gathered row has. */
static inline size_t gathered_width(int columns)
{
    return padded(columns) / 2 * 3;
}

/* What a block format multiplies: TILE activations, each GROUP of them with a scale of its own,
 * x = scale * code, scale = m / 127 for the largest magnitude m, codes to nearest, ties to even
 * (all 0 where m < LEAST_MAGNITUDE). If a number of the group is not finite, the scale is not. An
 * arranged row is the tiles of all columns, zero padded. */
struct activation_tile {
    int8_t codes[TILE];
    float scales[2];
    int32_t sums[2]; /* of the codes */
};

#define LEAST_MAGNITUDE 1e-30f

/* Tables are indexed by enum weight_format. Activations are rows of floats, except that the block
 * formats' are activation tiles. */
struct cpu_kernels {
    const char *name;

    /* A row of activations in the order `dot` or `panels` of that format wants, zero padded to
     * padded(columns). y == x is fine where there is room. */
    void (*arrange[WEIGHT_FORMATS])(const float *x, int columns, float *y);
    /* y[r * stride + o] = sum over k of w[o][k] * x[r][k]; x[r] are arranged rows, which
     * for f32 may as well be rows as they are. Float formats, and int8 with rows arranged as for
     * f32; w are codes then. Scales of rows are not its concern. */
    void (*dot[WEIGHT_FORMATS])(const void *w, int columns, int outputs, const float *const *x,
                                int rows, float *y, size_t stride);
    /* The same for packed panels; writes panels * PANEL outputs. f32: w[panels][columns][PANEL] and
     * rows x[r] as they are. Block formats: the sum over groups, in order, each addition rounded,
     * of (float)d * (w.scale * x.scale) for the integer d = sum of w.code * x.code over the group;
     * int8 has (float)d * x.scale, and the sum * w.scale. All instruction sets give these bits. */
    void (*panels[WEIGHT_FORMATS])(const void *w, int columns, int panels, const float *const *x,
                                   int rows, float *y, size_t stride);
    /* What `dot` is for products, where a table has both for a format. gather puts columns
     * begin..end-1 of up to TOGETHER rows, which are as they are, side by side; begin is a multiple
     * of ROW_PAD and so is end, unless it is padded(columns). tiles takes `rows` of them, group after
     * group, with gathered_width(columns) floats for a row, of which one more may be read. It writes
     * to more rows and outputs of y, up to the next multiples of 32. */
    void (*gather[WEIGHT_FORMATS])(const float *const *x, int rows, int columns, int begin, int end,
                                   float *y);
    void (*tiles[WEIGHT_FORMATS])(const void *w, int columns, int outputs, const float *x, int rows,
                                  float *y, size_t stride);
    /* y[n] = w[n] as floats; int8: the codes */
    void (*widen[WEIGHT_FORMATS])(const void *w, size_t n, float *y);

    /* Fills a tile of a block format, or of fp8, [PANEL][TILE]. int8 and fp8: scales[PANEL] as the
     * rows have them, not written here. Returns 0 when a weight or its scale is not finite. The same
     * tile on all instruction sets. */
    int (*quantise[WEIGHT_FORMATS])(const float (*w)[TILE], const float *scales, void *tile);
    /* The largest |x[i]|; NaN if one is. */
    float (*magnitude)(const float *x, size_t n);

    /* One row. y == x is fine. */
    void (*norm_layer)(const float *x, int n, float eps, const float *weight, const float *bias,
                       float *y);
    void (*norm_rms)(const float *x, int n, float eps, const float *weight, float *y);

    /* Element by element. y == x is fine. */
    void (*elu)(const float *x, size_t n, float *y);
    void (*gelu)(const float *x, size_t n, float *y);
    void (*gate)(const float *g, const float *v, size_t n, float *y); /* silu(g) * v */
    void (*add)(const float *u, size_t n, float *y);                  /* y += u */
    void (*add_scaled)(const float *u, const float *scale, size_t n, float *y); /* y += scale*u */
    /* y[r] = (u[r] + bias) + residual[r] for rows of n numbers; rows of u are u_stride apart, the
     * others' y_stride. bias and residual may be NULL. */
    void (*finish)(const float *u, size_t u_stride, const float *bias, const float *residual,
                   int rows, size_t n, float *y, size_t y_stride);

    /* x = softmax(scale * x), in place; n >= 1 */
    void (*softmax)(float *x, int n, float scale);
    /* y[width] += sum over j of p[j] * values[j][width]; f32, bf16 and codes of int8 */
    void (*mix[WEIGHT_FORMATS])(const float *p, const void *values, int n, int width, float *y);
};

#if defined(__x86_64__) && defined(__GNUC__)
#define MOSHI_CPU_X86 1
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MOSHI_CPU_AMX 1 /* compilers before these don't know the tile registers */
#endif
#elif defined(__AARCH64EL__) && defined(__GNUC__)
#define MOSHI_CPU_ARM 1
#endif

extern const struct cpu_kernels kernels_generic;
#if defined(MOSHI_CPU_X86)
extern const struct cpu_kernels kernels_avx2, kernels_avx512;
#if defined(MOSHI_CPU_AMX)
extern const struct cpu_kernels kernels_amx;
#endif
#elif defined(MOSHI_CPU_ARM)
extern const struct cpu_kernels kernels_neon, kernels_neon_dot, kernels_neon_i8mm;
#endif

/* The best table this machine can run, or the one MOSHI_C_ISA names. */
int kernels_choose(const struct cpu_kernels **kernels);

#endif
