// One conversation: the microphone, a link to the server, and what becomes of both.

import { ChatLink, PcmLink } from "./links.js";
import * as opus from "./opus.js";
import { Refused, Sound } from "./sound.js";
import { Tape } from "./wav.js";

const MOST_ATTEMPTS = 6;
const FIRST_WAIT_S = 0.5, LONGEST_WAIT_S = 8;
const SPEAKING_DB = -45;
const PAUSE_S = 0.6; // of quiet, until the model counts as listening
const PROBE_S = 5;
const LATE_S = 5; // between two words of the server that it is late, and for which they hold

export function decibels(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return 10 * Math.log10(sum / samples.length + 1e-10);
}

// States: idle, microphone, connecting, waiting, listening, speaking, reconnecting, ended.
//
// events: state(name, detail), text(string), levels(you, model) in dBFS, delay(parts)
export class Conversation {
  constructor(events) {
    this.events = events;
    this.state = "idle";
    this.tape = null;
  }

  get running() {
    return !["idle", "ended"].includes(this.state);
  }

  // Both sides hear each other now.
  get live() {
    return ["listening", "speaking"].includes(this.state);
  }

  async start(settings) {
    this.settings = settings;
    this.attempts = 0;
    this.roundTrip = null;
    this.loud = -Infinity; // when the model was heard last
    this.waiting = 0; // seconds of sound that the jitter buffer holds
    this.underruns = 0;
    this.lateAt = this.lateUntil = -Infinity;
    this.tape = new Tape();
    const turn = (this.turn = {}); // the browser may still be asking for an earlier one
    this.#become("microphone");
    try {
      const lost = () => this.#end("The microphone was disconnected.");
      const sound = await Sound.open(settings, (chunk) => this.#chunk(chunk), lost);
      if (this.turn !== turn || this.state !== "microphone") {
        sound.close(); // ended while the browser was asking
        return;
      }
      this.sound = sound;
      this.wake = await navigator.wakeLock?.request("screen").catch(() => null);
      if (this.turn === turn && this.state === "microphone") await this.#connect();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (this.turn === turn && this.running) this.#end(error.message);
    }
  }

  stop() {
    if (this.running) this.#end("");
  }

  get muted() {
    return Boolean(this.sound?.muted);
  }

  set muted(muted) {
    if (this.sound) this.sound.muted = muted;
  }

  async changeMicrophone(settings) {
    this.settings = settings;
    await this.sound?.change(settings);
  }

  #become(state, detail = "") {
    if (state === this.state && !detail) return;
    this.state = state;
    this.events.state(state, detail);
  }

  #end(reason) {
    clearTimeout(this.timer);
    clearInterval(this.probe);
    this.link?.close();
    this.sound?.close();
    this.wake?.release();
    this.link = this.sound = this.wake = null;
    this.#become("ended", reason);
  }

  async #connect() {
    this.#become("connecting");
    const { codec, token, seed, text_temperature, text_topk, audio_temperature, audio_topk } = this.settings;
    const query = { token, seed, text_temperature, text_topk, audio_temperature, audio_topk };
    const withOpus = codec === "opus" || (codec === "auto" && (await opus.supported()));
    if (this.state !== "connecting") return;
    let link = null;
    const events = {
      ready: () => this.#ready(),
      audio: (samples) => this.sound?.play(samples),
      text: (text) => this.events.text(text),
      waiting: (position) => this.#become("waiting", position),
      late: () => this.#late(),
      closed: (how) => link === this.link && this.#closed(how),
    };
    try {
      link = this.link = new (withOpus ? ChatLink : PcmLink)(query, events);
    } catch (error) {
      this.#end(`This browser cannot open the call: ${error.message}`);
    }
  }

  #ready() {
    this.attempts = 0;
    this.#become("listening");
    clearInterval(this.probe);
    this.probe = setInterval(() => this.#measure(), PROBE_S * 1000);
    this.#measure();
  }

  #closed({ reason, again }) {
    const broken = this.live || this.attempts > 0;
    clearInterval(this.probe);
    this.link = null;
    this.sound?.silence();
    if (broken && again && this.attempts < MOST_ATTEMPTS) {
      const wait = Math.min(FIRST_WAIT_S * 2 ** this.attempts, LONGEST_WAIT_S) * (0.8 + 0.4 * Math.random());
      this.attempts++;
      this.#become("reconnecting", { reason, wait, attempt: this.attempts, of: MOST_ATTEMPTS });
      this.timer = setTimeout(() => this.#connect(), wait * 1000);
    } else {
      this.#end(reason || "The server ended the call.");
    }
  }

  // One late answer is an accident; the server tells again when it goes on.
  #late() {
    const now = performance.now();
    if (now - this.lateAt < LATE_S * 1000) this.lateUntil = now + LATE_S * 1000;
    this.lateAt = now;
  }

  // 20 ms of both sides, as heard.
  #chunk({ mic, voice, buffer }) {
    const you = decibels(mic);
    const model = decibels(voice);
    if (this.live) {
      this.link.send(mic);
      this.tape.append(mic, voice);
      if (model > SPEAKING_DB) this.loud = performance.now();
      this.#become(performance.now() - this.loud < PAUSE_S * 1000 ? "speaking" : "listening");
    }
    // Sound comes in bursts: the mean of about a second.
    this.waiting += (buffer.level - this.waiting) / 50;
    this.underruns = buffer.underruns;
    this.events.levels(you, model);
  }

  // How long the way to the server and back takes, by a small request beside the call.
  async #measure() {
    let address;
    try {
      const answer = await fetch("health", { cache: "no-store" });
      await answer.text();
      address = answer.url;
    } catch {
      return;
    }
    // Without the time that a connection takes: the call has one.
    const timing = performance.getEntriesByName(address).at(-1);
    performance.clearResourceTimings();
    if (!timing) return;
    const taken = (timing.responseStart - timing.requestStart) / 1000;
    this.roundTrip = this.roundTrip === null ? taken : Math.min(taken, 0.7 * this.roundTrip + 0.3 * taken);
  }

  // Seconds between a sound here and the earliest answer to it, in parts; null when not known yet.
  get delay() {
    if (!this.live || this.roundTrip === null) return null;
    const { roundTrip: network, waiting: buffer, underruns } = this;
    return { network, buffer, card: this.sound.delay, underruns, late: performance.now() < this.lateUntil };
  }
}
