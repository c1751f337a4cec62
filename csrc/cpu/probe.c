/* probe.c: reads and multiplies as fast as the machine allows, and takes the time. */
#include "probe.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../os.h"
#include "../status.h"
#include "kernels.h"

struct probe {
    const void *from;
    size_t bytes;
    uint64_t kept; /* of the results, so that no compiler leaves the work out */
    struct os_thread *thread;
};

/* Runs body(&probes[t]) on so many threads at once; seconds, 0 when that was not possible. */
static double run_at_once(int threads, struct probe *probes, void (*body)(void *))
{
    double start = os_clock();
    int started = 1;

    while (started < threads &&
           os_thread_start(&probes[started].thread, body, &probes[started]) == MOSHI_OK)
        started++;
    body(&probes[0]);
    for (int t = 1; t < started; t++) os_thread_join(probes[t].thread);
    return started == threads ? os_clock() - start : 0;
}

#if defined(MOSHI_CPU_X86)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f")))
#endif

/* ---- reading ---------------------------------------------------------------------------- */

typedef uint64_t vector __attribute__((vector_size(32)));

/* Eight streams side by side. Whether they or one stream are faster depends on the processor, and on
 * how busy its neighbours are. */
static inline __attribute__((always_inline)) void read_streams(struct probe *probe)
{
    size_t vectors = probe->bytes / sizeof(vector) / 8;
    const vector *from = probe->from;
    vector a = {0}, b = {0}, c = {0}, d = {0};

    for (size_t i = 0; i + 2 <= vectors; i += 2) {
        for (size_t j = 0; j < 8; j += 2) {
            const vector *one = from + j * vectors + i, *other = one + vectors;

            a ^= one[0];
            b ^= one[1];
            c ^= other[0];
            d ^= other[1];
        }
    }
    a ^= b ^ c ^ d;
    probe->kept = a[0] ^ a[1] ^ a[2] ^ a[3];
}

#define READ_AHEAD 768 /* bytes */

/* One stream, asked for ahead. */
static inline __attribute__((always_inline)) void read_ahead(struct probe *probe)
{
    size_t vectors = probe->bytes / sizeof(vector);
    const vector *from = probe->from;
    vector a = {0}, b = {0}, c = {0}, d = {0};

    for (size_t i = 0; i + 4 <= vectors; i += 4) {
        __builtin_prefetch((const char *)(from + i) + READ_AHEAD);
        __builtin_prefetch((const char *)(from + i + 2) + READ_AHEAD);
        a ^= from[i];
        b ^= from[i + 1];
        c ^= from[i + 2];
        d ^= from[i + 3];
    }
    a ^= b ^ c ^ d;
    probe->kept = a[0] ^ a[1] ^ a[2] ^ a[3];
}

#define READS 2

static void read_streams_generic(void *probe)
{
    read_streams(probe);
}

static void read_ahead_generic(void *probe)
{
    read_ahead(probe);
}

#if defined(MOSHI_CPU_X86)
AVX2 static void read_streams_avx2(void *probe)
{
    read_streams(probe);
}

AVX2 static void read_ahead_avx2(void *probe)
{
    read_ahead(probe);
}
#endif

/* ---- multiplying ------------------------------------------------------------------------ */

#define CHAINS 12 /* sums that don't wait for each other: as many as hide the latency */
#define ROUNDS 1000000

#define MULTIPLY(name, attribute, lanes, multiply_add)                                             \
    attribute static void name(void *arg)                                                          \
    {                                                                                              \
        typedef float wide __attribute__((vector_size(4 * (lanes))));                              \
        struct probe *probe = arg;                                                                 \
        wide sums[CHAINS], a;                                                                      \
        uint32_t bits;                                                                             \
                                                                                                   \
        for (int l = 0; l < (lanes); l++) a[l] = 0.5f;                                             \
        for (int j = 0; j < CHAINS; j++) sums[j] = a * (float)j;                                   \
        for (int i = 0; i < ROUNDS; i++) {                                                         \
            __asm__ volatile("" : KEEP(a));                                                        \
            _Pragma("GCC unroll 12") for (int j = 0; j < CHAINS; j++)                              \
                sums[j] = multiply_add(sums[j], a);                                                \
        }                                                                                          \
        for (int j = 1; j < CHAINS; j++) sums[0] += sums[j];                                       \
        memcpy(&bits, &sums[0], sizeof bits);                                                      \
        probe->kept = bits;                                                                        \
    }

