# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Throughput of tokenising: a teacher of WavLM Large's architecture (random weights), 16 codebooks, mixed lengths.

    python examples/benchmark_tokenize.py                                  # writes model_cards/benchmarks/tokenize.csv
    python examples/benchmark_tokenize.py --device cuda --dtype bfloat16 --utterances 2000 --batch-seconds 600
    python examples/benchmark_tokenize.py --profile                        # only says where the time goes

Utterances of 2 to 30 s, evenly spread, as FLAC files. Each stage is timed alone, one after the other: decode (one
thread), front end (from waveforms to the model's input and back, the teacher less its forward pass), forward, encode
(5 passes) and write. Then `tokenize_corpus` does all of it, with decoding ahead in threads: `audio_hours_per_hour` is
of that. Random weights and centres cost what trained ones do, but for the search of the codes, which ends sooner where
codes settle sooner.

tokenize.md beside the table says what the table holds, and works out from operations and bytes what is to be expected
on GPUs that nothing was measured on. What was written by hand, from BY_HAND on, is kept.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

import spear_hf
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import Utterance
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenRow, TokenStoreWriter, waveform_checksum
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher, load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "model_cards" / "benchmarks" / "tokenize.csv"
BY_HAND = "## Is encoding below 10%"
LAYER, CODEBOOKS, CODEBOOK_SIZE = 21, 16, 256
SHORTEST, LONGEST = 2.0, 30.0  # seconds
WANTED_HOURS, WANTED_SHARE = 3000, 0.10  # on a GPU: audio-hours an hour; encode as a share of the teacher's forward

# microsoft/wavlm-large, by its config.json.
WAVLM_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "num_buckets": 320,
    "max_bucket_distance": 800,
}
STAGES = ("decode", "front_end", "forward", "encode", "write")
Result = TypeVar("Result")


class Clock:
    """Seconds by stage, with the device's work finished at either end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, stage: str, work: Callable[[], Result]) -> Result:
        started = self.now()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self.now() - started
        return result


def write_corpus(folder: Path, count: int, seed: int = 0) -> list[Utterance]:
    """`count` FLAC files of noise with the slope of speech; lengths evenly spread, in an order drawn by the seed."""
    lengths = np.random.default_rng(seed).permutation(np.linspace(SHORTEST, LONGEST, count))

    def write(number: int) -> Utterance:
        noise = np.random.default_rng([seed, number]).standard_normal(int(lengths[number] * SAMPLING_RATE))
        waveform = np.convolve(noise, 0.9 ** np.arange(40), mode="same")  # 6 dB an octave, about
        path = folder / f"{number:05d}.flac"
        soundfile.write(path, 0.05 * waveform, SAMPLING_RATE)
        return Utterance(id=path.stem, path=path, num_samples=len(waveform))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, range(count)))


def make_tokenizer(folder: Path, device: str, dtype: str) -> MvqTokenizer:
    """Teacher and quantiser with random parameters, loaded as any others are."""
    torch.manual_seed(0)
    WavLMModel(WavLMConfig(**WAVLM_LARGE)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    teacher = load_teacher(str(folder), layer=LAYER, device=device, dtype=dtype)
    quantizer = MultiCodebookQuantizer(
        teacher.feature_size, CODEBOOK_SIZE, CODEBOOKS, normalize=True, **quantizer_metadata(teacher)
    )
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * SAMPLING_RATE).astype(np.float32)
    features = teacher([noise])[0].cpu()
    quantizer.feature_mean.copy_(features.mean(dim=0))
    quantizer.feature_std.copy_(features.std(dim=0))
    torch.nn.init.normal_(quantizer.centers, std=CODEBOOKS**-0.5)  # as spread out, summed, as standardised features
    torch.nn.init.normal_(quantizer.to_logits.weight, std=0.1)
    return MvqTokenizer(teacher, quantizer)


def batches_of(utterances: list[Utterance], batch_seconds: float) -> list[list[int]]:
    """Places of the utterances, by length, within `batch_seconds` of padded audio: as tokenize_corpus batches them."""
    batches: list[list[int]] = []
    for place in sorted(range(len(utterances)), key=lambda place: -(utterances[place].num_samples or 0)):
        longest = (utterances[batches[-1][0]].num_samples or 0) / SAMPLING_RATE if batches else 0.0
        if not batches or (len(batches[-1]) + 1) * longest > batch_seconds:
            batches.append([])
        batches[-1].append(place)
    return batches


def timed_forward(teacher: Teacher, clock: Clock) -> None:
    """From now on the model's forward pass is timed by itself."""
    forward = teacher.model.forward  # type: ignore[attr-defined]
    teacher.model.forward = lambda *args, **kwargs: clock("forward", lambda: forward(*args, **kwargs))  # type: ignore[attr-defined]


