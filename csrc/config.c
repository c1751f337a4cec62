/* config.c: reads config.json and mimi's config.
 *
 * Owns the names of upstream's keys, their defaults and their limits; refuses, with the key's
 * name, any value that the rest of the library can't honour or could overflow on. The built-in
 * models are JSON text as well, so there is one path.
 *
 * Reading is sticky: the first failure is kept in `source.status`, later ones are not recorded,
 * and a failed read returns some allowed value, so that arithmetic between the checks is safe. */
#include "config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "status.h"

#define MAX_DIM 65536
#define MAX_LAYERS 512
#define MAX_FEEDFORWARD (1 << 20)
#define MAX_CARD (1 << 24)
#define MAX_CONTEXT (1 << 20)
#define MAX_DELAY 1024
#define MAX_PERIOD 1e12
#define MAX_KERNEL 1024
#define MAX_FRAME (1 << 20)
#define MAX_BINS (1 << 20)
#define REQUIRED INT64_MIN /* as a default: there is none */

/* moshi/models/loaders.py: _lm_kwargs */
static const char builtin_lm[] =
    "{\"dim\": 4096, \"text_card\": 32000, \"existing_text_padding_id\": 3, \"n_q\": 16,"
    " \"dep_q\": 8, \"card\": 2048, \"num_heads\": 32, \"num_layers\": 32,"
    " \"hidden_scale\": 4.125, \"causal\": true, \"layer_scale\": null, \"context\": 3000,"
    " \"max_period\": 10000, \"gating\": \"silu\", \"norm\": \"rms_norm_f32\","
    " \"positional_embedding\": \"rope\", \"depformer_dim\": 1024,"
    " \"depformer_dim_feedforward\": 4224, \"depformer_num_heads\": 16,"
    " \"depformer_num_layers\": 6, \"depformer_layer_scale\": null,"
    " \"depformer_multi_linear\": true, \"depformer_context\": 8,"
    " \"depformer_max_period\": 10000, \"depformer_gating\": \"silu\","
    " \"depformer_pos_emb\": \"none\", \"depformer_weights_per_step\": true,"
    " \"delays\": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]}";

/* moshi/models/loaders.py: _mimi_config */
static const char builtin_mimi[] =
    "{\"sample_rate\": 24000, \"channels\": 1, \"frame_rate\": 12.5,"
    " \"seanet\": {\"channels\": 1, \"dimension\": 512, \"causal\": true, \"n_filters\": 64,"
    " \"n_residual_layers\": 1, \"activation\": \"ELU\", \"compress\": 2, \"dilation_base\": 2,"
    " \"disable_norm_outer_blocks\": 0, \"kernel_size\": 7, \"residual_kernel_size\": 3,"
    " \"last_kernel_size\": 3, \"norm\": \"none\", \"pad_mode\": \"constant\","
    " \"ratios\": [8, 6, 5, 4], \"true_skip\": true},"
    " \"quantizer\": {\"dimension\": 256, \"n_q\": 32, \"bins\": 2048,"
    " \"input_dimension\": 512, \"output_dimension\": 512},"
    " \"transformer\": {\"d_model\": 512, \"num_heads\": 8, \"num_layers\": 8, \"causal\": true,"
    " \"layer_scale\": 0.01, \"context\": 250, \"conv_layout\": true, \"max_period\": 10000,"
    " \"gating\": \"none\", \"norm\": \"layer_norm\", \"positional_embedding\": \"rope\","
    " \"dim_feedforward\": 2048, \"input_dimension\": 512, \"output_dimensions\": [512]}}";

/* ---- reading keys ------------------------------------------------------------------------ */

struct source {
    const char *what;
    int status;
};

/* One object of the file. */
struct reader {
    struct source *source;
    const char *section; /* "" or "seanet.", in front of keys in messages */
    const struct json *object;
};

static int failed(const struct reader *r)
{
    return r->source->status != MOSHI_OK;
}

static int given(const struct reader *r, const char *key)
{
    const struct json *node = json_get(r->object, key);
    return node != NULL && node->type != JSON_NULL;
}

#define FOUND_BYTES 128

/* The value in words. `missing` is the default in words, "" when there is none. */
static const char *found_text(const struct json *node, const char *missing, char *text)
{
    if (node == NULL && missing[0] == '\0') {
        return "missing";
    } else if (node == NULL) {
        (void)snprintf(text, FOUND_BYTES, "%s by default", missing);
        return text;
    }
    switch (node->type) {
    case JSON_NULL:
        return "null";
    case JSON_BOOL:
        return node->boolean ? "true" : "false";
    case JSON_NUMBER:
        (void)snprintf(text, FOUND_BYTES, "%.10g", node->number);
        return text;
    case JSON_STRING:
        (void)snprintf(text, FOUND_BYTES, "'%.60s'", node->string);
        return text;
    case JSON_ARRAY:
        (void)snprintf(text, FOUND_BYTES, "a list of %d", node->count);
        return text;
    case JSON_OBJECT:
        break;
    }
    return "an object";
}

