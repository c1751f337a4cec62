/* tensor_product.cu: the kernels of tensor.h. */
#include "tensor.h"

void tensor_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                    struct product<struct row_end> &p, size_t kept)
{
    choose_format(cuda, name, weight, p, kept);
}

void tensor_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                    struct product<struct gate_end> &p, size_t kept)
{
    choose_format(cuda, name, weight, p, kept);
}

void tensor_product(struct cuda_backend *cuda, const char *name, const struct matrix *weight,
                    struct product<struct qkv_end> &p, size_t kept)
{
    choose_format(cuda, name, weight, p, kept);
}

size_t tensor_scratch(const struct matrix *weight, int rows)
{
    return (size_t)round_up(rows, ARRANGED_TOGETHER) *
           tensor_format<WEIGHT_FP8>::row_bytes(weight->cols);
}
