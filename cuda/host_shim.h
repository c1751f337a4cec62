/* host_shim.h: the part of CUDA that the files of this folder use. nvcc gives them the toolkit's; any
 * other C++ compiler gives them a processor's own threads of nothing: a block's threads are fibers,
 * blocks run one after the other, and streams, graphs and memory are what host_shim.cpp makes of
 * them. All differences between the two stand in this header.
 *
 * What the shim is stricter about than a card:
 *  - device memory can be touched by copies alone, and by kernels that have waited for earlier ones;
 *  - a kernel's parameters may hold no address of the host's own memory;
 *  - shared memory is NaN when a block begins, device memory when it is allocated;
 *  - what is copied to shared memory arrives no sooner than somebody waits for it;
 *  - work waits in its stream until somebody waits for it;
 *  - a block that has done an atomic operation waits while others run from their start to their end;
 *  - blocks that meet run in turn, another one after each atomic operation;
 *  - threads run in the order that SHIM_ORDER names: ascending, descending, or a number that seeds
 *    shuffles. One runs until a barrier or a shuffle stops it, so that a missing barrier shows.
 * SHIM_SHARED_KIB and SHIM_PROCESSORS say what the card has, where that is less than an H200.
 *
 * A kernel takes one struct by value. Shared memory is dynamic: SHARED_BYTES names it. */
#ifndef MOSHI_HOST_SHIM_H
#define MOSHI_HOST_SHIM_H

#include <stddef.h>
#include <stdint.h>

#define MOST_PARAMETERS 32764 /* bytes that a kernel takes, from CUDA 12.1 on */

#ifdef __CUDACC__

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define WARP 32

/* The kernel may have all that the card gives a block: the limit is the kernel's, not the launch's, and
 * graphs and other models' threads launch it with more. */
inline cudaError_t allow_shared(const void *kernel, size_t shared)
{
    int card = 0, most = 0;

    if (shared <= 48 << 10) return cudaSuccess;
    cudaGetDevice(&card);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, card);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

/* `early`: it may start when all blocks of the kernel before it have begun, and waits there. Only for
 * code that waits: of kernel_architecture 90 or more. `together`: all blocks run at once, as they wait
 * for each other; no more than resident_blocks, and not early. */
template <class P>
inline cudaError_t launch_kernel(void (*kernel)(P), dim3 grid, dim3 block, size_t shared,
                                 cudaStream_t stream, bool early, bool together, const P &params)
{
    void *arguments[] = {const_cast<P *>(&params)};
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    cudaError_t error = allow_shared((const void *)kernel, shared);

    if (error != cudaSuccess) return error;
    if (together) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    } else {
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early || together;
    return cudaLaunchKernelExC(&config, (const void *)kernel, arguments);
}

/* How many blocks the card can run at once. */
template <class P>
inline cudaError_t resident_blocks(void (*kernel)(P), int threads, size_t shared, int processors,
                                   int *blocks)
{
    cudaError_t error = allow_shared((const void *)kernel, shared);

    *blocks = 0;
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, (const void *)kernel, threads,
                                                              shared);
    *blocks *= processors;
    return error;
}

/* Until other blocks have raised it so far; what they wrote before can be seen then. */
__device__ static __forceinline__ void wait_for_count(const int *count, int least)
{
    int found;

    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
    while (found < least);
}

/* Every kernel begins with it, in all threads: waits until the kernels before it have ended and what
 * they wrote can be seen; then the next kernel may start, which waits in its turn. */
__device__ static __forceinline__ void after_earlier_kernels(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ static __forceinline__ float half_to_float(uint16_t half)
{
    return __half2float(__ushort_as_half(half));
}

/* To nearest, ties to even; what is too large becomes infinity. */
__device__ static __forceinline__ uint16_t float_to_half(float value)
{
    return __half_as_ushort(__float2half_rn(value));
}

/* Two bf16 times 2^120, which none of them is too large for. */
__device__ static __forceinline__ unsigned raise_bf16(unsigned pair)
{
    unsigned raised;

    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(raised)
        : "r"(pair), "r"(0x7b807b80u), "r"(0x80008000u));
    return raised;
}

/* sums += A B, by a warp: A 16 rows, B 8 columns. Lane 4 g + t has of A the words (g, t), (g + 8, t),
 * (g, t + 4), (g + 8, t + 4), of B the words (t, g) and (t + 4, g), of the sums (g, 2 t), (g, 2 t + 1),
 * (g + 8, 2 t), (g + 8, 2 t + 1). A word is two bf16, or four signed bytes. */
