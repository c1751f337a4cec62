/* blocks.cu: makes the formats of blocks.h, on the card: of rows, with the codes and
 * scales that the CPU gives them (csrc/cpu/quantise.h), or of the panels of a converted file. A matrix
 * comes to the card in pieces, and each is gone when it is made. */
#include "blocks.h"
#include "device.h"

#define THREADS 128
#define WARPS (THREADS / WARP)
#define PIECE_BYTES ((size_t)64 << 20)

struct making {
    const void *source; /* rows or panels, from row `first` on */
    const float *scales; /* of int8 or fp8 rows, from row `first` on; or NULL */
    unsigned char *to;
    int format; /* of rows */
    int first, rows, columns;
    struct cuda_report *report;
};

__device__ static float fp8_to_float(unsigned code)
{
    return __uint_as_float(widen_fp8(code).x << 16);
}

__device__ static float source_value(const struct making &p, int row, int column)
{
    long at = (long)(row - p.first) * p.columns + column;

    switch (p.format) {
    case WEIGHT_F32:
        return ((const float *)p.source)[at];
    case WEIGHT_F16:
        return widen(((const struct f16 *)p.source)[at]);
    case WEIGHT_BF16:
        return widen(((const struct bf16 *)p.source)[at]);
    case WEIGHT_FP8:
        return (p.scales ? p.scales[row - p.first] : 1) *
               fp8_to_float(((const unsigned char *)p.source)[at]);
    default:
        return p.scales[row - p.first] * widen(((const int8_t *)p.source)[at]);
    }
}

__device__ static unsigned magnitude(float value)
{
    return __float_as_uint(value) & 0x7fffffffu;
}

__device__ static bool is_finite(float value)
{
    return magnitude(value) < 0x7f800000u;
}

/* The nearest code; the sum has no bits for a fraction, so adding rounds. */
__device__ static int code_of(float value, float scale, int least, int most)
{
    float inverse = scale != 0 ? 1 / scale : 0;
    int code = (int)(__float_as_uint(value * inverse + 12582912.0f) - 0x4b400000u);

    code = code < least ? least : code;
    return code > most ? most : code;
}

/* Where a row begins in its octet's chunk that has the column. */
template <enum weight_format F>
__device__ static unsigned char *chunk_of(const struct making &p, int row, int column)
{
    return p.to + row / OCTET * octet_bytes<F>(p.columns) + block<F>::HEAD +
           (long)(column / CHUNK) * block<F>::BYTES;
}

/* Codes of column c of two groups side by side, the first of them at column `at`. */
template <enum weight_format F>
__device__ static void store_codes(const struct making &p, int row, int at, int c, int first,
                                   int second)
{
    unsigned char *to = chunk_of<F>(p, row, at) + block<F>::SCALES + row % OCTET * TILE;
    int tile = at % CHUNK / TILE, place = c / 8 * 16 + c % 8;

    if (F == WEIGHT_Q4) {
        to[place + tile * 8] = (unsigned char)((first & 15) | (second & 15) << 4);
    } else {
        to[tile * OCTET * TILE + place] = (unsigned char)first;
        to[tile * OCTET * TILE + place + 8] = (unsigned char)second;
    }
}

template <enum weight_format F>
__device__ static void store_scale(const struct making &p, int row, int at, uint16_t scale)
{
    uint16_t *scales = (uint16_t *)(void *)chunk_of<F>(p, row, at);

    scales[row % OCTET * CHUNK_GROUPS + at % CHUNK / GROUP] = scale;
}

template <enum weight_format F>
__device__ static void store_row_scale(const struct making &p, int row, float scale)
{
    ((float *)(void *)(p.to + row / OCTET * octet_bytes<F>(p.columns)))[row % OCTET] = scale;
}

/* Scale and code of one group, by a warp; q4: the weight farthest from 0 becomes code -8, which has no
 * opposite. */
template <enum weight_format F>
__device__ static int make_group(const struct making &p, int row, int at, float value)
{
    /* The largest magnitude, and whether a weight has it that is not negative. */
    unsigned most = warp_max(magnitude(value) << 1 | (value >= 0));
    float largest = __uint_as_float(most >> 1);
    uint16_t scale = float_to_half(largest / (F != WEIGHT_Q4 ? 127.0f : most & 1 ? -8.0f : 8.0f));

    if (threadIdx.x % WARP == 0) {
        store_scale<F>(p, row, at, scale);
        if (!is_finite(half_to_float(scale))) p.report->trouble = TROUBLE_WEIGHT;
    }
    return F == WEIGHT_Q4 ? code_of(value, half_to_float(scale), -8, 7)
                          : code_of(value, half_to_float(scale), -127, 127);
}

