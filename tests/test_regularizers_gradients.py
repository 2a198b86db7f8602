# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Balancer, Whiten, limits and penalties against literal versions of their formulas; schedules at their corners."""

import itertools
import math

import pytest
import torch

from spear_hf import SpearConfig
from spear_hf.modeling_spear import SpearAttentionWeights, SpearBypass, relative_position_table
from spear_hf.pretraining.regularizers_balancer import balance, balancing_line
from spear_hf.pretraining.regularizers_schedules import (
    BALANCER_GRADIENT_SCALE,
    BALANCERS,
    RATES,
    WHITENS,
    BalancerLimits,
    Schedule,
    absolute_to_rms,
    adjusted_batches,
    layer_skip_schedules,
    positive_share_to_mean,
)
from spear_hf.pretraining.regularizers_skips import (
    LimitValue,
    ScaleGradient,
    bypass_with_scale,
    penalized_attention_weights,
)
from spear_hf.pretraining.regularizers_whiten import WhitenState, whiten, whitening_penalty


# ------------------------------------------------------------------------------------------------------- schedules


def test_schedule_is_linear_between_its_points_and_constant_outside():
    schedule = Schedule((0, 0.2), (4000, 0.05), (16_000, 0.0))
    expected = {-5: 0.2, 0: 0.2, 2000: 0.125, 4000: 0.05, 10_000: 0.025, 16_000: 0.0, 1e9: 0.0}
    assert {place: schedule(place) for place in expected} == pytest.approx(expected)
    assert Schedule(0.15)(123.0) == 0.15


@pytest.mark.parametrize("points", [(), ((5, 1.0), (5, 2.0)), ((5, 1.0), (0, 2.0))])
def test_schedule_refuses_points_out_of_order(points):
    with pytest.raises(ValueError, match="ascending"):
        Schedule(*points)


def test_adjusted_batches_count_the_audio_of_all_ranks():
    assert adjusted_batches(300, 4800.0) == 2400.0


@pytest.mark.parametrize(
    ("name", "corners"),
    [
        ("dropout", {0: 0.3, 10_000: 0.2, 20_000: 0.1, 90_000: 0.1}),
        ("position_skip", {0: 0.5, 2000: 0.25, 4000: 0.0}),
        ("attention_skip", {0: 0.2, 4000: 0.05, 16_000: 0.0}),
        ("convolution_skip", {0: 0.2, 4000: 0.05, 16_000: 0.0}),
        ("feed_forward_skip", {0: 0.1, 4000: 0.01, 50_000: 0.0}),
        ("convnext_skip", {0: 0.2, 20_000: 0.015}),
    ],
)
def test_rates_at_their_corners(name, corners):
    assert {place: RATES[name](place) for place in corners} == pytest.approx(corners)


def test_layer_skip_warms_up_one_layer_after_the_other():
    schedules = layer_skip_schedules([1, 2, 3], [1, 2, 4])  # slots of 1000 adjusted batches
    assert [len(stack) for stack in schedules] == [1, 2, 3]
    final = [0.035 * math.sqrt(factor) for factor in (1, 2, 4)]
    for schedule, begin, end, last in [
        (schedules[0][0], 1000, 2000, final[0]),
        (schedules[1][0], 2000, 2500, final[1]),
        (schedules[1][1], 2500, 3000, final[1]),
        (schedules[2][0], 3000, 3000 + 1000 / 3, final[2]),
        (schedules[2][2], 3000 + 2000 / 3, 4000, final[2]),
    ]:
        assert schedule(0) == schedule(begin) == 0.5
        assert schedule((begin + end) / 2) == pytest.approx((0.5 + last) / 2)
        assert schedule(end) == schedule(1e6) == pytest.approx(last)


