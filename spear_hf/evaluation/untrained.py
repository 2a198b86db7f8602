# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Tasks that compare frozen features with each other: verification of speakers, and query by example.

Verification: the cosine of two clips' features (of the mean over time, as `pool` says), centred and scaled by the
training clips, or by the test clips of a task without any; and, with the head `mlp`, of x-vectors: what enters the
last layer of an MLP on the statistics over time that was trained to name the training speakers, with the first
settings of its grid. A fifth of these speakers are left out of that, and select the features.

Query by example: retrieval.py. The training and the test split are two voices, each of which says every item once;
items are compared within a language, and every language may have two voices of its own. The headline `selected` takes
for either half of the items the layer that is best on the other half.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ..data.seeding import keyed_generator
from .bootstrap import Score, estimate, mean_of, ratio
from .embedding_cache import EmbeddingCache
from .heads import Examples, PooledFeatures, Trained, grid, outputs_of, train_heads
from .metrics import minimum_detection_cost, weighted_equal_error_rate
from .problems import Classification
from .protocols import FEATURES, KeptResults, Result, Settings, bootstrap_units, feature_sets, pooled_set
from .representations import Representation
from .retrieval import match_recordings
from .tasks import Clip, Task, query_items


MAX_TRIALS = 50_000
NUMBERS_AT_ONCE = 10**7  # of either clip's vectors, which are compared: all layers of all trials are 8 GB
VALIDATION_SPEAKERS = 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Verification
# ---------------------------------------------------------------------------------------------------------------------


def verification_results(
    task: Task,
    representation: Representation,
    cache: EmbeddingCache,
    settings: Settings,
    kept: KeptResults | None = None,
) -> list[Result]:
    """Equal error rates by features, of cosines (head `cosine`) and of x-vectors (head `mlp`) that are not `kept`."""
    fold = task.folds[0]
    known, valid = _speakers_apart([*fold.train, *fold.valid], settings.seed)
    wanted = settings.features or FEATURES
    results = []
    parts = {"train": known, "valid": valid, "test": list(fold.test)}
    pooled = {name: cache.pooled(representation, clips) for name, clips in parts.items() if clips}
    for name in feature_sets(representation, [item for item in wanted if item != "weighted"], "linear"):
        vectors = _standardised({part: pooled_set(array, name, settings.pool) for part, array in pooled.items()})
        results.append(_verified(task, name, "cosine", [vectors], parts, settings))
    if "mlp" in settings.heads and len({clip.speaker for clip in known}) > 1:
        for name in feature_sets(representation, wanted, "mlp"):
            if kept is not None and (found := kept.get(name, "mlp")) is not None:
                results.append(found)
                continue
            vectors_by_seed, heads = [], []
            for seed in range(settings.seed, settings.seed + settings.seeds):
                vectors, trained = _x_vectors(task, representation, name, pooled, parts, replace(settings, seed=seed))
                vectors_by_seed.append(vectors)
                heads.append({"seed": seed, "fold": 0, **trained.to_dict()})
            results.append(_verified(task, name, "mlp", vectors_by_seed, parts, settings))
            results[-1].details["heads"] = heads
            if kept is not None:
                kept.put(results[-1])
    return results


def _standardised(features: dict[str, PooledFeatures]) -> dict[str, np.ndarray]:
    """Vectors (clips, width) of the parts that are tested, centred and scaled as the module says, layer by layer."""
    base = features.get("train", features["test"])
    columns: dict[str, list[np.ndarray]] = {part: [] for part in features if part != "train"}
    for layer in range(base.by_clip.shape[1]):
        known = np.ascontiguousarray(base.by_clip[:, layer])
        mean, scale = known.mean(axis=0), known.std(axis=0)
        scale[scale < 1e-6] = 1.0
        for part, found in columns.items():
            found.append((features[part].by_clip[:, layer] - mean) / scale)
    return {part: np.concatenate(found, axis=1) for part, found in columns.items()}


