"""The one place that knows torch's private or renamed names, with `shim_fused` and `shim_late` beside it."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_iter as tree_iter

from shardgrad.comm.shim_fused import as_own_tensor as as_own_tensor
from shardgrad.comm.shim_fused import begin_symmetric_memory as begin_symmetric_memory
from shardgrad.comm.shim_fused import fused_products as fused_products
from shardgrad.comm.shim_fused import lacks_fused_products as lacks_fused_products
from shardgrad.comm.shim_late import all_to_all_of as all_to_all_of
from shardgrad.comm.shim_late import batch_of_messages as batch_of_messages
from shardgrad.comm.shim_late import no_modes as no_modes

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# torch 2.13 renamed these two; the old names warn there and are the only ones before.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


GROUPED_MM: Any = torch.ops.aten._grouped_mm.default


AllgatherOptions: Any = dist.distributed_c10d.AllgatherOptions  # type: ignore[attr-defined]


T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Have torch.compile call a function while it traces, and take what it returns for a constant of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result
    return function  # does, which imports torch._dynamo: a second


def untraced(target: T) -> T:
    """Mark a function, or those of an autograd Function, which torch.compile is not to look into where it comes upon
    their calls outside of its graphs, nor into what they call. Unlike with `eager`, calling them costs nothing more."""
    frames: Any = torch._C._dynamo.eval_frame  # what torch._dynamo calls, which takes a second to import
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for each in vars(target).values() if isinstance(target, type) else [target]:
        function = getattr(each, "__func__", each)
        if isinstance(function, types.FunctionType):
            frames.set_code_exec_strategy(function.__code__, skip)
    return target


def eager(why: str) -> Callable[[F], F]:
    """Decorate a function that torch.compile is to leave outside of its graphs."""
    return cast(Callable[[F], F], torch.compiler.disable(reason=why))


def all_gather_of(group: Any) -> Any:
    """The method of a group, or of what it calls, that gathers into one tensor: `(whole, shard, options) -> work`."""
    return getattr(group, "all_gather_single", None) or group._allgather_base


def reduce_scatter_of(group: Any) -> Any:
    """That which reduces one tensor and keeps a part: `(shard, whole, options) -> work`."""
    return getattr(group, "reduce_scatter_single", None) or group._reduce_scatter_base


def store() -> Any:
    """The key-value store of the default process group: the one channel left when a collective has failed."""
    return dist.distributed_c10d._get_default_store()


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a collective of a group may take; torch's own default where the group does not say."""
    for device in ("cpu", "cuda"):
        options = getattr(backend(group, torch.device(device)), "options", None)
        if options is not None:
            return float(options._timeout.total_seconds())
    own = getattr(group, "timeout", None)  # of shared memory
    return float(own) if own is not None else dist.default_pg_timeout.total_seconds()


def waits_in_slices(backend: Any) -> bool:
    """Whether the works of a backend may be waited for a while, and again: gloo's may; a limit has NCCL's wait keep the
    host until the device is done."""
    return isinstance(backend, getattr(dist, "ProcessGroupGloo", ()))


def process_group(argument: Any) -> dist.ProcessGroup | None:
    """The process group inside an argument of a c10d operator, or None if it holds something else."""
    if isinstance(argument, dist.ProcessGroup):
        return _named(argument)
    if isinstance(argument, torch.ScriptObject):
        try:
            return _named(dist.ProcessGroup.unbox(argument))
        except RuntimeError:
            return None
    return None


