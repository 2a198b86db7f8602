# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings and fixtures of all tests. Nothing here or in the tests reaches the network."""

import os
import shutil
from pathlib import Path

import pytest


# Before transformers or huggingface_hub are imported: a test that asks the Hub must fail at once, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import torch
from safetensors.torch import load_file, save_file


FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # the tensors are tiny: waiting for a second thread costs more than it brings


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def full_precision_on_gpus(request, monkeypatch):
    """cuDNN computes convolutions of float32 in TF32 unless told otherwise, at errors of 3e-4."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def golden_folder():
    """Checkpoint in the published format, with activations of the published code."""
    return FIXTURES / "golden_tiny"


@pytest.fixture(scope="session")
def golden(golden_folder):
    """Waveforms, features and activations per utterance, computed alone by the published code."""
    return load_file(golden_folder / "activations.safetensors")


@pytest.fixture(scope="session")
def golden_ds2_folder(tmp_path_factory, golden_folder):
    """The checkpoint with `output_downsampling_factor` 2: the same weights and one more."""
    folder = tmp_path_factory.mktemp("golden_ds2")
    difference = load_file(FIXTURES / "golden_tiny_ds2" / "difference.safetensors")
    weights = load_file(golden_folder / "model.safetensors")
    weights |= {name: value for name, value in difference.items() if name.startswith("model.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(FIXTURES / "golden_tiny_ds2" / "config.json", folder / "config.json")
    return folder


@pytest.fixture(scope="session")
def golden_ds2(golden):
    """As `golden`, for `golden_ds2_folder`."""
    return golden | load_file(FIXTURES / "golden_tiny_ds2" / "difference.safetensors")
