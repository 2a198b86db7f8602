#!/usr/bin/env python3
# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The cards of the published checkpoints, from `published.json` (the facts) and `published.md` (the text).

python model_cards/render.py            # writes model_cards/published/*.md
python model_cards/render.py --check    # exit code 1 if a committed card is another
"""

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from spear_hf.evaluation.card import fill_template


FOLDER = Path(__file__).parent
TEACHERS = {
    "speech": "WavLM Large",
    "speech+audio": "WavLM Large and, for audio, of Dasheng 1.2B",
}
MIXING = (
    "In part of the utterances a second one was mixed in, and its tokens with it, which the first version had not."
)

# Where the checkpoint is; the second for an id that no file or page read for this project names.
SEEN = ", as its authors\npublished it at [{id}](https://huggingface.co/{id})."
INFERRED = (
    ".\nIts repository id, `{id}`, is inferred from the names of the other checkpoints: the repository was not\n"
    "seen when this card was written. Check that it exists; the card says what the paper and the others let expect."
)


def render(checkpoint: dict[str, Any], facts: dict[str, Any]) -> str:
    """The card of one checkpoint: metadata for the Hub, then Markdown."""
    size, paper = facts["sizes"][checkpoint["size"]], facts["paper"]
    rate = "50 frames a second"
    if checkpoint["version"] == 1 and checkpoint["domains"] == "speech+audio":
        rate += ", or 25 where the checkpoint's `config.json` has `output_downsampling_factor` 2"
    reference = paper["reference"]["results"]
    results = paper["results"][f"{checkpoint['size']} {checkpoint['domains']}"]
    rows = [f"| {paper['measures'][key]} | {value} | {reference.get(key, '–')} |" for key, value in results.items()]
    whereabouts = INFERRED if checkpoint.get("id_inferred") else SEEN
    domains = checkpoint["domains"].replace("+", " and general ")
    values = {
        **checkpoint,
        "name": checkpoint["id"].split("/")[1],
        "size": size,
        "whereabouts": whereabouts.format(id=checkpoint["id"]),
        "domains": domains,
        "output": f"{size['hidden_size']} values, {rate}; the layers' states at 50 Hz",
        "states": size["num_hidden_layers"] + 1,
        "teachers": TEACHERS[checkpoint["domains"]],
        "mixing": f"{MIXING} " if checkpoint["version"] == 2 else "",
        "results": "\n".join(rows),
        "paper": paper,
        "title": f"{{{paper['title']}}}",
        "authors": f"{{{paper['authors']}}}",
        "year": f"{{{paper['year']}}}",
    }
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["spear", "speech", *(["audio"] if "audio" in domains else []), "self-supervised", "zipformer"],
    )
    text = fill_template((FOLDER / "published.md").read_text(encoding="utf-8"), values)
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def render_all() -> dict[Path, str]:
    """Every card by the file it belongs in."""
    facts = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
    return {
        FOLDER / "published" / f"{checkpoint['id'].split('/')[1]}.md": render(checkpoint, facts)
        for checkpoint in facts["checkpoints"]
    }


def main(arguments: list[str]) -> int:
    cards = render_all()
    if arguments == ["--check"]:
        old = [path for path, text in cards.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        for path in old:
            print(f"{path} is not what render.py writes", file=sys.stderr)
        return 1 if old else 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path, text in cards.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