def test_balancer_limits_are_shares_and_absolute_values_turned_into_moments():
    start = BALANCERS["nonlin_gate"](0)
    assert start == pytest.approx(
        (0.8139535143 * math.atanh(-0.5), 0.8139535143 * math.atanh(0.5), 1.25331413732 * 0.5, 1.25331413732 * 5, 0.5)
    )
    later = BALANCERS["nonlin_gate"](20_000)
    assert later[:2] == pytest.approx((positive_share_to_mean(0.05), positive_share_to_mean(0.95)))
    assert later.probability == 0.125
    assert BALANCERS["convolution_gate"](8000).max_rms == pytest.approx(absolute_to_rms(10))
    assert BALANCERS["convolution_gate"](0).max_mean == math.inf  # a share of 1: no limit
    assert (positive_share_to_mean(0.0), positive_share_to_mean(0.5)) == (-math.inf, 0.0)
    assert positive_share_to_mean(0.7) == pytest.approx(torch.erfinv(torch.tensor(0.4)).item(), abs=0.03)


def test_tables_name_every_place_of_the_recipe():
    assert len(BALANCERS) == 15
    corners = {name: (row.limit(0), row.limit(20_000), row.gradient_scale) for name, row in WHITENS.items()}
    assert corners == {
        "attention_keys": (3, 6, 0.025),
        "self_attention_output": (7.5, 22.5, 0.01),
        "nonlin_value": (5, 10, 0.01),
        "nonlin_output": (5, 15, 0.01),
        "feed_forward_output": (7.5, 15, 0.01),
        "convolution_depthwise": (7.5, 15, 0.01),
        "layer_output": (4, 12, 0.01),
        "stem_output": (4, 8, 0.02),
        "convnext_output": (5, 5, 0.01),
    }


# -------------------------------------------------------------------------------------------------------- balancer


def slow_balanced_gradient(x, grad, limits):
    """The loss as written, by autograd, channel by channel; x and grad (n, channels) in float64."""
    changed = grad.clone()
    for channel in range(x.shape[1]):
        values = x[:, channel].clone().requires_grad_()
        mean, mean_square = values.mean(), values.square().mean()
        mean_square = mean_square.clamp(min=1e-20)
        ratio, rms = mean / (mean_square - mean**2).clamp(min=1e-20).sqrt(), mean_square.sqrt()
        loss = (ratio - ratio.clamp(limits.min_mean, limits.max_mean)).abs()
        loss = loss + (rms.clamp(limits.min_rms, limits.max_rms) / rms).log().abs()
        (push,) = torch.autograd.grad(loss, values)
        if push.any():
            changed[:, channel] += 0.04 * push / push.square().mean().sqrt() * grad[:, channel].abs()
    return changed


def channels_of_every_kind(generator):
    """(240, 12): means and sizes below, within and above the limits, in all combinations and a dead channel."""
    means, sizes = (-1.5, 0.1, 2.0), (0.05, 1.0, 30.0)
    columns = [(torch.randn(240, generator=generator) + mean) * size for mean, size in itertools.product(means, sizes)]
    columns += [torch.zeros(240), torch.randn(240, generator=generator), torch.full((240,), 0.5)]
    columns[-1][:24] += 0.5
    return torch.stack(columns, dim=1)


def largest_push_of_flat_channels():
    """Of channels that vary by less than float32 sums of their squares can tell, or not at all."""
    generator = torch.Generator().manual_seed(0)
    means, deviations = torch.linspace(0.1, 30.0, 200), (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
    noise = torch.randn(2000, len(means), generator=generator)
    pushes = []
    for deviation in deviations:
        x = means * (1.0 + deviation * noise)
        offset, slope = balancing_line(x, BALANCERS["layer_output"](0))
        pushes.append((offset + slope * x).square().mean(dim=0).sqrt())
    return float(torch.stack(pushes).max())


def test_channels_that_hardly_vary_are_not_pushed_harder_than_others():
    """By the rounding of their variance it was a million times as hard."""
    assert largest_push_of_flat_channels() < 2 * BALANCER_GRADIENT_SCALE


LIMITS = BalancerLimits(positive_share_to_mean(0.3), positive_share_to_mean(0.9), 0.25, 5.0, 1.0)
BALANCED_CASES = [
    LIMITS,
    LIMITS._replace(max_mean=math.inf),
    BALANCERS["attention_keys"](0),
    BALANCERS["stem_conv1"](0),
]


@pytest.mark.parametrize("limits", BALANCED_CASES)
def test_balancer_is_the_gradient_of_its_loss(limits):
    generator = torch.Generator().manual_seed(0)
    x = channels_of_every_kind(generator)
    grad = torch.randn(x.shape, generator=generator)
    leaf = x.clone().requires_grad_()
    output = balance(leaf, limits)
    assert torch.equal(output, x)
    output.backward(grad)
    expected = slow_balanced_gradient(x.double(), grad.double(), limits)
    torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-5)
    assert (leaf.grad != grad).any()


