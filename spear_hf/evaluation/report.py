# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `evaluate` measured, for people and for the Hub: Markdown, plots, a card's section and its model index.

Everything is read from the report (a JSON object, benchmark.py), so that no number is written by hand.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from torch import nn
from yaml import YAMLError

from ..mvq.atomic_files import write_atomically
from .benchmark import FORMAT, FORMAT_VERSION, file_name
from .heads import HEADS
from .plots import plot_confusion, plot_feature_scores, plot_layer_weights, save_figure, shortened
from .representations import weights_fingerprint


BEGIN, END = "<!-- evaluation: begin, written by spear-hf evaluate -->", "<!-- evaluation: end -->"
METRIC_NAMES = {
    "accuracy": "accuracy",
    "map": "mAP",
    "frame_accuracy": "accuracy of frames",
    "event_f1": "F1 of events",
    "wer": "word error rate",
    "per": "phone error rate",
    "eer": "equal error rate",
    "abx_accuracy": "ABX accuracy",
}
# Of the Hub's model index: type of the task, of the metric.
_HUB_TYPES = {
    "classification": ("audio-classification", "accuracy"),
    "tagging": ("audio-classification", "map"),
    "frames": ("audio-classification", "accuracy"),
    "events": ("audio-classification", "f1"),
    "asr": ("automatic-speech-recognition", "wer"),
    "pr": ("automatic-speech-recognition", "per"),
    "verification": ("audio-classification", "eer"),
    "query": ("audio-classification", "abx_accuracy"),
}
MAX_LABELS = 40  # of a confusion that is drawn


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """A report of `evaluate`. ValueError for another file, or for a version this one does not know."""
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} is no report of spear-hf evaluate")
    if report.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {report.get('format_version')}, known is {FORMAT_VERSION}")
    return report


def _shown(values: Mapping[str, Any], key: str = "value", sign: str = "") -> str:
    """'51.2 (44.0 to 58.1)', in per cent."""
    numbers = [values[name] for name in (key, "low", "high")]
    middle, *ends = ("?" if number is None else f"{100 * number:{sign}.1f}" for number in numbers)
    return f"{middle} ({ends[0]} to {ends[1]})"


def _choice(result: Mapping[str, Any]) -> str:
    return result["features"] if result["head"] == "none" else f"{result['features']}, {result['head']}"


def _further(result: Mapping[str, Any]) -> str:
    """Numbers beside the main one: 'cer 0.412'."""
    more = result.get("more", {})
    return "; ".join(f"{name} {value:.3f}" for name, value in more.items() if isinstance(value, (int, float)))


