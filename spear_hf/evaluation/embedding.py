# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of audio files by a pre-trained encoder: `embed_files` in Python, `spear-hf embed` in the shell."""

import json
import math
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoModel, BatchFeature, PreTrainedModel, SequenceFeatureExtractor

from ..data.audio import AudioError
from ..data.decoding import load_utterance, utterance_seconds
from ..data.manifest import MANIFEST_NAME, MANIFEST_SUFFIXES, Utterance, check_unicode, read_manifest
from ..devices import pick_device
from ..feature_extraction_spear import SpearFeatureExtractor
from ..loading_errors import loading
from ..modeling_spear import SpearModel, SpearPreTrainedModel
from ..mvq.atomic_files import write_atomically
from ..processing_spear import feature_extractor_of
from .embedding_files import FORMAT_VERSION, check_output, check_room, embedding_writer
from .windows import encode_in_windows, frames_of_windows


POOLS = ("none", "mean", "mean+std")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On the CPU a batch of 60 s takes less time per second than one of 30 s (by 6 %) and no more than one of 120 s.
_BATCH_SECONDS_CPU = 60.0
_BATCH_SECONDS_ACCELERATOR = 240.0
# In a batch there. Beyond that another batch costs less: as much as 2 to 3 s of audio (base size, two cores).
_PADDED_SECONDS_CPU = 1.5
_BATCHES_AHEAD = 2
_DECODERS = 4  # threads; decoding and resampling run outside Python's lock


@dataclass(frozen=True)
class EmbeddedFile:
    """The embedding of one file, or what is wrong with it.

    `embedding` is float32 (frames, dim), with layer="all" (num_hidden_layers + 1, frames, dim); pooling takes the
    frames away, and "mean+std" doubles dim. `frame_rate` is in Hz, None where frames were pooled or it is unknown.
    """

    id: str
    path: Path
    embedding: np.ndarray | None
    frame_rate: float | None = None
    error: str | None = None


