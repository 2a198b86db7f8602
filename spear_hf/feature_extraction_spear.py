# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The filter bank in front of SPEAR: a waveform at 16 kHz becomes 128 log-mel values every 10 ms.

The features are those of Kaldi, as torchaudio.compliance.kaldi.fbank computes them with sample_frequency=16000,
num_mel_bins=128, low_freq=20, high_freq=-400, dither=0 and snip_edges=False, for a whole batch at a time and without
torchaudio. This file is copied to the Hub as remote code: it needs torch, numpy and transformers alone.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging


logger = logging.get_logger(__name__)

# The model's convolutional stem turns m frames into (m - 7) // 2: the shortest input has 9.
_MIN_FRAMES = 9
# Integer samples are scaled to [-1, 1); the published models were trained on floats in that range.
_INTEGER_SCALES = {torch.int16: 2.0**-15, torch.int32: 2.0**-31}
# A 2-D array with at most this many columns is (samples, channels).
_MAX_CHANNELS = 8
# Above this peak a floating-point waveform was surely meant as 16-bit integers.
_SUSPICIOUS_PEAK = 100.0
# Frames computed at once: on the CPU what stays in the caches, elsewhere what keeps the temporaries under 1 GB.
_SLAB_FRAMES_CPU = 1024
_SLAB_FRAMES_ACCELERATOR = 65536
# A process that was forked from this one has another.
_PROCESS = os.getpid()
# The matrix product is given a multiple of this many rows: the kernels for odd sizes round differently, and an
# utterance's features would depend on its batch in the last bit.
_ROW_MULTIPLE = 64


@contextmanager
def one_thread_where_forked() -> Iterator[None]:
    """OpenMP's threads do not survive a fork: in `datasets.Dataset.map(num_proc=2)`, say, one would wait for ever."""
    threads = torch.get_num_threads()
    if os.getpid() == _PROCESS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=16)
