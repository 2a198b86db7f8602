# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""MFCC against torchaudio, and their independence of the batch."""

import pytest
import torch

from spear_hf.mvq.mfcc import FEATURE_SIZE, KaldiMfcc, mfcc_frames


LENGTHS = [400, 401, 559, 560, 719, 720, 721, 1360, 16000, 16079, 16080, 48123]


def noise(num_samples: int) -> torch.Tensor:
    """Noise that swells from nearly nothing, so that Kaldi's floor on the mel energies is met too."""
    generator = torch.Generator().manual_seed(num_samples)
    return 0.2 * torch.randn(num_samples, generator=generator) * torch.linspace(0, 1, num_samples) ** 4


def reference(waveform: torch.Tensor) -> torch.Tensor:
    torchaudio = pytest.importorskip("torchaudio")
    cepstra = torchaudio.compliance.kaldi.mfcc(waveform[None], sample_frequency=16000, use_energy=False).T
    deltas = torchaudio.functional.compute_deltas(cepstra)
    return torch.cat([cepstra, deltas, torchaudio.functional.compute_deltas(deltas)]).T[::2]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_equals_torchaudio(num_samples):
    waveform = noise(num_samples)
    features, num_frames = KaldiMfcc()(waveform[None])
    expected = reference(waveform)
    assert features.shape == (1, mfcc_frames(num_samples), FEATURE_SIZE)
    assert num_frames.tolist() == [mfcc_frames(num_samples)]
    # Cepstra reach 100; the differences are of float32 rounding before the logarithm.
    assert (features[0] - expected).abs().max() < 1e-3


def test_equals_torchaudio_on_real_speech(golden):
    waveform = golden["0.waveform"]
    assert (KaldiMfcc()(waveform[None])[0][0] - reference(waveform)).abs().max() < 1e-3


def test_a_row_does_not_depend_on_its_batch():
    model = KaldiMfcc()
    waveforms = [noise(n) for n in LENGTHS]
    padded = torch.full((len(waveforms), max(LENGTHS)), float("nan"))
    for row, waveform in zip(padded, waveforms):
        row[: len(waveform)] = waveform
    # Padding of any value: zeros would hide a frame that reads past the end.
    features, num_frames = model(torch.nan_to_num(padded, nan=0.5), torch.tensor(LENGTHS))
    for waveform, row, count in zip(waveforms, features, num_frames):
        alone = model(waveform[None])[0][0]
        assert len(alone) == count
        assert torch.allclose(row[:count], alone, atol=1e-4, rtol=0)


def test_frame_starts_every_20_ms():
    """Frame t covers samples [320 t, 320 t + 400): a click moves exactly the frames that hold it."""
    model = KaldiMfcc()
    quiet = noise(16000)
    clicked = quiet.clone()
    clicked[320 * 20] += 0.9
    changed = (model(quiet[None])[0][0, :, :13] - model(clicked[None])[0][0, :, :13]).abs().max(dim=1).values > 0.1
    assert changed.nonzero()[:, 0].tolist() == [19, 20]  # frame 19 ends with sample 320 * 19 + 399 > 320 * 20


def test_frame_count_is_that_of_wav2vec2():
    for num_samples in range(400, 4000):
        assert mfcc_frames(num_samples) == (num_samples - 400) // 320 + 1
    assert mfcc_frames(399) == 0


def test_too_short_is_refused():
    with pytest.raises(ValueError, match="399 samples"):
        KaldiMfcc()(torch.zeros(1, 399))
