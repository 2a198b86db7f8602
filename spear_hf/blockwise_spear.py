# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""How the encoder computes on a CPU: in blocks that stay in the cache, with the results of the plain path.

A layer of the encoder shares its attention weights, `(batch, heads, frames, frames)`, between three modules. As one
tensor they take 288 MB for 60 s, and each pass over them goes through main memory. Here a block of query rows of one
head is scored, put through the softmax and multiplied with the values before the next one, and only as many heads as
fit in a budget are kept for the modules that come after; the others are computed again. So are all of them in the
backward pass, which then needs nothing that grows with the square of the length.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of_all_modules
from transformers.utils import logging

from .compiled_spear import scores_by_key


logger = logging.get_logger(__name__)

PROCESS = os.getpid()  # one that was forked from this has another
KEPT_BYTES = 2**26  # of the weights that a layer keeps from one of its attention modules to the next: 67 MB
BLOCK_SCORES = 2**18  # of a block and thread, 1 MB in float32: about the second-level cache of a core
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 64, 256  # matrix products of fewer rows are slow, and more bring nothing
# Below so many frames the plain path wins: its tensor is small, and the calls for each head and utterance cost more.
MIN_FRAMES_FOR_BLOCKS = 192
# The same with gradients, where blocks compute more than once what the plain path keeps.
MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS = 480
# Linear layers that are computed as convolutions have so many frames at least, and inputs and outputs so wide.
MIN_FRAMES_TO_CONVOLVE = 40
MIN_FRAMES_TO_CONVOLVE_GRADIENTS = 256  # whose convolutions put transposed weights into an order of their own first
MIN_WIDTH_TO_CONVOLVE = 256
# Where modules keep their hooks, and those of all modules, which torch 2.7 does not tell of otherwise.
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
HOOKS_OF_ALL = tuple(getattr(hooks_of_all_modules, f"_global{name}") for name in HOOKS)


def keep_to_one_thread_where_forked(device: torch.device) -> None:
    """OpenMP's threads do not survive a fork: in `datasets.Dataset.map(num_proc=2)`, say, one would wait for ever."""
    if device.type == "cpu" and os.getpid() != PROCESS and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning(
            "This process was forked, and torch's threads may have stayed behind: it goes on with one. Processes that "
            "are spawned have threads of their own."
        )


