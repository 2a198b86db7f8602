# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf merge-tokens`: the stores of several teachers over the same audio into one.

The result has the order and the shards of the first store, and the tokens of every teacher side by side; with the
audio if one of the stores has it. It follows from the stores alone, so it may be interrupted and run again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spear_hf.mvq.store import QuarantinedAudio, TokenRow, TokenStore, list_key
from spear_hf.mvq.store_format import FORMAT_VERSION, MANIFEST_COLUMNS, read_metadata
from spear_hf.mvq.store_writer import StoreWriter


SHOWN = 10  # ids in a message


@dataclass(frozen=True)
class MergeSummary:
    """What `merge_stores` did."""

    utterances: int
    left_out: int  # that not every store has; 0 without `intersect`


def merge_stores(
    output: str | Path, stores: Mapping[str, str | Path], intersect: bool = False, progress: bool = True
) -> MergeSummary:
    """Writes the store `output`, or completes it, of the stores given by the names of their teachers.

    `TokenStore.open(output, teacher=NAME)` reads one teacher's tokens. `intersect` takes the utterances that all
    stores have. ValueError, before anything is written, for utterances that a store lacks, for other audio under the
    same id, for a store that is incomplete or of another format version, and for stores of the same tokens.
    """
    opened = _opened(stores)
    first, *others = opened.values()
    ids = first.ids
    rows = np.stack([np.arange(len(ids)), *(store.rows_of(ids) for store in others)])  # (stores, ids of the first)
    kept: np.ndarray = np.all(rows >= 0, axis=0)
    everything = set(ids).union(*(store.ids for store in others))
    if not intersect:
        _refuse_missing(opened, everything)
    if not kept.any():
        raise ValueError(f"the stores {', '.join(map(str, stores.values()))} have no utterance in common")
    checksums = _refuse_other_audio(opened, ids, rows, kept)

    audio = next((store for store in opened.values() if store.with_audio), None)
    columns = _manifest_columns(audio, ids)
    writer = StoreWriter(output, {name: store.info for name, store in opened.items()}, with_audio=audio is not None)
    common = {id for id, is_kept in zip(ids, kept) if is_kept}
    keys, start = [], 0
    with tqdm(total=len(common), unit="utt", desc="merge", disable=not progress) as bar:
        for index, size in enumerate(first.shard_sizes):
            places = [place for place in range(start, start + size) if kept[place]]
            start += size
            keys.append(list_key((ids[place], int(first.lengths[place])) for place in places))
            if not writer.has_shard(index, keys[-1]):
                parts = {
                    name: [
                        TokenRow(
                            id=ids[place],
                            codes=store[ids[place]],
                            num_samples=int(first.lengths[place]),
                            audio_checksum=None if checksums[place] < 0 else int(checksums[place]),
                            audio=audio.audio_file(ids[place]) if audio is not None else None,
                            **{column: values[place] for column, values in columns.items()},
                        )
                        for place in places
                    ]
                    for name, store in opened.items()
                }
                # They belong to no one shard of the result; the first holds all of them.
                writer.write(index, keys[-1], parts, _quarantine(opened, common) if index == 0 else ())
            bar.update(len(places))
    writer.finish(num_shards=len(keys), keys=keys)
    return MergeSummary(len(common), len(everything) - len(common))


def _opened(stores: Mapping[str, str | Path]) -> dict[str, TokenStore]:
    if len(stores) < 2:
        raise ValueError("two stores at least are wanted: --store speech=DIR --store audio=DIR")
    for name in stores:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{name!r} cannot name a teacher's columns: lower-case letters, digits and _ are wanted")
    opened = {name: TokenStore.open(folder) for name, folder in stores.items()}
    known: dict[str, str] = {}
    for name, store in opened.items():
        version = read_metadata(store.folder)["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{store.location} is of format version {version}, and stores of version {FORMAT_VERSION} are merged: "
                "make it anew with `spear-hf tokenize`"
            )
        same = known.setdefault(str(store.info), name)
        if same != name:
            raise ValueError(
                f"{stores[same]} and {stores[name]} hold the same tokens, of quantiser {store.quantizer_id}"
            )
    return opened


def _refuse_missing(opened: Mapping[str, TokenStore], everything: set[str]) -> None:
    lines = []
    for name, store in opened.items():
        if missing := sorted(id for id in everything if id not in store):
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            lines.append(f"{name} ({store.location}) lacks {len(missing)}: {', '.join(missing[:SHOWN])}{more}")
    if lines:
        raise ValueError(
            f"not every utterance is in every store: {'; '.join(lines)}. Tokenise the same list with both, or take "
            "what they have in common with --intersect"
        )


def _refuse_other_audio(
    opened: Mapping[str, TokenStore], ids: list[str], rows: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Checksums of the first store's audio, or of another's where it has none; -1 where nobody has.

    `rows` (stores, ids): where an id is in every store. Lengths must agree, and checksums where both are known.
    """
    first, *others = opened.values()
    names = list(opened)
    checksums = first.audio_checksums()
    for store, name, places in zip(others, names[1:], rows[1:]):
        theirs = store.audio_checksums()[places]
        known = (checksums >= 0) & (theirs >= 0)
        differ = kept & ((first.lengths != store.lengths[places]) | (known & (checksums != theirs)))
        if differ.any():
            found = [ids[place] for place in np.flatnonzero(differ)]
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ValueError(
                f"{names[0]} ({first.location}) and {name} ({store.location}) were made from different audio (length "
                f"or checksum differ) of {len(found)} utterances: {', '.join(found[:SHOWN])}{more}. Tokenise the same "
                "files with both, decoded by the same versions"
            )
        checksums = np.where(checksums >= 0, checksums, np.where(places >= 0, theirs, -1))
    return checksums


def _manifest_columns(audio: TokenStore | None, ids: list[str]) -> dict[str, list[str | None]]:
    """What the store with audio knows of `ids`."""
    if audio is None:
        return {}
    places = audio.rows_of(ids)
    known = zip(MANIFEST_COLUMNS, audio.manifest_columns())
    return {name: [None if place < 0 else values[place] for place in places] for name, values in known}


def _quarantine(opened: Mapping[str, TokenStore], common: set[str]) -> list[QuarantinedAudio]:
    """What the stores set aside, each utterance once."""
    bad = {item.id: item for store in reversed(list(opened.values())) for item in store.quarantined}
    return [item for item in bad.values() if item.id not in common]
