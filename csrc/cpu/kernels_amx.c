/* kernels_amx.c: bf16 products by the tile registers of x86 (AMX, 2023 and later); whatever else that
 * table has is AVX-512's.
 *
 * A tile of weights is 16 rows by 32 columns, read where they lie. Activations are not rounded to
 * bf16 but become three such numbers, which hold their 24 bits and whose products are exact: high,
 * middle and low, x = h + m + l. The unit multiplies 16 rows of activations in the time of one, and
 * so much faster than memory brings weights that a row alone goes the same way. For each 32 columns,
 * a sum gets the products of the high parts, then those of the others, each in the order of the
 * columns: the bits don't depend on the shape. */
#include "kernels_x86.h"

#if defined(MOSHI_CPU_AMX)

#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#define UNROLL _Pragma("unroll")
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16,amx-tile,amx-bf16")
#define UNROLL _Pragma("GCC unroll 16")
#endif

#include "shared.h"

#define BLOCK 32 /* columns of a tile */
#define OUTPUTS 16 /* rows of weights of a tile */
#define PARTS 3 /* of an activation */
#define AHEAD 2048 /* bytes */

/* Not every compiler knows that the tile instructions read and write memory. */
#define MEMORY_IS_USED __asm__ volatile("" : : : "memory")

/* ---- activations ------------------------------------------------------------------------ */

