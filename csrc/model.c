/* model.c: finds the files of a checkpoint, opens them and binds their tensors. Refuses models that
 * other parts of this build could not run, with the config key that asks for them. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"
#include "hash.h"
#include "status.h"

static int join_path(const char *folder, const char *name, char *path, size_t capacity)
{
    int length = snprintf(path, capacity, "%s/%s", folder, name);
    if (length < 0 || (size_t)length >= capacity)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "the path %.60s.../%.60s is too long", folder,
                          name);
    return MOSHI_OK;
}

/* A file a config names: beside the config, and nowhere else. */
static int named_file(const char *folder, const char *name, const char *key, char *path,
                      size_t capacity)
{
    if (strstr(name, "://"))
        return moshi_fail(
            MOSHI_ERROR_CHECKPOINT,
            "%s names \"%s\": references are resolved by the Python package; give the "
            "file's path instead",
            key, name);
    if (name[0] == '/' || strstr(name, ".."))
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s names \"%s\", expected a file inside the folder", key, name);
    if (!folder)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "no folder and no path for \"%s\" (%s) was given",
                          name, key);
    return join_path(folder, name, path, capacity);
}

#define MAX_CONFIG_BYTES (16 << 20) /* a thousand times the published ones */

static int read_config(const char *path, struct os_file *file)
{
    memset(file, 0, sizeof *file);
    if (path[0] && os_path_bytes(path) > MAX_CONFIG_BYTES)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s has %lld bytes, expected at most %d", path,
                          (long long)os_path_bytes(path), MAX_CONFIG_BYTES);
    return path[0] ? os_file_open(path, 1, file) : MOSHI_OK;
}

/* The language model's config, or upstream's built-in one. */
static int parse_lm_config(struct moshi_model *model, struct lm_config *config)
{
    struct os_file text;
    int status = read_config(model->config_path, &text);
    if (status) return status;
    status = lm_config_parse((const char *)text.data, text.bytes, model->config_path, config);
    model->lm_fingerprint = hash_bytes(HASH_START, text.data, text.bytes);
    os_file_close(&text);
    return status;
}

static int copy_path(const char *from, char *to, size_t capacity)
{
    if (strlen(from) >= capacity)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "the path %.80s... is too long", from);
    strcpy(to, from);
    return MOSHI_OK;
}

static int open_lm(struct moshi_model *model, const struct moshi_model_options *options,
                   struct lm_config *config, struct weight_plan *plan)
{
    int status;
    if (options->lm_path)
        status = copy_path(options->lm_path, model->lm_path, sizeof model->lm_path);
    else
        status = named_file(options->folder, config->lm_name, "moshi_name", model->lm_path,
                            sizeof model->lm_path);
    if (!status && !options->lm_path && !os_path_exists(model->lm_path)) {
        /* Sharded checkpoints have an index beside where the single file would be. */
        char index[sizeof model->lm_path + 16];
        snprintf(index, sizeof index, "%s.index.json", model->lm_path);
        if (os_path_exists(index)) status = copy_path(index, model->lm_path, sizeof model->lm_path);
    }
    if (!status) status = tensor_file_open(model->lm_path, options->copy_weights, &model->lm_file);
    if (status) {
        lm_config_free(config);
        return status;
    }
    model->lm_fingerprint = tensor_file_fingerprint(model->lm_file, model->lm_fingerprint);
    weight_store_init(&model->lm_store, model->backend);
    struct weight_loader loader = {.store = &model->lm_store,
                                   .file = model->lm_file,
                                   .dtype = options->dtype,
                                   .check_finite = options->check_weights,
                                   .plan = plan};
    return lm_load(&model->lm, config, &loader);
}

