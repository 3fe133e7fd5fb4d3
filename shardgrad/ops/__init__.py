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
| `bound`      | products that share an operand, bound to a mesh                         |
| `matmul`     | `matmul`, the one differentiable product                                |
| `convolve`   | `convolve`, a convolution under the same rule                           |
| `compiled`   | products as torch.compile sees them                                     |
| `chunking`   | the pass that puts chunked products in place of others                  |
| `chunks`     | a product and its communication in chunks, side by side                 |
| `overlap`    | in how many chunks, from what links and multipliers were measured to do |
| `deferred`   | weight gradients computed later, at a call of the program's             |
| `main_grad`  | gradients of 16-bit parameters, summed in float32                       |
| `reference`  | the NumPy reference of a product's backward                             |
| `exact`      | `set_exact`: products whose bits do not depend on the ranks             |
| `in_pieces`  | products of single pieces, and their sums                               |
| `pieces`     | what lies between products, piece by piece                              |
| `micro_batches` | micro-batches as pieces of the batch                                    |
"""
