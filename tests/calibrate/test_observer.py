"""The observing operator: registered cleanly, right under every mode, and no leak."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.calibrate import observer as observer_module
from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import CalibrationError
from bsfa_compile.ops.tiles import Geometry

Observed = Callable[..., SiteStatistics]


def observe(q: Tensor, k: Tensor, handle: Tensor, **changes: Any) -> None:
    config: dict[str, Any] = {
        "key_padding_mask": None,
        "q_start_tensor": None,
        "q_start": 0,
        "is_causal": True,
        "window": None,
        "softcap": None,
        "scale": 1.0,
        "sink_tiles": 1,
        "block_q": 16,
        "block_k": 8,
    }
    torch.ops.bsfa.observe_v1(q, k, *(config | changes).values(), handle)


@pytest.fixture(name="qk")
def make_qk(inputs: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return inputs(0, (2, 4, 2, 64, 64), torch.float32)


def _want(observed: Observed, qk: tuple[Tensor, Tensor]) -> SiteStatistics:
    g = Geometry(q_len=64, k_len=64, is_causal=True, block_q=16, block_k=8)
    return observed(*qk, g, max_k=128)


def test_opcheck(qk: tuple[Tensor, Tensor]) -> None:
    mask = torch.ones(2, 64, dtype=torch.bool)
    with Observer() as watch:
        plain, all_set, grad = watch.open(["plain", "all set", "grad"]).values()
        config = (None, None, 0, True, None, None, None, 1, 16, 8)
        for args in (
            (*qk, *config, plain),
            (*qk, mask, torch.tensor(0), 0, False, 20, 5.0, 0.3, 0, 8, 8, all_set),
            (qk[0].clone().requires_grad_(), qk[1], *config, grad),
        ):
            torch.library.opcheck(torch.ops.bsfa.observe_v1.default, args)
        assert min(watch.calls.values()) > 0


class _Attend(torch.nn.Module):
    def __init__(self, handle: Tensor) -> None:
        super().__init__()
        self.register_buffer("handle", handle, persistent=False)
        self.handle: Tensor

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        observe(q, k, self.handle)
        return (q + 1).sum()


@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad"])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_every_mode_sees_the_same(
    qk: tuple[Tensor, Tensor], observed: Observed, backend: str | None, mode: str
) -> None:
    want = _want(observed, qk)
    torch._dynamo.reset()
    with Observer() as watch:
        model: Any = _Attend(watch.open(["a"])["a"])
        run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        context: Any = {
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
            "grad": torch.enable_grad,
        }[mode]
        with context():
            q = qk[0].clone().requires_grad_(mode == "grad")
            out = run(q, qk[1])
        if mode == "grad":
            out.backward()
            assert q.grad is not None and torch.equal(q.grad, torch.ones_like(q))
        assert watch.statistics["a"].equal(want)
        assert watch.calls == {"a": 1} and int(model.handle[1]) == 1
        assert want.candidates > 0


def test_a_start_on_the_device_overrides_the_number(qk: tuple[Tensor, Tensor]) -> None:
    q, k = qk
    with Observer() as watch:
        handles = watch.open(["tensor", "number"])
        observe(q[:, :, 32:], k, handles["tensor"], q_start_tensor=torch.tensor(32), q_start=7)
        observe(q[:, :, 32:], k, handles["number"], q_start=32)
        seen = watch.statistics
    assert seen["tensor"].equal(seen["number"]) and seen["tensor"].candidates > 0


def test_decoding_and_empty_calls_are_not_calibrated(qk: tuple[Tensor, Tensor]) -> None:
    q, k = qk
    with Observer() as watch:
        handle = watch.open(["a", "never"])["a"]
        observe(q[:, :, :1], k, handle, q_start=63)
        observe(q[:0], k[:0], handle)
        observe(q, k[:, :, :0], handle)
        observe(q, k, handle, key_padding_mask=torch.zeros(2, 64, dtype=torch.bool))
        assert watch.statistics == {} and watch.calls == {"a": 0, "never": 0}
        assert handle[1] == 0
        observe(q, k, handle)
        assert list(watch.statistics) == ["a"] and watch.calls == {"a": 1, "never": 0}


def test_closing_forgets_the_handles_and_keeps_the_statistics(qk: tuple[Tensor, Tensor]) -> None:
    before = len(observer_module._slots)
    with Observer(max_k=0) as watch:
        handle = watch.open(["a"])["a"]
        assert handle.dtype == torch.int64 and handle.shape == (2,)
        observe(*qk, handle)
        with pytest.raises(CalibrationError, match="unique"):
            watch.open(["a"])
    watch.close()
    assert len(observer_module._slots) == before
    assert watch.statistics["a"].mid_sums.numel() == 0
    with pytest.raises(CalibrationError, match="closed"):
        observe(*qk, handle)


def test_a_site_has_one_shape_of_tile(qk: tuple[Tensor, Tensor]) -> None:
    with Observer() as watch:
        handle = watch.open(["a"])["a"]
        observe(*qk, handle)
        with pytest.raises(CalibrationError, match="one tile shape"):
            observe(*qk, handle, block_k=16)


def test_threads_do_not_lose_calls(qk: tuple[Tensor, Tensor], observed: Observed) -> None:
    want = _want(observed, qk)
    for _ in range(7):
        want = want.merge(_want(observed, qk))
    with Observer() as watch:
        handle = watch.open(["a"])["a"]

        def work() -> None:
            observe(*qk, handle)
            observe(*qk, handle)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert watch.statistics["a"].equal(want) and watch.calls["a"] == 8
