/* calls.h: callers of the tiny model on the card that the host shim is, and what the shim lets a test do. */
#ifndef CALLS_H
#define CALLS_H

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../c/harness.h"
#include "moshi.h"

#define FRAME_SIZE 1920

/* As in cuda/host_shim.h. */
enum { FAULT_MALLOC, FAULT_LAUNCH, FAULT_DRIVER };
enum {
    PREPARED,
    LAUNCHED,
    REPLAYED,
    SENT,
    FETCHED,
    MOVED,
    CAPTURED,
    COPIED_BYTES,
    TAKEN_BYTES,
    MET,
    EVENTS
};

static void (*inject)(int fault, int countdown);
static void (*repair)(void);
static long (*count)(int event);

static const char *folder = "moshi_c/data/moshi-tiny";

/* A fault that one test injects is none of the next one's. */
static inline void run_repaired(const char *name, int (*test)(void))
{
    if (repair) repair();
    run(name, test);
    fflush(stdout);
}

static inline int says(const char *words)
{
    return strstr(moshi_error_detail(), words) != NULL;
}

static inline int open_model(const char *device, enum moshi_dtype dtype, struct moshi_model **model)
{
    return moshi_model_open(
        &(struct moshi_model_options){.folder = folder, .device = device, .dtype = dtype}, model);
}

static enum moshi_dtype kv_dtype; /* of every engine */

static inline int open_engine(struct moshi_model *model, int slots, struct moshi_engine **engine)
{
    return moshi_engine_create(
        model, &(struct moshi_engine_options){.max_sessions = slots, .kv_dtype = kv_dtype}, engine);
}

/* Something speech-like for caller `who`. */
static inline void make_frame(int who, int t, float *pcm)
{
    for (int i = 0; i < FRAME_SIZE; ++i) {
        double x = (t * FRAME_SIZE + i) / 24000.0;

        pcm[i] = (float)(0.2 * sin(6.28318 * (180 + 40 * who) * x + 3 * sin(9 * x)) *
                         (0.5 + 0.5 * sin(4 * x + who)));
    }
}

/* How a caller speaks with the model. */
enum manner { GREEDY, SAMPLED, GUIDED, MANNERS };

static inline int open_session(struct moshi_model *model, struct moshi_engine *engine,
                               enum manner manner, struct moshi_session **session)
{
    struct moshi_session_options options;

    moshi_session_options_init(model, &options);
    options.seed = 100 + (uint64_t)manner;
    if (manner == GREEDY) options.text_temperature = options.audio_temperature = 0;
    if (manner == GUIDED) options.cfg_coef = 1.7f, options.cfg_masked_until = 2;
    return moshi_session_create(engine, &options, session);
}

/* Finds what the library has of the shim's; a card's has nothing. */
static inline void find_shim(void *library)
{
    *(void **)&inject = dlsym(library, "shim_inject");
    *(void **)&repair = dlsym(library, "shim_repair");
    *(void **)&count = dlsym(library, "shim_count");
}

#endif
