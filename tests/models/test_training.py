"""Training a parallelized model as one trains any: recomputation, frozen and tied parameters, other precisions, copies,
optimizers; each against the same on one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from one_device import (
    Heads,
    S,
    assert_calls_agree,
    assert_same_gradients,
    backward,
    batch,
    line,
    loss_of,
    plain,
    whole,
)
from torch import Tensor

import shardgrad as sg
from shardgrad.testing import distributed

HEADS: dict[int, Heads] = {2: (6, 3), 3: (2, 1)}  # KV heads that ranks share; more ranks than heads


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@distributed(world_size=2)
def test_recomputation(world_size: int, reentrant: bool, sequence: bool) -> None:
    """Of two calls of other lengths, of which backward recomputes the first when the second has been."""
    one, model = plain("llama"), plain("llama")
    sg.parallelize(model, line(world_size), sequence=sequence)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_calls_agree(model, one, batch("llama"), exact=False)
    for each in (one, model):
        each.zero_grad()
        first, second = (loss_of(each, batch("llama", length=length)) for length in (S, S - 2))
        (first + 2 * second).backward()
    assert_same_gradients(model, one, 1e-5)


@distributed(world_size=[2, 3])
def test_frozen_parameters(world_size: int) -> None:
    one, model = (plain("qwen3", HEADS[world_size]) for _ in range(2))
    for each in (one, model):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not any(part in name for part in ("layers.0", "embed", "up_proj", "k_norm")))
    sg.parallelize(model, line(world_size))
    assert_calls_agree(model, one, batch("qwen3"))
    one.model.layers[0].requires_grad_(True)
    model.model.layers[0].requires_grad_(True)  # thawed
    assert_calls_agree(model, one, batch("qwen3"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5"])
@distributed(world_size=2)
def test_ties(world_size: int, name: str) -> None:
    changes = {"tie_word_embeddings": True} if name in ("llama", "gemma2", "t5") else {}
    one, model = (plain(name, (4, 2) if name in ("llama", "gemma2") else (4, 4), **changes) for _ in range(2))
    names = {key for key, _ in one.named_parameters()}
    sg.parallelize(model, line(world_size))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight
    assert {key for key, _ in model.named_parameters()} == names
    assert sg.num_parameters(model) == one.num_parameters()
    assert_calls_agree(model, one, batch(name))
    assert head.weight.grad.shape[0] == (27, 26)[torch.distributed.get_rank()]


@distributed(world_size=2)
def test_positions_of_padding_get_no_gradient(world_size: int) -> None:
    one, model = (plain("llama", (4, 2), pad_token_id=17) for _ in range(2))
    sg.parallelize(model, line(world_size))
    given = batch("llama")
    given["input_ids"][0, 3] = given["input_ids"][1, 0] = 17
    assert_calls_agree(model, one, given)
    grad = {key: whole(p.grad, s) for key, p, s in sg.named_shardings(model)}["model.embed_tokens.weight"]
    assert not grad[17].any()
    assert grad[given["input_ids"][0, 0]].any()


def gradients(model: Any) -> dict[str, Tensor]:
    return {key: whole(p.grad, s).double() for key, p, s in sg.named_shardings(model) if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@distributed(world_size=2)
def test_precision_is_what_one_device_has(world_size: int, how: str, name: str) -> None:
    """Off from float64 by about as much as one device in that precision: sums over ranks round once more."""
    heads, given = (6, 3) if name == "llama" else (5, 5), batch(name)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    exact = plain(name, heads)
    right = backward(exact, given)
    losses, found = [], []
    for sharded in (False, True):
        model = plain(name, heads, dtype=dtype)
        with torch.no_grad():
            for parameter, wide in zip(model.parameters(), exact.parameters()):
                assert (parameter.double() - wide).norm() <= 2**-8 * wide.norm()
        if sharded:
            sg.parallelize(model, line(world_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = loss_of(model, given)
        loss.backward()
        losses.append(loss.detach().double())
        found.append(gradients(model))
    every = float(torch.stack([p.grad.norm() for p in exact.parameters()]).norm())
    assert abs(losses[1] - right) <= 4 * abs(losses[0] - right) + 2**-8 * abs(right)
    for key, p in exact.named_parameters():
        off = [float((grads[key] - p.grad).norm()) for grads in found]
        assert off[1] <= 3 * off[0] + 2**-9 * 0.1 * every, (key, off, every)
        assert off[1] <= 0.3 * float(p.grad.norm()) + 2**-9 * every, (key, off, float(p.grad.norm()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as dynamo does
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@distributed(world_size=2, timeout=300)
def test_compiled_blocks(world_size: int, name: str) -> None:
    """To the rounding of float32, in which norms and softmax are computed."""
    one, model = (plain(name, (6, 3) if name != "gpt2" else (5, 5)) for _ in range(2))
    sg.parallelize(model, line(world_size))
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    for at in range(len(blocks)):
        blocks[at] = torch.compile(blocks[at], fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for each in (one, model):
            each.zero_grad()
            loss_of(each, batch(name)).backward()
        assert_same_gradients(model, one, 1e-5)


@distributed(world_size=[2, 3])
def test_a_copy_is_a_model_of_its_own(world_size: int) -> None:
    """Also one made after the first call, in which gradients were found to be sums."""
    one, model = (plain("qwen3", HEADS[world_size]) for _ in range(2))
    sg.parallelize(model, line(world_size))
    given = batch("qwen3")
    copies = [copy.deepcopy(model)]
    assert_calls_agree(model, one, given)
    copies.append(copy.deepcopy(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # not theirs
    for each in copies:
        assert_calls_agree(each, one, given)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(3.0)
    assert_calls_agree(model, one, given)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
@distributed(world_size=[2, 3])
def test_steps_clipped(world_size: int, name: str, optimizer: str) -> None:
    heads = HEADS[world_size] if name == "phi3" else (5, 5)
    one, model = plain(name, heads), plain(name, heads)
    sg.parallelize(model, line(world_size))
    optimizers = [OPTIMIZERS[optimizer](each) for each in (one, model)]
    for most in (0.7, 1e6):
        backward(one, batch(name))
        backward(model, batch(name))
        right = torch.nn.utils.clip_grad_norm_(one.parameters(), most)
        assert abs(sg.clip_grad_norm_(model, most) - right) <= 1e-10 * right
        for each in optimizers:
            each.step()
    found, expected = sg.state_dict(model), one.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    other = sg.parallelize(plain(name, heads), line(world_size))
    sg.load_state_dict(other, expected)
    for key, value in sg.state_dict(other).items():
        assert torch.equal(value, expected[key]), key
