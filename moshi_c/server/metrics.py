"""Counts and times for Prometheus, all with the prefix `moshi`.

What the server does has the names of Kyutai's own server (`asr_connect`, `asr_open_channels`,
`asr_model_step_duration`, `asr_connection_num_steps`). How evenly the sound of live calls runs has
the names and meanings of vLLM-Omni's load driver (`client_audio_packet_interval_ms` ...), seen from
the server's end of the line.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.12, 0.25, 1.0)
_FRAMES = (2, 25, 125, 250, 500, 750, 1125, 1500, 2250, 3000, 4500)
_INTERVALS_MS = (20, 40, 60, 70, 75, 80, 85, 90, 100, 120, 160, 250, 500, 1000, 2500)
_LATENESS_MS = (1, 2, 5, 10, 20, 40, 80, 160, 250, 500, 1000, 2500)
_RTF = (0.9, 0.95, 0.98, 0.99, 1.0, 1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0)
_COVERAGE = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
#: Seconds of sound that a listener may lack before it is an event.
_UNDERRUN = 0.1


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"moshi_{name}", text, labels, registry=registry)

        self.connect = counter("connect", "Calls that were let in, by protocol", "protocol")
        self.refused = counter("refused", "Requests that were refused, by reason", "reason")
        self.ended = counter("ended", "Calls that are over, by reason", "reason")
        self.steps = counter("total_steps", "Frames stepped in all calls")
        self.silence = counter("silence_steps", "Frames of silence in place of late input")
        self.late = counter("late_frames", "Answers not out within 80 ms of their input")
        self.dropped = counter("dropped_frames", "Frames that nobody heard, in or out", "direction")
        self.bad_samples = counter("bad_samples", "Samples that were not finite, now silence")
        self.ignored = counter("ignored_messages", "Messages that mean nothing here")
        self.open = Gauge("moshi_open_channels", "Callers who talk now", registry=registry)
        self.waiting = Gauge("moshi_waiting", "Callers in the line", registry=registry)
        self.step_seconds = Histogram(
            "moshi_model_step_duration",
            "Seconds from a frame's submission to its result, of one call",
            registry=registry,
            buckets=_STEPS,
        )
        self.answer_seconds = Histogram(
            "moshi_answer_duration",
            "Seconds from a frame's last byte in to its answer's last byte out",
            registry=registry,
            buckets=_STEPS,
        )
        self.call_steps = Histogram(
            "moshi_connection_num_steps", "Frames of a call", registry=registry, buckets=_FRAMES
        )

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"moshi_{name}", text, registry=registry, buckets=buckets)

        self.interval_ms = histogram(
            "client_audio_packet_interval_ms",
            "From one message of sound to the next",
            _INTERVALS_MS,
        )
        self.first_ms = histogram(
            "client_first_audio_after_stream_start_ms",
            "From a caller's first sound to the first sound back",
            _LATENESS_MS,
        )
        self.lateness_ms = histogram(
            "client_send_lateness_ms",
            "A caller's frames behind the schedule that the first one began",
            _LATENESS_MS,
        )
        self.rtf = histogram(
            "client_stream_rtf",
            "From a caller's first sound to the last sound back, over the time that this lasts",
            _RTF,
        )
        self.coverage = histogram(
            "frame_coverage_ratio", "Frames that came back, of those that came, by call", _COVERAGE
        )
        self.deficit = counter("frame_deficit", "Frames that came and were not answered")
        self.underrun_s = counter("audio_underrun_s", "Seconds for which listeners lacked sound")
        self.underruns = counter(
            "audio_underrun_event_count", "Times that a listener lacked 100 ms more"
        )

    def text(self) -> bytes:
        """What `/metrics` says."""
        return generate_latest(self._registry)


class Pace:
    """How evenly the sound of one live call runs."""

    def __init__(self, metrics: Metrics, frame_seconds: float) -> None:
        self._metrics, self._frame = metrics, frame_seconds
        self._in = self._out = 0  # frames
        self._begin = 0.0  # the first frame in
        self._last: float | None = None  # the last frame out
        self._ends = 0.0  # when a listener who plays at once has heard all that went out
        self._short = 0.0  # seconds of sound that were missing since the last event

    def came(self, now: float, frames: int) -> None:
        """Frames from the caller have become whole."""
        if not self._in:
            self._begin = now
        for _ in range(frames):
            due = self._begin + self._in * self._frame
            self._metrics.lateness_ms.observe(1e3 * max(0.0, now - due))
            self._in += 1

    def went(self, now: float) -> None:
        """A frame has gone to the caller."""
        self._out += 1
        if self._last is None:
            self._ends = now
            if self._out == 1:
                self._metrics.first_ms.observe(1e3 * (now - self._begin))
        else:
            self._metrics.interval_ms.observe(1e3 * (now - self._last))
        if now > self._ends:
            self._metrics.underrun_s.inc(now - self._ends)
            self._short += now - self._ends
        if self._short > _UNDERRUN:
            self._metrics.underruns.inc()
            self._short = 0.0
        self._ends = max(self._ends, now) + self._frame
        self._last = now

    def paused(self) -> None:
        """A frame was not sent because it is silence."""
        self._out += 1
        self._last = None

    def over(self) -> None:
        """The call has ended."""
        if not self._in or not self._out:
            return
        self._metrics.deficit.inc(max(0, self._in - self._out))
        self._metrics.coverage.observe(min(1.0, self._out / self._in))
        if self._last is not None:
            self._metrics.rtf.observe((self._last - self._begin) / (self._out * self._frame))
