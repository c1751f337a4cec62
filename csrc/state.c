/* state.c: allocation and reset of fields, and the page bookkeeping of keys and values. */
#include "state.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

static size_t field_bytes(const struct state_field *field)
{
    return field->elements * (field->type == FIELD_U8 ? 1 : 4);
}

void state_init(struct state_table *table, struct backend *backend, int lanes)
{
    memset(table, 0, sizeof *table);
    table->backend = backend;
    table->lanes = lanes;
}

/* Reset values are integers whose bytes are equal (0, -1) or small arrays of int32 (-2). */
static void reset_lane_of_field(struct backend *backend, const struct state_field *field, int lane)
{
    size_t bytes = field_bytes(field);
    char *start = (char *)field->data + (size_t)lane * bytes;
    if (field->reset == 0 || field->reset == -1 || field->type == FIELD_U8) {
        backend->ops->clear(backend, start, (int)(field->reset & 0xff), bytes);
        return;
    }
    for (size_t i = 0; i < field->elements; ++i)
        backend->ops->upload(backend, start + 4 * i, &field->reset, 4);
}

void *state_add(struct state_table *table, enum field_type type, size_t elements, int32_t reset,
                const char *name, ...)
{
    if (table->n_fields == STATE_MAX_FIELDS) {
        moshi_fail(MOSHI_ERROR_INTERNAL, "the state table is full: %d fields", STATE_MAX_FIELDS);
        return NULL;
    }
    struct state_field *field = &table->fields[table->n_fields];
    va_list arguments;
    va_start(arguments, name);
    vsnprintf(field->name, sizeof field->name, name, arguments);
    va_end(arguments);
    field->type = type;
    field->elements = elements;
    field->reset = reset;
    size_t bytes = field_bytes(field) * (size_t)table->lanes;
    field->data = table->backend->ops->allocate(table->backend, bytes ? bytes : 1);
    if (!field->data) {
        moshi_fail(MOSHI_ERROR_MEMORY,
                   "state field %s: %zu bytes for %d lanes could not be reserved", field->name,
                   bytes, table->lanes);
        return NULL;
    }
    ++table->n_fields;
    if (reset != 0) /* fresh memory reads as zeros; touching it would commit it */
        for (int lane = 0; lane < table->lanes; ++lane)
            reset_lane_of_field(table->backend, field, lane);
    return field->data;
}

void state_reset_lane(struct state_table *table, int lane)
{
    for (int i = 0; i < table->n_fields; ++i)
        reset_lane_of_field(table->backend, &table->fields[i], lane);
}

void state_release(struct state_table *table)
{
    for (int i = 0; i < table->n_fields; ++i) {
        size_t bytes = field_bytes(&table->fields[i]) * (size_t)table->lanes;
        table->backend->ops->release(table->backend, table->fields[i].data, bytes ? bytes : 1);
    }
    table->n_fields = 0;
}

size_t state_lane_bytes(const struct state_table *table)
{
    size_t total = 0;
    for (int i = 0; i < table->n_fields; ++i) total += field_bytes(&table->fields[i]);
    return total;
}

