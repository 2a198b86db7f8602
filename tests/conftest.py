# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings and fixtures of all tests. Nothing here or in the tests reaches the network."""

import json
import os
import shutil
from pathlib import Path

import pytest


# Before transformers or huggingface_hub are imported: a test that asks the Hub must fail at once, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"  # whatever is set where they run
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import torch
from safetensors.torch import load_file, save_file


FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # the tensors are tiny: waiting for a second thread costs more than it brings


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="file that gets a line of JSON when a test begins, and when it ends")


def pytest_configure(config):
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):  # the process that hears of all tests
        config.pluginmanager.register(Outcomes(Path(path)))


class Outcomes:
    """What is known of every test, on the disk at once: for machines that are taken back in the middle."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def write(self, **row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid):
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.write(**row, output=report.capstdout, why=report.longreprtext)

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(test=report.nodeid, outcome="not collected", why=report.longreprtext)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        # What may take minutes comes last.
        items.sort(key=lambda item: all(item.get_closest_marker(name) for name in ("gpu", "timeout")))
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def full_precision_on_gpus(request):
    """cuDNN computes convolutions of float32 in TF32 unless told otherwise, at errors of 3e-4, and where a container's
    environment says so (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) matrix products are as coarse."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


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
