/* product.c: rows of activations times a matrix, and the operations that are little else.
 *
 * The outputs are cut into units of a panel, and long calls into chunks of rows; a thread gets a
 * run of (chunk, unit) pairs. K is never cut: each sum is made by one thread, in the order of the
 * kernel. A block of sums stays in the first cache until finish() has dealt with it; with tiles in
 * the second one. */
#include <assert.h>
#include <string.h>

#include "backend_cpu.h"

#define BLOCK_OUTPUTS 64
#define BLOCK_STRIDE (BLOCK_OUTPUTS + 2 * PANEL) /* packed: a range may begin inside a panel */
#define GATHER_COLUMNS 512

/* Sums of a block, and of the second half's. */
struct block {
    _Alignas(64) float sums[2][ROWS_MAX * BLOCK_STRIDE];
};

static int active(const struct product *p, int row)
{
    return !p->active || p->active[row / p->steps];
}

static const float *row_of(const struct product *p, int row)
{
    return p->a + (size_t)(row / p->steps) * p->row_stride +
           (size_t)(row % p->steps) * p->step_stride;
}

static int block_outputs(const struct product *p)
{
    return p->tiles ? TILE_OUTPUTS : BLOCK_OUTPUTS;
}

static int block_stride(const struct product *p)
{
    return p->tiles ? TILE_STRIDE : BLOCK_STRIDE;
}

/* Sums of outputs first..first+count-1 of n rows; the first one at the returned address. */
static float *multiply(const struct product *p, int first, int count, const float *const *rows,
                       int n, float *sums)
{
    const struct cpu_kernels *kernels = p->cpu->kernels;
    const struct matrix *w = p->weight;
    const char *from = w->data;

    if (!w->data) {
        int panel = first / PANEL, end = (first + count + PANEL - 1) / PANEL;

        kernels->panels[w->format]((const char *)w->packed +
                                       (size_t)panel * panel_bytes(w->format, w->cols),
                                   w->cols, end - panel, rows, n, sums, BLOCK_STRIDE);
        return sums + first % PANEL;
    }
    from += (size_t)first * (size_t)w->cols * weight_bytes(w->format);
    if (p->tiles) {
        kernels->tiles[w->format](from, w->cols, count, rows[0], n, sums, TILE_STRIDE);
        return sums;
    }
    kernels->dot[w->format](from, w->cols, count, rows, n, sums, BLOCK_STRIDE);
    for (int r = 0; w->scales && r < n; r++)
        for (int o = 0; o < count; o++) sums[r * BLOCK_STRIDE + o] *= w->scales[first + o];
    return sums;
}

/* Active rows first..first+count-1 of those that there are, by their numbers; how many. */
static int choose(const struct product *p, int first, int count, int *index)
{
    int steps = p->steps, n = 0;

    for (int i = 0; i < p->n && n < count; i++) {
        if (p->active && !p->active[i]) continue;
        for (int t = first < steps ? first : steps; t < steps && n < count; t++)
            index[n++] = i * steps + t;
        first -= first < steps ? first : steps;
    }
    return n;
}

/* Rows row..row_end-1 as the kernels take them: their numbers and where they are; how many. */
static int take_rows(const struct product *p, int row, int row_end, int *index, const float **rows)
{
    int n = 0;

    if (p->tiles) {
        rows[0] = p->a + (size_t)row * gathered_width(p->weight->cols);
        return choose(p, row, row_end - row, index);
    }
    for (int i = row / p->steps, t = row % p->steps; row < row_end; row++) {
        if (!p->active || p->active[i]) {
            rows[n] = p->a + (size_t)i * p->row_stride + (size_t)t * p->step_stride;
            index[n++] = row;
        }
        if (++t == p->steps) {
            t = 0;
            i++;
        }
    }
    return n;
}

static void multiply_range(const struct product *p, int row, int row_end, int first, int end,
                           float *sums_of_first, float *sums_of_second)
{
    const struct matrix *w = p->weight;
    const float *rows[ROWS_MAX];
    int index[TILE_ROWS], n = take_rows(p, row, row_end, index, rows), stride = block_stride(p);

    if (n == 0) return;
    for (int o = first, count; o < end; o += count) {
        float *sums, *second = NULL;

        count = end - o < block_outputs(p) ? end - o : block_outputs(p);
        sums = multiply(p, o, count, rows, n, sums_of_first);
        if (p->halves == 2) second = multiply(p, o + w->rows / 2, count, rows, n, sums_of_second);
        for (int r = 0, end_of_run; r < n; r = end_of_run) {
            end_of_run = r + 1;
            if (!p->finish_rows) {
                p->finish(p, index[r], o, count, sums + r * stride,
                          second ? second + r * stride : NULL);
                continue;
            }
            while (end_of_run < n && index[end_of_run] == index[end_of_run - 1] + 1) end_of_run++;
            p->finish_rows(p, index[r], end_of_run - r, o, count, sums + r * stride,
                           (size_t)stride);
        }
    }
}

