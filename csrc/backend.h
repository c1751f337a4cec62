/* backend.h: the contract between the model and the arithmetic.
 *
 * A backend is a table of fused, model-shaped operations over device pointers. Model code calls
 * them in order inside a stage; a stage function never branches on values that live on the device,
 * so that a backend may run it (CPU) or capture it once and replay it (CUDA).
 *
 *  - Everything that changes from frame to frame (row map, positions, tokens, masks, seeds) is
 *    device memory. Sizes in the argument structs are fixed per stage and number of rows.
 *  - Activations between operations are f32 rows, contiguous unless a stride is given.
 *  - A backend has one caller at a time. Only upload, the downloads and copy may be called beside it,
 *    for memory that no run is using.
 *  - Operations enqueue and return nothing. A failure sticks to the backend until sync reports it.
 *  - Rows are not slots: rows.lane maps a row to the lane whose history it reads and writes.
 *  - Only qkv, conv, conv_transposed, delay_input, delay_output and advance change the history of a
 *    lane, and only where rows.active is set.
 *  - Row i of a call with n rows has the bits of the same row in a call with one row.
 *  - Input and output buffers of one call do not overlap, except where "in place" is said.
 *
 * cpu/kernels_generic.c is the plain definition of every operation's arithmetic.
 *
 * Letters: n rows, T steps per row, D width, H heads, Dh head width, K codebooks. */
#ifndef MOSHI_BACKEND_H
#define MOSHI_BACKEND_H

#include <stddef.h>
#include <stdint.h>

#include "config.h"
#include "moshi.h"
#include "quant.h"

struct backend;

/* Which rows take part. All arrays are device memory of n elements. */
struct rows {
    int n;
    const int32_t *lane;   /* row -> lane */
    const uint8_t *active; /* 0: the row's outputs are garbage, its lane's history is untouched */
};

/* y = x / rms(x) * weight, or (x - mean) / std * weight + bias; f32 throughout. */
struct norm {
    enum norm_kind kind; /* NORM_NONE copies */
    float eps;           /* RMS: x * (weight * (1 / sqrt(eps + mean(x^2)))) */
    const float *weight; /* [D] */
    const float *bias;   /* [D], NORM_LAYER only */
};

/* A token table. low_rank.rows == 0: none, then the table's cols are D; else D = low_rank.rows. */
struct embedding {
    struct matrix table;    /* [vocabulary][D or rank] */
    struct matrix low_rank; /* [D][rank] */
    struct norm norm;       /* applied to the table's row; NORM_NONE as published */
    int32_t alias, alias_of; /* with alias_of > 0, token `alias` reads row alias_of */
};

/* A layer of a stack, see transformer.h; the matrices are host memory. */
struct transformer_layer {
    char name[40]; /* for traces: "temporal.3" */
    struct norm norm1, norm2;
    const float *scale1, *scale2; /* [D] layer scales, or NULL */
    struct matrix *in_proj;       /* [weight_sets], each [(heads + 2*kv_heads)*Dh][D] */
    struct matrix *out_proj;      /* [weight_sets], each [D][D] */
    struct matrix *ffn_in;        /* [weight_sets], each [2*F][D] gated, else [F][D] */
    struct matrix *ffn_out;       /* [weight_sets], each [D][F] */
};

/* Keys and values of all layers of one stack, in pages of page_positions positions. Position p of a
 * lane lies in block (p % ring) / page_positions, ring = pages_per_lane * page_positions; block i of
 * a lane is page table[lane * pages_per_lane + i]. Inside a page:
 * [layer][key 0, value 1][kv_head][page_positions][head_dim]. With MOSHI_INT8 each of these planes of
 * page_positions rows of codes is followed by as many f32 scales, one a row: what int8_row of quant.h
 * makes of the row. */
