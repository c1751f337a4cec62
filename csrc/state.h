/* state.h: the history of conversations, as tables of fields.
 *
 * A state_table has `lanes` equal lanes and a list of fields (name, type, elements per lane, reset
 * value). That list drives allocation, the reset of a lane, and the memory report; saving and
 * copying walk it too. Keys and values grow with a call and therefore live in pages (kv_pages),
 * which lanes may share. All field memory is device memory, reserved at once and committed by use. */
#ifndef MOSHI_STATE_H
#define MOSHI_STATE_H

#include "backend.h"

#define STATE_MAX_FIELDS 96

enum field_type { FIELD_F32, FIELD_I32, FIELD_U8 };

struct state_field {
    char name[64];
    enum field_type type;
    size_t elements; /* per lane */
    int32_t reset;   /* value of every element after a reset */
    void *data;      /* [lanes][elements] */
};

struct state_table {
    struct backend *backend;
    int lanes, n_fields;
    struct state_field fields[STATE_MAX_FIELDS];
};

void state_init(struct state_table *table, struct backend *backend, int lanes);
/* Adds a field, allocates it, resets every lane of it, and gives its address; NULL on failure. */
void *state_add(struct state_table *table, enum field_type type, size_t elements, int32_t reset,
                const char *name, ...) __attribute__((format(printf, 5, 6)));
void state_reset_lane(struct state_table *table, int lane);
void state_copy_lane(struct state_table *table, int from, int to);
size_t state_field_bytes(const struct state_field *field); /* of one lane */
void state_release(struct state_table *table);
size_t state_table_bytes(const struct state_table *table); /* of all lanes */

#define KV_PAGE_POSITIONS 64

/* Pages of keys and values of one transformer stack. A page holds KV_PAGE_POSITIONS positions of
 * all layers; `references` counts the lanes that read it. A lane that is about to write to a page
 * which others read too gets a copy of it first. */
struct kv_pages {
    struct backend *backend;
    struct kv_cache cache; /* what operations see */
    int lanes, n_pages, n_free;
    int positions;       /* that a lane may still look back at */
    int32_t *host_table; /* [lanes][pages_per_lane], -1: no page yet */
    int32_t *references; /* [n_pages] */
    int32_t *free_pages; /* stack */
    uint8_t *committed;  /* [n_pages] there is memory behind it */
    void **given;        /* [n_pages] scratch of kv_pages_release */
    size_t bytes;
    int32_t *device_table;
};

/* ring_positions: history each lane keeps, rounded up to pages. */
int kv_pages_create(struct kv_pages *kv, struct backend *backend, int lanes, int ring_positions,
                    const struct transformer_config *config, enum moshi_dtype dtype);
void kv_pages_destroy(struct kv_pages *kv);
/* Gives `lane` pages of its own for positions first .. first+steps-1. */
int kv_pages_grow(struct kv_pages *kv, int lane, int64_t first, int steps);
/* Lane `to` forgets its history and reads that of `from`; no page is copied. */
void kv_pages_share(struct kv_pages *kv, int from, int to);
enum kv_part { KV_VALUES, KV_SCALES /* of MOSHI_INT8 */ };

/* Places of the device that come to the host together; begin with zeros and the backend. */
struct state_fetch {
    struct backend *backend;
    int count, status; /* status: the first failure */
    struct device_piece pieces[256];
};
void state_fetch_add(struct state_fetch *fetch, const void *device, void *host, size_t bytes);
/* All of them have come, or a status. */
int state_fetch_end(struct state_fetch *fetch);

/* Positions first .. first+count-1 of a lane, which it has pages for, to or from the host:
 * [layers][2][kv_heads][count][head_dim]; the scales without the last. */
void kv_pages_read(const struct kv_pages *kv, enum kv_part part, int lane, int64_t first, int count,
                   void *values, struct state_fetch *fetch);
void kv_pages_write(struct kv_pages *kv, enum kv_part part, int lane, int64_t first, int count,
                    const void *values);
/* Forgets a lane's history. kv_pages_release gives the memory back to the system too, with that of
 * all other pages that no lane reads. */
void kv_pages_reset(struct kv_pages *kv, int lane);
void kv_pages_release(struct kv_pages *kv, int lane);
/* Device memory besides the pages, which is taken at once; and that of one lane's pages when its
 * history is full. */
size_t kv_pages_fixed_bytes(const struct kv_pages *kv);
size_t kv_pages_lane_bytes(const struct kv_pages *kv);
/* Pages in use; may be asked while another thread grows them. */
int kv_pages_used(const struct kv_pages *kv);

#endif
