"""Bugs planted into working programs, to show that verification finds them and says what they are.

| file               | concept                                                                            |
| ------------------ | ---------------------------------------------------------------------------------- |
| `mutant`           | one planted bug, one working program                                               |
| `by_hand`          | a transformer block sharded by hand, as Megatron-LM does it                        |
| `hand_planted`     | bugs in that block                                                                 |
| `decoder`          | a decoder of today, sharded by hand                                                |
| `decoder_planted`  | bugs in it                                                                         |
| `micro_batches`    | data parallelism with micro-batches, and bugs in it                                |
| `layers_planted`   | bugs in layers of shardgrad, DTensor, Megatron-core and fairscale                  |
| `released_planted` | bugs of released libraries                                                         |
| `run`              | programs with and without a bug, through verification and through the usual checks |
| `right`            | right programs, which verification must not accuse                                 |
"""
