# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is counted of a step without a GPU: guards of how much it moves through memory, and in how many launches."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import is_torch_greater_or_equal


pytest.importorskip("triton", reason="inductor plans kernels for GPUs with Triton, which is not installed")
EXAMPLES = Path(__file__).parents[1] / "examples"


def counted(script, output):
    subprocess.run([sys.executable, EXAMPLES / script, "--output", output], check=True)
    with output.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_step_moves_less_than_half_of_the_bytes(tmp_path):
    rows = counted("count_gpu_kernels.py", tmp_path / "kernels.csv")
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


@pytest.mark.skipif(not is_torch_greater_or_equal("2.8"), reason="Whiten's products in bfloat16 are of torch 2.8")
def test_balancer_and_whiten_act_in_few_launches_and_in_half_precision(tmp_path):
    rows = counted("count_regularizer_kernels.py", tmp_path / "kernels.csv")
    totals = [row for row in rows if row["kind"] == "all"]
    assert [(row["regularizer"], row["places"]) for row in totals] == 2 * [("balancer", "173"), ("whiten", "134")]
    most = {"balancer": 7, "whiten": 12}  # of channels that are not last in memory, and of a float32 stream
    means = {"balancer": 3.5, "whiten": 10.5}
    for row in rows:
        launches = (means if row in totals else most)[row["regularizer"]] * float(row["acting"])
        assert 0 < float(row["launches"]) <= launches, row["kind"]
        assert float(row["gigabytes"]) > 0
        assert float(row["teraflop_float32"]) == 0.0
    assert float(totals[-1]["teraflop_bfloat16"]) > 0