__device__ static __forceinline__ void multiply_bf16(float (&sums)[4], const unsigned (&a)[4],
                                                     unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ static __forceinline__ void multiply_codes(int (&sums)[4], const unsigned (&a)[4],
                                                      unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* 16 bytes on their way to shared memory, or zeros there: nothing may touch the place until the thread
 * that sent for them has waited, and another thread not until a barrier after that. What was sent for
 * between two copies_end goes together; copies_wait<N> waits for all but the last N such groups. */
__device__ static __forceinline__ void copy_piece(void *shared, const void *from, int there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     (unsigned)__cvta_generic_to_shared(shared)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ static __forceinline__ void copies_end(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> __device__ static __forceinline__ void copies_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Shared memory as the tensor cores address it, and with the alignment that they want of a tile. */
#define GROUP_SHARED_BYTES(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ static __forceinline__ unsigned shared_address(const void *shared)
{
    return (unsigned)__cvta_generic_to_shared(shared);
}

/* What the thread has waited for can be seen by warpgroups' products after the next barrier. */
__device__ static __forceinline__ void copies_show(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* Products of a warpgroup, four warps of which the first one's number is a multiple of four: between
 * group_begin and group_wait they alone may touch sums, a, and what is read of shared memory. As
 * multiply_bf16, each warp with 16 rows of A, for 128 columns of B: sums[4 n ..] are those of columns
 * 8 n .. 8 n + 7. `b` describes B in shared memory, a row for each column. Code of sm_90a alone has
 * them. */
__device__ static __forceinline__ void group_begin(void)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ static __forceinline__ void group_multiply(float (&sums)[64], const unsigned (&a)[4],
                                                      uint64_t b)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
                 "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]),
                   "+f"(sums[5]), "+f"(sums[6]), "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]),
                   "+f"(sums[10]), "+f"(sums[11]), "+f"(sums[12]), "+f"(sums[13]), "+f"(sums[14]),
                   "+f"(sums[15]), "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]),
                   "+f"(sums[20]), "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23]), "+f"(sums[24]),
                   "+f"(sums[25]), "+f"(sums[26]), "+f"(sums[27]), "+f"(sums[28]), "+f"(sums[29]),
                   "+f"(sums[30]), "+f"(sums[31]), "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]),
                   "+f"(sums[35]), "+f"(sums[36]), "+f"(sums[37]), "+f"(sums[38]), "+f"(sums[39]),
                   "+f"(sums[40]), "+f"(sums[41]), "+f"(sums[42]), "+f"(sums[43]), "+f"(sums[44]),
                   "+f"(sums[45]), "+f"(sums[46]), "+f"(sums[47]), "+f"(sums[48]), "+f"(sums[49]),
                   "+f"(sums[50]), "+f"(sums[51]), "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]),
                   "+f"(sums[55]), "+f"(sums[56]), "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59]),
                   "+f"(sums[60]), "+f"(sums[61]), "+f"(sums[62]), "+f"(sums[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    (void)sums, (void)a, (void)b;
    __trap();
#endif
}

__device__ static __forceinline__ void group_wait(void)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

/* Whether the code for compute capability 9.0 has them: only that for sm_90a does, which no function
 * tells apart, so scripts/build_cuda.py says so. */
#ifdef MOSHI_CUDA_WARPGROUPS
#define HAS_WARPGROUPS 1
#else
#define HAS_WARPGROUPS 0
#endif

/* What this library's code of the kernel for the current card was written for: 90 is compute capability
 * 9.0, and a later card may run it too. 0: there is none. */
template <class P> inline int kernel_architecture(void (*kernel)(P))
{
    cudaFuncAttributes attributes;

    if (cudaFuncGetAttributes(&attributes, (const void *)kernel) != cudaSuccess) return 0;
    return attributes.ptxVersion;
}

/* ---- addresses and the memory behind them, by the driver -------------------------------- */

typedef CUmemGenericAllocationHandle virtual_handle;

/* The driver's functions are asked for by name, since the library is not linked with it. */
struct virtual_memory {
    size_t granularity; /* 0: not here */
    CUmemAllocationProp properties;
    CUresult (*reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
    CUresult (*free_addresses)(CUdeviceptr, size_t);
    CUresult (*create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *,
                       unsigned long long);
    CUresult (*release)(CUmemGenericAllocationHandle);
    CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
    CUresult (*unmap)(CUdeviceptr, size_t);
    CUresult (*set_access)(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
};

template <class F> inline bool find_driver_function(const char *name, F *function)
{
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION < 12050
    cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#else
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault,
                                                         &result);
#endif

    *function = (F)found;
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess && found;
}

inline void virtual_open(struct virtual_memory *memory, int card)
{
    CUresult (*granularity)(size_t *, const CUmemAllocationProp *,
                            CUmemAllocationGranularity_flags);

    *memory = {};
    memory->properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    memory->properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    memory->properties.location.id = card;
    if (!find_driver_function("cuMemGetAllocationGranularity", &granularity) ||
        !find_driver_function("cuMemAddressReserve", &memory->reserve) ||
        !find_driver_function("cuMemAddressFree", &memory->free_addresses) ||
        !find_driver_function("cuMemCreate", &memory->create) ||
        !find_driver_function("cuMemRelease", &memory->release) ||
        !find_driver_function("cuMemMap", &memory->map) ||
        !find_driver_function("cuMemUnmap", &memory->unmap) ||
        !find_driver_function("cuMemSetAccess", &memory->set_access) ||
        granularity(&memory->granularity, &memory->properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM) !=
            CUDA_SUCCESS)
        memory->granularity = 0;
    cudaGetLastError();
}

/* The driver's numbers are the runtime's. */
inline cudaError_t virtual_reserve(struct virtual_memory *memory, void **address, size_t bytes)
{
    CUdeviceptr found = 0;
    CUresult result = memory->reserve(&found, bytes, 0, 0, 0);

    *address = (void *)found;
    return (cudaError_t)result;
}

inline cudaError_t virtual_map(struct virtual_memory *memory, void *address, size_t bytes,
                               virtual_handle *handle)
{
    CUmemAccessDesc access = {memory->properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUresult result = memory->create(handle, bytes, &memory->properties, 0);

    if (result != CUDA_SUCCESS) return (cudaError_t)result;
    result = memory->map((CUdeviceptr)address, bytes, 0, *handle, 0);
    if (result == CUDA_SUCCESS) {
        result = memory->set_access((CUdeviceptr)address, bytes, &access, 1);
        if (result != CUDA_SUCCESS) memory->unmap((CUdeviceptr)address, bytes);
    }
    if (result != CUDA_SUCCESS) memory->release(*handle);
    return (cudaError_t)result;
}

inline void virtual_unmap(struct virtual_memory *memory, void *address, size_t bytes,
                          virtual_handle handle)
{
    memory->unmap((CUdeviceptr)address, bytes);
    memory->release(handle);
}

inline void virtual_free(struct virtual_memory *memory, void *address, size_t bytes)
{
    memory->free_addresses((CUdeviceptr)address, bytes);
}

#else

#define HAS_WARPGROUPS 1

#include <math.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define WARP 32
#define CUDART_VERSION 13000

struct dim3 {
    unsigned x, y, z;

    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static inline float2 make_float2(float x, float y)
{
    return {x, y};
}

static inline float __uint_as_float(unsigned u)
{
    float f;

    memcpy(&f, &u, sizeof f);
    return f;
}

static inline unsigned __float_as_uint(float f)
{
    unsigned u;

    memcpy(&u, &f, sizeof u);
    return u;
}

static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((uint64_t)a * b >> 32);
}

/* ---- inside a kernel -------------------------------------------------------------------- */

/* Of the fiber that runs. */
struct shim_place {
    dim3 thread, block, grid, threads;
    unsigned char *shared;
};
extern struct shim_place shim_now;

#define threadIdx shim_now.thread
#define blockIdx shim_now.block
#define gridDim shim_now.grid
#define blockDim shim_now.threads
#define SHARED_BYTES(name) unsigned char *name = shim_now.shared

/* Before it, a kernel can touch no device memory. */
void after_earlier_kernels(void);
void __syncthreads(void);
/* Every lane of the warp gives so many bytes, at most SHARE_BYTES; all get them, those of a lane at
 * lane * SHARE_BYTES, until the share after the next one. */
#define SHARE_BYTES 24
const unsigned char *shim_share(const void *value, size_t bytes);

template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int other)
{
    static_assert(sizeof value <= 8, "a shuffle moves at most 8 bytes");
    (void)mask;
    memcpy(&value,
           shim_share(&value, sizeof value) + (threadIdx.x % WARP ^ (unsigned)other) * SHARE_BYTES,
           sizeof value);
    return value;
}

template <class T> static inline T __shfl_sync(unsigned mask, T value, int lane)
{
    static_assert(sizeof value <= 8, "a shuffle moves at most 8 bytes");
    (void)mask;
    memcpy(&value, shim_share(&value, sizeof value) + lane * SHARE_BYTES, sizeof value);
    return value;
}

/* Half precision by the value: 1 sign, 5 exponent (bias 15), 10 fraction bits. */
static inline float half_to_float(uint16_t half)
{
    unsigned exponent = half >> 10 & 31, fraction = half & 0x3ffu;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : ldexpf((float)(exponent ? fraction | 0x400u : fraction),
                                          exponent ? (int)exponent - 25 : -24);

    return half & 0x8000u ? -value : value;
}

static inline uint16_t float_to_half(float value)
{
    unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
    float magnitude = fabsf(value), unit;
    int exponent;

    if (magnitude != magnitude) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 65520) return (uint16_t)(sign | 0x7c00u);
    frexpf(magnitude, &exponent);
    if (magnitude < 0x1p-14f) exponent = -13;
    unit = rintf(ldexpf(magnitude, 11 - exponent)); /* 1024 to 2048, less below the normal range */
    return (uint16_t)(sign | (unsigned)((exponent + 13) * 1024 + (int)unit));
}

static inline unsigned raise_bf16(unsigned pair)
{
    unsigned low = __float_as_uint(__uint_as_float(pair << 16) * 0x1p120f);
    unsigned high = __float_as_uint(__uint_as_float(pair & 0xffff0000u) * 0x1p120f);

    return low >> 16 | (high & 0xffff0000u);
}

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector)
{
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned result = 0;

    for (int i = 0; i < 4; i++)
        result |= (unsigned)(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

/* The words of all lanes, as the tensor cores want them. */
struct shim_tile {
    unsigned a[4], b[2];
};
static_assert(sizeof(struct shim_tile) == SHARE_BYTES, "a lane's share");

static inline const struct shim_tile *shim_tiles(const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    struct shim_tile mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};

    return (const struct shim_tile *)(const void *)shim_share(&mine, sizeof mine);
}

static inline void multiply_bf16(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    const struct shim_tile *tiles = shim_tiles(a, b0, b1);
    unsigned lane = threadIdx.x % WARP, g = lane / 4 * 4, n = lane % 4 * 2 * 4;

    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 8; k++) {
            unsigned x = tiles[g + k % 4].a[i / 2 + k / 4 * 2];
            unsigned y = tiles[n + i % 2 * 4 + k % 4].b[k / 4];

            sums[i] += __uint_as_float(x << 16) * __uint_as_float(y << 16);
            sums[i] += __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
        }
}

static inline void multiply_codes(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    const struct shim_tile *tiles = shim_tiles(a, b0, b1);
    unsigned lane = threadIdx.x % WARP, g = lane / 4 * 4, n = lane % 4 * 2 * 4;

    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 32; k++) {
            unsigned word = k / 4, byte = k % 4 * 8;
            unsigned x = tiles[g + word % 4].a[i / 2 + word / 4 * 2];
            unsigned y = tiles[n + i % 2 * 4 + word % 4].b[word / 4];

            sums[i] += (int8_t)(x >> byte) * (int8_t)(y >> byte);
        }
}

/* What is on its way is NaN until the thread has waited. */
void copy_piece(void *shared, const void *from, int there);
void copies_end(void);
void shim_copies_wait(int left);

template <int N> static inline void copies_wait(void)
{
    shim_copies_wait(N);
}

#define GROUP_SHARED_BYTES(name) SHARED_BYTES(name)
#define SHIM_SHARED_BASE 1024u /* as on cards that have warpgroups */

static inline unsigned shared_address(const void *shared)
{
    return (unsigned)((const unsigned char *)shared - shim_now.shared) + SHIM_SHARED_BASE;
}

void copies_show(void);
static inline void group_begin(void)
{
}
/* Adds up in group_wait, from what the shared memory has then; of copies that were not shown, NaN. */
void group_multiply(float (&sums)[64], const unsigned (&a)[4], uint64_t b);
void group_wait(void);

static inline void __threadfence(void)
{
}

void wait_for_count(const int *count, int least);

/* After an atomic operation on device memory: other blocks may get in between. */
void shim_pause(void);

static inline int shim_is_shared(const void *address)
{
    return (uintptr_t)address - (uintptr_t)shim_now.shared < 1 << 18;
}

template <class T> static inline T atomicAdd(T *address, T value)
{
    T old = *address;

    *address = old + value;
    if (!shim_is_shared(address)) shim_pause();
    return old;
}

template <class T> static inline T atomicMax(T *address, T value)
{
    T old = *address;

    if (value > old) *address = value;
    if (!shim_is_shared(address)) shim_pause();
    return old;
}

/* ---- the runtime ------------------------------------------------------------------------ */

typedef enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719,
} cudaError_t;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount;
};
enum cudaMemoryType {
    cudaMemoryTypeUnregistered,
    cudaMemoryTypeHost,
    cudaMemoryTypeDevice,
    cudaMemoryTypeManaged
};
struct cudaPointerAttributes {
    enum cudaMemoryType type;
};
typedef struct shim_stream *cudaStream_t;
typedef struct shim_graph *cudaGraph_t;
typedef struct shim_graph *cudaGraphExec_t;
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
#define cudaStreamNonBlocking 1

const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(void);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMallocHost(void **memory, size_t bytes);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMallocManaged(void **memory, size_t bytes);
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *memory, int byte, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

/* Addresses and the memory behind them; such memory is NaN when it comes. */
typedef int virtual_handle;

struct virtual_memory {
    size_t granularity;
};

void virtual_open(struct virtual_memory *memory, int card);
cudaError_t virtual_reserve(struct virtual_memory *memory, void **address, size_t bytes);
cudaError_t virtual_map(struct virtual_memory *memory, void *address, size_t bytes,
                        virtual_handle *handle);
void virtual_unmap(struct virtual_memory *memory, void *address, size_t bytes,
                   virtual_handle handle);
void virtual_free(struct virtual_memory *memory, void *address, size_t bytes);

/* Runs `body` in every thread; the parameters are only looked at. */
cudaError_t shim_launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, bool together,
                        std::function<void()> body, const void *params, size_t bytes);

template <class P>
inline cudaError_t launch_kernel(void (*kernel)(P), dim3 grid, dim3 block, size_t shared,
                                 cudaStream_t stream, bool early, bool together, const P &params)
{
    (void)early;
    return shim_launch(
        grid, block, shared, stream, together, [kernel, params] { kernel(params); }, &params,
        sizeof params);
}

#define SHIM_RESIDENT 4 /* blocks of a launch whose blocks meet */

template <class P>
inline cudaError_t resident_blocks(void (*kernel)(P), int threads, size_t shared, int processors,
                                   int *blocks)
{
    (void)kernel, (void)threads, (void)shared, (void)processors;
    *blocks = SHIM_RESIDENT;
    return cudaSuccess;
}

int shim_has_kernels(void);

template <class P> inline int kernel_architecture(void (*kernel)(P))
{
    return kernel && shim_has_kernels() ? 90 : 0;
}

/* For tests: call number `countdown` from now (0: the next one) of that kind fails; a failed launch
 * breaks the device until shim_repair. Exported by the library that the shim is linked into. */
enum shim_fault { SHIM_FAULT_MALLOC, SHIM_FAULT_LAUNCH, SHIM_FAULT_DRIVER, SHIM_FAULT_KINDS };
extern "C" __attribute__((visibility("default"))) void shim_inject(int fault, int countdown);
extern "C" __attribute__((visibility("default"))) void shim_repair(void);
/* How often something was done so far: memory taken or a graph made; kernels enqueued outside of
 * graphs; graphs launched; copies to and from the device; fills and copies on it; graphs made. Then
 * bytes: of the copies on it, which kernels did not make; of its memory that is taken now. At last
 * kernels run whose blocks meet. */
enum shim_event {
    SHIM_PREPARED,
    SHIM_LAUNCHED,
    SHIM_REPLAYED,
    SHIM_SENT,
    SHIM_FETCHED,
    SHIM_MOVED,
    SHIM_CAPTURED,
    SHIM_COPIED_BYTES,
    SHIM_TAKEN_BYTES,
    SHIM_MET,
    SHIM_EVENTS
};
extern "C" __attribute__((visibility("default"))) long shim_count(int event);

#endif
#endif
