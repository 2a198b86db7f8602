# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Heads on frozen features, trained as HEAR does (arXiv 2203.03022, appendix) on SUPERB's weighted sum of layers.

A head standardises its features by the training set, sums the layers with learned weights (a softmax, SUPERB), and
applies a linear layer, or an MLP: linear, batch norm, dropout, ReLU for every hidden layer. Adam, early stopping on
the task's own metric on the validation clips, and the settings of a grid that are best there.

    small   linear: learning rates 1e-2, 1e-3. MLP: one hidden layer of 512, learning rates 1e-3, 3.2e-4.
            At most 150 epochs, validated every 3, until 10 validations bring nothing. The default.
    full    HEAR's: 1 or 2 hidden layers of 1024, learning rates 3.2e-3, 1e-3, 3.2e-4, 1e-4, Xavier initialisation
            uniform or normal, dropout 0.1, 500 epochs, validated every 3, until 20 validations bring nothing. HEAR
            draws 8 of these 16; here all are tried, and in every fold, where HEAR keeps what the first one chose.
            Linear: the same without hidden layers.

For frames there is also SUPERB's head of speech recognition (arXiv 2105.01051): a linear layer, two bidirectional LSTM
layers with dropout 0.2, and the linear layer, for texts at 50 Hz at most (frames of faster features are joined, as in
SUPERB). `full` has its 1024 units to each direction and its learning rate, 1e-4, of 16000 frames a step (SUPERB's are
32 utterances), `small` 256 units, 2048 frames and the learning rate 1e-3. SUPERB trains for 200,000 steps; here it is
epochs and early stopping as above, and no SpecAugment. Clips of like length share a step.

