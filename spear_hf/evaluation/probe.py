# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear probes: how well a frozen representation, pooled over time, is told apart by a linear classifier.

    train_x = pooled_features(model, extractor, train)                      # (layers, utterances, 2 * dim)
    result = linear_probe(train_x[3], train_labels, test_x[3], test_labels)
    result.accuracy, result.low, result.high

Features are the mean and standard deviation over an utterance's frames, standardised by the training set. The
classifier is multinomial logistic regression; its penalty is chosen on the training set alone, by cross-validation in
which a group (a speaker, an instrument) is never on both sides. Any array of (utterances, features) can be probed, so
that baselines (log-mel, another model, a model with random weights) go the same way.
"""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel, SequenceFeatureExtractor

from ..data.audio import SAMPLING_RATE
from ..data.decoding import load_utterance
from ..data.manifest import Utterance
from ..data.seeding import keyed_generator
from ..feature_extraction_spear import SpearFeatureExtractor
from .embedding import embed_files


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: the smaller, the stronger the penalty
FOLDS = 5
MAX_ITERATIONS = 500
RESAMPLES = 5000
LEVEL = 0.95  # of the intervals


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def pooled_features(
    model: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    utterances: Sequence[Utterance],
    batch_seconds: float = 120.0,
) -> np.ndarray:
    """Pooled hidden states of the frozen `model`, float32 (layers, utterances, 2 * dim), in the utterances' order.

    Entry 0 is what enters the first layer (the stem's output), entry k the output of layer k. ValueError naming the
    file if one cannot be embedded.
    """
    return np.stack(_all_layers(model, feature_extractor, utterances, "mean+std", batch_seconds), axis=1)


def log_mel_features(feature_extractor: SpearFeatureExtractor, utterances: Sequence[Utterance]) -> np.ndarray:
    """The pooled filter bank, which is the input of the model: float32 (1, utterances, 2 * num_mel_bins)."""
    rows = []
    for utterance in utterances:
        frames = log_mel_frames(feature_extractor, utterance)
        rows.append(np.concatenate([frames.mean(axis=0), frames.std(axis=0)]))
    return np.stack(rows)[None]


def frame_states(
    model: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    utterances: Sequence[Utterance],
    batch_seconds: float = 120.0,
) -> list[np.ndarray]:
    """Hidden states of the frozen `model`, float32 (layers, frames, dim) for each utterance; see `pooled_features`."""
    return _all_layers(model, feature_extractor, utterances, "none", batch_seconds)


def _all_layers(
    model: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    utterances: Sequence[Utterance],
    pool: str,
    batch_seconds: float,
) -> list[np.ndarray]:
    """Hidden states, pooled or not, in the utterances' order. ValueError naming the file that cannot be embedded."""
    states: dict[str, np.ndarray] = {}
    for file in embed_files(utterances, model, feature_extractor, "all", pool, batch_seconds=batch_seconds):
        if file.embedding is None:
            raise ValueError(f"{file.id}: {file.error}")
        states[file.id] = file.embedding
    return [states[utterance.id] for utterance in utterances]


def log_mel_frames(feature_extractor: SpearFeatureExtractor, utterance: Utterance) -> np.ndarray:
    """The filter bank of an utterance, which is the input of the model: float32 (frames at 100 Hz, num_mel_bins)."""
    waveform = load_utterance(utterance)
    return feature_extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="np")["input_features"][0]


def concatenated(features: np.ndarray) -> np.ndarray:
    """(layers, utterances, dim) -> (utterances, layers * dim): all layers as one feature set."""
    return features.transpose(1, 0, 2).reshape(features.shape[1], -1)


