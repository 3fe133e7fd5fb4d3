"""A folder of Hugging Face's format that plain transformers loads, written by one rank, one tensor at a time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import text_of_first
from shardgrad.comm.mesh import MeshView, mesh_of_all, view
from shardgrad.files import NewFolder
from shardgrad.models.adapter_files import FILE, has_adapters, names_in_files, write_config
from shardgrad.models.names import CheckpointNames, is_pretrained, written_names
from shardgrad.models.weights_file import INDEX, WEIGHTS, WeightsWriter, split_sizes
from shardgrad.nn.dtensors import whole
from shardgrad.nn.shardings import named_shardings

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
OfFile = Callable[[str, Tensor], dict[str, Tensor]]
Piece = tuple[str, torch.dtype, tuple[int, ...]]


@told
@torch.no_grad()
def save_pretrained(
    model: nn.Module, folder: str | Path, *, max_shard_size: int | str = "50GB", mesh: DeviceMesh | None = None
) -> None:
    """Write a model, on any mesh or none, as `from_pretrained` of plain transformers loads it, to the same bits.

    Called on every rank; the first writes config.json, generation_config.json and the tensors, by the names and in the
    arrangement of transformers' files. Tensors are gathered one at a time and written at once: beside its own
    parameters a rank holds one whole tensor, and while that is gathered up to two more of its size. The folder appears,
    under its name, when all of it is on the disk. Of a model that is not transformers', only the tensors are written,
    by the model's names. Of a model that peft has wrapped, its adapter alone is written, as peft reads it.

    Args:
        folder: does not exist yet, or is empty (a tokenizer is saved there afterwards).
        max_shard_size: the most bytes in one file, or a text such as "5GB"; a larger tensor has a file to itself.
        mesh: the ranks that call, if those are not all: a mesh that contains the model's.

    Raises:
        OSError: on every rank, if the folder exists or cannot be written; nothing is left of it.
        ValueError: a parameter is on the meta device, or the model is quantized, or its adapters are not of one kind.
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    folder, most = Path(folder).absolute(), _bytes(max_shard_size)
    if has_adapters(model):
        most = 2**62  # peft reads one file
    _check(model)
    shardings = {id(one): sharding for _, one, sharding in named_shardings(model)}
    written = [(name, tensor) for name, tensor, _ in written_names(model)]
    of_file: OfFile = CheckpointNames(model).of_file
    if has_adapters(model):
        peft_names = names_in_files(model)
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        written = [(name, parameters[name]) for name in peft_names]
        of_file = lambda name, tensor: {peft_names[name]: tensor}  # noqa: E731
    held = [(name, tensor, shardings.get(id(tensor))) for name, tensor in written]
    plan: dict[str, list[str]] = {}
    pieces: dict[str, Piece] = {}
    for name, tensor, sharding in held:
        shape = tuple(tensor.shape) if sharding is None else sharding.global_shape
        for piece, part in of_file(name, torch.empty(shape, dtype=tensor.dtype, device="meta")).items():
            if piece in pieces:
                raise ValueError(f"{piece} would be written twice: rename {name}, or what else has that name in files")
            plan.setdefault(name, []).append(piece)
            pieces[piece] = piece, part.dtype, tuple(part.shape)

    ranks = _ranks(model, mesh, [sharding.mesh for sharding in shardings.values() if sharding is not None])
    single = FILE if has_adapters(model) else WEIGHTS
    output = _Output(folder, pieces, most, single) if ranks is None or not any(ranks.coordinate.values()) else None
    with ExitStack() as stack:
        if output is not None:
            stack.callback(output.discard)
            output.attempt(lambda: output.begin(model))
        _raise_alike(output, ranks)
        for name, tensor, sharding in held:
            part = whole(tensor.detach())  # of what FSDP2 shards beside
            full = part if sharding is None else sharding.unshard(part)
            if output is not None:
                parts = of_file(name, full)
                output.attempt(partial(output.write, parts))
                del parts
            del part, full
        if output is not None:
            output.attempt(output.finish)
        _raise_alike(output, ranks)


