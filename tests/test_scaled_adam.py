# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""ScaledAdam against a slow reference of one tensor after the other, its state, and what it is made for."""

import io
import logging
import math

import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from spear_hf.pretraining import scaled_adam
from spear_hf.pretraining.config import OptimizerConfig
from spear_hf.pretraining.optimization import build_optimizer, clip_gradients, clipping_factor
from spear_hf.pretraining.scaled_adam import ScaledAdam


# Two of a shape, a transposed kernel, a bias of zeros, a tensor at each bound of the rms, scalars of both kinds.
SHAPES = [(6, 4), (6, 4), (5,), (3, 2, 5), (4, 3), (), (1,), (7,), ()]
SETTINGS = {"clipping_update_period": 50, "lr": 0.02}


def initial(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    values[2].zero_()
    values[4] *= 2.99
    values[5] = values[5] * 0 + 9.9
    values[7] *= 2e-5
    values[3] = values[3].transpose(0, 2).contiguous().transpose(0, 2)
    return [value.to(dtype) for value in values]


def gradients_of(step: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Gradients that depend on the step only. Norms vary, so that some are clipped; one tensor has none at times."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = math.exp(1.5 * math.sin(step / 7.0)) * (30.0 if step % 13 == 5 else 1.0)
    result: list[torch.Tensor | None] = []
    for place, shape in enumerate(SHAPES):
        # A direction that stays makes the sizes move, here up, there down.
        drift = (-1.0) ** place * 0.3 * torch.ones(shape, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        result.append((size * 0.01 * (noise + drift)).to(dtype))
    if step % 5 == 2:
        result[1] = None
    return result


class Reference:
    """The formulas of the docstring, one tensor and one number at a time, in float64."""

    def __init__(self, tensors: list[torch.Tensor], lr: float, clipping_update_period: int) -> None:
        self.p = [tensor.double().clone() for tensor in tensors]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.delta = [torch.zeros_like(p) for p in self.p]
        self.rms = [self.root_mean_square(p) for p in self.p]
        self.w = [0.0 for _ in self.p]
        self.dots: list[list[float]] = [[] for _ in self.p]
        self.norms: list[float] = []
        self.threshold = math.inf
        self.t, self.lr, self.period = 0, lr, clipping_update_period
        self.clipped, self.resized, self.factors = 0, 0, []

    @staticmethod
    def root_mean_square(p: torch.Tensor) -> float:
        return math.sqrt(sum(x * x for x in p.flatten().tolist()) / p.numel())

    def clip(self, gradients: list[torch.Tensor]) -> float:
        if self.t == 0:
            return 1.0
        total = 0.0
        for p, g, rms in zip(self.p, gradients, self.rms):
            total += float((g * (0.1 if p.numel() == 1 else rms)).square().sum())
        self.norms.append(math.sqrt(total))
        if self.t in (10, 20, 40):
            self.threshold = 4 * sorted(self.norms)[self.t // 4 * 2]
        elif self.t % self.period == 0:
            self.threshold = 2 * sorted(self.norms[-self.period :])[self.period // 4 * 2]
        return min(1.0, self.threshold / math.sqrt(total))

    def step(self, gradients: list[torch.Tensor]) -> None:
        factor = self.clip(gradients)
        self.clipped += factor < 1
        self.factors.append(factor)
        for i, p in enumerate(self.p):
            g = gradients[i] * factor
            self.delta[i] = 0.9 * self.delta[i]
            self.v[i] = 0.98 * self.v[i] + 0.02 * g * g
            if p.numel() > 1:
                self.dots[i].append(float((p * g).sum()))
                if self.t % 4 == 3:
                    self.resize(i, self.dots[i][-4:])
                relative = max(self.rms[i], 1e-5)
            else:
                relative = 0.1
                p = p.clamp(-10.0, 10.0)
            unbiased = self.v[i] / (1 - 0.98 ** (self.t + 1))
            self.delta[i] = self.delta[i] - self.lr * 0.1 * relative * g / (unbiased.sqrt() + 1e-8)
            self.p[i] = p + self.delta[i]
        self.t += 1

    def resize(self, i: int, dots: list[float]) -> None:
        self.rms[i] = rms = self.root_mean_square(self.p[i])
        beta = 0.98**4
        self.w[i] = beta * self.w[i] + (1 - beta) * sum(dot * dot for dot in dots) / 4
        change = -0.1 * self.lr * math.sqrt(1 - beta ** ((self.t + 1) / 4)) * sum(dots) / (math.sqrt(self.w[i]) + 1e-8)
        if rms >= 1e-5:
            change = min(change, (3.0 - rms) / rms)
            self.delta[i] = self.delta[i] + 0.1 * change * self.p[i]
            self.resized += 1


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for parameter, gradient in zip(parameters, gradients_of(step, parameters[0].dtype)):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def train(optimizer: ScaledAdam, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_equals_the_slow_reference(dtype, tolerance):
    parameters = [nn.Parameter(value) for value in initial(dtype)]
    optimizer = ScaledAdam(parameters, **SETTINGS)
    reference = Reference(initial(dtype), SETTINGS["lr"], SETTINGS["clipping_update_period"])
    for step in range(400):
        set_gradients(parameters, step)
        reference.step([torch.zeros(shape) if g is None else g.double() for g, shape in
                        zip(gradients_of(step, dtype), SHAPES)])  # fmt: skip
        optimizer.step()
        assert optimizer.clipping_factor == pytest.approx(reference.factors[-1], rel=10 * tolerance)
        for place, (ours, theirs) in enumerate(zip(parameters, reference.p)):
            # float32 forgets what is below 1e-7 of the largest value; a sum of 400 steps of it adds up.
            error = float((ours.detach().double() - theirs).abs().max() / theirs.abs().max())
            assert error < tolerance, (step, place)
    # What was to be seen did happen: clipping, learnt sizes, and values at the bounds.
    assert 20 < reference.clipped < 200
    assert reference.resized > 500
    assert max(reference.rms) > 2.9
    assert reference.p[5].abs().item() > 9.0


def test_one_float32_step_is_right_to_1e_6():
    # Without the drift that hundreds of float32 steps have: from the state of the reference at every 10th step.
    parameters = [nn.Parameter(value) for value in initial(torch.float32)]
    optimizer = ScaledAdam(parameters, **SETTINGS)
    double = [nn.Parameter(value.double()) for value in initial(torch.float32)]
    exact = ScaledAdam(double, **SETTINGS)
    for step in range(300):
        if step % 10 == 9:
            optimizer.load_state_dict(single(exact.state_dict()))
            with torch.no_grad():
                for ours, theirs in zip(parameters, double):
                    ours.copy_(theirs)
        for ours, theirs, gradient in zip(parameters, double, gradients_of(step, torch.float32)):
            ours.grad = gradient
            theirs.grad = None if gradient is None else gradient.double()
        optimizer.step()
        exact.step()
        if step % 10 == 9:
            for ours, theirs in zip(parameters, double):
                error = float((ours.double() - theirs).abs().max().detach() / theirs.abs().max().detach())
                assert error < 1e-6, step


def single(state: object) -> object:
    """A state dict with float32 tensors."""
    if isinstance(state, torch.Tensor):
        return state.float()
    if isinstance(state, dict):
        return {name: single(value) for name, value in state.items()}
    return state


@pytest.mark.parametrize("limit", [1, 20, 1 << 20])
def test_chunks_do_not_change_a_bit(monkeypatch, limit):
    expected = [nn.Parameter(value) for value in initial(torch.float32)]
    train(ScaledAdam(expected, **SETTINGS), expected, range(12))
    monkeypatch.setattr(scaled_adam, "CPU_CHUNK", limit)
    parameters = [nn.Parameter(value) for value in initial(torch.float32)]
    train(ScaledAdam(parameters, **SETTINGS), parameters, range(12))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected))


@pytest.mark.parametrize("half", [9, 10, 55])
def test_resumes_bit_for_bit(half):
    whole = [nn.Parameter(value) for value in initial(torch.float32)]
    uninterrupted = ScaledAdam(whole, **SETTINGS)
    train(uninterrupted, whole, range(half + 10))

    parameters = [nn.Parameter(value) for value in initial(torch.float32)]
    first = ScaledAdam(parameters, **SETTINGS)
    train(first, parameters, range(half))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    second = ScaledAdam(resumed, **SETTINGS)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, resumed, range(half, half + 10))

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, whole))
    saved, expected = second.state_dict(), uninterrupted.state_dict()
    for name, value in expected["scaled_adam"].items():
        assert torch.equal(torch.as_tensor(saved["scaled_adam"][name]), torch.as_tensor(value)), name
    for place, tensors in expected["state"].items():
        assert tensors.keys() == {"delta", "exp_avg_sq"}
        assert all(torch.equal(saved["state"][place][name], tensor) for name, tensor in tensors.items())


def test_groups_have_rates_of_their_own():
    values = initial(torch.float64)
    grouped = [nn.Parameter(value) for value in values]
    optimizer = ScaledAdam(
        [{"params": grouped[:4]}, {"params": []}, {"params": grouped[4:], "lr": 0.0}], clipping_scale=None
    )
    alone = [nn.Parameter(value.clone()) for value in values[:4]]
    other = ScaledAdam(alone, clipping_scale=None)
    for step in range(8):
        set_gradients(grouped, step)
        set_gradients(alone, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grouped, alone))
    assert all(torch.equal(ours, value) for ours, value in zip(grouped[4:], values[4:]))


