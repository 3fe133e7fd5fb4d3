#!/usr/bin/env bash
# What can be known only on a GPU, in ten minutes on one: ten questions, each with its figures and what to conclude, and
# all of it in gpu_check.json. docs/benchmarks.md says how to read it.
# usage: launch/gpu_check.sh [--dry] [--out FILE]     (PYTHON=… chooses the interpreter, which needs a CUDA build of torch;
#                                                      --dry: tiny sizes, on a CPU where there is no GPU)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "gpu_check: $python has no torch: set PYTHON=… to an interpreter that has a CUDA build of it (for --dry: any)" >&2
    exit 2
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m shardgrad.bench.gpu_check "$@"
