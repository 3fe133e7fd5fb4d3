"""Explanations of made-up tensors, of which it is known what went wrong: no ranks are needed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from shardgrad.verification.diagnose import explain
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.observed import Kind, Observed, Split

MESH = {"dp": 2, "tp": 3}
AT = tuple(dict(zip(MESH, at)) for at in product(*map(range, MESH.values())))
SHAPE = (7, 5)  # over tp: 3, 3, 1 rows
CUT, WHOLE = Split.of([["tp"], []]), Split.of([[], []])


def observed(
    locals_of: Callable[[int, Tensor], Tensor], split: Split = CUT, dtype: torch.dtype = torch.float32,
    kind: Kind = "gradient", name: str = "up.weight", seed: int = 0, shape: tuple[int, ...] = SHAPE,
) -> Observed:  # fmt: skip
    """Every rank's tensor as `locals_of(rank, right)` makes it of what it should be; then rounded."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.full_like(exact, torch.finfo(dtype).eps)
    locals_ = tuple(locals_of(r, split.shard(exact, MESH, at)).to(dtype) for r, at in enumerate(AT))
    return Observed(name, kind, locals_, exact, split, MESH, AT, scale)


def names(found: Observed, known: Context | None = None) -> list[str]:
    return [fit.name for fit in explain(found, known or Context()).fits]


