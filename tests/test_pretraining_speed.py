# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
import csv
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "benchmark_pretraining.py"
SMALL = [
    "model.size=null",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=96",
    "model.config.num_attention_heads=4",
    "model.config.num_layers_per_stack=[1,1,1,1,1,1,1]",
    "model.config.stem_channels=[8,16,32]",
]


@pytest.mark.slow
def test_the_speed_of_the_command_is_measured(tmp_path):
    output = tmp_path / "speed.csv"
    sizes = ["--utterances", "40", "--batch-seconds", "60", "--steps", "4", "--skip", "1", "--workers", "1"]
    for steps in ("4", "5"):
        command = [sys.executable, SCRIPT, *sizes, "--steps", steps, "--settings", *SMALL, "--output", output]
        subprocess.run([str(part) for part in command], check=True)
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["3", "4"]
    for row in rows:
        assert 40 < float(row["batch_seconds"]) <= 60
        heard = 3600 * float(row["batch_seconds"]) / float(row["step_seconds"]) / 3600
        assert 0.5 * heard < float(row["audio_hours_per_hour"]) < 2 * heard
        assert 0 <= float(row["data_wait_share"]) < 1
        assert float(row["mfu"]) > 0
