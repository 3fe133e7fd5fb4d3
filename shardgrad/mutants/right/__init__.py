"""Right programs, written as users write them, none of which verification may accuse.

| file         | concept                                                          |
| ------------ | ---------------------------------------------------------------- |
| `kind`       | one right program, and what such programs are built of           |
| `mlps`       | two products with something between them                         |
| `norms`      | norms by hand, over sharded rows and features                    |
| `attention`  | heads that are sharded, shared, turned, fused                    |
| `heads`      | embeddings and losses over a sharded vocabulary                  |
| `data`       | sharded batches, micro-batches, checkpointing, other batches     |
| `operations` | convolutions, recurrence, sorting, routing, pooling              |
| `layers`     | layers of shardgrad, DTensor and transformers                    |
| `table`      | all of them, and what verification says of each                  |
"""
