/* snapshot.h: state as the bytes of a safetensors file. The owner of a state lists its items (host
 * memory, a lane's fields, a lane's keys and values); the same list writes them and reads them back,
 * where every dtype and shape must be the one the open model has. Facts about the model go into the
 * header's "__metadata__".
 *
 * What is read comes from strangers: whoever reads must check the values too. */
#ifndef MOSHI_SNAPSHOT_H
#define MOSHI_SNAPSHOT_H

#include "safetensors.h"
#include "state.h"

#define SNAPSHOT_VERSION "1"
#define SNAPSHOT_MAX_FACTS 12
#define MAX_FRAMES (INT32_MAX / 8) /* years; positions of the codec stay within 32 bits */

struct snapshot_item;

struct snapshot {
    struct snapshot_item *items;
    int n_items, capacity;
    int status; /* the first failure */
    struct {
        const char *key;
        char value[72];
    } facts[SNAPSHOT_MAX_FACTS];
    int n_facts;
};

/* A list that begins with the facts "format" (such as "moshi-c session") and "version". */
void snapshot_init(struct snapshot *snapshot, const char *format);
void snapshot_free(struct snapshot *snapshot);
void snapshot_fact(struct snapshot *snapshot, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Lists `count` elements at `memory` on the host. */
void snapshot_host(struct snapshot *snapshot, const char *name, enum tensor_dtype dtype,
                   int64_t count, void *memory);
/* Lists every field of a lane, named field + suffix. */
void snapshot_lane(struct snapshot *snapshot, const struct state_table *table, int lane,
                   const char *suffix);
/* Lists what a lane that has stepped `offset` positions can still see. */
void snapshot_pages(struct snapshot *snapshot, struct kv_pages *kv, int lane, int64_t offset,
                    const char *name, const char *suffix);

/* Gives the lane pages for them, before they are read back. */
int snapshot_make_room(struct kv_pages *kv, int lane, int64_t offset);

/* With data == NULL sets *bytes to the size; else writes into *bytes of room. */
int snapshot_write(const struct snapshot *snapshot, void *data, size_t *bytes);
/* MOSHI_ERROR_CHECKPOINT unless every fact of the list is in the file. */
int snapshot_check_facts(const struct snapshot *snapshot, const struct tensor_file *file);
/* Reads all items. The pages of lanes must be there. */
int snapshot_read(const struct snapshot *snapshot, struct tensor_file *file);
/* Fails if a tensor of the file was not read. */
int snapshot_finish(struct tensor_file *file);

/* A tensor of one dimension that is read before the items are listed, since sizes hang on it. */
int snapshot_find(struct tensor_file *file, const char *name, enum tensor_dtype dtype,
                  const struct tensor **tensor);
/* The only element of an I64 tensor, which must lie in 0 .. limit. */
int snapshot_count(struct tensor_file *file, int64_t limit, int64_t *value, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#endif