static int units_of(const struct product *p)
{
    return (p->weight->rows / p->halves + PANEL - 1) / PANEL;
}

static int rows_of(const struct product *p)
{
    return p->tiles ? p->chosen : p->n * p->steps;
}

static void multiply_task(void *arg, int part, int first, int last)
{
    const struct product *p = arg;
    int units = units_of(p), outputs = p->weight->rows / p->halves;
    int rows = rows_of(p), most = p->tiles ? TILE_ROWS : ROWS_MAX;
    struct block block;
    float *sums = block.sums[0], *other = block.sums[1];

    if (p->tiles) {
        sums = p->cpu->tile_scratch[part].sums[0];
        other = p->cpu->tile_scratch[part].sums[1];
    }

    while (first < last) {
        int chunk = first / units, unit = first % units;
        int end = last - first < units - unit ? unit + last - first : units;
        int row = chunk * most;
        int row_end = rows - row < most ? rows : row + most;

        multiply_range(p, row, row_end, unit * PANEL, end * PANEL < outputs ? end * PANEL : outputs,
                       sums, other);
        first += end - unit;
    }
}

/* Panels of floats take rows as they are. */
static int arranged(const struct matrix *w)
{
    return w->data || is_block_format(w->format);
}

static void prepare_task(void *arg, int part, int first, int last)
{
    const struct product *p = arg;
    int columns = p->weight->cols;
    size_t stride = padded(columns);

    /* int8 rows are read by plain floats; the arrangement of their format is the panels'. */
    enum weight_format format = p->weight->data && p->weight->format == WEIGHT_INT8
                                    ? WEIGHT_F32
                                    : p->weight->format;

    (void)part;
    for (int row = first; row < last; row++) {
        const float *x = row_of(p, row);
        float *y = p->cpu->activations + (size_t)row * stride;

        if (!active(p, row)) continue;
        if (p->norm) {
            norm_row(p->cpu, p->norm, x, columns, y);
            x = y;
        }
        if (arranged(p->weight) && !p->tiles) p->cpu->kernels->arrange[format](x, columns, y);
    }
}

static void gather_task(void *arg, int part, int first, int last)
{
    const struct product *p = arg;
    int columns = (int)padded(p->weight->cols);
    int spans = (columns + GATHER_COLUMNS - 1) / GATHER_COLUMNS;

    (void)part;
    for (int task = first; task < last; task++) {
        int group = task / spans, begin = task % spans * GATHER_COLUMNS;
        int end = columns - begin < GATHER_COLUMNS ? columns : begin + GATHER_COLUMNS;
        int index[TOGETHER], n = choose(p, group * TOGETHER, TOGETHER, index);
        const float *rows[TOGETHER];

        for (int r = 0; r < n; r++) rows[r] = row_of(p, index[r]);
        p->cpu->kernels->gather[p->weight->format](
            rows, n, p->weight->cols, begin, end,
            p->cpu->gathered + (size_t)group * TOGETHER * gathered_width(p->weight->cols));
    }
}

/* All active rows, side by side. */
static void gather(struct cpu_backend *cpu, struct product *p)
{
    int groups, spans = ((int)padded(p->weight->cols) + GATHER_COLUMNS - 1) / GATHER_COLUMNS;

    p->chosen = p->n;
    for (int i = 0; p->active && i < p->n; i++) p->chosen -= !p->active[i];
    p->chosen *= p->steps;
    groups = (p->chosen + TOGETHER - 1) / TOGETHER;
    cpu_parallel(cpu, gather_task, p, groups * spans, (double)p->chosen * p->weight->cols);
    p->a = cpu->gathered;
}

