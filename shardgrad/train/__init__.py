"""The training program: from a configuration to a trained model, on every rank. `shardgrad train` runs it, and under
torchrun `launch/train.py` or `-m shardgrad.train`.

| file          | concept                                                               |
| ------------- | --------------------------------------------------------------------- |
| `launch`      | from a command line to a finished run                                 |
| `__main__`    | `python -m shardgrad.train`                                           |
| `config`      | the keys of a configuration                                           |
| `build`       | the mesh's shape, the model, and the same on one device               |
| `language_model` | what training asks of a model                                      |
| `decoder`     | what all decoders have in common                                      |
| `model`       | a GPT                                                                 |
| `llama`       | a Llama style decoder                                                 |
| `grid`        | a Llama style decoder in a 3D layout                                  |
| `reference`   | the same decoders on one device, in nothing but torch                 |
| `first_step`  | the first step against one device and against the prediction of bytes |
| `verify`      | one step of a configuration's run by `sg.verify`                      |
| `predict`     | every collective of a step, predicted                                 |
| `foreign`     | a model of transformers before it is built                            |
| `lora`        | adapters of peft around a model                                       |
| `causal_lm`   | a model of transformers on a mesh, and on one device                  |
| `model_folder` | the folder that transformers loads afterwards                        |
| `stages`      | the runs of one start                                                 |
| `step`        | one optimizer step                                                    |
| `optimizer`   | AdamW and the learning rate                                           |
| `loop`        | the training loop                                                     |
| `late`        | losses that are read a step late                                      |
| `data`        | batches as a function of seed and step                                |
| `corpus`      | the text: bytes, a file of tokens, or encoded once                    |
| `tokens`      | files of token ids, mapped into memory                                |
| `tokenizer`   | from text to token ids and back                                       |
| `memory`      | whether a run could fit into memory at all                            |
| `prepare`     | what the first rank decides before the ranks meet                     |
| `folder`      | the folder of a run                                                   |
| `history`     | how far a run is, and what it measured                                |
| `resume`      | going on where a run ended, with the same bits                        |
| `run_state`   | what a run adds to a checkpoint                                       |
| `signals`     | a clean end after SIGTERM or SIGINT                                   |
| `metrics`     | what a run measures, as lines of JSON                                 |
| `report`      | what the first rank prints                                            |
| `page`        | a run on one page of HTML                                             |
| `pictures`    | the page's pictures                                                   |
| `environment` | what a run ran on                                                     |
| `generate`    | a sample of text from the sharded model                               |
| `curve`       | whether a training curve differs from one device's by rounding alone  |
"""
