"""Other functions than one device's that a program may have called by mistake: the table, and what each computes.

Of one call, what would have come out: `alike` on all ranks; `parts`, for a number of ranks, where each rank's part of a
dim is treated as if it were the whole; `ranked`, for a rank and the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.verification.functions import Call, NotThis

Kind = Literal["alike", "parts", "ranked"]
_LEAST = -1e4
"""What is filled in below this is masked out."""


@dataclass(frozen=True)
class Variant:
    """One entry. `make(call, rank, ranks)` may raise if the call is none that it applies to.

    says: goes on after "it is what comes out with".
    early: whether the call may be far before the tensor that is wrong (a mask, positions).
    """

    name: str
    functions: tuple[str, ...]
    says: str
    remedy: str
    make: Callable[[Call, int, int], Any]
    kind: Kind = "alike"
    early: bool = False


def _needs(condition: bool) -> None:
    if not condition:
        raise NotThis


# Activations

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "the exact GELU": F.gelu,
    "GELU's tanh approximation": lambda x: F.gelu(x, approximate="tanh"),
    "x·σ(1.702x), the quick GELU": lambda x: x * (1.702 * x).sigmoid(),
    "SiLU": F.silu,
    "ReLU": F.relu,
    "ReLU squared": lambda x: F.relu(x).square(),
    "ELU": F.elu,
    "Mish": F.mish,
    "tanh": torch.tanh,
}


def _activation(says: str, function: Callable[[Tensor], Tensor]) -> Variant:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        return function(call.args[0])

    return Variant("another activation", ("gelu", "silu", "relu"), says, "use the activation of one device", make)


# Norms


def _normalized(call: Call) -> tuple[Tensor, list[int], Tensor | None, Tensor | None, float, bool]:
    """x, its dims, weight, bias, epsilon, whether the mean is subtracted."""
    x, shape = call.args[0], call.get(1, "normalized_shape")
    dims = list(range(-len(shape), 0))
    if call.name == "rms_norm":
        eps = call.get(3, "eps")
        return x, dims, call.get(2, "weight"), None, torch.finfo(x.dtype).eps if eps is None else eps, False
    return x, dims, call.get(2, "weight"), call.get(3, "bias"), call.get(4, "eps", 1e-5), True


def _norm(how: str) -> Callable[[Call, int, int], Tensor]:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        x, dims, weight, bias, eps, centred = _normalized(call)
        whole = x
        if how == "own features":
            _needs(len(dims) == 1 and x.shape[-1] % ranks == 0)
            x = x.unflatten(-1, (ranks, -1))
        centred = centred != (how == "mean")
        x = x - x.mean(dims, keepdim=True) if centred else x
        square = x.square().mean(dims, keepdim=True)
        if how == "n - 1":
            n = torch.Size([whole.shape[d] for d in dims]).numel()
            square = square * n / (n - 1)
        y = x / (square.sqrt() + eps) if how == "outside" else x * (square + eps).rsqrt()
        y = y.reshape(whole.shape)
        if how == "left out":
            y = whole
        weight = weight + 1 if how == "from one" and weight is not None else weight
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return make


def _batch_norm(call: Call, rank: int, ranks: int) -> Tensor:
    _needs(call.args[0].shape[0] % ranks == 0 and bool(call.get(5, "training")))
    rest = {"weight": call.get(3, "weight"), "bias": call.get(4, "bias"), "eps": call.get(7, "eps", 1e-5)}
    parts = call.args[0].chunk(ranks)
    return torch.cat([F.batch_norm(part, None, None, training=True, **rest) for part in parts])


_NORM = ("layer_norm", "rms_norm")
_EPS = "add it to the mean square, before the root, as one device does"

# Attention


def _softmax_parts(call: Call, rank: int, ranks: int) -> Tensor:
    dim = call.get(1, "dim", -1)
    _needs(call.args[0].shape[dim] % ranks == 0)
    return torch.cat([call.func(part, dim=dim) for part in call.args[0].chunk(ranks, dim)], dim)


def _tri(by: int) -> Callable[[Call, int, int], Tensor]:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        return call.func(call.args[0], call.get(1, "diagonal", 0) + by)

    return make


def _own_rows(call: Call, rank: int, ranks: int) -> Tensor:
    mask = call.run()
    _needs(mask.shape[-2] % ranks == 0)
    return mask.index_select(-2, torch.arange(mask.shape[-2]) % (mask.shape[-2] // ranks))


def _not_masked(call: Call, rank: int, ranks: int) -> Tensor:
    """masked_fill(scores, mask, -inf), where(mask, scores, -inf), scores + mask."""
    if call.name == "masked_fill":
        _needs(float(call.get(2, "value")) < _LEAST)
        return call.args[0]
    tensors = [t for t in call.args[-2:] if isinstance(t, Tensor) and t.dim() > 1]
    _needs(call.name == "where" and len(tensors) == 1 and float(call.args[-1]) < _LEAST)
    return tensors[0]


def _attention(how: str) -> Callable[[Call, int, int], Tensor]:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        q, k = call.args[:2]
        mask, causal = call.get(3, "attn_mask"), call.get(5, "is_causal", False)
        rows, columns = q.shape[-2], k.shape[-2]
        if how == "no mask":
            _needs(causal or mask is not None)
            mask = None
        elif how == "causal":
            _needs(not causal and mask is None)
            mask = torch.ones(rows, columns, dtype=torch.bool).tril()
        elif how == "own rows":
            _needs(causal and rows % ranks == 0)
            mask = torch.ones(rows, columns, dtype=torch.bool).tril()[torch.arange(rows) % (rows // ranks)]
        elif how == "ahead":
            _needs(causal)
            mask = torch.ones(rows, columns, dtype=torch.bool).tril(1)
        options = {key: call.kwargs[key] for key in ("scale", "enable_gqa") if key in call.kwargs}
        return call.func(*call.args[:3], attn_mask=mask, **options)

    return make


_SDPA = ("scaled_dot_product_attention",)
_MASK = "look at the mask: its diagonal, and the first row and column that a rank has of it"


def _repeated(call: Call, rank: int, ranks: int) -> Tensor:
    """repeat for repeat_interleave, of the heads of each of so many ranks."""
    x = call.args[0]
    if call.name == "repeat_interleave":
        times, dim = call.get(1, "repeats"), call.get(2, "dim")
        _needs(isinstance(times, int) and dim is not None)
    elif call.name == "expand":
        made = call.run()
        sizes = [d for d in range(made.dim()) if d > 0 and made.shape[d] > 1 and made.stride(d) == 0]
        _needs(len(sizes) == 1 and made.dim() > 3)
        new = sizes[0]
        both = made.flatten(new - 1, new)
        groups, times = made.shape[new - 1] // ranks, made.shape[new]
        _needs(made.shape[new - 1] % ranks == 0)
        tiled = both[(slice(None),) * (new - 1) + (_tiled(groups, times, ranks) * times,)]
        return tiled.unflatten(new - 1, made.shape[new - 1 : new + 1])
    else:
        _needs(call.name == "repeat")
        sizes = list(call.args[1:]) if len(call.args) > 2 else list(call.args[1])
        many = [d for d, n in enumerate(sizes) if n > 1]
        _needs(len(sizes) == x.dim() and len(many) == 1 and x.shape[many[0]] > 1)
        return x.repeat_interleave(sizes[many[0]], many[0])
    _needs(x.shape[dim] % ranks == 0)
    return x.index_select(dim, _tiled(x.shape[dim] // ranks, times, ranks))


def _tiled(groups: int, times: int, ranks: int) -> Tensor:
    """Of each rank's groups, one after the other, the whole of them so many times."""
    own = torch.arange(groups).repeat(times)
    return torch.cat([own + groups * rank for rank in range(ranks)])


