"""Bugs planted into working programs, to show that verification finds them and says what they are."""
