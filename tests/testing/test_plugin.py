"""The plugin, mostly by running pytest on small test files and reading what it says.

A run costs seconds, because its ranks import torch, so each of the inner files holds many cases.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

INI = """
    [pytest]
    filterwarnings =
        error
        ignore:harmless
        ignore::PendingDeprecationWarning
"""

# Every rank leaves its process id, and ranks that hang do not take the suite's time.
CONFTEST = """
    import shardgrad.testing.pool

    shardgrad.testing.pool.GRACE = 0.7
"""
NOTE_PIDS = """
    import os, pathlib

    def note_pid(pid=None):
        pathlib.Path(f"pid{pid or os.getpid()}").touch()
"""

Project = Callable[..., pytest.Pytester]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Writes a project of test files, with temporary files and process ids where they can be counted."""
    temporary = pytester.path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("COLUMNS", "120")

    def write(**files: str) -> pytest.Pytester:
        pytester.makefile(".ini", pytest=INI)
        pytester.makeconftest(CONFTEST)
        pytester.makepyfile(pids=NOTE_PIDS, **files)
        return pytester

    return write


def run(pytester: pytest.Pytester, *options: str) -> tuple[pytest.RunResult, str]:
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=100)
    return result, result.stdout.str()


def section(text: str, test: str) -> str:
    """What pytest wrote about one failing test."""
    found = re.search(rf"^_+ {re.escape(test)} _+\n(.*?)(?=^(_{{3,}}|=====))", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section for {test} in\n{text}"
    return found[1]


def assert_nothing_left(pytester: pytest.Pytester, processes: int, within: float = 5.0) -> None:
    pids = [int(path.name.removeprefix("pid")) for path in pytester.path.glob("pid*[0-9]")]
    assert len(pids) == processes, pids
    temporary = pytester.path / "temporary"
    end = time.monotonic() + within
    while (alive := [pid for pid in pids if is_alive(pid)]) or list(temporary.glob("shardgrad*")):
        assert time.monotonic() < end, (alive, list(temporary.iterdir()))
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():  # nobody may be there to bury a child of a killed parent
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- what passes ---------------------------------------------------------------------------------------


def test_a_passing_suite(project: Project) -> None:
    """Ranks, arguments, warnings and isolation, each asserted by an inner test; -s shows the ranks' output."""
    pytester = project(
        helper="""
            class Thing:
                def __init__(self, value):
                    self.value = value
        """,
        test_inner="""
            import os, pathlib, sys, warnings
            import pytest
            import helper
            from pids import note_pid
            from shardgrad.testing import distributed

            @pytest.fixture
            def thing():
                return helper.Thing(7)

            @distributed([1, 3], timeout=50)
            @pytest.mark.parametrize("n", [5, 8])
            def test_ranks(world_size, n, rank):
                import torch, torch.distributed as dist
                note_pid()
                assert (dist.get_world_size(), dist.get_rank()) == (world_size, rank)
                assert dist.get_backend() == "gloo" and torch.get_num_threads() == 1
                x = torch.full((n,), float(rank + 1))
                dist.all_reduce(x)
                assert x.tolist() == [world_size * (world_size + 1) / 2] * n
                with open(f"ran-{world_size}-{n}", "a") as file:
                    file.write("x")
                print(f"n is {n}", flush=True)

            @distributed(2)
            def test_fixtures(tmp_path, thing):
                import torch.distributed as dist
                assert isinstance(thing, helper.Thing) and thing.value == 7
                (tmp_path / str(dist.get_rank())).touch()
                dist.barrier()
                assert len(list(tmp_path.iterdir())) == 2

            @distributed(2)
            def test_monkeypatch_of_the_rank(monkeypatch):
                monkeypatch.setenv("ONLY_HERE", "1")
                monkeypatch.setattr(helper, "Thing", None)

            @distributed(2)
            def test_monkeypatch_was_undone():
                assert "ONLY_HERE" not in os.environ and helper.Thing is not None
                assert "ONLY_HERE" not in os.environ

            @distributed(2)
            def test_warnings():
                warnings.warn("harmless, says the ini file")
                warnings.warn("this too", PendingDeprecationWarning)
                with pytest.raises(UserWarning, match="an error"):
                    warnings.warn("an error")
                with pytest.warns(UserWarning, match="expected"):
                    warnings.warn("expected")

            class TestMethod:
                @distributed(2)
                @pytest.mark.parametrize("k", [4])
                def test_in_class(self, k, rank):
                    assert isinstance(self, TestMethod) and k == 4 and rank in (0, 1)

            @distributed(2)
            def test_that_ends_the_group(rank):
                import torch.distributed as dist
                if rank == 1:
                    dist.destroy_process_group()

            @distributed(2)
            def test_after_the_group_was_ended():
                import torch.distributed as dist
                assert dist.get_world_size() == 2
                dist.barrier()

            @distributed(2)
            @pytest.mark.parametrize("before", [5, 0])
            def test_equal_meshes_of_another_group_are_not_taken_for_these(before):
                import torch
                import torch.distributed as dist
                from torch.distributed.tensor import DTensor, Shard
                for _ in range(before):
                    dist.new_group([0, 1])
                mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
                x = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh["tp"], [Shard(0)]))
                assert x.device_mesh.get_group("tp") is mesh.get_group("tp")
                dist.barrier()
                dist.destroy_process_group()

            @distributed(2)
            @pytest.mark.parametrize("turn", range(40))
            def test_groups_do_not_pile_up(turn, rank):
                import torch.distributed as dist
                dist.new_group([0, 1])
                if rank == 0:
                    pathlib.Path(f"descriptors{turn:02}").write_text(str(len(os.listdir("/proc/self/fd"))))

            def test_pytest_itself_has_no_group():
                dist = sys.modules.get("torch.distributed")
                assert dist is None or not dist.is_initialized()
        """,
    )
    result, text = run(pytester, "-s", "-v")
    result.assert_outcomes(passed=54)
    assert text.index("test_ranks[ranks=1-8]") < text.index("test_ranks[ranks=3-5]")
    for world_size in (1, 3):
        for n in (5, 8):
            assert (pytester.path / f"ran-{world_size}-{n}").read_text() == "x" * world_size
    assert [text.count(f"[rank {rank}] n is 5") for rank in (0, 1, 2, 3)] == [2, 1, 1, 0]
    descriptors = [int(path.read_text()) for path in sorted(pytester.path.glob("descriptors*"))]
    assert len(descriptors) == 40
    assert max(descriptors[20:]) < 1.4 * max(descriptors[:20])  # twice as many if groups stayed
    assert_nothing_left(pytester, processes=3)


# ---- what fails, the ranks surviving -------------------------------------------------------------------


def test_failures_are_told_by_rank(project: Project) -> None:
    pytester = project(
        test_inner="""
            import sys, unittest, warnings
            import pytest
            from pids import note_pid
            from shardgrad.testing import distributed

            @distributed(3)
            def test_one_rank(rank):
                note_pid()
                print("out of", rank)
                print("err of", rank, file=sys.stderr)
                import torch
                x = torch.full((2, 3), float(rank))
                many = list(range(10**6))
                assert x.sum() != 6

            @distributed(3)
            def test_two_alike(rank, world_size):
                if rank != 1:
                    try:
                        int("seven")
                    except ValueError:
                        raise RuntimeError("no number\\nat all") from None

            @distributed(2)
            def test_each_its_own(rank):
                assert rank == 5

            @distributed(2)
            def test_skip(rank):
                pytest.skip("not here")

            @distributed(2)
            def test_importorskip(rank):
                pytest.importorskip("no_such_module_anywhere")

            @distributed(2)
            def test_xfail(rank):
                pytest.xfail("not yet")

            @distributed(2)
            @pytest.mark.xfail(reason="known")
            def test_marked_xfail(rank):
                assert rank == 0

            @distributed(2)
            def test_skip_on_one_rank(rank):
                if rank == 1:
                    pytest.skip("only I")

            @distributed(2)
            @pytest.mark.parametrize("function", [lambda: 0])
            def test_argument(function):
                pass

            @distributed(2)
            def test_capsys(capsys):
                pass

            @distributed(2)
            def test_returns(rank):
                return rank == 0 or None

            @distributed(2)
            def test_warns():
                warnings.warn("deprecated thing", DeprecationWarning)

            @distributed(2)
            def test_exits():
                sys.exit(4)

            class TestCase(unittest.TestCase):
                @distributed(2)
                def test_method(self):
                    pass

            @distributed(2)
            def test_all_is_well_after_that():
                import torch.distributed as dist
                dist.barrier()
        """,
    )
    result, text = run(pytester, "-rsx")
    result.assert_outcomes(passed=1, failed=9, skipped=2, xfailed=2, errors=1)
    one = section(text, "test_one_rank[ranks=3]")
    assert one.startswith("1 of 3 ranks failed, rank 1: AssertionError: assert tensor(6.) != 6\n")
    assert "- rank 1 failed -" in one
    assert "- rank 0" not in one
    assert 'test_inner.py", line 14, in test_one_rank\n    assert x.sum() != 6\n' in one
    assert "worker.py" not in one
    assert "    x = [2, 3] torch.float32 tensor([[1., 1., 1.], [1., 1., 1.]])\n" in one
    assert "    many = [0, 1, 2, 3, 4, 5, 6, 7, ...]\n" in one
    assert "ranks 0, 2 finished: passed" in one
    assert "[rank 1] out of 1\n" in one
    assert "[rank 1] err of 1\n" in one
    two = section(text, "test_two_alike[ranks=3]")
    assert re.match(r"2 of 3 ranks failed, first rank [02]: RuntimeError: no number\n", two)
    assert "- ranks 0, 2 failed -" in two
    assert two.count("Traceback") == 1
    assert two.count("RuntimeError: no number\nat all\n") == 1
    assert "locals of rank 0:" in two
    assert "locals of rank 2:" in two
    own = section(text, "test_each_its_own[ranks=2]")
    assert re.match(r"2 of 2 ranks failed, first rank", own)
    for rank in (0, 1):
        assert f"- rank {rank} failed -" in own
        assert f"AssertionError: assert {rank} == 5" in own
    assert re.search(r"^SKIPPED .*: not here$", text, re.MULTILINE)
    assert re.search(r"^SKIPPED .*: could not import 'no_such_module_anywhere'", text, re.MULTILINE)
    assert re.search(r"^XFAIL .*test_xfail.* - not yet$", text, re.MULTILINE)
    disagree = section(text, "test_skip_on_one_rank[ranks=2]")
    assert disagree.startswith("the ranks disagree: rank 1 of 2 skipped or xfailed, not all\n")
    assert "rank 0 finished: passed\nrank 1 finished: skipped (only I)" in disagree
    argument = section(text, "test_argument[ranks=2-<lambda>]")
    assert argument.startswith("argument 'function' (a builtins.function) cannot be sent to the ranks: ")
    assert "must be picklable" in argument
    assert "During handling" not in argument
    assert section(text, "test_capsys[ranks=2]").startswith("argument 'capsys' (a _pytest.capture.")
    assert section(text, "test_returns[ranks=2]").startswith("rank 0 returned a value")
    assert "DeprecationWarning: deprecated thing" in section(text, "test_warns[ranks=2]")
    assert section(text, "test_exits[ranks=2]").startswith("2 of 2 ranks failed, first rank")
    assert "TestCase cannot run on ranks" in text
    assert_nothing_left(pytester, processes=3)


# ---- what loses ranks ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_that_hang_or_die(project: Project) -> None:
    """The ranks are replaced each time, so the last test passes, and no time is spent waiting for the dead."""
    pytester = project(
        test_inner="""
            import os, signal, subprocess, time
            from pids import note_pid
            from shardgrad.testing import distributed

            def collective():
                import torch, torch.distributed as dist
                dist.all_reduce(torch.ones(2))

            @distributed(3, timeout=1.5)
            def test_hang(rank):
                note_pid()
                print("I am", rank)
                if rank == 1:
                    note_pid(subprocess.Popen(["sleep", "300"]).pid)
                else:
                    collective()

            @distributed(2, timeout=200)
            def test_others_wait(rank):
                note_pid()
                if rank == 0:
                    raise ValueError("the cause")
                collective()

            @distributed(2, timeout=200)
            def test_exit(rank):
                note_pid()
                print("last words of", rank)
                if rank == 1:
                    os._exit(3)
                time.sleep(150)

            @distributed(2, timeout=200)
            def test_kill(rank):
                note_pid()
                if rank == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            @distributed(2)
            def test_recovered():
                note_pid()
                collective()
        """,
    )
    result, text = run(pytester)  # and that is over before any one of the long timeouts would be
    result.assert_outcomes(passed=1, failed=4)
    hang = section(text, "test_hang[ranks=3]")
    assert hang.startswith("timeout: 2 of 3 ranks (ranks 0, 2) did not finish in 1.5 s\n")
    assert "- ranks 0, 2 were still in all_reduce (distributed_c10d.py:" in hang
    assert re.search(r'test_inner.py", line 7 in collective\n  File ".*test_inner.py", line 16 in test_hang\n', hang)
    assert "worker.py" not in hang
    assert "rank 1 finished: passed" in hang
    assert "[rank 2] I am 2" in hang
    wait = section(text, "test_others_wait[ranks=2]")
    assert wait.startswith("1 of 2 ranks failed, rank 0: ValueError: the cause\n")
    assert 0 < wait.index("- rank 0 failed -") < wait.index("- rank 1 was still in all_reduce (")
    died = section(text, "test_exit[ranks=2]")
    assert died.startswith("rank 1 of 2 died: exit code 3\n")
    assert "- rank 0 was still in test_exit (test_inner.py:" in died
    assert "[rank 1] last words of 1" in died
    assert section(text, "test_kill[ranks=2]").startswith("rank 0 of 2 died: killed by SIGKILL\n")
    assert_nothing_left(pytester, processes=(3 + 1) + 2 + 2 + 2 + 2)


@pytest.mark.parametrize("way", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_end_of_pytest_is_the_end_of_the_ranks(project: Project, way: signal.Signals) -> None:
    pytester = project(
        test_inner="""
            import time
            from pids import note_pid
            from shardgrad.testing import distributed

            @distributed(2)
            def test_sleep():
                note_pid()
                time.sleep(100)
        """,
    )
    # A shell's background jobs ignore SIGINT, and so would pytest if it inherited that.
    code = """if True:
        import signal, sys, pytest
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(pytest.main(["-p", "no:cacheprovider"]))
    """
    command = [sys.executable, "-c", code]
    process = pytester.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(pytester.path.glob("pid*[0-9]"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(way)
    output = process.communicate(timeout=60)[0].decode()
    assert ("KeyboardInterrupt" in output) == (way == signal.SIGINT), output
    assert_nothing_left(pytester, processes=2)


@pytest.mark.slow
def test_one_backend_for_all_tests_and_races_on_it(project: Project) -> None:
    """What passes on gloo, which it names, fails on the late backend, for a result that is dropped."""
    tests = """
        import torch, torch.distributed as dist
        from shardgrad.testing import distributed

        @distributed(2, backend="gloo")
        def test_drops():
            dist.all_reduce(torch.ones(3), async_op=True)

        @distributed(2, backend="gloo")
        def test_right():
            assert dist.get_backend() == "late"
    """
    result = project(test_backend=tests).runpytest_subprocess("-p", "no:xdist", "--ranks-backend=late")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*RaceError: 1 fault*", "dropped: the work of all-reduce (SUM) of float32 ?3?*"])
