"""Memory that a process no longer uses goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_free_memory() -> None:
    """Collect garbage, and on Linux return free pages of the heap to the system.

    The C library keeps what was freed. After a burst of large messages that is hundreds of megabytes.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other C libraries have none
        if trim is not None:
            trim(0)
