"""`/twilio/media` and `/twilio/answer`: telephone calls as Twilio's Media Streams carry them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import aiohttp
import numpy as np
import pytest
import serving as process_module
import sound
from callers import (
    PATIENT,
    Event,
    JsonCaller,
    all_over,
    connected,
    cut,
    get,
    in_time,
    scenario,
    serving,
    value,
)

import moshi_c
from moshi_c import Model, telephony
from moshi_c.server import Server, Settings
from moshi_c.server.twilio import TwilioWire, signature

pytestmark = pytest.mark.python

QUESTION, ANSWER = "what colour is the sky", "the sky is blue"
SECRET, URL = "0123456789abcdef0123456789abcdef", "https://phone.example"
SIGNED = {"token": "only for others", "twilio_token": SECRET, "public_url": URL}
PACKET = 160  # 20 ms
START = {
    "event": "start",
    "sequenceNumber": "1",
    "streamSid": "MZ0001",
    "start": {
        "streamSid": "MZ0001",
        "accountSid": "AC0001",
        "callSid": "CA0001",
        "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
        "customParameters": {},
    },
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=1) as model:
        yield model


@dataclass
class Telephone(JsonCaller):
    """Twilio's side of a call."""

    @property
    def notes(self) -> list[str]:
        return [event["event"] for event in self.events]

    async def send(self, event: Event | str) -> None:
        await self.socket.send_str(event if isinstance(event, str) else json.dumps(event))

    async def media(self, data: bytes, track: str = "inbound") -> None:
        payload = base64.b64encode(data).decode()
        media = {"track": track, "chunk": "1", "timestamp": "5", "payload": payload}
        await self.send({"event": "media", "streamSid": "MZ0001", "media": media})

    async def speak(self, data: bytes) -> None:
        """Mu-law in packets of 20 ms, in real time."""
        async for packet in in_time(cut(data, PACKET), 0.02):
            await self.media(packet)

    @property
    def voice(self) -> bytes:
        """What it has played."""
        media = [event for event in self.events if event["event"] == "media"]
        return b"".join(base64.b64decode(event["media"]["payload"]) for event in media)


def ringing(
    server: Server, path: str = "/twilio/media?seed=7"
) -> AbstractAsyncContextManager[Telephone]:
    """A call that is let in."""
    headers = {"X-Twilio-Signature": signature(SECRET, URL.replace("http", "ws") + path)}
    return connected(server, path, Telephone, headers=headers)


