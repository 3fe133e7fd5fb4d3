"""What the installed program `shardgrad` starts; says what to install if the command line's libraries are missing."""

import sys

from shardgrad.errors import install


def main() -> None:
    """Run the command line."""
    try:
        from shardgrad.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("shardgrad", "torch", "numpy"):
            raise
        sys.exit(f"{error}; what the command line needs is installed {install('cli')}")
    app(prog_name="shardgrad")
