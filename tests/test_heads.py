# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What each head computes: losses against slow references, pooling, label checks, published checkpoints."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForPreTraining,
)

from spear_hf import (
    SpearForAudioFrameClassification,
    SpearForCTC,
    SpearForPreTraining,
    SpearForSequenceClassification,
    SpearForXVector,
)

from .conftest import FIXTURES
from .test_transformers_contract import STATES, inputs, tiny_config, tiny_model


AUTO_CLASSES = {
    AutoModelForCTC: (SpearForCTC, {"lm_head"}),
    AutoModelForAudioClassification: (SpearForSequenceClassification, {"projector", "classifier"}),
    AutoModelForAudioFrameClassification: (SpearForAudioFrameClassification, {"classifier"}),
    AutoModelForAudioXVector: (
        SpearForXVector,
        {"projector", "tdnn", "feature_extractor", "classifier", "objective"},
    ),
    AutoModelForPreTraining: (SpearForPreTraining, {"prediction_heads"}),
}


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_new_heads_on_a_published_checkpoint(auto_class, golden_folder, caplog):
    model_class, head = AUTO_CLASSES[auto_class]
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model, info = auto_class.from_pretrained(golden_folder, output_loading_info=True)
    assert type(model) is model_class
    assert {name.split(".")[0] for name in info["missing_keys"]} == head
    assert not info["unexpected_keys"]
    published = load_file(golden_folder / "model.safetensors")
    assert torch.equal(model.spear.stem.conv1.weight, published["model.model.encoder_embed.conv.0.weight"])


def test_weighted_layer_sum():
    model = tiny_model(SpearForCTC, use_weighted_layer_sum=True)
    model.layer_weights.data = torch.randn(5)
    values = inputs()
    states = model.spear(**values, output_hidden_states=True).hidden_states
    expected = (torch.stack(states, dim=-1) * model.layer_weights.softmax(0)).sum(-1)
    valid = model.spear(**values).attention_mask.bool()  # elsewhere the logits say blank
    assert torch.allclose(model(**values).logits[valid], model.lm_head(expected)[valid], atol=1e-5)
    assert model(**values).hidden_states is None
    assert tiny_model(SpearForCTC).layer_weights is None


def test_weighted_layer_sum_at_25_hz():
    model = tiny_model(SpearForCTC, use_weighted_layer_sum=True, output_downsampling_factor=2)
    assert model(**inputs()).logits.shape[1] == (STATES + 1) // 2
    alone = model(inputs()["input_features"][2:, : inputs()["attention_mask"][2].sum()]).logits[0]
    assert torch.allclose(model(**inputs()).logits[2, : len(alone)], alone, atol=1e-5)


def test_ctc_loss_is_torch_s():
    model = tiny_model(SpearForCTC)
    values = inputs(SpearForCTC, labels=True)
    values["labels"][1, 2:] = -100
    output = model(**values)
    lengths = model._get_feat_extract_output_lengths(values["attention_mask"].sum(-1))
    target_lengths = torch.tensor([4, 2, 4])
    targets = torch.cat([row[:n] for row, n in zip(values["labels"], target_lengths)])
    log_probs = output.logits.log_softmax(-1).transpose(0, 1)
    expected = F.ctc_loss(log_probs, targets, lengths, target_lengths, blank=0, reduction="mean")
    assert torch.allclose(output.loss, expected)


@pytest.mark.parametrize("bad", [12, -5])
def test_ctc_labels_out_of_range(bad):
    values = inputs(SpearForCTC, labels=True)
    values["labels"][0, 0] = bad
    with pytest.raises(ValueError, match=rf"{bad}.*12 classes"):
        tiny_model(SpearForCTC)(**values)


@torch.no_grad()
def test_ctc_needs_a_blank():
    with pytest.raises(ValueError, match="pad_token_id"):
        tiny_model(SpearForCTC, pad_token_id=None)(**inputs(SpearForCTC, labels=True))


