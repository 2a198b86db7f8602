# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversions: nothing lost, nothing guessed, nothing written unless the result is the same model."""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from typer.testing import CliRunner

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForCTC, SpearForPreTraining, SpearModel, cli
from spear_hf.conversion import icefall
from spear_hf.conversion.convert import convert
from spear_hf.conversion.errors import ConversionError
from spear_hf.conversion.layouts import encoder_shapes
from spear_hf.conversion.names import PREFIX, from_published, left_over_names, name_table, to_published
from spear_hf.conversion.writing import whole_folder
from spear_hf.mvq.quantizer import MultiCodebookQuantizer

from .conftest import FIXTURES, ROOT


README = ROOT / "conversion" / "README.md"
LAYER = "encoder.encoders.2.encoder.layers.1."  # a layer of a stack that downsamples, without the prefix


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(line):
    pass


def assert_same_tensors(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


@pytest.fixture
def published(golden_folder, tmp_path):
    """A copy to spoil: the folder, and a function that saves its changed tensors or configuration."""
    folder = tmp_path / "published"
    folder.mkdir()
    tensors = load_file(golden_folder / "model.safetensors")
    config = json.loads((golden_folder / "config.json").read_text())

    def save():
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    save.tensors, save.config = tensors, config
    save()
    return save


def joint_codebook_loss(*arguments, **settings):
    """The head of the author's package, by its own class."""
    package = pytest.importorskip("multi_quantization", reason="multi_quantization is not installed (extra dev)")
    return package.JointCodebookLoss(*arguments, **settings)


@pytest.fixture
def icefall_tensors(golden_folder):
    """The golden encoder as icefall saves it, with the heads of the author's recipe, speech first."""
    tensors = {k.removeprefix(PREFIX): v for k, v in load_file(golden_folder / "model.safetensors").items()}
    head = load_file(FIXTURES / "golden_mvq" / "head.safetensors")
    torch.manual_seed(0)
    speech = joint_codebook_loss(32, 2, is_joint=False, reduction="none").state_dict()
    speech |= {"linear2b_weight": head["weight"], "linear2_bias": head["bias"]}
    audio = joint_codebook_loss(32, 3, codebook_size=16, is_joint=False, reduction="none").state_dict()
    tensors |= {f"codebook_loss_heads.0.{name}": value for name, value in speech.items()}
    tensors |= {f"codebook_loss_heads.1.{name}": value for name, value in audio.items()}
    tensors |= {"audio_tagging_proj.1.weight": torch.randn(527, 32), "audio_tagging_proj.1.bias": torch.randn(527)}
    return tensors


def save_icefall(tensors, path, **others):
    # What a training checkpoint holds beside the model: among others a path.
    torch.save({"model": tensors, "optimizer": {"state": {}}, "exp_dir": Path("exp/a"), "epoch": 3, **others}, path)
    return path


def refused(match, source, output, **settings):
    """The refusal names its reason, and leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ConversionError, match=match):
        convert(source, output, report=quiet, **settings)
    assert sorted(output.parent.iterdir()) == before


# Published to ours and back


@pytest.mark.parametrize("name", ["tiny", "tiny_ds2"])
def test_published_to_ours_and_back_is_bit_equal(name, request, golden, tmp_path):
    source = request.getfixturevalue("golden_folder" if name == "tiny" else "golden_ds2_folder")
    activations = golden if name == "tiny" else golden | request.getfixturevalue("golden_ds2")
    save_file({k: v for k, v in activations.items() if not k.startswith(PREFIX)}, tmp_path / "activations.safetensors")
    lines = []
    ours = convert(source, tmp_path / "ours", activations=tmp_path / "activations.safetensors", report=lines.append)
    renamed = len(load_file(source / "model.safetensors")) - 8
    assert f"parity   {renamed} of {renamed} tensors bit-equal after the round trip" in lines
    assert any("50 activations of 5 utterances" in line for line in lines)

    model, info = AutoModel.from_pretrained(ours, key_mapping={}, output_loading_info=True)
    assert type(model) is SpearModel
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert SpearFeatureExtractor.from_pretrained(ours).to_dict() == SpearFeatureExtractor().to_dict()
    with torch.no_grad():
        result = model(activations["2.input_features"][None]).last_hidden_state[0]
    assert (result - activations["2.last_hidden_state"]).abs().max() < 1e-5

    back = convert(ours, tmp_path / "back", to="published", report=quiet)
    assert_same_tensors(back, source)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    again = convert(back, tmp_path / "again", report=quiet)
    for file in ours.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_the_report_comes_before_anything_is_written(golden_folder, tmp_path):
    seen = {}

    def report(line):
        seen[line.split()[0]] = list(tmp_path.iterdir())

    convert(golden_folder, tmp_path / "ours", report=report)
    assert seen["source"] == seen["tensors"] == seen["parity"] == seen["finite"] == []
    assert seen["written"] == [tmp_path / "ours"]


def test_unused_vectors_of_the_usual_value_are_dropped_by_name_and_come_back(published, tmp_path):
    unused = [name for name in published.tensors if re.search(r"layers\.\d+\.bypass_scale$", name)]
    for name in unused:
        published.tensors[name] = torch.full((32,), 0.5)
    lines = []
    ours = convert(published(), tmp_path / "ours", report=lines.append)
    assert "tensors  371 renamed, 0 kept aside, 8 dropped" in lines
    assert {line.strip() for line in lines} >= set(unused)
    assert sorted(f.name for f in ours.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert_same_tensors(convert(ours, tmp_path / "back", to="published", report=quiet), tmp_path / "published")

    for name in unused:  # a file without them is as good
        del published.tensors[name]
    bare = convert(published(), tmp_path / "bare", report=quiet)
    assert (bare / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_half_precision_and_shards(golden_folder, tmp_path):
    model = SpearModel.from_pretrained(golden_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    back = convert(tmp_path / "sharded", tmp_path / "back", to="published", report=quiet)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, value in load_file(back / "model.safetensors").items():
        assert value.dtype == torch.bfloat16
        if from_published(name) in model.state_dict():
            assert torch.equal(value, model.state_dict()[from_published(name)])
    ours = convert(back, tmp_path / "ours", report=quiet)
    assert AutoModel.from_pretrained(ours, dtype="auto").dtype == torch.bfloat16
    for folder in (back, ours):  # the weights are for all who may read the rest
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    refused("is missing", tmp_path / "sharded", tmp_path / "out", to="published")


def test_heads_have_no_place_in_the_published_format_and_are_named(golden_folder, tmp_path):
    SpearForCTC.from_pretrained(golden_folder).save_pretrained(tmp_path / "ctc")
    lines = []
    back = convert(tmp_path / "ctc", tmp_path / "back", to="published", report=lines.append)
    dropped = lines[lines.index("dropped  head of SpearForCTC:") + 1 :][:2]
    assert [line.strip() for line in dropped] == ["lm_head.bias", "lm_head.weight"]
    ours = load_file(back / "model.safetensors")
    for name, value in load_file(golden_folder / "model.safetensors").items():
        assert torch.equal(ours[name], value) or re.search(r"layers\.\d+\.bypass_scale$", name)


@pytest.mark.parametrize("setting", [{"value_head_dim": 16}, {"stem_channels": [4, 8, 16]}])
def test_what_the_published_format_cannot_say_is_refused(setting, tmp_path):
    SpearModel(SpearConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, **setting)).save_pretrained(
        tmp_path / "ours"
    )
    refused(f"cannot hold {next(iter(setting))}=", tmp_path / "ours", tmp_path / "out", to="published")


# Names


def test_names_there_and_back(golden_folder):
    names = [name for name in load_file(golden_folder / "model.safetensors") if "layers.0.bypass_scale" not in name]
    ours = [from_published(name) for name in names]
    assert len(set(ours)) == len(names)
    assert [to_published(name) for name in ours] == names
    assert all(from_published(name) == name for name in ours)
    with pytest.raises(ConversionError, match="lm_head"):
        to_published("lm_head.weight")


@pytest.mark.parametrize(
    ("size", "tensors", "values"),
    [("base", 555, 93_289_489), ("large", 511, 326_951_472), ("xlarge", 599, 596_973_362)],
)
def test_the_published_sizes_have_the_published_numbers_of_tensors_and_values(size, tensors, values):
    config = getattr(SpearConfig, size)()
    shapes = encoder_shapes(config)
    names = {to_published(name) for name in shapes} | set(left_over_names(config))
    assert len(names) == tensors
    assert sum(map(math.prod, shapes.values())) + config.num_hidden_layers * config.hidden_size == values


def test_the_table_in_the_readme_is_the_mapping_and_renames_a_checkpoint(golden_folder):
    table = re.search(r"<!-- names -->\n(.*)\n<!-- end of names -->", README.read_text(), re.DOTALL)[1]
    assert table == name_table(), f"put this into {README}:\n{name_table()}"

    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    model = SpearModel.from_pretrained(golden_folder).state_dict()
    for name, value in load_file(golden_folder / "model.safetensors").items():
        if re.search(r"layers\.\d+\.bypass_scale$", name):
            continue
        stack = re.search(r"encoders\.(\d+)\.", name)
        number = stack[1] if stack else ""
        fitting = [(old.replace("S.", f"{number}."), new.replace("S.", f"{number}.")) for old, new in rows]
        old, new = max((pair for pair in fitting if name.startswith(pair[0])), key=lambda pair: len(pair[0]))
        assert torch.equal(model[new + name.removeprefix(old)], value), name


# icefall


def test_icefall_with_heads(icefall_tensors, golden_folder, tmp_path):
    lines = []
    path = save_icefall(icefall_tensors, tmp_path / "epoch-3.pt")
    ours = convert(path, tmp_path / "ours", activations=golden_folder / "activations.safetensors", report=lines.append)
    text = "\n".join(lines)
    assert "not read epoch, exp_dir, optimizer" in text
    dropped = {line.strip() for line in lines if line.startswith("     ")}
    joint_only = ("linear1.weight", "linear1.bias", "linear2_weight", "codebook_embedding.weight")
    assert dropped >= {f"codebook_loss_heads.{n}.{part}" for n in (0, 1) for part in joint_only}
    assert dropped >= {
        "audio_tagging_proj.1.weight",
        "audio_tagging_proj.1.bias",
        "encoder.encoders.6.layers.0.bypass_scale",
    }

    model, info = SpearForPreTraining.from_pretrained(ours, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.pretraining_targets == {
        "speech": {"num_codebooks": 2, "codebook_size": 256, "weight": 1.0},
        "audio": {"num_codebooks": 3, "codebook_size": 16, "weight": 0.1},
    }
    published = SpearConfig.from_pretrained(golden_folder).to_dict()
    for name, value in model.config.to_dict().items():
        if name not in ("pretraining_targets", "architectures", "dtype", "transformers_version", "_name_or_path"):
            assert published[name] == value, name

    # The head computes what icefall's does: golden losses, and the package's own module for the second head.
    golden = load_file(FIXTURES / "golden_mvq" / "head.safetensors")
    logits = model.prediction_heads["speech"](golden["p"]).unflatten(-1, (2, 256))
    losses = F.cross_entropy(logits.flatten(0, -2), golden["ix"].flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses.view(2, 5, 2), golden["loss"], atol=1e-5, rtol=0)
    audio = joint_codebook_loss(32, 3, codebook_size=16, is_joint=False, reduction="none", checkpoint=False)
    prefix = "codebook_loss_heads.1."
    audio.load_state_dict({k.removeprefix(prefix): v for k, v in icefall_tensors.items() if k.startswith(prefix)})
    codes = torch.randint(16, (2, 5, 3))
    logits = model.prediction_heads["audio"](golden["p"]).unflatten(-1, (3, 16))
    losses = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none")
    torch.testing.assert_close(losses, audio(golden["p"], codes), atol=1e-5, rtol=0)

    # Straight to the published format: the golden checkpoint again.
    assert_same_tensors(convert(path, tmp_path / "published", to="published", report=quiet), golden_folder)


def test_icefall_with_one_head_and_output_downsampling(icefall_tensors, golden_ds2_folder, tmp_path):
    tensors = {k: v for k, v in icefall_tensors.items() if not k.startswith(("codebook", "audio"))}
    head = load_file(FIXTURES / "golden_mvq" / "head.safetensors")
    tensors["encoder.downsample_output.bias"] = torch.tensor([0.25, -0.5])
    tensors |= {"codebook_loss_net.weight": head["weight"], "codebook_loss_net.bias": head["bias"]}
    path = save_icefall(tensors, tmp_path / "a.pt")
    ours = convert(path, tmp_path / "ours", heads={"codebook_loss_net": "audio"}, unmasked_dim=8, report=quiet)
    config = SpearConfig.from_pretrained(ours)
    assert (config.output_downsampling_factor, config.unmasked_hidden_size) == (2, 8)
    assert config.pretraining_targets == {"audio": {"num_codebooks": 2, "codebook_size": 256, "weight": 0.1}}
    weights = load_file(ours / "model.safetensors")
    assert torch.equal(weights["prediction_heads.audio.weight"], head["weight"].view(512, 32))
    bare = convert(path, tmp_path / "bare", heads={"codebook_loss_net": "drop"}, report=quiet)
    assert json.loads((bare / "config.json").read_text())["architectures"] == ["SpearModel"]


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_the_configuration_is_read_off_the_shapes(size):
    config = getattr(SpearConfig, size)()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SpearModel(config).state_dict().items()}
    values, _ = icefall._infer_config(shapes, None, None, "test")
    assert SpearConfig(**values).to_dict() == config.to_dict()


def test_unusual_heads_need_their_number(tmp_path):
    config = SpearConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, query_head_dim=8, value_head_dim=6, pos_head_dim=4
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SpearModel(config).state_dict().items()}
    with pytest.raises(ConversionError, match="--num-heads"):
        icefall._infer_config(shapes, None, None, "test")
    values, _ = icefall._infer_config(shapes, 2, None, "test")
    assert SpearConfig(**values).to_dict() == config.to_dict()
    with pytest.raises(ConversionError, match="5 heads do not divide"):
        icefall._infer_config(shapes, 5, None, "test")


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(icefall_tensors, tmp_path):
    path = save_icefall(icefall_tensors, tmp_path / "bad.pt", extra=_Malicious(tmp_path / "ran"))
    refused("mkdir.*can run any code", path, tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{LAYER}norm.bias"), rf"missing {LAYER}norm.bias\."),
        (lambda t: t.pop("mask_emb"), "mask_emb is missing"),
        (lambda t: t.update({"decoder.weight": torch.ones(2)}), r"unknown decoder.weight\."),
        (lambda t: t.update({f"{LAYER}norm.bias": torch.ones(31)}), r"norm.bias \(31,\) instead of \(32,\)"),
        (lambda t: t.update({"encoder.encoders.9.layers.0.norm.bias": torch.ones(32)}), "gaps"),
        (lambda t: t.update({"mask_emb": t["mask_emb"].double()}), "mask_emb is torch.float64"),
        (lambda t: t.update({"mask_emb": t["mask_emb"].half()}), "mixes torch.float16, torch.float32"),
        (lambda t: t["mask_emb"].__setitem__(3, float("nan")), "mask_emb holds values that are not finite"),
        (lambda t: t.pop("codebook_loss_heads.0.linear2_bias"), "heads.0 is no head.*missing linear2_bias"),
        (lambda t: t.update({"codebook_loss_heads.0.x": torch.ones(2)}), "heads.0 is no head.*unknown x"),
        (lambda t: t.update({"codebook_loss_heads.1.linear2_bias": torch.ones(3, 2)}), r"biases \(3, 2\)"),
        (lambda t: t.update({"codebook_loss_heads.2.weight": torch.ones(1, 2, 32)}), "which teacher .*heads.2"),
        (lambda t: t.update({"audio_tagging_proj.weights": torch.ones(2)}), "unknown audio_tagging_proj.weights"),
        (lambda t: t.update({"step": 7}), "'step' is int"),
    ],
)  # fmt: skip
def test_icefall_checkpoints_that_are_not_understood(change, match, icefall_tensors, tmp_path):
    change(icefall_tensors)
    refused(match, save_icefall(icefall_tensors, tmp_path / "a.pt"), tmp_path / "ours")


def test_heads_are_mapped_without_guessing(icefall_tensors, tmp_path):
    path = save_icefall(icefall_tensors, tmp_path / "a.pt")
    refused("several heads", path, tmp_path / "ours", heads={"codebook_loss_heads.1": "speech"})
    refused("--head names codebook_loss_net", path, tmp_path / "ours", heads={"codebook_loss_net": "speech"})
    swapped = {"codebook_loss_heads.0": "audio", "codebook_loss_heads.1": "speech"}
    ours = convert(path, tmp_path / "ours", heads=swapped, report=quiet)
    assert SpearConfig.from_pretrained(ours).pretraining_targets["speech"]["num_codebooks"] == 3
    assert icefall.parse_heads(["codebook_loss_heads.1=drop"]) == {"codebook_loss_heads.1": "drop"}
    for wrong in ("codebook_loss_heads.1", "codebook_loss_heads=speech", "codebook_loss_net=music"):
        with pytest.raises(ConversionError, match=wrong):
            icefall.parse_heads([wrong])


def test_files_that_are_no_icefall_checkpoint(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pt")
    refused("no entry `model`.*state_dict", tmp_path / "a.pt", tmp_path / "ours")
    torch.save({"model": {}}, tmp_path / "a.pt")
    refused("not named tensors", tmp_path / "a.pt", tmp_path / "ours")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    refused("not loaded|damaged", tmp_path / "a.pt", tmp_path / "ours")


# Refusals of the published format


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{PREFIX}{LAYER}conv_module2.out_proj.weight"), r"missing .*conv_module2.out_proj.weight\."),
        (lambda t: t.update({f"{PREFIX}head.weight": torch.ones(2)}), r"unknown model.model.head.weight\."),
        (lambda t: t.update({"encoder.encoders.0.layers.0.bypass_scale": torch.ones(32)}), "unknown encoder.encoders"),
        (lambda t: t.update({f"{PREFIX}encoder.encoders.0.layers.5.bypass_scale": torch.ones(32)}), ".*layers.5"),
        (lambda t: t.update({f"{PREFIX}{LAYER}bypass_scale": torch.ones(3)}), r"scale \(3,\) instead of \(32,\)"),
        (lambda t: t.update({f"{PREFIX}mask_emb": torch.ones(1, 128)}), r"mask_emb \(1, 128\) instead of \(128,\)"),
        (lambda t: t.update({f"{PREFIX}mask_emb": torch.full((128,), torch.inf)}), "mask_emb holds .*not finite"),
        (lambda t: t.update({f"{PREFIX}mask_emb": torch.ones(128, dtype=torch.int32)}), "mask_emb is torch.int32"),
    ],
)  # fmt: skip
def test_published_tensors_that_are_not_understood(change, match, published, tmp_path):
    change(published.tensors)
    refused(match, published(), tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"causal": True}, "causal"),
        ({"encoder_dim": "32,32,32,32,32,32,64"}, "non-uniform"),
        ({"num_encoder_layers": "1,1,2,1,1,1,2"}, "missing model.model.encoder.encoders.6.layers.1"),
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"pos_dim": "many"}, "pos_dim"),
    ],
)
def test_published_configurations_that_do_not_fit(change, match, published, tmp_path):
    published.config.update(change)
    refused(match, published(), tmp_path / "ours")


def test_incomplete_folders_and_wrong_directions(published, golden_folder, tmp_path):
    folder = published()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("cut off or damaged", folder, tmp_path / "ours")
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    refused("has both model.safetensors and model.safetensors.index.json", folder, tmp_path / "ours")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    refused("neither model.safetensors", folder, tmp_path / "ours")
    (folder / "config.json").unlink()
    refused("no config.json", folder, tmp_path / "ours")
    refused("does not exist", tmp_path / "nothing", tmp_path / "ours")
    refused("published format already", golden_folder, tmp_path / "ours", to="published")
    refused("--to onnx", golden_folder, tmp_path / "ours", to="onnx")
    refused("for icefall", golden_folder, tmp_path / "ours", num_heads=4)


# Parity


@pytest.mark.parametrize("name", ["0.embed", "1.layer.05", "4.last_hidden_state"])
def test_other_activations_are_refused(name, golden, golden_folder, tmp_path):
    changed = dict(golden)
    for value in (1e-3, float("nan")):
        changed[name] = golden[name].clone()
        changed[name].view(-1)[-1] += value
        save_file(changed, tmp_path / "activations.safetensors")
        refused(f"{name} by ", golden_folder, tmp_path / "ours", activations=tmp_path / "activations.safetensors")
    for tolerance in (0.0, float("nan")):
        refused(
            "differ",
            golden_folder,
            tmp_path / "ours",
            activations=golden_folder / "activations.safetensors",
            tolerance=tolerance,
        )


def test_another_models_weights_are_refused(published, golden_folder, tmp_path):
    published.tensors[f"{PREFIX}{LAYER}feed_forward1.in_proj.bias"] += 0.01
    refused("another model", published(), tmp_path / "ours", activations=golden_folder / "activations.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"0.layer.08": torch.zeros(159, 32)}, "has no such layer"),
        ({"0.layer.07": torch.zeros(158, 32)}, r"\(158, 32\), the converted model gives \(159, 32\)"),
        ({"0.logits": torch.zeros(3)}, "not understood: 0.logits"),
        ({"7.input_features": torch.zeros(20, 128)}, "utterance 7 lacks"),
    ],
)
def test_activations_that_are_not_understood(change, match, golden, golden_folder, tmp_path):
    save_file(golden | change, tmp_path / "activations.safetensors")
    refused(match, golden_folder, tmp_path / "ours", activations=tmp_path / "activations.safetensors")


def test_a_model_that_computes_nothing_finite_is_refused(published, tmp_path):
    published.tensors[f"{PREFIX}encoder_embed.out_norm.log_scale"] = torch.tensor(200.0)
    refused("not finite", published(), tmp_path / "ours")


# Output folders


def test_nothing_of_value_is_overwritten(golden_folder, published, tmp_path):
    (tmp_path / "empty").mkdir()
    ours = convert(golden_folder, tmp_path / "empty", report=quiet)
    before = (ours / "model.safetensors").read_bytes()
    refused("--force", golden_folder, ours)
    published.tensors[f"{PREFIX}mask_emb"] += 1
    convert(published(), ours, force=True, report=quiet)
    assert (ours / "model.safetensors").read_bytes() != before

    before = (ours / "model.safetensors").read_bytes()
    published.tensors[f"{PREFIX}mask_emb"][0] = torch.nan
    refused("finite", published(), ours, force=True)
    (ours / "README.md").write_text("mine")
    refused("holds README.md", golden_folder, ours, force=True)
    assert (ours / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    refused("is a file", golden_folder, tmp_path / "file", force=True)
    refused("is the source", tmp_path / "published", tmp_path / "published", force=True)


def test_an_interrupted_write_leaves_the_old_folder(tmp_path):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "config.json").write_text("old")
    writing = whole_folder(tmp_path / "a")
    (writing.__enter__() / "config.json").write_text("new")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "config.json").read_text() == "old"


# Commands


def hub_cache(folder, repo_id, source):
    """A cache of huggingface_hub that has downloaded `source` as the repository `repo_id`."""
    repository = folder / f"models--{repo_id.replace('/', '--')}"
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, snapshot / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "conversion" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


def test_the_commands_of_the_readme_run(icefall_tensors, golden_folder, tmp_path, monkeypatch):
    commands = re.findall(r"^python conversion/(\w+)\.py (.*)$", README.read_text(), re.MULTILINE)
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    cache = hub_cache(tmp_path / "cache", "marcoyang/spear-base-speech-audio-v2", golden_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    shutil.copyfile(golden_folder / "activations.safetensors", tmp_path / "activations.safetensors")
    save_icefall(icefall_tensors, tmp_path / "epoch-50.pt")
    quantizer = load_file(FIXTURES / "golden_mvq" / "mvq.safetensors")
    torch.save({k[5:]: v for k, v in quantizer.items() if k.startswith("b.sd.")}, tmp_path / "quantizer.pt")
    for name, arguments in commands:
        result = CliRunner().invoke(script(name), shlex.split(arguments))
        assert result.exit_code == 0, result.output
        assert "bit-equal" in result.output
    assert_same_tensors(tmp_path / "spear-base-published", golden_folder)
    assert "speech" in SpearForPreTraining.from_pretrained(tmp_path / "spear-pretrained").prediction_heads
    assert MultiCodebookQuantizer.from_pretrained(tmp_path / "wavlm-large-l21").config.teacher_layer == 21

    result = CliRunner().invoke(script("convert_official"), ["marcoyang/unknown", "out"])
    assert result.exit_code == 1
    assert "marcoyang/unknown is neither a folder here nor a repository" in result.stderr
    result = CliRunner().invoke(script("convert_multi_quantization"), ["nothing.pt", "out"])
    assert (result.exit_code, result.stderr) == (
        1,
        "error: nothing.pt is not a file; give the .pt or .safetensors of a quantiser.\n",
    )


def test_spear_hf_convert(golden_folder, tmp_path):
    arguments = ["convert", str(golden_folder), str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [*arguments, "--head", "codebook_loss_net=music"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --head codebook_loss_net=music: ")
    assert not any(tmp_path.iterdir())
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
