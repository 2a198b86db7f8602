# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio extended at both ends, so that the encoder's frames lie where a benchmark wants them.

Frame t of the encoder (50 Hz) lies in the middle of what its stem sees at sample 320 t + 720, that is 20 t + 45 ms:
the first 45 ms and the last 35 ms or more have no frame of their own. Benchmarks count frames from the beginning of
the file to its end. With `720 - c` samples put in front, frame t lies at sample 320 t + c of the file; and what is put
behind makes the number of frames exactly what is wanted. What is put there is the audio's own mirror image, the rule
of the filter bank's edges, so that no silence is invented.
"""

import torch


FRAME_SAMPLES = 320
FIRST_CENTRE = 720  # samples
_FIRST_FRAME = 1360 - FRAME_SAMPLES  # what the encoder needs beyond 320 samples a frame


def mirrored(waveforms: torch.Tensor, left: int, total: int) -> torch.Tensor:
    """(..., samples) extended to (..., total), `left` samples in front; mirrored as often as the length asks for.

    The sample at the edge is repeated, as in the filter bank. ValueError where there is nothing to mirror.
    """
    samples = waveforms.shape[-1]
    if samples == 0:
        raise ValueError("the audio is empty (0 samples)")
    place = torch.arange(-left, total - left, device=waveforms.device).remainder(2 * samples)
    return waveforms[..., torch.where(place < samples, place, 2 * samples - 1 - place)]


def framed(waveforms: torch.Tensor, frames: int, centre: int) -> torch.Tensor:
    """(..., samples) extended to give `frames` frames at 50 Hz, frame t at sample `320 t + centre` of the audio.

    `centre` <= 720. Audio beyond what these frames see is cut off.
    """
    return mirrored(waveforms, FIRST_CENTRE - centre, FRAME_SAMPLES * frames + _FIRST_FRAME)
