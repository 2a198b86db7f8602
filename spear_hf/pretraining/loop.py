# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The pre-training loop.

    outcome = pretrain(load_config("tiny"), resume=False)

Every draw (initialisation, order, crops, masks, dropout) is a function of the seed and of the step, epoch, rank or
utterance, so a run that is killed and resumed repeats, on the same machine, what the uninterrupted one would have
done. A step trains on the same utterances whatever the number of ranks; its loss is normalised by the number of target
frames over all of them.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.audio import SAMPLING_RATE
from ..data.collation import MicroBatch, StepDataset
from ..data.seeding import keyed_seed
from ..feature_extraction_spear import SpearFeatureExtractor
from ..hub_card import write_run_card
from ..modeling_spear import SpearForPreTraining
from ..mvq.store import TokenStore
from ..mvq.store_format import StoreInfo
from .averaging import RunningAverage
from .checkpoints import CheckpointFolder, save_errors, write_folder
from .config import PreTrainingConfig
from .corpus import Corpus, load_corpus
from .flops import FlopCounter, peak_flops
from .loader import loaded_steps
from .metrics import JsonLines, StepClock, StepSums, codebooks_of, memory_mb, numbers, ratio, summary, to_device
from .optimization import build_optimizer, clip_gradients, clipping_factor, set_learning_rate
from .regularizers import Regularizers, install_regularizers
from .regularizers_schedules import adjusted_batches
from .run_folder import RunFolder
from .schedules import learning_rate_factor
from .setup import build_dataset, build_model, build_sampler, cropped, uses_bf16
from .sharding import gathered, is_sharded, load_from_main, parameter_norm, reduce_whole_gradients, shard
from .signals import StopRequest
from .sources import record_sources, settle_sources
from .streaming import open_stream
from .targets import prepare_stores
from .validation import Validator, load_unigrams


logger = logging.getLogger(__name__)

# Steps with a loss or gradient that is not finite are skipped; so many in a row end the run.
MAX_SKIPPED_IN_A_ROW = 3


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient was not finite in several steps in a row."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    """Steps done so far, by this process and the ones before it."""
    final: Path | None
    """The folder of the finished model; None if the run was interrupted."""
    interrupted_by: str | None = None
    """Name of the signal that ended it, after saving a checkpoint."""


@dataclass
class Progress:
    """What changes from step to step besides weights and optimiser; stored in state.json of a checkpoint."""

    step: int = 0
    """Optimiser steps done, skipped ones included. It is also the sampler's position."""
    samples: int = 0
    """Samples of audio seen, without padding."""
    skipped_in_a_row: int = 0
    """Steps without an update just before."""
    num_ranks: int = 1
    """Of the process that saved it; another number may go on."""

    @property
    def hours(self) -> float:
        """Hours of audio seen."""
        return self.samples / SAMPLING_RATE / 3600


