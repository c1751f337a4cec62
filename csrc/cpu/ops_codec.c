/* ops_codec.c: what Mimi needs besides transformers.
 *
 * Channels are last, so a convolution is a product without copying: with the kernel - stride steps
 * of history in front of the new ones, row t of A begins at step t * stride and has kernel * in
 * columns. A transposed convolution with kernel = 2 * stride likewise: row t of A is (x[t-1],
 * x[t]), and its stride * out sums are `stride` steps of output. */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "backend_cpu.h"

/* ---- convolutions ----------------------------------------------------------------------- */

/* work[i] = history[lane] ++ elu?(x[i]). */
struct fill {
    struct cpu_backend *cpu;
    const struct rows *rows;
    int steps, width, past; /* past: steps of history */
    int elu;
    const float *x;
    const float *history; /* [lanes][past * width] */
    const int32_t *first; /* [lanes], or NULL: no replication */
    float *work;          /* [n][past + steps][width] */
};

static void activate(const struct fill *f, const float *x, size_t n, float *y)
{
    if (f->elu)
        f->cpu->kernels->elu(x, n, y);
    else
        memcpy(y, x, n * sizeof *y);
}

static void fill_history(const struct fill *f, int i, float *work)
{
    size_t width = (size_t)f->width, past = (size_t)f->past;
    int lane = f->rows->lane[i];

    if (!f->first || !f->first[lane]) {
        memcpy(work, f->history + (size_t)lane * past * width, past * width * sizeof *work);
        return;
    }
    for (size_t step = 0; step < past; step++)
        activate(f, f->x + (size_t)i * (size_t)f->steps * width, width, work + step * width);
}

static void fill_task(void *arg, int part, int first, int last)
{
    const struct fill *f = arg;
    size_t width = (size_t)f->width;

    (void)part;
    while (first < last) {
        int i = first / f->steps, t = first % f->steps;
        int count = last - first < f->steps - t ? last - first : f->steps - t;
        float *work = f->work + (size_t)i * (size_t)(f->past + f->steps) * width;

        if (f->rows->active[i]) {
            if (t == 0) fill_history(f, i, work);
            activate(f, f->x + (size_t)first * width, (size_t)count * width,
                     work + (size_t)(f->past + t) * width);
        }
        first += count;
    }
}

static void fill_run(struct fill *f)
{
    cpu_parallel(f->cpu, fill_task, f, f->rows->n * f->steps,
                 (f->elu ? 4.0 : 0.5) * f->rows->n * f->steps * f->width);
}

/* The last `past` steps of work become the history. */
static void keep_history(const struct fill *f, float *history)
{
    size_t past = (size_t)f->past * (size_t)f->width;
    size_t new = (size_t)f->steps * (size_t)f->width;

    for (int i = 0; i < f->rows->n; i++)
        if (f->rows->active[i])
            memcpy(history + (size_t)f->rows->lane[i] * past,
                   f->work + (size_t)i * (past + new) + new, past * sizeof *history);
}

static void finish_conv(const struct product *p, int row, int rows, int first, int count,
                        const float *sums, size_t stride)
{
    const struct op_conv *op = p->op;
    size_t out = (size_t)op->conv->out, at = (size_t)row * out + (size_t)first;

    p->cpu->kernels->finish(sums, stride, op->conv->bias ? op->conv->bias + first : NULL,
                            op->residual ? op->residual + at : NULL, rows, (size_t)count,
                            op->y + at, out);
}

void cpu_conv(struct backend *backend, const struct op_conv *op)
{
    const struct conv *conv = op->conv;
    size_t width = (size_t)conv->in;
    struct fill fill = {.cpu = cpu_backend(backend),
                        .rows = &op->rows,
                        .steps = op->steps,
                        .width = conv->in,
                        .past = conv->kernel - conv->stride,
                        .elu = op->elu,
                        .x = op->x,
                        .history = op->history,
                        .first = conv->replicate ? op->first : NULL,
                        .work = op->work};
    struct product p = {.weight = &conv->weight,
                        .n = op->rows.n,
                        .steps = op->steps / conv->stride,
                        .active = op->rows.active,
                        .a = op->work,
                        .row_stride = (size_t)(fill.past + op->steps) * width,
                        .step_stride = (size_t)conv->stride * width,
                        .finish_rows = finish_conv,
                        .op = op};

    assert(op->steps % conv->stride == 0 && conv->weight.cols == conv->kernel * conv->in &&
           conv->weight.rows == conv->out);
    if (fill.past == 0 && !op->elu) {
        p.a = op->x;
        product_run(fill.cpu, &p);
        return;
    }
    fill_run(&fill);
    product_run(fill.cpu, &p);
    keep_history(&fill, op->history);
    for (int i = 0; fill.first && i < op->rows.n; i++)
        if (op->rows.active[i]) op->first[op->rows.lane[i]] = 0;
}

