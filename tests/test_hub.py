# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Publishing and loading with the real `huggingface_hub` client, against a Hub on the loopback interface."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2CTCTokenizer
from typer.testing import CliRunner

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForCTC, SpearModel, SpearProcessor
from spear_hf.cli import app
from spear_hf.hub import publish
from spear_hf.hub_staging import AUTO_CLASSES, CODE_FILES, MODEL_CLASSES

from .hub_server import HubServer


GOOD, WRONG = "hf_good", "hf_wrong"
ENCODER, CTC, WITH_CODE = "tester/encoder", "tester/ctc", "tester/with-code"
HEADS = [name for name in MODEL_CLASSES if name != "AutoModel"]


@pytest.fixture(scope="module")
def hub():
    with HubServer(tokens={GOOD: "tester"}) as server:
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory, golden_folder):
    """Three models: `first`, in the published format, `second`, other weights of it, and `ctc`, with all it needs."""
    second, ctc = tmp_path_factory.mktemp("second"), tmp_path_factory.mktemp("ctc")
    torch.manual_seed(1)
    model = SpearModel.from_pretrained(golden_folder)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(0.9)
    model.save_pretrained(second)
    vocabulary = second.parent / "vocabulary.json"
    vocabulary.write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None)
    SpearForCTC.from_pretrained(golden_folder, vocab_size=5).save_pretrained(ctc)
    SpearProcessor(SpearFeatureExtractor(), tokenizer).save_pretrained(ctc)
    card = (
        "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [spear]\n---\n# CTC\n\n![loss](plots/loss.svg)\n"
    )
    (ctc / "README.md").write_text(card, encoding="utf-8")
    (ctc / "plots").mkdir()
    (ctc / "plots" / "loss.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    (ctc / "training_args.bin").write_bytes(b"left by Trainer")
    return {"first": golden_folder, "second": second, "ctc": ctc}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, golden):
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    waveform = golden["0.waveform"]
    features = SpearFeatureExtractor()(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
    save_file({"waveform": waveform, "input_features": features}, path)
    return path


class Client:
    """A process with a home of its own, that knows no Hub but ours."""

    def __init__(
        self, hub: HubServer, role: str, folder: Path, task: dict, python: str | Path = sys.executable, **env
    ):
        self.role, self.folder = role, folder
        folder.mkdir(exist_ok=True)
        (folder / "task.json").write_text(json.dumps({"threads": torch.get_num_threads(), **task}), encoding="utf-8")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "PYTHON")) and "proxy" not in name.lower()
        }
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": GOOD,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("hub_client.py"), role, folder],
            cwd=folder,
            env={**inherited, **settings, **env},
            stdin=subprocess.DEVNULL,
            stdout=(folder / f"{role}.out").open("wb"),
            stderr=(folder / f"{role}.err").open("wb"),
        )

    def result(self, name: str | None = None) -> dict:
        """What was written as NAME.json, by default the result of the role, once it is there."""
        path = self.folder / f"{name or self.role}.json"
        for _ in range(2000):
            ended = self.process.poll() is not None
            if path.is_file():
                return json.loads(path.read_text(encoding="utf-8"))
            if ended:
                break
            time.sleep(0.1)
        raise AssertionError(f"{path.name} was not written:\n{self.errors()}")

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{self.role}.safetensors")

    def errors(self) -> str:
        return (self.folder / f"{self.role}.err").read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def publisher(hub, folders, tmp_path_factory):
    """The process that publishes everything; its exit codes, by the name of the call."""
    first, second, ctc = (str(folders[name]) for name in ("first", "second", "ctc"))
    hub.drop("tester/dropped", "upload", after=1, times=6)  # the client gives up after five further tries
    hub.drop("tester/cut", "commit")
    calls = {
        "first": [first, ENCODER],
        "second": [second, ENCODER, "--message", "Other weights"],
        "branch": [first, ENCODER, "--revision", "dev"],
        "ctc": [ctc, CTC, "--with-code", "--private"],
        "with code": [first, WITH_CODE, "--with-code"],
        "wrong token": [first, "tester/wrong-token", "--token", WRONG],
        "not ours": [first, "someone/else"],
        "dry run": [first, "tester/dry-run", "--dry-run"],
        "public": [first, ENCODER, "--private"],
        "cut": [first, "tester/cut"],
        "cut again": [first, "tester/cut"],
        "without token": [first, "tester/without-token"],
    }
    task = {"calls": calls, "dropped": [first, "tester/dropped", GOOD]}
    client = Client(hub, "publish", tmp_path_factory.mktemp("publisher"), task)
    yield client
    if client.process.poll() is None:
        client.process.kill()
    client.process.wait()


