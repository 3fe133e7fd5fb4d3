"""One step of both models with the same values, and what every tensor of it is worth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardgrad.comm import shim
from shardgrad.comm.mesh import MeshView
from shardgrad.errors import ShapeError
from shardgrad.nn.global_ops import clip_grad_norm_
from shardgrad.nn.module import ShardedModule
from shardgrad.verification.compare import Measured, measure
from shardgrad.verification.exact import InFloat64
from shardgrad.verification.exchange import coordinates
from shardgrad.verification.functions import Change
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.pairing import Pair, fit, local_part
from shardgrad.verification.place import Place, Placer
from shardgrad.verification.record import WHOLE, Batch, Key, Loss, Recording, Update, forward_backward
from shardgrad.verification.reruns import Reruns, forward
from shardgrad.verification.rounding import RUNS, Reordered, Spread
from shardgrad.verification.uses import gradients_by_use

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Clip = Callable[[nn.Module, float], Tensor]


@dataclass(frozen=True)
class Side:
    """One of the two models, and how a step of it is called."""

    model: nn.Module
    batch: Batch
    loss: Loss


@dataclass(frozen=True)
class Attempt:
    """What does not change from one attempt to the next.

    values: the global value of each parameter of the parallel model, in the order of `pairs`.
    """

    parallel: Side
    single: Side
    mesh: MeshView
    pairs: Sequence[Pair]
    values: Sequence[Tensor]
    placer: Placer
    clip: Clip | None
    optimizer: Optimizer | None

    def run(self, seed: int, *, constants: bool, nudge: bool) -> list[Measured]:
        """Every tensor of one step, measured on this rank, in the order of execution; the same list on every rank.

        Leaves the parallel model's parameters and gradients changed.

        Args:
            seed: of the random values.
            constants: whether constant parameters get random values.
            nudge: whether all others are moved as well, by a 64th.
        """
        values = self._perturbed(seed, constants, nudge)
        exact_model = self._one_device(values, torch.float64)
        drawn = torch.get_rng_state()
        exact = self._exact_step(exact_model, seed)
        if not torch.equal(drawn, torch.get_rng_state()):
            raise ValueError(
                "single draws random numbers (F.dropout, a router's noise), so that no two runs are alike and what is "
                "rounding cannot be measured: let it draw none, for this comparison"
            )
        update = self._update(exact_model)
        update.run(exact_model, dict(exact_model.named_parameters()), exact)
        parallel = self._run_parallel(values, exact, update, seed)
        places = self.placer.places(parallel, exact)
        spreads = {key: Spread(exact.tensors[p.single]) for key, p in places.items() if p.single in exact.tensors}
        for run in range(RUNS):
            for key, tensor in self._one_run(values, update, seed, run, places).items():
                spreads[key].add(tensor)
        order = {key: 2 * at for at, key in enumerate(parallel.tensors)}
        last = min((at for (kind, _), at in order.items() if kind in ("norm", "step")), default=2 * len(order))
        found = [
            measure(
                key, place.split, place.shape, parallel.tensors.get(key), spreads.get(key), order.get(key, last - 1),
                self.mesh,
            )
            for key, place in places.items()
        ]  # fmt: skip
        singles = [(place.single, exact.tensors.get(place.single)) for place in places.values()]
        return [
            replace(one, single=key, real=None if tensor is None else tuple(tensor.shape))
            for one, (key, tensor) in zip(found, singles)
        ]

    def known(
        self, measured: Sequence[Measured], seed: int, *, constants: bool, wrong: Collection[Key] = ()
    ) -> Context:
        """What explanations may use of an attempt, which was not nudged."""
        values = self._perturbed(seed, constants, False)

        def step(
            change: Change, parameters: Mapping[str, Tensor], in_backward: bool, whole: bool
        ) -> Mapping[Key, Tensor]:
            in_forward = {} if in_backward else parameters
            changed = [in_forward.get(pair.name, value) for pair, value in zip(self.pairs, values)]
            model = self._one_device(changed, torch.float64)
            if in_backward:
                for pair in self.pairs:
                    if pair.name in parameters:
                        _change_backward(model, pair.single_name, pair.to_single(parameters[pair.name]))
            with change.around(model):
                if whole:
                    return self._exact_step(model, seed).tensors
                with InFloat64():
                    return forward(model, _cast(self.single.batch), self.single.loss)

        def uses(name: str) -> list[tuple[str, Tensor]]:
            own = next(pair for pair in self.pairs if pair.name == name)
            model = self._one_device(values, torch.float64)
            parameter = model.get_parameter(own.single_name)

            def step(loss: Loss) -> None:
                self._exact_step(model, seed, loss)

            return [(by, fit(term, own.shape)) for by, term in gradients_by_use(parameter, self.single.loss, step)]

        singles = {one.key: one.single for one in measured if one.single is not None}
        places = {one.key: (singles[one.key], one.shape) for one in measured if one.key in singles}
        reruns = Reruns(step, places, set(wrong))
        return Context(
            exact={one.key: (one.exact, one.split) for one in measured if one.exact is not None},
            before={one.name: (value.double(), one.split) for one, value in zip(self.pairs, values)},
            real={one.key: one.real for one in measured if one.real is not None},
            again=reruns.again,
            uses=uses,
            under=reruns.under,
            watch=reruns.watch,
            single=singles,
        )

    def _perturbed(self, seed: int, constants: bool, nudge: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        changed = []
        for one, value in zip(self.pairs, self.values):
            real = one.to_single(value)
            noise = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(real.device)
            if constants and real.numel() and bool((real == real.view(-1)[0]).all()):
                real = (real.double() + noise / 4).to(value.dtype)
            elif nudge:
                real = (real.double() * (1 + noise / 64)).to(value.dtype)
            whole = fit(real, one.shape).clone()
            if whole.numel() != real.numel():  # padding stays as it is
                beyond = value.clone()
                beyond[tuple(slice(size) for size in real.shape)] = real
                whole = beyond
            changed.append(whole)
        return changed

    def _one_device(self, values: Sequence[Tensor], dtype: torch.dtype | None) -> nn.Module:
        """A copy of the single model with these values, in a precision or in those of the parallel model."""
        model = copy.deepcopy(self.single.model).to(self.mesh.device)
        targets = dict(model.named_parameters())
        theirs = dict(self.parallel.model.named_buffers())
        with torch.no_grad():
            for one, value in zip(self.pairs, values):
                target = targets[one.single_name]
                target.data = one.to_single(value).to(dtype or value.dtype).clone()
                target.grad = None
                target.requires_grad_(one.parameter.requires_grad and target.requires_grad)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    like = theirs.get(name, buffer)
                    buffer.data = buffer.data.to(dtype or like.dtype)
        return model

    def _exact_step(self, model: nn.Module, seed: int, loss: Loss | None = None) -> Recording:
        side = Side(model, _cast(self.single.batch), loss or self.single.loss)
        with InFloat64():
            return _step(side, _gradient(seed))

    def _one_run(
        self, values: Sequence[Tensor], update: Update, seed: int, run: int, places: dict[Key, Place]
    ) -> dict[Key, Tensor]:
        """What one device computes in the working precision; the first run as it is, the others in other orders."""
        model = self._one_device(values, None)
        side = Side(model, self.single.batch, self.single.loss)
        if run == 0:
            recording = _step(side, _gradient(seed))
        else:
            with Reordered(max(len(coordinates(self.mesh)), 2), 1000 * seed + run):
                recording = _step(side, _gradient(seed))
        update.run(model, dict(model.named_parameters()), recording)
        found = recording.tensors
        return {key: found[place.single] for key, place in places.items() if place.single in found}

    def _update(self, exact: nn.Module) -> Update:
        """Clip to half the norm, so that clipping acts; by default, a step as long as half the parameters' norm."""
        gradients = [p.grad for p in exact.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        size = float(nn.utils.get_total_norm([p.detach() for p in exact.parameters()]))
        rate = size / norm if norm > 0 else 1.0
        optimizer = self.optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=rate, foreach=False))
        return Update(None if self.clip is None else _clip_one_device, optimizer, norm / 2)

    def _run_parallel(self, values: Sequence[Tensor], exact: Recording, update: Update, seed: int) -> Recording:
        with torch.no_grad():
            for one, value in zip(self.pairs, values):
                mine = one.split.shard(value, self.mesh.shape, self.mesh.coordinate)
                local_part(one.parameter.detach()).copy_(mine)
        assert exact.result is not None
        whole = exact.result

        def gradient(result: Tensor) -> Tensor:
            place = self.placer.of_result(result, whole)
            if place is None:
                raise ShapeError(
                    f"parallel's result has local shape {tuple(result.shape)}, of which no split makes single's "
                    f"{tuple(whole.shape)}: give splits={{{WHOLE!r}: 'Y[…]'}}, or a parallel_loss"
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
        recording = forward_backward(self.parallel.model, self.parallel.batch, self.parallel.loss, parameters, gradient)
        if not any(one.unsummed for one in self.pairs):  # else the caller must sum the gradients first
            Update(self.clip, update.optimizer, update.max_norm).run(self.parallel.model, parameters, recording)
        return recording


def _change_backward(model: nn.Module, name: str, value: Tensor) -> None:
    """Let the module that owns a parameter compute its output with it, and the gradients with another value."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    def other(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        if not isinstance(output, Tensor):
            return output
        own = module._parameters[leaf]
        module._parameters[leaf] = value.to(output)  # type: ignore[assignment]
        try:
            made = module.forward(*args, **kwargs)
        finally:
            module._parameters[leaf] = own
        return output.detach() + (made - made.detach())

    module.register_forward_hook(other, with_kwargs=True)


def clip_of(model: nn.Module) -> Clip | None:
    """What clips a model's gradients by their global norm: shardgrad's function, or torch's, which takes DTensors alone
    (of DTensors mixed with tensors it is refused)."""
    dtensors = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    layers = any(isinstance(module, ShardedModule) for module in model.modules())
    if layers and not any(dtensors):
        return clip_grad_norm_
    if dtensors and all(dtensors):
        return _clip_dtensors
    return None


def _clip_one_device(model: nn.Module, max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def _clip_dtensors(model: nn.Module, max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _step(side: Side, gradient: Callable[[Tensor], Tensor]) -> Recording:
    return forward_backward(side.model, side.batch, side.loss, dict(side.model.named_parameters()), gradient)


def _gradient(seed: int) -> Callable[[Tensor], Tensor]:
    """A random gradient for a global result: the same in every run and precision (bfloat16 holds it exactly)."""

    def make(result: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        with shim.no_dispatch():
            drawn = torch.randn(result.shape, generator=generator).bfloat16()
        return drawn.to(result)

    return make


def _cast(batch: Batch) -> Batch:
    """The batch with its floating tensors in float64."""

    def wide(value: object) -> object:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(batch, Mapping):
        return {name: wide(value) for name, value in batch.items()}
    return tuple(wide(value) for value in batch)
