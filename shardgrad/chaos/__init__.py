"""Seeded hostile input: what must end in a result, or in one clear error, and never in silence or a traceback.

| file             | concept                                             |
| ---------------- | --------------------------------------------------- |
| `configurations` | hostile configurations of training and experiments  |
| `calls`          | public names called with arguments of wrong kinds   |
"""
