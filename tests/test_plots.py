# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Plots: files are written, axes are labelled with units, and what is drawn is what was given."""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from spear_hf.evaluation.plots import (
    plot_feature_scores,
    plot_losses,
    plot_masked_accuracy,
    plot_probe_layers,
    plot_tokens,
    running_mean,
    save_figure,
    token_colours,
)


METRICS = [
    {"step": step, "speech_masked_loss": 3 - 0.01 * step, "speech_unmasked_loss": 3 - 0.02 * step}
    for step in range(1, 101)
]
EVALUATION = [
    {
        "step": step,
        "speech_masked_loss": 3 - 0.009 * step,
        "speech_unmasked_loss": 3 - 0.018 * step,
        "speech_unigram_loss": 2.7,
        "speech_masked_accuracy": 0.1 + 0.002 * step,
        "speech_unmasked_accuracy": 0.1 + 0.004 * step,
        "speech_unigram_accuracy": 0.11,
    }
    for step in (50, 100)
]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def check_png(figure, path):
    assert save_figure(figure, path) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing is left of the temporary file
    image = imread(path)
    assert min(image.shape[:2]) > 400
    assert image[..., :3].std() > 0.05  # not one colour


def test_losses(tmp_path):
    figure = plot_losses(METRICS, EVALUATION)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "Optimiser step"
    assert axes.get_ylabel() == "Cross-entropy per codebook (nats)"
    assert "masked frames, held out" in labels(axes)
    assert "unigram, held out" in labels(axes)
    assert np.allclose(axes.lines[0].get_ydata(), [record["speech_masked_loss"] for record in METRICS])
    check_png(figure, tmp_path / "plots" / "loss.png")


def test_losses_without_validation():
    assert "unigram, held out" not in labels(plot_losses(METRICS).axes[0])


def test_steps_without_masked_frames_are_left_out():
    metrics = [*METRICS, {"step": 101, "speech_masked_loss": None, "speech_unmasked_loss": 1.0}]
    assert len(plot_losses(metrics).axes[0].lines[0].get_xdata()) == 100


def test_running_mean_keeps_lines_and_ends_without_a_spike():
    line = np.arange(50.0)
    assert np.allclose(running_mean(line, share=0.2)[:-5], line[:-5])
    flat = np.where(np.arange(200) == 199, 9.0, 1.0)  # the last batch is an odd one
    assert running_mean(flat, share=0.1)[-1] < 2.0
    assert running_mean(np.array([1.0, 5.0, 1.0]))[1] == pytest.approx(7 / 3)


def test_masked_accuracy(tmp_path):
    figure = plot_masked_accuracy(EVALUATION)
    axes = figure.axes[0]
    assert axes.get_ylabel() == "Tokens predicted correctly (%)"
    assert labels(axes) == ["masked frames", "unmasked frames", "unigram baseline on the masked frames"]
    assert np.allclose(axes.lines[0].get_ydata(), [20, 30])
    assert np.allclose(axes.lines[2].get_ydata(), [11, 11])
    assert axes.get_ylim()[0] == 0
    check_png(figure, tmp_path / "accuracy.png")


def test_probe_layers(tmp_path):
    results = [{"accuracy": 0.4 + 0.02 * layer, "low": 0.3, "high": 0.6} for layer in range(8)]
    figure = plot_probe_layers(
        {"pre-trained": results, "random weights": results}, {"log-mel": results[0]}, "Probe of something"
    )
    axes = figure.axes[0]
    assert axes.get_ylabel() == "Test accuracy (%)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["stem", *"1234567"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pre-trained", "random weights", "log-mel"]
    assert axes.get_title(loc="left") == "Probe of something"
    check_png(figure, tmp_path / "probe.png")


@pytest.mark.parametrize("num_codebooks", [1, 16])
def test_tokens(tmp_path, num_codebooks):
    rng = np.random.default_rng(0)
    targets = rng.integers(256, size=(196, num_codebooks))
    targets[-3:] = -100
    predicted = np.where(rng.random(targets.shape) < 0.5, targets, 0)
    masked = np.zeros(400, dtype=bool)
    masked[50:60] = masked[390:] = True
    figure = plot_tokens(rng.normal(size=(400, 128)), targets, 256, "A clip", predicted, masked)
    spectrogram, wanted, guessed = figure.axes[:3]
    assert spectrogram.get_ylabel() == "Mel bin"
    assert wanted.get_ylabel() == guessed.get_ylabel() == "Codebook"
    assert guessed.get_xlabel().startswith("Time (seconds)")
    assert spectrogram.get_xlim() == (0, 4)
    shown = wanted.images[0].get_array()
    assert shown.shape == (num_codebooks, 196)
    assert shown.mask[:, -3:].all()
    assert not shown.mask[:, :-3].any()
    wrong = guessed.images[0].get_array().mask
    assert np.array_equal(wrong, (predicted != targets).T)
    assert len(spectrogram.patches) == 2  # one bar for each masked span
    check_png(figure, tmp_path / "tokens.png")


def test_tokens_alone():
    figure = plot_tokens(np.zeros((100, 128)), np.zeros((46, 4), dtype=int), 16, "A clip")
    assert figure.axes[1].get_xlabel() == "Time (seconds)"


def test_colours_are_the_same_every_time_and_differ():
    colours = token_colours(16)(np.arange(16))
    assert np.array_equal(colours, token_colours(16)(np.arange(16)))
    assert len(np.unique(colours, axis=0)) == 16


def test_settings_of_matplotlib_are_left_alone():
    before = dict(matplotlib.rcParams)
    plot_losses(METRICS)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_losses([]), "no metrics"),
        (lambda: plot_losses([{"step": 1, "loss": 2.0}]), "hold no speech_masked_loss"),
        (lambda: plot_masked_accuracy([]), "was the run validated"),
        (
            lambda: plot_tokens(np.zeros((9, 4)), np.zeros((5, 2)), 16, "A clip", predicted=np.zeros((4, 2))),
            "predicted has shape",
        ),
    ],
)
def test_nothing_to_plot(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_long_names_leave_the_axes_their_room():
    names = [f"teacher:package.module:factory#file=weights.pt,frame_rate=62.5,layer={layer}" for layer in (3, 4)]
    result = {"features": "features", "head": "linear", "value": 0.5, "low": 0.4, "high": 0.6}
    figure = plot_feature_scores({name: [result] for name in names}, "scores")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert axes.get_position().width > 0.8
    legend = axes.get_legend().get_window_extent()
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text[-8:] for text in shown] == [",layer=3", ",layer=4"]
