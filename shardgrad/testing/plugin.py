"""The pytest side of ``@distributed``.

Every pytest run in an environment that has shardgrad loads this file, so it imports nothing heavy until
the first distributed test.
"""

from __future__ import annotations

import inspect
import pickle
from typing import TYPE_CHECKING

import pytest

from .decorator import MARK, Ranks

if TYPE_CHECKING:
    from .messages import Call
    from .pool import Pool

_POOL = pytest.StashKey["Pool"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "run @distributed tests on this backend, whichever they name; on 'late', races and bad orders are found"
    parser.getgroup("shardgrad").addoption("--ranks-backend", metavar="NAME", help=help_)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}(ranks): what shardgrad.testing.distributed sets")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # First, so that the world size varies slowest, and of the module's scope, so that pytest brings the tests of a
    # module that want the same size together: changing it costs a new process group.
    if ranks := _ranks(metafunc.definition):
        ids = [f"ranks={size}" for size in ranks.world_sizes]
        metafunc.parametrize("world_size", ranks.world_sizes, ids=ids, scope="module")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _ranks(item) and _world_size(item) is None:
        pytest.fail(
            f"{item.name} is distributed, but pytest gave it no world size: methods of unittest.TestCase "
            "cannot run on ranks. Make it a function or the method of a plain class.",
            pytrace=False,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    ranks, world_size = _ranks(pyfuncitem), _world_size(pyfuncitem)
    if ranks is None or world_size is None:
        return None
    from .report import echo, judge, name_ranks

    call = _call(pyfuncitem, ranks)
    backend = pyfuncitem.config.getoption("ranks_backend") or ranks.backend
    replies = _pool(pyfuncitem).run(call, world_size, backend=backend, timeout=ranks.timeout)
    echo(replies)
    verdict, text = judge(replies, ranks.timeout)
    if verdict == "skipped":
        pytest.skip(text)
    if verdict == "xfailed":
        pytest.xfail(text)
    if verdict == "failed":
        pytest.fail(text, pytrace=False)
    if returned := [rank for rank, reply in enumerate(replies) if pickle.loads(reply.value) is not None]:
        pytest.fail(f"{name_ranks(returned)} returned a value, where a test should assert", pytrace=False)
    return True


def _ranks(item: pytest.Item) -> Ranks | None:
    mark = item.get_closest_marker(MARK)
    return mark.args[0] if mark else None


def _world_size(item: pytest.Item) -> int | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("world_size") if callspec else None


def _pool(item: pytest.Item) -> Pool:
    """The pool of this run, which ends with it; it knows the largest world that was collected."""
    stash = item.config.stash
    if _POOL not in stash:
        from .pool import Pool

        largest = max(_world_size(other) or 0 for other in item.session.items if _ranks(other))
        stash[_POOL] = Pool(largest)
        item.config.add_cleanup(stash[_POOL].close)
    return stash[_POOL]


def _call(item: pytest.Function, ranks: Ranks) -> Call:
    from .call import build_call, find_target

    owner = f"{item.cls.__qualname__}." if item.cls else ""
    wanted = inspect.signature(item.function).parameters
    kwargs = {
        name: value
        for name, value in item.funcargs.items()
        if name in wanted and (name != "world_size" or ranks.wants_world_size)
    }
    try:
        target = find_target(item.module, f"{owner}{item.originalname}")
        return build_call(target, kwargs=kwargs, rank_supplies=ranks.rank_supplies, rewrite_asserts=True)
    except TypeError as error:
        problem = str(error)
    pytest.fail(problem, pytrace=False)  # outside the handler, or pytest would show the message twice
