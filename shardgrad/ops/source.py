"""A program written out as straight-line Python: for its layout and shapes, what one would have written by hand.

What a call has to decide is decided while writing, so that running costs no more than the operations themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from shardgrad.ops.bilinear import Map
from shardgrad.ops.chunks import ChunkedMatmulReduce
from shardgrad.ops.route import RouteRunner
from shardgrad.ops.stages import Forward, Piecewise, Route, Stage, Start


class _Writer:
    """Lines of a function, the constants that they name, and which variable holds the tensor of each slot."""

    def __init__(self, names: Sequence[str]) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"RouteRunner": RouteRunner, "linear": F.linear, "matmul": torch.matmul}
        self._names = names
        self._coming: dict[int, str] = {}
        self._indent = ""
        self.here: dict[int, str] = {}

    def say(self, line: str) -> None:
        self.lines.append(self._indent + line)

    def open(self, line: str) -> None:
        """Begin an inner function."""
        self.say(line)
        self._indent = "    "

    def close(self) -> None:
        self._indent = ""

    def constant(self, stem: str, value: object) -> str:
        name = f"{stem}{sum(known.startswith(stem) for known in self.constants)}"
        self.constants[name] = value
        return name

    def start(self, start: Start) -> None:
        """Send a slot's tensor on its way."""
        self._coming[start.target] = self._send(self._names[start.target], self.here[start.source], start.route)

    def _arrive(self, name: str, sent: str, result: str) -> None:
        """Wait for what was sent, and let go of it: of what went, and of what came and was put into another form."""
        self.say(f"{name} = {result}" if self._indent else f"{name}, {sent} = {result}, None")

    def _send(self, name: str, tensor: str, route: Route) -> str:
        """Send a tensor on its way; the expression that waits for it."""
        stem = {"all-gather": "gather", "reduce-scatter": "scatter"}.get(route[0].kind)
        if len(route) == 1 and stem is not None:
            ready = self.constant(stem, route[0].ready)
            self.say(f"{name}_sent = {ready}.start({tensor})")
            return f"{ready}.finish({name}_sent)"
        self.say(f"{name}_sent = RouteRunner({tensor}, {self.constant('route', route)})")
        return f"{name}_sent.result()"

    def read(self, slot: int) -> str:
        """The variable with a slot's tensor, waited for if it is on its way."""
        if slot in self._coming:
            self.here[slot] = f"{self._names[slot]}_here"
            self._arrive(self.here[slot], f"{self._names[slot]}_sent", self._coming.pop(slot))
        return self.here[slot]

    def drop(self, slots: Collection[int]) -> None:
        """Let go of tensors that no later line reads (an inner function lets go of all when it is let go of)."""
        if self._indent:
            return
        gone = sorted({self.here.pop(slot) for slot in slots if slot in self.here} - set(self.here.values()))
        if gone:
            self.say(f"{' = '.join(gone)} = None")

    def beside(self, gather: Piecewise, outs: Sequence[str], others: Sequence[str]) -> None:
        """Gather a slot's tensor side by side with the products that read it and one of the others each."""
        start = gather.start
        whole = f"{self._names[start.target]}_here"
        call = f"{self.constant('pieces', gather.chunks)}({self.here[start.source]}, ({', '.join(others)},))"
        self.say(f"({', '.join(outs)},), {whole} = {call}")
        self.here[start.target] = whole

    def multiply(self, made: Map, left: str, right: str, into: str | None = None) -> str:
        """The expression of a local product."""
        short = made.source(left, right) if into is None else None
        return short or f"{self.constant('contract', made)}({left}, {right}, {into})"

    def leave(self, name: str, route: Route) -> Callable[[], None]:
        """Send what was made to where it is stored; the returned call writes the line that waits for it."""
        if not route:
            return lambda: None
        if len(route) == 1 and route[0].kind == "all-reduce":
            reduce = self.constant("reduce", route[0].ready)
            started = f"{name}_work = {reduce}.start({name})"
            self.say(started)

            def arrive() -> None:
                if self.lines[-1] == self._indent + started:  # nothing runs beside it
                    self.lines.pop()
                    self.say(f"{reduce}.sum({name})")
                else:
                    self.say(f"{reduce}.wait({name}_work)")

            return arrive
        result = self._send(name, name, route)
        return lambda: self._arrive(name, f"{name}_sent", result)

    def in_pieces(self, name: str, pieces: ChunkedMatmulReduce, left: str, right: str) -> Callable[[], None]:
        """Compute a product and start to sum it, side by side; the returned call writes the line that waits for it."""
        self.say(f"{name}_sent = {self.constant('pieces', pieces)}.start({left}, {right})")
        return lambda: self._arrive(name, f"{name}_sent", f"{name}_sent()")

    def function(self, signature: str) -> Callable[..., Any]:
        text = f"def {signature}:\n" + "".join(f"    {line}\n" for line in self.lines)
        space = dict(self.constants)
        exec(compile(text, f"<shardgrad {signature}>", "exec"), space)
        made: Callable[..., Any] = space[signature.partition("(")[0]]
        made.__doc__ = text
        return made


