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
 * test_kernels cuda: the CUDA backend in the place of the other instruction sets, on a card or on the
 * host shim (MOSHI_C_CUDA_LIBRARY), fewer shapes.
 * test_kernels [cuda] every N: one shape of N, for machines that are emulated or watched. With 5 and 11
 * every operation still meets all row counts, sizes and kinds, though not each with each.
 * test_kernels best NAME: only whether this machine's kernels are those, and it refuses better ones.
 * test_kernels bench [threads [words]]: times the main kernels beside the machine's read rate and its
 * rate of multiply-adds, those whose name has the words in it. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../csrc/backend.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/probe.h"
#include "../../csrc/cuda.h"
#include "../../csrc/depth.h"
#include "../../csrc/os.h"

/* Largest |a - b| / (rms of b's row + |b|). Left: generic against double. Right: another
 * instruction set against generic. */
static const struct bound {
    const char *operation;
    double naive, isa;
} bounds[] = {
    {"embed", 5e-6, 5e-6},     /* a few additions; low rank: a product */
    {"norm", 2e-6, 2e-6},      /* one reduction, a root, a division */
    {"linear", 5e-6, 5e-6},    /* sums of up to 600 products in f32 */
    {"many", 5e-6, 5e-6},
    {"residual", 5e-6, 5e-6},
    {"gated", 5e-6, 5e-6},
    {"rope", 2e-6, 0},         /* the same libm calls on every instruction set */
    {"attend", 1e-5, 1e-5},    /* two sums around an exponential */
    {"attend_bf16", 2e-2, 2e-2}, /* a key may round to the other neighbour: 2^-8 each */
    {"attend_int8", 4e-2, 4e-2}, /* a code may be the other neighbour: 2^-7 of the largest each */
    {"conv", 5e-6, 5e-6},
    {"transposed", 5e-6, 5e-6},
    {"rvq_encode", 0, 0},      /* codes; the seeds have no near ties */
    {"rvq_decode", 5e-6, 5e-6},
    {"softmax", 2e-6, 2e-6},
    {"codes", 5e-6, 0},          /* integers, and float sums in one order */
    {"near_codes", 5e-3, 5e-3},  /* norms differ by an ulp, and a code may round the other way */
};

/* On a card bf16 weights meet activations of 16 bits: 2^-18 each, and a gate multiplies two sums. */
static const double card_bf16 = 4e-5;

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
static struct prepared {
    struct backend *backend;
    struct matrix matrix;
} prepared[64];
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

/* Rows in that format, aligned to its element only, as in a checkpoint. */
static struct matrix matrix_of(enum weight_format format, int rows, int cols, const float *values)
{
    size_t n = (size_t)rows * (size_t)cols;
    char *data = (char *)take(n * 4 + 8) + weight_bytes(format);
    struct matrix matrix = {.format = format, .rows = rows, .cols = cols, .data = data};

    if (format == WEIGHT_INT8) {
        float *scales = take((size_t)rows * sizeof *scales);

        for (int r = 0; r < rows; r++)
            scales[r] = int8_row(values + (size_t)r * (size_t)cols, cols,
                                 (int8_t *)data + (size_t)r * (size_t)cols);
        matrix.scales = scales;
    } else if (format == WEIGHT_FP8) {
        float *scales = take((size_t)rows * sizeof *scales);

        for (int r = 0; r < rows; r++) {
            const float *row = values + (size_t)r * (size_t)cols;
            float most = 0;

            for (int k = 0; k < cols; k++) most = fmaxf(most, fabsf(row[k]));
            scales[r] = most / FP8_MOST;
            for (int k = 0; k < cols; k++)
                ((uint8_t *)data)[r * cols + k] = f32_to_fp8(row[k] / scales[r]);
        }
        matrix.scales = scales;
    } else {
        weight_convert(WEIGHT_F32, values, format, data, n);
    }
    return matrix;
}

static struct matrix take_matrix(enum weight_format format, int rows, int cols)
{
    float amplitude = 2.0f / sqrtf((float)cols);

    return matrix_of(format, rows, cols, take_random((size_t)rows * (size_t)cols, amplitude));
}

/* From the plainest to the best. */
static const char *const isas[] = {
    "generic",
#if defined(__x86_64__)
    "avx2",
    "avx512",
#if defined(MOSHI_CPU_AMX)
    "amx",
#endif
#elif defined(__aarch64__)
    "neon",
    "neon_dot",
    "neon_i8mm",
#endif
};

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

/* Of each one: 1, 2, 3 threads. With a CUDA backend: generic once, then that. */
static struct backend *backends[3 * COUNT(isas)];
static int n_backends, cuda;

/* pack: 0 rows, 1 panels of f32, else the block format, or fp8, to make. The naive formulation reads the
 * panels of the first backend then. */
static void prepare(struct backend *backend, struct matrix *matrix, int pack)
{
    int status;

    if (!backend && pack > 1) backend = backends[0];
    if (!backend || !matrix->rows) return;
    status = pack > 1 ? backend->ops->quantise_matrix(backend, matrix, (enum weight_format)pack)
                      : backend->ops->prepare_matrix(backend, matrix, pack);
    if (status) exit(2);
    prepared[n_prepared++] = (struct prepared){backend, *matrix};
}

