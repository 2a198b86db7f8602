# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf quantize`, `tokenize` and `merge-tokens` do, from their options to an exit code."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from spear_hf.data.commands import DataOptions
from spear_hf.data.sources import PIECE_HOURS, PIECE_UTTERANCES
from spear_hf.devices import pick_device
from spear_hf.memory_errors import lack_of_memory
from spear_hf.mvq.known_teachers import resolve_settings
from spear_hf.mvq.merge import merge_stores
from spear_hf.mvq.quantize import train_tokenizer
from spear_hf.mvq.store import QUARANTINE
from spear_hf.mvq.teachers import WindowRule, load_teacher
from spear_hf.mvq.tokenize_corpus import SHARD_HOURS_WITH_AUDIO, TokenizeSummary, tokenize_corpus
from spear_hf.mvq.tokenize_report import StoreTotals, metrics_folder, store_totals, write_summary
from spear_hf.mvq.tokenizer import MvqTokenizer
from spear_hf.mvq.training import QuantizerTrainingConfig
from spear_hf.mvq.workers import Ranks, Share, parse_share


SHOWN = 20  # bad files listed on the screen; the file lists all


def run_quantize(
    data: DataOptions,
    output: Path,
    teacher: str,
    *,
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
        source = data.source()
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
            source,
            output,
            settings,
            num_frames=frames,
            num_heldout=heldout_frames,
            max_hours=max_hours,
            batch_seconds=_batch_seconds(batch_seconds, device),
            overwrite=overwrite,
        )
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError, MemoryError) as error:
        helps = "--batch-seconds, --batch-size or --frames"
        print(f"spear-hf quantize: {_explained(error, helps)}", file=sys.stderr)
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
    data: DataOptions,
    output: Path,
    tokenizer: str,
    *,
    teacher: str | None = None,
    refine_iters: int = 5,
    shard_utterances: int = PIECE_UTTERANCES,
    batch_seconds: float | None = None,
    device: str = "auto",
    dtype: str | None = None,
    shard: str | None = None,
    with_audio: bool = False,
) -> int:
    """Exit code 0, or 1 on an error or if audio was bad (all other tokens are in the store).

    Of the ranks of one launcher only the main one speaks, and has the exit code of all.
    """
    try:
        share = parse_share(shard) if shard is not None else Share()
        source = data.source(shard_utterances, SHARD_HOURS_WITH_AUDIO if with_audio else PIECE_HOURS)
        ranks = Ranks.launched()
        device = _resolved(device, ranks.local_rank)
        loaded = MvqTokenizer.from_pretrained(
            tokenizer, teacher=teacher, device=device, dtype=dtype, refine_iters=refine_iters
        )
        summary = tokenize_corpus(
            loaded,
            source,
            output,
            batch_seconds=_batch_seconds(batch_seconds, device),
            share=share,
            ranks=ranks,
            with_audio=with_audio,
            metrics=metrics_folder(output),
        )
        if ranks.is_main and summary.complete:
            totals = store_totals(output)
            write_summary(metrics_folder(output), asdict(totals))
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(f"spear-hf tokenize: {_explained(error)}", file=sys.stderr)
        return 1
    ranks.leave()
    if not ranks.is_main:
        return 0
    _list_bad([(item.id, item.error) for item in summary.bad], output / QUARANTINE if summary.complete else None)
    if shards := summary.bad_shards:
        more = f" and {len(shards) - SHOWN} more" if len(shards) > SHOWN else ""
        print(
            f"to try repaired files again, delete their shards ({', '.join(shards[:SHOWN])}{more}) and run the same "
            "command again",
            file=sys.stderr,
        )
    print(
        f"{output}: {summary.utterances} utterances tokenised, {summary.already_there} were there already, "
        f"{len(summary.bad)} bad; new are {summary.seconds / 3600:.2f} h, {summary.frames} frames of "
        f"{loaded.num_codebooks} codes at {loaded.frame_rate:g} Hz"
    )
    print(_told(totals) if summary.complete else _still_missing(summary))
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


def run_merge_tokens(output: Path, stores: Sequence[str], *, intersect: bool = False) -> int:
    """Exit code 0, or 1 on an error, of which nothing is written. `stores` are NAME=FOLDER."""
    named: dict[str, str] = {}
    try:
        for pair in stores:
            name, equals, folder = pair.partition("=")
            if not equals or not folder:
                raise ValueError(f"--store {pair!r} is not NAME=STORE")
            if name in named:
                raise ValueError(f"--store {name}=... is given twice")
            named[name] = folder
        summary = merge_stores(output, named, intersect=intersect)
    except (ValueError, OSError) as error:
        print(f"spear-hf merge-tokens: {error}", file=sys.stderr)
        return 1
    left_out = f", {summary.left_out} left out that not every store has" if summary.left_out else ""
    print(f"{output}: {summary.utterances} utterances with the tokens of {', '.join(named)}{left_out}")
    return 0


def _explained(error: Exception, helps: str = "--batch-seconds") -> str:
    """What is printed of it. A RuntimeError is raised again, but for torch's that there is no memory."""
    if lacking := lack_of_memory(error):
        return f"there is not enough memory ({lacking}): say a smaller {helps}"
    if isinstance(error, RuntimeError):
        raise error
    return str(error)


def _told(totals: StoreTotals) -> str:
    bad = "".join(f"\n  {count} bad: {reason}" for reason, count in totals.bad_by_reason.items())
    return (
        f"the store is complete: {totals.utterances} utterances, {totals.hours:.2f} h, {totals.frames} frames, "
        f"{totals.bits / 8e6:.2f} MB of tokens, {totals.bad} bad{bad}"
    )


def _still_missing(summary: TokenizeSummary) -> str:
    return f"the store is not complete: {summary.missing} shards are for other jobs to make; the last one completes it"


def _resolved(device: str, local_rank: int | None = None) -> str:
    """`local_rank`: of several processes of a machine, each has the GPU of its number, and touches no other."""
    if local_rank and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
    return str(pick_device(device))


def _batch_seconds(given: float | None, device: str) -> float:
    """Of audio in the teacher at a time; by default enough for full use of the device, within ordinary memory."""
    if given is None:
        return 120.0 if device == "cpu" else 600.0
    if not given > 0:
        raise ValueError(f"batch_seconds must be positive, not {given}")
    return given


def _options(pairs: Sequence[str]) -> dict[str, Any] | None:
    """`key=value` pairs, values read as YAML."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--teacher-option {pair!r} is not NAME=VALUE")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--teacher-option {pair!r}: the value is not valid YAML ({error})") from None
    return options or None


def _list_bad(bad: Sequence[tuple[str, str]], listed_in: Path | None) -> None:
    if not bad:
        return
    for _, error in bad[:SHOWN]:
        print(f"bad audio: {error}", file=sys.stderr)
    where = f"all listed in {listed_in}" if listed_in else "listed in the store once it is complete"
    print(f"{len(bad)} bad files, {where}", file=sys.stderr)
