"""`python -m shardgrad`: the command line, which is what the ranks of a command run."""

from shardgrad.cli.entry import main

main()
