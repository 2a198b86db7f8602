# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Output folders that appear whole: written under a temporary name beside their own, synced and renamed."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConversionError, listed
from .reading import CONFIG, INDEX, LEFT_OVER_FILE, SHARDS, WEIGHTS


# All that conversions write: --force replaces a folder of these, and no other.
WRITTEN = (CONFIG, WEIGHTS, INDEX, SHARDS, LEFT_OVER_FILE, "preprocessor_config.json")


def check_output(output: str | Path, force: bool, source: Path | None = None) -> Path:
    """The folder to write; ConversionError if something is there that must not be replaced."""
    target = Path(output).resolve()
    if source is not None and source.resolve() == target:
        raise ConversionError(f"{output} is the source; choose another folder.")
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise ConversionError(f"{output} is a file; give the name of a folder.")
    content = [entry.name for entry in target.iterdir()]
    if content and not force:
        raise ConversionError(f"{output} is not empty; --force replaces it.")
    if others := [name for name in content if not any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN)]:
        raise ConversionError(f"{output} holds {listed(others)}, which no conversion wrote: it is not replaced.")
    return target


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` if the block succeeds, and is removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except SafetensorError as error:
        raise ConversionError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