static int find_mimi(struct moshi_model *model, const struct moshi_model_options *options,
                     const struct lm_config *lm_config)
{
    const char *name = lm_config ? lm_config->mimi_name
                                 : "tokenizer-e351c8d8-checkpoint125.safetensors";
    if (options->mimi_path)
        return copy_path(options->mimi_path, model->mimi_path, sizeof model->mimi_path);
    return named_file(options->folder, name, "mimi_name", model->mimi_path,
                      sizeof model->mimi_path);
}

static int find_mimi_config(const struct moshi_model_options *options,
                            const struct lm_config *lm_config, char *path, size_t bytes)
{
    path[0] = '\0'; /* the built-in one */
    if (options->mimi_config_path) return copy_path(options->mimi_config_path, path, bytes);
    if (lm_config && lm_config->mimi_config_name[0])
        return named_file(options->folder, lm_config->mimi_config_name, "mimi_config_name", path,
                          bytes);
    return MOSHI_OK;
}

/* Reads config and weights; the fingerprint is of both, and of the format they are read in. */
static int read_mimi(struct moshi_model *model, const struct moshi_model_options *options,
                     const char *config_path)
{
    struct os_file text;
    struct mimi_config config;
    int status = read_config(config_path, &text);
    if (!status) {
        status = mimi_config_parse((const char *)text.data, text.bytes, config_path, &config);
        model->mimi_fingerprint = hash_bytes(HASH_START, text.data, text.bytes);
        os_file_close(&text);
    }
    if (!status)
        status = tensor_file_open(model->mimi_path, options->copy_weights, &model->mimi_file);
    if (status) return status;
    model->mimi_fingerprint = tensor_file_fingerprint(model->mimi_file, model->mimi_fingerprint);
    const enum weight_format lean = options->mimi_dtype == MOSHI_BF16   ? WEIGHT_BF16
                                    : options->mimi_dtype == MOSHI_INT8 ? WEIGHT_INT8
                                                                        : WEIGHT_F32;
    /* What one format's history goes on to is not what another's does. */
    if (lean != WEIGHT_F32)
        model->mimi_fingerprint = hash_bytes(model->mimi_fingerprint, weight_format_name(lean), 4);
    weight_store_init(&model->mimi_store, model->backend);
    struct weight_loader loader = {.store = &model->mimi_store,
                                   .file = model->mimi_file,
                                   .dtype = MOSHI_F32,
                                   .pack = 1,
                                   .lean = lean,
                                   .copies = 1,
                                   .check_finite = 1}; /* all of it is read now in any case */
    status = mimi_load(&model->mimi, &config, &loader);
    if (status) return status;
    /* Everything was copied into the backend's layout. */
    tensor_file_close(model->mimi_file);
    model->mimi_file = NULL;
    return MOSHI_OK;
}

/* How many codebooks are used: as many as wanted, and as the language model needs. */
static int choose_codebooks(const struct moshi_model *model, int codebooks,
                            const struct lm_config *lm_config, int *chosen)
{
    const struct mimi_config *config = &model->mimi.config;
    if (codebooks == 0 && lm_config) {
        int user_q = lm_config->n_q - lm_config->dep_q;
        codebooks = lm_config->dep_q > user_q ? lm_config->dep_q : user_q;
    }
    if (codebooks == 0) codebooks = config->n_q < 8 ? config->n_q : 8;
    if (codebooks < 1 || codebooks > config->n_q)
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "%d codebooks wanted, expected 1 to %d, which %s holds", codebooks,
                          config->n_q, model->mimi_path);
    if (lm_config && lm_config->n_q - lm_config->dep_q > config->n_q)
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s holds %d codebooks, but the language model reads %d of the user",
                          model->mimi_path, config->n_q, lm_config->n_q - lm_config->dep_q);
    if (lm_config && lm_config->card != config->bins)
        return moshi_fail(
            MOSHI_ERROR_CHECKPOINT,
            "%s has codebooks of %d entries, but the language model expects card = %d",
            model->mimi_path, config->bins, lm_config->card);
    *chosen = codebooks;
    return MOSHI_OK;
}

