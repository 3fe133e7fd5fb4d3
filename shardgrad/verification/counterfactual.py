"""Explanations by one device: a module's output as it would be if one of its parameters had been another.

Or a gradient, as it would be if a parameter had been another in backward alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis, list_of
from shardgrad.verification.observed import Split
from shardgrad.verification.precision import rounded_terms

_RUNS = 64
"""Steps of one device at most."""
_MOST = 1 << 24
"""Products of elements to compute at most: larger tables are not searched."""


def parameters_of(seen: Evidence, known: Context) -> list[tuple[str, Tensor, Split]]:
    """Those of the module whose output it is; of the whole model, all."""
    if seen.kind != "output" or not seen.fits:
        return []
    at = min((seen.name.find(mark) for mark in "#[" if mark in seen.name), default=len(seen.name))
    prefix = seen.name[:at] + "."
    own = [(name, *rest) for name, rest in known.before.items() if name.startswith(prefix) or prefix == "(model)."]
    return own if len(own) <= 8 else []


def _behind(seen: Evidence, known: Context) -> list[tuple[str, Tensor, Split]]:
    """The matrices through which a gradient may have come, the nearest first: backward, their modules stand before."""
    if not seen.fits:
        return []
    keys = list(known.exact)
    at = keys.index((seen.kind, seen.name)) if (seen.kind, seen.name) in keys else len(keys)
    modules = [name for kind, name in reversed(keys[:at]) if kind == "output gradient"]
    place = {name: at for at, name in reversed(list(enumerate(modules)))}
    found = [(name, *rest) for name, rest in known.before.items() if rest[0].dim() > 1]
    return sorted(found, key=lambda one: place.get(one[0].rpartition(".")[0], len(modules)))


def own_terms(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Each rank has what its own shard of a parameter gives, or all have what one rank's shard is missing from.

    In backward too: there a gradient of what a sharded parameter is multiplied with is a sum over its shards.
    """
    backward = seen.kind in ("output gradient", "input gradient", "gradient")
    candidates = _behind(seen, known) if backward else parameters_of(seen, known)
    runs = 0
    for name, value, split in candidates:
        axes = [axis for dim in split.spec.dims for axis in dim.axes if seen.mesh[axis] > 1]
        if not axes or (backward and name == seen.name):
            continue
        alone: list[Tensor] = []
        without: list[Tensor] = []
        for at in seen.found.coordinates:
            mask = _mask(value, split.indices(value.shape, seen.mesh, at))
            for made, kept in ((alone, mask), (without, 1 - mask)):
                if made is without and backward:
                    continue
                full = known.again((seen.kind, seen.name), {name: value * kept}, backward)
                runs += 1
                if full is None or runs > _RUNS:
                    return
                made.append(full)
        over = list_of(axes)
        if not backward and seen.dtype.itemsize > 2:
            rest = known.again((seen.kind, seen.name), {name: torch.zeros_like(value)}, False)
            shards = {tuple(at[axis] for axis in axes): one for at, one in zip(seen.found.coordinates, alone)}
            if rest is not None and not known.in_16_bits:
                terms = [one - rest for one in shards.values()]
                for narrow in (torch.bfloat16, torch.float16):
                    yield from rounded_terms(seen, terms, rest, narrow)
        parts = [seen.split.shard(full, seen.mesh, at) for full, at in zip(alone, seen.found.coordinates)]
        remedy = f"add the terms of {name}'s shards over {over}: " + (
            "what it multiplies must pass sg.replicate (or sg.all_gather), whose backward sums"
            if backward
            else "all-reduce, or reduce-scatter, after the product; and use what the collective returns"
        )
        says = f"each rank has the term of its own shard of {name}"
        yield Hypothesis(f"sum over {over} missing", says, remedy, parts, seen.size, cost=1)
        for each, p in seen.axes() if backward else ():
            for made_so, by in (
                (f"summed twice over {list_of(each)}", p),
                (f"mean over {list_of(each)} where a sum belongs", 1 / p),
            ):
                full = known.again((seen.kind, seen.name), {name: value * by}, True)
                runs += 1
                if full is None or runs > _RUNS:
                    return
                parts = seen.parts(full)
                says, remedy = (
                    f"what comes back through {name} is {by:.4g} times what it should be",
                    "look at what reduces it",
                )
                yield Hypothesis(made_so, says, f"{remedy} over {list_of(each)} in backward", parts, seen.size, cost=1)
        for rank, full in enumerate(without):
            parts = seen.parts(full)
            says, remedy = (
                f"the term of rank {rank}'s shard of {name} is not in it",
                "let every rank take part in the sum",
            )
            yield Hypothesis("one rank's term missing", says, remedy, parts, seen.size, cost=1)


