/* ops.c: operations on rows, positions and tokens; products are in product.c, the codec's in
 * ops_codec.c, sampling in sample.c. */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "backend_cpu.h"

/* ---- embed ------------------------------------------------------------------------------ */

/* y[width] += the token's row of one table. */
static void embed_token(struct cpu_backend *cpu, const struct op_embed *op,
                        const struct embedding *e, int token, int width, float *y)
{
    const struct cpu_kernels *kernels = cpu->kernels;
    const struct matrix *table = &e->table;
    int columns = table->cols;
    if (e->alias_of > 0 && token == e->alias) token = e->alias_of;
    /* Two rows: the product of a low rank puts its own in front. */
    float *row = cpu->activations + padded(columns);

    if (2 * padded(columns) > cpu->activation_floats) {
        backend_fail(&cpu->base, MOSHI_ERROR_INTERNAL,
                     "%s: a table of %d columns exceeds the reserved scratch", op->name, columns);
        return;
    }
    if (token < 0 || token >= table->rows) {
        backend_fail(&cpu->base, MOSHI_ERROR_INTERNAL, "%s: token %d, expected one below %d",
                     op->name, token, table->rows);
        return;
    }
    assert(columns == (e->low_rank.rows ? e->low_rank.cols : width));
    kernels->widen[table->format]((const char *)table->data +
                                      (size_t)token * (size_t)columns * weight_bytes(table->format),
                                  (size_t)columns, row);
    if (e->norm.kind != NORM_NONE) norm_row(cpu, &e->norm, row, columns, row);
    if (e->low_rank.rows)
        product_add(cpu, &e->low_rank, row, y);
    else
        kernels->add(row, (size_t)width, y);
}

void cpu_embed(struct backend *backend, const struct op_embed *op)
{
    struct cpu_backend *cpu = cpu_backend(backend);
    int width = op->tables[0].low_rank.rows ? op->tables[0].low_rank.rows
                                            : op->tables[0].table.cols;

    for (int i = 0; i < op->rows.n; i++) {
        const int32_t *tokens = op->tokens + (size_t)i * (size_t)op->token_stride;
        float *y = op->y + (size_t)i * (size_t)width;

        if (!op->from)
            memset(y, 0, (size_t)width * sizeof *y);
        else
            memmove(y, op->from + (size_t)i * (size_t)width, (size_t)width * sizeof *y);
        if (!op->rows.active[i]) continue;
        for (int s = 0; s < op->n_streams; s++)
            if (tokens[s] != TOKEN_ZERO) embed_token(cpu, op, &op->tables[s], tokens[s], width, y);
        if (op->condition)
            cpu->kernels->add(op->condition + (size_t)op->rows.lane[i] * (size_t)width,
                              (size_t)width, y);
    }
}

/* ---- norm, softmax ---------------------------------------------------------------------- */

void norm_row(const struct cpu_backend *cpu, const struct norm *norm, const float *x, int width,
              float *y)
{
    switch (norm->kind) {
    case NORM_LAYER:
        cpu->kernels->norm_layer(x, width, norm->eps, norm->weight, norm->bias, y);
        break;
    case NORM_RMS:
        cpu->kernels->norm_rms(x, width, norm->eps, norm->weight, y);
        break;
    case NORM_NONE:
        memmove(y, x, (size_t)width * sizeof *y);
        break;
    }
}

struct row_job {
    struct cpu_backend *cpu;
    const void *op;
};

static void norm_task(void *arg, int part, int first, int last)
{
    const struct row_job *job = arg;
    const struct op_norm *op = job->op;
    size_t width = (size_t)op->width;

    (void)part;
    for (int i = first; i < last; i++)
        norm_row(job->cpu, &op->norm, op->x + (size_t)i * width, op->width,
                 op->y + (size_t)i * width);
}

void cpu_norm(struct backend *backend, const struct op_norm *op)
{
    struct row_job job = {cpu_backend(backend), op};

    cpu_parallel(job.cpu, norm_task, &job, op->n, op->n > 1 ? (double)op->n * op->width : 0);
}

static void softmax_task(void *arg, int part, int first, int last)
{
    const struct row_job *job = arg;
    const struct op_softmax *op = job->op;
    size_t width = (size_t)op->width;

    (void)part;
    for (int i = first; i < last; i++) {
        float *y = op->y + (size_t)i * width;

        memcpy(y, op->x + (size_t)i * width, width * sizeof *y);
        job->cpu->kernels->softmax(y, op->width, 1.0f);
    }
}

