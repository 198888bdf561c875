"""Quality targets: the limit holds on inputs that calibration never saw, or the proof says no."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from bsfa_compile.calibrate.spread import POWER, Spread
from tests import toy

VOCABULARY = 32


class LanguageModel(nn.Module):
    """Token ids [B, L] -> logits [B, L, VOCABULARY]; heads and layers of unlike sharpness."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.body = toy.Toy(layers)
        self.embed = nn.Embedding(VOCABULARY, toy.WIDTH).double()
        self.head = nn.Linear(toy.WIDTH, VOCABULARY).double()
        with torch.no_grad():
            self.embed.weight.mul_(1.5)
            self.head.weight.mul_(8)
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embed(input_ids)))
        return logits


def text(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", name="model")
def make_model() -> LanguageModel:
    return LanguageModel()


HELD_OUT = [text(180, 3), text(220, 4)]


@pytest.fixture(scope="module", name="calibration")
def make_calibration(model: LanguageModel) -> Calibration:
    data = [text(160, 1), text(200, 2)]
    return bsfa.calibrate(model, data, sink_tiles=1, **toy.BLOCKS, progress=False)


def losses(model: LanguageModel, thresholds: Thresholds) -> tuple[float, float, float]:
    """(ΔNLL, KL, output error) over the held-out texts, by other means than the search's."""
    nll, kl, wrong, norm, count = 0.0, 0.0, 0.0, 0.0, 0
    for ids in HELD_OUT:
        dense = toy.run(model, ids)
        bsfa.apply(model, thresholds, **toy.EAGER)
        sparse = toy.run(model, ids)
        bsfa.revert(model)
        p, q = dense[0, :-1].log_softmax(-1), sparse[0, :-1].log_softmax(-1)
        count += len(p)
        nll += float(F.nll_loss(q, ids[0, 1:], reduction="sum"))
        nll -= float(F.nll_loss(p, ids[0, 1:], reduction="sum"))
        kl += float(F.kl_div(q, p, reduction="sum", log_target=True))
        wrong += float((dense - sparse).square().sum())
        norm += float(dense.square().sum())
    return nll / count, kl / count, math.sqrt(wrong / norm)


@pytest.mark.parametrize(
    ("target", "which"),
    [
        (bsfa.Quality(nll=0.025), 0),
        (bsfa.Quality(kl=4e-4), 1),
        (bsfa.Quality(kl=1e-3), 1),
        (bsfa.Quality(error=0.01), 2),
    ],
    ids=str,
)
def test_the_limit_holds_on_held_out_inputs(
    model: LanguageModel, calibration: Calibration, target: bsfa.Quality, which: int
) -> None:
    solved = bsfa.search(model, calibration, target, HELD_OUT, progress=False)
    proof = solved.proof
    assert proof is not None and proof.holds and proof.skipped > 0
    assert (proof.metric, proof.limit) == (target.metric, target.limit)
    measured = losses(model, solved)
    assert measured[which] == pytest.approx(proof.measured, rel=1e-3, abs=1e-7)
    assert measured[which] <= proof.upper <= target.limit
    other = {} if which == 2 else {("kl", "nll")[which]: measured[1 - which]}
    assert proof.also == pytest.approx(other, rel=1e-3, abs=1e-7)
    assert all((value <= 0).all() for value in solved.values.values())
    assert solved.dropped is not None and solved.dropped > 0
    assert "within" in str(proof)


def test_a_larger_limit_skips_more(model: LanguageModel, calibration: Calibration) -> None:
    skipped = []
    for kl in (2e-4, 8e-4, 1.0):
        found = bsfa.search(model, calibration, bsfa.Quality(kl=kl), HELD_OUT, progress=False)
        assert found.proof is not None
        skipped.append(found.proof.skipped)
    assert 0 < skipped[0] < skipped[1] < skipped[2]
    most = calibration.thresholds(bsfa.Budget(1.0))
    assert all(torch.equal(most.values[n], value) for n, value in found.values.items())


def test_the_spread_beats_equal_mass_at_equal_skipping(calibration: Calibration) -> None:
    """By the model of the loss: for what sites cost, no equal budget is better."""
    costs = {name: 10.0**i for i, name in enumerate(calibration.sites)}
    spread = Spread(calibration.sites, costs, "relative")

    def predicted(values: dict[str, Tensor]) -> tuple[float, float]:
        made = calibration.wrapped(values, "relative", "auto", "")
        lost = calibration.predict(made)
        cost = sum(costs[n] * float((told.lost**POWER).sum()) for n, told in lost.items())
        return cost, calibration.told(made).dropped or 0.0

    for eps in (0.002, 0.01, 0.03):
        cost, dropped = predicted(dict(calibration.thresholds(bsfa.Budget(eps)).values))
        ours, more = predicted(spread.thresholds(cost))
        assert ours <= cost * (1 + 1e-9) and more >= dropped > 0
    nothing = spread.thresholds(0.0)
    assert predicted(nothing)[0] == 0


def test_what_cannot_be_held_is_said_and_dense(
    model: LanguageModel, calibration: Calibration
) -> None:
    with pytest.warns(UserWarning, match="NOT HELD"):
        solved = bsfa.search(
            model, calibration, bsfa.Quality(error=1e-7), HELD_OUT, trials=3, progress=False
        )
    assert solved.proof is not None and not solved.proof.holds and solved.proof.trials == 3
    assert all((value == -math.inf).all() for value in solved.values.values())
    assert solved.dropped == 0
    bsfa.apply(model, solved, **toy.EAGER)
    assert "NOT HELD" in str(bsfa.report(model))
    assert torch.allclose(toy.run(model, HELD_OUT[0]), _dense(model))


def _dense(model: LanguageModel) -> Tensor:
    bsfa.revert(model)
    return toy.run(model, HELD_OUT[0])


def test_the_model_is_as_before(model: LanguageModel, calibration: Calibration) -> None:
    given = calibration.thresholds(bsfa.Budget(0.02))
    bsfa.apply(model, given, **toy.EAGER)
    wanted = toy.run(model, HELD_OUT[0])
    rates = toy.skipped(model)
    model.train()
    bsfa.search(model, calibration, bsfa.Quality(kl=1e-3), HELD_OUT, trials=2, progress=False)
    assert model.training
    model.eval()
    assert toy.skipped(model) == rates and bsfa.report(model).target == given.target
    assert torch.equal(toy.run(model, HELD_OUT[0]), wanted)
    bsfa.revert(model)
    assert "save_pretrained" not in vars(model)


def test_traced_programs_are_searched_too(model: LanguageModel) -> None:
    ids = HELD_OUT[0]
    program = torch.export.export(model, (ids,))
    calibration = bsfa.calibrate(program, ids, **toy.BLOCKS, progress=False)
    target = bsfa.Quality(error=0.005)
    found = bsfa.search(program, calibration, target, ids, progress=False)
    assert found.proof is not None and found.proof.holds and found.proof.skipped > 0
    graph = program.module()
    assert isinstance(graph, torch.fx.GraphModule)
    dense = toy.run(graph, ids)
    again = bsfa.search(graph, replace(calibration, fingerprint=None), target, ids, progress=False)
    assert again.proof is not None and again.proof.skipped == found.proof.skipped
    assert torch.equal(toy.run(graph, ids), dense)


def test_optimize_splits_the_data_and_reports() -> None:
    model = LanguageModel(2)
    data = [text(400, seed) for seed in range(4)]
    target = bsfa.Quality(kl=0.05)
    bsfa.optimize(model, data, target, **toy.EAGER, progress=False)
    report = bsfa.report(model)
    assert report.proof is not None and report.proof.holds and report.proof.tokens == 399
    assert report.target == repr(target)
    with pytest.raises(bsfa.CalibrationError, match="held_out"):
        bsfa.optimize(model, data[0], target, progress=False)
    bsfa.optimize(model, data[0], target, held_out=data[1], **toy.EAGER, progress=False)
    with pytest.raises(bsfa.CalibrationError, match="search"):
        bsfa.retarget(model, cast(Any, target))


def test_a_proof_travels_with_the_file(
    model: LanguageModel, calibration: Calibration, tmp_path: Path
) -> None:
    found = bsfa.search(model, calibration, bsfa.Quality(kl=1e-3), HELD_OUT, progress=False)
    found.save(tmp_path / "t")
    assert Thresholds.load(tmp_path / "t").proof == found.proof


def test_bad_targets_are_refused(model: LanguageModel, calibration: Calibration) -> None:
    wrong: list[dict[str, Any]] = [
        {},
        {"nll": 0.1, "kl": 0.1},
        {"nll": 0.0},
        {"kl": math.nan},
        {"error": True},
        {"nll": 0.1, "scored": 0},
    ]
    for bad in wrong:
        with pytest.raises(bsfa.InputError, match="Quality"):
            bsfa.Quality(**bad)
    with pytest.raises(bsfa.InputError, match="token ids"):
        embedded = torch.randn(1, 90, toy.WIDTH, dtype=torch.float64)
        seen = bsfa.calibrate(model.body, embedded, **toy.BLOCKS, progress=False)
        bsfa.search(model.body, seen, bsfa.Quality(nll=0.1), embedded, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bsfa.search(model.body, seen, bsfa.Quality(error=0.05), embedded, progress=False)
    assert found.proof is not None and found.proof.skipped > 0
