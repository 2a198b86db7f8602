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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from spear_hf.data.seeding import keyed_generator
from spear_hf.mvq.quantizer import PASSES, MultiCodebookQuantizer, QuantizerLosses


INIT = os.environ.get("INIT", "pq")
BETAS = (0.9, 0.98)
EPS = 1e-9
WEIGHT_DECAY = 1e-6


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
    def __init__(self, config, *, metadata=None, device="cpu", progress=True, metrics_path=None):
        self.config = config
        self.metadata = dict(metadata or {})
        self.device = torch.device(device)
        self.progress = progress
        self.metrics_path = metrics_path
        self.quantizer = None

    def train(self, frames):
        config = self.config
        frames = torch.as_tensor(frames)
        frames = frames.reshape(-1, frames.shape[-1])
        root = math.isqrt(config.codebook_size)
        two = root * root == config.codebook_size and root > 1
        K, C = (root, 2 * config.num_codebooks) if two else (config.codebook_size, config.num_codebooks)
        torch.manual_seed(config.seed)
        q = MultiCodebookQuantizer(frames.shape[1], K, C, normalize=config.normalize, **self.metadata)
        if config.normalize:
            q.feature_mean.copy_(frames.float().mean(0))
            q.feature_std.copy_(frames.float().std(0))
        q.to(self.device)
        init(q, frames, config.seed)
        self.hist = []
        for phase in range(1 + two):
            if phase:
                q = _multiplied_out(q)
            self._train_phase(q, frames, phase)
        self.quantizer = q.eval()
        return q

    def _train_phase(self, q, frames, phase):
        config = self.config
        opt = torch.optim.Adam(q.parameters(), lr=config.learning_rate * 0.5**phase, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
        for step in range(config.steps):
            for g in opt.param_groups:
                g["lr"] = config.learning_rate * 0.5 ** (phase + 4 * step // config.steps)
            rng = keyed_generator(config.seed, phase, step)
            idx = torch.from_numpy(rng.integers(len(frames), size=config.batch_size))
            L = q(frames[idx].to(self.device, torch.float32), int(rng.integers(1, 3)))
            L.total.backward()
            opt.step()
            opt.zero_grad()
            self.hist.append([float(v.detach()) for v in L])


@torch.no_grad()
def _multiplied_out(q):
    c = q.config
    n = MultiCodebookQuantizer(c.feature_size, c.codebook_size**2, c.num_codebooks // 2, normalize=c.normalize)
    n.load_state_dict(q.state_dict() | {
        "centers": (q.centers[0::2, :, None] + q.centers[1::2, None]).flatten(1, 2),
        "to_logits.weight": (lambda w: (w[0::2, :, None] + w[1::2, None]).flatten(0, 2))(q.to_logits.weight.view_as(q.centers)),
        "to_logits.bias": (lambda w: (w[0::2, :, None] + w[1::2, None]).flatten(0, 2))(q.to_logits.bias.view(q.centers.shape[:2])),
    })
    return n.to(q.centers.device)


@torch.no_grad()
def kmeans(x, k, iters, rng):
    c = x[torch.from_numpy(rng.choice(len(x), k, replace=False))]
    for _ in range(iters):
        a = (c.square().sum(1) - 2 * x @ c.T).argmin(1)
        s = torch.zeros_like(c).index_add_(0, a, x)
        n = torch.bincount(a, minlength=k)
        c = torch.where((n > 0)[:, None], s / n.clamp(min=1)[:, None], x[torch.from_numpy(rng.choice(len(x), k, replace=False))])
    return c, (c.square().sum(1) - 2 * x @ c.T).argmin(1)


@torch.no_grad()
def init(q, frames, seed):
    if INIT == "ref":
        return
    rng = keyed_generator(seed, "init")
    x = frames[torch.from_numpy(rng.integers(len(frames), size=8192))].float()
    x = q._normalized(x)
    C, K, D = q.centers.shape
    if INIT == "rkm":
        r = x.clone()
        for c in range(C):
            cen, a = kmeans(r, K, 8, rng)
            q.centers[c] = cen
            r -= cen[a]
        q.to_logits.weight.copy_(q.centers.flatten(0, 1) * 2 / r.square().mean(0).sum() * 0.2)
        q.to_logits.bias.copy_(-q.centers.flatten(0, 1).square().sum(1) / r.square().mean(0).sum() * 0.2)
    if INIT == "pq":
        mean = x.mean(0)
        w, v = torch.linalg.eigh(torch.cov((x - mean).T.double()))
        w, v = w.flip(0).clamp(min=1e-12).float(), v.flip(1).float()
        # greedy allocation of eigen directions: balance log-variance
        groups = [[] for _ in range(C)]
        z = (x - mean) @ v
        import heapq
        if D >= C:
            score = [0.0] * C
            per = -(-D // C)
            # rate-based: give each direction to the group with the lowest product
            for d in range(D):
                lw = math.log(w[d] / w[-1]) + 1e-6
                ok = [c for c in range(C) if len(groups[c]) < per]
                c = min(ok, key=lambda c: score[c])
                groups[c].append(d)
                score[c] += lw
        else:
            for c in range(C):
                groups[c].append(c % D)
        for c in range(C):
            g = groups[c]
            cen, a = kmeans(z[:, g], K, 10, rng)
            q.centers[c] = cen @ v[:, g].T + mean / C
            if D < C:
                z[:, g] -= cen[a]
        res = float(sum((z[:, groups[c]].var(0)).sum() for c in range(C)))
        y = q.centers - (q.centers.mean(1, keepdim=True))
        s = 2.0 / w.mean() / D * 5
        q.to_logits.weight.copy_(q.centers.flatten(0, 1) * s)
        q.to_logits.bias.copy_(-q.centers.flatten(0, 1).square().sum(1) * s / 2)


_init0 = init


@torch.no_grad()
def init(q, frames, seed):
    _init0(q, frames, seed)
    if INIT == "ref" or os.environ.get("NOSCALE"):
        return
    C, K, D = q.centers.shape
    target = (3 * D) ** -0.5
    for t, s in ((q.centers, q.centers_scale), (q.to_logits.weight, q.logits_scale)):
        r = float(t.square().mean().sqrt())
        t.mul_(target / r)
        s.fill_(math.log(r / target) / 10)
