"""The overlap pass: puts chunked products in place of a product and its own gather or reduction, where that pays.

It does so where other products do not hide the communication already: behind Y the gather of X or W and the reduction
of Y; behind dX the gather of dY or W; a reduction of dX that dW's product does not cover; backward's last reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from shardgrad.comm.mesh import MeshView
from shardgrad.layout.cost import sent
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.plan import Role
from shardgrad.layout.program import Pass
from shardgrad.layout.schedule import (
    Accumulate,
    AddBias,
    Call,
    Cast,
    Communicate,
    Defer,
    Instruction,
    Instructions,
    Matmul,
    Slice,
    SumBias,
    Wait,
)
from shardgrad.ops.chunks import ChunkedGatherMatmul, ChunkedMatmulReduce, ChunkedRhsGatherMatmul, Transfer
from shardgrad.ops.contract import Contraction
from shardgrad.ops.namespace import Namespace
from shardgrad.ops.overlap import WHOLE, Chunking, choose, choose_together, is_set


def chunking_pass(view: MeshView, layouts: Sequence[Layout], namespace: Namespace, dtype: torch.dtype) -> Pass | None:
    """The pass for products of one set of shapes; None where `set_overlap` did not set one."""
    return _Chunker(view, layouts, namespace, dtype) if is_set(view) else None


class _Chunker:
    def __init__(self, view: MeshView, layouts: Sequence[Layout], namespace: Namespace, dtype: torch.dtype) -> None:
        self._view, self._layouts, self._namespace = view, layouts, namespace
        self._sizes, self._dtype = namespace.sizes, dtype

    def __call__(self, instructions: Instructions) -> Instructions:
        first = next((one for one in instructions if isinstance(one, Matmul | SumBias | Accumulate)), None)
        if isinstance(first, Matmul) and first.role == "out":
            return self._forward(instructions)
        return self._backward(instructions)

    def _forward(self, made: Instructions) -> Instructions:
        products = _products(made)
        for gather in [one for one in made if isinstance(one, Communicate) and one.move.kind == "all-gather"]:
            readers = [one for one in products if one.left == gather.out]
            if readers:
                made = self._gather(made, gather, readers)
        if products[-1] in made:
            made = self._reduce(made, products[-1])
        first = products[0]
        if first in made:
            made = self._gather_rhs(made, first)
        return made

    def _backward(self, made: Instructions) -> Instructions:
        products = _products(made)
        last = _last_computation(made)
        first = products[0] if products else None
        if first is not None and first.role == "lhs" and sum(one.out == first.out for one in products) == 1:
            gather = _gather_of(made, first.left)
            made = self._gather(made, gather, [first]) if gather else self._gather_rhs(made, first)
            following = [one.index for one in products[1:]]
            if first in made and last is not first:
                made = self._reduce(made, first, 2 * sum(map(self._multiplications, following)))
        if isinstance(last, Matmul) and last in made:
            made = self._reduce(made, last)
        later = made[-2] if len(made) > 1 else None
        if isinstance(later, Defer):
            made = (*made[:-2], Defer(later.phase, later.out, self._deferred(later.body)), made[-1])
        return made

    def _deferred(self, made: Instructions) -> Instructions:
        last = _last_computation(made)
        return self._reduce(made, last) if isinstance(last, Matmul) else made

    # One product with one of its collectives.

    def _reduce(self, made: Instructions, product: Matmul, following_flops: int = 0) -> Instructions:
        """A product side by side with its reduction, which has so many multiplications and additions to run behind
        otherwise."""
        moves = [one for one in made if isinstance(one, Communicate | Slice | Cast) and one.out == product.out]
        if product.into is not None or sum(one.out == product.out for one in _products(made)) != 1:
            return made
        if len(moves) != 1 or not isinstance(moves[0], Communicate):
            return made
        chunked = self._chunked_reduce(moves[0], product, following_flops)
        if chunked is None:
            return made
        value = product.out
        start = Call(product.phase, (value,), f"start_chunked_{value}", chunked.start, (product.left, product.right))
        wait = Call(product.phase, (value,), f"wait_chunked_{value}", chunked.wait, (value,))
        found: list[Instruction] = []
        for one in made:
            if one is product:
                found.append(start)
            elif one is moves[0]:
                found += [wait] if moves[0].blocking else []
            else:
                found.append(wait if isinstance(one, Wait) and one.started is moves[0] else one)
        return tuple(found)

    def _chunked_reduce(self, move: Communicate, product: Matmul, following_flops: int) -> ChunkedMatmulReduce | None:
        spec = self._spec(product.index, product.role)
        found = self._chunkable(move, product, spec)
        if found is None or move.move.kind == "all-gather":
            return None
        contraction, transfer, same = found
        shape = self._compute_shape(product.index, product.role)
        rows, columns = prod(shape[: contraction.rows]), prod(shape[contraction.rows :])
        inner = self._multiplications(product.index) // max(1, rows * columns)
        # Along rows, the second matrix is read again and again; along columns, the first, and all is copied once.
        by_rows = columns * inner <= rows * (inner + columns)
        if transfer.kind == "reduce-scatter":
            by_rows = transfer.dim >= contraction.rows
        elif not same:
            by_rows = rows >= columns
        reread = (columns if by_rows else rows) * inner
        chunking = self._choose(transfer, same, shape, product.index, 1, reread, None, following_flops)
        return ChunkedMatmulReduce(contraction, transfer, chunking, by_rows=by_rows) if chunking != WHOLE else None

    def _gather(self, made: Instructions, gather: Communicate, readers: Sequence[Matmul]) -> Instructions:
        """The gather of a left operand side by side with the products that read it."""
        chunked = self._chunked_gather(made, gather, readers)
        if chunked is None:
            return made
        others = tuple(one.right for one in readers)
        return self._put(made, gather, readers, "gather_and_multiply", chunked, (gather.src, *others))

    def _chunked_gather(
        self, made: Instructions, gather: Communicate, readers: Sequence[Matmul]
    ) -> ChunkedGatherMatmul | None:
        role = readers[0].operands[0]
        spec = self._spec(readers[0].index, role)
        found = [self._chunkable(gather, one, spec) for one in readers]
        if len(_moves_into(made, gather.out)) != 1 or found[0] is None or None in found:
            return None
        products = [one[0] for one in found if one is not None]
        transfer, same = found[0][1], all(one is not None and one[2] for one in found)
        if transfer.kind != "all-gather" or any(transfer.dim >= one.rows or not one.lhs_has_rows for one in products):
            return None
        stored, ranks = self._sizes.shape_of(spec.dims), transfer.axis.size
        if stored[transfer.dim] * ranks != transfer.global_size:
            return None
        reread = sum(prod(self._compute_shape(one.index, "rhs")) for one in readers) * (ranks - 1)
        chunking = self._choose(transfer, same, stored, readers[0].index, len(readers), reread, 1 / ranks)
        if chunking == WHOLE:
            return None
        return ChunkedGatherMatmul(products, transfer, chunking, assemble=_is_read_by_others(made, gather, readers))

    def _gather_rhs(self, made: Instructions, product: Matmul) -> Instructions:
        """The gather of a weight side by side with the product, Y or dX, that reads it."""
        gather = _gather_of(made, product.right)
        if gather is None:
            return made
        chunked = self._chunked_rhs(made, gather, product)
        if chunked is None:
            return made
        return self._put(made, gather, [product], "gather_and_multiply", chunked, (gather.src, product.left))

    def _chunked_rhs(self, made: Instructions, gather: Communicate, product: Matmul) -> ChunkedRhsGatherMatmul | None:
        rhs, out = self._spec(product.index, "rhs"), self._spec(product.index, product.role)
        found = self._chunkable(gather, product, rhs)
        if len(_moves_into(made, gather.out)) != 1 or found is None:
            return None
        contraction, transfer, same = found
        stored, ranks = self._sizes.shape_of(rhs.dims), transfer.axis.size
        places = {letter: out.letters.index(letter) for letter in rhs.letters if letter in out.letters}
        if transfer.kind != "all-gather" or stored[transfer.dim] * ranks != transfer.global_size or not places:
            return None
        gathered = rhs.letters[transfer.dim]
        # A letter that is whole here leaves whole chunks; the gathered one, the local shard's part to begin with.
        letter = max(places, key=lambda one: (one != gathered, stored[rhs.letters.index(one)]))
        local = 1 / ranks if letter == gathered else 0.0
        left = prod(self._compute_shape(product.index, product.operands[0]))
        chunking = self._choose(transfer, same, stored, product.index, 1, left * (ranks - 1 if local else 1), local)
        if chunking == WHOLE:
            return None
        along, place = rhs.letters.index(letter), places[letter]
        kept = _is_read_by_others(made, gather, [product])
        return ChunkedRhsGatherMatmul(contraction, transfer, chunking, along, place, assemble=kept)

    def _put(
        self,
        made: Instructions,
        gather: Communicate,
        readers: Sequence[Matmul],
        name: str,
        chunked: Callable[..., object],
        args: tuple[str, ...],
    ) -> Instructions:
        """One call in place of a gather and the products that read it, where the first of them stood."""
        kept = (gather.out,) if _is_read_by_others(made, gather, readers) else ()
        outs = (*(one.out for one in readers), *kept)
        ahead = _makers(made, made.index(readers[0]), args[1:])
        found: list[Instruction] = []
        for one in made:
            if one is readers[0]:
                found += [*ahead, Call(one.phase, outs, f"{name}_{one.out}", chunked, args)]
                for reader in readers:
                    if reader.bias is not None:
                        plan = self._layouts[reader.index].plan
                        letters = plan.letters["out"], plan.letters["bias"]
                        found.append(AddBias(reader.phase, reader.out, reader.bias, letters))
            elif not (
                one is gather
                or any(one is other for other in (*ahead, *readers))
                or (isinstance(one, Wait) and one.started is gather)
            ):
                found.append(one)
        return tuple(found)

    # Whether, and into how many chunks.

    def _chunkable(
        self, move: Communicate, product: Matmul, moved: TensorSpec
    ) -> tuple[Contraction, Transfer, bool] | None:
        """The product and its one transfer, if both can be chunked; and whether all ranks of the axis know the same
        sizes, and so decide alike."""
        contraction = self._namespace.map(product)
        if not isinstance(contraction, Contraction) or not contraction.rows:
            return None
        axis, layout, same = self._view.axes[move.move.axis], self._layouts[product.index], True
        for spec in (layout.lhs, layout.rhs, layout.out):
            for dim in spec.dims:
                if axis.name in dim.axes:
                    size = self._sizes.get(dim.letter, dim.axes[: dim.axes.index(axis.name)])
                    if size is None or size % axis.size:
                        if dim.letter in moved.letters:
                            return None
                        same = False
        size = 0
        if move.move.kind == "all-gather":
            gathered = move.move.after[move.move.dim]
            size = self._sizes.get(gathered.letter, gathered.axes) or 0
        what = f"{move.move.kind} of {move.tensor}"
        return contraction, Transfer(move.move.kind, what, axis, move.move.dim, size), same

    def _choose(
        self,
        transfer: Transfer,
        same: bool,
        moved: tuple[int, ...],
        at: int,
        products: int,
        reread: int,
        local_fraction: float | None,
        following_flops: int = 0,
    ) -> Chunking:
        """The chunks in which to do products with one of their collectives, which is given a tensor of shape `moved`.

        reread: elements that each chunk beyond the first reads once more. local_fraction, following_flops: see
            `Costs.chunks`.
        """
        size, name = self._dtype.itemsize, transfer.axis.name
        count = sent(transfer.kind, prod(moved), transfer.axis.size) * size
        flops = 2 * products * self._multiplications(at)

        def choice() -> Chunking:
            return choose(self._view, name, count, flops, reread * size, self._dtype, local_fraction, following_flops)

        if same:
            return choice() if flops else WHOLE
        if not prod(moved):
            return WHOLE
        what = f"{transfer.what} {moved} beside products of {self._layouts[at]}, {self._dtype}"
        return choose_together(self._view, transfer.axis, what, choice)

    def _spec(self, at: int, role: Role) -> TensorSpec:
        layout = self._layouts[at]
        return {"lhs": layout.lhs, "rhs": layout.rhs, "out": layout.out}[role]

    def _compute_shape(self, at: int, role: Role) -> tuple[int, ...]:
        return self._sizes.shape_of(self._layouts[at].reading.compute_layout(self._spec(at, role)).dims)

    def _multiplications(self, at: int) -> int:
        """Of one product, on this rank."""
        layout = self._layouts[at]
        sizes: dict[str, int] = dict(zip(layout.lhs.letters, self._compute_shape(at, "lhs")))
        sizes.update(zip(layout.rhs.letters, self._compute_shape(at, "rhs")))
        return prod(sizes.values())


def _products(made: Sequence[Instruction]) -> list[Matmul]:
    return [one for one in made if isinstance(one, Matmul)]


def _last_computation(made: Sequence[Instruction]) -> Instruction | None:
    computations = [one for one in made if isinstance(one, Matmul | SumBias | Accumulate)]
    return computations[-1] if computations else None


def _moves_into(made: Sequence[Instruction], value: str) -> list[Instruction]:
    return [one for one in made if isinstance(one, Communicate | Slice) and one.out == value]


def _gather_of(made: Sequence[Instruction], value: str) -> Communicate | None:
    """The collective that gathers a value, if one does."""
    return next((one for one in made if isinstance(one, Communicate) and one.out == value), None)


def _is_read_by_others(made: Sequence[Instruction], gather: Communicate, readers: Sequence[Matmul]) -> bool:
    mine = [one for one in made if one is gather or any(one is reader for reader in readers)]
    mine += [one for one in made if isinstance(one, Wait) and one.started is gather]
    return any(gather.out in one.reads for one in made if not any(one is other for other in mine))


def _makers(made: Instructions, after: int, values: Sequence[str]) -> list[Instruction]:
    """What makes the values behind a place in the list."""
    wanted, found = set(values), list[Instruction]()
    for one in reversed(made[after:]):
        if wanted & set(one.writes) and not isinstance(one, Matmul):
            wanted.update(one.reads)
            found.insert(0, one)
    return found
