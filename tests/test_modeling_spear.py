# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SpearModel: parity with the published code, independence of the batch, loading and saving, numerics."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from spear_hf import SpearConfig, SpearForCTC, SpearModel


TOLERANCE = 1e-5
FILL = -23.025850929940457  # log(1e-10), what the feature extractor pads with


def load(folder):
    return SpearModel.from_pretrained(folder).eval()


def utterance_features(golden):
    return [golden[f"{i}.input_features"] for i in range(5)]


def batch(features, extra=0):
    frames = max(len(f) for f in features) + extra
    padded = torch.full((len(features), frames, 128), FILL)
    mask = torch.zeros(len(features), frames, dtype=torch.long)
    for row, feature in enumerate(features):
        padded[row, : len(feature)] = feature
        mask[row, : len(feature)] = 1
    return padded, mask


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(params=["tiny", "tiny_ds2"])
def published(request, golden_folder, golden_ds2_folder, golden, golden_ds2):
    if request.param == "tiny":
        return load(golden_folder), golden
    return load(golden_ds2_folder), golden_ds2


@torch.no_grad()
def test_golden_parity(published, capsys):
    model, golden = published
    worst = 0.0
    for i in range(5):
        output = model(golden[f"{i}.input_features"][None], output_hidden_states=True)
        assert len(output.hidden_states) == model.config.num_hidden_layers + 1
        expected = [golden[f"{i}.embed"], *(golden[f"{i}.layer.{k:02d}"] for k in range(8))]
        errors = [error(ours[0], theirs) for ours, theirs in zip(output.hidden_states, expected)]
        errors.append(error(output.last_hidden_state[0], golden[f"{i}.last_hidden_state"]))
        worst = max(worst, *errors)
    with capsys.disabled():
        factor = model.config.output_downsampling_factor
        print(f"\ngolden parity, output factor {factor}: max absolute error {worst:.1e} (limit {TOLERANCE:.0e})")
    assert worst <= TOLERANCE


@torch.no_grad()
def test_output_does_not_depend_on_the_batch(published, capsys):
    model, golden = published
    features = utterance_features(golden)
    worst = 0.0
    for rows, extra in (([0, 1, 2, 3, 4], 0), ([4, 0], 37), ([2, 4, 3], 1), ([3, 3, 1], 2), ([4], 400)):
        padded, mask = batch([features[row] for row in rows], extra)
        output = model(padded, attention_mask=mask, output_hidden_states=True)
        for place, row in enumerate(rows):
            expected = golden[f"{row}.last_hidden_state"]
            assert output.attention_mask[place].tolist() == (
                [1] * len(expected) + [0] * (output.last_hidden_state.shape[1] - len(expected))
            )
            worst = max(worst, error(output.last_hidden_state[place, : len(expected)], expected))
            for k in range(8):
                expected = golden[f"{row}.layer.{k:02d}"]
                worst = max(worst, error(output.hidden_states[k + 1][place, : len(expected)], expected))
    with capsys.disabled():
        print(f"\nbatch against alone: max absolute error {worst:.1e} (limit {TOLERANCE:.0e})")
    assert worst <= TOLERANCE


@torch.no_grad()
def test_every_length_is_independent_of_its_padding(golden_folder, golden):
    model = load(golden_folder)
    features = golden["0.input_features"]
    for frames in range(9, 42):
        alone = model(features[None, :frames]).last_hidden_state[0]
        padded, mask = batch([features[:frames], features[60:200]])
        together = model(padded, attention_mask=mask).last_hidden_state[0, : len(alone)]
        assert error(together, alone) <= TOLERANCE, frames


