# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Quantisers of the package multi_quantization: the same tensors, the same codes, or a refusal."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from spear_hf.conversion.errors import ConversionError
from spear_hf.conversion.quantizer import convert_quantizer
from spear_hf.mvq.quantizer import MultiCodebookQuantizer

from .conftest import FIXTURES


GOLDEN = FIXTURES / "golden_mvq" / "mvq.safetensors"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(line):
    pass


@pytest.fixture
def quantizers():
    tensors = load_file(GOLDEN)
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        for name in "ab"
    }


def state_dict(quantizer):
    return {key.removeprefix("sd."): value for key, value in quantizer.items() if key.startswith("sd.")}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_quantizers_keep_tensors_and_codes(name, suffix, quantizers, tmp_path):
    golden = quantizers[name]
    path = tmp_path / f"q{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state_dict(golden), path)
    lines = []
    folder = convert_quantizer(
        path, tmp_path / "out", teacher="o/n", teacher_layer=3, frame_rate=50.0, report=lines.append
    )
    assert any("5 of 5 tensors bit-equal" in line for line in lines)
    assert any("multi_quantization after 5 passes" in line for line in lines)
    quantizer = MultiCodebookQuantizer.from_pretrained(folder)
    assert (quantizer.config.teacher, quantizer.config.teacher_layer, quantizer.config.frame_rate) == ("o/n", 3, 50.0)
    assert quantizer.config.provenance["multi_quantization_id"] == bytes(golden["sd.id_buf"].tolist()).decode()
    assert torch.equal(quantizer.encode(golden["x"]).long(), golden["idx5"])
    torch.testing.assert_close(quantizer.decode(golden["idx5"]), golden["dec"])
    with pytest.raises(ConversionError, match="--force"):
        convert_quantizer(path, folder, report=quiet)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_quantizers_with_statistics(suffix, quantizers, tmp_path):
    golden = quantizers["a"]
    mean, std = torch.linspace(-3, 3, 16), torch.linspace(0.5, 2, 16)
    path = tmp_path / f"q{suffix}"
    if suffix == ".pt":
        torch.save({"quantizer": state_dict(golden), "mean": mean, "std": std}, path)
    else:
        save_file({f"quantizer.{k}": v for k, v in state_dict(golden).items()} | {"mean": mean, "std": std}, path)
    quantizer = MultiCodebookQuantizer.from_pretrained(convert_quantizer(path, tmp_path / "out", report=quiet))
    assert quantizer.config.normalize
    assert torch.equal(quantizer.feature_mean, mean)
    codes = quantizer.encode(golden["x"] * std + mean).long()
    assert (codes == golden["idx5"]).float().mean() > 0.99


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("centers"), "missing centers"),
        (lambda d: d.update(bias=torch.ones(2)), "unknown bias"),
        (lambda d: d.update(centers=d["centers"].double()), "centers is torch.float64"),
        (lambda d: d.update({"to_logits.bias": torch.ones(3)}), r"to_logits.bias .*\(3,\)"),
        (lambda d: d.update(quantizer=dict(d)), "beside `quantizer`"),
        (lambda d: d["centers"].fill_(torch.nan), "not finite"),
    ],
)
def test_quantizers_that_are_not_understood(change, match, quantizers, tmp_path):
    tensors = state_dict(quantizers["a"])
    change(tensors)
    torch.save(tensors, tmp_path / "q.pt")
    with pytest.raises(ConversionError, match=match):
        convert_quantizer(tmp_path / "q.pt", tmp_path / "out", report=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["q.pt"]


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save(_Malicious(tmp_path / "ran"), tmp_path / "q.pt")
    with pytest.raises(ConversionError, match=r"mkdir.*can run any code"):
        convert_quantizer(tmp_path / "q.pt", tmp_path / "out", report=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["q.pt"]
