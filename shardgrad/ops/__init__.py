"""The one differentiable bilinear operation on sharded tensors, and what it is checked against.

| file         | concept                                                                 |
| ------------ | ----------------------------------------------------------------------- |
| `bilinear`   | a bilinear map of two local tensors, with its two transposes            |
| `contract`   | the local product of two tensors given by letters                       |
| `sizing`     | from local shapes to sizes: check, infer, exchange                      |
| `size_exchange` | sizes that local shapes do not give, exchanged between ranks |
| `shard`      | a global tensor to this rank's shard, and back                          |
| `handles`    | names by which compiled graphs refer to bound products                  |
| `modes`      | what makes a backward unusual while it is in force                      |
| `namespace`  | what the names in a printed program stand for                           |
| `executable` | what calls of one set of shapes run, in one autograd Function           |
| `derivatives` | second derivatives of products, forward mode, torch.func |
| `bound`      | products that share an operand, bound to a mesh                         |
| `exact`      | exact mode: set on a mesh, and what it refuses                          |
| `exact_optimizers` | optimizers whose step depends on how parameters are sharded, refused |
| `in_pieces`  | products of single pieces, and sums of them in a tree                   |
| `origin`     | what was done to a tensor since the last layer, and whether it can be exact |
| `pieces`     | functions of single pieces, between products                            |
| `matmul`     | `matmul`, the one differentiable product                                |
| `convolve`   | `convolve`, a convolution under the same rule                           |
| `compiled`   | products as torch.compile sees them                                     |
| `chunking`   | the pass that puts chunked products in place of others                  |
| `chunks`     | a product and its communication in chunks, side by side                 |
| `fused`      | the same, handed to torch's products over symmetric memory              |
| `overlap`    | whether, how and into how many chunks, by what costs                    |
| `measured_costs` | what links and multipliers cost here, measured                       |
| `micro_batches` | gradient accumulation in exact mode                                  |
| `deferred`   | weight gradients computed later, at a call of the program's             |
| `streams`     | what a function reads, kept where it is called on another stream        |
| `main_grad`  | gradients of 16-bit parameters, summed in float32                       |
| `reference`  | the NumPy reference of a product's backward                             |
"""
