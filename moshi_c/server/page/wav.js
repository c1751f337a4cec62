// A call as a stereo WAV file, the user left and the model right, kept in the page alone.

const RATE = 24000;
const MOST = 30 * 60 * RATE; // samples: the last half hour, 172 MB

const toInt16 = (sample) => Math.round(Math.max(-1, Math.min(1, sample)) * 32767);

export class Tape {
  #blocks = [];
  #samples = 0;

  get seconds() {
    return this.#samples / RATE;
  }

  append(left, right) {
    const block = new Int16Array(2 * left.length);
    for (let i = 0; i < left.length; i++) {
      block[2 * i] = toInt16(left[i]);
      block[2 * i + 1] = toInt16(right[i]);
    }
    this.#blocks.push(block);
    this.#samples += left.length;
    while (this.#samples > MOST) this.#samples -= this.#blocks.shift().length / 2;
  }

  file() {
    const size = 4 * this.#samples;
    const header = new DataView(new ArrayBuffer(44));
    const text = (at, letters) => [...letters].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
    text(0, "RIFF");
    header.setUint32(4, 36 + size, true);
    text(8, "WAVEfmt ");
    header.setUint32(16, 16, true); // bytes of what follows, before "data"
    header.setUint16(20, 1, true); // PCM
    header.setUint16(22, 2, true); // channels
    header.setUint32(24, RATE, true);
    header.setUint32(28, 4 * RATE, true);
    header.setUint16(32, 4, true);
    header.setUint16(34, 16, true);
    text(36, "data");
    header.setUint32(40, size, true);
    return new Blob([header, ...this.#blocks], { type: "audio/wav" });
  }
}
