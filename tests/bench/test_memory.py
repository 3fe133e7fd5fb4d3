"""What layers keep for backward, to the byte, on one rank of 1, 2 and 4; and beside the paper's formulas."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.bench.memory import RECOMPUTED, SCHEMES, Sizes, counted, expected, kept_bytes, one_rank_of, paper

S, B, H, F = 16, 2, 24, 40
SB = S * B


def of(layer: nn.Module, shape: tuple[int, ...], *arguments: Any) -> int:
    """What a layer keeps of an input that needs its gradient, in float32 elements."""
    x = torch.randn(shape, requires_grad=True)
    layer(x, *arguments)
    count = kept_bytes(lambda: layer(x, *arguments), layer.parameters())
    assert count % 4 == 0
    return count // 4


@pytest.mark.parametrize("t", [1, 2, 4])
def test_linear_layers_keep_their_input_as_it_is_stored(t: int) -> None:
    with one_rank_of(t):
        where: dict[str, Any] = {"mesh": init_device_mesh("cpu", (t,), mesh_dim_names=("tp",))}
        whole, cut = (B, S, H), (B, S // t, H)
        assert of(sg.ColumnParallelLinear(H, F, **where), whole) == SB * H
        assert of(sg.ColumnParallelLinear(H, F, sequence_dim=1, **where), cut, S) == SB * H // t
        assert of(sg.ColumnParallelLinear(H, F, sequence_dim=1, save_gathered=("X",), **where), cut, S) == SB * H
        for sequence_dim in (None, 1):
            row = sg.RowParallelLinear(H, F, sequence_dim=sequence_dim, **where)
            assert of(row, (B, S, H // t), S) == SB * H // t
        frozen = sg.ColumnParallelLinear(H, F, **where)
        frozen.weight.requires_grad_(False)
        assert of(frozen, whole) == 0


@pytest.mark.parametrize("t", [1, 2, 4])
def test_blocks_of_a_decoder(t: int) -> None:
    with one_rank_of(t):
        mesh = init_device_mesh("cpu", (t,), mesh_dim_names=("tp",))
        where: dict[str, Any] = {"mesh": mesh, "sequence_dim": 1}
        x = B, S // t, H
        # X; what GELU reads, and what it makes.
        assert of(sg.MLP(H, F, **where), x, S) == (SB * H + 2 * SB * F) // t
        # X; gate, up, and the hidden features: silu(gate) is computed again.
        assert of(sg.SwiGLU(H, F, **where), x, S) == (SB * H + 3 * SB * F) // t
        # X; Q, K, V and A; of each row and head the log of its sum: no scores.
        assert of(sg.Attention(H, 4, **where), x, S) == (5 * SB * H + SB * 4) // t
        # X, and of each row its mean and deviation: no copy of weight and bias.
        assert of(sg.LayerNorm(H, **where), x) == (SB * H + 2 * SB) // t
        # On CPUs torch also keeps the rows as they are before the weight.
        assert of(sg.RMSNorm(H, **where), x) == (2 * SB * H + SB) // t


@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_block_keeps_what_the_formulas_say_and_less_than_the_papers(t: int) -> None:
    for x, scheme, recompute in product(
        (Sizes(S, B, 32, 4, t), Sizes(8, 3, 64, 8, t)),
        SCHEMES,
        RECOMPUTED,
    ):
        with one_rank_of(t):
            found = counted(x, scheme, recompute)
        assert found == expected(x, scheme, recompute)
        assert found <= paper(x, scheme, recompute)
        assert found < paper(x, scheme, recompute) or recompute == "block"


def test_the_papers_table() -> None:
    """Of the paper's 22B model (h = 6144, a = 64, s = 2048, b = 4, t = 8), in multiples of sbh: 34 + 5as/h = 140.7."""
    x = Sizes(2048, 4, 6144, 64, 8)
    sbh = 2048 * 4 * 6144
    assert paper(x, "tp+sp", "nothing") / sbh == pytest.approx((34 + 5 * 64 * 2048 / 6144) / 8)
    assert paper(x, "tp", "nothing") / sbh == pytest.approx(10 + 24 / 8 + 5 * 64 * 2048 / 6144 / 8)
    assert paper(x, "tp", "attention") / sbh == pytest.approx(13)
    assert paper(x, "tp+sp", "attention") / sbh == pytest.approx(34 / 8)
    assert paper(x, "tp", "block") / sbh == 2


def test_a_storage_is_counted_once_and_whole() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    w = torch.randn(4, 4, requires_grad=True)

    def call() -> Tensor:
        y = x * 1.0  # keeps nothing
        return (y[:3] @ w).sum() + (y @ w).sum() + y.sum()

    assert kept_bytes(call, [w]) == 6 * 4 * 4
    assert kept_bytes(call) == (6 * 4 + 4 * 4) * 4


def test_silu_computed_again_changes_no_bit() -> None:
    from shardgrad.nn.mlp import _Gated

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        made = []
        for call in (lambda g, u: torch.nn.functional.silu(g) * u, _Gated.apply):
            generator = torch.Generator().manual_seed(3)
            g, u, dh = (torch.randn(5, 7, generator=generator).to(dtype).requires_grad_() for _ in range(3))
            h = call(g, u)
            h.backward(dh.detach())
            made.append((h.detach(), g.grad, u.grad))
        for one, other in zip(*made):
            assert torch.equal(one, other)
