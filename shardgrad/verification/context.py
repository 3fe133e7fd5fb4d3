"""What explanations may use of a step: its exact tensors, and further steps of one device with something changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from shardgrad.verification import exchange
from shardgrad.verification.attempt import Attempt, Step
from shardgrad.verification.compare import Measured
from shardgrad.verification.exact import InFloat64
from shardgrad.verification.functions import Change
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.pairing import fit, local_part
from shardgrad.verification.record import Key, Loss
from shardgrad.verification.reruns import Reruns, forward
from shardgrad.verification.uses import gradients_by_use


def context_of(
    attempt: Attempt, step: Step, begun: Step, measured: Sequence[Measured], wrong: Collection[Key]
) -> Context:
    """What is known of a step beside its wrong tensors.

    Args:
        begun: the first step.
        wrong: the tensors that will be explained.
    """
    values, first_values = step.values, begun.values

    def run(change: Change, parameters: Mapping[str, Tensor], in_backward: bool, whole: bool) -> Mapping[Key, Tensor]:
        in_forward = {} if in_backward else parameters
        changed = [in_forward.get(pair.name, value) for pair, value in zip(attempt.pairs, values)]
        model = attempt.one_device(changed, torch.float64)
        if in_backward:
            for pair in attempt.pairs:
                if pair.name in parameters:
                    _change_backward(model, pair.single_name, pair.to_single(parameters[pair.name]))
        with change.around(model):
            if whole:
                return attempt.exact_step(model, step.seed, step.nudged).tensors
            with InFloat64():
                return forward(model, attempt.exact_inputs(step.nudged), attempt.single.loss)

    def uses(name: str) -> list[tuple[str, Tensor]]:
        own = next(pair for pair in attempt.pairs if pair.name == name)
        model = attempt.one_device(values, torch.float64)
        parameter = model.get_parameter(own.single_name)

        def once(loss: Loss) -> None:
            attempt.exact_step(model, step.seed, step.nudged, loss)

        return [(by, fit(term, own.shape)) for by, term in gradients_by_use(parameter, attempt.single.loss, once)]

    singles = {one.key: one.single for one in measured if one.single is not None}
    places = {one.key: (singles[one.key], one.shape) for one in measured if one.key in singles}
    reruns = Reruns(run, places, set(wrong))
    return Context(
        exact={one.key: (one.exact, one.split) for one in measured if one.exact is not None},
        before={one.name: (value.double(), one.split) for one, value in zip(attempt.pairs, values)},
        real={one.key: one.real for one in measured if one.real is not None},
        again=reruns.again,
        uses=uses,
        under=reruns.under,
        watch=reruns.watch,
        single=singles,
        wrong=frozenset(wrong),
        earlier={
            key: exchange.tensors_of_all(None if tensor is None else local_part(tensor), attempt.mesh)
            for key in (wrong if step.nudged else ())
            for tensor in [begun.parallel.tensors.get(key)]
        },
        values_before={one.name: value for one, value in zip(attempt.pairs, first_values)} if step.nudged else {},
        draws=step.parallel.draws,
        in_16_bits=step.double and any(value.dtype.itemsize == 2 for value in values),
    )


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
