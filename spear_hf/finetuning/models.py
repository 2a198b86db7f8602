# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The model to fine-tune: a checkpoint with a head for the task, or random weights."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..configuration_spear import SpearConfig
from ..feature_extraction_spear import SpearFeatureExtractor
from ..loading_errors import loading
from ..processing_spear import feature_extractor_of
from .arguments import ModelArguments


def load_config(arguments: ModelArguments) -> SpearConfig:
    """Of `--model`, with the values of `--model_config` in place of its own.

    Raises:
        ValueError: neither argument was given, a value is unknown or wrong, or the model is no SPEAR.
        OSError: there is no such model.
    """
    changes = _changes(arguments.model_config)
    if arguments.model is None:
        if arguments.model_config is None:
            raise ValueError(
                "model is not set: name a folder or a Hub id, as in --model marcoyang/spear-base-speech-audio-v2; or "
                "give --model_config for random weights (or try --smoke)"
            )
        return SpearConfig(**changes)
    with loading(arguments.model):
        config = AutoConfig.from_pretrained(arguments.model, **changes)
    if not isinstance(config, SpearConfig):
        raise ValueError(f"model={arguments.model} is of the kind {config.model_type!r}; a SPEAR model is needed")
    return config


def load_model(auto_class: Any, arguments: ModelArguments, config: SpearConfig) -> PreTrainedModel:
    """With the head of `auto_class`, in float32; weights of the head that the checkpoint has not are random.

    ValueError where weights of the encoder are not there, or of other sizes: nobody wants those to be random.
    """
    if arguments.model is None:
        return auto_class.from_config(config)
    with loading(arguments.model):
        model, report = auto_class.from_pretrained(
            arguments.model,
            config=config,
            dtype=torch.float32,  # by default that of the file: half precision loses the small steps of fine-tuning
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    encoder = f"{model.base_model_prefix}."
    absent = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    # The embedding of masked frames is for pre-training.
    lost = sorted(name for name in absent if name.startswith(encoder) and not name.endswith("masked_spec_embed"))
    if lost:
        raise ValueError(
            f"{len(lost)} weights of the encoder are not in {arguments.model} as its configuration asks, such as "
            f"{lost[0]}: take a whole checkpoint, and sizes of it alone in --model_config"
        )
    return model


def load_feature_extractor(arguments: ModelArguments, config: SpearConfig) -> SpearFeatureExtractor:
    """Of `--model`; published folders have none and, as random weights do, get the default."""
    if arguments.model is None:
        return SpearFeatureExtractor(feature_size=config.num_mel_bins)
    return feature_extractor_of(arguments.model, config)


def set_labels(config: SpearConfig, labels: Sequence[str], classes: int = 2) -> dict[str, int]:
    """Label -> class id, also written to the configuration: the model's own if it knows them all, else new ones.

    `labels` may repeat and come in any order; new ids follow their alphabetical order. ValueError for fewer than
    `classes`: of labels that exclude each other there are two at least.
    """
    names = sorted(set(labels))
    if not names:
        raise ValueError("the training rows have no labels: which column holds them? See --label_column.")
    if len(names) < classes:
        raise ValueError(f"all training rows have the label {names[0]!r}: {classes} classes are needed at least")
    known = {name: int(index) for index, name in (config.id2label or {}).items()}  # what is written; never missing
    if set(names) <= set(known):
        config.label2id = dict(known)
        return known
    config.id2label = dict(enumerate(names))
    new = {name: index for index, name in enumerate(names)}
    config.label2id = dict(new)
    return new


def class_ids(labels: Sequence[str], label2id: dict[str, int], row_id: str) -> list[int]:
    """Ids of a row's labels, without repetitions. ValueError names the row and a label that training does not have."""
    for label in labels:
        if label not in label2id:
            raise ValueError(
                f"{row_id} has the label {label!r}, which is not among the {len(label2id)} of the training rows: "
                f"{', '.join(sorted(label2id)[:20])}"
            )
    return sorted({label2id[label] for label in labels})


def _changes(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if text.endswith(".json"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"model_config={text} cannot be read: {error.strerror}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"model_config={text!r} is neither JSON nor the name of a .json file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model_config={text!r} must be a JSON object")
    known = {field.name for field in fields(SpearConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"model_config: SpearConfig has no {', '.join(unknown)}")
    return values
