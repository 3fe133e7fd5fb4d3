"""What the first rank shows: the opening tables, a line of progress, the end. The other ranks show nothing."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from shardgrad.comm.mesh import view
from shardgrad.models.linear import FeatureLinear
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.layer import Layer
from shardgrad.nn.shardings import named_shardings
from shardgrad.train.data import Text
from shardgrad.train.language_model import LanguageModel
from shardgrad.verification import report as verification

_WIDTH = 100  # of lines in a file or a pipe
_SHOWN = 5  # tensors of the comparison that are listed
Totals = Mapping[tuple[str, str], tuple[int, int]]


class Report:
    """Writes to the terminal, or as plain lines to a file or pipe.

    shown: False on all ranks but the first.
    """

    def __init__(self, shown: bool) -> None:
        width = None if sys.stdout.isatty() else _WIDTH
        self.console = Console(quiet=not shown, highlight=False, width=width)
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        """One line, with rich's markup."""
        self.console.print(text)

    def layouts(self, model: LanguageModel) -> None:
        """The mesh, how every parameter is stored, and the products' layouts."""
        mesh_view = view(model.mesh)
        axes = ", ".join(f"{name} = {axis.size}" for name, axis in mesh_view.axes.items())
        parameters = _table(f"mesh: {axes} ({mesh_view.device.type})")
        for column in ("parameter", "stored as", "global shape", "on rank 0"):
            parameters.add_column(column, no_wrap=True)
        for name, stored, *sizes in _grouped(model):
            parameters.add_row(name, escape(stored), *("×".join(map(str, some)) for some in sizes))
        self.console.print(parameters)
        products = _table("products")
        products.add_column("layer", no_wrap=True)
        products.add_column("layout, from which forward and backward collectives are derived")
        seen = set()
        for path, module in model.named_modules():
            for layout in _layouts(module):
                row = _every(path), str(layout)
                if row not in seen:
                    seen.add(row)
                    products.add_row(row[0], escape(row[1]))
        self.console.print(products)

    def corpus(self, parameters: int, trained: int, text: Text) -> None:
        """Parameters, those of them that are trained, and tokens."""
        vocabulary = "" if text.unit == "byte" else f", a vocabulary of {text.vocab:,}"
        some = "" if trained == parameters else f", of which {trained:,} are trained"
        self.say(
            f"{parameters / 1e6:.2f} million parameters{some}; {len(text.train):,} {text.unit}s to train on, "
            f"{len(text.held_out):,} held out{vocabulary}"
        )

    def going_on(
        self, start: Path | None, saved: Mapping[str, Any], mesh: Mapping[str, int], notes: list[str], exact: bool
    ) -> None:
        """From which checkpoint, and what differs from the run that saved it. exact: whether bits are as before."""
        self.say(f"going on after step {saved['step']}, from {escape(str(start))}")
        if saved["mesh"] != mesh:
            was, now = (" × ".join(f"{name} = {size}" for name, size in some.items()) for some in (saved["mesh"], mesh))
            if exact:
                self.say(f"the mesh was {was}, and is {now} now: the same bits (train.exact)")
            else:
                notes = [f"the mesh was {was}, and is {now} now: the same batches, sums in another order", *notes]
        for note in notes:
            self.say(f"[yellow]not as before:[/yellow] {escape(note)}")

    def digest(self, of: str) -> None:
        """What two runs have alike if they end with the same bits."""
        self.say(f"digest of the last checkpoint's parameters and optimizer: [bold]{of}[/bold]")

    def stopped(self, signal: str, step: int, folder: Path) -> None:
        """Ended early, by a signal."""
        self.say(
            f"stopped by {signal}; all ranks have saved step {step}. To go on: the same command with run.resume=auto "
            f"run.dir={escape(str(folder))}"
        )

    def bytes(self, predicted: Totals | None, traced: Totals, by_rank: list[tuple[int, int, bool]]) -> None:
        """Bytes that rank 0 sends in a step, as predicted from the layouts and as traced below torch.distributed.

        predicted: None for a model whose program is not ours.
        by_rank: of every rank, both sums, and whether they are alike operation by operation.
        """
        if predicted is None:
            self._traced(traced, [sent for _, sent, _ in by_rank])
            return
        table = _table("sent by rank 0 in a step")
        for column in ("operation", "axis", "count predicted", "traced", "bytes predicted", "traced"):
            table.add_column(column, justify="left" if column in ("operation", "axis") else "right", no_wrap=True)
        for key in sorted({*predicted, *traced}):
            (count, size), (seen, traced_size) = predicted.get(key, (0, 0)), traced.get(key, (0, 0))
            table.add_row(*key, str(count), str(seen), f"{size:,}", f"{traced_size:,}")
        self.console.print(table)
        wrong = [rank for rank, (_, _, equal) in enumerate(by_rank) if not equal]
        if wrong:
            for rank in wrong:
                self.say(f"[red]rank {rank}: predicted {by_rank[rank][0]:,} bytes, traced {by_rank[rank][1]:,}[/red]")
        else:
            self.say(
                f"every rank sends {_span(wanted for wanted, _, _ in by_rank)} bytes a step, predicted and traced alike"
            )

    def _traced(self, traced: Totals, by_rank: list[int]) -> None:
        table = _table("sent by rank 0 in a step")
        for column in ("operation", "axis", "count traced", "bytes traced"):
            table.add_column(column, justify="left" if column in ("operation", "axis") else "right", no_wrap=True)
        for key, (count, size) in sorted(traced.items()):
            table.add_row(*key, str(count), f"{size:,}")
        self.console.print(table)
        self.say(
            f"every rank sends {_span(by_rank)} bytes a step, traced; not predicted: the program between the layers is "
            "the model's own"
        )

    def foreign(self, dropout: Mapping[str, float], notes: Sequence[str]) -> None:
        """What is not as the folder of a model has it, and what was chosen for it."""
        if dropout:
            told = ", ".join(f"{name} = {value:g}" for name, value in dropout.items())
            self.say(f"dropout of the model's config is left out: {escape(told)}")
        for note in notes:
            self.say(escape(note))

    def comparison(self, found: verification.Report) -> None:
        """The first step against one device: what uses most of what is allowed, and the verdict."""
        self.say("first step against one device: the loss and every gradient")
        found.show(self.console, _SHOWN)

    @contextmanager
    def progress(self, steps: int, begun: int = 0, unit: str = "byte") -> Iterator[Callable[..., None]]:
        """A live line on a terminal; yields a function (step, loss, tokens_per_second, communication_share, or
        held_out) that updates it, and prints a line where there is no terminal or the loss is held out."""
        bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.console.quiet or not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task("train", total=steps, completed=begun, line="")

            def update(
                step: int,
                *,
                loss: float = 0.0,
                tokens_per_second: float = 0.0,
                communication_share: float = 0.0,
                held_out: float | None = None,
            ) -> None:
                line = (
                    f"held-out loss {held_out:.3f} nats a {unit}"
                    if held_out is not None
                    else f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {communication_share:.0%} communicating"
                )
                if held_out is None:
                    bar.update(task, completed=step, line=line)
                if held_out is not None or not self.console.is_terminal:
                    self.say(f"{self.elapsed():5.0f} s  step {step:>{len(str(steps))}}/{steps}  {line}")

            yield update

    def elapsed(self) -> float:
        """Seconds since this report was made."""
        return time.perf_counter() - self._start

    def sample(self, text: str) -> None:
        """Generated text; what a terminal would obey is not passed on."""
        self.console.rule("sample", align="left")
        self.console.print("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text), markup=False)
        self.console.rule()

    def left(self, folder: Path, names: list[str]) -> None:
        """What lies in the run folder."""
        self.say(f"left in {escape(str(folder))}: {', '.join(names)}")


def _span(sizes: Iterable[int]) -> str:
    every = sorted({*sizes})
    return f"{every[0]:,}" if len(every) == 1 else f"{every[0]:,} to {every[-1]:,}"


def _layouts(module: nn.Module) -> list[object]:
    if isinstance(module, FeatureLinear):
        return [module.features]
    if isinstance(module, Layer) and not isinstance(module, VocabParallelEmbedding):
        return [*module.layouts(3)]
    return []


def _every(path: str) -> str:
    """`blocks.3.mlp` as `blocks.*.mlp`: what all blocks have alike is printed once. Without what training and peft add
    around a model's own names."""
    for added in ("lm.", "base_model.model."):
        path = path.removeprefix(added)
    return re.sub(r"\.\d+(?=\.|$)", ".*", path).replace(".base_layer", "").replace(".default", "")


def _grouped(model: LanguageModel) -> Iterator[tuple[str, str, Sequence[int], Sequence[int]]]:
    """Name, storage, global and local shape of every parameter."""
    seen = set()
    for name, parameter, sharding in named_shardings(model):
        where = _every(name)
        if where in seen:
            continue
        seen.add(where)
        frozen = "" if parameter.requires_grad else " frozen"
        if sharding is None:
            yield where, f"replicated{frozen}", parameter.shape, parameter.shape
        else:
            yield where, f"{sharding.spec}{frozen}", sharding.global_shape, sharding.local_shape


def _table(title: str) -> Table:
    """As the tables of all commands (shardgrad.cli.style)."""
    return Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
