# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is left of a teacher's features in their tokens, by number of codebooks and passes of refinement.

    python examples/experiment_tokens.py CORPUS --whisper WHISPER --musicnn MUSICNN.pt

CORPUS: a folder with a manifest.jsonl of two domains and the labelled probes named below. WHISPER: a folder with a
Whisper encoder (speech). MUSICNN.pt: a music tagger as a TorchScript file (audio). One teacher alone will do.

For each teacher: frames are sampled over hours of the corpus, a quantiser is trained for every number of codebooks,
and two things are measured. The relative reconstruction error of frames of utterances that were not trained on; and
the accuracy of a linear probe on features decoded from tokens, against that on the features themselves.

Everything is kept in `--work`, so that an interrupted run goes on where it was; features are computed once.
The table, the figures and the text go to `--output`: tokens.csv, tokens.png, tokens.md.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import textwrap
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import Utterance, read_manifest
from spear_hf.evaluation.plots import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure, styled
from spear_hf.evaluation.probe import ProbeResult, linear_probe, paired_difference
from spear_hf.mvq.quantize import FrameSample, heldout_report, sample_frames, train_on_sample
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import Teacher, load_teacher
from spear_hf.mvq.training import QuantizerTrainingConfig


ROOT = Path(__file__).resolve().parent.parent
CODEBOOKS = (4, 8, 16)
PASSES = (0, 1, 5)
COLOURS = dict(zip(PASSES, (GREY, ORANGE, BLUE)))


@dataclass(frozen=True)
class Part:
    """A teacher with its domain of audio and its probe."""

    name: str
    title: str
    domain: str
    probe: str
    layer: int | None = None
    window: str | None = None
    factory: str | None = None
    options: tuple[tuple[str, float], ...] = ()

    def teacher(self, path: str) -> Teacher:
        if self.factory is not None:
            return load_teacher(self.factory, options={"file": path, **dict(self.options)})
        return load_teacher(path, layer=self.layer, window=self.window)  # type: ignore[arg-type]


PARTS = (
    # Layer 6 (the last) tells words apart best of layers 4, 5 and 6, fed in this way.
    Part("whisper", "Whisper base encoder, layer 6, window sliced", "speech", "asterisk_words", 6, "slice"),
    Part(
        "musicnn",
        "musicnn (MSD), front end and mid end, brought to 50 Hz",
        "audio",
        "instrument_family",
        factory="spear_hf.mvq.torchscript:torchscript",
        options=(("frame_rate", 62.5), ("resample_to", 50)),
    ),
)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def sampled(
    part: Part, teacher: Teacher, utterances: list[Utterance], work: Path, hours: float, seed: int
) -> FrameSample:
    """The sample of frames, from `work` if it is there."""
    place, settings = work / part.name, {"hours": hours, "seed": seed, "fingerprint": teacher.fingerprint}
    if (place / "sample.json").exists():
        kept = json.loads((place / "sample.json").read_text())
        if kept["settings"] != settings:
            raise SystemExit(f"{place} is of {kept['settings']}, not {settings}: name another folder --work")
        tensors = load_file(place / "sample.safetensors")
        return FrameSample(tensors["frames"], tensors["heldout"], kept["data"], kept["bad"])
    chosen = [utt for utt in utterances if utt.split == "pretrain" and utt.domain == part.domain]
    sample = sample_frames(teacher, chosen, num_frames=200_000, num_heldout=10_000, seed=seed, max_hours=hours)
    place.mkdir(parents=True, exist_ok=True)
    save_file({"frames": sample.frames, "heldout": sample.heldout}, place / "sample.safetensors")
    write_json(place / "sample.json", {"settings": settings, "data": sample.data, "bad": sample.bad})
    return sample


def trained(
    part: Part, teacher: Teacher, sample: FrameSample, work: Path, training: QuantizerTrainingConfig
) -> MultiCodebookQuantizer:
    """A quantiser of the sample, from `work` if it is there and was trained in the same way."""
    folder = work / part.name / f"quantizer-{training.num_codebooks}"
    if (folder / "config.json").exists():
        quantizer = MultiCodebookQuantizer.from_pretrained(folder)
        provenance = quantizer.config.provenance
        same = all(provenance["training"].get(key) == value for key, value in asdict(training).items())
        if same and provenance["data"]["fingerprint"] == sample.data["fingerprint"]:
            return quantizer
        raise SystemExit(f"{folder} was trained in another way: name another folder --work")
    started = time.perf_counter()
    train_on_sample(teacher, sample, folder, training)
    write_json(folder / "seconds.json", round(time.perf_counter() - started))
    return MultiCodebookQuantizer.from_pretrained(folder)


def probe_features(teacher: Teacher, clips: list[Utterance], path: Path) -> list[torch.Tensor]:
    """The teacher's features of every clip, (frames, dim) each, from `path` if they are there."""
    if path.exists():
        kept = load_file(path)
        return list(kept["features"].split(kept["lengths"].tolist()))
    features = teacher([load_audio(clip.path) for clip in clips], ids=[clip.id for clip in clips])
    lengths = torch.tensor([len(rows) for rows in features])
    save_file({"features": torch.cat(features), "lengths": lengths}, path)
    return features


