"""A backend for CPUs that is as late as NCCL: races and orders that could deadlock, found without a GPU.

`import shardgrad.testing.late`, then `init_process_group("late")`, and a block of `late_watch()`; in tests
`@distributed(..., backend="late")` ([docs/late.md]).

| file       | concept                                                                    |
| ---------- | -------------------------------------------------------------------------- |
| `watch`    | `late_watch`: who reads and writes what is under way                       |
| `register` | the name "late" for torch.distributed                                      |
| `group`    | the process group                                                          |
| `nccl`     | what NCCL refuses                                                          |
| `parts`    | from a call's arguments to bytes for each rank                             |
| `transfer` | bytes exchanged, tensors reduced: what gloo does of it                     |
| `lane`     | the thread that does a group's collectives in order, once all call alike   |
| `messages` | `send` and `recv`                                                          |
| `pending`  | a collective between its call and `wait()`                                 |
| `work`     | what torch gets for it                                                     |
| `findings` | faults, their report, and all that is under way in the process             |
| `order`    | whether the orders of the ranks could deadlock                             |
| `together` | the ranks' orders exchanged                                                |
| `place`    | a line of the program                                                      |
| `stuck`    | ranks that wait for each other, or for one that has ended                  |
| `memory`   | the bytes of tensors, past torch                                           |
"""

from .findings import Finding as Finding
from .findings import RaceError as RaceError
from .findings import Report as Report
from .lane import MismatchError as MismatchError
from .register import register as register
from .stuck import DeadlockError as DeadlockError
from .watch import late_watch as late_watch

__all__ = ["DeadlockError", "Finding", "MismatchError", "RaceError", "Report", "late_watch", "register"]

register()
