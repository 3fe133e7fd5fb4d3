"""Models of which no plan is known: a draft, plans written by hand, and transformers' names of styles."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_device import Float64, V, assert_calls_agree, assert_same_gradients, batch, line, plain
from torch import Tensor, nn

import shardgrad as sg
from shardgrad.testing import distributed


def phi() -> Any:
    import transformers as hf

    config = hf.PhiConfig(
        vocab_size=V, hidden_size=40, num_attention_heads=5, num_hidden_layers=2, intermediate_size=29,
        max_position_embeddings=16, partial_rotary_factor=0.5, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model, generator = hf.PhiForCausalLM(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() < 2 else 0.25 * noise)
    return model.double().train()


@distributed(world_size=[2, 3])
def test_a_draft_completed(world_size: int) -> None:
    one, model = phi(), phi()
    before = list(map(id, model.modules()))
    with pytest.raises(
        sg.LayoutError, match=r"no plan is known for the architecture 'phi' \(PhiForCausalLM\)"
    ) as error:
        sg.parallelize(model, line(world_size))
    assert list(map(id, model.modules())) == before
    text = str(error.value)
    assert re.search(r"known are bert, .*, vit\. Give one, as plan=", text)
    plan = ast.literal_eval(text[text.index("\n{") + 1 :])
    assert plan == {
        "model.embed_tokens": "v/tp -> d",
        "model.layers.*.self_attn.q_proj": "d -> h/tp,k",
        "model.layers.*.self_attn.k_proj": "d -> h/tp,k",
        "model.layers.*.self_attn.v_proj": "d -> h/tp,k",
        "model.layers.*.self_attn.dense": "h/tp,k -> d",
        "model.layers.*.mlp.fc1": "d -> f/tp",
        "model.layers.*.mlp.fc2": "f/tp -> d",
        "lm_head": "d -> v/tp",
    }
    with pytest.raises(sg.LayoutError, match=r"has 40 features, which h/tp,k with h=\?, k=\? .* give sizes=\{'h': …\}"):
        sg.parallelize(model, line(world_size), plan)
    assert list(map(id, model.modules())) == before
    sg.parallelize(model, line(world_size), plan, sizes={"k": 8})
    assert_calls_agree(model, one, batch("llama"))


FALCON = {
    "**.self_attention.dense": "h/tp,k -> d",
    "**.self_attention.num_heads": "h/tp",
    "**.mlp.dense_h_to_4h": "d -> f/tp",
    "**.mlp.dense_4h_to_h": "f/tp -> d",
    "**.word_embeddings": "v/tp -> d",
    "lm_head": "d -> v/tp",
}


@distributed(world_size=[2, 3])
def test_plans_by_hand_of_falcon(world_size: int) -> None:
    """Every head with its own keys and values, interleaved; and one KV head, whole on every rank, for all of them."""
    interleaved = {
        "**.self_attention.query_key_value": "d -> h/tp,c,k",
        "**.self_attention.num_kv_heads": "h/tp",
        **FALCON,
    }
    shared = {"**.self_attention.query_key_value": "d -> h/tp,k + g,k + g,k", **FALCON}
    for changes, plan, letters in (
        ({}, interleaved, {"c": 3, "k": 6, "h": 5}),
        ({"multi_query": True}, shared, {"h": 5, "g": 1, "k": 6}),
    ):
        one, model = plain("falcon", (5, 5), **changes), plain("falcon", (5, 5), **changes)
        sg.parallelize(model, line(world_size), plan, sizes=letters)
        assert_calls_agree(model, one, batch("falcon"))


@distributed(world_size=2)
def test_an_integer_that_a_plan_lacks_is_hinted_at(world_size: int) -> None:
    model = plain("falcon", (5, 5), multi_query=True)
    plan = {"**.self_attention.query_key_value": "d -> h/tp,k + g,k + g,k", **FALCON}
    del plan["**.self_attention.num_heads"]
    sg.parallelize(model, line(world_size), plan, sizes={"h": 5, "g": 1, "k": 6})
    with pytest.raises(RuntimeError) as error:
        model(**batch("falcon"))
    said = "\n".join(error.value.__notes__)
    assert re.search(
        r"in transformer.h.0.self_attention of .*\n\(it reads .*num_heads=5.* need an entry in the plan", said
    )


class Mixer(nn.Module):
    """Heads with a norm and a gate of their own, between a column and a row parallel layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(4)
        self.gate = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.zeros(10))
        self.down = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (-1, 4))
        heads = self.norm(heads) * torch.sigmoid(self.gate + heads)
        return x * (1 + self.scale) + self.down(heads.flatten(-2))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 10)
        self.blocks = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Linear(10, 13)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


PLAN = {
    "embed": "v/tp -> d",
    "blocks.*.up": "d -> h/tp,k",
    "blocks.*.down": "h/tp,k -> d",
    "head": "d -> v/tp -> v",
}


def filled() -> Plain:
    model, generator = Plain().double(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@distributed(world_size=[2, 3])
def test_a_module_of_ones_own(world_size: int) -> None:
    """Norms and gates of heads have a term of their gradient on each rank, which the first call finds; others not."""
    generator = torch.Generator().manual_seed(3)
    ids, target = (torch.randint(13, (2, 5), generator=generator) for _ in range(2))
    for axis in ("tp", "model"):
        one, model = filled(), filled()
        plan = {name: text.replace("/tp", f"/{axis}") for name, text in PLAN.items()}
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world_size,), mesh_dim_names=(axis,))
        sg.parallelize(model, mesh, plan, sizes={"k": 4}, axis=axis)
        for call in range(3):
            for each in (one, model):
                each.zero_grad()
            if call == 2:  # by name: a call of another kind
                losses = [each(ids, target=target) for each in (one, model)]
            else:
                losses = [each(ids, target) for each in (one, model)]
            for loss in losses:
                loss.backward()
            assert abs(losses[0] - losses[1]) <= 1e-13
            assert_same_gradients(model, one, 1e-12)
        expected = one.state_dict()
        for key, value in sg.state_dict(model).items():
            assert torch.equal(value, expected[key]), key


@distributed(world_size=[2, 3])
def test_a_known_head_that_is_gathered(world_size: int) -> None:
    """Its loss is then the model's own, of whole logits."""
    one, model = plain("llama", (6, 6)), plain("llama", (6, 6))
    from shardgrad.models.architectures import architecture_of

    known = architecture_of(model)
    assert known is not None
    sg.parallelize(model, line(world_size), {**known.plan, "**.lm_head": "d -> v/tp -> v"}, sizes=known.sizes)
    assert_calls_agree(model, one, batch("llama"))
    with Float64():
        assert model(**batch("llama")).logits.shape == (2, 7, V)


@distributed(world_size=[2, 3])
def test_styles_of_transformers(world_size: int) -> None:
    one, model = plain("llama"), plain("llama")
    styles = {
        **model.config.base_model_tp_plan,
        "embed_tokens": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
    }
    sg.parallelize(model, line(world_size), styles)
    sharded = {name for name, _, sharding in sg.named_shardings(model) if sharding is not None and sharding.spec.axes}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"} <= sharded
    assert_calls_agree(model, one, batch("llama"))
    fused = plain("phi3")
    before = list(map(id, fused.modules()))
    with pytest.raises(
        sg.LayoutError, match=r"qkv_proj: 'colwise_gather_output' does not say how its features are stored: write it as"
    ):
        sg.parallelize(fused, line(world_size), fused.config.base_model_tp_plan)
    assert list(map(id, fused.modules())) == before
