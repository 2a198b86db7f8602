# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of SPEAR encoders and their heads."""

import difflib

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


# Keys of the published config.json -> ours. The lists there are comma-joined strings, one entry per stack.
PUBLISHED_STACK_LISTS = {
    "num_encoder_layers": "num_layers_per_stack",
    "downsampling_factor": "downsampling_factors",
    "cnn_module_kernel": "conv_kernel_sizes",
}
# The same, for values that must be alike in every stack and are scalars here.
PUBLISHED_UNIFORM_LISTS = {
    "encoder_dim": "hidden_size",
    "feedforward_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "encoder_unmasked_dim": "unmasked_hidden_size",
}
# What `validate_architecture` demands of values one by one.
POSITIVE = (
    *("num_attention_heads", "query_head_dim", "value_head_dim", "pos_head_dim", "mask_time_length"),
    *("mask_feature_length", "vocab_size", "num_labels", "classifier_proj_size", "xvector_output_dim"),
)
SHARES = (
    *("hidden_dropout", "position_dropout", "final_dropout", "mask_time_prob", "mask_feature_prob"),
    "masked_loss_weight",
)
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
# Only meaningful in a causal model, which the published encoders are not.
PUBLISHED_CAUSAL_ONLY = ("chunk_size", "left_context_frames")


