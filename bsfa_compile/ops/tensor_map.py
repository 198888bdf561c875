"""TMA descriptors: how the copy engine sees a tensor, encoded by the driver and kept."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from bsfa_compile.ops.driver import driver

UINT8, FLOAT16, BFLOAT16 = 0, 6, 9  # CUtensorMapDataType
_BYTES = {UINT8: 1, FLOAT16: 2, BFLOAT16: 2}
_SWIZZLE = {64: 2, 128: 3}  # CUtensorMapSwizzle for a box row of so many bytes
_L2_256B = 3  # CUtensorMapL2promotion
_SIZE, _ALIGNMENT = 128, 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiling:
    """A tensor of 4 dimensions, the innermost first and contiguous, and what one copy moves of it.

    shape: elements; strides: elements, of the outer three; box: elements of the inner two. Told
    apart by identity, which is quick to look up.
    """

    dtype: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    box: tuple[int, int]

    @functools.cached_property
    def described(self) -> tuple[Any, ...]:
        """What the driver is told of it: dtype and rank, and all that follows the address."""
        size = _BYTES[self.dtype]
        # A dimension of one element is never stepped over, whatever stride it was given.
        outer = zip(self.strides, self.shape[1:], strict=True)
        return (
            ctypes.c_int(self.dtype),
            ctypes.c_uint(4),
            (ctypes.c_uint64 * 4)(*self.shape),
            (ctypes.c_uint64 * 3)(*(s * size if n > 1 else 16 for s, n in outer)),
            (ctypes.c_uint32 * 4)(*self.box, 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            ctypes.c_int(0),
            ctypes.c_int(_SWIZZLE[self.box[0] * size]),
            ctypes.c_int(_L2_256B),
            ctypes.c_int(0),
        )


@functools.lru_cache(maxsize=4096)
def encode(pointer: int, tiling: Tiling) -> bytes:
    """The 128 bytes of a tensor map over a tensor at `pointer`.

    Reads outside the tensor give zeros. The box's rows are swizzled as wide as they are.
    """
    room = ctypes.create_string_buffer(_SIZE + _ALIGNMENT)
    address = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    dtype, rank, *layout = tiling.described
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), dtype, rank, ctypes.c_void_p(pointer), *layout
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed ({status}) for {tiling}")
    return ctypes.string_at(address, _SIZE)
