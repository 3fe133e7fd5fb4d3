"""Save and load a model and its optimizer, whatever the mesh: global tensors in safetensors files, no pickle.

A checkpoint is a folder:

    model.safetensors       every parameter, global, and every persistent buffer, by its name
    optimizer.safetensors   `name/key`: the optimizer's state of each parameter (AdamW: step, exp_avg, exp_avg_sq)
    state.json              the format, torch's version, the mesh and the optimizer that saved it, what the caller adds
    SHA256SUMS              the digest of each of these files, as `sha256sum -c` reads it

It is written under another name and renamed when all of it is on the disk, so a folder of its name is whole. What was
altered since is refused when it is read, by the file's name.

| file       | concept                                                              |
| ---------- | -------------------------------------------------------------------- |
| `contents` | what a checkpoint holds of a model and its optimizer                 |
| `saving`   | written by the first rank, when all ranks have the same to say       |
| `loading`  | read by every rank: all of it is compared before anything is changed |
| `seal`     | the digests: what was altered, cut short, exchanged or lost          |
"""

from shardgrad.checkpoint.loading import load as load
from shardgrad.checkpoint.saving import save as save
from shardgrad.checkpoint.seal import FILES as FILES
from shardgrad.checkpoint.seal import STATE as STATE
from shardgrad.checkpoint.seal import DamagedError as DamagedError
from shardgrad.checkpoint.seal import Verified as Verified
from shardgrad.checkpoint.seal import digest as digest
from shardgrad.checkpoint.seal import verify as verify
