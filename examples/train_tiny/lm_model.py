"""moshi-tiny: upstream's language model with smaller numbers, and the losses that train it.

Upstream's own forward pass takes one tensor as input and as target. Here they differ, because
inputs are spoilt on purpose: in a call the model hears its own mistakes, and a user whom the codec
renders badly. The depth model learns only where somebody speaks or will, and at a few silent
frames: silence is quickly learnt and is most of a conversation.

The weights are upstream's modules, and `temporal` and `depth` compute what those compute, in fewer
and larger operations: a model this small spends its time between them. A step is a third faster.
`compare` holds both against each other.

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


def temporal(lm: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, 17, T] to the hidden states [B, T, D] and the logits of the text."""
    hidden = _embedded(lm, tokens)
    batch, frames, width = hidden.shape
    attention = lm.transformer.layers[0].self_attn
    heads, period = attention.num_heads, lm.transformer.max_period
    head_width = width // heads
    times = torch.arange(frames, device=hidden.device)
    powers = torch.arange(head_width // 2, device=hidden.device) * (2 / head_width)
    angles = times[:, None] * float(period) ** -powers
    turns = torch.polar(torch.ones_like(angles), angles)
    back = times[:, None] - times
    mask = torch.zeros(frames, frames, device=hidden.device)
    mask.masked_fill_((back < 0) | (back >= attention.context), -torch.inf)

    def turned(rows: Tensor) -> Tensor:
        """Rotary positions: neighbouring elements are one complex number."""
        pairs = torch.view_as_complex(rows.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(rows.dtype)

    for layer in lm.transformer.layers:
        rows = layer.self_attn.in_projs[0](layer.norm1(hidden))
        rows = rows.view(batch, frames, 3, heads, head_width).permute(2, 0, 3, 1, 4)
        query, key, value = rows.unbind(0)
        query, key = turned(query), turned(key)
        seen = F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype))
        seen = seen.transpose(1, 2).reshape(batch, frames, width)
        hidden = hidden + layer.self_attn.out_projs[0](seen)
        gate, value = layer.gating.linear_in(layer.norm2(hidden)).chunk(2, -1)
        hidden = hidden + layer.gating.linear_out(F.silu(gate) * value)
    hidden = lm.out_norm(hidden)
    return hidden, lm.text_linear(hidden)


def _embedded(lm: Any, tokens: Tensor) -> Tensor:
    """The sum of a frame's embeddings, from one table of all; HIDDEN adds nothing."""
    tables = [lm.text_emb.weight, *(embedding.weight for embedding in lm.emb)]
    sizes = torch.tensor([0] + [len(table) for table in tables[:-1]], device=tokens.device)
    columns = tokens.transpose(1, 2).flatten(0, 1)
    entries = columns.clamp(min=0) + sizes.cumsum(0)
    shown = (columns != HIDDEN).float()
    table = torch.cat(tables)
    summed = F.embedding_bag(entries, table, mode="sum", per_sample_weights=shown)
    return summed.view(tokens.shape[0], tokens.shape[2], -1)


def depth(lm: Any, hidden: Tensor, columns: Tensor) -> Tensor:
    """Hidden states [N, D] and the tokens of their frames [N, 17] to logits [N, 8, codes]: each
    code from the text and the codes before it. Codebooks come first in the working shapes, since
    each has weights of its own."""

    def together(layers: Any) -> Tensor:
        return torch.stack([layer.weight.t() for layer in layers])

    embeddings = [lm.depformer_text_emb, *lm.depformer_emb]
    tokens = [embedding(columns[:, row]) for row, embedding in enumerate(embeddings)]
    state = torch.matmul(hidden, together(lm.depformer_in)) + torch.stack(tokens)
    codebooks, count, _ = state.shape
    for layer in lm.depformer.layers:
        attention = layer.self_attn
        rows = torch.bmm(layer.norm1(state), together(attention.in_projs))
        rows = rows.view(codebooks, count, 3, attention.num_heads, -1).permute(2, 1, 3, 0, 4)
        seen = F.scaled_dot_product_attention(*rows.unbind(0), is_causal=True)
        seen = seen.permute(2, 0, 1, 3).flatten(2)
        state = state + torch.bmm(seen, together(attention.out_projs))
        entry, exit_ = (
            together([getattr(gating, name) for gating in layer.gating])
            for name in ("linear_in", "linear_out")
        )
        gate, value = torch.bmm(layer.norm2(state), entry).chunk(2, -1)
        state = state + torch.bmm(F.silu(gate) * value, exit_)
    return torch.bmm(state, together(lm.linears)).transpose(0, 1)


@torch.no_grad()
def compare(lm: Any) -> None:
    """Raises where `temporal` or `depth` give anything else than upstream's forward passes."""
    tokens = torch.randint(HIDDEN, TEXT_TOKENS, (2, lm.num_codebooks, 130))
    hidden, text = temporal(lm, tokens)
    wanted_hidden, wanted_text = lm.forward_text(tokens)
    columns = tokens[0].t().clamp(min=0)
    sound = depth(lm, hidden[0], columns)
    wanted_sound = lm.forward_depformer_training(columns[:, :, None], hidden[0][:, None])
    for name, ours, theirs in (
        ("hidden states", hidden, wanted_hidden),
        ("text logits", text, wanted_text[:, 0]),
        ("sound logits", sound, wanted_sound[:, :, 0]),
    ):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{name} differ from upstream's by {(ours - theirs).abs().max()}")


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
            hidden, text_logits = temporal(self.lm, inputs)
            chosen = self._depth_frames(batch.speaking)
            columns = wanted.transpose(1, 2)[chosen]
            sound_logits = depth(self.lm, hidden[chosen], columns)
            heard_logits = self.heads(hidden)
        text, text_figures = self._text_loss(text_logits.float(), wanted[:, 0])
        sound, sound_figures = self._sound_loss(sound_logits.float(), columns[:, OWN])
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
