"""Tables and pictures of an experiment: they fit, align, have no empty column, and show what failed."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from shardgrad.cli import scale as command
from shardgrad.cli import style
from shardgrad.cli.app import app
from shardgrad.layout.units import Aligned
from shardgrad.scale import compare, idle, pictures, table
from shardgrad.scale.cell import Cell
from shardgrad.scale.config import Experiment, load
from shardgrad.scale.resolve import resolve

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "a processor", "cores": 2, "memory_bytes": 2**34, "gpus": []}


def line(seconds: float, sent: int, **more: Any) -> dict[str, Any]:
    moves = {"all-reduce over tp": sent}
    return {
        "key": "k", "status": "ok", "seconds": seconds, "quartiles": [0.93 * seconds, 1.1 * seconds],
        "communicating": 0.3 * seconds, "tokens_per_second": 1024 / seconds, "flops": 1e9, "bytes_predicted": [sent],
        "bytes_traced": [sent], "as_predicted": True, "traced_of_most": moves, "predicted_of_most": moves,
        "peak_memory": 12_600_000, "machine": MACHINE, "commit": "a", "load": [0.1, 0, 0],
        "versions": {"torch": "2"}, "measuring": {"repeats": 7}, **more,
    }  # fmt: skip


FAILED = {"key": "k", "status": "failed", "reason": "rank 1: no", "machine": MACHINE, "commit": "a"}


def rows(experiment: Experiment, failed: int | None = None) -> tuple[list[dict[str, Any]], list[table.Row]]:
    lines = [line(0.0123 * (at + 1) ** 1.3, 4_000_000 * at) for at, _ in enumerate(experiment.planned)]
    if failed is not None:
        lines[failed] = FAILED
    return lines, table.rows(experiment.planned, lines)


def printed(experiment: Experiment, width: int, failed: int | None = None) -> str:
    file = io.StringIO()
    command._print(experiment, *rows(experiment, failed), Console(file=file, width=width, highlight=False))
    return file.getvalue()


@pytest.mark.parametrize("name", ["strong", "weak", "layouts", "overlap", "training"])
def test_tables_of_what_is_shipped_fit_80_and_100_columns(name: str) -> None:
    experiment = load(ROOT / "configs" / "scaling" / f"{name}.yaml")
    for width in (80, 100):
        text = printed(experiment, width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        body = text.rpartition("─")[2].partition("median of")[0]
        for number in table.columns(rows(experiment)[1])["sent\nMB"]:  # whole, in the row
            assert re.search(rf"\s{re.escape(number)}\s", body), (number, body)
        for part in (part for planned in experiment.planned for part in planned.name.split(", ")):
            assert part in body  # names are wrapped after commas alone
    headings = printed(experiment, 100).split("─")[0]
    assert ("rows/s" in headings) == (name in ("strong", "layouts", "overlap"))
    assert ("tokens/s" in headings) == (name in ("weak", "training"))


def test_a_comparison_of_layouts_has_no_dead_columns() -> None:
    found = table.columns(rows(load(ROOT / "configs" / "scaling" / "layouts.yaml"))[1])
    assert [name.split("\n")[0] for name in found] == ["cell", "time", "quartiles", "comm.", "rows/s", "sent", "memory"]
    strong = table.columns(rows(load(ROOT / "configs" / "scaling" / "strong.yaml"))[1])
    assert {"speed-up", "effic."} <= set(strong)
    on_cuda = [line(1.0, 5, communicating=None, peak_memory=None) for _ in range(9)]
    planned = load(ROOT / "configs" / "scaling" / "layouts.yaml").planned
    assert list(table.columns(table.rows(planned, on_cuda))) == ["cell", "time\ns", "quartiles\ns", "rows/s", "sent\nB"]


def test_digits_align_and_what_failed_says_so() -> None:
    experiment = load(ROOT / "configs" / "scaling" / "strong.yaml")
    found = table.columns(rows(experiment, failed=4)[1])
    times = found["time\nms"]
    assert times[4] == "failed"
    assert {len(text.partition(".")[2]) for at, text in enumerate(times) if at != 4} == {1}
    assert {cells[4] for name, cells in found.items() if name not in ("cell", "time\nms")} == {"–"}
    assert "column_sequence, tp=2: failed: rank 1: no" in printed(experiment, 80, failed=4)
    other = line(0.1, 4_000_000, as_predicted=False, bytes_predicted=[7])
    (row,) = table.rows(experiment.planned[:1], [other])
    assert table.columns([row])["sent\nMB"] == ["4.00 !"]
    assert table.notes([row])[0] == "column, 1 rank: sent 4.00 MB, predicted 7 B (!)"


@pytest.mark.parametrize(
    ("amounts", "prefixes", "prefix", "texts"),
    [
        ([0.0123, 0.0746, 0.1544], "mµ", "m", ["12.3", "74.6", "154.4"]),
        ([1.2, 0.0005], "mµ", "m", ["1,200.000", "0.500"]),
        ([12.0, 3.456], "mµ", "", ["12.00", "3.46"]),
        ([4e-5, 9e-7], "mµ", "µ", ["40.000", "0.900"]),
        ([390_000_000, 12_600_000, 0], "kMG", "M", ["390.0", "12.6", "0"]),
        ([4, 900, 0], "kMG", "", ["4", "900", "0"]),
        ([2_000_000_000, 1], "kMG", "M", ["2,000.000", "<0.001"]),
        ([0, 0], "kMG", "", ["0", "0"]),
    ],
)
def test_one_unit_for_a_column(amounts: list[float], prefixes: str, prefix: str, texts: list[str]) -> None:
    found = Aligned.of(amounts, prefixes=prefixes)
    assert (found.prefix, [found.text(amount) for amount in amounts]) == (prefix, texts)


def test_what_does_not_fit_is_left_out_in_order() -> None:
    columns = {"cell": ["long name, tp=2", "x"], "a\nms": ["12345"], "b": ["1"], "c": ["123456"]}
    wrapped = ["long name,\ntp=2", "x"]
    # The first needs 10 after its comma was broken; then 3 + 5, 3 + 1, 3 + 6, and an edge of 2.
    assert style.fit(columns, ("c", "a"), 38) == (columns, [])
    assert style.fit(columns, ("c", "a"), 33) == ({**columns, "cell": wrapped}, [])
    less = {name: cells for name, cells in columns.items() if name != "c"}
    assert style.fit(columns, ("c", "a"), 32) == ({**less, "cell": columns["cell"]}, ["c"])
    assert style.fit(columns, ("c", "a"), 16) == ({"cell": wrapped, "b": ["1"]}, ["c", "a"])


def test_bytes_are_compared_only_where_they_differ() -> None:
    def pair(a: int, b: int) -> compare.Pair:
        return compare.Pair("column, tp=2", line(1.0, a), line(1.5, b))

    assert list(compare.columns([pair(4, 4)])) == ["cell", "A\ns", "B\ns", "B / A", ""]
    assert compare.columns([pair(4, 4), pair(0, 9)])["bytes B\nB"] == ["4", "9"]


def texts(path: Path) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_pictures_show_what_failed(tmp_path: Path) -> None:
    experiment = load(ROOT / "configs" / "scaling" / "strong.yaml")
    found = rows(experiment, failed=4)[1]
    files = pictures.draw("t", found, tmp_path, "svg")
    assert [path.name for path in files] == ["speed-up.svg", "time.svg", "bytes.svg"]
    assert "column_sequence, tp=2: failed" in texts(files[0])
    for path in files[1:]:
        assert texts(path).count("failed") == 1
        assert "column_sequence, tp=2" in texts(path)
    assert "12.3 ms, 83,252 rows/s" in texts(files[1])
    assert pictures.draw("t", table.rows(experiment.planned[:1], [FAILED]), tmp_path, "svg") == []


def test_ranks_without_a_part_are_told(tmp_path: Path) -> None:
    sizes = {"batch": 1, "sequence": 2048, "d": 256, "heads": 64}
    block = resolve(Cell(kind="block", sizes=sizes, ranks=1024))
    assert idle.notes(block) == ["960 of 1,024 ranks have no head (64/1,024)"]
    less = block.model_copy(update={"sizes": sizes | {"sequence": 1000}})
    assert idle.notes(less)[1:] == ["24 of 1,024 ranks have no position (1,000/1,024)"]
    assert idle.notes(less.model_copy(update={"sequence_parallel": False})) == idle.notes(block)
    step = resolve(Cell(kind="step", train=str(ROOT / "configs" / "quickstart.yaml"), mesh={"tp": 32}))
    assert idle.notes(step) == ["28 of 32 ranks have no head (4/32)"]
    layer = resolve(Cell(layout="column", sizes={"n": 4, "d": 3, "m": 3}, ranks=4))
    (note,) = idle.notes(layer)
    assert note == "1 of 4 ranks has no m (3/4), and nothing to compute"
    path = tmp_path / "idle.yaml"
    path.write_text("title: t\nmatrix: {layout: column, sizes: {n: 4, d: 3, m: 3}, ranks: 4}")
    done = CliRunner().invoke(app, ["scale", str(path), "--dry-run", "--rank", "9"])
    assert done.exit_code == 0, done.output
    assert f"tp=4: rank 3 of 4\n  {note}\n" in done.stdout
    planned = load(path).planned
    found = table.rows(planned, [line(1.0, 4)])
    assert f"tp=4: {note}" in table.notes(found)
    (drawn, _) = pictures.draw("t", found, tmp_path, "svg")
    assert note in texts(drawn)


def test_a_rehearsals_table_fits_and_has_no_dead_columns(tmp_path: Path) -> None:
    path = tmp_path / "dry.yaml"
    path.write_text("title: t\nmatrix: {layout: [column, row_sequence], sizes: {n: 400, d: 300, m: 300}, ranks: 4}")
    done = CliRunner().invoke(app, ["scale", str(path), "--dry-run"])
    heading = done.stdout.split("─")[0]
    assert "moments" not in heading
    assert "saved" not in heading
    for name in ("stored", "gradients", "all", "sent", "MFLOP", "kB"):
        assert name in heading
    assert max(map(len, done.stdout.splitlines())) <= 100
