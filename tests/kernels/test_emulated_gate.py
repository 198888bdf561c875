"""The logic of the Hopper gate, emulated on the CPU, against the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import reference
from tests.attention_case import AttentionCase, free_tiles, plant_sink
from tests.kernels import emulated
from tests.kernels.emulated import Decided, EmulationError

INF = math.inf
FP16 = torch.float16
CLOSE = 1e-3  # decisions may differ for statistics this near the threshold


pytestmark = pytest.mark.usefixtures("emulator")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """A call and its gate, which drops about half of the tiles."""

    relative: bool = True
    columns: int = 0  # thresholds [H, columns], drawn at random
    side_by_side: int | None = None


class Run:
    """A case's inputs."""

    def __init__(self, case: Case) -> None:
        self.case, self.g, self.scale = case, case.geometry, case.d**-0.5
        q, k, _ = case.random_rows()
        k += 0.5 * torch.randn(1, 1, case.kv_heads, case.d)
        plant_sink(q, k)
        self.q, self.k = (x.to(case.dtype).transpose(1, 2) for x in (q, k))
        self.padding = case.key_padding_mask()
        self.thresholds = torch.zeros(case.heads, max(case.columns, 1))
        if case.columns:
            self.thresholds = torch.rand(case.heads, case.columns)
            self.thresholds[0, 0] = -INF
        free, low, high = self.free(), -8.0, 8.0
        for _ in range(8):
            middle = (low + high) / 2
            above = (free & ~self.mask(middle, "int8")).sum() > free.sum() / 2
            low, high = (low, middle) if above else (middle, high)
        self.thresholds += (low + high) / 2

    def __call__(self, *, exact: bool = False, edit: tuple[str, str] | None = None) -> Decided:
        return emulated.decide(
            self.q,
            self.k,
            self.thresholds,
            self.g,
            relative=self.case.relative,
            exact=exact,
            scale=self.scale,
            padding=self.padding,
            softcap=self.case.softcap,
            start_in_memory=self.case.on_device,
            side_by_side=self.case.side_by_side,
            seed=self.case.seed,
            edit=edit,
        )

    def mask(self, shift: float, precision: str) -> Tensor:
        """The reference's tile mask with the thresholds moved."""
        return reference.tile_mask(
            self.q.float(),
            self.k.float(),
            self.thresholds + shift,
            self.g,
            key_padding_mask=self.padding,
            scale=self.scale,
            softcap=self.case.softcap,
            gate="relative" if self.case.relative else "absolute",
            precision=precision,
        )

    def free(self) -> Tensor:
        """Tiles that the rule decides on: seen by some row, and not always kept."""
        return free_tiles(self.g, self.mask(-INF, "int8"), self.padding)

    def check(self, edit: tuple[str, str] | None = None) -> None:
        """int8: the reference's decisions, of which some are to drop and some are not."""
        kept = self(edit=edit).kept
        assert not (self.mask(CLOSE, "int8") & ~kept).any(), "dropped a tile that the rule keeps"
        assert not (kept & ~self.mask(-CLOSE, "int8")).any(), "kept a tile that the rule drops"
        free = self.free()
        assert (kept & free).any()
        assert (free & ~kept).any()

    def check_exact(self) -> None:
        """What is kept for certain, and what is left to decide, of the exact rule."""
        found, free = self(exact=True), self.free()
        least, most = self.mask(CLOSE, "exact"), self.mask(-CLOSE, "exact")
        assert not (found.kept & ~most).any(), "certain of a tile that the rule drops"
        lost = least & ~found.kept & ~found.undecided
        if self.case.relative:  # `resolve` looks at the sink tiles in any case
            lost &= free
        assert not lost.any(), "certain to drop a tile that the rule keeps"
        assert (found.kept & free).any()
        if not self.case.relative or (self.thresholds <= 0).all():  # else every tile is left open
            assert (free & ~found.kept & ~found.undecided).any()


