"""What the pictures of measurements say: one style, units as people write them, the same figures the same file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import drawn
import pytest
from typer.testing import CliRunner

from shardgrad import charts
from shardgrad.bench import bytes as sent
from shardgrad.bench import collectives, exact, model, overlap, step
from shardgrad.cli.app import app

ROOT = Path(__file__).parents[2]
NOTE = "a machine of 2 cores"
Draw = Callable[[Path], None]
PICTURES: dict[str, tuple[Draw, list[str]]] = {
    "bytes": (
        lambda path: sent.draw(drawn.bytes_rows(), path),
        ["1×", "10×", "4", "64", "n = 65,536, d = 1,024, m = 4,096", "column (replicates)", "fully_sharded"],
    ),
    "collectives": (
        lambda path: collectives.draw(drawn.collectives_rows(), path, NOTE),
        ["10 µs", "1 ms", "2 KiB", "64 KiB", "8 MiB", "all-reduce", "gloo", "shm", "Collectives of 2 ranks, float32"],
    ),
    "step": (
        lambda path: step.draw(drawn.step_found(), path, NOTE),
        ["1×", "2×", "shardgrad", "DTensor", "gloo", "shm", "64 × 256 × 1024", "256 × 512 × 2048"],
    ),
    "model": (
        lambda path: model.draw(drawn.model_rows(), path, NOTE),
        ["1 rank", "2 ranks", "20,000", *(f"{part}, tokens/s" for part in model.PARTS)],
    ),
    "overlap": (
        lambda path: overlap.draw(drawn.overlap_rows(), path, NOTE),
        ["0%", "60%", "float32, 512 × 1024 × 4096", "shardgrad, sg.set_overlap", "fully sharded,"],
    ),
    "exact": (
        lambda path: exact.draw(drawn.exact_rows(), path, NOTE),
        ["1×", "2×", "V = 8", "p = 2", "row, float32, 64 × 256 × 1024", "products", "training step"],
    ),
}


def texts(path: Path) -> list[str]:
    """matplotlib notes every line of text beside its outlines."""
    return [
        line.strip() for text in re.findall(r"<!-- (.*?) -->", path.read_text(), re.DOTALL) for line in text.split("\n")
    ]


@pytest.mark.parametrize("name", PICTURES)
def test_units_names_and_style(name: str, tmp_path: Path) -> None:
    draw, expected = PICTURES[name]
    draw(tmp_path / "a.svg")
    said = texts(tmp_path / "a.svg")
    assert [one for one in expected if one not in said] == []
    assert not [one for one in said if "10^" in one or "mathdefault" in one or "words" in one]
    assert (NOTE in said) == (name != "bytes")
    svg = (tmp_path / "a.svg").read_text().lower()
    assert charts.SERIES[0].lower() in svg
    assert "#1f77b4" not in svg  # matplotlib's own first colour
    if name == "model":
        draw(tmp_path / "b.svg")
        assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()


def test_the_documentations_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    arguments = re.findall(r"made by `shardgrad (bench bytes[^`]* --draw )", (ROOT / "docs" / "bytes.md").read_text())[
        0
    ]
    done = CliRunner().invoke(app, [*arguments.split(), str(tmp_path / "now.svg")])
    assert done.exit_code == 0, done.output
    assert texts(tmp_path / "now.svg") == texts(ROOT / "docs" / "pictures" / "bytes.svg")


def test_every_point_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self))
    for draw, _ in PICTURES.values():
        draw(tmp_path / "none.svg")
    by_bytes, by_size, by_step, by_rate, by_share, by_piece = figures
    for panel in by_bytes.axes:  # eight layouts on three numbers of ranks, and the line of the bound
        assert [len(line.get_xdata()) for line in panel.lines] == [2] + [3] * 8
    for panel in by_size.axes:
        assert [list(line.get_xdata()) for line in panel.lines] == [[2048, 65536, 2**23]] * 2
        assert panel.lines[0].get_ydata()[0] == pytest.approx(1e-6 * (90 + 2048 / 800))
    assert [[len(some.lines[0].get_xdata()) for some in panel.containers] for panel in by_step.axes] == [[2, 2]] * 2
    assert [[len(some.patches) for some in panel.containers if hasattr(some, "patches")] for panel in by_rate.axes] == [
        *([2] for _ in model.PARTS)
    ]
    assert [[len(some.lines[0].get_xdata()) for some in panel.containers] for panel in by_share.axes] == [[7] * 3] * 2
    assert [[len(some.lines[0].get_xdata()) for some in panel.containers] for panel in by_piece.axes] == [[6] * 3, [6]]
    low, middle, high = (
        drawn.exact_rows()[0].time.low,
        drawn.exact_rows()[0].time.median,
        drawn.exact_rows()[0].time.high,
    )
    bar = by_piece.axes[0].containers[0]
    assert bar.lines[0].get_ydata()[0] == middle
    assert list(bar.lines[2][0].get_segments()[0][:, 1]) == pytest.approx([low, high])
