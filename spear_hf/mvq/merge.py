# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf merge-tokens`: the stores of several teachers over the same audio into one.

The result has the order and the shards of the first store, and the tokens of every teacher side by side; with the
audio if one of the stores has it. It follows from the stores alone, so it may be interrupted and run again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from spear_hf.mvq.pipeline import Behind
from spear_hf.mvq.store import QuarantinedAudio, TokenRow, TokenStore, list_key
from spear_hf.mvq.store_format import (
    FORMAT_VERSION,
    MANIFEST_COLUMNS,
    audio_path,
    checked_codes,
    checksum_column,
    prefix,
    read_metadata,
    shard_columns,
)
from spear_hf.mvq.store_writer import StoreWriter


SHOWN = 10  # ids in a message
BAD_IN_A_SHARD = 10_000  # 4 MB of a footer, which everyone reads who opens the shard; parquet takes 100 MB at the most


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
    rows = {name: store.rows_of_store(first) for name, store in opened.items()}  # of the first store's utterances
    kept: np.ndarray = np.all([places >= 0 for places in rows.values()], axis=0)
    extra = dict.fromkeys(id for store in others for id in _ids_at(store, first.rows_of_store(store) < 0))
    if not intersect:
        _refuse_missing(opened, rows, list(extra))
    if not kept.any():
        raise ValueError(f"the stores {', '.join(map(str, stores.values()))} have no utterance in common")
    checksums = _refuse_other_audio(opened, rows, kept)

    audio = next((name for name, store in opened.items() if store.with_audio), None)
    writer = StoreWriter(output, {name: store.info for name, store in opened.items()}, with_audio=audio is not None)
    # They belong to no one shard of the result: the first holds all of them, if it can.
    bad = _quarantine(opened, kept)
    bad_each = max(BAD_IN_A_SHARD, -(-len(bad) // len(first.shard_sizes)))
    keys, start, total = [], 0, int(kept.sum())
    with Behind(1) as writing, tqdm(total=total, unit="utt", desc="merge", disable=not progress) as bar:
        for index, size in enumerate(first.shard_sizes):
            places = start + np.flatnonzero(kept[start : start + size])
            start += size
            ids, lengths = first.ids_at(places).to_pylist(), first.lengths[places].tolist()
            known = [None if checksum < 0 else int(checksum) for checksum in checksums[places]]
            keys.append(list_key(zip(ids, lengths, known)))
            if not writer.has_shard(index, keys[-1]):
                columns = shard_columns(writer.infos, dict.fromkeys(writer.infos, ()), writer.with_audio)
                columns |= {"id": ids, "num_samples": lengths, "audio_checksum": known}
                for name, store in opened.items() if ids else ():
                    columns |= _codes(store, name, ids, rows[name][places])
                if ids and audio is not None:
                    columns |= _audio(opened[audio], ids, rows[audio][places])
                some = bad[index * bad_each : (index + 1) * bad_each]
                writing.submit(writer.write_columns, index, keys[-1], columns, some)
            bar.update(len(places))
    writer.finish(num_shards=len(keys), keys=keys)
    return MergeSummary(total, len(first) + len(extra) - total)


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


def _ids_at(store: TokenStore, chosen: np.ndarray) -> list[str]:
    return store.ids_at(np.flatnonzero(chosen)).to_pylist()


def _refuse_missing(opened: Mapping[str, TokenStore], rows: Mapping[str, np.ndarray], extra: list[str]) -> None:
    """`extra` are utterances that the first store lacks."""
    first = next(iter(opened.values()))
    lines = []
    for name, store in opened.items():
        if missing := sorted([*_ids_at(first, rows[name] < 0), *(id for id in extra if id not in store)]):
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            lines.append(f"{name} ({store.location}) lacks {len(missing)}: {', '.join(missing[:SHOWN])}{more}")
    if lines:
        raise ValueError(
            f"not every utterance is in every store: {'; '.join(lines)}. Tokenise the same list with both, or take "
            "what they have in common with --intersect"
        )


def _refuse_other_audio(
    opened: Mapping[str, TokenStore], rows: Mapping[str, np.ndarray], kept: np.ndarray
) -> np.ndarray:
    """Checksums of the first store's audio, or of another's where it has none; -1 where nobody has.

    `rows`: where the first store's utterances are in every store. Lengths must agree, and checksums where both are
    known.
    """
    (first_name, first), *others = opened.items()
    checksums = first.audio_checksums()
    for name, store in others:
        places = rows[name]
        theirs = store.audio_checksums()[places]
        known = (checksums >= 0) & (theirs >= 0)
        differ = kept & ((first.lengths != store.lengths[places]) | (known & (checksums != theirs)))
        if differ.any():
            found = _ids_at(first, differ)
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ValueError(
                f"{first_name} ({first.location}) and {name} ({store.location}) were made from different audio "
                f"(length or checksum differ) of {len(found)} utterances: {', '.join(found[:SHOWN])}{more}. Tokenise "
                "the same files with both, decoded by the same versions"
            )
        checksums = np.where(checksums >= 0, checksums, np.where(places >= 0, theirs, -1))
    return checksums


def _codes(store: TokenStore, name: str, ids: list[str], rows: np.ndarray) -> dict[str, Any]:
    """The columns of a teacher."""
    codes, checksums = store.codes_of_rows(rows)
    if not all(codes) or np.frombuffer(b"".join(codes), np.uint8).max() >= store.codebook_size:
        for id, code in zip(ids, codes):
            row = TokenRow(id, np.frombuffer(code, np.uint8).reshape(-1, store.num_codebooks), 0)
            checked_codes(row, store.info)  # says which one is wrong
    frames = [len(code) // store.num_codebooks for code in codes]
    return {f"{prefix(name)}num_frames": frames, f"{prefix(name)}codes": codes, checksum_column(name): checksums}


def _audio(store: TokenStore, ids: list[str], rows: np.ndarray) -> dict[str, Any]:
    """The audio, and what the store with the audio knows of it."""
    content, paths = store.read_rows(rows, "audio")["audio"].combine_chunks().flatten()
    named = [audio_path(id, Path(path).suffix) for id, path in zip(ids, paths.to_pylist())]
    audio = pa.StructArray.from_arrays([content, pa.array(named, pa.string())], ["bytes", "path"])
    return {"audio": audio, **{name: list(store.column(name).take(rows)) for name in MANIFEST_COLUMNS}}


def _quarantine(opened: Mapping[str, TokenStore], kept: np.ndarray) -> list[QuarantinedAudio]:
    """What the stores set aside, each utterance once; of the first store's utterances not those that are `kept`."""
    bad = {item.id: item for store in reversed(list(opened.values())) for item in store.quarantined}
    rows = next(iter(opened.values())).rows_of(bad)
    return [item for item, row in zip(bad.values(), rows) if row < 0 or not kept[row]]
