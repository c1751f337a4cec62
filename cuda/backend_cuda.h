/* backend_cuda.h: what the files of the CUDA backend share.
 *
 * Every operation becomes launches of kernels that take one struct by value. A stage's operations are
 * first walked without launching anything: the hash of all launches (kernel, sizes, parameters) names
 * the graph that does them. A graph that is known is launched; another one is captured. So a stage
 * that enqueues the same work twice is captured once, whatever it is called. Parameters therefore
 * begin as zeros (`blank`), padding and all. */
#ifndef MOSHI_CUDA_BACKEND_CUDA_H
#define MOSHI_CUDA_BACKEND_CUDA_H

#include <stddef.h>
#include <string.h>

#include <mutex>

#include "host_shim.h"

extern "C" {
#include "../csrc/cuda.h"
}

#define GRAPHS 64 /* kept; the one that was not used for longest makes room */
#define STAGING_BYTES (size_t)(4 << 20)
#define GATHERED 160 /* pieces that one launch does */
/* Of one pass: four tiles of many.cu, so that weights are read once for 40 s. */
#define GIVEN_ROWS 512

enum cuda_trouble { TROUBLE_NONE, TROUBLE_TOKEN, TROUBLE_LOGITS, TROUBLE_WEIGHT };

/* Written by kernels, read by the host when it has waited for them; in memory of the host that the
 * card sees. */
struct cuda_report {
    int trouble, row, found, expected;
};

/* An upload, whose bytes wait in the staging memory; a copy within the card; a fill. */
struct cuda_piece {
    char *to;
    const char *from; /* or NULL: fill */
    size_t bytes;
    int fill; /* a byte */
};

/* A piece of a range that gets memory at once; `pages` of the model's lie in it, at least in part. */
struct cuda_unit {
    virtual_handle handle;
    int pages;
};

/* Addresses for memory that grows. */
struct cuda_range {
    struct cuda_range *next;
    char *base;
    size_t bytes, unit;
    struct cuda_unit units[1];
};

enum cuda_mode { CUDA_DIRECT, CUDA_WALK, CUDA_CAPTURE };

struct cuda_graph {
    uint64_t hash; /* of its launches */
    uint64_t key; /* of the argument of the stage that was looked at last and gave them, or 0 */
    uint64_t used; /* when */
    cudaGraphExec_t executable;
};

struct cuda_backend {
    struct backend base;
    int card, processors;
    bool early; /* kernels start before earlier ones have ended, and wait for them */
    bool depth_kernel; /* a depth pass of few rows is one kernel */
    bool groups; /* products by warpgroups; only on compute capability 9.0 */
    size_t shared_limit; /* bytes that a block may have */
    cudaStream_t stream;
    std::mutex lock; /* a copy from another thread must not fall into a capture */
    enum cuda_mode mode;
    uint64_t hash, runs, releases;
    struct cuda_graph graphs[GRAPHS];
    int n_graphs;
    char *scratch; /* counters, then memory of one operation */
    size_t counter_bytes, counters_wanted, scratch_bytes, scratch_wanted;
    const void **moved; /* rows of matrices that prepare_matrix brought to the card */
    int n_moved, moved_capacity;
    char *staging; /* pinned: where uploads wait and downloads arrive */
    size_t staged;
    struct cuda_piece pieces[GATHERED]; /* what is still to be done, in any order */
    int n_pieces;
    struct virtual_memory virtual_memory;
    struct cuda_range *ranges;
    char *landing; /* on the card, as large: where what crosses together arrives or comes from */
    struct cuda_report *report;
    int (*fail)(int status, const char *sentence);
    char isa[16], device[24];
};

static inline struct cuda_backend *cuda_of(struct backend *backend)
{
    return (struct cuda_backend *)backend;
}

/* What an entry of the table holds while it works: the lock, and the card as the current one. */
struct cuda_turn {
    std::lock_guard<std::mutex> lock;

