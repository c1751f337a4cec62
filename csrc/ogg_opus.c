/* ogg_opus.c: Opus in Ogg as a stream, both ways: pages are libogg's, packets libopus's; this file knows
 * the two header packets (RFC 7845) and what to do when pages or packets are missing or damaged.
 *
 * Memory of a reader is bounded whatever the pages say: one page that is not whole yet (64 KiB), one
 * packet that is not whole yet (MAX_PACKET), one packet of samples. A writer holds one packet. */
#include <math.h>
#include <ogg/ogg.h>
#include <opus/opus.h>
#include <stdlib.h>
#include <string.h>

#include "moshi.h"
#include "status.h"

#define GRANULE_RATE 48000 /* granule positions count these, at any rate */
#define MAX_PACKET 61440 /* bytes of the largest packet of one Opus stream that can be valid */
#define MAX_PACKET_MS 120
#define MAX_GRANULE ((int64_t)1 << 47) /* of a stream of 90 years; larger ones tell nothing */
#define PIECE 4096 /* bytes that libogg is given at a time */

/* A stream without a good packet for so long is not one. The largest page has 65,307
 * bytes, so a damaged one alone does not end it. */
#define MAX_BAD_BYTES (1 << 17)
#define MAX_BAD_PACKETS 50

static int check_rate(int rate)
{
    if (rate == 8000 || rate == 12000 || rate == 16000 || rate == 24000 || rate == 48000)
        return MOSHI_OK;
    return moshi_fail(MOSHI_ERROR_AUDIO,
                      "rate is %d; Opus has 8000, 12000, 16000, 24000 and 48000 Hz", rate);
}

/* ---- reader ----------------------------------------------------------------------------- */

enum reader_state {
    READER_START, /* between streams: any page begins one */
    READER_OTHER, /* a stream began that is not Opus; waits for the head of one that is */
    READER_STREAM
};

struct moshi_opus_reader {
    int rate;
    OpusDecoder *decoder;
    ogg_sync_state sync;
    ogg_stream_state stream;
    enum reader_state state;
    int in_tags; /* since OpusHead no packet has come */
    int pre_skip; /* of the current stream, in samples at `rate` */
    int64_t next_page; /* its expected number; -1: any */
    int64_t position; /* where the last packet ended in granules; -1: unknown */
    int page_samples; /* of the last page, and of the page being read */
    int page_samples_now;
    int packet_samples; /* of the last packet */
    int64_t conceal; /* samples still to be made for pages that never came */
    int skipping; /* inside bytes that are no page */
    int64_t bad_bytes, bad_packets; /* since the last good packet */
    struct moshi_opus_counts counts;
    int failed;
    int ready, given; /* samples in pcm, and how many of them the caller has */
    float pcm[GRANULE_RATE * MAX_PACKET_MS / 1000];
};

int moshi_opus_reader_create(int rate, struct moshi_opus_reader **reader)
{
    *reader = NULL;
    int status = check_rate(rate), error = OPUS_OK;
    if (status) return status;
    struct moshi_opus_reader *r = calloc(1, sizeof *r);
    if (r) {
        ogg_sync_init(&r->sync);
        r->rate = rate;
        r->next_page = r->position = -1;
        r->packet_samples = rate / 50;
        /* One channel: libopus mixes what is stereo. */
        r->decoder = opus_decoder_create(rate, 1, &error);
    }
    if (!r || !r->decoder || ogg_stream_init(&r->stream, 0) != 0) {
        moshi_opus_reader_destroy(r);
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for an Opus decoder");
    }
    *reader = r;
    return MOSHI_OK;
}

void moshi_opus_reader_destroy(struct moshi_opus_reader *reader)
{
    if (!reader) return;
    if (reader->decoder) opus_decoder_destroy(reader->decoder);
    ogg_stream_clear(&reader->stream);
    ogg_sync_clear(&reader->sync);
    free(reader);
}

struct moshi_opus_counts moshi_opus_reader_counts(const struct moshi_opus_reader *reader)
{
    return reader->counts;
}

int moshi_opus_reader_pre_skip(const struct moshi_opus_reader *reader)
{
    return reader->pre_skip;
}

static int out_of_memory(void)
{
    return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a page of an Ogg stream");
}

