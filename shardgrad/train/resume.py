"""Going on where a run ended, with the same bits: which checkpoint, whether the configuration fits, what is restored.

Of a run, a checkpoint holds the parameters and the optimizer's moments (`shardgrad.checkpoint`), and in `state.json`
the step, torch's random state, what has been measured so far and the configuration. Batches are a function of seed and
step, the learning rate one of step: they need nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad import checkpoint
from shardgrad.files import refuse_link
from shardgrad.train import folder, run_state
from shardgrad.train.config import Config, ConfigError
from shardgrad.train.history import History
from shardgrad.train.metrics import Metrics
from shardgrad.train.signals import Stop

_MAY_DIFFER = ("run.dir", "run.resume", "run.tensorboard", "run.check", "mesh.", "sample.")
_NO_PARAMETERS = (
    "model.dropout",
    "model.sequence",
    "model.made_by",
)  # no parameter's shape or meaning depends on these
_MAY_DIFFER_TOO = ("train.log_every", "train.eval_every", "train.eval_batches", "train.save_every", "train.keep")


@dataclass(frozen=True)
class Beginning:
    """A checkpoint that verifies, and what was passed over for it: newer ones, each with what is wrong with it."""

    path: Path
    verified: checkpoint.Verified
    passed_over: tuple[tuple[Path, str], ...] = ()


def start_from(run: Path | None, resume: str | None) -> Beginning | None:
    """The checkpoint to begin with: the newest that verifies of the run that goes on, or of `run.resume`'s path; None:
    no one.

    Raises:
        ConfigError: run.resume is a path without a checkpoint, or none verifies, or one is of another format.
    """
    if run is not None and (own := folder.checkpoints(run)):
        return _newest([path for _, path in own])
    if resume in (None, "auto"):
        return None
    path = Path(resume)
    if any((path / name).exists() for name in checkpoint.FILES):
        return _newest([path])
    found = folder.checkpoints(path)
    if not found:
        raise ConfigError(
            f"run.resume: {path} is neither a checkpoint (with a {checkpoint.STATE}) nor the folder of a run with a "
            f"whole checkpoint in {folder.CHECKPOINTS}/; the values are auto, a path, or null"
        )
    return _newest([path for _, path in found])


def _newest(candidates: Sequence[Path]) -> Beginning:
    """The last that verifies."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        try:
            verified = checkpoint.verify(path)
            run_state.check(path, verified.state)
        except (checkpoint.DamagedError, OSError) as error:
            damaged.append((path, str(error)))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        else:
            return Beginning(path, verified, tuple(damaged))
    raise ConfigError(
        "\n".join(
            [
                "no checkpoint can be gone on with; nothing was deleted:",
                *(f"  {problem}" for _, problem in damaged),
                "put back a copy, or begin another run: run.resume=null, or another run.dir",
            ]
        )
    )


def check_config(config: Config, start: Beginning) -> list[str]:
    """Compare with the configuration that saved a checkpoint.

    Returns:
        The keys that changed the run's course: what it goes on with is neither the old run nor the new one.

    Raises:
        ConfigError: the checkpoint is one of another model.
    """
    saved = _flat(start.verified.state["config"])
    differ = {
        key: (saved[key], value)
        for key, value in _flat(config.model_dump()).items()
        if key in saved and saved[key] != value  # a key that is newer than the checkpoint had no effect there
    }
    another = [
        _difference(key, was, now)
        for key, (was, now) in differ.items()
        if key.startswith("model.") and key not in _NO_PARAMETERS
    ]
    another += [_difference(key, *differ[key]) for key in ("data.tokenizer", "data.vocab") if key in differ]
    if another:
        raise ConfigError(
            "\n".join(
                [
                    f"{start.path} is a checkpoint of another model:",
                    *(f"  {line}" for line in another),
                    "set them as they were, or begin another run: run.resume=null, or another run.dir",
                ]
            )
        )
    return [
        _difference(key, was, now)
        for key, (was, now) in differ.items()
        if not key.startswith(_MAY_DIFFER) and key not in _MAY_DIFFER_TOO
    ]


def _difference(key: str, was: object, now: object) -> str:
    return f"{key} was {was!r}, and is {now!r} now"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, inner in values.items()
        if isinstance(inner, dict)
        for key, value in inner.items()
    }


def restore(
    start: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    base: str | None = None,
    seal: str | None = None,
) -> dict[str, Any]:
    """Fill all of them from a checkpoint; on every rank, which all read it.

    base: a digest of what parameters that are not trained come from, which no checkpoint holds.
    seal: of the checkpoint that the first rank has verified.

    Returns:
        What its `state.json` holds.

    Raises:
        OSError, ValueError: as `checkpoint.load`; or the parameters that are not trained were others.
    """
    about = checkpoint.load(start, model, optimizer, frozen=False, seal=seal)
    run_state.check(start, about)
    if about["base"] != base:
        raise ValueError(
            f"{start} holds what was trained beside another model.pretrained: its files have changed since "
            f"({about.get('base')}, and {base} now). Put them back, or begin another run"
        )
    history.restore(about["history"])
    run_state.set_random(about["random"])
    return about


class Keeper:
    """Saves a run while it trains; one on every rank.

    run: the folder. stop: says after every step whether it was the last. base: as of `restore`.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        digest: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: DeviceMesh,
        metrics: Metrics,
        stop: Stop,
        base: str | None = None,
    ) -> None:
        self._base = base
        self._run, self._config, self._digest, self._mesh = run, config, digest, mesh
        self._model, self._optimizer, self._metrics, self._stop = model, optimizer, metrics, stop
        self.stopped: str | None = None

    def after_step(self, history: History) -> bool:
        """Save if it is time to; returns whether training ends here, alike on all ranks.

        Raises:
            OSError: on every rank, if the checkpoint cannot be written; those before it are whole.
        """
        settings = self._config.train
        last = history.step >= settings.steps
        if not last:
            self.stopped = self._stop.agreed(history.step)
        if last or self.stopped or history.step % settings.save_every == 0:
            self._save(history)
        return self.stopped is not None

    def _save(self, history: History) -> None:
        self._metrics.to_disk()
        where = folder.checkpoint(self._run, history.step)
        refuse_link(where.parent)
        state = run_state.gather(history, self._digest, self._config, self._base)
        checkpoint.save(where, self._model, self._optimizer, mesh=self._mesh, state=state, frozen=False)
        if self._metrics.writes:
            folder.prune(self._run, self._config.train.keep)
