/* gpu.h: what the stages of gpu.c share: lines of results, noise, the read rate, and engines of
 * sessions that are compared with the CPU before they are timed, with their rings full. */
#ifndef MOSHI_GPU_BENCHMARK_H
#define MOSHI_GPU_BENCHMARK_H

#include "../csrc/cuda.h"
#include "../csrc/engine.h"
#include "../csrc/os.h"

#define FRAME 1920
#define FRAME_SECONDS 0.08
#define MOST_SAMPLES 65536
#define MOST_VARIANTS 8

extern int dry; /* few and small, to try the program itself: the times mean nothing */
extern double read_rate; /* bytes a second, as measured in this process */
extern int mistakes; /* what was not the CPU's so far: times that follow are told as unverified */

/* Ends the program with the sentence of the failure that was just recorded. What was measured before
 * stays. */
_Noreturn void stop(const char *what);
/* Says what is not as it should be, and counts it. */
void mistake(const char *sentence, ...) __attribute__((format(printf, 1, 2)));

/* ---- results ---------------------------------------------------------------------------- */

/* Lines are appended to the file, each an object of JSON. */
void results_open(const char *path);
/* {"name": name, and what `fields` gives: more of the object, or "". The same is printed. */
void record(const char *name, const char *fields, ...) __attribute__((format(printf, 2, 3)));

struct samples {
    double seconds[MOST_SAMPLES];
    int n;
};

void samples_add(struct samples *samples, double seconds);
double samples_median(struct samples *samples); /* sorts them */
/* p50, p99 and most; bytes > 0: also what reading so many takes, and its share of p50. variant: the
 * switches that were set, "" for none. fields: as those of record. */
void report(const char *name, const char *variant, struct samples *samples, double bytes,
            const char *fields, ...) __attribute__((format(printf, 5, 6)));

/* ---- noise and floors ------------------------------------------------------------------- */

uint32_t noise(void);
/* bf16 numbers of about 0.03 either way. */
void make_noise(uint16_t *to, size_t count);
/* A frame of noise, one of a few; another one each tick. */
const float *sound_of(int caller, int tick);

/* Records the read rate and that of copies, and keeps the former. */
void measure_floors(struct backend *backend, const char *when);

/* ---- sessions in one engine ------------------------------------------------------------- */

/* Which numbers the weights are, and the keys and values. */
struct format {
    const char *name; /* "int8+int8" */
    enum moshi_dtype weights, kv;
};

/* "bf16", "int8", "q8" or "q4"; all but bf16 go with int8 keys and values. */
struct format format_named(const char *name);

struct company {
    const char *variant; /* switches as NAME=VALUE[,NAME=VALUE], set while the model was opened */
    struct moshi_model *model;
    struct moshi_engine *engine;
    struct moshi_session **sessions; /* [n] */
    struct moshi_frame *frames; /* [n] */
    float *voices; /* [n][FRAME] */
    const float **pcms; /* [n] */
    int n, tick;
    int64_t free_before; /* bytes of the card before the engine was made */
};

/* The variants to be timed, the first of which is none: those of the environment's VARIANTS. */
int variants(const char *names[MOST_VARIANTS]);

void company_open(struct company *company, const char *folder, const char *device,
                  const char *variant, const struct format *format, int n);
void company_close(struct company *company);
/* Sessions anew, which choose their tokens as the checkpoint says. */
void company_begin(struct company *company);
/* A frame of the first `n`, from samples to samples; its seconds. */
double company_step(struct company *company, int n);
/* As if the calls had been so long that their rings are full, the codec's too: of noise. */
void company_fill(struct company *company);
/* Records what a session takes of the card beside what moshi_engine_memory computes; nothing else was
 * opened since the company. */
void company_memory(const struct company *company, const char *name);
/* Bytes that a frame of `n` sessions with full rings reads. */
double company_bytes(const struct company *company, int n);

/* ---- the comparison --------------------------------------------------------------------- */

/* What the CPU makes of some frames, half of them with full rings: the choices that are then forced
 * on the card, and the logits that it should have. */
struct reference;

struct reference *reference_make(const char *folder, const struct format *format);
/* Holds the first and the last session of the company to it: further off than rounding is a mistake.
 * Then the sessions begin anew. */
void reference_compare(const struct reference *reference, struct company *company);
void reference_free(struct reference *reference);

#endif
