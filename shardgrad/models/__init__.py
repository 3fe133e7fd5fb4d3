"""Models that somebody else wrote: sharded in place, by a plan that says how features are stored.

| file              | concept                                                                  |
| ----------------- | ------------------------------------------------------------------------ |
| `features`        | how features are stored: a layout without its rows                       |
| `plan`            | a plan laid on a model: what each entry means                            |
| `architectures`   | the plans of architectures that transformers has                         |
| `styles`          | transformers' names of styles, where they mean one thing                 |
| `draft`           | a draft of a plan for a model of which none is known                     |
| `linear`          | a linear layer whose features are stored as a text says                  |
| `embedding`       | an embedding whose vocabulary or features are sharded                    |
| `experts`         | experts of a mixture, each sharded                                       |
| `norm`            | a norm over features that are sharded                                    |
| `adapters`        | LoRA, sharded as the layers are that it stands beside                    |
| `adapter_files`   | LoRA's adapters and peft's files                                         |
| `entrance`        | an input that several layers share: its gradient is summed once          |
| `build`           | the sharded modules, made before anything is changed                     |
| `ties`            | parameters that have several names                                       |
| `sequence`        | activations sharded along the sequence between the layers                |
| `summed`          | parameters whose gradients are sums over ranks                           |
| `flow`            | a first call, watched: what is sharded, and which parameters that meets  |
| `head`            | the output layer: its loss, and whole logits without labels              |
| `root`            | what a parallelized model does around each call                          |
| `parallelize`     | all of it, in place                                                      |
| `lazy_tensor`     | a tensor of which parts are read when asked for                          |
| `weights_file`    | safetensors files: opened for parts of tensors, written tensor by tensor |
| `names`           | what a model's tensors are called and how they lie in its files          |
| `buffers`         | buffers that no file holds, made anew                                    |
| `pretrained_load` | a model filled from a folder; each rank reads its parts                  |
| `pretrained_save` | a folder that plain transformers loads, written one tensor at a time     |
"""
