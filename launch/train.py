"""Train a GPT, a Llama or a model of transformers, tensor, sequence and data parallel over the ranks of torchrun.

torchrun --standalone --nproc-per-node 2 launch/train.py configs/quickstart.yaml [section.key=value ...]
"""

import sys

try:
    from shardgrad.train.launch import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install what training needs with  pip install -e '.[train]'")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
