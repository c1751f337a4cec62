/* backend.cu: the CUDA backend as an object: the card, its memory, copies, matrices, and what the
 * library exports. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <new>

#include "backend_cuda.h"
#include "blocks.h"

#define LEAST_MAJOR 8 /* compute capability 8.0 */

void cuda_fail(struct cuda_backend *cuda, int status, const char *format, ...)
{
    va_list arguments;

    if (cuda->base.failure) return;
    cuda->base.failure = status;
    va_start(arguments, format);
    vsnprintf(cuda->base.sentence, sizeof cuda->base.sentence, format, arguments);
    va_end(arguments);
}

bool cuda_good(struct cuda_backend *cuda, cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return true;
    cudaGetLastError();
    if (error == cudaErrorMemoryAllocation)
        cuda_fail(cuda, MOSHI_ERROR_MEMORY, "%s has no memory for %s", cuda->device, what);
    else
        cuda_fail(cuda, MOSHI_ERROR_DEVICE,
                  "%s failed at %s: %s; sessions on it have ended, and if a model opened anew "
                  "fails too, the process has to be started again",
                  cuda->device, what, cudaGetErrorString(error));
    return false;
}

bool cuda_fits(struct cuda_backend *cuda, const char *name, size_t shared)
{
    if (shared <= cuda->shared_limit) return true;
    cuda_fail(cuda, MOSHI_ERROR_DEVICE,
              "%s: %zu bytes of shared memory are needed, and %s has %zu for a block", name, shared,
              cuda->device, cuda->shared_limit);
    return false;
}

/* ---- memory ----------------------------------------------------------------------------- */

void cuda_out_of_memory(struct cuda_backend *cuda, size_t bytes)
{
    size_t free_bytes = 0, total = 0;

    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    cuda_fail(cuda, MOSHI_ERROR_MEMORY,
              "%s is out of memory: %.1f MiB more are needed, %.1f of its %.1f MiB are free; "
              "fewer sessions or a shorter context need less",
              cuda->device, (double)bytes / 0x1p20, (double)free_bytes / 0x1p20,
              (double)total / 0x1p20);
}

void *cuda_take(struct cuda_backend *cuda, size_t bytes)
{
    void *memory = NULL;
    cudaError_t error = cudaMalloc(&memory, bytes);

    if (error == cudaErrorMemoryAllocation) return cuda_out_of_memory(cuda, bytes), nullptr;
    return cuda_good(cuda, error, "an allocation") ? memory : NULL;
}

static void *cuda_allocate(struct backend *backend, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    void *memory = cuda_take(cuda, bytes ? bytes : 1);

    if (memory) cuda_fill(cuda, memory, 0, bytes);
    return memory;
}

static void cuda_release(struct backend *backend, void *memory, size_t bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);

    (void)bytes;
    cuda->releases++;
    cuda_flush(cuda);
    cudaStreamSynchronize(cuda->stream); /* a run may still be using it */
    if (!cuda_release_pages(cuda, memory)) cudaFree(memory);
    cudaGetLastError();
}

bool cuda_drain(struct cuda_backend *cuda)
{
    cuda_flush(cuda);
    cuda->staged = 0;
    return cuda_good(cuda, cudaStreamSynchronize(cuda->stream), "a frame");
}

void cuda_wait(struct cuda_backend *cuda)
{
    struct cuda_report report;

    if (!cuda_drain(cuda)) return;
    report = *cuda->report;
    cuda->report->trouble = TROUBLE_NONE;
    if (report.trouble == TROUBLE_TOKEN)
        cuda_fail(cuda, MOSHI_ERROR_INTERNAL, "embed: token %d in row %d, expected one below %d",
                  report.found, report.row, report.expected);
    if (report.trouble == TROUBLE_LOGITS)
        cuda_fail(cuda, MOSHI_ERROR_INTERNAL, "sample: a logit of stream %d is not finite (row %d)",
                  report.found, report.row);
    if (report.trouble == TROUBLE_WEIGHT)
        cuda_fail(cuda, MOSHI_ERROR_CHECKPOINT,
                  "a weight is not finite or beyond the range of a 16-bit scale, which the "
                  "format can't hold");
}

