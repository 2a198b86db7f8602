# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: F811 (the arguments of tests are fixtures)
"""The pre-training loss from audio and tokens to the number: domains, teachers of any name, frame rates, memory."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from spear_hf import SpearConfig, SpearForPreTraining, modeling_spear
from spear_hf.data.collation import PreTrainingDataset, needs_target
from spear_hf.pretraining.metrics import teacher_metrics

from .test_collation import TARGETS, make_dataset, prepared  # noqa: F401 (the last is a fixture)


def make_model(dataset: PreTrainingDataset) -> SpearForPreTraining:
    torch.manual_seed(0)
    return SpearForPreTraining(dataset.config).eval()


def slow_loss(model: SpearForPreTraining, inputs: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Frame by frame: the mean over its codebooks, alpha = 0.5 on masked and unmasked, weighted by teacher."""
    hidden = model.spear(**{key: value for key, value in inputs.items() if not key.endswith("_labels")})[0]
    total, frames = hidden.new_zeros(()), set()
    for name in names:
        labels, target = inputs[f"{name}_labels"], model.config.pretraining_targets[name]
        for row, frame in (labels != -100).any(dim=-1).nonzero().tolist():
            frames.add((row, frame))
            logits = model.prediction_heads[name](hidden[row, frame]).view(target["num_codebooks"], -1)
            total = total + target["weight"] * 0.5 * F.cross_entropy(logits, labels[row, frame])  # leaves out -100
    return total / len(frames)


