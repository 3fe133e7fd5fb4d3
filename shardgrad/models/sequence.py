"""Sequence parallelism between the layers: a stream of activations that is sharded along the sequence.

    model.layers.0             s -> s/tp                  from here on each rank has a part of the sequence
    model.layers.*.self_attn   s/tp -> s{tp}              its input is gathered; inside, features are sharded
    model.layers.*.mlp         s/tp -> s{tp} -> s/tp      and what comes out, alike on all ranks, returns to the stream
    model.norm                 s/tp -> s                  whole again, and alike on every rank
    encoder                    s -> s/tp -> s             the stream is all that is inside

What row parallel layers make goes back into the stream: a reduce-scatter instead of an all-reduce.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_gather, gather_replicated, slice_replicated
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.models.flow import current
from shardgrad.nn.parallel import Parallel

DIM = 1  # [b, s, d]


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to the sequence at a module: to its input (`slice`, `enter`, `gather`), and to what comes out."""

    input: str
    output: str = ""

    @classmethod
    def of(cls, text: str, axis: str, where: str) -> Action:
        """Read a text of a sequence plan.

        Raises:
            LayoutError: it is none of those that are known.
        """
        known = {
            f"s->s/{axis}": cls("slice"),
            f"s/{axis}->s{{{axis}}}": cls("enter"),
            f"s/{axis}->s": cls("gather"),
            f"s/{axis}->s{{{axis}}}->s/{axis}": cls("enter", "slice"),
            f"s->s/{axis}->s": cls("slice", "gather"),
        }
        found = known.get("".join(str(text).replace("→", "->").split()))
        if found is None:
            raise LayoutError(f"sequence: {where}: {text!r} is none of {', '.join(map(repr, known))}")
        return found

    @property
    def starts(self) -> bool:
        return self.input == "slice"

    @property
    def wraps(self) -> bool:
        return self.starts and self.output == "gather"


@dataclass
class Stream:
    """One stream: how long its whole sequence is. (An encoder and a decoder have one each.)

    prefix: of the names of its modules.
    """

    prefix: str
    size: int | None = None

    def known(self) -> int | None:
        """None while backward recomputes a call, perhaps not the last one: ranks then exchange the size."""
        return None if shim.in_backward() else self.size


class Hook:
    """What a sequence plan says of a module, done to its first argument or hidden_states, and to what it gives back."""

    def __init__(self, name: str, action: Action, stream: Stream, parallel: Parallel) -> None:
        self.name, self.action, self.stream, self.parallel = name, action, stream, parallel

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.action.output:
            module.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (self._change(args[0], self.action.input), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return args, {**kwargs, "hidden_states": self._change(kwargs["hidden_states"], self.action.input)}
        raise LayoutError(
            f"sequence: {self.name} gets no tensor first, nor hidden_states: name the module inside that does"
        )

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._change(output, self.action.output)
        if isinstance(output, tuple):
            return self._change(output[0], self.action.output), *output[1:]
        output.last_hidden_state = self._change(output.last_hidden_state, self.action.output)
        return output

    def _change(self, x: Tensor, how: str) -> Tensor:
        if x.dim() != 3:
            raise ShapeError(f"sequence: {self.name} has {tuple(x.shape)}, not [b, s, d]: its rows are no sequence")
        flow, mesh, axis = current(), self.parallel.mesh, self.parallel.axis
        with nullcontext() if flow is None else flow.not_watching():
            if how == "slice":
                self.stream.size = x.shape[DIM]
                made = slice_replicated(x, mesh, axis, DIM)
            elif how == "gather":
                made = gather_replicated(x, mesh, axis, DIM, size=self.stream.known())
            else:
                made = all_gather(x, mesh, axis, DIM, size=self.stream.known())
        if flow is not None:
            (flow.is_replicated if how == "gather" else flow.is_sharded)(made)
        return made
