"""Trains moshi-tiny on the timelines that timelines.py makes, meanwhile or before.

    python train_lm.py RUN DATA                         # the same command goes on after a stop
    python train_lm.py RUN DATA --until 9000 --decay 2000

RUN/state.pt holds everything to go on from: weights, their running mean, optimiser, random
generators. It is replaced every three minutes, at Ctrl-C, and at SIGTERM. New shards in DATA are
read as they appear; shard 0 is kept for validation.

The learning rate rises, stays, and falls to nothing over the last --decay steps before --until.
Both may be given anew when going on: a run is brought to its end from any step, and a copy of its
state.pt in another folder can be, while the run itself goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_model import Batch, Spoil, TrainedLM, compare
from numpy.typing import NDArray
from torch import Tensor, nn
from train_codec import bf16_is_fast

SAVE_SECONDS = 180
REPORT_STEPS = 100
CHECK_STEPS = 500
MEAN_STEPS = 10  # between updates of the running mean of the weights
MEAN_KEEP = 0.98


@dataclass(frozen=True)
class Settings:
    """What makes one run differ from another; kept in the state file."""

    seed: int = 0
    batch: int = 10
    frames: int = 160  # of each crop: more than the model's context
    learning_rate: float = 1.5e-3
    warm_up: int = 300
    from_start: float = 0.2  # share of crops that begin where their timeline begins


class Shards:
    """All timelines at hand, in memory."""

    def __init__(self, data: Path, frames: int) -> None:
        self._data, self._frames = data, frames
        self._read: set[str] = set()
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._validation: dict[str, NDArray[Any]] | None = None

    def look(self) -> int:
        """Reads what is new; how many timelines there are."""
        for path in sorted(self._data.glob("shard*.npz")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            with np.load(path) as file:
                part = {name: file[name] for name in ("rows", "heard", "speaking", "engaged")}
            if path.name == "shard0000.npz":
                self._validation = part
            else:
                self._parts.append(part)
        return sum(len(part["rows"]) for part in self._parts)

    def _crops(self, crops: list[tuple[dict[str, NDArray[Any]], int, int]]) -> Batch:
        def stacked(name: str) -> NDArray[Any]:
            return np.stack(
                [part[name][line, ..., at : at + self._frames] for part, line, at in crops]
            )

        return Batch(
            rows=torch.from_numpy(stacked("rows").astype(np.int64)),
            heard=torch.from_numpy(stacked("heard").astype(np.int64)),
            speaking=torch.from_numpy(stacked("speaking")),
        )

    def draw(self, count: int, from_start: float, generator: np.random.Generator) -> Batch:
        """Crops at random, none that begins within an exchange: half a question has no answer."""
        crops = []
        for _ in range(count):
            part = self._parts[generator.integers(len(self._parts))]
            line, at = int(generator.integers(len(part["rows"]))), 0
            if generator.random() >= from_start:
                last = part["rows"].shape[2] - self._frames
                at = int(generator.choice(np.flatnonzero(~part["engaged"][line, : last + 1])))
            crops.append((part, line, at))
        return self._crops(crops)

    def validation(self, rows: int = 16) -> Iterator[Batch]:
        part = self._validation
        if part is not None:
            for first in range(0, len(part["rows"]), rows):
                lines = range(first, min(first + rows, len(part["rows"])))
                yield self._crops([(part, line, 0) for line in lines])


class Trainer:
    """One run: model, optimiser, data, and the file that all of it comes back from."""

    def __init__(
        self, folder: Path, data: Path, settings: Settings, device: str, bf16: bool
    ) -> None:
        self.folder, self.settings, self.device, self.bf16 = folder, settings, device, bf16
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.model = TrainedLM()
        compare(self.model.lm)
        self.model.to(device)
        self.mean = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.optimiser = self._optimiser()
        self.shards = Shards(data, settings.frames)
        self.random = np.random.default_rng(settings.seed)
        self.step = 0
        self.stopped = False

    def _optimiser(self) -> torch.optim.Optimizer:
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        others = [weight for weight in self.model.parameters() if weight.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "mean": self.mean,
            "optimiser": self.optimiser.state_dict(),
            "random": self.random.bit_generator.state,
            "torch_random": torch.get_rng_state(),
            "step": self.step,
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
        self.mean = state["mean"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.random.bit_generator.state = state["random"]
        torch.set_rng_state(state["torch_random"].cpu())
        self.step = state["step"]

    def _learning_rate(self, until: int, decay: int) -> float:
        rising = min(1.0, (self.step + 1) / self.settings.warm_up)
        falling = min(1.0, (until - self.step) / decay)
        return self.settings.learning_rate * min(rising, falling)

    def one_step(self, rate: float) -> dict[str, Tensor]:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        settings = self.settings
        batch = self.shards.draw(settings.batch, settings.from_start, self.random)
        total, figures = self.model.losses(batch.to(self.device), Spoil(), self.bf16)
        self.optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        if self.step % MEAN_STEPS == 0:
            self._update_mean()
        return figures

    @torch.no_grad()
    def _update_mean(self) -> None:
        """The mean of the last 500 steps or so: what the weights would be after a little decay."""
        keep = min(MEAN_KEEP, self.step / (self.step + 10 * MEAN_STEPS))
        for name, tensor in self.model.state_dict().items():
            self.mean[name].lerp_(tensor, 1 - keep)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """The figures of the mean weights on the validation shard, nothing spoilt."""
        checked = TrainedLM().to(self.device)
        checked.load_state_dict(self.mean)
        checked.eval()
        random = torch.get_rng_state()
        sums: dict[str, list[float]] = {}
        for batch in self.shards.validation():
            for name, value in checked.losses(batch.to(self.device), None, self.bf16)[1].items():
                sums.setdefault(name, []).append(value.item())
        torch.set_rng_state(random)
        return {name: float(np.mean(values)) for name, values in sums.items()}

    def train(self, until: int, decay: int) -> None:
        while self.shards.look() == 0:
            print("waits for shards", flush=True)
            time.sleep(20)
        sums: dict[str, list[Tensor]] = {}
        saved = began = time.monotonic()
        counted = 0
        while self.step < until and not self.stopped:
            rate = self._learning_rate(until, decay)
            for name, value in self.one_step(rate).items():
                sums.setdefault(name, []).append(value)
            counted += 1
            if self.step % REPORT_STEPS == 0:
                figures = {name: float(torch.stack(all_).mean()) for name, all_ in sums.items()}
                figures |= {"rate": rate, "timelines": self.shards.look()}
                self._report("train", until, figures, counted / (time.monotonic() - began))
                sums, counted, began = {}, 0, time.monotonic()
            if self.step % CHECK_STEPS == 0:
                self._report("check", until, self.check())
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _report(
        self, kind: str, until: int, figures: dict[str, float], speed: float | None = None
    ) -> None:
        rounded = {name: round(value, 5) for name, value in figures.items()}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, "kind": kind, **rounded}) + "\n")
        pace = ""
        if speed is not None:
            pace = f"{speed:4.2f} it/s  {(until - self.step) / speed / 3600:4.1f} h left  "
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{self.step:6} {kind}  {pace}{text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of this run; an interrupted one goes on")
    parser.add_argument("data", type=Path, help="folder of timelines.py")
    parser.add_argument("--until", type=int, default=30000, help="the last step")
    parser.add_argument("--decay", type=int, default=5000, help="steps of falling rate before it")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
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
            seed=arguments.seed, batch=arguments.batch, learning_rate=arguments.learning_rate
        )
    trainer = Trainer(arguments.run, arguments.data, settings, arguments.device, bf16)
    if state.exists():
        trainer.resume()
        print(f"goes on from step {trainer.step}", flush=True)

    def stop(*_: object) -> None:
        trainer.stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    trainer.train(arguments.until, arguments.decay)
    print(f"step {trainer.step}: {trainer.state_file}")


if __name__ == "__main__":
    main()
