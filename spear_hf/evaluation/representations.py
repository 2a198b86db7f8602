# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Representations of audio under one interface: waveforms in, hidden states by layer and frame out.

load_representation("runs/base/final")      any audio encoder of transformers, by folder or Hub id
load_representation("random:runs/base/final")  its architecture with random weights
load_representation("log-mel")              SPEAR's filter bank, 128 bins at 100 Hz
load_representation("mfcc")                 13 MFCC with deltas and their deltas at 50 Hz
load_representation("teacher:ID#layer=4")   what `spear_hf.mvq.teachers.load_teacher` takes: one layer
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, SequenceFeatureExtractor
from transformers.utils import logging

from ..configuration_spear import SpearConfig
from ..data.audio import SAMPLING_RATE
from ..data.segments import FrameGrid
from ..devices import pick_device
from ..feature_extraction_spear import SpearFeatureExtractor
from ..loading_errors import loading
from ..modeling_spear import SpearModel, SpearPreTrainedModel
from ..mvq.mfcc import FEATURE_SIZE as MFCC_SIZE
from ..mvq.mfcc import FRAME_LENGTH, FRAME_RATE, KaldiMfcc
from ..mvq.teachers import Teacher, is_factory, load_teacher
from ..processing_spear import feature_extractor_of
from .embedding import embed_waveforms, load_encoder
from .options import split_options
from .segments import FILTER_BANK_CENTRE, FILTER_BANK_STEP


logger = logging.get_logger(__name__)

LOG_MEL, MFCC, RANDOM, TEACHER = "log-mel", "mfcc", "random", "teacher:"
TEACHER_OPTIONS = ("layer", "window", "window_seconds")
_MORE_SECONDS = 8  # by which the rate of frames is measured
SHORT_SECONDS = 0.1  # shorter clips are extended by silence to this