struct kv_cache {
    void *pages;
    size_t page_bytes;
    const int32_t *table;
    int pages_per_lane, page_positions;
    int layers, kv_heads, head_dim;
    enum moshi_dtype dtype; /* MOSHI_F32, MOSHI_BF16 or MOSHI_INT8 */
};

static inline size_t kv_row_bytes(const struct kv_cache *cache)
{
    return (size_t)cache->head_dim * (cache->dtype == MOSHI_F32    ? 4
                                      : cache->dtype == MOSHI_BF16 ? 2
                                                                   : 1);
}

/* Of one layer's keys or values of one head. */
static inline size_t kv_plane_bytes(const struct kv_cache *cache)
{
    return (size_t)cache->page_positions *
           (kv_row_bytes(cache) + (cache->dtype == MOSHI_INT8 ? sizeof(float) : 0));
}

/* A streaming convolution over channels-last rows. */
struct conv {
    int in, out, kernel, stride;
    int depthwise; /* transposed only: in == out, weight[kernel][in] f32 in depthwise_weight */
    struct matrix weight; /* conv: [out][kernel*in], column j*in + c is tap j, channel c.
                             transposed (kernel = 2*stride): [stride*out][2*in], row p*out + o is
                             output phase p, channel o; columns: in of x[t-1], then in of x[t] */
    const float *depthwise_weight;
    const float *bias; /* [out] or NULL */
    int replicate; /* first call of a lane: history is filled with x[0] instead of zeros */
};

/* One residual vector quantiser: levels of `bins` entries of width `dim`. */
struct rvq {
    int levels, bins, dim;
    struct matrix in_proj; /* [dim][D] */
    struct matrix out_proj; /* [D][dim] */
    const float *codebooks; /* [levels][bins][dim] */
    const float *half_norms; /* [levels][bins]: |e|^2 / 2 */
};

/* Which stage `run` executes. */
enum {
    STAGE_ENCODE, /* with the next three the parts of a tick */
    STAGE_TEMPORAL,
    STAGE_DEPTH,
    STAGE_DECODE,
    STAGE_GIVEN, /* its sizes change from call to call: who captures stages executes it as it comes */
    STAGE_TICK, /* a tick as a whole */
    STAGES
};

#define TOKEN_FREE INT32_MIN /* "not forced", in slot_params */
#define TOKEN_ZERO (-1) /* embeds as zeros */
#define TOKEN_NONE (-2) /* no output yet; never an input */

/* What a session decides, one per slot; device memory, written by the host between ticks. The
 * policy point between the text sample and the depth pass reads it too. */
struct slot_params {
    float temperature[2]; /* text, audio; <= 0 is greedy */
    int32_t top_k[2]; /* <= 0: all */
    float cfg_coef;
    int32_t cfg_no_text;
    int32_t cfg_masked_until; /* -1: off */
    uint32_t seed[2]; /* Philox key, low word first */
    float pad_bias; /* added to the text logit of text_padding_id */
    int32_t forced_text; /* TOKEN_FREE or the token stored instead of the sample */
    int32_t forced_audio[MOSHI_MAX_CODEBOOKS];
    int32_t skip_depth; /* every audio token is forced: the depth pass need not run */
};

/* ---- operations ------------------------------------------------------------------------- */

/* y[n][D] = sum over streams of table[s][tokens[i][s]], in order, then + condition[lane].
 * from: y = from + that; from == y is fine. TOKEN_ZERO adds nothing. */
struct op_embed {
    const char *name;
    struct rows rows;
    int n_streams, token_stride; /* tokens[i * token_stride + s] */
    const int32_t *tokens;
    const struct embedding *tables; /* [n_streams], host memory */
    const float *condition; /* [lanes][D] or NULL */
    const float *from; /* [n][D] or NULL */
    float *y;
};

/* y = norm(x), for n * T rows. */
struct op_norm {
    const char *name;
    int n, width; /* n counts rows times steps */
    const float *x;
    struct norm norm;
    float *y;
};

