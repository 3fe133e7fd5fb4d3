"""What calls of one set of shapes run: the printed forward and backward, inside one autograd Function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.agree import every_call
from shardgrad.comm.first_derivatives import first_derivative_only
from shardgrad.layout.lower import Products
from shardgrad.layout.program import Pass, backward_program, forward_program
from shardgrad.ops.modes import accumulating, deferrals, main_grads
from shardgrad.ops.namespace import Namespace

Check = Callable[[Sequence[Tensor | None]], None]


class Executable:
    """One or more products of one input, for one set of shapes.

    products: what is computed. needs: whether X, each weight and each bias that is there needs a gradient.
    check: called with what came to backward, before anything else, while ranks compare every call.
    also: one more pass over the instructions; None for none.
    again: the product of other tensors of these shapes, found anew.

    call: Y of every product (a tensor if there is one), differentiably, of X, the weights and the biases there are.
    function: the autograd Function behind it; None where nothing needs a gradient.
    graph_functions: the same as two functions, kept for torch.compile (`compiled`).
    """

    def __init__(
        self,
        products: Products,
        title: str,
        namespace: Namespace,
        needs: tuple[bool, ...],
        check: Check,
        also: Pass | None,
        again: Callable[[tuple[Tensor, ...]], Any],
    ) -> None:
        self.products, self.needs, self.check, self.again = products, needs, check, again
        self._title, self._namespace, self._also = title, namespace, also
        # Backward, by which dYs there are, whether the weights' gradients are deferred, and which go to a main_grad.
        self._backwards: dict[tuple[tuple[bool, ...], bool, tuple[int, ...], str | None], Callable[..., Any]] = {}
        self._forward = self.forward_function()
        self.graph_functions: Any = None
        self._needing = {} if products.saved_gathered else {needs: self}
        self.function: type[torch.autograd.Function] | None = None
        self.call: Callable[..., Any] = self._differentiable() if any(needs) else self._forward

    @property
    def source(self) -> str:
        """What runs, as Python: forward, and backward with every dY there."""
        bodies = [body for (has_grad, *_), body in self._backwards.items() if all(has_grad)]
        return "\n".join(str(function.__doc__) for function in (self._forward, *bodies))

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """Forward, and the backwards that have been called for."""
        return [self._forward, *self._backwards.values()]

    def needing(self, needs: tuple[bool, ...]) -> Executable:
        """The same where other tensors need a gradient, and nothing is saved as gathered."""
        found = self._needing.get(needs)
        if found is None:
            products = replace(self.products, save_gathered=frozenset())
            found = Executable(products, self._title, self._namespace, needs, self.check, self._also, self.again)
            found._needing = self._needing
            self._needing[needs] = found
        return found

    def forward_function(self, *, returns_saved: bool = False) -> Callable[..., Any]:
        """Forward; see `forward_program`."""
        needs = self.needs if any(self.needs) else None
        printed = forward_program(self.products, needs, self._also, returns_saved=returns_saved)
        return self._namespace.function(printed, self._title)

    def _backward_function(
        self, has_grad: tuple[bool, ...], deferred: bool = False, main: tuple[int, ...] = (), hold: str | None = None
    ) -> Callable[..., Any]:
        key = has_grad, deferred, main, hold
        found = self._backwards.get(key)
        if found is None:
            printed = backward_program(
                self.products, self.needs, has_grad, self._also, main=main, defer=deferred, hold=hold
            )
            found = self._backwards[key] = self._namespace.function(printed, self._title)
        return found

    def _differentiable(self) -> Callable[..., Any]:
        usual = self._backward_function((True,) * self.products.count)
        unusual, several = self._run_backward, self.products.count > 1

        @shim.untraced
        def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                return self._run_differentiable_backward(ctx, *dys)
            if (
                every_call
                or deferrals
                or main_grads
                or accumulating
                or dys[0] is None
                or (several and [dy for dy in dys if dy is None])
            ):
                return unusual(ctx, *dys)
            return usual(*dys, *ctx.saved_tensors)

        members = {"forward": staticmethod(self._forward), "backward": staticmethod(backward)}
        self.function = type("ShardedProduct", (torch.autograd.Function,), members)
        return shim.call_of(self.function)

    def _run_backward(self, ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of X, each weight and each bias; None where none is needed, or where it goes another way."""
        if every_call:
            self.check(dys)
        from shardgrad.ops.deferred import can_defer, defer
        from shardgrad.ops.main_grad import buffers_of
        from shardgrad.ops.micro_batches import holding

        deferred = bool(deferrals) and can_defer(ctx, slice(1, None))
        mains = buffers_of(ctx) if main_grads else {}
        now = holding(self._namespace.view, ctx, deferred or bool(mains)) if accumulating else None
        grads = self.gradients(dys, ctx.saved_tensors, deferred, mains, None if now is None else now.axis)
        if len(grads) > len(self.needs):
            defer(ctx, grads[-1])
        return grads[: len(self.needs)]

    def _run_differentiable_backward(self, ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """The same where a graph of the gradients is wanted; refused if it is used where gradients go another way."""
        from shardgrad.ops import derivatives
        from shardgrad.ops.main_grad import buffers_of

        unusual = {
            "save_gathered=": self.products.saved_gathered,
            "sg.defer_weight_grads": deferrals,
            "sg.use_main_grads": main_grads and buffers_of(ctx),
            "sg.micro_batches": accumulating,
        }
        names = [name for name, is_used in unusual.items() if is_used]
        if names:
            return first_derivative_only(f"{self._title} with {', '.join(names)}")(self._run_backward)(ctx, *dys)
        if every_call:
            self.check(dys)
        saved: list[Tensor | None] = [None] * (1 + self.products.count)
        for (role, at), tensor in zip(self.products.saved(self.needs), ctx.saved_tensors):
            saved[0 if role == "lhs" else 1 + at] = tensor
        return derivatives.gradients(self, dys, saved)

    def gradients(
        self,
        dys: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        deferred: bool = False,
        mains: dict[int, Tensor] | None = None,
        hold: str | None = None,
    ) -> tuple[Any, ...]:
        """The gradients of X, each weight and each bias, and what computes the deferred ones, if there are any.

        mains: buffers, by result, to which gradients are added; None stands in their place.
        hold: as of `backward_program`.
        """
        dys, mains = self._with_zeros(dys), mains or {}
        has_grad = tuple([dy is not None for dy in dys])
        body = self._backward_function(has_grad, deferred, tuple(mains), hold)
        grads: tuple[Any, ...] = body(*dys, *saved, *mains.values())
        return grads

    def _with_zeros(self, dys: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Zeros for an output that this rank's loss did not use, where another rank's may have: all must take part."""
        has_grad = [dy is not None for dy in dys]
        like = next((dy for dy in dys if dy is not None), None)
        if like is None or all(has_grad):
            return dys
        p, taking_part = self.products, self.products.taking_part(has_grad)
        return [
            like.new_zeros(p.sizes.shape_of(plan.stored["out"])) if dy is None and takes_part else dy
            for dy, takes_part, plan in zip(dys, taking_part, p.plans)
        ]
