"""Whether the ranks that torch takes for replicas of a module (DDP, `fully_shard`) hold the same shards of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardgrad.comm import shim
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import refuse_exact_on
from shardgrad.errors import MeshError
from shardgrad.nn.sharding import ParamSharding


def check_replicas_alike(shardings: Mapping[str, ParamSharding], user: str) -> None:
    """Refuse that DDP or `fully_shard`, in whose call this is, takes ranks for replicas that hold different shards.

    DDP would copy rank 0's shards to all of them, `fully_shard` concatenate parts of different ones, both in silence.
    Outside of their calls nothing is looked at.

    Args:
        shardings: of a module's parameters, by name.
        user: the module, for the error.

    Raises:
        MeshError: there are such ranks; says which, and the group to use.
        LayoutError: exact mode is set, which their sums do not know.
    """
    group = shim.data_parallel_group()
    if group is None:
        return
    caller, ranks = group
    for sharding in shardings.values():
        instead = "give layers the axis (data=sg.BatchAxis('dp')), whose gradients are then summed over its pieces"
        refuse_exact_on(sharding.mesh, None, f"the sum of gradients in {caller}", instead)
    for name, sharding in shardings.items():
        found = differing(sharding, ranks)
        if found is not None:
            axis, others = found
            remedy = "process_group=mesh.get_group('dp')" if caller == "DistributedDataParallel" else "mesh=mesh['dp']"
            raise MeshError(
                f"{caller} takes {_listed(ranks)} for replicas, but {user}.{name} is sharded over axis {axis!r}, "
                f"along which other shards than this rank's are on {_listed(others)}: one would take the place of "
                "another. Replicate over an axis of the mesh that shards no parameter: "
                f"init_device_mesh(…, (…, …), mesh_dim_names=('dp', {axis!r})), "
                f"then {caller}(model, {remedy})"
            )


def differing(sharding: ParamSharding, ranks: Sequence[int]) -> tuple[str, list[int]] | None:
    """An axis, and those of some ranks, among which this one is, that hold other shards along it than this one; None if
    all of them hold the same. A rank that no mesh of the parameter's has says nothing."""
    for leaf in sharding.leaves:
        mesh_view = view(leaf.mesh)
        for name in leaf.spec.axes:
            axis = mesh_view.axes[name]
            places = {rank: at for at, rank in enumerate(axis.ranks)}
            places = {**shim.places_along(leaf.mesh, name), **places}
            others = [rank for rank in ranks if places.get(rank, axis.index) != axis.index]
            if others:
                return name, others
    return None


def _listed(ranks: Sequence[int]) -> str:
    more = f", … ({len(ranks)})" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"
