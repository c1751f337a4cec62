// The microphone and the loudspeaker, both at 24 kHz in chunks of 20 ms.

export const RATE = 24000;

// A failure that people are told of, in one sentence.
export class Refused extends Error {}

const MICROPHONE_TROUBLE = {
  NotAllowedError:
    "The browser does not let this page use the microphone: allow it in the site's settings, then talk again.",
  NotFoundError: "No microphone was found: connect one, then talk again.",
  NotReadableError: "The microphone cannot be used; another program may hold it.",
};

function microphoneTrouble(error) {
  return new Refused(MICROPHONE_TROUBLE[error.name] ?? `The microphone does not work: ${error.message}`);
}

async function microphone(wishes) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Refused(
      "Browsers give the microphone to secure pages alone: open this page by https, or as http://localhost.",
    );
  }
  const { device, echo, noise, gain } = wishes;
  const audio = {
    channelCount: 1,
    echoCancellation: echo,
    noiseSuppression: noise,
    autoGainControl: gain,
    ...(device && { deviceId: { exact: device } }),
  };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    // The chosen one is not there today: any other will do.
    if (device && ["OverconstrainedError", "NotFoundError"].includes(error.name)) {
      return microphone({ ...wishes, device: "" });
    }
    throw microphoneTrouble(error);
  }
}

// The microphones there are, with their names once one has been allowed.
export async function microphones() {
  const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return devices.filter((device) => device.kind === "audioinput" && device.deviceId);
}

function stop(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

export class Sound {
  // onchunk({mic, voice, buffer}) each 20 ms; onlost() when the microphone is gone. To be called in the
  // handler of a click: browsers let a page sound only then.
  static async open(wishes, onchunk, onlost) {
    const sound = new Sound();
    sound.onchunk = onchunk;
    sound.onlost = onlost;
    sound.context = context(RATE);
    try {
      const stream = await microphone(wishes);
      try {
        await sound.#connect(stream);
      } catch (error) {
        // Some browsers do not resample a microphone: the page does it then.
        if (error.name !== "NotSupportedError" || sound.context.sampleRate !== RATE) throw error;
        await sound.context.close();
        sound.context = context();
        await sound.#connect(stream);
      }
      return sound;
    } catch (error) {
      sound.close();
      throw error instanceof Refused ? error : new Refused(`Sound does not work here: ${error.message}`);
    }
  }

  async #connect(stream) {
    this.stream = stream;
    this.source = this.context.createMediaStreamSource(stream);
    await this.context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    this.node = new AudioWorkletNode(this.context, "talk", { outputChannelCount: [1] });
    this.node.port.onmessage = ({ data }) => this.onchunk(data);
    this.source.connect(this.node).connect(this.context.destination);
    this.#watch(stream);
    await this.context.resume();
  }

  #watch(stream) {
    stream.getAudioTracks()[0].addEventListener("ended", () => stream === this.stream && this.onlost());
  }

  // Another microphone, or the same with other wishes, in the middle of a call.
  async change(wishes) {
    const muted = this.muted;
    const stream = await microphone(wishes);
    if (this.context.state === "closed") {
      stop(stream);
      return;
    }
    const source = this.context.createMediaStreamSource(stream);
    this.source.disconnect();
    stop(this.stream);
    this.stream = stream;
    this.source = source;
    this.source.connect(this.node);
    this.#watch(stream);
    this.muted = muted;
  }

  get muted() {
    return !this.stream.getAudioTracks()[0].enabled;
  }

  set muted(muted) {
    this.stream.getAudioTracks()[0].enabled = !muted;
  }

  play(samples) {
    this.node.port.postMessage(samples, [samples.buffer]);
  }

  // Drops what waits to be played.
  silence() {
    this.node.port.postMessage("reset");
  }

  // Seconds that the sound card adds, as far as the browser tells.
  get delay() {
    return (this.context.baseLatency || 0) + (this.context.outputLatency || 0);
  }

  // Phones stop the sound of a page that was away.
  wake() {
    if (this.context.state !== "running" && this.context.state !== "closed") this.context.resume();
  }

  close() {
    stop(this.stream);
    if (this.node) this.node.port.onmessage = null;
    if (this.context.state !== "closed") this.context.close();
  }
}

function context(sampleRate) {
  try {
    return new AudioContext({ latencyHint: "interactive", ...(sampleRate && { sampleRate }) });
  } catch (error) {
    if (sampleRate && error.name === "NotSupportedError") return context();
    throw error;
  }
}
