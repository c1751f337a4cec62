/* hash.h: FNV-1a, 64 bits, to tell contents apart; not against those who forge them. */
#ifndef MOSHI_HASH_H
#define MOSHI_HASH_H

#include <stddef.h>
#include <stdint.h>

#define HASH_START UINT64_C(0xcbf29ce484222325)

static inline uint64_t hash_bytes(uint64_t hash, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    return hash;
}

#endif
