# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of `spear-hf pretrain` itself, on one device: audio-hours an hour and MFU, from audio files to updates.

    python examples/benchmark_pretraining.py --output model_cards/benchmarks/pretraining_speed.csv

A shipped configuration, by default the paper's recipe with its regularisers and mixing, on FLAC files of noise of 2 to
30 s with random tokens, decoded once and kept in memory. `--settings` is anything that `--set` takes. The first steps,
in which layers are compiled and files decoded, are left out. A row has the medians of the other steps, as the run's
metrics.jsonl tells them, but for `audio_hours_per_hour`: all the audio of these steps over all their time.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import spear_hf
from spear_hf.mvq.store import StoreInfo, TokenRow, TokenStoreWriter


RATE = 16000
SHORTEST, LONGEST = 2.0, 30.0  # seconds
CODEBOOKS, CODEBOOK_SIZE, FRAME_RATE = 16, 256, 50.0


def write_corpus(folder: Path, count: int) -> None:
    """`manifest.jsonl` of `count` files, lengths evenly spread, and `tokens`, a store of random ones."""
    lengths = np.random.default_rng(0).permutation(np.linspace(SHORTEST, LONGEST, count))
    (folder / "audio").mkdir()

    def write(number: int) -> tuple[dict[str, Any], TokenRow]:
        rng = np.random.default_rng(number)
        samples = int(lengths[number] * RATE)
        path = folder / "audio" / f"{number:06d}.flac"
        soundfile.write(path, 0.05 * rng.standard_normal(samples), RATE)
        codes = rng.integers(0, CODEBOOK_SIZE, (round(samples / RATE * FRAME_RATE), CODEBOOKS), dtype=np.uint8)
        line = {"id": path.stem, "path": str(path), "num_samples": samples, "domain": "speech"}
        return line, TokenRow(path.stem, codes, samples, domain="speech")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines, rows = zip(*pool.map(write, range(count)))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    info = StoreInfo(CODEBOOKS, CODEBOOK_SIZE, FRAME_RATE, "random", None, "random")
    writer = TokenStoreWriter(folder / "tokens", info)
    writer.write_shard(0, list(rows))
    writer.finish()


def run(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The metrics of every step."""
    settings = {
        "output_dir": folder / "run",
        "max_steps": arguments.steps,
        "checkpoint_every": arguments.steps,
        "data.manifest": folder / "manifest.jsonl",
        "data.batch_seconds": arguments.batch_seconds,
        "targets.speech.store": folder / "tokens",
        "execution.batch_seconds_per_device": arguments.batch_seconds,
        "mixing.noise_manifest": folder / "audio",
        "execution.cache_audio": "true",
        "execution.num_workers": arguments.workers,
        "logging.validate_every": 0,
        "logging.trackers": "[]",
    }
    given = [f"{name}={value}" for name, value in settings.items()] + arguments.settings
    command = [sys.executable, "-m", "spear_hf.cli", "pretrain", "--config", arguments.config, "--set", *given]
    subprocess.run(command, check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summary(steps: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    timed = steps[arguments.skip :]
    seconds = sum(step["step_seconds"] for step in timed)
    on_gpu = torch.cuda.is_available()

    def median(name: str) -> float:
        return round(statistics.median(step[name] for step in timed), 4)

    return {
        "config": arguments.config,
        "settings": " ".join(arguments.settings),
        "batch_seconds": median("batch_seconds"),
        "steps": len(timed),
        "step_seconds": median("step_seconds"),
        "audio_hours_per_hour": round(sum(step["batch_seconds"] for step in timed) / seconds, 1),
        "mfu": median("mfu"),
        "data_wait_share": median("data_wait_share"),
        "padding_share": median("padding_share"),
        "memory_mb": max(step["memory_mb"] for step in timed),
        "first_step_seconds": steps[0]["step_seconds"],
        "device": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "spear_hf": spear_hf.__version__,
        **{name: version(name) for name in ("torch", "transformers")},
        "command": "python " + " ".join(["examples/benchmark_pretraining.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--config", default="base-speech", help="one with speech alone")
    parser.add_argument("--settings", nargs="*", default=["execution.compile=true"], help="as of --set")
    parser.add_argument("--utterances", type=int, default=1500)
    parser.add_argument("--batch-seconds", type=float, default=1200.0, help="of a step, at once on the device")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=20, help="steps that do not count")
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    if not 0 < arguments.skip < arguments.steps:
        parser.error(f"--skip={arguments.skip} must be positive and less than --steps={arguments.steps}")
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), arguments.utterances)
        row = summary(run(Path(name), arguments), arguments)
    print(json.dumps(row, indent=1))
    if arguments.output is None:
        return
    rows = []
    if arguments.output.exists():
        with arguments.output.open(newline="", encoding="utf-8") as file:
            rows = [kept for kept in csv.DictReader(file) if kept["command"] != row["command"]]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
