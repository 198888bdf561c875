"""The host side of a call, with a driver that only listens: what it is told, and whose memory."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import driver, sm90, sm90_plan, tensor_map
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.compiler import KernelUnavailable, Variant
from bsfa_compile.ops.tiles import Geometry


@dataclasses.dataclass
class Launched:
    kernel: str
    stream: int
    overlap: bool
    parameters: tuple[int, ...]  # addresses


class Listener:
    """What the CUDA driver would have been asked for; it copies nothing before `pause` is over."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.launched: list[Launched] = []
        self.encoded: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.read: list[bytes] = []
        self.cleared: list[tuple[int, int]] = []
        self.pause = 0.0
        self.status = 0

    def load(self, variant: Variant, arch: str, device: int, smem: int = 0) -> driver.Kernel:
        self.kernels.append(variant.entry)
        return driver.Kernel(handle=len(self.kernels) - 1, library=None)

    def cuLaunchKernelEx(self, config: Any, kernel: Any, parameters: Any, extra: None) -> int:
        time.sleep(self.pause)
        self.read.append(ctypes.string_at(parameters[0], 8))
        launched = Launched(
            kernel=self.kernels[kernel.value or 0],
            stream=config._obj.stream or 0,
            overlap=bool(config._obj.count),
            parameters=tuple(parameters),
        )
        self.launched.append(launched)
        return self.status

    def cuMemsetD8Async(self, at: int, value: int, size: int, stream: int) -> int:
        assert (value, stream) == (0, 7)
        self.cleared.append((at, size))
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_LAUNCH_FAILED"
        return 0

    def cuTensorMapEncodeTiled(
        self, at: Any, dtype: Any, rank: Any, pointer: Any, *rest: Any
    ) -> int:
        shape, steps = rest[:2]
        self.encoded.append((pointer.value, tuple(shape), tuple(steps)))
        ctypes.memset(at.value, len(self.encoded) % 256, 128)
        return 0


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    found = Listener()
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(tensor_map, "driver", lambda: found)
    monkeypatch.setattr(sm90_plan, "load", found.load)
    monkeypatch.setattr(sm90, "_empty", lambda *x: torch.empty_strided(*x[:2], dtype=x[2]))
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    for cache in (sm90.plan_for, tensor_map.encode):
        cache.cache_clear()
    return found


def stage(listener: Listener, *layout: str) -> driver.Stage:
    kernel = listener.load(Variant(source="", defines=(), entry="some"), "", 0)
    return driver.Stage(kernel, (3, 2, 1), 128, 1024, *layout)


def test_each_parameter_lies_where_the_driver_looks(listener: Listener) -> None:
    some = stage(listener, "8s", "Qi4x", "f")
    some.run(7, b"abcdefgh", 2**40, -3, 0.5, overlap=False)
    (launched,) = listener.launched
    assert (launched.stream, launched.overlap) == (7, False)
    assert ctypes.string_at(launched.parameters[0], 8) == b"abcdefgh"
    assert struct.unpack("<Qi", ctypes.string_at(launched.parameters[1], 12)) == (2**40, -3)
    assert struct.unpack("<f", ctypes.string_at(launched.parameters[2], 4)) == (0.5,)


