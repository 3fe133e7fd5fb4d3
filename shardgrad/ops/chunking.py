"""The overlap pass: puts chunked or fused products in place of a product and its own gather or reduction.

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
    communication,
)
from shardgrad.ops.chunks import ChunkedGatherMatmul, ChunkedMatmulReduce, ChunkedRhsGatherMatmul, Transfer
from shardgrad.ops.contract import Contraction
from shardgrad.ops.fused import GatherMatmul, MatmulReduceScatter
from shardgrad.ops.namespace import Namespace
from shardgrad.ops.overlap import WHOLE, Chunking, OverlapDecision, choose, choose_together, is_set, note, symmetric

_EMPTY, _UNEVEN = "it is empty", "its shards are not of one size"
_SEVERAL = "it is one of several steps"
_OTHER = "ranks of its axis hold different sizes, and might chunk another collective of the product"
_NOT_BY_ROWS = {"all-reduce": "an all-reduce", "reduce-scatter": "a reduce-scatter along columns"}


def chunking_pass(view: MeshView, layouts: Sequence[Layout], namespace: Namespace, dtype: torch.dtype) -> Pass | None:
    """The pass for products of one set of shapes; None where `set_overlap` did not set one."""
    return _Chunker(view, layouts, namespace, dtype) if is_set(view) else None


class _Chunker:
    def __init__(self, view: MeshView, layouts: Sequence[Layout], namespace: Namespace, dtype: torch.dtype) -> None:
        self._view, self._layouts, self._namespace = view, layouts, namespace
        self._sizes, self._dtype = namespace.sizes, dtype
        self._symmetric = symmetric(view)
        self._why: dict[int, str] = {}  # for the collectives that stay whole in one pass, by id
        self._tried: dict[int, set[str]] = {}  # axes of the collectives that a product might be done with, by its id

    def __call__(self, instructions: Instructions) -> Instructions:
        self._why, self._tried = {}, {}
        made = self._passed(instructions)
        for one in communication(made):
            why = self._why.get(id(one), "nothing runs beside it" if one.blocking else "it runs under other products")
            self._note(one, "whole", why)
        return made

    def _passed(self, instructions: Instructions) -> Instructions:
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

    def _whole(self, made: Instructions, move: Instruction, why: str) -> Instructions:
        """The instructions, of which a collective stays whole."""
        self._why.setdefault(id(move), why)
        return made

    def _note(self, move: Communicate, how: str, why: str = "") -> None:
        product = "; ".join(map(str, self._layouts))
        collective = f"{move.move.kind} of {move.tensor}"
        note(self._view, OverlapDecision(product, move.phase, collective, move.move.axis, how, why))

    # One product with one of its collectives.

    def _reduce(self, made: Instructions, product: Matmul, following_flops: int = 0) -> Instructions:
        """A product side by side with its reduction, which has so many multiplications and additions to run behind
        otherwise."""
        moves = [one for one in made if isinstance(one, Communicate | Slice | Cast) and one.out == product.out]
        terms = sum(one.out == product.out for one in _products(made))
        if product.into is not None or terms != 1 or len(moves) != 1 or not isinstance(moves[0], Communicate):
            for move in moves:
                several = product.into is not None or terms != 1
                self._whole(made, move, "it is of a sum of several products" if several else _SEVERAL)
            return made
        found = self._chunked_reduce(moves[0], product, following_flops)
        if isinstance(found, str):
            return self._whole(made, moves[0], found)
        chunked, how = found
        self._note(moves[0], how)
        value = product.out
        start = Call(product.phase, (value,), f"start_chunked_{value}", chunked.start, (product.left, product.right))
        wait = Call(product.phase, (value,), f"wait_chunked_{value}", chunked.wait, (value,))
        changed: list[Instruction] = []
        for one in made:
            if one is product:
                changed.append(start)
            elif one is moves[0]:
                changed += [wait] if moves[0].blocking else []
            else:
                changed.append(wait if isinstance(one, Wait) and one.started is moves[0] else one)
        return tuple(changed)

    def _chunked_reduce(
        self, move: Communicate, product: Matmul, following_flops: int
    ) -> tuple[ChunkedMatmulReduce | MatmulReduceScatter, str] | str:
        spec = self._spec(product.index, product.role)
        found = self._chunkable(move, product, spec)
        if isinstance(found, str) or move.move.kind == "all-gather":
            return found if isinstance(found, str) else "what is gathered is a product"
        contraction, transfer, same = found
        shape = self._compute_shape(product.index, product.role)
        if self._symmetric is not None:
            by_rows = transfer.kind == "reduce-scatter" and transfer.dim < contraction.rows
            why = "" if by_rows else f"torch has no product with {_NOT_BY_ROWS[transfer.kind]}"
            why = why or self._not_fused(transfer, shape)
            return why or (MatmulReduceScatter(contraction, transfer), "symm_mem")
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
        if isinstance(chunking, str):
            return chunking
        return ChunkedMatmulReduce(contraction, transfer, chunking, by_rows=by_rows), str(chunking)

    def _gather(self, made: Instructions, gather: Communicate, readers: Sequence[Matmul]) -> Instructions:
        """The gather of a left operand side by side with the products that read it."""
        found = self._chunked_gather(made, gather, readers)
        if isinstance(found, str):
            return self._whole(made, gather, found)
        chunked, how = found
        self._note(gather, how)
        others = tuple(one.right for one in readers)
        return self._put(made, gather, readers, "gather_and_multiply", chunked, (gather.src, *others))

    def _chunked_gather(
        self, made: Instructions, gather: Communicate, readers: Sequence[Matmul]
    ) -> tuple[ChunkedGatherMatmul | GatherMatmul, str] | str:
        role = readers[0].operands[0]
        spec = self._spec(readers[0].index, role)
        found = [self._chunkable(gather, one, spec) for one in readers]
        if len(_moves_into(made, gather.out)) != 1:
            return _SEVERAL
        fit = [one for one in found if not isinstance(one, str)]
        if len(fit) < len(found):
            return next(one for one in found if isinstance(one, str))
        products, transfer, same = [one[0] for one in fit], fit[0][1], all(one[2] for one in fit)
        if transfer.kind != "all-gather" or any(transfer.dim >= one.rows or not one.lhs_has_rows for one in products):
            return "it is not along rows of the product"
        stored, ranks = self._sizes.shape_of(spec.dims), transfer.axis.size
        if stored[transfer.dim] * ranks != transfer.global_size:
            return _UNEVEN
        assemble = _is_read_by_others(made, gather, readers)
        if self._symmetric is not None:
            why = "" if len({one.rows for one in products}) == 1 else "its products have different rows"
            why = why or self._not_fused(transfer, stored)
            return why or (GatherMatmul(products, transfer, assemble=assemble), "symm_mem")
        reread = sum(prod(self._compute_shape(one.index, "rhs")) for one in readers) * (ranks - 1)
        chunking = self._choose(transfer, same, stored, readers[0].index, len(readers), reread, 1 / ranks)
        if isinstance(chunking, str):
            return chunking
        return ChunkedGatherMatmul(products, transfer, chunking, assemble=assemble), str(chunking)

    def _gather_rhs(self, made: Instructions, product: Matmul) -> Instructions:
        """The gather of a weight side by side with the product, Y or dX, that reads it."""
        gather = _gather_of(made, product.right)
        if gather is None:
            return made
        found = self._chunked_rhs(made, gather, product)
        if isinstance(found, str):
            return self._whole(made, gather, found)
        chunked, how = found
        self._note(gather, how)
        return self._put(made, gather, [product], "gather_and_multiply", chunked, (gather.src, product.left))

    def _chunked_rhs(
        self, made: Instructions, gather: Communicate, product: Matmul
    ) -> tuple[ChunkedRhsGatherMatmul, str] | str:
        rhs, out = self._spec(product.index, "rhs"), self._spec(product.index, product.role)
        found = self._chunkable(gather, product, rhs)
        if len(_moves_into(made, gather.out)) != 1:
            return _SEVERAL
        if isinstance(found, str):
            return found
        if self._symmetric is not None:
            return "torch has no product that gathers its second operand, a weight"
        contraction, transfer, same = found
        stored, ranks = self._sizes.shape_of(rhs.dims), transfer.axis.size
        places = {letter: out.letters.index(letter) for letter in rhs.letters if letter in out.letters}
        if transfer.kind != "all-gather" or stored[transfer.dim] * ranks != transfer.global_size or not places:
            return _UNEVEN
        gathered = rhs.letters[transfer.dim]
        # A letter that is whole here leaves whole chunks; the gathered one, the local shard's part to begin with.
        letter = max(places, key=lambda one: (one != gathered, stored[rhs.letters.index(one)]))
        local = 1 / ranks if letter == gathered else 0.0
        left = prod(self._compute_shape(product.index, product.operands[0]))
        reread = left * (ranks - 1 if local else 1)
        chunking = self._choose(transfer, same, stored, product.index, 1, reread, local)
        if isinstance(chunking, str):
            return chunking
        along, place = rhs.letters.index(letter), places[letter]
        kept = _is_read_by_others(made, gather, [product])
        return ChunkedRhsGatherMatmul(contraction, transfer, chunking, along, place, assemble=kept), str(chunking)

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
    ) -> tuple[Contraction, Transfer, bool] | str:
        """The product and its one transfer, if both can be chunked, and whether all ranks of the axis know the same
        sizes, and so decide alike; or why not."""
        contraction = self._namespace.map(product)
        if not isinstance(contraction, Contraction) or not contraction.rows:
            return "the product has batched letters, or its result is permuted"
        axis, layout, same = self._view.axes[move.move.axis], self._layouts[product.index], True
        tried = self._tried.setdefault(id(product), set())
        others = tried - {axis.name}
        tried.add(axis.name)
        for spec in (layout.lhs, layout.rhs, layout.out):
            for dim in spec.dims:
                if axis.name in dim.axes:
                    size = self._sizes.get(dim.letter, dim.axes[: dim.axes.index(axis.name)])
                    if size is None or size % axis.size:
                        if dim.letter in moved.letters:
                            return _UNEVEN
                        same = False
        if not same and others:
            return _OTHER  # what became of others depends on sizes that other ranks of this axis do not have
        size = 0
        if move.move.kind == "all-gather":
            gathered = move.move.after[move.move.dim]
            size = self._sizes.get(gathered.letter, gathered.axes) or 0
        what = f"{move.move.kind} of {move.tensor}"
        return contraction, Transfer(move.move.kind, what, axis, move.move.dim, size), same

    def _not_fused(self, transfer: Transfer, moved: tuple[int, ...]) -> str:
        """Why a product is not one over symmetric memory; empty if it is. moved: the shape of what its collective is
        given, the same on all ranks of the axis."""
        assert self._symmetric is not None
        return self._symmetric.lacking.get(transfer.axis.name, "" if prod(moved) else _EMPTY)

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
    ) -> Chunking | str:
        """The chunks in which to do products with one of their collectives, or why that stays whole.

        moved: the shape of what the collective is given. reread: elements that each chunk beyond the first reads once
        more. local_fraction, following_flops: see `Costs.chunks`.
        """
        size, name = self._dtype.itemsize, transfer.axis.name
        count = sent(transfer.kind, prod(moved), transfer.axis.size) * size
        flops = 2 * products * self._multiplications(at)

        def choice() -> Chunking:
            return choose(self._view, name, count, flops, reread * size, self._dtype, local_fraction, following_flops)

        if not (flops if same else prod(moved)):
            return _EMPTY
        what = f"{transfer.what} {moved} beside products of {self._layouts[at]}, {self._dtype}"
        chunking = choice() if same else choose_together(self._view, transfer.axis, what, choice)
        return chunking if chunking != WHOLE else "chunks would gain too little"

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
