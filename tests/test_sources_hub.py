# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf tokenize` on datasets of the Hub by name, streamed by the real clients from the Hub of hub_server.py."""

import io
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
import soundfile

from spear_hf.mvq.store import TokenStore

from .hub_process import GOOD, Client, environment
from .hub_server import HubServer
from .tokenize_processes import write_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five files of noise, as a folder, as parquet with the files' bytes, and as a tar file."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    (folder / "tar").mkdir()
    contents = {}
    with tarfile.open(folder / "tar" / "part-0.tar", "w") as tar:
        for number in range(5):
            path = folder / "audio" / f"noise{number}.flac"
            soundfile.write(path, 0.1 * rng.standard_normal(8000 + 900 * number), 16000)
            contents[path.name] = path.read_bytes()
            member = tarfile.TarInfo(path.name)
            member.size = len(contents[path.name])
            tar.addfile(member, io.BytesIO(contents[path.name]))
    audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"id": list(contents), "audio": [{"bytes": data, "path": name} for name, data in contents.items()]}
    features = datasets.Features({"id": datasets.Value("string"), "audio": audio})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "rows")
    return folder


@pytest.fixture(scope="module")
def hub(corpus, tmp_path_factory):
    with HubServer(tokens={GOOD: "tester"}) as server:
        task = {
            "datasets": [[str(corpus / "rows"), "tester/rows", "default", False]],
            "folders": [[str(corpus / "tar"), "tester/tar", "dataset"]],
        }
        Client(server, "stock", tmp_path_factory.mktemp("stock"), task).result()
        yield server


def tokenize(hub, tokenizer, data, output, *more):
    command = [sys.executable, "-m", "spear_hf.cli", "tokenize", "--tokenizer", tokenizer, "--data", data]
    return subprocess.run(
        [str(word) for word in (*command, "--output", output, "--device", "cpu", *more)],
        env=environment(hub, output.parent / "home"),
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_hub_datasets_give_the_tokens_of_the_files(hub, corpus, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    local = tokenize(hub, tokenizer, corpus / "audio", tmp_path / "local")
    assert local.returncode == 0, local.stderr
    expected = TokenStore.open(tmp_path / "local")
    for name, options in (("rows", []), ("tar", ["--id-column", "__key__"])):
        done = tokenize(hub, tokenizer, f"tester/{name}", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        store = TokenStore.open(tmp_path / name)
        assert len(store) == 5
        for id in expected:
            place = id if name == "rows" else id.removesuffix(".flac")
            assert np.array_equal(store[place], expected[id])
    unknown = tokenize(hub, tokenizer, "tester/nothing", tmp_path / "nothing")
    assert unknown.returncode == 1
    assert "tester/nothing cannot be opened as a dataset of the Hub" in unknown.stderr
    assert "Traceback" not in unknown.stderr
