"""Races planted in programs that are written by hand: each is caught and named, with both of its lines."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.testing import distributed
from shardgrad.testing.late import RaceError, Report, late_watch


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def line_of(function: Callable[..., object], mark: str) -> int:
    """The number of the line of a function that ends with a comment."""
    lines, first = inspect.getsourcelines(function)
    return next(first + at for at, line in enumerate(lines) if line.rstrip().endswith(f"# {mark}"))


def assert_named(report: Report, kind: str, function: Callable[..., object]) -> None:
    """One finding, of that kind, that names the marked lines."""
    assert [one.kind for one in report.findings] == [kind], str(report)
    found = report.findings[0]
    assert found.started is not None
    assert found.started.line == f"{_shown()}:{line_of(function, 'started')}", str(report)
    if kind != "dropped":
        assert found.used is not None
        assert found.used.line == f"{_shown()}:{line_of(function, 'used')}", str(report)


def _shown() -> str:
    return __file__.removeprefix(os.getcwd() + os.sep)


def read_before_wait() -> None:
    x = tensor(3, 2)
    work = dist.all_reduce(x, async_op=True)  # started
    x.abs().max()  # used
    work.wait()


def read_of_a_slice() -> None:
    x = tensor(6, 2)
    work = dist.all_reduce(x[2:5], async_op=True)  # started
    x[:, 1].sum()  # used
    work.wait()


def read_of_an_alias() -> None:
    x = tensor(4, 3)
    alias = x.view(-1).detach()
    out = x.new_empty(4 * dist.get_world_size(), 3)
    work = dist.all_gather_single(out, x, async_op=True)  # started
    out.unflatten(0, (-1, 4)).movedim(0, 1).clone()  # used
    work.wait()
    alias.sum()


def read_by_item() -> None:
    x = tensor(1)
    work = dist.all_reduce(x, async_op=True)  # started
    x.item()  # used
    work.wait()


def read_as_numpy() -> None:
    x = tensor(3)
    work = dist.all_reduce(x, async_op=True)  # started
    x.numpy()  # used
    work.wait()


def read_as_list() -> None:
    x = torch.arange(3)
    work = dist.all_reduce(x, async_op=True)  # started
    x.tolist()  # used
    work.wait()


def read_by_print() -> None:
    x = tensor(3)
    work = dist.all_reduce(x, async_op=True)  # started
    str(x)  # used
    work.wait()


def read_by_a_format_string() -> None:
    x = tensor(3)
    work = dist.all_reduce(x, async_op=True)  # started
    f"{x}"  # used
    work.wait()


def read_by_a_deep_copy() -> None:
    x = tensor(3)
    work = dist.all_reduce(x, async_op=True)  # started
    copy.deepcopy({"x": x})  # used
    work.wait()


def read_of_a_deprecated_name() -> None:
    """Torch wraps its functions' old names in a decorator of another package."""
    x, out = tensor(3), tensor(3 * dist.get_world_size())
    with warnings.catch_warnings(action="ignore"):
        work = dist.all_gather_into_tensor(out, x, async_op=True)  # started
    out.sum()  # used
    work.wait()


def freed_while_sent() -> None:
    x, out = tensor(3), tensor(3 * dist.get_world_size())
    work = dist.all_gather_single(out, x, async_op=True)  # started
    x.untyped_storage().resize_(0)
    work.wait()  # used


def freed_while_awaited() -> None:
    x, out = tensor(3), tensor(3 * dist.get_world_size())
    work = dist.all_gather_single(out, x, async_op=True)  # started
    out.untyped_storage().resize_(0)
    work.wait()  # used


def read_of_a_bool() -> None:
    x = torch.tensor([False, True])
    work = dist.all_reduce(x, dist.ReduceOp.MAX, async_op=True)  # started
    bool(x[0])  # used
    work.wait()


def write_to_the_input() -> None:
    x, n = tensor(2, 3), dist.get_world_size()
    out = x.new_empty(2 * n, 3)
    work = dist.all_gather_single(out, x, async_op=True)  # started
    x.mul_(0.5)  # used
    work.wait()


def write_to_the_input_by_out() -> None:
    x, n = tensor(2 * dist.get_world_size(), 3), dist.get_world_size()
    out = x.new_empty(2, 3)
    work = dist.reduce_scatter_single(out, x, async_op=True)  # started
    torch.add(tensor(2 * n, 3), 1, out=x)  # used
    work.wait()


def write_to_the_output() -> None:
    x, n = tensor(2, 3), dist.get_world_size()
    out = x.new_empty(2 * n, 3)
    work = dist.all_gather_single(out, x, async_op=True)  # started
    out.zero_()  # used
    work.wait()


