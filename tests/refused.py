"""What is said of a configuration that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shardgrad.settings import ConfigError


def refusal(load: Callable[[Path, Sequence[str]], object], file: Path, *overrides: str) -> list[str]:
    """The lines that tell what is wrong."""
    with pytest.raises(ConfigError) as error:
        load(file, overrides)
    return str(error.value).splitlines()
