// What people chose, kept in this browser. An empty text means the model's own default.

const KEY = "moshi-c";

export const DEFAULTS = {
  device: "",
  echo: true,
  noise: true,
  gain: true,
  codec: "auto",
  token: "",
  seed: "",
  text_temperature: "",
  text_topk: "",
  audio_temperature: "",
  audio_topk: "",
  shortcuts: true,
};

export function load() {
  const settings = { ...DEFAULTS };
  try {
    const kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
    for (const name of Object.keys(DEFAULTS)) {
      if (typeof kept[name] === typeof DEFAULTS[name]) settings[name] = kept[name];
    }
  } catch {
    // Nothing kept, or no storage for this page: the defaults.
  }
  return settings;
}

export function save(settings) {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // They hold until the page is left.
  }
}
