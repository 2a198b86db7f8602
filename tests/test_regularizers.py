# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The regularisers on a whole model: what they change, what they leave alone, and that they repeat."""

import copy
import dataclasses
import multiprocessing
import os
import socket

import pytest
import torch
from torch import nn

from spear_hf import SpearConfig
from spear_hf.modeling_spear import SpearForPreTraining, swoosh_l
from spear_hf.pretraining.regularizers import install_regularizers
from spear_hf.pretraining.regularizers_config import RegularizersConfig
from spear_hf.pretraining.regularizers_schedules import BALANCERS, SCORE_PENALTY
from spear_hf.pretraining.regularizers_skips import Draws, feature_mask


NAMES = [field.name for field in dataclasses.fields(RegularizersConfig) if field.name != "enabled"]
GRADIENT_ONLY = ["bypass_limits", "stem_gradient_scale", "score_penalty", "balancer", "whiten"]


def only(*names):
    """A configuration with these switched on."""
    return RegularizersConfig(enabled=True, **{name: name in names for name in NAMES})


def make_model(**changes):
    """Two stacks of two layers and one, in training mode."""
    architecture = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "query_head_dim": 8,
        "stem_channels": [2, 4, 4],
        "num_layers_per_stack": [2, 1],
        "downsampling_factors": [1, 2],
        "conv_kernel_sizes": [7, 7],
        "hidden_dropout": 0.0,
        "pretraining_targets": {"speech": {"num_codebooks": 2, "codebook_size": 8, "weight": 1.0}},
    }
    torch.manual_seed(0)
    model = SpearForPreTraining(SpearConfig(**architecture | changes)).train()
    with torch.no_grad():  # far from initialisation, so that every module and every limit matters
        for name, parameter in model.spear.named_parameters():
            if "out_proj.weight" in name or "linear_pos" in name or "pointwise_conv2.weight" in name:
                parameter.mul_(8.0)
            if "bypass_scale" in name or "log_scale" in name:
                parameter.uniform_(-0.3, 1.3)
            if "self_attn_weights.in_proj.weight" in name:
                parameter.mul_(6.0)
    return model


def make_inputs(batch=4):
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(batch, 60, dtype=torch.long)
    attention_mask[1, 40:] = 0
    return {
        "input_features": torch.randn(batch, 60, 128, generator=generator),
        "attention_mask": attention_mask,
        "speech_labels": torch.randint(8, (batch, 26, 2), generator=generator),
    }


