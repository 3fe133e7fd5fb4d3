"""Makes the name "late" known to torch.distributed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .group import LateGroup


def register() -> None:
    """Tell torch.distributed of the backend; a second time does nothing."""
    if "late" not in dist.Backend.backend_list:
        dist.Backend.register_backend("late", _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _: object) -> LateGroup:
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    return LateGroup(
        options.store, options.group_rank, options.group_size, options.timeout, ranks, str(options.group_id)
    )
