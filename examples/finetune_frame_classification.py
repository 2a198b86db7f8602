#!/usr/bin/env python3
# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune SPEAR to say what sounds when: a label, or several, for every 20 ms.

    python examples/finetune_frame_classification.py --smoke --output_dir runs/frames-smoke     # bundled audio

    python examples/finetune_frame_classification.py --model marcoyang/spear-base-speech-audio-v2 \\
        --dataset my_audio.jsonl --segments my_segments.csv --output_dir runs/frames --num_train_epochs 10

    python examples/finetune_frame_classification.py --model marcoyang/spear-base-speech-audio-v2 --multi_label \\
        --dataset me/meetings --segment_column segments --output_dir runs/meetings --push_to_hub

Segments are a table with the columns id (as in the manifest; without ids there, and in folders, the path), start and
end (seconds) and label; or a column of a Hub dataset with lists of {"start", "end", "label"}. What none covers is
--background_label; with --multi_label segments may overlap, and what none covers has no label. The result is a folder
that AutoModelForAudioFrameClassification and AutoFeatureExtractor load, with the metrics (F1 and accuracy of frames)
and a plot of the loss. All arguments of transformers.TrainingArguments are taken: --help lists them. A training goes
on with --resume_from_checkpoint last.
"""

import csv
import json
import sys
import wave
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForAudioFrameClassification, EvalPrediction

from spear_hf.data.audio import SAMPLING_RATE
from spear_hf.data.manifest import MANIFEST_NAME
from spear_hf.data.segments import COLUMNS, FrameGrid, read_segments
from spear_hf.evaluation.metrics import FrameScores, MultiLabelFrameScores
from spear_hf.finetuning.arguments import DataArguments, FineTuningArguments, ModelArguments, parse_arguments
from spear_hf.finetuning.collation import IGNORED, FrameCollator
from spear_hf.finetuning.datasets import decode_row, load_rows, train_and_eval_rows
from spear_hf.finetuning.epochs import EpochCounter
from spear_hf.finetuning.models import load_config, load_feature_extractor, load_model, set_labels
from spear_hf.finetuning.reporting import exit_code, run
from spear_hf.finetuning.trainer import FineTuningTrainer
from spear_hf.pretraining.corpus import BUNDLED


# fmt: off
SMOKE = [
    "--dataset", BUNDLED, "--max_steps", "10", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
    "--logging_steps", "1", "--max_seconds", "4", "--output_dir", "runs/frames-smoke",
]
# fmt: on
SMOKE_FILES = {"pretrain": 16, "heldout": 5}  # split of the bundled audio -> files to make of it
SMOKE_CLIP_SECONDS, SMOKE_PAUSE_SECONDS = 1.5, 0.4


@dataclass
class SegmentArguments:
    """Where the segments are, and what they mean."""

    segments: str | None = field(
        default=None, metadata={"help": "Table (.jsonl, .csv, .tsv) with the columns id, start, end and label."}
    )
    segment_column: str | None = field(
        default=None, metadata={"help": "Column of a Hub dataset with lists of {start, end, label}."}
    )
    multi_label: bool = field(default=False, metadata={"help": "Segments may overlap."})
    background_label: str = field(default="none", metadata={"help": "Label of frames outside all segments."})


@dataclass
class FrameTrainingArguments(FineTuningArguments):
    """With a rate that suits fine-tuning a whole encoder."""

    learning_rate: float = field(default=1e-4, metadata={"help": "At the end of the warm-up."})


def segmented_rows(data: DataArguments, arguments: SegmentArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows with their segments in the column `segments`."""
    if (arguments.segments is None) == (arguments.segment_column is None):
        raise ValueError("segments, a table, or segment_column, of a Hub dataset, must be named, and not both")
    if arguments.segment_column is not None:
        column = arguments.segment_column
        both = train_and_eval_rows(data, [], seed, unchanged=[column])
        return tuple(rows if column == "segments" else rows.rename_column(column, "segments") for rows in both)
    table = read_segments(str(arguments.segments))
    train, evaluation = train_and_eval_rows(data, [], seed)
    for rows, name in ((train, "training"), (evaluation, "evaluation")):
        if not set(rows["id"]) & set(table):
            raise ValueError(
                f"segments={arguments.segments} has none of the {len(rows)} {name} rows; it has ids such as "
                f"{next(iter(table), None)!r}, the rows such as {rows[0]['id']!r}"
            )
    return tuple(
        rows.add_column("segments", [[asdict(segment) for segment in table.get(row_id, [])] for row_id in rows["id"]])
        for rows in (train, evaluation)
    )


