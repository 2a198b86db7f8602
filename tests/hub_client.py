# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the Hub run in processes of their own, as huggingface_hub reads its environment once.

    python hub_client.py ROLE FOLDER

FOLDER/task.json says what to do; what came of it is written to FOLDER/results.json and FOLDER/tensors.safetensors,
of "publish" to FOLDER/publish.json and FOLDER/dropped.json.
"""

import json
import os
import pickle
import re
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def published(task: dict, folder: Path) -> None:
    """Runs `spear-hf publish` with each list of arguments, and beside it one that the server hangs up on.

    This one takes a while, as the client tries again and again; it has a file of its own, dropped.json.
    """
    from huggingface_hub import HfApi

    from spear_hf.cli import app
    from spear_hf.hub import PublishError, publish

    def dropped() -> None:
        source, repo_id, token = task["dropped"]
        results = {}
        try:
            publish(source, repo_id, token=token)
        except PublishError as error:
            results["error"] = str(error)
        results["files"] = HfApi(token=token).list_repo_files(repo_id)
        results["commit"] = publish(source, repo_id, token=token).commit
        write(folder / "dropped.json", results)

    thread = threading.Thread(target=dropped)
    thread.start()
    codes = {}
    for name, arguments in task["calls"].items():
        if name == "without token":
            del os.environ["HF_TOKEN"]
        try:
            app(["publish", *arguments])
        except SystemExit as end:
            codes[name] = end.code
    write(folder / "publish.json", codes)
    thread.join()


def loaded(task: dict, folder: Path) -> None:
    """Loads each of (revision, name) with AutoModel, with the package and without trust_remote_code."""
    from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoProcessor

    import spear_hf

    inputs = load_file(task["inputs"])
    results, tensors = {}, {}
    with torch.no_grad():
        for revision, name in task["revisions"]:
            model = AutoModel.from_pretrained(task["encoder"], revision=revision)
            assert type(model) is spear_hf.SpearModel
            tensors[name] = model(inputs["input_features"]).last_hidden_state
        extractor = AutoFeatureExtractor.from_pretrained(task["encoder"])
        tensors["features"] = extractor(inputs["waveform"], sampling_rate=16000, return_tensors="pt")["input_features"]
        # This repository has code, which is not run where the package is installed.
        model = AutoModelForCTC.from_pretrained(task["ctc"])
        assert type(model) is spear_hf.SpearForCTC
        tensors["logits"] = model(inputs["input_features"]).logits
        results["processor"] = type(AutoProcessor.from_pretrained(task["ctc"])).__module__
    if task.get("wrong_token"):
        try:
            AutoModel.from_pretrained(
                task["ctc"], revision="main", token=task["wrong_token"], cache_dir=folder / "empty"
            )
        except OSError as error:
            results["wrong_token"] = str(error)
    save(folder, results, tensors)


def without_package(task: dict, folder: Path) -> None:
    """Everything that a repository with code offers, where spear_hf cannot be imported."""
    try:
        import spear_hf
    except ModuleNotFoundError:
        pass
    else:
        raise RuntimeError(f"spear_hf is there ({spear_hf.__file__}): this environment proves nothing")
    import transformers
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoProcessor

    ctc, inputs, trust = task["ctc"], load_file(task["inputs"]), {"trust_remote_code": True}
    waveform = inputs["waveform"].numpy()
    results, tensors = {"config": type(AutoConfig.from_pretrained(ctc, **trust)).__name__}, {}
    with torch.no_grad():
        features = AutoFeatureExtractor.from_pretrained(ctc, **trust)(
            waveform, sampling_rate=16000, return_tensors="pt"
        )
        tensors["features"] = features["input_features"]
        tensors["hidden_states"] = AutoModel.from_pretrained(ctc, **trust)(**features).last_hidden_state
        model = AutoModelForCTC.from_pretrained(ctc, **trust)
        tensors["logits"] = model(**features).logits
        processor = AutoProcessor.from_pretrained(ctc, **trust)
        tensors["processed"] = processor(audio=waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
        results["labels"] = processor(text="ab b")["input_ids"]
        results["text"] = processor.batch_decode(tensors["logits"].argmax(-1))[0]
        saved = folder / "saved"
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        results["saved"] = sorted(path.name for path in saved.iterdir())
        tensors["saved_logits"] = AutoModelForCTC.from_pretrained(saved, **trust)(**features).logits
        results["heads"] = {
            name: type(getattr(transformers, name).from_pretrained(ctc, **trust)).__name__ for name in task["heads"]
        }
        # An encoder without tokenizer.
        results["no_processor"] = type(AutoProcessor.from_pretrained(task["with_code"], **trust)).__name__
        card = Path(hf_hub_download(task["with_code"], "README.md")).read_text(encoding="utf-8")
        usage: dict = {}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], usage)
        results["card"] = list(usage["outputs"].last_hidden_state.shape)
    save(folder, results, tensors)


def quantizer(task: dict, folder: Path) -> None:
    """Uploads a quantiser under each name of the task, and loads what is there then; errors stand for what failed."""
    from spear_hf.mvq import MultiCodebookQuantizer

    results: dict[str, dict] = {}
    for name, (repo_id, settings) in task["calls"].items():
        results[name] = {}
        try:
            results[name]["url"] = MultiCodebookQuantizer.from_pretrained(task["source"]).push_to_hub(
                repo_id, **settings
            )
            again = MultiCodebookQuantizer.from_pretrained(repo_id, revision=settings.get("revision", "main"))
            results[name]["id"] = again.quantizer_id
        except Exception as error:  # what the client's transport raises when it is hung up on
            results[name]["error"] = f"{type(error).__name__}: {error}"
    write(folder / "results.json", results)


def stock(task: dict, folder: Path) -> None:
    """Uploads each of (folder, name, configuration, private) of `datasets`, and (folder, name, kind) of `folders`."""
    import datasets
    from huggingface_hub import HfApi

    for source, repo_id, configuration, private in task["datasets"]:
        datasets.load_from_disk(source).push_to_hub(repo_id, configuration, private=private)
    for source, repo_id, kind in task["folders"]:
        HfApi().create_repo(repo_id, repo_type=kind)
        HfApi().upload_folder(repo_id=repo_id, folder_path=source, repo_type=kind)
    write(folder / "results.json", {})


def rows(task: dict, folder: Path) -> None:
    """The rows of each of (name, token, arguments, split, columns), with hashes of the waveforms, or the error."""
    from spear_hf.finetuning.arguments import DataArguments
    from spear_hf.finetuning.datasets import decode_row, load_rows

    results: dict[str, dict] = {}
    for name, (source, token, arguments, split, columns) in task["calls"].items():
        os.environ["HF_TOKEN"] = token
        try:
            found = load_rows(source, columns, split, DataArguments(**arguments))
            results[name] = {column: found[column][:] for column in ("id", "length", *columns)}
            results[name]["sha256"] = [sha256(decode_row(row).tobytes()).hexdigest() for row in found]
        except ValueError as error:
            results[name] = {"error": str(error)}
    write(folder / "results.json", results)


def evaluate(task: dict, folder: Path) -> None:
    """Runs `spear-hf evaluate` with each list of arguments; then what each specification of `tasks` names."""
    from spear_hf.cli import app
    from spear_hf.evaluation.tasks import load_task

    results: dict = {"codes": [], "times": [], "tasks": {}}
    for arguments in task["runs"]:
        results["times"].append(time.time_ns())
        try:
            app(["evaluate", *arguments])
        except SystemExit as end:
            results["codes"].append(end.code)
    for name, spec in task.get("tasks", {}).items():
        try:
            found = load_task(spec)
            segments = [[vars(segment) for segment in clip.segments] for clip in found.test_clips]
            ids = [clip.id for clip in found.test_clips]
            results["tasks"][name] = {"ids": ids, "segments": segments, "hub": found.hub}
        except ValueError as error:
            results["tasks"][name] = {"error": str(error)}
    write(folder / "results.json", results)


def heads(task: dict, folder: Path) -> None:
    """Logits of each of (Auto class, name) for one audio file, what they say in text, and the names of labels."""
    import transformers

    from spear_hf.data.audio import load_audio

    audio = load_audio(task["audio"])
    results: dict = {"labels": {}}
    tensors: dict[str, torch.Tensor] = {}
    for name, (auto_class, repo_id) in task["heads"].items():
        extractor = transformers.AutoFeatureExtractor.from_pretrained(repo_id)
        model = getattr(transformers, auto_class).from_pretrained(repo_id).eval()
        with torch.no_grad():
            outputs = model(**extractor(audio, sampling_rate=16000, return_tensors="pt"))
        tensors[name] = outputs.logits
        results["labels"][name] = list(model.config.label2id)
        if auto_class == "AutoModelForCTC":
            processor = transformers.AutoProcessor.from_pretrained(repo_id)
            results["text"] = processor.batch_decode(outputs.logits.argmax(-1))[0]
        elif auto_class == "AutoModelForAudioXVector":
            tensors["embeddings"] = outputs.embeddings
    save(folder, results, tensors)


def tokens(task: dict, folder: Path) -> None:
    """Uploads a token store and then another in its place, and reads both; what was downloaded when."""
    from huggingface_hub import HfApi

    from spear_hf.mvq.store import TokenStore

    repo_id, results = task["repo"], {}
    snapshots = folder / "home" / "hub" / f"datasets--{repo_id.replace('/', '--')}" / "snapshots"

    def downloaded() -> list[str]:
        return sorted(path.name for path in snapshots.glob("*/*"))

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    first = api.upload_folder(repo_id=repo_id, folder_path=task["first"], repo_type="dataset").oid
    store = TokenStore.open(repo_id)
    results["ids"], results["opened"] = store.ids, downloaded()
    results["codes"] = store[store.ids[-1]].tolist()
    results["used"] = downloaded()
    api.upload_folder(repo_id=repo_id, folder_path=task["second"], repo_type="dataset")
    results["still"] = pickle.loads(pickle.dumps(store))[store.ids[0]].tolist()
    results["newest"] = TokenStore.open(repo_id).ids
    results["older"] = TokenStore.open(repo_id, revision=first).ids
    results["errors"] = []
    for name, revision in ((repo_id, "no-such-branch"), ("tester/no-such-store", None)):
        try:
            TokenStore.open(name, revision=revision)
        except ValueError as error:
            results["errors"].append(str(error))
    write(folder / "results.json", results)


def pretrain(task: dict, folder: Path) -> None:
    """Uploads a token store and trains from it by each list of settings; before the second, it is replaced."""
    from huggingface_hub import HfApi

    from spear_hf.pretraining.command import run_pretraining

    api, repo_id = HfApi(), task["repo"]
    api.create_repo(repo_id, repo_type="dataset")
    results = {"commit": api.upload_folder(repo_id=repo_id, folder_path=task["store"], repo_type="dataset").oid}
    first, second = task["runs"]
    results["codes"] = [run_pretraining("tiny", first)]
    api.upload_folder(repo_id=repo_id, folder_path=task["other"], repo_type="dataset")
    results["codes"].append(run_pretraining("tiny", second, resume=True))
    snapshots = folder / "home" / "hub" / f"datasets--{repo_id.replace('/', '--')}" / "snapshots"
    results["downloaded"] = sorted(path.name for path in snapshots.glob("*/*"))
    write(folder / "results.json", results)


def save(folder: Path, results: dict, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "tensors.safetensors")
    write(folder / "results.json", results)


def write(path: Path, results: dict) -> None:
    """The file appears whole, as it is waited for."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results), encoding="utf-8")
    partial.rename(path)


def main() -> None:
    role, folder = sys.argv[1], Path(sys.argv[2])
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    ROLES[role](task, folder)


ROLES = {
    "publish": published,
    "load": loaded,
    "without_package": without_package,
    "quantizer": quantizer,
    "stock": stock,
    "rows": rows,
    "evaluate": evaluate,
    "heads": heads,
    "tokens": tokens,
    "pretrain": pretrain,
}

if __name__ == "__main__":
    main()
