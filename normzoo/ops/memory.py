"""Memory that is kept: large outputs without asking the system for the same pages again and again."""

from __future__ import annotations

import ctypes
import os
import sys

OPT_OUT = "NORMZOO_KEEP_PAGES"
"""The environment variable that, set to ``0``, leaves the allocator as it is."""

_MIB = 2**20
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # names of glibc's malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MIB}
# Any call of mallopt ends glibc's own adaptation, so what it arrives at comes back, not what it starts from.
_RELEASE = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB, _TOP_PAD: _MIB // 8}


def keep_pages(keep: bool = True) -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    glibc takes every block of more than 32 MB from the system and gives it back when it is freed. The output of a norm
    over 8 million floats is such a block: each call then pays for its pages to be mapped, cleared and unmapped, which
    costs several times what the norm itself does (``normzoo bench --pages`` measures it on your machine). Kept, the
    pages are used again.

    The price is that memory once used stays with the process until it ends, even when no tensor needs it: the process
    holds its peak. CUDA tensors have an allocator of their own, which this does not touch.

    Args:
        keep: ``False`` goes back to giving memory back, and gives back at once what is free.

    Returns:
        Whether the C library did it. It is ``False``, and nothing has changed, on musl, macOS and Windows.

    Example:
        >>> keep_pages() == keep_pages(False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    try:
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except AttributeError:  # musl
        return False
    done = [mallopt(name, value) == 1 for name, value in (_KEEP if keep else _RELEASE).items()]
    if not keep:
        malloc_trim(0)
    return all(done)


def start() -> bool:
    """Keep pages from here on, unless the environment says ``NORMZOO_KEEP_PAGES=0``.

    Returns:
        Whether they are kept.
    """
    return os.environ.get(OPT_OUT) != "0" and keep_pages()