def pretrain(config: PreTrainingConfig, resume: bool = False) -> Outcome:
    """Runs, or with `resume` continues, the training of `config` up to `max_steps`.

    ValueError: something is wrong with the settings or the data. NonFiniteLossError: see there.
    """
    with contextlib.ExitStack() as stack:
        folder = RunFolder(config.output_dir)
        accelerator = make_accelerator(config, folder)
        stack.callback(leave, accelerator)
        stack.callback(folder.release)
        if accelerator.is_main_process:
            folder.check(config, resume)
        accelerator.wait_for_everyone()  # nobody writes into the folder before it is checked
        if not accelerator.is_main_process:
            logging.getLogger("spear_hf").setLevel(logging.WARNING)
        stack.enter_context(logging_redirect_tqdm(loggers=[logging.getLogger("spear_hf")]))

        settled = [settle_sources(config, folder) if accelerator.is_main_process else None]
        sources: PreTrainingConfig = broadcast_object_list(settled)[0]  # the same for all ranks
        corpus = load_corpus(sources.data, config.seed)
        extractor = SpearFeatureExtractor()
        probe = None
        if config.logging.probe_every and accelerator.is_main_process:
            from .online_probe import OnlineProbe  # brings scikit-learn

            probe = OnlineProbe(config.logging, extractor, config.seed)
        with accelerator.main_process_first():  # the others find what the first has made
            stores = prepare_stores(config, sources.targets, corpus, folder, device=str(accelerator.device))

        bare_model = build_model(config, stores)
        sampler = build_sampler(config, corpus)
        stream = open_stream(config, corpus, stores, sampler, accelerator.is_local_main_process)
        steps = StepDataset(
            build_dataset(
                config,
                corpus.training,
                stores,
                bare_model.config,
                extractor,
                corpus.training_lengths,
                corpus.windows,
            ),
            sampler,
            accelerator.process_index,
            accelerator.num_processes,
            config.execution.batch_seconds_per_device,
        )
        optimizer = build_optimizer(bare_model, config.optimizer, accelerator.distributed_type)
        first_averaged = config.max_steps - round(config.max_steps * config.averaging.last_fraction)
        average = None
        if accelerator.is_main_process:  # all ranks have the same weights: one keeps their average
            average = RunningAverage(config.averaging.every, start=first_averaged)
        checkpoints = CheckpointFolder(folder.checkpoints, config.checkpointing.keep)
        saved = latest_checkpoint(accelerator, checkpoints) if resume else None
        progress = load_checkpoint(saved, bare_model, optimizer, average, corpus, stores) if saved else Progress()
        if progress.step > config.max_steps:
            raise ValueError(
                f"{config.output_dir} has done {progress.step} steps already, more than max_steps={config.max_steps}: "
                f"set it to {progress.step} to have the model of that step, or to more."
            )
        if saved and progress.num_ranks != accelerator.num_processes:
            logger.warning(
                "Resuming on %d ranks instead of %d: utterances, crops and masks stay the same, dropout does not.",
                accelerator.num_processes,
                progress.num_ranks,
            )
        progress.num_ranks = accelerator.num_processes
        if average is not None:
            first_averaged = average.start  # that of the checkpoint, where it goes on with its samples
        first_averaged = broadcast_object_list([first_averaged])[0]
        regularizers = install_regularizers(bare_model, config.regularizers, in_graph=config.execution.compile)
        if saved:
            regularizers.load(saved)
        if config.execution.compile:
            bare_model.compile_layers()
        if config.execution.sharding == "fsdp":
            shard(bare_model, optimizer, accelerator)
            model = bare_model
        else:
            model, optimizer = accelerator.prepare(bare_model, optimizer)

        files: dict[str, JsonLines] = {}
        if accelerator.is_main_process:
            folder.claim()
            folder.create(config)
            record_sources(folder, config, sources)
            for path in (folder.metrics, folder.evaluation, folder.probes):
                files[path.stem] = stack.enter_context(JsonLines(path, progress.step))
            files["averaged"] = stack.enter_context(JsonLines(folder.averaged))  # of the end, which is still to come
            accelerator.init_trackers("spear-hf", init_kwargs={"tensorboard": {"purge_step": progress.step + 1}})
        if stream is not None:
            stack.enter_context(stream).start(progress.step)
        accelerator.wait_for_everyone()  # the other ranks of a node read what the first one's process fetches
        validator = None
        if config.logging.validate_every and config.data.validation_fraction and not corpus.validation:
            logger.warning(
                "No utterance is held out, so the run goes without validation: raise data.validation_fraction (%g), "
                "or name a data.validation_split.",
                config.data.validation_fraction,
            )
        if config.logging.validate_every and corpus.validation:
            with accelerator.main_process_first():
                unigrams = load_unigrams(stores, corpus, sampler.at_hand(progress.step), folder)
            validator = Validator(
                build_dataset(config, corpus.validation, stores, bare_model.config, extractor),
                cropped(corpus.validation, corpus.validation_lengths, config),
                unigrams,
                config.execution.batch_seconds_per_device or config.data.batch_seconds,
                accelerator,
            )

        def validate() -> None:
            if validator is not None:
                record = validator(bare_model)
                if files:
                    files["evaluation"].write({"step": progress.step, **record})
                    accelerator.log(numbers(record, "evaluation"), step=progress.step)
                logger.info("Step %d, held-out audio: %s.", progress.step, summary(record))

        def run_probe() -> None:
            whole = whole_model(accelerator, bare_model)
            if probe is not None and whole is not None:
                try:
                    record = probe(whole.spear.to(accelerator.device))
                except (ValueError, OSError) as error:  # audio that is gone, say: no reason to end the run
                    logger.warning("Step %d is not probed: %s", progress.step, error)
                else:
                    files["probes"].write({"step": progress.step, **record})
                    accelerator.log(numbers(record, "probe"), step=progress.step)
            accelerator.wait_for_everyone()

        def save() -> None:
            whole = whole_model(accelerator, bare_model)
            state = gathered(optimizer.state_dict(), keep=accelerator.is_main_process)
            if whole is not None:
                assert average is not None
                for file in files.values():
                    file.sync()
                path = checkpoints.save(
                    progress.step,
                    lambda into: write_checkpoint(into, whole, state, average, regularizers, progress, corpus, stores),
                )
                logger.info("Saved %s.", path)
            accelerator.wait_for_everyone()

        logger.info(
            "%d utterances (%.2f hours), %d steps an epoch; %.1f million parameters; steps %d to %d on %d x %s.",
            len(corpus.training),
            corpus.hours,
            sampler.batches_per_epoch,
            sum(parameter.numel() for parameter in bare_model.parameters()) / 1e6,
            progress.step + 1,
            config.max_steps,
            accelerator.num_processes,
            accelerator.device,
        )
        if progress.step < config.max_steps:
            sampler.batch(progress.step)  # plans the epoch before the loader's workers are forked, and share the plan
        bar = stack.enter_context(
            tqdm(
                total=config.max_steps,
                initial=progress.step,
                unit="step",
                disable=None if config.logging.progress and accelerator.is_main_process else True,
            )
        )
        stop = stack.enter_context(StopRequest())
        model.train()
        peak = peak_flops(accelerator.device, uses_bf16(config.execution))
        clock = StepClock(peak * accelerator.num_processes)
        step_flops = FlopCounter(bare_model.config)
        target_domains = {name: target.domains for name, target in config.targets.items()}
        parameters = list(bare_model.parameters())
        loaded = loaded_steps(
            steps,
            range(progress.step, config.max_steps),
            config.execution.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        for batches in stack.enter_context(loaded):
            clock.data_arrived()
            record, must_stop = train_step(
                config,
                accelerator,
                model,
                parameters,
                optimizer,
                regularizers,
                batches,
                progress,
                StepSums(codebooks_of(bare_model), corpus.domains, accelerator.device, target_domains),
                step_flops,
                stop.received is not None,
            )
            if progress.step > first_averaged and progress.step % config.averaging.every == 0:
                sampled = whole_model(accelerator, bare_model)  # gathered by all ranks, where it is in shards
                if average is not None and sampled is not None:
                    average.update(progress.step, sampled.state_dict())
            record["epoch"] = progress.step / sampler.batches_per_epoch
            record.update(clock.lap(record["batch_seconds"] * SAMPLING_RATE, record.pop("flops")))
            record["memory_mb"] = round(memory_mb(accelerator.device), 1)
            if files:
                record["batch"] = sampler.digest(progress.step - 1)
                files["metrics"].write(record)
                accelerator.log(numbers(record, "training"), step=progress.step)
            if stream is not None:
                stream.advance(progress.step)
            bar.update()
            bar.set_postfix_str(summary(record), refresh=False)
            if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteLossError(
                    f"The loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step "
                    f"{progress.step}; their ranks and utterances are under 'skipped' in {folder.metrics}. Look at "
                    "these. --resume takes the steps since the last checkpoint again; for a lower "
                    "optimizer.learning_rate, or without these utterances, start a new run, with the model of a "
                    f"checkpoint in {folder.checkpoints} as model.init_from."
                )
            last = progress.step == config.max_steps
            if config.logging.validate_every and (progress.step % config.logging.validate_every == 0 or last):
                validate()
            if config.logging.probe_every and (progress.step % config.logging.probe_every == 0 or last):
                run_probe()
            if progress.step % config.checkpoint_every == 0 or last or must_stop:
                save()
            if must_stop and not last:
                name = stop.received.name if stop.received else "a signal to another rank"
                return Outcome(progress.step, final=None, interrupted_by=name)
            clock.restart()

        final = whole_model(accelerator, bare_model)
        samples = broadcast_object_list([average.samples if average is not None and average.is_published else 0])[0]
        if samples:
            state = None if final is None or average is None else average.averaged_state(final.state_dict())
            load_from_main(bare_model, state, accelerator)
            if validator is not None:
                record = validator(bare_model)
                if files:
                    files["averaged"].write({"step": progress.step, "samples": samples, **record})
                    accelerator.log(numbers(record, "averaged"), step=progress.step)
                logger.info("Mean of the weights of %d steps, held-out audio: %s.", samples, summary(record))
            final = whole_model(accelerator, bare_model)
        if final is not None:
            advice = "The checkpoint of the last step is whole: make room, and --resume writes the model."
            with save_errors("The finished model", folder.path, advice):
                write_folder(folder.final, lambda into: write_final(into, final, extractor, folder))
            logger.info("Finished at step %d: %s.", progress.step, folder.final)
        accelerator.wait_for_everyone()
        if stream is not None:
            stream.discard()
        return Outcome(progress.step, final=folder.final)


def make_accelerator(config: PreTrainingConfig, folder: RunFolder) -> Accelerator:
    """Devices, ranks, precision and trackers. ValueError if the ranks that were launched do not find each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Where there is no accelerator, accelerate must be told so, or each of several ranks believes to be alone.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        mixed_precision="bf16" if uses_bf16(config.execution) else "no",
        log_with=list(config.logging.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.trackers)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=config.execution.timeout_minutes))],
    )
    if missing := set(config.logging.trackers) - {str(tracker) for tracker in accelerator.log_with} - {"all"}:
        raise ValueError(
            f"logging.trackers: {', '.join(sorted(missing))} cannot be used: install it, or leave it out with --set "
            "logging.trackers=[tensorboard]."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}: configure it for plain multi-GPU, "
            "and have the model sharded with --set execution.sharding=fsdp."
        )
    if accelerator.gradient_accumulation_steps != 1:  # accelerate would divide the gradients by it
        raise ValueError(
            f"accelerate is told to accumulate the gradients of {accelerator.gradient_accumulation_steps} steps: "
            "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS. A step is data.batch_seconds, of which a device takes "
            "execution.batch_seconds_per_device at a time."
        )
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate makes {accelerator.num_processes} of them: check its "
            "configuration (`accelerate env`), or start one process."
        )
    return accelerator


def leave(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group."""
    if accelerator.num_processes > 1:
        # gloo's threads free the tensors of the last messages, for which they need Python's lock. Where the group is
        # freed before, by DDP and under that lock, each waits for the other (seen with torch 2.11).
        time.sleep(0.1)
    with contextlib.suppress(AttributeError):  # a tracker whose start was cut short lacks what it would end
        accelerator.end_training()


def train_step(
    config: PreTrainingConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: Any,
    regularizers: Regularizers,
    batches: Sequence[MicroBatch],
    progress: Progress,
    sums: StepSums,
    step_flops: FlopCounter,
    stop_requested: bool,
) -> tuple[dict[str, Any], bool]:
    """One update from this rank's micro-batches: the metrics of the step, and whether any rank was told to stop.

    A step whose loss or gradient is not finite on any rank makes no update on all; its ranks and utterances are
    recorded. `sums` are empty ones; afterwards they are those of all ranks.
    """
    device, num_ranks = accelerator.device, accelerator.num_processes
    torch.manual_seed(keyed_seed(config.seed, progress.step, accelerator.process_index, "dropout"))
    learning_rate = config.optimizer.peak_rate * learning_rate_factor(config.schedule, progress.step, progress.hours)
    set_learning_rate(optimizer, learning_rate)

    items = to_device([sum(batch.num_items for batch in batches)], torch.int64, device)
    items = accelerator.reduce(items, "sum").clamp(min=1)
    # Distributed training averages gradients over the ranks, where their sum is wanted.
    normaliser = items[0] / num_ranks
    regularizers.set_step(adjusted_batches(progress.step, config.data.batch_seconds), normaliser)
    sharded = is_sharded(model)
    if stop_requested:
        sums.request_stop()
    row_losses: list[torch.Tensor] = []  # of each micro-batch, (rows,)
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        if sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with contextlib.nullcontext() if last or sharded else accelerator.no_sync(model):
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}
            with accelerator.autocast():
                output = model(**inputs, num_items_in_batch=normaliser)
            accelerator.backward(output.loss)
        flops = step_flops(batch.inputs["attention_mask"].sum(dim=1).tolist()) if batch.ids else 0
        sums.add(batch, output, output.loss / num_ranks, flops)
        row_losses.append(output.utterance_statistics[..., 0].sum(dim=(0, 2)))
    if sharded:
        reduce_whole_gradients(parameters)
    norms = parameter_norm(parameters), clip_gradients(accelerator, parameters, config.optimizer)
    sums.reduce(accelerator)
    # The one place of a step where the host waits for the device.
    totals, ((weights_norm,), (grad_norm,), votes) = sums.read(*norms, regularizers.collect_votes())
    regularizers.count_votes(votes)
    counts = totals.counters
    finite = math.isfinite(counts["loss"]) and math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    progress.samples += round(counts["samples"])
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1

    record: dict[str, Any] = {
        "step": progress.step,
        "loss": counts["loss"],
        **sums.metrics(totals),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "clipping_factor": clipping_factor(optimizer, config.optimizer, grad_norm),
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
        # Where all losses are finite, the gradient of any utterance may be at fault.
        everyone = [utterance for batch in batches for utterance in batch.ids]
        bad = [not loss.isfinite() for losses, batch in zip(row_losses, batches) for loss in losses[: len(batch.ids)]]
        suspects = [utterance for utterance, is_bad in zip(everyone, bad) if is_bad]
        record["skipped"] = ids_by_rank(accelerator, suspects) or ids_by_rank(accelerator, everyone)
        logger.warning(
            "Step %d: loss %s, gradient norm %s; no update. %s.",
            progress.step,
            counts["loss"],
            grad_norm,
            "; ".join(f"Rank {part['rank']}: {', '.join(part['utterances'])}" for part in record["skipped"]),
        )
    return record, counts["stop"] > 0


def ids_by_rank(accelerator: Accelerator, ids: list[str]) -> list[dict[str, Any]]:
    """The rank and the utterances of every rank that has any."""
    parts = gather_object([{"rank": accelerator.process_index, "utterances": ids}])
    return [part for part in parts if part["utterances"]]


def latest_checkpoint(accelerator: Accelerator, checkpoints: CheckpointFolder) -> Path | None:
    """The newest whole checkpoint, found by the first rank, as finding it reads all its bytes."""
    found = [checkpoints.latest() if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def whole_model(accelerator: Accelerator, model: SpearForPreTraining) -> SpearForPreTraining | None:
    """The model to save or probe, on the first rank; None on the others. Sharded weights are gathered by all ranks."""
    if not is_sharded(model):
        return model if accelerator.is_main_process else None
    weights = gathered(model.state_dict(), keep=accelerator.is_main_process)
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        whole = SpearForPreTraining(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole


def write_checkpoint(
    into: Path,
    model: SpearForPreTraining,
    optimizer_state: dict[str, Any],
    average: RunningAverage,
    regularizers: Regularizers,
    progress: Progress,
    corpus: Corpus,
    stores: Mapping[str, TokenStore],
) -> None:
    """The files of a checkpoint; see checkpoints.py. Called on one rank, with whole tensors."""
    model.save_pretrained(into / "model")
    torch.save(optimizer_state, into / "optimizer.pt")
    torch.save(average.state_dict(), into / "average.pt")
    regularizers.save(into)
    tokens = {name: dataclasses.asdict(store.info) for name, store in stores.items()}
    state = {**vars(progress), "corpus": corpus.fingerprint, "tokens": tokens}
    (into / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    path: Path,
    model: SpearForPreTraining,
    optimizer: torch.optim.Optimizer,
    average: RunningAverage | None,
    corpus: Corpus,
    stores: Mapping[str, TokenStore],
) -> Progress:
    """Puts weights, optimiser state and running average in place. ValueError if the data is not what it was."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.pop("corpus") != corpus.fingerprint:
        raise ValueError(
            f"The training utterances or their lengths differ from those of {path}, so the order of the rest of the "
            "run would differ too: restore the manifest, or start a new run with model.init_from."
        )
    for name, info in state.pop("tokens", {}).items():  # the first versions noted none
        if different := StoreInfo(**info).differences(stores[name].info):
            raise ValueError(
                f"The {name} tokens are not those of {path} ({'; '.join(different)}): restore the store, or start a "
                "new run with model.init_from."
            )
    weights = SpearForPreTraining.from_pretrained(path / "model").state_dict()
    model.load_state_dict(weights)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    if average is not None:
        average.load_state_dict(torch.load(path / "average.pt", map_location="cpu", weights_only=True))
    logger.info("Resuming from %s.", path)
    return Progress(**state)


def write_final(into: Path, model: SpearForPreTraining, extractor: SpearFeatureExtractor, folder: RunFolder) -> None:
    """The finished model with its heads, the encoder alone in `encoder/`, the feature extractor for both, and a card.

    What is written is what is published: the weights of `model`, averaged if there was an average.
    """
    model.save_pretrained(into)
    extractor.save_pretrained(into)
    model.spear.save_pretrained(into / "encoder")
    extractor.save_pretrained(into / "encoder")
    try:
        write_run_card(into, folder.final, model)
    except ValueError as error:  # records that were lost do not cost the model
        logger.warning("The model gets no card: %s", error)