def stages(
    tokenizer: MvqTokenizer, utterances: list[Utterance], batch_seconds: float, folder: Path
) -> dict[str, float]:
    """Seconds of every stage by itself."""
    clock = Clock(str(tokenizer.teacher.device))
    tokenizer.teacher.batch_seconds = batch_seconds
    waveforms = clock("decode", lambda: [load_audio(utterance.path) for utterance in utterances])
    original = tokenizer.teacher.model.forward  # type: ignore[attr-defined]
    timed_forward(tokenizer.teacher, clock)
    codes: dict[int, np.ndarray] = {}
    for batch in batches_of(utterances, batch_seconds):
        features = clock("teacher", lambda batch=batch: tokenizer.teacher([waveforms[place] for place in batch]))
        sizes = [len(rows) for rows in features]
        encoded = clock("encode", lambda rows=features: tokenizer.quantizer.encode(torch.cat(rows)).cpu())
        codes |= dict(zip(batch, (part.numpy() for part in encoded.split(sizes))))
    tokenizer.teacher.model.forward = original  # type: ignore[attr-defined]

    def write() -> None:
        writer = TokenStoreWriter(folder / "stages", tokenizer.store_info())
        rows = [
            TokenRow(utterance.id, codes[place], len(waveforms[place]), waveform_checksum(waveforms[place]))
            for place, utterance in enumerate(utterances)
        ]
        writer.write_shard(0, rows)
        writer.finish()

    clock("write", write)
    clock.seconds["front_end"] = clock.seconds.pop("teacher") - clock.seconds["forward"]
    return clock.seconds