void product_run(struct cpu_backend *cpu, struct product *p)
{
    int rows = p->n * p->steps, chunks;
    size_t stride = padded(p->weight->cols);
    double work = (double)rows * p->weight->cols;

    p->cpu = cpu;
    if (p->halves == 0) p->halves = 1;
    if (p->norm && p->norm->kind == NORM_NONE) p->norm = NULL;
    p->tiles = p->weight->data && cpu->kernels->tiles[p->weight->format];
    if ((p->norm || arranged(p->weight)) && (size_t)rows * stride > cpu->activation_floats) {
        backend_fail(&cpu->base, MOSHI_ERROR_INTERNAL,
                     "a product of %d rows and %d columns exceeds the reserved scratch", rows,
                     p->weight->cols);
        return;
    }
    if (p->norm || (arranged(p->weight) && !p->tiles)) {
        cpu_parallel(cpu, prepare_task, p, rows, rows > 1 ? work : 0);
        p->a = cpu->activations;
        p->step_stride = stride;
        p->row_stride = stride * (size_t)p->steps;
        p->norm = NULL;
    }
    if (p->tiles) gather(cpu, p);
    rows = rows_of(p);
    chunks = p->tiles ? (rows + TILE_ROWS - 1) / TILE_ROWS : (rows + ROWS_MAX - 1) / ROWS_MAX;
    work *= p->weight->rows;
    /* Of few rows, reading the weights is the work, and threads get on with it at their own pace. */
    if (rows <= TOGETHER)
        cpu_share(cpu, multiply_task, p, units_of(p), BLOCK_OUTPUTS / PANEL, work);
    else
        cpu_parallel(cpu, multiply_task, p, chunks * units_of(p), work);
}

struct add_op {
    float *y;
};

static void finish_add(const struct product *p, int row, int first, int count, float *sums,
                       const float *other)
{
    const struct add_op *op = p->op;

    (void)row, (void)other;
    p->cpu->kernels->add(sums, (size_t)count, op->y + first);
}

void product_add(struct cpu_backend *cpu, const struct matrix *weight, const float *x, float *y)
{
    struct add_op op = {y};
    struct product p = {
        .weight = weight, .n = 1, .steps = 1, .a = x, .finish = finish_add, .op = &op};

    product_run(cpu, &p);
}

/* ---- linear ----------------------------------------------------------------------------- */

static void finish_linear(const struct product *p, int row, int first, int count, float *sums,
                          const float *other)
{
    const struct op_linear *op = p->op;
    const struct cpu_kernels *kernels = p->cpu->kernels;
    int stride = op->y_stride ? op->y_stride : op->weight.rows;
    float *y = op->y + (size_t)row * (size_t)stride + first;

    (void)other;
    if (op->bias) kernels->add(op->bias + first, (size_t)count, sums);
    if (op->activation == ACTIVATION_GELU)
        kernels->gelu(sums, (size_t)count, y);
    else
        memcpy(y, sums, (size_t)count * sizeof *y);
}

void cpu_linear(struct backend *backend, const struct op_linear *op)
{
    struct product p = {.weight = &op->weight,
                        .n = op->n,
                        .steps = 1,
                        .a = op->x,
                        .row_stride = (size_t)op->weight.cols,
                        .norm = &op->norm,
                        .finish = finish_linear,
                        .op = op};

    product_run(cpu_backend(backend), &p);
}

void cpu_linear_many(struct backend *backend, const struct op_linear_many *op)
{
    for (int m = 0; m < op->count; m++)
        cpu_linear(backend, &(struct op_linear){.name = op->name,
                                                .n = op->n,
                                                .x = op->x,
                                                .weight = op->weights[m],
                                                .y = op->y + (size_t)m * (size_t)op->n *
                                                                 (size_t)op->weights[m].rows});
}

static void finish_residual(const struct product *p, int row, int first, int count, float *sums,
                            const float *other)
{
    const struct op_linear_residual *op = p->op;
    float *x = op->x + (size_t)row * (size_t)op->weight.rows + first;

    (void)other;
    if (op->scale)
        p->cpu->kernels->add_scaled(sums, op->scale + first, (size_t)count, x);
    else
        p->cpu->kernels->add(sums, (size_t)count, x);
}

void cpu_linear_residual(struct backend *backend, const struct op_linear_residual *op)
{
    struct product p = {.weight = &op->weight,
                        .n = op->n,
                        .steps = 1,
                        .a = op->u,
                        .row_stride = (size_t)op->weight.cols,
                        .finish = finish_residual,
                        .op = op};

    product_run(cpu_backend(backend), &p);
}

static void finish_gated(const struct product *p, int row, int first, int count, float *sums,
                         const float *other)
{
    const struct op_linear_gated *op = p->op;

    p->cpu->kernels->gate(sums, other, (size_t)count,
                          op->y + (size_t)row * (size_t)(op->weight.rows / 2) + first);
}

void cpu_linear_gated(struct backend *backend, const struct op_linear_gated *op)
{
    struct product p = {.weight = &op->weight,
                        .n = op->n,
                        .steps = 1,
                        .a = op->x,
                        .row_stride = (size_t)op->weight.cols,
                        .norm = &op->norm,
                        .halves = 2,
                        .finish = finish_gated,
                        .op = op};

    assert(op->weight.rows % 2 == 0);
    product_run(cpu_backend(backend), &p);
}

