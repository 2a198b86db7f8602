# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR as a module of HEAR, the Holistic Evaluation of Audio Representations (arXiv 2203.03022, common API of 2021).

    python -m heareval.embeddings.runner spear_hf.evaluation.hear --model FOLDER --tasks-dir tasks
    ... --model-options '{"model_file_path": "OWNER/NAME", "layers": "all"}' in place of --model, which must be a path

Options, of `--model-options`, as arguments of `load_model`, or after a # in its first one ("OWNER/NAME#layers=all"):

    layers   last (the default), all (concatenated, the stem's output first), mean, or the number of a hidden state
    scene    mean (the default), or mean+std: scene embeddings of means and standard deviations over time

Timestamps. Audio of n samples gets n // 320 + 1 frames, frame t at 20 t ms: from 0 to at most the end, which is less
than 20 ms after the last one. A last hidden state at 25 Hz (`output_downsampling_factor` 2) has a frame every 40 ms.
For that the audio is extended by its mirror image, see framing.py. Scene embeddings are statistics over these frames.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..data.audio import SAMPLING_RATE
from ..feature_extraction_spear import SpearFeatureExtractor
from ..modeling_spear import SpearPreTrainedModel
from .embedding import load_encoder, parse_layer
from .framing import FRAME_SAMPLES, framed
from .options import split_options


SCENES = ("mean", "mean+std")
# Of audio in a forward pass; the sounds of a batch that is larger are embedded in several.
_BATCH_SECONDS = 120.0


class HearModel(nn.Module):
    """A frozen encoder with the attributes that HEAR asks for; sizes are those of the embeddings."""

    sample_rate = SAMPLING_RATE

    def __init__(
        self,
        encoder: SpearPreTrainedModel,
        feature_extractor: SpearFeatureExtractor,
        layers: int | str = "last",
        scene: str = "mean",
    ) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder = encoder
        self.feature_extractor = feature_extractor
        self.layers = parse_layer(layers, config.num_hidden_layers)
        if scene not in SCENES:
            raise ValueError(f"scene={scene!r} must be one of {', '.join(SCENES)}")
        self.scene = scene
        copies = config.num_hidden_layers + 1 if self.layers == "all" else 1
        self.timestamp_embedding_size = copies * config.hidden_size
        self.scene_embedding_size = self.timestamp_embedding_size * (2 if scene == "mean+std" else 1)
        # Only the last hidden state of an encoder may be at 25 Hz.
        self.factor = config.output_downsampling_factor if self.layers == "last" else 1

    @property
    def frame_samples(self) -> int:
        """From one frame to the next."""
        return FRAME_SAMPLES * self.factor

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (sounds, samples) -> float32 (sounds, samples // frame_samples + 1, timestamp_embedding_size)."""
        frames = self.factor * (audio.shape[-1] // self.frame_samples + 1)  # at 50 Hz
        # A frame at 25 Hz is the mean of two, and lies 10 ms after the first of them.
        extended = framed(audio.float(), frames, centre=-(self.frame_samples - FRAME_SAMPLES) // 2)
        inputs = self.feature_extractor(
            list(extended), sampling_rate=SAMPLING_RATE, return_tensors="pt", device=audio.device
        )
        outputs = self.encoder(**inputs, output_hidden_states=self.layers != "last")
        if self.layers == "last":
            states = outputs.last_hidden_state
        elif self.layers == "all":
            states = torch.cat(outputs.hidden_states, dim=-1)  # (sounds, frames, layers * dim)
        elif self.layers == "mean":
            states = torch.stack(outputs.hidden_states).mean(dim=0)
        else:
            states = outputs.hidden_states[self.layers]
        return states.float()


def load_model(
    model_file_path: str | os.PathLike = "", layers: int | str | None = None, scene: str | None = None
) -> HearModel:
    """The model of a folder or Hub id, on the CPU, in eval mode; options as the module says, or as arguments.

    Raises:
        ValueError: no model is named, an unknown option, or a model that is not SPEAR.
        OSError: there is no such model.
    """
    name, options = split_options(os.fspath(model_file_path), ("layers", "scene"))
    if not name:
        raise ValueError(
            "no model is named: pass the folder of a SPEAR model (--model of the runner) or its Hub id "
            """(--model-options '{"model_file_path": "OWNER/NAME"}')"""
        )
    model, feature_extractor = load_encoder(name, device="cpu")
    encoder: Any = model.base_model
    if not isinstance(encoder, SpearPreTrainedModel) or not isinstance(feature_extractor, SpearFeatureExtractor):
        raise ValueError(f"{name} is a {encoder.config.model_type} model: this module is for SPEAR models")
    return HearModel(
        encoder.requires_grad_(False),
        feature_extractor,
        layers=options.get("layers", "last") if layers is None else layers,
        scene=options.get("scene", "mean") if scene is None else scene,
    ).eval()


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Audio (sounds, samples) in [-1, 1] at 16 kHz -> float32 embeddings (sounds, frames, size), and timestamps.

    Timestamps are float32 (sounds, frames), in milliseconds, of the middle of the frames. An embedding does not depend
    on the other sounds of the batch.
    """
    _check(audio)
    at_once = max(1, int(_BATCH_SECONDS * SAMPLING_RATE) // audio.shape[1])
    embeddings = torch.cat([model(part) for part in audio.split(at_once)])
    # From the index, so that nothing adds up.
    times = torch.arange(embeddings.shape[1], dtype=torch.float64) * (1000 * model.frame_samples / SAMPLING_RATE)
    return embeddings, times.float().to(embeddings.device).repeat(len(audio), 1)


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Audio (sounds, samples) in [-1, 1] at 16 kHz -> float32 (sounds, size): statistics of the frames over time."""
    _check(audio)
    at_once = max(1, int(_BATCH_SECONDS * SAMPLING_RATE) // audio.shape[1])
    pooled = []
    for part in audio.split(at_once):
        frames = model(part)  # (sounds, frames, size)
        pooled.append(frames.mean(dim=1))
        if model.scene == "mean+std":
            pooled[-1] = torch.cat([pooled[-1], frames.std(dim=1, correction=0)], dim=1)
    return torch.cat(pooled)


def _check(audio: Tensor) -> None:
    if not isinstance(audio, Tensor):
        raise ValueError(f"audio is a {type(audio).__name__}: a tensor (sounds, samples) is needed")
    if audio.ndim != 2 or 0 in audio.shape or not audio.is_floating_point():
        raise ValueError(
            f"audio is {audio.dtype} {tuple(audio.shape)}: floats in [-1, 1] of shape (sounds, samples) are needed"
        )


__all__ = ["HearModel", "get_scene_embeddings", "get_timestamp_embeddings", "load_model"]
