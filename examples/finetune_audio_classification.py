#!/usr/bin/env python3
# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune SPEAR to classify audio, with one label a file or several, on a Hub dataset, a folder or a manifest.

    python examples/finetune_audio_classification.py --smoke --output_dir runs/classes-smoke   # add --multi_label

    python examples/finetune_audio_classification.py --model marcoyang/spear-base-speech-audio-v2 \\
        --dataset my_sounds --output_dir runs/classes --num_train_epochs 10   # my_sounds/LABEL/FILE, or a manifest

    python examples/finetune_audio_classification.py --model marcoyang/spear-base-speech-audio-v2 --multi_label \\
        --dataset agkphysics/AudioSet --dataset_config balanced --eval_split test --label_column human_labels \\
        --output_dir runs/as20k --num_train_epochs 20 --push_to_hub   # goes on with --resume_from_checkpoint last

With --multi_label a row has any number of labels, of a manifest's list or of several columns; rows are drawn such that
rare labels are not, and half of them are mixed with another (mixup), as in the paper. The result is a folder that
AutoModelForAudioClassification, AutoFeatureExtractor and pipeline("audio-classification") load, with the metrics
(accuracy, or mAP) and a plot of the loss. All arguments of transformers.TrainingArguments are taken: see --help.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForAudioClassification, EvalPrediction

from spear_hf.evaluation.metrics import Accuracy, MeanAveragePrecision
from spear_hf.finetuning.arguments import DataArguments, FineTuningArguments, ModelArguments, parse_arguments
from spear_hf.finetuning.collation import ClassificationCollator
from spear_hf.finetuning.datasets import single_texts, train_and_eval_rows, with_column
from spear_hf.finetuning.epochs import EpochCounter
from spear_hf.finetuning.models import class_ids, load_config, load_feature_extractor, load_model, set_labels
from spear_hf.finetuning.reporting import exit_code, run
from spear_hf.finetuning.sampling import balancing_weights
from spear_hf.finetuning.trainer import FineTuningTrainer
from spear_hf.pretraining.corpus import BUNDLED


# fmt: off
SMOKE_TRAINING = [
    "--max_train_samples", "200", "--max_eval_samples", "60", "--max_steps", "10", "--logging_steps", "1",
    "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--max_seconds", "2",
]
# Instrument families, or, with several labels, the domain and the language of all clips.
SMOKE = [
    *SMOKE_TRAINING, "--dataset", BUNDLED, "--where", "probe=instrument_family", "--train_split", "probe_train",
    "--eval_split", "probe_test", "--output_dir", "runs/classes-smoke",
]
SMOKE_MULTI_LABEL = [
    *SMOKE_TRAINING, "--dataset", BUNDLED, "--label_column", "domain", "language", "--train_split", "pretrain",
    "--eval_split", "heldout", "--output_dir", "runs/tags-smoke",
]
# fmt: on


@dataclass
class LabelArguments:
    """What a row's labels are, and how the training deals with several of them."""

    label_column: list[str] = field(
        default_factory=lambda: ["label"],
        metadata={"help": "Column of the label; with --multi_label, one or more columns of any number of labels."},
    )
    multi_label: bool = field(default=False, metadata={"help": "A row has any number of labels, not one."})
    mixup: float | None = field(
        default=None,
        metadata={"help": "Share of rows that are mixed with another one. Default: 0.5 with --multi_label, else 0."},
    )
    weighted_sampling: bool | None = field(
        default=None,
        metadata={"help": "Draw rows such that rare labels become frequent. Default: with --multi_label."},
    )

    def __post_init__(self) -> None:
        if self.mixup is None:
            self.mixup = 0.5 if self.multi_label else 0.0
        if self.weighted_sampling is None:
            self.weighted_sampling = self.multi_label
        if not 0 <= self.mixup <= 1 or (self.mixup and not self.multi_label):
            raise ValueError(f"mixup={self.mixup} must be a share from 0 to 1, and needs --multi_label")
        if len(self.label_column) != 1 and not self.multi_label:
            raise ValueError(f"label_column={' '.join(self.label_column)}: several columns need --multi_label")


@dataclass
class ClassificationTrainingArguments(FineTuningArguments):
    """With a rate that suits fine-tuning a whole encoder."""

    learning_rate: float = field(default=1e-4, metadata={"help": "At the end of the warm-up."})


def row_labels(dataset: Dataset, arguments: LabelArguments) -> list[list[str]]:
    """Labels of every row: one, or with `multi_label` those of all columns."""
    if not arguments.multi_label:
        return [[text] for text in single_texts(dataset, arguments.label_column[0])]
    columns = [dataset[name] for name in arguments.label_column]
    return [[label for part in parts for label in part] for parts in zip(*columns)]


def scores(multi_label: bool) -> Any:
    """compute_metrics of the Trainer: mAP, or accuracy."""
    metric = MeanAveragePrecision() if multi_label else Accuracy()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        predictions = logits if multi_label else logits.argmax(axis=-1)
        return metric.compute(predictions=predictions.tolist(), references=labels.astype(np.int64).tolist())

    return compute


def fine_tune(
    model_arguments: ModelArguments,
    data: DataArguments,
    labels: LabelArguments,
    args: ClassificationTrainingArguments,
) -> dict[str, float]:
    """The metrics of the evaluation."""
    config = load_config(model_arguments)
    train, evaluation = train_and_eval_rows(data, labels.label_column, args.seed)
    train_labels, eval_labels = row_labels(train, labels), row_labels(evaluation, labels)
    label2id = set_labels(config, [label for row in train_labels for label in row], 1 if labels.multi_label else 2)
    config.problem_type = "multi_label_classification" if labels.multi_label else "single_label_classification"
    model = load_model(AutoModelForAudioClassification, model_arguments, config)
    extractor = load_feature_extractor(model_arguments, config)

    ids = [class_ids(row, label2id, row_id) for row, row_id in zip(train_labels, train["id"])]
    train = with_column(train, "labels", ids)
    eval_ids = [class_ids(row, label2id, row_id) for row, row_id in zip(eval_labels, evaluation["id"])]
    evaluation = with_column(evaluation, "labels", eval_ids)

    epochs = EpochCounter()
    common = {"max_seconds": data.max_seconds, "num_labels": len(label2id) if labels.multi_label else None}
    trainer = FineTuningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=extractor,
        data_collator=ClassificationCollator(extractor, mixup=labels.mixup, seed=args.seed, epochs=epochs, **common),
        eval_collator=ClassificationCollator(extractor, **common),
        epochs=epochs,
        sampling_weights=balancing_weights(ids, len(label2id)) if labels.weighted_sampling else None,
        compute_metrics=scores(labels.multi_label),
    )
    return run(trainer, evaluation, "audio-classification", data.dataset)


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    smoke = SMOKE_MULTI_LABEL if "--multi_label" in given else SMOKE
    arguments = parse_arguments(
        __doc__, given, smoke, [ModelArguments, DataArguments, LabelArguments, ClassificationTrainingArguments]
    )
    return exit_code("finetune_audio_classification", fine_tune, arguments)


if __name__ == "__main__":
    sys.exit(main())
