# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is measured in a process for each contender: training steps, and the memory of encoding a long recording.

    spear-hf benchmark --measure training --against wavlm --output model_cards/benchmarks/speed_training.csv
    spear-hf benchmark --measure memory --against wavlm --output model_cards/benchmarks/speed_memory.csv

A step is forward, backward and AdamW of a model with a CTC head in training mode. Memory is that of hidden states
without gradients, against the same encoder where every layer makes the tensor of all its attention weights. Processes
are started together, and take turns. Results are compared with those of the plain path before anything is timed.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import HubertForCTC, PreTrainedModel, WavLMForCTC

from ..configuration_spear import SpearConfig
from ..modeling_spear import SpearAttentionWeights, SpearForCTC, SpearModel
from .speed import (
    PEERS,
    Timing,
    check_options,
    check_parity,
    measured,
    noise,
    parse_cases,
    peer_features,
    spear_features,
)


CTC_PEERS = {"wavlm": WavLMForCTC, "hubert": HubertForCTC}
GRADIENT_TOLERANCE = 1e-6  # of each parameter's gradient in double precision, relative to its largest entry
VOCABULARY = 32
LABELS_PER_SECOND = 6
_STATUS = Path("/proc/self/status")

Sizes = Mapping[str, Mapping[str, Any]]  # values of configurations by contender; default: the base size


@dataclass(frozen=True)
class TimingWithMemory(Timing):
    """And the largest resident memory of the contender's process, and by how much it grew from the loaded model on."""

    peak_megabytes: float
    grown_megabytes: float


class PlainTensor(torch.Tensor):
    """A tensor that our encoder computes with on its plain path: blocks are for `torch.Tensor` alone."""


def benchmark_training(
    against: Sequence[str], cases: str, repeats: int, sizes: Sizes | None = None
) -> Iterator[Timing]:
    """Training steps of our encoder and its peers with CTC heads; ValueError as in `speed.benchmark`."""
    check_options(against, repeats)
    parsed = parse_cases(cases)
    check_gradients(SpearModel(_spear_config((sizes or {}).get("spear", {}))), noise(1, 10.0))
    for number, seconds in parsed:
        yield from _in_processes("training", ["spear", *against], number, seconds, repeats, sizes or {}, warm_up=1)


def benchmark_memory(against: Sequence[str], cases: str, repeats: int, sizes: Sizes | None = None) -> Iterator[Timing]:
    """Encoding without gradients, also with all attention weights; ValueError as in `speed.benchmark`."""
    check_options(against, repeats)
    parsed = parse_cases(cases)
    check_parity(SpearModel(_spear_config((sizes or {}).get("spear", {}))).eval(), noise(2, 7.3))
    for number, seconds in parsed:
        contenders = ["spear", "all weights", *against]
        yield from _in_processes("memory", contenders, number, seconds, repeats, sizes or {}, warm_up=0)


def check_gradients(model: SpearModel, waveforms: Sequence[torch.Tensor]) -> float:
    """The largest error of any parameter's gradient against the plain path, relative to its largest entry.

    In double precision, into which it turns the model: the gradients of downsampling are small differences of large
    sums, which in single precision differ by more than what is looked for.

    Raises:
        ValueError: it is above `GRADIENT_TOLERANCE`.
    """
    inputs = spear_features(model.config)(list(waveforms))
    features, mask = inputs["input_features"].double(), inputs["attention_mask"]
    model = model.double().eval()
    names, parameters = zip(*((name, each) for name, each in model.named_parameters() if "masked_spec" not in name))
    weights = torch.linspace(-1.0, 1.0, model.config.hidden_size, dtype=torch.float64)

    def gradients(features: torch.Tensor) -> list[torch.Tensor]:
        states = model(features, attention_mask=mask).last_hidden_state.as_subclass(torch.Tensor)
        return list(torch.autograd.grad((states * weights).square().mean(), parameters))

    pairs = zip(names, gradients(features), gradients(features.as_subclass(PlainTensor)))
    errors = {
        name: float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)) for name, one, other in pairs
    }
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= GRADIENT_TOLERANCE:
        raise ValueError(
            f"the gradient of {worst} differs from that of the plain path by {errors[worst]:.1e}: nothing is timed."
        )
    return errors[worst]


