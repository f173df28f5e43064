"""FAISS that multiplies matrices as fast as the CPU can: `from mixer.fast_faiss import faiss`, whoever needs it first.

The OpenBLAS in the wheels of FAISS, 0.3.15, takes a CPU that it does not know, as Intel's since Sapphire Rapids, for
one of 2004. And FAISS 1.15 leaves the products of fewer than 500 queries of 256 dimensions to loops of its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy  # noqa: F401 - before FAISS would: numpy's OpenBLAS knows the CPU

_CORE = "OPENBLAS_CORETYPE"  # read when the library is loaded, by whichever OpenBLAS
_BY_BLAS = 16 * 256  # queries times dimensions, from which on matrices are multiplied


def openblas_core(flags: Collection[str]) -> str | None:
    """Return the kernels that OpenBLAS is to take on an x86 CPU with these flags; None leaves it to OpenBLAS."""
    if {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"} <= set(flags):
        return "SKYLAKEX"
    return "HASWELL" if {"avx2", "fma"} <= set(flags) else None


def cpu_flags() -> set[str]:
    """Return the flags of this machine's x86 CPU; none where Linux does not say so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


if _CORE not in os.environ and (core := openblas_core(cpu_flags())):
    os.environ[_CORE] = core
    try:
        import faiss
    finally:
        del os.environ[_CORE]
else:
    import faiss

faiss.cvar.distance_compute_blas_threshold = _BY_BLAS
# Blocks of as many products as by default, but of few queries: two threads then share one better.
faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = 1024, 4096


def use_threads(count: int) -> None:
    """Let FAISS have so many threads when called from the calling one; OpenMP keeps a number for each.

    For Ray's tasks, which are pickled with what they name: one that named `faiss` would import it without this module.
    """
    faiss.omp_set_num_threads(count)


__all__ = ["cpu_flags", "faiss", "openblas_core", "use_threads"]
