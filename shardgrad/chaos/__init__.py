"""What breaks in practice, done on purpose, with a seed: each attack is refused by name, or changes nothing.

| file             | concept                                                    |
| ---------------- | ---------------------------------------------------------- |
| `tally`          | what held and what did not                                 |
| `checkpoints`    | a run's checkpoints, flipped, cut, exchanged, lost, edited |
| `configurations` | hostile configurations of training and experiments         |
| `layouts`        | layouts of wrong text                                      |
| `calls`          | public names called with arguments of wrong kinds          |
| `deaths`         | ranks killed and stopped at random moments                 |
| `program`        | what such a rank runs                                      |
"""
