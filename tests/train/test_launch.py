"""The launcher as its users start it: processes, exit statuses, what is printed, what is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from shardgrad.train import launch
from shardgrad.train.config import load
from shardgrad.train.launch import main

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch" / "train.py"
CONFIG = """
model: {layers: 1, heads: 3, d_model: 12, seq_len: 9}
train: {steps: 5, batch: 3, lr: 0.01, warmup: 2, log_every: 2, eval_every: 3}
sample: {prompt: "a b", tokens: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of odd sizes, its text and its run folder beside it."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{CONFIG}data: {{files: [{tmp_path / 'text.txt'}]}}\nrun: {{dir: {tmp_path / 'runs' / 'tiny'}}}\n")
    return path


def start(script: Path, *arguments: object, ranks: int | None) -> subprocess.CompletedProcess[str]:
    """Run a script as torchrun does on so many ranks, or without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, *torchrun, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_leave_a_whole_run(config: Path, tmp_path: Path, torchrun: bool) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)  # an earlier run, which is not touched
    if torchrun:
        done = start(LAUNCH, config, "run.seed=3", ranks=2)
        status, printed = done.returncode, done.stdout + done.stderr
    else:
        status, printed = forked.run(LAUNCH, 2, 120, [config, "run.seed=3"])
    assert status == 0, printed
    for told in (
        r"mesh: dp = 1, tp = 2 \(cpu\)",
        r"blocks\.\*\.attention\.query_weight +Wq\[h/tp,k,d\] +3×4×12 +2×4×12",
        r"X\[b,s/tp,d\] W\[m/tp,d\] -> Y\[b,s,m/tp\] \+ B\[m/tp\]",
        r"every rank sends [\d,]+(?: to [\d,]+)? bytes a step, predicted and traced alike",
        r"first step against one device: the loss and every gradient",
        r"all 22 tensors differ by rounding alone \(float32, mesh dp=1, tp=2\): at most [\d.]+ times one device's",
        r"step 5/5  loss [\d.]+  [\d,]+ tokens/s  \d+% communicating",
        r"step 5/5  held-out loss [\d.]+ nats a byte",
        r"(?m)^a b",
        r"held-out loss [\d.]+ nats a byte after 5 steps",
    ):
        assert len(re.findall(told, printed)) == 1, f"{told}\n{printed}"
    folder = tmp_path / "runs" / "tiny-2"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "sample.txt",
    }
    assert list((tmp_path / "runs" / "tiny").iterdir()) == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        *("start", "bytes", "comparison", "train", "train", "held_out", "train", "train", "held_out", "end")
    ]
    assert lines[1]["by_rank"][0]["predicted"] == lines[1]["by_rank"][0]["traced"] > 0
    assert lines[2]["passed"] is True
    assert [line["step"] for line in lines] == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert load(folder / "config.yaml").mesh.tp == 2
    assert load(folder / "config.yaml").run.seed == 3
    assert load_file(folder / "checkpoints" / "step-00000005" / "model.safetensors")[
        "blocks.0.attention.query_weight"
    ].shape == (3, 4, 12)
    assert "Warning" not in printed


@pytest.mark.slow
def test_without_torchrun(config: Path, tmp_path: Path) -> None:
    done = start(LAUNCH, config, "sample.tokens=0", ranks=None)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "mesh: dp = 1, tp = 1 (cpu)" in done.stdout
    assert "every rank sends 0 bytes a step, predicted and traced alike" in done.stdout
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000005" / "state.json").exists()


@pytest.mark.slow
def test_wrong_gradients_are_not_trained_on(config: Path, tmp_path: Path) -> None:
    """A norm whose parameters' gradients are no longer summed over the ranks."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import sys, shardgrad.nn.norm as norm\n"
        "from shardgrad.train.launch import main\n"
        "norm.row_pieces = lambda parameters, shardings, mesh, dims: [parameters]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = start(script, config, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("the first step differs from one device: not training on wrong gradients") == 1
    assert "6 of 22 tensors are not what one device computes (float32, mesh dp=1, tp=2)" in done.stdout
    assert re.search(r"first in the order of execution: the gradient of norm\.\w+, worst\son\srank", done.stdout)
    assert re.search(r"the gradient of norm\.\w+: sum over tp missing", done.stdout)
    assert "rank 0: predicted" in done.stdout
    assert {p.name for p in (tmp_path / "runs" / "tiny").iterdir()} == {"config.yaml", "metrics.jsonl", "run.json"}


@pytest.mark.slow
def test_a_bad_key_is_told_once_on_two_ranks(config: Path, tmp_path: Path) -> None:
    done = start(LAUNCH, config, "model.layer=2", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("model.layer is no key; the nearest key is model.layers") == 1
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", done.stderr)
    assert str(LAUNCH.parent / "shardgrad") not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("mesh.tp=2", "mesh.tp = 2, but 1 process was started"),
        ("data.files=[/no/such/file]", "data.files: cannot read /no/such/file: No such file or directory"),
        ("model.seq_len=100", "leaves 88 for the held-out part; one sequence needs model.seq_len + 1 = 101"),
        ("run.dir=/proc/run", "run.dir: cannot make the folder /proc/run: "),
        ("mesh.device=cuda", "mesh.device = cuda, but there are 0 GPUs for local rank 0"),
        ("run.resume=/no/run", "run.resume: /no/run is neither a checkpoint (with a state.json) nor"),
        ("data.tokens=/no/ids", "data.files and data.tokens are both given"),
        ("--steps=3", "unrecognized arguments: --steps=3"),
    ],
)
def test_what_cannot_be_used(
    config: Path, override: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main([str(config), override]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.out == ""


def test_nothing_is_left_where_the_data_is_wrong(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.bin").write_bytes(bytes(998) + b"\x0a\x00")
    (tmp_path / "text.txt").write_text("too little")
    for overrides, told in (
        (["data.files=[]", f"data.tokens={tmp_path / 'ids.bin'}", "data.vocab=10"], "holds the id 10 at position 499"),
        (["data.tokenizer=bpe", "data.vocab=260"], "too little text: of 6 tokens"),
        (["data.tokenizer=bpe", "data.vocab=256"], "data.vocab = 256 must be more than the 256 bytes"),
        ([f"data.tokenizer={tmp_path / 'text.txt'}"], "is no file of the tokenizers library"),
    ):
        assert main([str(config), *overrides]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_tensorboard_that_is_not_installed(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([str(config), "run.tensorboard=true"]) == 2
    assert "it is installed in a checkout of shardgrad by  pip install -e '.[tensorboard]'" in capsys.readouterr().err


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    told = capsys.readouterr().out
    assert "-m shardgrad.train CONFIG.yaml [section.key=value ...]" in told
    assert re.search(r"train\.lr +highest learning rate \(required\)", told)
    assert re.search(r"mesh\.timeout_s .* \(default 120\.0\)", told)


def test_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "the configuration is missing" in capsys.readouterr().err


def test_a_backend_that_cannot_start_is_told_in_words(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise torch.distributed.DistBackendError("no memory for a shm group of 1 ranks")

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(launch, "start_process_group", refused)
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit, match="1"):
        main([str(config)])
    assert capfd.readouterr().err == "no memory for a shm group of 1 ranks\n"
