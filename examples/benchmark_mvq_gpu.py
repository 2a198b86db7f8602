# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding with 16 codebooks of 256 on a GPU: are the codes right, what do its stages cost, and beside which teacher.

    python examples/benchmark_mvq_gpu.py        # about a minute; writes model_cards/benchmarks/mvq_gpu.csv

Frames of 1024 channels are made up to be like a teacher's: a few hundred smooth latent signals, channels of very
different level, and a common offset. A quantiser is trained on them for `--steps` a phase. Codes of the CUDA kernels
are compared with those of torch's operations on the GPU and of the CPU, and, bit by bit, with those of the same frames
in another order and number. Then kernels are timed stage by stage, in several settings, and a forward pass of WavLM
Large's architecture up to block 21 (random weights, bfloat16, batches of `--batch-seconds` by length). A part that
fails makes a row with its error.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import WavLMConfig, WavLMModel

from spear_hf.mvq import cuda_encoder
from spear_hf.mvq.quantizer import PASSES, MultiCodebookQuantizer, full_precision
from spear_hf.mvq.training import QuantizerTrainer, QuantizerTrainingConfig
from spear_hf.mvq.wavlm_attention import fuse_wavlm_attention


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "model_cards" / "benchmarks" / "mvq_gpu.csv"
DIM, CODEBOOKS = 1024, 16
LAYER, RATE = 21, 16000
ATTENTIONS = ("transformers' attention", "fused attention")
WANTED_SHARE, WANTED_EQUAL = 0.10, 0.999
WAVLM_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": LAYER + 1,  # a hidden state is handed out where it enters the next block
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "num_buckets": 320,
    "max_bucket_distance": 800,
}
# Of cuda_encoder.py; the first four are compiled in.
NAMES = ("WARPS", "BLOCKS", "CELLS", "UNROLL", "ROWS", "TILES_AT_ONCE")
SETTINGS = [
    (4, 24, 512, 1, 2048, 4),
    (4, 16, 512, 1, 2048, 4),
    (4, 20, 512, 1, 2048, 4),
    (4, 28, 512, 1, 2048, 4),
    (4, 32, 512, 1, 2048, 4),
    (4, 24, 512, 2, 2048, 4),
    (4, 24, 512, 1, 2048, 15),
    (4, 24, 512, 1, 8192, 1),
]


@dataclass
class Row:
    """One measurement; `microseconds` are for a frame."""

    what: str
    setting: str = ""
    frames: int = 0
    microseconds: float | None = None
    value: float | None = None
    error: str = ""


def features(count: int, seed: int) -> Tensor:
    """(count, DIM) on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    fixed = torch.Generator("cuda").manual_seed(1234)
    latents = torch.randn(count + 8, 256, generator=generator, device="cuda")
    smooth = latents.unfold(0, 9, 1).mean(dim=2) * 3  # neighbours within 9 frames are alike
    mixing = (
        torch.randn(256, DIM, generator=fixed, device="cuda") * torch.linspace(1.5, 0.05, 256, device="cuda")[:, None]
    )
    levels = (0.8 * torch.randn(DIM, generator=fixed, device="cuda")).exp()
    offset = 3 * torch.randn(DIM, generator=fixed, device="cuda")
    noise = torch.randn(count, DIM, generator=generator, device="cuda")
    return levels * (torch.tanh(smooth @ mixing / 8) * 4 + 0.3 * noise + offset)


def milliseconds(action: Callable[[], Any], repeats: int = 5) -> float:
    """Median, after one call that does not count."""
    action()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


class Stopwatch:
    """Stands for a `Kernels`, and times every call on the device."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def _timed(self, name: str, action: Callable[[], Any]) -> Any:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = action()
        stop.record()
        self.marks.append((name, start, stop))
        return result

    def __call__(self, name: str, blocks: int, *arguments: Any) -> None:
        self._timed(name, lambda: self.kernels(name, blocks, *arguments))

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self._timed("products", lambda: self.kernels.product(left, right, out))

    def totals(self) -> dict[str, float]:
        """Milliseconds by stage."""
        torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, stop in self.marks:
            sums[name] = sums.get(name, 0.0) + start.elapsed_time(stop)
        return sums


def encoder_of(quantizer: MultiCodebookQuantizer) -> Any:
    with full_precision(quantizer.centers.device), torch.no_grad():
        return quantizer._current_encoder()