/* Rows of 16 pairs become columns. */
INLINE void transpose(__m512i *v)
{
    __m512i a[16], b[16];

    UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    UNROLL
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

INLINE __mmask16 lanes(int n)
{
    return n >= 16 ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

/* What the rounding of x to `part` leaves, or 0 where that is not finite. */
INLINE __m512 rest(__m512 x, __m256i part)
{
    __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
    __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(rounded), _mm512_set1_ps(__FLT_MAX__),
                                          _CMP_LE_OQ);

    return _mm512_maskz_sub_ps(finite, x, rounded);
}

/* Pairs of each part of one row's next 32 columns, of which `left` are there. */
INLINE void split(const float *x, int left, __m512i *high, __m512i *middle, __m512i *low)
{
    __m512 a = _mm512_maskz_loadu_ps(lanes(left), x);
    __m512 b = _mm512_maskz_loadu_ps(lanes(left - 16), x + 16);

    *high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    a = rest(a, _mm512_castsi512_si256(*high));
    b = rest(b, _mm512_extracti64x4_epi64(*high, 1));
    *middle = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    a = rest(a, _mm512_castsi512_si256(*middle));
    b = rest(b, _mm512_extracti64x4_epi64(*middle, 1));
    *low = (__m512i)_mm512_cvtne2ps_pbh(b, a);
}

/* Each block of columns is a tile of each part: [16 pairs][rows]. */
void gather_bf16_amx(const float *const *x, int rows, int columns, int begin, int end, float *y)
{
    __mmask16 some = lanes(rows);

    y += (size_t)begin / BLOCK * PARTS * 16 * (size_t)rows;
    for (int k = begin; k < end; k += BLOCK) {
        __m512i parts[PARTS][16];

        for (int r = 0; r < rows; r++)
            split(x[r] + k, columns - k, &parts[0][r], &parts[1][r], &parts[2][r]);
        for (int r = rows; rows > 1 && r < 16; r++)
            parts[0][r] = parts[1][r] = parts[2][r] = _mm512_setzero_si512();
        for (int part = 0; part < PARTS; part++, y += 16 * rows) {
            if (rows == 1) {
                _mm512_storeu_si512(y, parts[part][0]);
                continue;
            }
            transpose(parts[part]);
            UNROLL
            for (int pair = 0; pair < 16; pair++)
                _mm512_mask_storeu_epi32(y + pair * rows, some, parts[part][pair]);
        }
    }
}

/* ---- products --------------------------------------------------------------------------- */

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tile 0: sums of up to 16 outputs; 4 to 6: parts of activations; 7: weights. With 16 outputs and
 * rows all tiles are whole. */
static void configure(int outputs, int rows)
{
    struct tile_config config = {.palette = 1};

    for (int t = 0; t < 8; t++) {
        config.rows[t] = (uint8_t)(t == 0 || t == 7 ? outputs : 16);
        config.row_bytes[t] = (uint16_t)(t < 7 ? 4 * rows : 64);
    }
    MEMORY_IS_USED;
    _tile_loadconfig(&config);
}

/* The sums of `outputs` outputs lie in rows of `rows`. */
INLINE void store_sums(const float *sums, int outputs, int rows, float *y, size_t stride)
{
    __m512i v[16];

    if (rows == 1) {
        memcpy(y, sums, (size_t)outputs * sizeof *y);
        return;
    }
    UNROLL
    for (int o = 0; o < 16; o++)
        v[o] = o < outputs ? _mm512_maskz_loadu_epi32(lanes(rows), sums + o * rows)
                           : _mm512_setzero_si512();
    transpose(v);
    for (int r = 0; r < rows; r++)
        _mm512_mask_storeu_epi32(y + (size_t)r * stride, lanes(outputs), v[r]);
}

/* The last columns of 16 rows of weights, zero padded. */
static void copy_tail(const char *w, size_t row_bytes, int outputs, size_t bytes, char (*tail)[64])
{
    memset(tail, 0, OUTPUTS * 64);
    for (int o = 0; o < outputs; o++) memcpy(tail[o], w + (size_t)o * row_bytes, bytes);
    MEMORY_IS_USED;
}

#define LOAD_PARTS(x, rows)                                                                        \
    _tile_loadd(4, x, 4 * (size_t)(rows));                                                         \
    _tile_loadd(5, x + 16 * (rows), 4 * (size_t)(rows));                                           \
    _tile_loadd(6, x + 32 * (rows), 4 * (size_t)(rows))

#define MULTIPLY(sum, weights, stride)                                                             \
    _tile_loadd(7, weights, stride);                                                               \
    _tile_dpbf16ps(sum, 7, 4);                                                                     \
    _tile_dpbf16ps(sum, 7, 5);                                                                     \
    _tile_dpbf16ps(sum, 7, 6)

/* 16 outputs or, with tiles of so many rows, fewer; the weights come from memory. More than 16 rows
 * of weights side by side took up to twice as long; for one row of activations 8 are 3 % better
 * still. */
static void multiply_one(const char *w, int columns, int outputs, const float *x, int rows,
                         float *y, size_t stride)
{
    size_t row_bytes = (size_t)columns * 2, step = 4 * (size_t)rows;
    int k = 0, wrap = columns - AHEAD / 2;
    float sums[16 * 16];

    _tile_zero(0);
    for (; k + BLOCK <= columns; k += BLOCK, x += PARTS * 16 * rows) {
        const char *at = w + 2 * (size_t)k;

        const char *next = at + AHEAD + (k < wrap ? 0 : (size_t)(outputs - 1) * row_bytes);

        for (int o = 0; o < outputs; o++) _mm_prefetch(next + (size_t)o * row_bytes, _MM_HINT_T0);
        LOAD_PARTS(x, rows);
        MULTIPLY(0, at, row_bytes);
    }
    if (k < columns) {
        char tail[OUTPUTS][64];

        copy_tail(w + 2 * (size_t)k, row_bytes, outputs, row_bytes - 2 * (size_t)k, tail);
        LOAD_PARTS(x, rows);
        MULTIPLY(0, tail, 64);
    }
    _tile_stored(0, sums, step);
    MEMORY_IS_USED;
    store_sums(sums, outputs, rows, y, stride);
}

#define STREAMS 8
#define STREAM_AHEAD 512 /* bytes */
#define STREAM_ROW 16384 /* rows that are longer are long streams by themselves */
#define STREAM_ROWS 8 /* of activations; more of them have enough to do with 16 outputs */

/* STREAMS * `each` outputs. A tile has one output of each eighth, so that the weights are read as
 * eight long streams: up to 1.2 times as fast as eight rows that follow each other, whose streams are
 * short. */
INLINE void multiply_streams(const char *w, int columns, int each, const float *x, int rows,
                             float *y, size_t stride)
{
    size_t row_bytes = (size_t)columns * 2, apart = (size_t)each * row_bytes;

    for (int i = 0; i < each; i++, w += row_bytes) {
        const float *parts = x;
        float sums[STREAMS * STREAM_ROWS];
        int k = 0;

        _tile_zero(0);
        for (; k + BLOCK <= columns; k += BLOCK, parts += PARTS * 16 * rows) {
            const char *at = w + 2 * (size_t)k;

            for (int s = 0; s < STREAMS; s++)
                _mm_prefetch(at + STREAM_AHEAD + (size_t)s * apart, _MM_HINT_T0);
            LOAD_PARTS(parts, rows);
            MULTIPLY(0, at, apart);
        }
        if (k < columns) {
            char tail[OUTPUTS][64];

            copy_tail(w + 2 * (size_t)k, apart, STREAMS, row_bytes - 2 * (size_t)k, tail);
            LOAD_PARTS(parts, rows);
            MULTIPLY(0, tail, 64);
        }
        _tile_stored(0, sums, 4 * (size_t)rows);
        MEMORY_IS_USED;
        for (int s = 0; s < STREAMS; s++)
            for (int r = 0; r < rows; r++)
                y[(size_t)r * stride + (size_t)(s * each + i)] = sums[s * rows + r];
    }
}

/* ---- products of more than 16 rows ------------------------------------------------------ */

/* Tiles 0 to 3: sums of two times 16 outputs by two times 16 rows; 4 and 5: weights; 6 and 7: one
 * part of activations. The weights of STRIP outputs are put side by side first, SPAN columns at a
 * time, for all rows; meanwhile the next ones come nearer. */
#define STRIP (2 * OUTPUTS)
#define SPAN 1024
#define PAIR_BYTES (2 * OUTPUTS * 64 + 64) /* two tiles; the rest keeps rows apart in the cache */

/* Columns of STRIP rows of weights, of which `outputs` are there, as pairs of tiles. */
static void arrange_strip(const char *w, size_t row_bytes, int outputs, int columns, char *to)
{
    for (int o = 0; o < STRIP; o++, w += row_bytes, to += 64) {
        for (int k = 0; k < columns; k += BLOCK) {
            int left = o < outputs ? columns - k : 0;
            __mmask32 some = left >= BLOCK ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;

            _mm512_store_si512(to + k / BLOCK * PAIR_BYTES,
                               _mm512_maskz_loadu_epi16(some, w + 2 * (size_t)k));
        }
    }
}

/* Rows of activations side by side, up to 16. */
struct group {
    const float *x; /* [blocks][PARTS][16 pairs][rows] */
    int rows;
};

/* What is brought nearer meanwhile: of `lines` rows a line for each block. */
struct stream {
    const char *from;
    size_t row_bytes;
    int lines;
};

#define LOAD_GROUPS(part)                                                                          \
    _tile_loadd(6, a.x + 16 * a.rows * (part), 4 * (size_t)a.rows);                                \
    _tile_loadd(7, b.x + 16 * b.rows * (part), 4 * (size_t)b.rows)

#define MULTIPLY_CROSS                                                                             \
    _tile_dpbf16ps(0, 4, 6);                                                                       \
    _tile_dpbf16ps(1, 4, 7);                                                                       \
    _tile_dpbf16ps(2, 5, 6);                                                                       \
    _tile_dpbf16ps(3, 5, 7)

/* STRIP outputs of two groups; a tile of a group of fewer than 16 rows is whole with what lies behind
 * it. The sums go on from y, which has [outputs][rows] in each square of 16 by 16. */
static void multiply_pair(const char *w, int blocks, struct group a, struct group b, int first,
                          struct stream next, float *y, size_t stride)
{
    size_t step = stride * sizeof *y;

    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, y, step);
        _tile_loadd(1, y + 16 * stride, step);
        _tile_loadd(2, y + OUTPUTS, step);
        _tile_loadd(3, y + 16 * stride + OUTPUTS, step);
    }
    for (int k = 0; k < blocks; k++, w += PAIR_BYTES) {
        for (int l = 0; l < next.lines; l++)
            _mm_prefetch(next.from + (size_t)l * next.row_bytes + 64 * (size_t)k, _MM_HINT_T1);
        _tile_loadd(4, w, 64);
        _tile_loadd(5, w + OUTPUTS * 64, 64);
        LOAD_GROUPS(0);
        MULTIPLY_CROSS;
        LOAD_GROUPS(1);
        MULTIPLY_CROSS;
        LOAD_GROUPS(2);
        MULTIPLY_CROSS;
        a.x += 16 * PARTS * a.rows;
        b.x += 16 * PARTS * b.rows;
    }
    _tile_stored(0, y, step);
    _tile_stored(1, y + 16 * stride, step);
    _tile_stored(2, y + OUTPUTS, step);
    _tile_stored(3, y + 16 * stride + OUTPUTS, step);
}

