"""What one layout becomes, on a mesh that need not exist: instructions, collectives with their bytes, the program."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

from shardgrad.errors import LayoutError
from shardgrad.layout.lower import Products, backward, forward
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.plan import Plan, Role
from shardgrad.layout.program import backward_program, forward_program
from shardgrad.layout.schedule import Instructions
from shardgrad.layout.sizes import Sizes

if TYPE_CHECKING:
    from shardgrad.layout.cost import Collective


class Layout(Protocol):
    """What is asked of a `shardgrad.Layout`."""

    lhs: TensorSpec
    rhs: TensorSpec
    bias: TensorSpec
    has_bias: bool
    spatial: int
    plan: Plan


def instructions(
    layout: Layout, sizes: Sizes, bias: bool | None, frozen: Collection[str], save_gathered: Collection[str]
) -> Instructions:
    """`Layout.instructions`, of one rank's sizes."""
    has_bias = _has_bias(layout, bias, frozen, save_gathered)
    operands: dict[str, Role] = {layout.lhs.name: "lhs", layout.rhs.name: "rhs"}
    if has_bias:
        operands[layout.bias.name] = "bias"
    need = {role for name, role in operands.items() if name not in frozen}
    products = Products((layout.plan,), (has_bias,), sizes, _saved(layout, save_gathered), contraction=False)
    return (*forward(products), *backward(products, [need]))


def collectives(
    layout: Layout,
    sizes: Sizes,
    dtype: Any,
    bias: bool | None,
    frozen: Collection[str],
    save_gathered: Collection[str],
    reduce_dtype: Any,
) -> list[Collective]:
    """`Layout.collectives`, of one rank's sizes."""
    from shardgrad.layout import cost

    wire, reduce_wire = widths(dtype, reduce_dtype)
    made = instructions(layout, sizes, bias, frozen, save_gathered)
    return list(cost.collectives(made, sizes, wire=wire, reduce_wire=reduce_wire))


def program(
    layout: Layout,
    sizes: Sizes,
    bias: bool | None,
    frozen: Collection[str],
    save_gathered: Collection[str],
    dtype: Any,
    reduce_dtype: Any,
) -> str:
    """`Layout.program`, of one rank."""
    has_bias = _has_bias(layout, bias, frozen, save_gathered)
    widths(dtype, reduce_dtype)
    own, wide = (None if one is None else str(one).removeprefix("torch.") for one in (dtype, reduce_dtype))
    products = Products(
        (layout.plan,),
        (has_bias,),
        sizes,
        _saved(layout, save_gathered),
        str(own),
        None if wide == own else wide,
        contraction=layout.spatial == 0,
    )
    needs = [spec.name not in frozen for spec in (layout.lhs, layout.rhs, layout.bias)[: 2 + has_bias]]
    if not any(needs):
        return forward_program(products, None).text
    return f"{forward_program(products, needs).text}\n{backward_program(products, needs, [True]).text}"


def widths(dtype: Any, reduce_dtype: Any) -> tuple[int, int]:
    """Bytes of an element of the operands, and of one that is reduced.

    Raises:
        LayoutError: reduce_dtype is narrower than dtype.
    """
    from shardgrad.layout.cost import itemsize

    width = itemsize(dtype)
    wide = width if reduce_dtype is None else itemsize(reduce_dtype)
    if wide < width:
        raise LayoutError(f"reduce_dtype {reduce_dtype} is narrower than {dtype}: sums would lose what is there")
    return width, wide


def _has_bias(layout: Layout, bias: bool | None, frozen: Collection[str], save_gathered: Collection[str]) -> bool:
    """Whether a bias is added, once frozen and save_gathered name operands of the layout."""
    operands = layout.lhs.name, layout.rhs.name
    for what, names, known in (
        ("frozen", frozen, (*operands, layout.bias.name)),
        ("save_gathered", save_gathered, operands),
    ):
        for name in names:
            if name not in known:
                raise LayoutError(f"{what}: no operand {name!r} in {layout}")
    return layout.has_bias if bias is None else bias


def _saved(layout: Layout, save_gathered: Collection[str]) -> frozenset[tuple[Role, int]]:
    roles: dict[str, Role] = {layout.lhs.name: "lhs", layout.rhs.name: "rhs"}
    return frozenset((roles[name], 0) for name in save_gathered)
