# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Long audio in windows: how far the result is from that of the whole, and the peak memory of half an hour.

    python examples/benchmark_windows.py --threads 1            # writes model_cards/benchmarks/windows.csv

The audio is that of `examples/data`, one clip after the other; the encoder has random weights of the base size, or is
`--model`. Deviations are norms of the difference over those of the state: of the last hidden state, of the worst
layer, and of the worst frame of the last hidden state. The peak is that of the whole process of
`spear-hf embed --window-seconds W --max-seconds 3600`, as the system counts it (ru_maxrss, VmHWM).
"""

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.data.audio import load_audio
from spear_hf.evaluation.windows import CONTEXT_SECONDS, encode_in_windows


ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"
OUTPUT = ROOT / "model_cards" / "benchmarks" / "windows.csv"
RATE = 16000


def audio(seconds: int) -> np.ndarray:
    rows = map(json.loads, (DATA / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
    parts: list[np.ndarray] = []
    for path in sorted({row["path"] for row in rows}):
        parts.append(load_audio(DATA / path))
        if sum(map(len, parts)) >= seconds * RATE:
            break
    return np.concatenate(parts)[: seconds * RATE]


@torch.no_grad()
def deviations(model: SpearModel, seconds: int, windows: list[int], contexts: list[float]) -> list[dict[str, Any]]:
    extractor = SpearFeatureExtractor(feature_size=model.config.num_mel_bins)
    features = extractor(audio(seconds), sampling_rate=RATE, return_tensors="pt")["input_features"]
    whole = model(features, output_hidden_states=True)
    rows = []
    for window in windows:
        for context in contexts:
            parts = encode_in_windows(model, features, window, context, output_hidden_states=True)
            layers = [(one - other).norm() / other.norm() for one, other in zip(parts[1], whole[1])]
            difference, state = parts.last_hidden_state - whole.last_hidden_state, whole.last_hidden_state
            values = {
                "deviation": difference.norm() / state.norm(),
                "worst_layer": max(layers),
                "worst_frame": (difference.norm(dim=-1) / state.norm(dim=-1)).max(),
            }
            row = {"audio_seconds": seconds, "window_seconds": window, "context_seconds": context}
            rows.append(row | {name: f"{float(value):.2e}" for name, value in values.items()})
            print(rows[-1], flush=True)
    return rows


def peak_of_embedding(folder: Path, seconds: int, window: int) -> dict[str, Any]:
    soundfile.write(folder / "long.wav", audio(seconds), RATE)
    options = ["--max-seconds", "3600", "--window-seconds", str(window), "--device", "cpu"]
    command = [sys.executable, "-m", "spear_hf.cli", "embed", str(folder / "long.wav"), "--model", str(folder)]
    subprocess.run([*command, "--output", str(folder / "embeddings.safetensors"), *options], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the only child
    row = {"audio_seconds": seconds, "window_seconds": window, "context_seconds": CONTEXT_SECONDS}
    return row | {"peak_mib": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: random weights of the base size")
    parser.add_argument("--seconds", type=int, default=150, help="of what is compared with the whole")
    parser.add_argument("--windows", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--contexts", type=float, nargs="+", default=[0.0, 5.0, 10.0])
    parser.add_argument("--long-seconds", type=int, default=1800, help="of what is embedded; 0: nothing")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = SpearModel.from_pretrained(arguments.model) if arguments.model else SpearModel(SpearConfig.base())
    rows = deviations(model.eval(), arguments.seconds, arguments.windows, arguments.contexts)
    if arguments.long_seconds:
        with tempfile.TemporaryDirectory() as name:
            model.save_pretrained(name)
            rows.append(peak_of_embedding(Path(name), arguments.long_seconds, arguments.windows[0]))
    same = {
        "weights": Path(arguments.model).name if arguments.model else "random, base size",
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": str(torch.__version__),
        "command": " ".join(["python", "examples/benchmark_windows.py", *sys.argv[1:]]),
    }
    fields = ["audio_seconds", "window_seconds", "context_seconds", "deviation", "worst_layer", "worst_frame"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*fields, "peak_mib", *same], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | same for row in rows)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
