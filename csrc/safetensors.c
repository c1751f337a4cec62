/* safetensors.c: a safetensors file, or the shards of an index.json, as one table of tensors
 * sorted by name.
 *
 * Owns the file maps, the table and the names; the data is used where it lies. Refuses any header
 * that is not exactly right, before a byte of data is looked at: the tensors of a file must tile
 * its data, in any order, without overlap, hole or rest. What is allocated is bounded by the bytes
 * of the header that are really there. */
#include "safetensors.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "json.h"
#include "os.h"
#include "status.h"

#define MAX_HEADER_BYTES 100000000 /* the format's own limit */
#define MAX_SHARDS 4096

struct shard {
    char *path;
    const char *name; /* last part of path */
    char *names;      /* of its tensors, each with its NUL */
    char *metadata;   /* key, NUL, value, NUL, ...; NULL without */
    size_t metadata_bytes;
    struct os_file file; /* empty when the bytes are the caller's */
};

struct entry {
    struct tensor tensor; /* first: what callers get is also an entry */
    int shard;
};

struct tensor_file {
    char *path;
    struct shard *shards;
    int n_shards;
    struct entry *entries;
    int count;
};

struct dtype_row {
    const char *name;
    size_t bytes;
};

static const struct dtype_row dtypes[] = {
    [TENSOR_F64] = {"F64", 8},         [TENSOR_F32] = {"F32", 4},
    [TENSOR_F16] = {"F16", 2},         [TENSOR_BF16] = {"BF16", 2},
    [TENSOR_F8_E4M3] = {"F8_E4M3", 1}, [TENSOR_F8_E5M2] = {"F8_E5M2", 1},
    [TENSOR_I64] = {"I64", 8},         [TENSOR_I32] = {"I32", 4},
    [TENSOR_I16] = {"I16", 2},         [TENSOR_I8] = {"I8", 1},
    [TENSOR_U64] = {"U64", 8},         [TENSOR_U32] = {"U32", 4},
    [TENSOR_U16] = {"U16", 2},         [TENSOR_U8] = {"U8", 1},
    [TENSOR_BOOL] = {"BOOL", 1},
};

#define DTYPE_COUNT ((int)(sizeof dtypes / sizeof dtypes[0]))

const char *tensor_dtype_name(enum tensor_dtype dtype)
{
    int i = (int)dtype;
    return i >= 0 && i < DTYPE_COUNT ? dtypes[i].name : "unknown";
}

size_t tensor_dtype_bytes(enum tensor_dtype dtype)
{
    int i = (int)dtype;
    return i >= 0 && i < DTYPE_COUNT ? dtypes[i].bytes : 0;
}

char *tensor_shape_text(const int64_t *dims, int n_dims, char *text, size_t capacity)
{
    size_t at = 0;
    if (capacity == 0) {
        return text;
    }
    text[0] = '\0';
    for (int i = 0; i <= n_dims && at < capacity; i++) {
        int n = i == n_dims ? snprintf(text + at, capacity - at, "%s", n_dims > 0 ? "]" : "[]")
                            : snprintf(text + at, capacity - at, "%c%lld", i == 0 ? '[' : ',',
                                       (long long)dims[i]);
        at += n > 0 ? (size_t)n : 0;
    }
    return text;
}

static int fail_memory(const char *path)
{
    return moshi_fail(MOSHI_ERROR_MEMORY, "%s: no memory for the table of tensors", path);
}

static char *copy_text(const char *text, size_t bytes)
{
    char *copy = malloc(bytes + 1);
    if (copy != NULL) {
        memcpy(copy, text, bytes);
        copy[bytes] = '\0';
    }
    return copy;
}

/* ---- one tensor of a header -------------------------------------------------------------- */

