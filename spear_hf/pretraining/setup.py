# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What a configuration stands for: the model, and the datasets with their batches."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_spear import SpearConfig
from ..data.audio import SAMPLING_RATE
from ..data.bucketing import BucketingSampler, GlobalBatches, visiting_rates
from ..data.collation import CROP_GRID, PreTrainingDataset, Tokens, TokenShape
from ..data.manifest import Utterance
from ..data.mixing import Mixer
from ..data.seeding import keyed_seed
from ..data.utterances import UtteranceList, known_domains
from ..data.windows import WindowedSampler
from ..feature_extraction_spear import SpearFeatureExtractor
from ..loading_errors import loading
from ..modeling_spear import SpearForPreTraining
from ..mvq.alignment import label_ratio
from .config import ExecutionConfig, ModelConfig, PreTrainingConfig, TargetConfig
from .corpus import Corpus


NUM_MEL_BINS = 128  # of the feature extractor in pre-training


def pretraining_targets(
    targets: Mapping[str, TargetConfig], tokens: Mapping[str, TokenShape], frame_rate: float
) -> dict[str, dict[str, Any]]:
    """`SpearConfig.pretraining_targets`: codebooks at the student's rate, several times a faster teacher's."""
    return {
        name: {
            "num_codebooks": tokens[name].num_codebooks * label_ratio(tokens[name].frame_rate, frame_rate)[0],
            "codebook_size": tokens[name].codebook_size,
            "weight": target.weight,
        }
        for name, target in targets.items()
    }


def model_config(config: ModelConfig) -> SpearConfig:
    """The architecture, still with the default targets."""
    if config.init_from is not None:
        with loading(config.init_from):
            kind = SpearConfig.get_config_dict(config.init_from)[0].get("model_type")
            loaded = SpearConfig.from_pretrained(config.init_from)
        if kind != SpearConfig.model_type:
            raise ValueError(f"model.init_from={config.init_from} is not a SPEAR model (its model_type is {kind}).")
        assert isinstance(loaded, SpearConfig)
        return loaded
    make = SpearConfig if config.size is None else getattr(SpearConfig, config.size)
    try:
        made = make(**config.config)
    except TypeError as error:
        raise ValueError(f"model.config does not go with model.size={config.size}: {error}") from None
    except StrictDataclassError as error:  # says which check failed, its cause why
        raise ValueError(f"model.config: {error.__cause__ or error}") from None
    if made.num_mel_bins != NUM_MEL_BINS:
        raise ValueError(f"model.config.num_mel_bins={made.num_mel_bins}: what is heard has {NUM_MEL_BINS} mel bins.")
    return made


def continued(config: PreTrainingConfig, checkpoint: Path | None) -> PreTrainingConfig:
    """`config`, with what it started from in a checkpoint of the run: elsewhere it may be gone by now, or another."""
    if checkpoint is None or config.model.init_from is None:
        return config
    return dataclasses.replace(config, model=ModelConfig(init_from=str(checkpoint / "model")))


def planned_architecture(config: PreTrainingConfig, tokens: Mapping[str, TokenShape]) -> SpearConfig:
    """The architecture, with heads for these tokens."""
    architecture = model_config(config.model)
    frame_rate = SAMPLING_RATE / architecture.inputs_to_logits_ratio
    architecture.pretraining_targets = pretraining_targets(config.targets, tokens, frame_rate)
    return architecture


def build_model(config: PreTrainingConfig, tokens: Mapping[str, TokenShape]) -> SpearForPreTraining:
    """The model to train: initialised from the seed, or from a checkpoint (heads that do not fit start anew)."""
    architecture = planned_architecture(config, tokens)
    torch.manual_seed(keyed_seed(config.seed, "initialisation"))
    if config.model.init_from is None:
        return SpearForPreTraining(architecture)
    with loading(config.model.init_from):
        model, report = SpearForPreTraining.from_pretrained(
            config.model.init_from, config=architecture, ignore_mismatched_sizes=True, output_loading_info=True
        )
    if missing := sorted(name for name in report["missing_keys"] if name.startswith("spear.")):
        raise ValueError(
            f"model.init_from={config.model.init_from} lacks {len(missing)} tensors of the encoder, such as "
            f"{missing[0]}: it would start at random."
        )
    return model


def uses_bf16(config: ExecutionConfig) -> bool:
    """Whether the forward pass is in bfloat16: as configured, or where the device computes it natively."""
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16"


def build_sampler(config: PreTrainingConfig, corpus: Corpus) -> GlobalBatches:
    """The order of the training utterances."""
    lengths = cropped(corpus.training, corpus.training_lengths, config)
    cap = round(config.data.batch_seconds * SAMPLING_RATE)
    rates = visiting_rates(known_domains(corpus.training), config.data.domain_weights)
    jitter, seed = config.data.length_jitter, config.seed
    if corpus.windows is None:
        return BucketingSampler(lengths, cap, jitter=jitter, seed=seed, rates=rates)
    return WindowedSampler(lengths, cap, corpus.windows, jitter=jitter, seed=seed, rates=rates)


def cropped(utterances: Sequence[Utterance], lengths: np.ndarray, config: PreTrainingConfig) -> np.ndarray:
    """Samples after cropping to `data.max_seconds`, or to the domain's of `data.domain_max_seconds`."""
    longest = np.full(len(lengths), round(config.data.max_seconds * SAMPLING_RATE))
    if config.data.domain_max_seconds:
        domains = known_domains(utterances)
        for domain, seconds in config.data.domain_max_seconds.items():
            longest[domains.among([domain])] = round(seconds * SAMPLING_RATE)
    return np.minimum(lengths, longest)


def build_dataset(
    config: PreTrainingConfig,
    utterances: Sequence[Utterance],
    stores: Mapping[str, Tokens],
    architecture: SpearConfig,
    feature_extractor: SpearFeatureExtractor,
    lengths: np.ndarray | None = None,
    windows: np.ndarray | None = None,
    noise: UtteranceList | None = None,
) -> PreTrainingDataset:
    """Batches of `utterances`, masked as the configuration says; with their `lengths` in samples mixed as well.

    Without, nothing is mixed: held-out audio is heard as it is. `windows`: what is mixed is of the same one, but for
    clips of `noise`.
    """
    return PreTrainingDataset(
        utterances,
        stores,
        architecture,
        feature_extractor,
        config.masking,
        seed=config.seed,
        max_seconds=config.data.max_seconds,
        domain_max_seconds=config.data.domain_max_seconds,
        cache_audio=config.execution.cache_audio,
        offsets={name: target.offset for name, target in config.targets.items()},
        domains={name: target.domains for name, target in config.targets.items()},
        mixer=None if lengths is None else build_mixer(config, utterances, lengths, windows, noise),
    )


def build_mixer(
    config: PreTrainingConfig,
    utterances: Sequence[Utterance],
    lengths: np.ndarray,
    windows: np.ndarray | None,
    noise: UtteranceList | None,
) -> Mixer | None:
    """What is added to the training utterances; None where the configuration adds nothing."""
    mixing = config.mixing
    if mixing.noise_probability == 0 and mixing.token_probability == 0:
        return None
    lengths = cropped(utterances, lengths, config)
    return Mixer(mixing, utterances, lengths, noise, config.seed, CROP_GRID, windows)