static double weight_at(const struct matrix *m, size_t i)
{
    float value;

    if (m->format == WEIGHT_INT8)
        return (double)m->scales[i / (size_t)m->cols] * ((const int8_t *)m->data)[i];
    weight_convert(m->format, (const char *)m->data + i * weight_bytes(m->format), WEIGHT_F32,
                   &value, 1);
    return m->scales ? (double)m->scales[i / (size_t)m->cols] * value : value;
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

/* x as the block formats multiply it. */
static void naive_codes(const double *x, int n, double *y)
{
    for (int first = 0; first < n; first += GROUP) {
        int last = first + GROUP < n ? first + GROUP : n;
        float most = 0;

        for (int k = first; k < last; k++) most = fmaxf(most, fabsf((float)x[k]));
        for (int k = first; k < last; k++)
            y[k] = most > 0 ? rintf((float)x[k] * (127.0f / most)) * (double)most / 127 : 0;
    }
}

static double naive_block_dot(const struct matrix *m, int row, const double *x)
{
    const char *panel = (const char *)m->packed +
                        (size_t)(row / PANEL) * panel_bytes(m->format, m->cols);
    size_t mark = arena_used;
    double sum = 0, *rounded = take((size_t)m->cols * sizeof *rounded);

    naive_codes(x, m->cols, rounded);
    for (int k = 0; k < m->cols; k++)
        sum += panel_code(m->format, panel, row % PANEL, k) *
               (double)panel_scale(m->format, panel, row % PANEL, k) * rounded[k];
    arena_used = mark;
    return sum;
}

static double naive_dot(const struct matrix *m, int row, const double *x)
{
    if (!m->data) return naive_block_dot(m, row, x);
    size_t columns = (size_t)m->cols;
    double sum = 0;

    for (size_t k = 0; k < columns; k++) sum += weight_at(m, (size_t)row * columns + k) * x[k];
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

/* Results of two runs are held at a time; a card writes them, so they lie in its reach. */
#define OUTCOMES 4
static char *outcomes[OUTCOMES];
static int held[OUTCOMES];
static const size_t outcome_bytes = (size_t)1 << 20;

static float *outcome_memory(size_t bytes)
{
    if (!cuda) return malloc(bytes);
    for (int i = 0; i < OUTCOMES && bytes <= outcome_bytes; i++)
        if (!held[i]) return held[i] = 1, (float *)(void *)outcomes[i];
    printf("the test's results are too large\n");
    exit(2);
}

static void free_outcome_memory(float *y)
{
    if (!cuda) free(y);
    for (int i = 0; i < OUTCOMES; i++)
        if ((char *)y == outcomes[i]) held[i] = 0;
}

static void start_outcome(struct outcome *o, int n, size_t width, size_t lane_bytes)
{
    o->n = n;
    o->width = width;
    o->lanes = lanes_of(n);
    o->lane_bytes = lane_bytes;
    o->y = outcome_memory((size_t)n * width * sizeof *o->y);
    o->before = calloc((size_t)o->lanes + 1, lane_bytes + 1);
    o->state = calloc((size_t)o->lanes + 1, lane_bytes + 1);
    poison(o->y, (size_t)n * width * sizeof *o->y);
}

static void free_outcome(struct outcome *o)
{
    free_outcome_memory(o->y);
    free(o->before);
    free(o->state);
}

static void must(struct backend *backend, int status)
{
    if (status == MOSHI_OK) return;
    printf("FAIL a stage on %s: %s\n", backend->isa, moshi_error_detail());
    exit(2);
}

static int run_stage(struct backend *backend, void (*function)(struct backend *, void *), void *arg)
{
    int status = backend->ops->run(backend, 0, function, arg, 0);

    return status ? status : backend->ops->sync(backend);
}

/* Each operation as a stage of its own. */
#define STAGE(operation)                                                                           \
    static void stage_##operation(struct backend *backend, void *op)                               \
    {                                                                                              \
        backend->ops->operation(backend, op);                                                      \
    }                                                                                              \
    static void run_##operation(struct backend *backend, void *op)                                 \
    {                                                                                              \
        must(backend, run_stage(backend, stage_##operation, op));                                  \
    }
STAGE(embed)
STAGE(norm)
STAGE(linear)
STAGE(linear_many)
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

        run_norm(backend, &(struct op_norm){.name = "norm",
                                            .n = s->only < 0 ? s->n : 1,
                                            .width = s->in,
                                            .x = x + at,
                                            .norm = norm,
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
                                                  .n = s->only < 0 ? s->n : 1,
                                                  .width = s->in,
                                                  .x = x + at,
                                                  .y = o->y + at});
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
        run_linear(backend, &(struct op_linear){.name = "linear",
                                                .n = s->only < 0 ? s->n : 1,
                                                .x = x + first_row(s) * in,
                                                .norm = norm,
                                                .weight = weight,
                                                .bias = bias,
                                                .activation = activation,
                                                .y = y + first_row(s) * stride,
                                                .y_stride = (int)stride});
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

/* variant: 0 three matrices, 1 the last one in f32, 2 more than go together */
static void case_many(const struct shape *s, struct backend *backend, struct outcome *o)
{
    const int count = s->variant == 2 ? 18 : 3;
    size_t in = (size_t)s->in, out = (size_t)s->out, n = s->only < 0 ? (size_t)s->n : 1;
    struct matrix *weights = take((size_t)count * sizeof *weights);
    float *x = take_random((size_t)s->n * in, 2), *y = take(n * out * (size_t)count * sizeof *y);

    for (int m = 0; m < count; m++) {
        int odd = s->variant == 1 && m == count - 1;

        weights[m] = take_matrix(odd ? WEIGHT_F32 : s->format, s->out, s->in);
        prepare(backend, &weights[m], odd ? 0 : s->packed);
    }
    start_outcome(o, s->n, out * (size_t)count, 0);
    poison(y, n * out * (size_t)count * sizeof *y);
    if (backend)
        run_linear_many(backend, &(struct op_linear_many){.name = "many",
                                                          .n = (int)n,
                                                          .count = count,
                                                          .x = x + first_row(s) * in,
                                                          .weights = weights,
                                                          .y = y});
    for (size_t i = 0; i < n; i++) {
        double *a = naive_norm(&(struct norm){.kind = NORM_NONE}, x + i * in, s->in);

        for (size_t m = 0; m < (size_t)count; m++) {
            float *from = y + (m * n + i) * out;

            for (int r = 0; r < s->out && !backend; r++)
                from[r] = (float)naive_dot(&weights[m], r, a);
            memcpy(o->y + ((first_row(s) + i) * (size_t)count + m) * out, from, out * sizeof *y);
        }
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
        run_linear_residual(backend, &(struct op_linear_residual){.name = "residual",
                                                                  .n = s->only < 0 ? s->n : 1,
                                                                  .u = u + first_row(s) * in,
                                                                  .weight = weight,
                                                                  .scale = scale,
                                                                  .x = x + first_row(s) * out});
    for (int i = 0; i < s->n && !backend; i++) {
        double *a = naive_norm(&(struct norm){.kind = NORM_NONE}, u + (size_t)i * in, s->in);

        for (int r = 0; r < s->out; r++)
            x[(size_t)i * out + (size_t)r] += (float)((scale ? scale[r] : 1) *
                                                      naive_dot(&weight, r, a));
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
        run_linear_gated(backend, &(struct op_linear_gated){.name = "gated",
                                                            .n = s->only < 0 ? s->n : 1,
                                                            .x = x + first_row(s) * in,
                                                            .norm = norm,
                                                            .weight = weight,
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

/* variant: 1 low rank, 2 norm, 4 condition, 8 added to y, with 1 to other rows */
static void case_embed(const struct shape *s, struct backend *backend, struct outcome *o)
{
    enum { STREAMS = 5, VOCABULARY = 11 };
    size_t out = (size_t)s->out;
    struct rows rows = take_rows(s);
    struct embedding *tables = take(STREAMS * sizeof *tables);
    int columns = s->variant & 1 ? s->in : s->out;
    int32_t *tokens = take((size_t)s->n * (STREAMS + 2) * sizeof *tokens);
    float *condition = s->variant & 4 ? take_random((size_t)lanes_of(s->n) * out, 1) : NULL;
    float *y = take_random((size_t)s->n * out, 1), *from = NULL;

    if (s->variant & 8) from = s->variant & 1 ? take_random((size_t)s->n * out, 1) : y;

    for (int t = 0; t < STREAMS; t++) {
        tables[t].table = take_matrix(s->format, VOCABULARY, columns);
        if (s->variant & 1) tables[t].low_rank = take_matrix(s->format, s->out, columns);
        tables[t].norm = take_norm(s->variant & 2 ? NORM_LAYER : NORM_NONE, columns);
        prepare(backend, &tables[t].low_rank, s->packed);
    }
    for (int i = 0; i < s->n * (STREAMS + 2); i++) tokens[i] = random_below(VOCABULARY + 1) - 1;
    start_outcome(o, s->n, out, 0);
    if (from != y && backend) poison(y, (size_t)s->n * out * sizeof *y);
    if (backend)
        run_embed(backend, &(struct op_embed){.name = "embed",
                                              .rows = call_rows(s, rows),
                                              .n_streams = STREAMS,
                                              .token_stride = STREAMS + 2,
                                              .tokens = tokens + first_row(s) * (STREAMS + 2),
                                              .tables = tables,
                                              .condition = condition,
                                              .from = from ? from + first_row(s) * out : NULL,
                                              .y = y + first_row(s) * out});
    for (int i = 0; i < s->n && !backend; i++) {
        for (int d = 0; d < s->out; d++) {
            size_t at = (size_t)i * out + (size_t)d;
            double sum = from ? from[at] : 0;

            for (int t = 0; t < STREAMS; t++) {
                int32_t token = tokens[i * (STREAMS + 2) + t];
                float *row = take((size_t)columns * sizeof *row);
                double *a;

                if (token == TOKEN_ZERO) continue;
                for (int k = 0; k < columns; k++)
                    row[k] = (float)weight_at(&tables[t].table, (size_t)(token * columns + k));
                a = naive_norm(&tables[t].norm, row, columns);
                sum += s->variant & 1 ? naive_dot(&tables[t].low_rank, d, a) : a[d];
                arena_used -=
                    (((size_t)columns * 4 + 127) / 64 + ((size_t)columns * 8 + 127) / 64) * 64;
            }
            if (condition) sum += condition[(size_t)rows.lane[i] * out + (size_t)d];
            y[at] = (float)sum;
        }
    }
    memcpy(o->y, y, (size_t)s->n * out * sizeof *y);
}

/* ---- attention -------------------------------------------------------------------------- */

enum {
    PAGE = 8,
    PAGES = 3,
    RING = PAGE * PAGES,
    WIDTH = 24,
    CONTEXT = 13,
    CAPACITY = 14,
    LAYER = 1
};

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
    size_t element = s->kv == MOSHI_BF16 ? 2 : s->kv == MOSHI_INT8 ? 1 : 4, elements;

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
    a.cache = (struct kv_cache){.table = a.table,
                                .pages_per_lane = PAGES,
                                .page_positions = PAGE,
                                .layers = 2,
                                .kv_heads = a.kv_heads,
                                .head_dim = a.dim,
                                .dtype = s->kv};
    a.cache.page_bytes = 2 * 2 * (size_t)a.kv_heads * kv_plane_bytes(&a.cache) + 64;
    elements = a.cache.page_bytes * (size_t)pages / element;
    a.cache.pages = take(elements * element);
    for (size_t i = 0; i < elements; i++) {
        if (s->kv == MOSHI_BF16)
            ((uint16_t *)a.cache.pages)[i] = f32_to_bf16(uniform());
        else if (s->kv == MOSHI_INT8)
            ((int8_t *)a.cache.pages)[i] = (int8_t)(127 * uniform());
        else
            ((float *)a.cache.pages)[i] = uniform();
    }
    for (int page = 0; page < pages && s->kv == MOSHI_INT8; page++)
        for (int plane = 0; plane < 4 * a.kv_heads; plane++) {
            char *start = (char *)a.cache.pages + (size_t)page * a.cache.page_bytes +
                          (size_t)plane * kv_plane_bytes(&a.cache);
            float *scales = (float *)(void *)(start + PAGE * kv_row_bytes(&a.cache));

            for (int i = 0; i < PAGE; i++) scales[i] = (1 + uniform()) / 127;
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
    const char *plane =
        (const char *)a->cache.pages +
        (size_t)a->table[lane * PAGES + position % RING / PAGE] * a->cache.page_bytes +
        (size_t)((LAYER * 2 + value) * a->kv_heads + head) * kv_plane_bytes(&a->cache);
    int row = position % PAGE, at = row * a->dim + d;

    if (a->cache.dtype == MOSHI_INT8)
        return ((const float *)(const void *)(plane + PAGE * a->dim))[row] *
               (double)((const int8_t *)plane)[at];
    return a->cache.dtype == MOSHI_BF16 ? bf16_to_f32(((const uint16_t *)(const void *)plane)[at])
                                        : ((const float *)(const void *)plane)[at];
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

/* The row as its codes stand for it. */
static void naive_coded_row(double *row, int dim)
{
    float *values = take((size_t)dim * sizeof *values), scale;
    int8_t *codes = take((size_t)dim);

    for (int d = 0; d < dim; d++) values[d] = (float)row[d];
    scale = int8_row(values, dim, codes);
    for (int d = 0; d < dim; d++) row[d] = scale * (double)codes[d];
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
            if (s->kv == MOSHI_INT8) {
                naive_coded_row(k[p], a->dim);
                naive_coded_row(v[p], a->dim);
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
        run_rope(backend, &(struct op_rope){.name = "rope",
                                            .rows = now,
                                            .steps = steps,
                                            .head_dim = a.dim,
                                            .max_period = 10000,
                                            .position = a.position,
                                            .cos_sin = cos_sin + at * (size_t)a.dim});
        if (s->variant & 2)
            run_linear(backend, &(struct op_linear){.name = "q",
                                                    .n = now.n * steps,
                                                    .x = x + at * WIDTH,
                                                    .norm = a.norm,
                                                    .weight = a.weight,
                                                    .y = q + at * a.queries});
        else
            run_qkv(backend, &(struct op_qkv){
                                 .name = "qkv",
                                 .rows = now,
                                 .steps = steps,
                                 .heads = a.heads,
                                 .layer = LAYER,
                                 .x = x + at * WIDTH,
                                 .norm = a.norm,
                                 .weight = a.weight,
                                 .cos_sin = s->variant & 1 ? NULL : cos_sin + at * (size_t)a.dim,
                                 .position = a.position,
                                 .cache = &a.cache,
                                 .q = q + at * a.queries});
        run_attend(backend, &(struct op_attend){.name = "attend",
                                                .rows = now,
                                                .steps = steps,
                                                .heads = a.heads,
                                                .layer = LAYER,
                                                .causal = !(s->variant & 2),
                                                .context = CONTEXT,
                                                .capacity = CAPACITY,
                                                .position = a.position,
                                                .key_count = a.key_count,
                                                .cache = &a.cache,
                                                .q = q + at * a.queries,
                                                .y = y + at * a.queries});
        run_advance(backend,
                    &(struct op_advance){
                        .name = "advance", .rows = now, .steps = steps, .position = a.position});
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
        run_rope(backend, &(struct op_rope){.name = "rope",
                                            .rows = now,
                                            .steps = s->steps,
                                            .head_dim = s->in,
                                            .max_period = 100000,
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
    struct conv conv = {.in = s->in,
                        .out = s->out,
                        .kernel = kernel,
                        .stride = stride,
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
    float *rs = take((size_t)s->n * chunk * sizeof *rs),
          *y = take((size_t)s->n * chunk * sizeof *y);
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
                 &(struct op_conv){.name = "conv",
                                   .rows = now,
                                   .steps = s->steps,
                                   .conv = &conv,
                                   .elu = elu,
                                   .x = xs + first_row(s) * in_chunk,
                                   .residual = s->variant & 2 ? rs + first_row(s) * chunk : NULL,
                                   .history = history,
                                   .first = first,
                                   .work = work,
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

                tap[k] = at >= 0          ? signal[at * s->in + k % s->in]
                         : conv.replicate ? signal[k % s->in]
                                          : 0;
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
    struct conv conv = {.in = s->in,
                        .out = out,
                        .kernel = kernel,
                        .stride = stride,
                        .depthwise = depthwise != 0,
                        .depthwise_weight = thin,
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
        conv.weight = matrix_of(s->format, (int)rows_w, (int)cols, dense);
        for (int c = 0; c < s->in; c++) /* the naive side reads the rounded weights */
            for (int d = 0; d < out; d++)
                for (int k = 0; k < kernel; k++)
                    weight[(c * out + d) * kernel + k] =
                        (float)weight_at(&conv.weight, (size_t)(k % stride * out + d) * cols +
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
        run_conv_transposed(backend, &(struct op_conv_transposed){.name = "transposed",
                                                                  .rows = now,
                                                                  .steps = s->steps,
                                                                  .conv = &conv,
                                                                  .elu = s->variant & 1,
                                                                  .x = xs + first_row(s) * in_chunk,
                                                                  .history = history,
                                                                  .work = work,
                                                                  .y = y + first_row(s) * chunk});
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
            o->y[(size_t)i * o->width + j] = (float)(sum[j] +
                                                     (conv.bias ? conv.bias[j % (size_t)out] : 0));
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
    struct rvq rvq = {.levels = s->levels,
                      .bins = BINS,
                      .dim = s->out,
                      .in_proj = take_matrix(s->format, s->out, s->in),
                      .out_proj = take_matrix(s->format, s->in, s->out)};

    for (size_t d = 0; d < dim; d++)
        entries[1 * dim + d] = entries[70 * dim + d] = entries[130 * dim + d] = 0;
    for (size_t e = 0; e < (size_t)s->levels * BINS; e++)
        for (size_t d = 0; d < dim; d++)
            half[e] += 0.5f * entries[e * dim + d] * entries[e * dim + d];
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
        run_rvq_encode(backend, &(struct op_rvq_encode){.name = "encode",
                                                        .n = s->only < 0 ? s->n : 1,
                                                        .levels = s->levels,
                                                        .code_stride = stride,
                                                        .rvq = &rvq,
                                                        .x = x + first_row(s) * in,
                                                        .codes = codes + (int)first_row(s) * stride,
                                                        .work = work});
    for (int i = 0; i < s->n * s->levels && backend; i++)
        o->y[i] = (float)codes[i / s->levels * stride + i % s->levels];
    for (int i = 0; i < s->n && !backend; i++) {
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
            o->y[i * s->levels + level] = (float)best;
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
        run_rvq_decode(backend, &(struct op_rvq_decode){.name = "decode",
                                                        .n = s->only < 0 ? s->n : 1,
                                                        .levels = s->levels,
                                                        .code_stride = stride,
                                                        .accumulate = s->variant,
                                                        .rvq = &rvq,
                                                        .codes = codes + (int)first_row(s) * stride,
                                                        .work = work,
                                                        .y = y + first_row(s) * in});
    for (int i = 0; i < s->n && !backend; i++) {
        double *sum = take(dim * sizeof *sum);

        for (int level = 0; level < s->levels; level++) {
            int code = codes[i * stride + level] < rvq.bins ? codes[i * stride + level] : 0;

            for (size_t d = 0; d < dim; d++)
                sum[d] += rvq.codebooks[(size_t)(level * rvq.bins + code) * dim + d];
        }
        for (int r = 0; r < s->in; r++)
            y[(size_t)i * in + (size_t)r] = (float)(naive_dot(&rvq.out_proj, r, sum) +
                                                    (s->variant ? y[(size_t)i * in + (size_t)r]
                                                                : 0));
    }
    memcpy(o->y, y, (size_t)s->n * in * sizeof *y);
}

/* ---- comparison ------------------------------------------------------------------------- */

/* Each instruction set with one, two and three threads; the first one is generic. */

static void start_case(uint64_t seed)
{
    arena_used = 0;
    n_prepared = 0;
    random_state = seed * 0x9e3779b97f4a7c15u + 1;
}

static void end_case(void)
{
    for (int i = 0; i < n_prepared; i++)
        prepared[i].backend->ops->release_matrix(prepared[i].backend, &prepared[i].matrix);
    n_prepared = 0;
}

static struct outcome run_case(case_function *function, const struct shape *shape,
                               struct backend *backend)
{
    struct outcome o;

    start_case((uint64_t)(shape->in * 31 + shape->out * 7 + shape->n));
    function(shape, backend, &o);
    end_case();
    return o;
}

/* NaN counts as infinitely far. */
static double distance(const struct outcome *a, const struct outcome *b)
{
    double worst = 0;

    for (int i = 0; i < b->n; i++) {
        const float *x = a->y + (size_t)i * a->width, *y = b->y + (size_t)i * b->width;
        double rms = 0;

        for (size_t d = 0; d < b->width; d++) rms += (double)y[d] * y[d] / (double)b->width;
        rms = sqrt(rms);
        for (size_t d = 0; d < b->width; d++) {
            double error = fabs((double)x[d] - y[d]) / (rms + fabs((double)y[d]) + 1e-30);

            if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
        }
    }
    return worst;
}

static int same_row(const struct outcome *a, const struct outcome *b, int i)
{
    return memcmp(a->y + (size_t)i * a->width, b->y + (size_t)i * a->width,
                  a->width * sizeof *a->y) == 0;
}

static int same_state(const char *a, const char *b, const struct outcome *o, int lane)
{
    return memcmp(a + (size_t)lane * o->lane_bytes, b + (size_t)lane * o->lane_bytes,
                  o->lane_bytes) == 0;
}

static int same_outcome(const struct outcome *a, const struct outcome *b)
{
    for (int i = 0; i < a->n; i++)
        if (!same_row(a, b, i)) return 0;
    return memcmp(a->state, b->state, (size_t)a->lanes * a->lane_bytes) == 0;
}

/* Row i alone: its bits, its lane's, and nobody else's. */
static int row_alone(case_function *function, struct shape shape, struct backend *backend,
                     const struct outcome *all, int i)
{
    struct outcome one;
    int good, lane;

    shape.only = i;
    one = run_case(function, &shape, backend);
    start_case(1);
    lane = take_rows(&shape).lane[i];
    good = same_row(&one, all, i) && same_state(one.state, all->state, &one, lane);
    for (int l = 0; l < one.lanes; l++)
        if (l != lane) good &= same_state(one.state, one.before, &one, l);
    free_outcome(&one);
    return good;
}

static int rows_masked(case_function *function, struct shape shape, struct backend *backend,
                       const struct outcome *all)
{
    struct outcome o;
    struct rows rows;
    int good = 1;

    shape.masked = 1;
    o = run_case(function, &shape, backend);
    start_case(1);
    rows = take_rows(&shape);
    for (int i = 0; i < shape.n; i++) {
        if (rows.active[i])
            good &= same_row(&o, all, i) && same_state(o.state, all->state, &o, rows.lane[i]);
        else
            good &= same_state(o.state, o.before, &o, rows.lane[i]);
    }
    free_outcome(&o);
    return good;
}

struct tally {
    double naive, isa;
    int bits, alone, masked, cases;
    int bf16; /* products with weights in it */
};

static int every = 1;

static void check_shape(case_function *function, struct shape shape, struct tally *tally)
{
    static int turn;
    struct outcome naive, all[COUNT(backends)];
    int has_lanes = function == case_embed || function == case_attend || function == case_conv ||
                    function == case_transposed;

    if (turn++ % every) return;
    shape.only = -1;
    naive = run_case(function, &shape, NULL);
    for (int b = 0; b < n_backends; b++) {
        all[b] = run_case(function, &shape, backends[b]);
        if (b == 0) tally->naive = fmax(tally->naive, distance(&all[0], &naive));
        if (b % 3 && !cuda)
            tally->bits &= same_outcome(&all[b], &all[b - b % 3]);
        else
            tally->isa = fmax(tally->isa, distance(&all[b], &all[0]));
        for (int i = 0; i < shape.n && b % 3 != 2; i += shape.n > 4 ? shape.n / 4 : 1)
            tally->alone &= row_alone(function, shape, backends[b], &all[b], i);
        if (has_lanes && shape.n > 1 && b % 3 != 2)
            tally->masked &= rows_masked(function, shape, backends[b], &all[b]);
    }
    tally->cases++;
    tally->bf16 |= (shape.format == WEIGHT_BF16 || shape.format == WEIGHT_FP8) &&
                   shape.packed < 2 && function != case_embed;
    free_outcome(&naive);
    for (int b = 0; b < n_backends; b++) free_outcome(&all[b]);
}

static void report(const char *operation, const char *detail, const struct tally *tally)
{
    const struct bound *bound = bounds;

    while (strcmp(bound->operation, operation) != 0) bound++;
    double isa = cuda ? bound->naive : bound->isa; /* a card has functions of its own */

    if (cuda && tally->bf16) isa = fmax(isa, card_bf16);

    verdict(tally->naive <= bound->naive && tally->isa <= isa,
            "%s %s is right (%d shapes; generic %.2g of %.2g, other kernels %.2g of %.2g)",
            operation, detail, tally->cases, tally->naive, bound->naive, tally->isa, isa);
    verdict(tally->bits && tally->alone,
            "%s %s has the same bits in any batch and with any threads", operation, detail);
    verdict(tally->masked, "%s %s leaves inactive rows alone", operation, detail);
}

static const int row_counts[] = {1, 3, 4, 17, 53};
static const int sizes[][2] = {{1, 1}, {7, 5}, {31, 33}, {64, 16}, {130, 100}, {600, 70}};

static int row_count_end(int fewer)
{
    return cuda ? 3 : COUNT(row_counts) - fewer;
}

/* Row counts of products: on a card up to a tile of 64, with two sizes where there are many. */
static int product_rows(int i)
{
    return cuda && i == COUNT(row_counts) - 1 ? 64 : row_counts[i];
}

static int left_out(int i, int size)
{
    return cuda && product_rows(i) > 4 && size != 2 && size != 4;
}

/* All row counts and sizes; every variant in turn. */
static void check_products(const char *operation, case_function *function, int variants, int levels)
{
    int is_codec = function == case_rvq_encode || function == case_rvq_decode;
    /* int8: rows with activations in f32 */
    int last = function == case_embed ? WEIGHT_BF16 : WEIGHT_INT8;

    for (int format = 0; format <= last; format++) {
        if (is_codec && format == WEIGHT_FP8) continue; /* the codec has none */
        for (int packed = 0; packed < 2 - cuda; packed++) /* a card has no panels of floats */ {
            struct tally tally = {.bits = 1, .alone = 1, .masked = 1};
            char detail[32];
            int turn = 0;

            for (int i = 0; i < COUNT(row_counts); i++) {
                for (int j = 0; j < COUNT(sizes); j++) {
                    int variant = turn++ % variants;

                    if (left_out(i, j)) continue;
                    /* A residual of one number soon is as small as its rounding: near ties. */
                    if (function == case_rvq_encode && sizes[j][1] == 1) continue;
                    check_shape(function,
                                (struct shape){.operation = operation,
                                               .n = product_rows(i),
                                               .in = sizes[j][0],
                                               .out = sizes[j][1],
                                               .levels = levels,
                                               .packed = packed,
                                               .format = (enum weight_format)format,
                                               .variant = variant},
                                &tally);
                }
            }
            snprintf(detail, sizeof detail, "%s%s", weight_format_name((enum weight_format)format),
                     packed ? " packed" : "");
            report(operation, detail, &tally);
        }
    }
}

/* More rows than a card reads the weights once for: tiles with room left and full ones, fewer chunks of
 * columns than warps and more, and columns that leave rows unaligned. */
static void check_many_rows(void)
{
    static const int shapes[][3] = {{65, 72, 40}, {130, 600, 75}, {129, 1096, 9}, {100, 33, 35}};
    static const enum weight_format formats[] = {WEIGHT_BF16, WEIGHT_INT8, WEIGHT_Q8, WEIGHT_Q4};

    for (int f = 0; f < COUNT(formats); f++) {
        struct tally tally = {.bits = 1, .alone = 1, .masked = 1};
        char detail[32];

        for (int i = 0; i < COUNT(shapes); i++) {
            struct shape shape = {.operation = "linear",
                                  .n = shapes[i][0],
                                  .in = shapes[i][1],
                                  .out = shapes[i][2],
                                  .packed = f ? (int)formats[f] : 0,
                                  .format = WEIGHT_BF16};

            if (f && i % 2 == f % 2) continue;
            shape.variant = (5 * i + f) % 12;
            check_shape(case_linear, shape, &tally);
            shape.variant = i % 2;
            check_shape(case_residual, shape, &tally);
            shape.variant = i % 3;
            check_shape(case_gated, shape, &tally);
            shape.variant = 0;
            check_shape(case_many, shape, &tally);
        }
        snprintf(detail, sizeof detail, "many rows, %s", weight_format_name(formats[f]));
        report(f ? "near_codes" : "linear", detail, &tally);
    }
    for (int format = 0; format < 4; format++) { /* callers enough for large tiles of the codec */
        static const int convs[][2] = {{1, 64}, {3, 9}};
        struct tally tally = {.bits = 1, .alone = 1, .masked = 1};

        for (int i = 0; i < COUNT(convs); i++)
            check_shape(case_conv,
                        (struct shape){.operation = "conv",
                                       .n = 15,
                                       .in = convs[i][0],
                                       .out = convs[i][1],
                                       .levels = 701,
                                       .steps = 40,
                                       .calls = 2,
                                       .variant = 1 + i,
                                       .format = (enum weight_format)format},
                        &tally);
        report("conv", "of many rows", &tally);
    }
    for (int kv = 0; kv < 3; kv++) {
        static const enum moshi_dtype dtypes[] = {MOSHI_F32, MOSHI_BF16, MOSHI_INT8};
        struct tally tally = {.bits = 1, .alone = 1, .masked = 1};

        for (int many = 0; many < 2; many++) /* rows, or steps: those are attended together */
            check_shape(case_attend,
                        (struct shape){.operation = "attend",
                                       .n = many ? 6 : 22,
                                       .steps = many ? 11 : 3,
                                       .calls = 2,
                                       .in = 8,
                                       .out = 4,
                                       .format = WEIGHT_BF16,
                                       .kv = dtypes[kv]},
                        &tally);
        report(kv == 2 ? "attend_int8" : "attend_bf16", "of many rows", &tally);
    }
}

/* Block formats. variant 0 and 3 of a linear have neither a norm nor a function: every instruction
 * set gives the same bits. */
static void check_block_products(void)
{
    for (int block = WEIGHT_INT8; block <= WEIGHT_Q4; block++) {
        struct tally exact = {.bits = 1, .alone = 1, .masked = 1}, near = exact;
        const char *name = weight_format_name((enum weight_format)block);
        int turn = 0;

        for (int i = 0; i < COUNT(row_counts); i++) {
            for (int j = 0; j < COUNT(sizes); j++, turn++) {
                if (left_out(i, j)) continue;
                struct shape shape = {.operation = "codes",
                                      .n = product_rows(i),
                                      .in = sizes[j][0],
                                      .out = sizes[j][1],
                                      .packed = block,
                                      .format = (enum weight_format)(turn % 3),
                                      .variant = 3 * (turn % 2)};

                check_shape(case_linear, shape, &exact);
                shape.variant = turn % 12;
                check_shape(case_linear, shape, &near);
                shape.variant = turn % 2;
                check_shape(case_residual, shape, &near);
                shape.variant = turn % 3;
                check_shape(case_gated, shape, &near);
                shape.variant = 0;
                check_shape(case_many, shape, &exact);
            }
        }
        report("codes", name, &exact);
        report("near_codes", name, &near);
    }
}

static void check_rows(const char *operation, case_function *function, int variants, int steps)
{
    struct tally tally = {.bits = 1, .alone = 1, .masked = 1};

    for (int i = 0; i < row_count_end(0); i++)
        for (int j = 0; j < COUNT(sizes); j++)
            for (int v = 0; v < variants; v++)
                check_shape(function,
                            (struct shape){.operation = operation,
                                           .n = row_counts[i],
                                           .steps = steps,
                                           .in = sizes[j][0],
                                           .variant = v},
                            &tally);
    report(operation, "f32", &tally);
}

static void check_attention(void)
{
    static const int heads[][3] = {{2, 2, 1}, {8, 4, 2}, {64, 2, 1}, {40, 2, 3}, {22, 6, 1}};

    static const struct {
        const char *operation;
        enum moshi_dtype dtype;
    } kvs[] = {{"attend", MOSHI_F32}, {"attend_bf16", MOSHI_BF16}, {"attend_int8", MOSHI_INT8}};

    for (int kv = 0; kv < COUNT(kvs); kv++) {
        struct tally tally = {.bits = 1, .alone = 1, .masked = 1};

        for (int i = 0; i < row_count_end(1); i++)
            for (int j = 0; j < COUNT(heads); j++)
                for (int variant = 0; variant < 8; variant++)
                    if ((variant & 3) != 3 && (!cuda || (i + j + variant) % 6 == 0))
                        check_shape(case_attend,
                                    (struct shape){.operation = "attend",
                                                   .n = row_counts[i],
                                                   .in = heads[j][0],
                                                   .out = heads[j][1],
                                                   .steps = heads[j][2],
                                                   .calls = 9,
                                                   .format = (enum weight_format)(j % 3),
                                                   .packed = variant % 2,
                                                   .kv = kvs[kv].dtype,
                                                   .variant = variant},
                                    &tally);
        report(kvs[kv].operation, moshi_dtype_name(kvs[kv].dtype), &tally);
    }
}

static void check_codec(void)
{
    /* in, out, kernel * 100 + stride, steps */
    static const int convs[][4] = {{1, 64, 701, 40}, {8, 5, 301, 7},   {6, 16, 804, 8},
                                   {5, 7, 402, 2},   {33, 17, 101, 3}, {64, 1, 301, 30},
                                   {16, 40, 1608, 8}};
    static const int transposed[][4] = {{8, 5, 4, 3}, {17, 33, 2, 2}, {40, 16, 8, 1}};

    for (int packed = 0; packed < 2 - cuda; packed++) /* a card has no panels of floats */ {
        for (int format = 0; format <= WEIGHT_INT8; format++) {
            if (format == WEIGHT_FP8) continue; /* the codec has none */
            struct tally conv = {.bits = 1, .alone = 1, .masked = 1}, back = conv;
            char detail[32];

            for (int i = 0; i < row_count_end(1); i++) {
                for (int j = 0; j < COUNT(convs); j++)
                    for (int variant = (i + j) % 3; variant < 16; variant += 3)
                        check_shape(case_conv,
                                    (struct shape){.operation = "conv",
                                                   .n = row_counts[i],
                                                   .in = convs[j][0],
                                                   .out = convs[j][1],
                                                   .levels = convs[j][2],
                                                   .steps = convs[j][3],
                                                   .calls = 3,
                                                   .variant = variant,
                                                   .packed = packed,
                                                   .format = (enum weight_format)format},
                                    &conv);
                for (int j = 0; j < COUNT(transposed); j++)
                    for (int variant = 0; variant < 16; variant++)
                        if (!(variant & 4))
                            check_shape(case_transposed,
                                        (struct shape){.operation = "transposed",
                                                       .n = row_counts[i],
                                                       .in = transposed[j][0],
                                                       .out = transposed[j][1],
                                                       .levels = transposed[j][2],
                                                       .steps = transposed[j][3],
                                                       .calls = 3,
                                                       .variant = variant,
                                                       .packed = packed,
                                                       .format = (enum weight_format)format},
                                        &back);
            }
            snprintf(detail, sizeof detail, "%s%s", weight_format_name((enum weight_format)format),
                     packed ? " packed" : "");
            report("conv", detail, &conv);
            report("transposed", detail, &back);
        }
    }
    check_products("rvq_encode", case_rvq_encode, 1, 3);
    check_products("rvq_decode", case_rvq_decode, 2, 3);
}

/* Spans of columns, strips of outputs and chunks of rows beside each other. */
static void check_long_products(void)
{
    struct tally tally = {.bits = 1, .alone = 1, .masked = 1};

    for (int i = 0; i < 3; i++)
        check_shape(case_linear,
                    (struct shape){.operation = "linear",
                                   .n = 40 + 61 * i,
                                   .in = 1000 + 60 * i * i,
                                   .out = 270,
                                   .format = WEIGHT_BF16,
                                   .variant = i},
                    &tally);
    report("linear", "bf16, long", &tally);
}

/* ---- sampling --------------------------------------------------------------------------- */

static void naive_philox(uint32_t c[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t left = (uint64_t)c[0] * 0xd2511f53u, right = (uint64_t)c[2] * 0xcd9e8d57u;
        uint32_t next[4] = {(uint32_t)(right >> 32) ^ c[1] ^ k0, (uint32_t)right,
                            (uint32_t)(left >> 32) ^ c[3] ^ k1, (uint32_t)left};

        memcpy(c, next, sizeof next);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
}

/* The vectors published with Random123 (kat_vectors, philox4x32 10). */
static void test_philox_gives_the_published_words(void)
{
    static const uint32_t vectors[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1}};
    int good = 1;

    for (int i = 0; i < 3; i++) {
        uint32_t c[4];

        memcpy(c, vectors[i], sizeof c);
        naive_philox(c, vectors[i][4], vectors[i][5]);
        good &= memcmp(c, vectors[i] + 6, sizeof c) == 0;
    }
    verdict(good, "philox gives the published words");
}

struct candidate {
    float logit;
    int id;
};

static int by_logit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;

    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->id - y->id;
}

static int naive_sample(const float *logits, int card, int top_k, double temperature,
                        const uint32_t *seed, int32_t frame, int stream)
{
    struct candidate *sorted = take((size_t)card * sizeof *sorted);
    int best = -1, k = top_k > 0 && top_k < card ? top_k : card;
    double most = -INFINITY;

    for (int i = 0; i < card; i++) sorted[i] = (struct candidate){logits[i], i};
    qsort(sorted, (size_t)card, sizeof *sorted, by_logit);
    if (temperature <= 0) return sorted[0].id;
    for (int i = 0; i < k; i++) {
        uint32_t c[4] = {(uint32_t)frame, (uint32_t)stream, (uint32_t)sorted[i].id, 0};
        double u, score;

        naive_philox(c, seed[0], seed[1]);
        u = ((c[0] >> 8) + 0.5) * 0x1p-24;
        score = sorted[i].logit / temperature - log(-log(u));
        if (score > most) most = score, best = sorted[i].id;
    }
    return best;
}

/* Rows n..2n-1 are the null halves of some. Logits are coarse, so that there are ties. */
static void test_sample_draws_as_defined(struct backend *backend)
{
    static const int cards[] = {1, 2, 37, 2048, 32000};
    int good = 1, in_place = 1;

    for (int trial = 0; trial < 60; trial++) {
        enum { N = 6 };
        int card = cards[trial % COUNT(cards)], stream = trial % 4;
        struct slot_params *params;
        struct rows rows;
        int32_t *null_row, *token, *offset;
        float *logits, *expected;
        struct op_sample op;

        start_case((uint64_t)trial + 77);
        rows = take_rows(&(struct shape){.n = N, .masked = trial % 2});
        null_row = take(N * sizeof *null_row);
        token = take(4 * N * sizeof *token);
        params = take(lanes_of(N) * sizeof *params);
        offset = take(lanes_of(N) * sizeof *offset);
        logits = take_random((size_t)(2 * N * card), 6);
        for (int i = 0; i < 2 * N * card && trial % 3; i++) logits[i] = rintf(logits[i] * 4) / 4;
        for (int l = 0; l < lanes_of(N); l++) {
            params[l].seed[0] = random_bits();
            params[l].seed[1] = random_bits();
            params[l].temperature[0] = params[l].temperature[1] = (float)(l % 4) * 0.4f;
            params[l].top_k[0] = params[l].top_k[1] = random_below(2) ? 0
                                                                      : 1 + random_below(card + 3);
            params[l].cfg_coef = 1.5f;
            params[l].cfg_no_text = l % 2;
            params[l].pad_bias = uniform();
            params[l].forced_text = random_below(8) ? TOKEN_FREE : TOKEN_ZERO;
            for (int k = 0; k < 4; k++)
                params[l].forced_audio[k] = random_below(8) ? TOKEN_FREE : 1;
            offset[l] = random_below(1000000);
        }
        for (int i = 0; i < N; i++) null_row[i] = i % 2 ? N + i : -1;
        expected = take((size_t)(2 * N * card) * sizeof *expected);
        memcpy(expected, logits, (size_t)(2 * N * card) * sizeof *logits);
        poison(token, 4 * N * sizeof *token);
        op = (struct op_sample){.name = "sample",
                                .rows = rows,
                                .stream = stream,
                                .card = card,
                                .padding_id = card / 2,
                                .logits = logits,
                                .null_row = null_row,
                                .params = params,
                                .offset = offset,
                                .token = token,
                                .token_stride = 2};
        run_sample(backend, &op);
        for (int i = 0; i < N; i++) {
            int slot = rows.lane[i], side = stream > 0;
            float *row = expected + (size_t)(i * card);
            const float *null_logits = row + (size_t)(N * card);
            int32_t forced = side ? params[slot].forced_audio[stream - 1]
                                  : params[slot].forced_text;
            int32_t want;

            if (!rows.active[i]) {
                in_place &= memcmp(row, logits + i * card, (size_t)card * 4) == 0;
                continue;
            }
            for (int id = 0; id < card && i % 2 && (side || !params[slot].cfg_no_text); id++)
                row[id] = null_logits[id] + (row[id] - null_logits[id]) * 1.5f;
            if (!side) row[card / 2] += params[slot].pad_bias;
            in_place &= memcmp(row, logits + i * card, (size_t)card * 4) == 0;
            want = naive_sample(row, card, params[slot].top_k[side], params[slot].temperature[side],
                                params[slot].seed, offset[slot], stream);
            good &= token[2 * i] == (forced == TOKEN_FREE ? want : forced);
            good &= null_row[i] < 0 || token[2 * null_row[i]] == token[2 * i];
        }
    }
    verdict(good && in_place, "sample draws as defined (%s, %d threads)", backend->isa,
            backend->threads);
}

static void test_sample_follows_the_softmax(struct backend *backend)
{
    enum { CARD = 8, DRAWS = 40000 };
    float logits[CARD], original[CARD];
    struct slot_params params = {.temperature = {0.7f, 0.7f}, .forced_text = TOKEN_FREE};
    int32_t lane = 0, null_row = -1, offset, token;
    uint8_t active = 1;
    int counts[CARD] = {0};
    double total = 0, chi = 0;

    start_case(5);
    for (int i = 0; i < CARD; i++) total += exp((original[i] = uniform()) / 0.7);
    for (offset = 0; offset < DRAWS; offset++) {
        memcpy(logits, original, sizeof logits);
        run_sample(backend, &(struct op_sample){.name = "sample",
                                                .rows = {1, &lane, &active},
                                                .card = CARD,
                                                .padding_id = 3,
                                                .logits = logits,
                                                .null_row = &null_row,
                                                .params = &params,
                                                .offset = &offset,
                                                .token = &token,
                                                .token_stride = 1});
        counts[token]++;
    }
    for (int i = 0; i < CARD; i++) {
        double expected = DRAWS * exp(original[i] / 0.7) / total;

        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    verdict(chi < 24.3, "sample follows the softmax (chi-square %.1f, 7 degrees)", chi);
}

static void stage_bad_logits(struct backend *backend, void *arg)
{
    backend->ops->sample(backend, arg);
}

static void test_bad_logits_are_an_error(struct backend *backend)
{
    struct row {
        float logits[3];
        struct slot_params params;
        int32_t lane, null_row, offset, token;
        uint8_t active;
    } *row = take(sizeof *row);
    struct op_sample op = {.name = "sample",
                           .rows = {1, &row->lane, &row->active},
                           .stream = 0,
                           .card = 3,
                           .logits = row->logits,
                           .null_row = &row->null_row,
                           .params = &row->params,
                           .offset = &row->offset,
                           .token = &row->token,
                           .token_stride = 1};

    *row = (struct row){
        .logits = {1, NAN, 2}, .params = {.forced_text = TOKEN_FREE}, .null_row = -1, .active = 1};
    int status = run_stage(backend, stage_bad_logits, &op);
    int named = strstr(moshi_error_detail(), "stream 0") != NULL, stored = row->token;

    row->logits[1] = 0;
    verdict(status == MOSHI_ERROR_INTERNAL && named && stored == 0 &&
                run_stage(backend, stage_bad_logits, &op) == MOSHI_OK && row->token == 2,
            "logits that are not finite are an error, and the next run is fine");
}

/* ---- delays ----------------------------------------------------------------------------- */

/* model.md 5.2 as it stands, one slot. */
struct slow_slot {
    int32_t cache[8][16];
    int offset;
};

static void check_delays(struct backend *backend, const int32_t *delays, int streams, int dep_q)
{
    enum { N = 3, LANES = 5, FRAMES = 40 };
    int users = streams - 1 - dep_q, max_delay = 0, columns, good = 1;
    struct slow_slot slots[LANES];
    struct delay_cache cache = {.streams = streams,
                                .dep_q = dep_q,
                                .initial_text = 1000,
                                .initial_audio = 2000,
                                .delays = delays};
    struct slot_params *params;
    int32_t *lane, *null_row, *flat, *given, *shaken, *text, *known;
    uint8_t *active;

    start_case((uint64_t)streams);
    lane = take(N * sizeof *lane);
    null_row = take(N * sizeof *null_row);
    text = take(N * sizeof *text);
    active = take(N);
    flat = take(64 * sizeof *flat);
    given = take(64 * sizeof *given);
    shaken = take(64 * sizeof *shaken);
    known = take((size_t)streams * sizeof *known);
    memcpy(lane, (const int32_t[N]){4, 0, 2}, N * sizeof *lane);
    memcpy(null_row, (const int32_t[N]){3, -1, 4}, N * sizeof *null_row);
    memcpy(known, delays, (size_t)streams * sizeof *known);
    cache.delays = known;
    for (int s = 0; s < streams; s++) max_delay = delays[s] > max_delay ? delays[s] : max_delay;
    columns = max_delay + 2;
    cache.max_delay = max_delay;
    cache.columns = columns;
    cache.tokens = take((size_t)(LANES * streams * columns) * sizeof *cache.tokens);
    cache.offset = take(LANES * sizeof *cache.offset);
    params = take(LANES * sizeof *params);
    for (int l = 0; l < LANES; l++) {
        slots[l].offset = 0;
        params[l].cfg_masked_until = l == 4 ? 5 : -1;
        params[l].cfg_no_text = l == 2;
    }
    for (int frame = 0; frame < FRAMES; frame++) {
        int32_t user[N][8], audio[N][8], tokens[5][8], out[N][8];
        struct rows rows = {N, lane, active};

        for (int i = 0; i < N; i++) {
            active[i] = random_below(4) > 0;
            text[i] = random_below(900);
            for (int j = 0; j < 8; j++)
                user[i][j] = random_below(900), audio[i][j] = random_below(900);
            for (int j = 0; j < users; j++) {
                int is_given = frame % 2 && random_below(2);

                flat[i * users + j] = is_given ? -1 : user[i][j];
                given[i * users + j] = is_given ? user[i][j] : TOKEN_FREE;
            }
        }
        poison(shaken, 64 * sizeof *shaken);
        run_delay_input(backend, &(struct op_delay_input){.name = "delay",
                                                          .rows = rows,
                                                          .cache = &cache,
                                                          .params = params,
                                                          .user = flat,
                                                          .given = frame % 2 ? given : NULL,
                                                          .null_row = null_row,
                                                          .tokens = shaken});
        for (int i = 0; i < 5; i++)
            for (int s = 0; s < streams; s++) tokens[i][s] = shaken[i * streams + s];
        for (int i = 0; i < N; i++)
            for (int j = 0; j < dep_q; j++) flat[i * dep_q + j] = audio[i][j];
        poison(shaken, 64 * sizeof *shaken);
        run_delay_output(backend, &(struct op_delay_output){.name = "delay",
                                                            .rows = rows,
                                                            .cache = &cache,
                                                            .text = text,
                                                            .audio = flat,
                                                            .out = shaken});
        for (int i = 0; i < N; i++)
            for (int s = 0; s <= dep_q; s++) out[i][s] = shaken[i * (1 + dep_q) + s];
        for (int i = 0; i < N; i++) {
            struct slow_slot *slot = &slots[lane[i]];
            int o = slot->offset;

            for (int s = 0; s < streams; s++) {
                int initial = !active[i] || o <= delays[s];
                int32_t want = s == 0 ? 1000 : 2000, null_want;

                if (active[i] && s > dep_q)
                    slot->cache[s][(o + delays[s]) % columns] = user[i][s - 1 - dep_q];
                if (!initial) want = slot->cache[s][o % columns];
                good &= tokens[i][s] == want;
                if (null_row[i] < 0) continue;
                null_want = want;
                if (lane[i] == 4 && !initial && o <= delays[s] + 5) null_want = TOKEN_ZERO;
                if (lane[i] == 2 && !initial && s == 0) null_want = TOKEN_ZERO;
                good &= tokens[null_row[i]][s] == null_want;
            }
            if (active[i]) {
                o = ++slot->offset;
                slot->cache[0][o % columns] = text[i];
                for (int k = 0; k < dep_q; k++) slot->cache[1 + k][o % columns] = audio[i][k];
            }
            for (int s = 0; s <= dep_q; s++)
                good &= out[i][s] == (active[i] && o > max_delay
                                          ? slot->cache[s][(o - max_delay + delays[s]) % columns]
                                          : TOKEN_NONE);
        }
    }
    verdict(good, "the delay cache follows the pseudo-code (%d streams, largest delay %d)", streams,
            max_delay);
}

/* ---- formats, threads, failures --------------------------------------------------------- */

static void test_half_floats_convert_exactly(void)
{
    int good = 1;

    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h);
        int exponent = h >> 10 & 31;
        double want = exponent ? ldexp(1 + (h & 1023) / 1024.0, exponent - 15)
                               : ldexp((h & 1023) / 1024.0, -14);

        if (exponent == 31)
            good &= h & 1023 ? isnan(f) : isinf(f);
        else
            good &= f == (float)(h & 0x8000 ? -want : want);
        if (exponent == 31 && (h & 1023))
            good &= isnan(f16_to_f32(f32_to_f16(f)));
        else
            good &= f32_to_f16(f) == h;
        /* Half way between two neighbours: the even one; a little more or less: the nearer one. */
        if (exponent < 30) {
            float next = f16_to_f32((uint16_t)(h + 1)), middle = f + (next - f) / 2;

            good &= f32_to_f16(middle) == (h & 1 ? h + 1 : h);
            good &= f32_to_f16(nextafterf(middle, next)) == h + 1;
            good &= f32_to_f16(nextafterf(middle, f)) == h;
        }
    }
    good &= f32_to_f16(65519.9f) == 0x7bff && f32_to_f16(65520) == 0x7c00 &&
            f32_to_f16(-1e30f) == 0xfc00;
    verdict(good, "half floats convert exactly, both ways");
}

/* Such a scale has a few bits at most: 190 units over 127 is 1 unit, and a code would be 190. */
static void test_rows_below_the_normal_range_have_codes(void)
{
    const float values[4] = {190 * 0x1p-149f, -190 * 0x1p-149f, 0x1p-149f, 0};
    int8_t codes[4];
    float scale = int8_row(values, 4, codes);

    verdict(scale == 0x1p-149f && codes[0] == 127 && codes[1] == -127 && codes[2] == 1 &&
                codes[3] == 0,
            "rows below the normal range have codes");
}

/* Every weight is near scale * code, what lies beyond the last row and column is 0. */
static void test_block_formats_hold_what_they_are_given(void)
{
    enum { ROWS = 37, COLS = 150 };
    static const double bits[] = {8, 8.5, 4.5};

    for (int format = WEIGHT_INT8; format <= WEIGHT_Q4; format++) {
        enum weight_format f = (enum weight_format)format;
        struct matrix rows, w;
        double per_weight;
        int good = 1;

        start_case((uint64_t)format);
        rows = take_matrix(WEIGHT_F32, ROWS, COLS);
        for (int k = 0; k < COLS; k++) ((float *)(uintptr_t)rows.data)[3 * COLS + k] = 0;
        w = rows;
        prepare(backends[0], &w, format);
        for (int r = 0; r < 3 * PANEL; r++) {
            const char *panel = (const char *)w.packed + (size_t)(r / PANEL) * panel_bytes(f, COLS);

            for (int k = 0; k < (COLS + TILE - 1) / TILE * TILE; k++) {
                int outside = r >= ROWS || k >= COLS;
                double want = outside ? 0 : ((const float *)rows.data)[r * COLS + k];
                double scale = panel_scale(f, panel, r % PANEL, k);
                int code = panel_code(f, panel, r % PANEL, k);

                /* Half a step; the f16 scale may cut off a 16th of one at 127; in q4 there is no
                 * code 8. */
                good &= fabs(want - scale * code) <= fabs(scale) * (f == WEIGHT_Q4 ? 1.1 : 0.57);
                good &= !outside || code == 0;
            }
        }
        for (int b = 3; b < n_backends; b += 3) {
            struct matrix other = rows;

            prepare(backends[b], &other, format);
            good &= memcmp(other.packed, w.packed, packed_bytes(&w)) == 0;
        }
        per_weight = 8.0 * (double)(panel_bytes(f, 4096) - (f == WEIGHT_INT8 ? 64 : 0)) /
                     (PANEL * 4096);
        verdict(
            good && per_weight == bits[format - WEIGHT_INT8],
            "%s holds what it is given, in %.1f bits a weight, the same from every instruction set",
            weight_format_name(f), per_weight);
        end_case();
    }
}

/* By the definition of e4m3fn; between two neighbours the nearer one, half way the even one. */
static void test_fp8_converts_exactly(void)
{
    int good = 1;

    for (int code = 0; code < 256; code++) {
        int exponent = code >> 3 & 15, is_nan = (code & 127) == 127;
        double want = exponent ? ldexp(1 + (code & 7) / 8.0, exponent - 7)
                               : ldexp((code & 7) / 8.0, -6);
        float f = fp8_to_f32((uint8_t)code);

        if (is_nan) {
            good &= isnan(f);
            continue;
        }
        good &= f == (float)(code & 128 ? -want : want) && !signbit(f) == !(code & 128);
        good &= f32_to_fp8(f) == code;
        if ((code & 127) == 126) continue;
        float next = fp8_to_f32((uint8_t)(code + 1)), middle = (f + next) / 2;

        good &= f32_to_fp8(middle) == (code & 1 ? code + 1 : code);
        good &= f32_to_fp8(nextafterf(middle, next)) == code + 1;
        good &= f32_to_fp8(nextafterf(middle, f)) == code;
    }
    good &= f32_to_fp8(448.1f) == 0x7e && f32_to_fp8(-1e30f) == 0xfe &&
            f32_to_fp8(INFINITY) == 0x7e;
    good &= f32_to_fp8(-0x1p-11f) == 0x80 && f32_to_fp8(0x1p-149f) == 0;
    verdict(good, "e4m3 converts exactly, both ways");
}

/* Each one alone in a row, in the midst of zeros and at the end of a row; subnormal ones too, although
 * stages take subnormal floats for 0. */
static void test_every_fp8_code_is_multiplied_as_what_it_is(struct backend *backend)
{
    enum { COLS = 77 };
    int good = 1;

    start_case(3);
    uint8_t *codes = take(254 * COLS);
    float *x = take(COLS * sizeof *x), *y = take(254 * sizeof *y);
    struct matrix w = {.format = WEIGHT_FP8, .rows = 254, .cols = COLS, .data = codes};

    for (int r = 0; r < 254; r++) codes[r * COLS + (r + r / 77) % COLS] = (uint8_t)(r + r / 127);
    for (int k = 0; k < COLS; k++) x[k] = 1;
    prepare(backend, &w, 0);
    run_linear(backend, &(struct op_linear){.name = "codes", .n = 1, .x = x, .weight = w, .y = y});
    for (int r = 0; r < 254; r++)
        if (y[r] != fp8_to_f32(codes[r * COLS + (r + r / 77) % COLS])) good = 0;
    verdict(good, "every code of fp8 is multiplied as what it is (%s)", backend->isa);
    end_case();
}

/* The scale is that of the largest weight; the numbers are the nearest ones to weights over it. */
static int is_near_as_fp8(const float *weights, const uint8_t *codes, double scale, int n)
{
    float most = 0;

    for (int k = 0; k < n; k++) most = fmaxf(most, fabsf(weights[k]));
    if (scale == 0 ? most >= FP8_LEAST_ROW : fabs(scale / (most / 448.0) - 1) > 1e-6) return 0;
    for (int k = 0; k < n; k++) {
        double want = scale == 0 ? 0 : weights[k], found = scale * fp8_to_f32(codes[k]);
        double step = 0x1p-9; /* of neighbours */

        if (want != 0) step = fmax(step, ldexp(1, ilogb(want / scale) - 3));
        if (fabs(want - found) > (fabs(want) == most ? 1e-6 * most : 0.5001 * step * scale))
            return 0;
        if (scale == 0 && codes[k] & 127) return 0;
    }
    return 1;
}

/* A row of zeros and one of too little have scales of 0. */
static void test_fp8_rows_hold_what_they_are_given(void)
{
    enum { ROWS = 37, COLS = 150 };
    struct matrix rows, w;
    int good = 1;

    start_case(9);
    rows = take_matrix(WEIGHT_F32, ROWS, COLS);
    float *values = (float *)(uintptr_t)rows.data;

    for (int k = 0; k < COLS; k++) {
        values[3 * COLS + k] = 0;
        values[4 * COLS + k] *= 0x1p-120f;
        values[5 * COLS + k] *= 0x1p-80f;
        values[6 * COLS + k] *= 0x1p100f;
    }
    w = rows;
    prepare(backends[0], &w, WEIGHT_FP8);
    for (int r = 0; r < ROWS; r++)
        if (!is_near_as_fp8(values + r * COLS, (const uint8_t *)w.data + r * COLS, w.scales[r],
                            COLS))
            good = 0;
    good &= w.scales[3] == 0 && w.scales[4] == 0;
    for (int b = 3; b < n_backends; b += 3) {
        struct matrix other = rows;

        prepare(backends[b], &other, WEIGHT_FP8);
        good &= memcmp(other.packed, w.packed, packed_bytes(&w)) == 0;
    }
    verdict(good, "fp8 rows hold what they are given, the same from every instruction set");
    end_case();
}

static void test_stored_int8_rows_keep_their_codes(void)
{
    enum { ROWS = 21, COLS = 70 };
    int8_t *codes;
    float *scales;
    struct matrix w;
    int good = 1;

    start_case(1);
    codes = take(ROWS * COLS);
    scales = take_random(ROWS, 0.1f);
    for (int i = 0; i < ROWS * COLS; i++) codes[i] = (int8_t)(random_below(255) - 127);
    w = (struct matrix){WEIGHT_INT8, ROWS, COLS, codes, scales, NULL};
    prepare(backends[0], &w, WEIGHT_INT8);
    for (int r = 0; r < ROWS; r++) {
        const char *panel = (const char *)w.packed +
                            (size_t)(r / PANEL) * panel_bytes(w.format, COLS);

        for (int k = 0; k < COLS; k++)
            good &= panel_code(w.format, panel, r % PANEL, k) == codes[r * COLS + k] &&
                    panel_scale(w.format, panel, r % PANEL, k) == scales[r];
    }
    verdict(good, "stored int8 rows keep their codes and scales");
    end_case();
}

static void test_bad_numbers_do_not_hide_in_codes(void)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    int good = 1;

    for (int b = 0; b < n_backends; b += cuda ? 1 : 3) {
        for (int format = WEIGHT_FP8; format <= WEIGHT_Q4; format++) {
            for (int i = 0; i < COUNT(bad); i++) {
                struct matrix w, broken;
                float *x, *y;

                start_case(7);
                w = take_matrix(WEIGHT_F32, 20, 70);
                broken = take_matrix(WEIGHT_F32, 20, 70);
                ((float *)(uintptr_t)broken.data)[19 * 70 + 3 * i] = bad[i];
                x = take_random(70, 1);
                y = take(20 * sizeof *y);
                x[i * 30] = bad[i];
                prepare(backends[b], &w, format);
                run_linear(backends[b],
                           &(struct op_linear){.name = "bad", .n = 1, .x = x, .weight = w, .y = y});
                for (int r = 0; r < 20; r++) good &= !isfinite(y[r]);
                good &= backends[b]->ops->quantise_matrix(backends[b], &broken,
                                                          (enum weight_format)format) ==
                            MOSHI_ERROR_CHECKPOINT &&
                        !broken.packed;
                end_case();
            }
        }
    }
    verdict(good, "activations that are not finite give sums that are not, such weights an error");
}

static void stage_linear_once(struct backend *backend, void *arg)
{
    backend->ops->linear(backend, arg);
}

static void test_too_little_scratch_is_an_error(void)
{
    struct backend *backend;
    static float x[64], w[64], y[64];
    struct op_linear op = {.name = "linear",
                           .n = 64,
                           .x = x,
                           .y = y,
                           .weight = {.format = WEIGHT_F32, .rows = 1, .cols = 1, .data = w}};
    int good = cpu_backend_create(1, &backend) == MOSHI_OK;

    good = good &&
           backend->ops->run(backend, 0, stage_linear_once, &op, 0) == MOSHI_ERROR_INTERNAL &&
           backend->ops->reserve(backend, 64, 1, 1) == MOSHI_OK &&
           backend->ops->run(backend, 0, stage_linear_once, &op, 0) == MOSHI_OK;
    if (backend) backend->ops->destroy(backend);
    verdict(good, "a call that exceeds the reserved scratch is an error");
}

static void halve_the_least(struct backend *backend, void *result)
{
    volatile float least = 0x1p-126f; /* of the normal ones */

    (void)backend;
    *(float *)result = 0.5f * least;
}

static void test_subnormals_are_zero_in_a_stage_alone(struct backend *backend)
{
    float inside = 1, outside = 0;

    backend->ops->run(backend, 0, halve_the_least, &inside, 0);
    halve_the_least(backend, &outside);
    verdict(inside == 0 && outside > 0, "subnormal numbers are zero in a stage, not after it");
}

static void test_unknown_instruction_set_is_an_error(void)
{
    struct backend *backend;
    int status;

    setenv("MOSHI_C_ISA", "mmx", 1);
    status = cpu_backend_create(1, &backend);
    verdict(status == MOSHI_ERROR_ARGUMENT && !backend && strstr(moshi_error_detail(), "mmx") &&
                strstr(moshi_error_detail(), "expected generic") &&
                strstr(moshi_error_detail(), isas[COUNT(isas) - 1]),
            "an unknown MOSHI_C_ISA is an error");
    unsetenv("MOSHI_C_ISA");
}

/* Many short jobs with more threads than cores: correct, and no collapse. */
static void test_many_threads_on_few_cores(void)
{
    int threads = 3 * os_cpu_count() + 1, good;
    struct backend *backend;
    struct matrix weight;
    float *x, *y;
    double start;

    start_case(9);
    weight = take_matrix(WEIGHT_F32, 256, 256);
    x = take_random(256, 1);
    y = take(256 * sizeof *y);
    good = cpu_backend_create(threads, &backend) == MOSHI_OK &&
           backend->ops->reserve(backend, 1, 256, 1) == MOSHI_OK;
    start = os_clock();
    for (int i = 0; i < 2000 && good; i++) {
        poison(y, 256 * sizeof *y);
        run_linear(backend,
                   &(struct op_linear){.name = "linear", .n = 1, .x = x, .weight = weight, .y = y});
        for (int r = 0; r < 256; r++) good &= isfinite(y[r]);
    }
    if (backend) backend->ops->destroy(backend);
    verdict(good, "%d threads do 2000 jobs (%.1f us each)", threads,
            (os_clock() - start) / 2000 * 1e6);
}

static void stage_traced(struct backend *backend, void *arg)
{
    backend->ops->norm(backend, arg);
}

static void test_trace_finds_the_first_bad_value(void)
{
    char path[] = "moshi_trace_XXXXXX";
    int descriptor = mkstemp(path);
    struct backend *inner, *trace = NULL;
    float x[6] = {1, 2, 3, 4, INFINITY, 6}, y[6];
    struct op_norm op = {.name = "here", .n = 1, .width = 3, .x = x, .y = y};
    char line[256] = "";
    FILE *file;
    int good = descriptor >= 0 && close(descriptor) == 0 &&
               cpu_backend_create(1, &inner) == MOSHI_OK &&
               trace_backend_create(inner, path, &trace) == MOSHI_OK &&
               trace->ops->run(trace, 4, stage_traced, &op, 0) == MOSHI_OK;

    op.n = 2;
    good = good && trace->ops->run(trace, 4, stage_traced, &op, 0) == MOSHI_ERROR_INTERNAL &&
           strstr(moshi_error_detail(), "norm here: inf in row 1 of 2, column 1 of 3");
    if (trace) trace->ops->destroy(trace);
    file = fopen(path, "r");
    good = good && file && fgets(line, sizeof line, file) &&
           strncmp(line, "0 4 norm here 1 3 1 3 2.160", 27) == 0;
    if (file) fclose(file);
    remove(path);
    verdict(good, "the trace finds the first bad value");
}

/* The memory of all cases, within reach of a card if there is one. */
static int take_memory(void)
{
    const struct cuda_library *library = cuda ? cuda_load() : NULL;

    arena = cuda ? library ? library->share(arena_bytes) : NULL : os_reserve(arena_bytes);
    if (!arena && cuda) printf("%s\n", moshi_error_detail());
    for (int i = 0; i < OUTCOMES && cuda && arena; i++)
        if (!(outcomes[i] = library->share(outcome_bytes))) return 0;
    return arena != NULL;
}

#define DEEPEST 2300 /* columns, of what only a card is tested with */

static int open_cuda(void)
{
    setenv("MOSHI_C_ISA", "generic", 1);
    setenv("MOSHI_C_DEPTH_KERNEL", "1", 1);
    if (cpu_backend_create(1, &backends[0]) ||
        backends[0]->ops->reserve(backends[0], 2120, DEEPEST, 64) ||
        cuda_backend_create("cuda", &backends[1])) {
        printf("%s\n", moshi_error_detail());
        return 0;
    }
    unsetenv("MOSHI_C_ISA");
    n_backends = 2;
    printf("%s against %s\n", backends[1]->isa, backends[0]->isa);
    return 1;
}

static void open_backends(void)
{
    for (int isa = 0; isa < COUNT(isas); isa++) {
        for (int threads = 1; threads <= 3; threads++) {
            struct backend *backend;

            setenv("MOSHI_C_ISA", isas[isa], 1);
            if (cpu_backend_create(threads, &backend)) {
                if (threads == 1) printf("skip %s: %s\n", isas[isa], moshi_error_detail());
                continue;
            }
            if (backend->ops->reserve(backend, 53 * 40, 640, 64)) exit(2);
            backends[n_backends++] = backend;
        }
    }
    unsetenv("MOSHI_C_ISA");
}

/* ---- what only a card does differently -------------------------------------------------- */

/* A cache for lanes of LONG_PAGES pages, its pages in another order. */
enum { LONG_PAGES = 7, POSITIONS = 64, LONG_HEADS = 2, LONG_DIM = 64 };

static struct kv_cache take_long_cache(enum moshi_dtype kv, int lanes)
{
    struct kv_cache cache = {.pages_per_lane = LONG_PAGES,
                             .page_positions = POSITIONS,
                             .layers = 1,
                             .kv_heads = LONG_HEADS,
                             .head_dim = LONG_DIM,
                             .dtype = kv};
    const size_t plane = kv_plane_bytes(&cache);
    int pages = lanes * LONG_PAGES;
    int32_t *table = take((size_t)pages * sizeof *table);

    cache.page_bytes = 2 * LONG_HEADS * plane;
    cache.pages = take(cache.page_bytes * (size_t)pages);
    cache.table = table;
    for (int i = 0; i < pages; i++) table[i] = pages - 1 - i;
    for (int p = 0; p < 2 * LONG_HEADS * pages; p++) {
        char *at = (char *)cache.pages + (size_t)p * plane;
        float *scales = (float *)(void *)(at + POSITIONS * LONG_DIM);

        for (int i = 0; i < POSITIONS * LONG_DIM; i++) {
            if (kv == MOSHI_BF16)
                ((uint16_t *)(void *)at)[i] = f32_to_bf16(uniform());
            else if (kv == MOSHI_INT8)
                at[i] = (char)(127 * uniform());
            else
                ((float *)(void *)at)[i] = uniform();
        }
        for (int i = 0; i < POSITIONS && kv == MOSHI_INT8; i++) scales[i] = (2 + uniform()) / 127;
    }
    return cache;
}

/* One call deep into a ring, whose keys are cut into spans: against the other backend. */
static void test_a_long_call_is_attended_in_spans(struct backend *backend, enum moshi_dtype kv)
{
    enum { N = 2, LANES = 6 };
    const size_t row = (size_t)LONG_HEADS * LONG_DIM;
    struct outcome all[2];
    int good = 1;

    for (int b = 0; b < 2; b++) {
        struct backend *here = b ? backend : backends[0];

        start_case(11);
        struct rows rows = take_rows(&(struct shape){.n = N});
        int32_t *position = take(LANES * sizeof *position);
        float *q = take_random(N * row, 1), *other = take_random(N * row, 1);
        struct kv_cache cache = take_long_cache(kv, LANES);

        for (int l = 0; l < LANES; l++) position[l] = 200 + 137 * l;
        if (!b) here->ops->reserve(here, N, 640, LONG_PAGES * POSITIONS);
        start_outcome(&all[b], N, row, 0);
        for (int times = 0; times < 2; times++) /* the first query leaves its own spans behind */
            run_attend(here, &(struct op_attend){.name = "long",
                                                 .rows = rows,
                                                 .steps = 1,
                                                 .heads = LONG_HEADS,
                                                 .causal = 1,
                                                 .context = 400,
                                                 .capacity = 400,
                                                 .position = position,
                                                 .cache = &cache,
                                                 .q = times ? q : other,
                                                 .y = all[b].y});
    }
    good = distance(&all[1], &all[0]) < 1e-5;
    verdict(good, "a long call is attended in spans (%s)", moshi_dtype_name(kv));
    free_outcome(&all[0]);
    free_outcome(&all[1]);
}

/* Calls that are young, that pass the end of a span, and that pass the end of their context. */
static void test_steps_are_attended_together_as_one_by_one(struct backend *backend,
                                                           enum moshi_dtype kv)
{
    enum { STEPS = 19, LANES = 6, N = 4 };
    static const int32_t starts[LANES] = {0, 118, 337, 391, 0, 0};
    const size_t row = (size_t)LONG_HEADS * LONG_DIM;

    start_case(12);
    struct rows rows = take_rows(&(struct shape){.n = N});
    int32_t *position = take(sizeof starts), *count = take(sizeof starts);
    float *q = take_random(N * STEPS * row, 1), *y = take(N * STEPS * row * sizeof *y);
    float *one = take(N * row * sizeof *one), *query = take(N * row * sizeof *query);
    struct kv_cache cache = take_long_cache(kv, LANES);
    struct op_attend op = {.name = "steps",
                           .rows = rows,
                           .heads = LONG_HEADS,
                           .context = 400,
                           .capacity = LONG_PAGES * POSITIONS,
                           .position = position,
                           .key_count = count,
                           .cache = &cache};
    int good = 1;

    for (op.causal = 0; op.causal < 2; op.causal++) {
        for (int l = 0; l < LANES; l++)
            position[rows.lane[l % N]] = starts[l % N], count[l] = 77 * l;
        poison(y, N * STEPS * row * sizeof *y);
        op.steps = STEPS, op.q = q, op.y = y;
        run_attend(backend, &op);
        op.steps = 1, op.q = query, op.y = one;
        for (int t = 0; t < STEPS; t++) {
            for (size_t i = 0; i < N; i++)
                memcpy(query + i * row, q + (i * STEPS + (size_t)t) * row, row * sizeof *q);
            run_attend(backend, &op);
            for (size_t i = 0; i < N; i++)
                good &= isfinite(one[i * row]) &&
                        memcmp(one + i * row, y + (i * STEPS + (size_t)t) * row, row * sizeof *y) ==
                            0;
            for (int i = 0; i < N; i++) position[rows.lane[i]]++;
        }
    }
    end_case();
    verdict(good, "steps are attended together as one by one (%s)", moshi_dtype_name(kv));
}

/* Large matrices of a convolution take another way than small ones. */
static void check_large_convolution(void)
{
    struct tally tally = {.bits = 1, .alone = 1, .masked = 1};

    check_shape(case_conv,
                (struct shape){.operation = "conv",
                               .n = 3,
                               .in = 512,
                               .out = 520,
                               .levels = 402,
                               .steps = 2,
                               .calls = 2,
                               .variant = 3,
                               .format = WEIGHT_F32},
                &tally);
    report("conv", "large", &tally);
}

/* Columns of which each warp of a block takes several pieces; more outputs than blocks take in one turn. */
static void check_large_products(void)
{
    for (int format = WEIGHT_BF16; format <= WEIGHT_Q4; format++) {
        struct tally tally = {.bits = 1, .alone = 1, .masked = 1};
        int blocks = is_block_format((enum weight_format)format);
        const char *name = blocks ? "codes" : "linear";
        char detail[32];

        struct shape shape = {.operation = name,
                              .in = DEEPEST,
                              .out = 18,
                              .packed = blocks ? format : 0,
                              .format = blocks ? WEIGHT_F32 : (enum weight_format)format,
                              .variant = 3};

        for (shape.n = 1; shape.n < 40; shape.n += 19) check_shape(case_linear, shape, &tally);
        shape.n = 3; /* two warps of a block add up */
        shape.in = 40;
        shape.out = 4300;
        check_shape(case_linear, shape, &tally);
        snprintf(detail, sizeof detail, "%s, large",
                 weight_format_name((enum weight_format)format));
        report(name, detail, &tally);
    }
}

/* One row among others that are not finite or very large, at any place, in any number. */
static void test_company_changes_no_bit(struct backend *backend)
{
    enum { IN = 200, OUT = 21, MOST = 150 };
    static const int counts[] = {1, 3, 4, 17, 64, 66, MOST};

    for (int format = 0; format < WEIGHT_FORMATS; format++) {
        int good = 1, packed = format > WEIGHT_INT8 ? format : 0;

        for (int twice = 0; twice < 2; twice++, packed = format) { /* int8: rows, then blocks */
            if (twice && format != WEIGHT_INT8) break;
            start_case(5);
            struct matrix w = take_matrix(packed ? WEIGHT_F32 : (enum weight_format)format, OUT,
                                          IN);
            float *x = take(sizeof *x * MOST * IN), *row = take_random(IN, 1), first[OUT];
            float *y = take(sizeof *y * MOST * OUT);

            prepare(backend, &w, packed);
            for (int i = 0; i < COUNT(counts); i++) {
                int n = counts[i], place = n * 2 / 3;

                for (int k = 0; k < n * IN; k++) x[k] = k / IN % 2 ? NAN : 1e30f;
                memcpy(x + place * IN, row, IN * sizeof *x);
                poison(y, sizeof *y * MOST * OUT);
                run_linear(backend, &(struct op_linear){
                                        .name = "company", .n = n, .x = x, .weight = w, .y = y});
                if (i == 0) memcpy(first, y, sizeof first);
                good &= isfinite(y[place * OUT]) &&
                        memcmp(first, y + place * OUT, sizeof first) == 0;
            }
            end_case();
        }
        verdict(good, "company changes no bit of a row (%s)",
                weight_format_name((enum weight_format)format));
    }
}

/* Floats, fp8 and int8 rows, and a file's panels give the same blocks. */
static void test_blocks_are_made_of_anything(struct backend *backend)
{
    enum { ROWS = 37, COLS = 150 };

    for (int format = WEIGHT_FP8; format <= WEIGHT_Q4; format++) {
        for (int source = WEIGHT_F32; source <= WEIGHT_INT8; source++) {
            if (source == WEIGHT_FP8 && format == source) continue; /* rows are taken as they are */
            float *made[2], *in;
            struct matrix rows, w[2];
            int good;

            start_case((uint64_t)format);
            rows = take_matrix((enum weight_format)source, ROWS, COLS);
            in = take_random(COLS, 1);
            w[0] = w[1] = rows;
            prepare(backend, &w[0], format);
            prepare(backends[0], &w[1], format); /* panels, or rows of fp8 */
            prepare(backend, &w[1], 0);
            for (int i = 0; i < 2; i++) {
                made[i] = take(ROWS * sizeof *made[i]);
                run_linear(backend,
                           &(struct op_linear){
                               .name = "made", .n = 1, .x = in, .weight = w[i], .y = made[i]});
            }
            good = memcmp(made[0], made[1], ROWS * sizeof *made[0]) == 0 && made[0][0] != 0;
            verdict(good, "%s is made of %s as on the CPU, and of what a file has",
                    weight_format_name((enum weight_format)format),
                    weight_format_name((enum weight_format)source));
            end_case();
        }
    }
}

/* ---- the depth pass as one operation ---------------------------------------------------- */

#define DEPTH_STEPS 5
#define DEPTH_SETS 3
#define DEPTH_LAYERS 2
#define DEPTH_CARD 301
#define DEPTH_VOCABULARY 40
#define DEPTH_Z 72

struct depth_case {
    enum weight_format format;
    int rows, width, heads, kv_heads, hidden, gated;
    enum norm_kind norm;
    int scaled, biased, rank;
    int whole; /* whether it is one operation */
};

struct depth_test {
    struct lm_config config;
    struct depth depth;
    struct transformer_layer layers[DEPTH_LAYERS];
    struct depth_work work;
    struct depth_run run;
    size_t logits_bytes, audio_bytes;
    uint8_t *failed;
};

static struct matrix take_prepared(struct backend *backend, enum weight_format format, int rows,
                                   int cols)
{
    const int is_block = is_block_format(format);
    struct matrix m = take_matrix(is_block ? WEIGHT_F32 : format, rows, cols);

    prepare(backend, &m, is_block ? (int)format : 0);
    return m;
}

static struct embedding take_embedding(const struct depth_case *c, int vocabulary)
{
    struct embedding e = {
        .table = take_matrix(WEIGHT_BF16, vocabulary, c->rank ? c->rank : c->width)};

    if (c->rank) e.low_rank = take_matrix(WEIGHT_F32, c->width, c->rank);
    return e;
}

static void take_depth(struct backend *backend, const struct depth_case *c, struct depth_test *t)
{
    struct lm_config *config = &t->config;
    struct depth *depth = &t->depth;
    const int schedule[DEPTH_STEPS] = {0, 1, 1, 2, 0};
    const int qkv = c->width + 2 * c->kv_heads * (c->width / c->heads);

    memset(t, 0, sizeof *t);
    config->dep_q = DEPTH_STEPS;
    config->card = DEPTH_CARD;
    config->depth_multi_linear = 1;
    memcpy(config->depth_schedule, schedule, sizeof schedule);
    config->depth = (struct transformer_config){.dim = c->width,
                                                .heads = c->heads,
                                                .layers = DEPTH_LAYERS,
                                                .kv_heads = c->kv_heads,
                                                .feedforward = c->hidden,
                                                .gated = c->gated,
                                                .weight_sets = DEPTH_SETS};
    depth->config = config;
    depth->stack.config = config->depth;
    depth->stack.layers = t->layers;
    for (int i = 0; i < DEPTH_LAYERS; i++) {
        struct transformer_layer *layer = &t->layers[i];
        struct matrix *m = take(4 * DEPTH_SETS * sizeof *m);

        layer->norm1 = take_norm(c->norm, c->width);
        layer->norm2 = take_norm(c->norm, c->width);
        if (c->scaled) layer->scale1 = take_random((size_t)c->width, 1);
        if (c->scaled) layer->scale2 = take_random((size_t)c->width, 1);
        layer->in_proj = m;
        layer->out_proj = m + DEPTH_SETS;
        layer->ffn_in = m + 2 * DEPTH_SETS;
        layer->ffn_out = m + 3 * DEPTH_SETS;
        for (int set = 0; set < DEPTH_SETS; set++) {
            layer->in_proj[set] = take_prepared(backend, c->format, qkv, c->width);
            layer->out_proj[set] = take_prepared(backend, c->format, c->width, c->width);
            layer->ffn_in[set] = take_prepared(backend, c->format,
                                               c->gated ? 2 * c->hidden : c->hidden, c->width);
            layer->ffn_out[set] = take_prepared(backend, c->format, c->width, c->hidden);
        }
    }
    for (int set = 0; set < DEPTH_SETS; set++)
        depth->input[set] = take_prepared(backend, c->format, c->width, DEPTH_Z);
    depth->text_embedding = take_embedding(c, DEPTH_VOCABULARY);
    depth->text_embedding.alias = 3; /* the first row's token */
    depth->text_embedding.alias_of = 9;
    for (int k = 0; k < DEPTH_STEPS; k++) {
        if (k) depth->embedding[k - 1] = take_embedding(c, DEPTH_CARD);
        depth->norm[k] = take_norm(c->scaled ? NORM_LAYER : NORM_NONE, c->width);
        depth->head[k] = take_prepared(backend, c->format, DEPTH_CARD, c->width);
        if (c->biased) depth->head_bias[k] = take_random(DEPTH_CARD, 0.5f);
    }
}

/* Rows, of which the last one is the null half of the first where there are four; row 1 of three is
 * inactive. Slots are in another order than rows. */
static void take_depth_run(struct depth_test *t, const struct depth_case *c)
{
    const int n = c->rows, slots = n == 4 ? 3 : n;
    const size_t rows = (size_t)n;
    int32_t *lane = take(rows * 4), *slot = take(rows * 4), *text = take(rows * 4);
    int32_t *null_row = take(rows * 4), *offset = take(rows * 4);
    uint8_t *active = take(rows);
    struct slot_params *params = take(rows * sizeof *params);

    for (int i = 0; i < n; i++) {
        struct slot_params *p = &params[i];

        lane[i] = i;
        slot[i] = n - 1 - i;
        text[i] = i == 2 ? TOKEN_ZERO : 3 + 5 * i;
        null_row[i] = n == 4 && i == 0 ? 3 : -1;
        active[i] = !(n == 3 && i == 1);
        offset[i] = 40 + i;
        p->temperature[1] = i % 3 == 1 ? 0 : 0.8f;
        p->top_k[1] = i % 2 ? 7 : 0;
        p->cfg_coef = 1.6f;
        p->seed[0] = 5 + (uint32_t)i;
        for (int k = 0; k < DEPTH_STEPS; k++) p->forced_audio[k] = TOKEN_FREE;
        if (i == 0) p->forced_audio[2] = 11;
        if (i == 1) p->forced_audio[1] = TOKEN_ZERO;
    }
    t->failed = take(rows);
    t->logits_bytes = DEPTH_STEPS * DEPTH_CARD * rows * sizeof(float);
    t->audio_bytes = DEPTH_STEPS * rows * sizeof(int32_t);
    t->run = (struct depth_run){.rows = {n, lane, active},
                                .slots = {slots, slot, active},
                                .z = take_random(rows * DEPTH_Z, 1),
                                .text = text,
                                .null_row = null_row,
                                .params = params,
                                .offset = offset,
                                .failed = t->failed,
                                .logits = take(t->logits_bytes),
                                .audio = take(t->audio_bytes)};
}

static const struct backend_ops *own_ops; /* of the backend */
static int whole_passes;

static int count_whole(struct backend *backend, const struct op_depth *op)
{
    const int done = own_ops->depth(backend, op);

    whole_passes += done;
    return done;
}

static void stage_depth(struct backend *backend, void *arg)
{
    struct depth_test *t = arg;

    depth_forward(&t->depth, &t->work, &t->run);
    (void)backend;
}

/* One pass, `whole` or of smaller operations; a status. */
static int pass(struct backend *backend, struct depth_test *t, int whole, float *logits,
                int32_t *audio)
{
    struct backend_ops ops = *backend->ops;
    int status;

    own_ops = backend->ops;
    ops.depth = whole ? count_whole : NULL;
    backend->ops = &ops;
    poison(t->run.logits, t->logits_bytes);
    poison(t->run.audio, t->audio_bytes);
    status = run_stage(backend, stage_depth, t);
    backend->ops = own_ops;
    memcpy(logits, t->run.logits, t->logits_bytes);
    memcpy(audio, t->run.audio, t->audio_bytes);
    return status;
}

static int same_depth(const struct depth_test *t, const float *a, const float *b)
{
    for (int k = 0; k < DEPTH_STEPS; k++)
        for (int i = 0; i < t->run.rows.n; i++) {
            const size_t at = (size_t)(k * t->run.rows.n + i) * DEPTH_CARD;

            if (t->run.rows.active[i] && memcmp(a + at, b + at, DEPTH_CARD * sizeof *a)) return 0;
        }
    return 1;
}

static void check_depth(struct backend *backend, const struct depth_case *c)
{
    struct depth_test t;
    float *logits[3];
    int32_t *audio[3], *text;
    int good = 1;

    start_case(77);
    take_depth(backend, c, &t);
    take_depth_run(&t, c);
    for (int i = 0; i < 3; i++) {
        logits[i] = take(t.logits_bytes);
        audio[i] = take(t.audio_bytes);
    }
    must(backend, depth_work_create(&t.work, &t.depth, backend, c->rows + 1));
    whole_passes = 0;
    for (int i = 0; i < 3; i++) must(backend, pass(backend, &t, i > 0, logits[i], audio[i]));
    good = (whole_passes > 0) == c->whole;
    for (int i = 1; i < 3; i++)
        good &= same_depth(&t, logits[0], logits[i]) &&
                memcmp(audio[0], audio[i], t.audio_bytes) == 0;
    for (int i = 0; i < c->rows; i++) good &= t.failed[i] == 0;
    verdict(good, "a depth pass of %d rows of %s, %d wide, is %s and has the same bits", c->rows,
            weight_format_name(c->format), c->width, c->whole ? "one kernel" : "made of others");
    text = (int32_t *)(uintptr_t)t.run.text;
    text[0] = DEPTH_VOCABULARY;
    good = 1;
    for (int whole = 0; whole < 2; whole++)
        good &= pass(backend, &t, whole, logits[0], audio[0]) == MOSHI_ERROR_INTERNAL &&
                strstr(moshi_error_detail(), "embed: token 40 in row 0, expected one below 40");
    verdict(good, "a token that its table lacks is said");
    depth_work_destroy(&t.work);
    end_case();
}

static void check_depth_passes(struct backend *backend)
{
    static const struct depth_case cases[] = {
        {WEIGHT_BF16, 1, 96, 4, 4, 132, 1, NORM_RMS, 0, 0, 0, 1},
        {WEIGHT_BF16, 4, 128, 2, 1, 1096, 0, NORM_LAYER, 1, 1, 0, 1},
        {WEIGHT_FP8, 2, 160, 2, 2, 1160, 1, NORM_RMS, 1, 1, 0, 1},
        {WEIGHT_INT8, 3, 160, 2, 2, 200, 1, NORM_RMS, 0, 1, 0, 1},
        {WEIGHT_Q8, 4, 96, 4, 2, 140, 1, NORM_RMS, 1, 0, 0, 1},
        {WEIGHT_Q4, 2, 96, 2, 2, 2400, 1, NORM_NONE, 0, 0, 0, 1},
        {WEIGHT_F32, 2, 96, 4, 4, 132, 1, NORM_RMS, 0, 0, 0, 0},
        {WEIGHT_BF16, 5, 96, 4, 4, 132, 1, NORM_RMS, 0, 0, 0, 0},
        {WEIGHT_BF16, 1, 96, 4, 4, 132, 1, NORM_RMS, 0, 0, 16, 0},
    };

    for (int i = 0; i < COUNT(cases); i++) check_depth(backend, &cases[i]);
}

/* Two backends, with warpgroups and without, and the row alone; where a card has no warpgroups, both
 * are the same. The first shape has enough outputs for the larger tiles of any card; the shim's has few
 * processors here, so that it takes them for all. */
static void test_many_rows_have_the_bits_of_one(void)
{
    static const struct {
        int rows, columns, outputs, gated;
    } shapes[] = {{140, 72, 4400, 0}, {66, 72, 150, 0}, {128, 600, 150, 1}, {140, 1096, 150, 0}};
    struct backend *pair[2];
    int good = 1, nan_seen = 0;

    setenv("SHIM_PROCESSORS", "2", 1);
    for (int i = 0; i < 2; i++) {
        setenv("MOSHI_C_WARPGROUPS", i ? "1" : "0", 1);
        if (cuda_backend_create("cuda", &pair[i])) exit(2);
    }
    unsetenv("MOSHI_C_WARPGROUPS");
    unsetenv("SHIM_PROCESSORS");
    for (int c = 0; c < COUNT(shapes); c++) {
        start_case((uint64_t)c);
        const int in = shapes[c].columns, n = shapes[c].rows, out = shapes[c].outputs;
        const int width = shapes[c].gated ? out / 2 : out;
        struct matrix weight = take_matrix(WEIGHT_BF16, out, in);
        float *x = take_random((size_t)(n * in), 2), *y[3];
        const struct norm norm = take_norm(NORM_RMS, in);

        for (int i = 0; i < 3; i++) { /* the third one: the last row alone */
            struct matrix w = weight;
            const int rows = i < 2 ? n : 1;
            const float *from = i < 2 ? x : x + (size_t)(n - 1) * (size_t)in;

            y[i] = take((size_t)(rows * width) * sizeof **y);
            poison(y[i], (size_t)(rows * width) * sizeof **y);
            prepare(pair[i % 2], &w, 0);
            if (shapes[c].gated)
                run_linear_gated(pair[i % 2], &(struct op_linear_gated){.name = "gated",
                                                                        .n = rows,
                                                                        .x = from,
                                                                        .norm = norm,
                                                                        .weight = w,
                                                                        .y = y[i]});
            else
                run_linear(pair[i % 2], &(struct op_linear){.name = "linear",
                                                            .n = rows,
                                                            .x = from,
                                                            .norm = norm,
                                                            .weight = w,
                                                            .y = y[i]});
        }
        good &= memcmp(y[0], y[1], (size_t)(n * width) * sizeof **y) == 0;
        good &= memcmp(y[0] + (size_t)((n - 1) * width), y[2], (size_t)width * sizeof **y) == 0;
        for (int i = 0; i < n * width; i++) nan_seen |= isnan(y[1][i]);
        end_case();
    }
    for (int i = 0; i < 2; i++) pair[i]->ops->destroy(pair[i]);
    verdict(good && !nan_seen, "many rows have the bits of one, by warps and by warpgroups");
}

struct given_frames {
    struct op_delay_input in;
    struct op_delay_output out;
    int frames, at_once;
};

static void stage_delay_given(struct backend *backend, void *arg)
{
    struct given_frames g = *(struct given_frames *)arg;
    const struct delay_cache *cache = g.in.cache;

    if (g.at_once) {
        backend->ops->delay_given(backend, &g.in, &g.out, g.frames);
        return;
    }
    for (int t = 0; t < g.frames; t++) {
        backend->ops->delay_input(backend, &g.in);
        backend->ops->delay_output(backend, &g.out);
        g.in.user += cache->streams - 1 - cache->dep_q;
        g.in.tokens += cache->streams;
        g.out.text++;
        g.out.audio += cache->dep_q;
        g.out.out += 1 + cache->dep_q;
    }
}

/* A slot's first frames, some more, one, and enough to fill the cache twice. */
static void test_given_frames_pass_the_delays_as_steps(struct backend *backend)
{
    enum { STREAMS = 7, DEP_Q = 3, USERS = 3, COLUMNS = 5, MOST = 150, LANES = 3, SLOT = 1 };
    static const int32_t late[STREAMS] = {1, 0, 3, 2, 0, 1, 3};
    static const int counts[] = {2, 5, 1, MOST, 3};
    const size_t cells = LANES * STREAMS * COLUMNS;
    int good = 1;

    for (int guided = 0; guided < 2; guided++) {
        int32_t *tokens[2], *out[2], *cache_tokens[2], *offset[2];

        start_case(21);
        int32_t *user = take(MOST * USERS * 4), *text = take(MOST * 4);
        int32_t *audio = take(MOST * DEP_Q * 4), *lane = take(4), *null_row = take(4);
        int32_t *delays = take(sizeof late);
        uint8_t *active = take(1);
        struct slot_params *params = take(LANES * sizeof *params);

        memcpy(delays, late, sizeof late);
        *lane = SLOT, *active = 1;
        params[SLOT].cfg_masked_until = guided ? 4 : -1;
        params[SLOT].cfg_no_text = guided;
        for (int i = 0; i < 2; i++) {
            tokens[i] = take(2 * MOST * STREAMS * 4);
            out[i] = take(MOST * (1 + DEP_Q) * 4);
            cache_tokens[i] = take(cells * 4);
            offset[i] = take(LANES * 4);
            poison(cache_tokens[i], cells * 4);
        }
        for (int call = 0; call < COUNT(counts); call++) {
            int frames = counts[call];

            *null_row = guided ? frames : -1;
            for (int i = 0; i < frames * USERS; i++) user[i] = random_below(900);
            for (int i = 0; i < frames * DEP_Q; i++) audio[i] = random_below(900);
            for (int i = 0; i < frames; i++) text[i] = random_below(900);
            for (int i = 0; i < 2; i++) {
                struct rows rows = {1, lane, active};
                struct delay_cache cache = {.streams = STREAMS,
                                            .dep_q = DEP_Q,
                                            .columns = COLUMNS,
                                            .max_delay = 3,
                                            .initial_text = 1000,
                                            .initial_audio = 2000,
                                            .delays = delays,
                                            .tokens = cache_tokens[i],
                                            .offset = offset[i]};
                struct given_frames given = {.in = {.name = "given",
                                                    .rows = rows,
                                                    .cache = &cache,
                                                    .params = params,
                                                    .user = user,
                                                    .null_row = null_row,
                                                    .tokens = tokens[i]},
                                             .out = {.name = "given",
                                                     .rows = rows,
                                                     .cache = &cache,
                                                     .text = text,
                                                     .audio = audio,
                                                     .out = out[i]},
                                             .frames = frames,
                                             .at_once = i};

                poison(tokens[i], 2 * MOST * STREAMS * 4);
                poison(out[i], MOST * (1 + DEP_Q) * 4);
                must(backend, run_stage(backend, stage_delay_given, &given));
            }
            good &= memcmp(tokens[0], tokens[1], 2 * MOST * STREAMS * 4) == 0 &&
                    memcmp(out[0], out[1], MOST * (1 + DEP_Q) * 4) == 0 &&
                    memcmp(cache_tokens[0], cache_tokens[1], cells * 4) == 0 &&
                    memcmp(offset[0], offset[1], LANES * 4) == 0 && offset[1][SLOT] > 0;
        }
    }
    verdict(good, "given frames pass the delays as steps do");
}

static int test_cuda(void)
{
    if (!open_cuda()) return 2;
    test_sample_draws_as_defined(backends[1]);
    test_bad_logits_are_an_error(backends[1]);
    check_delays(backends[1], (const int32_t[]){0, 0, 1, 1, 0, 1, 1}, 7, 3);
    check_delays(backends[1], (const int32_t[]){2, 0, 3, 1, 0}, 5, 2);
    check_depth_passes(backends[1]);
    test_given_frames_pass_the_delays_as_steps(backends[1]);
    check_rows("norm", case_norm, 3, 1);
    check_rows("softmax", case_softmax, 1, 1);
    check_rows("rope", case_rope, 1, 3);
    check_products("linear", case_linear, 12, 0);
    check_products("many", case_many, 3, 0);
    check_products("residual", case_residual, 2, 0);
    check_products("gated", case_gated, 3, 0);
    check_products("embed", case_embed, 16, 0);
    check_attention();
    test_a_long_call_is_attended_in_spans(backends[1], MOSHI_F32);
    test_a_long_call_is_attended_in_spans(backends[1], MOSHI_BF16);
    test_a_long_call_is_attended_in_spans(backends[1], MOSHI_INT8);
    test_steps_are_attended_together_as_one_by_one(backends[1], MOSHI_F32);
    test_steps_are_attended_together_as_one_by_one(backends[1], MOSHI_BF16);
    test_steps_are_attended_together_as_one_by_one(backends[1], MOSHI_INT8);
    check_block_products();
    check_many_rows();
    test_many_rows_have_the_bits_of_one();
    check_large_products();
    test_every_fp8_code_is_multiplied_as_what_it_is(backends[1]);
    test_company_changes_no_bit(backends[1]);
    test_blocks_are_made_of_anything(backends[1]);
    test_bad_numbers_do_not_hide_in_codes();
    check_codec();
    check_large_convolution();
    for (int b = 0; b < 2; b++) backends[b]->ops->destroy(backends[b]);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

/* best: what this machine should have; NULL: whatever it says. */
static void test_kernels_are_the_best_that_the_machine_can_run(const char *best)
{
    struct backend *backend;
    char sentence[32];
    int good = cpu_backend_create(1, &backend) == MOSHI_OK, beyond = 0;

    if (!best) best = good ? backend->isa : "";
    good = good && strcmp(backend->isa, best) == 0;
    if (backend) backend->ops->destroy(backend);
    snprintf(sentence, sizeof sentence, "(it has %s)", best);
    for (int isa = 0; isa < COUNT(isas); isa++) {
        int status;

        setenv("MOSHI_C_ISA", isas[isa], 1);
        status = cpu_backend_create(1, &backend);
        good &= beyond ? status == MOSHI_ERROR_DEVICE && strstr(moshi_error_detail(), sentence)
                       : status == MOSHI_OK && strcmp(backend->isa, isas[isa]) == 0;
        if (backend) backend->ops->destroy(backend);
        beyond |= strcmp(isas[isa], best) == 0;
    }
    unsetenv("MOSHI_C_ISA");
    verdict(good && beyond, "the kernels are %s, better ones are refused, plainer ones can be had",
            best);
}

/* ---- bench ------------------------------------------------------------------------------ */

static char *stream; /* larger than any cache; pieces of it are the weights */
static size_t stream_bytes, stream_at;

static void *next_piece(size_t bytes)
{
    if (stream_at + bytes > stream_bytes) stream_at = 0;
    stream_at += (bytes + 63) / 64 * 64;
    return stream + stream_at - (bytes + 63) / 64 * 64;
}

/* Bytes a second, read by so many threads; also empties the caches near the cores. */
static double read_once(int threads)
{
    enum { PIECE = 32 << 20 };
    const void *from[64];

    for (int t = 0; t < threads; t++) from[t] = next_piece(PIECE);
    return probe_read(threads, from, PIECE);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

struct bench_job {
    struct backend *backend;
    struct op_attend attend;
    struct op_conv conv;
    struct op_conv_transposed transposed;
    struct op_linear linear;
};

/* Runs the job until there are enough samples, reading memory in between; reports the median, the
 * best, and both limits' medians. */
static const char *bench_words = "";

static double bench_run(const char *name, void (*once)(struct bench_job *), struct bench_job *job,
                        double bytes, double flops)
{
    enum { SAMPLES = 15 };
    double seconds[SAMPLES], rates[SAMPLES], peaks[SAMPLES];
    int threads = job->backend->threads;

    if (!strstr(name, bench_words)) return 0;
    for (int i = 0; i < SAMPLES; i++) {
        double start;

        rates[i] = read_once(threads);
        peaks[i] = flops > 0 ? probe_multiply(threads) : 0;
        start = os_clock();
        once(job);
        seconds[i] = os_clock() - start;
    }
    qsort(seconds, SAMPLES, sizeof *seconds, by_value);
    qsort(rates, SAMPLES, sizeof *rates, by_value);
    qsort(peaks, SAMPLES, sizeof *peaks, by_value);
    printf("%-34s %8.3f ms (best %.3f)", name, seconds[SAMPLES / 2] * 1e3, seconds[0] * 1e3);
    if (bytes > 0)
        printf("  %5.1f GB/s, best %5.1f; read %5.1f, best %5.1f (%.0f%%, best %.0f%%)",
               bytes / seconds[SAMPLES / 2] / 1e9, bytes / seconds[0] / 1e9,
               rates[SAMPLES / 2] / 1e9, rates[SAMPLES - 1] / 1e9,
               100 * bytes / seconds[SAMPLES / 2] / rates[SAMPLES / 2],
               100 * bytes / seconds[0] / rates[SAMPLES - 1]);
    if (flops > 0)
        printf("  %5.1f GFLOP/s, best %5.1f of %5.1f (%.0f%%)", flops / seconds[SAMPLES / 2] / 1e9,
               flops / seconds[0] / 1e9, peaks[SAMPLES - 1] / 1e9,
               100 * flops / seconds[0] / peaks[SAMPLES - 1]);
    printf("\n");
    return seconds[SAMPLES / 2];
}

static void once_linear(struct bench_job *job)
{
    struct matrix *w = &job->linear.weight;

    if (is_block_format(w->format))
        w->packed = next_piece(packed_bytes(w));
    else
        w->data = next_piece((size_t)w->rows * (size_t)w->cols * weight_bytes(w->format));
    run_linear(job->backend, &job->linear);
}

static void bench_linear(struct backend *backend, enum weight_format format, int rows)
{
    struct bench_job job = {.backend = backend};
    double elements = 4096.0 * 4096, bytes = elements * (double)weight_bytes(format);
    char name[64];

    start_case(1);
    job.linear = (struct op_linear){.name = "bench",
                                    .n = rows,
                                    .x = take_random((size_t)rows * 4096, 1),
                                    .weight = {.format = format, .rows = 4096, .cols = 4096},
                                    .y = take((size_t)rows * 4096 * 4)};
    if (is_block_format(format)) bytes = (double)packed_bytes(&job.linear.weight);
    snprintf(name, sizeof name, "linear %s 4096x4096, %d row%s", weight_format_name(format), rows,
             rows > 1 ? "s" : "");
    bench_run(name, once_linear, &job, bytes, rows > 1 ? 2 * elements * rows : 0);
}

static void once_attend(struct bench_job *job)
{
    run_attend(job->backend, &job->attend);
}

/* 8 of 32 heads of one layer of the 7B model, with 3000 keys: a job that is short enough to have the
 * machine to itself. */
static void bench_attend(struct backend *backend, enum moshi_dtype dtype)
{
    enum { KEYS = 3008, HEADS = 8, DIM = 128 };
    struct bench_job job = {.backend = backend};
    struct kv_cache cache = {.pages_per_lane = KEYS / 64,
                             .page_positions = 64,
                             .layers = 1,
                             .kv_heads = HEADS,
                             .head_dim = DIM,
                             .dtype = dtype};
    size_t bytes = 2 * KEYS / 64 * HEADS * kv_plane_bytes(&cache);
    int32_t lane = 0, position = 2999, *table;
    uint8_t active = 1;

    start_case(1);
    table = take(KEYS / 64 * sizeof *table);
    for (int i = 0; i < KEYS / 64; i++) table[i] = i;
    cache.table = table;
    cache.page_bytes = bytes / (KEYS / 64);
    cache.pages = next_piece(bytes);
    job.attend = (struct op_attend){.name = "bench",
                                    .rows = {1, &lane, &active},
                                    .steps = 1,
                                    .heads = HEADS,
                                    .causal = 1,
                                    .context = 3000,
                                    .capacity = 3000,
                                    .position = &position,
                                    .cache = &cache,
                                    .q = take_random(HEADS * DIM, 1),
                                    .y = take(HEADS * DIM * 4)};
    bench_run(dtype == MOSHI_BF16   ? "attend bf16, 3000 keys"
              : dtype == MOSHI_INT8 ? "attend int8, 3000 keys"
                                    : "attend f32, 3000 keys",
              once_attend, &job, (double)bytes, 0);
}

static void once_conv(struct bench_job *job)
{
    run_conv(job->backend, &job->conv);
}

static void once_transposed(struct bench_job *job)
{
    run_conv_transposed(job->backend, &job->transposed);
}

static void once_packed(struct bench_job *job)
{
    run_linear(job->backend, &job->linear);
}

static float *piece_floats(size_t n)
{
    return next_piece(n * sizeof(float));
}

static double bench_conv(struct backend *backend, int in, int out, int kernel, int stride,
                         int steps)
{
    struct conv conv = {.in = in,
                        .out = out,
                        .kernel = kernel,
                        .stride = stride,
                        .weight = {.format = WEIGHT_F32,
                                   .rows = out,
                                   .cols = kernel * in,
                                   .data = piece_floats((size_t)(kernel * in * out))},
                        .bias = piece_floats((size_t)out)};
    int32_t lane = 0;
    uint8_t active = 1;
    struct bench_job job = {.backend = backend};
    char name[64];
    double flops = 2.0 * steps / stride * kernel * in * out, seconds;

    if (backend->ops->prepare_matrix(backend, &conv.weight, 1)) exit(2);
    job.conv = (struct op_conv){.name = "bench",
                                .rows = {1, &lane, &active},
                                .steps = steps,
                                .conv = &conv,
                                .elu = in > 1,
                                .x = piece_floats((size_t)(steps * in)),
                                .history = calloc((size_t)(kernel * in), 4),
                                .work = calloc((size_t)((kernel + steps) * in), 4),
                                .y = calloc((size_t)(steps * out), 4)};
    snprintf(name, sizeof name, "conv %d->%d k%d s%d, %d steps", in, out, kernel, stride, steps);
    seconds = bench_run(name, once_conv, &job, 0, flops);
    backend->ops->release_matrix(backend, &conv.weight);
    free(job.conv.history), free(job.conv.work), free(job.conv.y);
    return seconds;
}

static double bench_transposed(struct backend *backend, int in, int out, int stride, int steps)
{
    struct conv conv = {.in = in,
                        .out = out,
                        .kernel = 2 * stride,
                        .stride = stride,
                        .weight = {.format = WEIGHT_F32,
                                   .rows = stride * out,
                                   .cols = 2 * in,
                                   .data = piece_floats((size_t)(2 * stride * in * out))},
                        .bias = piece_floats((size_t)out)};
    int32_t lane = 0;
    uint8_t active = 1;
    struct bench_job job = {.backend = backend};
    char name[64];
    double flops = 4.0 * steps * stride * in * out, seconds;

    if (backend->ops->prepare_matrix(backend, &conv.weight, 1)) exit(2);
    job.transposed = (struct op_conv_transposed){.name = "bench",
                                                 .rows = {1, &lane, &active},
                                                 .steps = steps,
                                                 .conv = &conv,
                                                 .elu = 1,
                                                 .x = piece_floats((size_t)(steps * in)),
                                                 .history = calloc((size_t)in, 4),
                                                 .work = calloc((size_t)((1 + steps) * in), 4),
                                                 .y = calloc((size_t)(steps * stride * out), 4)};
    snprintf(name, sizeof name, "transposed %d->%d s%d, %d steps", in, out, stride, steps);
    seconds = bench_run(name, once_transposed, &job, 0, flops);
    backend->ops->release_matrix(backend, &conv.weight);
    free(job.transposed.history), free(job.transposed.work), free(job.transposed.y);
    return seconds;
}

/* `times` such products, weights in turn. */
static double bench_packed(struct backend *backend, int in, int out, int rows, int times)
{
    struct matrix w = {.format = WEIGHT_F32,
                       .rows = out,
                       .cols = in,
                       .data = piece_floats((size_t)in * (size_t)out)};
    struct bench_job job = {.backend = backend};
    char name[64];
    double seconds;

    if (backend->ops->prepare_matrix(backend, &w, 1)) exit(2);
    job.linear = (struct op_linear){.name = "bench",
                                    .n = rows,
                                    .x = piece_floats((size_t)(rows * in)),
                                    .weight = w,
                                    .y = calloc((size_t)(rows * out), 4)};
    snprintf(name, sizeof name, "packed %d->%d, %d rows", in, out, rows);
    seconds = bench_run(name, once_packed, &job, 4.0 * in * out, 2.0 * in * out * rows);
    backend->ops->release_matrix(backend, &w);
    free(job.linear.y);
    return seconds * times;
}

/* The products of one frame of Mimi, each after reading other memory. */
static double bench_mimi(struct backend *backend)
{
    static const int ratios[] = {4, 5, 6, 8};
    int steps = 1920, width = 64;
    double total = bench_conv(backend, 1, 64, 7, 1, steps);

    for (int i = 0; i < 4; i++) {
        total += bench_conv(backend, width, width / 2, 3, 1, steps);
        total += bench_conv(backend, width / 2, width, 1, 1, steps);
        total += bench_conv(backend, width, 2 * width, 2 * ratios[i], ratios[i], steps);
        steps /= ratios[i];
        width *= 2;
    }
    total += bench_conv(backend, 1024, 512, 3, 1, steps);
    total += bench_conv(backend, 512, 512, 4, 2, steps);
    total += bench_packed(backend, 512, 1536, 2, 16);
    total += bench_packed(backend, 512, 512, 2, 16);
    total += bench_packed(backend, 512, 2048, 2, 16);
    total += bench_packed(backend, 2048, 512, 2, 16);
    total += bench_conv(backend, 512, 1024, 7, 1, steps);
    for (int i = 3; i >= 0; i--) {
        total += bench_transposed(backend, width, width / 2, ratios[i], steps);
        steps *= ratios[i];
        width /= 2;
        total += bench_conv(backend, width, width / 2, 3, 1, steps);
        total += bench_conv(backend, width / 2, width, 1, 1, steps);
    }
    total += bench_conv(backend, 64, 1, 3, 1, steps);
    return total;
}

static int bench(int threads)
{
    struct backend *backend;

    stream_bytes = (size_t)1 << 30;
    stream = os_reserve(stream_bytes);
    if (!stream || cpu_backend_create(threads, &backend)) return 2;
    os_advise_huge(stream, stream_bytes);
    /* Ones with random fractions: normal numbers in each format, 1 to 1.99 in bf16. */
    for (size_t i = 0; i < stream_bytes / 4; i++)
        ((uint32_t *)(void *)stream)[i] = (random_bits() & 0x807f807fu) | 0x3f003f00u;
    if (backend->ops->reserve(backend, 2048, 4096, 3072)) return 2;
    printf("%s, %d threads of %d cores\n", backend->isa, threads, os_cpu_count());
    for (int format = 0; format < WEIGHT_FORMATS; format++)
        for (int rows = 1; rows <= 96; rows *= rows < 8 ? 2 : 6)
            bench_linear(backend, (enum weight_format)format, rows);
    bench_attend(backend, MOSHI_BF16);
    bench_attend(backend, MOSHI_INT8);
    bench_attend(backend, MOSHI_F32);
    printf("mimi's products, a frame: %.2f ms\n", bench_mimi(backend) * 1e3);
    backend->ops->destroy(backend);
    os_release(stream, stream_bytes);
    return 0;
}

int main(int argc, char **argv)
{
    cuda = argc > 1 && strcmp(argv[1], "cuda") == 0;
    if (argc > 2 + cuda && strcmp(argv[1 + cuda], "every") == 0)
        every = atoi(argv[2 + cuda]) > 1 ? atoi(argv[2 + cuda]) : 1;
    if (!take_memory()) return 2;
    if (cuda) return test_cuda();
    if (argc > 3) bench_words = argv[3];
    if (argc > 1 && strcmp(argv[1], "bench") == 0) return bench(argc > 2 ? atoi(argv[2]) : 1);
    if (argc > 2 && strcmp(argv[1], "best") == 0) {
        test_kernels_are_the_best_that_the_machine_can_run(argv[2]);
        return failed != 0;
    }
    open_backends();
    test_half_floats_convert_exactly();
    test_fp8_converts_exactly();
    test_rows_below_the_normal_range_have_codes();
    test_philox_gives_the_published_words();
    test_unknown_instruction_set_is_an_error();
    test_kernels_are_the_best_that_the_machine_can_run(NULL);
    test_too_little_scratch_is_an_error();
    test_bad_logits_are_an_error(backends[0]);
    test_subnormals_are_zero_in_a_stage_alone(backends[0]);
    for (int b = 0; b < (every > 1 ? 3 : n_backends); b++)
        test_sample_draws_as_defined(backends[b]);
    test_sample_follows_the_softmax(backends[0]);
    check_delays(backends[0], (const int32_t[]){0, 0, 1, 1, 0, 1, 1}, 7, 3);
    check_delays(backends[0], (const int32_t[]){2, 0, 3, 1, 0}, 5, 2);
    check_delays(backends[0], (const int32_t[]){0, 0, 0}, 3, 0);
    test_trace_finds_the_first_bad_value();
    check_rows("norm", case_norm, 3, 1);
    check_rows("softmax", case_softmax, 1, 1);
    check_rows("rope", case_rope, 1, 3);
    check_products("linear", case_linear, 12, 0);
    check_products("many", case_many, 3, 0);
    check_products("residual", case_residual, 2, 0);
    check_products("gated", case_gated, 3, 0);
    check_products("embed", case_embed, 16, 0);
    check_block_products();
    test_block_formats_hold_what_they_are_given();
    test_fp8_rows_hold_what_they_are_given();
    for (int b = 0; b < n_backends; b += 3)
        test_every_fp8_code_is_multiplied_as_what_it_is(backends[b]);
    test_stored_int8_rows_keep_their_codes();
    test_bad_numbers_do_not_hide_in_codes();
    check_attention();
    check_codec();
    check_long_products();
    test_many_threads_on_few_cores();
    for (int b = 0; b < n_backends; b++) backends[b]->ops->destroy(backends[b]);
    os_release(arena, arena_bytes);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
