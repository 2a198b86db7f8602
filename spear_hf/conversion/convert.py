# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Published checkpoints and icefall's to ours, and ours to the published format."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearForPreTraining, SpearModel, share_weights
from .checks import bit_equal, check_activations, check_forward, check_tensors
from .errors import ConversionError
from .icefall import read_icefall
from .layouts import (
    BASE,
    LEFT_OVER_REASON,
    Checkpoint,
    build_model,
    check_same_architecture,
    make_config,
    published_format,
    read_checkpoint,
)
from .names import LEFT_OVER_VALUE
from .reading import CONFIG, LEFT_OVER_FILE, WEIGHTS, Source, read_folder, read_source
from .writing import check_output, whole_folder


TOLERANCE = 1e-5
_KINDS = {"published": "published format", "icefall": "icefall checkpoint", "spear_hf": "format of spear_hf"}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "spear_hf",
    revision: str | None = None,
    heads: Mapping[str, str] | None = None,
    num_heads: int | None = None,
    unmasked_dim: int | None = None,
    activations: str | Path | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
    report: Callable[[str], object] = print,
) -> Path:
    """Writes the folder `output` from a folder, a Hub id or an icefall `.pt`, after checking that nothing is lost.

    The account of the tensors and the parity check go to `report` before anything is written. ConversionError for a
    source that is not understood to the last tensor and for a result that differs; then nothing is written.

    heads, num_heads, unmasked_dim: see `read_icefall`. activations: see `check_activations`, with its tolerance.
    """
    if to not in ("spear_hf", "published"):
        raise ConversionError(f"--to {to}: spear_hf and published are the formats.")
    target = check_output(output, force)
    read = read_source(source, revision)
    check_output(output, force, read.folder)
    if read.kind == to:
        raise ConversionError(
            f"{read.label} is in the {_KINDS[to]} already; the other one is --to "
            f"{'published' if to == 'spear_hf' else 'spear_hf'}."
        )
    if read.kind == "icefall":
        checkpoint = read_icefall(read, heads, num_heads, unmasked_dim)
    elif heads or num_heads is not None or unmasked_dim is not None:
        raise ConversionError(
            f"--head, --num-heads and --unmasked-dim are for icefall's .pt files; {read.label} is none."
        )
    else:
        checkpoint = read_checkpoint(read)
    if to == "published":
        checkpoint = _without_heads(checkpoint)
    _report_account(read, checkpoint, to, report)

    # What is checked is read from the result, in the shape in which it will be written.
    result = _as_written(checkpoint, to)
    model = build_model(result)
    prefix = BASE if result.heads else ""
    converted = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    report(f"parity   {check_tensors(read.tensors, checkpoint.renamed, converted)}")
    checked = model if model.dtype == torch.float32 else build_model(result, torch.float32)
    if activations is not None:
        encoder = checked.spear if isinstance(checked, SpearForPreTraining) else checked
        assert isinstance(encoder, SpearModel)
        report(f"         {check_activations(encoder, Path(activations), tolerance)}")
    report(f"         {check_forward(checked)}")

    with whole_folder(target) as folder:
        if to == "published":
            values, tensors = published_format(checkpoint)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            _write_ours(folder, model, checkpoint)
        share_weights(folder, "*.safetensors")
        _check_written(folder, checkpoint)
    report(f"written  {target}")
    return target


def _as_written(checkpoint: Checkpoint, to: str) -> Checkpoint:
    if to == "spear_hf":
        return checkpoint
    values, tensors = published_format(checkpoint)
    label = "the published format"
    check_same_architecture(checkpoint.config, make_config(values, label), label)
    return read_checkpoint(Source(label, "published", tensors, values))


def _without_heads(checkpoint: Checkpoint) -> Checkpoint:
    """The published format has no place for heads."""
    of_heads = {name for name, ours in checkpoint.renamed.items() if ours in checkpoint.heads}
    return dataclasses.replace(
        checkpoint,
        renamed={name: ours for name, ours in checkpoint.renamed.items() if name not in of_heads},
        dropped=checkpoint.dropped | dict.fromkeys(sorted(of_heads), "head, which the published format is without"),
        heads={},
    )


def _write_ours(folder: Path, model: SpearModel | SpearForPreTraining, checkpoint: Checkpoint) -> None:
    model.save_pretrained(folder)
    SpearFeatureExtractor(feature_size=checkpoint.config.num_mel_bins).save_pretrained(folder)
    if _unusual_left_over(checkpoint):
        save_file(checkpoint.left_over, folder / LEFT_OVER_FILE, metadata={"format": "pt"})


def _unusual_left_over(checkpoint: Checkpoint) -> bool:
    return any(bool((tensor != LEFT_OVER_VALUE).any()) for tensor in checkpoint.left_over.values())


def _check_written(folder: Path, checkpoint: Checkpoint) -> None:
    """Reads the files as any later reader does; ConversionError if they are not what was checked."""
    written = read_checkpoint(read_folder(folder, str(folder)))
    check_same_architecture(checkpoint.config, written.config, "config.json")
    if checkpoint.heads and written.config.pretraining_targets != checkpoint.config.pretraining_targets:
        raise ConversionError(f"config.json has the targets {written.config.pretraining_targets}.")
    # As published, so that the unused vectors are compared as well.
    tensors = published_format(written)[1] | written.heads
    expected = published_format(checkpoint)[1] | checkpoint.heads
    if tensors.keys() != expected.keys() or not all(bit_equal(tensors[name], expected[name]) for name in expected):
        raise ConversionError(f"the tensors read back from {folder} are not those written; is the disk in order?")


def _report_account(source: Source, checkpoint: Checkpoint, to: str, report: Callable[[str], object]) -> None:
    """How every tensor of the source is used."""
    config = checkpoint.config
    what = "SpearForPreTraining" if checkpoint.heads else "SpearModel"
    dtype = str(next(iter(source.tensors.values())).dtype).removeprefix("torch.")
    report(f"source   {source.label}: {_KINDS[source.kind]}, {len(source.tensors)} tensors, {dtype}")
    report(f"target   {_KINDS[to]}: {what}, {config.num_hidden_layers} layers of width {config.hidden_size}")
    for name, target in (config.pretraining_targets or {}).items() if checkpoint.heads else ():
        shape = f"{target['num_codebooks']} codebooks of {target['codebook_size']}"
        places = [key for key, ours in checkpoint.renamed.items() if ours.startswith(f"prediction_heads.{name}.")]
        report(f"head     {name}: {shape}, loss weight {target['weight']}, from {' and '.join(places)}")
    for note in checkpoint.notes:
        report(f"note     {note}")
    if source.unread:
        report(f"not read {', '.join(source.unread)}")
    aside = len(checkpoint.left_over) if to == "published" or _unusual_left_over(checkpoint) else 0
    counts = [
        f"{len(checkpoint.renamed)} renamed",
        f"{aside} kept aside",
        f"{len(checkpoint.dropped) - aside} dropped",
    ]
    report(f"tensors  {', '.join(counts)}")
    reasons = defaultdict(list)
    for name, reason in checkpoint.dropped.items():
        reasons[reason].append(name)
    for reason, names in reasons.items():
        if reason == LEFT_OVER_REASON and aside:
            report(f"aside    {reason}, but kept for the {'way back' if to == 'spear_hf' else 'published code'}:")
        else:
            report(f"dropped  {reason}:")
        for name in names:
            report(f"           {name}")
