/* copies.cu: the way between the host and the card, which passes through pinned memory.
 *
 * An upload has read its source when it returns, and is done in the stream's order. Small ones are
 * gathered: they cross together, as one copy, when something else is enqueued that could see them, and
 * a kernel puts each where it belongs. So a tick costs one copy each way, however many sessions have
 * something new in however many places. A download waits. */
#include "device.h"

#define THREADS 256

/* One gathered upload, in pinned memory and then on the card. */
struct piece {
    char *to;
    uint32_t from, bytes; /* from: within what crosses */
};

#define LIST_BYTES (GATHERED * sizeof(struct piece))

struct scatter {
    const char *landing;
    size_t pieces; /* where their list begins */
};

/* Grid: parts of a piece, pieces. Bytes: those of the uploads, twice. Bound: the launch. */
__global__ static void __launch_bounds__(THREADS)
    k_scatter(const __grid_constant__ struct scatter p)
{
    after_earlier_kernels();
    const struct piece piece = ((const struct piece *)(const void *)(p.landing +
                                                                     p.pieces))[blockIdx.y];
    const char *from = p.landing + piece.from;
    uint32_t at = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS, words = 0;

    if ((uintptr_t)piece.to % 4 == 0) words = piece.bytes / 4;
    for (uint32_t i = at; i < words; i += step)
        ((uint32_t *)(void *)piece.to)[i] = ((const uint32_t *)(const void *)from)[i];
    for (uint32_t i = 4 * words + at; i < piece.bytes; i += step) piece.to[i] = from[i];
}

int cuda_kernel_architecture(void)
{
    int found = kernel_architecture(k_scatter);

    cudaGetLastError();
    return found;
}

void cuda_flush(struct cuda_backend *cuda)
{
    const struct cuda_piece *first = cuda->pieces;
    int n = cuda->n_pieces;
    size_t begin, list, largest = 0;

    cuda->n_pieces = 0;
    if (n == 0 || cuda->base.failure) return;
    begin = first->staged;
    if (n == 1) {
        cuda_good(cuda,
                  cudaMemcpyAsync(first->to, cuda->staging + begin, first->bytes, cudaMemcpyDefault,
                                  cuda->stream),
                  "a copy");
        return;
    }
    list = cuda->staged;
    cuda->staged += LIST_BYTES;
    struct piece *pieces = (struct piece *)(void *)(cuda->staging + list);

    for (int i = 0; i < n; i++) {
        const struct cuda_piece *one = &cuda->pieces[i];

        pieces[i] = {one->to, (uint32_t)(one->staged - begin), (uint32_t)one->bytes};
        if (one->bytes > largest) largest = one->bytes;
    }
    if (!cuda_good(cuda,
                   cudaMemcpyAsync(cuda->landing, cuda->staging + begin,
                                   list - begin + (size_t)n * sizeof *pieces, cudaMemcpyDefault,
                                   cuda->stream),
                   "a copy"))
        return;
    struct scatter p = blank<struct scatter>();

    p.landing = cuda->landing;
    p.pieces = list - begin;
    launch(cuda, k_scatter, dim3((unsigned)ceil_div((int)largest, 4 * THREADS * 4), (unsigned)n),
           THREADS, 0, p);
}

/* Room in pinned memory that nothing in the stream reads or writes any more. */
static size_t stage_bytes(struct cuda_backend *cuda, size_t bytes)
{
    size_t at;

    if (cuda->staged + bytes + LIST_BYTES > STAGING_BYTES) cuda_wait(cuda);
    at = cuda->staged;
    cuda->staged += (bytes + 63) / 64 * 64;
    return at;
}

static bool overlaps_gathered(const struct cuda_backend *cuda, const char *to, size_t bytes)
{
    for (int i = 0; i < cuda->n_pieces; i++)
        if (to < cuda->pieces[i].to + cuda->pieces[i].bytes && cuda->pieces[i].to < to + bytes)
            return true;
    return false;
}

void cuda_send(struct cuda_backend *cuda, void *device, const void *host, size_t bytes)
{
    const char *from = (const char *)host;
    char *to = (char *)device;

    while (bytes && !cuda->base.failure) {
        size_t n = bytes < STAGING_BYTES / 4 ? bytes : STAGING_BYTES / 4;

        if (cuda->n_pieces == GATHERED || n == STAGING_BYTES / 4 || overlaps_gathered(cuda, to, n))
            cuda_flush(cuda);
        size_t at = stage_bytes(cuda, n);

        memcpy(cuda->staging + at, from, n);
        cuda->pieces[cuda->n_pieces++] = {to, at, n};
        if (n == STAGING_BYTES / 4) cuda_flush(cuda); /* large enough to cross alone */
        from += n, to += n, bytes -= n;
    }
}

void cuda_upload(struct backend *backend, void *device, const void *host, size_t bytes)
{
    cuda_turn turn(cuda_of(backend));

    cuda_send(cuda_of(backend), device, host, bytes);
}

void cuda_download(struct backend *backend, void *host, const void *device, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    const char *from = (const char *)device;
    char *to = (char *)host;

    cuda_flush(cuda);
    while (bytes && !cuda->base.failure) {
        size_t n = bytes < STAGING_BYTES / 4 ? bytes : STAGING_BYTES / 4;
        char *piece = cuda->staging + stage_bytes(cuda, n);

        cuda_good(cuda, cudaMemcpyAsync(piece, from, n, cudaMemcpyDefault, cuda->stream), "a copy");
        cuda_wait(cuda);
        memcpy(to, piece, n);
        from += n, to += n, bytes -= n;
    }
}

void cuda_copy(struct backend *backend, void *to, const void *from, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);

    cuda_flush(cuda);
    cuda_good(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda->stream), "a copy");
}

void cuda_clear(struct backend *backend, void *device, int byte, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);

    cuda_flush(cuda);
    if (bytes) cuda_good(cuda, cudaMemsetAsync(device, byte, bytes, cuda->stream), "a fill");
}
