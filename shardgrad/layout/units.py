"""Amounts as people read them: 12.6 MB, 1.1 TFLOP; and those of a column in one unit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, log10

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def format_si(amount: float, unit: str) -> str:
    """Three significant digits and a decimal (SI) prefix; whole numbers below a thousand as they are."""
    power = 0
    while power + 1 < len(_PREFIXES) and abs(amount) >= 999.5:
        amount, power = amount / 1000, power + 1
    number = f"{amount:.0f}" if power == 0 and amount == int(amount) else f"{amount:.{2 - _digits(amount)}f}"
    return f"{number} {_PREFIXES[power]}{unit}"


def _digits(amount: float) -> int:
    """The power of ten of the first digit, after rounding to three; 0 to 2."""
    size = abs(amount)
    return 2 if size >= 99.95 else 1 if size >= 9.995 else 0


_MOST_DIGITS = 3  # after the point
_MOST = 100.0  # of the largest amount, before a smaller unit would make it 100,000
_SCALES = {"µ": 1e-6, "m": 1e-3} | {prefix: 1000.0**power for power, prefix in enumerate(_PREFIXES)}


@dataclass(frozen=True, slots=True)
class Aligned:
    """A column of amounts in one unit, with as many digits after the point, so that they align.

    prefix: of the unit. digits: after the point.
    """

    prefix: str
    digits: int

    @staticmethod
    def of(amounts: Iterable[float], *, prefixes: str = "kMGTPE") -> Aligned:
        """The unit of the largest amount, or a smaller one, in which the smallest that is not 0 has three digits (two
        after three behind the point), as far as the largest does not become too long to read.

        prefixes: those that may be taken, in order, beside none.
        """
        found = [abs(amount) for amount in amounts if amount]
        if not found:
            return Aligned("", 0)
        known = sorted(("", *prefixes), key=lambda prefix: -_SCALES[prefix])
        smaller = [prefix for prefix in known if max(found) >= _SCALES[prefix]] or known[-1:]
        for prefix in smaller:
            scale = _SCALES[prefix]
            digits = max(0, 2 - floor(log10(min(found) / scale)))
            if digits <= _MOST_DIGITS + 1 or max(found) / scale >= _MOST:
                break
        whole = scale == 1.0 and all(amount == int(amount) for amount in found)
        return Aligned(prefix, 0 if whole else min(digits, _MOST_DIGITS))

    def text(self, amount: float) -> str:
        """The number alone; 0 is 0, and what is too small for the digits is said to be less."""
        if not amount:
            return "0"
        least = 10.0**-self.digits
        scaled = amount / _SCALES[self.prefix]
        return f"<{least:g}" if scaled < least / 2 else f"{scaled:,.{self.digits}f}"
