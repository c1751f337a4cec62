/* weights.c: binds tensors by name, dtype and shape. */
#include "weights.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

void weight_store_init(struct weight_store *store, struct backend *backend)
{
    memset(store, 0, sizeof *store);
    store->backend = backend;
}

void weight_store_release(struct weight_store *store)
{
    if (!store->backend) return;
    const struct backend_ops *ops = store->backend->ops;
    for (int i = 0; i < store->n_matrices; ++i)
        ops->release_matrix(store->backend, &store->matrices[i]);
    for (int i = 0; i < store->n_blocks; ++i)
        ops->release(store->backend, store->blocks[i].memory, store->blocks[i].bytes);
    free(store->matrices);
    free(store->blocks);
    memset(store, 0, sizeof *store);
}

static int grow(void **array, int count, int *capacity, size_t element)
{
    if (count < *capacity) return 1;
    int larger = *capacity ? *capacity * 2 : 64;
    void *moved = realloc(*array, (size_t)larger * element);
    if (!moved) return 0;
    *array = moved;
    *capacity = larger;
    return 1;
}

void *weight_store_allocate(struct weight_store *store, size_t bytes)
{
    if (bytes == 0) bytes = 1;
    void *memory = NULL;
    if (grow((void **)&store->blocks, store->n_blocks, &store->block_capacity,
             sizeof *store->blocks))
        memory = store->backend->ops->allocate(store->backend, bytes);
    if (!memory) {
        moshi_fail(MOSHI_ERROR_MEMORY, "%zu bytes for weights could not be had", bytes);
        return NULL;
    }
    store->blocks[store->n_blocks++] = (struct weight_block){memory, bytes};
    store->private_bytes += (int64_t)bytes;
    return memory;
}

static struct tensor *find(struct weight_loader *loader, const char *name)
{
    struct tensor *tensor = tensor_file_find(loader->file, name);
    if (tensor && !tensor->used) {
        tensor->used = 1;
        loader->store->parameters += tensor->elements;
    }
    return tensor;
}

struct tensor *weights_find(struct weight_loader *loader, const char *format, ...)
{
    char name[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    return loader->status ? NULL : find(loader, name);
}

struct tensor *weights_need(struct weight_loader *loader, const char *format, ...)
{
    if (loader->status) return NULL;
    char name[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    struct tensor *tensor = find(loader, name);
    if (!tensor)
        loader->status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                    "%s: tensor %s is missing, expected by the config",
                                    tensor_file_path(loader->file), name);
    return tensor;
}

/* Whether any of n numbers of `bytes` each has all bits of its exponent set: infinity or NaN. */
static int any_not_finite(const void *data, size_t bytes, uint32_t exponent, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits = 0;
        memcpy(&bits, (const char *)data + i * bytes, bytes);
        bad |= (bits & exponent) == exponent;
    }
    return bad != 0;
}

static int check_finite(struct weight_loader *loader, const struct tensor *tensor)
{
    const size_t n = (size_t)tensor->elements;
    int bad = tensor->dtype == TENSOR_F32   ? any_not_finite(tensor->data, 4, 0x7f800000u, n)
              : tensor->dtype == TENSOR_F16 ? any_not_finite(tensor->data, 2, 0x7c00u, n)
                                            : any_not_finite(tensor->data, 2, 0x7f80u, n);
    if (!bad) return MOSHI_OK;
    int64_t at = 0, count = 0;
    for (int64_t i = tensor->elements; i-- > 0;)
        if (!isfinite(tensor_element(tensor, i))) {
            at = i;
            ++count;
        }
    return loader->status = moshi_fail(
               MOSHI_ERROR_CHECKPOINT,
               "%s: tensor %s has %f at element %lld and %lld such values, expected finite numbers",
               tensor_file_path(loader->file), tensor->name, (double)tensor_element(tensor, at),
               (long long)at, (long long)count);
}