def _speakers_apart(clips: Sequence[Clip], seed: int) -> tuple[list[Clip], list[Clip]]:
    """Clips of the speakers to train on, and of a fifth of the speakers, two at least, if that leaves two."""
    speakers = sorted({str(clip.speaker) for clip in clips})
    count = max(2, round(VALIDATION_SPEAKERS * len(speakers)))
    if len(speakers) < count + 2:
        return list(clips), []
    order = keyed_generator(seed, "validation speakers").permutation(len(speakers))
    chosen = {speakers[place] for place in order[:count].tolist()}
    sides: tuple[list[Clip], list[Clip]] = ([], [])
    for clip in clips:
        sides[clip.speaker in chosen].append(clip)
    return sides


def _x_vectors(
    task: Task,
    representation: Representation,
    name: str,
    pooled: dict[str, np.ndarray],
    parts: dict[str, list[Clip]],
    settings: Settings,
) -> tuple[dict[str, np.ndarray], Trained]:
    """Vectors of the parts that are tested, by the head whose settings are the first of the grid, and that head."""
    speakers = tuple(sorted({str(clip.speaker) for clip in parts["train"]}))
    naming = replace(task, kind="classification", labels=speakers)
    clips = {part: [replace(clip, labels=(str(clip.speaker),)) for clip in items] for part, items in parts.items()}
    problem = Classification(naming, representation)
    features = {part: pooled_set(array, name, settings.pool) for part, array in pooled.items()}
    train = Examples(features["train"], clips["train"], [problem.target(clip, 1) for clip in clips["train"]])
    device = torch.device(settings.device)
    title = f"{task.name}, {representation.name}, {name}, x-vectors"
    points = grid("mlp", settings.grid)
    trained = train_heads(train, None, problem, points, settings.seed, device, title, settings.progress)
    vectors = {
        part: np.concatenate(outputs_of(trained.head, item, device, embed=True))
        for part, item in features.items()
        if part != "train"
    }
    return vectors, trained


def _verified(
    task: Task,
    name: str,
    head: str,
    vectors: Sequence[dict[str, np.ndarray]],
    parts: dict[str, list[Clip]],
    settings: Settings,
) -> Result:
    test = parts["test"]
    pairs = [trials(by_part["test"], test, settings.seed) for by_part in vectors]
    units = bootstrap_units([replace(clip, group=clip.speaker) for clip in test])
    parts_of_mean = [(pair.score, slice(None)) for pair in pairs]
    found = estimate(mean_of(parts_of_mean), units, settings.seed, settings.resamples)
    costs = [minimum_detection_cost(pair.cosines, pair.same) for pair in pairs]
    validation = None
    if valid := parts["valid"]:
        ones = np.ones(len(valid), dtype=np.int64)
        try:
            rates = [trials(by_part["valid"], valid, settings.seed).score(ones) for by_part in vectors]
            validation = -float(np.mean(rates))
        except ValueError:  # no speaker has two clips
            validation = None
    details = {"test_speakers": len({clip.speaker for clip in test}), "more": {"min_dcf": float(np.mean(costs))}}
    return Result(name, head, "eer", False, found, validation, details)


@dataclass(frozen=True)
class Trials:
    """Pairs of clips by their places (trials,), their cosines, and 1 where the speaker is the same."""

    first: np.ndarray
    second: np.ndarray
    cosines: np.ndarray
    same: np.ndarray

    def score(self, weights: np.ndarray) -> float:
        """The equal error rate. A pair counts as often as the product of its clips' weights (clips,) says."""
        return self._rate(weights[self.first] * weights[self.second])

    @cached_property
    def _rate(self) -> Score:
        return weighted_equal_error_rate(self.cosines, self.same)