def test_threads_do_not_mix_their_parameters(listener: Listener) -> None:
    listener.pause = 1e-3
    shared = stage(listener, "Q")
    threads = [threading.Thread(target=shared.run, args=(i, i)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = [int.from_bytes(x, "little") for x in listener.read]
    assert sorted(values) == list(range(16))
    assert values == [x.stream for x in listener.launched]


def test_a_launch_that_fails_says_so(listener: Listener) -> None:
    listener.status = 719
    failing = stage(listener, "Q")
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        failing.run(0, 1)
    listener.status = 0
    failing.run(0, 2)  # others may launch it afterwards
    with pytest.raises(struct.error):
        failing.run(0, 1, 2)


def tensors(length: int = 200, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, length, 64] over [1, rows, H, 64] storage."""

    def one(heads: int) -> Tensor:
        stored = torch.zeros(1, rows, heads, 64, dtype=torch.bfloat16)
        return stored[:, :length].transpose(1, 2)

    return one(4), one(2), one(2)


def call_on(q: Tensor, k: Tensor) -> Call:
    return Call(
        geometry=Geometry(q_len=q.shape[2], k_len=k.shape[2], is_causal=True),
        q_start_tensor=None,
        key_padding_mask=None,
        scale=0.1,
        softcap=None,
    )


GATE = Gate(thresholds=torch.zeros(4), rule="relative", precision="int8")
SPARSE = ["sum_keys", "quantise_keys", "gate", "attend", "tally"]


def test_calls_share_plans_but_no_results(listener: Listener) -> None:
    q, k, v = tensors()
    call = call_on(q, k)
    one, two = (sm90.attention(q, k, v, call, GATE) for _ in range(2))
    assert [x.kernel for x in listener.launched] == SPARSE * 2
    assert [x.overlap for x in listener.launched] == [False, True, True, True, True] * 2
    assert {x.stream for x in listener.launched} == {7}
    assert len(listener.kernels) == len(SPARSE)  # loaded once
    places = [
        x.untyped_storage().data_ptr()
        for r in (one, two)
        for x in (r.out, r.lse, r.tile_mask, r.counts)
    ]
    assert len(set(places)) == 8  # nor do those of one call, as compilers ask
    pointers = struct.unpack_from(
        "<5Q", ctypes.string_at(listener.launched[-2].parameters[3], 104), 64
    )
    assert pointers[:3] == (two.tile_mask.data_ptr(), two.out.data_ptr(), two.lse.data_ptr())


def test_dense_clears_what_it_adds_to(listener: Listener) -> None:
    q, k, v = tensors()
    result = sm90.attention(q, k, v, call_on(q, k), None)
    assert [x.kernel for x in listener.launched] == ["tally", "attend"]
    assert [x.overlap for x in listener.launched] == [False, True]
    tiles, counts = result.tile_mask, result.counts
    assert listener.cleared == [
        (tiles.data_ptr(), tiles.nbytes),
        (counts.data_ptr(), counts.nbytes + 8),
    ]
    pointers = struct.unpack_from(
        "<5Q", ctypes.string_at(listener.launched[-1].parameters[3], 104), 64
    )
    written = result.out.data_ptr(), result.lse.data_ptr()
    assert pointers == (0, *written, 0, counts.data_ptr() + counts.nbytes)
    assert counts.untyped_storage().nbytes() == counts.nbytes + 8


@pytest.mark.parametrize("gate", [GATE, None])
def test_results_are_laid_out_as_the_fakes_say(listener: Listener, gate: Gate | None) -> None:
    q, k, v = tensors()
    result = sm90.attention(q, k, v, call_on(q, k), gate)
    assert result.out.stride() == (200 * 4 * 64, 64, 4 * 64, 1)
    assert result.out.shape == q.shape
    for x in (result.lse, result.tile_mask, result.counts):
        assert x.is_contiguous()


@pytest.mark.parametrize("what", ["same", "pointer", "stride", "length"])
def test_tensor_maps_follow_their_tensors(listener: Listener, what: str) -> None:
    q, k, v = tensors()
    sm90.attend(q, k, v, torch.zeros(1, 4, 3, 2, dtype=torch.int32), call_on(q, k))
    before = list(listener.encoded)
    if what != "same":
        rows, length = {"pointer": (200, 200), "stride": (200, 200), "length": (200, 100)}[what]
        others = tensors(length, rows)
        k = others[1] if what != "stride" else others[1].contiguous()
        v = v[:, :, :length]
    sm90.attend(q, k, v, torch.zeros(1, 4, 3, 2, dtype=torch.int32), call_on(q, k))
    new = [x for x in listener.encoded[len(before) :] if x[0] == k.data_ptr()]
    assert len(before) == 3
    assert (new == []) == (what == "same")
    if new:
        _, head, row, _ = (s * 2 for s in k.stride())
        assert new[-1][1:] == ((64, k.shape[2], 2, 1), (row, head, 16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": tensors()[0].float()}, "bfloat16 or float16"),
        ({"v": tensors()[2].half()}, "all alike"),
        ({"k": tensors()[1][..., ::2]}, "last dimension has stride 2"),
        ({"q": tensors()[0][..., :60]}, "head dim 60"),
        ({"v": tensors()[2][:, :1].expand(1, 2, 200, 64)}, "broadcast"),
        (
            {"v": torch.zeros(1, 2, 200, 68, dtype=torch.bfloat16)[..., :64]},
            "multiples of 16 bytes",
        ),
        ({"k": torch.zeros(25601, dtype=torch.bfloat16)[1:].view(1, 2, 200, 64)}, "does not start"),
        ({"q": tensors()[0][:, :, :0]}, "empty"),
        ({"scale": -0.1}, "positive scale"),
        ({"geometry": Geometry(q_len=200, k_len=200, block_k=32)}, "tiles, not 128 x 32"),
        ({"geometry": Geometry(q_len=200, k_len=200, q_start=2**29)}, "positions beyond"),
    ],
)
def test_reasons(listener: Listener, changes: dict[str, Any], words: str) -> None:
    q, k, v = tensors()
    call = call_on(q, k)
    assert sm90.reason(q, k, v, call, GATE) is None
    given: dict[str, Any] = {"q": q, "k": k, "v": v}
    given |= {name: x for name, x in changes.items() if name in given}
    rest = {name: x for name, x in changes.items() if name not in given}
    call = dataclasses.replace(call, **rest)
    reason = sm90.reason(given["q"], given["k"], given["v"], call, GATE)
    assert reason is not None
    assert words in reason


def test_a_kernel_that_cannot_be_had_is_asked_for_once(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(variant: Variant, *args: object) -> driver.Kernel:
        asked.append(variant)
        raise KernelUnavailable("no NVRTC")

    monkeypatch.setattr(sm90_plan, "load", refuse)
    q, k, v = tensors()
    for _ in range(3):
        assert sm90.reason(q, k, v, call_on(q, k), GATE) == "no NVRTC"
    assert len(asked) == 1
    sm90.plan_for.cache_clear()  # others have their kernels