def step(model, regularizers=None, seed=3, inputs=None):
    """The output of a forward pass and the gradients of all parameters, in one flat tensor each."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**(inputs or make_inputs()))
    output.loss.backward()
    if regularizers is not None:
        regularizers.count_votes(regularizers.collect_votes().tolist())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if model.training:  # in eval mode the mask embedding has none where nothing is masked
        assert [name for name, gradient in gradients.items() if gradient is None] == []
    known = [gradient.flatten() for gradient in gradients.values() if gradient is not None]
    return output.last_hidden_state.detach(), torch.cat(known)


@pytest.fixture
def certain(monkeypatch):
    """Whatever may act in a call does."""
    monkeypatch.setattr(Draws, "happens", lambda self, decision, probability: probability > 0)


# ------------------------------------------------------------------------------------- what is changed, and what not


def test_nothing_is_installed_unless_enabled():
    model = make_model()
    bare = step(make_model())
    regularizers = install_regularizers(model, RegularizersConfig())
    assert all(torch.equal(*pair) for pair in zip(step(model, regularizers), bare))
    assert regularizers.state_dict()["whiten_exceeded"] == {}


def test_eval_is_bit_equal_to_the_bare_model():
    model = make_model().eval()
    inputs = make_inputs()
    bare = model(**inputs, output_hidden_states=True, output_attentions=True)
    install_regularizers(model, RegularizersConfig(enabled=True))
    regularised = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert torch.equal(bare.loss, regularised.loss)
    for before, after in zip(bare.hidden_states + bare.attentions, regularised.hidden_states + regularised.attentions):
        assert torch.equal(before, after)


def test_eval_gradients_are_bit_equal_too():
    model = make_model().eval()
    bare = step(model)
    install_regularizers(model, RegularizersConfig(enabled=True))
    assert all(torch.equal(*pair) for pair in zip(step(model), bare))


def test_all_switched_off_by_name_is_the_bare_model():
    model = make_model()
    bare = step(make_model())
    regularizers = install_regularizers(model, only())
    assert all(torch.equal(*pair) for pair in zip(step(model, regularizers), bare))


@pytest.mark.parametrize("name", NAMES)
def test_each_one_acts_alone_where_it_says(name, certain):
    """On its own each changes gradients; those that are identities forward leave the output to the bit."""
    output, gradients = step(make_model())
    model = make_model()
    regularised_output, regularised_gradients = step(model, install_regularizers(model, only(name)))
    assert not torch.equal(gradients, regularised_gradients)
    assert torch.equal(output, regularised_output) == (name in GRADIENT_ONLY)
    assert torch.isfinite(regularised_gradients).all()


def test_gradient_only_regularisers_together_leave_the_forward_pass(certain):
    model = make_model()
    output, _ = step(make_model())
    assert torch.equal(step(model, install_regularizers(model, only(*GRADIENT_ONLY)))[0], output)


def test_remove_leaves_no_trace():
    model = make_model(hidden_dropout=0.05)
    bare = step(make_model(hidden_dropout=0.05))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    regularizers = install_regularizers(model, RegularizersConfig(enabled=True))
    step(model, regularizers)
    regularizers.remove()
    assert all(torch.equal(*pair) for pair in zip(step(model), bare))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.spear.stacks.modules())


def test_checkpoints_know_nothing_of_them(tmp_path):
    model = make_model()
    names = set(model.state_dict())
    install_regularizers(model, RegularizersConfig(enabled=True))
    step(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = SpearForPreTraining.from_pretrained(tmp_path)
    assert (loaded.config.position_dropout, loaded.config.hidden_dropout) == (0.0, 0.0)


def test_the_configured_position_dropout_comes_back_after_an_error():
    model = make_model()
    install_regularizers(model, RegularizersConfig(enabled=True))
    with pytest.raises(ValueError, match="9"):
        model.spear(torch.zeros(1, 3, 128))
    assert model.config.position_dropout == 0.0


def test_a_copy_computes_with_its_own_weights():
    model = make_model()
    install_regularizers(model, RegularizersConfig(enabled=True))
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = make_model().eval()
    assert torch.equal(copied(**make_inputs()).loss, expected(**make_inputs()).loss)


def test_only_spear_models_are_taken():
    with pytest.raises(TypeError, match="Linear"):
        install_regularizers(nn.Linear(2, 2), RegularizersConfig(enabled=True))


# -------------------------------------------------------------------------------------------- skips, masks, dropouts


def layer_reference(layer, x, table, mask, kept):
    """A layer as the specification writes it, with factors 0 or 1 (batch, 1, 1) on its branches and its bypass."""
    weights = layer.self_attn_weights(x, table, mask)
    o = x
    x = x + layer.feed_forward1(x)
    x = x + kept["attention"] * layer.nonlin_attention(x, weights)
    x = x + kept["attention"] * layer.self_attn1(x, weights)
    x = x + kept["conv1"] * layer.conv_module1(x, mask)
    x = x + kept["ff2"] * layer.feed_forward2(x)
    x = o + (x - o) * layer.bypass_mid.bypass_scale
    x = x + kept["attention"] * layer.self_attn2(x, weights)
    x = x + kept["conv2"] * layer.conv_module2(x, mask)
    x = x + kept["ff3"] * layer.feed_forward3(x)
    return o + (layer.norm(x) - o) * layer.bypass.bypass_scale * kept["layer"]


BRANCHES = {
    "attention_skip": ["attention"],
    "convolution_skip": ["conv1", "conv2"],
    "feed_forward_skip": ["ff2", "ff3"],
    "layer_skip": ["layer"],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_skips_leave_a_branch_out_of_a_sequence_at_their_rate(name):
    batch, rate = 600, 0.3
    model = make_model()
    layer = model.spear.stacks[0].layers[1]
    torch.manual_seed(5)
    x, table = torch.randn(batch, 4, 32), torch.randn(8, 48)
    mask = torch.ones(batch, 4, dtype=torch.bool)
    ones = dict.fromkeys(["attention", "conv1", "conv2", "ff2", "ff3", "layer"], torch.ones(batch, 1, 1))
    first, *rest = BRANCHES[name]
    variants = {}
    for skipped in [(), (first,), *[(other,) for other in rest], *[(first, other) for other in rest]]:
        kept = ones | {branch: torch.zeros(batch, 1, 1) for branch in skipped}
        variants[skipped] = layer_reference(layer, x, table, mask, kept)

    regularizers = install_regularizers(model, only(name))
    for key in regularizers.rates:
        regularizers.rates[key] = rate
    output = layer(x, table, mask)
    matches = {
        skipped: torch.isclose(output, expected, rtol=1e-4, atol=1e-4).all(dim=(1, 2))
        for skipped, expected in variants.items()
    }
    # One draw per sequence and branch, independent of each other: every sequence is one of the variants.
    assert torch.equal(sum(match.int() for match in matches.values()), torch.ones(batch, dtype=torch.int64))
    for skipped, match in matches.items():
        expected = rate ** len(skipped) * (1 - rate) ** (len(BRANCHES[name]) - len(skipped))
        assert match.float().mean().item() == pytest.approx(expected, abs=0.07), skipped


def test_layers_are_skipped_at_the_rates_of_their_warm_up():
    model = make_model()
    regularizers = install_regularizers(model, only("layer_skip"))
    regularizers.set_step(2000)  # slots of 1333: the second layer of the first stack is just about to warm up
    rates = {name: rate for name, rate in regularizers.rates.items() if name.startswith("stacks")}
    assert rates == pytest.approx(
        {"stacks.0.layers.0": 0.035, "stacks.0.layers.1": 0.5, "stacks.1.stack.layers.0": 0.5}
    )


def test_positions_are_left_out_for_the_whole_batch():
    model = make_model()
    module = model.spear.stacks[0].layers[0].self_attn_weights
    x, table = torch.randn(3, 5, 32), torch.randn(10, 48)
    with_positions, without = module(x, table), module(x, torch.zeros_like(table))
    regularizers = install_regularizers(model, only("position_skip"))
    layer, seen = model.spear.stacks[0].layers[0], []
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(200):
        layer(x, table)
    left_out = [torch.equal(weights, without) for weights in seen]
    assert all(left or torch.equal(weights, with_positions) for left, weights in zip(left_out, seen))
    assert sum(left_out) == pytest.approx(100, abs=30)
    regularizers.set_step(4000)
    layer(x, table)
    assert torch.equal(seen[-1], with_positions)


def test_convnext_is_skipped_per_sequence():
    model = make_model()
    stem = model.spear.stem
    features = torch.randn(400, 12, 128)
    seen = []
    stem.convnext.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    regularizers = install_regularizers(model, only("convnext_skip"))
    regularizers.set_step(0)
    stem(features)
    before, after = seen[0]
    skipped = (before == after).flatten(1).all(dim=1)
    assert skipped.float().mean().item() == pytest.approx(0.2, abs=0.06)
    convnext = stem.convnext
    branch = convnext.pointwise_conv2.eval()(swoosh_l(convnext.pointwise_conv1(convnext.depthwise_conv(before))))
    torch.testing.assert_close(after[~skipped], (before + branch)[~skipped])


def test_feature_mask_has_its_rates_and_its_halves():
    draws = Draws()
    places = draws.new_per_sequence(), draws.new_per_sequence()
    torch.manual_seed(0)
    draws.draw(20_000, torch.device("cpu"))
    mask = feature_mask(draws, places, torch.zeros(20_000, 1, 10), 4)
    assert mask.shape == (20_000, 1, 10)
    patterns, counts = mask[:, 0].unique(dim=0, return_counts=True)
    shares = {tuple(pattern.int().tolist()): count / 20_000 for pattern, count in zip(patterns, counts.tolist())}
    assert shares == pytest.approx(
        {
            (1,) * 4 + (0,) * 6: 0.125,
            (1,) * 7 + (0,) * 3: 0.875 * 0.125,
            (1,) * 10: 0.875**2,
        },
        abs=0.01,
    )


def test_the_same_features_are_masked_in_every_layer():
    model = make_model(unmasked_hidden_size=10)
    install_regularizers(model, only("feature_mask"))
    torch.manual_seed(0)
    inputs = make_inputs(batch=40)
    seen = []
    for stack in (model.spear.stacks[0], model.spear.stacks[1].stack):
        stack.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = model(**inputs, output_hidden_states=True).hidden_states
    masked = [(state == 0).all(dim=1) for state in [*seen, *states[1:]]]  # (batch, dim) each
    assert all(torch.equal(pattern, masked[0]) for pattern in masked)
    assert 0 < masked[0][:, 10:21].all(dim=1).sum() < masked[0][:, 21:].all(dim=1).sum() < 40
    assert not masked[0][:, :10].any()


def test_dropout_fields_of_the_model_follow_the_schedule():
    model = make_model()
    seen = []
    model.spear.stacks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    regularizers = install_regularizers(model, only("dropout", "position_dropout"))
    dropouts = [module for module in model.modules() if type(module).__name__ == "SpearTimeSharedDropout"]
    assert len(dropouts) == 1 + 3 * 3
    for batches, expected in ((0, 0.3), (10_000, 0.2), (20_000, 0.1)):
        regularizers.set_step(batches)
        assert [dropout.p for dropout in dropouts] == pytest.approx([expected] * len(dropouts))
    step(model, regularizers)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.15, abs=0.03)


# ---------------------------------------------------------------------------------------------- gradients and draws


def test_every_place_of_the_tables_is_reached(certain, monkeypatch):
    """Each place gets features of its own shape, in training only."""
    balanced, whitened = [], []
    monkeypatch.setattr(
        "spear_hf.pretraining.regularizers.balance",
        lambda x, limits, dim, part: balanced.append((limits, x.shape[dim] if part is None else part)) or x,
    )
    monkeypatch.setattr(
        "spear_hf.pretraining.regularizers.whiten",
        lambda x, limit, scale, state, index, groups, dim, part: (
            whitened.append((state.names[index], x.shape[dim] if part is None else part[1], groups)) or x
        ),
    )
    model = make_model(num_layers_per_stack=[1], downsampling_factors=[1], conv_kernel_sizes=[7])
    regularizers = install_regularizers(model, only("balancer", "whiten"))
    step(model)
    rows = {name: row(0) for name, row in BALANCERS.items()}
    expected = [
        ("stem_conv1", 2),
        ("stem_conv2", 4),
        ("stem_conv3", 4),
        ("convnext_hidden", 12),
        ("convnext_output", 4),
        ("attention_keys", (16, 16)),
        ("feed_forward_hidden", 24),
        ("nonlin_gate", (0, 24)),
        ("nonlin_output", 32),
        ("convolution_gate", (32, 32)),
        ("convolution_depthwise", 32),
        ("feed_forward_hidden", 32),
        ("feed_forward2_output", 32),
        ("convolution_gate", (32, 32)),
        ("convolution_depthwise", 32),
        ("feed_forward_hidden", 40),
        ("feed_forward3_output", 32),
        ("layer_before_norm", 32),
        ("layer_output", 32),
    ]
    assert balanced == [(rows[name], size) for name, size in expected]
    layer = "stacks.0.layers.0"
    assert whitened == [
        ("stem.convnext", 4, 1),
        ("stem.out_proj", 32, 1),
        (f"{layer}.self_attn_weights.in_proj", 16, 2),
        (f"{layer}.feed_forward1", 32, 1),
        (f"{layer}.nonlin_attention.in_proj", 24, 1),
        (f"{layer}.nonlin_attention", 32, 1),
        (f"{layer}.self_attn1", 32, 1),
        (f"{layer}.conv_module1.depthwise_conv", 32, 1),
        (f"{layer}.feed_forward2", 32, 1),
        (f"{layer}.self_attn2", 32, 1),
        (f"{layer}.conv_module2.depthwise_conv", 32, 1),
        (f"{layer}.feed_forward3", 32, 1),
        (layer, 32, 1),
    ]
    assert sorted(name for name, *_ in whitened) == sorted(regularizers.whiten_state.names)


def test_each_acts_in_its_share_of_calls(monkeypatch):
    asked = []
    monkeypatch.setattr(Draws, "happens", lambda self, decision, probability: asked.append(probability) or False)
    model = make_model(num_layers_per_stack=[1], downsampling_factors=[1], conv_kernel_sizes=[7])
    regularizers = install_regularizers(model, RegularizersConfig(enabled=True))
    step(model)
    expected = [0.5] * 15 + [0.05] * 3 + [0.025] + [0.25] * 13 + [0.6] * 2 + [0.1] + [0.5]
    assert sorted(asked) == sorted(expected)
    asked.clear()
    regularizers.set_step(30_000)
    regularizers.whiten_state.exceeded = [False] * 13
    step(model)
    assert sorted(asked) == sorted([0.125] * 15 + [0.05] * 3 + [0.025] + [0.025] * 13 + [0.6] * 2 + [0.1] + [0.0])


def test_draws_are_uniform_and_repeat():
    draws = Draws()
    decision, sequence = draws.new_decision(), draws.new_per_sequence()
    torch.manual_seed(0)
    happened, kept = [], []
    for _ in range(2000):
        draws.draw(10, torch.device("cpu"))
        happened.append(draws.happens(decision, 0.125))
        kept.append(draws.keep(sequence, 0.2, torch.zeros(10, 1, 1)))
    assert sum(happened) / 2000 == pytest.approx(0.125, abs=0.03)
    assert torch.stack(kept).mean().item() == pytest.approx(0.8, abs=0.01)
    assert kept[0].shape == (10, 1, 1)


def test_equal_seeds_give_equal_steps():
    models = make_model(), make_model()
    results = [
        step(model, install_regularizers(model, RegularizersConfig(enabled=True)), seed=seed)
        for model, seed in zip(models, (7, 7))
    ]
    assert all(torch.equal(*pair) for pair in zip(*results))
    other = step(models[0], seed=8)
    assert not torch.equal(other[1], results[0][1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_again(use_reentrant):
    results, states = [], []
    for checkpointing in (False, True):
        model = make_model()
        regularizers = install_regularizers(model, RegularizersConfig(enabled=True))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        results += [step(model, regularizers, seed) for seed in range(4)]
        states.append(regularizers.state_dict())
    for plain, recomputed in zip(results[:4], results[4:]):
        assert torch.equal(plain[0], recomputed[0])
        torch.testing.assert_close(plain[1], recomputed[1], rtol=1e-5, atol=1e-7)
    assert states[0] == states[1]
    assert False in states[0]["whiten_exceeded"].values()  # something has changed in four steps


def test_two_forward_passes_before_the_backward_passes_recompute_their_own():
    """As some objectives do; nothing of the second forward pass may leak into the recomputation of the first."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        install_regularizers(model, RegularizersConfig(enabled=True))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        first, second = model(**make_inputs(4)), model(**make_inputs(3))
        first.loss.backward()
        second.loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_the_score_penalty_is_divided_as_the_loss_is(certain):
    model = make_model()
    regularizers = install_regularizers(model, only("score_penalty"))
    bare = step(make_model())[1]
    changes = []
    for normalizer in (1.0, torch.tensor(50.0)):
        regularizers.set_step(0.0, normalizer)
        changes.append(step(model)[1] - bare)
    assert regularizers.score_penalty == pytest.approx(SCORE_PENALTY / 50)
    torch.testing.assert_close(changes[0] / 50, changes[1], rtol=0.05, atol=1e-6)


