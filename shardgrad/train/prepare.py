"""What the first rank settles before the ranks meet: where the run lies, from which checkpoint it begins, on what text.

All that can be wrong with them is found here, so no rank waits in a process group for one that has given up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shardgrad.train import corpus, folder, foreign, resume
from shardgrad.train.config import Config, TransformersModel
from shardgrad.train.data import DataError


@dataclass(frozen=True)
class Start:
    """folder: of the run. checkpoint: what it begins with, or None. notes: what its user should know. lock: a handle
    that keeps other processes out of the folder until it is closed."""

    folder: Path
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    lock: int | None = None

    def to_text(self) -> str:
        """For the other ranks."""
        return json.dumps([str(self.folder), self.checkpoint and str(self.checkpoint)])

    @classmethod
    def from_text(cls, text: str) -> Start:
        where, start = json.loads(text)
        return cls(Path(where), start and Path(start))


def prepare(config: Config) -> Start:
    """On the first rank: find or make the run folder, and write into it what all ranks will read.

    The folder is locked until this process ends, and made only when nothing else was wrong.

    Raises:
        ConfigError, DataError: the run cannot begin; says why.
    """
    settings = config.run
    going_on = folder.find(settings.dir, settings.resume)
    if going_on is not None:
        lock = folder.lock(going_on)
        folder.sweep(going_on)
    start = resume.start_from(going_on, settings.resume)
    notes = resume.check_config(config, start) if start is not None else []
    if isinstance(config.model, TransformersModel):
        foreign.check(config.model)
    corpus.check_tokens(config.data)
    encoded = None
    if corpus.is_encoded(config.data):
        encoded = corpus.encode(config.data, config.model.seq_len, going_on, _vocabulary(going_on, start))
        vocab = encoded.vocabulary.vocab
    else:
        vocab = corpus.open_corpus(config.data, config.model.seq_len).text.vocab
    foreign.check_vocab(config, vocab)
    where = going_on
    if where is None:
        where = folder.create(settings.dir, exactly=settings.resume == "auto")
        lock = folder.lock(where)
    else:
        folder.adopt(where)
    folder.replace_text(where / folder.CONFIG, config.to_yaml())
    if encoded is not None:
        corpus.write(encoded, where)
    return Start(where, start, tuple(notes), lock)


def _vocabulary(going_on: Path | None, start: Path | None) -> Path | None:
    """The tokenizer of the run that is gone on with: its model knows no other.

    Raises:
        DataError: a checkpoint was taken out of the run folder that has it.
    """
    places = [] if going_on is None else [going_on]
    places += [] if start is None else [start.parent.parent]
    for place in places:
        if (place / corpus.TOKENIZER).is_file():
            return place / corpus.TOKENIZER
    if start is not None:
        raise DataError(
            f"data.tokenizer: the checkpoint {start} was trained with a tokenizer, and {places[-1]} has no "
            f"{corpus.TOKENIZER}: put it there"
        )
    return None
