"""What breaks in practice, done on purpose: each attack must be refused by name, or change nothing.

| file          | concept                                                    |
| ------------- | ---------------------------------------------------------- |
| `checkpoints` | a run's checkpoints, flipped, cut, exchanged, lost, edited |
"""
