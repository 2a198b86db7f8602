# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Keeps those shards of stores on the Hub on a node's disk that are needed soon, in a process of its own.

    FOLDER/
        lock                      held as long as the process lives
        shards/STORE/SHARD        whole ones
        incoming/                 what is being downloaded; counts as if it were there
        failure                   why the process gave up

The process is beside a training run, whose interpreter it must not slow down, and needs nothing but the client of the
Hub: it is run as a file (`COMMAND`), and imports nothing of this package. It reads lines of JSON: first a `Task`, and
then, whenever a window has been heard to its end, the windows to come in the order in which they are needed. Of these
it fetches two, so that one is there when the one before has been heard, and keeps of the others what is there already
and needed soonest. It ends with its parent, at the end of the input, or when a shard cannot be had.
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


LOCK, SHARDS, INCOMING, FAILURE = "lock", "shards", "incoming", "failure"
COMMAND = (
    sys.executable,
    "-c",
    "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')",
    os.path.abspath(__file__),
)
DOWNLOADS = 4  # at a time
PAUSE = 0.05  # seconds between two looks
TOUCH_SECONDS = 2.0  # between two touches of the files
LOCK_SECONDS = 4.0  # what a process that was just killed may take to be gone
LONGEST_DELAY = 30.0  # seconds between two attempts
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardFile:
    """A file of a dataset repository; `place` is where it goes, below FOLDER/shards."""

    repo_id: str
    commit: str
    name: str
    size: int
    place: str