static void refuse(const struct reader *r, const char *key, const char *missing,
                   const char *expected)
{
    char text[FOUND_BYTES];
    if (!failed(r)) {
        r->source->status = moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: key '%s%s' is %s, expected %s",
                                       r->source->what, r->section, key,
                                       found_text(json_get(r->object, key), missing, text),
                                       expected);
    }
}

/* For what a single value can't tell; `text` says what was found and what is expected. */
static void refuse_because(const struct reader *r, const char *key, const char *text)
{
    if (!failed(r)) {
        r->source->status = moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: key '%s%s' %s", r->source->what,
                                       r->section, key, text);
    }
}

static void need(const struct reader *r, const char *key, int ok, const char *text)
{
    if (!ok) {
        refuse_because(r, key, text);
    }
}

/* `missing` is checked like a given value, so an unsupported default is an error, too. */
static int64_t read_integer(const struct reader *r, const char *key, int64_t missing, int64_t low,
                            int64_t high)
{
    const struct json *node = json_get(r->object, key);
    int64_t value = missing;
    if (!failed(r) && (node == NULL || json_integer(node, &value)) && value >= low &&
        value <= high) {
        return value;
    }
    char expected[64], standard[32] = "";
    if (low == high) {
        (void)snprintf(expected, sizeof expected, "%lld", (long long)low);
    } else {
        (void)snprintf(expected, sizeof expected, "a whole number in %lld..%lld", (long long)low,
                       (long long)high);
    }
    if (missing != REQUIRED) {
        (void)snprintf(standard, sizeof standard, "%lld", (long long)missing);
    }
    refuse(r, key, standard, expected);
    return low;
}

static int read_int(const struct reader *r, const char *key, int64_t missing, int low, int high)
{
    return (int)read_integer(r, key, missing, low, high);
}

/* Where upstream's default is None: `none` stands for a missing key and for null. */
static int read_optional_int(const struct reader *r, const char *key, int none, int low, int high)
{
    return given(r, key) ? read_int(r, key, REQUIRED, low, high) : none;
}

/* above < value <= high, or above <= value when `inclusive`; NAN as a default: there is none. */
static double read_number(const struct reader *r, const char *key, double missing, double above,
                          int inclusive, double high)
{
    const struct json *node = json_get(r->object, key);
    double value = node == NULL ? missing : node->number;
    if (!failed(r) && (node == NULL || node->type == JSON_NUMBER) &&
        (inclusive ? value >= above : value > above) && value <= high) {
        return value;
    }
    char expected[96], standard[32] = "";
    (void)snprintf(expected, sizeof expected, "a number %s %g and at most %g",
                   inclusive ? "of at least" : "above", above, high);
    if (!isnan(missing)) {
        (void)snprintf(standard, sizeof standard, "%g", missing);
    }
    refuse(r, key, standard, expected);
    return high;
}

static int read_flag(const struct reader *r, const char *key, int missing)
{
    const struct json *node = json_get(r->object, key);
    if (node != NULL && node->type != JSON_BOOL) {
        refuse(r, key, "", "true or false");
        return missing;
    }
    return node != NULL ? node->boolean : missing;
}

static void need_flag(const struct reader *r, const char *key, int missing, int needed)
{
    if (read_flag(r, key, missing) != needed) {
        refuse(r, key, missing ? "true" : "false", needed ? "true" : "false");
    }
}

/* The position of the key's value in names[]. The default may be one that is not among them. */
static int read_choice(const struct reader *r, const char *key, const char *missing,
                       const char *const *names, int count)
{
    const struct json *node = json_get(r->object, key);
    const char *value = node == NULL ? missing : node->type == JSON_STRING ? node->string : "";
    char expected[128] = "", standard[40] = "";
    size_t at = 0;
    for (int i = 0; i < count; i++) {
        if (strcmp(value, names[i]) == 0) {
            return i;
        }
        int n = snprintf(expected + at, sizeof expected - at, "%s'%s'", i > 0 ? " or " : "",
                         names[i]);
        at += n > 0 && (size_t)n < sizeof expected - at ? (size_t)n : 0;
    }
    if (missing[0] != '\0') {
        (void)snprintf(standard, sizeof standard, "'%s'", missing);
    }
    refuse(r, key, standard, expected);
    return 0;
}

static void need_name(const struct reader *r, const char *key, const char *missing,
                      const char *needed)
{
    (void)read_choice(r, key, missing, &needed, 1);
}

