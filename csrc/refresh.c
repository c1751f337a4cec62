/* refresh.c: what was read, when to read it again, and the passes that do. */
#include "refresh.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"

static int streams_of(const struct refresh *refresh)
{
    return refresh->config->n_q + 1;
}

static size_t row_tokens(const struct refresh *refresh)
{
    return (size_t)refresh->halves * (size_t)streams_of(refresh);
}

/* How many steps the old context is in use while one of `keep` frames is read. A pass is made after
 * each of them, and a frame more comes with each. */
static int refresh_steps(int keep)
{
    return (keep + REFRESH_FRAMES - 2) / (REFRESH_FRAMES - 1) + 1;
}

/* The most rows that are ever looked back at. */
static int rows_needed(int keep)
{
    return keep + refresh_steps(keep);
}

/* No call between two refreshes would be shorter than this. */
static int least_range(int keep)
{
    return keep + 2 * refresh_steps(keep) + 2;
}

int refresh_create(const struct lm_config *config, int context, int range, int keep, int guided,
                   struct refresh **result)
{
    *result = NULL;
    if (range == 0) range = config->temporal.context;
    const int room = range < context ? range : context;
    if (keep == 0) keep = room / 2;
    if (range < 1 || range > 1 << 20 || keep < 1 || keep > range || least_range(keep) > range ||
        rows_needed(keep) > context)
        return moshi_fail(MOSHI_ERROR_ARGUMENT,
                          "context_range is %d and context_keep %d of a context of %d frames, "
                          "expected a context_keep that leaves a call between two refreshes",
                          range, keep, context);
    struct refresh *refresh = calloc(1, sizeof *refresh);
    if (!refresh) return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a session");
    refresh->config = config;
    refresh->state.range = range;
    refresh->state.keep = keep;
    refresh->halves = 1 + guided;
    refresh->most_rows = 2 * rows_needed(keep);
    refresh->history = calloc((size_t)refresh->most_rows * row_tokens(refresh), sizeof(int32_t));
    refresh->tokens = calloc(REFRESH_FRAMES * row_tokens(refresh), sizeof(int32_t));
    if (!refresh->history || !refresh->tokens) {
        refresh_destroy(refresh);
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for the tokens of %d frames",
                          rows_needed(keep));
    }
    *result = refresh;
    return MOSHI_OK;
}

void refresh_destroy(struct refresh *refresh)
{
    if (!refresh) return;
    free(refresh->history);
    free(refresh->tokens);
    free(refresh);
}

void refresh_reset(struct refresh *refresh)
{
    refresh->state = (struct refresh_state){.range = refresh->state.range,
                                            .keep = refresh->state.keep};
    refresh->read = refresh->renewed = 0;
}

void refresh_copy(struct refresh *to, const struct refresh *from)
{
    to->state = from->state;
    to->read = from->read;
    to->renewed = from->renewed;
    memcpy(to->history, from->history,
           (size_t)from->state.rows * row_tokens(from) * sizeof *to->history);
}

int refresh_check(const struct refresh *refresh)
{
    const struct refresh_state *state = &refresh->state;
    const struct lm_config *config = refresh->config;
    if (state->rows < 0 || state->rows > refresh->most_rows || state->begun < 0 ||
        state->begun > state->rows - (state->left > 0) || state->left < 0 ||
        state->left > refresh_steps(state->keep) || state->quiet < 0 ||
        state->quiet > REFRESH_PAUSE ||
        (state->left && state->rows - state->begun > rows_needed(state->keep)))
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "the field session.refresh has %d rows, %d begun, %d left, %d quiet, "
                          "expected at most %d rows and %d left",
                          state->rows, state->begun, state->left, state->quiet, refresh->most_rows,
                          refresh_steps(state->keep));
    for (size_t i = 0; i < (size_t)state->rows * row_tokens(refresh); ++i) {
        const int stream = (int)(i % (size_t)streams_of(refresh));
        const int32_t most = stream ? config->card : config->text_card;
        if (refresh->history[i] < TOKEN_ZERO || refresh->history[i] > most)
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "the field session.history has %d in stream %d, expected -1 to %d",
                              refresh->history[i], stream, most);
    }
    return MOSHI_OK;
}