static int open_mimi(struct moshi_model *model, const struct moshi_model_options *options,
                     const struct lm_config *lm_config)
{
    char config_path[4096];
    int status = find_mimi(model, options, lm_config);
    if (status) return status;
    /* A folder of a fine-tuned LM has no codec; sessions then step by codes. */
    if (lm_config && !options->mimi_path && !os_path_exists(model->mimi_path)) {
        model->mimi_path[0] = '\0';
        return MOSHI_OK;
    }
    status = find_mimi_config(options, lm_config, config_path, sizeof config_path);
    if (status) return status;
    status = read_mimi(model, options, config_path);
    if (!status)
        status = choose_codebooks(model, options->mimi_codebooks, lm_config,
                                  &model->info.codebooks);
    if (status) return status;
    model->info.has_mimi = 1;
    model->info.codebook_size = model->mimi.config.bins;
    return MOSHI_OK;
}

static void fill_info(struct moshi_model *model)
{
    struct moshi_model_info *info = &model->info;
    info->device = model->backend->device;
    info->threads = model->backend->threads;
    info->family = "mimi";
    info->dtype = info->mimi_dtype = "";
    info->sample_rate = 24000;
    info->frame_rate = 12.5;
    info->frame_size = 1920;
    if (info->has_mimi) {
        const struct mimi_config *mimi = &model->mimi.config;
        info->mimi_dtype = weight_format_name(model->mimi.downsample.weight.format);
        info->sample_rate = mimi->sample_rate;
        info->frame_rate = mimi->frame_rate;
        info->frame_size = mimi->frame_size;
        info->mimi_path = model->mimi_path;
    }
    if (info->has_lm) {
        const struct lm_config *lm = &model->lm.config;
        info->family = lm->family;
        info->dtype = weight_format_name(model->lm.text_head.format);
        info->n_q = lm->n_q;
        info->dep_q = lm->dep_q;
        info->user_q = lm->n_q - lm->dep_q;
        info->card = lm->card;
        info->text_card_in = lm->text_card;
        info->text_card = lm->text_card_out;
        info->max_delay = lm->max_delay;
        info->context = lm->temporal.context;
        info->text_padding_id = lm->text_padding_id;
        info->text_end_padding_id = lm->text_end_padding_id;
        info->heads = lm->heads;
        info->head_dim = lm->head_dim;
        info->has_conditions = lm->n_conditions > 0;
        info->text_temperature = lm->text_temperature;
        info->audio_temperature = lm->audio_temperature;
        info->text_top_k = lm->text_top_k;
        info->audio_top_k = lm->audio_top_k;
        info->lm_path = model->lm_path;
        info->config_path = model->config_path[0] ? model->config_path : NULL;
    }
    if (info->has_mimi) {
        const int written = info->has_lm && info->dep_q < info->codebooks ? info->dep_q
                                                                          : info->codebooks;
        const int read = info->has_lm ? info->user_q : info->codebooks;
        mimi_cost(&model->mimi, 0, read, &info->encode_bytes, &info->encode_flops);
        if (written) mimi_cost(&model->mimi, 1, written, &info->decode_bytes, &info->decode_flops);
    }
    if (info->has_lm) {
        info->temporal_bytes = lm_temporal_bytes(&model->lm);
        info->depth_bytes = depth_bytes(&model->lm.depth);
    }
    info->parameters = model->lm_store.parameters + model->mimi_store.parameters;
    info->weight_bytes = model->lm_store.matrix_bytes + model->mimi_store.matrix_bytes;
    if (model->lm_file && tensor_file_mapped_bytes(model->lm_file) > 0)
        info->mapped_bytes = model->lm_store.mapped_bytes;
}

