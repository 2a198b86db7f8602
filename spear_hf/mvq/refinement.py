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

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_hf.mvq.threads import map_in_threads


MAX_CUTOFF = 128
BLOCK_BYTES = 64 << 20  # working memory of a thread on CPU; 16 times that on other devices
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
        self._block_places, self._others = _block_order(self.num_codebooks, centers.device)
        numbers = self.num_codebooks * (self.num_codebooks - 1) * self.codebook_size**2
        self.index_dtype = torch.int32 if numbers <= torch.iinfo(torch.int32).max else torch.int64

    @functools.cached_property
    def gram(self) -> Tensor:
        """(blocks, size, size), in the order of `_block_order`: block (a, b) is centers[a] @ centers[b].T."""
        count, size = self.num_codebooks, self.codebook_size
        gram = self.flat_centers.new_empty(count * (count - 1), size, size)
        for a in range(count - 1):
            later = self.flat_centers[(a + 1) * size :]
            products = (self.flat_centers[a * size : (a + 1) * size] @ later.T).view(size, -1, size)
            gram[self._block_places[a, a + 1 :]] = products.transpose(0, 1)
            gram[self._block_places[a + 1 :, a]] = products.permute(1, 2, 0)
        return gram

    def linear_costs(self, features: Tensor) -> Tensor:
        """(frames, dim) -> (frames, codebooks, size): |center|^2 / 2 - x . center, the cost of a centre on its own."""
        costs = torch.addmm(self.half_norms, features - self.offset, self.flat_centers.T, alpha=-1)
        return costs.view(-1, self.num_codebooks, self.codebook_size)

    def refine(self, linear_costs: Tensor, codes: Tensor, passes: int) -> Tensor:
        """`passes` passes over costs (frames, codebooks, size) and int64 codes (frames, codebooks) -> better codes.

        On CPU blocks of frames are shared out to threads; each needs at most about BLOCK_BYTES of working memory.
        """
        frames = codes.shape[0]
        frame_bytes = 12 * self._lookups() + 20 * self.num_codebooks * self.codebook_size
        if codes.device.type == "cpu":
            threads = torch.get_num_threads()
            rounds = math.ceil(frames * frame_bytes / (BLOCK_BYTES * threads))
            count = min(rounds * threads, frames // MIN_BLOCK_ROWS)
        else:
            count = math.ceil(frames * frame_bytes / (16 * BLOCK_BYTES))
        blocks = list(zip(linear_costs.tensor_split(max(count, 1)), codes.tensor_split(max(count, 1))))
        if codes.device.type == "cpu":
            return torch.cat(map_in_threads(lambda block: self._refined(*block, passes), blocks))
        return torch.cat([self._refined(*block, passes) for block in blocks])

    def _lookups(self) -> int:
        """Inner products of one frame that `_products` looks up at a time, at most."""
        single = min(self.codebook_size, cutoff(self.codebook_size, 1)) + 1
        pair = min((single - 1) ** 2, cutoff(self.codebook_size, 2)) + 1
        return max(self.num_codebooks * single**2 // 2, (self.num_codebooks * pair) ** 2 // 16)

    def _refined(self, linear_costs: Tensor, codes: Tensor, passes: int) -> Tensor:
        """`refine` for one block of frames.

        A pass is a function of a frame's costs and codes: where it changes nothing, no other would, so frames whose
        codes have settled are left out of the rest.
        """
        codes = codes.clone()
        workspace = _Workspace(codes.shape[0] * self._lookups(), self.index_dtype, linear_costs)
        active = torch.arange(codes.shape[0], device=codes.device)
        for _ in range(passes):
            if not active.numel():
                break
            before = codes[active]
            after = self._improved(linear_costs[active], before, workspace)
            codes[active] = after
            active = active[(after != before).any(dim=1)]
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
        own = torch.arange(codes.shape[1], device=codes.device)[:, None]
        rows = codes[:, self._others] + self._block_places[self._others, own] * self.codebook_size
        sums = F.embedding_bag(rows.flatten(0, 1), self.gram.flatten(0, 1), mode="sum")
        return sums.view(*codes.shape, -1)

    def _products(self, parts: Tensor, members: Tensor, workspace: "_Workspace") -> Tensor:
        """Inner products (frames, groups / 2, options, options) of even groups' options with their odd neighbours'."""
        frames, groups, _, length = members.shape
        pairs, options, width = groups // 2, parts.shape[2], parts.shape[3]
        # Frames in the inner dimensions: their lookups in a block of the Gram matrix follow each other, in the cache.
        codes = parts.view(frames, pairs, 2, length, options, width).permute(2, 5, 1, 3, 0, 4)
        codes = codes.to(self.index_dtype, memory_format=torch.contiguous_format)
        evens, odds = codes[0][:, :, None, :, :, None, :], codes[1][:, :, :, None, :, :, None] * self.codebook_size
        index, table, values = workspace.views((pairs, length, length, frames, options, options))
        # Block after block as in `_block_order`; this merge comes after those of 1, 2, ..., `covered` / 2 codebooks.
        covered, block_size = length * width, self.codebook_size**2
        block = groups * covered * (covered - 1) // 2 + torch.arange(pairs * length**2, device=codes.device)
        base = (block * block_size).to(self.index_dtype).view(pairs, length, length, 1, 1, 1)
        for place, (odd, even) in enumerate(itertools.product(odds, evens)):
            torch.add(odd + base, even, out=index)
            base += block.numel() * block_size
            looked_up = values if place else table
            torch.index_select(self.gram.view(-1), 0, index.view(-1), out=looked_up.view(-1))
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


@functools.lru_cache(maxsize=16)
def _block_order(num_codebooks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places (codebooks, codebooks) of the blocks of the Gram matrix, and the other codebooks of each.

    Blocks are kept in the order in which `_products` looks them up, as (odd, even) codebooks: by merge, then codebook
    within the parts, pair of groups, part; behind them the same blocks transposed. Blocks (c, c) are never needed.
    """
    pairs, covered = [], 1
    while covered < num_codebooks:
        width = min(covered, 2)
        first_codebooks = range(0, num_codebooks, 2 * covered)
        for odd, even, first in itertools.product(range(width), range(width), first_codebooks):
            for odd_part, even_part in itertools.product(range(0, covered, width), repeat=2):
                pairs.append((first + covered + odd_part + odd, first + even_part + even))
        covered *= 2
    places = torch.zeros(num_codebooks, num_codebooks, dtype=torch.int64)
    for place, (odd_codebook, even_codebook) in enumerate(pairs):
        places[odd_codebook, even_codebook] = place
        places[even_codebook, odd_codebook] = place + len(pairs)
    others = [[other for other in range(num_codebooks) if other != own] for own in range(num_codebooks)]
    return places.to(device), torch.tensor(others, dtype=torch.int64, device=device)


class _Workspace:
    """Memory of the lookups, used again and again: fresh memory would cost more than the lookups themselves."""

    def __init__(self, numbers: int, index_dtype: torch.dtype, like: Tensor) -> None:
        self.index = torch.empty(numbers, dtype=index_dtype, device=like.device)
        self.tables = torch.empty(2, numbers, dtype=like.dtype, device=like.device)

    def views(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Indices and two tables of numbers, of one shape."""
        count = math.prod(shape)
        return self.index[:count].view(shape), self.tables[0, :count].view(shape), self.tables[1, :count].view(shape)


def _own_places(parts: Tensor) -> Tensor:
    """(frames, parts, options, codebooks) -> (frames, parts, options, 1): each option of a part by its place."""
    return torch.arange(parts.shape[2], device=parts.device)[:, None].expand(*parts.shape[:3], 1)


def _pick(options: Tensor, places: Tensor) -> Tensor:
    """(..., options, width), (..., picked) -> (..., picked, width)."""
    return options.gather(-2, places[..., None].expand(*places.shape, options.shape[-1]))


def _sum_rows(table: Tensor, rows: Tensor) -> Tensor:
    """(batch, rows, width), (batch, options, length) -> (batch, options, width): an option's rows, added in order."""
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
    keys, places = _lowest(_flip(costs.contiguous().view(torch.int32)), count)
    return _flip(keys).view(costs.dtype), places


def _lowest(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size = keys.shape[-1]
    if size < 16 * count or size % 4:
        return keys.topk(count, dim=-1, largest=False, sorted=False)
    # The lowest `count` are within the `count` columns of four with the lowest minima.
    minima = keys.view(*keys.shape[:-1], 4, size // 4).amin(dim=-2)
    columns = minima.topk(count, dim=-1, largest=False, sorted=False).indices
    candidates = (columns[..., None, :] + torch.arange(0, size, size // 4, device=keys.device)[:, None]).flatten(-2)
    keys, places = keys.gather(-1, candidates).topk(count, dim=-1, largest=False, sorted=False)
    return keys, candidates.gather(-1, places)


def _flip(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
