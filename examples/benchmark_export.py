# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The encoder in torch, in int8 and under onnxruntime: speed, size, error, and on demand what probes lose by int8.

    python examples/benchmark_export.py --threads 2            # writes model_cards/benchmarks/export.csv
    python examples/benchmark_export.py --skip onnx --model my-spear --output int8_probes.csv \\
        --tasks 'examples/data#probe=spoken_words,kind=query'

Without `--model`, random weights of the base size. The contenders encode the same features in turns, without those of
other layers, and medians are compared; threads of onnxruntime do not spin, so that none slows torch's. The size is
that of the file of weights, the error that of the last hidden state (norm of the difference over that of the state).
Tasks are those of `spear-hf evaluate`: the table gets each metric of the model and of the model in int8.
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel, quantize_linear_layers
from spear_hf.conversion.onnx_export import export_onnx
from spear_hf.evaluation.benchmark import evaluate
from spear_hf.evaluation.protocols import Settings
from spear_hf.evaluation.speed import CASES, parse_cases


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "model_cards" / "benchmarks" / "export.csv"
KINDS = ("torch", "int8", "onnx")
Encode = Callable[[torch.Tensor], torch.Tensor]


def in_torch(model: SpearModel) -> Encode:
    @torch.inference_mode()
    def encode(features: torch.Tensor) -> torch.Tensor:
        return model(features).last_hidden_state

    return encode


def in_onnxruntime(path: Path) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encode(features: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(features.shape[:2], dtype=torch.int64)
        inputs = {"input_features": features.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["last_hidden_state"], inputs)[0])

    return encode


def contenders(model: SpearModel, folder: Path, kinds: tuple[str, ...]) -> dict[str, tuple[Encode, Path]]:
    """By kind: how it encodes, and the file of its weights. Folders torch and int8 are models with their extractor."""
    result: dict[str, tuple[Encode, Path]] = {}
    extractor = SpearFeatureExtractor(feature_size=model.config.num_mel_bins)
    for kind in kinds:
        if kind == "onnx":
            path = folder / "spear.onnx"
            export_onnx(model, path)
            result[kind] = (in_onnxruntime(path), path)
            continue
        encoder = model if kind == "torch" else quantize_linear_layers(SpearModel.from_pretrained(folder / "torch"))
        encoder.save_pretrained(folder / kind)
        extractor.save_pretrained(folder / kind)
        result[kind] = (in_torch(encoder), folder / kind / "model.safetensors")
    return result


def timings(encoders: dict[str, tuple[Encode, Path]], cases: str, repeats: int, bins: int) -> list[dict[str, Any]]:
    rows = []
    for number, seconds in parse_cases(cases):
        features = torch.randn(number, round(100 * seconds) - 2, bins, generator=torch.Generator().manual_seed(number))
        taken: dict[str, list[float]] = {kind: [] for kind in encoders}
        for turn in range(1 + repeats):
            for kind, (encode, _) in encoders.items():
                start = time.perf_counter()
                state = encode(features)
                taken[kind].append(time.perf_counter() - start)
                if kind == "torch":
                    expected = state
                elif turn == 0:
                    rows.append({"contender": kind, "error": float((state - expected).norm() / expected.norm())})
                    rows[-1]["case"] = f"{number} x {seconds:g} s"
        median = {kind: statistics.median(times[1:]) for kind, times in taken.items()}
        rows.insert(len(rows) - len(encoders) + 1, {"contender": "torch", "error": 0.0})
        for row in rows[-len(encoders) :]:
            kind = row["contender"]
            row |= {"case": f"{number} x {seconds:g} s", "seconds": round(median[kind], 4), "repeats": repeats}
            row |= {"times_faster": round(median["torch"] / median[kind], 2), "error": float(f"{row['error']:.2e}")}
            row["megabytes"] = round(encoders[kind][1].stat().st_size / 1e6, 1)
            print(row, flush=True)
    return rows


def losses(folder: Path, tasks: list[str]) -> list[dict[str, Any]]:
    """The main metric of each task, of the model and of it in int8, and what the latter gains, paired.

    On all layers, as another choice of one would be the larger part of a difference.
    """
    models = [str(folder / "torch"), str(folder / "int8")]
    settings = Settings(features=("all",), heads=("linear",), progress=False)
    report = evaluate(models, tasks, folder / "evaluation", baselines=(), settings=settings)
    rows = []
    for name, entry in report["representations"].items():
        for task, record in entry["tasks"].items():
            best = record["headline"]
            row = {"case": task, "contender": Path(name).name, "metric": best["metric"], "value": best["value"]}
            if row["contender"] == "int8":
                (gain,) = record["minus"].values()
                row |= {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an encoder; default: random weights of the base size")
    parser.add_argument("--skip", action="append", default=[], choices=KINDS[1:])
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = SpearModel.from_pretrained(arguments.model) if arguments.model else SpearModel(SpearConfig.base())
    with tempfile.TemporaryDirectory() as name:
        kinds = tuple(kind for kind in KINDS if kind not in arguments.skip)
        encoders = contenders(model.eval(), Path(name), kinds)
        rows = timings(encoders, arguments.cases, arguments.repeats, model.config.num_mel_bins)
        rows += losses(Path(name), arguments.tasks) if arguments.tasks else []
    same = {
        "weights": Path(arguments.model).name if arguments.model else "random, base size",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnxruntime": "" if "onnx" in arguments.skip else version("onnxruntime"),
    }
    fields = ["case", "contender", "seconds", "times_faster", "megabytes", "error", "metric", "value"]
    fields += ["gain", "gain_low", "gain_high"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*fields, "repeats", *same], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | same for row in rows)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
