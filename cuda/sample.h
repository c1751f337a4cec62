/* sample.h: one token from a row of logits, by a block; the same numbers as csrc/cpu/sample.c, draw for
 * draw, whatever the number of threads.
 *
 * Guidance and bias first, in place. The k-th largest logit comes from three passes of radix
 * selection over the bits of the floats. Every id at or above it gets Gumbel noise from
 * Philox4x32-10; the largest sum wins, in double, the smaller id of equals. */
#ifndef MOSHI_CUDA_SAMPLE_H
#define MOSHI_CUDA_SAMPLE_H

#include <math.h>

#include "device.h"

#define BINS 2048
#define PHILOX_ROUNDS 10

struct sample {
    const int32_t *lane, *null_row, *offset;
    const uint8_t *active;
    const struct slot_params *params;
    float *logits;
    uint8_t *failed;
    int32_t *token;
    struct cuda_report *report;
    int stream, card, padding_id, token_stride;
};

/* Shared memory of a block of so many threads. */
template <int THREADS> struct table {
    int counts[BINS];
    int sums[THREADS]; /* of ties, and of bins */
    double scores[THREADS / WARP];
    int ids[THREADS / WARP];
    int bin, left;
};

__device__ static uint32_t philox_word(const uint32_t *seed, uint32_t c0, uint32_t c1, uint32_t c2)
{
    uint32_t c3 = 0, k0 = seed[0], k1 = seed[1];

    for (int i = 0; i < PHILOX_ROUNDS; i++) {
        uint32_t n0 = __umulhi(0xcd9e8d57u, c2) ^ c1 ^ k0;
        uint32_t n2 = __umulhi(0xd2511f53u, c0) ^ c3 ^ k1;

        c1 = 0xcd9e8d57u * c2;
        c3 = 0xd2511f53u * c0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c0;
}

/* An integer that sorts like the float; both zeros are the same. */
__device__ static uint32_t sort_key(float value)
{
    uint32_t u = __float_as_uint(value + 0.0f);

    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* table->sums[thread] becomes the sum of those of the threads before it. */
template <int THREADS> __device__ static void sums_before(struct table<THREADS> *table)
{
    int thread = (int)threadIdx.x, mine = 0;

    for (int step = 1; step < THREADS; step *= 2) {
        __syncthreads();
        mine = thread >= step ? table->sums[thread - step] : 0;
        __syncthreads();
        table->sums[thread] += mine;
    }
    __syncthreads();
    mine = thread ? table->sums[thread - 1] : 0;
    __syncthreads();
    table->sums[thread] = mine;
}

/* The key of the k-th largest logit; *k becomes how many ids with that key belong to the first k. */
template <int THREADS>
__device__ static uint32_t kth_key(const float *logits, int n, int *k, struct table<THREADS> *table)
{
    uint32_t key = 0, mask = 0;
    int thread = (int)threadIdx.x;

    for (int pass = 0; pass < 3; pass++) {
        int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bins = pass < 2 ? BINS : BINS / 2;

        for (int bin = thread; bin < BINS; bin += THREADS) table->counts[bin] = 0;
        __syncthreads();
        for (int i = thread; i < n; i += THREADS) {
            uint32_t v = sort_key(logits[i]);

            if ((v & mask) == key) atomicAdd(&table->counts[v >> shift & (uint32_t)(bins - 1)], 1);
        }
        __syncthreads();
        /* A thread has some bins side by side, the first thread the largest ones. */
        const int each = BINS / THREADS;
        int bin = bins - 1 - each * thread, all = 0;

        for (int i = 0; i < each && bin - i >= 0; i++) all += table->counts[bin - i];
        table->sums[thread] = all;
        sums_before(table);
        int before = table->sums[thread];

        if (before < *k && before + all >= *k) {
            for (; before + table->counts[bin] < *k; bin--) before += table->counts[bin];
            table->bin = bin;
            table->left = *k - before;
        }
        __syncthreads();
        mask |= (uint32_t)(bins - 1) << shift;
        key |= (uint32_t)table->bin << shift;
        *k = table->left;
    }
    return key;
}

/* The id of the largest score over the block, the smaller one of equals; -1 gives no score. */
template <int THREADS>
__device__ static int best_id(double score, int id, struct table<THREADS> *table)
{
    for (int other = WARP / 2; other; other /= 2) {
        double their_score = __shfl_xor_sync(FULL_WARP, score, other);
        int their_id = __shfl_xor_sync(FULL_WARP, id, other);

        if (their_id >= 0 &&
            (id < 0 || their_score > score || (their_score == score && their_id < id)))
            score = their_score, id = their_id;
    }
    if (threadIdx.x % WARP == 0) {
        table->scores[threadIdx.x / WARP] = score;
        table->ids[threadIdx.x / WARP] = id;
    }
    __syncthreads();
    score = table->scores[0];
    id = table->ids[0];
    for (int w = 1; w < THREADS / WARP; w++) {
        double their_score = table->scores[w];
        int their_id = table->ids[w];

        if (their_id >= 0 &&
            (id < 0 || their_score > score || (their_score == score && their_id < id)))
            score = their_score, id = their_id;
    }
    return id;
}

/* How many of the ids before this thread's own run of ids have exactly that key. */
template <int THREADS>
__device__ static int ties_before(const float *logits, int first, int last, uint32_t key,
                                  struct table<THREADS> *table)
{
    int equal = 0;

    for (int id = first; id < last; id++) equal += sort_key(logits[id]) == key;
    table->sums[threadIdx.x] = equal;
    sums_before(table);
    return table->sums[threadIdx.x];
}

template <int THREADS>
__device__ static int choose(const struct sample &p, const struct slot_params &params,
                             uint32_t frame, const float *logits, struct table<THREADS> *table)
{
    int n = p.card, side = p.stream != 0, k = params.top_k[side], best = -1, ties = n;
    int run = (n + THREADS - 1) / THREADS, first = (int)threadIdx.x * run;
    int last = first + run < n ? first + run : n;
    double temperature = params.temperature[side], most = 0;
    uint32_t least = 0;

    if (temperature > 0 && k > 0 && k < n) {
        least = kth_key(logits, n, &k, table);
        ties = k - ties_before(logits, first, last, least, table);
    }
    for (int id = first; id < last; id++) {
        uint32_t key = sort_key(logits[id]);
        double score = logits[id];

        if (key < least || (key == least && ties-- <= 0)) continue;
        if (temperature > 0) {
            uint32_t word = philox_word(params.seed, frame, (uint32_t)p.stream, (uint32_t)id);
            double u = ((word >> 8) + 0.5) / 16777216.0;

            score = score / temperature - log(-log(u));
        }
        if (best < 0 || score > most) best = id, most = score;
    }
    return best_id(most, best, table);
}

/* The token of row i, by the whole block. */
template <int THREADS>
__device__ static void sample_row(const struct sample &p, int i, struct table<THREADS> *table)
{
    int slot = p.lane[i], n = p.card, null_row = p.null_row[i], bad = 0;
    const struct slot_params &params = p.params[slot];
    float *logits = p.logits + (long)i * n;
    int32_t forced = p.stream ? params.forced_audio[p.stream - 1] : params.forced_text, token = 0;

    if (p.active[i]) {
        int guided = null_row >= 0 && !(p.stream == 0 && params.cfg_no_text);
        const float *null_logits = p.logits + (long)null_row * n;

        for (int id = (int)threadIdx.x; id < n; id += THREADS) {
            float value = logits[id];

            if (guided) value = null_logits[id] + (value - null_logits[id]) * params.cfg_coef;
            if (p.stream == 0 && id == p.padding_id) value += params.pad_bias;
            logits[id] = value;
            bad |= !isfinite(value);
        }
        table->ids[threadIdx.x % (THREADS / WARP)] = 0;
        __syncthreads(); /* the logits too are read by other threads now */
        if (bad) table->ids[0] = 1;
        __syncthreads();
        bad = table->ids[0];
        __syncthreads(); /* ids are used again */
        if (!bad)
            token = forced != TOKEN_FREE
                        ? forced
                        : choose(p, params, (uint32_t)p.offset[slot], logits, table);
    }
    if (threadIdx.x) return;
    if (bad && p.failed) p.failed[slot] = 1;
    if (bad && !p.failed) *p.report = {TROUBLE_LOGITS, i, p.stream, 0};
    p.token[(long)i * p.token_stride] = token;
    if (null_row >= 0) p.token[(long)null_row * p.token_stride] = token;
}

#endif
