#!/usr/bin/env bash
# What can be known only on a GPU, in a few minutes on one: NCCL on one rank, several ranks on the one GPU over gloo,
# both against float64, and the benchmark of Llama 70B's products at their local sizes.
# usage: launch/gpu_check.sh          (PYTHON=… chooses the interpreter, which needs a CUDA build of torch, and
#                                      shardgrad's extra `test`)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" - <<'CHECK'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device: install a CUDA build on a machine that has one")
print(torch.cuda.get_device_name(), torch.__version__, "CUDA", torch.version.cuda)
CHECK
"$python" -m pytest -q -rs tests/gpu
"$python" -m shardgrad.cli bench gpu
