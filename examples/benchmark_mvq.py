# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Our quantiser against multi_quantization 0.1.1 on features of the bundled audio, on CPU.

    pip install -e ".[dev]"
    python examples/benchmark_mvq.py                  # some minutes; writes model_cards/benchmarks/mvq.csv
    python examples/benchmark_mvq.py --profile        # only says where the encoder's time goes

Encoding: 1024-dimensional frames (8 neighbouring log-mel frames of 128 bins, every 20 ms), 16 codebooks of 256 trained
on other recordings for `--quantizer-steps` a phase, 5 passes of refinement. Both sides have the same parameters; ours
also standardises the frames. Training: both sides train on the same standardised frames for the same number of steps,
and are compared by the relative reconstruction error on other recordings.
"""

import argparse
import csv
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from multi_quantization import Quantizer
from multi_quantization import QuantizerTrainer as TheirTrainer
from torch import Tensor

import spear_hf
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.feature_extraction_spear import SpearFeatureExtractor
from spear_hf.mvq.quantizer import PASSES, MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.training import QuantizerTrainer, QuantizerTrainingConfig, evaluate_quantizer


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "model_cards" / "benchmarks" / "mvq.csv"
STACKED = 8  # log-mel frames of 10 ms in one frame of features
STEP = 2
CODEBOOKS, CODEBOOK_SIZE = 16, 256
BATCH_SIZE = 512
HELDOUT = 10  # every so manieth recording is evaluated on and not trained on
WANTED_RATIO, WANTED_EQUAL, WANTED_ERROR = 30, 0.999, 1.01


def log_mel_frames(waveforms: list[Any]) -> Tensor:
    """(frames, 1024): 8 neighbouring frames of the encoder's own filter bank, every second one."""
    extractor = SpearFeatureExtractor()
    stacked = []
    for waveform in waveforms:
        features = extractor(waveform, sampling_rate=16000, return_tensors="pt")["input_features"][0]
        stacked.append(features.unfold(0, STACKED, STEP).transpose(1, 2).flatten(1))
    return torch.cat(stacked)


def mfcc_frames(waveforms: list[Any]) -> Tensor:
    """(frames, 39)."""
    return torch.cat(load_teacher("kaldi-mfcc")(waveforms))


FEATURES = {"log-mel": log_mel_frames, "kaldi-mfcc": mfcc_frames}


def bundled_frames(name: str, share: int) -> tuple[Tensor, Tensor]:
    """Frames of every `share`-th bundled recording: (to train on, of other recordings), both shuffled."""
    utterances = read_manifest(ROOT / "examples" / "data")[::share]
    waveforms = [load_audio(utterance.path) for utterance in utterances]
    waveforms = [waveform for waveform in waveforms if len(waveform) >= 3200]
    generator = torch.Generator().manual_seed(0)
    parts = []
    for held_out in (False, True):
        chosen = [waveform for place, waveform in enumerate(waveforms) if (place % HELDOUT == 0) == held_out]
        frames = FEATURES[name](chosen)
        parts.append(frames[torch.randperm(len(frames), generator=generator)])
    return parts[0], parts[1]


