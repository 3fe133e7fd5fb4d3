"""Public names called with arguments of wrong kinds: each call returns, or raises an error of ours that names what."""

from __future__ import annotations

import inspect
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad import arguments, checkpoint
from shardgrad.chaos.tally import Row, Tally
from shardgrad.errors import shorten
from shardgrad.layout import cost, lower_bound

_MOST = 4000  # characters of a message

_SKIPPED = {"verify_exact", "verify", "per_piece"}  # what they are given they call: tried by their first argument alone


class _NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _wrong(mesh: DeviceMesh) -> list[Callable[[], Any]]:
    """Makers of values that hardly any argument takes."""
    return [
        lambda: None,
        lambda: [1.0, 2.0],
        lambda: [[None]],
        lambda: "x" * 2000,
        lambda: "tp",
        lambda: b"x",
        lambda: True,
        lambda: 3,
        lambda: -1,
        lambda: 2.5,
        lambda: float("nan"),
        lambda: {"a": 1},
        lambda: {1: None},
        lambda: (),
        lambda: object(),
        _NoRepr,
        lambda: int,
        lambda: Path("/proc/no/such"),
        lambda: np.ones((2, 3), np.float32),
        lambda: np.float32(3),
        lambda: torch.float16,
        lambda: torch.device("cpu"),
        lambda: torch.ones(2, 3),
        lambda: torch.ones(()),
        lambda: torch.ones(2, 3).bool(),
        lambda: torch.ones(2, 3, dtype=torch.complex64),
        lambda: torch.ones(2, 3).to_sparse(),
        lambda: torch.ones(2, 3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.distributed.tensor.DTensor.from_local(torch.ones(2, 3), mesh),
        lambda: nn.Linear(3, 2),
        lambda: mesh,
        lambda: sg.Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]"),
        lambda: sg.Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]")["W"],
    ]


def _targets(mesh: DeviceMesh) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """What is called, and right arguments, of which some are exchanged for wrong ones."""
    layout = sg.Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]")
    x, model = torch.ones(2, 3), sg.MLP(3, 4, mesh=mesh)
    right: dict[str, Any] = {
        **{"x": x, "w": torch.ones(3, 2), "layout": layout, "mesh": mesh, "model": model, "parameters": model},
        **{"full": x, "local": x, "spec": layout["X"], "sizes": {"n": 2, "d": 3, "m": 2}, "mesh_shape": {"tp": 1}},
        **{"in_features": 3, "out_features": 2, "embed_dim": 4, "num_heads": 2, "hidden_dim": 4, "num_experts": 2},
        **{"in_channels": 2, "out_channels": 2, "kernel_size": 1, "p": 0.1, "normalized_shape": 3, "head_dim": 2},
        **{"num_positions": 3, "num_embeddings": 5, "embedding_dim": 3, "max_norm": 1.0,},
        **{"split_dim": 0, "concat_dim": 1, "send": [2], "receive": [2]},
        **{"logits": torch.ones(2, 5), "target": x[:, 0].long()},
        **{"count": 1},
        **{"vocab_size": 5, "pieces": None, "how": None, "state": {}, "text": layout.text, "name": "X", "sequence": 2},
        **{"observed": torch.ones(2, 2), "left": x, "right": torch.ones(3, 2),},
        **{"rows": 2, "contracted": 3, "columns": 2, "ranks": 1, "grid": (1, 1, 1), "ids": x.long()},
        **{ "operation": "all-reduce", "elements": 3, "dtype": "float32"},
        **{"path": Path("/proc/no/such"), "folder": Path("/proc/no/such"), "norm": sg.LayerNorm(4, mesh=mesh)},
        **{"attention": sg.Attention(4, 2, mesh=mesh, reduce=False), "mlp": sg.MLP(4, 4, mesh=mesh, reduce=False)},
        **{"parallel": model, "single": nn.Linear(3, 3), "batch": x, "build": None, "step": None, "function": abs},
    }  # fmt: skip
    found: dict[str, Callable[..., Any]] = {}
    for name in dir(sg):
        value = getattr(sg, name)
        if value.__class__ is arguments.TellingType or (
            inspect.isfunction(value) and value.__module__.startswith("shardgrad.")
        ):
            found[name] = value
    found |= {f"Layout.{name}": getattr(layout, name) for name in ("collectives", "program", "resolve", "instructions")}
    found |= {f"checkpoint.{name}": getattr(checkpoint, name) for name in ("save", "load", "digest")}
    found |= {f"cost.{name}": getattr(cost, name) for name in ("sent", "itemsize")}
    found |= {name: getattr(lower_bound, name) for name in ("least_words", "grid_words", "best_grid")}
    layers = [
        *(sg.ColumnParallelLinear(3, 2, mesh=mesh), sg.RowParallelLinear(3, 2, mesh=mesh), sg.MLP(3, 4, mesh=mesh)),
        *(sg.SwiGLU(3, 4, mesh=mesh), sg.LayerNorm(3, mesh=mesh), sg.RMSNorm(3, mesh=mesh)),
        *(sg.VocabParallelEmbedding(5, 3, mesh=mesh), sg.Dropout(0.5, "X[n,d]", mesh=mesh), sg.Rotary(2)),
        *(sg.LearnedPositions(3, 4, mesh=mesh), sg.Attention(4, 2, mesh=mesh), sg.Conv2d(2, 2, 1, mesh=mesh)),
        sg.MoE(3, 4, 2, mesh=mesh, axis="tp"),
        sg.Linear(3, 2, layout="X[n,d] W[m/tp,d] -> Y[n,m/tp]", mesh=mesh),
    ]  # fmt: skip
    found |= {f"{type(layer).__name__}(…)": layer.forward for layer in layers}
    made = {}
    for name, function in found.items():
        wanted = inspect.signature(function).parameters
        given = {key: right[key] for key, one in wanted.items() if key in right and one.default is one.empty}
        if "where" in wanted or (name == "Linear" and "mesh" not in given):
            given["mesh"] = mesh
        made[name] = function, given
    return made


