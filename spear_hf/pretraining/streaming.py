# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs from stores on the Hub that are larger than the disk: shards come before they are needed, and go.

With `execution.cache_gigabytes`, one process on each node (mvq/shard_fetcher.py), started by its first rank, fetches
the shards of the window that is heard and of the next one; all ranks of the node and their loader workers read them.
When a step has ended on one rank, its data has been read on all, so a window that lies behind the step is not needed
any more. The order of the run follows from `data.window_shards` alone: it is the same whatever the room, or from a
copy of the store in a folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from ..data.utterances import UtteranceList
from ..data.windows import WindowedSampler
from ..mvq.shard_fetcher import COMMAND, SHARDS, ShardFile, Task
from ..mvq.store import TokenStore
from ..mvq.store_location import CachedFolder, HubFolder
from .config import PreTrainingConfig
from .corpus import Corpus


logger = logging.getLogger(__name__)


class ShardStream:
    """The cache of this node. While entered, the stores of the run read from it.

    Args:
        task: for the process that fetches.
        stores: that read from the cache.
        sampler: of the run.
        last_step: of the run.
        fetches: whether this process starts the one that fetches; for one rank of each node.
    """

    def __init__(
        self, task: Task, stores: list[TokenStore], sampler: WindowedSampler, last_step: int, fetches: bool
    ) -> None:
        self.task, self.sampler, self.last_step = task, sampler, last_step
        self.folder = Path(task.folder)
        self._fetches = fetches
        self._process: subprocess.Popen[str] | None = None
        self._stop = 0  # the step before which the fetcher need not hear anything
        for store in stores:
            assert isinstance(store.location, HubFolder)
            store.location = CachedFolder(store.location, self.folder)

    def start(self, step: int) -> None:
        """Before the batch at `step` is read, and before any other rank of the node reads one. ValueError."""
        if not self._fetches:
            return
        self._check_disk()
        self._process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._send(self.task.to_json())
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if error := json.loads(answer or '"the process that fetches shards did not start"'):
            raise ValueError(error)
        self.advance(step)

    def advance(self, step: int) -> None:
        """All ranks have read the batches before `step`."""
        if self._process is not None and self._stop <= step < self.last_step:
            self._stop = self.sampler.turn(step).stop
            self._send(json.dumps(self.sampler.upcoming(step, self.last_step)))

    def discard(self) -> None:
        """Ends the process and empties the disk, once nothing will be read any more."""
        if self._fetches:
            self._end()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # who waits for a shard tells why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _check_disk(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in (self.folder / SHARDS).glob("*/*"))
        free = shutil.disk_usage(self.folder).free
        wanted = min(self.task.room, self.task.size(range(len(self.task.files)))) - there
        if wanted > free:
            raise ValueError(
                f"{self.folder} has {free / 1e9:.2f} GB of free disk, and shards may take {wanted / 1e9:.2f} GB more: "
                "lower execution.cache_gigabytes, or name a folder on another disk as execution.cache_folder."
            )

    def _end(self) -> None:
        if self._process is None:
            return
        self._send("null")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process = None

    def __enter__(self) -> "ShardStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def open_stream(
    config: PreTrainingConfig, corpus: Corpus, stores: Mapping[str, TokenStore], sampler: object, fetches: bool
) -> ShardStream | None:
    """The cache that the configuration asks for; None where it asks for none, or no store is on the Hub.

    ValueError where the room is too small.
    """
    if config.execution.cache_gigabytes is None:
        return None
    assert isinstance(sampler, WindowedSampler)  # the configuration sees to it
    used = {id(store): store for store in (corpus.store, *stores.values()) if store is not None}
    streamed = [store for store in used.values() if isinstance(store.location, HubFolder)]
    if not streamed:
        logger.warning("execution.cache_gigabytes is for stores on the Hub, and this run has none.")
        return None
    task = plan_shards(config, corpus, streamed)
    return ShardStream(task, streamed, sampler, config.max_steps, fetches)


def plan_shards(config: PreTrainingConfig, corpus: Corpus, stores: list[TokenStore]) -> Task:
    """Which shards each window needs, and the held-out utterances. ValueError where the room is too small."""
    assert corpus.windows is not None
    assert config.execution.cache_gigabytes is not None
    files: list[ShardFile] = []
    windows: defaultdict[int, list[int]] = defaultdict(list)
    held: list[int] = []
    for store in {str(store.location): store for store in stores}.values():
        assert isinstance(store.location, HubFolder)
        cached = CachedFolder(store.location, Path())
        numbers: dict[int, int] = {}
        for shard, entry in enumerate(store.shard_entries):
            numbers[shard] = len(files)
            place = f"{cached.name}/{entry['file']}"
            files.append(ShardFile(cached.hub.repo_id, cached.hub.commit, entry["file"], entry["bytes"], place))
        for window, shard in _pairs(corpus.windows, store, corpus.training):
            windows[window].append(numbers[shard])
        held += [
            numbers[shard] for _, shard in _pairs(np.zeros(len(corpus.validation), int), store, corpus.validation)
        ]
    task = Task(
        folder=str(cache_folder(config)),
        room=round(config.execution.cache_gigabytes * 1e9),
        minutes=config.execution.fetch_minutes,
        files=files,
        held=held,
        windows=[windows[window] for window in range(len(windows))],
    )
    if task.smallest_room() > task.room:
        raise ValueError(
            f"execution.cache_gigabytes={config.execution.cache_gigabytes:g} is too little: two windows of "
            f"data.window_shards={config.data.window_shards}, and the shards with the {len(corpus.validation)} "
            f"utterances to validate on ({task.size(held) / 1e9:.3g} GB), take {task.smallest_room() / 1e9:.3g} GB. "
            "Raise it; or, in a new run, lower data.window_shards or data.validation_utterances."
        )
    return task


def _pairs(windows: np.ndarray, store: TokenStore, utterances: UtteranceList) -> np.ndarray:
    """(window, shard) of all utterances that the store has, each once."""
    shards = store.shards_of_rows(store.rows_of_utterances(utterances))
    pairs = np.unique((windows * len(store.shard_entries) + shards)[shards >= 0])
    return np.stack(np.divmod(pairs, len(store.shard_entries)), axis=1)


def cache_folder(config: PreTrainingConfig) -> Path:
    """One for each node and run, so that none removes what another needs."""
    from huggingface_hub.constants import HF_HOME

    run = hashlib.blake2b(os.path.abspath(config.output_dir).encode(), digest_size=6).hexdigest()
    return (
        Path(config.execution.cache_folder or Path(HF_HOME) / "spear_hf").absolute() / f"{socket.gethostname()}-{run}"
    )