enum activation { ACTIVATION_NONE, ACTIVATION_GELU }; /* gelu: x/2 * (1 + erf(x / sqrt 2)) */

/* y[n][W.rows] = activation(W norm(x) + bias). y_stride elements between rows of y (0: W.rows). */
struct op_linear {
    const char *name;
    int n; /* rows times steps */
    const float *x;
    struct norm norm; /* NORM_NONE: x as it is */
    struct matrix weight;
    const float *bias; /* or NULL */
    enum activation activation;
    float *y;
    int y_stride;
};

/* y[m][n][W.rows] = W[m] x, for matrices of as many rows and columns: each as linear makes it. */
struct op_linear_many {
    const char *name;
    int n, count;
    const float *x;
    const struct matrix *weights; /* [count], host memory */
    float *y;
};

/* x += scale * (W u), in place on x; scale[W.rows] or NULL. */
struct op_linear_residual {
    const char *name;
    int n;
    const float *u;
    struct matrix weight;
    const float *scale;
    float *x;
};

/* y[n][W.rows/2] = silu(g) * v with (g, v) = halves of W norm(x); silu(g) = g / (1 + exp(-g)). */
struct op_linear_gated {
    const char *name;
    int n;
    const float *x;
    struct norm norm;
    struct matrix weight;
    float *y;
};

/* cos_sin[n*T][head_dim/2][2]: angle = position * exp(-ln(max_period) * 2i / head_dim), where the
 * position of step t of row i is position[lane[i]] + t. Frequencies and angles round to f32. */
struct op_rope {
    const char *name;
    struct rows rows;
    int steps, head_dim;
    double max_period;
    const int32_t *position; /* [lanes] */
    float *cos_sin;
};

/* (q, k, v) = blocks of W norm(x): H*Dh rows of q, then kv_heads*Dh of k, of v. With cos_sin, q and
 * k are rotated in interleaved pairs (2i, 2i+1). k and v go to the cache at position[lane] + t;
 * q[n*T][H*Dh]. */
struct op_qkv {
    const char *name;
    struct rows rows;
    int steps, heads, layer;
    const float *x; /* [n*T][D] */
    struct norm norm;
    struct matrix weight;
    const float *cos_sin; /* or NULL */
    const int32_t *position;
    const struct kv_cache *cache;
    float *q;
};

/* y[n*T][H*Dh] = softmax(q k^T / sqrt(Dh)) v over the visible positions of the row's lane:
 * causal: query at p = position[lane] + t sees j with
 *   max(0, p - context + 1, position[lane] + steps - capacity) <= j <= p
 * (capacity: a ring of that many positions that was written before the queries looked);
 * else: all j < key_count[lane] (keys made from a condition). */
struct op_attend {
    const char *name;
    struct rows rows;
    int steps, heads, layer, causal;
    int context, capacity;
    const int32_t *position, *key_count;
    const struct kv_cache *cache;
    const float *q;
    float *y;
};

/* y[n][T/stride][out] = conv(elu?(history ++ x)) + bias (+ residual). x[n][T][in]; T is a multiple
 * of stride; history[lane][(kernel-stride)*in] keeps what follows, after the ELU. elu(v) = v > 0 ?
 * v : exp(v) - 1. first[lane] (replicate only): 1 until the first call of the lane, then 0. */
struct op_conv {
    const char *name;
    struct rows rows;
    int steps;
    const struct conv *conv;
    int elu;
    const float *x;
    const float *residual; /* [n][T/stride][out] or NULL */
    float *history;
    int32_t *first;
    float *work; /* [n][kernel-stride+T][in] scratch */
    float *y;
};

/* y[n][T*stride][out] = transposed conv of elu?(x) + bias; history[lane][in] is the last input row,
 * after the ELU. */
struct op_conv_transposed {
    const char *name;
    struct rows rows;
    int steps;
    const struct conv *conv;
    int elu;
    const float *x; /* [n][T][in] */
    float *history;
    float *work; /* [n][1+T][in] scratch */
    float *y;
};

