# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/benchmark_startup.py, in small."""

import importlib.util
import sys
import time
from pathlib import Path

from spear_hf.mvq.store import TokenStore


def test_benchmark_of_few_utterances(tmp_path):
    path = Path(__file__).parents[1] / "examples" / "benchmark_startup.py"
    spec = importlib.util.spec_from_file_location("benchmark_startup", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    stores = benchmark.Stores(tmp_path / "stores")
    stores.write(2100)
    opened = {place: TokenStore.open(place, any_teacher=True) for place in (stores.speech, stores.audio, stores.both)}
    assert all(store.ids == opened[stores.speech].ids and len(store) == 2100 for store in opened.values())
    opened[stores.both].waveform(opened[stores.both].ids[0])
    assert TokenStore.open(stores.tokens, allow_incomplete=True).shard_sizes == [1000]
    small = benchmark.Stores(tmp_path / "index")
    small.write_index(2100)
    assert TokenStore.open(small.both, teacher="audio").ids == opened[stores.both].ids
    found = benchmark.inside(small)
    assert tuple(found) == benchmark.INSIDE
    assert all(0 <= seconds < 60 and 0 <= processor < 60 and peak > 10 for seconds, processor, peak in found.values())
    # Busy first, for longer than the ticks that processor time is counted in.
    script = f"import time; sum(range(10**7)); open({str(tmp_path / 'there')!r}, 'w'); time.sleep(60)"
    started = time.perf_counter()
    seconds, processor, peak = benchmark.until([sys.executable, "-c", script], (tmp_path / "there").exists)
    assert 0.05 < processor <= seconds + 0.1
    assert time.perf_counter() - started < 30, "it is ended where something is reached"
    assert peak > 1
