"""Memory that a step gives back stays with the process, for the next step (docs/decisions/0014)."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h
NEVER, NONE = 2**31 - 1, 0  # bytes of free memory at the heap's top that are given back; allocations outside of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """glibc gives large tensors, and free memory at the top of its heap, back to the kernel, and the next step gets them page by page, cleared. Not where the
    user has chosen (MALLOC_..., GLIBC_TUNABLES). Whether it was done."""
    chosen = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, NONE) and mallopt(M_TRIM_THRESHOLD, NEVER))
