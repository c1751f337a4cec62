/* trace.c: a backend that watches another one. Every operation goes to the inner backend, then its
 * output is downloaded, measured and written down as one line:
 *
 *   number stage operation name rows width min max rms hash
 *
 * Two runs are compared with diff; the first line that differs names the culprit. The hash (FNV-1a,
 * 64 bits) and the figures leave out rows that are not active, since their contents are garbage.
 * Operations that count rows without saying which are active take it from the last one that did.
 * The first value that is not finite becomes a failure. Slow, and it allocates while running. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "backend.h"
#include "hash.h"
#include "status.h"

struct trace {
    struct backend base;
    struct backend *inner;
    FILE *file;
    int64_t number;
    int stage;
    char *buffer; /* the output of an operation */
    size_t buffer_bytes;
    uint8_t *active; /* [rows] of the last operation that named its rows */
    int rows, rows_capacity;
};

static struct trace *trace_of(struct backend *backend)
{
    return (struct trace *)backend;
}

static struct backend *inner_of(struct backend *backend)
{
    return trace_of(backend)->inner;
}

/* ---- what is written -------------------------------------------------------------------- */

static void remember_rows(struct trace *trace, const struct rows *rows)
{
    if (rows->n > trace->rows_capacity) {
        uint8_t *active = realloc(trace->active, (size_t)rows->n);

        if (!active) {
            backend_fail(&trace->base, MOSHI_ERROR_MEMORY, "no memory to trace %d rows", rows->n);
            return;
        }
        trace->active = active;
        trace->rows_capacity = rows->n;
    }
    trace->rows = rows->n;
    trace->inner->ops->download(trace->inner, trace->active, rows->active, (size_t)rows->n);
}

static int is_active(const struct trace *trace, int row, int rows)
{
    if (trace->rows == 0 || rows % trace->rows != 0) return 1;
    return trace->active[row / (rows / trace->rows)];
}

static const void *fetch(struct trace *trace, const void *device, size_t bytes)
{
    if (bytes > trace->buffer_bytes) {
        char *buffer = realloc(trace->buffer, bytes);

        if (!buffer) {
            backend_fail(&trace->base, MOSHI_ERROR_MEMORY, "no memory to trace %zu bytes", bytes);
            return NULL;
        }
        trace->buffer = buffer;
        trace->buffer_bytes = bytes;
    }
    trace->inner->ops->download(trace->inner, trace->buffer, device, bytes);
    return trace->buffer;
}

struct figures {
    double min, max, square;
    int64_t count;
    uint64_t hash;
};

static void write_line(struct trace *trace, const char *operation, const char *name, int rows,
                       int width, const struct figures *f)
{
    fprintf(trace->file, "%" PRId64 " %d %s %s %d %d %.9g %.9g %.9g %016" PRIx64 "\n",
            trace->number++, trace->stage, operation, name ? name : "-", rows, width,
            f->count ? f->min : 0, f->count ? f->max : 0,
            f->count ? sqrt(f->square / (double)f->count) : 0, f->hash);
    fflush(trace->file);
}

static void measure(struct figures *f, double value)
{
    if (f->count == 0 || value < f->min) f->min = value;
    if (f->count == 0 || value > f->max) f->max = value;
    f->square += value * value;
    f->count++;
}

#define NEW_FIGURES {.hash = HASH_START}

/* x[rows][width], rows `stride` elements apart. */
static void floats(struct trace *trace, const char *operation, const char *name, const float *x,
                   int rows, int width, int stride)
{
    struct figures f = NEW_FIGURES;
    const float *host;

    if (rows == 0) return;
    host = fetch(trace, x, ((size_t)(rows - 1) * (size_t)stride + (size_t)width) * sizeof *x);
    for (int r = 0; host && r < rows; r++, host += stride) {
        if (!is_active(trace, r, rows)) continue;
        f.hash = hash_bytes(f.hash, host, (size_t)width * sizeof *host);
        for (int i = 0; i < width; i++) {
            if (!isfinite(host[i]))
                backend_fail(&trace->base, MOSHI_ERROR_INTERNAL,
                             "%s %s: %g in row %d of %d, column %d of %d", operation,
                             name ? name : "-", (double)host[i], r, rows, i, width);
            measure(&f, host[i]);
        }
    }
    write_line(trace, operation, name, rows, width, &f);
}

