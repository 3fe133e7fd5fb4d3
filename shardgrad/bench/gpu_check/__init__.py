"""What can be known only on a GPU, settled in ten minutes on one. `launch/gpu_check.sh` runs it.

docs/benchmarks.md says how to read it.

| file          | concept                                                                                  |
| ------------- | ---------------------------------------------------------------------------------------- |
| `finding`     | what a step is given, and what it finds                                                  |
| `steps`       | the steps, in order: the question and the limit of each                                  |
| `run`         | each step in a process of its own, printed, and all of them as JSON                      |
| `cases`       | a call of every layer, as one rank of eight                                              |
| `correctness` | NCCL on one rank and gloo on several, against one device                                 |
| `facts`       | what the backend does with tensors that are not contiguous, and with `asyncOp`           |
| `syncs`       | whether a warm step waits for the device                                                 |
| `capture`     | CUDA graphs of every layer, and of NCCL's collectives                                    |
| `wide_sums`   | products that leave the multiplier in float32, and gradients summed in it                |
| `speed`       | host time of layers; Llama's products; measured costs beside a large product             |
| `__main__`    | the command                                                                              |
| `timeline`    | a collective's stream beside a product, with priority and without                        |
"""
