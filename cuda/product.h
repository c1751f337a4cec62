/* product.h: what the kernels share that multiply rows of activations by a matrix: their parameters, and
 * what becomes of the sums. product.cu has f32, f16 and int8 rows on the ordinary cores, tensor.h has
 * bf16, fp8 and the block formats on the tensor cores, many.cu many rows of activations and bf16. */
#ifndef MOSHI_CUDA_PRODUCT_H
#define MOSHI_CUDA_PRODUCT_H

#include "device.h"

#define WARPS 8
#define THREADS (WARPS * WARP)

#define TOGETHER 16 /* matrices of one launch */
#define MOST_ROWS 64 /* of activations for which tensor.h reads the weights once */
#define ARRANGED_CHUNK                                                                             \
    64 /* columns, of rows that meet bf16 weights: four bytes each, in tensor.h's order */
#define ARRANGED_TOGETHER                                                                          \
    128 /* kernels read so many at once, of which the last ones may be garbage */

/* Outputs come in pairs: 2 p and 2 p + 1, or a gate p and its value p + second. */
template <class E> struct product {
    const void *weight; /* the first one; E has the others */
    const float *row_scales; /* of int8 rows */
    int matrices; /* of one shape, that meet the same rows: the grid's third dimension */
    int pairs, outputs, columns;
    int second; /* rows of weights from a pair's first one to its second one */
    int split, aligned;
    const float *x;
    int rows, steps;
    long row_stride, step_stride;
    struct norm norm;
    const unsigned char *arranged; /* rows that are made already, or NULL: a block makes them */
    int work_bytes; /* and puts them behind so much of its shared memory */
    int stages; /* chunks that many.cu has in shared memory */
    E end;

    /* The first row of weights of a pair, and the second one; beyond the last one, the first again. */
    __device__ int first_of(int pair) const
    {
        return second == 1 ? 2 * pair : pair;
    }

    __device__ int second_of(int pair) const
    {
        int first = first_of(pair);

        return first + second < outputs ? first + second : first;
    }

    __device__ const void *matrix() const
    {
        return end.matrix(weight);
    }

    __device__ const float *input(int row) const
    {
        return x + row / steps * row_stride + row % steps * step_stride;
    }
};

/* A sum of a row. */
struct row_sum {
    const float *bias, *scale, *from;
    float *y;
    long y_stride;
    int bias_period, gelu;

    __device__ void one(long at, int o, float v) const
    {
        if (bias) v += bias[o % bias_period];
        if (gelu) v = 0.5f * v * (1.0f + erff(v * 0.70710678f));
        if (scale) v *= scale[o];
        if (from) v += from[at];
        y[at] = v;
    }

    __device__ void pair_of(long at, int pair, int outputs, float a, float b) const
    {
        one(at + 2 * pair, 2 * pair, a);
        if (2 * pair + 1 < outputs) one(at + 2 * pair + 1, 2 * pair + 1, b);
    }
};

struct row_end : row_sum {
    const void *others[TOGETHER - 1];
    long next; /* elements from the outputs of one matrix to those of the next one */

    __device__ const void *matrix(const void *first) const
    {
        return blockIdx.z ? others[blockIdx.z - 1] : first;
    }

    __device__ void store(int row, int pair, int outputs, float a, float b) const
    {
        pair_of(row * y_stride + blockIdx.z * next, pair, outputs, a, b);
    }
};

struct gate_end {
    float *y;

    __device__ const void *matrix(const void *first) const
    {
        return first;
    }

    __device__ void store(int row, int pair, int outputs, float a, float b) const
    {
        y[(long)row * (outputs / 2) + pair] = a / (1.0f + expf(-a)) * b;
    }
};

/* Queries go out, keys and values into the cache, both turned; those of an int8 cache are put aside, as
 * a row's scale needs all of it. */
struct qkv_end {
    const float *cos_sin;
    const int32_t *lane, *position;
    const uint8_t *active;
    struct kv_cache cache;
    float *q, *fresh; /* [rows][queries], [rows][2][keys] */
    int steps, layer, queries, keys; /* the last two: outputs */

    __device__ const void *matrix(const void *first) const
    {
        return first;
    }

    __device__ void one(int row, int o, float v) const
    {
        int dim = cache.head_dim, at, value;

        if (o < queries) {
            q[(long)row * queries + o] = v;
            return;
        }
        if (cache.dtype == MOSHI_INT8) {
            fresh[(long)row * 2 * keys + o - queries] = v;
            return;
        }
        if (!active[row / steps]) return;
        value = o >= queries + keys;
        at = o - queries - value * keys;
        int to = lane[row / steps], step = position[to] + row % steps;

        if (cache.dtype == MOSHI_BF16)
            narrow(v, kv_address<struct bf16>(cache, to, layer, value, at / dim, step) + at % dim);
        else
            narrow(v, kv_address<float>(cache, to, layer, value, at / dim, step) + at % dim);
    }

    __device__ void store(int row, int pair, int outputs, float a, float b) const
    {
        int o = 2 * pair;

        if (cos_sin && o < queries + keys) { /* dim is even: both are of one head */
            const float *angle = cos_sin + (long)row * cache.head_dim + o % cache.head_dim;
            float turned = a * angle[0] - b * angle[1];

            b = a * angle[1] + b * angle[0];
            a = turned;
        }
        one(row, o, a);
        if (o + 1 < outputs) one(row, o + 1, b);
    }
};

static inline const void *matrix_memory(const struct matrix *weight)
{
    return weight->packed ? weight->packed : weight->data;
}

/* bf16, fp8 or a block format. Before its own scratch memory it leaves `kept` bytes to the caller, who has
 * taken both together: tensor_scratch is its part. */
void tensor_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                    struct product<struct row_end> &p, size_t kept);
void tensor_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                    struct product<struct gate_end> &p, size_t kept);
void tensor_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                    struct product<struct qkv_end> &p, size_t kept);
/* No less than that format needs. */
size_t tensor_scratch(const struct matrix *weight, int rows);

/* Whether the card has the shared memory for it. */
bool many_product_fits(const struct cuda_backend *cuda);
/* Arranged rows (for warpgroups, if cuda->groups) times bf16 rows, both aligned to 16 bytes: what
 * tensor_product makes of them. */
void many_product(struct cuda_backend *cuda, struct product<struct row_end> &p);
void many_product(struct cuda_backend *cuda, struct product<struct gate_end> &p);
void many_product(struct cuda_backend *cuda, struct product<struct qkv_end> &p);

#endif
