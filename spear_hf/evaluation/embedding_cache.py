# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of clips on disk, found again by content: the audio's bytes, the representation, and what is kept of it.

    FOLDER/v1/FINGERPRINT/pooled/ab/abcdef….safetensors     float32 (layers, 2 * dim): means, standard deviations
    FOLDER/v1/FINGERPRINT/frames/ab/abcdef….safetensors     float16 (layers, frames, dim); float32 where that overflows
    FOLDER/v1/FINGERPRINT/last/ab/abcdef….safetensors       the same of the last layer alone, (1, frames, dim)

FINGERPRINT covers parameters, configuration, precision and feature extractor; the name of a file is the SHA-256 of
the audio file. Files appear complete or not at all, one for each clip, so that an interrupted run goes on where it
was, and several runs may share a folder. They have a checksum: one that a crash of the machine cut off, that the disk
has changed, or that an earlier version left without it, is computed anew. Nothing is ever removed; the folder may be,
at any time.
"""

import hashlib
import io
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from ..data.audio import AudioError, audio_duration, load_audio
from ..mvq.atomic_files import explained
from .representations import Representation
from .tasks import Clip, StoredAudio


FORMAT_VERSION = 1
KEEPS = ("pooled", "frames", "last")
_TENSOR, _CHECKSUM = "features", "crc32"
_HALF_LIMIT = float(np.finfo(np.float16).max)


class EmbeddingCache:
    """A folder of features.

    Args:
        folder: is made where it is not there.
        batch_seconds: of audio, padding included, that is embedded at once.
        max_seconds: longer clips are refused, because the memory of attention grows with the square of the length.
        progress: whether a bar is shown while clips are embedded.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        batch_seconds: float = 30.0,
        max_seconds: float = 120.0,
        progress: bool = True,
    ) -> None:
        if not (batch_seconds > 0 and max_seconds > 0):
            raise ValueError(f"batch_seconds={batch_seconds} and max_seconds={max_seconds} must be positive")
        self.folder, self.progress = Path(folder), progress
        self.batch_seconds, self.max_seconds = batch_seconds, max_seconds
        self._checksums: dict[Path | StoredAudio, str] = {}
        # What was written or read here: to read all frames of a corpus takes long, and every head asks for them.
        self._whole: set[Path] = set()

    def fill(self, representation: Representation, clips: Sequence[Clip], keep: str) -> None:
        """Computes what is missing. ValueError names the clip that is no audio, too long, or has bad features."""
        width = representation.dim * (2 if keep == "pooled" else 1)
        layers = 1 if keep == "last" else representation.num_layers
        wanted = {self.path(representation, clip, keep): clip for clip in clips}
        missing = {
            path: clip
            for path, clip in wanted.items()
            if not (path in self._whole and path.is_file()) and not _is_whole(path, layers, width)
        }
        title = f"{representation.name}, {keep}"
        with tqdm(total=len(missing), desc=title, unit="clip", disable=not missing or not self.progress) as bar:
            for batch in self._batches(list(missing.items()), representation.batchable):
                waveforms = [_decoded(clip, representation.sampling_rate) for _, clip in batch]
                states = _states(representation, [clip for _, clip in batch], waveforms)
                for (path, _), state in zip(batch, states):
                    _write(path, _kept(state, keep))
                bar.update(len(batch))
        self._whole.update(wanted)

    def pooled(self, representation: Representation, clips: Sequence[Clip]) -> np.ndarray:
        """Means and standard deviations over time, float32 (layers, clips, 2 * dim), computed where need be.

        They lie in a file without a name, clip by clip, so that they may be more than memory holds (80 kB a clip of a
        base model with 12 layers).
        """
        self.fill(representation, clips, "pooled")
        with explained(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            for clip in clips:
                file.write(_read(self.path(representation, clip, "pooled")).tobytes())
            file.flush()
            shape = (len(clips), representation.num_layers, 2 * representation.dim)
            return np.memmap(file, np.float32, "r", shape=shape).transpose(1, 0, 2)

    def frames(
        self, representation: Representation, clip: Clip, keep: str = "frames", layer: int | None = None
    ) -> np.ndarray:
        """Frames of a clip that `fill` has seen: float32 (layers, frames, dim), of one layer (1, frames, dim)."""
        return _read(self.path(representation, clip, keep), layer)

    def num_frames(self, representation: Representation, clip: Clip, keep: str) -> int:
        """Frames of a clip that `fill` has seen, without reading them."""
        with safe_open(self.path(representation, clip, keep), "np") as file:
            return int(file.get_slice(_TENSOR).get_shape()[1])

    def path(self, representation: Representation, clip: Clip, keep: str) -> Path:
        """The file of a clip's features."""
        if keep not in KEEPS:
            raise ValueError(f"keep={keep!r} must be one of {', '.join(KEEPS)}")
        checksum = self.checksum(clip)
        kind = self.folder / f"v{FORMAT_VERSION}" / representation.fingerprint[:32] / keep
        return kind / checksum[:2] / f"{checksum}.safetensors"

    def checksum(self, clip: Clip) -> str:
        """SHA-256 of the encoded audio: what it decodes to follows from that. ValueError if it cannot be read."""
        if clip.source not in self._checksums:
            try:
                self._checksums[clip.source] = hashlib.sha256(clip.source.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"{clip.id}: {clip.source} cannot be read: {error.strerror}") from error
        return self._checksums[clip.source]

    def _batches(self, clips: list[tuple[Path, Clip]], batchable: bool) -> Iterator[list[tuple[Path, Clip]]]:
        """Longest first, so that memory runs out at once or never."""
        timed = [(_seconds(clip), path, clip) for path, clip in clips]
        for seconds, _, clip in timed:
            if seconds > self.max_seconds:
                raise ValueError(
                    f"{clip.id} is {seconds:.1f} s long, over max_seconds={self.max_seconds:g}: cut it, or raise the "
                    "limit (the memory needed grows with the square of the length)"
                )
        timed.sort(key=lambda item: (-item[0], item[2].id))
        batch: list[tuple[Path, Clip]] = []
        longest = 0.0
        for seconds, path, clip in timed:
            if batch and (not batchable or (len(batch) + 1) * longest > self.batch_seconds):
                yield batch
                batch = []
            longest = longest if batch else seconds
            batch.append((path, clip))
        if batch:
            yield batch


def _states(
    representation: Representation, clips: Sequence[Clip], waveforms: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Of a batch; where it fails, its clips are tried one by one, so that ValueError names the one that fails."""
    try:
        return representation(waveforms)
    except (ValueError, RuntimeError) as error:
        if len(clips) > 1:
            return [_states(representation, [one], [wave])[0] for one, wave in zip(clips, waveforms)]
        raise ValueError(f"{clips[0].id}: cannot be embedded by {representation.name}: {error}") from error


def _kept(states: np.ndarray, keep: str) -> np.ndarray:
    if keep == "pooled":
        return np.concatenate([states.mean(axis=1), states.std(axis=1)], axis=1)  # (layers, 2 * dim)
    frames = states[-1:] if keep == "last" else states
    return frames.astype(np.float16) if np.abs(frames).max() <= _HALF_LIMIT else frames


def _is_whole(path: Path, layers: int, width: int) -> bool:
    """Whether a file of features is there, as it was written, and of that many layers and channels."""
    try:
        with safe_open(path, "np") as file:
            features, known = file.get_tensor(_TENSOR), file.metadata() or {}
    except (OSError, SafetensorError):  # none there, cut off, or something else
        return False
    whole = known.get(_CHECKSUM) == _checksum(features)
    return whole and (features.shape[0], features.shape[-1]) == (layers, width)


def _checksum(features: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(features).data):08x}"


def _write(path: Path, features: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # of several hosts, too
    # Several entries would come in any order; the version is in the folder's name.
    content = save({_TENSOR: np.ascontiguousarray(features)}, metadata={_CHECKSUM: _checksum(features)})
    try:
        with explained(path):
            partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, layer: int | None = None) -> np.ndarray:
    with safe_open(path, "np") as file:
        if layer is None:
            features = file.get_tensor(_TENSOR)
        else:
            part = file.get_slice(_TENSOR)
            place = layer % part.get_shape()[0]
            features = part[place : place + 1]
    return torch.from_numpy(features).float().numpy()  # five times as fast as numpy's own


def _audio(clip: Clip) -> Any:
    """What soundfile opens, with a name for its errors."""
    if isinstance(clip.source, Path):
        return clip.source
    file = io.BytesIO(clip.source.read_bytes())
    file.name = clip.id
    return file


def _decoded(clip: Clip, sampling_rate: int) -> np.ndarray:
    try:
        return load_audio(_audio(clip), sampling_rate)
    except AudioError as error:
        raise ValueError(f"{clip.id}: {error}") from error


def _seconds(clip: Clip) -> float:
    try:
        return audio_duration(_audio(clip))
    except AudioError as error:
        raise ValueError(f"{clip.id}: {error}") from error
