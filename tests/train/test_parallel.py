"""Decoders on meshes of dp and tp, in every way to store, accumulate and recompute: against one device in float64, and
what they send against what was predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import whole
from tiny import SEQUENCE, SIZES, VOCAB, decoder, fill, reference, tokens
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.cost import totals
from shardgrad.nn.linear_loss import tokens_of_chunk
from shardgrad.testing import distributed
from shardgrad.train.decoder import Decoder
from shardgrad.train.grid import Grid
from shardgrad.train.predict import step_collectives
from shardgrad.train.reference import Reference
from shardgrad.train.step import backward

BATCH = 12  # divides by 1, 2, 3 and 4 ranks, and by 3 micro-batches

# data's switches, micro-batches, what is computed again, and keys of the model
WAYS: dict[str, tuple[dict[str, bool], int, str, dict[str, Any]]] = {
    "replicated": ({}, 1, "none", {"kind": "gpt", "tied": True}),
    "replicated, micro-batches": ({}, 3, "attention", {"kind": "llama", "kv_heads": 1}),
    "deferred": ({"accumulate": True}, 3, "none", {"kind": "gpt", "kv_heads": 3}),
    "sharded": ({"shard_params": True}, 1, "full", {"kind": "llama", "tied": True, "kv_heads": 3}),
    "sharded, deferred": ({"shard_params": True, "accumulate": True}, 3, "none", {"kind": "gpt", "d_ff": 10}),
    "sharded, deferred, recomputed": (
        {"shard_params": True, "accumulate": True},
        3,
        "full",
        {"kind": "llama", "kv_heads": 1},
    ),
}
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(2, 2), (4, 1), (1, 4)]}


@distributed(world_size=[1, 2, 3, 4], timeout=120, backend="shm")
@pytest.mark.parametrize("way", WAYS)
def test_loss_gradients_and_bytes(world_size: int, way: str) -> None:
    switches, accumulate, recompute, keys = WAYS[way]
    for grid in GRIDS[world_size]:
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp"))
        data = sg.BatchAxis("dp", **switches)
        model, values = decoder(mesh, data=data, recompute=recompute, **keys)
        check(model, reference(values, **keys), accumulate)


@distributed(world_size=[2, 3], timeout=120, backend="shm")
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_rows_replicated_over_tp(world_size: int, kind: str) -> None:
    """Without sequence parallelism every rank's gradients of norms are complete by themselves."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    model, values = decoder(mesh, kind=kind, tied=True, kv_heads=1, sequence_parallel=False)
    assert model.embedding(tokens(BATCH)[0]).shape[1] == SEQUENCE
    check(model, reference(values, kind=kind, tied=True, kv_heads=1), 1)
    sharded, _ = decoder(mesh, kind=kind, tied=True, kv_heads=1)
    assert sharded.embedding(tokens(BATCH)[0]).shape[1] < SEQUENCE


@distributed(world_size=[1, 2, 3, 4], timeout=120, backend="shm")
def test_loss_in_one_with_the_heads_product(world_size: int) -> None:
    """The same, bytes too; where nobody says so, it is fused once a rank's logits are several chunks."""
    for way in ("replicated", "deferred", "sharded"):
        switches, accumulate, recompute, keys = WAYS[way]
        for grid in GRIDS[world_size]:
            mesh = init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp"))
            model, values = decoder(mesh, data=sg.BatchAxis("dp", **switches), recompute=recompute, **keys)
            few = tokens_of_chunk(VOCAB, view(mesh), "tp")
            assert (model.fuses(few), model.fuses(few + 1)) == (False, True)
            model.fused_loss = True
            check(model, reference(values, **keys), accumulate)


@distributed(world_size=[1, 2, 4, 8], timeout=120, backend="shm")
def test_three_axes(world_size: int) -> None:
    """Each axis of the 3D layout alone, in pairs, and all three; sizes that divide by none."""
    ways = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(1, 2, 2), (2, 1, 2)], 8: [(2, 2, 2)]}
    for at, grid in enumerate(ways[world_size]):
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("z", "x", "y"))
        torch.manual_seed(1)
        recompute = ("none", "full", "attention")[at]
        sizes = {**SIZES, "d_model": 18, "d_ff": 7}  # 3 heads of 6 features
        model = Grid(**sizes, vocab=VOCAB, mesh=mesh, recompute=recompute, dtype=torch.float64)
        check(model, reference(fill(model), kind="llama", d_model=18, d_ff=7), accumulate=1 + at)


