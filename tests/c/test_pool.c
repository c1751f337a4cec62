/* test_pool.c: the threads of one backend, also under the thread sanitizer.
 *
 * test_pool [bench]: bench times jobs of several sizes with several numbers of threads, in turn. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "../../csrc/cpu/pool.h"
#include "../../csrc/os.h"

static int passed, failed;

static void verdict(int good, const char *promise)
{
    printf("%s %s\n", good ? "ok" : "FAIL", promise);
    if (good)
        passed++;
    else
        failed++;
}

enum { TASKS = 1000, MOST_THREADS = 64 };

/* What each task and each part saw. The tasks are not atomic: the pool orders them. */
struct seen {
    int runs[TASKS];
    int part_of[TASKS];
    int parts[MOST_THREADS];
    int tasks, least; /* of shares */
    int uneven[MOST_THREADS];
};

static void note(void *arg, int part, int first, int last)
{
    struct seen *seen = arg;

    seen->parts[part]++;
    for (int task = first; task < last; task++) {
        seen->runs[task]++;
        seen->part_of[task] = part;
    }
}

static struct pool *open_pool(int threads)
{
    struct pool *pool;

    if (pool_create(threads, &pool)) exit(2);
    return pool;
}

static void test_every_task_runs_once_in_its_part(void)
{
    static const int counts[] = {1, 2, 3, 8, 17};
    static struct seen seen, again;
    int good = 1;

    for (int c = 0; c < 5; c++) {
        struct pool *pool = open_pool(counts[c]);

        for (int tasks = 0; tasks <= TASKS; tasks += tasks < 40 ? 1 : 160) {
            memset(&seen, 0, sizeof seen);
            memset(&again, 0, sizeof again);
            parallel_for(pool, note, &seen, tasks);
            parallel_for(pool, note, &again, tasks);
            for (int task = 0; task < TASKS; task++) {
                good &= seen.runs[task] == (task < tasks);
                good &= seen.part_of[task] == again.part_of[task];
                if (task > 0 && task < tasks)
                    good &= seen.part_of[task] - seen.part_of[task - 1] <= 1 &&
                            seen.part_of[task] >= seen.part_of[task - 1];
            }
            for (int part = 0; part < MOST_THREADS; part++)
                good &= seen.parts[part] <= 1 && (part < counts[c] || !seen.parts[part]);
        }
        pool_destroy(pool);
    }
    verdict(good, "every task runs once, in runs that are cut at the same places each time");
}

static void note_share(void *arg, int part, int first, int last)
{
    struct seen *seen = arg;

    note(arg, part, first, last);
    seen->uneven[part] |= first % seen->least || (last % seen->least && last != seen->tasks);
}

static void test_shared_tasks_run_once_each(void)
{
    static const int counts[] = {1, 2, 3, 8, 17};
    static struct seen seen;
    int good = 1;

    for (int c = 0; c < 5; c++) {
        struct pool *pool = open_pool(counts[c]);

        for (int least = 1; least <= 9; least += 4) {
            for (int tasks = 0; tasks <= TASKS; tasks += tasks < 40 ? 1 : 160) {
                memset(&seen, 0, sizeof seen);
                seen.tasks = tasks;
                seen.least = least;
                parallel_share(pool, note_share, &seen, tasks, least);
                for (int part = 0; part < MOST_THREADS; part++) good &= !seen.uneven[part];
                for (int task = 0; task < TASKS; task++)
                    good &= seen.runs[task] == (task < tasks) && seen.part_of[task] < counts[c];
            }
        }
        pool_destroy(pool);
    }
    verdict(good, "every task that threads share runs once, in shares that are multiples");
}

/* Each job reads what the one before wrote, in other parts. */
static void add_neighbour(void *arg, int part, int first, int last)
{
    int64_t *values = arg;

    (void)part;
    for (int task = first; task < last; task++)
        values[TASKS + task] = values[task] + values[(task + TASKS / 2) % TASKS];
}

static void copy_back(void *arg, int part, int first, int last)
{
    int64_t *values = arg;

    (void)part;
    for (int task = first; task < last; task++) values[task] = values[TASKS + task] % 1000003;
}

static void run_chain(struct pool *pool, int64_t *values, int jobs)
{
    for (int task = 0; task < TASKS; task++) values[task] = task;
    for (int job = 0; job < jobs; job++) {
        parallel_for(pool, add_neighbour, values, TASKS);
        parallel_for(pool, copy_back, values, TASKS);
    }
}

static void test_a_job_sees_all_that_the_last_one_wrote(void)
{
    static int64_t alone[2 * TASKS], together[2 * TASKS];
    struct pool *one = open_pool(1);
    int threads[] = {2, 3, 3 * os_cpu_count() + 1}, good = 1;

    run_chain(one, alone, 500);
    for (int i = 0; i < 3; i++) {
        struct pool *pool = open_pool(threads[i]);

        run_chain(pool, together, 500);
        good &= memcmp(alone, together, sizeof alone) == 0;
        pool_destroy(pool);
    }
    pool_destroy(one);
    verdict(good, "a job sees all that the one before it wrote, with more threads than cores too");
}

static double processor_seconds(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void sleep_seconds(double seconds)
{
    struct timespec time = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};

    nanosleep(&time, NULL);
}

/* 20 pauses of 10 ms, as between the ticks of a quick model: a worker that kept spinning would take
 * 200 ms of processor time for each. */
static void test_workers_sleep_between_jobs(void)
{
    static struct seen seen;
    int threads[] = {2, 3 * os_cpu_count() + 1}, good = 1;

    for (int i = 0; i < 2; i++) {
        struct pool *pool = open_pool(threads[i]);
        double before = processor_seconds();

        for (int pause = 0; pause < 20; pause++) {
            parallel_for(pool, note, &seen, TASKS);
            sleep_seconds(0.01);
        }
        good &= processor_seconds() - before < 0.1;
        pool_destroy(pool);
    }
    verdict(good, "workers sleep between jobs");
}

