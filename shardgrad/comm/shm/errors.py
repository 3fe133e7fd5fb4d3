"""What goes wrong on the shared-memory backend."""

from __future__ import annotations

import torch.distributed as dist


class ShmError(dist.DistBackendError):
    """A RuntimeError: an operation over shared memory failed, or cannot be done; says on which rank and why.

    After one that came while ranks were communicating, the group refuses all further operations.
    """
