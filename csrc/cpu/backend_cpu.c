/* backend_cpu.c: the CPU backend as an object: memory, packing, scratch, stages. Device memory is
 * the process's own memory. */
#include "backend_cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../os.h"
#include "../status.h"

#define MAX_THREADS 1024
#define LARGE_PAGE ((size_t)2 << 20) /* of the system's memory */

static void *cpu_allocate(struct backend *backend, size_t bytes)
{
    (void)backend;
    return os_reserve(bytes);
}

static void *cpu_allocate_pages(struct backend *backend, size_t bytes, size_t page_bytes)
{
    void *memory = os_reserve(bytes);

    (void)backend;
    /* Runs of a page lie far apart: small pages would each be looked up anew. */
    if (memory && page_bytes >= LARGE_PAGE) os_advise_huge(memory, bytes);
    return memory;
}

/* The system does it when they are touched. */
static int cpu_commit(struct backend *backend, void *device, size_t bytes)
{
    (void)backend, (void)device, (void)bytes;
    return MOSHI_OK;
}

static void cpu_release(struct backend *backend, void *memory, size_t bytes)
{
    (void)backend;
    if (memory) os_release(memory, bytes);
}

static void cpu_upload(struct backend *backend, void *device, const void *host, size_t bytes)
{
    (void)backend;
    if (bytes) memcpy(device, host, bytes);
}

static void cpu_download(struct backend *backend, void *host, const void *device, size_t bytes)
{
    (void)backend;
    if (bytes) memcpy(host, device, bytes);
}

static int cpu_download_pieces(struct backend *backend, const struct device_piece *pieces,
                               int count)
{
    for (int i = 0; i < count; ++i)
        cpu_download(backend, pieces[i].host, pieces[i].device, pieces[i].bytes);
    return MOSHI_OK;
}

static void cpu_copy(struct backend *backend, void *to, const void *from, size_t bytes)
{
    (void)backend;
    memcpy(to, from, bytes);
}

static void cpu_clear(struct backend *backend, void *device, int byte, size_t bytes)
{
    (void)backend;
    if (bytes) memset(device, byte, bytes);
}

static void cpu_decommit(struct backend *backend, void *const *pages, int count, size_t page_bytes)
{
    (void)backend;
    for (int i = 0; i < count; i++) os_decommit(pages[i], page_bytes);
}

static int64_t cpu_memory_free(struct backend *backend)
{
    (void)backend;
    return os_memory_free();
}

/* ---- matrices --------------------------------------------------------------------------- */

#define PACK_COLUMNS 256

struct pack {
    const struct cpu_kernels *kernels;
    const struct matrix *from; /* rows */
    struct matrix to;
    int failed; /* a weight was not finite */
};

/* `count` weights of a row from column k on. */
static void read_weights(const struct pack *pack, size_t row, size_t k, size_t count, float *y)
{
    const struct matrix *w = pack->from;
    size_t at = row * (size_t)w->cols + k;

    pack->kernels->widen[w->format]((const char *)w->data + at * weight_bytes(w->format), count, y);
    if (w->scales)
        for (size_t i = 0; i < count; i++) y[i] *= w->scales[row];
}

static void pack_panel(const struct pack *pack, size_t first, size_t rows, float *to)
{
    size_t cols = (size_t)pack->to.cols;
    float row[PACK_COLUMNS];

    for (size_t j = 0; j < rows; j++) {
        for (size_t k = 0; k < cols; k += PACK_COLUMNS) {
            size_t n = cols - k < PACK_COLUMNS ? cols - k : PACK_COLUMNS;

            read_weights(pack, first + j, k, n, row);
            for (size_t c = 0; c < n; c++) to[(k + c) * PANEL + j] = row[c];
        }
    }
}

