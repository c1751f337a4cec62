/* host_shim.cpp: what host_shim.h promises without a toolkit: fibers, memory, streams, graphs. One
 * device of compute capability 9.0 with as many processors and as much shared memory as an H200. */
#include "host_shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

/* ---- fibers ----------------------------------------------------------------------------- */

#define MAX_THREADS 1024
#define STACK_BYTES (size_t)(64 << 10)
#define SHARED_LIMIT (size_t)(227 << 10)

struct shim_place shim_now;

enum state { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, AT_COUNT, DONE };

struct fiber {
    void *stack_pointer;
    dim3 thread;
    enum state state;
    int shuffles; /* made so far: even and odd ones use different slots */
    const int *count; /* AT_COUNT: what has to become `least` or more */
    int least;
    int groups; /* of copies that have ended */
};

/* 16 bytes that a thread has sent for; group: by how many copies_end before them. */
struct copy {
    unsigned char *to, bytes[16];
    int group;
};

/* A product that a thread has begun: two rows of A, and where its part of B is. */
struct group_product {
    float *sums;
    unsigned rows[2][8];
    uint64_t b;
};

struct warp {
    alignas(8) unsigned char slots[2][WARP * SHARE_BYTES];
    int arrived, alive;
};

/* A block that has begun. While one waits at an atomic operation, the others run in the second place. Those
 * of a launch whose blocks meet have a place each. */
struct block {
    struct fiber fibers[MAX_THREADS];
    std::vector<struct copy> copies[MAX_THREADS];
    std::vector<size_t> unshown[MAX_THREADS]; /* pieces of 16 bytes that were not shown yet */
    std::vector<struct group_product> products[MAX_THREADS];
    unsigned char hidden[SHARED_LIMIT / 16]; /* those of all threads */
    struct warp warps[MAX_THREADS / WARP];
    unsigned char *stacks, *shared;
    void *scheduler_stack;
    int current, arrived, alive, paused;
};

static struct block places[SHIM_RESIDENT], *now = &places[0];
static const std::function<void()> *kernel_body;

#if defined(__x86_64__)

/* Saves what a call must keep on this stack, and goes on where the other one was left. */
extern "C" void shim_switch(void **save, void *load);
asm(".text\n"
    ".type shim_switch,@function\n"
    "shim_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n"
    "    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n"
    "    popq %rbp\n"
    "    ret\n"
    ".size shim_switch,.-shim_switch\n");

static void *new_stack(unsigned char *bottom, void (*entry)(void))
{
    void **top = (void **)(void *)(bottom + STACK_BYTES - 64);

    *--top = NULL; /* entry begins as if it had been called */
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++) *--top = NULL;
    return top;
}

#else
#error "the shim switches fibers on x86-64 alone"
#endif

static void yield(enum state state)
{
    struct fiber *fiber = &now->fibers[now->current];

    fiber->state = state;
    shim_switch(&fiber->stack_pointer, now->scheduler_stack);
}

static void release(enum state waiting, int first, int count)
{
    for (int i = first; i < first + count; i++)
        if (now->fibers[i].state == waiting) now->fibers[i].state = READY;
}

static int thread_count(void)
{
    return (int)(shim_now.threads.x * shim_now.threads.y * shim_now.threads.z);
}

static void fiber_entry(void)
{
    (*kernel_body)();
    now->warps[now->current / WARP].alive--;
    now->alive--;
    yield(DONE);
}

void __syncthreads(void)
{
    if (++now->arrived == now->alive) {
        now->arrived = 0;
        release(AT_BLOCK_BARRIER, 0, thread_count());
        yield(READY);
    } else {
        yield(AT_BLOCK_BARRIER);
    }
}

const unsigned char *shim_share(const void *value, size_t bytes)
{
    int thread = now->current;
    struct warp *warp = &now->warps[thread / WARP];
    unsigned char *slots = warp->slots[now->fibers[thread].shuffles++ % 2];

    memcpy(slots + thread % WARP * SHARE_BYTES, value, bytes);
    if (++warp->arrived == warp->alive) {
        warp->arrived = 0;
        release(AT_WARP_BARRIER, thread / WARP * WARP, WARP);
        yield(READY);
    } else {
        yield(AT_WARP_BARRIER);
    }
    return slots;
}

