/* fuzz_config.c: config.json of a language model and the codec's own. Every number of an accepted
 * config is one that the rest of the library can compute with. */
#include <math.h>

#include "config.h"
#include "fuzz.h"

static void check_transformer(const struct transformer_config *stack)
{
    PROMISE(stack->dim > 0 && stack->dim <= 1 << 16);
    PROMISE(stack->heads > 0 && stack->dim % stack->heads == 0);
    PROMISE(stack->kv_heads > 0 && stack->heads % stack->kv_heads == 0);
    PROMISE(stack->position != POSITION_ROPE || stack->dim / stack->heads % 2 == 0);
    PROMISE(stack->layers > 0 && stack->layers <= 512);
    PROMISE(stack->feedforward > 0 && stack->feedforward <= 1 << 20);
    PROMISE(stack->norm == NORM_NONE || stack->norm_eps > 0);
    PROMISE(isfinite(stack->max_period));
    PROMISE(stack->context > 0 && stack->context <= 1 << 20);
    PROMISE(stack->weight_sets >= 1 && stack->weight_sets <= MOSHI_MAX_CODEBOOKS);
}

static void check_name(const char *name)
{
    PROMISE(memchr(name, '\0', CONFIG_NAME) != NULL);
}

static void check_lm(const struct lm_config *c)
{
    int max_delay = 0;
    PROMISE(memchr(c->family, '\0', sizeof c->family) != NULL);
    PROMISE(c->n_q >= 1 && c->n_q <= MOSHI_MAX_CODEBOOKS && c->dep_q >= 0 && c->dep_q <= c->n_q);
    PROMISE(c->card >= 1 && c->card <= 1 << 24);
    PROMISE(c->text_card >= 1 && c->text_card_out >= 1);
    PROMISE(c->text_card <= 1 << 24 && c->text_card_out <= 1 << 24);
    PROMISE(c->text_padding_id >= 0 && c->text_padding_id <= c->text_card);
    PROMISE(c->text_end_padding_id >= 0 && c->text_end_padding_id <= c->text_card);
    for (int i = 0; i <= c->n_q; ++i) {
        PROMISE(c->delays[i] >= 0 && c->delays[i] <= 1024);
        max_delay = c->delays[i] > max_delay ? c->delays[i] : max_delay;
    }
    PROMISE(c->max_delay == max_delay);
    check_transformer(&c->temporal);
    if (c->dep_q > 0) {
        check_transformer(&c->depth);
        for (int i = 0; i < c->dep_q; ++i)
            PROMISE(c->depth_schedule[i] >= 0 && c->depth_schedule[i] < c->depth.weight_sets);
    }
    PROMISE(c->heads >= 0 && c->heads <= MOSHI_MAX_HEADS);
    PROMISE(c->head_dim >= 1 && c->head_dim <= MOSHI_MAX_HEAD_DIM);
    PROMISE(c->n_conditions >= 0 && c->n_conditions <= CONFIG_MAX_CONDITIONS);
    for (int i = 0; i < c->n_conditions; ++i) {
        const struct condition_config *condition = &c->conditions[i];
        PROMISE(memchr(condition->name, '\0', sizeof condition->name) != NULL);
        PROMISE(condition->dim > 0 && condition->n_values >= 0);
        PROMISE(condition->kind != CONDITION_LUT || condition->n_values <= condition->bins);
        for (int v = 0; v < condition->n_values; ++v)
            PROMISE(strlen(condition->values[v]) < 1 << 24);
    }
    PROMISE(c->text_temperature >= 0 && c->audio_temperature >= 0);
    PROMISE(isfinite(c->text_temperature) && isfinite(c->audio_temperature));
    PROMISE(c->text_top_k >= 0 && c->audio_top_k >= 0);
    check_name(c->lm_name);
    check_name(c->mimi_name);
    check_name(c->mimi_config_name);
    check_name(c->tokenizer_name);
    check_name(c->lora_name);
}

static void check_mimi(const struct mimi_config *c)
{
    int64_t hop = 1;
    PROMISE(c->sample_rate > 0 && c->frame_rate > 0);
    PROMISE(c->frame_size >= 1 && c->frame_size <= 1 << 20);
    PROMISE(c->n_ratios >= 1 && c->n_ratios <= CONFIG_MAX_RATIOS);
    for (int i = 0; i < c->n_ratios; ++i) hop *= c->ratios[i];
    PROMISE(c->hop == hop && c->stride >= 1 && hop * c->stride == c->frame_size);
    PROMISE(c->n_filters >= 1 && c->n_filters << c->n_ratios <= 1 << 16);
    PROMISE(c->compress >= 1 && c->n_filters / c->compress >= 1);
    PROMISE(c->kernel >= 1 && c->residual_kernel >= 1 && c->last_kernel >= 1);
    PROMISE(c->transformer.dim == c->dimension);
    PROMISE(c->quantizer_dim >= 1 && c->bins >= 1 && c->n_q >= 2 && c->n_q <= MOSHI_MAX_CODEBOOKS);
    check_transformer(&c->transformer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct lm_config lm;
    struct mimi_config mimi;
    int status = lm_config_parse((const char *)data, bytes, "input", &lm);
    promise_answer(status);
    if (status == MOSHI_OK) {
        check_lm(&lm);
        lm_config_free(&lm);
    }
    status = mimi_config_parse((const char *)data, bytes, "input", &mimi);
    promise_answer(status);
    if (status == MOSHI_OK) check_mimi(&mimi);
    return 0;
}
