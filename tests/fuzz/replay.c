/* replay.c: runs a fuzz target over the files of the folders given, in the place of libFuzzer.
 * usage: fuzz_NAME folder... */
#include <dirent.h>

#include "fuzz.h"

static int replay(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) return 0;
    long bytes = ftell(file);
    /* Of the exact size, so that the sanitizer sees the first byte read beyond it. */
    uint8_t *data = bytes >= 0 ? malloc((size_t)bytes + (bytes == 0)) : NULL;
    rewind(file);
    int whole = data && fread(data, 1, (size_t)bytes, file) == (size_t)bytes;
    fclose(file);
    if (whole) LLVMFuzzerTestOneInput(data, (size_t)bytes);
    free(data);
    return whole;
}

int main(int argc, char **argv)
{
    int inputs = 0;
    for (int i = 1; i < argc; ++i) {
        DIR *folder = opendir(argv[i]);
        for (struct dirent *entry; folder && (entry = readdir(folder));) {
            char path[4096];
            if (entry->d_name[0] == '.') continue;
            (void)snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
            printf("%s", path); /* before it runs: it may be the last one */
            fflush(stdout);
            int whole = replay(path);
            puts(whole ? " ok" : " could not be read");
            if (!whole) return 1;
            ++inputs;
        }
        if (folder) closedir(folder);
    }
    printf("%d inputs\n", inputs);
    return inputs == 0;
}
