# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Teachers: waveforms in, frames of features out, the same for every utterance whatever batch it is in.

`load_teacher` makes one from a Hugging Face audio encoder (hub_teacher.py), from any callable `module:factory`, or the
built-in `kaldi-mfcc`. Utterances longer than the teacher's window are cut into overlapping windows by one rule, stated
at `plan_windows`; the rule and the teacher's identity travel with the quantiser, because tokens must be
extracted exactly as the quantiser was trained.
"""

import importlib
import inspect
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spear_hf.mvq import mfcc
from spear_hf.mvq.alignment import FRAME_TOLERANCE
from spear_hf.mvq.extraction import Extraction
from spear_hf.mvq.known_teachers import KNOWN_TEACHERS


SAMPLING_RATE = 16000
KALDI_MFCC = "kaldi-mfcc"
WINDOW_SECONDS = 30.0  # the longest utterances of the method have 32 s; Whisper's window is 30 s
CONTEXT_SECONDS = 2.0
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

Waveform = np.ndarray | Tensor
WindowRule = Literal["pad", "slice"]


@dataclass(frozen=True)
class Window:
    """A stretch of one utterance: samples [start, stop) go in, its frames [first, last) are kept."""

    start: int
    stop: int
    first: int
    last: int | None  # None: to the end


def plan_windows(num_samples: int, window_frames: int, context_frames: int, hop: Fraction) -> list[Window]:
    """The windows of an utterance of `num_samples`, `hop` samples to a frame.

    Up to `window_frames` frames: one window. Longer: windows of `window_frames`, each starting
    `window_frames - 2 * context_frames` frames after the one before; the last one ends with the utterance. A frame is
    taken from the window in which it lies at least `context_frames` from either cut (the first and last window keep
    the utterance's own ends), so that no frame is computed next to a cut. What a teacher computes from a whole input,
    such as a normalisation of its level, it computes window by window.
    """
    length = math.floor(window_frames * hop)
    if num_samples <= length:
        return [Window(0, num_samples, 0, None)]
    # A window must start on a whole sample: with a fractional hop only every `denominator`-th frame does.
    step = (window_frames - 2 * context_frames) // hop.denominator * hop.denominator
    if step <= 0:
        raise ValueError(f"a window of {window_frames} frames has nothing between contexts of {context_frames}")
    windows = []
    start = first = 0
    while start + length < num_samples:
        windows.append(Window(start, start + length, first, step + context_frames))
        start += int(step * hop)
        first = context_frames
    return [*windows, Window(start, num_samples, first, None)]


class Teacher(ABC):
    """Base of all teachers; subclasses set the attributes below and write `features`.

    `frame_rate` in Hz, `feature_size` in channels, `min_samples` for a first frame; `layer` and `revision` are None
    where they mean nothing; `fingerprint` identifies the parameters wherever they are stored ("" where unknown).
    """

    def __init__(
        self,
        *,
        id: str,
        frame_rate: float,
        feature_size: int,
        layer: int | None = None,
        revision: str | None = None,
        fingerprint: str = "",
        window: WindowRule | None = None,
        window_seconds: float | None = None,
        min_samples: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        options: dict[str, Any] | None = None,
        batch_seconds: float = 120.0,
    ) -> None:
        self.id = id
        self.layer = layer
        self.revision = revision
        self.fingerprint = fingerprint
        self.frame_rate = float(frame_rate)
        self.feature_size = int(feature_size)
        self.sampling_rate = SAMPLING_RATE
        self.window = window
        self.window_seconds = WINDOW_SECONDS if window_seconds is None else float(window_seconds)
        if not self.window_seconds < math.inf:
            raise ValueError(f"window_seconds={window_seconds} must be a number of seconds")
        self.min_samples = min_samples
        self.device = indexed(device)
        self.dtype = dtype
        self.options = dict(options or {})
        self.batch_seconds = batch_seconds
        self._stream: torch.cuda.Stream | None = None
        self._hop = Fraction(SAMPLING_RATE) / Fraction(self.frame_rate).limit_denominator(1000)
        self._window_frames = int(self.window_seconds * self.frame_rate + 1e-6)
        # A short window cannot spare 2 s on either side.
        self._context_frames = int(min(CONTEXT_SECONDS, self.window_seconds / 8) * self.frame_rate + 1e-6)
        # What is left for an utterance's last window is longer than both contexts: that must be enough for a frame.
        if self._context_frames < 1 or 2 * self._context_frames * self._hop < min_samples:
            shortest = max(8 / self.frame_rate, 4 * min_samples / SAMPLING_RATE)
            raise ValueError(f"window_seconds={self.window_seconds} is too short for {id}: at least {shortest:.2f} s")

    def __call__(self, waveforms: Sequence[Waveform], ids: Sequence[str] | None = None) -> list[Tensor]:
        """1-D waveforms at 16 kHz in [-1, 1] -> float32 (frames, feature_size) each, on the teacher's device.

        `ids` name the utterances in errors. ValueError for what is empty, too short for one frame, or not finite.
        """
        return self.extract(waveforms, ids=ids)

    def extract(
        self,
        waveforms: Sequence[Waveform],
        ids: Sequence[str] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """As calling the teacher, with `transform` (frames, feature_size) -> (frames, ...) applied batch by batch.

        With a transform, the features of hours of audio are never held at once, only what it makes of them.
        """
        return self.prepare(waveforms, ids).result(transform)

    def prepare(self, waveforms: Sequence[Waveform], ids: Sequence[str] | None = None) -> Extraction:
        """The beginning of `extract`: what the device needs is there, or on its way."""
        names = [str(name) for name in ids] if ids is not None else [f"utterance {i}" for i in range(len(waveforms))]
        if len(names) != len(waveforms):
            raise ValueError(f"{len(names)} ids for {len(waveforms)} waveforms")
        arrays = [self.check(waveform, name) for waveform, name in zip(waveforms, names)]
        plans = [plan_windows(len(array), self._window_frames, self._context_frames, self._hop) for array in arrays]
        return Extraction(self, arrays, names, plans)

    def provenance(self) -> dict[str, Any]:
        """What must be the same wherever this teacher's features are quantised, as JSON values."""
        return {
            "id": self.id,
            "layer": self.layer,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "frame_rate": self.frame_rate,
            "feature_size": self.feature_size,
            "window": self.window,
            "window_seconds": self.window_seconds,
            "context_seconds": self._context_frames / self.frame_rate,
            "dtype": str(self.dtype).removeprefix("torch."),
            "options": self.options,
        }

    def inputs(self, waveforms: list[np.ndarray]) -> Any:
        """What `features` takes of waveforms no longer than a window; made in a thread while the device computes."""
        return waveforms

    @abstractmethod
    def features(self, inputs: Any) -> list[Tensor]:
        """Features (frames, feature_size) of the waveforms that `inputs` was given, each independent of the others.

        Does not wait for the device, where that can be helped.
        """

    def stream_beside(self) -> torch.cuda.Stream:
        """Of its device, for what is done with features while the next ones are computed: it goes first."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device, priority=-1)
        return self._stream

    def batches(self, jobs: list[tuple[int, int, Window]]) -> list[list[tuple[int, int, Window]]]:
        """Runs of the sorted jobs whose padded audio is within `batch_seconds`."""
        batches: list[list[tuple[int, int, Window]]] = []
        limit = self.batch_seconds * SAMPLING_RATE
        longest = 0
        for job in jobs:
            if not batches or (len(batches[-1]) + 1) * longest > limit:
                batches.append([])
                longest = job[2].stop - job[2].start  # jobs descend in length
            batches[-1].append(job)
        return batches

    def check(self, waveform: Waveform, name: str) -> np.ndarray:
        """The waveform as float32 (samples,); ValueError, with the utterance's name, if it cannot be used."""
        array = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
        if array.ndim != 1:
            raise ValueError(f"{name}: a mono waveform (samples,) is wanted, not shape {array.shape}")
        if array.dtype.kind != "f":
            raise ValueError(f"{name}: samples are {array.dtype}; give floats in [-1, 1] (16-bit integers / 32768)")
        if len(array) < self.min_samples:
            raise ValueError(
                f"{name}: {len(array)} samples are too short for one frame of {self.id}, which needs "
                f"{self.min_samples} ({1000 * self.min_samples / SAMPLING_RATE:g} ms)"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} samples are NaN or infinite")
        return np.ascontiguousarray(array, dtype=np.float32)

    def check_shape(self, output: Tensor, num_samples: int, name: str) -> None:
        """Refuses features that are not (about num_samples / hop, feature_size)."""
        if output.ndim != 2 or output.shape[1] != self.feature_size:
            raise ValueError(
                f"{name}: {self.id} gave features {tuple(output.shape)}, not (frames, {self.feature_size})"
            )
        expected = num_samples / SAMPLING_RATE * self.frame_rate
        if len(output) == 0 or abs(len(output) - expected) > FRAME_TOLERANCE:
            raise ValueError(
                f"{name}: {self.id} gave {len(output)} frames for {num_samples} samples; at {self.frame_rate} Hz "
                f"about {expected:.1f} are due"
            )


class KaldiMfccTeacher(Teacher):
    """`kaldi-mfcc`: 39-dimensional MFCC with deltas at 50 Hz; needs no files."""

    def __init__(self, device: str | torch.device = "cpu", **settings: Any) -> None:
        super().__init__(
            id=KALDI_MFCC,
            frame_rate=mfcc.FRAME_RATE,
            feature_size=mfcc.FEATURE_SIZE,
            min_samples=mfcc.FRAME_LENGTH,
            device=device,
            **settings,
        )
        self.model = mfcc.KaldiMfcc().to(self.device)

    def features(self, inputs: list[np.ndarray]) -> list[Tensor]:
        lengths = torch.tensor([len(waveform) for waveform in inputs], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in inputs], batch_first=True)
        features, num_frames = self.model(padded.to(self.device), lengths)
        return [row[:count] for row, count in zip(features, num_frames.tolist())]


