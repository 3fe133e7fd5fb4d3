"""The product to a sharded vocabulary and its loss in one, against torch's on whole tensors in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import shardgrad as sg
from shardgrad.bench.head import peak_bytes
from shardgrad.comm.mesh import view
from shardgrad.nn.linear_loss import linear_loss_collectives
from shardgrad.testing import distributed

ROWS = "X[b/dp,s,d] W[v/tp,d] -> Z[b/dp,s,v/tp]"
SEQUENCE = "X[b/dp,s/tp,d] W[v/tp,d] -> Z[b/dp,s,v/tp]"
LAYOUTS = {
    "replicated": "X[b,s,d] W[v/tp,d] -> Z[b,s,v/tp]",
    "data": ROWS,
    "sequence": SEQUENCE,
    "fully sharded": "X[b/dp,s/tp,d] W[v/tp,d/dp] -> Z[b/dp,s,v/tp]",
    "fully sharded, one dim": "X[b/dp,s,d] W[v/tp/dp,d] -> Z[b/dp,s,v/tp]",
    "left to the caller": "X[s/tp,b/dp,d] W[v/tp,d]{dp} -> Z[s,b/dp,v/tp]",
    "bias stored otherwise": "X[b/dp,s/tp,d] W[v/tp,d] -> Z[b/dp,s,v/tp] + B[v]",
}
SIZES = {"b": 3, "s": 5, "d": 4, "v": 11}


def meshes(world_size: int) -> list[DeviceMesh]:
    """Every mesh of dp × tp ranks."""
    shapes = [(dp, world_size // dp) for dp in range(1, world_size + 1) if world_size % dp == 0]
    return [init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")) for shape in shapes]


def whole_tensors(layout: sg.Layout, sizes: dict[str, int], seed: int = 0) -> list[Tensor]:
    """X, W and B in float64, alike on every rank."""
    specs = (layout.lhs, layout.rhs, layout.bias)
    return [randn(*[sizes[a] for a in spec.letters], seed=seed + at) for at, spec in enumerate(specs)]


def targets(layout: sg.Layout, sizes: dict[str, int], ignore: int = -100) -> Tensor:
    shape = [sizes[a] for a in layout.out.letters[:-1]]
    target = torch.randint(0, sizes["v"], shape, generator=torch.Generator().manual_seed(9))
    return target.masked_fill(torch.rand(shape, generator=torch.Generator().manual_seed(8)) < 0.2, ignore)


def shards(layout: sg.Layout, mesh: DeviceMesh, full: Sequence[Tensor], dtype: Any = torch.float64) -> list[Tensor]:
    specs = (layout.lhs, layout.rhs, layout.bias)
    return [sg.shard(one, spec, mesh).to(dtype).requires_grad_() for one, spec in zip(full, specs)]


def shard_rows(layout: sg.Layout, mesh: DeviceMesh, target: Tensor) -> Tensor:
    return sg.shard(target, sg.TensorSpec("T", layout.out.dims[:-1]), mesh)


def whole_loss(x: Tensor, w: Tensor, b: Tensor, target: Tensor, z_loss: float, cap: float | None, **how: Any) -> Tensor:
    logits = x @ w.t() + b
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    ignore = how.get("ignore_index", -100)
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), **{**how, "reduction": "none"}).view(target.shape)
    losses = losses + z_loss * logits.logsumexp(-1).square().masked_fill(target == ignore, 0)
    if how["reduction"] == "none":
        return losses
    return losses.sum() / ((target != ignore).sum() if how["reduction"] == "mean" else 1)


def unsharded(grad: Tensor | None, spec: sg.TensorSpec, mesh: DeviceMesh, sizes: dict[str, int]) -> Tensor:
    """A gradient, whole; what is left to the caller is summed here."""
    assert grad is not None
    for axis in spec.grad_partial:
        grad = sg.all_reduce(grad, mesh, axis)
    return sg.unshard(grad, sg.TensorSpec(spec.name, spec.dims), mesh, {a: sizes[a] for a in spec.letters})


def assert_close(found: Tensor, right: Tensor, what: str) -> None:
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-13, msg=lambda text: f"{what}: {text}")


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("how", ["mean", "sum", "none", "mean made in forward", "sum made in forward"])
def test_equals_torch(world_size: int, how: str) -> None:
    """Values and all gradients, on every layout, with everything on."""
    reduction, *forward = how.split(maxsplit=1)
    options: dict[str, Any] = {"ignore_index": 7, "label_smoothing": 0.1, "reduction": reduction}
    for layout in map(sg.Layout, LAYOUTS.values()):
        full, target = whole_tensors(layout, SIZES), targets(layout, SIZES, ignore=7)
        plain = [one.clone().requires_grad_() for one in full]
        expected = whole_loss(*plain, target, 0.01, 3.0, **options)  # type: ignore[call-arg,arg-type]
        dy = randn(*expected.shape, seed=3)
        expected.backward(dy)
        for mesh in meshes(world_size):
            mine = shards(layout, mesh, full)
            loss = sg.linear_cross_entropy(
                *mine[:2],
                shard_rows(layout, mesh, target),
                layout,
                mesh,
                mine[2],
                vocab_size=SIZES["v"],
                soft_cap=3.0,
                z_loss=0.01,
                grads="forward" if forward else "backward",
                chunk_tokens=4,
                **options,
            )
            loss.backward(shard_rows(layout, mesh, dy) if reduction == "none" else dy)
            right = shard_rows(layout, mesh, expected.detach()) if reduction == "none" else expected.detach()
            assert_close(loss.detach(), right, "loss")
            for one, reference, spec in zip(mine, plain, (layout.lhs, layout.rhs, layout.bias)):
                assert reference.grad is not None
                assert_close(unsharded(one.grad, spec, mesh, SIZES), reference.grad, f"d{spec.name}")


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("grads", ["backward", "forward"])
def test_what_is_sent_is_predicted(world_size: int, grads: Any) -> None:
    """In bfloat16: gathers and reductions of the layout, and of each chunk maxima and sums, in float32."""
    for mesh in meshes(world_size):
        for layout in map(sg.Layout, LAYOUTS.values()):
            target = shard_rows(layout, mesh, targets(layout, SIZES))
            x, w, b = shards(layout, mesh, whole_tensors(layout, SIZES), torch.bfloat16)
            how: dict[str, Any] = {"vocab_size": SIZES["v"], "grads": grads, "chunk_tokens": 4}
            for _ in range(2):  # at first sight, the ranks compare what they call
                with sg.trace_collectives() as trace:
                    sg.linear_cross_entropy(x, w, target, layout, mesh, b, **how).backward()
            here, kept = view(mesh), ("X", "W") if grads == "forward" else ()
            of_layout = {"bias": True, "save_gathered": kept, "coordinate": here.coordinate}
            expected = layout.collectives(SIZES, here.shape, "bfloat16", **of_layout)  # type: ignore[arg-type]
            axes = tuple(axis for dim in layout.out.dims[:-1] for axis in dim.axes)
            expected += linear_loss_collectives(
                target.numel(), "bfloat16", mesh=mesh, vocab_size=SIZES["v"], token_axes=axes, chunk_tokens=4
            )
            counts, sums = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
            for one in expected:
                counts[one.operation, one.axis] += 1
                sums[one.operation, one.axis] += one.bytes
            assert trace.totals() == {key: (counts[key], sums[key]) for key in counts}, str(layout)


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("words", [2, 11])
def test_statistics(world_size: int, words: int) -> None:
    """All numbers at once, of two products with other features; every gradient, where a rank has no words as well."""
    sizes, layout = {**SIZES, "v": words}, sg.Layout(SEQUENCE)
    first, second = whole_tensors(layout, sizes), whole_tensors(layout, {**sizes, "d": 6}, seed=20)
    chosen = torch.randint(0, words, (3, 5, 2), generator=torch.Generator().manual_seed(4))
    plain = [one.clone().requires_grad_() for one in (*first, *second)]
    logits = [0.7 * torch.tanh((x @ w.t() + b) / 1.4) for x, w, b in (plain[:3], plain[3:])]  # cap 1.4, temperature 2
    p, q = (each.log_softmax(-1) for each in logits)
    right = [
        p.gather(-1, chosen),
        logits[0].logsumexp(-1),
        -(p.exp() * p).sum(-1),
        p.mean(-1),
        (p.exp() * (p - q)).sum(-1),
    ]
    weights = [randn(*one.shape, seed=40 + at) for at, one in enumerate(right)]
    sum((one * weight).sum() for one, weight in zip(right, weights)).backward()  # type: ignore[union-attr]
    for mesh in meshes(world_size):
        mine = [*shards(layout, mesh, first), *shards(layout, mesh, second)]
        found = sg.linear_statistics(
            *mine[:2],
            layout,
            mesh,
            mine[2],
            vocab_size=words,
            tokens=shard_rows_of(chosen, layout, mesh),
            logsumexp=True,
            entropy=True,
            mean_log_prob=True,
            kl=mine[3:],
            temperature=2.0,
            soft_cap=1.4,
            chunk_tokens=4,
        )
        each = (found.log_prob, found.logsumexp, found.entropy, found.mean_log_prob, found.kl)
        total = torch.zeros((), dtype=torch.float64)
        for one, expected, weight in zip(each, right, weights):
            assert one is not None
            assert_close(one.detach(), shard_rows_of(expected.detach(), layout, mesh), "a number")
            total = total + (one * shard_rows_of(weight, layout, mesh)).sum()
        total.backward()
        for at, (one, reference) in enumerate(zip(mine, plain)):
            spec = (layout.lhs, layout.rhs, layout.bias)[at % 3]
            assert reference.grad is not None
            of = sizes if at < 3 else {**sizes, "d": 6}
            assert_close(unsharded(one.grad, spec, mesh, of), reference.grad, f"gradient {at}")


def shard_rows_of(x: Tensor, layout: sg.Layout, mesh: DeviceMesh) -> Tensor:
    """Of [b, s] or [b, s, k]."""
    dims = (*layout.out.dims[:-1], *[sg.TensorSpec("T", layout.lhs.dims).dims[-1]] * (x.dim() - 2))
    return sg.shard(x, sg.TensorSpec("T", dims), mesh)


def bounds(x: Tensor, w: Tensor, target: Tensor, eps: float, ranks: int) -> tuple[Tensor, Tensor]:
    """By how much dX and dW of a mean may differ from float64, of operands stored with a relative spacing eps.

    Logits are rounded to eps, as dZ is; sums are in float32. An error δ of all logits of a token changes its
    probabilities by a factor of at most exp(2δ).
    """
    wide = torch.finfo(torch.float32).eps * sum(w.shape)
    own = eps + wide
    logits = x @ w.t()
    p, hit = logits.softmax(-1), F.one_hot(target, len(w))
    error = (own * (x.abs() @ w.abs().t())).amax(-1, keepdim=True)
    dz = (p - hit).abs() / len(x)
    of_dz = p / len(x) * torch.expm1(2 * error + wide) + own * dz + wide / len(x) * hit
    of_dx = of_dz @ w.abs() + (ranks + 1) * own * ((dz + of_dz) @ w.abs())
    return of_dx, of_dz.t() @ x.abs() + 2 * own * ((dz + of_dz).t() @ x.abs())


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["parameters", "autocast", "main_grad"])
def test_gradients_are_within_their_rounding(world_size: int, dtype: torch.dtype, kind: str) -> None:
    """dW is summed in float32: so it is no worse by the chunk, and where master weights are float32, it is."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = sg.Layout("X[n,d] W[v/tp,d] -> Z[n,v/tp]")
    x, w = (randn(*shape, seed=at).to(dtype).double() for at, shape in enumerate([(61, 12), (37, 12)]))
    target = torch.randint(0, 37, (61,), generator=torch.Generator().manual_seed(4))
    plain = [one.clone().requires_grad_() for one in (x, w)]
    F.cross_entropy(plain[0] @ plain[1].t(), target).backward()
    allowed = bounds(x, w, target, torch.finfo(dtype).eps, world_size)
    stored = torch.float32 if kind == "autocast" else dtype
    for grads in ("backward", "forward"):
        mine = (
            nn.Parameter(sg.shard(x, layout.lhs, mesh).to(stored)),
            nn.Parameter(sg.shard(w, layout.rhs, mesh).to(stored)),
        )
        if kind == "main_grad":
            sg.use_main_grads([mine[1]])
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast" and dtype == torch.bfloat16):
            loss = sg.linear_cross_entropy(
                *mine,
                target,
                layout,
                mesh,
                vocab_size=37,
                grads=grads,
                chunk_tokens=8,  # type: ignore[arg-type]
            )
        assert loss.dtype == torch.float32
        loss.backward()
        dx, dw = mine[0].grad, mine[1].main_grad if kind == "main_grad" else mine[1].grad
        assert isinstance(dx, Tensor)
        assert isinstance(dw, Tensor)
        assert (dx.dtype, dw.dtype) == (stored, torch.float32 if kind == "main_grad" else stored)
        found = dx.double(), sg.unshard(dw, layout.rhs, mesh).double()
        for one, reference, bound in zip(found, plain, allowed):
            assert reference.grad is not None
            assert bool(((one - reference.grad).abs() <= bound).all())


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("grads", ["backward", "forward"])
def test_deferred_tied_and_several_times(world_size: int, grads: Any) -> None:
    """Deferral changes no bit; uses of one weight add up, into main_grad too; frozen tensors get nothing."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    layout = sg.Layout(SEQUENCE)
    full, target = whole_tensors(layout, SIZES), targets(layout, SIZES)

    def run(how: str, frozen: int | None = None) -> list[Tensor | None]:
        x, w, b = (nn.Parameter(one.detach()) for one in shards(layout, mesh, full))
        for at, one in enumerate((x, w, b)):
            one.requires_grad_(at != frozen)
        if how == "main_grad":
            sg.use_main_grads([w, b], torch.float64)
        later = None
        for factor in (1.0, 0.5):
            loss = factor * sg.linear_cross_entropy(
                x, w, target, layout, mesh, b, vocab_size=SIZES["v"], grads=grads, chunk_tokens=4
            )
            tied = sg.matmul(x, w, layout, mesh, sizes={"s": SIZES["s"]}).square().sum()
            if how == "deferred":
                with sg.defer_weight_grads() as later:
                    (loss + tied).backward()
                assert len(later) == 2
                later.run()
            else:
                (loss + tied).backward()
        return [getattr(one, "main_grad", one.grad) if how == "main_grad" else one.grad for one in (x, w, b)]

    now = run("now")
    for how in ("deferred", "main_grad"):
        for one, other in zip(now, run(how)):
            assert one is not None
            assert other is not None
            if how == "deferred":
                assert torch.equal(one, other)
            else:
                assert_close(other, one, how)
    for frozen in range(3):
        for at, (one, other) in enumerate(zip(now, run("now", frozen))):
            assert (other is None) == (at == frozen)
            assert other is None or torch.equal(one, other)  # type: ignore[arg-type]


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("grads", ["backward", "forward"])
def test_overlap_reduces_by_the_chunk(world_size: int, grads: Any) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = sg.Layout("X[n,d] W[v/tp,d] -> Z[n,v/tp]")
    sizes = {"n": 13, "d": 4, "v": 11}
    full, target = whole_tensors(layout, sizes)[:2], targets(layout, sizes)
    found = {}
    for how in (None, 2):
        sg.set_overlap(mesh, how)
        x, w = (sg.shard(one, spec, mesh).float().requires_grad_() for one, spec in zip(full, (layout.lhs, layout.rhs)))
        for again in (False, True):
            x.grad = w.grad = None
            with sg.trace_collectives() as trace:
                how_many: dict[str, Any] = {
                    "vocab_size": 11,
                    "chunk_tokens": 4,
                    "reduce_dtype": torch.float64,
                }  # no sum in place
                loss = sg.linear_cross_entropy(x, w, target, layout, mesh, grads=grads, **how_many)
                loss.backward()
            assert not again or trace.totals()["all-reduce", "tp"][0] == 2 * 4 + (1 if how is None else 4)
        found[how] = x.grad, w.grad
    for one, other in zip(found[None], found[2]):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(other, one)  # backends add ranks' terms in an order of their own


@distributed(world_size=[1, 2])
@pytest.mark.parametrize("grads", ["backward", "forward"])
def test_a_rank_without_tokens_and_no_token_that_counts(world_size: int, grads: Any) -> None:
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "tp"))
    layout, sizes = sg.Layout(ROWS), {**SIZES, "b": 1}  # the second rank has none
    full, target = whole_tensors(layout, sizes), targets(layout, sizes)
    plain = [one.clone().requires_grad_() for one in full]
    whole_loss(*plain, target, 0.0, None, reduction="mean").backward()  # type: ignore[call-arg,arg-type]
    mine = shards(layout, mesh, full)
    tokens = shard_rows(layout, mesh, target)
    how = {"vocab_size": SIZES["v"], "grads": grads}
    sg.linear_cross_entropy(*mine[:2], tokens, layout, mesh, mine[2], **how).backward()  # type: ignore[arg-type]
    for one, reference, spec in zip(mine, plain, (layout.lhs, layout.rhs, layout.bias)):
        assert reference.grad is not None
        assert_close(unsharded(one.grad, spec, mesh, sizes), reference.grad, spec.name)
    none = torch.full_like(tokens, -100)
    mine = shards(layout, mesh, full)
    loss = sg.linear_cross_entropy(*mine[:2], none, layout, mesh, mine[2], **how)  # type: ignore[arg-type]
    loss.backward()
    assert bool(loss.isnan())  # as torch's 0 / 0
    assert all(one.grad is not None and not bool(one.grad.any()) for one in mine)  # as torch's


@distributed(world_size=2)
def test_a_checkpoint_and_no_grad(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    layout = sg.Layout(ROWS)
    full, target = whole_tensors(layout, SIZES), targets(layout, SIZES)
    found = []
    for grads in ("backward", "forward"):
        for how in ("plain", "checkpoint"):
            mine = shards(layout, mesh, full)

            def loss(x: Tensor, w: Tensor, b: Tensor, grads: Any = grads) -> Tensor:
                return sg.linear_cross_entropy(x, w, target, layout, mesh, b, vocab_size=SIZES["v"], grads=grads)

            made: Tensor = checkpoint(loss, *mine, use_reentrant=False) if how == "checkpoint" else loss(*mine)
            made.backward()
            found.append([made.detach(), *(one.grad for one in mine)])
            with torch.no_grad():
                assert torch.equal(loss(*mine), made.detach())
    for other in found[1:]:
        for one, two in zip(found[0], other):
            assert one is not None
            assert two is not None
            assert_close(two, one, "checkpoint")


@distributed(world_size=2)
def test_second_derivatives_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    layout = sg.Layout(ROWS)
    full, target = whole_tensors(layout, SIZES), targets(layout, SIZES)
    mine = shards(layout, mesh, full)

    def loss(x: Tensor, grads: Any = "backward") -> Tensor:
        return sg.linear_cross_entropy(x, mine[1], target, layout, mesh, vocab_size=SIZES["v"], grads=grads)

    [first] = torch.autograd.grad(loss(mine[0]), mine[0], create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative through logits computed in chunks"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=r"a second derivative through logits.*made in forward"):
        torch.autograd.grad(loss(mine[0], "forward"), mine[0], create_graph=True)
    for grads in ("backward", "forward"):
        with pytest.raises(RuntimeError, match=r"logits computed in chunks.*was reached inside torch\.func"):
            torch.func.grad(lambda x, grads=grads: loss(x, grads))(mine[0].detach())
    once = loss(mine[0], "forward")
    once.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward through .* Use grads='backward'"):
        once.backward()


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    x, w, target = randn(3, 5, 4, seed=1), randn(3, 4, seed=2), torch.zeros(3, 5, dtype=torch.long)

    def call(layout: str = ROWS, **change: Any) -> Tensor:
        given = {"x": x, "weight": w, "target": target, "vocab_size": 6, **change}
        return sg.linear_cross_entropy(layout=layout, mesh=mesh, **given)

    assert call().isfinite()
    with pytest.raises(sg.LayoutError, match=r"is no product to a vocabulary: write X\[…,d\] W\[v/tp,d\]"):
        call("X[b,s,d] W[d,v/tp] -> Z[b,s,v/tp]")
    with pytest.raises(sg.LayoutError, match="one axis shards the vocabulary, as v/tp, not v"):
        call("X[b,s,d] W[v,d] -> Z[b,s,v]")
    with pytest.raises(sg.LayoutError, match=r"has its logits summed or moved .* use sg\.matmul"):
        call("X[b,s,d/dp] W[v/tp,d/dp] -> Z[b,s,v/tp]")
    with pytest.raises(sg.ShapeError, match="W has"):
        call(weight=randn(6, 4, seed=2))
    with pytest.raises(sg.ShapeError, match=r"target has 1 dims, but Z\[b/dp,s,v/tp\] has 2 of tokens"):
        call(target=target.flatten())
    with pytest.raises(sg.ShapeError, match=r"the tokens of Z\[b/dp,s,v/tp\] is \[3, 5\]|X has"):
        call(target=target[:2])
    with pytest.raises(sg.ShapeError, match="integer ids"):
        call(target=target.double())
    with pytest.raises(IndexError, match="id 6 is outside the vocabulary of 6"):
        call(target=target + 6)
    with pytest.raises(ValueError, match="reduction must be"):
        call(reduction="median")
    with pytest.raises(ValueError, match="label_smoothing must lie"):
        call(label_smoothing=-0.5)
    with pytest.raises(ValueError, match="grads must be"):
        call(grads="never")
    with pytest.raises(ValueError, match="grads='forward' makes the gradients of one number"):
        call(grads="forward", reduction="none")
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, not 0"):
        call(chunk_tokens=0)
    with pytest.raises(ValueError, match="statistics of nothing"):
        sg.linear_statistics(x, w, ROWS, mesh, vocab_size=6)
    with pytest.raises(ValueError, match="soft_cap must be a positive number, not 0"):
        call(soft_cap=0)
    for wrong in ("temperature", "soft_cap"):
        with pytest.raises(ValueError, match=f"{wrong} must be a positive number, not -1.5"):
            sg.linear_statistics(x, w, ROWS, mesh, vocab_size=6, entropy=True, **{wrong: -1.5})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
@distributed(world_size=2, timeout=180)
def test_compiled(world_size: int) -> None:
    """A function around it is compiled in two graphs, with this between."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    layout = sg.Layout(SEQUENCE)
    full, target = whole_tensors(layout, SIZES), targets(layout, SIZES)
    found = []
    for how in (lambda f: f, partial(torch.compile, backend="aot_eager")):
        mine = shards(layout, mesh, full)

        def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return sg.linear_cross_entropy(2 * x, w, target, layout, mesh, b, vocab_size=SIZES["v"]) * 3

        how(loss)(*mine).backward()
        found.append([one.grad for one in mine])
    for one, two in zip(*found):
        assert one is not None
        assert two is not None
        assert_close(two, one, "compiled")


@distributed(world_size=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grads", ["backward", "forward"])
def test_no_more_than_a_chunk_of_logits_exists(world_size: int, dtype: torch.dtype, grads: Any) -> None:
    """By the allocator: the largest tensor, and the most bytes at once, above dX and dW."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    tokens, d, words, size = 512, 8, 2000, 32
    chunk = size * words // 2 * 4  # of a rank, in float32
    x, w = randn(tokens, d, seed=1).to(dtype).requires_grad_(), randn(words // 2, d, seed=2).to(dtype).requires_grad_()
    target = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(4))

    def step() -> None:
        x.grad = w.grad = None
        layout = "X[n,d] W[v/tp,d] -> Z[n,v/tp]"
        how = {"vocab_size": words, "grads": grads, "chunk_tokens": size}
        sg.linear_cross_entropy(x, w, target, layout, mesh, **how).backward()  # type: ignore[arg-type]

    step()
    most, largest = peak_bytes(step)
    assert largest <= chunk
    wide = 4 * w.numel() + 4 * x.numel()  # dW in float32, and small numbers of each token
    assert most - x.nbytes - w.nbytes <= 4 * chunk + wide < tokens * words // 2 * dtype.itemsize
