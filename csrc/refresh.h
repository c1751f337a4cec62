/* refresh.h: contexts that are renewed. A model was trained on calls of some length, its range; a ring
 * of keys and values goes on beyond it, with keys that were made from what it has forgotten. With
 * the policy "refresh" a session's context is read anew from the tokens of its last `keep` frames, as
 * that of a conversation which began there: positions start again, and nothing older is left in it.
 *
 * It begins at a pause, when 80 % of the range is used, else so that it is done when the range ends.
 * The old context is in use for some steps more, after each of which a pass reads a part of the new
 * one. Which frame is the first to use it follows from tokens and levels alone: what else the engine
 * has to do, and when the passes run, changes no bit. */
#ifndef MOSHI_REFRESH_H
#define MOSHI_REFRESH_H

#include "lm.h"

#define REFRESH_FRAMES 16 /* of one pass */
#define REFRESH_PAUSE 6 /* frames in which nobody speaks */

struct refresh {
    struct refresh_state {
        int32_t range, keep; /* frames */
        int32_t rows; /* in `history` */
        int32_t begun; /* the row of position 0 of the context that is being read */
        int32_t left; /* steps until it is used; 0: none is being read */
        int32_t quiet; /* frames in a row in which nobody spoke */
    } state;
    int read; /* positions of it that are read; under the backend's lock */
    int renewed; /* the new context is in use, and no frame has told of it yet */
    int halves, most_rows;
    const struct lm_config *config;
    int32_t *history; /* [most_rows][halves][streams] what the last steps have read */
    int32_t *tokens; /* [halves][REFRESH_FRAMES][streams] of one pass */
};

#define REFRESH_STATE ((int64_t)(sizeof(struct refresh_state) / sizeof(int32_t)))

/* range, keep: 0 for the model's context, and for half of what there is. `context` is the ring's.
 * MOSHI_ERROR_ARGUMENT when they leave no room for a call between two refreshes. */
int refresh_create(const struct lm_config *config, int context, int range, int keep, int guided,
                   struct refresh **refresh);
void refresh_destroy(struct refresh *refresh);
void refresh_reset(struct refresh *refresh);
void refresh_copy(struct refresh *to, const struct refresh *from);
/* MOSHI_ERROR_CHECKPOINT unless state and history, read from a stranger, can be used. */
int refresh_check(const struct refresh *refresh);

/* Keeps what `frames` steps have read: tokens[halves], each [frames][streams]. */
void refresh_record(struct refresh *refresh, int frames, const int32_t *const tokens[2]);
/* The frame that brought the slot to so many positions is done. Says whether a refresh begins. */
int refresh_watch(struct refresh *refresh, int64_t positions, int spoken);
/* Whether so many positions leave no time to wait for a pause. */
int refresh_is_due(const struct refresh *refresh, int64_t positions);
void refresh_begin(struct refresh *refresh);
/* Reads the next part of the new context, if there is one. Under the backend's lock. */
int refresh_pass(struct refresh *refresh, struct lm_state *state, int slot);
/* Whether refresh_end has passes left to make. */
int refresh_has_more(const struct refresh *refresh);
/* Reads what is missing and takes the new context into use. Under the backend's lock. */
int refresh_end(struct refresh *refresh, struct lm_state *state, int slot);

#endif
