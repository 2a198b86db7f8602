# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Computing in blocks against the plain path: outputs, gradients, memory, and who gets which."""

import multiprocessing
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from spear_hf import SpearConfig, SpearModel, blockwise_spear, modeling_spear
from spear_hf.modeling_spear import (
    SpearAttentionWeights,
    SpearDepthwiseConv,
    SpearDepthwiseConv2d,
    SpearLayer,
    SpearNonlinAttention,
    SpearSelfAttention,
    relative_position_table,
    swoosh_l,
    swoosh_r,
)


HEADS = 4


def make_config(**values):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": HEADS, "stem_channels": [4, 8, 8]}
    return SpearConfig(
        **{**sizes, "num_layers_per_stack": [1, 1], "downsampling_factors": [1, 2], "conv_kernel_sizes": [7, 5]}
        | values
    )


def randomized(module, seed=0):
    """All parameters large enough for attention that is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that even short sequences have several of, with a last one of a single row."""
    monkeypatch.setattr(blockwise_spear, "MIN_BLOCK_ROWS", 8)
    monkeypatch.setattr(blockwise_spear, "MAX_BLOCK_ROWS", 8)
    monkeypatch.setattr(modeling_spear, "MIN_FRAMES_FOR_BLOCKS", 1)
    monkeypatch.setattr(modeling_spear, "MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS", 1)
    monkeypatch.setattr(modeling_spear, "STEM_FRAMES_AT_ONCE", 16)
    monkeypatch.setattr(modeling_spear, "FRAMES_AT_ONCE", 32)


def attention_inputs(frames, lengths, dtype=torch.float64, hidden_size=32):
    generator = torch.Generator().manual_seed(frames)
    hidden_states = torch.randn(len(lengths), frames, hidden_size, generator=generator, dtype=dtype)
    table = relative_position_table(frames, 48, hidden_states.device, dtype)
    return hidden_states, table, torch.arange(frames) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("kept_bytes", [0, 2 * 41 * 41 * 8 * 2, 2**26])  # no head, two heads, all heads
