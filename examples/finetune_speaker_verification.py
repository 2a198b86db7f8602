#!/usr/bin/env python3
# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune SPEAR to tell speakers apart: x-vectors, trained with AM-softmax, measured by the equal error rate.

    python examples/finetune_speaker_verification.py --smoke --output_dir runs/speakers-smoke    # bundled audio

    python examples/finetune_speaker_verification.py --model marcoyang/spear-base-speech-audio-v2 \\
        --dataset voxceleb1/dev --eval_dataset voxceleb1/test --trials veri_test2.txt --max_seconds 3 \\
        --output_dir runs/vox1 --num_train_epochs 10 --model_config '{"use_weighted_layer_sum": true}'

    python examples/finetune_speaker_verification.py --model marcoyang/spear-base-speech-audio-v2 \\
        --dataset me/voices --speaker_column speaker_id --eval_split test --output_dir runs/voices --push_to_hub

In a folder without a manifest the speaker is the subfolder a file is in; other layouts need a manifest with a column
`speaker`. Trials are lines `1 A B` or `0 A B` with the ids of two evaluation utterances; without, all pairs are taken.
Speakers of the evaluation need not be among those of the training. A training goes on with --resume_from_checkpoint
last. The result is a folder that AutoModelForAudioXVector and AutoFeatureExtractor load, with the metrics and a plot
of the loss. All arguments of transformers.TrainingArguments are taken: --help lists them.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import AutoModelForAudioXVector, EvalPrediction

from spear_hf.evaluation.metrics import EqualErrorRate
from spear_hf.finetuning.arguments import DataArguments, FineTuningArguments, ModelArguments, parse_arguments
from spear_hf.finetuning.collation import ClassificationCollator, SpeakerCollator
from spear_hf.finetuning.datasets import single_texts, train_and_eval_rows, with_column
from spear_hf.finetuning.epochs import EpochCounter
from spear_hf.finetuning.models import load_config, load_feature_extractor, load_model, set_labels
from spear_hf.finetuning.reporting import exit_code, run
from spear_hf.finetuning.trainer import SpeakerTrainer
from spear_hf.finetuning.trials import all_pairs, cosine_scores, read_trials
from spear_hf.pretraining.corpus import BUNDLED


# The speakers of `probe_test` are in no other split.
# fmt: off
SMOKE = [
    "--dataset", BUNDLED, "--where", "domain=speech", "--train_split", "pretrain", "--eval_split", "probe_test",
    "--max_steps", "10", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--max_seconds", "2",
    "--logging_steps", "1", "--output_dir", "runs/speakers-smoke",
]
# fmt: on


@dataclass
class SpeakerArguments:
    """Who speaks, and which pairs are compared."""

    speaker_column: str = field(default="speaker", metadata={"help": "Column of the speakers."})
    trials: str | None = field(
        default=None, metadata={"help": "List of lines `1 A B` or `0 A B`. Default: all pairs of evaluation rows."}
    )


@dataclass
class SpeakerTrainingArguments(FineTuningArguments):
    """With a rate that suits fine-tuning a whole encoder."""

    learning_rate: float = field(default=1e-4, metadata={"help": "At the end of the warm-up."})


def error_rate(pairs: np.ndarray, same: np.ndarray) -> Any:
    """compute_metrics of the Trainer: the equal error rate of the cosines of embeddings."""
    metric = EqualErrorRate()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        order = np.argsort(np.asarray(prediction.label_ids))  # labels are row numbers
        embeddings = np.asarray(prediction.predictions)[order]
        return metric.compute(predictions=cosine_scores(embeddings, pairs).tolist(), references=same.tolist())

    return compute


def fine_tune(
    model_arguments: ModelArguments,
    data: DataArguments,
    arguments: SpeakerArguments,
    args: SpeakerTrainingArguments,
) -> dict[str, float]:
    """The metrics of the evaluation."""
    config = load_config(model_arguments)
    train, evaluation = train_and_eval_rows(data, [arguments.speaker_column], args.seed)
    speakers = single_texts(train, arguments.speaker_column)
    if len(set(speakers)) < 2:
        raise ValueError(f"all {len(train)} training rows are of the speaker {speakers[0]!r}: two or more are needed")
    eval_speakers = single_texts(evaluation, arguments.speaker_column)
    if arguments.trials is not None:
        pairs, same = read_trials(arguments.trials, list(evaluation["id"]))
    else:
        pairs, same = all_pairs(eval_speakers, args.seed)

    label2id = set_labels(config, speakers)
    model = load_model(AutoModelForAudioXVector, model_arguments, config)
    extractor = load_feature_extractor(model_arguments, config)
    train = with_column(train, "labels", [[label2id[speaker]] for speaker in speakers])
    evaluation = with_column(evaluation, "row", list(range(len(evaluation))))

    epochs = EpochCounter()
    trainer = SpeakerTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=extractor,
        data_collator=ClassificationCollator(extractor, data.max_seconds, seed=args.seed, epochs=epochs),
        eval_collator=SpeakerCollator(extractor),
        epochs=epochs,
        compute_metrics=error_rate(pairs, same),
    )
    return run(trainer, evaluation, "audio-xvector", data.dataset)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(
        __doc__, argv, SMOKE, [ModelArguments, DataArguments, SpeakerArguments, SpeakerTrainingArguments]
    )
    return exit_code("finetune_speaker_verification", fine_tune, arguments)


if __name__ == "__main__":
    sys.exit(main())