/* codes[i*code_stride + l] for the first `levels` levels: r = in_proj x; at each level the entry
 * with the least |r - e|^2 (the first one on a tie), then r -= e. work: [n][2*dim]. */
struct op_rvq_encode {
    const char *name;
    int n, levels, code_stride;
    const struct rvq *rvq;
    const float *x; /* [n][D] */
    int32_t *codes;
    float *work;
};

/* y[n][D] (+)= out_proj(sum of entries). Codes outside 0..bins-1 count as 0. work: [n][dim]. */
struct op_rvq_decode {
    const char *name;
    int n, levels, code_stride, accumulate;
    const struct rvq *rvq;
    const int32_t *codes;
    float *work;
    float *y;
};

/* The delay cache of a model: cache[slot][streams][columns], text first, then dep_q generated, then
 * the user's. columns = max delay + 2 (+ 1 when provided is used). */
struct delay_cache {
    int streams, dep_q, columns, max_delay;
    int32_t initial_text, initial_audio;
    const int32_t *delays; /* [streams] */
    int32_t *tokens; /* [slots][streams][columns] */
    uint8_t *provided; /* same shape; NULL unless the family marks given tokens */
    int32_t *offset; /* [slots] frames stepped */
};

/* For slot s of row i, o = offset[s]: writes user[i][j] to column (o + delay) % columns of its
 * stream, then reads column o % columns of every stream (the initial token while o <= delay) into
 * tokens[i][streams]; and, when null_row[i] >= 0, the null half's tokens into that row: there, if
 * cfg_masked_until >= 0, a stream is TOKEN_ZERO while o <= delay + cfg_masked_until (but initial
 * tokens stay), and with cfg_no_text the text is TOKEN_ZERO unless initial. Rows that are not
 * active get initial tokens. rows.lane are slots. */
struct op_delay_input {
    const char *name;
    struct rows rows;
    const struct delay_cache *cache;
    const struct slot_params *params; /* [slots] */
    const int32_t *user; /* [n][streams - 1 - dep_q] */
    const int32_t *given; /* the same shape, or NULL: what is not TOKEN_FREE stands for user's */
    const int32_t *null_row; /* [n] */
    int32_t *tokens; /* [rows][streams] */
};

/* offset += 1; stores text[i] and audio[i][dep_q] in column offset % columns; out[i][1 + dep_q] =
 * column (offset - max_delay + delay) % columns, or TOKEN_NONE while offset <= max_delay or the row
 * is not active. */
struct op_delay_output {
    const char *name;
    struct rows rows;
    const struct delay_cache *cache;
    const int32_t *text;
    const int32_t *audio;
    int32_t *out;
};

/* position[lane] += steps. */
struct op_advance {
    const char *name;
    struct rows rows;
    int steps;
    int32_t *position;
};

/* One token a row. With null_row[i] >= 0 and not (stream 0 and cfg_no_text), first, in place:
 * L = L_null + (L - L_null) * cfg_coef. Stream 0 adds pad_bias to L[padding_id]. Then greedy (first
 * of equals), or: among the top_k largest L (on a tie the smaller id), the largest
 * L / temperature + g(id), g = -ln(-ln u), u = ((r >> 8) + 0.5) / 2^24, r = word 0 of
 * Philox4x32-10 with key = seed and counter = (frame, stream, id, 0), frame = offset[slot].
 * A forced token is stored instead. rows.lane are slots. With null_row[i] >= 0 the token is stored at
 * token[null_row[i] * token_stride] too: both halves of a guided session read the same tokens.
 * A row with a logit that is not finite stores token 0 and sets failed[slot]; without `failed` it
 * fails the run. */
