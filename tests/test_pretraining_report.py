# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The report states what the records hold, of one run and of several, finished or not."""

import json
import math
import warnings
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.config_loading import to_plain
from spear_hf.pretraining.report import read_run, report_text
from spear_hf.pretraining.report_plots import panels, plot_runs


def write_run(folder: Path, *overrides: str, steps: int = 40, validated: bool = True, skip: int | None = None) -> Path:
    folder.mkdir(parents=True)
    config = load_config("tiny", [f"output_dir={folder}", f"max_steps={steps}", *overrides])
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    metrics, evaluation, probes = [], [], []
    for step in range(1, steps + 1):
        loss = 4 * math.exp(-step / 40)
        record = {
            "step": step, "loss": loss, "speech_loss": 2 * loss, "speech_masked_loss": 2 * loss,
            "speech_unmasked_loss": 1.5 * loss, "speech_masked_accuracy": 0.25, "speech_unmasked_accuracy": 0.5,
            "speech_masked_accuracy_on_speech": 0.2, "speech_masked_accuracy_on_audio": 0.3,
            "speech_codebook_accuracy": [0.2, 0.3], "learning_rate": 1e-3, "grad_norm": 2.0, "parameter_norm": 20.0,
            "padding_share": 0.03, "hours": step / 100, "epoch": step / 10, "step_seconds": 0.5,
            "audio_seconds_per_second": 40.0, "data_wait_share": 0.1, "mfu": 0.2, "memory_mb": 1234.0,
        }  # fmt: skip
        if step == skip:
            record |= {"loss": None, "skipped": [{"rank": 1, "utterances": ["bad-one"]}]}
        metrics.append(record)
        if validated and step % 10 == 0:
            held_out = {name: value for name, value in record.items() if name.startswith("speech_")} | {
                "speech_masked_accuracy": 0.23,
                "speech_unigram_accuracy": 0.1,
                "speech_unigram_loss": 4.0,
            }
            evaluation.append({"step": step, **held_out})
            probe = {"words_accuracy": 0.5, "words_accuracy_low": 0.4, "words_accuracy_high": 0.6}
            probes.append({"step": step, **probe})
    for name, records in (("metrics", metrics), ("evaluation", evaluation), ("probes", probes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_one_run(tmp_path):
    folder = write_run(tmp_path / "mine", skip=7)
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    path = folder / "report" / "report.md"
    assert result.output.strip() == str(path)
    text = path.read_text()
    assert cells(text, "steps") == ["40 of 40"]
    assert cells(text, "audio heard") == ["0.40 hours, 4.0 epochs"]
    assert cells(text, "speech: masked accuracy, held out") == ["23.0 %"]
    assert cells(text, "speech: the same on audio") == ["30.0 %"]
    assert cells(text, "speech: worst to best codebook, held out") == ["20.0 % to 30.0 %"]
    assert cells(text, "probe words") == ["50.0 % (40.0 % to 60.0 %)"]
    assert cells(text, "MFU") == ["20.0 %"]
    assert cells(text, "steps without an update") == ["1"]
    assert "| mine | 7 | rank 1: bad-one |" in text
    assert float(cells(text, "loss, training")[0]) == pytest.approx(4 * math.exp(-39.5 / 40), abs=1e-3)
    image = imread(folder / "report" / "report.png")
    assert image[..., :3].std() > 0.05
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["report.md", "report.png"]


def test_several_runs_are_compared(tmp_path):
    folders = [
        write_run(tmp_path / "a" / "same"),
        write_run(tmp_path / "b" / "same", "optimizer.learning_rate=3e-3", "seed=1", validated=False),
    ]
    refused = CliRunner().invoke(app, ["report", *map(str, folders)])
    assert refused.exit_code == 1
    assert "name it with --output" in refused.output
    result = CliRunner().invoke(app, ["report", *map(str, folders), "--output", str(tmp_path / "compared")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "compared" / "report.md").read_text()
    assert "| | same (1) | same (2) |" in text.replace("|  |", "| |")
    assert cells(text, "`optimizer.learning_rate`") == ["0.002", "0.003"]
    assert cells(text, "`seed`") == ["0", "1"]
    assert "output_dir" not in text
    assert cells(text, "speech: masked accuracy, held out") == ["23.0 %", ""]
    runs = [read_run(folder) for folder in folders]
    figure = plot_runs(runs)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Linear probe words" in titles
    loss = figure.axes[titles.index("Loss on the speech tokens")]
    colours = {line.get_color() for line in loss.lines}
    assert len(colours) == 2  # one for each run
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["same", "same"]


def test_a_run_that_has_just_begun(tmp_path):
    folder = write_run(tmp_path / "young", steps=1, validated=False)
    run = read_run(folder)
    titles = [panel.title for panel in panels([run])]
    assert "Learning rate" in titles
    assert not [title for title in titles if title.startswith("Linear probe")]
    plot_runs([run])
    assert cells(report_text([run]), "steps") == ["1 of 1"]


def test_what_is_no_run_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not the folder of a run" in result.output
    folder = write_run(tmp_path / "empty", steps=1)
    (folder / "metrics.jsonl").write_text("")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert "has recorded no step yet" in result.output
    (folder / "config.yaml").write_text("name: something else\n")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert "its config.yaml names no targets" in result.output


def test_every_curve_is_drawn_and_named(tmp_path):
    """Of a run of one validation, too, whose curves are points."""
    run = read_run(write_run(tmp_path / "run"))
    for several in ([run], [run, run]):
        loss = plot_runs(several).axes[0]
        assert [text.get_text() for text in loss.get_legend().get_texts()] == [
            "masked, training",
            "masked, held out",
            "unmasked, training",
            "unigram, held out",
        ]
    del run.evaluation[1:]
    assert all(line.get_marker() == "o" for line in plot_runs([run]).axes[0].lines if len(line.get_xdata()) == 1)


def test_a_curve_that_the_first_run_lacks_is_in_the_legend(tmp_path):
    """And nothing is warned of where only the second has any."""
    runs = [read_run(write_run(tmp_path / "new", steps=1, validated=False)), read_run(write_run(tmp_path / "old"))]
    for run in runs[:1]:
        run.metrics[0].pop("speech_codebook_accuracy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_runs(runs)
    named = {text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()}
    alone = plot_runs(runs[1:])
    assert named >= {
        text.get_text() for axes in alone.axes if axes.get_legend() for text in axes.get_legend().get_texts()
    }
