# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The pre-training loop.

    outcome = pretrain(load_config("tiny"), resume=False)

Every draw (initialisation, order, crops, masks, dropout) is a function of the seed and of the step, epoch, rank or
utterance, so a run that is killed and resumed repeats, on the same machine, what the uninterrupted one would have
done: to the bit on a CPU, while a GPU adds up the gradients of repeated frames in no fixed order. A step trains on the
same utterances whatever the number of ranks; its loss is normalised by the number of target frames over all of them.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.audio import SAMPLING_RATE
from ..data.bucketing import GlobalBatches
from ..data.collation import StepDataset
from ..feature_extraction_spear import SpearFeatureExtractor
from ..hub_card import write_run_card
from ..modeling_spear import SpearForPreTraining
from .checkpoints import CheckpointFolder, save_errors, write_folder
from .config import PreTrainingConfig
from .corpus import load_corpus
from .data_check import Sample, check_data, write_samples
from .flops import FlopCounter, peak_flops
from .launch import leave, make_accelerator
from .loader import loaded_steps
from .metrics import StepClock, StepSums, codebooks_of, memory_mb, summary
from .records import Records, open_records
from .run_folder import RunFolder
from .run_state import RunState
from .setup import build_dataset, build_sampler, cropped, uses_bf16
from .signals import StopRequest
from .sources import record_sources, settle_sources
from .streaming import ShardStream, open_stream
from .targets import prepare_stores
from .training_step import train_step
from .validation import Validator, load_unigrams


if TYPE_CHECKING:
    from .online_probe import OnlineProbe


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


def pretrain(config: PreTrainingConfig, resume: bool = False) -> Outcome:
    """Runs, or with `resume` continues, the training of `config` up to `max_steps`.

    ValueError: something is wrong with the settings or the data. NonFiniteLossError: see there.
    """
    with contextlib.ExitStack() as stack:
        folder = RunFolder(config.output_dir)
        accelerator = make_accelerator(config, folder)
        stack.callback(leave, accelerator)
        stack.callback(folder.release)
        moved = folder.check(config, resume) if accelerator.is_main_process else []
        accelerator.wait_for_everyone()  # nobody writes into the folder before it is checked
        if not accelerator.is_main_process:
            logging.getLogger("spear_hf").setLevel(logging.WARNING)
        stack.enter_context(logging_redirect_tqdm(loggers=[logging.getLogger("spear_hf")]))

        settled = [settle_sources(config, folder) if accelerator.is_main_process else None]
        sources: PreTrainingConfig = broadcast_object_list(settled)[0]  # the same for all ranks
        corpus = load_corpus(sources.data, config.seed, config.mixing)
        probe = open_probe(config, accelerator)
        with accelerator.main_process_first():  # the others find what the first has made
            stores = prepare_stores(config, sources.targets, corpus, folder, device=str(accelerator.device))
        checkpoints = CheckpointFolder(folder.checkpoints, config.checkpointing.keep)
        state = RunState(config, accelerator, corpus, stores, checkpoints, resume)
        sampler = build_sampler(config, corpus)
        stream = open_stream(config, corpus, stores, sampler, accelerator.is_local_main_process)
        state.begin()

        steps = open_steps(state, sampler)
        if stream is not None:
            stack.enter_context(stream).start(state.progress.step)
        samples: list[Sample] = []
        begins = state.progress.step == 0
        if accelerator.is_main_process and config.execution.check_data and (moved or begins):
            known = None if begins or not folder.samples.is_file() else folder.samples
            samples = check_data(steps.dataset, stores, sampler.at_hand(state.progress.step), config.seed, known)
        if accelerator.is_main_process:
            folder.claim()
            folder.create(config)
            record_sources(folder, config, sources)
            if samples:
                write_samples(folder.samples, samples)
        records = stack.enter_context(open_records(accelerator, folder, state.progress.step))
        accelerator.wait_for_everyone()  # the other ranks of a node read what the first one's process fetches
        validator = open_validator(state, sampler, folder)
        run = Run(state, folder, sampler, steps, stream, records, validator, probe)
        interrupted_by = run.train(stack)
        final = None if interrupted_by else run.finish()
        return Outcome(state.progress.step, final, interrupted_by)


