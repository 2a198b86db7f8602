# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/benchmark_token_startup.py, in small."""

import csv
import importlib
import sys
from pathlib import Path

from spear_hf.mvq.store import TokenStore


def test_benchmark_of_few_utterances(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    benchmark = importlib.import_module("benchmark_token_startup")
    # In this process, as others would import everything anew for each part.
    monkeypatch.setattr(benchmark, "measure", lambda corpus, part: benchmark.measured(benchmark.PARTS[part], corpus))
    parts = [part.__name__ for part in benchmark.INSIDE if part not in (benchmark.streamed, benchmark.loaded)]
    table = tmp_path / "table.csv"
    where = ("--folder", tmp_path, "--output", table, "--few", "1100", "--utterances", "2100")
    for label, of in (("now", parts), ("before", parts[:2]), ("now", parts[-1:])):
        options = map(str, (*where, "--label", label, "--parts", ",".join(of)))
        monkeypatch.setattr(sys, "argv", ["benchmark_token_startup.py", *options])
        benchmark.main()
    with table.open(newline="") as file:
        rows = [(row["part"], row["label"], row["utterances"]) for row in csv.DictReader(file)]
    labels = {part: ["now", "before"] if part in parts[:2] else ["now"] for part in parts}
    assert sorted(rows) == sorted((part, label, "2100") for part, of in labels.items() for label in of)
    alone = TokenStore.open(tmp_path / "2100/others")
    merged = TokenStore.open(tmp_path / "2100/merged", teacher="others")
    assert len(alone) == 2100
    assert merged.ids == alone.ids
    assert merged.shard_sizes == [1000, 1000, 100]
