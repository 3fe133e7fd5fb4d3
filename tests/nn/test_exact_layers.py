"""Layers and whole models in exact mode: the same bits on every mesh of tensor and data parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bits import Meshes, digest, normal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad import TensorSpec
from shardgrad.comm.mesh import view
from shardgrad.testing import distributed
from shardgrad.train.llama import Llama
from shardgrad.train.model import GPT

PIECES = {"dp": 2, "tp": 4}
BATCH, SEQUENCE, WIDTH = 6, 4 * 3, 4 * 5
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "fp64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16, "reduce_dtype": torch.float32},
}


def stored(text: str) -> TensorSpec:
    """How a tensor is stored: of a text as X[b/dp,s,d]."""
    return sg.Layout(f"{text} W[_w] -> Y[{text[2:-1]},_w]").lhs if "_" in text else parse(text)


def parse(text: str) -> TensorSpec:
    from shardgrad.layout.notation import parse_tensor

    return parse_tensor(text)


def stepped(
    make: Callable[[DeviceMesh], nn.Module],
    mesh: DeviceMesh,
    inputs: Mapping[str, Tensor],
    spec: str,
    out: str,
    call: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Y, dX and the gradient of every parameter, whole, of one layer with random parameters.

    inputs: global tensors, x first, which is stored as `spec` says. out: how Y is.
    """
    torch.manual_seed(7)
    layer = make(mesh)
    with torch.no_grad():
        for at, (name, parameter, sharding) in enumerate(sg.named_shardings(layer)):
            assert sharding is not None, name
            value = normal(*sharding.shape, seed=50 + at, dtype=parameter.dtype)
            parameter.copy_(sg.shard(value, sharding.spec, sharding.mesh))
    x, *rest = inputs.values()
    local = sg.shard(x, parse(spec), mesh)
    if local.is_floating_point():
        local.requires_grad_()
    y = layer(local, *rest) if call is None else call(layer, local, *rest)
    whole_y = sg.unshard(y.detach(), parse(out), mesh)
    y.backward(sg.shard(normal(*whole_y.shape, seed=9, dtype=y.dtype), parse(out), mesh))
    found = {"Y": whole_y}
    if local.grad is not None:
        found["dX"] = sg.unshard(local.grad, parse(spec), mesh)
    for name, parameter, sharding in sg.named_shardings(layer):
        assert parameter.grad is not None, name
        assert sharding is not None
        found[f"d{name}"] = sharding.unshard(parameter.grad)
    found["norm"] = sg.clip_grad_norm_(layer, 0.1)
    return found


def where(mesh: DeviceMesh, dtype: str, **more: Any) -> dict[str, Any]:
    return {"mesh": mesh, "data": sg.BatchAxis("dp"), **DTYPES[dtype], **more}


def norm_where(mesh: DeviceMesh, dtype: str, **more: Any) -> dict[str, Any]:
    return {"mesh": mesh, "dtype": DTYPES[dtype]["dtype"], **more}


