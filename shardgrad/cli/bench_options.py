"""What the commands of `shardgrad bench` have alike: how sizes and dtypes read, and how the machine is told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shardgrad.cli import style
from shardgrad.hardware import cores, processor

if TYPE_CHECKING:
    import torch


def read_sizes(text: str, divisor: int, *, tokens_too: bool = False) -> list[tuple[int, int, int]]:
    """`8x64x256,64x256x1024`, each tokens × features × hidden features.

    divisor: what the hidden features must be a multiple of (and the tokens, with tokens_too).

    Raises:
        typer.BadParameter: it does not read so.
    """
    found = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise style.refuse(f"{part!r} is no size: write tokens×features×hidden features as 64x256x1024")
        tokens, d, m = map(int, numbers)
        if m % divisor or (tokens_too and tokens % divisor):
            what = "tokens and hidden features" if tokens_too else "hidden features"
            raise style.refuse(f"{part.strip()}: {what} must be a multiple of {divisor}, the ranks; peers need it")
        found.append((tokens, d, m))
    return found


def read_dtypes(text: str) -> list[torch.dtype]:
    """`fp32,bf16`.

    Raises:
        typer.BadParameter: one is not known.
    """
    import torch

    return [getattr(torch, style.read_dtype(part)) for part in text.split(",")]


def read_choice(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """Names separated by commas, of those that are known.

    Raises:
        typer.BadParameter: one is not.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise style.refuse(f"{name!r} is not one of the {what} {', '.join(known)}")
    return names


def read_one(text: str, known: tuple[str, ...], what: str) -> str:
    """One name, of those that are known.

    Raises:
        typer.BadParameter: it is not.
    """
    if text not in known:
        raise style.refuse(f"{text!r} is not one of the {what} {', '.join(known)}")
    return text


def machine() -> dict[str, Any]:
    """What numbers are to be read with: the processor, its cores, torch, and how busy the machine was."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load before": None if load is None else round(load, 1),
    }


def describe_machine(found: dict[str, Any]) -> str:
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return (
        f"{found['processor']}, {found['cores']} cores, {threads} a rank, torch {found['torch']}; load average before: "
        f"{found['load before']}"
    )


def quiet_profiler() -> None:
    """Have torch's profiler not print its own beginning and end: before the ranks start, or torch does."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
