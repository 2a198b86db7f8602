# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: what may be started in it, what may go on in it.

OUTPUT/
    config.yaml         every setting of the run
    sources.json        the token stores that it has begun with: those on the Hub at a commit
    samples.json        checksums of a few utterances and their tokens; see data_check.py
    unigrams.json       how often each token occurs in training: what held-out audio is compared with
    metrics.jsonl       one object per step
    evaluation.jsonl    one object per validation
    averaged.jsonl      what the averaged weights score on held-out audio, once they are published
    probes.jsonl        one object per probing, where logging.probe_every asks for it
    tensorboard/        what the trackers write
    tokenizers/  tokens/   quantisers and tokens that the run made itself
    checkpoints/        see checkpoints.py
    lock                locked by the process that trains here
    final/              the averaged model: AutoModel, AutoModelForPreTraining, AutoFeatureExtractor
        encoder/        the encoder alone, without the heads of pre-training
        README.md       model card with the curves of the run, plots/
"""

import contextlib
import errno
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from ..mvq.atomic_files import write_atomically
from .config import FREE_ON_RESUME, MAY_MOVE, PreTrainingConfig
from .config_loading import build, changed_keys, parse_yaml, to_plain


try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class RunFolder:
    """Paths of a run, and the checks before it starts."""

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir)
        self.config = self.path / "config.yaml"
        self.sources = self.path / "sources.json"
        self.samples = self.path / "samples.json"
        self.unigrams = self.path / "unigrams.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.jsonl"
        self.averaged = self.path / "averaged.jsonl"
        self.probes = self.path / "probes.jsonl"
        self.trackers = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizers = self.path / "tokenizers"
        self.tokens = self.path / "tokens"
        self.final = self.path / "final"
        self.lock = self.path / "lock"
        self._locked: BinaryIO | None = None

    def check(self, config: PreTrainingConfig, resume: bool) -> list[str]:
        """ValueError where starting would overwrite something, or resuming would continue another training.

        Keys of data that a run which is resumed has at another place.
        """
        self.check_place()
        if not resume:
            if self._holds_something():
                raise ValueError(
                    f"{self.path} is not empty: continue its run with --resume, or choose another folder with "
                    "--set output_dir=PATH."
                )
            return []
        if not self.config.is_file():
            if self._holds_something():
                raise ValueError(f"{self.path} is not the folder of a run (it has no config.yaml): nothing to resume.")
            logger.warning("%s does not exist yet: the run starts from the beginning.", self.path)
            return []
        self.claim()
        earlier = to_plain(build(PreTrainingConfig, self.read_config()))
        now = to_plain(config)
        changed = changed_keys(earlier, now)
        moved = [key for key in changed if MAY_MOVE.fullmatch(key) and _look_up(earlier, key) and _look_up(now, key)]
        refused = [key for key in changed if key.split(".")[0] not in FREE_ON_RESUME and key not in moved]
        if refused:
            details = ", ".join(f"{key} ({_look_up(earlier, key)} -> {_look_up(now, key)})" for key in refused)
            raise ValueError(
                f"The run in {self.path} was started with another configuration: {details}. Undo the change, or "
                f"start a new run in another folder. Free to change are {', '.join(FREE_ON_RESUME)}, and where "
                "data.manifest, data.store, targets.NAME.store and mixing.noise_manifest are."
            )
        if altered := [key for key in changed if key != "output_dir"]:
            logger.warning("Resuming with changed settings: %s.", ", ".join(altered))
        return moved

    def check_place(self) -> None:
        """ValueError where the folder, or one above that is to be made, cannot be written into."""
        path = self.path.absolute()
        # Path.exists is an error in a folder that may not be searched; os.path.exists goes on to that folder.
        place = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
        if not place.is_dir():
            raise ValueError(f"output_dir={self.path}: {place} is a file. Choose another folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(
                f"output_dir={self.path}: {place} cannot be written into. Choose another folder, or ask for the right."
            )

    def _holds_something(self) -> bool:
        """Of a run, or of somebody else: a start that came to nothing may have left the lock."""
        return self.path.is_dir() and any(path != self.lock for path in self.path.iterdir())

    def claim(self) -> None:
        """Keeps other processes from training here until `release`, or the end of this one. ValueError where one does.

        The lock is one that worker processes do not inherit, and that ends with its process, however it ends.
        """
        if fcntl is None or self._locked is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.lock.open("a+b", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "Another process"
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{holder} is training in {self.path}: end it first, or choose another folder with --set "
                    f"output_dir=PATH. If its computer is gone, remove {self.lock}."
                ) from None
            logger.warning("%s has no locks (%s): start one process in it at a time.", self.path, error)
            return
        self._locked = file
        with contextlib.suppress(OSError):  # a full disk is told of where something is lost
            file.truncate(0)
            file.write(f"Process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Undoes `claim`."""
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def create(self, config: PreTrainingConfig) -> None:
        """Makes the folder and writes config.yaml."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, yaml.safe_dump(to_plain(config), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """What config.yaml holds. ValueError if it is damaged."""
        try:
            values = parse_yaml(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.config} is damaged: restore it, as it says what the run is. {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{self.config} is damaged: restore it. It has no keys and values, as every run's has.")
        return values


def read_record(path: Path) -> Any:
    """A JSON file of a run's folder. ValueError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or delete it, and the next start makes it anew."
        ) from None


def _look_up(values: dict, key: str) -> object:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values
