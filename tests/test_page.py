"""The page that `moshi-c serve` shows, in a browser whose microphone plays a question."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ogg
import pytest
import soundfile
from browser import PATIENCE_S, Browser, Page
from serving import Server, serving
from sound import RATE, silence, speech

from moshi_c.audio import write_audio

pytestmark = [pytest.mark.python, pytest.mark.slow]

TOKEN = "a-token-of-the-tests"
# The microphone plays from the moment it is opened: the question comes when the call stands.
BEFORE_S = 1.5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Open to this machine."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """With a token; one caller talks, one may wait."""
    with serving("--token", TOKEN, "--sessions", "1", "--queue", "1") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    question = 0.5 * speech("what colour is the sky?", "en-us+m3", 150)
    write_audio(
        folder / "question.wav", np.concatenate([silence(BEFORE_S), question, silence(60)]), RATE
    )
    browser = Browser(folder, folder / "question.wav")
    yield browser
    browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """visit(url, **settings): the page with these settings kept in it; closed after the test."""
    pages: list[Page] = []

    def open_page(url: str, **settings: Any) -> Page:
        page = browser.open(url, {"moshi-c": json.dumps(settings)})
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()


def call(page: Page) -> None:
    page.click("#talk")
    wait_state(page, "listening")


def wait_state(page: Page, *states: str) -> None:
    wanted = json.dumps(states)
    page.wait(f"{wanted}.includes(document.body.dataset.state)", " or ".join(states))


def wait_words(page: Page, words: str) -> None:
    page.wait(
        f"document.querySelector('#transcript').textContent.includes({json.dumps(words)})", words
    )


def saved_recording(page: Page) -> tuple[np.ndarray, int]:
    before = set(page.browser.downloads.iterdir())
    page.browser.events = [
        e for e in page.browser.events if e["method"] != "Browser.downloadProgress"
    ]
    page.click("#save")
    page.browser.wait_event(
        lambda event: (
            event["method"] == "Browser.downloadProgress"
            and event["params"]["state"] == "completed"
        )
    )
    (file,) = set(page.browser.downloads.iterdir()) - before
    return soundfile.read(file, dtype="float32")


def loudest(pcm: np.ndarray) -> float:
    """Level of the loudest 100 ms, dBFS."""
    blocks = pcm[: len(pcm) // 2400 * 2400].reshape(-1, 2400)
    return float(10 * np.log10((blocks**2).mean(1).max() + 1e-12))


# ---- calls -------------------------------------------------------------------------------------


# What other browsers lack: Opus in WebCodecs, and a microphone at another rate than the device's.
LACKING = """
delete window.AudioEncoder;
const source = AudioContext.prototype.createMediaStreamSource;
AudioContext.prototype.createMediaStreamSource = function (stream) {
  if (this.sampleRate === 24000) throw new DOMException("another rate", "NotSupportedError");
  return source.call(this, stream);
};
"""


@pytest.mark.parametrize(
    ("lacking", "path"), [("", "/api/chat"), (LACKING, "/ws/pcm")], ids=["opus", "samples"]
)
def test_a_question_is_answered_in_words_and_sound(
    server: Server, visit: Any, lacking: str, path: str
) -> None:
    page = visit(server.url, seed="7", text_temperature="0", audio_temperature="0")
    page.evaluate(f"{lacking} 0")
    page.evaluate(
        "window.heard = -60; window.states = new Set();"
        "new MutationObserver(() => states.add(document.body.dataset.state))"
        ".observe(document.body, {attributes: true});"
        "new MutationObserver(() => heard = Math.max(heard,"
        " document.querySelector('#it span').style.getPropertyValue('--level')))"
        ".observe(document.querySelector('#it span'), {attributes: true}); 0"
    )
    call(page)
    wait_words(page, "the sky is blue")
    wait_state(page, "speaking")
    wait_state(page, "listening")  # it has said it all
    page.wait("document.querySelector('#delay').textContent.includes('buffer')", "the delay")
    page.click("#talk")

    assert page.text("#state") == "The call has ended"
    assert page.text("#trouble") == ""
    assert page.evaluate("[...states]") >= ["connecting"]
    assert page.evaluate("heard") > 0.3
    assert page.text("#spoken").strip() == "the sky is blue"  # what screen readers are told
    both, rate = saved_recording(page)
    assert rate == RATE and both.shape[1] == 2
    assert loudest(both[:, 0]) > -30 and loudest(both[:, 1]) > -40
    # The answer begins after the question has.
    onset = [int(np.argmax(np.abs(side) > 0.05)) for side in both.T]
    assert onset[0] < onset[1]

    assert page.complaints() == []
    urls = page.requested()
    assert all(re.match(rf"(https?|ws)://127\.0\.0\.1:{server.port}/|blob:", url) for url in urls)
    assert any(f"{path}?" in url for url in urls)


def test_keys_talk_and_mute_but_not_while_one_types(server: Server, visit: Any) -> None:
    page = visit(server.url)
    page.press("t")
    wait_state(page, "listening")
    page.press("m")
    assert page.text("#state") == "Muted"
    assert page.evaluate("document.querySelector('#mute').getAttribute('aria-pressed')") == "true"
    page.press("m")
    page.click("#open-settings")
    page.evaluate("document.querySelector('[name=token]').focus()")
    page.press("t")
    assert page.evaluate("document.querySelector('[name=token]').value") == "t"
    assert page.text("#state") == "Listening"
    page.click("#settings .main")
    page.evaluate("document.querySelector('#talk').focus()")
    page.press("Enter")
    assert page.text("#state") == "The call has ended"


def test_settings_stay_in_the_browser(server: Server, visit: Any) -> None:
    page = visit(server.url)
    page.click("#open-settings")
    page.evaluate("document.querySelector('[name=seed]').focus()")
    for key in "42":
        page.press(key)
    page.click("[name=noise]")
    page.click("#settings .main")
    page.go(server.url)
    page.click("#open-settings")
    assert page.evaluate("document.querySelector('[name=seed]').value") == "42"
    assert page.evaluate("document.querySelector('[name=noise]').checked") is False
    assert page.evaluate("document.querySelector('[name=echo]').checked") is True


# ---- refusals ----------------------------------------------------------------------------------


def test_one_talks_one_waits_one_is_refused(narrow: Server, visit: Any) -> None:
    address = f"{narrow.url}#token={TOKEN}"
    first, second, third = (visit(address) for _ in range(3))
    assert TOKEN not in first.evaluate("location.href")
    call(first)
    second.click("#talk")
    wait_state(second, "waiting")
    assert second.text("#state") == "Waiting in line: you are number 1"
    third.click("#talk")
    wait_state(third, "ended")
    assert third.text("#trouble") == "All places are taken: try again in a while."
    first.click("#talk")
    wait_state(second, "listening")


def test_a_wrong_token_is_said(narrow: Server, visit: Any) -> None:
    page = visit(narrow.url, token="a-wrong-one")
    page.click("#talk")
    wait_state(page, "ended")
    assert "token" in page.text("#trouble")


def test_a_refused_microphone_is_said(server: Server, visit: Any) -> None:
    page = visit(server.url)
    page.browser.call(
        "Browser.setPermission",
        permission={"name": "microphone"},
        setting="denied",
        origin=server.url,
        browserContextId=page.context,
    )
    page.click("#talk")
    wait_state(page, "ended")
    assert "allow" in page.text("#trouble")


def test_a_page_that_is_not_secure_says_what_to_do(narrow: Server, visit: Any) -> None:
    page = visit(f"http://moshi.test:{narrow.port}/")
    page.click("#talk")
    wait_state(page, "ended")
    assert "https" in page.text("#trouble")


def test_a_call_that_is_cut_goes_on_with_the_next_server(visit: Any) -> None:
    with serving() as first:
        page = visit(first.url)
        call(page)
        first.end(signal.SIGKILL)
    wait_state(page, "reconnecting")
    assert page.text("#trouble") != ""
    with serving(port=first.port):
        wait_state(page, "listening")
        assert page.text("#trouble") == ""
    page.click("#talk")
    assert page.text("#state") == "The call has ended"


# ---- parts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(server: Server, browser: Browser) -> Iterator[Page]:
    """A page whose scripts can be imported, and the helpers that the scripts below share."""
    page = browser.open(server.url)
    page.evaluate(
        "window.bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));"
        "window.text = bytes => btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''));"
        "window.tone = (hz, rate, n) =>"
        " Float32Array.from({length: n}, (_, i) => 0.5 * Math.sin(2 * Math.PI * hz * i / rate));"
        "0"
    )
    yield page
    page.close()


def in_base64(data: bytes) -> str:
    return json.dumps(base64.b64encode(data).decode())


def tone_level(pcm: np.ndarray, hz: float, rate: int) -> tuple[float, float]:
    """dB of the tone in the middle of a sound, and of the rest of it, over the tone's 0.5."""
    pcm = pcm[len(pcm) // 4 : -len(pcm) // 4]
    time = np.arange(len(pcm)) / rate
    waves = np.stack([np.sin(2 * np.pi * hz * time), np.cos(2 * np.pi * hz * time)], 1)
    weights, *_ = np.linalg.lstsq(waves, pcm, rcond=None)
    rest = pcm - waves @ weights
    return (
        20 * np.log10(np.hypot(*weights) / 0.5 + 1e-9),
        20 * np.log10(np.sqrt(2 * np.mean(rest**2)) / 0.5 + 1e-9),
    )


def test_what_the_page_encodes_is_an_ogg_stream_of_opus(parts: Page) -> None:
    encoded = parts.evaluate(
        "(async () => {"
        " const {OpusEncoder} = await import('/page/opus.js');"
        " const {joined} = await import('/page/ogg.js');"
        " const pages = [], encoder = new OpusEncoder(page => pages.push(page), console.error);"
        " const sound = tone(440, 24000, 24000);"
        " for (let at = 0; at < sound.length; at += 480)"
        "  encoder.push(sound.slice(at, at + 480));"
        " await encoder.encoder.flush();"
        " return text(joined(pages)); })()"
    )
    pcm, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="float32")
    assert rate in (24000, 48000) and len(pcm) >= 0.9 * rate
    level, rest = tone_level(pcm, 440, rate)
    assert abs(level) < 1 and rest < -20