/* As csrc/quant.h has it; rows of fp8 keep their codes. */
__device__ static int make_fp8(const struct making &p, int row, int column, int there, float value,
                               float scale)
{
    if (!there) return 0;
    if (p.format == WEIGHT_FP8)
        return ((const unsigned char *)p.source)[(long)(row - p.first) * p.columns + column];
    value = scale != 0 ? value * (1 / scale) : 0;
    unsigned bits = magnitude(value), normal, below;

    normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    below = __float_as_uint(__uint_as_float(bits) + 16384.0f) - 0x46800000u;
    bits = bits < 0x3c800000u ? below : normal;
    return (int)(__float_as_uint(value) >> 24 & 0x80u) | (int)(bits < 0x7eu ? bits : 0x7eu);
}

/* The scale of a whole row; its own where it is of that format already. */
template <enum weight_format F>
__device__ static float row_scale(const struct making &p, int row, float largest)
{
    if (F == WEIGHT_FP8 && p.format == WEIGHT_FP8) return p.scales ? p.scales[row - p.first] : 1;
    if (F == WEIGHT_FP8) return largest < FP8_LEAST_ROW ? 0 : largest / FP8_MOST;
    return p.format == WEIGHT_INT8 ? p.scales[row - p.first] : largest / 127;
}

/* Grid: rows, up to whole octets. Bytes: the rows, for scales of rows twice, and the blocks. */
template <enum weight_format F>
__global__ static void __launch_bounds__(THREADS)
    k_make_blocks(const __grid_constant__ struct making p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    int row = p.first + (int)blockIdx.x, lane = (int)threadIdx.x % WARP, inside = row < p.rows;
    float scale = 0;

    if (block<F>::OF_ROWS) {
        unsigned *parts = (unsigned *)(void *)shared, most = 0;

        for (int k = (int)threadIdx.x; k < p.columns && inside; k += THREADS) {
            unsigned bits = magnitude(source_value(p, row, k));

            most = bits > most ? bits : most;
        }
        most = warp_max(most);
        if (lane == 0) parts[threadIdx.x / WARP] = most;
        __syncthreads();
        for (int i = 0; i < WARPS; i++) most = parts[i] > most ? parts[i] : most;
        scale = inside ? row_scale<F>(p, row, __uint_as_float(most)) : 0;
        if (threadIdx.x == 0) {
            store_row_scale<F>(p, row, scale);
            if (most >= 0x7f800000u || !is_finite(scale)) p.report->trouble = TROUBLE_WEIGHT;
        }
    }
    for (int at = (int)threadIdx.x / WARP * TILE; at < round_up(p.columns, CHUNK);
         at += WARPS * TILE) {
        int codes[2];

#pragma unroll
        for (int group = 0; group < 2; group++) {
            int column = at + group * GROUP + lane, there = inside && column < p.columns;
            float value = there ? source_value(p, row, column) : 0;

            codes[group] = F == WEIGHT_FP8    ? make_fp8(p, row, column, there, value, scale)
                           : F == WEIGHT_INT8 ? code_of(value, scale, -127, 127)
                                              : make_group<F>(p, row, at + group * GROUP, value);
        }
        store_codes<F>(p, row, at, lane, codes[0], codes[1]);
    }
}

/* A code of a panel of quant.h, whose tile begins at `tile`. */
template <enum weight_format F>
__device__ static int panel_code(const unsigned char *tile, int row, int group, int c)
{
    int chunk = c / 4 + (F == WEIGHT_Q4 ? 0 : group * (GROUP / 4));
    int code = tile[(F == WEIGHT_INT8 ? 0 : 4 * PANEL) + (chunk * PANEL + row) * 4 + c % 4];

    if (F == WEIGHT_Q4) return (group ? code >> 4 : code & 15) - 8;
    return code - 128;
}

/* The same of panels, whose codes and scales are kept. Bytes: those of both forms. */
template <enum weight_format F>
__global__ static void __launch_bounds__(THREADS)
    k_take_panels(const __grid_constant__ struct making p)
{
    after_earlier_kernels();
    const int head = F == WEIGHT_INT8 ? PANEL * 4 : 0, in_tile = F == WEIGHT_INT8 ? 0 : 4 * PANEL;
    const int tile_bytes = in_tile + PANEL * TILE / (F == WEIGHT_Q4 ? 2 : 1);
    int row = p.first + (int)blockIdx.x, lane = (int)threadIdx.x % WARP, inside = row < p.rows;
    int tiles = (p.columns + TILE - 1) / TILE;
    const unsigned char *panel = (const unsigned char *)p.source +
                                 (row - p.first) / PANEL * (head + (long)tiles * tile_bytes);

    row %= PANEL;
    int to = p.first + (int)blockIdx.x;

    if (F == WEIGHT_INT8 && threadIdx.x == 0)
        store_row_scale<F>(p, to, inside ? ((const float *)(const void *)panel)[row] : 0);
    for (int at = (int)threadIdx.x / WARP * TILE; at < round_up(p.columns, CHUNK);
         at += WARPS * TILE) {
        const unsigned char *tile = panel + head + (long)(at / TILE) * tile_bytes;
        int there = inside && at < p.columns, codes[2] = {};

        for (int group = 0; group < 2; group++) {
            if (there) codes[group] = panel_code<F>(tile, row, group, lane);
            if (F != WEIGHT_INT8 && lane == 0)
                store_scale<F>(p, to, at + group * GROUP,
                               there ? ((const uint16_t *)(const void *)tile)[group * PANEL + row]
                                     : 0);
        }
        store_codes<F>(p, to, at, lane, codes[0], codes[1]);
    }
}