/* What led nowhere; an error once it is too much in a row. */
static int count_bad(struct moshi_opus_reader *r, int64_t bytes, int packets)
{
    r->bad_bytes += bytes;
    r->bad_packets += packets;
    if (r->bad_bytes <= MAX_BAD_BYTES && r->bad_packets <= MAX_BAD_PACKETS) return MOSHI_OK;
    r->failed = 1;
    return moshi_fail(MOSHI_ERROR_AUDIO,
                      "the stream has %lld bytes and %lld damaged packets in a row without sound; "
                      "expected Opus in Ogg",
                      (long long)r->bad_bytes, (long long)r->bad_packets);
}

/* Goes on with pages of that serial number only, as if nothing came before. */
static void begin_stream(struct moshi_opus_reader *r, int serial, int64_t position)
{
    ogg_stream_reset_serialno(&r->stream, serial);
    opus_decoder_ctl(r->decoder, OPUS_RESET_STATE);
    opus_decoder_ctl(r->decoder, OPUS_SET_GAIN(0));
    r->state = READER_STREAM;
    r->in_tags = r->pre_skip = 0;
    r->next_page = -1;
    r->position = position;
    r->page_samples = r->page_samples_now = 0;
    r->packet_samples = r->rate / 50;
    r->conceal = 0;
}

static int is_header(const ogg_packet *packet, const char *name)
{
    return packet->bytes >= 8 && memcmp(packet->packet, name, 8) == 0;
}

static int little16(const unsigned char *at)
{
    return at[0] | at[1] << 8;
}

/* OpusHead: magic[8], version, channels, pre-skip[2], rate[4], gain[2], mapping family, and with a
 * family other than 0 the number of Opus streams. */
static int read_head(struct moshi_opus_reader *r, const ogg_packet *packet)
{
    const unsigned char *head = packet->packet;
    int channels = packet->bytes >= 19 ? head[9] : 0;
    int family = packet->bytes >= 19 ? head[18] : 0;
    int streams = family == 0 ? 1 : packet->bytes >= 21 ? head[19] : 0;
    if (channels < 1 || channels > 2 || streams != 1 || head[8] >= 16) {
        r->failed = 1;
        return moshi_fail(
            MOSHI_ERROR_AUDIO,
            "the stream has an OpusHead of %ld bytes, %d channels, mapping family %d; "
            "expected version 1, mono or stereo",
            packet->bytes, channels, family);
    }
    r->pre_skip = (int)((int64_t)little16(head + 10) * r->rate / GRANULE_RATE);
    /* In 1/256 dB, as the decoder takes it. */
    opus_decoder_ctl(r->decoder, OPUS_SET_GAIN((int16_t)little16(head + 16)));
    r->in_tags = 1;
    return MOSHI_OK;
}

static int take_page(struct moshi_opus_reader *r, ogg_page *page)
{
    int serial = ogg_page_serialno(page);
    int64_t number = (uint32_t)ogg_page_pageno(page), bytes = page->header_len + page->body_len;
    r->skipping = 0;
    if (ogg_page_bos(page)) {
        /* Whose stream this is stands in its first packet, which has this page for itself. */
        int is_opus = page->body_len >= 8 && memcmp(page->body, "OpusHead", 8) == 0;
        if (is_opus)
            begin_stream(r, serial, 0);
        else if (r->state != READER_STREAM)
            r->state = READER_OTHER; /* perhaps one of several that go side by side */
    } else if (r->state == READER_START) {
        begin_stream(r, serial, -1);
    }
    if (r->state != READER_STREAM || serial != (int)r->stream.serialno)
        return count_bad(r, bytes, 0);

    if (r->page_samples_now) r->page_samples = r->page_samples_now;
    r->page_samples_now = 0;
    if (r->next_page >= 0 && number > r->next_page) {
        int64_t lost = number - r->next_page;
        r->counts.lost += lost;
        /* Granules may count anything, so each is taken to be as long as the last page. */
        r->conceal = lost * r->page_samples < r->rate ? lost * r->page_samples : r->rate;
        r->position = -1;
    }
    r->next_page = number + 1;
    if (ogg_stream_pagein(&r->stream, page) != 0 && ogg_stream_check(&r->stream) != 0)
        return out_of_memory();
    return count_bad(r, r->in_tags ? (bytes + 127) / 128 : bytes, 0); /* tags: up to 16 MiB */
}

