"""torch.compile(model, backend="bsfa", options=...), through inductor and without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import bsfa_compile as bsfa
from bsfa_compile.backend import bsfa as backend
from bsfa_compile.calibrate import Calibration, Thresholds
from tests import toy, zoo

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def options(thresholds: Thresholds | str, **more: Any) -> dict[str, Any]:
    return {"thresholds": thresholds, **toy.EAGER, **more}


@pytest.mark.parametrize("broken", [False, True])
def test_the_backend_finds_the_modules_by_itself(broken: bool) -> None:
    model, x = toy.Toy(3, broken=broken), toy.sample()
    thresholds = toy.thresholds(toy.sites(3))
    wanted, rates = toy.expected(model, thresholds, x)
    compiled = torch.compile(model, backend=backend, options=options(thresholds))
    with torch.no_grad():
        assert torch.allclose(compiled(x), wanted)
    assert toy.skipped(compiled) == pytest.approx(rates)
    assert toy.skipped(model) == pytest.approx(rates)


def test_layers_compiled_one_by_one_share_a_graph_and_keep_their_thresholds() -> None:
    model, x = toy.Toy(12), toy.sample()
    thresholds = toy.thresholds(toy.sites(12))
    wanted, rates = toy.expected(model, thresholds, x)
    counters.clear()
    for layer in model.layers:
        layer.compile(backend=backend, options=options(thresholds))
    assert torch.allclose(toy.run(model, x), wanted)
    assert toy.skipped(model) == pytest.approx(rates)
    assert len(set(rates.values())) > 3
    assert counters["stats"]["unique_graphs"] == 1


def test_thresholds_from_a_file_by_name_in_a_new_process(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.safetensors"
    toy.thresholds(toy.sites()).save(path)
    model, x = toy.Toy(), toy.sample()
    bsfa.apply(model, Thresholds.load(path), **toy.EAGER)
    wanted = toy.run(model, x)
    torch.save(wanted, tmp_path / "wanted.pt")
    code = f"""
import torch, bsfa_compile
from tests import toy
options = {{"thresholds": {str(path)!r}, **toy.EAGER}}
compiled = torch.compile(toy.Toy(), backend="bsfa", options=options, fullgraph=True)
with torch.no_grad():
    found = compiled(toy.sample())
assert torch.equal(found, torch.load({str(tmp_path / "wanted.pt")!r}, weights_only=True))
print("sparse", *toy.skipped(compiled).values())
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "sparse 0." in ran.stdout


def test_the_backend_is_listed_once() -> None:
    code = (
        "import bsfa_compile, torch._dynamo as d; d.lookup_backend('bsfa');"
        "print(d.list_backends().count('bsfa'), d.lookup_backend('bsfa').__module__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert ran.stdout.split() == ["1", "bsfa_compile.backend"]


def test_it_needs_thresholds_that_fit() -> None:
    x = toy.sample()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"inner": "eager"}, "thresholds"),
        ({"thresholds": 3}, "int"),
        ({"thresholds": toy.thresholds([]), "no": 1}, "optimization option"),
    ]
    for given, message in wrong:
        compiled = torch.compile(toy.Toy(), backend=backend, options=given)
        with pytest.raises(Exception, match=message):
            compiled(x)
    model = toy.Toy()
    dense = toy.run(model, x)
    other = torch.compile(model, backend=backend, options=options(toy.thresholds(["elsewhere"])))
    with torch.no_grad():
        assert torch.equal(other(x), dense)  # no module in memory has these sites
    strict = options(toy.thresholds(["elsewhere"]), strict=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="must stay dense"):
        torch.compile(model, backend=backend, options=strict)(x)


def test_other_thresholds_replace_the_first_ones_loudly() -> None:
    model, x = toy.Toy(), toy.sample()
    first, second = toy.thresholds(toy.sites()), toy.thresholds(toy.sites()[::-1])
    wanted, _ = toy.expected(model, second, x)
    with torch.no_grad():
        torch.compile(model, backend=backend, options=options(first))(x)
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="other thresholds"):
            got = torch.compile(model, backend=backend, options=options(second))(x)
    assert torch.allclose(got, wanted)