def standardised(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Tensor:
    return (frames - quantizer.feature_mean) / quantizer.feature_std


def their_quantizer(quantizer: MultiCodebookQuantizer) -> Quantizer:
    """Theirs, with our parameters; it wants standardised frames."""
    config = quantizer.config
    theirs = Quantizer(config.feature_size, config.codebook_size, config.num_codebooks)
    state = {name: value for name, value in quantizer.state_dict().items() if not name.startswith("feature_")}
    theirs.load_state_dict(state | {"id_buf": theirs.id_buf})
    return theirs.requires_grad_(False)


def peak_memory(arguments: tuple[str, str, str, int]) -> float:
    """MiB that one encode needs above what the process held before; to be run in a fresh process."""
    side, folder, frames_path, threads = arguments
    torch.set_num_threads(threads)
    quantizer = MultiCodebookQuantizer.from_pretrained(folder)
    frames = torch.load(frames_path, weights_only=True)
    theirs, inputs = their_quantizer(quantizer), standardised(quantizer, frames)
    before = highest_resident_kib()
    if side == "theirs":
        theirs.encode(inputs, PASSES, as_bytes=False)
    else:
        quantizer.encode(frames)
    return (highest_resident_kib() - before) / 1024


def highest_resident_kib() -> int:
    """Of this process so far. Not `ru_maxrss`: a process takes that over from the one that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measured_memory(side: str, quantizer: MultiCodebookQuantizer, frames: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        quantizer.save_pretrained(Path(folder) / "quantizer")
        torch.save(frames, Path(folder) / "frames.pt")
        task = (side, f"{folder}/quantizer", f"{folder}/frames.pt", torch.get_num_threads())
        return pool.apply(peak_memory, (task,))


def profile(quantizer: MultiCodebookQuantizer, frames: Tensor) -> None:
    """Prints the operations that take most of an encode."""
    quantizer.encode(frames)
    # Operations of helper threads are not in the profile: everything in one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        quantizer.encode(frames)
    torch.set_num_threads(threads)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=36))


def trained_quantizer(steps: int) -> tuple[MultiCodebookQuantizer, Tensor]:
    """A quantiser of the size that the paper uses for speech, and frames of other recordings."""
    frames, heldout = bundled_frames("log-mel", share=3)
    config = QuantizerTrainingConfig(CODEBOOKS, CODEBOOK_SIZE, steps=steps, batch_size=BATCH_SIZE)
    return QuantizerTrainer(config).train(frames), heldout


def benchmark_encoding(quantizer: MultiCodebookQuantizer, frames: Tensor, repeats: int) -> dict[str, Any]:
    started = time.perf_counter()
    codes = quantizer.encode(frames)
    first = time.perf_counter() - started
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        codes = quantizer.encode(frames)
        seconds.append(time.perf_counter() - started)
    ours = statistics.median(seconds)
    theirs, inputs = their_quantizer(quantizer), standardised(quantizer, frames)
    started = time.perf_counter()
    expected = theirs.encode(inputs, PASSES, as_bytes=False)
    their_seconds = time.perf_counter() - started
    report = evaluate_quantizer(quantizer, frames)
    return {
        "part": "encode",
        "features": f"log-mel 128 x {STACKED}",
        "feature_size": frames.shape[1],
        "num_codebooks": CODEBOOKS,
        "codebook_size": CODEBOOK_SIZE,
        "frames": len(frames),
        "passes": PASSES,
        "steps_per_phase": quantizer.config.provenance["training"]["steps"],
        "batch_size": BATCH_SIZE,
        "their_seconds": round(their_seconds, 3),
        "our_seconds": round(ours, 4),
        "our_first_seconds": round(first, 4),
        "ratio": round(their_seconds / ours, 1),
        "equal_codes": round((codes.long() == expected).float().mean().item(), 6),
        "their_peak_mib": round(measured_memory("theirs", quantizer, frames)),
        "our_peak_mib": round(measured_memory("ours", quantizer, frames)),
        "our_error": round(report["relative_error"], 5),
    }


def benchmark_training(features: str, num_codebooks: int, steps: int) -> dict[str, Any]:
    frames, heldout = bundled_frames(features, share=1 if features == "kaldi-mfcc" else 3)
    mean, std = frames.mean(dim=0), frames.std(dim=0)
    std = torch.where(std > 1e-5 * mean.abs(), std, 1.0)
    frames, heldout = (frames - mean) / std, (heldout - mean) / std
    random.seed(0)
    torch.manual_seed(0)
    started = time.perf_counter()
    trainer = TheirTrainer(frames.shape[1], num_codebooks, torch.device("cpu"), steps, steps)
    while not trainer.done():
        trainer.step(frames[torch.randint(len(frames), (BATCH_SIZE,))])
    their_seconds = time.perf_counter() - started
    theirs = MultiCodebookQuantizer.from_multi_quantization(trainer.get_quantizer().state_dict())
    config = QuantizerTrainingConfig(num_codebooks, normalize=False, steps=steps, batch_size=BATCH_SIZE)
    started = time.perf_counter()
    ours = QuantizerTrainer(config).train(frames)
    our_seconds = time.perf_counter() - started
    errors = [evaluate_quantizer(quantizer, heldout)["relative_error"] for quantizer in (theirs, ours)]
    return {
        "part": "train",
        "features": features,
        "feature_size": frames.shape[1],
        "num_codebooks": num_codebooks,
        "codebook_size": CODEBOOK_SIZE,
        "frames": len(frames),
        "passes": PASSES,
        "steps_per_phase": steps,
        "batch_size": BATCH_SIZE,
        "their_seconds": round(their_seconds, 3),
        "our_seconds": round(our_seconds, 3),
        "ratio": round(their_seconds / our_seconds, 1),
        "their_error": round(errors[0], 5),
        "our_error": round(errors[1], 5),
        "error_ratio": round(errors[1] / errors[0], 4),
    }


def setting() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "multi_quantization": importlib.metadata.version("multi_quantization"),
        "spear_hf": spear_hf.__version__,
        "command": "python " + " ".join(["examples/benchmark_mvq.py", *sys.argv[1:]]),
    }


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short of the project's own bounds."""
    found = []
    for row in rows:
        if row["part"] == "encode" and row["ratio"] < WANTED_RATIO:
            found.append(f"{row['ratio']} times faster, {WANTED_RATIO} wanted")
        if row["part"] == "encode" and row["equal_codes"] < WANTED_EQUAL:
            found.append(f"{row['equal_codes']:.4%} equal codes, {WANTED_EQUAL:.1%} wanted")
        if row["part"] == "train" and row["error_ratio"] > WANTED_ERROR:
            found.append(f"{row['features']}: error {row['error_ratio']} times theirs, at most {WANTED_ERROR} wanted")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5, help="of our encode; the median counts")
    parser.add_argument("--quantizer-steps", type=int, default=100, help="a phase, for the quantiser that is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="only profile our encoder")
    parser.add_argument(
        "--training",
        nargs="*",
        default=["kaldi-mfcc:4:400", "kaldi-mfcc:8:200", "log-mel:4:60"],
        metavar="FEATURES:CODEBOOKS:STEPS",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    quantizer, heldout = trained_quantizer(arguments.quantizer_steps)
    frames = heldout[: arguments.frames]
    if arguments.profile:
        profile(quantizer, frames)
        return
    rows = [benchmark_encoding(quantizer, frames, arguments.repeats) | setting()]
    print(json.dumps(rows[-1], indent=1))
    for comparison in arguments.training:
        features, num_codebooks, steps = comparison.split(":")
        rows.append(benchmark_training(features, int(num_codebooks), int(steps)) | setting())
        print(json.dumps(rows[-1], indent=1))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {arguments.output}")
    short = failures(rows)
    if short:
        sys.exit("falls short: " + "; ".join(short))


if __name__ == "__main__":
    main()
