# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Work that goes on beside the main thread: items made ahead of it, and calls done behind it, in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar


Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made in a thread while the one before is used; an error comes in the place of its item."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


class Behind:
    """Does calls in a thread, one after the other; `submit` waits while more than `depth` of them are undone.

    A call's error is raised by a later submit(), or at the end of the `with` block, which waits for all calls.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._undone: deque[Future[None]] = deque()

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Queues a call, and waits for the oldest one while too many are queued. Raises what an earlier one raised."""
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
