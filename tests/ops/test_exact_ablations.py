"""Each precaution of exact mode taken away, alone, changes bits in fp32: the tests of equal bits can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bits import LeftToRight, Meshes, normal
from test_exact_products import multiplied, operands
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad import Layout
from shardgrad.comm.mesh import view
from shardgrad.layout import exact, lower, tree
from shardgrad.layout.schedule import Term
from shardgrad.nn import mlp
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.ops import in_pieces
from shardgrad.testing import distributed

COLUMN = "X[n,d] W[d,m/tp] -> Y[n,m/tp] + B[m/tp]"
ROWS = "X[n/tp,d] W[d,m] -> Y[n/tp,m] + B[m]"
ROW = "X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m]"
SIZES = [(12, 24, 20), (20, 36, 4), (4, 20, 36), (4, 64, 4), (28, 100, 52), (4, 128, 20)]
THIN = [(n, d, 4 * m) for n in (1, 3) for d in (5, 29, 64, 101) for m in (1, 8, 31)]
DEEP = [(n, d, 4 * m) for n in (1, 5, 12) for d in (29, 260, 511) for m in (3, 8)]


def dropping(which: Callable[[Term], tuple[str, ...]]) -> Callable[..., Term]:
    """Terms that take some of their letters whole."""
    term = exact._Pass._term

    def made(self: Any, *of: Any) -> Term:
        found = term(self, *of)
        return replace(found, counts=tuple((x, n) for x, n in found.counts if x not in which(found)))

    return made


def joined_columns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exact._Pass, "_term", dropping(lambda term: term.letters))


def joined_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exact._Pass, "_term", dropping(lambda term: term.summed))
    patch.setattr(in_pieces, "single", lambda first, count: [(first, first + count)])


def not_compact(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_pieces, "compact", lambda x: x)


def left_to_right(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_pieces, "TreeSum", LeftToRight)


def ordinary_all_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tree.Summed, "is_plain", property(lambda self: True))


def bias_fused_by_ranks(patch: pytest.MonkeyPatch) -> None:
    fuses = lower._fuses_bias
    patch.setattr(lower, "_fuses_bias", lambda p, at: fuses(p, at) and p.sizes.shape["tp"] > 1)


PRODUCTS: dict[str, tuple[str, list[tuple[int, int, int]], Callable[[pytest.MonkeyPatch], None]]] = {
    "columns joined": (COLUMN, SIZES, joined_columns),
    "rows joined": (ROWS, SIZES, joined_columns),
    "rows of a sum joined": (ROWS, SIZES, joined_sums),
    "products of a sum joined": (ROW, SIZES, joined_sums),
    "pieces with other strides": (COLUMN, THIN, not_compact),
    "a rank's sum from left to right": (ROW, SIZES, left_to_right),
    "the backend's all-reduce": (ROW, SIZES, ordinary_all_reduce),
    "a bias fused on some numbers of ranks": (COLUMN, DEEP, bias_fused_by_ranks),
}


@distributed(world_size=4, timeout=60)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(world_size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, every, ablate = PRODUCTS[name]
    layout, meshes = Layout(text), Meshes({"tp": 4})

    def run(what: str) -> None:
        for sizes in (dict(zip("ndm", some)) for some in every):
            full = operands(layout, sizes, torch.float32, True)
            meshes.run(f"{what} {sizes}", partial(multiplied, layout, full, sizes))

    run("as it is")
    for mesh in meshes.mine.values():
        for bound in view(mesh).bound.values():
            bound.forget_executables()
    ablate(monkeypatch)
    run("ablated")
    found = meshes.differing()
    assert meshes.refused() == {}
    assert found
    assert all(what.startswith("ablated") for what in found), found


def joined_activation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mlp, "in_pieces", lambda function, mesh, dims, *tensors: function(*tensors))
    patch.setattr("shardgrad.ops.exact.check_origin", lambda x, pieces: None)


def no_zero_added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VocabParallelEmbedding, "_lookups", lambda self, ids: self._lookup(ids, self.weight))


def ordinary(patch: pytest.MonkeyPatch) -> None:
    """All precautions of a layer at once."""
    patch.setattr(sg, "set_exact", lambda mesh, pieces: None)


def gated(mesh: DeviceMesh) -> dict[str, Tensor]:
    layer = sg.SwiGLU(9, 20, mesh=mesh)
    return through(layer, normal(5, 9, seed=1), "X[n,d]", mesh)


def normed(mesh: DeviceMesh) -> dict[str, Tensor]:
    return through(sg.LayerNorm(9, mesh=mesh, sequence_dim=0), normal(28, 9, seed=1), "X[n/tp,d]", mesh)


def looked_up(mesh: DeviceMesh) -> dict[str, Tensor]:
    layer = sg.VocabParallelEmbedding(8, 9, mesh=mesh)
    table = normal(8, 9, seed=1).relu() * -1
    with torch.no_grad():
        layer.weight.copy_(sg.shard(table, sg.named_shardings(layer)[0][2].spec, mesh))  # type: ignore[union-attr]
    return {"Y": layer(torch.tensor([1, 2, 3]))}


def looked_up_often(mesh: DeviceMesh) -> dict[str, Tensor]:
    layer = sg.VocabParallelEmbedding(8, 9, mesh=mesh, axis="vocab", data=sg.BatchAxis("tp"))
    ids = torch.randint(0, 8, (40,), generator=torch.Generator().manual_seed(1))
    return through(layer, ids, "I[n/tp]", mesh, "Y[n/tp,d]")


def cross_entropy(mesh: DeviceMesh) -> dict[str, Tensor]:
    logits = sg.shard(normal(7, 4 * 31, seed=1), sg.Layout("X[n,d] W[v/tp,d] -> Y[n,v/tp]")["Y"], mesh)
    target = torch.randint(0, 4 * 31, (7,), generator=torch.Generator().manual_seed(1))
    return {"loss": sg.vocab_parallel_cross_entropy(logits, target, vocab_size=4 * 31, mesh=mesh, reduction="none")}


def mean_of_tokens(mesh: DeviceMesh) -> dict[str, Tensor]:
    spec = sg.Layout("X[n/tp,d] W[v/vocab,d] -> Y[n/tp,v/vocab]")["Y"]
    logits = sg.shard(normal(4 * 293, 8, seed=1), spec, mesh)
    target = sg.shard(torch.arange(4 * 293) % 8, sg.TensorSpec("t", spec.dims[:1]), mesh)
    kinds = {"axis": "vocab", "token_axes": "tp"}
    return {"loss": sg.vocab_parallel_cross_entropy(logits, target, vocab_size=8, mesh=mesh, **kinds)}  # type: ignore[arg-type]


def norm_of_gradients(mesh: DeviceMesh) -> dict[str, Tensor]:
    layer = sg.ColumnParallelLinear(31, 4 * 29, mesh=mesh, dtype=torch.float64)
    for _, parameter, sharding in sg.named_shardings(layer):
        assert sharding is not None
        whole = normal(*sharding.shape, seed=parameter.dim(), dtype=torch.float64)
        parameter.grad = sg.shard(whole, sharding.spec, mesh)
    return {"norm": sg.clip_grad_norm_(layer, 1.0)}


def through(layer: nn.Module, x: Tensor, spec: str, mesh: DeviceMesh, out: str = "") -> dict[str, Tensor]:
    from shardgrad.layout.notation import parse_tensor

    for at, (_, parameter, sharding) in enumerate(sg.named_shardings(layer)):
        assert sharding is not None
        with torch.no_grad():
            parameter.copy_(sg.shard(normal(*sharding.shape, seed=at), sharding.spec, mesh))
    y = layer(sg.shard(x, parse_tensor(spec), mesh))
    whole = sg.unshard(y.detach(), parse_tensor(out or spec), mesh)
    y.backward(sg.shard(normal(*whole.shape, seed=9), parse_tensor(out or spec), mesh))
    grads = {}
    for name, parameter, sharding in sg.named_shardings(layer):
        assert parameter.grad is not None
        assert sharding is not None
        grads[name] = sharding.unshard(parameter.grad)
    return {"Y": whole, **grads}


LAYERS: dict[str, tuple[Callable[[DeviceMesh], dict[str, Tensor]], Callable[[pytest.MonkeyPatch], None]]] = {
    "silu of the joined shard": (gated, joined_activation),
    "no zero added to what is looked up": (looked_up, no_zero_added),
    "an ordinary norm": (normed, ordinary),
    "an ordinary embedding": (looked_up_often, ordinary),
    "ordinary sums over the vocabulary": (cross_entropy, ordinary),
    "an ordinary mean over tokens": (mean_of_tokens, ordinary),
    "an ordinary norm of gradients": (norm_of_gradients, ordinary),
}


@distributed(world_size=4, timeout=60)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(world_size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, ablate = LAYERS[name]
    pieces = {"vocab": 1, "tp": 4}
    as_it_is = Meshes(pieces)
    as_it_is.run(name, compute)
    as_it_is.assert_same()
    ablate(monkeypatch)
    ablated = Meshes(pieces)
    ablated.run(name, compute)
    assert ablated.refused() == {}
    assert ablated.differing()
