"""Layers: a layout, parameters stored as it says, and a name.

| file             | concept                                                                    |
| ---------------- | -------------------------------------------------------------------------- |
| `module`         | `ShardedModule`: a module that knows how its parameters are stored         |
| `layer`          | the base class: binds, runs, predicts; a layer states its layouts          |
| `template`       | layouts with symbols for what each model decides                           |
| `recipe`         | from a layer's templates to bound products: all that binding depends on    |
| `docstring`      | the table in a layer's docstring, read from its layouts                    |
| `existing`       | a layer whose parameters are parts of tensors that exist                   |
| `parallel`       | `Parallel`: where layers lie, made once by a model and passed on           |
| `transfer`       | a tensor brought from one storage to another, differentiably               |
| `sharding`       | how one parameter is stored: its part taken, read, put together again      |
| `features`       | which features a rank has, where several letters are one dim               |
| `shardings`      | how every parameter of a model is stored                                   |
| `dtensors`       | parameters that torch shards beside shardgrad (FSDP2)                      |
| `data_parallel`  | whether what DDP and FSDP2 take for replicas are replicas                  |
| `by_layout`      | a linear layer on any layout                                               |
| `linear`         | column and row parallel linear layers                                      |
| `conv`           | convolutions in five layouts                                               |
| `embedding`      | an embedding whose vocabulary is sharded                                   |
| `positions`      | learned positions, also where the sequence is sharded                      |
| `rotary`         | rotary positions of queries and keys                                       |
| `norm`           | norms whose rows, or whose features, may be sharded                        |
| `sharded_norm`   | norms of sharded features, as functions                                    |
| `group_norm`     | group norm of sharded channels, groups in parts as well                    |
| `attention`      | self-attention with sharded heads                                          |
| `heads`          | which key and value heads a rank's query heads attend                      |
| `mask`           | masks of attention, sharded as the heads are                               |
| `mlp`            | feed-forward blocks with sharded hidden features                           |
| `moe`            | a mixture of experts, sharded over an axis                                 |
| `parallel_block` | attention and feed-forward side by side, with one gather and one reduction |
| `loss`           | cross-entropy of logits whose vocabulary is sharded                        |
| `vocabulary`     | how logits over a sharded vocabulary are stored and read                   |
| `token_sums`     | numbers of each token's distribution, from one pass and two reductions     |
| `token_statistics` | the same, differentiable                                                 |
| `logits`         | logits over a sharded vocabulary as a distribution of tokens               |
| `largest`        | the k largest of them                                                      |
| `sampling`       | ids drawn from them, the same on every rank                                |
| `linear_loss`    | the product of a head and its loss in one, in chunks of tokens             |
| `linear_statistics` | the same as one differentiable operation                                |
| `linear_sums`    | the product to a sharded vocabulary in chunks, and its gradients           |
| `dropout`        | dropout whose mask does not depend on the mesh                             |
| `counter`        | random bits as a function of the global element                            |
| `philox`         | the same bits, compared with a threshold on any device                     |
| `init`           | initial values as a function of the global element                         |
| `replicated`     | parameters used for different rows: gathered, their gradients summed       |
| `partial_grads`  | gradients left partial, summed once                                        |
| `global_ops`     | the number of parameters and the norm of gradients over all shards         |
| `state`          | a model's state as one device would hold it                                |
| `pieces`         | functions of pieces, and parameters that pieces of the rows use            |
| `feature_pieces` | norms of sharded features in pieces, where exact mode is set               |
| `exact_loss`     | sums over pieces of the vocabulary, and of the tokens                      |
| `exact_norm`     | the norm of gradients over pieces                                          |
"""