class CallableTeacher(Teacher):
    """Anything with `frame_rate`, `feature_size` and `__call__(list of (samples,) float32) -> list of (frames, dim)`.

    Optional attributes it may have: `revision` and `fingerprint` (str), `window_seconds` (longest input it takes),
    `min_samples`. It must compute each waveform's features independently of the batch; that is tried on two noises.
    """

    def __init__(self, id: str, function: Any, **settings: Any) -> None:
        for attribute, kinds in (("frame_rate", (int, float)), ("feature_size", (int,))):
            value = getattr(function, attribute, None)
            if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{id}: the teacher's `{attribute}` must be a positive number, not {value!r}")
        if not callable(function):
            raise ValueError(f"{id}: {type(function).__name__} is not callable; define __call__(waveforms)")
        rate = int(getattr(function, "sampling_rate", SAMPLING_RATE))
        if rate != SAMPLING_RATE:
            raise ValueError(f"{id}: takes {rate} Hz; waveforms come at {SAMPLING_RATE} Hz, resample them inside")
        if settings.get("window_seconds") is None:
            settings["window_seconds"] = getattr(function, "window_seconds", None)
        super().__init__(
            id=id,
            frame_rate=function.frame_rate,
            feature_size=function.feature_size,
            revision=getattr(function, "revision", None),
            fingerprint=str(getattr(function, "fingerprint", "")),
            min_samples=int(getattr(function, "min_samples", math.ceil(SAMPLING_RATE / function.frame_rate))),
            **settings,
        )
        self.function = function
        self._probe()

    def features(self, inputs: list[np.ndarray]) -> list[Tensor]:
        outputs = self.function(inputs)
        if not isinstance(outputs, (list, tuple)) or len(outputs) != len(inputs):
            got = f"{len(outputs)} items" if isinstance(outputs, (list, tuple)) else type(outputs).__name__
            raise ValueError(f"{self.id}: must return a list of {len(inputs)} feature arrays, gave {got}")
        return [torch.as_tensor(output).to(self.device) for output in outputs]

    def _probe(self) -> None:
        """Noises of 1 s and 2.3 s, alone and together: shapes, rate, and features that do not depend on the batch."""
        generator = np.random.default_rng(0)
        noises = [
            (0.1 * generator.standard_normal(int(seconds * SAMPLING_RATE))).astype(np.float32) for seconds in (1, 2.3)
        ]
        alone = [self([noise], ids=["probe noise"])[0] for noise in noises]
        together = self(noises, ids=["probe noise", "probe noise"])
        for one, other in zip(alone, together):
            # bf16 may round differently in another batch; padding that leaks in shows far above 2 % of the level.
            if one.shape != other.shape or (one - other).square().mean().sqrt() > 0.02 * one.square().mean().sqrt():
                raise ValueError(
                    f"{self.id}: an utterance's features change with the other utterances of the batch; mask the "
                    "padding or compute waveforms one at a time in the adapter"
                )


