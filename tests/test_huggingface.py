"""attn_implementation="bsfa": eager and compiled, every mask and cache, beside the graph path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests import toy, zoo

ROOT = Path(__file__).parent.parent
NAMES = zoo.ZOO["llama"].sites
KINDS = ("llama", "mistral", "gemma2")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str = "llama") -> Any:
    """A model of the zoo, float64, through the door."""
    model = zoo.build(name).double()
    model.set_attn_implementation("bsfa")
    return model


def thresholds(value: float = -0.02, names: tuple[str, ...] = NAMES) -> Thresholds:
    values = {name: torch.full((4, 1), value - i / 64) for i, name in enumerate(names)}
    return Thresholds(values=values, **toy.BLOCKS)


def apply_eagerly(model: Any, given: Thresholds) -> None:
    bsfa.apply(model, given, compile=False, dense_if_faster=False)


def all_skip(model: Any) -> bool:
    return all(rate is not None and rate > 0 for rate in toy.skipped(model).values())


def test_importing_us_imports_no_transformers_and_either_order_registers() -> None:
    code = """
import sys
import bsfa_compile
assert "transformers" not in sys.modules
from transformers.modeling_utils import AttentionInterface
assert "bsfa" in AttentionInterface._global_mapping
from transformers.masking_utils import AttentionMaskInterface
assert "bsfa" in AttentionMaskInterface._global_mapping
"""
    for program in (code, "import transformers.modeling_utils\n" + code.replace("not in", "in")):
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=False
        )
        assert ran.returncode == 0, ran.stderr[-2000:]


def test_from_pretrained_takes_the_name(tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation="bsfa").eval()
    given = zoo.left_padded(zoo.inputs("llama", 50), (0, 9))
    usual = zoo.output(load(tmp_path, attn_implementation="sdpa").eval(), given)
    assert torch.allclose(zoo.output(model, given), usual, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_dense_without_thresholds_and_equal_at_minus_infinity(
    name: str, padded: bool
) -> None:
    given = zoo.inputs(name, 150)
    rows: Any = slice(None)
    if padded:
        given = zoo.left_padded(given, (0, 40))
        rows = given["attention_mask"].bool()
    usual = zoo.build(name).double()
    if name == "gemma2":  # its own padding overflows in float64: the graph path stands in
        open_ = {site: torch.full((4, 1), -torch.inf) for site in zoo.ZOO[name].sites}
        bsfa.apply(usual, Thresholds(values=open_, **toy.BLOCKS), **toy.EAGER)
    wanted = zoo.output(usual, given)[rows]
    model = build(name)
    limit = 1e-5 if name == "gemma2" else 1e-9  # its softmax is float32
    assert torch.allclose(zoo.output(model, given)[rows], wanted, atol=limit)
    sites = zoo.ZOO[name].sites
    values = {site: torch.full((4, 1), -torch.inf) for site in sites}
    apply_eagerly(model, Thresholds(values=values, **toy.BLOCKS))
    assert torch.allclose(zoo.output(model, given)[rows], wanted, atol=limit)
    report = bsfa.report(model)
    assert [site.skipped for site in report.sites] == [0.0] * len(sites)
    assert report.calls == {"sparse": len(sites)}
    assert report.coverage == 1.0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_door_and_the_graph_path_compute_the_same(name: str, padded: bool) -> None:
    given = zoo.inputs(name, 150)
    rows: Any = slice(None)
    if padded:
        given = zoo.left_padded(given, (0, 40))
        rows = given["attention_mask"].bool()
    usual, door = zoo.build(name).double(), build(name)
    solved = thresholds(names=zoo.ZOO[name].sites)
    bsfa.apply(usual, solved, **toy.EAGER)
    wanted = zoo.output(usual, given)[rows]
    apply_eagerly(door, solved)
    assert torch.allclose(zoo.output(door, given)[rows], wanted, atol=1e-5)
    assert all_skip(door)
    assert toy.skipped(door) == pytest.approx(toy.skipped(usual))
    bsfa.apply(door, solved, **toy.EAGER)  # the door inside a graph
    assert torch.allclose(zoo.output(door, given)[rows], wanted, atol=1e-9)
    assert toy.skipped(door) == pytest.approx(toy.skipped(usual))
    assert bsfa.report(door).calls == {"sparse": len(zoo.ZOO[name].sites)}


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_of_zero_or_less_stays_dense_in_the_door(scale: float) -> None:
    model, given = build(), zoo.inputs("llama", 150)
    *others, last = NAMES
    model.get_submodule(last).scaling = scale
    wanted = zoo.output(model, given)
    calibration = bsfa.calibrate(model, given, **toy.BLOCKS, progress=False)
    assert list(calibration.sites) == others
    assert "only positive ones" in calibration.dense[last]
    values = {name: torch.full((4, 1), -torch.inf) for name in NAMES}
    apply_eagerly(model, Thresholds(values=values, **toy.BLOCKS))
    assert torch.allclose(zoo.output(model, given), wanted, equal_nan=True)
    assert bsfa.report(model).calls == {"sparse": len(others), "dense": 1}
    apply_eagerly(model, thresholds())
    zoo.output(model, given)
    *sparse, dense = bsfa.report(model).sites
    assert "only positive ones" in (dense.reason or "")
    assert all((site.skipped or 0) > 0 for site in sparse)


def test_calibrate_retarget_and_revert_work_on_the_door() -> None:
    model, plain = build(), zoo.build("llama").double()
    given = zoo.left_padded(zoo.inputs("llama", 150), (0, 40))
    dense = zoo.output(model, given)
    found, wanted = (bsfa.calibrate(m, given, **toy.BLOCKS, progress=False) for m in (model, plain))
    for name, site in wanted.sites.items():
        assert torch.equal(found.sites[name].counts, site.counts)
    apply_eagerly(model, found.thresholds(bsfa.Budget(0.05)))
    sparse = zoo.output(model, given)
    assert all_skip(model)
    bsfa.retarget(model, found.thresholds(bsfa.Budget(0.0)))
    assert not torch.allclose(zoo.output(model, given), sparse)
    assert torch.equal(zoo.output(bsfa.revert(model), given), dense)
    assert not any("bsfa_" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize(
    ("name", "shared"), [("llama", True), ("mistral", False), ("gemma2", False)]
)
def test_calibration_through_the_door_needs_no_trace(
    name: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, door = zoo.build(name).double(), build(name)
    if shared:  # one module that is called twice
        for model in (usual, door):
            model.model.layers[1] = model.model.layers[0]
    given = {**zoo.left_padded(zoo.inputs(name, 200), (0, 40)), "use_cache": False}
    wanted = bsfa.calibrate(usual, given, **toy.BLOCKS, progress=False)
    monkeypatch.setattr(torch, "compile", None)
    found = bsfa.calibrate(door, [given], **toy.BLOCKS, progress=False)
    assert list(found.sites) == list(wanted.sites)
    assert len(found.sites) == (1 if shared else 2)
    for site, statistics in wanted.sites.items():
        assert statistics.candidates > 0
        assert torch.equal(found.sites[site].counts, statistics.counts)
    assert (found.dense, found.uncalled) == (wanted.dense, wanted.uncalled)


def test_a_search_through_the_door_needs_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    model, data = build(), [{**zoo.inputs("llama", 300), "use_cache": False} for _ in range(3)]
    dense = zoo.output(model, data[0])
    calibration = bsfa.calibrate(model, data[:1], **toy.BLOCKS, progress=False)
    found = bsfa.search(model, calibration, bsfa.Quality(kl=0.1), data[1:], progress=False)
    assert found.proof is not None and found.proof.holds and found.proof.skipped > 0.1
    assert torch.equal(zoo.output(model, data[0]), dense)
    assert not any("bsfa_" in name for name, _ in model.named_buffers())


def test_what_the_door_cannot_run_sparse_is_not_calibrated() -> None:
    model, given = build(), zoo.inputs("llama", 150)
    rows = torch.arange(150)
    odd = (rows[:, None] - rows)[None, None] % 3 == 0  # no limits of key - query
    found = bsfa.calibrate(model, {**given, "attention_mask": odd}, **toy.BLOCKS, progress=False)
    assert not found.sites
    assert set(found.dense) == set(NAMES)
    assert all("more than causality" in why for why in found.dense.values())


def test_optimize_leaves_it_uncompiled_if_asked() -> None:
    model = build()
    bsfa.optimize(
        model,
        zoo.inputs("llama", 300),
        bsfa.Budget(0.2),
        compile=False,
        dense_if_faster=False,
        progress=False,
    )
    assert model._compiled_call_impl is None
    zoo.output(model, zoo.inputs("llama", 300))
    assert bsfa.report(model).calls == {"sparse": 2}
    with pytest.raises(bsfa.InputError, match="compile=False"):
        bsfa.apply(zoo.build("llama"), thresholds(), compile=False)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunked_prefill_through_the_door(name: str, static: bool) -> None:
    model = build(name)
    given = zoo.left_padded(zoo.inputs(name, 90), (0, 20))
    apply_eagerly(model, thresholds(-0.3, zoo.ZOO[name].sites))
    whole = zoo.output(model, given)
    cache: Any = transformers.DynamicCache(config=model.config)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    parts = []
    for start, stop in ((0, 32), (32, 64), (64, 90)):
        chunk = {
            "input_ids": given["input_ids"][:, start:stop],
            "attention_mask": given["attention_mask"][:, :stop],
        }
        parts.append(zoo.output(model, {**chunk, "past_key_values": cache}))
    rows = given["attention_mask"].bool()
    if name == "llama":  # a sliding cache moves the tiles' grid with it
        assert torch.allclose(torch.cat(parts, dim=1)[rows], whole[rows])
    assert all_skip(model)
    assert set(bsfa.report(model).calls) == {"sparse"}


def test_masks_of_other_meaning_stay_dense_and_say_so() -> None:
    model, usual = build(), zoo.build("llama").double()
    given = zoo.inputs("llama", 60)
    mask = torch.rand(2, 1, 60, 60) < 0.7
    given["attention_mask"] = mask | torch.eye(60, dtype=torch.bool)
    wanted = zoo.output(usual, given)
    apply_eagerly(model, thresholds())
    assert torch.equal(zoo.output(model, given), wanted)
    report = bsfa.report(model)
    assert report.calls == {"dense": 2} and report.coverage == 0.0
    assert all("mask" in (site.reason or "") and not site.rewritten for site in report.sites)


def test_attention_sinks() -> None:
    config = transformers.GptOssConfig(
        **zoo.GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=100
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    given = zoo.left_padded({"input_ids": torch.randint(3, zoo.VOCABULARY, (2, 150))}, (0, 9))
    rows = given["attention_mask"].bool()
    wanted = zoo.output(model, given)[rows]
    model.set_attn_implementation("bsfa")
    assert torch.allclose(zoo.output(model, given)[rows], wanted, atol=1e-4)
    apply_eagerly(model, thresholds(-torch.inf))
    assert torch.allclose(zoo.output(model, given)[rows], wanted, atol=1e-4)
    apply_eagerly(model, thresholds(-0.02))
    assert not torch.allclose(zoo.output(model, given)[rows], wanted, atol=1e-4)
    assert all_skip(model) and bsfa.report(model).calls == {"sparse": 2}
