# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Each examples/finetune_*.py on a dataset and a model of the Hub by name; what it pushed loads from there.

The clients are the real ones of `datasets`, `huggingface_hub` and `transformers`, in processes of their own. The Hub
is that of hub_server.py. Its datasets were uploaded by `Dataset.push_to_hub`, and so are laid out as on the real one.
"""

import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from spear_hf.data.audio import load_audio
from spear_hf.finetuning.datasets import ENCODED_AUDIO

from .conftest import ROOT
from .hub_process import GOOD, Client, environment
from .hub_server import HubServer
from .test_finetune_examples import bundled_rows, losses_of, metrics_of


STRANGER = "hf_stranger"  # a token of someone who may not read what is private
VOICES, ODD, SECRET = "tester/voices", "tester/odd", "tester/secret"
TABLE, PATHS = "tester/table", "tester/paths"
ENCODER = "tester/encoder"  # in the published format
# fmt: off
SCRIPTS = {
    "ctc": [  # to the repository of the folder's name, and also while the training goes on
        "--dataset_config", "clean", "--train_split", "train.100", "--eval_split", "validation",
        "--text_column", "text", "--freeze_encoder_steps", "1",
        "--output_dir", "french-and-italian", "--save_steps", "1",
    ],
    "audio_classification": [
        "--label_column", "tags", "language", "--multi_label", "--eval_split", "test",
        "--output_dir", "run", "--save_strategy", "no", "--hub_model_id", "tester/audio_classification",
    ],
    "frame_classification": [
        "--segment_column", "turns", "--eval_split", "test",
        "--output_dir", "run", "--save_strategy", "no", "--hub_model_id", "tester/frame_classification",
        "--hub_private_repo", "true",
    ],
    "speaker_verification": [
        "--speaker_column", "voice", "--eval_share", "0.4",
        "--output_dir", "run", "--save_strategy", "no", "--hub_model_id", "tester/speaker_verification",
    ],
}
COMMON = [
    "--model", ENCODER, "--dataset", VOICES, "--max_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true",
    "--per_device_train_batch_size", "4", "--push_to_hub",
]
# fmt: on
PUSHED = {name: f"tester/{name}" for name in SCRIPTS} | {"ctc": "tester/french-and-italian"}
AUTO_CLASSES = {
    "ctc": "AutoModelForCTC",
    "audio_classification": "AutoModelForAudioClassification",
    "frame_classification": "AutoModelForAudioFrameClassification",
    "speaker_verification": "AutoModelForAudioXVector",
}
METRICS = {
    "ctc": "wer",
    "audio_classification": "map",
    "frame_classification": "frame_f1",
    "speaker_verification": "eer",
}
LABELS = {
    "audio_classification": {"fr", "it", "name", "number"},
    "frame_classification": {"fr", "it", "none"},
    "speaker_verification": {"june-wallack", "carlo-flora"},
}
every_script = pytest.mark.parametrize("name", SCRIPTS)


def clips(language: str, number: int) -> list[dict]:
    """So many of the shortest words there are, with absolute paths."""
    rows = bundled_rows(split="probe_train", language=language)
    return sorted(rows, key=lambda row: row["num_samples"])[:number]


def voices(rows: list[dict]) -> datasets.Dataset:
    """With all that the four scripts ask for: texts, names of speakers, class ids, lists of them, and segments."""
    segment = {"start": datasets.Value("float64"), "end": datasets.Value("float64"), "label": datasets.Value("string")}
    kinds = datasets.ClassLabel(names=["name", "number"])
    features = datasets.Features(
        {
            "audio": ENCODED_AUDIO,
            "text": datasets.Value("string"),
            "voice": datasets.Value("string"),
            "language": datasets.ClassLabel(names=["fr", "it"]),
            "tags": datasets.List(kinds),
            "turns": datasets.List(segment),
        }
    )
    days_and_months = ("-day-", "-mon-")
    columns = {
        "audio": [{"path": row["path"], "bytes": None} for row in rows],
        "text": [row["transcript"] for row in rows],
        "voice": [row["speaker"] for row in rows],
        "language": [row["language"] for row in rows],
        "tags": [[0 if any(part in row["id"] for part in days_and_months) else 1] for row in rows],
        "turns": [[{"start": 0.1, "end": 0.3, "label": row["language"]}] for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features).cast_column("audio", datasets.Audio())


def odd(rows: list[dict], size: int | None = None) -> datasets.Dataset:
    """Other names of columns, a `length` that means something else, and but the first `size` bytes of each file."""
    features = datasets.Features(
        {
            "sound": ENCODED_AUDIO,
            "length": datasets.Value("string"),
            "id": datasets.Value("int32"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "tags": datasets.List(datasets.ClassLabel(names=["loud", "wet"])),
        }
    )
    columns = {
        "sound": [{"path": Path(row["path"]).name, "bytes": Path(row["path"]).read_bytes()[:size]} for row in rows],
        "length": ["short"] * len(rows),
        "id": range(7, 7 + len(rows)),
        "kind": ["cat", None, "dog"],
        "tags": [[0, 1], [], [1]],
    }
    return datasets.Dataset.from_dict(columns, features=features).cast_column("sound", datasets.Audio())


def loose_files(folder: Path) -> list[list[str]]:
    """Repositories of files as they are: one with a table of texts, one with the labels in the paths."""
    (folder / "table").mkdir()
    table = ["file_name,text"]
    for row in clips("it", 3):
        name = Path(shutil.copy(row["path"], folder / "table")).name
        table.append(f"{name},{row['transcript']}")
        for split in ("train", "test"):
            (folder / "paths" / split / row["label"]).mkdir(parents=True)
            shutil.copy(row["path"], folder / "paths" / split / row["label"])
    (folder / "table" / "metadata.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    return [[str(folder / "table"), TABLE, "dataset"], [str(folder / "paths"), PATHS, "dataset"]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, golden_folder):
    """With the datasets and the encoder in it."""
    folder = tmp_path_factory.mktemp("stock")
    rows = [row for pair in zip(clips("fr", 6), clips("it", 6)) for row in pair]
    train, test = voices(rows[:8]), voices(rows[8:])
    stock = [
        (VOICES, "default", {"train": train, "test": test}, False),
        (VOICES, "clean", {"train.100": train, "validation": test}, False),
        (ODD, "default", {"train": odd(clips("it", 3))}, False),
        (ODD, "broken", {"train": odd(clips("it", 3), size=20)}, False),
        (SECRET, "default", {"train": test}, True),
    ]
    pushes = []
    for number, (repo_id, config, splits, private) in enumerate(stock):
        datasets.DatasetDict(splits).save_to_disk(folder / str(number))
        pushes.append([str(folder / str(number)), repo_id, config, private])
    with HubServer(tokens={GOOD: "tester", STRANGER: "stranger"}) as server:
        folders = [[str(golden_folder), ENCODER, "model"], *loose_files(folder)]
        task = {"datasets": pushes, "folders": folders}
        Client(server, "stock", folder, task).result()
        yield server


@pytest.fixture(scope="module")
def runs(hub, tmp_path_factory):
    """The output folder of each script by its name, once all of them, side by side, are done."""
    root = tmp_path_factory.mktemp("runs")
    processes = {}
    for name, options in SCRIPTS.items():
        (root / name).mkdir()
        processes[name] = subprocess.Popen(
            [sys.executable, ROOT / "examples" / f"finetune_{name}.py", *COMMON, *options],
            cwd=root / name,
            env={**environment(hub, root / name / "home"), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(root / name / "stderr").open("wb"),
        )
    for name, process in processes.items():
        assert process.wait() == 0, f"{name}: {(root / name / 'stderr').read_text(errors='replace')[-3000:]}"
    return {name: root / name / options[options.index("--output_dir") + 1] for name, options in SCRIPTS.items()}


@pytest.fixture(scope="module")
def loaded(hub, runs, tmp_path_factory):
    """What the pushed models gave for one utterance in a process that has nothing of the runs: tensors, and texts."""
    folder = tmp_path_factory.mktemp("loaded")
    task = {
        "heads": {name: [AUTO_CLASSES[name], PUSHED[name]] for name in SCRIPTS},
        "audio": clips("it", 1)[0]["path"],
    }
    client = Client(hub, "heads", folder, task)
    return client.result(), client.tensors()


@every_script
def test_what_was_pushed(name, hub, runs):
    repo = hub.repos[PUSHED[name]]
    files = {"config.json", "model.safetensors", "README.md", "loss.png", "train_results.json", "eval_results.json"}
    files |= {"vocab.json", "processor_config.json"} if name == "ctc" else {"preprocessor_config.json"}
    assert set(repo.files()) >= files
    assert repo.private == (name == "frame_classification")
    assert not [path for path in repo.files() if path.startswith(("checkpoint-", "_bundled"))]
    local = (runs[name] / "model.safetensors").read_bytes()
    assert hub.storage[repo.at("main").files["model.safetensors"].sha256] == local
    card = ModelCard(repo.at("main").files["README.md"].content.decode())
    assert (card.data.datasets, card.data.base_model) == ([VOICES], ENCODER)


@every_script
def test_what_was_pushed_loads(name, runs, loaded):
    results, tensors = loaded
    extractor = transformers.AutoFeatureExtractor.from_pretrained(runs[name])
    model = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(runs[name]).eval()
    inputs = extractor(load_audio(clips("it", 1)[0]["path"]), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    assert torch.equal(tensors[name], outputs.logits)
    if name == "speaker_verification":
        assert torch.equal(tensors["embeddings"], outputs.embeddings)
    if name == "ctc":
        processor = transformers.AutoProcessor.from_pretrained(runs[name])
        assert results["text"] == processor.batch_decode(outputs.logits.argmax(-1))[0]
    else:
        assert set(results["labels"][name]) == set(model.config.label2id) == LABELS[name]


@every_script
def test_what_was_measured(name, runs):
    train, evaluation = metrics_of(runs[name], "train"), metrics_of(runs[name])
    assert (train["train_samples"], evaluation["eval_samples"]) == (8, 4) if name != "speaker_verification" else (5, 3)
    assert f"eval_{METRICS[name]}" in evaluation
    assert len(losses_of(runs[name])) == 2


def test_the_dataset_came_from_the_hub(hub, runs):
    contents = hub.requests("GET", f"repo=datasets/{VOICES}&")
    assert [request.status for request in contents] == [200] * 4 * 2  # four scripts, two splits of a configuration
    configurations = hub.requests("HEAD", f"{VOICES}/resolve/.*(clean|data)/train.*parquet")
    assert len(configurations) == 4
    assert hub.requests("GET", rf"datasets-server\..*/info\?dataset={VOICES}")
    assert len(hub.requests("GET", f"repo={ENCODER}&")) == 4


def test_pushing_while_the_training_goes_on(hub, runs):
    titles = [commit.title for commit in hub.repos[PUSHED["ctc"]].history()]
    assert "Training in progress, step 1" in titles
    assert titles[0] == "End of training"


def test_a_dataset_that_is_not_there(hub, tmp_path):
    options = [*COMMON, "--dataset", "tester/voises", "--output_dir", "x"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "finetune_ctc.py", *options],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "finetune_ctc: tester/voises is neither a folder or manifest here nor a dataset that the Hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert "tester/x" not in hub.repos  # nothing was pushed


def test_rows_and_errors(hub, tmp_path):
    """Names, configurations, splits and columns, right and wrong, of `load_rows` with the real client."""
    sound = {"audio_column": "sound"}
    # What is private comes last: `datasets` gives what it has in its cache to anybody.
    calls = {
        "odd": [ODD, GOOD, sound, None, ["kind", "tags"]],
        "table": [TABLE, GOOD, {}, None, ["text"]],
        "paths": [PATHS, GOOD, {}, "test", ["label"]],
        "secret of others": [SECRET, STRANGER, {}, None, []],
        "secret without a token": [SECRET, "", {}, None, []],
        "wrong token": [VOICES, "hf_wrong", {}, None, []],
        "unknown": ["tester/voises", GOOD, {}, None, []],
        "unknown without an owner": ["voises", GOOD, {}, None, []],
        "no name": ["a name", GOOD, {}, None, []],
        "configuration": [VOICES, GOOD, {"dataset_config": "dirty"}, None, []],
        "split": [ODD, GOOD, sound, "trian", []],
        "column": [ODD, GOOD, {}, None, []],
        "broken": [ODD, GOOD, {**sound, "dataset_config": "broken"}, None, []],
        "secret": [SECRET, GOOD, {}, None, ["language"]],
    }
    results = Client(hub, "rows", tmp_path, {"calls": calls}).result()
    rows = clips("it", 3)
    assert results["odd"] == {
        "id": ["7", "8", "9"],
        "length": [row["num_samples"] for row in rows],
        "kind": [["cat"], [], ["dog"]],
        "tags": [["loud", "wet"], [], ["wet"]],
        "sha256": [sha256(load_audio(row["path"]).tobytes()).hexdigest() for row in rows],
    }
    for name, column, known in (("table", "text", "transcript"), ("paths", "label", "label")):
        found = {waveform: text for waveform, (text,) in zip(results[name]["sha256"], results[name][column])}
        assert found == {waveform: row[known] for waveform, row in zip(results["odd"]["sha256"], rows)}
    assert results["secret"]["id"] == [f"{SECRET}[{index}]" for index in range(4)]
    assert results["secret"]["language"] == [["fr"], ["it"]] * 2
    for name, pattern in {
        "secret of others": f"{SECRET} is neither .* that may read it",
        "secret without a token": f"{SECRET} is neither .* that may read it",
        "wrong token": f"{VOICES}, split train, of the Hub(.|\\n)*Invalid credentials",
        "unknown": "tester/voises is neither",
        "unknown without an owner": "voises is neither",
        "no name": "a name, split train, of the Hub: Repo id must use",
        "configuration": f"{VOICES}.*'dirty' not found.*clean",
        "split": f"{ODD}.*trian.*train",
        "column": rf"{ODD} has no column 'audio' of audio; name .*--audio_column.*: sound, length, id, ",
        "broken": rf"3 of 3 files cannot be used(.|\n)*7 \({Path(rows[0]['path']).name}\) cannot be read",
    }.items():
        assert re.search(pattern, results[name]["error"]), (name, results[name])
