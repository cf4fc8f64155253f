"""Memory that a step gives back stays with the process, for the next step (docs/decisions/0014)."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
LARGEST, NEVER = 32 << 20, 2**31 - 1  # bytes: the most that glibc's heap takes at once; free memory at its top that is given back


@functools.cache
def keep_freed_memory() -> bool:
    """glibc gives free memory at the top of its heap back to the kernel, now and then a step's activations, and the next step gets it page by page,
    cleared. Not where the user has chosen (MALLOC_..._, GLIBC_TUNABLES) or another allocator is loaded before it. Whether it was done."""
    chosen = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
