"""Writes moshi-tiny in the published layout, from a run that need not be finished.

    python export_lm.py RUN/state.pt DATA moshi-tiny

The folder gets config.json, the language model in bf16, codec, codec settings, and tokenizer. It is
read back through upstream's CheckpointInfo and by moshi_c before the program ends, and both must
say the same to the codes of a question.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import MODEL_VOICE
from espeak import Espeak
from lm_model import lm_config, published
from mimi_tiny import CODEC_FOLDER, CONFIG, FRAME_SAMPLES, WEIGHTS, Codes, StreamingCodec
from moshi.models.lm import LMGen
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file
from timelines import TOKENIZER

import moshi_c

LM_WEIGHTS = "model.safetensors"
SAMPLING = {"temp": 0.3, "temp_text": 0.2, "top_k": 50, "top_k_text": 10}


def load_upstream(folder: Path) -> CheckpointInfo:
    return CheckpointInfo.from_hf_repo(
        str(folder),
        moshi_weights=folder / LM_WEIGHTS,
        mimi_weights=folder / WEIGHTS,
        tokenizer=folder / TOKENIZER,
        config_path=folder / "config.json",
        mimi_config_path=folder / CONFIG,
    )


@torch.no_grad()
def upstream_says(folder: Path, codes: Codes) -> list[int]:
    """The text tokens of the most likely answer to the user's codes [8, T], by upstream."""
    # Any: upstream's annotations leave open what its loaders return.
    lm: Any = load_upstream(folder).get_moshi(device="cpu", dtype=torch.float32)
    generator = LMGen(lm, use_sampling=False)
    with generator.streaming(1):
        steps = [
            generator.step(frame) for frame in torch.from_numpy(codes.T).long()[:, None, :, None]
        ]
    return [int(said[0, 0, 0]) for said in steps if said is not None]


def moshi_c_says(folder: Path, codes: Codes) -> list[int]:
    model = moshi_c.load(folder, dtype="f32", threads=1)
    session = moshi_c.Session(model, text_temperature=0, audio_temperature=0)
    frames = [session.step_codes(frame, decode=False) for frame in codes.T.astype(np.int32)]
    return [frame.text_token for frame in frames if frame.text_token >= 0]


def export(state_file: Path, data: Path, codec: Path, folder: Path) -> None:
    state = torch.load(state_file, map_location="cpu", weights_only=False)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name.removeprefix("lm."): tensor
        for name, tensor in state["mean"].items()
        if name.startswith("lm.")
    }
    save_file(published(weights), folder / LM_WEIGHTS, metadata={"steps": str(state["step"])})
    for file in (codec / WEIGHTS, codec / CONFIG, data / TOKENIZER):
        shutil.copyfile(file, folder / file.name)
    config = lm_config() | {
        "moshi_name": LM_WEIGHTS,
        "mimi_name": WEIGHTS,
        "mimi_config_name": CONFIG,
        "tokenizer_name": TOKENIZER,
        "model_type": "moshi",
        "lm_gen_config": SAMPLING,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    speech = Espeak().speak("what is two plus three", MODEL_VOICE).pcm
    tail = 40 * FRAME_SAMPLES + -len(speech) % FRAME_SAMPLES
    question = StreamingCodec(folder).encode(np.pad(speech, (5 * FRAME_SAMPLES, tail))[None])[0]
    theirs, ours = upstream_says(folder, question), moshi_c_says(folder, question)
    if theirs != ours:
        raise RuntimeError(f"upstream reads the exported files as {theirs}, moshi_c as {ours}")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.1f} MB, after {state['step']} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("state", type=Path, help="state.pt of a run")
    parser.add_argument("data", type=Path, help="folder of timelines.py, for its tokenizer")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--codec", type=Path, default=CODEC_FOLDER, help="folder of the codec")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    export(arguments.state, arguments.data, arguments.codec, arguments.folder)


if __name__ == "__main__":
    main()