def bundled_data(folder: Path) -> tuple[str, str]:
    """Manifest and segments of files in which a bundled clip of speech and one of other sound take turns with silence.

    Written to `folder`; the same on every call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pause = np.zeros(round(SMOKE_PAUSE_SECONDS * SAMPLING_RATE), dtype=np.float32)
    manifest, segments = [], []
    for split, files in SMOKE_FILES.items():
        clips = {
            domain: load_rows(BUNDLED, [], split, DataArguments(where=[f"domain={domain}"]))
            for domain in ("speech", "audio")
        }
        for index in range(files):
            parts, name = [pause], f"{split}-{index}.wav"
            for domain, rows in sorted(clips.items(), reverse=index % 2 == 0):
                waveform = decode_row(rows[index])[: round(SMOKE_CLIP_SECONDS * SAMPLING_RATE)]
                start = sum(map(len, parts)) / SAMPLING_RATE
                segments.append([name, start, start + len(waveform) / SAMPLING_RATE, domain])
                parts += [waveform, pause]
            with wave.open(str(folder / name), "wb") as file:
                file.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))
                file.writeframes((np.concatenate(parts).clip(-1, 1) * 32767).astype("<i2").tobytes())
            manifest.append({"path": name, "split": split})
    (folder / MANIFEST_NAME).write_text("".join(json.dumps(row) + "\n" for row in manifest), encoding="utf-8")
    with open(folder / "segments.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *segments])
    return str(folder), str(folder / "segments.csv")


def decisions(multi_label: bool) -> Any:
    """preprocess_logits_for_metrics of the Trainer: logits to class ids, or to 0 and 1 for every class."""

    def decide(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits > 0).long() if multi_label else logits.argmax(dim=-1)

    return decide


def scores(multi_label: bool) -> Any:
    """compute_metrics of the Trainer, over all frames that are no padding."""
    metric = MultiLabelFrameScores() if multi_label else FrameScores()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        valid = (labels[..., 0] if multi_label else labels) != IGNORED  # (rows, frames)
        predictions = np.asarray(prediction.predictions)[valid]
        return metric.compute(predictions=predictions.tolist(), references=labels[valid].astype(np.int64).tolist())

    return compute


def fine_tune(
    model_arguments: ModelArguments,
    data: DataArguments,
    arguments: SegmentArguments,
    args: FrameTrainingArguments,
) -> dict[str, float]:
    """The metrics of the evaluation."""
    config = load_config(model_arguments)
    if data.dataset == BUNDLED:
        source, table = bundled_data(Path(str(args.output_dir)) / "_bundled_data")  # a name that is not pushed
        train_split, eval_split = SMOKE_FILES
        data = replace(data, dataset=source, train_split=train_split, eval_split=eval_split)
        arguments = replace(arguments, segments=table)
    train, evaluation = segmented_rows(data, arguments, args.seed)

    names = [segment["label"] for row in train["segments"] for segment in row]
    if not arguments.multi_label:
        names.append(arguments.background_label)
    label2id = set_labels(config, names, 1 if arguments.multi_label else 2)
    config.problem_type = "multi_label_classification" if arguments.multi_label else "single_label_classification"
    model = load_model(AutoModelForAudioFrameClassification, model_arguments, config)
    extractor = load_feature_extractor(model_arguments, config)

    epochs = EpochCounter()
    common = {
        "grid": FrameGrid(config.output_downsampling_factor),
        "label2id": label2id,
        "background": None if arguments.multi_label else label2id[arguments.background_label],
        "max_seconds": data.max_seconds,
    }
    trainer = FineTuningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=extractor,
        data_collator=FrameCollator(extractor, seed=args.seed, epochs=epochs, **common),
        eval_collator=FrameCollator(extractor, **common),
        epochs=epochs,
        compute_metrics=scores(arguments.multi_label),
        preprocess_logits_for_metrics=decisions(arguments.multi_label),
    )
    return run(trainer, evaluation, "audio-frame-classification", data.dataset)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(
        __doc__, argv, SMOKE, [ModelArguments, DataArguments, SegmentArguments, FrameTrainingArguments]
    )
    return exit_code("finetune_frame_classification", fine_tune, arguments)


if __name__ == "__main__":
    sys.exit(main())