static int64_t cuda_memory_free(struct backend *backend)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    size_t free_bytes = 0, total = 0;

    if (cudaMemGetInfo(&free_bytes, &total) == cudaSuccess) return (int64_t)free_bytes;
    cudaGetLastError(); /* who uses the card next is told */
    return 0;
}

/* ---- matrices --------------------------------------------------------------------------- */

int cuda_remember(struct cuda_backend *cuda, const void *rows)
{
    if (cuda->n_moved == cuda->moved_capacity) {
        int capacity = cuda->moved_capacity ? 2 * cuda->moved_capacity : 256;
        void *larger = realloc(cuda->moved, (size_t)capacity * sizeof *cuda->moved);

        if (!larger) {
            cuda_fail(cuda, MOSHI_ERROR_MEMORY, "no memory for the list of matrices");
            return 0;
        }
        cuda->moved = (const void **)larger;
        cuda->moved_capacity = capacity;
    }
    cuda->moved[cuda->n_moved++] = rows;
    return 1;
}

int cuda_forget(struct cuda_backend *cuda, const void *rows)
{
    for (int i = 0; i < cuda->n_moved; i++) {
        if (cuda->moved[i] != rows) continue;
        cuda->moved[i] = cuda->moved[--cuda->n_moved];
        return 1;
    }
    return 0;
}

/* Rows stay as they are; those in the host's memory move to the card. Rows of fp8 and the panels of a
 * file become blocks. */
static int cuda_prepare_matrix(struct backend *backend, struct matrix *w, int pack)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    struct cudaPointerAttributes attributes = {};
    size_t bytes = (size_t)w->rows * (size_t)w->cols * weight_bytes(w->format);
    int status;

    (void)pack;
    if (w->packed || w->format == WEIGHT_FP8) return cuda_make_blocks(cuda, w, w->format);
    cudaPointerGetAttributes(&attributes, w->data);
    cudaGetLastError(); /* older runtimes call plain memory an error */
    if (attributes.type == cudaMemoryTypeDevice) return MOSHI_OK;
    void *memory = cuda_take(cuda, bytes);
    if (memory && cuda_remember(cuda, memory)) {
        cuda_send(cuda, memory, w->data, bytes);
        cuda_flush(cuda);
    }
    status = backend->failure;
    backend->failure = MOSHI_OK;
    if (status) {
        cuda_forget(cuda, memory);
        cudaFree(memory);
        return cuda->fail(status, backend->sentence);
    }
    w->data = memory;
    return MOSHI_OK;
}

static int cuda_quantise_matrix(struct backend *backend, struct matrix *w,
                                enum weight_format format)
{
    cuda_turn turn(cuda_of(backend));

    return cuda_make_blocks(cuda_of(backend), w, format);
}

static void cuda_release_matrix(struct backend *backend, struct matrix *w)
{
    const void *rows = w->packed ? w->packed : w->data;

    if (!cuda_forget(cuda_of(backend), rows)) return;
    cuda_release(backend, (void *)rows, 0);
    w->packed = NULL;
    w->data = NULL;
}

/* ---- the object ------------------------------------------------------------------------- */

/* Scratch grows with the operations themselves, before a stage is captured. */
static int cuda_reserve(struct backend *backend, int rows, int columns, int keys)
{
    (void)backend, (void)rows, (void)columns, (void)keys;
    return MOSHI_OK;
}

static int cuda_sync(struct backend *backend)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    int status;

    cuda_wait(cuda);
    status = backend->failure;
    backend->failure = MOSHI_OK;
    return status ? cuda->fail(status, backend->sentence) : MOSHI_OK;
}

static void cuda_destroy(struct backend *backend)
{
    struct cuda_backend *cuda = cuda_of(backend);

    if (!cuda) return;
    cudaSetDevice(cuda->card);
    if (cuda->stream) cudaStreamSynchronize(cuda->stream);
    cuda_forget_graphs(cuda);
    while (cuda->ranges) cuda_release_pages(cuda, cuda->ranges->base);
    cudaFree(cuda->scratch);
    cudaFree(cuda->landing);
    if (cuda->staging) cudaFreeHost(cuda->staging);
    if (cuda->report) cudaFreeHost(cuda->report);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    cudaGetLastError();
    free(cuda->moved);
    delete cuda;
}

