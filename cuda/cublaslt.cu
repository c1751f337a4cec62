/* cublaslt.cu: a product by NVIDIA's cuBLASLt, which our own are measured and checked against. The
 * library is looked for when that is asked for, and nothing else needs it. Declared here is the part
 * of its interface that is used, so that building needs no header of it. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

#include "backend_cuda.h"

#define WORKSPACE_BYTES ((size_t)32 << 20)
#define WARM_TURNS 3
#define TURNS 20
#define RUNS 20 /* of a turn, beside which the wait is short; benchmarks/gpu.c has as many */

/* Numbers of its enumerators. */
enum { TYPE_F32 = 0, TYPE_BF16 = 14, COMPUTE_F32 = 68, TRANSPOSE_FIRST = 3, TRANSPOSED = 1 };
enum { PREFER_WORKSPACE = 1 };

/* What the search for an algorithm returns: the algorithm, and how it would do. */
struct heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

struct cublaslt {
    size_t (*version)(void);
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*description_create)(void **description, int compute_type, int scale_type);
    int (*description_set)(void *description, int attribute, const void *value, size_t bytes);
    int (*description_destroy)(void *description);
    int (*layout_create)(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
    int (*layout_destroy)(void *layout);
    int (*preference_create)(void **preference);
    int (*preference_set)(void *preference, int attribute, const void *value, size_t bytes);
    int (*preference_destroy)(void *preference);
    int (*search)(void *handle, void *description, void *a, void *b, void *c, void *d,
                  void *preference, int wanted, struct heuristic *results, int *found);
    int (*multiply)(void *handle, void *description, const void *alpha, const void *a,
                    void *a_layout, const void *b, void *b_layout, const void *beta, const void *c,
                    void *c_layout, void *d, void *d_layout, const void *algorithm, void *workspace,
                    size_t workspace_bytes, cudaStream_t stream);
};

/* ---- finding it ------------------------------------------------------------------------- */

/* The wheel nvidia-cublas lies beside the package, whose folder lib/ has this library. */
static void *open_library(char *reason, size_t capacity)
{
    static const char *const places[] = {"libcublasLt.so.13",
                                         "/usr/local/cuda/lib64/libcublasLt.so.13",
                                         "libcublasLt.so.12", "libcublasLt.so"};
    static const char here = 0;
    const char *given = getenv("MOSHI_C_CUBLASLT"), *slash;
    char wheel[4096];
    void *library = NULL;
    Dl_info info;

    if (!given && dladdr(&here, &info) && info.dli_fname &&
        (slash = strrchr(info.dli_fname, '/')) != NULL) {
        snprintf(wheel, sizeof wheel, "%.*s/../../nvidia/cu13/lib/libcublasLt.so.13",
                 (int)(slash - info.dli_fname), info.dli_fname);
        library = dlopen(wheel, RTLD_NOW | RTLD_LOCAL);
    }
    for (size_t i = 0; i < (given ? 1 : sizeof places / sizeof *places) && !library; i++)
        library = dlopen(given ? given : places[i], RTLD_NOW | RTLD_LOCAL);
    if (!library && given)
        snprintf(reason, capacity, "cuBLASLt is not at %.200s, which MOSHI_C_CUBLASLT names",
                 given);
    else if (!library)
        snprintf(reason, capacity,
                 "cuBLASLt was not found: neither the package nvidia-cublas nor the system has "
                 "libcublasLt.so.13");
    return library;
}

template <class F>
static bool find(void *library, const char *name, F *function, char *reason, size_t capacity)
{
    *(void **)function = dlsym(library, name);
    if (!*function)
        snprintf(reason, capacity, "what was found as cuBLASLt has no function %s", name);
    return *function != NULL;
}

/* It stays loaded: what it has put on the card can't be taken back. */
static bool load(struct cublaslt *lt, char *reason, size_t capacity)
{
    void *library = open_library(reason, capacity);

#define FIND(member, name) find(library, "cublasLt" name, &lt->member, reason, capacity)
    return library && FIND(version, "GetVersion") && FIND(create, "Create") &&
           FIND(destroy, "Destroy") && FIND(description_create, "MatmulDescCreate") &&
           FIND(description_set, "MatmulDescSetAttribute") &&
           FIND(description_destroy, "MatmulDescDestroy") &&
           FIND(layout_create, "MatrixLayoutCreate") &&
           FIND(layout_destroy, "MatrixLayoutDestroy") &&
           FIND(preference_create, "MatmulPreferenceCreate") &&
           FIND(preference_set, "MatmulPreferenceSetAttribute") &&
           FIND(preference_destroy, "MatmulPreferenceDestroy") &&
           FIND(search, "MatmulAlgoGetHeuristic") && FIND(multiply, "Matmul");
#undef FIND
}

static void describe(const struct cublaslt *lt, char *found, size_t capacity)
{
    const size_t version = lt->version();
    Dl_info info = {};

    dladdr((void *)lt->version, &info);
    snprintf(found, capacity, "cuBLASLt %zu.%zu.%zu, %s", version / 10000, version / 100 % 100,
             version % 100, info.dli_fname ? info.dli_fname : "?");
}

/* ---- a product -------------------------------------------------------------------------- */

/* Its matrices lie column by column: rows of weights are the columns of a matrix that is transposed,
 * rows of activations and of results are columns. */
struct multiplication {
    struct cublaslt lt;
    void *handle, *description, *weights, *x, *y, *preference, *workspace;
    struct heuristic chosen;
};

