/* test_kernels.c: every operation of the CPU backend, on every instruction set of this machine.
 *
 * A case is a function that builds its inputs from a fixed seed and runs an operation, several
 * calls in a row where there is history. It runs
 *  - as a naive formulation in double, written here from the definition (a whole signal instead of
 *    streaming, scattering instead of gathering, all keys at once);
 *  - on the generic kernels, compared with that;
 *  - on each other instruction set, compared with generic;
 *  - with one row at a time, and with two and three threads: the same bits;
 *  - with some rows inactive: their histories stay bitwise as they were, the others' results too.
 * Outputs are poisoned first. Bounds are in one table.
 *
 * test_kernels [bench]: bench times the main kernels next to the machine's read rate. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/backend.h"
#include "../../csrc/os.h"

/* Largest |a - b| / (rms of b's row + |b|). Left: generic against double. Right: another
 * instruction set against generic. */
static const struct bound {
    const char *operation;
    double naive, isa;
} bounds[] = {
    {"embed", 1e-6, 2e-6},     /* a few additions; low rank: a short product */
    {"norm", 2e-6, 2e-6},      /* one reduction, a root, a division */
    {"linear", 5e-6, 5e-6},    /* sums of up to 600 products in f32 */
    {"residual", 5e-6, 5e-6},
    {"gated", 5e-6, 5e-6},
    {"rope", 2e-6, 0},         /* the same libm calls on every instruction set */
    {"attend", 1e-5, 1e-5},    /* two sums around an exponential */
    {"attend_bf16", 2e-2, 2e-2}, /* a key may round to the other neighbour: 2^-8 each */
    {"conv", 5e-6, 5e-6},
    {"transposed", 5e-6, 5e-6},
    {"rvq_encode", 0, 0},      /* codes; the seeds have no near ties */
    {"rvq_decode", 5e-6, 5e-6},
    {"softmax", 2e-6, 2e-6},
};

static int passed, failed;

