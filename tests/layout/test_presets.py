"""Layouts by name, and how a layout's parts are printed."""

from __future__ import annotations

import pytest

import shardgrad as sg


def test_an_unknown_name_says_the_nearest_one() -> None:
    with pytest.raises(sg.LayoutError, match="no layout is called 'colum'; the nearest name is 'column'") as failed:
        sg.PRESETS["colum"]
    assert isinstance(failed.value, KeyError)
    assert "\\" not in str(failed.value)
    assert sg.PRESETS.get("colum") is None
    assert "colum" not in sg.PRESETS


def test_a_tensor_and_its_dims_print_as_they_are_written() -> None:
    layout = sg.PRESETS["fsdp_tp_sequence"]
    assert repr(layout["X"]) == "X[n/dp/tp,d]"
    assert repr(layout["X"].dims) == "(n/dp/tp, d)"
    assert repr(sg.Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}")["Y"]) == "Y[n,m]{tp}"


def test_dir_lists_what_is_public() -> None:
    assert dir(sg) == sorted(sg.__all__)