def _mask(value: Tensor, indices: list[Tensor]) -> Tensor:
    """One at these indices of each dim, zero elsewhere."""
    mask = torch.ones_like(value)
    for dim, index in enumerate(indices):
        keep = torch.zeros(value.shape[dim], dtype=mask.dtype, device=mask.device)
        keep[index] = 1
        mask = mask * keep.view([-1 if d == dim else 1 for d in range(value.dim())])
    return mask


def other_parameters(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """The output that one device has with a parameter left out, counted p times, permuted, transposed, or exchanged."""
    runs = 0
    for name, value, split in parameters_of(seen, known):
        for made, says, remedy, changes in _changes(name, value, split, seen, known):
            full = known.again((seen.kind, seen.name), changes, False)
            runs += 1
            if full is None or runs > _RUNS:
                return
            parts = seen.parts(full)
            yield Hypothesis(made, says, remedy, parts, seen.size, cost=1)


def _changes(
    name: str, value: Tensor, split: Split, seen: Evidence, known: Context
) -> Iterator[tuple[str, str, str, dict[str, Tensor]]]:
    what = "bias" if "bias" in name.rsplit(".", 1)[-1] else "parameter"
    yield f"{what} left out", f"it is what comes out without {name}", f"use {name}", {name: torch.zeros_like(value)}
    for axes, p in seen.axes():
        over = list_of(axes)
        more, less = f"it is what comes out with {p} times {name}", f"it is what comes out with {name}/{p}"
        if value.dim() == 1:
            remedy = f"add {name} once and whole, after the reduction over {over}, not on every rank before it"
            yield f"{what} counted by every rank of {over}", more, remedy, {name: value * p}
            yield f"{what} divided by the ranks of {over}", less, remedy, {name: value / p}
        else:
            remedy = f"look at what is reduced over {over} after the product with {name}"
            yield f"summed twice over {over}", more, remedy, {name: value * p}
            yield f"mean over {over} where a sum belongs", less, remedy, {name: value / p}
    yield "sign flipped", f"it is what comes out with -{name}", f"look for a minus at {name}", {name: -value}
    for dim, stored in enumerate(split.spec.dims):
        size = value.shape[dim]
        counts = {seen.mesh[axis] for axis in stored.axes} | {2, 3}
        for parts in sorted(n for n in counts if n > 1 and size % n == 0):
            blocks = value.chunk(parts, dim)
            shards = parts in {seen.mesh[axis] for axis in stored.axes}
            for order in dict.fromkeys(
                [
                    tuple(reversed(range(parts))),
                    *(tuple((i + s) % parts for i in range(parts)) for s in range(1, parts)),
                ]
            ):
                made = "shards permuted" if shards else "blocks interchanged"
                says = f"it is what comes out if the {parts} blocks of dim {dim} of {name} stand as {list(order)}"
                remedy = f"look at the order in which {name} is sharded, loaded or joined along dim {dim}"
                yield made, says, remedy, {name: torch.cat([blocks[i] for i in order], dim)}
        says = f"it is what comes out if dim {dim} of {name} is in reverse order"
        if size > 3:
            yield "reversed", says, f"look for a flip of {name}", {name: value.flip(dim)}
            says = f"it is what comes out if dim {dim} of {name} is rolled by one"
            yield "shifted", says, f"look for an offset that is off by one at {name}", {name: value.roll(1, dim)}
        if stored.axes:
            for made, how in (("reversed", lambda t, d: t.flip(d)), ("blocks interchanged", _halves)):
                moved = value.clone()
                for at in seen.found.coordinates:
                    index = split.indices(value.shape, seen.mesh, at)[dim]
                    moved.index_copy_(dim, index, how(value.index_select(dim, index), dim))
                says = f"it is what comes out if dim {dim} of each rank's shard of {name} is {made}"
                yield made, says, f"look at the order within a shard of {name}", {name: moved}
    if value.dim() == 2 and value.shape[0] == value.shape[1]:
        says = f"it is what comes out with {name} transposed"
        yield "transposed", says, f"transpose {name}: [in, out] or [out, in]", {name: value.t().clone()}
    for other, (its, _) in known.before.items():
        if other != name and its.shape == value.shape:
            says = f"it is what comes out with {other} in the place of {name}"
            yield "another tensor", says, f"look where {name} and {other} are named or loaded", {name: its}


def _halves(t: Tensor, dim: int) -> Tensor:
    return torch.cat(t.chunk(2, dim)[::-1], dim)


def some_uses(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """A gradient in which one use of the parameter is not counted (tied weights, micro-batches), or one alone is."""
    uses = known.uses(seen.name) if seen.kind == "gradient" and seen.fits else ()
    if not 1 < len(uses) <= _RUNS:
        return
    total = sum((term for _, term in uses), torch.zeros_like(seen.exact))
    for at, (by, term) in enumerate(uses):
        which = f"use {at + 1} of the {len(uses)} that a step makes of it (in {by})"
        for made, what, full, remedy in (
            ("one use not counted", f"{which} is not in it", total - term, "look for a detach() or a gradient that is "
             "written instead of added there: tied weights, the last micro-batch"),
            ("one use counted alone", f"{which} is all that is in it", term, "add gradients up instead of overwriting "
             "them, and do not zero them in between"),
            ("one use counted twice", f"{which} is in it twice", total + term, "look for a gradient that is added by "
             "hand, or by two hooks, there"),
        ):  # fmt: skip
            parts = seen.parts(full)
            yield Hypothesis(made, what, remedy, parts, seen.size, cost=1)


def looked_up(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """An embedding's rows: others than the ids', none, or one more than should be."""
    own = parameters_of(seen, known)
    if len(own) != 1 or own[0][1].dim() != 2 or not seen.exact.numel():
        return
    if not seen.exact.dim() or own[0][1].shape[1] != seen.exact.shape[-1]:
        return
    name, table, split = own[0]
    parts = {tuple(rows.tolist()): rows for at in seen.found.coordinates
             for rows in split.indices(table.shape, seen.mesh, at)[:1]}  # fmt: skip
    choices = torch.cat([torch.zeros_like(table[:1]), table])  # row 0: none

    def nearest(rows: Tensor) -> Tensor:
        return torch.cdist(rows, choices, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

    wanted, shown, unmasked = [], [], []
    for rank in seen.ranks:
        held, right = (t.reshape(-1, table.shape[1]) for t in (seen.held[rank], seen.right[rank]))
        if not bool(held.isfinite().all()) or len(held) * choices.numel() > _MOST:
            return
        ids = nearest(right)
        if not torch.equal(choices[ids], right):  # no lookup
            return
        others = [rows[(ids - 1 - rows[0]).clamp(0, len(rows) - 1)] for rows in parts.values() if len(rows)]
        unmasked.append(torch.stack([table[rows] for rows in others]).sum(0).reshape(seen.right[rank].shape))
        instead, besides = nearest(held), nearest(held - right)
        other, more = choices[instead], right + choices[besides]
        replaced = (held - other).square().sum(1) <= (held - more).square().sum(1)
        wanted.append(torch.where(replaced[:, None], other, more).reshape(seen.right[rank].shape))
        for at in range(len(held)):
            a, b, c = int(ids[at]) - 1, int(instead[at]) - 1, int(besides[at]) - 1
            if replaced[at] and a != b:
                shown.append(f"id {a} gets {f'row {b}' if b >= 0 else 'zeros'}")
            elif not replaced[at] and c >= 0:
                shown.append(f"id {a} gets its row and row {c}")
    says = f"every rank adds a row of {name}, its first or its last where the id is another rank's"
    remedy = "let a rank add zeros for ids that are not its own"
    if len(parts) > 1:
        least = float(table.abs().max()) * torch.finfo(seen.dtype).eps
        size = [one.clamp(min=least) for one in seen.size]
        yield Hypothesis("wrong rows looked up", says, remedy, unmasked, size, cost=1)
    if shown:
        shown = list(dict.fromkeys(shown))
        says = f"of {name}, {', '.join(shown[:4])}{', …' if len(shown) > 4 else ''}"
        remedy = (
            "look at which ids a rank takes for its own, first <= id < first + rows, at the row that it reads, "
            "id - first, and at the zeros for all others"
        )
        yield Hypothesis("wrong rows looked up", says, remedy, wanted, seen.size, cost=3)
