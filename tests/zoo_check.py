"""A fresh process for models of the zoo: python -m tests.zoo_check NAME... -> a JSON line each."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.models.recurrent_gemma import modeling_recurrent_gemma

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from bsfa_compile.huggingface.observing import attends_eagerly
from bsfa_compile.ops import dispatch
from tests import zoo
from tests.oracle import Oracle

BLOCKS: dict[str, Any] = {"block_q": 32, "block_k": 16}
LENGTH = 200
LIMIT = 1e-9  # of the output's standard deviation: models and operator run in float64
# Their eager attention or their experts compute in float32 whatever the weights are.
FLOAT32 = {"gemma2": 1e-5, "gptj": 1e-5, "codegen": 1e-5}
# Its recurrence is in float32: a graph that rounds otherwise may differ by half an eps a step.
RECURRENT = {"qwen3_next": LENGTH * torch.finfo(torch.float32).eps / 2}
# In transformers 5.17 it hangs methods on its cache that torch.compile, by any backend, loses.
UNTRACED = {"recurrent_gemma"} if hasattr(modeling_recurrent_gemma, "_get_mask_sizes") else set()


def dense_thresholds(calibration: Calibration) -> Thresholds:
    """-inf everywhere: the operator runs and may drop nothing."""
    solved = calibration.thresholds(bsfa.Budget(0.0))
    values = {name: torch.full_like(v[:, :1], -torch.inf) for name, v in solved.values.items()}
    return Thresholds(values=values, **BLOCKS, fingerprint=calibration.fingerprint)


def distinct_thresholds(calibration: Calibration, gate: str) -> Thresholds:
    """Other numbers for every site, which drop some tiles and keep some."""
    with warnings.catch_warnings():  # the relative gate cannot drop as much everywhere
        warnings.simplefilter("ignore")
        solved = calibration.thresholds(bsfa.Sparsity(0.3), gate)
    values = {name: v - i / 128 for i, (name, v) in enumerate(solved.values.items())}
    return replace(solved, values=values)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the wanted tensor's standard deviation."""
    return float((got - wanted).abs().max() / wanted.std())


def real_rows(given: dict[str, Any]) -> Any:
    """Index of the rows that are no padding."""
    mask = given.get("attention_mask")
    return slice(None) if mask is None else mask.bool()


def generated(model: Any, given: dict[str, Any]) -> list[list[int]]:
    """Six new tokens a row, greedily, with a cache."""
    short = {
        key: value if key == "input_features" else value[:, -60:]
        for key, value in given.items()
        if isinstance(value, Tensor) and key != "decoder_input_ids"
    }
    found = model.generate(**short, max_new_tokens=6, do_sample=False)
    return [[int(t) for t in row[-6:]] for row in found]


def through_the_door(
    model: Any, variants: dict[str, Any], wanted: dict[str, Tensor], tokens: dict[str, Any]
) -> dict[str, Any]:
    """The same without a graph, by attn_implementation="bsfa"; empty if the model has its own."""
    model.set_attn_implementation("bsfa")
    if not attends_eagerly(model):
        return {}
    calibration = bsfa.calibrate(model, list(variants.values()), **BLOCKS, progress=False)
    found = {"door": list(calibration.sites), "door_dense": dict(calibration.dense)}
    if not calibration.sites:
        return found
    options: dict[str, Any] = {"compile": False, "dense_if_faster": False}
    bsfa.apply(model, dense_thresholds(calibration), **options)
    errors = []
    for key, given in variants.items():
        rows = slice(None) if "decoder_input_ids" in given else real_rows(given)
        errors.append(error(zoo.output(model, given)[rows], wanted[key][rows]))
    same = [generated(model, variants[key]) == before for key, before in tokens.items()]
    bsfa.apply(model, distinct_thresholds(calibration, "absolute"), **options)
    zoo.output(model, variants["plain"])
    skipped = [site.skipped for site in bsfa.report(model).sites if site.skipped]
    bsfa.revert(model)
    return {**found, "door_error": max(errors), "door_same": all(same), "door_skips": any(skipped)}


