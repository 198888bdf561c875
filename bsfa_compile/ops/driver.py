"""Cubins to running kernels: load for a device, and a launch that costs a few microseconds."""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import sys
import threading
from dataclasses import dataclass
from typing import Any

from bsfa_compile.ops.compiler import KernelUnavailable, Variant, cached

_lock = threading.Lock()  # threads that want the same kernel build it once


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel ready to launch on one device. `library` keeps it loaded."""

    handle: int
    library: object


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute; only the first int of its 64-byte value is used."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("smem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


_OVERLAP = _Attribute(id=6, value=(ctypes.c_int * 16)(1))  # programmatic stream serialization
_OVERLAP_ADDRESS = ctypes.addressof(_OVERLAP)
_MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def driver() -> Any:
    """The CUDA driver. Called through ctypes: half the host time of the richer bindings."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise KernelUnavailable(f"the CUDA driver cannot be loaded: {error}") from error
    pointer = ctypes.c_void_p  # cuLaunchKernelEx, called most, is given ctypes' own types
    library.cuKernelSetAttribute.argtypes = [ctypes.c_int, ctypes.c_int, pointer, ctypes.c_int]
    library.cuMemsetD8Async.argtypes = [pointer, ctypes.c_ubyte, ctypes.c_size_t, pointer]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown').decode()} ({status})")


@functools.cache
def load(variant: Variant, arch: str, device: int, smem: int = 0) -> Kernel:
    """Build or fetch a variant and load it for CUDA device `device` (a current context exists).

    smem: bytes of dynamic shared memory it will be launched with.
    """
    from cuda.core import ObjectCode

    with _lock:
        compiled = cached(variant, arch)
    library = ObjectCode.from_cubin(compiled.cubin)
    handle = int(library.get_kernel(variant.entry).handle)
    status = driver().cuKernelSetAttribute(_MAX_DYNAMIC_SMEM, smem, handle, device)
    if status:
        raise KernelUnavailable(
            f"the card refuses {smem} bytes of shared memory for {variant.source} (CUDA {status})"
        )
    return Kernel(handle=handle, library=library)


class Stage:
    """A kernel, its launch configuration, and host memory for the parameters of one launch.

    layout: a `struct` format for each kernel parameter, without padding between fields. The driver
    copies parameters while it queues a kernel, so this memory serves every call; threads that
    launch the same kernel take turns.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, smem: int, *layout: str
    ) -> None:
        sizes = [struct.calcsize("<" + parameter) for parameter in layout]
        self._pack = struct.Struct("<" + "".join(layout)).pack_into
        self._values = ctypes.create_string_buffer(sum(sizes))
        places = itertools.accumulate(sizes, initial=ctypes.addressof(self._values))
        pointers = (ctypes.c_void_p * len(sizes))(*itertools.islice(places, len(sizes)))
        self._config = _Config(*grid, threads, 1, 1, smem, 0, _OVERLAP_ADDRESS, 0)
        handle = ctypes.c_void_p(kernel.handle)
        self._arguments = ctypes.byref(self._config), handle, pointers, None
        self._launch = driver().cuLaunchKernelEx
        self._kernel = kernel  # keeps it loaded
        self._turn = threading.Lock()

    def run(self, stream: int, *values: float | bytes, overlap: bool = True) -> None:
        """Queue it on a stream of the current context.

        values: the fields of all parameters, in order (a tensor map is its 128 bytes).
        overlap: it may start while its predecessor, one of ours, still runs (griddepcontrol in the
        kernel).
        """
        with self._turn:
            self._pack(self._values, 0, *values)
            self._config.stream, self._config.count = stream, overlap
            status = self._launch(*self._arguments)
        if status:
            _check(status, "kernel launch")


def zero(address: int, size: int, stream: int) -> None:
    """Queue the clearing of `size` bytes of device memory; a third of `torch.zeros`' host time."""
    status = driver().cuMemsetD8Async(address, 0, size, stream)
    if status:
        _check(status, "memset")
