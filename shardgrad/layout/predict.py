"""What one layout becomes, on a mesh that need not exist: instructions, collectives with their bytes, the program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from shardgrad.errors import LayoutError
from shardgrad.layout.lower import Products, backward, forward
from shardgrad.layout.plan import Role
from shardgrad.layout.program import backward_program, forward_program
from shardgrad.layout.schedule import Instructions
from shardgrad.layout.sizes import Sizes

if TYPE_CHECKING:
    from shardgrad.layout.cost import Collective
    from shardgrad.layout.layout import Layout


def instructions(
    layout: Layout,
    mesh_shape: Mapping[str, int],
    bias: bool | None,
    frozen: Collection[str],
    save_gathered: Collection[str],
) -> Instructions:
    """`Layout.instructions`."""
    _check(layout, frozen, save_gathered)
    has_bias = layout.has_bias if bias is None else bias
    operands: dict[str, Role] = {layout.lhs.name: "lhs", layout.rhs.name: "rhs"}
    if has_bias:
        operands[layout.bias.name] = "bias"
    need = {role for name, role in operands.items() if name not in frozen}
    products = _products(layout, mesh_shape, has_bias, save_gathered, None, contraction=False)
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

    width = cost.itemsize(dtype)
    reduce_width = width if reduce_dtype is None else cost.itemsize(reduce_dtype)
    if reduce_width < width:
        raise LayoutError(f"reduce_dtype {reduce_dtype} is narrower than {dtype}: sums would lose what is there")
    made = instructions(layout, sizes.shape, bias, frozen, save_gathered)
    return list(cost.collectives(made, sizes, wire=width, reduce_wire=reduce_width))


def program(
    layout: Layout,
    mesh_shape: Mapping[str, int],
    bias: bool | None,
    frozen: Collection[str],
    save_gathered: Collection[str],
    dtype: Any,
    reduce_dtype: Any,
    coordinate: Mapping[str, int] | None,
) -> str:
    """`Layout.program`."""
    _check(layout, frozen, save_gathered)
    has_bias = layout.has_bias if bias is None else bias
    products = _products(
        layout,
        mesh_shape,
        has_bias,
        save_gathered,
        coordinate,
        dtype=str(dtype).removeprefix("torch."),
        reduce_dtype=None if reduce_dtype in (None, dtype) else str(reduce_dtype).removeprefix("torch."),
        contraction=layout.spatial == 0,
    )
    needs = [spec.name not in frozen for spec in (layout.lhs, layout.rhs, layout.bias)[: 2 + has_bias]]
    if not any(needs):
        return forward_program(products, None).text
    return f"{forward_program(products, needs).text}\n{backward_program(products, needs, [True]).text}"


def _check(layout: Layout, frozen: Collection[str], save_gathered: Collection[str]) -> None:
    """Refuse names that are no operands."""
    operands = layout.lhs.name, layout.rhs.name
    for what, names, known in (
        ("frozen", frozen, (*operands, layout.bias.name)),
        ("save_gathered", save_gathered, operands),
    ):
        for name in names:
            if name not in known:
                raise LayoutError(f"{what}: no operand {name!r} in {layout}")


def _products(
    layout: Layout,
    mesh_shape: Mapping[str, int],
    has_bias: bool,
    save_gathered: Collection[str],
    coordinate: Mapping[str, int] | None,
    **more: Any,
) -> Products:
    for axis in layout.axes:
        if axis not in mesh_shape:
            raise LayoutError(f"the mesh {dict(mesh_shape)} lacks axis {axis!r} of {layout}")
    sizes = Sizes(mesh_shape, dict.fromkeys(mesh_shape, 0) | dict(coordinate or {}))
    roles: dict[str, Role] = {layout.lhs.name: "lhs", layout.rhs.name: "rhs"}
    saved = frozenset((roles[name], 0) for name in save_gathered)
    return Products((layout.plan,), (has_bias,), sizes, saved, **more)