Unlike in the benchmarks features are standardised: layers differ in scale, and their weights would tell of that.
"""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data.seeding import keyed_generator, keyed_seed
from .embedding_cache import EmbeddingCache
from .problems import Problem
from .representations import Representation
from .tasks import Clip


HEADS = ("linear", "mlp", "blstm")
DEFAULT_HEADS = ("linear", "mlp")
GRIDS = ("small", "full")
_ROWS_AT_ONCE = 4096  # of all layers: 0.2 GB for a base model


@dataclass(frozen=True)
class HeadSettings:
    """A point of a grid."""

    hidden_layers: int = 0
    hidden_dim: int = 512
    learning_rate: float = 1e-3
    dropout: float = 0.1
    initialization: str = "uniform"
    """Of the weights, after Xavier: uniform or normal."""
    recurrent: bool = False
    """Whether the hidden layers are bidirectional LSTMs, `hidden_dim` to each direction."""
    batch_rows: int = 1024
    """Clips, or frames of whole clips, in a step."""
    max_epochs: int = 150
    check_every: int = 3
    """Epochs from one validation to the next."""
    patience: int = 10
    """Validations without a gain after which training stops."""


def grid(head: str, size: str) -> list[HeadSettings]:
    """The settings to try for a head."""
    if head not in HEADS or size not in GRIDS:
        raise ValueError(f"head={head!r} and grid={size!r} must be of {', '.join(HEADS)} and of {', '.join(GRIDS)}")
    if head == "blstm":
        dim, rate, rows, patience = (256, 1e-3, 2048, 5) if size == "small" else (1024, 1e-4, 16000, 10)
        return [HeadSettings(2, dim, rate, dropout=0.2, recurrent=True, batch_rows=rows, patience=patience)]
    if size == "small":
        if head == "linear":
            return [HeadSettings(learning_rate=rate) for rate in (1e-2, 1e-3)]
        return [HeadSettings(hidden_layers=1, learning_rate=rate) for rate in (1e-3, 3.2e-4)]
    points = itertools.product(
        (0,) if head == "linear" else (1, 2), (3.2e-3, 1e-3, 3.2e-4, 1e-4), ("uniform", "normal")
    )
    return [
        HeadSettings(layers, 1024, rate, initialization=start, max_epochs=500, patience=20)
        for layers, rate, start in points
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


class Features(ABC):
    """Features of clips: one row a clip, or its frames."""

    lengths: list[int]
    """Rows of each clip."""

    @abstractmethod
    def clip(self, place: int) -> Tensor:
        """float32 (rows, layers, dim) of a clip."""

    def rows(self, places: Sequence[int]) -> Tensor:
        """(rows, layers, dim) of clips, one after the other."""
        return torch.cat([self.clip(place) for place in places])


class PooledFeatures(Features):
    """Of an array (layers, clips, dim), as a rule on disk, copied when they are needed; `places` of its clips, or all.

    `concatenated` layers are one.
    """

    def __init__(self, array: np.ndarray, places: Sequence[int] | None = None, concatenated: bool = False) -> None:
        self.by_clip = array.transpose(1, 0, 2)  # (clips, layers, dim)
        self.places = np.arange(len(self.by_clip)) if places is None else np.asarray(places)
        self.concatenated = concatenated
        self.lengths = [1] * len(self.places)

    @property
    def numbers(self) -> int:
        """How many there are."""
        return len(self.places) * self.by_clip.shape[1] * self.by_clip.shape[2]

    def clip(self, place: int) -> Tensor:
        return self.rows([place])

    def rows(self, places: Sequence[int]) -> Tensor:
        rows = torch.from_numpy(np.ascontiguousarray(self.by_clip[self.places[np.asarray(places)]]))
        return rows.flatten(1)[:, None] if self.concatenated else rows


class FrameFeatures(Features):
    """Of a cache that holds them, read when they are needed; `layer` of all layers, or None for these.

    `joined` frames, one after the other, make a row.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        representation: Representation,
        clips: Sequence[Clip],
        keep: str,
        layer: int | None,
        concatenated: bool = False,
        joined: int = 1,
    ) -> None:
        self.cache, self.representation, self.clips = cache, representation, clips
        self.keep, self.layer, self.concatenated, self.joined = keep, layer, concatenated, joined
        self.lengths = [cache.num_frames(representation, clip, keep) // joined for clip in clips]

    def clip(self, place: int) -> Tensor:
        frames = self.cache.frames(self.representation, self.clips[place], self.keep, self.layer)
        whole = frames[:, : self.lengths[place] * self.joined].reshape(len(frames), self.lengths[place], -1)
        rows = torch.from_numpy(np.ascontiguousarray(whole.transpose(1, 0, 2)))  # (rows, layers, joined * dim)
        return rows.flatten(1)[:, None] if self.concatenated else rows


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


class BidirectionalLstm(nn.Module):
    """As `nn.LSTM` on packed sequences, by padded ones, which are several times as fast on a CPU.

    The backward direction reads every sequence from its own end, so that padding comes last for it too. Rows of
    sequences, one after the other, (rows, inputs) -> (rows, 2 * units); dropout follows every layer.
    """

    def __init__(self, inputs: int, units: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [inputs, *[2 * units] * (layers - 1)]
        self.forwards = nn.ModuleList(nn.LSTM(width, units) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, units) for width in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        padded = pad_sequence(list(rows.split(list(lengths))))  # (longest, sequences, width)
        frames = torch.arange(len(padded), device=rows.device)[:, None]
        ends = torch.tensor(list(lengths), device=rows.device)
        inside = frames < ends  # (longest, sequences)
        mirror = torch.where(inside, ends - 1 - frames, frames)[:, :, None]
        for ahead, back in zip(self.forwards, self.backwards):
            turned = padded.gather(0, mirror.expand_as(padded))
            found, other = ahead(padded)[0], back(turned)[0]
            padded = self.dropout(torch.cat([found, other.gather(0, mirror.expand_as(other))], dim=2))
        return padded.transpose(0, 1)[inside.T]


class Head(nn.Module):
    """(rows, layers, dim) of clips, one after the other, and their lengths -> (rows, outputs).

    `embed` gives what enters the last layer.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, outputs: int, settings: HeadSettings) -> None:
        super().__init__()
        layers, width = mean.shape
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layer_weights = nn.Parameter(torch.zeros(layers)) if layers > 1 else None
        start = nn.init.xavier_uniform_ if settings.initialization == "uniform" else nn.init.xavier_normal_
        hidden: list[nn.Module] = []
        self.recurrent: BidirectionalLstm | None = None
        if settings.recurrent:
            hidden.append(nn.Linear(width, settings.hidden_dim))
            sizes = (settings.hidden_dim, settings.hidden_dim, settings.hidden_layers)
            self.recurrent = BidirectionalLstm(*sizes, settings.dropout)
            width = 2 * settings.hidden_dim
        for index in range(0 if settings.recurrent else settings.hidden_layers):
            linear = nn.Linear(width, settings.hidden_dim)
            start(linear.weight, gain=nn.init.calculate_gain("linear" if index == 0 else "relu"))
            hidden += [linear, nn.BatchNorm1d(settings.hidden_dim), nn.Dropout(settings.dropout), nn.ReLU()]
            width = settings.hidden_dim
        self.hidden = nn.Sequential(*hidden)
        self.projection = nn.Linear(width, outputs)
        start(self.projection.weight, gain=nn.init.calculate_gain("relu" if hidden else "linear"))

    def embed(self, states: Tensor, lengths: Sequence[int]) -> Tensor:
        """(rows, layers, dim) -> (rows, width)."""
        scales = self.scale
        if self.layer_weights is not None:
            scales = scales * self.layer_weights.softmax(dim=0)[:, None]
        # The weighted sum of (states - mean) * scale, layer by layer: to copy all layers would take most of the time.
        summed = -(self.mean * scales).sum(dim=0).expand(len(states), -1)
        for layer, scale in enumerate(scales):
            summed = torch.addcmul(summed, states[:, layer], scale)
        states = self.hidden(summed)
        return states if self.recurrent is None else self.recurrent(states, lengths)

    def forward(self, states: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.projection(self.embed(states, lengths))


def statistics(features: Features) -> tuple[Tensor, Tensor]:
    """Mean of all rows, (layers, dim), and what to multiply by for a standard deviation of 1; 1 for constants."""
    total = squares = torch.zeros(())
    for place in range(len(features.lengths)):
        rows = features.clip(place).double()
        total, squares = total + rows.sum(dim=0), squares + rows.square().sum(dim=0)
    count = sum(features.lengths)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(deviation < 1e-6, 1.0, 1 / deviation.clamp_min(1e-12)).float()


@dataclass(frozen=True)
class Examples:
    """Features with what they are to predict."""

    features: Features
    clips: Sequence[Clip]
    targets: list[Tensor]


@dataclass(frozen=True)
class Trained:
    """The best head of a grid, its score on the validation clips (None without any), and its settings."""

    head: Head
    validation: float | None
    settings: HeadSettings
    epochs: int
    tuning: Any = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        weights = self.head.layer_weights
        return {
            "settings": asdict(self.settings),
            "epochs": self.epochs,
            **({} if self.tuning is None else {"tuning": self.tuning}),
            **({} if weights is None else {"layer_weights": weights.detach().softmax(dim=0).tolist()}),
        }


def train_heads(
    train: Examples,
    valid: Examples | None,
    problem: Problem,
    settings: Sequence[HeadSettings],
    seed: int,
    device: torch.device,
    title: str = "",
    progress: bool = True,
) -> Trained:
    """The best of the heads that `settings` give. Without validation clips the first, after half of its epochs."""
    normal = statistics(train.features)
    if valid is None:
        settings = settings[:1]
    best: Trained | None = None
    for point in tqdm(settings, desc=title, unit="head", leave=False, disable=not progress):
        trained = _train(train, valid, problem, point, normal, seed, device)
        if best is None or (trained.validation or 0.0) > (best.validation or 0.0):
            best = trained
    assert best is not None
    return best


def _train(
    train: Examples,
    valid: Examples | None,
    problem: Problem,
    settings: HeadSettings,
    normal: tuple[Tensor, Tensor],
    seed: int,
    device: torch.device,
) -> Trained:
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(keyed_seed(seed, "head"))
        head = Head(*normal, problem.outputs, settings).to(device)
        optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate)
        epochs = settings.max_epochs if valid is not None else settings.max_epochs // 2
        best, best_state, best_epoch, tuning, waited = -np.inf, None, epochs, problem.tunings[0], 0
        least = np.inf
        for epoch in range(1, epochs + 1):
            head.train()
            for places in _batches(train.features.lengths, settings, seed, epoch):
                optimizer.zero_grad(set_to_none=True)
                lengths = [train.features.lengths[place] for place in places]
                logits = head(train.features.rows(places).to(device), lengths)
                loss = problem.loss(logits, lengths, [train.targets[place].to(device) for place in places])
                loss.backward()
                optimizer.step()
            if valid is None or epoch % settings.check_every:
                continue
            outputs = outputs_of(head, valid.features, device)
            value, chosen = best_tuning(problem, outputs, valid.clips)
            reached = _loss(problem, outputs, valid) if problem.loss_leads else np.inf
            least, waited = (reached, 0) if reached < least else (least, waited + 1)
            if value > best:
                best, tuning, best_epoch, waited = value, chosen, epoch, 0
                best_state = copy.deepcopy(head.state_dict())
            if waited >= settings.patience:
                break
        if best_state is not None:
            head.load_state_dict(best_state)
    return Trained(head.eval(), float(best) if valid is not None else None, settings, best_epoch, tuning)


def _loss(problem: Problem, outputs: list[np.ndarray], examples: Examples) -> float:
    return float(problem.loss(torch.from_numpy(np.concatenate(outputs)), examples.features.lengths, examples.targets))


def best_tuning(problem: Problem, outputs: list[np.ndarray], clips: Sequence[Clip]) -> tuple[float, Any]:
    """The score of the outputs, larger for better, and the post-processing that gives it."""
    found: list[tuple[float, Any]] = []
    for tuning in problem.tunings:
        value = problem.score(outputs, clips, tuning)(np.ones(len(clips), dtype=np.int64))
        found.append((value if problem.higher_is_better else -value, tuning))
    return max(found, key=lambda pair: pair[0])


def _batches(lengths: Sequence[int], settings: HeadSettings, seed: int, epoch: int) -> list[list[int]]:
    """Clips in the order of the epoch, cut where the rows of a batch are enough; none of a single row (batch norm).

    Of recurrent heads clips of like length are together: sorted by their length, give or take a tenth.
    """
    rng = keyed_generator(seed, epoch, "order of clips")
    if not settings.recurrent:
        return _cut(rng.permutation(len(lengths)).tolist(), lengths, settings.batch_rows)
    by_length = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)))
    batches = _cut(by_length.tolist(), lengths, settings.batch_rows)
    return [batches[place] for place in rng.permutation(len(batches)).tolist()]


def _cut(order: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    count = 0
    for place in order:
        if count >= rows:
            batches.append([])
            count = 0
        batches[-1].append(place)
        count += lengths[place]
    if count == 1 and len(batches) > 1:
        batches[-2] += batches.pop()
    return batches


@torch.no_grad()
def outputs_of(head: Head, features: Features, device: torch.device, embed: bool = False) -> list[np.ndarray]:
    """Logits (rows, outputs) of each clip, or what enters the last layer."""
    head.eval()
    function = head.embed if embed else head
    outputs: list[np.ndarray] = []
    places: list[int] = []
    rows = 0
    for place, length in enumerate(features.lengths):
        places.append(place)
        rows += length
        if rows >= _ROWS_AT_ONCE or place == len(features.lengths) - 1:
            lengths = [features.lengths[other] for other in places]
            computed = function(features.rows(places).to(device), lengths).float().cpu()
            outputs += [part.numpy() for part in computed.split(lengths)]
            places, rows = [], 0
    return outputs