def test_what_others_encode_is_decoded_in_any_slices(parts: Page) -> None:
    sound = speech("what colour is the sky?", "en-us+m3", 150)
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="OGG", subtype="OPUS")
    decoded = parts.evaluate(
        "(async () => {"
        " const {OpusDecoder} = await import('/page/opus.js');"
        " const parts = [], decoder = new OpusDecoder(part => parts.push(part), console.error);"
        f" const stream = bytes({in_base64(file.getvalue())});"
        " for (let at = 0, size = 1; at < stream.length; at += size, size = size * 7 % 1009)"
        "  decoder.push(stream.subarray(at, at + size));"
        " await decoder.decoder.flush();"
        " const pcm = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));"
        " let at = 0; for (const part of parts) { pcm.set(part, at); at += part.length; }"
        " return text(new Uint8Array(pcm.buffer)); })()"
    )
    got = np.frombuffer(base64.b64decode(decoded), "<f4")
    lag = int(np.argmax(np.correlate(got[: len(sound) // 2 + 2400], sound[: len(sound) // 2])))
    common = min(len(got) - lag, len(sound))
    assert np.corrcoef(got[lag : lag + common], sound[:common])[0, 1] > 0.95


OGG = """
(async () => {
  const { OggReader, OggWriter, joined } = await import("/page/ogg.js");
  const packet = (size, first) => new Uint8Array(size).fill(7).map((b, i) => i ? b : first);
  const sizes = [1, 254, 255, 256, 510, 3000];
  const writer = new OggWriter(24000);
  const pages = sizes.map((size, i) => writer.append(packet(size, 8 + i)));
  const read = (stream, step) => {
    const reader = new OggReader(), found = [];
    for (let at = 0; at < stream.length; at += step)
      found.push(...reader.append(stream.subarray(at, at + step)));
    return found.map((p) => [p[0] - 8, p.length]);
  };
  const whole = joined(pages);
  const damaged = whole.slice();
  damaged[pages[0].length + pages[1].length + 40] ^= 1;
  const garbage = crypto.getRandomValues(new Uint8Array(5000));
  return {
    sizes, whole: read(whole, whole.length), bytes: read(whole, 1), damaged: read(damaged, 100),
    after: read(joined([garbage, whole]), 333), late: read(whole.subarray(pages[0].length + 9), 50),
  };
})()
"""


def test_ogg_pages_survive_slices_damage_and_a_late_start(parts: Page) -> None:
    found = parts.evaluate(OGG)
    packets = [[i, size] for i, size in enumerate(found["sizes"])]
    assert found["whole"] == found["bytes"] == found["after"] == packets
    assert found["damaged"] == packets[:2] + packets[3:]
    assert found["late"] == packets[2:]


def test_a_packet_may_go_on_in_the_next_page(parts: Page) -> None:
    begun = bytes(ogg.Page(0, 0, 1, 0, bytes([10, 255]), bytes([1]) * 10 + bytes([2]) * 255))
    ended = bytes(
        ogg.Page(ogg.CONTINUED, 0, 1, 1, bytes([45, 5]), bytes([2]) * 45 + bytes([3]) * 5)
    )

    def packets(*pages: bytes) -> list[list[int]]:
        return parts.evaluate(
            "import('/page/ogg.js').then(({OggReader}) => "
            f"new OggReader().append(bytes({in_base64(b''.join(pages))}))"
            ".map(packet => [packet[0], packet.length]))"
        )

    assert packets(begun, ended) == [[1, 10], [2, 300], [3, 5]]
    assert packets(ended) == [[3, 5]]  # its begin was lost
    assert packets(begun, begun) == [[1, 10], [1, 10]]  # its end was lost


@pytest.mark.parametrize(
    ("source", "target"), [(48000, 24000), (44100, 24000), (24000, 48000), (24000, 44100)]
)
def test_resampling_keeps_tones_and_adds_none(parts: Page, source: int, target: int) -> None:
    def resampled(hz: int) -> np.ndarray:
        data = parts.evaluate(
            "import('/page/resample.js').then(({Resampler}) => {"
            f" const r = new Resampler({source}, {target}), sound = tone({hz}, {source}, {source});"
            " const out = [];"
            " for (let at = 0; at < sound.length; at += 128)"
            "  out.push(...r.push(sound.slice(at, at + 128)));"
            " return text(new Uint8Array(Float32Array.from(out).buffer)); })"
        )
        return np.frombuffer(base64.b64decode(data), "<f4").astype(np.float64)

    kept = resampled(1000)
    assert abs(len(kept) - target) <= 200
    level, rest = tone_level(kept, 1000, target)
    assert abs(level) < 0.1 and rest < -60
    if source > target:
        assert 20 * np.log10(np.abs(resampled(15000)[1000:-1000]).max() / 0.5) < -60


JITTER = """
(async () => {
  const { JitterBuffer } = await import("/page/jitter.js");
  const buffer = new JitterBuffer(24000);
  const frame = () => new Float32Array(1920).fill(0.25);
  const seconds = (s, arrives) => {
    const out = new Float32Array(480), played = [];
    for (let i = 0; i < 50 * s; i++) {
      if (arrives && i % 4 === 0) buffer.push(frame());
      buffer.pull(out);
      played.push(...out);
    }
    return { margin: buffer.margin, level: buffer.level, underruns: buffer.underruns,
             trimmed: buffer.trimmed, largest: Math.max(...played),
             step: Math.max(...played.map((x, i) => i ? Math.abs(x - played[i - 1]) : 0)) };
  };
  const found = {};
  found.steady = seconds(5, true);
  found.gap = seconds(0.4, false);
  found.again = seconds(2, true);
  for (let i = 0; i < 12; i++) buffer.push(frame());
  found.burst = seconds(4, true);
  return found;
})()
"""


def test_the_jitter_buffer_learns_from_gaps_and_trims_lag(parts: Page) -> None:
    found = parts.evaluate(JITTER)
    steady, gap, again, burst = (found[name] for name in ("steady", "gap", "again", "burst"))
    assert steady["underruns"] == 0 and steady["trimmed"] == 0
    assert gap["underruns"] == again["underruns"] == 1
    assert gap["margin"] > steady["margin"]
    # A second of sound that came at once is cut out again, and no cut is heard as a click.
    assert burst["trimmed"] > 0.9 * RATE
    assert burst["level"] < burst["margin"] + 0.13 * RATE
    assert max(part["step"] for part in found.values()) < 0.02
    assert max(part["largest"] for part in found.values()) <= 0.25


def test_the_page_takes_a_servers_word_that_it_does_not_keep_up(parts: Page) -> None:
    told = parts.evaluate(
        "import('/page/links.js').then(({ChatLink, PcmLink}) => {"
        " const told = [];"
        " const events = {late: () => told.push('late'), waiting: (place) => told.push(place)};"
        " const links = [ChatLink, PcmLink].map((kind) =>"
        "  Object.assign(Object.create(kind.prototype), {events}));"
        " for (const note of [{type: 'overrun', late: 3}, {position: 2}, {type: 'lagging'}]) {"
        "  const text = JSON.stringify(note);"
        "  links[0].received(Uint8Array.of(6, ...new TextEncoder().encode(text)).buffer);"
        "  links[1].received(text);"
        " }"
        " return told;"
        "})"
    )
    assert told == ["late", "late", 2, 2]


# ---- the wheel ---------------------------------------------------------------------------------


def test_every_file_of_the_page_is_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    page = Path("moshi_c", "server", "page")
    files = {file.name: file.read_bytes() for file in (root / page).iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / page).iterdir()} == files


def test_every_file_of_the_page_is_served(server: Server) -> None:
    import urllib.request

    import moshi_c.server

    files = sorted((Path(moshi_c.server.__file__).parent / "page").iterdir())
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    assert len(files) >= 10
    for file in files:
        name = "" if file.name == "index.html" else f"page/{file.name}"
        with urllib.request.urlopen(server.url + name, timeout=PATIENCE_S) as answer:
            assert answer.read() == file.read_bytes(), file.name
            assert answer.headers.get_content_type() == kinds.get(file.suffix, "text/html")
            policy = answer.headers["Content-Security-Policy"]
            assert "unsafe" not in policy and "'self'" in policy