/* The scale of a whole row of int8 or fp8. */
static float row_scale(const struct pack *pack, size_t row)
{
    size_t cols = (size_t)pack->to.cols;
    float most = 0, part[PACK_COLUMNS];

    if (pack->from->format == WEIGHT_INT8 && pack->to.format == WEIGHT_INT8)
        return pack->from->scales[row];
    for (size_t k = 0; k < cols; k += PACK_COLUMNS) {
        size_t n = cols - k < PACK_COLUMNS ? cols - k : PACK_COLUMNS;

        read_weights(pack, row, k, n, part);
        most = fmaxf(most, pack->kernels->magnitude(part, n));
    }
    if (pack->to.format == WEIGHT_INT8) return most / 127;
    return most < FP8_LEAST_ROW ? 0 : most / FP8_MOST;
}

static int quantise_rows(const struct pack *pack, size_t first, size_t rows)
{
    size_t cols = (size_t)pack->to.cols;
    float *scales = pack->to.packed, given[PANEL] = {0};
    uint8_t *to = (uint8_t *)pack->to.packed + fp8_head(pack->to.rows), codes[PANEL][TILE];
    int good = 1;

    for (size_t j = 0; j < rows; j++) scales[first + j] = given[j] = row_scale(pack, first + j);
    for (size_t k = 0; k < cols; k += TILE) {
        size_t n = cols - k < TILE ? cols - k : TILE;
        float w[PANEL][TILE] = {{0}};

        for (size_t j = 0; j < rows; j++) read_weights(pack, first + j, k, n, w[j]);
        good &= pack->kernels->quantise[WEIGHT_FP8]((const float (*)[TILE])w, given, codes);
        for (size_t j = 0; j < rows; j++) memcpy(to + (first + j) * cols + k, codes[j], n);
    }
    return good;
}

static int quantise_panel(const struct pack *pack, size_t first, size_t rows, void *panel)
{
    enum weight_format format = pack->to.format;
    size_t cols = (size_t)pack->to.cols;
    char *tile = panel;
    float *scales = NULL;
    int good = 1;

    if (format == WEIGHT_INT8) {
        scales = panel;
        for (size_t j = 0; j < rows; j++) scales[j] = row_scale(pack, first + j);
        tile += PANEL * sizeof *scales;
    }
    for (size_t k = 0; k < cols; k += TILE, tile += tile_bytes(format)) {
        float w[PANEL][TILE] = {{0}};

        for (size_t j = 0; j < rows; j++)
            read_weights(pack, first + j, k, cols - k < TILE ? cols - k : TILE, w[j]);
        good &= pack->kernels->quantise[format]((const float (*)[TILE])w, scales, tile);
    }
    return good;
}

static void pack_task(void *arg, int part, int first, int last)
{
    struct pack *pack = arg;
    enum weight_format format = pack->to.format;
    size_t bytes = panel_bytes(format, pack->to.cols), all = (size_t)pack->to.rows;

    (void)part;
    for (int panel = first; panel < last; panel++) {
        size_t row = (size_t)panel * PANEL, rows = all - row < PANEL ? all - row : PANEL;
        void *to = (char *)pack->to.packed + (size_t)panel * bytes;
        int good = 1;

        if (format == WEIGHT_FP8)
            good = quantise_rows(pack, row, rows);
        else if (is_block_format(format))
            good = quantise_panel(pack, row, rows, to);
        else
            pack_panel(pack, row, rows, to);
        if (!good) __atomic_store_n(&pack->failed, 1, __ATOMIC_RELAXED);
    }
}