def wait_for_the_wrong_work() -> None:
    x, y = tensor(3), tensor(4)
    first = dist.all_reduce(x, async_op=True)  # started
    second = dist.all_reduce(y, async_op=True)
    second.wait()
    x + 1  # used
    first.wait()


def buffers_in_turn_one_step_too_early() -> None:
    buffers = [tensor(3), tensor(3)]
    works = [dist.all_reduce(buffer, async_op=True) for buffer in buffers]  # started
    works[0].wait()
    buffers[1].fill_(2.0)  # used
    works[1].wait()


def write_to_what_all_to_all_sends() -> None:
    n = dist.get_world_size()
    x, out = tensor(2 * n, 3), tensor(2 * n, 3)
    work = dist.all_to_all_single(out, x, async_op=True)  # started
    x[1].add_(1)  # used
    work.wait()


def read_of_all_to_all_with_lists() -> None:
    n = dist.get_world_size()
    ins, outs = [tensor(i + 2) for i in range(n)], [tensor(dist.get_rank() + 2) for _ in range(n)]
    work = dist.all_to_all(outs, ins, async_op=True)  # started
    torch.cat(outs[1:])  # used
    work.wait()


def read_of_coalesced() -> None:
    xs = [tensor(3), tensor(5)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:  # started
        for x in xs:
            dist.all_reduce(x)
    xs[1].exp()  # used
    manager.wait()


def write_to_what_is_sent() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    x, y = tensor(3), tensor(3)
    ops = [dist.P2POp(dist.isend, x, (rank + 1) % n), dist.P2POp(dist.irecv, y, (rank - 1) % n)]
    works = dist.batch_isend_irecv(ops)  # started
    x.neg_()  # used
    for work in works:
        work.wait()


def read_of_what_is_received() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    x, y = tensor(3), tensor(3)
    ops = [dist.P2POp(dist.isend, x, (rank + 1) % n), dist.P2POp(dist.irecv, y, (rank - 1) % n)]
    works = dist.batch_isend_irecv(ops)  # started
    x + y  # used
    for work in works:
        work.wait()


def read_in_a_hook_of_backward() -> None:
    w, pending = tensor(3, 3).requires_grad_(), []

    def start(p: Tensor) -> None:
        pending.append(dist.all_reduce(p.grad, async_op=True))  # started

    def norm(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.norm()  # used

    w.register_post_accumulate_grad_hook(start)
    w.register_post_accumulate_grad_hook(norm)
    (tensor(2, 3) @ w).sum().backward()
    pending[0].wait()


class EarlyScale(torch.autograd.Function):
    """A column parallel layer whose backward looks at dX for a loss scale before it has come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        dx = dy @ w
        work = dist.all_reduce(dx, async_op=True)  # started
        dw = dy.t() @ x * dx.isfinite().all()  # used
        work.wait()
        return dx, dw


def read_in_backward() -> None:
    x, w = tensor(4, 3).requires_grad_(), tensor(2, 3).requires_grad_()
    EarlyScale.apply(x, w).sum().backward()


read_in_backward.marked = EarlyScale.backward  # type: ignore[attr-defined]


def read_by_an_operator_of_backward() -> None:
    """The engine adds two gradients of x, one of which has not come."""
    x = tensor(4, 3).requires_grad_()
    pending = []

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            dx = dy * 2
            pending.append(dist.all_reduce(dx, async_op=True))  # started
            return dx

    (Early.apply(x) + x.sin()).sum().backward()  # used
    pending[0].wait()


def dropped() -> None:
    x = tensor(3)
    dist.all_reduce(x, async_op=True)  # started


def dropped_in_a_circle() -> None:
    holder: list[object] = [dist.all_reduce(tensor(3), async_op=True)]  # started
    holder.append(holder)


def given_to_another_group() -> None:
    ranks = list(range(dist.get_world_size()))
    other = dist.new_group(ranks)
    x = tensor(3)
    work = dist.all_reduce(x, async_op=True)  # started
    dist.all_reduce(x, group=other)  # used
    work.wait()


def given_to_a_functional_collective() -> None:
    x = tensor(3)
    work = dist.all_reduce(x, async_op=True)  # started
    torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", "0"))  # used
    work.wait()


def functional_without_wait() -> None:
    x = tensor(3)
    y = torch.ops._c10d_functional.all_reduce(x, "sum", "0")  # started
    y * 2  # used
    torch.ops._c10d_functional.wait_tensor(y)


PLANTED = {
    read_before_wait: "read before wait",
    read_of_a_slice: "read before wait",
    read_of_an_alias: "read before wait",
    read_by_item: "read before wait",
    read_as_numpy: "read before wait",
    read_as_list: "read before wait",
    read_by_print: "read before wait",
    read_by_a_format_string: "read before wait",
    read_by_a_deep_copy: "read before wait",
    read_of_a_deprecated_name: "read before wait",
    freed_while_sent: "freed before wait",
    freed_while_awaited: "freed before wait",
    read_of_a_bool: "read before wait",
    write_to_the_input: "changed before wait",
    write_to_the_input_by_out: "changed before wait",
    write_to_the_output: "written before wait",
    wait_for_the_wrong_work: "read before wait",
    buffers_in_turn_one_step_too_early: "written before wait",
    write_to_what_all_to_all_sends: "changed before wait",
    read_of_all_to_all_with_lists: "read before wait",
    read_of_coalesced: "read before wait",
    write_to_what_is_sent: "changed before wait",
    read_of_what_is_received: "read before wait",
    read_in_a_hook_of_backward: "read before wait",
    read_in_backward: "read before wait",
    read_by_an_operator_of_backward: "read before wait",
    dropped: "dropped",
    dropped_in_a_circle: "dropped",
    given_to_another_group: "read before wait",
    given_to_a_functional_collective: "read before wait",
    functional_without_wait: "read before wait",
}


@distributed(world_size=3, backend="late")
@pytest.mark.parametrize("name", [planted.__name__ for planted in PLANTED])
def test_planted(name: str) -> None:
    planted = globals()[name]
    with late_watch(raises=False) as report:
        planted()
    assert_named(report, PLANTED[planted], getattr(planted, "marked", planted))
    assert report.collectives > 0


@distributed(world_size=2, backend="late")
def test_the_block_ends_with_an_error_that_reads_well() -> None:
    with pytest.raises(RaceError) as caught, late_watch():
        read_before_wait()
    text = str(caught.value)
    assert text.startswith(
        "1 fault that CPUs do not show and GPUs may:\nread before wait: aten.abs.default reads what "
    )
    assert (
        "all-reduce (SUM) of float64 [3, 2] over 'default_pg' (ranks 0, 1) has not brought yet\n    started at " in text
    )
    assert "in read_before_wait: x.abs().max()  # used" in text
    assert caught.value.findings[0].kind == "read before wait"


@distributed(world_size=2, backend="late")
def test_an_error_of_the_program_does_not_hide_what_was_found() -> None:
    def fails() -> None:
        read_before_wait()
        raise ArithmeticError("not a number")

    with pytest.raises(RaceError, match="read before wait") as caught, late_watch():
        fails()
    assert isinstance(caught.value.__cause__, ArithmeticError)


@distributed(world_size=2, backend="late")
def test_values_tell_where_nobody_watches(rank: int) -> None:
    """On a thread that has no `late_watch` of its own: what is read is NaN, and what was changed is known at wait."""
    import threading

    seen: list[object] = []

    def unwatched() -> None:
        x, y, flags = tensor(3), torch.arange(3), torch.tensor([False])
        works = [dist.all_reduce(each, async_op=True) for each in (x, y)]
        works.append(dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True))
        seen.extend([x.isnan().all().item(), y.max().item(), flags.item()])
        for work in works:
            work.wait()
        seen.extend([x.isnan().any().item(), y.tolist(), flags.item()])
        out = tensor(2 * dist.get_world_size())
        work = dist.all_gather_single(out, y.double()[:2].contiguous(), async_op=True)
        out[0] = 1
        work.wait()
        source = torch.ones(2, dtype=torch.float64)
        work = dist.all_gather_single(out, source, async_op=True)
        source += 1
        work.wait()

    with late_watch(raises=False) as report:
        thread = threading.Thread(target=unwatched)
        thread.start()
        thread.join()
    assert seen == [True, -0x7FFF_FFFF_FFFF_E582, True, False, [0, 2, 4], False]
    assert [one.kind for one in report.findings] == ["written before wait", "changed before wait"]
    assert "a result [4] of all-gather" in str(report)
    assert "what was given [2] of all-gather" in str(report)


@distributed(world_size=2)
def test_outside_of_a_block_faults_are_raised(rank: int) -> None:
    """On a group of its own, in a test on gloo, around which no block is."""
    import shardgrad.testing.late

    shardgrad.testing.late.register()
    group = dist.new_group(backend="late")
    source, out = torch.ones(2), torch.empty(4)
    work = dist.all_gather_single(out, source, group=group, async_op=True)
    source += 1
    with pytest.raises(RaceError, match=r"changed before wait: what was given \[2\] of all-gather of float32 \[2\]"):
        work.wait()
    work = dist.all_reduce(source, group=group, async_op=True)
    with pytest.warns(UserWarning, match=r"dropped: the work of all-reduce"):
        del work
    dist.all_reduce(source, group=group)
    with late_watch() as report:
        dist.all_reduce(source, group=group)
    assert report.notes == []
    silent = pytest.warns(UserWarning, match=r"late_watch: nothing was watched: .* the default group is on .*gloo")
    with silent, late_watch() as report:
        dist.all_reduce(source)
    assert "nothing was watched" in str(report)
