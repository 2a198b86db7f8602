# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Utterances and their tokens -> batches of `SpearForPreTraining`.

The way of an utterance: decode, random crop, mixing with a second utterance and with noise, filter bank, masks, tokens
of the crop aligned with the encoder's frames. Each random choice depends on (seed, epoch, utterance id) alone, so
batches come out the same in whatever process, order or epoch position they are made.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..configuration_spear import SpearConfig
from ..feature_extraction_spear import SpearFeatureExtractor
from ..mvq.alignment import IGNORED, align_labels, label_ratio
from .audio import SAMPLING_RATE
from .bucketing import GlobalBatches, crop_window, split_batch
from .decoding import load_utterance
from .manifest import DOMAINS, Utterance
from .masking import MaskingConfig, sample_masks
from .mixing import Mixer, TokenMix, add_noise, mix_waveforms
from .segments import FrameGrid
from .utterances import UtteranceList, known_domains, listed


CROP_GRID = 640  # samples: 40 ms, a token of a 25 Hz teacher and two of a 50 Hz teacher

# Which utterances predict a teacher's tokens, by domain, where nothing else is said; all for names that are not here.
# This is the paper's asymmetric loss.
DEFAULT_DOMAINS: dict[str, Sequence[str]] = {"audio": ("audio",)}


class TokenShape(Protocol):
    """What the heads of a model depend on; a token store has it."""

    @property
    def num_codebooks(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def frame_rate(self) -> float: ...


class Tokens(TokenShape, Protocol):
    """What is needed of a token store."""

    def rows_of_utterances(self, utterances: UtteranceList) -> np.ndarray: ...

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, id: str) -> np.ndarray: ...


class MicroBatch(NamedTuple):
    """One forward pass: the model's arguments and what the loop wants to know of them."""

    inputs: dict[str, torch.Tensor]
    ids: list[str]
    domains: list[str]
    """Of each row: speech or audio."""
    num_items: int
    """Encoder frames with any target: what the loss is normalised by, summed over the global batch."""
    num_samples: int
    """Of audio, after cropping, without padding."""
    num_padded_samples: int
    """The same with padding."""
    num_mixed: int = 0
    """Utterances that a second one was added to."""
    num_noisy: int = 0
    """Utterances that noise was added to."""


@dataclass(frozen=True)
class Example:
    """One utterance of a batch."""

    id: str
    domain: str
    waveform: np.ndarray  # (samples,), cropped and mixed
    time_mask: np.ndarray  # (filter-bank frames,)
    feature_mask: np.ndarray  # (mel bins,)
    labels: dict[str, np.ndarray]  # per teacher (encoder frames, codebooks); absent where it has no target
    second: str | None = None  # id of the utterance that was added
    noisy: bool = False


class Crop(NamedTuple):
    """The part of an utterance that an epoch takes."""

    utterance: Utterance
    waveform: np.ndarray  # (samples,)
    start: int
    stop: int | None  # None at the utterance's end


def encoder_frames(num_frames: int, config: SpearConfig) -> int:
    """Frames of the last hidden state for so many frames of the filter bank."""
    return FrameGrid(config.output_downsampling_factor).frames(num_frames)


def check_tokens(
    utterances: Sequence[Utterance],
    stores: Mapping[str, Tokens],
    config: SpearConfig,
    domains: Mapping[str, Sequence[str] | None] | None = None,
) -> None:
    """ValueError unless every store fits the config's targets and holds the tokens that the utterances need."""
    domains = domains or {}
    targets = config.pretraining_targets or {}
    if set(stores) != set(targets):
        raise ValueError(f"Token stores {sorted(stores)} do not match the config's targets {sorted(targets)}.")
    for name, store in stores.items():
        per_frame, _ = label_ratio(store.frame_rate, SAMPLING_RATE / config.inputs_to_logits_ratio)
        have = (store.num_codebooks * per_frame, store.codebook_size)
        want = (targets[name]["num_codebooks"], targets[name]["codebook_size"])
        if have != want:
            raise ValueError(
                f"The {name} tokens have {have[0]} codebooks of {have[1]} entries at the encoder's frame rate, but "
                f"the config's target has {want[0]} of {want[1]}: use the other tokens or change the target."
            )
        needed = needing_target(name, utterances, domains.get(name))
        missing = list(needed.take(np.flatnonzero(store.rows_of_utterances(needed) < 0)).ids)
        if missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            cut = any(id.startswith(f"{missing[0]}@") for id in store)
            raise ValueError(
                f"{len(missing)} of {len(utterances)} utterances have no {name} tokens in the store: {shown}. "
                + (
                    "It has tokens of stretches of them: train on the manifest that `spear-hf segment` writes, or "
                    "tokenise with --cut none."
                    if cut
                    else "Tokenise the whole manifest, or leave them out of it."
                )
            )


