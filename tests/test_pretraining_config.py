# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Every shipped configuration loads; unknown keys, wrong types and impossible values are refused by name."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import save_file

from spear_hf import SpearConfig, SpearModel
from spear_hf.data.mixing import MixingConfig
from spear_hf.data.ranges import range_of
from spear_hf.pretraining import config as config_module
from spear_hf.pretraining.config import (
    ModelConfig,
    OptimizerConfig,
    PreTrainingConfig,
    TargetConfig,
    load_config,
    shipped_configs,
)
from spear_hf.pretraining.config_loading import build, changed_keys, to_plain
from spear_hf.pretraining.planning import PlannedTokens
from spear_hf.pretraining.setup import build_model, model_config


def test_the_shipped_names():
    papers = [f"{size}-{domains}" for size in ("base", "large", "xlarge") for domains in ("speech", "speech-audio")]
    assert shipped_configs() == sorted([*papers, "base-one-gpu", "tiny"])


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_and_survives_yaml(name):
    config = load_config(name)
    assert build(PreTrainingConfig, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config
    assert set(config.targets) == ({"speech"} if name.endswith("speech") or name == "tiny" else {"speech", "audio"})
    assert config.data.domain_weights == ({"audio": 2.5} if "audio" in config.targets else {})
    if name != "tiny":
        with torch.device("meta"):
            tokens = {"speech": PlannedTokens(16, 256), "audio": PlannedTokens(8, 256, 25.0)}
            model = build_model(config, tokens)
        counted = sum(parameter.numel() for parameter in model.spear.parameters())
        published = {"base": 93_289_489, "large": 326_951_472, "xlarge": 596_973_362}[name.split("-")[0]]
        unused = model.config.num_hidden_layers * model.config.hidden_size  # see SpearConfig
        assert counted == published - unused


@pytest.mark.parametrize(
    ("size", "gpus", "steps", "hours"),
    [("base", 8, 400_000, 25e3), ("large", 16, 500_000, 75e3), ("xlarge", 32, 500_000, 75e3)],
)
def test_the_papers_runs(size, gpus, steps, hours):
    for domains in ("speech", "speech-audio"):
        config = load_config(f"{size}-{domains}")
        assert (config.model.size, config.max_steps, config.schedule.eden_hours) == (size, steps, hours)
        assert 4800 <= config.data.batch_seconds <= 6400
        assert (config.data.min_seconds, config.data.max_seconds) == (0.9, 32.0)
        assert config.data.domain_max_seconds == ({"audio": 10.0} if domains == "speech-audio" else {})
        room = config.execution.batch_seconds_per_device - config.data.batch_seconds / gpus
        assert config.data.max_seconds < room < 1.5 * config.data.max_seconds  # a row more: no accumulation


def test_tiny_has_two_to_three_million_parameters():
    model = build_model(load_config("tiny"), {"speech": PlannedTokens(1, 64)})
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert model.config.pretraining_targets == {"speech": {"num_codebooks": 1, "codebook_size": 64, "weight": 1.0}}


def test_a_student_at_25_hz_predicts_two_tokens_a_frame():
    overrides = ["model.config.output_downsampling_factor=2", "targets.audio.weight=0.1"]
    model = build_model(
        load_config("tiny", overrides), {"speech": PlannedTokens(1, 64, 50.0), "audio": PlannedTokens(8, 256, 25.0)}
    )
    targets = model.config.pretraining_targets
    assert (targets["speech"]["num_codebooks"], targets["audio"]["num_codebooks"]) == (2, 8)


def test_masking_of_the_shipped_configs_is_the_papers():
    speech, both = load_config("base-speech").masking, load_config("base-speech-audio").masking
    assert (speech.time_probability, speech.feature_span) == (0.5, 15)
    assert (both.time_probability, both.feature_span) == (0.65, 20)


def test_mixing_of_the_shipped_configs_is_the_papers():
    assert load_config("base-speech").mixing == load_config("base-speech-audio").mixing == MixingConfig.paper()
    assert load_config("tiny").mixing == MixingConfig()


def test_a_target_has_any_name_and_domains_of_its_own():
    config = load_config("tiny", ["targets.music.store=x", "targets.music.domains=[audio]"])
    assert config.targets["music"].domains == ("audio",)
    assert build(PreTrainingConfig, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config


def test_overrides_at_the_top_and_below():
    config = load_config(
        "tiny",
        ["output_dir=out", "max_steps=50", "checkpoint_every=25", "optimizer.learning_rate=1e-3", "data.split=null",
         "model.config.hidden_size=32", "targets.speech.teacher=null", "targets.speech.store=a=b",
         "optimizer.betas=[0.9, 0.95]"],
    )  # fmt: skip
    assert (config.output_dir, config.max_steps, config.checkpoint_every) == ("out", 50, 25)
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.data.split is None
    assert config.model.config["hidden_size"] == 32
    assert config.targets["speech"].store == "a=b"


def test_a_target_can_be_removed():
    assert set(load_config("base-speech-audio", ["targets.audio=null"]).targets) == {"speech"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "Unknown key max_step: did you mean max_steps"),
        ("optimizer.learning_rat=3", "did you mean optimizer.learning_rate"),
        ("data.zzz=3", "Unknown key data.zzz: known here: manifest"),
        ("targets.speech.codebooks=3", "did you mean targets.speech.num_codebooks"),
        ("model.config.hiden_size=3", "config.hiden_size is not a field of SpearConfig (did you mean hidden_size?)"),
        ("model.config.return_dict=false", "config.return_dict is not a field of SpearConfig"),
        ("model.config.dtype=float64", "config.dtype is not a field of SpearConfig"),
        ("max_steps=ten", "max_steps='ten' is a str, but must be int"),
        ("max_steps=1.5", "max_steps=1.5 is a float, but must be int"),
        ("seed=true", "seed=True is a bool"),
        ("execution.cache_audio=1", "execution.cache_audio=1 is a int, but must be bool"),
        ("schedule.name=linear", "must be one of 'cosine', 'eden', 'constant'"),
        ("optimizer.betas=[0.9]", "optimizer: betas must be two numbers"),
        ("optimizer.betas=[0.9, 1]", "optimizer: betas[1]=1.0 must be at least 0 and less than 1"),
        ("model.config.hidden_size=4000000", "model: config.hidden_size=4000000 must be at least -1e+06 and at most"),
        ("model.config.stem_channels=[8, 32, 10000000]", "config.stem_channels=10000000 must be at least"),
        ("optimizer.weight_decay=-1", "optimizer: weight_decay=-1.0 must be at least 0 and at most 1e+06"),
        ("optimizer.max_grad_norm=0", "optimizer: max_grad_norm=0.0 must be at least 1e-15"),
        ("optimizer.learning_rate=nan", "optimizer: learning_rate=nan must be at least"),
        ("targets.speech.weight=.inf", "targets.speech: weight=inf must be at least 0 and at most 1e+06"),
        (
            "data.domain_max_seconds.audio=20",
            "domain_max_seconds.audio=20.0: of speech and audio, from min_seconds=0.3",
        ),
        ("data.domain_max_seconds.audio=1.01", "must be a multiple of 0.04 (a 25 Hz token), not 1.01"),
        ("execution.timeout_minutes=1e20", "timeout_minutes=1e+20 must be at least 1e-06 and at most 1e+06"),
        ("data.batch_seconds=.nan", "data: batch_seconds=nan must be"),
        ("optimizer.name=adam", "must be one of 'adamw', 'scaled_adam'"),
        ("optimizer.scaled_adam.clipping_scale=3", "scaled_adam is set, but name is adamw"),
        ("averaging.last_fraction=2", "averaging: last_fraction=2.0 must be at least 0 and at most 1"),
        ("data=3", "must be a mapping"),
        ("max_steps.x=3", "holds a value, not a section"),
        ("data.max_seconds=9.99", "multiple of 0.04"),
        ("data.batch_seconds=2", "batch_seconds=2.0 must hold a crop of max_seconds=4.0"),
        ("execution.batch_seconds_per_device=2", "must hold a crop"),
        ("masking.time_span=0", "masking: time_span=0 must be at least 1 and at most 1e+06"),
        ("targets.speech.store=x", "store and teacher are both set"),
        ("targets.keys.store=x", "targets.keys cannot be the name of a target"),
        ("targets={}", "targets must name a teacher at least"),
        ("targets.speech.domains=[music]", "targets.speech: domains must be of speech, audio, or null"),
        ("mixing.noise_probability=2", "mixing: noise_probability=2.0 must be at least 0 and at most 1"),
        ("mixing.token_second=music", "mixing.token_second='music' must be one of 'speech', 'any'"),
        ("data.domain_weights.music=2", "domain_weights.music: weights are of speech and audio"),
        ("data.domain_weights.audio=0", "domain_weights.audio=0.0 must be at least 1e-06"),
        ("logging.probe_every=5", "probe_every needs probe_manifest"),
        ("execution.sharding=ddp", "must be one of 'none', 'fsdp'"),
        ("max_steps", "must have the form key=value"),
        ("max_steps=[1", "not valid YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("tiny", [override])


def numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of every number in a configuration."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        parts = [hint, *get_args(hint)]
        if section := next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None):
            yield from numbers(section, f"{prefix}{name}." + ("speech." if section is TargetConfig else ""))
        elif {int, float} & set(leaves(hint)):
            yield f"{prefix}{name}", hint


def leaves(hint: Any) -> list[Any]:
    return [leaf for part in get_args(hint) for leaf in leaves(part)] or [hint]


def test_every_number_has_a_range():
    """What is absurd is refused by the name of its key, when the configuration is read."""
    found = dict(numbers(PreTrainingConfig))
    assert {"seed", "targets.speech.weight", "data.domain_weights", "optimizer.scaled_adam.scalar_max"} <= set(found)
    assert len(found) > 50
    for key, hint in found.items():
        form = {dict: f"{key}.audio=%s", tuple: f"{key}=[%s, 0]"}.get(get_origin(hint), f"{key}=%s")
        absurd = ["word", "true", "{}", 10**24, -(10**24)]
        absurd += ["1.5"] if int in leaves(hint) else [".nan", ".inf", "-.inf", 1e300]
        absurd += [0, -1] if range_of(hint).low > 0 else []
        for value in absurd:
            with pytest.raises(ValueError, match=rf"\b{key.rpartition('.')[2]}\b.*must be"):
                load_config("tiny", [form % value])


def test_an_optimiser_brings_its_own_rate_and_clipping():
    adamw, scaled = OptimizerConfig(), load_config("base-speech").optimizer
    assert (adamw.learning_rate, adamw.weight_decay, adamw.max_grad_norm) == (5e-4, 0.01, 5.0)
    assert OptimizerConfig(name="scaled_adam").learning_rate == scaled.learning_rate == 0.045
    assert (scaled.max_grad_norm, scaled.scaled_adam.clipping_scale) == (None, 2.0)
    for override, message in [
        ("optimizer.weight_decay=0.1", "weight_decay and max_grad_norm are of adamw: set them to null"),
        (
            "optimizer.scaled_adam.clipping_scale=-1",
            "optimizer.scaled_adam: clipping_scale=-1.0 must be at least 1e-15",
        ),
        ("optimizer.scaled_adam.param_min_rms=5", "param_min_rms=5.0 must be less than param_max_rms=3.0"),
        ("optimizer.scaled_adam.size_update_period=0", "size_update_period=0 must be at least 1 and"),
        ("optimizer.scaled_adam.scalar_max=0", "scalar_max=0.0 must be at least"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            load_config("base-speech", [override])


def test_unknown_names_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither a file nor a shipped configuration \(base-one-gpu"):
        load_config("tinny")
    path = tmp_path / "mine.yaml"
    path.write_text("max_steps: 5\nmodel:\n  size: large\n")
    assert load_config(path).model.size == "large"
    path.write_text("model:\n  size: large\n  size: base\n")
    with pytest.raises(ValueError, match="key size comes twice"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="keys and values"):
        load_config(path)


def test_changed_keys_are_dotted_names():
    before, after = to_plain(load_config("tiny")), to_plain(load_config("tiny", ["seed=1", "data.split=x"]))
    assert changed_keys(before, after) == ["data.split", "seed"]


def test_every_field_is_explained():
    tree = ast.parse(inspect.getsource(config_module))
    for definition in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for place, node in enumerate(definition.body):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) not in (
                "ModelConfig", "DataConfig", "MaskingConfig", "MixingConfig", "OptimizerConfig", "ScheduleConfig",
                "AveragingConfig", "RegularizersConfig",
                "CheckpointingConfig", "LoggingConfig", "ExecutionConfig",
            ):  # fmt: skip
                following = definition.body[place + 1]
                assert isinstance(following, ast.Expr), f"{definition.name}.{ast.unparse(node.target)}"


def test_training_can_start_from_a_published_checkpoint(golden_folder):
    model_settings = ModelConfig(init_from=str(golden_folder))
    config = PreTrainingConfig(model=model_settings, targets={"speech": TargetConfig()})
    model = build_model(config, {"speech": PlannedTokens(2, 256)})
    published = SpearModel.from_pretrained(golden_folder)
    for name, tensor in published.state_dict().items():
        assert torch.equal(model.spear.state_dict()[name], tensor), name
    assert model.prediction_heads["speech"].out_features == 512
    again = build_model(config, {"speech": PlannedTokens(2, 256)})
    assert torch.equal(model.prediction_heads["speech"].weight, again.prediction_heads["speech"].weight)
    with pytest.raises(ValueError, match="leave size and config out"):
        ModelConfig(init_from=str(golden_folder), size="base")


def test_the_seed_decides_the_initialisation():
    models = [
        build_model(load_config("tiny", [f"seed={seed}"]), {"speech": PlannedTokens(1, 64)}) for seed in (0, 0, 1)
    ]
    weights = [model.prediction_heads["speech"].weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"hidden_size": 33}}, "model.config: `hidden_size=33` must be a positive multiple of 4"),
        ({"config": {"hidden_size": "wide"}}, "model.config: Field 'hidden_size' expected int, got str"),
        ({"config": {"num_mel_bins": 80}}, "model.config.num_mel_bins=80: what is heard has 128 mel bins"),
    ],
)
def test_an_encoder_that_cannot_be_is_a_mistake_in_the_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config(ModelConfig(**settings))


def test_a_run_does_not_start_from_what_is_no_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"num_codebooks": 4}')
    settings = ["model.config={}", f"model.init_from={tmp_path}"]
    with pytest.raises(ValueError, match="is not a SPEAR model"):
        build_model(load_config("tiny", settings), {"speech": PlannedTokens(1, 64)})
    SpearConfig(num_layers_per_stack=[1] * 7, hidden_size=32, unmasked_hidden_size=32).save_pretrained(tmp_path)
    save_file({"prediction_heads.speech.bias": torch.zeros(64)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of the encoder, such as spear\."):
        build_model(load_config("tiny", settings), {"speech": PlannedTokens(1, 64)})


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "settings.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"settings\.yaml is not UTF-8 text"):
        load_config(tmp_path / "settings.yaml")
