"""widget_picture.py: makes examples/live_call.png, the widget of moshi_c.notebook after a question.

The page's script draws what a real call sends it, in a headless Chromium.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import moshi_c
from moshi_c.audio import read_audio
from moshi_c.notebook import Talk

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
WIDTH, HEIGHT = 800, 190

PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:16px"><div id="widget"></div>
<script type="module">
SCRIPT
const heard = {};
render({
  model: { get: () => true, on: (name, heed) => (heard[name] = heed), off() {}, send() {} },
  el: document.getElementById("widget"),
});
for (const message of MESSAGES) heard["msg:custom"](message, [new DataView(new ArrayBuffer(0))]);
</script>"""


class Watched(Talk):
    """Keeps the messages that the page would get."""

    def send(self, content: Any, buffers: Any = None) -> None:
        self.__dict__.setdefault("messages", []).append(content)


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("widget_picture.py: there is no Chromium here; expected it as chromium")
    with moshi_c.load() as model:
        call = Watched(model, seed=7)
        call.start()
        question = read_audio(EXAMPLES / "question.ogg", model.sample_rate)
        call.hear(np.pad(question, (model.sample_rate // 2, 5 * model.sample_rate // 2)))
        print(call.stop())
    script = (ROOT / "moshi_c" / "data" / "talk.js").read_text("utf-8")
    script = script.replace("export default { render };", "")
    page = PAGE.replace("SCRIPT", script).replace("MESSAGES", json.dumps(call.messages))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, "utf-8")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}",
        ]
        command += [f"--screenshot={EXAMPLES / 'live_call.png'}", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run([*command, file.as_uri()], check=True, stderr=subprocess.DEVNULL, timeout=60)


if __name__ == "__main__":
    main()
