"""What pages refer to exists: files, names of shardgrad and torch, other pages and their headings."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages on which every name in backticks must be one of shardgrad, or stand in the page's own code.
OF_THE_CODE = {"how-a-call-runs.md", "adding-a-collective.md", "adding-an-explanation.md"}

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def quoted(page: Path) -> list[str]:
    """What stands in backticks, without the arguments of a call."""
    return [re.sub(r"\([^()]*\)$", "", " ".join(text.split())) for text in re.findall(r"`([^`]+)`", prose(page))]


@cache
def defined() -> frozenset[str]:
    """Every module, function, class, argument and attribute of shardgrad; members as `Class.member` too."""
    found: set[str] = set()
    for path in (ROOT / "shardgrad").rglob("*.py"):
        found.add(path.stem)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found.update(_names(node))
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                members = {name for inner in ast.walk(node) for name in _names(inner)}
                found.update(f"{node.name}.{name}" for name in members)
                found.update(f"{node.name}<{base}" for base in bases)
    return frozenset(found)


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Name(ctx=ast.Store()):
            return [node.id]
        case ast.Attribute(ctx=ast.Store()):
            return [node.attr]
        case ast.arg():
            return [node.arg]
    return []


def is_member(name: str) -> bool:
    owner, _, member = name.partition(".")
    if f"{owner}.{member}" in defined():
        return True
    return any(is_member(f"{base}.{member}") for base in _bases(owner))


def _bases(owner: str) -> list[str]:
    return [entry.partition("<")[2] for entry in defined() if entry.startswith(f"{owner}<")]


def resolves(name: str) -> bool:
    """Whether a dotted name that begins with a module is there."""
    head, *rest = name.split(".")
    thing = importlib.import_module({"sg": "shardgrad", "dist": "torch.distributed"}.get(head, head))
    for at, part in enumerate(rest):
        if not hasattr(thing, part):
            try:
                thing = importlib.import_module(".".join([thing.__name__, *rest[at : at + 1]]))
            except (ImportError, AttributeError):
                return False
        else:
            thing = getattr(thing, part)
    return True


@pages
def test_files_exist(page: Path) -> None:
    paths = [text for text in quoted(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/([\w-]+\.(py|yaml|md|sh|toml))?", text)]
    own = {"shardgrad", "tests", "docs", "configs", "launch"}
    missing = [path for path in paths if path.split("/")[0] in own and not (ROOT / path).exists()]
    assert not missing


@pages
def test_names_exist(page: Path) -> None:
    names = [text for text in quoted(page) if NAME.fullmatch(text)]
    missing = [name for name in names if name.split(".")[0] in ("sg", "shardgrad", "torch") and not resolves(name)]
    members = [name for name in names if re.fullmatch(r"[A-Z]\w+\.\w+", name) and name.split(".")[0] in defined()]
    missing += [name for name in members if not is_member(name)]
    if page.name in OF_THE_CODE:
        code = set(re.findall(r"\w+", " ".join(FENCE.findall(page.read_text(encoding="utf-8")))))
        known = defined() | code | set(dir(builtins))
        missing += [name for name in names if "." not in name and name not in known]
    assert not missing


@pages
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        target, _, heading = link.partition("#")
        if re.match(r"https?:|mailto:", link):
            continue
        path = page if not target else (page.parent / target).resolve()
        if not path.exists() or (heading and heading not in headings(path)):
            broken.append(link)
    assert not broken


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_links_every_page() -> None:
    links = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(README))}
    missing = [page.name for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in links]
    assert not missing


def test_readme_begins_its_shell_with_the_main_job_and_the_tests() -> None:
    first, second, *_ = re.findall(r"^```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert first.count("\n") == second.count("\n") == 1
    assert "launch/train.py configs/quickstart.yaml" in first
    assert "pytest" in second
