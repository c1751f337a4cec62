/* config.h: config.json of a checkpoint, and mimi's own config, as plain numbers. Every number of
 * the model comes from here. Keys and defaults are upstream's (moshi/models/loaders.py and lm.py
 * of the moshi Python package); a key we don't know is ignored, one we know but can't honour is an
 * error that names it. */
#ifndef MOSHI_CONFIG_H
#define MOSHI_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "moshi.h"

#define CONFIG_MAX_RATIOS 8
#define CONFIG_MAX_CONDITIONS 8
#define CONFIG_NAME 256 /* bytes of a file name with its NUL */

enum norm_kind { NORM_NONE, NORM_LAYER, NORM_RMS }; /* eps says which flavour */
enum position_kind { POSITION_NONE, POSITION_ROPE };

/* One transformer stack. */
struct transformer_config {
    int dim, heads, layers;
    int kv_heads;    /* heads / kv_repeat */
    int feedforward; /* hidden units: of the gate when gated, of linear1 otherwise */
    int gated;       /* 1: silu(gate) * up; 0: erf gelu between linear1 and linear2 */
    enum norm_kind norm;
    float norm_eps;
    enum position_kind position;
    double max_period;
    int context;
    int layer_scale; /* vectors on both residual branches */
    int weight_sets; /* 1, or one per depth step (by schedule) */
};

enum condition_kind { CONDITION_LUT, CONDITION_TENSOR };

struct condition_config {
    char name[64];
    enum condition_kind kind;
    int bins, dim;
    int n_values;
    char **values; /* possible values; NULL: hashed into bins */
    int summed;    /* fused by sum (else by cross-attention) */
};

struct lm_config {
    char family[16]; /* model_type */
    int n_q, dep_q, card, text_card, text_card_out;
    int delays[MOSHI_MAX_CODEBOOKS + 1]; /* n_q + 1, text first */
    int max_delay;
    struct transformer_config temporal, depth; /* depth.layers = 0 when dep_q = 0 */
    int depth_schedule[MOSHI_MAX_CODEBOOKS];   /* step -> weight set */
    int depth_multi_linear; /* one depformer_in per weight set, else one for all */
    int depth_low_rank;                        /* 0: full-rank embeddings */
    enum norm_kind depth_norm;                 /* before each head; NORM_NONE as published */
    float depth_norm_eps;
    int norm_emb, bias_proj, demux_second_stream, cross_attention;
    int text_padding_id, text_end_padding_id;
    int heads, head_dim;
    int has_conditions; /* a fuser or conditioners are configured */
    int n_conditions;
    struct condition_config conditions[CONFIG_MAX_CONDITIONS];
    float text_temperature, audio_temperature; /* lm_gen_config, else 0.7 and 0.8 */
    int text_top_k, audio_top_k;               /* lm_gen_config, else 25 and 250 */
    char lm_name[CONFIG_NAME], mimi_name[CONFIG_NAME], mimi_config_name[CONFIG_NAME],
        tokenizer_name[CONFIG_NAME], lora_name[CONFIG_NAME]; /* "" when absent without default */
    double audio_delay_seconds, audio_silence_prefix_seconds; /* stt_config */
};

struct mimi_config {
    int sample_rate;
    double frame_rate;
    int frame_size; /* samples: sample_rate / frame_rate */
    int hop;        /* samples of one SEANet step: product of ratios */
    int stride;     /* SEANet steps in a frame: 2 */
    int n_filters, dimension, n_ratios;
    int ratios[CONFIG_MAX_RATIOS]; /* as configured: the decoder's order; the encoder reverses */
    int kernel, residual_kernel, last_kernel, compress;
    struct transformer_config transformer; /* both sides */
    int quantizer_dim, bins, n_q;          /* n_q: codebooks in the file */
};

/* text == NULL: upstream's built-in 7B. `what` names the file in messages. The result owns memory:
 * lm_config_free. */
int lm_config_parse(const char *text, size_t bytes, const char *what, struct lm_config *config);
void lm_config_free(struct lm_config *config);
/* text == NULL: upstream's built-in Mimi. */
int mimi_config_parse(const char *text, size_t bytes, const char *what, struct mimi_config *config);

#endif
