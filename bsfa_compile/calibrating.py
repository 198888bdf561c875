"""Run a model on data and collect what thresholds for any target are solved from."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch import distributed as dist
from torch.export import ExportedProgram

from bsfa_compile import listing, modules, traced
from bsfa_compile.calibrate.calibration import Calibration
from bsfa_compile.calibrate.data import Call, Samples, device_of, move, samples
from bsfa_compile.calibrate.fingerprint import fingerprint
from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.errors import BsfaError, CalibrationError, InputError
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.state import refuse

_HOOKED = (
    "accelerate's hooks (device_map, offloading) break the model's graph: load it with "
    'attn_implementation="bsfa", which needs none'
)


def calibrate(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    calib_data: object,
    *,
    sink_tiles: int = 0,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    max_k: int = 128,
    strict: bool = False,
    progress: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Calibration:
    """Run a model on data and collect what thresholds for any target are solved from.

    The model runs in eval mode without gradients and is unchanged afterwards. calib_data: see
    `optimize`. sink_tiles: leading tiles always kept; 0 loses least under the relative gate and is
    the paper's rule under the absolute one, where 1 loses far less (docs/method.md). max_k: the
    largest k of a later TopK. group: a torch.distributed group (such as
    dist.group.WORLD) whose ranks each calibrate on their own share of the data; all get the whole.
    Raises CalibrationError for empty data or an input that the model fails on, InputError for
    data that are no model inputs, UnsupportedError if strict and a site is not supported.
    """
    rule = Rule(sink_tiles=sink_tiles, block_q=block_q, block_k=block_k)
    data = samples(calib_data)
    calibration, _ = calibrated(model, data, rule, max_k=max_k, progress=progress)
    if group is not None:
        calibration = calibration.gathered(group)
    if strict:
        refuse(calibration.dense)
    return calibration


def calibrated(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    data: Samples,
    rule: Rule,
    *,
    max_k: int,
    progress: bool,
) -> tuple[Calibration, Call]:
    """The calibration, and the first sample."""
    if rule.sink_tiles < 0 or rule.block_q < 1 or rule.block_k < 1 or max_k < 0:
        raise InputError(
            "sink_tiles and max_k must be at least 0, block_q and block_k at least 1, got "
            f"{rule.sink_tiles}, {max_k}, {rule.block_q} and {rule.block_k}"
        )
    calls = iter(data)
    first = next(calls)  # or it says that there is none
    with Observer(max_k=max_k) as observer:
        if isinstance(model, traced.Traced):
            with traced.watching(model, observer, rule, first) as (program, dense):
                count = _run(program, first, calls, _length(data), progress)
        else:
            with (
                modules.watching(modules.plain(model), observer, rule) as watcher,
                listing.breaks() as broken,
            ):
                count = _run(model, first, calls, _length(data), progress)
            dense = {n: why for n, why in watcher.dense.items() if n not in watcher.sparse}
            if broken:
                dense |= modules.untraced(model, first, watcher)
            if any(hasattr(module, "_hf_hook") for module in model.modules()):
                dense = {name: f"{why}; {_HOOKED}" for name, why in dense.items()}
        found, wrong = observer.statistics, observer.mismatches
        uncalled = tuple(name for name, n in observer.calls.items() if not n and name not in dense)
    for name, why in wrong.items():
        found.pop(name, None)
        dense[name] = f"verified at calibration: {why}"
        warnings.warn(
            f"{name} stays dense: {why}. Please report it: attention was misread", stacklevel=3
        )
    refused = {name: site.refused for name, site in found.items() if site.refused}
    if refused:
        warnings.warn(
            f"{max(refused.values())} samples had queries or keys that are not finite, at "
            f"{len(refused)} sites from {next(iter(refused))} on: they were left out",
            stacklevel=3,
        )
    calibration = Calibration(
        sites=found,
        samples=count,
        uncalled=uncalled,
        dense=dense,
        fingerprint=fingerprint(model),
    )
    return calibration, first


def _run(program: nn.Module, first: Call, rest: Any, total: int | None, progress: bool) -> int:
    """Run the program on every sample, moved to where it computes; how many there were."""
    device, count = device_of(program), 0
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("calibrating", total=total)
        call: Call | None = first
        while call is not None:
            try:
                args, kwargs = move(call, device)
                program(*args, **kwargs)
            except (BsfaError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise CalibrationError(_failing(call, count, error)) from error
            count += 1
            bar.advance(task)
            call = next(rest, None)
    return count


def _failing(call: Call, index: int, error: Exception) -> str:
    args, kwargs = call
    given = [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]
    told = ", ".join(
        f"{name}: {value.dtype} {list(value.shape)} on {value.device}"
        if isinstance(value, Tensor)
        else f"{name}: {type(value).__name__}"
        for name, value in given
    )
    reason = next(iter(str(error).splitlines()), "")
    lost = f" What the {index} inputs before it told is lost." if index else ""
    return (
        f"the model fails on input {index} of the data ({told}): {type(error).__name__}: {reason}. "
        "Wanted: what the model's forward takes, token ids as integers [batch, length]; try "
        f"model(...) on it.{lost}"
    )


def _length(data: Samples) -> int | None:
    try:
        return len(data)
    except TypeError:  # a stream
        return None