void copy_piece(void *shared, const void *from, int there)
{
    struct copy copy = {(unsigned char *)shared, {}, now->fibers[now->current].groups};

    if (there) memcpy(copy.bytes, from, sizeof copy.bytes);
    memset(shared, 0xff, sizeof copy.bytes);
    now->copies[now->current].push_back(copy);
}

void copies_end(void)
{
    now->fibers[now->current].groups++;
}

void shim_copies_wait(int left)
{
    std::vector<struct copy> &copies = now->copies[now->current];
    int arrived = now->fibers[now->current].groups - left;
    size_t n = 0;

    for (; n < copies.size() && copies[n].group < arrived; n++) {
        size_t piece = (size_t)(copies[n].to - shim_now.shared) / 16;

        memcpy(copies[n].to, copies[n].bytes, sizeof copies[n].bytes);
        now->unshown[now->current].push_back(piece);
        now->hidden[piece] = 1;
    }
    copies.erase(copies.begin(), copies.begin() + (long)n);
}

void copies_show(void)
{
    for (size_t piece : now->unshown[now->current]) now->hidden[piece] = 0;
    now->unshown[now->current].clear();
}

void group_multiply(float (&sums)[64], const unsigned (&a)[4], uint64_t b)
{
    const unsigned char *all = shim_share(a, sizeof a);
    struct group_product product = {sums, {}, b};

    for (unsigned i = 0; i < 2; i++)
        for (unsigned k = 0; k < 8; k++)
            memcpy(&product.rows[i][k],
                   all + (now->current % WARP / 4 * 4 + k % 4) * SHARE_BYTES +
                       (i + k / 4 * 2) * sizeof(unsigned),
                   sizeof(unsigned));
    now->products[now->current].push_back(product);
}

/* Word k of a row of B, two numbers: an address whose bits 4 to 6 are turned by bits 7 to 9. */
static unsigned group_word(uint64_t b, unsigned row, unsigned k)
{
    unsigned start = (unsigned)(b & 0x3fff) * 16, eight = (unsigned)(b >> 32 & 0x3fff) * 16, word;
    unsigned at = start + row / 8 * eight + row % 8 * 128 + k * 4;

    at = (at ^ (at >> 7 & 7) << 4) - SHIM_SHARED_BASE;
    if (b >> 62 != 1 || at >= SHARED_LIMIT || now->hidden[at / 16]) return 0xffffffffu;
    memcpy(&word, shim_now.shared + at, sizeof word);
    return word;
}

void group_wait(void)
{
    for (struct group_product &p : now->products[now->current])
        for (unsigned n = 0; n < 64; n++)
            for (unsigned k = 0; k < 8; k++) {
                unsigned x = p.rows[n % 4 / 2][k];
                unsigned y = group_word(p.b, n / 4 * 8 + (unsigned)now->current % 4 * 2 + n % 2, k);

                p.sums[n] += __uint_as_float(x << 16) * __uint_as_float(y << 16);
                p.sums[n] += __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
            }
    now->products[now->current].clear();
}

void shim_pause(void)
{
    now->paused = 1;
    yield(READY);
}

void wait_for_count(const int *count, int least)
{
    while (*count < least) {
        now->fibers[now->current].count = count;
        now->fibers[now->current].least = least;
        yield(AT_COUNT);
    }
}

static uint64_t shuffle_state;
static int shuffled;

static void order_of(std::vector<int> &order, int n)
{
    const char *wanted = getenv("SHIM_ORDER");

    order.resize((size_t)n);
    for (int i = 0; i < n; i++) order[(size_t)i] = i;
    if (!wanted || strcmp(wanted, "ascending") == 0) return;
    if (strcmp(wanted, "descending") == 0) {
        std::reverse(order.begin(), order.end());
        return;
    }
    if (!shuffled) shuffle_state = strtoull(wanted, NULL, 10) * 2 + 1, shuffled = 1;
    for (int i = n - 1; i > 0; i--) {
        shuffle_state = shuffle_state * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[(size_t)i], order[(shuffle_state >> 33) % (uint64_t)(i + 1)]);
    }
}

