// Ogg pages (RFC 3533) around one stream of Opus packets (RFC 7845): what /api/chat carries, since
// WebCodecs makes and takes bare packets.

const CAPTURE = [0x4f, 0x67, 0x67, 0x53]; // "OggS"
const HEADER = 27;
const CONTINUED = 1, FIRST = 2;
// Longest packet that is put together: 120 ms at 510 kbit/s, eight times.
const LONGEST_PACKET = 61200;

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte << 24;
  for (let bit = 0; bit < 8; bit++) value = (value << 1) ^ (value < 0 ? 0x04c11db7 : 0);
  return value;
});

// The checksum of a page, its own four bytes taken as zero.
function checksum(page) {
  let crc = 0;
  for (let i = 0; i < page.length; i++) {
    const byte = i >= 22 && i < 26 ? 0 : page[i];
    crc = (crc << 8) ^ CRC[(crc >>> 24) ^ byte];
  }
  return crc >>> 0;
}

// How long an Opus packet sounds, in samples at 48 kHz, by its first bytes (RFC 6716, 3.1).
export function duration(packet) {
  if (packet.length < 1) return 0;
  const config = packet[0] >> 3;
  let frame;
  if (config < 12) frame = [480, 960, 1920, 2880][config & 3];
  else if (config < 16) frame = [480, 960][config & 1];
  else frame = [120, 240, 480, 960][config & 3];
  const code = packet[0] & 3;
  if (code === 3 && packet.length < 2) return 0;
  return frame * (code === 0 ? 1 : code === 3 ? packet[1] & 63 : 2);
}

export function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

export class OggWriter {
  // rate: of the sound before it was encoded, which players may show.
  constructor(rate) {
    this.rate = rate;
    this.serial = crypto.getRandomValues(new Uint32Array(1))[0];
    this.sequence = 0;
    this.granule = 0n;
  }

  // The bytes of the packet's own page; the two pages of headers stand before the first.
  append(packet) {
    const pages = this.sequence === 0 ? [this.#head(), this.#tags()] : [];
    this.granule += BigInt(duration(packet));
    pages.push(this.#page(packet, 0));
    return joined(pages);
  }

  #head() {
    const packet = new Uint8Array(19);
    const view = new DataView(packet.buffer);
    packet.set(new TextEncoder().encode("OpusHead"));
    packet[8] = 1; // version
    packet[9] = 1; // channels
    view.setUint16(10, 312, true); // pre-skip: 6.5 ms, what the encoder looks ahead
    view.setUint32(12, this.rate, true);
    return this.#page(packet, FIRST);
  }

  #tags() {
    const vendor = new TextEncoder().encode("moshi-c page");
    const packet = new Uint8Array(8 + 4 + vendor.length + 4);
    packet.set(new TextEncoder().encode("OpusTags"));
    new DataView(packet.buffer).setUint32(8, vendor.length, true);
    packet.set(vendor, 12);
    return this.#page(packet, 0);
  }

  #page(packet, flags) {
    const laces = Math.floor(packet.length / 255) + 1; // the last one below 255, be it 0
    const page = new Uint8Array(HEADER + laces + packet.length);
    const view = new DataView(page.buffer);
    page.set(CAPTURE);
    page[5] = flags;
    view.setBigUint64(6, this.granule, true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.sequence++, true);
    page[26] = laces;
    page.fill(255, HEADER, HEADER + laces - 1);
    page[HEADER + laces - 1] = packet.length % 255;
    page.set(packet, HEADER + laces);
    view.setUint32(22, checksum(page), true);
    return page;
  }
}

export class OggReader {
  #rest = new Uint8Array(0); // bytes that are no whole page yet
  #parts = null; // of a packet that goes on in the next page; null: none has begun
  #size = 0;

  // Any slice of the stream; the audio packets that it completes. Damage costs the page it is in.
  append(bytes) {
    const data = this.#rest.length ? joined([this.#rest, bytes]) : bytes;
    const packets = [];
    let at = 0;
    while (data.length - at >= HEADER) {
      if (CAPTURE.some((byte, i) => data[at + i] !== byte)) {
        this.#parts = null;
        at++;
        continue;
      }
      const laces = data.subarray(at + HEADER, at + HEADER + data[at + 26]);
      if (laces.length < data[at + 26]) break;
      const size = HEADER + laces.length + laces.reduce((sum, lace) => sum + lace, 0);
      if (data.length - at < size) break;
      const page = data.subarray(at, at + size);
      const view = new DataView(page.buffer, page.byteOffset);
      if (page[4] === 0 && view.getUint32(22, true) === checksum(page)) {
        this.#read(page, laces, packets);
        at += size;
      } else {
        this.#parts = null;
        at++;
      }
    }
    this.#rest = data.slice(at);
    return packets;
  }

  #read(page, laces, packets) {
    if (!(page[5] & CONTINUED)) this.#parts = null;
    let skipping = Boolean(page[5] & CONTINUED) && this.#parts === null; // its begin was lost
    let at = HEADER + laces.length;
    for (const lace of laces) {
      if (!skipping) {
        if (this.#parts === null) {
          this.#parts = [];
          this.#size = 0;
        }
        this.#parts.push(page.subarray(at, at + lace));
        this.#size += lace;
        if (this.#size > LONGEST_PACKET) {
          this.#parts = null;
          skipping = true;
        }
      }
      at += lace;
      if (lace === 255) continue;
      if (!skipping) {
        const packet = joined(this.#parts);
        if (!isHeader(packet)) packets.push(packet);
      }
      this.#parts = null;
      skipping = false;
    }
    if (this.#parts) this.#parts = [joined(this.#parts)]; // the page itself need not stay
  }
}

function isHeader(packet) {
  const name = String.fromCharCode(...packet.subarray(0, 8));
  return name === "OpusHead" || name === "OpusTags";
}