struct caller {
    struct pool *pool;
    int64_t values[2 * TASKS];
    struct os_thread *thread;
};

static void call(void *arg)
{
    struct caller *caller = arg;

    run_chain(caller->pool, caller->values, 300);
}

static void test_pools_run_side_by_side(void)
{
    enum { POOLS = 3 };
    static struct caller callers[POOLS], alone;
    int good = 1;

    alone.pool = open_pool(1);
    call(&alone);
    pool_destroy(alone.pool);
    for (int i = 0; i < POOLS; i++) {
        callers[i].pool = open_pool(os_cpu_count() + i);
        if (os_thread_start(&callers[i].thread, call, &callers[i])) exit(2);
    }
    for (int i = 0; i < POOLS; i++) {
        os_thread_join(callers[i].thread);
        pool_destroy(callers[i].pool);
        good &= memcmp(callers[i].values, alone.values, sizeof alone.values) == 0;
    }
    verdict(good, "pools of several callers run side by side");
}

static void test_an_idle_pool_can_be_destroyed(void)
{
    for (int i = 0; i < 50; i++) {
        struct pool *pool = open_pool(1 + i % 9);

        if (i % 3 == 0) sleep_seconds(0.001);
        pool_destroy(pool);
    }
    pool_destroy(NULL);
    verdict(1, "a pool that has done nothing can be destroyed, asleep or awake");
}

/* ---- bench ------------------------------------------------------------------------------ */

struct load {
    const float *data;
    size_t floats; /* of one task */
    float sums[64 * MOST_THREADS];
};

static void read_load(void *arg, int part, int first, int last)
{
    struct load *load = arg;
    float sums[16] = {0};

    for (int task = first; task < last; task++)
        for (size_t i = 0; i + 16 <= load->floats; i += 16)
            for (int j = 0; j < 16; j++) sums[j] += load->data[(size_t)task * load->floats + i + j];
    for (int j = 0; j < 16; j++) load->sums[64 * part + j] = sums[j];
}

/* What takes the backend again and again for a long time, as the passes over a whole file do. */
struct turns {
    struct os_mutex *lock;
    int taken;          /* turns of both threads */
    int waited, longer; /* turns that came after another's; after more than the one under way */
};

static void take_turns(struct turns *turns)
{
    for (int i = 0; i < 400; i++) {
        int before = __atomic_load_n(&turns->taken, __ATOMIC_RELAXED);
        double start;

        os_mutex_lock(turns->lock);
        before = __atomic_fetch_add(&turns->taken, 1, __ATOMIC_RELAXED) - before;
        turns->waited += before > 0;
        turns->longer += before > 2; /* one may begin between the load and the lock */
        start = os_clock();
        while (os_clock() - start < 100e-6) continue; /* work, while the other one comes */
        os_mutex_unlock(turns->lock);
    }
}

static void take_turns_too(void *turns)
{
    take_turns(turns);
}

static void test_a_queue_gives_turns(void)
{
    struct turns turns = {.lock = os_mutex_create_queue()};
    struct os_thread *thread;

    if (!turns.lock || os_thread_start(&thread, take_turns_too, &turns) != 0) exit(2);
    take_turns(&turns);
    os_thread_join(thread);
    os_mutex_destroy(turns.lock);
    verdict(turns.taken == 800 && turns.longer <= turns.waited / 8,
            "who takes a lock again and again keeps nobody waiting for more than a turn");
}

/* Best of many, each number of threads in turn, of 50 jobs in a row. */
static void bench(void)
{
    enum { COUNTS = 5, TURNS = 40, JOBS = 50, UNITS = 256 };
    static const int sizes_kb[] = {0, 64, 512, 4096};
    static struct load load;
    int counts[COUNTS] = {1, os_cpu_count(), os_cpu_count() + 1, 4 * os_cpu_count(), 32};
    struct pool *pools[COUNTS];

    load.data = os_reserve((size_t)4096 << 10);
    if (!load.data) exit(2);
    for (int c = 0; c < COUNTS; c++) pools[c] = open_pool(counts[c]);
    for (int s = 0; s < 4; s++) {
        double best[COUNTS], sum[COUNTS] = {0};

        load.floats = (size_t)sizes_kb[s] * 256 / UNITS;
        for (int turn = 0; turn < TURNS; turn++) {
            for (int c = 0; c < COUNTS; c++) {
                double start = os_clock(), seconds;

                for (int job = 0; job < JOBS; job++)
                    parallel_for(pools[c], read_load, &load, UNITS);
                seconds = (os_clock() - start) / JOBS;
                sum[c] += seconds / TURNS;
                best[c] = turn && best[c] < seconds ? best[c] : seconds;
            }
        }
        printf("jobs that read %4d KB:", sizes_kb[s]);
        for (int c = 0; c < COUNTS; c++)
            printf("  %d threads %.1f us (mean %.1f)", counts[c], best[c] * 1e6, sum[c] * 1e6);
        printf("\n");
    }
    for (int c = 0; c < COUNTS; c++) pool_destroy(pools[c]);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "bench") == 0) {
        bench();
        return 0;
    }
    test_every_task_runs_once_in_its_part();
    test_shared_tasks_run_once_each();
    test_a_job_sees_all_that_the_last_one_wrote();
    test_workers_sleep_between_jobs();
    test_pools_run_side_by_side();
    test_an_idle_pool_can_be_destroyed();
    test_a_queue_gives_turns();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
