# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of a pre-training run and of probes. Every function returns a matplotlib Figure; `save_figure` writes it.

matplotlib is imported when a figure is made, and only its Figure and the Agg canvas are used: no window, no state.
"""

import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from ..mvq.atomic_files import NOT_KEPT, write_atomically


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable for the colour-blind and in grey (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name or label is one
}
DPI = 150
FRAMES_PER_SECOND = 100  # of the filter bank


Drawn = TypeVar("Drawn", bound=Callable[..., "Figure"])


def styled(draw: Drawn) -> Drawn:
    """Draws with the style of all plots here, and leaves matplotlib's settings as they were."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return cast(Drawn, wrapper)


def new_figure(
    rows: int = 1, size: tuple[float, float] = (7.0, 4.0), columns: int = 1, **subplots: Any
) -> "tuple[Figure, Any]":
    """A figure with its axes, on the canvas that writes PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **subplots)


def save_figure(figure: "Figure", path: str | os.PathLike) -> Path:
    """Writes a PNG, which appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    write_atomically(path, content.getbuffer(), NOT_KEPT)
    return path


@styled
def plot_losses(
    metrics: Sequence[Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]] = (), teacher: str = "speech"
) -> "Figure":
    """Loss on masked and unmasked frames by step, from the records of metrics.jsonl and evaluation.jsonl.

    The training loss of single batches is thin, its running mean thick; circles are held-out audio.
    """
    if not metrics:
        raise ValueError("There are no metrics to plot: is metrics.jsonl empty?")
    figure, axes = new_figure()
    for kind, colour in (("masked", ORANGE), ("unmasked", BLUE)):
        key = f"{teacher}_{kind}_loss"
        points = [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
        if not points:
            raise ValueError(f"The metrics hold no {key}: they have {', '.join(sorted(metrics[0]))}.")
        steps, losses = np.array(points).T
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(losses), color=colour, linewidth=2, label=f"{kind} frames, training")
        held_out = [(record["step"], record[key]) for record in evaluation if record.get(key) is not None]
        if held_out:
            axes.plot(*np.array(held_out).T, "o", color=colour, mec="white", ms=7, label=f"{kind} frames, held out")
    unigram = [record[f"{teacher}_unigram_loss"] for record in evaluation if record.get(f"{teacher}_unigram_loss")]
    if unigram:
        axes.axhline(unigram[-1], color=GREY, linestyle="--", linewidth=1.5, label="unigram, held out")
    axes.set_title(f"Prediction of the {teacher} tokens")
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel("Cross-entropy per codebook (nats)")
    axes.set_xlim(left=0)
    axes.legend()
    return figure