def load_teacher(
    spec: str,
    layer: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    window: WindowRule | None = None,
    window_seconds: float | None = None,
    options: dict[str, Any] | None = None,
) -> Teacher:
    """A teacher by name.

    `spec`: `kaldi-mfcc`; `module:factory`; or a Hub id or folder of a Hugging Face audio encoder, or the Hub id of a
    known teacher (known_teachers.py) that is loaded by a factory of ours.
    `layer`: index into `hidden_states` (0 = what enters the first layer, k = output of layer k, negative from the
    end); None is `last_hidden_state`.
    `window` ("pad" by default, or "slice"): how a teacher with a fixed window is fed, see hub_teacher.py.
    `window_seconds`: longer utterances are cut as `plan_windows` says; 30 s by default.
    `options`: keyword arguments of the factory, JSON values; it gets `layer`, `device`, `dtype` too if it names them.
    `dtype` of the computation, float32 by default; features are always returned in float32.
    """
    precision = _as_dtype(dtype)
    known = KNOWN_TEACHERS.get(spec)
    if known is not None and known.factory is not None:
        options = {"model": spec, **({"revision": revision} if revision else {}), **(options or {})}
        spec, revision = known.factory, None
    if spec == KALDI_MFCC:
        _refuse(spec, layer=layer, revision=revision, window=window, options=options)
        return KaldiMfccTeacher(device=device, window_seconds=window_seconds)
    if is_factory(spec):
        _refuse(spec, revision=revision, window=window)
        function = _build(spec, layer, device, precision, options or {})
        return CallableTeacher(
            spec, function, layer=layer, device=device, dtype=precision, window_seconds=window_seconds, options=options
        )
    _refuse(spec, options=options)
    from spear_hf.mvq.hub_teacher import HubTeacher

    return HubTeacher(
        spec,
        layer=layer,
        device=device,
        dtype=precision,
        revision=revision,
        window=window,
        window_seconds=window_seconds,
    )


