"""Whether the ranks of an axis mean the same: a description compared when first seen, or at every call on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shardgrad.comm import shim
from shardgrad.comm.collectives import AllGather, gather_ints
from shardgrad.comm.comparison import compare
from shardgrad.comm.mesh import Axis, MeshView
from shardgrad.errors import DisagreementError

# An entry for each block of `check_every_call` that is open; a list, so that importers of the name see it change.
every_call: list[None] = []


@contextmanager
def check_every_call() -> Iterator[None]:
    """A debugging mode: inside the block, each product compares layouts, shapes and dtypes with its peers at every
    call, forward and backward (one small exchange an axis), rather than when it first sees them."""
    every_call.append(None)
    try:
        yield
    finally:
        every_call.pop()


def checking_every_call() -> bool:
    return bool(every_call)


def agree(view: MeshView, axis: Axis, describe: Callable[[], str], what: str) -> None:
    """Compare a description over the ranks of an axis, unless this rank has seen it agreed on before.

    Raises:
        DisagreementError: on every rank of the axis, with what each rank says.
    """
    if axis.size == 1:
        return
    text = describe()
    if text in view.agreed[axis.name] and not every_call:
        return
    _compare(axis, text, 0, what)
    view.agreed[axis.name].add(text)


def share_first(axis: Axis, text: str, value: int, what: str) -> int:
    """The first rank's value, on every rank of the axis, once a description of what it is for has been compared.

    Raises:
        DisagreementError: as `agree`.
    """
    return value if axis.size == 1 else _compare(axis, text, value, what)


def _compare(axis: Axis, text: str, value: int, what: str) -> int:
    """The first rank's value; every rank's text must be the same."""
    if shim.is_imagined(axis.group):
        return value
    said, first = compare(axis, text, value, what)
    if any(one != text for one in said):
        raise DisagreementError(_report(said, axis, what))
    return first


def gather_texts(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Every rank's text, in the order of the axis."""
    raw = text.encode()
    lengths = [row[0] for row in gather_ints([len(raw)], axis, device, "comparison between ranks")]
    most = max(1, *lengths)  # all of them may be empty
    with shim.real_tensors():
        mine = torch.frombuffer(bytearray(raw.ljust(most)), dtype=torch.uint8).to(device)
        full = AllGather(axis, 0, most * axis.size, "comparison between ranks")(mine).cpu().numpy().tobytes()
    return [full[i * most : i * most + length].decode() for i, length in enumerate(lengths)]


def text_of_first(text: str, view: MeshView) -> str:
    """The text of the mesh's first rank, on every rank of the mesh."""
    for axis in view.axes.values():
        text = gather_texts(text, axis, view.device)[0] if axis.size > 1 else text
    return text


def texts_of_all(text: str, view: MeshView) -> list[str]:
    """Every rank's text, on every rank of the mesh, in the mesh's order."""
    texts = [text]
    for axis in reversed(view.axes.values()):
        if axis.size > 1:
            texts = [one for row in gather_texts(json.dumps(texts), axis, view.device) for one in json.loads(row)]
    return texts


def _report(said: list[str], axis: Axis, what: str) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, text in zip(axis.ranks, said):
        by_text.setdefault(text, []).append(rank)
    parts = {text: text.split("\n") for text in by_text}
    shared = set.intersection(*(set(lines) for lines in parts.values()))
    lines = [f"the ranks of {axis} disagree about {what}:"]
    for text, ranks in by_text.items():
        differs = "; ".join(line for line in parts[text] if line not in shared) or "(nothing besides what all say)"
        lines.append(f"  rank {', '.join(map(str, ranks))}: {differs}")
    return "\n".join(lines)
