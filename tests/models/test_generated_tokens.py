"""`generate` of a parallelized model: token by token what one device gives, with a KV cache of this rank's heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_device import Float64, Heads, batch, line, plain

import shardgrad as sg
from shardgrad.testing import distributed

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 20.0, "top_k": 40},
    "beams": {"num_beams": 2, "do_sample": False},
}


def tokens(model: Any, name: str, **how: Any) -> torch.Tensor:
    given = batch(name)
    torch.manual_seed(3)
    with Float64():
        return model.generate(given["input_ids"], max_new_tokens=6, eos_token_id=-1, pad_token_id=0, **how)


def agree(name: str, world_size: int, heads: Heads) -> None:
    one, model = plain(name, heads).eval(), plain(name, heads).eval()
    sg.parallelize(model, line(world_size))
    made = set()
    for way in WAYS.values():
        right = tokens(one, name, **way)
        assert torch.equal(tokens(model, name, **way), right), way
        made |= set(right[:, -6:].flatten().tolist())
    assert len(made) > 3, "hardly a choice"
    given = {key: value for key, value in batch(name).items() if key != "labels"}
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad(), Float64():
        found, right = model(**given).logits, one(**given).logits
    assert found.shape == right.shape
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@distributed(world_size=[2, 3])
def test_every_token(world_size: int) -> None:
    agree("llama", world_size, {2: (6, 3), 3: (2, 1)}[world_size])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "gpt2", "gpt_neox", "t5"])
@distributed(world_size=[2, 3], timeout=120)
def test_every_token_of_each_architecture(world_size: int, name: str) -> None:
    grouped = name not in ("gpt2", "gpt_neox", "t5")
    agree(name, world_size, {2: (6, 3), 3: (8, 4)}[world_size] if grouped else (5, 5))


@distributed(world_size=2)
def test_ranks_that_sample_differently(world_size: int) -> None:
    model = sg.parallelize(plain("llama").eval(), line(world_size))
    torch.manual_seed(dist.get_rank())
    with pytest.raises(sg.DisagreementError, match=r"must sample alike. Seed them alike \(torch.manual_seed\)"):
        model.generate(
            batch("llama")["input_ids"], max_new_tokens=20, do_sample=True, temperature=5.0, eos_token_id=-1,
            pad_token_id=0,
        )  # fmt: skip