def _in_processes(
    what: str, contenders: Sequence[str], number: int, seconds: float, repeats: int, sizes: Sizes, warm_up: int
) -> Iterator[TimingWithMemory]:
    workers: dict[str, _Worker] = {}
    try:
        for name in contenders:
            job = {"what": what, "contender": name, "number": number, "seconds": seconds}
            job |= {"sizes": dict(sizes.get(name, sizes.get("spear", {}) if name == "all weights" else {}))}
            workers[name] = _Worker(job | {"threads": torch.get_num_threads()})
        held = {name: worker.answer()["megabytes"] for name, worker in workers.items()}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(warm_up + repeats):
            for name, worker in workers.items():
                turns[name].append(worker.step())
    finally:
        for worker in workers.values():
            worker.close()
    wall, cpu = (
        {name: [turn[key] for turn in turns[name][warm_up:]] for name in contenders} for key in ("wall", "cpu")
    )
    for name in contenders:
        peak = turns[name][-1]["megabytes"]
        yield TimingWithMemory(
            **measured(f"{number} x {seconds:g} s", name, wall, cpu, number * seconds),
            peak_megabytes=round(peak, 1),
            grown_megabytes=round(peak - held[name], 1),
        )


class _Worker:
    """A process with one contender, which takes a step when it is told to."""

    def __init__(self, job: Mapping[str, Any]):
        self.name = str(job["contender"])
        command = [sys.executable, "-m", __name__, json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self.name} ended with code {self.process.wait()}; see its messages.")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()  # the end of its input ends it


def _work(job: Mapping[str, Any]) -> None:
    """The worker's side: one line of JSON when it is ready, and one for each line that comes in."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    prepare = _training_step if job["what"] == "training" else _encoding
    step = prepare(job["contender"], noise(job["number"], job["seconds"]), job["sizes"])
    print(json.dumps({"megabytes": _megabytes("VmRSS")}), flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        times = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}
        print(json.dumps(times | {"megabytes": _megabytes("VmHWM")}), flush=True)


def _training_step(contender: str, waveforms: list[torch.Tensor], sizes: Mapping[str, Any]) -> Callable[[], object]:
    if contender == "spear":
        config = _spear_config({"vocab_size": VOCABULARY} | dict(sizes))
        model: PreTrainedModel = SpearForCTC(config)
        inputs = spear_features(config)(waveforms)
    else:
        _, config_class = PEERS[contender]
        # Every layer in every step, and no masks, as ours.
        usual = {"vocab_size": VOCABULARY, "layerdrop": 0.0, "apply_spec_augment": False}
        model = CTC_PEERS[contender](config_class(**(usual | dict(sizes))))
        inputs = peer_features()(waveforms)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    per_utterance = max(1, round(LABELS_PER_SECOND * len(waveforms[0]) / 16000))
    labels = torch.randint(1, VOCABULARY, (len(waveforms), per_utterance))

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _encoding(contender: str, waveforms: list[torch.Tensor], sizes: Mapping[str, Any]) -> Callable[[], object]:
    if contender in PEERS:
        model_class, config_class = PEERS[contender]
        model: PreTrainedModel = model_class(config_class(**sizes))
        features = peer_features()
    else:
        config = _spear_config(sizes)
        model, features = SpearModel(config), spear_features(config)
    if contender == "all weights":
        for module in model.modules():
            if isinstance(module, SpearAttentionWeights):
                module.register_forward_hook(lambda module, args, output: None)  # somebody looks at them
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        model(**features(waveforms), output_hidden_states=True)

    return step


def _spear_config(sizes: Mapping[str, Any]) -> SpearConfig:
    return SpearConfig(**sizes)  # the base size, where they do not say otherwise


def _megabytes(key: str) -> float:
    """A figure of this process in the kernel's words; unlike `ru_maxrss` not taken over from its parent."""
    if not _STATUS.exists():
        raise ValueError("memory is measured on Linux only.")
    return int(re.findall(rf"{key}:\s+(\d+) kB", _STATUS.read_text())[0]) / 1024


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
