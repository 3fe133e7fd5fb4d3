"""Scaling experiments: a matrix of cells, each run on ranks of its own, and their results side by side.

| file       | concept                                                             |
| ---------- | ------------------------------------------------------------------- |
| `config`   | an experiment: how to run it, and the matrix that makes its cells   |
| `cell`     | one cell: what is run, on which ranks                               |
| `resolve`  | a cell with mesh, sizes, layout and backend written out, or refused |
| `work`     | what the ranks of a cell run                                        |
| `block`    | a transformer's block                                               |
| `training` | a step of the training program                                      |
| `driver`   | the cells of an experiment, one after another                       |
| `group`    | torchrun, as the driver starts it                                   |
| `worker`   | one rank of a cell                                                  |
| `measure`  | what a rank measures                                                |
| `machine`  | where and with what a result was measured                           |
| `results`  | results on disk                                                     |
| `table`    | rows for the table and the pictures                                 |
| `idle`     | ranks of a cell that have no part of it                             |
| `pictures` | an experiment drawn                                                 |
| `compare`  | two results of the same cells                                       |
| `dry`      | one rank of a cell in shapes alone, without its machines            |
"""
