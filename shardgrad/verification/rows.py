"""Explanations by the rows of a batch: gradients in which some of them are missing, or count more than others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.verification.functions import Change
from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis, list_of
from shardgrad.verification.record import outputs_told

_MOST = 12
"""Blocks of rows at most; each needs a step."""
_NAMED, _MORE = 1e-3, 2
"""How near a number must be to one that has a name; and how many more elements there must be than numbers."""


def _terms(key: tuple[Any, str], known: Context, output: str, dim: int, blocks: int) -> list[Tensor] | None:
    """A gradient's terms: of each block of rows of the last output, alone."""
    made = [known.under(key, known.once(("rows", output, dim, blocks, at), _alone)) for at in range(blocks)]
    return None if any(term is None for term in made) else [term for term in made if term is not None]


def _alone(named: tuple[Any, ...]) -> Change:
    _, output, dim, blocks, at = named
    return Change(partial(_one_block, output, dim, blocks, at), deep=True)


@contextmanager
def _one_block(output: str, dim: int, blocks: int, at: int, model: nn.Module) -> Iterator[None]:
    """Nothing comes back to other rows of an output."""

    def seen(name: str, tensor: Tensor) -> None:
        if name == output and tensor.requires_grad:
            mask = torch.zeros(tensor.shape[dim], dtype=tensor.dtype, device=tensor.device)
            mask.chunk(blocks)[at].fill_(1)
            mask = mask.view([-1 if d == dim else 1 for d in range(tensor.dim())])
            tensor.register_hook(mask.mul)

    with outputs_told(model, seen):
        yield


def _last_rows(known: Context, ranks: int) -> Iterator[tuple[str, int, int]]:
    """The last output that has rows, along which dim, and in how many blocks: as many as ranks, or some times that."""
    watch = known.watch()
    for name, shape in reversed(watch.shapes.items()):
        if len(shape) < 2:
            continue
        for dim in range(min(len(shape) - 1, 2)):
            for blocks in (4 * ranks, 3 * ranks, 2 * ranks, ranks):
                if shape[dim] % blocks == 0 and blocks <= _MOST:
                    yield name, dim, blocks
                    break
        return


def rows_weighted(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """A gradient in which some rows do not count, or more or less than others."""
    if seen.kind != "gradient" or not seen.fits:
        return
    wrong = [rank for rank in seen.ranks if bool(seen.wrong[rank].any())]
    if not all(bool(seen.held[rank].isfinite().all()) for rank in wrong):
        return
    for output, dim, blocks in _last_rows(known, len(seen.ranks)):
        fulls = _terms((seen.kind, seen.name), known, output, dim, blocks)
        if fulls is None:
            return
        while blocks % 2 == 0 and blocks > len(seen.ranks) and seen.exact.numel() < blocks + _MORE:
            fulls = [a + b for a, b in zip(fulls[::2], fulls[1::2])]  # too few elements to fit so many numbers
            blocks //= 2
        if seen.exact.numel() < blocks + _MORE:
            continue
        terms = [seen.parts(full) for full in fulls]
        left = torch.stack(
            [torch.cat([(term[rank] / seen.size[rank]).flatten() for rank in wrong]) for term in terms], 1
        )
        right = torch.cat([(seen.held[rank] / seen.size[rank]).flatten() for rank in wrong])
        counts = [
            _snapped(c, len(seen.ranks)) for c in torch.linalg.lstsq(left, right[:, None]).solution[:, 0].tolist()
        ]
        if max(counts) - min(counts) < _NAMED:
            continue  # every row alike: a constant
        wanted = [
            sum((c * term[rank] for c, term in zip(counts, terms)), torch.zeros_like(seen.right[rank]))
            for rank in seen.ranks
        ]
        size = [one * max(1.0, *map(abs, counts)) for one in seen.size]
        told = _told(counts, watch_size := known.watch().shapes[output][dim])
        of = f"of the {watch_size} rows (dim {dim} of {output}) " if len(told) else ""
        some = set(counts) <= {0.0, 1.0}
        yield Hypothesis(
            "rows left out" if some else "rows weighted otherwise",
            of + list_of(told),
            "look for a rank whose term is not summed, a zero_grad between micro-batches, or a gradient that is "
            "written instead of added"
            if some
            else "let every row count alike: divide by the number of all rows (tokens), clip after the reduction",
            wanted, size, cost=1 if some else 2, fitted=1 if some else blocks,
        )  # fmt: skip


def _snapped(c: float, ranks: int) -> float:
    for number in (0.0, 1.0, 2.0, float(ranks), 1.0 / ranks, 0.5, -1.0):
        if abs(c - number) < _NAMED:
            return number
    return c


def _told(counts: Sequence[float], rows: int) -> list[str]:
    """Runs of blocks that count alike."""
    each, said, start = rows // len(counts), [], 0
    for at in range(1, len(counts) + 1):
        if at == len(counts) or abs(counts[at] - counts[start]) > _NAMED:
            first, last = start * each, at * each - 1
            which = f"{first}" if first == last else f"{first}…{last}"
            if counts[start] != 1.0:
                said.append(
                    f"{which} do not count" if not counts[start] else f"{which} count {counts[start]:.4g} times"
                )
            start = at
    return said


def norm_of_rows(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """The norm of gradients that are not summed yet: of each rank's rows."""
    gradients = [(key, value) for key, value in known.exact.items() if key[0] == "gradient"]
    if seen.kind != "norm" or not gradients:
        return
    ranks = len(seen.ranks)
    for output, dim, blocks in _last_rows(known, ranks):
        if blocks % ranks:
            continue
        squares, sharded = [0.0] * ranks, False
        for key, (_, split) in gradients:
            terms = _terms(key, known, output, dim, blocks)
            if terms is None:
                return
            sharded |= any(d.axes for d in split.spec.dims)
            each = blocks // ranks
            for rank in seen.ranks:
                own = sum(terms[rank * each + 1 : (rank + 1) * each], terms[rank * each])
                squares[rank] += float(own.square().sum())
        if sharded:
            continue
        remedy = "sum the gradients over the ranks before they are clipped"
        for name, values in (
            ("clipped before the reduction", [square**0.5 for square in squares]),
            ("clipped before the reduction", [ranks * square**0.5 for square in squares]),
            ("clipped before the reduction", [sum(squares) ** 0.5] * ranks),
        ):
            wanted = [torch.tensor(value, dtype=torch.float64) for value in values]
            says = "it is the norm of the gradients of each rank's own rows, before they are summed"
            yield Hypothesis(name, says, remedy, wanted, seen.size, cost=1)
