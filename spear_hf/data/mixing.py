# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Noise mixing and token mixing: what is added to an utterance in pre-training, and what it predicts then.

Noise mixing adds noise and leaves the targets clean. Token mixing adds a second utterance, of which every target in
the overlap is taken with the probability beta, the second's share of the power (paper: separation, diarisation and
enhancement improve, recognition stays as it was).

What is drawn is a function of (seed, epoch, utterance id) and of the training utterances with their lengths, never of
the batch that an utterance comes in. The paper takes the second "from the batch"; here it is drawn from the whole
corpus, or window of it, among the utterances of like length, of which a batch of the sampler consists anyway, so that
an example can be made again alone, on any rank, in any worker and after a resume.

A mixture never gets longer than its first utterance, which is what the sampler has counted: the second is not
truncated, but the row is a window, drawn at random, of as many samples as the first has. So batches keep their caps of
seconds, with their padding, and a row holds any part of a mixture: the first alone, both, or the second alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from ..mvq.alignment import IGNORED
from .audio import SAMPLING_RATE
from .manifest import Utterance
from .ranges import Range, check_ranges
from .seeding import keyed_generator
from .utterances import known_domains, listed
from .windows import members


# By what share of the first's length that of the second may differ: the least with which there is a second. In a batch
# the lengths differ by about twice `data.length_jitter`, 10 %.
LENGTH_TOLERANCES = (0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class MixingConfig:
    """What is added to the training utterances. The default is nothing, `MixingConfig.paper()` the paper's setting."""

    noise_probability: Annotated[float, Range(0, 1)] = 0.0
    """Share of the utterances that noise is added to (paper: 0.4 to 0.5)."""

    noise_manifest: str | None = None
    """A manifest or a folder of noise; null: the training utterances of domain audio."""

    noise_snr: tuple[Annotated[float, Range(-100, 100)], ...] = (10.0, 20.0)
    """Lowest and highest ratio, in dB, of the utterance's power to the noise's."""

    token_probability: Annotated[float, Range(0, 1)] = 0.0
    """Share of the utterances of speech that a second utterance, with its tokens, is added to (paper: 0.1)."""

    token_snr: tuple[Annotated[float, Range(-100, 100)], ...] = (-5.0, 5.0)
    """Lowest and highest ratio, in dB, of the first utterance's power to the second's."""

    token_offset_seconds: Annotated[float, Range(0, 1e6)] = 2.0
    """The second begins at most so many seconds after the first, and before the first ends."""

    token_second: Literal["speech", "any"] = "speech"
    """What the second utterance may be: speech (the paper's recipe) or any (its text)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("noise_snr", "token_snr"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise ValueError(f"{name} must be two numbers of dB, the lower one first, not {list(bounds)}.")

    @classmethod
    def paper(cls) -> "MixingConfig":
        """The paper's setting for its v2 models."""
        return cls(noise_probability=0.5, token_probability=0.1)


@dataclass(frozen=True)
class TokenMix:
    """What is drawn for an utterance that a second one is added to."""

    second: int
    """Index of the second utterance."""
    snr: float
    """Power of the first over that of the second, in dB."""
    offset: int
    """The second's first sample on the first's time: a multiple of the grid of tokens."""
    window: float
    """In [0, 1): where the row lies in the mixture."""


@dataclass(frozen=True)
class NoiseMix:
    """What is drawn for an utterance that noise is added to."""

    clip: Utterance
    snr: float
    start: float
    """In [0, 1): where in the clip the noise begins."""


def mean_power(waveform: np.ndarray) -> float:
    """Mean of the squares of (samples,), summed in float64."""
    samples = waveform.astype(np.float64)
    return float(samples @ samples) / max(len(samples), 1)


def gain(main_power: float, second_power: float, snr: float) -> float:
    """What to multiply the second with to have main over second at `snr` dB. Both powers must be positive."""
    return float(np.sqrt(main_power * 10 ** (-snr / 10) / second_power))


def replacement_probability(snr: float) -> float:
    """beta: the second's share of the power of the sum, g^2 P_second / (P_main + g^2 P_second)."""
    return float(1 / (1 + 10 ** (snr / 10)))


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr: float, start: float) -> np.ndarray | None:
    """(samples,) float32 with noise, or None where one of the two is silent.

    A longer clip of noise is cut, from a place of the share `start` of those that fit. A shorter one is repeated,
    beginning at the share `start` of it. The ratio holds for what is added, not for the whole clip.
    """
    size = len(waveform)
    if len(noise) >= size:
        first = int(start * (len(noise) - size + 1))
        noise = noise[first : first + size]
    else:
        noise = np.resize(np.roll(noise, -int(start * len(noise))), size)
    main_power, noise_power = mean_power(waveform), mean_power(noise)
    if main_power == 0 or noise_power == 0:
        return None
    return waveform + np.float32(gain(main_power, noise_power, snr)) * noise


def mix_waveforms(main: np.ndarray, second: np.ndarray, snr: float, offset: int) -> np.ndarray | None:
    """The sum, with `second` from sample `offset` on: (max(len(main), offset + len(second)),) float32.

    `snr` is of the mean powers of the whole utterances, not of the overlap. None where one of the two is silent: then
    no gain gives the ratio.
    """
    main_power, second_power = mean_power(main), mean_power(second)
    if main_power == 0 or second_power == 0:
        return None
    mixture = np.zeros(max(len(main), offset + len(second)), dtype=np.float32)
    mixture[: len(main)] = main
    mixture[offset : offset + len(second)] += np.float32(gain(main_power, second_power, snr)) * second
    return mixture


