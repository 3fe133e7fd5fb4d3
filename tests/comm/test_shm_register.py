"""`import shardgrad` is enough for init_process_group("shm"), before or after torch, and does not import torch."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shardgrad.comm.backend import choose
from shardgrad.comm.shm import platform

ROOT = Path(__file__).parents[2]
USE = """
dist.init_process_group("shm", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(3)
dist.all_reduce(x)
assert dist.get_backend() == "shm"
dist.destroy_process_group()
print("done")
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The entry points that pyproject.toml declares, as an installer lays them down."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points.items()]
    folder = tmp_path / "shardgrad-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shardgrad\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    "imports",
    [
        "import shardgrad, sys\nassert 'torch' not in sys.modules\nimport torch, torch.distributed as dist",
        "import torch, torch.distributed as dist\nimport shardgrad",
    ],
    ids=["shardgrad first", "torch first"],
)
def test_import_is_enough_in_both_orders(imports: str, installed: Path) -> None:
    # Loading of installed backends is off in the second case: there the import itself has to do it.
    later = imports.endswith("import shardgrad")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0" if later else "1",
    }
    program = [sys.executable, "-W", "error", "-c", f"{imports}\n{USE}"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_cpu_ranks_of_one_host_use_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert choose("cuda", here) == "nccl"
    assert choose("cpu", here) == "shm"
    assert choose("cpu", {}) == "shm"
    assert choose("cpu", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}) == "gloo"
    assert choose("cpu", {"WORLD_SIZE": "4"}) == "gloo"
    monkeypatch.setattr(platform.platform, "machine", lambda: "aarch64")
    assert choose("cpu", here) == "gloo"
    monkeypatch.setattr(platform.sys, "platform", "darwin")
    assert "needs Linux" in platform.unsupported()
