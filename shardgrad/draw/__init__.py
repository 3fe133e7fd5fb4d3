"""Pictures of layouts and of training steps: the derivation gives what is drawn, matplotlib sets it on paper.

| file               | concept                                                 |
| ------------------ | ------------------------------------------------------- |
| `paper`            | a sheet measured in inches                              |
| `blocks`           | which rank holds which block of a tensor, as rectangles |
| `layout_picture`   | a layout, forward and backward side by side             |
| `timeline`         | one training step in time, read from torch.profiler     |
| `timeline_picture` | the same drawn                                          |
"""