void cpu_softmax(struct backend *backend, const struct op_softmax *op)
{
    struct row_job job = {cpu_backend(backend), op};

    cpu_parallel(job.cpu, softmax_task, &job, op->n, 4.0 * op->n * op->width);
}

/* ---- positions -------------------------------------------------------------------------- */

void cpu_rope(struct backend *backend, const struct op_rope *op)
{
    int half = op->head_dim / 2, steps = op->steps;

    (void)backend;
    for (int pair = 0; pair < half; pair++) {
        float frequency = (float)exp(-log(op->max_period) * 2 * pair / op->head_dim);

        for (int i = 0; i < op->rows.n; i++) {
            if (!op->rows.active[i]) continue;
            for (int t = 0; t < steps; t++) {
                float angle = (float)(op->position[op->rows.lane[i]] + t) * frequency;
                float *out = op->cos_sin +
                             2 * (((size_t)i * (size_t)steps + (size_t)t) * (size_t)half +
                                  (size_t)pair);

                out[0] = cosf(angle);
                out[1] = sinf(angle);
            }
        }
    }
}

void cpu_advance(struct backend *backend, const struct op_advance *op)
{
    (void)backend;
    for (int i = 0; i < op->rows.n; i++)
        if (op->rows.active[i]) op->position[op->rows.lane[i]] += op->steps;
}

/* ---- attend ----------------------------------------------------------------------------- */

/* Positions begin..end-1 are what step t of row i sees. */
static void visible(const struct op_attend *op, int i, int t, int64_t *begin, int64_t *end)
{
    int lane = op->rows.lane[i];

    *begin = 0;
    if (op->causal) {
        int64_t position = op->position[lane], p = position + t;

        if (*begin < p - op->context + 1) *begin = p - op->context + 1;
        if (*begin < position + op->steps - op->capacity)
            *begin = position + op->steps - op->capacity;
        *end = p + 1;
    } else {
        *end = op->key_count[lane];
    }
}

/* Positions that lie together in a page. */
struct run {
    char *at;
    const float *scales; /* of MOSHI_INT8, else NULL */
    int count;
};

static int run_count(const struct kv_cache *cache, int64_t first, int64_t end)
{
    int count = cache->page_positions - (int)(first % cache->page_positions);

    return end - first < count ? (int)(end - first) : count;
}

static struct run next_run(const struct op_attend *op, int lane, int value, int head, int64_t first,
                           int64_t end)
{
    char *at = kv_address(op->cache, lane, op->layer, value, head, first);

    return (struct run){at, op->cache->dtype == MOSHI_INT8 ? kv_scale(op->cache, at, first) : NULL,
                        run_count(op->cache, first, end)};
}

#define FETCH_BYTES 2048

/* Asks for the beginning of the run at `first` while the one before it is read: a page lies far from
 * the last one, and kernels ask no further than they read. */
static void fetch_run(const struct op_attend *op, int lane, int value, int head, int64_t first,
                      int64_t end)
{
    struct run run;
    size_t bytes;

    if (first >= end) return;
    run = next_run(op, lane, value, head, first, end);
    bytes = (size_t)run.count * kv_row_bytes(op->cache);
    for (size_t at = 0; at < bytes && at < FETCH_BYTES; at += 64) __builtin_prefetch(run.at + at);
}

static void scale_some(float *x, const float *scales, int n)
{
    for (int i = 0; i < n; i++) x[i] *= scales[i];
}

/* Queries t..t+n-1 of `heads` heads, n * heads <= ATTEND_QUERIES: scores of all keys that one of them
 * sees, each one's softmax, weighted sums of the values. Page by page: the heads' runs in a page lie
 * one behind the other, and what is read of a head serves all of its queries. */