static void start_fibers(int n)
{
    dim3 threads = shim_now.threads;

    now->arrived = now->paused = 0;
    now->alive = n;
    for (int i = 0; i < n / WARP; i++) now->warps[i] = {{}, 0, WARP};
    for (int i = 0; i < n; i++) {
        struct fiber *fiber = &now->fibers[i];

        fiber->thread = dim3((unsigned)i % threads.x, (unsigned)i / threads.x % threads.y,
                             (unsigned)i / threads.x / threads.y);
        fiber->stack_pointer = new_stack(now->stacks + (size_t)i * STACK_BYTES, fiber_entry);
        fiber->state = READY;
        fiber->shuffles = fiber->groups = 0;
        now->copies[i].clear();
        now->unshown[i].clear();
        now->products[i].clear();
    }
}

/* What one launch has to do. */
struct grid {
    std::vector<int> places, warps, lanes;
    size_t next, shared;
    int together; /* its blocks meet */
    int good;
};

static void run_blocks(struct grid *grid, size_t count);

/* The block's other threads have not come as far as this one: as on a card, other blocks may. Half of
 * those that are left do, so that some are left for the next operation. */
static void let_others_run(struct grid *grid)
{
    struct shim_place place = shim_now;
    struct block *block = now;

    block->paused = 0;
    if (block != &places[0]) return;
    now = &places[1];
    run_blocks(grid, (grid->places.size() - grid->next + 1) / 2);
    now = block;
    shim_now = place;
}

static void run_fiber(struct grid *grid, int i)
{
    now->current = i;
    shim_now.thread = now->fibers[i].thread;
    shim_switch(&now->scheduler_stack, now->fibers[i].stack_pointer);
    if (now->fibers[i].state == DONE && now->alive > 0 && now->arrived == now->alive) {
        now->arrived = 0; /* who has ended holds up nobody */
        release(AT_BLOCK_BARRIER, 0, thread_count());
    }
    if (now->paused && !grid->together) let_others_run(grid);
}

/* Runs a warp until each of its threads waits for the block, or has ended; 0 if it waits already. */
static int run_warp(struct grid *grid, int first)
{
    int busy = 0, more;

    do {
        more = 0;
        for (int lane : grid->lanes) {
            if (now->fibers[first + lane].state != READY || now->paused) continue;
            run_fiber(grid, first + lane);
            more = 1;
        }
        busy |= more;
    } while (more);
    return busy;
}

/* The first warp of the order runs as far ahead of the others as barriers let it; 0 if all wait. */
static int run_threads(struct grid *grid)
{
    int busy = 0;

    for (size_t at = 0; at < grid->warps.size();) {
        int ran = run_warp(grid, grid->warps[at] * WARP);

        busy |= ran;
        at = ran ? 0 : at + 1;
    }
    return busy;
}

static void enter_block(const struct grid *grid, size_t at)
{
    unsigned place = (unsigned)grid->places[at];

    shim_now.shared = now->shared;
    shim_now.block = dim3(place % shim_now.grid.x, place / shim_now.grid.x % shim_now.grid.y,
                          place / shim_now.grid.x / shim_now.grid.y);
}

static void begin_block(const struct grid *grid)
{
    memset(now->shared, 0xff, grid->shared);
    memset(now->hidden, 0, sizeof now->hidden);
    ASAN_POISON_MEMORY_REGION(now->shared + grid->shared, SHARED_LIMIT - grid->shared);
    start_fibers(thread_count());
}

static void end_block(struct grid *grid)
{
    ASAN_UNPOISON_MEMORY_REGION(now->shared + grid->shared, SHARED_LIMIT - grid->shared);
    grid->good &= now->alive == 0;
}

/* So many of the blocks that have not begun. */
static void run_blocks(struct grid *grid, size_t count)
{
    while (count-- && grid->next < grid->places.size()) {
        enter_block(grid, grid->next++);
        begin_block(grid);
        run_threads(grid);
        end_block(grid);
    }
}

