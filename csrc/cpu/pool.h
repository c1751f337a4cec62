/* pool.h: the threads of one CPU backend.
 *
 * A job is a number of tasks, cut into at most one part per thread, always at the same places. Part
 * i belongs to thread i, so that what a core has cached stays useful; a thread that is done takes
 * over parts that nobody has begun, so that a worker which the system doesn't run holds up nobody.
 * Between jobs a worker spins for some tens of microseconds, then sleeps. With more threads than
 * cores, no more workers are awake than have a core; they and the caller do the parts of the
 * others. */
#ifndef MOSHI_CPU_POOL_H
#define MOSHI_CPU_POOL_H

struct pool;

/* Tasks first..last-1, which are part `part` of the job; part < threads. */
typedef void pool_function(void *arg, int part, int first, int last);

/* threads counts the caller of parallel_for; 1 has no worker. */
int pool_create(int threads, struct pool **pool);
void pool_destroy(struct pool *pool); /* NULL is fine */

/* Runs all tasks and returns when they are done. One caller at a time; not from inside a task. */
void parallel_for(struct pool *pool, pool_function *function, void *arg, int tasks);

/* The same, but each thread comes back for more until none are left, each time for a multiple of
 * `least` tasks (the last ones may be fewer): one that the system or the memory holds up does less,
 * and the others hardly wait for it. So `function` may see a part several times, with tasks that
 * differ from run to run. */
void parallel_share(struct pool *pool, pool_function *function, void *arg, int tasks, int least);

/* Makes this thread round to nearest, trap nothing and treat numbers below the normal range as zero,
 * whatever the host program has set; returns what float_mode_restore takes. Workers always run so. */
unsigned float_mode_flush(void);
void float_mode_restore(unsigned mode);

#endif
