"""Every architecture of the zoo on a card, in bfloat16, through the kernels.

The same model in float32 says what is true; the untouched bfloat16 model says what rounding alone
makes of it; torch operations by the same rule say, call by call, what the kernels must give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from bsfa_compile.ops import chunked, launch
from bsfa_compile.ops.call import Call, Gate, Result
from tests import zoo
from tests.zoo_check import distinct_thresholds, real_rows

pytestmark = pytest.mark.gpu
LENGTH, CUT = 1000, 300
ROUNDING = 2.0  # times the error of the untouched bfloat16 model
# The zoo's windows are narrower than a tile of 128 x 64: an edge cuts every tile, and all are kept.
WIDER = {
    "mistral": {"sliding_window": 600},
    "recurrent_gemma": {"attention_window_size": 600},
}


def place(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: x.to("cuda", dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
        for key, x in given.items()
    }


def length_of(name: str) -> int:
    return LENGTH if zoo.ZOO[name].takes in ("text", "texts") else 200


def dense(calibration: Calibration) -> Thresholds:
    """The kernels run and drop nothing."""
    values = {n: torch.full((s.heads, 1), -torch.inf) for n, s in calibration.sites.items()}
    return Thresholds(values=values, fingerprint=calibration.fingerprint)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference in b's."""
    return float((a.float() - b.float()).norm() / b.float().norm())


class Watched:
    """Stands before the kernels: each call must give what torch operations give by the same rule.

    Compared call by call, since one tile decided otherwise changes all that later layers see.
    """

    def __init__(self, attention: Callable[..., Result]) -> None:
        self.attention, self.calls, self.dropped = attention, 0, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
        result = self.attention(q, k, v, call, gate)
        by_rule = chunked.attention(q, k, v, call, gate=gate)
        differ = (result.counts[:, 0] - by_rule.counts[:, 0]).abs().sum()
        assert differ <= 0.01 * by_rule.counts[:, 1].sum() + 1
        same_tiles = chunked.attention(q, k, v, call, tile_mask=result.tile_mask)
        assert distance(result.out, same_tiles.out) < 0.01
        self.calls += 1
        self.dropped += int(result.counts[:, 0].sum())
        return result


def run(model: Any, thresholds: Thresholds, given: dict[str, Any]) -> tuple[Tensor, Watched]:
    """The output, and what the kernels were seen to do."""
    bsfa.apply(model, thresholds, inner="eager", dense_if_faster=False)
    watched = Watched(launch.attention)
    with mock.patch.object(launch, "attention", watched):
        output = zoo.output(model, given)
    bsfa.revert(model)
    return output, watched


@pytest.mark.parametrize("name", zoo.ZOO)
def test_on_the_card(name: str) -> None:
    entry = zoo.ZOO[name]
    plain = zoo.inputs(name, length_of(name))
    variants = {"plain": plain}
    if entry.pads and entry.takes == "text":
        variants["padded"] = zoo.left_padded(plain, (0, CUT))
    model = zoo.build(name, **WIDER.get(name, {})).cuda()
    exact = {k: zoo.output(model, place(v, torch.float32)) for k, v in variants.items()}
    model = model.bfloat16()
    given = {k: place(v, torch.bfloat16) for k, v in variants.items()}
    rounded = {k: zoo.output(model, v) for k, v in given.items()}
    calibration = bsfa.calibrate(model, list(given.values()), progress=False)
    # Releases of transformers differ in the names of modules, not in how many attend.
    assert len(calibration.sites) == len(entry.sites)
    if not entry.sites:
        return
    for key, inputs in given.items():
        got, watched = run(model, dense(calibration), inputs)
        rows = real_rows(inputs)
        assert watched.dropped == 0
        if key == "plain":
            assert watched.calls == len(entry.sites) * entry.repeats
        base = distance(rounded[key][rows], exact[key][rows])
        assert distance(got[rows], exact[key][rows]) <= ROUNDING * base + 1e-3, key
    dropped = 0
    for gate in ("relative", "absolute"):
        thresholds = replace(distinct_thresholds(calibration, gate), precision="int8")
        dropped += run(model, thresholds, given["plain"])[1].dropped
    assert dropped > 0, "nothing was dropped"