/* An empty default means that null and "" are fine. */
static void read_text(const struct reader *r, const char *key, const char *missing, char *text,
                      size_t capacity)
{
    const struct json *node = json_get(r->object, key);
    const char *value = missing;
    char expected[64];
    if (node != NULL && (node->type != JSON_NULL || missing[0] != '\0')) {
        value = node->type == JSON_STRING ? node->string : NULL;
    }
    if (value == NULL || strlen(value) >= capacity || (value[0] == '\0' && missing[0] != '\0')) {
        (void)snprintf(expected, sizeof expected, "a text of 1..%zu bytes", capacity - 1);
        refuse(r, key, "", expected);
        value = "";
    }
    if (!failed(r)) {
        memcpy(text, value, strlen(value) + 1);
    }
}

/* Integers into values[]; their count, 0 on failure. */
static int read_list(const struct reader *r, const char *key, int *values, int least, int most,
                     int low, int high)
{
    const struct json *node = json_get(r->object, key);
    char expected[96];
    if (least == most) {
        (void)snprintf(expected, sizeof expected, "a list of %d whole numbers in %d..%d", least,
                       low, high);
    } else {
        (void)snprintf(expected, sizeof expected, "a list of %d..%d whole numbers in %d..%d", least,
                       most, low, high);
    }
    if (node == NULL || node->type != JSON_ARRAY || node->count < least || node->count > most) {
        refuse(r, key, "", expected);
        return 0;
    }
    int count = 0;
    for (const struct json *item = node->first; item != NULL; item = item->next) {
        int64_t value;
        if (!json_integer(item, &value) || value < low || value > high) {
            char text[256], found[FOUND_BYTES];
            (void)snprintf(text, sizeof text, "has the entry %s, expected %s",
                           found_text(item, "", found), expected);
            refuse_because(r, key, text);
            return 0;
        }
        values[count++] = (int)value;
    }
    return count;
}

/* The object under the key; an empty one, whose keys are all missing, for none or null. */
static struct reader open_section(const struct reader *r, const char *key, const char *section,
                                  int required)
{
    const struct json *node = json_get(r->object, key);
    int absent = node == NULL || node->type == JSON_NULL;
    if (absent ? required : node->type != JSON_OBJECT) {
        refuse(r, key, "", "an object");
    }
    return (struct reader){.source = r->source, .section = section, .object = node};
}

/* ---- transformers ------------------------------------------------------------------------ */

static const struct {
    const char *name;
    enum norm_kind kind;
    float eps;
} norms[] = {{"layer_norm", NORM_LAYER, 1e-5f},
             {"layer_norm_f32", NORM_LAYER, 1e-8f},
             {"rms_norm", NORM_RMS, 1e-5f},
             {"rms_norm_f32", NORM_RMS, 1e-8f}};

#define NORM_COUNT ((int)(sizeof norms / sizeof norms[0]))

static void read_norm(const struct reader *r, const char *key, const char *missing,
                      enum norm_kind *kind, float *eps)
{
    const char *names[NORM_COUNT];
    for (int i = 0; i < NORM_COUNT; i++) {
        names[i] = norms[i].name;
    }
    int i = read_choice(r, key, missing, names, NORM_COUNT);
    *kind = norms[i].kind;
    *eps = norms[i].eps;
}

static int read_gating(const struct reader *r, const char *key)
{
    static const char *const names[] = {"none", "silu"};
    return read_choice(r, key, "none", names, 2);
}

/* Any number switches the vectors on: it was their value before training. */
static int read_layer_scale(const struct reader *r, const char *key)
{
    const struct json *node = json_get(r->object, key);
    if (given(r, key) && node->type != JSON_NUMBER) {
        refuse(r, key, "", "a number or null");
    }
    return given(r, key);
}

/* Hidden units: upstream keeps the number of weights by making gated blocks narrower. */
static int hidden_units(int dim, int feedforward, int gated)
{
    if (!gated) {
        return feedforward;
    }
    return feedforward == 4 * dim ? 21 * dim / 8 : 2 * feedforward / 3;
}

static int scaled_feedforward(const struct reader *r, double scale, int dim)
{
    double value = scale * dim;
    if (value >= 2 && value <= MAX_FEEDFORWARD) {
        return (int)value;
    }
    char text[160];
    (void)snprintf(text, sizeof text,
                   "times the width %d gives %g feed-forward units, expected 2..%d", dim, value,
                   MAX_FEEDFORWARD);
    refuse_because(r, "hidden_scale", text);
    return 2;
}

