"""The memory of a group: an anonymous file (memfd) that all its ranks map, and what lies where in it.

It has no name in /dev/shm, so nothing can be left there, whichever rank dies when: the kernel frees it with the last
process that maps it. Other ranks open it through /proc/<pid>/fd/<n>, which the kernel grants to the same user alone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource

import torch
from torch import Tensor

from shardgrad.comm.shm.errors import ShmError

SLOT = 1024 * 1024  # bytes that a rank publishes in one round; two such slots a rank
RING = 4  # records in the ring of a pair of ranks
RECORD = 32 * 1024  # bytes of data in a record
HEADER = 512  # bytes of text that say what operation this is
TEXT = 1024  # bytes of text that say why a rank failed

# Words of 8 bytes in a rank's own block; what others poll has a cache line of its own.
POSTED, BELL, SLEEPING, LEFT, ATTACHED, FAILED, BROKEN = 0, 8, 9, 10, 11, 12, 13
_BLOCK = 16


class Plan:
    """Offsets, in bytes except for words, in the segment of so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.texts = 8 * _BLOCK * ranks
        self.headers = self.texts + TEXT * ranks
        self.splits = self.headers + 2 * ranks * HEADER
        self.pairs = -(-(self.splits + 2 * ranks * 8 * ranks) // 64) * 64
        self.slots = -(-(self.pairs + 128 * ranks * ranks) // 4096) * 4096
        self.rings = self.slots + 2 * ranks * SLOT
        # A rank without peers needs one ring's place at most; rings to oneself are part of the square.
        self.size = self.rings + ranks * ranks * RING * self.record

    record = RECORD + 64  # its data after its own small header

    def word(self, rank: int, which: int) -> int:
        return rank * _BLOCK + which

    def header(self, parity: int, rank: int) -> int:
        return self.headers + (parity * self.ranks + rank) * HEADER

    def split(self, parity: int, rank: int) -> int:
        """The first word of what a rank sends to each rank in an all-to-all."""
        return self.splits // 8 + (parity * self.ranks + rank) * self.ranks

    def slot(self, parity: int, rank: int) -> int:
        return self.slots + (parity * self.ranks + rank) * SLOT

    def head(self, source: int, target: int) -> int:
        """The word that counts a ring's written records; the word for those read stands a cache line after it."""
        return self.pairs // 8 + (source * self.ranks + target) * 16

    def ring(self, source: int, target: int, record: int) -> int:
        return self.rings + ((source * self.ranks + target) * RING + record % RING) * self.record


class Segment:
    """The mapping in this process.

    words: 64-bit words. Python reads and writes one by a memcpy of constant size 8, which is a single aligned move.
    raw, bytes: the same memory as a memoryview and as a uint8 tensor.
    """

    def __init__(self, descriptor: int, plan: Plan) -> None:
        self.plan = plan
        mapping = mmap.mmap(descriptor, plan.size)
        self.raw = memoryview(mapping)
        self.words = self.raw.cast("q")
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._anchor = ctypes.c_char.from_buffer(mapping)
        self.address = ctypes.addressof(self._anchor)


def create(plan: Plan) -> int:
    """A file of the plan's size, its memory reserved. Returns the descriptor.

    Raises:
        ShmError: there is not enough memory, better now than as SIGBUS at a later store; or no descriptor is left.
    """
    descriptor = -1
    try:
        descriptor = os.memfd_create("shardgrad-shm", os.MFD_CLOEXEC)
        os.fchmod(descriptor, 0o600)
        os.posix_fallocate(descriptor, 0, plan.size)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ShmError(f"no shm group of {plan.ranks} ranks: {no_descriptors()}") from None
        raise ShmError(
            f"no memory for a shm group of {plan.ranks} ranks: {plan.size / 2**20:.1f} MiB of shared memory were "
            f"refused ({error.strerror}). Free memory, raise the limit of the container, or use the gloo backend"
        ) from None
    return descriptor


def no_descriptors() -> str:
    """What to say where the kernel opens no more files for this process."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"this process may have {most} files open, and has them (a group needs one): raise ulimit -n"
