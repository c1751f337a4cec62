/* json.c: RFC 8259 JSON into a tree that lives in one allocation.
 *
 * Owns the document. Refuses everything the format refuses, and also: nesting beyond
 * JSON_MAX_DEPTH, more than MAX_VALUES values, numbers that overflow a double, lone surrogates,
 * "\u0000", and a key that stands twice in one object (found by sorting, so that a huge object
 * costs n log n).
 *
 * A value is the document itself, the first of an array or object, or behind a comma, so commas
 * and opening brackets bound the number of nodes before anything is allocated. Decoded strings
 * with their NUL are never longer than their quoted form, so the text's size bounds them all. */
#include "json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "status.h"

/* 256 MiB of nodes: without it, a file of "[1,1,1..." would cost 32 times its size. The largest
 * published checkpoints have a hundredth of this. */
#define MAX_VALUES (1 << 22)

struct node {
    struct json json; /* first: a struct json * of ours is a struct node * */
    struct node *sorted;
};

struct json_document {
    struct node root; /* behind it stand the other nodes, behind those the strings */
};

struct parser {
    const char *text;
    size_t bytes, at;
    const char *what;
    struct node *next_node;
    char *next_string;
};

/* `name`, when not empty, is shown in quotes behind the text. */
static int fail(const struct parser *p, size_t at, const char *text, const char *name)
{
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at && i < p->bytes; i++) {
        column++;
        if (p->text[i] == '\n') {
            line++;
            column = 1;
        }
    }
    return moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: JSON line %zu, column %zu: %s%s%.100s%s",
                      p->what, line, column, text, name[0] ? " '" : "", name, name[0] ? "'" : "");
}

/* The byte at the cursor, -1 at the end. */
static int peek(const struct parser *p)
{
    return p->at < p->bytes ? (unsigned char)p->text[p->at] : -1;
}

static void skip_space(struct parser *p)
{
    int c;
    while ((c = peek(p)) == ' ' || c == '\t' || c == '\n' || c == '\r') {
        p->at++;
    }
}

static int is_digit(int c)
{
    return c >= '0' && c <= '9';
}

/* Four hex digits at the cursor, or -1. */
static int32_t read_hex4(struct parser *p)
{
    int32_t value = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        int c = peek(p);
        int digit = is_digit(c)            ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) {
            return -1;
        }
        value = value * 16 + digit;
    }
    return value;
}

static char *put_utf8(char *out, uint32_t code)
{
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xC0 | code >> 6);
        *out++ = (char)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        *out++ = (char)(0xE0 | code >> 12);
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
        *out++ = (char)(0x80 | (code & 0x3F));
    } else {
        *out++ = (char)(0xF0 | code >> 18);
        *out++ = (char)(0x80 | (code >> 12 & 0x3F));
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
        *out++ = (char)(0x80 | (code & 0x3F));
    }
    return out;
}

/* The cursor stands behind "\u". */
static int parse_unicode(struct parser *p, char **out)
{
    size_t start = p->at - 2;
    int32_t high = read_hex4(p);
    if (high < 0) {
        return fail(p, start, "\\u needs four hexadecimal digits", "");
    }
    if (high == 0) {
        return fail(p, start, "\\u0000 is not allowed in a string", "");
    }
    if (high >= 0xD800 && high < 0xE000) {
        int32_t low = -1;
        if (high < 0xDC00 && p->bytes - p->at >= 2 && p->text[p->at] == '\\' &&
            p->text[p->at + 1] == 'u') {
            p->at += 2;
            low = read_hex4(p);
        }
        if (low < 0xDC00 || low >= 0xE000) {
            return fail(p, start, "half of a surrogate pair, expected both", "");
        }
        high = 0x10000 + (high - 0xD800) * 0x400 + (low - 0xDC00);
    }
    *out = put_utf8(*out, (uint32_t)high);
    return MOSHI_OK;
}

/* The cursor stands behind the backslash. */
static int parse_escape(struct parser *p, char **out)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    int c = peek(p);
    p->at++;
    if (c == 'u') {
        return parse_unicode(p, out);
    }
    const char *found = c > 0 ? strchr(names, c) : NULL;
    if (found == NULL) {
        return fail(p, p->at - 1, "unknown escape in a string", "");
    }
    *(*out)++ = values[found - names];
    return MOSHI_OK;
}

