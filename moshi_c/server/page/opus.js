// Opus by WebCodecs, in Ogg pages: 20 ms of sound to a packet, a packet to a page.

import { OggReader, OggWriter, duration } from "./ogg.js";
import { Resampler } from "./resample.js";

const RATE = 24000;
const ENCODER = {
  codec: "opus",
  sampleRate: RATE,
  numberOfChannels: 1,
  bitrate: 32000,
  opus: { frameDuration: 20000, application: "voip" },
};
// Decoders work at 48 kHz, whatever was encoded.
const DECODER = { codec: "opus", sampleRate: 48000, numberOfChannels: 1 };

// Whether this browser can do both.
export async function supported() {
  if (!("AudioEncoder" in globalThis && "AudioDecoder" in globalThis)) return false;
  try {
    const answers = await Promise.all([
      AudioEncoder.isConfigSupported(ENCODER),
      AudioDecoder.isConfigSupported(DECODER),
    ]);
    return answers.every((answer) => answer.supported);
  } catch {
    return false;
  }
}

export class OpusEncoder {
  #ogg = new OggWriter(RATE);
  #samples = 0;

  // onbytes(bytes): the next slice of the Ogg stream. onerror(error): the encoder gave up.
  constructor(onbytes, onerror) {
    this.encoder = new AudioEncoder({
      output: (chunk) => {
        const packet = new Uint8Array(chunk.byteLength);
        chunk.copyTo(packet);
        onbytes(this.#ogg.append(packet));
      },
      error: onerror,
    });
    this.encoder.configure(ENCODER);
  }

  push(samples) {
    if (this.encoder.state !== "configured") return;
    const data = new AudioData({
      format: "f32-planar",
      sampleRate: RATE,
      numberOfFrames: samples.length,
      numberOfChannels: 1,
      timestamp: Math.round((this.#samples / RATE) * 1e6),
      data: samples,
    });
    this.#samples += samples.length;
    this.encoder.encode(data);
    data.close();
  }

  close() {
    if (this.encoder.state !== "closed") this.encoder.close();
  }
}

export class OpusDecoder {
  #ogg = new OggReader();
  #resampler = null;
  #time = 0; // of the next packet, in samples at 48 kHz

  // onsamples(Float32Array): the next sound at 24 kHz. onerror(error): the decoder gave up.
  constructor(onsamples, onerror) {
    this.decoder = new AudioDecoder({
      output: (data) => {
        const samples = new Float32Array(data.numberOfFrames);
        data.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
        this.#resampler ??= new Resampler(data.sampleRate, RATE);
        data.close();
        onsamples(this.#resampler.push(samples));
      },
      error: onerror,
    });
    this.decoder.configure(DECODER);
  }

  push(bytes) {
    for (const packet of this.#ogg.append(bytes)) {
      const length = duration(packet);
      if (!length || this.decoder.state !== "configured") continue;
      const timestamp = Math.round((this.#time / 48000) * 1e6);
      this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp, data: packet }));
      this.#time += length;
    }
  }

  close() {
    if (this.decoder.state !== "closed") this.decoder.close();
  }
}
