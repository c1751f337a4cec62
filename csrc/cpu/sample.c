/* sample.c: one token from a row of logits.
 *
 * Guidance and bias first, in place. Then the k-th largest logit is found by three passes of radix
 * selection over the bits of the floats (11, 11 and 10 of them, as integers that sort like the
 * floats). Every id at or above it gets its own draw: Gumbel noise from Philox4x32-10, keyed by
 * the slot's seed and counted by (frame, stream, id). The largest sum wins, which draws from the
 * softmax of the kept logits. Scores are made in double, so that backends agree. */
#include <math.h>
#include <string.h>

#include "backend_cpu.h"

#define ROUNDS 10

static uint32_t philox_word(const uint32_t seed[2], uint32_t c0, uint32_t c1, uint32_t c2)
{
    uint32_t c3 = 0, k0 = seed[0], k1 = seed[1];

    for (int i = 0; i < ROUNDS; i++) {
        uint64_t a = (uint64_t)0xd2511f53u * c0, b = (uint64_t)0xcd9e8d57u * c2;
        uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;

        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        c0 = n0;
        c2 = n2;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c0;
}

/* An integer that sorts like the float; both zeros are the same. */
static uint32_t sort_key(float value)
{
    union {
        float f;
        uint32_t u;
    } v = {.f = value + 0.0f};

    return v.u & 0x80000000u ? ~v.u : v.u | 0x80000000u;
}

/* The key of the k-th largest logit, and how many ids with exactly that key belong to the first
 * k. 1 <= k <= n. */
static uint32_t kth_key(const float *logits, int n, int k, int *ties)
{
    static const int shifts[] = {21, 10, 0};
    uint32_t key = 0, mask = 0;

    for (int pass = 0; pass < 3; pass++) {
        int shift = shifts[pass], bits = pass < 2 ? 11 : 10, bin = (1 << bits) - 1;
        int counts[2048] = {0};

        for (int i = 0; i < n; i++) {
            uint32_t v = sort_key(logits[i]);

            if ((v & mask) == key) counts[v >> shift & (uint32_t)bin]++;
        }
        mask |= (uint32_t)bin << shift;
        while (counts[bin] < k) k -= counts[bin--];
        key |= (uint32_t)bin << shift;
    }
    *ties = k;
    return key;
}

static int greedy(const float *logits, int n)
{
    int best = 0;

    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static int draw(const struct op_sample *op, const struct slot_params *params, uint32_t frame,
                const float *logits)
{
    int n = op->card, side = op->stream != 0, k = params->top_k[side], ties = n, best = -1;
    double temperature = params->temperature[side], most = 0;
    uint32_t least = 0;

    if (k > 0 && k < n) least = kth_key(logits, n, k, &ties);
    for (int id = 0; id < n; id++) {
        uint32_t key = sort_key(logits[id]);
        double u, score;

        if (key < least || (key == least && ties-- <= 0)) continue;
        u = ((philox_word(params->seed, frame, (uint32_t)op->stream, (uint32_t)id) >> 8) + 0.5) /
            16777216.0;
        score = logits[id] / temperature - log(-log(u));
        if (best < 0 || score > most) {
            best = id;
            most = score;
        }
    }
    return best;
}

static int all_finite(const float *x, int n)
{
    int bad = 0;

    for (int i = 0; i < n; i++) bad |= !isfinite(x[i]);
    return !bad;
}

/* Returns 0 if a logit is not finite. */
static int sample_row(const struct op_sample *op, int i, int32_t *token)
{
    int slot = op->rows.lane[i], n = op->card, side = op->stream != 0;
    const struct slot_params *params = &op->params[slot];
    float *logits = op->logits + (size_t)i * (size_t)n;
    int32_t forced = side ? params->forced_audio[op->stream - 1] : params->forced_text;

    if (op->null_row[i] >= 0 && !(op->stream == 0 && params->cfg_no_text)) {
        const float *null_logits = op->logits + (size_t)op->null_row[i] * (size_t)n;

        for (int id = 0; id < n; id++)
            logits[id] = null_logits[id] + (logits[id] - null_logits[id]) * params->cfg_coef;
    }
    if (op->stream == 0 && op->padding_id >= 0 && op->padding_id < n)
        logits[op->padding_id] += params->pad_bias;
    if (!all_finite(logits, n)) return 0;
    if (forced != TOKEN_FREE)
        *token = forced;
    else if (params->temperature[side] > 0)
        *token = draw(op, params, (uint32_t)op->offset[slot], logits);
    else
        *token = greedy(logits, n);
    return 1;
}

struct sample_job {
    struct cpu_backend *cpu;
    const struct op_sample *op;
};

static void sample_task(void *arg, int part, int first, int last)
{
    const struct sample_job *job = arg;
    const struct op_sample *op = job->op;
    struct nearest *failed = &job->cpu->nearest[part]; /* first row of this part that failed */

    failed->index = -1;
    for (int i = first; i < last; i++) {
        int32_t *token = op->token + (size_t)i * (size_t)op->token_stride;

        *token = 0; /* also what an inactive row says: it must be safe to embed */
        if (op->rows.active[i] && !sample_row(op, i, token)) {
            *token = 0;
            if (op->failed)
                op->failed[op->rows.lane[i]] = 1;
            else if (failed->index < 0)
                failed->index = i;
        }
        if (op->null_row[i] >= 0)
            op->token[(size_t)op->null_row[i] * (size_t)op->token_stride] = *token;
    }
}

void cpu_sample(struct backend *backend, const struct op_sample *op)
{
    struct sample_job job = {cpu_backend(backend), op};

    for (int part = 0; part < backend->threads; part++) job.cpu->nearest[part].index = -1;
    cpu_parallel(job.cpu, sample_task, &job, op->rows.n,
                 op->rows.n > 1 ? 8.0 * op->rows.n * op->card : 0);
    for (int part = 0; part < backend->threads; part++)
        if (job.cpu->nearest[part].index >= 0)
            backend_fail(backend, MOSHI_ERROR_INTERNAL,
                         "%s: a logit of stream %d is not finite (row %d)", op->name, op->stream,
                         job.cpu->nearest[part].index);
}
