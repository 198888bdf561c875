"""The logic of the Hopper attention kernel, emulated on the CPU, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels.emulated import EmulationError
from tests.kernels.emulated_cases import FP16, Case, Run

pytestmark = pytest.mark.usefixtures("emulator")

DENSE = [
    Case(),
    Case(q_start=77, q_len=300, on_device=True),
    Case(causal=False, q_len=200, k_len=333),
    Case(softcap=20.0, q_len=400),
    Case(window=100, q_len=500),
    Case(window=300, q_len=900, q_start=200),
    Case(window=200, causal=False, q_len=300, k_len=500),
    Case(window=200, d=256, q_len=400),
    Case(window=300, padding=90, batch=2, q_len=500),
    Case(padding=-90, batch=2, q_len=300),
    Case(padding=90, batch=2, q_len=300),
    Case(d=64, q_len=500),
    Case(d=80, heads=3, kv_heads=3, q_len=300),
    Case(d=192, dv=128, q_len=300),
    Case(dtype=FP16),
    Case(sink_logits=True),
]
LISTED = [
    Case(keep=0.3, q_len=900),
    Case(keep=0.3, q_len=2300, heads=1, causal=False, d=64),
    Case(keep=0.3, causal=False, q_len=300, k_len=700, dtype=FP16),
    Case(keep=0.5, padding=-70, batch=2, sink_logits=True),
    Case(keep=0.5, padding=200, batch=2, d=64),
    Case(keep=0.5, window=400, q_len=900),
    Case(keep=0.5, window=400, q_len=900, dtype=FP16, padding=70),
    Case(keep=0.2, q_len=400, q_start=1000),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_all_tiles(case: Case) -> None:
    assert Run(case).check() == 0


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_tiles_of_a_mask(case: Case) -> None:
    run = Run(case)
    assert 0 < run.kept.sum() < run.visible.sum()
    assert run.check() == 0


@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_many_items_of_which_some_are_done_again(keep: float | None, seed: int) -> None:
    case = Case(heads=6, kv_heads=3, q_len=900, d=64, late=200.0, keep=keep, side_by_side=2)
    run = Run(dataclasses.replace(case, seed=seed))
    assert (run.kept.sum() < run.visible.sum()) == (keep is not None)
    assert 0 < run.check() < run.kept.any(-1).sum()


@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize(
    ("dtype", "late", "overflows"),
    [(torch.bfloat16, 60.0, False), (FP16, 12.0, False), (FP16, 25.0, True), (FP16, 60.0, True)],
)
def test_late_score_above_the_first(
    keep: float | None, dtype: torch.dtype, late: float, overflows: bool
) -> None:
    run = Run(Case(late=late, dtype=dtype, keep=keep))
    assert (run.check() > 0) == overflows


@pytest.mark.parametrize("case", [Case(window=400), Case(padding=90, batch=2)], ids=str)
def test_late_score_under_a_mask(case: Case) -> None:
    run = Run(dataclasses.replace(case, late=200.0, keep=0.5, q_len=900))
    assert 0 < run.check() < run.kept.any(-1).sum()


def test_every_item_may_be_done_again() -> None:
    run = Run(Case(late=200.0, causal=False, q_len=500, d=64))
    assert run.check() == run.kept.any(-1).sum()


def test_of_the_last_items_only_the_very_last_is_done_again() -> None:
    run = Run(Case(late=200.0, causal=False, q_len=500, d=64))
    run.q[:, 0, :, 9] = 0.0  # items alternate between the two heads
    assert run.check() == run.kept[:, 1].any(-1).sum()


def test_a_large_sum_of_small_weights_has_room() -> None:
    run = Run(Case(late=13.0, late_keys=64, dtype=FP16))
    run.k[:, :, 360:424, 10:] = 0.0  # the late keys: else chance adds to some of their scores
    assert run.check() == 0


def test_rows_that_see_nothing() -> None:
    run = Run(Case(keep=0.2, always=False, q_len=900, d=64, heads=4))
    used = run.kept.any(-1)
    assert used.any()
    assert not used[:, :, :-1].all(), "no row of the mask is empty"
    assert run.check() == 0


# old text, new text, what is raised, its words
BROKEN = {
    "overflow never noticed": ("store_shared(record + OVERFLOWED, 1);", ";", AssertionError, "."),
    "K announced twice": (
        "barrier_expect(full, K_BYTES);",
        "barrier_expect(full, K_BYTES), barrier_expect(full, K_BYTES);",
        EmulationError,
        "more arrivals at barrier",
    ),
    "V never given back": (
        "if (lane == 0) barrier_arrive(smem + V_EMPTY + 8 * stage(n));",
        "",
        EmulationError,
        "stuck: warp 0 waits for an mbarrier",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_found(name: str) -> None:
    old, new, error, words = BROKEN[name]
    run = Run(Case(heads=6, kv_heads=3, q_len=900, d=64, late=200.0))
    with pytest.raises(error, match=words):
        run.check(edit=(old, new))
