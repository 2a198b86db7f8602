# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A task on one frozen representation: every choice of features and head, with intervals.

Features of a clip are its means and standard deviations over time (or the means alone), of frames the frames:

    weighted    a weighted sum of all layers, the weights learned with the head (SUPERB)
    layers      every layer by itself; layer 0 is the stem's output, what enters the first layer
    last        the last layer
    all         all layers, concatenated (HEAR's option for models with layers)

A representation with one layer has the features `features`.

The linear head of a classification with fixed features is a logistic regression, solved exactly, whose penalty is
chosen on the validation clips or by cross-validation (probe.py), unless the features are more than 5e7 numbers; every
other head is trained by gradient (heads.py). The headline is the choice with the best validation score: the test clips
never choose. A task without validation clips has cross-validation where the solution is exact, and a fifth of its
training clips elsewhere, on which early stopping takes its best moment; as the latter flatters, the headline is then
chosen among the exact ones, if there are any.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from .bootstrap import RESAMPLES, Estimate, Score, estimate, mean_of
from .embedding_cache import EmbeddingCache
from .heads import (
    DEFAULT_HEADS,
    GRIDS,
    HEADS,
    Examples,
    Features,
    FrameFeatures,
    PooledFeatures,
    grid,
    outputs_of,
    train_heads,
)
from .probe import fit_linear
from .problems import PROBLEMS, Ctc, Problem, accuracy, confusion
from .representations import Representation
from .tasks import Clip, Fold, Task, held_out


VERSION = 4
"""Raised whenever results come out differently than before, so that old ones are not taken for new ones."""
FEATURES = ("weighted", "layers", "last", "all")
POOLS = ("mean", "mean+std")
EXACT_NUMBERS = 5e7
RECURRENT_STEP = 0.02
"""Seconds from one row to the next of a recurrent head of texts, at least: SUPERB joins faster frames."""
CROSS_VALIDATION = "cross-validation"
MIN_UNITS = 5
"""Groups of test clips from which the bootstrap draws groups; with fewer it draws clips."""


@dataclass(frozen=True)
class Settings:
    """How tasks are run; the features None are all for clips, and `weighted` for frames, texts included."""

    features: tuple[str, ...] | None = None
    heads: tuple[str, ...] = DEFAULT_HEADS
    grid: str = "small"
    pool: str = "mean+std"
    seeds: int = 1
    """Heads trained by gradient with other random numbers, and other validation clips; scores are averaged."""
    seed: int = 0
    resamples: int = RESAMPLES
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, values, known in (
            ("features", self.features or (), FEATURES),
            ("heads", self.heads, HEADS),
            ("grid", (self.grid,), GRIDS),
            ("pool", (self.pool,), POOLS),
        ):
            if unknown := sorted(set(values) - set(known)):
                raise ValueError(f"{name}: {', '.join(unknown)} is not one of {', '.join(known)}")
        if self.seeds < 1 or self.resamples < 2 or not self.heads:
            raise ValueError(f"seeds={self.seeds}, resamples={self.resamples}, heads={self.heads}: too few")
        if not 0 <= self.seed <= 2**32 - self.seeds:
            raise ValueError(f"seed={self.seed} must lie between 0 and {2**32 - self.seeds}")


@dataclass(frozen=True)
class Result:
    """One choice of features and head."""

    features: str
    head: str
    metric: str
    higher_is_better: bool
    estimate: Estimate
    validation: float | None
    """Larger is better; None where nothing was selected on validation clips."""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "features": self.features,
            "head": self.head,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            **self.estimate.to_dict(),
            "validation": self.validation,
            **self.details,
        }


class KeptResults(Protocol):
    """Results of the choices that a run which was stopped had done."""

    def get(self, features: str, head: str) -> Result | None:
        """That of a choice, if there is one."""

    def put(self, result: Result) -> None:
        """Keeps a result."""


def run_task(
    task: Task,
    representation: Representation,
    cache: EmbeddingCache,
    settings: Settings,
    kept: KeptResults | None = None,
) -> list[Result]:
    """All results of a task; the first one is the headline. Of heads, those that are `kept` are not trained again.

    Raises:
        ValueError: a clip that is no audio, is too long, or lacks what the task needs.
    """
    if task.kind == "query":
        from .untrained import query_results

        return query_results(task, representation, cache, settings)
    if task.kind == "verification":
        from .untrained import verification_results

        results = verification_results(task, representation, cache, settings, kept)
    else:
        results = _trained_results(task, representation, cache, settings, kept)
    # Cross-validation and a held-out part are no measures to compare by: early stopping picks its best moment on it.
    comparable = [result for result in results if result.details.get("validated_by") == CROSS_VALIDATION] or results
    # Without any validation the last layer, by the linear head, comes first.
    last = "features" if representation.num_layers == 1 else f"layer {representation.num_layers - 1}"
    ranks = [
        (-np.inf if result.validation is None else result.validation, result.features == last) for result in comparable
    ]
    best = comparable[max(range(len(comparable)), key=ranks.__getitem__)]
    return [best, *(result for result in results if result is not best)]


