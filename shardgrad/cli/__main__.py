"""`python -m shardgrad.cli`, which is what the ranks of a command run."""

from shardgrad.cli.entry import main

main()
