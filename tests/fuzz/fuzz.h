/* fuzz.h: what the fuzz targets share. A target is one file, fuzz_NAME.c, with libFuzzer's entry
 * point, and a folder corpus/NAME of inputs; the Makefile finds both. `make fuzz` links it with
 * libFuzzer, `make fuzz-corpus` with replay.c, which only runs the corpus. */
#ifndef FUZZ_H
#define FUZZ_H

#include <dirent.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "moshi.h"
#include "status.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Aborts, which the fuzzer reports together with the input. */
#define PROMISE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: broken promise: %s (last error: %s)\n", __FILE__, __LINE__,    \
                    #condition, moshi_error_detail());                                             \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* What a reader may answer to a file: MOSHI_OK, or one sentence about the file or about memory. */
static inline void promise_answer(int status)
{
    if (status == MOSHI_OK) return;
    PROMISE(status == MOSHI_ERROR_CHECKPOINT || status == MOSHI_ERROR_MEMORY);
    const char *text = moshi_error_detail();
    size_t bytes = strlen(text);
    PROMISE(bytes > 0);
    for (size_t at = 0, n; at < bytes; at += n) {
        n = moshi_utf8_bytes(text + at, bytes - at);
        PROMISE(n > 0 && (unsigned char)text[at] >= 0x20);
    }
}

static char fuzz_folder[256];

static inline const char *fuzz_path(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    (void)snprintf(path, sizeof paths[0], "%s/%s", fuzz_folder, name);
    return path;
}

static inline void fuzz_remove(void)
{
    DIR *folder = opendir(fuzz_folder);
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (entry->d_name[0] != '.') unlink(fuzz_path(entry->d_name));
    if (folder) closedir(folder);
    rmdir(fuzz_folder);
}

/* For readers that take a path: into a folder of this process, which only a crash leaves behind;
 * in memory where the system has it so. */
static inline void fuzz_write(const char *name, const uint8_t *data, size_t bytes)
{
    if (!fuzz_folder[0]) {
        const char *parent = getenv("TMPDIR");
        if (!parent) parent = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
        (void)snprintf(fuzz_folder, sizeof fuzz_folder, "%s/moshi-fuzz-XXXXXX", parent);
        PROMISE(mkdtemp(fuzz_folder) != NULL && atexit(fuzz_remove) == 0);
    }
    FILE *file = fopen(fuzz_path(name), "wb");
    PROMISE(file != NULL && fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0);
}

/* Cuts the next part off an input of several files: up to a line "====", or all of it. */
static inline size_t fuzz_part(const uint8_t **data, size_t *bytes, const uint8_t **part)
{
    static const char mark[] = "\n====\n";
    const size_t length = sizeof mark - 1;
    *part = *data;
    for (size_t i = 0; i + length <= *bytes; ++i) {
        if (memcmp(*data + i, mark, length) != 0) continue;
        *data += i + length;
        *bytes -= i + length;
        return i;
    }
    size_t all = *bytes;
    *data += all;
    *bytes = 0;
    return all;
}

#endif
