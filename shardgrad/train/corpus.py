"""What a run trains on: bytes of text, a file of tokens, or text that the first rank encodes once for all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardgrad.files import refuse_link, replace_text, replacing
from shardgrad.train import data, tokenizer
from shardgrad.train.config import Data
from shardgrad.train.data import DataError, Text
from shardgrad.train.tokenizer import Tokenizer, Vocabulary
from shardgrad.train.tokens import check_ids, open_tokens

TOKENIZER, TOKENS = "tokenizer.json", "tokens"
_TRAIN, _HELD_OUT, _ABOUT = "train.npy", "held_out.npy", "about.json"


@dataclass(frozen=True)
class Corpus:
    """Tokens, and what turns them into text; a file of tokens may come without."""

    text: Text
    tokenizer: Tokenizer | None


def is_encoded(config: Data) -> bool:
    """Whether the first rank encodes the text into the run folder, where every rank maps it."""
    return config.tokens is None and config.tokenizer not in (None, "bytes")


def open_corpus(config: Data, seq_len: int, folder: Path | None = None) -> Corpus:
    """What is on the disk, on any rank. folder: of the run, if the text `is_encoded`.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    if is_encoded(config):
        assert folder is not None
        vocabulary = tokenizer.load(folder / TOKENIZER)
        train, held_out = (open_tokens(folder / TOKENS / name, "uint16") for name in (_TRAIN, _HELD_OUT))
        text = Text(train, held_out, vocabulary.vocab, "token")
        return Corpus(data.check_length(text, config.held_out, seq_len), vocabulary)
    if config.tokens is not None:
        assert config.vocab is not None
        ids = open_tokens(config.tokens, config.tokens_dtype)
        text = data.cut(ids, config.held_out, seq_len, config.vocab, "token")
        return Corpus(text, _of_tokens(config, config.vocab))
    return Corpus(data.part(data.read(config.files), config.held_out, seq_len), tokenizer.Bytes())


def _of_tokens(config: Data, vocab: int) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    if config.tokenizer == "bytes":
        return tokenizer.Bytes()
    found = tokenizer.load(config.tokenizer)
    if found.vocab > vocab:
        raise DataError(f"data.tokenizer: {config.tokenizer} has {found.vocab} tokens, more than data.vocab = {vocab}")
    return found


@dataclass(frozen=True)
class Encoded:
    """A text as the first rank has encoded it, not yet written; `ids` is None if the folder holds it already."""

    vocabulary: Vocabulary
    ids: Text | None
    about: dict[str, object]


def encode(config: Data, seq_len: int, folder: Path | None, earlier: Path | None) -> Encoded:
    """Read, and encode unless it is done; the vocabulary is the one of an earlier run if there is one.

    folder: of the run, if it exists. earlier: the vocabulary's file of the run that is gone on with.

    Raises:
        DataError: a file cannot be read, or the text is too short.
    """
    raw = data.read(config.files)
    at = len(raw) - round(len(raw) * config.held_out)
    while 0 < at < len(raw) and raw[at] & 0xC0 == 0x80:  # inside a character of UTF-8
        at -= 1
    parts = [some.decode(errors="replace") for some in (raw[:at], raw[at:])]
    if earlier is not None:
        vocabulary = tokenizer.load(earlier)
    elif config.tokenizer == "bpe":
        assert config.vocab is not None
        vocabulary = tokenizer.train(parts[0], config.vocab)
    else:
        assert config.tokenizer is not None
        vocabulary = tokenizer.load(config.tokenizer)
    about = {
        "text": hashlib.blake2b(raw, digest_size=16).hexdigest(),
        "vocabulary": hashlib.blake2b(vocabulary.json.encode(), digest_size=16).hexdigest(),
        "held_out": config.held_out,
    }
    if folder is not None and _about(folder) == about:
        return Encoded(vocabulary, None, about)
    train, held_out = (vocabulary.encode_all(some) for some in parts)
    text = Text(train, held_out, vocabulary.vocab, "token")
    return Encoded(vocabulary, data.check_length(text, config.held_out, seq_len), about)


def write(encoded: Encoded, folder: Path) -> None:
    """Into the run folder; what says that it is whole, last."""
    replace_text(folder / TOKENIZER, encoded.vocabulary.json)
    if encoded.ids is None:
        return
    at = folder / TOKENS
    refuse_link(at)
    at.mkdir(exist_ok=True)
    (at / _ABOUT).unlink(missing_ok=True)
    for name, ids in ((_TRAIN, encoded.ids.train), (_HELD_OUT, encoded.ids.held_out)):
        with replacing(at / name) as file:
            np.save(file, ids)
    replace_text(at / _ABOUT, json.dumps(encoded.about) + "\n")


def _about(folder: Path) -> object:
    try:
        return json.loads((folder / TOKENS / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_tokens(config: Data) -> None:
    """Look at every id of a file of tokens; on one rank, before the ranks meet.

    Raises:
        DataError: the file cannot be read, or an id is not below data.vocab.
    """
    if config.tokens is not None:
        assert config.vocab is not None
        check_ids(open_tokens(config.tokens, config.tokens_dtype), config.vocab, config.tokens)
