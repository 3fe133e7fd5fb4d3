"""What the package exports, and that torch's private names are used in the shim alone."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

import shardgrad as sg

ROOT = Path(sg.__file__).parent
SHIM = set((ROOT / "comm").glob("shim*.py"))
README = (ROOT.parent / "README.md").read_text() + "".join(p.read_text() for p in (ROOT.parent / "docs").glob("*.md"))


def test_every_export_exists_and_is_the_one_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "__init__.pyi").read_text())
    seen = {
        alias.asname: f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("shardgrad")
        for alias in node.names
    }
    assert seen == sg._HOME
    for name in sg.__all__:
        assert getattr(sg, name) is not None
        assert name in dir(sg)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = sg.nothing
    with pytest.raises(AttributeError, match="no attribute 'matmull'; the nearest are matmul"):
        _ = sg.matmull
    assert sg.__version__ == version("shardgrad")


@pytest.mark.parametrize("name", sg.__all__)
def test_every_export_is_explained_where_it_is_and_in_the_documentation(name: str) -> None:
    thing = getattr(sg, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing), f"{name} has no docstring"
    assert name in README, f"{name} is not mentioned in README or docs"


def test_private_torch_is_touched_in_the_shim_alone() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                private = name.startswith(("torch.", "dist.")) and any(part.startswith("_") for part in name.split("."))
                assert not private or path in SHIM, f"{path} uses {name}"
