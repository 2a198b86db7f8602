# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole or not at all, whoever else writes them, and whenever a writer dies.

A file is written under a temporary name of its own, `.NAME.RANDOM.tmp`, synced and renamed. While it is written its
writer holds a lock on it, which the kernel lets go of when the writer dies: what can be locked is a leftover.
"""

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


try:
    import fcntl
except ImportError:  # Windows: leftovers go by their age alone
    fcntl = None  # type: ignore[assignment]

LEFTOVER_SECONDS = 24 * 3600.0  # where the file system has no locks: no write takes so long
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "it is too large"}

KEPT = "What was finished before is kept; make room, then run the same command again: it goes on from there"
NOT_KEPT = "Make room, or name another place, and run the same command again"


class StorageFullError(OSError):
    """There is no room for a file; str() names it and says what to do."""

    def __init__(self, number: int, problem: str, kept: str) -> None:
        super().__init__(number, f"{problem}. {kept}")
        self.problem = problem

    def __str__(self) -> str:
        return str(self.strerror)


def write_atomically(path: Path, content: bytes | memoryview, kept: str = KEPT) -> None:
    """Temporary name, sync, rename, sync of the folder: after a crash the file is whole, old or new.

    StorageFullError where there is no room, `kept` being what is there already; nothing of the file is left then, nor
    after any other error.
    """
    with replacing(path, kept) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, kept: str = KEPT) -> Iterator[BinaryIO]:
    """A file to write, of which the same is true: it takes the place of `path` if the block ends well."""
    with _temporary(path) as temporary, explained(path, kept):
        yield temporary
        temporary.flush()
        os.fsync(temporary.fileno())
        os.replace(temporary.name, path)
    _sync_folder(path.parent)


def create_atomically(path: Path, content: bytes) -> bool:
    """As `write_atomically`, but a file that is there stays as it is: False. Of several at once, one succeeds."""
    with _temporary(path) as temporary, explained(path):
        temporary.write(content)
        temporary.flush()
        os.fsync(temporary.fileno())
        try:
            os.link(temporary.name, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _FULL:
                raise
            if path.exists():  # a file system without hard links: all but exclusive
                return False
            os.replace(temporary.name, path)
    _sync_folder(path.parent)
    return True


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Deletes the temporary files of writers that are dead, or of one file's; those being written now are let be."""
    for path in folder.glob(f".{name}.*.tmp"):
        with suppress(OSError), path.open("rb") as file:
            locked = _lock(file, wait=False)
            age = time.time() - os.fstat(file.fileno()).st_mtime
            if locked or (locked is None and age > LEFTOVER_SECONDS):
                path.unlink(missing_ok=True)


@contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """An open, locked file beside `path`; gone at the end unless it was renamed."""
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = name.open("xb")
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:  # else another took it for a leftover before it was locked
            break
        file.close()
    try:
        yield file
    finally:
        name.unlink(missing_ok=True)
        with suppress(OSError):  # what a failed write left in the buffer cannot be written now either
            file.close()


def _lock(file: BinaryIO, wait: bool) -> bool | None:
    """Whether the lock was had; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def explained(path: Path, kept: str = KEPT) -> Iterator[None]:
    """StorageFullError in place of an OSError that says there is no room for `path`; `kept`: what is there already.

    Of one in another it is the outer one that knows what is kept.
    """
    try:
        yield
    except StorageFullError as error:
        raise StorageFullError(error.errno or errno.ENOSPC, error.problem, kept) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        problem = f"{path} cannot be written: {_FULL[error.errno]} ({os.strerror(error.errno)})"
        raise StorageFullError(error.errno, problem, kept) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
