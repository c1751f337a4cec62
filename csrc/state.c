/* state.c: allocation and reset of fields, and the page bookkeeping of keys and values. */
#include "state.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

size_t state_field_bytes(const struct state_field *field)
{
    return field->elements * (field->type == FIELD_U8 ? 1 : 4);
}

/* Of all lanes; some fields have no elements. */
static size_t allocated_bytes(const struct state_table *table, const struct state_field *field)
{
    size_t bytes = state_field_bytes(field) * (size_t)table->lanes;
    return bytes ? bytes : 1;
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
    size_t bytes = state_field_bytes(field);
    char *start = (char *)field->data + (size_t)lane * bytes;
    if (field->reset == 0 || field->reset == -1 || field->type == FIELD_U8) {
        backend->ops->clear(backend, start, (int)(field->reset & 0xff), bytes);
        return;
    }
    int32_t values[256];
    for (size_t i = 0; i < sizeof values / sizeof *values; ++i) values[i] = field->reset;
    for (size_t at = 0; at < bytes; at += sizeof values)
        backend->ops->upload(backend, start + at, values,
                             bytes - at < sizeof values ? bytes - at : sizeof values);
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
    size_t bytes = allocated_bytes(table, field);
    field->data = table->backend->ops->allocate(table->backend, bytes);
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

void state_copy_lane(struct state_table *table, int from, int to)
{
    for (int i = 0; i < table->n_fields; ++i) {
        const struct state_field *field = &table->fields[i];
        size_t bytes = state_field_bytes(field);
        table->backend->ops->copy(table->backend, (char *)field->data + (size_t)to * bytes,
                                  (const char *)field->data + (size_t)from * bytes, bytes);
    }
}

void state_release(struct state_table *table)
{
    for (int i = 0; i < table->n_fields; ++i) {
        const struct state_field *field = &table->fields[i];
        table->backend->ops->release(table->backend, field->data, allocated_bytes(table, field));
    }
    table->n_fields = 0;
}

size_t state_table_bytes(const struct state_table *table)
{
    size_t total = 0;
    for (int i = 0; i < table->n_fields; ++i) total += allocated_bytes(table, &table->fields[i]);
    return total;
}

int kv_pages_create(struct kv_pages *kv, struct backend *backend, int lanes, int ring_positions,
                    const struct transformer_config *config, enum moshi_dtype dtype)
{
    memset(kv, 0, sizeof *kv);
    kv->backend = backend;
    kv->lanes = lanes;
    kv->positions = ring_positions;
    struct kv_cache *cache = &kv->cache;
    cache->page_positions = KV_PAGE_POSITIONS;
    cache->pages_per_lane = (ring_positions + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    cache->layers = config->layers;
    cache->kv_heads = config->kv_heads;
    cache->head_dim = config->dim / config->heads;
    cache->dtype = dtype;
    cache->page_bytes = (size_t)cache->layers * 2 * (size_t)cache->kv_heads * kv_plane_bytes(cache);
    size_t entries = (size_t)lanes * (size_t)cache->pages_per_lane;
    kv->n_pages = (int)entries;
    kv->bytes = entries * cache->page_bytes;
    kv->host_table = malloc(entries * sizeof *kv->host_table);
    kv->references = calloc(entries, sizeof *kv->references);
    kv->free_pages = malloc(entries * sizeof *kv->free_pages);
    kv->committed = calloc(entries, 1);
    kv->given = malloc(entries * sizeof *kv->given);
    kv->device_table = backend->ops->allocate(backend, entries * sizeof *kv->device_table);
    cache->pages = backend->ops->allocate_pages(backend, kv->bytes, cache->page_bytes);
    if (!kv->host_table || !kv->references || !kv->free_pages || !kv->committed || !kv->given ||
        !kv->device_table || !cache->pages) {
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
    free(kv->committed);
    free(kv->given);
    memset(kv, 0, sizeof *kv);
}

static char *page_address(const struct kv_pages *kv, int32_t page)
{
    return (char *)kv->cache.pages + (size_t)page * kv->cache.page_bytes;
}

static void set_free(struct kv_pages *kv, int n_free)
{
    __atomic_store_n(&kv->n_free, n_free, __ATOMIC_RELAXED); /* kv_pages_used may look */
}

static void set_page(struct kv_pages *kv, size_t entry, int32_t page)
{
    kv->host_table[entry] = page;
    kv->backend->ops->upload(kv->backend, kv->device_table + entry, &page, sizeof page);
}

int kv_pages_grow(struct kv_pages *kv, int lane, int64_t first, int steps)
{
    int per_lane = kv->cache.pages_per_lane;
    int64_t ring = (int64_t)per_lane * KV_PAGE_POSITIONS;
    for (int64_t position = first; position < first + steps;) {
        int block = (int)(position % ring) / KV_PAGE_POSITIONS;
        size_t entry = (size_t)lane * (size_t)per_lane + (size_t)block;
        int32_t shared = kv->host_table[entry];
        if (shared < 0 || kv->references[shared] > 1) {
            /* There are as many pages as entries, so a shared one leaves another one free. */
            if (kv->n_free == 0)
                return moshi_fail(MOSHI_ERROR_INTERNAL, "no page of keys and values is free");
            int32_t page = kv->free_pages[kv->n_free - 1];
            int status = kv->committed[page]
                             ? MOSHI_OK
                             : kv->backend->ops->commit(kv->backend, page_address(kv, page),
                                                        kv->cache.page_bytes);
            if (status) return status;
            kv->committed[page] = 1;
            set_free(kv, kv->n_free - 1);
            kv->references[page] = 1;
            if (shared >= 0) {
                kv->backend->ops->copy(kv->backend, page_address(kv, page),
                                       page_address(kv, shared), kv->cache.page_bytes);
                --kv->references[shared];
            }
            set_page(kv, entry, page);
        }
        position += KV_PAGE_POSITIONS - position % KV_PAGE_POSITIONS;
    }
    return MOSHI_OK;
}

void kv_pages_reset(struct kv_pages *kv, int lane)
{
    for (int block = 0; block < kv->cache.pages_per_lane; ++block) {
        size_t entry = (size_t)lane * (size_t)kv->cache.pages_per_lane + (size_t)block;
        int32_t page = kv->host_table[entry];
        if (page < 0) continue;
        kv->host_table[entry] = -1;
        if (--kv->references[page] > 0) continue;
        kv->free_pages[kv->n_free] = page;
        set_free(kv, kv->n_free + 1);
    }
}

void kv_pages_release(struct kv_pages *kv, int lane)
{
    int count = 0;
    kv_pages_reset(kv, lane);
    for (int i = 0; i < kv->n_free; ++i) {
        int32_t page = kv->free_pages[i];
        if (!kv->committed[page]) continue;
        kv->given[count++] = page_address(kv, page);
        kv->committed[page] = 0;
    }
    kv->backend->ops->decommit(kv->backend, kv->given, count, kv->cache.page_bytes);
}

void kv_pages_share(struct kv_pages *kv, int from, int to)
{
    kv_pages_reset(kv, to);
    const size_t per_lane = (size_t)kv->cache.pages_per_lane;
    for (size_t block = 0; block < per_lane; ++block) {
        int32_t page = kv->host_table[(size_t)from * per_lane + block];
        if (page < 0) continue;
        ++kv->references[page];
        set_page(kv, (size_t)to * per_lane + block, page);
    }
}

/* One run of positions within a page: where it lies, and where it goes in the host's array. */
struct run {
    char *device;
    size_t host, bytes;
};

/* The run of `plane` (layer, key or value, head) that begins at position first + done. */
static struct run find_run(const struct kv_pages *kv, enum kv_part part, int lane, int64_t first,
                           int count, int done, size_t plane)
{
    const struct kv_cache *cache = &kv->cache;
    const size_t row = part == KV_SCALES ? sizeof(float) : kv_row_bytes(cache);
    const size_t start = part == KV_SCALES ? KV_PAGE_POSITIONS * kv_row_bytes(cache) : 0;
    int64_t ring = (int64_t)cache->pages_per_lane * KV_PAGE_POSITIONS;
    int place = (int)((first + done) % ring), within = place % KV_PAGE_POSITIONS;
    int length = KV_PAGE_POSITIONS - within < count - done ? KV_PAGE_POSITIONS - within
                                                           : count - done;
    int32_t page = kv->host_table[(size_t)lane * (size_t)cache->pages_per_lane +
                                  (size_t)(place / KV_PAGE_POSITIONS)];
    return (struct run){.device = page_address(kv, page) + plane * kv_plane_bytes(cache) + start +
                                  (size_t)within * row,
                        .host = (plane * (size_t)count + (size_t)done) * row,
                        .bytes = (size_t)length * row};
}

static size_t planes(const struct kv_pages *kv)
{
    return (size_t)kv->cache.layers * 2 * (size_t)kv->cache.kv_heads;
}

static int run_end(int done, int64_t first)
{
    return done + KV_PAGE_POSITIONS - (int)((first + done) % KV_PAGE_POSITIONS);
}

int state_fetch_end(struct state_fetch *fetch)
{
    if (fetch->count && !fetch->status)
        fetch->status = fetch->backend->ops->download_pieces(fetch->backend, fetch->pieces,
                                                             fetch->count);
    fetch->count = 0;
    return fetch->status;
}

void state_fetch_add(struct state_fetch *fetch, const void *device, void *host, size_t bytes)
{
    if (fetch->count == sizeof fetch->pieces / sizeof *fetch->pieces) state_fetch_end(fetch);
    fetch->pieces[fetch->count++] = (struct device_piece){
        .device = device, .host = host, .bytes = bytes};
}

void kv_pages_read(const struct kv_pages *kv, enum kv_part part, int lane, int64_t first, int count,
                   void *values, struct state_fetch *fetch)
{
    for (size_t plane = 0; plane < planes(kv); ++plane)
        for (int done = 0; done < count; done = run_end(done, first)) {
            struct run run = find_run(kv, part, lane, first, count, done, plane);
            state_fetch_add(fetch, run.device, (char *)values + run.host, run.bytes);
        }
}

void kv_pages_write(struct kv_pages *kv, enum kv_part part, int lane, int64_t first, int count,
                    const void *values)
{
    for (size_t plane = 0; plane < planes(kv); ++plane)
        for (int done = 0; done < count; done = run_end(done, first)) {
            struct run run = find_run(kv, part, lane, first, count, done, plane);
            kv->backend->ops->upload(kv->backend, run.device, (const char *)values + run.host,
                                     run.bytes);
        }
}

size_t kv_pages_fixed_bytes(const struct kv_pages *kv)
{
    return (size_t)kv->n_pages * sizeof *kv->device_table;
}

size_t kv_pages_lane_bytes(const struct kv_pages *kv)
{
    return (size_t)kv->cache.pages_per_lane * kv->cache.page_bytes;
}

int kv_pages_used(const struct kv_pages *kv)
{
    return kv->n_pages - __atomic_load_n(&kv->n_free, __ATOMIC_RELAXED);
}