/* The cursor stands on the opening quote. */
static int parse_string(struct parser *p, const char **string)
{
    size_t start = p->at++;
    char *out = p->next_string;
    *string = out;
    for (;;) {
        int c = peek(p);
        if (c < 0) {
            return fail(p, start, "the string that starts here never ends", "");
        }
        if (c < 0x20) {
            return fail(p, p->at, "control character in a string, expected an escape", "");
        }
        if (c == '"') {
            p->at++;
            break;
        }
        if (c == '\\') {
            p->at++;
            int status = parse_escape(p, &out);
            if (status != MOSHI_OK) {
                return status;
            }
            continue;
        }
        size_t n = moshi_utf8_bytes(p->text + p->at, p->bytes - p->at);
        if (n == 0) {
            return fail(p, p->at, "a byte that is not valid UTF-8", "");
        }
        memcpy(out, p->text + p->at, n);
        out += n;
        p->at += n;
    }
    *out++ = '\0';
    p->next_string = out;
    return MOSHI_OK;
}

#define MAX_DIGITS 40

/* Digits and exponent are handed to strtod without a decimal point, so the host program's locale
 * can't change their meaning. Digits beyond MAX_DIGITS only move the exponent: they lie far below
 * the last place of a double. */
static int parse_number(struct parser *p, double *number)
{
    char digits[MAX_DIGITS + 32];
    int n = 0;
    int64_t exponent = 0, written = 0;
    size_t start = p->at;
    if (peek(p) == '-') {
        digits[n++] = '-';
        p->at++;
    }
    int first = n;
    size_t integer = p->at;
    while (is_digit(peek(p))) {
        int c = peek(p);
        if (n - first < MAX_DIGITS && (n > first || c != '0')) {
            digits[n++] = (char)c;
        } else if (n > first) {
            exponent++;
        }
        p->at++;
    }
    if (p->at == integer) {
        return fail(p, start, "a number needs a digit here", "");
    }
    if (p->text[integer] == '0' && p->at - integer > 1) {
        return fail(p, start, "a number may not start with 0", "");
    }
    if (peek(p) == '.') {
        size_t point = p->at++;
        while (is_digit(peek(p))) {
            int c = peek(p);
            if (n - first < MAX_DIGITS) {
                if (n > first || c != '0') {
                    digits[n++] = (char)c;
                }
                exponent--;
            }
            p->at++;
        }
        if (p->at == point + 1) {
            return fail(p, point, "a decimal point needs a digit behind it", "");
        }
    }
    if (peek(p) == 'e' || peek(p) == 'E') {
        size_t mark = p->at++;
        int negative = peek(p) == '-';
        if (peek(p) == '-' || peek(p) == '+') {
            p->at++;
        }
        size_t power = p->at;
        while (is_digit(peek(p))) {
            if (written < 1000000000000) {
                written = written * 10 + (peek(p) - '0');
            }
            p->at++;
        }
        if (p->at == power) {
            return fail(p, mark, "an exponent needs a digit", "");
        }
        exponent += negative ? -written : written;
    }
    if (n == first) {
        *number = first ? -0.0 : 0.0;
        return MOSHI_OK;
    }
    exponent = exponent > 100000 ? 100000 : exponent < -100000 ? -100000 : exponent;
    (void)snprintf(digits + n, sizeof digits - (size_t)n, "e%d", (int)exponent);
    *number = strtod(digits, NULL);
    if (!isfinite(*number)) {
        return fail(p, start, "a number too large for a double", "");
    }
    return MOSHI_OK;
}

static struct node *merge(struct node *a, struct node *b)
{
    struct node *head = NULL, **tail = &head;
    while (a != NULL && b != NULL) {
        struct node **least = strcmp(b->json.key, a->json.key) < 0 ? &b : &a;
        *tail = *least;
        tail = &(*least)->sorted;
        *least = (*least)->sorted;
    }
    *tail = a != NULL ? a : b;
    return head;
}

static int check_keys(const struct parser *p, struct json *object)
{
    /* runs[i] is a sorted run of 2^i keys or NULL, like the bits of a counter. */
    struct node *runs[64] = {0};
    for (struct json *child = object->first; child != NULL; child = child->next) {
        struct node *carry = (struct node *)child;
        int i = 0;
        carry->sorted = NULL;
        for (; runs[i] != NULL; i++) {
            carry = merge(runs[i], carry);
            runs[i] = NULL;
        }
        runs[i] = carry;
    }
    struct node *all = NULL;
    for (int i = 0; i < 64; i++) {
        all = merge(runs[i], all);
    }
    for (; all != NULL && all->sorted != NULL; all = all->sorted) {
        if (strcmp(all->json.key, all->sorted->json.key) == 0) {
            return fail(p, p->at, "the object that ends here has twice the key", all->json.key);
        }
    }
    return MOSHI_OK;
}

static int parse_value(struct parser *p, int depth, struct json *value);

