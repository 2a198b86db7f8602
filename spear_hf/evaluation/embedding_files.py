# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of embeddings, written one utterance at a time and put in place only when complete.

OUT.safetensors  one float32 tensor per utterance, named by its id; settings and errors in the metadata
OUT.npz          one float32 array per utterance, named by its id; settings and errors in the zip archive's comment
OUT.parquet      columns id, path, num_frames, frame_rate, shape, embedding (row-major); settings and errors in the
                 file's metadata, under "spear_hf"

Utterances come in the order they were computed, by length. The memory needed does not grow with their number.
"""

import contextlib
import glob
import json
import shutil
import struct
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..mvq.atomic_files import NOT_KEPT, remove_leftovers, replacing


FORMAT_VERSION = 1
# The comment of a zip archive has room for this many bytes.
_MAX_ZIP_COMMENT = 65535
# What readers of safetensors take, less what fills it up to a multiple of 8.
_MAX_HEADER = 100_000_000 - 8
_METADATA = "__metadata__"
_HEADER_ENTRY = 110  # bytes, beside the id: of shapes and offsets of any size


class EmbeddingWriter(ABC):
    """Writes to an open temporary file: `add` any number of utterances, `finish` if all went well, always `close`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    @abstractmethod
    def add(self, id: str, path: str, values: np.ndarray, frame_rate: float | None) -> None:
        """One utterance's float32 array: (..., frames, dim), or (..., dim) where frame_rate is None."""

    @abstractmethod
    def finish(self, metadata: dict[str, Any]) -> None:
        """Writes what is left; `metadata` is kept as JSON."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything but the file itself."""


class SafetensorsWriter(EmbeddingWriter):
    """The header comes first in this format and is known last, so the data wait in a file of their own.

    Its readers take a header of 100 MB at most, see `check_room`; errors beyond that are in the file beside this only.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.data = tempfile.TemporaryFile(dir=Path(file.name).parent)  # noqa: SIM115 (see close)
        self.header: dict[str, Any] = {}

    def add(self, id: str, path: str, values: np.ndarray, frame_rate: float | None) -> None:
        begin = self.data.tell()
        self.data.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
        self.header[id] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [begin, self.data.tell()]}

    def finish(self, metadata: dict[str, Any]) -> None:
        header = self._header(metadata)
        if len(header) > _MAX_HEADER:
            header = self._header({**metadata, "errors": None})
        header += b" " * (-len(header) % 8)  # tensors are aligned to 8 bytes
        self.file.write(struct.pack("<Q", len(header)) + header)
        self.data.seek(0)
        shutil.copyfileobj(self.data, self.file, 1 << 22)

    def _header(self, metadata: dict[str, Any]) -> bytes:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
        return json.dumps({_METADATA: texts, **self.header}).encode()

    def close(self) -> None:
        self.data.close()


class NpzWriter(EmbeddingWriter):
    """An array `ID.npy` for every file, uncompressed, in an archive that `numpy.load` opens."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)

    def add(self, id: str, path: str, values: np.ndarray, frame_rate: float | None) -> None:
        with self.archive.open(f"{id}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, np.ascontiguousarray(values, dtype=np.float32), allow_pickle=False)

    def finish(self, metadata: dict[str, Any]) -> None:
        comment = json.dumps(metadata).encode()
        if len(comment) > _MAX_ZIP_COMMENT:  # then the errors are in the file beside this one only
            comment = json.dumps({**metadata, "errors": None}).encode()
        self.archive.comment = comment

    def close(self) -> None:
        self.archive.close()


class ParquetWriter(EmbeddingWriter):
    """One row group for about 32 MB of values."""

    _GROUP_VALUES = 8_000_000

    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(file)
        self.schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("path", pa.string(), nullable=False),
                pa.field("num_frames", pa.int32()),
                pa.field("frame_rate", pa.float64()),
                pa.field("shape", pa.list_(pa.int32()), nullable=False),
                pa.field("embedding", pa.large_list(pa.float32()), nullable=False),
            ]
        )
        self.writer = pq.ParquetWriter(file, self.schema, compression="zstd")
        self.rows: list[dict[str, Any]] = []
        self.waiting: list[np.ndarray] = []
        self.waiting_values = 0

    def add(self, id: str, path: str, values: np.ndarray, frame_rate: float | None) -> None:
        num_frames = None if frame_rate is None else values.shape[-2]
        self.rows.append(
            {"id": id, "path": path, "num_frames": num_frames, "frame_rate": frame_rate, "shape": list(values.shape)}
        )
        self.waiting.append(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
        self.waiting_values += values.size
        if self.waiting_values >= self._GROUP_VALUES:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa

        offsets = np.cumsum([0, *map(len, self.waiting)])
        flat = np.concatenate(self.waiting) if self.waiting else np.zeros(0, np.float32)
        columns = [
            pa.array([row[field.name] for row in self.rows], type=field.type)
            for field in self.schema
            if field.name != "embedding"
        ]
        columns.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, pa.float32())))
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self.rows, self.waiting, self.waiting_values = [], [], 0

    def finish(self, metadata: dict[str, Any]) -> None:
        self._write_group()
        self.writer.add_key_value_metadata({"spear_hf": json.dumps(metadata)})

    def close(self) -> None:
        self.writer.close()


WRITERS: dict[str, type[EmbeddingWriter]] = {
    ".safetensors": SafetensorsWriter,
    ".npz": NpzWriter,
    ".parquet": ParquetWriter,
}


def check_output(output: Path) -> None:
    """Raises ValueError for a path that embeddings cannot be written to; makes its folder."""
    if output.suffix not in WRITERS:
        raise ValueError(f"--output {output}: the suffix must be one of {', '.join(WRITERS)}")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file")
    output.parent.mkdir(parents=True, exist_ok=True)


def check_room(output: Path, ids: Sequence[str]) -> None:
    """Raises ValueError for utterances that the format does not take, before they are computed."""
    if output.suffix == ".safetensors" and _METADATA in ids:
        raise ValueError(
            f"--output {output}: no tensor can be called {_METADATA}: rename it, or take .parquet or .npz"
        )
    size = sum(len(json.dumps(id)) + _HEADER_ENTRY for id in ids)
    if output.suffix == ".safetensors" and size > _MAX_HEADER:
        raise ValueError(
            f"--output {output}: the names of {len(ids)} files need {size / 1e6:.0f} MB, and a .safetensors file has "
            f"room for {_MAX_HEADER / 1e6:.0f} MB of them: take .parquet or .npz"
        )


@contextlib.contextmanager
def embedding_writer(output: Path) -> Iterator[EmbeddingWriter]:
    """A writer for `output` by its suffix. The file appears, or replaces the old one, when the block ends well."""
    check_output(output)
    remove_leftovers(output.parent, glob.escape(output.name))
    with replacing(output, NOT_KEPT) as file, contextlib.closing(WRITERS[output.suffix](file)) as writer:
        yield writer
