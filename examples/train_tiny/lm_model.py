"""moshi-tiny: upstream's language model with smaller numbers, and the losses that train it.

Upstream's own forward pass takes one tensor as input and as target. Here they differ, because
inputs are spoilt on purpose: in a call the model hears its own mistakes, and a user whom the codec
renders badly. Its parts are called one by one, the depth model only where somebody speaks or will,
and at a few silent frames: silence is quickly learnt and is most of a conversation.

Listening heads name the last words that the user said, while the question lasts and until it is
answered. What the heads can read, the text can use; they are thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mimi_tiny import CODEBOOKS
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from timelines import HEARD_WORDS, PAD, TEXT_TOKENS, question_words
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CARD = 512
OWN = slice(1, 1 + CODEBOOKS)
USER = slice(1 + CODEBOOKS, 1 + 2 * CODEBOOKS)
HIDDEN = -1  # a token that embeds to nothing


def lm_config() -> dict[str, Any]:
    """The model's part of config.json. What the model remembers, `context`, is 8 s: longer than
    any question with its answer, and shorter than what it trains on, so that a call of any length
    is nothing new to it."""
    width, depth_width, growth = 256, 96, 4.125
    stream_delays = [0] + [1] * (CODEBOOKS - 1)
    return {
        "dim": width,
        "text_card": TEXT_TOKENS,
        "existing_text_padding_id": PAD,
        "n_q": 2 * CODEBOOKS,
        "dep_q": CODEBOOKS,
        "card": CARD,
        "num_heads": 4,
        "num_layers": 4,
        "hidden_scale": growth,
        "causal": True,
        "layer_scale": None,
        "context": 100,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": depth_width,
        "depformer_dim_feedforward": int(growth * depth_width),
        "depformer_num_heads": 4,
        "depformer_num_layers": 2,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": CODEBOOKS,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": [0, *stream_delays, *stream_delays],
    }


@dataclass(frozen=True)
class Batch:
    """Crops of timelines: rows [B, 17, T], heard [B, 4, T], speaking [B, T]."""

    rows: Tensor
    heard: Tensor
    speaking: Tensor

    def to(self, device: str) -> Batch:
        return Batch(self.rows.to(device), self.heard.to(device), self.speaking.to(device))


@dataclass(frozen=True)
class Spoil:
    """Shares of the inputs that are hidden or replaced while training."""

    own_frames: float = 0.25
    own_tokens: float = 0.1
    text: float = 0.05
    user_tokens: float = 0.08

    def apply(self, inputs: Tensor) -> None:
        """In place. Own frames vanish whole: what a word will be must be read from the question
        and the text, and not from how its sound began."""
        batch, _, frames = inputs.shape

        def drawn(share: float, *shape: int) -> Tensor:
            return torch.rand(shape, device=inputs.device) < share

        own, user = inputs[:, OWN], inputs[:, USER]
        wrong = torch.randint(0, CARD, own.shape, device=inputs.device)
        own[:] = torch.where(drawn(self.own_tokens, *own.shape), wrong, own)
        own.masked_fill_(drawn(self.own_frames, batch, 1, frames), HIDDEN)
        inputs[:, 0].masked_fill_(drawn(self.text, batch, frames), HIDDEN)
        user.masked_fill_(drawn(self.user_tokens, *user.shape), HIDDEN)


class TrainedLM(nn.Module):
    """Upstream's LMModel and the listening heads."""

    text_weight, pad_weight, first_codebook_weight = 2.0, 0.3, 4.0
    speech_share, silent_share = 0.5, 0.1  # of the frames, in the depth model's loss

    def __init__(self) -> None:
        super().__init__()
        # Any: upstream's annotations do not tell what its modules take.
        self.lm: Any = LMModel(device="cpu", dtype=torch.float32, **lm_config())
        self.heads = nn.Linear(self.lm.dim, HEARD_WORDS * len(question_words()))

    def losses(
        self, batch: Batch, spoil: Spoil | None, bf16: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and its parts with shares of right predictions."""
        start = self.lm._get_initial_token().expand(len(batch.rows), -1, -1)
        wanted = _delay_sequence(self.lm.delays, batch.rows, start)
        inputs = torch.cat([start, wanted[:, :, :-1]], dim=2)
        if spoil is not None:
            spoil.apply(inputs)
        # The fused attention is made for longer sequences: its backward pass is slower here.
        autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16)
        with autocast, sdpa_kernel(SDPBackend.MATH):
            hidden, text_logits = self.lm.forward_text(inputs)
            chosen = self._depth_frames(batch.speaking)
            columns = wanted.transpose(1, 2)[chosen][:, :, None]
            sound_logits = self.lm.forward_depformer_training(columns, hidden[chosen][:, None])
            heard_logits = self.heads(hidden)
        text, text_figures = self._text_loss(text_logits[:, 0].float(), wanted[:, 0])
        sound, sound_figures = self._sound_loss(sound_logits[:, :, 0].float(), columns[:, OWN, 0])
        words, word_figures = self._word_loss(heard_logits.float(), batch.heard)
        total = self.text_weight * text + sound + words
        return total, text_figures | sound_figures | word_figures

    def _depth_frames(self, speaking: Tensor) -> Tensor:
        """Of speech and its neighbours one half, of silence a little. Delayed codebooks have no
        target in the first column."""
        near = F.max_pool1d(speaking[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
        share = torch.where(near, self.speech_share, self.silent_share)
        chosen = torch.rand(near.shape, device=near.device) < share
        chosen[:, 0] = False
        return chosen

    def _text_loss(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        each = _cross_entropy(logits, wanted)
        weight = torch.where(wanted == PAD, self.pad_weight, 1.0)
        loss = (each * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == wanted)[wanted != PAD].float().mean()
        return loss, {"text": loss.detach(), "text right": right}

    def _sound_loss(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        each = _cross_entropy(logits, wanted).mean(0)
        weight = torch.ones_like(each)
        weight[0] = self.first_codebook_weight
        loss = (each * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == wanted).float().mean(0)
        figures = {"sound": loss.detach(), "first right": right[0], "rest right": right[1:].mean()}
        return loss, figures

    def _word_loss(self, logits: Tensor, heard: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`heard` is 0 where there is nothing to name."""
        batch, _, frames = heard.shape
        logits = logits.view(batch, frames, HEARD_WORDS, -1)
        wanted = heard.transpose(1, 2)
        named = wanted > 0
        if not named.any():
            return logits.sum() * 0, {}
        loss = F.cross_entropy(logits[named], wanted[named])
        right = (logits[named].argmax(-1) == wanted[named]).float().mean()
        return loss, {"words": loss.detach(), "words right": right}


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of each prediction; classes are the last dimension."""
    each = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
    return each.view(wanted.shape)


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An LMModel's state under the names of published files: the attention matrices of all weight
    sets in one tensor, bf16."""
    names = {".in_projs.": ".in_proj_weight", ".out_projs.": ".out_proj.weight"}
    packed: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        for part, whole in names.items():
            if part in name:
                base, rest = name.split(part)
                packed.setdefault(base + whole, {})[int(rest.split(".")[0])] = tensor
                break
        else:
            packed[name] = {0: tensor}
    return {
        name: torch.cat([sets[number] for number in range(len(sets))]).to(torch.bfloat16)
        for name, sets in packed.items()
    }
