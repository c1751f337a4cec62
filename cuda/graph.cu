/* graph.cu: a stage as a graph: walked, looked up, captured when it is new, launched. */
#include "backend_cuda.h"

#define HASH_START 0x9e3779b97f4a7c15u

void cuda_hash(struct cuda_backend *cuda, const void *bytes, size_t count)
{
    const unsigned char *from = (const unsigned char *)bytes;
    uint64_t hash = cuda->hash;

    for (; count; from += 8) {
        size_t n = count < 8 ? count : 8;
        uint64_t word = 0;

        memcpy(&word, from, n);
        hash = (hash ^ word) * 0xff51afd7ed558ccdu;
        hash ^= hash >> 32;
        count -= n;
    }
    cuda->hash = hash;
}

/* Names a stage by what it depends on; never 0. */
static uint64_t key_of(struct cuda_backend *cuda, void (*stage_function)(struct backend *, void *),
                       const void *arg, size_t bytes)
{
    const uint64_t words[] = {(uint64_t)(uintptr_t)stage_function, cuda->releases};

    cuda->hash = HASH_START;
    cuda_hash(cuda, words, sizeof words);
    cuda_hash(cuda, arg, bytes);
    return cuda->hash | 1;
}

void cuda_forget_graphs(struct cuda_backend *cuda)
{
    for (int i = 0; i < cuda->n_graphs; i++) cudaGraphExecDestroy(cuda->graphs[i].executable);
    cuda->n_graphs = 0;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Not during a capture; graphs know the old address. */
static void grow_scratch(struct cuda_backend *cuda)
{
    cuda_wait(cuda);
    if (cuda->base.failure) return;
    cuda_forget_graphs(cuda);
    cudaFree(cuda->scratch);
    cuda->scratch = NULL;
    cuda->counter_bytes = cuda->scratch_bytes = 0;
    cuda->scratch = (char *)cuda_take(cuda, cuda->counters_wanted + cuda->scratch_wanted);
    if (!cuda->scratch) return;
    cuda->counter_bytes = cuda->counters_wanted;
    cuda->scratch_bytes = cuda->scratch_wanted;
    cuda_good(cuda, cudaMemsetAsync(cuda->scratch, 0, cuda->counter_bytes, cuda->stream), "a fill");
}

static int scratch_suffices(const struct cuda_backend *cuda)
{
    return cuda->scratch_wanted <= cuda->scratch_bytes &&
           cuda->counters_wanted <= cuda->counter_bytes;
}

struct cuda_scratch cuda_take_scratch(struct cuda_backend *cuda, size_t counters, size_t bytes)
{
    cuda->counters_wanted = larger(cuda->counters_wanted, (counters + 255) / 256 * 256);
    cuda->scratch_wanted = larger(cuda->scratch_wanted, bytes);
    if (cuda->mode == CUDA_DIRECT && !scratch_suffices(cuda)) grow_scratch(cuda);
    return {cuda->scratch, cuda->scratch + cuda->counter_bytes};
}

static void walk(struct cuda_backend *cuda, void (*stage_function)(struct backend *, void *),
                 void *arg)
{
    cuda->mode = CUDA_WALK;
    cuda->hash = HASH_START;
    stage_function(&cuda->base, arg);
    cuda->mode = CUDA_DIRECT;
}

static struct cuda_graph *find(struct cuda_backend *cuda)
{
    for (int i = 0; i < cuda->n_graphs; i++)
        if (cuda->graphs[i].hash == cuda->hash) return &cuda->graphs[i];
    return NULL;
}

static struct cuda_graph *find_key(struct cuda_backend *cuda, uint64_t key)
{
    for (int i = 0; i < cuda->n_graphs && key; i++)
        if (cuda->graphs[i].key == key) return &cuda->graphs[i];
    return NULL;
}

static struct cuda_graph *room(struct cuda_backend *cuda)
{
    struct cuda_graph *oldest = &cuda->graphs[0];

    if (cuda->n_graphs < GRAPHS) return &cuda->graphs[cuda->n_graphs++];
    for (int i = 1; i < GRAPHS; i++)
        if (cuda->graphs[i].used < oldest->used) oldest = &cuda->graphs[i];
    cudaGraphExecDestroy(oldest->executable);
    return oldest;
}

static struct cuda_graph *capture(struct cuda_backend *cuda,
                                  void (*stage_function)(struct backend *, void *), void *arg)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    cudaError_t error;

    /* Relaxed: a kernel's first launch loads it, and may set its attributes. */
    if (!cuda_good(cuda, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeRelaxed),
                   "a capture"))
        return NULL;
    cuda->mode = CUDA_CAPTURE;
    stage_function(&cuda->base, arg);
    cuda->mode = CUDA_DIRECT;
    error = cudaStreamEndCapture(cuda->stream, &graph);
    if (cuda_good(cuda, error, "a capture"))
        cuda_good(cuda, cudaGraphInstantiate(&executable, graph, 0), "a graph");
    if (graph) cudaGraphDestroy(graph);
    if (!executable || cuda->base.failure) {
        if (executable) cudaGraphExecDestroy(executable);
        return NULL;
    }
    struct cuda_graph *kept = room(cuda);

    kept->hash = cuda->hash;
    kept->key = 0;
    kept->executable = executable;
    return kept;
}

/* The graph of a stage that has to be looked at. */
static struct cuda_graph *look(struct cuda_backend *cuda,
                               void (*stage_function)(struct backend *, void *), void *arg)
{
    struct cuda_graph *graph;

    walk(cuda, stage_function, arg);
    if (!cuda->base.failure && !scratch_suffices(cuda)) {
        grow_scratch(cuda);
        walk(cuda, stage_function, arg);
    }
    if (cuda->base.failure) return NULL;
    graph = find(cuda);
    return graph ? graph : capture(cuda, stage_function, arg);
}

static void run_graph(struct cuda_backend *cuda, void (*stage_function)(struct backend *, void *),
                      void *arg, size_t arg_bytes)
{
    std::lock_guard<std::mutex> lock(cuda->lock);
    uint64_t key = arg_bytes ? key_of(cuda, stage_function, arg, arg_bytes) : 0;
    struct cuda_graph *graph;

    cuda_flush(cuda);
    graph = find_key(cuda, key);
    if (!graph) graph = look(cuda, stage_function, arg);
    if (!graph) return;
    if (key) graph->key = key;
    graph->used = ++cuda->runs;
    cuda_good(cuda, cudaGraphLaunch(graph->executable, cuda->stream), "a graph's launch");
}

int cuda_run(struct backend *backend, int stage, void (*stage_function)(struct backend *, void *),
             void *arg, size_t arg_bytes)
{
    struct cuda_backend *cuda = cuda_of(backend);
    int status;

    cuda_good(cuda, cudaSetDevice(cuda->card), "the device");
    if (backend->immediate) { /* a trace copies between the operations */
        cuda_flush(cuda);
        stage_function(backend, arg);
        cuda_wait(cuda);
    } else if (stage == STAGE_GIVEN) {
        std::lock_guard<std::mutex> lock(cuda->lock);

        cuda_flush(cuda);
        stage_function(backend, arg);
    } else {
        run_graph(cuda, stage_function, arg, arg_bytes);
    }
    status = backend->failure;
    backend->failure = MOSHI_OK;
    return status ? cuda->fail(status, backend->sentence) : MOSHI_OK;
}
