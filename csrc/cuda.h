/* cuda.h: the CUDA backend is a library of its own, built from cuda/, that is loaded when a device of
 * its kind is asked for. It exports one function, and calls nothing of this one but `fail`. */
#ifndef MOSHI_LIBRARY_OF_CUDA_H
#define MOSHI_LIBRARY_OF_CUDA_H

#include "backend.h"

/* Raised with every change of this header, backend.h, quant.h, or what they include. */
#define CUDA_ABI 6
#define CUDA_ENTRY "moshi_cuda_backend_v1"
#define CUDA_LIBRARY "libmoshi_cuda.so"

/* y[n][rows] = W x, of bf16 numbers, their sums in f32: for each of some matrices that lie one after
 * the other. All of it is the card's memory. */
struct cuda_peer_product {
    int n, rows, columns, copies;
    const void *weights; /* [copies][rows][columns] */
    const void *x; /* [n][columns] */
    float *y; /* of the last matrix */
};

struct cuda_library {
    int abi;
    int ops_bytes; /* sizeof(struct backend_ops) */
    /* Cards that the driver shows, or 0 and the reason. */
    int (*count)(char *reason, size_t capacity);
    void (*describe)(int card, struct moshi_device *device);
    /* fail records a sentence and gives `status` back, as moshi_fail does. */
    int (*create)(int card, int (*fail)(int status, const char *sentence),
                  struct backend **backend);
    /* Bytes a second that the card's memory gives when `bytes` are read, and when they are copied (read
     * and written). clock: monotonic seconds. A status. */
    int (*probe)(struct backend *backend, size_t bytes, double (*clock)(void), double *read_rate,
                 double *copy_rate);
    /* Memory that both sides read and write, for tests; NULL on failure. Never given back. */
    void *(*share)(size_t bytes);
    /* What NVIDIA's cuBLASLt makes of it, and the seconds that it takes for each matrix. It is used
     * for nothing else, and looked for in the file that MOSHI_C_CUBLASLT names, or else in the package
     * nvidia-cublas beside this one, then in the system. found: its version and file. A status;
     * MOSHI_ERROR_DEVICE with a sentence where there is none. */
    int (*cublaslt)(struct backend *backend, const struct cuda_peer_product *product,
                    double (*clock)(void), double *seconds, char *found, size_t capacity);
};

typedef const struct cuda_library *cuda_entry(void);

/* "cuda" is card 0, "cuda:1" card 1. Fails with a sentence that says what is missing. */
int cuda_backend_create(const char *device, struct backend **backend);
/* Fills up to `capacity` entries, returns how many there are: the cards, or one that says why there
 * is none. Nothing where the library was not built. */
int cuda_devices(struct moshi_device *devices, int capacity);
/* The library, or NULL after recording why not. */
const struct cuda_library *cuda_load(void);

#endif
