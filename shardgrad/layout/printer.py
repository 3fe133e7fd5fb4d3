"""Instructions written out as Python: one line each, and the names that the lines use. No decision is made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardgrad.layout.schedule import (
    Accumulate,
    Add,
    AddBias,
    Call,
    Cast,
    Communicate,
    Defer,
    Fold,
    Free,
    Hold,
    InPieces,
    Instruction,
    Matmul,
    Return,
    Same,
    Save,
    Slice,
    SumBias,
    Wait,
)

Expression = Callable[[Matmul], str | None]


@dataclass(frozen=True, slots=True)
class Printed:
    """A function's text, and for each name in it that is neither a value nor a builtin, the instruction it stands for.

    (`linear`, `matmul` and `addmm` are torch's.)
    """

    name: str
    text: str
    globals: dict[str, Instruction]


@dataclass
class _Printer:
    """expression: torch's own way to write a local product of `{0}` and `{1}` (and a bias, `{2}`), if it has one."""

    expression: Expression
    taken: set[str]
    globals: dict[str, Instruction] = field(default_factory=dict)
    started: dict[int, str] = field(default_factory=dict)

    def name(self, wanted: str, stands_for: Instruction) -> str:
        name, at = wanted, 1
        while name in self.taken:
            name, at = f"{wanted}_{at}", at + 1
        self.taken.add(name)
        self.globals[name] = stands_for
        return name

    def lines(self, instructions: Sequence[Instruction]) -> list[str]:
        return [line for one in instructions for line in _LINES[type(one)](self, one)]

    # One method an instruction.

    def communicate(self, one: Communicate) -> list[str]:
        name = self.name(f"{one.move.kind.replace('-', '_')}_{one.tensor.lower()}_{one.move.axis}", one)
        self.started[id(one)] = name
        return [f"{one.out} = {name}({one.src})" if one.blocking else f"{one.out} = {name}.start({one.src})"]

    def wait(self, one: Wait) -> list[str]:
        out = one.started.out
        return [f"{out} = {self.started[id(one.started)]}.wait({out})"]

    def slice(self, one: Slice) -> list[str]:
        return [f"{one.out} = {self.name(f'slice_{one.tensor.lower()}_{one.move.axis}', one)}({one.src})"]

    def cast(self, one: Cast) -> list[str]:
        self.globals[one.dtype] = one
        return [f"{one.out} = {one.src}.to({one.dtype})"]

    def matmul(self, one: Matmul) -> list[str]:
        return [f"{one.out} = {self.product(one)}"]

    def product(self, one: Matmul) -> str:
        short = self.expression(one)
        if short is not None:
            return short.format(one.left, one.right, one.bias)
        also = [value for value in (one.into, one.bias) if value is not None]
        verb = "matmul_add" if one.into is not None else "matmul_bias" if one.bias is not None else "matmul"
        return f"{self.name(f'{verb}_{one.out}', one)}({', '.join((one.left, one.right, *also))})"

    def accumulate(self, one: Accumulate) -> list[str]:
        if isinstance(one.value, str):
            return [f"{one.main}.add_({one.value})"]
        made = one.value
        return [f"{self.name(f'accumulate_{made.out}', one)}({one.main}, {made.left}, {made.right})"]

    def add(self, one: Add) -> list[str]:
        return [f"{one.out} = {one.left} + {one.right}"]

    def add_bias(self, one: AddBias) -> list[str]:
        y, b = one.letters
        order = tuple(b.index(letter) for letter in y if letter in b)
        bias = one.bias if order == tuple(range(len(b))) else f"{one.bias}.permute({', '.join(map(str, order))})"
        lead = next((at for at, letter in enumerate(y) if letter in b), 0)  # broadcasting adds leading dims itself
        if any(letter not in b for letter in y[lead:]) and b:
            bias += f"[{', '.join(':' if letter in b else 'None' for letter in y[lead:])}]"
        return [f"{one.out} += {bias}"]

    def sum_bias(self, one: SumBias) -> list[str]:
        y, b = one.letters
        summed = tuple(at for at, letter in enumerate(y) if letter not in b)
        left = tuple(letter for letter in y if letter in b)
        order = tuple(left.index(letter) for letter in b)
        text = f"{one.src}.sum({summed[0] if len(summed) == 1 else summed})" if summed else f"{one.src}.clone()"
        if order != tuple(range(len(b))):
            text += f".permute({', '.join(map(str, order))}).contiguous()"
        return [f"{one.out} = {text}"]

    def same(self, one: Same) -> list[str]:
        return [f"{one.out} = {one.src}"]

    def in_pieces(self, one: InPieces) -> list[str]:
        return [f"{one.out} = {self.name(f'in_pieces_{one.out}', one)}({', '.join(one.reads)})"]

    def fold(self, one: Fold) -> list[str]:
        return [f"{one.out} = {self.name(f'fold_{one.out}', one)}({one.out})"]

    def hold(self, one: Hold) -> list[str]:
        return [f"{one.out} = {self.name(f'hold_{one.out}', one)}({one.out})"]

    def save(self, one: Save) -> list[str]:
        return [f"ctx.save_for_backward({', '.join(one.values)})", "ctx.set_materialize_grads(False)"]

    def free(self, one: Free) -> list[str]:
        return [f"del {', '.join(one.values)}"]

    def result(self, one: Return) -> list[str]:
        if one.single:
            return [f"return {one.results[0]}"]
        return [f"return {', '.join(map(str, one.results))}{',' * (len(one.results) == 1)}"]

    def defer(self, one: Defer) -> list[str]:
        return [f"def {one.out}():", *(f"    {line}" for line in self.lines(one.body))]

    def call(self, one: Call) -> list[str]:
        outs = f"{', '.join(one.outs)} = " if one.outs else ""
        return [f"{outs}{self.name(one.name, one)}({', '.join(one.args)})"]


_LINES: dict[type[Instruction], Callable[[_Printer, Any], list[str]]] = {
    Communicate: _Printer.communicate,
    Wait: _Printer.wait,
    Slice: _Printer.slice,
    Cast: _Printer.cast,
    Matmul: _Printer.matmul,
    Accumulate: _Printer.accumulate,
    Add: _Printer.add,
    AddBias: _Printer.add_bias,
    SumBias: _Printer.sum_bias,
    Same: _Printer.same,
    InPieces: _Printer.in_pieces,
    Fold: _Printer.fold,
    Hold: _Printer.hold,
    Save: _Printer.save,
    Free: _Printer.free,
    Return: _Printer.result,
    Defer: _Printer.defer,
    Call: _Printer.call,
}


def print_function(
    name: str, arguments: Sequence[str], instructions: Sequence[Instruction], expression: Expression
) -> Printed:
    """The text of a function that runs the instructions."""
    values = {value for one in instructions for value in (*one.reads, *one.writes)}
    printer = _Printer(expression, {"linear", "matmul", "addmm", "ctx", *arguments, *values})
    lines = printer.lines(instructions)
    text = f"def {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)
    return Printed(name, text, printer.globals)
