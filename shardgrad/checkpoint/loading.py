"""A checkpoint as it is read: by every rank, and all of it compared before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.arguments import told
from shardgrad.checkpoint.contents import Contents
from shardgrad.checkpoint.seal import MODEL, OPTIMIZER, DamagedError, verify
from shardgrad.models.lazy_tensor import LazyTensor
from shardgrad.models.weights_file import opened_file
from shardgrad.nn.dtensors import placed_like
from shardgrad.nn.sharding import ParamSharding

_Tensors = Mapping[str, LazyTensor]


@told
def load(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    frozen: bool = True,
    seal: str | None = None,
) -> dict[str, Any]:
    """Fill a model, on any mesh, and its optimizer with a checkpoint; every rank reads it, and nothing is communicated.

    The optimizer's state is then what was saved, and nothing else. A checkpoint with an optimizer's state fills a model
    alone as well.

    Args:
        frozen: as it was saved with; without, parameters that need no gradient keep their values.
        seal: as `verify` returned it on another rank, or before: large files are not compared with their digests again.

    Returns:
        What `state.json` holds.

    Raises:
        OSError, DamagedError, ValueError: as `verify`; or a file cannot be read.
        ValueError: its tensors are not those of the model, by name or by global shape, or its optimizer is another one,
            or has other parameters.
    """
    folder = Path(path)
    about = verify(folder, seal).state
    contents = Contents.of(model, optimizer, frozen)
    with opened_file(folder / MODEL) as tensors, opened_file(folder / OPTIMIZER) as moments:
        wanted: dict[str, tuple[int, ...]] = {name: tuple(one.shape) for name, one in contents.buffers.items()}
        wanted |= {name: _global_shape(*one) for name, one in contents.parameters.items()}
        _check_names(set(tensors), set(wanted), folder)
        for name, shape in wanted.items():
            _check_shape(tensors, name, shape, folder)
        if contents.held is not None:
            _check_optimizer(about["optimizer"], contents.held, optimizer, folder)
            known = set(contents.held)
            for entry, moment in moments.items():
                name = entry.rpartition("/")[0]
                if name not in known:
                    raise DamagedError(f"{folder / OPTIMIZER} has {entry}, of no parameter that state.json names")
                if moment.shape:
                    _check_shape(moments, entry, wanted[name], folder)
        _fill(contents, optimizer, tensors, moments, about)
    return about


@torch.no_grad()
def _fill(
    contents: Contents,
    optimizer: torch.optim.Optimizer | None,
    tensors: _Tensors,
    moments: _Tensors,
    about: dict[str, Any],
) -> None:
    for name, buffer in contents.buffers.items():
        buffer.copy_(placed_like(_read(tensors[name]), buffer))
    for name, (parameter, sharding) in contents.parameters.items():
        parameter.copy_(placed_like(_part(_read(tensors[name]), sharding), parameter))
    if optimizer is None:
        return
    for name in contents.held or ():
        optimizer.state.pop(contents.parameters[name][0], None)
    for entry, number in about["optimizer"]["numbers"].items():
        name, _, key = entry.rpartition("/")
        optimizer.state[contents.parameters[name][0]][key] = number
    for entry, moment in moments.items():
        name, _, key = entry.rpartition("/")
        parameter, sharding = contents.parameters[name]
        value = _read(moment)
        if value.dim():
            value = placed_like(_part(value, sharding).to(parameter.device), parameter)
        optimizer.state[parameter][key] = value


def _read(tensor: LazyTensor) -> Tensor:
    return tensor.read(tensor.everything())


def _global_shape(parameter: Tensor, sharding: ParamSharding | None) -> tuple[int, ...]:
    return tuple(parameter.shape) if sharding is None else sharding.global_shape


def _part(full: Tensor, sharding: ParamSharding | None) -> Tensor:
    return full if sharding is None else sharding.shard(full)


def _check_shape(tensors: _Tensors, name: str, shape: tuple[int, ...], folder: Path) -> None:
    if tensors[name].shape != shape:
        raise ValueError(f"{name} has global shape {shape} in this model, but {tensors[name].shape} in {folder}")


def _check_names(found: set[str], wanted: set[str], folder: Path) -> None:
    if found != wanted:
        told = _difference(found, wanted, "which the model lacks")
        raise ValueError(f"{folder} is a checkpoint of another model: {told}")


def _difference(found: set[str], wanted: set[str], unknown: str) -> str:
    parts = [f"it lacks {', '.join(sorted(wanted - found))}"] if wanted - found else []
    parts += [f"it has {', '.join(sorted(found - wanted))}, {unknown}"] if found - wanted else []
    return "; ".join(parts)


def _check_optimizer(
    about: dict[str, Any] | None, held: list[str], optimizer: torch.optim.Optimizer | None, folder: Path
) -> None:
    own = type(optimizer).__name__
    if about is None:
        raise ValueError(
            f"{folder} was saved without an optimizer's state, and {own} would begin anew: save it with "
            "checkpoint.save(…, optimizer), or load the model alone"
        )
    if about["kind"] != own:
        raise ValueError(
            f"{folder} has the state of {about['kind']}, which {own} does not go on with: load the model alone"
        )
    if {*about["parameters"]} != {*held}:
        told = _difference({*about["parameters"]}, {*held}, "which this one does not hold")
        raise ValueError(
            f"the optimizer's state in {folder} is of other parameters: {told}. Make {own} of the parameters that it "
            "was saved with, or load the model alone"
        )
