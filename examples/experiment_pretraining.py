# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What pre-training gives a small encoder, and what its parts are worth: ablations with equal budgets, on a CPU.

    python examples/experiment_pretraining.py CORPUS --speech-tokens STORE --audio-tokens STORE \\
        --whisper WHISPER --musicnn MUSICNN.pt

CORPUS: a folder with a manifest.jsonl of domains speech and audio, and the labelled probes named below. The stores, as
`spear-hf tokenize` writes them, hold the tokens of the utterances to train on; the probes' own are never among them.
WHISPER and MUSICNN.pt are the teachers that made the tokens: their own scores are the ceiling.

Every arm is `spear-hf pretrain --config examples/configs/experiment.yaml` with the settings in ARMS, for as many steps
of as many seconds of audio. Arms, probes and features lie in `--work`; an interrupted run goes on where it was. The
results go to `--output`: pretraining.csv, pretraining.png, pretraining.md.

Where a GPU is lent for minutes, train on it with `--train-only`, and bring `--work` back for the rest: of each arm
config.yaml, metrics.jsonl, evaluation.jsonl and final/.
"""

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForPreTraining, SpearModel
from spear_hf.data.decoding import load_utterance
from spear_hf.data.manifest import Utterance, read_manifest
from spear_hf.data.seeding import keyed_seed
from spear_hf.evaluation.plots import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure, styled
from spear_hf.evaluation.probe import (
    ProbeResult,
    concatenated,
    linear_probe,
    log_mel_features,
    paired_difference,
    pooled_features,
)
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.teachers import Teacher, load_teacher
from spear_hf.pretraining.config import FREE_ON_RESUME, MAY_MOVE, PreTrainingConfig, load_config
from spear_hf.pretraining.config_loading import build, changed_keys, to_plain
from spear_hf.pretraining.metrics import read_json_lines
from spear_hf.pretraining.run_folder import RunFolder


ROOT = Path(__file__).resolve().parent.parent
CONFIG = "examples/configs/experiment.yaml"
PROBES = {"asterisk_words": "words, new speakers", "instrument_family": "instruments, new sound bank"}
LOG_MEL, RANDOM = "log-mel", "random"


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    what: str
    settings: tuple[str, ...] = ()
    domains: tuple[str, ...] = ("speech", "audio")


# Eden falls over the run as it does over the paper's; {batches} and {hours} are those of the run.
SCALED_ADAM = (
    "optimizer.name=scaled_adam", "optimizer.learning_rate=0.045",
    "schedule.name=eden", "schedule.warmup_start=0.5",
    "schedule.eden_batches={batches}", "schedule.eden_hours={hours}",
)  # fmt: skip
MIXING = ("mixing.noise_probability=0.5", "mixing.token_probability=0.1")
REGULARIZERS = ("regularizers.enabled=true",)
ARMS = (
    Arm("single", "speech alone, tokens of Whisper", ("targets.audio=null",), ("speech",)),
    Arm("dual", "speech and audio, tokens of both teachers, asymmetric loss"),
    Arm("dual, other seed", "as dual, from another seed", ("seed={other_seed}",)),
    Arm("dual, mixing", "as dual, with noise and token mixing", MIXING),
    Arm("dual, ScaledAdam", "as dual, with ScaledAdam and Eden for AdamW and a cosine", SCALED_ADAM),
    Arm("dual, recipe", "all of it: mixing, ScaledAdam, the regularisers", (*MIXING, *SCALED_ADAM, *REGULARIZERS)),
)


class Experiment:
    """The folders of an experiment, and what is in them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work
        self.corpus: Path = arguments.corpus
        self.stores = {"speech": arguments.speech_tokens, "audio": arguments.audio_tokens}

    # ---- training

    def manifest(self, domains: tuple[str, ...]) -> Path:
        """The rows of the corpus that there are tokens of, with absolute paths."""
        path = self.work / f"{'+'.join(domains)}.jsonl"
        tokens = {name: TokenStore.open(store) for name, store in self.stores.items()}
        rows = [json.loads(line) for line in (self.corpus / "manifest.jsonl").read_text().splitlines()]
        chosen = [
            row | {"path": str((self.corpus / row["path"]).resolve())}
            for row in rows
            if row["split"] == "pretrain" and row["domain"] in domains and row["id"] in tokens["speech"]
        ]
        write(path, "".join(json.dumps(row) + "\n" for row in chosen))
        return path

    def settings(self, arm: Arm) -> list[str]:
        """As `--set` takes them."""
        stores = {name: store for name, store in self.stores.items() if f"targets.{name}=null" not in arm.settings}
        steps = self.arguments.steps
        batch_seconds = load_config(ROOT / CONFIG, self.arguments.settings).data.batch_seconds
        known = {
            "batches": max(1, 4 * steps // 5),
            "hours": max(0.1, steps * batch_seconds / 3600),
            "other_seed": self.arguments.seed + 1,
        }
        return [
            f"output_dir={self.folder(arm)}",
            f"data.manifest={self.manifest(arm.domains)}",
            *(f"targets.{name}.store={store}" for name, store in stores.items()),
            f"seed={self.arguments.seed}",
            f"max_steps={steps}",
            f"schedule.decay_steps={steps}",
            f"schedule.warmup_steps={steps // 10}",
            *self.arguments.settings,
            *(setting.format(**known) for setting in arm.settings),
        ]

    def folder(self, arm: Arm) -> Path:
        return self.work / arm.name.replace(",", "").replace(" ", "-").lower()

    def train(self, arm: Arm) -> None:
        """Runs the arm to its end; a run that is there is resumed."""
        if (self.folder(arm) / "final" / "COMPLETE").exists():
            self.check_settings(arm)
            return
        command = [sys.executable, "-m", "spear_hf.cli", "pretrain", "--config", str(ROOT / CONFIG), "--set"]
        command += [*self.settings(arm), "logging.progress=false"]
        if (self.folder(arm) / "config.yaml").exists():
            command.append("--resume")
        log = self.work / f"{self.folder(arm).name}.log"
        with log.open("a") as file:
            done = subprocess.run(
                command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
            )
        if done.returncode:
            raise SystemExit(f"{arm.name}: exit code {done.returncode}, see {log}")

    def check_settings(self, arm: Arm) -> None:
        """Ends the experiment if the finished arm is of other settings: the page would give its figures as theirs."""
        asked = to_plain(load_config(ROOT / CONFIG, self.settings(arm)))
        done = to_plain(build(PreTrainingConfig, RunFolder(self.folder(arm)).read_config()))
        free = {*FREE_ON_RESUME} - {"max_steps"}
        changed = [
            key for key in changed_keys(done, asked) if key.split(".")[0] not in free and not MAY_MOVE.fullmatch(key)
        ]
        if changed:
            raise SystemExit(
                f"{self.folder(arm)} was trained with another {', '.join(changed)}: name another folder with --work."
            )

    # ---- probes

    def probe_sets(self, probe: str) -> tuple[list[Utterance], list[Utterance]]:
        train, test = (
            [row for row in read_manifest(self.corpus, split=split) if row.probe == probe]
            for split in ("probe_train", "probe_test")
        )
        return train, test

    def features(self, name: str, probe: str) -> np.ndarray:
        """(layers, utterances of both sets, dim), kept in `work`; of teachers one layer, that of the tokens."""
        path = self.work / "features" / f"{name.replace(',', '').replace(' ', '-').lower()}.{probe}.npy"
        if path.exists():
            return np.load(path)
        train, test = self.probe_sets(probe)
        extractor = SpearFeatureExtractor()
        if name == LOG_MEL:
            values = log_mel_features(extractor, [*train, *test])
        elif name in ("whisper", "musicnn"):
            values = teacher_features(self.teacher(name), [*train, *test])
        else:
            if name == RANDOM:  # what the arm "dual" started from
                dual = next(arm for arm in ARMS if arm.name == "dual")
                torch.manual_seed(keyed_seed(self.arguments.seed, "initialisation"))
                model = SpearForPreTraining(SpearConfig.from_pretrained(self.folder(dual) / "final")).spear
            else:
                model = SpearModel.from_pretrained(
                    self.folder(next(arm for arm in ARMS if arm.name == name)) / "final"
                )
            values = pooled_features(model.eval(), extractor, [*train, *test])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, values)
        path.with_suffix(".partial").replace(path)
        return values

    def teacher(self, name: str) -> Teacher:
        if name == "whisper":
            return load_teacher(str(self.arguments.whisper), layer=6, window="slice")
        options = {"file": str(self.arguments.musicnn), "frame_rate": 62.5, "resample_to": 50}
        return load_teacher("spear_hf.mvq.torchscript:torchscript", options=options)

    def probe(self, name: str, probe: str) -> dict[str, ProbeResult]:
        """By "all layers" and "last layer"."""
        train, test = self.probe_sets(probe)
        values = self.features(name, probe)
        labels = [row.label for row in train], [row.label for row in test]
        groups = [row.id.rsplit("-", 1)[0] for row in train] if probe == "instrument_family" else None
        return {
            kind: linear_probe(x[: len(train)], labels[0], x[len(train) :], labels[1], groups=groups)
            for kind, x in (("all layers", concatenated(values)), ("last layer", values[-1]))
        }


