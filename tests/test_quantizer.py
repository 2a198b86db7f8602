# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The quantiser: codes of the reference, the search against its definition, files, refusals."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from spear_hf.mvq import quantizer as quantizer_module
from spear_hf.mvq import refinement
from spear_hf.mvq.quantizer import MultiCodebookQuantizer, QuantizerConfig
from spear_hf.mvq.refinement import CodeSearch, cutoff

from .conftest import FIXTURES, ROOT
from .hub_server import HubServer


@pytest.fixture(scope="module")
def golden_values():
    tensors = load_file(FIXTURES / "golden_mvq" / "mvq.safetensors")
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        for name in ("a", "b")
    }


def reference_state(values):
    return {key.removeprefix("sd."): value for key, value in values.items() if key.startswith("sd.")}


@pytest.fixture
def quantizer(golden_values):
    """Quantiser b: 4 codebooks of 256 centres, 24 channels."""
    return MultiCodebookQuantizer.from_multi_quantization(
        reference_state(golden_values["b"]), teacher="kaldi-mfcc", frame_rate=50, provenance={"made": ("by", "hand")}
    )


def random_quantizer(feature_size, codebook_size, num_codebooks, seed=0, **metadata):
    """Centres of different sizes with an offset in common; the classifier knows them roughly."""
    torch.manual_seed(seed)
    quantizer = MultiCodebookQuantizer(feature_size, codebook_size, num_codebooks, **metadata)
    with torch.no_grad():
        sizes = torch.linspace(1, 0.3, num_codebooks)[:, None, None]
        quantizer.centers.copy_(torch.randn_like(quantizer.centers) * sizes + 0.5)
        quantizer.to_logits.weight.copy_(quantizer.centers.flatten(0, 1))
        quantizer.centers_scale.fill_(0.01)
    return quantizer.eval()


def random_frames(quantizer, count, seed=1):
    """Sums of centres and some noise."""
    config, generator = quantizer.config, torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (count, config.num_codebooks), generator=generator)
    return quantizer.decode(codes) + 0.3 * torch.randn(count, config.feature_size, generator=generator)