def load_encoder(
    model: str | os.PathLike, device: str = "auto", dtype: str = "float32"
) -> tuple[PreTrainedModel, SequenceFeatureExtractor]:
    """Model and feature extractor of a folder or Hub id; published SPEAR folders lack the latter, and get the default.

    Raises:
        ValueError: an unknown dtype, or a device that cannot be used.
        OSError: there is no such model, or it is damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    place = pick_device(device)  # before a model is loaded in vain
    with loading(model):
        encoder = AutoModel.from_pretrained(model, dtype=DTYPES[dtype])
    encoder = encoder.to(place).eval()
    if encoder.config.model_type == "spear":
        return encoder, feature_extractor_of(model, encoder.config)
    return encoder, AutoFeatureExtractor.from_pretrained(model)


def embed_files(
    paths: Sequence[str | os.PathLike | Utterance],
    model: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    layer: int | str = "last",
    pool: str = "none",
    batch_seconds: float | None = None,
    max_seconds: float = 120.0,
    window_seconds: float | None = None,
) -> Iterator[EmbeddedFile]:
    """Embeds audio files in batches of like length, longest first; a file that cannot be used comes with its error.

    Files are decoded a few batches ahead, so memory does not grow with their number. An embedding does not depend on
    the other files: SPEAR is invariant to padding, and other encoders, most of which are not, get one file at a time.

    Args:
        paths: audio files, folders of them, manifests, or utterances; ids are paths relative to the folder given.
        model: any transformers audio encoder; of a model with a head, the encoder is used.
        layer: "last" for last_hidden_state; 0 for the output of the stem and K for that of layer K; "all" for all of
            these; "mean" for their mean.
        pool: over frames: "none", "mean", or "mean+std" (both, concatenated).
        batch_seconds: rows times longest row of a batch; a longer file makes a batch of its own. Default: 60 on the
            CPU, 240 elsewhere.
        max_seconds: longer files are refused, because the time of attention grows with the square of the length, and
            elsewhere than on a CPU its memory too.
        window_seconds: files longer than that are encoded in windows of it, with 10 s of context on either side:
            nearly the same embedding, in linear time and little memory; see `windows.py`. For SPEAR only, and at least
            `batch_seconds`, whose default is no more than that. Default: every file as a whole.

    Raises:
        ValueError: an unknown layer or pool, an empty folder, a bad manifest, or windows that are not possible.
    """
    encoder = cast(PreTrainedModel, model.base_model)
    layer = parse_layer(layer, encoder.config.num_hidden_layers)
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} must be one of {', '.join(POOLS)}")
    if window_seconds is not None and not window_seconds > 0:
        raise ValueError(f"window_seconds={window_seconds} must be positive")
    if batch_seconds is None:
        batch_seconds = _BATCH_SECONDS_CPU if encoder.device.type == "cpu" else _BATCH_SECONDS_ACCELERATOR
        batch_seconds = min(batch_seconds, window_seconds or batch_seconds)
    if not (batch_seconds > 0 and max_seconds > 0):
        raise ValueError(f"batch_seconds={batch_seconds} and max_seconds={max_seconds} must be positive")
    if window_seconds is not None and not isinstance(encoder, SpearModel):
        raise ValueError(f"window_seconds={window_seconds} is for SPEAR, not for {type(encoder).__name__}")
    if window_seconds is not None and not window_seconds >= batch_seconds:
        raise ValueError(f"window_seconds={window_seconds} must be at least batch_seconds={batch_seconds}")
    if window_seconds is not None:
        frames_of_windows(cast(SpearModel, encoder).config, window_seconds)  # an error before any work
    utterances = collect_utterances(paths)
    return _embed(utterances, encoder, feature_extractor, layer, pool, batch_seconds, max_seconds, window_seconds)


def parse_layer(layer: int | str, num_layers: int) -> int | str:
    """The layer as `embed_files` takes it, checked: "last", "all", "mean", or a number from 0 to num_layers."""
    if layer in ("last", "all", "mean"):
        return layer
    number = int(layer) if re.fullmatch(r"\d+", str(layer)) else -1
    if not 0 <= number <= num_layers:
        raise ValueError(
            f"layer={layer!r} must be last, all, mean, 0 (the output of the stem), or 1 to {num_layers} "
            f"(the model has {num_layers} layers)"
        )
    return number


def collect_utterances(paths: Sequence[str | os.PathLike | Utterance]) -> list[Utterance]:
    """The files that the arguments name, each once, with unique ids.

    A file's id is its path relative to the folder it was found in, its name if it was given itself, or its id in the
    manifest. Where two files would share an id, each takes its whole path instead.
    """
    found: dict[tuple[str, str | None], Utterance] = {}
    for argument in paths:
        listed = isinstance(argument, Utterance)  # by a manifest, which may give one file several ids
        if isinstance(argument, Utterance):
            utterances = [argument]
        elif Path(argument).is_dir() or Path(argument).suffix.lower() in MANIFEST_SUFFIXES:
            utterances = read_manifest(argument)
            listed = not Path(argument).is_dir() or (Path(argument) / MANIFEST_NAME).is_file()
        else:
            utterances = [Utterance(id=Path(argument).name, path=Path(argument))]
        for utterance in utterances:
            found.setdefault((os.path.realpath(utterance.path), utterance.id if listed else None), utterance)
    for utterance in found.values():
        check_unicode(os.fspath(utterance.path), f"the name of {os.fspath(utterance.path)!r}", "rename it")
    for whole_path in (lambda path, real: path.as_posix(), lambda path, real: real):
        counts = Counter(utterance.id for utterance in found.values())
        for key, utterance in found.items():
            if counts[utterance.id] > 1:
                found[key] = replace(utterance, id=whole_path(utterance.path, key[0]))
    return list(found.values())


def _embed(
    utterances: list[Utterance],
    encoder: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    layer: int | str,
    pool: str,
    batch_seconds: float,
    max_seconds: float,
    window_seconds: float | None,
) -> Iterator[EmbeddedFile]:
    training = encoder.training
    encoder.eval()
    try:
        timed: list[tuple[float, Utterance]] = []
        for utterance in utterances:
            seconds, error = _seconds(utterance, max_seconds)
            if error is None:
                timed.append((seconds, utterance))
            else:
                yield EmbeddedFile(utterance.id, utterance.path, None, error=error)
        timed.sort(key=lambda pair: (-pair[0], pair[1].id))
        if not isinstance(encoder, SpearPreTrainedModel):
            batch_seconds = 0.0
        padded_seconds = _PADDED_SECONDS_CPU if encoder.device.type == "cpu" else math.inf
        for batch in _decoded(_batches(timed, batch_seconds, padded_seconds), feature_extractor, max_seconds):
            for utterance, result in batch:
                if isinstance(result, str):
                    yield EmbeddedFile(utterance.id, utterance.path, None, error=result)
            good = [(utterance, result) for utterance, result in batch if not isinstance(result, str)]
            if good:
                yield from _embed_or_explain(good, encoder, feature_extractor, layer, pool, window_seconds)
    finally:
        encoder.train(training)


def _seconds(utterance: Utterance, max_seconds: float) -> tuple[float, str | None]:
    """Length of the audio, from the manifest or the file's header, and what is wrong with it, if something is."""
    try:
        seconds = utterance_seconds(utterance)
    except AudioError as error:
        return 0.0, str(error)
    return seconds, _too_long(utterance, seconds, max_seconds) if seconds > max_seconds else None