def test_balancer_finds_channels_in_any_axis_and_in_a_part_of_it():
    generator = torch.Generator().manual_seed(1)
    x = channels_of_every_kind(generator)
    grad = torch.randn(x.shape, generator=generator)
    expected = slow_balanced_gradient(x.double(), grad.double(), LIMITS).float()
    leaf = x.view(2, 10, 12, 12).permute(0, 3, 1, 2).clone().requires_grad_()  # (batch, channels, height, width)
    balance(leaf, LIMITS, dim=1).backward(grad.view(2, 10, 12, 12).permute(0, 3, 1, 2))
    torch.testing.assert_close(leaf.grad.permute(0, 2, 3, 1).reshape(240, 12), expected, rtol=1e-4, atol=1e-5)

    leaf = x.view(4, 60, 12).clone().requires_grad_()
    balance(leaf, LIMITS, part=(3, 5)).backward(grad.view(4, 60, 12))
    torch.testing.assert_close(leaf.grad.view(240, 12)[:, 3:8], expected[:, 3:8], rtol=1e-4, atol=1e-5)
    for untouched in (slice(0, 3), slice(8, 12)):
        assert torch.equal(leaf.grad.view(240, 12)[:, untouched], grad[:, untouched])


def test_balancer_works_in_float32_on_half_precision_and_on_constant_channels():
    generator = torch.Generator().manual_seed(2)
    x = channels_of_every_kind(generator).bfloat16()
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    leaf = x.clone().requires_grad_()
    balance(leaf, LIMITS).backward(grad)
    assert leaf.grad.dtype == torch.bfloat16
    expected = slow_balanced_gradient(x.double(), grad.double(), LIMITS)
    torch.testing.assert_close(leaf.grad, expected.bfloat16(), rtol=1e-2, atol=1e-3)

    leaf = torch.tensor([[0.0, 100.0, -1e-12, 1e4]]).repeat(50, 1).requires_grad_()
    balance(leaf, LIMITS).backward(torch.ones(50, 4))
    assert torch.isfinite(leaf.grad).all()


# ---------------------------------------------------------------------------------------------------------- whiten


def slow_metric(x, groups):
    """As written: (frames, channels) in float64."""
    covariances = []
    for part in x.chunk(groups, dim=1):
        part = part - part.mean(dim=0)
        covariances.append(part.T @ part)
    row_sums = torch.cat([(covariance**2).sum(dim=1) for covariance in covariances])
    diagonals = torch.cat([covariance.diagonal() for covariance in covariances])
    return row_sums.mean() / diagonals.mean() ** 2


def slow_whitened_gradient(x, grad, limit, gradient_scale, groups):
    leaf = x.clone().requires_grad_()
    metric = slow_metric(leaf, groups)
    if metric <= limit:
        return grad
    (push,) = torch.autograd.grad(metric, leaf)
    return grad + push * gradient_scale * grad.norm() / push.norm()


def coloured(generator, frames=96, channels=24):
    """Features that a few directions dominate, and not centred."""
    mixing = torch.randn(channels, channels, generator=generator) * torch.linspace(2.0, 0.1, channels)
    return torch.randn(frames, channels, generator=generator) @ mixing.T + 1.5


