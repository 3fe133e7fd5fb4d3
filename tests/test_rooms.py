"""The rooms of the package are what CONTRIBUTING.md says: imports point one way, without circles, in short files that
their rooms list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 450
Imports = Mapping[str, Mapping[str, bool]]
"""Of each module the modules that it imports, and whether at run time, not for type checkers alone."""


def sources(root: Path) -> dict[str, Path]:
    """The modules of the package and the programs in `launch`, by their dotted names."""
    found = {}
    for top in ("shardgrad", "launch"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(modules: Mapping[str, Path]) -> Imports:
    """What each module imports of the others, wherever in the file it does."""
    found: dict[str, dict[str, bool]] = {}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        mine = found[name] = {}
        for node, runs in statements(ast.parse(path.read_text()), True):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                inner = [f"{base}.{alias.name}" for alias in node.names]
                targets = [one if one in modules else base for one in inner]
            for target in targets:
                if target.split(".")[0] == "shardgrad" and target != name:
                    mine[target] = mine.get(target, False) or runs
    return found


def statements(node: ast.AST, runs: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements below a node, and whether they are ever run."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, runs
    checking = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from statements(child, runs and not (checking and field == "body"))


def room(module: str) -> str:
    """`layout` of `shardgrad.layout.rule`; `shardgrad` of the package itself."""
    top, *below = module.split(".")
    return top if top == "launch" or not below else below[0]


def contributing() -> tuple[dict[str, int], dict[str, str], list[str]]:
    """The place of each room in the chain, the rooms beside it with the last that they import, the table's rooms."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    chain = next(part for part in text.split("\n\n") if "←" in part)
    places = {name: at for at, link in enumerate(chain.split("←")) for name in re.findall(r"`(\w+)`", link)}
    beside = dict(re.findall(r"`(\w+)`\s+imports\s+`(\w+)`\s+at\s+most", text))
    return places, beside, re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def wrong_ways(found: Imports) -> list[str]:
    """The imports between rooms that point the wrong way, and the rooms that CONTRIBUTING.md does not know."""
    places, beside, _ = contributing()
    wrong = []
    for module, targets in found.items():
        for target in targets:
            own, other = room(module), room(target)
            if own == other:
                continue
            if other == "shardgrad":
                fine = places.get(own, -1) >= places["train"]
            elif other in beside:
                fine = own == "cli"
            elif own in beside:
                fine = places.get(other, 99) <= places[beside[own]]
            elif own == "shardgrad":
                fine = places.get(other, 99) < places["train"]
            else:
                fine = places.get(other, 99) < places.get(own, -1)
            if not fine:
                wrong.append(f"{module} imports {target}")
    return wrong


def circles(found: Imports) -> list[str]:
    """Modules that import each other in a circle, if only for type checkers: what is left when modules that import
    nothing of what is left, and those that nothing of it imports, are taken away."""
    left = {module: {t for t in targets if t in found} for module, targets in found.items()}
    before = -1
    while before != len(left):
        before = len(left)
        imported = {target for targets in left.values() for target in targets}
        left = {m: targets & set(left) for m, targets in left.items() if targets & set(left) and m in imported}
    return sorted(left)


def too_long(modules: Mapping[str, Path], root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in modules.values() if len(p.read_text().splitlines()) > MOST_LINES}


def unlisted(package: Path) -> set[str]:
    """The files that a room's docstring does not list, and those it lists that are not there."""
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    listed = re.findall(r"^\| `(\w+)` +\| \S", doc, re.MULTILINE)
    held = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    return set(listed) ^ (held - {"__init__"})


MODULES = sources(ROOT)
IMPORTS = imports(MODULES)
PACKAGES = [path.parent for name, path in MODULES.items() if path.name == "__init__.py" and name != "shardgrad"]


def test_contributing_tells_of_every_room_once() -> None:
    places, beside, table = contributing()
    rooms = {room(module) for module in MODULES} - {"shardgrad"}
    assert set(places) | set(beside) == rooms
    assert not set(places) & set(beside)
    assert sorted(table) == sorted(rooms)


def test_imports_point_one_way() -> None:
    assert wrong_ways(IMPORTS) == []


def test_no_circle_between_files() -> None:
    assert circles(IMPORTS) == []


def test_files_can_be_read_in_one_sitting() -> None:
    assert not too_long(MODULES, ROOT)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_says_what_it_is_for_and_lists_its_files(package: Path) -> None:
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    assert len(doc.partition("\n")[0]) > 40
    assert unlisted(package) == set()


@pytest.mark.parametrize(
    ("path", "text", "told"),
    [
        ("layout/rule.py", "from shardgrad.nn import linear", ["shardgrad.layout.rule imports shardgrad.nn.linear"]),
        ("layout/rule.py", "from ..nn.linear import x", ["shardgrad.layout.rule imports shardgrad.nn.linear"]),
        ("layout/rule.py", "from .. import nn", ["shardgrad.layout.rule imports shardgrad.nn"]),
        ("layout/rule.py", "def f():\n    import shardgrad.nn", ["shardgrad.layout.rule imports shardgrad.nn"]),
        ("layout/rule.py", "import shardgrad as sg", ["shardgrad.layout.rule imports shardgrad"]),
        ("layout/rule.py", "from shardgrad.draw import paper", ["shardgrad.layout.rule imports shardgrad.draw.paper"]),
        ("testing/run.py", "from ..ops import matmul", ["shardgrad.testing.run imports shardgrad.ops.matmul"]),
        ("attic/old.py", "from shardgrad.layout import rule", ["shardgrad.attic.old imports shardgrad.layout.rule"]),
        ("nn/linear.py", "from ..layout import rule", []),
        ("testing/run.py", "from .pool import x", []),
        ("cli/app.py", "from shardgrad.draw import paper", []),
    ],
)  # fmt: skip
def test_wrong_imports_are_seen(tmp_path: Path, path: str, text: str, told: list[str]) -> None:
    for name in ("nn/__init__", "nn/linear", "layout/rule", "draw/paper", "ops/matmul", "testing/pool"):
        where = tmp_path / "shardgrad" / f"{name}.py"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text("")
    (tmp_path / "shardgrad" / "__init__.py").write_text("")
    (tmp_path / "shardgrad" / path).parent.mkdir(exist_ok=True)
    (tmp_path / "shardgrad" / path).write_text(text)
    assert wrong_ways(imports(sources(tmp_path))) == told


def test_circles_and_long_files_are_seen(tmp_path: Path) -> None:
    room = tmp_path / "shardgrad" / "layout"
    room.mkdir(parents=True)
    files = {
        "a": "from .b import x",
        "b": "def f():\n    from . import c",
        "c": "import shardgrad.layout.a",
        "above": "from . import a",
        "below": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a",
        "long": "\n" * (MOST_LINES + 1),
        "__init__": '"""A room.\n\n| file | concept |\n| --- | --- |\n| `a` | first |\n| `gone` | no more |\n"""',
    }
    for name, text in files.items():
        (room / f"{name}.py").write_text(text)
    modules = sources(tmp_path)
    assert circles(imports(modules)) == [f"shardgrad.layout.{name}" for name in "abc"]
    assert too_long(modules, tmp_path) == {"shardgrad/layout/long.py"}
    assert unlisted(room) == {"above", "b", "below", "c", "gone", "long"}