/* All blocks, in turn, each until its threads wait for others or one has done an atomic operation. */
static void run_together(struct grid *grid)
{
    size_t n = grid->places.size();
    int busy;

    for (now = places; now < places + n; now++) begin_block(grid);
    do {
        busy = 0;
        for (size_t i = 0; i < n; i++) {
            now = &places[i];
            now->paused = 0;
            for (struct fiber &fiber : now->fibers)
                if (fiber.state == AT_COUNT && *fiber.count >= fiber.least) fiber.state = READY;
            enter_block(grid, i);
            busy |= run_threads(grid);
        }
    } while (busy);
    for (now = places; now < places + n; now++) end_block(grid);
    now = places;
}

/* ---- device memory ---------------------------------------------------------------------- */

#define DEVICE_BYTES ((size_t)6 << 30)
#define REDZONE (size_t)256

static std::recursive_mutex shim_mutex;
typedef std::lock_guard<std::recursive_mutex> shim_lock;

static unsigned char *device_memory; /* protected but while work is done */
static size_t device_high;           /* what has ever been used of it */
static std::map<size_t, size_t> pieces; /* offset -> bytes with the zone behind them */
static std::map<size_t, size_t> ranges; /* those of them that are only addresses -> bytes */
static std::map<size_t, size_t> taken; /* the others -> bytes that were asked for */
static size_t mapped_bytes;              /* behind such addresses */
static std::map<uintptr_t, size_t> host_blocks, managed_blocks;

static cudaError_t broken; /* sticky */
static cudaError_t last_error;
static int countdowns[SHIM_FAULT_KINDS] = {-1, -1, -1};

static long counts[SHIM_EVENTS];

static cudaError_t give(cudaError_t error)
{
    if (error != cudaSuccess) last_error = error;
    return error;
}

static int strikes(enum shim_fault fault)
{
    return countdowns[fault] >= 0 && countdowns[fault]-- == 0;
}

