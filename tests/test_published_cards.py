# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The cards of the published checkpoints: rendered from their data, fit for the Hub, with usage that runs."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from spear_hf import SpearConfig, SpearModel
from spear_hf.hub_checks import check_card

from .conftest import ROOT


FOLDER = ROOT / "model_cards"
FACTS = json.loads((FOLDER / "published.json").read_text())
CARDS = sorted((FOLDER / "published").glob("*.md"))
PUBLISHED = [
    "spear-base-speech",
    "spear-base-speech-v2",
    "spear-base-speech-audio",
    "spear-base-speech-audio-v2",
    "spear-large-speech",
    "spear-large-speech-audio",
    "spear-large-speech-audio-v2",
    "spear-xlarge-speech-audio",
    "spear-xlarge-speech-audio-v2",
]
INFERRED = {"spear-base-speech"}  # an id that follows from the others', of a repository that was not seen
every_card = pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def renderer():
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_cards_are_those_rendered(renderer):
    rendered = renderer.render_all()
    assert sorted(rendered) == CARDS
    assert {path.stem for path in CARDS} == set(PUBLISHED)
    for path, text in rendered.items():
        assert path.read_text() == text, path.name


def test_check_finds_another_card(renderer, tmp_path, monkeypatch, capsys):
    for name in ("published.json", "published.md"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    monkeypatch.setattr(renderer, "FOLDER", tmp_path)
    assert renderer.main(["--check"]) == 1  # none there
    assert renderer.main([]) == 0
    assert renderer.main(["--check"]) == 0
    card = tmp_path / "published" / CARDS[0].name
    card.write_text(card.read_text().replace("Apache-2.0", "MIT"))
    capsys.readouterr()
    assert renderer.main(["--check"]) == 1
    assert card.name in capsys.readouterr().err
    assert renderer.main(["--chekc"]) == 2


@every_card
def test_metadata(card):
    assert check_card(card) == []
    data = ModelCard.load(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "feature-extraction")
    assert ("audio" in data.tags) == ("audio" in card.stem)
    assert data.eval_results is None  # no figure is claimed as measured


@every_card
def test_what_the_card_says(card):
    text = card.read_text()
    facts = next(row for row in FACTS["checkpoints"] if row["id"].split("/")[1] == card.stem)
    assert f"# {card.stem}\n" in text
    assert set(re.findall(r"marcoyang/[\w-]+", text)) == {facts["id"]}
    assert ("is inferred from the names of the other checkpoints" in text) == (card.stem in INFERRED)
    assert (f"(https://huggingface.co/{facts['id']})" in text) == (card.stem not in INFERRED)
    assert f"{facts['hours']:,} hours" in text
    assert ("a second one was mixed in" in text) == (facts["version"] == 2)
    assert "the paper's" in text.split("## Results in the paper")[1].split("\n|")[0]
    results = FACTS["paper"]["results"][f"{facts['size']} {facts['domains']}"]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", text.split("|---|---|---|\n")[1], re.M)]
    assert [row[1] for row in rows] == list(results.values())
    for heading in ("Usage", "Training", "Limits", "Citation"):
        assert f"## {heading}\n" in text
    assert FACTS["paper"]["title"] in text


@pytest.mark.parametrize("size", FACTS["sizes"])
def test_sizes_are_those_of_the_configurations(size):
    facts, config = FACTS["sizes"][size], getattr(SpearConfig, size)()
    assert (config.hidden_size, config.num_hidden_layers) == (facts["hidden_size"], facts["num_hidden_layers"])
    with torch.device("meta"):
        model = SpearModel(config)
    left_over = config.num_hidden_layers * config.hidden_size  # in the published files, unused
    assert sum(value.numel() for value in model.parameters()) + left_over == facts["parameters"]


@every_card
def test_usage_runs(card, golden_folder, tmp_path, monkeypatch, capsys):
    facts = next(row for row in FACTS["checkpoints"] if row["id"].split("/")[1] == card.stem)
    shutil.copytree(golden_folder, tmp_path / facts["id"])
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.S)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["torch.Size([2, 46, 32])", "tensor([46, 21])", "9"]