def profile(tokenizer: MvqTokenizer, utterances: list[Utterance], batch_seconds: float, folder: Path) -> None:
    """Python functions by their own and cumulative time, for all but the model's operations."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(tokenize_corpus, tokenizer, utterances, folder / "profile", batch_seconds=batch_seconds)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


# Dense bf16 or float16 TFLOP/s and memory in TB/s, by the maker's data sheets.
GPUS = {"A100 SXM 80 GB": (312, 2.0), "H100 SXM 80 GB": (989, 3.35)}
MODEL_USE, MATMUL_USE = (0.15, 0.40), 0.7  # share of the peak that a model, and a large product, come near
PASSES_DONE = 3.7  # of 5, as frames whose codes have settled are left out; time of 5 passes over that of 1, on a CPU
LOOKUPS = 5200  # of a frame in a pass, as counted in encoding.cu's merges with a quantiser of log-mel frames
SECTOR = 32  # bytes that a lookup moves


def teacher_gflop(seconds: float = 16.0) -> float:
    """Of the forward pass to LAYER, for a second of audio in an utterance of `seconds`."""
    dim, hidden, rate = WAVLM_LARGE["hidden_size"], WAVLM_LARGE["intermediate_size"], 50
    linear = 2 * rate * LAYER * (4 * dim**2 + 2 * dim * hidden)
    attention = LAYER * rate * 4 * dim * (seconds * rate)
    convolutions, frames, channels = 0, float(SAMPLING_RATE), 1
    for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)):
        frames /= stride
        convolutions += 2 * frames * kernel * channels * 512
        channels = 512
    positions = 2 * rate * dim * (dim // WAVLM_LARGE["num_conv_pos_embedding_groups"]) * 128
    return (linear + attention + convolutions + positions) / 1e9


def encode_cost() -> tuple[float, float]:
    """Of a second of audio by encoding.cu: GFLOP of float16 products, and MB moved: of lookups, sums and products."""
    dim, rate, width = WAVLM_LARGE["hidden_size"], 50, CODEBOOKS * CODEBOOK_SIZE
    products = (
        1 + PASSES_DONE
    )  # frames with the classifier, and before each pass what is left of them with the centres
    gflop = products * 3 * 2 * rate * dim * width / 1e9
    moved = products * 2 * 4 * width + PASSES_DONE * (LOOKUPS * SECTOR + CODEBOOKS * 4 * dim)
    return gflop, rate * moved / 1e6


def _paragraph(words: str) -> str:
    return textwrap.fill(words, 119, break_long_words=False, break_on_hyphens=False)


def document(rows: list[dict[str, Any]]) -> str:
    """tokenize.md: the measurements, and the calculation."""
    teacher, (products, megabytes) = teacher_gflop(), encode_cost()
    lines = [
        "# Throughput of tokenising",
        "",
        _paragraph(
            "Measured by `examples/benchmark_tokenize.py` (`tokenize.csv` has machine, versions and command): a "
            f"teacher of WavLM Large's architecture to block {LAYER}, {CODEBOOKS} codebooks of {CODEBOOK_SIZE}, 5 "
            f"passes, utterances of {SHORTEST:g} to {LONGEST:g} s. Stages are timed one after the other; the last "
            "column is of the whole command, with decoding ahead in threads. Load: processes that wanted a core, as "
            "seen at the end; where that is above the machine's cores, times are too long, and shares are rough. "
            "The forward pass is the one that is run: on the CPU transformers', on the GPU that of this library's "
            "kernels."
        ),
        "",
        "| device | type | threads | load | audio | decode | front end | forward | encode | write | "
        "encode / forward | audio-hours an hour |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = [f"{float(row[f'{stage}_seconds']):.2f} s" for stage in STAGES]
        cells = [
            row["device"],
            row["dtype"],
            row["threads"],
            row["load"],
            f"{float(row['audio_seconds']):.0f} s",
            *seconds,
        ]
        cells += [f"{100 * float(row['encode_share_of_forward']):.1f} %", f"{float(row['audio_hours_per_hour']):.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "## What is to be expected on a GPU: a calculation, no measurement",
        "",
        _paragraph(
            f"A second of audio takes {teacher:.1f} GFLOP in the teacher (16 s utterances). Encoding it takes "
            f"{products:.1f} GFLOP of float16 products, three in place of one of float32, and moves "
            f"{megabytes:.0f} MB (of 5 passes {PASSES_DONE} are done, on average). Assumed: a model reaches "
            f"{MODEL_USE[0]:.0%} to {MODEL_USE[1]:.0%} of the peak, large products {MATMUL_USE:.0%} of it, and what "
            "is moved comes at the speed of the memory, though much of it lies in the cache; decoding and writing go "
            "on beside it."
        ),
        "",
        "| GPU | forward, ms | encode, ms | encode / forward | audio-hours an hour |",
        "|---|---|---|---|---|",
    ]
    for name, (half, memory) in GPUS.items():
        forward = [teacher / (half * use) for use in MODEL_USE]  # GFLOP / TFLOP/s is milliseconds
        encode = products / (half * MATMUL_USE) + megabytes / (memory * 1000)
        shares = sorted(encode / value for value in forward)
        hours = sorted(1000 / (value + encode) for value in forward)
        lines.append(
            f"| {name} | {forward[1]:.2f} to {forward[0]:.2f} | {encode:.2f} | {shares[0]:.0%} to {shares[1]:.0%} "
            f"| {hours[0]:,.0f} to {hours[1]:,.0f} |"
        )
    goals = (
        f"The goals are {WANTED_HOURS:,} audio-hours an hour and an encoder below {WANTED_SHARE:.0%} of the forward "
        "pass: of transformers', or of this library's, which is three to six times as fast (see below)."
    )
    lines += ["", _paragraph(goals), ""]
    return "\n".join(lines) + "\n"


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = names[0].split(":", 1)[1].strip() if names else platform.machine()
    on_gpu = arguments.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "spear_hf": spear_hf.__version__,
        **{name: version(name) for name in ("torch", "transformers")},
        "command": "python " + " ".join(["examples/benchmark_tokenize.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--utterances", type=int, default=2000 if torch.cuda.is_available() else 8)
    parser.add_argument("--batch-seconds", type=float, default=600.0 if torch.cuda.is_available() else 60.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="only profile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        utterances = write_corpus(folder, arguments.utterances)
        tokenizer = make_tokenizer(folder / "teacher", arguments.device, arguments.dtype)
        tokenizer.teacher.batch_seconds = arguments.batch_seconds
        largest = batches_of(utterances, arguments.batch_seconds)[0]
        # Warm-up: memory, kernels, the quantiser's tables. On a CPU one utterance does.
        on_gpu = arguments.device.startswith("cuda")
        tokenizer([load_audio(utterances[place].path) for place in (largest if on_gpu else largest[-1:])])
        if arguments.profile:
            profile(tokenizer, utterances, arguments.batch_seconds, folder)
            return
        seconds = stages(tokenizer, utterances, arguments.batch_seconds, folder)
        started = time.perf_counter()
        summary = tokenize_corpus(tokenizer, utterances, folder / "store", batch_seconds=arguments.batch_seconds)
        total = time.perf_counter() - started
    audio = sum(utterance.num_samples or 0 for utterance in utterances) / SAMPLING_RATE
    row = {
        "utterances": len(utterances),
        "audio_seconds": round(audio, 1),
        "frames": summary.frames,
        "batch_seconds": arguments.batch_seconds,
        **{f"{stage}_seconds": round(seconds[stage], 3) for stage in STAGES},
        "encode_share_of_forward": round(seconds["encode"] / seconds["forward"], 4),
        "whole_seconds": round(total, 3),
        "audio_hours_per_hour": round(audio / total, 2),
        **setting(arguments),
    }
    print(json.dumps(row, indent=1))
    rows = []
    if arguments.output.exists():  # figures of other devices stay
        with open(arguments.output, newline="", encoding="utf-8") as file:
            rows = [kept for kept in csv.DictReader(file) if kept["device"] != row["device"]]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    page = arguments.output.with_suffix(".md")
    by_hand = "".join(page.read_text(encoding="utf-8").partition(BY_HAND)[1:]) if page.exists() else ""
    page.write_text(document([*rows, row]) + by_hand, encoding="utf-8")
    print(f"written to {arguments.output}")
    if arguments.device.startswith("cuda"):
        if row["audio_hours_per_hour"] < WANTED_HOURS:
            sys.exit(f"falls short: {row['audio_hours_per_hour']} audio-hours an hour, {WANTED_HOURS} wanted")
        if row["encode_share_of_forward"] > WANTED_SHARE:
            sys.exit(f"falls short: encoding takes {row['encode_share_of_forward']:.0%} of the teacher's forward")


if __name__ == "__main__":
    main()
