"""A layer whose parameters are parts of tensors that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.nn.parallel import Parallel


def layer_of(cls: Any, tensors: Mapping[str, Tensor | None], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`Layer.from_tensors`."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    names = cls.takes.__annotations__
    where = {name: value for name, value in kwargs.items() if name in names}
    parallel = Parallel.of(cls.__name__, where, cls.takes, cls.default_axis)
    dtype = parallel.dtype or next((tensor.dtype for tensor in given.values()), None)
    rest = {name: value for name, value in kwargs.items() if name not in names}
    with torch.random.fork_rng(devices=[]):  # a layer without values draws its seeds all the same
        rest["parallel"] = replace(parallel, device="meta", dtype=dtype)
        layer = cls(*args, **rest)
    layer.parallel = replace(parallel, dtype=dtype)
    layer.to_empty(device=parallel.device or view(parallel.mesh).device)
    if set(given) != set(layer._shardings):
        raise ShapeError(f"{cls.__name__} has {', '.join(layer._shardings)}; given are {', '.join(given)}")
    for name, sharding in layer._shardings.items():
        tensor, parameter = given[name], layer.get_parameter(name)
        if tuple(tensor.shape) != sharding.global_shape:
            raise ShapeError(
                f"{cls.__name__}.{name} has global shape {sharding.global_shape}, but the tensor given has "
                f"{tuple(tensor.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(sharding.shard(tensor))
        parameter.requires_grad_(tensor.requires_grad)
    return layer
