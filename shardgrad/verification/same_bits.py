"""`sg.verify_exact`: in exact mode, a step on the ranks of a mesh has the bits of the same step on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import agree, text_of_first
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import exact
from shardgrad.errors import VerificationError
from shardgrad.nn.dtensors import is_dtensor
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings
from shardgrad.ops.exact import set_exact
from shardgrad.verification.bits import apart, bits_of_first
from shardgrad.verification.exact_report import PROBLEMS, BitDifference, Compared, ExactReport, Problem, WrongShard
from shardgrad.verification.exchange import coordinates, ints_of_all, place
from shardgrad.verification.record import gradient_of

Result = Tensor | float | Mapping[str, Tensor | float]
Build = Callable[[DeviceMesh], nn.Module]
Step = Callable[[Any, DeviceMesh], Result]
Key = tuple[Compared, str]
Held = tuple[Tensor | None, ParamSharding | None]
_DIMS = 8
_ROW = 4 + _DIMS


@told
def verify_exact(
    build: Build,
    step: Step,
    mesh: DeviceMesh,
    pieces: Mapping[str, int] | int,
    *,
    steps: int = 1,
    perturb: bool = True,
    seed: int = 0,
) -> ExactReport:
    """Hold a step on the ranks of a mesh against the same step on one rank, both in exact mode: bit for bit.

        report = sg.verify_exact(build, step, mesh, {"tp": 8, "dp": 4}).require()

    There is no tolerance, since the two must agree: any difference is a bug, of the program or of shardgrad. The first
    rank of the mesh also does the step alone, on a mesh with the same axes, of one rank each. Compared are what `step`
    returns, every gradient as it is then, every parameter and every buffer; each on every rank, so that a replica that
    is wrong on one of them is found. Initial values are compared before. Called on every rank of the mesh.

    Args:
        build: the model on a mesh, its parameters those of shardgrad's layers. What it keeps from step to step, such as
            an optimizer, can be an attribute of the model.
        step: `step(model, mesh)` takes this rank's part of the batch, as the mesh's coordinate says, calls backward,
            and may clip and take an optimizer step. It returns the loss of the whole batch, or several numbers or
            tensors by name, the loss first, alike on every rank. All communication is over the mesh. Data drawn from
            torch's generator are alike on all ranks and on one: it is seeded alike for both, before `build`.
        mesh, pieces: as of `set_exact`. What is set on the mesh is put back afterwards.
        steps: how many, one after the other; comparison ends with the first that differs.
        perturb: whether parameters that are constant (zero biases, unit norms) get random values first, as they would
            hide what is wrong.
        seed: of all that is random here.

    What this cannot see: what is wrong on one rank as well, such as a wrong formula (`verify` does).

    Raises:
        VerificationError: one rank alone cannot do the step.
        DisagreementError: ranks have models with other parameters, or step returned other names.
        TypeError: step returned something else; or a parameter is a DTensor.
        MeshError, LayoutError, ValueError: as of `set_exact`, and of what cannot be exact.
    """
    if steps < 1:
        raise ValueError(f"steps is at least 1, not {steps}")
    mesh_view = view(mesh)
    with ExitStack() as stack:
        stack.enter_context(_exact(mesh, pieces))
        many = _Run(mesh, build, step, seed)
        many.build()
        one: _Run | None = None
        if place(mesh_view) == 0:
            one = _Run(stack.enter_context(_alone(mesh)), build, step, seed)
        used = dict(exact(mesh_view) or {})

        def on_first(do: Callable[[_Run], object]) -> None:
            if one is not None:
                with _exact(one.mesh, used):
                    do(one)

        _told(mesh_view, lambda: on_first(_Run.build))
        comparison = _Comparison(mesh_view)
        differences, done = comparison.of(0, many, one), 0
        if not differences and perturb:
            many.perturb()
            _told(mesh_view, lambda: on_first(_Run.perturb))
        while not differences and done < steps:
            many.step()
            _told(mesh_view, lambda: on_first(_Run.step))
            done += 1
            differences = comparison.of(done, many, one)
        return ExactReport(
            dict(mesh_view.shape), used, done, len(comparison.compared), tuple(differences), comparison.skipped
        )


@contextmanager
def _exact(mesh: DeviceMesh, pieces: Mapping[str, int] | int) -> Iterator[None]:
    """Exact mode, inside the block."""
    before = exact(view(mesh))
    set_exact(mesh, pieces)
    try:
        yield
    finally:
        set_exact(mesh, before)


@contextmanager
def _alone(mesh: DeviceMesh) -> Iterator[DeviceMesh]:
    """A mesh of the same axes with this rank alone, which the other ranks need not know of."""
    rank = dist.get_rank()
    group = dist.new_group([rank], use_local_synchronization=True)
    names = mesh.mesh_dim_names or ()
    ranks = torch.tensor(rank).view([1] * len(names))
    try:
        yield DeviceMesh.from_group([group] * len(names), mesh.device_type, ranks, mesh_dim_names=names)
    finally:
        dist.destroy_process_group(group)


def _told(mesh: MeshView, do: Callable[[], None]) -> None:
    """Run what only the first rank does something in; if it raises there, raise on every rank.

    Raises:
        VerificationError: it did.
    """
    raised: Exception | None = None
    try:
        do()
    except Exception as error:
        raised = error
    text = text_of_first("" if raised is None else f"{type(raised).__name__}: {raised}", mesh)
    if text:
        raise VerificationError(f"one rank alone cannot do the step: {text}") from raised


class _Run:
    """The program on one mesh, with a state of torch's generators of its own."""

    model: nn.Module

    def __init__(self, mesh: DeviceMesh, build: Build, step: Step, seed: int) -> None:
        self.mesh = mesh
        self.results: dict[str, Tensor] = {}
        self._build, self._step, self._seed = build, step, seed
        kind = mesh.device_type
        self._device = None if kind == "cpu" else torch.get_device_module(kind)
        self._states: list[Tensor] = []

    def build(self) -> None:
        with self._drawing():
            self.model = self._build(self.mesh)
        for name, parameter in self.model.named_parameters():
            if is_dtensor(parameter):
                raise TypeError(f"verify_exact: {name} is a DTensor, whose gradient torch sums in an order of its own")

    def step(self) -> None:
        with self._drawing():
            self.results = _named(self._step(self.model, self.mesh))

    @torch.no_grad()
    def perturb(self) -> None:
        """Random values for constant parameters, as functions of the global element."""
        generator = torch.Generator().manual_seed(self._seed)
        for _, parameter, sharding in named_shardings(self.model):
            whole = parameter.detach() if sharding is None else sharding.unshard(parameter)
            noise = torch.randn(whole.shape, generator=generator, dtype=torch.float64).to(whole.device)
            if whole.is_floating_point() and whole.numel() and bool((whole == whole.view(-1)[0]).all()):
                changed = (whole.double() + noise / 4).to(whole.dtype)
                parameter.copy_(changed if sharding is None else sharding.shard(changed))

    def tensors(self, step: int) -> dict[Key, Held]:
        """What is compared after so many steps, in order; None where there could be a gradient, and is none."""
        parameters = named_shardings(self.model)
        kind: Compared = "value" if step else "initial value"
        found: dict[Key, Held] = {}
        if step:
            results: list[tuple[Key, Held]] = [(("result", n), (value, None)) for n, value in self.results.items()]
            found.update(results[:1])
            found.update({("gradient", n): (gradient_of(p), sharding) for n, p, sharding in parameters})
            found.update(results[1:])
        found.update({(kind, name): (parameter, sharding) for name, parameter, sharding in parameters})
        found.update({("buffer", name): (buffer, None) for name, buffer in self.model.named_buffers()})
        return found

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Inside the block torch's generators go on where they were left at the end of the last one."""
        devices = [] if self._device is None else [self._device.current_device()]
        kind = "cuda" if self._device is None else self.mesh.device_type
        with torch.random.fork_rng(devices, device_type=kind):
            if self._states:
                torch.set_rng_state(self._states[0])
                if self._device is not None:
                    self._device.set_rng_state(self._states[1])
            else:
                torch.manual_seed(self._seed)
            yield
            self._states = [torch.get_rng_state()]
            self._states += [] if self._device is None else [self._device.get_rng_state()]