def check(model: Decoder, plain: Reference, accumulate: int) -> None:
    """Loss, norm, every gradient on every rank, and every byte."""
    mesh, grid = model.mesh, tuple(model.mesh.shape)
    ids, targets = tokens(BATCH)
    for _ in range(2):  # in the first pass, ranks also compare what they see for the first time
        model.zero_grad()
        with sg.trace_collectives() as traced:
            loss = backward(model, ids, targets, accumulate)
            norm = sg.clip_grad_norm_(model, float("inf"))
    expected = plain.loss(ids, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13), grid
    squares = sum(p.grad.square().sum() for p in plain.parameters())
    assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-12), grid
    # A tensor's rounding is some 1e-16 of the terms it is summed from; key biases are sums of terms that cancel.
    floor = 1e-14 * max(float(p.grad.norm()) for p in plain.parameters())
    for name, parameter, sharding in sg.named_shardings(model):
        right = plain.parameter_of(name).grad
        assert parameter.grad is not None, name
        error = float((whole(parameter.grad, sharding).flatten() - right.flatten()).norm())
        assert error <= 1e-12 * float(right.norm()) + floor, f"{name} on {grid}: {error} of {float(right.norm())}"
        own = sg.shard(right.view(sharding.shape), sharding.spec, mesh)  # this rank's own copy, not the first rank's
        assert float((parameter.grad - own).norm()) <= 1e-12 * float(right.norm()) + floor, f"{name} on {grid}"
    predicted = step_collectives(model, BATCH, SEQUENCE, accumulate=accumulate, clip=True)
    assert totals(predicted) == traced.totals(), grid
    assert sorted(c.bytes for c in predicted) == sorted(event.bytes for event in traced), grid


@distributed(world_size=[4])
def test_who_reduces_over_dp_and_how_often(world_size: int) -> None:
    """Bytes over dp with 1 and with 3 micro-batches, against the parameters' own sizes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ids, targets = tokens(BATCH)
    sent: dict[str, dict[tuple[str, str], tuple[int, int]]] = {}
    for way, switches in (
        ("at once", {}),
        ("once", {"accumulate": True}),
        ("shards", {"shard_params": True, "accumulate": True}),
    ):
        model, _ = decoder(mesh, data=sg.BatchAxis("dp", **switches), kind="gpt")
        for _ in range(2):
            with sg.trace_collectives() as traced:
                backward(model, ids, targets, 3)
        sent[way] = {key: found for key, found in traced.totals().items() if key[1] == "dp"}
        parameters = sg.named_shardings(model)
        local = sum(p.numel() for _, p, _ in parameters) * 8
        losses = 3 * 2 * 8  # the sum and the number of tokens of each micro-batch: an all-reduce of one element
        count, size = sent[way]["all-reduce", "dp"]
        if way == "at once":  # each parameter, each time; norms' weights and biases go together
            assert size in range(3 * local, 3 * local + losses + 1)
            assert count == 3 * (len(parameters) - 5 + 2)
        elif way == "once":  # everything, one time
            assert size in range(local, local + losses + 1)
            assert count == 1 + 3 * 2
        else:  # vectors one time; matrices are gathered twice and reduce-scattered once a micro-batch
            vectors = sum(p.numel() for _, p, sharding in parameters if "dp" not in sharding.spec.axes) * 8
            matrices = local - vectors
            assert size in range(vectors, vectors + losses + 1)
            assert count == 1 + 3 * 2
            # Tables are gathered in forward alone; nothing here is uneven over two ranks but the vocabulary.
            tables = sum(p.numel() for n, p, _ in parameters if n in ("embedding.weight", "positions.weight")) * 8
            assert sent[way]["all-gather", "dp"][1] == 3 * (2 * matrices - tables)
            assert sent[way]["reduce-scatter", "dp"][1] == 3 * matrices


@distributed(world_size=[2])
def test_what_is_deferred_is_partial_until_reduced(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model, values = decoder(mesh, data=sg.BatchAxis("dp", accumulate=True), kind="gpt")
    ids, targets = tokens(BATCH)
    plain = reference(values, kind="gpt")
    plain.loss(ids, targets).backward()
    mine = slice(0, 6) if mesh.get_rank() == 0 else slice(6, 12)
    model.loss(ids[mine], targets[mine]).backward()
    head = model.get_parameter("head.weight")
    right = plain.parameter_of("head.weight").grad
    assert float((head.grad - right).norm()) > 0.1 * float(right.norm())  # this rank's term alone
    model.get_parameter("norm.bias").grad = None  # as if this rank had not used it
    sg.all_reduce_partial_grads_(model)
    torch.testing.assert_close(head.grad, right, rtol=1e-12, atol=1e-15)
    assert torch.equal(model.get_parameter("norm.bias").grad, torch.zeros(12, dtype=torch.float64))
