"""What training asks of a model, whether its decoder is built here or somebody else's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.layout.batch_axis import BatchAxis


class LanguageModel(nn.Module):
    """A causal language model on a mesh.

    mesh, axis, data: where it is sharded, and over which axis the batch is.
    seq_len: the longest sequence. vocab: of the tokens that it is trained on.
    compute_dtype: of products and activations, if not the parameters'.
    """

    mesh: DeviceMesh
    axis: str
    data: BatchAxis | None
    seq_len: int
    vocab: int
    compute_dtype: torch.dtype | None

    @abstractmethod
    def loss(self, ids: Tensor, targets: Tensor, batch: int | None = None) -> Tensor:
        """Mean cross-entropy in nats a token over the whole batch, alike on every rank. ids, targets: [b/dp, s]; batch:
        b, over all ranks."""

    @abstractmethod
    def next_logits(self, ids: Tensor, at: int) -> Tensor:
        """Logits [v] of what follows position `at` of ids [1, s]; alike on every rank."""

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes over which ranks hold different tokens."""
        return () if self.data is None else (self.data.axis,)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode: nothing is dropped, and no random number drawn."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
