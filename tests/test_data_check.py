# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Other audio, or other tokens, under the ids that a run knows are noticed before its first step."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.audio import load_audio
from spear_hf.data.decoding import decodes_exactly
from spear_hf.data.manifest import Utterance, read_manifest
from spear_hf.data.utterances import listed
from spear_hf.feature_extraction_spear import SpearFeatureExtractor
from spear_hf.mvq.store import TokenStore, TokenStoreWriter
from spear_hf.pretraining.data_check import SAMPLES, Sample, check_data, write_samples
from spear_hf.pretraining.setup import build_dataset, planned_architecture

from .pretraining_corpus import small_config, tokens_of
from .pretraining_runs import Runs


def copies(manifest: Path, folder: Path, suffix: str, change=lambda waveform: waveform) -> Path:
    """A manifest of the same ids, with files of another format."""
    folder.mkdir()
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for place, row in enumerate(rows):
        waveform = change(load_audio(row["path"]))
        row["path"] = str(folder / f"{place}{suffix}")
        soundfile.write(row["path"], waveform, 16000)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "manifest.jsonl"


def quieter(waveform: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * waveform


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("check"), "max_steps=2", "logging.trackers=[]", "targets.speech.teacher=null")


@pytest.fixture(scope="module")
def manifest(runs) -> Path:
    """Of lossless files, unlike the bundled ones."""
    return copies(runs.manifest, runs.folder / "lossless", ".flac")


@pytest.fixture(scope="module")
def store(runs, manifest) -> Path:
    return tokens_of(manifest, runs.folder / "tokens", with_audio=True)


def check(manifest: Path, store: Path, record: Path | None = None) -> list[Sample]:
    """As a run of one target does it, of utterances in files."""
    config = small_config(manifest, f"targets.speech.store={store}", "targets.speech.teacher=null")
    opened = {"speech": TokenStore.open(store)}
    architecture = planned_architecture(config, opened)
    dataset = build_dataset(config, listed(read_manifest(manifest)), opened, architecture, SpearFeatureExtractor())
    return check_data(dataset, opened, np.arange(len(dataset)), 0, record)


def test_only_what_every_library_decodes_alike_is_exact(runs, tmp_path):
    source = read_manifest(runs.manifest)[0].path
    waveform = load_audio(source)
    soundfile.write(tmp_path / "three.wav", np.stack([waveform] * 3, axis=1), 16000)
    soundfile.write(tmp_path / "two.wav", np.stack([waveform] * 2, axis=1), 16000)
    soundfile.write(tmp_path / "float.wav", waveform, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "fast.flac", waveform, 22050)
    for name in ("lossy.ogg", "lossy.mp3", "lossless.flac"):
        soundfile.write(tmp_path / name, waveform, 16000)
    exact = {path.name for path in tmp_path.iterdir() if decodes_exactly(Utterance(path.name, path))}
    assert exact == {"two.wav", "float.wav", "lossless.flac"}


def test_the_audio_that_tokens_were_made_from(manifest, store, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "spear_hf"):
        samples = check(manifest, store)
        check(copies(manifest, tmp_path / "wav", ".wav"), store)  # the same samples
    assert [record.levelname for record in caplog.records] == ["INFO"] * 2
    assert len(samples) == SAMPLES
    assert samples == check(manifest, store)


def test_other_audio_of_equal_length_is_named(manifest, store, tmp_path):
    other = copies(manifest, tmp_path / "quiet", ".flac", quieter)
    with pytest.raises(ValueError, match=rf"The audio of {tmp_path}.*\.flac is not what the speech tokens in {store}"):
        check(other, store)


def test_lossy_audio_is_a_warning_where_all_differ(manifest, store, tmp_path, caplog):
    caplog.set_level(logging.INFO, "spear_hf")
    lossy = copies(manifest, tmp_path / "ogg", ".ogg")
    check(lossy, store)
    assert "None of 4 utterances" in caplog.text
    check(lossy, tokens_of(lossy, tmp_path / "tokens"))
    assert "Audio of 4 utterances" in caplog.text


def test_stores_that_do_not_know_their_audio_are_taken_as_they_are(manifest, store, tmp_path, caplog):
    known = TokenStore.open(store)
    with TokenStoreWriter(tmp_path / "store", known.info) as writer:
        for id in known:
            writer.add(id, known[id], known.num_samples(id))
    assert len(check(copies(manifest, tmp_path / "quiet", ".wav", quieter), tmp_path / "store")) == SAMPLES
    assert caplog.text == ""


def test_what_a_run_has_begun_with_is_compared_where_it_has_moved(manifest, store, tmp_path):
    record = tmp_path / "samples.json"
    write_samples(record, check(manifest, store))
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    assert check(copies(manifest, tmp_path / "wav", ".wav"), moved, record) == []
    quiet = copies(manifest, tmp_path / "quiet", ".wav", quieter)
    with pytest.raises(ValueError, match="is not what the run has begun with"):
        check(quiet, moved, record)
    with pytest.raises(ValueError, match=r"speech tokens of .* are not those that the run has begun with"):
        check(manifest, tokens_of(quiet, tmp_path / "other"), record)


def test_a_run_ends_before_anything_is_written(runs, manifest, store, tmp_path):
    output = runs.folder / "quiet"
    other = copies(manifest, tmp_path / "quiet", ".wav", quieter)
    settings = f"targets.speech.store={store}", f"data.manifest={other}"
    planned = ["pretrain", "--config", "tiny", "--dry-run", "--set", *runs.overrides(output, *settings)]
    assert "is not what the speech tokens in" in CliRunner().invoke(app, planned).output
    assert runs.run(output, *settings) == 1
    assert "is not what the speech tokens in" in runs.log(output)
    assert "execution.check_data=false" in runs.log(output)
    assert not output.exists()
    assert runs.run(output, *settings, "execution.check_data=false") == 0, runs.log(output)


def test_a_store_that_is_heard_may_move_and_no_other_takes_its_place(runs, manifest, store, tmp_path):
    output, moved = runs.folder / "heard", tmp_path / "moved"
    heard = "data.manifest=null", f"data.store={store}", f"targets.speech.store={store}"
    assert runs.run(output, *heard) == 0, runs.log(output)
    shutil.copytree(store, moved)
    there = "data.manifest=null", f"data.store={moved}", f"targets.speech.store={moved}"
    assert runs.run(output, *there, "max_steps=3", resume=True) == 0, runs.log(output)
    quiet = tokens_of(copies(manifest, tmp_path / "quiet", ".wav", quieter), tmp_path / "other", with_audio=True)
    for tokens in (quiet, moved):
        other = "data.manifest=null", f"data.store={quiet}", f"targets.speech.store={tokens}"
        assert runs.run(output, *other, "max_steps=4", resume=True) == 1
    log = runs.log(output)
    assert re.search("speech tokens of .* are not those that the run has begun with", log)
    assert re.search(r"The audio of .* is not what the run has begun with \(of 4", log)
