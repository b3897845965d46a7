"""Large buffers in pages of 2 MiB, where the operating system gives them when asked.

Fresh memory comes in pages of 4 KiB, each with a fault at its first touch. A loss fills hundreds of
MiB of it in every call, most of it for `dweight`.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

LEAST_BYTES = 8 << 20  # a page at either end stays as it is
PAGE = 4096
MADV_HUGEPAGE = 14  # <asm-generic/mman-common.h>


def in_huge_pages(buffer: Tensor) -> Tensor:
    """Return `buffer`, whose memory has not been touched, in large pages if that can be.

    It is advice: on a GPU, beside Linux, and where it is not taken, nothing happens.
    """
    if buffer.is_cpu and buffer.nbytes >= LEAST_BYTES and sys.platform == "linux":
        start = -(-buffer.data_ptr() // PAGE) * PAGE
        length = (buffer.data_ptr() + buffer.nbytes - start) // PAGE * PAGE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(MADV_HUGEPAGE)
        )
    return buffer
