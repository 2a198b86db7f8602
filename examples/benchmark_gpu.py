# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of the encoder on one GPU, in inference and training, against WavLM of the same size.

    python examples/benchmark_gpu.py --output model_cards/benchmarks/gpu.csv

Random weights, batches of utterances of 10 s that lie on the GPU as waveforms, features included. Inference returns
all hidden states. A training step is forward, backward and AdamW (fused) of a CTC head in bfloat16 autocast, of
pre-training with 16 codebooks of 256, and of that with the recipe's regularisers; MFU is three times the products and
convolutions of the forward pass, as `spear_hf.pretraining.flops` counts them for SPEAR and torch counts them for
WavLM, over the bfloat16 peak of the data sheet. Compiled models are timed after they were compiled, which
`compile_seconds` tells. Before anything is timed, the hidden states of a batch are compared with those of the CPU. A
part that fails makes a row with its error.
"""

import argparse
import csv
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import WavLMConfig, WavLMForCTC, WavLMModel

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForCTC, SpearForPreTraining, SpearModel
from spear_hf.evaluation.plots import BLUE, GREEN, ORANGE, new_figure, save_figure, styled
from spear_hf.pretraining.flops import FLOPS_OF_A_STEP, forward_flops, peak_flops
from spear_hf.pretraining.regularizers import install_regularizers
from spear_hf.pretraining.regularizers_config import RegularizersConfig


START_WHEN: Path | None = None
RATE = 16000
SECONDS = 10.0
ADJUSTED_BATCHES = 20000.0  # of the regularisers' schedules: where most of them have come to rest
LABELS = 120  # characters of 10 s of speech
VOCABULARY = 32
TARGETS = {"speech": {"num_codebooks": 16, "codebook_size": 256, "weight": 1.0}}
COMPILED_TOLERANCE = 1.5
TOLERANCE = 1e-4  # of hidden states in float32, GPU against CPU, relative to the largest activation
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WAVLM = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
}


@dataclass
class Row:
    """One measurement. `audio_per_second`: seconds of audio in a second; 1 over it is the real-time factor."""

    what: str
    contender: str
    batch: int
    dtype: str
    mode: str
    milliseconds: float | None = None
    audio_per_second: float | None = None
    mfu: float | None = None
    peak_mb: float | None = None
    compile_seconds: float | None = None
    error: str = ""


def spear_config(size: str, **settings: Any) -> SpearConfig:
    return getattr(SpearConfig, size)(**settings)


def wavlm_config(size: str) -> WavLMConfig:
    return WavLMConfig(
        **WAVLM[size], vocab_size=VOCABULARY, layerdrop=0.0, apply_spec_augment=False, ctc_loss_reduction="mean"
    )


def waveforms(batch: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [0.1 * torch.randn(round(SECONDS * RATE), generator=generator).to(device) for _ in range(batch)]


def spear_inputs(config: SpearConfig, audio: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    extractor = SpearFeatureExtractor(feature_size=config.num_mel_bins)
    return dict(extractor(audio, sampling_rate=RATE, return_tensors="pt"))


def pretraining_inputs(config: SpearConfig, audio: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Half of the frames masked, random labels."""
    inputs = spear_inputs(config, audio)
    features = inputs["input_features"]
    frames = (features.shape[1] - 7) // 2
    return {
        "input_features": features,
        "attention_mask": inputs["attention_mask"],
        "speech_labels": torch.randint(0, 256, (len(audio), frames, 16), device="cuda"),
        "mask_time_indices": torch.rand(len(audio), features.shape[1], device="cuda") < 0.49,
    }


def check(device: str) -> float:
    """The largest error of a hidden state of the GPU against the CPU, in float32."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's convolutions are in TF32 otherwise, at an error of 3e-4
    model = SpearModel(spear_config("base")).eval()
    audio = [wave[: length * RATE] for wave, length in zip(waveforms(3, "cpu"), (3, 7, 10))]
    with torch.inference_mode():
        expected = model(**spear_inputs(model.config, audio), output_hidden_states=True).hidden_states
        model.to(device)
        on_device = [wave.to(device) for wave in audio]
        found = model(**spear_inputs(model.config, on_device), output_hidden_states=True).hidden_states
    torch.backends.cudnn.allow_tf32 = True
    errors = [float((one.cpu() - other).abs().max() / other.abs().max()) for one, other in zip(found, expected)]
    if not max(errors) <= TOLERANCE:
        raise SystemExit(f"hidden states differ from those of the CPU by {max(errors):.1e}: nothing is timed.")
    return max(errors)


def check_compiled(size: str) -> float:
    """The error of the gradients of pre-training with compiled layers, over that of bfloat16 without."""
    config = spear_config(size, hidden_dropout=0.0, position_dropout=0.0, pretraining_targets=TARGETS)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = SpearForPreTraining(config).train()
    inputs = pretraining_inputs(config, [wave[: 5 * RATE] for wave in waveforms(4, "cuda")])
    gradients = []
    for way in ("float32", "eager", "layers"):
        if way == "layers":
            model.compile_layers()
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=way != "float32"):
            loss = model(**inputs).loss
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    eager, compiled = ((gradient - gradients[0]).norm().item() for gradient in gradients[1:])
    if not compiled <= COMPILED_TOLERANCE * eager:
        raise SystemExit(
            f"gradients of compiled layers: errors {compiled:.2e}, {eager:.2e} without: nothing is timed."
        )
    return compiled / eager


def timed(action: Callable[[], Any], budget: float) -> tuple[float, float, float]:
    """Median milliseconds of calls within `budget` seconds (5 at least), of the first call, and the peak in MB."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    if START_WHEN is not None and not START_WHEN.exists():
        print(f"compiled, and waiting for {START_WHEN}", flush=True)
        while not START_WHEN.exists():
            time.sleep(0.2)
    for _ in range(2):
        action()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 100):
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), first, torch.cuda.max_memory_allocated() / 1e6


