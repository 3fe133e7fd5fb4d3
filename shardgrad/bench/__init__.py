"""Measurements that are the project's commands: time, bytes and memory.

| file          | concept                                                   |
| ------------- | --------------------------------------------------------- |
| `timing`      | contenders timed in turns, in the same processes          |
| `peers`       | Linear–GELU–Linear as each library has its users write it |
| `step`        | one tensor parallel step beside other libraries'          |
| `overhead`    | what the host does for a step besides its products        |
| `overlap`     | how much communication hides behind products              |
| `collectives` | how long a collective takes on gloo and on shared memory  |
| `model`       | a GPT's block and training step on one rank and on all    |
| `exact`       | what exact mode costs, beside the same without it         |
| `gpu`         | one GPU's share of a large model                          |
| `gpu_check`   | what only a GPU can tell, in ten minutes on one           |
| `head`        | a head's product and its loss in one, in chunks           |
| `bytes`       | what layouts send, over the least possible                |
| `memory`      | what layers keep for backward                             |
"""