def forward(
    starts: Sequence[Start],
    products: Sequence[Forward],
    piecewise: Sequence[Piecewise],
    names: Sequence[str],
    inputs: int,
    given: int,
    saved: Sequence[int],
    keep: Collection[int],
    *,
    in_autograd: bool,
    with_kept: bool = False,
) -> Callable[..., Any]:
    """Y of every product (a tensor if there is one), of X, the weights and the biases that are there.

    names: of the slots, of which the first `inputs` are all X, and the first `given` are there before the call.
    saved: the slots that are saved for backward, as they came or, for those in `keep`, as they were gathered.
    in_autograd: whether to write `Function.forward`, which is also given a context.
    with_kept: whether to return the saved slots in `keep` after the Ys, always in a tuple.
    """
    writer = _Writer(names)
    came = {slot: "x" if slot < inputs else names[slot] for slot in range(given)}
    writer.here.update(came)
    beside = {gather.start.target: gather for gather in piecewise}
    for start in starts:
        if start.target not in beside:
            writer.start(start)
    outs = [f"y{at}" if len(products) > 1 else "y" for at in range(len(products))]
    arrivals = []
    added = [False] * len(products)
    made_at_once: set[int] = set()
    for at, (out, one) in enumerate(zip(outs, products)):
        if one.lhs in beside:
            gather = beside.pop(one.lhs)
            readers = [at for at, other in enumerate(products) if other.lhs == one.lhs]
            rights = [writer.read(products[reader].rhs) for reader in readers]
            made_at_once.update(readers)
            writer.beside(gather, [outs[reader] for reader in readers], rights)
        if at in made_at_once:
            arrivals.append(writer.leave(out, one.route))
            continue
        if one.rhs in beside:
            writer.beside(beside.pop(one.rhs), [out], [writer.read(one.lhs)])
            arrivals.append(writer.leave(out, one.route))
            continue
        left, right = writer.read(one.lhs), writer.read(one.rhs)
        if one.chunks is not None:
            arrivals.append(writer.in_pieces(out, one.chunks, left, right))
            continue
        if one.bias is not None and not one.route and one.bias not in {start.target for start in starts}:
            fused = one.terms.out_and_bias_source(left, right, came[one.bias])
            if fused:
                writer.say(f"{out} = {fused}")
                arrivals.append(writer.leave(out, ()))
                added[at] = True
                continue
        writer.say(f"{out} = {writer.multiply(one.terms.out, left, right)}")
        arrivals.append(writer.leave(out, one.route))
    for out, one, arrive, done in zip(outs, products, arrivals, added):
        arrive()
        if one.bias is not None and not done:
            writer.say(f"{out} = {writer.constant('add_bias', one.terms.add_bias)}({out}, {writer.read(one.bias)})")
    for slot in keep:
        writer.read(slot)
    if in_autograd:
        kept = [writer.here[slot] if slot in keep else came[slot] for slot in saved]
        writer.say(f"ctx.save_for_backward({', '.join(kept)})")
        writer.say("ctx.set_materialize_grads(False)")
    if with_kept:
        outs = [*outs, *(writer.here[slot] for slot in saved if slot in keep)]
    writer.say(f"return {', '.join(outs)}{',' * with_kept}")
    arguments = ["x", *names[inputs:given]]
    return writer.function(f"forward({', '.join(['ctx', *arguments] if in_autograd else arguments)})")


def backward(
    stages: Sequence[Stage],
    deferred: Sequence[Stage],
    names: Sequence[str],
    saved: Sequence[int],
    given: int,
    results: int,
    there: Sequence[bool],
    into: Collection[int],
) -> Callable[..., Any]:
    """The gradients of X, each weight and each bias, of the saved tensors and of the dYs that are there.

    into: the results that are added to a tensor that the caller passes (None is returned in their place).
    If there are `deferred` stages, the last result is a function that returns their gradients, in the same places.
    """
    writer = _Writer(names)
    count = len(there)
    if saved:
        writer.say(f"{', '.join(names[slot] for slot in saved)}, = saved")
    writer.here.update({slot: names[slot] for slot in saved})
    writer.here.update({given + at: names[given + at] for at in range(count) if there[at]})
    grads = _gradients(writer, stages, results, into, "grad")
    if deferred:
        writer.open("def later():")
        writer.say(f"return {', '.join(_gradients(writer, deferred, results, into, 'late'))},")
        writer.close()
        grads.append("later")
    writer.say(f"return {', '.join(grads)},")
    arguments = ["saved", *names[given : given + count], *(f"main{output}" for output in sorted(into))]
    return writer.function(f"backward({', '.join(arguments)})")


def _gradients(writer: _Writer, stages: Sequence[Stage], results: int, into: Collection[int], stem: str) -> list[str]:
    """Write the stages; return the variable of each result, or None."""
    grads = ["None"] * results
    leaving = []
    for at, stage in enumerate(stages):
        for start in stage.starts:
            if stage.gather is None or start != stage.gather.start:
                writer.start(start)
        name = f"{stem}{at}"
        so_far: str | None = None
        arrive: Callable[[], None] | None = None
        straight = stage.output in into and not stage.route and len(stage.terms) == 1
        for made, dy, other in stage.terms:
            if stage.gather is not None:
                writer.beside(stage.gather, [name], [writer.read(other if stage.gather.start.target == dy else dy)])
                continue
            left, right = writer.read(dy), writer.read(other)
            if stage.chunks is not None:
                arrive = writer.in_pieces(name, stage.chunks, left, right)
            elif straight:
                writer.say(f"{writer.constant('add', made.add_to)}(main{stage.output}, {left}, {right})")
            else:
                writer.say(f"{name} = {writer.multiply(made, left, right, so_far)}")
            so_far = name
        if stage.bias is not None:
            writer.say(f"{name} = {writer.constant('db', stage.bias[0].grad_bias)}({writer.read(stage.bias[1])})")
        if not straight:
            leaving.append((stage.output, name, arrive or writer.leave(name, stage.route)))
        writer.drop(stage.done)
    for output, name, arrive in leaving:
        arrive()
        if output in into:
            writer.say(f"main{output}.add_({name})")
            continue
        if grads[output] != "None":
            writer.say(f"{name} = {grads[output]} + {name}")
        grads[output] = name
    return grads