static void attend_some(const struct cpu_backend *cpu, const struct op_attend *op, int i, int t,
                        int n, int head, int heads, float *scratch)
{
    const struct cpu_kernels *kernels = cpu->kernels;
    const struct kv_cache *cache = op->cache;
    enum weight_format format = cache->dtype == MOSHI_BF16   ? WEIGHT_BF16
                                : cache->dtype == MOSHI_INT8 ? WEIGHT_INT8
                                                             : WEIGHT_F32;
    int dim = cache->head_dim, lane = op->rows.lane[i], share = op->heads / cache->kv_heads;
    int last = (head + heads - 1) / share;
    size_t step = (size_t)op->heads * (size_t)dim;
    size_t row = ((size_t)i * (size_t)op->steps + (size_t)t) * step + (size_t)head * (size_t)dim;
    const float *queries[ATTEND_QUERIES];
    float *scores[ATTEND_QUERIES], *y[ATTEND_QUERIES]; /* [heads][n] */
    int64_t begin[ATTEND_STEPS] = {0}, end[ATTEND_STEPS] = {0}, oldest, newest, next;

    for (int k = 0; k < heads * n; k++) {
        float *query = scratch + (size_t)k * cpu->keys;
        size_t place = row + (size_t)(k / n) * (size_t)dim + (size_t)(k % n) * step;

        kernels->arrange[format == WEIGHT_INT8 ? WEIGHT_F32 : format](op->q + place, dim, query);
        queries[k] = query;
        scores[k] = query + padded(dim);
        y[k] = op->y + place;
        memset(y[k], 0, (size_t)dim * sizeof **y);
    }
    for (int q = 0; q < n; q++) visible(op, i, t + q, &begin[q], &end[q]);
    oldest = begin[0]; /* of the first one; the last one sees the newest */
    newest = end[n - 1];
    for (int64_t j = oldest; j < newest; j = next) {
        next = j + run_count(cache, j, newest);
        for (int h = 0; h < heads; h++) {
            int kv_head = (head + h) / share;
            struct run run = next_run(op, lane, 0, kv_head, j, newest);

            if (kv_head < last)
                fetch_run(op, lane, 0, kv_head + 1, j, newest);
            else if (next < newest)
                fetch_run(op, lane, 0, head / share, next, newest);
            else
                fetch_run(op, lane, 1, head / share, oldest, newest);
            kernels->dot[format](run.at, dim, run.count, queries + h * n, n,
                                 scores[h * n] + (j - oldest), cpu->keys);
            for (int q = 0; run.scales && q < n; q++)
                scale_some(scores[h * n + q] + (j - oldest), run.scales, run.count);
        }
    }
    for (int k = 0; k < heads * n; k++)
        if (begin[k % n] < end[k % n])
            kernels->softmax(scores[k] + (begin[k % n] - oldest), (int)(end[k % n] - begin[k % n]),
                             1.0f / sqrtf((float)dim));
    for (int64_t j = oldest; j < newest; j = next) {
        next = j + run_count(cache, j, newest);
        for (int h = 0; h < heads; h++) {
            int kv_head = (head + h) / share;
            struct run run = next_run(op, lane, 1, kv_head, j, newest);

            if (kv_head < last)
                fetch_run(op, lane, 1, kv_head + 1, j, newest);
            else
                fetch_run(op, lane, 1, head / share, next, newest);
            for (int q = 0; q < n; q++) {
                int64_t from = begin[q] > j ? begin[q] : j;
                int64_t to = end[q] < next ? end[q] : next;
                float *weights = scores[h * n + q] + (from - oldest);
                size_t first = (size_t)(from - j);

                if (from >= to) continue;
                if (run.scales) scale_some(weights, run.scales + first, (int)(to - from));
                kernels->mix[format](weights, run.at + first * kv_row_bytes(cache),
                                     (int)(to - from), dim, y[h * n + q]);
            }
        }
    }
}

static int attend_tiles(const struct op_attend *op)
{
    return (op->steps + ATTEND_STEPS - 1) / ATTEND_STEPS;
}

static void attend_task(void *arg, int part, int first, int last)
{
    const struct row_job *job = arg;
    const struct op_attend *op = job->op;
    float *scratch = job->cpu->scores + (size_t)part * ATTEND_QUERIES * job->cpu->keys;
    int tiles = attend_tiles(op);

    for (int task = first, heads; task < last; task += heads) {
        int head = task % op->heads, t = task / op->heads % tiles * ATTEND_STEPS;
        int i = task / op->heads / tiles;
        int n = op->steps - t < ATTEND_STEPS ? op->steps - t : ATTEND_STEPS;

        heads = ATTEND_QUERIES / n;
        if (heads > op->heads - head) heads = op->heads - head;
        if (heads > last - task) heads = last - task;
        if (op->rows.active[i]) attend_some(job->cpu, op, i, t, n, head, heads, scratch);
    }
}