def test_ctc_for_a_tokenizer_that_has_grown(tmp_path):
    model = tiny_model(SpearForCTC)
    values = inputs()
    before = model(**values).logits
    assert model.resize_token_embeddings() is model.lm_head
    model.lm_head.requires_grad_(False)
    assert model.resize_token_embeddings(13, pad_to_multiple_of=8) is model.lm_head
    assert not model.lm_head.weight.requires_grad
    model.save_pretrained(tmp_path)
    logits = SpearForCTC.from_pretrained(tmp_path).eval()(**values).logits
    assert logits.shape[-1] == model.config.vocab_size == 16
    valid = before[..., 1] != torch.finfo(before.dtype).min
    assert torch.allclose(logits[..., :12][valid], before[valid], atol=1e-6)
    model.config.pad_token_id = 12
    with pytest.raises(ValueError, match=r"12 classes.*pad_token_id=12"):
        model.resize_token_embeddings(12)


def test_a_blank_is_one_of_the_classes():
    """Otherwise padding, which is to say blank, says the first class: text from nowhere."""
    with pytest.raises(ValueError, match=r"`pad_token_id=12`, the blank, is not among the `vocab_size=12`"):
        tiny_model(SpearForCTC, pad_token_id=12)


def test_a_configuration_that_was_changed_is_checked_again(tmp_path):
    """Layers set without their number had weights of too few hidden states, and were saved to be never loaded."""
    tiny_config(use_weighted_layer_sum=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`num_hidden_layers=4` must be the sum .*set both in one that is there"):
        SpearForCTC(AutoConfig.from_pretrained(tmp_path, num_layers_per_stack=[2, 2, 1]))
    config = AutoConfig.from_pretrained(tmp_path, num_layers_per_stack=[2, 2, 1], num_hidden_layers=5)
    assert SpearForCTC(config).layer_weights.shape == (6,)


def test_sequence_classification_pools_valid_frames_only():
    model = tiny_model(SpearForSequenceClassification)
    values = inputs()
    states = model.spear(**values)
    expected = torch.stack(
        [
            model.projector(state[: mask.sum()]).mean(dim=0)
            for state, mask in zip(states.last_hidden_state, states.attention_mask)
        ]
    )
    assert torch.allclose(model(**values).logits, model.classifier(expected), atol=1e-5)


def test_sequence_classification_problem_types():
    values = inputs()
    single = torch.tensor([0, 2, 1])
    multi = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])
    model = tiny_model(SpearForSequenceClassification)
    logits = model(**values).logits
    assert torch.allclose(model(**values, labels=single).loss, F.cross_entropy(logits, single))
    assert torch.allclose(model(**values, labels=multi).loss, F.binary_cross_entropy_with_logits(logits, multi))
    model = tiny_model(SpearForSequenceClassification, problem_type="multi_label_classification")
    assert torch.allclose(model(**values, labels=multi.long()).loss, F.binary_cross_entropy_with_logits(logits, multi))
    model = tiny_model(SpearForSequenceClassification, num_labels=1)
    target = torch.randn(3)
    assert torch.allclose(model(**values, labels=target).loss, F.mse_loss(model(**values).logits[:, 0], target))
    with pytest.raises(ValueError, match="do not fit"):
        tiny_model(SpearForSequenceClassification)(**values, labels=torch.zeros(3, 4))


def test_problem_types_are_known():
    """A misspelt one was taken for a regression."""
    values = inputs(SpearForAudioFrameClassification, labels=True)
    vectors = F.one_hot(values["labels"], 3).float()
    message = r"(?s)problem_type.*'multi_label'.*'multi_label_classification'"
    for model_class, labels in (
        (SpearForSequenceClassification, torch.eye(3)),
        (SpearForAudioFrameClassification, vectors),
    ):
        with pytest.raises(Exception, match=message):
            tiny_model(model_class, problem_type="multi_label")
        model = tiny_model(model_class)
        vars(model.config)["problem_type"] = "multi_label"  # not refused where it is set, by newer versions
        with pytest.raises(ValueError, match=message):
            model(**values | {"labels": labels})
    with pytest.raises(ValueError, match=r"one for each frame.*vectors of 3"):
        tiny_model(SpearForAudioFrameClassification, problem_type="multi_label_classification")(**values)


