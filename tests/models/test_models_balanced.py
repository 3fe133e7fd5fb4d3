"""Models of transformers on a balanced axis: heads, KV heads, hidden features and the vocabulary."""

from __future__ import annotations

import pytest
from one_device import Heads, assert_calls_agree, batch, line, plain

import shardgrad as sg
from shardgrad.layout.sizes import chunks
from shardgrad.testing import distributed


@distributed(world_size=[3, 4])
@pytest.mark.parametrize(
    ("name", "heads"), [("llama", (7, 7)), ("olmo2", (4, 2)), ("gpt2", (4, 4)), ("mixtral", (4, 2))]
)
def test_as_on_one_device(world_size: int, name: str, heads: Heads) -> None:
    one, model, mesh = plain(name, heads), plain(name, heads), line(world_size)
    sg.set_balanced(mesh)
    sg.parallelize(model, mesh)
    assert_calls_agree(model, one, batch(name))
    query = next(name for name, _ in one.named_parameters() if name.endswith(("q_proj.weight", "c_attn.weight")))
    stored = next(sharding for name, _, sharding in sg.named_shardings(model) if name == query)
    assert stored is not None
    here = chunks(heads[0], sg.Balanced(world_size))[mesh.get_local_rank("tp")]
    assert next(leaf.block()[1][leaf.spec.letters.index("h")] for leaf in stored.leaves) == here
    state, expected = sg.state_dict(model), one.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
