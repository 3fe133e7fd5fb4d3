"""Deferred weight gradients: backward hands on dX at once, and dW and db are computed by a later call.

A pipeline's schedule wants this: the stage before waits for dX alone, and dW fills what would be idle (zero bubble: Qi
et al. 2023, arXiv 2401.10241).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from shardgrad.ops.modes import deferrals
from shardgrad.ops.streams import Inputs


class WeightGrads:
    """The gradients that were deferred, in the order in which backward would have computed them."""

    def __init__(self) -> None:
        self._later: list[tuple[Sequence[Any], Callable[[], Sequence[Tensor | None]], Inputs]] = []

    def __len__(self) -> int:
        """How many products wait for their weights' gradients."""
        return len(self._later)

    def run(self) -> None:
        """Compute them, and add them to `.grad` as backward would have: same order, same sums, same hooks.

        On CUDA it may be called on another stream than backward was: that one waits for what it reads. What reads
        `.grad` afterwards must wait for it: `torch.cuda.current_stream().wait_stream(side)`.
        """
        edges: list[GradientEdge] = []
        grads: list[Tensor] = []
        waiting, self._later = self._later, []
        with torch.no_grad():
            for targets, compute, inputs in waiting:
                inputs.ready()
                for (node, output), grad in zip(targets, compute()):
                    if grad is not None and node is not None:
                        edges.append(GradientEdge(node, output))
                        grads.append(grad)
        if edges:
            torch.autograd.backward(edges, grads)

    def __del__(self) -> None:
        if self._later:
            warnings.warn(
                f"weight gradients of {len(self._later)} products were deferred and never computed: call later.run()",
                RuntimeWarning,
                stacklevel=2,
            )


@contextmanager
def defer_weight_grads() -> Iterator[WeightGrads]:
    """Defer the weights' and biases' gradients of all products whose backward runs inside the block.

        with sg.defer_weight_grads() as later:
            loss.backward()  # inputs' gradients, and those of embeddings and norms
        later.run()  # the weights' gradients of products, with their share of the communication

    The results are those of an undeferred backward, to the bit, weights used more than once included. The gradient of a
    weight that is itself computed, as `w.t()` is, is not deferred (a cast under autocast is). `later.run()` may
    be called inside the block or after it, after any number of backwards; it must be called at the same place on every
    rank. Until then the inputs and dYs of the products stay in memory. (torch calls a parameter's hooks in the
    backward too, with None and before anything is accumulated.)
    """
    later = WeightGrads()
    deferrals.append(later)
    try:
        yield later
    finally:
        deferrals.remove(later)


def deferring() -> bool:
    return bool(deferrals)


def can_defer(node: Any, weights: slice) -> bool:
    """Whether the graph can still be entered at the weights of a node once its backward is over.

    At a leaf it can, and at a leaf's cast (autocast's); what else made a weight may have let go of what it needs.
    """
    return all(_is_leaf(entry[0]) for entry in node.next_functions[weights])


def _is_leaf(node: Any) -> bool:
    if node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return node is None or hasattr(node, "variable")


def defer(node: Any, compute: Callable[[], Sequence[Tensor | None]]) -> None:
    """Leave gradients for the innermost block. node: of the graph, whose inputs `compute` returns the gradients of."""
    deferrals[-1]._later.append((node.next_functions, compute, Inputs(compute)))
