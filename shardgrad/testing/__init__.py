"""Tests on several ranks: ``@distributed`` for pytest, ``run_distributed`` for everything else.

::

    @distributed(world_size=[1, 2, 3])
    @pytest.mark.parametrize("n", [5, 8])
    def test_all_reduce(world_size, n):  # on every rank, torch.distributed already initialised
        x = torch.ones(n)
        torch.distributed.all_reduce(x)
        assert x.tolist() == [world_size] * n

The processes are started at the first such test and serve the whole run of pytest.

| file         | concept                                      |
| ------------ | -------------------------------------------- |
| `decorator`  | `@distributed`                               |
| `plugin`     | the pytest side of it                        |
| `run`        | `run_distributed`: the pool without pytest   |
| `pool`       | the ranks of one pytest run                  |
| `process`    | one rank's process, seen from the caller     |
| `worker`     | the process of one rank                      |
| `membership` | the process group that a rank is in          |
| `call`       | a function and its arguments as a message    |
| `messages`   | what the caller and a rank say to each other |
| `loading`    | from the name of a function to the function  |
| `failure`    | an exception as text                         |
| `stack`      | where a test stands, from faulthandler       |
| `excerpt`    | the ends of a long text, and where it is     |
| `report`     | from the replies of all ranks to one verdict |
| `late`       | a backend for CPUs that is as late as NCCL   |
"""

from .decorator import distributed as distributed
from .run import RankError as RankError
from .run import run_distributed as run_distributed

__all__ = ["RankError", "distributed", "run_distributed"]
