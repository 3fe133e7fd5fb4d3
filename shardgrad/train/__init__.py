"""Training a GPT from a configuration: what `launch/train.py` runs."""

from shardgrad.train.launch import main as main