def test_bf16_autocast_has_finite_gradients_in_float32(certain):
    model = make_model()
    install_regularizers(model, RegularizersConfig(enabled=True))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**make_inputs()).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.slow
def test_schedules_do_not_compile_a_model_again():
    """Graphs that are kept give the bits of graphs made anew for every step, and what the plain model gives.

    That is not the same to the bit: it computes in another order than a compiled one (blockwise_spear.py).
    """
    counters = torch._dynamo.utils.counters["stats"]
    losses, graphs = [], []
    for way in ("plain", "anew", "kept"):
        torch._dynamo.reset()
        model = make_model()
        forward = model if way == "plain" else torch.compile(model, backend="eager")
        regularizers = install_regularizers(model, RegularizersConfig(enabled=True))
        for seed in range(6):
            if way == "anew":
                torch._dynamo.reset()
            regularizers.set_step(seed * 700.0, 20.0)
            torch.manual_seed(seed)
            losses.append(forward(**make_inputs()).loss)
            losses[-1].backward()
            regularizers.count_votes(regularizers.collect_votes().tolist())
            graphs.append(counters["unique_graphs"])
    torch._dynamo.reset()
    for plain, anew, kept in zip(losses[:6], losses[6:12], losses[12:]):
        assert torch.equal(anew, kept)
        torch.testing.assert_close(kept, plain, rtol=1e-6, atol=0)
    assert len({loss.item() for loss in losses[12:]}) == 6
    assert graphs[14:] == graphs[14:15] * 4  # shapes become dynamic within the first two


