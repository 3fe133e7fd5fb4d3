"""On a rank: from the name of a function to the function, in a module called as pytest calls it."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import marshal
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.machinery import SourceFileLoader
from typing import Any

from .messages import Target


def load(target: Target, rewrite_asserts: bool, directory: str) -> Callable[..., Any]:
    """Imports the module, once a process, and returns the function; a method is bound to a new instance.

    directory: which the ranks of a pool share, and nobody else.
    """
    for name, file in target.packages:
        _import(name, file, SourceFileLoader)
    loader = partial(_RewritingLoader, directory=directory) if rewrite_asserts else SourceFileLoader
    if target.module == "__main__":
        # As multiprocessing does: under another name, so that ``if __name__ == "__main__"`` does not run
        # here, but found under the name by which the caller pickled its classes.
        owner: Any = _import("__mp_main__", target.file, loader)
        sys.modules["__main__"] = owner
    else:
        owner = _import(target.module, target.file, loader)
    *outer, name = target.qualname.split(".")
    for part in outer:
        owner = getattr(owner, part)
    if isinstance(owner, type):
        owner = owner()
    function: Callable[..., Any] = getattr(owner, name)
    return function


def _import(name: str, file: str, loader_class: Callable[[str, str], SourceFileLoader]) -> types.ModuleType:
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == file:
        return known
    loader = loader_class(name, file)
    within = [os.path.dirname(file)] if os.path.basename(file) == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=within)
    if spec is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _RewritingLoader(SourceFileLoader):
    """Compiles a test module as pytest does, so that a failing ``assert`` shows its operands.

    pytest offers its rewriting publicly only as an import hook of a whole pytest session. This is the one
    place that reaches for the function behind it; should a pytest move it, asserts are plain and the locals
    must do.
    """

    def __init__(self, name: str, file: str, directory: str) -> None:
        super().__init__(name, file)
        self._directory = directory

    def get_code(self, fullname: str) -> types.CodeType:
        # The inherited method would read from, or leave rewritten code in, the ordinary __pycache__ file.
        path = self.get_filename(fullname)
        source = self.get_data(path)
        digest = hashlib.sha256(path.encode() + source).hexdigest()
        with open(os.path.join(self._directory, f"{digest}.code"), "a+b") as made:
            fcntl.flock(made, fcntl.LOCK_EX)  # ranks come at once: one compiles, which takes long, and the others wait
            made.seek(0)
            with contextlib.suppress(EOFError, ValueError, TypeError):  # of a rank that was killed as it wrote
                code: types.CodeType = marshal.loads(made.read())
                return code
            code = _compiled(path, source)
            made.truncate(0)
            made.write(marshal.dumps(code))
        return code


def _compiled(path: str, source: bytes) -> types.CodeType:
    tree = ast.parse(source, path)
    try:
        from _pytest.assertion.rewrite import rewrite_asserts
    except ImportError:
        pass
    else:
        rewrite_asserts(tree, source, path)
    return compile(tree, path, "exec", dont_inherit=True)
