"""Right programs."""
from shardgrad.mutants.right.kind import Kind
KINDS: list[Kind] = []
