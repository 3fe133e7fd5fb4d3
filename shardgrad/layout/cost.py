"""What a layout sends: every collective of every phase, with the bytes that one rank puts on the wire.

Convention (Chan et al. 2007, the least that any algorithm sends): an all-gather sends the rank's block to p - 1 others;
a reduce-scatter sends p - 1 of its p blocks; an all-reduce is a reduce-scatter and an all-gather. Uneven shards travel
padded to the largest in their group, as torch.distributed's single-tensor collectives need, and are counted so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from shardgrad.arguments import told
from shardgrad.layout.plan import Move
from shardgrad.layout.schedule import Instruction, communication
from shardgrad.layout.sizes import Sizes, chunk
from shardgrad.layout.tree import Summed

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective: phase ("forward", "dX", "dW", "db"), operation, the tensor that moves, the mesh axis, and the
    bytes that one rank sends."""

    phase: str
    operation: str
    tensor: str
    axis: str
    bytes: int


def totals(collectives: Iterable[Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """Count and bytes by (operation, axis), of what is predicted or was traced."""
    counts: Counter[tuple[str, str]] = Counter()
    sums: Counter[tuple[str, str]] = Counter()
    for one in collectives:
        counts[one.operation, one.axis] += 1
        sums[one.operation, one.axis] += one.bytes
    return {key: (counts[key], sums[key]) for key in counts}


@told
def sent(operation: str, elements: int, ranks: int, index: int = 0) -> int:
    """Elements that rank `index` of `ranks` sends, for an operation whose *input* on this rank has `elements`."""
    if operation == "all-gather":
        return (ranks - 1) * elements
    if operation in ("reduce-scatter", "all-to-all"):
        return elements - elements // ranks
    if operation == "all-reduce":
        own = chunk(elements, int(ranks), index)[1]  # of the bytes on the wire: no shard of a letter
        return elements - own + (ranks - 1) * own
    if operation in ("broadcast", "scatter", "gather", "reduce"):
        return elements
    raise ValueError(f"no convention for the bytes of {operation!r}")


def input_elements(move: Move, sizes: Sizes) -> int:
    """Elements of the (padded) tensor that a rank hands to the collective of this move."""
    before = list(sizes.shape_of(move.before))
    if move.kind == "all-gather":
        whole = sizes.shape_of(move.after)[move.dim]
        before[move.dim] = -(-whole // sizes.shape[move.axis])
    elif move.kind == "reduce-scatter":
        ranks = sizes.shape[move.axis]
        before[move.dim] = ranks * -(-before[move.dim] // ranks)
    return prod(before)


@told
def itemsize(dtype: Any) -> int:
    """Bytes of one element of a torch or NumPy dtype, or of its name."""
    size = getattr(dtype, "itemsize", None) or _ITEMSIZE.get(str(dtype).removeprefix("torch."))
    if not isinstance(size, int):
        raise ValueError(f"unknown dtype {dtype!r}: give a torch or NumPy dtype, or one of {', '.join(_ITEMSIZE)}")
    return size


def moved(
    phase: str, tensor: str, moves: Sequence[Move], sizes: Sizes, wire: int, reduce_wire: int
) -> Iterator[Collective]:
    """The collectives of a route. wire, reduce_wire: bytes of an element in gathers and in reductions."""
    for move in moves:
        ranks = sizes.shape[move.axis]
        if ranks == 1 or move.kind == "slice":
            continue
        elements = input_elements(move, sizes)
        if elements:
            width = wire if move.kind == "all-gather" else reduce_wire
            count = sent(move.kind, elements, ranks, sizes.coordinate[move.axis])
            yield Collective(phase, move.kind, tensor, move.axis, count * width)


def collectives(
    instructions: Iterable[Instruction], sizes: Sizes, *, wire: int, reduce_wire: int, trees: Collection[str] = ()
) -> Iterator[Collective]:
    """The collectives of a list of instructions, in order.

    wire, reduce_wire: bytes of an element in gathers and in reductions.
    trees: the axes whose backend adds in the tree of exact mode by itself, where each rank brings one term.
    """
    for one in communication(tuple(instructions)):
        if one.summed is None:
            yield from moved(one.phase, one.tensor, (one.move,), sizes, wire, reduce_wire)
        else:
            kind, axis, elements = one.move.kind, one.move.axis, input_elements(one.move, sizes)
            place, own = sizes.coordinate[axis], axis in trees
            yield from reduced(one.phase, kind, one.tensor, axis, elements, reduce_wire, one.summed, place, own)


def reduced(
    phase: str, kind: str, tensor: str, axis: str, elements: int, width: int, summed: Summed, index: int, tree: bool
) -> Iterator[Collective]:
    """A reduction that adds in a tree (see `comm.tree`).

    kind: all-reduce or reduce-scatter. elements: of one term of the sum, padded. width: their bytes.
    index: this rank's place. tree: whether the backend adds so by itself, where each rank brings one term.
    """
    ranks, elements = len(summed.brought), elements * summed.beside
    if not elements:
        return
    if summed.is_plain or (tree and summed.is_by_rank):
        yield Collective(phase, kind, tensor, axis, sent(kind, elements, ranks, index) * width)
        return
    each = -(-elements // ranks)
    came, leaves = (held or 1 for held in summed.held)
    yield Collective(phase, "all-to-all", tensor, axis, (ranks - 1) * each * came * width)
    if kind == "all-reduce":
        yield Collective(phase, "all-gather", tensor, axis, (ranks - 1) * each * leaves * width)
