# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration of the training-only regularisers: each can be switched off by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RegularizersConfig:
    """What keeps ScaledAdam at a large rate stable from random initialisation. Training only, never in the model."""

    enabled: bool = False
    """The switch of them all. Meant for long runs with ScaledAdam, as in the paper; they cost time."""

    dropout: bool = True
    """Schedule 0.3 to 0.1 in place of `SpearConfig.hidden_dropout` (feed-forward modules and stem)."""

    position_dropout: bool = True
    """0.15 on the table of relative positions, in place of `SpearConfig.position_dropout`."""

    position_skip: bool = True
    """Attention scores without their part of positions, for a whole batch and layer; 0.5 to 0."""

    attention_skip: bool = True
    """A sequence skips the three attention modules of a layer; 0.2 to 0."""

    convolution_skip: bool = True
    """A sequence skips a convolution module; 0.2 to 0."""

    feed_forward_skip: bool = True
    """A sequence skips the second or third feed-forward module of a layer; 0.1 to 0."""

    layer_skip: bool = True
    """A sequence skips a layer; 0.5, staggered from the first layers to the last, to 0.035 * sqrt(downsampling)."""

    bypass_limits: bool = True
    """Bypass scales are driven back to [0.9 to 0.2, 1]."""

    feature_mask: bool = True
    """A sequence goes without channels above `SpearConfig.unmasked_hidden_size`, in all stacks; 0.125."""

    convnext_skip: bool = True
    """A sequence skips the ConvNeXt block of the stem; 0.2 to 0.015."""

    stem_gradient_scale: bool = True
    """Gradients through the stem's first convolution are multiplied by 0.2."""

    score_penalty: bool = True
    """Attention scores beyond +-25 are penalised."""

    balancer: bool = True
    """Channels are driven towards a share of positive values and a mean size within limits."""

    whiten: bool = True
    """Features are driven away from covariances that a few directions dominate."""