/* Puts samples into pcm: of the packet, or with NULL what best replaces as many as `samples`. */
static int decode(struct moshi_opus_reader *r, const ogg_packet *packet, int samples)
{
    int limit = r->rate * MAX_PACKET_MS / 1000;
    int made = opus_decode_float(r->decoder, packet ? packet->packet : NULL,
                                 packet ? (opus_int32)packet->bytes : 0, r->pcm,
                                 packet ? limit : samples, 0);
    if (made < 0) return made;
    /* A gain from the header, and damage, can give anything; what goes on is sound. */
    for (int i = 0; i < made; i++) {
        float sample = isnan(r->pcm[i]) ? 0.0f : r->pcm[i];
        sample = sample > 1.0f ? 1.0f : sample;
        r->pcm[i] = sample < -1.0f ? -1.0f : sample;
    }
    r->ready = made;
    return made;
}

static void decode_nothing(struct moshi_opus_reader *r, int samples)
{
    if (decode(r, NULL, samples) > 0) return;
    memset(r->pcm, 0, (size_t)samples * sizeof *r->pcm);
    r->ready = samples;
}

/* Part of a gap of missing pages, in the steps of 2.5 ms that libopus has. */
static void conceal(struct moshi_opus_reader *r)
{
    int step = r->rate / 400, most = r->packet_samples;
    int samples = r->conceal < most ? (int)r->conceal / step * step : most;
    r->conceal = samples ? r->conceal - samples : 0;
    if (samples) decode_nothing(r, samples);
}

/* The granule of a stream's last page says where its sound ends inside the last packet. */
static void cut_end(struct moshi_opus_reader *r, int64_t granule)
{
    int64_t beyond = r->position - granule;
    int64_t samples = beyond * r->rate / GRANULE_RATE;
    if (beyond > 0 && samples < r->ready) r->ready -= (int)samples;
}

static int take_packet(struct moshi_opus_reader *r, const ogg_packet *packet)
{
    int status = MOSHI_OK;
    int has_granule = packet->granulepos >= 0 && packet->granulepos <= MAX_GRANULE;
    if (packet->b_o_s && is_header(packet, "OpusHead")) return read_head(r, packet);
    const int expects_tags = r->in_tags;
    r->in_tags = 0;
    if (is_header(packet, "OpusTags")) {
        if (expects_tags) r->bad_bytes = 0;
    } else if (packet->bytes > 0 && packet->bytes <= MAX_PACKET && decode(r, packet, 0) > 0) {
        r->packet_samples = r->ready;
        r->bad_bytes = r->bad_packets = 0;
        r->counts.packets++;
    } else {
        r->counts.damaged++;
        status = count_bad(r, 0, 1);
        decode_nothing(r, r->packet_samples);
    }
    r->page_samples_now += r->ready;
    if (r->position >= 0) r->position += (int64_t)r->ready * GRANULE_RATE / r->rate;
    if (packet->e_o_s) {
        if (r->position >= 0 && has_granule) cut_end(r, packet->granulepos);
        r->state = READER_START;
    } else if (has_granule && r->ready) {
        r->position = packet->granulepos;
    }
    return status;
}

/* One step towards more samples in pcm: a packet of the pages at hand, else a page of the bytes at
 * hand, else more bytes. *done: there are no more. */
static int advance(struct moshi_opus_reader *r, const uint8_t **data, size_t *bytes, int *done)
{
    ogg_packet packet;
    ogg_page page;
    r->ready = r->given = 0;
    if (r->conceal > 0) {
        conceal(r);
        return MOSHI_OK;
    }
    int found = ogg_stream_packetout(&r->stream, &packet);
    if (found > 0) return take_packet(r, &packet);
    if (found < 0) return MOSHI_OK; /* a hole, which the page numbers have told already */
    if (r->stream.body_fill - r->stream.body_returned > MAX_PACKET)
        ogg_stream_reset(&r->stream); /* tags with a picture, or nothing good: is left out */

    long page_bytes = ogg_sync_pageseek(&r->sync, &page);
    if (page_bytes > 0) return take_page(r, &page);
    if (page_bytes < 0) {
        /* Who joins in the middle of a page has damaged nothing. */
        if (!r->skipping && r->next_page >= 0) r->counts.damaged++;
        r->skipping = 1;
        return count_bad(r, -page_bytes, 0);
    }
    size_t piece = *bytes < PIECE ? *bytes : PIECE;
    *done = piece == 0;
    if (*done) return MOSHI_OK;
    char *room = ogg_sync_buffer(&r->sync, (long)piece);
    if (!room) return out_of_memory();
    memcpy(room, *data, piece);
    ogg_sync_wrote(&r->sync, (long)piece);
    *data += piece;
    *bytes -= piece;
    return MOSHI_OK;
}