def _named(result: Result) -> dict[str, Tensor]:
    found = result if isinstance(result, Mapping) else {"loss": result}
    made = {}
    for name, value in found.items():
        if not isinstance(value, Tensor | float | int):
            raise TypeError(
                f"step returns the loss, or numbers and tensors by name, not {type(value).__name__} "
                f"(under {name!r}): verify_exact compares what it returns"
            )
        made[str(name)] = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Comparison:
    """Every rank's part of every tensor against the first rank's whole one, one tensor after the other."""

    def __init__(self, mesh: MeshView) -> None:
        self._mesh = mesh
        self.compared: set[Key] = set()
        self.skipped: dict[str, str] = {}

    def of(self, step: int, many: _Run, one: _Run | None) -> list[BitDifference]:
        """The tensors that differ, after so many steps. one: on the first rank."""
        mine = many.tensors(step)
        text = "\n".join(f"{kind} of {name}" for kind, name in mine)
        for axis in self._mesh.axes.values():
            agree(self._mesh, axis, lambda: text, "what verify_exact compares")
        single = {} if one is None else {key: value for key, (value, _) in one.tensors(step).items()}
        shapes = self._shapes(mine, single)
        rows = []
        for key, stored in shapes.items():
            whole = None if stored is None else bits_of_first(single.get(key), *stored, self._mesh)
            tensor, sharding = mine.get(key, (None, None))
            rows.append(self._row(tensor, sharding, whole))
        everyones = ints_of_all([number for row in rows for number in row], self._mesh)
        found = []
        for at, (key, stored) in enumerate(shapes.items()):
            numbers = [row[_ROW * at : _ROW * (at + 1)] for row in everyones]
            sharding = mine[key][1] if key in mine else None
            if stored is None and not any(row[0] for row in numbers):
                continue  # nobody has it
            if key[0] == "buffer" and any(row[0] == 1 + PROBLEMS.index("another shape") for row in numbers):
                self.skipped[f"buffer of {key[1]}"] = "another shape than on one rank: nothing says how it is sharded"
                continue
            self.compared.add(key)
            if any(row[0] for row in numbers):
                found.append(self._difference(step, key, stored, sharding, numbers))
        return found

    def _shapes(
        self, mine: Mapping[Key, Any], single: Mapping[Key, Tensor | None]
    ) -> dict[Key, tuple[tuple[int, ...], torch.dtype] | None]:
        """Shape and dtype of what one rank has, of every tensor that there is on it or on the ranks of the mesh."""
        lines = []
        for kind, name in dict.fromkeys(chain(mine, single)):
            value = single.get((kind, name))
            said = "" if value is None else " ".join((_name(value.dtype), *map(str, value.shape)))
            lines.append("\t".join((kind, name, said)))
        found: dict[Key, tuple[tuple[int, ...], torch.dtype] | None] = {}
        for line in text_of_first("\n".join(lines), self._mesh).splitlines():
            which, name, said = line.split("\t")
            dtype, *shape = said.split(" ")
            stored = (tuple(map(int, shape)), getattr(torch, dtype)) if dtype else None
            found[cast("Compared", which), name] = stored
        return found

    def _row(self, tensor: Tensor | None, sharding: ParamSharding | None, whole: Tensor | None) -> list[int]:
        """The problem (0 for none), elements that differ, all elements, ulps (-1 for infinite), the first place."""

        def problem(which: Problem) -> list[int]:
            return [1 + PROBLEMS.index(which), *[0] * (_ROW - 1)]

        if tensor is None:
            return [0] * _ROW if whole is None else problem("missing")
        if whole is None:
            return problem("unexpected")
        if sharding is not None and tuple(whole.shape) != sharding.global_shape:
            return problem("another shape")
        wanted = whole if sharding is None else sharding.shard(whole)
        if tensor.shape != wanted.shape:
            return problem("another shape")
        if tensor.dtype != wanted.dtype:
            return problem("another dtype")
        found = apart(tensor, wanted)
        if found is None:
            return [0] * _ROW
        ulps = -1 if found.ulps == float("inf") else min(int(found.ulps), 2**62)
        index = list(map(int, torch.unravel_index(torch.tensor(found.first), tensor.shape))) if tensor.dim() else []
        return [1, found.elements, tensor.numel(), ulps, *index[:_DIMS], *[-1] * (_DIMS - len(index))]

    def _difference(
        self,
        step: int,
        key: Key,
        stored: tuple[tuple[int, ...], torch.dtype] | None,
        sharding: ParamSharding | None,
        numbers: list[list[int]],
    ) -> BitDifference:
        axes = {axis for leaf in sharding.leaves for axis in leaf.spec.axes} if sharding is not None else set()
        shards, blocks = [], dict[tuple[int, ...], int]()
        for coordinate, (code, elements, of, ulps, *index) in zip(coordinates(self._mesh), numbers, strict=True):
            if not code:
                continue
            far = float("inf") if ulps < 0 else float(ulps)
            at = tuple(number for number in index if number >= 0) if code == 1 else ()
            shards.append(WrongShard(coordinate, PROBLEMS[code - 1], elements, of, far, at))
            block = tuple(coordinate[axis] for axis in sorted(axes))
            blocks[block] = max(elements, blocks.get(block, 0))
        shape, dtype = (None, "") if stored is None else (stored[0], _name(stored[1]))
        kind, name = key
        return BitDifference(kind, name, step, shape, dtype, sum(blocks.values()), tuple(shards))
