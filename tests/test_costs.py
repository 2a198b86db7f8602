# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What it costs to import the package, and to load a model.

Memory of a load is counted in two parts. Anonymous pages are what the process must have. Pages of the checkpoint's
file are mapped rather than copied, and the kernel can take them back at any time: weights that stay in the file's
dtype are these pages, and those that are cast have them beside the cast copies until the load ends.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from spear_hf import SpearConfig, SpearForCTC
from spear_hf.conversion.convert import convert


_CODE = """
import gc, json, re, sys, threading, time
from pathlib import Path
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoProcessor
earlier, start = set(sys.modules), time.process_time()
import spear_hf
costs = {"seconds": time.process_time() - start}
costs["modules"] = sorted({name.split(".")[0] for name in set(sys.modules) - earlier})

def resident():
    status = Path("/proc/self/status").read_text()
    return {key: int(re.findall(key + r":\\s+(\\d+) kB", status)[0]) * 1024 for key in ("RssAnon", "VmRSS", "VmHWM")}

def load(folder, dtype):
    held, most, stop = resident(), 0, threading.Event()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten

    def watch():
        nonlocal most
        while not stop.wait(0.001):
            most = max(most, resident()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    sum(float(parameter.sum()) for parameter in model.parameters())  # not only mapped: read
    stop.set()
    watcher.join()
    after = resident()
    return {
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "anonymous": max(most, after["RssAnon"]) - held["RssAnon"],
        "all": after["VmHWM"] - held["VmRSS"],
    }

load(sys.argv[1], None)  # what the first call imports is no weight
costs["loads"] = []
for folder, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    costs["loads"].append(load(folder, dtype))
    gc.collect()
print(json.dumps(costs))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of resident memory is Linux's")


def costs_of(golden_folder: Path, *loads: tuple[Path, str]) -> dict:
    """Of importing the package in a new process, and of these loads, one after the other."""
    arguments = [str(argument) for load in loads for argument in load]
    command = [sys.executable, "-c", _CODE, str(golden_folder), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def write_checkpoints(config: SpearConfig, folder: Path) -> list[tuple[Path, str]]:
    """What `AutoModel` loads, and to which dtype: ours, of a head, in shards, published, and in bfloat16."""
    model = SpearForCTC(config)
    model.save_pretrained(folder / "head")
    model.spear.save_pretrained(folder / "ours")
    model.spear.save_pretrained(folder / "shards", max_shard_size=f"{config.hidden_size // 16}MB")
    convert(folder / "ours", folder / "published", to="published", report=lambda line: None)
    model.spear.bfloat16().save_pretrained(folder / "half")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    loads = [(folder / name, "float32") for name in ("ours", "published", "head", "shards")]
    return [*loads, (folder / "half", "bfloat16"), (folder / "published", "bfloat16"), (folder / "half", "float32")]


def check_loads(checkpoints: list[tuple[Path, str]], costs: dict, least: float) -> None:
    for (folder, dtype), load in zip(checkpoints, costs["loads"], strict=True):
        assert load["dtypes"] == [f"torch.{dtype}"]
        assert load["weights"] > least
        assert load["anonymous"] <= 1.2 * load["weights"], folder
        if (folder.name == "half") == (dtype == "bfloat16"):  # nothing is cast: the file's pages are the weights
            assert load["anonymous"] <= 0.2 * load["weights"], folder
            assert load["all"] <= 1.2 * load["weights"], folder


@linux
def test_import_and_loading(tmp_path, golden_folder):
    config = SpearConfig(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers_per_stack=[1, 1],
        downsampling_factors=[1, 2],
        conv_kernel_sizes=[31, 31],
    )
    checkpoints = write_checkpoints(config, tmp_path)
    costs = costs_of(golden_folder, *checkpoints)
    assert costs["seconds"] < 0.3
    heavy = {"datasets", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "soundfile", "torchaudio", "typer"}
    assert not heavy & set(costs["modules"])
    check_loads(checkpoints, costs, 100e6)


@linux
@pytest.mark.slow
def test_loading_xlarge(tmp_path, golden_folder):
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # 11 GB, which pytest would keep
        checkpoints = write_checkpoints(SpearConfig.xlarge(), Path(folder))
        check_loads(checkpoints, costs_of(golden_folder, *checkpoints), 1.1e9)