@pytest.fixture(scope="module")
def codes(publisher):
    return publisher.result()


@pytest.fixture(scope="module")
def reader(hub, codes, inputs, tmp_path_factory):
    """The process that loads with the package installed, and its task for another one."""
    shas = [commit.sha for commit in hub.repos[ENCODER].history()]
    revisions = [[None, "newest"], [shas[1], "older"], ["dev", "branch"], [None, "again"]]
    task = {"inputs": str(inputs), "encoder": ENCODER, "ctc": CTC, "revisions": revisions, "wrong_token": WRONG}
    hub.drop(ENCODER, "download")
    client = Client(hub, "load", tmp_path_factory.mktemp("reader"), task)
    client.result()
    client.process.wait()
    return client


def expected(folders, inputs, name: str) -> dict[str, torch.Tensor]:
    features = load_file(inputs)["input_features"]
    with torch.no_grad():
        states = SpearModel.from_pretrained(folders[name])(features).last_hidden_state
        return {"features": features, "hidden_states": states}


def test_exit_codes(codes, publisher):
    good = ("first", "second", "branch", "ctc", "with code", "dry run", "cut again")
    assert codes == {name: 0 if name in good else 1 for name in codes}
    assert len(codes) == 12
    errors = publisher.errors()
    assert "Traceback" not in errors
    for message in (
        "error: The Hub does not accept the token",
        "error: The token may not write to someone/else",
        f"error: {ENCODER} exists and is public",
        "error: The Hub needs a token to publish",
        "error: Not published: Server disconnected",
    ):
        assert message in errors, errors


