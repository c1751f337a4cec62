/* copies.cu: the ways between the host and the card, which pass through pinned memory, and those
 * within the card.
 *
 * An upload has read its source when it returns; uploads, copies and fills are done in the stream's
 * order. Small ones are gathered: when something else is enqueued that could see them, the uploads
 * cross together, as one copy, and one kernel does all of them. So a tick costs one copy each way,
 * however many sessions have something new in however many places, and a fork or a session that begins
 * a launch or two. No failure of another call drops what was gathered. A download waits. */
#include "device.h"

#define THREADS 256
#define PART_BYTES 4096 /* of a piece, for a block */
#define LARGE_BYTES (size_t)(64 << 10) /* copies and fills that are not gathered */
#define ALONE_BYTES (STAGING_BYTES / 4) /* the same of uploads; what crosses at once, at most */
#define FETCHED_BYTES (STAGING_BYTES / 2) /* that cross together */

struct piece {
    char *to;
    const char *from; /* or NULL: fill */
    uint32_t bytes, fill;
};

struct pieces {
    struct piece of[GATHERED];
};

/* Grid: parts of a piece, pieces. Bytes: those of the pieces, twice. Bound: the launch, or the memory. */
__global__ static void __launch_bounds__(THREADS) k_pieces(const __grid_constant__ struct pieces p)
{
    after_earlier_kernels();
    const struct piece &piece = p.of[blockIdx.y];
    uint32_t at = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS, words = 0;

    if (((uintptr_t)piece.to | (uintptr_t)piece.from) % 4 == 0) words = piece.bytes / 4;
    for (uint32_t i = at; i < words; i += step)
        ((uint32_t *)(void *)piece.to)[i] = piece.from
                                                ? ((const uint32_t *)(const void *)piece.from)[i]
                                                : piece.fill;
    for (uint32_t i = 4 * words + at; i < piece.bytes; i += step)
        piece.to[i] = piece.from ? piece.from[i] : (char)piece.fill;
}

int cuda_kernel_architecture(void)
{
    int found = kernel_architecture(k_pieces);

    cudaGetLastError();
    return found;
}

static bool is_staged(const struct cuda_backend *cuda, const char *from)
{
    return (size_t)(from - cuda->staging) < STAGING_BYTES;
}

static void do_one(struct cuda_backend *cuda, const struct cuda_piece *piece)
{
    cudaError_t error = piece->from
                            ? cudaMemcpyAsync(piece->to, piece->from, piece->bytes,
                                              cudaMemcpyDefault, cuda->stream)
                            : cudaMemsetAsync(piece->to, piece->fill, piece->bytes, cuda->stream);

    cuda_good(cuda, error, piece->from ? "a copy" : "a fill");
}

static void do_gathered(struct cuda_backend *cuda, int n)
{
    struct pieces p = blank<struct pieces>();
    const char *begin = NULL, *end = NULL; /* of the uploads, staged one after the other */
    size_t largest = 0;

    for (int i = 0; i < n; i++) {
        const struct cuda_piece *piece = &cuda->pieces[i];
        const char *from = piece->from;

        if (is_staged(cuda, from)) {
            if (!begin) begin = from;
            end = from + piece->bytes;
            from = cuda->landing + (from - begin);
        }
        p.of[i] = {piece->to, from, (uint32_t)piece->bytes, 0x01010101u * (uint8_t)piece->fill};
        if (piece->bytes > largest) largest = piece->bytes;
    }
    if (begin && !cuda_good(cuda,
                            cudaMemcpyAsync(cuda->landing, begin, (size_t)(end - begin),
                                            cudaMemcpyDefault, cuda->stream),
                            "a copy"))
        return;
    launch(cuda, k_pieces, dim3((unsigned)ceil_div((int)largest, PART_BYTES), (unsigned)n), THREADS,
           0, p);
}

void cuda_flush(struct cuda_backend *cuda)
{
    const int n = cuda->n_pieces;

    if (n == 0) return;
    cuda_own_failures own(cuda);

    cuda->n_pieces = 0;
    if (n == 1)
        do_one(cuda, &cuda->pieces[0]);
    else
        do_gathered(cuda, n);
}

/* Room in pinned memory that nothing in the stream reads or writes any more. */
static char *stage_bytes(struct cuda_backend *cuda, size_t bytes)
{
    size_t at;

    if (cuda->staged + bytes > STAGING_BYTES) cuda_drain(cuda);
    at = cuda->staged;
    cuda->staged += (bytes + 63) / 64 * 64;
    return cuda->staging + at;
}

