"""Models of transformers, parallelized by the plans that are known, against themselves on one device."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from one_device import GROUPED, KNOWN, Heads, S, assert_calls_agree, backward, batch, line, plain

import shardgrad as sg
from shardgrad.testing import distributed


def agree(name: str, world_size: int, heads: Heads, attention: str) -> None:
    one, model = plain(name, heads, attention), plain(name, heads, attention)
    kinds = [type(module) for module in model.modules()]
    assert sg.parallelize(model, line(world_size)) is model
    assert [type(module) for module in model.modules()] != kinds
    assert sg.num_parameters(model) == one.num_parameters()
    assert list(dict(model.named_parameters())) == list(dict(one.named_parameters()))
    assert_calls_agree(model, one, batch(name))


# KV heads that are not those of a rank's query heads; and one KV head, with fewer query heads than ranks.
QUICK = {2: ((6, 3), "sdpa"), 3: ((2, 1), "eager")}


@pytest.mark.parametrize("name", KNOWN)
@distributed(world_size=[2, 3])
def test_loss_and_every_gradient(world_size: int, name: str) -> None:
    heads, attention = QUICK[world_size]
    agree(name, world_size, heads if name in GROUPED else (5, 5) if world_size == 2 else (2, 2), attention)


HEADS: dict[int, tuple[Heads, ...]] = {
    1: ((6, 3),),
    2: ((5, 1), (8, 4)),
    3: ((8, 4), (10, 2)),
    4: ((6, 3), (2, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
@distributed(world_size=[1, 2, 3, 4], timeout=180)
def test_heads_of_all_kinds(world_size: int, name: str) -> None:
    """Of both ways to attend; aligned or not, and more ranks than heads."""
    for attention, heads in zip(("eager", "sdpa"), HEADS[world_size]):
        agree(name, world_size, heads if name in GROUPED else (heads[0], heads[0]), attention)


@distributed(world_size=[2, 3])
def test_gradients_of_a_shared_input_are_summed_once(world_size: int) -> None:
    """Twelve all-reduces: the embedding, two of each layer, two of the loss; and for each input that is entered."""
    model = plain("llama", (4, 2))
    sg.parallelize(model, line(world_size))
    given = batch("llama")
    backward(model, given)
    with sg.trace_collectives() as trace:
        backward(model, given)
    assert [event.operation for event in trace] == ["all-reduce"] * len(trace)
    activations, numbers = 2 * S * 28 * 8, 2 * S * 8
    assert len(trace) == 12
    every: list[int] = [0] * world_size
    dist.all_gather_object(every, trace.bytes)
    assert sum(every) == 2 * (world_size - 1) * (10 * activations + 3 * numbers)