/* Width and heads under the given keys, into t. */
static void read_heads(const struct reader *r, const char *dim_key, int64_t missing_dim,
                       const char *heads_key, int64_t missing_heads, const char *repeat_key,
                       struct transformer_config *t)
{
    t->dim = read_int(r, dim_key, missing_dim, 1, MAX_DIM);
    t->heads = read_int(r, heads_key, missing_heads, 1, MAX_DIM);
    int repeat = read_int(r, repeat_key, 1, 1, MAX_DIM);
    char text[96];
    if (t->dim % t->heads != 0) {
        (void)snprintf(text, sizeof text, "is %d, expected a divisor of the width %d", t->heads,
                       t->dim);
        refuse_because(r, heads_key, text);
    } else if (t->heads % repeat != 0) {
        (void)snprintf(text, sizeof text, "is %d, expected a divisor of the %d heads", repeat,
                       t->heads);
        refuse_because(r, repeat_key, text);
    } else if (t->position == POSITION_ROPE && t->dim / t->heads % 2 != 0) {
        (void)snprintf(text, sizeof text,
                       "makes heads of %d elements, expected an even number for rope",
                       t->dim / t->heads);
        refuse_because(r, heads_key, text);
    }
    t->kv_heads = t->heads / repeat;
}

/* Keys of every transformer with one supported value. */
static void check_transformer(const struct reader *r, int causal_default)
{
    need_flag(r, "causal", causal_default, 1);
    need_flag(r, "skip_self_attn", 0, 0);
    need_name(r, "activation", "gelu", "gelu");
}

static double read_period(const struct reader *r, const char *key)
{
    return read_number(r, key, 10000, 0, 0, MAX_PERIOD);
}

/* ---- language model ---------------------------------------------------------------------- */

static void read_streams(const struct reader *r, struct lm_config *c)
{
    c->n_q = read_int(r, "n_q", 8, 1, MOSHI_MAX_CODEBOOKS);
    c->dep_q = read_int(r, "dep_q", 8, 0, c->n_q);
    c->card = read_int(r, "card", 1024, 1, MAX_CARD);
    c->text_card = read_int(r, "text_card", 32000, 1, MAX_CARD);
    c->text_card_out = read_optional_int(r, "text_card_out", c->text_card, 1, MAX_CARD);
    c->text_padding_id = read_int(r, "existing_text_padding_id", 3, 0, c->text_card);
    c->text_end_padding_id = read_int(r, "existing_text_end_padding_id", 0, 0, c->text_card);
    int count = read_list(r, "delays", c->delays, c->n_q + 1, c->n_q + 1, 0, MAX_DELAY);
    for (int i = 0; i < count; i++) {
        c->max_delay = c->delays[i] > c->max_delay ? c->delays[i] : c->max_delay;
    }
    c->norm_emb = read_flag(r, "norm_emb", 0);
    c->bias_proj = read_flag(r, "bias_proj", 0);
    /* Renamed by upstream; the old key wins there. */
    int renamed = json_get(r->object, "demux_second_stream") != NULL;
    c->demux_second_stream =
        read_flag(r, renamed ? "demux_second_stream" : "demux_second_text_stream", 0);
    c->heads = read_int(r, "extra_heads_num_heads", 0, 0, MOSHI_MAX_HEADS);
    c->head_dim = read_int(r, "extra_heads_dim", 6, 1, MOSHI_MAX_HEAD_DIM);
}

static void read_temporal(const struct reader *r, double hidden_scale, struct lm_config *c)
{
    static const char *const positions[] = {"rope", "none"};
    struct transformer_config *t = &c->temporal;
    int position = read_choice(r, "positional_embedding", "sin", positions, 2);
    t->position = position == 0 ? POSITION_ROPE : POSITION_NONE;
    read_heads(r, "dim", 128, "num_heads", 8, "kv_repeat", t);
    t->layers = read_int(r, "num_layers", REQUIRED, 1, MAX_LAYERS);
    t->gated = read_gating(r, "gating");
    t->feedforward = hidden_units(t->dim, scaled_feedforward(r, hidden_scale, t->dim), t->gated);
    read_norm(r, "norm", "layer_norm", &t->norm, &t->norm_eps);
    t->max_period = read_period(r, "max_period");
    /* Upstream allows none in training; streaming needs the size of the ring. */
    t->context = read_int(r, "context", REQUIRED, 1, MAX_CONTEXT);
    t->layer_scale = read_layer_scale(r, "layer_scale");
    t->weight_sets = 1;
    check_transformer(r, 1);
    c->cross_attention = read_flag(r, "cross_attention", 0);
}

/* Upstream copies the main settings for the depth transformer, then a "depformer_" key replaces
 * the one behind its prefix, null included. */
static const char *depth_key(const struct reader *r, const char *key)
{
    return json_get(r->object, key) != NULL ? key : key + strlen("depformer_");
}

