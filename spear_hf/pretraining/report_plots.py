# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The figure of `spear-hf report`: everything that a run records, in panels over the optimiser's steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.plots import BLUE, GREEN, GREY, ORANGE, new_figure, running_mean, styled
from .report import RunRecord


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", GREY)  # Okabe and Ito
LINES = ("-", "--", ":", "-.")
COLUMNS = 2
LEGEND: dict[str, Any] = {"fontsize": 9, "frameon": True, "framealpha": 0.8, "edgecolor": "none"}


@dataclass(frozen=True)
class Curve:
    """One metric of a panel."""

    key: str
    label: str
    source: str = "metrics"
    """metrics: a running mean and, of one run alone, the steps; evaluation, probes: joined points."""
    smooth: bool = True
    """Whether a running mean is drawn; not of what changes smoothly."""
    interval: bool = False
    """Whether KEY_low and KEY_high are there."""
    pale: bool = False
    """Something to compare with, in grey."""


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    unit: str
    curves: list[Curve]
    scale: float = 1.0
    logarithmic: bool = False
    by_codebook: dict[str, str] = field(default_factory=dict)
    """Label -> key of a list with an entry for each codebook; drawn instead of curves, at the end of the run."""


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """All panels that some run has values for."""
    teachers = list(dict.fromkeys(name for run in runs for name in run.teachers))
    found: list[Panel] = []
    for name in teachers:
        found.append(
            Panel(
                f"Loss on the {name} tokens",
                "Cross-entropy per codebook (nats)",
                [
                    Curve(f"{name}_masked_loss", "masked, training"),
                    Curve(f"{name}_masked_loss", "masked, held out", "evaluation"),
                    Curve(f"{name}_unmasked_loss", "unmasked, training"),
                    Curve(f"{name}_unigram_loss", "unigram, held out", "evaluation", pale=True),
                ],
            )
        )
        found.append(
            Panel(
                f"Accuracy on masked frames, {name} tokens",
                "Entries predicted correctly (%)",
                [
                    Curve(f"{name}_masked_accuracy", "training"),
                    Curve(f"{name}_masked_accuracy", "held out", "evaluation"),
                    Curve(f"{name}_unigram_accuracy", "unigram, held out", "evaluation", pale=True),
                ],
                scale=100,
            )
        )
        found.append(
            Panel(
                f"The same by domain, {name} tokens",
                "Entries predicted correctly (%)",
                [
                    Curve(f"{name}_masked_accuracy_on_{domain}", f"{domain}, {place}", source)
                    for domain in ("speech", "audio")
                    for place, source in (("training", "metrics"), ("held out", "evaluation"))
                ],
                scale=100,
            )
        )
    found.append(
        Panel(
            "Accuracy by codebook, masked frames",
            "Entries predicted correctly (%)",
            [],
            scale=100,
            by_codebook={name: f"{name}_codebook_accuracy" for name in teachers},
        )
    )
    probes = dict.fromkeys(key for run in runs for record in run.probes for key in record if key.endswith("_accuracy"))
    found += [
        Panel(
            f"Linear probe {key.removesuffix('_accuracy')}",
            "Test accuracy (%)",
            [Curve(key, "all layers", "probes", interval=True)],
            scale=100,
        )
        for key in probes
    ]
    found += [
        Panel("Learning rate", "Rate", [Curve("learning_rate", "", smooth=False)]),
        Panel("Norm of the gradient", "Norm, before clipping", [Curve("grad_norm", "")], logarithmic=True),
        Panel("Norm of the parameters", "Norm", [Curve("parameter_norm", "", smooth=False)]),
        Panel("Audio heard", "Hours", [Curve("hours", "", smooth=False)]),
        Panel("Pace", "Seconds of audio per second", [Curve("audio_seconds_per_second", "")]),
        Panel(
            "Use of the time",
            "%",
            [
                Curve("mfu", "model FLOPs utilisation"),
                Curve("data_wait_share", "waiting for data"),
                Curve("padding_share", "padding"),
            ],
            scale=100,
        ),
        Panel("Memory", "GB", [Curve("memory_mb", "", smooth=False)], scale=1e-3),
    ]
    return [
        panel
        for panel in found
        if any(len(points(run, curve)[0]) for run in runs for curve in panel.curves)
        or any(codebook_values(run, key) for run in runs for key in panel.by_codebook.values())
    ]