def refined_by_definition(frame, centers, codes):
    """One pass for one frame, word for word as the spec has it: with vectors, in float64."""
    count, size, _ = centers.shape
    error = sum(centers[c, codes[c]] for c in range(count)) - frame
    squared = error.square().sum()
    deltas = [centers[c] - centers[c, codes[c]] for c in range(count)]
    costs = [(error + delta).square().sum(dim=1) for delta in deltas]
    options = [[(k,) for k in range(size)] for _ in range(count)]
    length = 1
    while True:
        keep = min((16 if size > 16 else 8) * 2 ** int(torch.tensor(float(length)).log2().item() // 2), 128)
        groups = len(options)
        if len(options[0]) > keep or groups == 1:
            keep = 1 if groups == 1 else keep
            for group in range(groups):
                order = costs[group].argsort()[:keep]
                costs[group], deltas[group] = costs[group][order], deltas[group][order]
                options[group] = [options[group][place] for place in order]
            if groups == 1:
                return torch.tensor(options[0][0])
        else:
            pairs = range(0, groups, 2)
            costs = [
                (costs[g][:, None] + costs[g + 1][None] - squared + 2 * deltas[g] @ deltas[g + 1].T).flatten()
                for g in pairs
            ]
            deltas = [(deltas[g][:, None] + deltas[g + 1][None]).flatten(0, 1) for g in pairs]
            options = [[even + odd for even in options[g] for odd in options[g + 1]] for g in pairs]
            length *= 2


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_codes_decodes_and_losses(golden_values, name):
    values = golden_values[name]
    quantizer = MultiCodebookQuantizer.from_multi_quantization(reference_state(values))
    for passes in (0, 1, 2, 5):
        assert torch.equal(quantizer.encode(values["x"], refine_iters=passes).long(), values[f"idx{passes}"])
    codes = quantizer.encode(values["x"])
    assert codes.dtype == torch.uint8
    assert torch.equal(quantizer.pack_codes(codes), values["bytes"])
    assert torch.equal(quantizer.unpack_codes(values["bytes"]), codes)
    torch.testing.assert_close(quantizer.decode(codes), values["dec"], rtol=0, atol=1e-5)
    with torch.no_grad():
        losses = quantizer(values["x"], refine_iters=2)
    for place, loss in enumerate(losses):
        torch.testing.assert_close(loss, values[f"loss2.{place}"], rtol=0, atol=1e-5)
    identity = bytes(values["sd.id_buf"].tolist()).decode()
    assert quantizer.config.provenance == {"multi_quantization_id": identity}


@pytest.mark.parametrize("num_codebooks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("codebook_size", [4, 16, 256])
def test_search_equals_its_definition(num_codebooks, codebook_size):
    quantizer = random_quantizer(12, codebook_size, num_codebooks)
    frames = random_frames(quantizer, 6)
    centers = quantizer.centers.double() * (10 * quantizer.centers_scale.double()).exp()
    codes = quantizer.encode(frames, refine_iters=0).long()
    for passes in (1, 2, 3):
        codes = torch.stack([refined_by_definition(f.double(), centers, c) for f, c in zip(frames, codes)])
        assert torch.equal(quantizer.encode(frames, refine_iters=passes).long(), codes)


def test_odd_numbers_of_centres():
    """Nothing in the search wants a power of two but the number of codebooks."""
    for codebook_size in (2, 3, 6, 37, 300):
        quantizer = random_quantizer(10, codebook_size, 4)
        frames = random_frames(quantizer, 5)
        codes = quantizer.encode(frames, refine_iters=0).long()
        expected = torch.stack(
            [refined_by_definition(f.double(), quantizer._scaled_centers().double(), c) for f, c in zip(frames, codes)]
        )
        found = quantizer.encode(frames, refine_iters=1)
        assert torch.equal(found.long(), expected)
        assert found.dtype == (torch.int64 if codebook_size > 256 else torch.uint8)
        if codebook_size <= 256:
            assert torch.equal(quantizer.unpack_codes(quantizer.pack_codes(found)), found)
        else:
            with pytest.raises(ValueError, match="do not fit into bytes"):
                quantizer.pack_codes(found)


def test_cutoffs():
    assert [cutoff(256, length) for length in (1, 2, 4, 8, 16, 32, 64, 256)] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert [cutoff(16, length) for length in (1, 2, 4, 16, 64, 256)] == [8, 8, 16, 32, 64, 128]


def test_a_large_common_offset_costs_no_precision():
    """Teachers have channels whose mean is hundreds of times their deviation (Whisper: above 500)."""
    quantizer = random_quantizer(32, 256, 8)
    frames = random_frames(quantizer, 300)
    with torch.no_grad():
        quantizer.to_logits.bias.zero_()
        expected = quantizer.encode(frames)
        quantizer.to_logits.bias -= 500 * (quantizer._scaled_weight()[:, :1]).squeeze()
        quantizer.centers[:, :, 0] += 500 / 8 / (10 * quantizer.centers_scale).exp()
        frames[:, 0] += 500
    agreement = (quantizer.encode(frames) == expected).float().mean().item()
    print(f"codes equal with an offset of 500: {agreement:.4%}")
    assert agreement > 0.995  # an offset of 500 leaves the frames themselves only 5 digits


def test_codes_do_not_depend_on_batch_chunk_or_threads(monkeypatch):
    quantizer = random_quantizer(40, 64, 8)
    frames = random_frames(quantizer, 600)
    expected = quantizer.encode(frames)
    for first, last in ((0, 1), (255, 257), (3, 430), (599, 600)):
        assert torch.equal(quantizer.encode(frames[first:last]), expected[first:last])
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.encode(frames[order]), expected[order])
    assert torch.equal(quantizer.encode(frames.view(6, 100, 40)), expected.view(6, 100, 8))
    monkeypatch.setattr(quantizer_module, "CHUNK_ROWS", 256)
    assert torch.equal(quantizer.encode(frames), expected)
    monkeypatch.setattr(refinement, "BLOCK_BYTES", 1 << 20)
    assert torch.equal(quantizer.encode(frames), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(quantizer.encode(frames), expected)
        torch.set_num_threads(3)
        assert torch.equal(quantizer.encode(frames), expected)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_settled_frames_are_left_out_and_nothing_changes():
    """Five passes with frames dropped as they settle equal five whole passes."""
    quantizer = random_quantizer(20, 16, 8)
    frames = random_frames(quantizer, 200)
    search = CodeSearch(quantizer._scaled_centers().detach())
    costs = search.linear_costs(frames)
    codes = quantizer.encode(frames, refine_iters=0).long()
    step = codes
    for _ in range(5):
        step = search.refine(costs, step, 1)
    assert torch.equal(search.refine(costs, codes, 5), step)


def test_any_floating_type_shape_and_surrounding(quantizer, golden_values):
    frames = golden_values["b"]["x"]
    expected = quantizer.encode(frames)
    assert torch.equal(quantizer.encode(frames.double()), expected)
    assert torch.equal(quantizer.encode(frames.T.contiguous().T), expected)
    assert torch.equal(quantizer.encode(frames[7]), expected[7])
    assert quantizer.encode(frames[:0]).shape == (0, 4)
    assert quantizer.decode(expected[:0]).shape == (0, 24)
    assert quantizer.decode(expected.view(2, 32, 4)).shape == (2, 32, 24)
    half = frames.bfloat16()
    assert torch.equal(quantizer.encode(half), quantizer.encode(half.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(frames), expected)
    with torch.inference_mode():
        assert torch.equal(quantizer.encode(frames), expected)
    assert torch.equal(quantizer.encode(frames), expected)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(quantizer.encode(frames), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_normalisation_is_inside():
    raw = random_quantizer(16, 16, 4)
    quantizer = random_quantizer(16, 16, 4, normalize=True)
    quantizer.feature_mean.copy_(torch.linspace(-3, 3, 16))
    quantizer.feature_std.copy_(torch.linspace(0.5, 4, 16))
    standardised = random_frames(raw, 100)
    frames = standardised * quantizer.feature_std + quantizer.feature_mean
    codes = quantizer.encode(frames)
    assert (codes == raw.encode(standardised)).float().mean() > 0.99
    torch.testing.assert_close(
        quantizer.decode(codes), raw.decode(codes) * quantizer.feature_std + quantizer.feature_mean
    )
    torch.testing.assert_close(
        quantizer.mean_estimate(), raw.mean_estimate() * quantizer.feature_std + quantizer.feature_mean
    )


def test_mean_estimate_is_the_mean_of_evenly_used_centres():
    quantizer = random_quantizer(6, 4, 2)
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    torch.testing.assert_close(quantizer.mean_estimate(), quantizer.decode(codes).mean(dim=0))


def test_changed_parameters_are_seen(quantizer, golden_values):
    frames = golden_values["b"]["x"]
    before, identity = quantizer.encode(frames), quantizer.quantizer_id
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(twin.encode(frames), before)
        assert twin.quantizer_id == identity
    with torch.no_grad():
        quantizer.centers[0] += 1
    fresh = MultiCodebookQuantizer.from_config(quantizer.config)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer.encode(frames), fresh.encode(frames))
    assert not torch.equal(quantizer.encode(frames), before)
    assert quantizer.quantizer_id == fresh.quantizer_id != identity


def test_each_loss_moves_its_own_parameters(quantizer, golden_values):
    losses = quantizer(golden_values["b"]["x"], refine_iters=1)
    total = losses.reconstruction + losses.classifier + 0.01 * losses.logits_entropy
    torch.testing.assert_close(losses.total, total)
    parameters = dict(quantizer.named_parameters())
    moved = {}
    for name in ("reconstruction", "classifier", "logits_entropy"):
        gradients = torch.autograd.grad(
            getattr(losses, name), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        moved[name] = {key for key, gradient in zip(parameters, gradients) if gradient is not None}
    assert moved["reconstruction"] == {"centers", "centers_scale"}
    assert moved["classifier"] == moved["logits_entropy"] == {"to_logits.weight", "to_logits.bias", "logits_scale"}
    assert not losses.index_entropy.requires_grad


def test_what_is_not_features_or_codes_is_refused(quantizer, golden_values):
    frames = golden_values["b"]["x"].clone()
    with pytest.raises(ValueError, match=r"\(\.\.\., 24\), not torch.float32 \(64, 23\)"):
        quantizer.encode(frames[:, 1:])
    with pytest.raises(ValueError, match=r"not torch.int64 \(64, 24\)"):
        quantizer.encode(frames.long())
    with pytest.raises(ValueError, match="refine_iters must be at least 0, not -1"):
        quantizer.encode(frames, refine_iters=-1)
    frames[5, 3] = float("inf")
    with pytest.raises(ValueError, match="inf in channel 3 of frame 5"):
        quantizer.encode(frames)
    codes = quantizer.encode(frames[:5]).long()
    with pytest.raises(ValueError, match="code -100 is outside"):
        quantizer.decode(torch.cat([codes, torch.full((1, 4), -100)]))
    with pytest.raises(ValueError, match="code 256 is outside"):
        quantizer.decode(torch.full_like(codes, 256))
    with pytest.raises(ValueError, match=r"integers \(\.\.\., 4\), not torch.int64 \(5, 3\)"):
        quantizer.decode(codes[:, 1:])
    with pytest.raises(ValueError, match=r"packed codes must be \(\.\.\., 4\)"):
        quantizer.unpack_codes(codes[:, 1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codebooks": 3}, "power of two"),
        ({"num_codebooks": 0}, "positive integer"),
        ({"codebook_size": 1}, "at least 2"),
        ({"feature_size": 2.0}, "positive integer, not 2.0"),
        ({"normalize": 1}, "true or false"),
        ({"frame_rate": -50.0}, "positive"),
        ({"provenance": {"x": object()}}, "JSON"),
        ({"codebooks": 4}, r"unknown \['codebooks'\]"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizerConfig.from_dict({"feature_size": 8, "num_codebooks": 4, "codebook_size": 16} | settings)


def test_save_load_save_gives_equal_bytes(quantizer, golden_values, tmp_path):
    quantizer.save_pretrained(tmp_path / "one")
    loaded = MultiCodebookQuantizer.from_pretrained(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "README.md").write_text("mine")
    loaded.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert loaded.config == quantizer.config
    assert loaded.quantizer_id == quantizer.quantizer_id
    assert not loaded.training
    frames = golden_values["b"]["x"]
    assert torch.equal(loaded.encode(frames), quantizer.encode(frames))
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["teacher"] == "kaldi-mfcc"
    assert config["frame_rate"] == 50.0
    assert config["provenance"]["made"] == ["by", "hand"]


def test_the_identity_is_that_of_the_codes(golden_values):
    state = reference_state(golden_values["b"])
    load = MultiCodebookQuantizer.from_multi_quantization
    identity = load(state, teacher="a", teacher_layer=21).quantizer_id
    assert len(identity) == 32
    assert load(state, teacher="a", teacher_layer=21, provenance={"note": 1}).quantizer_id == identity
    assert load(state, teacher="b", teacher_layer=21).quantizer_id != identity
    assert load(state, teacher="a", teacher_layer=20).quantizer_id != identity
    statistics = {"mean": torch.zeros(24), "std": torch.full((24,), 2.0)}
    assert load(state, teacher="a", teacher_layer=21, **statistics).quantizer_id != identity


def edited(folder, target, change_config=None, change_tensors=None):
    """A copy of a saved quantiser with something changed; the recorded identity is dropped."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    del config["quantizer_id"]
    tensors = load_file(target / "model.safetensors")
    (change_config or dict)(config)
    (change_tensors or dict)(tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


def test_incomplete_and_unknown_folders_are_refused(quantizer, tmp_path):
    saved, load = tmp_path / "saved", MultiCodebookQuantizer.from_pretrained
    quantizer.save_pretrained(saved)
    assert load(edited(saved, tmp_path / "same")).quantizer_id == quantizer.quantizer_id

    config_changes = {
        "format_version is 2": lambda config: config.update(format_version=2),
        "format_version is None": lambda config: config.pop("format_version"),
        r"unknown \['residual'\]": lambda config: config.update(residual=True),
        r"missing \['feature_size'\]": lambda config: config.pop("feature_size"),
        "missing tensors .*feature_mean": lambda config: config.update(normalize=True),
        r"centers is .*\(4, 256, 24\), not .*\(4, 256, 23\)": lambda config: config.update(feature_size=23),
    }
    for number, (message, change) in enumerate(config_changes.items()):
        with pytest.raises(ValueError, match=message):
            load(edited(saved, tmp_path / f"config{number}", change_config=change))
    tensor_changes = {
        r"missing tensors \['centers_scale'\]": lambda tensors: tensors.pop("centers_scale"),
        r"unexpected tensors \['extra'\]": lambda tensors: tensors.update(extra=torch.zeros(1)),
        "to_logits.bias is torch.bfloat16": lambda t: t.update({"to_logits.bias": t["to_logits.bias"].bfloat16()}),
        "centers holds values that are not finite": lambda t: t["centers"].view(-1)[0].fill_(torch.nan),
    }
    for number, (message, change) in enumerate(tensor_changes.items()):
        with pytest.raises(ValueError, match=message):
            load(edited(saved, tmp_path / f"tensors{number}", change_tensors=change))

    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut off or damaged"):
        load(saved)
    tensors = load_file(tmp_path / "same" / "model.safetensors")
    tensors["centers"][0, 0, 0] += 1
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="an interrupted save, or edited by hand"):
        load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(saved)
    torch.save({}, saved / "quantizer.pt")
    with pytest.raises(ValueError, match=r"pickled weights \(quantizer.pt\).*convert once"):
        load(saved)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_an_interrupted_save_leaves_the_old_quantiser(quantizer, golden_values, tmp_path, monkeypatch):
    folder = tmp_path / "quantizer"
    quantizer.save_pretrained(folder)
    other = MultiCodebookQuantizer.from_multi_quantization(reference_state(golden_values["a"]))

    def full_disk(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("spear_hf.mvq.quantizer_files.os.fsync", full_disk)
        for target in (folder, tmp_path / "new"):
            with pytest.raises(OSError, match="no space"):
                other.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["quantizer"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert MultiCodebookQuantizer.from_pretrained(folder).quantizer_id == quantizer.quantizer_id


HUB_ROUND_TRIP = """
import sys
from spear_hf.mvq.quantizer import MultiCodebookQuantizer

quantizer = MultiCodebookQuantizer.from_pretrained(sys.argv[1])
print(quantizer.push_to_hub("tester/quantizer", token="hf_good", private=True))
print(MultiCodebookQuantizer.from_pretrained("tester/quantizer", revision="main").quantizer_id)
"""


def test_round_trip_through_a_hub(quantizer, tmp_path):
    """In a process of its own, as huggingface_hub reads its environment once; the Hub is on the loopback interface."""
    quantizer.save_pretrained(tmp_path / "saved")
    with HubServer(tokens={"hf_good": "tester"}) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        result = subprocess.run(
            [sys.executable, "-c", HUB_ROUND_TRIP, tmp_path / "saved"],
            env=environment | {"HF_TOKEN": "hf_good", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert {"config.json", "model.safetensors"} <= set(hub.repos["tester/quantizer"].files("main"))
    address, identity = result.stdout.split()
    assert "tester/quantizer" in address
    assert identity == quantizer.quantizer_id


def test_foreign_state_dicts_are_accounted_for(golden_values):
    state = reference_state(golden_values["a"])
    load = MultiCodebookQuantizer.from_multi_quantization
    with pytest.raises(ValueError, match=r"unexpected tensors \['more'\]"):
        load(state | {"more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"missing tensors \['logits_scale'\]"):
        load({key: value for key, value in state.items() if key != "logits_scale"})
    with pytest.raises(ValueError, match=r"not the state dict of a multi_quantization\.Quantizer"):
        load({key: value for key, value in state.items() if key != "id_buf"})
    with pytest.raises(ValueError, match="given together"):
        load(state, mean=torch.zeros(16))
    with pytest.raises(ValueError, match="feature_std must be positive"):
        load(state, mean=torch.zeros(16), std=torch.zeros(16))


@pytest.mark.gpu
def test_codes_on_cuda_are_those_on_cpu():
    quantizer = random_quantizer(256, 256, 16)
    frames = random_frames(quantizer, 3000)
    expected = quantizer.encode(frames)
    found = quantizer.to("cuda").encode(frames)
    agreement = (found == expected).float().mean().item()
    print(f"codes equal on CUDA and CPU: {agreement:.4%}")
    assert agreement >= 0.999
    assert found.device.type == "cpu"
    assert torch.equal(quantizer.encode(frames[100:101]), found[100:101])


def compare_with_reference(feature_size, codebook_size, num_codebooks, count):
    package = pytest.importorskip("multi_quantization", reason="multi_quantization is not installed (extra dev)")
    quantizer = random_quantizer(feature_size, codebook_size, num_codebooks)
    reference = package.Quantizer(feature_size, codebook_size, num_codebooks)
    reference.load_state_dict(quantizer.state_dict() | {"id_buf": reference.id_buf})
    frames = random_frames(quantizer, count)
    quantizer.encode(frames[:1])
    started = time.perf_counter()
    with torch.no_grad():
        expected = reference.encode(frames, refine_indexes_iters=5, as_bytes=False)
    theirs = time.perf_counter() - started
    started = time.perf_counter()
    found = quantizer.encode(frames)
    ours = time.perf_counter() - started
    agreement = (found.long() == expected).float().mean().item()
    print(f"multi_quantization {theirs:.2f} s, ours {ours:.3f} s, ratio {theirs / ours:.0f}, equal {agreement:.4%}")
    return theirs / ours, agreement


def test_codes_of_the_reference_package():
    ratio, agreement = compare_with_reference(128, 256, 4, 200)
    assert agreement >= 0.999
    assert ratio > 2


@pytest.mark.slow
def test_codes_of_the_reference_package_at_full_size():
    ratio, agreement = compare_with_reference(1024, 256, 16, 1000)
    assert agreement >= 0.999
    assert ratio >= 30
