/* snapshot.c: lists of items, written to and read from the layout of a safetensors file. */
#include "snapshot.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

struct snapshot_item {
    char name[80];
    enum tensor_dtype dtype;
    int n_dims;
    int64_t dims[5];
    size_t bytes;
    /* where it lives: keys and values of a lane, device memory of a backend, or host memory */
    struct kv_pages *kv;
    enum kv_part part;
    int lane;
    int64_t first;
    struct backend *backend;
    void *memory;
};

/* ---- the list --------------------------------------------------------------------------- */

void snapshot_init(struct snapshot *snapshot, const char *format)
{
    memset(snapshot, 0, sizeof *snapshot);
    snapshot_fact(snapshot, "format", "%s", format);
    snapshot_fact(snapshot, "version", "%s", SNAPSHOT_VERSION);
}

void snapshot_free(struct snapshot *snapshot)
{
    free(snapshot->items);
    memset(snapshot, 0, sizeof *snapshot);
}

void snapshot_fact(struct snapshot *snapshot, const char *key, const char *format, ...)
{
    if (snapshot->n_facts == SNAPSHOT_MAX_FACTS) {
        snapshot->status = moshi_fail(MOSHI_ERROR_INTERNAL, "a snapshot with too many facts");
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    snapshot->facts[snapshot->n_facts].key = key;
    vsnprintf(snapshot->facts[snapshot->n_facts].value, sizeof snapshot->facts[0].value, format,
              arguments);
    va_end(arguments);
    ++snapshot->n_facts;
}

static void add(struct snapshot *snapshot, struct snapshot_item item, const char *name,
                const char *suffix)
{
    if (snapshot->status) return;
    if (snapshot->n_items == snapshot->capacity) {
        int capacity = snapshot->capacity ? 2 * snapshot->capacity : 64;
        struct snapshot_item *items = realloc(snapshot->items, (size_t)capacity * sizeof *items);
        if (!items) {
            snapshot->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a snapshot");
            return;
        }
        snapshot->items = items;
        snapshot->capacity = capacity;
    }
    item.bytes = tensor_dtype_bytes(item.dtype);
    for (int i = 0; i < item.n_dims; ++i) item.bytes *= (size_t)item.dims[i];
    snprintf(item.name, sizeof item.name, "%s%s", name, suffix);
    snapshot->items[snapshot->n_items++] = item;
}

void snapshot_host(struct snapshot *snapshot, const char *name, enum tensor_dtype dtype,
                   int64_t count, void *memory)
{
    add(snapshot,
        (struct snapshot_item){.dtype = dtype, .n_dims = 1, .dims = {count}, .memory = memory},
        name, "");
}

void snapshot_lane(struct snapshot *snapshot, const struct state_table *table, int lane,
                   const char *suffix)
{
    static const enum tensor_dtype dtypes[] = {
        [FIELD_F32] = TENSOR_F32, [FIELD_I32] = TENSOR_I32, [FIELD_U8] = TENSOR_U8};
    for (int i = 0; i < table->n_fields; ++i) {
        const struct state_field *field = &table->fields[i];
        add(snapshot,
            (struct snapshot_item){.dtype = dtypes[field->type],
                                   .n_dims = 1,
                                   .dims = {(int64_t)field->elements},
                                   .backend = table->backend,
                                   .memory = (char *)field->data +
                                             (size_t)lane * state_field_bytes(field)},
            field->name, suffix);
    }
}

static int64_t visible(const struct kv_pages *kv, int64_t offset)
{
    return offset < kv->positions ? offset : kv->positions;
}

void snapshot_pages(struct snapshot *snapshot, struct kv_pages *kv, int lane, int64_t offset,
                    const char *name, const char *suffix)
{
    const struct kv_cache *cache = &kv->cache;
    const int64_t count = visible(kv, offset);
    struct snapshot_item item = {
        .dtype = cache->dtype == MOSHI_F32    ? TENSOR_F32
                 : cache->dtype == MOSHI_BF16 ? TENSOR_BF16
                                              : TENSOR_I8,
        .n_dims = 5,
        .dims = {cache->layers, 2, cache->kv_heads, count, cache->head_dim},
        .backend = kv->backend,
        .kv = kv,
        .part = KV_VALUES,
        .lane = lane,
        .first = offset - count};
    add(snapshot, item, name, suffix);
    if (cache->dtype != MOSHI_INT8) return;
    char scales[80];
    snprintf(scales, sizeof scales, "%s.scales", name);
    item.dtype = TENSOR_F32;
    item.n_dims = 4;
    item.part = KV_SCALES;
    add(snapshot, item, scales, suffix);
}

int snapshot_make_room(struct kv_pages *kv, int lane, int64_t offset)
{
    const int64_t count = visible(kv, offset);
    return kv_pages_grow(kv, lane, offset - count, (int)count);
}

/* ---- writing ---------------------------------------------------------------------------- */

static int make_header(const struct snapshot *snapshot, struct tensor_header *header)
{
    for (int i = 0; i < snapshot->n_facts; ++i)
        tensor_header_fact(header, snapshot->facts[i].key, snapshot->facts[i].value);
    for (int i = 0; i < snapshot->n_items; ++i) {
        const struct snapshot_item *item = &snapshot->items[i];
        tensor_header_add(header, item->name, item->dtype, item->n_dims, item->dims);
    }
    return tensor_header_end(header, 8);
}

int snapshot_write(const struct snapshot *snapshot, void *data, size_t *bytes)
{
    if (snapshot->status) return snapshot->status;
    struct tensor_header header = {0};
    int status = make_header(snapshot, &header);
    const size_t total = header.bytes + header.data_bytes;
    if (!status && data && *bytes < total)
        status = moshi_fail(MOSHI_ERROR_ARGUMENT, "%zu bytes for a snapshot, expected %zu", *bytes,
                            total);
    if (!status && data) memcpy(data, header.text, header.bytes);
    free(header.text);
    if (status) return status;
    if (!data) {
        *bytes = total;
        return MOSHI_OK;
    }
    uint8_t *to = (uint8_t *)data + header.bytes;
    struct state_fetch fetch = {0};
    for (int i = 0; i < snapshot->n_items; ++i) {
        const struct snapshot_item *item = &snapshot->items[i];
        if (item->backend) fetch.backend = item->backend; /* all of a list are of one */
        if (item->kv)
            kv_pages_read(item->kv, item->part, item->lane, item->first, (int)item->dims[3], to,
                          &fetch);
        else if (item->backend)
            state_fetch_add(&fetch, item->memory, to, item->bytes);
        else if (item->bytes)
            memcpy(to, item->memory, item->bytes);
        to += item->bytes;
    }
    *bytes = total;
    return state_fetch_end(&fetch);
}

/* ---- reading ---------------------------------------------------------------------------- */

int snapshot_check_facts(const struct snapshot *snapshot, const struct tensor_file *file)
{
    for (int i = 0; i < snapshot->n_facts; ++i) {
        const char *key = snapshot->facts[i].key, *expected = snapshot->facts[i].value;
        const char *found = tensor_file_metadata(file, key);
        if (!found)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: it does not name its %s, expected \"%s\"; is it a snapshot?",
                              tensor_file_path(file), key, expected);
        if (strcmp(found, expected) != 0)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: its %s is \"%.80s\", expected \"%s\", which is open here",
                              tensor_file_path(file), key, found, expected);
    }
    return MOSHI_OK;
}