/* ---- queries, keys, values -------------------------------------------------------------- */

/* Pairs first/2.. of one head, turned by the angles of one row: (a, b) -> (a cos - b sin,
 * a sin + b cos). */
static void rotate(float *x, int first, int count, const float *cos_sin)
{
    for (int i = 0; i < count; i += 2) {
        float c = cos_sin[first + i], s = cos_sin[first + i + 1], a = x[i], b = x[i + 1];

        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

static void finish_qkv(const struct product *p, int row, int first, int count, float *sums,
                       const float *other)
{
    const struct op_qkv *op = p->op;
    const struct kv_cache *cache = op->cache;
    int dim = cache->head_dim, lane = op->rows.lane[row / op->steps];
    int queries = op->heads * dim, keys = cache->kv_heads * dim;
    int64_t position = (int64_t)op->position[lane] + row % op->steps;

    (void)other;
    while (count > 0) {
        int from = first % dim, n = dim - from < count ? dim - from : count;
        int is_value = first >= queries + keys;

        if (op->cos_sin && !is_value)
            rotate(sums, from, n, op->cos_sin + (size_t)row * (size_t)dim);
        if (first < queries) {
            memcpy(op->q + (size_t)row * (size_t)queries + first, sums, (size_t)n * sizeof *sums);
        } else if (cache->dtype == MOSHI_INT8) { /* other threads have the rest of the head */
            memcpy(p->cpu->fresh + (size_t)row * 2 * (size_t)keys + first - queries, sums,
                   (size_t)n * sizeof *sums);
        } else {
            int head = (first - queries - is_value * keys) / dim;
            char *to = kv_address(cache, lane, op->layer, is_value, head, position);

            if (cache->dtype == MOSHI_BF16)
                for (int i = 0; i < n; i++) ((uint16_t *)to)[from + i] = f32_to_bf16(sums[i]);
            else
                memcpy((float *)to + from, sums, (size_t)n * sizeof *sums);
        }
        first += n;
        sums += n;
        count -= n;
    }
}

struct code_job {
    struct cpu_backend *cpu;
    const struct op_qkv *op;
};

/* Codes of the keys and values that finish_qkv has put aside; a task is one head of one row. */
static void code_task(void *arg, int part, int first, int last)
{
    const struct code_job *job = arg;
    const struct op_qkv *op = job->op;
    const struct kv_cache *cache = op->cache;
    int heads = cache->kv_heads, dim = cache->head_dim;

    (void)part;
    for (int task = first; task < last; task++) {
        int head = task % heads, value = task / heads % 2, row = task / heads / 2;
        int lane = op->rows.lane[row / op->steps];
        int64_t position = (int64_t)op->position[lane] + row % op->steps;
        char *to;

        if (!op->rows.active[row / op->steps]) continue;
        to = kv_address(cache, lane, op->layer, value, head, position);
        *kv_scale(cache, to, position) = int8_row(job->cpu->fresh + (size_t)task * (size_t)dim, dim,
                                                  (int8_t *)to);
    }
}

void cpu_qkv(struct backend *backend, const struct op_qkv *op)
{
    size_t width = (size_t)op->weight.cols;
    struct code_job job = {cpu_backend(backend), op};
    int rows = op->rows.n * op->steps, tasks = rows * 2 * op->cache->kv_heads;
    struct product p = {.weight = &op->weight,
                        .n = op->rows.n,
                        .steps = op->steps,
                        .active = op->rows.active,
                        .a = op->x,
                        .row_stride = width * (size_t)op->steps,
                        .step_stride = width,
                        .norm = &op->norm,
                        .finish = finish_qkv,
                        .op = op};

    assert(op->weight.rows == (op->heads + 2 * op->cache->kv_heads) * op->cache->head_dim);
    assert(!op->cos_sin || op->cache->head_dim % 2 == 0);
    if (op->cache->dtype == MOSHI_INT8 &&
        (size_t)tasks * (size_t)op->cache->head_dim > job.cpu->fresh_floats) {
        backend_fail(backend, MOSHI_ERROR_INTERNAL,
                     "%s: keys and values of %d rows exceed the reserved scratch", op->name, rows);
        return;
    }
    product_run(job.cpu, &p);
    if (op->cache->dtype == MOSHI_INT8)
        cpu_parallel(job.cpu, code_task, &job, tasks, 8.0 * tasks * op->cache->head_dim);
}
