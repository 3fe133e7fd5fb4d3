"""Explanations by one device that does something otherwise, and by rows; what no explanation fits is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import otherwise
import pytest
import torch
import torch.nn.functional as F
from otherwise import ROWS, SEQ, D, Decoder, told
from torch import Tensor

from shardgrad.verification.diagnose import explain
from shardgrad.verification.functions import Applied, Change, NotThis
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.observed import Observed, Split
from shardgrad.verification.reruns import MOST, Reruns
from shardgrad.verification.terms import terms_of_a_sum

Plant = Callable[[Decoder, int], None]


def sets(path: str, value: Callable[[Decoder, int], Any]) -> Plant:
    """Another value of an attribute; `value` is given the model and the rank."""

    def plant(model: Decoder, rank: int) -> None:
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value(model, rank))

    return plant


def turned(model: Decoder, rank: int) -> Callable[[Tensor], Tensor]:
    """Rotary pairs of neighbours."""
    return lambda x: type(model.attend).turned(model.attend, x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))


def hooked(change: Callable[[Tensor], Tensor]) -> Plant:
    """A change of the gradient at the output of the model, which has one term for each row."""

    def plant(model: Decoder, rank: int) -> None:
        forward = model.forward

        def other(ids: Tensor) -> Tensor:
            y = forward(ids)
            y.register_hook(change)
            return y

        model.forward = other  # type: ignore[method-assign]

    return plant


@pytest.mark.parametrize(
    ("plant", "expected", "says"),
    [
        (sets("attend.start", lambda m, r: 1), "positions shifted", "read 1 rows later"),
        (sets("attend.start", lambda m, r: SEQ // 2 * r), "positions shifted", "4·r rows later"),
        (sets("attend.turned", lambda m, r: lambda x: x), "positions left out", "position 0 everywhere"),
        (sets("attend.turned", turned), "halves interleaved", "every other feature"),
        (sets("first", lambda m, r: 1), "positions shifted", "read 1 rows later"),
        (sets("attend.keys", lambda m, r: otherwise.tiled), "repeat where repeat_interleave belongs", "0, 1, …, 0"),
        (sets("attend.mask", lambda m, r: otherwise.ahead), "mask off by one", "further up"),
        (sets("attend.mask", lambda m, r: lambda s: s), "mask left out", "no mask"),
        (sets("attend.cap", lambda m, r: 7.0), "another constant", "with 7 in several functions"),
        (sets("act.forward", lambda m, r: otherwise.quick), "another activation", "the quick GELU"),
        (sets("norm2.eps", lambda m, r: 1e-2), "another epsilon", "with 0.01 in rms_norm"),
        (sets("norm1.eps", lambda m, r: 1e-6), "another epsilon", "with 1e-06 in layer_norm"),
        (
            sets("norm1.forward", lambda m, r: lambda x: otherwise.outside(x, m.norm1.weight, m.norm1.bias)),
            "epsilon outside the root",
            "√mean square + ε",
        ),
        (
            sets("norm2.forward", lambda m, r: lambda x: F.layer_norm(x, (D,), m.norm2.weight, None, 1e-3)),
            "another norm",
            "subtracts the mean",
        ),
    ],
)
def test_each_is_named(plant: Plant, expected: str, says: str) -> None:
    (diagnosis,) = told(plant)
    assert [fit.name for fit in diagnosis.fits] == [expected], diagnosis
    assert says in diagnosis.fits[0].says
    assert not diagnosis.later


@pytest.mark.parametrize("what", ["output", "parameter", "backward", "other formula"])
def test_what_is_none_of_them_is_told_once(what: str) -> None:
    """Of noise, and of an activation that is not in the table, only the first tensor is told, in one paragraph."""

    def noise(like: Tensor) -> Tensor:
        return like * (1 + torch.randn(like.shape, generator=torch.Generator().manual_seed(3)) / 4)

    def plant(model: Decoder, rank: int) -> None:
        if what == "output":
            model.up.register_forward_hook(lambda module, args, y: noise(y))
        elif what == "parameter":
            model.down.weight.register_hook(noise)
        elif what == "backward":
            model.norm2.register_forward_hook(lambda module, args, y: y.register_hook(noise) and None)
        else:
            model.act.forward = otherwise.gelu_of_half  # type: ignore[method-assign]

    (diagnosis,) = told(plant)
    assert diagnosis.fits == ()
    assert str(diagnosis).count("\n") == 0


def rows_of(counts: list[float]) -> Tensor:
    return torch.tensor(counts)[:, None, None]


@pytest.mark.parametrize(
    ("counts", "expected", "says"),
    [
        ([1, 1, 0, 0], "rows left out", "2…3 do not count"),
        ([1, 0, 1, 0], "rows left out", "1 do not count and 3 do not count"),
        ([0.5, 0.5, 1.25, 1.25], "rows weighted otherwise", "0…1 count 0.5 times and 2…3 count 1.25 times"),
        ([2, 2, 0, 0], "rows weighted otherwise", "0…1 count 2 times and 2…3 do not count"),
    ],
)
def test_rows_that_do_not_count_as_they_should(counts: list[float], expected: str, says: str) -> None:
    (diagnosis,) = told(hooked(lambda gradient: gradient * rows_of(counts)), "gradient")
    (fit,) = diagnosis.fits
    assert (fit.name, fit.says.endswith(says)) == (expected, True), fit
    assert f"of the {ROWS} rows" in fit.says


def test_a_later_tensor_that_is_explained_is_marked() -> None:
    def plant(model: Decoder, rank: int) -> None:
        model.act.forward = otherwise.gelu_of_half  # type: ignore[method-assign]
        model.down.register_forward_hook(lambda module, args, y: 0 * y)

    first, later = told(plant)
    assert (first.name, first.fits) == ("act", ())
    assert (later.name, later.fits[0].name) == ("down", "stale")
    assert str(later).startswith("later: the output of down: stale")


MESH = {"dp": 2, "tp": 2}
AT = tuple({"dp": d, "tp": t} for d in range(2) for t in range(2))


def observed(locals_: list[Tensor], exact: Tensor) -> Observed:
    scale = torch.full_like(exact, torch.finfo(torch.float32).eps)
    held = tuple(t.float() for t in locals_)
    return Observed("down", "output", held, exact, Split.of([[], []]), MESH, AT, scale)


def test_the_axes_over_which_terms_add_up() -> None:
    a, b, c, d = (torch.randn(4, 5, generator=torch.Generator().manual_seed(at)).double() for at in range(4))
    assert terms_of_a_sum(observed([a, b, a, b], a + b)) == ("tp",)
    assert terms_of_a_sum(observed([a, a, b, b], a + b)) == ("dp",)
    assert terms_of_a_sum(observed([a, b, c, d], a + b + c + d)) == ("dp", "tp")
    assert terms_of_a_sum(observed([a, b, a, b], a + 1.01 * b)) is None
    assert terms_of_a_sum(observed([a, a, a, a], 2 * a)) is None  # the same tensors: summed too seldom, but no terms
    assert terms_of_a_sum(observed([a, a, a, a], a)) is None
    assert terms_of_a_sum(observed([a, b, a + 1, b - 1.1], a + b)) is None


@pytest.mark.parametrize(("narrow", "other"), [(torch.bfloat16, "float16"), (torch.float16, "bfloat16")])
def test_terms_that_are_rounded_before_they_are_added(narrow: torch.dtype, other: str) -> None:
    """The sum has more digits than 16 bits hold, and fewer than 32 do."""
    terms = [torch.randn(9, 7, generator=torch.Generator().manual_seed(at)) for at in range(3)]
    exact = torch.stack(terms).double().sum(0)
    total = torch.stack([term.to(narrow).float() for term in terms]).sum(0)
    assert not torch.equal(total.to(narrow).float(), total)
    what = str(narrow).removeprefix("torch.")
    assert [fit.name for fit in explain(observed([total] * 4, exact), Context()).fits] == [
        f"rounded to {what} in a reduction"
    ]
    wrong = exact * (1 + torch.randn(9, 7, generator=torch.Generator().manual_seed(9)) / 500)
    assert explain(observed([wrong] * 4, exact), Context()).fits == ()


def test_steps_of_one_device_are_counted_and_not_repeated() -> None:
    run: list[bool] = []

    def step(change: Change, parameters: Any, in_backward: bool, whole: bool) -> dict:
        run.append(whole)
        with change.around(torch.nn.Identity()):
            return {("output", "x"): torch.ones(2), ("gradient", "w"): torch.ones(3)}

    key, gradient = ("output", "x"), ("gradient", "w")
    reruns = Reruns(step, {key: (key, (2,)), gradient: (gradient, (3,))}, {key})  # type: ignore[dict-item, arg-type]
    change = Change(lambda model: torch.enable_grad())
    for _ in range(3):
        assert reruns.under(("output", "x"), change) is not None
    assert run == [False]
    assert reruns.under(("gradient", "w"), change) is not None
    assert run == [False, True]
    assert reruns.under(("output", "x"), Applied({("gelu", 0): lambda call: 1 / 0}).change) is None  # applies nowhere
    assert reruns.left == MOST - 4
    while reruns.under(("gradient", "w"), Change(lambda model: torch.enable_grad())) is not None:
        pass
    assert reruns.left < 3
    with pytest.raises(NotThis), Applied({}).change.around(torch.nn.Identity()):
        pass
