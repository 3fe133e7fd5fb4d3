"""What the installed program `shardgrad` starts; says what to install if the command line's libraries are missing."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from shardgrad.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("shardgrad", "torch", "numpy"):
            raise
        sys.exit(f"{error}: install what the command line needs with  pip install 'shardgrad[cli]'")
    app(prog_name="shardgrad")
