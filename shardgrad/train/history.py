"""How far a run is and what it has measured; a checkpoint carries it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Window:
    """What was measured since the last report."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    communicating: float = 0.0

    def add(self, loss: float, tokens: int, communicating: float) -> None:
        """Count a step, but for its seconds."""
        self.loss += loss
        self.steps += 1
        self.tokens += tokens
        self.communicating += communicating

    @property
    def mean_loss(self) -> float:
        return self.loss / self.steps

    def measured(self) -> dict[str, float]:
        return {
            "loss": self.mean_loss,
            "tokens_per_second": self.tokens / self.seconds,
            "communication_share": self.communicating / self.seconds,
        }


@dataclass
class History:
    """Losses in nats a token, by steps done; and over the whole run: tokens trained on, seconds of training (held-out
    evaluation apart), and this rank's share of them spent in communication.

    step: steps done. since: what the next line of measurements will hold. settle: has `since` hold all steps done,
        those too whose losses are still on the device.
    After a restart the losses begin with the last held-out one before it, if there was one.
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    communicating: float = 0.0
    step: int = 0
    since: Window = field(default_factory=Window)
    settle: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def communication_share(self) -> float:
        return self.communicating / self.seconds

    def close_window(self) -> None:
        """Add to the run what was measured since the last report, and begin again."""
        self.tokens += self.since.tokens
        self.seconds += self.since.seconds
        self.communicating += self.since.communicating
        self.since = Window()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, of JSON's types, which keep every bit of a float.

        Raises:
            TrainingError: as `settle`, where a loss of these steps was not finite.
        """
        self.settle()
        totals = {name: getattr(self, name) for name in ("step", "tokens", "seconds", "communicating")}
        return {**totals, "held_out": self.held_out[-1:], "since": asdict(self.since)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be what `state()` was taken of."""
        for name in ("step", "tokens", "seconds", "communicating"):
            setattr(self, name, state[name])
        self.train, self.held_out = [], [(step, loss) for step, loss in state["held_out"]]
        self.since = Window(**state["since"])
