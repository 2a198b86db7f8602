# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Learning-rate schedules as pure functions of the step and of the hours of audio seen: they hold no state to save."""

import math

from .config import ScheduleConfig


def warmup_factor(step: int, warmup_steps: int, start: float) -> float:
    """Rises linearly from `start` at step 0 to 1 at `warmup_steps`."""
    if step >= warmup_steps:
        return 1.0
    return start + (1.0 - start) * step / warmup_steps


def cosine_factor(step: int, warmup_steps: int, decay_steps: int, final_ratio: float) -> float:
    """1 until the warm-up is over, then half a cosine down to `final_ratio` at `decay_steps`, then constant."""
    progress = min(max((step - warmup_steps) / (decay_steps - warmup_steps), 0.0), 1.0)
    return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def eden_factor(step: int, hours: float, batches_scale: float, hours_scale: float) -> float:
    """((b² + B²) / B²)^-1/4 · ((h² + H²) / H²)^-1/4 of Zipformer's recipe, h in hours of audio seen."""
    by_steps = (1.0 + (step / batches_scale) ** 2) ** -0.25
    by_hours = (1.0 + (hours / hours_scale) ** 2) ** -0.25
    return by_steps * by_hours


def learning_rate_factor(config: ScheduleConfig, step: int, hours: float) -> float:
    """What the highest learning rate is multiplied by in the update that comes after `step` earlier ones."""
    if config.name == "cosine":
        factor = cosine_factor(step, config.warmup_steps, config.decay_steps, config.final_ratio)
    elif config.name == "eden":
        factor = eden_factor(step, hours, config.eden_batches, config.eden_hours)
    else:
        factor = 1.0
    return factor * warmup_factor(step, config.warmup_steps, config.warmup_start)
