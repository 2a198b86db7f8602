# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `examples/count_gpu_kernels.py` counts: a guard of how much a compiled step moves through memory."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="inductor plans kernels for GPUs with Triton, which is not installed")
SCRIPT = Path(__file__).parents[1] / "examples" / "count_gpu_kernels.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_step_moves_less_than_half_of_the_bytes(tmp_path):
    output = tmp_path / "kernels.csv"
    subprocess.run([sys.executable, SCRIPT, "--output", output], check=True)
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = {mode: {row["part"]: row for row in rows if row["mode"] == mode} for mode in ("eager", "compiled")}
    assert parts["eager"].keys() == parts["compiled"].keys()
    for name, eager in parts["eager"].items():
        compiled = parts["compiled"][name]
        assert eager["times"] == compiled["times"]
        few_bytes = 0.5 if name.startswith("combination") else 0.44
        assert 0 < float(compiled["gigabytes"]) < few_bytes * float(eager["gigabytes"]), name
        # Of averaged frames and the stem some are small: sums in two stages, so that all of the device takes part.
        few = 0.6 if name.startswith(("layer", "combination")) else 0.7
        assert 0 < int(compiled["kernels"]) < few * int(eager["kernels"]), name
