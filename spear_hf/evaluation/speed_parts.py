# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of what surrounds the encoder: the filter bank, and the batches of `spear-hf embed`.

    spear-hf benchmark --measure features --output model_cards/benchmarks/speed_features.csv
    spear-hf benchmark --measure lengths --output model_cards/benchmarks/speed_lengths.csv

Features are compared with torchaudio's, one utterance after the other, embeddings with those of batches in the given
order. Results are compared before anything is timed.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..configuration_spear import SpearConfig
from ..data.decoding import load_utterance
from ..data.manifest import Utterance
from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearModel, masked_mean
from .embedding import embed_files
from .speed import SAMPLING_RATE, Timing, check_options, noise, parse_cases, spear_features, take_turns


FEATURE_TOLERANCE = 1e-5  # of log-mel values of white noise
EMBEDDING_TOLERANCE = 1e-4  # of means over frames, relative to the largest
BATCH_IN_ORDER = 8  # utterances
_CHECKED_FILES = 8


def benchmark_features(against: Sequence[str], cases: str, repeats: int) -> Iterator[Timing]:
    """The filter bank of a batch against torchaudio's of its utterances; ValueError as in `speed.benchmark`."""
    _check_no_peers(against, repeats)
    extract = spear_features(SpearConfig())
    for number, seconds in parse_cases(cases):
        waveforms = noise(number, seconds)
        expected = torchaudio_features(waveforms)
        features = extract(waveforms)["input_features"]
        error = max(float((one - other).abs().max()) for one, other in zip(features, expected))
        if not error <= FEATURE_TOLERANCE:
            raise ValueError(f"features differ from torchaudio's by {error:.1e}: nothing is timed.")
        contenders: dict[str, Callable[[], object]] = {
            "spear": partial(extract, waveforms),
            "torchaudio": partial(torchaudio_features, waveforms),
        }
        yield from take_turns(f"{number} x {seconds:g} s", contenders, number * seconds, repeats)


def torchaudio_features(waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Kaldi's filter bank with SPEAR's settings by torchaudio, `(frames, 128)` of each waveform `(samples,)`."""
    from torchaudio.compliance import kaldi  # here, as a torchaudio built for another torch cannot be imported

    return [
        kaldi.fbank(
            waveform[None],
            sample_frequency=SAMPLING_RATE,
            num_mel_bins=128,
            low_freq=20,
            high_freq=-400,
            dither=0,
            snip_edges=False,
        )
        for waveform in waveforms
    ]


def benchmark_lengths(
    against: Sequence[str], cases: str, repeats: int, config: SpearConfig | None = None
) -> Iterator[Timing]:
    """Files of unlike lengths through `embed_files`, against batches in order; ValueError as in `speed.benchmark`."""
    _check_no_peers(against, repeats)
    number, shortest, longest = parse_lengths(cases)
    torch.manual_seed(0)
    model = SpearModel(config or SpearConfig.base()).eval()
    extractor = SpearFeatureExtractor(feature_size=model.config.num_mel_bins)
    with tempfile.TemporaryDirectory() as folder:
        lengths = np.random.default_rng(0).uniform(shortest, longest, size=number)
        files = write_noise(Path(folder), lengths)
        _check_embeddings(files[:_CHECKED_FILES], model, extractor)
        contenders = {
            "spear": lambda: embed_as_we_do(files, model, extractor),
            "in order": lambda: embed_in_order(files, model, extractor),
        }
        case = f"{number} x {shortest:g}-{longest:g} s"
        # Minutes of work: what the first call costs more is lost in them.
        yield from take_turns(case, contenders, float(lengths.sum()), repeats, warm_up=0)


def parse_lengths(text: str) -> tuple[int, float, float]:
    """`"64x2-30"`: so many files of 2 to 30 seconds; ValueError if it is none."""
    number, _, lengths = text.partition("x")
    shortest, _, longest = lengths.partition("-")
    try:
        case = int(number), float(shortest), float(longest)
    except ValueError:
        raise ValueError(f"{text!r} is not a case of unlike lengths: give files x seconds, such as 64x2-30.") from None
    if case[0] < 1 or not 0.1 <= case[1] <= case[2] <= 120:
        raise ValueError(f"{text!r}: one file or more, of 0.1 to 120 seconds.")
    return case


def write_noise(folder: Path, lengths: Sequence[float] | np.ndarray) -> list[Path]:
    """WAV files of so many seconds."""
    random = np.random.default_rng(0)
    paths = [folder / f"{index:03d}.wav" for index in range(len(lengths))]
    for path, seconds in zip(paths, lengths):
        waveform = 0.1 * random.standard_normal(round(seconds * SAMPLING_RATE))
        soundfile.write(path, waveform.clip(-1.0, 1.0), SAMPLING_RATE)
    return paths


def embed_as_we_do(paths: Sequence[Path], model: SpearModel, extractor: SpearFeatureExtractor) -> np.ndarray:
    """Means over frames, `(files, dim)`, as `spear-hf embed --pool mean` computes them."""
    embedded = embed_files(paths, model, extractor, pool="mean")
    embeddings = {file.path: file.embedding for file in embedded if file.embedding is not None}
    return np.stack([embeddings[path] for path in paths])


@torch.inference_mode()
def embed_in_order(paths: Sequence[Path], model: SpearModel, extractor: SpearFeatureExtractor) -> np.ndarray:
    """The same in batches of `BATCH_IN_ORDER` files as they come, padded to the longest."""
    embeddings = []
    for first in range(0, len(paths), BATCH_IN_ORDER):
        waveforms = [load_utterance(Utterance(path.name, path)) for path in paths[first : first + BATCH_IN_ORDER]]
        outputs = model(**extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt"))
        embeddings.append(masked_mean(outputs.last_hidden_state, outputs.attention_mask.bool()))
    return torch.cat(embeddings).numpy()


def _check_embeddings(paths: Sequence[Path], model: SpearModel, extractor: SpearFeatureExtractor) -> None:
    ours, expected = embed_as_we_do(paths, model, extractor), embed_in_order(paths, model, extractor)
    error = float(np.abs(ours - expected).max() / np.abs(expected).max())
    if not error <= EMBEDDING_TOLERANCE:
        raise ValueError(f"embeddings differ from those of batches in order by {error:.1e}: nothing is timed.")


def _check_no_peers(against: Sequence[str], repeats: int) -> None:
    check_options(against, repeats)
    if against:
        raise ValueError(f"--against {','.join(against)}: this is not measured against other encoders.")
