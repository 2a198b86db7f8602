# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of fine-tuned models and of probes as `evaluate.Metric` classes that need no Hub: make one, call `compute`.

    WordErrorRate().compute(predictions=["a b"], references=["a c"])  # {"wer": 0.5}

The values are those of jiwer and scikit-learn. Metrics of sound events are in event_metrics.py.
"""

from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import datasets
import evaluate
import jiwer
import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score, roc_curve

from .bootstrap import Score


class LocalMetric(evaluate.Metric):
    """Arguments are those of `evaluate.Metric`.

    Predictions and references are held in memory, unless `num_process` processes bring them together in files.
    """

    description = ""
    prediction: Any = None
    reference: Any = None

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        alone = kwargs.get("num_process", 1) == 1
        super().__init__(config_name, **{"keep_in_memory": alone, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
        )


def _check_texts(references: Iterable[str], unit: str) -> None:
    """ValueError where there is nothing to divide by."""
    texts = list(references)
    if not any(text.strip() for text in texts):
        raise ValueError(f"there is no {unit} in the {len(texts)} references: the {unit} error rate is not defined")


def _tables(predictions: Iterable[Sequence], references: Iterable[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays (rows, classes). ValueError for rows of unlike lengths, and for references but 0 and 1."""
    tables = [list(predictions), list(references)]
    widths = sorted({len(row) for rows in tables for row in rows})
    if len(widths) > 1:
        raise ValueError(f"rows have {widths[0]} to {widths[-1]} classes: every row needs a value for each class")
    _check_binary(truth := np.asarray(tables[1]), "references")
    return np.asarray(tables[0]), truth


def _check_binary(values: np.ndarray, name: str) -> None:
    if (wrong := values[(values != 0) & (values != 1)]).size:
        raise ValueError(f"{name} are 0 or 1, and there is {wrong[0]}")


class WordErrorRate(LocalMetric):
    """`wer`: word substitutions, deletions and insertions per word of the references, over all texts together."""

    description = "Word error rate, by jiwer."
    prediction = datasets.Value("string")
    reference = datasets.Value("string")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        _check_texts(references, "word")
        return {"wer": float(jiwer.wer(list(references), list(predictions)))}


class CharacterErrorRate(LocalMetric):
    """`cer`: as the word error rate, of characters, spaces included."""

    description = "Character error rate, by jiwer."
    prediction = datasets.Value("string")
    reference = datasets.Value("string")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        _check_texts(references, "character")
        return {"cer": float(jiwer.cer(list(references), list(predictions)))}


class PhoneErrorRate(LocalMetric):
    """`per`: as the word error rate, of phones, which are separated by spaces."""

    description = "Phone error rate, by jiwer."
    prediction = datasets.Value("string")
    reference = datasets.Value("string")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        _check_texts(references, "phone")
        return {"per": float(jiwer.wer(list(references), list(predictions)))}


