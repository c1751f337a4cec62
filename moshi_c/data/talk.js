// The page's side of a call (moshi_c.notebook): microphone in, voice, words and levels out.
// Nothing is fetched; sound goes to the kernel as messages of the widget.

const USER = "#2f86c8", MODEL = "#d55e00";
const SECONDS = 12, FRAME = 0.08, FLOOR = -60;

// Runs on the audio thread: collects what comes into pieces of 80 ms.
const COLLECTOR = `
registerProcessor("collector", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(Math.round(sampleRate * ${FRAME}));
    this.filled = 0;
  }
  process([input]) {
    for (const sample of input[0] ?? []) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
});`;

const STYLE = `
.moshi-call{font:13px system-ui,sans-serif;max-width:760px}
.moshi-call button{font:inherit;padding:4px 14px;margin-right:8px;cursor:pointer}
.moshi-call canvas{width:100%;height:96px;display:block;margin:8px 0}
.moshi-call .words{min-height:1.5em;line-height:1.5}
.moshi-call .note{opacity:.75;font-size:12px}`;

function part(parent, name, className, text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

function draw(canvas, levels) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || 700, height = 96;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const columns = Math.round(SECONDS / FRAME), step = (width - 52) / columns;
  const ink = getComputedStyle(canvas).color;
  [["you", USER, 0], ["model", MODEL, 1]].forEach(([name, colour, side]) => {
    const middle = 24 + 48 * side;
    pen.fillStyle = ink;
    pen.font = "12px system-ui, sans-serif";
    pen.fillText(name, 0, middle + 4);
    pen.globalAlpha = 0.3;
    pen.fillRect(48, middle, width - 52, 1);
    pen.globalAlpha = 1;
    pen.fillStyle = colour;
    levels.slice(-columns).forEach((pair, column) => {
      const half = 21 * Math.max(0, 1 - pair[side] / FLOOR);
      pen.fillRect(48 + column * step, middle - half, Math.max(1, step - 1), 2 * half);
    });
  });
}

function render({ model, el }) {
  const box = part(el, "div", "moshi-call");
  part(box, "style", "", STYLE);
  const button = part(box, "button", "");
  const other = part(box, "button", "", "Play it a file");
  const file = document.createElement("input");
  file.type = "file";
  file.accept = "audio/*";
  const canvas = part(box, "canvas", "");
  const words = part(box, "div", "words");
  const note = part(box, "div", "note");
  const levels = [];
  let audio = null, stream = null, playing = 0, mine = false;

  const send = (content, buffers) => model.send(content, undefined, buffers);

  function show() {
    const live = model.get("live");
    button.textContent = live ? "Hang up" : "Call";
    other.disabled = live;
    if (!live && mine) release();
  }

  function changed() {
    if (model.get("live")) {
      words.textContent = "";
      levels.length = 0;
    }
    show();
  }

  function release() {
    mine = false;
    stream?.getTracks().forEach((track) => track.stop());
    audio?.close();
    audio = stream = null;
  }

  // A call from a microphone, or from a file that somebody has chosen.
  async function call(sound) {
    if (audio) return; // one is being made
    note.textContent = "";
    try {
      audio = new AudioContext();
      audio.resume();
      let source;
      if (sound) {
        source = audio.createBufferSource();
        source.buffer = await audio.decodeAudioData(await sound.arrayBuffer());
      } else {
        if (!navigator.mediaDevices) throw new Error("this page may not open the microphone");
        stream = await navigator.mediaDevices.getUserMedia({
          audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true },
        });
        source = audio.createMediaStreamSource(stream);
      }
      const url = URL.createObjectURL(new Blob([COLLECTOR], { type: "text/javascript" }));
      await audio.audioWorklet.addModule(url);
      URL.revokeObjectURL(url);
      // One channel, and silence goes on when the source has ended.
      const collector = new AudioWorkletNode(audio, "collector", {
        channelCount: 1, channelCountMode: "explicit", numberOfOutputs: 0,
      });
      const silence = audio.createConstantSource();
      silence.offset.value = 0;
      silence.connect(collector);
      silence.start();
      source.connect(collector);
      mine = true;
      playing = 0;
      send({ type: "start", rate: audio.sampleRate });
      collector.port.onmessage = ({ data }) => {
        const pcm = Int16Array.from(data, (x) => 32767 * Math.max(-1, Math.min(1, x)));
        send({ type: "sound" }, [pcm.buffer]);
      };
      source.start?.();
    } catch (error) {
      release();
      note.textContent = `${error.message || error}. A file of sound can be played to the model instead.`;
    }
  }

  // The voice, piece after piece; after a gap a little later, so that the next may come late.
  function play(pcm, rate) {
    if (!mine || !audio || !pcm.length) return;
    const buffer = audio.createBuffer(1, pcm.length, rate);
    buffer.copyToChannel(Float32Array.from(pcm, (x) => x / 32768), 0);
    const source = audio.createBufferSource();
    source.buffer = buffer;
    source.connect(audio.destination);
    if (playing < audio.currentTime) playing = audio.currentTime + 0.1;
    source.start(playing);
    playing += buffer.duration;
  }

  function receive(message, buffers) {
    if (message.type === "error") {
      note.textContent = message.message;
      if (mine && !model.get("live")) release();
      return;
    }
    words.textContent += message.text;
    levels.push([message.user, message.model]);
    if (levels.length > 2 * SECONDS / FRAME) levels.splice(0, SECONDS / FRAME);
    const view = buffers[0];
    play(new Int16Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)), message.rate);
    draw(canvas, levels);
  }

  other.onclick = () => file.click();
  button.onclick = () => (model.get("live") ? send({ type: "stop" }) : call(null));
  file.onchange = () => file.files.length && call(file.files[0]).then(() => (file.value = ""));
  model.on("msg:custom", receive);
  model.on("change:live", changed);
  show();
  draw(canvas, levels);
  return () => {
    if (mine) send({ type: "stop" });
    release();
    model.off("msg:custom", receive);
    model.off("change:live", changed);
  };
}

export default { render };