@torch.no_grad()
def teacher_features(teacher: Teacher, utterances: list[Utterance]) -> np.ndarray:
    """Mean and standard deviation of the frames: (1, utterances, 2 * dim)."""
    rows = []
    for utterance in tqdm(utterances, desc=f"features of {Path(teacher.id).name}"):
        frames = teacher([load_utterance(utterance)], ids=[utterance.id])[0]
        rows.append(torch.cat([frames.mean(dim=0), frames.std(dim=0, unbiased=False)]).cpu().numpy())
    return np.stack(rows)[None]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def table_rows(experiment: Experiment, names: list[str]) -> list[dict[str, Any]]:
    """One row for each representation, probe and choice of layers."""
    trained = {arm.name: training_figures(experiment.folder(arm)) for arm in ARMS if arm.name in names}
    rows = []
    for probe in PROBES:
        results = {name: experiment.probe(name, probe) for name in tqdm(names, desc=f"probe {probe}")}
        for name, kinds in results.items():
            for kind, result in kinds.items():
                difference = paired_difference(result, results[RANDOM][kind])
                rows.append(
                    {
                        "representation": name,
                        "probe": probe,
                        "layers": kind,
                        "accuracy": round(result.accuracy, 4),
                        "low": round(result.low, 4),
                        "high": round(result.high, 4),
                        "gain_over_random": round(difference.mean, 4),
                        "gain_low": round(difference.low, 4),
                        "gain_high": round(difference.high, 4),
                        **trained.get(name, {}),
                    }
                )
    return rows


