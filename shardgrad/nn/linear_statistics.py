"""Numbers of each token's distribution, and the product that makes its logits, as one differentiable operation.

Logits of one chunk of tokens exist at a time (see `linear_sums`), and numbers of them are those of `token_sums`. Either
backward computes the logits of each chunk again, or a loss whose gradient is known but for a factor has dX, dW and db
made in forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.first_derivatives import FirstDerivativeOnly, refuse_transforms
from shardgrad.nn.linear_sums import Gradients, Head, Operands
from shardgrad.nn.token_sums import Asked, Saved, Values, forward, gradient, other_gradient
from shardgrad.ops.deferred import can_defer, defer
from shardgrad.ops.main_grad import buffers_of
from shardgrad.ops.modes import deferrals, main_grads

_WHAT = "logits computed in chunks (sg.linear_cross_entropy, sg.linear_statistics)"


@dataclass(frozen=True)
class Call:
    """What one call computes: of one head, and of a second one to whose distribution the first one's is compared.

    chunk: the tokens of one chunk.
    """

    heads: tuple[Head, ...]
    asked: Asked
    chunk: int

    def chunks(self) -> Iterator[tuple[int, slice, bool]]:
        return self.heads[0].chunks(self.chunk)

    def by_head(self, values: Sequence[Any]) -> list[list[Any]]:
        """What belongs to X, W and B of each head, in order; None for a bias that is not there."""
        found, at = [], 0
        for head in self.heads:
            count = 2 + head.biased
            found.append([*values[at : at + count], *[None] * (3 - count)])
            at += count
        return found

    def flat(self, by_head: Sequence[Sequence[Any]]) -> list[Any]:
        """The reverse of `by_head`."""
        return [value for head, each in zip(self.heads, by_head) for value in each[: 2 + head.biased]]

    def wants(self, needs: Sequence[bool], which: Sequence[bool]) -> list[list[bool]]:
        """Of X, W and B of each head, whether a gradient is needed and is one of `which`."""
        return [[bool(need) and one for need, one in zip(each, which)] for each in self.by_head(needs)]


class LinearStatistics(FirstDerivativeOnly):
    """Values [n], [n, k] of ids [n, k], and of X, W and B of each head."""

    what = _WHAT

    @staticmethod
    def forward(ctx: Any, call: Call, chosen: Tensor | None, *tensors: Tensor) -> Values:
        given = call.by_head(tensors)
        operands = [Operands(head, *each) for head, each in zip(call.heads, given)]
        found = []
        for _, rows, _ in call.chunks():
            z, *other = (one.logits(rows) for one in operands)
            found.append(forward(z, call.asked, None if chosen is None else chosen[rows], other[0] if other else None))
        values = Values(*_joined([one for one, _ in found]))
        saved = Saved(*_joined([one for _, one in found]))  # type: ignore[arg-type]
        ctx.call, ctx.dtypes = call, [one.dtype for one in tensors]
        ctx.set_materialize_grads(False)
        kept = [one.to_keep(*each) for one, each in zip(operands, given)]
        ctx.save_for_backward(chosen, values.entropy, values.kl, *saved, *call.flat(kept))
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        chosen, entropy, kl, *rest = ctx.saved_tensors
        numbers = Values(entropy=entropy, kl=kl), Saved(*rest[: len(Saved._fields)]), Values(*grads)
        kept, needs = rest[len(Saved._fields) :], ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return None, None, *(None for _ in needs)

        def compute(wanted: Sequence[Sequence[bool]], mains: dict[int, Tensor]) -> list[Tensor | None]:
            with torch.autocast(call.heads[0].view.device.type, enabled=False):
                operands = [Operands(head, *each, kept=True) for head, each in zip(call.heads, call.by_head(kept))]
                buffers = call.by_head([mains.get(at) for at in range(len(kept))])
                sinks = [
                    Gradients(head, one, want, main[1])
                    for head, one, want, main in zip(call.heads, operands, wanted, buffers, strict=True)
                ]
                for piece, rows, is_last in call.chunks():
                    logits = [one.logits(rows) for one in operands]
                    ids = None if chosen is None else chosen[rows]
                    for sink, dz in _logits_gradients(call, logits, _rows_of(numbers, rows), ids, sinks):
                        sink.add(piece, rows, dz, is_last)
                        del dz
            return _delivered(call, sinks, ctx.dtypes, mains)

        return None, None, *_now_or_later(ctx, call, needs, chosen is not None, compute)


class LossWithGradients(torch.autograd.Function):
    """Σ of the tokens' losses [] of ids [n, 1], with dX, dW and db made as it is.

    loss: of a chunk's values and rows, the losses [n].
    total: of the losses [n] of this rank, the sum over all ranks.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        refuse_transforms(_WHAT)
        return super().apply(*args)

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        chosen: Tensor,
        loss: Callable[[Values, slice], Tensor],
        total: Callable[[Tensor], Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.wanted = call.wants(ctx.needs_input_grad[4:], (True, True, True))[0]
        operands = Operands(call.heads[0], *call.by_head(tensors)[0])
        sink = Gradients(call.heads[0], operands, ctx.wanted)
        losses = []
        for piece, rows, is_last in call.chunks():
            z = operands.logits(rows)
            values, saved = forward(z, call.asked, chosen[rows])
            each, grads = _loss_and_gradients(values, rows, loss)
            losses.append(each)
            sink.add(piece, rows, gradient(z, call.asked, values, saved, grads, chosen[rows]), is_last)
            del z
        if ctx.wanted[0]:
            sink.of_input()
        ctx.call, ctx.dtypes, ctx.sink = call, [one.dtype for one in tensors], sink
        return total(torch.cat(losses))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, sink, ctx.sink = ctx.call, ctx.sink, None
        if torch.is_grad_enabled() or sink is None:
            what = "a second derivative" if sink is not None else "a second backward"
            raise RuntimeError(
                f"{what} through {_WHAT} whose gradients were made in forward (grads='forward'): they are there once. "
                "Use grads='backward', or vocab_parallel_cross_entropy of logits"
            )
        sink.scale(grad)

        def compute(wanted: Sequence[Sequence[bool]], mains: dict[int, Tensor]) -> list[Tensor | None]:
            sink.wanted = tuple(wanted[0])
            return _delivered(call, [sink], ctx.dtypes, mains)

        needs = ctx.needs_input_grad[4:]
        return None, None, None, None, *_now_or_later(ctx, call, needs, True, compute)


def _loss_and_gradients(values: Values, rows: slice, loss: Callable[[Values, slice], Tensor]) -> tuple[Tensor, Values]:
    """Losses [n], and the gradient of their sum for each of the values."""
    with torch.enable_grad():
        leaves = Values(*[None if one is None else one.detach().requires_grad_() for one in values])
        each = loss(leaves, rows)
        found = iter(torch.autograd.grad(each.sum(), [one for one in leaves if one is not None]))
    return each.detach(), Values(*[None if one is None else next(found) for one in leaves])


def _joined(found: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    return [None if each[0] is None else torch.cat(each) for each in zip(*found)]


def _rows_of(numbers: tuple[Values, Saved, Values], rows: slice) -> tuple[Values, Saved, Values]:
    values, saved, grads = ([None if one is None else one[rows] for one in each] for each in numbers)
    return Values(*values), Saved(*saved), Values(*grads)  # type: ignore[arg-type]


def _logits_gradients(
    call: Call,
    logits: Sequence[Tensor],
    numbers: tuple[Values, Saved, Values],
    chosen: Tensor | None,
    sinks: Sequence[Gradients],
) -> Iterator[tuple[Gradients, Tensor]]:
    """dZ of a chunk, for each head that wants it."""
    (z, *other), (values, saved, grads) = logits, numbers
    if any(sinks[0].wanted):
        yield sinks[0], gradient(z, call.asked, values, saved, grads, chosen, *other)
    if other and any(sinks[1].wanted):
        assert grads.kl is not None
        yield sinks[1], other_gradient(z, other[0], call.asked, saved, grads.kl)


def _delivered(
    call: Call, sinks: Sequence[Gradients], dtypes: Sequence[torch.dtype], mains: dict[int, Tensor]
) -> list[Tensor | None]:
    """The gradients of X, W and B of each head, as they are stored; None of what is added to a main_grad."""
    made: list[list[Tensor | None]] = []
    for sink in sinks:
        wants_x, wants_w, wants_b = sink.wanted
        made.append(
            [
                sink.of_input() if wants_x else None,
                sink.of_weight() if wants_w else None,
                sink.of_bias() if wants_b else None,
            ]
        )
    found: list[Tensor | None] = []
    for at, (grad, dtype) in enumerate(zip(call.flat(made), dtypes, strict=True)):
        if grad is not None and at in mains:
            mains[at].add_(grad)
        found.append(None if grad is None or at in mains else grad.to(dtype))
    return found


def _now_or_later(
    ctx: Any,
    call: Call,
    needs: Sequence[bool],
    ids: bool,
    compute: Callable[[Sequence[Sequence[bool]], dict[int, Tensor]], list[Tensor | None]],
) -> list[Tensor | None]:
    """The gradients of the tensors; where a block of `defer_weight_grads` is open, those of X alone, and the others
    later.

    ids: whether the ids stand before the tensors among what the node has come from.
    """
    count, first = len(needs), int(ids)
    mains = {at - first: buffer for at, buffer in buffers_of(ctx).items()} if main_grads else {}
    weights = [first + at for head in call.by_head(range(count)) for at in head[1:] if at is not None]
    wants_weights = any(any(each) for each in call.wants(needs, (False, True, True)))
    if deferrals and wants_weights and all(can_defer(ctx, slice(at, at + 1)) for at in weights):
        now = call.wants(needs, (True, False, False))
        later = call.wants(needs, (False, True, True))
        wants_inputs = any(any(each) for each in now)
        grads = compute(now, {}) if wants_inputs else list[Tensor | None]([None] * count)
        defer(ctx, lambda: [*[None] * first, *compute(later, mains)])
        return grads
    return compute(call.wants(needs, (True, True, True)), mains)
