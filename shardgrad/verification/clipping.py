"""What clips a model's gradients by their global norm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardgrad.nn.global_ops import clip_grad_norm_
from shardgrad.nn.module import ShardedModule

Clip = Callable[[nn.Module, float], Tensor]


def clip_of(model: nn.Module) -> Clip | None:
    """What clips a model's gradients by their global norm: shardgrad's function, or torch's, which takes DTensors of
    one mesh alone."""
    dtensors = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    layers = any(isinstance(module, ShardedModule) for module in model.modules())
    if layers and not any(dtensors):
        return clip_grad_norm_
    if dtensors and all(dtensors) and len(meshes) == 1:
        return _clip_dtensors
    return None


def clip_one_device(model: nn.Module, max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def _clip_dtensors(model: nn.Module, max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