def training_figures(folder: Path) -> dict[str, Any]:
    """What the run's own files say, at its last validation."""
    metrics, evaluation = read_json_lines(folder / "metrics.jsonl"), read_json_lines(folder / "evaluation.jsonl")
    figures: dict[str, Any] = {"steps": metrics[-1]["step"], "hours": round(metrics[-1]["hours"], 3)}
    for teacher in ("speech", "audio"):
        for what in ("masked_accuracy", "unigram_accuracy", "masked_loss"):
            value = evaluation[-1].get(f"{teacher}_{what}")
            figures[f"{teacher}_{what}"] = None if value is None else round(value, 4)
    return figures


@styled
def draw(experiment: Experiment, rows: list[dict[str, Any]]) -> Any:
    """Held-out loss by step, and the probes with their intervals."""
    figure, axes = new_figure(3, size=(8.0, 10.5), height_ratios=[1.2, 1, 1])
    colours = [GREY, BLUE, "#8ab6e0", GREEN, ORANGE, "#7a3e9d"]
    for arm, colour in zip(ARMS, colours):
        records = read_json_lines(experiment.folder(arm) / "evaluation.jsonl")
        points = [(r["step"], r["speech_masked_loss"]) for r in records if r.get("speech_masked_loss") is not None]
        axes[0].plot(*np.array(points).T, marker="o", ms=4, color=colour, label=arm.name)
    axes[0].set(xlabel="step", ylabel="loss of masked frames (nats)", title="Whisper's tokens, held-out audio")
    axes[0].legend()
    for place, (probe, what) in zip(axes[1:], PROBES.items()):
        chosen = [row for row in rows if row["probe"] == probe and row["layers"] == "all layers"]
        names = [row["representation"] for row in chosen]
        values = np.array([[row["accuracy"], row["low"], row["high"]] for row in chosen]).T * 100
        bars = [dict(zip([arm.name for arm in ARMS], colours)).get(name, "#bbbbbb") for name in names]
        place.barh(names, values[0], color=bars, xerr=np.abs(values[1:] - values[0]), ecolor="#333333")
        place.invert_yaxis()
        place.set(xlabel="accuracy of a linear probe (%)", title=what)
    return figure