def test_a_retargeted_model_keeps_its_target_when_it_compiles_again() -> None:
    model = toy.Toy()
    first, second = toy.thresholds(toy.sites()), toy.thresholds(toy.sites()[::-1])
    wanted, _ = toy.expected(model, second, toy.sample(130))
    compiled = torch.compile(model, backend=backend, options=options(first), dynamic=False)
    with torch.no_grad():
        compiled(toy.sample(96))
        bsfa.retarget(model, second)
        assert torch.allclose(compiled(toy.sample(130)), wanted)


def test_inductor_runs_the_operator_and_new_thresholds_need_no_new_code() -> None:
    model, x = toy.Toy(2).float(), toy.sample().float()
    first, second = toy.thresholds(toy.sites()), toy.thresholds(toy.sites()[::-1])
    wanted = [toy.expected(model, t, x) for t in (first, second)]
    bsfa.apply(model, first, dense_if_faster=False, fullgraph=True)
    found = [(toy.run(model, x), toy.skipped(model))]
    counters.clear()
    bsfa.retarget(model, second)
    found.append((toy.run(model, x), toy.skipped(model)))
    assert counters["stats"]["unique_graphs"] == 0
    for (output, rates), (right, right_rates) in zip(found, wanted, strict=True):
        assert torch.allclose(output, right, atol=1e-5)
        assert rates == pytest.approx(right_rates)


def open_thresholds(calibration: Calibration) -> Thresholds:
    values = {n: torch.full((s.heads, 1), -torch.inf) for n, s in calibration.sites.items()}
    return Thresholds(values=values, **toy.BLOCKS)


@pytest.mark.slow
def test_llama_through_inductor_forward_and_generate() -> None:
    model = zoo.build("llama", layers=1)
    given = zoo.left_padded(zoo.inputs("llama", 100), (0, 30))
    dense = zoo.output(model, given)
    short = {key: given[key][:, 60:] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**short, max_new_tokens=2, do_sample=False)
    calibration = bsfa.calibrate(model, given, **toy.BLOCKS, progress=False)
    bsfa.apply(model, open_thresholds(calibration), dense_if_faster=False, fullgraph=True)
    rows = given["attention_mask"].bool()
    assert torch.allclose(zoo.output(model, given)[rows], dense[rows], atol=1e-4)
    assert torch.equal(model.generate(**short, max_new_tokens=2, do_sample=False), tokens)
    assert all(site.rewritten and site.skipped == 0.0 for site in bsfa.report(model).sites)


def test_generation_with_a_static_cache() -> None:
    model = zoo.build("llama").double()
    ids = zoo.inputs("llama", 40)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 4, "cache_implementation": "static"}
    tokens = model.generate(ids, **options, do_sample=False)
    values = {name: torch.full((4, 1), -torch.inf) for name in zoo.ZOO["llama"].sites}
    bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
    assert torch.equal(model.generate(ids, **options, do_sample=False), tokens)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_chunked_prefill_over_a_cache(static: bool, padded: bool) -> None:
    """The cache counts its length up in place before attention runs: the start must not move."""
    model = zoo.build("llama").double()
    given = zoo.inputs("llama", 90)
    if padded:
        given = zoo.left_padded(given, (0, 20))
    whole = zoo.output(model, given)
    values = {name: torch.full((4, 1), -0.02) for name in zoo.ZOO["llama"].sites}
    thresholds = Thresholds(values=values, **toy.BLOCKS)
    bsfa.apply(model, thresholds, **toy.EAGER)
    sparse = zoo.output(model, given)
    bsfa.retarget(model, thresholds)
    cache: Any = transformers.DynamicCache(config=model.config)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
        cache.early_initialization(2, 2, 16, torch.float64, torch.device("cpu"))
    parts = []
    for start, stop in ((0, 32), (32, 64), (64, 90)):
        chunk = {"input_ids": given["input_ids"][:, start:stop], "past_key_values": cache}
        if padded:
            chunk["attention_mask"] = given["attention_mask"][:, :stop]
        parts.append(zoo.output(model, chunk))
    rows = given.get("attention_mask", torch.ones(2, 90)).bool()
    assert torch.allclose(torch.cat(parts, dim=1)[rows], sparse[rows])
    assert not torch.allclose(sparse[rows], whole[rows])
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())
    assert all(site.reason is None for site in bsfa.report(model).sites)
