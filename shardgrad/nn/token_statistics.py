"""`token_sums` with all derivatives, in torch.func's transforms, and as an operator of torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.adjoint import along
from shardgrad.comm.mesh import Axis, axis_of, view_of
from shardgrad.comm.pieces import refuse_exact
from shardgrad.comm.trace import traced_op
from shardgrad.nn.token_sums import Asked, Saved, Values, forward, gradient, other_gradient
from shardgrad.nn.vocabulary import NO_ID, Vocabulary, wider


def statistics(
    logits: Tensor, asked: Asked, chosen: Tensor | None = None, other: Tensor | None = None, blocks: int = 1
) -> Values:
    """The numbers of each token, differentiable; arguments as of `token_sums.forward`, ids as `masked` gives them.

    Raises:
        IndexError: an id is outside the vocabulary.
    """
    if torch.compiler.is_compiling():
        shim.leave_checkpoint()
        over, second = asked.vocabulary.over, asked.other or asked.vocabulary
        numbers = [asked.vocabulary.temperature, asked.vocabulary.soft_cap or 0.0]
        numbers += [second.temperature, second.soft_cap or 0.0]
        kinds = asked.logsumexp, asked.entropy, asked.mean
        size = asked.vocabulary.size
        made = torch.ops.shardgrad.token_statistics(logits, chosen, other, size, over.mesh, over.name, numbers, *kinds)
        return _as_values(made, asked, chosen)
    if chosen is not None and not shim.transforming():  # there the lookup looks at ids
        asked.vocabulary.check_ids(chosen)
    if shim.beyond_backward():
        return composed(logits, asked, chosen, other)
    return Values(*_Statistics.apply(logits, other, chosen, asked.vocabulary.over, asked, blocks))


@shim.untraced
class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        other: Tensor | None,
        chosen: Tensor | None,
        over: Axis,
        asked: Asked,
        blocks: int,
    ) -> Values:
        values, saved = forward(logits, asked, chosen, other, blocks)
        ctx.asked = asked
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, other, chosen, values.entropy, values.kl, *saved)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, Values(*grads), 1), None, None, None, None


def _backward(ctx: Any, grads: Values, second: int) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both logits, the second ones at so many'th argument; differentiable where a graph is wanted."""
    logits, other, chosen, entropy, kl, *saved = ctx.saved_tensors
    asked: Asked = ctx.asked
    of_other = grads.kl if ctx.needs_input_grad[second] else None
    wanted = ctx.needs_input_grad[0], of_other is not None
    if all(grad is None for grad in grads):
        return None, None
    if torch.is_grad_enabled():
        return _twice(asked, logits, other, chosen, grads, wanted)
    values, kept = Values(entropy=entropy, kl=kl), Saved(*saved)
    made = gradient(logits, asked, values, kept, grads, chosen, other) if wanted[0] else None
    return made, None if of_other is None else other_gradient(logits, other, asked, kept, of_other)


