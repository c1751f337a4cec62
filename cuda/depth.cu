/* depth.cu: the depth pass of few rows as one kernel, whose blocks stay and meet after each product
 * where other passes launch the next kernel. On when MOSHI_C_DEPTH_KERNEL=1.
 *
 * A step is a list of phases: of each layer in_proj, out_proj, the two products of the feed-forward part;
 * then the head, and the choice of a token. A phase is what k_tensor does, tile for tile, so that its
 * results are the same bits. What is little work each block does for itself: the embedding, norms, and
 * attention over the few positions of a frame. Weights depend on no token: between its arrival and the
 * last block's, a warp asks for its next ones.
 *
 * Bytes: the weights of each step once; rows of activations, for each block from the second cache.
 * Bound: the memory's read rate, and 4 * layers + 2 meetings a step. */
#include "attend.h"
#include "sample.h"
#include "tensor.h"

#define MOST_STEPS WARP /* attend_few has a lane for each */
#define MOST_LAYERS 16
#define MOST_WEIGHTS 256 /* layers, of all weight sets */
#define LAYER_PHASES 4

struct depth_step {
    const void *table; /* of the token that it reads */
    const float *input;
    const void *head;
    const float *bias;
    struct norm norm;
    int table_rows, alias, alias_of;
    uint8_t table_format, set;
};

struct depth_layer {
    struct norm norm1, norm2;
    const float *scale1, *scale2;
};

struct depth_weights {
    const void *in_proj, *out_proj, *ffn_in, *ffn_out;
};

struct depth_pass {
    struct depth_step step[MOST_STEPS];
    struct depth_layer layer[MOST_LAYERS];
    struct depth_weights weights[MOST_WEIGHTS]; /* [sets][layers] */
    struct kv_cache cache;
    const int32_t *lane, *slot, *positions, *text, *null_row, *offset;
    const uint8_t *active, *slot_active;
    const struct slot_params *params;
    float *x, *query, *hidden_rows, *logits;
    int32_t *audio;
    uint8_t *failed;
    struct cuda_report *report;
    int *arrived; /* blocks at meetings, then those that have left; 0 between launches */
    int rows, slots, steps, layers, width, heads, hidden, gated, card, position_stride, aligned;
    int work_bytes, row_bytes; /* of shared memory, see k_depth */
    int tile_pairs[LAYER_PHASES + 1]; /* that a block takes at once, up to OCTET; the head's last */
    float scale; /* of scores */
};

/* What becomes of a phase's sums. */
struct depth_end {
    enum { KEYS, GATE, ROW } kind;
    struct qkv_end keys;
    struct gate_end gate;
    struct row_sum row;

    __device__ const void *matrix(const void *first) const
    {
        return first;
    }

    __device__ void store(int i, int pair, int outputs, float a, float b) const
    {
        if (kind == KEYS)
            keys.store(i, pair, outputs, a, b);
        else if (kind == GATE)
            gate.store(i, pair, outputs, a, b);
        else
            row.pair_of(i * row.y_stride, pair, outputs, a, b);
    }
};

struct depth_product : product<struct depth_end> {
    int tile; /* pairs that a block takes at a time */

    __device__ int end_of(int index) const
    {
        return (index + 1) * tile < pairs ? (index + 1) * tile : pairs;
    }
};

/* y += scale * (W u) */
__device__ static __forceinline__ void add_to_x(const struct depth_pass &p, const float *scale,
                                                depth_product *m)
{
    m->outputs = p.width;
    m->end.row.scale = scale;
    m->end.row.from = m->end.row.y = p.x;
}

