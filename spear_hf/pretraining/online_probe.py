# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear probes of the encoder as the run goes: whether what it learns is good for anything but its own task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.manifest import Utterance
from ..data.manifest_columns import open_manifest
from ..evaluation.probe import concatenated, linear_probe, pooled_features
from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearModel
from .config import LoggingConfig
from .corpus import manifest_source


class OnlineProbe:
    """Probes of a labelled manifest: the encoder frozen, all its layers concatenated, so that no layer is chosen.

    ValueError if the manifest has no such probe, or one without utterances and labels to train or test on.
    """

    def __init__(self, config: LoggingConfig, extractor: SpearFeatureExtractor, seed: int) -> None:
        self.extractor = extractor
        self.seed = seed
        assert config.probe_manifest is not None  # LoggingConfig sees to it
        source = manifest_source(config.probe_manifest, key="logging.probe_manifest")
        labelled = [row for row in open_manifest(source) if row.probe and isinstance(row.label, str)]
        known = sorted({row.probe for row in labelled if row.probe})
        self.tasks: dict[str, tuple[list[Utterance], list[Utterance]]] = {}
        for name in config.probes or known:
            train, test = (
                [row for row in labelled if row.probe == name and row.split == split]
                for split in ("probe_train", "probe_test")
            )
            if not train or not test:
                raise ValueError(
                    f"The probe {name} has {len(train)} labelled rows of split probe_train and {len(test)} of "
                    f"probe_test in {source}; its probes are: {', '.join(known) or 'none'}."
                )
            _check_labels(name, set(_labels(train)), set(_labels(test)), source)
            self.tasks[name] = train, test
        if not self.tasks:
            raise ValueError(f"{source} has no labelled probe: rows with probe, label and split are needed.")

    def __call__(self, encoder: SpearModel) -> dict[str, Any]:
        """Test accuracy of every probe, with its 95 % interval."""
        was_training = encoder.training
        encoder.eval()
        record: dict[str, Any] = {}
        try:
            for name, (train, test) in self.tasks.items():
                features = concatenated(pooled_features(encoder, self.extractor, [*train, *test]))
                result = linear_probe(
                    features[: len(train)],
                    _labels(train),
                    features[len(train) :],
                    _labels(test),
                    groups=_speakers(train),
                    seed=self.seed,
                )
                record[f"{name}_accuracy"] = result.accuracy
                record[f"{name}_accuracy_low"], record[f"{name}_accuracy_high"] = result.low, result.high
        finally:
            encoder.train(was_training)
        return record


def _check_labels(name: str, train: set[str], test: set[str], source: Path) -> None:
    if len(train) < 2:
        raise ValueError(f"The probe {name} in {source} has one label to train on, {train.pop()}: that is no task.")
    if unknown := sorted(test - train):
        shown = ", ".join(unknown[:10])
        raise ValueError(f"The probe {name} in {source} has test labels that no row of probe_train has: {shown}.")


def _labels(utterances: Sequence[Utterance]) -> list[str]:
    return [str(utterance.label) for utterance in utterances]


def _speakers(utterances: Sequence[Utterance]) -> list[str] | None:
    """The groups of the cross-validation, where every utterance has a speaker and there are several."""
    speakers = [utterance.speaker for utterance in utterances]
    return [str(name) for name in speakers] if all(speakers) and len(set(speakers)) > 1 else None