static void integers(struct trace *trace, const char *operation, const char *name, const int32_t *x,
                     int rows, int width, int stride)
{
    struct figures f = NEW_FIGURES;
    const int32_t *host;

    if (rows == 0) return;
    host = fetch(trace, x, ((size_t)(rows - 1) * (size_t)stride + (size_t)width) * sizeof *x);
    for (int r = 0; host && r < rows; r++, host += stride) {
        if (!is_active(trace, r, rows)) continue;
        f.hash = hash_bytes(f.hash, host, (size_t)width * sizeof *host);
        for (int i = 0; i < width; i++) measure(&f, host[i]);
    }
    write_line(trace, operation, name, rows, width, &f);
}

/* ---- operations ------------------------------------------------------------------------- */

static void trace_embed(struct backend *backend, const struct op_embed *op)
{
    const struct embedding *table = &op->tables[0];
    int width = table->low_rank.rows ? table->low_rank.rows : table->table.cols;

    inner_of(backend)->ops->embed(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "embed", op->name, op->y, op->rows.n, width, width);
}

static void trace_norm(struct backend *backend, const struct op_norm *op)
{
    inner_of(backend)->ops->norm(inner_of(backend), op);
    floats(trace_of(backend), "norm", op->name, op->y, op->n, op->width, op->width);
}

static void trace_linear(struct backend *backend, const struct op_linear *op)
{
    int width = op->weight.rows;

    inner_of(backend)->ops->linear(inner_of(backend), op);
    floats(trace_of(backend), "linear", op->name, op->y, op->n, width,
           op->y_stride ? op->y_stride : width);
}

static void trace_linear_many(struct backend *backend, const struct op_linear_many *op)
{
    int width = op->weights[0].rows;

    inner_of(backend)->ops->linear_many(inner_of(backend), op);
    for (int m = 0; m < op->count; m++)
        floats(trace_of(backend), "linear", op->name,
               op->y + (size_t)m * (size_t)op->n * (size_t)width, op->n, width, width);
}

static void trace_linear_residual(struct backend *backend, const struct op_linear_residual *op)
{
    int width = op->weight.rows;

    inner_of(backend)->ops->linear_residual(inner_of(backend), op);
    floats(trace_of(backend), "linear_residual", op->name, op->x, op->n, width, width);
}

static void trace_linear_gated(struct backend *backend, const struct op_linear_gated *op)
{
    int width = op->weight.rows / 2;

    inner_of(backend)->ops->linear_gated(inner_of(backend), op);
    floats(trace_of(backend), "linear_gated", op->name, op->y, op->n, width, width);
}

static void trace_rope(struct backend *backend, const struct op_rope *op)
{
    int width = op->head_dim / 2 * 2;

    inner_of(backend)->ops->rope(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "rope", op->name, op->cos_sin, op->rows.n * op->steps, width, width);
}

static void trace_qkv(struct backend *backend, const struct op_qkv *op)
{
    int width = op->heads * op->cache->head_dim;

    inner_of(backend)->ops->qkv(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "qkv", op->name, op->q, op->rows.n * op->steps, width, width);
}

static void trace_attend(struct backend *backend, const struct op_attend *op)
{
    int width = op->heads * op->cache->head_dim;

    inner_of(backend)->ops->attend(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "attend", op->name, op->y, op->rows.n * op->steps, width, width);
}

static void trace_conv(struct backend *backend, const struct op_conv *op)
{
    int width = op->conv->out;

    inner_of(backend)->ops->conv(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "conv", op->name, op->y, op->rows.n * (op->steps / op->conv->stride),
           width, width);
}

static void trace_conv_transposed(struct backend *backend, const struct op_conv_transposed *op)
{
    int width = op->conv->out;

    inner_of(backend)->ops->conv_transposed(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "conv_transposed", op->name, op->y,
           op->rows.n * op->steps * op->conv->stride, width, width);
}

