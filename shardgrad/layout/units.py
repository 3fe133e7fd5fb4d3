"""Amounts as people read them: 12.6 MB, 1.1 TFLOP."""

from __future__ import annotations

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
