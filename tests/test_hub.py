# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Publishing and loading with the real `huggingface_hub` client, against a Hub on the loopback interface."""

import json
import os
import re
import shutil
import sysconfig
import venv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2CTCTokenizer

from spear_hf import (
    SpearConfig,
    SpearFeatureExtractor,
    SpearForCTC,
    SpearModel,
    SpearProcessor,
    quantize_linear_layers,
)
from spear_hf.hub import publish
from spear_hf.hub_card import write_card, write_run_card
from spear_hf.hub_checks import check_card
from spear_hf.hub_staging import AUTO_CLASSES, CODE_FILES, MODEL_CLASSES, stage
from spear_hf.mvq import MultiCodebookQuantizer

from .hub_process import GOOD, Client
from .hub_server import HubServer


WRONG = "hf_wrong"
ENCODER, CTC, WITH_CODE = "tester/encoder", "tester/ctc", "tester/with-code"
HEADS = [name for name in MODEL_CLASSES if name != "AutoModel"]


@pytest.fixture(scope="module")
def hub():
    with HubServer(tokens={GOOD: "tester"}) as server:
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory, golden_folder):
    """Models: `first` and `other`, in the published format, `second`, more weights of it, also in `shards`, and `ctc`.

    What is the same in two of them the storage takes once, so the upload that is to be cut off is of weights alone.
    """
    second, ctc, other = (tmp_path_factory.mktemp(name) for name in ("second", "ctc", "other"))
    shutil.copytree(golden_folder, other, dirs_exist_ok=True)
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in weights.items()}, other / "model.safetensors")
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
    shards = tmp_path_factory.mktemp("shards")
    model.save_pretrained(shards, max_shard_size="1MB")
    return {"first": golden_folder, "other": other, "second": second, "ctc": ctc, "shards": shards}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, golden):
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    waveform = golden["0.waveform"]
    features = SpearFeatureExtractor()(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
    save_file({"waveform": waveform, "input_features": features}, path)
    return path


@pytest.fixture(scope="module")
def publisher(hub, folders, tmp_path_factory):
    """The process that publishes everything; its exit codes, by the name of the call."""
    first, other, second, ctc, shards = map(str, folders.values())

    hub.drop("tester/dropped", "upload", after=1, times=6)  # the client gives up after five further tries
    hub.drop("tester/cut", "commit")
    calls = {
        "first": [first, ENCODER],
        "second": [second, ENCODER, "--message", "Other weights"],
        "branch": [first, ENCODER, "--revision", "dev"],
        "ctc": [ctc, CTC, "--with-code", "--private"],
        "with code": [first, WITH_CODE, "--with-code"],
        "shards": [shards, WITH_CODE, "--revision", "shards"],
        "wrong token": [first, "tester/wrong-token", "--token", WRONG],
        "not ours": [first, "someone/else"],
        "dry run": [first, "tester/dry-run", "--dry-run"],
        "public": [first, ENCODER, "--private"],
        "cut": [first, "tester/cut"],
        "cut again": [first, "tester/cut"],
        "without token": [first, "tester/without-token"],
    }
    task = {"calls": calls, "dropped": [other, "tester/dropped", GOOD]}
    client = Client(hub, "publish", tmp_path_factory.mktemp("publisher"), task)
    yield client
    if client.process.poll() is None:
        client.process.kill()
    client.process.wait()


@pytest.fixture(scope="module")
def codes(publisher):
    return publisher.result("publish")


@pytest.fixture(scope="module")
def reader(hub, codes, inputs, tmp_path_factory):
    """The process that loads with the package installed, and its task for another one."""
    shas = [commit.sha for commit in hub.repos[ENCODER].history()]
    revisions = [[None, "newest"], [shas[1], "older"], ["dev", "branch"], [None, "again"]]
    task = {"inputs": str(inputs), "encoder": ENCODER, "ctc": CTC, "revisions": revisions, "wrong_token": WRONG}
    hub.drop(ENCODER, "download")
    client = Client(hub, "load", tmp_path_factory.mktemp("reader"), task)
    client.result()
    return client


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def card(folder: Path, metadata: str, body: str = "") -> None:
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n{body}", encoding="utf-8")


def edit_weights(folder: Path, change: Callable) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "stem.conv1.weight"
DAMAGES = {
    "holds pickles.*: pytorch_model.bin": lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
    "has both model.safetensors and .*index": lambda folder: (folder / "model.safetensors.index.json").write_text(
        "{}", encoding="utf-8"
    ),
    "has no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "has no config.json; did you mean .*/encoder": lambda folder: (
        (folder / "encoder").mkdir() or (folder / "config.json").rename(folder / "encoder" / "config.json")
    ),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
    "model_type 'wav2vec2'": lambda folder: edit(folder / "config.json", model_type="wav2vec2"),
    "architectures .*'SpearForever'": lambda folder: edit(folder / "config.json", architectures=["SpearForever"]),
    "missing keys in the weights": lambda folder: edit_weights(folder, lambda weights: weights.pop(NAME)),
    "unexpected keys in the weights": lambda folder: edit_weights(
        folder, lambda weights: weights.update(more=torch.ones(1))
    ),
    "1 weights are not finite": lambda folder: edit_weights(folder, lambda weights: weights[NAME].mul_(torch.nan)),
    "is cut off or damaged": lambda folder: os.truncate(folder / "model.safetensors", 100_000),
    "mismatched keys in the weights": lambda folder: edit(folder / "config.json", num_attention_heads=2),
    r"does not load[\s\S]*positive multiple of 4": lambda folder: edit(folder / "config.json", intermediate_size=65),
    "does not load.*preprocessor_config.json": lambda folder: (folder / "preprocessor_config.json").write_text("{"),
    "80 mel bins": lambda folder: SpearFeatureExtractor(feature_size=80).save_pretrained(folder),
    r"config.json line \d+ names a path of this machine, '/home/me/corpus'": lambda folder: edit(
        folder / "config.json", corpus="/home/me/corpus"
    ),
    "README.md has no metadata": lambda folder: (folder / "README.md").write_text("# Model", encoding="utf-8"),
    "metadata at its top is not valid": lambda folder: card(folder, "tags: [a"),
    "`language` 'English'": lambda folder: card(folder, "language: English"),
    "`pipeline_tag` 'asr'": lambda folder: card(folder, "pipeline_tag: asr"),
    "links to loss.png": lambda folder: card(folder, "tags: [spear]", "![loss](loss.png)"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_is_refused(message, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["second"], folder)
    DAMAGES[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publish(folder, ENCODER, dry_run=True)


def test_code_on_the_hub_does_not_read_int8(folders, tmp_path):
    """Where this package is not installed its linear layers would be random, with a warning at most."""
    quantize_linear_layers(SpearModel.from_pretrained(folders["second"])).save_pretrained(tmp_path)
    assert "blockwise_spear.py" not in publish(tmp_path, ENCODER, dry_run=True).files
    with pytest.raises(ValueError, match="is in int8, which the code on the Hub cannot read"):
        publish(tmp_path, ENCODER, with_code=True, dry_run=True)


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "owner/na me"])
def test_ids_that_are_none(repo_id, folders):
    with pytest.raises(ValueError, match="OWNER/"):
        publish(folders["second"], repo_id, dry_run=True)


def test_paths_of_this_machine_in_a_card(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["second"], folder)
    card(folder, "license: mit", "Trained on /home/me/corpus.")
    with pytest.raises(ValueError, match=r"README.md line 4 names a path of this machine"):
        publish(folder, ENCODER, dry_run=True)
    card(folder, "license: mit", "Begins with #!/usr/bin/env python; see https://example.org/home/me and ~/tmp/x.")
    assert publish(folder, ENCODER, dry_run=True).notes == ()


def test_staging_with_and_without_code(folders, tmp_path):
    before = {path: path.read_bytes() for path in folders["ctc"].rglob("*") if path.is_file()}
    (tmp_path / "code").mkdir()
    left_out = stage(folders["ctc"], tmp_path / "code", with_code=True)
    assert left_out == ["training_args.bin"]
    assert {path: path.read_bytes() for path in folders["ctc"].rglob("*") if path.is_file()} == before
    auto_map = json.loads((tmp_path / "code" / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert auto_map.keys() == AUTO_CLASSES.keys()
    for name, cls in AUTO_CLASSES.items():
        module, class_name = auto_map[name].split(".")
        assert f"class {class_name}(" in (tmp_path / "code" / f"{module}.py").read_text(encoding="utf-8")
        assert cls._auto_class is None  # or every later save_pretrained would add code
    for name in CODE_FILES:
        text = (tmp_path / "code" / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) spear_hf|^\s*from \. import|^\s*from \.\.", text, re.MULTILINE)
    # A folder that came from the Hub with code is published without it: no trace is left.
    (tmp_path / "plain").mkdir()
    stage(tmp_path / "code", tmp_path / "plain", with_code=False)
    assert not list((tmp_path / "plain").glob("*.py"))
    for path in (tmp_path / "plain").glob("*.json"):
        assert "auto_map" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
@pytest.mark.parametrize("with_code", [False, True])
def test_cards_of_folders_without_one(auto_class, with_code, golden_folder, tmp_path):
    with torch.device("meta"):
        model = MODEL_CLASSES[auto_class](SpearConfig.from_pretrained(golden_folder))
    write_card(tmp_path, golden_folder, model, ENCODER, with_code)
    assert check_card(tmp_path / "README.md") == ["README.md names no licence: add `license:` to its metadata."]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")
    assert ("import spear_hf" in text) is not with_code
    assert "## Measured" not in text


def test_the_card_of_a_run_states_what_it_recorded(folders, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folders["second"], run / "final")
    shutil.copytree(folders["second"], run / "final" / "encoder")
    settings = {"seed": 7, "targets": {"speech": {}}, "optimizer": {"name": "adamw", "learning_rate": 0.002}}
    (run / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    losses = {"speech_masked_loss": 4.0, "speech_unmasked_loss": 3.0}
    steps = [{"step": step, "hours": step / 8, **losses} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    text = card_of(run / "final", tmp_path / "unvalidated")
    assert "| Audio heard, repetitions included | 0.25 hours |" in text
    assert "## Measured" not in text

    held_out = {"step": 2, "speech_masked_accuracy": 0.1234, "speech_unmasked_accuracy": 0.2}
    held_out |= {"speech_unigram_accuracy": 0.05, "speech_unigram_loss": 4.5, **losses}
    (run / "evaluation.jsonl").write_text(json.dumps(held_out) + "\n", encoding="utf-8")
    for name in ("final", "final/encoder"):
        staged = tmp_path / name.replace("/", "-")
        assert "| speech | 12.3 % | 5.0 % |" in card_of(run / name, staged)
        assert check_card(staged / "README.md")
        assert sorted(path.name for path in (staged / "plots").iterdir()) == ["speech_accuracy.png", "speech_loss.png"]

    # A number that the run has not recorded is not stated, and not invented.
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot state it"):
        card_of(run / "final", tmp_path / "empty")


def test_a_card_that_a_run_wrote_is_written_anew_and_an_edited_one_is_kept(folders, tmp_path):
    folder = tmp_path / "run one" / "final"
    shutil.copytree(folders["second"], folder)
    model = SpearModel.from_pretrained(folder)
    write_run_card(folder, folder, model)
    card = folder / "README.md"
    assert 'from_pretrained("OWNER/run-one")' in card.read_text(encoding="utf-8")
    names = ("someone/a", "someone/a-longer-name")

    def sizes() -> list[int]:
        return [publish(folder, name, dry_run=True).files["README.md"] for name in names]

    short, long = sizes()
    assert long - short == 3 * (len(names[1]) - len(names[0]))  # the title and two lines of code
    kept = "\n".join(line for line in card.read_text(encoding="utf-8").splitlines() if "spear-hf publish" not in line)
    card.write_text(kept, encoding="utf-8")
    assert sizes() == [len(kept.encode())] * 2


def test_a_licence_that_is_added_to_the_card_of_a_run_is_published(folders, tmp_path):
    folder = tmp_path / "final"
    shutil.copytree(folders["second"], folder)
    write_run_card(folder, folder, SpearModel.from_pretrained(folder))
    text = (folder / "README.md").read_text(encoding="utf-8")
    note = "README.md names no licence: add `license:` to its metadata."
    assert publish(folder, ENCODER, dry_run=True).notes == (note,)
    (folder / "README.md").write_text(text.replace("tags:", "license: mit\ntags:", 1), encoding="utf-8")
    assert publish(folder, ENCODER, dry_run=True).notes == ()
    (folder / "README.md").write_text(text.replace("tags:", "license: the MIT one\ntags:", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="'the MIT one' is not an identifier"):
        publish(folder, ENCODER, dry_run=True)


def card_of(source: Path, staged: Path) -> str:
    staged.mkdir()
    write_card(staged, source, SpearModel.from_pretrained(source), ENCODER, with_code=False)
    return (staged / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def one_thread():
    """As in the other processes: sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expected(folders, inputs, name: str) -> dict[str, torch.Tensor]:
    features = load_file(inputs)["input_features"]
    with torch.no_grad():
        states = SpearModel.from_pretrained(folders[name])(features).last_hidden_state
        return {"features": features, "hidden_states": states}


def test_exit_codes(codes, publisher):
    good = ("first", "second", "branch", "ctc", "with code", "shards", "dry run", "cut again")
    assert codes == {name: 0 if name in good else 1 for name in codes}
    assert len(codes) == 13
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


def test_a_commit_removes_what_the_new_version_has_not(hub, codes):
    repo = hub.repos[WITH_CODE]
    assert [commit.sha for commit in repo.history("shards")[1:]] == [commit.sha for commit in repo.history()]
    files = repo.files("shards")
    assert "model.safetensors.index.json" in files
    assert "model-00001-of-00003.safetensors" in files
    assert not {"model.safetensors", *CODE_FILES} & set(files)


def test_large_files_go_in_parts_and_only_once(hub, codes):
    oid = hub.repos[ENCODER].history()[1].files["model.safetensors"].sha256
    parts = hub.requests("PUT", f"{oid}.*repo={ENCODER}&")
    assert len(parts) == 3
    assert not hub.requests("PUT", f"{oid}.*repo={WITH_CODE}&")  # the storage had it
    # The commit that was cut off had sent it before, so the second attempt did not.
    assert not hub.requests("PUT", f"{oid}.*repo=tester/cut&")
    assert len(hub.repos["tester/cut"].history()) == 2


def test_loading_newest_older_and_branch(reader, folders, inputs, one_thread):
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
    weights = [commit.files["model.safetensors"].sha256 for commit in hub.repos[ENCODER].history()[:2]]
    downloads = [(request.path[1:65], request.status) for request in hub.requests("GET", f"repo={ENCODER}&")]
    # The first was cut off (status 0) and tried again. The branch has the weights of the older commit.
    assert downloads == [(weights[0], 0), (weights[0], 200), (weights[1], 200)]


def test_a_wrong_token_does_not_load(reader):
    assert "401" in reader.result()["wrong_token"]


def test_offline_after_loading(hub, reader, tmp_path):
    task = json.loads((reader.folder / "task.json").read_text(encoding="utf-8"))
    del task["wrong_token"]
    before = len(hub.log)
    home = str(reader.folder / "home")
    client = Client(hub, "load", tmp_path, task, HF_HUB_OFFLINE="1", HF_HOME=home)
    client.result()
    uploads = {"PUT", "POST"}  # of the publication that is still being tried, which also asks who it is
    others = [request for request in hub.log[before:] if request.method not in uploads]
    assert not [request for request in others if not re.search("dropped|whoami", request.path)]
    tensors = reader.tensors()
    for name, value in client.tensors().items():
        assert torch.equal(value, tensors[name]), name


def test_where_the_package_is_not_installed(hub, codes, folders, inputs, tmp_path, one_thread):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    # A plain line adds a folder, and leaves alone the .pth files in it: that of the editable install, too.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    task = {"ctc": CTC, "with_code": WITH_CODE, "inputs": str(inputs), "heads": HEADS}
    client = Client(hub, "without_package", tmp_path / "client", task, python=scripts / "python", PYTHONPATH="")
    result, tensors = client.result(), client.tensors()
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


def test_a_quantizer_is_uploaded_whole_or_not_at_all(hub, tmp_path):
    torch.manual_seed(0)
    quantizer = MultiCodebookQuantizer(feature_size=8, codebook_size=16, num_codebooks=2)
    quantizer.save_pretrained(tmp_path / "source")
    hub.drop("tester/q-commit", "commit")
    hub.drop("tester/q-upload", "upload")
    calls = {
        "good": ["tester/q", {}],
        "branch": ["tester/q", {"revision": "dev", "private": False}],
        "public": ["tester/q", {"private": True}],
        "cut": ["tester/q-commit", {"private": True}],
        "cut again": ["tester/q-commit", {"private": True}],
        "slow": ["tester/q-upload", {}],
        "not ours": ["someone/q", {}],
    }
    client = Client(hub, "quantizer", tmp_path, {"calls": calls, "source": str(tmp_path / "source")})
    results = client.result()
    good = {"good", "branch", "cut again", "slow"}
    assert {name for name, result in results.items() if result.get("id") == quantizer.quantizer_id} == good
    assert {name for name, result in results.items() if "error" in result} == results.keys() - good
    assert "ValueError: tester/q exists and is public" in results["public"]["error"]
    for repo_id in ("tester/q", "tester/q-commit", "tester/q-upload"):
        history = hub.repos[repo_id].history()
        assert len(history) == 2  # the empty one, and one with both files
        assert {"config.json", "model.safetensors"} <= history[0].files.keys()
        assert not {"config.json", "model.safetensors"} & history[1].files.keys()
    assert hub.repos["tester/q"].files("dev") == hub.repos["tester/q"].files()
    assert hub.repos["tester/q-commit"].private