def run(seed: int, count: int) -> list[Row]:
    """Make `count` calls, alike for one seed, in a process group of this process alone: a row of each kind of callable.

    One holds if it returns, or raises an error that shardgrad raises on purpose, of at most 4,000 characters.
    """
    rng = random.Random(seed)
    tally = Tally(("functions", "constructors", "forwards"))
    # In a folder of its own, for some of the wrong arguments are names of folders that can be written.
    with tempfile.TemporaryDirectory() as folder, chdir(folder), alone() as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's quantized and nested tensors
        targets, wrong = _targets(mesh), _wrong(mesh)
        for at in range(count):
            name = list(targets)[at % len(targets)]
            function, given = targets[name]
            kind = "forwards" if name.endswith("(…)") else "constructors" if isinstance(function, type) else "functions"
            failure = _failure(function, *_exchanged(rng, function, given, wrong))
            tally.note(kind, failure and f"{name}: {failure}")
    return tally.rows


def _exchanged(
    rng: random.Random, function: Callable[..., Any], given: dict[str, Any], wrong: list[Callable[[], Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The arguments with one or two wrong ones, and which these are."""
    names = [name for name, one in inspect.signature(function).parameters.items() if one.kind is not one.VAR_KEYWORD]
    names = names[:1] if function.__name__ in _SKIPPED else names
    names += ["axis", "device", "dtype", "parallel", "data", "sequence_dim"] * ("mesh" in given and "mesh" not in names)
    chosen = rng.sample(names, min(len(names), rng.choice([1, 1, 2])))
    return {**given, **{name: rng.choice(wrong)() for name in chosen}}, chosen


def _failure(function: Callable[..., Any], given: dict[str, Any], chosen: list[str]) -> str | None:
    try:
        function(**given)
    except Exception as error:
        what = f"{', '.join(f'{name}={shorten(given[name], 60)}' for name in chosen)}"
        ours = type(error).__module__.startswith("shardgrad") or arguments.on_purpose(error)
        if not ours and not (isinstance(error, OSError) and error.filename):
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"{what}: {type(error).__name__}: {shorten(str(error))} ({Path(last.filename).name}:{last.lineno})"
        if len(str(error)) > _MOST and not isinstance(error, OSError):
            return f"{what}: a message of {len(str(error))} characters"
    return None


@contextmanager
def alone() -> Iterator[DeviceMesh]:
    """A mesh of this process; in its own process group where there is none."""
    begun = not dist.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        if begun:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        finally:
            if begun:
                dist.destroy_process_group()
