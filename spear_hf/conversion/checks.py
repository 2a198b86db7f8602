# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether the converted model is the one that was given: tensors bit by bit, activations of the original."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearForPreTraining, SpearModel
from .errors import ConversionError, listed
from .reading import read_tensors


_ACTIVATION = re.compile(r"^(\d+)\.(waveform|input_features|embed|last_hidden_state|layer\.\d+|stack\.\d+)$")


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Same type and bits; shapes may differ where one is the other flattened in part."""
    if one.dtype != other.dtype or one.numel() != other.numel():
        return False
    return torch.equal(*(tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def check_tensors(source: Mapping[str, Tensor], renamed: Mapping[str, str], converted: Mapping[str, Tensor]) -> str:
    """Every renamed tensor of the source, looked up in the result under its new name."""
    differing = [name for name, ours in renamed.items() if not bit_equal(source[name], converted[ours])]
    if differing:
        raise ConversionError(f"{listed(differing)} came back changed from the round trip; please report it.")
    return f"{len(renamed)} of {len(renamed)} tensors bit-equal after the round trip"


@torch.no_grad()
def check_activations(model: SpearModel, path: Path, tolerance: float) -> str:
    """Compares with what the original computed for each utterance alone, float32.

    The file has, per utterance i and without batch axis, `i.input_features` (frames, bins), `i.last_hidden_state` and
    any of `i.embed` (the stem's output) and `i.layer.KK`; `i.waveform` and `i.stack.KK` are not looked at. Errors are
    relative to the largest value of their tensor, or to 1 where that is smaller.
    """
    tensors = read_tensors(path)
    known = {name: match for name in tensors if (match := _ACTIVATION.match(name))}
    if unknown := set(tensors) - set(known):
        raise ConversionError(f"{path} has tensors that are not understood: {listed(unknown)}.")
    errors: dict[str, float] = {}
    utterances = sorted({match[1] for match in known.values()}, key=int)
    for number in utterances:
        features = tensors.get(f"{number}.input_features")
        if features is None or f"{number}.last_hidden_state" not in tensors:
            raise ConversionError(f"{path}: utterance {number} lacks input_features or last_hidden_state.")
        output = model(features[None], output_hidden_states=True)
        ours = {"last_hidden_state": output.last_hidden_state, "embed": output.hidden_states[0]}
        ours |= {f"layer.{index:02d}": state for index, state in enumerate(output.hidden_states[1:])}
        for name, match in known.items():
            kind = match[2]
            if match[1] != number or kind.startswith(("waveform", "input_features", "stack")):
                continue
            if kind not in ours or ours[kind][0].shape != tensors[name].shape:
                got = f"gives {tuple(ours[kind][0].shape)}" if kind in ours else "has no such layer"
                raise ConversionError(f"{path}: {name} is {tuple(tensors[name].shape)}, the converted model {got}.")
            error = ((ours[kind][0] - tensors[name]).abs().max() / tensors[name].abs().max().clamp(min=1.0)).item()
            errors[name] = math.inf if math.isnan(error) else error
    if not errors:
        raise ConversionError(f"{path} holds no activations.")
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:  # nor with one that is no number
        raise ConversionError(
            f"activations differ from {path}: {worst} by {errors[worst]:.1e}, more than {tolerance:.0e}. It is "
            "another model, or another configuration of it; nothing was written."
        )
    counts = f"{len(errors)} activations of {len(utterances)} utterances"
    return f"{counts}, largest error {errors[worst]:.1e} (limit {tolerance:.0e})"


@torch.no_grad()
def check_forward(model: SpearModel | SpearForPreTraining) -> str:
    """One second of noise through the model: the values mean nothing, but must be finite."""
    noise = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    extractor = SpearFeatureExtractor(feature_size=model.config.num_mel_bins)
    hidden = model(**extractor(noise.numpy(), sampling_rate=16000, return_tensors="pt")).last_hidden_state
    outputs = {"last_hidden_state": hidden}
    if isinstance(model, SpearForPreTraining):
        outputs |= {f"logits of {name}": head(hidden) for name, head in model.prediction_heads.items()}
    for name, values in outputs.items():
        if not values.isfinite().all():
            raise ConversionError(f"the converted model computes values that are not finite: {name} of 1 s of noise.")
    return f"finite for 1 s of noise: {', '.join(f'{name} {tuple(values.shape)}' for name, values in outputs.items())}"
