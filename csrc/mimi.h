/* mimi.h: the Mimi codec, streaming. Frames of 1920 samples at 24 kHz become 2 steps of SEANet
 * (25 Hz), then one vector and its codes (12.5 Hz), and back. Everything is causal; a lane's whole
 * history is in mimi_state.
 *
 * Sources: moshi/models/compression.py, modules/seanet.py, conv.py, resample.py and
 * quantization/ of the moshi Python package. */
#ifndef MOSHI_MIMI_H
#define MOSHI_MIMI_H

#include "backend.h"
#include "snapshot.h"
#include "state.h"
#include "transformer.h"
#include "weights.h"

/* conv2(elu(conv1(elu(x)))) + x; conv1 C -> C/2 over 3 taps, conv2 back with 1. */
struct mimi_residual {
    struct conv conv1, conv2;
};

struct mimi {
    struct mimi_config config;
    struct conv encoder_in, encoder_out, downsample;
    struct conv encoder_down[CONFIG_MAX_RATIOS]; /* in the order of execution */
    struct mimi_residual encoder_residual[CONFIG_MAX_RATIOS];
    struct conv decoder_in, decoder_out, upsample;
    struct conv decoder_up[CONFIG_MAX_RATIOS];
    struct mimi_residual decoder_residual[CONFIG_MAX_RATIOS];
    struct transformer encoder_transformer, decoder_transformer;
    struct rvq first, rest; /* 1 semantic level; config.n_q - 1 acoustic ones */
};

/* Layers whose weights a frame reads for one or two steps take loader->lean: the transformers and the
 * convolutions beside them, nine tenths of the codec. The others and the quantisers are f32. */
int mimi_load(struct mimi *mimi, const struct mimi_config *config, struct weight_loader *loader);
void mimi_free(struct mimi *mimi);
/* What one frame costs: bytes of weights read, and operations of products, two for each
 * multiply-add. decoder: 0 the encoder with its search for codes, 1 the decoder. */
void mimi_cost(const struct mimi *mimi, int decoder, int levels, int64_t *bytes, int64_t *flops);

/* History and scratch of up to `lanes` signals. `frames` is how many frames one call may take. */
struct mimi_state {
    const struct mimi *mimi;
    struct backend *backend;
    int lanes, frames;
    int exact_window; /* whole files: every query sees `context` keys, as upstream's one big call;
                         else a frame's first half sees one key less, as upstream's stream */
    struct state_table encoder, decoder;
    struct kv_pages encoder_kv, decoder_kv;
    float *encoder_history[2 + 3 * CONFIG_MAX_RATIOS + 1];
    float *decoder_history[2 + 3 * CONFIG_MAX_RATIOS + 1];
    int32_t *downsample_first;
    int32_t *encoder_position, *decoder_position;   /* device, [lanes] */
    int64_t *encoder_offset, *decoder_offset;       /* host, [lanes] */
    float *buffer[3], *work;                        /* activations */
    float *gathered; /* of all frames, between the layers that take one and those that take all */
    float *query, *attended, *hidden, *cos_sin;
    size_t buffer_bytes, gathered_bytes, small_bytes, hidden_bytes;
};

int mimi_state_create(struct mimi_state *state, const struct mimi *mimi, struct backend *backend,
                      int lanes, int frames, int exact_window);
void mimi_state_destroy(struct mimi_state *state);
void mimi_state_reset(struct mimi_state *state, int lane);
void mimi_encoder_reset(struct mimi_state *state, int lane); /* that half alone */
/* Lane `to` becomes a copy of `from`; keys and values are shared, not copied. */
void mimi_state_copy(struct mimi_state *state, int from, int to);
/* Device memory that it takes at once. */
size_t mimi_state_fixed_bytes(const struct mimi_state *state);
/* Lists the state of a lane, its fields named with `suffix`; reads the same back from a snapshot,
 * which may hold anything, into a lane that was reset and given its pages. */
void mimi_state_list(struct mimi_state *state, int lane, const char *suffix,
                     struct snapshot *snapshot);
int mimi_state_make_room(struct mimi_state *state, int lane, const char *suffix,
                         struct tensor_file *file);
int mimi_state_restore(struct mimi_state *state, int lane, const char *suffix,
                       struct tensor_file *file);

/* Makes room for `frames` more frames of a lane; before mimi_encode or mimi_decode, on the host. */
int mimi_encode_grow(struct mimi_state *state, int lane, int frames);
int mimi_decode_grow(struct mimi_state *state, int lane, int frames);

/* The same with nothing counted yet. */
int mimi_encode_room(struct mimi_state *state, int lane, int frames);
int mimi_decode_room(struct mimi_state *state, int lane, int frames);

/* pcm[n][frames*1920] -> codes[n*frames][levels], device memory. */
void mimi_encode(struct mimi_state *state, struct rows rows, int frames, const float *pcm,
                 int levels, int32_t *codes);
/* The first `levels` of codes[n*frames][code_stride] -> pcm[n][frames*1920]. */
void mimi_decode(struct mimi_state *state, struct rows rows, int frames, const int32_t *codes,
                 int levels, int code_stride, float *pcm);

#endif
