#!/usr/bin/env python3
# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune SPEAR for speech recognition with CTC, on a Hub dataset, a folder or a manifest.

    python examples/finetune_ctc.py --smoke --output_dir runs/ctc-smoke           # bundled audio, a minute on a CPU

    python examples/finetune_ctc.py --model marcoyang/spear-base-speech-audio-v2 --dataset my_speech.jsonl \\
        --output_dir runs/ctc --num_train_epochs 30 --per_device_train_batch_size 16 --warmup_steps 500 --bf16

    python examples/finetune_ctc.py --model marcoyang/spear-base-speech-audio-v2 --dataset openslr/librispeech_asr \\
        --dataset_config clean --train_split train.100 --eval_split validation --text_column text \\
        --output_dir runs/ls100 --num_train_epochs 30 --push_to_hub   # goes on with --resume_from_checkpoint last

A folder without a manifest has transcripts beside the audio: a.wav, a.txt. By default the encoder learns at 0.05 times
the rate of the head and is frozen for 2,000 steps, as in the paper. The result is a folder that AutoModelForCTC,
AutoProcessor and pipeline("automatic-speech-recognition") load, with the metrics (WER, CER) and a plot of the loss.
All arguments of transformers.TrainingArguments are taken: --help lists them.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCTC, EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearProcessor
from spear_hf.data.segments import FrameGrid
from spear_hf.evaluation.metrics import CharacterErrorRate, WordErrorRate
from spear_hf.finetuning.arguments import DataArguments, FineTuningArguments, ModelArguments, parse_arguments
from spear_hf.finetuning.collation import IGNORED, CTCCollator
from spear_hf.finetuning.datasets import single_texts, train_and_eval_rows, with_column, without_long_rows
from spear_hf.finetuning.epochs import EpochCounter
from spear_hf.finetuning.models import load_config, load_feature_extractor, load_model
from spear_hf.finetuning.reporting import exit_code, run
from spear_hf.finetuning.trainer import CTCTrainer
from spear_hf.finetuning.transcripts import ctc_tokenizer, normalize
from spear_hf.pretraining.corpus import BUNDLED


logger = logging.get_logger("spear_hf.finetune_ctc")

# fmt: off
SMOKE = [
    "--dataset", BUNDLED, "--where", "language=en", "--train_split", "pretrain", "--eval_split", "heldout",
    "--max_train_samples", "16", "--max_eval_samples", "4", "--max_steps", "8", "--per_device_train_batch_size", "4",
    "--freeze_encoder_steps", "2", "--logging_steps", "1", "--save_steps", "4", "--output_dir", "runs/ctc-smoke",
]
# fmt: on


@dataclass
class TextArguments:
    """Where the transcripts are, and how they are written."""

    text_column: str = field(default="transcript", metadata={"help": "Column of the transcripts."})
    keep_case_and_punctuation: bool = field(
        default=False, metadata={"help": "Take transcripts as they are, not as small letters without punctuation."}
    )


@dataclass
class CTCTrainingArguments(FineTuningArguments):
    """Defaults of the paper's recipe for ASR."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Of the head, at the end of the warm-up."})
    encoder_learning_rate_scale: float = field(
        default=0.05, metadata={"help": "The encoder's learning rate relative to that of the head."}
    )
    freeze_encoder_steps: int = field(
        default=2000, metadata={"help": "Train the head alone for so many steps; -1: for the whole training."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Order of the training rows: group_by_length, random, ..."}
    )


def transcribed(dataset: Dataset, arguments: TextArguments) -> Dataset:
    """With the texts that the model is to write, in the column `text`."""
    texts = single_texts(dataset, arguments.text_column)
    if not arguments.keep_case_and_punctuation:
        texts = [normalize(text) for text in texts]
    if empty := [row_id for row_id, text in zip(dataset["id"], texts) if not text]:
        raise ValueError(f"{len(empty)} transcripts have neither letters nor digits, the first of {empty[0]}")
    return with_column(dataset, "text", texts)


def labelled(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, extractor: SpearFeatureExtractor, config: SpearConfig
) -> Dataset:
    """With token ids in the column `labels`. Warnings count unknown tokens, and rows of more tokens than frames."""
    labels = tokenizer(list(dataset["text"])).input_ids
    if unknown := sum(ids.count(tokenizer.unk_token_id) for ids in labels):
        logger.warning(
            f"{unknown} of {sum(map(len, labels))} tokens are unknown to the tokenizer and become "
            f"{tokenizer.unk_token}: is it of another language, or of capital letters?"
        )
    grid = FrameGrid(config.output_downsampling_factor)
    frames = [grid.frames(extractor.num_frames(length)) for length in dataset["length"]]
    if short := sum(len(ids) > available for ids, available in zip(labels, frames)):
        logger.warning(f"{short} of {len(labels)} rows have more tokens than frames: CTC cannot learn them.")
    return with_column(dataset, "labels", labels)


def error_rates(tokenizer: PreTrainedTokenizerBase, references: list[str]) -> Any:
    """compute_metrics of the Trainer: WER and CER of the likeliest tokens, decoded greedily."""
    wer, cer = WordErrorRate(), CharacterErrorRate()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        ids = np.where(prediction.predictions == IGNORED, tokenizer.pad_token_id, prediction.predictions)
        texts = tokenizer.batch_decode(ids)
        for text, reference in list(zip(texts, references))[:2]:
            logger.info(f"written: {text!r}, said: {reference!r}")
        both = {"predictions": texts, "references": references}
        return {**wer.compute(**both), **cer.compute(**both)}

    return compute


def fine_tune(
    model_arguments: ModelArguments, data: DataArguments, text: TextArguments, args: CTCTrainingArguments
) -> dict[str, float]:
    """The metrics of the evaluation."""
    config = load_config(model_arguments)
    train, evaluation = train_and_eval_rows(data, [text.text_column], args.seed)
    train = transcribed(without_long_rows(train, data.max_seconds), text)
    evaluation = transcribed(evaluation, text)

    tokenizer = ctc_tokenizer(model_arguments.model, list(train["text"]))
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    model = load_model(AutoModelForCTC, model_arguments, config)
    extractor = load_feature_extractor(model_arguments, config)

    train, evaluation = (labelled(rows, tokenizer, extractor, config) for rows in (train, evaluation))
    trainer = CTCTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=SpearProcessor(extractor, tokenizer),
        data_collator=CTCCollator(extractor),
        eval_collator=CTCCollator(extractor),
        epochs=EpochCounter(),
        compute_metrics=error_rates(tokenizer, list(evaluation["text"])),
    )
    return run(trainer, evaluation, "automatic-speech-recognition", data.dataset)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(
        __doc__, argv, SMOKE, [ModelArguments, DataArguments, TextArguments, CTCTrainingArguments]
    )
    return exit_code("finetune_ctc", fine_tune, arguments)


if __name__ == "__main__":
    sys.exit(main())