@pytest.mark.parametrize(("frames", "lengths"), [(1, [1]), (2, [2, 1]), (9, [9, 5]), (41, [41, 17]), (16, [0, 16])])
def test_weighted_values(small_blocks, monkeypatch, frames, lengths, kept_bytes):
    """Both kinds of consumer, one after the other, with and without a mask, in float64 and float32."""
    monkeypatch.setattr(blockwise_spear, "KEPT_BYTES", kept_bytes)
    config = make_config()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        modules = [SpearAttentionWeights, SpearNonlinAttention, SpearSelfAttention, SpearSelfAttention]
        weights, *consumers = [randomized(module(config), i).to(dtype) for i, module in enumerate(modules)]
        hidden_states, table, mask = attention_inputs(frames, lengths, dtype)
        for key_mask in (mask, None):
            with torch.no_grad():
                plain = weights(hidden_states, table, key_mask)
                blockwise = weights.blockwise(hidden_states, table, key_mask)
                for consumer in consumers:
                    expected, actual = consumer(hidden_states, plain), consumer(hidden_states, blockwise)
                    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_wide_values_are_convolved(small_blocks, monkeypatch):
    """In single precision, where there are enough rows of enough keys; those of a kept block and others."""
    monkeypatch.setattr(blockwise_spear, "are_convolutions_faster", lambda: True)
    monkeypatch.setattr(blockwise_spear, "MAX_BLOCK_ROWS", 48)
    monkeypatch.setattr(blockwise_spear, "BLOCK_SCORES", 2**20)
    convolved = []
    convolve = blockwise_spear._convolve

    def record(rows, *others):
        convolved.append(tuple(rows.shape))
        return convolve(rows, *others)

    monkeypatch.setattr(blockwise_spear, "_convolve", record)
    config = make_config(hidden_size=384)  # 288 values
    weights = randomized(SpearAttentionWeights(config))
    hidden_states, table, mask = attention_inputs(300, [300, 280], torch.float32, 384)
    values = torch.randn(2, 300, 1, 288, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (weights(hidden_states, table, mask)[:, :1] @ values.transpose(1, 2)).transpose(1, 2)
        for kept_bytes in (2**26, 0):
            monkeypatch.setattr(blockwise_spear, "KEPT_BYTES", kept_bytes)
            blocks = weights.blockwise(hidden_states, table, mask)
            convolved.clear()  # the projections
            actual = blocks.compute(values)
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
            # The last 12 of 300 rows are too few.
            assert convolved == 6 * [(1, 48, 300)] + 6 * [(1, 48, 280)]
        convolved.clear()
        weights.double().blockwise(hidden_states.double(), table.double(), mask).compute(values.double())
    assert not convolved


def test_a_mask_with_holes(small_blocks):
    weights, consumer = randomized(SpearAttentionWeights(make_config())), SpearSelfAttention(make_config())
    hidden_states, table, mask = attention_inputs(30, [30, 20], torch.float32)
    mask[0, 3:11] = False
    with torch.no_grad():
        expected = consumer(hidden_states, weights(hidden_states, table, mask))
        actual = consumer(hidden_states, weights.blockwise(hidden_states, table, mask))
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frames", "lengths"), [(2, [2, 1]), (41, [41, 17]), (16, [0, 16])])
def test_gradients_of_attention(small_blocks, frames, lengths):
    """Of all parameters and of the input, through three modules that share the weights."""
    config = make_config()
    modules = [SpearAttentionWeights, SpearNonlinAttention, SpearSelfAttention, SpearSelfAttention]
    modules = torch.nn.ModuleList(randomized(module(config), i).double() for i, module in enumerate(modules))
    hidden_states, table, mask = attention_inputs(frames, lengths)

    def gradients(make_weights):
        leaf = hidden_states.clone().requires_grad_()
        weights = make_weights(leaf, table, mask)
        outputs = torch.stack([module(leaf, weights) for module in modules[1:]])
        return torch.autograd.grad(outputs.square().sum(), [leaf, *modules.parameters()])

    for actual, expected in zip(gradients(modules[0].blockwise), gradients(modules[0])):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_gradients_of_attention(small_blocks, frozen):
    """As a penalty on gradients or a product with the Hessian takes them; with a row without any key."""
    config = make_config()
    modules = [SpearAttentionWeights, SpearNonlinAttention, SpearSelfAttention]
    modules = torch.nn.ModuleList(randomized(module(config), i).double() for i, module in enumerate(modules))
    modules[0].requires_grad_(not frozen)
    hidden_states, table, mask = attention_inputs(17, [17, 11, 0])

    def gradients(make_weights):
        leaf = hidden_states.clone().requires_grad_()
        needed = [leaf, *(parameter for parameter in modules.parameters() if parameter.requires_grad)]
        weights = make_weights(leaf, table, mask)
        outputs = torch.stack([module(leaf.detach() if frozen else leaf, weights) for module in modules[1:]])
        first = torch.autograd.grad(outputs.square().sum(), needed, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), needed)]

    for actual, expected in zip(gradients(modules[0].blockwise), gradients(modules[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-6)  # of key biases, zeros


def plain_layers(monkeypatch):
    monkeypatch.setattr(modeling_spear, "are_blocks_possible", lambda hidden_states: False)
    monkeypatch.setattr(modeling_spear, "can_run_in_blocks", lambda module, hidden_states: False)


@pytest.mark.parametrize("frames", [9, 10, 39, 140])
def test_the_whole_model(small_blocks, monkeypatch, frames):
    """The stem in blocks, depthwise convolutions, feed-forward modules and attention, at every hidden state."""
    model = SpearModel(make_config()).eval()
    features = torch.randn(3, frames, 128, generator=torch.Generator().manual_seed(frames))
    for mask in (None, torch.arange(frames) < torch.tensor([frames, max(9, frames // 2), 9])[:, None]):
        with torch.no_grad(), monkeypatch.context() as patch:
            actual = model(features, attention_mask=mask, output_hidden_states=True)
            plain_layers(patch)
            expected = model(features, attention_mask=mask, output_hidden_states=True)
        for one, other in zip(actual.hidden_states, expected.hidden_states):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_golden_parity(small_blocks, golden_folder, golden):
    """With the activations of the published code, one utterance at a time and as a padded batch."""
    model = SpearModel.from_pretrained(golden_folder).eval()
    features = [golden[f"{i}.input_features"] for i in range(5)]
    expected = [[golden[f"{i}.embed"], *(golden[f"{i}.layer.{k:02d}"] for k in range(8))] for i in range(5)]
    frames = torch.tensor([len(feature) for feature in features])
    mask = torch.arange(max(frames)) < frames[:, None]
    batch = model(
        torch.nn.utils.rnn.pad_sequence(features, batch_first=True), attention_mask=mask, output_hidden_states=True
    )
    for row, feature in enumerate(features):
        alone = model(feature[None], output_hidden_states=True)
        for one, other, golden_state in zip(alone.hidden_states, batch.hidden_states, expected[row]):
            length = golden_state.shape[0]
            assert (one[0] - golden_state).abs().max() <= 1e-5
            assert (other[row, :length] - golden_state).abs().max() <= 1e-5


def test_gradients_of_the_whole_model(small_blocks, monkeypatch):
    model = SpearModel(make_config()).double()
    features = torch.randn(2, 99, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(99) < torch.tensor([99, 60])[:, None]

    def gradients():
        torch.manual_seed(0)
        loss = model(features, attention_mask=mask).last_hidden_state.square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with monkeypatch.context() as patch:
            actual = gradients()
            plain_layers(patch)
            expected = gradients()
        for one, other in zip(actual, expected):
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_gradients_of_gradients(small_blocks, monkeypatch):
    """As of a penalty on them, which torch would leave the attention out of without a word."""
    model = randomized(SpearModel(make_config())).double()
    features = torch.randn(2, 89, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (torch.arange(89) < torch.tensor([[89], [60]])).long()
    found = []
    for enough in (1, 1000):
        monkeypatch.setattr(modeling_spear, "MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS", enough)
        leaf = features.clone().requires_grad_()
        loss = model(leaf, attention_mask=mask).last_hidden_state.square().mean()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append((first, torch.autograd.grad(first.square().sum(), leaf)[0]))
    for actual, expected in zip(*found):
        assert (actual - expected).abs().max() < 1e-12 * expected.abs().max()


def test_who_gets_the_tensor_of_all_weights(small_blocks):
    """Recorded attentions, a hook on the module and a replaced forward; the recorder's own hook stays and is none."""
    layer = randomized(SpearLayer(make_config(), 5))
    model = SpearModel(make_config()).eval()
    features = torch.randn(1, 60, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(features, output_attentions=True).attentions[0].shape == (1, HEADS, 26, 26)
        layer = model.stacks[0].layers[0]
        kinds = []
        handle = layer.self_attn1.register_forward_pre_hook(lambda module, args: kinds.append(type(args[1]).__name__))
        model(features, output_hidden_states=True)
        seen = []
        watching = layer.self_attn_weights.register_forward_hook(lambda module, args, output: seen.append(output))
        model(features)
        watching.remove()
        layer.self_attn_weights.forward = layer.self_attn_weights.forward
        model(features)
        del layer.self_attn_weights.forward
        model.config.output_attentions = True
        model(features)
        handle.remove()
    assert kinds == ["BlockwiseAttention", "Tensor", "Tensor", "Tensor"]
    assert seen[0].shape == (1, HEADS, 26, 26)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_hook_is_called(small_blocks, monkeypatch, kind, everywhere):
    """Of a module or of all at once, with gradients, though attention and linear layers have faster ways."""
    monkeypatch.setattr(blockwise_spear, "are_convolutions_faster", lambda: True)
    model = SpearModel(make_config(hidden_size=256, intermediate_size=512))
    features = torch.randn(1, 700, 128, generator=torch.Generator().manual_seed(0))
    modules = {module for module in model.modules() if module is not model and not isinstance(module, nn.ModuleList)}
    called = set()

    def hook(module, *_):
        called.add(module)

    if everywhere:
        handles = [getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(hook)]
    else:
        handles = [getattr(module, f"register_{kind}_hook")(hook) for module in modules]
    try:
        model(features.requires_grad_()).last_hidden_state.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert modules <= called


@pytest.mark.parametrize("training", [False, True])
def test_without_padding_nothing_is_masked(small_blocks, training):
    model = SpearModel(make_config(hidden_dropout=0.0)).train(training)
    features = torch.randn(2, 120, 128, generator=torch.Generator().manual_seed(0))
    masks = []
    layer = model.stacks[1].stack.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: masks.append(args[2]))
    whole = model(features, attention_mask=torch.ones(2, 120, dtype=torch.int32))
    padded = model(features, attention_mask=torch.tensor([[1] * 120, [1] * 100 + [0] * 20]))
    handle.remove()
    assert masks[0] is None
    assert masks[1].tolist() == [[True] * 28, [True] * 23 + [False] * 5]
    assert torch.equal(whole.last_hidden_state, model(features).last_hidden_state)
    assert whole.attention_mask.dtype == torch.int32
    assert whole.attention_mask.all()
    assert torch.allclose(padded.last_hidden_state[0], whole.last_hidden_state[0], atol=1e-5)


def test_the_default_device_does_not_matter(small_blocks):
    model = SpearModel(make_config()).eval()
    features, mask = torch.randn(1, 60, 128), torch.ones(1, 60)
    with torch.no_grad():
        expected = model(features, attention_mask=mask).last_hidden_state
        with torch.device("meta"):
            assert torch.equal(model(features, attention_mask=mask).last_hidden_state, expected)


def test_transformed_functions_take_the_plain_path(small_blocks):
    """`torch.func` refuses autograd functions like ours, and `vmap` what is in place."""
    model = SpearModel(make_config()).eval()
    features = torch.randn(2, 60, 128, generator=torch.Generator().manual_seed(0))

    def loss(features):
        return model(features[None]).last_hidden_state.square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss))(features)
    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf[0]) + loss(leaf[1]), leaf)
    assert torch.allclose(gradients, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_derivatives_forwards(small_blocks, with_gradients):
    """Those of dual numbers, against what `torch.func` makes of the plain path."""
    model = SpearModel(make_config()).double().eval()
    features, change = torch.randn(2, 1, 60, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, expected = torch.func.jvp(lambda each: model(each).last_hidden_state, (features,), (change,))
    with forward_ad.dual_level(), torch.set_grad_enabled(with_gradients):
        output = model(forward_ad.make_dual(features, change)).last_hidden_state
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)


def test_recorded_activations_are_left_alone(small_blocks):
    """Nothing is computed in place in what a hook was given."""
    model = SpearModel(make_config()).eval()
    features = torch.randn(1, 120, 128, generator=torch.Generator().manual_seed(0))
    seen = {}

    def record(name):
        def hook(module, args, output):
            seen.setdefault(name, []).append((output, output.clone()))

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model(features)
    assert len(seen) > 40
    for name, calls in seen.items():
        assert len(calls) == 1, name  # a module that is watched is called once
        assert torch.equal(*calls[0]), name


@pytest.mark.parametrize(("swoosh", "offset", "constant"), [(swoosh_l, 4.0, 0.035), (swoosh_r, 1.0, 0.313261687)])
def test_swoosh(swoosh, offset, constant):
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    expected = torch.log1p((x - offset).exp()) - 0.08 * x - constant
    assert torch.allclose(swoosh(x), expected, atol=1e-8)  # softplus is linear above 20
    (gradient,) = torch.autograd.grad(swoosh(x).sum(), x)
    assert torch.allclose(gradient, torch.sigmoid(x - offset) - 0.08, atol=1e-8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        extreme = torch.tensor([-1e4, -10.0, 0.0, 10.0, 1e4]).to(dtype)
        before = extreme.clone()
        values = swoosh(extreme)
        assert torch.equal(extreme, before)
        assert values.dtype == dtype
        wanted = torch.nn.functional.softplus(before.double() - offset) - 0.08 * before.double() - constant
        assert torch.allclose(
            values.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 8
        )


PEAKS = """
import re, resource, sys, torch
from pathlib import Path
from spear_hf import SpearConfig
from spear_hf.modeling_spear import SpearLayer, relative_position_table
torch.set_num_threads(1)
def peak():
    # In bytes. On Linux not ru_maxrss, which a process takes over from the one that started it.
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
frames, device = 3000, torch.device("cpu")
layer = SpearLayer(SpearConfig(hidden_size=64, intermediate_size=64), 31).eval()
hidden_states = torch.randn(1, frames, 64)
table = relative_position_table(frames, 48, device, torch.float32)
peaks = []
with torch.no_grad():
    layer(hidden_states[:, :400], table[frames - 400 : frames + 400])
    peaks.append(peak())
    for recorded in (False, True):
        layer(hidden_states, table, output_attentions=recorded)
        peaks.append(peak())
print(*peaks)
"""


def test_memory_of_a_minute():
    """At most a third of a layer's weights, 8 x 3000 x 3000 in float32: 288 MB; with the tensor of them it is more."""
    weights = 8 * 3000 * 3000 * 4
    result = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    before, in_blocks, plain = map(int, result.stdout.split())
    assert in_blocks - before < weights / 3
    assert plain - before > weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [lambda: SpearDepthwiseConv(6, 5), lambda: SpearDepthwiseConv2d(6, 7)])
def test_gradients_of_depthwise_convolutions(make, dtype):
    """In the layout that is fast backwards, against torch's own."""
    module = randomized(make()).to(dtype)
    shape = (2, 11, 6) if isinstance(module, torch.nn.Conv1d) else (2, 11, 9, 6)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).movedim(-1, 1)
    inputs.requires_grad_()
    targets = (inputs, module.weight, module.bias)
    results = []
    for forward in (module, module.__class__.__bases__[0].forward.__get__(module)):
        outputs = forward(inputs)
        results.append((outputs, *torch.autograd.grad(outputs.tanh().sum(), targets)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="a fork of a process with threads is refused elsewhere")
def test_forked_processes_do_not_wait_for_threads():
    """Inference and training in a child, of a parent that has used its threads."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    model, before = randomized(SpearModel(make_config())), torch.get_num_threads()
    features = torch.randn(2, 1000, 128, generator=torch.Generator().manual_seed(0))

    def compute(send=None):
        output = model(features).last_hidden_state
        output.sum().backward()
        found = output.detach(), model.stem.conv1.weight.grad
        return found if send is None else send([tensor.numpy() for tensor in found])

    torch.set_num_threads(2)
    try:
        expected = compute()
        model.zero_grad()
        child = context.Process(target=compute, args=(theirs.send,))
        child.start()
        found = ours.recv() if ours.poll(60) else None
        child.kill()
        child.join()
    finally:
        torch.set_num_threads(before)
    assert found is not None
    for one, other in zip(found, expected):
        assert (torch.from_numpy(one) - other).abs().max() < 1e-4 * other.abs().max()


def test_two_threads_train_as_one():
    """The kernels that torch chooses depend on the number of threads, the gradients do not."""
    stem = randomized(SpearModel(make_config()).stem)
    features = torch.randn(2, 300, 128, generator=torch.Generator().manual_seed(0))
    gradients = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            gradients.append(torch.autograd.grad(stem(features).square().mean(), list(stem.parameters())))
    finally:
        torch.set_num_threads(1)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=float(1e-4 * one.abs().max()))


@pytest.mark.parametrize("threads", [1, 2])
def test_linear_layers_as_convolutions(monkeypatch, threads):
    """Where that is faster; this CPU may be one or not, both give the same."""
    linear = torch.nn.Linear(300, 280)
    inputs = torch.randn(2, 30, 300, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(blockwise_spear, "are_convolutions_faster", lambda: True)
    convolutions = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        blockwise_spear.F, "conv2d", lambda *args, **kwargs: convolutions.append(1) or conv2d(*args, **kwargs)
    )
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            actual = blockwise_spear.project(linear.eval(), inputs)
            assert len(convolutions) == 1
            assert actual.is_contiguous()
            torch.testing.assert_close(actual, linear(inputs), rtol=0, atol=1e-5)
            assert torch.equal(blockwise_spear.project(linear, inputs[:1]), linear(inputs[:1]))  # too few frames
            linear.register_forward_hook(lambda module, args, output: output + 1.0)
            assert torch.equal(blockwise_spear.project(linear, inputs), linear(inputs))
        assert len(convolutions) == 1
    finally:
        torch.set_num_threads(1)


class OnlyProducts(torch.Tensor):
    """Like the weights of quantised layers: refuses convolutions, and the views that these need."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.nn.functional.conv2d, torch.Tensor.__getitem__):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_other_types_are_multiplied_only(monkeypatch):
    monkeypatch.setattr(blockwise_spear, "are_convolutions_faster", lambda: True)
    linear, inputs = torch.nn.Linear(300, 280).requires_grad_(False), torch.randn(2, 30, 300)
    expected = linear(inputs)
    linear.weight = torch.nn.Parameter(linear.weight.as_subclass(OnlyProducts), requires_grad=False)
    with torch.no_grad():
        assert torch.equal(blockwise_spear.project(linear, inputs).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("inputs",)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_linear_layers_as_convolutions(monkeypatch, threads, frozen):
    """Of whatever has one, also if what comes back is not contiguous, and gradients of gradients."""
    monkeypatch.setattr(blockwise_spear, "are_convolutions_faster", lambda: True)
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(300, 280), torch.randn(2, 150, 300)
    leaves = {"inputs": inputs, "weight": linear.weight, "bias": linear.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    needed = [leaf for leaf in leaves.values() if leaf.requires_grad]
    torch.set_num_threads(threads)
    try:
        results = []
        for output in (linear(inputs), blockwise_spear.project(linear, inputs)):
            assert torch.equal(output, linear(inputs)) == (not results)  # the second is rounded differently
            gradients = torch.autograd.grad(output.transpose(1, 2).tanh().square().sum(), needed, create_graph=True)
            assert all(gradient.shape == leaf.shape for gradient, leaf in zip(gradients, needed))
            again = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), needed)
            results.append([output, *gradients, *again])
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=float(1e-5 * one.abs().max()))
        short = inputs[:, :100]  # too few frames for gradients
        assert torch.equal(blockwise_spear.project(linear, short), linear(short))
    finally:
        torch.set_num_threads(1)
