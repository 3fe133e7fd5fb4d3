"""LoRA of peft, sharded as the layers that it stands beside, against itself on one device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from one_device import Heads, assert_calls_agree, batch, line, plain
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head")
KINDS: dict[str, tuple[str, ...]] = {
    "llama": LLAMA,
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj"),
}


def adapted(model: Any, targets: tuple[str, ...], **settings: Any) -> Any:
    """A model with adapters whose A and B are random."""
    import peft

    conv1d = model.config.model_type == "gpt2"
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), fan_in_fan_out=conv1d, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        made = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.double()


def agree(name: str, world_size: int, heads: Heads, sequence: bool) -> None:
    one, model = (adapted(plain(name, heads), KINDS[name]) for _ in range(2))
    sg.parallelize(model, line(world_size), sequence=sequence)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in one.named_parameters() if p.requires_grad}
    assert all("lora_" in key for key in trained)
    assert_calls_agree(model, one, batch(name))
    sharded = {key for key, _, sharding in sg.named_shardings(model) if sharding is not None and sharding.spec.axes}
    assert any("lora_A" in key for key in sharded)
    assert any("lora_B" in key for key in sharded)
    for one_config, other in zip(one.peft_config.values(), model.peft_config.values()):
        assert one_config == other


@pytest.mark.parametrize("name", KINDS)
@distributed(world_size=[2, 3])
def test_gradients_of_adapters_alone(world_size: int, name: str) -> None:
    """KV heads that are not aligned on both."""
    heads = {2: (6, 3), 3: (8, 4)}[world_size]
    agree(name, world_size, (5, 5) if name == "gpt2" else heads, sequence=world_size == 2)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", KINDS)
@distributed(world_size=[1, 4], timeout=120)
def test_heads_and_streams(world_size: int, name: str, sequence: bool) -> None:
    for heads in ((5, 5), (2, 2)) if name == "gpt2" else ((6, 3), (2, 1)):
        agree(name, world_size, heads, sequence)


@distributed(world_size=2)
def test_adapters_that_are_refused(world_size: int) -> None:
    mesh = line(world_size)
    merged = adapted(plain("llama", (4, 2)), LLAMA)
    merged.merge_adapter()
    for model, match in (
        (adapted(plain("llama", (4, 2)), LLAMA, use_dora=True), r"q_proj has DoRA's magnitudes.*use_dora=False"),
        (
            adapted(plain("llama", (4, 2)), ("embed_tokens",)),
            r"embed_tokens is an embedding with LoRA: leave it out of",
        ),
        (adapted(plain("llama", (4, 2)), LLAMA, lora_dropout=0.1), r"q_proj.lora_dropout.default drops .* 0\.1"),
        (merged, r"q_proj has its adapters merged: unmerge them first \(model.unmerge_adapter\(\)\)"),
    ):
        before = list(map(id, model.modules()))
        with pytest.raises(sg.LayoutError, match=match):
            sg.parallelize(model, mesh)
        assert list(map(id, model.modules())) == before


@distributed(world_size=2)
def test_adapters_come_first(world_size: int) -> None:
    model = sg.parallelize(plain("llama", (4, 2)), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    with pytest.raises(ValueError, match=r"Target module .* is not supported"):
        adapted(model, ("q_proj",))
