# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a teacher still does what it did when a quantiser was trained on its features.

Its parameters have a fingerprint (teachers.py), but features depend on more: config.json (heads, activations), the
feature extractor, the code of a factory. So the quantiser records what the teacher makes of a fixed second of noise,
in NUMBERS projections, and they are made again when the two meet. Versions of libraries and devices change them by
rounding only.
"""

from typing import Any

import numpy as np
import torch

from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher


NUMBERS = 32  # tell the distance of two sets of features to within about an eighth
# Largest distance, relative to the features. Of Whisper-base's layers 2 and 6, bfloat16 gives 0.03 to 0.04, another
# number of heads 0.8 to 1.5, another window of the spectrogram 0.16 to 0.34.
TOLERANCE = 0.1
TOLERANCE_16_BIT = 0.3


def probe(teacher: Teacher, quantizer: MultiCodebookQuantizer) -> list[float]:
    """Projections of the teacher's features of noise, standardised where the quantiser does so."""
    bits = np.random.PCG64(0)  # its stream is the same in every version of numpy
    count = max(SAMPLING_RATE, teacher.min_samples)
    noise = (0.2 * (bits.random_raw(count) / 2.0**64 - 0.5)).astype(np.float32)
    features = teacher([noise], ids=["probe noise"])[0].double().cpu()
    mean, deviation = quantizer.feature_mean.double().cpu(), quantizer.feature_std.double().cpu()
    flat = ((features - mean) / deviation).flatten().numpy()
    size = len(flat)
    signs = np.array([1.0 - 2.0 * (bits.random_raw(size) >> np.uint64(63)) for _ in range(NUMBERS)])
    return [round(float(value), 4) for value in signs @ flat / np.sqrt(size)]


def probed(teacher: Teacher, quantizer: MultiCodebookQuantizer) -> dict[str, Any]:
    """What goes into the quantiser's provenance: nothing, of a teacher that cannot be asked about noise."""
    try:
        return {"probe": probe(teacher, quantizer)}
    except ValueError:
        return {}


def check_probe(teacher: Teacher, quantizer: MultiCodebookQuantizer) -> None:
    """ValueError where the teacher's features are others now; nothing of quantisers that have recorded none."""
    provenance = quantizer.config.provenance
    if "probe" not in provenance:
        return
    recorded = provenance["probe"]
    if (
        not isinstance(recorded, list)
        or len(recorded) != NUMBERS
        or not all(type(v) in (int, float) for v in recorded)
    ):
        raise ValueError(f"the quantiser's config.json: provenance.probe must be {NUMBERS} numbers; restore it")
    was, now = np.array(recorded), np.array(probe(teacher, quantizer))
    dtype = provenance.get("teacher", {}).get("dtype", "float32")
    exact = dtype == "float32" and teacher.dtype == torch.float32
    distance = float(np.linalg.norm(now - was)) / max(1e-6, float(np.linalg.norm(was)))
    if not distance <= (TOLERANCE if exact else TOLERANCE_16_BIT):
        raise ValueError(
            f"teacher {teacher.id} gives other features than when the quantiser was trained (off by "
            f"{100 * distance:.0f} % on a probe): its config.json, its extractor or its code has changed; give "
            "the teacher it was trained on"
        )
