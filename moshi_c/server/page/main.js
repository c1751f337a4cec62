// The page: what is pressed goes to the conversation, what happens there is shown.

import { Conversation } from "./conversation.js";
import { microphones } from "./sound.js";
import * as kept from "./settings.js";

const FLOOR_DB = -60;
const NEW_LINE_S = 1.5; // of silence between words
const METER_WORDS = [[-50, "silent"], [-35, "quiet"], [-12, "good"], [Infinity, "loud"]];

const TRY = "Try “what colour is the sky?”, “what is two plus three?” or “say the numbers seven twelve”.";

const $ = (id) => document.getElementById(id);
const settings = kept.load();
const talk = new Conversation({ state: showState, text: showText, levels: noteLevels });

// ---- the state of the call -------------------------------------------------------------------------

const STATES = {
  idle: () => "Press to talk",
  microphone: () => "Waiting for the microphone",
  connecting: () => "Connecting",
  waiting: (position) => `Waiting in line: you are number ${position}`,
  listening: () => (talk.muted ? "Muted" : "Listening"),
  speaking: () => "Speaking",
  reconnecting: ({ wait, attempt, of }) =>
    `Trying again in ${wait < 1 ? "a moment" : `${Math.round(wait)} s`} (${attempt} of ${of})`,
  ended: () => "The call has ended",
};

function showState(state, detail) {
  const body = document.body;
  // Whose turn it is changes too often to be read aloud, into the microphone at that.
  const turn = state === "speaking" || (state === "listening" && body.dataset.state === "speaking");
  $("state").setAttribute("aria-live", turn ? "off" : "polite");
  const wasRunning = body.classList.contains("running");
  body.dataset.state = state;
  body.classList.toggle("running", talk.running);
  body.classList.toggle("busy", talk.running && !talk.live);
  $("state").textContent = STATES[state](detail);
  if (state === "ended") $("trouble").textContent = detail;
  else if (state === "reconnecting") $("trouble").textContent = detail.reason || "The connection was lost.";
  else $("trouble").textContent = "";
  $("talk-label").textContent = talk.running ? "End" : "Talk";
  $("mute").disabled = !talk.sound;
  if (!talk.sound) showMuted(false);
  $("save").disabled = !talk.tape?.seconds;
  if (talk.running && !wasRunning) {
    newCall();
  } else if (!talk.running) {
    announce();
    noteLevels(-Infinity, -Infinity);
  }
  if (state === "connecting") fillDevices(); // their names are known now
}

function toggleTalk() {
  if (talk.running) talk.stop();
  else talk.start({ ...settings });
}

function showMuted(muted) {
  $("mute").setAttribute("aria-pressed", muted);
  $("mute").textContent = muted ? "Muted" : "Mute";
}

function toggleMute() {
  talk.muted = !talk.muted;
  showMuted(talk.muted);
  if (talk.live) showState(talk.state);
}

// ---- words -----------------------------------------------------------------------------------------

let began = 0; // of the call, by performance.now()
let line = null; // the element that takes the next words
let lastWord = 0;
let unsaid = ""; // words that screen readers were not told yet
let sentenceEnd = 0; // a timer