    explicit cuda_turn(struct cuda_backend *cuda) : lock(cuda->lock)
    {
        cudaSetDevice(cuda->card);
    }
};

/* While it lives, a failure that stuck before is put aside. */
struct cuda_own_failures {
    struct cuda_backend *cuda;
    int earlier;
    char sentence[sizeof cuda->base.sentence];

    explicit cuda_own_failures(struct cuda_backend *of) : cuda(of), earlier(of->base.failure)
    {
        memcpy(sentence, cuda->base.sentence, sizeof sentence);
        cuda->base.failure = MOSHI_OK;
    }

    /* The status of what has failed since, which is told here and nowhere else. */
    int report(void)
    {
        const int status = cuda->base.failure;

        cuda->base.failure = MOSHI_OK;
        return status ? cuda->fail(status, cuda->base.sentence) : MOSHI_OK;
    }

    ~cuda_own_failures()
    {
        if (!earlier) return;
        cuda->base.failure = earlier;
        memcpy(cuda->base.sentence, sentence, sizeof sentence);
    }
};

/* Sticks the first failure to the backend, as backend_fail does on the other side. */
void cuda_fail(struct cuda_backend *cuda, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* The same for an error of the runtime; returns whether there was none. */
bool cuda_good(struct cuda_backend *cuda, cudaError_t error, const char *what);
/* Device memory for the operation that is being enqueued: counters, which are zero and which its
 * kernels leave at zero, and `bytes` of garbage. */
struct cuda_scratch {
    char *counters, *memory;
};
struct cuda_scratch cuda_take_scratch(struct cuda_backend *cuda, size_t counters, size_t bytes);
/* Whether a row of that many columns fits into a block's shared memory; fails otherwise. */
bool cuda_fits(struct cuda_backend *cuda, const char *name, size_t shared);

void cuda_hash(struct cuda_backend *cuda, const void *bytes, size_t count);
int cuda_run(struct backend *backend, int stage, void (*stage_function)(struct backend *, void *),
             void *arg, size_t arg_bytes);
void cuda_forget_graphs(struct cuda_backend *cuda);
/* Sticks the sentence about it to the backend. */
void cuda_out_of_memory(struct cuda_backend *cuda, size_t bytes);
/* Whether it was memory of cuda_allocate_pages; nothing uses it any more. */
bool cuda_release_pages(struct cuda_backend *cuda, void *memory);
/* Device memory of any content; NULL after a sentence that says what was needed and what is free. */
void *cuda_take(struct cuda_backend *cuda, size_t bytes);
/* That release_matrix gives those rows back; whether it was so. */
int cuda_remember(struct cuda_backend *cuda, const void *rows);
int cuda_forget(struct cuda_backend *cuda, const void *rows);
/* An upload and a fill, under the lock. */
void cuda_send(struct cuda_backend *cuda, void *device, const void *host, size_t bytes);
void cuda_fill(struct cuda_backend *cuda, void *device, int byte, size_t bytes);
/* Enqueues what was gathered: before anything that could read it or write to the same place. */
void cuda_flush(struct cuda_backend *cuda);
/* kernel_architecture of the library's kernels, which are all built alike. */
int cuda_kernel_architecture(void);
/* Waits for the stream; whether it went well. What kernels reported is left for whoever runs them. */
bool cuda_drain(struct cuda_backend *cuda);
/* And looks at what they reported. */
void cuda_wait(struct cuda_backend *cuda);

template <class P> static inline P blank(void)
{
    P params;

    memset((void *)&params, 0, sizeof params);
    return params;
}

template <class P>
static inline void launch(struct cuda_backend *cuda, void (*kernel)(P), dim3 grid, unsigned threads,
                          size_t shared, const P &params, bool together = false)
{
    static_assert(sizeof params <= MOST_PARAMETERS, "a kernel's parameters");
    if (cuda->base.failure) return;
    if (cuda->mode == CUDA_WALK) {
        const uint64_t sizes[] = {
            (uint64_t)(uintptr_t)kernel, grid.x, grid.y, grid.z, threads, shared};

        cuda_hash(cuda, sizes, sizeof sizes);
        cuda_hash(cuda, &params, sizeof params);
        return;
    }
    cuda_good(cuda,
              launch_kernel(kernel, grid, dim3(threads), shared, cuda->stream,
                            cuda->early && !together, together, params),
              "a launch");
}

__host__ __device__ static inline int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

__host__ __device__ static inline int round_up(int a, int b)
{
    return ceil_div(a, b) * b;
}

void *cuda_allocate_pages(struct backend *backend, size_t bytes, size_t page_bytes);
int cuda_commit(struct backend *backend, void *memory, size_t bytes);
void cuda_decommit(struct backend *backend, void *const *pages, int count, size_t page_bytes);
int cuda_probe(struct backend *backend, size_t bytes, double (*clock)(void), double *read_rate,
               double *copy_rate);
int cuda_cublaslt(struct backend *backend, const struct cuda_peer_product *product,
                  double (*clock)(void), double *seconds, char *found, size_t capacity);
void cuda_upload(struct backend *backend, void *device, const void *host, size_t bytes);
void cuda_download(struct backend *backend, void *host, const void *device, size_t bytes);
int cuda_download_pieces(struct backend *backend, const struct device_piece *pieces, int count);
void cuda_copy(struct backend *backend, void *to, const void *from, size_t bytes);
void cuda_clear(struct backend *backend, void *device, int byte, size_t bytes);
void cuda_embed(struct backend *backend, const struct op_embed *op);
void cuda_norm(struct backend *backend, const struct op_norm *op);
void cuda_linear(struct backend *backend, const struct op_linear *op);
void cuda_linear_many(struct backend *backend, const struct op_linear_many *op);
void cuda_linear_residual(struct backend *backend, const struct op_linear_residual *op);
void cuda_linear_gated(struct backend *backend, const struct op_linear_gated *op);
void cuda_rope(struct backend *backend, const struct op_rope *op);
void cuda_qkv(struct backend *backend, const struct op_qkv *op);
void cuda_attend(struct backend *backend, const struct op_attend *op);
void cuda_conv(struct backend *backend, const struct op_conv *op);
void cuda_conv_transposed(struct backend *backend, const struct op_conv_transposed *op);
void cuda_rvq_encode(struct backend *backend, const struct op_rvq_encode *op);
void cuda_rvq_decode(struct backend *backend, const struct op_rvq_decode *op);
void cuda_delay_input(struct backend *backend, const struct op_delay_input *op);
void cuda_delay_output(struct backend *backend, const struct op_delay_output *op);
void cuda_delay_given(struct backend *backend, const struct op_delay_input *in,
                      const struct op_delay_output *out, int frames);
void cuda_advance(struct backend *backend, const struct op_advance *op);
void cuda_sample(struct backend *backend, const struct op_sample *op);
void cuda_softmax(struct backend *backend, const struct op_softmax *op);
int cuda_depth(struct backend *backend, const struct op_depth *op);

/* Rows of activations times a matrix: row (i, t) of A begins at x + i * row_stride + t * step_stride.
 * What becomes of a sum v of output o: (activation(v + bias[o % bias_period])) * scale[o] + from[o],
 * each where it is given, goes to y[row * y_stride + o]. from == y is fine. */
struct product_rows {
    const float *x;
    int rows, steps;
    long row_stride, step_stride;
    struct norm norm;
    const float *bias, *scale, *from;
    int bias_period, gelu;
    float *y;
    long y_stride;
};

void cuda_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                  const struct product_rows *rows);
/* The same sums for many rows of a small matrix, by tiles; no norm. */
void cuda_tiles(struct cuda_backend *cuda, const struct matrix *weight,
                const struct product_rows *rows);

#endif
