# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The search for better codes of the multi-codebook quantiser, from inner products alone.

One pass improves all codes of a frame at once: every codebook keeps its cheapest centres given the other codebooks'
incoming codes, then neighbouring groups of codebooks are merged pairwise, each time over all pairs of kept options,
until one group is left (spec: pretraining.md section 1). Done with vectors, every option costs D multiplications. But

    |sum_c center(c, k_c) - x|^2 / 2 = |x|^2 / 2 + sum_c (|center(c, k_c)|^2 / 2 - x . center(c, k_c))
                                                 + sum_{c < c'} center(c, k_c) . center(c', k_c')

holds nothing but x . C^T (one matrix product of frames with centres), C . C^T (the Gram matrix of the centres, made
once for a quantiser) and the norms on its diagonal. So the search only looks numbers up and adds them. Costs below are
half of the squared errors, up to a constant per frame and group, which changes no choice.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_hf.mvq.threads import map_in_threads


MAX_CUTOFF = 128
BLOCK_BYTES = 16 << 20  # working memory of a thread: a block of frames should stay in the last cache (64 times on GPUs)
MIN_BLOCK_ROWS = 32  # fewer frames at a time make poor use of what a lookup brings into the cache


def cutoff(codebook_size: int, group_length: int) -> int:
    """Options kept per group of `group_length` codebooks: 16 (8 up to 16 centres), doubled for every 4-fold growth."""
    base = 16 if codebook_size > 16 else 8
    return min(base << ((group_length.bit_length() - 1) // 2), MAX_CUTOFF)


class CodeSearch:
    """What the search needs to know of the centres (codebooks, size, dim), and the search itself.

    Every codebook is centred first, and frames are shifted by the sum of the codebooks' means: this changes no
    distance, and keeps a large common offset of the features (usual in teachers' activations) out of float32's way.

    Given its row of `linear_costs`, a frame's codes come from the same additions in the same order whatever other
    frames are searched beside it: results do not depend on the batch.
    """

    def __init__(self, centers: Tensor) -> None:
        self.num_codebooks, self.codebook_size, _ = centers.shape
        means = centers.mean(dim=1, keepdim=True)
        self.offset = means.sum(dim=(0, 1))  # (dim,)
        self.flat_centers = (centers - means).flatten(0, 1)  # (codebooks * size, dim)
        self.half_norms = self.flat_centers.square().sum(dim=1) / 2
        # Blocks of the Gram matrix are kept in the order in which the merges look them up, as pairs of (odd, even)
        # codebooks, then transposed: what a merge needs at a time is a slice. Blocks (c, c) are never needed.
        pairs = list(self._merged_pairs())
        self.blocks = {pair: place for place, pair in enumerate(pairs + [pair[::-1] for pair in pairs])}
        self.gram = self._gram()
        others = [[other for other in range(self.num_codebooks) if other != c] for c in range(self.num_codebooks)]
        rows = [[self.blocks[other, c] * self.codebook_size for other in row] for c, row in enumerate(others)]
        self._others = torch.tensor(others, dtype=torch.int64, device=centers.device)  # (codebooks, codebooks - 1)
        self._other_rows = torch.tensor(rows, dtype=torch.int64, device=centers.device)

    def _merged_pairs(self) -> Iterator[tuple[int, int]]:
        """(odd, even) codebooks in the order of `_products`: by merge, place in a part, pair of groups, part."""
        length = 1
        while length < self.num_codebooks:
            width = min(length, 2)
            places = itertools.product(range(width), range(width), range(0, self.num_codebooks, 2 * length))
            for odd_place, even_place, first in places:
                for odd_part, even_part in itertools.product(range(0, length, width), repeat=2):
                    yield first + length + odd_part + odd_place, first + even_part + even_place
            length *= 2

    def _gram(self) -> Tensor:
        """(blocks, size, size): the block of codebooks (a, b) is centers[a] @ centers[b].T."""
        count, size = self.num_codebooks, self.codebook_size
        gram = self.flat_centers.new_empty(len(self.blocks), size, size)
        for a in range(count - 1):
            later = self.flat_centers[(a + 1) * size :]
            products = self.flat_centers[a * size : (a + 1) * size] @ later.T
            for b, block in enumerate(products.split(size, dim=1), start=a + 1):
                gram[self.blocks[a, b]] = block
                gram[self.blocks[b, a]] = block.T
        return gram

    def linear_costs(self, features: Tensor) -> Tensor:
        """(frames, dim) -> (frames, codebooks, size): |center|^2 / 2 - x . center, the cost of a centre on its own."""
        costs = torch.addmm(self.half_norms, features - self.offset, self.flat_centers.T, alpha=-1)
        return costs.view(-1, self.num_codebooks, self.codebook_size)

    def _lookups(self) -> int:
        """Inner products of one frame to look up at a time, at most."""
        most, length, options = 0, 1, self.codebook_size
        while length < self.num_codebooks:
            options = min(options, cutoff(self.codebook_size, length))
            if length <= 2:
                width, part_options = length, options + 1
            most = max(most, self.num_codebooks // (2 * length) * (length // width * part_options) ** 2)
            length, options = 2 * length, options**2
        return most

    def refine(self, linear_costs: Tensor, codes: Tensor, passes: int) -> Tensor:
        """`passes` passes over costs (frames, codebooks, size) and int64 codes (frames, codebooks) -> better codes.

        On CPU blocks of frames are shared out to threads; each needs at most about BLOCK_BYTES of working memory.
        """
        frames = codes.shape[0]
        frame_bytes = 20 * self._lookups() + 12 * self.num_codebooks * self.codebook_size
        if codes.device.type != "cpu":
            rows = max(1, 64 * BLOCK_BYTES // frame_bytes)
            blocks = zip(linear_costs.split(rows), codes.split(rows))
            return torch.cat([codes[:0], *(self._refined(*block, passes) for block in blocks)])
        threads = torch.get_num_threads()
        rounds = math.ceil(frames * frame_bytes / (BLOCK_BYTES * threads))
        count = max(1, min(rounds * threads, frames // MIN_BLOCK_ROWS))
        blocks = zip(linear_costs.tensor_split(count), codes.tensor_split(count))
        return torch.cat(map_in_threads(lambda block: self._refined(*block, passes), list(blocks)))

    def _refined(self, linear_costs: Tensor, codes: Tensor, passes: int) -> Tensor:
        """One pass is a function of a frame's costs and codes: where it changes nothing, no other would, so frames whose
        codes have settled are left out of the rest.
        """
        codes = codes.clone()
        workspace = _Workspace(codes.shape[0] * self._lookups(), linear_costs)
        active = torch.arange(codes.shape[0], device=codes.device)
        for _ in range(passes):
            before = codes[active]
            after = self._improved(linear_costs[active], before, workspace)
            codes[active] = after
            active = active[(after != before).any(dim=1)]
            if not active.numel():
                break
        return codes

    def _improved(self, linear_costs: Tensor, codes: Tensor, workspace: "_Workspace") -> Tensor:
        """One pass."""
        groups, size = linear_costs.shape[1:]
        costs, options = _cheapest(linear_costs + self._fields(codes), cutoff(size, 1) if groups > 1 else 1)
        # A part is a codebook, after the first merge a pair of them, with its kept options as codes and the incoming
        # ones behind: (frames, parts, options, codebooks). Options of groups are places in their parts, incoming last:
        # (frames, groups, options, parts).
        parts = torch.cat([options, codes[..., None]], dim=2)[..., None]
        members = _own_places(parts)
        length = 1
        while groups > 1:
            kept = costs.shape[2]
            products = self._products(parts, members, workspace)
            # The spec's delta_even . delta_odd, with delta = option - incoming codes.
            products = (products - products[:, :, -1:])[:, :, :-1]
            products = (products - products[..., -1:])[..., :-1]
            costs = costs[:, 0::2, :, None] + costs[:, 1::2, None, :] + products
            groups, length = groups // 2, 2 * length
            costs, chosen = _cheapest(costs.flatten(2), cutoff(size, length) if groups > 1 else 1)
            incoming = torch.full_like(chosen[:, :, :1], kept)
            even = torch.cat([chosen // kept, incoming], dim=2)
            odd = torch.cat([chosen % kept, incoming], dim=2)
            if length == 2:
                parts = torch.cat([_pick(parts[:, 0::2], even), _pick(parts[:, 1::2], odd)], dim=3)
                members = _own_places(parts)
            else:
                shift = members.shape[3] * parts.shape[2]
                members = torch.cat([_pick(members[:, 0::2], even), _pick(members[:, 1::2], odd) + shift], dim=3)
        return _pick(parts.flatten(1, 2), members[:, 0, 0]).flatten(1)

    def _fields(self, codes: Tensor) -> Tensor:
        """(frames, codebooks, size): inner product of every centre with the sum of the other codebooks' at `codes`."""
        if codes.shape[1] == 1:
            return self.flat_centers.new_zeros(())
        rows = codes[:, self._others] + self._other_rows
        sums = F.embedding_bag(rows.flatten(0, 1), self.gram.flatten(0, 1), mode="sum")
        return sums.view(*codes.shape, -1)

    def _products(self, parts: Tensor, members: Tensor, workspace: "_Workspace") -> Tensor:
        """Inner products (frames, groups / 2, options, options) of every even group's options with its odd neighbour's."""
        frames, groups, _, length = members.shape
        pairs, options, width = groups // 2, parts.shape[2], parts.shape[3]
        # Frames in the inner dimensions: their lookups in one block of the Gram matrix follow each other, in the cache.
        codes = parts.view(frames, pairs, 2, length, options, width).permute(2, 5, 1, 3, 0, 4).contiguous()
        index, table, values = workspace.views((pairs, length, length, frames, options, options))
        num_blocks = pairs * length * length
        first = self.blocks[length * width, 0]
        for place, (odd, even) in enumerate(itertools.product(codes[1] * self.codebook_size, codes[0])):
            torch.add(odd[:, :, None, :, :, None], even[:, None, :, :, None, :], out=index)
            blocks = self.gram[first + place * num_blocks :][:num_blocks].flatten(1)
            looked_up = values if place else table
            torch.gather(blocks, 1, index.view(num_blocks, -1), out=looked_up.view(num_blocks, -1))
            if place:
                table += values
        # (frames, pairs, odd part, its option, even part, its option)
        ordered = values.view(frames, pairs, length, options, length, options).copy_(table.permute(3, 0, 1, 4, 2, 5))
        if length == 1:
            return ordered.view(frames, pairs, options, options).transpose(2, 3)
        ordered = ordered.view(frames * pairs, length * options, length * options)
        summed = _sum_rows(ordered, members[:, 1::2].flatten(0, 1)).transpose(1, 2).contiguous()
        summed = _sum_rows(summed, members[:, 0::2].flatten(0, 1))
        return summed.view(frames, pairs, *summed.shape[1:])


class _Workspace:
    """Memory of the lookups, used again and again: fresh memory would cost more than the lookups themselves."""

    def __init__(self, numbers: int, like: Tensor) -> None:
        self.index = torch.empty(numbers, dtype=torch.int64, device=like.device)
        self.tables = torch.empty(2, numbers, dtype=like.dtype, device=like.device)

    def views(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """int64 indices and two tables of numbers, of one shape."""
        count = math.prod(shape)
        return self.index[:count].view(shape), self.tables[0, :count].view(shape), self.tables[1, :count].view(shape)


def _own_places(parts: Tensor) -> Tensor:
    """(frames, parts, options, codebooks) -> (frames, parts, options, 1): each option of a part by its place."""
    return torch.arange(parts.shape[2], device=parts.device)[:, None].expand(*parts.shape[:3], 1)


def _pick(options: Tensor, places: Tensor) -> Tensor:
    """(..., options, width), (..., picked) -> (..., picked, width)."""
    return options.gather(-2, places[..., None].expand(*places.shape, options.shape[-1]))


def _sum_rows(table: Tensor, rows: Tensor) -> Tensor:
    """(batch, rows, width), (batch, options, length) -> (batch, options, width): each option's rows, added in order."""
    batch, height, width = table.shape
    rows = rows + torch.arange(batch, device=rows.device)[:, None, None] * height
    return F.embedding_bag(rows.flatten(0, 1), table.view(-1, width), mode="sum").view(batch, -1, width)


def _cheapest(costs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` lowest costs in the last dimension (all, if there are no more) and their places, in any order."""
    if costs.shape[-1] <= count:
        return costs, torch.arange(costs.shape[-1], device=costs.device).expand_as(costs)
    if count == 1:
        return costs.min(dim=-1, keepdim=True)
    # The bits of a float, those of negative ones flipped, sort as an integer; and integers sort a third faster.
    keys, places = _flip(costs.contiguous().view(torch.int32)).topk(count, dim=-1, largest=False, sorted=False)
    return _flip(keys).view(costs.dtype), places


def _flip(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