static bool done(struct cuda_backend *cuda, int status, const char *what)
{
    if (status) cuda_fail(cuda, MOSHI_ERROR_DEVICE, "cuBLASLt: %s gave status %d", what, status);
    return status == 0;
}

static bool prepare(struct cuda_backend *cuda, const struct cuda_peer_product *product,
                    struct multiplication *m)
{
    const struct cublaslt *lt = &m->lt;
    const int transposed = TRANSPOSED;
    const size_t workspace_bytes = WORKSPACE_BYTES;
    const uint64_t rows = (uint64_t)product->rows, columns = (uint64_t)product->columns;
    const uint64_t n = (uint64_t)product->n;
    int found = 0;

    if (!done(cuda, lt->create(&m->handle), "its start") ||
        !done(cuda, lt->description_create(&m->description, COMPUTE_F32, TYPE_F32),
              "a description") ||
        !done(cuda,
              lt->description_set(m->description, TRANSPOSE_FIRST, &transposed, sizeof transposed),
              "a description") ||
        !done(cuda, lt->layout_create(&m->weights, TYPE_BF16, columns, rows, (int64_t)columns),
              "a layout") ||
        !done(cuda, lt->layout_create(&m->x, TYPE_BF16, columns, n, (int64_t)columns),
              "a layout") ||
        !done(cuda, lt->layout_create(&m->y, TYPE_F32, rows, n, (int64_t)rows), "a layout") ||
        !done(cuda, lt->preference_create(&m->preference), "a preference") ||
        !done(cuda,
              lt->preference_set(m->preference, PREFER_WORKSPACE, &workspace_bytes,
                                 sizeof workspace_bytes),
              "a preference") ||
        !done(cuda,
              lt->search(m->handle, m->description, m->weights, m->x, m->y, m->y, m->preference, 1,
                         &m->chosen, &found),
              "a search"))
        return false;
    if (found < 1) done(cuda, m->chosen.status ? m->chosen.status : -1, "a search");
    m->workspace = cuda_take(cuda, workspace_bytes);
    return !cuda->base.failure;
}

static void finish(struct multiplication *m)
{
    const struct cublaslt *lt = &m->lt;

    cudaFree(m->workspace);
    if (m->preference) lt->preference_destroy(m->preference);
    if (m->y) lt->layout_destroy(m->y);
    if (m->x) lt->layout_destroy(m->x);
    if (m->weights) lt->layout_destroy(m->weights);
    if (m->description) lt->description_destroy(m->description);
    if (m->handle) lt->destroy(m->handle);
}

static void multiply_all(struct cuda_backend *cuda, const struct cuda_peer_product *product,
                         const struct multiplication *m)
{
    const size_t bytes = (size_t)product->rows * (size_t)product->columns * 2;
    const float one = 1, zero = 0;

    for (int i = 0; i < product->copies && !cuda->base.failure; i++)
        done(cuda,
             m->lt.multiply(m->handle, m->description, &one,
                            (const char *)product->weights + (size_t)i * bytes, m->weights,
                            product->x, m->x, &zero, product->y, m->y, product->y, m->y,
                            m->chosen.algorithm, m->workspace, WORKSPACE_BYTES, cuda->stream),
             "a product");
}

/* All copies are one graph, as the operations of a stage are, that is launched again and again before
 * the wait. */
static double median_time(struct cuda_backend *cuda, const struct cuda_peer_product *product,
                          const struct multiplication *m, double (*clock)(void))
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    double seconds[TURNS] = {};

    multiply_all(cuda, product, m); /* what is loaded at first use is not captured */
    cuda_wait(cuda);
    if (cuda->base.failure ||
        !cuda_good(cuda, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeRelaxed),
                   "a capture"))
        return 0;
    multiply_all(cuda, product, m);
    if (cuda_good(cuda, cudaStreamEndCapture(cuda->stream, &graph), "a capture"))
        cuda_good(cuda, cudaGraphInstantiate(&executable, graph, 0), "a graph");
    for (int i = -WARM_TURNS; i < TURNS && !cuda->base.failure; i++) {
        double began = clock();

        for (int run = 0; run < RUNS && !cuda->base.failure; run++)
            cuda_good(cuda, cudaGraphLaunch(executable, cuda->stream), "a graph's launch");
        cuda_wait(cuda);
        if (i >= 0) seconds[i] = (clock() - began) / RUNS;
    }
    if (executable) cudaGraphExecDestroy(executable);
    if (graph) cudaGraphDestroy(graph);
    std::nth_element(seconds, seconds + TURNS / 2, seconds + TURNS);
    return seconds[TURNS / 2] / product->copies;
}

int cuda_cublaslt(struct backend *backend, const struct cuda_peer_product *product,
                  double (*clock)(void), double *seconds, char *found, size_t capacity)
{
    struct cuda_backend *cuda = cuda_of(backend);
    cuda_turn turn(cuda);
    struct multiplication m = {};
    char reason[256];
    int status;

    *seconds = 0;
    snprintf(found, capacity, "%s", "");
    if (!load(&m.lt, reason, sizeof reason)) return cuda->fail(MOSHI_ERROR_DEVICE, reason);
    describe(&m.lt, found, capacity);
    cuda_flush(cuda);
    if (prepare(cuda, product, &m)) *seconds = median_time(cuda, product, &m, clock);
    finish(&m);
    cudaGetLastError();
    status = backend->failure;
    backend->failure = MOSHI_OK;
    return status ? cuda->fail(status, backend->sentence) : MOSHI_OK;
}
