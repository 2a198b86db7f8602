# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: every number comes from the report, and the metadata are what the Hub takes."""

import copy
import json
import re

import pytest
from huggingface_hub import ModelCard

from spear_hf.evaluation.card import PLACEHOLDER, CardError, fill_template, model_card, write_card
from spear_hf.hub_checks import check_card

from .conftest import ROOT


TEMPLATE = ROOT / "model_cards" / "template.md"
REPORT = {
    "masked_accuracy": 0.3123,
    "unigram_accuracy": 0.1042,
    "seed": 7,
    "wall_seconds": 390.0,
    "peak_memory_mb": 2345.6,
    "model": {
        "name": "SPEAR demo",
        "license": "apache-2.0",
        "encoder_parameters": 2987654,
        "hidden_size": 128,
        "num_hidden_layers": 7,
        "num_mel_bins": 128,
        "frame_rate": 50.0,
    },
    "data": {
        "name": "bundled audio",
        "training_split": "pretrain",
        "training_utterances": 312,
        "training_hours": 0.364,
        "heldout_utterances": 35,
    },
    "tokens": {"teacher": "kaldi-mfcc", "num_codebooks": 4, "codebook_size": 64, "frame_rate": 50.0},
    "training": {"steps": 600, "epochs": 9.7, "batch_seconds": 15.0, "optimizer": "adamw", "learning_rate": 0.003},
    "stages": {"pretrain": {"seconds": 270.0}},
    "versions": {"spear_hf": "0.1.0", "torch": "2.11.0", "transformers": "5.23.0", "python": "3.11.7"},
    "probe": {
        "task": "instrument_family",
        "classes": 10,
        "train_utterances": 300,
        "test_utterances": 205,
        "test_split": "probe_test",
        "features": "all layers",
        "pretrained": {"accuracy": 0.51234, "low": 0.44, "high": 0.58},
        "random": {"accuracy": 0.41, "low": 0.34, "high": 0.48},
        "log_mel": {"accuracy": 0.38, "low": 0.31, "high": 0.44},
        "pretrained_minus_random": {"mean": 0.10234, "low": 0.03, "high": 0.17},
    },
}
REPORT["linear_probe"] = REPORT["probe"] | {"pretrained": {"accuracy": 0.4321, "low": 0.4, "high": 0.5}}


@pytest.fixture
def template():
    return TEMPLATE.read_text(encoding="utf-8")


def test_the_template_is_filled_and_its_metadata_are_valid(tmp_path, template):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    path = write_card(tmp_path / "report.json", TEMPLATE, tmp_path)
    assert path == tmp_path / "README.md"
    assert check_card(path) == []
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_value == 0.5123
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert "{{" not in card.text
    for text in (
        "31.2 %",
        "51.2 % (44.0 to 58.0)",
        "+10.2 points (+3.0 to +17.0)",
        "43.2 % (40.0 to 50.0)",
        "2,987,654",
        "6.5 for the whole",
    ):
        assert text in card.text


def test_no_measured_number_is_written_in_the_template(template):
    measured = template.split("## Measured")[1].split("\n## ")[0]
    assert re.findall(r"\d+", PLACEHOLDER.sub("", measured)) == ["95"]  # of the intervals


def test_a_place_that_no_run_filled_is_an_error(template):
    for place in sorted({match.group(1) for match in PLACEHOLDER.finditer(template)}):
        for change in ("missing", "null"):
            report = copy.deepcopy(REPORT)
            *parents, last = place.split(".")
            inner = report
            for parent in parents:
                inner = inner[parent]
            if change == "missing":
                del inner[last]
            else:
                inner[last] = None
            with pytest.raises(CardError, match=re.escape(place)):
                model_card(report, template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{seed|roman}}", "unknown form 'roman'"),
        ("{{model|percent}}", "cannot be written in this form"),
        ("{{ seed", "cannot be read: '{{ seed'"),
        ("{{stages.embed.seconds}}", "missing: `embed`"),
    ],
)
def test_wrong_templates(template, message):
    with pytest.raises(CardError, match=re.escape(message)):
        fill_template(template, REPORT)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(CardError, match="nan"):
        fill_template("{{masked_accuracy|percent}}", REPORT | {"masked_accuracy": float("nan")})
