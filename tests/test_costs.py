# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What it costs to import the package, and to load a model."""

import json
import subprocess
import sys

import pytest

from spear_hf import SpearConfig, SpearModel


_CODE = """
import json, re, sys, time
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoProcessor
earlier, start = set(sys.modules), time.process_time()
import spear_hf
seconds = time.process_time() - start
modules = sorted({name.split(".")[0] for name in set(sys.modules) - earlier})

def megabytes(key):
    return int(re.findall(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[0]) / 1024

AutoModel.from_pretrained(sys.argv[1])  # what the first call imports is no weight
held = megabytes("VmRSS")
model = AutoModel.from_pretrained(sys.argv[2])
sum(float(parameter.sum()) for parameter in model.parameters())  # not only mapped: read
print(json.dumps({"seconds": seconds, "modules": modules, "grown": megabytes("VmHWM") - held}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of resident memory is Linux's")
def test_import_and_loading(tmp_path, golden_folder):
    config = SpearConfig(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers_per_stack=[1, 1],
        downsampling_factors=[1, 2],
        conv_kernel_sizes=[31, 31],
    )
    model = SpearModel(config)
    model.save_pretrained(tmp_path)
    megabytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    command = [sys.executable, "-c", _CODE, str(golden_folder), str(tmp_path)]
    costs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert costs["seconds"] < 0.3
    heavy = {"datasets", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "soundfile", "torchaudio", "typer"}
    assert not heavy & set(costs["modules"])
    assert megabytes > 200
    assert costs["grown"] <= 1.2 * megabytes