int moshi_opus_reader_append(struct moshi_opus_reader *reader, const uint8_t **data, size_t *bytes,
                             float *pcm, size_t capacity, size_t *samples)
{
    int done = 0, status = MOSHI_OK;
    *samples = 0;
    if (reader->failed)
        return moshi_fail(MOSHI_ERROR_AUDIO, "the stream had ended with an error; expected a new "
                                             "reader for a new stream");
    while (!status && !done && *samples < capacity) {
        size_t ready = (size_t)(reader->ready - reader->given);
        if (ready == 0) {
            status = advance(reader, data, bytes, &done);
            continue;
        }
        if (ready > capacity - *samples) ready = capacity - *samples;
        memcpy(pcm + *samples, reader->pcm + reader->given, ready * sizeof *pcm);
        reader->given += (int)ready;
        *samples += ready;
    }
    return status;
}

/* ---- writer ----------------------------------------------------------------------------- */

/* Packets of 40 ms, a page each, are what upstream's server and client send, so what every decoder of
 * its streams has met. Shorter ones would be no sooner: two make a frame of the model, which is coded
 * and sent as a whole. */
#define PACKET_MS 40
/* The low-delay mode is CELT alone: 2.5 ms of delay where the others have 6.5, and the wave itself
 * (correlation 0.99 at this rate) where the speech mode keeps only its sound, at a third of the time.
 * That mode's strength, low rates and lost packets, is of no use on a WebSocket. A higher complexity
 * takes half as long again for nothing that correlation shows. */
#define APPLICATION OPUS_APPLICATION_RESTRICTED_LOWDELAY
#define BITS_A_SECOND 48000
#define COMPLEXITY 5
#define MAX_CODED 1500 /* bytes of a packet, six times what the bit rate asks for */

struct moshi_opus_writer {
    int rate;
    int packet_samples;
    int pre_skip; /* granules */
    OpusEncoder *encoder;
    ogg_stream_state stream;
    int64_t samples; /* taken so far */
    int64_t coded; /* of these, and of the silence at the end, in packets */
    int64_t packets; /* headers included */
    int closing, closed;
    ogg_page page; /* points into stream */
    size_t page_bytes, given; /* 0: no page waits */
    int filled;
    float pcm[GRANULE_RATE * PACKET_MS / 1000];
};

int moshi_opus_writer_create(int rate, uint32_t serial, struct moshi_opus_writer **writer)
{
    *writer = NULL;
    int status = check_rate(rate), error = OPUS_OK, lookahead = 0;
    if (status) return status;
    struct moshi_opus_writer *w = calloc(1, sizeof *w);
    if (w) {
        w->rate = rate;
        w->packet_samples = rate * PACKET_MS / 1000;
        w->encoder = opus_encoder_create(rate, 1, APPLICATION, &error);
    }
    if (!w || !w->encoder || ogg_stream_init(&w->stream, (int)serial) != 0) {
        moshi_opus_writer_destroy(w);
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for an Opus encoder");
    }
    opus_encoder_ctl(w->encoder, OPUS_SET_BITRATE(BITS_A_SECOND));
    opus_encoder_ctl(w->encoder, OPUS_SET_COMPLEXITY(COMPLEXITY));
    opus_encoder_ctl(w->encoder, OPUS_GET_LOOKAHEAD(&lookahead));
    w->pre_skip = lookahead * (GRANULE_RATE / rate);
    *writer = w;
    return MOSHI_OK;
}

void moshi_opus_writer_destroy(struct moshi_opus_writer *writer)
{
    if (!writer) return;
    if (writer->encoder) opus_encoder_destroy(writer->encoder);
    ogg_stream_clear(&writer->stream);
    free(writer);
}

/* A page of this packet alone. */
static int put_packet(struct moshi_opus_writer *w, unsigned char *data, size_t bytes,
                      int64_t granule, int last)
{
    ogg_packet packet = {
        .packet = data,
        .bytes = (long)bytes,
        .b_o_s = w->packets == 0,
        .e_o_s = last,
        .granulepos = granule,
        .packetno = w->packets++,
    };
    if (ogg_stream_packetin(&w->stream, &packet) != 0 ||
        ogg_stream_flush(&w->stream, &w->page) == 0)
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a page of an Ogg stream");
    w->page_bytes = (size_t)(w->page.header_len + w->page.body_len);
    w->given = 0;
    return MOSHI_OK;
}

