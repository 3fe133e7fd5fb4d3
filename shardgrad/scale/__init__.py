"""Scaling experiments: a matrix of cells, each run on ranks of its own, and what they show side by side."""