static void initialise(void)
{
    if (device_memory) return;
    device_memory = (unsigned char *)mmap(NULL, DEVICE_BYTES, PROT_NONE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (device_memory == MAP_FAILED) abort();
    for (struct block &place : places) {
        place.stacks = (unsigned char *)mmap(NULL, MAX_THREADS * STACK_BYTES,
                                             PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        place.shared = (unsigned char *)aligned_alloc(256, SHARED_LIMIT + 256);
        if (place.stacks == MAP_FAILED || !place.shared) abort();
    }
}

static void protect(int access)
{
    if (device_high) mprotect(device_memory, device_high, access);
}

static int inside(const std::map<uintptr_t, size_t> &map, uintptr_t address)
{
    auto at = map.upper_bound(address);

    if (at == map.begin()) return 0;
    --at;
    return address - at->first < at->second;
}

static int is_device(uintptr_t address)
{
    return address - (uintptr_t)device_memory < DEVICE_BYTES;
}

/* Addresses of programs, heaps, stacks and maps begin like this; two small numbers side by side
 * seldom do. */
static int looks_like_host(uintptr_t word)
{
    unsigned high = (unsigned)(word >> 40);

    return word >> 48 == 0 &&
           (high == 0x55 || high == 0x56 || high == 0x7e || high == 0x7f ||
            (high >= 0x60 && high < 0x64)) &&
           !is_device(word) && !inside(host_blocks, word) && !inside(managed_blocks, word);
}

/* A place for so many bytes, which nothing may touch yet; DEVICE_BYTES if there is none. */
static size_t take_place(size_t bytes)
{
    size_t wanted = (bytes + REDZONE - 1) / REDZONE * REDZONE + REDZONE, at = 0;

    initialise();
    for (auto &block : pieces) {
        if (block.first - at >= wanted) break;
        at = block.first + block.second;
    }
    if (bytes > DEVICE_BYTES || at + wanted > DEVICE_BYTES) return DEVICE_BYTES;
    pieces[at] = wanted;
    if (at + wanted > device_high) device_high = (at + wanted + 4095) / 4096 * 4096;
    ASAN_POISON_MEMORY_REGION(device_memory + at, wanted);
    return at;
}

/* Memory has come behind the addresses. */
static void fill_place(void *memory, size_t bytes)
{
    protect(PROT_READ | PROT_WRITE);
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    memset(memory, 0xff, bytes);
    protect(PROT_NONE);
}

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    shim_lock lock(shim_mutex);

    *memory = NULL;
    if (broken != cudaSuccess) return give(broken);
    ++counts[SHIM_PREPARED];
    if (strikes(SHIM_FAULT_MALLOC)) return give(cudaErrorMemoryAllocation);
    size_t at = take_place(bytes);

    if (at == DEVICE_BYTES) return give(cudaErrorMemoryAllocation);
    *memory = device_memory + at;
    taken[at] = bytes;
    counts[SHIM_TAKEN_BYTES] += (long)bytes;
    fill_place(*memory, bytes);
    return cudaSuccess;
}

#define GRANULARITY (size_t)(64 << 10)

void virtual_open(struct virtual_memory *memory, int card)
{
    (void)card;
    memory->granularity = GRANULARITY;
}

cudaError_t virtual_reserve(struct virtual_memory *memory, void **address, size_t bytes)
{
    shim_lock lock(shim_mutex);

    (void)memory;
    *address = NULL;
    if (broken != cudaSuccess) return broken;
    if (bytes % GRANULARITY) return cudaErrorInvalidValue;
    size_t at = take_place(bytes);

    if (at == DEVICE_BYTES) return cudaErrorMemoryAllocation;
    ranges[at] = bytes;
    *address = device_memory + at;
    return cudaSuccess;
}

cudaError_t virtual_map(struct virtual_memory *memory, void *address, size_t bytes,
                        virtual_handle *handle)
{
    shim_lock lock(shim_mutex);

    (void)memory;
    *handle = 0;
    if (broken != cudaSuccess) return broken;
    ++counts[SHIM_PREPARED];
    if (strikes(SHIM_FAULT_MALLOC)) return cudaErrorMemoryAllocation;
    mapped_bytes += bytes;
    counts[SHIM_TAKEN_BYTES] += (long)bytes;
    fill_place(address, bytes);
    return cudaSuccess;
}

void virtual_unmap(struct virtual_memory *memory, void *address, size_t bytes,
                   virtual_handle handle)
{
    shim_lock lock(shim_mutex);

    (void)memory, (void)handle;
    mapped_bytes -= bytes;
    counts[SHIM_TAKEN_BYTES] -= (long)bytes;
    ASAN_POISON_MEMORY_REGION(address, bytes);
}

void virtual_free(struct virtual_memory *memory, void *address, size_t bytes)
{
    shim_lock lock(shim_mutex);
    size_t at = (size_t)((unsigned char *)address - device_memory);

    (void)memory, (void)bytes;
    ranges.erase(at);
    pieces.erase(at);
}

cudaError_t cudaFree(void *memory)
{
    shim_lock lock(shim_mutex);

    if (!memory) return cudaSuccess;
    auto block = pieces.find((size_t)((unsigned char *)memory - device_memory));
    if (block == pieces.end()) {
        auto managed = managed_blocks.find((uintptr_t)memory);

        if (managed == managed_blocks.end()) return give(cudaErrorInvalidValue);
        managed_blocks.erase(managed);
        free(memory);
        return cudaSuccess;
    }
    ASAN_POISON_MEMORY_REGION(memory, block->second);
    counts[SHIM_TAKEN_BYTES] -= (long)taken[block->first];
    taken.erase(block->first);
    pieces.erase(block);
    return give(broken);
}

static cudaError_t take_host(std::map<uintptr_t, size_t> &map, void **memory, size_t bytes)
{
    shim_lock lock(shim_mutex);

    *memory = NULL;
    initialise();
    if (broken != cudaSuccess) return give(broken);
    *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*memory) return give(cudaErrorMemoryAllocation);
    memset(*memory, 0xff, bytes);
    map[(uintptr_t)*memory] = bytes;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    return take_host(host_blocks, memory, bytes);
}

cudaError_t cudaMallocManaged(void **memory, size_t bytes)
{
    return take_host(managed_blocks, memory, bytes);
}