static int read_dtype(const char *path, const struct json *node, struct tensor *tensor)
{
    const struct json *dtype = json_get(node, "dtype");
    if (dtype == NULL || dtype->type != JSON_STRING) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' has no dtype, expected a string", path, node->key);
    }
    for (int i = 0; i < DTYPE_COUNT; i++) {
        if (strcmp(dtype->string, dtypes[i].name) == 0) {
            tensor->dtype = (enum tensor_dtype)i;
            return MOSHI_OK;
        }
    }
    return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                      "%s: tensor '%.100s' has the unknown dtype '%.40s', expected one like F32 "
                      "or BF16",
                      path, node->key, dtype->string);
}

static int read_shape(const char *path, const struct json *node, struct tensor *tensor)
{
    const struct json *shape = json_get(node, "shape");
    if (shape == NULL || shape->type != JSON_ARRAY) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' has no shape, expected a list of sizes", path,
                          node->key);
    }
    if (shape->count > SAFETENSORS_MAX_DIMS) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' has %d dimensions, expected at most %d", path,
                          node->key, shape->count, SAFETENSORS_MAX_DIMS);
    }
    /* Empty dimensions count as 1 here, so that no product a caller forms of some of the sizes
     * overflows either. */
    int64_t product = (int64_t)dtypes[tensor->dtype].bytes;
    int empty = 0, overflow = 0;
    for (const struct json *dim = shape->first; dim != NULL; dim = dim->next) {
        int64_t size;
        if (!json_integer(dim, &size) || size < 0) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: tensor '%.100s' has a size in its shape that is not a whole "
                              "number, expected 0 or more",
                              path, node->key);
        }
        tensor->dims[tensor->n_dims++] = size;
        empty |= size == 0;
        overflow |= __builtin_mul_overflow(product, size > 0 ? size : 1, &product);
    }
    if (overflow || (uint64_t)product > SIZE_MAX / 2) {
        char text[256];
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' has the shape %s, whose size overflows, expected "
                          "the shape of its data",
                          path, node->key,
                          tensor_shape_text(tensor->dims, tensor->n_dims, text, sizeof text));
    }
    tensor->bytes = empty ? 0 : (size_t)product;
    tensor->elements = (int64_t)(tensor->bytes / dtypes[tensor->dtype].bytes);
    return MOSHI_OK;
}

static int read_offsets(const char *path, const struct json *node, const uint8_t *data,
                        size_t data_bytes, struct tensor *tensor)
{
    const struct json *offsets = json_get(node, "data_offsets");
    int64_t begin, end;
    if (offsets == NULL || offsets->type != JSON_ARRAY || offsets->count != 2 ||
        !json_integer(offsets->first, &begin) || !json_integer(offsets->first->next, &end) ||
        begin < 0 || end < begin) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' has no valid data_offsets, expected [begin, end] "
                          "with 0 <= begin <= end",
                          path, node->key);
    }
    if ((uint64_t)end > data_bytes) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' ends at byte %lld of the data, but the file has "
                          "only %zu (is it complete?)",
                          path, node->key, (long long)end, data_bytes);
    }
    if ((uint64_t)(end - begin) != tensor->bytes) {
        char text[256];
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' has %lld bytes of data, expected %zu for %s of %s",
                          path, node->key, (long long)(end - begin), tensor->bytes,
                          tensor_dtype_name(tensor->dtype),
                          tensor_shape_text(tensor->dims, tensor->n_dims, text, sizeof text));
    }
    tensor->data = data + begin;
    return MOSHI_OK;
}

static int read_tensor(const char *path, const struct json *node, const uint8_t *data,
                       size_t data_bytes, struct tensor *tensor)
{
    if (node->type != JSON_OBJECT) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: tensor '%.100s' is not described by an object with dtype, shape "
                          "and data_offsets",
                          path, node->key);
    }
    int status = read_dtype(path, node, tensor);
    if (status == MOSHI_OK) {
        status = read_shape(path, node, tensor);
    }
    if (status == MOSHI_OK) {
        status = read_offsets(path, node, data, data_bytes, tensor);
    }
    return status;
}

/* ---- one file ---------------------------------------------------------------------------- */