static void finish_transposed(const struct product *p, int row, int first, int count, float *sums,
                              const float *other)
{
    const struct op_conv_transposed *op = p->op;
    int out = op->conv->out;
    float *y = op->y + (size_t)row * (size_t)op->conv->weight.rows + first;

    (void)other;
    for (int done = 0; done < count;) {
        int channel = (first + done) % out;
        int n = out - channel < count - done ? out - channel : count - done;

        p->cpu->kernels->finish(sums + done, 0, op->conv->bias ? op->conv->bias + channel : NULL,
                                NULL, 1, (size_t)n, y + done, 0);
        done += n;
    }
}

/* y[t * stride + p] = w[p] * x[t] + w[stride + p] * x[t-1] (+ bias), channel by channel. */
static void transpose_depthwise(const struct op_conv_transposed *op, int i)
{
    const struct conv *conv = op->conv;
    int width = conv->in, stride = conv->stride;

    for (int t = 0; t < op->steps; t++) {
        const float *past = op->work +
                            ((size_t)i * (size_t)(1 + op->steps) + (size_t)t) * (size_t)width;
        const float *now = past + width;

        for (int phase = 0; phase < stride; phase++) {
            const float *w = conv->depthwise_weight + (size_t)phase * (size_t)width;
            const float *tail = w + (size_t)stride * (size_t)width;
            float *y = op->y + (((size_t)i * (size_t)op->steps + (size_t)t) * (size_t)stride +
                                (size_t)phase) *
                                   (size_t)width;

            for (int c = 0; c < width; c++)
                y[c] = (w[c] * now[c] + tail[c] * past[c]) + (conv->bias ? conv->bias[c] : 0.0f);
        }
    }
}

void cpu_conv_transposed(struct backend *backend, const struct op_conv_transposed *op)
{
    const struct conv *conv = op->conv;
    size_t width = (size_t)conv->in;
    struct fill fill = {.cpu = cpu_backend(backend),
                        .rows = &op->rows,
                        .steps = op->steps,
                        .width = conv->in,
                        .past = 1,
                        .elu = op->elu,
                        .x = op->x,
                        .history = op->history,
                        .work = op->work};

    assert(conv->kernel == 2 * conv->stride);
    fill_run(&fill);
    if (conv->depthwise) {
        for (int i = 0; i < op->rows.n; i++)
            if (op->rows.active[i]) transpose_depthwise(op, i);
    } else {
        struct product p = {.weight = &conv->weight,
                            .n = op->rows.n,
                            .steps = op->steps,
                            .active = op->rows.active,
                            .a = op->work,
                            .row_stride = (size_t)(1 + op->steps) * width,
                            .step_stride = width,
                            .finish = finish_transposed,
                            .op = op};

        assert(conv->weight.cols == 2 * conv->in && conv->weight.rows == conv->stride * conv->out);
        product_run(fill.cpu, &p);
    }
    keep_history(&fill, op->history);
}

/* ---- quantiser -------------------------------------------------------------------------- */

#define ENTRIES 64 /* of a codebook, searched for all rows before going on */

struct search {
    struct cpu_backend *cpu;
    const float *entries, *half_norms; /* of one level */
    int bins, dim, n;
    const float *residual; /* [n][2 * dim] */
};

/* The first entry with the least |e|^2 / 2 - x.e, if that is less than before. */
static void search_block(const struct search *s, int entry, int count, const float *residual,
                         int rows, struct nearest *best)
{
    const float *x[ROWS_MAX] = {NULL};
    float products[ROWS_MAX * ENTRIES];

    for (int r = 0; r < rows; r++) x[r] = residual + (size_t)r * 2 * (size_t)s->dim;
    s->cpu->kernels->dot[WEIGHT_F32](s->entries + (size_t)entry * (size_t)s->dim, s->dim, count, x,
                                     rows, products, ENTRIES);
    for (int r = 0; r < rows; r++) {
        for (int e = 0; e < count; e++) {
            float distance = s->half_norms[entry + e] - products[r * ENTRIES + e];

            if (distance < best[r].distance) best[r] = (struct nearest){distance, entry + e};
        }
    }
}