def feature_sets(representation: Representation, wanted: Sequence[str], head: str) -> list[str]:
    """Names of feature sets for a head; layers one by one are for the linear head, where the last has its number."""
    count = representation.num_layers
    if count == 1:
        return ["features"]
    names: dict[str, None] = {}
    for name in wanted:
        if name == "layers":
            names |= dict.fromkeys(f"layer {layer}" for layer in range(count if head == "linear" else 0))
        else:
            names[f"layer {count - 1}" if name == "last" else name] = None
    return list(names)


def layer_of(name: str) -> int | None:
    """The number of a feature set's layer; None for `weighted` and `all`."""
    if name == "features":
        return 0
    return int(name.removeprefix("layer ")) if name.startswith("layer ") else None


def pooled_set(features: np.ndarray, name: str, pool: str, places: Sequence[int] | None = None) -> PooledFeatures:
    """A feature set of pooled features (layers, clips, 2 * dim), of the clips at `places`, or of all."""
    kept = features[:, :, : features.shape[2] // 2] if pool == "mean" else features
    if (layer := layer_of(name)) is not None:
        kept = kept[layer : layer + 1]
    return PooledFeatures(kept, places, concatenated=name == "all")


def bootstrap_units(clips: Sequence[Clip]) -> list[Hashable]:
    """What the bootstrap draws: groups of clips, where there are enough of them, else clips."""
    groups: list[Hashable] = [clip.group or clip.id for clip in clips]
    return groups if len(set(groups)) >= MIN_UNITS else [clip.id for clip in clips]


def divided(fold: Fold, seed: int) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """Clips to train on and to validate on."""
    return (fold.train, fold.valid) if fold.valid else held_out(fold.train, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks with a head
# ---------------------------------------------------------------------------------------------------------------------


def _trained_results(
    task: Task,
    representation: Representation,
    cache: EmbeddingCache,
    settings: Settings,
    kept: KeptResults | None,
) -> list[Result]:
    problem = PROBLEMS[task.kind](task, representation)
    wanted = settings.features or (("weighted",) if problem.framewise else FEATURES)
    if problem.framewise:
        representation.check_timed(task.name)
    if "blstm" in settings.heads and not problem.framewise:
        raise ValueError(f"the task {task.name} is of clips, not of frames: the head blstm cannot be tried on it")
    results: list[Result] = []
    for head in settings.heads:
        names = feature_sets(representation, wanted, head)
        if problem.framewise:
            joined = max(1, round(RECURRENT_STEP / representation.frame_seconds)) if head == "blstm" else 1
            joined = joined if isinstance(problem, Ctc) else 1  # other targets are of the representation's frames
            make = _frame_features(task, representation, cache, settings, names, joined)
        else:
            make = _pooled_features(task, representation, cache, settings)
        for name in names:
            if kept is not None and (found := kept.get(name, head)) is not None:
                results.append(found)
                continue
            exact = task.kind == "classification" and head == "linear" and name != "weighted"
            if exact and isinstance(sample := make(name, task.folds[0].train), PooledFeatures):
                exact = sample.numbers <= EXACT_NUMBERS
            run = _exact if exact else _by_gradient
            results.append(run(task, problem, name, head, make, settings))
            if kept is not None:
                kept.put(results[-1])
    return results


Maker = Callable[[str, Sequence[Clip]], Features]


def _pooled_features(task: Task, representation: Representation, cache: EmbeddingCache, settings: Settings) -> Maker:
    clips = task.clips
    features = cache.pooled(representation, clips)
    places = {clip.id: place for place, clip in enumerate(clips)}

    def make(name: str, chosen: Sequence[Clip]) -> Features:
        return pooled_set(features, name, settings.pool, [places[clip.id] for clip in chosen])

    return make


def _frame_features(
    task: Task,
    representation: Representation,
    cache: EmbeddingCache,
    settings: Settings,
    names: Sequence[str],
    joined: int,
) -> Maker:
    last = representation.num_layers - 1
    keep = "last" if {layer_of(name) for name in names} == {last} else "frames"
    cache.fill(representation, task.clips, keep)

    def make(name: str, chosen: Sequence[Clip]) -> Features:
        layer = None if keep == "last" else layer_of(name)
        return FrameFeatures(cache, representation, chosen, keep, layer, concatenated=name == "all", joined=joined)

    return make


def _exact(task: Task, problem: Problem, name: str, head: str, make: Maker, settings: Settings) -> Result:
    """Logistic regression on fixed features of clips."""

    def rows(clips: Sequence[Clip]) -> np.ndarray:
        features = make(name, clips)
        return features.rows(range(len(clips)))[:, 0].numpy()

    parts: list[tuple[Score, slice]] = []
    validations, penalties, guesses = [], [], []
    validated_by = "validation clips" if all(fold.valid for fold in task.folds) else CROSS_VALIDATION
    start = 0
    for fold in task.folds:
        grouped = any(clip.group for clip in fold.train)
        fit = fit_linear(
            rows(fold.train),
            [clip.labels[0] for clip in fold.train],
            rows(fold.test),
            [clip.labels[0] for clip in fold.test],
            groups=[clip.group or clip.id for clip in fold.train] if grouped else None,
            seed=settings.seed,
            valid_x=rows(fold.valid) if fold.valid else None,
            valid_y=[clip.labels[0] for clip in fold.valid],
        )
        predicted: list[str] = fit.predictions.tolist()
        parts.append((accuracy(predicted, fold.test), slice(start, start + len(fold.test))))
        start += len(fold.test)
        guesses += predicted
        penalties.append(fit.penalty)
        if fit.validation_accuracy is not None:
            validations.append(fit.validation_accuracy)
    details = {
        "solver": "logistic regression",
        "validated_by": validated_by if validations else None,
        "penalty": penalties,
        "more": confusion(guesses, task.test_clips, task.labels),
    }
    return _result(task, problem, name, head, parts, validations, details, settings)


def _by_gradient(task: Task, problem: Problem, name: str, head: str, make: Maker, settings: Settings) -> Result:
    """Heads of the grid, for every seed and fold."""
    device = torch.device(settings.device)
    parts: list[tuple[Score, slice]] = []
    validations, heads, more = [], [], []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        start = 0
        for index, fold in enumerate(task.folds):
            train, valid = divided(fold, seed)
            examples = [_examples(problem, make(name, clips), clips) if clips else None for clips in (train, valid)]
            assert examples[0] is not None
            _check_times(task, examples[0])
            title = f"{task.name}, {problem.representation.name}, {name}, {head}"
            points = grid(head, settings.grid)
            trained = train_heads(examples[0], examples[1], problem, points, seed, device, title, settings.progress)
            outputs = outputs_of(trained.head, make(name, fold.test), device)
            parts.append((problem.score(outputs, fold.test, trained.tuning), slice(start, start + len(fold.test))))
            start += len(fold.test)
            heads.append({"seed": seed, "fold": index, **trained.to_dict()})
            more.append(problem.more(outputs, fold.test, trained.tuning))
            if trained.validation is not None:
                validations.append(trained.validation)
    validated_by = "validation clips" if all(fold.valid for fold in task.folds) else "held-out training clips"
    details = {
        "solver": "gradient",
        "validated_by": validated_by if validations else None,
        "heads": heads,
        "more": _averaged(more),
    }
    return _result(task, problem, name, head, parts, validations, details, settings)


def _examples(problem: Problem, features: Features, clips: Sequence[Clip]) -> Examples:
    targets = [problem.target(clip, length) for clip, length in zip(clips, features.lengths)]
    return Examples(features, clips, targets)


def _check_times(task: Task, train: Examples) -> None:
    """ValueError where clips have segments, and not one frame lies in any."""
    segments = [segment for clip in train.clips for segment in clip.segments]
    if segments and not any(target.any() for target in train.targets):
        raise ValueError(
            f"{task.name}: no training frame lies in any of the {len(segments)} segments, of which the first is from "
            f"{segments[0].start:g} to {segments[0].end:g} s: are the times in seconds?"
        )


def _averaged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of numbers over seeds and folds; tables are summed."""
    averaged: dict[str, Any] = {}
    for key in records[0]:
        values = [np.asarray(record[key]) for record in records if key in record]
        averaged[key] = float(np.mean(values)) if values[0].ndim == 0 else np.sum(values, axis=0).tolist()
    return averaged


def _result(
    task: Task,
    problem: Problem,
    name: str,
    head: str,
    parts: Sequence[tuple[Score, slice]],
    validations: Sequence[float],
    details: dict[str, Any],
    settings: Settings,
) -> Result:
    found = estimate(mean_of(parts), bootstrap_units(task.test_clips), settings.seed, settings.resamples)
    validation = float(np.mean(validations)) if validations else None
    return Result(name, head, problem.metric, problem.higher_is_better, found, validation, details)