static void record_one(struct refresh *refresh, const int32_t *const tokens[2], int t)
{
    const size_t streams = (size_t)streams_of(refresh);
    struct refresh_state *state = &refresh->state;
    if (state->rows == refresh->most_rows) {
        const int needed = rows_needed(state->keep), gone = state->rows - needed;
        memmove(refresh->history, refresh->history + (size_t)gone * row_tokens(refresh),
                (size_t)needed * row_tokens(refresh) * sizeof *refresh->history);
        state->rows = needed;
        state->begun = state->begun > gone ? state->begun - gone : 0;
    }
    int32_t *row = refresh->history + (size_t)state->rows++ * row_tokens(refresh);
    for (int half = 0; half < refresh->halves; ++half, row += streams)
        memcpy(row, tokens[half] + (size_t)t * streams, streams * sizeof *row);
}

void refresh_record(struct refresh *refresh, int frames, const int32_t *const tokens[2])
{
    for (int t = 0; t < frames; ++t) record_one(refresh, tokens, t);
}

int refresh_is_due(const struct refresh *refresh, int64_t positions)
{
    return positions >= refresh->state.range - refresh_steps(refresh->state.keep) - 1;
}

int refresh_watch(struct refresh *refresh, int64_t positions, int spoken)
{
    struct refresh_state *state = &refresh->state;
    state->quiet = spoken ? 0 : state->quiet < REFRESH_PAUSE ? state->quiet + 1 : REFRESH_PAUSE;
    if (state->left) return 0;
    const int pause = state->quiet == REFRESH_PAUSE && positions * 5 >= (int64_t)state->range * 4;
    return pause || refresh_is_due(refresh, positions);
}

void refresh_begin(struct refresh *refresh)
{
    struct refresh_state *state = &refresh->state;
    state->begun = state->rows > state->keep ? state->rows - state->keep : 0;
    state->left = refresh_steps(state->keep);
    refresh->read = 0;
}

int refresh_has_more(const struct refresh *refresh)
{
    return refresh->read < refresh->state.rows - refresh->state.begun;
}

/* As a conversation begins: with initial tokens, in each stream until its delay has passed. */
static int32_t renewed_token(const struct refresh *refresh, int position, int stream, int32_t token)
{
    if (position > refresh->config->delays[stream]) return token;
    return stream ? refresh->config->card : refresh->config->text_card;
}

int refresh_pass(struct refresh *refresh, struct lm_state *state, int slot)
{
    const int streams = streams_of(refresh), guided = refresh->halves > 1;
    int frames = refresh->state.rows - refresh->state.begun - refresh->read;
    if (frames <= 0) return MOSHI_OK;
    if (frames > REFRESH_FRAMES) frames = REFRESH_FRAMES;
    if (refresh->read == 0) lm_renew_begin(state, slot, guided);
    const int32_t *row = refresh->history +
                         (size_t)(refresh->state.begun + refresh->read) * row_tokens(refresh);
    for (int t = 0; t < frames; ++t)
        for (int half = 0; half < refresh->halves; ++half)
            for (int s = 0; s < streams; ++s)
                refresh->tokens[(half * frames + t) * streams + s] =
                    renewed_token(refresh, refresh->read + t, s, *row++);
    int status = lm_renew_read(state, slot, guided, refresh->read, frames, refresh->tokens);
    if (!status) refresh->read += frames;
    return status;
}

int refresh_end(struct refresh *refresh, struct lm_state *state, int slot)
{
    int status = MOSHI_OK;
    while (!status && refresh_has_more(refresh)) status = refresh_pass(refresh, state, slot);
    if (status) return status;
    lm_renew_end(state, slot, refresh->halves > 1, refresh->read);
    refresh->state.left = 0;
    return MOSHI_OK;
}
