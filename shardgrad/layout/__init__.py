"""Layouts: notation, the rule, the derived plan, its cost and its explanation. No tensors.

| file          | concept                                                                         |
| ------------- | ------------------------------------------------------------------------------- |
| `notation`    | text to tensors of letters and axes, and back                                   |
| `rule`        | what an axis splits, what is communicated, and what makes a layout illegal      |
| `nearest`     | the nearest legal layouts to an illegal one                                     |
| `sizes`       | how axes shard letters, nested, and what one rank knows from its shards         |
| `idle`        | ranks that have no part of a letter                                             |
| `plan`        | the routes by which each tensor comes to where it is used, and back             |
| `schedule`    | the instructions that a layout becomes                                          |
| `tree`        | the one tree in which the pieces of a sum are added                             |
| `exact`       | exact mode, as a pass over the instructions                                     |
| `lower`       | from routes to instructions, forward and backward                               |
| `passes`      | communication behind products, and what is done with let go of                  |
| `contraction` | one contraction as one product of matrices                                      |
| `printer`     | instructions as lines of Python                                                 |
| `predict`     | what one layout becomes, on a mesh that need not exist                          |
| `program`     | the text of forward and backward                                                |
| `cost`        | every collective of every phase, with its bytes                                 |
| `layout`      | `Layout`, the face of the room                                                  |
| `presets`     | the published schemes by name                                                   |
| `batch_axis`  | data parallelism written into layouts                                           |
| `steps`       | forward and backward step by step, for every rank of a mesh                     |
| `explain`     | a layout in words and formulas                                                  |
| `lower_bound` | the least that a product can send                                               |
| `units`       | amounts as people read them                                                     |
"""
