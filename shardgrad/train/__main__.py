"""`torchrun … -m shardgrad.train CONFIG`: what `launch/train.py` runs, without a checkout."""

import sys

from shardgrad.train.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
