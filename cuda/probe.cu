/* probe.cu: what the card's memory can do at best: the denominators of every share that is told. */
#include "device.h"

#define THREADS 512
#define BLOCKS 4 /* of a processor */
#define ROUNDS 10

struct read_all {
    const uint4 *from;
    size_t count; /* of 16 bytes */
    unsigned *sum;
};

/* Reads, and stores a word that depends on all. Four loads are under way at once in each thread; so
 * many registers that as many blocks are, too. */
__global__ static void __launch_bounds__(THREADS, BLOCKS)
    k_read(const __grid_constant__ struct read_all p)
{
    after_earlier_kernels();
    size_t step = (size_t)gridDim.x * THREADS;
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x;
    unsigned sum = 0;

    for (; at + 3 * step < p.count; at += 4 * step) {
        uint4 a = p.from[at], b = p.from[at + step];
        uint4 c = p.from[at + 2 * step], d = p.from[at + 3 * step];

        sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; at < p.count; at += step) {
        uint4 a = p.from[at];

        sum ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    if (sum == 1) atomicAdd(p.sum, sum);
}

static void read_once(struct cuda_backend *cuda, const struct read_all &p)
{
    launch(cuda, k_read, dim3((unsigned)(BLOCKS * cuda->processors)), THREADS, 0, p);
}

int cuda_probe(struct backend *backend, size_t bytes, double (*clock)(void), double *read_rate,
               double *copy_rate)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    struct read_all p = blank<struct read_all>();
    char *memory = (char *)cuda_take(cuda, 2 * bytes + sizeof *p.sum);
    double began;
    int status;

    *read_rate = *copy_rate = 0;
    if (memory) {
        p.from = (const uint4 *)(const void *)memory;
        p.count = bytes / sizeof(uint4);
        p.sum = (unsigned *)(void *)(memory + 2 * bytes);
        cuda_good(cuda, cudaMemsetAsync(memory, 0x5a, 2 * bytes + sizeof *p.sum, cuda->stream),
                  "a fill");
        for (int warm = 1; warm >= 0; warm--) {
            cuda_wait(cuda);
            began = clock();
            for (int i = 0; i < ROUNDS; i++) read_once(cuda, p);
            cuda_wait(cuda);
            *read_rate = ROUNDS * (double)bytes / (clock() - began);
            began = clock();
            for (int i = 0; i < ROUNDS; i++)
                cuda_good(cuda,
                          cudaMemcpyAsync(memory + bytes, memory, bytes, cudaMemcpyDefault,
                                          cuda->stream),
                          "a copy");
            cuda_wait(cuda);
            *copy_rate = 2 * ROUNDS * (double)bytes / (clock() - began);
        }
        cudaFree(memory);
    }
    status = backend->failure;
    backend->failure = MOSHI_OK;
    return status ? cuda->fail(status, backend->sentence) : MOSHI_OK;
}
