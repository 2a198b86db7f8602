# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""One update of the weights, from the micro-batches of all ranks."""

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.audio import SAMPLING_RATE
from ..data.collation import MicroBatch
from ..data.seeding import keyed_seed
from ..devices import to_device
from .flops import FlopCounter
from .metrics import StepSums, ratio
from .optimization import clip_gradients, clipping_factor, set_learning_rate
from .regularizers_schedules import adjusted_batches
from .run_state import RunState
from .schedules import learning_rate_factor
from .sharding import is_sharded, parameter_norm, reduce_whole_gradients


logger = logging.getLogger(__name__)


def train_step(
    state: RunState, batches: Sequence[MicroBatch], sums: StepSums, flops: FlopCounter, stop_requested: bool
) -> tuple[dict[str, Any], bool]:
    """Makes an update: the metrics of the step, and whether any rank was told to stop.

    A step whose loss or gradient is not finite on any rank makes no update on all; its ranks and utterances are
    recorded.

    Args:
        batches: of this rank.
        sums: empty ones; afterwards they are those of all ranks.
        stop_requested: of this rank.
    """
    config, accelerator, progress = state.config, state.accelerator, state.progress
    torch.manual_seed(keyed_seed(config.seed, progress.step, accelerator.process_index, "dropout"))
    learning_rate = config.optimizer.peak_rate * learning_rate_factor(config.schedule, progress.step, progress.hours)
    set_learning_rate(state.optimizer, learning_rate)

    items = to_device([sum(batch.num_items for batch in batches)], torch.int64, accelerator.device)
    items = accelerator.reduce(items, "sum").clamp(min=1)
    # Distributed training averages gradients over the ranks, where their sum is wanted.
    normaliser = items[0] / accelerator.num_processes
    state.regularizers.set_step(adjusted_batches(progress.step, config.data.batch_seconds), normaliser)
    if stop_requested:
        sums.request_stop()
    row_losses = _add_gradients(state, batches, normaliser, sums, flops)
    if is_sharded(state.model):
        reduce_whole_gradients(state.parameters)
    norms = parameter_norm(state.parameters), clip_gradients(accelerator, state.parameters, config.optimizer)
    sums.reduce(accelerator)
    # Besides the places of the targets, all that the host waits for in a step.
    totals, ((weights_norm,), (grad_norm,), votes) = sums.read(*norms, state.regularizers.collect_votes())
    state.regularizers.count_votes(votes)
    counts = totals.counters
    finite = math.isfinite(counts["loss"]) and math.isfinite(grad_norm)
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad()
    progress.step += 1
    progress.samples += round(counts["samples"])
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1

    record: dict[str, Any] = {
        "step": progress.step,
        "loss": counts["loss"],
        **sums.metrics(totals),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "clipping_factor": clipping_factor(state.optimizer, config.optimizer, grad_norm),
        "parameter_norm": weights_norm,
        "utterances": round(counts["utterances"]),
        "target_frames": round(counts["items"]),
        "mixed_share": ratio(counts["mixed"], counts["utterances"]),
        "noisy_share": ratio(counts["noisy"], counts["utterances"]),
        "batch_seconds": counts["samples"] / SAMPLING_RATE,
        "padding_share": 1.0 - (ratio(counts["samples"], counts["padded_samples"]) or 0.0),
        "hours": progress.hours,
        "flops": counts["flops"],
    }
    if not finite:
        record["skipped"] = _suspects(accelerator, batches, row_losses)
        if accelerator.is_main_process:
            logger.warning(
                "Step %d: loss %s, gradient norm %s; no update. %s.",
                progress.step,
                counts["loss"],
                grad_norm,
                "; ".join(f"Rank {part['rank']}: {', '.join(part['utterances'])}" for part in record["skipped"]),
            )
    return record, counts["stop"] > 0


def _add_gradients(
    state: RunState, batches: Sequence[MicroBatch], normaliser: torch.Tensor, sums: StepSums, flops: FlopCounter
) -> list[torch.Tensor]:
    """Forward and backward passes of this rank's micro-batches; of each the losses of its rows, `(rows,)`."""
    accelerator, model = state.accelerator, state.model
    sharded = is_sharded(model)
    row_losses = []
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        if sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with contextlib.nullcontext() if last or sharded else accelerator.no_sync(model):
            inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.inputs.items()}
            with accelerator.autocast():
                output = model(**inputs, num_items_in_batch=normaliser)
            accelerator.backward(output.loss)
        operations = flops(batch.inputs["attention_mask"].sum(dim=1).tolist()) if batch.ids else 0
        sums.add(batch, output, output.loss / accelerator.num_processes, operations)
        row_losses.append(output.utterance_statistics[..., 0].sum(dim=(0, 2)))
    return row_losses


def _suspects(
    accelerator: Accelerator, batches: Sequence[MicroBatch], row_losses: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """Rank and utterances of the losses that are not finite; all, where the gradient of any may be at fault."""
    everyone = [utterance for batch in batches for utterance in batch.ids]
    bad = [not loss.isfinite() for losses, batch in zip(row_losses, batches) for loss in losses[: len(batch.ids)]]
    suspects = [utterance for utterance, is_bad in zip(everyone, bad) if is_bad]
    return _by_rank(accelerator, suspects) or _by_rank(accelerator, everyone)


def _by_rank(accelerator: Accelerator, ids: list[str]) -> list[dict[str, Any]]:
    """The rank and the utterances of every rank that has any."""
    parts = gather_object([{"rank": accelerator.process_index, "utterances": ids}])
    return [part for part in parts if part["utterances"]]