static int compare_place(const void *left, const void *right)
{
    const struct tensor *a = &((const struct entry *)left)->tensor;
    const struct tensor *b = &((const struct entry *)right)->tensor;
    uintptr_t at = (uintptr_t)a->data, bt = (uintptr_t)b->data;
    if (at != bt) {
        return at < bt ? -1 : 1;
    }
    return (a->bytes > b->bytes) - (a->bytes < b->bytes);
}

static int check_tiling(const char *path, struct entry *entries, int count, const uint8_t *data,
                        size_t data_bytes)
{
    size_t at = 0;
    if (count > 0) {
        qsort(entries, (size_t)count, sizeof *entries, compare_place);
    }
    for (int i = 0; i < count; i++) {
        const struct tensor *tensor = &entries[i].tensor;
        size_t begin = (size_t)((const uint8_t *)tensor->data - data);
        if (begin < at) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: tensor '%.100s' begins at byte %zu of the data and overlaps "
                              "tensor '%.100s', which ends at %zu",
                              path, tensor->name, begin, entries[i - 1].tensor.name, at);
        }
        if (begin > at) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: tensor '%.100s' begins at byte %zu of the data, expected %zu: "
                              "the bytes between belong to no tensor",
                              path, tensor->name, begin, at);
        }
        at = begin + tensor->bytes;
    }
    if (at != data_bytes) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: the tensors end at byte %zu of the data, expected %zu: the bytes "
                          "behind belong to no tensor",
                          path, at, data_bytes);
    }
    return MOSHI_OK;
}

/* Appends the tensors of a parsed header to the table. */
static int add_tensors(struct tensor_file *file, struct shard *shard, const struct json *root,
                       const uint8_t *data, size_t data_bytes)
{
    if (root->type != JSON_OBJECT) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: the header is not a JSON object, expected one of tensors",
                          shard->path);
    }
    size_t names_bytes = 0, total;
    for (const struct json *node = root->first; node != NULL; node = node->next) {
        names_bytes += strlen(node->key) + 1;
    }
    shard->names = malloc(names_bytes + 1);
    if (shard->names == NULL || root->count > INT_MAX - file->count ||
        __builtin_mul_overflow((size_t)(file->count + root->count + 1), sizeof *file->entries,
                               &total)) {
        return fail_memory(shard->path);
    }
    struct entry *entries = realloc(file->entries, total);
    if (entries == NULL) {
        return fail_memory(shard->path);
    }
    file->entries = entries;

    int first = file->count;
    char *name = shard->names;
    for (const struct json *node = root->first; node != NULL; node = node->next) {
        if (strcmp(node->key, "__metadata__") == 0) {
            continue;
        }
        struct entry *entry = &entries[file->count];
        *entry = (struct entry){.shard = (int)(shard - file->shards)};
        int status = read_tensor(shard->path, node, data, data_bytes, &entry->tensor);
        if (status != MOSHI_OK) {
            return status;
        }
        size_t bytes = strlen(node->key) + 1;
        entry->tensor.name = memcpy(name, node->key, bytes);
        name += bytes;
        file->count++;
    }
    return check_tiling(shard->path, entries + first, file->count - first, data, data_bytes);
}

static int keep_metadata(struct shard *shard, const struct json *root)
{
    const struct json *metadata = json_get(root, "__metadata__");
    size_t bytes = 0;
    if (metadata == NULL) {
        return MOSHI_OK;
    }
    for (const struct json *node = metadata->first; node != NULL; node = node->next) {
        bytes += node->type == JSON_STRING ? strlen(node->key) + strlen(node->string) + 2 : 0;
    }
    shard->metadata = malloc(bytes + 1);
    if (shard->metadata == NULL) {
        return fail_memory(shard->path);
    }
    char *to = shard->metadata;
    for (const struct json *node = metadata->first; node != NULL; node = node->next) {
        if (node->type == JSON_STRING) {
            to = stpcpy(stpcpy(to, node->key) + 1, node->string) + 1;
        }
    }
    shard->metadata_bytes = bytes;
    return MOSHI_OK;
}

