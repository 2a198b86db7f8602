# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Training of the multi-codebook quantiser on frames of features.

Two phases (pretraining.md section 1; the `multi_quantization` package): first twice as many codebooks of sqrt(size)
centres, then every pair of neighbours is multiplied out into one codebook, and training goes on at half the rate.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from spear_hf.data.seeding import keyed_generator
from spear_hf.mvq.quantizer import MultiCodebookQuantizer


BETAS = (0.9, 0.98)
EPS = 1e-9
WEIGHT_DECAY = 1e-6
INIT_FRAMES = 8192
INIT_ITERATIONS = 10  # of k-means
LOG_EVERY = 50


@dataclass(frozen=True)
class QuantizerTrainingConfig:
    """What is trained and for how long; the defaults are the paper's."""

    num_codebooks: int
    """Codes per frame; a power of two (paper: 16 for speech, 8 for audio)."""

    codebook_size: int = 256
    """Centres per codebook. A square trains in two phases, any other number in one."""

    normalize: bool = True
    """Standardise every channel by its mean and standard deviation over the frames (paper: speech yes, audio no)."""

    steps: int = 35_000
    """Steps of each phase."""

    batch_size: int = 1024
    """Frames a step, drawn with replacement."""

    learning_rate: float = 0.005
    """Of the first phase, halved at every quarter of a phase; the second starts at half of it."""

    seed: int = 0
    """Everything drawn at random is a function of this and the step."""