@torch.no_grad()
def test_what_padding_holds_does_not_matter(golden_folder, golden):
    model = load(golden_folder)
    padded, mask = batch(utterance_features(golden))
    expected = model(padded, attention_mask=mask).last_hidden_state
    noise = torch.where(mask[:, :, None].bool(), padded, torch.randn_like(padded) * 10)
    valid = model(noise, attention_mask=mask).attention_mask.bool()
    assert error(model(noise, attention_mask=mask).last_hidden_state[valid], expected[valid]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_any_type_count_alike(golden_folder, dtype):
    """In half precision a sum of ones stops at 256 or 2048."""
    model = SpearForCTC.from_pretrained(golden_folder, vocab_size=5, final_dropout=0.0)
    features = torch.randn(1, 2300, 128)
    mask = (torch.arange(2300) < 2205).long()[None]
    expected = model(features, attention_mask=mask, labels=torch.ones(1, 3, dtype=torch.int64))
    found = model(features, attention_mask=mask.to(dtype), labels=torch.ones(1, 3, dtype=torch.int64))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    states = model.spear(features, attention_mask=mask.to(dtype))
    assert states.attention_mask.dtype == dtype
    assert int(states.attention_mask.long().sum()) == (2205 - 7) // 2
    assert torch.equal(model._get_feature_vector_attention_mask(1146, mask.to(dtype)), states.attention_mask.bool())


def test_last_hidden_state_is_the_last_layer(golden_folder, golden):
    output = load(golden_folder)(golden["2.input_features"][None], output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])


def test_published_checkpoint_loads_completely(golden_folder):
    model, info = AutoModel.from_pretrained(golden_folder, output_loading_info=True)
    assert type(model) is SpearModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    published = load_file(golden_folder / "model.safetensors")
    left_over = [name for name in published if name.endswith("bypass_scale") and name.split(".")[-2].isdigit()]
    assert len(model.state_dict()) == len(published) - len(left_over)
    assert len(left_over) == model.config.num_hidden_layers
    assert torch.equal(model.masked_spec_embed, published["model.model.mask_emb"])


def test_save_load_save_is_byte_stable(golden_folder, tmp_path):
    load(golden_folder).save_pretrained(tmp_path / "one")
    SpearModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    names = set(load_file(tmp_path / "one" / "model.safetensors"))
    assert names == set(SpearModel(SpearConfig.from_pretrained(golden_folder)).state_dict())
    assert not any(name.startswith("model.") for name in names)
    _, info = SpearModel.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("variant", [None, "fp32"])
def test_the_last_save_is_what_loads(golden_folder, tmp_path, variant):
    """One file of weights, then several, then one again: of both, transformers reads the one file, new or old."""
    model = load(golden_folder)
    for value, size in ((1.0, "1GB"), (2.0, "1MB"), (3.0, "1GB")):
        with torch.no_grad():
            model.masked_spec_embed.fill_(value)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        assert len(list(tmp_path.glob("model.safetensors*"))) == 1 or variant
        assert SpearModel.from_pretrained(tmp_path, variant=variant).masked_spec_embed[0] == value
    assert len(list(tmp_path.iterdir())) == 2