static int read_depth_feedforward(const struct reader *r, double hidden_scale, int dim, int sets)
{
    static const char key[] = "depformer_dim_feedforward";
    const struct json *node = json_get(r->object, key);
    if (!given(r, key)) {
        return scaled_feedforward(r, hidden_scale, dim);
    }
    if (node->type != JSON_ARRAY) {
        return read_int(r, key, REQUIRED, 2, MAX_FEEDFORWARD);
    }
    int values[MOSHI_MAX_CODEBOOKS];
    int count = read_list(r, key, values, sets, sets, 2, MAX_FEEDFORWARD);
    for (int i = 1; i < count; i++) {
        need(r, key, values[i] == values[0],
             "is a list of different numbers, expected the same for every step");
    }
    return count > 0 ? values[0] : 2;
}

static void read_schedule(const struct reader *r, struct lm_config *c)
{
    static const char key[] = "depformer_weights_per_step_schedule";
    int sets = c->dep_q;
    for (int i = 0; i < c->dep_q; i++) {
        c->depth_schedule[i] = i;
    }
    if (given(r, key)) {
        sets = 1;
        int count = read_list(r, key, c->depth_schedule, c->dep_q, c->dep_q, 0, c->dep_q - 1);
        for (int i = 0; i < count; i++) {
            sets = c->depth_schedule[i] + 1 > sets ? c->depth_schedule[i] + 1 : sets;
        }
    }
    c->depth.weight_sets = sets;
}

static void read_depth(const struct reader *r, double hidden_scale, struct lm_config *c)
{
    struct transformer_config *t = &c->depth;
    if (c->dep_q == 0) {
        return;
    }
    need_name(r, "depformer_pos_emb", "sin", "none");
    t->position = POSITION_NONE;
    need_flag(r, "depformer_weights_per_step", 0, 1);
    read_schedule(r, c);
    read_heads(r, "depformer_dim", 256, "depformer_num_heads", REQUIRED,
               depth_key(r, "depformer_kv_repeat"), t);
    t->layers = read_int(r, depth_key(r, "depformer_num_layers"), REQUIRED, 1, MAX_LAYERS);
    const char *gating = depth_key(r, "depformer_gating");
    t->gated = read_gating(r, gating);
    if (!t->gated) {
        refuse(r, gating, "'none'", "'silu', as every step has its own weights");
    }
    int feedforward = read_depth_feedforward(r, hidden_scale, t->dim, t->weight_sets);
    t->feedforward = hidden_units(t->dim, feedforward, t->gated);
    t->norm = c->temporal.norm;
    t->norm_eps = c->temporal.norm_eps;
    t->max_period = read_period(r, depth_key(r, "depformer_max_period"));
    t->context = c->dep_q;
    t->layer_scale = read_layer_scale(r, depth_key(r, "depformer_layer_scale"));
    need_flag(r, "depformer_skip_self_attn", 0, 0);
    need_name(r, "depformer_activation", "gelu", "gelu");
    c->depth_multi_linear = read_flag(r, "depformer_multi_linear", 0);
    c->depth_low_rank = read_optional_int(r, "depformer_low_rank_embeddings", 0, 1, MAX_DIM);
    if (given(r, "depformer_norm")) {
        read_norm(r, "depformer_norm", "", &c->depth_norm, &c->depth_norm_eps);
    }
}

/* ---- conditions -------------------------------------------------------------------------- */

static void fail_memory(const struct reader *r)
{
    if (!failed(r)) {
        r->source->status = moshi_fail(MOSHI_ERROR_MEMORY, "%s: no memory for the conditions",
                                       r->source->what);
    }
}

