# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Which audio and which tokens a run is of, settled once: by its first start, and by one rank for all of them."""

import dataclasses
import json

from ..mvq.atomic_files import write_atomically
from ..mvq.store_location import is_joined, pinned
from .config import PreTrainingConfig
from .run_folder import RunFolder, read_record


def settle_sources(config: PreTrainingConfig, folder: RunFolder) -> PreTrainingConfig:
    """`config` with the stores on the Hub at a commit, and the one that is heard as `data.store`.

    The commits are those that the run in `folder` has begun with, of a new run the newest. Without a manifest, what is
    heard is the first of the targets' stores that has audio. ValueError for a store that cannot be had.
    """
    known = recorded_sources(folder)
    data, targets = config.data, dict(config.targets)
    for name, target in targets.items():
        if target.store is not None:
            targets[name] = dataclasses.replace(target, store=known.get(target.store) or pinned(target.store))
    if data.store is not None:
        data = dataclasses.replace(data, store=known.get(data.store) or pinned(data.store))
    elif data.manifest is None:
        stores = (target.store for target in targets.values() if target.store is not None)
        data = dataclasses.replace(data, store=next(filter(is_joined, stores), None))
    return dataclasses.replace(config, data=data, targets=targets)


def recorded_sources(folder: RunFolder) -> dict[str, str]:
    """Stores by their names in the configuration, at the commits that the run has begun with; empty for a new run."""
    return read_record(folder.sources) if folder.sources.is_file() else {}


def record_sources(folder: RunFolder, config: PreTrainingConfig, settled: PreTrainingConfig) -> None:
    """Notes what `settled` has in place of the names in `config`."""
    sources = {name: place for name, place in zip(_stores(config), _stores(settled)) if name is not None}
    if sources:
        write_atomically(folder.sources, (json.dumps(sources, indent=2) + "\n").encode())


def _stores(config: PreTrainingConfig) -> list[str | None]:
    return [config.data.store, *(target.store for target in config.targets.values())]
