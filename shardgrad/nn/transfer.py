"""What a layer sends besides its products, predicted: a tensor brought from one storage to another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from shardgrad.layout import cost
from shardgrad.layout.cost import Collective
from shardgrad.layout.notation import TensorSpec, parse_tensor
from shardgrad.layout.plan import route
from shardgrad.layout.sizes import Sizes


def transfer(
    phase: str,
    name: str,
    stored: TensorSpec | str,
    wanted: TensorSpec | str,
    sizes: Sizes,
    dtype: Any,
    partial: Collection[str] = (),
) -> Iterator[Collective]:
    """The collectives that bring a tensor from `stored` to `wanted`, summing over `partial` axes."""
    width = cost.itemsize(dtype)
    here, there = (parse_tensor(x) if isinstance(x, str) else x for x in (stored, wanted))
    return cost.moved(phase, name, route(here.dims, there.dims, partial), sizes, width, width)


def whole(spec: TensorSpec, letter: str) -> TensorSpec:
    """A tensor, whole along one letter."""
    return spec.with_axes({letter: ()})
