"""generate() with every cache and way of decoding: sparse prefill, dense decode, same tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from transformers import cache_utils

import bsfa_compile as bsfa
from bsfa_compile.backend import Inner
from bsfa_compile.calibrate import Thresholds
from bsfa_compile.huggingface.offloading import without_streams
from tests import toy, zoo

PROMPT, NEW, WINDOW = 70, 5, 40
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 32},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "quantised": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, **more: Any) -> Any:
    """A model of the zoo in float64; Mistral with a window much shorter than the prompt."""
    model = zoo.build(name, **more).double()
    if name == "mistral":
        model.config.sliding_window = WINDOW
        for layer in model.model.layers:
            layer.self_attn.sliding_window = WINDOW
    return model


def prompt(name: str, *, padded: bool, batch: int = 2) -> dict[str, Tensor]:
    given = zoo.inputs(name, PROMPT, batch)
    cuts = (0, 21)[:batch] if padded else (0,) * batch
    both = zoo.left_padded(given, cuts)
    return {key: both[key] for key in ("input_ids", "attention_mask")}


def tokens(model: Any, given: dict[str, Tensor], way: dict[str, Any], **more: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*")
        found: Tensor = model.generate(
            **given, **way, **more, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
    return found


def thresholds(name: str, value: float) -> Thresholds:
    values = {site: torch.full((4, 1), value) for site in zoo.ZOO[name].sites}
    return Thresholds(values=values, **toy.BLOCKS)


def optimized(name: str, path: str, value: float) -> Any:
    model = build(name)
    if path == "door":
        model.set_attn_implementation("bsfa")
        bsfa.apply(model, thresholds(name, value), compile=False, dense_if_faster=False)
    else:
        bsfa.apply(model, thresholds(name, value), **toy.EAGER)
    return model


CASES = [
    *[("llama", path, way) for path in ("door", "graph") for way in WAYS],
    *[("mistral", "door", way) for way in WAYS if way != "quantised"],
    *[("mistral", "graph", way) for way in ("dynamic", "static", "chunked")],
]


@pytest.mark.parametrize(("name", "path", "way"), CASES)
def test_the_tokens_are_those_of_the_untouched_model(name: str, path: str, way: str) -> None:
    if way == "quantised" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers quantises its cache only with other packages")
    single = way == "prompt lookup"
    given = prompt(name, padded=not single, batch=1 if single else 2)
    wanted = tokens(build(name), given, WAYS[way])
    model = optimized(name, path, -torch.inf)
    assert torch.equal(tokens(model, given, WAYS[way]), wanted)
    calls = bsfa.report(model).calls
    assert calls["sparse"] >= 2 and calls.get("eager", 0) == 0
    bsfa.retarget(model, thresholds(name, -0.02))
    tokens(model, given, WAYS[way])
    rates = toy.skipped(model)
    assert len(rates) == 2 and all(rate is not None and rate > 0 for rate in rates.values())
    more = bsfa.report(model).calls
    assert more["sparse"] == 2 * calls["sparse"]
    assert more.get("dense", 0) == 0


@pytest.mark.parametrize("path", ["door", "graph"])
def test_assisted_decoding(path: str) -> None:
    given = prompt("llama", padded=False, batch=1)
    usual, assistant = build("llama"), build("llama", layers=1)
    wanted = tokens(usual, given, {}, assistant_model=assistant)
    model = optimized("llama", path, -torch.inf)
    assert torch.equal(tokens(model, given, {}, assistant_model=assistant), wanted)
    assert bsfa.report(model).calls["sparse"] >= 2


@pytest.mark.parametrize("path", ["door", "graph"])
def test_prefill_is_sparse_and_decode_is_dense(path: str) -> None:
    given = prompt("llama", padded=True)
    model = optimized("llama", path, -0.02)
    tokens(model, given, {})
    report = bsfa.report(model)
    assert report.calls["sparse"] == 2  # one prefill of two layers
    if path == "graph":
        assert report.calls["decode"] == 2 * (NEW - 1)
    assert report.coverage == 1.0


def test_a_decode_graph_is_that_of_the_untouched_model() -> None:
    """Nothing of ours is among its inputs: fetching them would cost time at every token."""
    given, graphs = prompt("llama", padded=False), []
    compile_ = Inner.__call__

    def compiled(self: Inner, gm: fx.GraphModule, inputs: Any) -> Any:
        taken = [n.name for n in gm.graph.nodes if n.op == "placeholder" and "bsfa" in n.name]
        graphs.append((len(taken), any("bsfa" in str(n.target) for n in gm.graph.nodes)))
        return compile_(self, gm, inputs)

    model = optimized("llama", "graph", -0.02)
    with mock.patch.object(Inner, "__call__", compiled):
        tokens(model, given, {})
    assert graphs[0] == (4, True)
    assert graphs[-1] == (0, False)


class Stream:
    """In place of a CUDA stream, which must not be traced."""

    traced = 0

    def wait_stream(self, other: Stream) -> None:
        Stream.traced += torch.compiler.is_compiling()

    def synchronize(self) -> None:
        Stream.traced += torch.compiler.is_compiling()

    def __enter__(self) -> None:
        Stream.traced += torch.compiler.is_compiling()

    def __exit__(self, *raised: object) -> None:
        return None


def move(layer: Any, away: bool) -> None:
    """In place of a copy to the host or back: what is away has the wrong sign."""
    if getattr(layer, "away", False) != away:
        layer.keys, layer.values, layer.away = -layer.keys, -layer.values, away


def offloaded() -> Any:
    """A cache that is offloaded, for machines without a card."""
    cache = cache_utils.DynamicCache()
    cache.offloading = cache.only_non_sliding = True
    cache.prefetch_stream = Stream()
    return cache


def test_streams_of_an_offloaded_cache_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(cache_utils.DynamicLayer, "offload", lambda layer: move(layer, True))
    monkeypatch.setattr(cache_utils.DynamicLayer, "prefetch", lambda layer: move(layer, False))
    monkeypatch.setattr(Stream, "traced", 0)
    given, way = prompt("llama", padded=True), {"past_key_values": offloaded()}
    untouched, model = build("llama"), optimized("llama", "graph", -torch.inf)
    wanted = tokens(untouched, given, {})
    assert torch.equal(tokens(untouched, given, copy.deepcopy(way)), wanted)
    assert torch.equal(tokens(model, given, copy.deepcopy(way)), wanted)
    assert bsfa.report(model).calls == {"sparse": 2, "decode": 2 * (NEW - 1)}
    bsfa.retarget(model, thresholds("llama", -0.02))
    with torch.no_grad():
        model(**given, **way)
        rates = toy.skipped(model)
        assert len(rates) == 2 and all(rate is not None and rate > 0 for rate in rates.values())
        # Either goes on from here, and leaves the other's copy as it is.
        following = {"input_ids": given["input_ids"][:, -1:]}
        caches = [copy.deepcopy(way["past_key_values"]) for _ in range(2)]
        ours = model(**following, past_key_values=caches[0]).logits
        theirs = untouched(**following, past_key_values=caches[1]).logits
    caches.append(way["past_key_values"])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    assert [cache.get_seq_length() for cache in caches] == [PROMPT + 1, PROMPT + 1, PROMPT]
    assert all(type(c) is cache_utils.DynamicCache and c.offloading for c in caches)
    assert Stream.traced == 0


def test_both_parts_of_an_offloaded_cache_until_the_call_ends() -> None:
    given = cache_utils.EncoderDecoderCache(offloaded(), offloaded())
    caches = [given.self_attention_cache, given.cross_attention_cache]

    def offloading(*args: object, **kwargs: object) -> list[bool]:
        if "fail" in kwargs:
            raise RuntimeError("a failing call")
        return [cache.offloading for cache in caches]

    call = without_streams(offloading)
    assert call(None, given) == call(past_key_values=given) == [False, False]
    with pytest.raises(RuntimeError, match="a failing call"):
        call(past_key_values=given, fail=True)
    assert call(past_key_values=cache_utils.DynamicCache()) == [True, True]
    assert all(type(cache) is cache_utils.DynamicCache for cache in caches)


def test_generate_may_compile_the_call_of_a_compiled_model() -> None:
    """As it does on CUDA to decode with a static cache."""
    model, x, graphs = toy.Toy(), toy.sample(), list[fx.GraphModule]()
    bsfa.apply(model, toy.thresholds(toy.sites()), **toy.EAGER)

    def other(gm: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    with torch.no_grad():
        assert torch.equal(torch.compile(model.__call__, backend=other)(x), model(x))
    assert bsfa.report(model).calls == {"sparse": 4} and not graphs
    assert all(toy.skipped(model).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need a CUDA card")
@pytest.mark.parametrize("path", ["door", "graph"])
def test_offloaded_caches(path: str) -> None:
    way = {"cache_implementation": "offloaded"}
    given = {key: value.cuda() for key, value in prompt("llama", padded=True).items()}
    untouched = build("llama").cuda()
    wanted = tokens(untouched, given, {})
    model = optimized("llama", path, -torch.inf).cuda()
    assert torch.equal(tokens(model, given, {}), wanted)
    calls = bsfa.report(model).calls["sparse"]
    made = tokens(model, given, way)
    assert bsfa.report(model).calls["sparse"] > calls  # a prefill with this cache is sparse too
    if not torch.equal(tokens(untouched, given, way), wanted):
        pytest.skip("the untouched model says something else with an offloaded cache here")
    assert torch.equal(made, wanted)
