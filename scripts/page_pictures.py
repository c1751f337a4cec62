"""page_pictures.py: the pictures of the page in the README, of a conversation held for them.

    python scripts/page_pictures.py

A browser's microphone asks the small model five questions; docs/page-phone.png is taken while it
answers the fourth, docs/page-light.png while it answers the last. Needs chromium and pillow.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from moshi_c.audio import write_audio

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from browser import Browser, Page  # noqa: E402
from hello import spoken  # noqa: E402
from serving import serving  # noqa: E402

RATE = 24000
PAUSE_S = 3.0
CONVERSATION = (
    ("hello", "hello there"),
    ("what is your name?", "my name is moshi"),
    ("how are you?", "i am fine thank you"),
    ("what colour is the sky?", "the sky is blue"),
    ("what is two plus three?", "two plus three is five"),
)


def questions(file: Path) -> None:
    """All of them, with time for the answers."""
    parts = [np.zeros(int(1.5 * RATE), np.float32)]
    for question, _ in CONVERSATION:
        parts += [spoken(question, "en-us+m3", RATE), np.zeros(int(PAUSE_S * RATE), np.float32)]
    write_audio(file, np.concatenate(parts), RATE)


def take(page: Page, answer: str, file: Path) -> None:
    """A picture while the model says the answer."""
    page.wait(
        f"document.querySelector('#transcript').textContent.includes({json.dumps(answer)})"
        " && document.querySelector('#it span').style.getPropertyValue('--level') > 0.6",
        answer,
    )
    # it is flat: few colours are enough
    image = Image.open(io.BytesIO(page.picture())).convert("RGB").quantize(128, dither=0)
    image.save(file, optimize=True)
    print(f"{file}: {image.width} x {image.height}, {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, serving() as server:
        folder = Path(name)
        questions(folder / "questions.wav")
        browser = Browser(folder, folder / "questions.wav")
        try:
            page = browser.open(server.url, {"moshi-c": json.dumps({"seed": "7"})})
            page.look(390, 780, dark=True, scale=2)
            page.click("#talk")
            take(page, CONVERSATION[3][1], ROOT / "docs" / "page-phone.png")
            page.look(1120, 680)
            take(page, CONVERSATION[4][1], ROOT / "docs" / "page-light.png")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