struct op_sample {
    const char *name;
    struct rows rows;
    int stream; /* 0 text, 1 + k audio codebook k */
    int card;
    int32_t padding_id;
    float *logits; /* [rows][card] */
    const int32_t *null_row;
    const struct slot_params *params;
    const int32_t *offset;
    uint8_t *failed; /* [slots] or NULL */
    int32_t *token; /* token[i * token_stride] */
    int token_stride;
};

/* y[n][width] = softmax(x). */
struct op_softmax {
    const char *name;
    int n, width;
    const float *x;
    float *y;
};

/* All steps of the depth pass of depth.h, whose products with z are made: step k meets weight set
 * s = schedule[k] and the rows inputs[k]. What becomes of the scratch is the backend's affair. The
 * arrays are host memory, but for what the operations that it replaces have on the device. */
struct op_depth {
    const char *name;
    struct rows rows; /* lanes: row numbers */
    struct rows slots; /* those of `rows` that are sampled, the first ones, lanes: slots */
    int steps, layers, width, heads, hidden, gated, card;
    const int *schedule; /* [steps] */
    const float *const *inputs; /* [steps], each [rows.n][width] */
    const struct embedding *text_embedding; /* of step 0 */
    const struct embedding *embeddings; /* [steps - 1], of the step before */
    const struct transformer_layer *layer; /* [layers] */
    const struct norm *norms; /* [steps], before each head */
    const struct matrix *head; /* [steps] */
    const float *const *head_bias; /* [steps], each [card] or NULL */
    const int32_t *text; /* [rows.n] */
    const int32_t *null_row; /* [slots.n] */
    const struct slot_params *params;
    const int32_t *offset;
    uint8_t *failed; /* as op_sample has it */
    float *logits; /* [steps][rows.n][card] */
    int32_t *audio; /* [rows.n][steps] */
    /* Scratch: a page of f32 for each row, in which step k is position k; and rows of activations. */
    const struct kv_cache *cache;
    const int32_t *positions; /* row i of step k: positions[k * position_stride + i], which is k */
    int position_stride;
    float *x, *query, *hidden_rows; /* [rows.n][width], the same, [rows.n][hidden] */
};

/* A place of the device's memory, and where the host wants it. */
struct device_piece {
    const void *device;
    void *host;
    size_t bytes;
};

struct backend_ops {
    /* Device memory: zeroed, page-aligned, committed when touched; NULL on failure. */
    void *(*allocate)(struct backend *backend, size_t bytes);
    void (*release)(struct backend *backend, void *memory, size_t bytes);
    void (*upload)(struct backend *backend, void *device, const void *host, size_t bytes);
    void (*download)(struct backend *backend, void *host, const void *device, size_t bytes);
    /* Many places at once; a status, that of this call alone. */
    int (*download_pieces)(struct backend *backend, const struct device_piece *pieces, int count);
    void (*copy)(struct backend *backend, void *to, const void *from, size_t bytes);
    void (*clear)(struct backend *backend, void *device, int byte, size_t bytes);
    /* Device memory that grows: pages of page_bytes, of which each must be committed before it is
     * used. NULL on failure. */
    void *(*allocate_pages)(struct backend *backend, size_t bytes, size_t page_bytes);
    /* Of such memory: makes pages usable, which read as zeros; a status. Not twice. */
    int (*commit)(struct backend *backend, void *device, size_t bytes);
    /* Gives committed pages of page_bytes each back to the system, all of them at once. */
    void (*decommit)(struct backend *backend, void *const *pages, int count, size_t page_bytes);
    int64_t (*memory_free)(struct backend *backend); /* bytes of the device; 0 if unknown */
    /* May repack w (then it is packed, f32, and its rows no longer needed) or move its rows to the
     * device, where w.data then points. pack == 0 leaves a mapped matrix in place where the backend
     * can read it so. A w that is packed already has the panels of a file; a backend that reads them
     * there leaves w.packed as it is. Returns a status; release_matrix undoes it where w has
     * changed. */
    int (*prepare_matrix)(struct backend *backend, struct matrix *w, int pack);
    /* Instead of it: makes a block format or fp8 of w's float rows, or of int8 rows with scales. */
    int (*quantise_matrix)(struct backend *backend, struct matrix *w, enum weight_format format);
    void (*release_matrix)(struct backend *backend, struct matrix *w);
    /* Scratch for calls of up to `rows` rows (times steps), `columns` inputs and `keys` keys. */
    int (*reserve)(struct backend *backend, int rows, int columns, int keys);
    /* Executes a stage. The returned status is that of sync on the CPU, of the launch on CUDA,
     * which captures a stage whose operations it has not seen yet. arg_bytes > 0: those bytes at arg,
     * padding too, say all that the stage depends on, while no memory is released; then it need not
     * be looked at again. */
    int (*run)(struct backend *backend, int stage, void (*stage_function)(struct backend *, void *),
               void *arg, size_t arg_bytes);
    int (*sync)(struct backend *backend); /* waits; reports and clears a sticky failure */
    void (*destroy)(struct backend *backend);

