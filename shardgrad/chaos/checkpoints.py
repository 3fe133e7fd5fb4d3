"""Checkpoints of a run, damaged in every way: the run must go on from the one before, by name, or with the same bits.

An edit by hand comes in two kinds: of `state.json` alone, and with the digests made anew, by someone who means it. The
second kind cannot be told from what was saved by its digests: what is in the file must be refused.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad import checkpoint
from shardgrad.chaos.tally import Row, Tally
from shardgrad.checkpoint.seal import write_sums
from shardgrad.nn.linear import ColumnParallelLinear
from shardgrad.train import folder, resume, run_state
from shardgrad.train.config import Config, ConfigError, Model, Train
from shardgrad.train.history import History, Window

_CONFIG = Config(model=Model(layers=1, heads=1, d_model=4, seq_len=4), train=Train(steps=30, batch=1, lr=0.1))
_DELETED = object()
_VALUES: list[Any] = [None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "\ud800", "x", [], [[1]], {}]
_VALUES += [{"a": 1}, _DELETED]
_TEXTS = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 99999, b'{"format": 2}', b'{"format": 2, "optimizer": null}']
_OURS = (ConfigError, checkpoint.DamagedError, ValueError, OSError)


def run(mesh: DeviceMesh, where: Path, seed: int, count: int) -> list[Row]:
    """Attack the newer of two checkpoints; called on one rank.

    Args:
        mesh: of one rank.
        where: an empty folder.
        count: of the attacks of each kind that are drawn; files are lost and exchanged in every way.
    """
    target = _Target(mesh, where)
    tally = Tally()
    for kind, what, attack, plausible in _attacks(random.Random(seed), target, count):
        problem = target.attacked(attack, plausible)
        tally.note(kind, problem and f"{what}: {problem}")
    return tally.rows


class _Target:
    """A run with two checkpoints, and a small model that goes on from them."""

    def __init__(self, mesh: DeviceMesh, where: Path) -> None:
        self.run, self._copies = where / "run", where / "copies"
        self._model = nn.Sequential(ColumnParallelLinear(3, 4, mesh=mesh), nn.BatchNorm1d(4))
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        for step in (10, 20):
            self._model(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            self._optimizer.step()
            since = Window(0.5, 2, 4, 0.25, 0.125)
            history = History(held_out=[(8, 2.5)], tokens=40, seconds=1.5, communicating=0.5, step=step, since=since)
            state = run_state.gather(history, "text", _CONFIG, None)
            at = folder.checkpoint(self._copies, step)
            checkpoint.save(at, self._model, self._optimizer, mesh=mesh, state=state)
        self.old, self.new = (folder.checkpoint(self.run, step) for step in (10, 20))
        self._saved = self._bits(checkpoint.verify(at).state)

    def attacked(self, attack: Callable[[], None], plausible: bool) -> str | None:
        """Damage the newer checkpoint, and go on; returns what was not as it should be.

        plausible: whether a run could have saved it so.
        """
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self._copies, self.run)
        attack()
        with torch.no_grad():
            for one in (*self._model.parameters(), *self._model.buffers()):
                one.zero_()
        self._optimizer.state.clear()
        try:
            begun = resume.start_from(self.run, "auto")
            if begun is None or begun.path == self.old:
                return self._passed_over(begun)
            resume.check_config(_CONFIG, begun)
            resume.restore(begun.path, self._model, self._optimizer, History(), None, begun.verified.seal)
        except _OURS as error:
            return None if self.new.name in str(error) else f"refused without its name: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if plausible or self._saved == self._bits(begun.verified.state) else "accepted"

    def _passed_over(self, begun: resume.Beginning | None) -> str | None:
        told = [problem for _, problem in begun.passed_over] if begun is not None else []
        return None if len(told) == 1 and self.new.name in told[0] else f"passed over without its name: {told}"

    def _bits(self, state: Any) -> list[bytes]:
        kept = [one for state in self._optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
        tensors = [*self._model.parameters(), *self._model.buffers(), *kept]
        raw = [one.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for one in tensors]
        return [json.dumps(state).encode(), *raw]


def _attacks(chance: random.Random, target: _Target, count: int) -> Iterator[tuple[str, str, Callable[[], None], bool]]:
    """Kind, what exactly, the attack, and whether a run could have saved what it leaves."""
    new, old = target.new, target.old
    for name in checkpoint.FILES:
        for kind, damage in (("a bit flipped", _flip), ("cut short", _cut)):
            for _ in range(count):
                place = chance.random()
                yield kind, f"{name} at {place}", partial(damage, new / name, place, False), False
        yield "a file lost", name, (new / name).unlink, False
    for size in range(1, len(checkpoint.FILES) + 1):
        for names in combinations(checkpoint.FILES, size):
            yield "files of another checkpoint", ", ".join(names), partial(_exchange, old, new, names), False
    for text in _TEXTS:
        yield "state.json replaced, signed", repr(text[:20]), partial(_rewrite, new, text), False
    for name in checkpoint.FILES[:2]:
        for _ in range(count):
            place = chance.random()
            yield "a bit flipped, signed", f"{name} at {place}", partial(_flip, new / name, place, True), True
    shutil.copytree(target._copies, target.run, dirs_exist_ok=True)
    state = json.loads((new / checkpoint.STATE).read_bytes())
    edits = [(path, value) for path in _paths(state) for value in _VALUES]
    for path, value in chance.sample(edits, min(count * len(checkpoint.FILES), len(edits))):
        shown = "deleted" if value is _DELETED else repr(value)
        what, plausible = f"{'.'.join(path)} = {shown}", path[0] == "config" or _alike(value, _at(state, path))
        yield "a key of state.json edited", what, partial(_edit, new, path, value, False), False
        yield "a key of state.json edited, signed", what, partial(_edit, new, path, value, True), plausible


def _flip(path: Path, place: float, signed: bool) -> None:
    raw = bytearray(path.read_bytes())
    bit = int(place * 8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    if signed:
        write_sums(path.parent)


def _cut(path: Path, place: float, signed: bool) -> None:
    path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


def _exchange(old: Path, new: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.copy(old / name, new / name)


def _rewrite(new: Path, text: bytes) -> None:
    (new / checkpoint.STATE).write_bytes(text)
    write_sums(new)


def _edit(new: Path, path: tuple[str, ...], value: Any, signed: bool) -> None:
    state = json.loads((new / checkpoint.STATE).read_bytes())
    inner = _at(state, path[:-1])
    if value is _DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (new / checkpoint.STATE).write_text(json.dumps(state))
    if signed:
        write_sums(new)


def _at(state: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def _alike(value: object, saved: object) -> bool:
    """Whether a value is of the type that was saved; a whole number may stand for a fraction."""
    return type(value) is type(saved) or (type(value) is int and type(saved) is float)


def _paths(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of every key, in sections too."""
    for key, inner in value.items():
        yield (*above, key)
        if isinstance(inner, dict):
            yield from _paths(inner, (*above, key))