def test_published_names_can_be_written_back(golden_folder, tmp_path):
    load(golden_folder).save_pretrained(tmp_path, save_original_format=True)
    published = load_file(golden_folder / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    for name, value in written.items():
        assert torch.equal(value, published[name]), name
    assert all(name.split(".")[-2].isdigit() for name in set(published) - set(written))


def test_truncated_checkpoint_is_refused(golden_folder, tmp_path):
    shutil.copyfile(golden_folder / "config.json", tmp_path / "config.json")
    whole = (golden_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        SpearModel.from_pretrained(tmp_path)


def test_missing_tensor_is_reported(golden_folder, tmp_path):
    shutil.copyfile(golden_folder / "config.json", tmp_path / "config.json")
    weights = load_file(golden_folder / "model.safetensors")
    del weights["model.model.encoder_embed.conv.4.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = SpearModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"stem.conv2.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_precision_is_finite(golden_folder, golden, dtype):
    padded, mask = batch(utterance_features(golden))
    model = AutoModel.from_pretrained(golden_folder, dtype=dtype).eval()
    output = model(padded, attention_mask=mask, output_hidden_states=True)
    assert output.last_hidden_state.dtype == dtype
    assert all(state.isfinite().all() for state in output.hidden_states)
    reference = load(golden_folder)(padded, attention_mask=mask).last_hidden_state
    valid = output.attention_mask.bool()
    # bfloat16 has 8 bits of mantissa, float16 has 11; eight layers of a random model amplify their rounding.
    share = (output.last_hidden_state.float() - reference)[valid].norm() / reference[valid].norm()
    assert share < {torch.float32: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_base_model_is_finite_in_half_precision(dtype):
    torch.manual_seed(0)
    model = SpearModel(SpearConfig.base()).eval().to(dtype)
    features = torch.randn(1, 200, 128) * 4 - 8
    assert model(features).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_published_sizes_build_on_meta_and_load(size, tmp_path):
    """The full size on the meta device; a checkpoint of all its layers, made thin to be quick, is loaded."""
    full = getattr(SpearConfig, size)()
    with torch.device("meta"):
        assert all(p.is_meta for p in SpearModel(full).parameters())
    config = getattr(SpearConfig, size)()
    config.hidden_size, config.intermediate_size, config.unmasked_hidden_size = 32, 64, 16
    torch.manual_seed(0)
    model = SpearModel(config)
    model.save_pretrained(tmp_path)
    loaded = SpearModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_published_sizes_load_at_full_width(size, tmp_path):
    torch.manual_seed(0)
    model = SpearModel(getattr(SpearConfig, size)())
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_initialisation_follows_the_recipe():
    torch.manual_seed(0)
    model = SpearModel(SpearConfig(hidden_size=256, intermediate_size=512))
    layer = model.stacks[0].layers[0]
    assert layer.bypass.bypass_scale.unique().tolist() == [0.5]
    assert layer.norm.log_scale.item() == 1.0
    assert 0 < layer.norm.bias.abs().max() < 1e-3
    assert model.stacks[1].downsample.bias.tolist() == [0.0, 0.0]
    assert model.masked_spec_embed.std() > 0.5
    uniform_std = 256**-0.5 / 3**0.5
    for linear, scale in (
        (layer.self_attn_weights.in_proj, 32**-0.25),
        (layer.conv_module1.in_proj, 1.0),
        (layer.conv_module1.out_proj, 0.05),
    ):
        assert linear.weight.std().item() == pytest.approx(scale * uniform_std, rel=0.05)
    assert layer.feed_forward1.out_proj.bias.abs().max().item() == pytest.approx(0.1 * 0.1, rel=0.05)


def test_too_short_input_is_refused(golden_folder):
    with pytest.raises(ValueError, match=r"8 frames.*at least 9"):
        load(golden_folder)(torch.zeros(1, 8, 128))


@pytest.mark.parametrize(
    ("features", "masks", "words"),
    [
        (torch.zeros(1, 16000), {}, r"\(1, 16000\).*\(batch, frames, 128\)"),
        (torch.zeros(1, 128, 50), {}, r"\(1, 128, 50\).*\(batch, frames, 128\)"),
        (torch.zeros(2, 50, 128), {"attention_mask": torch.ones(2, 8000)}, r"attention_mask.*\(2, 8000\).*\(2, 50\)"),
        (torch.zeros(2, 50, 128), {"attention_mask": torch.ones(1, 50)}, r"attention_mask.*\(1, 50\).*\(2, 50\)"),
        (torch.zeros(2, 50, 128), {"mask_time_indices": torch.ones(2, 21)}, r"mask_time_indices.*\(2, 21\)"),
        (torch.zeros(2, 50, 128), {"attention_mask": torch.ones(2, 50).triu(3)}, r"0 before a 1 in row 0.*right"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(golden_folder, features, masks, words):
    with pytest.raises(ValueError, match=words):
        load(golden_folder)(features, **masks)


@torch.no_grad()
def test_masks_are_applied_to_the_input(golden_folder, golden):
    model = load(golden_folder)
    features = golden["2.input_features"][None]
    time = torch.zeros(1, features.shape[1], dtype=torch.bool)
    time[0, 10:20] = True
    bins = torch.zeros(1, 128, dtype=torch.bool)
    bins[0, 5:25] = True
    expected = features.clone()
    expected[..., 5:25] = 0
    expected[:, 10:20] = model.masked_spec_embed
    masked = model(features, mask_time_indices=time, mask_feature_indices=bins).last_hidden_state
    assert torch.equal(masked, model(expected).last_hidden_state)