static int parse_shard(struct tensor_file *file, struct shard *shard, const uint8_t *bytes,
                       size_t rest)
{
    const char *path = shard->path;
    if (rest < 8) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: %zu bytes are too few for a safetensors file, expected the 8-byte "
                          "length of its header first",
                          path, rest);
    }
    rest -= 8;
    uint64_t header = 0;
    for (int i = 0; i < 8; i++) {
        header |= (uint64_t)bytes[i] << 8 * i;
    }
    if (header > MAX_HEADER_BYTES) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: the header claims %llu bytes, expected at most %d (is this a "
                          "safetensors file?)",
                          path, (unsigned long long)header, MAX_HEADER_BYTES);
    }
    if (header > rest) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: the header claims %llu bytes, but only %zu follow (is the file "
                          "complete?)",
                          path, (unsigned long long)header, rest);
    }
    struct json_document *document;
    int status = json_parse((const char *)bytes + 8, (size_t)header, path, &document);
    if (status != MOSHI_OK) {
        return status;
    }
    status = add_tensors(file, shard, json_root(document), bytes + 8 + header,
                         rest - (size_t)header);
    if (status == MOSHI_OK) {
        status = keep_metadata(shard, json_root(document));
    }
    json_free(document);
    return status;
}

/* Takes over `path`, which may be NULL after a failed allocation. */
static int name_shard(struct tensor_file *file, struct shard *shard, char *path)
{
    shard->path = path;
    if (path == NULL) {
        return fail_memory(file->path);
    }
    const char *slash = strrchr(path, '/');
    shard->name = slash != NULL ? slash + 1 : path;
    return MOSHI_OK;
}

/* Takes over `path`, which may be NULL after a failed allocation. */
static int open_shard(struct tensor_file *file, struct shard *shard, char *path, int copy)
{
    int status = name_shard(file, shard, path);
    if (status == MOSHI_OK) {
        status = os_file_open(path, copy, &shard->file);
    }
    if (status == MOSHI_OK) {
        status = parse_shard(file, shard, shard->file.data, shard->file.bytes);
    }
    return status;
}

/* ---- the table --------------------------------------------------------------------------- */

static int compare_name(const void *left, const void *right)
{
    return strcmp(((const struct entry *)left)->tensor.name,
                  ((const struct entry *)right)->tensor.name);
}

static int compare_key(const void *key, const void *entry)
{
    return strcmp(key, ((const struct entry *)entry)->tensor.name);
}

/* Within one file the JSON reader has refused duplicates already. */
static int sort_table(struct tensor_file *file)
{
    if (file->count > 0) {
        qsort(file->entries, (size_t)file->count, sizeof *file->entries, compare_name);
    }
    for (int i = 1; i < file->count; i++) {
        const struct entry *a = &file->entries[i - 1], *b = &file->entries[i];
        if (strcmp(a->tensor.name, b->tensor.name) == 0) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: tensor '%.100s' stands in two shards, '%.100s' and '%.100s', "
                              "expected one",
                              file->path, a->tensor.name, file->shards[a->shard].name,
                              file->shards[b->shard].name);
        }
    }
    return MOSHI_OK;
}

/* ---- index ------------------------------------------------------------------------------- */

static int compare_texts(const void *left, const void *right)
{
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

static int is_plain_name(const char *name)
{
    return name[0] != '\0' && strcmp(name, ".") != 0 && strcmp(name, "..") != 0 &&
           strpbrk(name, "/\\") == NULL;
}

/* The distinct shard names of the map, sorted, into names[map->count]; their count, or a status. */
static int list_shards(const char *path, const struct json *map, const char **names)
{
    size_t n = 0;
    int count = 0;
    for (const struct json *node = map->first; node != NULL; node = node->next) {
        if (node->type != JSON_STRING || !is_plain_name(node->string)) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: tensor '%.100s' is placed in '%.100s', expected the name of a "
                              "file beside the index, without folders",
                              path, node->key,
                              node->type == JSON_STRING ? node->string : "(not a string)");
        }
        names[n++] = node->string;
    }
    if (n > 0) {
        qsort(names, n, sizeof *names, compare_texts);
    }
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || strcmp(names[i], names[count - 1]) != 0) {
            names[count++] = names[i];
        }
    }
    if (count > MAX_SHARDS) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: %d shards, expected at most %d", path, count,
                          MAX_SHARDS);
    }
    return count;
}