def mix_tokens(
    main: np.ndarray, second: np.ndarray, offset: int, probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Tokens (tokens, codebooks) of a mixture in which `second` begins at token `offset`; int64, -100 where none is.

    In the overlap each (token, codebook) is the second's with `probability`, independently. Before and after it stands
    the one that sounds there alone.
    """
    stop = offset + len(second)
    mixed = np.full((max(len(main), stop), main.shape[1]), IGNORED, dtype=np.int64)
    mixed[: len(main)] = main
    both = max(0, min(len(main), stop) - offset)  # tokens of the overlap
    replaced = rng.random((both, main.shape[1])) < probability
    mixed[offset : offset + both] = np.where(replaced, second[:both], mixed[offset : offset + both])
    mixed[offset + both : stop] = second[both:]
    return mixed


class Mixer:
    """Draws what is added to each utterance in each epoch.

    Args:
        config: with a probability of 0, nothing is drawn of that kind.
        utterances: of training; those without a domain count as speech.
        lengths: their samples, after cropping to the longest crop.
        noise: clips of noise; None: the utterances of domain audio.
        seed: of all draws.
        grid: samples; the second utterance begins at a multiple of it, so that tokens stay aligned.
        windows: of each utterance, from 0 on: what is mixed is of one window (windows.py). None: all are of one.

    Raises:
        ValueError: there is no noise, or no utterance to add to another, in some window.
    """

    def __init__(
        self,
        config: MixingConfig,
        utterances: Sequence[Utterance],
        lengths: np.ndarray,
        noise: Sequence[Utterance] | None,
        seed: int,
        grid: int,
        windows: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self.utterances = listed(utterances)
        self.seed = seed
        self.grid = grid
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) != len(utterances):
            raise ValueError(f"{len(utterances)} utterances to mix, but {len(self.lengths)} lengths.")
        self.windows = np.zeros(len(utterances), dtype=np.int64) if windows is None else windows
        groups = members(self.windows)
        audio = known_domains(self.utterances).among(["audio"])
        self.noise = [self.utterances.take(group[audio[group]]) for group in groups]
        if noise is not None:
            self.noise = [listed(noise)] * len(groups)
        where = "" if windows is None else " of one of the windows (data.window_shards)"
        if config.noise_probability and not all(self.noise):
            raise ValueError(
                f"There is no noise to mix in, as no training utterance{where} is of domain audio: name a folder or "
                "manifest of noise with mixing.noise_manifest, or set mixing.noise_probability=0."
            )
        self._by_length = []
        for group in groups:
            eligible = group if config.token_second == "any" else group[~audio[group]]
            if config.token_probability and not audio[group].all() and len(eligible) < 2:
                raise ValueError(
                    f"Token mixing needs two utterances{where} of {config.token_second}, and there is one: set "
                    "mixing.token_probability=0."
                )
            self._by_length.append(eligible[np.argsort(self.lengths[eligible], kind="stable")])
        self._sorted_lengths = [self.lengths[by_length] for by_length in self._by_length]

    def token_mix(self, index: int, epoch: int) -> TokenMix | None:
        """The second utterance for `index` in `epoch`; None for most, and for all of domain audio."""
        utterance = self.utterances[index]
        if self.config.token_probability == 0 or utterance.domain == "audio":
            return None
        rng = keyed_generator(self.seed, epoch, utterance.id, "token mixing")
        if rng.random() >= self.config.token_probability:
            return None
        length = int(self.lengths[index])
        latest = min(self.config.token_offset_seconds * SAMPLING_RATE, length)
        return TokenMix(
            second=self._draw_second(index, length, rng),
            snr=_uniform(rng, self.config.token_snr),
            offset=int(rng.uniform(0, latest)) // self.grid * self.grid,
            window=rng.random(),
        )

    def _draw_second(self, index: int, length: int, rng: np.random.Generator) -> int:
        """Uniformly one of the eligible utterances of like length, but not `index`."""
        by_length, lengths = (values[self.windows[index]] for values in (self._by_length, self._sorted_lengths))
        for tolerance in LENGTH_TOLERANCES:
            low = int(np.searchsorted(lengths, length * (1 - tolerance), side="left"))
            high = int(np.searchsorted(lengths, length * (1 + tolerance), side="right"))
            if high - low >= 2:  # one of them is `index`, which is speech
                break
        else:
            low, high = 0, len(by_length)
        # The one drawn too many stands for `index` itself, wherever it is.
        drawn = int(by_length[rng.integers(low, high - 1)])
        return int(by_length[high - 1]) if drawn == index else drawn

    def tokens(
        self, index: int, epoch: int, target: str, main: np.ndarray, second: np.ndarray, mix: TokenMix, offset: int
    ) -> np.ndarray:
        """`mix_tokens` for teacher `target`, at whose rate `offset` is counted."""
        rng = keyed_generator(self.seed, epoch, self.utterances[index].id, "token mixing", target)
        return mix_tokens(main, second, offset, replacement_probability(mix.snr), rng)

    def noise_mix(self, index: int, epoch: int) -> NoiseMix | None:
        """The noise for `index` in `epoch`, or None. An utterance is never its own noise."""
        if self.config.noise_probability == 0:
            return None
        utterance = self.utterances[index]
        rng = keyed_generator(self.seed, epoch, utterance.id, "noise mixing")
        if rng.random() >= self.config.noise_probability:
            return None
        clips = self.noise[self.windows[index]]
        clip = clips[int(rng.integers(len(clips)))]
        mix = NoiseMix(clip, snr=_uniform(rng, self.config.noise_snr), start=rng.random())
        return None if clip.path == utterance.path else mix


def _uniform(rng: np.random.Generator, bounds: tuple[float, ...]) -> float:
    low, high = bounds
    return float(rng.uniform(low, high))
