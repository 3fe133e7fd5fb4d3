"""`check_finite`: no NaN and no inf in parameters and gradients, or all ranks say where."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.errors import VerificationError
from shardgrad.verification.together import gradient, held, spread

_MOST = 10  # tensors that an error lists


@told
@torch.no_grad()
def check_finite(model: nn.Module, *, step: int | None = None, mesh: DeviceMesh | None = None) -> None:
    """Whether every element of every parameter and gradient is a finite number, on every rank.

    A NaN of one rank's shard reaches the others a step later, and its origin is lost. Here all ranks raise together,
    and name the tensors, the ranks and the step. Called on every rank; two reads of memory and, for each axis of the
    mesh, an exchange of one number.

    Args:
        model: shardgrad layers or DTensors; with `mesh`, plain ones too.
        step: named in the error.
        mesh: whose ranks raise together, where no layer knows one.

    Raises:
        VerificationError: an element is NaN or infinite.
        ValueError: no mesh is known.
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    _, meshes = held(model, mesh)
    extremes: list[Tensor] = []
    tensors: list[tuple[str, str, Tensor]] = []
    for kind, name, tensor in _tensors(model):
        if tensor.numel():
            tensors.append((kind, name, tensor))
            # Extremes are NaN where any element is; they cost one pass and no memory.
            extremes.append(torch.stack(torch.aminmax(tensor)).to(meshes[0].device, torch.float64))
    problems = []
    if extremes and not bool(torch.stack(extremes).isfinite().all()):
        problems = [
            _say(kind, name, tensor)
            for (kind, name, tensor), both in zip(tensors, extremes)
            if not bool(both.isfinite().all())
        ]
    for mesh_view in meshes:
        problems = spread(problems, mesh_view, "comparison of what is not finite between ranks")
    if problems:
        more = [f"  and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
        when = "" if step is None else f" at step {step}"
        raise VerificationError(
            "\n".join(
                (
                    f"numbers that are not finite{when}:",
                    *(f"  {problem}" for problem in problems[:_MOST]),
                    *more,
                    "usual causes: a learning rate too high, fp16 without loss scaling, a division by zero or a "
                    "logarithm of zero in the loss, rows that are masked out altogether",
                )
            )
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in model.named_parameters():
        for kind, tensor in (("gradient", gradient(parameter)), ("value", parameter)):
            if tensor is not None and tensor.is_floating_point():
                yield kind, name, tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _say(kind: str, name: str, tensor: Tensor) -> str:
    counts = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{kind} of {name} on rank {dist.get_rank()}: of {tensor.numel()} elements {said}"
