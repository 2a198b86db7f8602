# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint between two formats: what the published format and ours are read into and written from.

Every tensor of a source is used, renamed, or named with the reason for which it is dropped; anything else is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from .. import modeling_spear
from ..configuration_spear import PUBLISHED_STACK_LISTS, PUBLISHED_UNIFORM_LISTS, SpearConfig
from ..modeling_spear import SpearForPreTraining, SpearModel, SpearPreTrainedModel
from .errors import ConversionError, listed
from .names import LEFT_OVER_VALUE, from_published, left_over_names, to_published
from .reading import Source, check_values


LEFT_OVER_REASON = "left over from an older layer, unused"
BASE = f"{SpearPreTrainedModel.base_model_prefix}."
HEAD = "prediction_heads."
# What makes the encoder, and must be the same on both sides.
ARCHITECTURE = (
    *PUBLISHED_STACK_LISTS.values(),
    *PUBLISHED_UNIFORM_LISTS.values(),
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
    "pos_dim",
    "num_mel_bins",
    "output_downsampling_factor",
    "stem_channels",
)
# Keys of the published config.json whose values do not depend on the model. The sizes of chunks are the defaults of
# the published code, and mean nothing in a model that is not causal; the version is that of the published files.
PUBLISHED_CONSTANTS = {
    "architectures": ["SpearModel"],
    "auto_map": {"AutoConfig": "configuration_spear.SpearConfig", "AutoModel": "modeling_spear.SpearModel"},
    "causal": False,
    "chunk_size": 8,
    "left_context_frames": 128,
    "model_type": "spear",
    "transformers_version": "4.50.1",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint under our names, and where each tensor came from."""

    config: SpearConfig
    tensors: dict[str, Tensor]  # names and shapes of SpearModel
    renamed: dict[str, str]  # name in the source -> our name, in `tensors` or `heads`
    dropped: dict[str, str]  # name in the source -> reason
    heads: dict[str, Tensor] = field(default_factory=dict)  # prediction_heads.* of SpearForPreTraining
    left_over: dict[str, Tensor] = field(default_factory=dict)  # published name -> unused vector
    notes: tuple[str, ...] = ()  # what had to be assumed


def read_checkpoint(source: Source) -> Checkpoint:
    """A source in the published format or in ours."""
    return _from_published(source) if source.kind == "published" else _from_ours(source)


def make_config(values: Mapping[str, Any], label: str) -> SpearConfig:
    """SpearConfig, whose refusals become ConversionErrors that name the source."""
    try:
        return SpearConfig.from_dict(dict(values))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{label}: {error}") from error


def encoder_shapes(config: SpearConfig) -> dict[str, torch.Size]:
    """Shapes of the tensors of SpearModel."""
    return _shapes(SpearModel, config)


def check_names_and_shapes(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    label: str,
    optional: Iterable[str] = (),
) -> None:
    """ConversionError that names what is missing, unknown or of another shape."""
    missing = set(expected) - set(tensors) - set(optional)
    unknown = set(tensors) - set(expected)
    problems = []
    if missing:
        problems.append(f"missing {listed(missing)}")
    if unknown:
        problems.append(f"unknown {listed(unknown)}")
    misshapen = {
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    }
    if misshapen:
        problems.append(f"of the wrong shape {listed(misshapen)}")
    if problems:
        raise ConversionError(f"{label}: tensors {'; '.join(problems)}.")


def build_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> SpearModel | SpearForPreTraining:
    """The model of a checkpoint, sharing its tensors unless `dtype` is another."""
    model_class = SpearForPreTraining if checkpoint.heads else SpearModel
    prefix = BASE if checkpoint.heads else ""
    with torch.device("meta"):
        model = model_class(checkpoint.config)
    state = {prefix + name: tensor for name, tensor in checkpoint.tensors.items()} | checkpoint.heads
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    return model.eval()


def published_format(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as published, with the unused vector of every layer."""
    config = checkpoint.config
    stacks = len(config.num_layers_per_stack)
    lists = {key: getattr(config, name) for key, name in PUBLISHED_STACK_LISTS.items()}
    lists |= {key: [getattr(config, name)] * stacks for key, name in PUBLISHED_UNIFORM_LISTS.items()}
    tensors = {to_published(name): tensor for name, tensor in checkpoint.tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    for name in left_over_names(config):
        default = torch.full((config.hidden_size,), LEFT_OVER_VALUE, dtype=dtype)
        tensors[name] = checkpoint.left_over.get(name, default).to(dtype)
    values = {
        **PUBLISHED_CONSTANTS,
        **{key: ",".join(map(str, numbers)) for key, numbers in lists.items()},
        "num_mel_bins": config.num_mel_bins,
        "output_downsampling_factor": config.output_downsampling_factor,
        "pos_dim": config.pos_dim,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return values, tensors


def check_same_architecture(config: SpearConfig, other: SpearConfig, label: str) -> None:
    """ConversionError that names the setting that a format cannot hold."""
    for name in ARCHITECTURE:
        ours, theirs = getattr(config, name), getattr(other, name)
        if ours != theirs:
            raise ConversionError(f"{label} cannot hold {name}={ours!r}: it would be read back as {theirs!r}.")


def _from_published(source: Source) -> Checkpoint:
    config = make_config(source.config, source.label)
    unused = left_over_names(config)
    expected = {to_published(name): shape for name, shape in encoder_shapes(config).items()}
    expected |= dict.fromkeys(unused, torch.Size([config.hidden_size]))
    check_names_and_shapes(source.tensors, expected, source.label, optional=unused)
    check_values(source.tensors, source.label)
    left_over = {name: source.tensors[name] for name in unused if name in source.tensors}
    renamed = {name: from_published(name) for name in source.tensors if name not in left_over}
    return Checkpoint(
        config=config,
        tensors={ours: source.tensors[name] for name, ours in renamed.items()},
        renamed=renamed,
        dropped=dict.fromkeys(left_over, LEFT_OVER_REASON),
        left_over=left_over,
    )


def _from_ours(source: Source) -> Checkpoint:
    config = make_config(source.config, source.label)
    architectures = source.config.get("architectures") or ["SpearModel"]
    if architectures[0] not in modeling_spear.__all__:
        raise ConversionError(
            f"{source.label}: config.json has the architecture {architectures[0]!r}, not one of ours."
        )
    check_names_and_shapes(source.tensors, _shapes(getattr(modeling_spear, architectures[0]), config), source.label)
    check_values(source.tensors, source.label)
    if source.left_over:
        expected = dict.fromkeys(left_over_names(config), torch.Size([config.hidden_size]))
        label = f"{source.label}, unused vectors of the published file"
        check_names_and_shapes(source.left_over, expected, label, optional=expected)
        check_values(source.left_over, source.label)
    encoder = encoder_shapes(config)
    renamed = {name: name.removeprefix(BASE) for name in source.tensors if name.removeprefix(BASE) in encoder}
    heads = {name: tensor for name, tensor in source.tensors.items() if name.startswith(HEAD)}
    return Checkpoint(
        config=config,
        tensors={ours: source.tensors[name] for name, ours in renamed.items()},
        renamed=renamed | {name: name for name in heads},
        dropped={name: f"head of {architectures[0]}" for name in source.tensors if name not in renamed | heads},
        heads=heads,
        left_over=source.left_over,
    )


def _shapes(model_class: type[SpearPreTrainedModel], config: SpearConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
