# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Work that goes on beside the main thread: an iterator run ahead of its use, and calls done behind it, in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar


Item = TypeVar("Item")

_END = object()


class Ahead(Generic[Item]):
    """Iterates over `items` in a thread, `depth` of them ahead; its errors are raised where they are due.

    A context manager: at its end the thread has stopped and the generator is closed.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._due: deque[Future[Any]] = deque(self._next() for _ in range(depth))

    def _next(self) -> Future[Any]:
        return self._pool.submit(next, self._items, _END)

    def __iter__(self) -> Iterator[Item]:
        while (item := self._due.popleft().result()) is not _END:
            self._due.append(self._next())
            yield item

    def __enter__(self) -> "Ahead[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if close := getattr(self._items, "close", None):
            close()


class Behind:
    """Does calls in a thread, one after the other; `submit` waits while more than `depth` of them are undone.

    A call's error is raised by a later submit(), or at the end of the `with` block, which waits for all calls.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._undone: deque[Future[None]] = deque()

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._undone.append(self._pool.submit(function, *arguments))
        while len(self._undone) > self._depth or (self._undone and self._undone[0].done()):
            self._undone.popleft().result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            for future in self._undone:
                future.result()
