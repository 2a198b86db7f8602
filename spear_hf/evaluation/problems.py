# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What heads learn, by the kind of the task: targets, loss, what is made of the outputs, and the score."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import median_filter
from torch import Tensor

from ..data.segments import Segment
from ..finetuning.transcripts import normalize
from .bootstrap import Score, ratio
from .event_metrics import event_counts, segment_counts
from .metrics import d_prime, weighted_average_precision
from .representations import Representation
from .tasks import Clip, Task


MAX_LISTED = 100
"""Labels that a report lists, and counts confusions of."""


class Problem(ABC):
    """`metric` is the main one. Frames of clips are those of `representation`."""

    metric: str
    higher_is_better = True
    framewise = False
    """Whether rows are frames, not clips."""
    loss_leads = False
    """Whether the metric only follows the loss after a while, so that training goes on while the loss falls."""
    outputs: int
    tunings: Sequence[Any] = (None,)
    """Ways to post-process, to choose on the validation clips."""

    def __init__(self, task: Task, representation: Representation) -> None:
        self.task, self.representation = task, representation
        self.places = {label: place for place, label in enumerate(task.labels)}
        self.outputs = len(task.labels)

    @abstractmethod
    def target(self, clip: Clip, rows: int) -> Tensor:
        """What the rows of a clip are to predict."""

    @abstractmethod
    def loss(self, logits: Tensor, lengths: Sequence[int], targets: Sequence[Tensor]) -> Tensor:
        """Of logits (rows of all clips, outputs)."""

    @abstractmethod
    def score(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> Score:
        """The metric as a function of how often each clip counts; outputs (rows, outputs) of each clip."""

    def more(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> dict[str, Any]:
        """Further metrics of all clips, for JSON."""
        return {}


class Classification(Problem):
    """One of several labels a clip, by cross-entropy."""

    metric = "accuracy"

    def target(self, clip: Clip, rows: int) -> Tensor:
        return torch.tensor([self.places[clip.labels[0]]])

    def loss(self, logits: Tensor, lengths: Sequence[int], targets: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(logits, torch.cat(list(targets)))

    def predicted(self, outputs: Sequence[np.ndarray]) -> list[str]:
        """The label of each clip."""
        return [self.task.labels[int(rows[0].argmax())] for rows in outputs]

    def score(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> Score:
        return accuracy(self.predicted(outputs), clips)

    def more(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> dict[str, Any]:
        return confusion(self.predicted(outputs), clips, self.task.labels)


def accuracy(predicted: Sequence[str], clips: Sequence[Clip]) -> Score:
    """Of predicted labels."""
    right = [label == clip.labels[0] for label, clip in zip(predicted, clips)]
    return ratio(right, np.ones(len(clips)))


def confusion(predicted: Sequence[str], clips: Sequence[Clip], labels: Sequence[str]) -> dict[str, Any]:
    """`confusion`, how often a clip with the label of the row was given that of the column; not of too many labels.

    Of the 1251 speakers of VoxCeleb1 it would be 1.6 million numbers in every one of the results.
    """
    if len(labels) > MAX_LISTED:
        return {}
    table = np.zeros((len(labels), len(labels)), dtype=int)
    places = {label: place for place, label in enumerate(labels)}
    for guess, clip in zip(predicted, clips):
        table[places[clip.labels[0]], places[guess]] += 1
    return {"confusion": table.tolist()}


class Tagging(Problem):
    """Any number of labels a clip, each by binary cross-entropy."""

    metric = "map"

    def target(self, clip: Clip, rows: int) -> Tensor:
        hot = torch.zeros(1, self.outputs)
        hot[0, [self.places[label] for label in clip.labels]] = 1.0
        return hot

    def loss(self, logits: Tensor, lengths: Sequence[int], targets: Sequence[Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.cat(list(targets)))

    def _arrays(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip]) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(list(outputs)), torch.cat([self.target(clip, 1) for clip in clips]).numpy().astype(int)

    def score(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> Score:
        return weighted_average_precision(*self._arrays(outputs, clips))

    def more(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> dict[str, Any]:
        try:
            return d_prime(*self._arrays(outputs, clips))
        except ValueError:  # no class has both positives and negatives
            return {}


class Frames(Problem):
    """One label a frame; the first output is the background."""

    metric = "frame_accuracy"
    framewise = True

    def __init__(self, task: Task, representation: Representation) -> None:
        super().__init__(task, representation)
        self.outputs = len(task.labels) + 1

    def target(self, clip: Clip, rows: int) -> Tensor:
        hot = frame_labels(clip.segments, self.representation.centres(rows), self.places)
        if (hot.sum(axis=1) > 1).any():
            raise ValueError(f"{clip.id} has segments of several labels at a time: choose kind=events")
        return torch.from_numpy(np.where(hot.any(axis=1), hot.argmax(axis=1) + 1, 0))

    def loss(self, logits: Tensor, lengths: Sequence[int], targets: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(logits, torch.cat(list(targets)))

    def score(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> Score:
        right = [
            (rows.argmax(axis=1) == self.target(clip, len(rows)).numpy()).sum() for rows, clip in zip(outputs, clips)
        ]
        return ratio(right, [len(rows) for rows in outputs])


class Events(Problem):
    """Any labels a frame. Post-processing is HEAR's: a median filter, a threshold, a shortest duration.

    An event begins and ends in the middle of its first and last frame.
    """

    metric = "event_f1"
    framewise = True

    def __init__(self, task: Task, representation: Representation) -> None:
        super().__init__(task, representation)
        self.tunings = [list(pair) for pair in task.postprocessing]

    def target(self, clip: Clip, rows: int) -> Tensor:
        return torch.from_numpy(frame_labels(clip.segments, self.representation.centres(rows), self.places))

    def loss(self, logits: Tensor, lengths: Sequence[int], targets: Sequence[Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.cat(list(targets)))

    def events(self, logits: np.ndarray, tuning: Sequence[float]) -> list[Segment]:
        """The events of a clip; `tuning` are the lengths of the filter and of the shortest event, in milliseconds."""
        width = max(1, round(tuning[0] / 1000 / self.representation.frame_seconds))
        active = median_filter(logits, size=(width, 1)) > 0  # a probability over one half
        centres = self.representation.centres(len(logits))
        found = []
        for place, label in enumerate(self.task.labels):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], active[:, place].astype(np.int8), [0]])))
            for first, last in zip(edges[::2], edges[1::2] - 1):
                start, end = float(centres[first]), float(centres[last])
                if end - start >= tuning[1] / 1000 - 1e-9:
                    found.append(Segment(start, end, label))
        return found

    def score(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> Score:
        counts = [
            event_counts(self.events(rows, tuning), clip.segments, self.task.collar)
            for rows, clip in zip(outputs, clips)
        ]
        halves = ratio([2 * one.right for one in counts], [one.predicted + one.present for one in counts])
        return lambda weights: halves(weights) if any(one.predicted + one.present for one in counts) else 0.0

    def more(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> dict[str, Any]:
        counts = [segment_counts(self.events(rows, tuning), clip.segments) for rows, clip in zip(outputs, clips)]
        present = sum(one.present for one in counts)
        both = sum(one.predicted for one in counts) + present
        return {
            "segment_f1": 2 * sum(one.right for one in counts) / both if both else 0.0,
            **({"segment_er": sum(one.errors for one in counts) / present} if present else {}),
        }


def frame_labels(segments: Sequence[Segment], centres: np.ndarray, places: dict[str, int]) -> np.ndarray:
    """float32 (frames, labels): 1 where the middle of the frame lies in a segment of the label."""
    hot = np.zeros((len(centres), len(places)), dtype=np.float32)
    for segment in segments:
        hot[(centres >= segment.start) & (centres < segment.end), places[segment.label]] = 1.0
    return hot


class Ctc(Problem):
    """Texts of `asr` are characters after `normalize`, those of `pr` phones separated by spaces; greedy decoding."""

    higher_is_better = False
    framewise = True
    loss_leads = True  # at first nothing but blanks is written, and every text is wrong

    def __init__(self, task: Task, representation: Representation) -> None:
        super().__init__(task, representation)
        self.phones = task.kind == "pr"
        self.metric = "per" if self.phones else "wer"
        self.tokens = sorted({token for fold in task.folds for clip in fold.train for token in self._split(clip)})
        self.places = {token: place for place, token in enumerate(self.tokens, start=1)}  # 0: the blank
        self.outputs = len(self.tokens) + 1

    def text(self, clip: Clip) -> str:
        """What is to be written."""
        text = clip.transcript or ""
        return " ".join(text.split()) if self.phones else normalize(text)

    def _split(self, clip: Clip) -> list[str]:
        return self.text(clip).split() if self.phones else list(self.text(clip))

    def target(self, clip: Clip, rows: int) -> Tensor:
        # A token that no training clip has cannot be learnt; the score counts it as missed.
        return torch.tensor([self.places[token] for token in self._split(clip) if token in self.places])

    def loss(self, logits: Tensor, lengths: Sequence[int], targets: Sequence[Tensor]) -> Tensor:
        frames = torch.nn.utils.rnn.pad_sequence(list(logits.split(list(lengths))))  # (longest, clips, outputs)
        sizes = torch.tensor([len(target) for target in targets])
        labels = torch.cat(list(targets)).cpu()
        return F.ctc_loss(
            frames.log_softmax(dim=-1).cpu(), labels, torch.tensor(list(lengths)), sizes, zero_infinity=True
        )

    def written(self, logits: np.ndarray) -> str:
        """The best path, without repetitions and blanks."""
        path = logits.argmax(axis=1)
        kept = path[np.flatnonzero(np.diff(path, prepend=-1))]
        return (" " if self.phones else "").join(self.tokens[place - 1] for place in kept if place > 0)

    def score(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> Score:
        errors, words = [], []
        for rows, clip in zip(outputs, clips):
            if not self.text(clip):  # nothing but punctuation
                errors.append(len(self.written(rows).split()))
                words.append(0)
                continue
            result = jiwer.process_words(self.text(clip), self.written(rows))
            errors.append(result.substitutions + result.deletions + result.insertions)
            words.append(result.substitutions + result.deletions + result.hits)
        return ratio(errors, words)

    def more(self, outputs: Sequence[np.ndarray], clips: Sequence[Clip], tuning: Any = None) -> dict[str, Any]:
        if self.phones:
            return {}
        pairs = [(self.text(clip), self.written(rows)) for clip, rows in zip(clips, outputs) if self.text(clip)]
        return {"cer": float(jiwer.cer([text for text, _ in pairs], [written for _, written in pairs]))}


PROBLEMS: dict[str, type[Problem]] = {
    "classification": Classification,
    "tagging": Tagging,
    "frames": Frames,
    "events": Events,
    "asr": Ctc,
    "pr": Ctc,
}