/* Phase `at` of a step. */
__device__ static __forceinline__ depth_product phase_of(const struct depth_pass &p, int k, int at)
{
    const struct depth_step &step = p.step[k];
    int index = at / LAYER_PHASES, part = at % LAYER_PHASES;
    depth_product m = {};

    m.end.kind = depth_end::ROW;
    m.aligned = p.aligned;
    m.rows = p.rows;
    m.steps = 1;
    m.second = 1;
    m.columns = p.width;
    m.x = p.x;
    m.tile = p.tile_pairs[index == p.layers ? LAYER_PHASES : part];
    if (index == p.layers) {
        m.weight = step.head;
        m.norm = step.norm;
        m.outputs = p.card;
        m.end.row.bias = step.bias;
        m.end.row.y = p.logits + (long)k * p.rows * p.card;
    } else {
        const struct depth_layer &layer = p.layer[index];
        const struct depth_weights &weights = p.weights[step.set * p.layers + index];

        if (part == 0) {
            struct qkv_end &end = m.end.keys;

            m.weight = weights.in_proj;
            m.norm = layer.norm1;
            m.end.kind = depth_end::KEYS;
            end.cache = p.cache;
            end.lane = p.lane;
            end.active = p.active;
            end.position = p.positions + k * p.position_stride;
            end.q = p.query;
            end.steps = 1;
            end.layer = index;
            end.queries = p.heads * p.cache.head_dim;
            end.keys = p.cache.kv_heads * p.cache.head_dim;
            m.outputs = end.queries + 2 * end.keys;
        } else if (part == 1) {
            m.weight = weights.out_proj;
            add_to_x(p, layer.scale1, &m);
        } else if (part == 2) {
            m.weight = weights.ffn_in;
            m.norm = layer.norm2;
            m.outputs = p.gated ? 2 * p.hidden : p.hidden;
            m.end.row.gelu = 1;
            m.end.row.y = p.hidden_rows;
            if (p.gated) {
                m.second = p.hidden;
                m.end.kind = depth_end::GATE;
                m.end.gate.y = p.hidden_rows;
            }
        } else {
            m.weight = weights.ffn_out;
            m.x = p.hidden_rows;
            m.columns = p.hidden;
            add_to_x(p, layer.scale2, &m);
        }
    }
    m.row_stride = m.columns;
    m.end.row.y_stride = m.end.row.bias_period = m.outputs;
    m.pairs = m.second == 1 ? (m.outputs + 1) / 2 : m.second;
    return m;
}

/* ---- weights that a warp reads in turn -------------------------------------------------- */

template <enum weight_format F> struct weight_stream {
    static const int AHEAD = 4; /* chunks on their way: up to 64 KiB of a block */
    struct words<F> ahead[AHEAD];
    int tile, chunk; /* the next one to ask for */

    /* Nothing is asked for beyond the last one. */
    __device__ __forceinline__ void ask(const depth_product &m, struct words<F> *words)
    {
        const int chunks = padded_columns<F>(m.columns) / tensor_format<F>::COLUMNS;

        if (tile * m.tile >= m.pairs || chunk >= chunks) return;
        int pair = tile * m.tile + (int)threadIdx.x % WARP / 4, end = m.end_of(tile);

        if (pair >= end) pair = end - 1; /* its sums are not stored */
        tensor_format<F>::read(m, m.first_of(pair), m.second_of(pair), chunk, words);
        chunk += WARPS;
        if (chunk < chunks) return;
        chunk = (int)threadIdx.x / WARP;
        tile += (int)gridDim.x;
    }

    __device__ __forceinline__ void begin(const depth_product &m)
    {
        tile = (int)blockIdx.x;
        chunk = (int)threadIdx.x / WARP;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) ask(m, &ahead[i]);
    }

    __device__ __forceinline__ struct words<F> next(const depth_product &m)
    {
        struct words<F> words = ahead[0];

#pragma unroll
        for (int i = 1; i < AHEAD; i++) ahead[i - 1] = ahead[i];
        ask(m, &ahead[AHEAD - 1]);
        return words;
    }
};

/* ---- meetings --------------------------------------------------------------------------- */

/* What this block has written can be seen by those that have met it. */
__device__ static __forceinline__ void arrive(const struct depth_pass &p)
{
    __syncthreads();
    if (threadIdx.x) return;
    __threadfence();
    atomicAdd(&p.arrived[0], 1);
}

__device__ static __forceinline__ void meet(const struct depth_pass &p, int meetings)
{
    if (threadIdx.x == 0) wait_for_count(&p.arrived[0], meetings * (int)gridDim.x);
    __syncthreads();
}

/* After its last meeting. */
__device__ static __forceinline__ void leave(const struct depth_pass &p)
{
    if (threadIdx.x == 0 && atomicAdd(&p.arrived[1], 1) == (int)gridDim.x - 1)
        p.arrived[0] = p.arrived[1] = 0;
}

