# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Teachers that come as one TorchScript file, such as a music tagger: `spear_hf.mvq.torchscript:torchscript`.

    spear-hf quantize --teacher spear_hf.mvq.torchscript:torchscript --teacher-option file=tagger.pt \\
        --teacher-option frame_rate=62.5 --teacher-option resample_to=50 --codebooks 8 --data ... --output ...

The file maps waveforms (batch, samples) at 16 kHz to features (batch, frames, dim).

A TorchScript file is a program. Loading it does not unpickle Python objects (libtorch reads the archive with a reader
of its own, which knows tensors and TorchScript types only), so no Python of the file's author is run; but its
TorchScript is, and operators of torch can read and write files. So a file is only ever run where it is named by the
option `file`, never found or downloaded by itself: name files whose maker you trust.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spear_hf.mvq.teachers import SAMPLING_RATE


class TorchScriptTeacher:
    """A teacher's function (teachers.py, CallableTeacher) around one TorchScript file.

    Only waveforms of equal length share a batch, as such files take no mask and padding would leak.
    """

    def __init__(
        self, file: str, frame_rate: float, resample_to: float | None, first_centre: float, device: str | torch.device
    ) -> None:
        path = Path(str(file)).expanduser()  # a name of digits comes as a number
        if not path.is_file():
            raise ValueError(f"file={file!r}: there is no such TorchScript file")
        for name, value in (("frame_rate", frame_rate), ("resample_to", resample_to)):
            if value is not None and (not _is_number(value) or not 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} must be a positive number of frames a second")
        if not _is_number(first_centre) or not math.isfinite(first_centre):
            raise ValueError(f"first_centre={first_centre!r} must be a number of seconds")
        try:
            self.model = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error
        self.device = torch.device(device)
        self.source_rate = float(frame_rate)
        self.frame_rate = float(resample_to or frame_rate)
        self.resampled = resample_to is not None
        self.first_centre = float(first_centre)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.feature_size = self._run([np.zeros(SAMPLING_RATE, np.float32)])[0].shape[1]

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[Tensor]:
        """Waveforms (samples,) -> features (frames, feature_size) of each."""
        rows: dict[int, list[int]] = {}
        for row, waveform in enumerate(waveforms):
            rows.setdefault(len(waveform), []).append(row)
        features: dict[int, Tensor] = {}
        for group in rows.values():
            features |= dict(zip(group, self._run([waveforms[row] for row in group])))
        return [features[row] for row in range(len(waveforms))]

    @torch.no_grad()
    def _run(self, waveforms: list[np.ndarray]) -> Tensor:
        """Waveforms of one length -> (batch, frames, feature_size)."""
        batch = torch.from_numpy(np.stack(waveforms)).to(self.device)
        output = self.model(batch)
        if not isinstance(output, Tensor) or output.ndim != 3 or len(output) != len(batch):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the TorchScript file must return features (batch, frames, dim), gave {got}")
        return self._resampled(output.float(), batch.shape[1]) if self.resampled else output

    def _resampled(self, features: Tensor, num_samples: int) -> Tensor:
        """Linear interpolation in time: frame i of the result is what the features are at the middle of its stretch.

        The stretch is [i, i + 1) / resample_to seconds; there are as many as fit into the waveform. So a frame's time
        is a function of its number, not of the utterance's length. Beyond the last centre the last frame is held.
        """
        count = max(1, math.floor(num_samples * self.frame_rate / SAMPLING_RATE + 1e-6))
        times = (torch.arange(count, dtype=torch.float64, device=features.device) + 0.5) / self.frame_rate
        places = ((times - self.first_centre) * self.source_rate).clamp(0, features.shape[1] - 1)
        below = places.floor().long()
        above = (below + 1).clamp(max=features.shape[1] - 1)
        share = (places - below).to(features.dtype)[:, None]  # (count, 1)
        return torch.lerp(features[:, below], features[:, above], share)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def torchscript(
    file: str,
    frame_rate: float,
    resample_to: float | None = None,
    first_centre: float = 0.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TorchScriptTeacher:
    """The factory.

    `file`: the TorchScript file; its bytes are the teacher's fingerprint.
    `frame_rate`: frames a second that it gives. `resample_to`: frames a second wanted, by linear interpolation; a
    student at 50 Hz or 25 Hz needs 50 or 25.
    `first_centre`: seconds from the waveform's start to the middle of what the file's first frame sees: 0 with a
    centred spectrogram, half a hop where frames cover [t, t + 1) hops.
    ValueError for another dtype than float32: spectrograms inside such files seldom run in any other.
    """
    if dtype != torch.float32:
        raise ValueError(f"a TorchScript teacher runs in float32, not {str(dtype).removeprefix('torch.')}")
    return TorchScriptTeacher(file, frame_rate, resample_to, first_centre, device)
