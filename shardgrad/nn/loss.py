"""Cross-entropy of logits whose vocabulary is sharded over an axis; the whole vocabulary never exists on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_reduce, along
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import Axis, axis_of, axis_on, view, view_of
from shardgrad.comm.pieces import exact, level_of, pieces_here, reduce_pieces_collectives, refuse_exact
from shardgrad.comm.trace import traced_op
from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective, itemsize, sent
from shardgrad.layout.sizes import chunk, rule
from shardgrad.nn.exact_loss import sum_of_tokens, sums_of_pieces
from shardgrad.nn.pieces import is_exact


@told
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int,
    mesh: DeviceMesh,
    axis: str = "tp",
    token_axes: str | Sequence[str] = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """F.cross_entropy over a vocabulary that is sharded over an axis, in fp32 for 16-bit logits.

    Communicates three numbers a token: the maximum, the sum of exponentials, and the target's logit (four with label
    smoothing). The logits are read, never written. The loss and each token's loss are alike on every rank of the axis.

    Args:
        logits: [..., vocab_size / ranks], this rank's part, as the axis shards (torch.chunk, or `set_balanced`).
        target: [...] of ids of the whole vocabulary, alike on every rank of the axis.
        vocab_size: the global vocabulary.
        mesh, axis: the axis of the mesh that shards the vocabulary.
        token_axes: axes over which ranks hold different tokens (data parallel): `mean` divides by the tokens of all of
            them, and `mean` and `sum` are those of all tokens, on every rank. Call backward on every rank, once.
        ignore_index, label_smoothing, reduction: as of F.cross_entropy; smoothing is over the global vocabulary.

    In exact mode (`sg.set_exact`) the token axes shard the first dim, and its pieces are summed in the tree.

    Raises:
        ShapeError: logits that are whole already, or otherwise do not fit `vocab_size`, or target does not fit logits.
        IndexError: a target is outside the vocabulary.
        ValueError: an unknown reduction, or label smoothing outside [0, 1].
    Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3.
    """
    token_axes = (token_axes,) if isinstance(token_axes, str) else token_axes
    over = axis_on(mesh, axis, "vocab_parallel_cross_entropy")
    tokens_over = [axis_on(mesh, name, "vocab_parallel_cross_entropy") for name in token_axes]
    if over in tokens_over:
        raise ShapeError(
            f"axis {axis!r} shards the vocabulary; it cannot be one of token_axes={tuple(token_axes)} as well"
        )
    _check(logits, target, vocab_size, over, ignore_index, label_smoothing, reduction)
    if torch.compiler.is_compiling():
        shim.leave_checkpoint()
        arguments = vocab_size, over.mesh, axis, ignore_index, float(label_smoothing)
        losses = torch.ops.shardgrad.vocab_cross_entropy(logits, target, *arguments)[0]
    elif shim.beyond_backward():
        losses = _composed(logits, target, vocab_size, over, ignore_index, label_smoothing)
    else:
        blocks = prod(pieces_here(view(mesh), name) for name in token_axes)
        losses = _CrossEntropy.apply(logits, target, vocab_size, over, ignore_index, label_smoothing, blocks)
    if reduction == "none":
        return losses
    if is_exact(mesh):
        total = sum_of_tokens(losses, mesh, token_axes)
    else:
        total = losses.sum()
        for name in token_axes:
            total = all_reduce(total, mesh, name)
    if reduction == "sum":
        return total
    count = (target != ignore_index).sum().to(losses.dtype)
    for name, token_axis in zip(token_axes, tokens_over):
        if torch.compiler.is_compiling() or shim.beyond_backward():
            count = all_reduce(count, mesh, name)
        elif token_axis.size > 1:
            count = AllReduce(token_axis, "all-reduce of the number of tokens")(count)
    return total / count


def cross_entropy_collectives(
    tokens: int,
    dtype: Any,
    *,
    mesh: DeviceMesh,
    axis: str = "tp",
    token_axes: str | Sequence[str] = (),
    reduction: Literal["mean", "sum"] = "mean",
) -> list[Collective]:
    """Every collective of `vocab_parallel_cross_entropy`, without smoothing, over this rank's `tokens` and those of
    `token_axes`; its backward has none.

    Args:
        tokens: on this rank.
        dtype: of the logits.
    """
    mesh_view = view(mesh)
    width = max(itemsize(dtype), itemsize("float32"))
    names = (token_axes,) if isinstance(token_axes, str) else tuple(token_axes)
    sums = [(axis, "maxima", tokens)]
    sums += [(name, "number of tokens", 1) for name in names if reduction == "mean"]
    found: list[Collective] = []
    if is_exact(mesh):
        in_tree = partial(reduce_pieces_collectives, "forward", view=mesh_view, width=width)
        found += in_tree("loss: sums", 2 * tokens, levels=[level_of(mesh_view, axis)])
        found += in_tree("loss: total", 1, levels=[level_of(mesh_view, *reversed(names))] if names else [])
    else:
        sums += [(axis, "sums", 2 * tokens), *((name, "total", 1) for name in names)]
    for name, what, elements in sums:
        over = mesh_view.axis(name)
        if over.size > 1 and elements:
            count = sent("all-reduce", elements, over.size, over.index) * width
            found.append(Collective("forward", "all-reduce", f"loss: {what}", name, count))
    return found


def _check(
    logits: Tensor,
    target: Tensor,
    vocab_size: int,
    over: Axis,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ShapeError(
            f"logits must be floating point of shape [..., vocab], got {logits.dtype} {tuple(logits.shape)}"
        )
    here = chunk(vocab_size, over.size, over.index)[1]
    if logits.shape[-1] != here:
        hint = (
            ": these logits are whole already (gathered?); pass each rank's own part, or use F.cross_entropy"
            if logits.shape[-1] == vocab_size
            else ""
        )
        raise ShapeError(
            f"logits have {logits.shape[-1]} columns, but a vocabulary of {vocab_size} over {over} leaves rank "
            f"{over.index} of them {here} ({rule(over.size)}){hint}"
        )
    if target.shape != logits.shape[:-1]:
        raise ShapeError(
            f"target has shape {tuple(target.shape)}, logits {tuple(logits.shape)}: expected {tuple(logits.shape[:-1])}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"target must hold integer ids, got {target.dtype}")
    # A compiled graph's operator looks at each call's, and under torch.func the lookup does.
    if not torch.compiler.is_compiling() and not shim.transforming():
        _check_ids(target, vocab_size, ignore_index)


def _check_ids(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    if target.device.type == "cpu" and not shim.is_fake(target):
        wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
        if bool(wrong.any()):
            raise IndexError(f"target {int(target[wrong][0])} is outside the vocabulary of {vocab_size}")


@shim.untraced
class _CrossEntropy(torch.autograd.Function):
    """Per-token losses. With p = softmax over the whole vocabulary and q the smoothed target: loss = -Σ q log p,
    d logits = dloss (p - q)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        vocab_size: int,
        over: Axis,
        ignore_index: int,
        smoothing: float,
        blocks: int,
    ) -> Tensor:
        losses, *rest = _losses(logits, target, vocab_size, over, ignore_index, smoothing, blocks)
        ctx.save_for_backward(logits, *rest, target)
        ctx.settings = vocab_size, over, ignore_index, smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad), *(None,) * 6


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    """The logits' gradient; differentiable where a graph of it is wanted."""
    vocab_size, over, ignore_index, smoothing = ctx.settings
    logits, *rest, target = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _gradient(grad, (logits, *rest), vocab_size, smoothing)
    losses = _composed(logits, target, vocab_size, over, ignore_index, smoothing)
    return torch.autograd.grad(losses, logits, grad, create_graph=True)[0]


