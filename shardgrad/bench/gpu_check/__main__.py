"""`python -m shardgrad.bench.gpu_check [--dry] [--out FILE]`: what `launch/gpu_check.sh` runs."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from shardgrad.bench.gpu_check.finding import Setting
from shardgrad.bench.gpu_check.run import find, run
from shardgrad.bench.gpu_check.steps import STEPS


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/gpu_check.sh", description=sys.modules["__main__"].__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the JSON goes")
    parser.add_argument("--step", choices=[step.name for step in STEPS], help="this one alone, in this process")
    parser.add_argument("--limit", type=float, default=600, help="seconds for all of it")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.dry:
        parser.error(
            f"torch {torch.__version__} sees no CUDA device: install a CUDA build on a machine that has one "
            "(--dry is for others)"
        )
    setting = Setting(torch.device("cuda" if has_gpu else "cpu"), options.dry)
    if options.step is None:
        return min(run(STEPS, setting, ["--dry"] * options.dry, options.out, options.limit), 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    (step,) = (one for one in STEPS if one.name == options.step)
    options.out.write_text(json.dumps(find(step, setting)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