def can_run_in_blocks(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether `module` is evaluated without gradients, and blocks are possible at all."""
    return not torch.is_grad_enabled() and not module.training and are_blocks_possible(hidden_states)


def are_blocks_possible(hidden_states: torch.Tensor) -> bool:
    """Whether this is computed on a CPU in full precision, and nobody traces, transforms, autocasts or differentiates
    it forwards."""
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype in (torch.float32, torch.float64)
        and type(hidden_states) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def is_watched(*modules: nn.Module) -> bool:
    """Whether hooks want the inputs, outputs or gradients of one of these modules as the plain path has them.

    The recorder of transformers stays on modules once anything was recorded, and is no reason: what it records is
    known from `output_attentions`. A replaced `forward` is one.
    """
    if any(HOOKS_OF_ALL):
        return True
    for module in modules:
        hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
        if "forward" in module.__dict__ or any(
            getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks
        ):
            return True
    return False


@lru_cache(maxsize=1)
def are_convolutions_faster() -> bool:
    """Whether this CPU multiplies matrices faster in oneDNN's convolutions than in MKL's products.

    MKL takes an AMD CPU for one without AVX-512. From family 26 (Zen 5) on that is half of what it can do.
    """
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not is_wide or not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    family = re.search(r"^cpu family\s*:\s*(\d+)", cpu, re.MULTILINE)
    return "AuthenticAMD" in cpu and family is not None and int(family[1]) >= 26


def project(linear: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`linear(hidden_states)`, `(batch, frames, dim)`, as a convolution of width 1 where that is faster."""
    if (
        not are_blocks_possible(hidden_states)  # first, as a compiled graph must not depend on the length
        or type(linear) is not nn.Linear
        or type(linear.weight) not in (torch.Tensor, nn.Parameter)  # of torchao, say, which knows products alone
        or hidden_states.dtype != torch.float32
        or hidden_states.shape[0] * hidden_states.shape[1] < MIN_FRAMES_TO_CONVOLVE
        or min(linear.weight.shape) < MIN_WIDTH_TO_CONVOLVE
        or not are_convolutions_faster()
        or is_watched(linear)
    ):
        return linear(hidden_states)
    arguments = hidden_states, linear.weight, linear.bias
    if not torch.is_grad_enabled() or not any(each is not None and each.requires_grad for each in arguments):
        return _convolve(*arguments)
    if hidden_states.shape[0] * hidden_states.shape[1] < MIN_FRAMES_TO_CONVOLVE_GRADIENTS:
        return linear(hidden_states)
    return _ConvolvedLinear.apply(*arguments)


def _convolve(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Rows `(batch, frames, dim)` times the transpose of `weight` `(out, dim)`."""
    image = hidden_states.transpose(1, 2).unsqueeze(2)  # (batch, dim, 1, frames), with channels last in memory
    projected = F.conv2d(image, weight[:, :, None, None], bias, stride=_stride_to_onednn())
    return projected.squeeze(2).transpose(1, 2)


def _stride_to_onednn() -> tuple[int, int]:
    """Of images of height 1, where it is without effect, but for it torch prefers its own convolution with a single
    thread."""
    return (2, 1) if torch.get_num_threads() == 1 else (1, 1)


class _ConvolvedLinear(torch.autograd.Function):
    """`_convolve`, whose gradients are convolutions too."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight)
        return _convolve(hidden_states, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _convolve(grad, weight.t(), None)
        if ctx.needs_input_grad[1]:
            rows, weights = hidden_states.flatten(0, 1), grad.flatten(0, 1).t()  # (n, dim), (out, n): n are channels
            grad_weight = F.conv2d(rows[None, :, None], weights[:, :, None, None], stride=_stride_to_onednn())[0, :, 0]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 1))
        return grad_input, grad_weight, grad_bias


class BlockwiseAttention:
    """Stands in for the attention weights of one layer, and computes them where they are used.

    query, key `(batch, frames, heads, dim)`, pos_query `(batch, frames, heads, pos_dim)`, positions
    `(2 * frames, heads, pos_dim)` as in `SpearAttentionWeights`, key_mask bool `(batch, frames)`. Keys after an
    utterance's last valid frame are left out: their weights are 0.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        pos_query: torch.Tensor,
        positions: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
    ):
        self.projections = (query, key, pos_query, positions)  # in autograd's graph, as those below are not
        self.key_mask = key_mask
        self.query = query.detach()
        self.key = key.detach().permute(0, 2, 3, 1).contiguous()  # (batch, heads, dim, frames)
        self.pos_query = pos_query.detach()
        self.positions = positions.detach().permute(1, 2, 0).contiguous()  # (heads, pos_dim, 2 * frames)
        batch, self.frames, heads, _ = query.shape
        self.num_keys, self.masked = self._valid_keys(key_mask, batch)
        bytes_per_head = sum(self.num_keys) * self.frames * query.element_size()
        self.kept: dict[int, list[torch.Tensor]] = {}  # by utterance, and block of query rows
        self.kept_heads = min(heads, KEPT_BYTES // max(1, bytes_per_head))

    def _valid_keys(self, key_mask: torch.Tensor | None, batch: int) -> tuple[list[int], list[torch.Tensor | None]]:
        """Per utterance how many keys are used, and which of these are masked nevertheless, bool `(keys,)`."""
        if key_mask is None:
            return [self.frames] * batch, [None] * batch
        places = torch.arange(1, self.frames + 1, device=key_mask.device) * key_mask  # (batch, frames)
        # Without any valid key the plain path weighs all keys alike.
        num_keys = [int(last) or self.frames for last in places.amax(dim=1)]
        used = [mask[:keys] for mask, keys in zip(key_mask, num_keys)]
        return num_keys, [None if mask.all() else ~mask for mask in used]

    def attend(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(batch, frames, heads, dim)` weighted by as many heads from the first on, of the same shape."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (values, *self.projections)):
            return _RecomputedAttention.apply(self, values, *self.projections)
        return self.compute(values)

    def compute(self, values: torch.Tensor) -> torch.Tensor:
        """As `attend`, outside autograd's graph."""
        context = torch.empty_like(values)
        for row, keys in enumerate(self.num_keys):
            used = values[row, :keys].permute(1, 2, 0).contiguous()  # (heads, dim, keys)
            for heads, start, stop, weights in self._all_weights(row, values.shape[2]):
                _weigh(weights, used[heads], context[row, start:stop, heads])
        return context

    def _all_weights(self, row: int, heads: int) -> Iterator[tuple[slice, int, int, torch.Tensor]]:
        """Blocks of the first heads: which heads and queries `start ... stop - 1`, and their weights as `_weights`."""
        kept = self.kept.setdefault(row, [])
        first = min(heads, self.kept_heads)
        if first > 0:
            for index, (start, stop) in enumerate(self._blocks(row, self.kept_heads)):
                if index == len(kept):
                    kept.append(self._weights(row, slice(0, self.kept_heads), start, stop))
                yield slice(0, first), start, stop, kept[index][:first]
        group, _ = self._block_size(row, heads - first)
        for begin in range(first, heads, group):
            which = slice(begin, min(begin + group, heads))
            for start, stop in self._blocks(row, heads - first):
                yield which, start, stop, self._weights(row, which, start, stop)

    def _block_size(self, row: int, heads: int) -> tuple[int, int]:
        """Heads, of so many, and query rows of a block: few rows of many heads before many rows, for few and large
        operations."""
        keys, scores = self.num_keys[row], BLOCK_SCORES * torch.get_num_threads()
        heads = max(1, min(heads, scores // (keys * MIN_BLOCK_ROWS)))
        return heads, min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, scores // (keys * heads)))

    def _blocks(self, row: int, heads: int) -> list[tuple[int, int]]:
        _, rows = self._block_size(row, heads)
        return [(start, min(start + rows, self.frames)) for start in range(0, self.frames, rows)]

    def _weights(self, row: int, heads: slice, start: int, stop: int) -> torch.Tensor:
        """Weights of the queries `start ... stop - 1`, `(heads, rows, keys)`."""
        keys = self.num_keys[row]
        block = (row, slice(start, stop), heads)
        by_offset = self.pos_query[block].transpose(0, 1) @ self.positions[heads, :, self._offsets(start, stop, keys)]
        scores = torch.baddbmm(
            _by_key(by_offset, keys), self.query[block].transpose(0, 1), self.key[row, heads, :, :keys]
        )
        if (masked := self.masked[row]) is not None:
            scores.masked_fill_(masked, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)

    def _offsets(self, start: int, stop: int, keys: int) -> slice:
        """Where the offsets of these queries and `keys` keys are in `positions`, from the last query on."""
        return slice(self.frames - stop, self.frames - start + keys - 1)

    def gradients(
        self, values: torch.Tensor, context: torch.Tensor, grad_context: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of `values`, query, key, pos_query and positions, given that of `context`, which is `attend`'s."""
        gradients = tuple(torch.zeros_like(tensor) for tensor in (values, *self.projections))
        # What the softmax takes off the gradient of a row: the sum over its keys of weight times gradient.
        row_sums = (grad_context * context).sum(dim=-1, keepdim=True)  # (batch, frames, heads, 1)
        for row in range(values.shape[0]):
            for head in range(values.shape[2]):
                keys = self.num_keys[row]
                for start, stop in self._blocks(row, 1):
                    weights = self._weights(row, slice(head, head + 1), start, stop)[0]
                    block = (row, slice(start, stop), head)
                    grad_scores = grad_context[block] @ values[row, :keys, head].t()  # (rows, keys)
                    grad_scores = grad_scores.sub_(row_sums[block]).mul_(weights)
                    self._add_gradients(gradients, block, weights, grad_context[block], grad_scores)
        return gradients

    def _add_gradients(
        self,
        gradients: tuple[torch.Tensor, ...],
        block: tuple[int, slice, int],
        weights: torch.Tensor,
        grad_context: torch.Tensor,
        grad_scores: torch.Tensor,
    ) -> None:
        """Those of one block, to the `gradients` of everything."""
        grad_values, grad_query, grad_key, grad_pos_query, grad_positions = gradients
        (row, rows, head), keys = block, self.num_keys[block[0]]
        if (masked := self.masked[row]) is not None:
            grad_scores.masked_fill_(masked, 0.0)
        grad_values[row, :keys, head].addmm_(weights.t(), grad_context)
        grad_query[block] = grad_scores @ self.key[row, head, :, :keys].t()
        grad_key[row, :keys, head].addmm_(grad_scores.t(), self.query[block])
        offsets = self._offsets(rows.start, rows.stop, keys)
        by_offset = grad_scores.new_zeros(grad_scores.shape[0], offsets.stop - offsets.start)
        _by_key(by_offset[None], keys).copy_(grad_scores)
        grad_pos_query[block] = by_offset @ self.positions[head, :, offsets].t()
        grad_positions[offsets, head].addmm_(by_offset.t(), self.pos_query[block])


def _by_key(by_offset: torch.Tensor, keys: int) -> torch.Tensor:
    """View `(heads, rows, keys)` of a contiguous `(heads, rows, keys + rows - 1)`, as in `relative_scores`.

    Entry (i, j) of a head is entry (i, rows - 1 + j - i) of the argument. Rows do not overlap.
    """
    heads, rows, offsets = by_offset.shape
    return by_offset.as_strided((heads, rows, keys), (rows * offsets, offsets - 1, 1), rows - 1)


def _weigh(weights: torch.Tensor, values: torch.Tensor, context: torch.Tensor) -> None:
    """Weights `(heads, rows, keys)` times values `(heads, dim, keys)`, into `context` `(rows, heads, dim)`."""
    if _is_convolution_faster(weights, values):
        for head, (rows, kernels) in enumerate(zip(weights, values)):
            context[:, head] = _convolve(rows[None], kernels, None)[0]
    elif values.shape[1] < 32:  # a product of few columns is about twice as fast the other way round
        context.copy_((values @ weights.transpose(1, 2)).permute(2, 0, 1))
    else:
        context.copy_((weights @ values.transpose(1, 2)).transpose(0, 1))


def _is_convolution_faster(weights: torch.Tensor, values: torch.Tensor) -> bool:
    return (
        weights.dtype == torch.float32
        and weights.shape[1] >= MIN_FRAMES_TO_CONVOLVE
        and min(values.shape[1:]) >= MIN_WIDTH_TO_CONVOLVE
        and are_convolutions_faster()
    )


class _RecomputedAttention(torch.autograd.Function):
    """`BlockwiseAttention.compute`, which keeps no weights for its backward pass and computes them again there."""

    @staticmethod
    def forward(
        ctx: Any, attention: BlockwiseAttention, values: torch.Tensor, *projections: torch.Tensor
    ) -> torch.Tensor:
        context = attention.compute(values)
        ctx.save_for_backward(values, context, *projections)
        ctx.key_mask = attention.key_mask
        return context

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, context, *projections = ctx.saved_tensors
        if torch.is_grad_enabled():  # of this gradient there will be one, which the plain path gives
            # Views, as the values themselves may be made of what is queried, by an earlier module of the layer.
            inputs = [tensor.view_as(tensor) for tensor in (values, *projections)]
            plain = _attend_plainly(ctx.key_mask, *inputs)
            wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad[1:]) if needed]
            found = iter(torch.autograd.grad(plain, wanted, grads[0], create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        attention = BlockwiseAttention(*projections, key_mask=ctx.key_mask)
        return None, *attention.gradients(values, context, grads[0])


def _attend_plainly(
    key_mask: torch.Tensor | None,
    values: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    pos_query: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`BlockwiseAttention.compute` as one tensor of all weights."""
    by_offset = pos_query.transpose(1, 2) @ positions.permute(1, 2, 0)  # (batch, heads, frames, 2 * frames)
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) + scores_by_key(by_offset)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)[:, : values.shape[2]]
    return (weights @ values.transpose(1, 2)).transpose(1, 2)