static void verdict(int good, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void verdict(int good, const char *format, ...)
{
    va_list args;

    printf(good ? "ok " : "FAIL ");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    if (good)
        passed++;
    else
        failed++;
}

/* ---- inputs ----------------------------------------------------------------------------- */

static uint64_t random_state;

static uint32_t random_bits(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

static int random_below(int n)
{
    return (int)(random_bits() % (uint32_t)n);
}

static float uniform(void)
{
    return (float)((int32_t)random_bits()) * 0x1p-31f;
}

/* Everything a run needs; emptied before the next one. */
static char *arena;
static size_t arena_used;
static const size_t arena_bytes = (size_t)64 << 20;
static struct matrix *prepared[64];
static int n_prepared;

static void *take(size_t bytes)
{
    void *memory = arena + arena_used;

    arena_used += (bytes + 127) / 64 * 64;
    if (arena_used > arena_bytes) {
        printf("the test's arena is too small\n");
        exit(2);
    }
    memset(memory, 0, bytes);
    return memory;
}

static float *take_random(size_t n, float amplitude)
{
    float *x = take(n * sizeof *x);

    for (size_t i = 0; i < n; i++) x[i] = amplitude * uniform();
    return x;
}

static void poison(void *memory, size_t bytes)
{
    memset(memory, 0xff, bytes); /* floats: NaN */
}

/* Aligned to its element only, as in a checkpoint. */
static struct matrix take_matrix(enum weight_format format, int rows, int cols)
{
    size_t n = (size_t)rows * (size_t)cols;
    float amplitude = 2.0f / sqrtf((float)cols), *values = take_random(n, amplitude);
    char *data = (char *)take(n * 4 + 8) + weight_bytes(format);

    weight_convert(WEIGHT_F32, values, format, data, n);
    return (struct matrix){.format = format, .rows = rows, .cols = cols, .data = data};
}

static void prepare(struct backend *backend, struct matrix *matrix, int pack)
{
    if (!backend || !matrix->rows) return;
    if (backend->ops->prepare_matrix(backend, matrix, pack)) exit(2);
    prepared[n_prepared++] = matrix;
}

static double weight_at(const struct matrix *m, size_t i)
{
    float value;

    weight_convert(m->format, (const char *)m->data + i * weight_bytes(m->format), WEIGHT_F32,
                   &value, 1);
    return value;
}

static struct norm take_norm(enum norm_kind kind, int width)
{
    struct norm norm = {.kind = kind, .eps = kind == NORM_RMS ? 1e-8f : 1e-5f};

    if (kind == NORM_NONE) return norm;
    norm.weight = take_random((size_t)width, 1.5f);
    norm.bias = take_random((size_t)width, 0.5f);
    return norm;
}

/* ---- naive pieces ----------------------------------------------------------------------- */

static double *naive_norm(const struct norm *norm, const float *x, int width)
{
    double *y = take((size_t)width * sizeof *y), mean = 0, square = 0;

    for (int i = 0; i < width; i++) mean += x[i] / (double)width;
    if (norm->kind == NORM_RMS) mean = 0;
    for (int i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean) / width;
    for (int i = 0; i < width; i++) {
        if (norm->kind == NORM_NONE)
            y[i] = x[i];
        else
            y[i] = (x[i] - mean) / sqrt(square + norm->eps) * norm->weight[i] +
                   (norm->kind == NORM_LAYER ? norm->bias[i] : 0);
    }
    return y;
}

static double naive_dot(const struct matrix *m, int row, const double *x)
{
    double sum = 0;

    for (int k = 0; k < m->cols; k++)
        sum += weight_at(m, (size_t)row * (size_t)m->cols + (size_t)k) * x[k];
    return sum;
}

/* ---- cases ------------------------------------------------------------------------------ */

struct shape {
    const char *operation;
    int n, steps, calls, in, out, levels;
    enum weight_format format;
    int packed;
    enum moshi_dtype kv;
    int variant;
    int masked; /* every third row is inactive */
    int only;   /* -1, or the one row to run */
};

/* y[n][width]; state[lanes][lane_bytes] before and after. */
struct outcome {
    int n, lanes;
    size_t width, lane_bytes;
    float *y;
    char *before, *state;
};

typedef void case_function(const struct shape *shape, struct backend *backend,
                           struct outcome *outcome);

static int lanes_of(int n)
{
    return n + 2;
}

/* All rows of the shape; lanes are in another order than rows, with gaps. */
static struct rows take_rows(const struct shape *shape)
{
    int32_t *lane = take((size_t)shape->n * sizeof *lane);
    uint8_t *active = take((size_t)shape->n);

    for (int i = 0; i < shape->n; i++) {
        lane[i] = lanes_of(shape->n) - 1 - i - (i >= shape->n / 2);
        active[i] = !(shape->masked && i % 3 == 1);
    }
    return (struct rows){shape->n, lane, active};
}

/* The rows of the call: all of them, or the one that the shape asks for. */
static struct rows call_rows(const struct shape *shape, struct rows rows)
{
    if (shape->only < 0) return rows;
    return (struct rows){1, rows.lane + shape->only, rows.active + shape->only};
}

static size_t first_row(const struct shape *shape)
{
    return shape->only < 0 ? 0 : (size_t)shape->only;
}

static void start_outcome(struct outcome *o, int n, size_t width, size_t lane_bytes)
{
    o->n = n;
    o->width = width;
    o->lanes = lanes_of(n);
    o->lane_bytes = lane_bytes;
    o->y = malloc((size_t)n * width * sizeof *o->y);
    o->before = calloc((size_t)o->lanes + 1, lane_bytes + 1);
    o->state = calloc((size_t)o->lanes + 1, lane_bytes + 1);
    poison(o->y, (size_t)n * width * sizeof *o->y);
}

static void free_outcome(struct outcome *o)
{
    free(o->y);
    free(o->before);
    free(o->state);
}

static void must(struct backend *backend, int status)
{
    if (status == MOSHI_OK) return;
    printf("FAIL a stage on %s: %s\n", backend->isa, moshi_error_detail());
    exit(2);
}

/* Each operation as a stage of its own. */
#define STAGE(operation)                                                    \
    static void stage_##operation(struct backend *backend, void *op)        \
    {                                                                       \
        backend->ops->operation(backend, op);                               \
    }                                                                       \
    static void run_##operation(struct backend *backend, void *op)          \
    {                                                                       \
        must(backend, backend->ops->run(backend, 0, stage_##operation, op)); \
    }
STAGE(embed)
STAGE(norm)
STAGE(linear)
STAGE(linear_residual)
STAGE(linear_gated)
STAGE(rope)
STAGE(qkv)
STAGE(attend)
STAGE(conv)
STAGE(conv_transposed)
STAGE(rvq_encode)
STAGE(rvq_decode)
STAGE(delay_input)
STAGE(delay_output)
STAGE(advance)
STAGE(sample)
STAGE(softmax)

/* ---- rows: norm, softmax, products, embed ----------------------------------------------- */

static const enum norm_kind norm_kinds[] = {NORM_NONE, NORM_LAYER, NORM_RMS};

static void case_norm(const struct shape *s, struct backend *backend, struct outcome *o)
{
    size_t width = (size_t)s->in;
    float *x = take_random((size_t)s->n * width, 3);
    struct norm norm = take_norm(norm_kinds[s->variant], s->in);

    start_outcome(o, s->n, width, 0);
    if (backend) {
        size_t at = first_row(s) * width;

        run_norm(backend, &(struct op_norm){.name = "norm", .n = s->only < 0 ? s->n : 1,
                                            .width = s->in, .x = x + at, .norm = norm,
                                            .y = o->y + at});
        return;
    }
    for (int i = 0; i < s->n; i++) {
        double *y = naive_norm(&norm, x + (size_t)i * width, s->in);

        for (size_t d = 0; d < width; d++) o->y[(size_t)i * width + d] = (float)y[d];
    }
}

static void case_softmax(const struct shape *s, struct backend *backend, struct outcome *o)
{
    size_t width = (size_t)s->in;
    float *x = take_random((size_t)s->n * width, 20);

    start_outcome(o, s->n, width, 0);
    if (backend) {
        size_t at = first_row(s) * width;

        run_softmax(backend, &(struct op_softmax){.name = "softmax",
                                                  .n = s->only < 0 ? s->n : 1, .width = s->in,
                                                  .x = x + at, .y = o->y + at});
        return;
    }
    for (size_t i = 0; i < (size_t)s->n; i++) {
        double sum = 0;

        for (size_t d = 0; d < width; d++) sum += exp(x[i * width + d]);
        for (size_t d = 0; d < width; d++)
            o->y[i * width + d] = (float)(exp(x[i * width + d]) / sum);
    }
}

/* variant: norm kind + 3 * (bias) + 6 * (gelu); rows of y are spread out */
static void case_linear(const struct shape *s, struct backend *backend, struct outcome *o)
{
    size_t in = (size_t)s->in, stride = (size_t)s->out + 3;
    struct matrix weight = take_matrix(s->format, s->out, s->in);
    struct norm norm = take_norm(norm_kinds[s->variant % 3], s->in);
    float *bias = s->variant / 3 % 2 ? take_random((size_t)s->out, 1) : NULL;
    enum activation activation = s->variant / 6 ? ACTIVATION_GELU : ACTIVATION_NONE;
    float *x = take_random((size_t)s->n * in, 2), *y = take((size_t)s->n * stride * sizeof *y);

    start_outcome(o, s->n, (size_t)s->out, 0);
    prepare(backend, &weight, s->packed);
    poison(y, (size_t)s->n * stride * sizeof *y);
    if (backend)
        run_linear(backend,
                   &(struct op_linear){.name = "linear", .n = s->only < 0 ? s->n : 1,
                                       .x = x + first_row(s) * in, .norm = norm, .weight = weight,
                                       .bias = bias, .activation = activation,
                                       .y = y + first_row(s) * stride, .y_stride = (int)stride});
    for (int i = 0; i < s->n; i++) {
        double *a = naive_norm(&norm, x + (size_t)i * in, s->in);

        for (int r = 0; r < s->out && !backend; r++) {
            double v = naive_dot(&weight, r, a) + (bias ? bias[r] : 0);

            if (activation == ACTIVATION_GELU) v = 0.5 * v * (1 + erf(v / sqrt(2)));
            y[(size_t)i * stride + (size_t)r] = (float)v;
        }
        memcpy(o->y + (size_t)i * (size_t)s->out, y + (size_t)i * stride,
               (size_t)s->out * sizeof *y);
    }
}

/* variant 1: with a scale */
static void case_residual(const struct shape *s, struct backend *backend, struct outcome *o)
{
    size_t in = (size_t)s->in, out = (size_t)s->out;
    struct matrix weight = take_matrix(s->format, s->out, s->in);
    float *scale = s->variant ? take_random(out, 1) : NULL;
    float *u = take_random((size_t)s->n * in, 2), *x = take_random((size_t)s->n * out, 2);

    start_outcome(o, s->n, out, 0);
    prepare(backend, &weight, s->packed);
    if (backend)
        run_linear_residual(backend, &(struct op_linear_residual){
                                         .name = "residual", .n = s->only < 0 ? s->n : 1,
                                         .u = u + first_row(s) * in, .weight = weight,
                                         .scale = scale, .x = x + first_row(s) * out});
    for (int i = 0; i < s->n && !backend; i++) {
        double *a = naive_norm(&(struct norm){.kind = NORM_NONE}, u + (size_t)i * in, s->in);

        for (int r = 0; r < s->out; r++)
            x[(size_t)i * out + (size_t)r] +=
                (float)((scale ? scale[r] : 1) * naive_dot(&weight, r, a));
    }
    memcpy(o->y, x, (size_t)s->n * out * sizeof *x);
}

static void case_gated(const struct shape *s, struct backend *backend, struct outcome *o)
{
    size_t in = (size_t)s->in, out = (size_t)s->out;
    struct matrix weight = take_matrix(s->format, 2 * s->out, s->in);
    struct norm norm = take_norm(norm_kinds[s->variant], s->in);
    float *x = take_random((size_t)s->n * in, 2);

    start_outcome(o, s->n, out, 0);
    prepare(backend, &weight, s->packed);
    if (backend) {
        run_linear_gated(backend, &(struct op_linear_gated){
                                      .name = "gated", .n = s->only < 0 ? s->n : 1,
                                      .x = x + first_row(s) * in, .norm = norm, .weight = weight,
                                      .y = o->y + first_row(s) * out});
        return;
    }
    for (int i = 0; i < s->n; i++) {
        double *a = naive_norm(&norm, x + (size_t)i * in, s->in);

        for (int r = 0; r < s->out; r++) {
            double g = naive_dot(&weight, r, a), v = naive_dot(&weight, r + s->out, a);

            o->y[(size_t)i * out + (size_t)r] = (float)(g / (1 + exp(-g)) * v);
        }
    }
}

/* variant: 1 low rank, 2 norm, 4 condition, 8 accumulate */
static void case_embed(const struct shape *s, struct backend *backend, struct outcome *o)
{
    enum { STREAMS = 5, VOCABULARY = 11 };
    size_t out = (size_t)s->out;
    struct rows rows = take_rows(s);
    struct embedding *tables = take(STREAMS * sizeof *tables);
    int columns = s->variant & 1 ? s->in : s->out;
    int32_t *tokens = take((size_t)s->n * (STREAMS + 2) * sizeof *tokens);
    float *condition = s->variant & 4 ? take_random((size_t)lanes_of(s->n) * out, 1) : NULL;
    float *y = take_random((size_t)s->n * out, 1);

    for (int t = 0; t < STREAMS; t++) {
        tables[t].table = take_matrix(s->format, VOCABULARY, columns);
        if (s->variant & 1) tables[t].low_rank = take_matrix(s->format, s->out, columns);
        tables[t].norm = take_norm(s->variant & 2 ? NORM_LAYER : NORM_NONE, columns);
        prepare(backend, &tables[t].low_rank, s->packed);
    }
    for (int i = 0; i < s->n * (STREAMS + 2); i++) tokens[i] = random_below(VOCABULARY + 1) - 1;
    start_outcome(o, s->n, out, 0);
    if (!(s->variant & 8) && backend) poison(y, (size_t)s->n * out * sizeof *y);
    if (backend)
        run_embed(backend,
                  &(struct op_embed){.name = "embed", .rows = call_rows(s, rows),
                                     .n_streams = STREAMS, .token_stride = STREAMS + 2,
                                     .tokens = tokens + first_row(s) * (STREAMS + 2),
                                     .tables = tables, .condition = condition,
                                     .accumulate = (s->variant & 8) != 0,
                                     .y = y + first_row(s) * out});
    for (int i = 0; i < s->n && !backend; i++) {
        for (int d = 0; d < s->out; d++) {
            size_t at = (size_t)i * out + (size_t)d;
            double sum = s->variant & 8 ? y[at] : 0;

            for (int t = 0; t < STREAMS; t++) {
                int32_t token = tokens[i * (STREAMS + 2) + t];
                float *row = take((size_t)columns * sizeof *row);
                double *a;

                if (token == TOKEN_ZERO) continue;
                for (int k = 0; k < columns; k++)
                    row[k] = (float)weight_at(&tables[t].table, (size_t)(token * columns + k));
                a = naive_norm(&tables[t].norm, row, columns);
                sum += s->variant & 1 ? naive_dot(&tables[t].low_rank, d, a) : a[d];
                arena_used -= (((size_t)columns * 4 + 127) / 64 + ((size_t)columns * 8 + 127) / 64) * 64;
            }
            if (condition) sum += condition[(size_t)rows.lane[i] * out + (size_t)d];
            y[at] = (float)sum;
        }
    }
    memcpy(o->y, y, (size_t)s->n * out * sizeof *y);
}

/* ---- attention -------------------------------------------------------------------------- */

enum { PAGE = 8, PAGES = 3, RING = PAGE * PAGES, WIDTH = 24, CONTEXT = 13, CAPACITY = 14, LAYER = 1 };

/* Several calls of rope, qkv, attend and advance, over the end of the ring. shape.in: head width,
 * shape.out: heads; variant: 1 no rope, 2 keys made from a condition, 4 two heads share keys. */
struct attention {
    int dim, heads, kv_heads, total; /* total: steps of all calls */
    size_t queries, keys;            /* widths */
    struct kv_cache cache;
    int32_t *table, *position, *key_count;
    struct norm norm;
    struct matrix weight;
    float *x; /* [n][total][WIDTH] */
};

static struct attention take_attention(const struct shape *s)
{
    struct attention a = {.dim = s->in, .heads = s->out, .total = s->steps * s->calls};
    int lanes = lanes_of(s->n), pages = lanes * PAGES;
    size_t element = s->kv == MOSHI_BF16 ? 2 : 4, elements;

    a.kv_heads = s->variant & 4 ? a.heads / 2 : a.heads;
    a.queries = (size_t)(a.heads * a.dim);
    a.keys = (size_t)(a.kv_heads * a.dim);
    a.norm = take_norm(NORM_RMS, WIDTH);
    a.weight = take_matrix(s->format, (int)(a.queries + (s->variant & 2 ? 0 : 2 * a.keys)), WIDTH);
    a.x = take_random((size_t)(s->n * a.total * WIDTH), 2);
    a.table = take((size_t)pages * sizeof *a.table);
    a.position = take((size_t)lanes * sizeof *a.position);
    a.key_count = take((size_t)lanes * sizeof *a.key_count);
    for (int i = 0; i < pages; i++) a.table[i] = i;
    for (int i = pages - 1; i > 0; i--) {
        int other = random_below(i + 1), page = a.table[i];

        a.table[i] = a.table[other];
        a.table[other] = page;
    }
    for (int l = 0; l < lanes; l++) a.position[l] = 2 * l, a.key_count[l] = 3 + l % RING;
    a.cache = (struct kv_cache){.page_bytes = 2 * 2 * a.keys * PAGE * element + 64,
                                .table = a.table, .pages_per_lane = PAGES, .page_positions = PAGE,
                                .layers = 2, .kv_heads = a.kv_heads, .head_dim = a.dim,
                                .dtype = s->kv};
    elements = a.cache.page_bytes * (size_t)pages / element;
    a.cache.pages = take(elements * element);
    for (size_t i = 0; i < elements; i++) {
        if (s->kv == MOSHI_BF16)
            ((uint16_t *)a.cache.pages)[i] = f32_to_bf16(uniform());
        else
            ((float *)a.cache.pages)[i] = uniform();
    }
    return a;
}

/* The pages of each lane, then its position. */
static void gather_lanes(const struct attention *a, const struct outcome *o, char *to)
{
    for (int l = 0; l < o->lanes; l++, to += o->lane_bytes) {
        for (int i = 0; i < PAGES; i++)
            memcpy(to + (size_t)i * a->cache.page_bytes,
                   (char *)a->cache.pages + (size_t)a->table[l * PAGES + i] * a->cache.page_bytes,
                   a->cache.page_bytes);
        memcpy(to + PAGES * a->cache.page_bytes, &a->position[l], sizeof *a->position);
    }
}

static void naive_rotate(double *x, int dim, int position)
{
    for (int pair = 0; pair < dim / 2; pair++) {
        double angle = (float)position * (float)exp(-log(10000.0) * 2 * pair / dim);
        double a = x[2 * pair], b = x[2 * pair + 1];

        x[2 * pair] = a * cos(angle) - b * sin(angle);
        x[2 * pair + 1] = a * sin(angle) + b * cos(angle);
    }
}

/* An element of the first contents of the cache. */
static double old_element(const struct attention *a, int lane, int position, int value, int head,
                          int d)
{
    const char *page = (const char *)a->cache.pages +
                       (size_t)a->table[lane * PAGES + position % RING / PAGE] *
                           a->cache.page_bytes;
    int at = (((LAYER * 2 + value) * a->kv_heads + head) * PAGE + position % PAGE) * a->dim + d;

    return a->cache.dtype == MOSHI_BF16 ? bf16_to_f32(((const uint16_t *)(const void *)page)[at])
                                        : ((const float *)(const void *)page)[at];
}

/* rows first.. of W norm(x), turned if they should be */
static double *naive_head(const struct attention *a, const struct shape *s, int first,
                          const float *x, int position, int turned)
{
    double *normed = naive_norm(&a->norm, x, WIDTH);
    double *y = take((size_t)a->dim * sizeof *y);

    for (int d = 0; d < a->dim; d++) y[d] = naive_dot(&a->weight, first + d, normed);
    if (turned && !(s->variant & 1)) naive_rotate(y, a->dim, position);
    return y;
}

/* One query over the keys and values first..last of its head, by position. */
static void naive_query(const double *query, double *const *k, double *const *v, int first,
                        int last, int dim, float *y)
{
    double sum = 0, *mixed = take((size_t)dim * sizeof *mixed);

    for (int j = first; j <= last; j++) {
        double score = 0;

        for (int d = 0; d < dim; d++) score += query[d] * k[j][d];
        score = exp(score / sqrt(dim));
        sum += score;
        for (int d = 0; d < dim; d++) mixed[d] += score * v[j][d];
    }
    for (int d = 0; d < dim; d++) y[d] = (float)(mixed[d] / sum);
}

/* All steps of one head of row i, whose whole past is kept. */
static void naive_attention(const struct attention *a, const struct shape *s, int i, int lane,
                            int head, float *y)
{
    int kv_head = head / (a->heads / a->kv_heads), start = a->position[lane];
    int past = s->variant & 2 ? a->key_count[lane] : start, end = past + a->total;
    double **k = take((size_t)end * sizeof *k), **v = take((size_t)end * sizeof *v);
    const float *x = a->x + (size_t)(i * a->total * WIDTH);

    for (int p = past > RING ? past - RING : 0; p < end; p++) {
        k[p] = take((size_t)a->dim * sizeof **k);
        v[p] = take((size_t)a->dim * sizeof **v);
        if (p < past) {
            for (int d = 0; d < a->dim; d++) {
                k[p][d] = old_element(a, lane, p, 0, kv_head, d);
                v[p][d] = old_element(a, lane, p, 1, kv_head, d);
            }
        } else if (!(s->variant & 2)) {
            int row = (int)a->queries + kv_head * a->dim;

            k[p] = naive_head(a, s, row, x + (p - past) * WIDTH, p, 1);
            v[p] = naive_head(a, s, row + (int)a->keys, x + (p - past) * WIDTH, p, 0);
            for (int d = 0; d < a->dim && s->kv == MOSHI_BF16; d++) {
                k[p][d] = bf16_to_f32(f32_to_bf16((float)k[p][d]));
                v[p][d] = bf16_to_f32(f32_to_bf16((float)v[p][d]));
            }
        }
    }
    for (int step = 0; step < a->total; step++) {
        int p = start + step, call_end = start + (step / s->steps + 1) * s->steps;
        int first = p - CONTEXT + 1, last = p;
        double *query = naive_head(a, s, head * a->dim, x + step * WIDTH, p, !(s->variant & 2));

        if (first < call_end - CAPACITY) first = call_end - CAPACITY;
        if (first < 0) first = 0;
        if (s->variant & 2) first = 0, last = past - 1;
        naive_query(query, k, v, first, last, a->dim,
                    y + (size_t)step * a->queries + (size_t)(head * a->dim));
    }
}

static void case_attend(const struct shape *s, struct backend *backend, struct outcome *o)
{
    struct attention a = take_attention(s);
    struct rows rows = take_rows(s), now = call_rows(s, rows);
    int steps = s->steps, n = s->n * steps;
    size_t at = first_row(s) * (size_t)steps, chunk = (size_t)steps * a.queries;
    float *cos_sin = take((size_t)(n * a.dim) * sizeof *cos_sin);
    float *x = take((size_t)(n * WIDTH) * sizeof *x);
    float *q = take((size_t)n * a.queries * sizeof *q);
    float *y = take((size_t)n * a.queries * sizeof *y);

    start_outcome(o, s->n, (size_t)a.total * a.queries,
                  PAGES * a.cache.page_bytes + sizeof *a.position);
    gather_lanes(&a, o, o->before);
    for (int task = 0; task < s->n * a.heads && !backend; task++) {
        int i = task / a.heads;
        size_t mark = arena_used;

        naive_attention(&a, s, i, rows.lane[i], task % a.heads, o->y + (size_t)i * o->width);
        arena_used = mark;
    }
    if (!backend) return;
    prepare(backend, &a.weight, s->packed);
    for (int call = 0; call < s->calls; call++) {
        for (int i = 0; i < s->n; i++)
            memcpy(x + i * steps * WIDTH, a.x + (i * a.total + call * steps) * WIDTH,
                   (size_t)(steps * WIDTH) * sizeof *x);
        poison(y, (size_t)n * a.queries * sizeof *y);
        poison(q, (size_t)n * a.queries * sizeof *q);
        run_rope(backend, &(struct op_rope){.name = "rope", .rows = now, .steps = steps,
                                            .head_dim = a.dim, .max_period = 10000,
                                            .position = a.position,
                                            .cos_sin = cos_sin + at * (size_t)a.dim});
        if (s->variant & 2)
            run_linear(backend, &(struct op_linear){.name = "q", .n = now.n * steps,
                                                    .x = x + at * WIDTH, .norm = a.norm,
                                                    .weight = a.weight, .y = q + at * a.queries});
        else
            run_qkv(backend,
                    &(struct op_qkv){.name = "qkv", .rows = now, .steps = steps,
                                     .heads = a.heads, .layer = LAYER, .x = x + at * WIDTH,
                                     .norm = a.norm, .weight = a.weight,
                                     .cos_sin = s->variant & 1 ? NULL
                                                               : cos_sin + at * (size_t)a.dim,
                                     .position = a.position, .cache = &a.cache,
                                     .q = q + at * a.queries});
        run_attend(backend,
                   &(struct op_attend){.name = "attend", .rows = now, .steps = steps,
                                       .heads = a.heads, .layer = LAYER,
                                       .causal = !(s->variant & 2), .context = CONTEXT,
                                       .capacity = CAPACITY, .position = a.position,
                                       .key_count = a.key_count, .cache = &a.cache,
                                       .q = q + at * a.queries, .y = y + at * a.queries});
        run_advance(backend, &(struct op_advance){.name = "advance", .rows = now,
                                                  .steps = steps, .position = a.position});
        for (size_t i = 0; i < (size_t)s->n; i++)
            memcpy(o->y + i * o->width + (size_t)call * chunk, y + i * chunk, chunk * sizeof *y);
    }
    gather_lanes(&a, o, o->state);
}

static void case_rope(const struct shape *s, struct backend *backend, struct outcome *o)
{
    struct rows rows = take_rows(s), now = call_rows(s, rows);
    size_t width = (size_t)(s->steps * (s->in / 2 * 2));
    int32_t *position = take((size_t)lanes_of(s->n) * sizeof *position);

    for (int l = 0; l < lanes_of(s->n); l++) position[l] = l * l * 37;
    start_outcome(o, s->n, width, 0);
    if (backend)
        run_rope(backend, &(struct op_rope){.name = "rope", .rows = now, .steps = s->steps,
                                            .head_dim = s->in, .max_period = 100000,
                                            .position = position,
                                            .cos_sin = o->y + first_row(s) * width});
    for (int i = 0; i < s->n * s->steps && !backend; i++) {
        for (int pair = 0; pair < s->in / 2; pair++) {
            int p = position[rows.lane[i / s->steps]] + i % s->steps;
            double angle = (float)p * (float)exp(-log(100000.0) * 2 * pair / s->in);
            float *to = o->y + (i * (s->in / 2) + pair) * 2;

            to[0] = (float)cos(angle);
            to[1] = (float)sin(angle);
        }
    }
}

/* ---- codec ------------------------------------------------------------------------------ */

static double naive_elu(double v, int elu)
{
    return elu && v <= 0 ? exp(v) - 1 : v;
}

/* The whole signal of row i, [total][in], after the elu. */
static double *naive_signal(const struct shape *s, const float *x, int i, int elu)
{
    size_t n = (size_t)(s->steps * s->calls * s->in);
    double *signal = take(n * sizeof *signal);

    for (size_t j = 0; j < n; j++) signal[j] = naive_elu(x[(size_t)i * n + j], elu);
    return signal;
}

/* levels: kernel * 100 + stride. variant: 1 elu, 2 residual, 4 replicate, 8 no bias. */
static void case_conv(const struct shape *s, struct backend *backend, struct outcome *o)
{
    int kernel = s->levels / 100, stride = s->levels % 100, past = kernel - stride;
    int elu = s->variant & 1, total = s->steps * s->calls, steps = s->steps / stride;
    int lanes = lanes_of(s->n);
    struct conv conv = {.in = s->in, .out = s->out, .kernel = kernel, .stride = stride,
                        .weight = take_matrix(s->format, s->out, kernel * s->in),
                        .bias = s->variant & 8 ? NULL : take_random((size_t)s->out, 1),
                        .replicate = (s->variant & 4) != 0};
    struct rows rows = take_rows(s), now = call_rows(s, rows);
    float *x = take_random((size_t)(s->n * total * s->in), 2);
    float *residual = take_random((size_t)(s->n * total / stride * s->out), 1);
    size_t chunk = (size_t)(steps * s->out), history_floats = (size_t)(past * s->in);
    float *history = take((size_t)lanes * history_floats * sizeof *history);
    int32_t *first = take((size_t)lanes * sizeof *first);
    float *xs = take((size_t)(s->n * s->steps * s->in) * sizeof *xs);
    float *rs = take((size_t)s->n * chunk * sizeof *rs), *y = take((size_t)s->n * chunk * sizeof *y);
    float *work = take((size_t)(s->n * (past + s->steps) * s->in) * sizeof *work);

    start_outcome(o, s->n, chunk * (size_t)s->calls, history_floats * 4 + sizeof *first);
    for (int l = 0; l < lanes; l++) first[l] = 1;
    for (int i = 0; i < s->n; i++)
        for (size_t j = 0; !rows.active[i] && j < history_floats; j++)
            history[(size_t)rows.lane[i] * history_floats + j] = uniform();
    for (int l = 0; l < lanes; l++) {
        memcpy(o->before + (size_t)l * o->lane_bytes, history + (size_t)l * history_floats,
               history_floats * 4);
        memcpy(o->before + (size_t)l * o->lane_bytes + history_floats * 4, &first[l], 4);
    }
    prepare(backend, &conv.weight, s->packed);
    for (int call = 0; call < s->calls && backend; call++) {
        size_t in_chunk = (size_t)(s->steps * s->in);

        for (size_t i = 0; i < (size_t)s->n; i++) {
            memcpy(xs + i * in_chunk, x + (i * (size_t)s->calls + (size_t)call) * in_chunk,
                   in_chunk * sizeof *x);
            memcpy(rs + i * chunk, residual + (i * (size_t)s->calls + (size_t)call) * chunk,
                   chunk * sizeof *rs);
        }
        poison(y, (size_t)s->n * chunk * sizeof *y);
        run_conv(backend,
                 &(struct op_conv){.name = "conv", .rows = now, .steps = s->steps, .conv = &conv,
                                   .elu = elu, .x = xs + first_row(s) * in_chunk,
                                   .residual = s->variant & 2 ? rs + first_row(s) * chunk : NULL,
                                   .history = history, .first = first, .work = work,
                                   .y = y + first_row(s) * chunk});
        for (size_t i = 0; i < (size_t)s->n; i++)
            memcpy(o->y + i * o->width + (size_t)call * chunk, y + i * chunk, chunk * sizeof *y);
    }
    for (int l = 0; l < lanes; l++) {
        memcpy(o->state + (size_t)l * o->lane_bytes, history + (size_t)l * history_floats,
               history_floats * 4);
        memcpy(o->state + (size_t)l * o->lane_bytes + history_floats * 4, &first[l], 4);
    }
    for (int i = 0; i < s->n && !backend; i++) {
        size_t mark = arena_used;
        double *signal = naive_signal(s, x, i, elu), *tap = take((size_t)conv.weight.cols * 8);

        for (int t = 0; t < total / stride; t++) {
            for (int k = 0; k < conv.weight.cols; k++) {
                int at = t * stride - past + k / s->in;

                tap[k] = at >= 0 ? signal[at * s->in + k % s->in]
                                 : conv.replicate ? signal[k % s->in] : 0;
            }
            for (int c = 0; c < s->out; c++) {
                size_t to = (size_t)(t * s->out + c);

                o->y[(size_t)i * o->width + to] =
                    (float)(naive_dot(&conv.weight, c, tap) + (conv.bias ? conv.bias[c] : 0) +
                            (s->variant & 2 ? residual[(size_t)i * o->width + to] : 0));
            }
        }
        arena_used = mark;
    }
}

/* levels: stride. variant: 1 elu, 2 depthwise, 8 no bias. The weight is drawn in the layout of a
 * checkpoint, [in][out][kernel], and scattered by its definition. */
static void case_transposed(const struct shape *s, struct backend *backend, struct outcome *o)
{
    int stride = s->levels, kernel = 2 * stride, depthwise = s->variant & 2;
    int out = depthwise ? s->in : s->out, total = s->steps * s->calls, lanes = lanes_of(s->n);
    float amplitude = 1 / sqrtf((float)s->in);
    float *weight = take_random((size_t)(s->in * (depthwise ? 1 : out) * kernel), amplitude);
    size_t rows_w = (size_t)(stride * out), cols = (size_t)(2 * s->in);
    float *dense = take(rows_w * cols * sizeof *dense);
    float *thin = take((size_t)(kernel * s->in) * sizeof *thin);
    void *data = take(rows_w * cols * 4);
    struct conv conv = {.in = s->in, .out = out, .kernel = kernel, .stride = stride,
                        .depthwise = depthwise != 0, .depthwise_weight = thin,
                        .bias = s->variant & 8 ? NULL : take_random((size_t)out, 1)};
    struct rows rows = take_rows(s), now = call_rows(s, rows);
    float *x = take_random((size_t)(s->n * total * s->in), 2);
    size_t chunk = (size_t)(s->steps * stride * out), in_chunk = (size_t)(s->steps * s->in);
    float *history = take((size_t)(lanes * s->in) * sizeof *history);
    float *xs = take((size_t)s->n * in_chunk * sizeof *xs);
    float *y = take((size_t)s->n * chunk * sizeof *y);
    float *work = take((size_t)(s->n * (1 + s->steps) * s->in) * sizeof *work);

    for (int c = 0; c < s->in && depthwise; c++)
        for (int k = 0; k < kernel; k++) thin[k * s->in + c] = weight[c * kernel + k];
    for (int c = 0; c < s->in && !depthwise; c++)
        for (int d = 0; d < out; d++)
            for (int k = 0; k < kernel; k++)
                dense[(size_t)(k % stride * out + d) * cols +
                      (size_t)(k < stride ? s->in + c : c)] = weight[(c * out + d) * kernel + k];
    if (!depthwise) {
        weight_convert(WEIGHT_F32, dense, s->format, data, rows_w * cols);
        conv.weight = (struct matrix){.format = s->format, .rows = (int)rows_w,
                                      .cols = (int)cols, .data = data};
        for (int c = 0; c < s->in; c++) /* the naive side reads the rounded weights */
            for (int d = 0; d < out; d++)
                for (int k = 0; k < kernel; k++)
                    weight[(c * out + d) * kernel + k] = (float)weight_at(
                        &conv.weight, (size_t)(k % stride * out + d) * cols +
                                          (size_t)(k < stride ? s->in + c : c));
    }
    start_outcome(o, s->n, chunk * (size_t)s->calls, (size_t)s->in * 4);
    for (int i = 0; i < s->n; i++)
        for (int c = 0; !rows.active[i] && c < s->in; c++)
            history[rows.lane[i] * s->in + c] = uniform();
    memcpy(o->before, history, (size_t)lanes * o->lane_bytes);
    prepare(backend, &conv.weight, s->packed);
    for (int call = 0; call < s->calls && backend; call++) {
        for (size_t i = 0; i < (size_t)s->n; i++)
            memcpy(xs + i * in_chunk, x + (i * (size_t)s->calls + (size_t)call) * in_chunk,
                   in_chunk * sizeof *x);
        poison(y, (size_t)s->n * chunk * sizeof *y);
        run_conv_transposed(backend,
                            &(struct op_conv_transposed){
                                .name = "transposed", .rows = now, .steps = s->steps,
                                .conv = &conv, .elu = s->variant & 1,
                                .x = xs + first_row(s) * in_chunk, .history = history,
                                .work = work, .y = y + first_row(s) * chunk});
        for (size_t i = 0; i < (size_t)s->n; i++)
            memcpy(o->y + i * o->width + (size_t)call * chunk, y + i * chunk, chunk * sizeof *y);
    }
    memcpy(o->state, history, (size_t)lanes * o->lane_bytes);
    for (int i = 0; i < s->n && !backend; i++) {
        size_t mark = arena_used, length = (size_t)((total + 1) * stride * out);
        double *signal = naive_signal(s, x, i, s->variant & 1), *sum = take(length * sizeof *sum);

        for (int t = 0; t < total; t++)
            for (int c = 0; c < s->in; c++)
                for (int k = 0; k < kernel; k++)
                    for (int d = depthwise ? c : 0; d < (depthwise ? c + 1 : out); d++)
                        sum[(t * stride + k) * out + d] +=
                            signal[t * s->in + c] *
                            weight[depthwise ? c * kernel + k : (c * out + d) * kernel + k];
        for (size_t j = 0; j < o->width; j++)
            o->y[(size_t)i * o->width + j] =
                (float)(sum[j] + (conv.bias ? conv.bias[j % (size_t)out] : 0));
        arena_used = mark;
    }
}

/* in: D, out: dim. Entries 1, 70 and 130 are equal, and nearest to row 0: the first must win. */
static struct rvq take_rvq(const struct shape *s)
{
    enum { BINS = 150 };
    size_t dim = (size_t)s->out;
    float *entries = take_random((size_t)s->levels * BINS * dim, 1);
    float *half = take((size_t)s->levels * BINS * sizeof *half);
    struct rvq rvq = {.levels = s->levels, .bins = BINS, .dim = s->out,
                      .in_proj = take_matrix(s->format, s->out, s->in),
                      .out_proj = take_matrix(s->format, s->in, s->out)};

    for (size_t d = 0; d < dim; d++)
        entries[1 * dim + d] = entries[70 * dim + d] = entries[130 * dim + d] = 0;
    for (size_t e = 0; e < (size_t)s->levels * BINS; e++)
        for (size_t d = 0; d < dim; d++) half[e] += 0.5f * entries[e * dim + d] * entries[e * dim + d];
    rvq.codebooks = entries;
    rvq.half_norms = half;
    return rvq;
}

static void case_rvq_encode(const struct shape *s, struct backend *backend, struct outcome *o)
{
    struct rvq rvq = take_rvq(s);
    size_t in = (size_t)s->in, dim = (size_t)s->out;
    int stride = s->levels + 2;
    float *x = take_random((size_t)s->n * in, 3), *work = take((size_t)s->n * 2 * dim * 4);
    int32_t *codes = take((size_t)(s->n * stride) * sizeof *codes);

    memset(x, 0, in * sizeof *x);
    poison(work, (size_t)s->n * 2 * dim * 4);
    poison(codes, (size_t)(s->n * stride) * sizeof *codes);
    start_outcome(o, s->n, (size_t)s->levels, 0);
    prepare(backend, &rvq.in_proj, s->packed);
    if (backend)
        run_rvq_encode(backend,
                       &(struct op_rvq_encode){.name = "encode", .n = s->only < 0 ? s->n : 1,
                                               .levels = s->levels, .code_stride = stride,
                                               .rvq = &rvq, .x = x + first_row(s) * in,
                                               .codes = codes + (int)first_row(s) * stride,
                                               .work = work});
    for (int i = 0; i < s->n; i++) {
        double *r = take(dim * sizeof *r);
        double *a = naive_norm(&(struct norm){.kind = NORM_NONE}, x + (size_t)i * in, s->in);

        for (size_t d = 0; d < dim; d++) r[d] = naive_dot(&rvq.in_proj, (int)d, a);
        for (int level = 0; level < s->levels; level++) {
            const float *entries = rvq.codebooks + (size_t)(level * rvq.bins) * dim;
            double least = INFINITY;
            int best = 0;

            for (int e = 0; e < rvq.bins; e++) {
                double distance = 0;

                for (size_t d = 0; d < dim; d++)
                    distance += (r[d] - entries[(size_t)e * dim + d]) *
                                (r[d] - entries[(size_t)e * dim + d]);
                if (distance < least) least = distance, best = e;
            }
            for (size_t d = 0; d < dim; d++) r[d] -= entries[(size_t)best * dim + d];
            o->y[i * s->levels + level] = (float)(backend ? codes[i * stride + level] : best);
        }
    }
}

/* variant 1: accumulate; one code is out of range */
static void case_rvq_decode(const struct shape *s, struct backend *backend, struct outcome *o)
{
    struct rvq rvq = take_rvq(s);
    size_t in = (size_t)s->in, dim = (size_t)s->out;
    int stride = s->levels + 2;
    float *y = take_random((size_t)s->n * in, 1), *work = take((size_t)s->n * dim * 4);
    int32_t *codes = take((size_t)(s->n * stride) * sizeof *codes);

    for (int i = 0; i < s->n * stride; i++) codes[i] = random_below(rvq.bins);
    codes[0] = rvq.bins;
    poison(work, (size_t)s->n * dim * 4);
    start_outcome(o, s->n, in, 0);
    prepare(backend, &rvq.out_proj, s->packed);
    if (!s->variant && backend) poison(y, (size_t)s->n * in * sizeof *y);
    if (backend)
        run_rvq_decode(backend,
                       &(struct op_rvq_decode){.name = "decode", .n = s->only < 0 ? s->n : 1,
                                               .levels = s->levels, .code_stride = stride,
                                               .accumulate = s->variant, .rvq = &rvq,
                                               .codes = codes + (int)first_row(s) * stride,
                                               .work = work, .y = y + first_row(s) * in});
    for (int i = 0; i < s->n && !backend; i++) {
        double *sum = take(dim * sizeof *sum);

        for (int level = 0; level < s->levels; level++) {
            int code = codes[i * stride + level] < rvq.bins ? codes[i * stride + level] : 0;

            for (size_t d = 0; d < dim; d++)
                sum[d] += rvq.codebooks[(size_t)(level * rvq.bins + code) * dim + d];
        }
        for (int r = 0; r < s->in; r++)
            y[(size_t)i * in + (size_t)r] = (float)(naive_dot(&rvq.out_proj, r, sum) +
                                                    (s->variant ? y[(size_t)i * in + (size_t)r] : 0));
    }
    memcpy(o->y, y, (size_t)s->n * in * sizeof *y);
}