def check(name: str) -> dict[str, Any]:
    """Everything that `problems` looks at."""
    entry, model = zoo.ZOO[name], zoo.build(name).double()
    plain = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in zoo.inputs(name, LENGTH).items()
    }
    variants = {"plain": plain}
    if entry.pads:
        variants["padded"] = zoo.left_padded(plain, (0, 70))
    wanted = {key: zoo.output(model, given) for key, given in variants.items()}
    generates = entry.generates and name not in UNTRACED
    tokens = {k: generated(model, g) for k, g in variants.items() if generates}
    calibration = bsfa.calibrate(model, list(variants.values()), **BLOCKS, progress=False)
    found: dict[str, Any] = {"dense": dict(calibration.dense)}
    found["calibrated"] = list(calibration.sites)
    options: dict[str, Any] = {"inner": "eager", "dense_if_faster": False, "fullgraph": True}
    calls = mock.MagicMock(wraps=dispatch.attention)
    with mock.patch.object(dispatch, "attention", calls):
        if not calibration.sites:
            return {**found, "error_plain": error(zoo.output(model, plain), wanted["plain"])}
        bsfa.apply(model, dense_thresholds(calibration), **options)
        for key, given in variants.items():
            before = calls.call_count
            rows = real_rows(given) if entry.attention == "eager" else slice(None)
            found[f"error_{key}"] = error(zoo.output(model, given)[rows], wanted[key][rows])
            found[f"calls_{key}"] = calls.call_count - before
        before = calls.call_count
        for key, before_tokens in tokens.items():
            found[f"same_tokens_{key}"] = generated(model, variants[key]) == before_tokens
        found["calls_generate"] = calls.call_count - before
    report = bsfa.report(model)
    found["rewritten"] = [site.name for site in report.sites if site.rewritten]
    found["reasons"] = {site.name: site.reason for site in report.sites}
    bsfa.revert(model)
    found["error_reverted"] = error(zoo.output(model, plain), wanted["plain"])
    for gate, key in (("relative", "plain"), ("absolute", "padded")):
        given = variants.get(key, plain)
        thresholds, mask = distinct_thresholds(calibration, gate), given.get("attention_mask")
        rows = real_rows(given) if mask is not None and entry.takes == "text" else slice(None)
        exact = None
        if entry.oracle:
            windows = entry.windows or (None,) * len(entry.sites)
            oracle = Oracle(
                model,
                thresholds,
                causal=entry.causal,
                windows=dict(zip(entry.sites, windows, strict=True)),
                padding=None if mask is None else mask.bool(),
            )
            with oracle.running():
                exact = zoo.output(model, given)
        dense = zoo.output(model, given)
        bsfa.apply(model, thresholds, **options)
        got = zoo.output(model, given)
        sites = bsfa.report(model).sites
        bsfa.revert(model)
        sparse = {
            "change": error(got[rows], dense[rows]),
            "skipped": {site.name: site.skipped for site in sites if site.skipped is not None},
        }
        if exact is not None:
            sparse["error"] = error(got[rows], exact[rows])
            sparse["wanted"] = {site: d / c for site, (d, c) in oracle.counts.items()}
        found[f"sparse_{gate}"] = sparse
    return {**found, **through_the_door(model, variants, wanted, tokens)}


def problems(name: str, found: dict[str, Any]) -> list[str]:
    """What is not as the zoo says it must be: sites, reasons, numbers."""
    entry, sites = zoo.ZOO[name], list(zoo.ZOO[name].sites)
    calls = len(sites) * entry.repeats
    rounding = RECURRENT.get(name, LIMIT)
    limit = FLOAT32.get(name, rounding)
    wrong = []
    if found["calibrated"] != sites:
        wrong.append(f"calibrated sites are {found['calibrated']}")
    for site, reason in found["dense"].items():
        if entry.dense.get(site, "(it is not expected)") not in reason:
            wrong.append(f"{site} is dense: {reason}")
    if found["dense"].keys() != entry.dense.keys():
        wrong.append(f"dense sites are {list(found['dense'])}")
    if found["error_plain"] > limit or found.get("error_padded", 0.0) > limit:
        wrong.append(f"error {found['error_plain']:.1e}, padded {found.get('error_padded')}")
    if not sites:
        return wrong
    if found["rewritten"] != sites or found["calls_plain"] != calls:
        wrong.append(f"rewritten sites are {found['rewritten']}")
    if entry.pads and found["calls_padded"] != calls:
        wrong.append(f"{found['calls_padded']} sparse calls with padding")
    if found["error_reverted"] != 0.0:
        wrong.append("revert changed the output")
    same = [value for key, value in found.items() if key.startswith("same_tokens")]
    if not all(same) or len(same) != (entry.generates and name not in UNTRACED) * (1 + entry.pads):
        wrong.append(f"generated tokens are the same: {same}")
    # Prompts and encoders: decoding is dense, and decoders after an encoder begin with one token.
    first = calls if entry.takes == "text" else sum(".encoder." in f".{site}" for site in sites)
    if found["calls_generate"] != len(same) * first:
        wrong.append(f"{found['calls_generate']} sparse calls while generating")
    for gate in ("relative", "absolute"):
        sparse = found[f"sparse_{gate}"]
        if not any(sparse["skipped"].values()) or sparse["change"] < 1e-3:
            wrong.append(f"{gate}: skipped {sparse['skipped']}, change {sparse['change']:.1e}")
        if "wanted" in sparse:
            off = [
                site
                for site, rate in sparse["wanted"].items()
                if abs(sparse["skipped"][site] - rate) > 1e-9
            ]
            if off or sparse["error"] > rounding:
                wrong.append(f"{gate}: not as the reference: {off}, error {sparse['error']:.1e}")
    if "door" in found:
        known = {*found["door"], *found["door_dense"]}
        if set(found["door"]) not in (set(), set(sites)) or not known >= set(sites):
            wrong.append(f"door: {found['door']}, dense {found['door_dense']}")
        if not all(found["door_dense"].values()):
            wrong.append("door: a dense site without a reason")
        if found["door"] and (found["door_error"] > limit or not found["door_same"]):
            wrong.append(f"door: error {found['door_error']:.1e}, tokens {found['door_same']}")
        if found["door"] and not found["door_skips"]:
            wrong.append("door: nothing was skipped")
    return wrong


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        torch._dynamo.reset()
        try:
            measured = check(argument)
            measured["wrong"] = problems(argument, measured)
        except Exception as died:
            traceback.print_exc()
            measured = {"wrong": [f"{type(died).__name__}: {died}"[:500]]}
        print(json.dumps({"name": argument, **measured}), flush=True)