/* The cursor stands behind the opening bracket. */
static int parse_children(struct parser *p, int depth, struct json *parent)
{
    int is_object = parent->type == JSON_OBJECT;
    int closing = is_object ? '}' : ']';
    struct json **link = &parent->first;
    if (depth >= JSON_MAX_DEPTH) {
        return fail(p, p->at - 1, "nested too deeply, expected at most 64 levels", "");
    }
    skip_space(p);
    if (peek(p) == closing) {
        p->at++;
        return MOSHI_OK;
    }
    for (;;) {
        struct json *child = &p->next_node++->json;
        int status = MOSHI_OK;
        *child = (struct json){0};
        if (is_object) {
            skip_space(p);
            if (peek(p) != '"') {
                return fail(p, p->at, "expected a key in quotes", "");
            }
            status = parse_string(p, &child->key);
            if (status == MOSHI_OK) {
                skip_space(p);
                if (peek(p) != ':') {
                    return fail(p, p->at, "expected ':' behind the key", child->key);
                }
                p->at++;
            }
        }
        if (status == MOSHI_OK) {
            status = parse_value(p, depth + 1, child);
        }
        if (status != MOSHI_OK) {
            return status;
        }
        *link = child;
        link = &child->next;
        parent->count++;
        skip_space(p);
        int c = peek(p);
        if (c != ',' && c != closing) {
            return fail(p, p->at, is_object ? "expected ',' or '}'" : "expected ',' or ']'", "");
        }
        p->at++;
        if (c == closing) {
            return is_object ? check_keys(p, parent) : MOSHI_OK;
        }
    }
}

static int parse_word(struct parser *p, const char *word)
{
    size_t n = strlen(word);
    if (p->bytes - p->at < n || memcmp(p->text + p->at, word, n) != 0) {
        return fail(p, p->at, "expected a value", "");
    }
    p->at += n;
    return MOSHI_OK;
}

static int parse_value(struct parser *p, int depth, struct json *value)
{
    skip_space(p);
    int c = peek(p);
    switch (c) {
    case '{':
    case '[':
        p->at++;
        value->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        return parse_children(p, depth, value);
    case '"':
        value->type = JSON_STRING;
        return parse_string(p, &value->string);
    case 't':
    case 'f':
        value->type = JSON_BOOL;
        value->boolean = c == 't';
        return parse_word(p, c == 't' ? "true" : "false");
    case 'n':
        value->type = JSON_NULL;
        return parse_word(p, "null");
    default:
        if (c == '-' || is_digit(c)) {
            value->type = JSON_NUMBER;
            return parse_number(p, &value->number);
        }
        return fail(p, p->at, c < 0 ? "the text ends, expected a value" : "expected a value", "");
    }
}

int json_parse(const char *text, size_t bytes, const char *what, struct json_document **document)
{
    *document = NULL;
    struct parser p = {.text = text, .bytes = bytes, .what = what};
    size_t count = 1, size;
    for (size_t i = 0; i < bytes; i++) {
        count += text[i] == ',' || text[i] == '[' || text[i] == '{';
    }
    struct json_document *made = NULL;
    if (count > MAX_VALUES) {
        return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                          "%s: JSON with up to %zu values, expected at most %d", what, count,
                          MAX_VALUES);
    }
    if (!__builtin_add_overflow(count * sizeof(struct node), bytes, &size)) {
        made = malloc(size);
    }
    if (made == NULL) {
        return moshi_fail(MOSHI_ERROR_MEMORY, "%s: no memory for %zu bytes of JSON", what, bytes);
    }
    p.next_node = &made->root + 1;
    p.next_string = (char *)(&made->root + count);
    made->root.json = (struct json){0};
    int status = parse_value(&p, 0, &made->root.json);
    if (status == MOSHI_OK) {
        skip_space(&p);
        if (p.at < bytes) {
            status = fail(&p, p.at, "expected nothing behind the value", "");
        }
    }
    if (status != MOSHI_OK) {
        free(made);
        return status;
    }
    *document = made;
    return MOSHI_OK;
}

void json_free(struct json_document *document)
{
    free(document);
}

const struct json *json_root(const struct json_document *document)
{
    return &document->root.json;
}

const struct json *json_get(const struct json *object, const char *key)
{
    if (object == NULL || object->type != JSON_OBJECT) {
        return NULL;
    }
    for (const struct json *child = object->first; child != NULL; child = child->next) {
        if (strcmp(child->key, key) == 0) {
            return child;
        }
    }
    return NULL;
}

int json_integer(const struct json *node, int64_t *value)
{
    if (node == NULL || node->type != JSON_NUMBER || fabs(node->number) > 9007199254740992.0 ||
        node->number != floor(node->number)) {
        return 0;
    }
    *value = (int64_t)node->number;
    return 1;
}
