# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf quantize`: from a teacher and audio to a quantiser's folder.

OUTPUT/
  config.json, model.safetensors   the quantiser (quantizer_files.py), with where it comes from
  report.json                      held-out error by refinement passes, perplexity and use of every codebook
  metrics.jsonl                    one object per logged training step
  quantizer.png                    the training curve, held-out error, perplexity of every codebook
"""

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spear_hf.data.audio import AudioError, audio_duration
from spear_hf.data.manifest import Utterance
from spear_hf.data.seeding import keyed_seed
from spear_hf.mvq.corpus import computed, decoded_batches, display_path
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.quantizer_files import CONFIG_NAME
from spear_hf.mvq.reservoir import FrameReservoir
from spear_hf.mvq.store import waveform_checksum, write_atomically
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher
from spear_hf.mvq.tokenizer import quantizer_metadata
from spear_hf.mvq.training import QuantizerTrainer, QuantizerTrainingConfig


HELDOUT_SHARE = 0.05  # of the utterances, one at least
PIECE_SECONDS = 300  # longer audio is sampled piece by piece, so that its features are never held whole
REPORT = "report.json"
METRICS = "metrics.jsonl"
PLOT = "quantizer.png"


@dataclass(frozen=True)
class FrameSample:
    """Frames of a teacher over a corpus, and what they were drawn from."""

    frames: Tensor  # (frames, feature_size), for training
    heldout: Tensor  # (frames, feature_size), of other utterances
    data: dict[str, Any]  # counts, hours and the fingerprint of the audio, as JSON values
    bad: list[dict[str, str]]  # id, path and error of what could not be used


def sample_frames(
    teacher: Teacher,
    utterances: Sequence[Utterance],
    num_frames: int,
    num_heldout: int,
    seed: int = 0,
    max_hours: float | None = None,
    batch_seconds: float = 120.0,
    progress: bool = True,
) -> FrameSample:
    """A uniform sample of the teacher's frames, a function of seed and audio alone, and one of held-out utterances.

    `max_hours` of audio, whole utterances drawn by the seed, are computed at most; None is all of it.
    ValueError with fewer than two usable utterances: one is held out.
    """
    chosen = _subset(utterances, seed, max_hours)
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} utterance to sample from: two at least are needed, one is held out")
    by_draw = sorted(chosen, key=lambda utterance: keyed_seed(seed, "held out", utterance.id))
    heldout_ids = {utterance.id for utterance in by_draw[: max(1, round(HELDOUT_SHARE * len(chosen)))]}
    training, heldout = FrameReservoir(num_frames, seed), FrameReservoir(num_heldout, seed)
    teacher.batch_seconds = batch_seconds
    samples = 0
    checksums: dict[str, int] = {}
    bad: list[dict[str, str]] = []
    with tqdm(total=len(chosen), unit="utt", desc="features", disable=not progress, smoothing=0.05) as bar:
        for batch in decoded_batches(chosen, teacher, batch_seconds):
            for item, pieces in computed(batch, lambda waveforms, ids: _features(teacher, waveforms, ids)):
                id = item.utterance.id
                if pieces is None or item.waveform is None:
                    bad.append({"id": id, "path": display_path(item.utterance.path), "error": item.error or ""})
                    continue
                for number, features in enumerate(pieces):
                    (heldout if id in heldout_ids else training).add(f"{id}#{number}", features)
                samples += len(item.waveform)
                checksums[id] = waveform_checksum(item.waveform)
            bar.update(len(batch))
    bad.sort(key=lambda entry: entry["id"])
    for reservoir, kind in ((training, "training"), (heldout, "held-out")):
        if reservoir.seen == 0:
            raise ValueError(f"no {kind} utterance could be used; the first error: {bad[0]['error']}")
    data = {
        "utterances": len(checksums),
        "heldout_utterances": len(heldout_ids & set(checksums)),
        "bad_utterances": len(bad),
        "hours": samples / SAMPLING_RATE / 3600,
        "frames_seen": training.seen + heldout.seen,
        "frames": min(num_frames, training.seen),
        "heldout_frames": min(num_heldout, heldout.seen),
        "fingerprint": hashlib.sha256(json.dumps(sorted(checksums.items())).encode()).hexdigest()[:16],
        "seed": seed,
    }
    return FrameSample(training.frames(), heldout.frames(), data, bad)


def _subset(utterances: Sequence[Utterance], seed: int, max_hours: float | None) -> list[Utterance]:
    if max_hours is None:
        return list(utterances)
    if max_hours <= 0:
        raise ValueError(f"max_hours must be positive, not {max_hours}")
    chosen, seconds = [], 0.0
    for utterance in sorted(utterances, key=lambda utterance: keyed_seed(seed, "subset", utterance.id)):
        if seconds >= 3600 * max_hours:
            break
        chosen.append(utterance)
        if utterance.num_samples is not None:
            seconds += utterance.num_samples / SAMPLING_RATE
        else:
            try:
                seconds += audio_duration(utterance.path)
            except AudioError:  # counted as nothing here, and reported when it is decoded
                continue
    return chosen


def _features(teacher: Teacher, waveforms: list[np.ndarray], ids: list[str]) -> list[list[Tensor]]:
    """The features of each waveform, in pieces."""
    size = PIECE_SECONDS * SAMPLING_RATE
    pieces = [[w[start : start + size] for start in range(0, len(w), size)] for w in waveforms]
    for parts in pieces:
        if len(parts) > 1 and len(parts[-1]) < teacher.min_samples:
            parts.pop()
    owners = [id for id, parts in zip(ids, pieces) for _ in parts]
    features = iter(teacher([part for parts in pieces for part in parts], ids=owners))
    return [[next(features) for _ in parts] for parts in pieces]


@torch.no_grad()
def heldout_report(quantizer: MultiCodebookQuantizer, heldout: Tensor) -> dict[str, Any]:
    """Relative error by refinement passes, and how the codebooks are used, on frames (frames, feature_size).

    `relative_error` is sum |decoded - x|^2 / sum |x - mean|^2, of standardised features where the quantiser
    standardises. `perplexity` is the exponential of the entropy of a codebook's codes, at most codebook_size; `used`
    is the share of its codes that occur.
    """
    device = quantizer.centers.device
    standardise = quantizer.feature_std if quantizer.config.normalize else torch.ones_like(quantizer.feature_std)
    frames = heldout.to(device, torch.float32)
    spread = ((frames - frames.mean(dim=0)) / standardise).square().sum()
    errors = {}
    for passes in (0, 1, 2, 5):
        codes = quantizer.encode(frames, refine_iters=passes)
        errors[str(passes)] = float(((quantizer.decode(codes) - frames) / standardise).square().sum() / spread)
    size = quantizer.config.codebook_size
    counts = torch.stack([torch.bincount(column.long(), minlength=size) for column in codes.T]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(dim=1)
    return {
        "frames": len(heldout),
        "relative_error": errors,
        "perplexity": [round(value, 3) for value in entropy.exp().tolist()],
        "used": [round(value, 4) for value in (counts > 0).double().mean(dim=1).tolist()],
    }


def train_tokenizer(
    teacher: Teacher,
    utterances: Sequence[Utterance],
    output: str | Path,
    training: QuantizerTrainingConfig,
    num_frames: int = 200_000,
    num_heldout: int = 10_000,
    max_hours: float | None = None,
    batch_seconds: float = 120.0,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Samples frames of the teacher, trains a quantiser on them and writes the folder `output`; returns the report.

    Equal audio, settings and machine give equal bytes of quantiser and report. ValueError if `output` holds a
    quantiser already, unless `overwrite`.
    """
    output = Path(output)
    if (output / CONFIG_NAME).exists() and not overwrite:
        raise ValueError(f"{output} holds a quantiser, and stores may depend on it: name another folder, or overwrite")
    sample = sample_frames(
        teacher,
        utterances,
        num_frames,
        num_heldout,
        seed=training.seed,
        max_hours=max_hours,
        batch_seconds=batch_seconds,
        progress=progress,
    )
    return train_on_sample(teacher, sample, output, training, progress=progress)


