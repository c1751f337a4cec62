/* cuda.c: finds and loads the library of the CUDA backend. Nothing of CUDA is touched before it is
 * asked for. */
#include "cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"
#include "status.h"

/* The built library: beside this code, or where MOSHI_C_CUDA_LIBRARY says. */
static int library_path(char *path, size_t capacity)
{
    const char *given = os_environment("MOSHI_C_CUDA_LIBRARY");
    static const char *const places[] = {"lib/" CUDA_LIBRARY, CUDA_LIBRARY};
    char folder[4096];
    if (given) return snprintf(path, capacity, "%s", given) < (int)capacity;
    for (size_t i = 0; os_own_folder(folder, sizeof folder) && i < 2; ++i)
        if (snprintf(path, capacity, "%s/%s", folder, places[i]) < (int)capacity &&
            os_path_exists(path))
            return 1;
    return 0;
}

const struct cuda_library *cuda_load(void)
{
    char path[4200], reason[300];
    if (!library_path(path, sizeof path)) {
        moshi_fail(MOSHI_ERROR_DEVICE,
                   "no CUDA device is available: the package was built without its CUDA part, and "
                   "has no " CUDA_LIBRARY);
        return NULL;
    }
    void *library = os_library_open(path, reason, sizeof reason);
    if (!library) {
        moshi_fail(MOSHI_ERROR_DEVICE, "no CUDA device is available: %s", reason);
        return NULL;
    }
    cuda_entry *entry;
    *(void **)&entry = os_library_symbol(library, CUDA_ENTRY);
    const struct cuda_library *cuda = entry ? entry() : NULL;
    if (cuda && cuda->abi == CUDA_ABI && cuda->ops_bytes == (int)sizeof(struct backend_ops))
        return cuda;
    moshi_fail(
        MOSHI_ERROR_DEVICE,
        "no CUDA device is available: %s has interface %d of the backend, expected %d; it is "
        "from another version of this package",
        path, cuda ? cuda->abi : 0, CUDA_ABI);
    return NULL;
}

static int fail(int status, const char *sentence)
{
    return moshi_fail(status, "%s", sentence);
}

int cuda_backend_create(const char *device, struct backend **backend)
{
    char *end = NULL;
    long card = 0;
    *backend = NULL;
    if (strcmp(device, "cuda") != 0) {
        int numbered = strncmp(device, "cuda:", 5) == 0 && device[5] >= '0' && device[5] <= '9';
        card = numbered ? strtol(device + 5, &end, 10) : -1;
        if (!numbered || *end || card > 255)
            return moshi_fail(
                MOSHI_ERROR_ARGUMENT,
                "device is \"%.40s\", expected \"cuda\", or \"cuda:1\" for the second "
                "card, and so on",
                device);
    }
    const struct cuda_library *cuda = cuda_load();
    return cuda ? cuda->create((int)card, fail, backend) : MOSHI_ERROR_DEVICE;
}

int cuda_devices(struct moshi_device *devices, int capacity)
{
    char path[4200], reason[160] = "";
    if (!library_path(path, sizeof path)) return 0;
    const struct cuda_library *cuda = cuda_load();
    int count = cuda ? cuda->count(reason, sizeof reason) : 0;
    for (int card = 0; card < count && card < capacity; ++card) {
        memset(&devices[card], 0, sizeof devices[card]);
        cuda->describe(card, &devices[card]);
    }
    if (count > 0) return count;
    if (capacity > 0) {
        memset(devices, 0, sizeof *devices);
        strcpy(devices->name, "cuda");
        snprintf(devices->reason, sizeof devices->reason, "%.159s",
                 cuda ? reason : moshi_error_detail());
    }
    return 1;
}
