"""optimize, calibrate, apply, retarget and revert on live modules."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_optimize_works_in_place_and_skips() -> None:
    model, x = toy.Toy(), toy.sample(160)
    dense = toy.run(model, x)
    with pytest.warns(UserWarning, match="no tile can be dropped"):
        bsfa.optimize(model, toy.sample(60), **toy.EAGER, progress=False)  # one tile of 128 x 64
    assert torch.allclose(toy.run(model, x), dense)
    calibration = bsfa.calibrate(model, [x, toy.sample(120)], **toy.BLOCKS, progress=False)
    solved = calibration.thresholds(bsfa.Budget(0.2))
    assert bsfa.apply(model, solved, **toy.EAGER) is model
    got = toy.run(model, x)
    report = bsfa.report(model)
    assert [site.name for site in report.sites] == toy.sites()
    assert all(site.rewritten and site.reason is None for site in report.sites)
    assert all(site.skipped is not None and site.skipped > 0 for site in report.sites)
    bsfa.revert(model)
    wanted, rates = toy.expected(model, solved, x)
    assert torch.allclose(got, wanted)
    assert {site.name: site.skipped for site in report.sites} == pytest.approx(rates)


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("broken", [False, True])
def test_layers_that_share_a_graph_keep_their_own_thresholds(layers: int, broken: bool) -> None:
    model, x = toy.Toy(layers, broken=broken), toy.sample()
    thresholds = toy.thresholds(toy.sites(layers))
    wanted, rates = toy.expected(model, thresholds, x)
    counters.clear()
    bsfa.apply(model, thresholds, **toy.EAGER)
    assert torch.allclose(toy.run(model, x), wanted)
    assert toy.skipped(model) == pytest.approx(rates)
    assert len(set(rates.values())) > 1
    # A break makes a frame of each half of the block; all layers share both.
    assert counters["stats"]["unique_graphs"] <= (4 if broken else 1)


def test_calibration_through_graph_breaks_sees_each_layer() -> None:
    whole, broken, x = toy.Toy(3), toy.Toy(3, broken=True), toy.sample()
    a, b = (bsfa.calibrate(m, x, **toy.BLOCKS, progress=False) for m in (whole, broken))
    first, second = (c.thresholds(bsfa.Budget(0.1)) for c in (a, b))
    assert list(first.values) == list(second.values) == toy.sites(3)
    for name, values in first.values.items():
        assert torch.equal(values, second.values[name])


def test_a_break_inside_attention_stays_dense_and_says_so() -> None:
    model = toy.Toy(2, attention=lambda: toy.Attention(broken=True))
    x = toy.sample()
    dense = toy.run(model, x)
    with pytest.warns(UserWarning, match="graph break"):
        bsfa.optimize(model, x, **toy.EAGER, progress=False)
    assert torch.equal(toy.run(model, x), dense)
    assert not any(site.rewritten for site in bsfa.report(model).sites)
    with pytest.raises(bsfa.UnsupportedError, match="graph break"):
        bsfa.optimize(bsfa.revert(model), x, strict=True, progress=False)


def test_retarget_recompiles_nothing() -> None:
    model, x = toy.Toy(), toy.sample()
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    few, many = (calibration.thresholds(bsfa.Budget(eps)) for eps in (0.01, 0.3))
    bsfa.apply(model, few, **toy.EAGER)
    toy.run(model, x)
    counters.clear()
    held = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert bsfa.retarget(model, many) is model
    assert all(site.skipped is None for site in bsfa.report(model).sites)
    got, rates = toy.run(model, x), toy.skipped(model)
    assert counters["stats"]["unique_graphs"] == 0
    assert held == {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert bsfa.report(model).target == repr(bsfa.Budget(0.3))
    bsfa.revert(model)
    wanted, wanted_rates = toy.expected(model, many, x)
    assert torch.allclose(got, wanted)
    assert rates == pytest.approx(wanted_rates)


def test_retarget_to_thresholds_per_block_fits_the_buffers() -> None:
    model, x = toy.Toy(), toy.sample(200)
    bsfa.optimize(model, x, bsfa.Budget(0.1), gate="absolute", **toy.EAGER, progress=False)
    bsfa.retarget(model, bsfa.TopK(1))
    with pytest.raises(bsfa.ThresholdsError, match="gate"):
        calibration = bsfa.calibrate(model, x, progress=False)
        bsfa.retarget(model, calibration.thresholds(bsfa.Budget(0.1), "relative"))
    assert bsfa.report(model).target == repr(bsfa.TopK(1))


def test_new_lengths_compile_once_more_and_then_never() -> None:
    model = toy.Toy()
    thresholds = toy.thresholds(toy.sites())
    lengths = (64, 96, 130, 71)
    wanted = [toy.expected(model, thresholds, toy.sample(n))[0] for n in lengths]
    bsfa.apply(model, thresholds, **toy.EAGER)
    graphs = []
    for length, output in zip(lengths, wanted, strict=True):
        assert torch.allclose(toy.run(model, toy.sample(length)), output)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]


def test_revert_leaves_nothing() -> None:
    model, x = toy.Toy(), toy.sample()
    before, output, keys = toy.traces(model), toy.run(model, x), list(model.state_dict())
    bsfa.optimize(model, x, **toy.EAGER, progress=False)
    toy.run(model, x)
    assert toy.traces(model) != before
    assert list(model.state_dict()) == keys
    assert bsfa.revert(model) is model
    assert toy.traces(model) == before
    assert model._compiled_call_impl is None
    assert torch.equal(toy.run(model, x), output)
    with pytest.raises(bsfa.InputError, match="not optimized"):
        bsfa.report(model)
    assert bsfa.revert(model) is model


def test_revert_brings_back_how_the_model_was_compiled() -> None:
    model, x = toy.Toy(), toy.sample()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    bsfa.optimize(model, x, **toy.EAGER, progress=False)
    assert model._compiled_call_impl is not compiled
    assert bsfa.revert(model)._compiled_call_impl is compiled


def test_calibrate_leaves_nothing_even_if_it_fails() -> None:
    model = toy.Toy()
    model.train()
    model.layers[0].eval()
    before = toy.traces(model)
    bsfa.calibrate(model, toy.sample(), **toy.BLOCKS, progress=False)
    assert toy.traces(model) == before
    with pytest.raises(RuntimeError):
        bsfa.calibrate(model, [toy.sample(), torch.randn(1, 5, 3)], progress=False)
    assert toy.traces(model) == before
    with pytest.raises(bsfa.CalibrationError, match="empty"):
        bsfa.calibrate(model, iter(()), progress=False)
    assert toy.traces(model) == before


def test_calibrating_an_optimized_model_keeps_it_optimized() -> None:
    model, x = toy.Toy(), toy.sample()
    thresholds = toy.thresholds(toy.sites())
    wanted, rates = toy.expected(model, thresholds, x)
    bsfa.apply(model, thresholds, **toy.EAGER)
    before = toy.traces(model)
    again = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    assert toy.traces(model) == before
    assert torch.allclose(toy.run(model, x), wanted)
    assert toy.skipped(model) == pytest.approx(rates)
    bsfa.revert(model)
    plain = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    for name, site in plain.sites.items():
        assert torch.equal(site.counts, again.sites[name].counts)


def test_casting_the_model_keeps_the_thresholds() -> None:
    model, x = toy.Toy(), toy.sample()
    thresholds = toy.thresholds(toy.sites())
    bsfa.apply(model, thresholds, **toy.EAGER)
    toy.run(model, x)
    model.to(torch.bfloat16)
    toy.run(model, x.to(torch.bfloat16))
    for name, values in thresholds.values.items():
        bits = model.get_submodule(name).get_buffer("bsfa_thresholds_0")
        assert torch.equal(bits.view(torch.float32), values)
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())


def test_a_deep_copy_runs_dense_and_can_be_optimized_itself() -> None:
    model, x = toy.Toy(), toy.sample()
    dense = toy.run(model, x)
    thresholds = toy.thresholds(toy.sites())
    wanted, rates = toy.expected(model, thresholds, x)
    bsfa.apply(model, thresholds, **toy.EAGER)
    twin = copy.deepcopy(model)
    assert torch.equal(toy.run(twin, x), dense)
    with pytest.raises(bsfa.InputError, match="not optimized"):
        bsfa.report(twin)
    bsfa.apply(twin, thresholds, **toy.EAGER)
    assert torch.allclose(toy.run(twin, x), wanted)
    assert toy.skipped(twin) == pytest.approx(rates)
    assert all(rate is None for rate in toy.skipped(model).values())
    assert torch.allclose(toy.run(model, x), wanted)


def test_gradients_flow_as_through_dense_attention() -> None:
    dense, sparse, x = toy.Toy(), toy.Toy(), toy.sample()
    thresholds = toy.thresholds(toy.sites())
    open_ = {name: torch.full_like(v, -math.inf) for name, v in thresholds.values.items()}
    options = {**toy.EAGER, "inner": "aot_eager"}
    bsfa.apply(sparse, Thresholds(values=open_, **toy.BLOCKS), **options)
    for model in (dense, sparse):
        model.train()
        model(x).square().sum().backward()
    assert all(site.skipped == 0.0 for site in bsfa.report(sparse).sites)
    for wanted, got in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert wanted.grad is not None and got.grad is not None
        assert torch.allclose(got.grad, wanted.grad)


def test_inference_mode_counts() -> None:
    model, x = toy.Toy(), toy.sample()
    thresholds = toy.thresholds(toy.sites())
    _, rates = toy.expected(model, thresholds, x)
    with torch.inference_mode():
        bsfa.apply(model, thresholds, **toy.EAGER)
        model(x)
    toy.run(model, x)
    assert toy.skipped(model) == pytest.approx(rates)


def test_autocast_casts_as_attention_does() -> None:
    model, x = toy.Toy().float(), toy.sample().float()
    open_ = Thresholds(values={n: torch.full((2, 1), -math.inf) for n in toy.sites()})
    with torch.autocast("cpu", torch.bfloat16):
        dense = toy.run(model, x)
        bsfa.apply(model, open_, **toy.EAGER)
        got = toy.run(model, x)
    assert got.dtype == dense.dtype
    assert all(site.rewritten for site in bsfa.report(model).sites)
    assert float((got - dense).abs().max()) < 0.1


def test_a_report_says_why_nothing_is_skipped() -> None:
    """Where dense attention is faster, as on a CPU at few tokens, it runs."""
    model, x = toy.Toy(), toy.sample(400)
    solved = bsfa.calibrate(model, x, progress=False).thresholds(bsfa.Budget(0.3))
    bsfa.apply(model, solved, inner="eager")
    assert bsfa.report(model).idle is None  # nothing has run yet
    toy.run(model, x)
    report = bsfa.report(model)
    assert report.skipped == 0.0 < (report.expected_skipped or 0)
    assert "dense_if_faster=False forces the rule" in str(report)
    bsfa.apply(model, solved, **toy.EAGER)
    toy.run(model, x)
    report = bsfa.report(model)
    assert (report.skipped or 0) > 0 and report.idle is None


def test_running_outside_the_compiled_graph_warns_once() -> None:
    model, x = toy.Toy(), toy.sample()
    bsfa.apply(model, toy.thresholds(toy.sites()), **toy.EAGER)
    with pytest.warns(UserWarning, match="outside the compiled graph") as caught:
        model.forward(x)
        model.forward(x)
    assert len(caught) == 1


def test_report_as_text_and_json() -> None:
    model, x = toy.Toy(), toy.sample()
    bsfa.optimize(model, x, bsfa.Budget(0.05), **toy.EAGER, progress=False)
    report = bsfa.report(model)
    assert "2 of 2 attention sites block-sparse" in str(report)
    assert "layers.1.attn" in str(report)
    data = json.loads(report.to_json())
    assert data["target"] == "Budget(eps=0.05)"
    assert [site["name"] for site in data["sites"]] == toy.sites()
