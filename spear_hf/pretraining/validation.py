# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Masked prediction on held-out audio, against always guessing each codebook's most frequent token (the unigram)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from ..data.audio import SAMPLING_RATE
from ..data.bucketing import BucketingSampler
from ..data.collation import MicroBatch, PreTrainingDataset, StepDataset, Tokens
from ..data.manifest import DOMAINS
from ..data.utterances import known_domains
from ..modeling_spear import SpearForPreTraining
from ..mvq.alignment import IGNORED
from ..mvq.atomic_files import write_atomically
from .corpus import Corpus
from .metrics import StepSums, codebooks_of, ratio
from .run_folder import RunFolder, read_record


# So many utterances are enough for the distribution of the tokens: 2,000 of 10 s are a million frames.
UNIGRAM_UTTERANCES = 2000


Some = TypeVar("Some", Sequence[str], np.ndarray)


def evenly_spaced(values: Some) -> Some:
    """At most twice `UNIGRAM_UTTERANCES` of them; so many are all of them another time."""
    return values[:: max(1, len(values) // UNIGRAM_UTTERANCES)]  # type: ignore[return-value]


class Unigram:
    """The distribution of each codebook's tokens, whatever the audio: what a model without input could know.

    Args:
        counts: (codebooks, entries), of the training tokens.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts
        self.most_frequent = torch.from_numpy(counts.argmax(axis=1))  # (codebooks,)
        smoothed = counts + 1.0  # a token that never occurred in training must not cost infinitely much
        self.log_probabilities = torch.from_numpy(np.log(smoothed / smoothed.sum(axis=1, keepdims=True)))

    @classmethod
    def of_tokens(cls, store: Tokens, ids: Sequence[str]) -> "Unigram":
        """Counted over the utterances `ids`, or evenly spaced ones if there are many."""
        counts = np.zeros((store.num_codebooks, store.codebook_size), dtype=np.int64)
        for utterance_id in evenly_spaced(ids):
            for codebook, codes in enumerate(store[utterance_id].T):
                counts[codebook] += np.bincount(codes, minlength=store.codebook_size)
        return cls(counts)

    def sums(self, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Over the `chosen` frames (batch, frames) with a target: [cross-entropy, correct, count], a codebook's mean.

        labels (batch, frames, codebooks); with several tokens a frame, the codebooks of each in turn.
        """
        chosen = chosen & (labels != IGNORED).any(dim=-1)
        rows = labels[chosen]  # (n, codebooks)
        repeats = rows.shape[1] // len(self.most_frequent)
        most_frequent = self.most_frequent.repeat(repeats)  # (codebooks,)
        log_probabilities = self.log_probabilities.repeat(repeats, 1)  # (codebooks, entries)
        known = rows != IGNORED
        per_frame = known.sum(dim=1).clamp(min=1)
        losses = -log_probabilities[torch.arange(rows.shape[1]), rows.clamp(min=0)]  # (n, codebooks)
        correct = ((rows == most_frequent) & known).sum(dim=1) / per_frame
        cost = (losses * known).sum(dim=1) / per_frame
        return torch.stack([cost.sum(), correct.sum().double(), torch.tensor(float(len(rows)), dtype=torch.float64)])


def load_unigrams(
    stores: Mapping[str, Tokens], corpus: Corpus, at_hand: np.ndarray, folder: RunFolder
) -> dict[str, Unigram]:
    """Of each teacher, counted over the training utterances `at_hand` at the run's first start, and read from then on.

    So a resumed run compares with what the run began with, whichever shards are there now.
    """
    if folder.unigrams.is_file():
        stored = read_record(folder.unigrams)
        return {name: Unigram(np.array(stored[name])) for name in stores}
    unigrams = {}
    for name, store in stores.items():
        heard = corpus.training.take(at_hand)
        with_tokens = np.flatnonzero(store.rows_of_utterances(heard) >= 0)
        unigrams[name] = Unigram.of_tokens(store, list(heard.take(evenly_spaced(with_tokens)).ids))
    counts = {name: unigram.counts.tolist() for name, unigram in unigrams.items()}
    write_atomically(folder.unigrams, json.dumps(counts).encode())
    return unigrams


class Validator:
    """Runs the model over the held-out utterances, masked the same way each time.

    Args:
        dataset: of the held-out utterances.
        lengths: their samples after cropping.
        unigrams: per teacher, of the training tokens.
        batch_seconds: of one forward pass, padding included.
    """

    def __init__(
        self,
        dataset: PreTrainingDataset,
        lengths: np.ndarray,
        unigrams: Mapping[str, Unigram],
        batch_seconds: float,
        accelerator: Accelerator,
    ) -> None:
        self.unigrams = dict(unigrams)
        present = known_domains(dataset.utterances).present
        self.domains = [domain for domain in DOMAINS if domain in present]
        self.target_domains = dataset.domains
        self.accelerator = accelerator
        samples = round(batch_seconds * SAMPLING_RATE)
        sampler = BucketingSampler(lengths, samples, shuffle=False)
        self._steps: StepDataset = StepDataset(
            dataset, sampler, accelerator.process_index, accelerator.num_processes, batch_seconds
        )
        self._batches = sampler.batches_per_epoch

    @torch.no_grad()
    def __call__(self, model: SpearForPreTraining) -> dict[str, Any]:
        """Losses and accuracies on masked and unmasked frames and, on the same masked frames, the unigram's."""
        teachers = list(model.prediction_heads)
        device = self.accelerator.device
        sums = StepSums(codebooks_of(model), self.domains, device, self.target_domains)
        baseline = torch.zeros(len(teachers), 3, dtype=torch.float64)
        was_training = model.training
        model.eval()
        for batch in self._micro_batches():
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            with self.accelerator.autocast():
                sums.add(batch, model(**inputs))
            for place, name in enumerate(teachers):
                labels = batch.inputs[f"{name}_labels"]
                masked = model._masked_output_frames(batch.inputs["mask_time_indices"], labels.shape[1])
                assert masked is not None
                baseline[place] += self.unigrams[name].sums(labels, masked)
        model.train(was_training)
        sums.reduce(self.accelerator)
        baseline = self.accelerator.reduce(baseline.float().to(device), "sum").double().cpu()
        metrics = sums.metrics(sums.read()[0])
        for name, (cost, correct, count) in zip(teachers, baseline.tolist()):
            metrics[f"{name}_unigram_loss"] = ratio(cost, count)
            metrics[f"{name}_unigram_accuracy"] = ratio(correct, count)
        return metrics

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for place in range(self._batches):
            yield from self._steps[place]
