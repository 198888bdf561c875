"""TMA descriptors: how the copy engine sees a tensor, encoded by the driver and kept."""

from __future__ import annotations

import ctypes
import functools

from bsfa_compile.ops.driver import driver

UINT8, FLOAT16, BFLOAT16 = 0, 6, 9  # CUtensorMapDataType
_BYTES = {UINT8: 1, FLOAT16: 2, BFLOAT16: 2}
_SWIZZLE = {64: 2, 128: 3}  # CUtensorMapSwizzle for a box row of so many bytes
_L2_256B = 3  # CUtensorMapL2promotion
_SIZE, _ALIGNMENT = 128, 64


@functools.lru_cache(maxsize=4096)
def encode(
    pointer: int,
    dtype: int,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    box: tuple[int, int],
) -> bytes:
    """The 128 bytes of a tensor map over 4 dimensions, the innermost first and contiguous.

    shape: elements; strides: elements, of the outer three; box: elements of the inner two that
    one copy moves. Reads outside the tensor give zeros. The box's rows are swizzled as wide as
    they are.
    """
    size = _BYTES[dtype]
    # A dimension of one element is never stepped over, whatever stride it was given.
    steps = [s * size if n > 1 else 16 for s, n in zip(strides, shape[1:], strict=True)]
    room = ctypes.create_string_buffer(_SIZE + _ALIGNMENT)
    address = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        ctypes.c_int(dtype),
        ctypes.c_uint(4),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 4)(*shape),
        (ctypes.c_uint64 * 3)(*steps),
        (ctypes.c_uint32 * 4)(*box, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE[box[0] * size]),
        ctypes.c_int(_L2_256B),
        ctypes.c_int(0),
    )
    if status:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled failed ({status}) for shape {shape}, strides {strides}"
        )
    return ctypes.string_at(address, _SIZE)