def open_probe(config: PreTrainingConfig, accelerator: Accelerator) -> "OnlineProbe | None":
    """On the first rank, where the configuration has one."""
    if not config.logging.probe_every or not accelerator.is_main_process:
        return None
    from .online_probe import OnlineProbe  # brings scikit-learn

    return OnlineProbe(config.logging, SpearFeatureExtractor(), config.seed)


def open_steps(state: RunState, sampler: GlobalBatches) -> StepDataset:
    """The micro-batches of this rank."""
    config, corpus = state.config, state.corpus
    dataset = build_dataset(
        config,
        corpus.training,
        state.stores,
        state.bare_model.config,
        SpearFeatureExtractor(),
        corpus.training_lengths,
        corpus.windows,
        corpus.noise,
    )
    ranks = state.accelerator.process_index, state.accelerator.num_processes
    return StepDataset(dataset, sampler, *ranks, config.execution.batch_seconds_per_device)


def open_validator(state: RunState, sampler: GlobalBatches, folder: RunFolder) -> Validator | None:
    """Where the configuration has validations, and there are utterances for them."""
    config, corpus, accelerator = state.config, state.corpus, state.accelerator
    if config.logging.validate_every and config.data.validation_fraction and not corpus.validation:
        logger.warning(
            "No utterance is held out, so the run goes without validation: raise data.validation_fraction (%g), "
            "or name a data.validation_split.",
            config.data.validation_fraction,
        )
    if not config.logging.validate_every or not corpus.validation:
        return None
    with accelerator.main_process_first():
        unigrams = load_unigrams(state.stores, corpus, sampler.at_hand(state.progress.step), folder)
    return Validator(
        build_dataset(config, corpus.validation, state.stores, state.bare_model.config, SpearFeatureExtractor()),
        cropped(corpus.validation, corpus.validation_lengths, config),
        unigrams,
        config.execution.batch_seconds_per_device or config.data.batch_seconds,
        accelerator,
    )


