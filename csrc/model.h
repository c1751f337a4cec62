/* model.h: an open checkpoint: files, weights bound on a device, and facts about them. */
#ifndef MOSHI_MODEL_H
#define MOSHI_MODEL_H

#include "lm.h"
#include "mimi.h"
#include "os.h"

struct moshi_model {
    struct backend *backend;
    struct weight_store lm_store, mimi_store;
    struct tensor_file *lm_file, *mimi_file;
    struct lm lm;
    struct mimi mimi;
    struct moshi_model_info info;
    uint64_t lm_fingerprint, mimi_fingerprint; /* of configs and files; 0 where there is none */
    char lm_path[4096], mimi_path[4096], config_path[4096];
    int64_t process; /* that opened it, the only one in which its threads and locks work */
    /* The backend has one caller at a time: held during a tick and by every other use of it
     * but the copies that backend.h allows. */
    struct os_mutex *backend_lock;
};

/* MOSHI_ERROR_SESSION in a process forked from the one that opened the model. */
int model_check_process(const struct moshi_model *model);

/* What a failure of something that the backend did is called: its own sentence, if it has one. Asks
 * and clears it. */
int model_failure(const struct moshi_model *model, int status);

/* Opens the language model alone on the CPU, to be converted: nothing is prepared, the plan is filled with what
 * its tensors become in options->dtype. Close with moshi_model_close. */
int model_open_plan(const struct moshi_model_options *options, struct weight_plan *plan,
                    struct moshi_model **model);

#endif
