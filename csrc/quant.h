/* quant.h: how a matrix is stored. One struct for every weight format, so that a new format is a
 * new enumerator, its unpacking rule here, and its kernels in the backends.
 *
 * Float formats are read where they lie (often a file map) or as packed panels of f32. fp8 is one of
 * them, of 8 bits and with an f32 scale for each row: w = scale * number, numbers being e4m3fn (1
 * sign, 4 exponent (bias 7) and 3 fraction bits; at most 448, no infinity, 0x7f and 0xff are NaN). Its
 * rows come from files or, with their scales, from a backend's quantise_matrix.
 *
 * The block formats are read from packed panels, and activations become codes too; they come from
 * float rows, or from int8 rows as published, by quantise_matrix. int8 rows with their scales are also
 * read where they lie, by activations that stay f32. Their rule is w = scale * code:
 *
 *   int8  codes -127..127, one f32 scale for each row                8 bits a weight
 *   q8    codes -127..127, one f16 scale for 32 weights of a row     8.5 bits
 *   q4    codes -8..7, one f16 scale for 32 weights of a row         4.5 bits
 *
 * Scales may be negative. A panel is PANEL rows; codes are stored as code + CODE_OFFSET(format), so
 * that they are unsigned, four columns of a row side by side (32 bits, one lane of a dot product),
 * then the next row. TILE columns of a panel make a tile:
 *
 *   scales   f16 [2][PANEL], of the first and of the second GROUP columns; int8: none
 *   codes    [TILE / 4][PANEL][4] bytes; q4: [GROUP / 4][PANEL][4], the first GROUP columns in the
 *            low halves of the bytes, the second ones in the high halves
 *
 * An int8 panel begins with its scales, f32 [PANEL]. What is beyond the last row or column is code
 * 0 and scale 0. Everything lies at multiples of 64 bytes, one after the other: a thread that takes
 * a run of panels reads one run of memory. */
#ifndef MOSHI_QUANT_H
#define MOSHI_QUANT_H

#include <stddef.h>
#include <stdint.h>

enum weight_format {
    WEIGHT_F32,
    WEIGHT_F16,
    WEIGHT_BF16,
    WEIGHT_FP8,
    WEIGHT_INT8,
    WEIGHT_Q8,
    WEIGHT_Q4
};

#define WEIGHT_FORMATS 7
#define PANEL 16 /* rows of a packed panel */
#define GROUP 32 /* columns with one scale; activations are quantised by so many too */
#define TILE (2 * GROUP)
#define CODE_OFFSET(format) ((format) == WEIGHT_Q4 ? 8 : 128)

/* y = W x; W has `rows` outputs and `cols` inputs. */
struct matrix {
    enum weight_format format;
    int rows, cols;
    const void *data; /* [rows][cols], device memory, aligned to its element; NULL: panels */
    const float *scales; /* [rows] of int8 or fp8 rows in `data`; NULL: none, fp8's are all 1 */
    /* What prepare_matrix or quantise_matrix made: panels, or fp8 rows (fp8_head); else NULL. */
    void *packed;
};

/* "f32", "fp8", ... */
const char *weight_format_name(enum weight_format format);

static inline int is_block_format(enum weight_format format)
{
    return format >= WEIGHT_INT8;
}

/* Of one element of `data`. */
static inline size_t weight_bytes(enum weight_format format)
{
    return format == WEIGHT_F32 ? 4 : format == WEIGHT_INT8 || format == WEIGHT_FP8 ? 1 : 2;
}

/* Of one tile, or of one packed panel. */
static inline size_t tile_bytes(enum weight_format format)
{
    return format == WEIGHT_INT8 ? PANEL * TILE
                                 : 2 * 2 * PANEL + PANEL * TILE / (format == WEIGHT_Q4 ? 2 : 1);
}

static inline size_t panel_bytes(enum weight_format format, int cols)
{
    size_t header = format == WEIGHT_INT8 ? PANEL * sizeof(float) : 0;

    if (!is_block_format(format)) return (size_t)cols * PANEL * sizeof(float);
    return header + ((size_t)cols + TILE - 1) / TILE * tile_bytes(format);
}

/* Of the scales that fp8 rows which were made begin with, f32 [rows]. */
static inline size_t fp8_head(int rows)
{
    return ((size_t)rows * sizeof(float) + 63) / 64 * 64;
}

static inline size_t packed_bytes(const struct matrix *w)
{
    if (w->format == WEIGHT_FP8) return fp8_head(w->rows) + (size_t)w->rows * (size_t)w->cols;
    return ((size_t)w->rows + PANEL - 1) / PANEL * panel_bytes(w->format, w->cols);
}

/* What reading the whole matrix reads. */
static inline size_t matrix_bytes(const struct matrix *w)
{
    return w->packed ? packed_bytes(w)
                     : (size_t)w->rows * (size_t)w->cols * weight_bytes(w->format);
}

/* Rows first .. first+count-1 as a matrix of their own; W must not be packed. */
static inline struct matrix matrix_rows(struct matrix w, int first, int count)
{
    w.data = (const char *)w.data + (size_t)first * (size_t)w.cols * weight_bytes(w.format);
    if (w.scales) w.scales += first;
    w.rows = count;
    return w;
}

/* The codes of an int8 row and its scale, m / 127 for the largest magnitude m; codes to nearest, ties
 * to even. `codes` may begin where `values` does. */
float int8_row(const float *values, int cols, int8_t *codes);

#define FP8_MOST 448.0f
#define FP8_LEAST_ROW 0x1p-100f /* a row with less is all 0 */

/* The nearest e4m3 number, ties to even, of one between -448 and 448. Without a branch, so that
 * compilers make vectors of it. */
static inline uint8_t f32_to_fp8(float f)
{
    union {
        float f;
        uint32_t u;
    } v = {.f = f}, least;
    uint32_t sign = v.u >> 24 & 0x80u, magnitude = v.u & 0x7fffffffu, normal, below;

    normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
    v.u = magnitude;
    least.f = v.f + 0x1p14f; /* whose last bit is the least number above 0 */
    below = least.u - 0x46800000u;
    magnitude = magnitude < 0x3c800000u ? below : normal;
    return (uint8_t)(sign | (magnitude < 0x7eu ? magnitude : 0x7eu));
}

float fp8_to_f32(uint8_t code);

/* Code and scale of one weight of a block format's panel. */
int panel_code(enum weight_format format, const void *panel, int row, int column);
float panel_scale(enum weight_format format, const void *panel, int row, int column);

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

/* Writes `elements` of the float format `from` in the float format `to`, which is not fp8 unless both
 * are. fp8's scales are not its concern. */
void weight_convert(enum weight_format from, const void *source, enum weight_format to,
                    void *target, size_t elements);

#endif
