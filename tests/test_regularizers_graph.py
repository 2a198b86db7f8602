# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The regularisers inside compiled layers: what they do is that of the others, and one graph serves every step."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from spear_hf.pretraining.regularizers import install_regularizers
from spear_hf.pretraining.regularizers_config import RegularizersConfig
from spear_hf.pretraining.regularizers_graph import GraphDraws, time_shared_dropout
from spear_hf.pretraining.regularizers_skips import Draws

from .test_regularizers import NAMES, make_inputs, make_model, only, step


ALL = RegularizersConfig(enabled=True)


@pytest.fixture
def known(monkeypatch):
    """Whatever may act in a call does, and sequences draw numbers that do not depend on how many were drawn before."""
    monkeypatch.setattr(Draws, "happens", lambda self, decision, probability: probability > 0)
    values = torch.tensor([0.05, 0.9, 0.15, 0.4])

    def draw(*size, **options):
        return values.expand(size) if len(size) == 2 else torch.zeros(size)

    monkeypatch.setattr(torch, "rand", draw)


@pytest.mark.parametrize("names", [*([name] for name in NAMES if name != "dropout"), NAMES])
def test_each_one_does_what_it_does_outside_of_graphs(names, known):
    names = [name for name in names if name != "dropout"]
    results = []
    for in_graph in (False, True):
        model = make_model()
        regularizers = install_regularizers(model, only(*names), in_graph)
        steps = []
        for place, batches in enumerate((0.0, 5000.0, 50000.0)):
            regularizers.set_step(batches, 20.0)
            steps += step(model, regularizers, seed=place)
        results.append((steps, regularizers.state_dict()))
    for one, other in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert results[0][1] == results[1][1]  # Whiten's votes
    bare = step(make_model(), seed=0)
    assert not torch.equal(results[1][0][1], bare[1])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_do_the_same_with_few_graphs(backend):
    torch.compiler.reset()
    plain = make_model()
    compiled = copy.deepcopy(plain)
    before = counters["stats"]["unique_graphs"]
    results, counts = [], []
    for model in (plain, compiled):
        regularizers = install_regularizers(model, only(*(set(NAMES) - {"dropout"})), in_graph=True)
        if model is compiled:
            model.compile_layers(backend=backend)
        for seed in range(5):
            regularizers.set_step(seed * 700.0, 20.0)
            inputs = make_inputs(batch=9 + seed)
            results.append((*step(model, regularizers, seed, inputs), regularizers.state_dict()))
            counts.append(counters["stats"]["unique_graphs"] - before)
    for one, other in zip(results[:5], results[5:]):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=1e-5)
        assert one[2] == other[2]
    assert len({gradients.sum().item() for _, gradients, _ in results[5:]}) == 5
    # The stem, the layers, a downsampling, what combines a stack with its input, and a loss.
    assert counts == [0] * 5 + [5] * 5
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_compiled_layers_do_the_same_on_a_gpu():
    """In float32, in which rounding changes no decision."""
    torch.compiler.reset()
    plain = make_model().cuda()
    compiled = copy.deepcopy(plain)
    results = []
    for model in (plain, compiled):
        regularizers = install_regularizers(model, only(*(set(NAMES) - {"dropout"})), in_graph=True)
        if model is compiled:
            model.compile_layers()
        for seed in range(4):
            regularizers.set_step(seed * 700.0, 20.0)
            inputs = {name: value.cuda() for name, value in make_inputs(batch=9 + seed).items()}
            results.append(step(model, regularizers, seed, inputs)[1])
    for one, other in zip(results[:4], results[4:]):
        assert (one - other).norm() < 1e-3 * one.norm()
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whiten_changes_the_gradient_of_its_branch_alone(backend, known):
    """Where a branch leaves a sum, the sum's other part gets the same gradient, which must stay as it is."""
    torch.compiler.reset()
    plain = make_model(num_layers_per_stack=[1], downsampling_factors=[1], conv_kernel_sizes=[7]).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in make_inputs().items()}
    results = []
    for model in (plain, copy.deepcopy(plain)):
        regularizers = install_regularizers(model, only("whiten"), in_graph=True)
        regularizers.whiten_limits = dict.fromkeys(regularizers.whiten_limits, 0.0)
        if results:
            model.compile_layers(backend=backend)
        results.append(step(model, inputs=inputs)[1])
    assert (results[0] - results[1]).norm() < 1e-6 * results[0].norm()
    torch.compiler.reset()


def test_gradient_checkpointing_repeats_the_draws():
    results = []
    for checkpoints in (False, True):
        model = make_model()
        install_regularizers(model, only(*(set(NAMES) - {"dropout"})), in_graph=True)
        if checkpoints:
            model.gradient_checkpointing_enable()
        results.append(step(model))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_dropout_is_of_whole_channels_at_the_rate_of_the_step():
    model = make_model()
    regularizers = install_regularizers(model, only("dropout"), in_graph=True)
    bare = step(make_model())
    regularizers.rates["dropout"] = 0.0
    assert torch.allclose(step(model)[0], bare[0], atol=1e-6)
    torch.manual_seed(0)
    dropped = time_shared_dropout(torch.ones(64, 5, 100), torch.tensor(0.3))
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)


def test_off_in_eval_and_removed_without_a_trace():
    model = make_model()
    before = set(vars(model.spear.stacks[0].layers[0].bypass))
    bare = make_model().eval()(**make_inputs()).last_hidden_state
    regularizers = install_regularizers(model, ALL, in_graph=True)
    assert torch.equal(model.eval()(**make_inputs()).last_hidden_state, bare)
    regularizers.remove()
    assert torch.equal(step(model.train())[1], step(make_model())[1])
    assert set(vars(model.spear.stacks[0].layers[0].bypass)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_are_what_they_say_to_the_compiler(dtype):
    """Shapes, strides, types and what is changed, for which a compiled graph asks; whether they act or not."""
    model = make_model()
    install_regularizers(model, ALL, in_graph=True)
    step(model)
    draws = [draws for draws in GraphDraws._known.values() if len(draws._whitenings) == 11][-1]
    grad, features = torch.randn(2, 4, 5, 32, dtype=dtype).unbind()
    for number in (0.0, 1.0):
        draws._decided = [number] * len(draws._decided)
        torch.library.opcheck(torch.ops.spear_hf.balancing.default, (features, draws.handle, 9, 2))
        torch.library.opcheck(torch.ops.spear_hf.whiten_gradient.default, (grad, features, draws.handle, 10, True))