/* ---- the kernel ------------------------------------------------------------------------- */

/* The rows that a step begins with; one block keeps them for all. */
__device__ static void embed_rows(const struct depth_pass &p, int k, float *rows)
{
    const struct depth_step &step = p.step[k];

    for (int i = 0; i < p.rows; i++) {
        int token = k ? p.audio[(long)i * p.steps + k - 1] : p.text[i];

        if (step.alias_of > 0 && token == step.alias) token = step.alias_of;
        bool there = p.active[i] && token != TOKEN_ZERO &&
                     is_row_of(token, step.table_rows, i, p.report);

        for (int d = (int)threadIdx.x; d < p.width; d += THREADS) {
            float value = step.input[(long)i * p.width + d];

            if (there) value += element(step.table, step.table_format, (long)token * p.width + d);
            rows[i * p.width + d] = value;
            if (blockIdx.x == 0) p.x[i * p.width + d] = value;
        }
    }
}

/* The rows that out_proj meets, a head of one at a time. */
__device__ static void attend_rows(const struct depth_pass &p, int k, int layer, float *rows)
{
    int dim = p.cache.head_dim, group = p.heads / p.cache.kv_heads;

    for (int at = (int)threadIdx.x / WARP; at < p.rows * p.heads; at += WARPS) {
        int i = at / p.heads, kv_head = at % p.heads / group;
        const float *q = p.query + (long)at * dim;
        float *y = rows + at * dim;

        if (dim <= WARP)
            attend_few<1>(p.cache, p.lane[i], layer, kv_head, k + 1, p.scale, q, y);
        else if (dim <= 2 * WARP)
            attend_few<2>(p.cache, p.lane[i], layer, kv_head, k + 1, p.scale, q, y);
        else
            attend_few<4>(p.cache, p.lane[i], layer, kv_head, k + 1, p.scale, q, y);
    }
    __syncthreads();
}

__device__ static void sample_step(const struct depth_pass &p, int k, struct table<THREADS> *table)
{
    struct sample s = {};

    if ((int)blockIdx.x >= p.slots) return;
    s.lane = p.slot;
    s.active = p.slot_active;
    s.null_row = p.null_row;
    s.offset = p.offset;
    s.params = p.params;
    s.logits = p.logits + (long)k * p.rows * p.card;
    s.failed = p.failed;
    s.token = p.audio + k;
    s.token_stride = p.steps;
    s.report = p.report;
    s.stream = 1 + k;
    s.card = p.card;
    sample_row(s, (int)blockIdx.x, table);
}

/* The rows that a phase meets. */
template <enum weight_format F>
__device__ static void arrange_phase(const struct depth_pass &p, int k, int at,
                                     const struct activations &x, float *work,
                                     unsigned char *arranged, float *made)
{
    const int attends = at % LAYER_PHASES == 1;
    depth_product m = phase_of(p, k, at);

    if (at == 0) embed_rows(p, k, made);
    if (attends) attend_rows(p, k, at / LAYER_PHASES, made);
    for (int i = 0; i < p.rows; i++)
        arrange_row<F>(m.norm, at == 0 || attends ? made + i * p.width : m.input(i), m.columns,
                       work, arranged + i * x.row_bytes, 0);
}

/* Grid: as many blocks as run at once. Shared memory: what k_tensor has, or the sampler's table; the
 * arranged rows; rows that the block has made. */
