"""The story on one page: trace -> calibrate -> rewrite -> compile, and back again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from bsfa_compile import modules, traced
from bsfa_compile.backend import Inner
from bsfa_compile.calibrate.calibration import check_request
from bsfa_compile.calibrate.data import Call, samples
from bsfa_compile.calibrate.quality import Quality
from bsfa_compile.calibrate.solve import Budget, Target, TopK
from bsfa_compile.calibrate.thresholds import Thresholds, check, loaded
from bsfa_compile.calibrating import calibrated
from bsfa_compile.errors import InputError
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.search import search
from bsfa_compile.state import State, refuse, state_of

Model = TypeVar("Model", nn.Module, fx.GraphModule, ExportedProgram)
_DEFAULT = Budget(0.03)
_TRACED = (fx.GraphModule, ExportedProgram)


def optimize(
    model: Model,
    calib_data: object,
    target: Target | Quality = _DEFAULT,
    *,
    held_out: object = None,
    gate: str = "relative",
    strict: bool = False,
    precision: str = "auto",
    sink_tiles: int | None = None,
    max_length: int | None = None,
    dense_if_faster: bool = True,
    progress: bool = True,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    inner: str = "inductor",
    compile: bool = True,
) -> Model:
    """Make a model's attention block-sparse: calibrate on data, rewrite, compile.

    model: nn.Module, compiled in place (graphs are built when it first runs); torch.fx.GraphModule,
    rewritten in place; or torch.export.ExportedProgram, of which a new one is returned.
    calib_data: one model input (tensor, tuple, dict) or an iterable of them (list, DataLoader), as
    long as those to come. target: what may be lost, `Budget(eps)` of softmax mass per row or
    `Quality(...)` of the whole model, or what to drop. held_out: inputs that a Quality is proven
    on; every fourth of calib_data is held back if not given. gate: "relative", for TopK too, or
    "absolute" (the paper's). strict: raise instead of leaving a site dense. precision: of the
    gate's scores, "auto", "exact" or "int8". sink_tiles: leading tiles always kept; None is what
    loses least: none for the relative gate, one for the absolute. max_length: tokens of the longest
    input to come, if longer than calib_data: thresholds then follow a fit over positions. Without
    it the loss asked for does not hold there, of which a warning tells at inputs over a fourth
    longer: Quality(nll=0.01) found at 4k tokens loses .030 and .021 at 32k (Qwen2.5-Coder-0.5B,
    1.5B), with max_length=32768 .003 and .001.
    dense_if_faster: run dense wherever that is faster; False forces the rule. fullgraph, dynamic,
    mode, options: of torch.compile and inductor. inner: another backend of torch to run the
    rewritten graphs, for debugging ("eager", "aot_eager"). compile: False for a Hugging Face model
    that was loaded with attn_implementation="bsfa" and shall stay uncompiled.

    Returns the same kind of object. Raises CalibrationError without usable data, InputError for a
    wrong argument and UnsupportedError, listing every reason, if strict and a site stays dense.
    """
    max_k = max(128, target.k) if isinstance(target, TopK) else 128
    if sink_tiles is None:
        sink_tiles = 1 if gate == "absolute" else 0
    rule = Rule(sink_tiles=sink_tiles)
    compiled = Inner(inner, mode, options, dynamic)
    check_request(target, gate, precision, max_length)
    data = samples(calib_data)
    if isinstance(target, Quality):
        # Read before the long work, so that what is wrong with it comes first.
        data, held = data.split() if held_out is None else (data, samples(held_out, "held_out"))
        held = held.read()
    elif held_out is not None:
        raise InputError(f"held_out is what a Quality is proven on, {target} needs none: leave it")
    calibration, example = calibrated(model, data, rule, max_k=max_k, progress=progress)
    if strict:
        refuse(calibration.dense)
    if calibration.sites:
        if isinstance(target, Quality):
            solved = search(
                model,
                calibration,
                target,
                held,
                probe=example,
                gate=gate,
                precision=precision,
                max_length=max_length,
                progress=progress,
            )
        else:
            solved = calibration.thresholds(
                target, gate, precision=precision, max_length=max_length
            )
        told = solved.proof is not None and not solved.proof.holds
        if not told and all(bool((value == -torch.inf).all()) for value in solved.values.values()):
            warnings.warn(
                f"{target}: no tile can be dropped; calibrate on inputs as long as those to come "
                f"(seen: up to {max(calibration.lengths, default=0)} tokens)",
                stacklevel=2,
            )
    else:
        reasons = "; ".join(sorted(set(calibration.dense.values()))) or "no attention was found"
        warnings.warn(f"no attention can be block-sparse: {reasons}", stacklevel=2)
        solved = Thresholds(
            values={}, gate=gate, precision=precision, fingerprint=calibration.fingerprint
        )
    state = State(
        thresholds=solved,
        rule=Rule.of(solved, dense_if_faster=dense_if_faster),
        calibration=calibration,
        strict=strict,
    )
    made = _applied(
        model, state, compiled if compile else None, example, fullgraph=fullgraph, dynamic=dynamic
    )
    return cast(Model, made)


def apply(
    model: Model,
    thresholds: Thresholds | str | os.PathLike[str],
    *,
    strict: bool = False,
    dense_if_faster: bool = True,
    example: object = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    inner: str = "inductor",
    compile: bool = True,
) -> Model:
    """Make a model block-sparse by thresholds that exist already; arguments as of `optimize`.

    thresholds: made by a calibration, or where they were saved: a file, or the folder of a
    checkpoint that the optimized model wrote with save_pretrained.
    example: one model input, needed for a GraphModule whose nodes carry no shapes. Returns the
    same kind of object. Raises ThresholdsError if the thresholds are of another model or their
    file is damaged, OSError if it cannot be read.
    """
    thresholds = loaded(thresholds)
    check(thresholds, model)
    sample = None if example is None else next(iter(samples(example)))
    state = State(
        thresholds=thresholds,
        rule=Rule.of(thresholds, dense_if_faster=dense_if_faster),
        strict=strict,
    )
    compiled = Inner(inner, mode, options, dynamic)
    made = _applied(
        model, state, compiled if compile else None, sample, fullgraph=fullgraph, dynamic=dynamic
    )
    return cast(Model, made)


def revert(model: Model) -> Model:
    """Give back the model as it was before `optimize` or `apply`, bit for bit.

    An nn.Module and a GraphModule are changed in place; for an exported program the original is
    returned. A model that was not optimized is returned as it is. Raises BsfaError for an
    optimized exported program loaded from a file, which no longer has its original.
    """
    given = cast(Any, model)
    if isinstance(given, _TRACED):
        return cast(Model, traced.undo(given, state_of(given)))
    if not isinstance(given, nn.Module):
        raise InputError(f"model must be one that optimize took, got {type(given).__name__}")
    state = state_of(given)
    modules.undo(modules.plain(given), state)
    return model


def _applied(
    model: Any, state: State, inner: Inner | None, example: Call | None, **options: Any
) -> Any:
    """The model with the state; what an earlier `optimize` did is undone first."""
    if state_of(model) is not None:
        model = revert(model)
    if isinstance(model, _TRACED):
        return traced.apply(model, state, example)
    if inner is None:
        modules.install_eagerly(modules.plain(model), state)
    else:
        modules.compile_in_place(modules.plain(model), state, inner, **options)
    return model
