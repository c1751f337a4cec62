/* sample.cu: a token for each of some rows, which sample.h chooses. */
#include "sample.h"

#define THREADS 1024

/* Grid: rows. Bytes: the logits, a few times, from the second cache. */
__global__ static void __launch_bounds__(THREADS) k_sample(const __grid_constant__ struct sample p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    sample_row(p, (int)blockIdx.x, (struct table<THREADS> *)(void *)shared);
}

void cuda_sample(struct backend *backend, const struct op_sample *op)
{
    struct cuda_backend *cuda = cuda_of(backend);
    struct sample p = blank<struct sample>();

    p.lane = op->rows.lane;
    p.active = op->rows.active;
    p.null_row = op->null_row;
    p.offset = op->offset;
    p.params = op->params;
    p.logits = op->logits;
    p.failed = op->failed;
    p.token = op->token;
    p.report = cuda->report;
    p.stream = op->stream;
    p.card = op->card;
    p.padding_id = op->padding_id;
    p.token_stride = op->token_stride;
    if (op->rows.n)
        launch(cuda, k_sample, dim3((unsigned)op->rows.n), THREADS, sizeof(struct table<THREADS>),
               p);
}
