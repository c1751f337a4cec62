/* status.h: how a failure is recorded. One sentence per thread: what, found, expected. */
#ifndef MOSHI_STATUS_H
#define MOSHI_STATUS_H

#include "moshi.h"

/* Records the sentence for this thread (at most 511 bytes, cut at a UTF-8 boundary) and returns
 * `status`, so that callers write: return moshi_fail(MOSHI_ERROR_CHECKPOINT, "...", ...); */
int moshi_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Puts "prefix: " in front of the recorded sentence; returns `status`. */
int moshi_fail_prefix(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Bytes of the UTF-8 sequence that `text` starts with, 1..4; 0 when it is not valid (truncated,
 * overlong, a surrogate, beyond U+10FFFF) or `bytes` is 0. */
size_t moshi_utf8_bytes(const char *text, size_t bytes);

#endif
