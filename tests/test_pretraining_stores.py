# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs without a manifest: from a token store that has its audio, in a folder or on the Hub, of one teacher or two.

The same utterances and tokens give the same run as from files, bit for bit.
"""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.merge import merge_stores
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.corpus import load_corpus
from spear_hf.pretraining.run_folder import RunFolder
from spear_hf.pretraining.sources import settle_sources
from spear_hf.pretraining.targets import prepare_stores

from .conftest import ROOT
from .hub_process import GOOD, Client
from .hub_server import HubServer
from .pretraining_runs import Runs, assert_same_run, has_steps, kill, wait_for


STEPS = 20
# Everything that depends on what a manifest tells: domains and their weights, splits, mixing of noise and of tokens.
SETTINGS = (
    f"max_steps={STEPS}",
    "checkpoint_every=5",
    "logging.trackers=[]",
    "execution.cache_audio=false",
    "data.batch_seconds=2.5",
    "data.domain_weights.audio=2",
    "mixing.noise_probability=0.5",
    "mixing.token_probability=0.5",
    "targets.speech.teacher=null",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("stores"), *SETTINGS)


@pytest.fixture(scope="module")
def stores(runs) -> dict[str, Path]:
    """Of two teachers over the clips: `speech` with the audio, `audio` without, and both merged."""
    teacher, utterances = load_teacher("kaldi-mfcc"), read_manifest(runs.manifest)
    made = {}
    for name, codebooks in (("speech", 2), ("audio", 4)):
        quantizer = MultiCodebookQuantizer(39, 16, codebooks, **quantizer_metadata(teacher))
        made[name] = runs.folder / "tokens" / name
        tokenizer = MvqTokenizer(teacher, quantizer)
        tokenize_corpus(tokenizer, utterances, made[name], progress=False, with_audio=name == "speech")
    merge_stores(runs.folder / "tokens" / "both", made, progress=False)
    return {**made, "both": runs.folder / "tokens" / "both"}


def only(store: object) -> tuple[str, ...]:
    """What a run of a store with audio is told: no manifest."""
    return "data.manifest=null", f"targets.speech.store={store}"


@pytest.fixture(scope="module")
def from_files(runs, stores) -> Path:
    output = runs.folder / "from-files"
    assert runs.run(output, f"targets.speech.store={stores['speech']}") == 0, runs.log(output)
    return output


def test_a_store_with_audio_knows_what_a_manifest_knows(runs, stores):
    joined, merged = (TokenStore.open(stores[name], any_teacher=True) for name in ("speech", "both"))
    expected = [(u.id, u.domain, u.split, u.num_samples) for u in read_manifest(runs.manifest)]
    assert {domain for _, domain, _, _ in expected} == {"speech", "audio"}
    for store in (joined, merged):
        assert [(u.id, u.domain, u.split, u.num_samples) for u in store.utterances()] == expected
    with pytest.raises(ValueError, match="was made without audio"):
        TokenStore.open(stores["audio"]).utterances()


def test_a_store_of_before_domains_were_kept_is_one_of_speech(stores, tmp_path):
    shutil.copytree(stores["speech"], tmp_path / "store")
    index = tmp_path / "store" / "index.parquet"
    pq.write_table(pq.read_table(index).drop_columns(["domain", "split"]), index)
    found = TokenStore.open(tmp_path / "store").utterances()
    assert [utterance.id for utterance in found] == TokenStore.open(stores["speech"]).ids
    assert {(utterance.domain, utterance.split) for utterance in found} == {(None, None)}


def test_a_joined_store_trains_as_the_files_do_and_resumes_after_a_kill(runs, stores, from_files):
    output = runs.folder / "joined"
    process = runs.start(output, *only(stores["speech"]))
    wait_for(has_steps(output, STEPS // 2), process)
    kill([process])
    code = runs.run(output, *only(stores["speech"]), "execution.num_workers=2", resume=True)
    assert code == 0, runs.log(output)
    assert "Resuming from" in runs.log(output)
    assert_same_run(output, from_files)


def test_a_merged_store_trains_as_the_files_do(runs, stores):
    teachers = {name: f"targets.{name}.store={stores[name]}" for name in ("speech", "audio")}
    merged = [f"targets.{name}.store={stores['both']}#{name}" for name in teachers]
    expected, output, named = (runs.folder / name for name in ("two", "merged", "named"))
    assert runs.run(expected, *teachers.values(), "max_steps=4") == 0, runs.log(expected)
    assert runs.run(output, "data.manifest=null", *merged, "max_steps=4") == 0, runs.log(output)
    assert_same_run(output, expected)
    heard = ("data.manifest=null", f"data.store={stores['both']}")  # the tokens from other stores than the audio
    assert runs.run(named, *heard, *teachers.values(), "max_steps=4") == 0, runs.log(named)
    assert_same_run(named, expected)


def test_a_store_of_the_hub_trains_as_the_files_do_and_stays_at_its_commit(runs, stores, from_files):
    """By the real client. Between the two halves of the run, the branch gets other tokens."""
    output, repo = runs.folder / "from-hub", "tester/joined"
    begun = runs.overrides(output, *only(repo), "max_steps=10")
    ended = runs.overrides(output, *only(repo))
    with HubServer(tokens={GOOD: "tester"}) as hub:
        task = {"repo": repo, "store": str(stores["speech"]), "other": str(stores["both"]), "runs": [begun, ended]}
        client = Client(hub, "pretrain", runs.folder / "client", task, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        results = client.result()
        client.process.wait()
    assert results["codes"] == [0, 0], client.errors()
    assert json.loads((output / "sources.json").read_text()) == {repo: f"{repo}@{results['commit']}"}
    assert results["downloaded"] == ["index.parquet", "metadata.json", "tokens-00000.parquet"]
    # The first half validated at its own end.
    assert (output / "evaluation.jsonl").read_text() == (from_files / "evaluation.jsonl").read_text()
    assert_same_run(output, from_files)


def test_the_index_of_a_store_is_held_once(runs, stores, tmp_path):
    teachers = [f"targets.{name}.store={stores['both']}#{name}" for name in ("speech", "audio")]
    folder = RunFolder(tmp_path / "run")
    for heard in (), (f"data.store={stores['speech']}",):
        config = load_config("tiny", runs.overrides(folder.path, "data.manifest=null", *teachers, *heard))
        config = settle_sources(config, folder)
        corpus = load_corpus(config.data, config.seed)
        opened = prepare_stores(config, config.targets, corpus, folder)
        held = {id(store._ids) for store in (corpus.store, *opened.values())}
        assert len(held) == 1 + len(heard)
        for name, store in opened.items():
            alone = TokenStore.open(stores[name])
            assert store.info == alone.info
            assert store.rows_of_utterances(corpus.training).tolist() == alone.rows_of(corpus.training.ids).tolist()


def call(runs: Runs, output: Path, *more: str) -> str:
    """What the command prints, in this process: for what ends before any training."""
    arguments = ["pretrain", "--config", "tiny", "--dry-run", "--set", *runs.overrides(output, *more)]
    return CliRunner().invoke(app, arguments).output


def test_the_plan_of_a_joined_store_is_that_of_the_files(runs, stores, tmp_path):
    plans = [
        call(runs, tmp_path / "run", *settings)
        for settings in ((f"targets.speech.store={stores['speech']}",), only(stores["speech"]))
    ]
    plans = [re.sub("about .* hours if", "", plan) for plan in plans]  # by a measurement
    assert plans[0] == plans[1]
    assert "16 utterances" in plans[0]


def test_what_cannot_be_heard_is_refused(runs, stores, tmp_path):
    output = tmp_path / "run"
    message = call(runs, output, *only(stores["audio"]))
    assert "There is nothing to hear" in message
    assert "--with-audio" in message
    assert "was made without audio" in call(runs, output, "data.manifest=null", f"data.store={stores['audio']}")
    assert "manifest and store are both set" in call(runs, output, f"data.store={stores['speech']}")


def test_damaged_audio_is_named(runs, stores, tmp_path):
    shutil.copytree(stores["speech"], tmp_path / "store")
    shard = tmp_path / "store" / "tokens-00000.parquet"
    content = bytearray(shard.read_bytes())
    place = content.index(b"fLaC") + 3000  # within the first file
    content[place : place + 8] = bytes(byte ^ 255 for byte in content[place : place + 8])
    shard.write_bytes(content)
    output = tmp_path / "run"
    assert runs.run(output, *only(tmp_path / "store"), "logging.validate_every=0") == 1
    assert f"{shard} is damaged" in runs.log(output)