def test_class_ids_of_utterances():
    """Also in a column, as Wav2Vec2 takes them; vectors for them are refused; nothing to learn is a loss of 0."""
    values = inputs()
    for model_class in (SpearForSequenceClassification, SpearForXVector):
        model = tiny_model(model_class)
        ids = torch.tensor([0, 2, -100])
        assert torch.equal(model(**values, labels=ids[:, None]).loss, model(**values, labels=ids).loss)
        assert model(**values, labels=torch.full((3,), -100)).loss == 0
    model = tiny_model(SpearForSequenceClassification, problem_type="single_label_classification")
    with pytest.raises(ValueError, match=r"\(3, 3\) do not fit.*'single_label_classification'"):
        model(**values, labels=torch.eye(3))


def test_frame_classification_ignores_padding():
    model = tiny_model(SpearForAudioFrameClassification)
    values = inputs(SpearForAudioFrameClassification, labels=True)
    output = model(**values)
    lengths = model._get_feat_extract_output_lengths(values["attention_mask"].sum(-1))
    logits = torch.cat([row[:n] for row, n in zip(output.logits, lengths)])
    labels = torch.cat([row[:n] for row, n in zip(values["labels"], lengths)])
    assert torch.allclose(output.loss, F.cross_entropy(logits, labels))
    one_hot = F.one_hot(values["labels"], 3)
    assert torch.allclose(model(**values | {"labels": one_hot}).loss, output.loss)
    model = tiny_model(SpearForAudioFrameClassification, problem_type="multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float())
    assert torch.allclose(model(**values | {"labels": one_hot}).loss, expected)
    with pytest.raises(ValueError, match="do not fit"):
        model(**values | {"labels": values["labels"][:, :-1]})


def test_unknown_labels_of_vectors_are_ignored():
    """-100, as for class ids: binary cross-entropy would take it for a target, and argmax for the first class."""
    values = inputs(SpearForAudioFrameClassification)
    multi = {"problem_type": "multi_label_classification"}
    for model_class, shape in ((SpearForSequenceClassification, (3, 3)), (SpearForAudioFrameClassification, None)):
        model = tiny_model(model_class, **multi)
        logits = model(**values).logits
        labels = torch.randint(2, shape or logits.shape).float()
        labels[0] = labels[..., 1] = -100.0
        known = labels != -100
        if shape is None:
            lengths = model._get_feat_extract_output_lengths(values["attention_mask"].sum(-1))
            known &= (torch.arange(logits.shape[1]) < lengths[:, None])[..., None]
        expected = F.binary_cross_entropy_with_logits(logits[known], labels[known])
        assert torch.allclose(model(**values, labels=labels).loss, expected)
        assert model(**values, labels=torch.full_like(labels, -100.0)).loss == 0
        labels[1, ..., 0] = 2.0
        with pytest.raises(ValueError, match=r"\[-100.0, 2.0\].*must be in \[0, 1\], or -100"):
            model(**values, labels=labels)
    model = tiny_model(SpearForAudioFrameClassification)
    ids = torch.randint(3, model(**values).logits.shape[:2])
    one_hot = F.one_hot(ids, 3)
    ids[:, ::2] = one_hot[:, ::2] = -100
    assert torch.equal(model(**values, labels=one_hot).loss, model(**values, labels=ids).loss)
    one_hot[0, 1] = 1
    with pytest.raises(ValueError, match=r"several classes.*problem_type is None"):
        model(**values, labels=one_hot)
    one_hot[0, 1] = 0
    with pytest.raises(ValueError, match=r"no class.*problem_type is None.*-100"):
        model(**values, labels=one_hot)


def test_xvector_loss_is_am_softmax():
    model = tiny_model(SpearForXVector)
    values = inputs(SpearForXVector, labels=True)
    output = model(**values)
    assert output.embeddings.shape == (3, 8)
    cosines = F.normalize(output.logits, dim=-1) @ F.normalize(model.objective.weight, dim=0)
    cosines[range(3), values["labels"]] -= 0.4
    assert torch.allclose(output.loss, F.cross_entropy(30 * cosines, values["labels"]), atol=1e-5)


def test_xvector_ignores_rows_without_a_speaker():
    model = tiny_model(SpearForXVector)
    values = inputs(SpearForXVector, labels=True)
    expected = model(**{name: value[:2] for name, value in values.items()}).loss
    values["labels"][2] = -100
    assert torch.allclose(model(**values).loss, expected, atol=1e-5)


@torch.no_grad()
def test_xvector_of_one_frame_is_finite_in_any_batch():
    model = tiny_model(SpearForXVector)
    features = torch.randn(1, 9, 20)
    alone = model(features)
    assert alone.embeddings.isfinite().all()
    padded = torch.cat([features, torch.randn(1, 60, 20)], dim=1)
    mask = (torch.arange(69) < 9).long()[None]
    assert torch.allclose(model(padded, attention_mask=mask).embeddings, alone.embeddings, atol=1e-5)


def reference_pretraining_loss(model, values, alpha):
    """Frame by frame and codebook by codebook."""
    config = model.config
    hidden = model.spear(
        values["input_features"], values["attention_mask"], mask_time_indices=values["mask_time_indices"]
    ).last_hidden_state
    total, frames = 0.0, set()
    for name in ("speech", "audio"):
        target, head = config.pretraining_targets[name], model.prediction_heads[name]
        for b, t in torch.cartesian_prod(torch.arange(3), torch.arange(STATES)).tolist():
            labels = values[f"{name}_labels"][b, t]
            known = [c for c in range(len(labels)) if labels[c] != -100]
            if not known:
                continue
            frames.add((b, t))
            logits = head(hidden[b, t]).view(target["num_codebooks"], -1)
            loss = sum(F.cross_entropy(logits[c], labels[c]) for c in known) / len(known)
            masked = values["mask_time_indices"][b, 2 * t : 2 * t + 2].sum() >= 1
            total = total + target["weight"] * (alpha if masked else 1 - alpha) * loss
    return total / len(frames)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_pretraining_loss_is_asymmetric(alpha):
    model = tiny_model(SpearForPreTraining, masked_loss_weight=alpha)
    values = inputs(SpearForPreTraining, labels=True)
    values["audio_labels"][:2] = -100  # speech rows have no audio targets
    values["speech_labels"][1, 20:] = -100
    values["speech_labels"][2, 3, 0] = -100
    output = model(**values)
    assert torch.allclose(output.loss, reference_pretraining_loss(model, values, alpha), rtol=1e-5)
    counts = output.statistics[:, :, 2].sum(dim=1)
    assert counts.tolist() == [2 * STATES + 20, STATES]
    assert torch.allclose(output.speech_loss, output.statistics[0, :, 0].sum() / counts[0])
    doubled = model(**values, num_items_in_batch=2 * (2 * STATES + 20))
    assert torch.allclose(doubled.loss * 2, output.loss)


@torch.no_grad()
def test_pretraining_statistics_of_utterances_and_codebooks_are_exact():
    model = tiny_model(SpearForPreTraining)
    values = inputs(SpearForPreTraining, labels=True)
    values["audio_labels"][:2] = -100
    values["speech_labels"][2, 3, 0] = -100
    output = model(**values)
    assert torch.equal(output.utterance_statistics.sum(dim=1), output.statistics)
    assert output.utterance_statistics[1, :2].count_nonzero() == 0  # no audio targets
    expected = []
    for name in ("speech", "audio"):
        labels, books = values[f"{name}_labels"], model.config.pretraining_targets[name]["num_codebooks"]
        predicted = model.prediction_heads[name](output.last_hidden_state).unflatten(-1, (books, -1)).argmax(dim=-1)
        masked = model._masked_output_frames(values["mask_time_indices"], STATES)
        for row in range(3):
            alone = {key: value[row : row + 1] for key, value in values.items()}
            counts = model(**alone).statistics[:, :, 2]
            assert torch.equal(output.utterance_statistics[:, row, :, 2], counts)
        known = (labels != -100) & masked[..., None]
        hits = (predicted == labels) & known
        expected += [[int(hits[..., book].sum()), int(known[..., book].sum())] for book in range(books)]
    assert output.codebook_statistics.tolist() == expected


@torch.no_grad()
def test_pretraining_counts_are_exact_under_autocast():
    model = tiny_model(SpearForPreTraining)
    values = inputs(SpearForPreTraining, labels=True)
    many = {key: value.repeat_interleave(41, dim=0) for key, value in values.items()}  # counts that bfloat16 rounds
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**many)
    assert torch.equal(output.statistics[..., 2], model(**many).statistics[..., 2])
    assert output.statistics[0, :, 2].sum() == 123 * STATES


