# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Utterances and their tokens -> batches of `SpearForPreTraining`.

The way of an utterance: decode, random crop, filter bank, masks, tokens of the crop aligned with the encoder's frames.
Each random choice depends on (seed, epoch, utterance id) alone, so batches come out the same in whatever process,
order or epoch position they are made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..configuration_spear import SpearConfig
from ..feature_extraction_spear import SpearFeatureExtractor
from ..mvq.alignment import IGNORED, align_labels, label_ratio
from .audio import SAMPLING_RATE, load_audio
from .bucketing import BucketingSampler, crop_window, split_batch
from .manifest import Utterance
from .masking import MaskingConfig, sample_masks
from .segments import FrameGrid


CROP_GRID = 640  # samples: 40 ms, a token of a 25 Hz teacher and two of a 50 Hz teacher

# Which utterances predict a teacher's tokens, by domain; None: all. The paper's asymmetric loss.
TARGET_DOMAINS: dict[str, frozenset[str] | None] = {"speech": None, "audio": frozenset({"audio"})}


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

    def __contains__(self, id: object) -> bool: ...

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


@dataclass(frozen=True)
class Example:
    """One utterance of a batch."""

    id: str
    domain: str
    waveform: np.ndarray  # (samples,), cropped
    time_mask: np.ndarray  # (filter-bank frames,)
    feature_mask: np.ndarray  # (mel bins,)
    labels: dict[str, np.ndarray]  # per teacher (encoder frames, codebooks); absent where it has no target


def encoder_frames(num_frames: int, config: SpearConfig) -> int:
    """Frames of the last hidden state for so many frames of the filter bank."""
    return FrameGrid(config.output_downsampling_factor).frames(num_frames)


def check_tokens(utterances: Sequence[Utterance], stores: Mapping[str, Tokens], config: SpearConfig) -> None:
    """ValueError unless every store fits the config's targets and holds the tokens that the utterances need."""
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
        missing = [utt.id for utt in utterances if needs_target(name, utt.domain) and utt.id not in store]
        if missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            raise ValueError(
                f"{len(missing)} of {len(utterances)} utterances have no {name} tokens in the store: {shown}. "
                "Tokenise the whole manifest, or leave them out of it."
            )


def domain_of(utterance: Utterance) -> str:
    """Its domain; without one it counts as speech."""
    return utterance.domain or "speech"


def needs_target(name: str, domain: str | None) -> bool:
    """Whether an utterance of `domain` predicts the tokens of teacher `name`. Without a domain it counts as speech."""
    domains = TARGET_DOMAINS[name]
    return domains is None or (domain or "speech") in domains


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
        cache_audio: keep decoded audio in memory.
        offsets: teacher name -> by how many tokens its labels are taken later; 0 where it is not named.
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
        cache_audio: bool = False,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        check_tokens(utterances, stores, config)
        self.utterances = list(utterances)
        self.stores = dict(stores)
        self.config = config
        self.feature_extractor = feature_extractor
        self.masking = masking
        self.seed = seed
        self.max_samples = round(max_seconds * SAMPLING_RATE)
        self.frame_rate = SAMPLING_RATE / config.inputs_to_logits_ratio
        self.offsets = dict(offsets or {})
        self._cache: dict[str, np.ndarray] | None = {} if cache_audio else None

    def __len__(self) -> int:
        return len(self.utterances)

    def _waveform(self, utterance: Utterance) -> np.ndarray:
        """(samples,) float32; decoded once if there is a cache."""
        if self._cache is None:
            return load_audio(utterance.path)
        if utterance.id not in self._cache:
            self._cache[utterance.id] = load_audio(utterance.path)
        return self._cache[utterance.id]

    def _labels(self, name: str, utterance_id: str, start: int, stop: int | None, num_frames: int) -> np.ndarray:
        """Tokens of the samples [start, stop), aligned: (num_frames, codebooks). `stop` is None at the audio's end."""
        store = self.stores[name]
        rate = store.frame_rate
        offset = self.offsets.get(name, 0)
        first = round(start * rate / SAMPLING_RATE) + offset
        last = None if stop is None else math.ceil(stop * rate / SAMPLING_RATE) + offset
        try:
            return align_labels(store[utterance_id][first:last], rate, num_frames, self.frame_rate)
        except ValueError as error:
            raise ValueError(f"{name} tokens of utterance {utterance_id}: {error}") from None

    def example(self, index: int, epoch: int) -> Example:
        """Utterance `index` as it is seen in `epoch`."""
        utterance = self.utterances[index]
        waveform = self._waveform(utterance)
        start, stop = crop_window(len(waveform), self.max_samples, CROP_GRID, self.seed, epoch, utterance.id)
        num_frames, num_bins = self.feature_extractor.num_frames(stop - start), self.config.num_mel_bins
        if self.masking is None:
            time_mask, feature_mask = np.zeros(num_frames, bool), np.zeros(num_bins, bool)
        else:
            time_mask, feature_mask = sample_masks(num_frames, num_bins, self.masking, self.seed, epoch, utterance.id)
        targets = encoder_frames(num_frames, self.config)
        labels = {
            name: self._labels(name, utterance.id, start, stop if stop < len(waveform) else None, targets)
            for name in self.stores
            if needs_target(name, utterance.domain)
        }
        domain = domain_of(utterance)
        return Example(utterance.id, domain, waveform[start:stop], time_mask, feature_mask, labels)

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
        return batch._replace(inputs=inputs, ids=[], num_items=0, num_samples=0, num_padded_samples=0)


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
        sampler: BucketingSampler,
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