def _too_long(utterance: Utterance, seconds: float, max_seconds: float) -> str:
    return (
        f"{utterance.path} is {seconds:.1f} s long, over max_seconds={max_seconds:g}: cut it, or raise the limit "
        "(the time needed grows with the square of the length, unless window_seconds is set)"
    )


def _batches(
    timed: list[tuple[float, Utterance]], batch_seconds: float, padded_seconds: float
) -> Iterator[list[Utterance]]:
    """Consecutive utterances, longest first, while rows x longest row and the padding of all rows stay within the
    caps; at least one."""
    batch: list[Utterance] = []
    longest = padding = 0.0
    for seconds, utterance in timed:
        padding += longest - seconds
        if batch and ((len(batch) + 1) * longest > batch_seconds or padding > padded_seconds):
            yield batch
            batch = []
        if not batch:
            longest, padding = seconds, 0.0
        batch.append(utterance)
    if batch:
        yield batch


def _decoded(
    batches: Iterator[list[Utterance]], feature_extractor: SequenceFeatureExtractor, max_seconds: float
) -> Iterator[list[tuple[Utterance, np.ndarray | str]]]:
    """Batches with their waveforms, or errors, decoded in threads a few batches ahead."""

    def decode(utterance: Utterance) -> np.ndarray | str:
        try:
            waveform = load_utterance(utterance, feature_extractor.sampling_rate)
        except AudioError as error:
            return str(error)
        seconds = len(waveform) / feature_extractor.sampling_rate
        if seconds > max_seconds + 1:  # a list may say less, and headers of MP3 are rough
            return _too_long(utterance, seconds, max_seconds)
        shortest = getattr(feature_extractor, "min_num_samples", 1)
        if len(waveform) < shortest and not getattr(feature_extractor, "pad_short", False):
            return (
                f"{utterance.path} is too short: {len(waveform)} samples at {feature_extractor.sampling_rate} Hz, the "
                f"shortest possible has {shortest}"
            )
        return waveform

    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
        ahead: deque[list[tuple[Utterance, Future[np.ndarray | str]]]] = deque()
        try:
            for batch in batches:
                ahead.append([(utterance, pool.submit(decode, utterance)) for utterance in batch])
                if len(ahead) > _BATCHES_AHEAD:
                    yield [(utterance, future.result()) for utterance, future in ahead.popleft()]
            while ahead:
                yield [(utterance, future.result()) for utterance, future in ahead.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _embed_or_explain(
    batch: list[tuple[Utterance, np.ndarray]],
    encoder: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    layer: int | str,
    pool: str,
    window_seconds: float | None,
) -> Iterator[EmbeddedFile]:
    """The results of a batch. Where it fails, for want of memory say, its files are tried one by one."""
    waveforms = [waveform for _, waveform in batch]
    try:
        embeddings, rate = embed_waveforms(waveforms, encoder, feature_extractor, layer, pool, window_seconds)
    except (ValueError, RuntimeError) as error:
        if len(batch) > 1:
            for pair in batch:
                yield from _embed_or_explain([pair], encoder, feature_extractor, layer, pool, window_seconds)
        else:
            utterance, waveform = batch[0]
            message = f"{utterance.path} ({len(waveform)} samples) was refused by the encoder: {error}"
            yield EmbeddedFile(utterance.id, utterance.path, None, error=message)
        return
    for (utterance, _), embedding in zip(batch, embeddings):
        if np.isfinite(embedding).all():
            yield EmbeddedFile(utterance.id, utterance.path, embedding, rate)
        else:
            helps = "" if encoder.dtype == torch.float32 else "; try float32"
            message = f"{utterance.path}: its embedding is not finite in {encoder.dtype}{helps}"
            yield EmbeddedFile(utterance.id, utterance.path, None, error=message)


@torch.inference_mode()
def embed_waveforms(
    waveforms: list[np.ndarray],
    encoder: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    layer: int | str,
    pool: str,
    window_seconds: float | None = None,
) -> tuple[list[np.ndarray], float | None]:
    """Embeddings (layers, frames, dim), or fewer axes, as `embed_files` has them, and their frame rate.

    A batch of waveforms of unlike lengths is for SPEAR only; other encoders get one at a time.
    """
    if not isinstance(encoder, SpearPreTrainedModel) and len(waveforms) > 1:
        parts = [embed_waveforms([waveform], encoder, feature_extractor, layer, pool) for waveform in waveforms]
        return [embeddings[0] for embeddings, _ in parts], parts[0][1]
    spear = isinstance(encoder, SpearPreTrainedModel)
    extract = cast(Callable[..., BatchFeature], feature_extractor)
    settings = {"sampling_rate": feature_extractor.sampling_rate, "padding": True, "return_tensors": "pt"}
    if isinstance(feature_extractor, SpearFeatureExtractor):
        settings |= {"device": encoder.device, "return_attention_mask": True}
    inputs = extract(waveforms, **settings)
    inputs = inputs.to(encoder.device, dtype=encoder.dtype)
    outputs: Any
    longest = max(map(len, waveforms)) / feature_extractor.sampling_rate
    if window_seconds is not None and longest > window_seconds:  # a batch of one, as windows are longer than batches
        encoder = cast(SpearModel, encoder)
        features = inputs["input_features"]
        outputs = encode_in_windows(
            encoder,
            features,
            window_seconds,
            output_hidden_states=layer != "last",
            keep=lambda states: _of_layers(states, layer),
        )
        states = outputs.hidden_states or (outputs.last_hidden_state,)  # (batch, frames, dim)
    else:
        outputs = encoder(**inputs, output_hidden_states=layer != "last", return_dict=True)
        states = (outputs.last_hidden_state,) if layer == "last" else _of_layers(outputs.hidden_states, layer)

    rate: float | None = None
    if spear:
        # Layers run at 50 Hz, only the last hidden state may be at 25 Hz.
        counts = (inputs["attention_mask"].sum(dim=1) - 7) // 2
        rate = 50.0
        if layer == "last":
            counts = -(-counts // encoder.config.output_downsampling_factor)
            rate /= encoder.config.output_downsampling_factor
    else:  # one utterance, all frames of it
        counts = torch.tensor([states[0].shape[1]])
        if (ratio := getattr(encoder.config, "inputs_to_logits_ratio", None)) is not None:
            rate = feature_extractor.sampling_rate / ratio

    embeddings = []
    for row, count in enumerate(counts.tolist()):
        frames = torch.stack([state[row, :count] for state in states]).float()  # (layers, frames, dim)
        if pool == "mean":
            frames = frames.mean(dim=1)
        elif pool == "mean+std":
            frames = torch.cat([frames.mean(dim=1), frames.std(dim=1, correction=0)], dim=1)
        embeddings.append((frames if layer == "all" else frames[0]).cpu().numpy())
    return embeddings, rate if pool == "none" else None


def _of_layers(states: tuple[torch.Tensor, ...], layer: int | str) -> tuple[torch.Tensor, ...]:
    """All hidden states, their mean, or one."""
    if layer == "mean":
        return (torch.stack([state.float() for state in states]).mean(dim=0),)
    return states if layer == "all" else (states[cast(int, layer)],)


def embed_to_file(
    paths: Sequence[str | os.PathLike],
    model: str | os.PathLike,
    output: str | os.PathLike,
    layer: int | str = "last",
    pool: str = "none",
    batch_seconds: float | None = None,
    max_seconds: float = 120.0,
    window_seconds: float | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> list[EmbeddedFile]:
    """Embeds files into `output` (.safetensors, .npz or .parquet), and returns those that could not be embedded.

    These are also listed in the metadata of the output and in `OUTPUT.errors.jsonl`, which is there only if there are
    any. The output appears when it is complete, and not at all if every file was bad.

    Raises:
        ValueError: a wrong argument, or no file could be embedded. Wrong arguments are found before any work is done.
    """
    output = Path(output)
    check_output(output)
    utterances = collect_utterances(paths)
    if not utterances:
        raise ValueError("no audio to embed: name at least one file or folder")
    check_room(output, [utterance.id for utterance in utterances])
    encoder, feature_extractor = load_encoder(model, device, dtype)
    results = embed_files(
        utterances, encoder, feature_extractor, layer, pool, batch_seconds, max_seconds, window_seconds
    )
    settings: dict[str, Any] = {
        "format": "spear_hf.embeddings",
        "format_version": FORMAT_VERSION,
        "model": os.fspath(model),
        "layer": str(layer),
        "pool": pool,
        "dtype": dtype,
    }
    bad: list[EmbeddedFile] = []
    error_file = output.with_name(f"{output.name}.errors.jsonl")
    with embedding_writer(output) as writer:
        frame_rate = None
        for result in tqdm(results, total=len(utterances), unit="file", desc="embed", file=sys.stderr):
            if result.embedding is None:
                bad.append(result)
            else:
                writer.add(result.id, str(result.path), result.embedding, result.frame_rate)
                frame_rate = result.frame_rate
        errors = [{"id": result.id, "path": str(result.path), "error": result.error} for result in bad]
        _write_errors(error_file, errors)
        if len(bad) == len(utterances):
            raise ValueError(
                f"none of the {len(bad)} files could be embedded, so {output} is not written; see {error_file}. The "
                f"first: {bad[0].error}"
            )
        writer.finish({**settings, "frame_rate": frame_rate, "errors": errors})
    return bad


def _write_errors(path: Path, errors: list[dict[str, Any]]) -> None:
    """One JSON object a line; without errors, removes what an earlier run left."""
    if not errors:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors).encode())


def run_embedding(paths: Sequence[Path], output: Path, **settings: Any) -> int:
    """What `spear-hf embed` does: exit code 0, or 1 if a file was bad (the others are embedded) or on an error."""
    try:
        bad = embed_to_file(paths, output=output, **settings)
    except (ValueError, OSError, ImportError) as error:
        print(f"spear-hf embed: {error}", file=sys.stderr)
        return 1
    for result in bad:
        print(f"bad file: {result.error}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} bad files, listed in {output}.errors.jsonl; the others are in {output}", file=sys.stderr)
    return 1 if bad else 0
