"""A rank that cannot take part, or ends in the middle, tells the others why: they end too, and say it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from forked import run

CONFIG = """\
run: {dir: DIR/run}
model: {layers: 1, heads: 2, d_model: 8, seq_len: 8}
train: {steps: 100000, batch: 2, lr: 1e-3, warmup: 1, eval_every: 1000000}
sample: {tokens: 0}
"""


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        pytest.param(
            "config",
            "rank 1 does not take part: cannot read the configuration",
            marks=[pytest.mark.slow, pytest.mark.rare],
        ),
        pytest.param("memory", "rank 1 has ended: it ran out of memory: 17 GB were refused", marks=pytest.mark.slow),
        ("bug", "rank 1 has ended: KeyError: 'a bug'"),
    ],
)
def test_the_others_end_and_say_why(odd: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("DIR", str(tmp_path)))
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""\
            import os, sys
            from shardgrad.train import launch

            odd, config = sys.argv[1:]
            if os.environ["RANK"] == "1":
                step = launch.train
                def train(*args, **kwargs):
                    raise MemoryError("17 GB were refused") if odd == "memory" else KeyError("a bug")
                if odd == "config":
                    config += ".missing"
                else:
                    launch.train = train
            sys.exit(launch.main([config]))
        """)
    )
    status, text = run(program, 2, 60, [odd, tmp_path / "config.yaml"])
    first = text.partition("[rank 1]")[0]
    assert status in (1, 2), text
    assert said in first, text
