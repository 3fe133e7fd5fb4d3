"""`check_replicas`: whether copies are still copies, by fingerprints, in one small exchange for each axis."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import share_first
from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import Axis, MeshView
from shardgrad.errors import VerificationError
from shardgrad.verification.fingerprint import fingerprint
from shardgrad.verification.finite import check_finite
from shardgrad.verification.together import Held, gradient, held, spread

_MOST = 10  # tensors that an error lists
_CAUSES = {
    "value": "a step taken on some ranks only, a change of one rank's copy, ranks that loaded or drew other values",
    "gradient": "a gradient that was not summed (a norm without sequence_dim where rows are sharded, a parameter used "
    "on sharded rows without sg.replicate, DDP missing on the axis), a rank that skipped a backward, dropout with "
    "other seeds",
    "optimizer state": "other hyper-parameters or another state loaded on some ranks, a step skipped on some ranks",
}


@told
@torch.no_grad()
def check_replicas(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    mesh: DeviceMesh | None = None,
    axes: Collection[str] | None = None,
    gradients: bool = True,
    step: int | None = None,
) -> int:
    """Whether parameters, gradients and optimizer states that several ranks hold are the same bits on all of them.

    What drifts apart, trains on: the loss looks a little worse, and nothing says why. Here each rank takes a 64-bit
    fingerprint of each tensor, and the ranks of each axis exchange the fingerprints, all in one collective (after one
    that compares which tensors there are). Called on every rank; all ranks raise together.

        optimizer.step()
        sg.check_replicas(model, optimizer, step=step)

    Args:
        model: a shardgrad layer's parameter is replicated over the axes of its mesh that do not shard it, a DTensor
            over those where it is placed as Replicate.
        optimizer: whose states of these parameters are compared as well; those that are not tensors are left out.
        mesh: over all of whose ranks parameters are replicated that say nothing themselves (plain torch layers);
            without it they are left out.
        axes: the axes to compare over; by default all. Leave out an axis on which ranks hold other things on purpose
            (pipeline stages).
        gradients: whether gradients are compared; call it then where they are complete. Over an axis whose sum a
            parameter's storage leaves to the caller (`W[d,m]{dp}`) they never are.
        step: named in the error.

    Returns:
        How many tensors this rank compared.

    Raises:
        VerificationError: copies differ; names the tensors, the ranks and the usual causes.
        DisagreementError: ranks came with other parameters or other optimizer states.
        ValueError: nothing says how any parameter is held; or an axis is not of any mesh.
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    parameters, meshes = held(model, mesh)
    known = {name for mesh_view in meshes for name in mesh_view.axes}
    if axes is not None and not set(axes) <= known:
        raise ValueError(f"axes {sorted(set(axes) - known)} are of no mesh: there are {', '.join(sorted(known))}")
    tensors: dict[Axis, list[tuple[str, str, Tensor | None]]] = {}
    for parameter in parameters:
        for kind, name, tensor in _tensors(parameter, optimizer, gradients):
            for axis in parameter.summed if kind == "gradient" else parameter.axes:
                if axes is None or axis.name in axes:
                    tensors.setdefault(axis, []).append((kind, name, tensor))
    prints: dict[int, Tensor] = {}
    compared: set[tuple[str, str]] = set()
    problems: list[str] = []
    for mesh_view in meshes:
        for axis in mesh_view.axes.values():
            entries = tensors.pop(axis, [])
            if not entries:
                continue
            # Compared every time: what one rank has long agreed on may be news to another.
            share_first(axis, _described(entries), 0, "the tensors whose replicas are compared")
            for _, _, tensor in entries:
                if tensor is not None and id(tensor) not in prints:
                    prints[id(tensor)] = fingerprint(tensor).to(mesh_view.device)
            compared.update((kind, name) for kind, name, tensor in entries if tensor is not None)
            nothing = torch.zeros((), dtype=torch.int64, device=mesh_view.device)
            mine = torch.stack([nothing if tensor is None else prints[id(tensor)] for _, _, tensor in entries])
            problems += _deviations(entries, gather_ints(mine.tolist(), axis, mesh_view.device, _WHAT), axis)
    found = _spread(problems, meshes)
    if found:
        raise VerificationError(_report(found, step))
    return len(compared)


def check_run(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Both guards, as a training loop calls them after a step. Errors as of `check_finite` and `check_replicas`."""
    check_finite(model, step=step)
    check_replicas(model, optimizer, step=step)


_WHAT = "comparison of replicas between ranks"


def _spread(problems: list[str], meshes: list[MeshView]) -> list[str]:
    """Over one axis all of its ranks know already."""
    for mesh_view in meshes:
        if len(meshes) > 1 or sum(axis.size > 1 for axis in mesh_view.axes.values()) > 1:
            problems = spread(problems, mesh_view, _WHAT)
    return problems


def _tensors(
    parameter: Held, optimizer: torch.optim.Optimizer | None, gradients: bool
) -> Iterator[tuple[str, str, Tensor | None]]:
    """Kind, name and local tensor of a parameter and of what belongs to it."""
    yield "value", parameter.name, parameter.local(parameter.parameter)
    if gradients and parameter.parameter.requires_grad:
        grad = gradient(parameter.parameter)
        yield "gradient", parameter.name, None if grad is None else parameter.local(grad)
    state = {} if optimizer is None else optimizer.state.get(parameter.parameter, {})
    for key, value in sorted(state.items()):
        if isinstance(value, Tensor):
            yield "optimizer state", f"{parameter.name} ({key})", parameter.local(value)


def _described(entries: list[tuple[str, str, Tensor | None]]) -> str:
    return "\n".join(f"{kind} {name}" for kind, name, _ in entries)


def _deviations(entries: list[tuple[str, str, Tensor | None]], rows: list[list[int]], axis: Axis) -> Iterator[str]:
    for at, (kind, name, _) in enumerate(entries):
        numbers = [row[at] for row in rows]
        if len(set(numbers)) == 1:
            continue
        groups: dict[int, list[int]] = {}
        for rank, number in zip(axis.ranks, numbers):
            groups.setdefault(number, []).append(rank)
        absent = [rank for rank, number in zip(axis.ranks, numbers) if number == 0]
        common = max(groups, key=lambda number: len(groups[number]))
        if 2 * len(groups[common]) > len(numbers):
            odd = [rank for rank, number in zip(axis.ranks, numbers) if number != common]
            said = f"{_ranks(odd)} {'deviates' if len(odd) == 1 else 'deviate'} from {_ranks(groups[common])}"
        else:
            said = " and ".join(_ranks(ranks) for ranks in groups.values()) + " differ, none has a majority"
        missing = f" (there is none on {_ranks(absent)})" if absent else ""
        yield f"{kind} of {name}: over {axis.name}, {said}{missing}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _report(problems: list[str], step: int | None) -> str:
    kinds = [kind for kind in _CAUSES if any(problem.startswith(kind) for problem in problems)]
    more = [f"  and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
    return "\n".join(
        (
            f"replicas have come apart{'' if step is None else f' at step {step}'}: their bits differ",
            *(f"  {problem}" for problem in problems[:_MOST]),
            *more,
            "usual causes:",
            *(f"  {kind}: {_CAUSES[kind]}" for kind in kinds),
        )
    )
