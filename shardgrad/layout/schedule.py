"""The list of instructions that a layout becomes: what every rank does, in order, in forward and in backward.

Values are named as a reader would name them: `x`, `x_full` once gathered, `dx`, `dw`. Nothing here holds a tensor.
Cost, explanation, timeline and the executor read this list; `printer` writes the Python that runs.

| instruction   | effect                                                                                       |
| ------------- | -------------------------------------------------------------------------------------------- |
| `Communicate` | all-gather, reduce-scatter or all-reduce along one axis, begun; awaited too if it is blocking |
| `Wait`        | await what a `Communicate` began                                                             |
| `Slice`       | keep this rank's chunk of a dim                                                              |
| `Same`        | another name for a value: what a gather over one rank becomes in exact mode                  |
| `InPieces`    | products, or the sum for db, done piece by piece and added in a tree (see `layout.exact`)    |
| `Fold`        | the sum, in a tree, of what lies side by side on a first dim                                 |
| `Hold`        | a gradient kept until the last micro-batch, and then the tree over all of them               |
| `Cast`        | change the dtype, around reductions in another one                                           |
| `Matmul`      | the local product, or one of its two transposes; adds to `into`, or adds a bias, if it says so |
| `Accumulate`  | a local product, or a value, added to the buffer of a parameter (`main_grad`)                |
| `Add`         | the sum of two values                                                                        |
| `AddBias`     | Y plus the bias                                                                              |
| `SumBias`     | db: dY summed over the letters that the bias lacks                                           |
| `Save`        | keep values for backward                                                                     |
| `Defer`       | instructions for later: a function that returns their results                                |
| `Free`        | let go of values                                                                             |
| `Call`        | what a pass has put in place of others, such as a product in chunks with its all-reduce      |
| `Return`      | the results                                                                                  |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from shardgrad.layout.plan import Move, Role
from shardgrad.layout.tree import Level, Summed


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. phase: what it is for, `forward`, `dX`, `dW` or `db`, with the layout's names.

    READS, WRITES: the fields that name the values it reads, and those it makes or replaces.
    """

    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ()

    phase: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that it reads."""
        return _values(self, self.READS)

    @property
    def writes(self) -> tuple[str, ...]:
        """The values that it makes, or replaces."""
        return _values(self, self.WRITES)


def _values(one: Any, fields: Sequence[str]) -> tuple[str, ...]:
    """The values that fields name: by name, by several, or by an instruction that reads or makes them."""
    found: list[str] = []
    for field in fields:
        value = getattr(one, field)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Wait):
                found.append(part.out)
            elif isinstance(part, Instruction):
                found += part.reads
            elif part is not None:
                found.append(part)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Communicate(Instruction):
    """`tensor` is what moves, in the layout's names. Until its `Wait`, unless it is blocking, `out` is a handle.

    summed: the order in which a reduction adds; None: the backend's.
    """

    READS, WRITES = ("src",), ("out",)
    out: str
    src: str
    tensor: str
    move: Move
    blocking: bool = False
    summed: Summed | None = None


@dataclass(frozen=True, slots=True)
class Wait(Instruction):
    READS, WRITES = ("started",), ("started",)
    started: Communicate


@dataclass(frozen=True, slots=True)
class Slice(Instruction):
    READS, WRITES = ("src",), ("out",)
    out: str
    src: str
    tensor: str
    move: Move


@dataclass(frozen=True, slots=True)
class Cast(Instruction):
    READS, WRITES = ("src",), ("out",)
    out: str
    src: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Matmul(Instruction):
    """The local product that makes `role` (the product, or the gradient of an operand) of the layout number `index`.

    left, right: X and W for the product; dY and W for dX; dY and X for dW.
    into: the value that it adds to, in place. bias: what is added to each row of the product.
    """

    READS, WRITES = ("left", "right", "into", "bias"), ("out",)
    out: str
    role: Role
    index: int
    left: str
    right: str
    into: str | None = None
    bias: str | None = None

    @property
    def operands(self) -> tuple[Role, Role]:
        """What left and right are; `out` stands for dY."""
        return {"out": ("lhs", "rhs"), "lhs": ("out", "rhs"), "rhs": ("out", "lhs")}[self.role]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Accumulate(Instruction):
    """Add to the buffer `main` a value, or a local product as it is made (which may be of a narrower dtype)."""

    READS = "main", "value"
    main: str
    value: str | Matmul


@dataclass(frozen=True, slots=True)
class Add(Instruction):
    READS, WRITES = ("left", "right"), ("out",)
    out: str
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class AddBias(Instruction):
    """`out` plus the bias, in place. letters: of `out`, then of the bias."""

    READS, WRITES = ("out", "bias"), ("out",)
    out: str
    bias: str
    letters: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class SumBias(Instruction):
    """letters: of `src`, a dY, then of the bias. index: of the layout. gathered: whether `src` was gathered for a
    product, or is dY as it is stored."""

    READS, WRITES = ("src",), ("out",)
    out: str
    src: str
    letters: tuple[tuple[str, ...], tuple[str, ...]]
    index: int
    gathered: bool


@dataclass(frozen=True, slots=True)
class Same(Instruction):
    READS, WRITES = ("src",), ("out",)
    out: str
    src: str


@dataclass(frozen=True, slots=True)
class Term:
    """A product, or a sum for db, and how it is cut.

    operands: their letters, the bias's last. letters: of the result.
    counts: the pieces of each letter on this rank, where there are several. summed: the letter that each level cuts.
    """

    made: Matmul | SumBias
    operands: tuple[tuple[str, ...], ...]
    letters: tuple[str, ...]
    counts: tuple[tuple[str, int], ...]
    summed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InPieces(Instruction):
    """`out` becomes the sum of the terms, each piece of it made by products of single pieces.

    levels: of the sums that are taken here, innermost first. later: of those that are taken after communication; their
    pieces lie side by side on a dim each, outermost first.
    held: nodes of the last level here, side by side on a first dim; 0: there is one, and no such dim.
    dtype: in which pieces are added; None: their own.
    """

    WRITES = ("out",)
    out: str
    terms: tuple[Term, ...]
    levels: tuple[Level, ...]
    later: tuple[Level, ...] = ()
    held: int = 0
    dtype: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that the terms read, each once."""
        return tuple(dict.fromkeys(value for term in self.terms for value in term.made.reads if value != self.out))


