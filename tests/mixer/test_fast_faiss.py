"""Which kernels FAISS multiplies matrices with."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from mixer.fast_faiss import cpu_flags, faiss, openblas_core

AVX2 = {"sse4_2", "avx", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
NAME_OF_CORE = """
import ctypes, os, pathlib, sys
from mixer.fast_faiss import faiss
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
(library,) = {line.split()[-1] for line in maps if "faiss" in line and "openblas" in line}
core = ctypes.CDLL(library).openblas_get_corename
core.restype = ctypes.c_char_p
print(core().decode(), os.environ.get("OPENBLAS_CORETYPE"))
"""


@pytest.mark.parametrize(
    ("flags", "core"),
    [
        (AVX512, "SKYLAKEX"),
        (AVX512 | {"avx512_bf16", "amx_tile"}, "SKYLAKEX"),
        (AVX512 - {"avx512bw"}, "HASWELL"),
        (AVX2, "HASWELL"),
        (AVX2 - {"fma"}, None),
        (set(), None),
    ],
)
def test_the_kernels_are_those_that_the_cpu_can_run(flags: set[str], core: str | None) -> None:
    assert openblas_core(flags) == core


def run(**environment: str) -> list[str]:
    """Return the core that FAISS' OpenBLAS has in a new process, and what the variable is there afterwards."""
    kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    command = [sys.executable, "-c", NAME_OF_CORE]
    found = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)
    return found.stdout.split()


known = pytest.mark.skipif(openblas_core(cpu_flags()) is None, reason="the kernels are left to OpenBLAS on this CPU")


@known
def test_faiss_takes_them_and_the_variable_is_gone_for_other_libraries() -> None:
    core, variable = run()
    assert (core.upper(), variable) == (openblas_core(cpu_flags()), "None")


@known
def test_what_the_user_sets_is_kept() -> None:
    assert run(OPENBLAS_CORETYPE="NEHALEM") == ["Nehalem", "NEHALEM"]


@pytest.mark.parametrize("queries", [1, 15, 16, 1500])
def test_what_is_found_is_the_same_by_either_way(queries: int) -> None:
    rng = np.random.default_rng(0)
    asked, vectors = (rng.standard_normal((n, 256), dtype=np.float32) for n in (queries, 9000))
    scores, found = faiss.knn(asked, vectors, 5, metric=faiss.METRIC_INNER_PRODUCT)
    products = asked.astype(np.float64) @ vectors.T
    assert faiss.cvar.distance_compute_blas_threshold == 16 * 256, "from 16 queries of 256 dimensions on"
    best = -np.sort(-products, axis=1)[:, :5]
    assert scores == pytest.approx(best, abs=1e-3)
    assert np.take_along_axis(products, found, 1) == pytest.approx(best, abs=1e-3)
