"""Whether a sharded model is right: compared with the same model on one device, tensor by tensor.

The room is not called `verify` because `sg.verify` is the function: importing a module `shardgrad.verify` would put the
module in the function's place.

| file             | concept                                                                          |
| ---------------- | -------------------------------------------------------------------------------- |
| `verify`         | `sg.verify`: two steps of a sharded model against one device                     |
| `gradients`      | `verify_gradients`: loss and gradients of a step that a program has just done    |
| `steps`          | the two steps of a verification, and the verdicts of both                        |
| `decide`         | what two steps say of a tensor together                                          |
| `by_design`      | terms of a sum, and what is stored otherwise: no mistakes                        |
| `attempt`        | one step of both models with the same values                                     |
| `clipping`       | what clips a model's gradients by their norm                                     |
| `record`         | what a step computes, in the order of execution                                  |
| `pairing`        | which parameter of the sharded model is which of the single one                  |
| `place`          | which recorded tensor is which, and how it lies on the mesh                      |
| `splits`         | how tensors lie on the mesh: given, known to layers, or found from shapes        |
| `context`        | what explanations may use of a step                                              |
| `uses`           | the terms of a parameter's gradient, one for each use                            |
| `rounding`       | the yardstick: what rounding alone does to a tensor, and the bounds that follow  |
| `same_bits`      | `verify_exact`: in exact mode, a step on all ranks against one rank, bit for bit |
| `exact_report`   | its result: which bits differ, on which ranks                                    |
| `bits`           | whether two tensors are the same bits, and how far apart                         |
| `exact`          | a step in float64 throughout                                                     |
| `compare`        | one tensor on one rank, in units of rounding; the worst over all ranks           |
| `exchange`       | tensors and numbers of every rank                                                |
| `observed`       | a wrong tensor as every rank has it                                              |
| `report`         | the result: a row for each tensor, and how it is printed                         |
| `picture`        | the result drawn                                                                 |
| `stated`         | verdicts that are their own explanation                                          |
| `diagnose`       | which explanation reproduces a wrong tensor                                      |
| `hypothesis`     | what explanations are made from                                                  |
| `explanations`   | the table of explanations                                                        |
| `terms`          | explanations of what ranks add up, or do not                                     |
| `precision`      | explanations by fewer digits, of a tensor or of its terms                        |
| `reruns`         | further steps of one device, each with a change, so many at most                 |
| `functions`      | the functions that a step calls, and others in their place                       |
| `counterfactual` | explanations by one device with another parameter                                |
| `otherwise`      | explanations by one device with another function, constant or position           |
| `variants`       | the table of other functions                                                     |
| `over_steps`     | explanations by what is kept from one step to the next                           |
| `rows`           | explanations by rows that do not count, or count otherwise                       |
| `rearranged`     | explanations in which right numbers are in wrong places                          |
| `product`        | `check_product`: one product, every element within its bound                     |
| `bounds`         | every element of a product against float64                                       |
| `reach`          | what a sharded sum may come out as                                               |
| `intervals`      | the least and the greatest value of a number after its roundings                 |
| `arithmetic`     | how much a sum on one device may be rounded, and what is summed where            |
| `oracle`         | the right result of a product, and its magnitude                                 |
| `finite`         | `check_finite`: no NaN and no inf                                                |
| `replicas`       | `check_replicas`: whether copies are still copies                                |
| `fingerprint`    | 64 bits that distinguish a tensor's bits                                         |
| `together`       | a problem of one rank is raised on all                                           |
| `spmd_types`     | a second opinion by Meta's spmd_types                                            |
"""