@pytest.mark.parametrize("groups", [1, 4])
def test_whiten_is_the_gradient_of_its_metric(groups):
    generator = torch.Generator().manual_seed(0)
    x = coloured(generator)
    grad = torch.randn(x.shape, generator=generator)
    metric, _ = whitening_penalty(x, groups)
    torch.testing.assert_close(metric, slow_metric(x.double(), groups).float())
    for limit, exceeded in ((1.2, True), (100.0, False)):
        state = WhitenState()
        index = state.add("place")
        leaf = x.clone().requires_grad_()
        output = whiten(leaf, limit, 0.1, state, index, groups)
        assert torch.equal(output, x)
        output.backward(grad)
        expected = slow_whitened_gradient(x.double(), grad.double(), limit, 0.1, groups).float()
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(leaf.grad, grad) != exceeded
        state.count(state.collect(torch.device("cpu")).tolist())
        assert state.exceeded == [exceeded]


def test_whiten_finds_channels_in_any_axis_and_in_a_part_of_it():
    generator = torch.Generator().manual_seed(1)
    x = coloured(generator)
    grad = torch.randn(x.shape, generator=generator)
    state = WhitenState()
    index = state.add("place")
    expected = slow_whitened_gradient(x.double(), grad.double(), 1.0, 0.1, 1).float()
    leaf = x.view(4, 24, 24).transpose(1, 2).clone().requires_grad_()  # (batch, channels, frames)
    whiten(leaf, 1.0, 0.1, state, index, dim=1).backward(grad.view(4, 24, 24).transpose(1, 2))
    torch.testing.assert_close(leaf.grad.transpose(1, 2).reshape(96, 24), expected, rtol=1e-4, atol=1e-5)

    leaf = x.view(4, 24, 24).clone().requires_grad_()
    whiten(leaf, 1.0, 0.1, state, index, groups=2, part=(8, 12)).backward(grad.view(4, 24, 24))
    part = slow_whitened_gradient(x[:, 8:20].double(), grad[:, 8:20].double(), 1.0, 0.1, 2).float()
    torch.testing.assert_close(leaf.grad.view(96, 24), torch.cat([grad[:, :8], part, grad[:, 20:]], dim=1))


def whitened_in_half_precision(device):
    """Bfloat16 features, their gradient, and what becomes of it."""
    generator = torch.Generator().manual_seed(3)
    x = coloured(generator, frames=4000).bfloat16()
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    state = WhitenState()
    leaf = x.to(device).requires_grad_()
    whiten(leaf, 1.0, 0.5, state, state.add("place"), groups=2).backward(grad.to(device))
    return x.double(), grad.double(), leaf.grad.cpu().double()


def assert_whitened(x, grad, found):
    """The change is that of float64, but for roundings to 8 bits."""
    expected = slow_whitened_gradient(x, grad, 1.0, 0.5, 2)
    assert (found - expected).norm() < 0.01 * (expected - grad).norm()


@pytest.mark.gpu
def test_whiten_in_half_precision_on_a_gpu():
    assert_whitened(*whitened_in_half_precision("cuda"))


def test_white_features_have_metric_one_and_dead_ones_do_no_harm():
    generator = torch.Generator().manual_seed(0)
    assert whitening_penalty(torch.randn(200_000, 4, generator=generator), 1)[0] == pytest.approx(1.0, abs=1e-3)
    line = torch.randn(100, 1, generator=generator).repeat(1, 8)
    assert whitening_penalty(line, 1)[0] == pytest.approx(8.0, rel=1e-4)
    state = WhitenState()
    index = state.add("place")
    leaf = torch.zeros(10, 8, requires_grad=True)
    whiten(leaf, 1.0, 0.1, state, index).backward(torch.ones(10, 8))
    assert torch.equal(leaf.grad, torch.ones(10, 8))


