/* dispatch.c: which kernels this machine runs. */
#include <string.h>

#include "../os.h"
#include "../status.h"
#include "kernels.h"

#if defined(MOSHI_CPU_AVX2)
#include <cpuid.h>

/* The builtin also asks whether the system saves the wide registers; not every compiler's knows
 * f16c. */
static int has_avx2(void)
{
    unsigned eax, ebx, ecx, edx;

    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

static const struct cpu_kernels *best(void)
{
#if defined(MOSHI_CPU_AVX2)
    if (has_avx2()) return &kernels_avx2;
#endif
    return &kernels_generic;
}

int kernels_choose(const struct cpu_kernels **kernels)
{
    const char *wanted = os_environment("MOSHI_C_ISA");

    *kernels = best();
    if (!wanted || strcmp(wanted, (*kernels)->name) == 0) return MOSHI_OK;
    if (strcmp(wanted, "generic") == 0) {
        *kernels = &kernels_generic;
        return MOSHI_OK;
    }
    if (strcmp(wanted, "avx2") == 0)
        return moshi_fail(MOSHI_ERROR_DEVICE,
                          "MOSHI_C_ISA is avx2, which this machine can't run (it has %s)",
                          (*kernels)->name);
    return moshi_fail(MOSHI_ERROR_ARGUMENT, "MOSHI_C_ISA is \"%s\", expected generic or avx2",
                      wanted);
}
