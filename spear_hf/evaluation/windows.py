# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Hours of audio in bounded memory and linear time: windows with context on both sides, whose middles are joined.

Attention then reaches `context_seconds` beyond a window and not the whole recording, so the result is not exactly that
of the whole. What else looks to the sides, convolutions and downsampling, sees the same: windows start where all
groups of downsampled frames start.

Deviations, as the norm of the difference of the last hidden state over that of the state, for 150 s of the bundled
audio (model_cards/benchmarks/windows.csv, base size):

    window   context   deviation   worst layer   worst frame
      30 s       0 s      0.11 %        0.12 %         1.1 %
      30 s      10 s      0.08 %        0.09 %        0.15 %
      60 s       0 s      0.07 %        0.08 %        0.14 %
      60 s      10 s      0.06 %        0.06 %        0.08 %

These are of random weights, whose attention is spread over the whole recording. How far trained attention looks is for
each checkpoint to be measured: `examples/benchmark_windows.py --model`. `spear-hf embed` of a 30-minute file by the
base size peaks at 2.1 GB with windows of 30 s, and at 2.0 GB with windows of 60 s; at 2.5 GB for the mean of layers.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ..configuration_spear import SpearConfig
from ..modeling_spear import SpearModel, SpearModelOutput


CONTEXT_SECONDS = 10.0
_FRAMES_PER_SECOND = 50  # of the encoder


def encode_in_windows(
    encoder: SpearModel,
    input_features: torch.Tensor,
    window_seconds: float,
    context_seconds: float = CONTEXT_SECONDS,
    output_hidden_states: bool = False,
    keep: Callable[[tuple[torch.Tensor, ...]], Sequence[torch.Tensor]] = tuple,
) -> SpearModelOutput:
    """What `encoder(input_features)` returns, to within what attention misses; exactly that of a single window.

    Args:
        input_features: of one utterance, `(1, frames, num_mel_bins)`, without padding.
        window_seconds: that are kept of each window.
        context_seconds: that are encoded besides, on either side, where there is audio.
        keep: what becomes of the hidden states of a window, `(1, frames, dim)` each; all of them are 2.6 GB for half
            an hour of the base size.

    Raises:
        ValueError: several utterances, or windows shorter than a frame of the slowest stack.
    """
    window, context = frames_of_windows(encoder.config, window_seconds, context_seconds)
    if input_features.shape[0] != 1:
        raise ValueError(f"{input_features.shape[0]} utterances were given: windows are of one at a time.")
    frames = (input_features.shape[1] - 7) // 2
    ratio = encoder.config.output_downsampling_factor
    last_hidden_state: torch.Tensor | None = None
    hidden_states: list[torch.Tensor] = []
    for start in range(0, max(frames, 1), window):
        stop = min(start + window, frames)
        first, last = max(start - context, 0), min(stop + context, frames)
        # Frame i sees the frames 2 i ... 2 i + 8 of the filter bank.
        features = input_features[:, 2 * first : 2 * last + 7]
        outputs = encoder(features, output_hidden_states=output_hidden_states, return_dict=True)
        states = keep(outputs.hidden_states) if output_hidden_states else ()
        if last_hidden_state is None:
            last_hidden_state = _empty(outputs.last_hidden_state, -(-frames // ratio))
            hidden_states = [_empty(state, frames) for state in states]
        kept = slice((start - first) // ratio, -(-(stop - first) // ratio))
        last_hidden_state[:, start // ratio : -(-stop // ratio)] = outputs.last_hidden_state[:, kept]
        for whole, part in zip(hidden_states, states):
            whole[:, start:stop] = part[:, start - first : stop - first]
    return SpearModelOutput(
        last_hidden_state=last_hidden_state, hidden_states=tuple(hidden_states) if output_hidden_states else None
    )


def frames_of_windows(
    config: SpearConfig, window_seconds: float, context_seconds: float = CONTEXT_SECONDS
) -> tuple[int, int]:
    """Frames of a window, and of its context on either side; ValueError where windows are not possible."""
    group = math.lcm(*config.downsampling_factors, config.output_downsampling_factor)  # frames, 8 in published models
    least = group / _FRAMES_PER_SECOND
    if not (least <= window_seconds < math.inf and 0 <= context_seconds < math.inf):
        raise ValueError(
            f"window_seconds={window_seconds} must be a number of seconds, {least} or more, and "
            f"context_seconds={context_seconds} one that is not negative."
        )
    window = int(window_seconds * _FRAMES_PER_SECOND + 1e-6) // group * group
    return window, math.ceil(context_seconds * _FRAMES_PER_SECOND / group) * group


def _empty(like: torch.Tensor, frames: int) -> torch.Tensor:
    return like.new_empty(1, frames, like.shape[-1])
