# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that know no Hub but that of hub_server.py, as `huggingface_hub` reads its environment once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from .conftest import ROOT
from .hub_server import HubServer


GOOD = "hf_good"  # the token that a server made for a test is told to accept


def environment(hub: HubServer, home: Path, token: str = GOOD) -> dict[str, str]:
    """The variables of this process for another one, with a Hub, a cache, a token and this checkout's package."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "PYTHON")) and "proxy" not in name.lower()
    }
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The host of the dataset viewer, "datasets-server." before the Hub's, must not be looked up in a network.
        "http_proxy": hub.endpoint,
        "no_proxy": "127.0.0.1,localhost",
    }


class Client:
    """A process with a home of its own, that knows no Hub but ours."""

    def __init__(
        self, hub: HubServer, role: str, folder: Path, task: dict, python: str | Path = sys.executable, **env
    ):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("hub_client.py"), role, folder],
            cwd=folder,
            env={**environment(hub, folder / "home"), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("wb"),
        )

    def result(self, name: str = "results") -> dict:
        """The content of NAME.json, once it is there."""
        path = self.folder / f"{name}.json"
        while True:
            ended = self.process.poll() is not None
            if path.is_file():
                return json.loads(path.read_text(encoding="utf-8"))
            assert not ended, f"{path.name} was not written:\n{self.errors()}"
            time.sleep(0.1)

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    def errors(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")
