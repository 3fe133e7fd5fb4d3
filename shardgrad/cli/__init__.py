"""The command line: `shardgrad COMMAND`. One command a file; this room imports all others.

| file             | concept                                                   |
| ---------------- | --------------------------------------------------------- |
| `entry`          | what the installed program starts                         |
| `app`            | the list of commands                                      |
| `style`          | one style for every command: tables, JSON, errors         |
| `options`        | arguments and options that several commands have          |
| `ranks`          | start the ranks of a command                              |
| `train`          | `train`: a training run on this machine                   |
| `explain`        | `explain`: what each phase of a layout computes and sends |
| `verify`         | `verify`: a step of a configuration against one device    |
| `mutants`        | `mutants`: planted bugs, and which are found              |
| `chaos`          | `chaos`: attacks, and what held                           |
| `trace`          | `trace`: one training step in time                        |
| `training_step`  | the step that `trace` looks at                            |
| `scale`          | `scale`: scaling experiments                              |
| `bench`          | `bench …`: the list of measurements                       |
| `bench_step`     | `bench step`                                              |
| `bench_overlap`  | `bench overlap`                                           |
| `bench_overhead` | `bench overhead`                                          |
| `bench_model`    | `bench model`                                             |
| `bench_exact`    | `bench exact`                                             |
| `bench_gpu`      | `bench gpu`                                               |
| `bench_head`     | `bench head`                                              |
| `bench_options`  | what the commands of `bench` read alike                   |
"""
