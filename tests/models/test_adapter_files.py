"""Folders of peft's adapters, out of models on any mesh and into them, to the bits of plain peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_models import on_meta, plain
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "phi3": ["qkv_proj", "down_proj"],
}


def adapted(model: Any, name: str) -> Any:
    """A model with adapters around it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for a name that peft still uses
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2")
        return peft.get_peft_model(model, config)


@pytest.mark.slow
@distributed(world_size=[2, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_from_peft_and_back(world_size: int, name: str, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(7)
    single = adapted(plain(name), name).eval()
    with torch.no_grad():
        for at, parameter in enumerate(p for n, p in single.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)))
    if dist.get_rank() == 0:
        single.save_pretrained(tmp_path / "theirs")
        plain(name).save_pretrained(tmp_path / "base")
    dist.barrier()

    model = sg.parallelize(adapted(on_meta(name), name).eval(), mesh)
    sg.load_pretrained(model, tmp_path / "base")
    first = {n: p for n, p in sg.state_dict(model).items() if "lora_" in n}
    assert all(bool(p.any()) == ("lora_A" in n) for n, p in first.items())  # peft's initial values
    sg.load_pretrained(model, tmp_path / "theirs")
    state, wanted = sg.state_dict(model), single.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    ids = torch.arange(8).view(2, 4)
    ours, theirs = model(input_ids=ids).logits, single(input_ids=ids).logits
    # Sums of float32 in another order: a hundred of its units in the last place of the largest.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=100 * 2.0**-24 * float(theirs.detach().abs().max()))

    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(plain(name), tmp_path / "ours").eval()
    assert torch.equal(loaded(input_ids=ids).logits, single(input_ids=ids).logits)


@pytest.mark.slow
@distributed(world_size=2)
def test_another_adapter_is_refused_and_nothing_is_changed(world_size: int, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    if dist.get_rank() == 0:
        adapted(plain("llama"), "llama").save_pretrained(tmp_path / "adapter")
    dist.barrier()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = sg.parallelize(get_peft_model(plain("llama"), config), mesh)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"another adapter than this model has[\s\S]*unknown: .*down_proj.lora_A"
    ) as all_of:
        sg.load_pretrained(model, tmp_path / "adapter")
    assert "q_proj.lora_A.weight: global shape (2, 20) in the model, (3, 20) in the folder" in str(all_of.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
