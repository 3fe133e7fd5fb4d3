"""The only room that calls torch.distributed: collectives, their adjoints, what was sent, what ranks agree on.

| file             | concept                                                                   |
| ---------------- | ------------------------------------------------------------------------- |
| `shim`           | the one place that knows torch's private or renamed names                 |
| `mesh`           | what shardgrad needs of a DeviceMesh, looked up once                      |
| `collectives`    | the collectives over one mesh axis, with uneven shards                    |
| `tree`           | reductions that add in one tree, whatever the backend                     |
| `pieces`         | into how many pieces each axis cuts, in exact mode                        |
| `all_to_all`     | the all-to-all that moves shards from one dim to another                  |
| `timer`          | the time that a process spends in communication                           |
| `adjoint`        | differentiable collectives, each with its adjoint                         |
| `first_derivatives` | what has a backward only: all other derivatives are refused, with its name |
| `agree`          | whether the ranks of an axis mean the same                                |
| `trace`          | every collective in a block, as torch.distributed was called for it       |
| `backend`        | which backend a program's ranks use                                       |
| `rendezvous`     | start the process group of a job, also one that was started before        |
| `failure_report` | after a collective failed: which ranks are there, and what each was doing |
| `shm`            | a backend for the ranks of one host, over shared memory                   |
"""
