# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards from a template and the report of a run: a number that no run produced cannot appear as measured.

A template is Markdown with `{{place}}` or `{{place|form}}`: `place` is a dotted path into the report (a JSON object),
`form` one of `FORMS`. A place that the report lacks is an error, never a blank. The metadata (licence, results for the
Hub's model index) come from the report too.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..mvq.atomic_files import write_atomically


REPORT_NAME = "evaluation.json"
"""A report of `spear-hf evaluate` in a model's folder, which the card that `spear-hf publish` writes then states."""
PLACEHOLDER = re.compile(r"\{\{\s*([\w.]+)\s*(?:\|\s*(\w+)\s*)?\}\}")


def _interval(value: Mapping[str, float]) -> str:
    return f"{100 * value['accuracy']:.1f} % ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def _signed_interval(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} points ({100 * value['low']:+.1f} to {100 * value['high']:+.1f})"


FORMS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:g}",
    "fixed1": lambda value: f"{value:.1f}",
    "fixed2": lambda value: f"{value:.2f}",
    "minutes": lambda value: f"{value / 60:.1f}",
    "percent": lambda value: f"{100 * value:.1f} %",
    "interval": _interval,  # of {"accuracy", "low", "high"}
    "signed_interval": _signed_interval,  # of {"mean", "low", "high"}
}


class CardError(ValueError):
    """A card that the report cannot fill."""


def lookup(report: Mapping[str, Any], place: str) -> Any:
    """The value at a dotted path; CardError naming the first part that is missing, null or not finite."""
    value: Any = report
    for part in place.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise CardError(f"The report has no `{place}` (missing: `{part}`), so the card cannot state it.")
        value = value[part]
    numbers = value.values() if isinstance(value, Mapping) else [value]
    if any(number is None or (isinstance(number, float) and not math.isfinite(number)) for number in numbers):
        raise CardError(f"`{place}` of the report is {value!r}, so the card cannot state it.")
    return value


def fill_template(template: str, report: Mapping[str, Any]) -> str:
    """The template with every placeholder replaced from the report."""

    def replace(match: re.Match[str]) -> str:
        place, form = match.group(1), match.group(2) or "text"
        if form not in FORMS:
            raise CardError(f"{match.group(0)}: unknown form {form!r}; known are {', '.join(FORMS)}.")
        value = lookup(report, place)
        try:
            return FORMS[form](value)
        except (TypeError, ValueError, KeyError) as error:
            raise CardError(f"{match.group(0)}: {value!r} cannot be written in this form ({error!r}).") from None

    filled = PLACEHOLDER.sub(replace, template)
    if "{{" in filled:
        line = next(line for line in filled.splitlines() if "{{" in line)
        raise CardError(f"The template has a placeholder that cannot be read: {line.strip()!r}.")
    return filled


def card_metadata(report: Mapping[str, Any]) -> ModelCardData:
    """Metadata for the Hub, with the probe's results as its model index."""
    results = [
        EvalResult(
            task_type="audio-classification",
            dataset_type=re.sub(r"[^\w.-]+", "-", lookup(report, "data.name")),
            dataset_name=f"{lookup(report, 'data.name')}, {lookup(report, 'probe.task')}",
            dataset_split=lookup(report, "probe.test_split"),
            metric_type="accuracy",
            metric_name="Accuracy of the probe (frozen encoder)",
            metric_value=round(lookup(report, "probe.pretrained.accuracy"), 4),
        )
    ]
    return ModelCardData(
        model_name=lookup(report, "model.name"),
        license=lookup(report, "model.license"),
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["spear", "audio", "speech", "self-supervised", "spear_hf"],
        eval_results=results,
    )


def model_card(report: Mapping[str, Any], template: str) -> ModelCard:
    """The card as an object of huggingface_hub."""
    return ModelCard(f"---\n{card_metadata(report).to_yaml()}\n---\n\n{fill_template(template, report)}")


def write_card(report: str | os.PathLike, template: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Fills the file `template` from the file `report` and writes README.md into the model's `folder`."""
    content = model_card(
        json.loads(Path(report).read_text(encoding="utf-8")), Path(template).read_text(encoding="utf-8")
    ).content
    path = Path(folder) / "README.md"
    write_atomically(path, content.encode())
    return path
