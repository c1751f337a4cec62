"""Writes a trained codec in the published layout: mimi-tiny.safetensors and mimi_config.json.

    python export_codec.py RUN/state.pt RUN

The files are read back through upstream's get_mimi before the program ends, and must give the codes
and the sound of the model that was trained. An interrupted run can be exported as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from codec_model import CodecSize, TrainedCodec, published
from corpus import MODEL_VOICE
from espeak import Espeak
from mimi_tiny import CONFIG, FRAME_SAMPLES, WEIGHTS
from moshi.models import loaders
from moshi.models.compression import MimiModel
from safetensors.torch import save_file


def load_published(folder: Path) -> MimiModel:
    """The codec in a folder, through upstream's own loader."""
    config = json.loads((folder / CONFIG).read_text())
    return loaders.get_mimi(folder / WEIGHTS, config, num_codebooks=config["quantizer"]["n_q"])


@torch.no_grad()
def export(state_file: Path, folder: Path) -> None:
    state = torch.load(state_file, map_location="cpu", weights_only=False)
    codec = TrainedCodec(CodecSize(**state["size"]))
    codec.load_state_dict(state["model"])
    codec.eval()

    folder.mkdir(parents=True, exist_ok=True)
    tensors = published(codec.mimi.state_dict())
    save_file(tensors, folder / WEIGHTS, metadata={"steps": str(state["step"])})
    (folder / CONFIG).write_text(json.dumps(codec.size.config(), indent=1) + "\n")

    again = load_published(folder)
    pcm = torch.from_numpy(Espeak().speak("the files say what the model says", MODEL_VOICE).pcm)
    pcm = pcm[: len(pcm) // FRAME_SAMPLES * FRAME_SAMPLES][None, None]
    codes = codec.mimi.encode(pcm)
    if not torch.equal(codes, again.encode(pcm)):
        raise RuntimeError("the exported files give other codes than the trained model")
    if not torch.equal(codec.mimi.decode(codes), again.decode(codes)):
        raise RuntimeError("the exported files give another sound than the trained model")
    size = sum(tensor.numel() for tensor in tensors.values())
    print(f"{folder / WEIGHTS}: {size / 1e6:.2f} M numbers, after {state['step']} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("state", type=Path, help="state.pt of a run")
    parser.add_argument("folder", type=Path, help="where the two files go")
    arguments = parser.parse_args()
    export(arguments.state, arguments.folder)


if __name__ == "__main__":
    main()
