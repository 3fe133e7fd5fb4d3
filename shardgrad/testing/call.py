"""Turns a function and its arguments into a message that another process can act on."""

from __future__ import annotations

import os
import pickle
import re
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from shardgrad.errors import shorten

from .messages import Call, Filter, Target


def find_target(module: types.ModuleType, qualname: str) -> Target:
    """The function called ``qualname`` of an imported module. Raises TypeError if the module has no file."""
    if not module.__file__:
        raise TypeError(f"the ranks cannot import {module.__name__}.{qualname}: its module has no file")
    parts = module.__name__.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts))]
    files = [(name, getattr(sys.modules.get(name), "__file__", None)) for name in around]
    packages = tuple((name, file) for name, file in files if file)
    return Target(module.__name__, module.__file__, qualname, packages)


def build_call(
    target: Target,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    rank_supplies: tuple[str, ...] = (),
    rewrite_asserts: bool = False,
) -> Call:
    """Pickles the arguments and notes the import path, the directory and the warning filters in force.

    Raises TypeError, naming the argument, where one cannot be pickled.
    """
    return Call(
        target=target,
        args=tuple(_pickled(str(position), value) for position, value in enumerate(args)),
        kwargs={name: _pickled(repr(name), value) for name, value in (kwargs or {}).items()},
        rank_supplies=rank_supplies,
        rewrite_asserts=rewrite_asserts,
        sys_path=tuple(sys.path),
        directory=os.getcwd(),
        filters=tuple(_filter(*entry) for entry in warnings.filters),
    )


def _pickled(name: str, value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle raises whatever the object's own hooks raise
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"argument {name} (a {kind}) cannot be sent to the ranks: {type(error).__name__}: "
            f"{shorten(str(error), 500)}\n"
            "Every rank is a process of its own, so arguments and fixtures must be picklable. "
            "Make this one in the function itself, or pass what it is made from."
        ) from None


def _filter(action: str, message: Any, category: Any, module: Any, line: int) -> Filter:
    name = (category.__module__, category.__qualname__)
    return Filter(action, _pattern(message), name, _pattern(module), line)


def _pattern(rule: re.Pattern[str] | str | None) -> str:
    """The interpreter's own filters hold plain text, to be matched whole; all others a compiled pattern."""
    if rule is None:
        return ""
    return rf"{re.escape(rule)}\Z" if isinstance(rule, str) else rule.pattern
