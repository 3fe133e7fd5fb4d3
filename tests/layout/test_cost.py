"""Bytes: against hand-computed figures, the formulas of the papers, and uneven sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardgrad import PRESETS, Layout, LayoutError
from shardgrad.layout.cost import itemsize, sent


def total(layout: Layout, phase: str | None = None, **given: object) -> int:
    entries = layout.collectives(**given)  # type: ignore[arg-type]
    return sum(entry.bytes for entry in entries if phase in (None, entry.phase))


def test_convention() -> None:
    assert sent("all-gather", 10, 4) == 30
    assert sent("reduce-scatter", 12, 4) == 9
    assert sent("all-reduce", 12, 4) == 18
    assert [sent("all-reduce", 5, 3, i) for i in range(3)] == [7, 7, 6]  # chunks of 2, 2, 1
    assert sum(sent("all-reduce", 7, 4, i) for i in range(4)) == 2 * 3 * 7  # 2 (p - 1) n over all ranks
    assert sent("all-to-all", 12, 4) == 9
    with pytest.raises(ValueError, match="no convention"):
        sent("gossip", 1, 2)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_megatron_layer_moves_8bsh_per_layer(tp: int) -> None:
    """Narayanan et al. 2021, section 3.2: 8 b s h (t - 1)/t elements per layer, microbatch and device."""
    b, s, h = 4, 16, 32
    layers = [  # qkv, projection, and the two of the MLP
        ("X[b,s,d] W[d,m/tp] -> Y[b,s,m/tp]", 3 * h, h),
        ("X[b,s,d/tp] W[d/tp,m] -> Y[b,s,m]", h, h),
        ("X[b,s,d] W[d,m/tp] -> Y[b,s,m/tp]", 4 * h, h),
        ("X[b,s,d/tp] W[d/tp,m] -> Y[b,s,m]", h, 4 * h),
    ]
    moved = sum(
        total(Layout(text), sizes={"b": b, "s": s, "d": d, "m": m}, mesh_shape={"tp": tp}, dtype=torch.bfloat16)
        for text, m, d in layers
    )
    assert moved == 2 * 8 * b * s * h * (tp - 1) // tp


def test_sequence_parallelism_moves_10bsh_with_the_input_gathered_again_and_8_with_it_kept() -> None:
    """Korthikanti et al. 2022: counting both column-parallel inputs that are gathered again in backward."""
    b, s, h, tp = 4, 16, 32, 4
    column = Layout("X[b,s/tp,d] W[d,m/tp] -> Y[b,s,m/tp]")
    row = Layout("X[b,s,d/tp] W[d/tp,m] -> Y[b,s/tp,m]")
    mesh = {"tp": tp}
    for save_gathered, factor in (((), 10), (("X",), 8)):
        moved = 0
        for wide in (h, 4 * h):
            moved += total(
                column, sizes={"b": b, "s": s, "d": h, "m": wide}, mesh_shape=mesh, save_gathered=save_gathered
            )
            moved += total(row, sizes={"b": b, "s": s, "d": wide, "m": h}, mesh_shape=mesh)
        assert moved == 4 * factor * b * s * h * (tp - 1) // tp


def test_3d_moves_what_the_lower_bound_asks() -> None:
    """Al Daas et al. 2022, Theorem 3, a cube on a cubic grid: 3 (mnk/P)^(2/3) - (mn + mk + nk)/P words."""
    n, p = 64, 8
    forward = total(
        PRESETS["3d"], "forward", sizes={"n": n, "d": n, "m": n}, mesh_shape={"a": 2, "b": 2, "c": 2}, dtype="float32"
    )
    assert forward == round((3 * (n**3 / p) ** (2 / 3) - 3 * n * n / p) * 4)


def test_uneven_shards_are_counted_padded_and_ranks_can_differ() -> None:
    layout = Layout("X[n/dp/tp,d] W[d,m/tp] -> Y[n/dp,m/tp]")
    sizes, mesh = {"n": 7, "d": 3, "m": 5}, {"dp": 2, "tp": 2}
    # n over dp: 4, 3; gathered over tp in blocks of 2 rows each, both times (3 = 2 + 1, padded)
    for dp in range(2):
        entries = layout.collectives(sizes, mesh, coordinate={"dp": dp})
        assert [(e.phase, e.operation, e.bytes) for e in entries if e.axis == "tp"] == [
            ("forward", "all-gather", 2 * 3 * 4),
            ("dX", "reduce-scatter", 2 * 3 * 4),
            ("dW", "all-gather", 2 * 3 * 4),
        ]
    row = Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]")
    by_rank = [total(row, sizes={"n": 1, "d": 3, "m": 5}, mesh_shape={"tp": 3}, coordinate={"tp": i}) for i in range(3)]
    assert by_rank == [4 * sent("all-reduce", 5, 3, i) for i in range(3)]


def test_what_nobody_needs_is_not_listed() -> None:
    layout = Layout("X[n/dp/tp,d] W[d/dp,m/tp] -> Y[n/dp,m/tp] + B[m/tp]")
    sizes, mesh = {"n": 8, "d": 4, "m": 4}, {"dp": 2, "tp": 2}

    def phases(**given: object) -> list[tuple[str, str]]:
        return [(e.phase, e.tensor) for e in layout.collectives(sizes, mesh, **given)]  # type: ignore[arg-type]

    both = [("forward", "X"), ("forward", "W")]
    assert phases(frozen=["X", "W", "B"]) == both
    assert phases(frozen=["X", "B"]) == [*both, ("dW", "X"), ("dW", "dW")]
    assert phases(frozen=["W", "B"]) == [*both, ("dX", "W"), ("dX", "dX")]
    assert phases(frozen=["X", "W"]) == [*both, ("db", "db")]
    assert phases(save_gathered=["X", "W"], frozen=["B"]) == [*both, ("dX", "dX"), ("dW", "dW")]
    assert phases(bias=False)[-1] == ("dW", "dW")
    assert layout.collectives(sizes, {"dp": 1, "tp": 1}) == []
    assert layout.collectives(dict.fromkeys("ndm", 0), mesh) == []


def test_reduce_dtype_widens_reductions_and_nothing_else() -> None:
    layout = PRESETS["column_sequence"]
    given = {"sizes": {"n": 8, "d": 4, "m": 4}, "mesh_shape": {"tp": 2}}
    narrow = {e.operation: e.bytes for e in layout.collectives(**given, dtype=torch.bfloat16)}  # type: ignore[arg-type]
    wide = {
        e.operation: e.bytes
        for e in layout.collectives(**given, dtype="bfloat16", reduce_dtype=torch.float32)  # type: ignore[arg-type]
    }
    assert wide == {"all-gather": narrow["all-gather"], "reduce-scatter": 2 * narrow["reduce-scatter"]}
    double = {e.operation: e.bytes for e in layout.collectives(**given, reduce_dtype="float64")}  # type: ignore[arg-type]
    assert double["reduce-scatter"] == 2 * double["all-gather"]
    with pytest.raises(LayoutError, match="narrower"):
        layout.collectives(**given, dtype="float64", reduce_dtype="float32")  # type: ignore[arg-type]


def test_a_bias_can_be_stored_in_its_own_way() -> None:
    layout = Layout("X[n/dp,d] W[d,m] -> Y[n/dp,m] + B[m/dp]")
    entries = layout.collectives({"n": 8, "d": 4, "m": 6}, {"dp": 2}, frozen=["X", "W"])
    assert [(e.phase, e.operation, e.tensor, e.bytes) for e in entries] == [
        ("forward", "all-gather", "B", 12),
        ("db", "reduce-scatter", "db", 12),
    ]


def test_wrong_arguments_are_named() -> None:
    layout = PRESETS["column"]
    good: dict[str, object] = {"sizes": {"n": 2, "d": 2, "m": 2}, "mesh_shape": {"tp": 2}}
    for change, why in (
        ({"sizes": {"n": 2, "d": 2}}, "sizes lacks letter 'm'"),
        ({"sizes": {"n": 2, "d": 2, "m": 2, "q": 1}}, "sizes names 'q'"),
        ({"sizes": {"n": 2, "d": 2, "m": -1}}, "size -1 of letter 'm' is not a number of elements"),
        ({"sizes": {"n": 2, "d": 2, "m": 1.5}}, "size 1.5 of letter 'm'"),
        ({"mesh_shape": {"dp": 2}}, "lacks axis 'tp'"),
        ({"coordinate": {"tp": 2}}, "index 2 is not one of 2 ranks"),
        ({"frozen": ["Z"]}, "frozen: no operand 'Z'"),
        ({"save_gathered": ["B"]}, "save_gathered: no operand 'B'"),
        ({"dtype": "complex7"}, "unknown dtype 'complex7'"),
    ):
        with pytest.raises(ValueError, match=why):
            layout.collectives(**{**good, **change})  # type: ignore[arg-type]
    assert issubclass(LayoutError, ValueError)


def test_itemsize_of_any_dtype() -> None:
    assert [itemsize(d) for d in (torch.bfloat16, np.dtype("float64"), "torch.float16", "float32")] == [2, 8, 2, 4]
