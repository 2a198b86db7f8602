# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The search for better codes of the multi-codebook quantiser, from inner products alone.

One pass improves all codes of a frame at once: every codebook keeps its cheapest centres given the other codebooks'
incoming codes, then neighbouring groups of codebooks are merged pairwise, each time over all pairs of kept options,
until one group is left. In D dimensions this costs D multiplications for every option. Here it costs none, because

    |sum_c center(c, k_c) - x|^2 / 2 = |x|^2 / 2 + sum_c (|center(c, k_c)|^2 / 2 - x . center(c, k_c))
                                                 + sum_{c < c'} center(c, k_c) . center(c', k_c')

holds nothing but x . C^T (one matrix product of frames with centres), C . C^T (the Gram matrix of the centres, made once
for a quantiser) and the norms on its diagonal. The search below only gathers such numbers by index and adds them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


MAX_CUTOFF = 128
BLOCK_BYTES = 96 << 20  # on CPU, large enough for blocks of the Gram matrix to be used many times from the cache


def cutoff(codebook_size: int, group_length: int) -> int:
    """Options kept per group of `group_length` codebooks: 16 (8 up to 16 centres), doubled for every 4-fold growth."""
    base = 16 if codebook_size > 16 else 8
    return min(base << (int(math.log2(group_length)) // 2), MAX_CUTOFF)


class CodeSearch:
    """What the search needs to know of the centres (codebooks, size, dim), and the search itself.

    Every codebook is centred first, and frames are shifted by the sum of the codebooks' means: this changes no
    distance, and keeps a large common offset of the features (usual in teachers' activations) out of the float32
    products. The Gram matrix takes 4 (codebooks * size)^2 bytes: 64 MiB for 16 codebooks of 256.

    Each number that a frame's codes depend on, given its row of `linear_costs`, is made by the same additions in the same
    order whatever other frames are searched beside it, so results do not depend on the batch.
    """

    def __init__(self, centers: Tensor) -> None:
        self.num_codebooks, self.codebook_size, _ = centers.shape
        means = centers.mean(dim=1, keepdim=True)
        self.offset = means.sum(dim=(0, 1))  # (dim,)
        self.flat_centers = (centers - means).flatten(0, 1)  # (codebooks * size, dim)
        self.half_norms = self.flat_centers.square().sum(dim=1) / 2
        self.num_levels = self.num_codebooks.bit_length() - 1  # merges until one group is left
        self.gram = self._gram()
        wide = self.gram.numel() > torch.iinfo(torch.int32).max
        self.index_dtype = torch.int64 if wide else torch.int32
        self._make_sibling_rows()

    def _gram(self) -> Tensor:
        """(codebooks, codebooks, size, size): block [a, b] is centers[a] @ centers[b].T; the blocks [a, a] stay unused."""
        count, size = self.num_codebooks, self.codebook_size
        gram = self.flat_centers.new_zeros(count, count, size, size)
        for a in range(count - 1):
            later = self.flat_centers[(a + 1) * size :]
            products = (self.flat_centers[a * size : (a + 1) * size] @ later.T).view(size, count - a - 1, size)
            gram[a, a + 1 :] = products.transpose(0, 1)
            gram[a + 1 :, a] = products.permute(1, 2, 0)
        return gram

    def _make_sibling_rows(self) -> None:
        """Rows of the Gram matrix to sum for (codebook, level): those of the group that it is merged with there.

        The groups that a codebook meets at the successive merges hold 1, 2, 4, ... codebooks and together all others.
        """
        sources, rows, sizes = [], [], []
        for codebook in range(self.num_codebooks):
            for level in range(self.num_levels):
                first = ((codebook >> level) ^ 1) << level
                group = range(first, first + (1 << level))
                sources += group
                rows += [(other * self.num_codebooks + codebook) * self.codebook_size for other in group]
                sizes.append(len(group))
        device = self.gram.device
        self._sibling_sources = torch.tensor(sources, dtype=torch.int64, device=device)
        self._sibling_rows = torch.tensor(rows, dtype=torch.int64, device=device)
        starts = torch.tensor([0, *sizes], dtype=torch.int64, device=device).cumsum(0)
        self._sibling_starts = starts[:-1]

    def linear_costs(self, features: Tensor) -> Tensor:
        """(frames, dim) -> (frames, codebooks, size): |center|^2 / 2 - x . center, the share of a centre on its own."""
        costs = torch.addmm(self.half_norms, features - self.offset, self.flat_centers.T, alpha=-1)
        return costs.view(-1, self.num_codebooks, self.codebook_size)

    def frame_bytes(self) -> int:
        """Working memory of `improve` for one frame, in bytes, the rows of `linear_costs` not counted."""
        kept = min(cutoff(self.codebook_size, 1), self.codebook_size)
        table = (self.num_codebooks * kept) ** 2 // 4 * (self.gram.element_size() * 2 + self.index_dtype.itemsize)
        fields = self.num_codebooks * self.codebook_size * (self.num_levels + 2) * self.gram.element_size()
        return table + fields

    def refine(self, linear_costs: Tensor, codes: Tensor, passes: int) -> Tensor:
        """`passes` passes over int64 codes (frames, codebooks); frames whose codes have settled are left out of the rest.

        A pass is a function of a frame's costs and codes, so one that changes nothing would change nothing again.
        Frames are searched in blocks that need about BLOCK_BYTES of working memory.
        """
        budget = BLOCK_BYTES if codes.device.type == "cpu" else 8 * BLOCK_BYTES
        rows = max(1, budget // self.frame_bytes())
        codes = codes.clone()
        active = torch.arange(codes.shape[0], device=codes.device)
        for _ in range(passes):
            changed = []
            for block in active.split(rows):
                before = codes[block]
                after = self.improve(linear_costs[block], before)
                codes[block] = after
                changed.append(block[(after != before).any(dim=1)])
            active = torch.cat(changed)
            if not active.numel():
                break
        return codes

    def improve(self, linear_costs: Tensor, codes: Tensor) -> Tensor:
        """One pass: costs (frames, codebooks, size), int64 codes (frames, codebooks) -> better codes, same shape."""
        frames, count, size = linear_costs.shape
        costs, fields = self._costs_given_others(linear_costs, codes)
        kept = cutoff(size, 1)
        if count == 1:
            return costs.argmin(dim=2)
        if size > kept:
            candidates = _cheapest(costs, kept)  # (frames, codebooks, kept)
        else:
            candidates = torch.arange(size, device=codes.device).expand(frames, count, size)
        num_candidates = candidates.shape[2]
        costs = costs.gather(2, candidates)
        fields = fields.gather(3, candidates[:, :, None].expand(-1, -1, self.num_levels, -1))
        # An option of a group is a candidate of each of its codebooks, named by its place in the group's candidates.
        members = torch.arange(num_candidates, device=codes.device).expand(frames, count, -1)[..., None]
        for level in range(self.num_levels):
            groups, kept, length = members.shape[1:]
            # Until now both sides counted the other side's incoming codes; from here the products below replace them.
            field = fields[:, :, level].reshape(frames, groups, -1).gather(2, members.flatten(2)).view(members.shape)
            costs = costs - field.sum(dim=3)
            costs = costs[:, 0::2, :, None] + costs[:, 1::2, None, :] + self._products(candidates, members)
            costs = costs.flatten(2)  # (frames, groups / 2, kept * kept)
            limit = 1 if groups == 2 else cutoff(size, 2 * length)
            if costs.shape[2] > limit:
                options = costs.argmin(dim=2, keepdim=True) if limit == 1 else _cheapest(costs, limit)
                costs = costs.gather(2, options)
            else:
                options = torch.arange(costs.shape[2], device=codes.device).expand_as(costs)
            even, odd = (options // kept)[..., None], (options % kept)[..., None]
            even = members[:, 0::2].gather(2, even.expand(-1, -1, -1, length))
            odd = members[:, 1::2].gather(2, odd.expand(-1, -1, -1, length))
            members = torch.cat([even, odd + length * num_candidates], dim=3)
        return candidates.flatten(1).gather(1, members.view(frames, count))

    def _costs_given_others(self, linear_costs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Half costs (frames, codebooks, size) of every centre when the other codebooks stay at `codes`, up to a
        constant per frame and codebook; and the parts of them (frames, codebooks, levels, size) that the siblings make.
        """
        frames, count, size = linear_costs.shape
        if count == 1:
            return linear_costs, linear_costs.new_zeros(frames, 1, 0, size)
        rows = codes[:, self._sibling_sources] + self._sibling_rows
        starts = torch.arange(frames, device=codes.device)[:, None] * rows.shape[1] + self._sibling_starts
        fields = F.embedding_bag(rows.flatten(), self.gram.view(-1, size), starts.flatten(), mode="sum")
        fields = fields.view(frames, count, self.num_levels, size)
        return linear_costs + fields.sum(dim=2), fields

    def _products(self, candidates: Tensor, members: Tensor) -> Tensor:
        """Inner products (frames, groups / 2, kept, kept) of the options of every even group with its odd neighbour's."""
        frames, groups, kept, length = members.shape
        pairs, size, num_candidates = groups // 2, self.codebook_size, candidates.shape[2]
        # Blocks of the Gram matrix in the outer dimensions: the frames' lookups in one block stay in the cache.
        grouped = candidates.to(self.index_dtype).view(frames, pairs, 2, length, num_candidates).permute(2, 1, 3, 0, 4)
        codebook = torch.arange(self.num_codebooks, device=candidates.device).view(pairs, 2, length)
        block = codebook[:, 1, :, None] * self.num_codebooks + codebook[:, 0, None, :]  # (pairs, odd, even)
        block = (block * size * size).to(self.index_dtype)[:, :, :, None, None]
        odd = (grouped[1, :, :, None] * size + block)[..., None]  # (pairs, odd, even, frames, candidates, 1)
        index = odd + grouped[0, :, None, :, :, None, :]
        table = self.gram.view(-1).index_select(0, index.flatten()).view(index.shape)
        # (frames, pairs, odd, candidates of odd, even, candidates of even)
        table = table.permute(3, 0, 1, 4, 2, 5).reshape(frames * pairs, length * num_candidates, -1)
        if length == 1:
            return table.view(frames, pairs, kept, kept).transpose(2, 3)
        table = _sum_rows(table, members[:, 1::2].reshape(frames * pairs, kept, length))
        table = _sum_rows(table.transpose(1, 2).contiguous(), members[:, 0::2].reshape(frames * pairs, kept, length))
        return table.view(frames, pairs, kept, kept)


def _sum_rows(table: Tensor, rows: Tensor) -> Tensor:
    """(batch, rows, width), (batch, options, length) -> (batch, options, width): each option's rows, added in order."""
    batch, height, width = table.shape
    rows = rows + torch.arange(batch, device=rows.device)[:, None, None] * height
    return F.embedding_bag(rows.flatten(0, 1), table.view(-1, width), mode="sum").view(batch, -1, width)


def _cheapest(costs: Tensor, count: int) -> Tensor:
    """Places of the `count` lowest costs in the last dimension, in no order that matters."""
    return costs.topk(count, dim=-1, largest=False, sorted=False).indices