def test_pretraining_loss_matches_the_golden_head():
    """Per-element losses of the reference's independent-codebook head."""
    head = load_file(FIXTURES / "golden_mvq" / "head.safetensors")
    config = tiny_config(
        hidden_size=32, pretraining_targets={"speech": {"num_codebooks": 2, "codebook_size": 256, "weight": 1.0}}
    )
    model = SpearForPreTraining(config)
    model.prediction_heads["speech"].weight.data = head["weight"].flatten(0, 1)
    model.prediction_heads["speech"].bias.data = head["bias"].flatten()
    places = model._target_places(head["ix"])
    utterances, _ = model._codebook_statistics("speech", head["p"], head["ix"], None, places)
    sums = utterances.sum(dim=0)
    known = head["ix"] != -100
    expected = (head["loss"] * known).sum(-1) / known.sum(-1).clamp(min=1)
    assert torch.allclose(sums[1, 0], expected.sum(), rtol=1e-5)
    assert sums[1, 2] == known.any(-1).sum()


def test_pretraining_batches_without_audio_still_train_every_head():
    model = tiny_model(SpearForPreTraining).train()
    values = inputs(SpearForPreTraining, labels=True)
    values["audio_labels"][:] = -100
    output = model(**values)
    output.loss.backward()
    assert output.loss.isfinite()
    assert model.prediction_heads["audio"].weight.grad.abs().sum() == 0
    assert output.audio_masked_accuracy.isnan()


def test_pretraining_refuses_unaligned_or_unknown_labels():
    values = inputs(SpearForPreTraining, labels=True)
    model = tiny_model(SpearForPreTraining)
    with pytest.raises(ValueError, match=r"speech_labels.*align_labels"):
        model(**values | {"speech_labels": values["speech_labels"][:, :-1]})
    targets = {"speech": {"num_codebooks": 2, "codebook_size": 4, "weight": 1.0}}
    with pytest.raises(ValueError, match="no target 'audio'"):
        tiny_model(SpearForPreTraining, pretraining_targets=targets)(**values)


def test_pretraining_at_25_hz_masks_groups_of_four():
    model = tiny_model(SpearForPreTraining, output_downsampling_factor=2)
    mask = torch.zeros(1, 75, dtype=torch.bool)
    mask[0, 4:6] = True  # two of the frames 4..7 of output frame 1
    mask[0, 12] = True  # one of 12..15
    assert model._masked_output_frames(mask, 17)[0].nonzero().flatten().tolist() == [1]
