"""Pictures of layouts: what stands in them, that nothing overlaps, and that those in the documentation are current."""

from __future__ import annotations

import re
import shlex
from itertools import combinations
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardgrad import PRESETS, Layout, LayoutError
from shardgrad.cli.app import app
from shardgrad.draw.layout_picture import draw, picture
from shardgrad.draw.paper import Paper, colour
from shardgrad.layout.steps import timeline

ROOT = Path(__file__).parents[2]
SIZES = (4096, 1024, 4096, 8, 2)
OTHERS = (
    "X[b/dp,s/tp,d] W[f/tp,d]{dp} -> Y[b/dp,s,f/tp] + B[f/tp]{dp}",
    "X[n/dp,d] W[d/dp,m] -> Y[n/dp,m] + B[m/dp]",
    "X[e/ep,n/dp,d/tp] W[e/ep,d/tp,m] -> Y[e/ep,n/dp,m] + B[m]",
    "X[d/tp] W[d/tp,m] -> Y[m]",
    "X[n,d] W[c,h/tp,k,d] -> Y[n,c,h/tp,k]",
)


def made(text: str, ranks: int = 2) -> Paper:
    layout = PRESETS[text] if text in PRESETS else Layout(text)
    return picture(timeline(layout, dict(zip(layout.letters, SIZES)), dict.fromkeys(layout.axes, ranks), "bfloat16"))


@pytest.mark.parametrize(
    "text", [*OTHERS, *(pytest.param(text, marks=[pytest.mark.slow] * (at % 3 > 0)) for at, text in enumerate(PRESETS))]
)
def test_no_text_overlaps_another_or_leaves_the_picture(text: str) -> None:
    for ranks in (2, 4) if len(walk_axes(text)) < 3 else (2,):
        paper = made(text, ranks)
        for t in paper.texts:
            left, top, right, bottom = t.box
            assert min(left, top) > -0.15, t
            assert right <= paper.right + 1e-9, t
            assert bottom <= paper.bottom + 1e-9, t
        for one, other in combinations(paper.texts, 2):
            a, b = one.box, other.box
            overlap = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert min(overlap) < 0.011, (one, other)  # inches: descenders may touch


def walk_axes(text: str) -> tuple[str, ...]:
    return (PRESETS[text] if text in PRESETS else Layout(text)).axes


def test_the_column_picture_says_what_the_layout_does() -> None:
    paper = made("column", 4)
    texts = [t.text for t in paper.texts]
    for expected, count in (
        ("all-reduce dX over tp", 1),
        ("12.6 MB", 1),
        ("partial over tp", 1),
        ("ranks 0–3", 3),  # X, Xᵀ, dX
        ("m/tp", 6),
        ("4096/4", 6),
        ("backward: dX", 1),
        ("Wᵀ", 1),
        ("Xᵀ", 1),
    ):
        assert texts.count(expected) == count, expected
    assert re.sub(r"\s", "", "".join(texts)).count("0+1+2+3") == 1
    assert sum(kind == "arrow" for kind, _, _ in paper.patches) == 1
    fills = [where[4] for kind, where, _ in paper.patches if kind == "stripes"]
    everyone = tuple(colour(rank) for rank in range(4))
    assert fills.count(everyone) == 3
    # W, Y, and Wᵀ, dY twice, dW, the terms of dX, and the mesh: each has one of each colour
    assert [fills.count((one,)) for one in everyone] == [8] * 4


def test_arrows_are_what_travels() -> None:
    for name, layout in PRESETS.items():
        walked = timeline(layout, dict(zip(layout.letters, SIZES)), dict.fromkeys(layout.axes, 2))
        travels = [t for s in walked.steps for t in (*s.reads, s.made, *((s.bias,) if s.bias else ())) if t.moves]
        paper = picture(walked)
        assert sum(kind == "arrow" for kind, _, _ in paper.patches) == len(travels), name
        texts = [t.text for t in paper.texts]
        for step in walked.steps:
            for moved in step.moves:
                assert f"{moved.move.kind} {moved.tensor} over {moved.move.axis}" in texts


