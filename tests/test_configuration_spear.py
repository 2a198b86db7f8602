# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SpearConfig: published sizes and keys, refusals, round trips."""

import json

import pytest
import torch
from transformers import AutoConfig

from spear_hf import SpearConfig, SpearModel


PUBLISHED_SIZES = {"base": (93_289_489, 555), "large": (326_951_472, 511), "xlarge": (596_973_362, 599)}


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_published_sizes(size):
    config = getattr(SpearConfig, size)()
    with torch.device("meta"):
        model = SpearModel(config)
    parameters = list(model.parameters())
    # Published checkpoints hold one unused `bypass_scale` a layer, which we drop.
    left_over = config.num_hidden_layers * config.hidden_size
    values, tensors = PUBLISHED_SIZES[size]
    assert sum(p.numel() for p in parameters) + left_over == values
    assert len(parameters) + config.num_hidden_layers == tensors


def test_published_keys_are_translated_and_never_written(golden_folder, tmp_path):
    config = AutoConfig.from_pretrained(golden_folder)
    assert isinstance(config, SpearConfig)
    assert config.hidden_size == 32
    assert config.intermediate_size == 64
    assert config.num_attention_heads == 4
    assert config.num_layers_per_stack == [1, 1, 2, 1, 1, 1, 1]
    assert config.num_hidden_layers == 8
    assert config.downsampling_factors == [1, 2, 4, 8, 4, 2, 1]
    assert config.conv_kernel_sizes == [7, 7, 5, 5, 5, 7, 7]
    assert config.unmasked_hidden_size == 16
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((golden_folder / "config.json").read_text())
    unchanged = {"num_mel_bins", "output_downsampling_factor", "pos_dim", "model_type", "transformers_version"}
    assert not set(written) & (set(published) - unchanged - {"architectures"})
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_lists_and_tuples_are_the_same():
    assert SpearConfig(num_layers_per_stack=(1, 1), downsampling_factors=(1, 2), conv_kernel_sizes=(3, 3)) == (
        SpearConfig(num_layers_per_stack=[1, 1], downsampling_factors=[1, 2], conv_kernel_sizes=[3, 3])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"causal": True}, "causal"),
        ({"causal": "True"}, "causal"),
        ({"encoder_dim": "192,256,256"}, "encoder_dim='192,256,256'.*non-uniform"),
        ({"feedforward_dim": "512,768"}, "feedforward_dim.*non-uniform"),
        ({"num_heads": "4,8"}, "num_heads.*non-uniform"),
        ({"num_encoder_layers": "1,two"}, "num_encoder_layers.*'1,two'"),
        ({"hiden_size": 512}, "hiden_size.*did you mean `hidden_size`"),
        ({"num_hidden_layers": 11}, "num_hidden_layers=11"),
        ({"downsampling_factors": [1, 2]}, "downsampling_factors.*7 stacks"),
        ({"conv_kernel_sizes": [31, 31, 15, 16, 15, 31, 31]}, "odd"),
        ({"hidden_size": 510}, "hidden_size=510.*multiple of 4"),
        ({"hidden_size": "512"}, "hidden_size"),
        ({"output_downsampling_factor": 3}, "output_downsampling_factor=3"),
        ({"masked_loss_weight": 1.5}, "masked_loss_weight=1.5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0.*must be positive"),
        ({"hidden_dropout": float("nan")}, r"hidden_dropout=nan.*must lie in \[0, 1\]"),
        ({"ctc_loss_reduction": "none"}, "ctc_loss_reduction"),
        ({"encoder_dim": 32.5}, "encoder_dim.*32.5"),
        ({"encoder_dim": float("inf")}, "encoder_dim.*inf"),
        ({"mask_time_prob": 2.0}, r"mask_time_prob=2.0.*must lie in \[0, 1\]"),
        ({"mask_time_length": 0}, "mask_time_length=0.*positive"),
        ({"vocab_size": 0}, "vocab_size=0.*positive"),
        ({"num_labels": 0}, "num_labels=0.*positive"),
        ({"classifier_proj_size": -1}, "classifier_proj_size=-1.*positive"),
        ({"tdnn_dim": [512, 512]}, r"tdnn_dim=\[512, 512\].*every layer"),
        ({"tdnn_kernel": [5, 3, 0, 1, 1]}, "tdnn_kernel=.*positive"),
        ({"problem_type": "multi_label"}, "problem_type.*'multi_label'.*'multi_label_classification'"),
        (
            {"pretraining_targets": {"speech": {"num_codebooks": 0, "codebook_size": 256, "weight": 1.0}}},
            "'speech'.*num_codebooks=0",
        ),
        ({"pretraining_targets": {"speech": {"codebooks": 16}}}, "pretraining_targets"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(Exception, match=message):
        SpearConfig(**arguments)


def test_types_are_checked_when_set():
    config = SpearConfig()
    with pytest.raises(Exception, match="hidden_size"):
        config.hidden_size = "512"


def test_samples_per_frame():
    assert SpearConfig().inputs_to_logits_ratio == 320
    assert SpearConfig(output_downsampling_factor=2).inputs_to_logits_ratio == 640