static struct backend_ops make_ops(void)
{
    struct backend_ops ops = {};

    ops.allocate = cuda_allocate;
    ops.release = cuda_release;
    ops.upload = cuda_upload;
    ops.download = cuda_download;
    ops.download_pieces = cuda_download_pieces;
    ops.copy = cuda_copy;
    ops.clear = cuda_clear;
    ops.allocate_pages = cuda_allocate_pages;
    ops.commit = cuda_commit;
    ops.decommit = cuda_decommit;
    ops.memory_free = cuda_memory_free;
    ops.prepare_matrix = cuda_prepare_matrix;
    ops.quantise_matrix = cuda_quantise_matrix;
    ops.release_matrix = cuda_release_matrix;
    ops.reserve = cuda_reserve;
    ops.run = cuda_run;
    ops.sync = cuda_sync;
    ops.destroy = cuda_destroy;
    ops.embed = cuda_embed;
    ops.norm = cuda_norm;
    ops.linear = cuda_linear;
    ops.linear_many = cuda_linear_many;
    ops.linear_residual = cuda_linear_residual;
    ops.linear_gated = cuda_linear_gated;
    ops.rope = cuda_rope;
    ops.qkv = cuda_qkv;
    ops.attend = cuda_attend;
    ops.conv = cuda_conv;
    ops.conv_transposed = cuda_conv_transposed;
    ops.rvq_encode = cuda_rvq_encode;
    ops.rvq_decode = cuda_rvq_decode;
    ops.delay_input = cuda_delay_input;
    ops.delay_output = cuda_delay_output;
    ops.advance = cuda_advance;
    ops.sample = cuda_sample;
    ops.softmax = cuda_softmax;
    ops.depth = cuda_depth;
    ops.delay_given = cuda_delay_given;
    return ops;
}

static const struct backend_ops cuda_ops = make_ops();

/* ---- the library ------------------------------------------------------------------------ */

static int count_cards(char *reason, size_t capacity)
{
    int version = 0, count = 0;
    cudaError_t error;

    cudaDriverGetVersion(&version);
    if (version == 0) {
        snprintf(reason, capacity, "no NVIDIA driver is installed");
        return 0;
    }
    if (version / 1000 < CUDART_VERSION / 1000) {
        snprintf(reason, capacity,
                 "the NVIDIA driver is too old: it knows CUDA %d.%d, and %d.0 or later is needed",
                 version / 1000, version % 1000 / 10, CUDART_VERSION / 1000);
        return 0;
    }
    error = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (error == cudaSuccess && count > 0) return count;
    snprintf(reason, capacity, "the NVIDIA driver shows no card (%s)",
             cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error));
    return 0;
}

static int supported(const struct cudaDeviceProp *properties, char *reason, size_t capacity)
{
    if (properties->major >= LEAST_MAJOR) return 1;
    snprintf(reason, capacity,
             "the card %.60s has compute capability %d.%d, and %d.0 or later is needed",
             properties->name, properties->major, properties->minor, LEAST_MAJOR);
    return 0;
}

static void describe_card(int card, struct moshi_device *device)
{
    struct cudaDeviceProp properties = {};
    cudaError_t error = cudaGetDeviceProperties(&properties, card);

    snprintf(device->name, sizeof device->name, "cuda:%d", card);
    if (error != cudaSuccess) {
        cudaGetLastError();
        snprintf(device->reason, sizeof device->reason, "%s", cudaGetErrorString(error));
        return;
    }
    snprintf(device->description, sizeof device->description, "%.70s, compute capability %d.%d",
             properties.name, properties.major, properties.minor);
    device->memory_bytes = (int64_t)properties.totalGlobalMem;
    device->usable = supported(&properties, device->reason, sizeof device->reason);
}

static bool is_on(const char *setting)
{
    const char *value = getenv(setting);

    return value && strcmp(value, "1") == 0;
}

/* Drivers that know parameters of more than 4 KB, and kernels in graphs that start early. */
#define DEPTH_DRIVER 12010
#define EARLY_DRIVER 12030