def _to_ints(key: str, value: object) -> list[int]:
    """`"1,2,3"`, `3` or `[1, 2, 3]` as a list of integers."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [int(part) for part in parts]
        if any(isinstance(part, float) and part != number for part, number in zip(parts, numbers)):
            raise ValueError
        return numbers
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"`{key}` must hold whole numbers joined by commas, not {value!r}.") from None


@strict
class SpearConfig(PreTrainedConfig):
    r"""
    Configuration of [`SpearModel`] and its heads; the defaults are the published *base* size.

    The published configurations (model type `spear`, comma-joined strings, other key names) are accepted as keyword
    arguments and in a `config.json`, and translated; `save_pretrained` writes the names below only. A causal
    configuration, and one whose width, inner width or number of heads differs between stacks, is refused.

    [`SpearConfig.base`], [`SpearConfig.large`] and [`SpearConfig.xlarge`] are the three published sizes. Published
    checkpoints hold 93,289,489 / 326,951,472 / 596,973,362 values. One vector of them per layer (`bypass_scale`,
    `hidden_size` values, left over from an older layer and unused) is dropped when loading, so that [`SpearModel`] has
    `num_hidden_layers * hidden_size` parameters fewer; the mask embedding (128 values) is kept.

    Args:
        hidden_size (`int`, *optional*, defaults to 512):
            Width of every stack (published: `encoder_dim`).
        num_layers_per_stack (`list[int]`, *optional*, defaults to `[1, 2, 3, 3, 1, 1, 1]`):
            Layers of each stack (`num_encoder_layers`).
        downsampling_factors (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 4, 2, 1]`):
            Downsampling of each stack relative to the 50 Hz output of the stem (`downsampling_factor`).
        conv_kernel_sizes (`list[int]`, *optional*, defaults to `[31, 31, 15, 15, 15, 31, 31]`):
            Odd kernel size of the depthwise convolutions of each stack, in frames of the stack (`cnn_module_kernel`).
        intermediate_size (`int`, *optional*, defaults to 1536):
            Inner width of the second feed-forward module of a layer; the first has 3/4 and the third 5/4 of it
            (`feedforward_dim`). Must be divisible by 4.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads in every stack (`num_heads`).
        query_head_dim (`int`, *optional*, defaults to 32): Query and key size of a head.
        value_head_dim (`int`, *optional*, defaults to 12): Value size of a head.
        pos_head_dim (`int`, *optional*, defaults to 4): Size of a head's projection of relative positions.
        pos_dim (`int`, *optional*, defaults to 48): Width of the table of relative positions, even.
        num_mel_bins (`int`, *optional*, defaults to 128): Mel bins of `input_features`.
        stem_channels (`list[int]`, *optional*, defaults to `[8, 32, 128]`):
            Channels of the three convolutions of the stem. All published models have the default; most of the time of
            a very small model goes into the stem, unless it is narrower.
        output_downsampling_factor (`int`, *optional*, defaults to 1):
            1: last hidden state at 50 Hz; 2: at 25 Hz, while the hidden states of the layers stay at 50 Hz.
        unmasked_hidden_size (`int`, *optional*):
            Channels that the feature mask of pre-training never zeroes (`encoder_unmasked_dim`); half of
            `hidden_size` unless given.
        num_hidden_layers (`int`, *optional*): Always the sum of `num_layers_per_stack`.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout inside the feed-forward modules and after the stem; one mask for all frames of a sequence.
        position_dropout (`float`, *optional*, defaults to 0.0): Dropout on the table of relative positions.
        final_dropout (`float`, *optional*, defaults to 0.1): Dropout before the output layer of the heads.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the weights of the heads. The encoder has its own rules (spec of the paper's recipe).
        apply_spec_augment (`bool`, *optional*, defaults to `False`):
            Mask the input at random when fine-tuning, as Wav2Vec2 does. Off, as in the paper.
        mask_time_prob (`float`, *optional*, defaults to 0.05): Share of frames to mask, overlaps not counted.
        mask_time_length (`int`, *optional*, defaults to 10): Length of a masked span, in frames of 10 ms.
        mask_feature_prob (`float`, *optional*, defaults to 0.0): Share of mel bins to mask.
        mask_feature_length (`int`, *optional*, defaults to 10): Length of a masked span of mel bins.
        pretraining_targets (`dict[str, dict]`, *optional*):
            Teachers of [`SpearForPreTraining`] by name: `num_codebooks` and `codebook_size` at the student's frame
            rate, and the `weight` of the loss. Defaults to the paper's: 16 speech codebooks of weight 1 and 8 audio
            codebooks of weight 0.1, of 256 entries.
        masked_loss_weight (`float`, *optional*, defaults to 0.5):
            Weight of the masked frames in the pre-training loss; the unmasked ones have one minus it.
        vocab_size (`int`, *optional*, defaults to 32): Output classes of [`SpearForCTC`].
        pad_token_id (`int`, *optional*, defaults to 0): Blank of the CTC loss.
        ctc_loss_reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"sum"`.
        ctc_zero_infinity (`bool`, *optional*, defaults to `True`):
            Whether infinite losses (more labels than frames) count as zero.
        use_weighted_layer_sum (`bool`, *optional*, defaults to `False`):
            Heads read a learned weighted sum of all hidden states instead of the last.
        classifier_proj_size (`int`, *optional*, defaults to 256): Width of the projection of the classification head.
        tdnn_dim (`list[int]`, *optional*, defaults to `[512, 512, 512, 512, 1500]`): Widths of the x-vector layers.
        tdnn_kernel (`list[int]`, *optional*, defaults to `[5, 3, 3, 1, 1]`): Their kernel sizes.
        tdnn_dilation (`list[int]`, *optional*, defaults to `[1, 2, 3, 1, 1]`): Their dilations.
        xvector_output_dim (`int`, *optional*, defaults to 512): Size of the speaker embedding.

    Example:

    ```python
    >>> from spear_hf import SpearConfig, SpearModel
    >>> model = SpearModel(SpearConfig(hidden_size=64, intermediate_size=192))
    ```
    """

    model_type = "spear"
    # Their sizes follow from the longest utterance of a batch: a Trainer cannot join those of several batches.
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    hidden_size: int = 512
    num_layers_per_stack: list[int] | tuple[int, ...] = (1, 2, 3, 3, 1, 1, 1)
    downsampling_factors: list[int] | tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1)
    conv_kernel_sizes: list[int] | tuple[int, ...] = (31, 31, 15, 15, 15, 31, 31)
    intermediate_size: int = 1536
    num_attention_heads: int = 8
    query_head_dim: int = 32
    value_head_dim: int = 12
    pos_head_dim: int = 4
    pos_dim: int = 48
    num_mel_bins: int = 128
    stem_channels: list[int] | tuple[int, ...] = (8, 32, 128)
    output_downsampling_factor: int = 1
    unmasked_hidden_size: int | None = None
    num_hidden_layers: int | None = None

    hidden_dropout: float | int = 0.1
    position_dropout: float | int = 0.0
    final_dropout: float | int = 0.1
    initializer_range: float = 0.02
    apply_spec_augment: bool = False
    mask_time_prob: float | int = 0.05
    mask_time_length: int = 10
    mask_feature_prob: float | int = 0.0
    mask_feature_length: int = 10

    pretraining_targets: dict | None = None
    masked_loss_weight: float | int = 0.5

    vocab_size: int = 32
    pad_token_id: int | None = 0
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = True
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: list[int] | tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: list[int] | tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512

    def __post_init__(self, **kwargs):
        self._translate_published(kwargs)
        self._refuse_misspelt(kwargs)
        for name in (*PUBLISHED_STACK_LISTS.values(), "stem_channels", "tdnn_dim", "tdnn_kernel", "tdnn_dilation"):
            setattr(self, name, list(getattr(self, name)))
        if self.num_hidden_layers is None:
            self.num_hidden_layers = sum(self.num_layers_per_stack)
        if self.unmasked_hidden_size is None:
            self.unmasked_hidden_size = self.hidden_size // 2
        if self.pretraining_targets is None:
            self.pretraining_targets = {
                "speech": {"num_codebooks": 16, "codebook_size": 256, "weight": 1.0},
                "audio": {"num_codebooks": 8, "codebook_size": 256, "weight": 0.1},
            }
        super().__post_init__(**kwargs)

    def _translate_published(self, kwargs: dict) -> None:
        """Take the published keys out of `kwargs` and set ours."""
        if "encoder_dim" in kwargs:
            kwargs.pop("auto_map", None)  # names remote code that a model saved from here is without
        if str(kwargs.pop("causal", False)).lower() not in ("false", "0"):
            raise ValueError("`causal=True`: causal SPEAR encoders are not supported; set `causal` to false.")
        for key in PUBLISHED_CAUSAL_ONLY:
            kwargs.pop(key, None)
        for key, name in PUBLISHED_STACK_LISTS.items():
            if key in kwargs:
                setattr(self, name, _to_ints(key, kwargs.pop(key)))
        for key, name in PUBLISHED_UNIFORM_LISTS.items():
            if key in kwargs:
                values = _to_ints(key, value := kwargs.pop(key))
                if len(set(values)) != 1:
                    raise ValueError(
                        f"`{key}={value!r}` differs between stacks: non-uniform configurations are not supported; "
                        "every stack must have the same value."
                    )
                setattr(self, name, values[0])

    def _refuse_misspelt(self, kwargs: dict) -> None:
        """Extra keys are allowed, as in every transformers config, but not near misses of a name of ours."""
        known = set(type(self).__dataclass_fields__)
        for key in kwargs:
            if close := difflib.get_close_matches(key, known - {key}, n=1, cutoff=0.9):
                raise ValueError(f"unknown configuration key `{key}`: did you mean `{close[0]}`?")

    def validate_architecture(self):
        """Checks across fields, at the end of initialisation."""
        stacks = len(self.num_layers_per_stack)
        for name in PUBLISHED_STACK_LISTS.values():
            values = getattr(self, name)
            if len(values) != stacks:
                raise ValueError(f"`{name}={values}` must have one entry for each of the {stacks} stacks.")
            if not values or min(values) < 1:
                raise ValueError(f"`{name}={values}` must hold positive numbers.")
        if any(kernel % 2 == 0 for kernel in self.conv_kernel_sizes):
            raise ValueError(f"`conv_kernel_sizes={self.conv_kernel_sizes}` must be odd.")
        if self.num_hidden_layers != sum(self.num_layers_per_stack):
            raise ValueError(
                f"`num_hidden_layers={self.num_hidden_layers}` must be the sum of "
                f"`num_layers_per_stack={self.num_layers_per_stack}`; leave it out of a new configuration to have it "
                "computed, and set both in one that is there."
            )
        for name in ("hidden_size", "intermediate_size"):
            if (value := getattr(self, name)) < 4 or value % 4:
                raise ValueError(f"`{name}={value}` must be a positive multiple of 4.")
        for name in POSITIVE:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}={value}` must be positive.")
        for name in SHARES:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"`{name}={value}` must lie in [0, 1].")
        if self.pos_dim < 2 or self.pos_dim % 2:
            raise ValueError(f"`pos_dim={self.pos_dim}` must be a positive even number.")
        if self.num_mel_bins < 9:
            raise ValueError(f"`num_mel_bins={self.num_mel_bins}` must be at least 9, as the stem halves it twice.")
        if len(self.stem_channels) != 3 or min(self.stem_channels) < 1:
            raise ValueError(f"`stem_channels={self.stem_channels}` must be three positive numbers.")
        if self.output_downsampling_factor not in (1, 2):
            raise ValueError(f"`output_downsampling_factor={self.output_downsampling_factor}` must be 1 or 2.")
        if not 0 <= self.unmasked_hidden_size <= self.hidden_size:
            raise ValueError(f"`unmasked_hidden_size={self.unmasked_hidden_size}` must lie in [0, hidden_size].")
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"`problem_type={self.problem_type!r}` must be one of {', '.join(map(repr, PROBLEM_TYPES))}."
            )
        tdnn = self.tdnn_dim, self.tdnn_kernel, self.tdnn_dilation
        if len({len(values) for values in tdnn}) > 1 or not self.tdnn_dim or min(map(min, tdnn)) < 1:
            raise ValueError(
                f"`tdnn_dim={self.tdnn_dim}`, `tdnn_kernel={self.tdnn_kernel}` and "
                f"`tdnn_dilation={self.tdnn_dilation}` must have a positive number each for every layer."
            )
        if self.ctc_loss_reduction not in ("mean", "sum"):
            raise ValueError(f"`ctc_loss_reduction={self.ctc_loss_reduction!r}` must be 'mean' or 'sum'.")
        for name, target in self.pretraining_targets.items():
            if set(target) != {"num_codebooks", "codebook_size", "weight"}:
                raise ValueError(
                    f"`pretraining_targets[{name!r}]` must have the keys num_codebooks, codebook_size and weight, "
                    f"not {sorted(target)}."
                )
            for key in ("num_codebooks", "codebook_size"):
                if not isinstance(target[key], int) or target[key] < 1:
                    raise ValueError(f"`pretraining_targets[{name!r}]`: {key}={target[key]!r} must be a positive int.")

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples (at 16 kHz) per frame of the last hidden state: 320, or 640 at 25 Hz."""
        return 320 * self.output_downsampling_factor

    @classmethod
    def base(cls, **kwargs) -> "SpearConfig":
        """The published base size: 93,289,489 values as published."""
        return cls(unmasked_hidden_size=256, **kwargs)

    @classmethod
    def large(cls, **kwargs) -> "SpearConfig":
        """The published large size: 326,951,472 values as published."""
        size = {"hidden_size": 1024, "intermediate_size": 3072, "unmasked_hidden_size": 512}
        return cls(num_layers_per_stack=[1, 2, 2, 3, 1, 1, 1], **size, **kwargs)

    @classmethod
    def xlarge(cls, **kwargs) -> "SpearConfig":
        """The published xlarge size: 596,973,362 values as published."""
        size = {"hidden_size": 1280, "intermediate_size": 3840, "unmasked_hidden_size": 768}
        return cls(num_layers_per_stack=[1, 2, 3, 4, 1, 1, 1], **size, **kwargs)


__all__ = ["SpearConfig"]