#if defined(MOSHI_CPU_X86)
#include <immintrin.h>
#define KEEP(x) "+x"(x)
#define FMA_AVX2(x, y) (wide) _mm256_fmadd_ps((__m256)(x), (__m256)(y), (__m256)(y))
#define FMA_AVX512(x, y) (wide) _mm512_fmadd_ps((__m512)(x), (__m512)(y), (__m512)(y))
MULTIPLY(multiply_avx2, AVX2, 8, FMA_AVX2)
#undef KEEP
#define KEEP(x) "+v"(x)
MULTIPLY(multiply_avx512, AVX512, 16, FMA_AVX512)
#undef KEEP
#define KEEP(x) "+x"(x)
#elif defined(__aarch64__)
#define KEEP(x) "+w"(x)
#else
#define KEEP(x) "+m"(x)
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
#define FMA_GENERIC(x, y) (wide) vfmaq_f32((float32x4_t)(y), (float32x4_t)(x), (float32x4_t)(y))
#else
#define FMA_GENERIC(x, y) ((x) * (y) + (y))
#endif
MULTIPLY(multiply_generic, , 4, FMA_GENERIC)

/* ---- the interface ---------------------------------------------------------------------- */

/* What probes run as: the widest that this machine, and MOSHI_C_ISA, allow. */
struct choice {
    void (*read[READS])(void *), (*multiply)(void *);
    int lanes;
};

static struct choice choose(void)
{
    struct choice choice = {{read_streams_generic, read_ahead_generic}, multiply_generic, 4};
#if defined(MOSHI_CPU_X86)
    const struct cpu_kernels *kernels;

    if (kernels_choose(&kernels) != MOSHI_OK || kernels == &kernels_generic) return choice;
    choice = (struct choice){{read_streams_avx2, read_ahead_avx2}, multiply_avx512, 16};
    if (kernels == &kernels_avx2) choice.multiply = multiply_avx2, choice.lanes = 8;
#endif
    return choice;
}

double probe_read(int threads, const void *const *from, size_t bytes)
{
    struct probe *probes = calloc((size_t)threads, sizeof *probes);
    struct choice choice = choose();
    size_t share = bytes / READS / 1024 * 1024;
    double best = 0;

    if (!probes) return 0;
    for (size_t way = 0; way < READS; way++) {
        for (int t = 0; t < threads; t++)
            probes[t] = (struct probe){.from = (const char *)from[t] + way * share, .bytes = share};
        double seconds = run_at_once(threads, probes, choice.read[way]);
        double rate = seconds > 0 ? (double)share * threads / seconds : 0;
        if (rate > best) best = rate;
    }
    free(probes);
    return best;
}

double probe_multiply(int threads)
{
    struct probe *probes = calloc((size_t)threads, sizeof *probes);
    struct choice choice = choose();
    double seconds;

    if (!probes) return 0;
    seconds = run_at_once(threads, probes, choice.multiply);
    free(probes);
    return seconds > 0 ? 2.0 * CHAINS * ROUNDS * choice.lanes * threads / seconds : 0;
}

#define MEMORY_BYTES ((size_t)512 << 20) /* no cache holds it */
#define PIECE_BYTES ((size_t)32 << 20)   /* of one thread at a time */

/* One reading, of pieces that follow each other in memory from *at on. */
static double read_next(int threads, const char *memory, size_t piece, size_t *at,
                        const void **from)
{
    for (int t = 0; t < threads; t++) {
        if (*at + piece > MEMORY_BYTES) *at = 0;
        from[t] = memory + *at;
        *at += piece;
    }
    return probe_read(threads, from, piece);
}

int moshi_measure(int threads, double seconds, struct moshi_limits *limits)
{
    int status = MOSHI_OK;
    size_t piece, at = 0;

    memset(limits, 0, sizeof *limits);
    if (threads == 0) threads = os_cpu_count();
    if (threads < 1 || threads > 1024 || !(seconds >= 0 && seconds <= 60))
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "%d threads for %g s, expected 1 to 1024 for 0 to 60 s", threads,
                          seconds);
    piece = MEMORY_BYTES / (size_t)threads / 1024 * 1024;
    if (piece > PIECE_BYTES) piece = PIECE_BYTES;
    char *memory = os_reserve(MEMORY_BYTES);
    const void **from = calloc((size_t)threads, sizeof *from);
    if (memory && from) {
        os_advise_huge(memory, MEMORY_BYTES);
        memset(memory, 1, MEMORY_BYTES); /* untouched pages are all the same one */
        double end = os_clock() + seconds;
        do {
            double rate = read_next(threads, memory, piece, &at, from);
            double flops = probe_multiply(threads);
            if (rate > limits->read_bytes_s) limits->read_bytes_s = rate;
            if (flops > limits->flops_s) limits->flops_s = flops;
        } while (os_clock() < end && limits->read_bytes_s > 0);
    }
    if (limits->read_bytes_s == 0 || limits->flops_s == 0)
        status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %d threads and %zu bytes to read",
                            threads, MEMORY_BYTES);
    if (memory) os_release(memory, MEMORY_BYTES);
    free(from);
    return status;
}
