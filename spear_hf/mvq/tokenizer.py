# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio to tokens: a teacher and the quantiser trained on its features, in one object."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from spear_hf.mvq.extraction import Extraction
from spear_hf.mvq.quantizer import PASSES, MultiCodebookQuantizer, QuantizerConfig
from spear_hf.mvq.store import StoreInfo
from spear_hf.mvq.teacher_probe import check_probe
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher, Waveform, is_factory, load_teacher


# What is needed of a teacher's record in a quantiser's provenance, and its types.
_RECORDED: dict[str, type | tuple[type, ...]] = {
    "window": str,
    "window_seconds": (int, float),
    "dtype": str,
    "options": dict,
    "fingerprint": str,
}


class MvqTokenizer:
    """`tokenizer(audio)` -> codes (frames, num_codebooks); `tokenizer.decode(codes)` -> the teacher's features, about.

        tokenizer = MvqTokenizer.from_pretrained("my_tokenizer")
        codes = tokenizer(waveform)                       # uint8 (frames, num_codebooks)
        batch = tokenizer([waveform, another])            # a list of them, whatever the lengths
        features = tokenizer.decode(codes)                # float32 (frames, feature_size)
        tokenizer.preview("speech.flac", "speech.png")    # the spectrogram with the tokens under it

    Frame t covers [t, t + 1) / `frame_rate` seconds, about: a teacher's frames see more than that, and its first frame
    may be centred on the start. Codebooks are independent of each other, no coarse-to-fine order: the decoded frame is
    the sum of one centre of each. An utterance's codes do not depend on its batch, but for rounding in the teacher.

    Codes decode to the teacher's features and no further: there is no vocoder, so tokens cannot be listened to.

    On the command line: `spear-hf quantize` trains one, `spear-hf tokenize` runs it over a corpus, and
    `spear-hf tokenize --preview FILE` draws.
    """

    def __init__(self, teacher: Teacher, quantizer: MultiCodebookQuantizer, refine_iters: int = PASSES) -> None:
        if refine_iters < 0:
            raise ValueError(f"refine_iters must be at least 0, not {refine_iters}")
        _check_pair(teacher, quantizer.config)
        check_probe(teacher, quantizer)
        self.teacher = teacher
        self.quantizer = quantizer.to(teacher.device).eval()
        self.refine_iters = refine_iters

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        teacher: str | Teacher | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        refine_iters: int = PASSES,
    ) -> "MvqTokenizer":
        """A tokenizer from a quantiser's folder or Hub id; the teacher is loaded as its config says.

        `teacher`: another place of the same teacher (its folder has moved, or a copy is at hand; of a factory's, the
        file or model that it loads), or one loaded.
        A relative folder in the config is looked for from the working folder, then from that of the quantiser.
        `dtype`: of the teacher's computation; by default what the quantiser was trained on.
        ValueError if the teacher is not the one the quantiser was trained on.
        """
        quantizer = MultiCodebookQuantizer.from_pretrained(name_or_path, revision=revision)
        if not isinstance(teacher, Teacher):
            teacher = _load_recorded(quantizer.config, str(name_or_path), teacher, device, dtype)
        return cls(teacher, quantizer, refine_iters=refine_iters)

    @overload
    def __call__(
        self, audio: Waveform, sampling_rate: int = SAMPLING_RATE, ids: Sequence[str] | None = None
    ) -> np.ndarray: ...

    @overload
    def __call__(
        self, audio: Sequence[Waveform], sampling_rate: int = SAMPLING_RATE, ids: Sequence[str] | None = None
    ) -> list[np.ndarray]: ...

    def __call__(
        self,
        audio: Waveform | Sequence[Waveform],
        sampling_rate: int = SAMPLING_RATE,
        ids: Sequence[str] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """A mono waveform in [-1, 1] -> uint8 (frames, num_codebooks); a list of them -> a list.

        `ids` name the utterances in errors. ValueError for another sampling rate, and for audio that is too short
        for a frame, empty or not finite.
        """
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(
                f"sampling_rate={sampling_rate}: the tokenizer takes {SAMPLING_RATE} Hz; resample the audio first, as "
                "spear_hf.data.audio.load_audio does"
            )
        single = isinstance(audio, (np.ndarray, Tensor))
        arrays = self.codes(self.teacher.prepare([audio] if single else list(audio), ids))  # type: ignore[list-item]
        return arrays[0] if single else arrays

    def codes(self, extraction: Extraction) -> list[np.ndarray]:
        """Of what `teacher.prepare(waveforms, ids)` gave: as calling the tokenizer with them."""
        return [rows.numpy() for rows in extraction.result(self._encode)]

    def decode(self, codes: np.ndarray | Tensor) -> Tensor:
        """Codes (frames, num_codebooks) -> the features they stand for, float32 (frames, feature_size)."""
        return self.quantizer.decode(torch.as_tensor(codes))

    def preview(
        self,
        audio: str | os.PathLike,
        output: str | os.PathLike,
        start: float = 0.0,
        seconds: float = 10.0,
        marks: Sequence[tuple[float, str]] = (),
        write_audio: bool = False,
    ) -> list[Path]:
        """Draws the tokens of an audio file under its spectrogram, to a PNG; see preview.py."""
        from spear_hf.mvq.preview import write_preview

        return write_preview(self, audio, output, start, seconds, marks, write_audio)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the quantiser; the teacher stays where it is."""
        self.quantizer.save_pretrained(save_directory)

    @property
    def frame_rate(self) -> float:
        """Token frames a second."""
        return self.teacher.frame_rate

    @property
    def num_codebooks(self) -> int:
        """Codes of a frame."""
        return self.quantizer.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Values that a code may have."""
        return self.quantizer.config.codebook_size

    def store_info(self) -> StoreInfo:
        """What a token store says of this tokenizer's tokens."""
        return StoreInfo(
            num_codebooks=self.num_codebooks,
            codebook_size=self.codebook_size,
            frame_rate=self.frame_rate,
            teacher=self.teacher.id,
            layer=self.teacher.layer,
            quantizer_id=self.quantizer.quantizer_id,
            extraction={"refine_iters": self.refine_iters, "teacher": self.teacher.provenance()},
        )

    def _encode(self, features: Tensor) -> Tensor:
        return self.quantizer.encode(features, refine_iters=self.refine_iters).cpu()


def quantizer_metadata(teacher: Teacher) -> dict[str, Any]:
    """Fields of QuantizerConfig which a quantiser of this teacher's features needs to become a tokenizer."""
    return {
        "teacher": teacher.id,
        "teacher_layer": teacher.layer,
        "teacher_revision": teacher.revision,
        "frame_rate": teacher.frame_rate,
        "provenance": {"teacher": teacher.provenance()},
    }


def _load_recorded(
    config: QuantizerConfig,
    source: str,
    teacher: str | None,
    device: str | torch.device,
    dtype: torch.dtype | str | None,
) -> Teacher:
    """The teacher that the config names, or the one of the name given, with the settings of the config."""
    recorded = _recorded(config)
    options: dict[str, Any] | None = recorded.get("options")
    spec = teacher or config.teacher
    if teacher is not None and config.teacher is not None and is_factory(config.teacher) and not is_factory(teacher):
        # The new place of what a factory loads: it is an option there.
        place = next((name for name in ("file", "model") if name in (options or {})), None)
        if place is not None:
            spec, options = config.teacher, {**(options or {}), place: teacher}
    if spec is None:
        raise ValueError(f"{source}: its config names no teacher; say which: teacher=...")
    beside = Path(source) / spec
    if teacher is None and not Path(spec).exists() and beside.is_dir():
        spec = str(beside)
    on_hub = spec == config.teacher and not Path(spec).exists() and not is_factory(spec)
    try:
        return load_teacher(
            spec,
            layer=config.teacher_layer,
            device=device,
            dtype=dtype or recorded.get("dtype"),
            revision=config.teacher_revision if on_hub else None,
            window=recorded.get("window"),
            window_seconds=recorded.get("window_seconds"),
            options=options,
        )
    except ValueError as error:
        if teacher is not None:
            raise
        raise ValueError(f"{source}: {error} (a teacher that has moved can be given: teacher=...)") from error


def _recorded(config: QuantizerConfig) -> dict[str, Any]:
    """The teacher's settings in the config. ValueError where they are of no use, as after an edit by hand."""
    recorded = config.provenance.get("teacher", {})
    if not isinstance(recorded, dict):
        raise ValueError(f"the quantiser's config.json: provenance.teacher must be an object, not {recorded!r}")
    for name, kinds in _RECORDED.items():
        if (value := recorded.get(name)) is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"the quantiser's config.json: provenance.teacher.{name} cannot be {value!r}; restore it")
    return recorded


def _check_pair(teacher: Teacher, config: QuantizerConfig) -> None:
    recorded = _recorded(config)
    for name, is_, was in (
        ("feature_size", teacher.feature_size, config.feature_size),
        ("frame_rate", teacher.frame_rate, config.frame_rate),
        ("layer", teacher.layer, config.teacher_layer),
        ("window", teacher.window, recorded.get("window", teacher.window)),
        ("window_seconds", teacher.window_seconds, recorded.get("window_seconds", teacher.window_seconds)),
        ("fingerprint of the parameters", teacher.fingerprint, recorded.get("fingerprint") or teacher.fingerprint),
    ):
        if is_ != was:
            raise ValueError(
                f"the quantiser was trained on features of {config.teacher} with {name} {was!r}, but teacher "
                f"{teacher.id} has {is_!r}; give the teacher it was trained on"
            )
