"""Runs with `train.exact` end with the same bits on any number of ranks, with micro-batches, resumed on other ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import LeftToRight
from launched import launched
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.errors import LayoutError
from shardgrad.nn import exact_norm
from shardgrad.nn.dropout import Dropout
from shardgrad.ops import micro_batches
from shardgrad.testing import distributed
from shardgrad.train.config import Config, ConfigError, Data, Mesh, Model, Run, Sample, Train, check_ranks, load
from shardgrad.train.metrics import read
from shardgrad.train.signals import Stop

TEXT = "".join(f"line {i} of {i * i % 97}: {'abcdefgh'[i % 8 :]}\n" for i in range(120))
# Pieces of odd sizes: 13 hidden features, 5 positions, 3 features a head, 64 words; a clip that scales; masks.
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"kind": "gpt", "heads": 4, "kv_heads": 2, "d_model": 20, "tied": True},
    "llama": {"kind": "llama", "heads": 4, "kv_heads": 4, "d_model": 24},
}


def configured(where: Path, name: str, dp: int, tp: int, kind: str = "gpt", **train: Any) -> Config:
    own = where / f"text.{os.getpid()}"
    own.write_text(TEXT)
    own.replace(where / "text.txt")  # at once: another rank may be reading it
    settings = {"steps": 4, "batch": 8, "lr": 0.01, "log_every": 1, "eval_every": 3, "save_every": 1, "keep": 9}
    settings |= {"eval_batches": None, "clip": 0.7, "exact": 4}
    model = Model(layers=1, seq_len=20, d_ff=52, dropout=0.1, **MODELS[kind])
    return Config(
        run=Run(dir=str(where / name), resume="auto", seed=3),
        mesh=Mesh(dp=dp, tp=tp, fully_sharded=bool(train.pop("fully_sharded", False))),
        model=model,
        data=Data(files=[str(where / "text.txt")], held_out=0.2),
        train=Train(**{**settings, **train}),
        sample=Sample(prompt="li", tokens=3),
    )


def ended(config: Config) -> list[object]:
    """Run it on this test's ranks, of which those beside its mesh hold replicas; what a reader of the run sees."""
    assert config.mesh.dp is not None
    assert config.mesh.tp is not None
    each = config.mesh.dp * config.mesh.tp
    shape = torch.distributed.get_world_size() // each, config.mesh.dp, config.mesh.tp
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "dp", "tp"))
    launched(mesh, check_ranks(config, each))
    found = read(Path(config.run.dir) / "metrics.jsonl")
    assert any(row["kind"] == "comparison" and row["passed"] for row in found)  # its first step, with one device
    losses = {(row["kind"], row["step"]): row["loss"] for row in found if row["kind"] in ("train", "held_out")}
    digests, sample = [row["digest"] for row in found if row["kind"] == "end"], Path(config.run.dir) / "sample.txt"
    return [losses, digests, sample.read_text() if sample.exists() else None]


def grids(ranks: int) -> list[tuple[int, int, int]]:
    """dp, tp and micro-batches."""
    if ranks == 2:
        return [(1, 1, 1), (1, 2, 4), (2, 1, 2)]
    return [(1, 1, 1), (1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 4, 2), (2, 2, 2)]


@pytest.mark.slow
@distributed(world_size=[2, 4])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt", {}),
        pytest.param("gpt", {"loss": "fused"}, marks=pytest.mark.slow),
        pytest.param(
            "llama",
            {"fully_sharded": True, "dtype": "bfloat16", "reduce_dtype": "float32", "recompute": "full"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_same_bits_on_any_mesh(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    ranks = torch.distributed.get_world_size()
    found = [
        ended(configured(tmp_path, f"{dp}x{tp}x{parts}", dp, tp, kind, accumulate=parts, **settings))
        for dp, tp, parts in grids(ranks)
    ]
    for other in found[1:]:
        assert other == found[0]


@distributed(world_size=2)
def test_resumed_on_other_ranks_it_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [losses, digest, _] = ended(configured(tmp_path, "whole", 1, 1))
    stops = {1: "SIGTERM", 3: "SIGTERM"}
    monkeypatch.setattr(Stop, "agreed", lambda _, step: stops.pop(step, None))
    for dp, tp in ((1, 2), (2, 1), (1, 1)):
        moved = ended(configured(tmp_path, "moved", dp, tp))
    assert not stops
    assert moved[:2] == [losses, digest]


@pytest.mark.slow
@distributed(world_size=2)
def test_each_precaution_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, bits depend on the ranks: micro-batches added from the left, masks of a micro-batch of its own, the
    norm of a whole shard."""
    whole = ended(configured(tmp_path, "whole", 1, 1))

    def differs(name: str, dp: int, tp: int, parts: int) -> bool:
        other = ended(configured(tmp_path, name, dp, tp, accumulate=parts))
        return other[1] != whole[1]

    assert not differs("right", 1, 2, 4)
    with monkeypatch.context() as patched:
        patched.setattr(micro_batches, "TreeSum", LeftToRight)
        assert differs("left", 1, 2, 4)
    with monkeypatch.context() as patched:
        forward = Dropout.forward
        patched.setattr(Dropout, "forward", lambda self, x, sizes=None, part=None: forward(self, x, sizes))
        assert differs("masks", 1, 2, 4)
    with monkeypatch.context() as patched:
        patched.setattr(exact_norm, "piece", lambda x, at, counts: x)
        assert differs("norm", 1, 2, 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["model.heads=6", "train.exact=4"], "model.heads = 6 does not divide into the 4 pieces"),
        (["train.batch=6", "train.exact=4"], "train.batch = 6 does not divide into the 4 pieces"),
        (["model.seq_len=30", "train.exact=4"], "model.seq_len = 30 does not divide"),
        (["train.exact={pp: 2}"], "'pp', which is no axis"),
        (["train.exact=0"], "train.exact"),
    ],
)
def test_what_cannot_be_exact_is_said_in_one_line(changed: list[str], said: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=said):
        load(path, changed)


@distributed(world_size=2)
def test_micro_batches_that_are_no_nodes_of_the_tree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="8 micro-batches on 1 ranks of axis 'dp' are to be parts of its 4 pieces"):
        ended(configured(tmp_path, "many", 1, 2, accumulate=8))