def points(run: RunRecord, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve, where there are any."""
    records: list[dict[str, Any]] = getattr(run, curve.source)
    known = [(record["step"], record[curve.key]) for record in records if record.get(curve.key) is not None]
    return (np.array([step for step, _ in known]), np.array([value for _, value in known], dtype=float))


def codebook_values(run: RunRecord, key: str) -> list[float]:
    """Of held-out audio at the end; without validation, the mean over the last hundred steps."""
    rows = [record[key] for record in run.evaluation[-1:] if record.get(key)]
    rows = rows or [record[key] for record in run.metrics[-100:] if record.get(key) and None not in record[key]]
    return np.mean(rows, axis=0).tolist() if rows and None not in rows[-1] else []


@styled
def plot_runs(runs: Sequence[RunRecord]) -> "Figure":
    """All panels, in two columns. Curves of one run differ in colour; of several, runs do and curves in their dash."""
    shown = panels(runs)
    rows = -(-len(shown) // COLUMNS)
    figure, grid = new_figure(rows, (6.2 * COLUMNS, 3.1 * rows), columns=COLUMNS, squeeze=False)
    for axes, panel in zip(grid.flat, shown):
        if panel.by_codebook:
            _draw_codebooks(axes, panel, runs)
        else:
            _draw_curves(axes, panel, runs)
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=COLOURS[place % len(COLOURS)], linewidth=3) for place in range(len(runs))]
        figure.legend(handles, [run.name for run in runs], loc="outside upper center", ncols=min(4, len(runs)))
    return figure


def _draw_curves(axes: "Axes", panel: Panel, runs: Sequence[RunRecord]) -> None:
    drawn = [curve for curve in panel.curves if any(len(points(run, curve)[0]) for run in runs)]
    named: set[str] = set()  # labels; the first run that has a curve, which need not be the first of all, names it
    for number, run in enumerate(runs):
        for place, curve in enumerate(drawn):
            steps, values = points(run, curve)
            if not len(steps):
                continue
            values = values * panel.scale
            several = len(runs) > 1
            colour = COLOURS[number % len(COLOURS)] if several else GREY if curve.pale else COLOURS[place]
            label = curve.label if curve.label and curve.label not in named else None
            if label:
                named.add(label)
            look: dict[str, Any] = {"color": colour, "label": label, "linewidth": 1.8, "ms": 5, "mec": "white"}
            look["marker"] = "o" if len(steps) == 1 or (curve.source != "metrics" and not curve.pale) else ""
            look["linestyle"] = LINES[place % len(LINES)] if several or curve.pale else "-"
            if curve.source == "metrics":
                if curve.smooth and not several:
                    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
                axes.plot(steps, running_mean(values) if curve.smooth else values, **look)
            else:
                axes.plot(steps, values, **look)
            if curve.interval:
                low, high = (
                    points(run, Curve(f"{curve.key}_{end}", "", curve.source))[1] * panel.scale
                    for end in ("low", "high")
                )
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("Optimiser step")
    axes.set_xlim(left=0)
    if panel.logarithmic:
        axes.set_yscale("log")
    elif panel.scale == 100 or panel.unit == "Hours":
        axes.set_ylim(bottom=0)
    if len(drawn) > 1 and named:
        _add_legend(axes, runs)


def _add_legend(axes: "Axes", runs: Sequence[RunRecord]) -> None:
    legend = axes.legend(**LEGEND)
    if len(runs) > 1:
        for line in legend.get_lines():
            line.set_color(GREY)  # the colour is the run's


def _draw_codebooks(axes: "Axes", panel: Panel, runs: Sequence[RunRecord]) -> None:
    place = 0
    named: set[str] = set()
    for number, run in enumerate(runs):
        for order, (label, key) in enumerate(panel.by_codebook.items()):
            values = codebook_values(run, key)
            if not values:
                continue
            several = len(runs) > 1
            look: dict[str, Any] = {
                "color": COLOURS[(number if several else order) % len(COLOURS)],
                "linestyle": LINES[order % len(LINES)] if several else "-",
                "label": None if label in named else label,
            }
            named.add(label)
            axes.plot(
                np.arange(1, len(values) + 1), np.array(values) * panel.scale, marker="o", ms=5, mec="white", **look
            )
            place = max(place, len(values))
    axes.set_xlabel("Codebook")
    axes.set_xlim(0.5, place + 0.5)
    axes.set_xticks(np.arange(1, place + 1, max(1, place // 8)))
    axes.set_ylim(bottom=0)
    if len(panel.by_codebook) > 1 and named:
        _add_legend(axes, runs)
