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
    if (loader->copies && tensor) {
        for (int i = 0; i < LOADER_RECENT; ++i)
            if (loader->recent[i]) tensor_file_forget(loader->file, loader->recent[i]);
        loader->recent[loader->found++ % LOADER_RECENT] = tensor;
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

static int check_finite(struct weight_loader *loader, const struct tensor *tensor)
{
    if (tensor_is_finite(tensor)) return MOSHI_OK;
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

static int check_shape(struct weight_loader *loader, const struct tensor *tensor, int n_dims,
                       const int64_t *dims)
{
    if (loader->status || !tensor) return loader->status ? loader->status : MOSHI_ERROR_INTERNAL;
    int same = tensor->n_dims >= n_dims;
    for (int i = 0; same && i < tensor->n_dims; ++i)
        same = tensor->dims[i] == (i < n_dims ? dims[i] : 1);
    if (same) return MOSHI_OK;
    char found[128], expected[128];
    return loader->status = moshi_fail(
               MOSHI_ERROR_CHECKPOINT, "%s: tensor %s has shape %s, expected %s by the config",
               tensor_file_path(loader->file), tensor->name,
               tensor_shape_text(tensor->dims, tensor->n_dims, found, sizeof found),
               tensor_shape_text(dims, n_dims, expected, sizeof expected));
}

int weights_check(struct weight_loader *loader, const struct tensor *tensor, int n_dims,
                  const int64_t *dims)
{
    if (check_shape(loader, tensor, n_dims, dims)) return loader->status;
    if (tensor->dtype != TENSOR_F32 && tensor->dtype != TENSOR_F16 &&
        tensor->dtype != TENSOR_BF16 && tensor->dtype != TENSOR_F8_E4M3)
        return loader->status = moshi_fail(
                   MOSHI_ERROR_CHECKPOINT,
                   "%s: tensor %s is stored as %s, expected F32, F16, BF16 or F8_E4M3",
                   tensor_file_path(loader->file), tensor->name, tensor_dtype_name(tensor->dtype));
    /* Kernels take e4m3's NaN for a number. */
    return loader->check_finite || tensor->dtype == TENSOR_F8_E4M3 ? check_finite(loader, tensor)
                                                                   : MOSHI_OK;
}

static enum weight_format format_of(const struct tensor *tensor)
{
    return tensor->dtype == TENSOR_F32       ? WEIGHT_F32
           : tensor->dtype == TENSOR_F16     ? WEIGHT_F16
           : tensor->dtype == TENSOR_F8_E4M3 ? WEIGHT_FP8
           : tensor->dtype == TENSOR_I8      ? WEIGHT_INT8
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
    case TENSOR_I8:
        return *(const int8_t *)at;
    case TENSOR_F8_E4M3:
        return fp8_to_f32(*(const uint8_t *)at);
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

#define CONVERTED 4096 /* elements at a time, on their way to the device */

/* A copy in a float format; scales: of the rows of int8 and fp8 tensors. */
static void convert(struct weight_loader *loader, const struct tensor *tensor, const float *scales,
                    enum weight_format format, struct matrix *matrix)
{
    const struct backend_ops *ops = loader->store->backend->ops;
    const size_t element = weight_bytes(format);
    float values[CONVERTED], piece[CONVERTED];
    char *memory = weight_store_allocate(loader->store, (size_t)tensor->elements * element);
    if (!memory) {
        loader->status = MOSHI_ERROR_MEMORY;
        return;
    }
    for (int64_t done = 0; done < tensor->elements; done += CONVERTED) {
        int64_t left = tensor->elements - done;
        size_t n = left < CONVERTED ? (size_t)left : CONVERTED;
        enum weight_format from = WEIGHT_F32;
        const void *source = values;
        if (aligned(tensor) && !scales) {
            from = format_of(tensor);
            source = (const char *)tensor->data + (size_t)done * weight_bytes(from);
        } else {
            for (size_t j = 0; j < n; ++j) {
                int64_t i = done + (int64_t)j;
                values[j] = tensor_element(tensor, i) * (scales ? scales[i / matrix->cols] : 1);
            }
        }
        weight_convert(from, source, format, piece, n);
        ops->upload(loader->store->backend, memory + (size_t)done * element, piece, n * element);
    }
    matrix->format = format;
    matrix->data = memory;
    matrix->scales = NULL;
}

/* What a tensor becomes where block formats are not for it. */
static enum weight_format plain_format(const struct weight_loader *loader,
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

static enum weight_format wanted_format(const struct weight_loader *loader,
                                        const struct tensor *tensor)
{
    switch (loader->dtype) {
    case MOSHI_FP8:
        return WEIGHT_FP8;
    case MOSHI_INT8:
        return WEIGHT_INT8;
    case MOSHI_Q8:
        return WEIGHT_Q8;
    case MOSHI_Q4:
        return WEIGHT_Q4;
    default:
        return plain_format(loader, tensor);
    }
}

/* Hands a matrix to the backend; `format` as it shall be read. Panels that the backend leaves where
 * they are stay the file's. */
static void prepare(struct weight_loader *loader, struct matrix *matrix, enum weight_format format,
                    int pack)
{
    if (loader->status) return;
    struct weight_store *store = loader->store;
    const struct backend_ops *ops = store->backend->ops;
    const void *panels = matrix->packed;
    if (!grow((void **)&store->matrices, store->n_matrices, &store->matrix_capacity,
              sizeof *store->matrices)) {
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the list of matrices");
        return;
    }
    loader->status = (is_block_format(format) && !panels) || format != matrix->format
                         ? ops->quantise_matrix(store->backend, matrix, format)
                         : ops->prepare_matrix(store->backend, matrix, pack);
    if (loader->status) return;
    if (!panels || matrix->packed != panels) store->matrices[store->n_matrices++] = *matrix;
    store->matrix_bytes += (int64_t)matrix_bytes(matrix);
}

/* Where the scales of an int8 or fp8 tensor's rows are, or NULL. An int8 tensor needs them. */
static struct tensor *find_scales(struct weight_loader *loader, const struct tensor *tensor,
                                  int64_t rows)
{
    if (loader->status) return NULL;
    if (tensor->dtype == TENSOR_I8) {
        struct tensor *scales = weights_need(loader, "%s_scb", tensor->name);
        return weights_check(loader, scales, 1, &rows) ? NULL : scales;
    }
    if (tensor->dtype != TENSOR_F8_E4M3) return NULL;
    struct tensor *scales = weights_find(loader, "%s_scale", tensor->name);
    if (!scales) scales = weights_find(loader, "%s_scale_inv", tensor->name);
    if (!scales) return NULL;
    if (scales->elements == 1) rows = 1;
    if (weights_check(loader, scales, scales->n_dims > 0, &rows)) return NULL;
    return check_finite(loader, scales) ? NULL : scales;
}

/* The scales themselves, from malloc; NULL without. _scb has 127 times as much. */
static float *row_scales(struct weight_loader *loader, const struct tensor *tensor, int64_t rows)
{
    const struct tensor *stored = find_scales(loader, tensor, rows);
    if (!stored) return NULL;
    float *scales = malloc((size_t)rows * sizeof *scales);
    if (!scales) {
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %s", stored->name);
        return NULL;
    }
    const float unit = tensor->dtype == TENSOR_I8 ? 127 : 1;
    for (int64_t i = 0; i < rows; ++i)
        scales[i] = tensor_element(stored, stored->elements == 1 ? 0 : i) / unit;
    return scales;
}

/* What is no matrix of its own is read as plain floats: fp8 is widened to numbers that are the same. */
static enum weight_format widened(struct weight_loader *loader, const struct tensor *tensor,
                                  int64_t rows, enum weight_format format)
{
    if (format != WEIGHT_FP8 || loader->plan) return format;
    return find_scales(loader, tensor, rows) ? WEIGHT_F32 : WEIGHT_BF16;
}

/* Writes down what a tensor becomes; what stays as it is needs no line. */
static void plan(struct weight_loader *loader, struct tensor *tensor, enum weight_format format,
                 int sets, int rows, int cols)
{
    struct weight_plan *changes = loader->plan;
    struct tensor *scales = find_scales(loader, tensor, (int64_t)sets * rows);
    if (loader->status || (format == format_of(tensor) && !is_block_format(format))) return;
    if (!grow((void **)&changes->changes, changes->count, &changes->capacity,
              sizeof *changes->changes)) {
        loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the list of tensors");
        return;
    }
    changes->changes[changes->count++] = (struct weight_change){tensor, scales, format,
                                                                sets,   rows,   cols};
}

static const float *keep_scales(struct weight_loader *loader, const float *scales, int64_t rows)
{
    const size_t bytes = (size_t)rows * sizeof *scales;
    float *kept = weight_store_allocate(loader->store, bytes);
    if (kept)
        loader->store->backend->ops->upload(loader->store->backend, kept, scales, bytes);
    else
        loader->status = MOSHI_ERROR_MEMORY;
    return kept;
}

/* `sets` matrices that are stacked on the rows of one tensor. */
static void bind(struct weight_loader *loader, struct tensor *tensor, enum weight_format format,
                 int sets, int rows, int cols, struct matrix *matrices)
{
    int64_t dims[2] = {(int64_t)sets * rows, cols};
    int is_int8 = tensor && tensor->dtype == TENSOR_I8;
    if (is_int8 ? check_shape(loader, tensor, 2, dims) : weights_check(loader, tensor, 2, dims))
        return;
    if (loader->plan) {
        plan(loader, tensor, format, sets, rows, cols);
        return;
    }
    float *scales = row_scales(loader, tensor, dims[0]);
    struct matrix all = {.format = format_of(tensor),
                         .rows = sets * rows,
                         .cols = cols,
                         .data = tensor->data,
                         .scales = scales};
    const int made = is_block_format(format) || format == WEIGHT_FP8;
    enum weight_format source = made ? all.format : format;
    if (!loader->status && (source != all.format || !aligned(tensor)))
        convert(loader, tensor, scales, source, &all);
    if (scales && all.format == WEIGHT_FP8 && format == WEIGHT_FP8) /* they are read there, too */
        all.scales = keep_scales(loader, scales, dims[0]);
    for (int i = 0; i < sets && !loader->status; ++i) {
        matrices[i] = matrix_rows(all, i * rows, rows);
        prepare(loader, &matrices[i], format, loader->pack);
        if (loader->status)
            moshi_fail_prefix(loader->status, "%s: tensor %s", tensor_file_path(loader->file),
                              tensor->name);
        else if (matrices[i].data && matrices[i].data >= tensor->data &&
                 matrices[i].data < (const void *)((const char *)tensor->data + tensor->bytes))
            loader->store->mapped_bytes += (int64_t)rows * cols * (int64_t)weight_bytes(format);
    }
    free(scales);
}

/* The same in the lean format. */
static void bind_lean(struct weight_loader *loader, const struct tensor *tensor, int sets, int rows,
                      int cols, struct matrix *matrices)
{
    int64_t dims[2] = {(int64_t)sets * rows, cols}, elements = (int64_t)rows * cols;
    if (weights_check(loader, tensor, 2, dims)) return;
    for (int i = 0; i < sets && !loader->status; ++i) {
        float *values = malloc((size_t)elements * sizeof *values);
        if (!values) {
            loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %s", tensor->name);
            return;
        }
        for (int64_t j = 0; j < elements; ++j) values[j] = tensor_element(tensor, i * elements + j);
        weights_matrix_from(loader, values, rows, cols, loader->lean, &matrices[i]);
    }
}

/* ---- panels of a file ------------------------------------------------------------------- */

/* The block format that a file's metadata names. */
static int panel_format(struct weight_loader *loader, enum weight_format *format)
{
    const char *path = tensor_file_path(loader->file);
    const char *name = tensor_file_metadata(loader->file, METADATA_FORMAT);
    const char *layout = tensor_file_metadata(loader->file, METADATA_LAYOUT);
    for (int f = 0; f < WEIGHT_FORMATS; ++f) {
        *format = (enum weight_format)f;
        if (is_block_format(*format) && strcmp(name, weight_format_name(*format)) == 0) break;
        if (f == WEIGHT_FORMATS - 1)
            return loader->status =
                       moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                  "%s: the metadata's %s is \"%.40s\", expected int8, q8 or q4",
                                  path, METADATA_FORMAT, name);
    }
    if (!layout || strcmp(layout, PANEL_LAYOUT) != 0)
        return loader->status = moshi_fail(
                   MOSHI_ERROR_CHECKPOINT,
                   "%s: the metadata's %s is \"%.40s\", expected %s: convert the original again",
                   path, METADATA_LAYOUT, layout ? layout : "", PANEL_LAYOUT);
    return MOSHI_OK;
}

/* Every scale finite, and no code -128, whose opposite the kernels could not hold. */
static int check_panels(struct weight_loader *loader, const struct tensor *tensor,
                        enum weight_format format, int cols)
{
    const size_t bytes = panel_bytes(format, cols), tile = tile_bytes(format);
    const char *at = tensor->data, *end = at + tensor->bytes;
    for (; at < end; at += bytes)
        for (size_t k = 0; k < bytes;) {
            const size_t scales = format == WEIGHT_INT8 ? (k ? 0 : sizeof(float) * PANEL)
                                                        : sizeof(uint16_t) * 2 * PANEL;
            const struct tensor part = {.dtype = format == WEIGHT_INT8 ? TENSOR_F32 : TENSOR_F16,
                                        .elements = format == WEIGHT_INT8 ? PANEL : 2 * PANEL,
                                        .data = at + k};
            const size_t codes = format == WEIGHT_INT8 ? tile : tile - scales;
            const char *wrong = scales && !tensor_is_finite(&part) ? "a scale that is not finite"
                                : format != WEIGHT_Q4 && memchr(at + k + scales, 0, codes)
                                    ? "the code -128"
                                    : NULL;
            if (wrong)
                return loader->status = moshi_fail(
                           MOSHI_ERROR_CHECKPOINT,
                           "%s: tensor %s has %s in panel %zu, expected finite scales and codes "
                           "from -127 to 127",
                           tensor_file_path(loader->file), tensor->name, wrong,
                           (size_t)(at - (const char *)tensor->data) / bytes);
            k += scales + codes;
        }
    return MOSHI_OK;
}

static void bind_panels(struct weight_loader *loader, struct tensor *tensor, int sets, int rows,
                        int cols, struct matrix *matrices)
{
    enum weight_format format;
    if (panel_format(loader, &format)) return;
    if (loader->plan) {
        loader->status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                    "%s holds %s weights already, expected floats to convert",
                                    tensor_file_path(loader->file), weight_format_name(format));
        return;
    }
    if (loader->dtype != MOSHI_AUTO && wanted_format(loader, tensor) != format) {
        loader->status =
            moshi_fail(MOSHI_ERROR_CHECKPOINT,
                       "%s holds %s weights, which can't be read as %s, expected dtype auto or %s",
                       tensor_file_path(loader->file), weight_format_name(format),
                       moshi_dtype_name(loader->dtype), weight_format_name(format));
        return;
    }
    struct matrix one = {.format = format, .rows = rows, .cols = cols};
    const size_t bytes = packed_bytes(&one), panel = panel_bytes(format, cols);
    const int64_t dims[3] = {sets, (int64_t)(bytes / panel), (int64_t)panel};
    if (check_shape(loader, tensor, 3, dims)) return;
    if (loader->check_finite && check_panels(loader, tensor, format, cols)) return;
    loader->store->parameters += (int64_t)sets * rows * cols - tensor->elements;
    const char *panels = tensor->data;
    if ((uintptr_t)panels % PANEL_ALIGNMENT) {
        char *copy = weight_store_allocate(loader->store, tensor->bytes);
        if (!copy) {
            loader->status = MOSHI_ERROR_MEMORY;
            return;
        }
        panels = memcpy(copy, panels, tensor->bytes);
    } else {
        loader->store->mapped_bytes += (int64_t)tensor->bytes;
    }
    for (int i = 0; i < sets && !loader->status; ++i) {
        matrices[i] = one;
        matrices[i].packed = (void *)(uintptr_t)(panels + (size_t)i * bytes); /* never written to */
        prepare(loader, &matrices[i], format, loader->pack);
    }
}

/* ---- what models bind ------------------------------------------------------------------- */

void weights_matrices(struct weight_loader *loader, struct tensor *tensor, int sets, int rows,
                      int cols, struct matrix *matrices)
{
    memset(matrices, 0, (size_t)sets * sizeof *matrices);
    if (!tensor) return;
    if (tensor->dtype == TENSOR_U8 && tensor_file_metadata(loader->file, METADATA_FORMAT))
        bind_panels(loader, tensor, sets, rows, cols, matrices);
    else if (loader->lean == WEIGHT_F32)
        bind(loader, tensor, wanted_format(loader, tensor), sets, rows, cols, matrices);
    else
        bind_lean(loader, tensor, sets, rows, cols, matrices);
}

void weights_matrix(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                    struct matrix *matrix)
{
    weights_matrices(loader, tensor, 1, rows, cols, matrix);
}

void weights_small_matrix(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                          struct matrix *matrix)
{
    memset(matrix, 0, sizeof *matrix);
    if (!tensor) return;
    enum weight_format format = plain_format(loader, tensor);
    if (loader->plan && is_block_format(format)) { /* published int8 rows stay as they are */
        find_scales(loader, tensor, rows);
        return;
    }
    bind(loader, tensor, widened(loader, tensor, rows, format), 1, rows, cols, matrix);
}

void weights_table(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                   struct matrix *matrix)
{
    memset(matrix, 0, sizeof *matrix);
    int64_t dims[2] = {rows, cols};
    if (weights_check(loader, tensor, 2, dims)) return;
    enum weight_format stored = format_of(tensor), format = plain_format(loader, tensor);
    *matrix = (struct matrix){.format = stored, .rows = rows, .cols = cols, .data = tensor->data};
    /* A wider copy of a table would hold the same numbers. */
    if (format == WEIGHT_F32) format = stored;
    if (loader->plan) {
        plan(loader, tensor, format, 1, rows, cols);
        return;
    }
    float *scales = row_scales(loader, tensor, rows);
    format = widened(loader, tensor, rows, format);
    if (aligned(tensor) && format == stored)
        loader->store->mapped_bytes += (int64_t)tensor->bytes;
    else
        convert(loader, tensor, scales, format, matrix);
    free(scales);
    prepare(loader, matrix, format, 0);
}

/* Rows in the lean format; they are read where they lie. `values` is used up. */
static void keep_lean(struct weight_loader *loader, float *values, int rows, int cols,
                      enum weight_format format, struct matrix *matrix)
{
    struct weight_store *store = loader->store;
    const struct backend_ops *ops = store->backend->ops;
    size_t elements = (size_t)rows * (size_t)cols, bytes = elements * weight_bytes(format);
    size_t scale_bytes = format == WEIGHT_INT8 ? (size_t)rows * sizeof(float) : 0;
    void *data = weight_store_allocate(store, bytes), *scales = NULL;
    if (data && scale_bytes) scales = weight_store_allocate(store, scale_bytes);
    if (!data || (scale_bytes && !scales)) {
        loader->status = MOSHI_ERROR_MEMORY;
        return;
    }
    if (format == WEIGHT_INT8) {
        int8_t *codes = (int8_t *)values;
        for (int row = 0; row < rows; ++row) {
            size_t at = (size_t)row * (size_t)cols;
            float scale = int8_row(values + at, cols, codes + at);
            ops->upload(store->backend, (float *)scales + row, &scale, sizeof scale);
        }
    } else {
        weight_convert(WEIGHT_F32, values, format, values, elements);
    }
    ops->upload(store->backend, data, values, bytes);
    *matrix = (struct matrix){
        .format = format, .rows = rows, .cols = cols, .data = data, .scales = scales};
    store->matrix_bytes += (int64_t)bytes;
}

void weights_matrix_from(struct weight_loader *loader, float *values, int rows, int cols,
                         enum weight_format format, struct matrix *matrix)
{
    memset(matrix, 0, sizeof *matrix);
    if (format != WEIGHT_F32) {
        if (!loader->status) keep_lean(loader, values, rows, cols, format, matrix);
        free(values);
        return;
    }
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
    prepare(loader, matrix, WEIGHT_F32, loader->pack);
    if (matrix->data == values) matrix->data = NULL;
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
    /* A model cast to 16 bits upstream has its norms cast too. */
    enum weight_format format = plain_format(loader, tensor);
    if (loader->plan) {
        if (format == WEIGHT_F32) /* a wider copy would hold the same numbers */
            find_scales(loader, tensor, 1);
        else
            plan(loader, tensor, format, 1, 1, (int)count);
        return NULL;
    }
    float *scales = row_scales(loader, tensor, 1);
    if (loader->status) return NULL;
    struct matrix rounded = {.cols = (int)count}, vector = {.cols = (int)count};
    if (format != WEIGHT_F32 && format != format_of(tensor)) {
        convert(loader, tensor, scales, format, &rounded);
        struct tensor cast = *tensor;
        cast.dtype = format == WEIGHT_F16 ? TENSOR_F16 : TENSOR_BF16;
        cast.data = rounded.data;
        if (!loader->status) convert(loader, &cast, NULL, WEIGHT_F32, &vector);
    } else {
        convert(loader, tensor, scales, WEIGHT_F32, &vector);
    }
    free(scales);
    return loader->status ? NULL : vector.data;
}

float *weights_host(struct weight_loader *loader, const struct tensor *tensor, int64_t rows)
{
    if (loader->status || !tensor) return NULL;
    float *scales = row_scales(loader, tensor, rows);
    if (loader->status) return NULL;
    float *values = malloc((size_t)tensor->elements * sizeof *values);
    if (!values) loader->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %s", tensor->name);
    for (int64_t i = 0; values && i < tensor->elements; ++i)
        values[i] = tensor_element(tensor, i) *
                    (scales ? scales[i / (tensor->elements / rows)] : 1);
    free(scales);
    return values;
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

/* ---- conversion ------------------------------------------------------------------------- */

size_t weight_change_bytes(const struct weight_change *change)
{
    const struct matrix one = {
        .format = change->format, .rows = change->rows, .cols = change->cols};
    const size_t bytes = (size_t)change->tensor->elements * weight_bytes(change->format);
    if (is_block_format(change->format)) return (size_t)change->sets * packed_bytes(&one);
    if (change->format != WEIGHT_FP8) return bytes;
    return (size_t)change->sets * (size_t)change->rows * sizeof(float) + bytes;
}

int weight_change_make(const struct weight_loader *loader, const struct weight_change *change,
                       void *to)
{
    struct weight_store store;
    weight_store_init(&store, loader->store->backend);
    const struct backend_ops *ops = store.backend->ops;
    struct weight_loader once = {.store = &store, .file = loader->file, .dtype = loader->dtype};
    struct matrix *matrices = calloc((size_t)change->sets, sizeof *matrices);
    if (!matrices) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a list of matrices");
    if (is_block_format(change->format) || change->format == WEIGHT_FP8) {
        bind(&once, change->tensor, change->format, change->sets, change->rows, change->cols,
             matrices);
        const size_t bytes = weight_change_bytes(change) / (size_t)change->sets;
        const size_t head = (size_t)change->rows * sizeof(float);
        const size_t all = head * (size_t)change->sets, codes = bytes - head;
        for (size_t i = 0; i < (size_t)change->sets && !once.status; ++i) {
            const struct matrix *made = &matrices[i];
            if (change->format != WEIGHT_FP8) {
                ops->download(store.backend, (char *)to + i * bytes, made->packed, bytes);
                continue;
            }
            ops->download(store.backend, (char *)to + i * head, made->scales, head);
            ops->download(store.backend, (char *)to + all + i * codes, made->data, codes);
        }
    } else {
        const int64_t rows = (int64_t)change->sets * change->rows;
        float *scales = row_scales(&once, change->tensor, rows);
        matrices->cols = change->cols;
        if (!once.status) convert(&once, change->tensor, scales, change->format, matrices);
        if (!once.status) memcpy(to, matrices->data, weight_change_bytes(change));
        free(scales);
    }
    free(matrices);
    weight_store_release(&store);
    return once.status;
}