cudaError_t cudaFreeHost(void *memory)
{
    shim_lock lock(shim_mutex);

    if (host_blocks.erase((uintptr_t)memory) == 0) return give(cudaErrorInvalidValue);
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory)
{
    shim_lock lock(shim_mutex);
    uintptr_t address = (uintptr_t)memory;

    attributes->type = is_device(address)                ? cudaMemoryTypeDevice
                       : inside(managed_blocks, address) ? cudaMemoryTypeManaged
                       : inside(host_blocks, address)    ? cudaMemoryTypeHost
                                                         : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    shim_lock lock(shim_mutex);

    *free_bytes = *total = DEVICE_BYTES;
    for (auto &block : pieces)
        if (!ranges.count(block.first)) *free_bytes -= block.second;
    *free_bytes -= mapped_bytes < *free_bytes ? mapped_bytes : *free_bytes;
    return give(broken);
}

/* ---- streams and graphs ----------------------------------------------------------------- */

typedef std::function<cudaError_t()> work;

struct shim_graph {
    std::vector<work> nodes;
};

struct shim_stream {
    std::vector<work> queue;
    struct shim_graph *captured;
};

static cudaError_t enqueue(cudaStream_t stream, work item)
{
    if (broken != cudaSuccess) return give(broken);
    (stream->captured ? stream->captured->nodes : stream->queue).push_back(std::move(item));
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    shim_lock lock(shim_mutex);

    (void)flags;
    *stream = NULL;
    initialise();
    if (broken != cudaSuccess) return give(broken);
    *stream = new shim_stream();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    shim_lock lock(shim_mutex);

    if (stream->captured) return give(cudaErrorInvalidValue);
    if (!stream->queue.empty()) {
        protect(PROT_READ | PROT_WRITE);
        for (auto &item : stream->queue)
            if (broken == cudaSuccess) broken = item();
        stream->queue.clear();
        protect(PROT_NONE);
    }
    return give(broken);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    shim_lock lock(shim_mutex);
    struct cudaPointerAttributes source;

    (void)kind;
    cudaPointerGetAttributes(&source, from);
    ++counts[!is_device((uintptr_t)to)             ? SHIM_FETCHED
             : source.type == cudaMemoryTypeDevice ? SHIM_MOVED
                                                   : SHIM_SENT];
    if (is_device((uintptr_t)to) && source.type == cudaMemoryTypeDevice)
        counts[SHIM_COPIED_BYTES] += (long)bytes;
    if (source.type == cudaMemoryTypeUnregistered) { /* such memory is read at once */
        std::vector<unsigned char> staged((const unsigned char *)from,
                                          (const unsigned char *)from + bytes);

        return enqueue(stream, [to, staged = std::move(staged)] {
            memcpy(to, staged.data(), staged.size());
            return cudaSuccess;
        });
    }
    return enqueue(stream, [to, from, bytes] {
        memcpy(to, from, bytes);
        return cudaSuccess;
    });
}

cudaError_t cudaMemsetAsync(void *memory, int byte, size_t bytes, cudaStream_t stream)
{
    shim_lock lock(shim_mutex);

    ++counts[SHIM_MOVED];
    return enqueue(stream, [memory, byte, bytes] {
        memset(memory, byte, bytes);
        return cudaSuccess;
    });
}

static int waited; /* a thread of the grid has */

void after_earlier_kernels(void)
{
    if (!waited) protect(PROT_READ | PROT_WRITE);
    waited = 1;
}

static cudaError_t run_grid(dim3 size, dim3 block, size_t shared, bool together,
                            const std::function<void()> &body)
{
    struct grid grid = {};

    if (strikes(SHIM_FAULT_LAUNCH)) return cudaErrorLaunchFailure;
    kernel_body = &body;
    now = &places[0];
    shim_now.grid = size;
    shim_now.threads = block;
    grid.shared = shared;
    grid.together = together;
    grid.good = 1;
    order_of(grid.warps, thread_count() / WARP);
    order_of(grid.lanes, WARP);
    order_of(grid.places, (int)(size.x * size.y * size.z));
    waited = 0;
    protect(PROT_NONE);
    counts[SHIM_MET] += together;
    if (together)
        run_together(&grid);
    else
        run_blocks(&grid, grid.places.size());
    if (grid.good && waited) return cudaSuccess;
    if (!waited) fprintf(stderr, "shim: a kernel does not begin with after_earlier_kernels\n");
    after_earlier_kernels();
    if (grid.good) return cudaErrorLaunchFailure;
    fprintf(stderr, "shim: threads of a block, or blocks, wait at different barriers\n");
    return cudaErrorLaunchFailure;
}

