"""Reading layouts: what the text says, and errors that point."""

from __future__ import annotations

import pickle
import random

import pytest
from layouts import random_layout

from shardgrad import PRESETS, Layout, LayoutError
from shardgrad.layout.notation import Dim


def test_reads_names_letters_axes_marks_and_bias() -> None:
    layout = Layout("X[b,s/dp/tp,d]  W[d,g,f/tp]{dp}->Y[b,s/dp,g,f/tp]+B[f/tp]{dp}")
    assert layout["X"].dims == (Dim("b"), Dim("s", ("dp", "tp")), Dim("d"))
    assert layout["W"].grad_partial == ("dp",)
    assert layout["W"].partial == ()
    assert layout["B"].dims == (Dim("f", ("tp",)),)
    assert (layout.rows, layout.contracted, layout.columns, layout.batched) == (("b", "s"), ("d",), ("g", "f"), ())
    assert layout.splits == {"dp": "s", "tp": "f"}
    assert layout.has_bias
    assert str(layout) == "X[b,s/dp/tp,d] W[d,g,f/tp]{dp} -> Y[b,s/dp,g,f/tp] + B[f/tp]{dp}"


def test_gradient_of_a_marked_operand_is_partial_and_value_of_a_marked_product() -> None:
    layout = Layout("X[n,d]{tp} W[d,m/tp] -> Y[n,m/tp]")
    assert layout["X"].partial == ()
    assert layout["X"].grad.partial == ("tp",)
    assert Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}")["Y"].partial == ("tp",)


def test_default_bias_has_the_column_letters_with_the_axes_that_split_them() -> None:
    assert str(Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m/tp]").bias) == "B[m]"  # tp only stores on m here
    assert str(Layout("X[n,d] W[g,d,m/tp] -> Y[n,m/tp,g]").bias) == "B[m/tp,g]"
    assert str(Layout("X[e/ep,n,d] W[e/ep,d,m] -> Y[e/ep,n,m]").bias) == "B[m]"
    assert Layout("B[n,d] W[d,m] -> C[n,m]").bias.name == "bias"


def test_operands_are_positional_and_names_are_only_names() -> None:
    layout = Layout("W[m/tp,n] X[n,k] -> Y[m/tp,k]")
    assert layout.lhs.name == "W"
    assert layout.rows == ("m",)
    assert layout["X"] is layout.rhs
    with pytest.raises(LayoutError, match="no tensor 'Z'"):
        layout["Z"]


def test_text_survives_a_round_trip() -> None:
    rng = random.Random(5)
    for _ in range(200):
        layout = random_layout(rng, ("p", "q", "r"))
        again = Layout(str(layout))
        assert again == layout
        assert hash(again) == hash(layout)
        assert again.tensors == layout.tensors
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert Layout(" X[n,d]W[d,m]  → Y[n,m] ") == Layout("X[n,d] W[d,m] -> Y[n,m]")


@pytest.mark.parametrize("name", ["column", "2.5d"])
def test_a_name_of_a_layout_is_told_from_a_layout(name: str) -> None:
    with pytest.raises(LayoutError, match=r"layouts with a name are in PRESETS"):
        Layout(name)
    with pytest.raises(LayoutError) as other:
        Layout("X[n,d")
    assert "PRESETS" not in str(other.value)


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("X[n,d W[d,m] -> Y[n,m]", 6, "expected ',' or ']' in X, found 'W'"),
        ("X[n,d] W[d,m]", 13, "expected '->' and the product, but the text ends"),
        ("X[n,d] W[d,m/] -> Y[n,m]", 13, "expected the name of a mesh axis, found ']'"),
        ("X[n,d] W[d,m] -> Y[n,m] B[m]", 24, "expected the end of the layout, found 'B'"),
        ("X[n;d] W[d,m] -> Y[n,m]", 3, "';' has no meaning in a layout"),
        ("X[n,d] W[d,m] -> Y[n,m]{tp", 26, "expected '}', but the text ends"),
        ("X[n,,d] W[d,m] -> Y[n,m]", 4, "expected a letter of X, found ','"),
        ("", 0, "expected the first operand, but the text ends"),
    ],
)
def test_grammar_errors_point_at_the_place(text: str, column: int, why: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(text)
    lines = str(caught.value).split("\n")
    assert lines[1] == f"  {text}"
    assert lines[2].index("^") - 2 == column
    assert why in lines[3]
    assert isinstance(caught.value, ValueError)


def test_not_a_string_is_said_so() -> None:
    with pytest.raises(LayoutError, match="a layout is a string such as"):
        Layout(None)  # type: ignore[arg-type]


def test_presets_are_layouts_with_the_designs_roles() -> None:
    assert str(PRESETS["3d"]) == "X[n/a,d/b/c] W[d/b/a,m/c] -> Y[n/a/b,m/c]"
    assert PRESETS["3d"].splits == {"a": "n", "b": "d", "c": "m"}
    assert PRESETS["expert"].batched == ("e",)
    assert {
        "column",
        "row",
        "column_sequence",
        "row_sequence",
        "data",
        "fully_sharded",
        "2d",
        "2.5d",
        "3d",
        "axonn",
    } <= set(PRESETS)
