/* pages.cu: memory that grows with its calls: addresses are taken at once, memory comes behind them
 * page by page and goes back to the card. So keys and values lie in one array, which kernels index,
 * and cost what the calls have said so far. */
#include <stdlib.h>

#include "backend_cuda.h"

/* Where a card can't do so, the memory is there from the start. */
static void *take_all(struct cuda_backend *cuda, size_t bytes)
{
    void *memory = cuda_take(cuda, bytes);

    if (memory) cuda_fill(cuda, memory, 0, bytes);
    return memory;
}

static struct cuda_range *find(struct cuda_backend *cuda, const void *memory)
{
    for (struct cuda_range *range = cuda->ranges; range; range = range->next)
        if ((size_t)((const char *)memory - range->base) < range->bytes) return range;
    return NULL;
}

void *cuda_allocate_pages(struct backend *backend, size_t bytes, size_t page_bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    size_t unit = cuda->virtual_memory.granularity;
    struct cuda_range *range;
    void *base = NULL;

    if (unit == 0) return take_all(cuda, bytes);
    if (page_bytes % unit == 0) unit = page_bytes;
    size_t units = (bytes + unit - 1) / unit;

    range = (struct cuda_range *)calloc(1, sizeof *range + units * sizeof range->units[0]);
    if (!range) {
        cuda_fail(cuda, MOSHI_ERROR_MEMORY, "no memory for a list of %zu pages", units);
        return NULL;
    }
    if (!cuda_good(cuda, virtual_reserve(&cuda->virtual_memory, &base, units * unit),
                   "addresses")) {
        free(range);
        return NULL;
    }
    range->base = (char *)base;
    range->bytes = units * unit;
    range->unit = unit;
    range->next = cuda->ranges;
    cuda->ranges = range;
    return base;
}

static void put_unit(struct cuda_backend *cuda, struct cuda_range *range, size_t i)
{
    if (--range->units[i].pages) return;
    virtual_unmap(&cuda->virtual_memory, range->base + i * range->unit, range->unit,
                  range->units[i].handle);
}

static bool take_unit(struct cuda_backend *cuda, struct cuda_range *range, size_t i)
{
    struct cuda_unit *unit = &range->units[i];

    if (unit->pages == 0) {
        cudaError_t error = virtual_map(&cuda->virtual_memory, range->base + i * range->unit,
                                        range->unit, &unit->handle);

        if (error == cudaErrorMemoryAllocation) return cuda_out_of_memory(cuda, range->unit), false;
        if (!cuda_good(cuda, error, "a page of memory")) return false;
    }
    unit->pages++;
    return true;
}

int cuda_commit(struct backend *backend, void *memory, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    cuda_own_failures own(cuda);
    struct cuda_range *range = find(cuda, memory);

    if (range && bytes) {
        size_t at = (size_t)((char *)memory - range->base);
        size_t first = at / range->unit, last = (at + bytes - 1) / range->unit, i = first;

        while (i <= last && take_unit(cuda, range, i)) i++;
        if (i <= last)
            while (i > first) put_unit(cuda, range, --i);
    }
    if (!backend->failure) cuda_fill(cuda, memory, 0, bytes);
    return own.report();
}

void cuda_decommit(struct backend *backend, void *const *pages, int count, size_t page_bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    struct cuda_range *range = count && page_bytes ? find(cuda, pages[0]) : NULL;

    if (!range) return;
    cuda_flush(cuda);
    cudaStreamSynchronize(cuda->stream); /* a run may still be using them */
    for (int page = 0; page < count; page++) {
        size_t at = (size_t)((char *)pages[page] - range->base);

        for (size_t i = at / range->unit; i <= (at + page_bytes - 1) / range->unit; i++)
            put_unit(cuda, range, i);
    }
    cudaGetLastError();
}

bool cuda_release_pages(struct cuda_backend *cuda, void *memory)
{
    struct cuda_range **at = &cuda->ranges, *range;

    while (*at && (*at)->base != memory) at = &(*at)->next;
    range = *at;
    if (!range) return false;
    *at = range->next;
    for (size_t i = 0; i < range->bytes / range->unit; i++) {
        if (range->units[i].pages == 0) continue;
        range->units[i].pages = 1;
        put_unit(cuda, range, i);
    }
    virtual_free(&cuda->virtual_memory, range->base, range->bytes);
    free(range);
    return true;
}
