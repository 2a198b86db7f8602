# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of a dataset to batches of a model: decoding, crops, mixup, the filter bank, labels.

All that is random is a function of (seed, epoch, row ids): the same batch in the same epoch is the same anywhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.audio import SAMPLING_RATE
from ..data.seeding import keyed_generator
from ..data.segments import FrameGrid, Segment
from ..feature_extraction_spear import SpearFeatureExtractor
from .datasets import decode_row
from .epochs import EpochCounter


IGNORED = -100
# Of the Beta distribution of mixup's shares, whose two parameters are this. The paper gives a 0.5 without saying of
# what: here it is the share of mixed rows, with the distribution that AST and its successors take.
MIXUP_ALPHA = 10.0


class AudioCollator:
    """Waveforms of rows, cropped, and their features.

    Args:
        feature_extractor: utterances under its 85 ms are padded with zeros.
        max_seconds: longer audio is cropped, at a random place in training and in the middle in evaluation; None: not.
        seed: of the crops and of mixup.
        epochs: the epoch, in training; None makes an evaluation collator.
    """

    def __init__(
        self,
        feature_extractor: SpearFeatureExtractor,
        max_seconds: float | None = None,
        seed: int = 0,
        epochs: EpochCounter | None = None,
    ) -> None:
        self.feature_extractor = feature_extractor
        self.max_samples = None if max_seconds is None else round(max_seconds * SAMPLING_RATE)
        self.seed = seed
        self.epochs = epochs

    def crops(self, rows: Sequence[dict]) -> list[tuple[np.ndarray, int]]:
        """(waveform (samples,), its first sample's place in the file) of every row. AudioError names a bad file."""
        return [self._crop(decode_row(row), row["id"]) for row in rows]

    def _crop(self, waveform: np.ndarray, row_id: str) -> tuple[np.ndarray, int]:
        surplus = 0 if self.max_samples is None else max(0, len(waveform) - self.max_samples)
        if surplus == 0:
            return waveform, 0
        start = surplus // 2
        if self.epochs is not None:
            start = int(keyed_generator(self.seed, self.epochs.value, row_id, "crop").integers(surplus + 1))
        return waveform[start : start + len(waveform) - surplus], start

    def features(self, waveforms: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """`input_features` (rows, frames, mel bins) and `attention_mask` (rows, frames)."""
        return dict(
            self.feature_extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt", pad_short=True)
        )


class CTCCollator(AudioCollator):
    """Rows with `labels`, lists of token ids, to `labels` (rows, longest), -100 after the end of a row."""

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {**self.features([waveform for waveform, _ in self.crops(rows)]), "labels": padded}


class ClassificationCollator(AudioCollator):
    """Rows with `labels`, lists of class ids, to one id per row (rows,) or to multi-hot vectors (rows, num_labels).

    Args:
        num_labels: given, labels are multi-hot float vectors; None: one id, the only one of the row.
        mixup: share of the rows of a training batch that are mixed with another row of it, waveforms and labels alike.
    """

    def __init__(self, *args: Any, num_labels: int | None = None, mixup: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= mixup <= 1:
            raise ValueError(f"mixup={mixup} is a share of the rows: it must lie in [0, 1]")
        if mixup and num_labels is None:
            raise ValueError(f"mixup={mixup} mixes labels too, which needs multi-label classification")
        self.num_labels = num_labels
        self.mixup = mixup

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        waveforms = [waveform for waveform, _ in self.crops(rows)]
        if self.num_labels is None:
            labels = torch.tensor([row["labels"][0] for row in rows])
            return {**self.features(waveforms), "labels": labels}
        hot = np.zeros((len(rows), self.num_labels), dtype=np.float32)
        for index, row in enumerate(rows):
            hot[index, row["labels"]] = 1.0
        if self.mixup and self.epochs is not None:
            key = (self.seed, self.epochs.value, *(row["id"] for row in rows))
            waveforms, hot = mix(waveforms, hot, self.mixup, keyed_generator(*key, "mixup"))
        return {**self.features(waveforms), "labels": torch.from_numpy(hot)}


class SpeakerCollator(ClassificationCollator):
    """Evaluation of speaker embeddings: rows with `row`, their number, to `rows` (rows,). No labels."""

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        waveforms = [waveform for waveform, _ in self.crops(rows)]
        return {**self.features(waveforms), "rows": torch.tensor([row["row"] for row in rows])}


class FrameCollator(AudioCollator):
    """Rows with `segments` to labels of encoder frames: ids (rows, frames), or multi-hot (rows, frames, num_labels).

    Frames after the end of a row hold -100. `multi_label` as in `segments.FrameGrid.labels`.
    """

    def __init__(
        self, *args: Any, grid: FrameGrid, label2id: dict[str, int], background: int | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.grid = grid
        self.label2id = label2id
        self.background = background

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        crops = self.crops(rows)
        batch = self.features([waveform for waveform, _ in crops])
        lengths = [self.grid.frames(int(length)) for length in batch["attention_mask"].sum(dim=1)]
        labels = []
        for row, (_, start), frames in zip(rows, crops, lengths):
            segments = [Segment(**segment) for segment in row["segments"]]
            values = self.grid.labels(
                segments, frames, start / SAMPLING_RATE, self.label2id, self.background, row["id"]
            )
            labels.append(torch.from_numpy(values))
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return batch


def mix(
    waveforms: list[np.ndarray], labels: np.ndarray, share: float, generator: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Mixup: with the probability `share` a row becomes p times itself and (1 - p) times another row of the batch.

    waveforms (samples,) may differ in length: a row keeps its own, the other is cut or ends earlier. labels (rows,
    classes). p is drawn from Beta(10, 10). A batch of one row stays as it is.
    """
    rows = len(waveforms)
    if rows < 2:
        return waveforms, labels
    chosen = generator.random(rows) < share
    partners = (np.arange(rows) + generator.integers(1, rows, size=rows)) % rows  # any row but itself
    weights = np.where(chosen, generator.beta(MIXUP_ALPHA, MIXUP_ALPHA, size=rows), 1.0)
    mixed = []
    for waveform, partner, weight in zip(waveforms, partners, weights.astype(np.float32)):
        result = weight * waveform
        other = waveforms[partner][: len(result)]
        result[: len(other)] += (1.0 - weight) * other
        mixed.append(result)
    shares = weights[:, None].astype(labels.dtype)
    return mixed, shares * labels + (1 - shares) * labels[partners]
