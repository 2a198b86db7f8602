# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whole runs in processes of their own: what they record and leave behind, signals, and what goes wrong on the way."""

import json
import math
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

from spear_hf import SpearForPreTraining
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.hub_card import is_generated
from spear_hf.hub_checks import check_card
from spear_hf.pretraining.command import INTERRUPTED, run_pretraining
from spear_hf.pretraining.metrics import TIMING_FIELDS, read_json_lines

from .pretraining_runs import Runs, assert_same_run, call, has_steps, metrics, wait_for


STEPS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), f"max_steps={STEPS}", "checkpoint_every=4")


@pytest.fixture(scope="module")
def finished(runs) -> Path:
    """An uninterrupted run, which trains its quantiser and makes its tokens; the other runs use its tokens."""
    output = runs.folder / "finished"
    assert runs.run(output) == 0, runs.log(output)
    first = output.with_name("reference")
    runs.store = output / "tokens" / "speech"
    assert runs.run(first) == 0, runs.log(first)
    return first


def test_tokens_of_a_store_train_as_those_of_a_teacher(finished):
    assert metrics(finished) == metrics(finished.with_name("finished"))


def test_every_step_is_recorded(finished):
    records = read_json_lines(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert record["loss"] > 0
        assert 0 <= record["speech_masked_accuracy"] <= 1
        assert 0 <= record["padding_share"] < 0.2
        assert record["batch_seconds"] <= 5
        assert record["grad_norm"] > 0
        assert record["parameter_norm"] > record["grad_norm"]
        assert 0 < record["mfu"] < 1
        assert {*TIMING_FIELDS, "learning_rate", "hours", "epoch", "target_frames", "utterances"} <= set(record)
        assert re.fullmatch("[0-9a-f]{8}", record["batch"])
        assert np.mean(record["speech_codebook_accuracy"]) == pytest.approx(record["speech_masked_accuracy"])
        by_domain = [record[f"speech_masked_accuracy_on_{domain}"] for domain in ("speech", "audio")]
        known = [accuracy for accuracy in by_domain if accuracy is not None]
        assert min(known) - 1e-9 <= record["speech_masked_accuracy"] <= max(known) + 1e-9
    assert records[-1]["hours"] == pytest.approx(sum(record["batch_seconds"] for record in records) / 3600)
    assert records[-1]["loss"] < records[0]["loss"]


def test_held_out_audio_is_compared_with_the_unigram(finished):
    records = read_json_lines(finished / "evaluation.jsonl")
    assert [record["step"] for record in records] == [10, STEPS]
    for record in records:
        assert 0 < record["speech_unigram_accuracy"] < 1
        assert 0 < record["speech_unigram_loss"] < math.log(16) + 1
        assert record["speech_masked_loss"] > 0


def test_trackers_get_the_same_numbers(finished):
    events = EventAccumulator(str(finished / "tensorboard" / "spear-hf"))
    events.Reload()
    losses = [record["loss"] for record in metrics(finished)]
    assert [event.value for event in events.Scalars("training/loss")] == pytest.approx(losses)
    codebooks = [record["speech_codebook_accuracy"][1] for record in metrics(finished)]
    assert [event.value for event in events.Scalars("training/speech_codebook_accuracy/1")] == pytest.approx(codebooks)
    assert [event.step for event in events.Scalars("evaluation/speech_masked_accuracy")] == [10, STEPS]


def test_the_end_loads_with_the_auto_classes(runs, finished):
    extractor = AutoFeatureExtractor.from_pretrained(finished / "final")
    with_heads = AutoModelForPreTraining.from_pretrained(finished / "final").eval()
    waveform = load_audio(read_manifest(runs.manifest)[0].path)
    inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = with_heads(**inputs).last_hidden_state
        for folder in ("final", "final/encoder"):
            model = AutoModel.from_pretrained(finished / folder).eval()
            assert torch.equal(model(**inputs).last_hidden_state, expected)
    files = [path for path in (finished / "final").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1  # the weights are for all who may read the rest


def test_the_end_has_a_card_with_curves(finished):
    card = finished / "final" / "README.md"
    assert check_card(card) == ["README.md names no licence: add `license:` to its metadata."]
    assert is_generated(card)
    text = card.read_text(encoding="utf-8")
    assert f"| Steps | {STEPS} |" in text
    for link in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (card.parent / link).stat().st_size > 10_000
    assert text.count("](plots/") == 2


def test_a_checkpoint_is_a_model_folder(finished):
    model = AutoModelForPreTraining.from_pretrained(finished / "checkpoints" / f"step-{STEPS:08d}" / "model")
    for name, tensor in load_file(finished / "final" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_config_is_kept(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["max_steps"] == STEPS
    assert config["model"]["config"]["hidden_size"] == 32


# The paper's optimiser, and an average of the weights after steps 7, 8, ..., 12.
SCALED = (
    "optimizer.name=scaled_adam", "optimizer.learning_rate=0.045", "schedule.name=eden",
    "averaging.every=1", "averaging.last_fraction=0.5",
)  # fmt: skip


def test_scaled_adam_learns_is_killed_and_publishes_the_average(runs, finished):
    whole, killed = runs.folder / "scaled", runs.folder / "scaled-killed"
    assert runs.run(whole, *SCALED) == 0, runs.log(whole)
    losses = [record["loss"] for record in metrics(whole)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.01
    for record in metrics(whole):
        assert 0 < record["clipping_factor"] <= 1
        assert record["parameter_norm"] > 1

    process = runs.start(killed, *SCALED)
    wait_for(has_steps(killed, 9), process)
    process.kill()
    process.join()
    assert len(metrics(killed)) < STEPS, "the run was over before it was killed"
    assert runs.run(killed, *SCALED, resume=True) == 0, runs.log(killed)
    assert_same_run(killed, whole)

    average = torch.load(whole / "checkpoints" / f"step-{STEPS:08d}" / "average.pt", weights_only=True)
    assert (average["samples"], average["start"]) == (6, 6)
    last = load_file(whole / "checkpoints" / f"step-{STEPS:08d}" / "model" / "model.safetensors")
    final = load_file(whole / "final" / "model.safetensors")
    for name, tensor in final.items():
        assert torch.equal(tensor, (average["sums"][name] / 6).float()), name
    assert any(not torch.equal(tensor, last[name]) for name, tensor in final.items())


def test_the_averaged_weights_are_validated(runs, finished):
    """The record is what a validation of final/ would say: here, of a run of no more steps that starts from it."""
    whole = runs.folder / "scaled"
    (record,) = read_json_lines(whole / "averaged.jsonl")
    last = read_json_lines(whole / "evaluation.jsonl")[-1]
    assert (record.pop("step"), record.pop("samples"), last.pop("step")) == (STEPS, 6, STEPS)
    assert record.keys() == last.keys()
    assert record["speech_masked_loss"] != last["speech_masked_loss"]
    assert record["speech_unigram_loss"] == last["speech_unigram_loss"]
    output = runs.folder / "from-the-average"
    model = ["model.config={}", f"model.init_from={whole / 'final'}", "max_steps=1", "logging.validate_every=1"]
    settings = [*model, "optimizer.learning_rate=1e-12", "optimizer.weight_decay=0.0"]
    assert runs.run(output, *settings) == 0, runs.log(output)
    (again,) = read_json_lines(output / "evaluation.jsonl")
    for name, value in record.items():
        assert again[name] == pytest.approx(value, abs=1e-6), name
    card = (whole / "final" / "README.md").read_text(encoding="utf-8")
    assert "with the published weights, a mean over 6 steps." in card
    assert f"| speech | {100 * record['speech_masked_accuracy']:.1f} % |" in card
    assert "with the last weights." in (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert read_json_lines(finished / "averaged.jsonl") == []


def test_regularisers_are_resumed_exactly_too(runs, finished):
    settings = ("regularizers.enabled=true", "data.batch_seconds=12", "logging.validate_every=0")
    reference, output = runs.folder / "regularised", runs.folder / "regularised-killed"
    assert runs.run(reference, *settings) == 0, runs.log(reference)
    process = runs.start(output, *settings)
    wait_for(has_steps(output, 6), process)
    process.kill()
    process.join()
    assert len(metrics(output)) < STEPS, "the run was over before it was killed"
    assert runs.run(output, *settings, resume=True) == 0, runs.log(output)
    assert "Resuming from" in runs.log(output)
    assert_same_run(output, reference)
    state = f"checkpoints/step-{STEPS:08d}/regularizers.json"
    assert (output / state).read_bytes() == (reference / state).read_bytes()
    exceeded = json.loads((reference / state).read_text())["whiten_exceeded"].values()
    assert True in exceeded
    assert False in exceeded
    assert metrics(reference)[-1]["loss"] != metrics(finished)[-1]["loss"]
    config = json.loads((reference / "final/config.json").read_text())
    assert (config["hidden_dropout"], config["position_dropout"]) == (0.05, 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step(runs, finished, number):
    output = runs.folder / f"stopped-{number}"
    process = runs.start(output, "checkpoint_every=1000")
    wait_for(has_steps(output, 2), process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == INTERRUPTED, runs.log(output)
    last = metrics(output)[-1]["step"]
    assert last < STEPS
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert f"Stopped by {signal.Signals(number).name} after step {last}" in runs.log(output)
    assert not (output / "final").exists()
    if number == signal.SIGTERM:
        assert runs.run(output, "checkpoint_every=4", resume=True) == 0, runs.log(output)
        assert_same_run(output, finished)


def test_an_error_in_a_worker_ends_the_run_and_says_what_it_is(runs, finished, tmp_path):
    rows = [json.loads(line) for line in runs.manifest.read_text().splitlines()]
    rows[0]["path"] = str(tmp_path / "gone.opus")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = runs.folder / "gone"
    assert runs.run(output, f"data.manifest={manifest}", "execution.num_workers=1", patience=30) == 1
    last = runs.log(output).splitlines()[-1]
    assert last == f"spear-hf pretrain: {tmp_path}/gone.opus cannot be decoded: there is no such file"


def test_a_run_has_its_folder_for_itself_and_ends_when_a_worker_is_killed(runs, finished):
    output = runs.folder / "short-of-memory"
    process = runs.start(output, "execution.num_workers=2", "max_steps=10000", "checkpoint_every=10000")
    wait_for(has_steps(output, 2), process)
    code, message = call(runs, output, "max_steps=10000", "checkpoint_every=10000", flags=("--resume",))
    assert code == 1
    assert f"Process {process.pid} on " in message
    assert f"is training in {output}: end it first" in message
    psutil.Process(process.pid).children()[0].kill()
    process.join(30)
    assert process.exitcode == 1, runs.log(output)
    assert "A process that prepares batches has died" in runs.log(output)
    assert "Traceback" not in runs.log(output)


def test_a_torn_checkpoint_costs_only_the_steps_since_the_one_before(runs, finished):
    output = runs.folder / "torn"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "final")
    os.truncate(output / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.pt", 1000)
    assert runs.run(output, resume=True) == 0, runs.log(output)
    assert "step-00000008" in runs.log(output)
    assert f"Checkpoint of step {STEPS} is not used" in runs.log(output)
    assert_same_run(output, finished)


def test_a_finished_run_can_be_prolonged(runs, finished):
    output = runs.folder / "prolonged"
    assert runs.run(output, "max_steps=5") == 0, runs.log(output)
    assert runs.run(output, resume=True) == 0, runs.log(output)
    # Its evaluations are other ones: the shorter run validated at its own end, too.
    assert metrics(output) == metrics(finished)
    assert (output / "final/model.safetensors").read_bytes() == (finished / "final/model.safetensors").read_bytes()


def test_a_run_goes_on_without_the_model_that_it_started_from(runs, finished, tmp_path):
    start, whole, output = tmp_path / "start", runs.folder / "started", runs.folder / "started-and-stopped"
    shutil.copytree(finished / "final", start)
    settings = ("model.config={}", f"model.init_from={start}", "logging.validate_every=0", "logging.trackers=[]")
    assert runs.run(whole, *settings, "max_steps=2") == 0, runs.log(whole)
    assert runs.run(output, *settings, "max_steps=1") == 0, runs.log(output)
    shutil.rmtree(start)
    code, message = call(runs, output, *settings, "max_steps=2", flags=("--dry-run",))
    assert code == 0, message
    assert runs.run(output, *settings, "max_steps=2", resume=True) == 0, runs.log(output)
    assert_same_run(output, whole)


# No dropout, whose draws depend on the ranks and micro-batches; few steps, no frills.
PLAIN = ("model.config.hidden_dropout=0.0", "max_steps=3", "logging.validate_every=0", "logging.trackers=[]")


@pytest.fixture(scope="module")
def plain(runs, finished) -> Path:
    """A run on one rank with one forward pass per step."""
    output = runs.folder / "plain"
    assert runs.run(output, *PLAIN) == 0, runs.log(output)
    return output


def assert_same_training(output: Path, plain: Path) -> None:
    for other, one in zip(metrics(output), metrics(plain), strict=True):
        for name in ("step", "utterances", "target_frames", "batch_seconds", "hours"):
            assert other[name] == one[name], name
        for name in ("loss", "speech_masked_accuracy", "speech_unmasked_loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3), name


def test_gradient_accumulation_does_not_change_a_step(runs, plain):
    output = runs.folder / "accumulated"
    assert runs.run(output, *PLAIN, "execution.batch_seconds_per_device=1.5") == 0, runs.log(output)
    assert_same_training(output, plain)


def test_bf16_learns_nearly_the_same(runs, plain):
    output = runs.folder / "bf16"
    assert runs.run(output, *PLAIN, "execution.precision=bf16", "max_steps=2") == 0, runs.log(output)
    for half, one in zip(metrics(output), metrics(plain)):
        assert half["loss"] != one["loss"]
        assert half["loss"] == pytest.approx(one["loss"], rel=0.02)
    weights = load_file(output / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_resuming_what_has_not_started_starts_it(runs, plain):
    output = runs.folder / "not-started"
    assert runs.run(output, *PLAIN, "max_steps=1", resume=True) == 0, runs.log(output)
    assert "does not exist yet" in runs.log(output)
    assert metrics(output) == metrics(plain)[:1]


def test_a_diverging_run_skips_names_and_stops(runs, finished):
    output = runs.folder / "diverged"
    assert runs.run(output, "optimizer.learning_rate=1e9", "schedule.warmup_steps=0") == 1
    assert "not finite in 3 steps in a row" in runs.log(output)
    records = metrics(output)
    assert [("skipped" in record) for record in records[-3:]] == [True] * 3
    assert records[-1]["loss"] is None
    assert records[-1]["parameter_norm"] == records[-2]["parameter_norm"]  # no update
    ids = {json.loads(line)["id"] for line in runs.manifest.read_text().splitlines()}
    (part,) = records[-1]["skipped"]
    assert part["rank"] == 0
    assert set(part["utterances"]) <= ids
    assert len(part["utterances"]) == records[-1]["utterances"]


def test_a_loud_file_is_skipped_by_name_and_the_run_goes_on(runs, finished, tmp_path):
    """Finite samples whose power is infinite in float32 give a loss that is really NaN, on the rank that has them."""
    lines = runs.manifest.read_text().splitlines()
    loud = json.loads(lines[0]) | {"path": str(tmp_path / "loud.wav"), "sha256": None}
    noise = np.random.default_rng(0).standard_normal(loud["num_samples"]) * 1e30
    soundfile.write(loud["path"], noise, loud["sampling_rate"], subtype="FLOAT")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join([json.dumps(loud), *lines[1:]]) + "\n")
    output = runs.folder / "loud"
    settings = (f"data.manifest={manifest}", "logging.validate_every=0", "logging.trackers=[]", "max_steps=8")
    runs.run_ranks(output, *settings)
    skipped = [record for record in metrics(output) if "skipped" in record]
    assert 1 <= len(skipped) <= 3  # once an epoch
    for record in skipped:
        (part,) = record["skipped"]
        assert part["utterances"] == [loud["id"]]
        assert part["rank"] in (0, 1)
        assert record["loss"] is None
    assert f"Rank {skipped[-1]['skipped'][0]['rank']}: {loud['id']}." in runs.log(output, rank=0)
    assert "no update" not in runs.log(output, rank=1)  # what the first has said
    weights = load_file(output / "final" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_encoder_is_probed_as_the_run_goes(runs, finished):
    output = runs.folder / "probed"
    settings = ("logging.validate_every=0", "logging.probe_manifest=bundled", "logging.probes=[spoken_words]")
    assert runs.run(output, *settings, "logging.probe_every=4", "max_steps=6") == 0, runs.log(output)
    records = read_json_lines(output / "probes.jsonl")
    assert [record["step"] for record in records] == [4, 6]
    for record in records:
        low, value, high = (record[f"spoken_words_accuracy{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 1
    losses = [record["loss"] for record in metrics(output)]
    assert losses == [record["loss"] for record in metrics(finished)][:6]  # probing disturbs nothing


def write_probe(runs: Runs, manifest: Path, *labels: str, **changed: str) -> str:
    """A manifest of the same clips, of which the last two test a probe of these labels; the setting that names it."""
    rows = [json.loads(line) for line in runs.manifest.read_text().splitlines()]
    with manifest.open("w") as file:
        for place, (row, label) in enumerate(zip(rows, labels)):
            split = "probe_train" if place < len(labels) - 2 else "probe_test"
            file.write(json.dumps({**row, **changed, "split": split, "probe": "kind", "label": label}) + "\n")
    return f"logging.probe_manifest={manifest}"


@pytest.mark.parametrize(
    ("labels", "message"),
    [("aaaaaa", "has one label to train on, a: that is no task"), ("aabbac", "that no row of probe_train has: c")],
)
@pytest.mark.parametrize("flags", [("--dry-run",), ()])
def test_a_probe_that_is_no_task_is_an_error_before_the_first_step(runs, finished, tmp_path, labels, message, flags):
    probe = write_probe(runs, tmp_path / "probe.jsonl", *labels)
    code, output = call(runs, tmp_path / "run", probe, "logging.probe_every=4", flags=flags)
    assert code == 1
    assert "The probe kind in" in output
    assert message in output


def test_a_run_says_that_nothing_is_held_out(runs, finished, tmp_path):
    rows = [json.loads(line) for line in runs.manifest.read_text().splitlines()]
    manifest = tmp_path / "one.jsonl"
    manifest.write_text(json.dumps({**rows[0], "split": None}) + "\n")
    output = runs.folder / "one"
    assert runs.run(output, f"data.manifest={manifest}", "max_steps=2") == 0, runs.log(output)
    assert "goes without validation: raise data.validation_fraction (0.01)" in runs.log(output)
    assert not read_json_lines(output / "evaluation.jsonl")


def test_a_probe_that_fails_does_not_end_the_run(runs, finished, tmp_path):
    output = runs.folder / "unprobed"
    probe = write_probe(runs, tmp_path / "probe.jsonl", *"aabbab", path=str(tmp_path / "gone.opus"))
    assert runs.run(output, probe, "logging.probe_every=4") == 0, runs.log(output)
    assert re.search("Step 4 is not probed: .*gone.opus cannot be decoded", runs.log(output))
    assert_same_run(output, finished)


def test_a_run_needs_no_package_that_only_evaluation_needs(runs, finished):
    output = runs.folder / "bare"
    without = ("datasets", "evaluate", "jiwer", "scipy", "sklearn", "threadpoolctl", "torchaudio")
    process = runs.start(output, "max_steps=2", without=without)
    process.join(120)
    assert process.exitcode == 0, runs.log(output)
    assert (output / "final" / "README.md").exists()


def test_domains_are_heard_by_weight(runs, finished):
    output = runs.folder / "weighted"
    settings = ("data.domain_weights.audio=2", "logging.validate_every=0", "max_steps=6")
    assert runs.run(output, *settings) == 0, runs.log(output)
    assert "16 utterances" in runs.log(output)
    assert metrics(output)[-1]["epoch"] == 6 / 3  # of all audio and every second utterance of speech


@pytest.fixture(scope="module")
def tokenised(runs) -> Path:
    """Tokens of the clips, made by a run in this process: others would start a GPU of their own."""
    output = runs.folder / "tokenised"
    teacher = ("targets.speech.store=null", "targets.speech.teacher=kaldi-mfcc")
    assert run_pretraining("tiny", runs.overrides(output, *teacher, "max_steps=1")) == 0
    return output / "tokens" / "speech"


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["adamw", "scaled_adam"])
def test_a_step_hardly_waits_for_the_gpu(runs, tokenised, name):
    """Once for the places of the targets, once for all that is recorded; ScaledAdam once more in four steps."""
    settings = ["regularizers.enabled=true", "logging.validate_every=0", "checkpoint_every=100"]
    settings += [f"targets.speech.store={tokenised}", "targets.speech.teacher=null"]
    if name == "scaled_adam":
        settings += ["optimizer.name=scaled_adam", "optimizer.learning_rate=0.045"]
    waits = []
    for steps in (8, 12):
        overrides = runs.overrides(runs.folder / f"waits-{name}-{steps}", *settings, f"max_steps={steps}")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert run_pretraining("tiny", overrides) == 0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert 4 <= waits[1] - waits[0] <= 4 * 2 + (name == "scaled_adam")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_model_learns_the_same(runs, finished):
    settings = ["max_steps=3", "model.config.hidden_dropout=0.0", "model.config.final_dropout=0.0"]  # draws differ
    records = []
    for name in ("plain", "compiled"):
        output = runs.folder / name
        compile = f"execution.compile={name == 'compiled'}"
        assert runs.run(output, *settings, compile, patience=1000) == 0, runs.log(output)
        records.append(read_json_lines(output / "metrics.jsonl"))
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert isinstance(AutoModelForPreTraining.from_pretrained(output / "final"), SpearForPreTraining)
