"""What the documentation shows is run: every fenced code block of README.md and docs/.

==============================  ==========================================================================
```python                       in this process, a page's blocks one after another in one namespace
```python ranks=2               a program of its own, on that many ranks, which see what torchrun would
                                tell them
```text output                  the lines that the program with ranks before it prints, in any order
```python layout="…" tp=2       equal to the program that the layout becomes on a mesh of that shape
```sh                           under bash -euo pipefail from the repository's root; of README's first
                                two, which are the main job and the test command, only the syntax is
                                checked
```yaml, ```json                parsed
```text                         nothing: a drawing
==============================  ==========================================================================

Anything else fails, indented and HTML blocks too, so that no code stands in a page unrun. Python is compiled
with the page's file name and line numbers; it runs in a temporary directory.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import pytest
import torch.distributed as dist
import yaml
from markdown_it import MarkdownIt

import shardgrad as sg

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
README_COMMANDS = 2
TIMEOUT = 120.0
LAYOUT = re.compile(r'layout="(?P<layout>[^"]+)"(?P<axes>( \w+=\d+)+)')
STILL_THERE = "(a child is still there, and holds its output open)"


@dataclass(frozen=True)
class Block:
    """A code block: its info string, its text, and the line of the page on which that text starts."""

    info: str
    text: str
    line: int
    fault: str = ""


def read_blocks(text: str) -> list[Block]:
    """The code blocks of a Markdown page, in its order."""
    lines = text.split("\n")
    blocks = []
    for token in MarkdownIt("commonmark").parse(text):
        if token.map is None:
            continue
        first, end = token.map
        if token.type == "code_block":
            blocks.append(Block("", token.content, first + 1, "is indented: fence it and say what it is"))
        elif token.type == "html_block" and ("<pre" in token.content or "```" in token.content):
            blocks.append(Block("", token.content, first + 1, "is HTML: fence it, with an empty line before it"))
        elif token.type == "fence":
            # Markdown closes a forgotten fence at the end of the page, and takes the prose as code.
            last = lines[end - 1].strip().lstrip("> ")
            closed = end - first > 1 and last.startswith(token.markup) and not last.strip(token.markup[0])
            blocks.append(Block(token.info, token.content, first + 2, "" if closed else "has no closing fence"))
    return blocks


@dataclass
class Page:
    """A page, and what its Python blocks have defined so far."""

    path: Path
    directory: Path
    timeout: float = TIMEOUT
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    done: set[int] = field(default_factory=set)
    outputs: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = read_blocks(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def run(self, index: int) -> None:
        """Run a block, after those it may build on; raises, or fails the test, if the block is wrong."""
        block = self.blocks[index]
        kind, _, options = block.info.strip().partition(" ")
        if block.fault:
            pytest.fail(f"{self._place(block)}: this block {block.fault}")
        match kind, options.strip().partition("="):
            case "python", ("", "", ""):
                self._run_python(index)
            case "python", ("ranks", "=", ranks) if ranks.isdecimal() and int(ranks) > 0:
                self._run_ranks(index, int(ranks))
            case "python", ("layout", "=", _) if match := LAYOUT.fullmatch(options.strip()):
                axes = (axis.split("=") for axis in match["axes"].split())
                self._compare_program(block, match["layout"], {name: int(size) for name, size in axes})
            case "text", ("output", "", ""):
                self._compare_output(index)
            case "sh", ("", "", ""):
                self._run_shell(index)
            case "yaml", ("", "", ""):
                yaml.safe_load(block.text)
            case "json", ("", "", ""):
                json.loads(block.text)
            case "text", ("", "", ""):
                pass
            case _:
                pytest.fail(f"{self._place(block)}: unknown block kind {block.info!r}")

    def _run_python(self, index: int) -> None:
        for i, block in enumerate(self.blocks[: index + 1]):
            if block.info.strip() != "python" or i in self.done:
                continue
            self.done.add(i)
            padding = "\n" * (block.line - 1)
            with contextlib.chdir(self.directory):
                exec(compile(padding + block.text, str(self.path), "exec"), self.namespace)

    def _run_ranks(self, index: int, ranks: int) -> None:
        block = self.blocks[index]
        program = self.directory / f"{self.path.stem}_line_{block.line}.py"
        program.write_text("\n" * (block.line - 1) + block.text, encoding="utf-8")
        status, output = forked.run(program, ranks, self.timeout, directory=self.directory)
        if status is None:
            pytest.fail(f"{self._place(block)}: still running after {self.timeout} s\n{output}")
        if status:
            pytest.fail(f"{self._place(block)}: exit status {status}\n{output}")
        self.outputs[index] = output

    def _compare_output(self, index: int) -> None:
        block = self.blocks[index]
        programs = [i for i, other in enumerate(self.blocks[:index]) if other.info.startswith("python ranks=")]
        if not programs:
            pytest.fail(f"{self._place(block)}: no program with ranks stands before this output")
        if programs[-1] not in self.outputs:
            self.run(programs[-1])
        printed = self.outputs[programs[-1]].splitlines()
        if missing := [line for line in block.text.splitlines() if line not in printed]:
            pytest.fail(f"{self._place(block)}: {missing} is not among what is printed: {printed}")

    def _compare_program(self, block: Block, layout: str, mesh_shape: dict[str, int]) -> None:
        program = sg.Layout(layout).program(mesh_shape)
        if _lines(block.text) != _lines(program):
            pytest.fail(f"{self._place(block)}: the program of {layout} on {mesh_shape} is\n{program}")

    def _run_shell(self, index: int) -> None:
        block = self.blocks[index]
        commands = [i for i, other in enumerate(self.blocks) if other.info.strip() == "sh"]
        parse_only = ["-n"] if self.path == README and index in commands[:README_COMMANDS] else []
        self._run_command(block, ["bash", *parse_only, "-euo", "pipefail", "-c", block.text], ROOT)

    def _run_command(self, block: Block, command: list[str], directory: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            output = _stop(process)
            pytest.fail(f"{self._place(block)}: still running after {self.timeout} s\n{output}")
        if process.returncode:
            pytest.fail(f"{self._place(block)}: exit status {process.returncode}\n{output}")

    def _place(self, block: Block) -> str:
        return f"{self.path.name}:{block.line}"


def _lines(text: str) -> list[str]:
    """The lines that are not empty: of empty ones, formatters have their own opinion."""
    return [line for line in text.splitlines() if line.strip()]


def _stop(process: "subprocess.Popen[str]") -> str:
    """End a command and its children; torchrun is asked first, as its ranks are in sessions of their own."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=40)[0]
    return STILL_THERE