int kv_pages_create(struct kv_pages *kv, struct backend *backend, int lanes, int ring_positions,
                    const struct transformer_config *config, enum moshi_dtype dtype)
{
    memset(kv, 0, sizeof *kv);
    kv->backend = backend;
    kv->lanes = lanes;
    struct kv_cache *cache = &kv->cache;
    cache->page_positions = KV_PAGE_POSITIONS;
    cache->pages_per_lane = (ring_positions + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    cache->layers = config->layers;
    cache->kv_heads = config->kv_heads;
    cache->head_dim = config->dim / config->heads;
    cache->dtype = dtype;
    size_t position_bytes = (size_t)cache->layers * 2 * (size_t)cache->kv_heads *
                            (size_t)cache->head_dim * (dtype == MOSHI_F32 ? 4 : 2);
    cache->page_bytes = position_bytes * KV_PAGE_POSITIONS;
    size_t entries = (size_t)lanes * (size_t)cache->pages_per_lane;
    kv->n_pages = (int)entries;
    kv->bytes = entries * cache->page_bytes;
    kv->host_table = malloc(entries * sizeof *kv->host_table);
    kv->references = calloc(entries, sizeof *kv->references);
    kv->free_pages = malloc(entries * sizeof *kv->free_pages);
    kv->device_table = backend->ops->allocate(backend, entries * sizeof *kv->device_table);
    cache->pages = backend->ops->allocate(backend, kv->bytes);
    if (!kv->host_table || !kv->references || !kv->free_pages || !kv->device_table ||
        !cache->pages) {
        size_t bytes = kv->bytes;
        kv_pages_destroy(kv);
        return moshi_fail(MOSHI_ERROR_MEMORY,
                          "keys and values: %zu bytes for %d lanes of %d positions could not be "
                          "reserved; fewer sessions or a shorter context need less",
                          bytes, lanes, ring_positions);
    }
    cache->table = kv->device_table;
    for (size_t i = 0; i < entries; ++i) {
        kv->host_table[i] = -1;
        kv->free_pages[i] = (int32_t)(entries - 1 - i);
    }
    kv->n_free = (int)entries;
    return MOSHI_OK;
}

void kv_pages_destroy(struct kv_pages *kv)
{
    if (!kv->backend) return;
    const struct backend_ops *ops = kv->backend->ops;
    size_t entries = (size_t)kv->n_pages;
    if (kv->cache.pages) ops->release(kv->backend, kv->cache.pages, kv->bytes);
    if (kv->device_table)
        ops->release(kv->backend, kv->device_table, entries * sizeof *kv->device_table);
    free(kv->host_table);
    free(kv->references);
    free(kv->free_pages);
    memset(kv, 0, sizeof *kv);
}

int kv_pages_grow(struct kv_pages *kv, int lane, int64_t first, int steps)
{
    int per_lane = kv->cache.pages_per_lane;
    int64_t ring = (int64_t)per_lane * KV_PAGE_POSITIONS;
    for (int64_t position = first; position < first + steps;) {
        int block = (int)(position % ring) / KV_PAGE_POSITIONS;
        size_t entry = (size_t)lane * (size_t)per_lane + (size_t)block;
        if (kv->host_table[entry] < 0) {
            if (kv->n_free == 0)
                return moshi_fail(MOSHI_ERROR_INTERNAL, "no page of keys and values is free");
            int32_t page = kv->free_pages[kv->n_free - 1];
            __atomic_store_n(&kv->n_free, kv->n_free - 1, __ATOMIC_RELAXED);
            kv->host_table[entry] = page;
            kv->references[page] = 1;
            kv->backend->ops->upload(kv->backend, kv->device_table + entry, &page, sizeof page);
        }
        position += KV_PAGE_POSITIONS - position % KV_PAGE_POSITIONS;
    }
    return MOSHI_OK;
}

static void forget(struct kv_pages *kv, int lane, int decommit)
{
    for (int block = 0; block < kv->cache.pages_per_lane; ++block) {
        size_t entry = (size_t)lane * (size_t)kv->cache.pages_per_lane + (size_t)block;
        int32_t page = kv->host_table[entry];
        if (page < 0) continue;
        kv->host_table[entry] = -1;
        if (--kv->references[page] > 0) continue;
        if (decommit)
            kv->backend->ops->decommit(
                kv->backend, (char *)kv->cache.pages + (size_t)page * kv->cache.page_bytes,
                kv->cache.page_bytes);
        kv->free_pages[kv->n_free] = page;
        __atomic_store_n(&kv->n_free, kv->n_free + 1, __ATOMIC_RELAXED);
    }
}

void kv_pages_reset(struct kv_pages *kv, int lane)
{
    forget(kv, lane, 0);
}

void kv_pages_release(struct kv_pages *kv, int lane)
{
    forget(kv, lane, 1);
}

int kv_pages_used(const struct kv_pages *kv)
{
    return kv->n_pages - __atomic_load_n(&kv->n_free, __ATOMIC_RELAXED);
}