static int compare_texts(const void *left, const void *right)
{
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

static void read_values(const struct reader *r, struct condition_config *condition)
{
    static const char key[] = "possible_values";
    const struct json *node = json_get(r->object, key);
    if (!given(r, key)) {
        return;
    }
    if (node->type != JSON_ARRAY || node->count < 1 || node->count > condition->bins) {
        refuse(r, key, "", "a list of 1..n_bins texts");
        return;
    }
    /* Twice as many: the second half is sorted to find a value that stands there twice. */
    size_t count = (size_t)node->count;
    condition->values = calloc(2 * count, sizeof *condition->values);
    if (condition->values == NULL) {
        fail_memory(r);
        return;
    }
    for (const struct json *item = node->first; item != NULL; item = item->next) {
        if (item->type != JSON_STRING) {
            refuse_because(r, key, "has an entry that is not a text, expected texts only");
            return;
        }
        size_t bytes = strlen(item->string) + 1;
        char *copy = malloc(bytes);
        if (copy == NULL) {
            fail_memory(r);
            return;
        }
        condition->values[condition->n_values++] = memcpy(copy, item->string, bytes);
    }
    char **sorted = condition->values + count;
    memcpy(sorted, condition->values, count * sizeof *sorted);
    qsort(sorted, count, sizeof *sorted, compare_texts);
    for (size_t i = 1; i < count; i++) {
        need(r, key, strcmp(sorted[i - 1], sorted[i]) != 0,
             "has the same text twice, expected each once");
    }
}

/* The settings of one conditioner, found in `type`'s own object. */
static void read_conditioner(const struct reader *r, int model_dim,
                             struct condition_config *condition)
{
    static const char *const kinds[] = {"lut", "tensor"};
    int kind = read_choice(r, "type", "", kinds, 2);
    condition->kind = kind == 0 ? CONDITION_LUT : CONDITION_TENSOR;
    struct reader own = open_section(r, kinds[kind], r->section, 1);
    condition->dim = read_int(&own, "dim", REQUIRED, 1, MAX_DIM);
    need_flag(&own, "output_bias", 0, 0);
    need_flag(&own, "learn_padding", 1, 1);
    if (condition->dim == model_dim) {
        need_flag(&own, "force_linear", 1, 1);
    }
    if (condition->kind == CONDITION_LUT) {
        condition->bins = read_int(&own, "n_bins", REQUIRED, 1, MAX_BINS);
        need_name(&own, "tokenizer", "", "noop");
        read_values(&own, condition);
    }
}

/* Conditions are kept in the order of the fuser's lists, in which upstream adds them up. A
 * conditioner in no list has no effect there, and is left out here. */
static void read_fused(const struct reader *fuser, const struct reader *conditioners,
                       const char *list, struct lm_config *c)
{
    const struct json *names = json_get(fuser->object, list);
    if (names == NULL) {
        return;
    }
    if (names->type != JSON_ARRAY) {
        refuse(fuser, list, "", "a list of conditions");
        return;
    }
    for (const struct json *name = names->first; name != NULL && !failed(fuser);
         name = name->next) {
        const char *text = name->type == JSON_STRING ? name->string : "";
        char message[160];
        for (int i = 0; i < c->n_conditions; i++) {
            (void)snprintf(message, sizeof message,
                           "names the condition '%.60s' again, expected each once", text);
            need(fuser, list, strcmp(c->conditions[i].name, text) != 0, message);
        }
        if (c->n_conditions == CONFIG_MAX_CONDITIONS) {
            (void)snprintf(message, sizeof message, "has too many conditions, expected at most %d",
                           CONFIG_MAX_CONDITIONS);
            refuse_because(fuser, list, message);
        }
        const struct json *node = json_get(conditioners->object, text);
        if (node == NULL || node->type != JSON_OBJECT ||
            strlen(text) >= sizeof c->conditions->name) {
            (void)snprintf(message, sizeof message,
                           "names the condition '%.60s', expected one of 'conditioners', with a "
                           "name of at most %zu bytes",
                           text, sizeof c->conditions->name - 1);
            refuse_because(fuser, list, message);
        }
        if (failed(fuser)) {
            return;
        }
        char section[96];
        struct condition_config *condition = &c->conditions[c->n_conditions++];
        memcpy(condition->name, text, strlen(text) + 1);
        condition->summed = strcmp(list, "sum") == 0;
        (void)snprintf(section, sizeof section, "conditioners.%s.", text);
        struct reader own = {.source = fuser->source, .section = section, .object = node};
        read_conditioner(&own, c->temporal.dim, condition);
    }
}

static void read_conditions(const struct reader *r, struct lm_config *c)
{
    struct reader conditioners = open_section(r, "conditioners", "conditioners.", 0);
    struct reader fuser = open_section(r, "fuser", "fuser.", 0);
    const struct json *prepend = json_get(fuser.object, "prepend");
    if (prepend != NULL && (prepend->type != JSON_ARRAY || prepend->count > 0)) {
        refuse(&fuser, "prepend", "", "an empty list");
    }
    read_fused(&fuser, &conditioners, "sum", c);
    int summed = c->n_conditions;
    read_fused(&fuser, &conditioners, "cross", c);
    if (c->n_conditions > summed && !c->cross_attention) {
        refuse_because(&fuser, "cross",
                       "is not empty, expected 'cross_attention' to be true as well");
    }
    c->has_conditions = c->n_conditions > 0 ||
                        (given(r, "conditioners") && conditioners.object->count > 0);
}

/* ---- the rest of config.json ------------------------------------------------------------- */

static void read_names(const struct reader *r, struct lm_config *c)
{
    read_text(r, "model_type", "moshi", c->family, sizeof c->family);
    read_text(r, "moshi_name", "model.safetensors", c->lm_name, CONFIG_NAME);
    read_text(r, "mimi_name", "tokenizer-e351c8d8-checkpoint125.safetensors", c->mimi_name,
              CONFIG_NAME);
    read_text(r, "tokenizer_name", "tokenizer_spm_32k_3.model", c->tokenizer_name, CONFIG_NAME);
    read_text(r, "mimi_config_name", "", c->mimi_config_name, CONFIG_NAME);
    read_text(r, "lora_name", "", c->lora_name, CONFIG_NAME);
}

static void read_generation(const struct reader *r, struct lm_config *c)
{
    struct reader gen = open_section(r, "lm_gen_config", "lm_gen_config.", 0);
    c->text_temperature = (float)read_number(&gen, "temp_text", 0.7, 0, 1, 1000);
    c->audio_temperature = (float)read_number(&gen, "temp", 0.8, 0, 1, 1000);
    c->text_top_k = read_int(&gen, "top_k_text", 25, 0, MAX_CARD);
    c->audio_top_k = read_int(&gen, "top_k", 250, 0, MAX_CARD);
    struct reader stt = open_section(r, "stt_config", "stt_config.", 0);
    c->audio_delay_seconds = read_number(&stt, "audio_delay_seconds", 0, 0, 1, 3600);
    c->audio_silence_prefix_seconds = read_number(&stt, "audio_silence_prefix_seconds", 0, 0, 1,
                                                  3600);
}

/* Opens the text as a reader of its root object; the caller frees *document. */
static int open_text(const char *text, size_t bytes, struct source *source,
                     struct json_document **document, struct reader *reader)
{
    source->status = json_parse(text, bytes, source->what, document);
    if (source->status == MOSHI_OK) {
        *reader = (struct reader){.source = source, .section = "", .object = json_root(*document)};
        if (reader->object->type != JSON_OBJECT) {
            source->status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                        "%s: the file holds no JSON object, expected one",
                                        source->what);
        }
    }
    return source->status;
}