static int open_card(struct cuda_backend *cuda, int card)
{
    struct cudaDeviceProp properties = {};
    void *staging = NULL, *report = NULL;
    int driver = 0;
    char reason[160];

    cuda->card = card;
    snprintf(cuda->device, sizeof cuda->device, "cuda:%d", card);
    if (!cuda_good(cuda, cudaGetDeviceProperties(&properties, card), "its properties")) return 0;
    if (!supported(&properties, reason, sizeof reason)) {
        cuda_fail(cuda, MOSHI_ERROR_DEVICE, "%s can't be used: %s", cuda->device, reason);
        return 0;
    }
    cuda->processors = properties.multiProcessorCount;
    cuda->shared_limit = properties.sharedMemPerBlockOptin;
    snprintf(cuda->isa, sizeof cuda->isa, "sm_%d%d", properties.major, properties.minor);
    if (!cuda_good(cuda, cudaSetDevice(card), "its choice")) return 0;
    const int architecture = cuda_kernel_architecture();

    if (!architecture) {
        cuda_fail(cuda, MOSHI_ERROR_DEVICE,
                  "%s can't be used: " CUDA_LIBRARY
                  " was built without kernels for the card %.60s, "
                  "whose compute capability is %d.%d",
                  cuda->device, properties.name, properties.major, properties.minor);
        return 0;
    }
    cudaDriverGetVersion(&driver);
    cuda->early = architecture >= 90 && driver >= EARLY_DRIVER && is_on("MOSHI_C_EARLY_KERNELS");
    cuda->groups = HAS_WARPGROUPS && architecture == 90 && properties.major == 9 &&
                   is_on("MOSHI_C_WARPGROUPS");
    cuda->depth_kernel = driver >= DEPTH_DRIVER && is_on("MOSHI_C_DEPTH_KERNEL");
    if (!cuda_good(cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking),
                   "a stream") ||
        !cuda_good(cuda, cudaMallocHost(&staging, STAGING_BYTES), "pinned memory"))
        return 0;
    cuda->staging = (char *)staging;
    cuda->landing = (char *)cuda_take(cuda, STAGING_BYTES);
    if (!cuda->landing) return 0;
    if (!cuda_good(cuda, cudaMallocHost(&report, sizeof *cuda->report), "pinned memory")) return 0;
    cuda->report = (struct cuda_report *)report;
    cuda->report->trouble = TROUBLE_NONE;
    virtual_open(&cuda->virtual_memory, card);
    return 1;
}

static int create_backend(int card, int (*fail)(int status, const char *sentence),
                          struct backend **backend)
{
    struct cuda_backend *cuda = new (std::nothrow) struct cuda_backend();
    char reason[160], sentence[256];
    int count = count_cards(reason, sizeof reason), status;

    *backend = NULL;
    if (!cuda) return fail(MOSHI_ERROR_MEMORY, "no memory for a backend");
    if (count == 0 || card >= count) {
        if (count)
            snprintf(reason, sizeof reason,
                     count == 1 ? "there is %d card, cuda:%d" : "there are %d cards, up to cuda:%d",
                     count, count - 1);
        snprintf(sentence, sizeof sentence, "device \"cuda:%d\" is not available: %s", card,
                 reason);
        delete cuda;
        return fail(MOSHI_ERROR_DEVICE, sentence);
    }
    cuda->base.ops = &cuda_ops;
    cuda->base.device = cuda->device;
    cuda->base.isa = cuda->isa;
    cuda->base.threads = 1;
    cuda->base.whole_ticks = 1;
    cuda->base.given_rows = GIVEN_ROWS;
    cuda->fail = fail;
    if (!open_card(cuda, card)) {
        snprintf(sentence, sizeof sentence, "%s", cuda->base.sentence);
        status = cuda->base.failure;
        cuda_destroy(&cuda->base);
        return fail(status, sentence);
    }
    *backend = &cuda->base;
    return MOSHI_OK;
}

static void *share_memory(size_t bytes)
{
    void *memory = NULL;

    return cudaMallocManaged(&memory, bytes) == cudaSuccess ? memory : NULL;
}

static const struct cuda_library library = {CUDA_ABI,       (int)sizeof(struct backend_ops),
                                            count_cards,    describe_card,
                                            create_backend, cuda_probe,
                                            share_memory,   cuda_cublaslt};

extern "C" __attribute__((visibility("default"))) const struct cuda_library *moshi_cuda_backend_v1(
    void)
{
    return &library;
}
