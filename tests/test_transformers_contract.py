# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What transformers demands of every model, for the encoder and each head: compact versions of its common tests."""

import copy
import itertools
import os
import warnings

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from transformers import AutoModel, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from spear_hf import (
    SpearConfig,
    SpearForAudioFrameClassification,
    SpearForCTC,
    SpearForPreTraining,
    SpearForSequenceClassification,
    SpearForXVector,
    SpearModel,
)


HEADS = [
    SpearForCTC,
    SpearForSequenceClassification,
    SpearForAudioFrameClassification,
    SpearForXVector,
    SpearForPreTraining,
]
MODELS = [SpearModel, *HEADS]
BATCH, FRAMES, BINS, CODEBOOK = 3, 75, 20, 4
STATES = (FRAMES - 7) // 2
every_model = pytest.mark.parametrize("model_class", MODELS)


def tiny_config(**changes):
    settings = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_layers_per_stack": [1, 2, 1],
        "downsampling_factors": [1, 2, 1],
        "conv_kernel_sizes": [7, 5, 7],
        "query_head_dim": 4,
        "value_head_dim": 4,
        "pos_head_dim": 2,
        "pos_dim": 8,
        "num_mel_bins": BINS,
        "vocab_size": 12,
        "num_labels": 3,
        "classifier_proj_size": 8,
        "tdnn_dim": [12, 14],
        "tdnn_kernel": [3, 1],
        "tdnn_dilation": [2, 1],
        "xvector_output_dim": 8,
        "pretraining_targets": {
            "speech": {"num_codebooks": 2, "codebook_size": CODEBOOK, "weight": 1.0},
            "audio": {"num_codebooks": 1, "codebook_size": CODEBOOK, "weight": 0.1},
        },
    }
    return SpearConfig(**settings | changes)


