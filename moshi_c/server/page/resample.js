// A stream of sound at another rate: a windowed sinc, one row of weights for each phase.

const ZEROS = 16; // zero crossings of the sinc on each side
const PASSED = 0.92; // of the lower Nyquist frequency

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

export class Resampler {
  #history; // the last samples that later outputs still look at
  #next = 0; // where in `history` the first weight of the next output lies
  #phase = 0;

  constructor(from, to) {
    const common = gcd(from, to);
    this.up = to / common;
    this.down = from / common;
    const slower = Math.min(1, to / from) * PASSED; // cutoff over the input's Nyquist frequency
    const half = Math.ceil(ZEROS / slower);
    this.taps = 2 * half;
    this.rows = Array.from({ length: this.up }, (_, phase) => {
      const row = new Float32Array(this.taps);
      let sum = 0;
      for (let i = 0; i < this.taps; i++) {
        const x = i - half + 1 - phase / this.up;
        const angle = Math.PI * slower * x;
        const window = Math.cos((Math.PI / 2) * Math.max(-1, Math.min(1, x / half))) ** 2;
        row[i] = (angle ? Math.sin(angle) / angle : 1) * window;
        sum += row[i];
      }
      return row.map((weight) => weight / sum);
    });
    this.#history = new Float32Array(half - 1);
  }

  // The outputs that these samples complete.
  push(samples) {
    if (this.up === this.down) return samples;
    const data = new Float32Array(this.#history.length + samples.length);
    data.set(this.#history);
    data.set(samples, this.#history.length);
    const out = new Float32Array(Math.ceil((data.length * this.up) / this.down) + 1);
    let count = 0;
    while (this.#next + this.taps <= data.length) {
      const row = this.rows[this.#phase];
      let sum = 0;
      for (let i = 0; i < this.taps; i++) sum += row[i] * data[this.#next + i];
      out[count++] = sum;
      this.#phase += this.down;
      this.#next += Math.floor(this.#phase / this.up);
      this.#phase %= this.up;
    }
    const used = Math.min(this.#next, data.length);
    this.#history = data.slice(used);
    this.#next -= used;
    return out.slice(0, count);
  }
}