@dataclass(frozen=True, slots=True)
class Fold(Instruction):
    """`out` summed over the last of its leading dims. level, held: as of `InPieces`. lead: the dims before that one."""

    READS, WRITES = ("out",), ("out",)
    out: str
    level: Level
    held: int
    lead: int


@dataclass(frozen=True, slots=True)
class Hold(Instruction):
    """`out`, the result number `at`, kept; None before the last micro-batch.

    wide, dtype: in which it is summed, and then handed on; None: its own.
    """

    READS, WRITES = ("out",), ("out",)
    out: str
    at: int
    wide: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Save(Instruction):
    READS = ("values",)
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Free(Instruction):
    READS = ("values",)
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Return(Instruction):
    """The results; None for one that is not needed, or that has gone another way. single: not as a tuple."""

    READS = ("results",)
    results: tuple[str | None, ...]
    single: bool = False


@dataclass(frozen=True, slots=True)
class Defer(Instruction):
    """`out` becomes a function that runs `body` and returns its results."""

    READS, WRITES = ("body",), ("out",)
    out: str
    body: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Call(Instruction):
    """`outs` become what `function`, called `name`, returns for the values `args`."""

    READS, WRITES = ("args",), ("outs",)
    outs: tuple[str, ...]
    name: str
    function: Callable[..., Any]
    args: tuple[str, ...]


Instructions = tuple[Instruction, ...]


def communication(instructions: Sequence[Instruction]) -> Iterator[Communicate]:
    """The collectives, in order, deferred ones included."""
    for one in instructions:
        if isinstance(one, Communicate):
            yield one
        elif isinstance(one, Defer):
            yield from communication(one.body)


def phases(instructions: Sequence[Instruction]) -> dict[str, list[Instruction]]:
    """Each phase with its instructions, less those that move no data and compute nothing."""
    found: dict[str, list[Instruction]] = {}
    for one in instructions:
        if not isinstance(one, Save | Free | Return | Defer):
            found.setdefault(one.phase, []).append(one)
    return found
