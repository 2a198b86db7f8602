# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs from a store on the Hub that the disk does not hold, by the real client against a Hub on the loopback.

They are the runs from a copy of the store in a folder, bit for bit, whatever the room, ranks and kills.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spear_hf.data.manifest import read_manifest
from spear_hf.data.sources import ListSource
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.store_location import HubFolder
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.corpus import load_corpus
from spear_hf.pretraining.planning import plan_run
from spear_hf.pretraining.setup import build_sampler
from spear_hf.pretraining.streaming import plan_shards

from .hub_process import GOOD, Client, environment
from .hub_server import HubServer
from .pretraining_runs import Runs, assert_same_run, free_port, has_steps, metrics


REPO = "tester/streamed"
STEPS = 24
SETTINGS = (
    f"max_steps={STEPS}",
    "checkpoint_every=5",
    "logging.trackers=[]",
    "logging.validate_every=12",
    "execution.cache_audio=false",
    "data.batch_seconds=2.5",
    "data.window_shards=2",
    "data.validation_utterances=2",
    "mixing.token_probability=0.5",
    "mixing.token_second=any",
    "targets.speech.teacher=null",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("streaming"), *SETTINGS)


@pytest.fixture(scope="module")
def store(runs) -> Path:
    """Of shards of two utterances with their audio: 8 to train on, 3 that are held out."""
    teacher = load_teacher("kaldi-mfcc")
    tokenizer = MvqTokenizer(teacher, MultiCodebookQuantizer(39, 16, 2, **quantizer_metadata(teacher)))
    corpus = ListSource(read_manifest(runs.manifest), piece_utterances=2)
    tokenize_corpus(tokenizer, corpus, runs.folder / "tokens", progress=False, with_audio=True)
    assert len(TokenStore.open(runs.folder / "tokens").shard_sizes) == 11
    return runs.folder / "tokens"


@pytest.fixture(scope="module")
def hub(runs, store):
    with HubServer(tokens={GOOD: "tester"}) as server:
        task = {"datasets": [], "folders": [[str(store), REPO, "dataset"]]}
        Client(server, "stock", runs.folder / "client", task).result()
        yield server


@pytest.fixture(scope="module")
def from_folder(runs, store) -> Path:
    output = runs.folder / "from-folder"
    assert runs.run(output, *only(store)) == 0, runs.log(output)
    return output


def only(store: object) -> tuple[str, ...]:
    return "data.manifest=null", f"targets.speech.store={store}"


