"""A checkpoint as it is written: by the first rank, when all ranks have the same to say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.checkpoint.contents import Contents, misfit
from shardgrad.checkpoint.seal import FORMAT, MODEL, OPTIMIZER, STATE, write_sums
from shardgrad.comm.agree import text_of_first, texts_of_all
from shardgrad.comm.mesh import MeshView, view
from shardgrad.files import NewFolder
from shardgrad.nn.dtensors import whole
from shardgrad.nn.sharding import ParamSharding


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
    written. Of persistent buffers and of numbers in the optimizer's state there is one value for all ranks: they are
    compared. Returns, on every rank, when the checkpoint is on the disk.

    Args:
        path: a folder that does not exist yet, or is empty.
        optimizer: its state goes along; its hyperparameters do not (they are the configuration's).
        state: what else to write, of JSON's types: the step, say.
        frozen: whether parameters that need no gradient are written too; `load` is told the same.

    Raises:
        OSError: on every rank, if the folder exists or cannot be written; nothing is left of it.
        ValueError: on every rank, if something would be lost: a buffer or a number differs between ranks, a part of
            the optimizer's state is not of its parameter's shape, or as of `Contents.of`. Nothing is written.
    """
    mesh_view = view(mesh)
    writes = not any(mesh_view.coordinate.values())
    contents = Contents.of(model, optimizer, frozen)
    kept = list(contents.state(optimizer))
    about: dict[str, Any] = {"format": FORMAT, "torch": torch.__version__, "mesh": mesh_view.shape, "optimizer": None}
    if contents.held is not None:
        numbers = {f"{name}/{key}": value for name, key, value in kept if not isinstance(value, Tensor)}
        about["optimizer"] = {"kind": type(optimizer).__name__, "parameters": contents.held, "numbers": numbers}
    taken = sorted(about.keys() & (state or {}))
    if taken:
        raise ValueError(f"state has {', '.join(taken)}, which the checkpoint itself writes: choose another name")
    buffers = {name: whole(one.detach()).cpu().contiguous() for name, one in contents.buffers.items()}
    _check(contents, kept, buffers, optimizer, path, mesh_view)
    text = json.dumps({**about, **(state or {})}, indent=2) + "\n"

    tensors: dict[str, Tensor] = {name: one.clone() for name, one in buffers.items()} if writes else {}
    moments: dict[str, Tensor] = {}
    for name, (parameter, sharding) in contents.parameters.items():
        full = _whole(parameter, sharding)
        if writes:
            tensors[name] = full
    for name, key, value in kept:
        if isinstance(value, Tensor):
            parameter, sharding = contents.parameters[name]
            full = _whole(value, sharding if value.shape == parameter.shape else None)
            if writes:
                moments[f"{name}/{key}"] = full
    done = "written"
    if writes:
        try:
            _write(Path(path), tensors, moments, text)
        except Exception as error:
            done = f"cannot write the checkpoint {path}: {error}"
    done = text_of_first(done, mesh_view)
    if done != "written":
        raise OSError(done)


def _check(
    contents: Contents,
    kept: Sequence[tuple[str, str, Any]],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    path: str | Path,
    mesh_view: MeshView,
) -> None:
    """Raises, on every rank, what any of them has that cannot be saved."""
    refused = [misfit(optimizer, name, key, value, contents.parameters[name][0]) for name, key, value in kept]
    held = {f"the buffer {name}": _bits(one) for name, one in buffers.items()}
    held |= dict.fromkeys((f"whether the optimizer has {name}" for name in contents.held or ()), "yes")
    for name, key, value in kept:
        scalar = isinstance(value, Tensor) and not value.dim()
        said = _bits(value) if scalar else type(value).__name__ if isinstance(value, Tensor) else repr(value)
        held[f"the optimizer's {key!r} of {name}"] = said
    mine = hashlib.blake2b(json.dumps(held).encode(), digest_size=16).hexdigest()
    rows = [json.loads(one) for one in texts_of_all(json.dumps([mine, [one for one in refused if one]]), mesh_view)]
    wrong = [line for _, lines in rows for line in lines]
    if not wrong and len({digest for digest, _ in rows}) > 1:
        wrong = list(_differences([json.loads(one) for one in texts_of_all(json.dumps(held), mesh_view)]))
    if wrong:
        raise ValueError("\n  ".join([f"cannot save {path}:", *dict.fromkeys(wrong)]))


def _bits(value: Tensor) -> str:
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data, digest_size=16).hexdigest()


def _differences(ranks: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for name in dict.fromkeys(name for one in ranks for name in one):
        having: dict[str | None, list[int]] = {}
        for rank, one in enumerate(ranks):
            having.setdefault(one.get(name), []).append(rank)
        if len(having) > 1:
            groups = "; ".join(f"ranks {', '.join(map(str, some))}" for some in having.values())
            yield (
                f"{name} differs between ranks of the mesh (alike are {groups}), and a checkpoint holds one value for "
                "all: make it the same on every rank, by a broadcast or as SyncBatchNorm does, or not persistent"
            )


def _whole(local: Tensor, sharding: ParamSharding | None) -> Tensor:
    """The global tensor, on the CPU and of its own memory."""
    part = whole(local.detach())
    if sharding is None or not any(leaf.spec.axes for leaf in sharding.leaves):
        return part.cpu().clone(memory_format=torch.contiguous_format)
    return sharding.unshard(part).cpu()


def _write(path: Path, tensors: dict[str, Tensor], moments: dict[str, Tensor], state: str) -> None:
    folder = NewFolder(path)
    try:
        folder.begin()
        save_file(tensors, folder.partial / MODEL)
        save_file(moments, folder.partial / OPTIMIZER)
        (folder.partial / STATE).write_text(state, encoding="utf-8")
        write_sums(folder.partial)
        folder.finish()
    finally:
        folder.discard()
