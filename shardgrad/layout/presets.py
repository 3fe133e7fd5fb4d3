"""The published schemes by name: nothing but layouts."""

from __future__ import annotations

from difflib import get_close_matches

from shardgrad.errors import LayoutError
from shardgrad.layout.layout import Layout


class UnknownPreset(LayoutError, KeyError):
    """No layout has that name."""

    __str__ = LayoutError.__str__  # not KeyError's, which quotes


class Presets(dict[str, Layout]):
    """Layouts by name; a name that there is not raises `UnknownPreset`, which says the nearest one."""

    def __missing__(self, name: object) -> Layout:
        near = get_close_matches(str(name), self, n=1)
        meant = f"the nearest name is {near[0]!r}; " if near else ""
        raise UnknownPreset(f"no layout is called {name!r}; {meant}those with a name are {', '.join(self)}")


PRESETS = Presets(
    (name, Layout(text))
    for name, text in {
        # Shoeybi et al. 2019, arXiv 1909.08053
        "column": "X[n,d] W[d,m/tp] -> Y[n,m/tp]",
        "row": "X[n,d/tp] W[d/tp,m] -> Y[n,m]",
        # Korthikanti et al. 2022, arXiv 2205.05198
        "column_sequence": "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]",
        "row_sequence": "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]",
        "data": "X[n/dp,d] W[d,m] -> Y[n/dp,m]",
        # Rajbhandari et al. 2019 (ZeRO stage 3), arXiv 1910.02054
        "fully_sharded": "X[n/dp,d] W[d/dp,m] -> Y[n/dp,m]",
        # van de Geijn and Watts 1997 (SUMMA), its all-gather form
        "2d": "X[n/r,d/c] W[d/r,m/c] -> Y[n/r,m/c]",
        # Wang et al. 2021 (Tesseract), arXiv 2105.14500
        "2.5d": "X[n/k/r,d/c] W[d/r,m/c] -> Y[n/k/r,m/c]",
        # Agarwal et al. 1995, A three-dimensional approach to parallel matrix multiplication
        "3d": "X[n/a,d/b/c] W[d/b/a,m/c] -> Y[n/a/b,m/c]",
        # Singh et al. 2023 (AxoNN), arXiv 2305.13525
        "axonn": "X[n/z,d/x] W[d/x/z,m/y] -> Y[n/z,m/y]",
        "fsdp_tp_sequence": "X[n/dp/tp,d] W[d/dp,m/tp] -> Y[n/dp,m/tp]",
        "expert": "X[e/ep,n,d] W[e/ep,d,m] -> Y[e/ep,n,m]",
        # the other convention, Y = W X
        "column_wx": "W[m/tp,n] X[n,k] -> Y[m/tp,k]",
    }.items()
)
