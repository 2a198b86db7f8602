# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What a run changes as it goes, and what its checkpoints keep of it; checkpoints.py shows their files."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data.audio import SAMPLING_RATE
from ..modeling_spear import SpearForPreTraining
from ..mvq.store import TokenStore
from ..mvq.store_format import StoreInfo
from .averaging import RunningAverage
from .checkpoints import CheckpointFolder
from .config import PreTrainingConfig
from .corpus import Corpus
from .optimization import build_optimizer
from .regularizers import install_regularizers
from .setup import build_model, continued
from .sharding import gathered, is_sharded, load_from_main, shard


logger = logging.getLogger(__name__)


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


class RunState:
    """Weights, optimiser, running average, regularisers and progress, on every rank; `begin` puts them to use.

    Args:
        corpus: that the run is of.
        stores: with the tokens of its targets.
        checkpoints: of the run.
        resume: whether to take up the newest whole one, if there is one.
    """

    def __init__(
        self,
        config: PreTrainingConfig,
        accelerator: Accelerator,
        corpus: Corpus,
        stores: Mapping[str, TokenStore],
        checkpoints: CheckpointFolder,
        resume: bool,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.corpus, self.stores, self.checkpoints = corpus, stores, checkpoints
        self.progress = Progress()
        self._saved = self._latest() if resume else None
        self.bare_model = build_model(continued(config, self._saved), stores)
        """The model itself; `model` may be a wrapper around it."""
        self.model: torch.nn.Module = self.bare_model
        self.optimizer = build_optimizer(self.bare_model, config.optimizer, accelerator.distributed_type)
        self._first_averaged = config.max_steps - round(config.max_steps * config.averaging.last_fraction)
        self._average = None
        if accelerator.is_main_process:  # all ranks have the same weights: one keeps their average
            self._average = RunningAverage(config.averaging.every, start=self._first_averaged)

    def begin(self) -> None:
        """Takes up the checkpoint, where it resumes, and goes to the device.

        ValueError if the data is not what it was, or if the run has done more than `max_steps`.
        """
        saved = self._saved
        if saved is not None:
            self._load(saved)
        self.progress.num_ranks = self.accelerator.num_processes
        if self._average is not None:
            self._first_averaged = self._average.start  # that of the checkpoint, where it goes on with its samples
        self._first_averaged = broadcast_object_list([self._first_averaged])[0]
        execution = self.config.execution
        self.regularizers = install_regularizers(self.bare_model, self.config.regularizers, in_graph=execution.compile)
        if saved is not None:
            self.regularizers.load(saved)
        if execution.compile:
            self.bare_model.compile_layers()
        if execution.sharding == "fsdp":
            shard(self.bare_model, self.optimizer, self.accelerator)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.bare_model, self.optimizer)
        self.parameters = list(self.bare_model.parameters())

    def whole_model(self) -> SpearForPreTraining | None:
        """The model to save or probe, on the first rank; None on the others. All ranks gather what is sharded."""
        if not is_sharded(self.bare_model):
            return self.bare_model if self.accelerator.is_main_process else None
        weights = gathered(self.bare_model.state_dict(), keep=self.accelerator.is_main_process)
        if not self.accelerator.is_main_process:
            return None
        with torch.device("meta"):
            whole = SpearForPreTraining(self.bare_model.config)
        whole.load_state_dict(weights, assign=True)
        return whole

    def sample_average(self) -> None:
        """Adds the weights to their running average, where they are due."""
        step = self.progress.step
        if step > self._first_averaged and step % self.config.averaging.every == 0:
            whole = self.whole_model()
            if self._average is not None and whole is not None:
                self._average.update(step, whole.state_dict())

    def take_average(self) -> int:
        """Puts the mean of the weights of some steps into the model: of how many, 0 where that is too few."""
        average = self._average
        found = [average.samples if average is not None and average.is_published else 0]
        samples: int = broadcast_object_list(found)[0]
        if samples:
            whole = self.whole_model()
            state = None if average is None or whole is None else average.averaged_state(whole.state_dict())
            load_from_main(self.bare_model, state, self.accelerator)
        return samples

    def save(self) -> None:
        """Writes a checkpoint."""
        whole = self.whole_model()
        optimizer_state = gathered(self.optimizer.state_dict(), keep=self.accelerator.is_main_process)
        if whole is None or self._average is None:
            return
        average = self._average.state_dict()
        tokens = {name: dataclasses.asdict(store.info) for name, store in self.stores.items()}
        corpus = {"corpus": self.corpus.fingerprint, "noise": self.corpus.noise_fingerprint}
        state = {**vars(self.progress), **corpus, "tokens": tokens}

        def write(into: Path) -> None:
            whole.save_pretrained(into / "model")
            torch.save(optimizer_state, into / "optimizer.pt")
            torch.save(average, into / "average.pt")
            self.regularizers.save(into)
            (into / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        logger.info("Saved %s.", self.checkpoints.save(self.progress.step, write))

    def _latest(self) -> Path | None:
        """The newest whole checkpoint, found by the first rank, as finding it reads all its bytes."""
        found = [self.checkpoints.latest() if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    def _load(self, path: Path) -> None:
        """Puts weights, optimiser state, running average and progress in place."""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.pop("corpus") != self.corpus.fingerprint:
            raise ValueError(
                f"The training utterances or their lengths differ from those of {path}, so the order of the rest of "
                "the run would differ too: restore the manifest, or start a new run with model.init_from."
            )
        noise = self.corpus.noise_fingerprint
        if state.pop("noise", noise) != noise:  # the first versions noted none
            raise ValueError(
                f"The clips of mixing.noise_manifest={self.config.mixing.noise_manifest} are not those of {path}, so "
                "the rest of the run would hear other noise: restore them, or start a new run with model.init_from."
            )
        for name, info in state.pop("tokens", {}).items():  # nor these
            if different := StoreInfo(**info).differences(self.stores[name].info):
                raise ValueError(
                    f"The {name} tokens are not those of {path} ({'; '.join(different)}): restore the store, or start "
                    "a new run with model.init_from."
                )
        self.bare_model.load_state_dict(SpearForPreTraining.from_pretrained(path / "model").state_dict())
        self.optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
        if self._average is not None:
            self._average.load_state_dict(torch.load(path / "average.pt", map_location="cpu", weights_only=True))
        logger.info("Resuming from %s.", path)
        self.progress = Progress(**state)
        if self.progress.step > self.config.max_steps:
            raise ValueError(
                f"{self.config.output_dir} has done {self.progress.step} steps already, more than max_steps="
                f"{self.config.max_steps}: set it to {self.progress.step} to have the model of that step, or to more."
            )
        if self.progress.num_ranks != self.accelerator.num_processes and self.accelerator.is_main_process:
            logger.warning(
                "Resuming on %d ranks instead of %d: utterances, crops and masks stay the same, dropout does not.",
                self.accelerator.num_processes,
                self.progress.num_ranks,
            )