template <enum weight_format F>
__global__ static void __launch_bounds__(THREADS, 1)
    k_depth(const __grid_constant__ struct depth_pass p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    float *work = (float *)(void *)shared;
    unsigned char *arranged = shared + p.work_bytes;
    float *made = (float *)(void *)(arranged + p.rows * p.row_bytes);
    const int phases = LAYER_PHASES * p.layers + 1, warp = (int)threadIdx.x / WARP;
    int meetings = 0;
    depth_product m = phase_of(p, 0, 0);
    struct weight_stream<F> weights = {};

    weights.begin(m);
    for (int turn = 0; turn < p.steps * phases; turn++) {
        int k = turn / phases, at = turn % phases;
        int chunks = padded_columns<F>(m.columns) / tensor_format<F>::COLUMNS;
        struct activations x = {arranged, (long)tensor_format<F>::row_bytes(m.columns),
                                padded_columns<F>(m.columns), p.rows - 1};

        if ((int)blockIdx.x * m.tile < m.pairs) arrange_phase<F>(p, k, at, x, work, arranged, made);
        for (int tile = (int)blockIdx.x; tile * m.tile < m.pairs; tile += (int)gridDim.x) {
            float sums[1][1][4] = {};

            for (int chunk = warp; chunk < chunks; chunk += WARPS) {
                struct words<F> w[1];

                w[0] = weights.next(m);
#pragma unroll
                for (int half = 0; half < 2; half++)
                    tensor_format<F>::multiply(w, x, chunk, half, sums);
            }
            depth_product part = phase_of(p, k, at);

            part.pairs = m.end_of(tile);
            store_sums<F, 1, 1>(part, work, 0, p.rows - 1, tile * m.tile, sums);
        }
        arrive(p);
        if (turn + 1 < p.steps * phases) {
            m = phase_of(p, (turn + 1) / phases, (turn + 1) % phases);
            weights.begin(m);
        }
        meet(p, ++meetings);
        if (at + 1 < phases) continue;
        sample_step(p, k, (struct table<THREADS> *)(void *)shared);
        if (k + 1 == p.steps) break;
        arrive(p);
        meet(p, ++meetings);
    }
    leave(p);
}

/* ---- the host's side -------------------------------------------------------------------- */

/* Its address, if it is in that format; *good becomes 0 otherwise. */
static const void *take_matrix(struct depth_pass *p, const struct matrix *w,
                               enum weight_format format, bool *good)
{
    const void *memory = matrix_memory(w);

    *good = *good && w->format == format && (w->packed != NULL) == (format != WEIGHT_BF16);
    p->aligned &= (uintptr_t)memory % 16 == 0 && w->cols % 8 == 0;
    return memory;
}

static bool take_step(struct depth_pass *p, const struct op_depth *op, int k,
                      enum weight_format format)
{
    const struct embedding *e = k ? &op->embeddings[k - 1] : op->text_embedding;
    struct depth_step *step = &p->step[k];
    bool good = !e->low_rank.rows && e->norm.kind == NORM_NONE && e->table.format <= WEIGHT_BF16;

    step->table = e->table.data;
    step->table_rows = e->table.rows;
    step->table_format = (uint8_t)e->table.format;
    step->alias = e->alias;
    step->alias_of = e->alias_of;
    step->input = op->inputs[k];
    step->head = take_matrix(p, &op->head[k], format, &good);
    step->bias = op->head_bias[k];
    step->norm = op->norms[k];
    step->set = (uint8_t)op->schedule[k];
    return good;
}

static bool take_layer(struct depth_pass *p, const struct op_depth *op, int set, int index,
                       enum weight_format format)
{
    const struct transformer_layer *layer = &op->layer[index];
    struct depth_weights *weights = &p->weights[set * op->layers + index];
    bool good = true;

    p->layer[index] = {layer->norm1, layer->norm2, layer->scale1, layer->scale2};
    weights->in_proj = take_matrix(p, &layer->in_proj[set], format, &good);
    weights->out_proj = take_matrix(p, &layer->out_proj[set], format, &good);
    weights->ffn_in = take_matrix(p, &layer->ffn_in[set], format, &good);
    weights->ffn_out = take_matrix(p, &layer->ffn_out[set], format, &good);
    return good;
}

