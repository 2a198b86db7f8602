# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""How the encoder computes without gradients on a CPU: in blocks that stay in the cache, with the plain path's results.

A layer of the encoder shares its attention weights, `(batch, heads, frames, frames)`, between three modules. As one
tensor they take 288 MB for 60 s, and each pass over them goes through main memory. Here a block of query rows of one
head is scored, put through the softmax and multiplied with the values before the next one, and only as many heads as
fit in a budget are kept for the modules that come after; the others are computed again.
"""

import torch
from torch import nn


KEPT_BYTES = 2**26  # of the weights that a layer keeps from one of its attention modules to the next: 67 MB
BLOCK_SCORES = 2**18  # of a block, 1 MB in float32: about the second-level cache of one core
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 32, 256  # matrix products of fewer rows are slow, and more bring nothing
# Below so many frames the plain path wins: its tensor is small, and the calls for each head and utterance cost more.
MIN_FRAMES_FOR_BLOCKS = 192


def can_run_in_blocks(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether `module` is evaluated without gradients on a CPU in full precision, and nobody traces or autocasts it."""
    return (
        not torch.is_grad_enabled()
        and not module.training
        and hidden_states.device.type == "cpu"
        and hidden_states.dtype in (torch.float32, torch.float64)
        and type(hidden_states) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def is_watched(*modules: nn.Module) -> bool:
    """Whether hooks want the inputs or outputs of one of these modules as the plain path has them.

    The recorder of transformers stays on modules once anything was recorded, and is no reason: what it records is known
    from `output_attentions`.
    """
    for module in modules:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(hook.__name__ != "output_capturing_hook" for hook in hooks):
            return True
    return False


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
        key_mask: torch.Tensor | None = None,
    ):
        self.query = query
        self.key = key.permute(0, 2, 3, 1).contiguous()  # (batch, heads, dim, frames)
        self.pos_query = pos_query
        self.positions = positions.permute(1, 2, 0).contiguous()  # (heads, pos_dim, 2 * frames)
        batch, self.frames, heads, _ = query.shape
        self.num_keys, self.masked = self._valid_keys(key_mask, batch)
        bytes_per_head = sum(self.num_keys) * self.frames * query.element_size()
        self.kept: dict[tuple[int, int], torch.Tensor] = {}
        self.kept_heads = min(heads, KEPT_BYTES // bytes_per_head)

    def _valid_keys(self, key_mask: torch.Tensor | None, batch: int) -> tuple[list[int], list[torch.Tensor | None]]:
        """Per utterance how many keys are used, and which of these are masked nevertheless, bool `(keys,)`."""
        if key_mask is None:
            return [self.frames] * batch, [None] * batch
        places = torch.arange(1, self.frames + 1) * key_mask  # (batch, frames)
        # Without any valid key the plain path weighs all keys alike.
        num_keys = [int(last) or self.frames for last in places.amax(dim=1)]
        used = [mask[:keys] for mask, keys in zip(key_mask, num_keys)]
        return num_keys, [None if mask.all() else ~mask for mask in used]

    def attend(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(batch, frames, heads, dim)` weighted by as many heads from the first on, of the same shape."""
        context = torch.empty_like(values)
        for row in range(values.shape[0]):
            for head in range(values.shape[2]):
                self._attend_one(row, head, values[row, :, head], context[row, :, head])
        return context

    def _attend_one(self, row: int, head: int, values: torch.Tensor, context: torch.Tensor) -> None:
        """One head of one utterance, into `context`; both `(frames, dim)`."""
        keys, place = self.num_keys[row], (row, head)
        # A product of few columns is about twice as fast the other way round.
        narrow = values.shape[-1] < 32
        values = values[:keys].t().contiguous() if narrow else values[:keys].contiguous()
        is_known = place in self.kept
        if not is_known and head < self.kept_heads:
            self.kept[place] = self.query.new_empty(self.frames, keys)
        kept = self.kept.get(place)
        rows = min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, BLOCK_SCORES // keys))
        for start in range(0, self.frames, rows):
            stop = min(start + rows, self.frames)
            out = None if kept is None else kept[start:stop]
            weights = out if is_known else self._weights(row, head, start, stop, out)
            if narrow:
                context[start:stop] = (values @ weights.t()).t()
            else:
                torch.mm(weights, values, out=context[start:stop])

    def _weights(self, row: int, head: int, start: int, stop: int, out: torch.Tensor | None) -> torch.Tensor:
        """Weights of the queries `start ... stop - 1`, `(rows, keys)`."""
        rows, keys = stop - start, self.num_keys[row]
        first = self.frames - stop  # the offset of the last query and the first key
        offsets = self.positions[head, :, first : first + keys + rows - 1]
        by_offset = self.pos_query[row, start:stop, head] @ offsets  # (rows, keys + rows - 1)
        # As in `relative_scores`: entry (i, j) is entry (i, rows - 1 + j - i) of the argument. Rows do not overlap.
        scores = by_offset.as_strided((rows, keys), (max(keys + rows - 2, 1), 1), rows - 1)
        scores = scores.addmm_(self.query[row, start:stop, head], self.key[row, head, :, :keys])
        if self.masked[row] is not None:
            scores.masked_fill_(self.masked[row], torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1, out=out)