static void trace_rvq_encode(struct backend *backend, const struct op_rvq_encode *op)
{
    inner_of(backend)->ops->rvq_encode(inner_of(backend), op);
    integers(trace_of(backend), "rvq_encode", op->name, op->codes, op->n, op->levels,
             op->code_stride);
}

static void trace_rvq_decode(struct backend *backend, const struct op_rvq_decode *op)
{
    int width = op->rvq->out_proj.rows;

    inner_of(backend)->ops->rvq_decode(inner_of(backend), op);
    floats(trace_of(backend), "rvq_decode", op->name, op->y, op->n, width, width);
}

static void trace_delay_input(struct backend *backend, const struct op_delay_input *op)
{
    int streams = op->cache->streams;

    inner_of(backend)->ops->delay_input(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    integers(trace_of(backend), "delay_input", op->name, op->tokens, op->rows.n, streams, streams);
}

static void trace_delay_output(struct backend *backend, const struct op_delay_output *op)
{
    int width = 1 + op->cache->dep_q;

    inner_of(backend)->ops->delay_output(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    integers(trace_of(backend), "delay_output", op->name, op->out, op->rows.n, width, width);
}

/* Its output is scattered over the lanes: only that it happened is written. */
static void trace_advance(struct backend *backend, const struct op_advance *op)
{
    struct figures f = NEW_FIGURES;

    inner_of(backend)->ops->advance(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    write_line(trace_of(backend), "advance", op->name, op->rows.n, 0, &f);
}

/* The logits first, as guidance left them: a value that is not finite is found here. */
static void trace_sample(struct backend *backend, const struct op_sample *op)
{
    inner_of(backend)->ops->sample(inner_of(backend), op);
    remember_rows(trace_of(backend), &op->rows);
    floats(trace_of(backend), "logits", op->name, op->logits, op->rows.n, op->card, op->card);
    integers(trace_of(backend), "sample", op->name, op->token, op->rows.n, 1, op->token_stride);
}

static void trace_softmax(struct backend *backend, const struct op_softmax *op)
{
    inner_of(backend)->ops->softmax(inner_of(backend), op);
    floats(trace_of(backend), "softmax", op->name, op->y, op->n, op->width, op->width);
}

/* ---- everything else goes through ------------------------------------------------------- */

static void *trace_allocate(struct backend *backend, size_t bytes)
{
    return inner_of(backend)->ops->allocate(inner_of(backend), bytes);
}

static void trace_release(struct backend *backend, void *memory, size_t bytes)
{
    inner_of(backend)->ops->release(inner_of(backend), memory, bytes);
}

static void trace_upload(struct backend *backend, void *device, const void *host, size_t bytes)
{
    inner_of(backend)->ops->upload(inner_of(backend), device, host, bytes);
}

static void trace_download(struct backend *backend, void *host, const void *device, size_t bytes)
{
    inner_of(backend)->ops->download(inner_of(backend), host, device, bytes);
}

static int trace_download_pieces(struct backend *backend, const struct device_piece *pieces,
                                 int count)
{
    return inner_of(backend)->ops->download_pieces(inner_of(backend), pieces, count);
}

static void trace_copy(struct backend *backend, void *to, const void *from, size_t bytes)
{
    inner_of(backend)->ops->copy(inner_of(backend), to, from, bytes);
}

static void trace_clear(struct backend *backend, void *device, int byte, size_t bytes)
{
    inner_of(backend)->ops->clear(inner_of(backend), device, byte, bytes);
}

static int64_t trace_memory_free(struct backend *backend)
{
    return inner_of(backend)->ops->memory_free(inner_of(backend));
}

static void *trace_allocate_pages(struct backend *backend, size_t bytes, size_t page_bytes)
{
    return inner_of(backend)->ops->allocate_pages(inner_of(backend), bytes, page_bytes);
}

static int trace_commit(struct backend *backend, void *device, size_t bytes)
{
    return inner_of(backend)->ops->commit(inner_of(backend), device, bytes);
}

static void trace_decommit(struct backend *backend, void *const *pages, int count,
                           size_t page_bytes)
{
    inner_of(backend)->ops->decommit(inner_of(backend), pages, count, page_bytes);
}

static int trace_prepare_matrix(struct backend *backend, struct matrix *w, int pack)
{
    return inner_of(backend)->ops->prepare_matrix(inner_of(backend), w, pack);
}

static int trace_quantise_matrix(struct backend *backend, struct matrix *w,
                                 enum weight_format format)
{
    return inner_of(backend)->ops->quantise_matrix(inner_of(backend), w, format);
}

static void trace_release_matrix(struct backend *backend, struct matrix *w)
{
    inner_of(backend)->ops->release_matrix(inner_of(backend), w);
}

static int trace_reserve(struct backend *backend, int rows, int columns, int keys)
{
    return inner_of(backend)->ops->reserve(inner_of(backend), rows, columns, keys);
}

/* The inner backend's status first: it is nearer to the cause. */
static int own_failure(struct backend *backend, int status)
{
    int failure = backend->failure;

    backend->failure = MOSHI_OK;
    if (status != MOSHI_OK || failure == MOSHI_OK) return status;
    return moshi_fail(failure, "%s", backend->sentence);
}

static int trace_sync(struct backend *backend)
{
    return own_failure(backend, inner_of(backend)->ops->sync(inner_of(backend)));
}

struct call {
    struct backend *trace;
    void (*stage_function)(struct backend *, void *);
    void *arg;
};

/* What the inner backend runs: the stage, with the tracing backend in its place. */
static void run_traced(struct backend *inner, void *arg)
{
    const struct call *call = arg;

    (void)inner;
    call->stage_function(call->trace, call->arg);
}

static int trace_run(struct backend *backend, int stage,
                     void (*stage_function)(struct backend *, void *), void *arg, size_t arg_bytes)
{
    struct call call = {backend, stage_function, arg};

    (void)arg_bytes; /* every call is looked at */
    trace_of(backend)->stage = stage;
    return own_failure(backend,
                       inner_of(backend)->ops->run(inner_of(backend), stage, run_traced, &call, 0));
}

static void trace_destroy(struct backend *backend)
{
    struct trace *trace = trace_of(backend);

    if (!trace) return;
    trace->inner->ops->destroy(trace->inner);
    if (trace->file) fclose(trace->file);
    free(trace->buffer);
    free(trace->active);
    free(trace);
}

/* Without `depth`: its operations are seen one by one. */
static const struct backend_ops trace_ops = {
    .allocate = trace_allocate,
    .release = trace_release,
    .upload = trace_upload,
    .download = trace_download,
    .download_pieces = trace_download_pieces,
    .copy = trace_copy,
    .clear = trace_clear,
    .allocate_pages = trace_allocate_pages,
    .commit = trace_commit,
    .decommit = trace_decommit,
    .memory_free = trace_memory_free,
    .prepare_matrix = trace_prepare_matrix,
    .quantise_matrix = trace_quantise_matrix,
    .release_matrix = trace_release_matrix,
    .reserve = trace_reserve,
    .run = trace_run,
    .sync = trace_sync,
    .destroy = trace_destroy,
    .embed = trace_embed,
    .norm = trace_norm,
    .linear = trace_linear,
    .linear_many = trace_linear_many,
    .linear_residual = trace_linear_residual,
    .linear_gated = trace_linear_gated,
    .rope = trace_rope,
    .qkv = trace_qkv,
    .attend = trace_attend,
    .conv = trace_conv,
    .conv_transposed = trace_conv_transposed,
    .rvq_encode = trace_rvq_encode,
    .rvq_decode = trace_rvq_decode,
    .delay_input = trace_delay_input,
    .delay_output = trace_delay_output,
    .advance = trace_advance,
    .sample = trace_sample,
    .softmax = trace_softmax,
};

/* On failure the inner backend stays the caller's. */
int trace_backend_create(struct backend *inner, const char *path, struct backend **backend)
{
    struct trace *trace = calloc(1, sizeof *trace);

    *backend = NULL;
    if (!trace) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a trace");
    trace->file = fopen(path, "w");
    if (!trace->file) {
        free(trace);
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "the trace file %s can't be written", path);
    }
    trace->base = *inner;
    trace->base.ops = &trace_ops;
    trace->base.whole_ticks = 0;
    inner->immediate = 1;
    trace->inner = inner;
    *backend = &trace->base;
    return MOSHI_OK;
}
