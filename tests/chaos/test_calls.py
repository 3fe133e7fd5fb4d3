"""Wrong kinds of arguments: every public name says which argument is wrong, and what is right instead."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import shardgrad as sg
from shardgrad.arguments import told
from shardgrad.chaos import calls
from shardgrad.errors import ShapeError, shorten

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's quantized and nested tensors

COLUMN = "X[n,d] W[d,m/tp] -> Y[n,m/tp]"


def test_random_wrong_calls_end_in_errors_of_ours() -> None:
    assert [row.failures for row in calls.run(seed=1, count=400)] == [[], [], []]


@pytest.mark.slow
def test_many_random_wrong_calls_end_in_errors_of_ours() -> None:
    assert [row.failures for row in calls.run(seed=2, count=3000)] == [[], [], []]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda mesh, x, w: sg.matmul([1], w, COLUMN, mesh),
            "matmul: x must be Tensor, not list [1]: pass a torch.Tensor",
        ),
        (lambda mesh, x, w: sg.matmul(x, w, COLUMN, mesh, bias=3), "matmul: bias must be Tensor | None, not int 3"),
        (lambda mesh, x, w: sg.matmul(x.numpy(), w, COLUMN, mesh), "not a ndarray: torch.from_numpy(…)"),
        (
            lambda mesh, x, w: sg.matmul(x.to_sparse(), w, COLUMN, mesh),
            "X is sparse_coo tensor: products take dense tensors",
        ),
        (lambda mesh, x, w: sg.matmul(x, w, COLUMN, mesh, sizes=3), "matmul: sizes must be Mapping[str, int] | None"),
        (lambda mesh, x, w: sg.ColumnParallelLinear("3", 2, mesh=mesh), "in_features must be int, not str '3'"),
        (lambda mesh, x, w: sg.ColumnParallelLinear(3, 2, mesh=mesh)(None), "ColumnParallelLinear: x must be Tensor"),
        (lambda mesh, x, w: sg.MLP(3, 4, mesh=mesh)(np.ones((2, 3))), "torch.from_numpy(…)"),
        (lambda mesh, x, w: sg.SwiGLU(3, 4, mesh=mesh)([x]), "SwiGLU: x must be Tensor, not list"),
        (lambda mesh, x, w: sg.LayerNorm(3, mesh=mesh)([x]), "LayerNorm.forward: x must be Tensor, not list"),
        (lambda mesh, x, w: sg.shard(3, sg.Layout(COLUMN)["X"], mesh), "shard: full must be Tensor, not int 3"),
        (lambda mesh, x, w: sg.all_gather(x, mesh, "tp", 99), "dim 99 is out of range"),
        (lambda mesh, x, w: sg.Layout(COLUMN).collectives({"n": 1, "d": "x", "m": 1}, {"tp": 2}), "size 'x' of letter"),
        (
            lambda mesh, x, w: sg.Layout(COLUMN).collectives({"n": 1, "d": 1, "m": 1}, mesh),
            "mesh_shape must be Mapping[str, int], not a DeviceMesh: pass the number of ranks of each",
        ),
        (
            lambda mesh, x, w: sg.VocabParallelEmbedding(5, 3, mesh=mesh)(x),
            "look at ids: float32 [2, 3]",
        ),
        (lambda mesh, x, w: sg.num_parameters(3), "expected a module, not int"),
        (lambda mesh, x, w: sg.shard(x), "shard: missing a required argument: 'spec'"),
    ],
)
def test_the_argument_and_the_remedy_are_named(call: Callable[..., object], message: str) -> None:
    with calls.alone() as mesh:
        x, w = torch.ones(2, 3), torch.ones(3, 2)
        call_it = re.escape(message)
        with pytest.raises((TypeError, ShapeError, sg.LayoutError), match=call_it):
            call(mesh, x, w)


def test_a_warm_product_that_is_given_another_kind_is_told_so_too() -> None:
    with calls.alone() as mesh:
        layer = sg.ColumnParallelLinear(3, 2, mesh=mesh)
        layer(torch.ones(2, 3))
        with pytest.raises(TypeError, match=r"x must be Tensor, not a DTensor: pass its local shard, \.to_local"):
            layer(DTensor.from_local(torch.ones(2, 3), mesh))


def test_what_a_user_raises_is_left_alone() -> None:
    error = RuntimeError("mine, of memory")

    @told
    def function(x: torch.Tensor) -> None:
        raise error

    with pytest.raises(RuntimeError) as raised:
        function(torch.ones(1))
    assert raised.value is error


def test_messages_repeat_little() -> None:
    assert shorten("x" * 200) == "x" * 200
    assert len(shorten("x" * 10**6)) <= 200
    assert shorten("x" * 10**6).endswith("… (1,000,000 characters)")
    with pytest.raises(sg.LayoutError) as raised:
        sg.Layout("X[n,d] W[d,m] -> Y[n,m]" + " " * 10**6 + "Z")
    assert "1,000,024 characters, more than 500" in str(raised.value)
    assert len(str(raised.value)) < 400
