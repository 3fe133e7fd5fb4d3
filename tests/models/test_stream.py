"""Activations sharded along the sequence between the layers: the same loss and gradients as on one device."""

from __future__ import annotations

import pytest
from one_device import GROUPED, KNOWN, assert_calls_agree, backward, batch, line, plain

import shardgrad as sg
from shardgrad.testing import distributed

STREAMED = [name for name in KNOWN if name != "opt"]
ALIKE = ("mistral", "qwen2", "gemma3", "qwen3", "gpt_neox", "bert alone")  # others go the same way


def agree(name: str, world_size: int, lengths: tuple[int, ...]) -> None:
    heads = (6, 3) if name in GROUPED else (5, 5)
    one, model = plain(name, heads), plain(name, heads)
    sg.parallelize(model, line(world_size), sequence=True)
    for length in lengths:
        assert_calls_agree(model, one, batch(name, length=length), calls=2 if length == lengths[0] else 1)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in STREAMED])
@distributed(world_size=3)
def test_a_sequence_that_ranks_do_not_divide(world_size: int, name: str) -> None:
    """Seven tokens; then fewer than ranks."""
    agree(name, world_size, (7,) if name == "vit" else (7, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
@distributed(world_size=[2, 4], timeout=180)
def test_lengths_of_all_kinds(world_size: int, name: str) -> None:
    agree(name, world_size, (7,) if name == "vit" else (7, 2, 8))


@distributed(world_size=2)
def test_collectives_of_a_stream(world_size: int) -> None:
    """In place of each all-reduce between the layers, a gather and a reduce-scatter."""
    counts = {}
    for sequence in (False, True):
        model = plain("llama", (4, 2))
        sg.parallelize(model, line(world_size), sequence=sequence)
        for _ in range(2):
            with sg.trace_collectives() as trace:
                backward(model, batch("llama"))
        counts[sequence] = trace.totals()
    assert counts[False].keys() == {("all-reduce", "tp")}
    assert {key[0] for key in counts[True]} == {"all-reduce", "all-gather", "reduce-scatter"}, counts[True]


@distributed(world_size=2)
def test_where_it_cannot_be(world_size: int) -> None:
    model = plain("opt", (4, 4))
    before = list(map(id, model.modules()))
    with pytest.raises(sg.LayoutError, match="sequence=True: OPT's layers merge batch and sequence into one dim"):
        sg.parallelize(model, line(world_size), sequence=True)
    texts = {"model.layers.0": "s -> s/tp", "model.norm": "s/tp -> s"}
    for wrong, match in (
        ({**texts, "model.layer.0": "s/tp -> s"}, r"'model.layer.0' means no module"),
        ({"model.norm": "s/tp -> s"}, r"no module starts the stream, 's -> s/tp'"),
        ({**texts, "model.norm": "s/tp => s"}, r"model.norm: 's/tp => s' is none of"),
        ({"model.layers.0": "s -> s/tp", "lm_head": "s/tp -> s"}, r"lm_head is in none of the streams"),
    ):
        other = plain("llama", (4, 2))
        kept = list(map(id, other.modules()))
        with pytest.raises(sg.LayoutError, match=match):
            sg.parallelize(other, line(world_size), sequence=wrong)
        assert list(map(id, other.modules())) == kept
    assert list(map(id, model.modules())) == before
