"""A scaling experiment's configuration: how to run it, and the matrix that makes its cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from shardgrad import settings
from shardgrad.errors import shorten
from shardgrad.scale.cell import Cell
from shardgrad.scale.resolve import resolve
from shardgrad.settings import ConfigError, Number, Section

MOST_CELLS = 500  # which take hours
_WHOLE = ("sizes", "mesh", "grow")  # a value of these is a mapping


class Run(Section):
    dir: str | None = Field(
        default=None, min_length=1, description="folder of the results; null: runs/scaling/ and the file's name"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of parameters and inputs")
    warmup: int = Field(default=2, ge=1, description="steps of a cell before the first that is measured")
    repeats: int = Field(default=7, ge=1, description="steps of a cell that are measured")
    timeout_s: Number = Field(default=120.0, ge=0.01, le=10**6, description="seconds after which a cell is given up")
    pictures: Literal["svg", "png", "pdf"] = Field(default="svg", description="format of the pictures")


class Config(Section):
    """A whole experiment."""

    of_others: ClassVar = {"train": "a training configuration: start it by shardgrad train"}
    title: str = Field(min_length=1, description="what stands over the table and the pictures")
    run: Run = Run()
    matrix: dict[str, Any] = Field(
        default={}, description="keys of a cell; where one has a list, every combination is a cell"
    )
    cells: list[dict[str, Any]] = Field(
        default=[{}], min_length=1, description="the same once more for some cells, in place of what the matrix says"
    )


@dataclass(frozen=True)
class Planned:
    """A cell of an experiment. label: what its series is called; series: all that ranks do not change."""

    cell: Cell
    label: str
    series: str

    @property
    def name(self) -> str:
        axes = {axis: ranks for axis, ranks in self.cell.on.items() if ranks > 1}
        mesh = "·".join(f"{axis}={ranks}" for axis, ranks in axes.items()) or "1 rank"
        return f"{self.label}, {mesh}" if self.label else mesh


@dataclass(frozen=True)
class Experiment:
    config: Config
    dir: Path
    planned: tuple[Planned, ...]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment and make its cells.

    Raises:
        ConfigError: it cannot be used; lists everything that is wrong, with the nearest keys.
    """
    made: list[Planned] = []

    def check(config: Config) -> Iterator[str]:
        problems = list(_unknown(config))
        if not problems:
            count = sum(prod(map(len, _choices(config, entry).values())) for entry in config.cells)
            if count > MOST_CELLS:
                yield f"matrix and cells make {count:.3g} cells, more than {MOST_CELLS}: leave some out"
                return
            cells, problems = _cells(config)
            made.extend(_labelled(cells))
        yield from dict.fromkeys(problems)

    config = settings.load(Config, path, overrides, check, lambda _: ("matrix.train", "cells.*.train"))
    where = config.run.dir or f"runs/scaling/{Path(path).stem}"
    return Experiment(config, Path(where), tuple(made))


def _unknown(config: Config) -> Iterator[str]:
    for where, entry in (("matrix", config.matrix), *((f"cells.{at}", one) for at, one in enumerate(config.cells))):
        for key in entry:
            if key not in Cell.model_fields:
                near = get_close_matches(str(key), Cell.model_fields, n=1)
                hint = f"the nearest key is {near[0]}" if near else f"the keys are {', '.join(Cell.model_fields)}"
                yield f"{where}.{key} is no key; {hint}"


def _cells(config: Config) -> tuple[list[tuple[Cell, Cell]], list[str]]:
    """(as written, as resolved), and what is wrong."""
    cells: list[tuple[Cell, Cell]] = []
    problems: list[str] = []
    seen: set[str] = set()
    for at, entry in enumerate(config.cells):
        values = {**config.matrix, **entry}
        options = list(_choices(config, entry).values())
        for key, found in zip(values, options):
            if not found:
                problems.append(f"{_where(key, entry, at)} = [] has no value")
        for chosen in product(*options):
            try:
                written = Cell.model_validate(dict(zip(values, chosen)))
                resolved = resolve(written)
            except ValidationError as error:
                for text, detail in zip(settings.format_errors(Cell, error.errors()), error.errors()):
                    problems.append(f"{_where(str(detail['loc'][0]), entry, at).rpartition('.')[0]}.{text}")
            except ConfigError as error:
                problems.append(f"{_cell(values, chosen)}: {error}")
            else:
                if resolved.key not in seen:
                    seen.add(resolved.key)
                    cells.append((written, resolved))
    return cells, problems


def _choices(config: Config, entry: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each key, of which every combination is a cell."""
    return {key: _options(key, value) for key, value in {**config.matrix, **entry}.items()}


def _options(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if key == "set":  # one value is a list already
        return value if value and all(isinstance(one, list) for one in value) else [value]
    return value


def _where(key: str, entry: Mapping[str, Any], at: int) -> str:
    return f"cells.{at}.{key}" if key in entry else f"matrix.{key}"


def _cell(keys: Mapping[str, Any], chosen: Sequence[Any]) -> str:
    return "the cell " + ", ".join(
        f"{key}={shorten(value, 100)}" for key, value in zip(keys, chosen) if key not in _WHOLE
    )


_LABELS = ("kind", "layout", "train", "sequence_parallel", "bias", "keep", "dtype", "overlap", "backend", "device")
_ELSE = ("sizes", "set", "threads", "grow")  # named only where series would have one label without


def _labelled(cells: Sequence[tuple[Cell, Cell]]) -> Iterator[Planned]:
    """Labels of what varies between series, as short as makes them distinct."""
    every = [(written.series(), written, resolved) for written, resolved in cells]
    varied = [key for key in (*_LABELS, *_ELSE) if len({str(series[key]) for series, _, _ in every}) > 1]
    keys = [key for key in varied if key in _LABELS]
    for more in [None, *(key for key in varied if key in _ELSE)]:
        keys += [more] if more is not None else []
        labels = [
            written.label or ", ".join(filter(None, (_label(written, key) for key in keys))) for _, written, _ in every
        ]
        if len(set(labels)) == len({str(series) for series, _, _ in every}):
            break
    for label, (series, _, resolved) in zip(labels, every):
        yield Planned(resolved, label, str(series))


def _label(cell: Cell, key: str) -> str:
    """A value as a label has it; nothing where it is what one expects."""
    value = getattr(cell, key)
    if key == "kind":
        return "" if value == "layer" else str(value)
    if key == "sequence_parallel":
        return "" if cell.kind == "layer" else "sequence parallel" if value else "replicated rows"
    if key == "bias":
        return "bias" if value else ""
    if key == "train":
        return Path(value).stem if value else ""
    if value in (None, [], {}):
        return "no overlap" if key == "overlap" and cell.kind == "layer" else ""
    if isinstance(value, dict):
        return "·".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(([key] if key == "keep" else []) + value)
    return f"{key} {value}" if key in ("overlap", "threads") else str(value)