/* Replaces the rows of w by panels of `format`, or by rows of fp8. */
static int make_panels(struct cpu_backend *cpu, struct matrix *w, enum weight_format format)
{
    struct pack job = {.kernels = cpu->kernels, .from = w};
    unsigned mode;

    job.to = (struct matrix){.format = format, .rows = w->rows, .cols = w->cols};
    job.to.packed = os_reserve(packed_bytes(&job.to));
    if (!job.to.packed)
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory to pack a matrix of %d x %d", w->rows,
                          w->cols);
    os_advise_huge(job.to.packed, packed_bytes(&job.to));
    mode = float_mode_flush(); /* as the workers */
    parallel_for(cpu->pool, pack_task, &job, (w->rows + PANEL - 1) / PANEL);
    float_mode_restore(mode);
    if (job.failed) {
        os_release(job.to.packed, packed_bytes(&job.to));
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "a weight is not finite or beyond the range of a 16-bit scale, which the "
                          "format can't hold");
    }
    if (format == WEIGHT_FP8) {
        job.to.scales = job.to.packed;
        job.to.data = (char *)job.to.packed + fp8_head(w->rows);
    }
    *w = job.to;
    return MOSHI_OK;
}

static int cpu_prepare_matrix(struct backend *backend, struct matrix *w, int pack)
{
    return pack && !w->packed ? make_panels(cpu_backend(backend), w, WEIGHT_F32) : MOSHI_OK;
}

static int cpu_quantise_matrix(struct backend *backend, struct matrix *w, enum weight_format format)
{
    return make_panels(cpu_backend(backend), w, format);
}

static void cpu_release_matrix(struct backend *backend, struct matrix *w)
{
    (void)backend;
    if (w->packed) os_release(w->packed, packed_bytes(w));
    w->packed = NULL;
}

/* ---- scratch ---------------------------------------------------------------------------- */

/* Gives *memory room for `count` elements, dropping what it holds. */
static int grow(void **memory, size_t *capacity, size_t count, size_t element_bytes)
{
    void *new;

    if (count <= *capacity) return MOSHI_OK;
    new = os_reserve(count * element_bytes);
    if (!new)
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for %zu bytes of scratch",
                          count * element_bytes);
    if (*memory) os_release(*memory, *capacity * element_bytes);
    *memory = new;
    *capacity = count;
    return MOSHI_OK;
}

static int cpu_reserve(struct backend *backend, int rows, int columns, int keys)
{
    struct cpu_backend *cpu = cpu_backend(backend);
    size_t threads = (size_t)backend->threads;
    void *activations = cpu->activations, *scores = cpu->scores, *nearest = cpu->nearest;
    void *fresh = cpu->fresh, *gathered = cpu->gathered;
    int status;

    /* embed needs two rows; attend puts the query beside the scores, and a query is no wider than
     * an activation. */
    status = grow(&activations, &cpu->activation_floats, ((size_t)rows + 1) * padded(columns),
                  sizeof(float));
    cpu->activations = activations;
    if (status == MOSHI_OK && cpu->kernels->tiles[WEIGHT_BF16])
        status = grow(&gathered, &cpu->gathered_floats,
                      ((size_t)rows + 1) * gathered_width(columns), sizeof(float));
    cpu->gathered = gathered;
    if (status == MOSHI_OK)
        status = grow(&fresh, &cpu->fresh_floats, 2 * (size_t)rows * padded(columns),
                      sizeof(float));
    cpu->fresh = fresh;
    if (status == MOSHI_OK) {
        size_t queries = ATTEND_QUERIES * threads, capacity = cpu->keys * queries;

        status = grow(&scores, &capacity, (padded(keys + ATTEND_STEPS) + padded(columns)) * queries,
                      sizeof(float));
        cpu->scores = scores;
        cpu->keys = capacity / queries;
    }
    if (status == MOSHI_OK) {
        size_t capacity = cpu->rows * threads;

        status = grow(&nearest, &capacity, (size_t)rows * threads, sizeof(struct nearest));
        cpu->nearest = nearest;
        cpu->rows = capacity / threads;
    }
    return status;
}

/* ---- stages ----------------------------------------------------------------------------- */

static int cpu_sync(struct backend *backend)
{
    int status = backend->failure;

    backend->failure = MOSHI_OK;
    return status == MOSHI_OK ? MOSHI_OK : moshi_fail(status, "%s", backend->sentence);
}