def test_a_matrix_and_its_consumer_move_alike_at_any_scale():
    """y = B A x is the same function for (sA, B/s): relative updates, and so the functions, stay the same."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    a, b = torch.randn(6, 8, dtype=torch.float64) / 3, torch.randn(3, 6, dtype=torch.float64) / 3
    scales = (1.0, 8.0, 1 / 64)

    def outputs(make) -> list[torch.Tensor]:
        results = []
        for scale in scales:
            weights = [nn.Parameter(a * scale), nn.Parameter(b / scale)]
            optimizer = make(weights)
            for _ in range(60):
                optimizer.zero_grad()
                (inputs @ weights[0].T @ weights[1].T - targets).square().mean().backward()
                optimizer.step()
            results.append((inputs @ weights[0].T @ weights[1].T).detach())
        return results

    plain, *others = outputs(lambda weights: ScaledAdam(weights, lr=0.03, eps=1e-30, param_max_rms=1e3))
    assert all(torch.allclose(plain, other, rtol=1e-9, atol=1e-9) for other in others)
    plain, *others = outputs(lambda weights: torch.optim.Adam(weights, lr=0.03, eps=1e-30))
    assert not any(torch.allclose(plain, other, rtol=0.1, atol=0.1) for other in others)


def test_converges_on_a_small_problem():
    torch.manual_seed(0)
    inputs = torch.randn(256, 10)
    targets = torch.tanh(inputs @ torch.randn(10, 4))
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = ScaledAdam(model.named_parameters(), lr=0.045)
    losses = []
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.045 * (1 + (step / 150) ** 2) ** -0.5
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(inputs)
        loss = (output.float() - targets).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[0] > 0.5
    assert losses[-1] < 0.01
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_warning_names_what_is_clipped_and_is_rare(caplog):
    model = nn.Linear(3, 3)
    optimizer = ScaledAdam(model.named_parameters(), lr=1e-6, clipping_update_period=20)
    with caplog.at_level(logging.WARNING, logger=scaled_adam.__name__):
        for step in range(200):
            model.weight.grad = torch.full((3, 3), 2.0 ** (step / 5))  # explodes: always above the earlier median
            model.bias.grad = torch.full((3,), 1e-3)
            optimizer.step()
    assert len(caplog.messages) == 1
    assert "of the last 20 gradients were clipped" in caplog.text
    assert "weight (100%)" in caplog.text


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="size_update_period=0"):
        ScaledAdam([nn.Parameter(torch.ones(2))], size_update_period=0)
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match=r"bfloat16: call model.float\(\)"):
        ScaledAdam([half]).step()
    parameter = nn.Parameter(torch.ones(2))
    optimizer = ScaledAdam([parameter])
    optimizer.step()
    with pytest.raises(ValueError, match="its parameters are fixed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="not the state of ScaledAdam"):
        optimizer.load_state_dict(torch.optim.AdamW([parameter]).state_dict())
    with pytest.raises(ValueError, match="clipping_update_period=100, not 50: restore it"):
        ScaledAdam([parameter], clipping_update_period=50).load_state_dict(optimizer.state_dict())


def test_sharded_tensors_are_refused(tmp_path):
    model = nn.Linear(4, 4)
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=f"but {kind.value} shards them: launch with DDP"):
            build_optimizer(model, OptimizerConfig(name="scaled_adam"), kind)
        assert isinstance(build_optimizer(model, OptimizerConfig(), kind), torch.optim.AdamW)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"sharded \(FSDP\). Train with DDP"):
            ScaledAdam([sharded]).step()
    finally:
        torch.distributed.destroy_process_group()


class Clipper:
    """What `clip_gradients` needs of an Accelerator on one device."""

    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)


@pytest.mark.parametrize("name", ["adamw", "scaled_adam"])
def test_metrics_of_an_update(name):
    model, config = nn.Linear(4, 4), OptimizerConfig(name=name)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight.grad.mul_(10)
    norm = float(clip_gradients(Clipper(), list(model.parameters()), config))
    assert norm == pytest.approx(math.sqrt(16 * 100 + 4))
    optimizer.step()
    assert clipping_factor(optimizer, config, norm) == pytest.approx(5.0 / norm if name == "adamw" else 1.0, rel=1e-5)
    assert model.weight.grad.max().item() == pytest.approx(50.0 / norm if name == "adamw" else 10.0, rel=1e-5)


@pytest.mark.gpu
def test_the_gpu_does_the_same():
    parameters = [nn.Parameter(value.cuda()) for value in initial(torch.float64)]
    train(ScaledAdam(parameters, **SETTINGS), parameters, range(150))
    expected = [nn.Parameter(value) for value in initial(torch.float64)]
    train(ScaledAdam(expected, **SETTINGS), expected, range(150))
    for ours, theirs in zip(parameters, expected):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-9, atol=1e-12)
