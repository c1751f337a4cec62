/* blocks.h: the block formats and fp8 of quant.h as the card keeps them. The same codes and scales, placed so
 * that the words a lane gives to the tensor cores are 16 bytes side by side.
 *
 * A matrix is octets of 8 rows, an octet chunks of CHUNK columns, one after the other:
 *
 *   q8    scales f16 [8][4]; codes [2][8][64]: of 64 columns each
 *   q4    scales f16 [8][4]; codes [8][64], two columns in a byte
 *   int8  codes [2][8][64]; the octet begins with its scales, f32 [8]
 *   fp8   as int8
 *
 * Codes are signed; those of fp8 are e4m3. Of the 64 bytes of a row, 16 belong to each of four lanes t: columns 8 t .. 8 t + 7
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
    static const bool OF_ROWS = F == WEIGHT_INT8 || F == WEIGHT_FP8; /* a scale for each row */
    static const int HEAD = OF_ROWS ? OCTET * 4 : 0;
    static const int SCALES = OF_ROWS ? 0 : SCALES_BYTES;
    static const int CODES = OCTET * CHUNK / (F == WEIGHT_Q4 ? 2 : 1);
    static const int BYTES = SCALES + CODES;
};

template <enum weight_format F> __host__ __device__ static inline size_t octet_bytes(int columns)
{
    return block<F>::HEAD + (size_t)((columns + CHUNK - 1) / CHUNK) * block<F>::BYTES;
}

/* Four numbers of e4m3 as two pairs of bf16, exactly: the fields move apart, and the exponents count from
 * 127 instead of 7 then. Not a number is 480. */
__device__ static __forceinline__ uint2 widen_fp8(unsigned codes)
{
    unsigned high = (codes & 0x80808080u) | (codes >> 4 & 0x07070707u);
    unsigned low = codes << 4 & 0xf0f0f0f0u;

    return {raise_bf16(__byte_perm(low, high, 0x5140)), raise_bf16(__byte_perm(low, high, 0x7362))};
}

/* Makes w of its rows, or where it has none of the panels of a file; under the lock. Returns a status, and undoes what it
 * did if that is not MOSHI_OK. */
int cuda_make_blocks(struct cuda_backend *cuda, struct matrix *w, enum weight_format format);

#endif
