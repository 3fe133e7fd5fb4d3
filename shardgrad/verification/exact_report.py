"""What `verify_exact` found: which tensors have other bits than on one rank, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isinf
from typing import Literal

from shardgrad.errors import VerificationError

Compared = Literal["initial value", "result", "gradient", "value", "buffer"]
Problem = Literal["other bits", "missing", "unexpected", "another dtype", "another shape"]
PROBLEMS: tuple[Problem, ...] = ("other bits", "missing", "unexpected", "another dtype", "another shape")
_MOST = 10  # tensors, and coordinates of one, that are printed


@dataclass(frozen=True)
class WrongShard:
    """What one rank has of a tensor that differs.

    coordinate: of the rank on the mesh.
    elements, of: how many differ, of how many that the rank has.
    ulps: how many numbers of the dtype the farthest is away; 0 between 0 and -0, infinite where one side is NaN.
    index: of the first of them, in the rank's tensor.
    """

    coordinate: Mapping[str, int]
    problem: Problem
    elements: int = 0
    of: int = 0
    ulps: float = 0.0
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = ", ".join(f"{axis}={at}" for axis, at in self.coordinate.items()) or "the one rank"
        if self.problem != "other bits":
            return f"{where}: {self.problem}"
        at = f", the first at [{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{where}: {self.elements} of {self.of} elements, {_ulps(self.ulps)}{at}"


@dataclass(frozen=True)
class BitDifference:
    """A tensor that is not, bit for bit, what one rank computes.

    kind, name: which tensor; "value" is a parameter after the step.
    step: of how many steps it is the result; 0 before the first.
    shape: of the whole tensor on one rank; None if there is none.
    elements: how many differ, those of which several ranks have replicas counted once.
    shards: the ranks that have it wrong.
    """

    kind: Compared
    name: str
    step: int
    shape: tuple[int, ...] | None
    dtype: str
    elements: int
    shards: tuple[WrongShard, ...]

    @property
    def ulps(self) -> float:
        """The largest of all shards."""
        return max(shard.ulps for shard in self.shards)

    def __str__(self) -> str:
        problems = dict.fromkeys(shard.problem for shard in self.shards)
        whole = "no tensor" if self.shape is None else f"{self.dtype}{list(self.shape)}"
        said = f"{self.kind} of {self.name} ({whole} on one rank): {' and '.join(problems)}"
        elements = f"{self.elements} element{'s' if self.elements != 1 else ''}"
        return f"{said}, {elements}, {_ulps(self.ulps)}" if "other bits" in problems else said


@dataclass(frozen=True, repr=False)
class ExactReport:
    """What `verify_exact` found, alike on every rank of the mesh.

    differences: of the first step at which there are any, in order: the first result, which is the loss; gradients; the
        other results; parameters; buffers; each as the model lists them.
    compared: how many tensors were compared. skipped: those that were not, with the reason.
    steps: how many were done.
    """

    mesh_shape: Mapping[str, int]
    pieces: Mapping[str, int]
    steps: int
    compared: int
    differences: tuple[BitDifference, ...]
    skipped: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every bit is that of one rank."""
        return not self.differences

    @property
    def first(self) -> BitDifference | None:
        """The first tensor that differs."""
        return self.differences[0] if self.differences else None

    def require(self) -> ExactReport:
        """Itself, if every bit is that of one rank.

        Raises:
            VerificationError: one is not.
        """
        if not self.ok:
            raise VerificationError(str(self))
        return self

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis}={ranks}" for axis, ranks in self.mesh_shape.items())
        where = f"mesh {mesh} and one rank, pieces {dict(self.pieces)}"
        skipped = [f"not compared: {name} ({why})" for name, why in self.skipped.items()]
        first = self.first
        if first is None:
            steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
            return "\n".join((f"all {self.compared} tensors are the same bits after {steps} ({where})", *skipped))
        when = "before the first step" if first.step == 0 else f"after step {first.step}"
        lines = [f"{len(self.differences)} of {self.compared} tensors have other bits {when} ({where})"]
        lines += [f"first: {first}", *(f"  {shard}" for shard in first.shards[:_MOST])]
        lines += _more(len(first.shards))
        if len(self.differences) > 1:
            lines += ["then:", *(f"  {one}" for one in self.differences[1:_MOST]), *_more(len(self.differences))]
        return "\n".join((*lines, *self._hints(), *skipped))

    __repr__ = __str__

    def _hints(self) -> list[str]:
        """Which part of the step to look at."""
        first = self.differences[0]
        gradients = [one.name for one in self.differences if one.kind == "gradient"]
        if first.kind == "initial value":
            return ["what build makes depends on the ranks, or replicas differ: nothing else was compared"]
        if first.kind == "gradient":
            return [f"forward is right: the mistake is in what follows. Backward comes to {gradients[-1]} first"]
        if first.kind == "value":
            return ["gradients are right: the mistake is in the optimizer, or in what it keeps"]
        return []


def _more(count: int) -> list[str]:
    return [f"  and {count - _MOST} more"] if count > _MOST else []


def _ulps(ulps: float) -> str:
    if isinf(ulps):
        return "NaN on one side"
    return "by the sign of a zero" if ulps == 0 else f"by at most {ulps:.6g} ulp{'s' if ulps != 1 else ''}"
