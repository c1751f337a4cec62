"""docs_pictures.py: draws docs/streams.svg and docs/frame.svg, which docs/concepts.md shows.

Lines and letters take the colour of the page they stand in, light or dark; as a file of its own a
picture follows the reader's system.
"""

import html
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
USER, MODEL, TEXT = "#2f86c8", "#d55e00", "#7a5fc0"

STYLE = """<style>
svg:root{color:#24292f}
@media(prefers-color-scheme:dark){svg:root{color:#e6edf3}}
text{font:13px system-ui,sans-serif;fill:currentColor}
.small{font-size:11px;opacity:.75}.middle{text-anchor:middle}.end{text-anchor:end}
.line{stroke:currentColor;fill:none;stroke-width:1.2}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
orient="auto"><path d="M0 0 8 4 0 8Z" fill="currentColor"/></marker></defs>"""


class Picture:
    """Shapes and text in pixels; the height is known at the end."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{html.escape(title)}</title>",
            STYLE,
        ]

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" class="{kind}">{html.escape(words)}</text>')

    def box(self, x: float, y: float, w: float, h: float, colour: str, fill: float = 0.18) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{colour}" '
            f'fill-opacity="{fill}" stroke="{colour}" stroke-width="1.2"/>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<path class="line" d="{path}" marker-end="url(#tip)"{dash}/>')

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>", ""]), "utf-8")


def streams() -> Picture:
    """The streams over five frames, each code in the frame where the model reads or writes it."""
    cell, row, left, top, frames = 92, 26, 150, 52, 6
    rows = [
        ("model: text", TEXT, 0),
        ("model: code 1", MODEL, 0),
        ("model: codes 2 to 8", MODEL, 1),
        ("user: code 1", USER, 0),
        ("user: codes 2 to 8", USER, 1),
    ]
    picture = Picture(
        "Five rows of tokens over six frames; the first code of each voice stands in the frame of "
        "its sound, the others one frame later",
        left + frames * cell + 10,
        top + 5 * (row + 8) + 64,
    )
    for frame in range(frames):
        x = left + frame * cell
        picture.text(x + cell / 2, 20, f"step {frame}", "middle")
        picture.text(x + cell / 2, 36, f"{80 * frame} to {80 * frame + 80} ms", "small middle")
    for i, (name, colour, delay) in enumerate(rows):
        y = top + i * (row + 8)
        picture.text(left - 12, y + 17, name, "end")
        for frame in range(frames):
            sound = frame - delay
            x = left + frame * cell
            picture.box(
                x + 2, y, cell - 4, row, colour, 0.05 if sound < 0 else 0.45 if sound == 2 else 0.16
            )
            words = "start" if sound < 0 else f"of frame {sound}"
            picture.text(x + cell / 2, y + 17, words, "small middle")
    y = top + 5 * (row + 8)
    x = left + 3 * cell
    picture.arrow((x + cell / 2, y + 22), (x + cell / 2, y + 2))
    picture.text(
        x + cell / 2, y + 38, "frame 2 is whole here: with codes 2 to 8 of step 3", "middle"
    )
    picture.text(
        x + cell / 2,
        y + 54,
        "its sound can be made, one frame after it was thought of",
        "small middle",
    )
    return picture


def frame() -> Picture:
    """The way of one frame through the parts, and what each of them remembers."""
    picture = Picture(
        "80 ms of the user's sound become codes, then text and codes of the model, then 80 ms of "
        "its sound; each part keeps a history",
        760,
        310,
    )
    parts = [
        (110, USER, "Mimi encoder", "8 codes"),
        (270, TEXT, "temporal", "transformer"),
        (430, MODEL, "depth", "transformer"),
        (590, MODEL, "Mimi decoder", "80 ms of sound"),
    ]
    kept = [
        "convolution edges",
        "keys and values of",
        "the delay cache:",
        "convolution edges",
    ]
    more = ["attention, 250 keys", "the context", "codes that wait", "attention, 250 keys"]
    for (x, colour, first, second), what, rest in zip(parts, kept, more, strict=True):
        picture.box(x, 96, 120, 58, colour)
        picture.text(x + 60, 120, first, "middle")
        picture.text(x + 60, 138, second, "middle")
        picture.box(x, 206, 120, 46, "#888888", 0.1)
        picture.text(x + 60, 226, what, "small middle")
        picture.text(x + 60, 241, rest, "small middle")
        picture.arrow((x + 50, 204), (x + 50, 156))
        picture.arrow((x + 70, 154), (x + 70, 204))
    picture.text(4, 118, "user, 80 ms")
    picture.text(4, 134, "1920 samples", "small")
    for x in (230, 390, 550):
        picture.arrow((x + 2, 125), (x + 38, 125))
    picture.arrow((86, 125), (108, 125))
    picture.arrow((710, 125), (752, 125))
    picture.text(714, 112, "model,", "small")
    picture.text(714, 146, "80 ms", "small")
    # text and its detour
    picture.arrow((330, 94), (330, 50))
    picture.text(330, 38, "one text token: the inner monologue", "middle")
    picture.text(330, 20, "say() and force_text() put theirs in its place", "small middle")
    picture.arrow((345, 60), (490, 60), (490, 94), dashed=True)
    picture.text(500, 64, "the voice follows it", "small")
    picture.text(380, 282, "A session is these histories:", "middle")
    picture.text(
        380, 300, "reset() clears them, snapshot() writes them, fork() shares them.", "small middle"
    )
    return picture


def main() -> None:
    streams().save(DOCS / "streams.svg")
    frame().save(DOCS / "frame.svg")


if __name__ == "__main__":
    main()