def test_what_was_published(hub, codes):
    assert hub.repos.keys() >= {ENCODER, CTC, WITH_CODE}
    assert not hub.repos.keys() & {"tester/wrong-token", "tester/dry-run", "tester/without-token", "someone/else"}
    encoder = [".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert hub.repos[ENCODER].files() == encoder
    assert hub.repos[WITH_CODE].files() == sorted([*encoder, *CODE_FILES])
    more = ["plots/loss.svg", "processor_config.json", "tokenizer_config.json", "vocab.json"]
    assert set(hub.repos[CTC].files()) == {*encoder, *CODE_FILES, *more}
    assert hub.repos[CTC].private
    assert not hub.repos[ENCODER].private


def test_every_publication_is_one_commit(hub, codes):
    titles = [commit.title for commit in hub.repos[ENCODER].history()]
    assert len(titles) == 3
    assert titles[0] == "Other weights"
    assert re.fullmatch(r"Upload model with spear_hf [\d.]+", titles[1])
    assert len(hub.repos[ENCODER].history("dev")) == 4  # made from main
    assert len(hub.repos[CTC].history()) == 2


def test_large_files_go_in_parts_and_only_once(hub, codes):
    oid = hub.repos[ENCODER].history()[1].files["model.safetensors"].sha256
    parts = hub.requests("PUT", f"{oid}.*repo={ENCODER}&")
    assert len(parts) == 3
    assert not hub.requests("PUT", f"{oid}.*repo={WITH_CODE}&")  # the storage had it
    # The commit that was cut off had sent it before, so the second attempt did not.
    assert not hub.requests("PUT", f"{oid}.*repo=tester/cut&")
    assert len(hub.repos["tester/cut"].history()) == 2


def test_loading_newest_older_and_branch(reader, folders, inputs):
    tensors = reader.tensors()
    first, second = (expected(folders, inputs, name) for name in ("first", "second"))
    assert torch.equal(tensors["newest"], second["hidden_states"])
    assert torch.equal(tensors["again"], second["hidden_states"])
    assert torch.equal(tensors["older"], first["hidden_states"])
    assert torch.equal(tensors["branch"], first["hidden_states"])
    assert not torch.equal(first["hidden_states"], second["hidden_states"])
    assert torch.equal(tensors["features"], first["features"])
    assert reader.result()["processor"] == "spear_hf.processing_spear"


def test_nothing_is_downloaded_twice(hub, reader):
    contents = [request for request in hub.requests("GET", "/resolve/|signature=") if request.status == 200]
    assert max(Counter(request.path for request in contents).values()) == 1
    # The download that was cut off went on where it had stopped.
    resumed = [request for request in hub.requests("GET", f"repo={ENCODER}&") if request.status == 206]
    assert len(resumed) == 1
    oids = {re.match("/([0-9a-f]{64})", request.path)[1] for request in hub.requests("GET", f"repo={ENCODER}&")}
    assert oids == {commit.files["model.safetensors"].sha256 for commit in hub.repos[ENCODER].history()[:2]}


def test_a_wrong_token_does_not_load(reader):
    assert "401" in reader.result()["wrong_token"]


def test_offline_after_loading(hub, reader, tmp_path):
    task = json.loads((reader.folder / "task.json").read_text(encoding="utf-8"))
    del task["wrong_token"]
    before = len(hub.log)
    home = str(reader.folder / "home")
    client = Client(hub, "offline", tmp_path, task, HF_HUB_OFFLINE="1", HF_HOME=home)
    client.result()
    assert client.process.wait() == 0
    uploads = {"PUT", "POST"}  # of the publication that is still being tried
    assert not [
        request for request in hub.log[before:] if request.method not in uploads and "dropped" not in request.path
    ]
    tensors = reader.tensors()
    for name, value in client.tensors().items():
        assert torch.equal(value, tensors[name]), name


def test_where_the_package_is_not_installed(hub, codes, folders, inputs, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    # A plain line adds a folder, and leaves alone the .pth files in it: that of the editable install, too.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    task = {"ctc": CTC, "with_code": WITH_CODE, "inputs": str(inputs), "heads": HEADS}
    client = Client(hub, "without_package", tmp_path / "client", task, python=scripts / "python")
    result, tensors = client.result(), None
    assert client.process.wait() == 0
    tensors = client.tensors()
    with torch.no_grad():
        features = load_file(inputs)["input_features"]
        logits = SpearForCTC.from_pretrained(folders["ctc"])(features).logits
        states = SpearModel.from_pretrained(folders["ctc"])(features).last_hidden_state
    assert torch.equal(tensors["features"], features)
    assert torch.equal(tensors["processed"], features)
    assert torch.equal(tensors["hidden_states"], states)
    assert torch.equal(tensors["logits"], logits)
    assert torch.equal(tensors["saved_logits"], logits)
    assert set(result["saved"]) >= set(CODE_FILES)
    assert result["heads"] == {name: MODEL_CLASSES[name].__name__ for name in HEADS}
    assert (result["config"], result["no_processor"]) == ("SpearConfig", "SpearFeatureExtractor")
    assert result["labels"] == [3, 4, 2, 4]
    assert result["text"] == SpearProcessor.from_pretrained(folders["ctc"]).batch_decode(logits.argmax(-1))[0]
    assert result["card"] == [1, 46, 32]


def test_an_upload_that_is_cut_off(hub, publisher):
    """Last, as the client gives up only after half a minute."""
    result = publisher.result("dropped")
    assert publisher.process.wait() == 0
    assert "Error while uploading 'model.safetensors'" in result["error"]
    assert "Run the same command again" in result["error"]
    assert result["files"] == [".gitattributes"]
    repo = hub.repos["tester/dropped"]
    assert result["commit"] == repo.branches["main"]
    assert len(repo.history()) == 2
    assert repo.files() == hub.repos[ENCODER].files()
