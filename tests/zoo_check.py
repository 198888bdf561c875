"""A fresh process for models of the zoo: python -m tests.zoo_check NAME... -> a JSON line each."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from bsfa_compile.ops import dispatch
from tests import zoo
from tests.oracle import Oracle

BLOCKS: dict[str, Any] = {"block_q": 32, "block_k": 16}
LENGTH = 200


def dense_thresholds(calibration: Calibration) -> Thresholds:
    """-inf everywhere: the operator runs and may drop nothing."""
    solved = calibration.thresholds(bsfa.Budget(0.0))
    values = {name: v[:, :1] * 0 - torch.inf for name, v in solved.values.items()}
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
    short = {k: v[:, -60:] for k, v in given.items() if isinstance(v, Tensor)}
    found = model.generate(**short, max_new_tokens=6, do_sample=False)
    return [[int(t) for t in row[60:]] for row in found]


def check(name: str) -> dict[str, Any]:
    """Everything that the tests of this model look at."""
    entry, model = zoo.ZOO[name], zoo.build(name).double()
    plain = zoo.inputs(name, LENGTH)
    if name == "vit":
        plain = {key: value.double() for key, value in plain.items()}
    variants = {"plain": plain}
    if entry.pads:
        variants["padded"] = zoo.left_padded(plain, (0, 70))
    wanted = {key: zoo.output(model, given) for key, given in variants.items()}
    tokens = {k: generated(model, g) for k, g in variants.items() if entry.generates}
    calibration = bsfa.calibrate(model, list(variants.values()), **BLOCKS, progress=False)
    found: dict[str, Any] = {"dense_reasons": dict(calibration.dense)}
    found["calibrated"] = list(calibration.sites)
    options: dict[str, Any] = {"inner": "eager", "dense_if_faster": False, "fullgraph": True}
    calls = mock.MagicMock(wraps=dispatch.attention)
    with mock.patch.object(dispatch, "attention", calls):
        if not calibration.sites:
            return {**found, "error_untouched": error(zoo.output(model, plain), wanted["plain"])}
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
        oracle = Oracle(
            model,
            thresholds,
            causal=entry.causal,
            windows=dict(zip(entry.sites, entry.windows, strict=True)),
            padding=None if mask is None else mask.bool(),
        )
        with oracle.running():
            exact = zoo.output(model, given)
        bsfa.apply(model, thresholds, **options)
        got = zoo.output(model, given)
        skipped = {site.name: site.skipped for site in bsfa.report(model).sites}
        bsfa.revert(model)
        rows = real_rows(given)
        found[f"sparse_{gate}"] = {
            "error": error(got[rows], exact[rows]),
            "change": error(exact[rows], zoo.output(model, given)[rows]),
            "skipped": skipped,
            "wanted": {site: d / c for site, (d, c) in oracle.counts.items()},
        }
    return found


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        torch._dynamo.reset()
        print(json.dumps({"name": argument, **check(argument)}), flush=True)
