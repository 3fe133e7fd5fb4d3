"""The product to a sharded vocabulary and its loss in one: of logits there is a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_reduce
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import exact, pieces_here, refuse_exact
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.layout import Layout
from shardgrad.layout.plan import Role
from shardgrad.nn.exact_loss import sum_of_tokens
from shardgrad.nn.linear_statistics import Call, LinearStatistics, LossWithGradients
from shardgrad.nn.linear_sums import Head
from shardgrad.nn.loss import cross_entropy_collectives
from shardgrad.nn.token_sums import Asked, Values, statistics_collectives
from shardgrad.nn.vocabulary import Vocabulary, check_reading, masked
from shardgrad.ops.bound import bind
from shardgrad.ops.exact import checked
from shardgrad.ops.micro_batches import held

ELEMENTS = 2**23
"""Logits of one chunk on one rank: 32 MiB in float32. More were not faster on CPUs, fewer are (W is read once each)."""


@told
@shim.eager("linear_cross_entropy: its chunks are a loop outside of graphs")
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    layout: Layout | str,
    mesh: DeviceMesh,
    bias: Tensor | None = None,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    grads: Literal["backward", "forward"] = "backward",
    chunk_tokens: int | None = None,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> Tensor:
    """`vocab_parallel_cross_entropy` of the product of a layout, whose logits exist a chunk of tokens at a time.

        sg.linear_cross_entropy(x, w, target, "X[b/dp,s/tp,d] W[v/tp,d] -> Z[b/dp,s,v/tp]", mesh, vocab_size=32000)

    The layout says all that `sg.matmul` reads from it: the axis that shards the vocabulary, the axes that shard the
    tokens (`mean` and `sum` are over the tokens of all of them, on every rank), where X is gathered and dX reduced,
    where W is gathered and dW reduced. Besides, two small all-reduces a chunk, of three numbers a token in all.
    dW and db are summed over the chunks in float32, straight into a `main_grad` if there is one. Statistics of 16-bit
    logits are float32. With `sg.set_overlap`, dX is reduced chunk by chunk under the products that follow; without, in
    one go, under the last chunk's dW.

    Args:
        x, weight, bias: [..., d], [v/tp, d] and [v/tp], local shards as the layout stores them.
        target: [...] of ids of the whole vocabulary, stored as the rows of the product are: whole along the sequence
            that x is sharded along, alike on every rank of the vocabulary's axis.
        layout: with the vocabulary as the last dim of the product and the first of the weight.
        ignore_index, label_smoothing, reduction: as of `vocab_parallel_cross_entropy`.
        soft_cap: c of c · tanh(logits / c), which stand in the logits' place.
        z_loss: λ of λ · logsumexp², added to each token's loss that counts.
        grads: "backward" computes each chunk's logits again, a third more products; "forward" makes dX, dW and db with
            the loss, and holds them (dW in float32) until backward multiplies them by what flows back: for mean and
            sum, and one backward.
        chunk_tokens: of a chunk's logits; None: as many as make some 32 MiB of them, in float32.
        save_gathered, reduce_dtype: as of `sg.matmul`.

    Raises:
        LayoutError: the layout is no such product: its contracted letter is sharded, or the product itself is reduced.
        ShapeError: tensors do not fit the layout, the vocabulary or one another.
        IndexError: a target is outside the vocabulary.
        ValueError: an unknown reduction or place of gradients; smoothing outside [0, 1]; a soft_cap that is none.
        RuntimeError: a second derivative is asked for, or it is reached within torch.func.
    Source: Wijmans et al. 2024, arXiv 2411.09009; Hsu et al. 2024, arXiv 2410.10989 (gradients in forward); the z-loss:
        Chowdhery et al. 2022, arXiv 2204.02311.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    if grads not in ("backward", "forward"):
        raise ValueError(f"grads must be 'backward' or 'forward', not {grads!r}")
    if grads == "forward" and reduction == "none":
        raise ValueError(
            "grads='forward' makes the gradients of one number: reduction must be 'mean' or 'sum', or grads='backward'"
        )
    check_reading(1.0, soft_cap)
    if target.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"target must hold integer ids, got {target.dtype}")
    tensors = _present(x, weight, bias)
    head = _head(layout, tensors, vocab_size, mesh, target.shape, "target", save_gathered, reduce_dtype)
    vocabulary = Vocabulary(vocab_size, head.view.axes[head.over], soft_cap=soft_cap)
    asked = Asked(vocabulary, logsumexp=z_loss != 0, mean=label_smoothing > 0)
    call = Call((head,), asked, _chunk(head, vocab_size, chunk_tokens))
    chosen = masked(target, ignore_index).reshape(-1, 1)
    vocabulary.check_ids(chosen)
    ignored = (target == ignore_index).reshape(-1)
    loss = partial(_losses, ignored=ignored, smoothing=label_smoothing, z_loss=z_loss)
    total = partial(_total, head=head, mesh=mesh)
    operands = _operands(head, tensors)
    now = grads == "forward" and torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    with torch.autocast(head.view.device.type, enabled=False):
        if now:
            summed = LossWithGradients.apply(call, chosen, loss, total, *operands)
        else:
            values = Values(*LinearStatistics.apply(call, chosen, *operands))
            each = loss(values, slice(None))
            if reduction == "none":
                return each.view(target.shape)
            summed = total(each)
        if reduction == "sum":
            return summed
        count = _count(ignored, summed.dtype, head)
        # Of no token NaN, as torch, whose gradients are zeros.
        return (summed / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


@told
@shim.eager("linear_statistics: its chunks are a loop outside of graphs")
def linear_statistics(
    x: Tensor,
    weight: Tensor,
    layout: Layout | str,
    mesh: DeviceMesh,
    bias: Tensor | None = None,
    *,
    vocab_size: int,
    tokens: Tensor | None = None,
    logsumexp: bool = False,
    entropy: bool = False,
    mean_log_prob: bool = False,
    kl: Sequence[Tensor] | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> Values:
    """`VocabParallelLogits.statistics` of the product of a layout, whose logits exist a chunk of tokens at a time.

        now = sg.linear_statistics(x, w, layout, mesh, vocab_size=32000, tokens=ids, entropy=True, kl=(x_ref, w_ref))

    Each number is differentiable, and float32 for 16-bit tensors; backward computes each chunk's logits again. Whatever
    is asked for, a chunk has two small all-reduces in forward, and none in backward.

    Args:
        x, weight, bias, layout, mesh, vocab_size: as of `linear_cross_entropy`.
        tokens: [...] or [..., k] ids of which log_prob is wanted, stored as target is there.
        logsumexp, entropy, mean_log_prob, ignore_index: as of `VocabParallelLogits.statistics`.
        kl: x, weight and, if there is one, bias of a second product, of the same layout, perhaps of other features:
            KL(first ‖ second), whose gradient goes to those of the six tensors that want it.
        temperature, soft_cap: as of `VocabParallelLogits`, of both products.
        chunk_tokens, save_gathered, reduce_dtype: as of `linear_cross_entropy`.

    Returns:
        What was asked for, [...] each (log_prob as tokens), alike on every rank of the axis; None for the rest.

    Raises:
        LayoutError, ShapeError, IndexError, RuntimeError: as of `linear_cross_entropy`.
        ValueError: nothing is asked for; a temperature or soft_cap that is none.
    """
    if tokens is None and not (logsumexp or entropy or mean_log_prob or kl):
        raise ValueError("statistics of nothing: give tokens, or ask for logsumexp, entropy, mean_log_prob or kl")
    check_reading(temperature, soft_cap)
    given = [_present(x, weight, bias), *([] if kl is None else [_present(*kl)])]
    rows = None if tokens is None else tokens.shape[: x.dim() - 1]
    heads = tuple(_head(layout, each, vocab_size, mesh, rows, "tokens", save_gathered, reduce_dtype) for each in given)
    if heads[-1].rows != heads[0].rows:
        raise ShapeError(f"x of kl= has rows {list(heads[-1].rows)}, the first x {list(heads[0].rows)}")
    vocabulary = Vocabulary(vocab_size, heads[0].view.axes[heads[0].over], temperature, soft_cap)
    asked = Asked(vocabulary, logsumexp, entropy, mean_log_prob, other=None if kl is None else vocabulary)
    call = Call(heads, asked, _chunk(heads[0], vocab_size, chunk_tokens))
    ids = None
    if tokens is not None:
        ids = masked(tokens, ignore_index).reshape(prod(heads[0].rows), -1)
        vocabulary.check_ids(ids)
    tensors = [one for head, each in zip(heads, given) for one in _operands(head, each)]
    with torch.autocast(heads[0].view.device.type, enabled=False):
        values = Values(*LinearStatistics.apply(call, ids, *tensors))
    shaped = [None if one is None else one.view(heads[0].rows) for one in values[1:]]
    log_prob = None if values.log_prob is None or tokens is None else values.log_prob.view(tokens.shape)
    return Values(log_prob, *shaped)


def linear_loss_collectives(
    tokens: int,
    dtype: Any,
    *,
    mesh: DeviceMesh,
    vocab_size: int,
    axis: str = "tp",
    token_axes: Sequence[str] = (),
    reduction: Literal["mean", "sum"] = "mean",
    chunk_tokens: int | None = None,
) -> list[Collective]:
    """Every collective of `linear_cross_entropy` by default, but those of its layout, which are `Layout.collectives`
    (with overlap, dX is reduced by the chunk).

    Args:
        vocab_size, chunk_tokens: as of `linear_cross_entropy`.
        others: as of `cross_entropy_collectives`.
    """
    mesh_view = view(mesh)
    size = tokens_of_chunk(vocab_size, mesh_view, axis) if chunk_tokens is None else chunk_tokens
    pieces = prod(pieces_here(mesh_view, name) for name in token_axes)
    each = tokens // pieces
    found = [
        one
        for _ in range(pieces)
        for start in range(0, each, size)
        for one in statistics_collectives(min(size, each - start), dtype, mesh=mesh, axis=axis, chosen=1, what="loss")
    ]
    return found + cross_entropy_collectives(0, dtype, mesh=mesh, axis=axis, token_axes=token_axes, reduction=reduction)


def _head(
    layout: Layout | str,
    tensors: Sequence[Tensor],
    vocab_size: int,
    mesh: DeviceMesh,
    rows: Sequence[int] | None,
    of_rows: str,
    save_gathered: Collection[str],
    reduce_dtype: torch.dtype | None,
) -> Head:
    """The product of one call, looked at and compared with the other ranks'.

    tensors: X, W and the bias, if there is one. rows: the shape of `of_rows`.
    """
    layout, mesh_view = Layout(layout) if isinstance(layout, str) else layout, view(mesh)
    _check_layout(layout, mesh_view)
    x, biased = tensors[0], len(tensors) > 2
    bound = bind((layout,), (biased,), mesh, save_gathered, reduce_dtype)
    device = mesh_view.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    stored = [_as(dtype, one) for one in tensors] if cast else tensors
    letters = layout.out.letters
    given = {letters[-1]: vocab_size}
    if rows is not None:
        if len(rows) != len(letters) - 1:
            raise ShapeError(f"{of_rows} has {len(rows)} dims, but {layout.out} has {len(letters) - 1} of tokens")
        given |= {dim.letter: size for dim, size in zip(layout.out.dims, rows) if not dim.axes}
    needs = tuple([torch.is_grad_enabled() and one.requires_grad for one in tensors])
    sizes = bound.sizes(stored, given, needs)
    kept = {layout.lhs.name: "lhs", layout.rhs.name: "rhs"}
    roles: frozenset[Role] = frozenset(kept[name] for name in save_gathered)  # type: ignore[misc]
    head = Head(layout, sizes, mesh_view, dtype, bound.reduced_in(dtype) or dtype, roles, biased)
    if rows is not None and tuple(rows) != head.rows:
        raise ShapeError(
            f"{of_rows} has shape {list(rows)}, but this rank's part of the tokens of {layout.out} is {list(head.rows)}"
        )
    return head


def _check_layout(layout: Layout, mesh_view: MeshView) -> None:
    """Raise where a layout is no product to a vocabulary whose logits a rank can go through by itself.

    Raises:
        LayoutError: it is not.
    """
    out, vocabulary = layout.out, layout.out.dims[-1]
    right = layout.columns == (vocabulary.letter,) and layout.rhs.letters == (vocabulary.letter, *layout.contracted)
    if not right or len(layout.contracted) != 1 or layout.lhs.letters[-1:] != layout.contracted or layout.batched:
        raise LayoutError(
            f"{layout} is no product to a vocabulary: write X[…,d] W[v/tp,d] -> Z[…,v/tp], with the vocabulary as the "
            "weight's first dim and the product's last"
        )
    if len(vocabulary.axes) != 1:
        raise LayoutError(f"{layout}: one axis shards the vocabulary, as {vocabulary.letter}/tp, not {vocabulary}")
    if out.partial or layout.plan.reduce["out"] or layout.plan.gather["out"]:
        raise LayoutError(
            f"{layout} has its logits summed or moved over {', '.join(layout.splits)} before they are complete on a "
            "rank: use sg.matmul and vocab_parallel_cross_entropy for it"
        )
    pieces = exact(mesh_view)
    if pieces is None:
        return
    tensors = (layout.lhs, layout.rhs)
    marks = [axis for tensor in tensors for axis in tensor.grad_partial]
    refuse_exact(mesh_view, marks, f"the sum that {layout} leaves to the caller", "leave out the mark {…}")
    rows = [axis for dim in out.dims[1:-1] for axis in dim.axes]
    rows += layout.rhs.dims[0].axes[1:]
    refuse_exact(
        mesh_view, rows, f"a loss of {layout}, whose tokens are sharded on another dim than the first", "shard that one"
    )


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """A tensor of a shape, whose values nobody asks for."""
    return torch.empty((), dtype=dtype, device=x.device).expand(x.shape) if x.is_floating_point() else x


def _present(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    return [x, weight] if bias is None else [x, weight, bias]


def _operands(head: Head, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of a call: in exact mode looked at, and as micro-batches hold their gradients."""
    if exact(head.view) is None:
        return tensors
    layout = head.layout
    checked(lambda *given: None, (layout.lhs, layout.rhs, layout.bias)[: len(tensors)], head.view)(*tensors)
    return [tensors[0], *held(head.view, tensors[1:])]


def _chunk(head: Head, vocab_size: int, chunk_tokens: int | None) -> int:
    """The tokens of a chunk: the same on every rank, and in exact mode on every number of them."""
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
        return chunk_tokens
    return tokens_of_chunk(vocab_size, head.view, head.over)


def tokens_of_chunk(vocab_size: int, mesh_view: MeshView, axis: str) -> int:
    """Of a chunk, where nobody says how many."""
    pieces = exact(mesh_view) or mesh_view.shape
    return max(16, ELEMENTS // -(-vocab_size // pieces[axis]) // 16 * 16)


def _losses(values: Values, rows: slice, *, ignored: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """Each token's loss [n], 0 where it is ignored."""
    assert values.log_prob is not None
    losses = -values.log_prob.squeeze(-1)
    if values.mean_log_prob is not None:
        losses = (1 - smoothing) * losses - smoothing * values.mean_log_prob
    if values.logsumexp is not None:
        losses = losses + z_loss * values.logsumexp.square()
    return losses.masked_fill(ignored[rows], 0)


def _total(losses: Tensor, *, head: Head, mesh: DeviceMesh) -> Tensor:
    """Over the tokens of all ranks."""
    if exact(head.view) is not None:
        return sum_of_tokens(losses, mesh, head.row_axes)
    total = losses.sum()
    for axis in head.row_axes:
        total = all_reduce(total, mesh, axis)
    return total


def _count(ignored: Tensor, dtype: torch.dtype, head: Head) -> Tensor:
    """The tokens that count, over all ranks."""
    count = (~ignored).sum().to(dtype)
    for axis in (head.view.axes[name] for name in head.row_axes):
        if axis.size > 1:
            count = AllReduce(axis, "all-reduce of the number of tokens")(count)
    return count
