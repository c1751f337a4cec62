// What evens out the arrival of sound: holds a little of it back, as much as late arrivals taught it.
//
// When sound arrives at an empty buffer, a margin of silence goes before it. Running dry makes the margin
// longer; ten seconds without it make it shorter. Each second the lowest level is looked at: what was never
// needed is lag, and is cut out, in a pause of the voice where there is one.

const LEAST_S = 0.02, MOST_S = 0.4, FIRST_S = 0.04;
const LONGER_S = 0.02, SHORTER_S = 0.005, CALM_S = 10;
const WINDOW_S = 1;
const SPARE_S = 0.02; // lag that is not worth a cut
const URGENT_S = 0.16; // lag that is cut in the middle of a word too
const FADE_S = 0.008;
const QUIET = 0.01; // -40 dBFS

const isQuiet = (samples) => samples.every((sample) => Math.abs(sample) < QUIET);

export class JitterBuffer {
  constructor(rate) {
    this.rate = rate;
    this.reset();
    this.underruns = 0;
    this.trimmed = 0; // samples
  }

  // Forgets the sound that waits, and expects none; what was learned about the line stays.
  reset() {
    this.queue = [];
    this.offset = 0; // into queue[0]
    this.level = 0; // samples that wait
    this.playing = false;
    this.loud = false; // what was played last
    this.margin ??= FIRST_S * this.rate;
    this.last ??= 0;
    this.#newWindow();
    this.calm = 0;
  }

  push(samples) {
    if (!this.playing) {
      this.playing = true;
      const margin = new Float32Array(Math.round(this.margin));
      this.#rest(margin, 0);
      this.#add(margin);
      const fade = Math.min(Math.round(FADE_S * this.rate), samples.length);
      samples = samples.map((sample, i) => (i < fade ? (sample * i) / fade : sample));
      this.#newWindow();
    }
    this.#add(samples);
  }

  // Fills `out`; silence where nothing waits.
  pull(out) {
    if (!this.playing) {
      this.#rest(out, 0);
      return;
    }
    if (this.level < out.length) {
      const there = this.level;
      this.#take(out.subarray(0, there));
      this.#rest(out, there);
      this.playing = false;
      if (!this.loud) return; // a server may send nothing while the model is silent
      this.underruns++;
      this.calm = 0;
      this.margin = Math.min(this.margin + LONGER_S * this.rate, MOST_S * this.rate);
      return;
    }
    this.lowest = Math.min(this.lowest, this.level - out.length);
    this.#take(out);
    this.window += out.length;
    this.calm += out.length;
    if (this.calm >= CALM_S * this.rate) {
      this.calm = 0;
      this.margin = Math.max(this.margin - SHORTER_S * this.rate, LEAST_S * this.rate);
    }
    if (this.window >= WINDOW_S * this.rate) this.#trim();
  }

  #newWindow() {
    this.window = 0;
    this.lowest = Infinity;
  }

  // Cuts what the last second never needed, or waits for a pause.
  #trim() {
    const lag = Math.floor(this.lowest - this.margin);
    const fade = Math.round(FADE_S * this.rate);
    if (lag <= SPARE_S * this.rate || this.level < lag + fade) {
      this.#newWindow();
      return;
    }
    if (this.loud && lag < URGENT_S * this.rate) return;
    // The sound before the cut fades into the sound after it.
    const before = new Float32Array(fade), after = new Float32Array(fade);
    this.#take(before);
    this.#take(new Float32Array(lag - fade));
    this.#take(after);
    for (let i = 0; i < fade; i++) after[i] = (before[i] * (fade - i) + after[i] * i) / fade;
    this.queue.unshift(after);
    if (this.offset) this.queue[1] = this.queue[1].subarray(this.offset);
    this.offset = 0;
    this.level += fade;
    this.trimmed += lag;
    this.#newWindow();
  }

  #add(samples) {
    if (!samples.length) return;
    this.queue.push(samples);
    this.level += samples.length;
  }

  #take(out) {
    let done = 0;
    while (done < out.length) {
      const part = this.queue[0].subarray(this.offset, this.offset + out.length - done);
      out.set(part, done);
      done += part.length;
      this.offset += part.length;
      if (this.offset === this.queue[0].length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    this.level -= out.length;
    if (out.length) this.loud = !isQuiet(out);
    if (out.length) this.last = out[out.length - 1];
  }

  // No step to zero, which would click.
  #rest(out, from) {
    for (let i = from; i < out.length; i++) out[i] = this.last *= 0.98;
  }
}
