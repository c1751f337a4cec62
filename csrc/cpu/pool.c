#include "pool.h"

#include <stdint.h>

#include "../os.h"
#include "../status.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define SPIN_SECONDS 40e-6

/* The ticket of part i in job e is 2e until somebody takes it, then 2e + 1. Whoever has taken a
 * part may read the job: the caller can't begin another before the part is finished. */
struct worker {
    _Alignas(64) uint32_t ticket;
    int index;
    struct pool *pool;
    struct os_thread *thread;
};

struct pool {
    int threads;
    int helpers; /* workers that may be awake at once: one per core but the caller's */
    int spins;   /* pauses before a thread sleeps */
    size_t bytes;

    pool_function *function;
    void *arg;
    int tasks, parts;

    _Alignas(64) uint32_t epoch; /* number of the current job */
    uint32_t stop;
    int awake; /* workers that are not asleep on epoch, nor about to be */
    _Alignas(64) uint32_t pending; /* parts not finished, without part 0 */
    uint32_t caller_sleeps;
    struct worker workers[]; /* [threads], the first one is the caller's and unused */
};

static inline void pause_cpu(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

unsigned float_mode_flush(void)
{
#if defined(__x86_64__)
    unsigned mode = _mm_getcsr();
    _mm_setcsr(0x1f80u | 0x8040u); /* the state of a new process, with FTZ and DAZ */
    return mode;
#elif defined(__aarch64__)
    uint64_t mode;

    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    float_mode_restore(1u << 24); /* the state of a new process, with FZ */
    return (unsigned)mode;
#else
    return 0;
#endif
}

void float_mode_restore(unsigned mode)
{
#if defined(__x86_64__)
    _mm_setcsr(mode);
#elif defined(__aarch64__)
    __asm__ __volatile__("msr fpcr, %0" : : "r"((uint64_t)mode));
#else
    (void)mode;
#endif
}

static void run_part(const struct pool *pool, int part)
{
    int64_t tasks = pool->tasks;
    int first = (int)(tasks * part / pool->parts);
    int last = (int)(tasks * (part + 1) / pool->parts);

    pool->function(pool->arg, part, first, last);
}

static int take(struct pool *pool, int part, uint32_t epoch)
{
    uint32_t open = 2 * epoch;

    return __atomic_compare_exchange_n(&pool->workers[part].ticket, &open, open + 1, 0,
                                       __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

/* Takes and runs whatever is left of job `epoch`, the parts from `own` on first. */
static void help(struct pool *pool, int own, uint32_t epoch)
{
    for (int i = 0; i < pool->threads; i++) {
        int part = (own + i) % pool->threads;

        if (part == 0 || !take(pool, part, epoch)) continue;
        run_part(pool, part);
        if (__atomic_sub_fetch(&pool->pending, 1, __ATOMIC_SEQ_CST) == 0 &&
            __atomic_load_n(&pool->caller_sleeps, __ATOMIC_SEQ_CST))
            os_wake_word(&pool->pending, 1);
    }
}

static uint32_t wait_for_job(struct pool *pool, uint32_t seen)
{
    uint32_t epoch;

    for (int i = 0; i < pool->spins; i++) {
        epoch = __atomic_load_n(&pool->epoch, __ATOMIC_ACQUIRE);
        if (epoch != seen) return epoch;
        if (__atomic_load_n(&pool->awake, __ATOMIC_RELAXED) > pool->helpers) break;
        pause_cpu();
    }
    __atomic_sub_fetch(&pool->awake, 1, __ATOMIC_SEQ_CST);
    while ((epoch = __atomic_load_n(&pool->epoch, __ATOMIC_SEQ_CST)) == seen)
        os_wait_word(&pool->epoch, seen);
    __atomic_add_fetch(&pool->awake, 1, __ATOMIC_SEQ_CST);
    return epoch;
}

static void worker_main(void *arg)
{
    struct worker *worker = arg;
    struct pool *pool = worker->pool;
    uint32_t seen = 0;

    float_mode_flush();
    for (;;) {
        seen = wait_for_job(pool, seen);
        if (__atomic_load_n(&pool->stop, __ATOMIC_ACQUIRE)) return;
        help(pool, worker->index, seen);
    }
}

/* Begins a job, with so many workers. One that isn't woken misses nothing: its part goes to
 * another. */
static void publish(struct pool *pool, int workers)
{
    int awake;

    __atomic_add_fetch(&pool->epoch, 1, __ATOMIC_SEQ_CST);
    awake = __atomic_load_n(&pool->awake, __ATOMIC_SEQ_CST);
    if (awake < workers) os_wake_word(&pool->epoch, workers - awake);
}

void parallel_for(struct pool *pool, pool_function *function, void *arg, int tasks)
{
    uint32_t epoch, left;
    int parts = tasks < pool->threads ? tasks : pool->threads;

    if (parts <= 1) {
        if (tasks > 0) function(arg, 0, 0, tasks);
        return;
    }
    pool->function = function;
    pool->arg = arg;
    pool->tasks = tasks;
    pool->parts = parts;
    epoch = __atomic_load_n(&pool->epoch, __ATOMIC_RELAXED) + 1;
    __atomic_store_n(&pool->pending, (uint32_t)parts - 1, __ATOMIC_RELAXED);
    for (int i = 1; i < parts; i++)
        __atomic_store_n(&pool->workers[i].ticket, 2 * epoch, __ATOMIC_RELEASE);
    publish(pool, parts - 1 < pool->helpers ? parts - 1 : pool->helpers);

    run_part(pool, 0);
    help(pool, 0, epoch);
    for (int i = 0; i < pool->spins; i++) {
        if (__atomic_load_n(&pool->pending, __ATOMIC_ACQUIRE) == 0) return;
        pause_cpu();
    }
    __atomic_store_n(&pool->caller_sleeps, 1, __ATOMIC_SEQ_CST);
    while ((left = __atomic_load_n(&pool->pending, __ATOMIC_SEQ_CST)) != 0)
        os_wait_word(&pool->pending, left);
    __atomic_store_n(&pool->caller_sleeps, 0, __ATOMIC_RELAXED);
}

struct share {
    pool_function *function;
    void *arg;
    int tasks, least;
    int threads;
    int next; /* the first task that nobody has taken */
};

/* Takes a share of what is left, which gets smaller, so that all end at about the same time. */
static void share_part(void *arg, int part, int first, int last)
{
    struct share *share = arg;
    int from = __atomic_load_n(&share->next, __ATOMIC_RELAXED), count;

    (void)first, (void)last;
    while (from < share->tasks) {
        count = (share->tasks - from) / (2 * share->threads);
        count = count < share->least ? share->least : count - count % share->least;
        if (count > share->tasks - from) count = share->tasks - from;
        if (!__atomic_compare_exchange_n(&share->next, &from, from + count, 0, __ATOMIC_RELAXED,
                                         __ATOMIC_RELAXED))
            continue;
        share->function(share->arg, part, from, from + count);
        from = __atomic_load_n(&share->next, __ATOMIC_RELAXED);
    }
}

void parallel_share(struct pool *pool, pool_function *function, void *arg, int tasks, int least)
{
    int parts = (tasks + least - 1) / least;
    struct share share = {
        .function = function, .arg = arg, .tasks = tasks, .least = least, .threads = pool->threads};

    parallel_for(pool, share_part, &share, parts < pool->threads ? parts : pool->threads);
}

/* A pause takes from a few to 150 cycles. */
static int count_spins(void)
{
    double start = os_clock(), seconds;

    for (int i = 0; i < 500; i++) pause_cpu();
    seconds = (os_clock() - start) / 500;
    if (seconds < 1e-9) seconds = 1e-9;
    return (int)(SPIN_SECONDS / seconds) + 1;
}

int pool_create(int threads, struct pool **result)
{
    size_t bytes = sizeof(struct pool) + (size_t)threads * sizeof(struct worker);
    struct pool *pool = os_reserve(bytes);

    *result = NULL;
    if (!pool) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %d threads", threads);
    pool->bytes = bytes;
    pool->threads = threads;
    pool->helpers = os_cpu_count() - 1;
    pool->awake = threads - 1;
    pool->spins = count_spins();
    for (int i = 1; i < threads; i++) {
        struct worker *worker = &pool->workers[i];

        worker->index = i;
        worker->pool = pool;
        if (os_thread_start(&worker->thread, worker_main, worker) != MOSHI_OK) {
            worker->thread = NULL;
            pool_destroy(pool);
            return moshi_fail(MOSHI_ERROR_DEVICE, "thread %d of %d could not be started", i,
                              threads);
        }
    }
    *result = pool;
    return MOSHI_OK;
}

void pool_destroy(struct pool *pool)
{
    if (!pool) return;
    __atomic_store_n(&pool->stop, 1, __ATOMIC_RELEASE);
    __atomic_add_fetch(&pool->epoch, 1, __ATOMIC_SEQ_CST);
    os_wake_word(&pool->epoch, pool->threads);
    for (int i = 1; i < pool->threads; i++)
        if (pool->workers[i].thread) os_thread_join(pool->workers[i].thread);
    os_release(pool, pool->bytes);
}
