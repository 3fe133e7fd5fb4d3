"""Bugs planted into the decoder that is sharded by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.mutants import decoder, mutant
from shardgrad.mutants.by_hand import move
from shardgrad.mutants.mutant import Mutant, enters

TP, SP = "decoder", "decoder, rows sharded"
MUTANTS: list[Mutant] = []
bug = enters(MUTANTS)
sets, hooks = partial(mutant.sets, bug), partial(mutant.hooks, bug)
_737 = "Megatron-LM #737"


def _narrow(model: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: model.tp.sum(x.to(dtype).to(x))


_SHIFTED, _OWN, _CONSTANT = "positions shifted", "positions of the rank's own rows", "another constant"
sets("queries' positions begin at 1", TP, _SHIFTED, "attend.positions", lambda m: lambda n: torch.arange(n) + 1)
sets("queries' positions begin at the rank", TP, _SHIFTED, "attend.positions",
     lambda m: lambda n: torch.arange(n) + m.tp.index)  # fmt: skip
sets("queries' positions begin at rank times part", TP, _SHIFTED, "attend.positions",
     lambda m: lambda n: torch.arange(n) + m.tp.index * (n // m.tp.size))  # fmt: skip
sets("queries' positions begin again with each part", TP, _OWN, "attend.positions",
     lambda m: lambda n: torch.arange(n) % (n // m.tp.size))  # fmt: skip
sets("another base of rotary positions", TP, _CONSTANT, "attend.base", lambda m: 140.0)
sets("KV heads are repeated, not interleaved", TP, "repeat where repeat_interleave belongs", "attend.share",
     lambda m: lambda x: x.repeat(decoder.HEADS // decoder.KV_HEADS, 1, 1))  # fmt: skip
_SCALED = "scores scaled by another constant"
sets("scores are divided by the features", TP, _SCALED, "attend.scale", lambda m: 1 / decoder.HEAD_DIM)
sets("scores are not scaled", TP, _SCALED, "attend.scale", lambda m: 1.0)
sets("scores are divided by √d_model", TP, _SCALED, "attend.scale", lambda m: decoder.D**-0.5)
_MASK = "mask off by one"
sets("no mask", TP, "mask left out", "attend.mask", lambda m: lambda n: torch.ones(n, n, dtype=torch.bool))
sets("each row sees the next", TP, _MASK, "attend.mask", lambda m: lambda n: torch.ones(n, n, dtype=torch.bool).tril(1))
sets("the mask counts each part's rows anew", TP, "mask of the rank's own rows", "attend.mask",
     lambda m: lambda n: torch.ones(n, n, dtype=torch.bool).tril()[torch.arange(n) % (n // m.tp.size)])  # fmt: skip
_ACTIVATION = "another activation"
sets("GELU's tanh approximation", TP, _ACTIVATION, "act.function",
     lambda m: lambda x: F.gelu(x, approximate="tanh"), "GPT-2's is the approximation")  # fmt: skip
sets("the quick GELU", TP, _ACTIVATION, "act.function", lambda m: lambda x: x * (1.702 * x).sigmoid())
sets("SiLU for GELU", TP, _ACTIVATION, "act.function", lambda m: F.silu)
sets("ReLU for GELU", TP, _ACTIVATION, "act.function", lambda m: F.relu)
_OUTSIDE = "epsilon outside the root"
sets("epsilon outside the root, layer norm", TP, _OUTSIDE, "norm2.root", lambda m: lambda s: s.sqrt() + decoder.EPS)
sets("epsilon outside the root, RMS norm", TP, _OUTSIDE, "norm3.root", lambda m: lambda s: s.sqrt() + decoder.EPS)
sets("epsilon outside the root, written out", TP, _OUTSIDE, "norm1.root", lambda m: lambda s: s.sqrt() + decoder.EPS)
sets("another epsilon in an RMS norm", TP, "another epsilon", "norm3.eps", lambda m: 1e-2)
sets("another epsilon, written out", TP, _CONSTANT, "norm1.eps", lambda m: 1e-6)
sets("a layer norm that subtracts no mean", TP, "another norm", "norm2.centre", lambda m: lambda x: x)
sets("a norm's variance over n − 1", TP, "variance over n − 1", "norm2.square",
     lambda m: lambda x: x.square().sum(-1, keepdim=True) / (decoder.D - 1))  # fmt: skip
sets("a norm's weight counts from one", TP, "another norm", "norm3.scale", lambda m: lambda w: w + 1,
     "Gemma's norm is such a one")  # fmt: skip
_LABELS = "label smoothing over the rank's own vocabulary"


@bug("labels smoothed over the rank's vocabulary", TP, _LABELS, _737)
def _(model: Any) -> None:
    n = decoder.VOCAB // model.tp.size
    model.criterion.rate = decoder.SMOOTHING * n / (n - 1)
    model.criterion.uniform = lambda logits, total: total.log() - logits.sum(-1) / n


@bug("labels smoothed with the number of the rank's classes", TP, _LABELS, f"compare {_737}")
def _(model: Any) -> None:
    n = decoder.VOCAB // model.tp.size
    model.criterion.uniform = lambda logits, total: (
        total.log() * model.tp.size - model.criterion.sum(logits.sum(-1)) / n
    )  # fmt: skip


sets("the smoothed loss's softmax is the rank's own", TP, "softmax over the rank's own vocabulary", "criterion.total",
     lambda m: m.tp.same, f"compare {_737}")  # fmt: skip
sets("labels are not smoothed", TP, "label smoothing left out", "criterion.rate", lambda m: None)
sets("targets one place later", TP, "targets shifted", "criterion.targets", lambda m: lambda t: t.roll(1))
sets("rows without a target are counted", TP, "ignored rows counted", "criterion.over", lambda m: len)
sets("the loss is summed", TP, "loss summed", "criterion.over", lambda m: lambda kept: 1)
sets("learned positions begin at 0 on each rank", SP, "another rank's shard", "places.start", lambda m: 0)


@bug("learned positions begin at 1", SP, "positions shifted")
def _(model: Any) -> None:
    model.places.start += 1


@bug("two rows are exchanged", SP, "rows in another order")
def _(model: Any) -> None:
    tp = model.tp

    def exchanged(x: Tensor) -> Tensor:
        rows = tp.slice(tp.sum(x))
        return rows[[0, 4, 2, 3, 1, *range(5, len(rows))]] if tp.index == 0 else rows

    model.down.leave = move(exchanged, tp.cat)


_BF16 = "rounded to bfloat16 in a reduction"


sets("terms of an output are summed in bfloat16", TP, _BF16, "down.leave",
     lambda m: move(_narrow(m, torch.bfloat16), m.tp.same), "compare pytorch #144359")  # fmt: skip
sets("rows of the vocabulary are sent in bfloat16", TP, "rounded to a lower precision", "embedding.leave",
     lambda m: move(_narrow(m, torch.bfloat16), m.tp.same))  # fmt: skip
sets("dX is summed in bfloat16", TP, _BF16, "head.enter", lambda m: move(m.tp.same, _narrow(m, torch.bfloat16)))
sets("a norm's gradient is summed in bfloat16", SP, _BF16, "norm1.share",
     lambda m: move(m.tp.same, _narrow(m, torch.bfloat16)))  # fmt: skip
sets("learned positions' gradient is summed in float16", SP, "rounded to a lower precision", "places.share",
     lambda m: move(m.tp.same, _narrow(m, torch.float16)))  # fmt: skip
hooks("a gradient's rows are exchanged", TP, "rows in another order", "up.weight",
      lambda m: lambda g: g[[3, 1, 2, 0, *range(4, len(g))]])  # fmt: skip
