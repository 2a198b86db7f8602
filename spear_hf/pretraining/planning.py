# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf pretrain --dry-run`: how long the run will be and what it needs, without a step of it."""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..configuration_spear import SpearConfig
from ..data.audio import SAMPLING_RATE
from ..data.bucketing import split_batch
from ..data.collation import TokenShape
from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearForPreTraining
from ..mvq.quantizer import MultiCodebookQuantizer
from ..mvq.shard_fetcher import Task
from ..mvq.store import TokenStore
from ..mvq.store_location import LocalFolder
from .checkpoints import CheckpointFolder
from .config import PreTrainingConfig, TargetConfig
from .corpus import Corpus, load_corpus
from .data_check import check_data
from .flops import FlopCounter, peak_flops
from .launch import check_trackers
from .metrics import read_json_lines
from .run_folder import RunFolder
from .setup import build_dataset, build_mixer, build_sampler, continued, planned_architecture, uses_bf16
from .sources import settle_sources
from .streaming import open_stream
from .targets import utterances_of_target


# float32 weights, gradients and the two averages of AdamW or ScaledAdam.
BYTES_PER_PARAMETER = 16
STUDENT_RATE = 50.0  # assumed of tokens that do not exist yet
FRAME_SHIFT = 160  # samples, of the filter bank
# Where nothing has been measured. On GPUs it is what the paper's costs come to: 460 A800 hours for the base model are
# 4.8 % of its peak, 3,800 for the xlarge one 4.9 %.
ASSUMED_MFU = {"cuda": 0.05, "cpu": 0.3}
PACE_STEPS = 200  # the last so many steps tell the pace of a run


@dataclass(frozen=True)
class Plan:
    """What a run amounts to."""

    training_utterances: int
    training_hours: float
    validation_utterances: int
    batches_per_epoch: int
    padding_share: float
    step: int
    """Steps done already, by the last checkpoint."""
    steps: int
    epochs: float
    """Of the whole run, as are `hours_seen`."""
    hours_seen: float
    num_ranks: int
    micro_batches: int
    """Forward passes per step and rank, at most."""
    encoder_parameters: int
    head_parameters: int
    state_bytes: int
    """Weights, gradients and optimiser state on each device."""
    activation_bytes: int
    """What autograd keeps in float32 for the largest micro-batch; bf16 takes about half."""
    step_flops: float
    """Of a mean step over all ranks."""
    seconds_to_go: float
    """By the pace of the run so far, or at the `ASSUMED_MFU`."""
    pace: str
    """What that rests on."""
    cache: Task | None = None
    """Of shards of stores on the Hub."""

    def __str__(self) -> str:
        parameters = self.encoder_parameters + self.head_parameters
        left = self.steps - self.step
        rows = {
            "training": f"{self.training_utterances} utterances, {self.training_hours:.2f} hours",
            "validation": f"{self.validation_utterances} utterances",
            "batches per epoch": f"{self.batches_per_epoch}, {self.padding_share:.1%} padding",
            "steps": f"{self.steps}: {self.epochs:.1f} epochs, {self.hours_seen:.1f} hours of audio",
            "to go": f"{left} steps, {self.hours_seen * left / self.steps:.1f} hours of audio, about "
            f"{self.seconds_to_go / 3600:,.1f} hours {self.pace}",
            "operations": f"{self.step_flops / 1e12:,.2f} TFLOP a step",
            "forward passes per step": f"{self.micro_batches} on each of {self.num_ranks} ranks",
            "parameters": f"{parameters:,} ({self.encoder_parameters:,} encoder, {self.head_parameters:,} heads)",
            "memory per device": f"about {(self.state_bytes + self.activation_bytes) / 1e9:.2f} GB in float32: "
            f"{self.state_bytes / 1e9:.2f} weights and optimiser; {self.activation_bytes / 1e9:.2f} activations",
        }
        if self.cache is not None:
            whole = self.cache.size(range(len(self.cache.files)))
            rows["disk of a node"] = (
                f"at most {min(self.cache.room, whole) / 1e9:.3g} GB of the stores' {whole / 1e9:.3g}, in "
                f"{len(self.cache.windows)} windows of which two need {self.cache.smallest_room() / 1e9:.3g}"
            )
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


class PlannedTokens(NamedTuple):
    """Tokens that are not there yet, as the configuration says; of a teacher at the student's rate."""

    num_codebooks: int
    codebook_size: int
    frame_rate: float = STUDENT_RATE


def planned_tokens(target: TargetConfig) -> TokenShape:
    """Of the store, or as its tokenizer will make them, or as the configuration has them made."""
    if target.store is not None:
        return TokenStore.open(target.store)
    if target.tokenizer is not None:
        made = MultiCodebookQuantizer.from_pretrained(target.tokenizer).config
        return PlannedTokens(made.num_codebooks, made.codebook_size, made.frame_rate or STUDENT_RATE)
    return PlannedTokens(target.num_codebooks, target.codebook_size)