static char *path_beside(const char *path, const char *name)
{
    const char *slash = strrchr(path, '/');
    size_t folder = slash != NULL ? (size_t)(slash - path) + 1 : 0;
    size_t bytes = strlen(name);
    char *joined = malloc(folder + bytes + 1);
    if (joined != NULL) {
        memcpy(joined, path, folder);
        memcpy(joined + folder, name, bytes + 1);
    }
    return joined;
}

static int check_places(struct tensor_file *file, const struct json *map)
{
    for (const struct json *node = map->first; node != NULL; node = node->next) {
        const struct entry *entry = (const struct entry *)tensor_file_find(file, node->key);
        const char *found = entry != NULL ? file->shards[entry->shard].name : NULL;
        if (found == NULL || strcmp(found, node->string) != 0) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: tensor '%.100s' is expected in shard '%.100s', but found in "
                              "%s%.100s%s",
                              file->path, node->key, node->string, found != NULL ? "'" : "",
                              found != NULL ? found : "no shard", found != NULL ? "'" : "");
        }
    }
    return MOSHI_OK;
}

static int open_shards(struct tensor_file *file, const struct json *map, int copy)
{
    if (map == NULL || map->type != JSON_OBJECT || map->count == 0) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: no 'weight_map', expected an object of tensor names and shards",
                          file->path);
    }
    const char **names = calloc((size_t)map->count, sizeof *names);
    if (names == NULL) {
        return fail_memory(file->path);
    }
    int count = list_shards(file->path, map, names);
    int status = count < 0 ? count : MOSHI_OK;
    if (status == MOSHI_OK) {
        file->shards = calloc((size_t)count, sizeof *file->shards);
        status = file->shards != NULL ? MOSHI_OK : fail_memory(file->path);
    }
    for (int i = 0; status == MOSHI_OK && i < count; i++) {
        char *path = path_beside(file->path, names[i]);
        if (path != NULL && !os_path_exists(path)) {
            status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                                "%s: names the shard '%.100s', expected that file beside it",
                                file->path, names[i]);
            free(path);
            break;
        }
        file->n_shards++;
        status = open_shard(file, &file->shards[i], path, copy);
    }
    free(names);
    if (status == MOSHI_OK) {
        status = sort_table(file);
    }
    return status == MOSHI_OK ? check_places(file, map) : status;
}

static int open_index(struct tensor_file *file, int copy)
{
    struct os_file text;
    int status = os_file_open(file->path, copy, &text);
    if (status != MOSHI_OK) {
        return status;
    }
    struct json_document *document = NULL;
    if (text.bytes > MAX_HEADER_BYTES) {
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                            "%s: an index of %zu bytes, expected at most %d", file->path,
                            text.bytes, MAX_HEADER_BYTES);
    } else {
        status = json_parse((const char *)text.data, text.bytes, file->path, &document);
    }
    os_file_close(&text);
    if (status == MOSHI_OK) {
        status = open_shards(file, json_get(json_root(document), "weight_map"), copy);
    }
    json_free(document);
    return status;
}

/* ---- the interface ----------------------------------------------------------------------- */

static int ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* A file without shards yet, or with one. */
static struct tensor_file *make_file(const char *path, int n_shards)
{
    struct tensor_file *file = calloc(1, sizeof *file);
    if (file == NULL) {
        return NULL;
    }
    file->path = copy_text(path, strlen(path));
    file->shards = n_shards > 0 ? calloc((size_t)n_shards, sizeof *file->shards) : NULL;
    file->n_shards = file->shards != NULL ? n_shards : 0;
    if (file->path == NULL || file->n_shards != n_shards) {
        tensor_file_close(file);
        return NULL;
    }
    return file;
}

static int finish(struct tensor_file *made, int status, struct tensor_file **file)
{
    if (status != MOSHI_OK) {
        tensor_file_close(made);
        return status;
    }
    *file = made;
    return MOSHI_OK;
}

