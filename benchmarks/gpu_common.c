/* gpu_common.c: see gpu.h. */
#include "gpu.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int dry, mistakes;
double read_rate;

static FILE *results;

void stop(const char *what)
{
    fflush(stdout);
    fprintf(stderr, "gpu: %s: %s\n", what, moshi_error_detail());
    exit(1);
}

void mistake(const char *sentence, ...)
{
    va_list arguments;

    ++mistakes;
    va_start(arguments, sentence);
    printf("gpu: ");
    vprintf(sentence, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
}

static void *take(size_t bytes)
{
    void *memory = calloc(bytes + 1, 1);

    if (!memory) {
        fprintf(stderr, "gpu: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memory;
}

/* ---- results ---------------------------------------------------------------------------- */

void results_open(const char *path)
{
    results = fopen(path, "a");
    if (!results) {
        fprintf(stderr, "gpu: %s can't be written to\n", path);
        exit(1);
    }
}

void record(const char *name, const char *fields, ...)
{
    char text[1024];
    va_list arguments;

    va_start(arguments, fields);
    vsnprintf(text, sizeof text, fields, arguments);
    va_end(arguments);
    printf("%-34s %s\n", name, text);
    fflush(stdout);
    if (!results) return;
    fprintf(results, "{\"name\": \"%s\"%s%s}\n", name, text[0] ? ", " : "", text);
    fflush(results);
}

void samples_add(struct samples *samples, double seconds)
{
    if (samples->n < MOST_SAMPLES) samples->seconds[samples->n++] = seconds;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double samples_median(struct samples *samples)
{
    qsort(samples->seconds, (size_t)samples->n, sizeof(double), compare_doubles);
    return samples->seconds[samples->n / 2];
}

void report(const char *name, const char *variant, struct samples *samples, double bytes,
            const char *fields, ...)
{
    const double median = samples_median(samples), floor_s = read_rate > 0 ? bytes / read_rate : 0;
    char text[512], share[160] = "";
    va_list arguments;

    va_start(arguments, fields);
    vsnprintf(text, sizeof text, fields, arguments);
    va_end(arguments);
    if (floor_s > 0)
        snprintf(share, sizeof share, ", \"bytes\": %.0f, \"bytes_ms\": %.4f, \"share\": %.4f",
                 bytes, 1e3 * floor_s, floor_s / median);
    record(name,
           "\"variant\": \"%s\", \"p50_ms\": %.4f, \"p99_ms\": %.4f, \"max_ms\": %.4f, "
           "\"n\": %d%s%s%s%s",
           variant, 1e3 * median, 1e3 * samples->seconds[samples->n * 99 / 100],
           1e3 * samples->seconds[samples->n - 1], samples->n,
           mistakes ? ", \"verified\": false" : "", share, text[0] ? ", " : "", text);
}

/* ---- noise and floors ------------------------------------------------------------------- */

#define SOUNDS 32

static uint64_t noise_state = 1;

uint32_t noise(void)
{
    noise_state = noise_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(noise_state >> 32);
}

void make_noise(uint16_t *to, size_t count)
{
    for (size_t i = 0; i < count; ++i)
        to[i] = (uint16_t)((noise() & 0x8000u) | 0x3c00u | (noise() >> 20 & 0xffu));
}

const float *sound_of(int caller, int tick)
{
    static float sounds[SOUNDS][FRAME];
    static int made;

    if (!made)
        for (int i = 0; i < SOUNDS * FRAME; ++i)
            sounds[i / FRAME][i % FRAME] = (float)(int32_t)noise() * 0x1p-33f;
    made = 1;
    return sounds[(7 * tick + caller) % SOUNDS];
}

void measure_floors(struct backend *backend, const char *when)
{
    const struct cuda_library *cuda = cuda_load();
    double copy_rate;

    if (!cuda ||
        cuda->probe(backend, (size_t)(dry ? 1 << 16 : 1 << 30), os_clock, &read_rate, &copy_rate))
        stop("the read rate");
    record("memory", "\"when\": \"%s\", \"read_gb_s\": %.1f, \"copy_gb_s\": %.1f", when,
           read_rate / 1e9, copy_rate / 1e9);
}

/* ---- sessions in one engine ------------------------------------------------------------- */

struct format format_named(const char *name)
{
    static const struct format formats[] = {{"bf16+bf16", MOSHI_BF16, MOSHI_BF16},
                                            {"int8+int8", MOSHI_INT8, MOSHI_INT8},
                                            {"q8+int8", MOSHI_Q8, MOSHI_INT8},
                                            {"q4+int8", MOSHI_Q4, MOSHI_INT8}};

    for (size_t i = 0; i < sizeof formats / sizeof *formats; ++i)
        if (strncmp(formats[i].name, name, strlen(name)) == 0) return formats[i];
    fprintf(stderr, "gpu: the format is \"%s\", expected bf16, int8, q8 or q4\n", name);
    exit(2);
}

int variants(const char *names[MOST_VARIANTS])
{
    static char text[1024];
    int n = 1;

    names[0] = "";
    snprintf(text, sizeof text, "%s", getenv("VARIANTS") ? getenv("VARIANTS") : "");
    for (char *word = strtok(text, " "); word && n < MOST_VARIANTS; word = strtok(NULL, " "))
        names[n++] = word;
    return n;
}

static void set_switches(const char *variant, int on)
{
    char text[256], *rest = text;

    snprintf(text, sizeof text, "%s", variant);
    for (char *name; (name = strtok_r(rest, ",", &rest)) != NULL;) {
        char *value = strchr(name, '=');

        if (!value) continue;
        *value = '\0';
        if (on)
            setenv(name, value + 1, 1);
        else
            unsetenv(name);
    }
}

static void open_sessions(struct company *company, int greedy)
{
    struct moshi_session_options options;

    for (int i = 0; i < company->n; ++i) {
        moshi_session_options_init(company->model, &options);
        options.seed = 1 + (uint64_t)i;
        if (greedy) options.text_temperature = options.audio_temperature = 0;
        options.keep_logits = greedy && (i == 0 || i == company->n - 1);
        if (moshi_session_create(company->engine, &options, &company->sessions[i]))
            stop("a session");
    }
    company->tick = 0;
}

static void close_sessions(struct company *company)
{
    for (int i = 0; i < company->n; ++i) moshi_session_destroy(company->sessions[i]);
}

void company_open(struct company *company, const char *folder, const char *device,
                  const char *variant, const struct format *format, int n)
{
    const size_t count = (size_t)n;

    *company = (struct company){.variant = variant, .n = n};
    set_switches(variant, 1);
    if (moshi_model_open(&(struct moshi_model_options){.folder = folder,
                                                       .device = device,
                                                       .dtype = format->weights},
                         &company->model))
        stop(folder);
    set_switches(variant, 0);
    struct backend *backend = company->model->backend;

    company->free_before = backend->ops->memory_free(backend);
    if (moshi_engine_create(company->model,
                            &(struct moshi_engine_options){.max_sessions = n,
                                                           .kv_dtype = format->kv},
                            &company->engine))
        stop("an engine");
    company->sessions = take(count * sizeof(struct moshi_session *));
    company->frames = take(count * sizeof *company->frames);
    company->voices = take(count * FRAME * sizeof *company->voices);
    company->pcms = take(count * sizeof(float *));
    open_sessions(company, 0);
}

void company_close(struct company *company)
{
    close_sessions(company);
    moshi_engine_destroy(company->engine);
    moshi_model_close(company->model);
    free((void *)company->sessions);
    free(company->frames);
    free(company->voices);
    free((void *)company->pcms);
}

void company_begin(struct company *company)
{
    close_sessions(company);
    open_sessions(company, 0);
}

static double step_all(struct company *company, int n)
{
    const int speaks = moshi_model_get_info(company->model)->dep_q > 0;

    for (int i = 0; i < n; ++i)
        company->frames[i].pcm = speaks ? company->voices + i * FRAME : NULL;
    double began = os_clock();

    if (moshi_sessions_step(company->sessions, n, company->pcms, NULL, company->frames))
        stop("a step");
    ++company->tick;
    return os_clock() - began;
}

double company_step(struct company *company, int n)
{
    for (int i = 0; i < n; ++i) company->pcms[i] = sound_of(i, company->tick);
    return step_all(company, n);
}

/* Bytes as keys and values have them: some numbers of 2 to 8 either way, so that a few positions
 * outweigh the others, and what is read wrong is felt. */
static void fill_page(const struct kv_cache *cache, char *page)
{
    const size_t codes = (size_t)cache->page_positions * kv_row_bytes(cache);

    for (size_t at = 0; at < cache->page_bytes; at += kv_plane_bytes(cache)) {
        uint32_t *words = (uint32_t *)(void *)(page + at);

        for (size_t i = 0; i < codes / 4; ++i)
            words[i] = cache->dtype == MOSHI_F32    ? (noise() & 0x80ff0000u) | 0x40000000u
                       : cache->dtype == MOSHI_BF16 ? (noise() & 0x80ff80ffu) | 0x40004000u
                                                    : noise() & 0x7f7f7f7fu;
        if (cache->dtype != MOSHI_INT8) continue;
        for (size_t i = 0; i < codes; i += 2) page[at + i] = (char)-page[at + i];
        float *scales = (float *)(void *)(page + at + codes);

        for (int i = 0; i < cache->page_positions; ++i) scales[i] = 0.0625f;
    }
}

#define PAGES 4 /* of noise, in turn */

/* Gives a lane all its pages, of noise that is the same on every device. */
static void fill_lanes(struct kv_pages *kv, int lanes)
{
    const struct backend_ops *ops = kv->backend->ops;
    const size_t bytes = kv->cache.page_bytes;
    const int per_lane = kv->cache.pages_per_lane;
    char *host = take(bytes), *device = ops->allocate(kv->backend, PAGES * bytes);

    if (!device) stop("noise for the rings");
    noise_state = 2;
    for (int i = 0; i < PAGES; ++i) {
        fill_page(&kv->cache, host);
        ops->upload(kv->backend, device + (size_t)i * bytes, host, bytes);
    }
    for (int lane = 0; lane < lanes; ++lane) {
        if (kv_pages_grow(kv, lane, 0, per_lane * KV_PAGE_POSITIONS)) stop("a ring");
        for (int i = 0; i < per_lane; ++i)
            ops->copy(kv->backend,
                      (char *)kv->cache.pages + (size_t)kv->host_table[lane * per_lane + i] * bytes,
                      device + (size_t)(i % PAGES) * bytes, bytes);
    }
    if (kv->backend->ops->sync(kv->backend)) stop("the rings");
    ops->release(kv->backend, device, PAGES * bytes);
    free(host);
}

/* That much later, by the counts on both sides. */
static void count_on(struct backend *backend, int64_t *offset, int32_t *position, int64_t more)
{
    const int32_t counted = (int32_t)(*offset += more);

    backend->ops->upload(backend, position, &counted, sizeof counted);
}

void company_fill(struct company *company)
{
    struct backend *backend = company->engine->backend;
    struct lm_state *lm = &company->engine->lm;
    struct mimi_state *mimi = &company->engine->mimi;
    const int columns = lm->delay.columns; /* the delay cache keeps its place */
    const int64_t frames = (int64_t)(lm->context / columns + 1) * columns;

    fill_lanes(&lm->kv, company->n);
    fill_lanes(&mimi->encoder_kv, company->n);
    if (lm->delay.dep_q) fill_lanes(&mimi->decoder_kv, company->n);
    for (int i = 0; i < company->n; ++i) {
        const int slot = company->sessions[i]->slot;
        const int64_t steps = (int64_t)mimi->encoder_kv.positions * 2;

        count_on(backend, &lm->offset[slot], lm->delay.offset + slot, frames);
        count_on(backend, &lm->positions[slot], lm->position + slot, frames);
        count_on(backend, &mimi->encoder_offset[slot], mimi->encoder_position + slot, steps);
        if (lm->delay.dep_q)
            count_on(backend, &mimi->decoder_offset[slot], mimi->decoder_position + slot, steps);
    }
    if (backend->ops->sync(backend)) stop("full rings");
}

void company_memory(const struct company *company, const char *name)
{
    struct moshi_memory memory;

    if (moshi_engine_memory(company->engine, &memory)) stop("the memory");
    const double taken = (double)(company->free_before - memory.free_bytes) / company->n;

    record(name,
           "\"variant\": \"%s\", \"sessions\": %d, \"computed_mb\": %.2f, \"measured_mb\": %.2f, "
           "\"free_gb\": %.2f",
           company->variant, company->n, (double)memory.session_bytes / 1e6, taken / 1e6,
           (double)memory.free_bytes / 1e9);
}

double company_bytes(const struct company *company, int n)
{
    const struct moshi_model_info *info = moshi_model_get_info(company->model);
    struct moshi_memory memory;

    if (moshi_engine_memory(company->engine, &memory)) stop("the memory");
    return (double)(info->temporal_bytes + info->depth_bytes) + (double)n * (double)memory.kv_bytes;
}

/* ---- the comparison --------------------------------------------------------------------- */

#define KNOWN 6 /* frames; the later half with full rings */

/* Largest root mean square of what logits differ by, in their standard deviations. Two sums of f32
 * are 1e-5 apart, and a wrong row is 1 off. Keys and values are rounded, and activations become codes
 * where weights are: a small difference tips one over now and then. */
#define MOST_BF16 5e-3
#define MOST_CODED 0.05
#define MOST_SOUND 1e-3 /* of its root mean square */

struct known {
    int32_t user[MOSHI_MAX_CODEBOOKS], text, audio[MOSHI_MAX_CODEBOOKS];
    float *logits; /* [text_card + dep_q * card] */
    struct moshi_frame frame;
    float voice[FRAME];
};

struct reference {
    const char *name;
    double most;
    int text_card, card, dep_q;
    struct known frames[KNOWN];
};

static int best(const float *logits, int count)
{
    int found = 0;

    for (int i = 1; i < count; ++i)
        if (logits[i] > logits[found]) found = i;
    return found;
}

/* A greedy step of all; `voices` and what the card has are NaN before. */
static void step_poisoned(struct company *company)
{
    const struct moshi_model_info *info = moshi_model_get_info(company->model);
    struct lm_state *lm = &company->engine->lm;
    struct backend *backend = company->engine->backend;
    const size_t lanes = (size_t)lm->lanes * sizeof(float);

    backend->ops->clear(backend, lm->text_logits, 0xff, lanes * (size_t)info->text_card);
    backend->ops->clear(backend, lm->audio_logits, 0xff,
                        lanes * (size_t)info->dep_q * (size_t)info->card);
    backend->ops->clear(backend, lm->results, 0xff, lm->results_bytes);
    if (backend->ops->sync(backend)) stop("poison");
    memset(company->voices, 0xff, (size_t)company->n * FRAME * sizeof(float));
    memset(company->frames, 0xff, (size_t)company->n * sizeof *company->frames);
    for (int i = 0; i < company->n; ++i)
        company->pcms[i] = sound_of(i == company->n - 1 ? 0 : i, company->tick);
    step_all(company, company->n);
}

struct reference *reference_make(const char *folder, const struct format *format)
{
    struct reference *reference = take(sizeof *reference);
    struct company cpu;
    const int coded = format->weights != MOSHI_BF16;

    /* The plain kernels sum bf16 weights in f32, as the card does; codes are summed alike by all. */
    if (!coded) setenv("MOSHI_C_ISA", "generic", 1);
    company_open(&cpu, folder, "cpu", "", format, 1);
    unsetenv("MOSHI_C_ISA");
    close_sessions(&cpu);
    open_sessions(&cpu, 1);
    const struct moshi_model_info *info = moshi_model_get_info(cpu.model);
    const int logits = info->text_card + info->dep_q * info->card;

    reference->name = format->name;
    reference->most = coded ? MOST_CODED : MOST_BF16;
    reference->text_card = info->text_card;
    reference->card = info->card;
    reference->dep_q = info->dep_q;
    for (int t = 0; t < KNOWN; ++t) {
        struct known *known = &reference->frames[t];

        if (t == KNOWN / 2) company_fill(&cpu);
        step_poisoned(&cpu);
        known->frame = cpu.frames[0];
        memcpy(known->voice, cpu.voices, sizeof known->voice);
        known->logits = take((size_t)logits * sizeof(float));
        if (moshi_session_logits(cpu.sessions[0], known->logits, known->logits + info->text_card))
            stop("the CPU's logits");
        known->text = best(known->logits, info->text_card);
        for (int k = 0; k < info->dep_q; ++k)
            known->audio[k] = best(known->logits + info->text_card + k * info->card, info->card);
    }
    company_close(&cpu);
    return reference;
}

void reference_free(struct reference *reference)
{
    for (int t = 0; t < KNOWN; ++t) free(reference->frames[t].logits);
    free(reference);
}

/* Root mean square of the difference over the standard deviation; NaN where something is. */
static double difference(const float *found, const float *expected, int count)
{
    double sum = 0, square = 0, off = 0;

    for (int i = 0; i < count; ++i) {
        sum += expected[i];
        square += (double)expected[i] * expected[i];
        off += ((double)found[i] - expected[i]) * ((double)found[i] - expected[i]);
    }
    return sqrt(off / (square - sum * sum / count));
}

struct comparison {
    double logits, sound;
    int choices, equal;
};

static void larger(double *most, double value)
{
    if (!(value <= *most)) *most = value;
}

static void compare_frame(const struct reference *reference, const struct company *company, int i,
                          int t, struct comparison *found)
{
    const struct known *known = &reference->frames[t];
    const struct moshi_frame *frame = &company->frames[i];
    const int text_card = reference->text_card, card = reference->card;
    float *logits = take((size_t)(text_card + reference->dep_q * card) * sizeof(float));

    if (moshi_session_logits(company->sessions[i], logits, logits + text_card))
        stop("the card's logits");
    if (frame->n_user_codes != known->frame.n_user_codes ||
        memcmp(frame->user_codes, known->frame.user_codes,
               (size_t)frame->n_user_codes * sizeof(int32_t)))
        mistake("%s: the user's codes of session %d in frame %d are not the CPU's", reference->name,
                i, t);
    if (frame->has_output != known->frame.has_output ||
        frame->text_token != known->frame.text_token || frame->n_codes != known->frame.n_codes ||
        memcmp(frame->codes, known->frame.codes, (size_t)frame->n_codes * sizeof(int32_t)))
        mistake("%s: the tokens given out by session %d in frame %d are not the CPU's",
                reference->name, i, t);
    larger(&found->logits, difference(logits, known->logits, text_card));
    found->equal += best(logits, text_card) == known->text;
    for (int k = 0; k < reference->dep_q; ++k) {
        const int at = text_card + k * card;

        larger(&found->logits, difference(logits + at, known->logits + at, card));
        found->equal += best(logits + at, card) == known->audio[k];
    }
    found->choices += 1 + reference->dep_q;
    if (frame->has_output && reference->dep_q)
        larger(&found->sound, difference(company->voices + i * FRAME, known->voice, FRAME));
    free(logits);
}

void reference_compare(const struct reference *reference, struct company *company)
{
    struct comparison found = {0};
    const int last = company->n - 1;

    close_sessions(company);
    open_sessions(company, 1);
    for (int t = 0; t < KNOWN; ++t) {
        const struct known *known = &reference->frames[t];

        if (t == KNOWN / 2) company_fill(company);
        for (int i = 0; i <= last; i += last ? last : 1)
            if (moshi_session_force_next(company->sessions[i], known->text,
                                         reference->dep_q ? known->audio : NULL))
                stop("the CPU's choices");
        step_poisoned(company);
        for (int i = 0; i <= last; i += last ? last : 1)
            compare_frame(reference, company, i, t, &found);
    }
    record("parity",
           "\"of\": \"%s\", \"variant\": \"%s\", \"sessions\": %d, \"logits\": %.2e, "
           "\"sound\": %.2e, \"choices\": %d, \"equal\": %d",
           reference->name, company->variant, company->n, found.logits, found.sound, found.choices,
           found.equal);
    if (!(found.logits <= reference->most) || !(found.sound <= MOST_SOUND))
        mistake(
            "%s with switches \"%s\": logits are %g and the sound is %g off the CPU's, expected "
            "at most %g and %g",
            reference->name, company->variant, found.logits, found.sound, reference->most,
            MOST_SOUND);
    company_begin(company);
}
