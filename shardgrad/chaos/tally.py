"""What held and what did not, by kind of attack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Row:
    """A kind of attack: how many were tried, how many held, and what was wrong with the others."""

    attack: str
    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)


class Tally:
    """attacks: the kinds that stand first, in this order; others come as they are noted."""

    def __init__(self, attacks: Iterable[str] = ()) -> None:
        self._rows = {attack: Row(attack) for attack in attacks}

    def note(self, attack: str, failure: str | None) -> None:
        """One attack; failure: what was wrong, if anything."""
        row = self._rows.setdefault(attack, Row(attack))
        row.tried += 1
        row.held += not failure
        if failure:
            row.failures.append(failure)

    @property
    def rows(self) -> list[Row]:
        """Of every kind that was tried."""
        return [row for row in self._rows.values() if row.tried]
