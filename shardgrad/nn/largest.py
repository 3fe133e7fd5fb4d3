"""The k largest logits over a sharded vocabulary: each rank's k, gathered; the whole vocabulary nowhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.comm.adjoint import along
from shardgrad.layout.sizes import chunk
from shardgrad.nn.vocabulary import Vocabulary


class Largest(NamedTuple):
    """[..., k] each, largest first: the logits, and their ids in the whole vocabulary."""

    values: Tensor
    ids: Tensor


def largest(z: Tensor, vocabulary: Vocabulary, k: int) -> Largest:
    """The k largest of each token, alike on every rank; the values are differentiable.

    z: [..., v/ranks], as `vocabulary.read` gives it. Of equal ones the lowest id comes first; NaN is larger than all.
    """
    over, dim = vocabulary.over, z.dim() - 1
    start, here = vocabulary.part
    own = min(k, here)
    with torch.no_grad():
        places = _places(z, own)
    values, ids = z.gather(-1, places), (start + places).int()
    if own < k:
        values, ids = F.pad(values, (0, k - own), value=-torch.inf), F.pad(ids, (0, k - own))
    values = along("gather_replicated", values, over, dim, k * over.size)
    ids = along("gather_replicated", ids, over, dim, k * over.size)
    lengths = [min(k, chunk(vocabulary.size, over.size, rank)[1]) for rank in range(over.size)]
    real = [rank * k + at for rank, length in enumerate(lengths) for at in range(length)]
    if len(real) < k * over.size:
        columns = torch.tensor(real, device=z.device)
        values, ids = values.index_select(-1, columns), ids.index_select(-1, columns)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return Largest(values[..., :k], ids.gather(-1, order[..., :k]).long())


def _places(z: Tensor, k: int) -> Tensor:
    """[..., k]: where the k largest are, in their order; of equal ones the first. (torch.topk takes any of them.)"""
    size = z.shape[-1]
    if not k:
        return z.new_empty((*z.shape[:-1], 0), dtype=torch.int64)
    least = z.topk(k).values[..., -1:]
    above = (z > least) | (z.isnan() & ~least.isnan())
    equal = (z == least) | (z.isnan() & least.isnan())
    room = k - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    early = torch.arange(size, 0, -1, dtype=torch.int32, device=z.device)
    return (kept * early).topk(k).indices