def test_every_parameter_has_a_gradient_where_everything_is_skipped():
    model = make_model()
    regularizers = install_regularizers(model, RegularizersConfig(enabled=True))
    regularizers.rates = dict.fromkeys(regularizers.rates, 1.0)
    step(model)  # asserts it


def kept_for_backward(model):
    """Bytes that autograd keeps of a forward pass, parameters left out."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(**make_inputs())  # holds the graph, so no storage is used twice while counting
    assert output.loss is not None
    return sum(kept.values())


def test_gradient_regularisers_keep_references_to_what_is_kept_anyway_or_little_more(certain):
    bare = kept_for_backward(make_model())
    model = make_model()
    install_regularizers(model, only(*GRADIENT_ONLY))
    assert bare < kept_for_backward(model) < 1.5 * bare  # all of them at once; a few at a time act in a real step


# ------------------------------------------------------------------------------------------------------------ state


def test_state_resumes_exactly(tmp_path):
    straight = make_model()
    regularizers = install_regularizers(straight, RegularizersConfig(enabled=True))
    optimizer = torch.optim.SGD(straight.parameters(), lr=1e-3)
    for seed in range(6):
        regularizers.set_step(seed * 100.0, 30.0)
        step(straight, regularizers, seed)
        optimizer.step()
        if seed == 2:
            regularizers.save(tmp_path)
            weights = copy.deepcopy(straight.state_dict())
            saved = regularizers.state_dict()

    resumed = make_model()
    resumed.load_state_dict(weights)
    regularizers = install_regularizers(resumed, RegularizersConfig(enabled=True))
    assert regularizers.state_dict() != saved
    regularizers.load(tmp_path)
    assert regularizers.state_dict() == saved
    optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-3)
    for seed in range(3, 6):
        regularizers.set_step(seed * 100.0, 30.0)
        step(resumed, regularizers, seed)
        optimizer.step()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_state_of_something_else_is_refused(tmp_path):
    regularizers = install_regularizers(make_model(), RegularizersConfig(enabled=True))
    state = regularizers.state_dict()
    with pytest.raises(ValueError, match="version 2"):
        regularizers.load_state_dict(state | {"format_version": 2})
    other = install_regularizers(make_model(num_layers_per_stack=[1, 1]), RegularizersConfig(enabled=True))
    with pytest.raises(ValueError, match=r"stacks\.0\.layers\.1"):
        other.load_state_dict(state)
    with pytest.raises(FileNotFoundError):
        regularizers.load(tmp_path)
    install_regularizers(make_model(), RegularizersConfig()).load(tmp_path)  # nothing installed, nothing needed


def distributed_child(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    bare = make_model()
    regularizers = install_regularizers(bare, RegularizersConfig(enabled=True))
    model = nn.parallel.DistributedDataParallel(bare)
    for seed in range(6):
        torch.manual_seed(2 * seed + rank)  # ranks draw differently
        model.zero_grad()
        model(**make_inputs()).loss.backward()
        regularizers.count_votes(regularizers.collect_votes().tolist())
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    queue.put((rank, regularizers.state_dict()["whiten_exceeded"], gradients.double().sum().item()))
    torch.distributed.destroy_process_group()


def test_two_ranks_need_no_find_unused_parameters_and_agree_on_the_state():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_regularizers"])
    queue = context.Queue()
    processes = [context.Process(target=distributed_child, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert results[0][1:] == results[1][1:]
    assert False in results[0][1].values()
