# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""icefall's training checkpoints: the published names without their prefix, the codebook heads, and no configuration.

What the configuration would say is read off the shapes. `codebook_loss_net` (one teacher) and `codebook_loss_heads.N`
(several, speech first in the author's recipe) are JointCodebookLoss modules with independent codebooks.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..configuration_spear import SpearConfig
from .errors import ConversionError, listed
from .layouts import HEAD, LEFT_OVER_REASON, Checkpoint, check_names_and_shapes, encoder_shapes, make_config
from .names import PREFIX, from_published, left_over_names, to_published
from .reading import Source, check_values


TEACHERS = ("speech", "audio")
DEFAULT_HEADS = {"codebook_loss_net": "speech", "codebook_loss_heads.0": "speech", "codebook_loss_heads.1": "audio"}
DROP = "drop"  # in place of a teacher

_HEAD_PART = re.compile(r"^(codebook_loss_net|codebook_loss_heads\.\d+)\.(.+)$")
_TAGGING = re.compile(r"^audio_tagging_proj\.\d+\.(weight|bias)$")
# (codebooks, size, dim) and (codebooks, size): in JointCodebookLoss, and in a head of independent codebooks alone.
_HEAD_PAIRS = (("linear2b_weight", "linear2_bias"), ("weight", "bias"))
# JointCodebookLoss makes them always, and uses them only to predict a codebook from those before it (is_joint=True).
_JOINT_ONLY = ("linear1.weight", "linear1.bias", "codebook_embedding.weight", "linear2_weight")


def parse_heads(options: Iterable[str]) -> dict[str, str]:
    """`codebook_loss_heads.0=speech` and the like."""
    heads: dict[str, str] = {}
    for option in options:
        name, _, teacher = option.partition("=")
        if not _HEAD_PART.match(f"{name}.x") or teacher not in (*TEACHERS, DROP) or name in heads:
            raise ConversionError(
                f"--head {option}: give each head once, as codebook_loss_net=TEACHER or "
                f"codebook_loss_heads.N=TEACHER, TEACHER being {', '.join(TEACHERS)} or {DROP}."
            )
        heads[name] = teacher
    return heads


def read_icefall(
    source: Source,
    heads: Mapping[str, str] | None = None,
    num_heads: int | None = None,
    unmasked_dim: int | None = None,
) -> Checkpoint:
    """An icefall checkpoint under our names.

    heads: teacher (or "drop") of each codebook head, where DEFAULT_HEADS does not hold. num_heads: needed where a head
    has not the published sizes. unmasked_dim: `unmasked_hidden_size`, which no shape tells.
    """
    head_tensors = {name: tensor for name, tensor in source.tensors.items() if _HEAD_PART.match(name)}
    tagging = [name for name in source.tensors if _TAGGING.match(name)]
    encoder = {
        name: tensor for name, tensor in source.tensors.items() if name not in head_tensors and name not in tagging
    }
    dtype = check_values(source.tensors, source.label)
    ours = {from_published(PREFIX + name): tensor.shape for name, tensor in encoder.items()}
    values, notes = _infer_config(ours, num_heads, unmasked_dim, source.label)
    mapped, renamed, dropped, targets = _map_heads(
        head_tensors, dict(heads or {}), values["hidden_size"], source.label
    )
    config = make_config(values | ({"pretraining_targets": targets} if targets else {}), source.label)

    unused = [name.removeprefix(PREFIX) for name in left_over_names(config)]
    expected = {to_published(name).removeprefix(PREFIX): shape for name, shape in encoder_shapes(config).items()}
    expected |= dict.fromkeys(unused, torch.Size([config.hidden_size]))
    check_names_and_shapes(encoder, expected, source.label, optional=unused)
    left_over = {name: encoder[name] for name in unused if name in encoder}
    places = {name: from_published(PREFIX + name) for name in encoder if name not in left_over}
    dropped |= dict.fromkeys(left_over, LEFT_OVER_REASON)
    dropped |= dict.fromkeys(tagging, "audio tagging head of icefall; train SpearForSequenceClassification instead")
    described = ", ".join(f"{key}={value}" for key, value in values.items() if key != "model_type")
    return Checkpoint(
        config=config,
        tensors={place: encoder[name] for name, place in places.items()},
        renamed=places | renamed,
        dropped=dropped,
        heads=mapped,
        left_over={PREFIX + name: tensor for name, tensor in left_over.items()},
        notes=(f"configuration from the shapes ({dtype}): {described}", *notes),
    )


def _infer_config(
    shapes: Mapping[str, torch.Size], num_heads: int | None, unmasked_dim: int | None, label: str
) -> tuple[dict[str, Any], list[str]]:
    """SpearConfig's arguments by the shapes of our tensors, and what they leave open."""

    def shape(name: str, dims: int) -> torch.Size:
        if name not in shapes or len(shapes[name]) != dims:
            found = f"has the shape {tuple(shapes[name])}" if name in shapes else "is missing"
            raise ConversionError(
                f"{label}: {to_published(name).removeprefix(PREFIX)} {found}; the configuration is read off tensors "
                "like it."
            )
        return shapes[name]

    layers: dict[int, set[int]] = {}
    for name in shapes:
        if match := re.match(r"^stacks\.(\d+)\.(?:stack\.)?layers\.(\d+)\.", name):
            layers.setdefault(int(match[1]), set()).add(int(match[2]))
    complete = all(sorted(numbers) == list(range(len(numbers))) for numbers in (layers, *layers.values()))
    if not layers or not complete:
        raise ConversionError(f"{label}: numbers of stacks and layers have gaps: {layers or 'there are none'}.")
    factors, kernels = [], []
    for stack in range(len(layers)):
        slow = f"stacks.{stack}.downsample.bias" in shapes
        factors.append(shape(f"stacks.{stack}.downsample.bias", 1)[0] if slow else 1)
        layer = f"stacks.{stack}.{'stack.' if slow else ''}layers.0."
        kernels.append(shape(f"{layer}conv_module1.depthwise_conv.weight", 3)[2])
    layer = "stacks.0.stack.layers.0." if factors[0] > 1 else "stacks.0.layers.0."

    hidden_size = shape("stem.out_proj.weight", 2)[0]
    notes = []
    if unmasked_dim is None:
        published = {
            size.hidden_size: size for size in (SpearConfig.base(), SpearConfig.large(), SpearConfig.xlarge())
        }
        unmasked_dim = published[hidden_size].unmasked_hidden_size if hidden_size in published else hidden_size // 2
        notes.append(f"no shape tells unmasked_hidden_size, {unmasked_dim} is assumed (--unmasked-dim)")
    values = {
        "model_type": "spear",
        "hidden_size": hidden_size,
        "intermediate_size": shape(f"{layer}feed_forward2.in_proj.weight", 2)[0],
        "num_layers_per_stack": [len(layers[stack]) for stack in range(len(layers))],
        "downsampling_factors": factors,
        "conv_kernel_sizes": kernels,
        "num_mel_bins": shape("masked_spec_embed", 1)[0],
        "pos_dim": shape(f"{layer}self_attn_weights.linear_pos.weight", 2)[1],
        "output_downsampling_factor": (
            shape("output_downsample.bias", 1)[0] if "output_downsample.bias" in shapes else 1
        ),
        "unmasked_hidden_size": unmasked_dim,
        "stem_channels": [shape(f"stem.conv{number}.weight", 4)[0] for number in (1, 2, 3)],
        **_attention_sizes(
            rows=shape(f"{layer}self_attn_weights.in_proj.weight", 2)[0],
            pos_rows=shape(f"{layer}self_attn_weights.linear_pos.weight", 2)[0],
            value_rows=shape(f"{layer}self_attn1.in_proj.weight", 2)[0],
            num_heads=num_heads,
            label=label,
        ),
    }
    if num_heads is None:
        notes.append("the size of a head is taken to be the published one: 32, 12 and 4 (--num-heads)")
    return values, notes


def _attention_sizes(rows: int, pos_rows: int, value_rows: int, num_heads: int | None, label: str) -> dict[str, int]:
    """Only products with the number of heads show in the shapes; the published sizes of a head give that number."""
    default = SpearConfig()
    number = pos_rows // default.pos_head_dim if num_heads is None else num_heads
    query_rows = (rows - pos_rows) // 2
    if (
        number < 1
        or (rows - pos_rows) % 2
        or any(size < 1 or size % number for size in (query_rows, pos_rows, value_rows))
    ):
        raise ConversionError(
            f"{label}: {number} heads do not divide {query_rows} query, {pos_rows} position and {value_rows} value "
            "channels; give --num-heads."
        )
    sizes = {
        "num_attention_heads": number,
        "query_head_dim": query_rows // number,
        "value_head_dim": value_rows // number,
        "pos_head_dim": pos_rows // number,
    }
    if num_heads is None and any(getattr(default, name) != size for name, size in sizes.items() if "dim" in name):
        raise ConversionError(
            f"{label}: with the published size of a head the shapes disagree ({sizes}); give --num-heads."
        )
    return sizes


def _map_heads(
    tensors: Mapping[str, Tensor], chosen: Mapping[str, str], hidden_size: int, label: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str], dict[str, dict[str, Any]]]:
    """Our head tensors, their source names, dropped ones with reasons, and `pretraining_targets`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _HEAD_PART.match(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
    if absent := set(chosen) - set(parts):
        raise ConversionError(
            f"--head names {listed(absent)}, but {label} has {listed(parts) or 'no codebook heads'}."
        )
    teachers = {head: chosen.get(head, DEFAULT_HEADS.get(head)) for head in parts}
    if unnamed := [head for head, teacher in teachers.items() if teacher is None]:
        raise ConversionError(
            f"{label}: which teacher belongs to {listed(unnamed)}? Give --head {unnamed[0]}=TEACHER."
        )
    used = [teacher for teacher in teachers.values() if teacher != DROP]
    if len(set(used)) != len(used):
        raise ConversionError(f"{label}: one teacher would have several heads, {teachers}; choose with --head.")

    mapped: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    targets: dict[str, dict[str, Any]] = {}
    defaults = SpearConfig().pretraining_targets or {}
    for head, teacher in teachers.items():
        if teacher == DROP or teacher is None:
            dropped |= dict.fromkeys((f"{head}.{part}" for part in parts[head]), "codebook head, dropped by --head")
            continue
        weight_name, bias_name = next((pair for pair in _HEAD_PAIRS if pair[0] in parts[head]), _HEAD_PAIRS[0])
        extra = [part for part in parts[head] if part in _JOINT_ONLY and weight_name == _HEAD_PAIRS[0][0]]
        expected = {weight_name, bias_name, *extra}
        if expected != set(parts[head]):
            missing, unknown = expected - set(parts[head]), set(parts[head]) - expected
            raise ConversionError(
                f"{label}: {head} is no head of independent codebooks: missing {listed(missing) or 'nothing'}, "
                f"unknown {listed(unknown) or 'nothing'}. --head {head}={DROP} leaves it out."
            )
        weight, bias = parts[head][weight_name], parts[head][bias_name]
        if weight.ndim != 3 or weight.shape[2] != hidden_size or bias.shape != weight.shape[:2]:
            raise ConversionError(
                f"{label}: {head} has weights {tuple(weight.shape)} and biases {tuple(bias.shape)}, not (codebooks, "
                f"size, {hidden_size}) and (codebooks, size)."
            )
        mapped[f"{HEAD}{teacher}.weight"] = weight.flatten(0, 1)  # (codebooks * size, dim)
        mapped[f"{HEAD}{teacher}.bias"] = bias.flatten()
        renamed[f"{head}.{weight_name}"] = f"{HEAD}{teacher}.weight"
        renamed[f"{head}.{bias_name}"] = f"{HEAD}{teacher}.bias"
        dropped |= dict.fromkeys(
            (f"{head}.{part}" for part in extra), "unused by independent codebooks (is_joint=False)"
        )
        targets[teacher] = {
            "num_codebooks": weight.shape[0],
            "codebook_size": weight.shape[1],
            "weight": defaults[teacher]["weight"],
        }
    return mapped, renamed, dropped, targets