int tensor_file_open(const char *path, int copy, struct tensor_file **file)
{
    *file = NULL;
    int index = ends_with(path, ".json");
    struct tensor_file *made = make_file(path, index ? 0 : 1);
    if (made == NULL) {
        return fail_memory(path);
    }
    if (index) {
        return finish(made, open_index(made, copy), file);
    }
    int status = open_shard(made, made->shards, copy_text(path, strlen(path)), copy);
    return finish(made, status == MOSHI_OK ? sort_table(made) : status, file);
}

int tensor_file_parse(const void *data, size_t bytes, const char *name, struct tensor_file **file)
{
    *file = NULL;
    struct tensor_file *made = make_file(name, 1);
    if (made == NULL) {
        return fail_memory(name);
    }
    int status = name_shard(made, made->shards, copy_text(name, strlen(name)));
    if (status == MOSHI_OK) {
        status = parse_shard(made, made->shards, data, bytes);
    }
    return finish(made, status == MOSHI_OK ? sort_table(made) : status, file);
}

void tensor_file_close(struct tensor_file *file)
{
    if (file == NULL) {
        return;
    }
    for (int i = 0; i < file->n_shards; i++) {
        os_file_close(&file->shards[i].file);
        free(file->shards[i].names);
        free(file->shards[i].metadata);
        free(file->shards[i].path);
    }
    free(file->shards);
    free(file->entries);
    free(file->path);
    free(file);
}

const char *tensor_file_path(const struct tensor_file *file)
{
    return file->path;
}

int tensor_file_count(const struct tensor_file *file)
{
    return file->count;
}

struct tensor *tensor_file_at(struct tensor_file *file, int index)
{
    return index >= 0 && index < file->count ? &file->entries[index].tensor : NULL;
}

struct tensor *tensor_file_find(struct tensor_file *file, const char *name)
{
    struct entry *entry = NULL;
    if (file->count > 0) {
        entry = bsearch(name, file->entries, (size_t)file->count, sizeof *file->entries,
                        compare_key);
    }
    return entry != NULL ? &entry->tensor : NULL;
}

void tensor_file_forget(const struct tensor_file *file, const struct tensor *tensor)
{
    const struct entry *entry = (const struct entry *)(const void *)tensor;
    if (file->shards[entry->shard].file.mapped) os_forget(tensor->data, tensor->bytes);
}

int64_t tensor_file_mapped_bytes(const struct tensor_file *file)
{
    int64_t bytes = 0;
    for (int i = 0; i < file->n_shards; i++) {
        bytes += file->shards[i].file.mapped ? (int64_t)file->shards[i].file.bytes : 0;
    }
    return bytes;
}

const char *tensor_file_metadata(const struct tensor_file *file, const char *key)
{
    const struct shard *shard = file->n_shards > 0 ? file->shards : NULL;
    const char *at = shard != NULL ? shard->metadata : NULL;
    const char *end = at != NULL ? at + shard->metadata_bytes : NULL;
    while (at < end) {
        const char *value = at + strlen(at) + 1;
        if (strcmp(at, key) == 0) {
            return value;
        }
        at = value + strlen(value) + 1;
    }
    return NULL;
}

/* Whether any of n numbers of `bytes` each has all of these bits set: those of the exponent, and of
 * e4m3's fraction. */
static inline int any_not_finite(const void *data, size_t bytes, uint32_t exponent, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = 0;
        memcpy(&bits, (const char *)data + i * bytes, bytes);
        bad |= (bits & exponent) == exponent;
    }
    return bad != 0;
}

int tensor_is_finite(const struct tensor *tensor)
{
    const size_t n = (size_t)tensor->elements;
    return tensor->dtype == TENSOR_F32       ? !any_not_finite(tensor->data, 4, 0x7f800000u, n)
           : tensor->dtype == TENSOR_F16     ? !any_not_finite(tensor->data, 2, 0x7c00u, n)
           : tensor->dtype == TENSOR_F8_E4M3 ? !any_not_finite(tensor->data, 1, 0x7fu, n)
                                             : !any_not_finite(tensor->data, 2, 0x7f80u, n);
}

