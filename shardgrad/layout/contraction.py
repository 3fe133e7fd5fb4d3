"""How one contraction of two tensors, given by letters, is done as a single (batched) matrix product. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

Letters = tuple[str, ...]

LINEAR = "linear({0}, {1})"


@dataclass(frozen=True, slots=True)
class Arrangement:
    """out = Σ left · right over the letters that `out` lacks, as `[batch, rows, inner] · [batch, inner, columns]`.

    swap: whether the operands change places, which leaves the result in `out`'s order more often.
    left, right: the permutations of the operands, after the swap; None where nothing is to be done.
    unpermute: the permutation from (batch, rows, columns) to `out`'s order; None likewise.
    batched, rows, columns: how many letters there are of each.
    expression: torch's own way to write it, of `{0}` and `{1}` (as they come, before the swap); None if there is none.
    """

    swap: bool
    left: tuple[int, ...] | None
    right: tuple[int, ...] | None
    unpermute: tuple[int, ...] | None
    batched: int
    rows: int
    columns: int
    expression: str | None

    @property
    def adds_bias(self) -> bool:
        """Whether a bias of the column letters can be added as the product is made."""
        return not self.swap and self.batched == 0 and self.unpermute is None and self.columns > 0


def arrange(left: Letters, right: Letters, out: Letters) -> Arrangement:
    """Choose the order of the operands, and of the letters within them."""
    swap = _in_order(right, left, out) and not _in_order(left, right, out)
    if swap:
        left, right = right, left
    batched, rows, columns = _roles(left, right, out)
    contracted = tuple(x for x in left if x in right and x not in out)
    unpermute = _order(batched + rows + columns, out)
    expression = None
    if not batched and rows and len(columns) == 1 and unpermute is None:
        expression = _expression(left, right, rows, contracted, columns)
        if expression is not None and swap:
            expression = expression.format("{1}", "{0}")
    return Arrangement(
        swap,
        _order(left, batched + rows + contracted),
        _order(right, batched + contracted + columns),
        unpermute,
        len(batched),
        len(rows),
        len(columns),
        expression,
    )


def _roles(left: Letters, right: Letters, out: Letters) -> tuple[Letters, Letters, Letters]:
    """The batched letters, the rows and the columns, in `out`'s order."""
    return (
        tuple(x for x in out if x in left and x in right),
        tuple(x for x in out if x in left and x not in right),
        tuple(x for x in out if x in right and x not in left),
    )


def _in_order(left: Letters, right: Letters, out: Letters) -> bool:
    """Whether a product with `left` first comes out in `out`'s order."""
    batched, rows, columns = _roles(left, right, out)
    return batched + rows + columns == out


def _order(letters: Letters, wanted: Letters) -> tuple[int, ...] | None:
    return None if letters == wanted else tuple(letters.index(letter) for letter in wanted)


def _expression(left: Letters, right: Letters, rows: Letters, contracted: Letters, columns: Letters) -> str | None:
    """torch's own way to write a product without batched letters, whose operands lie in one of the common orders."""
    if left == rows + contracted and len(contracted) == 1:
        if right == columns + contracted:
            return LINEAR
        if right == contracted + columns:
            return "{0}.mm({1})" if len(rows) == 1 else "matmul({0}, {1})"
    if len(rows) == 1 and left == contracted + rows and right == contracted + columns and contracted:
        if len(contracted) == 1:
            return "{0}.t().mm({1})"
        return "{0}.flatten(0, -2).t().mm({1}.flatten(0, -2))"
    return None