def plainly(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Tensor:
    """Codes by torch's operations."""
    encoder = encoder_of(quantizer)
    fused, encoder.fused = encoder.fused, None
    try:
        return quantizer.encode(frames)
    finally:
        encoder.fused = fused


def checks(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Iterator[Row]:
    codes = quantizer.encode(frames)
    twin = MultiCodebookQuantizer.from_config(quantizer.config)
    twin.load_state_dict(quantizer.state_dict())
    for name, expected in (
        ("torch's operations", plainly(quantizer, frames[:4096])),
        ("the CPU", twin.encode(frames[:2048].cpu()).cuda()),
    ):
        same = (codes[: len(expected)] == expected).float()
        yield Row(f"equal codes, against {name}", frames=len(expected), value=round(same.mean().item(), 6))
        given = frames[: len(expected)]
        errors = [
            (quantizer.decode(found) - given).div(quantizer.feature_std).square().sum()
            for found in (codes[: len(expected)], expected)
        ]
        yield Row(f"squared error, over that of {name}", frames=len(expected), value=(errors[0] / errors[1]).item())
    before = quantizer.encode(frames, refine_iters=0)
    for passes in range(1, PASSES + 1):
        after = quantizer.encode(frames, refine_iters=passes)
        changed = (after != before).sum(dim=1)
        yield Row(
            "share of frames that a pass changes",
            f"pass {passes}",
            value=round((changed > 0).float().mean().item(), 4),
        )
        of_these = changed.sum().item() / max(1, int((changed > 0).sum()))
        yield Row("codes changed, of these frames", f"pass {passes}", value=round(of_these, 2))
        before = after
    order = torch.randperm(len(frames), device="cuda")
    same = torch.equal(quantizer.encode(frames[order]), codes[order])
    same &= all(torch.equal(quantizer.encode(frames[a:b]), codes[a:b]) for a, b in ((0, 1), (5, 2100), (2040, 2060)))
    yield Row("codes do not depend on the batch", frames=len(frames), value=float(same))


@torch.no_grad()
def precision(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Iterator[Row]:
    """Root mean square errors of products of frames with centres, relative to that of the products."""
    encoder = encoder_of(quantizer).fused
    given = (frames[: cuda_encoder.ROWS] - quantizer.feature_mean) / quantizer.feature_std
    exact = given.double() @ encoder.centers.T.double()
    high, low = given.half(), (given - given.half().float()).half()
    with full_precision(given.device):
        split = torch.empty(len(given), len(encoder.centers), device=given.device)
        encoder.kernels.product(torch.cat([high, low, high], dim=1), encoder.center_split, split)
        split *= encoder.center_unit
        single = given @ encoder.centers.T
    for name, found in (("float16 splits", split), ("float32", single)):
        error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        yield Row("error of products", name, frames=len(given), value=error.item())


def stages(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Iterator[Row]:
    encoder = encoder_of(quantizer).fused
    for passes in range(PASSES + 1):
        spent = milliseconds(lambda passes=passes: quantizer.encode(frames, refine_iters=passes))
        yield Row("encode", f"{passes} passes", len(frames), round(1e3 * spent / len(frames), 4))
    kernels, watch = encoder.kernels, Stopwatch(encoder.kernels)
    encoder.kernels = watch
    try:
        quantizer.encode(frames)
    finally:
        encoder.kernels = kernels
    for name, spent in watch.totals().items():
        yield Row("stage", name, len(frames), round(1e3 * spent / len(frames), 4))


def plain(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Iterator[Row]:
    part = frames[:8192]
    spent = milliseconds(lambda: plainly(quantizer, part), repeats=3)
    yield Row("encode by torch's operations", f"{PASSES} passes", len(part), round(1e3 * spent / len(part), 4))


def settings(quantizer: MultiCodebookQuantizer, frames: Tensor) -> Iterator[Row]:
    encoder = encoder_of(quantizer).fused
    kept, kernels = [getattr(cuda_encoder, name) for name in NAMES], encoder.kernels
    expected = quantizer.encode(frames)
    made: dict[tuple[int, ...], Any] = {}
    try:
        for setting in SETTINGS:
            label = ", ".join(f"{name} {value}" for name, value in zip(NAMES, setting))
            try:
                for name, value in zip(NAMES, setting):
                    setattr(cuda_encoder, name, value)
                started = time.perf_counter()
                if setting[:4] not in made:
                    made[setting[:4]] = cuda_encoder.Kernels(CODEBOOKS, frames.device)
                compiling = time.perf_counter() - started
                encoder.kernels = made[setting[:4]]
                spent = milliseconds(lambda: quantizer.encode(frames))
                watch = encoder.kernels = Stopwatch(encoder.kernels)
                same = (quantizer.encode(frames) == expected).float().mean().item()
                refine = sum(value for name, value in watch.totals().items() if name == "refine")
                yield Row("setting", label, len(frames), round(1e3 * spent / len(frames), 4), round(same, 6))
                yield Row("setting, refine", label, len(frames), round(1e3 * refine / len(frames), 4))
                yield Row("setting, compile seconds", label, value=round(compiling, 2))
            except Exception as error:
                traceback.print_exc()
                yield Row("setting", label, error=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    finally:
        encoder.kernels = kernels
        for name, value in zip(NAMES, kept):
            setattr(cuda_encoder, name, value)


@torch.inference_mode()
def teacher(batch_seconds: float) -> Iterator[Row]:
    """Lengths evenly spread over 2 to 30 s: five batches of the ones that these make up."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WavLMModel(WavLMConfig(**WAVLM_LARGE)).eval().to(torch.bfloat16)
    yield from forward(model, ATTENTIONS[0], batch_seconds)
    fuse_wavlm_attention(model)
    yield from forward(model, ATTENTIONS[1], batch_seconds)


def forward(model: WavLMModel, name: str, batch_seconds: float) -> Iterator[Row]:
    total = frames = 0.0
    for seconds in (29, 23, 16, 9, 3):
        count = int(batch_seconds // (seconds + 0.5))
        lengths = torch.linspace(seconds - 0.5, seconds + 0.5, count, device="cuda").mul(RATE).long()
        values = torch.randn(count, int(lengths.max()), device="cuda", dtype=torch.bfloat16)
        mask = (torch.arange(values.shape[1], device="cuda") < lengths[:, None]).int()
        spent = milliseconds(
            lambda values=values, mask=mask: model(values, attention_mask=mask, output_hidden_states=True), 3
        )
        there = int(lengths.sum()) / RATE * 50
        yield Row("teacher's forward", f"{name}, {count} of {seconds} s", int(there), round(1e3 * spent / there, 4))
        # Utterances of all lengths are equally many: of 29 s they have 29 shares of the frames.
        total, frames = total + spent / there * seconds, frames + seconds
    yield Row("teacher's forward", f"{name}, all lengths", 0, round(1e3 * total / frames, 4))


def trained(steps: int) -> tuple[MultiCodebookQuantizer, float]:
    frames = features(60_000, seed=0).cpu()
    config = QuantizerTrainingConfig(CODEBOOKS, 256, steps=steps, batch_size=1024)
    started = time.perf_counter()
    quantizer = QuantizerTrainer(config, device="cuda").train(frames)
    return quantizer.to("cuda").eval(), time.perf_counter() - started


def show(row: Row) -> None:
    cost = "" if row.microseconds is None else f"{row.microseconds:.4f} us"
    value = "" if row.value is None else f"{row.value:.6g}"
    print(f"{row.what:44} {row.setting:64} {cost:>12} {value:>10} {row.error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=300, help="of a phase of the quantiser's training")
    parser.add_argument("--frames", type=int, default=30_000, help="as in a batch of 600 s")
    parser.add_argument("--parts", default="checks,precision,stages,settings,teacher,plain")
    parser.add_argument("--batch-seconds", type=float, default=600.0, help="of the teacher's batches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device.")
    rows: list[Row] = []
    quantizer, seconds = trained(arguments.steps)
    rows.append(Row("training of the quantiser, seconds", f"{arguments.steps} steps a phase", value=round(seconds, 1)))
    show(rows[-1])
    frames = features(arguments.frames, seed=1)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "checks": lambda: checks(quantizer, frames),
        "precision": lambda: precision(quantizer, frames),
        "stages": lambda: stages(quantizer, frames),
        "settings": lambda: settings(quantizer, frames),
        "teacher": lambda: teacher(arguments.batch_seconds),
        "plain": lambda: plain(quantizer, frames),
    }
    for name in arguments.parts.split(","):
        started = time.perf_counter()
        try:
            for row in parts[name]():
                rows.append(row)
                show(row)
        except Exception as error:
            traceback.print_exc()
            rows.append(Row("failed", name, error=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"))
        print(f"-- {name} took {time.perf_counter() - started:.1f} s", flush=True)
    times = {(row.what, row.setting): row.microseconds for row in rows}
    encode = times.get(("encode", f"{PASSES} passes"))
    for name in ATTENTIONS:
        spent = times.get(("teacher's forward", f"{name}, all lengths"))
        if encode and spent:
            rows.append(Row("encode, over the teacher's forward", name, value=round(encode / spent, 4)))
            show(rows[-1])
    constants = {
        "machine": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "examples/benchmark_mvq_gpu.py", *sys.argv[1:]]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(item.name for item in fields(Row)), *constants], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **constants} for row in rows)
    print(f"written to {arguments.output}")
    short = [f"{row.what}: {row.value}" for row in rows if row.what.startswith("equal") and row.value < WANTED_EQUAL]
    short += [f"{row.what} {row.setting}: {row.error}" for row in rows if row.error]
    shares = [row.value for row in rows if row.what.startswith("encode, over")]
    if shares and max(shares) > WANTED_SHARE:
        short.append(f"encode over the teacher's forward: {shares}, {WANTED_SHARE:.0%} wanted")
    if short:
        sys.exit("falls short: " + "; ".join(short))


if __name__ == "__main__":
    main()
