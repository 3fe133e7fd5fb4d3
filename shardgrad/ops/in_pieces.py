"""What exact mode computes on one rank: products of single pieces, each contiguous, and sums of them in a tree.

The multiplier is given the same shapes whatever the number of ranks: a matrix with more rows or columns, or one that is
part of a larger one in memory, may be multiplied in another order, and rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product as every
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.tree import add, stacked
from shardgrad.layout.schedule import InPieces, Matmul, Term
from shardgrad.layout.tree import Level, TreeSum, single, tree_sum

_ALIGNED = 64  # bytes

Local = Callable[..., Tensor]
Chosen = Mapping[str, int]
"""Which piece of each letter."""


def compact(x: Tensor) -> Tensor:
    """x in memory of its own shape, nothing between its elements: of a dim of size 1 the stride counts as well, for
    BLAS is told it. It begins where torch would begin a tensor of its own: where else, kernels do the first elements
    one by one, and round otherwise (seen of MKL's matrix-vector products on AMD's processors)."""
    if x.data_ptr() % _ALIGNED:
        return x.clone(memory_format=torch.contiguous_format)
    if x.is_contiguous() and 1 not in x.shape and 0 not in x.shape:
        return x  # strides of no other dims are free
    return x.contiguous().view(-1).view(x.shape)


def piece(x: Tensor, at: Sequence[int], counts: Sequence[int]) -> Tensor:
    """One of so many pieces along each of the last dims of x, as a view."""
    if max(counts, default=1) == 1:
        return x
    for dim, (place, count) in enumerate(zip(at, counts), x.dim() - len(counts)):
        if count > 1:
            size = x.shape[dim] // count
            x = x.narrow(dim, place * size, size)
    return x


class _Operand:
    """A tensor whose pieces are taken when they are asked for, each once."""

    def __init__(self, x: Tensor, letters: Sequence[str], counts: Sequence[int]) -> None:
        self._x, self._letters, self._counts = x, letters, counts
        self._taken: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, chosen: Chosen) -> Tensor:
        at = tuple([chosen.get(letter, 0) if n > 1 else 0 for letter, n in zip(self._letters, self._counts)])
        found = self._taken.get(at)
        if found is None:
            found = self._taken[at] = compact(piece(self._x, at, self._counts))
        return found


class Piecewise:
    """The value of an `InPieces`, of the values that it reads.

    local: what each term computes of single pieces.
    most: the most sums that a call has held at once, for one block of the result.
    """

    def __init__(self, made: InPieces, local: Sequence[Local]) -> None:
        self._made, self._local = made, local
        self._dtype = None if made.dtype is None else getattr(torch, made.dtype)
        values = {value: at for at, value in enumerate(made.reads)}
        self._reads = [[values[value] for value in _operands(term)] for term in made.terms]
        self._cuts = [
            [(letters, [dict(term.counts).get(letter, 1) for letter in letters]) for letters in term.operands]
            for term in made.terms
        ]
        self._spans = [single(level.held()[0], level.count) for level in made.levels]
        counts = dict(made.terms[0].counts)
        self._letters = made.terms[0].letters
        self._counts = [counts.get(letter, 1) for letter in self._letters]
        self.most = 1
        cut = made.held or made.later or max(counts.values(), default=1) > 1
        self._is_whole = not cut and all(level.count == 1 for level in made.levels)

    def __call__(self, *values: Tensor) -> Tensor:
        return self._of_wholes(values) if self._is_whole else self._of_pieces(values)

    def _of_wholes(self, values: Sequence[Tensor]) -> Tensor:
        """Where nothing is cut, as with a rank for each piece."""
        found: Tensor | None = None
        for local, reads in zip(self._local, self._reads):
            operands = [compact(values[at]) for at in reads]
            found = local(*operands) if found is None else local(*operands, found)
        assert found is not None
        return found if self._dtype is None else found.to(self._dtype)

    def _of_pieces(self, values: Sequence[Tensor]) -> Tensor:
        terms = [
            [_Operand(values[at], *cut) for at, cut in zip(reads, cuts)] for reads, cuts in zip(self._reads, self._cuts)
        ]
        whole: Tensor | None = None
        for at in every(*map(range, self._counts)):
            block = self._block(terms, dict(zip(self._letters, at)))
            if max(self._counts, default=1) == 1:
                return block
            if whole is None:
                lead = block.dim() - len(at)
                sizes = [size * count for size, count in zip(block.shape[lead:], self._counts)]
                whole = block.new_empty((*block.shape[:lead], *sizes))
            piece(whole, at, self._counts).copy_(block)
        assert whole is not None
        return whole

    def _block(self, terms: Sequence[Sequence[_Operand]], chosen: Chosen) -> Tensor:
        """A block of the result; what is summed later is side by side on dims of its own."""
        made = self._made
        if not made.later:
            return self._sum(terms, [chosen] * len(terms))
        first, found = len(made.levels), []
        for at in every(*(range(level.count) for level in made.later)):
            found.append(self._sum(terms, [{**chosen, **dict(zip(t.summed[first:], at))} for t in made.terms]))
        dim = int(made.held > 0)
        return torch.stack(found, dim).unflatten(dim, [level.count for level in made.later])

    def _sum(self, terms: Sequence[Sequence[_Operand]], chosen: Sequence[Chosen]) -> Tensor:
        """What this rank adds up of one block."""
        made = self._made
        if not made.levels:
            return self._product(terms, chosen)
        return stacked(self._added(terms, chosen, len(made.levels) - 1), made.held)

    def _added(self, terms: Sequence[Sequence[_Operand]], chosen: Sequence[Chosen], depth: int) -> list[Tensor]:
        """The sums of the nodes of one level; all levels within it are whole on this rank."""
        total = TreeSum(self._made.levels[depth].pieces, add)
        for at, span in enumerate(self._spans[depth]):
            here = [{**one, term.summed[depth]: at} for one, term in zip(chosen, self._made.terms)]
            if depth:
                [value] = self._added(terms, here, depth - 1)
            else:
                value = self._product(terms, here)
            total.push(span, value)
        self.most = max(self.most, total.most)
        return total.values

    def _product(self, terms: Sequence[Sequence[_Operand]], chosen: Sequence[Chosen]) -> Tensor:
        """The terms of single pieces, added in their order."""
        found: Tensor | None = None
        for local, operands, one in zip(self._local, terms, chosen):
            pieces = [operand(one) for operand in operands]
            found = local(*pieces) if found is None else local(*pieces, found)
        assert found is not None
        return found if self._dtype is None else found.to(self._dtype)


def _operands(term: Term) -> Iterator[str]:
    made = term.made
    if isinstance(made, Matmul):
        yield from (made.left, made.right)
        if made.bias is not None:
            yield made.bias
    else:
        yield made.src


def fold(x: Tensor, level: Level, held: int, lead: int) -> Tensor:
    """The sums over the dim behind so many leading ones, whose places are the pieces of a level on this rank."""
    return stacked(tree_sum(x.unbind(lead), single(level.held()[0], level.count), level.pieces, add), held)


def sum_bias(dy: Tensor, letters: tuple[tuple[str, ...], tuple[str, ...]]) -> Tensor:
    """dY summed over the letters that the bias lacks. letters: of dY, then of the bias."""
    y, b = letters
    lacks: Any = tuple(at for at, letter in enumerate(y) if letter not in b)
    total = dy.sum(lacks) if lacks else dy.clone()
    left = [letter for letter in y if letter in b]
    return total.permute([left.index(letter) for letter in b]).contiguous()
