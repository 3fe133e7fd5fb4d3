"""On a rank: the default process group, entered when a task wants another one than the last."""

from __future__ import annotations

import gc
import sys
import threading

from .messages import Group


class Membership:
    """The default process group that this rank is in, if any.

    It is kept from one task to the next while both need the same: entering costs some 10 ms, a task in a
    group already there less than one.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._group: Group | None = None
        self._world: list[object] = []  # the default group itself; leave() says why in a list

    def enter(self, group: Group) -> None:
        """Leaves the old group for this one; every rank of the new group must enter."""
        if group == self._group:
            return
        self.leave()
        import torch.distributed as dist

        from shardgrad.comm.shm.register import register

        register()  # also where torch is set not to load installed backends
        if group.backend == "late":
            from . import late  # noqa: F401 - which makes the name known
        dist.init_process_group(
            group.backend, init_method=f"file://{group.store}", rank=self.rank, world_size=group.world_size
        )
        self._group, self._world = group, [dist.group.WORLD]
        if not gc.get_freeze_count():
            gc.freeze()  # what torch has made stays: looking through it at each collection is a tenth of all time

    def is_intact(self) -> bool:
        """False after a task has destroyed, and perhaps replaced, the group it was given."""
        import torch.distributed as dist

        return dist.is_initialized() and self._world == [dist.group.WORLD]

    def leave(self) -> None:
        """Destroys the default group, also one that a task made itself, and all groups made from it."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        if "torch.distributed.tensor" in sys.modules:
            from shardgrad.comm.shim import forget_meshes

            forget_meshes()
        # gloo takes some 10 ms a peer to close its sockets, without holding the GIL. Dropping the last
        # reference on another thread takes that time off the next task.
        threading.Thread(target=self._world.clear).start()
        self._group, self._world = None, []
