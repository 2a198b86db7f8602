# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What a staged folder must pass before any of it is sent to the Hub. All of it works offline."""

import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from .feature_extraction_spear import SpearFeatureExtractor
from .hub_staging import MODEL_CLASSES, VOCABULARIES
from .modeling_spear import SpearPreTrainedModel


PIPELINE_TAGS = (
    "audio-classification",
    "automatic-speech-recognition",
    "feature-extraction",
    "voice-activity-detection",
)
# Where people keep their files. A path elsewhere, such as /usr/bin/env, says nothing about this machine.
_PRIVATE_PATH = r"""(?:file:/*/|(?<![\w./:~-])/)(?:home|mnt|root|scratch|tmp|Users)/[^\s"'`)]+|[A-Z]:\\+Users\\"""


def check_loads(staged: Path, source: Path) -> SpearPreTrainedModel:
    """The model by its own class, after both this class and AutoModel loaded it; ValueError where one does not."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the load reports are read here, not shown
    try:
        model = _load(AutoModel, staged, source, allowed=("unexpected_keys",))
        architectures = model.config.architectures
        cls = next((cls for cls in MODEL_CLASSES.values() if [cls.__name__] == architectures), None)
        if cls is None:
            known = ", ".join(cls.__name__ for cls in MODEL_CLASSES.values())
            raise ValueError(f"{source}: config.json has architectures {architectures}, not one of {known}.")
        model = _load(cls, staged, source)
    finally:
        transformers_logging.set_verbosity(verbosity)
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(
            f"{source}: {len(bad)} weights are not finite, such as {bad[0]}: publish an earlier checkpoint."
        )
    extractor = SpearFeatureExtractor.from_pretrained(staged)
    if extractor.feature_size != model.config.num_mel_bins:
        raise ValueError(
            f"{source}: the preprocessor makes {extractor.feature_size} mel bins and the model takes "
            f"{model.config.num_mel_bins}; save the feature extractor of this model there."
        )
    second = torch.zeros(extractor.sampling_rate)
    with torch.inference_mode():
        features = extractor(second, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        states = model.base_model(**features).last_hidden_state
    if not torch.isfinite(states).all():
        raise ValueError(f"{source}: the outputs for a second of silence are not finite: publish another checkpoint.")
    return model


def _load(reader: Any, staged: Path, source: Path, allowed: tuple[str, ...] = ()) -> SpearPreTrainedModel:
    """What `reader` loads, in float32; ValueError if it cannot, or if weights and configuration do not match."""
    try:
        # Sizes that differ are to be in the report, with their names.
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = reader.from_pretrained(staged, **options)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{source} does not load with {reader.__name__}, so it is not published: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if kind not in allowed and (keys := sorted(map(str, report[kind]))):
            names = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(
                f"{source}: {reader.__name__} finds {kind.replace('_', ' ')} in the weights: {names}. Weights and "
                "config.json do not belong together; save_pretrained the model again."
            )
    return model


def check_card(card: Path) -> list[str]:
    """What the card should still say; ValueError for metadata that the Hub would refuse or misread."""
    try:
        metadata = ModelCard.load(card).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{card.name}: the metadata at its top is not valid: {error}") from error
    if not metadata:
        raise ValueError(f"{card.name} has no metadata: begin it with a YAML block between two lines of three dashes.")
    for name in ("tags", "language", "datasets", "metrics", "base_model", "license"):
        value = metadata.get(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) and item for item in values):
            raise ValueError(f"{card.name}: `{name}` must be a name or a list of names, not {value!r}.")
        pattern = {"language": r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", "license": r"[a-z0-9][a-z0-9.+-]*"}
        if name in pattern and (wrong := [item for item in values if not re.fullmatch(pattern[name], item)]):
            raise ValueError(
                f"{card.name}: `{name}` {wrong[0]!r} is not an identifier of the Hub, such as en, apache-2.0."
            )
    if (tag := metadata.get("pipeline_tag", PIPELINE_TAGS[0])) not in PIPELINE_TAGS:
        raise ValueError(f"{card.name}: `pipeline_tag` {tag!r} is none of {', '.join(PIPELINE_TAGS)}.")
    return [] if metadata.get("license") else [f"{card.name} names no licence: add `license:` to its metadata."]


def check_no_machine_paths(staged: Path, source: Path) -> None:
    """ValueError where a text or the header of the weights names a path of this machine."""
    places = {str(path) for path in (source.resolve(), staged, Path.cwd(), Path.home())} - {os.sep}
    own = "|".join(rf"(?<![\w./:~-]){re.escape(place)}(?![\w.-])" for place in sorted(places))
    pattern = re.compile(f"{_PRIVATE_PATH}|{own}" if own else _PRIVATE_PATH)
    for path in sorted(staged.rglob("*")):
        name = path.relative_to(staged).as_posix()
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as weights:
                    lines = [f"{key}: {value}" for key, value in (weights.metadata() or {}).items()]
            except SafetensorError as error:
                raise ValueError(f"{source / name} is cut off or damaged ({error}): save the model again.") from error
        elif path.suffix in (".json", ".md", ".txt") and path.name not in VOCABULARIES:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        else:
            continue
        for number, line in enumerate(lines, 1):
            if found := pattern.search(line):
                raise ValueError(
                    f"{source / name} line {number} names a path of this machine, {found.group()!r}: take it out "
                    "before the folder is published."
                )
