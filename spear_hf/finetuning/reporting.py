# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What a fine-tuning script does around the training: run, evaluate, save, plot, push."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError

from ..evaluation.plots import BLUE, ORANGE, new_figure, running_mean, save_figure, styled
from .datasets import is_local
from .trainer import FineTuningTrainer


if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"
TRANSPORTS = ("httpx", "httpx2")  # of huggingface_hub, whose errors are no OSError


def run(trainer: FineTuningTrainer, eval_dataset: Dataset, task: str, dataset: str | None) -> dict[str, float]:
    """Trains, evaluates, saves and pushes, as far as the arguments say; the metrics of the last evaluation.

    The output folder gets the model with its processing class, train_results.json, eval_results.json,
    all_results.json, trainer_state.json, loss.png and a model card.

    Args:
        task: the pipeline's name, for the card.
        dataset: name or path of the training data; the card names it if it is on the Hub.
    """
    args = trainer.args
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        metrics = {**result.metrics, "train_samples": trainer.num_train_rows}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    evaluation: dict[str, float] = {}
    if args.do_eval:
        evaluation = {**trainer.evaluate(eval_dataset), "eval_samples": len(eval_dataset)}
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
    if trainer.is_world_process_zero() and any("loss" in record for record in trainer.state.log_history):
        save_figure(plot_losses(trainer.state.log_history), Path(str(args.output_dir)) / LOSS_PLOT)
    card: dict[str, Any] = {"tasks": task, "tags": ["spear"]}
    if dataset is not None and not is_local(dataset):
        card["dataset_tags"] = card["dataset"] = dataset
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    elif args.do_train:
        trainer.create_model_card(**card)
    return evaluation


def exit_code(name: str, fine_tune: Callable[..., Mapping[str, float]], arguments: Sequence[Any]) -> int:
    """Of the script `name`: 0 and the metrics printed, or 1 and what the user can do something about, in a line."""
    try:
        metrics = fine_tune(*arguments)
    except Exception as error:
        if type(error).__module__.partition(".")[0] in TRANSPORTS:
            reason = f"the Hub cannot be reached: {error}"
        elif isinstance(error, SafetensorError):
            reason = f"the model cannot be read or saved: {error}"
        elif isinstance(error, (ValueError, OSError)):
            reason = str(error)
        else:
            raise
        print(f"{name}: {reason}", file=sys.stderr)
        return 1
    print(", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, (int, float))))
    return 0


@styled
def plot_losses(log_history: Sequence[Mapping[str, Any]]) -> "Figure":
    """Training loss by step, its running mean thick, and the evaluation losses, from the Trainer's log."""
    figure, axes = new_figure()
    training = [(record["step"], record["loss"]) for record in log_history if "loss" in record]
    if not training:
        raise ValueError("The log holds no training loss to plot: was logging_steps larger than the training?")
    steps, losses = np.array(training).T
    axes.plot(steps, losses, color=ORANGE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, running_mean(losses), color=ORANGE, linewidth=2, label="training")
    evaluation = [(record["step"], record["eval_loss"]) for record in log_history if "eval_loss" in record]
    if evaluation:
        axes.plot(*np.array(evaluation).T, "o", color=BLUE, mec="white", ms=7, label="evaluation")
    axes.set_title("Fine-tuning")
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel("Loss")
    axes.set_xlim(left=0)
    axes.legend()
    return figure