static void search_task(void *arg, int part, int first, int last)
{
    const struct search *s = arg;
    struct nearest *best = s->cpu->nearest + (size_t)part * s->cpu->rows;
    size_t dim = (size_t)s->dim;

    for (int i = 0; i < s->n; i++) best[i] = (struct nearest){INFINITY, 0};
    for (int unit = first; unit < last; unit++) {
        int entry = unit * ENTRIES;
        int count = s->bins - entry < ENTRIES ? s->bins - entry : ENTRIES;

        for (int i = 0; i < s->n; i += ROWS_MAX) {
            int rows = s->n - i < ROWS_MAX ? s->n - i : ROWS_MAX;

            search_block(s, entry, count, s->residual + (size_t)i * 2 * dim, rows, best + i);
        }
    }
}

/* rows[n][stride] = W x */
struct project {
    float *y;
    size_t stride;
};

static void finish_project(const struct product *p, int row, int first, int count, float *sums,
                           const float *other)
{
    const struct project *to = p->op;

    (void)other;
    memcpy(to->y + (size_t)row * to->stride + first, sums, (size_t)count * sizeof *sums);
}

void cpu_rvq_encode(struct backend *backend, const struct op_rvq_encode *op)
{
    struct cpu_backend *cpu = cpu_backend(backend);
    const struct rvq *rvq = op->rvq;
    size_t dim = (size_t)rvq->dim, level_floats = (size_t)rvq->bins * dim;
    struct project project = {op->work, 2 * dim};
    struct product p = {.weight = &rvq->in_proj,
                        .n = op->n,
                        .steps = 1,
                        .a = op->x,
                        .row_stride = (size_t)rvq->in_proj.cols,
                        .finish = finish_project,
                        .op = &project};

    if ((size_t)op->n > cpu->rows) {
        backend_fail(backend, MOSHI_ERROR_INTERNAL, "%s: %d rows exceed the reserved scratch",
                     op->name, op->n);
        return;
    }
    product_run(cpu, &p);
    for (int level = 0; level < op->levels; level++) {
        struct search search = {cpu,
                                rvq->codebooks + (size_t)level * level_floats,
                                rvq->half_norms + (size_t)level * (size_t)rvq->bins,
                                rvq->bins,
                                rvq->dim,
                                op->n,
                                op->work};

        for (int part = 0; part < backend->threads; part++)
            for (int i = 0; i < op->n; i++)
                cpu->nearest[(size_t)part * cpu->rows + (size_t)i] = (struct nearest){INFINITY, 0};
        cpu_parallel(cpu, search_task, &search, (rvq->bins + ENTRIES - 1) / ENTRIES,
                     (double)op->n * rvq->bins * rvq->dim);
        for (int i = 0; i < op->n; i++) {
            struct nearest best = cpu->nearest[i];
            float *residual = op->work + (size_t)i * 2 * dim;
            const float *entry;

            for (int part = 1; part < backend->threads; part++) {
                struct nearest other = cpu->nearest[(size_t)part * cpu->rows + (size_t)i];

                if (other.distance < best.distance) best = other;
            }
            op->codes[(size_t)i * (size_t)op->code_stride + (size_t)level] = best.index;
            entry = search.entries + (size_t)best.index * dim;
            for (size_t d = 0; d < dim; d++) residual[d] -= entry[d];
        }
    }
}

static void finish_decode(const struct product *p, int row, int first, int count, float *sums,
                          const float *other)
{
    const struct op_rvq_decode *op = p->op;
    float *y = op->y + (size_t)row * (size_t)op->rvq->out_proj.rows + first;

    (void)other;
    if (op->accumulate)
        p->cpu->kernels->add(sums, (size_t)count, y);
    else
        memcpy(y, sums, (size_t)count * sizeof *sums);
}

void cpu_rvq_decode(struct backend *backend, const struct op_rvq_decode *op)
{
    struct cpu_backend *cpu = cpu_backend(backend);
    const struct rvq *rvq = op->rvq;
    size_t dim = (size_t)rvq->dim;
    struct product p = {.weight = &rvq->out_proj,
                        .n = op->n,
                        .steps = 1,
                        .a = op->work,
                        .row_stride = dim,
                        .finish = finish_decode,
                        .op = op};

    for (int i = 0; i < op->n; i++) {
        float *sum = op->work + (size_t)i * dim;

        memset(sum, 0, dim * sizeof *sum);
        for (int level = 0; level < op->levels; level++) {
            int code = op->codes[(size_t)i * (size_t)op->code_stride + (size_t)level];

            if (code < 0 || code >= rvq->bins) code = 0;
            cpu->kernels->add(rvq->codebooks +
                                  ((size_t)level * (size_t)rvq->bins + (size_t)code) * dim,
                              dim, sum);
        }
    }
    product_run(cpu, &p);
}
