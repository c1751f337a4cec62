/* probe.h: what the machine could do at best: the denominators of every share that a benchmark
 * tells. Used by moshi_measure and by the benchmark of the kernels. */
#ifndef MOSHI_CPU_PROBE_H
#define MOSHI_CPU_PROBE_H

#include <stddef.h>

/* Bytes a second of reading `bytes` (2048 or more, no cache holds them) at each of from[threads],
 * aligned to 64, all at once, each on a thread of its own: halves are read in two ways, and the faster
 * one counts. 0 when there are no threads to be had. */
double probe_read(int threads, const void *const *from, size_t bytes);
/* Operations a second, two for each multiply-add, of threads that do nothing else, with vectors as
 * wide as those of the kernels in use. */
double probe_multiply(int threads);

#endif