class Representation(ABC):
    """Frozen features, frame t at `first_centre + t * frame_seconds` seconds.

    `fingerprint` is a hash of all that they depend on but the audio.
    """

    name: str
    fingerprint: str
    weights: str | None = None
    """Hash of an encoder's parameters and configuration; the fingerprint covers the precision too."""
    num_layers: int
    """Hidden states, what enters the first layer included."""
    dim: int
    sampling_rate: int = SAMPLING_RATE
    """Of the waveforms."""
    frame_seconds: float
    first_centre: float = 0.0
    batchable = False
    """Whether clips of unlike lengths may share a batch."""
    timed = True
    """Whether frames follow each other in time; not of encoders that make one length of all audio, patches say."""

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Waveforms (samples,) at `sampling_rate` -> float32 (layers, frames, dim) of each, whatever the others.

        Clips under 100 ms are extended by zeros. ValueError if features are not finite.
        """
        shortest = round(SHORT_SECONDS * self.sampling_rate)
        padded = [np.pad(waveform, (0, max(0, shortest - len(waveform)))) for waveform in waveforms]
        with torch.inference_mode():
            states = self._states(padded)
        for state in states:
            if not np.isfinite(state).all():
                raise ValueError(f"features of {self.name} are NaN or infinite")
        return states

    @abstractmethod
    def _states(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """As calling it."""

    def check_timed(self, task: str) -> None:
        """ValueError if its frames are of no use to a task of frames."""
        if not self.timed:
            raise ValueError(
                f"{self.name} gives as many frames of one second as of nine, so that they have no times: it cannot be "
                f"used for {task}, whose kind is one of frames; leave it out there, or try {TEACHER}MODULE:FACTORY"
            )

    def centres(self, frames: int) -> np.ndarray:
        """Seconds (frames,) of the middle of the frames."""
        return self.first_centre + self.frame_seconds * np.arange(frames)


class LogMel(Representation):
    """The input of SPEAR."""

    name = LOG_MEL
    num_layers = 1
    frame_seconds, first_centre = FILTER_BANK_STEP, FILTER_BANK_CENTRE
    batchable = True

    def __init__(self) -> None:
        self.extractor = SpearFeatureExtractor(pad_short=True)
        self.dim = self.extractor.feature_size
        self.fingerprint = _digest(f"log-mel 1 {self.extractor.to_json_string()}")

    def _states(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        features = self.extractor(waveforms, sampling_rate=SAMPLING_RATE, padding=False)["input_features"]
        return [np.asarray(rows)[None] for rows in features]


class Mfcc(Representation):
    """The targets of HuBERT's first iteration."""

    name = MFCC
    num_layers, dim = 1, MFCC_SIZE
    frame_seconds, first_centre = 1 / FRAME_RATE, FRAME_LENGTH / 2 / SAMPLING_RATE
    fingerprint = hashlib.sha256(b"kaldi mfcc with deltas 1").hexdigest()
    batchable = True

    def __init__(self) -> None:
        self.module = KaldiMfcc()

    def _states(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return [self.module(torch.from_numpy(waveform)[None])[0].numpy() for waveform in waveforms]


class EncoderStates(Representation):
    """All hidden states of an audio encoder of transformers; SPEAR's are at 50 Hz, what enters layer 1 first."""

    def __init__(self, name: str, model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor) -> None:
        encoder: Any = model.base_model
        self.name = name
        self.encoder, self.extractor = encoder.eval(), feature_extractor
        self.batchable = isinstance(encoder, SpearPreTrainedModel)
        if isinstance(feature_extractor, SpearFeatureExtractor):
            feature_extractor.pad_short = True
        self.weights = weights_fingerprint(encoder)
        self.fingerprint = _digest(f"{self.weights} {encoder.dtype} {feature_extractor.to_json_string()}")
        self.sampling_rate = feature_extractor.sampling_rate
        try:
            # Of a second and of nine, as convolutions cost the same frames at the ends of either, and rates are no
            # whole numbers.
            (short,), rate = embed_waveforms(
                [_noise(1, self.sampling_rate)], encoder, feature_extractor, "all", "none"
            )
            (long,), _ = embed_waveforms(
                [_noise(1 + _MORE_SECONDS, self.sampling_rate)], encoder, feature_extractor, "all", "none"
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} ({type(encoder).__name__}) cannot be run as an audio encoder: {error}; try {TEACHER}{name}"
            ) from error
        self.num_layers, frames, self.dim = short.shape
        self.timed = long.shape[1] > frames
        if not self.timed:
            logger.warning(
                f"{name} makes one length of all audio: what is longer may be cut off, see its documentation."
            )
        if self.batchable:
            grid = FrameGrid()
            self.frame_seconds, self.first_centre = grid.seconds, float(grid.centres(1)[0])
        else:
            self.frame_seconds = 1 / rate if rate else _MORE_SECONDS / max(1, long.shape[1] - frames)
            self.first_centre = _first_centre(encoder.config, self.frame_seconds, self.sampling_rate)

    def _states(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return embed_waveforms(waveforms, self.encoder, self.extractor, "all", "none")[0]


class TeacherFeatures(Representation):
    """One layer of a teacher of the tokenisers.

    Its own fingerprint covers its parameters. Where it has none, what it makes of noise stands for them.
    """

    num_layers = 1
    batchable = True

    def __init__(self, name: str, teacher: Teacher) -> None:
        self.name, self.teacher = name, teacher
        self.dim = teacher.feature_size
        self.frame_seconds = 1 / teacher.frame_rate
        self.first_centre = self.frame_seconds / 2
        extractor = getattr(teacher, "extractor", None)
        facts = [json.dumps(teacher.provenance(), sort_keys=True), extractor.to_json_string() if extractor else ""]
        if not teacher.fingerprint:
            (features,) = self([_noise(2, SAMPLING_RATE)])
            facts.append(hashlib.sha256(features.tobytes()).hexdigest())
        self.fingerprint = _digest(" ".join(facts))

    def _states(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        shortest = self.teacher.min_samples
        padded = [np.pad(waveform, (0, max(0, shortest - len(waveform)))) for waveform in waveforms]
        return [features.cpu().numpy()[None] for features in self.teacher(padded)]


def load_representation(
    spec: str, device: str = "auto", dtype: str = "float32", seed: int = 0, name: str | None = None
) -> Representation:
    """The representation that `spec` names, see the module. `seed` is of random weights.

    Raises:
        ValueError: an unknown option, or a model that cannot be run as an audio encoder.
        OSError: there is no such model.
    """
    if spec == LOG_MEL:
        return LogMel()
    if spec == MFCC:
        return Mfcc()
    if spec.startswith(TEACHER):
        source, options = _teacher_options(spec)
        return TeacherFeatures(name or spec, load_teacher(source, device=pick_device(device), dtype=dtype, **options))
    if spec.startswith(f"{RANDOM}:"):
        model, extractor = _random_encoder(spec.removeprefix(f"{RANDOM}:"), device, dtype, seed)
        return EncoderStates(name or spec, model, extractor)
    return EncoderStates(name or spec, *load_encoder(spec, device, dtype))


def _teacher_options(spec: str) -> tuple[str, dict[str, Any]]:
    """Source and arguments of `load_teacher`."""
    text = spec.removeprefix(TEACHER)
    source, options = split_options(text, None if is_factory(text.partition("#")[0]) else TEACHER_OPTIONS)
    arguments: dict[str, Any] = {}
    for key, kind in (("layer", int), ("window", str), ("window_seconds", float)):
        if key in options:
            try:
                arguments[key] = kind(options.pop(key))
            except ValueError as error:
                raise ValueError(f"{spec}: {key} must be a number: {error}") from None
    # What is left is for a factory, as --teacher-option gives it.
    return source, arguments | {"options": {name: yaml.safe_load(value) for name, value in options.items()}}


def check_model(spec: str) -> None:
    """OSError naming the model of a specification if it is not there; teachers are not looked for.

    ValueError for the options of a teacher.
    """
    source = spec.removeprefix(f"{RANDOM}:")
    if source.startswith(TEACHER):
        _teacher_options(source)
        return
    if source in (LOG_MEL, MFCC) or Path(source).is_file():
        return
    with loading(source):
        AutoConfig.from_pretrained(source)


def _random_encoder(
    source: str, device: str, dtype: str, seed: int
) -> tuple[PreTrainedModel, SequenceFeatureExtractor]:
    """A model of the configuration of a folder or Hub id, or of values of SpearConfig in a .json file."""
    from transformers import AutoFeatureExtractor

    extractor: Any
    if Path(source).suffix == ".json":
        config: Any = SpearConfig(**json.loads(Path(source).read_text(encoding="utf-8")))
        extractor = SpearFeatureExtractor(feature_size=config.num_mel_bins)
    else:
        config = AutoConfig.from_pretrained(source)
        if config.model_type == "spear":
            extractor = feature_extractor_of(source, config)
        else:
            extractor = AutoFeatureExtractor.from_pretrained(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SpearModel(config) if config.model_type == "spear" else AutoModel.from_config(config)
    module: Any = model
    return module.to(pick_device(device), getattr(torch, dtype)).eval(), extractor


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the parameters, the buffers and the configuration, whatever the precision they are held in."""
    digest = hashlib.sha256(f"{type(model).__name__} {_settings(model)}".encode())
    for name, value in sorted(model.state_dict().items()):
        array = value.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _settings(model: nn.Module) -> str:
    """The configuration without what tells where it came from and what wrote it."""
    config = getattr(model, "config", None)
    values = {} if config is None else config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "auto_map"):
        values.pop(key, None)
    return json.dumps(values, sort_keys=True, default=str)


def _noise(seconds: int, sampling_rate: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(seconds * sampling_rate).astype(np.float32)


def _first_centre(config: Any, frame_seconds: float, sampling_rate: int) -> float:
    """Half of the receptive field of the convolutions, where the configuration has them; else half a frame."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not isinstance(kernels, (list, tuple)) or not isinstance(strides, (list, tuple)):
        return frame_seconds / 2
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        samples = (samples - 1) * stride + kernel
    return samples / 2 / sampling_rate


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def short_name(spec: str | os.PathLike) -> str:
    """A name for tables: the last two parts of a path."""
    text = os.fspath(spec)
    kind = next((prefix for prefix in (TEACHER, f"{RANDOM}:") if text.startswith(prefix)), "")
    rest = text.removeprefix(kind)
    path, mark, options = rest.partition("#")
    return kind + "/".join(Path(path).parts[-2:]) + mark + options
