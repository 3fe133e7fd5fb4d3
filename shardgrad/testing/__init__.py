"""Tests on several ranks: ``@distributed`` for pytest, ``run_distributed`` for everything else.

::

    @distributed(world_size=[1, 2, 3])
    @pytest.mark.parametrize("n", [5, 8])
    def test_all_reduce(world_size, n):  # on every rank, torch.distributed already initialised
        x = torch.ones(n)
        torch.distributed.all_reduce(x)
        assert x.tolist() == [world_size] * n

The processes are started at the first such test and serve the whole run of pytest.
"""

from .decorator import distributed as distributed
from .run import RankError as RankError
from .run import run_distributed as run_distributed

__all__ = ["RankError", "distributed", "run_distributed"]
