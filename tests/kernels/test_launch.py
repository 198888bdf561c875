"""Which calls the kernels turn down, and why: what can be said without a card."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import launch, sm80
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.compiler import KernelUnavailable
from bsfa_compile.ops.tiles import Geometry

CALL = Call(
    geometry=Geometry(q_len=64, k_len=64, is_causal=True),
    q_start_tensor=None,
    key_padding_mask=None,
    scale=0.1,
    softcap=None,
)
INT8 = Gate(thresholds=torch.zeros(2), rule="relative", precision="int8")


def tensor(d: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, 64, 2, d).to(dtype).transpose(1, 2)


def test_the_cpu_is_a_reason() -> None:
    with pytest.raises(KernelUnavailable, match="q is on cpu; the kernels run on CUDA"):
        launch.attention(tensor(), tensor(), tensor(), CALL, None)


def family(name: str, reason: str | None) -> Any:
    """One that does every call, or none."""

    def attention(*given: object) -> str:
        if reason is not None:
            raise KernelUnavailable(reason)
        return name

    return SimpleNamespace(attention=attention)


def test_the_first_family_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    q: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    rest: Any = (None,) * 4

    def run(*families: object) -> object:
        monkeypatch.setattr(launch, "_families", lambda device: families)
        return launch.attention(q, *rest)

    one, two, no, never = family("one", None), family("two", None), family("", "a"), family("", "b")
    assert run(one, two) == "one"
    assert run(no, two) == "two"
    for families, reasons in (
        ((no, never), "a; b"),
        ((no, no), "a"),
        ((), "capability 8.0 or newer"),
    ):
        with pytest.raises(KernelUnavailable, match=f"{reasons}$"):
            run(*families)


def test_its_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def on(device: int) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def attention(q: Any, *rest: object) -> int:
        return current[-1]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(launch, "_families", lambda device: (SimpleNamespace(attention=attention),))
    for device in (0, 1):
        q: Any = SimpleNamespace(is_cuda=True, get_device=lambda device=device: device)
        rest: Any = (None,) * 4
        ran_on: Any = launch.attention(q, *rest)
        assert ran_on == device
        assert current == [0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": tensor(dtype=torch.float32)}, "bfloat16 or float16"),
        ({"k": tensor(dtype=torch.float16)}, "all alike"),
        ({"k": tensor(128)[..., ::2]}, "last dimension has stride 2"),
        ({"v": tensor(65)[..., 1:]}, "multiples of 16 bytes"),
        ({"q": tensor()[:, :, :0]}, "empty"),
        ({"call": dataclasses.replace(CALL, scale=-0.1)}, "positive scale"),
        (
            {"call": dataclasses.replace(CALL, geometry=Geometry(q_len=64, k_len=64, block_k=32))},
            "tiles, not 128 x 32",
        ),
        (
            {"call": dataclasses.replace(CALL, geometry=Geometry(q_len=64, k_len=2**30))},
            "positions beyond",
        ),
        ({"gate": INT8}, "int8"),
    ],
)
def test_reasons(changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"q": tensor(), "k": tensor(), "v": tensor()}
    given |= {"call": CALL, "gate": None} | changes
    reason = sm80.reason(**given)
    assert reason is not None
    assert words in reason
