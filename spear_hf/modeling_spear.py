# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR: a Zipformer encoder for speech and audio (arXiv 2510.25955), and its heads."""

import functools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    XVectorOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    TransformersKwargs,
    auto_docstring,
    can_return_tuple,
    logging,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .blockwise_spear import (
    MIN_FRAMES_FOR_BLOCKS,
    MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS,
    BlockwiseAttention,
    are_blocks_possible,
    can_run_in_blocks,
    is_watched,
    project,
)
from .compiled_spear import (
    DepthwiseConv2d,
    RelativeScores,
    channels_last,
    in_autocast,
    is_trained_by_compiler,
    scores_by_key,
    widened_type,
)
from .configuration_spear import SpearConfig


logger = logging.get_logger(__name__)

MIN_FRAMES = 9  # of the 100 Hz filter bank: the stem turns m frames into (m - 7) // 2
PADDING_VALUE = math.log(1e-10)  # that of `SpearFeatureExtractor`
LOGITS_AT_ONCE = 2**24  # of the pre-training heads: 67 MB in float32
LOGITS_ON_CUDA = 4  # so many times as many, as each is several kernels
STEM_FRAMES_AT_ONCE = 128  # of an utterance, without gradients: 6 MB of the widest tensor of the base size
MAX_GRAPHS = 64  # of `compile_layers`, for one method; torch gives up after 8 and goes on without a word of error
COMPILE_OPTIONS = {
    "layout_optimization": False,  # memory formats are chosen here; the compiler's would fix the length
    "shape_padding": False,  # hardly ever possible where lengths vary, and tried out on the device
    "combo_kernels": True,  # small kernels that do not depend on each other, as casts of weights, become one
}
TILES = "triton.coalesce_tiling_analysis"
FRAMES_AT_ONCE = 1024  # of all utterances in the feed-forward modules, without gradients

# Names in published checkpoints -> ours. No rule matches a key of ours.
PUBLISHED_NAMES = {
    r"^model\.model\.mask_emb": "masked_spec_embed",
    r"^model\.model\.encoder_embed\.conv\.0\.": "stem.conv1.",
    r"^model\.model\.encoder_embed\.conv\.4\.": "stem.conv2.",
    r"^model\.model\.encoder_embed\.conv\.7\.": "stem.conv3.",
    r"^model\.model\.encoder_embed\.convnext\.": "stem.convnext.",
    r"^model\.model\.encoder_embed\.out\.": "stem.out_proj.",
    r"^model\.model\.encoder_embed\.out_norm\.": "stem.norm.",
    r"^model\.model\.encoder\.downsample_output\.": "output_downsample.",
    r"^model\.model\.encoder\.encoders\.": "stacks.",
    r"^stacks\.(\d+)\.encoder\.": r"stacks.\1.stack.",
}


@auto_docstring(
    custom_intro="""
    Base class of the encoder's outputs, with the attention mask at the encoder's frame rate.
    """
)
@dataclass
class SpearModelOutput(BaseModelOutput):
    r"""
    attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
        1 for frames of `last_hidden_state` that belong to the utterance, 0 for padding. Returned if `attention_mask`
        was given.
    """

    attention_mask: torch.Tensor | None = None


@auto_docstring(
    custom_intro="""
    Output of [`SpearForPreTraining`].
    """
)
@dataclass
class SpearForPreTrainingOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when labels are given):
        Weighted sum of the teachers' losses per target frame (paper, masked prediction of multi-codebook tokens).
    speech_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Mean cross-entropy over all target frames and codebooks of the speech teacher, unweighted.
    audio_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        The same for the audio teacher.
    speech_masked_accuracy (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Share of the codebook entries of masked frames that the speech teacher's classifiers get right; NaN without
        such frames.
    speech_unmasked_accuracy (`torch.FloatTensor` of shape `(1,)`, *optional*):
        The same for unmasked frames.
    audio_masked_accuracy (`torch.FloatTensor` of shape `(1,)`, *optional*):
        As for speech, for the audio teacher.
    audio_unmasked_accuracy (`torch.FloatTensor` of shape `(1,)`, *optional*):
        As for speech, for the audio teacher.
    statistics (`torch.FloatTensor` of shape `(num_teachers, 2, 3)`, *optional*):
        Per teacher (speech, audio, then others by name), on masked (0) and unmasked (1) frames: the sum of the frames'
        losses, the sum of their accuracies and their number. Sums of these over batches and ranks give exact means.
    utterance_statistics (`torch.FloatTensor` of shape `(num_teachers, batch_size, 2, 3)`, *optional*):
        The same for every utterance.
    codebook_statistics (`torch.FloatTensor` of shape `(num_codebooks, 2)`, *optional*):
        Per codebook, those of all teachers one after the other: how many entries of masked frames are predicted
        correctly, and how many there are.
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
        The encoder's output.
    attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
        1 for frames of `last_hidden_state` that belong to the utterance, 0 for padding.
    """

    loss: torch.FloatTensor | None = None
    speech_loss: torch.FloatTensor | None = None
    audio_loss: torch.FloatTensor | None = None
    speech_masked_accuracy: torch.FloatTensor | None = None
    speech_unmasked_accuracy: torch.FloatTensor | None = None
    audio_masked_accuracy: torch.FloatTensor | None = None
    audio_unmasked_accuracy: torch.FloatTensor | None = None
    statistics: torch.FloatTensor | None = None
    utterance_statistics: torch.FloatTensor | None = None
    codebook_statistics: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    attention_mask: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


def swoosh_l(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x - 4)) - 0.08 x - 0.035, of any shape."""
    return _swoosh(x, 4.0, 0.035)


def swoosh_r(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x - 1)) - 0.08 x - 0.313261687, zero at zero; of any shape."""
    return _swoosh(x, 1.0, 0.313261687)


def _swoosh(x: torch.Tensor, offset: float, constant: float) -> torch.Tensor:
    if torch.compiler.is_compiling():  # one kernel, whose inner precision costs nothing
        wide = widened(x)
        return (F.softplus(wide - offset) - 0.08 * wide - constant).to(x.dtype)
    return F.softplus(x - offset).add_(x, alpha=-0.08).sub_(constant)  # in place, but never in `x`


def widened(x: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is: for squares and long sums, which overflow half precision."""
    return x.to(widened_type(x))


def gated(x: torch.Tensor) -> torch.Tensor:
    """The first half of the channels times the sigmoid of the second half."""
    if torch.compiler.is_compiling():  # whose gradient would go through memory in float32
        value, gate = x.chunk(2, dim=-1)
        return value * gate.sigmoid()
    return F.glu(x, dim=-1)


def valid_lengths(attention_mask: torch.Tensor) -> torch.Tensor:
    """Frames of each utterance, int64 `(batch,)`, of a mask `(batch, frames)` of any type."""
    return attention_mask.sum(dim=-1, dtype=torch.int64)  # half precision would round what is over 256, or over 2048


def with_init_scale(module: nn.Module, scale: float | None = None) -> nn.Module:
    """Mark a linear or convolution for PyTorch's default initialisation, with weights and biases shrunk by `scale`."""
    module.init_scale = scale
    return module