# ---------------------------------------------------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy on the test set, its bootstrap interval, and what two results are compared with."""

    accuracy: float
    low: float
    """Lower end of the interval (95 %, percentiles)."""
    high: float
    penalty: float | None
    """scikit-learn's C, chosen by cross-validation; None where nothing is trained (retrieval.py)."""
    validation_accuracy: float | None
    """Of the cross-validation, on the training set; None where a class has too few examples for one."""
    predictions: np.ndarray
    """Labels given to the test utterances, (utterances,)."""
    correct: np.ndarray
    """Whether they are right, bool (utterances,); of comparisons the share of right ones, float."""
    groups: np.ndarray | None = None
    """What the bootstrap draws instead of single ones (utterances,); see `linear_probe`."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers that there are, without what is per utterance, for JSON."""
        numbers = {
            "accuracy": self.accuracy,
            "low": self.low,
            "high": self.high,
            "penalty": self.penalty,
            "validation_accuracy": self.validation_accuracy,
            "test_utterances": len(self.correct),
        }
        return {name: number for name, number in numbers.items() if number is not None}


@dataclass(frozen=True)
class Difference:
    """Accuracy of one feature set minus that of another on the same test utterances."""

    mean: float
    low: float
    """Lower end of the interval (95 %, percentiles)."""
    high: float
    share_above_zero: float
    """Of the bootstrap's samples."""

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(vars(self))


def linear_probe(
    train_x: np.ndarray,
    train_y: Sequence[Hashable],
    test_x: np.ndarray,
    test_y: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    test_groups: Sequence[Hashable] | None = None,
) -> ProbeResult:
    """Multinomial logistic regression on standardised features (utterances, features).

    `groups` of the training utterances (speakers, instruments, recordings) are kept whole by the folds of the
    cross-validation: name them where the test set has other ones, or the penalty comes out too weak. Where a class has
    a single example or group there is no cross-validation, and the middle one of `penalties` is taken.
    `test_groups`: what is drawn by the bootstrap, where the test items are no independent draws (segments of
    recordings).
    """
    targets = np.asarray(test_y)
    if unknown := sorted(set(targets.tolist()) - set(np.asarray(train_y).tolist())):
        raise ValueError(f"Test labels that no training utterance has: {', '.join(map(str, unknown[:10]))}.")
    fit = fit_linear(train_x, train_y, test_x, test_y, groups, penalties, seed)
    predictions = fit.predictions
    correct = predictions == targets
    test_units = None if test_groups is None else np.asarray(test_groups)
    low, high = bootstrap_interval(correct, seed, groups=test_units)
    return ProbeResult(
        accuracy=float(correct.mean()),
        low=low,
        high=high,
        penalty=fit.penalty,
        validation_accuracy=fit.validation_accuracy,
        predictions=predictions,
        correct=correct,
        groups=test_units,
    )


@dataclass(frozen=True)
class LinearFit:
    """A logistic regression's predictions, and how its penalty was chosen; see `linear_probe`."""

    predictions: np.ndarray
    penalty: float
    validation_accuracy: float | None


def fit_linear(
    train_x: np.ndarray,
    train_y: Sequence[Hashable],
    test_x: np.ndarray,
    test_y: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    valid_x: np.ndarray | None = None,
    valid_y: Sequence[Hashable] = (),
) -> LinearFit:
    """As `linear_probe`, without its interval; a test label that no training utterance has can only be missed.

    The penalty is chosen on `valid_x` (utterances, features) instead of by cross-validation, if that is given.
    """
    train_x, test_x = _checked(train_x, train_y, "training"), _checked(test_x, test_y, "test")
    labels = np.asarray(train_y)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"Training features have {train_x.shape[1]} columns, test features {test_x.shape[1]}.")
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"There are {len(groups)} groups for {len(labels)} training utterances.")
    # The solver's steps are of microseconds: threads would wait for each other most of the time (10 times slower).
    with threadpool_limits(limits=1):
        if valid_x is not None:
            held_out = _checked(valid_x, valid_y, "validation")
            rows = _fit_predict(train_x, labels, held_out, penalties)
            scores: np.ndarray | None = np.array([(row == np.asarray(valid_y)).mean() for row in rows])
        else:
            scores = _validation_scores(train_x, labels, groups, penalties, seed)
        best = len(penalties) // 2 if scores is None else int(np.argmax(scores))
        predictions = _fit_predict(train_x, labels, test_x, [penalties[best]])[0]
    return LinearFit(predictions, float(penalties[best]), None if scores is None else float(scores[best]))


