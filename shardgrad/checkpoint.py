"""Save and load a model and its optimizer, whatever the mesh: global tensors in safetensors files, no pickle.

A checkpoint is a folder:

    model.safetensors       every parameter, global, by its name
    optimizer.safetensors   `name/key`: the optimizer's state of each parameter (AdamW: step, exp_avg, exp_avg_sq)
    state.json              the format, torch's version, the mesh that saved it, and what the caller adds

It is written under another name and renamed when all of it is on the disk, so a folder of its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import text_of_first
from shardgrad.comm.mesh import view
from shardgrad.models.weights_file import to_disk
from shardgrad.nn.dtensors import placed_like, reshard, whole
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings

FORMAT = 1
STATE = "state.json"
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"


@told
def save(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    mesh: DeviceMesh,
    state: Mapping[str, Any] | None = None,
    frozen: bool = True,
) -> None:
    """Write a checkpoint; called on every rank of the mesh, written by its first.

    Tensors are assembled one at a time; the first rank holds all of them in the memory of its CPU until they are
    written. Returns, on every rank, when the checkpoint is on the disk.

    Args:
        path: a folder that does not exist yet.
        optimizer: its state goes along; its hyperparameters do not (they are the configuration's).
        state: what else to write, of JSON's types: the step, say.
        frozen: whether parameters that need no gradient are written too; `load` is told the same.

    Raises:
        OSError: on every rank, if the folder exists or cannot be written; nothing is left of it.
    """
    mesh_view = view(mesh)
    writes = not any(mesh_view.coordinate.values())
    parameters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    reshard(model)
    for name, parameter, sharding in named_shardings(model):
        if not (frozen or parameter.requires_grad):
            continue
        full = _whole(parameter, sharding)
        if writes:
            parameters[name] = full
        for key, value in _optimizer_state(optimizer, parameter).items():
            full = _whole(value, sharding if value.shape == parameter.shape else None)
            if writes:
                moments[f"{name}/{key}"] = full
    done = "written"
    if writes:
        about = {"format": FORMAT, "torch": torch.__version__, "mesh": mesh_view.shape, **(state or {})}
        try:
            _write(Path(path), parameters, moments, about)
        except (OSError, SafetensorError) as error:
            done = f"cannot write the checkpoint {path}: {error}"
    done = text_of_first(done, mesh_view)
    if done != "written":
        raise OSError(done)


@told
def load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, frozen: bool = True
) -> dict[str, Any]:
    """Fill a model, on any mesh, and its optimizer with a checkpoint; every rank reads it, and nothing is communicated.

    frozen: as it was saved with; without, parameters that need no gradient keep their values.

    Returns:
        What `state.json` holds.

    Raises:
        OSError: the folder or a file of it cannot be read.
        ValueError: its tensors are not those of the model, by name or by global shape, or the format is unknown.
    """
    folder = Path(path)
    about: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {about.get('format')}; this version of shardgrad reads {FORMAT}")
    reshard(model)
    own = {name: (one, sharding) for name, one, sharding in named_shardings(model) if frozen or one.requires_grad}
    with _opened(folder / _MODEL) as file, torch.no_grad():
        _check_names(set(file.keys()), set(own), folder)
        for name, (parameter, sharding) in own.items():
            part = _part(file.get_tensor(name), name, parameter, sharding, folder)
            parameter.copy_(placed_like(part, parameter))
    if optimizer is not None:
        with _opened(folder / _OPTIMIZER) as file:
            for entry in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, key = entry.rpartition("/")
                parameter, sharding = own[name]
                value = file.get_tensor(entry)
                if value.dim():
                    value = _part(value, entry, parameter, sharding, folder).to(parameter.device)
                    value = placed_like(value, parameter)
                optimizer.state[parameter][key] = value
    return about


@told
def digest(path: str | Path) -> str:
    """A name for the bits of a checkpoint's tensors, which do not depend on the mesh that saved them."""
    made = hashlib.sha256()
    for name in (_MODEL, _OPTIMIZER):
        with (Path(path) / name).open("rb") as file:
            made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest()[:16]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read tensors from.

    Raises:
        OSError: it is missing, cut short, or nothing of the kind.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} cannot be read ({error}): delete {path.parent} to go on from the checkpoint before it"
        ) from None


def _optimizer_state(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _whole(local: Tensor, sharding: ParamSharding | None) -> Tensor:
    """The global tensor, on the CPU and of its own memory."""
    part = whole(local.detach())
    if sharding is None or not any(leaf.spec.axes for leaf in sharding.leaves):
        return part.cpu().clone(memory_format=torch.contiguous_format)
    return sharding.unshard(part).cpu()


def _part(full: Tensor, name: str, parameter: Tensor, sharding: ParamSharding | None, folder: Path) -> Tensor:
    shape = tuple(parameter.shape) if sharding is None else sharding.global_shape
    if tuple(full.shape) != shape:
        raise ValueError(f"{name} has global shape {shape} in this model, but {tuple(full.shape)} in {folder}")
    return full if sharding is None else sharding.shard(full)


def _check_names(found: set[str], wanted: set[str], folder: Path) -> None:
    if found != wanted:
        missing, unknown = sorted(wanted - found), sorted(found - wanted)
        parts = [f"it lacks {', '.join(missing)}"] if missing else []
        parts += [f"it has {', '.join(unknown)}, which the model lacks"] if unknown else []
        raise ValueError(f"{folder} is a checkpoint of another model: {'; '.join(parts)}")


def _write(folder: Path, parameters: dict[str, Tensor], moments: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        save_file(parameters, partial / _MODEL)
        save_file(moments, partial / _OPTIMIZER)
        (partial / STATE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for part in (*partial.iterdir(), partial):
            to_disk(part)
        os.rename(partial, folder)
        to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
