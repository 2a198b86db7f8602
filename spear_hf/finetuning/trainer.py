# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer, where fine-tuning audio needs other than it does.

Its own parameter groups know no rate for the encoder; its grouping by length changes its order on resuming, also
shuffles the evaluation, and cannot weigh rows; and it has a single collator, though only training crops and mixes at
random.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from .arguments import FineTuningArguments
from .epochs import EpochCounter
from .optimization import FreezeThenThaw, decayed_names, scale_learning_rate
from .sampling import LengthGroupedSampler, WeightedSampler


class FineTuningTrainer(Trainer):
    """Trainer of a head and, at its own pace, the encoder.

    Args:
        args: with `encoder_learning_rate_scale` and `freeze_encoder_steps`.
        data_collator: makes training batches.
        eval_collator: makes batches of evaluation and prediction.
        epochs: what the training collator reads the epoch from.
        sampling_weights: (rows,), to draw training rows by with replacement; without, `train_sampling_strategy` holds.
    """

    args: FineTuningArguments
    has_class_logits = True  # of which labels are ids: those alone can be smoothed

    def __init__(
        self,
        *,
        args: FineTuningArguments,
        data_collator: Callable[[list[dict]], dict[str, Any]],
        eval_collator: Callable[[list[dict]], dict[str, Any]],
        epochs: EpochCounter,
        sampling_weights: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, data_collator=data_collator, **kwargs)
        config = getattr(self.model, "config", None)
        several = getattr(config, "problem_type", None) == "multi_label_classification"
        if args.label_smoothing_factor and (several or not self.has_class_logits):
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: only one class of an utterance or a frame can "
                "be smoothed, not transcripts, speakers or several labels; leave it out"
            )
        self.eval_collator = eval_collator
        self.epochs = epochs
        self.sampling_weights = sampling_weights
        self.add_callback(epochs)
        if args.freeze_encoder_steps:
            self.add_callback(FreezeThenThaw(args.freeze_encoder_steps))

    @property
    def num_train_rows(self) -> int:
        dataset: Any = self.train_dataset
        return len(dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
            trained: Any = self.model if model is None else model
            scale = self.args.encoder_learning_rate_scale
            self.optimizer = scale_learning_rate(optimizer, trained.base_model.parameters(), scale)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.sampling_weights is not None:
            return WeightedSampler(self.sampling_weights, seed, self.epochs)
        if self.args.train_sampling_strategy == "group_by_length":
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(dataset[self.args.length_column_name], batch_size, seed, self.epochs)
        return super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """None: in the order of the rows, which the metrics rely on."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._evaluation_collator():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._evaluation_collator():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            yield
        finally:
            self.data_collator = training


class CTCTrainer(FineTuningTrainer):
    """Its predictions are the likeliest token of every frame (rows, frames), -100 where a row has no frame."""

    has_class_logits = False

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is not None:
            mask = inputs["attention_mask"].to(logits.device)
            head: Any = self.model
            valid = head._get_feature_vector_attention_mask(logits.shape[1], mask)
            logits = logits.argmax(dim=-1).masked_fill(~valid, -100)
        return loss, logits, labels


class SpeakerTrainer(FineTuningTrainer):
    """Its predictions are embeddings (rows, dim) and its labels are row numbers: evaluation has speakers of its own.

    Hence there is no evaluation loss.
    """

    has_class_logits = False

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        features = {key: value for key, value in inputs.items() if key != "rows"}
        outputs: Any = super().prediction_step(model, features, False, ignore_keys)[1]  # logits, embeddings
        return None, outputs[1], self._prepare_inputs({"rows": inputs["rows"]})["rows"]