class _Output:
    """The folder as the first rank writes it: under another name until it is whole; after an error, nothing more."""

    def __init__(self, folder: Path, pieces: dict[str, Piece], most: int, single: str) -> None:
        self.error = ""
        self._name, self._pieces = folder, pieces
        self._folder = NewFolder(folder)
        sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, dtype, shape in pieces.values()}
        files = split_sizes(sizes, most)
        self._files = {
            single if len(files) == 1 else f"model-{at:05d}-of-{len(files):05d}.safetensors": held
            for at, held in enumerate(files, 1)
        }
        self._file_of = {name: filename for filename, held in self._files.items() for name in held}
        self._writers: dict[str, WeightsWriter] = {}

    def attempt(self, step: Callable[[], None]) -> None:
        """Do a step, unless one has failed; keep what went wrong, since the other ranks must hear of it."""
        if self.error:
            return
        try:
            step()
        except Exception as error:
            self.error = f"cannot write the model to {self._name}: {error}"

    def begin(self, model: nn.Module) -> None:
        """Make the folder, the configs, and room for the tensors."""
        self._folder.begin()
        if has_adapters(model):
            write_config(model, self._folder.partial)
        elif is_pretrained(model):
            _write_configs(model, self._folder.partial)
        for filename, held in self._files.items():
            self._writers[filename] = WeightsWriter(
                self._folder.partial / filename, [self._pieces[name] for name in held]
            )

    def write(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self._writers[self._file_of[name]].write(name, part)

    def finish(self) -> None:
        """Bring everything to the disk, and give the folder its name."""
        for writer in self._writers.values():
            writer.to_disk()
        if len(self._files) > 1:
            sizes = [(torch.Size(shape).numel(), dtype.itemsize) for _, dtype, shape in self._pieces.values()]
            about = {"total_parameters": sum(n for n, _ in sizes), "total_size": sum(n * size for n, size in sizes)}
            text = json.dumps({"metadata": about, "weight_map": self._file_of}, indent=2, sort_keys=True) + "\n"
            (self._folder.partial / INDEX).write_text(text, encoding="utf-8")
        self._folder.finish()

    def discard(self) -> None:
        """Close the files, and remove what has not got its name."""
        for writer in self._writers.values():
            writer.close()
        self._folder.discard()


def _raise_alike(output: _Output | None, ranks: MeshView | None) -> None:
    """Raise, on every rank, the error of the one that writes."""
    error = output.error if output is not None else ""
    if output is not None and error:
        output.discard()  # before the others hear of it
    error = error if ranks is None else text_of_first(error, ranks)
    if error:
        raise OSError(error)


def _ranks(model: nn.Module, mesh: DeviceMesh | None, used: list[DeviceMesh]) -> MeshView | None:
    """Those who call, of which the first writes."""
    if mesh is None:
        kind = used[0].device_type if used else next(model.parameters(), torch.empty(0)).device.type
        mesh = mesh_of_all(kind)
    return None if mesh is None else view(mesh)


def _check(model: nn.Module) -> None:
    if getattr(model, "peft_config", None) and not has_adapters(model):
        raise ValueError(f"{type(model).__name__} has peft adapters: pass the model that get_peft_model gave back")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized: model.dequantize() first")
    meta = [name for name, tensor, _ in written_names(model) if tensor.is_meta]
    if meta:
        raise ValueError(f"{', '.join(meta)} on the meta device: sg.load_pretrained or to_empty(device=…) give values")


def _write_configs(model: Any, folder: Path) -> None:
    """The configs as transformers' save_pretrained writes them; the model's own are left as they are."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", size, re.IGNORECASE)
    if read is None:
        raise ValueError(f'max_shard_size is a number of bytes or a text such as "5GB" (10**9) or "5GiB", not {size!r}')
    return int(float(read[1]) * _UNITS[read[2].upper()])