int lm_config_parse(const char *text, size_t bytes, const char *what, struct lm_config *config)
{
    struct source source = {.what = text != NULL ? what : "built-in config"};
    struct json_document *document = NULL;
    struct reader r;
    *config = (struct lm_config){0};
    if (text == NULL) {
        text = builtin_lm;
        bytes = sizeof builtin_lm - 1;
    }
    if (open_text(text, bytes, &source, &document, &r) == MOSHI_OK) {
        double hidden_scale = read_number(&r, "hidden_scale", 4, 0, 0, 1024);
        read_names(&r, config);
        read_streams(&r, config);
        read_temporal(&r, hidden_scale, config);
        read_depth(&r, hidden_scale, config);
        read_conditions(&r, config);
        read_generation(&r, config);
    }
    json_free(document);
    if (source.status != MOSHI_OK) {
        lm_config_free(config);
    }
    return source.status;
}

void lm_config_free(struct lm_config *config)
{
    if (config == NULL) {
        return;
    }
    for (int i = 0; i < CONFIG_MAX_CONDITIONS; i++) {
        struct condition_config *condition = &config->conditions[i];
        for (int j = 0; j < condition->n_values; j++) {
            free(condition->values[j]);
        }
        free(condition->values);
    }
    *config = (struct lm_config){0};
}

/* ---- mimi -------------------------------------------------------------------------------- */

static void read_seanet(const struct reader *r, struct mimi_config *c)
{
    static const int standard[] = {8, 5, 4, 2};
    c->dimension = read_int(r, "dimension", 128, 1, MAX_DIM);
    c->n_filters = read_int(r, "n_filters", 32, 1, MAX_DIM);
    c->kernel = read_int(r, "kernel_size", 7, 1, MAX_KERNEL);
    c->residual_kernel = read_int(r, "residual_kernel_size", 3, 1, MAX_KERNEL);
    c->last_kernel = read_int(r, "last_kernel_size", 7, 1, MAX_KERNEL);
    c->compress = read_int(r, "compress", 2, 1, MAX_DIM);
    c->n_ratios = 4;
    memcpy(c->ratios, standard, sizeof standard);
    if (json_get(r->object, "ratios") != NULL) {
        c->n_ratios = read_list(r, "ratios", c->ratios, 1, CONFIG_MAX_RATIOS, 1, MAX_KERNEL);
    }
    int64_t hop = 1;
    for (int i = 0; i < c->n_ratios && hop <= MAX_FRAME; i++) {
        hop *= c->ratios[i];
    }
    need(r, "ratios", hop <= MAX_FRAME,
         "multiply to more than 2^20 samples, expected "
         "at most that");
    c->hop = hop <= MAX_FRAME ? (int)hop : 1;
    need(r, "n_filters", (int64_t)c->n_filters << c->n_ratios <= MAX_DIM,
         "doubled for each ratio is more than 65536, expected at most that");
    need(r, "compress", c->compress <= c->n_filters,
         "is greater than n_filters, expected at most that");

    (void)read_int(r, "channels", 1, 1, 1);
    (void)read_int(r, "n_residual_layers", 3, 1, 1);
    need_name(r, "activation", "ELU", "ELU");
    need_name(r, "norm", "none", "none");
    need_name(r, "pad_mode", "reflect", "constant");
    need_flag(r, "causal", 0, 1);
    need_flag(r, "true_skip", 1, 1);
    if (given(r, "final_activation")) {
        refuse(r, "final_activation", "", "null");
    }
    (void)read_number(r, "trim_right_ratio", 1, 1, 1, 1);
    struct reader params = open_section(r, "activation_params", "seanet.activation_params.", 0);
    (void)read_number(&params, "alpha", 1, 1, 1, 1);
}