class QuantizerTrainer:
    """Trains a `MultiCodebookQuantizer` on frames of features.

    Args:
        config: what is trained and for how long.
        metadata: fields of QuantizerConfig that say where the features come from (teacher, layer, frame rate, ...).
        device: where training runs.
        progress: show a progress bar.
        metrics_path: JSON lines with step, phase, the losses and the learning rate, every LOG_EVERY steps.
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
        if config.num_codebooks < 1 or config.num_codebooks & (config.num_codebooks - 1):
            raise ValueError(f"num_codebooks must be a power of two, not {config.num_codebooks}.")
        for name in ("codebook_size", "steps", "batch_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}.")
        self.config = config
        self.metadata = dict(metadata or {})
        self.device = torch.device(device)
        self.progress = progress
        self.metrics_path = Path(metrics_path) if metrics_path is not None else None

    def train(self, frames: Tensor | np.ndarray) -> MultiCodebookQuantizer:
        """A trained quantiser of frames (..., feature_size); the same for the same frames, settings and machine.

        ValueError: too few frames to fill a codebook, or values that are not finite.
        """
        config = self.config
        frames = torch.as_tensor(frames)
        frames = frames.reshape(-1, frames.shape[-1])
        if len(frames) < config.codebook_size:
            raise ValueError(f"{len(frames)} frames cannot fill codebooks of {config.codebook_size}; give more.")
        if not torch.isfinite(frames).all():
            raise ValueError("the frames hold values that are not finite; leave these frames out.")
        root = math.isqrt(config.codebook_size)
        two_phases = root * root == config.codebook_size and root > 1
        size, count = (root, 2 * config.num_codebooks) if two_phases else (config.codebook_size, config.num_codebooks)
        quantizer = MultiCodebookQuantizer(frames.shape[1], size, count, normalize=config.normalize, **self.metadata)
        if config.normalize:
            quantizer.feature_mean.copy_(frames.float().mean(dim=0))
            # A channel that never changes is left as it is: it must not be divided by zero.
            deviation = frames.float().std(dim=0, correction=0)
            quantizer.feature_std.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))
        quantizer.to(self.device)
        initialize(quantizer, frames, config.seed)
        with contextlib.ExitStack() as stack:
            log = None
            if self.metrics_path is not None:
                log = stack.enter_context(self.metrics_path.open("w", encoding="utf-8"))
            bar = stack.enter_context(
                tqdm(total=config.steps * (1 + two_phases), desc="quantiser", disable=not self.progress)
            )
            self._run_phase(quantizer, frames, 0, bar, log)
            if two_phases:
                quantizer = multiplied_out(quantizer)
                self._run_phase(quantizer, frames, 1, bar, log)
        return quantizer.eval()

    def _run_phase(
        self, quantizer: MultiCodebookQuantizer, frames: Tensor, phase: int, bar: tqdm, log: IO[str] | None
    ) -> None:
        config = self.config
        rate = config.learning_rate * 0.5**phase
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        started = time.monotonic()
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 ** (4 * step // config.steps)
            draw = keyed_generator(config.seed, phase, step)
            rows = torch.from_numpy(draw.integers(len(frames), size=config.batch_size))
            batch = frames[rows].to(self.device, torch.float32)
            losses = quantizer(batch, int(draw.integers(1, 3)))  # one or two passes of refinement
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if log is not None and (step % LOG_EVERY == 0 or step == config.steps - 1):
                values = {name: round(float(value.detach()), 6) for name, value in losses._asdict().items()}
                record = {"step": phase * config.steps + step + 1, "phase": phase + 1, **values}
                record |= {"learning_rate": group["lr"], "seconds": round(time.monotonic() - started, 3)}
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix_str(f"reconstruction error {values['reconstruction']:.4f}", refresh=False)


@torch.no_grad()
def multiplied_out(quantizer: MultiCodebookQuantizer) -> MultiCodebookQuantizer:
    """Half as many codebooks of squared size: every pair of neighbours becomes all sums of a centre of each."""
    config = quantizer.config
    merged = MultiCodebookQuantizer.from_config(
        replace(config, num_codebooks=config.num_codebooks // 2, codebook_size=config.codebook_size**2)
    ).to(quantizer.centers.device)

    def pair_sums(values: Tensor) -> Tensor:  # (codebooks, size, ...) -> (codebooks / 2, size * size, ...)
        return (values[0::2, :, None] + values[1::2, None]).flatten(1, 2)

    shape = (config.num_codebooks, config.codebook_size)
    state = quantizer.state_dict()
    state["centers"] = pair_sums(state["centers"])
    state["to_logits.weight"] = pair_sums(state["to_logits.weight"].unflatten(0, shape)).flatten(0, 1)
    state["to_logits.bias"] = pair_sums(state["to_logits.bias"].view(shape)).flatten()
    merged.load_state_dict(state)
    return merged


@torch.no_grad()
def initialize(quantizer: MultiCodebookQuantizer, frames: Tensor, seed: int) -> None:
    """Starts every codebook from k-means in its own share of the principal directions, as product quantisation does.

    The directions are dealt out so that all codebooks get about the same product of variances. The classifier starts
    as a softened nearest-centre rule. A random start needs thousands of steps to get where this begins.
    """
    draw = keyed_generator(seed, "initialisation")
    sample = frames[torch.from_numpy(draw.integers(len(frames), size=INIT_FRAMES))].to(quantizer.centers.device)
    sample = quantizer._normalized(sample.float())
    count, size, dim = quantizer.centers.shape
    mean = sample.mean(dim=0)
    variances, directions = torch.linalg.eigh(torch.cov((sample - mean).T.double()))
    variances = variances.flip(0).clamp(min=1e-12).float()
    directions = directions.flip(1).float()
    shares: list[list[int]] = [[] for _ in range(count)]
    scores = [0.0] * count
    for direction in range(max(dim, count)):
        open_shares = [c for c in range(count) if len(shares[c]) < -(-dim // count)]
        lowest = min(open_shares, key=lambda c: scores[c])
        shares[lowest].append(direction % dim)
        scores[lowest] += math.log(float(variances[direction % dim] / variances[-1])) + 1e-6
    projected = (sample - mean) @ directions
    for codebook, share in enumerate(shares):
        found, nearest = k_means(projected[:, share], size, draw)
        quantizer.centers[codebook] = found @ directions[:, share].T + mean / count
        if dim < count:  # directions that several codebooks share: the next one gets what this one leaves
            projected[:, share] -= found[nearest]
    sharpness = 10.0 / (float(variances.mean()) * dim)
    centers = quantizer.centers.flatten(0, 1)
    quantizer.to_logits.weight.copy_(centers * sharpness)
    quantizer.to_logits.bias.copy_(centers.square().sum(dim=1) * (-sharpness / 2))
    # Adam's steps have one size for all parameters: the scales take over the size of the values, and leave them that
    # of a usual initialisation.
    usual = (3 * dim) ** -0.5
    for values, scale in (
        (quantizer.centers, quantizer.centers_scale),
        (quantizer.to_logits.weight, quantizer.logits_scale),
    ):
        size_now = float(values.square().mean().sqrt())
        if size_now > 0:
            values.mul_(usual / size_now)
            scale.fill_(math.log(size_now / usual) / 10)


def k_means(points: Tensor, count: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Centres (count, dim) of points (n, dim) and the nearest centre of each; empty clusters restart at a point."""

    def some_points(number: int) -> Tensor:
        return points[torch.from_numpy(draw.integers(len(points), size=number))]

    centers = some_points(count)
    for _ in range(INIT_ITERATIONS):
        nearest = (centers.square().sum(dim=1) - 2 * points @ centers.T).argmin(dim=1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), some_points(count))
    return centers, (centers.square().sum(dim=1) - 2 * points @ centers.T).argmin(dim=1)