def domain_of(utterance: Utterance) -> str:
    """Its domain; without one it counts as speech."""
    return utterance.domain or "speech"


def needs_target(name: str, domain: str | None, domains: Sequence[str] | None = None) -> bool:
    """Whether an utterance of `domain` predicts the tokens of teacher `name`. Without a domain it counts as speech.

    `domains` are those of the teacher; None: as the paper has it, `audio` for utterances of audio, any other for all.
    """
    chosen = DEFAULT_DOMAINS.get(name, DOMAINS) if domains is None else domains
    return (domain or "speech") in chosen


def needing_target(name: str, utterances: Sequence[Utterance], domains: Sequence[str] | None = None) -> UtteranceList:
    """Those of `utterances` for which `needs_target` holds."""
    chosen = [domain for domain in DOMAINS if needs_target(name, domain, domains)]
    return listed(utterances).take(np.flatnonzero(known_domains(utterances).among(chosen)))


class PreTrainingDataset:
    """Makes batches of utterances, masked and with labels.

    Args:
        utterances: of the manifest.
        stores: teacher name -> its tokens by utterance id; the teachers of `config.pretraining_targets`.
        config: of the model.
        feature_extractor: `SpearFeatureExtractor`.
        masking: None masks nothing.
        seed: of crops and masks.
        max_seconds: longer utterances are cropped, anew in every epoch.
        domain_max_seconds: domain -> the same for its utterances, where it differs.
        cache_audio: keep decoded audio in memory.
        offsets: teacher name -> by how many tokens its labels are taken later; 0 where it is not named.
        domains: teacher name -> domains of the utterances that predict its tokens; see `needs_target`.
        mixer: of the same utterances; None adds nothing to them.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        stores: Mapping[str, Tokens],
        config: SpearConfig,
        feature_extractor: SpearFeatureExtractor,
        masking: MaskingConfig | None,
        seed: int = 0,
        max_seconds: float = 10.0,
        domain_max_seconds: Mapping[str, float] | None = None,
        cache_audio: bool = False,
        offsets: Mapping[str, int] | None = None,
        domains: Mapping[str, Sequence[str] | None] | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        check_tokens(utterances, stores, config, domains)
        self.utterances = listed(utterances)
        self.stores = dict(stores)
        self.config = config
        self.feature_extractor = feature_extractor
        self.masking = masking
        self.seed = seed
        seconds = dict.fromkeys(DOMAINS, max_seconds) | dict(domain_max_seconds or {})
        self.max_samples = {domain: round(value * SAMPLING_RATE) for domain, value in seconds.items()}
        self.frame_rate = SAMPLING_RATE / config.inputs_to_logits_ratio
        self.offsets = dict(offsets or {})
        self.domains = dict(domains or {})
        self.mixer = mixer
        self._cache: dict[tuple[Path, int | None], np.ndarray] | None = {} if cache_audio else None

    def __len__(self) -> int:
        return len(self.utterances)

    def _waveform(self, utterance: Utterance) -> np.ndarray:
        """(samples,) float32; decoded once if there is a cache."""
        if self._cache is None:
            return load_utterance(utterance)
        place = (utterance.path, utterance.start)  # noise and utterances may share files
        if place not in self._cache:
            self._cache[place] = load_utterance(utterance)
        return self._cache[place]

    def _crop(self, index: int, epoch: int) -> Crop:
        """What `epoch` takes of utterance `index`."""
        utterance = self.utterances[index]
        waveform = self._waveform(utterance)
        longest = self.max_samples[domain_of(utterance)]
        start, stop = crop_window(len(waveform), longest, CROP_GRID, self.seed, epoch, utterance.id)
        return Crop(utterance, waveform[start:stop], start, stop if stop < len(waveform) else None)

    def needs(self, name: str, utterance: Utterance) -> bool:
        """Whether an utterance predicts the tokens of teacher `name`."""
        return needs_target(name, utterance.domain, self.domains.get(name))

    def _aligned(
        self, name: str, tokens: np.ndarray, start: int, stop: int | None, num_frames: int, utterance: Utterance
    ) -> np.ndarray:
        """Labels (num_frames, codebooks) of the samples [start, stop) of what has `tokens`; stop None: its end."""
        rate = self.stores[name].frame_rate
        offset = self.offsets.get(name, 0)
        first = round(start * rate / SAMPLING_RATE) + offset
        last = None if stop is None else math.ceil(stop * rate / SAMPLING_RATE) + offset
        try:
            return align_labels(tokens[first:last], rate, num_frames, self.frame_rate)
        except ValueError as error:
            raise ValueError(f"{name} tokens of utterance {utterance.id}: {error}") from None

    def _crop_tokens(self, name: str, crop: Crop) -> np.ndarray:
        """The tokens (tokens, codebooks) that the crop's samples span; -100 for a teacher that it does not predict."""
        store = self.stores[name]
        count = math.ceil(len(crop.waveform) * store.frame_rate / SAMPLING_RATE)
        if not self.needs(name, crop.utterance):
            return np.full((count, store.num_codebooks), IGNORED)
        first = round(crop.start * store.frame_rate / SAMPLING_RATE)
        return store[crop.utterance.id][first : first + count]

    def _mixture(
        self, main: Crop, mix: TokenMix, index: int, epoch: int, num_frames: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray], str] | None:
        """Waveform and labels of `main` with the second utterance, and its id; None where one of them is silent.

        The row has the samples of `main`, whose frames `num_frames` are: it is a window of the mixture.
        """
        assert self.mixer is not None
        second = self._crop(mix.second, epoch)
        mixture = mix_waveforms(main.waveform, second.waveform, mix.snr, mix.offset)
        if mixture is None:
            return None
        size = len(main.waveform)
        start = int(mix.window * ((len(mixture) - size) // CROP_GRID + 1)) * CROP_GRID
        stop = start + size if start + size < len(mixture) else None
        labels = {}
        for name, store in self.stores.items():
            if self.needs(name, main.utterance) or self.needs(name, second.utterance):
                parts = self._crop_tokens(name, main), self._crop_tokens(name, second)
                offset = round(mix.offset * store.frame_rate / SAMPLING_RATE)
                tokens = self.mixer.tokens(index, epoch, name, *parts, mix, offset)
                labels[name] = self._aligned(name, tokens, start, stop, num_frames, main.utterance)
        return mixture[start:stop], labels, second.utterance.id

    def _noisy(self, waveform: np.ndarray, index: int, epoch: int) -> np.ndarray | None:
        """`waveform` with the noise of `epoch`; None where none is added."""
        mix = None if self.mixer is None else self.mixer.noise_mix(index, epoch)
        return None if mix is None else add_noise(waveform, self._waveform(mix.clip), mix.snr, mix.start)

    def example(self, index: int, epoch: int) -> Example:
        """Utterance `index` as it is seen in `epoch`."""
        main = self._crop(index, epoch)
        utterance = main.utterance
        num_frames, num_bins = self.feature_extractor.num_frames(len(main.waveform)), self.config.num_mel_bins
        if self.masking is None:
            time_mask, feature_mask = np.zeros(num_frames, bool), np.zeros(num_bins, bool)
        else:
            time_mask, feature_mask = sample_masks(num_frames, num_bins, self.masking, self.seed, epoch, utterance.id)
        targets = encoder_frames(num_frames, self.config)
        mix = None if self.mixer is None else self.mixer.token_mix(index, epoch)
        mixture = None if mix is None else self._mixture(main, mix, index, epoch, targets)
        if mixture is None:
            waveform, second = main.waveform, None
            labels = {
                name: self._aligned(name, store[utterance.id], main.start, main.stop, targets, utterance)
                for name, store in self.stores.items()
                if self.needs(name, utterance)
            }
        else:
            waveform, labels, second = mixture
        noisy = self._noisy(waveform, index, epoch)  # last: its power is measured against all that is heard
        return Example(
            utterance.id,
            domain_of(utterance),
            waveform if noisy is None else noisy,
            time_mask,
            feature_mask,
            labels,
            second,
            noisy=noisy is not None,
        )

    def collate(self, examples: Sequence[Example]) -> MicroBatch:
        """Filter bank of all rows, padded on the right; masks are padded with False, labels with -100."""
        try:
            features = self.feature_extractor(
                [example.waveform for example in examples], sampling_rate=SAMPLING_RATE, return_tensors="pt"
            )
        except ValueError as error:
            ids = ", ".join(example.id for example in examples)
            raise ValueError(f"{error} (a batch of the utterances {ids})") from None
        rows, longest, bins = features["input_features"].shape
        targets = encoder_frames(longest, self.config)
        time_mask = torch.zeros(rows, longest, dtype=torch.bool)
        feature_mask = torch.zeros(rows, bins, dtype=torch.bool)
        labels = {
            name: torch.full((rows, targets, target["num_codebooks"]), IGNORED)  # (rows, encoder frames, codebooks)
            for name, target in (self.config.pretraining_targets or {}).items()
        }
        for row, example in enumerate(examples):
            time_mask[row, : len(example.time_mask)] = torch.from_numpy(example.time_mask)
            feature_mask[row] = torch.from_numpy(example.feature_mask)
            for name, aligned in example.labels.items():
                labels[name][row, : len(aligned)] = torch.from_numpy(aligned)
        inputs = {
            **features,
            "mask_time_indices": time_mask,
            "mask_feature_indices": feature_mask,
            **{f"{name}_labels": tensor for name, tensor in labels.items()},
        }
        return MicroBatch(
            inputs=inputs,
            ids=[example.id for example in examples],
            domains=[example.domain for example in examples],
            num_items=count_items(inputs),
            num_samples=sum(len(example.waveform) for example in examples),
            num_padded_samples=rows * max(len(example.waveform) for example in examples),
            num_mixed=sum(example.second is not None for example in examples),
            num_noisy=sum(example.noisy for example in examples),
        )

    def micro_batch(self, indices: Sequence[int] | np.ndarray, epoch: int) -> MicroBatch:
        """The utterances `indices` as they are seen in `epoch`."""
        return self.collate([self.example(int(index), epoch) for index in indices])

    def filler(self, index: int, epoch: int) -> MicroBatch:
        """A micro-batch without any target, for a rank that got no utterance: it adds nothing to loss or gradient."""
        batch = self.micro_batch([index], epoch)
        inputs = {
            name: torch.full_like(tensor, IGNORED) if name.endswith("_labels") else tensor
            for name, tensor in batch.inputs.items()
        }
        return MicroBatch(inputs, ids=[], domains=batch.domains, num_items=0, num_samples=0, num_padded_samples=0)


def count_items(inputs: Mapping[str, torch.Tensor]) -> int:
    """Encoder frames that have a target of any teacher."""
    has_target = [(tensor != IGNORED).any(dim=-1) for name, tensor in inputs.items() if name.endswith("_labels")]
    return int(torch.stack(has_target).any(dim=0).sum())


class StepDataset(Dataset[list[MicroBatch]]):
    """Item n: the micro-batches of one rank for the n-th optimiser step since the start of training.

    A map-style dataset over steps, so that loader workers may take steps in any order and a run resumes at any step.

    Args:
        dataset: what makes the batches.
        sampler: over the same utterances.
        rank, num_ranks: of this process.
        max_part_seconds: seconds of audio, padding included, that a micro-batch may have; None: no limit.
    """

    def __init__(
        self,
        dataset: PreTrainingDataset,
        sampler: GlobalBatches,
        rank: int = 0,
        num_ranks: int = 1,
        max_part_seconds: float | None = None,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.rank = rank
        self.num_ranks = num_ranks
        self.max_part_samples = None if max_part_seconds is None else round(max_part_seconds * SAMPLING_RATE)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        epoch, indices = self.sampler.batch(step)
        parts = split_batch(indices, self.sampler.lengths, self.num_ranks, self.max_part_samples)[self.rank]
        return [
            self.dataset.micro_batch(part, epoch) if len(part) else self.dataset.filler(int(indices[0]), epoch)
            for part in parts
        ]


def loader_arguments(num_workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader over a StepDataset: a step is an item, and workers keep two steps ready each."""
    if num_workers == 0:
        return {"batch_size": None}
    return {"batch_size": None, "num_workers": num_workers, "prefetch_factor": 2, "persistent_workers": True}
