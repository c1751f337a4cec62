/* json.h: a small JSON reader for configs and safetensors headers. Input is hostile: nesting is
 * limited to JSON_MAX_DEPTH, numbers must be finite, strings valid UTF-8, keys unique within an
 * object, nothing may follow the value. One allocation proportional to the input. */
#ifndef MOSHI_JSON_H
#define MOSHI_JSON_H

#include <stddef.h>
#include <stdint.h>

#define JSON_MAX_DEPTH 64

enum json_type { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

/* A node. Children of an array or object form a list by `next`; `key` is set inside objects. */
struct json {
    enum json_type type;
    const char *key;    /* NUL-terminated, decoded; NULL outside objects */
    const char *string; /* NUL-terminated, decoded; "\u0000" is refused */
    double number;
    int boolean;
    int count; /* children */
    struct json *first, *next;
};

struct json_document;

/* `what` names the source in messages. MOSHI_ERROR_CHECKPOINT with line and column otherwise. */
int json_parse(const char *text, size_t bytes, const char *what, struct json_document **document);
void json_free(struct json_document *document);
const struct json *json_root(const struct json_document *document);

/* NULL when `object` is not an object or has no such key. */
const struct json *json_get(const struct json *object, const char *key);
/* 1 and *value when `node` is a number that is an integer of at most 2^53 in size. */
int json_integer(const struct json *node, int64_t *value);

#endif
