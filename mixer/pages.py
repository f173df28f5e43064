"""Memory pages."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_LEAST = 2**26  # bytes from which it pays
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let this process keep the memory that large tensors give back, for the next ones.

    glibc returns it to Linux, and every step gets its activations anew, page by page, each filled with zeros first: a
    fifth of the time of training an image encoder on a CPU. What the process held at most it goes on to hold.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


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
