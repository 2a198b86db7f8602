# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a pre-training run: one frozen dataclass per concern, composed into `PreTrainingConfig`.

    config = load_config("tiny", ["max_steps=100", "optimizer.learning_rate=1e-3"])

Shipped configurations lie in `configs/`; `spear-hf pretrain --config` takes their names or the path of a YAML file.
"""

import difflib
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from torch import nn

from ..configuration_spear import SpearConfig
from ..data.manifest import DOMAINS
from ..data.masking import MaskingConfig
from ..data.mixing import MixingConfig
from ..data.ranges import Range, check_ranges
from .config_loading import apply_overrides, build, parse_yaml
from .regularizers_config import RegularizersConfig


CROP = Range(0.085, 1e6)  # seconds; of less there is no frame
SCALE = Range(1e-15, 1e9)  # of what is positive
MINUTES = Range(1e-6, 1e6)  # two years
ARCHITECTURE = Range(-1e6, 1e6)  # the encoder's configuration knows better, but not what is absurd


@dataclass(frozen=True)
class ModelConfig:
    """Which encoder is trained."""

    size: Literal["base", "large", "xlarge"] | None = None
    """A published architecture; null: `SpearConfig`'s defaults (base)."""

    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `SpearConfig` that differ from it. Targets are set in the section `targets` instead."""

    init_from: str | None = None
    """Folder or Hub id of a SPEAR checkpoint whose weights to start from (its architecture is used); null: random."""

    def __post_init__(self) -> None:
        known = set(SpearConfig.__annotations__)  # those of every config, such as dtype, are not for training
        for name in self.config:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"config.{name} is not a field of SpearConfig{hint}.")
            for number in self.config[name] if isinstance(self.config[name], list) else [self.config[name]]:
                if isinstance(number, int | float) and number not in ARCHITECTURE:
                    raise ValueError(f"config.{name}={number} must be {ARCHITECTURE}.")
        if "pretraining_targets" in self.config:
            raise ValueError("config.pretraining_targets follows from the section `targets`; set it there.")
        if self.init_from is not None and (self.size is not None or self.config):
            raise ValueError("init_from brings its architecture: leave size and config out.")


@dataclass(frozen=True)
class TargetConfig:
    """One teacher's tokens. Set exactly one of `store`, `tokenizer` and `teacher`."""

    num_codebooks: Annotated[int, Range(1, 1024)] = 16
    """Codebooks of a quantiser trained here (`teacher`). A store or a tokenizer brings its own."""

    codebook_size: Annotated[int, Range(2, 256)] = 256
    """Entries of each of its codebooks."""

    weight: Annotated[float, Range(0, 1e6)] = 1.0
    """Weight of this teacher's loss (paper: speech 1, audio 0.1)."""

    domains: tuple[str, ...] | None = None
    """Domains of the utterances that predict these tokens; without a domain an utterance is speech. null: the target
    `audio` is for utterances of audio, any other for all, which makes the paper's asymmetric loss. Its joint loss:
    [speech, audio] for both targets; its disjoint loss: [speech] for `speech`."""

    offset: Annotated[int, Range(0, 5)] = 0
    """The label of student frame t is token t + offset. 0: frames of one number, as in the paper. The frame t of the
    student is centred at 20 t + 45 ms, that of most teachers at about 20 t + 12 ms: 2 makes them meet (at 50 Hz)."""

    store: str | None = None
    """A token store, as `spear-hf tokenize` writes it, with the tokens of every utterance: a folder, or OWNER/NAME or
    OWNER/NAME@REVISION on the Hub; with #TEACHER behind it where it holds the tokens of several."""

    tokenizer: str | None = None
    """Folder of a tokenizer, as `spear-hf quantize` writes it; the first start tokenises into OUTPUT/tokens."""

    teacher: str | None = None
    """A teacher (`kaldi-mfcc`, Hub id, folder): trains a quantiser on the data as well, into OUTPUT/tokenizers."""

    layer: Annotated[int, Range(-1000, 1000)] | None = None
    """The teacher's hidden layer; null: its last."""

    quantizer_steps: Annotated[int, Range(1, 10**9)] = 400
    """Steps of each of the two phases of the quantiser's training (paper: 35,000)."""

    quantizer_normalize: bool = True
    """Whether the quantiser standardises the teacher's features (paper: speech yes, audio no)."""

    quantizer_frames: Annotated[int, Range(1, 10**9)] = 200_000
    """At most so many frames, drawn at random, train the quantiser."""

    def __post_init__(self) -> None:
        check_ranges(self)
        given = [name for name in ("store", "tokenizer", "teacher") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; set exactly one, null the other.")
        if self.domains is not None and (not self.domains or not set(self.domains) <= set(DOMAINS)):
            raise ValueError(f"domains must be of {', '.join(DOMAINS)}, or null, not {list(self.domains)}.")


@dataclass(frozen=True)
class DataConfig:
    """What is heard, and how it is cut into batches."""

    manifest: str | None = None
    """A manifest (.jsonl, .csv, .tsv) or a folder of audio. `bundled`: examples/data of a source checkout."""

    store: str | None = None
    """Instead of a manifest: a token store with its audio (`spear-hf tokenize --with-audio`), a folder or OWNER/NAME
    on the Hub, all of whose utterances are heard. With both null: the first of the targets' stores that has audio."""

    split: str | None = None
    """Split of the manifest, or of the store, to train on, or several (`train+extra`); null: all. Ignored for data
    without splits."""

    validation_split: str | None = None
    """Split to validate on; null: hold out `validation_fraction`."""

    validation_fraction: Annotated[float, Range(0, 1, below=True)] = 0.01
    """Share of the utterances held out where there is no validation split, chosen by a hash of the id."""

    validation_utterances: Annotated[int, Range(0, 10**9)] = 1000
    """At most so many utterances are validated on."""

    min_seconds: Annotated[float, CROP] = 0.9
    """Shorter utterances are left out (paper: 0.9)."""

    max_seconds: Annotated[float, CROP] = 10.0
    """Longer utterances are cropped at random in every epoch (paper: 32). A multiple of 0.04."""

    domain_max_seconds: dict[str, Annotated[float, CROP]] = field(default_factory=dict)
    """The same for a domain whose utterances are cropped to less (paper: audio 10)."""

    batch_seconds: Annotated[float, Range(0.085, 1e7)] = 600.0
    """Seconds of audio, padding included, of one optimiser step over all ranks (paper: 4,800 to 6,400)."""

    domain_weights: dict[str, Annotated[float, Range(1e-6, 1e6)]] = field(default_factory=dict)
    """How often an utterance of a domain is heard compared with the others (paper: audio 2 to 3). An epoch is one pass
    over the domain of the largest weight; of the others it hears a part, another one in every epoch."""

    length_jitter: Annotated[float, Range(0, 1, below=True)] = 0.05
    """Batches hold utterances of like length, which is blurred by this share so that they differ between epochs."""

    window_shards: Annotated[int, Range(1, 10**9)] | None = None
    """Of a store: an epoch hears it window by window, each of so many shards drawn at random, so that no more need be
    at hand (see `execution.cache_gigabytes`). Batches and mixtures are of one window. null: of the whole store."""

    def __post_init__(self) -> None:
        if self.manifest is not None and self.store is not None:
            raise ValueError("manifest and store are both set: set one, null the other.")
        check_ranges(self)
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds={self.min_seconds} must be at most max_seconds={self.max_seconds}.")
        for domain, seconds in self.domain_max_seconds.items():
            if domain not in DOMAINS or not self.min_seconds <= seconds <= self.max_seconds:
                raise ValueError(
                    f"domain_max_seconds.{domain}={seconds}: of speech and audio, from min_seconds={self.min_seconds} "
                    f"to max_seconds={self.max_seconds}."
                )
        for seconds in (self.max_seconds, *self.domain_max_seconds.values()):
            if abs(seconds / 0.04 - round(seconds / 0.04)) > 1e-6:
                raise ValueError(f"max_seconds must be a multiple of 0.04 (a 25 Hz token), not {seconds}.")
        if self.batch_seconds < self.max_seconds:
            raise ValueError(f"batch_seconds={self.batch_seconds} must hold a crop of max_seconds={self.max_seconds}.")
        if unknown := sorted(set(self.domain_weights) - set(DOMAINS)):
            raise ValueError(f"domain_weights.{unknown[0]}: weights are of speech and audio.")
        if self.window_shards is not None and self.manifest is not None:
            raise ValueError(
                f"window_shards={self.window_shards} is of token stores with their audio: set manifest to null, or "
                "leave it out."
            )


@dataclass(frozen=True)
class ScaledAdamConfig:
    """What only ScaledAdam has, see scaled_adam.py. The defaults are those of the published recipe."""

    clipping_scale: Annotated[float, SCALE] | None = 2.0
    """The norm of the gradients, each relative to its tensor's size, is held below so many medians; null: no limit."""

    clipping_update_period: Annotated[int, Range(1, 10**6)] = 100
    """That median is of so many steps, and taken anew as often."""

    scalar_lr_scale: Annotated[float, SCALE] = 0.1
    """The rate of scalars, and of the tensors' sizes, over `learning_rate`."""

    param_min_rms: Annotated[float, SCALE] = 1e-5
    """Tensors of a smaller root mean square are updated as if they had this one, and their size is not learnt."""

    param_max_rms: Annotated[float, SCALE] = 3.0
    """The learning of sizes does not go beyond this root mean square."""

    scalar_max: Annotated[float, SCALE] = 10.0
    """Largest absolute value of a scalar."""

    size_update_period: Annotated[int, Range(1, 10**6)] = 4
    """Steps between two updates of the tensors' sizes."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.param_min_rms >= self.param_max_rms:
            raise ValueError(
                f"param_min_rms={self.param_min_rms} must be less than param_max_rms={self.param_max_rms}."
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "scaled_adam"] = "adamw"
    """scaled_adam: steps relative to the size of each tensor, with its own clipping (the paper's); adamw: absolute."""

    learning_rate: Annotated[float, SCALE] | None = None
    """Its highest rate; null: 5e-4 for adamw, 0.045 for scaled_adam (paper)."""

    betas: tuple[Annotated[float, Range(0, 1, below=True)], ...] = (0.9, 0.98)
    """Decay of the averages of gradients and of their squares (paper: 0.9, 0.98)."""

    eps: Annotated[float, Range(1e-30, 1)] = 1e-8
    """Added to the root of the averaged squares (paper: 1e-8)."""

    weight_decay: Annotated[float, Range(0, 1e6)] | None = None
    """adamw only; null: 0.01. Of matrices and kernels, not of biases, norms, bypass scales and the mask embedding."""

    max_grad_norm: Annotated[float, SCALE] | None = None
    """adamw only; null: 5. Gradients of a larger norm are scaled down to it."""

    scaled_adam: ScaledAdamConfig = field(default_factory=ScaledAdamConfig)
    """scaled_adam only."""

    def __post_init__(self) -> None:
        check_ranges(self)
        defaults: dict[str, float] = {"learning_rate": 0.045}
        if self.name == "adamw":
            defaults = {"learning_rate": 5e-4, "weight_decay": 0.01, "max_grad_norm": 5.0}
            if self.scaled_adam != ScaledAdamConfig():
                raise ValueError("scaled_adam is set, but name is adamw: set name to scaled_adam, or leave it out.")
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # as in __init__: from here on it is frozen
        if self.name == "scaled_adam" and (self.weight_decay is not None or self.max_grad_norm is not None):
            raise ValueError(
                "weight_decay and max_grad_norm are of adamw: set them to null. scaled_adam learns the size of "
                "tensors within bounds, and clips by scaled_adam.clipping_scale."
            )
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, not {list(self.betas)}.")

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, which is a number once the configuration is made."""
        assert self.learning_rate is not None
        return self.learning_rate


@dataclass(frozen=True)
class AveragingConfig:
    """The running average of the weights, which is what the finished run publishes, see averaging.py."""

    every: Annotated[int, Range(1, 10**9)] = 200
    """Steps between two samples (paper: 200)."""

    last_fraction: Annotated[float, Range(0, 1)] = 0.25
    """Samples are taken in this last share of `max_steps`; of less than 5 samples, the last weights are published."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over steps and hours. It never depends on `max_steps`: a run can be prolonged."""

    name: Literal["cosine", "eden", "constant"] = "cosine"
    """cosine: down to `final_ratio` at `decay_steps`; eden: by steps and hours of audio, never zero (the paper's)."""

    warmup_steps: Annotated[int, Range(0, 10**9)] = 500
    """Linear warm-up over so many steps."""

    warmup_start: Annotated[float, Range(0, 1)] = 0.05
    """Factor of the first update (paper, with Eden: 0.5)."""

    decay_steps: Annotated[int, Range(1, 10**9)] = 400_000
    """Cosine: the step, warm-up included, at which the rate has fallen to `final_ratio`; constant from there on."""

    final_ratio: Annotated[float, Range(0, 1)] = 0.05
    """Cosine: last rate over highest rate."""

    eden_batches: Annotated[float, Range(1e-3, 1e12)] = 7500.0
    """Eden: B, scale of the decay by steps."""

    eden_hours: Annotated[float, Range(1e-3, 1e12)] = 25_000.0
    """Eden: H, scale of the decay by hours of audio seen (paper: base 25,000; large and xlarge 75,000)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.warmup_steps >= self.decay_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than decay_steps={self.decay_steps}.")


@dataclass(frozen=True)
class CheckpointingConfig:
    """What is kept. Free to change when resuming."""

    keep: Annotated[int, Range(1, 10**9)] = 3
    """The newest so many checkpoints stay."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class LoggingConfig:
    """What is shown and measured. Free to change when resuming."""

    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate besides metrics.jsonl."""

    validate_every: Annotated[int, Range(0, 10**9)] = 1000
    """Validate after every so many steps and after the last; 0: never."""

    progress: bool = True
    """Show a progress bar."""

    probe_manifest: str | None = None
    """A labelled manifest (`bundled`: examples/data): linear probes of the encoder are trained on its rows of split
    probe_train and tested on probe_test, as the run goes. Nothing else is learnt from it."""

    probe_every: Annotated[int, Range(0, 10**9)] = 0
    """Probe after every so many steps and after the last; 0: never."""

    probes: tuple[str, ...] = ()
    """Names in its column `probe`; none: all whose labels are one per utterance."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.probe_every and self.probe_manifest is None:
            raise ValueError("probe_every needs probe_manifest: name a labelled manifest, or `bundled`.")


@dataclass(frozen=True)
class ExecutionConfig:
    """What depends on the machine at hand. Free to change when resuming: no batch and no mask depends on it."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; auto: bf16 where the device computes it natively, else fp32."""

    batch_seconds_per_device: Annotated[float, Range(0.085, 1e7)] | None = None
    """Seconds, padding included, that fit on a device at once; more are accumulated. null: all of a rank's share."""

    sharding: Literal["none", "fsdp"] = "none"
    """none: every rank holds the whole model (DDP). fsdp: weights, gradients and optimiser state in shards over the
    ranks (FSDP2), for models that do not fit. Checkpoints are the same files."""

    compile: bool = False
    """Compile the stem and the layers with torch.compile, for any length (`SpearModel.compile_layers`), regularizers
    with them: for GPUs, where large batches then take half of the time (two thirds with regularizers), and the first
    steps a minute or two. Rounding differs from that of a model that is not compiled, and regularizers draw other
    numbers. Not with fsdp."""

    check_data: bool = True
    """Before its first step, and after its data has moved, a run compares the audio of a few utterances with what
    their tokens were made from (data_check.py). false: for a student that is to hear other audio than the teacher."""

    num_workers: Annotated[int, Range(0, 1000)] = 0
    """Processes that prepare batches ahead; 0: the training process itself."""

    cache_audio: bool = False
    """Keep decoded audio in memory: 230 MB an hour and worker. For small corpora."""

    cache_gigabytes: Annotated[float, SCALE] | None = None
    """So much of the stores on the Hub is on the disk of a node at a time, 10^9 bytes: shards are fetched a window
    (`data.window_shards`) ahead and removed when the room is needed. Two windows must fit. null: what was used stays
    in huggingface_hub's cache."""

    cache_folder: str | None = None
    """Where, on a disk of the node, in a folder of its own for each node and run; null: `spear_hf` in HF_HOME."""

    fetch_minutes: Annotated[float, MINUTES] = 30.0
    """For so long a shard that cannot be had is tried again, then the run ends."""

    timeout_minutes: Annotated[float, MINUTES] = 60.0
    """For so long a rank waits for the others, then the run ends. The first one alone saves, probes, and makes tokens
    where there are none: for a large corpus make them before, with `spear-hf tokenize`."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.fetch_minutes >= self.timeout_minutes:
            raise ValueError(
                f"fetch_minutes={self.fetch_minutes:g} must be less than timeout_minutes={self.timeout_minutes:g}, "
                "for which the other ranks wait."
            )
        if self.compile and self.sharding == "fsdp":
            raise ValueError("compile=true goes with sharding=none: shards are gathered between the layers.")


@dataclass(frozen=True)
class PreTrainingConfig:
    """A whole run."""

    output_dir: str = "runs/pretrain"
    """Folder of the run: checkpoints, metrics and the final model."""

    max_steps: Annotated[int, Range(1, 10**9)] = 400_000
    """Optimiser steps of the run (paper: base 400,000; large and xlarge 500,000)."""

    checkpoint_every: Annotated[int, Range(1, 10**9)] = 1000
    """Save after every so many steps, and after the last."""

    seed: Annotated[int, Range(-(2**63), 2**63, below=True)] = 0
    """Of the initialisation, order, crops, masks, mixing and dropout."""

    model: ModelConfig = field(default_factory=ModelConfig)
    targets: dict[str, TargetConfig] = field(default_factory=lambda: {"speech": TargetConfig()})
    """Teachers by name, as many as wanted. `speech` and `audio` are those of the paper; see `TargetConfig.domains`."""

    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    regularizers: RegularizersConfig = field(default_factory=RegularizersConfig)
    """Training-only regularisers; off unless `regularizers.enabled`."""

    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.targets:
            raise ValueError("targets must name a teacher at least.")
        if wrong := [name for name in self.targets if not name.isidentifier() or hasattr(nn.ModuleDict, name)]:
            raise ValueError(f"targets.{wrong[0]} cannot be the name of a target: take a plain word, such as speech.")
        if self.execution.sharding == "fsdp" and self.optimizer.name != "adamw":
            raise ValueError(
                f"execution.sharding=fsdp does not go with optimizer.name={self.optimizer.name}, whose steps depend "
                "on whole tensors: set execution.sharding=none, or optimizer.name=adamw."
            )
        if self.execution.cache_gigabytes is not None and self.data.window_shards is None:
            raise ValueError(
                f"execution.cache_gigabytes={self.execution.cache_gigabytes} needs data.window_shards, such that two "
                "windows of so many shards fit."
            )
        if self.execution.cache_gigabytes is not None:
            for name, target in self.targets.items():
                if target.store is None:
                    raise ValueError(
                        f"execution.cache_gigabytes is for tokens that are there already: name a store as "
                        f"targets.{name}.store, made with `spear-hf tokenize`."
                    )
        device = self.execution.batch_seconds_per_device
        if device is not None and device < self.data.max_seconds:
            raise ValueError(
                f"execution.batch_seconds_per_device={device} must hold a crop of data.max_seconds="
                f"{self.data.max_seconds}."
            )


# Keys that may differ from the run that is resumed: they change neither what is learnt from nor the updates.
FREE_ON_RESUME = ("output_dir", "max_steps", "checkpoint_every", "checkpointing", "logging", "execution")
# Places that may differ too, of what a checkpoint and samples.json tell from something else.
MAY_MOVE = re.compile(r"data\.(manifest|store)|mixing\.noise_manifest|targets\.[^.]+\.store")


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files(__package__) / "configs"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> PreTrainingConfig:
    """A shipped configuration by name, or a YAML file, with `a.b=value` overrides applied and everything checked."""
    path = Path(name_or_file)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name_or_file} is not UTF-8 text: {error}.") from None
    elif str(name_or_file) in shipped_configs():
        text = (resources.files(__package__) / "configs" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"{name_or_file} is neither a file nor a shipped configuration ({', '.join(shipped_configs())})."
        )
    try:
        values = parse_yaml(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{name_or_file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name_or_file} must hold keys and values at its top, not a {type(values).__name__}.")
    return build(PreTrainingConfig, apply_overrides(values, overrides))