def _composed(
    logits: Tensor, target: Tensor, vocab_size: int, over: Axis, ignore_index: int, smoothing: float
) -> Tensor:
    """Per-token losses of operations that have all derivatives."""
    refuse_exact(view_of(over), [over.name], "a second derivative of a loss", "use backward() without a graph")
    start, here = chunk(vocab_size, over.size, over.index)
    ignored = target == ignore_index
    wide = (logits.float() if logits.element_size() < 4 else logits).masked_fill(ignored.unsqueeze(-1), 0)
    local = target.long() - start
    elsewhere = (local < 0) | (local >= here)
    outside = (target < 0) | (target >= vocab_size)  # stays outside: the lookup refuses it
    local = local.masked_fill(elsewhere & ~outside, 0).masked_fill(outside, here).masked_fill(ignored, 0)
    if here:
        picked = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere | ignored, 0)
    else:
        picked = wide.sum(-1)
    every = along("gather_replicated", wide.logsumexp(-1).unsqueeze(0), over, 0, over.size)
    log_sum = every.logsumexp(0)
    losses = log_sum - along("all_reduce", picked, over)
    if smoothing:
        mean = along("all_reduce", wide.sum(-1), over) / vocab_size
        losses = (1 - smoothing) * losses + smoothing * (log_sum - mean)
    return losses.masked_fill(ignored, 0)