def terms(axis: str, times: float = 1.0) -> Callable[[int, Tensor], Tensor]:
    """Terms along one axis that add up to the right tensor."""

    def made(rank: int, right: Tensor) -> Tensor:
        every = range(MESH[axis])
        parts = [
            torch.randn(SHAPE, generator=torch.Generator().manual_seed(9 + at), dtype=torch.float64) for at in every
        ]
        parts[-1] = right - sum(parts[:-1])
        return times * parts[AT[rank][axis]]

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("expected", "split", "made"),
    [
        ("sum over tp missing", WHOLE, terms("tp")),
        ("sum over dp missing", WHOLE, terms("dp")),
        ("mean over tp missing", WHOLE, terms("tp", 3.0)),
        ("summed over dp instead of tp", WHOLE, terms("tp", 2.0)),
        ("summed twice over tp", WHOLE, lambda rank, right: 3 * right),
        ("summed twice over dp", CUT, lambda rank, right: 2 * right),
        ("summed twice over dp and tp", CUT, lambda rank, right: 6 * right),
        ("sum over dp where a mean belongs", CUT, lambda rank, right: 2 * right),
        ("mean over tp where a sum belongs", CUT, lambda rank, right: right / 3),
        ("sign flipped", CUT, lambda rank, right: -right),
        ("scaled by a constant", CUT, lambda rank, right: 0.7 * right),
        ("stale", CUT, lambda rank, right: 0 * right),
        ("not finite", CUT, lambda rank, right: right / 0),
        ("shifted", WHOLE, lambda rank, right: right.roll(1, 1)),
        ("reversed", WHOLE, lambda rank, right: right.flip(0)),
        ("blocks interchanged", WHOLE, lambda rank, right: right[:, [1, 0, 2, 3, 4]]),
        ("gathered in the wrong order", WHOLE, lambda rank, right: right[[3, 4, 5, 0, 1, 2, 6]]),
        ("rows in another order", WHOLE, lambda rank, right: right[[2, 5, 0, 4, 6, 1, 3]]),
        ("transposed", WHOLE, lambda rank, right: right.t().reshape(right.shape)),
    ],
)
def test_each_is_named(expected: str, split: Split, made: Callable, dtype: torch.dtype) -> None:
    found = explain(observed(made, split, dtype), Context())
    assert expected in [fit.name for fit in found.fits], found
    assert all(fit.error <= fit.allowed for fit in found.fits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_explained(dtype: torch.dtype, seed: int) -> None:
    """Neither new numbers everywhere nor at a few places."""
    noise = torch.Generator().manual_seed(1000 + seed)
    split = CUT if seed % 2 else WHOLE

    def made(rank: int, right: Tensor) -> Tensor:
        return torch.randn(right.shape, generator=noise, dtype=torch.float64)

    def some(rank: int, right: Tensor) -> Tensor:
        changed = right.clone()
        changed[0, seed % 5] = float(torch.randn((), generator=noise)) * 3 + 10
        return changed

    assert names(observed(made, split, dtype, seed=seed)) == []
    assert names(observed(some, split, dtype, seed=seed)) == []


def test_shards_of_other_ranks() -> None:
    """8 rows, so that two of the three shards are alike in shape."""
    found = observed(lambda rank, right: right, shape=(9, 5))
    by_place = {at["tp"]: found.locals[rank] for rank, at in enumerate(AT)}

    def moved(source: Callable[[int], int]) -> Observed:
        locals_ = tuple(by_place[source(at["tp"])] for at in AT)
        return Observed(found.name, found.kind, locals_, found.exact, CUT, MESH, AT, found.scale)

    assert "shards permuted" in names(moved(lambda at: 2 - at))
    assert "another rank's shard" in names(moved(lambda at: 0))
    total = sum(by_place.values())
    summed = Observed(found.name, found.kind, (total,) * 6, found.exact, CUT, MESH, AT, found.scale)
    assert names(summed) == ["shards summed over tp"]
    averaged = Observed(found.name, found.kind, (total / 3,) * 6, found.exact, CUT, MESH, AT, found.scale)
    assert names(averaged) == ["shards averaged over tp"]


def test_where_it_is_wrong_is_told() -> None:
    one_rank = explain(observed(lambda rank, right: 2 * right if rank == 4 else right), Context())
    assert [fit.name for fit in one_rank.fits] == ["scaled by a constant"], "a reduction gives it to all of its ranks"
    assert {fit.where for fit in one_rank.fits} == {"on rank 4 alone"}

    def last_column(rank: int, right: Tensor) -> Tensor:
        return torch.cat([right[:, :-1], 0 * right[:, -1:]], 1)

    part = explain(observed(last_column), Context())
    assert [fit.name for fit in part.fits] == ["stale"]
    assert part.fits[0].where == "indices 4 of dim 1 of rank 0's part alone"


def test_a_bias_is_said_to_be_one() -> None:
    split = Split.of([[]])
    twice = names(observed(lambda rank, right: 3 * right, split, name="down.bias", shape=(5,)))
    assert "bias counted by every rank of tp" in twice
    less = names(observed(lambda rank, right: right / 3, split, name="down.bias", shape=(5,)))
    assert "bias divided by the ranks of tp" in less
    assert not any("bias" in name for name in names(observed(lambda rank, right: 3 * right, split, shape=(5,))))


def test_padding_and_other_tensors_and_steps() -> None:
    real = (6, 5)
    found = observed(lambda rank, right: right, WHOLE, kind="gradient")
    exact = found.exact.clone()
    exact[6:] = 0
    padded = Observed(found.name, "gradient", found.locals, exact, WHOLE, MESH, AT, found.scale)
    assert names(padded, Context(real={("gradient", "up.weight"): real})) == ["padding counted"]

    gate = observed(lambda rank, right: right, seed=5)
    up = observed(lambda rank, right: right, seed=6)
    exchanged = Observed("up.weight", "gradient", gate.locals, up.exact, CUT, MESH, AT, up.scale)
    known = Context(exact={("gradient", "gate.weight"): (gate.exact, CUT), ("gradient", "up.weight"): (up.exact, CUT)})
    assert names(exchanged, known) == ["another tensor"]
    assert "gate.weight" in explain(exchanged, known).fits[0].says

    before = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for factor, expected in (
        (0.0, "stale"),
        (-1.0, "sign flipped"),
        (3.0, "summed twice over tp"),
        (0.3, "scaled by a constant"),
    ):
        step = observed(
            lambda rank, right, c=factor: (b := CUT.shard(before, MESH, AT[rank])) + c * (right - b), kind="step"
        )
        assert expected in names(step, Context(before={"up.weight": (before, CUT)})), factor


def test_a_tensor_that_a_rank_lacks() -> None:
    found = observed(lambda rank, right: right)
    lacking = Observed(found.name, found.kind, (None, *found.locals[1:]), found.exact, CUT, MESH, AT, found.scale)
    assert names(lacking) == ["never computed"]
    assert "rank 0 never computed it" in explain(lacking, Context()).fits[0].says
    whole = Observed(found.name, found.kind, (found.exact.float(),) * 6, found.exact, CUT, MESH, AT, found.scale)
    assert names(whole, Context(exact={("gradient", "up.weight"): (found.exact, CUT)})) == ["not sharded"]


def test_steps_of_other_rates_and_decays() -> None:
    before = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    known = Context(before={"up.weight": (before, CUT)})

    def step(rate: Callable[[int], float], decay: float = 0.0) -> list[str]:
        def made(rank: int, right: Tensor) -> Tensor:
            old = CUT.shard(before, MESH, AT[rank])
            return old + rate(rank) * (right - old) - decay * old

        fits = explain(observed(made, kind="step"), known).fits
        return [f"{fit.name}{fit.where and ' '}{fit.where}" for fit in fits]

    assert step(lambda rank: 1.1 if rank == 4 else 1.0) == ["scaled by a constant on rank 4 alone"]
    assert step(lambda rank: 0.9 + rank / 16) == ["scaled on each rank by another constant"]
    assert step(lambda rank: 1.0, 0.02) == ["decayed by another factor"]
    assert step(lambda rank: 1.0 + rank / 16, 0.02) == ["another update"]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 0, 1), "one use not counted"),
        ((0, 1, 0), "one use counted alone"),
        ((1, 1, 2), "one use counted twice"),
    ],
)
def test_uses_of_one_parameter(counts: tuple[int, ...], expected: str) -> None:
    terms = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(20 + at)).double() for at in range(2)]
    exact = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # what observed makes
    terms.append(exact - sum(terms))
    full = sum(count * term for count, term in zip(counts, terms))
    found = observed(lambda rank, right: CUT.shard(full, MESH, AT[rank]))
    known = Context(uses=lambda name: [(by, term) for by, term in zip(("embedding", "linear", "linear"), terms)])
    (fit,) = explain(found, known).fits
    assert fit.name == expected
    at = counts.index(max(counts, key=lambda count: abs(count - sum(counts) / 3)))
    assert f"use {at + 1} of the 3" in fit.says


