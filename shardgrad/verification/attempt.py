"""Steps of both models with the same values: what each computes, and what every tensor of it is worth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardgrad.comm import shim
from shardgrad.comm.mesh import MeshView
from shardgrad.errors import ShapeError
from shardgrad.verification import exchange
from shardgrad.verification.clipping import Clip, clip_one_device
from shardgrad.verification.compare import Measured, measure
from shardgrad.verification.exact import NARROW, InFloat64, floating_in_float64
from shardgrad.verification.exchange import coordinates
from shardgrad.verification.observed import BACKWARD, Kind
from shardgrad.verification.pairing import Pair, fit, local_part
from shardgrad.verification.place import Place, Placer
from shardgrad.verification.record import (
    WHOLE,
    Batch,
    Key,
    Loss,
    Recording,
    Update,
    forward_backward,
    gradient_of,
    mapped,
)
from shardgrad.verification.rounding import InSingle, Reordered, Spread

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_FORWARD: tuple[Kind, ...] = ("output", "loss")
_OTHER_INPUTS = 0.875
"""What floating inputs are multiplied with in a step with other values: what lies in [0, 1] stays there."""


@dataclass(frozen=True)
class Side:
    """One of the two models, and how a step of it is called."""

    model: nn.Module
    batch: Batch
    loss: Loss


@dataclass(frozen=True)
class Step:
    """One step of both models.

    values: the global value of each parameter. seed: of the gradient of a result that is no scalar.
    nudged: whether parameters and inputs are not those that were given. double: whether parallel ran in float64.
    exact, parallel: what single computed in float64, and parallel on this rank.
    places: which tensor of one is which of the other.
    """

    values: Sequence[Tensor]
    seed: int
    nudged: bool
    double: bool
    update: Update
    exact: Recording
    parallel: Recording
    places: Mapping[Key, Place]


@dataclass(frozen=True)
class Attempt:
    """What does not change from one step to the next.

    values: the global value of each parameter of the parallel model, in the order of `pairs`.
    buffers: parallel's as they were. state: those of single's that a step changes, as they are before it.
    asked: dtypes that single's program casts to by itself.
    closed: inputs that a program does not take from its batch, but from elsewhere, on some rank: those of single that
        get a gradient, where parallel's get none. Then inputs stay as they are in every step.
    without_inputs: why inputs get no gradient: what single says of it.
    """

    parallel: Side
    single: Side
    mesh: MeshView
    pairs: Sequence[Pair]
    values: Sequence[Tensor]
    placer: Placer
    clip: Clip | None
    optimizer: Optimizer | None
    buffers: Mapping[str, Tensor]
    perturb: bool = True
    complete: Callable[[nn.Module], object] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    asked: set[torch.dtype] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    without_inputs: list[str] = field(default_factory=list)

    def step(self, seed: int, *, nudge: bool, double: bool) -> Step:
        """One step of both, on every rank. Leaves the parallel model's parameters and gradients changed.

        Args:
            seed: of the random values.
            nudge: whether parameters are moved, by a 64th, and inputs scaled.
            double: whether parallel is given float64 values.

        Raises:
            ValueError: single draws random numbers.
        """
        values = self._perturbed(seed, nudge)
        model = self.one_device(values, torch.float64)
        exact = self._first_exact_step(model, seed, nudge)
        if exact.draws:
            raise ValueError(
                "single draws random numbers (F.dropout, a router's noise), so that no two runs are alike and what is "
                "rounding cannot be measured: let it draw none, for this comparison"
            )
        if self._takes_over_state(model):
            model = self.one_device(values, torch.float64)
            exact = self.exact_step(model, seed, nudge)
        self.asked.update(exact.asked)
        update = self._update(model)
        update.run(model, dict(model.named_parameters()), exact)
        parallel = self._run_parallel(values, exact, update, seed, nudge, double)
        if not nudge:
            counts = [sum(kind == "input gradient" for kind, _ in one.tensors) for one in (exact, parallel)]
            if any(theirs < counts[0] for (theirs,) in exchange.ints_of_all(counts[1:], self.mesh)):
                self.closed.update(name for kind, name in exact.tensors if kind == "input gradient")
        return Step(values, seed, nudge, double, update, exact, parallel, self.placer.places(parallel, exact))

    def repeated(self, step: Step) -> Recording:
        """Parallel's part of a step once more."""
        found = self._run_parallel(step.values, step.exact, step.update, step.seed, step.nudged, step.double)
        self.placer.places(found, step.exact)
        return found

    def spreads(self, step: Step, before: Mapping[Key, Spread], runs: int) -> dict[Key, Spread]:
        """The errors of one device in the working precision over so many runs; the ranks share the runs.

        before: over fewer.
        """
        done = max((len(spread.norms) for spread in before.values()), default=0)
        ranks, own = len(coordinates(self.mesh)), exchange.place(self.mesh)
        keys = [key for key, place in step.places.items() if place.single in step.exact.tensors]
        mine = {key: Spread(step.exact.tensors[step.places[key].single].double()) for key in keys}
        norms = {key: [0.0] * (runs - done) for key in keys}
        for run in range(done, runs):
            if run % ranks == own:
                found = self._one_run(step, run)
                for key in keys:
                    tensor = found.tensors.get(step.places[key].single)
                    if tensor is not None:
                        mine[key].add(tensor)
                        norms[key][run - done] = mine[key].norms[-1]
                self.asked.update(found.asked)
        self.asked.update(exchange.any_of_all(self.asked, NARROW, self.mesh))
        squares = exchange.sums_of_all([mine[key].squares for key in keys], self.mesh)
        lengths = exchange.sums_of_all([torch.tensor(norms[key], dtype=torch.float64) for key in keys], self.mesh)
        made = {}
        for key, square, length in zip(keys, squares, lengths):
            old = before.get(key)
            made[key] = Spread(
                mine[key].exact,
                square if old is None else old.squares + square,
                [*(old.norms if old else ()), *length.tolist()],
            )
        return made

    def in_single(self, step: Step, spreads: Mapping[Key, Spread]) -> dict[Key, InSingle]:
        """What may be left of a step in float64. `spreads`: of a step in the working precision."""
        used = {value.dtype for value in self.values if value.is_floating_point()} | (self.asked & set(NARROW))
        dtype = max(used, key=lambda one: torch.finfo(one).eps, default=torch.float32)
        ranks = len(coordinates(self.mesh))
        exact = {key: step.exact.tensors.get(place.single) for key, place in step.places.items()}
        typical = {kinds: _typical(exact, kinds) for kinds in (_FORWARD, BACKWARD)}
        made = {}
        for key, tensor in exact.items():
            if tensor is not None:
                spread = spreads.get(key)
                same = spread is not None and spread.exact.shape == tensor.shape
                size = next((size for kinds, size in typical.items() if key[0] in kinds), 0.0)
                made[key] = InSingle(tensor.double(), spread if same else None, dtype, ranks, size)
        return made

    def measure(self, step: Step, yards: Mapping[Key, Spread] | Mapping[Key, InSingle]) -> list[Measured]:
        """Every tensor of a step, measured on this rank, in the order of execution; the same list on every rank."""
        order = {key: 2 * at for at, key in enumerate(step.parallel.tensors)}
        last = min((at for (kind, _), at in order.items() if kind in ("norm", "step")), default=2 * len(order))
        found = []
        for key, place in step.places.items():
            one = measure(
                key, place.split, place.shape, step.parallel.tensors.get(key), yards.get(key),
                order.get(key, last - 1), self.mesh,
            )  # fmt: skip
            tensor = step.exact.tensors.get(place.single)
            found.append(replace(one, single=place.single, real=None if tensor is None else tuple(tensor.shape)))
        return found

    def _perturbed(self, seed: int, nudge: bool) -> list[Tensor]:
        """The parameters; those that would hide a mistake (constant ones, shards that are alike) are moved."""
        generator = torch.Generator().manual_seed(seed)
        changed = []
        for one, value in zip(self.pairs, self.values):
            real = one.to_single(value)
            noise = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(real.device)
            if self.perturb and real.numel() and bool((real == real.view(-1)[0]).all()):
                real = (real.double() + noise / 4).to(value.dtype)
            elif self.perturb and _shards_alike(one, value, self.mesh):
                real = (real.double() * (1 + noise / 4)).to(value.dtype)
            elif nudge:
                real = (real.double() * (1 + noise / 64)).to(value.dtype)
            whole = fit(real, one.shape).clone()
            if whole.numel() != real.numel():  # padding stays as it is
                beyond = value.clone()
                beyond[tuple(slice(size) for size in real.shape)] = real
                whole = beyond
            changed.append(whole)
        return changed

    def one_device(self, values: Sequence[Tensor], dtype: torch.dtype | None) -> nn.Module:
        """A copy of the single model with these values, in a precision or in those of the parallel model."""
        model = copy.deepcopy(self.single.model).to(self.mesh.device)
        targets = dict(model.named_parameters())
        with torch.no_grad():
            for one, value in zip(self.pairs, values):
                target = targets[one.single_name]
                target.data = one.to_single(value).to(dtype or value.dtype).clone()
                target.grad = None
            for name, buffer in model.named_buffers():
                buffer.data = self.state.get(name, buffer.data).clone()
                if buffer.is_floating_point():
                    like = self.buffers.get(self.placer.name_in_parallel(name), buffer)
                    same = like.shape == buffer.shape and torch.equal(like.to(buffer), buffer)
                    value = like if same else buffer.data  # single may hold a table in fewer digits
                    buffer.data = value.to(like.dtype).to(dtype or like.dtype, copy=True)
        return model

    def _takes_over_state(self, model: nn.Module) -> bool:
        """Note the buffers that a step of single has changed: they begin as parallel's. Whether one began otherwise."""
        other = False
        fresh = dict(self.single.model.named_buffers())
        for name, buffer in model.named_buffers():
            theirs, own = self.buffers.get(self.placer.name_in_parallel(name)), fresh[name].to(buffer.device)
            began = self.state.get(name, own)
            if theirs is None or theirs.shape != own.shape or torch.equal(buffer, began.to(buffer.dtype)):
                continue
            self.state[name] = theirs
            other |= not torch.equal(theirs.to(began.dtype), began)
        return other

    def exact_step(self, model: nn.Module, seed: int, nudged: bool, loss: Loss | None = None) -> Recording:
        """A step of a copy of single in float64, without its update."""
        with InFloat64() as mode:
            found = self._step(Side(model, self.exact_inputs(nudged), loss or self.single.loss), seed)
        found.asked = frozenset(mode.asked)
        return found

    def _first_exact_step(self, model: nn.Module, seed: int, nudged: bool) -> Recording:
        """The same, without gradients of inputs if single cannot have them (weights of classes)."""
        try:
            return self.exact_step(model, seed, nudged)
        except RuntimeError as error:
            if self.without_inputs or not any(said in str(error) for said in ("requires_grad", "differentiable")):
                raise
            self.without_inputs.append(str(error).splitlines()[0])
            self.placer.skipped["gradients of inputs"] = f"single cannot have them: {self.without_inputs[0]}"
            return self.exact_step(model, seed, nudged)

    def _step(self, side: Side, seed: int) -> Recording:
        parameters, inputs_too = dict(side.model.named_parameters()), not self.without_inputs
        return forward_backward(
            side.model, side.batch, side.loss, parameters, _gradient(seed), inputs_too=inputs_too
        )  # fmt: skip

    def _one_run(self, step: Step, run: int) -> Recording:
        """What one device computes in the working precision; the first run as it is, the others in other orders."""
        model = self.one_device(step.values, None)
        side = Side(model, self.inputs(self.single, step.nudged), self.single.loss)
        with ExitStack() as stack:
            order = None
            if run:
                order = stack.enter_context(Reordered(max(len(coordinates(self.mesh)), 2), 1000 * step.seed + run))
            found = self._step(side, step.seed)
        found.asked = frozenset(order.asked if order else ())
        step.update.run(model, dict(model.named_parameters()), found)
        return found

    def exact_inputs(self, nudged: bool) -> Batch:
        """Single's batch in float64."""
        return mapped(self.inputs(self.single, nudged), lambda _, tensor: tensor.double())

    def inputs(self, side: Side, nudged: bool) -> Batch:
        """A model's batch, scaled in a step with other values."""
        if not nudged or self.closed:
            return side.batch
        return mapped(side.batch, lambda _, tensor: (tensor * _OTHER_INPUTS).to(tensor.dtype))

    def _update(self, exact: nn.Module) -> Update:
        """Clip to half the norm, so that clipping acts; by default, a step as long as half the parameters' norm."""
        found = [p.grad for p in exact.parameters() if p.grad is not None]
        gradients = [grad.to_dense() if grad.is_sparse else grad for grad in found]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        size = float(nn.utils.get_total_norm([p.detach() for p in exact.parameters()]))
        rate = size / norm if norm > 0 else 1.0
        optimizer = self.optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=rate, foreach=False))
        return Update(
            None if self.clip is None else clip_one_device, optimizer, norm / 2, again=self.optimizer is not None
        )

    def _run_parallel(
        self, values: Sequence[Tensor], exact: Recording, update: Update, seed: int, nudged: bool, double: bool
    ) -> Recording:
        model = self.parallel.model
        with torch.no_grad():
            for one, value in zip(self.pairs, values):
                mine = one.split.shard(value, self.mesh.shape, self.mesh.coordinate)
                local_part(one.parameter.detach()).copy_(mine)
            for name, buffer in model.named_buffers():
                local_part(buffer.detach()).copy_(self.buffers[name])
        batch = self.inputs(self.parallel, nudged)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=()))
            torch.default_generator.manual_seed(seed)  # should it draw random numbers, they are the same in every run
            if double:
                stack.enter_context(floating_in_float64(model))
                batch = mapped(batch, lambda _, tensor: tensor.double())
                used = {value.dtype for value in self.values} | self.asked | {torch.float32}
                stack.enter_context(InFloat64(keep=set(NARROW) - used))
            side = Side(model, batch, self.parallel.loss)
            return self._parallel_step(side, exact, update, seed)

    def _parallel_step(self, side: Side, exact: Recording, update: Update, seed: int) -> Recording:
        assert exact.result is not None
        whole = exact.result

        def gradient(result: Tensor) -> Tensor:
            place = self.placer.of_result(result, whole)
            if place is None:
                raise ShapeError(
                    f"parallel's result has local shape {tuple(result.shape)}, of which no split makes single's "
                    f"{tuple(whole.shape)}{self.placer.turned(tuple(result.shape), tuple(whole.shape))}: give "
                    f"splits={{{WHOLE!r}: 'Y[…]'}}, or a parallel_loss that returns the loss, or single's order of dims"
                )
            full = fit(_gradient(seed)(whole), place.shape)
            mine = place.split.summed_over(()).shard(full, self.mesh.shape, self.mesh.coordinate).to(result.dtype)
            if not isinstance(result, DTensor):
                return mine
            whole_placements = [Replicate() if p.is_partial() else p for p in result.placements]
            return DTensor.from_local(
                mine, result.device_mesh, whole_placements, run_check=False, shape=result.shape, stride=result.stride()
            )

        parameters = {one.name: one.parameter for one in self.pairs}
        recording = forward_backward(
            side.model, side.batch, side.loss, parameters, gradient, self.complete, inputs_too=not self.without_inputs
        )
        unsummed = [one for one in self.pairs if one.unsummed]
        for one in unsummed:  # their program sums them after backward
            grad = gradient_of(one.parameter)
            term = torch.zeros_like(one.parameter.detach()) if grad is None else grad
            total = exchange.sum_over(local_part(term), self.mesh, one.unsummed)
            if grad is not None:
                local_part(grad).copy_(total)
        replace(update, clip=None if unsummed else self.clip).run(side.model, parameters, recording)
        return recording


