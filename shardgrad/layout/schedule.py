"""The list of instructions that a layout becomes: what every rank does, in order, in forward and in backward.

Values are named as a reader would name them: `x`, `x_full` once gathered, `dx`, `dw`. Nothing here holds a tensor.
Cost, explanation, timeline and the comparison between ranks read this list; `printer` writes the Python that runs.

| instruction   | effect                                                                                       |
| ------------- | -------------------------------------------------------------------------------------------- |
| `Communicate` | all-gather, reduce-scatter or all-reduce along one axis, begun; awaited too if it is blocking |
| `Wait`        | await what a `Communicate` began                                                             |
| `Slice`       | keep this rank's chunk of a dim                                                              |
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
from typing import Any

from shardgrad.layout.plan import Move, Role


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. phase: what it is for, `forward`, `dX`, `dW` or `db`, with the layout's names."""

    phase: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that it reads."""
        return ()

    @property
    def writes(self) -> tuple[str, ...]:
        """The values that it makes, or replaces."""
        return ()


@dataclass(frozen=True, slots=True)
class _OneToOne(Instruction):
    out: str
    src: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.src,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True)
class Communicate(_OneToOne):
    """`tensor` is what moves, in the layout's names. Until its `Wait`, unless it is blocking, `out` is a handle."""

    tensor: str
    move: Move
    blocking: bool = False


@dataclass(frozen=True, slots=True)
class Wait(Instruction):
    started: Communicate

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.started.out,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.started.out,)


@dataclass(frozen=True, slots=True)
class Slice(_OneToOne):
    tensor: str
    move: Move


@dataclass(frozen=True, slots=True)
class Cast(_OneToOne):
    dtype: str


@dataclass(frozen=True, slots=True)
class Matmul(Instruction):
    """The local product that makes `role` (the product, or the gradient of an operand) of the layout number `index`.

    left, right: X and W for the product; dY and W for dX; dY and X for dW.
    into: the value that it adds to, in place. bias: what is added to each row of the product.
    """

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

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(value for value in (self.left, self.right, self.into, self.bias) if value is not None)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True)
class Accumulate(Instruction):
    """Add to the buffer `main` a value, or a local product as it is made (which may be of a narrower dtype)."""

    main: str
    value: str | Matmul

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.main, *((self.value,) if isinstance(self.value, str) else self.value.reads))


@dataclass(frozen=True, slots=True)
class Add(Instruction):
    out: str
    left: str
    right: str

    @property
    def reads(self) -> tuple[str, ...]:
        return self.left, self.right

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True)
class AddBias(Instruction):
    """`out` plus the bias, in place. letters: of `out`, then of the bias."""

    out: str
    bias: str
    letters: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.out, self.bias

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True)
class SumBias(_OneToOne):
    """letters: of `src`, a dY, then of the bias. index: of the layout. gathered: whether `src` was gathered for a
    product, or is dY as it is stored."""

    letters: tuple[tuple[str, ...], tuple[str, ...]]
    index: int
    gathered: bool


@dataclass(frozen=True, slots=True)
class _OfValues(Instruction):
    values: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.values


class Save(_OfValues):
    """Keep values for backward."""


class Free(_OfValues):
    """Let go of values."""


@dataclass(frozen=True, slots=True)
class Return(Instruction):
    """The results; None for one that nobody needs, or that has gone another way. single: not as a tuple."""

    results: tuple[str | None, ...]
    single: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(value for value in self.results if value is not None)


@dataclass(frozen=True, slots=True)
class Defer(Instruction):
    """`out` becomes a function that runs `body` and returns its results."""

    out: str
    body: tuple[Instruction, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(value for one in self.body for value in one.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True)
class Call(Instruction):
    """`outs` become what `function`, called `name`, returns for the values `args`."""

    outs: tuple[str, ...]
    name: str
    function: Callable[..., Any]
    args: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.args

    @property
    def writes(self) -> tuple[str, ...]:
        return self.outs


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
