"""mimi-tiny: upstream's Mimi with smaller numbers, and what training adds to it.

Three things differ from building upstream's model and training it as it comes.

Initial weights keep the variance. The usual ones shrink the signal by 3^0.5 in each convolution,
until the encoder gives the same latent for every sound and the network learns only the mean
spectrum. Here weights are N(0, gain^2 / fan_in), with a large first and a small last gain, since
speech has an rms of about 0.1.

The quantiser comes late. The network first trains with only the projections around it; then the
codebooks are set by k-means over real latents, level by level on the residuals.

A linear head names the phoneme of each 20 ms from codebook 0 alone. It makes that codebook say
what is said and not by whom, as distillation from a speech model does for the big Mimi, and it
is thrown away afterwards.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from espeak import LABEL_SAMPLES, PHONEMES, SAMPLE_RATE
from mimi_tiny import CODEBOOKS, FRAME_SAMPLES
from moshi.models import loaders
from torch import Tensor, nn

LABELS_PER_FRAME = FRAME_SAMPLES // LABEL_SAMPLES


@dataclass(frozen=True)
class CodecSize:
    """The numbers that make Mimi tiny; the rest is upstream's."""

    n_filters: int = 12
    width: int = 128
    heads: int = 4
    layers: int = 2
    feed_forward: int = 256
    context: int = 32  # steps of 40 ms; not beyond what a crop holds
    code_width: int = 32
    codes: int = 512
    codebooks: int = CODEBOOKS

    def config(self) -> dict[str, Any]:
        """The mimi_config.json of this size, for upstream's get_mimi."""
        config: dict[str, Any] = copy.deepcopy(loaders._mimi_config)
        config["seanet"].update(n_filters=self.n_filters, dimension=self.width)
        config["quantizer"].update(
            dimension=self.code_width,
            n_q=self.codebooks,
            bins=self.codes,
            input_dimension=self.width,
            output_dimension=self.width,
        )
        config["transformer"].update(
            d_model=self.width,
            num_heads=self.heads,
            num_layers=self.layers,
            dim_feedforward=self.feed_forward,
            context=self.context,
            input_dimension=self.width,
            output_dimensions=[self.width],
        )
        return config


@dataclass(frozen=True)
class Output:
    """One pass: audio [B, 1, T], phoneme logits [B, labels, phonemes], commitment, figures."""

    audio: Tensor
    phonemes: Tensor
    commitment: Tensor
    figures: dict[str, float] = field(default_factory=dict)


