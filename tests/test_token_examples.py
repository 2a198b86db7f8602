# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/experiment_tokens.py and examples/benchmark_tokenize.py, in small."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WavLMConfig, WavLMModel

from tests.test_torchscript_teacher import Tagger


ROOT = Path(__file__).parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(name: str) -> list[dict[str, str]]:
    with open(ROOT / "model_cards" / "benchmarks" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_teachers_operations_are_counted_right():
    """On the meta device nothing is computed: WavLM Large's 16 s cost nothing here."""
    benchmark = load("benchmark_tokenize")
    with torch.device("meta"):
        model = WavLMModel(WavLMConfig(**benchmark.WAVLM_LARGE)).eval()
        model.encoder.layers = model.encoder.layers[: benchmark.LAYER]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 16 * 16000))
    assert counter.get_total_flops() / 16e9 == pytest.approx(benchmark.teacher_gflop(16), rel=0.02)


def test_the_calculation_is_in_the_document():
    benchmark = load("benchmark_tokenize")
    products, megabytes = benchmark.encode_cost()
    assert products == pytest.approx(3 * 4.7 * 2 * 50 * 1024 * 4096 / 1e9)
    assert 30 < megabytes < 100
    text = benchmark.document([])
    for name in benchmark.GPUS:
        assert f"| {name} |" in text


def test_the_document_is_what_the_tables_give():
    """And what was written by hand is not lost when the benchmark is run again."""
    benchmark = load("benchmark_tokenize")
    page = benchmark.OUTPUT.with_suffix(".md").read_text(encoding="utf-8")
    made, heading, by_hand = page.partition(benchmark.BY_HAND)
    rows = table("tokenize.csv")
    assert made == benchmark.document(rows)
    assert heading
    # What is said by hand is what the tables have, where they have it.
    encoding = {row["setting"]: float(row["microseconds"] or 0) for row in table("mvq_gpu.csv")}
    wanted = {"what": "inference", "contender": "wavlm-large", "batch": "32"}
    (batch,) = (row for row in table("gpu.csv") if wanted.items() <= row.items())
    theirs, code = 1000 * float(batch["milliseconds"]) / (32 * 499), encoding["5 passes"]
    assert f"| 10 s | {theirs:.1f} | {code:.2f} | {code / theirs:.0%} |".replace("%", " %") in by_hand
    (ours,) = (row for row in rows if row["device"] != "cpu")
    forward, code = (1e6 * float(ours[f"{stage}_seconds"]) / int(ours["frames"]) for stage in ("forward", "encode"))
    assert f"| {forward:.1f} | {code:.2f} | {code / forward:.0%} | no |".replace("%", " %") in by_hand
    assert "| transformers', 24 layers | 2 to 30 s, evenly spread |  | 0.67 | 8 % | yes | gpu.md |" in by_hand
    assert f"takes {encoding['refine']:.2f} (`mvq_gpu.csv`)" in by_hand
    assert f"takes {encoding['1 passes']:.2f}." in " ".join(by_hand.split())


def test_benchmark_of_a_tiny_teacher(tmp_path, monkeypatch):
    benchmark = load("benchmark_tokenize")
    tiny = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [16] * 7}
    monkeypatch.setattr(benchmark, "WAVLM_LARGE", {**benchmark.WAVLM_LARGE, **tiny})
    monkeypatch.setattr(benchmark, "CODEBOOK_SIZE", 16)
    monkeypatch.setattr(benchmark, "LONGEST", 4.0)
    output = tmp_path / "tokenize.csv"
    output.write_text("device,dtype\nsome gpu,bfloat16\n")
    output.with_suffix(".md").write_text(f"old\n{benchmark.BY_HAND}\n\nkept\n")
    arguments = ["benchmark", "--device", "cpu", "--dtype", "float32", "--utterances", "3", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(output)])
    monkeypatch.setattr(benchmark, "document", lambda rows: f"{len(rows)} rows\n")  # the other row is made up
    benchmark.main()
    other, row = csv.DictReader(output.open())
    assert other["device"] == "some gpu"
    assert row["device"] == "cpu"
    assert float(row["audio_seconds"]) == pytest.approx(9.0)
    for stage in benchmark.STAGES:
        assert float(row[f"{stage}_seconds"]) >= 0
    assert float(row["encode_share_of_forward"]) > 0
    assert (tmp_path / "tokenize.md").read_text() == f"2 rows\n{benchmark.BY_HAND}\n\nkept\n"


@pytest.mark.slow
def test_experiment_goes_on_where_it_was(tmp_path):
    """On the bundled audio, with a tiny tagger; the second run computes nothing anew."""
    torch.jit.script(Tagger()).save(str(tmp_path / "tagger.pt"))
    command = [sys.executable, ROOT / "examples" / "experiment_tokens.py", ROOT / "examples" / "data"]
    settings = {"--musicnn": tmp_path / "tagger.pt", "--work": tmp_path / "work", "--output": tmp_path / "out"}
    settings |= {"--hours": 0.05, "--steps": 4, "--batch-size": 64, "--threads": 1}
    command += [str(word) for pair in settings.items() for word in pair] + ["--codebooks", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "tokens.csv").open()))
    assert [(row["num_codebooks"], row["passes"]) for row in rows] == [
        ("", ""),
        *((str(count), str(passes)) for count in (1, 2) for passes in (0, 1, 5)),
    ]
    assert all(0 < float(row["relative_error"]) < 2 for row in rows[1:])
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    text = (tmp_path / "out" / "tokens.md").read_text()
    assert "| 2 | 0.8 | 5 |" in text
    for name in ("tokens.csv", "tokens.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert (tmp_path / "out" / "tokens.png").read_bytes().startswith(b"\x89PNG")

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert again.returncode == 0, again.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert list(csv.DictReader((tmp_path / "out" / "tokens.csv").open())) == rows
    rows_file = json.loads((tmp_path / "work" / "musicnn" / "rows-2.json").read_text())
    assert len(rows_file) == 3
    changed = subprocess.run([*command, "--hours", "0.06"], capture_output=True, text=True, check=False, timeout=600)
    assert changed.returncode != 0
    assert "name another folder --work" in changed.stderr
