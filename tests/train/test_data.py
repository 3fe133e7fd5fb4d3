"""Text, its parts, and batches that depend on seed and step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardgrad.train import data


def test_the_text_that_cpython_carries() -> None:
    text = data.read([])
    assert len(text) > 300_000
    assert text.isascii() or text.decode()


def test_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "b.txt").write_bytes(b"two\xff")
    assert data.read([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == b"one\ntwo\xff"
    with pytest.raises(data.DataError, match=r"data.files: cannot read .*c\.txt: No such file"):
        data.read([str(tmp_path / "c.txt")])


def test_the_last_part_is_held_out() -> None:
    text = data.part(bytes(range(100)), 0.25, 8)
    assert text.train.tolist() == list(range(75))
    assert text.held_out.tolist() == list(range(75, 100))
    assert text.digest != data.part(bytes(range(100)), 0.24, 8).digest


@pytest.mark.parametrize(("held_out", "part"), [(0.05, "held-out"), (0.95, "training")])
def test_too_little_text(held_out: float, part: str) -> None:
    with pytest.raises(data.DataError) as error:
        data.part(bytes(100), held_out, 8)
    assert str(error.value) == (
        f"data: too little text: of 100 bytes, data.held_out = {held_out} leaves 5 for the {part} part; "
        "one sequence needs model.seq_len + 1 = 9"
    )


def test_batches_are_a_function_of_seed_and_step() -> None:
    text = data.part(bytes(i % 251 for i in range(5000)), 0.1, 16)
    ids, targets = data.batch(text, 7, 3, 4, 16)
    assert ids.shape == targets.shape == (4, 16)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    torch.rand(10)  # no hidden state
    again = data.batch(text, 7, 3, 4, 16)
    assert torch.equal(ids, again[0])
    assert not torch.equal(ids, data.batch(text, 7, 4, 4, 16)[0])
    assert not torch.equal(ids, data.batch(text, 8, 3, 4, 16)[0])
    # The stream itself is written down: a checkpoint's run goes on with the same text on another machine.
    assert ids[:, 0].tolist() == [109, 94, 7, 185]


def test_batches_reach_both_ends_and_stay_inside() -> None:
    text = data.part(bytes(range(20)), 0.5, 8)
    starts = {int(ids[0, 0]) for step in range(50) for ids, _ in [data.batch(text, 0, step, 1, 8)]}
    assert starts == {0, 1}  # ten bytes hold a sequence of 8 and what follows it at 0 and at 1


def test_held_out_is_read_once() -> None:
    text = data.part(bytes(range(60)), 0.5, 7)
    batches = list(data.held_out(text, 3, 7))
    assert [len(ids) for ids, _ in batches] == [3, 1]
    assert torch.cat([ids for ids, _ in batches]).flatten().tolist() == list(range(30, 58))
    assert torch.cat([targets for _, targets in batches]).flatten().tolist() == list(range(31, 59))
