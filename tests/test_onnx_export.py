# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf export`: what onnxruntime computes of the file is what torch computes, for any batch and length."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spear_hf import SpearForCTC, SpearModel
from spear_hf.cli import app
from spear_hf.conversion import onnx_export
from spear_hf.conversion.errors import ConversionError
from spear_hf.conversion.onnx_export import Exported, export_onnx, save_checked, trace

from .test_transformers_contract import BINS, tiny_model


# As few layers as possible: the exporter takes seconds for each. The middle one is at half the rate.
SMALL = {"num_layers_per_stack": [1, 1], "downsampling_factors": [1, 2], "conv_kernel_sizes": [7, 5]}
# Other numbers of utterances and other lengths than those that are traced and compared by the exporter.
BATCHES = [(33,), (40, 23), (300, 9, 120, 301, 77), (640, 500)]

needs_onnx = pytest.mark.skipif(
    any(onnx_export.find_spec(name) is None for name in onnx_export.PACKAGES), reason="needs the extra [onnx]"
)


def batch(frames):
    generator = torch.Generator().manual_seed(len(frames))
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    # Padding that is not zero, as it must not matter.
    return {"input_features": torch.randn(*mask.shape, BINS, generator=generator), "attention_mask": mask.long()}


def run(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: value.numpy() for name, value in inputs.items()})))


def assert_close(theirs, ours, tolerance=1e-4):
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours.numpy()).max() <= tolerance * ours.abs().max()


@pytest.fixture(scope="module")
def encoder():
    if any(onnx_export.find_spec(name) is None for name in onnx_export.PACKAGES):
        pytest.skip("needs the extra [onnx]")
    exported = Exported(tiny_model(SpearModel, **SMALL), hidden_states=True).eval()
    return exported, trace(exported)


@torch.no_grad()
def test_encoder(encoder, tmp_path):
    exported, program = encoder
    path = tmp_path / "spear.onnx"
    assert save_checked(program, exported, path) <= 1e-4
    assert list(tmp_path.iterdir()) == [path]
    for frames in BATCHES:
        inputs = batch(frames)
        theirs, ours = run(path, inputs), exported.model(**inputs, output_hidden_states=True)
        valid = ours.attention_mask.bool()
        assert np.array_equal(theirs["output_attention_mask"], ours.attention_mask)
        assert_close(theirs["last_hidden_state"][valid], ours.last_hidden_state[valid])
        assert len(theirs["hidden_states"]) == len(ours.hidden_states) == 3
        for one, other in zip(theirs["hidden_states"], ours.hidden_states):
            assert_close(one[valid], other[valid])
        first = {"input_features": inputs["input_features"][:1, : frames[0]]}
        alone = run(path, first | {"attention_mask": torch.ones(1, frames[0], dtype=torch.long)})
        assert_close(alone["last_hidden_state"][0], ours.last_hidden_state[0, valid[0]])


def test_shapes_and_configuration_are_in_the_file(encoder, tmp_path):
    import onnx

    exported, program = encoder
    save_checked(program, exported, tmp_path / "spear.onnx")
    file = onnx.load(tmp_path / "spear.onnx")
    config = json.loads({item.key: item.value for item in file.metadata_props}["config"])
    assert config["num_mel_bins"] == BINS
    dims = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim[:2]] for value in file.graph.input}
    assert dims == {"input_features": ["batch", "frames"], "attention_mask": ["batch", "frames"]}


def test_what_differs_is_not_written(encoder, tmp_path):
    exported, program = encoder
    other = Exported(tiny_model(SpearModel, seed=1, **SMALL), hidden_states=True).eval()
    with pytest.raises(ConversionError, match="differ by"):
        save_checked(program, other, tmp_path / "spear.onnx")
    with pytest.raises(ConversionError, match=r"more than 0e\+00"):
        save_checked(program, exported, tmp_path / "spear.onnx", tolerance=0.0)
    assert not list(tmp_path.iterdir())


@needs_onnx
@torch.no_grad()
def test_command_and_head(tmp_path):
    model = tiny_model(SpearForCTC, use_weighted_layer_sum=True, pad_token_id=5, **SMALL)
    model.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "ctc.onnx")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "largest error" in result.output
    for frames in BATCHES:
        inputs = batch(frames)
        theirs, ours = run(tmp_path / "ctc.onnx", inputs), model(**inputs).logits
        valid = torch.from_numpy(theirs["output_attention_mask"]).bool()
        assert valid.sum(dim=1).tolist() == [(count - 7) // 2 for count in frames]
        assert (theirs["logits"].argmax(-1)[~valid] == 5).all()  # padding says blank
        assert_close(theirs["logits"][valid], ours[valid])
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "--force" in again.output


@needs_onnx
def test_a_model_in_training_goes_on_with_it(tmp_path):
    sizes = {"num_layers_per_stack": [1], "downsampling_factors": [1], "conv_kernel_sizes": [3]}
    model = tiny_model(SpearModel, **SMALL | sizes).train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    assert export_onnx(model, tmp_path / "spear.onnx") < 1e-4
    assert [module.training for module in model.modules()] == modes


def test_what_is_refused(tmp_path, monkeypatch):
    model = tiny_model(SpearModel, **SMALL)
    with pytest.raises(ConversionError, match="float16"):
        export_onnx(model.half(), tmp_path / "spear.onnx")
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConversionError, match=r"no_such_package .*\[onnx\]"):
        export_onnx(model.float(), tmp_path / "spear.onnx")
    for name, message in (("spear.pt", "end in .onnx"), ("nowhere/spear.onnx", "folder that is there")):
        result = CliRunner().invoke(app, ["export", "model", str(tmp_path / name)])
        assert result.exit_code == 1
        assert message in result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path / "none"), str(tmp_path / "spear.onnx")])
    assert result.exit_code == 1
    assert not list(tmp_path.iterdir())