@pytest.mark.parametrize("bug", ["later", "both", "none", "masked"])
def test_rows_of_an_embedding(bug: str) -> None:
    """6 rows over 3 ranks of two; the ids at the boundaries are looked up wrongly."""
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)).double()
    ids = torch.tensor([3, 1, 2, 0, 5, 2, 4])
    exact, wrong = table[ids], table[ids].clone()
    wrong[ids == 2] = {
        "later": table[3], "both": table[2] + table[1], "none": 0 * table[2], "masked": table[2] / 3
    }[bug]  # fmt: skip
    scale = torch.full_like(exact, torch.finfo(torch.float32).eps)
    found = Observed("tokens", "output", (wrong.float(),) * 6, exact, WHOLE, MESH, AT, scale)
    known = Context(
        before={"tokens.weight": (table, CUT)}, again=lambda key, changes, backward: changes["tokens.weight"][ids]
    )
    diagnosis = explain(found, known)
    says = " ".join(fit.says for fit in diagnosis.fits)
    told = {"later": "id 2 gets row 3", "both": "id 2 gets its row and row 1", "none": "it is zero"}
    assert told[bug] in says if bug in told else "wrong rows looked up" not in [fit.name for fit in diagnosis.fits]


def test_what_no_explanation_fits_is_told_with_its_place_and_size() -> None:
    noise = torch.Generator().manual_seed(7)

    def some(rank: int, right: Tensor) -> Tensor:
        changed = right.clone()
        if AT[rank]["tp"] == 1:
            changed[1, 2] = 5 + torch.randn((), generator=noise)
        return changed

    text = str(explain(observed(some), Context()))
    assert text.startswith("the gradient of up.weight: no explanation fits; off by ")
    assert text.endswith("in indices 1 of dim 0 and indices 2 of dim 1 of rank 1's part, on ranks 1 and 4")


def test_the_wrong_axis_is_told_where_both_are_as_long() -> None:
    mesh = {"dp": 2, "tp": 2}
    at = tuple(dict(zip(mesh, where)) for where in product(range(2), range(2)))
    found = observed(lambda rank, right: right, WHOLE)
    terms = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)).double()]
    terms.append(found.exact - terms[0])
    locals_ = tuple((2 * terms[where["dp"]]).float() for where in at)  # of dp's terms, tp's equal ones added up
    swapped = Observed(found.name, found.kind, locals_, found.exact, WHOLE, mesh, at, found.scale)
    assert {"mean over dp missing", "summed over tp instead of dp"} <= set(names(swapped))
    assert not any("sum over" in name for name in names(swapped))
