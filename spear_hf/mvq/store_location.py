# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the files of a token store are: in a folder, or in a dataset on the Hub, downloaded one by one when used.

Or in a folder to which another process brings them from the Hub before they are used (shard_fetcher.py).
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_hf.mvq.shard_fetcher import FAILURE, PAUSE, SHARDS, is_served
from spear_hf.mvq.store_format import METADATA, read_metadata


_LOOKS = 16  # at files at a time: of a network's file system each takes a while
LONGEST_WAIT = 3600.0  # seconds; shards are there before they are needed, or their process says why not


@dataclass(frozen=True)
class LocalFolder:
    """A store whose files are there already."""

    folder: Path

    def fetch(self, name: str) -> Path:
        """Where a file is, or would be."""
        return self.folder / name

    def check(self, shards: list[dict[str, Any]]) -> None:
        """ValueError unless the shards are there in the sizes listed; they are not opened."""
        with ThreadPoolExecutor(_LOOKS) as pool:
            for _ in pool.map(self._check, shards):
                pass

    def _check(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["file"]
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: restore it, or run tokenize again to make it anew") from None
        if size != entry.get("bytes", size):
            raise ValueError(
                f"{path} is truncated, or not the shard of this store: it has {size} bytes, {METADATA} says "
                f"{entry['bytes']}; delete it and run tokenize again"
            )

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class HubFolder:
    """A dataset repository at one commit."""

    repo_id: str
    commit: str

    def fetch(self, name: str) -> Path:
        """Downloads a file, or finds it in huggingface_hub's cache."""
        return _download(self.repo_id, name, self.commit)

    def check(self, shards: list[dict[str, Any]]) -> None:
        """The client checks sizes when it downloads."""

    def __str__(self) -> str:
        return f"{self.repo_id} ({self.commit[:12]})"


@dataclass(frozen=True)
class CachedFolder:
    """The shards of `hub` as far as they are in a folder that a `Fetcher` serves."""

    hub: HubFolder
    cache: Path

    @property
    def name(self) -> str:
        """Of the store's folder in the cache."""
        return f"{self.hub.repo_id.replace('/', '--')}@{self.hub.commit}"

    def fetch(self, name: str) -> Path:
        """Waits until the file is there. ValueError when it will not come."""
        path = self.cache / SHARDS / self.name / name
        deadline = time.monotonic() + LONGEST_WAIT
        while not path.exists():
            if not is_served(self.cache) and not path.exists():
                raise ValueError(self._failure())
            if time.monotonic() > deadline:
                raise ValueError(f"{path} did not come within {LONGEST_WAIT / 60:g} minutes: resume the run.")
            time.sleep(PAUSE)
        return path

    def _failure(self) -> str:
        try:
            return (self.cache / FAILURE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return f"the process that fetches shards into {self.cache} has ended unexpectedly: resume the run."

    def __str__(self) -> str:
        return str(self.hub)


def find_store(source: str | Path, revision: str | None = None) -> LocalFolder | HubFolder:
    """The folder of this name if there is one, else the dataset. A Path is always a folder.

    A dataset's revision may also stand behind its name, "OWNER/NAME@REVISION", where only one text can be given.
    """
    folder = Path(source)
    if revision is None and isinstance(source, str) and "@" in source and not folder.exists():
        name, _, behind = source.partition("@")
        if len(name.split("/")) == 2:
            source, revision = name, behind
    parts = str(source).split("/")
    if folder.exists() or isinstance(source, Path) or len(parts) != 2 or not all(parts) or parts[0][0] in ".~":
        if revision is not None:
            raise ValueError(f"{source} is a folder: it has no revision {revision!r}; that is for a store on the Hub")
        return LocalFolder(folder)
    metadata = _download(str(source), METADATA, revision)
    return HubFolder(str(source), metadata.parent.name)  # snapshots/COMMIT/metadata.json


def named_teacher(source: str | Path) -> tuple[str | Path, str | None]:
    """("STORE", "TEACHER") of "STORE#TEACHER"; without a teacher, None."""
    if isinstance(source, str) and "#" in source and not Path(source).exists():
        store, _, teacher = source.rpartition("#")
        return store, teacher
    return source, None


def pinned(source: str) -> str:
    """The same store by a name that stays with what is there now: a dataset's with its commit, a folder's as it is."""
    store, teacher = named_teacher(source)
    location = find_store(store)
    if isinstance(location, LocalFolder):
        return source
    return f"{location.repo_id}@{location.commit}" + (f"#{teacher}" if teacher else "")


def is_joined(source: str) -> bool:
    """Whether a store was made with its audio."""
    location = find_store(named_teacher(source)[0])
    return bool(read_metadata(location.fetch(METADATA).parent).get("with_audio"))


def _download(repo_id: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, name, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at {revision}" if revision else ""
        raise ValueError(
            f"{repo_id}{at}: there is no such folder, and {name} cannot be had from a dataset of this name on the "
            f"Hub: {error}"
        ) from error
