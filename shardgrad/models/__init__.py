"""Models as others wrote them, on a mesh: Hugging Face's, and plain modules.

| file              | concept                                                                   |
| ----------------- | ------------------------------------------------------------------------- |
| `lazy_tensor`     | a tensor of which parts are read when asked for                           |
| `weights_file`    | safetensors files: opened for parts of tensors, written tensor by tensor  |
| `names`           | what a model's tensors are called and how they lie in its files           |
| `buffers`         | buffers that no file holds, made anew                                     |
| `pretrained_load` | a model filled from a folder; each rank reads its parts                   |
| `pretrained_save` | a folder that plain transformers loads, written one tensor at a time      |
"""
