"""The experts of a mixture as transformers has them: all in two weights, each expert's hidden features sharded."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor, nn

from shardgrad.comm.adjoint import all_reduce, replicate
from shardgrad.errors import LayoutError
from shardgrad.layout.notation import Dim
from shardgrad.models.features import Features, complete, written
from shardgrad.nn.features import MergedDim, Part, StoredOutput
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel
from shardgrad.nn.replicated import for_rows

UP, DOWN = "gate_up_proj", "down_proj"


class FeatureExperts(ShardedModule):
    """Experts whose hidden features are sharded: every rank computes a part of each, for all tokens.

        gate_up_proj [e, c·f/tp, d]     down_proj [e, d, f/tp]

    How tokens go to experts, and how the products are made, is the model's own program, which is given this rank's
    parts. Tokens and their gates are entered (their gradients summed over the axis); what comes out is summed.

    Shapes: hidden [tokens, d], index and weights [tokens, k] → [tokens, d], all replicated.
    """

    def __init__(
        self, old: nn.Module, features: Mapping[str, Features], sizes: Mapping[str, int], parallel: Parallel, name: str
    ) -> None:
        super().__init__(parallel.mesh, (parallel.axis,))
        for flag, wanted in (("is_transposed", False), ("has_bias", False), ("is_concatenated", True)):
            if getattr(old, flag, wanted) is not wanted:
                raise LayoutError(f"{name} ({type(old).__name__}) has {flag}={not wanted}, which is not known here")
        up, down = features[UP], features[DOWN]
        axis = parallel.axis
        if up.kind(axis) != "column" or down.kind(axis) != "row" or len(up.parts) > 1:
            raise LayoutError(
                f"{name}: experts are stored as {UP} 'd -> c,f/{axis}' and {DOWN} 'f/{axis} -> d', not as "
                f"{up} and {down}"
            )
        for parameter, text in ((UP, up), (DOWN, down)):
            (part,) = text.parts
            weight: Tensor = getattr(old, parameter)
            experts, out, into = weight.shape
            known = {"e": experts, **complete(text.into, into, sizes, f"{name}.{parameter}")}
            known |= complete(part, out, {**sizes, **known}, f"{name}.{parameter}")
            merged = tuple(weight.shape) if len(part) + len(text.into) > 2 else None
            stored = f"W[e,{written(part)},{written(text.into)}]"
            self.declare(parameter, stored, known, parallel.device, parallel.dtype, merged)
        self.axis, self.data = axis, parallel.data
        self.entered = False
        program = copy(old)  # a shallow one, without the parameters, which are this module's
        program._parameters = {n: p for n, p in old._parameters.items() if n not in (UP, DOWN)}
        self._program = [program]  # in a list: not a module of this one

    def stored_output(self) -> StoredOutput:
        """Replicated."""
        into = self._shardings[UP].global_shape[-1]
        return StoredOutput(MergedDim((Part((Dim("d"),), (into,)),)))

    def enter(self) -> None:
        """As of `FeatureLinear`."""
        self.entered = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        program = self._program[0]
        weights: list[Tensor] = [getattr(self, UP), getattr(self, DOWN)]
        if self.data is not None:
            weights = for_rows(weights, [self._shardings[UP], self._shardings[DOWN]], (self.data.axis,))
        program.training = self.training
        for name, weight in zip((UP, DOWN), weights):
            object.__setattr__(program, name, weight)
        try:
            if not self.entered:
                hidden_states = replicate(hidden_states, self.mesh, self.axis)
                top_k_weights = replicate(top_k_weights, self.mesh, self.axis)
            y: Any = program.forward(hidden_states, top_k_index, top_k_weights)
        finally:
            for name in (UP, DOWN):
                object.__delattr__(program, name)
        return all_reduce(y, self.mesh, self.axis)

    def extra_repr(self) -> str:
        return f"{self._program[0].extra_repr()}"
