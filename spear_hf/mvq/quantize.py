# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf quantize`: from a teacher and audio to a quantiser's folder.

OUTPUT/
  config.json, model.safetensors   the quantiser (quantizer_files.py), with where it comes from
  report.json                      held-out error by refinement passes, perplexity and use of every codebook
  metrics.jsonl                    one object per logged training step
  quantizer.png                    the training curve, held-out error, perplexity of every codebook
"""

import hashlib
import io
import json
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spear_hf import __version__
from spear_hf.data.manifest import Utterance
from spear_hf.data.seeding import keyed_seed
from spear_hf.data.sources import AudioSource, ListSource
from spear_hf.mvq.atomic_files import NOT_KEPT, explained, write_atomically
from spear_hf.mvq.corpus import Decoded, computed, decoded_pieces, display_path
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.quantizer_files import CONFIG_NAME, WEIGHTS_NAME
from spear_hf.mvq.reservoir import FrameReservoir
from spear_hf.mvq.teacher_probe import probed
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher
from spear_hf.mvq.tokenizer import quantizer_metadata
from spear_hf.mvq.training import QuantizerTrainer, QuantizerTrainingConfig


HELDOUT_SHARE = 0.05  # of the utterances, drawn one by one; one at least
PIECE_SECONDS = 300  # longer audio is sampled piece by piece, so that its features are never held whole
REPORT = "report.json"
METRICS = "metrics.jsonl"
PLOT = "quantizer.png"
_WRITTEN = (CONFIG_NAME, WEIGHTS_NAME, REPORT, METRICS, PLOT)


@dataclass(frozen=True)
class FrameSample:
    """Frames of a teacher over a corpus, and what they were drawn from."""

    frames: Tensor  # (frames, feature_size), for training
    heldout: Tensor  # (frames, feature_size), of other utterances
    data: dict[str, Any]  # counts, hours and the fingerprint of the audio, as JSON values
    bad: list[dict[str, str]]  # id, path and error of what could not be used


def sample_frames(
    teacher: Teacher,
    corpus: AudioSource | Sequence[Utterance],
    num_frames: int,
    num_heldout: int,
    seed: int = 0,
    max_hours: float | None = None,
    batch_seconds: float = 120.0,
    progress: bool = True,
) -> FrameSample:
    """A uniform sample of the teacher's frames, a function of seed and audio alone, and one of held-out utterances.

    The corpus is read once, piece by piece. `max_hours` of audio at most, about, are computed (`AudioSource.subset`
    says which); None is all of it. ValueError with fewer than two usable utterances: one is held out.
    """
    if num_frames < 1 or num_heldout < 1:
        raise ValueError(f"frames={num_frames} and heldout_frames={num_heldout} must be at least 1")
    source = corpus if isinstance(corpus, AudioSource) else ListSource(corpus)
    if max_hours is not None:
        if not max_hours > 0:
            raise ValueError(f"max_hours must be positive, not {max_hours}")
        source = source.subset(seed, max_hours)
    sampling = _Sampling(num_frames, num_heldout, seed)
    teacher.batch_seconds = batch_seconds
    with tqdm(unit="utt", desc="features", disable=not progress, smoothing=0.05) as bar:
        for piece, batches in decoded_pieces(source, teacher, batch_seconds):
            bar.set_postfix_str(f"piece {piece.index + 1} of {len(source)}", refresh=False)
            for batch in batches:
                for item, parts in computed(batch, lambda waveforms, ids: _features(teacher, waveforms, ids)):
                    sampling.add(item, parts)
                bar.update(len(batch))
    return sampling.result()


class _Sampling:
    """Divides utterances into held out and others as they come, and samples the frames of both.

    Held out are the utterances whose draw is below HELDOUT_SHARE, and the one with the smallest draw of all: the
    smallest so far is kept aside until a smaller one comes.
    """

    def __init__(self, num_frames: int, num_heldout: int, seed: int) -> None:
        self.seed = seed
        self.training, self.heldout = FrameReservoir(num_frames, seed), FrameReservoir(num_heldout, seed)
        self.utterances = self.heldout_utterances = self.samples = self.fingerprint = 0
        self.bad: list[dict[str, str]] = []
        self._smallest: tuple[float, str, list[Tensor]] | None = None

    def add(self, item: Decoded, parts: list[Tensor] | None) -> None:
        """An utterance with its features, in parts, or without if it is bad."""
        id = item.utterance.id
        if parts is None or item.waveform is None:
            self.bad.append({"id": id, "path": display_path(item.utterance.path), "error": item.error or ""})
            return
        self.utterances += 1
        self.samples += len(item.waveform)
        # A sum, so that it does not depend on the order, and nothing need be kept.
        identity = hashlib.sha256(f"{id}\0{item.checksum}".encode()).digest()
        self.fingerprint = (self.fingerprint + int.from_bytes(identity[:8], "big")) % 2**64
        utterance = (keyed_seed(self.seed, "held out", id) / 2**63, id, parts)
        if self._smallest is None or utterance[:2] < self._smallest[:2]:
            self._smallest, other = utterance, self._smallest
        else:
            other = utterance
        if other is not None:
            self._offer(other, held_out=other[0] < HELDOUT_SHARE)

    def result(self) -> FrameSample:
        """The sample, when all have been added. ValueError with fewer than two usable utterances."""
        if self.utterances < 2:
            first = f"; the first error: {self.bad[0]['error']}" if self.bad else ""
            raise ValueError(
                f"{self.utterances} utterance to sample from: two at least are needed, one is held out{first}"
            )
        assert self._smallest is not None
        self._offer(self._smallest, held_out=True)
        if self.training.seen == 0:
            raise ValueError(
                f"seed={self.seed} holds out all {self.utterances} utterances: take another, or more audio"
            )
        training, heldout = self.training.frames(), self.heldout.frames()
        for frames, which in ((training, "sampled"), (heldout, "held-out")):
            if (frames == frames[0]).all():
                raise ValueError(
                    f"the {len(frames)} {which} frames are all the same: is the audio silent? Take more of it, more "
                    "frames of it, or another seed"
                )
        self.bad.sort(key=lambda entry: entry["id"])
        data = {
            "utterances": self.utterances,
            "heldout_utterances": self.heldout_utterances,
            "bad_utterances": len(self.bad),
            "hours": self.samples / SAMPLING_RATE / 3600,
            "frames_seen": self.training.seen + self.heldout.seen,
            "frames": min(self.training.capacity, self.training.seen),
            "heldout_frames": min(self.heldout.capacity, self.heldout.seen),
            "fingerprint": f"{self.fingerprint:016x}",
            "seed": self.seed,
        }
        return FrameSample(training, heldout, data, self.bad)

    def _offer(self, utterance: tuple[float, str, list[Tensor]], held_out: bool) -> None:
        _, id, parts = utterance
        self.heldout_utterances += held_out
        for number, features in enumerate(parts):
            (self.heldout if held_out else self.training).add(f"{id}#{number}", features)


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
    corpus: AudioSource | Sequence[Utterance],
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
    quantiser already, or files of something else, unless `overwrite`; and for codes that a token store cannot hold.
    """
    if training.codebook_size > 256:
        raise ValueError(f"codebook_size={training.codebook_size}: token stores hold bytes, so 256 at most")
    output = Path(output)
    if (output / CONFIG_NAME).exists() and not overwrite:
        raise ValueError(
            f"{output} holds a quantiser, and stores may depend on it: name another folder, or overwrite (--overwrite)"
        )
    if output.is_file():
        raise ValueError(f"{output} is a file: a quantiser is a folder")
    with _kept_if_done(output):  # made before the hours that sampling may take
        others = {path.name for path in output.iterdir() if not path.name.startswith(".")} - {*_WRITTEN}
        if others and not overwrite:
            raise ValueError(
                f"{output} is not empty, and no quantiser (it has {', '.join(sorted(others)[:3])}): name another "
                "folder, or overwrite (--overwrite)"
            )
        sample = sample_frames(
            teacher,
            corpus,
            num_frames,
            num_heldout,
            seed=training.seed,
            max_hours=max_hours,
            batch_seconds=batch_seconds,
            progress=progress,
        )
        return train_on_sample(teacher, sample, output, training, progress=progress)


@contextmanager
def _kept_if_done(folder: Path) -> Iterator[None]:
    """A folder for the block; where that fails, new files of a quantiser's are gone again, and folders made for it."""
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    new = [path for name in _WRITTEN if not (path := folder / name).exists()]
    try:
        yield
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # someone has written there meanwhile
            for part in made:
                part.rmdir()
        raise


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
    with explained(output, NOT_KEPT):
        quantizer = trainer.train(sample.frames)
        quantizer.config.provenance.update(probed(teacher, quantizer))
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
    packages = ("torch", "transformers", "numpy")
    ours = {"python": platform.python_version(), "spear_hf": __version__}  # which may run without being installed
    return ours | {name: version(name) for name in packages}


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
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, metadata={"Software": None})
    write_atomically(output / PLOT, drawn.getbuffer())
