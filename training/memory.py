"""Memory that a step has freed stays the process's for the next step.

The heap is glibc's; with another library this does nothing.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST = 32 << 20  # glibc maps what is larger by itself, whatever it is told
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """From now on the heap is not handed back to the system.

    Otherwise a step's tensors of some megabytes are new pages each time, which the kernel clears first: a twentieth
    of a training step on a CPU (docs/benchmarks.md). What the process has at most stays the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc's, or no such thing as a process's own symbols
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