CASES = [
    Case(),
    Case(relative=False),
    Case(q_start=77, q_len=300, on_device=True),
    Case(q_start=1000, q_len=400, columns=16),
    Case(causal=False, q_len=200, k_len=333),
    Case(causal=False, q_len=300, k_len=700, heads=3, kv_heads=1, relative=False),
    Case(window=300, q_len=900),
    Case(window=200, causal=False, q_len=300, k_len=500, sinks=0),
    Case(padding=90, batch=2, q_len=500),
    Case(padding=-90, batch=2, q_len=600, relative=False),
    Case(softcap=20.0, q_len=500),
    Case(softcap=20.0, q_len=500, relative=False),
    Case(softcap=30.0, window=400, padding=40, batch=2, q_len=700),
    Case(d=64, q_len=700, sinks=2),
    Case(d=80, heads=3, kv_heads=3, q_len=500),
    Case(d=192, q_len=700, sinks=5),  # more than slots of K
    Case(heads=3, q_len=1400, kv_heads=1, sinks=9),
    Case(d=256, q_len=400, relative=False),
    Case(dtype=FP16, heads=5, kv_heads=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decisions(case: Case) -> None:
    Run(case).check()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_decisions_are_certain_or_left_open(case: Case) -> None:
    Run(case).check_exact()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("relative", [True, False])
def test_many_items(relative: bool, seed: int) -> None:
    case = Case(heads=6, kv_heads=3, q_len=1400, d=64, side_by_side=2, relative=relative)
    Run(dataclasses.replace(case, seed=seed)).check()


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_what_is_no_number_keeps_every_tile(bad: float) -> None:
    run = Run(Case(q_len=700))
    run.q[0, 1, 650, 5] = bad
    kept, plain = run().kept, Run(run.case)().kept
    assert kept[0, 1, 5, : run.g.tiles(5)[1]].all()
    assert not plain[0, 1, 5, : run.g.tiles(5)[1]].all()
    kept[0, 1, 5] = plain[0, 1, 5]
    assert torch.equal(kept, plain)


def test_one_huge_channel_keeps_each_rows_maximum() -> None:
    run = Run(Case(q_len=700))
    run.k[..., 20] *= 1000
    scores = reference.scores(run.q.double(), run.k.double(), run.scale, None)
    seen = reference.visibility(run.g, None, 1)
    top = scores.masked_fill(~seen[:, None], -INF).argmax(-1) // run.g.block_k
    kept = run().kept
    rows = torch.arange(run.g.q_len) // run.g.block_q
    assert kept[:, :, rows].gather(-1, top[..., None]).all()
    assert (run.free() & ~kept).any()


LONG, WINDOW = Case(heads=6, kv_heads=3, q_len=1400, d=64, seed=1), Case(window=300, q_len=900)
GIVE_BACK = "      __syncwarp();\n      if (lane == 0) barrier_arrive(judged.empty);\n"
# case, old text, new text, what is raised, its words
BROKEN = {
    "a block's other tile is not looked at": (
        LONG,
        "__vimax_s32_relu(x[0][r], x[1][r])",
        "__vimax_s32_relu(x[0][r], x[0][r])",
        AssertionError,
        "dropped a tile",
    ),
    "the running maximum never rises": (
        WINDOW,
        "if (top > HIDDEN) row.m = fmaxf(",
        "if (top > HIDDEN && row.m == NEG_INF) row.m = fmaxf(",
        AssertionError,
        "kept a tile",
    ),
    "a slot is given back before it is judged": (
        LONG,
        f"      judge(1, judged);\n{GIVE_BACK}",
        f"{GIVE_BACK}      judge(1, judged);\n",
        AssertionError,
        ".",
    ),
    "Q never given back": (
        LONG,
        "if (lane == 0) barrier_arrive(smem + Q_EMPTY);",
        ";",
        EmulationError,
        "stuck: warp 0 waits for an mbarrier",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_found(name: str) -> None:
    case, old, new, error, words = BROKEN[name]
    run = Run(case)
    with pytest.raises(error, match=words):
        run.check(edit=(old, new))
