"""Helpers of the tests (`layouts`, `exact`, `plain`) can be imported by name from every folder below."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "nn")]
