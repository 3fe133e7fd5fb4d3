"""The least that a product can send: Al Daas, Ballard, Grigori, Kumar and Rouse 2022, arXiv 2205.13407, theorem 3.

A rank of P that begins and ends with one P-th of operands and product, and does one P-th of the multiplications,
moves at least so many words. A 3D layout on the right grid moves just as many, where sizes divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from shardgrad.arguments import told


@told
def least_words(rows: int, contracted: int, columns: int, ranks: int) -> float:
    """The least number of elements that some rank sends for Y[n,m] = Σ_d X[n,d] W[d,m], each tensor stored once.

    With the sizes sorted, m ≥ n ≥ k, a rank must have D elements in all at hand, of which it stores (mn + mk + nk)/P:

        P ≤ m/n             D = (mn + mk)/P + nk       the smallest tensor everywhere: one dim of ranks
        m/n ≤ P ≤ mn/k²     D = mn/P + 2√(mnk²/P)      the largest stays where it is: two
        mn/k² ≤ P           D = 3 (mnk/P)^⅔            all three move

    The same for dX and dW, which have the same three sizes.

    Raises:
        ValueError: a size, or ranks, is not positive.
    """
    if min(rows, contracted, columns, ranks) < 1:
        raise ValueError(f"sizes and ranks must be positive, not {rows}, {contracted}, {columns}, {ranks}")
    m, n, k = sorted((rows, contracted, columns), reverse=True)
    if ranks * n <= m:
        at_hand = (m * n + m * k) / ranks + n * k
    elif ranks * k * k <= m * n:
        at_hand = m * n / ranks + 2 * sqrt(m * n * k * k / ranks)
    else:
        at_hand = 3 * (m * n * k / ranks) ** (2 / 3)
    return at_hand - (m * n + m * k + n * k) / ranks


@told
def grid_words(rows: int, contracted: int, columns: int, grid: tuple[int, int, int]) -> float:
    """Elements that a rank sends on a grid whose axes split rows, contracted and columns, with each tensor gathered or
    reduced along the one axis that it lacks."""
    p, q, r = grid
    x, w, y = rows * contracted / (p * q), contracted * columns / (q * r), rows * columns / (p * r)
    return x * (1 - 1 / r) + w * (1 - 1 / p) + y * (1 - 1 / q)


@told
def best_grid(rows: int, contracted: int, columns: int, ranks: int) -> tuple[int, int, int]:
    """The grid of so many ranks that sends least; of equals, the one with most ranks along rows, then contracted."""
    return min(_grids(ranks), key=lambda grid: (grid_words(rows, contracted, columns, grid), -grid[0], -grid[1]))


def _grids(ranks: int) -> Iterator[tuple[int, int, int]]:
    for p in range(1, ranks + 1):
        if ranks % p == 0:
            for q in range(1, ranks // p + 1):
                if (ranks // p) % q == 0:
                    yield p, q, ranks // p // q
