"""What float64 on whole logits gives, and how far arithmetic on shards may be from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.layout.sizes import chunk


class Read(NamedTuple):
    temperature: float = 1.0
    soft_cap: float | None = None


PLAIN = Read()


def z_of(logits: Tensor, read: Read) -> Tensor:
    z = logits if read.soft_cap is None else (logits / read.soft_cap).tanh() * read.soft_cap
    return z / read.temperature


def numbers(
    logits: Tensor, tokens: Tensor | None, other: Tensor | None, read: Read = PLAIN, its: Read = PLAIN
) -> dict[str, Tensor]:
    """Every number of whole logits, by torch's own functions. tokens: [..., k], -100 for none."""
    log_p = z_of(logits, read).log_softmax(-1)
    terms = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)
    made = {
        "logsumexp": z_of(logits, read).logsumexp(-1),
        "entropy": -terms.sum(-1),
        "mean_log_prob": log_p.mean(-1),
    }
    if tokens is not None:
        made["log_prob"] = log_p.gather(-1, tokens.clamp(min=0)).masked_fill(tokens == -100, 0)
    if other is not None:
        log_q = z_of(other, its).log_softmax(-1)
        ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0)
        made["kl"] = (log_p.exp() * ratio).sum(-1)
    return made


def bound(z: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[...]: the distance from what is exact, of any number of `numbers` whose logits are read in `dtype`.

    With u half of eps, n = v and d = z − max, of which D is the largest |d|, of both logits together: z is off by
    6 u |z| (a soft cap and a temperature), so e = exp d by a relative D u (d's rounding) + 12 u max |z| + 4 u, and a
    sum of n of them by n u more: K u in all. A quotient of sums of e, and of e times what is at most D' = 2 D + 1, is
    off by 2 K u D', a logarithm by K u, and results are rounded to u (D' + max |z| + log n). All is below
    4 K (D' + max |z| + log n) u.
    """
    spread, most = z.amax(-1) - z.amin(-1), z.abs().amax(-1)
    if y is not None:
        spread, most = spread + y.amax(-1) - y.amin(-1), most + y.abs().amax(-1)
    n = z.shape[-1]
    k = n + spread + 4 + 12 * most
    return 4 * k * (2 * spread + 1 + most + torch.tensor(float(n)).log()) * torch.finfo(dtype).eps / 2


def assert_near(found: Tensor, right: Tensor, within: Tensor, what: str) -> None:
    """Every element; NaN and another shape fail."""
    assert found.shape == right.shape, what
    far = (found.double() - right.double()).abs()
    assert bool((far <= within).all()), f"{what}: {float(far.max())} from what is right, at most {float(within.max())}"


def part(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of whole logits, a leaf."""
    start, length = chunk(whole.shape[-1], mesh.size(), mesh.get_local_rank())
    return whole.narrow(-1, start, length).detach().clone()


def logits_of(local: Tensor, size: int, mesh: DeviceMesh, read: Read = PLAIN) -> sg.VocabParallelLogits:
    return sg.VocabParallelLogits(local, vocab_size=size, mesh=mesh, **read._asdict())


def present(values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value is not None}
