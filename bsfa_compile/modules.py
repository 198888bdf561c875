"""Live nn.Modules through Dynamo: watch them for calibration, compile them in place, undo it."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code

from bsfa_compile.backend import Inner, Rewriter
from bsfa_compile.calibrate.data import Call, device_of, move
from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.errors import InputError
from bsfa_compile.huggingface.observing import EagerWatcher, attends_eagerly
from bsfa_compile.huggingface.offloading import without_streams
from bsfa_compile.install import install
from bsfa_compile.listing import OUTSIDE, attending
from bsfa_compile.passes.attach import reload, unload
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.saving import follow, unfollow
from bsfa_compile.state import (
    State,
    attends_by_itself,
    forget,
    remember,
    split_name,
    state_of,
)
from bsfa_compile.watch import Watcher

# Graphs per frame before Dynamo gives up: lengths, modes and caches of a served model add up.
RECOMPILES = 64
COMPILED = "_compiled_call_impl"
_MASKS = "create_masks_for_generate"  # transformers asks a model for a function of this name
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


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """What is called from outside, by name: the model, and the encoder that `generate` calls."""
    parts = {"": model}
    config = getattr(model, "config", None)
    get: Any = getattr(model, "get_encoder", None)
    if getattr(config, "is_encoder_decoder", False) and get is not None:
        encoder = get()
        parts |= {n: m for n, m in model.named_modules() if m is encoder and m is not model}
    return parts


def _uncompile(model: nn.Module) -> dict[str, Any]:
    """Take off how the model and its encoder are compiled; what there was."""
    found = {name: vars(part).pop(COMPILED, None) for name, part in _parts(model).items()}
    return {name: call for name, call in found.items() if call is not None}


def _recompile(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Inverse of `_uncompile`."""
    for name, call in found.items():
        setattr(model.get_submodule(name), COMPILED, call)


def _compile(model: nn.Module, backend: Callable[..., Any], **options: Any) -> None:
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = RECOMPILES
    else:  # torch 2.11 and 2.12 know only one limit for the whole process
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    compiled = torch.compile(_entry(model), backend=backend, **options)
    setattr(model, COMPILED, without_streams(compiled))


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
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients, and as if it was never optimized.

    Whatever is put on it or compiled inside is gone afterwards, and it is as it was before, also
    if something was raised.
    """
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    compiled = _uncompile(model)
    taken = unload(model)
    limits = {"recompile_limit": RECOMPILES, "accumulated_recompile_limit": 1024}
    try:
        model.eval()
        # It would hide attention; where our hooks sit later, torch leaves it by itself.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch._dynamo.config.patch(limits):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        unload(model)
        _uncompile(model)
        _recompile(model, compiled)
        reload(taken)
        _forget_code(model)


@contextmanager
def watching(model: nn.Module, observer: Observer, rule: Rule) -> Iterator[Watcher | EagerWatcher]:
    """Inside, calls of the model are observed: `borrowed`, in eager graphs, or untraced."""
    if attends_eagerly(model):
        with borrowed(model), EagerWatcher(model, observer, rule).watching() as seeing:
            yield seeing
        return
    watcher = Watcher(model, observer, rule)
    with borrowed(model):
        _compile(model, watcher)
        yield watcher


def untraced(model: nn.Module, call: Call, watcher: Watcher | EagerWatcher) -> dict[str, str]:
    """Attention of one call that the watcher was not shown by name, and why it stays dense.

    Layers that share a graph are shown once: the others stay dense for the same reason. After a
    break inside a module Dynamo does not know whose attention it is.
    """
    args, kwargs = move(call, device_of(model))
    with borrowed(model):
        found = [n for n in attending(model, args, kwargs) if n not in watcher.sparse]
    kinds = {name: type(module) for name, module in model.named_modules()}

    def like(name: str) -> tuple[object, int]:
        module, ordinal = split_name(name)
        return kinds.get(module), ordinal

    known = {like(name): why for name, why in watcher.dense.items()}
    nameless = [why for name, why in watcher.dense.items() if split_name(name)[0] not in kinds]
    otherwise = nameless[0] if nameless else OUTSIDE
    return {n: known.get(like(n), otherwise) for n in found if n not in watcher.dense}


@contextmanager
def trying(model: nn.Module, state: State) -> Iterator[None]:
    """Inside a `borrowed` model, its calls follow a state, in eager graphs or untraced."""
    before = state_of(model)
    try:
        install(model, state)
        if not attends_eagerly(model):
            _compile(model, Rewriter(state, Inner("eager")))
        yield
    finally:
        vars(model).pop(COMPILED, None)
        unload(model)
        unfollow(model)
        forget(model)
        if before is not None:
            remember(model, before)
            follow(model)


def compile_in_place(model: nn.Module, state: State, inner: Inner, **options: Any) -> None:
    """Install a state's buffers and hooks and compile the model's call with the rewriter."""
    state.previous = _uncompile(model)
    install(model, state)
    leave_masks_to_model(model)
    for part in _parts(model).values():
        _compile(part, Rewriter(state, inner), **options)


def leave_masks_to_model(model: nn.Module) -> None:
    """Let a Hugging Face model make its own masks also when it generates with a static cache.

    `generate` would make them outside the compiled graph, where their meaning is lost. In decoding
    it still does.
    """
    home = sys.modules.get("transformers.masking_utils")
    if home is None or not hasattr(model, "prepare_inputs_for_generation") or _MASKS in vars(model):
        return
    usual = getattr(type(model), _MASKS, None) or getattr(home, _MASKS)

    def make(*, inputs_embeds: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return usual(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)

    vars(model)[_MASKS] = make


def install_eagerly(model: nn.Module, state: State) -> None:
    """Install a state's buffers alone, for modules that attend by themselves.

    Raises InputError if a module of the thresholds does not.
    """
    for name in state.thresholds.values:
        if not attends_by_itself(model.get_submodule(split_name(name)[0])):
            raise InputError(
                f"compile=False, but the attention of {name} is not transformers' own with "
                'attn_implementation="bsfa": load the model with it, or leave out compile=False'
            )
    install(model, state)


def undo(model: nn.Module, state: State | None) -> None:
    """Remove buffers, hooks and compiled code; bring back how the model was compiled before."""
    unload(model)
    unfollow(model)
    _uncompile(model)
    if state is not None and isinstance(state.previous, dict):
        _recompile(model, state.previous)
    vars(model).pop(_MASKS, None)
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