def relative_position_table(length: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Features of the offsets -(length - 1) ... length of a key relative to its query, `(2 * length, dim)`.

    Offsets are compressed logarithmically before an arctangent bends them onto less than half a circle, of which the
    table holds the first `dim / 2` harmonics; the last column is 1. Row `length - 1 + j - i` belongs to query i and
    key j; the last row serves `relative_scores` only.
    """
    offsets = torch.arange(-(length - 1), length + 1, device=device, dtype=torch.float32)  # (2 * length,)
    compression = math.sqrt(dim)
    compressed = compression * offsets.sign() * ((offsets.abs() + compression).log() - math.log(compression))
    angles = (compressed / (dim / (2.0 * math.pi))).atan()
    harmonics = torch.arange(1, dim // 2 + 1, device=device, dtype=torch.float32)
    phases = angles[:, None] * harmonics  # (2 * length, dim / 2)
    table = torch.stack([phases.cos(), phases.sin()], dim=-1).flatten(-2)  # (2 * length, dim)
    return torch.cat([table[:, :-1], torch.ones_like(table[:, :1])], dim=-1).to(dtype)


def relative_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores per offset, `(..., length, 2 * length)`, as a view of scores per key, `(..., length, length)`.

    Entry (i, j) of the result is entry (i, length - 1 + j - i) of the argument. In the flattened rows that is place
    i * (2 * length - 1) + length - 1 + j: rows that are one shorter, from place `length - 1` on.
    """
    length = scores.shape[-2]
    # The view asks more of a dynamic length than an exported graph can promise. torch.compile takes itself for export.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        offsets = torch.arange(length, device=scores.device)
        index = length - 1 + offsets[None, :] - offsets[:, None]
        return scores.gather(-1, index.expand(*scores.shape[:-2], length, length))
    return RelativeScores.apply(scores) if is_trained_by_compiler() else scores_by_key(scores)


def remove_earlier_weights(folder: Path, variant: str | None = None) -> None:
    """Of model.safetensors and the index of several files, the one that `save_pretrained` did not write just now."""
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if variant is not None:
        names = [f"{base}.{variant}.{ending}" for base, ending in (name.rsplit(".", 1) for name in names)]
    weights, index = (folder / name for name in names)
    if weights.is_file() and index.is_file():
        # It has removed the files of an index that it has not written.
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        (weights if all((folder / name).is_file() for name in files) else index).unlink()


def share_weights(folder: Path, pattern: str = "model*.safetensors") -> None:
    """Whoever may read config.json may read the weights beside it: safetensors 0.8 writes them for the owner alone."""
    config = folder / CONFIG_NAME
    with suppress(OSError):  # some file systems have no such rights
        for weights in folder.glob(pattern):
            weights.chmod(config.stat().st_mode)


def compile_options(module: nn.Module) -> dict[str, bool]:
    """Those for inductor that this version of torch knows."""
    # The analysis fails for the stem, whose length is a sum of terms (seen with torch 2.11).
    options = COMPILE_OPTIONS | ({TILES: False} if isinstance(module, SpearStem) else {})
    known = torch._inductor.list_options()
    return {name: value for name, value in options.items() if name in known}


class SpearBiasNorm(nn.Module):
    """x * exp(log_scale) / rms(x - bias), over the channels: no mean subtraction, no scale per channel."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(()))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` to the same shape."""
        wide = widened(hidden_states)  # as the scale of small inputs overflows half precision too
        scale = (wide - self.bias).square().mean(dim=-1, keepdim=True).rsqrt() * widened(self.log_scale).exp()
        return (wide * scale).to(hidden_states.dtype)


class SpearBypass(nn.Module):
    """residual + (hidden - residual) * scale, with one scale per channel."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.empty(hidden_size))

    def forward(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` twice to the same shape."""
        return torch.addcmul(residual, hidden_states - residual, self.bypass_scale)


class SpearTimeSharedDropout(nn.Module):
    """Dropout of whole channels of a sequence: one mask for all its frames, `(batch, 1, dim)`."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, dim)` to the same shape."""
        if not self.training or self.p == 0:
            return hidden_states
        return hidden_states * F.dropout(torch.ones_like(hidden_states[:, :1]), self.p, training=True)


class SpearFeedForward(nn.Module):
    """Two linear layers, with so many quarters of `config.intermediate_size` between them."""

    def __init__(self, config: SpearConfig, quarters: int):
        super().__init__()
        intermediate_size = config.intermediate_size * quarters // 4
        self.in_proj = with_init_scale(nn.Linear(config.hidden_size, intermediate_size))
        self.dropout = SpearTimeSharedDropout(config.hidden_dropout)
        self.out_proj = with_init_scale(nn.Linear(intermediate_size, config.hidden_size), 0.1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, dim)` to the same shape."""
        # For the memory of long recordings: the inner tensors are several times as wide as the others.
        # The length last: an exported graph must not depend on it.
        if (
            not can_run_in_blocks(self, hidden_states)
            or hidden_states.shape[0] * hidden_states.shape[1] <= FRAMES_AT_ONCE
            or is_watched(*self.children())
        ):
            return self._compute(hidden_states)
        rows = hidden_states.flatten(0, 1)[None]  # (1, batch * frames, dim)
        return torch.cat([self._compute(block) for block in rows.split(FRAMES_AT_ONCE, dim=1)], dim=1).view_as(
            hidden_states
        )

    def _compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.out_proj, self.dropout(swoosh_l(project(self.in_proj, hidden_states))))


class SpearAttentionWeights(nn.Module):
    """Attention weights of a layer, computed once and shared by its three attention modules."""

    def __init__(self, config: SpearConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_head_dim = config.query_head_dim
        self.pos_head_dim = config.pos_head_dim
        out_features = self.num_heads * (2 * self.query_head_dim + self.pos_head_dim)
        # The scale stands in for the division of the scores by sqrt(query_head_dim), which this attention leaves out.
        self.in_proj = with_init_scale(nn.Linear(config.hidden_size, out_features), config.query_head_dim**-0.25)
        self.linear_pos = with_init_scale(
            nn.Linear(config.pos_dim, self.num_heads * self.pos_head_dim, bias=False), 0.05
        )

    def forward(
        self, hidden_states: torch.Tensor, position_table: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weights `(batch, heads, frames, frames)`; frames with `key_mask` `(batch, frames)` False get none."""
        return self.normalize(self.scores(hidden_states, position_table), key_mask)

    def scores(self, hidden_states: torch.Tensor, position_table: torch.Tensor) -> torch.Tensor:
        """Scores `(batch, heads, frames, frames)` of every query for every key."""
        query, key, pos_query, positions = self._project(hidden_states, position_table)
        query = query.transpose(1, 2)  # (batch, heads, frames, q)
        key = key.permute(0, 2, 3, 1)  # (batch, heads, q, frames)
        pos_query = pos_query.transpose(1, 2)  # (batch, heads, frames, p)
        positions = positions.permute(1, 2, 0)  # (heads, p, 2 * frames)

        return query @ key + relative_scores(pos_query @ positions)

    def normalize(self, scores: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """Weights of scores, in their dtype: autocast would leave them in float32, for each module to convert."""
        if scores.dtype == torch.float16:  # what overflowed stays the largest, or larger than what is masked
            scores = scores.nan_to_num(0.0, neginf=-6e4)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1).to(scores.dtype)

    def blockwise(
        self, hidden_states: torch.Tensor, position_table: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> BlockwiseAttention:
        """What `forward` returns, without the tensor of all weights: see [`BlockwiseAttention`]."""
        return BlockwiseAttention(*self._project(hidden_states, position_table), key_mask=key_mask)

    def _project(self, hidden_states: torch.Tensor, position_table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and queries of positions, `(batch, frames, heads, dim)`, and positions, `(2 * frames, heads,
        dim)`."""
        query_size = self.num_heads * self.query_head_dim
        query, key, pos_query = project(self.in_proj, hidden_states).split(
            [query_size, query_size, self.num_heads * self.pos_head_dim], dim=-1
        )
        return (
            query.unflatten(-1, (self.num_heads, self.query_head_dim)),
            key.unflatten(-1, (self.num_heads, self.query_head_dim)),
            pos_query.unflatten(-1, (self.num_heads, self.pos_head_dim)),
            self.linear_pos(position_table).unflatten(-1, (self.num_heads, self.pos_head_dim)),
        )


def weigh(attention_weights: torch.Tensor | BlockwiseAttention, values: torch.Tensor) -> torch.Tensor:
    """Values `(batch, frames, heads, dim)` weighted by as many heads from the first on, of the same shape."""
    if isinstance(attention_weights, BlockwiseAttention):
        return attention_weights.attend(values)
    return (attention_weights[:, : values.shape[2]] @ values.transpose(1, 2)).transpose(1, 2)


class SpearSelfAttention(nn.Module):
    """Values weighted by the attention weights of the layer."""

    def __init__(self, config: SpearConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.value_head_dim = config.value_head_dim
        value_size = self.num_heads * self.value_head_dim
        self.in_proj = with_init_scale(nn.Linear(config.hidden_size, value_size))
        self.out_proj = with_init_scale(nn.Linear(value_size, config.hidden_size), 0.05)

    def forward(
        self, hidden_states: torch.Tensor, attention_weights: torch.Tensor | BlockwiseAttention
    ) -> torch.Tensor:
        """`(batch, frames, dim)` and `(batch, heads, frames, frames)` to `(batch, frames, dim)`."""
        value = self.in_proj(hidden_states).unflatten(-1, (self.num_heads, self.value_head_dim))
        context = weigh(attention_weights, value).flatten(-2)  # (batch, frames, heads * value_head_dim)
        return self.out_proj(context)


class SpearNonlinAttention(nn.Module):
    """Gated values weighted by the attention weights of the first head."""

    def __init__(self, config: SpearConfig):
        super().__init__()
        inner_size = 3 * config.hidden_size // 4
        self.in_proj = with_init_scale(nn.Linear(config.hidden_size, 3 * inner_size))
        self.out_proj = with_init_scale(nn.Linear(inner_size, config.hidden_size), 0.05)

    def forward(
        self, hidden_states: torch.Tensor, attention_weights: torch.Tensor | BlockwiseAttention
    ) -> torch.Tensor:
        """`(batch, frames, dim)` and `(batch, heads, frames, frames)` to `(batch, frames, dim)`."""
        gate, value, out_gate = project(self.in_proj, hidden_states).chunk(3, dim=-1)
        context = weigh(attention_weights, (value * gate.tanh()).unsqueeze(2)).squeeze(2)  # (batch, frames, inner)
        if context.dtype == torch.float16:
            # A product of two activations, which overflows long before its projection: the scale goes around that.
            scale = out_gate.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1.0)  # (batch, frames, 1)
            projected = self.out_proj(context * (out_gate / scale))
            bias = self._output_bias(context).to(projected.dtype)
            return (projected - bias) * scale + bias
        return project(self.out_proj, context * out_gate)

    def _output_bias(self, context: torch.Tensor) -> torch.Tensor:
        """What `out_proj` gives for zeros; asked of it where it is an adapter, say, or its weights are offloaded."""
        if type(self.out_proj) is nn.Linear and self.out_proj.bias.device == context.device:
            return self.out_proj.bias
        return self.out_proj(torch.zeros_like(context[:1, :1]))  # (1, 1, dim)


def computes_in_half(hidden_states: torch.Tensor) -> bool:
    """Whether this is on a GPU and convolutions of it are in half precision: with channels last in memory these are
    then several times as fast, but slow in full precision."""
    if not hidden_states.is_cuda:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden_states.dtype
    return dtype in (torch.float16, torch.bfloat16)


class SpearDepthwiseConv(nn.Conv1d):
    """Convolution over time of every channel on its own, with zeros around the sequence."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, frames)` to the same."""
        if is_trained_by_compiler():
            image = in_autocast(hidden_states).unsqueeze(2)
            return DepthwiseConv2d.apply(image, self.weight.unsqueeze(2), self.bias).squeeze(2)
        if computes_in_half(hidden_states):
            image, weight = hidden_states.unsqueeze(2), channels_last(self.weight.unsqueeze(2))
            return F.conv2d(image, weight, self.bias, padding=(0, self.padding[0]), groups=self.groups).squeeze(2)
        if not are_blocks_possible(hidden_states):
            return super().forward(hidden_states)
        if can_run_in_blocks(self, hidden_states):
            # As a row of an image whose channels come last in memory: twenty times as fast on a CPU, with equal bits.
            image, weight = hidden_states.unsqueeze(2), self.weight.unsqueeze(2)
            return F.conv2d(image, weight, self.bias, padding=(0, self.padding[0]), groups=self.groups).squeeze(2)
        # As a column of it: forward and backward together are seven times as fast, while the row's gradient is slow.
        image, weight = hidden_states.unsqueeze(3), channels_last(self.weight.unsqueeze(3))
        return F.conv2d(image, weight, self.bias, padding=(self.padding[0], 0), groups=self.groups).squeeze(3)


class SpearConvolution(nn.Module):
    """Gated depthwise convolution over time; padded frames enter it as zeros."""

    def __init__(self, config: SpearConfig, kernel_size: int):
        super().__init__()
        size = config.hidden_size
        self.in_proj = with_init_scale(nn.Linear(size, 2 * size))
        self.depthwise_conv = with_init_scale(SpearDepthwiseConv(size, kernel_size))
        self.out_proj = with_init_scale(nn.Linear(size, size), 0.05)

    def forward(self, hidden_states: torch.Tensor, valid_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, frames, dim)` to the same shape; `valid_mask` `(batch, frames)`, False for padding."""
        hidden_states = gated(project(self.in_proj, hidden_states))
        if valid_mask is not None:
            hidden_states = hidden_states.masked_fill(~valid_mask[:, :, None], 0.0)
        hidden_states = self.depthwise_conv(hidden_states.transpose(1, 2)).transpose(1, 2)
        return project(self.out_proj, swoosh_r(hidden_states))


class SpearLayer(GradientCheckpointingLayer):
    """A Zipformer layer: modules around shared attention weights, and a bypass around all; (batch, frames, dim)."""

    def __init__(self, config: SpearConfig, kernel_size: int):
        super().__init__()
        size = config.hidden_size
        self.self_attn_weights = SpearAttentionWeights(config)
        self.self_attn1 = SpearSelfAttention(config)
        self.self_attn2 = SpearSelfAttention(config)
        self.feed_forward1 = SpearFeedForward(config, 3)
        self.feed_forward2 = SpearFeedForward(config, 4)
        self.feed_forward3 = SpearFeedForward(config, 5)
        self.nonlin_attention = SpearNonlinAttention(config)
        self.conv_module1 = SpearConvolution(config, kernel_size)
        self.conv_module2 = SpearConvolution(config, kernel_size)
        self.norm = SpearBiasNorm(size)
        self.bypass = SpearBypass(size)
        self.bypass_mid = SpearBypass(size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_table: torch.Tensor,
        valid_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(batch, frames, dim)` to the same shape; `position_table` `(2 * frames, position_dim)`."""
        residual = hidden_states
        attention_weights = self._attention_weights(
            hidden_states, position_table, valid_mask, bool(kwargs.get("output_attentions"))
        )
        hidden_states = hidden_states + self.feed_forward1(hidden_states)
        hidden_states = hidden_states + self.nonlin_attention(hidden_states, attention_weights)
        hidden_states = hidden_states + self.self_attn1(hidden_states, attention_weights)
        hidden_states = hidden_states + self.conv_module1(hidden_states, valid_mask)
        hidden_states = hidden_states + self.feed_forward2(hidden_states)
        hidden_states = self.bypass_mid(residual, hidden_states)
        hidden_states = hidden_states + self.self_attn2(hidden_states, attention_weights)
        hidden_states = hidden_states + self.conv_module2(hidden_states, valid_mask)
        hidden_states = hidden_states + self.feed_forward3(hidden_states)
        return self.bypass(residual, self.norm(hidden_states))

    def _attention_weights(
        self,
        hidden_states: torch.Tensor,
        position_table: torch.Tensor,
        valid_mask: torch.Tensor | None,
        is_recorded: bool,
    ) -> torch.Tensor | BlockwiseAttention:
        """Of the layer: a tensor for few frames, and where somebody looks at it."""
        module = self.self_attn_weights
        if not is_recorded and torch.compiler.is_compiling() and not is_watched(module):
            # Past the recorder's hook, which breaks the graph of a layer that is compiled by itself.
            return module.forward(hidden_states, position_table, valid_mask)
        if not is_recorded and are_blocks_possible(hidden_states) and not is_watched(module):
            enough = MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS if torch.is_grad_enabled() else MIN_FRAMES_FOR_BLOCKS
            if hidden_states.shape[1] >= enough:
                return module.blockwise(hidden_states, position_table, valid_mask)
        return module(hidden_states, position_table, valid_mask)


class SpearDownsample(nn.Module):
    """Weighted mean of each group of `factor` frames; the last group is filled up with the last valid frame."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.empty(factor))

    def forward(self, hidden_states: torch.Tensor, valid_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, frames, dim)` to `(batch, ceil(frames / factor), dim)`."""
        frames = hidden_states.shape[1]
        groups = (frames + self.factor - 1) // self.factor
        index = torch.arange(groups * self.factor, device=hidden_states.device).clamp(max=frames - 1)
        if valid_mask is None:
            hidden_states = hidden_states.index_select(1, index)
        else:
            # Each utterance's own last frame, so that it does not depend on what it is batched with.
            last = (valid_mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # (batch, 1)
            index = torch.minimum(index, last)[:, :, None].expand(-1, -1, hidden_states.shape[-1])
            hidden_states = hidden_states.gather(1, index)
        # As many as there are groups: their gradients are sums over channels, and then of these few.
        weights = self.bias.softmax(dim=0).expand(hidden_states.shape[0], groups, -1)
        return (hidden_states.unflatten(1, (groups, self.factor)) * weights[..., None]).sum(dim=2)


class SpearUpsample(nn.Module):
    """Repeats every frame `factor` times and cuts to `frames`; its outputs are the model's `hidden_states`."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states: torch.Tensor, frames: int) -> torch.Tensor:
        """`(batch, ceil(frames / factor), dim)` to `(batch, frames, dim)`."""
        if self.factor == 1:
            return hidden_states
        index = torch.arange(frames, device=hidden_states.device) // self.factor
        return hidden_states.index_select(1, index)


class SpearStack(nn.Module):
    """Layers at one frame rate, `factor` times lower than that of the result."""

    def __init__(self, config: SpearConfig, stack_idx: int):
        super().__init__()
        kernel_size = config.conv_kernel_sizes[stack_idx]
        self.layers = nn.ModuleList(
            [SpearLayer(config, kernel_size) for _ in range(config.num_layers_per_stack[stack_idx])]
        )
        self.upsample = SpearUpsample(config.downsampling_factors[stack_idx])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_table: torch.Tensor,
        valid_mask: torch.Tensor | None,
        frames: int,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(batch, ceil(frames / factor), dim)` to `(batch, frames, dim)`."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_table, valid_mask, **kwargs)
            upsampled = self.upsample(hidden_states, frames)
        return upsampled


class SpearDownsampledStack(nn.Module):
    """A stack at a lower frame rate, between a downsampling and an upsampling, with a bypass around all of it."""

    def __init__(self, config: SpearConfig, stack_idx: int):
        super().__init__()
        self.downsample = SpearDownsample(config.downsampling_factors[stack_idx])
        self.stack = SpearStack(config, stack_idx)
        self.out_combiner = SpearBypass(config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_table: torch.Tensor,
        valid_mask: torch.Tensor | None,
        frames: int,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(batch, frames, dim)` to the same shape; `position_table` is that of `frames`."""
        downsampled = self.downsample(hidden_states, valid_mask)
        length = downsampled.shape[1]
        # Indices rather than slices: their shapes are known to an exported graph of any length.
        if valid_mask is not None:
            places = torch.arange(length, device=valid_mask.device) * self.downsample.factor
            valid_mask = valid_mask.index_select(1, places)
        # The table of a shorter sequence is the middle of that of a longer one.
        middle = torch.arange(2 * length, device=position_table.device) + (frames - length)
        position_table = position_table.index_select(0, middle)
        return self.out_combiner(hidden_states, self.stack(downsampled, position_table, valid_mask, frames, **kwargs))


class SpearDepthwiseConv2d(nn.Conv2d):
    """Convolution over time and frequency of every channel on its own, with zeros around."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, frames, bins)` to the same."""
        if is_trained_by_compiler():
            return DepthwiseConv2d.apply(in_autocast(hidden_states), self.weight, self.bias)
        on_cpu = torch.is_grad_enabled() and are_blocks_possible(hidden_states)
        if not on_cpu and not computes_in_half(hidden_states):
            return super().forward(hidden_states)
        # Several times as fast backwards.
        return F.conv2d(hidden_states, channels_last(self.weight), self.bias, padding=self.padding, groups=self.groups)


class SpearConvNeXt(nn.Module):
    """ConvNeXt block without norm, over time and frequency."""

    def __init__(self, channels: int):
        super().__init__()
        self.context = 3  # frames to either side
        self.depthwise_conv = with_init_scale(SpearDepthwiseConv2d(channels, 2 * self.context + 1))
        self.pointwise_conv1 = with_init_scale(nn.Conv2d(channels, 3 * channels, 1))
        self.pointwise_conv2 = with_init_scale(nn.Conv2d(3 * channels, channels, 1), 0.01)

    def forward(self, hidden_states: torch.Tensor, kept: slice | None = None) -> torch.Tensor:
        """`(batch, channels, frames, bins)` to the same, or only the frames `kept` of it."""
        branch = self.depthwise_conv(hidden_states)
        if kept is not None:
            hidden_states, branch = hidden_states[:, :, kept], branch[:, :, kept]
        branch = swoosh_l(self.pointwise_conv1(branch))
        return hidden_states + self.pointwise_conv2(branch)


class SpearStem(nn.Module):
    """Convolutions that take the filter bank at 100 Hz to the encoder's width at 50 Hz."""

    def __init__(self, config: SpearConfig):
        super().__init__()
        channels = config.stem_channels
        self.num_mel_bins = config.num_mel_bins
        self.conv1 = with_init_scale(nn.Conv2d(1, channels[0], 3, padding=(0, 1)))
        self.conv2 = with_init_scale(nn.Conv2d(channels[0], channels[1], 3, stride=2))
        self.conv3 = with_init_scale(nn.Conv2d(channels[1], channels[2], 3, stride=(1, 2)))
        self.convnext = SpearConvNeXt(channels[2])
        bins = ((config.num_mel_bins - 1) // 2 - 1) // 2  # 31 of 128
        self.out_proj = with_init_scale(nn.Linear(channels[2] * bins, config.hidden_size))
        self.norm = SpearBiasNorm(config.hidden_size)
        self.dropout = SpearTimeSharedDropout(config.hidden_dropout)

    def forward(self, input_features: torch.Tensor, valid_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, m, num_mel_bins)` to `(batch, (m - 7) // 2, hidden_size)`; the mask is that of the result."""
        if torch.compiler.is_compiling():
            torch._check(input_features.shape[-1] == self.num_mel_bins)  # a constant to a compiler of any shape
        hidden_states = input_features[:, None]  # (batch, 1, m, bins)
        parts = [module for module in self.modules() if module is not self]
        if can_run_in_blocks(self, input_features) and not is_watched(*parts):
            return self._compute_in_blocks(hidden_states, valid_mask)
        hidden_states = swoosh_r(self.conv2(swoosh_r(self.conv1(hidden_states))))
        if are_blocks_possible(hidden_states) or computes_in_half(hidden_states):
            hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        hidden_states = swoosh_r(self.conv3(hidden_states))
        if valid_mask is not None:
            # The ConvNeXt sees three frames to either side: those past the end must be as if there were none.
            hidden_states = hidden_states.masked_fill(~valid_mask[:, None, :, None], 0.0)
        return self._project(self.convnext(hidden_states))

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.transpose(1, 2).flatten(-2)  # (batch, frames, channels * bins)
        return self.dropout(self.norm(project(self.out_proj, hidden_states)))

    def _compute_in_blocks(self, input_features: torch.Tensor, valid_mask: torch.Tensor | None) -> torch.Tensor:
        """As `forward`, from `(batch, 1, m, bins)`, for a few frames at a time and with channels last in memory."""
        batch, frames = input_features.shape[0], (input_features.shape[2] - 7) // 2
        result = input_features.new_empty(batch, frames, *self.norm.bias.shape)
        context = self.convnext.context
        for start in range(0, frames, STEM_FRAMES_AT_ONCE):
            stop = min(start + STEM_FRAMES_AT_ONCE, frames)
            first, last = max(start - context, 0), min(stop + context, frames)
            for row in range(batch):
                # Frame i of the third convolution sees the frames 2 i ... 2 i + 8 of the filter bank.
                hidden_states = input_features[row : row + 1, :, 2 * first : 2 * last + 7]
                hidden_states = swoosh_r(self.conv2(swoosh_r(self.conv1(hidden_states))))
                hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
                hidden_states = swoosh_r(self.conv3(hidden_states))  # (1, channels, last - first, bins)
                if valid_mask is not None:
                    # In place, which leaves the channels last.
                    hidden_states.masked_fill_(~valid_mask[row, first:last, None], 0.0)
                hidden_states = self.convnext(hidden_states, slice(start - first, stop - first))
                result[row, start:stop] = self._project(hidden_states)[0]
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@auto_docstring
class SpearPreTrainedModel(PreTrainedModel):
    config: SpearConfig
    base_model_prefix = "spear"
    main_input_name = "input_features"
    input_modalities = "audio"
    _input_embed_layer = "stem"  # where adapters under a frozen stem have gradients begin
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpearLayer", "SpearStem"]
    # The weights are shared by three modules of a layer: there is no call of a fused attention to switch to.
    _supports_sdpa = False
    _supports_flash_attn = False
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(SpearStem, capture_initial_hidden_state=False),
            OutputRecorder(SpearUpsample, capture_initial_hidden_state=False),
        ],
        "attentions": OutputRecorder(SpearAttentionWeights),
    }
    # Left over in published checkpoints from an older layer, and unused there too.
    _keys_to_ignore_on_load_unexpected = [r"layers\.\d+\.bypass_scale$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if hasattr(module, "init_scale"):
            scale = 1.0 if module.init_scale is None else module.init_scale
            fan_in = module.weight[0].numel()
            init.uniform_(module.weight, -scale * fan_in**-0.5, scale * fan_in**-0.5)
            if module.bias is not None:
                bound = fan_in**-0.5 if module.init_scale is None else 0.1 * scale
                init.uniform_(module.bias, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, SpearBiasNorm):
            init.constant_(module.log_scale, 1.0)
            init.normal_(module.bias, mean=0.0, std=1e-4)
        elif isinstance(module, SpearBypass):
            init.constant_(module.bypass_scale, 0.5)
        elif isinstance(module, SpearDownsample):
            init.zeros_(module.bias)
        elif isinstance(module, SpearModel):
            init.normal_(module.masked_spec_embed, mean=0.0, std=1.0)
        elif isinstance(module, SpearAMSoftmaxLoss):
            init.normal_(module.weight, mean=0.0, std=1.0)
        elif isinstance(module, SpearHeadModel) and module.layer_weights is not None:
            init.constant_(module.layer_weights, 1.0 / module.layer_weights.shape[0])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in [`PreTrainedModel.from_pretrained`]; checkpoints with the names of the published code load too."""
        kwargs.setdefault("key_mapping", PUBLISHED_NAMES)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        *args,
        variant: str | None = None,
        save_original_format: bool = False,
        **kwargs,
    ):
        """As in [`PreTrainedModel.save_pretrained`], but the names of this library are always written by default.

        `save_original_format=True` writes the names of the checkpoint that the model was loaded from. Of one file of
        weights and the index of several, the one of an earlier save is removed: transformers would load the one file.
        """
        kwargs |= {"variant": variant, "save_original_format": save_original_format}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            remove_earlier_weights(Path(save_directory), variant)
            share_weights(Path(save_directory))

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compile the stem, every layer and what is between the stacks where they are, for any batch and length.

        Layers of one kernel size share a graph. `torch.compile` of the model makes one of all layers, one after the
        other, and takes several times as long. For GPUs: on a CPU nothing is faster than the model as it is.
        """
        # Graphs of all layers together, of which there is one for each kernel size, dtype, mode, and mask or none.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
        between = [stack.out_combiner for stack in self.modules() if isinstance(stack, SpearDownsampledStack)]
        for module in self.modules():
            if isinstance(module, (SpearStem, SpearLayer, SpearDownsample)) or module in between:
                options = compile_options(module) if backend == "inductor" else None
                module.compile(backend=backend, dynamic=True, options=options)

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor | int) -> torch.Tensor | int:
        """Encoder frames of so many frames of the 100 Hz filter bank; works on integers and on tensors of them."""
        lengths = (input_lengths - 7) // 2
        # CODEPATH: published models end at 50 Hz, or some speech-audio models of version 1 at 25 Hz.
        if self.config.output_downsampling_factor == 2:
            lengths = (lengths + 1) // 2
        return lengths

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Mask of the encoder's frames, bool `(batch, feature_vector_length)`, of the mask of the filter bank."""
        lengths = self._get_feat_extract_output_lengths(valid_lengths(attention_mask))
        return torch.arange(feature_vector_length, device=attention_mask.device) < lengths[:, None]


@auto_docstring(
    custom_intro="""
    The SPEAR encoder: filter bank frames in, hidden states at 50 Hz (or 25 Hz) out.
    """
)
class SpearModel(SpearPreTrainedModel):
    def __init__(self, config: SpearConfig):
        config.validate_architecture()  # again: `from_pretrained` and users set values of one that is made
        super().__init__(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.num_mel_bins))
        self.stem = SpearStem(config)
        self.stacks = nn.ModuleList(
            [
                (SpearStack if factor == 1 else SpearDownsampledStack)(config, stack_idx)
                for stack_idx, factor in enumerate(config.downsampling_factors)
            ]
        )
        self.output_downsample = None
        # CODEPATH: see `_get_feat_extract_output_lengths`.
        if config.output_downsampling_factor > 1:
            self.output_downsample = SpearDownsample(config.output_downsampling_factor)
        self.post_init()

    def _mask_input_features(
        self,
        input_features: torch.Tensor,
        mask_time_indices: torch.Tensor | None,
        mask_feature_indices: torch.Tensor | None,
    ) -> torch.Tensor:
        """Zero whole mel bins, then put the mask embedding in place of whole frames (paper section 3)."""
        # CODEPATH: for fine-tuning; off in all published models.
        if self.training and self.config.apply_spec_augment:
            batch, frames, bins = input_features.shape
            device = input_features.device
            # CODEPATH: fine-tuned models only, as above.
            if mask_time_indices is None and self.config.mask_time_prob > 0:
                mask_time_indices = random_spans(
                    (batch, frames), self.config.mask_time_prob, self.config.mask_time_length, device
                )
            # CODEPATH: fine-tuned models only, as above.
            if mask_feature_indices is None and self.config.mask_feature_prob > 0:
                mask_feature_indices = random_spans(
                    (batch, bins), self.config.mask_feature_prob, self.config.mask_feature_length, device
                )
        if mask_feature_indices is not None:
            input_features = input_features.masked_fill(mask_feature_indices[:, None, :].bool(), 0.0)
        embedding = self.masked_spec_embed.to(input_features.dtype)
        if mask_time_indices is not None:
            input_features = torch.where(mask_time_indices[:, :, None].bool(), embedding, input_features)
        elif self.training:
            # Keeps the embedding in the graph: distributed training refuses parameters without a gradient.
            input_features = input_features + 0.0 * embedding
        return input_features

    def _with_gradient(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Reentrant checkpoints, whose inputs have no gradient under a frozen stem, would give none to adapters."""
        if (
            self.training
            and torch.is_grad_enabled()
            and not hidden_states.requires_grad
            and not torch.compiler.is_compiling()
            and self.is_gradient_checkpointing
            and any(param.requires_grad for param in self.stacks.parameters())
        ):
            return hidden_states.requires_grad_()
        return hidden_states

    def _check_shapes(self, input_features: torch.Tensor, **masks: torch.Tensor | None) -> None:
        bins = self.config.num_mel_bins
        if input_features.dim() != 3 or input_features.shape[2] != bins:
            raise ValueError(
                f"`input_features` has shape {tuple(input_features.shape)}, but (batch, frames, {bins}) is needed: "
                "the filter bank that `SpearFeatureExtractor` makes of waveforms."
            )
        if input_features.shape[1] < MIN_FRAMES:
            raise ValueError(
                f"`input_features` has {input_features.shape[1]} frames, but the encoder needs at least {MIN_FRAMES} "
                "(1360 samples, 85 ms); pad the audio, for example with `pad_short=True` in the feature extractor."
            )
        for name, mask in masks.items():
            if mask is not None and mask.shape != input_features.shape[:2]:
                raise ValueError(
                    f"`{name}` has shape {tuple(mask.shape)}, but that of the frames of `input_features` is needed: "
                    f"{tuple(input_features.shape[:2])}."
                )
        mask = masks["attention_mask"]
        # To look is to wait for a GPU, but costs nothing on a CPU.
        if mask is not None and are_blocks_possible(input_features):
            begins_again = (mask[:, 1:] > mask[:, :-1]).any(dim=-1)  # (batch,)
            if begins_again.any():
                raise ValueError(
                    f"`attention_mask` has a 0 before a 1 in row {int(begins_again.nonzero()[0])}: utterances must be "
                    "padded on the right."
                )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        mask_feature_indices: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpearModelOutput:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Log-mel filter bank at 100 Hz as [`SpearFeatureExtractor`] makes it: 9 frames or more, padded on the right.
        attention_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*):
            1 for frames of the utterance, 0 for padding, which then has no influence on the frames of the utterance.
        mask_time_indices (`torch.BoolTensor` of shape `(batch_size, frames)`, *optional*):
            Frames of the filter bank that are replaced by the mask embedding.
        mask_feature_indices (`torch.BoolTensor` of shape `(batch_size, num_mel_bins)`, *optional*):
            Mel bins that are set to 0 in the whole utterance, before the frames are replaced.

        Example:

        ```python
        >>> import torch
        >>> from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
        >>> model = SpearModel(SpearConfig(hidden_size=64, intermediate_size=192)).eval()
        >>> inputs = SpearFeatureExtractor()(torch.randn(16000), sampling_rate=16000, return_tensors="pt")
        >>> model(**inputs).last_hidden_state.shape
        torch.Size([1, 46, 64])
        ```
        """
        self._check_shapes(input_features, attention_mask=attention_mask, mask_time_indices=mask_time_indices)
        input_features = input_features.to(self.stem.conv1.weight.dtype)
        if attention_mask is not None:
            # A gradient of zero times padding that is not finite would be NaN.
            input_features = input_features.masked_fill(~attention_mask.bool()[:, :, None], PADDING_VALUE)
        input_features = self._mask_input_features(input_features, mask_time_indices, mask_feature_indices)
        frames = (input_features.shape[1] - 7) // 2
        valid_mask = None
        if attention_mask is not None:
            lengths = (valid_lengths(attention_mask) - 7) // 2
            valid_mask = torch.arange(frames, device=input_features.device) < lengths[:, None]  # (batch, frames)

        kwargs.setdefault("output_attentions", self.config.output_attentions)
        kwargs.pop("output_hidden_states", None)  # layers do the same either way, compiled ones in the same graph
        # Without padding there is nothing to mask. To look is to wait for a GPU, but costs nothing on a CPU.
        is_whole = valid_mask is not None and are_blocks_possible(input_features) and bool(valid_mask.all())
        needed_mask = None if is_whole else valid_mask
        hidden_states = self._with_gradient(self.stem(input_features, needed_mask))
        # Under autocast wider, as the first bypass makes it: layers are then compiled once for all.
        hidden_states = hidden_states.to(self.stem.conv1.weight.dtype)
        position_table = relative_position_table(
            frames, self.config.pos_dim, hidden_states.device, hidden_states.dtype
        )
        position_table = F.dropout(position_table, self.config.position_dropout, training=self.training)
        for stack in self.stacks:
            hidden_states = stack(hidden_states, position_table, needed_mask, frames, **kwargs)
        if self.output_downsample is not None:
            hidden_states = self.output_downsample(hidden_states, valid_mask)
            if valid_mask is not None:
                valid_mask = valid_mask[:, :: self.output_downsample.factor]
        return SpearModelOutput(
            last_hidden_state=hidden_states,
            attention_mask=None if valid_mask is None else valid_mask.to(attention_mask.dtype),
        )


def random_spans(shape: tuple[int, int], probability: float, length: int, device: torch.device) -> torch.Tensor:
    """Bool mask `(batch, size)` of spans of `length`, each place being a start with `probability / length`.

    Overlapping spans make the masked share a little smaller than `probability`. Drawn from torch's generator, so that
    gradient checkpointing and seeds reproduce it.
    """
    starts = (torch.rand(shape, device=device) < probability / length).float()
    return F.max_pool1d(F.pad(starts, (length - 1, 0))[:, None], length, stride=1)[:, 0] > 0


@auto_docstring(
    custom_intro="""
    What all heads share: the encoder, its freezing, and the hidden states that the head reads.
    """
)
class SpearHeadModel(SpearPreTrainedModel):
    accepts_loss_kwargs = False  # losses are means of a batch: the Trainer divides them by the accumulation steps
    uses_layer_weights = False

    def __init__(self, config: SpearConfig):
        super().__init__(config)
        self.spear = SpearModel(config)
        self.layer_weights = None
        # CODEPATH: probes in the manner of SUPERB have the weights, other fine-tuned models have not.
        if self.uses_layer_weights and config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))

    def freeze_base_model(self):
        """Stop the gradients of the encoder's parameters, so that only the head is trained."""
        for param in self.spear.parameters():
            param.requires_grad = False

    def freeze_feature_encoder(self):
        """Stop the gradients of the convolutional stem, the counterpart of Wav2Vec2's feature encoder."""
        for param in self.spear.stem.parameters():
            param.requires_grad = False

    def _encode(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, SpearModelOutput]:
        """Hidden states `(batch, frames, dim)` for the head, the mask of their frames, and the encoder's output.

        The weighted sum runs over all hidden states, at 50 Hz; where the last hidden state is at 25 Hz the sum takes
        the encoder's own way there.
        """
        kwargs["return_dict"] = True  # whatever the configuration says of what the user gets
        if self.layer_weights is None:
            outputs = self.spear(input_features, attention_mask=attention_mask, **kwargs)
            hidden_states = outputs.last_hidden_state
        else:
            requested = kwargs.pop("output_hidden_states", None)
            requested = self.config.output_hidden_states if requested is None else requested
            outputs = self.spear(input_features, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
            weights = self.layer_weights.softmax(dim=0)
            hidden_states = sum(weight * state for weight, state in zip(weights, outputs.hidden_states))
            if self.spear.output_downsample is not None:
                valid_mask = None
                if attention_mask is not None:
                    lengths = (valid_lengths(attention_mask) - 7) // 2
                    valid_mask = torch.arange(hidden_states.shape[1], device=lengths.device) < lengths[:, None]
                hidden_states = self.spear.output_downsample(hidden_states, valid_mask)
            if not requested:
                outputs.hidden_states = None
        if outputs.attention_mask is None:
            valid_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        else:
            valid_mask = outputs.attention_mask.bool()
        return hidden_states, valid_mask, outputs

    def _check_class_labels(self, labels: torch.Tensor, num_classes: int) -> None:
        if torch.compiler.is_compiling() or labels.numel() == 0:  # a compiled graph cannot branch on values
            return
        if ((labels >= num_classes) | ((labels < 0) & (labels != -100))).any():
            raise ValueError(
                f"labels lie in [{labels.min()}, {labels.max()}], but the model has {num_classes} classes: they must "
                f"be in [0, {num_classes - 1}], or -100 to be ignored."
            )


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Mean binary cross-entropy `()` of labels `(..., num_labels)` that are not -100 and, where given, `counted`
    `(...)`."""
    known = labels != -100
    # A compiled graph cannot branch on values.
    if not torch.compiler.is_compiling() and (known & ((labels < 0) | (labels > 1))).any():
        raise ValueError(
            f"labels lie in [{labels.min()}, {labels.max()}], but those of problem_type 'multi_label_classification' "
            "must be in [0, 1], or -100 to be ignored."
        )
    targets = labels.to(torch.float32).masked_fill(~known, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    if counted is not None:
        known = known & counted.unsqueeze(-1)
    return losses.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)


def masked_mean(hidden_states: torch.Tensor, valid_mask: torch.Tensor) -> torch.Tensor:
    """Mean `(batch, dim)` over the valid frames of `(batch, frames, dim)`; padding has no influence."""
    total = widened(hidden_states).masked_fill(~valid_mask[:, :, None], 0.0).sum(dim=1)
    return (total / valid_mask.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


def ctc_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logit_lengths: torch.Tensor,
    blank_token_id: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> torch.Tensor:
    """The CTC loss for versions of transformers that have none; labels of -100 or the blank are padding."""
    is_label = (labels != -100) & (labels != blank_token_id)
    log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32).transpose(0, 1)  # (frames, batch, vocab)
    return F.ctc_loss(
        log_probabilities,
        labels[is_label],
        logit_lengths,
        is_label.sum(dim=-1),
        blank=blank_token_id,
        reduction=reduction,
        zero_infinity=zero_infinity,
    )


@auto_docstring(
    custom_intro="""
    SPEAR with a linear layer for connectionist temporal classification. The logits of padded frames choose the blank.
    """
)
class SpearForCTC(SpearHeadModel):
    uses_layer_weights = True

    def __init__(self, config: SpearConfig):
        super().__init__(config)
        if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
            raise ValueError(
                f"`pad_token_id={config.pad_token_id}`, the blank, is not among the `vocab_size={config.vocab_size}` "
                "classes: set both as the tokenizer has them."
            )
        if "ForCTC" not in LOSS_MAPPING:  # older versions of transformers, such as 5.17
            self.loss_function = ctc_loss
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Log-mel filter bank at 100 Hz as [`SpearFeatureExtractor`] makes it.
        labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
            Label ids in `[0, ..., config.vocab_size - 1]`; -100 and the blank (`config.pad_token_id`) are padding.
        """
        if labels is not None:
            if self.config.pad_token_id is None:
                raise ValueError("`pad_token_id=None`, but CTC needs a blank: set `config.pad_token_id`.")
            self._check_class_labels(labels, self.config.vocab_size)
        hidden_states, valid_mask, outputs = self._encode(input_features, attention_mask, **kwargs)
        logits = self.lm_head(self.dropout(hidden_states))
        if self.config.pad_token_id is not None:
            # Padding says blank: whoever decodes a batch greedily, padding and all, gets what each row alone gives.
            is_blank = torch.arange(logits.shape[-1], device=logits.device) == self.config.pad_token_id
            blank = logits.new_zeros(logits.shape[-1]).masked_fill(~is_blank, torch.finfo(logits.dtype).min)
            logits = torch.where(valid_mask[:, :, None], logits, blank)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                logit_lengths=valid_mask.sum(dim=-1),
                blank_token_id=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(
    custom_intro="""
    SPEAR with a classifier of the mean over the frames, for one label per utterance, several, or a regression.
    """
)
class SpearForSequenceClassification(SpearHeadModel):
    uses_layer_weights = True

    def __init__(self, config: SpearConfig):
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.dropout = nn.Dropout(config.final_dropout)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Log-mel filter bank at 100 Hz as [`SpearFeatureExtractor`] makes it.
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            What they mean follows `config.problem_type`: class ids, multi-hot vectors (binary cross-entropy), or
            targets of a regression. Of ids and vectors, -100 is ignored. If it is not set: a regression where there is
            one label, else class ids where the labels are integers of one dimension, else multi-hot vectors.
        """
        hidden_states, valid_mask, outputs = self._encode(input_features, attention_mask, **kwargs)
        pooled = masked_mean(self.projector(hidden_states), valid_mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            problem = self.config.problem_type
            if problem is None:
                if self.config.num_labels == 1:
                    problem = "regression"
                elif labels.dim() == 1 and not labels.is_floating_point():
                    problem = "single_label_classification"
                else:
                    problem = "multi_label_classification"
            loss = self._loss(logits, labels, problem)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, problem: str) -> torch.Tensor:
        logits = logits.float()
        if problem == "single_label_classification":
            self._check_class_labels(labels, self.config.num_labels)
            return F.cross_entropy(logits, labels.flatten().long())
        if labels.numel() != logits.numel():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)} for "
                f"problem_type {problem!r}."
            )
        labels = labels.reshape(logits.shape)
        if problem == "multi_label_classification":
            return multi_label_loss(logits, labels)
        return F.mse_loss(logits, labels.to(logits.dtype))


@auto_docstring(
    custom_intro="""
    SPEAR with a classifier of every frame, for tasks such as diarisation and sound event detection.
    """
)
class SpearForAudioFrameClassification(SpearHeadModel):
    uses_layer_weights = True

    def __init__(self, config: SpearConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Log-mel filter bank at 100 Hz as [`SpearFeatureExtractor`] makes it.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Class ids of the frames, or vectors per frame, `(batch_size, sequence_length, num_labels)`: one-hot, or
            multi-hot (binary cross-entropy) with `config.problem_type = "multi_label_classification"`. -100 is
            ignored, and padded frames never count.
        """
        hidden_states, valid_mask, outputs = self._encode(input_features, attention_mask, **kwargs)
        logits = self.classifier(self.dropout(hidden_states))
        loss = None
        if labels is not None:
            if labels.shape[:2] != logits.shape[:2] or labels.shape[2:] not in ((), logits.shape[2:]):
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: one "
                    f"label or one vector of {self.config.num_labels} per frame is needed."
                )
            if labels.dim() == 3 and self.config.problem_type == "multi_label_classification":
                loss = multi_label_loss(logits, labels, valid_mask)
            else:
                if labels.dim() == 3:
                    labels = self._one_hot_to_ids(labels)
                self._check_class_labels(labels, self.config.num_labels)
                counted = valid_mask & (labels != -100)
                losses = F.cross_entropy(
                    logits.float().transpose(1, 2), labels.long(), ignore_index=-100, reduction="none"
                )
                loss = losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _one_hot_to_ids(self, labels: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, num_labels)` to `(batch, frames)`, with -100 for frames that hold any."""
        if not torch.compiler.is_compiling() and ((labels == 1).sum(dim=-1) > 1).any():
            raise ValueError(
                "labels of a frame name several classes, but problem_type is "
                f"{self.config.problem_type!r}: set `config.problem_type = 'multi_label_classification'`."
            )
        return labels.argmax(dim=-1).masked_fill((labels == -100).any(dim=-1), -100)


class SpearAMSoftmaxLoss(nn.Module):
    """Cross-entropy of scaled cosines, of which that of the right class is lowered by a margin (additive margin)."""

    def __init__(self, input_dim: int, num_labels: int, scale: float = 30.0, margin: float = 0.4):
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(input_dim, num_labels))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`(batch, input_dim)` and class ids `(batch,)`."""
        labels = labels.flatten().long()
        cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(self.weight.float(), dim=0)
        cosines = cosines - self.margin * F.one_hot(labels.clamp(min=0), self.weight.shape[1])  # -100: no loss
        return F.cross_entropy(self.scale * cosines, labels)


@auto_docstring(
    custom_intro="""
    SPEAR with time-delay layers, statistics pooling and an AM-softmax loss, for speaker verification.
    """
)
class SpearForXVector(SpearHeadModel):
    uses_layer_weights = True

    def __init__(self, config: SpearConfig):
        super().__init__(config)
        sizes = [config.tdnn_dim[0], *config.tdnn_dim]
        self.projector = nn.Linear(config.hidden_size, sizes[0])
        self.tdnn = nn.ModuleList(
            [
                nn.Conv1d(sizes[i], sizes[i + 1], config.tdnn_kernel[i], dilation=config.tdnn_dilation[i])
                for i in range(len(config.tdnn_dim))
            ]
        )
        # Frames that the layers take to make one.
        self.context = 1 + sum(
            (kernel - 1) * dilation for kernel, dilation in zip(config.tdnn_kernel, config.tdnn_dilation)
        )
        self.feature_extractor = nn.Linear(2 * sizes[-1], config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = SpearAMSoftmaxLoss(config.xvector_output_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> XVectorOutput:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Log-mel filter bank at 100 Hz as [`SpearFeatureExtractor`] makes it.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Speaker ids in `[0, ..., config.num_labels - 1]`, for the AM-softmax loss.
        """
        if labels is not None:
            self._check_class_labels(labels, self.config.num_labels)
        hidden_states, valid_mask, outputs = self._encode(input_features, attention_mask, **kwargs)
        # Zeros in place of padding: an utterance shorter than the context then sees the same in any batch.
        hidden_states = self.projector(hidden_states).masked_fill(~valid_mask[:, :, None], 0.0)
        hidden_states = F.pad(
            hidden_states.transpose(1, 2), (0, self.context - 1)
        )  # (batch, dim, frames + context - 1)
        for layer in self.tdnn:
            hidden_states = layer(hidden_states).relu()
        hidden_states = hidden_states.transpose(
            1, 2
        )  # (batch, frames, dim), of which the last context - 1 are partial

        whole = (valid_mask.sum(dim=1, keepdim=True) - self.context + 1).clamp(min=1)  # (batch, 1)
        pooled_mask = torch.arange(hidden_states.shape[1], device=whole.device) < whole
        mean = masked_mean(hidden_states, pooled_mask)
        variance = masked_mean(widened(hidden_states - mean[:, None]).square(), pooled_mask)
        # The floor keeps the gradient of the root finite where all frames are alike.
        statistics = torch.cat([mean, variance.clamp(min=1e-6).sqrt().to(mean.dtype)], dim=-1)
        embeddings = self.feature_extractor(statistics)
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.objective(logits, labels)
        return XVectorOutput(
            loss=loss,
            logits=logits,
            embeddings=embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def frame_statistics(
    head: nn.Module, codebook_size: int, hidden_states: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, accuracy and 1 of each frame, `(n, 3)`, and the entries of those that are masked, `(codebooks, 2)`.

    hidden_states `(n, dim)`, labels `(n, codebooks)`, masked `(n,)`; `head` gives the logits of all codebooks.
    """
    logits = head(hidden_states).unflatten(-1, (-1, codebook_size))
    log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
    losses = F.nll_loss(log_probabilities.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    known = labels != -100
    correct = (logits.argmax(dim=-1) == labels) & known  # (n, codebooks)
    per_frame = known.sum(dim=-1).clamp(min=1)
    losses = losses.unflatten(0, labels.shape).sum(dim=-1) / per_frame  # (n,)
    sums = torch.stack([losses, correct.sum(dim=-1) / per_frame, torch.ones_like(losses)], dim=-1)
    entries = torch.stack([correct, known], dim=-1) & masked[:, None, None]  # (n, codebooks, 2)
    return sums, entries.sum(dim=0).to(losses.dtype)


@functools.cache
def compiled(function: Callable, backend: str | Callable) -> Callable:
    """The function for sizes of all kinds."""
    return torch.compile(function, backend=backend, dynamic=True)


@auto_docstring(
    custom_intro="""
    SPEAR with one linear classifier per codebook and teacher, for masked prediction of multi-codebook tokens.
    """
)
class SpearForPreTraining(SpearHeadModel):
    accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`
    _compiled_by: str | Callable | None = None  # the backend of torch.compile

    def __init__(self, config: SpearConfig):
        super().__init__(config)
        # The published order first; `config.pretraining_targets` comes back from JSON in alphabetical order.
        names = sorted(config.pretraining_targets, key=lambda name: (name != "speech", name != "audio", name))
        self.prediction_heads = nn.ModuleDict(
            {
                name: nn.Linear(
                    config.hidden_size,
                    config.pretraining_targets[name]["num_codebooks"]
                    * config.pretraining_targets[name]["codebook_size"],
                )
                for name in names
            }
        )
        self.post_init()

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """As that of the encoder, and the loss."""
        super().compile_layers(backend)
        self._compiled_by = backend

    def _masked_output_frames(self, mask_time_indices: torch.Tensor | None, frames: int) -> torch.Tensor | None:
        """Encoder frames of which at least half of the 10-ms frames that their targets describe are masked.

        Target t of a 50 Hz teacher describes the filter bank's frames 2t and 2t + 1 (four frames at 25 Hz).
        """
        if mask_time_indices is None:
            return None
        ratio = 2 * self.config.output_downsampling_factor
        groups = mask_time_indices[:, : frames * ratio].float().unflatten(1, (frames, ratio))
        return groups.mean(dim=-1) >= 0.5  # (batch, frames)

    def _target_places(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Numbers `(n,)`, among the frames of all rows, of those with a target: only they need logits.

        None, which stands for all, where a tensor's size cannot follow from its values.
        """
        if torch.compiler.is_compiling() or labels.device.type == "meta":
            return None
        return (labels != -100).any(dim=-1).flatten().nonzero().squeeze(-1)

    def _codebook_statistics(
        self,
        name: str,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        masked: torch.Tensor | None,
        places: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of losses and accuracies (means over the codebooks of a frame) and counts of frames, and by codebook.

        hidden_states `(batch, frames, dim)`, labels `(batch, frames, codebooks)` with -100 ignored, masked
        `(batch, frames)`, and the `_target_places` of the labels. Returns `(batch, 2, 3)`, masked frames first, and,
        of the masked frames, the correct and all entries of each codebook, `(codebooks, 2)`. Logits exist for
        `LOGITS_AT_ONCE` at a time, in the backward pass too, which computes them again: kept for a batch of 600 s they
        would take 1.6 GB in float32.
        """
        has_target = (labels != -100).any(dim=-1)  # (batch, frames)
        masked = torch.zeros_like(has_target) if masked is None else masked
        groups = torch.stack([has_target & masked, has_target & ~masked], dim=1)  # (batch, 2, frames)
        hidden_states, labels, masked = hidden_states.flatten(0, 1), labels.flatten(0, 1), masked.flatten()
        if places is not None:  # (n, dim), (n, codebooks), (n,)
            hidden_states, labels, masked = (
                tensor.index_select(0, places) for tensor in (hidden_states, labels, masked)
            )

        logits = LOGITS_AT_ONCE * (LOGITS_ON_CUDA if hidden_states.is_cuda else 1)
        at_once = max(1, logits // self.prediction_heads[name].out_features)
        chunks = list(zip(*(tensor.split(at_once) for tensor in (hidden_states, labels, masked))))
        parts = []
        for chunk in chunks:
            if len(chunks) > 1 and torch.is_grad_enabled():
                parts.append(
                    checkpoint(self._frame_statistics, name, *chunk, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                parts.append(self._frame_statistics(name, *chunk))
        sums = torch.cat([rows for rows, _ in parts])  # (n, 3)
        if places is not None:
            sums = sums.new_zeros(has_target.numel(), 3).index_put((places,), sums)
        sums = sums.unflatten(0, has_target.shape)
        # No matrix product, which autocast would make of half precision: counts above 256 would be rounded.
        sums = (groups[..., None] * sums[:, None]).sum(dim=2)  # (batch, 2, 3)
        return sums, sum(entries for _, entries in parts)

    def _frame_statistics(
        self, name: str, hidden_states: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function = compiled(frame_statistics, self._compiled_by) if self._compiled_by else frame_statistics
        codebook_size = self.config.pretraining_targets[name]["codebook_size"]
        return function(self.prediction_heads[name], codebook_size, hidden_states, labels, masked)

    def _check_labels(self, name: str, labels: torch.Tensor, frames: int) -> None:
        target = self.config.pretraining_targets.get(name)
        if target is None:
            raise ValueError(
                f"`{name}_labels` were given, but the configuration has no target {name!r} (it has "
                f"{sorted(self.config.pretraining_targets)}); add it to `pretraining_targets`."
            )
        if labels.dim() != 3 or labels.shape[1:] != (frames, target["num_codebooks"]):
            raise ValueError(
                f"`{name}_labels` has shape {tuple(labels.shape)}, but the encoder gives {frames} frames and the "
                f"configuration {target['num_codebooks']} codebooks: (batch, {frames}, {target['num_codebooks']}) is "
                "needed. Align the tokens with `spear_hf.mvq.alignment.align_labels`."
            )

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        mask_feature_indices: torch.Tensor | None = None,
        speech_labels: torch.Tensor | None = None,
        audio_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpearForPreTrainingOutput:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Log-mel filter bank at 100 Hz as [`SpearFeatureExtractor`] makes it.
        mask_time_indices (`torch.BoolTensor` of shape `(batch_size, frames)`, *optional*):
            Frames of the filter bank that are replaced by the mask embedding.
        mask_feature_indices (`torch.BoolTensor` of shape `(batch_size, num_mel_bins)`, *optional*):
            Mel bins that are set to 0 in the whole utterance, before the frames are replaced.
        speech_labels (`torch.LongTensor` of shape `(batch_size, sequence_length, num_codebooks)`, *optional*):
            Tokens of the speech teacher at the encoder's frame rate; -100 is ignored.
        audio_labels (`torch.LongTensor` of shape `(batch_size, sequence_length, num_codebooks)`, *optional*):
            Tokens of the audio teacher; rows of speech hold -100, which makes the asymmetric loss of the paper.
            Any other teacher of `config.pretraining_targets` has its tokens given in the same way: `{name}_labels`.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            What the summed loss is divided by: the number of target frames of the whole global batch, when gradients
            are accumulated or summed over ranks. By default the frames of this batch that have any target.
        """
        labels = {"speech": speech_labels, "audio": audio_labels}
        for key in [key for key in kwargs if key.endswith("_labels")]:
            labels[key.removesuffix("_labels")] = kwargs.pop(key)
        labels = {name: tokens for name, tokens in labels.items() if tokens is not None}
        # Before the encoder: their number is waited for, and now the device has nothing else to do.
        places = {name: self._target_places(tokens) for name, tokens in labels.items()}
        outputs: SpearModelOutput = self.spear(
            input_features,
            attention_mask=attention_mask,
            mask_time_indices=mask_time_indices,
            mask_feature_indices=mask_feature_indices,
            **{**kwargs, "return_dict": True},
        )
        hidden_states = outputs.last_hidden_state
        result = SpearForPreTrainingOutput(
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_mask=outputs.attention_mask,
        )
        if not labels:
            return result

        frames = hidden_states.shape[1]
        masked = self._masked_output_frames(mask_time_indices, frames)
        alpha = self.config.masked_loss_weight
        statistics, codebooks, loss = [], [], hidden_states.new_zeros((), dtype=torch.float32)
        for name, tokens in labels.items():
            self._check_labels(name, tokens, frames)
        for name in self.prediction_heads:
            if name not in labels:
                statistics.append(loss.new_zeros(hidden_states.shape[0], 2, 3))
                codebooks.append(loss.new_zeros(self.config.pretraining_targets[name]["num_codebooks"], 2))
                continue
            utterances, entries = self._codebook_statistics(name, hidden_states, labels[name], masked, places[name])
            sums = utterances.sum(dim=0)  # (2, 3)
            weight = self.config.pretraining_targets[name]["weight"]
            loss = loss + weight * (alpha * sums[0, 0] + (1.0 - alpha) * sums[1, 0])
            statistics.append(utterances.detach())
            codebooks.append(entries)
            losses, correct, counts = sums.detach().unbind(dim=-1)
            if name in ("speech", "audio"):
                result[f"{name}_loss"] = losses.sum() / counts.sum()
                result[f"{name}_masked_accuracy"], result[f"{name}_unmasked_accuracy"] = (correct / counts).unbind()
        if num_items_in_batch is None:
            has_target = torch.stack([(tokens != -100).any(dim=-1) for tokens in labels.values()]).any(dim=0)
            num_items_in_batch = has_target.sum().clamp(min=1)
        result.loss = loss / num_items_in_batch
        result.utterance_statistics = torch.stack(statistics)
        result.statistics = result.utterance_statistics.sum(dim=1)
        result.codebook_statistics = torch.cat(codebooks)
        return result


__all__ = [
    "SpearForAudioFrameClassification",
    "SpearForCTC",
    "SpearForPreTraining",
    "SpearForSequenceClassification",
    "SpearForXVector",
    "SpearModel",
    "SpearPreTrainedModel",
]