def tiny_model(model_class, seed=0, **changes):
    torch.manual_seed(seed)
    model = model_class(tiny_config(**changes)).eval()
    for parameter in model.parameters():  # away from the trivial values of initialisation
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def inputs(model_class=SpearModel, labels=False, batch=BATCH, frames=FRAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {"input_features": torch.randn(batch, frames, BINS, generator=generator)}
    lengths = torch.tensor([frames - 11 * row for row in range(batch)]).clamp(min=9)
    values["attention_mask"] = (torch.arange(frames) < lengths[:, None]).long()
    if labels:
        states = (frames - 7) // 2
        if model_class is SpearForCTC:
            values["labels"] = torch.randint(1, 12, (batch, 4), generator=generator)
        elif model_class in (SpearForSequenceClassification, SpearForXVector):
            values["labels"] = torch.randint(0, 3, (batch,), generator=generator)
        elif model_class is SpearForAudioFrameClassification:
            values["labels"] = torch.randint(0, 3, (batch, states), generator=generator)
        elif model_class is SpearForPreTraining:
            values["speech_labels"] = torch.randint(0, CODEBOOK, (batch, states, 2), generator=generator)
            values["audio_labels"] = torch.randint(0, CODEBOOK, (batch, states, 1), generator=generator)
            values["mask_time_indices"] = torch.rand(batch, frames, generator=generator) < 0.5
    return values


def main_output(output):
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def loss_of(model, values):
    output = model(**values)
    return output.loss if "loss" in output else output.last_hidden_state.square().mean()


@every_model
def test_every_tensor_is_initialised_from_the_meta_device(model_class, tmp_path):
    """A checkpoint without weights: all that is loaded comes from `_init_weights`, as on the meta device."""
    torch.manual_seed(0)
    reference = model_class(tiny_config(use_weighted_layer_sum=True))
    reference.save_pretrained(tmp_path, state_dict={"nothing": torch.zeros(1)})
    loaded = model_class.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert value.device.type == "cpu", name
        assert value.isfinite().all(), name
        expected = reference.state_dict()[name]
        assert abs(value.mean() - expected.mean()) < 0.6, name
        assert value.std(unbiased=False).item() == pytest.approx(
            expected.std(unbiased=False).item(), rel=0.9, abs=1e-3
        )


@every_model
@torch.no_grad()
def test_rows_equal_batches(model_class):
    model = tiny_model(model_class, use_weighted_layer_sum=True)
    values = inputs(model_class)
    together = model(**values, output_hidden_states=True)
    for row in range(BATCH):
        frames = values["attention_mask"][row].sum()
        alone = model(input_features=values["input_features"][row : row + 1, :frames], output_hidden_states=True)
        for name in ("logits", "last_hidden_state", "embeddings"):
            if name in alone:
                a, b = alone[name][0], together[name][row]
                assert (a - b[: len(a)]).abs().max() <= 1e-5, name
        for a, b in zip(alone.hidden_states, together.hidden_states):
            assert (a[0] - b[row, : a.shape[1]]).abs().max() <= 1e-5


@every_model
@torch.no_grad()
def test_eval_is_deterministic_and_training_is_seeded(model_class):
    model = tiny_model(model_class, apply_spec_augment=True, mask_feature_prob=0.2)
    values = inputs(model_class)
    assert torch.equal(main_output(model(**values)), main_output(model(**values)))
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(main_output(model(**values)))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@every_model
@torch.no_grad()
def test_tuples_equal_dictionaries(model_class):
    model = tiny_model(model_class)
    values = inputs(model_class, labels=True) | {"output_hidden_states": True, "output_attentions": True}
    output = model(**values)
    assert isinstance(output, ModelOutput)
    as_tuple = model(**values, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for a, b in zip(output.to_tuple(), as_tuple, strict=True):
        a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    model.config.return_dict = False
    assert len(model(**values)) == len(as_tuple)


@every_model
def test_hidden_states_and_attentions(model_class):
    model = tiny_model(model_class)
    output = model(**inputs(model_class), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1 == 5
    assert {tuple(state.shape) for state in output.hidden_states} == {(BATCH, STATES, 16)}
    frames = [STATES, STATES // 2, STATES // 2, STATES]  # attention works at the frame rate of its stack
    assert [tuple(weights.shape) for weights in output.attentions] == [(BATCH, 2, t, t) for t in frames]
    for weights in output.attentions:
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-5
    plain = model(**inputs(model_class))
    assert plain.get("hidden_states") is None
    assert plain.get("attentions") is None
    model.config.output_hidden_states = True
    assert len(model(**inputs(model_class)).hidden_states) == 5


@every_model
def test_gradients_are_retained(model_class):
    model = tiny_model(model_class)
    output = model(**inputs(model_class), output_hidden_states=True, output_attentions=True)
    output.hidden_states[0].retain_grad()
    output.attentions[0].retain_grad()
    main_output(output).sum().backward()
    assert output.hidden_states[0].grad.abs().sum() > 0
    assert output.attentions[0].grad.abs().sum() > 0


@every_model
@pytest.mark.parametrize("weighted", [False, True])
def test_every_parameter_is_trained(model_class, weighted):
    model = tiny_model(model_class, use_weighted_layer_sum=weighted).train()
    loss_of(model, inputs(model_class, labels=True)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("masked_spec_embed"):  # zero where no mask was drawn
            assert parameter.grad.abs().sum() > 0, name


@every_model
@pytest.mark.parametrize(("frames", "value"), [(FRAMES, float("nan")), (1000, float("-inf"))])
def test_what_padding_holds_does_not_reach_gradients(model_class, frames, value):
    model = tiny_model(model_class, hidden_dropout=0.0, final_dropout=0.0).train()
    values = inputs(model_class, labels=True, frames=frames)
    padding = values["attention_mask"][:, :, None] == 0
    gradients = []
    for content in (-23.0, value):
        model.zero_grad()
        features = values["input_features"].masked_fill(padding, content).requires_grad_()
        loss_of(model, values | {"input_features": features}).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"input_features": features.grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model_class, reentrant):
    values = inputs(model_class, labels=True)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(model_class, hidden_dropout=0.2, position_dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(5)
        loss_of(model, values).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6, rtol=1e-5), name


@every_model
@pytest.mark.parametrize("asked_for", [False, True])
def test_adapters_of_a_frozen_encoder_are_trained(model_class, asked_for):
    """With reentrant gradient checkpointing, which needs an input that has a gradient."""
    model = tiny_model(model_class).train().requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if asked_for:
        model.enable_input_require_grads()
    first, last = (
        model.base_model.stacks[0].layers[0].feed_forward1,
        model.base_model.stacks[2].layers[0].feed_forward1,
    )
    for module in (first, last):
        module.out_proj.weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of what transformers is to lose
        loss_of(model, inputs(model_class, labels=True)).backward()
    assert all(module.out_proj.weight.grad.abs().sum() > 0 for module in (first, last))


def test_mismatched_sizes_are_refused_or_reported(tmp_path):
    tiny_model(SpearForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SpearForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    model, info = SpearForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model(**inputs()).logits.shape == (BATCH, 7)


@every_model
def test_save_and_load(model_class, tmp_path):
    model = tiny_model(model_class, use_weighted_layer_sum=True)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(main_output(model(**inputs(model_class))), main_output(loaded.eval()(**inputs(model_class))))


def test_sharded_safetensors(tmp_path):
    model = tiny_model(SpearForCTC)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not list(tmp_path.glob("*.bin"))
    loaded = SpearForCTC.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert sum(len(load_file(shard)) for shard in shards) == len(model.state_dict())


def test_weights_are_for_all_who_may_read_the_configuration(tmp_path):
    before = os.umask(0o027)
    try:
        tiny_model(SpearForCTC).save_pretrained(tmp_path / "one", variant="fp16")
        tiny_model(SpearForCTC).save_pretrained(tmp_path / "several", max_shard_size="20KB")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("*/*")}
    assert len(modes) > 4
    assert set(modes.values()) == {"0o640"}


@pytest.mark.parametrize("model_class", HEADS)
def test_base_and_heads_load_each_other(model_class, tmp_path):
    head = tiny_model(model_class)
    head.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert isinstance(base, SpearModel)
    assert not info["missing_keys"]
    assert all(torch.equal(a, b) for a, b in zip(head.spear.state_dict().values(), base.state_dict().values()))
    base.save_pretrained(tmp_path / "base")
    again, info = model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(name.startswith("spear.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(head.spear.state_dict().values(), again.spear.state_dict().values()))


@pytest.mark.parametrize("model_class", HEADS)
def test_freeze_base_model(model_class):
    model = tiny_model(model_class).train()
    model.freeze_base_model()
    loss_of(model, inputs(model_class, labels=True)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("spear."), name


def test_freeze_feature_encoder():
    model = tiny_model(SpearForCTC).train()
    model.freeze_feature_encoder()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"spear.stem.{name}" for name, _ in model.spear.stem.named_parameters()}


@every_model
@torch.no_grad()
def test_compiles_without_graph_breaks(model_class):
    torch.compiler.reset()
    model = tiny_model(model_class)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # The CTC loss of transformers selects labels by value, which no graph can hold; its logits compile.
    for labels in (False,) if model_class is SpearForCTC else (False, True):
        values = inputs(model_class, labels=labels)
        expected = model(**values)
        output = compiled(**values)
        for name in ("loss", "logits", "last_hidden_state", "statistics"):
            if name in expected:
                assert torch.allclose(output[name], expected[name], atol=1e-5), name


@torch.no_grad()
def test_one_graph_serves_every_length():
    torch.compiler.reset()
    sizes = {"num_layers_per_stack": [1], "downsampling_factors": [2], "conv_kernel_sizes": [5]}
    model = SpearModel(tiny_config(**sizes)).eval()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for index in range(10):
        values = inputs(batch=2, frames=40 + 37 * index)
        expected = model(**values).last_hidden_state
        assert torch.allclose(compiled(**values).last_hidden_state, expected, atol=1e-5)
    assert graphs.frame_count == 1


def test_compiled_layers_share_graphs_at_every_length():
    """Stem, two kernel sizes, a downsampling, its combination and two losses, in training and in evaluation."""
    torch.compiler.reset()
    model = tiny_model(SpearForPreTraining, hidden_dropout=0.0, position_dropout=0.0)
    graphs = CompileCounter()
    compiled = copy.deepcopy(model)
    # What records states stays on the modules, and torch 2.14 makes graphs anew where it comes later.
    compiled(**inputs(SpearForPreTraining, labels=True), output_hidden_states=True)
    compiled.compile_layers(backend=graphs)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for index in range(5):
        values = inputs(SpearForPreTraining, labels=True, batch=2 + index % 2, frames=50 + 37 * index)
        losses = []
        for each in (model, compiled):
            each.zero_grad()
            losses.append(each.train()(**values).loss)
            losses[-1].backward()
        assert torch.allclose(*losses, rtol=1e-5)
        for one, other in zip(model.parameters(), compiled.parameters()):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            states = [each.eval()(**values, output_hidden_states=True).hidden_states for each in (model, compiled)]
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*states))
    assert graphs.frame_count == 14
    torch.compiler.reset()


def test_layers_of_a_kernel_size_share_their_graph_under_autocast():
    torch.compiler.reset()
    sizes = {"num_layers_per_stack": [2, 1], "downsampling_factors": [1, 1], "conv_kernel_sizes": [5, 5]}
    model, graphs = SpearModel(tiny_config(**sizes)).train(), CompileCounter()
    model.compile_layers(backend=graphs)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs()).last_hidden_state.sum().backward()
    assert graphs.frame_count == 2  # with the stem's
    torch.compiler.reset()


def test_compiled_layers_gather_no_scores():
    """Scores by key are a view of those by offset: gathered, they would cost a pass and their gradient atomics."""
    torch.compiler.reset()
    sizes = {"num_layers_per_stack": [1], "downsampling_factors": [1], "conv_kernel_sizes": [5]}
    model, operations = SpearModel(tiny_config(**sizes)), set()

    def look(graph, inputs):
        operations.update(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model.compile_layers(backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    model.train()(inputs()["input_features"]).last_hidden_state.sum().backward()
    scores = {torch.ops.aten.as_strided.default, torch.ops.aten.slice.Tensor} & operations
    assert scores
    assert not {torch.ops.aten.gather.default, torch.ops.aten.scatter_add.default} & operations
    torch.compiler.reset()


def test_compiled_layers_have_graphs_for_every_way_they_are_called():
    """More than torch's limit of 8, which leaves what comes after that uncompiled."""
    torch.compiler.reset()
    sizes = {"num_layers_per_stack": [1, 1], "downsampling_factors": [1, 1], "conv_kernel_sizes": [5, 3]}
    model = SpearModel(tiny_config(hidden_dropout=0.0, position_dropout=0.0, **sizes))
    compiled = copy.deepcopy(model)
    counter = CompileCounter()
    compiled.compile_layers(backend=counter)
    ways = [*itertools.product((True, False), (True, False), (True,)), (True, True, False)]
    for again in (False, True):
        for masked, trains, autocasts in ways:
            values = inputs()
            if not masked:
                del values["attention_mask"]
            graphs = counter.frame_count
            with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                expected = model.train(trains)(**values).last_hidden_state
                output = compiled.train(trains)(**values).last_hidden_state
            tolerance = 0.05 if autocasts else 1e-5
            assert (output - expected).norm() < tolerance * expected.norm()
            assert (counter.frame_count == graphs) == again
    assert counter.frame_count >= 3 * len(ways)  # the stem's and two of layers
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_layers_compiled_by_inductor_train_at_every_length():
    torch.compiler.reset()
    model = tiny_model(SpearForPreTraining, hidden_dropout=0.0, position_dropout=0.0).train()
    compiled = copy.deepcopy(model)
    compiled.compile_layers()
    for frames, autocasts in itertools.product((75, 131, 98), (False, True)):
        values = inputs(SpearForPreTraining, labels=True, frames=frames)
        gradients = []
        for each in (model, compiled):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                each(**values).loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in each.parameters()]))
        difference = (gradients[0] - gradients[1]).norm()
        assert difference < (0.05 if autocasts else 1e-4) * gradients[0].norm()
    torch.compiler.reset()


@every_model
@torch.no_grad()
def test_exports_with_dynamic_batch_and_time(model_class):
    model = tiny_model(model_class)
    dynamic = torch.export.Dim.DYNAMIC
    dims = {"input_features": {0: dynamic, 1: dynamic}, "attention_mask": {0: dynamic, 1: dynamic}}
    program = torch.export.export(model, (), kwargs=inputs(), dynamic_shapes=dims, strict=False)
    for size, length in ((2, 40), (5, 131), (3, 76)):
        values = inputs(batch=size, frames=length)
        assert torch.allclose(main_output(program.module()(**values)), main_output(model(**values)), atol=1e-5), (
            size,
            length,
        )


@pytest.mark.parametrize("model_class", [SpearModel, SpearForCTC])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_serves_every_size(model_class):
    """Also of lengths that are computed in blocks where nothing is traced."""
    model = tiny_model(model_class, return_dict=False)
    values = inputs(frames=400)
    traced = torch.jit.trace(model, (values["input_features"], values["attention_mask"]))
    for batch, frames in ((BATCH, FRAMES), (1, 9), (2, 600)):
        values = inputs(batch=batch, frames=frames)
        expected, actual = (module(*values.values())[0] for module in (model, traced))
        assert torch.allclose(actual, expected, atol=1e-5)


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(model_class, dtype):
    model = tiny_model(model_class).to(dtype).train()
    values = inputs(model_class, labels=True)
    loss = loss_of(model, values)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad.isfinite().all(), name


def test_device_map(tmp_path):
    model = tiny_model(SpearForCTC)
    model.save_pretrained(tmp_path)
    loaded = SpearForCTC.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)
    # Half of the weights stay on disk and are fetched for each forward.
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"spear": "disk"}
    offloaded = SpearForCTC.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.allclose(offloaded.eval()(**inputs()).logits, model(**inputs()).logits, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_offloaded_weights(dtype):
    """A module's weights are on the meta device but while it runs itself."""
    model = tiny_model(SpearModel).to(dtype)
    expected = model(**inputs()).last_hidden_state
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert offloaded.stem.conv1.weight.device.type == "meta"
    assert torch.allclose(offloaded(**inputs()).last_hidden_state, expected, atol=1e-5)


@every_model
@torch.no_grad()
def test_empty_batches(model_class):
    values = {name: value[:0] for name, value in inputs().items()}
    assert len(main_output(tiny_model(model_class)(**values))) == 0


def test_trainer_joins_batches_of_different_lengths(tmp_path):
    """Whatever else the model gives."""
    rows = [
        {"input_features": torch.randn(frames, BINS), "labels": torch.tensor(1)} for frames in (60, FRAMES, FRAMES, 60)
    ]
    model = tiny_model(SpearForSequenceClassification, output_hidden_states=True, output_attentions=True)
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=1, report_to="none", use_cpu=True)
    assert Trainer(model, arguments).predict(rows).predictions.shape == (4, 3)


