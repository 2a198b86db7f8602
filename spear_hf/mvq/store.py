# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Token store: the tokens of a corpus in a folder of parquet shards.

    STORE/
      metadata.json         format version, what the tokens are (StoreInfo), and once complete the list of shards
      README.md             lets `datasets.load_dataset("STORE")` find the shards
      tokens-00000.parquet  id, num_samples, num_frames, codes, checksum, audio_checksum
      quarantine.jsonl      id, path and error of utterances without tokens, if there are any

`codes` holds num_frames x num_codebooks bytes: `np.frombuffer(codes, np.uint8).reshape(num_frames, num_codebooks)`.
`checksum` is the CRC-32 of `codes`, `audio_checksum` that of the decoded waveform. A shard's footer repeats what the
tokens are and holds the shard's part of the quarantine, so that a shard stands for all utterances it was given. Files
are written under a temporary name, synced and renamed; equal content gives equal bytes.
"""

import itertools
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


FORMAT_VERSION = 1
METADATA = "metadata.json"
QUARANTINE = "quarantine.jsonl"
SHARD_UTTERANCES = 1000
ROW_GROUP = 64  # utterances read together for one: about half a megabyte of 10 s utterances
CACHED_ROW_GROUPS = 32
_FOOTER_KEY = b"spear_hf"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("num_frames", pa.int64(), nullable=False),
        pa.field("codes", pa.binary(), nullable=False),
        pa.field("checksum", pa.uint32(), nullable=False),
        pa.field("audio_checksum", pa.uint32()),
    ]
)


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
            for values in (mine, theirs):
                for key in ("teacher", "extraction.teacher.id", "extraction.teacher.revision"):
                    values.pop(key, None)
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [f"{k}: {mine.get(k)!r} / {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k)]


@dataclass(frozen=True)
class TokenRow:
    """One utterance of a store; `codes` is uint8 (frames, codebooks)."""

    id: str
    codes: np.ndarray
    num_samples: int
    audio_checksum: int | None = None


@dataclass(frozen=True)
class QuarantinedAudio:
    """An utterance that gave no tokens, and why."""

    id: str
    path: str
    error: str


def waveform_checksum(waveform: np.ndarray) -> int:
    """CRC-32 of the float32 samples."""
    return zlib.crc32(np.ascontiguousarray(waveform, dtype="<f4").tobytes())


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary name, sync, rename, sync of the folder: after a crash the file is whole, old or new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk: leave nothing behind
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class TokenStoreWriter:
    """Writes a store, or goes on with one that was interrupted.

    Either utterance by utterance (`add`, in a `with` block), or shard by shard (`has_shard`, `write_shard`, `finish`),
    where every shard is a fixed piece of the list of utterances, so that whoever writes it writes the same bytes.
    """

    def __init__(self, folder: str | Path, info: StoreInfo, shard_utterances: int = SHARD_UTTERANCES) -> None:
        self.folder = Path(folder)
        self.info = info
        self.shard_utterances = shard_utterances
        self.folder.mkdir(parents=True, exist_ok=True)
        self._marked_complete = False
        if (self.folder / METADATA).exists():
            metadata = _read_metadata(self.folder)
            self._marked_complete = bool(metadata.get("complete"))
            if differences := _read_info(metadata).differences(info):
                raise ValueError(
                    f"{self.folder} holds other tokens (there / now): {'; '.join(differences)}; write to a new folder"
                )
        elif any(self.folder.glob("tokens-*.parquet")):
            raise ValueError(f"{self.folder} holds shards but no {METADATA}: restore it, or write to a new folder")
        self._shards = {int(path.stem[-5:]): _read_shard_ids(path) for path in _shard_files(self.folder)}
        if not self._marked_complete:
            self._write_metadata(complete=False)
        self._pending: list[TokenRow | QuarantinedAudio] = []
        self._done = {id for tokens, bad in self._shards.values() for id in [*tokens, *(item.id for item in bad)]}

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def __contains__(self, id: str) -> bool:
        """Whether a complete shard holds this utterance, or holds it as bad."""
        return id in self._done

    def add(self, id: str, codes: np.ndarray, num_samples: int, audio_checksum: int | None = None) -> bool:
        """Adds an utterance; False if a complete shard has it already."""
        return self._append(TokenRow(id, codes, num_samples, audio_checksum))

    def add_bad(self, id: str, path: str, error: str) -> bool:
        """Adds an utterance to the quarantine; False if a complete shard has it already."""
        return self._append(QuarantinedAudio(id, path, error))

    def _append(self, item: TokenRow | QuarantinedAudio) -> bool:
        if item.id in self._done:
            return False
        self._pending.append(item)
        if len(self._pending) >= self.shard_utterances:
            self._flush()
        return True

    def _flush(self) -> None:
        if self._pending:
            rows = [item for item in self._pending if isinstance(item, TokenRow)]
            bad = [item for item in self._pending if isinstance(item, QuarantinedAudio)]
            index = next(index for index in itertools.count() if index not in self._shards)
            self.write_shard(index, rows, bad)
            self._pending = []

    def has_shard(self, index: int, ids: Sequence[str]) -> bool:
        """Whether shard `index` is there for exactly these utterances.

        One that stands for fewer, the first of them, is to be written anew (the list has grown); one of other
        utterances is a ValueError.
        """
        if index not in self._shards:
            return False
        tokens, bad = self._shards[index]
        have = {*tokens, *(item.id for item in bad)}
        if have == set(ids):
            return True
        if have == set(ids[: len(have)]):
            return False
        raise ValueError(
            f"{_shard_path(self.folder, index)} was made from another list of utterances (or another shard size); "
            "write to a new folder"
        )

    def write_shard(self, index: int, rows: Sequence[TokenRow], quarantined: Sequence[QuarantinedAudio] = ()) -> None:
        """Writes one shard, rows in the order given."""
        ids = [*(row.id for row in rows), *(item.id for item in quarantined)]
        _refuse_duplicates(ids, f"shard {index}")
        codes = [self._checked(row) for row in rows]
        columns = {
            "id": [row.id for row in rows],
            "num_samples": [row.num_samples for row in rows],
            "num_frames": [len(row.codes) for row in rows],
            "codes": codes,
            "checksum": [zlib.crc32(code) for code in codes],
            "audio_checksum": [row.audio_checksum for row in rows],
        }
        footer = {
            "format_version": FORMAT_VERSION,
            "info": asdict(self.info),
            "shard": index,
            "quarantine": [asdict(item) for item in quarantined],
        }
        schema = _SCHEMA.with_metadata({_FOOTER_KEY: _json(footer).encode()})
        sink = pa.BufferOutputStream()
        # Codes are nearly incompressible, and without a dictionary a row group is read at the speed of a copy.
        pq.write_table(
            pa.table(columns, schema=schema),
            sink,
            row_group_size=ROW_GROUP,
            compression={name: "NONE" if name == "codes" else "ZSTD" for name in _SCHEMA.names},
            use_dictionary=False,
            write_statistics=False,
        )
        if self._marked_complete:  # a finished store that is extended
            self._write_metadata(complete=False)
        write_atomically(_shard_path(self.folder, index), sink.getvalue().to_pybytes())
        self._shards[index] = ([row.id for row in rows], list(quarantined))
        self._done.update(ids)

    def finish(self, num_shards: int | None = None) -> None:
        """Writes what is pending, the quarantine and the list of shards: the store is complete.

        `num_shards` is how many there must be; ValueError where some are missing or over.
        """
        self._flush()
        indices = sorted(self._shards)
        planned = range(max(indices, default=-1) + 1 if num_shards is None else num_shards)
        if missing := sorted(set(planned) - set(indices)):
            raise ValueError(f"{self.folder}: shards {missing} have not been written; run the rest before finishing")
        if surplus := sorted(set(indices) - set(planned)):
            raise ValueError(
                f"{self.folder}: shards {surplus} are of a longer list of utterances; write to a new folder"
            )
        _refuse_duplicates([id for index in indices for id in self._shards[index][0]], str(self.folder))
        bad = self.quarantined
        if bad:
            write_atomically(self.folder / QUARANTINE, "".join(_json(asdict(b)) + "\n" for b in bad).encode())
        else:
            (self.folder / QUARANTINE).unlink(missing_ok=True)
        write_atomically(self.folder / "README.md", _card(self.info).encode())
        self._write_metadata(complete=True)

    @property
    def quarantined(self) -> list[QuarantinedAudio]:
        """All bad utterances of the complete shards."""
        return [item for index in sorted(self._shards) for item in self._shards[index][1]]

    def _checked(self, row: TokenRow) -> bytes:
        shape, kind = row.codes.shape, row.codes.dtype
        if kind != np.uint8 or len(shape) != 2 or shape[1] != self.info.num_codebooks or shape[0] == 0:
            raise ValueError(f"{row.id}: codes are {kind} {shape}, not uint8 (frames, {self.info.num_codebooks})")
        if row.codes.max() >= self.info.codebook_size:
            raise ValueError(f"{row.id}: code {row.codes.max()} is beyond the codebooks of {self.info.codebook_size}")
        return np.ascontiguousarray(row.codes).tobytes()

    def _write_metadata(self, complete: bool) -> None:
        self._marked_complete = complete
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(self.info), "complete": complete}
        if complete:
            content["num_utterances"] = sum(len(tokens) for tokens, _ in self._shards.values())
            content["num_quarantined"] = len(self.quarantined)
            content["shards"] = [
                {"file": _shard_path(self.folder, index).name, "num_utterances": len(self._shards[index][0])}
                for index in sorted(self._shards)
            ]
        write_atomically(self.folder / METADATA, (_json(content, indent=2) + "\n").encode())


class TokenStore:
    """Reads a store: `store[id]` -> uint8 (frames, codebooks). Codes are read when asked for, with their checksums.

    May be sent to other processes (loader workers): it holds the index, and opens files where it is used.
    """

    def __init__(self, folder: Path, info: StoreInfo, shards: list[Path], table: pa.Table, rows: list[int]) -> None:
        self.folder = folder
        self.info = info
        self._shards = shards
        self.ids: list[str] = table["id"].to_pylist()
        self._frames = table["num_frames"].to_numpy()
        self._samples = table["num_samples"].to_numpy()
        self._first_row = np.concatenate([[0], np.cumsum(rows)])
        self._index = {id: row for row, id in enumerate(self.ids)}
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._files: dict[int, pq.ParquetFile] = {}

    @classmethod
    def open(cls, folder: str | Path, allow_incomplete: bool = False) -> "TokenStore":
        """Opens and checks a store; `allow_incomplete` takes the complete shards of an interrupted one."""
        folder = Path(folder)
        metadata = _read_metadata(folder)
        info = _read_info(metadata)
        if metadata.get("complete"):
            shards = [folder / shard["file"] for shard in metadata["shards"]]
        elif allow_incomplete:
            shards = _shard_files(folder)
        else:
            raise ValueError(
                f"{folder} is not complete: run the command again that writes it, it goes on where it was"
            )
        tables = []
        for position, path in enumerate(shards):
            if not path.exists():
                raise ValueError(f"{path} is missing: restore it, or run tokenize again to make it anew")
            file = _open_shard(path)
            differences = _read_info(_footer(file, path)["info"]).differences(info)
            if differences:
                raise ValueError(f"{path} does not belong to this store (shard / store): {'; '.join(differences)}")
            if metadata.get("complete") and file.metadata.num_rows != metadata["shards"][position]["num_utterances"]:
                raise ValueError(
                    f"{path} has {file.metadata.num_rows} utterances, {METADATA} says "
                    f"{metadata['shards'][position]['num_utterances']}: delete the shard and run tokenize again"
                )
            tables.append(_read_columns(file, path, ["id", "num_frames", "num_samples"]))
        table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
        _refuse_duplicates(table["id"].to_pylist(), str(folder))
        return cls(folder, info, shards, table, [len(part) for part in tables])

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: object) -> bool:
        return id in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, id: str) -> np.ndarray:
        row = self._row(id)
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        group, place = divmod(row - int(self._first_row[shard]), ROW_GROUP)
        table = self._row_group(shard, group)
        codes = table["codes"][place].as_py()
        frames = int(self._frames[row])
        if len(codes) != frames * self.num_codebooks or zlib.crc32(codes) != table["checksum"][place].as_py():
            raise ValueError(
                f"{self._shards[shard]}: the codes of {id} are damaged; delete the shard and run tokenize again"
            )
        return np.frombuffer(codes, dtype=np.uint8).reshape(frames, self.num_codebooks).copy()

    def num_frames(self, id: str) -> int:
        """Token frames of an utterance, without reading them."""
        return int(self._frames[self._row(id)])

    def num_samples(self, id: str) -> int:
        """Samples (16 kHz) the tokens were made from."""
        return int(self._samples[self._row(id)])

    @property
    def num_codebooks(self) -> int:
        return self.info.num_codebooks

    @property
    def codebook_size(self) -> int:
        return self.info.codebook_size

    @property
    def frame_rate(self) -> float:
        """Token frames a second."""
        return self.info.frame_rate

    @property
    def teacher(self) -> str:
        return self.info.teacher

    @property
    def layer(self) -> int | None:
        return self.info.layer

    @property
    def quantizer_id(self) -> str:
        return self.info.quantizer_id

    def _row(self, id: str) -> int:
        try:
            return self._index[id]
        except KeyError:
            raise KeyError(f"{id!r} is not in {self.folder} ({len(self)} utterances)") from None

    def _row_group(self, shard: int, group: int) -> pa.Table:
        key = (shard, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if shard not in self._files:
            self._files[shard] = _open_shard(self._shards[shard])
        self._cache[key] = _read_columns(self._files[shard], self._shards[shard], ["codes", "checksum"], group)
        if len(self._cache) > CACHED_ROW_GROUPS:
            self._cache.popitem(last=False)
        return self._cache[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_files": {}}


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"tokens-{index:05d}.parquet"


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tokens-[0-9][0-9][0-9][0-9][0-9].parquet"))


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _refuse_duplicates(ids: list[str], where: str) -> None:
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(id for id in ids if id in seen or seen.add(id))  # type: ignore[func-returns-value]
        raise ValueError(f"{where}: {twice!r} occurs twice")


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a token store: it has no {METADATA}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    _check_version(metadata, path)
    return metadata


def _check_version(content: dict[str, Any], path: Path) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this spear_hf reads {FORMAT_VERSION}: update it")


def _read_info(content: dict[str, Any]) -> StoreInfo:
    if missing := [entry.name for entry in fields(StoreInfo) if entry.name not in content]:
        raise ValueError(f"the metadata of a token store lacks {', '.join(missing)}")
    return StoreInfo(**{entry.name: content[entry.name] for entry in fields(StoreInfo)})


def _open_shard(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is truncated or no parquet file ({error}); delete it and run tokenize again"
        ) from error


def _footer(file: pq.ParquetFile, path: Path) -> dict[str, Any]:
    stored = (file.schema_arrow.metadata or {}).get(_FOOTER_KEY)
    if stored is None:
        raise ValueError(f"{path} was not written by spear_hf; take it out of the store")
    footer = json.loads(stored)
    _check_version(footer, path)
    return footer


def _read_columns(file: pq.ParquetFile, path: Path, columns: list[str], group: int | None = None) -> pa.Table:
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run tokenize again") from error


def _read_shard_ids(path: Path) -> tuple[list[str], list[QuarantinedAudio]]:
    file = _open_shard(path)
    bad = [QuarantinedAudio(**item) for item in _footer(file, path)["quarantine"]]
    return _read_columns(file, path, ["id"])["id"].to_pylist(), bad


def _card(info: StoreInfo) -> str:
    layer = "last hidden state" if info.layer is None else f"hidden state {info.layer}"
    return (
        "---\nconfigs:\n- config_name: default\n  data_files: tokens-*.parquet\n---\n\n"
        f"Tokens of spear_hf: {info.num_codebooks} codebooks of {info.codebook_size} at {info.frame_rate:g} Hz; "
        f"teacher {info.teacher}, {layer}; quantiser {info.quantizer_id}.\n\n"
        "`codes` holds `num_frames` x `num_codebooks` bytes, frame by frame:\n"
        f"`numpy.frombuffer(codes, numpy.uint8).reshape(num_frames, {info.num_codebooks})`.\n"
    )
