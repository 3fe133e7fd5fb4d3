"""Which token is chosen: greedily, by temperature, among the likeliest."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import gpt, reference
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.testing import distributed
from shardgrad.train.generate import choose, generate

LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.0, 1.0])


def drawn(temperature: float, top_k: int | None, count: int = 4000) -> Counter[int]:
    generator = torch.Generator().manual_seed(1)
    return Counter(choose(LOGITS, temperature, top_k, generator) for _ in range(count))


def test_greedy_takes_the_first_likeliest() -> None:
    assert drawn(0.0, None, 3) == {1: 3}
    assert drawn(0.0, 2, 3) == {1: 3}


@pytest.mark.parametrize("top_k", [None, 5, 3, 2, 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_as_often_as_the_softmax_says(temperature: float, top_k: int | None) -> None:
    kept = {None: {0, 1, 2, 3, 4}, 5: {0, 1, 2, 3, 4}, 3: {1, 3, 4}, 2: {1, 3}, 1: {1}}[top_k]
    weights = {at: (LOGITS[at].double() / temperature).exp().item() for at in kept}
    total = sum(weights.values())
    found = drawn(temperature, top_k)
    assert set(found) <= kept
    for at, weight in weights.items():
        share = weight / total
        assert found[at] / 4000 == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_what_one_device_would_draw(world_size: int, temperature: float) -> None:
    model, values = gpt(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    alone, generator = reference(values), torch.Generator().manual_seed(5)
    ids = [3, 1]
    for _ in range(9):  # beyond the six positions that the model sees
        ids.append(choose(alone(torch.tensor([ids[-6:]]))[0, -1].detach(), temperature, 5, generator))
    assert temperature == 0 or len(set(ids[2:])) > 2
    assert generate(model, [3, 1], 9, temperature=temperature, seed=5, top_k=5) == ids
