"""What `parallelize` keeps of a model, and what it takes from its callers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from one_device import Float64, S, V, assert_calls_agree, assert_same_gradients, batch, line, plain
from torch import Tensor, nn

import shardgrad as sg
from shardgrad.testing import distributed


@distributed(world_size=[2, 3])
def test_hooks_modes_and_configurations_stay(world_size: int) -> None:
    model = plain("phi3", (4, 2))
    seen: list[tuple[str, Any]] = []
    layer = model.model.layers[1]
    layer.self_attn.qkv_proj.register_forward_hook(lambda module, args, y: seen.append(("forward", y.shape)))
    layer.mlp.down_proj.register_full_backward_hook(lambda module, dx, dy: seen.append(("backward", dy[0].shape)))
    layer.mlp.eval()
    config, text = model.config, copy.deepcopy(model.config.to_dict())
    own = model.model.layers[0].self_attn.config
    sg.parallelize(model, line(world_size))
    assert model.config is config
    assert config.to_dict() == text
    assert own.num_attention_heads == 4
    assert model.training
    assert layer.self_attn.qkv_proj.training
    assert not layer.mlp.down_proj.training
    assert not layer.mlp.gate_up_proj.training
    model(**batch("phi3")).loss.backward()
    assert [name for name, _ in seen] == ["forward", "backward"]
    assert seen[1][1] == (2, S, 28)


@distributed(world_size=[2, 3])
def test_labels_as_transformers_takes_them(world_size: int) -> None:
    """Shifted by the caller; a sum over the tokens that the caller counts (as Trainer does); and no labels."""
    one, model = plain("llama"), plain("llama")
    sg.parallelize(model, line(world_size))
    given = batch("llama")
    shifted = torch.randint(0, V, (2, S), generator=torch.Generator().manual_seed(9))
    shifted[1, 3:] = -100
    for more in (
        {"shift_labels": shifted},
        {"num_items_in_batch": torch.tensor(29)},
        {"shift_labels": shifted, "num_items_in_batch": 3},
    ):
        assert_calls_agree(model, one, {**given, **more})
    for each in (one, model):
        each.zero_grad()
        with Float64():  # a loss of one's own, of logits that are whole; positions by place
            logits = each(given["input_ids"], given["attention_mask"]).logits
            F.cross_entropy(logits.flatten(0, 1), shifted.flatten()).backward()
        assert logits.shape == (2, S, V)
    assert_same_gradients(model, one)


class Gated(nn.Module):
    """A layer whose second norm is of calls with another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.first, self.second = nn.LayerNorm(2), nn.LayerNorm(2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, again: bool | None = None, how: str = "") -> Tensor:
        heads = self.first(self.up(x).unflatten(-1, (-1, 2)))
        if again:
            heads = self.second(heads)
        if how == "scale of both":
            x, heads = x * self.scale.sum(), heads * self.scale
        y = self.down(heads.flatten(-2))
        if how == "weight elsewhere":
            y = y + self.up.weight.square().mean()
        return x + y if how != "mixed" else (heads * x[..., :2].unsqueeze(-2)).flatten(-2)


def gated() -> Gated:
    model, generator = Gated().double(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


PLAN = {"up": "d -> h/tp,k", "down": "h/tp,k -> d"}


@distributed(world_size=[2, 3])
def test_calls_of_each_kind_are_watched(world_size: int) -> None:
    """A norm that only calls with another argument meet; also where a call before it has failed."""
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    dy = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    one, model = gated(), gated()
    sg.parallelize(model, line(world_size), PLAN, sizes={"k": 2})
    for again in (None, True, None, True):
        for each in (one, model):
            each.zero_grad()
            (each(x, again) * dy).sum().backward()
        assert_same_gradients(model, one, 1e-12)


@distributed(world_size=[2, 3])
def test_gradients_that_would_be_wrong_in_part_are_refused(world_size: int) -> None:
    """Each time: a call that was refused is watched again."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for how, match in (
        ("scale of both", r"scale is used with tensors that are sharded over tp and with such as are replicated"),
        ("weight elsewhere", r"Gated uses up.weight, of which a rank has a part only, outside of its layer: leave it"),
        ("mixed", r"Gated: mul of a tensor that is replicated over tp, \(3, 1, 2\), and one that is sharded"),
    ):
        model = sg.parallelize(gated(), line(world_size), PLAN, sizes={"k": 2})
        for _ in range(2):
            with pytest.raises(sg.LayoutError, match=match):
                model(x, how=how)


@distributed(world_size=2)
def test_on_the_meta_device(world_size: int) -> None:
    """Nothing is stored before values are; shapes are this rank's."""
    exact = plain("llama")
    with torch.device("meta"):
        model = type(exact)(exact.config)
    sg.parallelize(model, line(world_size))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sg.num_parameters(model) == exact.num_parameters()
    assert model.lm_head.weight.shape == ((27, 26)[dist.get_rank()], 30)