def _named(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group itself, where a shadow speaks for it."""
    return group.shadow_of() or group if isinstance(group, DispatchShadow) else group


# How many TorchDispatchModes are active in this thread: 0 is none.
dispatch_mode_active: Callable[[], int] = torch._C._len_torch_dispatch_stack


def backend(group: dist.ProcessGroup, device: torch.device) -> Any:
    """What a group calls for tensors of a device: the same methods, without PyTorch's dispatcher between. The group
    itself where it has none for the device, to say so when it is used."""
    try:
        return group._get_backend(device)
    except RuntimeError:
        return group


def call_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` less what torch before 2.14 does in Python before it (1.5 of 5 µs of CPU).

    That is for functorch's transforms alone: not to be called while `transforming()`, nor with tensors that escaped
    from one. Only for functions without `setup_context` and without default arguments.
    """
    if _TORCH >= (2, 14):
        return function.apply
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


# Whether functorch's transforms (vmap, grad, jvp) are at work in this thread.
transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def beyond_backward() -> bool:
    """Whether torch.func's transforms are at work in this thread, or tensors may have tangents: inside
    `torch.autograd.forward_ad.dual_level()`."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_transformed(x: torch.Tensor) -> bool:
    """Whether a tensor has a tangent, or is one of torch.func's: then its memory is not all that it stands for."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return torch._C._is_fwd_grad_enabled() and forward_ad.unpack_dual(x).tangent is not None


def is_batched(x: torch.Tensor) -> bool:
    """Whether a tensor stands for one entry of several, inside `torch.vmap`, at any level of torch.func."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def no_dispatch() -> Any:
    """A block whose operations no TorchDispatchMode sees."""
    return torch._C._DisableTorchDispatch()


_FakeBackend: Any = torch._C._distributed_c10d.FakeProcessGroup


def refuse_calls_past_python(group: dist.ProcessGroup) -> None:
    """Give a group that is written in Python a backend of torch's that refuses every call.

    Torch keeps a group's name, its devices and its hooks (2.15 hangs a flight recorder on each) beside a backend. Calls
    from C++ that a Python group cannot take over end there: an error, where nothing would have been sent.
    """
    options = _FakeBackend.Options()
    options.error_on_collective = True
    fake = _FakeBackend._create_internal(group.rank(), group.size(), options)
    custom = dist.ProcessGroup.BackendType.CUSTOM
    group._register_backend(torch.device("cpu"), custom, fake)
    group._set_default_backend(custom)


class DispatchShadow(dist.ProcessGroup):
    """Speaks to PyTorch's dispatcher for a group that is written in Python.

    A group of the usual backends is called through the dispatcher, where modes can listen; the methods of a Python
    group are called directly. So the group has the same call made on this one, whose backend sends nothing.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self.shadow_of = weakref.ref(group)
        fake = _FakeBackend._create_internal(group.rank(), group.size())
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, fake)


_shadows: weakref.WeakKeyDictionary[dist.ProcessGroup, DispatchShadow] = weakref.WeakKeyDictionary()


def call_shadow(group: dist.ProcessGroup, name: str, *args: Any, **kwargs: Any) -> None:
    """Make a call of a Python group known to the TorchDispatchModes that are active."""
    shadow = _shadows.get(group)
    if shadow is None:
        shadow = _shadows[group] = DispatchShadow(group)
    # The fake backend may refuse what the real one does (shards of different sizes); listeners have heard it by then.
    with contextlib.suppress(RuntimeError):
        getattr(shadow, name)(*args, **kwargs)


def ordered(operator: Any) -> None:
    """Keep the calls of custom operators in the order of the program, whatever a compiler would rather do first."""
    from torch._library.effects import EffectType

    operator.register_effect(EffectType.ORDERED)


def real_mesh(mesh: Any) -> Any:
    """The mesh itself, where torch.compile shows a stand-in for it."""
    return getattr(mesh, "real_obj", mesh)


def root_of(mesh: Any) -> Any:
    """The mesh that a mesh is a slice of; itself, if it is none."""
    return real_mesh(mesh)._get_root_mesh()


def places_along(mesh: Any, axis: str) -> dict[int, int]:
    """The place along an axis of every rank of the mesh that a mesh is part of; empty where that has no such axis."""
    root = root_of(mesh)
    names = root.mesh_dim_names or ()
    if axis not in names:
        return {}
    dim = names.index(axis)
    ranks = root.mesh.movedim(dim, 0).reshape(root.mesh.shape[dim], -1)
    return {int(rank): at for at, row in enumerate(ranks.tolist()) for rank in row}


def _ranks_of_ddp(names: dict[str, Any]) -> list[int] | None:
    group = getattr(names.get("self"), "process_group", None)
    return None if group is None else dist.get_process_group_ranks(group)


def _ranks_of_fsdp(names: dict[str, Any]) -> list[int] | None:
    mesh = names.get("mesh")
    return None if mesh is None else [int(rank) for rank in mesh.mesh.flatten().tolist()]


# Functions of torch that take a module's parameters for the same on some ranks, by their module and name; what an error
# calls them, and how the ranks are read from their local variables.
_DATA_PARALLEL: dict[tuple[str, str], tuple[str, Callable[[dict[str, Any]], list[int] | None]]] = {
    ("torch.nn.parallel.distributed", "__init__"): ("DistributedDataParallel", _ranks_of_ddp),
    ("torch.distributed.fsdp._fully_shard._fully_shard", "fully_shard"): ("fully_shard", _ranks_of_fsdp),
}


