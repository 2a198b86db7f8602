# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Command-line arguments that the fine-tuning scripts share, and their parser.

The training arguments are those of transformers, with two more for the encoder.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed


LAST = "last"
ERROR_RATES = ("wer", "cer", "eer")  # metrics of which less is better
# Values of SpearConfig for --smoke: small enough for one CPU core, deep enough to have every kind of module.
SMOKE_MODEL = """{"hidden_size": 64, "intermediate_size": 128, "stem_channels": [4, 8, 16], "num_attention_heads": 2,
"query_head_dim": 16, "num_layers_per_stack": [1, 1, 1], "downsampling_factors": [1, 2, 1],
"conv_kernel_sizes": [15, 15, 15], "classifier_proj_size": 64, "tdnn_dim": [64, 64, 64, 64, 128],
"xvector_output_dim": 64}"""


@dataclass
class ModelArguments:
    """What to fine-tune."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a SPEAR model, published, pre-trained or fine-tuned."}
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Values of SpearConfig, as a JSON object or the name of a .json file. With --model they replace "
            "those of the checkpoint, as in '{\"use_weighted_layer_sum\": true}'; without, they are the sizes of a "
            "model with random weights."
        },
    )


@dataclass
class DataArguments:
    """Which audio to train on, and which to evaluate on."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Folder of audio, manifest (.jsonl, .csv or .tsv), or name of a dataset on the Hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a dataset of the Hub."}
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Default: `train`; all rows of a folder, or of a manifest without splits."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Where the evaluation audio is, if not in --dataset."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Default: `validation`, `valid` or `dev` of a manifest that has it, else --eval_share of the "
            "training rows."
        },
    )
    eval_share: float = field(
        default=0.1, metadata={"help": "Share of the training rows that is held out when no evaluation set is named."}
    )
    where: list[str] = field(
        default_factory=list,
        metadata={"help": "Keep rows with COLUMN=VALUE only, as in: --where language=en domain=speech."},
    )
    audio_column: str = field(default="audio", metadata={"help": "Column of a dataset of the Hub."})
    max_seconds: float = field(default=20.0, metadata={"help": "Longest audio to train on, in seconds."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training rows, at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many evaluation rows, at random."})

    def __post_init__(self) -> None:
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} must lie between 0 and 1, as in 0.1 for a tenth")
        for name in ("max_seconds", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        for condition in self.where:
            if not re.fullmatch(r"[^=]+=.*", condition):
                raise ValueError(f"where={condition!r} must read COLUMN=VALUE, as in language=en")


@dataclass
class FineTuningArguments(TrainingArguments):
    """Arguments of transformers' Trainer, with the pace of the encoder and defaults that suit audio."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the audio is decoded when a batch is made."}
    )
    encoder_learning_rate_scale: float = field(
        default=1.0, metadata={"help": "The encoder's learning rate relative to that of the head (paper, ASR: 0.05)."}
    )
    freeze_encoder_steps: int = field(
        default=0,
        metadata={"help": "Train the head alone for so many steps (paper, ASR: 2000); -1: for the whole training."},
    )

    def __post_init__(self) -> None:
        if self.do_predict:
            raise ValueError("do_predict=True: these scripts do not predict; --do_eval measures and saves metrics")
        if not (self.do_train or self.do_eval):  # before `eval_strategy` sets `do_eval`
            self.do_train = self.do_eval = True
        if self.greater_is_better is None and str(self.metric_for_best_model).removeprefix("eval_") in ERROR_RATES:
            self.greater_is_better = False  # transformers takes all but losses for scores
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would take the audio away; leave it out")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # it would only warn
        if self.encoder_learning_rate_scale < 0:
            raise ValueError(f"encoder_learning_rate_scale={self.encoder_learning_rate_scale} must be 0 or more")
        if self.freeze_encoder_steps < -1:
            raise ValueError(
                f"freeze_encoder_steps={self.freeze_encoder_steps} must be a number of steps, or -1 for all"
            )
        if self.freeze_encoder_steps and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # while frozen, the encoder has no gradients to wait for


def parse_arguments(
    description: str | None, argv: Sequence[str] | None, smoke: Sequence[str], classes: list[Any]
) -> tuple[Any, ...]:
    """Instances of the dataclasses, of the command line; the random seed is set from the training arguments.

    `--smoke` puts the arguments `smoke` in front of those given, which so win. Wrong arguments end the program with
    exit code 2, as argparse does, and a message that names the value.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(classes, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="A tiny model and a few steps on the bundled audio.")
    if "--smoke" in given:
        names = {argument.split("=")[0] for argument in given}
        model = [] if names & {"--model", "--model_config"} else ["--model_config", SMOKE_MODEL]
        given = [*smoke, *model, *given]
    try:
        *parsed, _ = parser.parse_args_into_dataclasses(given)
        training = next(arguments for arguments in parsed if isinstance(arguments, FineTuningArguments))
        _resolve_checkpoint(training)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")  # parser.error would print 200 lines of usage before it
    set_seed(training.seed)
    return tuple(parsed)


def _resolve_checkpoint(training: FineTuningArguments) -> None:
    """`--resume_from_checkpoint last` becomes a folder; ValueError if there is none, or if runs would be mixed up."""
    folder = Path(str(training.output_dir))
    last = _last_checkpoint(folder)
    wanted = training.resume_from_checkpoint
    if wanted in (LAST, "True", "true"):
        if last is None:
            raise ValueError(f"resume_from_checkpoint={wanted}, but {folder} holds no checkpoint")
        training.resume_from_checkpoint = last
    elif wanted is not None and not Path(wanted).is_dir():
        raise ValueError(f"resume_from_checkpoint={wanted} is no folder: name a checkpoint, or say {LAST}")
    elif wanted is None and last is not None and training.do_train:
        raise ValueError(
            f"output_dir={folder} holds checkpoints of an earlier training: --resume_from_checkpoint {LAST} goes on "
            "with it; otherwise choose another folder"
        )


def _last_checkpoint(folder: Path) -> str | None:
    """The one of the latest step that is complete: the Trainer writes its state last."""
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdecimal()]
    for path in sorted(states, key=lambda path: int(path.parent.name[11:]), reverse=True):
        with contextlib.suppress(ValueError):  # of a state that was cut off
            json.loads(path.read_text(encoding="utf-8"))
            return str(path.parent)
    return None