    void (*embed)(struct backend *, const struct op_embed *);
    void (*norm)(struct backend *, const struct op_norm *);
    void (*linear)(struct backend *, const struct op_linear *);
    void (*linear_many)(struct backend *, const struct op_linear_many *);
    void (*linear_residual)(struct backend *, const struct op_linear_residual *);
    void (*linear_gated)(struct backend *, const struct op_linear_gated *);
    void (*rope)(struct backend *, const struct op_rope *);
    void (*qkv)(struct backend *, const struct op_qkv *);
    void (*attend)(struct backend *, const struct op_attend *);
    void (*conv)(struct backend *, const struct op_conv *);
    void (*conv_transposed)(struct backend *, const struct op_conv_transposed *);
    void (*rvq_encode)(struct backend *, const struct op_rvq_encode *);
    void (*rvq_decode)(struct backend *, const struct op_rvq_decode *);
    void (*delay_input)(struct backend *, const struct op_delay_input *);
    void (*delay_output)(struct backend *, const struct op_delay_output *);
    void (*advance)(struct backend *, const struct op_advance *);
    void (*sample)(struct backend *, const struct op_sample *);
    void (*softmax)(struct backend *, const struct op_softmax *);

    /* Optional, may be NULL: returns 1, or 0 if it has not been done and is to be made of the operations
     * above, whose results are the same bits. */
    int (*depth)(struct backend *, const struct op_depth *);
    /* Optional: delay_input and delay_output of the one active row that both have, `frames` times in
     * turn, each time with what follows in user, tokens, text, audio and out; given is NULL. */
    void (*delay_given)(struct backend *, const struct op_delay_input *,
                        const struct op_delay_output *, int frames);
};

/* Every backend struct begins with this. */
struct backend {
    const struct backend_ops *ops;
    const char *device; /* "cpu" */
    const char *isa; /* what the kernels use: "generic", "avx512", "neon_dot", ... */
    int threads;
    int whole_ticks; /* a tick is best run as one stage */
    int given_rows; /* frames that are given are best read so many at once; 0: as the model likes */
    int immediate; /* run executes the operations of a stage as they come, and waits: so that a trace
                      sees each one's results */
    int failure; /* sticky status, MOSHI_OK if none */
    char sentence[256]; /* of the failure */
};

/* Sticks the first failure of a run to the backend. */
void backend_fail(struct backend *backend, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* threads: 0 is one per core. MOSHI_C_ISA forces the kernels: generic, avx2, avx512,
 * neon, neon_dot, neon_i8mm. */
int cpu_backend_create(int threads, struct backend **backend);
/* Wraps another backend (and owns it): writes name, shape, range and a hash of each operation's
 * output to the file, and sticks a failure at the first value that is not finite. */
int trace_backend_create(struct backend *inner, const char *path, struct backend **backend);

#endif