int weights_check(struct weight_loader *loader, const struct tensor *tensor, int n_dims,
                  const int64_t *dims)
{
    if (loader->status || !tensor) return loader->status ? loader->status : MOSHI_ERROR_INTERNAL;
    int same = tensor->n_dims >= n_dims;
    for (int i = 0; same && i < tensor->n_dims; ++i)
        same = tensor->dims[i] == (i < n_dims ? dims[i] : 1);
    if (!same) {
        char found[128], expected[128];
        return loader->status = moshi_fail(
                   MOSHI_ERROR_CHECKPOINT, "%s: tensor %s has shape %s, expected %s by the config",
                   tensor_file_path(loader->file), tensor->name,
                   tensor_shape_text(tensor->dims, tensor->n_dims, found, sizeof found),
                   tensor_shape_text(dims, n_dims, expected, sizeof expected));
    }
    if (tensor->dtype != TENSOR_F32 && tensor->dtype != TENSOR_F16 && tensor->dtype != TENSOR_BF16)
        return loader->status = moshi_fail(
                   MOSHI_ERROR_CHECKPOINT,
                   "%s: tensor %s is stored as %s, expected F32, F16 or BF16",
                   tensor_file_path(loader->file), tensor->name, tensor_dtype_name(tensor->dtype));
    return loader->check_finite ? check_finite(loader, tensor) : MOSHI_OK;
}

static enum weight_format format_of(const struct tensor *tensor)
{
    return tensor->dtype == TENSOR_F32   ? WEIGHT_F32
           : tensor->dtype == TENSOR_F16 ? WEIGHT_F16
                                         : WEIGHT_BF16;
}

/* Tensors may start at any byte; what is read as numbers must be aligned to its element. */
static int aligned(const struct tensor *tensor)
{
    return (uintptr_t)tensor->data % tensor_dtype_bytes(tensor->dtype) == 0;
}

float tensor_element(const struct tensor *tensor, int64_t i)
{
    const char *at = (const char *)tensor->data + (size_t)i * tensor_dtype_bytes(tensor->dtype);
    uint16_t half;
    float single;
    switch (tensor->dtype) {
    case TENSOR_F16:
        memcpy(&half, at, 2);
        return f16_to_f32(half);
    case TENSOR_BF16:
        memcpy(&half, at, 2);
        return bf16_to_f32(half);
    default:
        memcpy(&single, at, 4);
        return single;
    }
}

static void convert(struct weight_loader *loader, const struct tensor *tensor,
                    enum weight_format format, struct matrix *matrix)
{
    size_t bytes = (size_t)tensor->elements * weight_bytes(format);
    void *memory = weight_store_allocate(loader->store, bytes);
    if (!memory) {
        loader->status = MOSHI_ERROR_MEMORY;
        return;
    }
    if (aligned(tensor)) {
        weight_convert(format_of(tensor), tensor->data, format, memory, (size_t)tensor->elements);
    } else {
        for (int64_t i = 0; i < tensor->elements; ++i) {
            float value = tensor_element(tensor, i);
            weight_convert(WEIGHT_F32, &value, format,
                           (char *)memory + (size_t)i * weight_bytes(format), 1);
        }
    }
    matrix->format = format;
    matrix->data = memory;
}

static enum weight_format wanted_format(const struct weight_loader *loader,
                                        const struct tensor *tensor)
{
    switch (loader->dtype) {
    case MOSHI_F32:
        return WEIGHT_F32;
    case MOSHI_F16:
        return WEIGHT_F16;
    case MOSHI_BF16:
        return WEIGHT_BF16;
    default:
        return format_of(tensor);
    }
}

static void prepare(struct weight_loader *loader, struct matrix *matrix, int pack)
{
    if (loader->status) return;
    struct weight_store *store = loader->store;
    if (!grow((void **)&store->matrices, store->n_matrices, &store->matrix_capacity,
              sizeof *store->matrices)) {
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the list of matrices");
        return;
    }
    loader->status = store->backend->ops->prepare_matrix(store->backend, matrix, pack);
    if (loader->status) return;
    if (matrix->packed) matrix->data = NULL; /* the file may be closed */
    store->matrices[store->n_matrices++] = *matrix;
    store->matrix_bytes += (int64_t)matrix->rows * matrix->cols *
                           (int64_t)weight_bytes(matrix->format);
}