def _losses(
    logits: Tensor, target: Tensor, vocab_size: int, over: Axis, ignore_index: int, smoothing: float, blocks: int = 1
) -> tuple[Tensor, ...]:
    """Per-token losses, and what the gradient needs besides the logits. blocks: the pieces of the tokens."""
    wide = logits.float() if logits.element_size() < 4 else logits
    start, here = chunk(vocab_size, over.size, over.index)
    ignored = target == ignore_index
    local = target - start
    mine = (local >= 0) & (local < here) & ~ignored
    local = local.masked_fill(~mine, 0).long()
    if here:
        top = wide.amax(-1)
        top = top if over.size == 1 else AllReduce(over, "all-reduce of maxima", dist.ReduceOp.MAX)(top)
        exponentials = (wide - top.unsqueeze(-1)).exp_()
        picked = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0)
    else:  # this rank holds no part of the vocabulary
        top = wide.new_full(target.shape, -torch.inf)
        top = AllReduce(over, "all-reduce of maxima", dist.ReduceOp.MAX)(top)
        exponentials, picked = wide, torch.zeros_like(top)
    terms = [exponentials] if smoothing == 0 else [exponentials, wide]
    what = "all-reduce of exponentials and targets"
    if exact(view_of(over)) is None:
        sums = torch.stack([picked, *(term.sum(-1) for term in terms)])
        sums = sums if over.size == 1 else AllReduce(over, what)(sums)
    else:
        sums = sums_of_pieces(picked, terms, vocab_size, over, blocks, what)
    log_sum = sums[1].log() + top
    losses = log_sum - sums[0]
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (log_sum - sums[2] / vocab_size)
    return losses.masked_fill(ignored, 0), log_sum, local, mine, ignored


def _gradient(grad: Tensor, saved: Sequence[Tensor], vocab_size: int, smoothing: float) -> Tensor:
    """The logits' gradient, of what was saved: the logits, and `_losses` but the losses. Nothing is communicated."""
    logits, log_sum, local, mine, ignored = saved
    wide = logits.float() if logits.element_size() < 4 else logits
    grad = grad.masked_fill(ignored, 0).unsqueeze(-1)
    d = (wide - log_sum.unsqueeze(-1)).exp_()
    if smoothing:
        d -= smoothing / vocab_size
    if logits.shape[-1]:
        hit = mine.unsqueeze(-1).to(d.dtype) * (smoothing - 1)
        d.scatter_add_(-1, local.unsqueeze(-1), hit)
    # Where nothing flows back (an ignored token), nothing does, even from logits that are not finite.
    d = (d * grad).masked_fill_(ignored.unsqueeze(-1), 0)
    return d.to(logits.dtype)


@torch.library.custom_op(
    "shardgrad::vocab_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, SymInt vocab_size, str mesh, str axis, SymInt ignore_index, float smoothing)"
    " -> Tensor[]",
)
@traced_op
def _compiled_losses(
    logits: Tensor, target: Tensor, vocab_size: int, mesh: str, axis: str, ignore_index: int, smoothing: float
) -> list[Tensor]:
    """`_losses` as an operator that torch.compile does not look into."""
    _check_ids(target, vocab_size, ignore_index)
    return list(_losses(logits, target, vocab_size, axis_of(mesh, axis), ignore_index, smoothing))


@_compiled_losses.register_fake
def _(
    logits: Tensor, target: Tensor, vocab_size: int, mesh: str, axis: str, ignore_index: int, smoothing: float
) -> list[Tensor]:
    wide = torch.float32 if logits.element_size() < 4 else logits.dtype
    kinds = wide, wide, torch.int64, torch.bool, torch.bool
    return [target.new_empty(target.shape, dtype=kind) for kind in kinds]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, target, vocab_size, mesh, axis, ignore_index, smoothing = inputs
    ctx.settings = vocab_size, axis_of(mesh, axis), ignore_index, smoothing
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, *output[1:], target)


def _compiled_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return None if grads[0] is None else _backward(ctx, grads[0]), *(None,) * 6


_compiled_losses.register_autograd(_compiled_gradient, setup_context=_set_up)
shim.ordered(_compiled_losses)
