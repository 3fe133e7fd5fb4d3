"""A torch.distributed backend for CPU ranks of one host, over shared memory: `init_process_group("shm")`.

From the bottom up:

| file          | concept                                                                                     |
| ------------- | ------------------------------------------------------------------------------------------- |
| `platform`    | which machines it runs on, and why not on others                                            |
| `errors`      | what goes wrong here                                                                        |
| `futex`       | sleep until a word of memory changes; the fence                                             |
| `segment`     | the memory: an anonymous file that all ranks map, and what lies where in it                 |
| `rendezvous`  | how the ranks of a group find it, through the store                                         |
| `peers`       | is a rank at work, stopped or dead, has it left, has it failed                              |
| `mailbox`     | rounds: write your slot, publish, wait for everyone's, read                                 |
| `reduce`      | adding up what the ranks sent, always in the order of the ranks                             |
| `tensors`     | torch's tensors as what is moved, and how messages speak of them                            |
| `collectives` | each collective as rounds                                                                   |
| `pairs`       | send and receive: a ring for each ordered pair of ranks                                     |
| `queue`       | the operations of a group on their way; waiting                                             |
| `fork`        | forked children are refused                                                                 |
| `progress`    | a thread that moves asynchronous operations on while the program computes                   |
| `work`        | what torch gets for an operation                                                            |
| `arguments`   | what a collective is given: checked, and parted for the ranks                               |
| `all_reducer` | all-reduces by one operation, prepared once a shape                                         |
| `group`       | torch's names for all of it                                                                 |
| `register`    | makes the name "shm" known to torch                                                         |
"""