def in_process(model: Model, data: bytes) -> tuple[bytes, str]:
    """What a session by itself says to mu-law, as mu-law, and its words."""
    heard = telephony.BytesIn("pcmu", 8000, model.sample_rate)
    said = telephony.BytesOut("pcmu", 8000, model.sample_rate)
    pcm = heard.add(data)
    frames = pcm[: len(pcm) // model.frame_size * model.frame_size].reshape(-1, model.frame_size)
    with moshi_c.Session(model, seed=7) as session:
        answers = [session.step(frame) for frame in frames]
    voice = b"".join(said.add(frame.pcm) for frame in answers if frame.pcm is not None)
    return voice, "".join(frame.text for frame in answers)


@scenario
async def test_a_question_by_telephone_is_answered_in_mu_law(model: Model) -> None:
    asked = sound.question(QUESTION, before=0.5, after=3.0, level=0.5)
    line = telephony.encode(moshi_c.audio.resample(asked, 24000, 8000), "pcmu")
    expected, words = in_process(model, line)
    assert ANSWER in words.lower()
    async with serving(model, **SIGNED, **PATIENT) as server:
        async with ringing(server) as telephone:
            await telephone.send({"event": "connected", "protocol": "Call", "version": "1.0.0"})
            await telephone.send(START)
            await telephone.speak(line)
            await telephone.until(lambda: len(telephone.voice) >= len(expected))
            await telephone.send({"event": "stop", "streamSid": "MZ0001", "stop": {}})
            await telephone.finished()
            assert telephone.code == 1000
        assert value(server, "moshi_ended_total", reason="hung_up") == 1
        assert value(server, "moshi_ignored_messages_total") == 0
    assert telephone.voice == expected
    assert {event["streamSid"] for event in telephone.events} == {"MZ0001"}
    # a mark every second says how much came before it
    sent, marks = 0, 0
    for event in telephone.events:
        if event["event"] == "mark":
            assert event["mark"]["name"] == str(sent)
            marks += 1
        else:
            sent += len(base64.b64decode(event["media"]["payload"]))
    assert marks == sent // 8320, "the first frame with which a second is full: 13 of 640"


@scenario
async def test_who_has_not_signed_is_refused_in_one_sentence(model: Model) -> None:
    url = URL.replace("http", "ws") + "/twilio/media"
    signed = signature(SECRET, url)
    wrong = {
        "no signature": "",
        "another account's": signature("f" * 32, url),
        "of another path": signature(SECRET, url + "/"),
        "of the page for web browsers": signature(SECRET, URL + "/twilio/media"),
        "cut": signed[:-1],
        "no text": "\udcff",
    }
    async with serving(model, **SIGNED) as server, aiohttp.ClientSession() as http:
        for what, given in wrong.items():
            headers = {"X-Twilio-Signature": given} if given else {}
            async with http.get(server.url + "/twilio/media", headers=headers) as response:
                assert response.status == 403, what
                body = await response.json()
                assert body["error"] == "signature" and url in body["reason"], what
        assert value(server, "moshi_refused_total", reason="signature") == len(wrong)
        assert server._admission.busy == 0
        headers = {"X-Twilio-Signature": signed}
        async with http.get(server.url + "/twilio/media", headers=headers) as response:
            assert response.status == 426, "with the right one only the upgrade is missing"
        # a URL that names the usual port is signed with it
        headers = {"X-Twilio-Signature": signature(SECRET, url.replace(".example", ".example:443"))}
        async with http.get(server.url + "/twilio/media", headers=headers) as response:
            assert response.status == 426
    async with serving(model) as server, aiohttp.ClientSession() as http:
        for path in ("/twilio/media", "/twilio/answer"):
            async with http.get(server.url + path, headers=headers) as response:
                assert response.status == 404
                assert "--twilio-token" in (await response.json())["reason"]


def test_signatures_are_twilios() -> None:
    """The example of Twilio's own libraries."""
    fields = {
        "CallSid": "CA1234567890ABCDE",
        "Caller": "+14158675309",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
    }
    url = "https://mycompany.com/myapp.php?foo=1&bar=2"
    assert signature("12345", url, fields.items()) == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


@scenario
async def test_a_ringing_number_is_led_to_the_stream_or_hears_that_it_is_busy(model: Model) -> None:
    fields = {"CallSid": "CA0001", "From": "+15550001", "To": "+15550002", "Caller": "Zoë & Co"}
    headers = {"X-Twilio-Signature": signature(SECRET, URL + "/twilio/answer", fields.items())}
    # Twilio comes by the public name, and knows no token of ours
    headers["Host"] = "phone.example"
    async with (
        serving(model, **SIGNED) as server,
        aiohttp.ClientSession() as http,
    ):
        url = server.url + "/twilio/answer"
        async with http.post(url, data=fields, headers=headers) as response:
            assert (response.status, response.content_type) == (200, "text/xml")
            stream = ElementTree.fromstring(await response.text()).find("Connect/Stream")
            assert stream is not None and stream.get("url") == "wss://phone.example/twilio/media"
        async with http.post(url, data={**fields, "To": "+1"}, headers=headers) as response:
            assert response.status == 403
        async with http.post(url, data=b"x" * 70000, headers=headers) as response:
            assert response.status == 403, "no form, no fields"
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        async with http.post(url, data=b"x" * 70000, headers=headers | form) as response:
            assert response.status == 413
            assert "Too Large" in (await response.json())["reason"]
        for damage, body in (
            (form, b"To=\xff"),
            ({"Content-Type": f"{form['Content-Type']}; charset=none"}, b"To=1"),
            (form | {"Content-Encoding": "gzip"}, b"To=1"),
        ):
            async with http.post(url, data=body, headers=headers | damage) as response:
                assert response.status == 400, damage
                assert (await response.json())["error"] == "form"
        async with http.put(url, data=fields, headers=headers) as response:
            assert response.status == 405 and response.headers["Allow"] == "GET, POST"
        async with ringing(server), http.post(url, data=fields, headers=headers) as response:
            reject = ElementTree.fromstring(await response.text()).find("Reject")
            assert reject is not None and reject.get("reason") == "busy"
        await all_over(server)


@scenario
async def test_messages_without_meaning_are_counted_and_end_nothing(model: Model) -> None:
    deep = "[" * 100_000
    odd: list[Any] = [
        {"event": "media", "media": {"payload": "////"}},  # before "start"
        "no JSON",
        deep,
        "[]",
        "{}",
        {"event": 3},
        {"event": "hello"},
        {"event": "start"},
        {"event": "start", "start": "now"},
        {"event": "start", "start": {"streamSid": "x" * 1000}},
        START,
        START,
        {"event": "media"},
        {"event": "media", "media": "////"},
        {"event": "media", "media": {"payload": "not base64!"}},
        {"event": "media", "media": {"payload": 7}},
    ]
    fine: list[Any] = [
        {"event": "dtmf", "dtmf": {"digit": "5"}},
        {"event": "mark"},
        {"event": "mark", "mark": {"name": ["1"]}},
        {"event": "mark", "mark": {"name": "9" * 5000}},
        {"event": "media", "media": {"payload": ""}},
        {"event": "media", "media": {"track": "outbound", "payload": "////"}},
    ]
    async with serving(model, **SIGNED) as server:
        async with ringing(server) as telephone:
            for message in odd + fine:
                await telephone.send(message)
            await telephone.socket.send_bytes(b"\xff" * PACKET)
            for size in (1, 79, 16000):  # any length will do
                await telephone.media(b"\xff" * size)
            await telephone.until(lambda: "media" in telephone.notes)
            # all of those above but the first START, and the binary one
            ignored = value(server, "moshi_ignored_messages_total")
            assert ignored == len(odd) - 1 + 1
            await telephone.send("x" * (1 << 20) + "x")
            await telephone.finished()
            assert telephone.code == 1009
        await all_over(server)


@scenario
async def test_another_sound_than_mu_law_ends_the_call_with_the_reason(model: Model) -> None:
    start = json.loads(json.dumps(START))
    start["start"]["mediaFormat"]["encoding"] = "audio/x-alaw"
    async with serving(model, **SIGNED) as server, ringing(server) as telephone:
        await telephone.send(start)
        await telephone.finished()
        assert telephone.code == 4400
        assert not telephone.events, "Twilio takes no messages of errors"


def test_sound_that_waits_at_the_telephone_is_cleared_once(model: Model) -> None:
    wire = TwilioWire(rate=model.sample_rate)
    text = aiohttp.WSMsgType.TEXT

    def hear(event: dict[str, Any]) -> list[Any]:
        message = aiohttp.WSMessage(text, json.dumps(event), None)
        return [json.loads(each) for answer in wire.hear(message) for each in answer()]

    def second() -> list[str]:
        """Marks of a second and a bit of what the model says."""
        with moshi_c.Session(model, seed=1) as session:
            silence = np.zeros(model.frame_size, np.float32)
            frames = [session.step(silence) for _ in range(16)]
        said = [json.loads(e) for f in frames if f.pcm is not None for e in wire.sound(f.pcm, f)[0]]
        return [event["mark"]["name"] for event in said if event["event"] == "mark"]

    assert hear(START) == []
    (first,) = second()
    assert hear({"event": "mark", "mark": {"name": first}}) == [], "played as it came"
    late = [name for _ in range(3) for name in second()]
    answers = [hear({"event": "mark", "mark": {"name": name}}) for name in late]
    assert answers[0] == [{"event": "clear", "streamSid": "MZ0001"}]
    assert answers[1:] == [[]] * (len(late) - 1), "the marks that clear gives back"


@scenario
async def test_the_command_takes_the_url_and_the_secret_from_the_environment() -> None:
    names = {"MOSHI_C_TWILIO_TOKEN": SECRET, "MOSHI_C_PUBLIC_URL": URL + "/moshi/"}
    with pytest.MonkeyPatch.context() as patch:
        for name, text in names.items():
            patch.setenv(name, text)
        process = await asyncio.to_thread(
            process_module.Server, "--sessions", "1", "--token", "only for others"
        )
    headers = {"X-Twilio-Signature": signature(SECRET, URL + "/moshi/twilio/answer")}
    try:
        status, page, _ = await get(process.url[:-1], "/twilio/answer", headers=headers)
    finally:
        process.end()
    assert status == 200 and "wss://phone.example/moshi/twilio/media" in page


def test_a_public_name_lets_nobody_in_without_a_token_unasked() -> None:
    """By that name others reach all the paths, not Twilio's alone."""
    with pytest.raises(ValueError, match=r"phone\.example can be reached by others.*--token"):
        Settings(public_url=URL, twilio_token=SECRET)
    Settings(public_url=URL, twilio_token=SECRET, insecure=True)
    Settings(public_url="http://127.0.0.1:8998", twilio_token=SECRET)


def test_a_telephone_needs_both_the_secret_and_the_url() -> None:
    with pytest.raises(ValueError, match="--public-url"):
        Settings(twilio_token=SECRET)
    with pytest.raises(ValueError, match="--twilio-token"):
        Settings(twilio_token="", public_url=URL)
    for url in (
        "phone.example",
        "wss://phone.example",
        "HTTPS://phone.example",  # signatures are over the letters
        "https://",
        "https://a/?x=1",
        "https://a:x",
    ):
        with pytest.raises(ValueError, match="public_url"):
            Settings(public_url=url)
