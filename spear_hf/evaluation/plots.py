# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of a pre-training run and of probes. Every function returns a matplotlib Figure; `save_figure` writes it.

matplotlib is imported when a figure is made, and only its Figure and the Agg canvas are used: no window, no state.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


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
}
DPI = 150
FRAMES_PER_SECOND = 100  # of the filter bank


def new_figure(rows: int = 1, size: tuple[float, float] = (7.0, 4.0), **subplots: Any) -> "tuple[Figure, Any]":
    """A figure with axes in the style of all plots here."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, **subplots)
    return figure, axes


def save_figure(figure: "Figure", path: str | os.PathLike) -> Path:
    """Writes a PNG under a temporary name and renames it."""
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with matplotlib.rc_context(STYLE):
        figure.savefig(partial, format="png", dpi=DPI)
    partial.replace(path)
    return path


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
    """Mean over a centred window of `share` of the values, narrower towards the ends."""
    reach = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    near = np.minimum(np.minimum(places, len(values) - 1 - places), reach)
    return (sums[places + near + 1] - sums[places - near]) / (2 * near + 1)


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
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


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
    targets = np.asarray(targets)
    panels = [("Target tokens", targets)]
    if predicted is not None:
        panels.append(("Predicted tokens", np.asarray(predicted)))
        if panels[1][1].shape != targets.shape:
            raise ValueError(f"predicted has shape {panels[1][1].shape}, but targets have {targets.shape}.")
    heights = [3.0, *(max(1.0, 0.22 * targets.shape[1]) for _ in panels)]
    figure, axes = new_figure(
        1 + len(panels), size=(9.0, sum(heights) + 1.0), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    seconds = len(features) / FRAMES_PER_SECOND
    image = axes[0].imshow(
        np.asarray(features).T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, features.shape[1])
    )
    figure.colorbar(image, ax=axes[0], label="Log energy", pad=0.01)
    axes[0].set_ylabel("Mel bin")
    axes[0].set_title(title)
    colours = token_colours(codebook_size)
    for place, (label, tokens) in enumerate(panels, start=1):
        shown = np.ma.masked_less(tokens.T, 0)
        axes[place].imshow(
            shown,
            aspect="auto",
            cmap=colours,
            vmin=0,
            vmax=codebook_size - 1,
            interpolation="nearest",
            extent=(0, len(tokens) / frame_rate, tokens.shape[1] + 0.5, 0.5),
        )
        axes[place].set_title(label)
        axes[place].set_ylabel("Codebook")
        axes[place].set_yticks(np.unique(np.linspace(1, tokens.shape[1], min(tokens.shape[1], 8)).round()))
    for axis in axes:
        axis.grid(False)
        if masked is not None:
            _mark_spans(axis, np.asarray(masked, dtype=bool))
    axes[-1].set_xlabel("Time (seconds)" + ("; marked spans were masked" if masked is not None else ""))
    axes[0].set_xlim(0, seconds)
    return figure


def token_colours(codebook_size: int) -> Any:
    """A colour for every token, shuffled so that neighbouring tokens look different; the same on every call."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    places = np.random.default_rng(0).permutation(codebook_size) / max(1, codebook_size - 1)
    return ListedColormap(colormaps["turbo"](places))


def _mark_spans(axes: "Axes", masked: np.ndarray) -> None:
    """A bar along the top of the panel over every run of masked frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], masked, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2]):
        axes.axvspan(start / FRAMES_PER_SECOND, stop / FRAMES_PER_SECOND, ymin=0.95, color="black", linewidth=0)