/* Group g from column `begin` on. */
static struct group group_at(const float *x, int rows, int columns, int g, int begin)
{
    int n = rows - g * TOGETHER < TOGETHER ? rows - g * TOGETHER : TOGETHER;

    return (struct group){x + (size_t)g * TOGETHER * gathered_width(columns) +
                              (size_t)begin / BLOCK * PARTS * 16 * (size_t)n,
                          n};
}

static void turn_squares(float *y, size_t stride, int rows, int outputs)
{
    for (int r = 0; r < rows; r += 16) {
        for (int o = 0; o < outputs; o += 16) {
            float *square = y + (size_t)r * stride + o;
            __m512i v[16];

            UNROLL
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(square + (size_t)i * stride);
            transpose(v);
            UNROLL
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(square + (size_t)i * stride, v[i]);
        }
    }
}

static void multiply_many(const char *w, int columns, int outputs, const float *x, int rows,
                          float *y, size_t stride)
{
    _Alignas(64) char strip[SPAN / BLOCK * PAIR_BYTES];
    size_t row_bytes = (size_t)columns * 2;
    int groups = (rows + TOGETHER - 1) / TOGETHER, pairs = (groups + 1) / 2;

    configure(OUTPUTS, TOGETHER);
    for (int begin = 0; begin < columns; begin += SPAN) {
        int span = columns - begin < SPAN ? columns - begin : SPAN;

        for (int o = 0; o < outputs; o += STRIP) {
            const char *from = w + (size_t)o * row_bytes + 2 * (size_t)begin;
            const char *next = o + STRIP < outputs      ? from + STRIP * row_bytes
                               : begin + SPAN < columns ? w + 2 * (size_t)(begin + SPAN)
                                                        : w + (size_t)outputs * row_bytes;

            arrange_strip(from, row_bytes, outputs - o, span, strip);
            MEMORY_IS_USED;
            for (int p = 0; p < pairs; p++) {
                int line = STRIP * p / pairs, line_end = STRIP * (p + 1) / pairs;

                multiply_pair(
                    strip, (span + BLOCK - 1) / BLOCK, group_at(x, rows, columns, 2 * p, begin),
                    group_at(x, rows, columns, 2 * p + 1 < groups ? 2 * p + 1 : 2 * p, begin),
                    begin == 0,
                    (struct stream){next + (size_t)line * row_bytes, row_bytes, line_end - line},
                    y + (size_t)p * 2 * TOGETHER * stride + o, stride);
            }
        }
    }
    MEMORY_IS_USED;
    turn_squares(y, stride, rows, outputs);
}

void tiles_bf16_amx(const void *w, int columns, int outputs, const float *x, int rows, float *y,
                    size_t stride)
{
    size_t row_bytes = (size_t)columns * 2;
    int o = 0, height = rows == 1 ? STREAMS : OUTPUTS;
    const char *from = w;

    if (rows > TOGETHER) {
        multiply_many(w, columns, outputs, x, rows, y, stride);
    } else {
        if (rows <= STREAM_ROWS && row_bytes < STREAM_ROW) {
            configure(STREAMS, rows);
            if (rows == 1)
                multiply_streams(from, columns, outputs / STREAMS, x, 1, y, stride);
            else
                multiply_streams(from, columns, outputs / STREAMS, x, rows, y, stride);
            o = outputs / STREAMS * STREAMS;
        }
        configure(height, rows);
        for (; o + height <= outputs; o += height)
            multiply_one(from + (size_t)o * row_bytes, columns, height, x, rows, y + o, stride);
        if (o < outputs) {
            configure(outputs - o, rows);
            multiply_one(from + (size_t)o * row_bytes, columns, outputs - o, x, rows, y + o,
                         stride);
        }
    }
    _tile_release();
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
