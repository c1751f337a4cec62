/* blocks.h: the block formats of quant.h as the card keeps them. The same codes and scales, placed so
 * that the words a lane gives to the tensor cores are 16 bytes side by side.
 *
 * A matrix is octets of 8 rows, an octet chunks of CHUNK columns, one after the other:
 *
 *   q8    scales f16 [8][4]; codes [2][8][64]: of 64 columns each
 *   q4    scales f16 [8][4]; codes [8][64], two columns in a byte
 *   int8  codes [2][8][64]; the octet begins with its scales, f32 [8]
 *
 * Codes are signed. Of the 64 bytes of a row, 16 belong to each of four lanes t: columns 8 t .. 8 t + 7
 * of one GROUP and then of the next. q4: words 2 j and 2 j + 1 have them of group 2 j in the low halves
 * of their bytes, of group 2 j + 1 in the high ones. What is beyond the last row or column is 0. */
#ifndef MOSHI_CUDA_BLOCKS_H
#define MOSHI_CUDA_BLOCKS_H

#include "backend_cuda.h"

#define OCTET 8
#define CHUNK 128
#define CHUNK_GROUPS (CHUNK / GROUP)
#define LEAST_MAGNITUDE 1e-30f /* of activations: a group with less is all 0, as on the CPU */
#define SCALES_BYTES (OCTET * CHUNK_GROUPS * 2) /* of a chunk */

/* Constants of a format: what a chunk and the head of an octet take, and where a row's codes begin. */
template <enum weight_format F> struct block {
    static const int HEAD = F == WEIGHT_INT8 ? OCTET * 4 : 0;
    static const int SCALES = F == WEIGHT_INT8 ? 0 : SCALES_BYTES;
    static const int CODES = OCTET * CHUNK / (F == WEIGHT_Q4 ? 2 : 1);
    static const int BYTES = SCALES + CODES;
};

template <enum weight_format F> __host__ __device__ static inline size_t octet_bytes(int columns)
{
    return block<F>::HEAD + (size_t)((columns + CHUNK - 1) / CHUNK) * block<F>::BYTES;
}

/* Makes w of its rows, or of the panels of a file; under the lock. Returns a status, and undoes what it
 * did if that is not MOSHI_OK. */
int cuda_make_blocks(struct cuda_backend *cuda, struct matrix *w, enum weight_format format);

#endif