@dataclass(frozen=True)
class Task:
    """`windows` and `held` are numbers of `files`; those `held` are always there. `room` in bytes."""

    folder: str
    room: int
    minutes: float
    files: list[ShardFile]
    held: list[int]
    windows: list[list[int]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        values = json.loads(text)
        return cls(**{**values, "files": [ShardFile(**file) for file in values["files"]]})

    def size(self, files: Iterable[int]) -> int:
        """Bytes of these files."""
        return sum(self.files[file].size for file in files)

    def smallest_room(self) -> int:
        """Bytes of what is held and of any two windows."""
        sizes = [self.size(set(window) - set(self.held)) for window in self.windows]
        return self.size(self.held) + sum(sorted(sizes)[-2:])

    def needed(self, order: Sequence[int]) -> list[int]:
        """What must be there, in the order in which it is fetched."""
        return list(dict.fromkeys([*self.held, *(file for window in order[:2] for file in self.windows[window])]))

    def kept(self, order: Sequence[int], present: set[int]) -> set[int]:
        """Of what is `present`, that which is needed soonest, as far as the room allows."""
        kept = self.needed(order)
        room = self.room - self.size(kept)
        chosen = set(kept) & present
        for file in dict.fromkeys(file for window in order[2:] for file in self.windows[window]):
            if file in present and file not in chosen and self.files[file].size <= room:
                chosen.add(file)
                room -= self.files[file].size
        return chosen


class FetchError(Exception):
    """A shard cannot be had."""


class Fetcher:
    """Serves a task, given the order of its windows."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.folder = Path(task.folder)
        self.order: list[int] | None = None
        self.ended = False

    def path(self, file: int) -> Path:
        return self.folder / SHARDS / self.task.files[file].place

    def clean(self) -> set[int]:
        """Removes what is not a whole shard of the task, and returns those that are."""
        shutil.rmtree(self.folder / INCOMING, ignore_errors=True)
        (self.folder / FAILURE).unlink(missing_ok=True)
        known = {self.path(number): number for number in range(len(self.task.files))}
        present = set()
        for path in [path for path in self.folder.glob(f"{SHARDS}/**/*") if path.is_file()]:
            number = known.get(path)
            if number is not None and path.stat().st_size == self.task.files[number].size:
                present.add(number)
            else:
                path.unlink()
        return present

    def listen(self) -> None:
        """Takes the orders from the input until it says null, or ends."""
        for line in sys.stdin:
            order = json.loads(line)
            if order is None:
                break
            self.order = order
        self.ended = True

    def serve(self, present: set[int], parent: int) -> None:
        """Until the input or the parent ends. FetchError."""
        pool = ThreadPoolExecutor(DOWNLOADS)
        running: dict[Future[None], int] = {}
        touched = time.monotonic()
        while not self.ended and os.getppid() == parent:
            if time.monotonic() - touched > TOUCH_SECONDS:
                touched = time.monotonic()
                self.touch(present)
            if self.order is not None:
                self.remove(present, self.order)
                missing = [file for file in self.task.needed(self.order) if file not in present]
                for file in [file for file in missing if file not in running.values()]:
                    taken = self.task.size([*present, *running.values(), file])
                    if len(running) == DOWNLOADS or taken > self.task.room:
                        break
                    running[pool.submit(self.fetch, file)] = file
            if not running:
                time.sleep(PAUSE)
            for future in wait(running, PAUSE, FIRST_COMPLETED).done:
                future.result()
                present.add(running.pop(future))

    def touch(self, present: set[int]) -> None:
        """Keeps away who tidies up old files, as in /tmp, and forgets the shards that are gone all the same."""
        os.utime(self.folder / LOCK)
        for file in sorted(present):
            try:
                os.utime(self.path(file))
            except FileNotFoundError:
                present.remove(file)

    def remove(self, present: set[int], order: list[int]) -> None:
        """Of the shards that are there, those that are not to be kept."""
        for file in present - self.task.kept(order, present):
            self.path(file).unlink(missing_ok=True)
            present.remove(file)

    def fetch(self, number: int) -> None:
        """Downloads a shard; tries again for as long as the task says. FetchError."""
        file = self.task.files[number]
        deadline, delay = time.monotonic() + 60 * self.task.minutes, 1.0
        while True:
            try:
                return self.download(file, self.path(number))
            except Exception as error:
                what = f"{file.name} of {file.repo_id} cannot be had from the Hub"
                if getattr(error, "errno", None) in _NO_ROOM:
                    raise FetchError(
                        f"{what}: there is no room for it in {self.folder} ({error}). Make room, or lower "
                        "execution.cache_gigabytes, and resume the run."
                    ) from error
                if is_lasting(error):
                    raise FetchError(f"{what}: {error}") from error
                if time.monotonic() + delay > deadline:
                    raise FetchError(
                        f"{what}, and was tried for {self.task.minutes:g} minutes (execution.fetch_minutes): {error}"
                    ) from error
                print(f"{what} ({error}); again in {delay:g} s.", file=sys.stderr, flush=True)
                time.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)

    def download(self, file: ShardFile, path: Path) -> None:
        from huggingface_hub import hf_hub_download

        incoming = self.folder / INCOMING / file.place
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        try:
            got = Path(
                hf_hub_download(file.repo_id, file.name, repo_type="dataset", revision=file.commit, local_dir=incoming)
            )
            if (size := got.stat().st_size) != file.size:
                raise FetchError(f"it has {size} bytes, and the store's metadata say {file.size}")
            descriptor = os.open(got, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            path.parent.mkdir(parents=True, exist_ok=True)
            got.rename(path)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)


def is_lasting(error: Exception) -> bool:
    """Whether another attempt would end the same way."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, FetchError) or status in (401, 403, 404) or constants.HF_HUB_OFFLINE


def lock(folder: Path) -> Any:
    """The open file that holds the lock of the folder. FetchError if another process has it."""
    import fcntl  # here, as Windows has none, where stores are read all the same

    file = (folder / LOCK).open("w")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise FetchError(f"{folder} is in use by another run: name another execution.cache_folder.") from None
            time.sleep(PAUSE)


def is_served(folder: Path) -> bool:
    """Whether the process of the folder lives."""
    import fcntl

    with (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def leave_word(folder: Path, error: Exception) -> None:
    """For those that wait for a shard."""
    partial = folder / f"{FAILURE}.partial"
    try:
        partial.write_text(str(error), encoding="utf-8")
        partial.rename(folder / FAILURE)
    except OSError:  # a full disk
        print(error, file=sys.stderr, flush=True)


def main() -> None:
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # schedulers signal all processes of a job
        signal.signal(number, signal.SIG_IGN)
    fetcher = Fetcher(Task.from_json(sys.stdin.readline()))
    fetcher.folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(fetcher.folder)
        present = fetcher.clean()
    except (FetchError, OSError) as error:
        print(json.dumps(str(error)), flush=True)
        return
    print("null", flush=True)  # no error: the folder is served from now on
    threading.Thread(target=fetcher.listen, daemon=True).start()
    try:
        fetcher.serve(present, parent)
    except Exception as error:
        leave_word(fetcher.folder, error)
    held.close()
    os._exit(0)  # whatever downloads still run


if __name__ == "__main__":
    main()
