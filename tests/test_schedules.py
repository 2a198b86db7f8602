# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Learning-rate schedules against their formulas, and the parameter groups of the optimiser."""

import math

import pytest

from spear_hf import SpearConfig, SpearForPreTraining
from spear_hf.pretraining.config import OptimizerConfig, ScheduleConfig, load_config
from spear_hf.pretraining.optimization import build_optimizer, set_learning_rate
from spear_hf.pretraining.schedules import learning_rate_factor


def test_cosine_warms_up_falls_and_stays():
    config = ScheduleConfig(name="cosine", warmup_steps=100, warmup_start=0.1, decay_steps=1100, final_ratio=0.2)
    assert learning_rate_factor(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_factor(config, 50, 0.0) == pytest.approx(0.55)
    assert learning_rate_factor(config, 100, 0.0) == 1.0
    assert learning_rate_factor(config, 600, 0.0) == pytest.approx(0.6)
    assert learning_rate_factor(config, 1100, 0.0) == learning_rate_factor(config, 99999, 0.0) == pytest.approx(0.2)


@pytest.mark.parametrize(("step", "hours"), [(0, 0.0), (250, 10.0), (500, 30.0), (7500, 25000.0), (400000, 5e5)])
def test_eden_is_the_formula_of_the_paper(step, hours):
    config = ScheduleConfig(name="eden", warmup_steps=500, warmup_start=0.5, eden_batches=7500, eden_hours=25000)
    batches = ((step**2 + 7500**2) / 7500**2) ** -0.25
    by_hours = ((hours**2 + 25000**2) / 25000**2) ** -0.25
    warmup = 1.0 if step >= 500 else 0.5 + 0.5 * step / 500
    assert learning_rate_factor(config, step, hours) == pytest.approx(batches * by_hours * warmup)


@pytest.mark.parametrize(
    ("step", "hours", "factor"),
    [
        (0, 0.0, 0.5),
        (250, 0.0, 0.749791811),  # 0.75 · (1 + 1/900)^-1/4
        (500, 0.0, 0.998891965),  # (1 + 1/225)^-1/4
        (7500, 0.0, 0.840896415),  # 2^-1/4
        (500, 25_000.0, 0.839964673),
        (7500, 25_000.0, 0.707106781),  # 2^-1/2
        (22_500, 75_000.0, 0.316227766),  # 10^-1/2
        (400_000, 600_000.0, 0.0279362764),  # (1 + 53.333²)^-1/4 · (1 + 24²)^-1/4
    ],
)
def test_eden_by_hand(step, hours, factor):
    config = load_config("base-speech").schedule
    assert (config.name, config.warmup_start) == ("eden", 0.5)
    assert learning_rate_factor(config, step, hours) == pytest.approx(factor, rel=1e-8)


def test_eden_at_its_scales_is_two_to_minus_one_half():
    assert learning_rate_factor(ScheduleConfig(name="eden"), 7500, 25_000.0) == pytest.approx(math.sqrt(0.5))


def test_constant_without_warm_up_is_one():
    assert learning_rate_factor(ScheduleConfig(name="constant", warmup_steps=0), 0, 0.0) == 1.0


def test_vectors_and_scalars_are_not_decayed():
    model = SpearForPreTraining(SpearConfig(hidden_size=32, intermediate_size=64))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1, learning_rate=1e-3))
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = name.endswith(("bias", "bypass_scale", "log_scale", "masked_spec_embed"))
        assert (id(parameter) in decayed) != spared, name
    set_learning_rate(optimizer, 5e-4)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