def _typical(tensors: Mapping[Key, Tensor | None], kinds: Sequence[Kind]) -> float:
    """The median of the root mean squares of tensors of some kinds."""
    sizes = [
        float(torch.linalg.vector_norm(tensor.double())) / tensor.numel() ** 0.5
        for (kind, _), tensor in tensors.items()
        if kind in kinds and tensor is not None and tensor.numel()
    ]
    return median(size for size in sizes if isfinite(size)) if any(map(isfinite, sizes)) else 0.0


def _shards_alike(one: Pair, value: Tensor, mesh: MeshView) -> bool:
    """Whether every rank's shard has the same values, so that another rank's would do as well."""
    places = {tuple(at[axis] for axis in one.split.spec.axes): at for at in coordinates(mesh)}
    if len(places) < 2:
        return False
    shards = [one.split.shard(value, mesh.shape, at) for at in places.values()]
    return bool(shards[0].numel()) and all(torch.equal(shards[0], other) for other in shards[1:])


def _gradient(seed: int) -> Callable[[Tensor], Tensor]:
    """A random gradient for a global result: the same in every run and precision (bfloat16 holds it exactly)."""

    def make(result: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        with shim.no_dispatch():
            drawn = torch.randn(result.shape, generator=generator).bfloat16()
        return drawn.to(result)

    return make
