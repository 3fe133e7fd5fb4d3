"""A first call, watched: what is sharded between the layers, and which parameters that is used with.

Along the axis, a tensor is replicated, or differs between the ranks (it is sharded, or a term of a sum will flow back
to it). What the sharded layers take and make is known from their features; what lies between them is the model's own
program, and is followed: what is computed with a tensor that differs, differs. A parameter that is not sharded and is
used with such a tensor (the norm of a head) has only a term of its gradient on each rank: it is summed from now on. A
tensor that is replicated, comes from parameters, and meets one that differs, would get a wrong gradient in silence:
that is an error, and so is a sharded parameter that somebody else than its layer uses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from shardgrad.comm.adjoint import replicate
from shardgrad.errors import LayoutError
from shardgrad.models.experts import FeatureExperts
from shardgrad.models.linear import FeatureLinear
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel

_SHAPES_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_SHAPES_ONLY |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "size", "dim", "numel"}
_SHAPES_ONLY |= {"is_floating_point", "register_hook", "requires_grad_", "backward"}

Found = Callable[[nn.Module, str], None]
Source = set[tuple[int, str]] | None


class Flow(TorchFunctionMode):
    """Follows tensors through one call of a model.

    found: told of each module and name of a parameter whose gradient is to be summed.
    """

    def __init__(self, model: nn.Module, parallel: Parallel, found: Found) -> None:
        super().__init__()
        self.parallel, self.found, self.model = parallel, found, model
        self._differs: Any = WeakIdKeyDictionary()
        self._from: Any = WeakIdKeyDictionary()  # of what comes from parameters: those, or None with activations in it
        self._inside = 0
        self._failed: BaseException | None = None
        self._path: list[str] = []
        self._grad: list[bool] = []  # whether gradients were recorded, as each module of the path was called
        self._uses: dict[tuple[int, str], set[bool]] = {}
        self._owners: dict[int, tuple[nn.Module, str]] = {}
        self._names = {id(module): name for name, module in model.named_modules()}

    # What the layers tell.

    def is_sharded(self, tensor: Tensor) -> None:
        """A tensor differs between the ranks."""
        self._differs[tensor] = True

    def is_replicated(self, tensor: Tensor) -> None:
        """A tensor that layers made is alike on the ranks."""
        self._from[tensor] = None

    def is_parameter(self, tensor: Tensor, module: nn.Module, name: str) -> None:
        """A tensor is what a module has as its parameter."""
        self._from[tensor] = {(id(module), name)}

    def differs(self, tensor: Tensor) -> bool:
        return tensor in self._differs

    @contextmanager
    def not_watching(self) -> Iterator[None]:
        """While a layer of shardgrad's computes."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    # Modules, as they are called.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._path.append(self._names.get(id(module), type(module).__name__))
        self._grad.append(torch.is_grad_enabled())
        self._inside += isinstance(module, ShardedModule)

    def arrives(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """What a module's forward gets, when all other hooks have had it.

        A column parallel layer, or experts, sum their input's gradient unless whoever made the input does.
        """
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not self.differs(x):
            return
        if isinstance(module, FeatureExperts) or (isinstance(module, FeatureLinear) and module.kind == "column"):
            module.enter()
        elif isinstance(module, nn.Linear) and not self._inside and x.shape[-1] != module.in_features:
            raise LayoutError(
                f"{self._path[-1]} gets x sharded over {self.parallel.axis}, {tuple(x.shape)}, but takes "
                f"{module.in_features} features: the plan lacks it, as '…/{self.parallel.axis} -> d'"
            )

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        path = self._path.pop()
        self._grad.pop()
        error = sys.exception()
        if error is not None and self._failed is not error:
            self._failed = error
            error.add_note(f"(in {path} of a model that sg.parallelize changed, in its first call){_integers(module)}")
        if not isinstance(module, ShardedModule):
            if error is None and not self._inside:
                self._not_followed(path, module, args, output)
            return
        self._inside -= 1
        if self._inside:
            return
        for tensor in tensors_in(output):
            if getattr(module, "leaves_sharded", False):
                self.is_sharded(tensor)
            else:
                self.is_replicated(tensor)

    def _not_followed(self, path: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Mark what a module without others inside makes of sharded input by means that cannot be watched (autograd
        functions of its own), and refuse them where it has parameters.

        Raises:
            LayoutError: as said.
        """
        if any(True for _ in module.children()) or not any(self.differs(x) for x in tensors_in(args)):
            return
        made = [
            y for y in tensors_in(output) if y.is_floating_point() and y not in self._differs and y not in self._from
        ]
        for y in made:
            self.is_sharded(y)
        own = [name for name, one in module._parameters.items() if one is not None]
        if made and own and not all(True in self._uses.get((id(module), name), ()) for name in own):
            raise LayoutError(
                f"{path} ({type(module).__name__}) computes with its {', '.join(own)} and x that is sharded over "
                f"{self.parallel.axis}, by an operation that cannot be watched (a kernel of its own?): whether their "
                "gradients are sums over ranks is not known. Use the model without such kernels"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._inside or name in _SHAPES_ONLY:
            return func(*args, **kwargs)
        if name == "__get__" and not isinstance(found := func(*args, **kwargs), Tensor):
            return found  # a shape, a dtype
        _no_dropout(name, args, kwargs, self._where())
        given = tensors_in((args, kwargs))
        differs = any(self.differs(tensor) for tensor in given)
        sources = [self._source(tensor) for tensor in given]
        if differs:
            entered = {id(t): self._enter(t, source, name) for t, source in zip(given, sources) if source != set()}
            if entered:
                args, kwargs = _replaced((args, kwargs), entered)
        elif None in sources:
            for source in sources:
                self._used(source or set(), differs=False)
        result = func(*args, **kwargs)
        made = [*tensors_in(result), *tensors_in(kwargs.get("out")), *(given[:1] if name == "__setitem__" else ())]
        comes = None if None in sources else set().union(*(source or set() for source in sources))
        for tensor in made:
            if differs:
                self.is_sharded(tensor)
            elif comes is None or comes:
                self._from[tensor] = comes
        return result

    def _source(self, tensor: Tensor) -> Source:
        """The parameters that a replicated tensor comes from (one that is frozen may be trained later); None if
        activations are in it."""
        if self.differs(tensor):
            return set()
        if tensor in self._from:
            return self._from[tensor]
        if not isinstance(tensor, nn.Parameter):
            return None if tensor.requires_grad else set()
        module, name = self._owner(tensor)
        if isinstance(module, ShardedModule):
            raise LayoutError(
                f"{self._where()} uses {self._names[id(module)]}.{name}, of which a rank has a part only, outside of "
                "its layer: leave it out of the plan"
            )
        return {(id(module), name)}

    def _owner(self, parameter: nn.Parameter) -> tuple[nn.Module, str]:
        if id(parameter) not in self._owners:  # (FSDP2 exchanges parameters as modules are called)
            for module in self.model.modules():
                for name, one in module._parameters.items():
                    if one is not None and (id(one) not in self._owners or isinstance(module, ShardedModule)):
                        self._owners[id(one)] = module, name
        return self._owners.get(id(parameter), (self.model, "a parameter that no module has"))

    def _used(self, parameters: set[tuple[int, str]], *, differs: bool) -> None:
        for parameter in parameters:
            uses = self._uses.setdefault(parameter, set())
            uses.add(differs)
            if len(uses) == 2:
                raise LayoutError(
                    f"{self._names.get(parameter[0], '?')}.{parameter[1]} is used with tensors that are sharded over "
                    f"{self.parallel.axis} and with such as are replicated: its gradient would be a sum in part (the "
                    f"second use is in {self._where()})"
                )

    def _enter(self, tensor: Tensor, source: Source, operation: str) -> Tensor:
        axis = self.parallel.axis
        if source is None:
            raise LayoutError(
                f"{self._where()}: {operation} of a tensor that is replicated over {axis}, {tuple(tensor.shape)}, and "
                "one that is sharded: the gradient of the first would lack the other ranks' terms. The plan shards a "
                "layer too many or one too few here"
            )
        if self._grad and self._grad[-1] and not torch.is_grad_enabled():  # in the forward of an autograd function
            names = ", ".join(f"{self._names.get(module, '?')}.{name}" for module, name in source)
            raise LayoutError(
                f"{self._where()} uses {names} with x that is sharded over {axis} in an autograd function of its own, "
                "too late to sum its gradient in this first call: call the model once under torch.no_grad() before"
            )
        self._used(source, differs=True)
        modules = {id(module): module for module in self.model.modules()}
        for module, name in source:
            self.found(modules[module], name)
        with self.not_watching():
            entered = replicate(tensor, self.parallel.mesh, axis)
        self.is_sharded(entered)
        return entered

    def _where(self) -> str:
        return self._path[-1] if self._path and self._path[-1] else type(self.model).__name__


def _integers(module: nn.Module) -> str:
    """A hint at the integers that a module of somebody's reads, which may count features that are sharded now."""
    found = {name: n for name, n in vars(module).items() if type(n) is int and n > 1 and name != "layer_idx"}
    if isinstance(module, ShardedModule) or not found:
        return ""
    said = ", ".join(f"{name}={n}" for name, n in found.items())
    return f"\n(it reads {said}: those that count sharded heads or features need an entry in the plan)"


def _no_dropout(name: str, args: Any, kwargs: Any, where: str) -> None:
    attends = name == "scaled_dot_product_attention"
    if not attends and not name.endswith("dropout"):
        return
    place, key = (4, "dropout_p") if attends else (1, "p")
    p = kwargs.get(key, args[place] if len(args) > place else 0.0 if attends else 0.5)
    training = attends or kwargs.get("training", args[2] if len(args) > 2 else True)
    if p and training:
        raise dropout_error(where, p)


def dropout_error(where: str, p: float) -> LayoutError:
    """What is raised for dropout that is active."""
    return LayoutError(
        f"{where} drops elements with probability {p}: each rank would draw a mask of its own for what is replicated "
        "or sharded, and values would depend on the number of ranks. Set the model's dropout to 0 (in its "
        "configuration, before it is made), or use sg.Dropout in layers of your own"
    )


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in what a function takes or gives back."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in tensors_in(one)]


def _replaced(value: Any, by: Mapping[int, Tensor]) -> Any:
    """The same with some tensors replaced, by their identity."""
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(one, by) for one in value)
    return {key: _replaced(one, by) for key, one in value.items()} if type(value) is dict else value


_current: ContextVar[Flow | None] = ContextVar("the flow that watches", default=None)


def current() -> Flow | None:
    """Who watches the call that is running, if it is watched."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextmanager
def watching(flow: Flow) -> Iterator[None]:
    """Follow a call; compiled parts of the model run as they are written."""
    handles: list[Any] = []
    token = _current.set(flow)
    try:
        for module in flow.model.modules():
            if module is not flow.model:
                handles.append(module.register_forward_pre_hook(flow.before, prepend=True))
                handles.append(module.register_forward_pre_hook(flow.arrives))
                handles.append(module.register_forward_hook(flow.after, prepend=True, always_call=True))
        with torch.compiler.set_stance("force_eager"), flow:
            yield
    finally:
        _current.reset(token)
        for handle in handles:
            handle.remove()