def probed(features: list[torch.Tensor], clips: list[Utterance], seed: int) -> ProbeResult:
    """Mean and deviation over time -> label, as all probes of this library."""
    pooled = np.stack([torch.cat([rows.mean(dim=0), rows.std(dim=0, correction=0)]).numpy() for rows in features])
    train = [place for place, clip in enumerate(clips) if clip.split == "probe_train"]
    test = [place for place, clip in enumerate(clips) if clip.split == "probe_test"]
    labels = [clip.label for clip in clips]
    groups = [clips[place].id.rsplit("-", 2)[0] for place in train]  # the pitches of one instrument stay together
    return linear_probe(
        pooled[train], [labels[p] for p in train], pooled[test], [labels[p] for p in test], groups=groups, seed=seed
    )


def measured(
    part: Part, path: str, utterances: list[Utterance], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows of a teacher."""
    teacher = part.teacher(path)
    sample = sampled(part, teacher, utterances, arguments.work, arguments.hours, arguments.seed)
    clips = [utterance for utterance in utterances if utterance.probe == part.probe]
    features = probe_features(teacher, clips, arguments.work / part.name / "probe.safetensors")
    original = probed(features, clips, arguments.seed)
    common = {
        "teacher": part.name,
        "layer": part.layer,
        "window": part.window,
        "feature_size": teacher.feature_size,
        "frame_rate": teacher.frame_rate,
        "hours": round(sample.data["hours"], 3),
        "training_frames": sample.data["frames"],
        "heldout_frames": sample.data["heldout_frames"],
        "heldout_utterances": sample.data["heldout_utterances"],
        "data_fingerprint": sample.data["fingerprint"],
        "probe": part.probe,
        "classes": len({clip.label for clip in clips}),
        "test_clips": len(original.correct),
    }
    rows = [common | accuracy_of(original, None)]
    for count in arguments.codebooks:
        training = QuantizerTrainingConfig(
            count, steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed
        )
        kept = arguments.work / part.name / f"rows-{count}.json"
        if not kept.exists():
            quantizer = trained(part, teacher, sample, arguments.work, training)
            report = heldout_report(quantizer, sample.heldout)
            stacked, lengths = torch.cat(features), [len(rows) for rows in features]
            seconds = arguments.work / part.name / f"quantizer-{count}" / "seconds.json"
            about = {
                "num_codebooks": count,
                "bits_per_second": teacher.frame_rate * count * 8,
                "perplexity_min": min(report["perplexity"]),
                "perplexity_max": max(report["perplexity"]),
                "used_min": min(report["used"]),
                "training_seconds": json.loads(seconds.read_text()) if seconds.exists() else None,
            }
            measurements = []
            for passes in PASSES:
                decoded = quantizer.decode(quantizer.encode(stacked, refine_iters=passes)).split(lengths)
                result = probed(list(decoded), clips, arguments.seed)
                error = {"passes": passes, "relative_error": round(report["relative_error"][str(passes)], 5)}
                measurements.append(about | error | accuracy_of(result, original))
                print(f"{part.name}: {measurements[-1]}", flush=True)
            write_json(kept, measurements)
        rows += [common | row for row in json.loads(kept.read_text())]
    return rows


def accuracy_of(result: ProbeResult, original: ProbeResult | None) -> dict[str, Any]:
    row = {"accuracy": result.accuracy, "accuracy_low": result.low, "accuracy_high": result.high}
    if original is not None:
        difference = paired_difference(result, original)
        row |= {"difference": difference.mean, "difference_low": difference.low, "difference_high": difference.high}
    return {key: round(value, 4) for key, value in row.items()}


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in every row: what it takes to do it again."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = names[0].split(":", 1)[1].strip() if names else platform.machine()
    command = "python examples/experiment_tokens.py CORPUS --whisper WHISPER --musicnn MUSICNN.pt"
    for name in ("hours", "steps", "batch_size", "seed"):
        command += f" --{name.replace('_', '-')} {getattr(arguments, name)}"
    return {
        "steps_per_phase": arguments.steps,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "corpus": hashlib.sha256((arguments.corpus / "manifest.jsonl").read_bytes()).hexdigest()[:16],
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        **{name: version(name) for name in ("spear_hf", "torch", "transformers", "scikit-learn")},
        "command": command,
    }


@styled
def plot(rows: list[dict[str, Any]]) -> Any:
    """Above the held-out error, below the probe's accuracy; a column for each teacher."""
    parts = [part for part in PARTS if any(row["teacher"] == part.name for row in rows)]
    figure, _ = new_figure(size=(5.2 * len(parts), 6.6))
    figure.clear()
    axes = figure.subplots(2, len(parts), sharex=True, squeeze=False)
    for part, (error, accuracy) in zip(parts, axes.T):
        own = [row for row in rows if row["teacher"] == part.name]
        (original,) = (row for row in own if row.get("num_codebooks") is None)
        for shift, passes in zip((0.97, 1.0, 1.03), PASSES):
            chosen = [row for row in own if row.get("passes") == passes]
            counts = np.array([row["num_codebooks"] for row in chosen])
            label = f"{passes} pass{'' if passes == 1 else 'es'}"
            style = {"color": COLOURS[passes], "marker": "o", "linewidth": 2, "mec": "white", "ms": 7, "label": label}
            error.plot(counts, [row["relative_error"] for row in chosen], **style)
            values = 100 * np.array([[row[f"accuracy{end}"] for end in ("", "_low", "_high")] for row in chosen]).T
            bars = np.stack([values[0] - values[1], values[2] - values[0]])
            accuracy.errorbar(counts * shift, values[0], yerr=bars, capsize=3, elinewidth=1, **style)
        accuracy.axhline(100 * original["accuracy"], color=GREEN, linestyle="--", linewidth=1.5, label="the features")
        error.set_title(part.title.split(",")[0])
        error.set_ylim(0, 1.08 * max(row["relative_error"] for row in own if "relative_error" in row))
        accuracy.set_ylim(bottom=0)
        accuracy.set_xscale("log", base=2)
        counts = sorted({row["num_codebooks"] for row in rows if row.get("num_codebooks")})
        accuracy.set_xticks(counts, [str(count) for count in counts])
        accuracy.set_xlabel("Codebooks of 256")
        accuracy.set_title(f"Probe: {part.probe}")
        error.legend(title="Refinement")
        accuracy.legend(loc="lower right")
    axes[0, 0].set_ylabel("Relative error, held-out frames")
    axes[1, 0].set_ylabel("Test accuracy (%)")
    return figure


def text(rows: list[dict[str, Any]]) -> str:
    """The document, from the rows alone."""
    first = rows[0]
    lines = [
        "# Tokens against the features they stand for",
        "",
        _paragraph(
            "Made by `examples/experiment_tokens.py`; the figures are in `tokens.csv`. Real recordings, real "
            f"teachers; K = 256, channels standardised, {int(first['steps_per_phase']):,} steps a phase of "
            f"{first['batch_size']} frames (the paper: 35,000 of 1,024), seed {first['seed']}:"
        ),
        "",
        "```bash",
        first["command"],
        "```",
        "",
        "![error and accuracy by number of codebooks](tokens.png)",
        "",
        _paragraph(
            "Relative error: squared error over squared distance from the mean, of standardised channels, on frames "
            "of utterances that were not trained on. Probe: logistic regression on mean and deviation over time of "
            "the decoded features, with its 95 % interval; difference: to the features themselves, paired bootstrap."
        ),
    ]
    for part in PARTS:
        own = [row for row in rows if row["teacher"] == part.name]
        if not own:
            continue
        original = own[0]
        lines += [
            "",
            f"## {part.title}",
            "",
            _paragraph(
                f"{original['hours']:.2f} h of {part.domain} (fingerprint `{original['data_fingerprint']}`, corpus "
                f"`{original['corpus']}`): {int(original['training_frames']):,} frames of {original['feature_size']} "
                f"channels at {float(original['frame_rate']):g} Hz; {int(original['heldout_frames']):,} held-out "
                f"frames of {original['heldout_utterances']} utterances. Probe `{part.probe}`: {original['classes']} "
                f"classes, {original['test_clips']} test clips; the features themselves reach "
                f"{_percent(original, 'accuracy', '.1f')} %."
            ),
            "",
            "| codebooks | kbit/s | passes | relative error | perplexity at 5 passes | probe, % | difference |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in own[1:]:
            cells = [
                str(row["num_codebooks"]),
                f"{row['bits_per_second'] / 1000:g}",
                str(row["passes"]),
                f"{row['relative_error']:.4f}",
                f"{row['perplexity_min']:.0f} to {row['perplexity_max']:.0f}",
                _percent(row, "accuracy", ".1f"),
                _percent(row, "difference", "+.1f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(row: dict[str, Any], name: str, form: str) -> str:
    """A share with its interval."""
    value, low, high = (format(100 * row[f"{name}{end}"], form) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _paragraph(words: str) -> str:
    return textwrap.fill(words, 119, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--whisper", help="folder of the encoder")
    parser.add_argument("--musicnn", help="TorchScript file")
    parser.add_argument("--work", type=Path, default=Path("runs/experiment_tokens"))
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "experiments")
    parser.add_argument("--hours", type=float, default=1.5, help="of audio that frames are sampled from")
    parser.add_argument("--steps", type=int, default=1500, help="of each phase")
    parser.add_argument("--batch-size", type=int, default=512, help="frames a step")
    parser.add_argument("--codebooks", type=int, nargs="+", default=list(CODEBOOKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    utterances = read_manifest(arguments.corpus)
    rows = []
    for part in PARTS:
        path = getattr(arguments, part.name)
        if path is not None:
            rows += measured(part, path, utterances, arguments)
    if not rows:
        parser.error("name a teacher: --whisper, --musicnn, or both")
    rows = [row | setting(arguments) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "tokens.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    save_figure(plot(rows), arguments.output / "tokens.png")
    (arguments.output / "tokens.md").write_text(text(rows), encoding="utf-8")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
