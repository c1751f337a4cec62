/* weights.h: from named tensors of a file to the matrices and vectors a model reads.
 *
 * A weight_loader remembers the first failure, so that a model binds its tensors as a plain list
 * and asks once at the end. Every tensor's dtype and shape is checked against the config; what the
 * file holds beyond the model is an error too, as it is upstream. Matrices stay in the file map
 * where the backend can read them so.
 *
 * F8_E4M3 tensors are fp8 matrices. The scales of their rows stand beside them as published files have
 * them, in a tensor named with _scale or _scale_inv: [rows], [rows,1], or one number for all. Without,
 * the numbers are the weights. Tables, small matrices and vectors are widened.
 *
 * A file may hold the panels of a block format instead of a matrix's rows: a U8 tensor of the same
 * name, [sets][panels][bytes of a panel] as quant.h has them, in a file whose metadata names the
 * format (METADATA_FORMAT: "int8", "q8" or "q4") and the layout (METADATA_LAYOUT). Panels are read
 * where they lie when they begin at a multiple of PANEL_ALIGNMENT. */
#ifndef MOSHI_WEIGHTS_H
#define MOSHI_WEIGHTS_H

#include "backend.h"
#include "safetensors.h"

#define METADATA_FORMAT "moshi_c.format"
#define METADATA_LAYOUT "moshi_c.layout"
#define PANEL_LAYOUT "1" /* of quant.h; another number when it changes */
#define PANEL_ALIGNMENT 64

/* Memory and prepared matrices that a model owns through its backend. */
struct weight_store {
    struct backend *backend;
    struct weight_block {
        void *memory;
        size_t bytes;
    } *blocks;
    struct matrix *matrices; /* prepared ones, to be released */
    int n_blocks, n_matrices, block_capacity, matrix_capacity;
    int64_t parameters;    /* elements of all tensors bound */
    int64_t matrix_bytes;  /* of all matrices, in the format they are read in */
    int64_t mapped_bytes;  /* of these, what is read from the file's own bytes */
    int64_t private_bytes; /* of blocks */
};

void weight_store_init(struct weight_store *store, struct backend *backend);
void weight_store_release(struct weight_store *store);
/* Zeroed device memory owned by the store; NULL after recording a failure. */
void *weight_store_allocate(struct weight_store *store, size_t bytes);

/* What the tensors of a file become in another format. */
struct weight_plan {
    struct weight_change {
        struct tensor *tensor;
        struct tensor *scales;    /* of an I8 or F8_E4M3 tensor, which go with it; else NULL */
        enum weight_format format;
        int sets, rows, cols;     /* of the matrices of a block format or fp8 */
    } *changes;
    int count, capacity;
};

/* Tensors that may have been found and are read only now. */
#define LOADER_RECENT 8

struct weight_loader {
    struct weight_store *store;
    struct tensor_file *file;
    enum moshi_dtype dtype; /* of matrices; MOSHI_AUTO: as stored */
    int pack;               /* matrices get the backend's own layout */
    int check_finite;       /* a weight that is not finite is a failure */
    /* Format of the matrices that are read once for a few rows, when it is narrower than f32: bf16,
     * or int8 with f32 activations; the codec's. */
    enum weight_format lean;
    int copies; /* nothing stays in the map: a tensor's pages go when the next ones come */
    const struct tensor *recent[LOADER_RECENT];
    int found;
    struct weight_plan *plan; /* not NULL: it is filled, and no matrix or vector is made */
    int status; /* the first failure */
};

/* Bytes of a tensor as a change leaves it; those of fp8 begin with the scales, f32 [rows]. */
size_t weight_change_bytes(const struct weight_change *change);
/* Writes them. The loader's dtype is the new one; its store lends the backend and keeps nothing. */
int weight_change_make(const struct weight_loader *loader, const struct weight_change *change,
                       void *to);

/* The tensor of that name, or NULL. Marks it used. */
struct tensor *weights_find(struct weight_loader *loader, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* The same, but a missing one is a failure. */
struct tensor *weights_need(struct weight_loader *loader, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* A [rows][cols] matrix from a tensor of that shape (trailing dimensions of 1 are allowed), in the
 * loader's dtype. An I8 tensor has 127 times the scales of its rows beside it, named with _scb. */
void weights_matrix(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                    struct matrix *matrix);
/* `sets` such matrices from one tensor [sets * rows][cols]. */
void weights_matrices(struct weight_loader *loader, struct tensor *tensor, int sets, int rows,
                      int cols, struct matrix *matrices);
/* A matrix for which block formats save nothing: as stored when the dtype is one, never lean. */
void weights_small_matrix(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                          struct matrix *matrix);
/* Rows of a table that are only ever looked up: never packed, never a block format. */
void weights_table(struct weight_loader *loader, struct tensor *tensor, int rows, int cols,
                   struct matrix *matrix);
/* `count` elements of any shape as f32; for the scales of fp8 they are one row. */
const float *weights_vector(struct weight_loader *loader, struct tensor *tensor, int64_t count);
/* All elements as f32 on the host, in `rows` rows; from malloc. NULL after a failure. */
float *weights_host(struct weight_loader *loader, const struct tensor *tensor, int64_t rows);
/* A matrix of f32 values that the caller computed; takes over `values`, from malloc. `format`: f32,
 * or what `lean` may be. */
void weights_matrix_from(struct weight_loader *loader, float *values, int rows, int cols,
                         enum weight_format format, struct matrix *matrix);
/* Element i of a float tensor. */
float tensor_element(const struct tensor *tensor, int64_t i);
/* MOSHI_OK, or the failure; a dtype or shape other than expected is one, and so is, with
 * check_finite, a value that is not a number. */
int weights_check(struct weight_loader *loader, const struct tensor *tensor, int n_dims,
                  const int64_t *dims);
/* Fails if a tensor of the file was not used. */
void weights_finish(struct weight_loader *loader);

#endif