void cpu_attend(struct backend *backend, const struct op_attend *op)
{
    struct row_job job = {cpu_backend(backend), op};
    double keys = 0;

    assert(op->heads % op->cache->kv_heads == 0);
    for (int i = 0; i < op->rows.n; i++) {
        int64_t begin, end;

        if (!op->rows.active[i]) continue;
        for (int t = 0; t < op->steps; t++) {
            visible(op, i, t, &begin, &end);
            if (end - begin + ATTEND_STEPS + (int64_t)padded(op->cache->head_dim) >
                (int64_t)job.cpu->keys) {
                backend_fail(backend, MOSHI_ERROR_INTERNAL,
                             "%s: %lld keys exceed the reserved scratch", op->name,
                             (long long)(end - begin));
                return;
            }
            keys += (double)(end - begin);
        }
    }
    cpu_share(job.cpu, attend_task, &job, op->rows.n * attend_tiles(op) * op->heads, 1,
              keys * op->heads * op->cache->head_dim * 2);
}

/* ---- delays ----------------------------------------------------------------------------- */

static int32_t initial_token(const struct delay_cache *cache, int stream)
{
    return stream == 0 ? cache->initial_text : cache->initial_audio;
}

static int32_t *delay_cell(const struct delay_cache *cache, int slot, int stream, int32_t column)
{
    return cache->tokens +
           ((size_t)slot * (size_t)cache->streams + (size_t)stream) * (size_t)cache->columns +
           (size_t)(column % cache->columns);
}

static void delay_input_row(const struct op_delay_input *op, int i, int32_t *tokens,
                            int32_t *null_tokens)
{
    const struct delay_cache *cache = op->cache;
    int slot = op->rows.lane[i], users = cache->streams - 1 - cache->dep_q;
    const struct slot_params *params = &op->params[slot];
    int32_t offset = cache->offset[slot];

    for (int j = 0; j < users; j++) {
        size_t at = (size_t)i * (size_t)users + (size_t)j;
        int stream = 1 + cache->dep_q + j;
        int32_t token = op->given ? op->given[at] : TOKEN_FREE;

        *delay_cell(cache, slot, stream,
                    offset + cache->delays[stream]) = token == TOKEN_FREE ? op->user[at] : token;
    }
    for (int s = 0; s < cache->streams; s++) {
        int32_t delay = cache->delays[s];
        int is_initial = offset <= delay;
        int32_t token = is_initial ? initial_token(cache, s) : *delay_cell(cache, slot, s, offset);

        tokens[s] = token;
        if (!null_tokens) continue;
        if (!is_initial && ((params->cfg_masked_until >= 0 &&
                             offset <= (int64_t)delay + params->cfg_masked_until) ||
                            (s == 0 && params->cfg_no_text)))
            token = TOKEN_ZERO;
        null_tokens[s] = token;
    }
}

void cpu_delay_input(struct backend *backend, const struct op_delay_input *op)
{
    size_t streams = (size_t)op->cache->streams;

    (void)backend;
    for (int i = 0; i < op->rows.n; i++) {
        int32_t *tokens = op->tokens + (size_t)i * streams;
        int32_t *null_tokens = op->null_row[i] >= 0 ? op->tokens + (size_t)op->null_row[i] * streams
                                                    : NULL;

        if (op->rows.active[i]) {
            delay_input_row(op, i, tokens, null_tokens);
            continue;
        }
        for (int s = 0; s < op->cache->streams; s++) {
            tokens[s] = initial_token(op->cache, s);
            if (null_tokens) null_tokens[s] = tokens[s];
        }
    }
}

void cpu_delay_output(struct backend *backend, const struct op_delay_output *op)
{
    const struct delay_cache *cache = op->cache;
    int dep_q = cache->dep_q;

    (void)backend;
    for (int i = 0; i < op->rows.n; i++) {
        int slot = op->rows.lane[i];
        int32_t *out = op->out + (size_t)i * (size_t)(1 + dep_q), offset = 0;

        if (op->rows.active[i]) {
            offset = ++cache->offset[slot];
            *delay_cell(cache, slot, 0, offset) = op->text[i];
            for (int k = 0; k < dep_q; k++)
                *delay_cell(cache, slot, 1 + k,
                            offset) = op->audio[(size_t)i * (size_t)dep_q + (size_t)k];
        }
        for (int s = 0; s <= dep_q; s++)
            out[s] = offset > cache->max_delay
                         ? *delay_cell(cache, slot, s, offset - cache->max_delay + cache->delays[s])
                         : TOKEN_NONE;
    }
}
