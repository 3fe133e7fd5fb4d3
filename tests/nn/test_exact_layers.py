"""Layers and whole models in exact mode: the same bits on every mesh of tensor and data parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bits import Meshes, normal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.notation import parse_tensor
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


MOST = ["fp32", pytest.param("bf16", marks=pytest.mark.slow)]
"""Of which fp32 shows most of what goes wrong."""


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
    local = sg.shard(x, parse_tensor(spec), mesh)
    if local.is_floating_point():
        local.requires_grad_()
    y = layer(local, *rest) if call is None else call(layer, local, *rest)
    whole_y = sg.unshard(y.detach(), parse_tensor(out), mesh)
    y.backward(sg.shard(normal(*whole_y.shape, seed=9, dtype=y.dtype), parse_tensor(out), mesh))
    found = {"Y": whole_y}
    if local.grad is not None:
        found["dX"] = sg.unshard(local.grad, parse_tensor(spec), mesh)
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
@pytest.mark.parametrize("dtype", MOST)
def test_norms_and_feed_forward(world_size: int, name: str, dtype: str) -> None:
    make, spec, out = LAYERS[name]
    meshes = Meshes(PIECES)
    sizes = {"b": BATCH, "s": SEQUENCE, "d": WIDTH}
    x = normal(*(sizes[letter] for letter in parse_tensor(spec).letters), seed=1, dtype=DTYPES[dtype]["dtype"])

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
@pytest.mark.parametrize("dtype", MOST)
def test_attention(world_size: int, name: str, dtype: str) -> None:
    meshes = Meshes(PIECES)
    more = dict(HEADS[name])
    rotary = more.pop("rotary", False)
    kind = "X[b/dp,s/tp,d]" if "sequence_dim" in more else "X[b/dp,s,d]"
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
            mine = sg.shard(mask, parse_tensor("M[b/dp,h,s,t]"), mesh)
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
@pytest.mark.parametrize("dtype", MOST)
def test_embedding_and_tied_logits(world_size: int, sequence: bool, shard_params: bool, dtype: str) -> None:
    meshes = Meshes(PIECES)
    vocabulary = 4 * 3
    ids = torch.randint(0, vocabulary, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(4))
    ids[0, :3] = 5
    more = {"sequence_dim": 1} if sequence else {}

    class Tied(nn.Module):
        def __init__(self, mesh: DeviceMesh, dtype: str) -> None:
            super().__init__()
            data = sg.BatchAxis("dp", shard_params=shard_params)
            places = {**where(mesh, dtype), "data": data, **more}
            self.table = sg.VocabParallelEmbedding(vocabulary, WIDTH, padding_idx=2, **places)
            self.norm = sg.RMSNorm(WIDTH, **norm_where(mesh, dtype, data=data, **more))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table.logits(self.norm(self.table(ids)))

    class Looked(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                self.table.weight[self.table.weight < 0] = -0.0
            return self.table(ids) + 0 * self.norm(self.table(ids))

    rows = "Y[b/dp,s/tp,d]" if sequence else "Y[b/dp,s,d]"
    for kind, out in ((Tied, "Y[b/dp,s,v/tp]"), (Looked, rows)):

        def run(mesh: DeviceMesh, dtype: str = dtype, kind: Any = kind, out: str = out) -> dict[str, Tensor]:
            return stepped(lambda mesh: kind(mesh, dtype), mesh, {"x": ids}, "I[b/dp,s]", out)

        meshes.run(f"{dtype} {kind.__name__}", run)
    meshes.assert_same()


@distributed(world_size=4)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", MOST)
def test_cross_entropy(world_size: int, smoothing: float, reduction: str, dtype: str) -> None:
    meshes = Meshes(PIECES)
    vocabulary = 4 * 13
    target = torch.randint(0, vocabulary, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(4))
    target[0, :2], target[4:] = -100, -100
    full = normal(BATCH, SEQUENCE, vocabulary, seed=1, dtype=DTYPES[dtype]["dtype"])
    for over in ("dp", ()):

        def run(mesh: DeviceMesh, full: Tensor = full, over: Any = over) -> dict[str, Tensor]:
            spec = parse_tensor("L[b/dp,s,v/tp]" if over else "L[b,s,v/tp]")
            tokens = sg.TensorSpec("T", spec.dims[:2])
            logits = sg.shard(full, spec, mesh).requires_grad_()
            loss = sg.vocab_parallel_cross_entropy(
                logits,
                sg.shard(target, tokens, mesh),
                vocab_size=vocabulary,
                mesh=mesh,
                token_axes=over,
                label_smoothing=smoothing,
                reduction=reduction,  # type: ignore[arg-type]
            )
            (loss.sum() if loss.dim() else loss).backward()
            assert logits.grad is not None
            whole = sg.unshard(loss.detach(), tokens, mesh) if loss.dim() else loss.detach()
            return {"loss": whole, "dlogits": sg.unshard(logits.grad, spec, mesh)}

        meshes.run(f"{dtype} {over}", run)
    meshes.assert_same()


@distributed(world_size=4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("shard_params", [False, True])
def test_positions_and_dropout(world_size: int, sequence: bool, shard_params: bool) -> None:
    meshes = Meshes(PIECES)
    kind = "X[b/dp,s/tp,d]" if sequence else "X[b/dp,s,d]"

    class Placed(nn.Module):
        def __init__(self, mesh: DeviceMesh) -> None:
            super().__init__()
            data = sg.BatchAxis("dp", shard_params=shard_params)
            more: dict[str, Any] = {"sequence_dim": 1} if sequence else {}
            self.positions = sg.LearnedPositions(SEQUENCE + 4, WIDTH, **norm_where(mesh, "fp32", data=data, **more))
            self.dropout = sg.Dropout(0.3, kind, mesh=mesh)
            self.mlp = sg.MLP(WIDTH, 4 * 3, **{**where(mesh, "fp32"), "data": data, **more})

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.dropout(self.positions.add_to(x, SEQUENCE, 2)))

    x = normal(BATCH, SEQUENCE, WIDTH, seed=1)

    def run(mesh: DeviceMesh) -> dict[str, Tensor]:
        return stepped(Placed, mesh, {"x": x}, kind, kind)

    meshes.run("placed", run)
    meshes.assert_same()


STEPS = 20
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kind": Llama},
    "gpt": {"kind": GPT},
    "llama, bf16": {"kind": Llama, "compute_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "tied": False},
    "gpt, fp64, dropout": {"kind": GPT, "dtype": torch.float64, "dropout": 0.1},
    "gpt, fully sharded": {"kind": GPT, "fsdp": True},
    "llama, fp32, fully sharded": {"kind": Llama, "fsdp": True},
    "llama, recomputed": {"kind": Llama, "recompute": "full"},
}


def trained(mesh: DeviceMesh, kind: type[Any], steps: int, fsdp: bool = False, **more: Any) -> dict[str, Tensor]:
    """Losses, norms of gradients, and every parameter after some steps with clipping and AdamW."""
    torch.manual_seed(3)
    sizes = {"layers": 2, "heads": 8, "kv_heads": 2, "d_model": 48, "seq_len": 16, "vocab": 8 * 5, "d_ff": 8 * 5}
    model = kind(**sizes, data=sg.BatchAxis("dp", shard_params=fsdp), mesh=mesh, **more)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    at, ranks = view(mesh).coordinate["dp"], view(mesh).shape["dp"]
    losses, norms, batch = [], [], 8
    for _ in range(steps):
        ids = torch.randint(0, sizes["vocab"], (batch, 17), generator=generator).chunk(ranks)[at]
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:], batch)
        loss.backward()
        norms.append(sg.clip_grad_norm_(model, 0.5))
        optimizer.step()
        losses.append(loss.detach())
    assert norms[0] > 0.5  # it was clipped
    found = {"losses": torch.stack(losses), "norms": torch.stack(norms)}
    for name, parameter, sharding in sg.named_shardings(model):
        assert sharding is not None
        found[name] = sharding.unshard(parameter)
    return found


@pytest.mark.slow
@distributed(world_size=4, timeout=200)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_on_every_mesh(world_size: int, name: str) -> None:
    meshes = Meshes(PIECES, largest_only=True)
    meshes.run(name, lambda mesh: trained(mesh, steps=STEPS, **MODELS[name]))
    meshes.assert_same()


@distributed(world_size=8, timeout=300)
@pytest.mark.parametrize("name", MODELS)
def test_training_on_eight_ranks(world_size: int, name: str) -> None:
    meshes = Meshes({"dp": 4, "tp": 8}, largest_only=True)
    meshes.run(name, lambda mesh: trained(mesh, steps=6, **MODELS[name]))
    meshes.assert_same()