class Accuracy(LocalMetric):
    """`accuracy`: share of predictions (class ids) that are right."""

    description = "Accuracy, by scikit-learn."
    prediction = datasets.Value("int64")
    reference = datasets.Value("int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MeanAveragePrecision(LocalMetric):
    """`map`: mean over the classes of the average precision, for multi-label classification as in AudioSet.

    Predictions are scores (classes,) per row, larger for likelier; references are 0 or 1. Classes without a positive
    have no average precision and are left out; `classes` counts the others.
    """

    description = "Mean average precision over classes, by scikit-learn."
    prediction = datasets.List(datasets.Value("float64"))
    reference = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        value, classes = mean_average_precision(*_tables(predictions, references))
        return {"map": value, "classes": classes}


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """mAP of (rows, classes), and how many classes it is the mean of."""
    present = np.flatnonzero(truth.any(axis=0))
    if len(present) == 0:
        raise ValueError(f"no class has a positive among the {len(truth)} references: mAP is not defined")
    values = [average_precision_score(truth[:, index], scores[:, index]) for index in present]
    return float(np.mean(values)), len(present)


def weighted_average_precision(scores: np.ndarray, truth: np.ndarray) -> Score:
    """The mAP of `mean_average_precision` as a function of how often each row counts.

    Scores are sorted once, so that the thousand samples of a bootstrap cost a running sum each.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores are NaN or infinite: mAP is not defined")
    order = np.argsort(-scores.T, axis=1, kind="stable")  # (classes, rows)
    ends = _ends_of_ties(np.take_along_axis(scores.T, order, axis=1))
    classes, ranks = np.nonzero(np.take_along_axis(truth.T, order, axis=1))  # of positives, class by class
    rows, ends = order[classes, ranks], ends[classes, ranks]
    # The last positive among those of the same score, of the same class.
    last = np.searchsorted(classes * len(truth) + ends, classes * len(truth) + ends, side="right") - 1
    starts = np.searchsorted(classes, classes, side="left")

    def score(weights: np.ndarray) -> float:
        counts = weights[rows]
        totals = np.bincount(classes, counts)
        if not totals.any():
            raise ValueError(f"no class has a positive among the {len(truth)} references: mAP is not defined")
        hits = np.concatenate([[0], np.cumsum(counts)])
        seen = np.cumsum(weights[order], axis=1)[classes, ends]
        precisions = (hits[last + 1] - hits[starts]) / np.maximum(seen, 1)
        values = np.bincount(classes, counts * precisions)
        return float((values[totals > 0] / totals[totals > 0]).mean())

    return score


def _ends_of_ties(ranked: np.ndarray) -> np.ndarray:
    """Sorted scores (..., rows) -> the place of the last one that is equal to each."""
    rows = ranked.shape[-1]
    ending = np.concatenate([ranked[..., 1:] != ranked[..., :-1], np.ones((*ranked.shape[:-1], 1), bool)], axis=-1)
    places = np.where(ending, np.arange(rows), rows)
    return np.minimum.accumulate(places[..., ::-1], axis=-1)[..., ::-1]


class DPrime(LocalMetric):
    """`d_prime` and `auc`, means over the classes, for multi-label classification as in AudioSet and HEAR.

    d' of a class is sqrt(2) times the normal quantile of the area under its ROC curve. An area of 0 or 1, whose d' is
    infinite, counts as half a pair of a positive and a negative away from that. Classes without positives or without
    negatives are left out; `classes` counts the others. Predictions and references as of `MeanAveragePrecision`.
    """

    description = "Sensitivity index d' and area under the ROC curve, by scikit-learn."
    prediction = datasets.List(datasets.Value("float64"))
    reference = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        return d_prime(*_tables(predictions, references))


def d_prime(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """What `DPrime` computes, of arrays (rows, classes)."""
    mixed = np.flatnonzero(truth.any(axis=0) & ~truth.astype(bool).all(axis=0))
    if len(mixed) == 0:
        raise ValueError(f"no class has both positives and negatives among the {len(truth)} references")
    areas, values = [], []
    for index in mixed:
        area = float(roc_auc_score(truth[:, index], scores[:, index]))
        positives = int(truth[:, index].sum())
        edge = 0.5 / (positives * (len(truth) - positives))
        areas.append(area)
        values.append(2**0.5 * NormalDist().inv_cdf(min(max(area, edge), 1 - edge)))
    return {"d_prime": float(np.mean(values)), "auc": float(np.mean(areas)), "classes": len(mixed)}


class FrameScores(LocalMetric):
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


class MultiLabelFrameScores(LocalMetric):
    """`frame_f1`, the mean over the classes that occur of F1, and `frame_micro_f1`, for several classes a frame.

    Predictions and references are 0 or 1 for each class (classes,) of a frame.
    """

    description = "Macro and micro F1 of frames with several labels, by scikit-learn."
    prediction = datasets.List(datasets.Value("int64"))
    reference = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        guess, truth = _tables(predictions, references)  # (frames, classes)
        _check_binary(guess, "predictions")
        present = np.flatnonzero(truth.any(axis=0) | guess.any(axis=0))
        if len(present) == 0:
            raise ValueError(f"no class occurs in the {len(truth)} frames: F1 is not defined")
        values = [f1_score(truth[:, index], guess[:, index], zero_division=0) for index in present]
        micro = f1_score(truth.ravel(), guess.ravel(), zero_division=0)
        return {"frame_f1": float(np.mean(values)), "frame_micro_f1": float(micro)}


class EqualErrorRate(LocalMetric):
    """`eer`: the rate at which as large a share of the same-speaker trials is missed as of the others is accepted.

    Predictions are scores of trials, larger for likelier the same; references are 1 for the same speaker, else 0.
    Between the two thresholds that the rates cross at, they are interpolated. `eer_threshold` is where that is.
    """

    description = "Equal error rate of a verification, from scikit-learn's ROC curve."
    prediction = datasets.Value("float64")
    reference = datasets.Value("int64")

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        rate, threshold = equal_error_rate(np.asarray(predictions), np.asarray(references))
        return {"eer": rate, "eer_threshold": threshold}


def equal_error_rate(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The equal error rate of trials and its threshold."""
    accepted, missed, thresholds = _error_rates(scores, truth)
    rate, after, share = _crossing(accepted, missed)
    low, high = thresholds[after], thresholds[after - 1]
    threshold = low if not np.isfinite(high) else high + share * (low - high)
    return rate, float(threshold)


def _crossing(accepted: np.ndarray, missed: np.ndarray) -> tuple[float, int, float]:
    """The rate where both are equal, the threshold behind it, and how near to that it is from the one before."""
    after = int(np.argmax(accepted >= missed))  # at the first, infinite threshold all is missed
    gaps = missed - accepted
    share = float(gaps[after - 1] / (gaps[after - 1] - gaps[after]))
    return float(accepted[after - 1] + share * (accepted[after] - accepted[after - 1])), after, share


def weighted_equal_error_rate(scores: np.ndarray, truth: np.ndarray) -> Score:
    """The rate of `equal_error_rate` as a function of how often each trial counts; they are sorted once."""
    if not np.isfinite(scores).all():
        raise ValueError("scores of trials are NaN or infinite: the equal error rate is not defined")
    order = np.argsort(-scores, kind="stable")
    ends = np.unique(_ends_of_ties(scores[order]))
    same = truth[order] == 1

    def score(weights: np.ndarray) -> float:
        counts = weights[order]
        seen, hits = (np.concatenate([[0], np.cumsum(part)[ends]]) for part in (counts, counts * same))
        if not 0 < hits[-1] < seen[-1]:
            raise ValueError(_one_kind(int(hits[-1]), int(seen[-1])))
        return _crossing((seen - hits) / (seen[-1] - hits[-1]), 1 - hits / hits[-1])[0]

    return score


class MinimumDetectionCost(LocalMetric):
    """`min_dcf`: the least cost of a verification over all thresholds, as in the evaluations of NIST and VoxSRC.

    The cost is `cost_miss * prior * missed + cost_accept * (1 - prior) * accepted`, divided by that of the better of
    accepting all trials and rejecting all; 1 is thus no better than not listening. `compute` takes `prior` (of the
    same speaker; VoxSRC has 0.05, NIST 0.01), `cost_miss` and `cost_accept` (1 and 1).
    Predictions and references as of `EqualErrorRate`.
    """

    description = "Minimum of the normalised detection cost, from scikit-learn's ROC curve."
    prediction = datasets.Value("float64")
    reference = datasets.Value("int64")

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        prior: float = 0.05,
        cost_miss: float = 1.0,
        cost_accept: float = 1.0,
    ) -> dict[str, float]:
        cost = minimum_detection_cost(np.asarray(predictions), np.asarray(references), prior, cost_miss, cost_accept)
        return {"min_dcf": cost}


def minimum_detection_cost(
    scores: np.ndarray, truth: np.ndarray, prior: float = 0.05, cost_miss: float = 1.0, cost_accept: float = 1.0
) -> float:
    """What `MinimumDetectionCost` computes, of arrays (trials,)."""
    if not (0 < prior < 1 and cost_miss > 0 and cost_accept > 0):
        raise ValueError(
            f"prior={prior} must lie between 0 and 1, and cost_miss={cost_miss} and cost_accept={cost_accept} must be "
            "positive"
        )
    accepted, missed, _ = _error_rates(scores, truth)
    costs = cost_miss * prior * missed + cost_accept * (1 - prior) * accepted
    return float(costs.min() / min(cost_miss * prior, cost_accept * (1 - prior)))


def _error_rates(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rates of other trials accepted and of same-speaker trials missed, by falling threshold, and the thresholds."""
    _check_binary(truth, "references of trials")
    if not (truth == 1).any() or not (truth == 0).any():
        raise ValueError(_one_kind(int((truth == 1).sum()), len(truth)))
    accepted, hits, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    return accepted, 1.0 - hits, thresholds


def _one_kind(same: int, trials: int) -> str:
    return f"{same} of {trials} trials are of the same speaker: a verification's error rates need both kinds"
