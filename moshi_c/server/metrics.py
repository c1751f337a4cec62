"""Counts and times for Prometheus.

Names follow those of Kyutai's own server (`asr_connect`, `asr_open_channels`,
`asr_model_step_duration`, `asr_connection_num_steps`) with the prefix `moshi`.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.12, 0.25, 1.0)
_FRAMES = (2, 25, 125, 250, 500, 750, 1125, 1500, 2250, 3000, 4500)


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

    def text(self) -> bytes:
        """What `/metrics` says."""
        return generate_latest(self._registry)
