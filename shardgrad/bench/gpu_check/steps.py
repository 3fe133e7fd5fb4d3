"""The steps, in order. What others build on comes first."""

from __future__ import annotations

from shardgrad.bench.gpu_check import capture, correctness, facts, speed, syncs, timeline, wide_sums
from shardgrad.bench.gpu_check.finding import Step

STEPS = [
    Step("correctness", "Do NCCL on one rank and gloo on several give one device's gradients?", correctness.find, 150),
    Step("facts", "What does the backend do with tensors that are not contiguous, and with asyncOp?", facts.find),
    Step("syncs", "Does a warm step of any layer wait for the device?", syncs.find),
    Step("capture", "Can a CUDA graph hold every layer, in chunks too, and NCCL's collectives?", capture.find, 90),
    Step("addmm", "Does addmm add a product of bfloat16 to float32 without rounding it?", wide_sums.addmm, 30),
    Step("host time", "What does a layer cost the host beside nn.Linear?", speed.host_time),
    Step("llama", "What share of nn.Linear and of the chip do Llama 70B's local products reach?", speed.llama, 90),
    Step("main_grad", "Are weights' gradients summed in float32, and what does it cost?", wide_sums.main_grad),
    Step("costs", "Do the costs that overlap decides by show the chip's rate?", speed.costs),
    Step("timeline", "Does a collective run under dW's product, with priority and without?", timeline.find),
]
