"""Tokens: a training part, a held-out part, and batches that are a function of seed and step alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardgrad.hardware import memory
from shardgrad.layout.units import format_si
from shardgrad.settings import check_regular

BYTES = 256  # a vocabulary in which every byte is a token
_WHOLE = 2**26  # bytes of a part up to which the digest reads all of it
_SAMPLES, _SAMPLE = 64, 2**16  # of a longer part: this many samples of so many bytes


class DataError(ValueError):
    """A text or a file of tokens that cannot be read, or is too short for the configuration."""


@dataclass(frozen=True)
class Text:
    """Token ids [n] of each part: unsigned integers, in memory or mapped from a file.

    vocab: ids are below it. unit: what one of them is, a "byte" or a "token".
    """

    train: NDArray[Any]
    held_out: NDArray[Any]
    vocab: int = BYTES
    unit: str = "byte"

    @property
    def digest(self) -> str:
        """A digest that differs for two texts, or two ways of parting one. Of a part longer than 64 MiB its length and
        64 samples spread over it are read, not all of it."""
        parts = b"".join(_digest(part) for part in (self.train, self.held_out))
        return hashlib.blake2b(parts, digest_size=8).hexdigest()


def _digest(part: NDArray[Any]) -> bytes:
    state = hashlib.blake2b(f"{len(part)} {part.dtype.str}".encode())
    if part.nbytes <= _WHOLE:
        state.update(np.ascontiguousarray(part).data)
    else:
        count = _SAMPLE // part.itemsize
        for start in np.linspace(0, len(part) - count, _SAMPLES).astype(np.int64):
            state.update(np.ascontiguousarray(part[start : start + count]).data)
    return state.digest()


def read(files: Sequence[str]) -> bytes:
    """The files, joined by newlines; without any, the language reference that every CPython carries.

    Raises:
        DataError: a file cannot be read, or this Python was packaged without the reference.
    """
    if not files:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DataError("data.files: this Python carries no pydoc_data; name text files of your own") from None
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    parts: list[bytes] = []
    for file in files:
        try:
            check_regular(file)
            size, room = os.stat(file).st_size + sum(map(len, parts)), memory()
            if size > room:
                raise DataError(
                    f"data.files: with {file} the text has {format_si(size, 'B')}, more than the machine's memory of "
                    f"{format_si(room, 'B')}: encode it once, and train on data.tokens"
                )
            parts.append(Path(file).read_bytes())
        except OSError as error:
            raise DataError(f"data.files: cannot read {file}: {error.strerror}") from None
    return b"\n".join(parts)


def part(text: bytes, held_out: float, seq_len: int) -> Text:
    """Every byte a token; the last `held_out` of the text is cut off.

    Raises:
        DataError: a part has less than one sequence and the byte that follows it.
    """
    return cut(np.frombuffer(text, dtype=np.uint8), held_out, seq_len)


def cut(ids: NDArray[Any], held_out: float, seq_len: int, vocab: int = BYTES, unit: str = "byte") -> Text:
    """Cut off the last `held_out` of the ids, without reading or copying them.

    Raises:
        DataError: a part has less than one sequence and the token that follows it.
    """
    at = len(ids) - round(len(ids) * held_out)
    return check_length(Text(ids[:at], ids[at:], vocab, unit), held_out, seq_len)


def check_length(text: Text, held_out: float, seq_len: int) -> Text:
    """The text, if each part has at least one sequence and the token that follows it.

    Raises:
        DataError: it has less.
    """
    whole = len(text.train) + len(text.held_out)
    for name, some in (("training", text.train), ("held-out", text.held_out)):
        if len(some) < seq_len + 1:
            raise DataError(
                f"data: too little text: of {whole} {text.unit}s, data.held_out = {held_out} leaves {len(some)} for "
                f"the {name} part; one sequence needs model.seq_len + 1 = {seq_len + 1}"
            )
    return text


def batch(
    text: Text, seed: int, step: int, size: int, seq_len: int, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Sequences and what follows each token: two int64 tensors [size, seq_len], of which `rows` are read.

    The offsets are numbers of a Philox stream keyed by seed and step (Salmon et al. 2011): every rank of every mesh
    makes the same, and step n needs no step before it. Ranks that share a batch take rows of the one batch.
    """
    key = np.array([seed, step], dtype=np.uint64)
    last = len(text.train) - seq_len - 1
    starts = np.random.Philox(key=key).random_raw(size) % np.uint64(last + 1)
    return _sequences(text.train, starts[rows].astype(np.int64), seq_len)


def held_out(text: Text, size: int, seq_len: int, batches: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out part, in batches of at most `size` sequences, side by side; a rest too short is left out.

    batches: how many at most; None: all of it.
    """
    starts = np.arange((len(text.held_out) - 1) // seq_len) * seq_len
    for number, first in enumerate(range(0, len(starts), size)):
        if number == batches:
            return
        yield _sequences(text.held_out, starts[first : first + size], seq_len)


def on(device: torch.device, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of the host on a device, copied in the order of what that computes: the host does not wait.

    A copy from memory that is not pinned would have it wait for all that the device has been given.
    """
    if device.type == "cpu":
        return ids, targets
    return ids.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)


def _sequences(ids: NDArray[Any], starts: NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets. Of a mapped file only these are read."""
    windows = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in enumerate(starts):
        windows[row] = ids[start : start + seq_len + 1]
    whole = torch.from_numpy(windows)
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
