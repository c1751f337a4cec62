/* dispatch.c: which kernels this machine runs. */
#include <stdio.h>
#include <string.h>

#include "../os.h"
#include "../status.h"
#include "kernels.h"

#if defined(MOSHI_CPU_X86)
#include <cpuid.h>

/* The builtins also ask whether the system saves the wide registers; not every compiler's knows
 * f16c. */
static int has_avx2(void)
{
    unsigned eax, ebx, ecx, edx;

    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

static int has_amx(void)
{
    unsigned eax, ebx, ecx, edx;
    const unsigned bf16_and_tiles = 1u << 22 | 1u << 24;

    return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
           (edx & bf16_and_tiles) == bf16_and_tiles &&
           __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5) /* AVX512-BF16 */ &&
           os_cpu_has(OS_CPU_TILES);
}
#elif defined(MOSHI_CPU_ARM)
static int has_dot(void)
{
    return os_cpu_has(OS_CPU_DOTPROD);
}

static int has_i8mm(void)
{
    return has_dot() && os_cpu_has(OS_CPU_I8MM);
}
#endif

static int always(void)
{
    return 1;
}

/* From the plainest to the best. */
static const struct {
    const struct cpu_kernels *kernels;
    int (*usable)(void);
} tables[] = {
    {&kernels_generic, always},
#if defined(MOSHI_CPU_X86)
    {&kernels_avx2, has_avx2},
    {&kernels_avx512, has_avx512},
    {&kernels_amx, has_amx},
#elif defined(MOSHI_CPU_ARM)
    {&kernels_neon, always},
    {&kernels_neon_dot, has_dot},
    {&kernels_neon_i8mm, has_i8mm},
#endif
};

static int fail_unknown(const char *wanted)
{
    int count = (int)(sizeof tables / sizeof *tables);
    char names[64] = "";

    for (int i = 0, used = 0; i < count; i++)
        used += snprintf(names + used, sizeof names - (size_t)used, "%s%s",
                         i == 0           ? ""
                         : i == count - 1 ? " or "
                                          : ", ",
                         tables[i].kernels->name);
    return moshi_fail(MOSHI_ERROR_ARGUMENT, "MOSHI_C_ISA is \"%s\", expected %s", wanted, names);
}

int kernels_choose(const struct cpu_kernels **kernels)
{
    const char *wanted = os_environment("MOSHI_C_ISA");
    int count = (int)(sizeof tables / sizeof *tables), found = -1;

    for (int i = 0; i < count; i++) {
        if (tables[i].usable()) *kernels = tables[i].kernels;
        if (wanted && strcmp(wanted, tables[i].kernels->name) == 0) found = i;
    }
    if (!wanted) return MOSHI_OK;
    if (found < 0) return fail_unknown(wanted);
    if (!tables[found].usable())
        return moshi_fail(MOSHI_ERROR_DEVICE,
                          "MOSHI_C_ISA is %s, which this machine can't run (it has %s)", wanted,
                          (*kernels)->name);
    *kernels = tables[found].kernels;
    return MOSHI_OK;
}
