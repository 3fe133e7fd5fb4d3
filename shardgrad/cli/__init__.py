"""The command line: `shardgrad COMMAND`. One command a file; this room imports all others and nobody imports it."""
