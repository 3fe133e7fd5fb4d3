"""Safetensors files: opened so that parts of tensors can be read, and written one tensor after the other.

A file is eight bytes with the length of its header, the header in JSON, and the bytes of each tensor, without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardgrad.models.lazy_tensor import At, LazyTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def opened_file(path: Path) -> Iterator[dict[str, LazyTensor]]:
    """All tensors of a file by name, to read from inside the block.

    Raises:
        OSError: it is missing or cut short.
    """
    with ExitStack() as stack:
        file = _open(path, stack)
        yield {name: _lazy(file, name, path) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, LazyTensor]]:
    """All tensors of a folder by name, to read from inside the block.

    Raises:
        OSError: the folder has no safetensors files, or one is missing, cut short, or not what the index says.
    """
    with ExitStack() as stack:
        yield dict(_tensors(folder, stack))


def _tensors(folder: Path, stack: ExitStack) -> Iterator[tuple[str, LazyTensor]]:
    if not folder.is_dir():
        raise OSError(
            f"{folder} is not a folder here: download the model first, with "
            "huggingface_hub.snapshot_download('owner/name'), which returns the folder"
        )
    if (folder / WEIGHTS).exists():
        path = folder / WEIGHTS
        file = _open(path, stack)
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, _lazy(file, name, path)
        return
    if not (folder / INDEX).exists():
        raise OSError(f"{folder} has neither {WEIGHTS} nor {INDEX}{_instead(folder)}")
    for filename, names in _index(folder / INDEX).items():
        path = folder / filename
        file = _open(path, stack)
        absent = sorted(set(names) - set(file.keys()))
        if absent:
            raise OSError(
                f"{path} lacks {', '.join(absent)}, which {INDEX} says it holds: the files are not of one save. "
                "Download or save the folder again"
            )
        for name in names:
            yield name, _lazy(file, name, path)


def _index(path: Path) -> dict[str, list[str]]:
    """The names in each file of an index."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
        files: dict[str, list[str]] = {}
        for name, filename in places:
            if Path(filename).name != filename:
                raise ValueError(f"{filename!r} is not a file's name")
            files.setdefault(filename, []).append(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise OSError(
            f"{path} is not an index of safetensors files ({error}): download or save the folder again"
        ) from None
    return files


def _instead(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("adapter_model") for name in names):
        return ": it holds a peft adapter. Load the base model's folder, then the adapter with peft"
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f", but {', '.join(pickled)}, whose pickles could run any code, and which cannot be read in parts. "
            "Convert once, in one process: AutoModel….from_pretrained(folder).save_pretrained(another)"
        )
    return f": it has {', '.join(names) or 'nothing'}"


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be read ({error}): missing or cut short? Download or save it again") from None


def _lazy(file: Any, name: str, path: Path) -> LazyTensor:
    source = file.get_slice(name)

    def read(at: At) -> Tensor:
        try:
            return source[at]
        except (OSError, SafetensorError) as error:
            raise OSError(f"{name} cannot be read from {path} ({error}): download or save it again") from None

    return LazyTensor(tuple(source.get_shape()), read)


class WeightsWriter:
    """One file being written: room for all of its tensors, filled in any order.

    Args:
        tensors: name, dtype and shape of each.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        # Wide elements first, so that all are aligned to their size.
        for name, dtype, shape in sorted(tensors, key=lambda one: -one[1].itemsize):
            if dtype not in _DTYPES:
                raise TypeError(f"{name} is of {dtype}, which safetensors files do not hold: convert it first")
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._places[name] = begin, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 (see close)
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._first + end)
        except OSError:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or a view of one, of which a row is made contiguous at a time if need be."""
        begin, end = self._places[name]
        if tensor.numel() * tensor.element_size() != end - begin:
            raise ValueError(f"{name} has {tensor.numel()} elements, not those of the header")
        self._file.seek(self._first + begin)
        rows = [tensor] if tensor.is_contiguous() or not tensor.dim() else tensor.unbind(0)
        for row in rows:
            self._file.write(row.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)

    def to_disk(self) -> None:
        """Return when all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def split_sizes(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in files of at most so many bytes, in order; what is larger by itself has its own file."""
    files: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if files[-1] and held + size > most:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files
