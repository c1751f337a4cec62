"""What notebooks show of recordings and frames, and the pictures."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sound
import soundfile

import moshi_c
from moshi_c import Frame, Recording, Session, Word

pytestmark = pytest.mark.python

HOSTILE = "<script>alert('&')</script>\"]]>\x00\x0b $x_{ \ud800"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def recording() -> Recording:
    """A question that begins after a second of silence, and what the small model says to it."""
    question = np.concatenate([sound.silence(1), sound.speech("hello"), sound.silence(3)])
    with moshi_c.load() as model, Session(model, seed=7) as session:
        session.say("the sky is blue")
        return session.run(question)


def made(seconds: float, words: list[Word] | None = None, **fields: Any) -> Recording:
    """A recording of noise on both sides, at a low rate."""
    rng = np.random.default_rng(0)
    frames, rate = round(seconds * 12.5), 2000
    user, model = rng.uniform(-1, 1, (2, frames * rate * 2 // 25)).astype(np.float32)
    values = {
        "pcm": model,
        "text": " ".join(word.text for word in words or []),
        "words": words or [],
        "codes": rng.integers(0, 512, (8, max(frames - 1, 0)), np.int32),
        "user_codes": rng.integers(0, 512, (8, frames), np.int32),
        "sample_rate": rate,
        "frame_rate": 12.5,
        "user_pcm": user,
    }
    return Recording(**(values | fields))


def frame(**fields: Any) -> Frame:
    values = {
        "pcm": None, "text": " hello", "text_token": 9, "codes": None,
        "user_codes": np.zeros(8, np.int32), "index": 12, "time": 0.96, "speaking": True,
        "level": -25.0, "heads": None,
    }  # fmt: skip
    return Frame(**(values | fields))


def page(shown: Recording | Frame) -> ET.Element:
    return ET.fromstring(shown._repr_html_())


def text_of(element: ET.Element) -> str:
    return "".join(element.itertext())


def player(root: ET.Element) -> tuple[Any, int]:
    """Samples [N, channels] of the page's player, and their rate."""
    (audio,) = root.iter("audio")
    kind, data = audio.attrib["src"].split(",")
    assert kind == "data:audio/mpeg;base64"
    return soundfile.read(io.BytesIO(base64.b64decode(data)), always_2d=True)