@dataclass
class Run:
    """A run from where its state stands to its end, and what it does besides training."""

    state: RunState
    folder: RunFolder
    sampler: GlobalBatches
    steps: StepDataset
    stream: ShardStream | None
    records: Records
    validator: Validator | None
    probe: "OnlineProbe | None"

    def train(self, stack: contextlib.ExitStack) -> str | None:
        """All steps that are left, or those until a signal to stop, whose name it returns.

        What ends with the run, as the processes that load, is left to `stack`.
        """
        config, accelerator, progress = self.state.config, self.state.accelerator, self.state.progress
        stream, model = self.stream, self.state.model
        self._announce()
        if progress.step < config.max_steps:
            self.sampler.batch(progress.step)  # plans the epoch before the loader's workers are forked, and share it
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
        clock = StepClock(peak_flops(accelerator.device, uses_bf16(config.execution)) * accelerator.num_processes)
        flops = FlopCounter(self.state.bare_model.config)
        on_gpu = accelerator.device.type == "cuda"
        numbers = range(progress.step, config.max_steps)
        loaded = loaded_steps(self.steps, numbers, config.execution.num_workers, pin_memory=on_gpu)
        for batches in stack.enter_context(loaded):
            clock.data_arrived()
            record, must_stop = train_step(self.state, batches, self._sums(), flops, stop.received is not None)
            self.state.sample_average()
            record["epoch"] = progress.step / self.sampler.batches_per_epoch
            record.update(clock.lap(record["batch_seconds"] * SAMPLING_RATE, record.pop("flops")))
            record["memory_mb"] = round(memory_mb(accelerator.device), 1)
            if accelerator.is_main_process:  # elsewhere it would plan each epoch for this alone
                record["batch"] = self.sampler.digest(progress.step - 1)
            self.records.write("training", record)
            if stream is not None:
                stream.advance(progress.step)
            bar.update()
            bar.set_postfix_str(summary(record), refresh=False)
            self._check_skipped()
            last = progress.step == config.max_steps
            if self.validator is not None and (last or progress.step % config.logging.validate_every == 0):
                record = self.validator(self.state.bare_model)
                self.records.write("evaluation", {"step": progress.step, **record})
                logger.info("Step %d, held-out audio: %s.", progress.step, summary(record))
            if config.logging.probe_every and (last or progress.step % config.logging.probe_every == 0):
                self._probe()
            if last or must_stop or progress.step % config.checkpoint_every == 0:
                self._save()
            if must_stop and not last:
                return stop.received.name if stop.received else "a signal to another rank"
            clock.restart()
        return None

    def finish(self) -> Path:
        """Writes the finished model: its folder."""
        samples = self.state.take_average()
        if samples and self.validator is not None:
            record = self.validator(self.state.bare_model)
            self.records.write("averaged", {"step": self.state.progress.step, "samples": samples, **record})
            logger.info("Mean of the weights of %d steps, held-out audio: %s.", samples, summary(record))
        final = self.state.whole_model()
        if final is not None:
            advice = "The checkpoint of the last step is whole: make room, and --resume writes the model."
            with save_errors("The finished model", self.folder.path, advice):
                write_folder(self.folder.final, lambda into: write_final(into, final, self.folder))
            logger.info("Finished at step %d: %s.", self.state.progress.step, self.folder.final)
        self.state.accelerator.wait_for_everyone()
        if self.stream is not None:
            self.stream.discard()
        return self.folder.final

    def _announce(self) -> None:
        state, corpus = self.state, self.state.corpus
        logger.info(
            "%d utterances (%.2f hours), %d steps an epoch; %.1f million parameters; steps %d to %d on %d x %s.",
            len(corpus.training),
            corpus.hours,
            self.sampler.batches_per_epoch,
            sum(parameter.numel() for parameter in state.bare_model.parameters()) / 1e6,
            state.progress.step + 1,
            state.config.max_steps,
            state.accelerator.num_processes,
            state.accelerator.device,
        )

    def _sums(self) -> StepSums:
        """Of a step, still empty."""
        domains = {name: target.domains for name, target in self.state.config.targets.items()}
        device = self.state.accelerator.device
        return StepSums(codebooks_of(self.state.bare_model), self.state.corpus.domains, device, domains)

    def _check_skipped(self) -> None:
        progress = self.state.progress
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(
                f"The loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step "
                f"{progress.step}; their ranks and utterances are under 'skipped' in {self.folder.metrics}. Look at "
                "these. --resume takes the steps since the last checkpoint again; for a lower "
                "optimizer.learning_rate, or without these utterances, start a new run, with the model of a "
                f"checkpoint in {self.folder.checkpoints} as model.init_from."
            )

    def _probe(self) -> None:
        accelerator, step = self.state.accelerator, self.state.progress.step
        whole = self.state.whole_model()
        if self.probe is not None and whole is not None:
            try:
                record = self.probe(whole.spear.to(accelerator.device))
            except (ValueError, OSError) as error:  # audio that is gone, say: no reason to end the run
                logger.warning("Step %d is not probed: %s", step, error)
            else:
                self.records.write("probe", {"step": step, **record})
        accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.records.sync()
        self.state.save()
        self.state.accelerator.wait_for_everyone()


def write_final(into: Path, model: SpearForPreTraining, folder: RunFolder) -> None:
    """The finished model with its heads, the encoder alone in `encoder/`, the feature extractor for both, and a card.

    What is written is what is published: the weights of `model`, averaged if there was an average.
    """
    extractor = SpearFeatureExtractor()
    model.save_pretrained(into)
    extractor.save_pretrained(into)
    model.spear.save_pretrained(into / "encoder")
    extractor.save_pretrained(into / "encoder")
    try:
        write_run_card(into, folder.final, model)
    except ValueError as error:  # records that were lost do not cost the model
        logger.warning("The model gets no card: %s", error)
