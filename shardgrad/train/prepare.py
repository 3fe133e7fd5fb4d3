"""What the first rank settles before the ranks meet: where the run lies, from which checkpoint it begins, on what text.

All that can be wrong with them is found here, so no rank waits in a process group for one that has given up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardgrad.files import replace_text
from shardgrad.train import corpus, folder, foreign, resume
from shardgrad.train.config import Config, TransformersModel
from shardgrad.train.data import DataError
from shardgrad.train.resume import Beginning

_WRITTEN = (
    *(folder.METRICS, folder.CONFIG, folder.RUN, folder.SAMPLE, folder.PAGE),
    *(folder.CHECKPOINTS, folder.TENSORBOARD, corpus.TOKENIZER, corpus.TOKENS, folder.MODEL),
)


@dataclass(frozen=True)
class Start:
    """folder: of the run. checkpoint: what it begins with, or None. seal: its digest, as the first rank has verified
    it. notes, passed_over: what its user should know, of the configuration and of damaged checkpoints. lock: a handle
    that keeps other processes out of the folder until it is closed."""

    folder: Path
    checkpoint: Path | None = None
    seal: str | None = None
    notes: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    lock: int | None = None

    def to_text(self) -> str:
        """For the other ranks."""
        return json.dumps([str(self.folder), self.checkpoint and str(self.checkpoint), self.seal])

    @classmethod
    def from_text(cls, text: str) -> Start:
        where, start, seal = json.loads(text)
        return cls(Path(where), start and Path(start), seal)


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
        folder.refuse_links(going_on, _WRITTEN)
        folder.sweep(going_on)
    begun = resume.start_from(going_on, settings.resume)
    start = None if begun is None else begun.path
    notes = resume.check_config(config, begun) if begun is not None else []
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
    replace_text(where / folder.CONFIG, config.to_yaml())
    if encoded is not None:
        corpus.write(encoded, where)
    if begun is None:
        return Start(where, lock=lock)
    return Start(where, start, begun.verified.seal, tuple(notes), tuple(_passed_over(begun, going_on)), lock)


def _passed_over(begun: Beginning, going_on: Path | None) -> Iterator[str]:
    """What is told of damaged checkpoints. Those of the run that goes on are renamed: it saves their steps again."""
    for path, problem in begun.passed_over:
        kept = (
            f"kept as {folder.set_aside(path).name}" if going_on is not None and path.is_relative_to(going_on) else ""
        )
        yield f"{problem} ({kept or 'left as it is'}; nothing was deleted)"


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