def test_whiten_state_keeps_what_was_not_measured_and_the_worst_of_a_step():
    state = WhitenState()
    for name in "abc":
        state.add(name)
    assert state.exceeded == [True, True, True]  # looked at often until measured
    state.vote(0, torch.tensor(False))
    state.vote(1, torch.tensor(True))
    state.vote(1, torch.tensor(False))
    assert state.exceeded == [True, True, True]  # nothing changes within a step
    state.count(state.collect(torch.device("cpu")).tolist())
    assert state.exceeded == [False, True, True]
    state.vote(1, torch.tensor(False))
    state.count(state.collect(torch.device("cpu")).tolist())
    assert state.exceeded == [False, False, True]


# --------------------------------------------------------------------------------------------- limits and penalties


def test_limit_flips_the_gradients_that_lead_further_out():
    values = torch.tensor([0.1, 0.1, 0.5, 0.5, 1.2, 1.2])
    leaf = values.clone().requires_grad_()
    output = LimitValue.apply(leaf, 0.2, 1.0)
    assert torch.equal(output, values)
    output.backward(torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0]))
    assert leaf.grad.tolist() == [-2.0, -2.0, 2.0, -2.0, 2.0, 2.0]


def test_scale_gradient():
    leaf = torch.randn(5, requires_grad=True)
    output = ScaleGradient.apply(leaf, 0.2)
    assert torch.equal(output, leaf)
    output.sum().backward()
    assert torch.equal(leaf.grad, torch.full((5,), 0.2))


def attention_inputs(scale):
    config = SpearConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    torch.manual_seed(0)
    module = SpearAttentionWeights(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    hidden_states = torch.randn(2, 7, 16)
    table = relative_position_table(7, config.pos_dim, hidden_states.device, torch.float32)
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[1, 4:] = False
    return module, hidden_states, table, key_mask


@pytest.mark.parametrize("masked", [False, True])
def test_penalty_is_added_to_the_gradient_of_large_scores(masked):
    module, hidden_states, table, key_mask = attention_inputs(0.7)
    key_mask = key_mask if masked else None
    target = torch.randn(2, 2, 7, 7)

    def gradients(weights, *losses):
        loss = sum([(weights * target).sum(), *losses])
        return torch.autograd.grad(loss, list(module.parameters()))

    weights = penalized_attention_weights(module, hidden_states, table, key_mask, 0.05)
    assert torch.equal(weights, module(hidden_states, table, key_mask))

    # The scores as written in the model's definition, query by query and key by key.
    query, key, pos_query = module.in_proj(hidden_states).split([64, 64, 8], dim=-1)
    scores = torch.stack([q @ k.transpose(1, 2) for q, k in zip(query.split(32, -1), key.split(32, -1))], dim=1)
    positions = torch.stack(
        [torch.stack([module.linear_pos(table)[6 + j - i] for j in range(7)]) for i in range(7)]
    )  # (query, key, heads * 4)
    parts = [torch.einsum("bip,ijp->bij", p, w) for p, w in zip(pos_query.split(4, -1), positions.split(4, -1))]
    scores = scores + torch.stack(parts, dim=1)
    beyond = scores.detach().abs() > 25
    assert 0.1 < beyond.float().mean() < 0.9
    if masked:
        beyond[1, :, 4:] = False
        beyond[1, :, :, 4:] = False
    penalty = 0.05 * (scores.abs() * beyond).sum()
    expected = gradients(module(hidden_states, table, key_mask), penalty)
    for got, wanted in zip(gradients(weights), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_bypass_with_its_own_scale_is_the_model_to_the_bit():
    torch.manual_seed(0)
    module = SpearBypass(8)
    torch.nn.init.normal_(module.bypass_scale)
    residual, hidden_states = torch.randn(2, 3, 5, 8)
    assert torch.equal(
        bypass_with_scale(module, residual, hidden_states, module.bypass_scale), module(residual, hidden_states)
    )
