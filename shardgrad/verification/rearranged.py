"""Explanations in which right numbers are in wrong places: other shards, other blocks, other rows, transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from shardgrad.layout.sizes import chunk
from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis

_SAMPLE = 16
"""Slices to look at before whole tensors are compared."""
_MOST = 1 << 22
"""Distances between rows to compute at most: larger tensors are not searched row by row."""


def wrong_slices(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Every rank has some rank's part."""
    if not seen.fits or not seen.exact.dim():
        return
    source: list[int] = []
    for rank in seen.ranks:
        own, size = seen.held[rank], seen.size[rank]
        far = [
            float(((own - right) / size).square().sum()) if right.shape == own.shape else float("inf")
            for right in seen.right
        ]
        # Of replicas, the one that is nearest on the mesh.
        here = seen.found.coordinates[rank]
        apart = [sum(here[axis] != at[axis] for axis in here) for at in seen.found.coordinates]
        source.append(min(seen.ranks, key=list(zip(far, apart)).__getitem__))
    if source == list(seen.ranks):
        return
    wanted = [seen.right[at] for at in source]
    rounding = [seen.size[at] for at in source]
    moved = [f"rank {rank} has rank {at}'s" for rank, at in enumerate(source) if rank != at]
    says = ", ".join(moved)
    if sorted(source) == list(seen.ranks):
        remedy = (
            "look at the order of ranks where the tensor is sharded or loaded: rank i of the axis has chunk i of "
            "torch.chunk"
        )
        yield Hypothesis("shards permuted", says, remedy, wanted, rounding, cost=1)
    else:
        remedy = (
            "let each rank take the chunk of its own index on the axis (mesh.get_local_rank), not that of 0 or of the "
            "global rank"
        )
        yield Hypothesis("another rank's shard", says, remedy, wanted, rounding, cost=1)


