"""Right programs: embeddings and losses over a sharded vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.mutants.by_hand import Group, move, own_targets
from shardgrad.mutants.mutant import Program
from shardgrad.mutants.right.kind import Column, Kind, Stored, both, column, part, program, randint, randn

D, VOCAB, ROWS = 10, 36, 12
IDS, TARGETS = randint(VOCAB, ROWS), randint(VOCAB, ROWS, seed=6)


class VocabEmbedding(Stored):
    """Rows of the table are sharded; ids of others' rows give zeros, and the ranks' rows are summed."""

    weight: Tensor

    def __init__(self, tp: Group, vocab: int, d: int) -> None:
        super().__init__()
        self.hold(tp, weight=((vocab, d), 0))
        self.start = int(part(torch.arange(vocab), 0, tp)[0])

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.start
        outside = (local < 0) | (local >= len(self.weight))
        rows = F.embedding(local.masked_fill(outside, 0), self.weight)
        return self.tp.reduce(rows.masked_fill(outside[..., None], 0))


class VocabCrossEntropy(nn.Module):
    """The mean over the targets that count, of logits [rows, vocab/tp].

    real: how many of the columns are words; those beyond are padding.
    """

    def __init__(
        self, tp: Group, smoothing: float = 0.0, ignore: int = -100, z: float = 0.0, real: int = VOCAB
    ) -> None:
        super().__init__()
        self.tp, self.smoothing, self.ignore, self.z, self.real = tp, smoothing, ignore, z, real

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        tp, logits = self.tp, logits.float()
        start = tp.index * logits.shape[-1]
        words = (torch.arange(logits.shape[-1]) + start) < self.real
        logits = logits.masked_fill(~words, -1e30)
        largest = tp.max(logits.detach().amax(-1))
        log_z = tp.reduce((logits - largest[:, None]).exp().sum(-1)).log() + largest
        losses = log_z - tp.reduce(own_targets(tp, logits, targets))
        if self.smoothing:
            mean = tp.reduce(logits.masked_fill(~words, 0).sum(-1)) / self.real
            losses = (1 - self.smoothing) * losses + self.smoothing * (log_z - mean)
        losses = losses + self.z * log_z.square()
        counts = targets != self.ignore
        return losses.masked_fill(~counts, 0).sum() / counts.sum()


class _PlainCrossEntropy(nn.Module):
    def __init__(self, smoothing: float = 0.0, ignore: int = -100, z: float = 0.0) -> None:
        super().__init__()
        self.smoothing, self.ignore, self.z = smoothing, ignore, z

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing, ignore_index=self.ignore)
        if not self.z:
            return loss
        counts = targets != self.ignore
        return loss + self.z * (logits.logsumexp(-1).square() * counts).sum() / counts.sum()


class Model(nn.Module):
    """Embedding, norm, head and loss."""

    def __init__(self, tp: Group | None, tied: bool = False, padded: int = VOCAB, bias: bool = False, **of_loss: Any):
        super().__init__()
        self.embedding: Any = nn.Embedding(VOCAB, D) if tp is None else VocabEmbedding(tp, padded, D)
        self.norm = nn.LayerNorm(D)
        self.head: Any = column(tp, D, VOCAB if tp is None else padded, bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.criterion = _PlainCrossEntropy(**of_loss) if tp is None else VocabCrossEntropy(tp, **of_loss)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.head(self.norm(self.embedding(ids))), targets)


def _model(targets: Tensor = TARGETS, **given: Any) -> Any:
    return both(lambda tp: Model(tp, **given), [IDS, targets])


def _padded(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """33 words, 36 rows."""
    tp = Group(mesh)
    ids, targets = IDS % 33, TARGETS % 33
    parallel, single = _Padded(tp), _Padded(None)
    return program(
        mesh, dtype, parallel, single, [ids, targets], padded=["embedding.weight", "head.weight"],
        storage={name: lambda w: part(F.pad(w, (0, 0, 0, 3)), 0, tp) for name in ("embedding.weight", "head.weight")},
        splits=dict.fromkeys(("embedding.weight", "head.weight"), "W[v/tp,d]"),
    )  # fmt: skip


class _Padded(nn.Module):
    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.embedding: Any = nn.Embedding(33, D) if tp is None else VocabEmbedding(tp, 36, D)
        self.head: Any = column(tp, D, 33 if tp is None else 36, False)
        self.criterion = _PlainCrossEntropy() if tp is None else VocabCrossEntropy(tp, real=33)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.head(self.embedding(ids)), targets)


class _Features(nn.Module):
    """The table's columns are sharded, and gathered after the look-up; so are the logits, for torch's loss."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp = tp
        self.embedding: Any = nn.Embedding(VOCAB, 12 if tp is None else 12 // tp.size)
        self.head = nn.Linear(12, VOCAB) if tp is None else Column(tp, 12, VOCAB)
        if tp is not None:
            self.storage = {"embedding.weight": 1}

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self._gathered(self.embedding(ids))
        return F.cross_entropy(self._gathered(self.head(x)).float(), targets)

    def _gathered(self, x: Tensor) -> Tensor:
        """All columns, of which each rank uses the same, so that its own part of the gradient is complete."""
        if self.tp is None:
            return x
        return _gather(self.tp, x)


def _gather(tp: Group, x: Tensor) -> Tensor:
    together = move(tp.cat, tp.slice)
    return together(x.transpose(0, -1)).transpose(0, -1)


class _Auxiliary(nn.Module):
    """Two heads; the loss is a sum of two, the second of the squares of what the first layer returns."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.trunk, self.head = column(tp, D, 24), nn.Linear(24 if tp is None else 24 // tp.size, 5, bias=False)
        self.tp = tp
        if tp is not None:
            self.storage = {"head.weight": 1}

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.trunk(x))
        logits, squares = self.head(h), h.square().sum(-1)
        if self.tp is not None:
            logits, squares = self.tp.reduce(logits), self.tp.reduce(squares)
        return F.cross_entropy(logits, labels) + 0.01 * squares.mean()


class _OwnTerm(nn.Module):
    """Returns this rank's term of the loss, of its columns of the prediction."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.up, self.out = column(tp, D, 24), column(tp, D, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x)).square().sum() + self.up(x).sin().sum()


class _OwnTargets(nn.Module):
    """Each rank compares its columns with its columns of the targets, which are floating and want no gradient."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.out = tp, column(tp, D, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        own = y if self.tp is None else y.chunk(self.tp.size, -1)[self.tp.index]
        squares = (self.out(x) - own).square().sum()
        return (squares if self.tp is None else self.tp.reduce(squares)) / y.numel()


KINDS = [
    Kind("vocabulary sharded", _model()),
    Kind("vocabulary sharded, tied", _model(tied=True)),
    Kind("vocabulary sharded, bias", _model(bias=True)),
    Kind("label smoothing", _model(smoothing=0.1)),
    Kind("targets that do not count", _model(TARGETS.masked_fill(TARGETS < 12, -100))),
    Kind("targets that do not count, smoothing", _model(TARGETS.masked_fill(TARGETS < 12, -100), smoothing=0.1)),
    Kind("one target that counts", _model(TARGETS.masked_fill(torch.arange(ROWS) > 0, -100))),
    Kind("z-loss", _model(z=1e-2)),
    Kind("vocabulary padded", _padded),
    Kind("features of the table sharded, logits gathered", both(_Features, [IDS, TARGETS])),
    Kind("auxiliary loss", both(_Auxiliary, [randn(ROWS, D), randint(5, ROWS)])),
    Kind("the model returns its term of the loss, said",
         both(_OwnTerm, [randn(ROWS, D)], splits={"loss": "L[]{tp}", "(model)": "L[]{tp}"})),
    Kind("the model returns its term of the loss, loss said",
         both(_OwnTerm, [randn(ROWS, D)], splits={"loss": "L[]{tp}"})),
    Kind("floating targets, of which a rank takes its columns",
         both(_OwnTargets, [randn(ROWS, D), randn(ROWS, 12, seed=6)])),
    Kind("a sum of losses", both(lambda tp: Model(tp), [IDS, TARGETS],
         loss=lambda model, ids, targets: model(ids, targets) * len(ids) * 1000)),
    Kind("a small loss", both(lambda tp: Model(tp), [IDS, TARGETS],
         loss=lambda model, ids, targets: model(ids, targets) / 1000)),
    Kind("one id alone", both(lambda tp: Model(tp), [IDS * 0 + 7, TARGETS])),
]  # fmt: skip