def _others(record: Mapping[str, Any]) -> str:
    """The best by validation of every head, and of weighted sums, but for the headline's kind: 'mlp on all 51.3'."""
    kinds: dict[tuple[str, bool], tuple[float, Mapping[str, Any]]] = {}
    taken = record["headline"]["head"], record["headline"]["features"] == "weighted"
    for result in record["results"]:
        kind = result["head"], result["features"] == "weighted"
        rank = -float("inf") if result["validation"] is None else result["validation"]
        if kind != taken and result["head"] != "none" and (kind not in kinds or rank > kinds[kind][0]):
            kinds[kind] = rank, result
    return "; ".join(
        f"{head} on {found['features']} {100 * found['value']:.1f}" for (head, _), (_, found) in kinds.items()
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """A name as Markdown takes it within a row of a table."""
    return " ".join(text.replace("|", "\\|").split())


def markdown(report: Mapping[str, Any]) -> str:
    """The report: a table for each task, with intervals and differences to the first model."""
    settings, lines = report["settings"], ["# Evaluation of frozen representations", ""]
    lines += [
        "All figures are in per cent. Intervals: 95 %, percentiles of "
        f"{settings['resamples']} bootstrap samples of the test clips, or of groups of them, drawn alike for all "
        f"rows. Seed {settings['seed']}; {settings['seeds']} run(s) of heads trained by gradient, grid "
        f"`{settings['grid']}`. "
        "Features and head of a row are those with the best validation score, as protocols.py says (of ABX tests: on "
        "the other half of the items); beside it stand the best ones of other kinds, and report.json has all.",
        "",
    ]
    for name, task in report["tasks"].items():
        better = "larger is better" if task["higher_is_better"] else "smaller is better"
        counts = ", ".join(f"{count} {part}" for part, count in task["clips"].items() if count)
        chance = "" if task["chance"] is None else f" Chance: {100 * task['chance']:.1f}."
        metric = METRIC_NAMES[task["metric"]]
        revision = f" Revision {task['hub']['revision']} of {task['source']}." if task.get("hub") else ""
        shared = task.get("test_clips_in_training")
        warning = f" **{shared} test clips are trained on too.**" if shared else ""
        if groups := task.get("test_groups_in_training"):
            warning += f" **{groups} speakers or groups of the test clips are in training too.**"
        drawn = f"bootstrap of {task['bootstrap_units']} units"
        lines += [f"## {_cell(name)}", ""]
        lines += [f"{task['kind']}; {metric}, {better}; clips: {counts}; {drawn}.{chance}{revision}{warning}", ""]
        model = report["models"][0] if report["models"] else None
        header = ["representation", metric, "features, head", "further metrics", "other heads"]
        if model:
            header.append(f"{model} minus this")
        lines += [_row(header), "|" + "---|" * len(header)]
        for other, entry in report["representations"].items():
            record = entry["tasks"][name]
            cells = [other, _shown(record["headline"]), _choice(record["headline"])]
            cells += [_further(record["headline"]), _others(record)]
            if model:
                minus = report["representations"][model]["tasks"][name]["minus"]
                cells.append("" if other == model else _shown(minus[other], "mean", "+"))
            lines.append(_row(cells))
        lines.append("")
    return "\n".join(lines)


def write_plots(report: Mapping[str, Any], folder: str | os.PathLike) -> list[Path]:
    """Scores by layer, learned layer weights and the confusion of the first model (or representation), as PNG."""
    written = []
    for name, task in report["tasks"].items():
        stem = file_name(name)
        entries = {other: entry["tasks"][name]["results"] for other, entry in report["representations"].items()}
        shown = shortened(name)
        title = f"{shown}: {METRIC_NAMES[task['metric']]} of frozen features (%)"
        figure = plot_feature_scores(entries, title)
        written.append(save_figure(figure, Path(folder) / f"{stem}-layers.png"))
        weights = {other: found for other, results in entries.items() if (found := _weights(results))}
        if weights:
            figure = plot_layer_weights(weights, f"{shown}: learned weights of the layers")
            written.append(save_figure(figure, Path(folder) / f"{stem}-weights.png"))
        first = report["models"][0] if report["models"] else next(iter(entries))
        table = report["representations"][first]["tasks"][name]["headline"].get("more", {}).get("confusion")
        if table is not None and len(table) <= MAX_LABELS:
            figure = plot_confusion(table, task["labels"], f"{shown}: {shortened(first)}")
            written.append(save_figure(figure, Path(folder) / f"{stem}-confusion.png"))
    return written


def _weights(results: list[Mapping[str, Any]]) -> list[float] | None:
    """Of the linear head, or of any; the mean over seeds and folds."""
    for head in HEADS:
        for result in results:
            if result["features"] == "weighted" and result["head"] == head:
                rows = [run["layer_weights"] for run in result["heads"]]
                return [sum(column) / len(rows) for column in zip(*rows)]
    return None


def write_report(report: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """report.md and the plots, beside report.json."""
    images = write_plots(report, folder)
    text = markdown(report) + "".join(f"\n![{image.stem}]({image.name})\n" for image in images)
    path = Path(folder) / "report.md"
    write_atomically(path, text.encode())
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------------------------------


def evaluation_section(report: Mapping[str, Any], name: str) -> str:
    """A card's section on the model `name` of the report, between the marks by which it is found again."""
    _known(report, name)
    rows = []
    others = [other for other in report["representations"] if other != name]
    for task, facts in report["tasks"].items():
        record = report["representations"][name]["tasks"][task]
        cells = [task, METRIC_NAMES[facts["metric"]], _shown(record["headline"]), _choice(record["headline"])]
        cells += [_shown(report["representations"][other]["tasks"][task]["headline"]) for other in others]
        rows.append(_row(cells))
    header = ["task", "metric", "this model", "features, head", *others]
    text = (
        "The encoder is frozen; a head, or nothing, is trained on its features. Figures in per cent, with 95 % "
        f"intervals by bootstrap over the test clips ({report['settings']['resamples']} samples). Features and head "
        "were chosen on validation clips, for every column by itself."
    )
    table = [_row(header), "|" + "---|" * len(header), *rows]
    version = f"Measured with spear_hf {report['versions']['spear_hf']}, `spear-hf evaluate`."
    return "\n".join([BEGIN, "## Evaluation", "", text, "", *table, "", version, END])


def model_index(report: Mapping[str, Any], name: str) -> list[EvalResult]:
    """Results of the model `name` for the metadata of its card.

    The Hub's library writes results of one dataset, configuration and split under the name of the first of them. Tasks
    from here thus have a configuration of their own, and of several tasks of one dataset of the Hub the metrics say
    which.
    """
    _known(report, name)
    results: list[EvalResult] = []
    for task, facts in report["tasks"].items():
        headline = report["representations"][name]["tasks"][task]["headline"]
        task_type, metric_type = _HUB_TYPES[facts["kind"]]
        hub = facts.get("hub") or {}
        results.append(
            EvalResult(
                task_type=task_type,
                dataset_type=facts["source"] if hub else re.sub(r"[^\w.-]+", "-", facts["source"]),
                dataset_name=task,
                dataset_config=hub.get("config") if hub else task,
                dataset_split=facts.get("split", "test"),
                dataset_revision=hub.get("revision"),
                metric_type=metric_type,
                metric_name=f"{METRIC_NAMES[facts['metric']]} (frozen encoder; {_choice(headline)})",
                metric_value=round(headline["value"], 4),
            )
        )
    counts = Counter(result.unique_identifier for result in results)
    for result in results:
        if counts[result.unique_identifier] > 1:
            result.metric_name = f"{result.dataset_name}: {result.metric_name}"
    return results


def read_card(path: Path) -> ModelCard:
    """ValueError for one whose metadata cannot be read, and would be lost."""
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, YAMLError) as error:
        raise ValueError(f"the metadata of {path}, between the lines ---, cannot be read: {error}") from error


def add_to_card(card: str | os.PathLike, report: Mapping[str, Any], name: str | None = None) -> None:
    """Puts the section and the model index of a report into a card (a README.md), in place of those of an earlier one.

    `name`: of the model in the report; by default its only one. ValueError if there is none, or there are several.
    """
    path = Path(card)
    if name is None:
        if len(report["models"]) != 1:
            raise ValueError(f"the report has {len(report['models'])} models; name one: {', '.join(report['models'])}")
        name = report["models"][0]
    section = evaluation_section(report, name)
    document = read_card(path)
    text = document.text
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    data: Any = document.data
    ours = model_index(report, name)
    taken = {result.dataset_name for result in ours}
    data.eval_results = [*(old for old in data.eval_results or [] if old.dataset_name not in taken), *ours]
    data.model_name = data.model_name or name.split("/")[-1]
    start = "" if text.startswith("\n") else "\n"
    write_atomically(path, f"---\n{data.to_yaml()}\n---\n{start}{text}".encode())


def name_of(report: Mapping[str, Any], model: nn.Module) -> str:
    """What an encoder, or a model with a head on one, is called in a report. ValueError if it was not evaluated."""
    weights = weights_fingerprint(getattr(model, "base_model", model))
    for name, entry in report["representations"].items():
        if entry["weights"] == weights:
            return name
    raise ValueError("the report is not of this model: its weights or its configuration were others")


def _known(report: Mapping[str, Any], name: str) -> None:
    if name not in report["representations"]:
        raise ValueError(f"{name} is not in the report, which has {', '.join(report['representations'])}")
