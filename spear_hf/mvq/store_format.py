# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The files of a token store (the tree is in store.py): their columns and footers, written and checked.

A store holds the tokens of one teacher, or of several under names (merge.py). In code both are a mapping from names to
StoreInfo, the single one having the name "" and its columns no prefix.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear_hf.data.ids import id_hashes
from spear_hf.data.utterances import CHUNK


FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)  # 1 had no index.parquet, no keys of shards and no audio
METADATA = "metadata.json"
INDEX = "index.parquet"
QUARANTINE = "quarantine.jsonl"
CARD = "README.md"
SHARD_UTTERANCES = 1000
ROW_GROUP = 64  # utterances read together for one: about half a megabyte of 10 s utterances
ROW_GROUP_WITH_AUDIO = 8  # likewise, 1.3 MB of 16-bit FLAC
READERS = 8  # threads, where something is read of every shard: on a network's file system each takes a while
SINGLE = ""
MANIFEST_COLUMNS = ("domain", "split")  # of a store with audio, and of its index
_FOOTER_KEY = b"spear_hf"

Infos = Mapping[str, "StoreInfo"]


@dataclass(frozen=True)
class StoreInfo:
    """What the tokens of a store are; tokens of another kind are never added to it."""

    num_codebooks: int
    codebook_size: int
    frame_rate: float
    teacher: str
    layer: int | None
    quantizer_id: str
    # How they were made: the teacher's provenance, refinement passes.
    extraction: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_codebooks < 1 or not 2 <= self.codebook_size <= 256 or self.frame_rate <= 0:
            raise ValueError(
                f"a token store holds uint8 codes: num_codebooks={self.num_codebooks} must be at least 1, "
                f"codebook_size={self.codebook_size} within 2 to 256, frame_rate={self.frame_rate} positive"
            )

    def differences(self, other: "StoreInfo") -> list[str]:
        """Lines naming what differs. Where a teacher's files lie does not matter if their fingerprint is the same."""
        mine, theirs = (_flat(asdict(info)) for info in (self, other))
        if mine.get("extraction.teacher.fingerprint"):
            options = (f"extraction.teacher.options.{name}" for name in ("file", "model"))  # of factories: places too
            places = ("teacher", "extraction.teacher.id", "extraction.teacher.revision", *options)
            for values in (mine, theirs):
                for key in places:
                    values.pop(key, None)
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [f"{k}: {mine.get(k)!r} / {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k)]


@dataclass(frozen=True)
class TokenRow:
    """One utterance of a store; `codes` is uint8 (frames, codebooks), `audio` a file's content and its suffix."""

    id: str
    codes: np.ndarray
    num_samples: int
    audio_checksum: int | None = None
    audio: tuple[bytes, str] | None = None
    domain: str | None = None  # this and the split are kept with the audio, for it stands for a manifest
    split: str | None = None


@dataclass(frozen=True)
class QuarantinedAudio:
    """An utterance that gave no tokens, and why."""

    id: str
    path: str
    error: str


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself; `key` identifies the piece of a list that it was made of ("" in format 1)."""

    infos: Infos
    index: int
    key: str
    quarantine: tuple[QuarantinedAudio, ...]
    with_audio: bool
    num_rows: int


def waveform_checksum(waveform: np.ndarray) -> int:
    """CRC-32 of the float32 samples."""
    return zlib.crc32(np.ascontiguousarray(waveform, dtype="<f4").data)


def list_key(items: Iterable[tuple[str | int | None, ...]]) -> str:
    """Identifies a list of utterances by their ids, and what else is known of each: lengths, checksums."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"[{', '.join(map(_to_json, item))}]\n".encode())
    return digest.hexdigest()[:32]


def _to_json(value: str | int | None) -> str:
    """`to_json` of these alone, in a fifth of the time."""
    if isinstance(value, str):
        return encode_basestring(value)
    return "null" if value is None else str(value)


def prefix(name: str) -> str:
    """Of the columns of a teacher."""
    return f"{name}_" if name else ""


def checksum_column(name: str) -> str:
    """That of a teacher's codes; a teacher may be called "audio", and `audio_checksum` is that of the waveform."""
    return f"{name}_codes_checksum" if name else "checksum"


def differences(there: Infos, now: Infos) -> list[str]:
    """Lines naming what differs between two sets of teachers."""
    if list(there) != list(now):
        return [f"teachers: {', '.join(there) or 'one'} / {', '.join(now) or 'one'}"]
    return [prefix(name) + line for name in there for line in there[name].differences(now[name])]


# Shards


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"tokens-{index:05d}.parquet"


def shard_index(path: Path) -> int:
    """The number in the name of a shard."""
    return int(path.stem.removeprefix("tokens-"))


def shard_files(folder: Path) -> list[Path]:
    """In the order of their numbers, which have five digits or, from 100,000 on, more."""
    return sorted(folder.glob("tokens-" + "[0-9]" * 5 + "*.parquet"), key=shard_index)


def shard_schema(names: Iterable[str], with_audio: bool) -> pa.Schema:
    """Columns of a shard with these teachers' tokens."""
    columns: list[tuple[str, pa.DataType, bool]] = [("id", pa.string(), False), ("num_samples", pa.int64(), False)]
    for name in names:
        columns += [
            (f"{prefix(name)}num_frames", pa.int64(), False),
            (f"{prefix(name)}codes", pa.binary(), False),
            (checksum_column(name), pa.uint32(), False),
        ]
    columns.append(("audio_checksum", pa.uint32(), True))
    if with_audio:
        columns += [(name, pa.string(), True) for name in MANIFEST_COLUMNS]
        columns.append(("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())]), True))
    return pa.schema([pa.field(*column) for column in columns])


def shard_columns(infos: Infos, rows: Mapping[str, Sequence[TokenRow]], with_audio: bool) -> dict[str, Any]:
    """The columns of a shard, lists. `rows` has the same utterances for every teacher."""
    first = next(iter(rows.values()))
    columns: dict[str, Any] = {
        "id": [row.id for row in first],
        "num_samples": [row.num_samples for row in first],
        "audio_checksum": [row.audio_checksum for row in first],
    }
    for name, info in infos.items():
        codes = [checked_codes(row, info) for row in rows[name]]
        columns[f"{prefix(name)}num_frames"] = [len(row.codes) for row in rows[name]]
        columns[f"{prefix(name)}codes"] = codes
        columns[checksum_column(name)] = [zlib.crc32(code) for code in codes]
    if with_audio:
        columns |= {name: [getattr(row, name) for row in first] for name in MANIFEST_COLUMNS}
        columns["audio"] = [_audio_cell(row) for row in first]
    return columns


def shard_content(
    infos: Infos,
    index: int,
    key: str,
    columns: Mapping[str, Any],
    quarantine: Sequence[QuarantinedAudio],
    with_audio: bool,
) -> memoryview:
    """The bytes of a shard, whose columns are lists or arrays; equal arguments give equal bytes."""
    schema = shard_schema(infos, with_audio)
    footer = {
        "format_version": FORMAT_VERSION,
        **infos_content(infos),
        "shard": index,
        "key": key,
        "quarantine": [asdict(item) for item in quarantine],
    }
    schema = schema.with_metadata({_FOOTER_KEY: to_json(footer).encode(), **_datasets_features(schema)})
    sink = pa.BufferOutputStream()
    # Codes and audio are nearly incompressible, and without a dictionary a row group is read at the speed of a copy.
    # Checksums of pages guard the other columns; codes have one for each utterance.
    raw = {f"{prefix(name)}codes" for name in infos} | {"audio"}
    leaves = [name for name in schema.names if name != "audio"] + (["audio.bytes", "audio.path"] if with_audio else [])
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    with pq.ParquetWriter(
        sink,
        schema,
        compression={leaf: "NONE" if leaf.split(".")[0] in raw else "ZSTD" for leaf in leaves},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        if len(table):  # `datasets` refuses a row group without rows, and with it the whole store
            writer.write_table(table, row_group_size=ROW_GROUP_WITH_AUDIO if with_audio else ROW_GROUP)
    return memoryview(sink.getvalue())


def open_shard(path: Path, verify: bool = False, memory_map: bool = True) -> pq.ParquetFile:
    """`verify`: check every page that is read against its checksum."""
    try:
        return pq.ParquetFile(path, memory_map=memory_map, page_checksum_verification=verify)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: restore it, or run tokenize again to make it anew") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is truncated or no parquet file ({error}); delete it and run tokenize again"
        ) from error


def read_footer(file: pq.ParquetFile, path: Path) -> Footer:
    """What a shard says of itself. ValueError if it is damaged, of another version, or not one of ours."""
    stored = (file.schema_arrow.metadata or {}).get(_FOOTER_KEY)
    if stored is None:
        raise ValueError(f"{path} was not written by spear_hf; take it out of the store")
    try:
        content = json.loads(stored)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run tokenize again") from error
    check_version(content, path)
    return Footer(
        infos=read_infos(content, path),
        index=content["shard"],
        key=content.get("key", ""),
        quarantine=tuple(QuarantinedAudio(**item) for item in content["quarantine"]),
        with_audio="audio" in file.schema_arrow.names,
        num_rows=file.metadata.num_rows,
    )


def read_columns(
    file: pq.ParquetFile, path: Path, columns: list[str], groups: Sequence[int] | None = None
) -> pa.Table:
    """These columns, of all row groups or of some. ValueError if the shard is damaged."""
    try:
        return file.read(columns) if groups is None else file.read_row_groups(groups, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run tokenize again") from error


def checked_codes(row: TokenRow, info: StoreInfo) -> bytes:
    """The bytes of (frames, codebooks). ValueError if they are not uint8, empty, or not of these codebooks."""
    shape, kind = row.codes.shape, row.codes.dtype
    if kind != np.uint8 or len(shape) != 2 or shape[1] != info.num_codebooks or shape[0] == 0:
        raise ValueError(f"{row.id}: codes are {kind} {shape}, not uint8 (frames, {info.num_codebooks})")
    if row.codes.max() >= info.codebook_size:
        raise ValueError(f"{row.id}: code {row.codes.max()} is beyond the codebooks of {info.codebook_size}")
    return np.ascontiguousarray(row.codes).tobytes()


def _audio_cell(row: TokenRow) -> dict[str, Any]:
    if row.audio is None:
        raise ValueError(f"{row.id}: its audio is missing, and the store is one with audio")
    content, suffix = row.audio
    return {"bytes": content, "path": audio_path(row.id, suffix)}


def audio_path(id: str, suffix: str) -> str:
    """What a store calls the audio of an utterance."""
    return id if id.endswith(suffix) else id + suffix


def _datasets_features(schema: pa.Schema) -> dict[bytes, bytes]:
    """What tells `datasets` and the Hub's viewer that a column is audio; without one they need no telling."""
    if "audio" not in schema.names:
        return {}
    features: dict[str, Any] = {
        column.name: {"dtype": str(column.type), "_type": "Value"} for column in schema if column.name != "audio"
    }
    features = {name: features.get(name, {"sampling_rate": 16000, "_type": "Audio"}) for name in schema.names}
    return {b"huggingface": to_json({"info": {"features": features}}).encode()}


# Metadata, index and card


def read_metadata(folder: Path) -> dict[str, Any]:
    """A store's own record. ValueError if there is none, or if it is damaged or of another version."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a token store: it has no {METADATA}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or write to a new folder") from error
    check_version(metadata, path)
    return metadata


def check_version(content: Any, path: Path) -> None:
    """ValueError if this is of a version that cannot be read."""
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in READ_VERSIONS:
        versions = " and ".join(map(str, READ_VERSIONS))
        raise ValueError(f"{path} has format version {version}; this spear_hf reads {versions}: update it")


def infos_content(infos: Infos) -> dict[str, Any]:
    """As it stands in a shard's footer."""
    if list(infos) == [SINGLE]:
        return {"info": asdict(infos[SINGLE])}
    return {"teachers": {name: asdict(info) for name, info in infos.items()}}


def read_infos(content: dict[str, Any], path: Path) -> Infos:
    """From a footer, or from metadata, in which the one teacher of a store stands on the top level."""
    entries = content.get("teachers") or {SINGLE: content.get("info", content)}
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} is damaged: what its tokens are is no object; restore it")
    for entry in entries.values():
        if missing := [column.name for column in fields(StoreInfo) if column.name not in entry]:
            raise ValueError(f"{path}: the metadata of a token store lacks {', '.join(missing)}")
    try:
        return {
            name: StoreInfo(**{f.name: entry[f.name] for f in fields(StoreInfo)}) for name, entry in entries.items()
        }
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it") from error


def index_content(table: pa.Table, where: str) -> memoryview:
    """The bytes of index.parquet: id, num_samples, num_frames of every teacher, with audio domain and split, shard,
    row, id_hash.

    ValueError if an id comes twice.
    """
    table = table.append_column(pa.field("id_hash", pa.uint64(), nullable=False), pa.array(_hashes(table["id"])))
    hash_order(table, where)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression={name: "NONE" if name == "id_hash" else "ZSTD" for name in table.column_names},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def hash_order(table: pa.Table, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the ids in ascending order, uint64, and the rows they are of, uint32; ValueError if an id comes twice.

    The hashes are those of the column id_hash, where there is one.
    """
    hashes = table["id_hash"].to_numpy() if "id_hash" in table.column_names else _hashes(table["id"])
    order = np.argsort(hashes).astype(np.uint32)
    hashes = hashes[order]
    alike = np.flatnonzero(hashes[1:] == hashes[:-1])
    ids = [table["id"][int(order[place + offset])].as_py() for place in alike for offset in (0, 1)]
    if twice := [id for id, next_id in zip(ids[::2], ids[1::2]) if id == next_id]:
        raise ValueError(
            f"{where}: {twice[0]!r} occurs twice: name a column of ids that are unique over all the data "
            "(--id-column), or rename one, and write to a new folder"
        )
    return hashes, order


def _hashes(ids: pa.ChunkedArray) -> np.ndarray:
    parts = (ids.slice(start, CHUNK).to_pylist() for start in range(0, len(ids), CHUNK))
    return id_hashes(id for part in parts for id in part)


def card(infos: Infos, with_audio: bool, shards: Mapping[str, int]) -> str:
    """README.md: lets `datasets.load_dataset` and the Hub find the shards, and says what the columns are.

    `shards` are their utterances by file. `datasets` before 5.1 fails where one has none, as all of its audio was bad.
    """
    filled = [name for name, utterances in shards.items() if utterances]
    files = [" tokens-*.parquet"] if len(filled) in (0, len(shards)) else ["", *(f"  - {name}" for name in filled)]
    lines = ["---", "configs:", "- config_name: default", "  data_files:" + "\n".join(files), "---", ""]
    for name, info in infos.items():
        layer = "last hidden state" if info.layer is None else f"hidden state {info.layer}"
        column, rows = f"{prefix(name)}codes", f"{prefix(name)}num_frames"
        lines += [
            f"Tokens of spear_hf{f', `{name}`' if name else ''}: {info.num_codebooks} codebooks of "
            f"{info.codebook_size} at {info.frame_rate:g} Hz; teacher {info.teacher}, {layer}; quantiser "
            f"{info.quantizer_id}.",
            "",
            f"`{column}` holds `{rows}` x `num_codebooks` bytes, frame by frame:",
            f"`numpy.frombuffer({column}, numpy.uint8).reshape({rows}, {info.num_codebooks})`.",
            "",
        ]
    if with_audio:
        lines += [
            "`audio` is what the tokens were made from: FLAC at 16 kHz or, where it would round, the original file.",
            "`datasets` decodes it with torchcodec; `cast_column('audio', Audio(decode=False))` gives the bytes.",
            "",
        ]
    return "\n".join(lines)


def to_json(value: Any, indent: int | None = None) -> str:
    """As it stands in files of a store."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse_duplicates(ids: Sequence[str], where: str) -> None:
    """ValueError that names an id which occurs twice."""
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(id for id in ids if id in seen or seen.add(id))  # type: ignore[func-returns-value]
        raise ValueError(f"{where}: {twice!r} occurs twice")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
