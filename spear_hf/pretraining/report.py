# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf report RUN ...`: what one run recorded, or how several compare, as Markdown and a figure.

Everything comes from the records in the folders of the runs, finished or not; nothing is computed anew.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config_loading import changed_keys
from .metrics import read_json_lines
from .run_folder import RunFolder


# The last so much of the training steps makes the figures "at the end".
LAST_SHARE = 0.05
REPORT, FIGURE = "report.md", "report.png"


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    averaged: list[dict[str, Any]]
    probes: list[dict[str, Any]]

    @property
    def teachers(self) -> list[str]:
        """Names of the targets, speech first."""
        return sorted(self.config["targets"], key=lambda name: (name != "speech", name != "audio", name))

    def at_end(self, key: str) -> float | None:
        """Mean of a metric over the last steps that have it."""
        values = [record[key] for record in self.metrics if record.get(key) is not None]
        return statistics.fmean(values[-max(1, round(LAST_SHARE * len(values))) :]) if values else None

    def median(self, key: str) -> float | None:
        """Median of a metric over all steps."""
        values = [record[key] for record in self.metrics if record.get(key) is not None]
        return statistics.median(values) if values else None


def read_run(path: str | Path) -> RunRecord:
    """ValueError unless `path` is the folder of a run that has recorded a step."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ValueError(f"{path} is not the folder of a run: it has no {folder.config.name}.")
    config = folder.read_config()
    if not isinstance(config.get("targets"), dict):
        raise ValueError(f"{path} is not the folder of a run: its {folder.config.name} names no targets.")
    metrics = read_json_lines(folder.metrics)
    if not metrics:
        raise ValueError(f"{path} has recorded no step yet, so there is nothing to report.")
    return RunRecord(
        name=folder.path.resolve().name,
        config=config,
        metrics=metrics,
        evaluation=read_json_lines(folder.evaluation),
        averaged=read_json_lines(folder.averaged),
        probes=read_json_lines(folder.probes),
    )


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Writes report.md and report.png of one or more runs into the folder `output`; returns the former's path."""
    from ..evaluation.plots import save_figure
    from .report_plots import plot_runs

    runs = _distinct([read_run(folder) for folder in folders])
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    save_figure(plot_runs(runs), target / FIGURE)
    path = target / REPORT
    partial = path.with_name(f".{REPORT}.partial")
    partial.write_text(report_text(runs), encoding="utf-8")
    partial.replace(path)
    return path


