"""torchrun, as the driver starts it: it ends when the driver does, however the driver ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent dies; elsewhere, nothing."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != parent:  # it died before this was set
        os.kill(os.getpid(), how)


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent(signal.SIGTERM)  # which torchrun passes on to its ranks
    main(sys.argv[1:])