static bool meet(const char *a, size_t a_bytes, const char *b, size_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

/* Pieces that are gathered are done in any order. */
static bool comes_later(const struct cuda_backend *cuda, const struct cuda_piece *piece)
{
    for (int i = 0; i < cuda->n_pieces; i++) {
        const struct cuda_piece *earlier = &cuda->pieces[i];

        if (meet(piece->to, piece->bytes, earlier->to, earlier->bytes) ||
            (piece->from && meet(piece->from, piece->bytes, earlier->to, earlier->bytes)) ||
            (earlier->from && meet(piece->to, piece->bytes, earlier->from, earlier->bytes)))
            return true;
    }
    return false;
}

/* What is large goes its own way; an upload among gathered ones would cross with them, too. */
static void gather(struct cuda_backend *cuda, const struct cuda_piece &piece)
{
    const bool upload = is_staged(cuda, piece.from);
    const bool alone = piece.bytes >= (upload ? ALONE_BYTES : LARGE_BYTES);

    if (piece.bytes == 0) return;
    if (cuda->n_pieces == GATHERED || (upload && alone) || comes_later(cuda, &piece))
        cuda_flush(cuda);
    if (alone) {
        cuda_own_failures own(cuda);

        do_one(cuda, &piece);
        return;
    }
    cuda->pieces[cuda->n_pieces++] = piece;
}

void cuda_send(struct cuda_backend *cuda, void *device, const void *host, size_t bytes)
{
    const char *from = (const char *)host;
    char *to = (char *)device;

    while (bytes) {
        size_t n = bytes < ALONE_BYTES ? bytes : ALONE_BYTES;
        char *staged = stage_bytes(cuda, n);

        memcpy(staged, from, n);
        gather(cuda, {to, staged, n, 0});
        from += n, to += n, bytes -= n;
    }
}

void cuda_upload(struct backend *backend, void *device, const void *host, size_t bytes)
{
    cuda_turn turn(cuda_of(backend));

    cuda_send(cuda_of(backend), device, host, bytes);
}

static void fetch(struct cuda_backend *cuda, void *host, const void *device, size_t bytes)
{
    const char *from = (const char *)device;
    char *to = (char *)host;

    cuda_flush(cuda);
    while (bytes && !cuda->base.failure) {
        size_t n = bytes < ALONE_BYTES ? bytes : ALONE_BYTES;
        char *piece = stage_bytes(cuda, n);

        cuda_good(cuda, cudaMemcpyAsync(piece, from, n, cudaMemcpyDefault, cuda->stream), "a copy");
        cuda_drain(cuda);
        memcpy(to, piece, n);
        from += n, to += n, bytes -= n;
    }
}

void cuda_download(struct backend *backend, void *host, const void *device, size_t bytes)
{
    cuda_turn turn(cuda_of(backend));

    fetch(cuda_of(backend), host, device, bytes);
}

/* As many of the places as fit are brought together on the card, and cross as one copy. How many. */
static int fetch_together(struct cuda_backend *cuda, const struct device_piece *pieces, int count)
{
    size_t bytes = 0, at = 0;
    int n = 0;

    for (; n < count && bytes + pieces[n].bytes <= FETCHED_BYTES; n++) {
        gather(cuda, {cuda->landing + bytes, (const char *)pieces[n].device, pieces[n].bytes, 0});
        bytes += (pieces[n].bytes + 15) / 16 * 16;
    }
    char *staged = stage_bytes(cuda, bytes);

    cuda_flush(cuda);
    cuda_good(cuda, cudaMemcpyAsync(staged, cuda->landing, bytes, cudaMemcpyDefault, cuda->stream),
              "a copy");
    cuda_drain(cuda);
    for (int i = 0; i < n; i++) {
        memcpy(pieces[i].host, staged + at, pieces[i].bytes);
        at += (pieces[i].bytes + 15) / 16 * 16;
    }
    return n;
}

int cuda_download_pieces(struct backend *backend, const struct device_piece *pieces, int count)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    cuda_own_failures own(cuda);

    cuda_flush(cuda);
    for (int i = 0; i < count && !backend->failure;) {
        if (pieces[i].bytes <= FETCHED_BYTES)
            i += fetch_together(cuda, pieces + i, count - i);
        else
            fetch(cuda, pieces[i].host, pieces[i].device, pieces[i].bytes), i++;
    }
    return own.report();
}

void cuda_copy(struct backend *backend, void *to, const void *from, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);

    gather(cuda, {(char *)to, (const char *)from, bytes, 0});
}

void cuda_fill(struct cuda_backend *cuda, void *device, int byte, size_t bytes)
{
    gather(cuda, {(char *)device, NULL, bytes, byte});
}

void cuda_clear(struct backend *backend, void *device, int byte, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);

    cuda_fill(cuda, device, byte, bytes);
}