def _distinct(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs in folders of one name are numbered."""
    names = [run.name for run in runs]
    return [
        RunRecord(f"{run.name} ({names[: place + 1].count(run.name)})", *list(vars(run).values())[1:])
        if names.count(run.name) > 1
        else run
        for place, run in enumerate(runs)
    ]


def report_text(runs: Sequence[RunRecord]) -> str:
    """The report in Markdown."""
    parts = [f"# {' and '.join(run.name for run in runs) if len(runs) < 3 else f'{len(runs)} runs'}\n"]
    parts.append(_table(["", *(run.name for run in runs)], _rows(runs)))
    parts.append(
        f"Means over the last {LAST_SHARE:.0%} of the steps, medians over all. Accuracies are of single codebook "
        "entries; intervals are of 95 %.\n"
    )
    if len(runs) > 1:
        different = {key for run in runs[1:] for key in changed_keys(runs[0].config, run.config)}
        keys = sorted(different - {"output_dir"})
        rows = [[f"`{key}`", *(str(_look_up(run.config, key)) for run in runs)] for key in keys]
        parts.append("## Settings that differ\n")
        parts.append(_table(["", *(run.name for run in runs)], rows) if rows else "None.\n")
    parts.append(f"![Curves of the training]({FIGURE})\n")
    skipped = [(run, record) for run in runs for record in run.metrics if "skipped" in record]
    if skipped:
        parts.append("## Steps without an update\n")
        rows = [[run.name, str(record["step"]), _culprits(record["skipped"])] for run, record in skipped[-20:]]
        parts.append(_table(["run", "step", "loss or gradient not finite on"], rows))
    return "\n".join(parts)


def _culprits(skipped: list[dict[str, Any]]) -> str:
    return "; ".join(f"rank {part['rank']}: {', '.join(part['utterances'][:5])}" for part in skipped)


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Label and one cell per run; rows that no run has are left out."""

    def rows() -> Iterator[tuple[str, Callable[[RunRecord], str | None]]]:
        yield "steps", lambda run: f"{run.metrics[-1]['step']:,} of {run.config['max_steps']:,}"
        yield (
            "audio heard",
            lambda run: f"{run.metrics[-1]['hours']:,.2f} hours, {run.metrics[-1]['epoch']:.1f} epochs",
        )
        yield "time of the steps", lambda run: f"{sum(r['step_seconds'] for r in run.metrics) / 60:,.1f} minutes"
        yield "loss, training", lambda run: _number(run.at_end("loss"))
        for teacher in dict.fromkeys(name for run in runs for name in run.teachers):
            yield from _teacher_rows(teacher, runs)
        for key in dict.fromkeys(key for run in runs for record in run.probes for key in record):
            if key.endswith("_accuracy"):
                yield f"probe {key.removesuffix('_accuracy')}", functools.partial(_probe, key=key)
        yield "audio per second", lambda run: _number(run.median("audio_seconds_per_second"), "{:,.0f} s")
        yield "MFU", lambda run: _percent(run.median("mfu"))
        yield "waiting for data", lambda run: _percent(run.median("data_wait_share"))
        yield "padding", lambda run: _percent(run.median("padding_share"))
        yield "memory, peak", lambda run: _number(max(r["memory_mb"] for r in run.metrics) / 1000, "{:.1f} GB")
        yield "steps without an update", lambda run: str(sum("skipped" in record for record in run.metrics))

    table = [[label, *(cell(run) or "" for run in runs)] for label, cell in rows()]
    return [row for row in table if any(row[1:])]


def _teacher_rows(teacher: str, runs: Sequence[RunRecord]) -> Iterator[tuple[str, Callable[[RunRecord], str | None]]]:
    yield f"{teacher}: loss on masked frames, training", lambda run: _number(run.at_end(f"{teacher}_masked_loss"))
    yield f"{teacher}: masked accuracy, training", lambda run: _percent(run.at_end(f"{teacher}_masked_accuracy"))

    def held_out(suffix: str) -> Callable[[RunRecord], str | None]:
        return lambda run: _percent(run.evaluation[-1].get(f"{teacher}_{suffix}")) if run.evaluation else None

    yield f"{teacher}: masked accuracy, held out", held_out("masked_accuracy")
    for domain in ("speech", "audio"):
        yield f"{teacher}: the same on {domain}", held_out(f"masked_accuracy_on_{domain}")
    yield (
        f"{teacher}: masked accuracy of the averaged weights, held out",
        lambda run: _percent(run.averaged[-1].get(f"{teacher}_masked_accuracy")) if run.averaged else None,
    )
    yield f"{teacher}: most frequent token, held out", held_out("unigram_accuracy")

    def codebooks(run: RunRecord) -> str | None:
        values = (run.evaluation[-1] if run.evaluation else {}).get(f"{teacher}_codebook_accuracy")
        known = [value for value in values or () if value is not None]
        return f"{_percent(min(known))} to {_percent(max(known))}" if known else None

    yield f"{teacher}: worst to best codebook, held out", codebooks


def _probe(run: RunRecord, key: str) -> str | None:
    records = [record for record in run.probes if record.get(key) is not None]
    if not records:
        return None
    last = records[-1]
    return f"{_percent(last[key])} ({_percent(last[f'{key}_low'])} to {_percent(last[f'{key}_high'])})"


def _number(value: float | None, form: str = "{:.3f}") -> str | None:
    return None if value is None else form.format(value)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"