static int open_backend(struct moshi_model *model, const struct moshi_model_options *options)
{
    const char *device = options->device;
    int threads = options->threads;
    const char *environment = os_environment("MOSHI_C_THREADS");
    if (threads == 0 && environment) {
        char *end = NULL;
        long value = strtol(environment, &end, 10);
        if (*end || value < 1 || value > 1024)
            return moshi_fail(MOSHI_ERROR_ARGUMENT,
                              "MOSHI_C_THREADS is \"%s\", expected a number from 1 to 1024",
                              environment);
        threads = (int)value;
    }
    if (threads < 0 || threads > 1024)
        return moshi_fail(MOSHI_ERROR_ARGUMENT, "threads is %d, expected 0 to 1024", threads);
    int status = MOSHI_OK;
    if (strncmp(device, "cuda", 4) == 0)
        status = cuda_backend_create(device, &model->backend);
    else if (strcmp(device, "cpu") != 0)
        status = moshi_fail(MOSHI_ERROR_ARGUMENT,
                            "device is \"%.40s\", expected \"auto\", \"cpu\", \"cuda\" or "
                            "\"cuda:1\" and so on",
                            device);
    else
        status = cpu_backend_create(threads, &model->backend);
    const char *trace = os_environment("MOSHI_C_TRACE");
    if (!status && trace) {
        struct backend *traced = NULL;
        status = trace_backend_create(model->backend, trace, &traced);
        if (!status) model->backend = traced;
    }
    return status;
}

/* A model of which nothing is known but its backend and where its config is. */
static int begin_model(const struct moshi_model_options *options, struct moshi_model **result)
{
    struct moshi_model *model = calloc(1, sizeof *model);
    *result = model;
    if (!model) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a model");
    model->process = os_process();
    int status = MOSHI_OK;
    if (options->folder && !os_path_is_folder(options->folder))
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s is not a folder", options->folder);
    if (!status && options->mimi_dtype != MOSHI_AUTO && options->mimi_dtype != MOSHI_F32 &&
        options->mimi_dtype != MOSHI_BF16 && options->mimi_dtype != MOSHI_INT8)
        status = moshi_fail(MOSHI_ERROR_ARGUMENT,
                            "the codec's dtype is %s, expected auto, f32, bf16 or int8",
                            moshi_dtype_name(options->mimi_dtype));
    model->backend_lock = os_mutex_create_queue();
    if (!status && !model->backend_lock)
        status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a lock");
    if (!status) status = open_backend(model, options);

    if (!status && options->config_path) {
        status = copy_path(options->config_path, model->config_path, sizeof model->config_path);
    } else if (!status && options->folder) {
        status = join_path(options->folder, "config.json", model->config_path,
                           sizeof model->config_path);
        if (!status && !os_path_exists(model->config_path)) model->config_path[0] = '\0';
    }
    return status;
}

static int open_language(struct moshi_model *model, const struct moshi_model_options *options,
                         struct weight_plan *plan)
{
    struct lm_config config;
    int status = parse_lm_config(model, &config);
    if (status) return status;
    model->info.has_lm = 1;
    return open_lm(model, options, &config, plan);
}

int model_open_plan(const struct moshi_model_options *options, struct weight_plan *plan,
                    struct moshi_model **result)
{
    struct moshi_model_options here = *options;
    struct moshi_model *model;
    here.device = "cpu";
    int status = begin_model(&here, &model);
    if (!status) status = open_language(model, &here, plan);
    if (status) {
        moshi_model_close(model);
        model = NULL;
    }
    *result = model;
    return status;
}

int model_failure(const struct moshi_model *model, int status)
{
    int stuck = model && model->backend ? model->backend->ops->sync(model->backend) : MOSHI_OK;
    return stuck ? stuck : status;
}

