/* cuda.h: the CUDA backend is a library of its own, built from cuda/, that is loaded when a device of
 * its kind is asked for. It exports one function, and calls nothing of this one but `fail`. */
#ifndef MOSHI_LIBRARY_OF_CUDA_H
#define MOSHI_LIBRARY_OF_CUDA_H

#include "backend.h"

/* Raised with every change of this header, backend.h, quant.h, or what they include. */
#define CUDA_ABI 3
#define CUDA_ENTRY "moshi_cuda_backend_v1"
#define CUDA_LIBRARY "libmoshi_cuda.so"

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