function newCall() {
  began = performance.now();
  line = null;
  $("hint")?.remove();
  if ($("transcript").lastElementChild?.className === "line") {
    const rule = document.createElement("hr");
    rule.className = "break";
    $("transcript").append(rule);
  }
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

function showText(text) {
  const now = performance.now();
  const box = $("transcript");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  if (!line || now - lastWord > NEW_LINE_S * 1000) {
    text = text.trimStart();
    if (!text) return;
    const row = document.createElement("p");
    row.className = "line";
    const time = document.createElement("time");
    time.textContent = clock((now - began) / 1000);
    line = document.createElement("span");
    row.append(time, line);
    box.append(row);
  }
  lastWord = now;
  line.append(text);
  line.normalize();
  if (atEnd) box.scrollTop = box.scrollHeight;

  // Screen readers get whole sentences, not pieces of words.
  unsaid += text;
  clearTimeout(sentenceEnd);
  sentenceEnd = setTimeout(announce, NEW_LINE_S * 1000);
}

function announce() {
  clearTimeout(sentenceEnd);
  if (!unsaid.trim()) return;
  const said = document.createElement("p");
  said.textContent = unsaid.trim();
  $("spoken").append(said);
  while ($("spoken").childElementCount > 20) $("spoken").firstElementChild.remove();
  unsaid = "";
}

// ---- levels and delay ------------------------------------------------------------------------------

const levels = { you: FLOOR_DB, it: FLOOR_DB };
const meters = ["you", "it"].map((id) => ({ id, element: $(id), bar: $(id).firstElementChild, shown: FLOOR_DB }));
const halo = document.querySelector(".halo");
let drawing = false;

function noteLevels(you, it) {
  levels.you = Math.max(FLOOR_DB, you);
  levels.it = Math.max(FLOOR_DB, it);
  if (!drawing) requestAnimationFrame(draw);
  drawing = true;
}

function draw() {
  drawing = false;
  for (const meter of meters) {
    meter.shown = Math.max(levels[meter.id], meter.shown - 1.5); // up at once, down slowly
    meter.bar.style.setProperty("--level", (1 - meter.shown / FLOOR_DB).toFixed(3));
  }
  const loudest = talk.live ? Math.max(...meters.map((meter) => meter.shown)) : FLOOR_DB;
  halo.style.setProperty("--level", (1 - loudest / FLOOR_DB).toFixed(3));
  if (!talk.running && meters.some((meter) => meter.shown > FLOOR_DB)) noteLevels(FLOOR_DB, FLOOR_DB);
}

// What changes all the time is told once a second.
setInterval(() => {
  for (const { id, element } of meters) {
    element.setAttribute("aria-valuenow", Math.round(levels[id]));
    element.setAttribute("aria-valuetext", METER_WORDS.find(([most]) => levels[id] < most)[1]);
  }
  $("save").disabled = !talk.tape?.seconds;
  const delay = talk.delay;
  if (!delay) {
    $("delay").textContent = "";
    return;
  }
  const ms = (seconds) => `${Math.round(1000 * seconds)}\u00a0ms`;
  const whole = delay.network + delay.buffer + delay.card + frameSeconds;
  const dropouts = delay.underruns ? `, dropouts ${delay.underruns}` : "";
  $("delay").textContent =
    `Round trip about ${ms(whole)}\nnetwork ${ms(delay.network)}, buffer ${ms(delay.buffer)}${dropouts}` +
    (delay.late ? "\nThe server is too slow: it answers late." : "");
}, 1000);

// ---- recording -------------------------------------------------------------------------------------

function saveRecording() {
  const link = document.createElement("a");
  const now = new Date();
  const stamp = new Date(now - now.getTimezoneOffset() * 60000).toISOString().slice(0, 19).replaceAll(":", "-");
  link.href = URL.createObjectURL(talk.tape.file());
  link.download = `moshi-${stamp.replace("T", "-")}.wav`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- settings --------------------------------------------------------------------------------------

const form = document.querySelector("#settings form");

function showSettings() {
  for (const [name, value] of Object.entries(settings)) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
}

function takeSetting({ target }) {
  if (!(target.name in settings) || !target.checkValidity()) return;
  settings[target.name] = target.type === "checkbox" ? target.checked : target.value.trim();
  kept.save(settings);
  if (["device", "echo", "noise", "gain"].includes(target.name) && talk.sound) {
    talk.changeMicrophone({ ...settings }).catch((error) => ($("trouble").textContent = error.message));
  }
}

async function fillDevices() {
  const select = form.elements.device;
  const devices = await microphones();
  const options = devices
    .filter((device) => device.deviceId !== "default" && device.label)
    .map((device) => new Option(device.label, device.deviceId));
  if (settings.device && !options.some((option) => option.value === settings.device)) {
    options.push(new Option("The one chosen before (not here)", settings.device));
  }
  select.replaceChildren(select.options[0], ...options);
  select.value = settings.device;
}

function openSettings() {
  showSettings();
  fillDevices();
  $("settings").showModal();
}

function defaultSettings() {
  Object.assign(settings, kept.DEFAULTS);
  kept.save(settings);
  showSettings();
}

// A link that carries a token: kept, and taken out of the address.
function takeToken() {
  const url = new URL(location.href);
  const token = url.searchParams.get("token") ?? new URLSearchParams(url.hash.slice(1)).get("token");
  if (!token) return;
  settings.token = token;
  kept.save(settings);
  url.searchParams.delete("token");
  url.hash = "";
  history.replaceState(null, "", url);
}

// ---- the server ------------------------------------------------------------------------------------

let frameSeconds = 0.08;

async function showServer() {
  try {
    const answer = await fetch("api/info", { cache: "no-store" });
    if (!answer.ok) return;
    const info = await answer.json();
    $("model").textContent = info.model;
    // The small model knows few things; people should meet one of them first.
    if (info.model.includes("tiny") && $("hint")) $("hint").textContent += `\n${TRY}`;
    frameSeconds = info.frame_size / info.sample_rate;
    for (const [name, value] of Object.entries(info.defaults)) {
      if (form.elements[name]) form.elements[name].placeholder = Number(value.toPrecision(5));
    }
  } catch {
    $("trouble").textContent = "The server cannot be reached.";
  }
}

// ---- keys ------------------------------------------------------------------------------------------

function key(event) {
  if (!settings.shortcuts || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if ($("settings").open || event.target.closest("input, select, textarea, [contenteditable]")) return;
  const action = { t: toggleTalk, m: toggleMute }[event.key.toLowerCase()];
  if (!action || (action === toggleMute && !talk.sound)) return;
  event.preventDefault();
  action();
}

$("talk").addEventListener("click", toggleTalk);
$("mute").addEventListener("click", toggleMute);
$("save").addEventListener("click", saveRecording);
$("open-settings").addEventListener("click", openSettings);
$("defaults").addEventListener("click", defaultSettings);
form.addEventListener("change", takeSetting);
document.addEventListener("keydown", key);
document.addEventListener("visibilitychange", () => talk.sound?.wake());
navigator.mediaDevices?.addEventListener("devicechange", fillDevices);
addEventListener("pagehide", () => talk.stop());

takeToken();
showServer();
