"""The one differentiable bilinear operation on sharded tensors, and what it is checked against.

| file         | concept                                                                 |
| ------------ | ----------------------------------------------------------------------- |
| `bilinear`   | a bilinear map of two local tensors, with its two transposes            |
| `contract`   | the local product of two tensors given by letters                       |
| `terms`      | the local mathematics of one layout, and how a bias lies in the product |
| `sizing`     | from local shapes to sizes: check, infer, exchange                      |
| `shard`      | a global tensor to this rank's shard, and back                          |
| `route`      | a plan's moves on a real tensor                                         |
| `stages`     | what a program is made of: slots, messages, products                    |
| `executable` | a plan made concrete for one set of shapes                              |
| `source`     | an executable written out as straight-line Python                       |
| `bound`      | products that share an operand, bound to a mesh                         |
| `matmul`     | `matmul`, the one differentiable product                                |
| `convolve`   | `convolve`, a convolution under the same rule                           |
| `compiled`   | products as torch.compile sees them                                     |
| `chunks`     | a product and its communication in chunks, side by side                 |
| `overlap`    | in how many chunks, from what links and multipliers were measured to do |
| `deferred`   | weight gradients computed when they are asked for                       |
| `main_grad`  | gradients of 16-bit parameters, summed in float32                       |
| `reference`  | the NumPy reference of a product's backward                             |
"""
