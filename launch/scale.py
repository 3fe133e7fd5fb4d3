"""Run a scaling experiment; the same as `shardgrad scale`.

python launch/scale.py configs/scaling/strong.yaml [section.key=value ...]
"""

import sys

try:
    from shardgrad.cli.app import app
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install what the command line needs with  pip install -e '.[cli]'")

if __name__ == "__main__":
    app(["scale", *sys.argv[1:]], prog_name="launch/scale.py")