def measure(row: Row, prepare: Callable[[], Callable[[], Any]], budget: float) -> Row:
    """Fills in the row; an error is written into it."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        milliseconds, first, peak = timed(prepare(), budget)
        row.milliseconds, row.peak_mb = round(milliseconds, 3), round(peak)
        row.audio_per_second = round(1e3 * row.batch * SECONDS / milliseconds, 1)
        if row.mode in ("compiled", "layers"):
            row.compile_seconds = round(first, 1)
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return row


def prepared(call: Callable[..., Any], mode: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """`mode`: eager, compiled (shapes fixed), layers (each compiled, for any length), or cuda-graph: the kernels of
    one eager call, recorded and replayed."""
    if mode == "layers":
        call.compile_layers()  # type: ignore[attr-defined]
        return call
    if mode == "compiled":
        return torch.compile(call, dynamic=False)
    if mode == "eager":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(**inputs)

    def replay(**new: Any) -> Any:
        for name, value in new.items():
            if isinstance(value, torch.Tensor):
                inputs[name].copy_(value)
        graph.replay()
        return output

    return replay


def torch_flops(model: nn.Module, **inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def encoder(contender: str, dtype: str) -> tuple[nn.Module, Callable[[list[torch.Tensor]], dict[str, Any]]]:
    """A model with random weights, and what makes its inputs of waveforms on the GPU."""
    family, size = contender.split("-")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = SpearModel(spear_config(size)) if family == "spear" else WavLMModel(wavlm_config(size))
    model = model.eval().to(DTYPES[dtype])
    if family == "spear":
        extractor = SpearFeatureExtractor(feature_size=model.config.num_mel_bins)

        def spear_features(audio: list[torch.Tensor]) -> dict[str, Any]:
            features = extractor(audio, sampling_rate=RATE, return_tensors="pt")["input_features"]
            return {"input_features": features.to(DTYPES[dtype]), "output_hidden_states": True}

        return model, spear_features

    def wavlm_features(audio: list[torch.Tensor]) -> dict[str, Any]:
        waves = torch.stack(audio)
        waves = (waves - waves.mean(dim=1, keepdim=True)) / waves.std(dim=1, keepdim=True)
        return {"input_values": waves.to(DTYPES[dtype]), "output_hidden_states": True}

    return model, wavlm_features


def inference(contender: str, batches: list[int], modes: list[str], budget: float, dtype: str) -> Iterator[Row]:
    """All utterances of a batch are of one length: no contender is given a mask."""
    model, features_of = encoder(contender, dtype)
    for mode in modes:
        for batch in batches:
            audio = waveforms(batch, "cuda")

            def prepare(audio: list[torch.Tensor] = audio, mode: str = mode) -> Callable[[], Any]:
                call = torch.inference_mode()(prepared(torch.inference_mode()(model), mode, features_of(audio)))
                return torch.inference_mode()(lambda: call(**features_of(audio)))

            yield measure(Row("inference", contender, batch, dtype, mode), prepare, budget)


def training(contender: str, batch: int, mode: str, budget: float) -> Row:
    """A step with a CTC head, or of pre-training (contender `pretrain-SIZE`, with regularisers `recipe-SIZE`)."""
    family, size = contender.split("-")
    row = Row("training", contender, batch, "bfloat16", mode)
    flops: list[float] = []  # of a step

    def prepare() -> Callable[[], Any]:
        torch.manual_seed(0)
        audio = waveforms(batch, "cuda")
        labels = torch.randint(1, VOCABULARY, (batch, LABELS), device="cuda")
        if family == "wavlm":
            with torch.device("cuda"):
                model: nn.Module = WavLMForCTC(wavlm_config(size))
            inputs = {"input_values": torch.stack(audio), "labels": labels}
        elif family == "spear":
            config = spear_config(size, vocab_size=VOCABULARY, apply_spec_augment=False)
            with torch.device("cuda"):
                model = SpearForCTC(config)
            inputs = {"input_features": spear_inputs(config, audio)["input_features"], "labels": labels}
        else:
            config = spear_config(size, pretraining_targets=TARGETS)
            with torch.device("cuda"):
                model = SpearForPreTraining(config)
            inputs = pretraining_inputs(config, audio)
        model.train()
        regularizers = None
        if family == "recipe":
            regularizers = install_regularizers(model, RegularizersConfig(enabled=True), in_graph=mode == "layers")
            regularizers.set_step(ADJUSTED_BATCHES, float(inputs["speech_labels"][..., 0].numel()))
        if family == "wavlm":
            flops.append(FLOPS_OF_A_STEP * torch_flops(model, **inputs))
        else:
            num_frames = inputs["input_features"].shape[1]
            flops.append(FLOPS_OF_A_STEP * batch * forward_flops(model.config, num_frames, family != "spear"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        call = prepared(model, mode, inputs)

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = call(**inputs).loss
            loss.backward()
            if regularizers is not None:
                regularizers.count_votes(regularizers.collect_votes().tolist())
            optimizer.step()
            optimizer.zero_grad()

        return step

    row = measure(row, prepare, budget)
    if row.milliseconds:
        row.mfu = round(1e3 * flops[0] / row.milliseconds / peak_flops(torch.device("cuda"), bf16=True), 4)
    return row


def features(batch: int, budget: float) -> Row:
    row = Row("features", "spear", batch, "float32", "eager")

    def prepare() -> Callable[[], Any]:
        audio = waveforms(batch, "cuda")
        extractor = SpearFeatureExtractor()
        return lambda: extractor(audio, sampling_rate=RATE, return_tensors="pt")

    return measure(row, prepare, budget)


def rows(
    parts: list[str],
    sizes: list[str],
    batches: list[int],
    training_batches: list[int],
    families: list[str],
    budget: float,
) -> Iterator[Row]:
    contenders = [f"{family}-{size}" for size in sizes for family in ("spear", "wavlm") if size in WAVLM]
    contenders += [f"spear-{size}" for size in sizes if size not in WAVLM]
    if "features" in parts:
        yield features(32, budget)
    if "inference" in parts:
        for contender in contenders:
            modes = ["eager", "cuda-graph"] if contender.startswith("spear") else ["eager"]
            yield from inference(contender, batches, modes, budget, "bfloat16")
    if "training" in parts:
        for contender in [*contenders, *(f"pretrain-{size}" for size in sizes)]:
            yield training(contender, 16 if contender.endswith("xlarge") else 32, "eager", budget)
    if "compiled-inference" in parts:
        yield from inference(f"spear-{sizes[0]}", batches[-1:], ["compiled"], budget, "bfloat16")
    if "compiled-training" in parts:
        print(f"gradients of compiled layers: error {check_compiled(sizes[0]):.2f} of that of bfloat16", flush=True)
        for family in families:
            for mode, batch in itertools.product(("layers", "eager"), training_batches):
                yield training(f"{family}-{sizes[0]}", batch, mode, budget)


@styled
def draw(measured: list[Row]) -> Any:
    """Seconds of audio in a second, of inference and training, for the largest batch of every contender and mode."""
    figure, panels = new_figure(2, size=(8.0, 8.0))
    for axes, what in zip(panels, ("inference", "training")):
        chosen = [row for row in measured if row.what == what and row.audio_per_second]
        largest = {(row.contender, row.mode): row for row in sorted(chosen, key=lambda row: row.batch)}
        names = [f"{contender}, {mode}, batch {row.batch}" for (contender, mode), row in largest.items()]
        rates = [row.audio_per_second for row in largest.values()]
        colours = {"spear": BLUE, "wavlm": ORANGE, "pretrain": GREEN, "recipe": GREEN}
        bars = axes.barh(names, rates, color=[colours[name.split("-")[0]] for name in names])
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
        axes.invert_yaxis()
        axes.set(title=f"{what.capitalize()}, bfloat16, 10 s each", xlabel="seconds of audio in a second")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/benchmarks/gpu.csv"))
    parser.add_argument("--parts", default="features,inference,training,compiled-inference,compiled-training")
    parser.add_argument("--sizes", default="base,large,xlarge")
    parser.add_argument("--batches", default="1,8,32", help="of inference")
    parser.add_argument("--training-batches", default="32,120", help="of pre-training, compiled")
    parser.add_argument("--families", default="pretrain,recipe", help="of compiled training")
    parser.add_argument("--start-when", type=Path, help="wait for this file before timing, once the first is compiled")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds that a row is timed")
    arguments = parser.parse_args()
    global START_WHEN
    START_WHEN = arguments.start_when
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device.")
    error = check("cuda")
    print(f"hidden states against the CPU: {error:.1e}")
    constants = {
        "machine": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "examples/benchmark_gpu.py", *sys.argv[1:]]),
    }
    parts, sizes = arguments.parts.split(","), arguments.sizes.split(",")
    batches, training_batches = (
        [int(batch) for batch in given.split(",")] for given in (arguments.batches, arguments.training_batches)
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(item.name for item in fields(Row)), *constants], lineterminator="\n")
        writer.writeheader()
        measured = []
        for row in rows(parts, sizes, batches, training_batches, arguments.families.split(","), arguments.budget):
            measured.append(row)
            writer.writerow(asdict(row) | constants)
            file.flush()
            print(*(f"{value}" for value in asdict(row).values() if value not in (None, "")), flush=True)
    save_figure(draw(measured), arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
