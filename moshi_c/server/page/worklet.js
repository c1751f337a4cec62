// On the sound card's thread: the microphone goes out in chunks, the model's voice comes in and is played.
// Both sides leave here together, so a recording of them is aligned as it was heard.

import { JitterBuffer } from "./jitter.js";
import { Resampler } from "./resample.js";

const RATE = 24000;
const CHUNK = 480; // 20 ms

class Chunks {
  #data = new Float32Array(CHUNK);
  #count = 0;
  ready = [];

  push(samples) {
    for (let at = 0; at < samples.length; ) {
      const part = samples.subarray(at, at + CHUNK - this.#count);
      this.#data.set(part, this.#count);
      this.#count += part.length;
      at += part.length;
      if (this.#count === CHUNK) {
        this.ready.push(this.#data);
        this.#data = new Float32Array(CHUNK);
        this.#count = 0;
      }
    }
  }
}

class Talk extends AudioWorkletProcessor {
  #buffer = new JitterBuffer(RATE);
  #in = new Resampler(sampleRate, RATE);
  #out = new Resampler(RATE, sampleRate);
  #mic = new Chunks();
  #voice = new Chunks();
  #waiting = new Float32Array(0); // played, at the context's rate, beyond the last block

  constructor() {
    super();
    this.port.onmessage = ({ data }) => {
      if (data === "reset") this.#buffer.reset();
      else this.#buffer.push(data);
    };
  }

  process([input], [output]) {
    this.#mic.push(this.#in.push(input[0] ?? new Float32Array(output[0].length)));
    this.#play(output[0]);
    for (const channel of output.slice(1)) channel.set(output[0]);
    while (this.#mic.ready.length && this.#voice.ready.length) this.#post();
    return true;
  }

  #play(out) {
    if (sampleRate === RATE) {
      this.#buffer.pull(out);
      this.#voice.push(out);
      return;
    }
    while (this.#waiting.length < out.length) {
      const samples = new Float32Array(120);
      this.#buffer.pull(samples);
      this.#voice.push(samples);
      const played = this.#out.push(samples);
      const waiting = new Float32Array(this.#waiting.length + played.length);
      waiting.set(this.#waiting);
      waiting.set(played, this.#waiting.length);
      this.#waiting = waiting;
    }
    out.set(this.#waiting.subarray(0, out.length));
    this.#waiting = this.#waiting.slice(out.length);
  }

  #post() {
    const mic = this.#mic.ready.shift();
    const voice = this.#voice.ready.shift();
    const { level, underruns } = this.#buffer;
    const buffer = { level: level / RATE, underruns };
    this.port.postMessage({ mic, voice, buffer }, [mic.buffer, voice.buffer]);
  }
}

registerProcessor("talk", Talk);
