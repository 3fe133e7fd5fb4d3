"""What the caller and a rank say to each other, over a pipe.

Nothing here refers to the user's code except as text and bytes, so a message can always be read: what may
fail to unpickle is unpickled where the failure can be reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

READY = "ready"
"""A rank's first message, once torch is imported."""

Status = Literal["passed", "failed", "skipped", "xfailed", "died", "stuck"]


@dataclass(frozen=True)
class Target:
    """Where a rank finds the function: by file, because a directory of tests is rarely a package.

    Where it is one, ``packages`` are the names and files of the packages around the module, outermost first.
    """

    module: str
    file: str
    qualname: str
    packages: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Filter:
    """One entry of ``warnings.filters``; the category by module and name, for it may not exist on the rank."""

    action: str
    message: str
    category: tuple[str, str]
    module: str
    line: int


@dataclass(frozen=True)
class Call:
    """A function, its arguments, and what of the caller's surroundings it may depend on.

    ``rank_supplies`` names the arguments that differ between ranks and are made there.
    """

    target: Target
    args: tuple[bytes, ...]
    kwargs: dict[str, bytes]
    rank_supplies: tuple[str, ...]
    rewrite_asserts: bool
    sys_path: tuple[str, ...]
    directory: str
    filters: tuple[Filter, ...]


@dataclass(frozen=True)
class Group:
    """The default process group that a call wants; another ``generation`` is another group."""

    generation: int
    backend: str
    world_size: int
    store: str


@dataclass(frozen=True)
class Task:
    call: Call
    group: Group


@dataclass(frozen=True)
class Reply:
    """How one rank ended. The rank sends the first four statuses and the pool makes the last two.

    ``when`` is on the monotonic clock, which processes share: the first failure is the likeliest cause.
    The pool adds what the rank printed.
    """

    status: Status
    summary: str = ""
    traceback: str = ""
    variables: str = ""
    value: bytes = b""
    when: float = 0.0
    group_intact: bool = True
    stdout: str = ""
    stderr: str = ""
