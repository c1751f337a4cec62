// The two ways to the server, behind one interface.
//
//   link = new ChatLink(query, events)   Opus, /api/chat
//   link = new PcmLink(query, events)    samples, /ws/pcm
//   link.send(samples)                   24 kHz; nothing is sent before `ready`
//   link.close()
//
// events: ready(), audio(samples), text(string), waiting(position), late(), closed({reason, again}), where
// late() says that the server does not keep up, `reason` is a sentence or empty, and `again` says that
// another attempt makes sense.

import { OpusDecoder, OpusEncoder } from "./opus.js";

const KIND = { handshake: 0, audio: 1, text: 2, error: 5, ping: 6 };
// Sound that the line has not taken yet; a line that slow gets no more of it.
const MOST_UNSENT = 64000;
// Close codes of a server that goes away, or of a line that broke: trying again makes sense.
const AGAIN = new Set([1001, 1006, 1011, 1012, 1013]);

function address(path, query) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    if (value !== "") url.searchParams.set(name, value);
  }
  return url;
}

// A WebSocket tells nothing about a refusal; the same address without one does. 426: it would be taken now.
async function whyRefused(url) {
  try {
    const answer = await fetch(url, { cache: "no-store" });
    if (answer.status === 401) {
      return { reason: "This server wants a token: enter the right one in the settings, then talk again." };
    }
    const { reason } = await answer.json().catch(() => ({ reason: answer.statusText }));
    if (answer.status === 503) return { reason: "All places are taken: try again in a while.", again: true };
    if (answer.status === 426) return { reason: "The server did not take the call: try again.", again: true };
    return { reason: `The server did not take the call: ${reason}.` };
  } catch {
    return { reason: "The server cannot be reached.", again: true };
  }
}

// The server's reasons are parts of sentences.
function sentence(reason) {
  if (typeof reason !== "string" || !reason) return "";
  const text = reason.charAt(0).toUpperCase() + reason.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

class Link {
  #opened = false;
  #told = ""; // the server's last word on why

  constructor(path, query, events) {
    this.events = events;
    const url = address(path, query);
    const socketUrl = new URL(url);
    socketUrl.protocol = url.protocol.replace("http", "ws");
    this.socket = new WebSocket(socketUrl);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => (this.#opened = true);
    this.socket.onmessage = ({ data }) => this.received(data);
    this.socket.onclose = async ({ code, reason }) => {
      this.release();
      if (this.#opened) this.events.closed({ reason: sentence(this.#told || reason), again: AGAIN.has(code) });
      else this.events.closed({ again: false, ...(await whyRefused(url)) });
    };
  }

  // Gives up its place without a word to `events`.
  close() {
    this.socket.onclose = null;
    this.socket.onmessage = null;
    this.socket.close(1000);
    this.release();
  }

  post(bytes) {
    const { readyState, bufferedAmount } = this.socket;
    if (readyState === WebSocket.OPEN && bufferedAmount < MOST_UNSENT) this.socket.send(bytes);
  }

  // What the server says beside the conversation.
  told({ type, position }) {
    if (type === "overrun") this.events.late();
    else if (position) this.events.waiting(position);
  }

  failed(sentence) {
    this.#told = sentence;
  }

  release() {}
}

export class ChatLink extends Link {
  constructor(query, events) {
    super("api/chat", { ...query, events: 1 }, events);
    const broken = (error) => {
      this.failed(`Opus failed in this browser: ${error.message}`);
      this.socket.close(1000);
    };
    this.encoder = new OpusEncoder((bytes) => {
      const message = new Uint8Array(1 + bytes.length);
      message[0] = KIND.audio;
      message.set(bytes, 1);
      this.post(message);
    }, broken);
    this.decoder = new OpusDecoder((samples) => events.audio(samples), broken);
    this.letters = new TextDecoder();
  }

  received(data) {
    if (typeof data === "string" || data.byteLength < 1) return;
    const bytes = new Uint8Array(data);
    const rest = bytes.subarray(1);
    if (bytes[0] === KIND.handshake) this.events.ready();
    else if (bytes[0] === KIND.audio) this.decoder.push(rest);
    else if (bytes[0] === KIND.text) this.events.text(this.letters.decode(rest, { stream: true }));
    else if (bytes[0] === KIND.error) this.failed(new TextDecoder().decode(rest));
    else if (bytes[0] === KIND.ping && rest.length) {
      this.told(JSON.parse(new TextDecoder().decode(rest)));
    }
  }

  send(samples) {
    this.encoder.push(samples);
  }

  release() {
    this.encoder.close();
    this.decoder.close();
  }
}

export class PcmLink extends Link {
  constructor(query, events) {
    super("ws/pcm", { ...query, format: "s16", rate: 24000 }, events);
  }

  received(data) {
    if (typeof data === "string") {
      this.told(JSON.parse(data));
      return;
    }
    const view = new DataView(data);
    const samples = new Float32Array(data.byteLength >> 1);
    for (let i = 0; i < samples.length; i++) samples[i] = view.getInt16(2 * i, true) / 32768;
    this.events.audio(samples);
  }

  told(note) {
    if (note.type === "ready") this.events.ready();
    else if (note.type === "text") this.events.text(note.text);
    else if (note.type === "error") this.failed(note.reason);
    else super.told(note);
  }

  send(samples) {
    const message = new DataView(new ArrayBuffer(2 * samples.length));
    samples.forEach((sample, i) => {
      message.setInt16(2 * i, Math.max(-32768, Math.min(32767, Math.round(sample * 32768))), true);
    });
    this.post(message);
  }
}
