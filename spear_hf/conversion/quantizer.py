# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Quantisers of the `multi_quantization` package to ours."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..mvq.quantizer import PASSES, SCALE_SPEED, MultiCodebookQuantizer
from .checks import bit_equal
from .errors import ConversionError, listed
from .reading import WEIGHTS, plain_tensors, read_tensors
from .writing import check_output, whole_folder


PARAMETERS = ("centers", "to_logits.weight", "to_logits.bias", "logits_scale", "centers_scale")
IDENTITY = "id_buf"  # 8 characters that name a quantiser; becomes part of the provenance
STATISTICS = {"mean": "feature_mean", "std": "feature_std"}
NESTED = "quantizer."
FRAMES = 256
TOLERANCE = 1e-5
SHARE = 0.99  # of equal codes; where two are as good as each other the order of summation decides


def convert_quantizer(
    source: str | Path,
    output: str | Path,
    *,
    teacher: str | None = None,
    teacher_layer: int | None = None,
    teacher_revision: str | None = None,
    frame_rate: float | None = None,
    force: bool = False,
    report: Callable[[str], object] = print,
) -> Path:
    """Writes a folder for `MultiCodebookQuantizer.from_pretrained`.

    source: `.pt` (read with weights_only=True) or `.safetensors`, holding the state dict of a `Quantizer`, or, as the
    author's recipe saves it, that under `quantizer` (in safetensors: `quantizer.*`) beside `mean` and `std` of the
    features. The other arguments are what the file does not say. ConversionError as in `convert`.
    """
    target, path = check_output(output, force), Path(source)
    if not path.is_file():
        raise ConversionError(f"{path} is not a file; give the .pt or .safetensors of a quantiser.")
    state, statistics = _split(read_tensors(path), str(path))
    label = f"{path}, state dict of a multi_quantization.Quantizer"
    expected = {*PARAMETERS, IDENTITY}
    if expected != set(state):
        missing, unknown = expected - set(state), set(state) - expected
        raise ConversionError(
            f"{label}: missing {listed(missing) or 'nothing'}, unknown {listed(unknown) or 'nothing'}."
        )
    for name in (*PARAMETERS, *statistics):
        tensor = (state | statistics)[name]
        if tensor.dtype != torch.float32:
            raise ConversionError(f"{label}: {name} is {tensor.dtype}, not torch.float32; convert it first.")
    try:
        quantizer = MultiCodebookQuantizer.from_multi_quantization(
            state,
            **statistics,
            teacher=teacher,
            teacher_layer=teacher_layer,
            teacher_revision=teacher_revision,
            frame_rate=frame_rate,
        )
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error

    config = quantizer.config
    shape = f"{config.num_codebooks} codebooks of {config.codebook_size}, features of {config.feature_size}"
    report(f"source   {path}: {len(state) + len(statistics)} tensors")
    report(f"target   quantiser {quantizer.quantizer_id}: {shape}, {'' if statistics else 'not '}standardised")
    report(f"tensors  {len(PARAMETERS) + len(statistics)} kept; {IDENTITY} goes into the provenance:")
    report(f"           {config.provenance}")
    kept = {name: state[name] for name in PARAMETERS} | {STATISTICS[key]: value for key, value in statistics.items()}
    _check_tensors(kept, quantizer.state_dict())
    report(f"parity   {len(kept)} of {len(kept)} tensors bit-equal after the round trip")
    for line in _check_codes(quantizer, state, statistics):
        report(f"         {line}")

    with whole_folder(target) as folder:
        quantizer.save_pretrained(folder)
        _check_tensors(kept, load_file(folder / WEIGHTS))
        MultiCodebookQuantizer.from_pretrained(folder)
    report(f"written  {target}")
    return target


def _split(content: Any, label: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict, and mean and std where they are."""
    if isinstance(content, Mapping) and "quantizer" in content:
        state = plain_tensors(content["quantizer"], f"{label}, entry quantizer")
        rest = {key: value for key, value in content.items() if key != "quantizer"}
    else:
        flat = plain_tensors(content, label)
        state = {key.removeprefix(NESTED): value for key, value in flat.items() if key.startswith(NESTED)}
        if not state:
            return flat, {}
        rest = {key: value for key, value in flat.items() if not key.startswith(NESTED)}
    if rest and set(rest) != set(STATISTICS):
        raise ConversionError(f"{label}: beside `quantizer` mean and std are expected, not {listed(rest)}.")
    return state, plain_tensors(rest, label) if rest else {}


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    differing = [name for name in expected if name not in found or not bit_equal(expected[name], found[name])]
    if differing or set(found) != set(expected):
        raise ConversionError(f"{listed(differing or found)} came back changed from the round trip; please report it.")


@torch.no_grad()
def _check_codes(
    quantizer: MultiCodebookQuantizer, state: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
) -> list[str]:
    """Codes and features against the formulas, and against the package itself where it is installed."""
    config = quantizer.config
    mean, std = statistics.get("mean", torch.zeros(())), statistics.get("std", torch.ones(()))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.codebook_size, (FRAMES, config.num_codebooks), generator=generator)
    centers = (SCALE_SPEED * state["centers_scale"]).exp() * state["centers"]
    frames = centers[torch.arange(config.num_codebooks), codes].sum(dim=1)  # (frames, dim), standardised
    expected = frames * std + mean
    error = ((quantizer.decode(codes) - expected).abs().max() / expected.abs().max().clamp(min=1e-20)).item()
    if not error <= TOLERANCE:
        raise ConversionError(
            f"decoding differs from the formula by {error:.1e} of the largest value; please report it."
        )
    lines = [f"decoding of {FRAMES} random codes agrees with the formula, largest error {error:.1e}"]

    # Frames like those that were quantised: near what codes decode to.
    features = (frames + 0.3 * frames.std() * torch.randn(frames.shape, generator=generator)) * std + mean
    frames = (features - mean) / std
    weight = (SCALE_SPEED * state["logits_scale"]).exp() * state["to_logits.weight"]
    logits = (frames @ weight.T + state["to_logits.bias"]).unflatten(1, (config.num_codebooks, -1))
    pairs = [("the formula without refinement", logits.argmax(dim=2), 0)]
    if importlib.util.find_spec("multi_quantization") is None:
        lines.append("not compared with the package multi_quantization, which is not installed")
    else:
        from multi_quantization import Quantizer

        original = Quantizer(config.feature_size, config.codebook_size, config.num_codebooks)
        original.load_state_dict(dict(state))
        refined = original.encode(frames, refine_indexes_iters=PASSES, as_bytes=False)
        pairs.append((f"multi_quantization after {PASSES} passes", refined, PASSES))
    for name, original_codes, passes in pairs:
        share = (quantizer.encode(features, passes).long() == original_codes.long()).float().mean().item()
        if share < SHARE:
            raise ConversionError(f"only {share:.1%} of the codes are those of {name}; please report it.")
        lines.append(f"{share:.1%} of the codes of {FRAMES} frames are those of {name}")
    return lines