def plan_run(config: PreTrainingConfig) -> Plan:
    """Reads the list of utterances; tokens need not exist yet, and the model is one without weights.

    Where output_dir holds a run already, the plan is for the rest of it.
    """
    folder = RunFolder(config.output_dir)
    folder.check_place()
    check_trackers(config.logging.trackers)
    done = CheckpointFolder(folder.checkpoints)
    config = continued(settle_sources(config, folder), done.path(done.steps()[-1]) if done.steps() else None)
    corpus = load_corpus(config.data, config.seed, config.mixing)
    sampler = build_sampler(config, corpus)
    tokens = {name: planned_tokens(target) for name, target in config.targets.items()}
    stores = {name: store for name, store in tokens.items() if isinstance(store, TokenStore)}
    stream = open_stream(config, corpus, stores, sampler, fetches=False)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    limit = config.execution.batch_seconds_per_device
    max_samples = None if limit is None else round(limit * SAMPLING_RATE)
    parts = [part for batch in sampler.plan(0) for part in split_batch(batch, sampler.lengths, num_ranks, max_samples)]
    batches = [rows for part in parts for rows in part if len(rows)]
    padded = [(len(rows) * int(sampler.lengths[rows].max()), len(rows)) for rows in batches]

    with torch.device("meta"):  # shapes without memory
        model = SpearForPreTraining(planned_architecture(config, tokens))
    _check(config, corpus, tokens, stores, model.config)
    encoder = sum(parameter.numel() for parameter in model.spear.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples, rows_of_largest = max(padded)
    heard = sampler.lengths[sampler.heard(0)]
    count = FlopCounter(model.config)
    frames, times = np.unique(heard // FRAME_SHIFT, return_counts=True)
    flops = sum(count([length]) * repeated for length, repeated in zip(frames.tolist(), times.tolist()))
    step_flops = flops / sampler.batches_per_epoch
    epochs = config.max_steps / sampler.batches_per_epoch
    step, seconds, pace = _pace(config, step_flops, num_ranks)
    shards = num_ranks if config.execution.sharding == "fsdp" else 1
    return Plan(
        training_utterances=len(corpus.training),
        training_hours=corpus.hours,
        validation_utterances=len(corpus.validation),
        batches_per_epoch=sampler.batches_per_epoch,
        padding_share=1.0 - float(heard.sum()) / sum(size for size, _ in padded),
        step=step,
        steps=config.max_steps,
        epochs=epochs,
        hours_seen=epochs * float(heard.sum()) / SAMPLING_RATE / 3600,
        num_ranks=num_ranks,
        micro_batches=max(len(part) for part in parts),
        encoder_parameters=encoder,
        head_parameters=parameters - encoder,
        state_bytes=BYTES_PER_PARAMETER * parameters // shards,
        activation_bytes=activation_bytes(model, rows_of_largest, samples // rows_of_largest),
        step_flops=step_flops,
        seconds_to_go=(config.max_steps - step) * seconds,
        pace=pace,
        cache=None if stream is None else stream.task,
    )


def _check(
    config: PreTrainingConfig,
    corpus: Corpus,
    tokens: Mapping[str, TokenShape],
    stores: Mapping[str, TokenStore],
    architecture: SpearConfig,
) -> None:
    """ValueError where the data, that of its probes included, is not what the run would need."""
    for name, target in config.targets.items():
        utterances_of_target(name, target, corpus)
    build_mixer(config, corpus.training, corpus.training_lengths, corpus.windows, corpus.noise)
    if config.logging.probe_every:
        from .online_probe import OnlineProbe  # brings scikit-learn

        OnlineProbe(config.logging, SpearFeatureExtractor(), config.seed)
    if len(stores) == len(tokens):
        training, _ = (
            build_dataset(config, utterances, stores, architecture, SpearFeatureExtractor())
            for utterances in (corpus.training, corpus.validation)
        )
        places = [store.location for store in (corpus.store, *stores.values()) if store is not None]
        if config.execution.check_data and all(isinstance(place, LocalFolder) for place in places):  # fetches nothing
            check_data(training, stores, np.arange(len(training)), config.seed, None)


def _pace(config: PreTrainingConfig, step_flops: float, num_ranks: int) -> tuple[int, float, str]:
    """Steps done by the run in output_dir, seconds of a step, and what these rest on."""
    folder = RunFolder(config.output_dir)
    done = CheckpointFolder(folder.checkpoints).steps()
    seconds = [record["step_seconds"] for record in read_json_lines(folder.metrics)[-PACE_STEPS:]]
    step = min(done[-1], config.max_steps) if done else 0
    if seconds:
        return step, statistics.median(seconds), "at the pace of the run so far"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = num_ranks * peak_flops(device, uses_bf16(config.execution))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    mfu = ASSUMED_MFU[device.type]
    return step, step_flops / (mfu * peak), f"if {num_ranks} x {name} reach {mfu:.0%} of their peak"


def activation_bytes(model: SpearForPreTraining, rows: int, num_samples: int) -> int:
    """Bytes that autograd keeps of utterances of `num_samples`, parameters left out, counted in a forward pass.

    `model` is on the meta device, so that the pass takes neither time nor memory.
    """
    config = model.config
    frames = num_samples // FRAME_SHIFT
    targets: Mapping[str, dict] = config.pretraining_targets or {}
    output_frames = int(model._get_feat_extract_output_lengths(frames))
    labels = {
        f"{name}_labels": torch.zeros(rows, output_frames, target["num_codebooks"], dtype=torch.long, device="meta")
        for name, target in targets.items()
    }
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other gets its place while counting

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(
            torch.zeros(rows, frames, config.num_mel_bins, device="meta"),
            attention_mask=torch.ones(rows, frames, dtype=torch.long, device="meta"),
            mask_time_indices=torch.zeros(rows, frames, dtype=torch.bool, device="meta"),
            **labels,
        )
    return sum(storage.nbytes() for storage in kept.values())
