"""Which machines the backend runs on."""

from __future__ import annotations

import os
import platform
import sys


def unsupported() -> str:
    """Why shared memory cannot be used here, or an empty text.

    The protocol publishes data with plain stores and relies on other cores seeing stores in program order. x86-64
    promises that; ARM, POWER and RISC-V do not, and Python has no cheap barrier for them.
    """
    if sys.platform != "linux":
        return f"it needs Linux (memfd, futex, /proc), and this is {sys.platform}"
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return f"it relies on x86-64's order of stores, and this processor is {machine or 'unknown'}"
    if not hasattr(os, "memfd_create"):
        return "this Python or kernel has no memfd_create"
    return ""
