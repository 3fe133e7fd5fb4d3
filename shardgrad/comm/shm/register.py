"""Makes the name "shm" known to torch.distributed.

Three ways lead here, so that `import shardgrad` is enough, in whatever order, and stays free of torch:

- torch was imported before: shardgrad/__init__.py registers at once;
- torch is imported later: it loads the entry points "torch.backends" of installed packages, of which this is one;
- whatever uses shardgrad.comm registers as well, also where torch's loading of backends is switched off.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Tell torch.distributed of the backend; a second time does nothing."""
    import torch.distributed as dist

    if dist.is_available() and "shm" not in dist.Backend.backend_list:
        dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])


def autoload() -> None:
    """What `import torch` calls wherever shardgrad is installed: it must never be the reason that torch fails."""
    try:
        register()
    except Exception as error:
        import warnings

        warnings.warn(f"shardgrad could not register its shm backend: {error}", stacklevel=1)


def _create(options: Any, _: object) -> Any:
    from shardgrad.comm.shm.group import ShmGroup

    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    seconds = options.timeout.total_seconds()
    return ShmGroup(options.store, options.group_rank, options.group_size, seconds, ranks, str(options.group_id))
