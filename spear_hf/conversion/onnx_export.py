# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR as an ONNX file, for runtimes without torch: any number of utterances of any length from 85 ms on.

    spear-hf export MODEL spear.onnx

Inputs: `input_features` float32 (batch, frames, num_mel_bins), as `SpearFeatureExtractor` makes them, and
`attention_mask` int64 (batch, frames), ones where there is no padding. Outputs: `last_hidden_state` of an encoder,
`logits` of a head, `embeddings` besides for speakers; where these have frames also `output_attention_mask` int64, and
on demand `hidden_states` (layers + 1, batch, frames, hidden_size). The file's metadata has the model's configuration.
It holds the plain path of the encoder: its memory grows with the square of the length.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from .. import __version__, modeling_spear
from ..loading_errors import loading
from ..modeling_spear import SpearPreTrainedModel
from .errors import ConversionError


PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of an output against torch, relative to its largest value
_BOTH = {0: "batch", 1: "frames"}
# Frames of the utterances of each batch that is compared: the shortest possible, padding, and more than one block.
_CHECKED = ((9,), (131, 75, 9), (50, 50), (998,))


def export_onnx(
    model: SpearPreTrainedModel, output: Path, hidden_states: bool = False, tolerance: float = TOLERANCE
) -> float:
    """Writes `output`, and where the weights exceed what one ONNX file can hold also `output`.data.

    Returns the largest error of any output under onnxruntime, see `TOLERANCE`.

    Raises:
        ConversionError: a package is missing, the model is not in float32 on the CPU, or it computes something else
            under onnxruntime; nothing is written then.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConversionError(f"{', '.join(missing)} cannot be imported: install spear_hf with its extra, [onnx].")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConversionError("the model is in int8: export the one that it was made from.")
    if (model.device.type, model.dtype) != ("cpu", torch.float32):
        raise ConversionError(f"the model is {model.dtype} on {model.device}: it must be float32 on the CPU.")
    modes = [(module, module.training) for module in model.modules()]
    try:
        exported = Exported(model, hidden_states).eval()
        return save_checked(trace(exported), exported, output, tolerance)
    finally:
        for module, training in modes:
            module.training = training


def save_checked(program: Any, exported: "Exported", output: Path, tolerance: float = TOLERANCE) -> float:
    """As `export_onnx`, of what `trace` returned."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        program.save(Path(folder) / output.name)
        error = compare(exported, Path(folder) / output.name)
        if not error <= tolerance:
            raise ConversionError(f"outputs under onnxruntime differ by {error:.1e}, more than {tolerance:.0e}.")
        for path in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            path.replace(output.parent / path.name)
    return error


def load_model(model: str, revision: str | None = None) -> SpearPreTrainedModel:
    """By the class that its configuration names; a published checkpoint is an encoder."""
    with loading(model):
        config = AutoConfig.from_pretrained(model, revision=revision)
    if config.model_type != "spear":
        raise ConversionError(f"{model} is of the type {config.model_type!r}, not 'spear'.")
    name = (config.architectures or [""])[0]
    model_class = getattr(modeling_spear, name) if name in modeling_spear.__all__ else modeling_spear.SpearModel
    with loading(model):
        return model_class.from_pretrained(model, revision=revision, dtype=torch.float32).eval()


def run_export(
    model: str, output: Path, hidden_states: bool, tolerance: float, revision: str | None, force: bool
) -> int:
    """For `spear-hf export`: the exit code; what was written or is wrong is printed."""
    try:
        if output.suffix != ".onnx" or not output.parent.is_dir():
            raise ConversionError(f"{output} must end in .onnx and lie in a folder that is there.")
        if output.exists() and not force:
            raise ConversionError(f"{output} is there already: choose another name, or add --force.")
        error = export_onnx(load_model(model, revision), output, hidden_states, tolerance)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"Written: {output}; largest error under onnxruntime {error:.1e} (limit {tolerance:.0e})")
    return 0


class Exported(nn.Module):
    """The model with tensors in and a dictionary of tensors out."""

    def __init__(self, model: SpearPreTrainedModel, hidden_states: bool):
        super().__init__()
        self.model = model
        self.hidden_states = hidden_states

    def forward(self, input_features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        options = {"output_hidden_states": self.hidden_states, "return_dict": True}
        outputs = self.model(input_features, attention_mask=attention_mask, **options)
        names = ("last_hidden_state", "logits", "embeddings")
        result = {name: outputs[name] for name in names if outputs.get(name) is not None}
        frames = next(iter(result.values()))
        if frames.dim() == 3:
            mask = self.model._get_feature_vector_attention_mask(frames.shape[1], attention_mask)
            result["output_attention_mask"] = mask.to(torch.int64)
        if self.hidden_states:
            result["hidden_states"] = torch.stack(outputs.hidden_states)
        return result


def _batch(bins: int, *frames: int) -> dict[str, Tensor]:
    """Noise, of utterances of so many frames."""
    generator = torch.Generator().manual_seed(sum(frames))
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    features = torch.randn(*mask.shape, bins, generator=generator)
    return {"input_features": features.masked_fill(~mask[..., None], 0.0), "attention_mask": mask.long()}


@torch.no_grad()
def trace(exported: Exported) -> Any:
    """torch's ONNXProgram of it, with the configuration in its metadata."""
    inputs = _batch(exported.model.config.num_mel_bins, 75, 60)
    names = list(exported(**inputs))
    with _quiet():
        program: Any = torch.onnx.export(
            exported,
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=names,
            dynamic_shapes=dict.fromkeys(inputs, _BOTH),
            custom_translation_table={torch.ops.aten.softplus.default: _softplus},
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(spear_hf=__version__, config=json.dumps(exported.model.config.to_dict()))
    return program


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """max(x, 0) + log(1 + exp(-|x|)), which overflows nowhere: as ONNX's own operator takes a third of the time."""
    from onnxscript import opset18 as op

    return op.Add(op.Relu(x), op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), 1.0)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says about packages that are not needed and about its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def compare(exported: nn.Module, path: Path) -> float:
    """The largest error of the file's outputs, on valid frames and relative to the largest value of the output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    bins = session.get_inputs()[0].shape[2]
    errors = []
    for frames in _CHECKED:
        inputs = _batch(bins, *frames)
        theirs = dict(zip(names, session.run(names, {name: value.numpy() for name, value in inputs.items()})))
        ours = exported(**inputs)
        mask = ours.get("output_attention_mask")
        for name in names:
            one, other = ours[name], torch.from_numpy(theirs[name])
            if one.shape != other.shape:
                raise ConversionError(f"{name} of {frames} frames is {tuple(other.shape)}, not {tuple(one.shape)}.")
            if one.dim() >= 3:
                valid = _valid_states(inputs) if name == "hidden_states" else mask.bool()
                one, other = one[..., valid, :], other[..., valid, :]
            errors.append(float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)))
    return max(errors)


def _valid_states(inputs: dict[str, Tensor]) -> Tensor:
    """Mask of the hidden states, which are at 50 Hz whatever the rate of the output."""
    lengths = (inputs["attention_mask"].sum(dim=1) - 7) // 2
    return torch.arange(int(lengths.max())) < lengths[:, None]