def trials(vectors: np.ndarray, clips: Sequence[Clip], seed: int) -> Trials:
    """All pairs of clips with vectors (clips, width), or 50,000 of them, drawn by the seed.

    Half of the drawn ones are of one speaker, if there are so many: of thousands of speakers a pair hardly ever is,
    and the error rates depend on either kind by itself.
    """
    number = len(clips)
    speakers = np.unique([str(clip.speaker) for clip in clips], return_inverse=True)[1]
    if number * (number - 1) // 2 <= MAX_TRIALS:
        first, second = np.triu_indices(number, k=1)
    else:
        order = np.argsort(speakers, kind="stable")
        own = np.arange(1, number + 1)  # where the clips behind each begin, with the clips sorted by speaker
        others = np.searchsorted(speakers[order], speakers[order], side="right")  # and those of other speakers
        rng = keyed_generator(seed, "trials", number)
        pairs_of_one = int((others - own).sum())
        of_one = min(pairs_of_one, max(MAX_TRIALS // 2, MAX_TRIALS - int((number - others).sum())))
        drawn = [_drawn(own, others, of_one, rng), _drawn(others, np.full(number, number), MAX_TRIALS - of_one, rng)]
        first, second = order[np.concatenate(drawn, axis=1)]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    same = (speakers[first] == speakers[second]).astype(np.int64)
    at_once = max(1, NUMBERS_AT_ONCE // unit.shape[1])
    cosines = [
        np.einsum("td,td->t", unit[first[start : start + at_once]], unit[second[start : start + at_once]])
        for start in range(0, len(first), at_once)
    ]
    return Trials(first, second, np.concatenate(cosines), same)


def _drawn(begin: np.ndarray, end: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(2, count): `count` of the pairs of a clip i with one from `begin[i]` to before `end[i]`, each once at most."""
    ends = np.cumsum(end - begin)
    place = rng.choice(int(ends[-1]), count, replace=False)
    first = np.searchsorted(ends, place, side="right")
    return np.stack([first, place - ends[first] + end[first]])


# ---------------------------------------------------------------------------------------------------------------------
# Query by example
# ---------------------------------------------------------------------------------------------------------------------


def query_results(
    task: Task, representation: Representation, cache: EmbeddingCache, settings: Settings
) -> list[Result]:
    """ABX accuracy of every layer, and of the layer selected on the other half of the items."""
    representation.check_timed(task.name)
    first, second = query_items(task)
    items = list(first)
    sides = [list(first.values()), [second[item] for item in items]]
    cache.fill(representation, [clip for side in sides for clip in side], "frames")
    labels, pools = [label for _, label in items], [language for language, _ in items]
    units = [str(item) for _ in sides for item in items]
    results: list[Result] = []
    corrects = []
    for layer in range(representation.num_layers):
        frames = [[cache.frames(representation, clip, layer=layer)[0] for clip in side] for side in sides]
        match = match_recordings(frames[0], frames[1], labels, pools, settings.seed)
        corrects.append(match.correct)
        name = "features" if representation.num_layers == 1 else f"layer {layer}"
        hits = float((match.predictions == np.tile(labels, 2)).mean())
        results.append(_queried(name, match.correct, units, settings, len(labels), hits))
    if len(results) == 1:
        return results
    halves = np.tile(np.arange(len(labels)) % 2, 2)
    chosen = np.zeros(len(units))
    layers = []
    for half in (0, 1):
        best = int(np.argmax([correct[halves != half].mean() for correct in corrects]))
        chosen[halves == half] = corrects[best][halves == half]
        layers.append(best)
    selected = _queried("selected", chosen, units, settings, len(labels), None)
    selected.details["layers"] = layers
    return [selected, *results]


def _queried(
    name: str, correct: np.ndarray, units: list[str], settings: Settings, items: int, hits: float | None
) -> Result:
    found = estimate(ratio(correct, np.ones(len(correct))), units, settings.seed, settings.resamples)
    more = {} if hits is None else {"more": {"nearest_is_the_item": hits}}
    return Result(name, "none", "abx_accuracy", True, found, None, {"items": items, **more})