def _grouped(call: Call, rank: int, ranks: int) -> Tensor:
    q, k, v = call.args[:3]
    _needs(bool(call.kwargs.get("enable_gqa")) and k.shape[-3] % ranks == 0)
    index = _tiled(k.shape[-3] // ranks, q.shape[-3] // k.shape[-3], ranks)
    rest = {key: value for key, value in call.kwargs.items() if key != "enable_gqa"}
    return call.func(q, k.index_select(-3, index), v.index_select(-3, index), *call.args[3:], **rest)


# Positions


def _moved(by: Callable[[int, int, int], int]) -> Callable[[Call, int, int], Tensor]:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        made = call.run()
        _needs(made.dim() == 1 and len(made) > 1 and len(made) % ranks == 0)
        return made + by(len(made), rank, ranks)

    return make


def _restarted(call: Call, rank: int, ranks: int) -> Tensor:
    made = call.run()
    _needs(made.dim() == 1 and len(made) > ranks and len(made) % ranks == 0)
    return made[torch.arange(len(made)) % (len(made) // ranks)]


_AT = "a rank that has part of the sequence begins at the position of its first row, rank · length; others at 0"


def _nowhere(call: Call, rank: int, ranks: int) -> Tensor:
    made = call.run()
    _needs(made.dim() == 1 and len(made) > 1)
    return torch.zeros_like(made)


def _alternate(call: Call, rank: int, ranks: int) -> Any:
    """Halves of the last dim: every other element, in place of the first half and the second."""
    x = call.args[0]
    size, half = x.shape[-1], x.shape[-1] // 2
    if call.name == "chunk":
        _needs(call.get(1, "chunks") == 2 and call.get(2, "dim", 0) in (-1, x.dim() - 1) and size > 2)
        return x[..., ::2], x[..., 1::2]
    index = call.args[1]
    last = index[-1] if isinstance(index, tuple) and index and index[0] is Ellipsis else None
    if not isinstance(last, slice) or size <= 2 or size % 2:
        raise NotThis
    _needs((last.start or 0, last.stop or size) in ((0, half), (half, size)))
    return x[..., (1 if last.start else 0) :: 2]


def _exchanged(call: Call, rank: int, ranks: int) -> Any:
    _needs(call.get(1, "chunks") == 2)
    return tuple(reversed(call.run()))


# The loss


def _smoothed(how: str) -> Callable[[Call, int, int], Tensor]:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        logits, targets = call.args[0], call.args[1]
        _needs(logits.dim() == 2 and targets.dim() == 1 and logits.shape[1] % ranks == 0)
        rate, classes = call.get(7, "label_smoothing", 0.0), logits.shape[1] // ranks
        own = slice(rank * classes, (rank + 1) * classes)
        logs = logits.log_softmax(1)
        kept = targets != call.get(4, "ignore_index", -100)
        if how.startswith("softmax"):
            total = logits[:, own].logsumexp(1)
        else:
            _needs(rate > 0)
            total = logits.logsumexp(1)
        nll = total - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        mean = -logs[:, own].sum(1) / (logits.shape[1] if how == "own sum" else classes)
        if how == "own mean, rescaled":  # as Megatron-LM has it
            rate = rate * classes / (classes - 1)
        if how == "all, own number":
            mean = -logs.sum(1) / classes
        if how.startswith("softmax"):
            mean = total - logits.mean(1)
        loss = (1 - rate) * nll + rate * mean if rate else nll
        return {"mean": lambda t: t.mean(), "sum": lambda t: t.sum(), "none": lambda t: t}[
            call.get(6, "reduction", "mean")
        ](loss[kept])

    return make


def _loss(how: str) -> Callable[[Call, int, int], Tensor]:
    def make(call: Call, rank: int, ranks: int) -> Tensor:
        logits, targets = call.args[0], call.args[1]
        options = {key: value for key, value in call.kwargs.items() if key not in ("reduction", "label_smoothing")}
        _needs(len(call.args) == 2 and call.get(6, "reduction", "mean") == "mean")
        smoothing = 0.0 if how == "not smoothed" else call.kwargs.get("label_smoothing", 0.0)
        if how in ("later", "earlier"):
            targets = targets.roll(1 if how == "later" else -1, -1)
        if how == "ignored counted":
            _needs(bool((targets == call.kwargs.get("ignore_index", -100)).any()))
        total = call.func(logits, targets, reduction="sum", label_smoothing=smoothing, **options)
        if how == "summed":
            return total
        rows = targets.numel() if how == "ignored counted" else int(
            (targets != call.kwargs.get("ignore_index", -100)).sum()
        )  # fmt: skip
        return total / rows

    return make


_CROSS = ("cross_entropy",)
_OWN = "sum over the ranks that shard the vocabulary, and divide by the number of all classes"

VARIANTS: tuple[Variant, ...] = (
    *(_activation(says, function) for says, function in _ACTIVATIONS.items()),
    Variant("epsilon outside the root", _NORM, "x/(√mean square + ε)", _EPS, _norm("outside")),
    Variant(
        "statistics of the rank's own features", _NORM, "a norm of each rank's features alone",
        "sum the squares (and the means) over the ranks that shard the features", _norm("own features"), "parts",
    ),
    Variant("variance over n − 1", _NORM, "n − 1 in the place of n", "divide by n (unbiased=False)", _norm("n - 1")),
    Variant("another norm", ("layer_norm",), "a norm that subtracts no mean", "use a LayerNorm", _norm("mean")),
    Variant("another norm", ("rms_norm",), "a norm that subtracts the mean", "use an RMSNorm", _norm("mean")),
    Variant("another norm", _NORM, "weights that count from one, 1 + w", "use w itself", _norm("from one")),
    Variant("norm left out", _NORM, "x as it is, times the weight", "normalise it", _norm("left out")),
    Variant(
        "statistics of the rank's own rows", ("batch_norm",), "a norm of each rank's rows alone",
        "sum the squares and the means over the ranks that shard the rows (SyncBatchNorm)", _batch_norm, "parts",
    ),
    Variant("repeat where repeat_interleave belongs", ("repeat_interleave", "expand"), "KV heads in the order 0, 1, …, "
            "0, 1, …", "query head i uses KV head i // (heads a KV head): repeat_interleave", _repeated, "parts", True),
    Variant("repeat_interleave where repeat belongs", ("repeat",), "each row n times in turn", "use repeat", _repeated),
    Variant("repeat where repeat_interleave belongs", _SDPA, "KV heads in the order 0, 1, …, 0, 1, …",
            "query head i uses KV head i // (heads a KV head): repeat_interleave", _grouped, "parts"),
    Variant("mask left out", ("masked_fill", "where"), "no mask", _MASK, _not_masked),
    Variant("mask left out", _SDPA, "no mask", _MASK, _attention("no mask")),
    Variant("a mask too many", _SDPA, "a causal mask", _MASK, _attention("causal")),
    Variant("mask off by one", _SDPA, "a causal mask that begins one later", _MASK, _attention("ahead")),
    Variant("mask of the rank's own rows", _SDPA, "a causal mask that counts rows from each rank's first", _MASK,
            _attention("own rows"), "parts"),
    Variant("mask off by one", ("triu", "tril"), "a mask whose diagonal is one further up", _MASK, _tri(1), "alike",
            True),
    Variant("mask off by one", ("triu", "tril"), "a mask whose diagonal is one further down", _MASK, _tri(-1), "alike",
            True),
    Variant("mask of the rank's own rows", ("triu", "tril"), "a mask that counts rows from each rank's first", _MASK,
            _own_rows, "parts", True),
    Variant("softmax over the rank's own columns", ("softmax", "log_softmax"), "a softmax of each rank's columns alone",
            "take maximum and sum over the ranks that shard them", _softmax_parts, "parts"),
    Variant("positions shifted", ("arange",), "positions that begin at 1", _AT, _moved(lambda n, r, p: 1), "alike",
            True),
    Variant("positions shifted", ("arange",), "positions that begin at −1", _AT, _moved(lambda n, r, p: -1), "alike",
            True),
    Variant("positions of the rank's own rows", ("arange",), "positions that begin at 0 on each rank", _AT, _restarted,
            "parts", True),
    Variant("positions shifted", ("arange",), "positions that begin at rank · length", _AT,
            _moved(lambda n, r, p: r * (n // p)), "ranked", True),
    Variant("positions shifted", ("arange",), "positions that begin at the rank", _AT, _moved(lambda n, r, p: r),
            "ranked", True),
    Variant("positions left out", ("arange",), "position 0 everywhere", _AT, _nowhere, "alike", True),
    Variant("halves interleaved", ("chunk", "getitem"), "every other feature in the place of each half",
            "look at the layout of rotary pairs, or of a fused gate and up", _alternate),
    Variant("halves exchanged", ("chunk",), "the halves exchanged", "look at the order of a fused gate and up",
            _exchanged),
    Variant("label smoothing over the rank's own vocabulary", _CROSS, "the mean over the rank's own classes, and s·K/"
            "(K − 1) of their number K", _OWN, _smoothed("own mean, rescaled"), "ranked"),
    Variant("label smoothing over the rank's own vocabulary", _CROSS, "the mean over the rank's own classes", _OWN,
            _smoothed("own mean"), "ranked"),
    Variant("label smoothing over the rank's own vocabulary", _CROSS, "the sum over the rank's own classes", _OWN,
            _smoothed("own sum"), "ranked"),
    Variant("label smoothing over the rank's own vocabulary", _CROSS, "the number of the rank's own classes", _OWN,
            _smoothed("all, own number"), "ranked"),
    Variant("softmax over the rank's own vocabulary", _CROSS, "the logarithm of the rank's own sum of exponentials",
            "sum the exponentials over the ranks that shard the vocabulary", _smoothed("softmax"), "ranked"),
    Variant("label smoothing left out", _CROSS, "no label smoothing", "smooth the labels", _loss("not smoothed")),
    Variant("ignored rows counted", _CROSS, "the mean over all rows, ignored ones too",
            "divide by the number of rows that are not ignored", _loss("ignored counted")),
    Variant("loss summed", _CROSS, "the sum over the rows", "divide by their number", _loss("summed")),
    Variant("targets shifted", _CROSS, "targets one place later", "look at how targets are made", _loss("later")),
    Variant("targets shifted", _CROSS, "targets one place earlier", "look at how targets are made", _loss("earlier")),
)  # fmt: skip