static int open_on(const struct moshi_model_options *options, struct moshi_model **result)
{
    *result = NULL;
    struct moshi_model *model;
    struct lm_config config;
    int status = begin_model(options, &model);
    if (!status && !options->codec_only) {
        status = open_language(model, options, NULL);
        if (!status) status = open_mimi(model, options, &model->lm.config);
    } else if (!status) {
        /* A model's folder names its codec in its config. */
        int named = model->config_path[0] && !options->mimi_path;
        if (named) status = parse_lm_config(model, &config);
        if (!status) {
            struct moshi_model_options codec = *options;
            if (codec.mimi_codebooks == 0) codec.mimi_codebooks = 8;
            char path[4096], config_file[4096];
            if (named) {
                status = named_file(options->folder, config.mimi_name, "mimi_name", path,
                                    sizeof path);
                codec.mimi_path = path;
                if (!status && config.mimi_config_name[0] && !codec.mimi_config_path) {
                    status = named_file(options->folder, config.mimi_config_name,
                                        "mimi_config_name", config_file, sizeof config_file);
                    codec.mimi_config_path = config_file;
                }
                lm_config_free(&config);
            }
            if (!status) status = open_mimi(model, &codec, NULL);
        }
    }
    if (status) {
        status = model_failure(model, status);
        moshi_model_close(model);
        return status;
    }
    fill_info(model);
    *result = model;
    return MOSHI_OK;
}

int moshi_model_open(const struct moshi_model_options *options, struct moshi_model **result)
{
    struct moshi_model_options placed = *options;
    if (!options->device || strcmp(options->device, "auto") == 0) {
        /* A card, if there is one that can hold this model. */
        placed.device = "cuda";
        int status = open_on(&placed, result);
        if (status != MOSHI_ERROR_DEVICE && status != MOSHI_ERROR_MEMORY) return status;
        placed.device = "cpu";
    }
    return open_on(&placed, result);
}

int model_check_process(const struct moshi_model *model)
{
    int64_t here = os_process();
    if (here == model->process) return MOSHI_OK;
    return moshi_fail(MOSHI_ERROR_SESSION,
                      "the model was opened by process %lld, and this is process %lld, forked from "
                      "it without its threads; expected a model opened here",
                      (long long)model->process, (long long)here);
}

void moshi_model_close(struct moshi_model *model)
{
    if (!model || model->process != os_process()) return;
    if (model->info.has_lm) lm_free(&model->lm);
    mimi_free(&model->mimi);
    weight_store_release(&model->lm_store);
    weight_store_release(&model->mimi_store);
    tensor_file_close(model->lm_file);
    tensor_file_close(model->mimi_file);
    if (model->backend) model->backend->ops->destroy(model->backend);
    os_mutex_destroy(model->backend_lock);
    free(model);
}

const struct moshi_model_info *moshi_model_get_info(const struct moshi_model *model)
{
    return &model->info;
}

const int *moshi_model_delays(const struct moshi_model *model)
{
    return model->lm.config.delays;
}

const char *moshi_model_condition_name(const struct moshi_model *model, int i)
{
    return i >= 0 && i < model->lm.config.n_conditions ? model->lm.config.conditions[i].name : NULL;
}

const char *moshi_model_condition_value(const struct moshi_model *model, int i, int j)
{
    if (i < 0 || i >= model->lm.config.n_conditions) return NULL;
    const struct condition_config *condition = &model->lm.config.conditions[i];
    return j >= 0 && j < condition->n_values ? condition->values[j] : NULL;
}

int moshi_devices(struct moshi_device *devices, int capacity)
{
    int cards = cuda_devices(devices + 1, capacity > 1 ? capacity - 1 : 0);
    if (capacity < 1) return 1 + cards;
    memset(devices, 0, sizeof *devices);
    strcpy(devices->name, "cpu");
    devices->memory_bytes = os_memory_total();
    struct backend *backend = NULL;
    if (cpu_backend_create(1, &backend) == MOSHI_OK) {
        devices->usable = 1;
        snprintf(devices->description, sizeof devices->description, "%d cores, %s kernels",
                 os_cpu_count(), backend->isa);
        backend->ops->destroy(backend);
    } else {
        snprintf(devices->reason, sizeof devices->reason, "%.*s", (int)sizeof devices->reason - 1,
                 moshi_error_detail());
    }
    return 1 + cards;
}