LAYERS: dict[str, tuple[Callable[[DeviceMesh, str], nn.Module], str, str]] = {
    "layer norm": (
        lambda mesh, dtype: sg.LayerNorm(WIDTH, **norm_where(mesh, dtype, data=sg.BatchAxis("dp"))),
        "X[b/dp,s,d]",
        "X[b/dp,s,d]",
    ),
    "layer norm, sequence": (
        lambda mesh, dtype: sg.LayerNorm(WIDTH, **norm_where(mesh, dtype, data=sg.BatchAxis("dp"), sequence_dim=1)),
        "X[b/dp,s/tp,d]",
        "X[b/dp,s/tp,d]",
    ),
    "rms norm, sequence, no data axis": (
        lambda mesh, dtype: sg.RMSNorm(WIDTH, **norm_where(mesh, dtype, sequence_dim=1)),
        "X[b,s/tp,d]",
        "X[b,s/tp,d]",
    ),
    "rms norm, parameters sharded": (
        lambda mesh, dtype: sg.RMSNorm(WIDTH, **norm_where(mesh, dtype, data=sg.BatchAxis("dp", shard_params=True))),
        "X[b/dp,s,d]",
        "X[b/dp,s,d]",
    ),
    "rms norm, replicated": (
        lambda mesh, dtype: sg.RMSNorm(WIDTH, **norm_where(mesh, dtype)),
        "X[b,s,d]",
        "X[b,s,d]",
    ),
    "mlp": (lambda mesh, dtype: sg.MLP(WIDTH, 4 * 7, **where(mesh, dtype)), "X[b/dp,s,d]", "X[b/dp,s,d]"),
    "mlp, sequence": (
        lambda mesh, dtype: sg.MLP(WIDTH, 4 * 7, **where(mesh, dtype, sequence_dim=1)),
        "X[b/dp,s/tp,d]",
        "X[b/dp,s/tp,d]",
    ),
    "swiglu, fully sharded": (
        lambda mesh, dtype: sg.SwiGLU(
            WIDTH, 4 * 7, **{**where(mesh, dtype), "data": sg.BatchAxis("dp", shard_params=True)}
        ),
        "X[b/dp,s,d]",
        "X[b/dp,s,d]",
    ),
    "swiglu, sequence": (
        lambda mesh, dtype: sg.SwiGLU(WIDTH, 4 * 7, **where(mesh, dtype, sequence_dim=1)),
        "X[b/dp,s/tp,d]",
        "X[b/dp,s/tp,d]",
    ),
    "swiglu, sequence first": (
        lambda mesh, dtype: sg.SwiGLU(WIDTH, 4 * 7, mesh=mesh, sequence_dim=0, **DTYPES[dtype]),
        "X[s/tp,b,d]",
        "X[s/tp,b,d]",
    ),
}


@distributed(world_size=4)
@pytest.mark.parametrize("name", LAYERS)
def test_norms_and_feed_forward(world_size: int, name: str) -> None:
    make, spec, out = LAYERS[name]
    meshes = Meshes(PIECES)
    for dtype in DTYPES:
        sizes = {"b": BATCH, "s": SEQUENCE, "d": WIDTH}
        x = normal(*(sizes[letter] for letter in parse(spec).letters), seed=1, dtype=DTYPES[dtype]["dtype"])

        def run(mesh: DeviceMesh, dtype: str = dtype, x: Tensor = x) -> dict[str, Tensor]:
            return stepped(lambda mesh: make(mesh, dtype), mesh, {"x": x}, spec, out)

        meshes.run(dtype, run)
    meshes.assert_same()


# (query heads, KV heads, more), on 4 pieces
HEADS: dict[str, dict[str, Any]] = {
    "each its own": {"num_heads": 4},
    "two a piece": {"num_heads": 8, "bias": False},
    "a KV head a piece": {"num_heads": 8, "num_kv_heads": 4},
    "a KV head for two pieces": {"num_heads": 8, "num_kv_heads": 2, "rotary": True},
    "a KV head for all": {"num_heads": 8, "num_kv_heads": 1, "causal": True},
    "three queries share": {"num_heads": 12, "num_kv_heads": 4, "causal": True, "sequence_dim": 1},
    "shared, along the sequence": {"num_heads": 8, "num_kv_heads": 2, "causal": True, "sequence_dim": 1},
    "shared, parameters sharded": {"num_heads": 8, "num_kv_heads": 2, "data": sg.BatchAxis("dp", shard_params=True)},
}


@distributed(world_size=4)
@pytest.mark.parametrize("name", HEADS)
def test_attention(world_size: int, name: str) -> None:
    meshes = Meshes(PIECES)
    more = dict(HEADS[name])
    rotary = more.pop("rotary", False)
    kind = "X[b/dp,s/tp,d]" if "sequence_dim" in more else "X[b/dp,s,d]"
    for dtype in DTYPES:
        x = normal(BATCH, SEQUENCE, WIDTH, seed=1, dtype=DTYPES[dtype]["dtype"])

        def make(mesh: DeviceMesh, dtype: str = dtype) -> nn.Module:
            turned = {"rotary": sg.Rotary(6)} if rotary else {}
            return sg.Attention(WIDTH, head_dim=6, **{**where(mesh, dtype), **more, **turned})

        meshes.run(dtype, lambda mesh, x=x, make=make: stepped(make, mesh, {"x": x}, kind, kind))
    meshes.assert_same()


