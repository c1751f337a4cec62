/* kernels_x86.h: kernels that another file's table takes over as they are. */
#ifndef MOSHI_CPU_KERNELS_X86_H
#define MOSHI_CPU_KERNELS_X86_H

#include "kernels.h"

#if defined(MOSHI_CPU_X86)

void widen_f16_avx2(const void *w, size_t n, float *y);
void widen_bf16_avx2(const void *w, size_t n, float *y);
void widen_fp8_avx2(const void *w, size_t n, float *y);
void widen_int8_avx2(const void *w, size_t n, float *y);
void arrange_codes_avx2(const float *x, int columns, float *y);
void norm_layer_avx2(const float *x, int n, float eps, const float *weight, const float *bias,
                     float *y);
void norm_rms_avx2(const float *x, int n, float eps, const float *weight, float *y);
void gelu_avx2(const float *x, size_t n, float *y);
void gate_avx2(const float *g, const float *v, size_t n, float *y);
void add_avx2(const float *u, size_t n, float *y);
void add_scaled_avx2(const float *u, const float *scale, size_t n, float *y);
void softmax_avx2(float *x, int n, float scale);

void gather_bf16_amx(const float *const *x, int rows, int columns, int begin, int end, float *y);
void tiles_bf16_amx(const void *w, int columns, int outputs, const float *x, int rows, float *y,
                    size_t stride);

#endif
#endif