def _twice(
    asked: Asked,
    logits: Tensor,
    other: Tensor | None,
    chosen: Tensor | None,
    grads: Values,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    only = Asked(
        asked.vocabulary,
        grads.logsumexp is not None,
        grads.entropy is not None,
        grads.mean_log_prob is not None,
        None if grads.kl is None else asked.other,
    )
    values = composed(logits, only, None if grads.log_prob is None else chosen, None if grads.kl is None else other)
    inputs = [x for x, want in zip((logits, other), wanted) if want and x is not None]
    outputs = [value for value in values if value is not None]
    found = iter(torch.autograd.grad(outputs, inputs, [g for g in grads if g is not None], create_graph=True))
    return next(found) if wanted[0] else None, next(found) if wanted[1] else None


def composed(logits: Tensor, asked: Asked, chosen: Tensor | None, other: Tensor | None) -> Values:
    """The same of operations that have all derivatives."""
    vocabulary, over = asked.vocabulary, asked.vocabulary.over
    refuse_exact(view_of(over), [over.name], "a second derivative of a loss", "use backward() without a graph")
    z = vocabulary.read(logits)
    y = None if other is None or asked.other is None else asked.other.read(other)
    if y is not None:
        z, y = wider(z, y)
    if chosen is not None and not (asked.logsumexp or asked.entropy or asked.mean or y is not None):
        z = z.masked_fill((chosen == NO_ID).all(-1, keepdim=True), 0)  # nothing flows back into an ignored token
    log_sum = _log_sum(z, over)
    log_prob = None if chosen is None else _looked_up(z, vocabulary, chosen, log_sum)
    mean = along("all_reduce", z.sum(-1), over) / vocabulary.size - log_sum if asked.mean else None
    entropy = kl = None
    if asked.entropy or y is not None:
        log_p = z - along("replicate", log_sum, over).unsqueeze(-1)
        p = log_p.exp()
        if asked.entropy:
            entropy = -_expected(p, log_p, over)
        if y is not None:
            log_q = y - along("replicate", _log_sum(y, over), over).unsqueeze(-1)
            kl = _expected(p, log_p - log_q, over)
    return Values(log_prob, log_sum if asked.logsumexp else None, entropy, mean, kl)


def _log_sum(z: Tensor, over: Axis) -> Tensor:
    return along("gather_replicated", z.logsumexp(-1).unsqueeze(0), over, 0, over.size).logsumexp(0)


def _looked_up(z: Tensor, vocabulary: Vocabulary, chosen: Tensor, log_sum: Tensor) -> Tensor:
    none, here = chosen == NO_ID, vocabulary.part[1]
    local, mine = vocabulary.places(chosen)
    outside = ((chosen < 0) | (chosen >= vocabulary.size)) & ~none  # stays outside: the lookup refuses it
    local = local.masked_fill(outside, here)
    if here:
        picked = z.gather(-1, local).masked_fill(~mine, 0)
    else:
        picked = z.sum(-1, keepdim=True).expand(*z.shape[:-1], chosen.shape[-1])
    return (along("all_reduce", picked, vocabulary.over) - log_sum.unsqueeze(-1)).masked_fill(none, 0)


def _expected(p: Tensor, x: Tensor, over: Axis) -> Tensor:
    return along("all_reduce", (p * x.masked_fill(p == 0, 0)).sum(-1), over)


@torch.library.custom_op(
    "shardgrad::token_statistics",
    mutates_args=(),
    schema="(Tensor logits, Tensor? chosen, Tensor? other, SymInt vocab_size, str mesh, str axis, float[] numbers,"
    " bool logsumexp, bool entropy, bool mean) -> Tensor[]",
)
@traced_op
def _compiled(
    logits: Tensor,
    chosen: Tensor | None,
    other: Tensor | None,
    vocab_size: int,
    mesh: str,
    axis: str,
    numbers: Sequence[float],
    logsumexp: bool,
    entropy: bool,
    mean: bool,
) -> list[Tensor]:
    """`forward` as an operator that torch.compile does not look into: values that are asked for, and what is saved.
    numbers: temperature and soft cap (0: none) of both logits."""
    asked = _asked(other, vocab_size, axis_of(mesh, axis), numbers, logsumexp, entropy, mean)
    if chosen is not None:
        asked.vocabulary.check_ids(chosen)
    values, saved = forward(logits, asked, chosen, other)
    return [each.clone() for each in (*values, *saved) if each is not None]  # no views of one another


def _asked(
    other: Tensor | None,
    vocab_size: int,
    over: Axis,
    numbers: Sequence[float],
    logsumexp: bool,
    entropy: bool,
    mean: bool,
) -> Asked:
    temperature, cap, second_temperature, second_cap = numbers
    second = None if other is None else Vocabulary(vocab_size, over, second_temperature, second_cap or None)
    return Asked(Vocabulary(vocab_size, over, temperature, cap or None), logsumexp, entropy, mean, second)


def _as_values(made: Sequence[Tensor], asked: Asked, chosen: Tensor | None) -> Values:
    found = iter(made)
    return Values(*[next(found) if there else None for there in _present(asked, chosen)])


def _present(asked: Asked, chosen: Tensor | None) -> tuple[bool, ...]:
    """Which of `Values` there are."""
    return chosen is not None, asked.logsumexp, asked.entropy, asked.mean, asked.other is not None


@_compiled.register_fake
def _(
    logits: Tensor,
    chosen: Tensor | None,
    other: Tensor | None,
    vocab_size: int,
    mesh: str,
    axis: str,
    numbers: Sequence[float],
    logsumexp: bool,
    entropy: bool,
    mean: bool,
) -> list[Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    wide = wide if other is None else torch.promote_types(wide, other.dtype)
    several = [] if chosen is None else [logits.new_empty(chosen.shape, dtype=wide)]
    count = logsumexp + entropy + mean + (2 if other is None else 5)
    return [*several, *[logits.new_empty(logits.shape[:-1], dtype=wide) for _ in range(count)]]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, chosen, other, vocab_size, mesh, axis, *rest = inputs
    asked = _asked(other, vocab_size, axis_of(mesh, axis), *rest)
    ctx.asked, ctx.present = asked, _present(asked, chosen)
    values = _as_values(output, asked, chosen)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, other, chosen, values.entropy, values.kl, *output[sum(ctx.present) :])


def _compiled_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    found = iter(grads)
    of_logits, of_other = _backward(ctx, Values(*[next(found) if there else None for there in ctx.present]), 2)
    return of_logits, None, of_other, *(None,) * 7


_compiled.register_autograd(_compiled_gradient, setup_context=_set_up)
shim.ordered(_compiled)
