"""What a run measures, written down: one JSON object a line, and a picture of the losses."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Metrics:
    """A JSONL file; each line has a `kind`, and has left this process when `write` returns.

    path: None writes nothing (every rank but the first).

    Raises:
        OSError: the file cannot be written; names it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = path.open("wb", buffering=0) if path is not None else None

    def write(self, kind: str, **values: Any) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            except OSError as error:
                raise OSError(f"cannot write {self._path}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def draw(path: Path, train: list[tuple[int, float]], held_out: list[tuple[int, float]]) -> None:
    """A picture (PNG) of training and held-out loss by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train), linewidth=1, color="#7a9cc6", label="training")
    axes.plot(*zip(*held_out), linewidth=2, marker="o", markersize=4, color="#b5432a", label="held-out")
    axes.set(xlabel="step", ylabel="loss, nats a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