static int put_head(struct moshi_opus_writer *w)
{
    unsigned char head[19] = {'O', 'p', 'u', 's', 'H', 'e', 'a', 'd', 1, 1};
    head[10] = (unsigned char)(w->pre_skip & 255);
    head[11] = (unsigned char)(w->pre_skip >> 8);
    for (int i = 0; i < 4; i++) head[12 + i] = (unsigned char)(w->rate >> 8 * i);
    return put_packet(w, head, sizeof head, 0, 0);
}

static int put_tags(struct moshi_opus_writer *w)
{
    /* The length of the vendor's name, the name, and 32 bits for the number of comments: none. */
    unsigned char tags[] = "OpusTags\7\0\0\0moshi-c\0\0\0";
    return put_packet(w, tags, sizeof tags, 0, 0);
}

static int put_sound(struct moshi_opus_writer *w)
{
    unsigned char coded[MAX_CODED];
    int64_t granules = GRANULE_RATE / w->rate, end = w->samples * granules + w->pre_skip;
    int bytes = opus_encode_float(w->encoder, w->pcm, w->packet_samples, coded, sizeof coded);
    if (bytes < 0)
        return moshi_fail(MOSHI_ERROR_INTERNAL, "libopus could not code a packet: %s",
                          opus_strerror(bytes));
    w->filled = 0;
    w->coded += w->packet_samples;
    w->closed = w->closing && w->coded * granules >= end;
    return put_packet(w, coded, (size_t)bytes, w->closed ? end : w->coded * granules, w->closed);
}

/* Whatever comes next as a page. *done: nothing does without more samples. */
static int make_page(struct moshi_opus_writer *w, const float **pcm, size_t *samples, int *done)
{
    if (w->packets == 0) return put_head(w);
    if (w->packets == 1) return put_tags(w);
    size_t room = (size_t)(w->packet_samples - w->filled);
    size_t taken = *samples < room ? *samples : room;
    if (taken) memcpy(w->pcm + w->filled, *pcm, taken * sizeof **pcm);
    w->filled += (int)taken;
    w->samples += (int64_t)taken;
    *pcm += taken;
    *samples -= taken;
    if (w->closing && !w->closed) {
        memset(w->pcm + w->filled, 0, (room - taken) * sizeof *w->pcm);
        w->filled = w->packet_samples;
    }
    if (w->filled == w->packet_samples) return put_sound(w);
    *done = 1;
    return MOSHI_OK;
}

static size_t give_page(struct moshi_opus_writer *w, uint8_t *data, size_t capacity)
{
    size_t header = (size_t)w->page.header_len, bytes = 0;
    while (w->given < w->page_bytes && bytes < capacity) {
        int in_header = w->given < header;
        const unsigned char *from = in_header ? w->page.header + w->given
                                              : w->page.body + (w->given - header);
        size_t left = (in_header ? header : w->page_bytes) - w->given;
        size_t piece = left < capacity - bytes ? left : capacity - bytes;
        memcpy(data + bytes, from, piece);
        bytes += piece;
        w->given += piece;
    }
    return bytes;
}

static int write_pages(struct moshi_opus_writer *w, const float **pcm, size_t *samples,
                       uint8_t *data, size_t capacity, size_t *bytes)
{
    int done = 0, status = MOSHI_OK;
    *bytes = 0;
    while (!status && !done && *bytes < capacity) {
        if (w->given == w->page_bytes)
            status = make_page(w, pcm, samples, &done);
        else
            *bytes += give_page(w, data + *bytes, capacity - *bytes);
    }
    return status;
}

int moshi_opus_writer_append(struct moshi_opus_writer *writer, const float **pcm, size_t *samples,
                             uint8_t *data, size_t capacity, size_t *bytes)
{
    *bytes = 0;
    if (writer->closing)
        return moshi_fail(MOSHI_ERROR_SESSION, "the Opus stream is closed; expected a new writer");
    for (size_t i = 0; i < *samples; i++)
        if (!(fabsf((*pcm)[i]) <= MOSHI_MAX_SAMPLE))
            return moshi_fail(MOSHI_ERROR_AUDIO, "pcm has %g at sample %zu; expected -1 to 1",
                              (double)(*pcm)[i], i);
    return write_pages(writer, pcm, samples, data, capacity, bytes);
}

int moshi_opus_writer_close(struct moshi_opus_writer *writer, uint8_t *data, size_t capacity,
                            size_t *bytes)
{
    const float *pcm = NULL;
    size_t samples = 0;
    writer->closing = 1;
    return write_pages(writer, &pcm, &samples, data, capacity, bytes);
}
