# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of checkpoints: safetensors in folders and on the Hub, pickles with `weights_only=True`."""

import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import ConversionError, listed


CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
# The unused vectors of a published checkpoint whose values are not the usual ones: kept beside our weights, so that
# the way back gives the same file.
LEFT_OVER_FILE = "published_left_over.safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
# icefall's training checkpoints hold the experiment's folder. A path is no code, and is read as a pure one.
_PATHS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (pathlib.PurePosixPath, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath")
]

Kind = Literal["published", "icefall", "spear_hf"]


@dataclass(frozen=True)
class Source:
    """What was read, under the names that it has there."""

    label: str
    kind: Kind
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # config.json; icefall has none
    left_over: dict[str, Tensor] = field(default_factory=dict)  # content of LEFT_OVER_FILE
    unread: tuple[str, ...] = ()  # entries of a pickle beside `model`
    folder: Path | None = None


def read_source(source: str | Path, revision: str | None = None) -> Source:
    """A folder, an icefall `.pt` or a Hub id; ConversionError for whatever is not complete and understood."""
    path = Path(source)
    if path.is_file():
        return _read_icefall(path)
    if path.is_dir():
        return read_folder(path, str(source))
    if path.is_absolute() or str(source).startswith(".") or len(path.parts) != 2:
        raise ConversionError(f"{source} does not exist; give a folder, an icefall .pt or a Hub id OWNER/NAME.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [CONFIG, WEIGHTS, INDEX, SHARDS, LEFT_OVER_FILE]
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        raise ConversionError(f"{source} is neither a folder here nor a repository to be had: {error}") from error
    return read_folder(folder, f"{source} at {folder.name[:12]}")


def read_folder(folder: Path, label: str) -> Source:
    """config.json and safetensors, in one file or in shards."""
    config = _read_json(folder / CONFIG)
    if config.get("model_type") != "spear":
        raise ConversionError(f"{label}: config.json has model_type {config.get('model_type')!r}, not 'spear'.")
    tensors: dict[str, Tensor] = {}
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise ConversionError(f"{label} has both {WEIGHTS} and {INDEX}, of two saves: remove the older one.")
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map", {})
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name:
                raise ConversionError(f"{label}: {INDEX} names a file outside the folder, {name!r}.")
            shard = _read_safetensors(folder / name)
            if differing := {key for key, file in weight_map.items() if file == name} ^ set(shard):
                raise ConversionError(f"{label}: {INDEX} and {name} disagree about {listed(differing)}.")
            tensors |= shard
    elif (folder / WEIGHTS).is_file():
        tensors = _read_safetensors(folder / WEIGHTS)
    else:
        raise ConversionError(f"{label} has neither {WEIGHTS} nor {INDEX}; it is incomplete, or has pickled weights.")
    return Source(
        label=label,
        kind="published" if "encoder_dim" in config else "spear_hf",
        tensors=tensors,
        config=config,
        left_over=_read_safetensors(folder / LEFT_OVER_FILE) if (folder / LEFT_OVER_FILE).is_file() else {},
        folder=folder,
    )


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors, containers, numbers, strings and paths."""
    try:
        with torch.serialization.safe_globals(_PATHS):
            # Mapped into memory: the optimiser's state, several times the model, is then never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|Unsupported [^\n]+", str(error))
        raise ConversionError(
            f"{path} is not loaded: it holds more than tensors and plain values "
            f"({culprit.group(0) if culprit else 'or it is damaged'}), and such a file can run any code. If you wrote "
            "it, save the weights alone, where it was written: torch.save({'model': model.state_dict()}, 'model.pt')."
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ConversionError(f"{path} is damaged or not a file of torch.save: {error}") from error


def read_tensors(path: Path) -> Any:
    """Content of a `.safetensors` or pickled file."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLES:
        return read_pickle(path)
    raise ConversionError(f"{path}: files ending in .safetensors or {', '.join(PICKLES)} are read.")


def plain_tensors(values: Any, label: str) -> dict[str, Tensor]:
    """The mapping as one of names to tensors of their own; ConversionError if it is anything else."""
    if not isinstance(values, Mapping) or not values:
        raise ConversionError(f"{label} holds {type(values).__name__}, not named tensors.")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ConversionError(f"{label}: {name!r} is {type(value).__name__}, not a (dense) tensor.")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in values.items()}


def check_values(tensors: Mapping[str, Tensor], label: str) -> torch.dtype:
    """The floating-point type that all share; ConversionError for several, unusual ones and non-finite values."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConversionError(f"{label}: {name} is {tensor.dtype}; float32, float16 and bfloat16 are converted.")
        if not tensor.isfinite().all():
            raise ConversionError(f"{label}: {name} holds values that are not finite; the training diverged.")
    types = {tensor.dtype for tensor in tensors.values()}
    if len(types) != 1:
        raise ConversionError(f"{label} mixes {listed(map(str, types))}; save it in one type.")
    return types.pop()


def _read_icefall(path: Path) -> Source:
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path}: give the folder, which has the {CONFIG} as well.")
    content = read_pickle(path)
    if not isinstance(content, Mapping) or "model" not in content:
        keys = listed(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ConversionError(f"{path} has no entry `model` (it has: {keys}); icefall's checkpoints have.")
    unread = tuple(sorted(str(key) for key in content if key != "model"))
    return Source(str(path), "icefall", plain_tensors(content["model"], f"{path}, entry model"), unread=unread)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} has no {path.name}: it is no checkpoint, or incomplete.") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except safetensors.SafetensorError as error:
        raise ConversionError(f"{path} is cut off or damaged ({error}); download it again.") from error
