# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of the encoder on this machine, against that of other encoders: `spear-hf benchmark`.

    spear-hf benchmark --against wavlm,hubert --output model_cards/benchmarks/speed.csv

Every contender has random weights and the base size, is given the same waveforms, and returns all hidden states; the
time includes its features. The contenders take turns, so that a machine that others slow down slows all of them, and
medians are compared. Before anything is timed, our encoder is compared with its own plain path. `speed_parts.py` and
`speed_steps.py` measure more than the encoder, in tables of the same columns: `--measure`.
"""

import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BatchFeature,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)

from .. import __version__
from ..configuration_spear import SpearConfig
from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearModel


PEERS = {"wavlm": (WavLMModel, WavLMConfig), "hubert": (HubertModel, HubertConfig)}
CASES = "1x10,4x15,1x60"
SAMPLING_RATE = 16000
TOLERANCE = 1e-5  # of our encoder against its plain path, relative to the largest activation of a hidden state

Encode = Callable[[list[torch.Tensor]], object]


@dataclass(frozen=True)
class Timing:
    """One row of the table: a contender in one case.

    `cpu_seconds` are those of all threads of the process, `times_spear` the median over that of our encoder, and
    `audio_per_second` the seconds of audio encoded in one.
    """

    case: str
    contender: str
    seconds: float
    least_seconds: float
    cpu_seconds: float
    times_spear: float
    audio_per_second: float
    repeats: int
    threads: int
    load: float
    machine: str
    python: str
    torch: str
    transformers: str
    spear_hf: str
    command: str


def parse_cases(text: str) -> list[tuple[int, float]]:
    """`"1x10,4x15"`: batches of so many utterances of so many seconds; ValueError names what is none."""
    cases = []
    for part in text.split(","):
        number, _, seconds = part.strip().partition("x")
        try:
            cases.append((int(number), float(seconds)))
        except ValueError:
            raise ValueError(f"{part!r} is not a case: give utterances x seconds, such as 4x15.") from None
        if cases[-1][0] < 1 or not 0.1 <= cases[-1][1] <= 3600:
            raise ValueError(f"{part!r}: one utterance or more, of 0.1 to 3600 seconds.")
    return cases


def check_options(against: Sequence[str], repeats: int) -> None:
    """ValueError names an unknown peer, or too few turns."""
    if unknown := sorted(set(against) - set(PEERS)):
        raise ValueError(f"unknown encoder {', '.join(unknown)}: choose from {', '.join(PEERS)}.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be 1 or more.")


def check_parity(model: SpearModel, waveforms: Sequence[torch.Tensor]) -> float:
    """The largest error of any hidden state against the plain path, relative to the state's largest value.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    features = spear_features(model.config)(list(waveforms))
    with torch.no_grad():
        ours = model(**features, output_hidden_states=True).hidden_states
    # With gradients and recorded attentions nothing is computed in blocks.
    plain = model(**features, output_hidden_states=True, output_attentions=True).hidden_states
    pairs = [(one, other.detach()) for one, other in zip(ours, plain)]
    errors = [float((one - other).abs().max() / other.abs().max()) for one, other in pairs]
    if not max(errors) <= TOLERANCE:
        raise ValueError(f"hidden states differ from those of the plain path by {max(errors):.1e}: nothing is timed.")
    return max(errors)


def benchmark(
    against: Sequence[str] = (), cases: str = CASES, repeats: int = 5, config: SpearConfig | None = None
) -> Iterator[Timing]:
    """Times our encoder and the peers named, case by case; see the module.

    Args:
        against: names in `PEERS`.
        cases: as `parse_cases` reads them.
        repeats: turns of every contender in a case, after one that is not counted.
        config: of our encoder; default: the base size.

    Raises:
        ValueError: an unknown peer, a bad case, or our encoder is not right.
    """
    check_options(against, repeats)
    parsed = parse_cases(cases)
    torch.manual_seed(0)
    spear = SpearModel(config or SpearConfig.base()).eval()
    check_parity(spear, noise(2, 7.3))
    contenders = {"spear": _encoder(spear, spear_features(spear.config))}
    for name in against:
        model_class, config_class = PEERS[name]
        contenders[name] = _encoder(model_class(config_class()).eval(), peer_features())
    return _benchmark(contenders, parsed, repeats)


def _benchmark(contenders: dict[str, Encode], cases: list[tuple[int, float]], repeats: int) -> Iterator[Timing]:
    for number, seconds in cases:
        waveforms = noise(number, seconds)
        turns = {name: partial(encode, waveforms) for name, encode in contenders.items()}
        yield from take_turns(f"{number} x {seconds:g} s", turns, number * seconds, repeats)


def noise(number: int, seconds: float) -> list[torch.Tensor]:
    """Waveforms (samples,) at 16 kHz, the same ones every time."""
    generator = torch.Generator().manual_seed(number)
    return [0.1 * torch.randn(round(seconds * SAMPLING_RATE), generator=generator) for _ in range(number)]


def spear_features(config: SpearConfig) -> Callable[[list[torch.Tensor]], BatchFeature]:
    """Waveforms -> the inputs of SPEAR."""
    extractor = SpearFeatureExtractor(feature_size=config.num_mel_bins)
    return lambda waveforms: extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt")


def peer_features() -> Callable[[list[torch.Tensor]], BatchFeature]:
    """Waveforms -> the padded inputs of WavLM and HuBERT."""
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return lambda waveforms: extractor(
        [waveform.numpy() for waveform in waveforms], sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt"
    )


def _encoder(model: PreTrainedModel, features: Callable[[list[torch.Tensor]], BatchFeature]) -> Encode:
    @torch.inference_mode()
    def encode(waveforms: list[torch.Tensor]) -> object:
        return model(**features(waveforms), output_hidden_states=True)

    return encode


def take_turns(
    case: str, contenders: Mapping[str, Callable[[], object]], audio_seconds: float, repeats: int, warm_up: int = 1
) -> Iterator[Timing]:
    """Times `contenders`, "spear" and others, one after the other and again; the first turns are not counted."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, compute in contenders.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            compute()
            if turn >= warm_up:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    for name in contenders:
        yield Timing(**measured(case, name, wall, cpu, audio_seconds))


def measured(
    case: str,
    contender: str,
    wall: Mapping[str, Sequence[float]],
    cpu: Mapping[str, Sequence[float]],
    audio_seconds: float,
    threads: int | None = None,
) -> dict[str, Any]:
    """The fields of a `Timing`, of the seconds that each contender took in its turns."""
    median = statistics.median(wall[contender])
    return {
        "case": case,
        "contender": contender,
        "seconds": round(median, 4),
        "least_seconds": round(min(wall[contender]), 4),
        "cpu_seconds": round(statistics.median(cpu[contender]), 4),
        "times_spear": round(median / statistics.median(wall["spear"]), 3),
        "audio_per_second": round(audio_seconds / median, 2),
        "repeats": len(wall[contender]),
        "threads": threads or torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "spear_hf": __version__,
        "command": " ".join(["spear-hf", *sys.argv[1:]]),
    }


def write_table(timings: Sequence[Timing], path: Path) -> None:
    """CSV, under a temporary name and renamed; rows of one class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(timings[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(timing) for timing in timings)
    partial.replace(path)
