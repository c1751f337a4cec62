/* gpu.c: what a frame costs on a card, beside what the card's memory can do. Usage:
 *
 *   gpu FOLDER OUT.json [dry]      FOLDER: a model of the 7B's shapes with a codec of the real size
 *   gpu FOLDER follow              for each line of the input, 50 frames with the ring full: prints
 *                                  the median in ms, so that a peer can be timed in turn
 *
 * One engine of one session, its ring full of noise: frames from samples to samples, back to back and
 * at 12.5 Hz; the parts of the language model; the codec for 1 and 64 signals; the large products.
 * Floors are measured in the same process: a kernel that only reads, and a copy. cuBLASLt makes the
 * same products of the same numbers, where it is found: our results are checked against its own, and
 * its large product of matrices says what the card can multiply. Times are the wall's, from call to
 * result. dry: few and small, to try the program itself; the times mean nothing. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../csrc/cuda.h"
#include "../csrc/engine.h"
#include "../csrc/os.h"

#define MOST_TICKS 400
#define FRAME 1920

static int dry;
static FILE *out;
static int n_results;
static double read_rate;

_Noreturn static void stop(const char *what)
{
    fprintf(stderr, "gpu: %s: %s\n", what, moshi_error_detail());
    exit(1);
}

/* bytes 0: nothing is said of a share. */
static void report(const char *name, double ms, double p99, double bytes)
{
    double floor_ms = bytes / read_rate * 1e3;

    printf("%-34s %9.3f ms  p99 %9.3f", name, ms, p99);
    if (bytes > 0)
        printf("  %7.3f GB  %5.1f %% of the read rate", bytes / 1e9, 1e2 * floor_ms / ms);
    printf("\n");
    fprintf(out, "%s\n  \"%s\": {\"ms\": %.4f, \"p99_ms\": %.4f, \"bytes\": %.0f, \"share\": %.4f}",
            n_results++ ? "," : "{", name, ms, p99, bytes, bytes > 0 ? floor_ms / ms : 0.0);
    fflush(stdout);
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void report_times(const char *name, double *seconds, int n, double bytes)
{
    qsort(seconds, (size_t)n, sizeof *seconds, compare_doubles);
    report(name, 1e3 * seconds[n / 2], 1e3 * seconds[n * 99 / 100], bytes);
}

static uint64_t noise_state = 1;

static uint32_t noise(void)
{
    noise_state = noise_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(noise_state >> 32);
}

/* bf16 numbers of about 0.03 either way. */
static void make_noise(uint16_t *to, size_t count)
{
    for (size_t i = 0; i < count; ++i)
        to[i] = (uint16_t)((noise() & 0x8000u) | 0x3c00u | (noise() >> 20 & 0xffu));
}

/* ---- floors ----------------------------------------------------------------------------- */

static void measure_floors(struct backend *backend, const char *when)
{
    const struct cuda_library *cuda = cuda_load();
    double copy_rate;

    if (!cuda ||
        cuda->probe(backend, (size_t)(dry ? 1 << 16 : 1 << 30), os_clock, &read_rate, &copy_rate))
        stop("floors");
    printf("memory: %.0f GB/s read, %.0f GB/s copied\n", read_rate / 1e9, copy_rate / 1e9);
    fprintf(out, "%s\n  \"memory, %s\": {\"read_gb_s\": %.1f, \"copy_gb_s\": %.1f}",
            n_results++ ? "," : "{", when, read_rate / 1e9, copy_rate / 1e9);
}

/* ---- products --------------------------------------------------------------------------- */

#define MOST_DIFFERENCE 1e-3 /* of the root mean square: sums in another order */

struct product {
    struct op_linear op;
    int copies; /* more than the second cache holds */
};

static void product_stage(struct backend *backend, void *arg)
{
    const struct product *product = arg;
    struct op_linear op = product->op;
    size_t bytes = (size_t)op.weight.rows * (size_t)op.weight.cols * 2;

    for (int i = 0; i < product->copies; ++i) {
        op.weight.data = (const char *)product->op.weight.data + (size_t)i * bytes;
        backend->ops->linear(backend, &op);
    }
}

static void stop_if_different(const char *name, const float *ours, const float *theirs, int count)
{
    double most = 0, square = 0;

    for (int i = 0; i < count; ++i) {
        most = fmax(most, fabs((double)ours[i] - theirs[i]));
        square += (double)theirs[i] * theirs[i];
    }
    if (most > MOST_DIFFERENCE * sqrt(square / count)) {
        fprintf(stderr, "gpu: %s: off cuBLASLt's by %g, their root mean square is %g\n", name, most,
                sqrt(square / count));
        exit(1);
    }
    printf("%-34s differs from ours by up to %.1e of the root mean square\n", "",
           most / sqrt(square / count));
}

/* Its time, or why there is none; its results are compared with `ours`, unless that is NULL. */
static void measure_cublaslt(struct backend *backend, const char *name,
                             const struct cuda_peer_product *product, const float *ours)
{
    const size_t count = (size_t)product->n * (size_t)product->rows;
    const double weights = (double)product->rows * product->columns;
    char label[64], found[300];
    double seconds;

    snprintf(label, sizeof label, "%s, cuBLASLt", name);
    if (cuda_load()->cublaslt(backend, product, os_clock, &seconds, found, sizeof found)) {
        printf("%-34s not measured: %s\n", label, moshi_error_detail());
        fprintf(out, "%s\n  \"%s\": null", n_results++ ? "," : "{", label);
        return;
    }
    report(label, 1e3 * seconds, 1e3 * seconds, product->n == 1 ? 2 * weights : 0);
    printf("%-34s %9.1f TFLOP/s, %s\n", "", 2e-12 * weights * product->n / seconds, found);
    if (!ours) return;
    float *theirs = malloc(count * sizeof *theirs);

    if (!theirs) stop(name);
    backend->ops->download(backend, theirs, product->y, count * sizeof *theirs);
    if (backend->ops->sync(backend)) stop(name);
    stop_if_different(label, ours, theirs, (int)count);
    free(theirs);
}

/* What the card can multiply at best, where there are rows enough. */
static void measure_matrices(struct backend *backend)
{
    const struct backend_ops *ops = backend->ops;
    const int side = dry ? 64 : 8192;
    const size_t count = (size_t)side * (size_t)side;
    uint16_t *numbers = malloc(count * 2);
    void *a = ops->allocate(backend, count * 2), *b = ops->allocate(backend, count * 2);
    float *y = ops->allocate(backend, count * 4);

    if (!numbers || !a || !b || !y) stop("matrices");
    make_noise(numbers, count);
    ops->upload(backend, a, numbers, count * 2);
    ops->upload(backend, b, numbers, count * 2);
    measure_cublaslt(
        backend, "matrices 8192 x 8192 x 8192",
        &(struct cuda_peer_product){
            .n = side, .rows = side, .columns = side, .copies = 1, .weights = a, .x = b, .y = y},
        NULL);
    ops->release(backend, a, count * 2);
    ops->release(backend, b, count * 2);
    ops->release(backend, y, count * 4);
    free(numbers);
}

static void measure_product(struct backend *backend, const char *name, int rows, int columns)
{
    const struct backend_ops *ops = backend->ops;
    size_t bytes = (size_t)rows * (size_t)columns * 2, piece = (size_t)1 << 20;
    struct product product = {.copies = dry ? 2 : (int)(((size_t)512 << 20) / bytes) + 1};
    size_t all = bytes * (size_t)product.copies;
    char *weights = ops->allocate(backend, all);
    float *x = ops->allocate(backend, (size_t)columns * 4),
          *y = ops->allocate(backend, (size_t)rows * 4);
    void *narrow_x = ops->allocate(backend, (size_t)columns * 2);
    uint16_t *numbers = malloc(piece);
    uint32_t *wide = malloc((size_t)columns * sizeof *wide); /* the same as f32 */
    float *ours = malloc((size_t)rows * sizeof *ours);
    double seconds[20];

    if (!weights || !x || !y || !narrow_x || !numbers || !wide || !ours) stop(name);
    make_noise(numbers, (size_t)columns);
    for (int i = 0; i < columns; ++i) wide[i] = (uint32_t)numbers[i] << 16;
    ops->upload(backend, narrow_x, numbers, (size_t)columns * 2);
    ops->upload(backend, x, wide, (size_t)columns * 4);
    make_noise(numbers, piece / 2);
    for (size_t at = 0; at < all; at += piece)
        ops->upload(backend, weights + at, numbers, all - at < piece ? all - at : piece);
    product.op = (struct op_linear){
        .name = name,
        .n = 1,
        .x = x,
        .weight = {.format = WEIGHT_BF16, .rows = rows, .cols = columns, .data = weights},
        .y = y};
    for (int i = -3; i < 20; ++i) {
        double began = os_clock();

        if (ops->run(backend, 0, product_stage, &product, 0) || ops->sync(backend)) stop(name);
        if (i >= 0) seconds[i] = (os_clock() - began) / product.copies;
    }
    report_times(name, seconds, 20, (double)bytes);
    ops->download(backend, ours, y, (size_t)rows * sizeof *ours);
    measure_cublaslt(backend, name,
                     &(struct cuda_peer_product){.n = 1,
                                                 .rows = rows,
                                                 .columns = columns,
                                                 .copies = product.copies,
                                                 .weights = weights,
                                                 .x = narrow_x,
                                                 .y = y},
                     ours);
    ops->release(backend, weights, all);
    ops->release(backend, x, (size_t)columns * 4);
    ops->release(backend, y, (size_t)rows * 4);
    ops->release(backend, narrow_x, (size_t)columns * 2);
    free(numbers);
    free(wide);
    free(ours);
}

static void measure_products(struct backend *backend)
{
    const int small = dry ? 32 : 1;

    measure_product(backend, "product 12288 x 4096", 12288 / small, 4096 / small);
    measure_product(backend, "product 4096 x 4096", 4096 / small, 4096 / small);
    measure_product(backend, "product 22528 x 4096", 22528 / small, 4096 / small);
    measure_product(backend, "product 4096 x 11264", 4096 / small, 11264 / small);
    measure_product(backend, "product 32000 x 4096", 32000 / small, 4096 / small);
    measure_matrices(backend);
}

/* ---- frames ----------------------------------------------------------------------------- */

static void make_sound(float *pcm)
{
    for (int i = 0; i < FRAME; ++i) pcm[i] = (float)(int32_t)noise() * 0x1p-33f;
}

static void step(struct moshi_session *session)
{
    static float pcm[FRAME], sound[FRAME];
    struct moshi_frame frame = {.pcm = sound};

    make_sound(pcm);
    if (moshi_session_step(session, pcm, &frame)) stop("a step");
}

/* As if the call had been so long that its ring is full, its keys and values noise. */
static void fill_ring(struct moshi_engine *engine, struct moshi_session *session)
{
    struct lm_state *lm = &engine->lm;
    const struct backend_ops *ops = engine->backend->ops;
    const int slot = session->slot, columns = lm->delay.columns;
    const int64_t frames = lm->offset[slot] + (int64_t)(lm->context / columns + 1) * columns;
    const int32_t counted = (int32_t)frames;
    uint16_t *numbers = malloc(lm->kv.cache.page_bytes);
    const int ring = lm->kv.cache.pages_per_lane * KV_PAGE_POSITIONS;

    if (!numbers || kv_pages_grow(&lm->kv, slot, 0, ring)) stop("the ring");
    make_noise(numbers, lm->kv.cache.page_bytes / 2);
    for (int page = 0; page < lm->kv.cache.pages_per_lane; ++page)
        ops->upload(engine->backend,
                    (char *)lm->kv.cache.pages +
                        (size_t)lm->kv.host_table[slot * lm->kv.cache.pages_per_lane + page] *
                            lm->kv.cache.page_bytes,
                    numbers, lm->kv.cache.page_bytes);
    lm->offset[slot] = lm->positions[slot] = frames;
    ops->upload(engine->backend, lm->delay.offset + slot, &counted, sizeof counted);
    ops->upload(engine->backend, lm->position + slot, &counted, sizeof counted);
    if (ops->sync(engine->backend)) stop("the ring");
    free(numbers);
}

static void measure_frames(struct moshi_session *session, int ticks, int paced, const char *name,
                           double bytes)
{
    static double seconds[MOST_TICKS];

    for (int i = 0; i < (dry ? 1 : 20); ++i) step(session);
    double next = os_clock();

    for (int i = 0; i < ticks; ++i) {
        while (paced && os_clock() < next) continue;
        next += 0.08;
        double began = os_clock();

        step(session);
        seconds[i] = os_clock() - began;
    }
    report_times(name, seconds, ticks, bytes);
}

static void follow(struct moshi_model *model)
{
    struct moshi_engine *engine;
    struct moshi_session *session;
    double seconds[50];

    if (moshi_engine_create(model, &(struct moshi_engine_options){.max_sessions = 1}, &engine) ||
        moshi_session_create(engine, NULL, &session))
        stop("an engine");
    for (int i = 0; i < engine->lm.delay.columns; ++i) step(session);
    fill_ring(engine, session);
    for (int c = getchar(); c != EOF; c = getchar()) {
        if (c != '\n') continue;
        for (int i = -5; i < 50; ++i) {
            double began = os_clock();

            step(session);
            if (i >= 0) seconds[i] = os_clock() - began;
        }
        qsort(seconds, 50, sizeof *seconds, compare_doubles);
        printf("%.4f\n", 1e3 * seconds[25]);
        fflush(stdout);
    }
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
}

static void measure_part(struct moshi_engine *engine, const char *name, double bytes,
                         int (*part)(struct lm_state *, const struct lm_shape *))
{
    const struct lm_shape shape = {.slots = 1, .rows = 1, .heard = engine->device_codes};
    const int repeats = dry ? 1 : 20;
    double seconds[20];

    for (int i = -2; i < repeats; ++i) {
        double began = os_clock();

        for (int k = 0; k < repeats; ++k)
            if (part(&engine->lm, &shape)) stop(name);
        if (engine->backend->ops->sync(engine->backend)) stop(name);
        if (i >= 0) seconds[i] = (os_clock() - began) / repeats;
    }
    report_times(name, seconds, repeats, bytes);
}

static void measure_language(struct moshi_model *model)
{
    const struct moshi_model_info *info = moshi_model_get_info(model);
    struct moshi_engine *engine;
    struct moshi_session *session;
    struct moshi_memory memory;
    const int ticks = dry ? 2 : 300;

    if (moshi_engine_create(
            model, &(struct moshi_engine_options){.max_sessions = 1, .context = dry ? 64 : 0},
            &engine) ||
        moshi_session_create(engine, NULL, &session) || moshi_engine_memory(engine, &memory))
        stop("an engine");
    for (int i = 0; i < engine->lm.delay.columns; ++i) step(session);
    double weights = (double)(info->temporal_bytes + info->depth_bytes);

    measure_frames(session, ticks, 0, "frame, ring empty", weights);
    fill_ring(engine, session);
    measure_frames(session, ticks, 0, "frame, ring full", weights + (double)memory.kv_bytes);
    measure_frames(session, dry ? 2 : 100, 1, "frame, ring full, at 12.5 Hz",
                   weights + (double)memory.kv_bytes);
    measure_part(engine, "depth", (double)info->depth_bytes, lm_step_depth);
    measure_part(engine, "temporal, ring full",
                 (double)info->temporal_bytes + (double)memory.kv_bytes, lm_step_temporal);
    moshi_session_destroy(session);
    moshi_engine_destroy(engine);
}

/* ---- codec ------------------------------------------------------------------------------ */

static void measure_codec(struct moshi_model *model, int batch)
{
    struct moshi_engine *engine;
    struct mimi_stream *stream;
    const size_t samples = (size_t)batch * FRAME;
    float *pcm = malloc(samples * sizeof *pcm);
    int32_t *codes = malloc((size_t)batch * MOSHI_MAX_CODEBOOKS * sizeof *codes);
    const int ticks = dry ? 2 : 200;
    static double seconds[MOST_TICKS];
    char name[40];

    if (!pcm || !codes ||
        moshi_engine_create(model, &(struct moshi_engine_options){.max_sessions = 1}, &engine) ||
        mimi_stream_create(engine, batch, &stream))
        stop("a codec");
    for (int i = dry ? 0 : -20; i < ticks; ++i) {
        for (size_t at = 0; at < samples; at += FRAME) make_sound(pcm + at);
        double began = os_clock();

        if (mimi_stream_encode(stream, pcm, codes) ||
            mimi_stream_decode(stream, codes, moshi_model_get_info(model)->codebooks, pcm))
            stop("the codec");
        if (i >= 0) seconds[i] = os_clock() - began;
    }
    snprintf(name, sizeof name, "codec, %d signals", batch);
    report_times(name, seconds, ticks, 0);
    mimi_stream_destroy(stream);
    moshi_engine_destroy(engine);
    free(pcm);
    free(codes);
}

int main(int argc, char **argv)
{
    struct moshi_model *model;

    const int follows = argc == 3 && strcmp(argv[2], "follow") == 0;

    dry = argc > 3 && strcmp(argv[3], "dry") == 0;
    out = argc > 2 && !follows ? fopen(argv[2], "w") : NULL;
    if (!out && !follows) {
        fprintf(stderr, "usage: gpu FOLDER OUT.json [dry]\n       gpu FOLDER follow\n");
        return 2;
    }
    if (moshi_model_open(&(struct moshi_model_options){.folder = argv[1], .device = "cuda"},
                         &model))
        stop(argv[1]);
    if (follows) {
        follow(model);
        moshi_model_close(model);
        return 0;
    }
    measure_floors(model->backend, "before");
    measure_products(model->backend);
    measure_language(model);
    measure_codec(model, 1);
    measure_codec(model, dry ? 2 : 64);
    measure_floors(model->backend, "after");
    moshi_model_close(model);
    fprintf(out, "\n}\n");
    return fclose(out) != 0;
}
