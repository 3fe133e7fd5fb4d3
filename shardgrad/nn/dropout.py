"""Dropout whose mask is a function of the global element, whatever the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import agree, checking_every_call
from shardgrad.comm.mesh import view
from shardgrad.errors import MeshError
from shardgrad.layout.notation import Dim, TensorSpec, parse_tensor
from shardgrad.layout.plan import route
from shardgrad.layout.sizes import Sizes, slab
from shardgrad.nn import philox
from shardgrad.nn.counter import bits32
from shardgrad.nn.init import draw_seed
from shardgrad.nn.module import ShardedModule
from shardgrad.ops import sizing
from shardgrad.ops.size_exchange import exchange


class Dropout(ShardedModule):
    """nn.Dropout for a tensor stored as `spec`: each element is zeroed with probability p, the rest times 1/(1−p).

        dropout = Dropout(0.1, "X[b,s/tp,d]", mesh=mesh)

    Shards of one tensor get the shards of one global mask, and replicas get equal masks, so a model's values do not
    depend on the number of ranks: after `sg.unshard`, y is bit for bit that of one rank.

    *Where the mask comes from.* Every call in training draws one number from torch's CPU generator: the call's key. The
    mask is a function of the key and the global element (`shardgrad.nn.counter`), two elements to 64 random bits. Under
    `torch.utils.checkpoint`, which puts the generator's state back, the recomputation draws the key, and so the mask,
    again. Ranks must draw alike: seed them alike (`torch.manual_seed`), and let none draw more than another. They
    compare keys over each axis at the 1st, 2nd, 4th, 8th, … call of a layer (one small exchange), and at every call
    under `sg.check_every_call`.

    *Axes that `spec` does not write* hold replicas, and share the mask. An axis with other data is written on the batch
    (`X[b/dp,s,d]`: the mask is that of the global batch), or named in `independent`: there each rank has masks of its
    own, and keys are not compared, so that these ranks may be seeded as they like.

    Args:
        p: the probability of zero, in steps of 2⁻³².
        spec: how x is stored: text, or a layout's `layout["X"]`.
        mesh: the mesh of its axes.
        independent: axes of the mesh that hold other data and are not written in `spec`.

    Raises:
        ValueError: p is no probability.
        MeshError: the mesh lacks an axis, or an axis is both in `spec` and independent.

    On CUDA the mask is made on the device, with the same bits, and the host does not wait: `shardgrad.nn.philox`, some
    250 small kernels for each 8 million elements. (A CUDA graph would replay one key, and so one mask.)
    """

    def __init__(self, p: float, spec: TensorSpec | str, *, mesh: DeviceMesh, independent: Sequence[str] = ()) -> None:
        stored = parse_tensor(spec) if isinstance(spec, str) else spec
        super().__init__(mesh, (*stored.axes, *independent))
        self.spec = stored
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability, not {p}")
        for axis in independent:
            if axis in self.spec.axes:
                raise MeshError(f"axis {axis!r} shards {self.spec}: its ranks hold parts of one tensor, not other data")
        self.p, self.independent = p, tuple(independent)
        self._calls = 0

    @told
    def forward(
        self,
        x: Tensor,
        sizes: Mapping[str, int] | None = None,
        part: Mapping[str, tuple[int, int]] | None = None,
    ) -> Tensor:
        """x with some elements zeroed; x itself in eval mode or with p = 0.

        Args:
            x: the local shard.
            sizes: global sizes of letters. Needed for those that an axis shards; without them the ranks exchange them,
                one small exchange a call and axis.
            part: of letters of which all ranks' x is only a part, as of the batch a micro-batch: where it begins, and
                the size of the whole, whose mask it gets a part of.

        Raises:
            ShapeError: x does not fit `spec`, or its shards are not as the axes shard.
            DisagreementError: the ranks drew different keys.
        """
        if not self.training or self.p == 0:
            return x
        key = self._key()
        known = self._sizes(x, sizes)
        threshold = round(self.p * 2**32)
        if threshold == 2**32:
            return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)
        slabs, shape = [], []
        for dim in self.spec.dims:
            whole = known.get(dim.letter)
            assert whole is not None
            first, size = (part or {}).get(dim.letter, (0, whole))
            start, length = slab(whole, dim.axes, known.shape, known.coordinate)
            shape.append(size)
            slabs.append((first + start, length))
        starts, lengths = [start for start, _ in slabs], [length for _, length in slabs]
        below = _below_by_numpy if x.device.type == "cpu" else philox.below
        dropped = below(threshold, key, shape, starts, lengths, x.device)
        # What is saved for backward is the mask, one byte an element.
        return x.masked_fill(dropped, 0).mul(1 / (1 - self.p))

    def _key(self) -> int:
        """This call's key: drawn, compared now and then, and distinct over independent axes."""
        key = draw_seed()
        mesh_view = view(self.mesh)
        self._calls += 1
        if self._calls & (self._calls - 1) == 0 or checking_every_call():
            text = (
                f"p = {self.p} of {self.spec}\n"
                f"key {key}, drawn from torch's CPU generator (were the ranks seeded alike?)"
            )
            for name, axis in mesh_view.axes.items():
                if name not in self.independent:
                    agree(mesh_view, axis, lambda: text, "a dropout mask")
        replica = 0
        for name in self.independent:
            replica = replica * mesh_view.shape[name] + mesh_view.coordinate[name]
        return key | replica << 64  # Philox's key has 128 bits

    def _sizes(self, x: Tensor, given: Mapping[str, int] | None) -> Sizes:
        mesh_view = view(self.mesh)
        known = sizing.learn([self.spec], [x], given, mesh_view, self.spec)
        missing = sizing.unknown(route(self.spec.dims, tuple(Dim(dim.letter) for dim in self.spec.dims)), known)
        if missing:
            exchange(missing, known, mesh_view, self.spec)
        return known

    def extra_repr(self) -> str:
        independent = f", independent={self.independent}" if self.independent else ""
        return f"p={self.p}, {self.spec}{independent}"


def _below_by_numpy(
    threshold: int, key: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int], _: torch.device
) -> Tensor:
    """As `philox.below`, on the CPU: many times faster there."""
    return torch.from_numpy(np.ascontiguousarray(bits32(key, shape, starts, lengths) < np.uint32(threshold)))