def rearranged(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Along one dim, rows stand in another order."""
    if not seen.fits:
        return
    for dim in range(seen.exact.dim()):
        total = seen.exact.shape[dim]
        if total < 2 or seen.exact.numel() == 0:
            continue
        pools = [seen.whole_along(dim, rank) for rank in seen.ranks]
        own = [seen.rows_of(rank, dim) for rank in seen.ranks]
        if not all(_is_elsewhere(seen, dim, rank, pools[rank]) for rank in seen.ranks):
            continue
        yield from _blocks(seen, dim, pools, own)
        yield from _orders(seen, dim, pools, own, [torch.arange(total)] * len(own), "along")
        if seen.split.spec.dims[dim].axes:
            yield from _orders(seen, dim, pools, own, own, "in each part, along")
        if total * total * len(seen.ranks) <= _MOST:
            yield from _any_order(seen, dim, pools, own)


def _is_elsewhere(seen: Evidence, dim: int, rank: int, pool: tuple[Tensor, Tensor]) -> bool:
    """Whether each of some wrong slices along a dim has the norm of a slice of the right tensor: a quick look."""
    others = [d for d in range(seen.exact.dim()) if d != dim]

    def norms(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=others) if others else t.abs()

    wrong = seen.wrong[rank].sum(others).nonzero().flatten() if others else seen.wrong[rank].nonzero().flatten()
    some = wrong[:: max(1, len(wrong) // _SAMPLE)]
    held, right, size = (norms(t) for t in (seen.held[rank].index_select(dim, some), *pool))
    return bool(((held[:, None] - right).abs() <= seen.allowed * size.max()).any(1).all()) if len(some) else True


def _orders(
    seen: Evidence, dim: int, pools: list[tuple[Tensor, Tensor]], own: list[Tensor], wholes: list[Tensor], where: str
) -> Iterator[Hypothesis]:
    """Orders that have a name. `wholes`: for each rank, the global indices that are reordered."""

    def made(how: Callable[[Tensor], Tensor], name: str, says: str, remedy: str, cost: int) -> Hypothesis:
        rows = []
        for mine, whole in zip(own, wholes):
            source = torch.arange(seen.exact.shape[dim])
            source[whole] = how(whole)
            rows.append(source[mine])
        return _taken(seen, dim, pools, rows, name, says, remedy, cost)

    length = min(len(whole) for whole in wholes)
    for step in (step for step in (*range(1, 9), *range(-8, 0)) if 2 * abs(step) <= length):
        says = f"{where} dim {dim} everything is {abs(step)} {'later' if step < 0 else 'earlier'} than it should be"
        remedy = "look for an offset that is off by so many: the start of a slice, a shift, a roll"
        yield made(partial(torch.roll, shifts=-step), "shifted", says, remedy, 2 - (abs(step) == 1))
    remedy = "look for a flip, or for ranks counted from the end"
    yield made(lambda t: t.flip(0), "reversed", f"{where} dim {dim} is in reverse order", remedy, 1)
    for parts in range(2, length):
        if all(len(whole) % parts == 0 for whole in wholes):
            says = f"{where} dim {dim}, {parts} parts are interleaved, which should follow one another, or the reverse"
            remedy = f"a view [{length // parts}, {parts}] is read as [{parts}, {length // parts}]: transpose it first"
            yield made(partial(_interleaved, parts), "interleaved", says, remedy, 1)


def _interleaved(parts: int, index: Tensor) -> Tensor:
    return index.view(parts, -1).t().reshape(-1)


def _taken(
    seen: Evidence,
    dim: int,
    pools: list[tuple[Tensor, Tensor]],
    rows: list[Tensor],
    name: str,
    says: str,
    remedy: str,
    cost: int,
) -> Hypothesis:
    wanted = [pool.index_select(dim, index) for (pool, _), index in zip(pools, rows)]
    size = [scale.index_select(dim, index) for (_, scale), index in zip(pools, rows)]
    size = [torch.maximum(a, b) for a, b in zip(size, seen.size)]
    return Hypothesis(name, says, remedy, wanted, size, cost=cost)


def _blocks(seen: Evidence, dim: int, pools: list[tuple[Tensor, Tensor]], own: list[Tensor]) -> Iterator[Hypothesis]:
    """The dim in k blocks, in another order; of the whole where a rank has it whole, else of the rank's own part."""
    axes = seen.split.spec.dims[dim].axes
    ranks = {n: axis for axis, n in seen.mesh.items() if n > 1}
    for parts in sorted({2, 3, 4, 5, 6, 8, *ranks}):
        rows, orders = [], []
        for rank in seen.ranks:
            held, mine = seen.held[rank].movedim(dim, 0), own[rank]
            pool, scale = (t.movedim(dim, 0) for t in pools[rank])
            blocks = [
                slice(start, start + length) for start, length in (chunk(len(mine), parts, i) for i in range(parts))
            ]
            if any(block.stop == block.start for block in blocks):
                break
            index, order, at = [], [], 0
            left = list(range(parts))
            while left:  # blocks may be of different lengths: what stands here begins where the last one ended
                best = _nearest(held[at:], [(pool[mine[blocks[j]]], scale[mine[blocks[j]]]) for j in left], left)
                left.remove(best)
                order.append(best)
                index.append(mine[blocks[best]])
                at += len(index[-1])
            rows.append(torch.cat(index))
            orders.append(order)
        if len(rows) < len(seen.ranks) or all(order == sorted(order) for order in orders):
            continue
        shown = next(order for order in orders if order != sorted(order))
        says = (
            f"dim {dim} of {'each part' if axes else 'the tensor'} consists of {parts} blocks, which stand as {shown}"
        )
        if not axes and parts in ranks:
            remedy = f"gather in the order of the ranks of {ranks[parts]}, and along dim {dim}"
            yield _taken(seen, dim, pools, rows, "gathered in the wrong order", says, remedy, cost=1)
        remedy = (
            "look at fused parts (q, k, v; gate, up), heads or halves: the order in which they are sharded and joined"
        )
        yield _taken(seen, dim, pools, rows, "blocks interchanged", says, remedy, cost=1 + (len(own[0]) % parts > 0))


def _nearest(held: Tensor, blocks: list[tuple[Tensor, Tensor]], names: list[int]) -> int:
    """Of the blocks that may stand at the beginning of `held`, the one that is nearest in units of rounding."""
    far = [float(((held[: len(block)] - block) / (scale + 1e-300)).square().mean()) for block, scale in blocks]
    return names[far.index(min(far))]


def _any_order(seen: Evidence, dim: int, pools: list[tuple[Tensor, Tensor]], own: list[Tensor]) -> Iterator[Hypothesis]:
    """Each row is the one that is nearest to it."""
    rows = []
    for rank in seen.ranks:
        pool, scale = (t.movedim(dim, 0).reshape(t.shape[dim], -1) for t in pools[rank])
        held = seen.held[rank].movedim(dim, 0).reshape(len(own[rank]), -1)
        unit = float(scale.square().mean().sqrt()) + 1e-300
        if not bool(held.isfinite().all()) or not len(held):
            return
        far = torch.cdist(held / unit, pool / unit, compute_mode="donot_use_mm_for_euclid_dist")
        far[torch.arange(len(held)), own[rank]] -= seen.allowed  # of two alike, the one that belongs here
        rows.append(far.argmin(1))
    if all(torch.equal(a, b) for a, b in zip(rows, own)):
        return
    taken, right = sorted(torch.cat(rows).tolist()), sorted(torch.cat(own).tolist())
    moved = [(int(a), int(b)) for r, o in zip(rows, own) for a, b in zip(o, r) if a != b][:3]
    shown = ", ".join(f"{a} has {b}'s" for a, b in moved)
    if taken == right:
        says, name = f"along dim {dim} the rows stand in another order ({shown}, …)", "rows in another order"
        remedy = "look for a permutation that is applied on one side alone: heads, groups, interleaved halves, a sort"
    else:
        says, name = f"along dim {dim} rows are taken from other places ({shown}, …)", "wrong slice"
        remedy = "look at the start and the length of the slice that each rank takes"
    yield _taken(seen, dim, pools, rows, name, says, remedy, cost=4)


def transposed(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Two dims exchanged, or read in the other order."""
    for a, b in combinations(range(seen.exact.dim()), 2):
        if min(seen.exact.shape[a], seen.exact.shape[b]) < 2:
            continue
        remedy = f"dims {a} and {b}: look for a transpose that is missing or one too many, or a view where it belongs"
        for how in (_viewed, _viewed_back):
            wanted, size = (seen.parts(how(t, a, b)) for t in (seen.exact, seen.scale))
            yield Hypothesis("transposed", f"dims {a} and {b} of the whole are exchanged", remedy, wanted, size, cost=1)
            says = f"dims {a} and {b} of each rank's part are exchanged"
            wanted, size = ([how(t, a, b) for t in each] for each in (seen.right, seen.size))
            yield Hypothesis("transposed", says, remedy, wanted, size, cost=1)


def _viewed(t: Tensor, a: int, b: int) -> Tensor:
    """The transpose, read in the order of the tensor itself; of a square one, the transpose."""
    return t.transpose(a, b).reshape(t.shape)


def _viewed_back(t: Tensor, a: int, b: int) -> Tensor:
    """Of which `_viewed` makes the tensor."""
    return t.reshape(t.transpose(a, b).shape).transpose(a, b)
