# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are whole or not there.

    OUTPUT/checkpoints/
        step-00000100/
            model/             what `save_pretrained` writes: AutoModel loads it
            optimizer.pt       state of the optimiser (torch.save, read with weights_only=True)
            average.pt         sums of the running average of the weights (likewise)
            regularizers.json  state of the regularisers; see regularizers.py
            state.json         step, hours of audio seen, ... : plain values
            COMPLETE           format version; size and sha256 of every file above; written last
        step-00000200/
        step-00000300.partial/ a save that was cut short: never read, removed by the next one

A checkpoint is written under a temporary name, every file is flushed to disk, then COMPLETE, then the folder is
renamed. A reader takes the newest folder whose files agree with its COMPLETE, so a torn or damaged checkpoint costs
the steps since the one before it, and a full disk costs nothing but the new one.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
PREFIX, PARTIAL, RECORD = "step-", ".partial", "COMPLETE"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


class FormatError(CheckpointError):
    """A checkpoint of another version of spear_hf, which may well be whole."""


class SaveError(OSError):
    """What could not be written, most often because the disk is full; the checkpoints before it are whole."""


def sync_path(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / RECORD)


@contextlib.contextmanager
def save_errors(what: str, folder: Path, advice: str) -> Iterator[None]:
    """SaveError with the `advice` if `what` cannot be written to `folder`: each writer says it in its own way."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free
        raise SaveError(
            f"{what} could not be written to {folder}, where {free / 1e6:,.0f} MB are free: {error}. {advice}"
        ) from error


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder and makes it appear at `target` whole, with its COMPLETE record, or not at all.

    An older folder at `target` is replaced; it is gone for a moment, between two renames.
    """
    partial = target.with_name(target.name + PARTIAL)
    replaced = target.with_name(target.name + ".replaced" + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        seal(partial)
        shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed here
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        sync_path(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not left full
        raise


def seal(folder: Path) -> None:
    """Flushes every file of `folder` to the disk and writes the COMPLETE record of their sizes and hashes."""
    record: dict = {"format_version": FORMAT_VERSION, "files": {}}
    for path in _files(folder):
        sync_path(path)
        record["files"][path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync_path(folder / RECORD)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_path(path)
    sync_path(folder)


def verify(folder: Path) -> None:
    """CheckpointError, with the reason, unless every file of `folder` is as its COMPLETE record says.

    FormatError where the record is of another version.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version, files = record["format_version"], dict(record["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {RECORD} record: the save was cut short.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECORD} is damaged ({error}).") from None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format version {version}, this spear_hf reads {FORMAT_VERSION}: use the spear_hf it is of."
        )
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['size']}.")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} has changed since it was saved (its sha256 differs).")


class CheckpointFolder:
    """The checkpoints of a run: saves the newest, finds the newest that is whole, removes old ones.

    Args:
        folder: OUTPUT/checkpoints; need not exist yet.
        keep: how many to keep.
    """

    def __init__(self, folder: str | Path, keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the renamed checkpoints, ascending; they may still turn out damaged."""
        if not self.folder.is_dir():
            return []
        names = (path.name[len(PREFIX) :] for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Has `write` fill a folder, makes it the checkpoint of `step`, and removes all but the last `keep` up to it.

        Those of later steps are damaged, else the run would have gone on from one of them. SaveError if writing fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)
        path = self.path(step)
        before = [other for other in self.steps() if other < step]
        advice = f"The last whole one is of step {before[-1]}" if before else "There is none before it"
        advice += "; make room and continue with --resume."
        with save_errors(f"The checkpoint of step {step}", self.folder, advice):
            write_folder(path, write)
        staying = [other for other in self.steps() if other <= step][-self.keep :]
        for other in set(self.steps()) - set(staying):
            shutil.rmtree(self.path(other), ignore_errors=True)  # what cannot be removed now is so by the next save
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are as they were saved, of which it reads all bytes; None of a new run.

        CheckpointError if there are checkpoints, but no whole one, or one of another version of spear_hf: beginning
        anew would remove what may yet be saved.
        """
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except FormatError:
                raise
            except CheckpointError as error:
                logger.warning("Checkpoint of step %d is not used: %s", step, error)
            else:
                return self.path(step)
        if self.steps():
            raise CheckpointError(
                f"No checkpoint in {self.folder} is whole: restore one, or remove the folder, and --resume starts "
                "from the beginning."
            )
        return None