COLD = re.compile(r"shardgrad (verify|mutants|scale|chaos|bench (overhead|memory))\b|launch/train\.py")
"""Commands that start ranks of their own, each of which imports torch, or that measure for long: slow. Other tests run
the same commands."""


RARE = re.compile(r"shardgrad (verify \S+quickstart|mutants)")
"""Commands whose cases `tests/train/test_verify_run.py` and `tests/mutants` run as well."""

FIRST_READ = (README, ROOT / "docs" / "tutorial.md", ROOT / "docs" / "layouts.md")
"""Pages whose programs with ranks are run each time; those of the others are slow."""


def marks(path: Path, blocks: list[Block], index: int) -> tuple[pytest.MarkDecorator, ...]:
    """Slow is a block that is run, not parsed alone, and of such a command; and a program on ranks of most pages, with
    what it prints."""
    info = blocks[index].info.strip()
    if path not in FIRST_READ and (info.startswith("python ranks=") or info == "text output"):
        return (pytest.mark.slow,)
    shell = [i for i, block in enumerate(blocks) if block.info.strip() == "sh"]
    if index not in shell or (path == README and index in shell[:README_COMMANDS]):
        return ()
    if RARE.search(blocks[index].text):
        return pytest.mark.slow, pytest.mark.rare
    return (pytest.mark.slow,) if COLD.search(blocks[index].text) else ()


PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(path, index, id=f"{path.relative_to(ROOT)}:{block.line}", marks=marks(path, page.blocks, index))
    for path in PAGES
    for page in [Page(path, ROOT)]
    for index, block in enumerate(page.blocks)
]


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    yield Page(request.param, tmp_path_factory.mktemp(request.param.stem))
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("page", "index"), BLOCKS, indirect=["page"])
def test_block(page: Page, index: int) -> None:
    page.run(index)


# The runner itself: what is wrong in a page must fail.


def made_up(directory: Path, *lines: str, timeout: float = TIMEOUT) -> Page:
    path = directory / "page.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Page(path, directory, timeout)


def test_blocks_share_a_namespace_and_run_in_order(tmp_path: Path) -> None:
    page = made_up(
        tmp_path,
        "```python",
        "x = [1]",
        "```",
        "Then:",
        "```python",
        "x.append(2)",
        "```",
        "```python",
        "y = x",
        "```",
    )
    for index in (2, 0, 1):
        page.run(index)
    assert page.namespace["y"] == [1, 2]


def test_failing_block_fails_with_the_line_of_the_page(tmp_path: Path) -> None:
    page = made_up(tmp_path, "# Title", "", "```python", "x = 1", "assert x == 2", "```")
    with pytest.raises(AssertionError) as failed:
        page.run(0)
    where = failed.traceback[-1]
    assert (Path(where.path), where.lineno + 1) == (page.path, 5)


def test_syntax_error_has_the_line_of_the_page(tmp_path: Path) -> None:
    page = made_up(tmp_path, "Prose.", "```python", "x = 1", "x = = 2", "```")
    with pytest.raises(SyntaxError) as failed:
        page.run(0)
    assert (failed.value.filename, failed.value.lineno) == (str(page.path), 4)


def test_block_cannot_litter(tmp_path: Path) -> None:
    page = made_up(tmp_path, "```python", "open('made', 'w').close()", "```")
    page.run(0)
    assert (tmp_path / "made").exists()
    assert Path.cwd() != tmp_path


@pytest.mark.parametrize("info", ["", "bash", "py", "Python", "python ranks", "python ranks=0", "python x=2", "sh x"])
def test_unknown_kind_fails(tmp_path: Path, info: str) -> None:
    page = made_up(tmp_path, f"```{info}", "true", "```")
    with pytest.raises(pytest.fail.Exception, match=f"page.md:2: unknown block kind '{info}'"):
        page.run(0)


@pytest.mark.parametrize("fence", ["```", "~~~~", "> ```", "- ```"])
def test_every_way_to_write_a_block_is_seen(tmp_path: Path, fence: str) -> None:
    inside = {">": "> ", "-": "  "}.get(fence[0], "")
    bare = fence.lstrip("->").strip()
    page = made_up(tmp_path, f"{fence}python", f"{inside}assert False", f"{inside}{bare}")
    assert len(page.blocks) == 1
    with pytest.raises(AssertionError):
        page.run(0)


def test_indented_block_fails(tmp_path: Path) -> None:
    page = made_up(tmp_path, "Prose:", "", "    x = 1", "", "More.")
    with pytest.raises(pytest.fail.Exception, match=r"page.md:3: this block is indented"):
        page.run(0)


@pytest.mark.parametrize("lines", [("<pre>", "x = 1", "</pre>"), ("<details>", "```python", "```", "</details>")])
def test_html_block_fails(tmp_path: Path, lines: tuple[str, ...]) -> None:
    page = made_up(tmp_path, *lines)
    with pytest.raises(pytest.fail.Exception, match=r"page.md:1: this block is HTML"):
        page.run(0)


@pytest.mark.parametrize("tail", [[], ["More prose."], ["``"], ["```python", "y = 2"]])
def test_unclosed_fence_fails(tmp_path: Path, tail: list[str]) -> None:
    page = made_up(tmp_path, "```python", "x = 1", *tail)
    assert len(page.blocks) == 1
    with pytest.raises(pytest.fail.Exception, match=r"page.md:2: this block has no closing fence"):
        page.run(0)


