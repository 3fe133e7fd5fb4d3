"""Models whose output layer's product and loss are one: as on one device, without logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_device import assert_same_gradients, batch, line, loss_of, plain
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed


@distributed(world_size=[2, 3])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("opt", {}),
        ("t5", {}),
        ("bert", {}),
    ],
    ids=["llama", "llama tied", "gpt2", "opt", "t5", "bert"],
)
def test_as_on_one_device(world_size: int, name: str, changes: dict[str, Any]) -> None:
    one, model, given = plain(name, **changes), plain(name, **changes), batch(name)
    sg.parallelize(model, line(world_size), loss="fused")
    for _ in range(2):  # the first call is watched
        for each in (one, model):
            each.zero_grad()
        expected, found = loss_of(one, given), model(**given)
        assert found.logits is None
        torch.testing.assert_close(found.loss.double(), expected.double(), rtol=1e-6, atol=0)
        expected.backward()
        found.loss.backward()
        assert_same_gradients(model, one, 1e-5)
    with torch.no_grad():  # without labels there are logits
        logits = model(**{key: value for key, value in given.items() if key != "labels"} if name != "t5" else given)
    assert (logits.logits is None) == (name == "t5")


@distributed(world_size=4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("shard_params", [False, True])
def test_over_data_and_sequence(world_size: int, sequence: bool, shard_params: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one, model, given = plain("llama"), plain("llama"), batch("llama", rows=4)
    data = sg.BatchAxis("dp", shard_params=shard_params)
    sg.parallelize(model, mesh, data=data, sequence=sequence, loss="fused")
    mine: dict[str, Tensor] = {key: value.chunk(2)[mesh.get_local_rank("dp")] for key, value in given.items()}
    for _ in range(2):
        for each in (one, model):
            each.zero_grad()
        expected, found = loss_of(one, given), model(**mine).loss
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)
        expected.backward()
        found.backward()
        assert_same_gradients(model, one, 1e-5)


@distributed(world_size=2)
def test_logits_that_a_model_changes_are_refused(world_size: int) -> None:
    model = sg.parallelize(plain("gemma2"), line(2), loss="fused")
    with pytest.raises(sg.LayoutError, match=r"Gemma2ForCausalLM changes its logits between .* use loss='sharded'"):
        model(**batch("gemma2"))
    with pytest.raises(ValueError, match="loss must be 'sharded' or 'fused', not 'chunked'"):
        sg.parallelize(plain("llama"), line(2), loss="chunked")  # type: ignore[arg-type]
    with pytest.raises(sg.LayoutError, match="the output layer of this ViTForImageClassification is no plain"):
        sg.parallelize(plain("vit"), line(2), loss="fused")