class TrainedCodec(nn.Module):
    """Upstream's MimiModel and the phoneme head."""

    def __init__(self, size: CodecSize, weights: str | None = None) -> None:
        super().__init__()
        self.size = size
        # Any: upstream's annotations do not tell what its modules take.
        self.mimi: Any = loaders.get_mimi(weights, size.config(), num_codebooks=size.codebooks)
        self.head = nn.Linear(size.width, LABELS_PER_FRAME * len(PHONEMES))

    def forward(self, audio: Tensor, *, quantise: bool = True, bf16: bool = False) -> Output:
        mimi, device = self.mimi, audio.device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            (latent,) = mimi.encoder_transformer(mimi.encoder(audio))
            latent = mimi._to_framerate(latent)
        latent = latent.float()  # codebooks are running sums, which bf16 cannot hold
        first, rest = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
        commitment, figures = latent.new_zeros(()), {}
        if quantise:
            one, others = first(latent, mimi.frame_rate), rest(latent, mimi.frame_rate)
            sound, more = one.x, others.x
            levels = self.size.codebooks
            commitment = (one.penalty + (levels - 1) * others.penalty) / levels
            figures = {
                name: float(result.metrics[key])
                for name, result, key in (
                    ("entropy0", one, "rvq_entropy"),
                    ("entropy", others, "rvq_entropy"),
                    ("expired", others, "rvq_expired"),
                )
                if key in result.metrics
            }
        else:
            sound, more = (q.output_proj(q.input_proj(latent)) for q in (first, rest))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            (hidden,) = mimi.decoder_transformer(mimi._to_encoder_framerate(sound + more))
            decoded = mimi.decoder(hidden)
        logits = self.head(sound.transpose(1, 2))
        return Output(
            audio=decoded.float(),
            phonemes=logits.view(len(audio), -1, len(PHONEMES)),
            commitment=commitment,
            figures=figures,
        )

    def initialise(self) -> None:
        """Weights that keep the variance of speech through the depth of the network."""
        encoder, decoder = _convolutions(self.mimi.encoder), _convolutions(self.mimi.decoder)
        for name, layer in (encoder | decoder | _convolutions(self.mimi.downsample)).items():
            fan_in: float = layer.in_channels // layer.groups * layer.kernel_size[0]
            if isinstance(layer, nn.ConvTranspose1d):
                fan_in /= layer.stride[0]
            gain = 0.5 if ".block.3." in name else 1.25
            nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        entry, exit_ = next(iter(encoder.values())), list(decoder.values())[-1]
        entry.weight.data *= 10 / 1.25
        exit_.weight.data *= 0.05 / 1.25
        for layer in _convolutions(self.mimi.upsample).values():
            nn.init.ones_(layer.weight)
        for quantiser in (self.mimi.quantizer.rvq_first, self.mimi.quantizer.rvq_rest):
            nn.init.orthogonal_(quantiser.input_proj.weight.data[:, :, 0])
            nn.init.normal_(quantiser.output_proj.weight, std=self.size.code_width**-0.5)

    @torch.no_grad()
    def start_codebooks(self, audio: Tensor, frames_per_batch: int) -> None:
        """Sets every codebook by k-means over the latents of `audio` [B, 1, T]."""
        was_training = self.training
        self.eval()
        rows = torch.split(audio, 4)
        latent = torch.cat([self.mimi._encode_to_unquantized_latent(row) for row in rows])
        for quantiser in (self.mimi.quantizer.rvq_first, self.mimi.quantizer.rvq_rest):
            residual = (
                quantiser.input_proj(latent).transpose(1, 2).reshape(-1, self.size.code_width)
            )
            for level in quantiser.vq.layers:
                book = level._codebook
                book._init_embedding(residual)
                # Counts as a batch gives them: the running means start where they will stay.
                scale = frames_per_batch / book.cluster_usage.sum()
                book.cluster_usage *= scale
                book.embedding_sum *= scale
                book._embedding = None
                residual = residual - book.decode(book._quantize(residual))
        self.train(was_training)


def _convolutions(module: nn.Module) -> dict[str, nn.Conv1d | nn.ConvTranspose1d]:
    """The convolutions by full name, in the order of the signal."""
    return {
        f"{id(module)}.{name}": layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))
    }


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A MimiModel's state under the names of published files: packed attention, float32."""
    renamed = {
        re.sub(r"\.in_projs\.0\.weight$", ".in_proj_weight", name).replace(
            ".out_projs.0.weight", ".out_proj.weight"
        ): tensor.detach().float().cpu().contiguous()
        for name, tensor in state.items()
    }
    assert len(renamed) == len(state), "two tensors under one published name"
    return renamed


# ---- the loss on spectra ---------------------------------------------------------------------


def mel_filters(n_fft: int, bands: int) -> Tensor:
    """Triangles on the mel scale up to half the sample rate, [bands, n_fft / 2 + 1]."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0)


class SpectralLoss(nn.Module):
    """Mean over three resolutions of the distance of mel magnitudes, mostly of their logarithm.

    The floor under the logarithm decides what counts: at 0.05 a soft consonant does, and the
    depth of a silence does not.
    """

    floor = 0.05
    resolutions = ((512, 48), (1024, 80), (2048, 80))

    def __init__(self) -> None:
        super().__init__()
        for n_fft, bands in self.resolutions:
            self.register_buffer(f"filters{n_fft}", mel_filters(n_fft, bands))
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft))

    def _mel(self, audio: Tensor, n_fft: int) -> Tensor:
        window = getattr(self, f"window{n_fft}")
        spectrum = torch.stft(audio[:, 0], n_fft, n_fft // 4, window=window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        # The small term keeps the slope of the root finite in digital silence.
        return torch.matmul(getattr(self, f"filters{n_fft}"), (power + 1e-8).sqrt())

    def forward(self, made: Tensor, wanted: Tensor) -> Tensor:
        total = made.new_zeros(())
        for n_fft, _ in self.resolutions:
            ours, theirs = self._mel(made, n_fft), self._mel(wanted, n_fft)
            decades = (ours + self.floor).log10() - (theirs + self.floor).log10()
            total = total + 2 * decades.abs().mean() + 0.5 * (ours - theirs).abs().mean()
        return total / len(self.resolutions)
