"""What a deferred gradient reads, on another stream than it was made on: order and memory, with streams that log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import shardgrad as sg
from shardgrad.layout.layout import Layout
from shardgrad.ops import deferred, streams
from shardgrad.testing import distributed


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self._events = name, log, 0

    def record_event(self) -> str:
        self._events += 1
        event = f"event {self._events} of {self.name}"
        self._log.append(event)
        return event

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self.name} waits for {event}")


class OnDevice(Tensor):
    """A tensor that says it is on a device, and logs the streams that its memory is kept for."""

    kept_for: list[str]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def record_stream(self, stream: Any) -> None:
        self.kept_for.append(stream.name)


class Products(TorchDispatchMode):
    """Logs products as they are computed."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self._log.append("product")
        return func(*args, **(kwargs or {}))


def on_device() -> OnDevice:
    made = torch.ones(2).as_subclass(OnDevice)
    made.kept_for = []
    return made


def reader(*values: Any) -> Callable[[], Any]:
    return lambda: values


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """A list, whose last stream is the current one."""
    stack: list[Stream] = []
    monkeypatch.setattr(streams, "_current_stream", lambda tensor: stack[-1])
    return stack


def test_another_stream_waits_and_keeps_the_memory(current: list[Stream]) -> None:
    log: list[str] = []
    backward, side = Stream("backward", log), Stream("side", log)
    own, (work, gathered, sent), on_cpu = on_device(), (object(), on_device(), on_device()), torch.ones(2)
    current.append(backward)
    inputs = streams.Inputs(reader(own, [(work, gathered, sent)], on_cpu, 3, None))
    current.append(side)
    assert own.kept_for == []
    inputs.ready()
    assert log == ["event 1 of backward", "side waits for event 1 of backward"]
    assert [one.kept_for for one in (own, gathered, sent)] == [["side"]] * 3


def test_the_same_stream_waits_for_nothing(current: list[Stream]) -> None:
    log: list[str] = []
    current.append(Stream("backward", log))
    own = on_device()
    streams.Inputs(reader(own)).ready()
    assert log == ["event 1 of backward"]
    assert own.kept_for == []


def test_nothing_is_recorded_on_a_cpu(current: list[Stream]) -> None:
    streams.Inputs(reader(torch.ones(2), 3)).ready()  # there is no current stream: an empty list
    streams.Inputs(lambda: ()).ready()


@distributed(world_size=[1, 2])
@pytest.mark.parametrize("text", ["X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", "X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]"])
@pytest.mark.parametrize("main", [False, True])
def test_products_say_all_that_they_read(world_size: int, text: str, main: bool) -> None:
    """Of what `later.run()` computes with, nothing is left out: dY, X, a main_grad."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout, sizes = Layout(text), {"n": 4, "d": 6, "m": 2}
    seen: list[set[int]] = []
    order: list[str] = []

    class Seen(streams.Inputs):
        def __init__(self, function: Callable[..., Any]) -> None:
            seen.append({tensor.data_ptr() for tensor in streams._read_by(function)})

        def ready(self) -> None:
            order.append("ready")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred, "Inputs", Seen)
        x, w = (
            nn.Parameter(sg.shard(torch.randn([sizes[a] for a in spec.letters]), spec, mesh))
            for spec in (layout.lhs, layout.rhs)
        )
        buffers = sg.use_main_grads([w]) if main else []
        dy = sg.shard(torch.randn(4, 2), layout.out, mesh)
        with sg.defer_weight_grads() as later:
            sg.matmul(x, w, layout, mesh, sizes=sizes).backward(dy)
        assert order == []
        with Products(order):
            later.run()
    assert order[0] == "ready"
    assert "product" in order
    assert len(seen) == 1
    assert {one.data_ptr() for one in (x, dy, *buffers)} <= seen[0]
