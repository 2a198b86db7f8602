# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/experiment_pretraining.py, in small: every arm, the probes and the page."""

import csv
import sys

import pytest

from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata

from .conftest import ROOT
from .test_token_examples import load


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_experiment_on_bundled_audio(tmp_path, monkeypatch):
    experiment = load("experiment_pretraining")
    bundled = ROOT / "examples" / "data"
    teacher = load_teacher("kaldi-mfcc")
    rows = [row for row in read_manifest(bundled, split="pretrain") if (row.num_samples or 0) > 16000]
    chosen = {
        "speech": [row for row in rows if row.domain == "speech"][:20]
        + [row for row in rows if row.domain == "audio"][:20],
        "audio": [row for row in rows if row.domain == "audio"][:20],
    }
    for name, utterances in chosen.items():
        tokenizer = MvqTokenizer(teacher, MultiCodebookQuantizer(39, 16, 2, **quantizer_metadata(teacher)))
        tokenize_corpus(tokenizer, utterances, tmp_path / name, progress=False)
    monkeypatch.setattr(experiment, "PROBES", {"instrument_family": "instruments"})
    command = ["experiment", str(bundled), "--steps", "2", "--work", str(tmp_path / "work")]
    command += ["--speech-tokens", str(tmp_path / "speech"), "--audio-tokens", str(tmp_path / "audio")]
    command += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    experiment.main()
    table = list(csv.DictReader((tmp_path / "out" / "pretraining.csv").open()))
    arms = [arm.name for arm in experiment.ARMS]
    assert list(dict.fromkeys(row["representation"] for row in table)) == ["log-mel", "random", *arms]
    assert all(0 < float(row["accuracy"]) < 1 for row in table)
    assert {row["steps"] for row in table if row["representation"] in arms} == {"2"}
    text = (tmp_path / "out" / "pretraining.md").read_text()
    assert all(f"| {arm} |" in text for arm in arms)
    assert str(tmp_path) not in text
    assert (tmp_path / "out" / "pretraining.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    experiment.main()  # nothing is trained anew
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    command[command.index("--steps") + 1] = "3"
    with pytest.raises(SystemExit, match=r"work/single was trained with another max_steps, schedule.decay_steps"):
        experiment.main()
