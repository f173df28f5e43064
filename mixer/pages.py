"""Memory pages."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_LEAST = 2**26  # bytes from which it pays


def on_large_pages(fresh: Tensor) -> Tensor:
    """Ask Linux for large pages under a tensor that nothing was written to yet, and return it.

    Rows drawn from all over many gigabytes miss the tables of 4 KiB pages more often than they miss the cache. Where
    the kernel does not grant it, nothing changes.
    """
    size = fresh.numel() * fresh.element_size()
    if fresh.device.type == "cpu" and sys.platform == "linux" and size >= _LEAST:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (fresh.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return fresh