def markdown(experiment: Experiment, rows: list[dict[str, Any]], command: str) -> str:
    """The page."""
    arguments = experiment.arguments
    batch_seconds = load_config(ROOT / CONFIG, arguments.settings).data.batch_seconds
    trained = {arm.name: arm for arm in ARMS}
    lines = [
        "# Pre-training a small encoder: what it gives, and what its parts are worth",
        "",
        f"Made by `{command}` (seed {arguments.seed}); every figure is in `pretraining.csv`. "
        f"{platform.machine()}, torch {torch.__version__}; trained on {arguments.trained_on}.",
        "",
        f"An encoder of 6.3 million parameters (`{CONFIG}`), trained for {arguments.steps} steps of at most "
        f"{batch_seconds:g} s of audio with each setting. Teachers: Whisper base, layer 6 (16 codebooks), for all "
        "utterances, and musicnn (8 codebooks) for those of audio. The last column of each probe is the gain over the "
        "same encoder with random weights, with the 95 % interval of a paired bootstrap over the test set; the "
        "interval says nothing of other seeds.",
        "",
        "| arm | what it is | hours heard | masked accuracy, Whisper's tokens | its unigram | musicnn's | unigram |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = {row["representation"]: row for row in rows}
    for name, arm in trained.items():
        row = seen[name]
        cells = [
            "–" if row[key] is None else f"{100 * row[key]:.1f} %"
            for teacher in ("speech", "audio")
            for key in (f"{teacher}_masked_accuracy", f"{teacher}_unigram_accuracy")
        ]
        lines.append(f"| {name} | {arm.what} | {row['hours']:.2f} | {' | '.join(cells)} |")
    for probe, what in PROBES.items():
        lines += [
            "",
            f"## {what.capitalize()} (`{probe}`)",
            "",
            "| representation | all layers | gain over random | last layer | gain over random |",
            "|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(row["representation"] for row in rows):
            cells = []
            for kind in ("all layers", "last layer"):
                row = next(r for r in rows if (r["representation"], r["probe"], r["layers"]) == (name, probe, kind))
                cells.append(f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f}–{100 * row['high']:.1f})")
                gain = f"{100 * row['gain_over_random']:+.1f} ({100 * row['gain_low']:+.1f} to "
                cells.append("" if name == RANDOM else gain + f"{100 * row['gain_high']:+.1f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![loss and probes](pretraining.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--speech-tokens", type=Path, required=True, help="token store of all utterances")
    parser.add_argument("--audio-tokens", type=Path, required=True, help="token store of the utterances of audio")
    parser.add_argument("--whisper", type=Path, help="folder of the speech teacher; its probe scores are the ceiling")
    parser.add_argument("--musicnn", type=Path, help="file of the audio teacher")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings", nargs="*", default=[], help="of every arm, as `spear-hf pretrain --set` has them"
    )
    parser.add_argument("--trained-on", default="a CPU, one thread an arm", help="what the page says of the machine")
    parser.add_argument("--train-only", action="store_true", help="no probes and no page")
    parser.add_argument("--jobs", type=int, default=2, help="arms trained at a time, a thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "experiments")
    arguments = parser.parse_args()
    for name in ("corpus", "speech_tokens", "audio_tokens", "work"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    experiment = Experiment(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in tqdm(pool.map(experiment.train, ARMS), total=len(ARMS), desc="arms"):
            pass
    if arguments.train_only:
        return
    teachers = [name for name in ("whisper", "musicnn") if getattr(arguments, name)]
    rows = table_rows(experiment, [LOG_MEL, RANDOM, *(arm.name for arm in ARMS), *teachers])
    command = (
        f"python examples/experiment_pretraining.py CORPUS --speech-tokens STORE --audio-tokens STORE "
        f"--whisper WHISPER --musicnn MUSICNN.pt --steps {arguments.steps} --seed {arguments.seed}"
    )
    if arguments.settings:
        command += f" --settings {' '.join(arguments.settings)}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (arguments.output / "pretraining.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "command"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"command": command} for row in rows)
    save_figure(draw(experiment, rows), arguments.output / "pretraining.png")
    write(arguments.output / "pretraining.md", markdown(experiment, rows, command))
    print(f"{arguments.output}: pretraining.md, .csv, .png; peak memory {peak_memory():.0f} MB")


def peak_memory() -> float:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


if __name__ == "__main__":
    main()