void weights_matrix(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                    struct matrix *matrix)
{
    memset(matrix, 0, sizeof *matrix);
    int64_t dims[2] = {rows, cols};
    if (weights_check(loader, tensor, 2, dims)) return;
    matrix->rows = rows;
    matrix->cols = cols;
    enum weight_format format = wanted_format(loader, tensor);
    if (format == format_of(tensor) && aligned(tensor)) {
        matrix->format = format;
        matrix->data = tensor->data;
    } else {
        convert(loader, tensor, format, matrix);
    }
    prepare(loader, matrix, loader->pack);
}

void weights_table(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                   struct matrix *matrix)
{
    memset(matrix, 0, sizeof *matrix);
    int64_t dims[2] = {rows, cols};
    if (weights_check(loader, tensor, 2, dims)) return;
    matrix->rows = rows;
    matrix->cols = cols;
    enum weight_format stored = format_of(tensor), format = wanted_format(loader, tensor);
    /* A wider copy of a table would hold the same numbers. */
    if (aligned(tensor) && (format == stored || format == WEIGHT_F32)) {
        matrix->format = stored;
        matrix->data = tensor->data;
    } else {
        convert(loader, tensor, format, matrix);
    }
    prepare(loader, matrix, 0);
}

void weights_matrix_from(struct weight_loader *loader, float *values, int rows, int cols,
                         struct matrix *matrix)
{
    memset(matrix, 0, sizeof *matrix);
    matrix->format = WEIGHT_F32;
    matrix->rows = rows;
    matrix->cols = cols;
    size_t bytes = (size_t)rows * (size_t)cols * sizeof *values;
    void *memory = NULL;
    if (!loader->status && !loader->pack) {
        memory = weight_store_allocate(loader->store, bytes);
        if (memory)
            loader->store->backend->ops->upload(loader->store->backend, memory, values, bytes);
        else
            loader->status = MOSHI_ERROR_MEMORY;
    }
    matrix->data = memory ? memory : values;
    prepare(loader, matrix, loader->pack);
    if (!memory) matrix->data = NULL;
    free(values);
}

const float *weights_vector(struct weight_loader *loader, struct tensor *tensor, int64_t count)
{
    if (loader->status || !tensor) return NULL;
    if (tensor->elements != count) {
        char found[128];
        loader->status = moshi_fail(
            MOSHI_ERROR_CHECKPOINT,
            "%s: tensor %s has shape %s, expected %lld elements by the config",
            tensor_file_path(loader->file), tensor->name,
            tensor_shape_text(tensor->dims, tensor->n_dims, found, sizeof found), (long long)count);
        return NULL;
    }
    if (weights_check(loader, tensor, tensor->n_dims, tensor->dims)) return NULL;
    struct matrix rounded = {0}, vector = {0};
    /* A model cast to 16 bits upstream has its norms cast too. */
    enum weight_format format = wanted_format(loader, tensor);
    if (format != WEIGHT_F32 && format != format_of(tensor)) {
        convert(loader, tensor, format, &rounded);
        struct tensor cast = *tensor;
        cast.dtype = format == WEIGHT_F16 ? TENSOR_F16 : TENSOR_BF16;
        cast.data = rounded.data;
        if (!loader->status) convert(loader, &cast, WEIGHT_F32, &vector);
    } else {
        convert(loader, tensor, WEIGHT_F32, &vector);
    }
    return loader->status ? NULL : vector.data;
}

void weights_finish(struct weight_loader *loader)
{
    if (loader->status) return;
    for (int i = 0; i < tensor_file_count(loader->file); ++i) {
        const struct tensor *tensor = tensor_file_at(loader->file, i);
        if (!tensor->used) {
            loader->status =
                moshi_fail(MOSHI_ERROR_CHECKPOINT,
                           "%s: tensor %s is not part of the model that the config describes",
                           tensor_file_path(loader->file), tensor->name);
            return;
        }
    }
}
