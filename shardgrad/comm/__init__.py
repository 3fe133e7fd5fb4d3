"""The only room that calls torch.distributed: collectives, their adjoints, what was sent, what ranks agree on.

| file             | concept                                                                   |
| ---------------- | ------------------------------------------------------------------------- |
| `shim`           | the one place that knows torch's private or renamed names                 |
| `shim_fused`     | of it: products over symmetric memory                                     |
| `shim_late`      | of it: what the late backend needs                                        |
| `processes`      | the other ranks as processes of this host: at work, stopped, or gone      |
| `ask`            | questions to the store, with a limit                                      |
| `standing`       | how far this rank has come in a group, and who else is in it              |
| `mesh`           | what shardgrad needs of a DeviceMesh, looked up once                      |
| `balanced`       | axes whose shards differ by one element at most                           |
| `comparison`     | what ranks say, compared through the store                                |
| `collectives`    | the collectives over one mesh axis, with uneven shards                    |
| `fused`          | products that communicate as they multiply, over symmetric memory         |
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
| `watch`          | ends a rank when another will never go on                                 |
| `failure_report` | a collective that failed, or never will end: who is there, and doing what |
| `process_end`    | how a process ends that has used gloo                                     |
| `shm`            | a backend for the ranks of one host, over shared memory                   |
"""
