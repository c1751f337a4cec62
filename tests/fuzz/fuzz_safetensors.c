/* fuzz_safetensors.c: the reader of one file, on disk and in memory, and of shards behind an index.
 * An input is a file, or an index and its shards "a.safetensors" and "b.safetensors", with lines
 * "====" between. */
#include "fuzz.h"
#include "hash.h"
#include "safetensors.h"

/* Every tensor is inside its file, has the size its shape says, and is found by its name. */
static int64_t check_tensors(struct tensor_file *file)
{
    int64_t total = 0;
    for (int i = 0; i < tensor_file_count(file); ++i) {
        struct tensor *tensor = tensor_file_at(file, i);
        int64_t elements = 1;
        PROMISE(tensor != NULL && tensor_file_find(file, tensor->name) == tensor);
        PROMISE(tensor->n_dims >= 0 && tensor->n_dims <= SAFETENSORS_MAX_DIMS);
        for (int d = 0; d < tensor->n_dims; ++d) {
            PROMISE(tensor->dims[d] >= 0);
            elements *= tensor->dims[d];
        }
        PROMISE(tensor->elements == elements && tensor->used == 0);
        PROMISE(tensor->bytes == (size_t)elements * tensor_dtype_bytes(tensor->dtype));
        total += (int64_t)tensor->bytes;
        const uint8_t *data = tensor->data;
        uint8_t sum = 0;
        for (size_t at = 0; at < tensor->bytes; ++at) sum ^= data[at];
        volatile uint8_t kept = sum;
        (void)kept;
    }
    PROMISE(tensor_file_at(file, -1) == NULL &&
            tensor_file_at(file, tensor_file_count(file)) == NULL);
    PROMISE(tensor_file_find(file, "no such tensor, surely") == NULL);
    return total;
}

static uint64_t fingerprint(const struct tensor_file *file)
{
    return tensor_file_fingerprint(file, HASH_START);
}

static void open_both_ways(const char *path, int64_t data_bytes)
{
    struct tensor_file *mapped, *copied;
    int status = tensor_file_open(path, 0, &mapped);
    promise_answer(status);
    PROMISE(tensor_file_open(path, 1, &copied) == status);
    if (status == MOSHI_OK) {
        int64_t total = check_tensors(mapped);
        PROMISE(check_tensors(copied) == total);
        PROMISE(tensor_file_count(mapped) == tensor_file_count(copied));
        PROMISE(tensor_file_mapped_bytes(copied) == 0);
        PROMISE(fingerprint(mapped) == fingerprint(copied));
        PROMISE(data_bytes < 0 || total == data_bytes);
    } else {
        PROMISE(mapped == NULL && copied == NULL);
    }
    tensor_file_close(mapped);
    tensor_file_close(copied);
}

static void parse(const uint8_t *data, size_t bytes)
{
    struct tensor_file *parsed, *opened;
    int status = tensor_file_parse(data, bytes, "input", &parsed);
    promise_answer(status);
    PROMISE(tensor_file_open(fuzz_path("one.safetensors"), 0, &opened) == status);
    PROMISE((status == MOSHI_OK) == (parsed != NULL));
    if (status == MOSHI_OK) {
        PROMISE(check_tensors(parsed) == check_tensors(opened));
        PROMISE(fingerprint(parsed) == fingerprint(opened));
        const char *format = tensor_file_metadata(parsed, "format");
        PROMISE(format == NULL || strlen(format) < bytes);
        PROMISE(tensor_file_metadata(parsed, "no such key, surely") == NULL);
    }
    tensor_file_close(parsed);
    tensor_file_close(opened);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const uint8_t *index, *part;
    uint64_t header = 0;
    for (size_t i = 0; i < 8 && bytes >= 8; ++i) header |= (uint64_t)data[i] << 8 * i;
    fuzz_write("one.safetensors", data, bytes);
    open_both_ways(fuzz_path("one.safetensors"),
                   header <= bytes ? (int64_t)(bytes - header) - 8 : -1);
    parse(data, bytes);

    size_t index_bytes = fuzz_part(&data, &bytes, &index);
    fuzz_write("index.json", index, index_bytes);
    size_t part_bytes = fuzz_part(&data, &bytes, &part);
    fuzz_write("a.safetensors", part, part_bytes);
    part_bytes = fuzz_part(&data, &bytes, &part);
    fuzz_write("b.safetensors", part, part_bytes);
    open_both_ways(fuzz_path("index.json"), -1);
    return 0;
}