def test_edges_that_meet_are_of_one_length() -> None:
    """X's height is Y's, W's width is Y's, X's width is W's height: on one rank, where a tensor is one rectangle."""
    paper = picture(timeline(PRESETS["column"], {"n": 100, "d": 30, "m": 70}, {"tp": 1}))
    (wx, wy, ww, wh, _), (xx, xy, xw, xh, _), (yx, yy, yw, yh, _) = [w for k, w, _ in paper.patches if k == "stripes"][
        :3
    ]
    assert (wx, ww) == (yx, yw)
    assert (xy, xh) == (yy, yh)
    assert xw == wh
    assert wy + wh < yy
    assert xx + xw < yx


def test_uneven_ranks_are_told_apart() -> None:
    walked = timeline(PRESETS["row"], {"n": 1, "d": 4, "m": 5}, {"tp": 3})
    assert "at most 28 B" in [t.text for t in picture(walked).texts]


def test_a_rank_that_has_nothing_is_shown() -> None:
    """m = 3 on 4 ranks: the last has no part of W, Y, dY, dW and computes nothing, but holds X and a term of dX."""
    paper = picture(timeline(PRESETS["column"], {"n": 5, "d": 6, "m": 3}, {"tp": 4}))
    texts = [t.text for t in paper.texts]
    assert texts.count("nothing on rank 3") == 6  # W, Y; dY, Wᵀ; dY, dW
    assert texts.count("1 of 4 ranks has no m (3/4), and nothing to compute") == 1
    assert texts.count("crossed out: computes nothing") == 1
    number = next(t for t in reversed(paper.texts) if t.text == "3")  # in the mesh
    crossing = [where for kind, where, _ in paper.patches if kind == "line" and max(y for _, y in where) > number.y]
    assert len(crossing) == 1
    full = picture(timeline(PRESETS["column"], {"n": 5, "d": 6, "m": 4}, {"tp": 4}))
    assert not [t for t in full.texts if "nothing" in t.text or "of 4 ranks" in t.text]


@pytest.mark.slow
def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    walked = timeline(PRESETS["row"], {"n": 4, "d": 8, "m": 4}, {"tp": 2})
    for ending in ("svg", "png"):
        one, other = tmp_path / f"one.{ending}", tmp_path / f"other.{ending}"
        draw(walked, one)
        draw(walked, other)
        assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    walked = timeline(PRESETS["row"], {"n": 4, "d": 8, "m": 4}, {"tp": 65})
    with pytest.raises(LayoutError, match=r"room for 64 ranks, not 65: draw the layout on a smaller mesh, as tp=2"):
        draw(walked, tmp_path / "a.svg")
    with pytest.raises(LayoutError, match=r"a picture ends in .svg, .png, .pdf, not 'a.gif'"):
        draw(walked, tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


COMMANDS = sorted(
    {
        command
        for page in (ROOT / "README.md", ROOT / "docs" / "pictures.md")
        for command in re.findall(r"shardgrad (explain [^`\n]*--draw docs/pictures/\w+\.svg)", page.read_text())
    }
)


def structure(svg: str) -> list[str]:
    """Texts (which matplotlib notes beside their outlines) and fills, in the order in which they are drawn."""
    return re.findall(r"<!-- .*? -->|fill: #[0-9a-f]{6}", svg)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documentations_pictures_are_what_their_commands_draw(command: str, tmp_path: Path) -> None:
    *arguments, target = shlex.split(command)
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "drawn.svg")])
    assert done.exit_code == 0, done.output
    kept, now = ((path).read_text() for path in (ROOT / target, tmp_path / "drawn.svg"))
    assert structure(now) == structure(kept)
    assert len(structure(now)) > 100


def test_every_picture_of_the_documentation_has_its_command() -> None:
    drawn = {Path(shlex.split(command)[-1]).name for command in COMMANDS}
    measured = {"step.svg", "bytes.svg"}  # by other commands, named where they are shown
    there = {path.name for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert drawn == {name for name in there - measured if not name.startswith("scaling-")}
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "pictures.md").read_text()
    for name in {*drawn, "step.svg"}:
        assert re.search(rf"!\[[^\]]+\]\((docs/)?pictures/{name}\)", pages), f"{name} is not shown"
