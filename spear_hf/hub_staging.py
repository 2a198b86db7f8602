# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The copy of a model folder that goes to the Hub: which files, with which configurations and which code.

Published are safetensors weights, configurations, tokenizer files, the model card and what it links to. Everything
else stays behind, and pickles are refused.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.dynamic_module_utils import custom_object_save

from .blockwise_spear import BlockwiseAttention
from .compiled_spear import RelativeScores
from .configuration_spear import PUBLISHED_STACK_LISTS, SpearConfig
from .feature_extraction_spear import SpearFeatureExtractor
from .modeling_spear import (
    SpearForAudioFrameClassification,
    SpearForCTC,
    SpearForPreTraining,
    SpearForSequenceClassification,
    SpearForXVector,
    SpearModel,
)
from .processing_spear import SpearProcessor


MODEL_CLASSES: dict[str, Any] = {
    "AutoModel": SpearModel,
    "AutoModelForAudioClassification": SpearForSequenceClassification,
    "AutoModelForAudioFrameClassification": SpearForAudioFrameClassification,
    "AutoModelForAudioXVector": SpearForXVector,
    "AutoModelForCTC": SpearForCTC,
    "AutoModelForPreTraining": SpearForPreTraining,
}
# Every class by the Auto class that finds it in a repository with code.
AUTO_CLASSES: dict[str, Any] = {
    "AutoConfig": SpearConfig,
    "AutoFeatureExtractor": SpearFeatureExtractor,
    "AutoProcessor": SpearProcessor,
    **MODEL_CLASSES,
}

CONFIG, PREPROCESSOR, PROCESSOR, CARD = "config.json", "preprocessor_config.json", "processor_config.json", "README.md"
TOKENIZER = "tokenizer_config.json"
_MODULES = {cls.__module__ for cls in (*AUTO_CLASSES.values(), BlockwiseAttention, RelativeScores)}
CODE_FILES = tuple(sorted(module.rpartition(".")[2] + ".py" for module in _MODULES))
VOCABULARIES = ("added_tokens.json", "merges.txt", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SETTINGS = (CONFIG, PREPROCESSOR, PROCESSOR, TOKENIZER, "special_tokens_map.json")
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_WEIGHTS_ONE = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_PICKLED_WEIGHTS = re.compile(r"pytorch_model.*\.(bin|bin\.index\.json)")
_PICKLED = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# Pickles that Trainer leaves beside a model: not weights, not published, and no reason to refuse the folder.
_TRAINER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
# What `_registered_for_auto_classes` sets is seen by every thread.
_SAVING = threading.Lock()


def is_replaced(name: str) -> bool:
    """Whether a file of this name in the repository is of an earlier version, if it is not published again."""
    fixed = (*_SETTINGS, *VOCABULARIES, _WEIGHTS_INDEX, *CODE_FILES)
    return name in fixed or bool(_WEIGHTS.fullmatch(name) or _PICKLED_WEIGHTS.fullmatch(name))


def stage(source: Path, staged: Path, with_code: bool) -> list[str]:
    """Fills the empty folder `staged` with what is published of `source`; returns the names that are not."""
    chosen, left_out = _select(source)
    for name in chosen:
        _stage_file(source / name, staged / name)
    try:
        config = _read_config(staged, source)
        if with_code and getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{source} is in int8, which the code on the Hub cannot read: its layers would get random weights. "
                "Publish it without code, or the model that it was made from."
            )
        _write_settings(staged, config, with_code)
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{source} does not load, so it is not published: {error}") from error
    return left_out


