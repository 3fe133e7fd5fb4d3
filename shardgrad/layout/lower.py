"""From plans to instructions: the mathematics of forward and backward in the order in which one would explain it.

Every wait stands behind what it waits for; `passes` moves it. Products that share their first operand are lowered
together: its gather is done once, and its gradient summed over them before it is reduced.
"""

from __future__ import annotations

import keyword
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardgrad.layout.contraction import arrange
from shardgrad.layout.plan import Move, Plan, Role
from shardgrad.layout.schedule import (
    Accumulate,
    Add,
    AddBias,
    Cast,
    Communicate,
    Defer,
    Instruction,
    Instructions,
    Matmul,
    Return,
    Save,
    Slice,
    SumBias,
    Wait,
)
from shardgrad.layout.sizes import Sizes

Key = tuple[Role, int]

# What a printed program uses besides its values.
_RESERVED = ("ctx", "linear", "matmul", "addmm", "later", "float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Products:
    """One or more products of one input, on one rank: all that decides which instructions they become.

    plans: of each product's layout. biased: whether a bias is added to each.
    sizes: at least the shape of the mesh and this rank's place on it.
    save_gathered: operands, as role and product, that backward finds as gathered in forward.
    dtype, reduce_dtype: of the operands, and of the reductions of partial sums, by name; None if it is the same.
    contraction: whether the local product is one of matrices, which may add a bias as it is made.
    pieces: in exact mode, into how many pieces each axis cuts what it splits (see `exact`).
    """

    plans: tuple[Plan, ...]
    biased: tuple[bool, ...]
    sizes: Sizes
    save_gathered: frozenset[Key] = frozenset()
    dtype: str = "float32"
    reduce_dtype: str | None = None
    contraction: bool = True
    pieces: Mapping[str, int] | None = None

    @property
    def count(self) -> int:
        return len(self.plans)

    @cached_property
    def biases(self) -> tuple[int, ...]:
        """The products that have a bias."""
        return tuple(at for at, biased in enumerate(self.biased) if biased)

    @cached_property
    def share(self) -> tuple[int, ...]:
        """For each product, the first one that gathers the input, and reduces its gradient, in the same way."""
        keys = [(plan.gather["lhs"], plan.reduce["lhs"]) for plan in self.plans]
        return tuple(keys.index(key) for key in keys)

    def moves(self, moves: Sequence[Move]) -> tuple[Move, ...]:
        """Those of a route that this mesh has: along an axis of one rank nothing moves.

        In exact mode one rank may hold several pieces: then those of as many ranks as there are pieces.
        """
        counts = self.sizes.shape if self.pieces is None else self.pieces
        return tuple(move for move in moves if counts[move.axis] > 1)

    @cached_property
    def names(self) -> Names:
        return Names(self.plans, self.biased, self.share)

    def arguments(self) -> tuple[str, ...]:
        """Those of forward: the input, the weights, the biases that there are."""
        names = self.names
        return (names.x, *names.w, *(names.b[at] for at in self.biases))

    def saved(self, needs: Sequence[bool]) -> tuple[Key, ...]:
        """What forward saves for backward: W for dX, X for dW. needs: of X, each weight and each bias."""
        wanted: list[Key] = [("lhs", self.share[at]) for at in range(self.count) if needs[1 + at]]
        wanted += [("rhs", at) for at in range(self.count) if needs[0]]
        by_value = {self._saved_value(key): key for key in reversed(wanted)}  # each once
        return tuple(reversed(by_value.values()))

    def _saved_value(self, key: Key) -> str:
        return self.value(key, gathered=key in self.saved_gathered)

    def saved_values(self, needs: Sequence[bool]) -> tuple[str, ...]:
        """Their values, as forward holds them and backward takes them."""
        return tuple(self._saved_value(key) for key in self.saved(needs))

    @cached_property
    def saved_gathered(self) -> frozenset[Key]:
        """The operands that backward finds as gathered, where that is another tensor than the one that came."""
        keys = {(role, self.share[at] if role == "lhs" else at) for role, at in self.save_gathered}
        return frozenset(key for key in keys if self.moves(self.plans[key[1]].gather[key[0]]))

    def value(self, key: Key, *, gathered: bool) -> str:
        """The value that holds an operand."""
        role, at = key
        if role == "lhs":
            return self.names.x_full[at] if gathered else self.names.x
        return self.names.w_full[at] if gathered else self.names.w[at]

    def communicates_backward(self, at: int) -> bool:
        """Whether the backward of one product communicates, besides the reduction of dX that products share."""
        plan = self.plans[at]
        routes = [*plan.gather.values(), plan.reduce["rhs"]]
        routes += [plan.bias_grad, plan.bias_grad_gathered] if self.biased[at] else []
        return any(self.moves(route) for route in routes)

    def taking_part(self, has_grad: Sequence[bool]) -> tuple[bool, ...]:
        """Which products have a backward, given the dYs that there are: theirs, and those where all ranks must take
        part, for another rank's loss may have used what this rank's did not."""
        used = {self.share[at] for at in range(self.count) if has_grad[at]}
        if self.count == 1 or not used:
            return tuple(has_grad)
        return tuple(
            has_grad[at] or self.communicates_backward(at) or self.share[at] not in used for at in range(self.count)
        )

    def roles_needed(self, needs: Sequence[bool], has_grad: Sequence[bool]) -> list[set[Role]]:
        """The gradients that the backward of each product makes. needs: of X, each weight and each bias."""
        found: list[set[Role]] = [set() for _ in self.plans]
        for at, roles in enumerate(found):
            if has_grad[at]:
                wanted: dict[Role, bool] = {"lhs": needs[0], "rhs": needs[1 + at]}
                if self.biased[at]:
                    wanted["bias"] = needs[1 + self.count + self.biases.index(at)]
                roles.update(role for role, need in wanted.items() if need)
        return found


class Names:
    """What each value is called: the layout's names in small letters, numbered where that is ambiguous."""

    def __init__(self, plans: Sequence[Plan], biased: Sequence[bool], share: Sequence[int]) -> None:
        taken = set(_RESERVED)

        def new(wanted: str) -> str:
            name = f"{wanted}_" if keyword.iskeyword(wanted) else wanted
            at = 1
            while name in taken:
                name, at = f"{wanted}{at}", at + 1
            taken.add(name)
            return name

        count = range(len(plans))
        called = [{role: name.lower() for role, name in plan.names.items()} for plan in plans]
        self.x = new(called[0]["lhs"])
        self.w = [new(called[at]["rhs"]) for at in count]
        self.b = {at: new(called[at]["bias"]) for at in count if biased[at]}
        self.y = [new(called[at]["out"]) for at in count]
        self.dy = [new(f"d{y}") for y in self.y]
        self.dx = {at: new(f"d{self.x}") for at in dict.fromkeys(share)}
        self.dw = [new(f"d{w}") for w in self.w]
        self.db = {at: new(f"d{b}") for at, b in self.b.items()}
        self.x_full = {at: new(f"{self.x}_full") for at in dict.fromkeys(share)}
        self.w_full = [new(f"{w}_full") for w in self.w]
        self.b_full = {at: new(f"{b}_here") for at, b in self.b.items()}
        self.dy_full = [new(f"{dy}_full") for dy in self.dy]
        self.main = {
            output: new(f"main_{name}")
            for output, name in enumerate((self.x, *self.w, *(self.b[at] for at in sorted(self.b))))
        }


class _Writer:
    """Instructions so far, and the value that holds each tensor that has been read."""

    def __init__(self, products: Products) -> None:
        self.products, self.names = products, products.names
        self.instructions: list[Instruction] = []
        self.here: dict[Key, str] = {}

    def emit(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)

    def route(
        self, phase: str, tensor: str, src: str, out: str, moves: Sequence[Move], *, stays_wide: bool = False
    ) -> str:
        """Bring a value along a route; return the value that holds it at the end.

        stays_wide: whether it keeps the dtype in which it was reduced.
        """
        p = self.products
        moves = p.moves(moves)
        reducing = [at for at, move in enumerate(moves) if move.kind in ("reduce-scatter", "all-reduce")]
        for at, move in enumerate(moves):
            if p.reduce_dtype and at == min(reducing, default=-1):
                self.emit(Cast(phase, out, src, p.reduce_dtype))
                src = out
            if move.kind == "slice":
                self.emit(Slice(phase, out, src, tensor, move))
            else:
                started = Communicate(phase, out, src, tensor, move)
                self.emit(started)
                self.emit(Wait(phase, started))
            src = out
            if p.reduce_dtype and at == max(reducing, default=-1) and not stays_wide:
                self.emit(Cast(phase, out, out, p.dtype))
        return src

    def read(self, phase: str, role: Role, at: int) -> str:
        """The value with an operand (or a bias) as a product uses it, gathered if it has not been."""
        key = role, at
        if key not in self.here:
            names, plan = self.names, self.products.plans[at]
            if role == "bias":
                src, out, moves = names.b[at], names.b_full[at], plan.bias
            elif role == "lhs":
                src, out, moves = names.x, names.x_full[at], plan.gather["lhs"]
            else:
                src, out, moves = names.w[at], names.w_full[at], plan.gather["rhs"]
            self.here[key] = self.route(phase, plan.names[role], src, out, moves)
        return self.here[key]

    def read_dy(self, phase: str, at: int) -> str:
        """The value with dY as a product uses it."""
        key: Key = "out", at
        if key not in self.here:
            names, plan = self.names, self.products.plans[at]
            route = plan.gather["out"]
            self.here[key] = self.route(phase, f"d{plan.names['out']}", names.dy[at], names.dy_full[at], route)
        return self.here[key]


def forward(products: Products, needs: Sequence[bool] | None = None) -> Instructions:
    """Y of every product.

    needs: of X, each weight and each bias, whether backward will make its gradient; None if nothing is to be saved.
    """
    writer, names, phase = _Writer(products), products.names, "forward"
    results = []
    for at, plan in enumerate(products.plans):
        x, w = writer.read(phase, "lhs", products.share[at]), writer.read(phase, "rhs", at)
        y, letters = names.y[at], (plan.letters["out"], plan.letters["bias"])
        adds = products.biased[at] and all(products.sizes.coordinate[axis] == 0 for axis in plan.partial)
        fused = adds and _fuses_bias(products, at)
        writer.emit(Matmul(phase, y, "out", at, x, w, bias=names.b[at] if fused else None))
        y = writer.route(phase, plan.names["out"], y, y, plan.reduce["out"])
        if products.biased[at] and not fused:
            bias = writer.read(phase, "bias", at)
            if adds:  # of a sum that is left to the caller, one rank alone holds the bias
                writer.emit(AddBias(phase, y, bias, letters))
        results.append(y)
    if needs is not None:
        writer.emit(Save(phase, products.saved_values(needs)))
    writer.emit(Return(phase, tuple(results), single=len(results) == 1))
    return tuple(writer.instructions)


def _fuses_bias(products: Products, at: int) -> bool:
    """Whether the bias is added as the product is made: nothing is reduced, and it lies along the product's columns."""
    plan = products.plans[at]
    x, w, y, b = (plan.letters[role] for role in ("lhs", "rhs", "out", "bias"))
    if not products.contraction or products.moves(plan.reduce["out"]) or products.moves(plan.bias):
        return False
    found = arrange(x, w, y)
    return found.adds_bias and b == y[found.rows :]


def backward(
    products: Products,
    needs: Sequence[Collection[Role]],
    *,
    main: Collection[int] = (),
    defer: bool = False,
) -> Instructions:
    """The gradients of X, each weight and each bias.

    needs: the gradients that each product makes (`lhs`, `rhs`, `bias`).
    main: the results that are added to a buffer of the caller's; None is returned in their place.
    defer: whether the gradients of weights and biases are left to a function, returned as a last result.
    """
    return _Backward(products, needs, main).write(defer)


class _Backward(_Writer):
    def __init__(self, products: Products, needs: Sequence[Collection[Role]], main: Collection[int]) -> None:
        super().__init__(products)
        self.needs, self.main = needs, main
        for key in products.saved_gathered:
            self.here[key] = products.value(key, gathered=True)
        self.results: list[str | None] = [None] * (1 + products.count + len(products.biases))

    def write(self, defer: bool) -> Instructions:
        p = self.products
        inputs = [at for at in dict.fromkeys(p.share) if self._summed(at)]
        weights = [at for at in range(p.count) if "rhs" in self.needs[at]]
        biases = [at for at in range(p.count) if "bias" in self.needs[at]]
        for share in inputs:
            self._grad_input(share)
        if defer and (weights or biases):
            self._defer(weights, biases)
        else:
            self._grad_weights(weights, biases)
        self.emit(Return("backward", tuple(self.results)))
        return tuple(self.instructions)

    def _summed(self, share: int) -> list[int]:
        """The products whose dX is summed before it is reduced."""
        p = self.products
        return [at for at in range(p.count) if p.share[at] == share and "lhs" in self.needs[at]]

    def _grad_input(self, share: int) -> None:
        plan, dx, so_far = self.products.plans[share], self.names.dx[share], None
        phase, moves = f"d{plan.names['lhs']}", plan.reduce["lhs"]
        terms = self._summed(share)
        for at in terms:
            dy = self.read_dy(phase, at)
            self._product(Matmul(phase, dx, "lhs", at, dy, self.read(phase, "rhs", at), so_far), 0, moves, len(terms))
            so_far = dx
        self._deliver(phase, phase, dx, moves, 0, len(terms))

    def _grad_weights(self, weights: list[int], biases: list[int]) -> None:
        p, names = self.products, self.names
        for at in weights:
            plan, dw = p.plans[at], names.dw[at]
            phase, moves = f"d{plan.names['rhs']}", plan.reduce["rhs"]
            dy = self.read_dy(phase, at)
            self._product(
                Matmul(phase, dw, "rhs", at, dy, self.read(phase, "lhs", p.share[at])), 1 + at, moves, terms=1
            )
            self._deliver(phase, phase, dw, moves, 1 + at, terms=1)
        for at in biases:
            plan, db, phase = p.plans[at], names.db[at], "db"
            gathered = plan.bias_reads_gathered(self.needs[at])
            dy = self.read_dy(phase, at) if gathered else names.dy[at]
            self.emit(SumBias(phase, db, dy, (plan.letters["out"], plan.letters["bias"]), at, gathered))
            self._deliver(phase, "db", db, self._bias_route(at), 1 + p.count + p.biases.index(at), terms=0)

    def _bias_route(self, at: int) -> tuple[Move, ...]:
        plan = self.products.plans[at]
        return plan.bias_grad_gathered if plan.bias_reads_gathered(self.needs[at]) else plan.bias_grad

    def _accumulates(self, output: int, moves: Sequence[Move], terms: int) -> bool:
        """Whether a product is added to the caller's buffer as it is made: nothing is left to be done with it."""
        whole = self.products.pieces is None
        return output in self.main and terms == 1 and whole and not self.products.moves(moves)

    def _product(self, made: Matmul, output: int, moves: Sequence[Move], terms: int) -> None:
        if self._accumulates(output, moves, terms):
            self.emit(Accumulate(made.phase, self.names.main[output], made))
        else:
            self.emit(made)

    def _deliver(self, phase: str, tensor: str, value: str, moves: Sequence[Move], output: int, terms: int) -> None:
        """Reduce a gradient to where it is stored, and put it among the results."""
        if self._accumulates(output, moves, terms):
            return
        value = self.route(phase, tensor, value, value, moves, stays_wide=output in self.main)
        if output in self.main:
            self.emit(Accumulate(phase, self.names.main[output], value))
            return
        before = self.results[output]
        if before is not None:
            self.emit(Add(phase, before, before, value))
        else:
            self.results[output] = value

    def _defer(self, weights: list[int], biases: list[int]) -> None:
        now, results = self.instructions, self.results
        self.instructions, self.results = [], [None] * len(results)
        self._grad_weights(weights, biases)
        self.emit(Return("later", tuple(self.results)))
        body = tuple(self.instructions)
        self.instructions, self.results = now, [*results, "later"]
        self.emit(Defer("later", "later", body))
