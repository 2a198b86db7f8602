# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf quantize` and `spear-hf tokenize` do, from their options to an exit code."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.known_teachers import resolve_settings
from spear_hf.mvq.quantize import train_tokenizer
from spear_hf.mvq.store import QUARANTINE, SHARD_UTTERANCES
from spear_hf.mvq.teachers import WindowRule, load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer
from spear_hf.mvq.training import QuantizerTrainingConfig


SHOWN = 20  # bad files listed on the screen; the file lists all


def run_quantize(
    data: Path,
    output: Path,
    teacher: str,
    *,
    split: Sequence[str] = (),
    layer: int | None = None,
    num_codebooks: int | None = None,
    normalize: bool | None = None,
    revision: str | None = None,
    window: str | None = None,
    window_seconds: float | None = None,
    teacher_options: Sequence[str] = (),
    frames: int = 200_000,
    heldout_frames: int = 10_000,
    max_hours: float | None = None,
    batch_seconds: float | None = None,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    **training: Any,
) -> int:
    """Exit code 0, or 1 on an error; audio that could not be used is listed, and the quantiser trained without it."""
    try:
        options = _options(teacher_options)
        resolved = resolve_settings(teacher, layer, num_codebooks, normalize, options)
        if resolved.note is not None:
            print(resolved.note)
        settings = QuantizerTrainingConfig(resolved.codebooks, normalize=resolved.normalize, **training)
        utterances = read_manifest(data, split=list(split) or None)
        device = _resolved(device)
        loaded = load_teacher(
            teacher,
            layer=resolved.layer,
            device=device,
            dtype=dtype,
            revision=revision,
            window=cast(WindowRule | None, window),
            window_seconds=window_seconds,
            options=options,
        )
        report = train_tokenizer(
            loaded,
            utterances,
            output,
            settings,
            num_frames=frames,
            num_heldout=heldout_frames,
            max_hours=max_hours,
            batch_seconds=batch_seconds or _batch_seconds(device),
            overwrite=overwrite,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"spear-hf quantize: {error}", file=sys.stderr)
        return 1
    _list_bad([(entry["id"], entry["error"]) for entry in report["bad"]], output / "report.json")
    heldout, sampled = report["heldout"], report["data"]
    error_of = ", ".join(f"{value:.4f} ({passes})" for passes, value in heldout["relative_error"].items())
    print(
        f"{output}: quantiser {report['quantizer_id']}, {report['bits_per_second']:g} bit/s, trained on "
        f"{sampled['frames']} of {sampled['frames_seen']} frames ({sampled['hours']:.2f} h)\n"
        f"held-out relative error (refinement passes): {error_of}\n"
        f"perplexity of the codebooks: {min(heldout['perplexity']):.1f} to {max(heldout['perplexity']):.1f}, "
        f"codes in use: {100 * min(heldout['used']):.0f} % to {100 * max(heldout['used']):.0f} %"
    )
    return 0


def run_tokenize(
    data: Path,
    output: Path,
    tokenizer: str,
    *,
    split: Sequence[str] = (),
    teacher: str | None = None,
    refine_iters: int = 5,
    shard_utterances: int = SHARD_UTTERANCES,
    batch_seconds: float | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> int:
    """Exit code 0, or 1 on an error or if audio was bad (all other tokens are in the store)."""
    try:
        utterances = read_manifest(data, split=list(split) or None)
        device = _resolved(device)
        loaded = MvqTokenizer.from_pretrained(
            tokenizer, teacher=teacher, device=device, dtype=dtype, refine_iters=refine_iters
        )
        summary = tokenize_corpus(
            loaded,
            utterances,
            output,
            shard_utterances=shard_utterances,
            batch_seconds=batch_seconds or _batch_seconds(device),
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"spear-hf tokenize: {error}", file=sys.stderr)
        return 1
    _list_bad([(item.id, item.error) for item in summary.bad], output / QUARANTINE)
    print(
        f"{output}: {summary.utterances} utterances tokenised, {summary.already_there} were there already, "
        f"{len(summary.bad)} bad; new are {summary.seconds / 3600:.2f} h, {summary.frames} frames of "
        f"{loaded.num_codebooks} codes at {loaded.frame_rate:g} Hz"
    )
    return 1 if summary.bad else 0


def run_preview(
    audio: Path,
    output: Path,
    tokenizer: str,
    *,
    teacher: str | None = None,
    refine_iters: int = 5,
    start: float = 0.0,
    seconds: float = 10.0,
    write_audio: bool = False,
    device: str = "auto",
    dtype: str | None = None,
) -> int:
    """Exit code 0, or 1 on an error. No store is written."""
    try:
        loaded = MvqTokenizer.from_pretrained(
            tokenizer, teacher=teacher, device=_resolved(device), dtype=dtype, refine_iters=refine_iters
        )
        written = loaded.preview(audio, output, start=start, seconds=seconds, write_audio=write_audio)
    except (ValueError, OSError, ImportError) as error:
        print(f"spear-hf tokenize: {error}", file=sys.stderr)
        return 1
    print(f"{' and '.join(map(str, written))}: what the tokens of {audio} are; there is no vocoder to play them back")
    return 0


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _batch_seconds(device: str) -> float:
    """Of audio in the teacher at a time: enough for full use of the device, within the memory of ordinary ones."""
    return 120.0 if device == "cpu" else 600.0


def _options(pairs: Sequence[str]) -> dict[str, Any] | None:
    """`key=value` pairs, values read as YAML."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--teacher-option {pair!r} is not NAME=VALUE")
        options[key] = yaml.safe_load(value)
    return options or None


def _list_bad(bad: Sequence[tuple[str, str]], listed_in: Path) -> None:
    if not bad:
        return
    for _, error in bad[:SHOWN]:
        print(f"bad audio: {error}", file=sys.stderr)
    print(f"{len(bad)} bad files, all listed in {listed_in}", file=sys.stderr)
