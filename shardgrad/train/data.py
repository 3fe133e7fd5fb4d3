"""Text as bytes: a training part, a held-out part, and batches that are a function of seed and step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCAB = 256  # every byte is a token


class DataError(ValueError):
    """A text that cannot be read, or is too short for the configuration."""


@dataclass(frozen=True)
class Text:
    """Bytes [n] of each part, as uint8."""

    train: Tensor
    held_out: Tensor

    @property
    def digest(self) -> str:
        """Tells two texts, or two ways of parting one, from each other."""
        parts = (self.train.numpy().tobytes(), self.held_out.numpy().tobytes())
        return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=8).hexdigest()


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
    parts = []
    for file in files:
        try:
            parts.append(Path(file).read_bytes())
        except OSError as error:
            raise DataError(f"data.files: cannot read {file}: {error.strerror}") from None
    return b"\n".join(parts)


def part(text: bytes, held_out: float, seq_len: int) -> Text:
    """Cut off the last `held_out` of the text.

    Raises:
        DataError: a part has less than one sequence and the byte that follows it.
    """
    cut = len(text) - round(len(text) * held_out)
    for name, size in (("training", cut), ("held-out", len(text) - cut)):
        if size < seq_len + 1:
            raise DataError(
                f"data: too little text: of {len(text)} bytes, data.held_out = {held_out} leaves {size} for the {name} "
                f"part; one sequence needs model.seq_len + 1 = {seq_len + 1}"
            )
    everything = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    return Text(everything[:cut], everything[cut:])


def batch(text: Text, seed: int, step: int, size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Sequences and what follows each byte: two int64 tensors [size, seq_len].

    The offsets are numbers of a Philox stream keyed by seed and step (Salmon et al. 2011): every rank of every mesh
    makes the same, and step n needs no step before it.
    """
    key = np.array([seed, step], dtype=np.uint64)
    last = len(text.train) - seq_len - 1
    starts = np.random.Philox(key=key).random_raw(size) % np.uint64(last + 1)
    return _sequences(text.train, torch.from_numpy(starts.astype(np.int64)), seq_len)


def held_out(text: Text, size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out part once, in batches of at most `size` sequences, side by side; a rest too short is left out."""
    starts = torch.arange((len(text.held_out) - 1) // seq_len) * seq_len
    for some in starts.split(size):
        yield _sequences(text.held_out, some, seq_len)


def _sequences(data: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = data[starts.unsqueeze(1) + torch.arange(seq_len + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