class Disk:
    """The most bytes that shards took at a time below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.looks = folder, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        before: dict[int, int] = {}
        while not self._ended.wait(0.002):
            now = self._sizes()
            if now.keys() == before.keys():  # else a file that came or went meanwhile may be counted with another
                self.most, self.looks = max(self.most, sum(now.values())), self.looks + 1
            before = now

    def _sizes(self) -> dict[int, int]:
        """Of the files by their inodes, as they are moved."""
        sizes = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(os.path.join(folder, name))
                    if found.st_size > 2000:  # smaller are notes of the client, no shards
                        sizes[found.st_ino] = found.st_size
        return sizes

    def __enter__(self) -> "Disk":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


class Streamed:
    """A run from the Hub, on one rank or several."""

    def __init__(self, runs: Runs, hub: HubServer, output: Path, gigabytes: float) -> None:
        self.hub, self.output = hub, output
        self.cache = runs.folder / "cache" / output.name
        self.settings = runs.overrides(
            output,
            *only(REPO),
            f"execution.cache_gigabytes={gigabytes!r}",
            f"execution.cache_folder={self.cache}",
        )
        self.environment = environment(hub, runs.folder / f"home-{output.name}") | {"OMP_NUM_THREADS": "1"}
        self.log = runs.folder / f"{output.name}.log"

    def start(self, *more: str, resume: bool = False, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "spear_hf.cli", "pretrain", "--config", "tiny"]
        command += ["--resume"] * resume + ["--set", *self.settings, *more]
        return subprocess.Popen(command, env=self.environment | variables, stderr=self.log.open("a"))

    def start_ranks(self, ranks: int, *more: str) -> list[subprocess.Popen]:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [self.start(*more, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]

    def shards(self) -> list[str]:
        """Those that were asked for, in this order."""
        requests = self.hub.requests("HEAD", rf"^/datasets/{REPO}/resolve/\w+/tokens-")
        return [request.path.rsplit("/", 1)[1] for request in requests]


def bounds(runs: Runs, store: Path) -> tuple[int, int, int]:
    """Bytes that the smallest room has, of all shards, and how many windows there are."""
    config = load_config("tiny", [*runs.overrides(Path("run"), "data.manifest=null"), f"data.store={store}"])
    corpus = load_corpus(config.data, config.seed)
    entries = corpus.store.shard_entries
    held = set(corpus.store.shards_of(corpus.validation.ids))
    shards = corpus.store.shards_of(corpus.training.ids)
    windows = [set(shards[corpus.windows == window]) for window in range(corpus.windows.max() + 1)]
    sizes = sorted(sum(entries[shard]["bytes"] for shard in window) for window in windows)
    assert not held & set.union(*windows)
    room = sum(sizes[-2:]) + sum(entries[shard]["bytes"] for shard in held)
    return room, sum(entry["bytes"] for entry in entries), len(windows)


def expected_downloads(runs: Runs, store: Path, room: int) -> int:
    """Of a run that is not interrupted, which has never less than two windows, by a slow reference."""
    config = load_config("tiny", [*runs.overrides(Path("run"), "data.manifest=null"), f"data.store={store}"])
    corpus = load_corpus(config.data, config.seed)
    sampler = build_sampler(config, corpus)
    sizes = [entry["bytes"] for entry in corpus.store.shard_entries]
    held = set(corpus.store.shards_of(corpus.validation.ids))
    shards = corpus.store.shards_of(corpus.training.ids)
    step, there, fetched = 0, set(), 0
    while step < config.max_steps:
        needed, upcoming = set(held), []
        for window in sampler.upcoming(step, config.max_steps):
            upcoming.append(set(shards[corpus.windows == window]))
        for window in upcoming[:2]:
            needed |= window
        fetched += len(needed - there)
        kept = set(needed)
        for window in upcoming[2:]:
            for shard in sorted(window & there):
                if sum(sizes[one] for one in kept | {shard}) <= room:
                    kept.add(shard)
        there, step = kept, sampler.turn(step).stop
    return fetched


def test_a_killed_run_goes_on_with_another_room_to_the_same_bits(runs, store, hub, from_folder):
    room, total, windows = bounds(runs, store)
    assert windows == 4
    run = Streamed(runs, hub, runs.folder / "killed", gigabytes=room / 1e9)
    with Disk(run.cache) as disk:
        process = run.start()
        while not has_steps(run.output, STEPS // 2)():
            assert process.poll() is None, run.log.read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < disk.most <= room < total, disk.looks
    assert (
        run.start("execution.num_workers=2", f"execution.cache_gigabytes={2 * total / 1e9!r}", resume=True).wait() == 0
    )
    assert "Resuming from" in run.log.read_text()
    assert_same_run(run.output, from_folder)
    assert not list(run.cache.iterdir()), "the disk is empty when the run has finished"
    kept = [path.name for path in (runs.folder / "home-killed").rglob("*.parquet")]
    assert kept == ["index.parquet"]


def test_two_ranks_share_the_room_and_fetch_once(runs, store, hub, from_folder):
    room, *_ = bounds(runs, store)
    output, reference = runs.folder / "ranks", runs.folder / "ranks-from-folder"
    runs.run_ranks(reference, *only(store))
    run = Streamed(runs, hub, output, gigabytes=room / 1e9)
    before = len(run.shards())
    with Disk(run.cache) as disk:
        processes = run.start_ranks(2)
        assert [process.wait() for process in processes] == [0, 0], run.log.read_text()
    assert 0 < disk.most <= room, disk.looks
    assert_same_run(output, reference)
    batches = [[record["batch"] for record in metrics(path)] for path in (output, from_folder)]
    assert batches[0] == batches[1]
    shards = run.shards()[before:]
    assert len(shards) == expected_downloads(runs, store, room)


@pytest.mark.slow
def test_with_room_for_all_each_shard_is_fetched_once(runs, store, hub, from_folder):
    run = Streamed(runs, hub, runs.folder / "roomy", gigabytes=1.0)
    before = len(run.shards())
    assert run.start().wait() == 0, run.log.read_text()
    assert_same_run(run.output, from_folder)
    shards = run.shards()[before:]
    assert len(shards) == len(set(shards)) == expected_downloads(runs, store, 10**9)


@pytest.mark.slow
def test_a_shard_that_is_gone_ends_the_run_with_its_name(runs, store, hub):
    run = Streamed(runs, hub, runs.folder / "gone", gigabytes=1.0)
    commit = hub.repos[f"datasets/{REPO}"].at("main")
    lost = {name: blob for name, blob in commit.files.items() if name.startswith("tokens-")}
    for name in lost:
        del commit.files[name]
    try:
        assert run.start().wait() == 1
    finally:
        commit.files.update(lost)
    assert re.search(rf"tokens-\d+.parquet of {REPO} cannot be had from the Hub: 404", run.log.read_text())


def test_mistakes_are_named(runs, store, tmp_path):
    settings = runs.overrides(tmp_path / "run", *only(store))
    with pytest.raises(ValueError, match=r"needs data\.window_shards"):
        load_config("tiny", [*settings, "execution.cache_gigabytes=1", "data.window_shards=null"])
    with pytest.raises(ValueError, match=r"name a store as targets\.speech\.store"):
        load_config("tiny", [*settings, "targets.speech.store=null", "execution.cache_gigabytes=1"])
    with pytest.raises(ValueError, match="window_shards=2 is of token stores"):
        load_config("tiny", [*settings, f"data.manifest={runs.manifest}"])
    output = tmp_path / "run"
    assert runs.run(output, *only(store), "data.window_shards=3", "max_steps=1") == 0
    assert runs.run(output, *only(store), "max_steps=2", resume=True) == 1
    assert "data.window_shards (3 -> 2)" in runs.log(output)


def test_a_room_that_is_too_small_is_refused(runs, store):
    room, *_ = bounds(runs, store)
    settings = [*runs.overrides(Path("run"), *only(store)), f"data.store={store}"]
    for missing, expected in ((0, None), (1, "is too little: two windows of data.window_shards=2")):
        config = load_config("tiny", [*settings, f"execution.cache_gigabytes={(room - missing) / 1e9!r}"])
        corpus = load_corpus(config.data, config.seed)
        corpus.store.location = HubFolder(REPO, "0" * 40)
        with pytest.raises(ValueError, match=expected) if expected else contextlib.nullcontext():
            task = plan_shards(config, corpus, [corpus.store])
            assert task.smallest_room() == room
            plan = dataclasses.replace(plan_run(load_config("tiny", settings)), cache=task)
            assert re.search(r"disk of a node +at most .* GB of the stores' .*, in 4 windows of which two", str(plan))
