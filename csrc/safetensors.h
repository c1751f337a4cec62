/* safetensors.h: reads one safetensors file, or a set of shards through its index.json.
 *
 * Everything in a header is checked before use: header length against the file, dtype, shape
 * product without overflow, offsets inside the data, byte count equal to shape x dtype, no overlap
 * and no hole, unique names. Data stays in the file map. The formats are described in the
 * safetensors project's README ("Format"). */
#ifndef MOSHI_SAFETENSORS_H
#define MOSHI_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#define SAFETENSORS_MAX_DIMS 8

enum tensor_dtype {
    TENSOR_F64,
    TENSOR_F32,
    TENSOR_F16,
    TENSOR_BF16,
    TENSOR_F8_E4M3,
    TENSOR_F8_E5M2,
    TENSOR_I64,
    TENSOR_I32,
    TENSOR_I16,
    TENSOR_I8,
    TENSOR_U64,
    TENSOR_U32,
    TENSOR_U16,
    TENSOR_U8,
    TENSOR_BOOL
};

struct tensor {
    const char *name;
    enum tensor_dtype dtype;
    int n_dims;
    int64_t dims[SAFETENSORS_MAX_DIMS];
    int64_t elements;
    const void *data; /* inside the map; maybe not aligned to the element size */
    size_t bytes;
    int used; /* set by callers that want to know what was left over */
};

struct tensor_file;

/* path: a .safetensors file, or an index (a name ending in .json: {"weight_map": {name: shard}},
 * shards beside it, no folders in their names). MOSHI_ERROR_CHECKPOINT names the file and tensor. */
int tensor_file_open(const char *path, int copy, struct tensor_file **file);
/* The same for the bytes of a .safetensors file in memory, which must outlive the result. `name`
 * stands for the path in messages. */
int tensor_file_parse(const void *data, size_t bytes, const char *name, struct tensor_file **file);
void tensor_file_close(struct tensor_file *file);
const char *tensor_file_path(const struct tensor_file *file);
int tensor_file_count(const struct tensor_file *file);
struct tensor *tensor_file_at(struct tensor_file *file, int index);
/* By binary search; NULL if there is none. */
struct tensor *tensor_file_find(struct tensor_file *file, const char *name);
/* Lets the pages of a mapped tensor go; they come back when they are read. */
void tensor_file_forget(const struct tensor_file *file, const struct tensor *tensor);
int64_t tensor_file_mapped_bytes(const struct tensor_file *file);
/* An entry of the header's "__metadata__" (of the first shard), or NULL. */
const char *tensor_file_metadata(const struct tensor_file *file, const char *key);
/* Tells files apart without reading them whole: a hash of every tensor's name, dtype and shape and of
 * a few bytes in its middle, continuing from `hash`. */
uint64_t tensor_file_fingerprint(const struct tensor_file *file, uint64_t hash);
/* Whether no number of an F32, F16, BF16 or F8_E4M3 tensor is NaN or infinity. */
int tensor_is_finite(const struct tensor *tensor);

/* The bytes of a file before its data. Zero-initialise, add facts for the metadata, then the tensors
 * in the order of their data, and end; `text` is the caller's to free whatever became of it. */
struct tensor_header {
    char *text;
    size_t bytes, capacity;
    size_t data_bytes; /* of the tensors so far */
    int facts, status;
};

void tensor_header_fact(struct tensor_header *header, const char *key, const char *value);
void tensor_header_add(struct tensor_header *header, const char *name, enum tensor_dtype dtype,
                       int n_dims, const int64_t *dims);
/* The data shall begin at a multiple of `alignment` bytes. */
int tensor_header_end(struct tensor_header *header, size_t alignment);

const char *tensor_dtype_name(enum tensor_dtype dtype); /* "F32", as in the file */
size_t tensor_dtype_bytes(enum tensor_dtype dtype);
/* "[2048,512]" into text[capacity]. Returns text. */
char *tensor_shape_text(const int64_t *dims, int n_dims, char *text, size_t capacity);

#endif
