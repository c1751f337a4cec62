/* status.c: owns the error sentence of each thread, the version and the names of the formats.
 *
 * A sentence is always one line of valid UTF-8: file names and tensor names come from outside, so
 * control characters and invalid bytes become '?'. One that is too long loses its middle, because
 * the file stands at its start and what was expected at its end. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#ifndef MOSHI_VERSION
#define MOSHI_VERSION "0.1.0"
#endif

#define SENTENCE_BYTES 512
#define DRAFT_BYTES 6144 /* a path of 4096 bytes and the words around it */

static _Thread_local char sentence[SENTENCE_BYTES];

size_t moshi_utf8_bytes(const char *text, size_t bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t length;
    uint32_t code, lowest;
    if (bytes == 0) {
        return 0;
    }
    if (s[0] < 0x80) {
        return 1;
    } else if (s[0] >= 0xC2 && s[0] < 0xE0) {
        length = 2, code = s[0] & 0x1Fu, lowest = 0x80;
    } else if (s[0] >= 0xE0 && s[0] < 0xF0) {
        length = 3, code = s[0] & 0x0Fu, lowest = 0x800;
    } else if (s[0] >= 0xF0 && s[0] < 0xF5) {
        length = 4, code = s[0] & 0x07u, lowest = 0x10000;
    } else {
        return 0;
    }
    if (bytes < length) {
        return 0;
    }
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) {
            return 0;
        }
        code = code << 6 | (s[i] & 0x3Fu);
    }
    if (code < lowest || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
        return 0;
    }
    return length;
}

static int is_continuation(char c)
{
    return ((unsigned char)c & 0xC0) == 0x80;
}

/* Writes into a draft first: the arguments may be the current sentence itself. */
static void record(char *draft)
{
    size_t bytes = strlen(draft);
    for (size_t i = 0; i < bytes;) {
        size_t n = moshi_utf8_bytes(draft + i, bytes - i);
        if (n == 0 || (unsigned char)draft[i] < 0x20 || draft[i] == 0x7F) {
            draft[i] = '?';
            n = 1;
        }
        i += n;
    }
    if (bytes < SENTENCE_BYTES) {
        memcpy(sentence, draft, bytes + 1);
        return;
    }
    size_t head = 250;
    while (is_continuation(draft[head])) {
        head--;
    }
    size_t tail = bytes - (SENTENCE_BYTES - 1 - 3 - head);
    while (is_continuation(draft[tail])) {
        tail++;
    }
    memcpy(sentence, draft, head);
    memcpy(sentence + head, "...", 3);
    memcpy(sentence + head + 3, draft + tail, bytes - tail + 1);
}

int moshi_fail(int status, const char *format, ...)
{
    char draft[DRAFT_BYTES] = "";
    va_list args;
    va_start(args, format);
    (void)vsnprintf(draft, sizeof draft, format, args);
    va_end(args);
    record(draft);
    return status;
}

int moshi_fail_prefix(int status, const char *format, ...)
{
    char draft[DRAFT_BYTES + SENTENCE_BYTES + 2] = "";
    va_list args;
    va_start(args, format);
    (void)vsnprintf(draft, DRAFT_BYTES, format, args);
    va_end(args);
    size_t bytes = strlen(draft);
    (void)snprintf(draft + bytes, sizeof draft - bytes, ": %s", sentence);
    record(draft);
    return status;
}

const char *moshi_error_detail(void)
{
    return sentence;
}

const char *moshi_version(void)
{
    return MOSHI_VERSION;
}

static const char *const dtype_names[] = {
    [MOSHI_AUTO] = "auto", [MOSHI_F32] = "f32",   [MOSHI_F16] = "f16", [MOSHI_BF16] = "bf16",
    [MOSHI_FP8] = "fp8",   [MOSHI_INT8] = "int8", [MOSHI_Q8] = "q8",   [MOSHI_Q4] = "q4"};

#define DTYPE_COUNT ((int)(sizeof dtype_names / sizeof dtype_names[0]))

const char *moshi_dtype_name(enum moshi_dtype dtype)
{
    int i = (int)dtype;
    return i >= 0 && i < DTYPE_COUNT ? dtype_names[i] : "unknown";
}

int moshi_dtype_parse(const char *name, enum moshi_dtype *dtype)
{
    for (int i = 0; name != NULL && i < DTYPE_COUNT; i++) {
        if (strcmp(name, dtype_names[i]) == 0) {
            *dtype = (enum moshi_dtype)i;
            return MOSHI_OK;
        }
    }
    return moshi_fail(MOSHI_ERROR_ARGUMENT,
                      "dtype '%.40s' is not supported, expected auto, f32, f16, bf16, fp8, int8, "
                      "q8 or q4",
                      name != NULL ? name : "(none)");
}
