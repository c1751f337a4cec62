/* convert.c: a language model in another weight format, as the parts of one safetensors file.
 *
 * Binding with a plan tells what every tensor becomes; each is made when it is asked for, so that a
 * conversion holds one tensor at a time. Panels come first, since only they need their alignment,
 * then the rest from wide to narrow elements: every tensor begins at a multiple of its element, but
 * for the scales of fp8 behind a matrix of an odd number of bytes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "status.h"

struct part {
    const struct tensor *tensor;
    const struct weight_change *change; /* NULL: stays as it is */
    size_t bytes;
};

struct moshi_conversion {
    struct moshi_model *model;
    struct weight_plan plan;
    enum moshi_dtype dtype;
    struct tensor_header header; /* part 0 */
    struct part *parts;
    int count;
};

static enum tensor_dtype stored_dtype(const struct weight_change *change)
{
    return is_block_format(change->format) ? TENSOR_U8
           : change->format == WEIGHT_F32  ? TENSOR_F32
           : change->format == WEIGHT_F16  ? TENSOR_F16
           : change->format == WEIGHT_FP8  ? TENSOR_F8_E4M3
                                           : TENSOR_BF16;
}

static void add_part(struct moshi_conversion *conversion, const struct tensor *tensor,
                     const struct weight_change *change)
{
    struct part *part = &conversion->parts[conversion->count++];
    *part = (struct part){tensor, change, tensor->bytes};
    if (!change) {
        tensor_header_add(&conversion->header, tensor->name, tensor->dtype, tensor->n_dims,
                          tensor->dims);
        return;
    }
    part->bytes = weight_change_bytes(change);
    if (is_block_format(change->format)) {
        const int64_t panel = (int64_t)panel_bytes(change->format, change->cols);
        const int64_t panels = (int64_t)part->bytes / panel / change->sets;
        tensor_header_add(&conversion->header, tensor->name, TENSOR_U8, 3,
                          (const int64_t[]){change->sets, panels, panel});
        return;
    }
    if (change->format == WEIGHT_FP8) {
        /* With scales in front of it, named as published ones are. */
        char name[256 + sizeof "_scale"];

        snprintf(name, sizeof name, "%s_scale", tensor->name);
        tensor_header_add(&conversion->header, name, TENSOR_F32, 2,
                          (const int64_t[]){(int64_t)change->sets * change->rows, 1});
    }
    tensor_header_add(&conversion->header, tensor->name, stored_dtype(change), tensor->n_dims,
                      tensor->dims);
}

/* 1 when the tensor goes with another; *change: what becomes of it, or NULL. */
static int find_change(const struct moshi_conversion *conversion, const struct tensor *tensor,
                       const struct weight_change **change)
{
    *change = NULL;
    for (int i = 0; i < conversion->plan.count; ++i) {
        if (conversion->plan.changes[i].scales == tensor) return 1;
        if (conversion->plan.changes[i].tensor == tensor) *change = &conversion->plan.changes[i];
    }
    return 0;
}

static int list_parts(struct moshi_conversion *conversion)
{
    struct tensor_file *file = conversion->model->lm_file;
    const int n = tensor_file_count(file);
    struct tensor_header *header = &conversion->header;
    conversion->parts = calloc((size_t)n + 1, sizeof *conversion->parts);
    if (!conversion->parts) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a list of parts");
    if (conversion->dtype >= MOSHI_INT8) {
        tensor_header_fact(header, METADATA_FORMAT, moshi_dtype_name(conversion->dtype));
        tensor_header_fact(header, METADATA_LAYOUT, PANEL_LAYOUT);
        tensor_header_fact(header, "moshi_c.about",
                           "U8 tensors are matrices in panels of 16 rows, [sets][panels][bytes]; "
                           "moshi-c's csrc/quant.h describes them");
    }
    conversion->count = 1;
    for (size_t width = 16; width > 0; width /= 2) /* 16 stands for panels */
        for (int i = 0; i < n; ++i) {
            const struct tensor *tensor = tensor_file_at(file, i);
            const struct weight_change *change;
            if (find_change(conversion, tensor, &change)) continue;
            enum tensor_dtype dtype = change ? stored_dtype(change) : tensor->dtype;
            int panels = change && is_block_format(change->format);
            if (width == (panels ? 16 : tensor_dtype_bytes(dtype)))
                add_part(conversion, tensor, change);
        }
    int status = tensor_header_end(header, PANEL_ALIGNMENT);
    conversion->parts[0].bytes = header->bytes;
    return status;
}

int moshi_conversion_open(const struct moshi_model_options *options,
                          struct moshi_conversion **result)
{
    *result = NULL;
    if (options->dtype == MOSHI_AUTO)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "the dtype of a conversion is auto, expected f32, "
                                                "f16, bf16, fp8, int8, q8 or q4");
    struct moshi_conversion *conversion = calloc(1, sizeof *conversion);
    if (!conversion) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a conversion");
    conversion->dtype = options->dtype;
    int status = model_open_plan(options, &conversion->plan, &conversion->model);
    if (!status && conversion->plan.count == 0)
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                            "%s holds %s weights already, expected others to convert",
                            conversion->model->lm_path, moshi_dtype_name(options->dtype));
    if (!status) status = list_parts(conversion);
    if (status) {
        moshi_conversion_close(conversion);
        return status;
    }
    *result = conversion;
    return MOSHI_OK;
}

void moshi_conversion_close(struct moshi_conversion *conversion)
{
    if (!conversion) return;
    moshi_model_close(conversion->model);
    free(conversion->plan.changes);
    free(conversion->header.text);
    free(conversion->parts);
    free(conversion);
}

int moshi_conversion_count(const struct moshi_conversion *conversion)
{
    return conversion->count;
}

int64_t moshi_conversion_bytes(const struct moshi_conversion *conversion, int part)
{
    if (part < 0 || part >= conversion->count) return -1;
    return (int64_t)conversion->parts[part].bytes;
}

int moshi_conversion_read(struct moshi_conversion *conversion, int part, void *to)
{
    if (part < 0 || part >= conversion->count)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "part %d of a conversion, expected 0 to %d", part,
                          conversion->count - 1);
    const struct part *one = &conversion->parts[part];
    if (part > 0 && one->change) {
        struct moshi_model *model = conversion->model;
        int status = model_check_process(model);
        if (status) return status;
        const struct weight_loader loader = {
            .store = &model->lm_store, .file = model->lm_file, .dtype = conversion->dtype};
        os_mutex_lock(model->backend_lock);
        status = weight_change_make(&loader, one->change, to);
        os_mutex_unlock(model->backend_lock);
        return status;
    }
    if (one->bytes) memcpy(to, part ? one->tensor->data : conversion->header.text, one->bytes);
    return MOSHI_OK;
}
