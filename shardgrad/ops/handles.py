"""Names by which compiled graphs, which hold no objects, refer to bound products."""

from __future__ import annotations

import weakref
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardgrad.ops.bound import BoundMatmul

_products: weakref.WeakValueDictionary[str, BoundMatmul] = weakref.WeakValueDictionary()
_numbers = count()


def name(product: BoundMatmul, text: str) -> str:
    """A handle for a product. `text` tells what it is and where, so that no cached graph of another rank is taken."""
    handle = f"{text} #{next(_numbers)}"
    _products[handle] = product
    return handle


def named(handle: str) -> BoundMatmul | None:
    """The product, if it still exists."""
    return _products.get(handle)