def _select(source: Path) -> tuple[list[str], list[str]]:
    """Files of the folder to publish, and names to leave; FileNotFoundError or ValueError if it is not fit for it."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give one that save_pretrained wrote.")
    if not (source / CONFIG).is_file():
        inside = [str(path.parent) for path in sorted(source.glob(f"*/{CONFIG}"))]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else ": give a folder that save_pretrained wrote."
        raise FileNotFoundError(f"{source} has no {CONFIG}{hint}")
    files = sorted(path.name for path in source.iterdir() if path.is_file())
    pickled = [name for name in files if name.endswith(_PICKLED) and not _TRAINER_STATE.fullmatch(name)]
    if pickled:
        raise ValueError(
            f"{source} holds pickles, which can run code on the machine that loads them: {', '.join(pickled)}. "
            "Move them away; if they are the weights, load the model, save_pretrained it elsewhere and publish that."
        )
    # Code comes from this package and never from the folder, where it may be older than the weights.
    chosen = {name for name in files if (is_replaced(name) and name not in CODE_FILES) or name in (CARD, *_LICENSES)}
    if not any(_WEIGHTS.fullmatch(name) for name in chosen):
        raise FileNotFoundError(f"{source} has no weights (model.safetensors): save_pretrained the model there first.")
    if {_WEIGHTS_ONE, _WEIGHTS_INDEX} <= chosen:
        raise ValueError(
            f"{source} has both {_WEIGHTS_ONE} and {_WEIGHTS_INDEX}, of two saves, and transformers loads the former: "
            "remove the older one."
        )
    if CARD in chosen:
        chosen |= _linked_files(source)
    left_out = [name for name in files if name not in chosen]
    for folder in sorted(path.name for path in source.iterdir() if path.is_dir()):
        if not any(name.startswith(f"{folder}/") for name in chosen):
            left_out.append(f"{folder}/")
    return sorted(chosen), left_out


def _linked_files(source: Path) -> set[str]:
    """Files of the folder that the card shows or links to."""
    text = re.sub(r"```.*?```", "", (source / CARD).read_text(encoding="utf-8-sig"), flags=re.DOTALL)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""<img[^>]*?src=["']([^"']+)""", text)
    found = set()
    for link in links:
        name = link.split("#")[0]
        if not name or re.match(r"[A-Za-z][\w+.-]*:|//", name):
            continue
        path = (source / name).resolve()
        if not path.is_relative_to(source.resolve()) or not path.is_file():
            raise ValueError(
                f"{source / CARD} links to {name}, which is no file in {source}: add it, or drop the link."
            )
        if path.suffix in _PICKLED:
            raise ValueError(f"{source / CARD} links to {name}: pickles are not published; drop the link.")
        found.add(path.relative_to(source.resolve()).as_posix())
    return found


def _stage_file(origin: Path, target: Path) -> None:
    """Weights as a link, because of their size; whatever may be rewritten as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if origin.suffix == ".safetensors":
        try:
            target.symlink_to(origin.resolve())
            return
        except OSError:  # a system without links, or without the right to make them
            pass
    shutil.copyfile(origin, target)


def _read_config(staged: Path, source: Path) -> SpearConfig:
    """The configuration; a checkpoint with the published names is converted to ours on the way."""
    values = _read_json(staged / CONFIG, source)
    if (kind := values.get("model_type")) != SpearConfig.model_type:
        raise ValueError(f"{source / CONFIG} has model_type {kind!r}: only SPEAR models ('spear') are published.")
    if not any(key in values for key in PUBLISHED_STACK_LISTS):
        return SpearConfig.from_pretrained(staged)
    model = SpearModel.from_pretrained(staged)
    for path in staged.glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(staged)
    return model.config


def _read_json(path: Path, source: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source / path.name} is not JSON ({error}): save the model again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source / path.name} holds a {type(values).__name__}, not settings: save the model again.")
    return values


@contextmanager
def _registered_for_auto_classes() -> Iterator[None]:
    """Within it `save_pretrained` adds code and `auto_map`; only here, as otherwise every save of a user would."""
    before = {cls: cls._auto_class for cls in AUTO_CLASSES.values()}
    try:
        for name, cls in AUTO_CLASSES.items():
            cls.register_for_auto_class(name)
        yield
    finally:
        for cls, name in before.items():
            cls._auto_class = name


def _write_settings(staged: Path, config: SpearConfig, with_code: bool) -> None:
    """Completes the configurations, and adds the code: they have an `auto_map` exactly if there is code."""
    known = (staged / PREPROCESSOR).is_file() or (staged / PROCESSOR).is_file()
    extractor = (
        SpearFeatureExtractor.from_pretrained(staged)
        if known
        else SpearFeatureExtractor(feature_size=config.num_mel_bins)
    )
    vars(config).pop("auto_map", None)
    vars(extractor).pop("auto_map", None)
    auto_map = {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in AUTO_CLASSES.items()}
    if not (staged / TOKENIZER).is_file():
        # There is no processor to load then: left out, AutoProcessor finds the feature extractor.
        del auto_map["AutoProcessor"]
    with _SAVING:
        if with_code:
            config.auto_map = dict(auto_map)
            with _registered_for_auto_classes():
                config.save_pretrained(staged)
                extractor.save_pretrained(staged)
                for cls in (SpearModel, SpearProcessor):
                    custom_object_save(cls, staged)
        else:
            config.save_pretrained(staged)
            extractor.save_pretrained(staged)
    if (staged / PROCESSOR).is_file():
        # Edited, as saving the processor would write the tokenizer anew as well.
        processor = _read_json(staged / PROCESSOR, staged)
        parts = {"AutoProcessor": processor, "AutoFeatureExtractor": processor.get("feature_extractor")}
        for name, settings in parts.items():
            if isinstance(settings, dict):
                settings.pop("auto_map", None)
                if with_code and name in auto_map:
                    settings["auto_map"] = {name: auto_map[name]}
        (staged / PROCESSOR).write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n", encoding="utf-8")
