"""From text to token ids and back: bytes as they are, or a vocabulary of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardgrad.errors import install
from shardgrad.settings import check_regular
from shardgrad.train.data import BYTES, DataError

_CHUNK = 2**16  # characters, about, that are encoded together; ends with a line where lines are shorter


class Tokenizer(Protocol):
    """What turns text into ids below `vocab`, and ids into text."""

    @property
    def vocab(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Bytes:
    """Every byte of UTF-8 is a token."""

    vocab = BYTES

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Vocabulary:
    """A tokenizer of the `tokenizers` library, which is one JSON file."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def vocab(self) -> int:
        return int(self._inner.get_vocab_size())

    @property
    def json(self) -> str:
        return str(self._inner.to_str())

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def encode_all(self, text: str) -> NDArray[Any]:
        """The ids [n] of a long text, in the smallest of uint16 and uint32 that holds the vocabulary."""
        dtype = np.uint16 if self.vocab <= 2**16 else np.uint32
        parts = [
            np.asarray(some.ids, dtype)
            for some in self._inner.encode_batch(list(_chunks(text)), add_special_tokens=False)
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype)


def load(path: str | Path) -> Vocabulary:
    """A tokenizer's JSON file.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        check_regular(path)
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.tokenizer: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.tokenizer: {path} is no text: {error}") from None
    try:
        return Vocabulary(_library().Tokenizer.from_str(text))
    except Exception as error:  # the library raises nothing more exact
        raise DataError(f"data.tokenizer: {path} is no file of the tokenizers library: {error}") from None


def train(text: str, vocab: int) -> Vocabulary:
    """A byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2) of at most `vocab` tokens.

    A short text has fewer pairs to join, and leaves a smaller vocabulary.
    """
    library = _library()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    inner.train_from_iterator(_chunks(text), trainer)
    return Vocabulary(inner)


def bytes_json() -> str:
    """The tokenizers library's file of `Bytes`: the same ids."""
    library = _library()
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    inner = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = library.decoders.ByteLevel()
    return str(inner.to_str())


def _byte_letters() -> Iterator[str]:
    """The letter that GPT-2 writes for each byte: itself where it can be seen, else the next one after all bytes."""
    hidden = 0
    for byte in range(BYTES):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            yield chr(byte)
        else:
            yield chr(BYTES + hidden)
            hidden += 1


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"data.tokenizer needs the tokenizers library; it is installed {install('train')}") from None
    return tokenizers


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK, start + 2 * _CHUNK) + 1 or min(start + 2 * _CHUNK, len(text))
        yield text[start:end]
        start = end
