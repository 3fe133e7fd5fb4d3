"""Masks of attention, sharded as the heads are."""

from __future__ import annotations

import torch
from torch import Tensor

from shardgrad.errors import ShapeError
from shardgrad.nn.heads import Heads


def local_mask(mask: Tensor, heads: Heads) -> Tensor:
    """This rank's heads of a mask that broadcasts to [b, H, s, s].

    Raises:
        ShapeError: it does not, or is of integers.
    """
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise ShapeError(f"a mask is boolean (True: attend) or added to the scores (floating), not {mask.dtype}")
    if mask.dim() < 2 or mask.dim() > 4 or (mask.dim() > 2 and mask.shape[-3] not in (1, heads.queries)):
        raise ShapeError(
            f"a mask broadcasts to [b, h, s, s] with h = {heads.queries}, all heads; got {tuple(mask.shape)}"
        )
    if mask.dim() > 2 and mask.shape[-3] == heads.queries:
        mask = mask.narrow(-3, heads.first, heads.count)
    return mask


def and_causal(mask: Tensor, sequence: int) -> Tensor:
    """The mask, and nothing later than the query itself."""
    earlier = torch.ones(sequence, sequence, dtype=torch.bool, device=mask.device).tril()
    return mask & earlier if mask.dtype == torch.bool else mask.masked_fill(~earlier, -torch.inf)
