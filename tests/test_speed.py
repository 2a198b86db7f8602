# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf benchmark`: what is timed is right, in turns, and written down whole."""

import csv

import pytest
import torch
from matplotlib.image import imread
from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel
from typer.testing import CliRunner

from spear_hf import SpearConfig, SpearModel
from spear_hf.cli import app
from spear_hf.evaluation import speed as benchmark_module
from spear_hf.evaluation.plots import plot_speed
from spear_hf.evaluation.speed import benchmark, check_parity, parse_cases


TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "stem_channels": [4, 8, 8],
    "num_layers_per_stack": [1, 1],
    "downsampling_factors": [1, 2],
    "conv_kernel_sizes": [7, 5],
}


@pytest.fixture
def tiny(monkeypatch):
    """Encoders that are built in no time in place of those of the base size."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    peers = {
        "wavlm": (WavLMModel, lambda: WavLMConfig(**sizes)),
        "hubert": (HubertModel, lambda: HubertConfig(**sizes)),
    }
    monkeypatch.setattr(benchmark_module, "PEERS", peers)
    monkeypatch.setattr(SpearConfig, "base", classmethod(lambda cls: cls(**TINY)))


def test_cases():
    assert parse_cases("1x10, 4x2.5") == [(1, 10.0), (4, 2.5)]


@pytest.mark.parametrize("text", ["", "10", "ax3", "0x10", "1x0", "1x10,,2x10"])
def test_cases_that_are_none(text):
    with pytest.raises(ValueError, match=r"case|utterance"):
        parse_cases(text)


def test_parity_is_checked_before_anything_is_timed(tiny, monkeypatch):
    """An encoder that computes something else without gradients is not timed."""
    model = SpearModel(SpearConfig(**TINY)).eval()
    waveforms = [torch.randn(60_000, generator=torch.Generator().manual_seed(0))]
    assert check_parity(model, waveforms) <= benchmark_module.TOLERANCE

    def spoil(module, args, output):
        return output if torch.is_grad_enabled() else output * 1.001

    model.stacks[0].register_forward_hook(spoil)
    with pytest.raises(ValueError, match="nothing is timed"):
        check_parity(model, waveforms)
    monkeypatch.setattr(benchmark_module, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="nothing is timed"):
        benchmark()


def test_table_and_chart(tiny, tmp_path):
    table = tmp_path / "speed.csv"
    options = ["--against", "wavlm,hubert", "--cases", "1x0.5,2x0.4", "--repeats", "2", "--threads", "1"]
    result = CliRunner().invoke(app, ["benchmark", "--output", str(table), *options])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    cases = ["1 x 0.5 s"] * 3 + ["2 x 0.4 s"] * 3
    assert [row["case"] for row in rows] == cases
    assert [row["contender"] for row in rows] == ["spear", "wavlm", "hubert"] * 2
    for row in rows:
        spear = next(other for other in rows if other["case"] == row["case"])
        assert float(row["times_spear"]) == pytest.approx(float(row["seconds"]) / float(spear["seconds"]), rel=0.05)
        assert float(row["least_seconds"]) <= float(row["seconds"])
        assert row["repeats"] == "2"
        assert all(row.values())
    assert imread(table.with_suffix(".png")).std() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.csv", "speed.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "whisper"], "unknown encoder whisper"),
        (["--cases", "fast"], "'fast' is not a case"),
        (["--repeats", "0"], "repeats=0"),
        (["--threads", "0"], "threads=0"),
        (["--output", "speed.png"], "ends in .csv"),
    ],
)
def test_bad_options(tiny, tmp_path, options, message):
    result = CliRunner().invoke(app, ["benchmark", "--output", str(tmp_path / "speed.csv"), *options])
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_no_surprise_at_the_end(tiny, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for output, message in (("file/speed.csv", "cannot be written"), ("folder.csv", "ends in .csv")):
        result = CliRunner().invoke(app, ["benchmark", "--output", str(tmp_path / output), "--cases", "1x0.5"])
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert "of audio per second" not in result.output


def test_bars_show_the_rates():
    rows = [
        {"case": case, "contender": name, "audio_per_second": rate, "threads": 2}
        for case, name, rate in [("1 x 10 s", "spear", 20.0), ("1 x 10 s", "wavlm", 6.0), ("1 x 60 s", "spear", 15.0)]
    ]
    axes = plot_speed(rows).axes[0]
    assert [bar.get_height() for bars in axes.containers for bar in bars] == [20.0, 15.0, 6.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 x 10 s", "1 x 60 s"]
    assert "second" in axes.get_ylabel()
    with pytest.raises(ValueError, match="no timings"):
        plot_speed([])
