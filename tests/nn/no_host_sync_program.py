"""The warm forward and backward of every call on a device that only seems to be there.

Prints a line for each: its name, and "goes on", or where the host would wait for the device.
usage: no_host_sync_program.py layers|models
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from every_call import CHOICES, MODELS, Call, calls
from imagined_device import NAME, WAITS, imagined_device, refuse_waits
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import shim
from shardgrad.nn import dropout, moe

shim.join_imagined(0, 2)
READ: list[None] = []  # an entry for each time that MoE read its counts


def balanced(counts: Tensor) -> list[list[int]]:
    READ.append(None)
    ranks, experts = counts.shape
    return [[CHOICES // experts] * experts] * ranks


# What these read are numbers of the host's generator, and MoE's one look at the device: here neither has values.
dropout.draw_seed = lambda generator=None: 5
moe.on_host = balanced

# What the watch must see, or it has seen nothing above.
PLANTED: dict[str, Call] = {
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * x[0, :1].tolist()[0],
    "a truth": lambda x: x if bool((x > 0).all()) else -x,
    "to the host": lambda x: x.sum().cpu(),
    "from the host": lambda x: x * torch.ones(6, device="cpu").to(NAME),
    "a list": lambda x: x * x.new_tensor([1.0, 2, 3, 4, 5, 6]),
    "a list of indices": lambda x: x[[0, 2]],
    "a mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.sum() * (x > 0).nonzero().shape[0],
    "repeats": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64), 0),
    "setting": lambda x: F.relu(x).index_put((torch.tensor([0], device="cpu"),), x[1]),
}


def run(call: Call) -> str:
    before = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    try:
        call(before[0])  # cold: ranks compare what they have not seen, and what is built is built
        READ.clear()
        with refuse_waits():
            y = call(before[1])
            forward = len(READ)
            y.sum().backward()
    except WAITS as error:
        return f"waits: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"waits {forward} times in forward, {len(READ) - forward} in backward" if READ else "goes on"


TP = DeviceMesh(NAME, [0, 1], mesh_dim_names=("tp",))
DP_TP = [DeviceMesh(NAME, ranks, mesh_dim_names=("dp", "tp")) for ranks in ([[0, 1]], [[0], [1]])]
for name, make in calls(TP, DP_TP).items():
    if name.startswith(MODELS) != (sys.argv[1] == "models"):
        continue
    with imagined_device():
        print(f"{name}: {run(make())}")
for name, call in PLANTED.items():
    with imagined_device():
        print(f"planted {name}: {run(call)}")
