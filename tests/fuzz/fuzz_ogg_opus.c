/* fuzz_ogg_opus.c: the reader of Opus in Ogg. What it gives is sound, and the same however the bytes
 * are cut; it ends with one sentence. The first byte says how they are cut, and whether the checksums
 * of pages are put right first: hardly a changed page would be read otherwise. */
#include <math.h>
#include <ogg/ogg.h>

#include "fuzz.h"

#define MOST 4096 /* bytes of input: three of them can hold 120 ms */
#define RATE 8000

struct heard {
    float *pcm;
    size_t samples;
    int status;
};

static void mend_checksums(uint8_t *data, size_t bytes)
{
    for (size_t at = 0; at + 27 <= bytes; at++) {
        if (memcmp(data + at, "OggS", 4) != 0) continue;
        ogg_page page = {.header = data + at, .header_len = 27 + data[at + 26]};
        if (at + (size_t)page.header_len > bytes) return;
        page.body = data + at + page.header_len;
        for (int i = 0; i < data[at + 26]; i++) page.body_len += data[at + 27 + i];
        if (at + (size_t)page.header_len + (size_t)page.body_len > bytes) continue;
        ogg_page_checksum_set(&page);
    }
}

static struct heard hear(const uint8_t *data, size_t bytes, size_t piece, size_t capacity)
{
    struct heard heard = {NULL, 0, MOSHI_OK};
    struct moshi_opus_reader *reader;
    PROMISE(moshi_opus_reader_create(RATE, &reader) == MOSHI_OK);
    for (size_t at = 0; at < bytes && !heard.status; at += piece) {
        const uint8_t *from = data + at;
        size_t left = piece < bytes - at ? piece : bytes - at, given;
        do {
            heard.pcm = realloc(heard.pcm, (heard.samples + capacity) * sizeof *heard.pcm);
            PROMISE(heard.pcm != NULL);
            heard.status = moshi_opus_reader_append(reader, &from, &left, heard.pcm + heard.samples,
                                                    capacity, &given);
            PROMISE(given <= capacity);
            heard.samples += given;
        } while (given && !heard.status);
        PROMISE(left == 0 || heard.status);
    }
    PROMISE(heard.status == MOSHI_OK || heard.status == MOSHI_ERROR_AUDIO);
    for (size_t i = 0; i < heard.samples; i++) PROMISE(fabsf(heard.pcm[i]) <= 1.0f);
    struct moshi_opus_counts counts = moshi_opus_reader_counts(reader);
    PROMISE(counts.packets >= 0 && counts.lost >= 0 && counts.damaged >= 0);
    PROMISE(moshi_opus_reader_pre_skip(reader) >= 0);
    moshi_opus_reader_destroy(reader);
    return heard;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint8_t stream[MOST];
    if (bytes < 2) return 0;
    uint8_t how = *data++;
    bytes = bytes - 1 < MOST ? bytes - 1 : MOST;
    memcpy(stream, data, bytes);
    if (how & 1) mend_checksums(stream, bytes);
    struct heard whole = hear(stream, bytes, bytes, 1 << 16);
    struct heard parts = hear(stream, bytes, 1 + (how >> 1), 1 + 37 * (size_t)how);
    PROMISE(parts.status == whole.status && parts.samples == whole.samples);
    PROMISE(!whole.samples || memcmp(parts.pcm, whole.pcm, whole.samples * sizeof *whole.pcm) == 0);
    free(whole.pcm);
    free(parts.pcm);
    return 0;
}