static int cpu_run(struct backend *backend, int stage,
                   void (*stage_function)(struct backend *, void *), void *arg, size_t arg_bytes)
{
    unsigned mode = float_mode_flush();

    (void)stage, (void)arg_bytes;
    stage_function(backend, arg);
    float_mode_restore(mode);
    return cpu_sync(backend);
}

static void cpu_destroy(struct backend *backend)
{
    struct cpu_backend *cpu = cpu_backend(backend);
    size_t threads;

    if (!cpu) return;
    threads = (size_t)backend->threads;
    pool_destroy(cpu->pool);
    if (cpu->activations) os_release(cpu->activations, cpu->activation_floats * sizeof(float));
    if (cpu->gathered) os_release(cpu->gathered, cpu->gathered_floats * sizeof(float));
    if (cpu->tile_scratch) os_release(cpu->tile_scratch, threads * sizeof *cpu->tile_scratch);
    if (cpu->fresh) os_release(cpu->fresh, cpu->fresh_floats * sizeof(float));
    if (cpu->scores) os_release(cpu->scores, cpu->keys * threads * ATTEND_QUERIES * sizeof(float));
    if (cpu->nearest) os_release(cpu->nearest, cpu->rows * threads * sizeof(struct nearest));
    free(cpu);
}

static const struct backend_ops cpu_ops = {
    .allocate = cpu_allocate,
    .release = cpu_release,
    .upload = cpu_upload,
    .download = cpu_download,
    .download_pieces = cpu_download_pieces,
    .copy = cpu_copy,
    .clear = cpu_clear,
    .allocate_pages = cpu_allocate_pages,
    .commit = cpu_commit,
    .decommit = cpu_decommit,
    .memory_free = cpu_memory_free,
    .prepare_matrix = cpu_prepare_matrix,
    .quantise_matrix = cpu_quantise_matrix,
    .release_matrix = cpu_release_matrix,
    .reserve = cpu_reserve,
    .run = cpu_run,
    .sync = cpu_sync,
    .destroy = cpu_destroy,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .linear_many = cpu_linear_many,
    .linear_residual = cpu_linear_residual,
    .linear_gated = cpu_linear_gated,
    .rope = cpu_rope,
    .qkv = cpu_qkv,
    .attend = cpu_attend,
    .conv = cpu_conv,
    .conv_transposed = cpu_conv_transposed,
    .rvq_encode = cpu_rvq_encode,
    .rvq_decode = cpu_rvq_decode,
    .delay_input = cpu_delay_input,
    .delay_output = cpu_delay_output,
    .advance = cpu_advance,
    .sample = cpu_sample,
    .softmax = cpu_softmax,
};

int cpu_backend_create(int threads, struct backend **backend)
{
    struct cpu_backend *cpu;
    int status;

    *backend = NULL;
    if (threads < 0 || threads > MAX_THREADS)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "%d threads, expected 0 to %d", threads,
                          MAX_THREADS);
    if (threads == 0) threads = os_cpu_count();
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    cpu = calloc(1, sizeof *cpu);
    if (!cpu) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a backend");
    cpu->base.ops = &cpu_ops;
    cpu->base.device = "cpu";
    cpu->base.threads = threads;
    status = kernels_choose(&cpu->kernels);
    if (status == MOSHI_OK) status = pool_create(threads, &cpu->pool);
    if (status == MOSHI_OK && cpu->kernels->tiles[WEIGHT_BF16]) {
        cpu->tile_scratch = os_reserve((size_t)threads * sizeof *cpu->tile_scratch);
        if (!cpu->tile_scratch) status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a backend");
    }
    if (status == MOSHI_OK) status = cpu_reserve(&cpu->base, 1, 1, 1);
    if (status != MOSHI_OK) {
        cpu_destroy(&cpu->base);
        return status;
    }
    cpu->base.isa = cpu->kernels->name;
    *backend = &cpu->base;
    return MOSHI_OK;
}
