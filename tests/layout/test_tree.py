"""One tree over the pieces of a sum: the same expression however many ranks hold them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import log2
from typing import Any

import pytest

from shardgrad.layout.tree import Cut, Level, TreeSum, nodes, side_by_side, single, summed, tree_sum

MOST = 24
Term = Any
"""The number of a piece, or the pair of terms that were added: a sum that knows how it was associated."""


def expected(first: int, size: int, pieces: int) -> Term | None:
    """The tree as its definition says: a node is its first half plus its second."""
    if first >= pieces:
        return None
    if size == 1:
        return first
    left, right = expected(first, size // 2, pieces), expected(first + size // 2, size // 2, pieces)
    return left if right is None else (left, right)


def whole(pieces: int) -> Term | None:
    return expected(0, 1 << (pieces - 1).bit_length(), pieces)


def pair(left: Term, right: Term) -> Term:
    return left, right


def divisors(number: int) -> list[int]:
    return [at for at in range(1, number + 1) if number % at == 0]


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@pytest.mark.parametrize("pieces", range(1, MOST + 1))
def test_nodes_are_the_largest_and_fill_the_span(pieces: int) -> None:
    every = {(first, min(first + size, pieces)) for size in (1, 2, 4, 8, 16, 32) for first in range(0, pieces, size)}
    for first, end in product(range(pieces), range(pieces + 1)):
        found = nodes(first, end, pieces)
        assert [at for span in found for at in range(*span)] == list(range(first, end))
        assert set(found) <= every
        for span in found:
            larger = {other for other in every if other[0] <= span[0] and span[1] <= other[1] and other != span}
            assert not any(first <= other[0] and other[1] <= end for other in larger)


@pytest.mark.parametrize("pieces", range(1, MOST + 1))
def test_a_rank_holds_few_sums_and_sends_one_for_each_node(pieces: int) -> None:
    for ranks in divisors(pieces):
        each = pieces // ranks
        for rank in range(ranks):
            total = TreeSum(pieces, pair)
            for at in range(rank * each, (rank + 1) * each):
                total.push((at, at + 1), at)
            spans = nodes(rank * each, (rank + 1) * each, pieces)
            assert len(total.values) == len(spans)
            assert [leaves(value) for value in total.values] == [list(range(*span)) for span in spans]
            if is_power_of_two(each):
                assert len(total.values) == 1
                assert total.most <= log2(each) + 1
            if ranks == 1:
                assert total.values == [whole(pieces)]


def leaves(term: Term) -> list[int]:
    return [at for half in term for at in leaves(half)] if isinstance(term, tuple) else [term]


def over_ranks(cuts: list[tuple[int, int]]) -> Iterator[Term]:
    """What each rank has in the end of a sum over axes of (pieces, ranks), minor first, reduced one after the other."""
    names = [str(at) for at in range(len(cuts))]
    places = list(product(*(range(ranks) for _, ranks in cuts)))

    def level(place: tuple[int, ...]) -> Level:
        return Level(tuple(Cut(name, pieces, ranks, at) for name, (pieces, ranks), at in zip(names, cuts, place)))

    have = {}
    for place in places:
        own = level(place)
        spans = single(own.held()[0], own.count)
        assert own.held() == (spans[0][0], spans[-1][1])
        have[place] = tree_sum([at for at, _ in spans], spans, own.pieces, pair)
        if own.ranks > 1:
            assert len(have[place]) <= max(side_by_side(own), 1)
    assert sorted(at for values in have.values() for value in values for at in leaves(value)) == list(
        range(level(places[0]).pieces)
    )
    for axis, (_, ranks) in enumerate(cuts):
        if ranks == 1:
            continue
        before = have
        have = {}
        for place in places:
            how = summed(level(place), names[axis])
            values, spans = [], []
            for at, brought in enumerate(how.brought):
                sent = before[(*place[:axis], at, *place[axis + 1 :])]
                assert len(sent) == len(brought) <= max(how.held[0], 1)
                values += sent
                spans += brought
            have[place] = tree_sum(values, spans, how.pieces, pair)
            assert len(have[place]) <= max(how.held[1], 1)
            if how.is_plain:  # the backend may add the two in any order
                assert len(values) == 2
                assert len(have[place]) == 1
    for place in places:
        [value] = have[place]
        yield value


@pytest.mark.parametrize("pieces", range(1, MOST + 1))
def test_any_number_of_ranks_makes_the_same_expression(pieces: int) -> None:
    for ranks in divisors(pieces):
        for value in over_ranks([(pieces, ranks)]):
            assert value == whole(pieces), (pieces, ranks)


TWO = [(minor, major) for minor in range(1, MOST + 1) for major in range(1, MOST // minor + 1)]


def test_two_axes_on_one_letter_make_the_same_expression() -> None:
    for minor, major in TWO:
        for p, q in product(divisors(minor), divisors(major)):
            for value in over_ranks([(minor, p), (major, q)]):
                assert value == whole(minor * major), (minor, p, major, q)


def test_three_axes_on_one_letter_make_the_same_expression() -> None:
    for cuts in [(2, 2, 2), (2, 3, 2), (3, 2, 2), (2, 2, 3), (4, 2, 3)]:
        for ranks in product(*map(divisors, cuts)):
            for value in over_ranks(list(zip(cuts, ranks))):
                assert value == whole(cuts[0] * cuts[1] * cuts[2]), (cuts, ranks)


def test_one_sum_a_rank_travels_where_each_holds_a_power_of_two() -> None:
    for minor, major in TWO:
        for p, q in product(divisors(minor), divisors(major)):
            level = Level((Cut("minor", minor, p, 0), Cut("major", major, q, 0)))
            if p > 1 and is_power_of_two(level.count):
                assert side_by_side(level) == 0
                assert all(len(spans) == 1 for spans in summed(level, "minor").brought)


def test_another_order_of_adding_is_another_expression() -> None:
    """What a left-to-right sum, or one sum a rank added in order, would be."""
    left = (((0, 1), 2), 3)
    assert whole(4) == ((0, 1), (2, 3)) != left
    assert whole(6) == (((0, 1), (2, 3)), (4, 5)) != (((0, 1), 2), ((3, 4), 5))