def train_on_sample(
    teacher: Teacher,
    sample: FrameSample,
    output: str | Path,
    training: QuantizerTrainingConfig,
    progress: bool = True,
) -> dict[str, Any]:
    """`train_tokenizer` from the sample on: several quantisers can be trained on one."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    metadata = quantizer_metadata(teacher)
    metadata["provenance"] |= {"data": sample.data, "training": asdict(training), "versions": _versions()}
    trainer = QuantizerTrainer(
        training, metadata=metadata, device=teacher.device, progress=progress, metrics_path=output / METRICS
    )
    quantizer = trainer.train(sample.frames)
    report = {
        "quantizer_id": quantizer.quantizer_id,
        "bits_per_second": teacher.frame_rate * training.num_codebooks * math.log2(training.codebook_size),
        "heldout": heldout_report(quantizer, sample.heldout),
        **metadata["provenance"],
        "bad": sample.bad,
    }
    write_atomically(output / REPORT, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    _plot(output, report)
    quantizer.save_pretrained(output)
    return report


def _versions() -> dict[str, str]:
    packages = ("spear_hf", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _plot(output: Path, report: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    heldout = report["heldout"]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    loss, error, use = figure.subplots(1, 3)
    loss.plot([row["step"] for row in rows], [row["reconstruction"] for row in rows], linewidth=1)
    loss.set(xlabel="step", ylabel="relative reconstruction error", yscale="log", title="training")
    passes = list(heldout["relative_error"])
    error.plot(passes, list(heldout["relative_error"].values()), marker="o")
    error.set(xlabel="refinement passes", ylabel="relative error", title=f"{heldout['frames']} held-out frames")
    error.set_ylim(bottom=0)
    size, places = report["training"]["codebook_size"], range(1, 1 + len(heldout["perplexity"]))
    use.bar(places, [size * share for share in heldout["used"]], color="#cfe0f0", label="codes in use")
    use.bar(places, heldout["perplexity"], color="#1f77b4", width=0.5, label="perplexity")
    use.axhline(size, color="grey", linestyle="--", linewidth=1)
    use.set(xlabel="codebook", ylabel=f"of {size} codes", title="use of the codebooks")
    use.legend(loc="lower right")
    for axes in (loss, error, use):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = output / f".{PLOT}"
    figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
    temporary.replace(output / PLOT)
