# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Who does which shard: independent jobs (`--shard i/n`), and within a job the ranks of torchrun or accelerate launch.

Jobs know nothing of each other: job i has shards i, i + n, i + 2n, ... Ranks of a job take its next shard when they
are free, by a counter in the key-value store that the launcher serves. They need no process group for that: nothing
but a few strings is exchanged, whatever the devices.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import Store, rendezvous


Item = TypeVar("Item")

PATIENCE = timedelta(days=30)  # ranks wait for the slowest; the launcher ends them all if one fails


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` of a list."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self.index}/{self.count}: of n jobs the first is 0/n and the last n-1/n, so 0 <= i < n"
            )

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Every `count`-th of the items, from the `index`-th on."""
        return [items[place] for place in range(self.index, len(items), self.count)]


def parse_share(text: str) -> Share:
    """ "i/n" -> Share; ValueError with what is wanted."""
    if not re.fullmatch(r"\d+/\d+", text):
        raise ValueError(f"shard {text!r} is not i/n, such as 0/8 for the first of eight jobs")
    index, count = text.split("/")
    return Share(int(index), int(count))


class Ranks:
    """The processes that work together; by default this one alone, for which nothing is set up."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Store | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store

    @classmethod
    def launched(cls) -> "Ranks":
        """Those that a launcher started with this one, as the environment says; if it says nothing, this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return cls()
        store, rank, size = next(iter(rendezvous("env://")))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store)

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def take(self, items: Sequence[Item]) -> Iterator[Item]:
        """This rank's part of the items: each goes to one rank, the next to whichever asks first."""
        if self._store is None:
            yield from items
            return
        while (place := self._store.add("spear_hf/next", 1) - 1) < len(items):
            yield items[place]

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks; waits for all. Once per process."""
        if self._store is None:
            return [value]
        self._store.set(f"spear_hf/done/{self.rank}", json.dumps(value))
        keys = [f"spear_hf/done/{rank}" for rank in range(self.size)]
        self._store.wait(keys, PATIENCE)
        return [json.loads(self._store.get(key)) for key in keys]

    def leave(self) -> None:
        """The main process waits until no other needs the store, which it may be serving, or could be ended with it.

        A launcher ends all processes when one exits with an error code.
        """
        if self._store is None:
            return
        self._store.set(f"spear_hf/left/{self.rank}", "1")
        if self.is_main:
            self._store.wait([f"spear_hf/left/{rank}" for rank in range(self.size)], PATIENCE)