cudaError_t shim_launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, bool together,
                        std::function<void()> body, const void *params, size_t bytes)
{
    shim_lock lock(shim_mutex);
    unsigned threads = block.x * block.y * block.z;

    if (threads == 0 || threads > MAX_THREADS || threads % WARP || shared > SHARED_LIMIT ||
        grid.x * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
        bytes > MOST_PARAMETERS || (together && grid.x * grid.y * grid.z > SHIM_RESIDENT))
        return give(cudaErrorInvalidValue);
    for (size_t at = 0; at + sizeof(uintptr_t) <= bytes; at += sizeof(uintptr_t)) {
        uintptr_t word;

        memcpy(&word, (const char *)params + at, sizeof word);
        if (!looks_like_host(word)) continue;
        fprintf(stderr, "shim: byte %zu of a kernel's parameters is the host's address %p\n", at,
                (void *)word);
        return give(cudaErrorInvalidValue);
    }
    if (!stream->captured) ++counts[SHIM_LAUNCHED];
    return enqueue(stream, [grid, block, shared, together, body = std::move(body)] {
        return run_grid(grid, block, shared, together, body);
    });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    shim_lock lock(shim_mutex);

    (void)mode;
    if (stream->captured) return give(cudaErrorInvalidValue);
    if (broken != cudaSuccess) return give(broken);
    stream->captured = new shim_graph();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    shim_lock lock(shim_mutex);

    *graph = stream->captured;
    stream->captured = NULL;
    return give(*graph ? broken : cudaErrorInvalidValue);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph,
                                 unsigned long long flags)
{
    (void)flags;
    ++counts[SHIM_PREPARED];
    ++counts[SHIM_CAPTURED];
    *executable = new shim_graph(*graph);
    return give(broken);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    shim_lock lock(shim_mutex);

    ++counts[SHIM_REPLAYED];
    for (auto &node : executable->nodes) {
        cudaError_t error = enqueue(stream, node);

        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    delete executable;
    return cudaSuccess;
}

/* ---- the device ------------------------------------------------------------------------- */

const char *cudaGetErrorString(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress:
        return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    }
    return "unknown error";
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;

    last_error = broken;
    return error;
}

/* SHIM_FAULT_DRIVER: 0 none is installed, 1 it is too old, 2 it sees no card, 3 the card is too old,
 * 4 the library was built for others. */
cudaError_t cudaDriverGetVersion(int *version)
{
    int fault = countdowns[SHIM_FAULT_DRIVER];

    *version = fault == 0 ? 0 : fault == 1 ? 12020 : CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    int fault = countdowns[SHIM_FAULT_DRIVER];

    *count = fault < 0 || fault >= 3;
    return give(*count       ? cudaSuccess
                : fault == 2 ? cudaErrorNoDevice
                             : cudaErrorInsufficientDriver);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    const char *shared = getenv("SHIM_SHARED_KIB"), *processors = getenv("SHIM_PROCESSORS");

    if (device != 0) return give(cudaErrorInvalidDevice);
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "host shim");
    properties->totalGlobalMem = DEVICE_BYTES;
    properties->sharedMemPerBlockOptin = shared ? (size_t)atoi(shared) << 10 : SHARED_LIMIT;
    properties->major = 9;
    if (countdowns[SHIM_FAULT_DRIVER] == 3) properties->major = 7;
    properties->multiProcessorCount = processors ? atoi(processors) : 132;
    return cudaSuccess;
}

int shim_has_kernels(void)
{
    return countdowns[SHIM_FAULT_DRIVER] != 4;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : give(cudaErrorInvalidDevice);
}

void shim_inject(int fault, int countdown)
{
    shim_lock lock(shim_mutex);

    countdowns[fault] = countdown;
}

void shim_repair(void)
{
    shim_lock lock(shim_mutex);

    broken = last_error = cudaSuccess;
    for (int &countdown : countdowns) countdown = -1;
}

long shim_count(int event)
{
    shim_lock lock(shim_mutex);

    return counts[event];
}
