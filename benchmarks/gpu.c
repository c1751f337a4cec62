/* gpu.c: what a frame costs on a card, beside what the card's memory can do. benchmarks/gpu.sh calls
 * it, one stage a process:
 *
 *   gpu FOLDER RESULTS products             large products of one row, beside cuBLASLt's
 *   gpu FOLDER RESULTS frames FORMAT        one session: frames, and the parts of the language model
 *   gpu FOLDER RESULTS codec N              N signals to codes and back
 *   gpu FOLDER RESULTS prefill              500 given frames at once, and one by one
 *   gpu FOLDER RESULTS many FORMAT N PACED  N sessions in one step; then for PACED seconds at 12.5 Hz
 *   gpu FOLDER RESULTS streams FORMAT       how many sessions without a voice keep up with their sound
 *   gpu FOLDER follow WHAT N                for each line of the input the median of some rounds of WHAT
 *                                           (frame, depth, codec), in ms, so that a peer is timed in turn
 *
 * FOLDER holds a model, FORMAT is its weights'. RESULTS gets a line of JSON for each thing that was
 * measured, at once. Floors are measured in the same process; what is timed has been compared with
 * the CPU in it, and is marked where the comparison failed. Times are the wall's, from call to result,
 * samples to samples. The variants of the environment's VARIANTS take turns with what is the case
 * without them. GPU_DRY=1: few and small. */
#include "gpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_DIFFERENCE 1e-3 /* of the root mean square: sums in another order */

static const char *folder;

/* Past the frames that have no output yet. */
static void step_in(struct company *company)
{
    const int frames = company->engine->lm.delay.columns;

    for (int i = 0; i < frames; ++i) company_step(company, company->n);
}

static struct company *open_companies(const struct format *format, int *n)
{
    char name[64];
    static struct company companies[MOST_VARIANTS];
    const char *names[MOST_VARIANTS];
    struct reference *reference = reference_make(folder, format);

    *n = variants(names);
    for (int i = 0; i < *n; ++i) {
        company_open(&companies[i], folder, "cuda", names[i], format, 1);
        if (i == 0) measure_floors(companies[i].model->backend, format->name);
        reference_compare(reference, &companies[i]);
        if (i > 0) continue;
        step_in(&companies[0]);
        company_fill(&companies[0]);
        snprintf(name, sizeof name, "memory of a session %s", format->name);
        company_memory(&companies[0], name);
        company_begin(&companies[0]);
    }
    reference_free(reference);
    return companies;
}

/* ---- products --------------------------------------------------------------------------- */

#define ROUNDS 5
#define RUNS 20 /* before a wait, which is short beside them; cuda/cublaslt.cu has as many */

