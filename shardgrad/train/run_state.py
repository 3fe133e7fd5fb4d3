"""What a run adds to a checkpoint's `state.json`: how far it was, torch's random state, the configuration. What it
cannot have written is refused by its key."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from shardgrad import checkpoint
from shardgrad.settings import Section, format_errors
from shardgrad.train import folder
from shardgrad.train.config import Config
from shardgrad.train.history import History

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_CUDA_BYTES = 16  # Philox: its seed and how far it is
_SHOWN = 200  # characters of a problem: values may be long
_Seconds = Annotated[float, Field(ge=0)]


class _Window(Section):
    loss: float
    steps: _Count
    tokens: _Count
    seconds: _Seconds
    communicating: _Seconds


class _History(Section):
    step: _Count
    tokens: _Count
    seconds: _Seconds
    communicating: _Seconds
    held_out: Annotated[list[tuple[_Count, float]], Field(max_length=1)]
    since: _Window


class _Random(Section):
    cpu: str
    cuda: str = ""


class _State(Section):
    format: int
    torch: str
    mesh: Annotated[dict[str, Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1)]
    optimizer: Any
    step: Annotated[int, Field(ge=1, lt=2**63)]
    history: _History
    random: _Random
    text: str
    config: Any
    base: str | None


def gather(history: History, text: str, config: Config, base: str | None) -> dict[str, Any]:
    """What `checkpoint.save` writes beside the tensors.

    text: the digest of what is trained on. base: of what parameters that are not trained come from.
    """
    return {
        "step": history.step,
        "history": history.state(),
        "random": _random(),
        "text": text,
        "config": config.model_dump(),
        "base": base,
    }


def check(start: Path, state: Mapping[str, Any]) -> None:
    """Whether `gather` and `checkpoint.save` can have written it, in a folder of this name.

    Raises:
        DamagedError: they cannot; lists the keys.
    """
    problems = list(_problems(start, state))
    if problems:
        raise checkpoint.DamagedError(
            "\n    ".join([f"{start / checkpoint.STATE} is not what a run saves:", *(one[:_SHOWN] for one in problems)])
        )


def _problems(start: Path, state: Mapping[str, Any]) -> Iterator[str]:
    try:
        _State.model_validate_json(json.dumps(state))
    except ValidationError as error:
        yield from format_errors(_State, error.errors())
        return
    step, history = state["step"], state["history"]
    if folder.step_of(start) not in (None, step):
        yield f"step = {step}, in a folder that is named {start.name}: was it copied or renamed?"
    if history["step"] != step:
        yield f"history.step = {history['step']}, but step = {step}"
    if not history["seconds"] + history["since"]["seconds"]:
        yield f"history.seconds = 0 after {step} steps"
    try:
        Config.model_validate(state["config"])
    except ValidationError as error:
        known = [one for one in error.errors() if one["type"] != "extra_forbidden"]  # keys of another version
        yield from (f"config.{line}" for line in format_errors(Config, known))
    for device, text in state["random"].items():
        try:
            random = _tensor(text)
            if device == "cpu":
                torch.Generator().set_state(random)
            elif len(random) != _CUDA_BYTES:
                raise ValueError(f"{len(random)} bytes instead of {_CUDA_BYTES}")
        except (ValueError, RuntimeError) as error:
            yield f"random.{device} is no random state of torch {torch.__version__}: {error}"


def set_random(states: Mapping[str, str]) -> None:
    """Restore torch's random state."""
    for device, text in states.items():
        if device == "cpu":
            torch.set_rng_state(_tensor(text))
        elif torch.cuda.is_initialized():
            torch.cuda.set_rng_state(_tensor(text))


def _random() -> dict[str, str]:
    """torch's random state, alike on all ranks (they are seeded alike and draw alike): the first rank's is saved."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def _tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8).copy())
