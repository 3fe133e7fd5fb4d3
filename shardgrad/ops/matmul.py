"""`matmul`: the one differentiable product. Forward and backward run the plan that the layout derives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import explain
from shardgrad.comm import shim
from shardgrad.layout.layout import Layout
from shardgrad.ops.bound import BoundMatmul, bind, run

Weight = tuple[Tensor, Layout | str] | tuple[Tensor, Layout | str, Tensor | None]
_layout = lru_cache(maxsize=512)(Layout)


@overload
def matmul(
    x: Tensor,
    w: Tensor,
    layout: Layout | str,
    mesh: DeviceMesh,
    bias: Tensor | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> Tensor: ...
@overload
def matmul(
    x: Tensor,
    w: Sequence[Weight],
    layout: DeviceMesh | None = None,
    mesh: DeviceMesh | None = None,
    bias: None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]: ...
def matmul(
    x: Tensor,
    w: Annotated[Any, Tensor | Sequence[Weight]],
    layout: Annotated[Any, Layout | str | DeviceMesh | None] = None,
    mesh: Annotated[Any, DeviceMesh | None] = None,
    bias: Tensor | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> Any:
    """The product of two sharded tensors, in the storage that the layout writes. Local shards in, local shard out.

    Differentiable: each gradient comes back stored as its tensor is, complete (but for axes marked `{axis}`), for one
    global scalar loss. What is not needed is neither computed nor communicated.

        y = matmul(x, w, "X[n,d] W[d,m/tp] -> Y[n,m/tp]", mesh, sizes={"m": 5})

    Products of one input share its gather and the reduction of its gradient:

        q, k, v = matmul(x, [(wq, layout_q), (wk, layout_k), (wv, layout_v, bias_v)], mesh)

    Args:
        x, w: local shards of the first and the second operand, in the layout's order and of one dtype.
        layout: a `Layout` or its text.
        mesh: a DeviceMesh with named axes, which has every axis that the layout mentions.
        bias: local shard of the bias, stored as `layout.bias`: as the layout writes it, else the product's column
            letters, split by the axes that split them. Added once, after the reduction.
        sizes: global sizes of letters. They guard against a tensor that was not sharded, which from local shapes alone
            reads as the shard of a larger one: gradients are then wrong in silence, and with sizes an error. Needed
            only for a letter that no tensor of the call holds unsharded by storage; without it the ranks then exchange
            their sizes, one small exchange a call.
        save_gathered: names of operands that stay in memory as gathered until backward; the others are gathered again.
        reduce_dtype: the dtype in which partial sums are reduced, e.g. torch.float32 for 16-bit operands.

    Raises:
        LayoutError: the layout is illegal, or does not fit the arguments.
        MeshError: the mesh lacks an axis.
        ShapeError: a local shape contradicts the layout, another tensor, `sizes`, or how the axes shard; dtypes
            or devices differ.
        DisagreementError: the ranks of an axis came with different layouts, shapes, dtypes or frozen operands
            (compared when first seen; at every call under `check_every_call`).
        CollectiveError: a collective failed or timed out.
    """
    try:
        if isinstance(w, Tensor):
            if mesh is None:
                raise TypeError("matmul needs a mesh: matmul(x, w, layout, mesh)")
            return multiply(x, ((w, _as_layout(layout), bias),), mesh, sizes, save_gathered, reduce_dtype)[0]
        return _matmuls(x, w, layout, mesh, bias, sizes, save_gathered, reduce_dtype)
    except Exception as error:
        if torch.compiler.is_compiling():  # from torch 2.14 on it looks into handlers
            raise
        given = {"save_gathered": save_gathered, "reduce_dtype": reduce_dtype}
        explain(error, matmul, (x, w, layout, mesh, bias, sizes), given)
        raise


def _matmuls(
    x: Tensor,
    w: Any,
    layout: Any,
    mesh: Any,
    bias: Tensor | None,
    sizes: Mapping[str, int] | None,
    save_gathered: Collection[str],
    reduce_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """`matmul` of several weights, as it was called."""
    if not isinstance(w, list | tuple):
        raise TypeError(f"w must be a tensor, or a list of (w, layout) and (w, layout, bias), not {type(w).__name__}")
    if isinstance(layout, DeviceMesh) and mesh is None:
        layout, mesh = None, layout
    if bias is not None or layout is not None or mesh is None or not w:
        raise TypeError("products of one input: matmul(x, [(w, layout), (w, layout, bias), …], mesh)")
    weights = tuple((entry[0], _as_layout(entry[1]), entry[2] if len(entry) > 2 else None) for entry in w)
    return multiply(x, weights, mesh, sizes, save_gathered, reduce_dtype)


def _as_layout(layout: object) -> Layout:
    if isinstance(layout, Layout):
        return layout
    if torch.compiler.is_compiling():
        return _read(layout)
    return _layout(layout) if isinstance(layout, str) else Layout(layout)  # type: ignore[arg-type]  # which says so


@shim.constant
def _read(layout: Any) -> Layout:
    """A layout's text, read where torch.compile does not look."""
    return _layout(layout)


def multiply(
    x: Tensor,
    weights: tuple[tuple[Tensor, Layout, Tensor | None], ...],
    mesh: DeviceMesh,
    sizes: Mapping[str, int] | None,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """`matmul` of one or several weights, its arguments in one form."""
    layouts = tuple([layout for _, layout, _ in weights])
    biases = [bias for _, _, bias in weights]
    biased = tuple([bias is not None for bias in biases])
    if torch.compiler.is_compiling():
        product = _bind_texts([layout.text for layout in layouts], biased, mesh, tuple(save_gathered), reduce_dtype)
    else:
        product = bind(layouts, biased, mesh, save_gathered, reduce_dtype)
    return run(product, x, [w for w, _, _ in weights], [bias for bias in biases if bias is not None], sizes)


@shim.constant
def _bind_texts(
    texts: Sequence[str],
    biased: tuple[bool, ...],
    mesh: DeviceMesh,
    save_gathered: Collection[str],
    reduce_dtype: torch.dtype | None,
) -> BoundMatmul:
    """`bind`, which torch.compile does not look into."""
    return bind(tuple([_layout(text) for text in texts]), biased, mesh, save_gathered, reduce_dtype)