struct product {
    struct op_linear op;
    int copies; /* more than the second cache holds, and long beside the gap between two runs */
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

static double distance(const float *ours, const float *theirs, int count)
{
    double most = 0, square = 0;

    for (int i = 0; i < count; ++i) {
        const double off = fabs((double)ours[i] - theirs[i]);

        if (!(off <= most)) most = off;
        square += (double)theirs[i] * theirs[i];
    }
    return most / sqrt(square / count);
}

static void *allocate(struct backend *backend, size_t bytes)
{
    void *memory = backend->ops->allocate(backend, bytes);

    if (!memory) stop("device memory");
    return memory;
}

/* What the card can multiply at best, where there are rows enough. */
static void measure_matrices(struct backend *backend)
{
    const struct backend_ops *ops = backend->ops;
    const int side = dry ? 64 : 8192;
    const size_t count = (size_t)side * (size_t)side;
    uint16_t *numbers = malloc(count * 2);
    void *a = allocate(backend, count * 2), *b = allocate(backend, count * 2);
    float *y = allocate(backend, count * 4);
    const struct cuda_peer_product product = {
        .n = side, .rows = side, .columns = side, .copies = 1, .weights = a, .x = b, .y = y};
    char found[300];
    double seconds;

    if (!numbers) stop("matrices");
    make_noise(numbers, count);
    ops->upload(backend, a, numbers, count * 2);
    ops->upload(backend, b, numbers, count * 2);
    if (cuda_load()->cublaslt(backend, &product, os_clock, &seconds, found, sizeof found))
        record("matrices", "\"missing\": \"%s\"", moshi_error_detail());
    else
        record("matrices", "\"side\": %d, \"tflops\": %.1f, \"by\": \"%s\"", side,
               2e-12 * (double)count * side / seconds, found);
    ops->release(backend, a, count * 2);
    ops->release(backend, b, count * 2);
    ops->release(backend, y, count * 4);
    free(numbers);
}

/* Ours and cuBLASLt's in turn, of the same numbers, as many runs before each wait. */
static void measure_product(struct backend *backend, int rows, int columns)
{
    static struct samples ours, theirs;
    const struct backend_ops *ops = backend->ops;
    const int small = dry ? 32 : 1, runs = dry ? 2 : RUNS;
    char name[40], found[300], peer[400];

    snprintf(name, sizeof name, "product %d x %d", rows, columns);
    rows /= small;
    columns /= small;
    size_t bytes = (size_t)rows * (size_t)columns * 2, piece = (size_t)1 << 20;
    struct product product = {.copies = dry ? 2 : (int)(((size_t)1 << 30) / bytes) + 1};
    size_t all = bytes * (size_t)product.copies;
    char *weights = allocate(backend, all);
    float *x = allocate(backend, (size_t)columns * 4), *y = allocate(backend, (size_t)rows * 4);
    void *narrow_x = allocate(backend, (size_t)columns * 2);
    uint16_t *numbers = malloc(piece);
    uint32_t *wide = malloc((size_t)columns * sizeof *wide); /* the same as f32 */
    float *results = malloc(2 * (size_t)rows * sizeof *results);
    const struct cuda_peer_product peers = {.n = 1,
                                            .rows = rows,
                                            .columns = columns,
                                            .copies = product.copies,
                                            .weights = weights,
                                            .x = narrow_x,
                                            .y = y};
    double seconds, off = 0;
    int missing = 0;

    if (!numbers || !wide || !results) stop(name);
    make_noise(numbers, (size_t)columns);
    for (int i = 0; i < columns; ++i) wide[i] = (uint32_t)numbers[i] << 16;
    ops->upload(backend, narrow_x, numbers, (size_t)columns * 2);
    ops->upload(backend, x, wide, (size_t)columns * 4);
    for (size_t at = 0; at < all; at += piece) {
        make_noise(numbers, piece / 2);
        ops->upload(backend, weights + at, numbers, all - at < piece ? all - at : piece);
    }
    product.op = (struct op_linear){
        .name = name,
        .n = 1,
        .x = x,
        .weight = {.format = WEIGHT_BF16, .rows = rows, .cols = columns, .data = weights},
        .y = y};
    ours.n = theirs.n = 0;
    for (int round = 0; round < (dry ? 1 : ROUNDS); ++round) {
        ops->clear(backend, y, 0xff, (size_t)rows * 4);
        for (int i = dry ? 0 : -3; i < (dry ? 2 : 20); ++i) {
            double began = os_clock();

            for (int run = 0; run < runs; ++run) /* of the same bytes: looked at once */
                if (ops->run(backend, 0, product_stage, &product, sizeof product)) stop(name);
            if (ops->sync(backend)) stop(name);
            if (i >= 0) samples_add(&ours, (os_clock() - began) / (runs * product.copies));
        }
        ops->download(backend, results, y, (size_t)rows * 4);
        if (missing) continue;
        ops->clear(backend, y, 0xff, (size_t)rows * 4);
        missing = cuda_load()->cublaslt(backend, &peers, os_clock, &seconds, found, sizeof found);
        if (missing) continue;
        samples_add(&theirs, seconds);
        ops->download(backend, results + rows, y, (size_t)rows * 4);
        if (ops->sync(backend)) stop(name);
        off = distance(results, results + rows, rows);
    }
    if (!missing && !(off <= MOST_DIFFERENCE))
        mistake("%s is off cuBLASLt's by %g of the root mean square", name, off);
    if (missing)
        snprintf(peer, sizeof peer, "\"peer\": \"%s\"", moshi_error_detail());
    else
        snprintf(peer, sizeof peer,
                 "\"peer\": \"%s\", \"peer_ms\": %.4f, \"ratio\": %.4f, "
                 "\"off\": %.1e",
                 found, 1e3 * samples_median(&theirs),
                 samples_median(&theirs) / samples_median(&ours), off);
    report(name, "", &ours, (double)bytes, "%s", peer);
    ops->release(backend, weights, all);
    ops->release(backend, x, (size_t)columns * 4);
    ops->release(backend, y, (size_t)rows * 4);
    ops->release(backend, narrow_x, (size_t)columns * 2);
    free(numbers);
    free(wide);
    free(results);
}

static void products(void)
{
    struct backend *backend;

    if (cuda_backend_create("cuda", &backend)) stop("a card");
    measure_floors(backend, "before the products");
    measure_product(backend, 12288, 4096);
    measure_product(backend, 4096, 4096);
    measure_product(backend, 22528, 4096);
    measure_product(backend, 4096, 11264);
    measure_product(backend, 32000, 4096);
    measure_matrices(backend);
    measure_floors(backend, "after the products");
    backend->ops->destroy(backend);
}

/* ---- one session ------------------------------------------------------------------------ */

static void warm(struct company *company, int ticks)
{
    for (int i = 0; i < (dry ? 0 : ticks); ++i) company_step(company, company->n);
}

/* In turn, some frames at a time. */
static void measure_frames(struct company *companies, int n, int blocks, int frames,
                           const char *name)
{
    static struct samples samples[MOST_VARIANTS];
    const int full = companies[0].engine->lm.offset[0] > companies[0].engine->lm.context;

    for (int i = 0; i < n; ++i) samples[i].n = 0;
    for (int block = 0; block < (dry ? 1 : blocks); ++block)
        for (int i = 0; i < n; ++i) {
            warm(&companies[i], 3);
            for (int t = 0; t < (dry ? 1 : frames); ++t)
                samples_add(&samples[i], company_step(&companies[i], companies[i].n));
        }
    for (int i = 0; i < n; ++i)
        report(name, companies[i].variant, &samples[i],
               company_bytes(&companies[i], full ? companies[i].n : 0), "%s", "");
}

/* One part of a frame again and again: after it the sessions are of no more use. */
static void measure_part(struct company *companies, int n, const char *name, double bytes,
                         int (*part)(struct lm_state *, const struct lm_shape *))
{
    static struct samples samples[MOST_VARIANTS];
    const int repeats = dry ? 1 : 20;

    for (int i = 0; i < n; ++i) samples[i].n = 0;
    for (int block = 0; block < repeats; ++block)
        for (int i = 0; i < n; ++i) {
            struct moshi_engine *engine = companies[i].engine;
            const struct lm_shape shape = {.slots = 1, .rows = 1, .heard = engine->device_codes};

            for (int k = -1; k < repeats; ++k) {
                double began = os_clock();

                if (part(&engine->lm, &shape) || engine->backend->ops->sync(engine->backend))
                    stop(name);
                if (k >= 0) samples_add(&samples[i], os_clock() - began);
            }
        }
    for (int i = 0; i < n; ++i) report(name, companies[i].variant, &samples[i], bytes, "%s", "");
}

/* Frames that come every 80 ms, all sessions' at the same moment; those are late whose answer is not
 * there when the next one comes. */
static void measure_paced(struct company *company, double seconds, const char *name)
{
    static struct samples samples;
    const int ticks = dry ? 1 : (int)(seconds / FRAME_SECONDS);
    double due = os_clock();
    int late = 0;

    samples.n = 0;
    for (int i = 0; i < ticks; ++i) {
        while (os_clock() < due) continue;
        company_step(company, company->n);
        const double answered = os_clock() - due;

        late += answered > FRAME_SECONDS;
        samples_add(&samples, answered);
        due += FRAME_SECONDS;
    }
    report(name, company->variant, &samples, company_bytes(company, company->n),
           "\"sessions\": %d, \"seconds\": %.0f, \"late\": %d", company->n, seconds, late);
}

static void frames(const char *format_name)
{
    const struct format format = format_named(format_name);
    const char *kind = format.name;
    struct company *companies;
    char name[64];
    int n;

    companies = open_companies(&format, &n);
    const struct moshi_model_info *info = moshi_model_get_info(companies[0].model);

    for (int i = 0; i < n; ++i) {
        step_in(&companies[i]);
        warm(&companies[i], 20);
    }
    snprintf(name, sizeof name, "frame %s, ring empty", kind);
    measure_frames(companies, n, 2, 50, name);
    for (int i = 0; i < n; ++i) {
        company_fill(&companies[i]);
        warm(&companies[i], 20);
    }
    snprintf(name, sizeof name, "frame %s", kind);
    measure_frames(companies, n, 6, 50, name);
    snprintf(name, sizeof name, "frame %s, paced", kind);
    measure_paced(&companies[0], 8, name);
    snprintf(name, sizeof name, "temporal %s", kind);
    measure_part(companies, n, name, company_bytes(&companies[0], 1) - (double)info->depth_bytes,
                 lm_step_temporal);
    snprintf(name, sizeof name, "depth %s", kind);
    measure_part(companies, n, name, (double)info->depth_bytes, lm_step_depth);
    measure_floors(companies[0].model->backend, "after the frames");
    for (int i = 0; i < n; ++i) company_close(&companies[i]);
}

/* ---- codec ------------------------------------------------------------------------------ */

struct codec {
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct mimi_stream *stream;
    int signals, codebooks;
    float *pcm, *sound;
    int32_t *codes;
};

static void codec_open(struct codec *codec, const char *device, int signals)
{
    const size_t samples = (size_t)signals * FRAME;

    *codec = (struct codec){.signals = signals};
    if (moshi_model_open(
            &(struct moshi_model_options){
                .folder = folder, .device = device, .codec_only = 1, .mimi_codebooks = 8},
            &codec->model) ||
        moshi_engine_create(codec->model, NULL, &codec->engine) ||
        mimi_stream_create(codec->engine, signals, &codec->stream))
        stop("a codec");
    codec->codebooks = moshi_model_get_info(codec->model)->codebooks;
    codec->pcm = malloc(samples * sizeof(float));
    codec->sound = malloc(samples * sizeof(float));
    codec->codes = malloc((size_t)signals * MOSHI_MAX_CODEBOOKS * sizeof(int32_t));
    if (!codec->pcm || !codec->sound || !codec->codes) stop("a codec");
}

static void codec_close(struct codec *codec)
{
    mimi_stream_destroy(codec->stream);
    moshi_engine_destroy(codec->engine);
    moshi_model_close(codec->model);
    free(codec->pcm);
    free(codec->sound);
    free(codec->codes);
}

/* A frame of each signal; the last hears what the first does. encode: its part of the seconds. */
static double codec_step(struct codec *codec, int tick, double *encode)
{
    const int last = codec->signals - 1;

    for (int i = 0; i <= last; ++i)
        memcpy(codec->pcm + i * FRAME, sound_of(i == last ? 0 : i, tick), FRAME * sizeof(float));
    double began = os_clock();

    if (mimi_stream_encode(codec->stream, codec->pcm, codec->codes)) stop("codes");
    *encode = os_clock() - began;
    if (mimi_stream_decode(codec->stream, codec->codes, codec->codebooks, codec->sound))
        stop("sound");
    return os_clock() - began;
}

/* The first and the last signal beside the CPU's. */
static void compare_codec(struct codec *codec)
{
    const int last = codec->signals - 1, levels = codec->codebooks;
    struct codec cpu;
    double encode, most = 0;
    int same = 1;

    codec_open(&cpu, "cpu", 1);
    for (int t = 0; t < 5; ++t) {
        codec_step(&cpu, t, &encode);
        memset(codec->codes, 0xff, (size_t)(codec->signals * levels) * sizeof(int32_t));
        memset(codec->sound, 0xff, (size_t)codec->signals * FRAME * sizeof(float));
        codec_step(codec, t, &encode);
        for (int i = 0; i <= last; i += last ? last : 1) {
            const double off = distance(codec->sound + i * FRAME, cpu.sound, FRAME);

            same &= memcmp(codec->codes + i * levels, cpu.codes,
                           (size_t)levels * sizeof(int32_t)) == 0;
            if (!(off <= most)) most = off;
        }
    }
    codec_close(&cpu);
    record("parity", "\"of\": \"codec\", \"signals\": %d, \"codes\": %s, \"sound\": %.2e",
           codec->signals, same ? "true" : "false", most);
    if (!same || !(most <= MOST_DIFFERENCE))
        mistake("the codec of %d signals is not the CPU's: codes %s, the sound is %g off",
                codec->signals, same ? "equal" : "differ", most);
}

static void measure_codec(int signals)
{
    static struct samples all, encoding, decoding;
    struct codec codec;
    char name[40];

    codec_open(&codec, "cuda", signals);
    measure_floors(codec.model->backend, "codec");
    compare_codec(&codec);
    for (int i = dry ? 0 : -150; i < (dry ? 2 : 300); ++i) { /* its ring has 250 half frames */
        double encode, both = codec_step(&codec, i + 150, &encode);

        if (i < 0) continue;
        samples_add(&all, both);
        samples_add(&encoding, encode);
        samples_add(&decoding, both - encode);
    }
    snprintf(name, sizeof name, "codec %d", signals);
    report(name, "", &all, 0, "\"encode_ms\": %.4f, \"decode_ms\": %.4f",
           1e3 * samples_median(&encoding), 1e3 * samples_median(&decoding));
    codec_close(&codec);
}

/* ---- given frames ----------------------------------------------------------------------- */

#define PROMPT 500
#define MOST_STREAMS 33

/* tokens: one stream after the other, text first, of `frames` each. */
static void give(struct company *company, const int32_t *tokens, int length, int at, int count)
{
    const struct moshi_model_info *info = moshi_model_get_info(company->model);
    static int32_t piece[MOST_STREAMS * PROMPT];

    for (int s = 0; s <= info->n_q; ++s)
        memcpy(piece + s * count, tokens + s * length + at, (size_t)count * sizeof *piece);
    if (moshi_session_prefill(company->sessions[0], count, piece, piece + count,
                              piece + (1 + info->dep_q) * count, NULL))
        stop("given frames");
}

/* What it would say next, forced to nothing. */
static void next_logits(struct company *company, float *logits)
{
    const struct moshi_model_info *info = moshi_model_get_info(company->model);

    company_step(company, 1);
    if (moshi_session_logits(company->sessions[0], logits, logits + info->text_card))
        stop("logits after given frames");
}

static void begin_greedy(struct company *company)
{
    struct moshi_session_options options;

    moshi_session_destroy(company->sessions[0]);
    moshi_session_options_init(company->model, &options);
    options.text_temperature = options.audio_temperature = 0;
    options.keep_logits = 1;
    if (moshi_session_create(company->engine, &options, &company->sessions[0])) stop("a session");
    company->tick = 0;
}

/* The same frames at once and one by one leave it in the same state, and with every variant in that
 * of the first, whose logits are kept. So many that they go through the products of many rows, whose
 * passes are what is timed. */
static void compare_given(struct company *company, const int32_t *tokens, int length,
                          float **first_logits)
{
    const struct moshi_model_info *info = moshi_model_get_info(company->model);
    const int count = info->text_card + info->dep_q * info->card, few = dry ? 5 : 200;
    const size_t bytes = (size_t)count * sizeof(float);
    float *logits = malloc(2 * bytes);

    if (!logits) stop("logits");
    begin_greedy(company);
    give(company, tokens, length, 0, few);
    next_logits(company, logits);
    begin_greedy(company);
    for (int t = 0; t < few; ++t) give(company, tokens, length, t, 1);
    next_logits(company, logits + count);
    const double off = distance(logits, logits + count, count);
    const int same = !*first_logits || memcmp(logits, *first_logits, bytes) == 0;

    record("parity",
           "\"of\": \"prefill\", \"variant\": \"%s\", \"frames\": %d, \"logits\": %.2e, "
           "\"same_bits\": %s",
           company->variant, few, off, same ? "true" : "false");
    if (!(off <= MOST_DIFFERENCE))
        mistake("%d given frames at once and one by one: logits are %g apart", few, off);
    if (!same)
        mistake("%d given frames with switches \"%s\": logits have other bits than without", few,
                company->variant);
    if (*first_logits)
        free(logits);
    else
        *first_logits = logits;
}

/* All of the tokens in a new call, `count` frames at a time; its seconds. mapped: it has its pages
 * already, which otherwise are mapped within that time. */
static double give_all(struct company *company, const int32_t *tokens, int length, int count,
                       int mapped)
{
    struct moshi_engine *engine = company->engine;

    company_begin(company);
    if ((mapped && kv_pages_grow(&engine->lm.kv, 0, 0, length)) ||
        engine->backend->ops->sync(engine->backend))
        stop("a new call");
    const double began = os_clock();

    for (int at = 0; at < length; at += count) give(company, tokens, length, at, count);
    return os_clock() - began;
}

static void prefill(void)
{
    static int32_t tokens[MOST_STREAMS * PROMPT];
    static struct samples given[MOST_VARIANTS], mapped[MOST_VARIANTS];
    static struct company companies[MOST_VARIANTS];
    const struct format format = format_named("bf16");
    const char *names[MOST_VARIANTS];
    const int n = variants(names), most = dry ? 20 : PROMPT;
    float *logits = NULL;

    for (int i = 0; i < n; ++i) {
        company_open(&companies[i], folder, "cuda", names[i], &format, 1);
        if (i == 0) measure_floors(companies[0].model->backend, "prefill");
        const struct moshi_model_info *info = moshi_model_get_info(companies[0].model);

        for (int at = 0; i == 0 && at < (1 + info->n_q) * most; ++at)
            tokens[at] = (int32_t)(noise() %
                                   (uint32_t)(at < most ? info->text_card_in : info->card));
        compare_given(&companies[i], tokens, most, &logits);
    }
    free(logits);
    for (int round = dry ? 0 : -1; round < (dry ? 1 : 5); ++round)
        for (int i = 0; i < n; ++i) {
            const double whole = give_all(&companies[i], tokens, most, most, 0);
            const double later = give_all(&companies[i], tokens, most, most, 1);

            if (round < 0) continue;
            samples_add(&given[i], whole);
            samples_add(&mapped[i], later);
        }
    const double steps_s = give_all(&companies[0], tokens, most, 1, 0);
    /* Heads are no part of it. */
    const double bytes = (double)moshi_model_get_info(companies[0].model)->temporal_bytes -
                         (double)matrix_bytes(&companies[0].model->lm.text_head);

    for (int i = 0; i < n; ++i) {
        const double median = samples_median(&given[i]);

        report("prefill", names[i], &given[i], bytes,
               "\"frames\": %d, \"mapped_ms\": %.4f, \"stepwise_ms\": %.1f, \"ratio\": %.1f, "
               "\"tflops\": %.1f",
               most, 1e3 * samples_median(&mapped[i]), 1e3 * steps_s, steps_s / median,
               1e-12 * bytes * most / median); /* a weight: 2 bytes, 2 operations */
        company_close(&companies[i]);
    }
}

/* ---- many sessions ---------------------------------------------------------------------- */

/* Frames that come every 80 ms, spread over that time, as callers speak. */
static void measure_spread(struct company *company, double seconds, const char *name)
{
    static struct samples samples;
    const int n = company->n, turns = dry ? 1 : (int)(seconds / FRAME_SECONDS);
    double *due = malloc((size_t)n * sizeof *due);
    int *turn = calloc((size_t)n, sizeof *turn), *waits = calloc((size_t)n, sizeof *waits);
    int late = 0, left = n * turns;
    const double began = os_clock();

    if (!due || !turn || !waits) stop(name);
    samples.n = 0;
    for (int i = 0; i < n; ++i) due[i] = began + FRAME_SECONDS * i / n;
    while (left)
        for (int i = 0; i < n; ++i) {
            if (turn[i] == turns) continue;
            if (!waits[i] && os_clock() >= due[i]) {
                company->frames[i].pcm = company->voices + i * FRAME;
                if (moshi_session_submit(company->sessions[i], sound_of(i, turn[i]),
                                         &company->frames[i]))
                    stop("a frame");
                waits[i] = 1;
            }
            if (!waits[i] || !moshi_session_ready(company->sessions[i])) continue;
            if (moshi_session_wait(company->sessions[i])) stop("an answer");
            const double answered = os_clock() - due[i];

            late += answered > FRAME_SECONDS;
            samples_add(&samples, answered);
            due[i] += FRAME_SECONDS;
            waits[i] = 0;
            ++turn[i];
            --left;
        }
    report(name, company->variant, &samples, 0, "\"sessions\": %d, \"seconds\": %.0f, \"late\": %d",
           n, seconds, late);
    free(due);
    free(turn);
    free(waits);
}

/* Two engines of that size don't fit beside each other: variants take turns by being opened anew. */
static void many(const char *format_name, int n, double seconds)
{
    static struct samples samples[MOST_VARIANTS];
    const struct format format = format_named(format_name);
    const char *names[MOST_VARIANTS];
    const int n_variants = variants(names), rounds = n_variants > 1 && !dry ? 2 : 1;
    struct reference *reference = reference_make(folder, &format);
    double bytes = 0;
    char name[64];

    for (int round = 0; round < rounds; ++round)
        for (int i = n_variants - 1; i >= 0; --i) { /* the last is the one that is paced */
            struct company company;
            const int paced = round == rounds - 1 && i == 0 && seconds > 0;

            company_open(&company, folder, "cuda", names[i], &format, n);
            if (round == 0) {
                if (i == n_variants - 1) measure_floors(company.model->backend, "many");
                reference_compare(reference, &company);
            }
            step_in(&company);
            if (paced) { /* they take their memory page by page, all in the same frame */
                snprintf(name, sizeof name, "%d sessions %s, beginning", n, format.name);
                measure_paced(&company, seconds / 4, name);
            }
            company_fill(&company);
            warm(&company, 20);
            snprintf(name, sizeof name, "memory of %d sessions %s", n, format.name);
            if (round == 0) company_memory(&company, name);
            bytes = company_bytes(&company, n);
            for (int t = 0; t < (dry ? 1 : 150); ++t)
                samples_add(&samples[i], company_step(&company, n));
            snprintf(name, sizeof name, "%d sessions %s", n, format.name);
            if (round == rounds - 1)
                report(name, names[i], &samples[i], bytes, "\"sessions\": %d", n);
            if (paced) {
                snprintf(name, sizeof name, "%d sessions %s, paced", n, format.name);
                measure_paced(&company, seconds, name);
                snprintf(name, sizeof name, "%d sessions %s, spread", n, format.name);
                measure_spread(&company, seconds / 4, name);
            }
            company_close(&company);
        }
    reference_free(reference);
}

/* ---- streams ---------------------------------------------------------------------------- */

#define SPARE_BYTES 4e9 /* for what is not a session's: graphs, the library's own */
#define MOST_STREAMS_AT_ONCE 3072

/* p99 of steps of the first n, back to back; they keep up where it is below a frame's time. */
static double try_streams(struct company *company, int n, int ticks, struct samples *samples)
{
    samples->n = 0;
    for (int t = 0; t < (dry ? 0 : 3); ++t) company_step(company, n);
    for (int t = 0; t < (dry ? 1 : ticks); ++t) samples_add(samples, company_step(company, n));
    samples_median(samples);
    return samples->seconds[samples->n * 99 / 100];
}

/* How many sessions, up to `most`, the card has pages for beside what the engine holds already. */
static int room_for(const struct company *company, int most)
{
    const struct moshi_engine *engine = company->engine;
    const struct kv_cache *lm = &engine->lm.kv.cache, *codec = &engine->mimi.encoder_kv.cache;
    const double each = (double)lm->pages_per_lane * (double)lm->page_bytes +
                        (double)codec->pages_per_lane * (double)codec->page_bytes;
    const int64_t left = engine->backend->ops->memory_free(engine->backend);
    const double room = ((double)left - (dry ? 0 : SPARE_BYTES)) / each;

    return room < most ? (int)room : most;
}

static void measure_streams(const struct format *format, const struct reference *reference,
                            const char *variant)
{
    static struct samples samples;
    struct company company;
    char name[64];
    int kept = 0;

    company_open(&company, folder, "cuda", variant, format, 1);
    measure_floors(company.model->backend, "streams");
    int most = room_for(&company, dry ? 3 : MOST_STREAMS_AT_ONCE);

    company_close(&company);
    if (most > 0) {
        company_open(&company, folder, "cuda", variant, format, most);
        most = room_for(&company, most);
    }
    if (most < 1) {
        fprintf(stderr, "gpu: the card has no room for a stream\n");
        exit(1);
    }
    while (company.n > most) moshi_session_destroy(company.sessions[--company.n]);
    reference_compare(reference, &company);
    step_in(&company);
    company_fill(&company);
    snprintf(name, sizeof name, "memory of streams %s", format->name);
    company_memory(&company, name);
    int low = 0, high = most + 1; /* low keep up, high don't */

    for (int n = most; low + 1 < high && high - low > most / 64; n = (low + high) / 2) {
        const double p99 = try_streams(&company, n, 60, &samples);

        record("streams tried", "\"of\": \"%s\", \"streams\": %d, \"p99_ms\": %.2f", format->name,
               n, 1e3 * p99);
        if (p99 < FRAME_SECONDS)
            low = n;
        else
            high = n;
    }
    for (int i = 0; i < 5 && low > 0 && !kept; ++i) {
        kept = try_streams(&company, low, 250, &samples) < FRAME_SECONDS;
        if (!kept) low -= low / 32 + 1;
    }
    snprintf(name, sizeof name, "streams %s", format->name);
    if (samples.n)
        report(name, variant, &samples, company_bytes(&company, low),
               "\"streams\": %d, \"room_for\": %d", kept ? low : 0, most);
    company_close(&company);
}

static void streams(const char *format_name)
{
    const struct format format = format_named(format_name);
    struct reference *reference = reference_make(folder, &format);
    const char *names[MOST_VARIANTS];
    const int n = variants(names);

    for (int i = 0; i < n; ++i) measure_streams(&format, reference, names[i]);
    reference_free(reference);
}

/* ---- beside a peer ---------------------------------------------------------------------- */

static struct company followed;
static struct codec followed_codec;

static double step_frame(void)
{
    return company_step(&followed, followed.n);
}

static double step_depth(void)
{
    struct moshi_engine *engine = followed.engine;
    const struct lm_shape shape = {.slots = followed.n, .rows = followed.n};
    double began = os_clock();

    if (lm_step_depth(&engine->lm, &shape) || engine->backend->ops->sync(engine->backend))
        stop("the depth pass");
    return os_clock() - began;
}

static double step_codec(void)
{
    static int tick;
    double encode;

    return codec_step(&followed_codec, tick++, &encode);
}

static void follow(const char *what, int n)
{
    static struct samples samples;
    const struct format format = format_named("bf16");
    const int codec = strcmp(what, "codec") == 0;
    double (*step)(void) = codec                        ? step_codec
                           : strcmp(what, "depth") == 0 ? step_depth
                                                        : step_frame;

    if (codec) {
        codec_open(&followed_codec, "cuda", n);
        for (int i = 0; i < (dry ? 1 : 150); ++i) step();
    } else {
        company_open(&followed, folder, "cuda", "", &format, n);
        step_in(&followed);
        company_fill(&followed);
    }
    printf("ready\n");
    fflush(stdout);
    for (int c = getchar(); c != EOF; c = getchar()) {
        if (c != '\n') continue;
        samples.n = 0;
        for (int i = dry ? 0 : -5; i < (dry ? 1 : 50); ++i) {
            const double seconds = step();

            if (i >= 0) samples_add(&samples, seconds);
        }
        printf("%.4f\n", 1e3 * samples_median(&samples));
        fflush(stdout);
    }
    if (codec)
        codec_close(&followed_codec);
    else
        company_close(&followed);
}

/* ---- which stage ------------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    const char *stage = argc > 3 ? argv[3] : "", *format = argc > 4 ? argv[4] : "bf16";

    dry = getenv("GPU_DRY") != NULL;
    folder = argc > 1 ? argv[1] : "";
    if (argc == 5 && strcmp(argv[2], "follow") == 0) {
        follow(argv[3], atoi(argv[4]));
        return 0;
    }
    if (argc > 3) results_open(argv[2]);
    if (strcmp(stage, "products") == 0)
        products();
    else if (strcmp(stage, "frames") == 0)
        frames(format);
    else if (strcmp(stage, "codec") == 0)
        measure_codec(argc > 4 ? atoi(argv[4]) : 1);
    else if (strcmp(stage, "prefill") == 0)
        prefill();
    else if (strcmp(stage, "many") == 0 && argc > 5)
        many(format, atoi(argv[5]), argc > 6 ? atof(argv[6]) : 0);
    else if (strcmp(stage, "streams") == 0)
        streams(format);
    else {
        fprintf(stderr, "usage: gpu FOLDER RESULTS STAGE [...], as the file's header says\n");
        return 2;
    }
    if (mistakes) printf("gpu: %d results are not what they should be, as said above\n", mistakes);
    return mistakes != 0;
}
