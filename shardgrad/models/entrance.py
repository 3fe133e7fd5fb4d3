"""Where layers that share an input take it: its gradient is summed once for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from shardgrad.comm.adjoint import replicate
from shardgrad.nn.parallel import Parallel


class Entrance:
    """The input of column parallel layers that stand side by side (query, key and value; gate and up).

    Each layer leaves its term of the input's gradient unsummed. Those that are called with the same tensor share one
    `replicate`, so that backward sums once; one that gets another tensor (the keys of a cross-attention) has its own.

    users: how many layers share it.
    """

    def __init__(self, parallel: Parallel, users: int) -> None:
        self.parallel, self.users = parallel, users
        self._given: Tensor | None = None
        self._entered: Tensor | None = None
        self._version, self._left = 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        """x, with its gradient summed over the axis."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        compiling = torch.compiler.is_compiling()
        if x is self._given and (compiling or x._version == self._version):
            entered = self._entered
        else:
            entered = replicate(x, self.parallel.mesh, self.parallel.axis)
            self._given, self._entered, self._left = x, entered, self.users
            self._version = 0 if compiling else x._version
        self._left -= 1
        if self._left <= 0:
            self.forget()
        assert entered is not None
        return entered

    def forget(self) -> None:
        """Keep no tensor in memory."""
        self._given = self._entered = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_given": None, "_entered": None, "_left": 0}