def data_parallel_group() -> tuple[str, list[int]] | None:
    """What DDP's constructor or `fully_shard`, if one of them is calling, or else the DDP whose forward this is in, is
    called in an error, and the ranks that it takes for replicas. Both ask each module that they are given for its
    parameters before they change one."""
    frame: Any = sys._getframe(1)
    for _ in range(10):
        if frame is None:
            break
        known = _DATA_PARALLEL.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        ranks = known and known[1](frame.f_locals)
        if known and ranks:
            return known[0], ranks
        frame = frame.f_back
    active = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    ranks = None if active is None else _ranks_of_ddp({"self": active})
    return None if ranks is None else ("DistributedDataParallel", ranks)


def leave_checkpoint() -> None:
    """Where torch.compile takes a `torch.utils.checkpoint` into its graph, have it run the checkpoint outside, and make
    graphs of what it holds: torch before 2.15 cannot compute ordered operators again in a graph (AssertionError)."""
    if _TORCH < (2, 15) and _in_compiled_checkpoint():
        torch._dynamo.graph_break(msg="shardgrad: a checkpoint runs outside of graphs; what it holds, in its own")


@constant
def _in_compiled_checkpoint() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    while tracer is not None:
        if getattr(tracer.source_target, "__name__", "") == "tag_activation_checkpoint":
            return True
        tracer = tracer.parent
    return False


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape and a device but no values (torch's FakeTensor)."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(x, module.FakeTensor)


@contextmanager
def real_tensors() -> Iterator[None]:
    """A block whose new tensors have values and are no transform's, also inside `without_memory` and torch.func."""
    with contextlib.ExitStack() as stack:
        module = sys.modules.get("torch._subclasses.fake_tensor")
        if module is not None:
            stack.enter_context(module.unset_fake_temporarily())
        if transforming():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        yield


@contextmanager
def without_memory() -> Iterator[None]:
    """A block in which tensors are shapes alone: nothing is allocated, nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def join_imagined(rank: int, ranks: int) -> None:
    """Start the default process group as one of so many ranks, none of which need exist: torch's `fake` backend, which
    sends nothing and returns at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def forget_meshes() -> None:
    """Have DTensor forget the meshes that its cache of operations holds. It takes equal meshes for the same one, also
    where the process groups of the first have been destroyed and those names now mean others, or none."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def is_imagined(group: dist.ProcessGroup) -> bool:
    """Whether the other ranks of a group do not exist: of torch's `fake` backend."""
    return bool(dist.get_backend(group) == "fake")


def storage_number(x: torch.Tensor) -> int:
    """The same for tensors that share memory, also where they have none and so no address."""
    return int(x.untyped_storage()._cdata)


def allocations(record: Any) -> list[int]:
    """Bytes that torch's allocator of CPU memory gave (and, below 0, took back), one after the other, in a block of
    `torch.profiler.profile(profile_memory=True)`."""
    events = [one for one in record.profiler.kineto_results.events() if one.name() == "[memory]"]
    return [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]


def broadcasts(node: Any) -> bool:
    """Whether a node of the graph was given less, to be differentiated, than its first result has elements."""
    made = prod(node._input_metadata[0].shape)
    given = [before._input_metadata[at].shape for before, at in node.next_functions if before is not None]
    return any(prod(shape) < made for shape in given)


def multiplied_first(node: Any) -> bool:
    """Whether a node of the graph is of a sum one of whose terms it multiplied itself: `torch.add(x, y, alpha=3)`."""
    return bool(getattr(node, "_saved_alpha", 1) != 1)


def in_backward() -> bool:
    """Whether this thread runs a backward: in a forward then, one that is recomputed."""
    return torch._C._current_graph_task_id() != -1


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def move_hooks(old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Give a module the hooks of the one whose place it takes; those who registered them can still remove them."""
    for name in (*_HOOKS, *_HOOK_FLAGS):
        mine = getattr(new, name)
        theirs = getattr(old, name)
        theirs.update({key: value for key, value in mine.items() if key not in theirs})
        setattr(new, name, theirs)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def is_persistent(module: torch.nn.Module, buffer: str) -> bool:
    """Whether a buffer of a module is part of its state."""
    return buffer not in module._non_persistent_buffers_set


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor, or a DTensor, the data of another one of any dtype; its hooks stay."""
    tensor.data = value
    local = getattr(value, "_local_tensor", None)
    if local is not None:  # a DTensor's data are those of a tensor that it holds
        tensor._local_tensor, tensor._spec = local, value._spec  # type: ignore[attr-defined]


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of a name."""
    group: dist.ProcessGroup = cast(Any, dist.distributed_c10d)._resolve_process_group(name)
    return group