@pytest.mark.parametrize("factor", [1, 2])
def test_loss_of_students_at_50_and_25_hz(prepared, factor):
    """Teachers of 50 and of 25 Hz. At 25 Hz a frame has two tokens of the first; at 50 Hz two frames share one of the
    second. The codes of the store count the teacher's frames."""
    dataset = make_dataset(prepared, factor=factor)
    inputs = dataset.micro_batch([0, 3, 9, 12], epoch=2).inputs
    speech, audio = inputs["speech_labels"], inputs["audio_labels"]
    assert (speech.shape[-1], audio.shape[-1]) == (2 * factor, 4)
    whole = (speech != -100).all(dim=-1)
    if factor == 2:
        assert ((speech[..., 2] - speech[..., 0]) % 16)[whole].eq(1).all()  # the token after
    row = audio[2, : int((audio[2, :, 0] != -100).sum()), 0]
    assert (row[1:] - row[:-1]).remainder(8).tolist() == [int(factor == 2 or t % 2) for t in range(len(row) - 1)]
    model = make_model(dataset)
    assert torch.allclose(model(**inputs).loss, slow_loss(model, inputs, ["speech", "audio"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("domains", "rows"),
    [
        ({}, {"speech": {"speech", "audio"}, "audio": {"audio"}}),  # asymmetric
        ({"audio": ["speech", "audio"]}, {"speech": {"speech", "audio"}, "audio": {"speech", "audio"}}),  # joint
        ({"speech": ["speech"]}, {"speech": {"speech"}, "audio": {"audio"}}),  # disjoint
    ],
)
def test_domains_make_the_asymmetric_joint_and_disjoint_loss(prepared, domains, rows):
    dataset = make_dataset(prepared, domains=domains)
    batch = dataset.micro_batch([0, 1, 2, 9, 10], epoch=0)
    for name, wanted in rows.items():
        for row, index in enumerate((0, 1, 2, 9, 10)):
            has = bool((batch.inputs[f"{name}_labels"][row] != -100).any())
            assert has == (prepared.corpus.training[index].domain in wanted), (name, index)
    model = make_model(dataset)
    loss = model(**batch.inputs, num_items_in_batch=batch.num_items).loss
    assert torch.allclose(loss, slow_loss(model, batch.inputs, ["speech", "audio"]), rtol=1e-6)


def test_teachers_of_any_name(prepared):
    stores = {
        "music": prepared.stores["audio"],
        "speech": prepared.stores["speech"],
        "birds": prepared.stores["audio"],
    }
    targets = {"music": {**TARGETS["audio"], "weight": 0.3}, "speech": TARGETS["speech"], "birds": TARGETS["audio"]}
    plain = make_dataset(prepared)
    config = SpearConfig(**{**plain.config.to_dict(), "pretraining_targets": targets})
    dataset = PreTrainingDataset(
        prepared.corpus.training, stores, config, plain.feature_extractor, None, domains={"birds": ["audio"]}
    )
    inputs = dataset.micro_batch([0, 9], epoch=0).inputs
    assert (inputs["music_labels"][0] != -100).any()  # for all domains, as nothing else is said
    assert (inputs["birds_labels"][0] == -100).all()
    model = make_model(dataset)
    output = model(**inputs)
    assert torch.allclose(output.loss, slow_loss(model, inputs, ["birds", "music", "speech"]), rtol=1e-6)
    metrics = teacher_metrics(list(model.prediction_heads), output.statistics)
    assert [key for key in metrics if key.endswith("s_loss") or key == "music_loss"] == ["birds_loss", "music_loss"]
    assert metrics["birds_unmasked_loss"] == pytest.approx(metrics["birds_loss"])
    assert needs_target("music", None)
    assert not needs_target("audio", None)
    output = model(**{key: value for key, value in inputs.items() if key != "birds_labels"})
    assert output.statistics[1].sum() == 0  # speech, birds, music
    with pytest.raises(ValueError, match="no target 'frogs'"):
        model(**inputs, frogs_labels=inputs["birds_labels"])


@pytest.mark.parametrize("frames_at_once", [1, 7, 64])
def test_logits_in_parts_give_the_same_loss_and_gradients(prepared, frames_at_once, monkeypatch):
    dataset = make_dataset(prepared)
    inputs = dataset.micro_batch([0, 3, 9, 12], epoch=1).inputs
    model = make_model(dataset)
    results = []
    for limit in (2**24, 32 * frames_at_once):  # both heads have 32 outputs
        monkeypatch.setattr(modeling_spear, "LOGITS_AT_ONCE", limit)
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        results.append((output, [parameter.grad.clone() for parameter in model.parameters()]))
    (whole, gradients), (parts, others) = results
    assert torch.allclose(parts.loss, whole.loss, rtol=1e-6, atol=0)
    assert torch.allclose(parts.statistics, whole.statistics, rtol=1e-6)
    for gradient, other in zip(gradients, others):
        assert (gradient - other).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).loss, whole.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("frames_at_once", [7, 4096])
def test_the_compiled_loss_is_the_same_in_parts_and_for_any_number_of_frames(prepared, frames_at_once, monkeypatch):
    dataset = make_dataset(prepared)
    model = make_model(dataset)
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(modeling_spear, "LOGITS_AT_ONCE", 32 * frames_at_once)
    for rows in ([0, 3, 9, 12], [1, 2], [4, 5, 6]):
        inputs = dataset.micro_batch(rows, epoch=1).inputs
        outputs, gradients = [], []
        for backend in (None, graphs):
            monkeypatch.setattr(model, "_compiled_by", backend)
            model.zero_grad()
            outputs.append(model(**inputs))
            outputs[-1].loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert torch.allclose(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
        assert torch.allclose(outputs[1].codebook_statistics, outputs[0].codebook_statistics, rtol=1e-6)
        for gradient, other in zip(*gradients):
            assert (gradient - other).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3)
    assert 1 <= graphs.frame_count <= 2 * len(model.prediction_heads)


def test_logits_are_not_kept_for_the_backward_pass(prepared, monkeypatch):
    dataset = make_dataset(prepared)
    inputs = dataset.micro_batch(range(16), epoch=1).inputs
    model = make_model(dataset)
    hidden = torch.randn(16, inputs["speech_labels"].shape[1], 32)

    def kept_floats(limit: int) -> int:
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        monkeypatch.setattr(modeling_spear, "LOGITS_AT_ONCE", limit)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            labels = inputs["speech_labels"]
            places = model._target_places(labels)
            sums, _ = model._codebook_statistics("speech", hidden.requires_grad_(), labels, None, places)
        sums[:, 1, 0].sum().backward()
        return sum(kept.values())

    one = int((inputs["speech_labels"] != -100).any(dim=-1).sum()) * 32  # the hidden states; and the logits as well
    assert kept_floats(2**24) >= 2 * one
    assert kept_floats(2**10) == one