def _tables(
    num_mel_bins: int,
    sampling_rate: int,
    win_length: int,
    n_fft: int,
    min_frequency: float,
    max_frequency: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Povey window (win_length,) and mel weights (n_fft // 2 + 1, num_mel_bins).

    Computed in float32 and in torchaudio's order on purpose. Tables computed in float64 are closer to the formula, but
    differ from torchaudio's in the last bits, which moves the bins near the floor of loud frames: by 1.8e-4 on the
    golden utterances, 3.3e-4 on white noise and 2.4e-2 on a full-scale chirp, where these stay within 1e-6.
    """
    exact: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    window = torch.hann_window(win_length, periodic=False, **exact).pow(0.85)
    low, high = (1127.0 * math.log(1.0 + frequency / 700.0) for frequency in (min_frequency, max_frequency))
    step = (high - low) / (num_mel_bins + 1)
    index = torch.arange(num_mel_bins, **exact).unsqueeze(1)
    left, centre, right = low + index * step, low + (index + 1.0) * step, low + (index + 2.0) * step
    frequencies = (sampling_rate / n_fft) * torch.arange(n_fft // 2, **exact)
    mel = (1127.0 * (1.0 + frequencies / 700.0).log()).unsqueeze(0)
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_(min=0.0)
    weights = torch.nn.functional.pad(
        triangles, (0, 1)
    ).T.contiguous()  # the bin at the Nyquist frequency has weight 0
    return window.to(device), weights.to(device)


class SpearFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel filter bank of SPEAR, batched, on the CPU or on an accelerator.

    Args:
        feature_size: number of mel bins.
        sampling_rate: the only rate accepted, in Hz.
        padding_value: value of padded frames, log(1e-10) as in SPEAR's training (the silence floor is log(mel_floor)).
        hop_length: samples from one frame to the next.
        win_length: samples in a frame.
        n_fft: samples in the Fourier transform, frames being padded with zeros.
        preemphasis: y[j] = x[j] - preemphasis * x[max(j - 1, 0)], within a frame.
        min_frequency: lower edge of the first mel triangle, in Hz.
        max_frequency: upper edge of the last one, in Hz.
        mel_floor: smallest mel energy, float32's epsilon as in Kaldi.
        pad_short: pad an utterance shorter than `min_num_samples` (85 ms) with zeros instead of refusing it.

    The published models all use the defaults.
    """

    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012 (a list is what transformers expects)

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        padding_value: float = math.log(1e-10),
        hop_length: int = 160,
        win_length: int = 400,
        n_fft: int = 512,
        preemphasis: float = 0.97,
        min_frequency: float = 20.0,
        max_frequency: float = 7600.0,
        mel_floor: float = 1.1920928955078125e-07,
        pad_short: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if self.padding_side != "right":
            raise ValueError(
                f"padding_side={self.padding_side!r}: SPEAR takes batches padded on the right; use 'right'"
            )
        if not isinstance(feature_size, int) or feature_size < 1:
            raise ValueError(f"feature_size={feature_size!r}: the number of mel bins is a positive whole number")
        if not mel_floor > 0:
            raise ValueError(f"mel_floor={mel_floor}: it must be positive, as silence has the logarithm of it")
        if not 0 < hop_length <= win_length <= n_fft or n_fft % 2:
            raise ValueError(
                f"hop_length={hop_length}, win_length={win_length}, n_fft={n_fft}: "
                "0 < hop_length <= win_length <= n_fft is needed, with n_fft even"
            )
        if not 0 <= min_frequency < max_frequency <= sampling_rate / 2:
            raise ValueError(
                f"min_frequency={min_frequency}, max_frequency={max_frequency}: "
                f"0 <= min_frequency < max_frequency <= {sampling_rate / 2} (half of sampling_rate) is needed"
            )
        self.hop_length = hop_length
        self.win_length = win_length
        self.n_fft = n_fft
        self.preemphasis = preemphasis
        self.min_frequency = min_frequency
        self.max_frequency = max_frequency
        self.mel_floor = mel_floor
        self.pad_short = pad_short
        if self.min_num_samples < win_length:
            raise ValueError(f"win_length={win_length} is over {self.min_num_samples} samples, the shortest utterance")

    @property
    def min_num_samples(self) -> int:
        """Samples of the shortest utterance that gives the model one output frame: 1360, that is 85 ms."""
        return _MIN_FRAMES * self.hop_length - self.hop_length // 2

    def num_frames(self, num_samples: int) -> int:
        """Number of feature frames of an utterance of `num_samples` samples."""
        return (num_samples + self.hop_length // 2) // self.hop_length

    @torch.no_grad()
    @one_thread_where_forked()
    def __call__(
        self,
        raw_speech: np.ndarray
        | torch.Tensor
        | Sequence[float]
        | Sequence[np.ndarray | torch.Tensor | Sequence[float]],
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        sampling_rate: int | None = None,
        device: str | torch.device | None = None,
        pad_short: bool | None = None,
    ) -> BatchFeature:
        """`input_features` (batch, frames, 128), float32, and `attention_mask` (batch, frames), int32, 1 = valid.

        An utterance's features do not depend on its batch.

        Args:
            raw_speech: one mono utterance (a 1-D array, a 1-D tensor or a list of floats), or a batch: a list of such,
                or a 2-D array or tensor (batch, samples). Samples are floats in [-1, 1], int16 (divided by 2**15) or
                int32 (divided by 2**31). An array of two rows is refused, for it cannot be told from stereo: pass
                `list(array)` for a batch of two. Axes of size 1 beside the samples are dropped.
            padding: True or "longest", "max_length", or False. It acts on features, as `max_length` (in frames),
                `truncation` and `pad_to_multiple_of` (in frames) do.
            return_attention_mask: overrides the attribute of the same name, which is True.
            return_tensors: "pt", "np", or None for a list of numpy arrays, one for each utterance.
            sampling_rate: rate of `raw_speech` in Hz. Always pass it: a wrong rate cannot be noticed otherwise.
            device: where the filter bank runs, and where the tensors of return_tensors="pt" are left. Default:
                where `raw_speech` is, the CPU unless it holds tensors.
            pad_short: overrides the attribute of the same name. The zeros count as part of the utterance.

        Raises:
            ValueError: a wrong rate, more than one channel, or an utterance that is empty, too short, not finite or
                not of a type named above. The message names its index in the batch.
        """
        if sampling_rate is None:
            logger.warning(
                f"No sampling_rate was passed to {type(self).__name__}: {self.sampling_rate} Hz is assumed, and audio "
                f"of another rate gives wrong features without an error. Pass sampling_rate={self.sampling_rate}."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}, but {type(self).__name__} takes {self.sampling_rate} Hz only: "
                f"resample the audio to {self.sampling_rate} Hz first"
            )
        strategy = self._get_padding_strategies(padding=padding, max_length=max_length)
        if truncation and max_length is None:
            raise ValueError("truncation=True needs max_length, the number of frames to keep")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it counts frames, so it is at least 1")
        if max_length is not None and pad_to_multiple_of is not None:
            max_length = _round_up(max_length, pad_to_multiple_of)

        waveforms = self._waveforms(raw_speech, self.pad_short if pad_short is None else pad_short)
        target = torch.device(device) if device is not None else waveforms[0].device
        features, lengths = self._filter_bank(waveforms, target)  # (frames of all utterances, feature_size)
        if truncation and max_length is not None:
            _, position = _owners(lengths, target)
            features = features[position < max_length]
            lengths = [min(length, max_length) for length in lengths]

        width = None  # frames every utterance is padded to
        if strategy is PaddingStrategy.LONGEST:
            width = max(lengths)
        elif strategy is PaddingStrategy.MAX_LENGTH and max_length is not None and max(lengths) <= max_length:
            width = max_length
        if width is not None and pad_to_multiple_of is not None:
            width = _round_up(width, pad_to_multiple_of)

        with_mask = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        data: dict[str, Any] = {}
        if width is not None:
            padded, mask = self._pad_rows(features, lengths, width)
            data["input_features"] = padded
            if with_mask:
                data["attention_mask"] = mask
        else:  # unpadded, or max_length without truncation and longer utterances: ragged, as in `pad`
            rows = max_length if strategy is PaddingStrategy.MAX_LENGTH and max_length is not None else 0
            pairs = [
                self._pad_rows(piece, [len(piece)], max(rows, len(piece))) for piece in torch.split(features, lengths)
            ]
            data["input_features"] = [padded[0] for padded, _ in pairs]
            if with_mask:
                data["attention_mask"] = [mask[0] for _, mask in pairs]

        if return_tensors is None or TensorType(return_tensors) is not TensorType.PYTORCH:
            for key, value in data.items():
                data[key] = [row.cpu().numpy() for row in value]
        return BatchFeature(data, tensor_type=return_tensors)

    def _waveforms(self, raw_speech: Any, pad_short: bool) -> list[torch.Tensor]:
        """The utterances as 1-D tensors of supported types and lengths (values are checked later, all at once)."""
        waveforms = [mono_samples(item, index) for index, item in enumerate(_split_batch(raw_speech))]
        if not waveforms:
            raise ValueError("raw_speech is an empty batch: pass at least one utterance")
        for index, waveform in enumerate(waveforms):
            num_samples = len(waveform)
            if num_samples == 0:
                raise ValueError(f"utterance {index} of the batch is empty (0 samples): remove it")
            if num_samples < self.min_num_samples:
                if not pad_short:
                    raise ValueError(
                        f"utterance {index} of the batch is too short: {num_samples} samples, the shortest possible "
                        f"has {self.min_num_samples} ({1000 * self.min_num_samples / self.sampling_rate:g} ms); "
                        "remove it, or pass pad_short=True to pad it with zeros"
                    )
                waveforms[index] = torch.nn.functional.pad(waveform, (0, self.min_num_samples - num_samples))
        return waveforms

    def _filter_bank(self, waveforms: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[int]]:
        """Log-mel features (frames of all utterances, feature_size), and each utterance's number of frames.

        The utterances lie one after the other in a single buffer, each beginning at a multiple of hop_length samples,
        with room for its reflected edges. Every frame of every utterance is then a row of one strided view. The few
        rows between utterances are computed too and dropped at the end: gathering the others first would cost more.
        """
        hop, window_size = self.hop_length, self.win_length
        num_left = window_size // 2 - hop // 2
        num_right = window_size - num_left - hop + hop // 2  # what the last frame needs at most past the last sample
        # An utterance of f frames has less than hop * f + hop - hop // 2 samples: hops it takes up beyond its frames.
        margin = _round_up(num_left + num_right + hop - hop // 2 - 1, hop) // hop

        lengths = [self.num_frames(len(waveform)) for waveform in waveforms]
        first_rows = [0]  # the row of the strided view at which an utterance begins
        for frames in lengths:
            first_rows.append(first_rows[-1] + frames + margin)
        buffer = torch.zeros(first_rows[-1] * hop, dtype=torch.float32, device=waveforms[0].device)
        extremes = []
        for waveform, row in zip(waveforms, first_rows):
            place = buffer[row * hop + num_left : row * hop + num_left + len(waveform)]
            place.copy_(waveform)
            if (scale := _INTEGER_SCALES.get(waveform.dtype)) is not None:
                place.mul_(scale)
            extremes.append(torch.stack(torch.aminmax(place)))
        _check_peaks(torch.stack(extremes).abs().amax(dim=1).tolist(), waveforms)
        buffer = buffer.to(device)

        rows = torch.tensor(first_rows[:-1], device=device)
        starts = rows.unsqueeze(1) * hop + num_left  # (batch, 1)
        ends = starts + torch.tensor([len(waveform) for waveform in waveforms], device=device).unsqueeze(1)
        before, after = torch.arange(num_left, device=device), torch.arange(num_right, device=device)
        buffer[starts - 1 - before] = buffer[starts + before]  # the edge sample itself is repeated
        buffer[ends + after] = buffer[ends - 1 - after]

        features = self._log_mel(buffer.unfold(0, window_size, hop))
        if len(waveforms) == 1:
            return features[: lengths[0]], lengths
        owner, position = _owners(lengths, device)
        return features[rows[owner] + position], lengths

    def _log_mel(self, frames: torch.Tensor) -> torch.Tensor:
        """Log-mel (number, feature_size) of frames (number, win_length), in slabs of bounded memory."""
        number, window_size = frames.shape
        device = frames.device
        window, weights = _tables(
            self.feature_size,
            self.sampling_rate,
            window_size,
            self.n_fft,
            self.min_frequency,
            self.max_frequency,
            device,
        )
        if _rounds_products(device):
            weights = weights.double()
        largest = _SLAB_FRAMES_CPU if device.type == "cpu" else _SLAB_FRAMES_ACCELERATOR
        slab = min(largest, _round_up(number, _ROW_MULTIPLE))
        centred = frames.new_empty(slab, window_size)
        windowed = frames.new_zeros(slab, self.n_fft)
        features = frames.new_empty(number, self.feature_size)
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, number, slab):
                chosen = frames[begin : begin + slab]
                count = len(chosen)
                signal = centred[:count]
                torch.sub(chosen, chosen.mean(dim=1, keepdim=True), out=signal)
                delayed = windowed[:count, :window_size]
                torch.mul(signal[:, :1], self.preemphasis, out=delayed[:, :1])
                torch.mul(signal[:, :-1], self.preemphasis, out=delayed[:, 1:])
                signal -= delayed
                torch.mul(signal, window, out=delayed)
                spectrum = torch.fft.rfft(windowed[: _round_up(count, _ROW_MULTIPLE)])  # (rows, n_fft // 2 + 1)
                power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
                energies = (power.to(weights.dtype) @ weights)[:count].clamp_(min=self.mel_floor)
                features[begin : begin + count] = energies.log_()
        return features

    def _pad_rows(self, features: torch.Tensor, lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (sum of lengths, feature_size) padded to (batch, width, feature_size), and mask (batch, width)."""
        batch = len(lengths)
        mask = torch.arange(width, device=features.device) < torch.tensor(lengths, device=features.device).unsqueeze(1)
        if all(length == width for length in lengths):
            return features.view(batch, width, self.feature_size), mask.int()
        padded = features.new_full((batch * width, self.feature_size), self.padding_value)
        owner, position = _owners(lengths, features.device)
        padded[owner * width + position] = features
        return padded.view(batch, width, self.feature_size), mask.int()


def _check_peaks(peaks: list[float], waveforms: list[torch.Tensor]) -> None:
    """Refuses utterances that are not finite, and warns of floats that look like 16-bit integers."""
    for index, (peak, waveform) in enumerate(zip(peaks, waveforms)):
        if not math.isfinite(peak):
            where = int(torch.nonzero(~torch.isfinite(waveform.float()))[0, 0])
            raise ValueError(
                f"utterance {index} of the batch is not finite: sample {where} is {float(waveform[where])}; "
                "repair or remove it"
            )
    loudest = max(range(len(peaks)), key=peaks.__getitem__)
    if peaks[loudest] > _SUSPICIOUS_PEAK:
        logger.warning(
            f"Utterance {loudest} of the batch has samples up to {peaks[loudest]:g}, but floating-point samples are "
            "taken to lie in [-1, 1]. If these are 16-bit integers held as floats, divide them by 32768."
        )


def _owners(lengths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For a concatenation of sequences of these lengths: each item's sequence and its place in it, both (sum,)."""
    counts = torch.tensor(lengths, device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))
    return owner, torch.arange(sum(lengths), device=device) - (counts.cumsum(0) - counts)[owner]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _rounds_products(device: torch.device) -> bool:
    """Whether float32 matrix products here may run in TF32 or bfloat16, whose errors reach 1e-3 in log-mel."""
    if device.type != "cpu":
        return device.type == "cuda"
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # a backend's precision was set by its own name, so there is no common answer
        return True


def _split_batch(raw_speech: Any) -> list[Any]:
    """The utterances of `raw_speech`: arrays, tensors or lists of numbers, still unchecked."""
    if isinstance(raw_speech, np.ndarray) and raw_speech.dtype == object:
        raw_speech = list(raw_speech)
    if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
        shape = tuple(raw_speech.shape)
        if raw_speech.ndim <= 1 or 1 in shape:
            return [raw_speech]
        if raw_speech.ndim > 2 or shape[0] == 2 or 0 < shape[1] <= _MAX_CHANNELS:
            raise ValueError(
                f"raw_speech has shape {shape}, which is stereo or cannot be told from it (as a batch, its utterance "
                f"0 would have shape {shape[1:]}): SPEAR is mono, so average the channels; if it is a batch of two, "
                "pass list(raw_speech)"
            )
        return list(raw_speech)
    if not isinstance(raw_speech, (list, tuple)):
        raise ValueError(
            f"raw_speech is a {type(raw_speech).__name__}: pass decoded samples, as an array, a tensor, a list of "
            f"floats, or a list of these{_way_to_samples(raw_speech)}"
        )
    if len(raw_speech) > 0 and isinstance(raw_speech[0], (int, float, np.number)):
        return [raw_speech]
    return list(raw_speech)


def _way_to_samples(audio: Any) -> str:
    """What to do with audio as `datasets` gives it, a dictionary or a decoder; empty for anything else."""
    if isinstance(audio, Mapping) or hasattr(audio, "get_all_samples"):
        return '. Of `datasets` these are audio["array"], with sampling_rate=audio["sampling_rate"]'
    return ""


def mono_samples(item: Any, index: int = 0) -> torch.Tensor:
    """One utterance as a 1-D tensor of floats, int16 or int32; ValueError for anything else."""
    if way := _way_to_samples(item):
        raise ValueError(f"utterance {index} of the batch is a {type(item).__name__}: pass decoded samples{way}")
    if not isinstance(item, torch.Tensor):
        try:
            array = np.asarray(item)
        except ValueError as error:  # lists of unequal lengths
            raise ValueError(f"utterance {index} of the batch is not one sequence of samples: {error}") from error
        if array.size == 0:
            array = array.astype(np.float32)
        if array.dtype.kind not in "fi":
            raise ValueError(
                f"utterance {index} of the batch has samples of type {array.dtype}: "
                "pass floats in [-1, 1], int16 or int32"
            )
        kind = np.float64 if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
        array = np.ascontiguousarray(array, dtype=kind)
        # A tensor must not share memory that is read-only.
        item = torch.from_numpy(array if array.flags.writeable else array.copy())
    if item.ndim > 1 and max(item.shape) == item.numel():
        item = item.reshape(-1)
    if item.ndim != 1:
        raise ValueError(
            f"utterance {index} of the batch has shape {tuple(item.shape)}: SPEAR is mono, so each utterance is one "
            "sequence of samples; average the channels"
        )
    if not (item.is_floating_point() or item.dtype in _INTEGER_SCALES):
        name = str(item.dtype).removeprefix("torch.")
        raise ValueError(
            f"utterance {index} of the batch has samples of type {name}: pass floats in [-1, 1], int16 or int32"
        )
    return item


def scaled_to_one(samples: torch.Tensor) -> torch.Tensor:
    """Of `mono_samples`, in float32, with integers scaled to [-1, 1)."""
    return samples.to(torch.float32) * _INTEGER_SCALES.get(samples.dtype, 1.0)


__all__ = ["SpearFeatureExtractor"]