def test_page_without_blocks_or_not_there_has_none(tmp_path: Path) -> None:
    assert made_up(tmp_path, "Only `prose`.").blocks == []
    assert Page(tmp_path / "absent.md", tmp_path).blocks == []


def test_shell_runs_from_the_root_and_fails_with_its_output(tmp_path: Path) -> None:
    page = made_up(
        tmp_path,
        *("```sh", "test -f pyproject.toml", f'test "$(command -v python)" -ef {sys.executable}', "```"),
        *("```sh", "echo before", "false | true", "echo after", "```"),
    )
    page.run(0)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)page.md:6: exit status 1.before\n$"):
        page.run(1)


def test_only_the_first_commands_of_the_readme_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = made_up(tmp_path, *("```sh", "false", "```") * 3, *("```sh", "if", "```"))
    with pytest.raises(pytest.fail.Exception):
        page.run(0)
    monkeypatch.setattr(sys.modules[__name__], "README", page.path)
    page.run(0)
    page.run(1)
    with pytest.raises(pytest.fail.Exception):
        page.run(2)
    page.blocks.insert(0, page.blocks[-1])
    with pytest.raises(pytest.fail.Exception, match="syntax error"):
        page.run(0)


def test_data_blocks_are_parsed(tmp_path: Path) -> None:
    page = made_up(
        tmp_path,
        *("```yaml", "a: [1, 2]", "```", "```yaml", "a: [1, 2", "```"),
        *("```json", '{"a": 1}', "```", "```json", "{'a': 1}", "```"),
        *("```text", "{[", "```"),
    )
    page.run(0)
    with pytest.raises(yaml.YAMLError):
        page.run(1)
    page.run(2)
    with pytest.raises(json.JSONDecodeError):
        page.run(3)
    page.run(4)


def test_a_program_that_is_not_the_layouts_fails(tmp_path: Path) -> None:
    program = sg.PRESETS["row"].program({"tp": 2}).rstrip().split("\n")
    info = f'```python layout="{sg.PRESETS["row"]}" tp=2'
    page = made_up(tmp_path, info, *program, "```", info, *program[:-1], "    return dx", "```")
    page.run(0)
    with pytest.raises(pytest.fail.Exception, match=r"page.md:\d+: the program of X"):
        page.run(1)


def test_output_is_compared_with_what_the_program_before_it_prints(tmp_path: Path) -> None:
    program = "```python ranks=2", "import os", "print('rank', os.environ['RANK'])", "```"
    page = made_up(
        tmp_path, *program, *("```text output", "rank 1", "rank 0", "```"), "```text output", "rank 2", "```"
    )
    page.run(1)
    with pytest.raises(pytest.fail.Exception, match=r"page.md:10: \['rank 2'\] is not among what is printed"):
        page.run(2)


RANKS = """\
```python ranks=2
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
dist.destroy_process_group()
assert total == {total}
```"""


def test_ranks_talk_to_each_other(tmp_path: Path) -> None:
    page = made_up(tmp_path, RANKS.format(total=3), RANKS.format(total=4))
    page.run(0)
    with pytest.raises(pytest.fail.Exception) as failed:
        page.run(1)
    assert "page.md:10: exit status 1" in str(failed.value)
    assert 'page_line_10.py", line 15' in str(failed.value)


@pytest.mark.parametrize(
    ("info", "code", "timeout"),
    [("sh", "sleep 600 & wait", 1), ("python ranks=2", "import time; time.sleep(600)", 1)],
)
def test_block_that_hangs_is_ended_with_its_children(tmp_path: Path, info: str, code: str, timeout: float) -> None:
    page = made_up(tmp_path, f"```{info}", code, "```", timeout=timeout)
    with pytest.raises(pytest.fail.Exception, match=r"page.md:2: still running after") as failed:
        page.run(0)
    assert STILL_THERE not in str(failed.value)
