"""Trains mimi-tiny on speech that espeak-ng makes meanwhile.

    python train_codec.py RUN --minutes 150                         # from nothing
    python train_codec.py RUN --minutes 150                         # the same again: goes on
    python train_codec.py RUN --minutes 40 --warm-start mimi-tiny.safetensors

RUN/state.pt holds everything to go on from: weights, optimiser, random generators, the clips at
hand, steps and time. It is replaced every two minutes, at Ctrl-C, and at SIGTERM. The learning
rate is a cosine over training time; time in which the process stood still does not count, and
giving other --minutes when going on stretches or shortens what is left.

The same seed draws the same sentences, voices, crops and noise. Going on is not bit for bit the
same as never having stopped: the clips are rendered again, and espeak-ng's phase is then another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from codec_model import LABELS_PER_FRAME, CodecSize, SpectralLoss, TrainedCodec
from corpus import MODEL_VOICE, Talk, split, user_voice
from espeak import LABEL_SAMPLES, NO_LABEL, Espeak
from mimi_tiny import FRAME_SAMPLES
from moshi.quantization.core_vq import EuclideanCodebook
from numpy.typing import NDArray
from torch import Tensor, nn

SAVE_SECONDS = 120
REPORT_STEPS = 100
HEAD_LEARNING_RATE = 2e-3  # while it learns alone
STANDSTILL_SECONDS = 20  # a step this long was a pause of the process and not work


@dataclass(frozen=True)
class Settings:
    """What makes one run differ from another; kept in the state file."""

    seed: int = 0
    batch: int = 6
    frames: int = 16  # of 80 ms in each crop
    learning_rate: float = 1e-3
    warm_up: int = 100
    free_steps: int = 400  # from nothing: steps before the quantiser comes
    head_steps: int = 0  # after a warm start: steps that train the new phoneme head alone
    pool: int = 3000  # clips at hand
    fresh: int = 40  # clips replaced at each report
    time_weight: float = 0.5
    commitment_weight: float = 0.25
    phoneme_weight: float = 0.2


@dataclass(frozen=True)
class Clip:
    from_model: bool
    pcm: NDArray[np.int16]
    labels: NDArray[np.int16]


class Clips:
    """An endless supply of sentences: seed and n decide the text and the voice of clip n."""

    def __init__(self, seed: int) -> None:
        self._seed, self._espeak, self._talk = seed, Espeak(), Talk()
        self._exchanges = split().trained

    def make(self, serial: int) -> Clip:
        generator = random.Random(f"{self._seed}/{serial}")
        from_model = generator.random() < 0.5
        voice = MODEL_VOICE if from_model else user_voice(generator)
        text = self._talk.sentence(generator)
        if generator.random() < (0.6 if from_model else 0.5):
            exchange = generator.choice(self._exchanges)
            text = exchange.spoken if from_model else exchange.question
        speech = self._espeak.speak(text, voice)
        pcm = (speech.pcm.clip(-1, 1) * 32767).astype(np.int16)
        return Clip(from_model, pcm, speech.labels())


class Batches:
    """Crops of clips at random offsets. Users get gains and noise; what is wanted stays clean."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._clips = settings, Clips(settings.seed)
        self._random = random.Random(settings.seed)
        self._noise = np.random.default_rng(settings.seed)
        self._next = settings.pool
        self._serials = list(range(settings.pool))
        self._pool: list[Clip] = []

    def state(self) -> dict[str, Any]:
        return {
            "random": self._random.getstate(),
            "noise": self._noise.bit_generator.state,
            "next": self._next,
            "serials": self._serials,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._random.setstate(state["random"])
        self._noise.bit_generator.state = state["noise"]
        self._next, self._serials, self._pool = state["next"], list(state["serials"]), []

    def refresh(self, count: int) -> None:
        for _ in range(count):
            place = self._random.randrange(len(self._serials))
            self._serials[place], self._next = self._next, self._next + 1
            if self._pool:
                self._pool[place] = self._clips.make(self._serials[place])

    def _offset(self, clip: Clip, length: int) -> int:
        """Where the clip begins in the crop: often before it, so that all parts are heard."""
        if self._random.random() >= 0.8:
            return 0
        reach = max(0, len(clip.pcm) - length // 2) // LABEL_SAMPLES
        offset = self._random.randrange(-reach, length // 2 // LABEL_SAMPLES) * LABEL_SAMPLES
        # The model's answers begin on a frame, and so do they here.
        return offset // FRAME_SAMPLES * FRAME_SAMPLES if clip.from_model and offset > 0 else offset

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Heard and wanted [B, 1, T], and phonemes [B, labels]."""
        if not self._pool:
            self._pool = [self._clips.make(serial) for serial in self._serials]
        rows, length = self._settings.batch, self._settings.frames * FRAME_SAMPLES
        wanted = np.zeros((rows, 1, length), np.float32)
        labels = np.zeros((rows, self._settings.frames * LABELS_PER_FRAME), np.int64)
        heard = wanted.copy()
        for row in range(rows):
            clip = self._random.choice(self._pool)
            offset = self._offset(clip, length)
            begin, end = max(0, offset), min(length, offset + len(clip.pcm))
            gain = 1.0 if clip.from_model else 10 ** (self._random.uniform(-12, 3) / 20)
            piece = clip.pcm[begin - offset : end - offset].astype(np.float32)
            wanted[row, 0, begin:end] = piece * np.float32(gain / 32767)
            named = clip.labels[(begin - offset) // LABEL_SAMPLES :]
            first = begin // LABEL_SAMPLES
            named = named[: labels.shape[1] - first]
            labels[row, first : first + len(named)] = named
            heard[row] = wanted[row]
            if not clip.from_model and self._random.random() < 0.7:
                level = 10 ** (self._random.uniform(-75, -45) / 20)
                heard[row] += self._noise.standard_normal((1, length), np.float32) * np.float32(
                    level
                )
        return torch.from_numpy(heard), torch.from_numpy(wanted), torch.from_numpy(labels)


class Trainer:
    """One run: model, optimiser, data, and the file that all of it comes back from."""

    def __init__(self, folder: Path, settings: Settings, device: str, bf16: bool) -> None:
        self.folder, self.settings, self.device, self.bf16 = folder, settings, device, bf16
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.size = CodecSize()
        self.model = TrainedCodec(self.size).to(device)
        self.model.initialise()
        self.model.train()
        self.loss = SpectralLoss().to(device)
        self.optimiser = self._optimiser()
        self.batches = Batches(settings)
        self.step, self.seconds, self.warm = 0, 0.0, False
        self.stopped = False

    def _optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.learning_rate,
            betas=(0.8, 0.99),
            weight_decay=1e-2,
        )

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def warm_start(self, weights: Path) -> None:
        """Takes the codec from a published file; the phoneme head stays new."""
        self.model = TrainedCodec(self.size, str(weights)).to(self.device)
        self.model.train()
        self.optimiser, self.warm = self._optimiser(), True

    def save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "size": asdict(self.size),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "batches": self.batches.state(),
            "torch_random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "warm": self.warm,
        }
        unfinished = self.state_file.with_suffix(".new")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.state_file)

    def resume(self) -> None:
        state = torch.load(self.state_file, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.batches.load(state["batches"])
        torch.set_rng_state(state["torch_random"].cpu())
        self.step, self.seconds, self.warm = state["step"], state["seconds"], state["warm"]
        # Upstream replaces unused codes every few steps, and keeps the count outside its state.
        quantised = max(0, self.step - self._steps_before_quantiser())
        for module in self.model.modules():
            if isinstance(module, EuclideanCodebook):
                module._next_unused_check -= quantised % module.check_unused_every

    def _steps_before_quantiser(self) -> int:
        return self.settings.head_steps if self.warm else self.settings.free_steps

    def _learning_rate(self, minutes: float) -> float:
        begun = self.step - (self.settings.head_steps if self.warm else 0)
        if begun < 0:
            return HEAD_LEARNING_RATE
        progress = min(1.0, self.seconds / (60 * minutes))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        return self.settings.learning_rate * min(1, (begun + 1) / self.settings.warm_up) * cosine

    def _phoneme_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)

    def _train_head(self, heard: Tensor, labels: Tensor) -> dict[str, float]:
        """A new head would pull at codebook 0 while it knows nothing: it learns alone at first."""
        self.model.eval()  # codebooks keep their means
        with torch.no_grad():
            latent = self.model.mimi._encode_to_unquantized_latent(heard)
            sound = self.model.mimi.quantizer.rvq_first(latent, self.model.mimi.frame_rate).x
        self.model.train()
        logits = self.model.head(sound.transpose(1, 2))
        loss = self._phoneme_loss(logits.view(len(heard), labels.shape[1], -1), labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return {"phoneme": loss.item()}

    def one_step(self, minutes: float) -> dict[str, float]:
        settings = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate(minutes)
        heard, wanted, labels = (tensor.to(self.device) for tensor in self.batches.draw())
        if self.warm and self.step < settings.head_steps:
            self.step += 1
            return self._train_head(heard, labels)
        quantise = self.step >= self._steps_before_quantiser()
        if not self.warm and self.step == settings.free_steps:
            crops = torch.cat([self.batches.draw()[0] for _ in range(96 // settings.batch + 1)])
            self.model.start_codebooks(crops.to(self.device), settings.batch * settings.frames)
        output = self.model(heard, quantise=quantise, bf16=self.bf16)
        parts = {
            "spectrum": self.loss(output.audio, wanted),
            "time": (output.audio - wanted).abs().mean(),
            "commitment": output.commitment,
            "phoneme": self._phoneme_loss(output.phonemes, labels),
        }
        total = (
            parts["spectrum"]
            + settings.time_weight * parts["time"]
            + settings.commitment_weight * parts["commitment"]
            + settings.phoneme_weight * parts["phoneme"]
        )
        self.optimiser.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        spoken = labels > 0
        right = output.phonemes.detach().argmax(-1) == labels
        return {
            **{name: part.item() for name, part in parts.items()},
            "right": right[spoken].float().mean().item() if spoken.any() else 0.0,
            "norm": float(norm),
            **output.figures,
        }

    def train(self, minutes: float) -> None:
        sums: dict[str, list[float]] = {}
        saved = began = time.monotonic()
        counted = 0
        while self.seconds < 60 * minutes and not self.stopped:
            before = time.monotonic()
            for name, value in self.one_step(minutes).items():
                sums.setdefault(name, []).append(value)
            counted += 1
            if self.step % REPORT_STEPS == 0:
                figures = {name: round(float(np.mean(values)), 4) for name, values in sums.items()}
                self._report(minutes, counted / (time.monotonic() - began), figures)
                sums, counted, began = {}, 0, time.monotonic()
                self.batches.refresh(self.settings.fresh)
            now = time.monotonic()
            if now - before < STANDSTILL_SECONDS:
                self.seconds += now - before
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = now
        self.save()

    def _report(self, minutes: float, speed: float, figures: dict[str, float]) -> None:
        line = {"step": self.step, "minutes": round(self.seconds / 60, 2), **figures}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        left = max(0.0, minutes - self.seconds / 60)
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{self.step:6}  {speed:4.1f} it/s  {left:5.1f} min left  {text}", flush=True)


def bf16_is_fast(device: str) -> bool:
    """Whether to compute in bf16: on GPUs, and on processors with instructions for it."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    information = Path("/proc/cpuinfo")
    return information.exists() and "avx512_bf16" in information.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of this run; an interrupted one goes on")
    parser.add_argument("--minutes", type=float, default=150.0, help="of training, in all")
    parser.add_argument("--warm-start", type=Path, help="a mimi-tiny.safetensors to begin with")
    parser.add_argument("--head-steps", type=int, default=150, help="after a warm start")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more gain little at this size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    bf16 = bf16_is_fast(arguments.device) if arguments.bf16 is None else arguments.bf16
    state = arguments.run / "state.pt"
    if state.exists():
        settings = Settings(**torch.load(state, weights_only=False, mmap=True)["settings"])
    else:
        settings = Settings(
            seed=arguments.seed,
            batch=arguments.batch,
            learning_rate=arguments.learning_rate,
            head_steps=arguments.head_steps if arguments.warm_start else 0,
        )
    trainer = Trainer(arguments.run, settings, arguments.device, bf16)
    if state.exists():
        trainer.resume()
        print(f"goes on from step {trainer.step}, minute {trainer.seconds / 60:.1f}", flush=True)
    elif arguments.warm_start:
        trainer.warm_start(arguments.warm_start)

    def stop(*_: object) -> None:
        trainer.stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    trainer.train(arguments.minutes)
    print(f"step {trainer.step}, minute {trainer.seconds / 60:.1f}: {trainer.state_file}")


if __name__ == "__main__":
    main()
