# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A quantiser on disk.

    QUANTIZER/
      config.json          format_version, the fields of QuantizerConfig, quantizer_id
      model.safetensors    centers, to_logits.weight, to_logits.bias, logits_scale, centers_scale (float32);
                           feature_mean and feature_std with `normalize`

Every file is written under a temporary name beside its own, synced and renamed; a new folder appears whole. The reader
checks the content against `quantizer_id`, so a folder left half replaced by an interrupted save is refused.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from spear_hf.loading_errors import loading
from spear_hf.mvq.atomic_files import write_atomically


CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def write_quantizer(folder: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; equal content gives equal bytes."""
    target = Path(os.path.abspath(folder))
    weights = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    files = {WEIGHTS_NAME: weights, CONFIG_NAME: text.encode()}
    if target.is_file():
        raise ValueError(f"{target} is a file; save_pretrained needs the name of a folder.")
    exists = target.is_dir()
    partial = (target if exists else target.parent) / f".{target.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(partial / name, content)
        if exists:
            for name in files:
                os.replace(partial / name, target / name)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_quantizer(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a quantiser: a folder as it is, a Hub id downloaded (config.json and safetensors only)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
        raise FileNotFoundError(f"{name} is not a folder; give the folder of a quantiser or a Hub id OWNER/NAME.")
    from huggingface_hub import snapshot_download

    with loading(name, "quantiser"):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))


def read_quantizer(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Content of both files; ValueError or FileNotFoundError, with the way out, for what this version cannot read."""
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not weights_path.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise ValueError(
                f"{folder} has pickled weights ({', '.join(pickled)}) and no {WEIGHTS_NAME}. Pickles are not loaded; "
                "convert once: MultiCodebookQuantizer.from_multi_quantization(torch.load(FILE, weights_only=True))"
                ".save_pretrained(FOLDER)."
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}: it holds no quantiser, or an incomplete one.")
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: it holds no quantiser, or an incomplete one.")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is not JSON ({error}); save or download the quantiser again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds a {type(config).__name__}, not an object of settings.")
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{config_path}: format_version is {version!r}, and this version of spear_hf reads {FORMAT_VERSION}. "
            "Either this is no quantiser or a newer spear_hf wrote it: upgrade spear_hf."
        )
    try:
        tensors = safetensors.torch.load_file(weights_path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_path} is cut off or damaged ({error}); save or download it again.") from error
    return config, tensors
