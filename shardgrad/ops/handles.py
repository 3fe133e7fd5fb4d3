"""Names by which compiled graphs, which hold no objects, refer to bound products."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

_bound: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = count()


def name(bound: Any, text: str) -> str:
    """A handle for a bound product. `text` says what and where it is, so no cached graph of another rank is taken."""
    handle = f"{text} #{next(_numbers)}"
    _bound[handle] = bound
    return handle


def named(handle: str) -> Any:
    """The bound product, if it still exists."""
    return _bound.get(handle)