@every_model
def test_config_is_not_changed_by_a_forward(model_class):
    model = tiny_model(model_class)
    before = copy.deepcopy(model.config.to_dict())
    model(**inputs(model_class, labels=True))
    assert model.config.to_dict() == before


@pytest.mark.gpu
@every_model
@torch.no_grad()
def test_cuda_equals_cpu(model_class):
    model = tiny_model(model_class)
    values = inputs(model_class, labels=True)
    expected = main_output(model(**values))
    output = model.cuda()(**{name: value.cuda() for name, value in values.items()})
    assert torch.allclose(main_output(output).cpu(), expected, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_compiled_layers_train_on_a_gpu():
    """Under autocast to bfloat16, at three lengths, against the same without compilation."""
    torch.compiler.reset()
    model = tiny_model(SpearForPreTraining, hidden_dropout=0.0, position_dropout=0.0).train().cuda()
    compiled = copy.deepcopy(model)
    compiled.compile_layers()
    for frames in (75, 131, 98):
        values = inputs(SpearForPreTraining, labels=True, frames=frames)
        values = {name: value.cuda() for name, value in values.items()}
        for each in (model, compiled):
            each.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                each(**values).loss.backward()
        one, other = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, compiled))
        assert (one - other).norm() < 0.05 * one.norm()
    torch.compiler.reset()


@pytest.mark.gpu
@every_model
def test_cuda_in_half_precision(model_class):
    """Outputs and gradients in bfloat16, whose convolutions take another way, against those in float32 on the CPU."""
    model = tiny_model(model_class)
    values = inputs(model_class, labels=True)
    with torch.no_grad():
        expected = main_output(model(**values))
    loss_of(model, values).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "conv" in name}
    model.zero_grad()
    model.cuda()
    on_device = {name: value.cuda() for name, value in values.items()}
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(model, on_device)
    loss.backward()
    for name, gradient in gradients.items():
        error = (model.get_parameter(name).grad.cpu() - gradient).norm()
        assert error <= 0.1 * gradient.norm() + 1e-3 * max(g.norm() for g in gradients.values()), name
    on_device["input_features"] = on_device["input_features"].bfloat16()
    with torch.no_grad():
        found = main_output(model.bfloat16()(**on_device)).float().cpu()
    finite = expected.abs() < 1e4  # logits of padding are at the end of the range
    assert (found - expected)[finite].norm() <= 0.05 * expected[finite].norm()