MASKS: dict[str, Callable[[], Tensor]] = {
    "pairs": lambda: normal(SEQUENCE, SEQUENCE, seed=3) > 0,
    "of each sequence": lambda: normal(BATCH, 1, 1, SEQUENCE, seed=3) > -1,
    "of each head": lambda: normal(1, 8, SEQUENCE, SEQUENCE, seed=3),
    "of each sequence and head": lambda: normal(BATCH, 8, SEQUENCE, SEQUENCE, seed=3),
}


@distributed(world_size=4)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_with_masks(world_size: int, name: str, kv_heads: int) -> None:
    meshes = Meshes(PIECES)
    mask = MASKS[name]()
    if mask.dtype == torch.bool:
        mask[..., 0] = True
    x = normal(BATCH, SEQUENCE, WIDTH, seed=1)

    def attended(layer: nn.Module, local: Tensor) -> Tensor:
        mesh: Any = layer.mesh
        mine = mask
        if mask.dim() == 4 and mask.shape[0] > 1:
            mine = sg.shard(mask, parse("M[b/dp,h,s,t]"), mesh)
        return layer(local, mask=mine)

    meshes.run(
        "masked",
        lambda mesh: stepped(
            lambda mesh: sg.Attention(WIDTH, 8, num_kv_heads=kv_heads, head_dim=3, causal=True, **where(mesh, "fp32")),
            mesh,
            {"x": x},
            "X[b/dp,s,d]",
            "X[b/dp,s,d]",
            attended,
        ),
    )
    meshes.assert_same()


@distributed(world_size=4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("shard_params", [False, True])
def test_embedding_and_tied_logits(world_size: int, sequence: bool, shard_params: bool) -> None:
    meshes = Meshes(PIECES)
    vocabulary = 4 * 3
    ids = torch.randint(0, vocabulary, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(4))
    ids[0, :3] = 5
    more = {"sequence_dim": 1} if sequence else {}

    class Tied(nn.Module):
        def __init__(self, mesh: DeviceMesh, dtype: str) -> None:
            super().__init__()
            data = sg.BatchAxis("dp", shard_params=shard_params)
            self.table = sg.VocabParallelEmbedding(
                vocabulary, WIDTH, padding_idx=2, **{**where(mesh, dtype), "data": data}, **more
            )
            self.norm = sg.RMSNorm(WIDTH, mesh=mesh, data=data, dtype=DTYPES[dtype]["dtype"], **more)

        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                self.table.weight[:1] = -0.0  # a row of each rank
            return self.table.logits(self.norm(self.table(ids)))

    class Looked(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                self.table.weight[self.table.weight < 0] = -0.0
            return self.table(ids) + 0 * self.norm(self.table(ids))

    out = "Y[b/dp,s,v/tp]"
    rows = "Y[b/dp,s/tp,d]" if sequence else "Y[b/dp,s,d]"
    for dtype in DTYPES:
        if not sequence:  # else a row of the table is set on each rank: another table on each mesh
            meshes.run(
                f"{dtype} looked up",
                lambda mesh, dtype=dtype: stepped(lambda mesh: Looked(mesh, dtype), mesh, {"x": ids}, "I[b/dp,s]", rows),
            )
    class Same(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return self.table.logits(self.norm(self.table(ids)))

    for dtype in DTYPES:
        meshes.run(
            f"{dtype} tied",
            lambda mesh, dtype=dtype: stepped(lambda mesh: Same(mesh, dtype), mesh, {"x": ids}, "I[b/dp,s]", out),
        )
    meshes.assert_same()
