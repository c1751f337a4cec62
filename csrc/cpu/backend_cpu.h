/* backend_cpu.h: what the files of the CPU backend share. */
#ifndef MOSHI_CPU_BACKEND_CPU_H
#define MOSHI_CPU_BACKEND_CPU_H

#include "../backend.h"
#include "kernels.h"
#include "pool.h"

/* Jobs of fewer multiply-adds than this are not worth waking a thread for. */
#define PARALLEL_WORK 16384

/* Queries that read the cache together, and how many of them may be of one head. */
#define ATTEND_QUERIES 8
#define ATTEND_STEPS 6

/* Between rows of sums of `tiles`; an odd number of lines, so that they don't share a place in
 * caches. */
#define TILE_STRIDE (TILE_OUTPUTS + 16)

/* Sums of a block of outputs, and of its second half's, of a thread that uses tiles. */
struct tile_scratch {
    _Alignas(64) float sums[2][TILE_ROWS * TILE_STRIDE];
};

/* Scratch lives from one reserve to the next and holds nothing between operations. */
struct cpu_backend {
    struct backend base;
    const struct cpu_kernels *kernels;
    struct pool *pool;
    float *activations; /* rows of a product, after norm and arrange */
    size_t activation_floats;
    float *gathered; /* the same rows as `tiles` takes them, if the kernels have any */
    size_t gathered_floats;
    struct tile_scratch *tile_scratch; /* [threads], if the kernels have tiles */
    float *fresh; /* [rows][keys, values] of MOSHI_INT8, before they become codes */
    size_t fresh_floats;
    float *scores; /* [threads][ATTEND_QUERIES][keys]: a query, then its scores */
    size_t keys;   /* a multiple of ROW_PAD */
    struct nearest {
        float distance;
        int index;
    } *nearest; /* [threads][rows] */
    size_t rows;
};

static inline struct cpu_backend *cpu_backend(struct backend *backend)
{
    return (struct cpu_backend *)backend;
}

/* As parallel_for, but on this thread alone when there is little to do. */
static inline void cpu_parallel(struct cpu_backend *cpu, pool_function *function, void *arg,
                                int tasks, double work)
{
    if (work >= PARALLEL_WORK)
        parallel_for(cpu->pool, function, arg, tasks);
    else if (tasks > 0)
        function(arg, 0, 0, tasks);
}

/* As parallel_share, likewise. */
static inline void cpu_share(struct cpu_backend *cpu, pool_function *function, void *arg, int tasks,
                             int least, double work)
{
    if (work >= PARALLEL_WORK)
        parallel_share(cpu->pool, function, arg, tasks, least);
    else if (tasks > 0)
        function(arg, 0, 0, tasks);
}

/* Y = W A for rows A[r] of `weight->cols` floats, in blocks: finish() gets the sums of one row and
 * a range of outputs, and stores what becomes of them. */
struct product {
    const struct matrix *weight;
    int n, steps; /* rows of the call, and rows of A for each of them */
    const uint8_t *active; /* [n] or NULL: all; other rows are skipped */
    const float *a; /* row (i, t) begins at a + i * row_stride + t * step_stride */
    size_t row_stride, step_stride;
    const struct norm *norm; /* applied to the rows of A first, or NULL */
    int halves; /* 2: finish gets output o and output o + W.rows/2 together */
    /* sums[count] of outputs first.. of A's row (i, t), row = i * steps + t; other: of the second
     * half. Both may be written to. */
    void (*finish)(const struct product *product, int row, int first, int count, float *sums,
                   const float *other);
    /* Or, of a whole matrix, the same for rows row.. that lie `stride` apart. */
    void (*finish_rows)(const struct product *product, int row, int rows, int first, int count,
                        const float *sums, size_t stride);
    const void *op;
    struct cpu_backend *cpu;
    int tiles; /* are used, and A is what they take */
    int chosen; /* active rows of A */
};

void product_run(struct cpu_backend *cpu, struct product *product);
/* y[W.rows] += W x for one row. */
void product_add(struct cpu_backend *cpu, const struct matrix *weight, const float *x, float *y);
/* y = norm(x) for one row; y == x is fine. */
void norm_row(const struct cpu_backend *cpu, const struct norm *norm, const float *x, int width,
              float *y);

void cpu_embed(struct backend *backend, const struct op_embed *op);
void cpu_norm(struct backend *backend, const struct op_norm *op);
void cpu_linear(struct backend *backend, const struct op_linear *op);
void cpu_linear_many(struct backend *backend, const struct op_linear_many *op);
void cpu_linear_residual(struct backend *backend, const struct op_linear_residual *op);
void cpu_linear_gated(struct backend *backend, const struct op_linear_gated *op);
void cpu_rope(struct backend *backend, const struct op_rope *op);
void cpu_qkv(struct backend *backend, const struct op_qkv *op);
void cpu_attend(struct backend *backend, const struct op_attend *op);
void cpu_conv(struct backend *backend, const struct op_conv *op);
void cpu_conv_transposed(struct backend *backend, const struct op_conv_transposed *op);
void cpu_rvq_encode(struct backend *backend, const struct op_rvq_encode *op);
void cpu_rvq_decode(struct backend *backend, const struct op_rvq_decode *op);
void cpu_delay_input(struct backend *backend, const struct op_delay_input *op);
void cpu_delay_output(struct backend *backend, const struct op_delay_output *op);
void cpu_advance(struct backend *backend, const struct op_advance *op);
void cpu_sample(struct backend *backend, const struct op_sample *op);
void cpu_softmax(struct backend *backend, const struct op_softmax *op);

/* Address of `head_dim` elements: the key (value == 0) or value of one position. */
static inline char *kv_address(const struct kv_cache *cache, int lane, int layer, int value,
                               int head, int64_t position)
{
    int64_t block = position % ((int64_t)cache->pages_per_lane * cache->page_positions);
    int page = cache->table[(size_t)lane * (size_t)cache->pages_per_lane +
                            (size_t)(block / cache->page_positions)];
    size_t plane = ((size_t)layer * 2 + (size_t)value) * (size_t)cache->kv_heads + (size_t)head;

    return (char *)cache->pages + (size_t)page * cache->page_bytes + plane * kv_plane_bytes(cache) +
           (size_t)(block % cache->page_positions) * kv_row_bytes(cache);
}

/* The scale of the row at such an address, of MOSHI_INT8. */
static inline float *kv_scale(const struct kv_cache *cache, char *row, int64_t position)
{
    size_t within = (size_t)(position % cache->page_positions);
    char *scales = row + ((size_t)cache->page_positions - within) * kv_row_bytes(cache);

    return (float *)(void *)scales + within;
}

#endif
