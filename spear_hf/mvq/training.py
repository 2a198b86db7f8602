# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Training of the multi-codebook quantiser on frames of features.

Two phases (spec: pretraining.md section 1): first twice as many codebooks of sqrt(size) centres, then every pair of
neighbours is multiplied out into one codebook, and training goes on at half the rate. Losses: QuantizerLosses.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from spear_hf.data.seeding import keyed_generator
from spear_hf.mvq.atomic_files import explained
from spear_hf.mvq.quantizer import PASSES, SCALE_SPEED, MultiCodebookQuantizer, QuantizerConfig


BETAS = (0.9, 0.98)
EPS = 1e-9
WEIGHT_DECAY = 1e-6
CHUNK_ROWS = 8192  # frames read at a time
LOG_EVERY = 20  # steps

Frames = Tensor | np.ndarray


@dataclass(frozen=True)
class QuantizerTrainingConfig:
    """What is trained, and for how long. The defaults are the paper's for speech."""

    num_codebooks: int
    """Codes per frame; a power of two (paper: 16 for speech, 8 for audio)."""

    codebook_size: int = 256
    """Centres per codebook. A square is trained in two phases, any other number in one."""

    normalize: bool = True
    """Standardise every channel by its mean and standard deviation over the frames (paper: speech yes, audio no)."""

    steps: int = 35_000
    """Steps of each phase."""

    batch_size: int = 1024
    """Frames a step, drawn with replacement."""

    learning_rate: float = 0.005
    """Of Adam in the first phase, halved at every quarter of a phase; the second phase starts at half of it."""

    seed: int = 0
    """Every random draw is a function of this and of the step."""

    def __post_init__(self) -> None:
        QuantizerConfig(1, self.num_codebooks, self.codebook_size)  # says what is wrong with these two
        for name in ("steps", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be {'finite' if value == math.inf else 'positive'}, not {value!r}.")

    @property
    def phases(self) -> list[tuple[int, int]]:
        """(number of codebooks, centres in each) of every phase."""
        root = math.isqrt(self.codebook_size)
        last = (self.num_codebooks, self.codebook_size)
        return [(2 * self.num_codebooks, root), last] if root > 1 and root * root == self.codebook_size else [last]


class QuantizerTrainer:
    """Trains one quantiser: `QuantizerTrainer(QuantizerTrainingConfig(num_codebooks=8)).train(frames)`.

    Deterministic for a seed on one device, with one number of threads.
    """

    def __init__(
        self,
        config: QuantizerTrainingConfig,
        *,
        metadata: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        progress: bool = True,
        metrics_path: str | os.PathLike | None = None,
    ) -> None:
        """`metadata`: fields of QuantizerConfig that say what the frames are (teacher, frame_rate, ...).

        `metrics_path`: a JSON object for every LOG_EVERY-th step goes there, one a line; an existing file is replaced.
        """
        self.config = config
        self.metadata = dict(metadata or {})
        self.device = torch.device(device)
        self.progress = progress
        self.metrics_path = None if metrics_path is None else Path(metrics_path)
        self.quantizer: MultiCodebookQuantizer | None = None

    def train(self, frames: Frames) -> MultiCodebookQuantizer:
        """Frames (..., feature_size), in any floating-point type (a memory map will do) -> a trained quantiser.

        ValueError for frames that are not finite or fewer than the centres of a codebook of the first phase.
        """
        frames = _flattened(frames)
        config = self.config
        num_codebooks, codebook_size = config.phases[0]
        if frames.shape[0] < codebook_size:
            raise ValueError(f"{frames.shape[0]} frames cannot train codebooks of {codebook_size}; give more audio.")
        metadata = self.metadata | {"provenance": self._provenance(frames)}
        quantizer = MultiCodebookQuantizer(
            frames.shape[1], codebook_size, num_codebooks, normalize=config.normalize, **metadata
        )
        mean, std = _mean_and_std(frames)
        if config.normalize:
            quantizer.feature_mean.copy_(mean)
            quantizer.feature_std.copy_(std)
        _initialize(quantizer, frames, config.seed)
        quantizer = quantizer.to(self.device).train()
        if self.metrics_path is not None:
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            self.metrics_path.write_text("")
        with tqdm(total=len(config.phases) * config.steps, desc="quantiser", disable=not self.progress) as bar:
            for phase in range(len(config.phases)):
                if phase:
                    quantizer = _multiplied_out(quantizer)
                self._train_phase(quantizer, frames, phase, bar)
        self.quantizer = quantizer.eval()
        return self.quantizer

    def evaluate(self, frames: Frames) -> dict[str, Any]:
        """`evaluate_quantizer` of the trained quantiser; `frames` should not have been trained on."""
        if self.quantizer is None:
            raise ValueError("there is nothing to evaluate yet: call train() first.")
        return evaluate_quantizer(self.quantizer, frames)

    def _train_phase(self, quantizer: MultiCodebookQuantizer, frames: Frames, phase: int, bar: tqdm) -> None:
        config = self.config
        optimizer = torch.optim.Adam(
            quantizer.parameters(),
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
            lr=config.learning_rate,
        )
        started = time.monotonic()
        for step in range(config.steps):
            learning_rate = config.learning_rate * 0.5 ** (phase + 4 * step // config.steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            random = keyed_generator(config.seed, "quantizer", phase, step)
            batch = _rows(frames, random.integers(frames.shape[0], size=config.batch_size))
            passes = int(random.integers(1, 3))
            losses = quantizer(batch.to(self.device), passes)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            optimizer.step()
            bar.update()
            if step % LOG_EVERY and step + 1 < config.steps:
                continue
            values = {name: loss.item() for name, loss in losses._asdict().items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(
                    f"the quantiser's losses are not finite at step {step} of phase {phase + 1}: {values}; "
                    f"lower learning_rate ({config.learning_rate})."
                )
            bar.set_postfix(error=f"{values['reconstruction']:.4f}", refresh=False)
            if self.metrics_path is not None:
                record = {"step": phase * config.steps + step, "phase": phase + 1, "learning_rate": learning_rate}
                record |= {"passes": passes, **values, "seconds": round(time.monotonic() - started, 3)}
                with explained(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")

    def _provenance(self, frames: Frames) -> dict[str, Any]:
        training = {**asdict(self.config), "frames": frames.shape[0], "torch": str(torch.__version__)}
        return {**self.metadata.get("provenance", {}), "training": training}


@torch.no_grad()
def evaluate_quantizer(
    quantizer: MultiCodebookQuantizer, frames: Frames, refine_iters: int = PASSES
) -> dict[str, Any]:
    """How well frames are reconstructed, and how evenly the centres are used.

    `relative_error`: squared error over squared distance from the frames' mean, standardised if the quantiser does so.
    `perplexity` and `used` of every codebook: exp(entropy) of its codes, and the number of centres that occur.
    """
    frames = _flattened(frames)
    config = quantizer.config
    device = quantizer.centers.device
    counts = torch.zeros(config.num_codebooks, config.codebook_size, dtype=torch.int64, device=device)
    offsets = config.codebook_size * torch.arange(config.num_codebooks, device=device)
    error = 0.0
    for start in range(0, frames.shape[0], CHUNK_ROWS):
        batch = _rows(frames, slice(start, start + CHUNK_ROWS)).to(device)
        codes = quantizer.encode(batch, refine_iters)
        error += float(((quantizer.decode(codes) - batch.float()) / quantizer.feature_std).double().square().sum())
        counts += torch.bincount((codes.long() + offsets).flatten(), minlength=counts.numel()).view_as(counts)
    _, std = _mean_and_std(frames, floor=0.0)
    spread = float((std.double() / quantizer.feature_std.cpu()).square().sum()) * frames.shape[0]
    shares = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-20).log()).sum(dim=1)
    return {
        "frames": frames.shape[0],
        "relative_error": error / max(spread, 1e-20),
        "perplexity": [round(value, 3) for value in entropy.exp().tolist()],
        "used": (counts > 0).sum(dim=1).tolist(),
    }


@torch.no_grad()
def _multiplied_out(quantizer: MultiCodebookQuantizer) -> MultiCodebookQuantizer:
    """Pairs of neighbouring codebooks become one: its centre k * size + l is the sum of the pair's k-th and l-th.

    The classifier's rows are summed alike, so its joint probabilities are the products of the pair's.
    """
    count, size, _ = quantizer.centers.shape
    metadata = asdict(quantizer.config)
    metadata |= {"num_codebooks": count // 2, "codebook_size": size**2}
    product = MultiCodebookQuantizer(**metadata).to(quantizer.centers.device)
    product.load_state_dict(
        quantizer.state_dict()
        | {
            "centers": _sums_of_pairs(quantizer.centers),
            "to_logits.weight": _sums_of_pairs(quantizer.to_logits.weight.view_as(quantizer.centers)).flatten(0, 1),
            "to_logits.bias": _sums_of_pairs(quantizer.to_logits.bias.view(count, size, 1)).flatten(),
        }
    )
    return product.train()


def _sums_of_pairs(rows: Tensor) -> Tensor:
    """(codebooks, size, dim) -> (codebooks / 2, size * size, dim)."""
    return (rows[0::2, :, None] + rows[1::2, None, :]).flatten(1, 2)


@torch.no_grad()
def _initialize(quantizer: MultiCodebookQuantizer, frames: Frames, seed: int) -> None:
    """Centres by k-means, codebook by codebook on what the earlier ones leave over; the classifier starts from them.

    Parameters are as small as `nn.Linear` makes them and the scales make up for it: Adam moves every parameter by
    about its rate, so their size decides how fast centres move, and the method's rates belong to that size. With
    parameters as large as the features a quantiser of MFCCs was 10 % worse after 200 steps a phase.
    """
    count, size, _ = quantizer.centers.shape
    random = keyed_generator(seed, "quantizer initialisation")
    residual = _rows(frames, random.integers(frames.shape[0], size=max(4096, 32 * size)))
    residual = (residual - quantizer.feature_mean) / quantizer.feature_std
    centers = torch.empty_like(quantizer.centers)
    for codebook in range(count):
        centers[codebook], nearest = _k_means(residual, size, random)
        residual = residual - centers[codebook][nearest]
    # The nearest centre has the largest (x . center - |center|^2 / 2) / variance; what is left over is the variance.
    variance = residual.square().sum(dim=1).mean().clamp(min=1e-10)
    bias = -centers.square().sum(dim=2).flatten() / 2
    _set_scaled(quantizer.centers, quantizer.centers_scale, centers)
    _set_scaled(quantizer.to_logits.weight, quantizer.logits_scale, centers.flatten(0, 1) / variance)
    quantizer.to_logits.bias.copy_(bias / variance)


def _set_scaled(parameter: Tensor, scale: Tensor, value: Tensor) -> None:
    size = (3 * value.shape[-1]) ** -0.5  # root mean square of nn.Linear's uniform(-1, 1) / sqrt(dim)
    factor = value.square().mean().sqrt().clamp(min=1e-10) / size
    parameter.copy_(value / factor)
    scale.copy_(factor.log() / SCALE_SPEED)


def _k_means(points: Tensor, size: int, random: np.random.Generator, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """(points, dim) -> centres (size, dim) and the nearest one of every point."""
    centers = points[torch.from_numpy(random.choice(points.shape[0], size, replace=False))]
    for _ in range(rounds):
        nearest = _nearest(points, centers)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        # A centre without points starts again from one of them.
        fresh = points[torch.from_numpy(random.choice(points.shape[0], size, replace=False))]
        centers = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], fresh)
    return centers, _nearest(points, centers)


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return (centers.square().sum(dim=1) - 2 * points @ centers.T).argmin(dim=1)


def _flattened(frames: Frames) -> Frames:
    floating = frames.is_floating_point() if isinstance(frames, Tensor) else np.issubdtype(frames.dtype, np.floating)
    if frames.ndim < 2 or 0 in frames.shape or not floating:
        raise ValueError(
            f"frames must be floating-point numbers (frames, feature_size), not {frames.dtype} {tuple(frames.shape)}."
        )
    return frames.reshape(-1, frames.shape[-1])


def _rows(frames: Frames, index: Any) -> Tensor:
    """Some frames as float32; `index` is a slice or an array of numbers."""
    if isinstance(frames, np.ndarray):
        return torch.from_numpy(np.array(frames[index], dtype=np.float32))
    return frames[index if isinstance(index, slice) else torch.from_numpy(index)].float()


def _mean_and_std(frames: Frames, floor: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Per channel, float32 on CPU. A deviation below `floor` times the mean is that of a constant, and becomes 1."""
    count, dim = frames.shape
    mean = torch.zeros(dim, dtype=torch.float64)
    square = torch.zeros(dim, dtype=torch.float64)
    shift = _rows(frames, slice(0, 1)).cpu().double()  # keeps the sums small where the mean is large
    for start in range(0, count, CHUNK_ROWS):
        rows = _rows(frames, slice(start, start + CHUNK_ROWS)).cpu()
        if not rows.isfinite().all():
            row = start + int((~rows.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"frame {row} of {count} is not finite; find out what the teacher made it of.")
        shifted = rows.double() - shift
        mean += shifted.sum(dim=0)
        square += shifted.square().sum(dim=0)
    mean /= count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    mean = mean + shift[0]
    if floor:
        std = torch.where(std > floor * mean.abs(), std, 1.0)
    return mean.float(), std.float()