/* Whether all of it is what the kernel can do. */
static bool take_pass(struct depth_pass *p, const struct op_depth *op, enum weight_format format)
{
    if (op->rows.n < 1 || op->rows.n > ROWS_HERE || op->steps > MOST_STEPS ||
        op->layers > MOST_LAYERS || op->cache->dtype != MOSHI_F32 || op->cache->head_dim > 4 * WARP)
        return false;
    p->aligned = 1;
    for (int k = 0; k < op->steps; k++) {
        int set = op->schedule[k];

        if ((set + 1) * op->layers > MOST_WEIGHTS || !take_step(p, op, k, format)) return false;
        for (int i = 0; i < op->layers; i++)
            if (!take_layer(p, op, set, i, format)) return false;
    }
    p->cache = *op->cache;
    p->lane = op->rows.lane;
    p->active = op->rows.active;
    p->slot = op->slots.lane;
    p->slot_active = op->slots.active;
    p->positions = op->positions;
    p->position_stride = op->position_stride;
    p->text = op->text;
    p->null_row = op->null_row;
    p->params = op->params;
    p->offset = op->offset;
    p->failed = op->failed;
    p->logits = op->logits;
    p->audio = op->audio;
    p->x = op->x;
    p->query = op->query;
    p->hidden_rows = op->hidden_rows;
    p->rows = op->rows.n;
    p->slots = op->slots.n;
    p->steps = op->steps;
    p->layers = op->layers;
    p->width = op->width;
    p->heads = op->heads;
    p->hidden = op->hidden;
    p->gated = op->gated;
    p->card = op->card;
    p->scale = 1.0f / sqrtf((float)op->cache->head_dim);
    return true;
}

/* Pairs of a tile, so that all blocks have as much to do, and few tiles. */
static int choose_tile(int pairs, int blocks)
{
    int best = OCTET, least = 0;

    for (int tile = OCTET; tile > 1; tile /= 2) {
        int cost = ceil_div(ceil_div(pairs, tile), blocks) * (tile + 2);

        if (least == 0 || cost < least) best = tile, least = cost;
    }
    return best;
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

template <enum weight_format F>
static int launch_depth(struct cuda_backend *cuda, const struct op_depth *op)
{
    struct depth_pass p = blank<struct depth_pass>();
    int columns = larger(op->width, op->hidden), work, tiles, blocks;
    int qkv = (op->heads + 2 * op->cache->kv_heads) * op->cache->head_dim;

    if (!take_pass(&p, op, F)) return 0;
    work = (padded_columns<F>(columns) + WARPS) * (int)sizeof(float);
    work = larger(work, WARPS * 4 * WARP * (int)sizeof(float));
    p.work_bytes = round_up(larger(work, (int)sizeof(struct table<THREADS>)), 16);
    p.row_bytes = (int)tensor_format<F>::row_bytes(columns);
    size_t shared = (size_t)(p.work_bytes + p.rows * p.row_bytes) +
                    (size_t)(p.rows * p.width) * sizeof(float);

    if (shared > cuda->shared_limit ||
        !cuda_good(cuda, resident_blocks(k_depth<F>, THREADS, shared, cuda->processors, &blocks),
                   "an occupancy"))
        return 0;
    tiles = ceil_div(larger(larger(qkv, op->gated ? 2 * op->hidden : op->hidden), op->card),
                     2 * OCTET);
    blocks = blocks < tiles ? blocks : tiles;
    if (blocks < p.slots) return 0;
    const int pairs[] = {ceil_div(qkv, 2), ceil_div(op->width, 2),
                         op->gated ? op->hidden : ceil_div(op->hidden, 2), ceil_div(op->width, 2),
                         ceil_div(op->card, 2)};

    for (int i = 0; i <= LAYER_PHASES; i++) p.tile_pairs[i] = choose_tile(pairs[i], blocks);
    p.report = cuda->report;
    p.arrived = (int *)(void *)cuda_take_scratch(cuda, 2 * sizeof(int), 0).counters;
    launch(cuda, k_depth<F>, dim3((unsigned)blocks), THREADS, shared, p, true);
    return 1;
}

int cuda_depth(struct backend *backend, const struct op_depth *op)
{
    struct cuda_backend *cuda = cuda_of(backend);

    if (!cuda->depth_kernel) return 0;
    switch (op->head[0].format) {
    case WEIGHT_BF16:
        return launch_depth<WEIGHT_BF16>(cuda, op);
    case WEIGHT_FP8:
        return launch_depth<WEIGHT_FP8>(cuda, op);
    case WEIGHT_INT8:
        return launch_depth<WEIGHT_INT8>(cuda, op);
    case WEIGHT_Q8:
        return launch_depth<WEIGHT_Q8>(cuda, op);
    case WEIGHT_Q4:
        return launch_depth<WEIGHT_Q4>(cuda, op);
    default:
        return 0;
    }
}
