# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""MFCC with deltas, batched in torch: the targets of HuBERT's first iteration (arXiv 2106.07447, section IV.B)."""

import math

import torch
from torch import Tensor, nn


SAMPLING_RATE = 16000
FRAME_LENGTH = 400  # samples, 25 ms
FRAME_SHIFT = 160  # samples, 10 ms
FFT_LENGTH = 512
NUM_MEL_BINS = 23
NUM_CEPSTRA = 13
LIFTER = 22.0
PREEMPHASIS = 0.97
LOW_FREQUENCY = 20.0  # Hz; the upper end is half the sampling rate
DELTA_REACH = 2  # frames on either side: torchaudio's default window of 5
FRAME_RATE = 50.0
FEATURE_SIZE = 3 * NUM_CEPSTRA


def mfcc_frames(num_samples: int) -> int:
    """Frames at 50 Hz of `num_samples` samples: 0 below 400 samples, else (num_samples - 400) // 320 + 1."""
    return max(0, (num_samples - FRAME_LENGTH) // (2 * FRAME_SHIFT) + 1)


class KaldiMfcc(nn.Module):
    """13 MFCC as `torchaudio.compliance.kaldi.mfcc(use_energy=False)`, with deltas and delta-deltas, at 50 Hz.

    As in HuBERT's recipe all three are computed at 100 Hz and every second frame is kept, so frame t covers samples
    [320 t, 320 t + 400) and starts where the 20 ms frame t of the student starts. The waveform is in [-1, 1].
    A row's features depend on nothing but its own samples, whatever padding surrounds them.
    """

    window: Tensor
    mel_filters: Tensor
    cosines: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Kaldi's "povey" window: a Hann window to the power 0.85, so that it is not zero next to its ends.
        window = torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64).pow(0.85)
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("mel_filters", _mel_filters().float(), persistent=False)
        self.register_buffer("cosines", _liftered_cosines().float(), persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Right-padded (batch, samples), lengths (batch,) in samples -> (batch, frames, 39), frame counts (batch,).

        What stands behind a row's frame count is padding and has no meaning.
        """
        batch, num_samples = waveforms.shape
        if lengths is None:
            lengths = torch.full((batch,), num_samples, device=waveforms.device)
        if int(lengths.min()) < FRAME_LENGTH:
            raise ValueError(f"a row has {int(lengths.min())} samples; one MFCC frame needs {FRAME_LENGTH} (25 ms)")
        num_frames = (lengths - FRAME_LENGTH) // FRAME_SHIFT + 1  # at 100 Hz
        cepstra = self._cepstra(waveforms)
        deltas = _deltas(cepstra, num_frames)
        features = torch.cat([cepstra, deltas, _deltas(deltas, num_frames)], dim=-1)  # (batch, frames at 100 Hz, 39)
        return features[:, ::2], (num_frames + 1) // 2

    def _cepstra(self, waveforms: Tensor) -> Tensor:
        """(batch, samples) -> (batch, frames at 100 Hz, 13)."""
        frames = waveforms.float().unfold(1, FRAME_LENGTH, FRAME_SHIFT)  # (batch, frames, 400)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - PREEMPHASIS * previous) * self.window
        power = torch.fft.rfft(frames, n=FFT_LENGTH).abs().square()  # (batch, frames, 257)
        # The floor is Kaldi's: the machine epsilon of float32.
        log_mel = (power @ self.mel_filters).clamp_min(torch.finfo(torch.float32).eps).log()  # (batch, frames, 23)
        return log_mel @ self.cosines


def _deltas(features: Tensor, num_frames: Tensor) -> Tensor:
    """Slope over 5 frames, (batch, frames, dim); a row's first and last frames are repeated beyond its ends."""
    batch, total, dim = features.shape
    positions = torch.arange(total, device=features.device)
    slope = torch.zeros_like(features)
    for offset in range(1, DELTA_REACH + 1):
        before = (positions - offset).clamp_min(0)
        after = torch.minimum((positions + offset)[None], (num_frames - 1)[:, None])  # (batch, frames)
        ahead = features.gather(1, after[:, :, None].expand(batch, total, dim))
        slope += offset * (ahead - features[:, before])
    return slope / (2 * sum(offset * offset for offset in range(1, DELTA_REACH + 1)))


def _mel(frequency: Tensor) -> Tensor:
    return 1127.0 * (1.0 + frequency / 700.0).log()


def _mel_filters() -> Tensor:
    """(257, 23) triangular filters, equally wide on the mel scale; the Nyquist bin has no weight."""
    low, high = _mel(torch.tensor([LOW_FREQUENCY, SAMPLING_RATE / 2], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, NUM_MEL_BINS + 2, dtype=torch.float64)
    bins = _mel(torch.arange(FFT_LENGTH // 2, dtype=torch.float64) * SAMPLING_RATE / FFT_LENGTH)[:, None]
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(up, down).clamp_min(0.0)  # (256, 23)
    return torch.cat([filters, filters.new_zeros(1, NUM_MEL_BINS)])


def _liftered_cosines() -> Tensor:
    """(23, 13): the orthonormal DCT-II, its columns scaled by Kaldi's cepstral lifter."""
    bins = torch.arange(NUM_MEL_BINS, dtype=torch.float64)[:, None] + 0.5
    orders = torch.arange(NUM_CEPSTRA, dtype=torch.float64)
    cosines = torch.cos(math.pi / NUM_MEL_BINS * bins * orders) * math.sqrt(2.0 / NUM_MEL_BINS)
    cosines[:, 0] = math.sqrt(1.0 / NUM_MEL_BINS)
    return cosines * (1.0 + 0.5 * LIFTER * torch.sin(math.pi * orders / LIFTER))
