"""Bugs of released libraries (docs/released-libraries.md), planted into an embedding and a loss of shardgrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import view
from shardgrad.mutants.mutant import Mutant, Program, on_gradient
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.linear import ColumnParallelLinear
from shardgrad.nn.loss import vocab_parallel_cross_entropy
from shardgrad.nn.state import load_state_dict

WORDS = "shardgrad, words"
VOCAB, D, ROWS, SMOOTHING = 24, 10, 16, 0.1  # the vocabulary is even over 2, 3 and 4 ranks


class _Words(nn.Module):
    """Embedding, head and loss with label smoothing, on a mesh or on one device."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh
        self.words: Any = nn.Embedding(VOCAB, D) if mesh is None else VocabParallelEmbedding(VOCAB, D, mesh=mesh)
        self.head: Any = (
            nn.Linear(D, VOCAB, bias=False) if mesh is None else ColumnParallelLinear(D, VOCAB, False, mesh=mesh)
        )
        self.criterion: Callable[[Tensor, Tensor], Tensor] = self._loss

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.mesh is None:
            return F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
        return vocab_parallel_cross_entropy(
            logits, targets, vocab_size=VOCAB, mesh=self.mesh, label_smoothing=SMOOTHING
        )  # fmt: skip

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.head(self.words(ids)), targets)


def words(mesh: DeviceMesh) -> Program:
    torch.manual_seed(3)
    single, parallel = _Words(None), _Words(mesh)

    def load(source: nn.Module) -> None:
        load_state_dict(parallel, source.state_dict())

    load(single)
    generator = torch.Generator().manual_seed(5)
    ids = torch.cat([torch.arange(0, VOCAB, 2), torch.randint(0, VOCAB, (ROWS - VOCAB // 2,), generator=generator)])
    return Program(
        parallel, single, [ids, torch.randint(0, VOCAB, (ROWS,), generator=generator)], mesh, load, lambda name: 1.0
    )


def _padding_of_every_rank(program: Program) -> None:
    def zeroed(gradient: Tensor) -> Tensor:
        return gradient if program.mesh.get_local_rank() == 0 else gradient.index_fill(0, torch.tensor([2]), 0)

    on_gradient(program.parallel, "words.weight", zeroed)


def _frequencies(program: Program) -> None:
    """Ids of other ranks are counted as the rank's first row."""
    ids = program.batch[0]  # type: ignore[index]

    def divided(gradient: Tensor) -> Tensor:
        start = program.mesh.get_local_rank() * len(gradient)
        others = int(((ids < start) | (ids >= start + len(gradient))).sum())
        return torch.cat([gradient[:1] / (1 + others), gradient[1:]])

    on_gradient(program.parallel, "words.weight", divided)


def _shortened(program: Program) -> None:
    """The first row of each rank, which nobody has looked up, is shortened while the layer is called."""
    words: Any = program.parallel.get_submodule("words")

    def shorten(*_: Any) -> None:
        with torch.no_grad():
            words.weight[1].mul_(0.6)

    words.register_forward_hook(shorten)
    program.batch[0].copy_(program.batch[0] // 2 * 2)  # type: ignore[index]  # no odd row is looked up


def _rounded_logits(program: Program) -> None:
    def hook(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        logits = logits.view_as(logits)
        logits.register_hook(lambda gradient: gradient.bfloat16().float())
        return logits

    program.parallel.get_submodule("head").register_forward_hook(hook)


def _own_smoothing(program: Program) -> None:
    """As Megatron-core does it: the mean is over the rank's words, whose number α is scaled by; each rank has another
    loss."""
    parallel: Any = program.parallel
    own = VOCAB // program.mesh.size()
    smoothing = SMOOTHING * (1 - 1 / VOCAB) * own / (own - 1)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        plain = vocab_parallel_cross_entropy(
            logits, targets, vocab_size=VOCAB, mesh=program.mesh, reduction="none"
        )  # fmt: skip
        total = raw.AllReduce(view(program.mesh).axis("tp"))(logits.detach().exp().sum(-1))
        log_z = logits.exp().sum(-1) - logits.detach().exp().sum(-1) + total  # its gradient is the rank's part
        return ((1 - smoothing) * plain + smoothing * (log_z.log() - logits.mean(-1))).mean()

    parallel.criterion = loss


MUTANTS = [
    Mutant("the padding row's number is that of each rank", WORDS, _padding_of_every_rank,
           "fairscale 0.4.13, VocabParallelEmbedding(padding_idx=…)", "stale"),
    Mutant("ids of other ranks count as the first row", WORDS, _frequencies,
           "fairscale 0.4.13, VocabParallelEmbedding(scale_grad_by_freq=True)", "scaled along dim 0"),
    Mutant("a row that is not looked up is shortened", WORDS, _shortened,
           "fairscale 0.4.13, VocabParallelEmbedding(max_norm=…)", "scaled along dim 0"),
    Mutant("the gradient of the logits passes bfloat16", WORDS, _rounded_logits,
           "Megatron-core 0.16.1, fused_vocab_parallel_cross_entropy", "rounded to a lower precision"),
    Mutant("label smoothing is over the rank's own vocabulary", WORDS, _own_smoothing,
           "Megatron-LM #737, Megatron-core 0.16.1", ""),
]  # fmt: skip