def loudness(pcm: Any, size: int = 1920) -> Any:
    return np.square(pcm[: len(pcm) // size * size].reshape(-1, size)).mean(axis=1)


# ---- recordings --------------------------------------------------------------------------------


def test_a_recording_keeps_what_the_model_heard(recording: Recording) -> None:
    assert recording.user_pcm is not None and recording.pcm is not None
    question = np.concatenate([sound.silence(1), sound.speech("hello"), sound.silence(3)])
    np.testing.assert_array_equal(recording.user_pcm[: len(question)], question)
    assert not recording.user_pcm[len(question) :].any()
    assert len(recording.user_pcm) == len(recording.pcm)
    with moshi_c.load() as model:
        for rates in ({"sample_rate": 16000}, {"output_sample_rate": 8000}):
            with Session(model, seed=7, **rates) as session:
                found = session.run(question[:30000])
            assert found.user_pcm is not None and found.pcm is not None
            assert abs(len(found.user_pcm) - len(found.pcm)) <= 1


def test_a_recordings_repr_is_one_short_line(recording: Recording) -> None:
    assert re.fullmatch(r"<Recording \d\.\d\d s, \d+ words: 'the sky is blue.*'>", repr(recording))
    assert "1 word:" in repr(made(1, [Word("a", 0, 1)]))
    long = repr(made(1, [Word("word\n", 0, 1)] * 1000))
    assert len(long) < 120 and "…" in long and "\n" not in long


def test_a_page_is_xml_and_fetches_and_runs_nothing(recording: Recording) -> None:
    for element in page(recording).iter():
        assert element.tag.removeprefix(SVG) in {
            "div", "audio", "svg", "path", "text", "title", "g", "p", "details", "summary",
            "table", "thead", "tbody", "tr", "th", "td",
        }  # fmt: skip
        for name, value in element.attrib.items():
            assert not name.startswith("on") and "url(" not in value and "http" not in value
            assert name != "src" or value.startswith("data:")


def test_a_page_has_the_words_with_their_times(recording: Recording) -> None:
    root = page(recording)
    rows = [[text_of(cell) for cell in row] for row in root.iter("tr")][1:]
    assert rows == [[w.text, f"{w.start:.2f}", f"{w.end:.2f}"] for w in recording.words]
    paragraphs = [text_of(p) for p in root.iter("p")]
    assert recording.text.strip() in paragraphs
    assert "no words" in text_of(page(made(1)))


def test_a_page_plays_you_on_the_left_and_the_model_on_the_right(recording: Recording) -> None:
    samples, rate = player(page(recording))
    assert rate == 24000 and samples.shape[1] == 2
    assert recording.user_pcm is not None and recording.pcm is not None
    for channel, pcm in enumerate((recording.user_pcm, recording.pcm)):
        heard, meant = loudness(samples[:, channel]), loudness(pcm)
        count = min(len(heard), len(meant))
        assert count > 0.9 * len(meant)
        assert np.corrcoef(heard[:count], meant[:count])[0, 1] > 0.9


def test_the_timeline_puts_words_and_levels_at_their_times(recording: Recording) -> None:
    (svg,) = page(recording).iter(f"{SVG}svg")
    labels = {text_of(text): text for text in svg.iter(f"{SVG}text")}
    ticks = {second: float(labels[f"{second} s"].attrib["x"]) for second in (0, 1)}
    scale = ticks[1] - ticks[0]

    placed = [text for text in svg.iter(f"{SVG}text") if text.find(f"{SVG}title") is not None]
    starts = [(float(text.attrib["x"]) - ticks[0]) / scale for text in placed]
    np.testing.assert_allclose(starts, [word.start for word in recording.words], atol=0.05)

    (user,) = (group for group in svg.iter(f"{SVG}g") if group.attrib["stroke"] == "#2f86c8")
    bars = [float(x) for x in re.findall(r"M([\d.]+)", user[1].attrib["d"])]
    seconds = (np.array(bars) - ticks[0]) / scale
    assert recording.user_pcm is not None
    loud = np.flatnonzero(np.abs(recording.user_pcm) > 0.02) / 24000
    np.testing.assert_allclose([seconds[0], seconds[-1]], [loud[0], loud[-1]], atol=0.1)


def test_words_of_the_timeline_never_cover_each_other() -> None:
    words = [Word("word" * (i % 5 + 1), 0.08 * i, 0.08 * (i + 1)) for i in range(100)]
    (svg,) = page(made(8, words)).iter(f"{SVG}svg")
    ends: dict[str, float] = {}
    count = 0
    for text in svg.iter(f"{SVG}text"):
        if text.find(f"{SVG}title") is not None:
            x, y = float(text.attrib["x"]), text.attrib["y"]
            assert x >= ends.get(y, 0.0)
            ends[y] = x + 6.0 * len(text_of(text).split(" s")[1])
            count += 1
    assert count > 20 and len(ends) <= 4


def test_what_a_model_writes_is_text() -> None:
    words = [Word(HOSTILE, 0.0, 0.5), Word("x" * 100_000, 0.5, 1.0)]
    root = page(made(1, words))
    assert not list(root.iter("script"))
    assert "<script>alert('&')</script>\"]]>\ufffd\ufffd" in text_of(root)
    assert len(text_of(root)) < 1000
    assert not list(page(frame(text=HOSTILE, event=HOSTILE)).iter("script"))


def test_the_page_of_an_hour_is_small_and_says_what_it_leaves_out() -> None:
    words = [Word("word", 0.16 * i, 0.16 * (i + 1)) for i in range(22500)]
    hour = made(3600, words)
    html = hour._repr_html_()
    assert len(html) < 3_000_000, "noise is the worst case"
    root = ET.fromstring(html)
    assert "The first 2 min of 1 h 0 min are shown; save() keeps all of it." in text_of(root)
    samples, rate = player(root)
    assert len(samples) / rate == pytest.approx(120, abs=0.5)
    assert len(list(root.iter(f"{SVG}svg"))) == 12
    short = page(made(25))
    assert "shown" not in text_of(short)
    assert len(list(short.iter(f"{SVG}svg"))) == 3


def test_pages_of_recordings_that_lack_a_side() -> None:
    one = made(2, user_pcm=None)
    assert player(page(one))[0].shape[1] == 1
    assert "you" not in text_of(page(one))
    heard = made(2, pcm=None, codes=np.zeros((0, 25), np.int32))
    assert player(page(heard))[0].shape[1] == 1
    nothing = dataclasses.replace(heard, user_pcm=None)
    assert not list(page(nothing).iter("audio"))
    page(made(0))
    bad = np.full(4000, np.nan, np.float32)
    bad[::2] = np.inf
    assert "nan" not in re.sub('base64,[^"]*', "", made(2, pcm=bad)._repr_html_())


# ---- frames ------------------------------------------------------------------------------------


def test_a_frame_is_one_line() -> None:
    assert repr(frame()) == "<Frame 12 at 0.96 s: ' hello', speaking, user at -25 dBFS>"
    shown = text_of(page(frame()))
    for part in ("frame 12", "0.96 s", "-25 dBFS", "' hello'", "speaking"):
        assert part in shown
    assert "\n" not in shown
    assert "speaking" not in text_of(page(frame(speaking=False)))
    assert "no output yet" in text_of(page(frame(text_token=-1, text="")))
    assert "context_80" in text_of(page(frame(event="context_80")))


def test_the_bar_of_a_frame_grows_with_the_level() -> None:
    widths = []
    for level in (-120.0, -50.0, -25.0, 0.0, 6.0):
        back, bar = page(frame(level=level)).iter(f"{SVG}rect")
        widths.append(float(bar.attrib["width"]) / float(back.attrib["width"]))
    assert widths == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_the_bar_of_a_run_ends_full_and_warns_of_nothing(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with moshi_c.load() as model, Session(model, seed=1) as session:
        session.run(np.zeros(48000, np.float32), progress=True)
    assert "2.0 of 2.0 s" in capsys.readouterr().err
    assert not recwarn.list


# ---- pictures ----------------------------------------------------------------------------------


def pixels(figure: Any) -> Any:
    """uint8[height, width, 4] of the drawn figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_a_picture_shows_sound_words_spectrograms_and_codes(recording: Recording) -> None:
    figure = recording.plot()
    drawn = pixels(figure)
    sound_axes, word_axes, user, model, codes = figure.axes
    assert {ax.get_xlim() for ax in figure.axes} == {(0.0, recording.duration)}
    lefts = {round(ax.get_position().x0, 6) for ax in figure.axes}
    rights = {round(ax.get_position().x1, 6) for ax in figure.axes}
    assert len(lefts) == len(rights) == 1, "one time axis"
    assert [text.get_text() for text in word_axes.texts] == [w.text for w in recording.words]
    assert [text.get_text() for text in sound_axes.get_yticklabels()] == ["you", "model"]
    assert codes.get_xlabel() == "seconds"
    for ax in figure.axes:
        box = ax.get_window_extent()
        part = drawn[len(drawn) - int(box.y1) : len(drawn) - int(box.y0), int(box.x0) : int(box.x1)]
        assert len(np.unique(part.copy().view(np.uint32))) > 10, "nothing is blank"
    for ax, pcm in ((user, recording.user_pcm), (model, recording.pcm)):
        level = ax.images[0].get_array()
        assert pcm is not None
        loudest = np.asarray(level).max(axis=0).argmax() / level.shape[1] * recording.duration
        assert loudness(pcm)[int(loudest * 12.5)] > 0.1 * loudness(pcm).max()
    for image, matrix in zip(codes.images, (recording.user_codes, recording.codes), strict=True):
        np.testing.assert_array_equal(image.get_array(), matrix)
        assert image.get_extent()[1] == pytest.approx(recording.duration)
    assert codes.images[1].get_extent()[0] == pytest.approx(0.08), "max_delay frames later"


def test_a_picture_goes_to_a_file_and_to_a_notebook(recording: Recording, tmp_path: Path) -> None:
    figure: Any = recording.plot(start=1.0, end=2.0)
    assert figure.axes[0].get_xlim() == (1.0, 2.0)
    figure.savefig(tmp_path / "picture.png")
    for data in ((tmp_path / "picture.png").read_bytes(), figure._repr_png_()):
        assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_the_picture_of_an_hour_is_bounded() -> None:
    hour = made(3600, [Word(f"{i}", 0.16 * i, 0.16 * (i + 1)) for i in range(22500)])
    figure = hour.plot()
    shapes = [collection for ax in figure.axes for collection in ax.collections]
    assert sum(len(path.vertices) for shape in shapes[:2] for path in shape.get_paths()) < 10_000
    assert all(image.get_array().shape[1] <= 1500 for ax in figure.axes[2:4] for image in ax.images)
    assert 0 < len(figure.axes[1].texts) < 200
    assert pixels(figure).std() > 10


def test_pictures_of_recordings_that_lack_a_side() -> None:
    heard = made(2, [Word(HOSTILE.replace("\ud800", ""), 0.5, 1)], pcm=None,
                 codes=np.zeros((0, 25), np.int32))  # fmt: skip
    assert len(heard.plot().axes) == 4
    nothing = dataclasses.replace(heard, words=[], user_pcm=None, user_codes=heard.codes)
    assert len(nothing.plot().axes) == 2
    for shown in (heard, nothing, made(0.08), made(1, pcm=np.full(9, np.nan, np.float32))):
        assert pixels(shown.plot()).std() > 0


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (1, 1), (1.5, 1), (2, 3), (np.nan, 1)])
def test_a_part_that_is_none_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=r"expected a part of the recording's 0 to 2\.00 s"):
        made(2).plot(start=start, end=end)


def test_without_matplotlib_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "moshi_c.plot", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'moshi_c\[plot\]'") as caught:
        made(1).plot()
    assert not isinstance(caught.value, moshi_c.MoshiError)
    made(1)._repr_html_()


def lines_of(text: str) -> dict[str, list[str]]:
    """The rows of a terminal's timeline by the name in front of them."""
    rows: dict[str, list[str]] = {}
    for line in text.split("\n"):
        rows.setdefault(line[:7].strip(), []).append(line[7:])
    return rows


def test_a_terminal_shows_both_sides_and_the_words_where_they_are(recording: Recording) -> None:
    rows = lines_of(recording.timeline(10_000))
    for name, pcm in (("you", recording.user_pcm), ("model", recording.pcm)):
        assert pcm is not None
        (bars,) = rows[name]
        loud = [index for index, bar in enumerate(bars) if bar != " "]
        assert loud == list(np.flatnonzero(10 * np.log10(loudness(pcm) + 1e-12) > -50))
    seconds, *lanes = rows[""]
    for second in range(int(recording.duration)):
        assert seconds.startswith(f"{second} s", round(12.5 * second))
    assert len(recording.words) > 2
    for word in recording.words:
        at = round(12.5 * word.start)
        assert any(lane.startswith(word.text, at) for lane in lanes), word


def test_a_terminal_that_is_narrow_gets_more_lines() -> None:
    long = made(20, [Word("x" * 90, 1, 2), Word("a\x1b[31mb\n", 19.9, 20)])
    text = long.timeline(40)
    assert max(map(len, text.split("\n"))) == 40 and "\x1b" not in text
    rows = lines_of(text)
    assert sum(map(len, rows["you"])) == sum(map(len, rows["model"])) == 250
    assert len(rows["you"]) == -(-250 // 33)
    assert any("x" * 33 in row for row in rows[""]) and any("a?[31mb?" in row for row in rows[""])
    assert max(map(len, long.timeline(1).split("\n"))) == 20, "the narrowest there is"


def test_a_terminal_shows_recordings_that_lack_a_side() -> None:
    assert set(lines_of(made(2, pcm=None).timeline())) == {"", "you"}
    assert set(lines_of(made(2, user_pcm=None).timeline())) == {"", "model"}
    nothing = made(0)
    assert nothing.timeline() == ""
    assert "nan" not in made(1, pcm=np.full(2000, np.nan, np.float32)).timeline()