static void read_quantizer(const struct reader *r, struct mimi_config *c)
{
    c->quantizer_dim = read_int(r, "dimension", 128, 1, MAX_DIM);
    c->bins = read_int(r, "bins", 1024, 1, MAX_CARD);
    c->n_q = read_int(r, "n_q", 8, 2, MOSHI_MAX_CODEBOOKS);
    (void)read_int(r, "n_q_semantic", 1, 1, 1);
    int input = read_optional_int(r, "input_dimension", c->quantizer_dim, 1, MAX_DIM);
    int output = read_optional_int(r, "output_dimension", c->quantizer_dim, 1, MAX_DIM);
    need(r, "input_dimension", input == c->dimension,
         "differs from seanet.dimension, expected the same");
    need(r, "output_dimension", output == c->dimension,
         "differs from seanet.dimension, expected the same");
}

static void read_codec_transformer(const struct reader *r, struct mimi_config *c)
{
    struct transformer_config *t = &c->transformer;
    need_name(r, "positional_embedding", "sin", "rope");
    t->position = POSITION_ROPE;
    read_heads(r, "d_model", REQUIRED, "num_heads", REQUIRED, "kv_repeat", t);
    t->layers = read_int(r, "num_layers", REQUIRED, 1, MAX_LAYERS);
    t->feedforward = read_int(r, "dim_feedforward", 2048, 1, MAX_FEEDFORWARD);
    need_name(r, "gating", "none", "none");
    need_name(r, "norm", "layer_norm", "layer_norm");
    t->norm = NORM_LAYER;
    t->norm_eps = 1e-5f;
    t->max_period = read_period(r, "max_period");
    t->context = read_int(r, "context", REQUIRED, 1, MAX_CONTEXT);
    t->layer_scale = read_layer_scale(r, "layer_scale");
    t->weight_sets = 1;
    check_transformer(r, 0);
    need_flag(r, "conv_layout", 0, 1);
    need_flag(r, "cross_attention", 0, 0);
    /* Equal widths: upstream has no projections then, and neither have we. */
    int input = read_int(r, "input_dimension", REQUIRED, 1, MAX_DIM), output = 0;
    (void)read_list(r, "output_dimensions", &output, 1, 1, 1, MAX_DIM);
    need(r, "d_model", t->dim == c->dimension, "differs from seanet.dimension, expected the same");
    need(r, "input_dimension", input == t->dim, "differs from d_model, expected the same");
    need(r, "output_dimensions", output == t->dim, "differs from d_model, expected the same");
}

static void read_rates(const struct reader *r, struct mimi_config *c)
{
    (void)read_int(r, "channels", REQUIRED, 1, 1);
    c->sample_rate = read_int(r, "sample_rate", REQUIRED, 1, MAX_FRAME);
    c->frame_rate = read_number(r, "frame_rate", NAN, 0, 0, MAX_FRAME);
    double frame = c->sample_rate / c->frame_rate;
    if (!(frame >= 1 && frame <= MAX_FRAME && frame == floor(frame))) {
        refuse(r, "frame_rate", "",
               "one that divides the sample rate into frames of 1..2^20 "
               "whole samples");
        frame = 1;
    }
    c->frame_size = (int)frame;
}

int mimi_config_parse(const char *text, size_t bytes, const char *what, struct mimi_config *config)
{
    struct source source = {.what = text != NULL ? what : "built-in mimi config"};
    struct json_document *document = NULL;
    struct reader r;
    *config = (struct mimi_config){0};
    if (text == NULL) {
        text = builtin_mimi;
        bytes = sizeof builtin_mimi - 1;
    }
    if (open_text(text, bytes, &source, &document, &r) == MOSHI_OK) {
        read_rates(&r, config);
        struct reader seanet = open_section(&r, "seanet", "seanet.", 1);
        read_seanet(&seanet, config);
        struct reader quantizer = open_section(&r, "quantizer", "quantizer.", 1);
        read_quantizer(&quantizer, config);
        struct reader transformer = open_section(&r, "transformer", "transformer.", 1);
        read_codec_transformer(&transformer, config);
        config->stride = config->frame_size / config->hop;
        if (config->frame_size % config->hop != 0) {
            char message[128];
            (void)snprintf(message, sizeof message,
                           "multiply to %d samples, expected a divisor of the frame of %d",
                           config->hop, config->frame_size);
            refuse_because(&seanet, "ratios", message);
        }
    }
    json_free(document);
    if (source.status != MOSHI_OK) {
        *config = (struct mimi_config){0};
    }
    return source.status;
}
