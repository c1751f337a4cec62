/* fuzz_json.c: the JSON reader. What it accepts keeps its promises, and written out again is read
 * back as the same tree. */
#include <math.h>

#include "fuzz.h"
#include "json.h"

struct text {
    char *bytes;
    size_t length, capacity;
};

static void put(struct text *text, const char *piece, size_t bytes)
{
    if (text->length + bytes > text->capacity) {
        text->capacity = 2 * (text->length + bytes);
        text->bytes = realloc(text->bytes, text->capacity);
        PROMISE(text->bytes != NULL);
    }
    memcpy(text->bytes + text->length, piece, bytes);
    text->length += bytes;
}

static void put_string(struct text *text, const char *string)
{
    size_t bytes = strlen(string);
    put(text, "\"", 1);
    for (size_t at = 0, n; at < bytes; at += n) {
        char escaped[8];
        unsigned char c = (unsigned char)string[at];
        n = moshi_utf8_bytes(string + at, bytes - at);
        PROMISE(n > 0);
        if (c < 0x20 || c == '"' || c == '\\')
            put(text, escaped, (size_t)snprintf(escaped, sizeof escaped, "\\u%04x", c));
        else
            put(text, string + at, n);
    }
    put(text, "\"", 1);
}

static void put_value(struct text *text, const struct json *value, int depth)
{
    char number[40];
    int count = 0;
    PROMISE(depth <= JSON_MAX_DEPTH);
    switch (value->type) {
    case JSON_NULL:
        put(text, "null", 4);
        break;
    case JSON_BOOL:
        put(text, value->boolean ? "true" : "false", value->boolean ? 4 : 5);
        break;
    case JSON_NUMBER:
        PROMISE(isfinite(value->number));
        put(text, number, (size_t)snprintf(number, sizeof number, "%.17g", value->number));
        break;
    case JSON_STRING:
        put_string(text, value->string);
        break;
    case JSON_ARRAY:
    case JSON_OBJECT:
        put(text, value->type == JSON_OBJECT ? "{" : "[", 1);
        for (const struct json *child = value->first; child; child = child->next) {
            if (count++) put(text, ",", 1);
            if (value->type == JSON_OBJECT) {
                PROMISE(json_get(value, child->key) == child); /* the key stands there once */
                put_string(text, child->key);
                put(text, ":", 1);
            } else {
                PROMISE(child->key == NULL);
            }
            put_value(text, child, depth + 1);
        }
        PROMISE(count == value->count);
        put(text, value->type == JSON_OBJECT ? "}" : "]", 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct json_document *document, *again;
    int status = json_parse((const char *)data, bytes, "input", &document);
    promise_answer(status);
    PROMISE((status == MOSHI_OK) == (document != NULL));
    if (status) return 0;
    struct text first = {0}, second = {0};
    put_value(&first, json_root(document), 0);
    PROMISE(json_parse(first.bytes, first.length, "output", &again) == MOSHI_OK);
    put_value(&second, json_root(again), 0);
    PROMISE(first.length == second.length && memcmp(first.bytes, second.bytes, first.length) == 0);
    free(first.bytes);
    free(second.bytes);
    json_free(document);
    json_free(again);
    return 0;
}