def running_mean(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Mean over a centred window of `share` of the values.

    It is narrower towards the start, where losses fall fast, and cut off at the end, where single values would show.
    """
    reach = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(places, reach)
    after = np.minimum(before, len(values) - 1 - places)
    return (sums[places + after + 1] - sums[places - before]) / (before + after + 1)


@styled
def plot_masked_accuracy(evaluation: Sequence[Mapping[str, Any]], teacher: str = "speech") -> "Figure":
    """Accuracy on masked and unmasked frames of held-out audio by step, against the unigram baseline."""
    key = f"{teacher}_masked_accuracy"
    records = [record for record in evaluation if record.get(key) is not None]
    if not records:
        raise ValueError(f"There is no {key} to plot: was the run validated (logging.validate_every)?")
    figure, axes = new_figure()
    steps = [record["step"] for record in records]
    for kind, label, colour, marker in (
        ("masked", "masked frames", ORANGE, "o"),
        ("unmasked", "unmasked frames", BLUE, "s"),
        ("unigram", "unigram baseline on the masked frames", GREY, ""),
    ):
        values = [100 * record[f"{teacher}_{kind}_accuracy"] for record in records]
        line = "--" if kind == "unigram" else "-"
        axes.plot(
            steps, values, color=colour, marker=marker, linestyle=line, linewidth=2, mec="white", ms=7, label=label
        )
    axes.set_title(f"Prediction of the {teacher} tokens of held-out audio")
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel("Tokens predicted correctly (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@styled
def plot_probe_layers(
    per_layer: Mapping[str, Sequence[Mapping[str, float]]],
    constants: Mapping[str, Mapping[str, float]],
    title: str,
) -> "Figure":
    """Probe accuracy by layer, with 95 % intervals.

    `per_layer`: feature set -> for every layer, from the stem (0) on, {"accuracy", "low", "high"} as
    `ProbeResult.to_dict` gives them. `constants`: feature sets without layers, drawn as lines across.
    """
    figure, axes = new_figure(size=(7.0, 4.4))
    styles = zip((ORANGE, BLUE, GREEN), ("o", "s", "^"), (-0.07, 0.07, 0.0))
    for (name, results), (colour, marker, shift) in zip(per_layer.items(), styles):
        layers = np.arange(len(results))
        values = np.array([[result[key] for key in ("accuracy", "low", "high")] for result in results]).T * 100
        errors = np.stack([values[0] - values[1], values[2] - values[0]])
        line = {
            "color": colour,
            "marker": marker,
            "linewidth": 2,
            "elinewidth": 1.2,
            "capsize": 3,
            "mec": "white",
            "ms": 7,
        }
        axes.errorbar(layers + shift, values[0], yerr=errors, label=name, **line)
        axes.set_xticks(layers, ["stem", *(str(layer) for layer in layers[1:])])
    for (name, result), colour in zip(constants.items(), (GREY, GREEN)):
        axes.axhline(100 * result["accuracy"], color=colour, linestyle="--", linewidth=1.5, label=name)
        axes.axhspan(100 * result["low"], 100 * result["high"], color=colour, alpha=0.1, linewidth=0)
    axes.set_title(title)
    axes.set_xlabel("Layer")
    axes.set_ylabel("Test accuracy (%)")
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels())))
    names = [*per_layer, *constants]
    axes.legend([drawn[name] for name in names], names, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


@styled
def plot_tokens(
    features: np.ndarray,
    targets: np.ndarray,
    codebook_size: int,
    title: str,
    predicted: np.ndarray | None = None,
    masked: np.ndarray | None = None,
    frame_rate: float = 50.0,
) -> "Figure":
    """A spectrogram with the tokens of its frames below it, a row for every codebook, coloured by token.

    features: log-mel (frames at 100 Hz, bins). targets: tokens (frames at `frame_rate`, codebooks), -100 for none.
    predicted: the model's tokens, of the same shape, drawn below the targets. masked: (frames at 100 Hz,), True where
    the model did not see the spectrogram; these spans are marked in all panels.
    """
    features, targets = np.asarray(features), np.asarray(targets)
    panels = [("Target tokens", np.ma.masked_less(targets, 0))]
    if predicted is not None:
        predicted = np.asarray(predicted)
        if predicted.shape != targets.shape:
            raise ValueError(f"predicted has shape {predicted.shape}, but targets have {targets.shape}.")
        panels.append(("Predicted tokens (white: wrong)", np.ma.masked_where(predicted != targets, predicted)))
    row = min(0.2, 4.0 / targets.shape[1])  # inches
    heights = [2.6, *(max(0.8, row * targets.shape[1]) for _ in panels)]
    figure, axes = new_figure(
        1 + len(panels), (9.0, sum(heights) + 0.5 * len(heights)), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    seconds = len(features) / FRAMES_PER_SECOND
    image = axes[0].imshow(
        features.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, features.shape[1])
    )
    figure.colorbar(image, ax=axes[0], label="Log energy", pad=0.01)
    axes[0].set_ylabel("Mel bin")
    axes[0].set_title(title, pad=9)
    for axis, (label, tokens) in zip(axes[1:], panels):
        codebooks = tokens.shape[1]
        axis.imshow(
            tokens.T,
            aspect="auto",
            cmap=token_colours(codebook_size),
            vmin=0,
            vmax=codebook_size - 1,
            interpolation="nearest",
            extent=(0, len(tokens) / frame_rate, codebooks + 0.5, 0.5),
        )
        axis.set_title(label, pad=9)
        axis.set_ylabel("Codebook")
        axis.set_yticks(np.arange(1, codebooks + 1, -(-codebooks // 4)))
    for axis in axes:
        axis.grid(False)
        if masked is not None:
            _mark_spans(axis, np.asarray(masked, dtype=bool))
    axes[-1].set_xlabel("Time (seconds)" + ("; black bars: masked spans" if masked is not None else ""))
    axes[0].set_xlim(0, seconds)
    return figure


def token_colours(codebook_size: int) -> Any:
    """A colour for every token, shuffled so that neighbouring tokens look different; the same on every call."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    places = np.random.default_rng(0).permutation(codebook_size) / max(1, codebook_size - 1)
    return ListedColormap(colormaps["turbo"](places))


def _mark_spans(axes: "Axes", masked: np.ndarray) -> None:
    """A bar just above the panel over every run of masked frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], masked, [False]]).astype(int))) / FRAMES_PER_SECOND
    inches = axes.get_position().height * axes.get_figure(root=True).get_figheight()  # type: ignore[union-attr]
    for start, stop in zip(edges[::2], edges[1::2]):
        axes.axvspan(start, stop, ymin=1, ymax=1 + 0.06 / inches, color="black", linewidth=0, clip_on=False)


COLOURS = (ORANGE, BLUE, GREEN, GREY, "#CC79A7", "#56B4E9", "#E69F00", "#000000")


@styled
def plot_feature_scores(results: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> "Figure":
    """Scores of feature sets in per cent, with intervals: layers as lines, what has no layers as lines across.

    `results`: representation -> results of the evaluation, as `protocols.Result.to_dict` gives them; of one without
    single layers its first result, the headline, is drawn.
    """
    figure, axes = new_figure(size=(8.0, 4.6))
    for place, (name, items) in enumerate(results.items()):
        colour = COLOURS[place % len(COLOURS)]
        layers = {
            int(item["features"].removeprefix("layer ")): item
            for item in items
            if item["features"].startswith("layer ") and item["head"] in ("linear", "cosine", "none")
        }
        if len(layers) > 1:
            places = sorted(layers)
            rows = [layers[layer] for layer in places]
            values = 100 * np.array([[np.nan if row[key] is None else row[key] for key in _ENDS] for row in rows]).T
            errors = np.stack([values[0] - values[1], values[2] - values[0]])
            shifted = np.array(places) + 0.06 * (place - len(results) / 2)
            axes.errorbar(
                shifted, values[0], yerr=np.abs(errors), color=colour, marker="o", mec="white", capsize=2, label=name
            )
        else:
            axes.axhline(100 * items[0]["value"], color=colour, linestyle="--", linewidth=1.5, label=name)
    axes.set_title(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("Layer (0: what enters the first one)")
    axes.set_ylabel("Test score (%)")
    handles, names = axes.get_legend_handles_labels()
    shown = [shortened(name) for name in names]
    axes.legend(handles, shown, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=9)
    return figure


def shortened(name: str, longest: int = 36) -> str:
    """With its end: of a teacher's options that is where two of one kind differ."""
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"


_ENDS = ("value", "low", "high")


@styled
def plot_layer_weights(weights: Mapping[str, Sequence[float]], title: str) -> "Figure":
    """Learned weights of the layers of one representation or more, as lines."""
    figure, axes = new_figure()
    for place, (name, values) in enumerate(weights.items()):
        colour, label = COLOURS[place % len(COLOURS)], shortened(name)
        axes.plot(range(len(values)), values, color=colour, marker="o", mec="white", label=label)
    axes.set_title(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("Layer (0: what enters the first one)")
    axes.set_ylabel("Weight")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@styled
def plot_confusion(table: Sequence[Sequence[float]], labels: Sequence[str], title: str) -> "Figure":
    """How often clips of a label (row) were given another (column), as shares of the row."""
    counts = np.asarray(table, dtype=np.float64)
    size = max(4.0, 0.35 * len(labels) + 2)
    figure, axes = new_figure(size=(size, size))
    image = axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Share of the label's clips", shrink=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(False)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("Label")
    axes.set_title(title)
    return figure


@styled
def plot_speed(timings: Sequence[Mapping[str, Any]]) -> "Figure":
    """Seconds of audio per second of computing, one group of bars a case: rows of `spear-hf benchmark`."""
    if not timings:
        raise ValueError("There are no timings to plot.")
    cases = list(dict.fromkeys(timing["case"] for timing in timings))
    contenders = list(dict.fromkeys(timing["contender"] for timing in timings))
    width = 0.8 / len(contenders)
    figure, axes = new_figure()
    for place, contender in enumerate(contenders):
        rates = {row["case"]: float(row["audio_per_second"]) for row in timings if row["contender"] == contender}
        offset = (place - (len(contenders) - 1) / 2) * width
        colour = (BLUE, ORANGE, GREEN, GREY)[place % 4]
        bars = axes.bar(
            [index + offset for index, case in enumerate(cases) if case in rates],
            [rates[case] for case in cases if case in rates],
            width,
            color=colour,
            label=contender,
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=9)
    axes.set_xticks(range(len(cases)), cases)
    axes.grid(axis="x", visible=False)
    axes.set_title(f"Encoders of the base size on a CPU, {timings[0]['threads']} threads")
    axes.set_xlabel("Utterances x length")
    axes.set_ylabel("Seconds of audio per second")
    axes.legend()
    return figure
