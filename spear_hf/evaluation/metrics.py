# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of fine-tuned models as `evaluate.Metric` classes that need no Hub: make one, call `compute`.

    WordErrorRate().compute(predictions=["a b"], references=["a c"])  # {"wer": 0.5}

The values are those of jiwer and scikit-learn.
"""

from typing import Any

import datasets
import evaluate
import jiwer
import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_curve


class _LocalMetric(evaluate.Metric):
    """Holds predictions and references in memory."""

    description = ""
    prediction: Any = None
    reference: Any = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
        )


class WordErrorRate(_LocalMetric):
    """`wer`: word substitutions, deletions and insertions per word of the references, over all texts together."""

    description = "Word error rate, by jiwer."
    prediction = datasets.Value("string")
    reference = datasets.Value("string")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": float(jiwer.wer(list(references), list(predictions)))}


class CharacterErrorRate(_LocalMetric):
    """`cer`: as the word error rate, of characters, spaces included."""

    description = "Character error rate, by jiwer."
    prediction = datasets.Value("string")
    reference = datasets.Value("string")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"cer": float(jiwer.cer(list(references), list(predictions)))}


class Accuracy(_LocalMetric):
    """`accuracy`: share of predictions (class ids) that are right."""

    description = "Accuracy, by scikit-learn."
    prediction = datasets.Value("int64")
    reference = datasets.Value("int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MeanAveragePrecision(_LocalMetric):
    """`map`: mean over the classes of the average precision, for multi-label classification as in AudioSet.

    Predictions are scores (classes,) per row, larger for likelier; references are 0 or 1. Classes without a positive
    have no average precision and are left out; `classes` counts the others.
    """

    description = "Mean average precision over classes, by scikit-learn."
    prediction = datasets.List(datasets.Value("float32"))
    reference = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        scores, truth = np.asarray(predictions), np.asarray(references)  # (rows, classes)
        present = np.flatnonzero(truth.any(axis=0))
        if len(present) == 0:
            raise ValueError(f"no class has a positive among the {len(truth)} references: mAP is not defined")
        values = [average_precision_score(truth[:, index], scores[:, index]) for index in present]
        return {"map": float(np.mean(values)), "classes": len(present)}


class FrameScores(_LocalMetric):
    """`frame_accuracy` and `frame_f1`, the mean over the classes that occur of F1, of single frames.

    Predictions and references are class ids of frames, all utterances one after the other, without padding.
    """

    description = "Accuracy and macro F1 of frames, by scikit-learn."
    prediction = datasets.Value("int64")
    reference = datasets.Value("int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {
            "frame_accuracy": float(accuracy_score(references, predictions)),
            "frame_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }


class MultiLabelFrameScores(_LocalMetric):
    """`frame_f1`, the mean over the classes that occur of F1, and `frame_micro_f1`, for several classes a frame.

    Predictions and references are 0 or 1 for each class (classes,) of a frame.
    """

    description = "Macro and micro F1 of frames with several labels, by scikit-learn."
    prediction = datasets.List(datasets.Value("int64"))
    reference = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        guess, truth = np.asarray(predictions), np.asarray(references)  # (frames, classes)
        present = np.flatnonzero(truth.any(axis=0) | guess.any(axis=0))
        if len(present) == 0:
            raise ValueError(f"no class occurs in the {len(truth)} frames: F1 is not defined")
        values = [f1_score(truth[:, index], guess[:, index], zero_division=0) for index in present]
        micro = f1_score(truth.ravel(), guess.ravel(), zero_division=0)
        return {"frame_f1": float(np.mean(values)), "frame_micro_f1": float(micro)}


class EqualErrorRate(_LocalMetric):
    """`eer`: the rate at which as large a share of the same-speaker trials is missed as of the others is accepted.

    Predictions are scores of trials, larger for likelier the same; references are 1 for the same speaker, else 0.
    Between the two thresholds that the rates cross at, they are interpolated. `eer_threshold` is where that is.
    """

    description = "Equal error rate of a verification, from scikit-learn's ROC curve."
    prediction = datasets.Value("float64")
    reference = datasets.Value("int64")

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        truth = np.asarray(references)
        if not (truth == 1).any() or not (truth == 0).any():
            raise ValueError(
                f"{int((truth == 1).sum())} of {len(truth)} trials are of the same speaker: the equal error rate "
                "needs trials of both kinds"
            )
        accepted, hits, thresholds = roc_curve(truth, np.asarray(predictions), drop_intermediate=False)
        missed = 1.0 - hits
        after = int(np.argmax(accepted >= missed))  # at the first, infinite threshold all is missed
        gaps = missed - accepted
        share = gaps[after - 1] / (gaps[after - 1] - gaps[after])
        rate = accepted[after - 1] + share * (accepted[after] - accepted[after - 1])
        low, high = thresholds[after], thresholds[after - 1]
        threshold = low if not np.isfinite(high) else high + share * (low - high)
        return {"eer": float(rate), "eer_threshold": float(threshold)}