/* ---- the host's side -------------------------------------------------------------------- */

template <enum weight_format F>
static void launch_making(struct cuda_backend *cuda, const struct making &p, int count, bool panels)
{
    launch(cuda, panels ? k_take_panels<F> : k_make_blocks<F>, dim3((unsigned)count), THREADS,
           WARPS * sizeof(unsigned), p);
}

static void make_piece(struct cuda_backend *cuda, enum weight_format format, const struct making &p,
                       int count, bool panels)
{
    if (format == WEIGHT_FP8)
        launch(cuda, k_make_blocks<WEIGHT_FP8>, dim3((unsigned)count), THREADS,
               WARPS * sizeof(unsigned), p);
    else if (format == WEIGHT_INT8)
        launch_making<WEIGHT_INT8>(cuda, p, count, panels);
    else if (format == WEIGHT_Q8)
        launch_making<WEIGHT_Q8>(cuda, p, count, panels);
    else
        launch_making<WEIGHT_Q4>(cuda, p, count, panels);
}

static size_t blocks_bytes(const struct matrix *w, enum weight_format format)
{
    size_t octets = (size_t)ceil_div(w->rows, OCTET);

    return octets * (format == WEIGHT_FP8    ? octet_bytes<WEIGHT_FP8>(w->cols)
                     : format == WEIGHT_INT8 ? octet_bytes<WEIGHT_INT8>(w->cols)
                     : format == WEIGHT_Q8   ? octet_bytes<WEIGHT_Q8>(w->cols)
                                             : octet_bytes<WEIGHT_Q4>(w->cols));
}

/* Piece after piece through `passage`, which begins with the scales of all rows. */
static void make_pieces(struct cuda_backend *cuda, const struct matrix *w,
                        enum weight_format format, unsigned char *to, char *passage,
                        size_t scale_bytes, int rows_at_once)
{
    const char *source = (const char *)(w->data ? w->data : w->packed);
    size_t unit = w->data ? (size_t)w->cols * weight_bytes(w->format) * PANEL
                          : panel_bytes(format, w->cols);
    size_t all = w->data ? (size_t)w->rows * (size_t)w->cols * weight_bytes(w->format)
                         : packed_bytes(w);
    struct making p = blank<struct making>();

    cuda_flush(cuda); /* rows may be on their way to the card */
    if (w->scales)
        cuda_good(cuda,
                  cudaMemcpyAsync(passage, w->scales, (size_t)w->rows * sizeof(float),
                                  cudaMemcpyDefault, cuda->stream),
                  "a copy");
    p.source = passage + scale_bytes;
    p.to = to;
    p.format = w->format;
    p.rows = w->rows;
    p.columns = w->cols;
    p.report = cuda->report;
    for (; p.first < w->rows && !cuda->base.failure; p.first += rows_at_once) {
        size_t begin = (size_t)(p.first / PANEL) * unit;
        size_t bytes = (size_t)(rows_at_once / PANEL) * unit;
        int count = round_up(w->rows - p.first, OCTET);

        if (bytes > all - begin) bytes = all - begin;
        cuda_good(cuda,
                  cudaMemcpyAsync(passage + scale_bytes, source + begin, bytes, cudaMemcpyDefault,
                                  cuda->stream),
                  "a copy");
        p.scales = w->scales ? (const float *)(void *)passage + p.first : NULL;
        make_piece(cuda, format, p, count < rows_at_once ? count : rows_at_once, !w->data);
    }
    cuda_wait(cuda);
}

int cuda_make_blocks(struct cuda_backend *cuda, struct matrix *w, enum weight_format format)
{
    size_t unit = w->data ? (size_t)w->cols * weight_bytes(w->format) * PANEL
                          : panel_bytes(format, w->cols);
    size_t units = PIECE_BYTES / unit, most = (size_t)ceil_div(w->rows, PANEL), scale_bytes;
    void *to = cuda_take(cuda, blocks_bytes(w, format)), *passage = NULL;
    int status;

    units = units < 1 ? 1 : units < most ? units : most;
    scale_bytes = w->scales ? ((size_t)w->rows * sizeof(float) + 255) / 256 * 256 : 0;
    if (to) passage = cuda_take(cuda, scale_bytes + units * unit);
    if (passage && cuda_remember(cuda, to))
        make_pieces(cuda, w, format, (unsigned char *)to, (char *)passage, scale_bytes,
                    (int)units * PANEL);
    cudaFree(passage);
    status = cuda->base.failure;
    cuda->base.failure = MOSHI_OK;
    if (status) {
        cuda_forget(cuda, to);
        cudaFree(to);
        cudaGetLastError();
        return cuda->fail(status, cuda->base.sentence);
    }
    *w = {format, w->rows, w->cols, NULL, NULL, to};
    return MOSHI_OK;
}
