"""Every bound that the parity tests use, with the reason for its size. No test has its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A number and why it is that number."""

    value: float
    reason: str

    def __float__(self) -> float:
        return self.value


TABLE: dict[str, Bound] = {
    "logits_f32": Bound(
        1e-4,
        "largest difference of teacher-forced logits over their standard deviation. Two float32"
        " programs that add in another order are 1e-6 to 1e-5 apart; a wrong row is 1e-2 or more.",
    ),
    "greedy_margin": Bound(
        1e-5,
        "least lead of a greedy choice over the runner-up, in standard deviations of the logits,"
        " for which tokens are required to be equal: some ten times what rounding moves a logit."
        " Runs that have a closer call are replaced by another seed before anything is compared.",
    ),
    "heads_f32": Bound(1e-5, "probabilities of extra heads: as the logits, after a softmax."),
    "swap_is_felt": Bound(
        1e-3,
        "what swapping two rows of any matrix has to move a logit at least, in standard deviations:"
        " ten times `logits_f32`, so that the parity tests cannot miss it.",
    ),
    "bf16_no_worse": Bound(
        1.0,
        "distance of our bf16 logits from a float32 run on the same weights, over that of"
        " upstream's own bf16 run. We keep activations in float32 and only round keys and values.",
    ),
    "kl_random_int8": Bound(
        0.04,
        "Kullback-Leibler divergence from float32 in nats, the worst stream's mean, of a random"
        " model of width 128 whose logits amplify every error: 0.020 measured.",
    ),
    "kl_random_fp8": Bound(0.34, "the same; 0.167 measured: e4m3 has 4 bits of each number."),
    "kl_random_q8": Bound(0.035, "the same; 0.017 measured."),
    "kl_random_q4": Bound(2.5, "the same; 1.6 measured: a random model has no redundancy."),
    "top1_random_int8": Bound(
        0.8,
        "share of steps whose most likely token is float32's, the worst stream's; 0.87 measured.",
    ),
    "top1_random_fp8": Bound(0.62, "the same; 0.74 measured."),
    "top1_random_q8": Bound(0.8, "the same; 0.88 measured."),
    "top1_random_q4": Bound(0.3, "the same; 0.39 measured, 0.004 being chance."),
    "kl_tiny_int8": Bound(
        0.0013, "the divergence in a conversation of the package's model; 0.00065 measured."
    ),
    "kl_tiny_fp8": Bound(0.0092, "the same; 0.0046 measured."),
    "kl_tiny_q8": Bound(0.0013, "the same; 0.00064 measured."),
    "kl_tiny_q4": Bound(0.11, "the same; 0.053 measured: it is narrow, and 4 bits are felt."),
    "top1_tiny_int8": Bound(0.96, "the agreement in that conversation; 0.99 measured."),
    "top1_tiny_fp8": Bound(0.94, "the same; 0.97 measured."),
    "top1_tiny_q8": Bound(0.96, "the same; 0.98 measured."),
    "top1_tiny_q4": Bound(0.87, "the same; 0.94 measured."),
    "kl_random_kv_int8": Bound(
        0.0017, "the same of float32 weights with int8 keys and values; 0.0008 measured."
    ),
    "top1_random_kv_int8": Bound(0.92, "the agreement there; 0.96 measured."),
    "kl_tiny_kv_int8": Bound(5e-5, "the same of the package's model; 2.3e-5 measured."),
    "top1_tiny_kv_int8": Bound(0.98, "the agreement there; 1 measured."),
    "mimi_tie": Bound(
        1e-4,
        "two codes are as good as each other when their distances to the residual differ by less"
        " than this share. Upstream computes distances as a matrix product in float32, about 1e-5"
        " from the exact ones, and latents differ by 1e-6 between two float32 programs.",
    ),
    "mimi_frames": Bound(
        3,
        "frames out of 750 that may differ by such ties. Of 6000 decisions some 20 are closer than"
        " 1e-5 and one or two closer than the 1e-6 by which rounding moves them.",
    ),
    "mimi_sound": Bound(
        1e-5,
        "difference of decoded samples, full scale being 1. The signal is 0.1 RMS, float32 rounding"
        " through the decoder is 1e-7 to 1e-6.",
    ),
    "mimi_codes_bf16": Bound(
        0.9,
        "share of codes that the codec with bf16 weights gives as with float32 ones, over all eight"
        " codebooks of random weights: 0.96 measured; a frame that differs at one level differs at"
        " those behind it.",
    ),
    "mimi_codes_int8": Bound(0.75, "the same; 0.88 measured."),
    "mimi_snr_bf16": Bound(
        43, "decibels of the sound of the same codes over its difference; 49 measured."
    ),
    "mimi_snr_int8": Bound(
        36,
        "the same; 41 measured. Activations of 8 bits, which hiss, would be some ten lower.",
    ),
    "mimi_stream_window": Bound(
        1e-3,
        "what upstream's streaming and non-streaming sound must at least differ by once the ring is"
        " full (249 keys against 250), so that the test of that rule can tell them apart.",
    ),
    "session_clear": Bound(
        2e-5,
        "least relative lead of every codec decision of the live conversation. Ten times what"
        " rounding moves a distance, so that codes have to be equal, each and all.",
    ),
    "session_sound": Bound(
        1e-4,
        "difference of samples over a minute of conversation, full scale being 1.",
    ),
    "machines_sound": Bound(
        3e-7,
        "difference of samples between two machines' builds of the same kernels, full scale being"
        " 1. Codes are equal, so that only the decoder's calls of libm differ, in the last place;"
        " 6e-8 between x86 and ARM. A gelu that is 4e-5 off moves the sound by 9e-7.",
    ),
    "distinct_tokens": Bound(
        50, "a greedy stream with fewer different tokens would repeat itself and prove little."
    ),
    "distinct_codes": Bound(
        200, "different codes in each codebook over the minute; fewer would leave entries untried."
    ),
    "chance": Bound(
        1e-6,
        "a chi-square test fails below this probability. Seeds are fixed, so a test that passes"
        " once passes always; a distribution that is off by a top-k entry is far below it.",
    ),
}


def bound(name: str) -> float:
    """The value of a bound in the table."""
    return TABLE[name].value
