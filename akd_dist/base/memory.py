"""Memory that this process has freed: whether it is kept for the next batch, or given back to the system."""

import ctypes
import functools

# Parameters of mallopt(3), as glibc's malloc.h has them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_MMAP_MOST = 32 * 2**20
"""The largest threshold that glibc takes on 64 bits."""


@functools.cache
def keep_freed_memory() -> None:
    """Have malloc keep what is freed, as far as it lies below 32 MiB a piece; without effect where there is no glibc.

    A network makes and frees the same activations for each batch. By default glibc gives such memory back each time,
    and the system has to clear each page of it again: a fifth of the time of a small ResNet.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_MMAP_THRESHOLD, _MMAP_MOST)