#define SAMPLE_BYTES 64

uint64_t tensor_file_fingerprint(const struct tensor_file *file, uint64_t hash)
{
    for (int i = 0; i < file->count; i++) {
        const struct tensor *tensor = &file->entries[i].tensor;
        size_t sample = tensor->bytes < SAMPLE_BYTES ? tensor->bytes : SAMPLE_BYTES;
        hash = hash_bytes(hash, tensor->name, strlen(tensor->name) + 1);
        hash = hash_bytes(hash, tensor_dtype_name(tensor->dtype),
                          strlen(tensor_dtype_name(tensor->dtype)) + 1);
        hash = hash_bytes(hash, tensor->dims, (size_t)tensor->n_dims * sizeof *tensor->dims);
        hash = hash_bytes(hash, (const uint8_t *)tensor->data + (tensor->bytes - sample) / 2,
                          sample);
    }
    return hash;
}

/* ---- writing a header -------------------------------------------------------------------- */

static void put(struct tensor_header *header, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void put(struct tensor_header *header, const char *format, ...)
{
    for (int again = 0; again < 2 && header->status == MOSHI_OK; again++) {
        size_t room = header->capacity - header->bytes;
        va_list arguments;
        va_start(arguments, format);
        int length = vsnprintf(room > 0 ? header->text + header->bytes : NULL, room, format,
                               arguments);
        va_end(arguments);
        if (length >= 0 && (size_t)length < room) {
            header->bytes += (size_t)length;
            return;
        }
        size_t capacity = 2 * header->capacity + (size_t)(length > 0 ? length : 0) + 256;
        char *text = realloc(header->text, capacity);
        if (text == NULL) {
            header->status = moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a table of tensors");
            return;
        }
        header->text = text;
        header->capacity = capacity;
    }
}

/* The length of the header stands in front of it and is filled in at the end. */
static void begin(struct tensor_header *header, const char *separator)
{
    put(header, "%s", header->bytes > 0 ? separator : "        {");
}

static void put_string(struct tensor_header *header, const char *text)
{
    put(header, "\"");
    for (const char *at = text; *at != '\0'; at++) {
        if (*at == '"' || *at == '\\') {
            put(header, "\\%c", *at);
        } else if ((unsigned char)*at < 0x20) {
            put(header, "\\u%04x", (unsigned)*at);
        } else {
            put(header, "%c", *at);
        }
    }
    put(header, "\"");
}

void tensor_header_fact(struct tensor_header *header, const char *key, const char *value)
{
    begin(header, ",");
    if (header->facts++ == 0) {
        put(header, "\"__metadata__\":{");
    }
    put_string(header, key);
    put(header, ":");
    put_string(header, value);
}

static void end_facts(struct tensor_header *header)
{
    if (header->facts > 0) {
        put(header, "}");
        header->facts = 0;
    }
}

void tensor_header_add(struct tensor_header *header, const char *name, enum tensor_dtype dtype,
                       int n_dims, const int64_t *dims)
{
    size_t bytes = dtypes[dtype].bytes, at = header->data_bytes;
    char shape[256];
    end_facts(header);
    begin(header, ",");
    for (int i = 0; i < n_dims; i++) {
        bytes *= (size_t)dims[i];
    }
    put_string(header, name);
    put(header, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", dtypes[dtype].name,
        tensor_shape_text(dims, n_dims, shape, sizeof shape), at, at + bytes);
    header->data_bytes = at + bytes;
}

int tensor_header_end(struct tensor_header *header, size_t alignment)
{
    end_facts(header);
    begin(header, "");
    put(header, "}");
    while (header->status == MOSHI_OK && header->bytes % alignment != 0) {
        put(header, " ");
    }
    for (int i = 0; i < 8 && header->status == MOSHI_OK; i++) {
        header->text[i] = (char)((uint64_t)(header->bytes - 8) >> 8 * i);
    }
    return header->status;
}
