# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The process that keeps shards at hand: what it fetches, keeps and removes, and how it ends."""

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from spear_hf.mvq.shard_fetcher import COMMAND, ShardFile, Task, is_served
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.store_location import CachedFolder, HubFolder

from .hub_process import GOOD, Client, environment
from .hub_server import HubServer
from .test_store import make_rows, write


SIZES = (1000, 2000, 3000, 4000, 5000, 6000)
REPO = "tester/shards"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "content").mkdir()
    for number, size in enumerate(SIZES):
        (folder / "content" / f"{number}.parquet").write_bytes(bytes([number]) * size)
    with HubServer(tokens={GOOD: "tester"}) as server:
        Client(
            server,
            "stock",
            folder / "client",
            {"datasets": [], "folders": [[str(folder / "content"), REPO, "dataset"]]},
        ).result()
        yield server


class Fetching:
    """The process, with an eye on its folder."""

    def __init__(
        self, hub: HubServer, folder, room=10**6, minutes=8.0, sizes=SIZES, windows=None, held=(), preexec_fn=None
    ):
        self.folder = folder / "cache"
        commit = hub.repos[f"datasets/{REPO}"].branches["main"]
        self.location = CachedFolder(HubFolder(REPO, commit), self.folder)
        files = [
            ShardFile(REPO, commit, f"{number}.parquet", size, f"{self.location.name}/{number}.parquet")
            for number, size in enumerate(sizes)
        ]
        windows = windows or [[number] for number in range(len(sizes))]
        self.task = Task(str(self.folder), room, minutes, files, list(held), windows)
        self.process = subprocess.Popen(
            COMMAND,
            env=environment(hub, folder / "home"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("w"),
            text=True,
            preexec_fn=preexec_fn,
        )
        self.send(self.task.to_json())
        self.answer = json.loads(self.process.stdout.readline())

    def send(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def present(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("shards/*/*"))

    def reaches(self, expected: list[int]) -> bool:
        deadline = time.monotonic() + 20
        while self.present() != expected and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.present() == expected

    def end(self) -> None:
        self.send("null")
        assert self.process.wait(10) == 0


def downloads(hub: HubServer) -> int:
    return len([request for request in hub.requests("GET", rf"\?repo=datasets/{REPO}&") if request.status == 200])


def test_what_is_needed_and_what_is_kept():
    files = [ShardFile("a/b", "c", str(number), size, str(number)) for number, size in enumerate(SIZES)]
    task = Task("folder", 14_000, 8.0, files, held=[0], windows=[[1], [2, 1], [3], [4], [0, 5]])
    assert task.needed([3, 1, 0]) == [0, 4, 2, 1]
    assert task.smallest_room() == 1000 + 5000 + 6000  # 0 is held anyway
    assert task.kept([3, 2], present={0, 1, 2, 3, 4}) == {0, 3, 4}, "what is not needed any more goes"
    # 1 + 2 + 4 kB are needed; 7 are left, for the one that comes first and then what still fits.
    assert task.kept([0, 2, 3, 4, 1], present={0, 1, 2, 4, 5}) == {0, 1, 4}
    assert task.kept([0, 2, 1, 4, 3], present={0, 1, 2, 4, 5}) == {0, 1, 2}
    assert Task.from_json(task.to_json()) == task


def test_two_windows_are_there_and_what_is_needed_soonest_stays(hub, tmp_path):
    before = downloads(hub)
    fetching = Fetching(hub, tmp_path, room=12_000, held=[0])
    assert fetching.answer is None
    fetching.send("[1, 2, 3, 4]")
    assert fetching.reaches([0, 1, 2])
    assert fetching.location.fetch("2.parquet").read_bytes() == bytes([2]) * 3000
    fetching.send("[2, 3, 1]")
    assert fetching.reaches([0, 1, 2, 3]), "10 kB of 12: the first window is heard again, and fits"
    fetching.send("[3, 4, 1]")
    assert fetching.reaches([0, 1, 3, 4]), "12 kB"
    fetching.send("[4, 1]")
    assert fetching.reaches([0, 1, 4])
    assert downloads(hub) - before == 5, "each once"
    assert not (fetching.folder / "incoming").exists() or not list((fetching.folder / "incoming").glob("*/*"))
    fetching.end()


def test_what_is_needed_stays_new_and_comes_again_when_it_was_removed(hub, tmp_path):
    fetching = Fetching(hub, tmp_path, held=[0])
    fetching.send("[1, 2]")
    assert fetching.reaches([0, 1, 2])
    files = [fetching.folder / "lock", *fetching.folder.glob("shards/*/*")]
    for file in files:
        os.utime(file, (0, 0))
    fetching.location.fetch("0.parquet").unlink()
    assert fetching.location.fetch("0.parquet").stat().st_size == 1000
    deadline = time.monotonic() + 20
    while any(file.stat().st_mtime < 1 for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fetching.end()


def test_after_a_kill_it_goes_on_with_what_is_whole(hub, tmp_path):
    first = Fetching(hub, tmp_path)
    first.send("[0, 1]")
    assert first.reaches([0, 1])
    assert is_served(first.folder)
    first.process.kill()
    first.process.wait()
    assert not is_served(first.folder)
    torn = first.folder / "shards" / first.location.name / "1.parquet"
    torn.write_bytes(b"torn")
    incoming = first.folder / "incoming" / "left"
    incoming.mkdir(parents=True)
    before = downloads(hub)
    second = Fetching(hub, tmp_path)
    assert not incoming.exists()
    second.send("[0, 1]")
    assert second.reaches([0, 1])
    assert second.location.fetch("1.parquet").stat().st_size == 2000
    assert downloads(hub) - before == 1
    second.process.send_signal(signal.SIGTERM)  # as schedulers send it to all processes
    second.send("[0, 2]")
    assert second.reaches([0, 2])
    second.end()


def test_a_folder_is_for_one_run(hub, tmp_path):
    first = Fetching(hub, tmp_path)
    second = Fetching(hub, tmp_path)
    assert "is in use by another run" in second.answer
    first.end()


def test_hangups_are_tried_again_and_what_lasts_is_told(hub, tmp_path):
    hub.drop(f"datasets/{REPO}", "download", times=1)
    good = Fetching(hub, tmp_path)
    good.send("[3]")
    assert good.reaches([3])
    good.end()
    for sizes, message in (((1000, 99), "has 2000 bytes, and the store's metadata say 99"), ((1000,) * 7, "404")):
        other = Fetching(hub, tmp_path, sizes=sizes)
        started = time.monotonic()
        other.send(f"[{len(sizes) - 1}]")
        with pytest.raises(ValueError, match=message) as failure:
            other.location.fetch(f"{len(sizes) - 1}.parquet")
        assert REPO in str(failure.value)
        assert time.monotonic() - started < 10
    full = Fetching(hub, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    full.send("[4]")
    with pytest.raises(
        ValueError, match=r"4\.parquet of .* there is no room for it in .*lower execution\.cache_gigabytes"
    ):
        full.location.fetch("4.parquet")
    killed = Fetching(hub, tmp_path)
    killed.process.kill()
    killed.process.wait()
    with pytest.raises(ValueError, match="has ended unexpectedly"):
        killed.location.fetch("5.parquet")


@pytest.mark.slow  # the client itself tries for 25 seconds
def test_a_hub_that_is_away_is_waited_for_as_long_as_allowed(tmp_path):
    with HubServer(tokens={GOOD: "tester"}) as hub:
        (tmp_path / "content").mkdir()
        (tmp_path / "content" / "0.parquet").write_bytes(bytes(1000))
        task = {"datasets": [], "folders": [[str(tmp_path / "content"), REPO, "dataset"]]}
        Client(hub, "stock", tmp_path / "client", task).result()
        fetching = Fetching(hub, tmp_path, minutes=0.5)
    fetching.send("[0]")
    with pytest.raises(ValueError, match=r"was tried for 0.5 minutes \(execution.fetch_minutes\)"):
        fetching.location.fetch("0.parquet")
    assert "; again in 1 s." in (tmp_path / "stderr").read_text()


def test_a_store_holds_no_file_of_the_cache_open(tmp_path):
    """What is open or mapped takes room on the disk though it is removed."""
    rows = make_rows(90)
    write(tmp_path / "store", rows)
    store = TokenStore.open(tmp_path / "store")
    cache = tmp_path / "cache"
    store.location = CachedFolder(HubFolder(REPO, "0" * 40), cache)
    (cache / "shards").mkdir(parents=True)
    (tmp_path / "store").rename(cache / "shards" / store.location.name)
    read = [store[row.id] for row in rows]
    assert all(np.array_equal(codes, row.codes) for codes, row in zip(read, rows, strict=True))
    held = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in held if str(cache) in name]
    assert str(cache) not in Path("/proc/self/maps").read_text()
