# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What a run refuses, or is stopped by, before its first step, and what `--dry-run` says instead of it."""

import json
import os
import re
import shutil
import signal
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.pretraining.command import INTERRUPTED
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.launch import make_accelerator
from spear_hf.pretraining.run_folder import RunFolder
from spear_hf.pretraining.setup import build_sampler

from .pretraining_corpus import tokens_of
from .pretraining_runs import Runs, call, free_port


STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("starts"), f"max_steps={STEPS}")
    runs.store = tokens_of(runs.manifest, runs.folder / "tokens")
    return runs


@pytest.fixture(scope="module")
def finished(runs) -> Path:
    output = runs.folder / "finished"
    assert runs.run(output) == 0, runs.log(output)
    return output


def test_a_run_is_never_overwritten(runs, finished):
    code, output = call(runs, finished)
    assert code == 1
    assert "is not empty: continue its run with --resume" in output


def test_resuming_with_another_configuration_is_refused_by_name(runs, finished):
    code, output = call(runs, finished, "seed=3", "optimizer.weight_decay=0.5", flags=("--resume",))
    assert code == 1
    assert "optimizer.weight_decay (0.01 -> 0.5), seed (0 -> 3)" in output


def test_a_run_does_not_end_before_the_step_it_has_reached(runs, finished):
    code, output = call(runs, finished, "max_steps=5", flags=("--resume",))
    assert code == 1
    assert f"has done {STEPS} steps already, more than max_steps=5: set it to {STEPS}" in output
    assert yaml.safe_load((finished / "config.yaml").read_text())["max_steps"] == STEPS


def test_resuming_with_other_data_is_refused(runs, finished):
    output = runs.folder / "other-data"
    shutil.copytree(finished, output)
    lines = runs.manifest.read_text().splitlines(keepends=True)
    try:
        runs.manifest.write_text("".join(lines[1:]))
        code, message = call(runs, output, flags=("--resume",))
    finally:
        runs.manifest.write_text("".join(lines))
    assert code == 1
    assert "differ from those of" in message


def test_data_that_has_moved_is_the_same_data(runs, finished):
    output, manifest, store = (runs.folder / name for name in ("moved", "moved.jsonl", "moved-tokens"))
    shutil.copytree(finished, output)
    shutil.copy(runs.manifest, manifest)
    shutil.copytree(runs.store, store)
    moved = f"data.manifest={manifest}", f"targets.speech.store={store}"
    code, message = call(runs, output, *moved, flags=("--resume",))
    assert code == 0, message
    assert yaml.safe_load((output / "config.yaml").read_text())["data"]["manifest"] == str(manifest)
    code, message = call(runs, output, "data.manifest=null", f"data.store={store}", flags=("--resume",))
    assert code == 1
    assert f"data.manifest ({manifest} -> None)" in message


def test_noise_may_move_but_not_change(runs, tmp_path):
    output, noise, moved = runs.folder / "noisy", tmp_path / "noise", tmp_path / "moved"
    noise.mkdir()
    for line in runs.manifest.read_text().splitlines()[8:11]:
        path = Path(json.loads(line)["path"])
        shutil.copyfile(path, noise / path.name)
    settings = "mixing.noise_probability=1", "logging.validate_every=0"
    code, message = call(runs, output, *settings, f"mixing.noise_manifest={noise}", "max_steps=1")
    assert code == 0, message
    shutil.copytree(noise, moved)
    settings += (f"mixing.noise_manifest={moved}",)
    code, message = call(runs, output, *settings, "max_steps=2", flags=("--resume",))
    assert code == 0, message
    next(moved.iterdir()).rename(moved / "another.flac")
    code, message = call(runs, output, *settings, "max_steps=3", flags=("--resume",))
    assert code == 1
    assert f"The clips of mixing.noise_manifest={moved} are not those of {output}" in message


def test_resuming_with_tokens_of_another_quantiser_is_refused(runs, finished):
    metadata = runs.store / "metadata.json"
    text = metadata.read_text()
    one = json.loads(text)["quantizer_id"]
    try:
        metadata.write_text(text.replace(one, "another"))
        code, message = call(runs, finished, flags=("--resume",))
    finally:
        metadata.write_text(text)
    assert code == 1
    assert f"The speech tokens are not those of {finished}" in message
    assert f"(quantizer_id: '{one}' / 'another'): restore the store" in message


