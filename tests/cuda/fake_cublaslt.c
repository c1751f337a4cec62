/* fake_cublaslt.c: a library with the functions of cuBLASLt that are used, which multiplies nothing but
 * looks at what it is asked: products W x of bf16 rows with sums in f32, W having ROWS x COLUMNS. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "fake_cublaslt.h"

#define PUBLIC __attribute__((visibility("default")))
#define INVALID 7

PUBLIC struct fake_cublaslt fake_cublaslt;

static struct layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
} layouts[8];
static int objects[3], transposed;
static size_t workspace;

static int take(void **object, void *it)
{
    *object = it;
    fake_cublaslt.objects++;
    return 0;
}

static int give(void)
{
    fake_cublaslt.objects--;
    return 0;
}

PUBLIC size_t cublasLtGetVersion(void)
{
    return 130102;
}

PUBLIC int cublasLtCreate(void **handle)
{
    return take(handle, &objects[0]);
}

PUBLIC int cublasLtDestroy(void *handle)
{
    (void)handle;
    return give();
}

PUBLIC int cublasLtMatmulDescCreate(void **description, int compute_type, int scale_type)
{
    transposed = 0;
    return compute_type == 68 && scale_type == 0 ? take(description, &objects[1]) : INVALID;
}

PUBLIC int cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *value,
                                          size_t bytes)
{
    int operation;

    if (description != &objects[1] || attribute != 3 || bytes != sizeof operation) return INVALID;
    memcpy(&operation, value, bytes);
    transposed = operation == 1;
    return 0;
}

PUBLIC int cublasLtMatmulDescDestroy(void *description)
{
    (void)description;
    return give();
}

PUBLIC int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns,
                                      int64_t stride)
{
    static int next;
    struct layout *it = &layouts[next++ % 8];

    *it = (struct layout){type, rows, columns, stride};
    return take(layout, it);
}

PUBLIC int cublasLtMatrixLayoutDestroy(void *layout)
{
    (void)layout;
    return give();
}

PUBLIC int cublasLtMatmulPreferenceCreate(void **preference)
{
    workspace = 0;
    return take(preference, &objects[2]);
}

PUBLIC int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value,
                                                size_t bytes)
{
    if (preference != &objects[2] || attribute != 1 || bytes != 8) return INVALID;
    memcpy(&workspace, value, bytes);
    return 0;
}

PUBLIC int cublasLtMatmulPreferenceDestroy(void *preference)
{
    (void)preference;
    return give();
}

/* y^T = W^T^T x^T, each matrix column by column. */
static int fits(const struct layout *a, const struct layout *b, const struct layout *d)
{
    return transposed && a->type == 14 && b->type == 14 && d->type == 0 &&
           a->columns == FAKE_ROWS && a->rows == FAKE_COLUMNS && b->rows == FAKE_COLUMNS &&
           d->rows == FAKE_ROWS && b->columns == d->columns && a->stride == FAKE_COLUMNS &&
           b->stride == FAKE_COLUMNS && d->stride == FAKE_ROWS;
}

PUBLIC int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b,
                                          void *c, void *d, void *preference, int wanted,
                                          void *results, int *found)
{
    (void)preference;
    if (fake_cublaslt.fault) return fake_cublaslt.fault;
    if (handle != &objects[0] || description != &objects[1] || c != d || wanted != 1 ||
        !fits(a, b, d))
        return INVALID;
    memset(results, 42, 64);
    *found = 1;
    return 0;
}

PUBLIC int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *a,
                          void *a_layout, const void *b, void *b_layout, const void *beta,
                          const void *c, void *c_layout, void *d, void *d_layout,
                          const unsigned char *algorithm, void *scratch, size_t scratch_bytes,
                          void *stream)
{
    float one, zero;

    memcpy(&one, alpha, sizeof one);
    memcpy(&zero, beta, sizeof zero);
    if (handle != &objects[0] || description != &objects[1] || !fits(a_layout, b_layout, d_layout))
        return INVALID;
    if (one != 1 || zero != 0 || c != d || c_layout != d_layout || !b || !scratch || !stream ||
        scratch_bytes != workspace || algorithm[0] != 42 || algorithm[63] != 42)
        return INVALID;
    fake_cublaslt.last = a;
    fake_cublaslt.products++;
    return 0;
}
