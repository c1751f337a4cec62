/* quant.h: how a matrix is stored. One struct for every weight format, so that a new format is a
 * new enumerator, its unpacking rule here, and its kernels in the backends.
 *
 * Float formats are read where they lie (often a file map). Block formats have room here already:
 * `group` values of a row share scales[row][col / group] and, when minima is not NULL, an offset:
 * w = scale * q + minimum; group == cols is one scale per row. Scales may be negative. */
#ifndef MOSHI_QUANT_H
#define MOSHI_QUANT_H

#include <stddef.h>
#include <stdint.h>

enum weight_format { WEIGHT_F32, WEIGHT_F16, WEIGHT_BF16 };

/* y = W x; W has `rows` outputs and `cols` inputs. */
struct matrix {
    enum weight_format format;
    int rows, cols;
    const void *data; /* [rows][cols], device memory, aligned to its element */
    int group;        /* 0 for float formats */
    const float *scales, *minima;
    void *packed; /* the backend's own layout, made by prepare_matrix; NULL: reads data */
};

static inline size_t weight_bytes(enum weight_format format)
{
    return format == WEIGHT_F32 ? 4 : 2;
}

/* Rows first .. first+count-1 as a matrix of their own; W must not be packed. */
static inline struct matrix matrix_rows(struct matrix w, int first, int count)
{
    w.data = (const char *)w.data + (size_t)first * (size_t)w.cols * weight_bytes(w.format);
    w.rows = count;
    return w;
}

static inline float bf16_to_f32(uint16_t h)
{
    union {
        uint32_t u;
        float f;
    } v = {.u = (uint32_t)h << 16};
    return v.f;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t f32_to_bf16(float f)
{
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    if ((v.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((v.u >> 16) | 0x40u);
    return (uint16_t)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}

float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f); /* to nearest, ties to even; overflow gives infinity */

/* Writes rows*cols elements of `from` in format `to`. */
void weight_convert(enum weight_format from, const void *source, enum weight_format to,
                    void *target, size_t elements);

#endif