def test_resuming_what_is_no_run_is_refused(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, output = call(runs, tmp_path, flags=("--resume",))
    assert code == 1
    assert "is not the folder of a run" in output


def test_gradients_are_not_divided_by_accelerate(runs, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, output = call(runs, tmp_path / "run")
    assert code == 1
    assert "told to accumulate the gradients of 4 steps: unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in output


def group_timeout(answer: Queue) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    settings = ["execution.timeout_minutes=77", "logging.trackers=[]"]
    accelerator = make_accelerator(load_config("tiny", settings), RunFolder("run"))
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    answer.put(backend.options._timeout.total_seconds())
    accelerator.end_training()


def test_ranks_wait_for_each_other_as_long_as_configured(runs):
    answer = runs.context.Queue()
    process = runs.context.Process(target=group_timeout, args=(answer,))
    process.start()
    assert answer.get(timeout=60) == 77 * 60
    process.join(60)
    with pytest.raises(ValueError, match="fetch_minutes=30 must be less than timeout_minutes=20"):
        load_config("tiny", ["execution.timeout_minutes=20"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("targets.speech.store=null", "targets.speech has no tokens"),
        ("data.manifest=nowhere.jsonl", "data.manifest=nowhere.jsonl does not exist"),
        ("data.split=train", "data.split=train is not in"),
        ("data.min_seconds=40 data.max_seconds=40 data.batch_seconds=40", "No utterance of .* is left to train on"),
        ("model.size=large", "hidden_size"),
        ("execution.sharding=fsdp", "needs two or more ranks"),
        ("model.config.hidden_size=33", "model.config: `hidden_size=33` must be a positive multiple of 4"),
        ("data.validation_split=null data.validation_fraction=0.9999", "or held out for validation"),
        ("logging.probe_every=1 logging.probe_manifest=bundled logging.probes=[words]", "probe words has 0 labelled"),
    ],
)
def test_wrong_settings_are_errors_before_the_first_step(runs, finished, tmp_path, override, message):
    code, output = call(runs, tmp_path / "run", *override.split())
    assert code == 1
    assert re.search(message, output), output
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(runs, finished, tmp_path):
    code, output = call(runs, tmp_path / "run", flags=("--dry-run",))
    assert code == 0
    assert "16 utterances" in output
    assert re.search(f"^steps +{STEPS}: ", output, re.MULTILINE)
    assert "batches per epoch" in output
    assert "GB in float32" in output
    assert re.search(rf"^to go +{STEPS} steps, 0.0 hours of audio, about 0.0 hours if 1 x CPU", output, re.MULTILINE)
    assert re.search(r"^operations +0\.\d+ TFLOP a step", output, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_one_of_the_ranks_of_a_launcher_prints_the_plan(runs, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        printed.append(call(runs, tmp_path / "run", flags=("--dry-run",)))
    assert "on each of 2 ranks" in printed[0][1]
    assert printed[1] == (0, "")


@pytest.mark.parametrize("flags", [("--dry-run",), ()])
def test_what_no_run_could_use_is_refused_by_its_plan_too(runs, tmp_path, flags):
    (tmp_path / "file").write_text("mine")
    for setting, message in (
        ("logging.trackers=[aim]", "logging.trackers: aim cannot be used"),
        (f"output_dir={tmp_path / 'file' / 'run'}", f"{tmp_path / 'file'} is a file. Choose another folder."),
        (f"output_dir={tmp_path / 'file'}", f"{tmp_path / 'file'} is a file. Choose another folder."),
    ):
        code, output = call(runs, tmp_path / "run", setting, flags=flags)
        assert (code, message in output) == (1, True), output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("flags", [("--dry-run",), ()])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_into_is_named(runs, tmp_path, flags):
    for rights, place in ((0o500, "run"), (0o000, "mine/run")):
        tmp_path.chmod(rights)
        code, output = call(runs, tmp_path / place, flags=flags)
        assert code == 1
        assert f"{tmp_path} cannot be written into" in output
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("flags", [("--dry-run",), ()])
def test_utterances_without_tokens_are_told_of_before_anything_is_written(runs, finished, tmp_path, flags):
    row = json.loads(runs.manifest.read_text().splitlines()[0])
    (tmp_path / "more.jsonl").write_text(runs.manifest.read_text() + json.dumps({**row, "id": "new"}) + "\n")
    code, output = call(runs, tmp_path / "run", f"data.manifest={tmp_path / 'more.jsonl'}", flags=flags)
    assert code == 1
    assert "1 of 17 utterances have no speech tokens in the store: new" in output
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_run_that_has_begun_is_of_what_is_left(runs, finished):
    code, output = call(runs, finished, "max_steps=30", flags=("--dry-run",))
    assert code == 0
    assert re.search(r"^to go +24 steps, .* at the pace of the run so far$", output, re.MULTILINE)


def test_set_takes_several_values_and_may_be_repeated(tmp_path):
    arguments = ["--set", "max_steps=3", "seed=abc", "--set", f"output_dir={tmp_path}", "--dry-run"]
    result = CliRunner().invoke(app, ["pretrain", "--config", "tiny", *arguments])
    assert result.exit_code == 1
    assert "seed='abc' is a str, but must be int" in result.output
    result = CliRunner().invoke(app, ["pretrain", "--config", "tiny", "stray"])
    assert "'stray' must have the form key=value" in result.output


def test_a_folder_of_audio_needs_no_manifest(runs, finished, tmp_path):
    for line in runs.manifest.read_text().splitlines()[:6]:
        path = Path(json.loads(line)["path"])
        shutil.copyfile(path, tmp_path / path.name)
    settings = [f"data.manifest={tmp_path}", "data.validation_fraction=0.3"]
    settings += ["targets.speech.store=null", "targets.speech.teacher=kaldi-mfcc"]  # there are no tokens of these ids
    code, output = call(runs, tmp_path / "run", *settings, flags=("--dry-run",))
    assert code == 0
    counts = re.findall(r"^(?:training|validation) +(\d+) utterances", output, flags=re.MULTILINE)
    assert sum(map(int, counts)) == 6
    assert "has no splits" in output


def test_a_target_that_no_utterance_is_for_is_an_error(runs, finished, tmp_path):
    rows = [json.loads(line) for line in runs.manifest.read_text().splitlines()]
    manifest = tmp_path / "speech.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows if row["domain"] == "speech"))
    settings = [f"data.manifest={manifest}", f"targets.audio.store={runs.store}"]
    code, output = call(runs, tmp_path / "run", *settings)
    assert code == 1
    assert "No training utterance is of a domain that targets.audio is for" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["loop", "command"])
def test_a_stop_before_the_first_step_ends_the_run_as_one_that_goes_on(runs, finished, tmp_path, monkeypatch, module):
    name, before = {"loop": ("build_sampler", build_sampler), "command": ("load_config", load_config)}[module]

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return before(*arguments)

    monkeypatch.setattr(f"spear_hf.pretraining.{module}.{name}", stopped)
    handler = signal.getsignal(signal.SIGUSR1)
    code, output = call(runs, tmp_path / "run")
    assert code == INTERRUPTED
    assert "Stopped by SIGUSR1 with no step under way" in output
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_too_little_memory_is_one_line_with_the_setting_that_helps(runs, finished, tmp_path):
    code, output = call(runs, tmp_path / "run", "model.config.hidden_size=1000000")
    assert code == 1
    assert re.search(r"spear-hf pretrain: there is not enough memory \(.*memory.*\): lower execution", output)
    assert not (tmp_path / "run").exists()


def test_a_stop_while_a_tracker_starts_is_one_too(runs, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "accelerate.tracking.TensorBoardTracker.start", lambda tracker: os.kill(os.getpid(), signal.SIGTERM)
    )
    code, output = call(runs, tmp_path / "run")
    assert code == INTERRUPTED
    assert "Stopped by SIGTERM with no step under way" in output


@pytest.mark.parametrize("name", ["config.yaml", "sources.json", "unigrams.json"])
def test_a_damaged_record_of_a_run_is_named(runs, finished, name):
    output = runs.folder / "damaged"
    shutil.copytree(finished, output, dirs_exist_ok=True)
    (output / name).write_bytes(b'{"a": 1,\0')
    code, message = call(runs, output, f"max_steps={STEPS + 1}", flags=("--resume",))
    assert code == 1
    assert f"{output / name} is damaged" in message
    shutil.rmtree(output)