def _checked(features: np.ndarray, labels: Sequence[Hashable], name: str) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(labels) or len(features) == 0:
        raise ValueError(
            f"The {name} features have shape {features.shape} and there are {len(labels)} labels: (utterances, "
            "features) and a label for each are needed. Choose a layer of pooled_features, or `concatenated` ones."
        )
    if not np.isfinite(features).all():
        raise ValueError(f"The {name} features hold NaN or infinity.")
    return features


def _validation_scores(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable] | None,
    penalties: Sequence[float],
    seed: int,
) -> np.ndarray | None:
    """Mean accuracy over the folds for every penalty; None where no folds can be made."""
    units = np.arange(len(labels)) if groups is None else np.asarray(groups)
    folds = min(FOLDS, *(len(np.unique(units[labels == label])) for label in np.unique(labels)))
    if folds < 2:
        return None
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(folds, shuffle=True, random_state=seed)
    scores = []
    for inside, outside in splitter.split(features, labels, None if groups is None else units):
        if len(np.unique(labels[inside])) < 2:  # groups cannot always be divided so that each class stays
            continue
        predictions = _fit_predict(features[inside], labels[inside], features[outside], penalties)
        scores.append([(row == labels[outside]).mean() for row in predictions])
    return np.mean(scores, axis=0) if scores else None


def _fit_predict(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, penalties: Sequence[float]
) -> list[np.ndarray]:
    """Predicted labels of `test_x` for every penalty.

    The weights of a regression with an L2 penalty lie in the span of the training rows, so it is solved in coordinates
    of that span: the same solution, at the cost of as many columns as there are utterances.
    """
    scale = train_x.std(axis=0)
    scale[scale < 1e-8] = 1.0  # a channel that is constant in training says nothing
    mean = train_x.mean(axis=0)
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    if train_x.shape[1] > train_x.shape[0]:
        _, values, directions = np.linalg.svd(train_x, full_matrices=False)
        directions = directions[values > 1e-9 * values[0]] if values[0] > 0 else directions
        train_x, test_x = train_x @ directions.T, test_x @ directions.T
    predictions = []
    for penalty in penalties:
        classifier = LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():
            # With hardly any penalty separable classes never converge; the accuracy has long settled by then.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes")  # of few clips, which are classes yet
            classifier.fit(train_x, train_y)
        predictions.append(classifier.predict(test_x))
    return predictions


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty
# ---------------------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (utterances,), utterances or whole groups drawn with replacement."""
    low, high = np.quantile(_resampled_means(values, seed, resamples, groups), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    first: ProbeResult, second: ProbeResult, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Difference:
    """By how much `first` is better, with the interval of a paired bootstrap: both drawn on the same utterances."""
    if len(first.correct) != len(second.correct):
        raise ValueError(
            f"The results are of {len(first.correct)} and {len(second.correct)} test utterances: a paired comparison "
            "needs the same ones in the same order."
        )
    gains = first.correct.astype(np.float64) - second.correct
    means = _resampled_means(gains, seed, resamples, first.groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(gains.mean()), float(low), float(high), float((means > 0).mean()))


def _resampled_means(values: np.ndarray, seed: int, resamples: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(resamples,): means of samples of as many values, or groups of values, drawn with replacement."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must have the shape (utterances,), not {values.shape}.")
    rng = keyed_generator(seed, len(values), "bootstrap")
    units = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(units) != len(values):
        raise ValueError(f"There are {len(units)} groups for {len(values)} values.")
    sums, counts = np.bincount(units, values), np.bincount(units)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    return sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
