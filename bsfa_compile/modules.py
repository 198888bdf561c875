"""Live nn.Modules through Dynamo: watch them for calibration, compile them in place, undo it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code

from bsfa_compile.backend import Inner, Rewriter
from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.errors import InputError
from bsfa_compile.install import install
from bsfa_compile.passes.attach import reload, unload
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.state import State, forget
from bsfa_compile.watch import Watcher

# Graphs per frame before Dynamo gives up: lengths, modes and caches of a served model add up.
RECOMPILES = 64
_COMPILED = "_compiled_call_impl"
_numbers = itertools.count()


def _entry(model: nn.Module) -> Callable[..., Any]:
    """The function that is compiled: it calls the model with its hooks.

    Its code object is its own, so nothing that is compiled here is cached on the model's class,
    and all of it goes when this function goes.
    """

    def enter(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    enter.__code__ = enter.__code__.replace(co_name=f"bsfa_call_{next(_numbers)}")
    return enter


def _compile(model: nn.Module, backend: Callable[..., Any], **options: Any) -> None:
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = RECOMPILES
    setattr(model, _COMPILED, torch.compile(_entry(model), backend=backend, **options))


def _forget_code(model: nn.Module) -> None:
    """Drop what Dynamo compiled for the forwards of the model's classes.

    After graph breaks the frames are theirs. Other models of these classes compile again.
    """
    for kind in {type(module) for module in model.modules()}:
        forward: Any = kind.forward
        while forward is not None:
            code = getattr(forward, "__code__", None)
            if code is not None:
                reset_code(code)
            forward = getattr(forward, "__wrapped__", None)


@contextmanager
def watching(model: nn.Module, observer: Observer, rule: Rule) -> Iterator[Watcher]:
    """Inside, calls of the model are observed: eval mode, no gradients, eager graphs.

    Afterwards the model is as it was before, also if something was raised.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = vars(model).get(_COMPILED)
    taken = unload(model)
    watcher = Watcher(model, observer, rule)
    limits = {"recompile_limit": RECOMPILES, "accumulated_recompile_limit": 1024}
    try:
        model.eval()
        _compile(model, watcher)
        with torch.no_grad(), torch._dynamo.config.patch(limits):
            yield watcher
    finally:
        for module, mode in modes.items():
            module.training = mode
        unload(model)
        vars(model).pop(_COMPILED, None)
        if compiled is not None:
            setattr(model, _COMPILED, compiled)
        reload(taken)
        _forget_code(model)


def compile_in_place(model: nn.Module, state: State, inner: Inner, **options: Any) -> None:
    """Install a state's buffers and hooks and compile the model's call with the rewriter."""
    if _COMPILED in vars(model):
        state.previous = vars(model)[_COMPILED]
    install(model, state)
    _compile(model, Rewriter(state, inner), **options)


def undo(model: nn.Module, state: State | None) -> None:
    """Remove buffers, hooks and compiled code; bring back how the model was compiled before."""
    unload(model)
    vars(model).pop(_COMPILED, None)
    if state is not None and state.previous is not None:
        setattr(model, _COMPILED, state.previous)
    _forget_code(model)
    forget(model)


def plain(model: object) -> nn.Module:
    """The model if it is an nn.Module that can be compiled in place. Raises InputError."""
    if not isinstance(model, nn.Module):
        raise InputError(
            "model must be an nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram,"
            f" got {type(model).__name__}"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError(
            "model is the result of torch.compile: pass the module itself, it is compiled in place"
        )
    return model