/* The tensor with exactly this dtype and shape; marks it used. */
static int find(struct tensor_file *file, const char *name, enum tensor_dtype dtype, int n_dims,
                const int64_t *dims, const struct tensor **result)
{
    struct tensor *tensor = tensor_file_find(file, name);
    if (!tensor)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: the field %s is missing",
                          tensor_file_path(file), name);
    int same = tensor->dtype == dtype && tensor->n_dims == n_dims;
    for (int i = 0; i < n_dims && same; ++i) same = dims[i] < 0 || tensor->dims[i] == dims[i];
    if (!same) {
        char found[160], expected[160];
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: the field %s is %s %s, expected %s %s",
                          tensor_file_path(file), name, tensor_dtype_name(tensor->dtype),
                          tensor_shape_text(tensor->dims, tensor->n_dims, found, sizeof found),
                          tensor_dtype_name(dtype),
                          dims[0] < 0 ? "of one dimension"
                                      : tensor_shape_text(dims, n_dims, expected, sizeof expected));
    }
    tensor->used = 1;
    *result = tensor;
    return MOSHI_OK;
}

int snapshot_read(const struct snapshot *snapshot, struct tensor_file *file)
{
    if (snapshot->status) return snapshot->status;
    for (int i = 0; i < snapshot->n_items; ++i) {
        const struct snapshot_item *item = &snapshot->items[i];
        const struct tensor *tensor;
        int status = find(file, item->name, item->dtype, item->n_dims, item->dims, &tensor);
        if (status) return status;
        int floats = item->dtype == TENSOR_F32 || item->dtype == TENSOR_BF16;
        if (floats && !tensor_is_finite(tensor))
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: the field %s holds NaN or infinity, expected finite numbers",
                              tensor_file_path(file), item->name);
        if (item->kv)
            kv_pages_write(item->kv, item->part, item->lane, item->first, (int)item->dims[3],
                           tensor->data);
        else if (item->backend)
            item->backend->ops->upload(item->backend, item->memory, tensor->data, item->bytes);
        else if (item->bytes)
            memcpy(item->memory, tensor->data, item->bytes);
    }
    return MOSHI_OK;
}

int snapshot_finish(struct tensor_file *file)
{
    for (int i = 0; i < tensor_file_count(file); ++i) {
        const struct tensor *tensor = tensor_file_at(file, i);
        if (!tensor->used)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: the field %.60s is not one of this model's state",
                              tensor_file_path(file), tensor->name);
    }
    return MOSHI_OK;
}

int snapshot_find(struct tensor_file *file, const char *name, enum tensor_dtype dtype,
                  const struct tensor **tensor)
{
    const int64_t any = -1;
    return find(file, name, dtype, 1, &any, tensor);
}

int snapshot_count(struct tensor_file *file, int64_t limit, int64_t *value, const char *format, ...)
{
    char name[80];
    const struct tensor *tensor;
    const int64_t one = 1;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    int status = find(file, name, TENSOR_I64, 1, &one, &tensor);
    if (status) return status;
    memcpy(value, tensor->data, sizeof *value);
    if (*value < 0 || *value > limit)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: the field %s is %lld, expected 0 to %lld",
                          tensor_file_path(file), name, (long long)*value, (long long)limit);
    return MOSHI_OK;
}