def indexed(device: str | torch.device) -> torch.device:
    """With the number of a CUDA device: the current one is a thread's own."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_factory(spec: str) -> bool:
    """Whether a teacher's name reads `module:factory`."""
    return _FACTORY.fullmatch(spec) is not None and not Path(spec).exists()


def _refuse(spec: str, **settings: Any) -> None:
    for name, value in settings.items():
        if value is not None and value != {}:
            raise ValueError(f"{spec} takes no `{name}` (given: {value!r})")


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return known[dtype or "float32"]


def _build(
    spec: str, layer: int | None, device: str | torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    """Imports `module:factory` (the working folder counts as a place of modules) and calls it."""
    module_name, _, path = spec.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        factory: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            factory = getattr(factory, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"teacher {spec!r} cannot be imported: {error}; it is module:factory, the module installed or in {folder}"
        ) from error
    signature = inspect.signature(factory)
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = dict(options)
    for name, value in (("layer", layer), ("device", device), ("dtype", dtype)):
        if takes_any or name in parameters:
            arguments.setdefault(name, value)
    if layer is not None and "layer" not in arguments:
        raise ValueError(f"teacher {spec!r}: its factory takes no `layer` (given: {layer})")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"teacher {spec!r}: {error} (teacher options are its arguments: {signature})") from error
    return factory(**arguments)
