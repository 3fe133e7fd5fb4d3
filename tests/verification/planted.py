"""Wrong code leaves its bound: bugs planted into a product of four ranks, and by how much each exceeds the bound.

python tests/verification/planted.py 100
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from shardgrad.verification.bounds import Worst, bounded, compare

RANKS = 4
N = 8  # rows; columns as many, so that a transposed block has the right shape
LAYOUT = "X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m]"


class Case:
    """Operands, and Y as four ranks compute it: partial sums rounded to the dtype, then added one by one in it."""

    def __init__(self, k: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.w, self.b, other_x = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in ((N, k), (k, N), (N,), (N, k))
        )
        self.dtype = dtype
        self.stale = self.reduced(self.partials(other_x, self.w)) + self.b

    def partials(self, x: Tensor, w: Tensor) -> list[Tensor]:
        return [a @ b for a, b in zip(x.chunk(RANKS, 1), w.chunk(RANKS, 0))]

    def reduced(self, partials: list[Tensor]) -> Tensor:
        total = partials[0].clone()
        for partial in partials[1:]:
            total += partial
        return total

    def right(self) -> Tensor:
        return self.reduced(self.partials(self.x, self.w)) + self.b


def _swapped(c: Case) -> Tensor:
    one, two, *rest = c.w.chunk(RANKS, 0)
    return c.reduced(c.partials(c.x, torch.cat([two, one, *rest]))) + c.b


def _one_stale(c: Case) -> Tensor:
    y = c.right()
    y[3, 5] = c.stale[3, 5]
    return y


def _bf16_operands(c: Case) -> Tensor:
    x, w = c.x.bfloat16().to(c.dtype), c.w.bfloat16().to(c.dtype)
    return c.reduced(c.partials(x, w)) + c.b


def _tf32_operands(c: Case) -> Tensor:
    def cut(t: Tensor) -> Tensor:  # 10 bits behind the leading one
        return ((t.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    return c.reduced(c.partials(cut(c.x), cut(c.w))) + c.b


def _narrow_sum(c: Case) -> Tensor:
    """Every single addition is rounded to the dtype."""
    parts = []
    for x, w in zip(c.x.chunk(RANKS, 1), c.w.chunk(RANKS, 0)):
        total = torch.zeros(N, N, dtype=c.dtype)
        for at in range(x.shape[1]):
            total = total + x[:, at, None] * w[None, at]
        parts.append(total)
    return c.reduced(parts) + c.b


BUGS: dict[str, Callable[[Case], Tensor]] = {
    "reduction missing": lambda c: c.partials(c.x, c.w)[0] + c.b,
    "reduced twice": lambda c: RANKS * c.reduced(c.partials(c.x, c.w)) + c.b,
    "one rank's partial sum missing": lambda c: c.reduced(c.partials(c.x, c.w)[:-1]) + c.b,
    "two shards of W exchanged": _swapped,
    "bias skipped": lambda c: c.right() - c.b,
    "bias added on every rank": lambda c: c.right() + (RANKS - 1) * c.b,
    "one column off": lambda c: c.right().roll(1, 1),
    "block transposed": lambda c: c.right().T.contiguous(),
    "one element stale": _one_stale,
    "last of d missing": lambda c: c.reduced(c.partials(c.x[:, :-1], c.w[:-1])) + c.b,
    "one column off by 1 %": lambda c: c.right() * (1 + 0.01 * torch.eye(N, dtype=c.dtype)[0]),
    "operands rounded to TF32": _tf32_operands,
    "operands rounded to bf16": _bf16_operands,
    "sums rounded to the dtype at every step": _narrow_sum,
}
FP32_ONLY = ("operands rounded to TF32", "operands rounded to bf16")
NARROW_ONLY = ("sums rounded to the dtype at every step",)


def applies(bug: str, dtype: torch.dtype) -> bool:
    narrow = dtype.itemsize == 2
    return narrow if bug in NARROW_ONLY else dtype == torch.float32 or bug not in FP32_ONLY


def worst(case: Case, y: Tensor) -> Worst:
    """The worst element, where every partial sum is known to be rounded, as in `check_product`."""
    right = bounded(case.x, case.w, LAYOUT, "Y", {"tp": RANKS}, bias=case.b, all_rounded=True)
    return compare("Y", y, right, case.dtype)


def main(seeds: int) -> None:
    """The smallest ratio over so many seeds, to the proved bound / to the likely one."""
    print(f"{'planted':<42}" + "".join(f"{d!s:>24}" for d in ("float32", "bfloat16", "float16")))
    for k in (16, 256, 4096):
        for bug, plant in {"(none: the right code; largest)": Case.right, **BUGS}.items():
            cells = []
            pick = max if bug.startswith("(") else min
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if not applies(bug, dtype) or (bug in NARROW_ONLY and k > 256):
                    cells.append("–")
                    continue
                cases = [Case(k, dtype, seed) for seed in range(seeds)]
                found = [worst(case, plant(case)) for case in cases]
                cells.append(f"{pick(one.ratio for one in found):.3g} / {pick(one.likely for one in found):.3g}")
            print(f"d={k:<5}{bug:<35}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
