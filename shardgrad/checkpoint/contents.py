"""What a checkpoint holds of a model and its optimizer, by name; what it cannot hold is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.models.names import all_named
from shardgrad.nn.dtensors import reshard
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings


@dataclass(frozen=True)
class Contents:
    """parameters: with how each is stored. buffers: the persistent ones, each under its first name. held: the names of
    those parameters that the optimizer has, in the model's order; None without an optimizer."""

    parameters: dict[str, tuple[nn.Parameter, ParamSharding | None]]
    buffers: dict[str, Tensor]
    held: list[str] | None

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer | None, frozen: bool) -> Contents:
        """frozen: whether parameters that need no gradient are among them.

        Raises:
            ValueError: the optimizer has parameters that the model has not, or a module has state of its own making.
            TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
        """
        reshard(model)
        stored = named_shardings(model)
        for path, module in model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise ValueError(
                    f"{path or 'the model'} ({type(module).__name__}) has a state of its own (get_extra_state), which "
                    "no checkpoint holds: make it a buffer"
                )
        buffers: dict[int, tuple[str, Tensor]] = {}
        for name, tensor, is_parameter in all_named(model):
            if not is_parameter:
                buffers.setdefault(id(tensor), (name, tensor))
        parameters = {name: (one, how) for name, one, how in stored if frozen or one.requires_grad}
        held = None
        if optimizer is not None:
            given = {id(one): one for group in optimizer.param_groups for one in group["params"]}
            own = {id(one) for _, one, _ in stored}
            unknown = [one for key, one in given.items() if key not in own]
            if unknown:
                raise ValueError(
                    f"the optimizer has {len(unknown)} of {len(given)} parameters that the model has not, of shapes "
                    f"{', '.join(str(tuple(one.shape)) for one in unknown[:5])}: their state would be lost. Pass the "
                    "model that holds them, or make the optimizer of this model's parameters"
                )
            held = [name for name, (one, _) in parameters.items() if id(one) in given]
        return cls(parameters, dict(buffers.values()), held)

    def state(self, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, str, Any]]:
        """Name of the parameter, key and value of all that the optimizer has; what is None is left out."""
        for name in self.held or ():
            parameter = self.parameters[name][0]
            for key, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
                if value is not None:
                    yield name, key, value


def misfit(optimizer: object, name: str, key: str, value: Any, parameter: Tensor) -> str | None:
    """Why a part of an optimizer's state cannot be saved, if it cannot: it is neither a tensor of its parameter's
    shape, which is sharded as the parameter is, nor a number."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.shape in (parameter.shape, ())):
        return None
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return (
        f"{type(optimizer).__name__} keeps {key!r} of {name} as {what}, where this rank's part of the parameter has "
        f"{tuple(parameter.shape)}: how it belongs to a mesh is not known, so only state of the parameter's shape "
        "and numbers are saved. Take an optimizer that treats each element by itself, such as AdamW, or save the "
        "model without it"
    )
