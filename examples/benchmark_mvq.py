# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding speed against the `multi_quantization` package, in one process on the CPU.

    python examples/benchmark_mvq.py --output model_cards/benchmarks/mvq.csv

1,000 frames of 1,024 channels, 16 codebooks of 256, 5 refinement passes. The frames are synthetic (64 random factors
and noise), the quantiser is trained on them for a few steps, and both encoders hold the same parameters. Codes are
compared before anything is timed; the contenders alternate. Exit code 1 unless ours is 30 times faster with 99.9 %
equal codes.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from multi_quantization import Quantizer

from spear_hf.mvq.training import QuantizerTrainer, QuantizerTrainingConfig


DIM, CODEBOOKS, SIZE, FRAMES, PASSES = 1024, 16, 256, 1000, 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/benchmarks/mvq.csv"))
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each")
    parser.add_argument("--steps", type=int, default=20, help="training steps of each phase")
    arguments = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, DIM, generator=generator) / 8
    noise = 0.3 * torch.randn(8192, DIM, generator=generator)
    frames = torch.randn(8192, 64, generator=generator) @ mixing + noise
    settings = QuantizerTrainingConfig(CODEBOOKS, SIZE, normalize=False, steps=arguments.steps)
    ours = QuantizerTrainer(settings).train(frames)
    theirs = Quantizer(DIM, SIZE, CODEBOOKS)
    identity = {"id_buf": theirs.state_dict()["id_buf"]}
    theirs.load_state_dict({**{name: value.detach() for name, value in ours.named_parameters()}, **identity})

    probe = frames[:FRAMES]
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    with torch.no_grad():
        equal = float(
            (ours.encode(probe, PASSES).long() == theirs.encode(probe, PASSES, as_bytes=False)).double().mean()
        )
        print(f"equal codes: {equal:.4%}")
        for _ in range(arguments.runs):
            start = time.perf_counter()
            theirs.encode(probe, PASSES, as_bytes=False)
            middle = time.perf_counter()
            ours.encode(probe, PASSES)
            seconds["theirs"].append(middle - start)
            seconds["ours"].append(time.perf_counter() - middle)
    slow, fast = (statistics.median(seconds[name]) for name in ("theirs", "ours"))
    row = {
        "frames": FRAMES,
        "dim": DIM,
        "codebooks": CODEBOOKS,
        "codebook_size": SIZE,
        "passes": PASSES,
        "theirs_seconds": round(slow, 3),
        "ours_seconds": round(fast, 4),
        "ratio": round(slow / fast, 1),
        "equal_codes": round(equal, 6),
        "runs": arguments.runs,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": version("torch"),
        "multi_quantization": version("multi_quantization"),
        "command": "python examples/benchmark_mvq.py",
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    print(*(f"{name}: {value}" for name, value in row.items()), sep="\n")
    return 0 if row["ratio"] >= 30 and equal >= 0.999 else 1


if __name__ == "__main__":
    sys.exit(main())
