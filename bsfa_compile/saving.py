"""Thresholds travel with a checkpoint: save_pretrained of an optimized model writes them too."""

from __future__ import annotations

import os
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from bsfa_compile.calibrate.thresholds import FILE_NAME
from bsfa_compile.state import state_of

_METHOD = "save_pretrained"


def save_pretrained(
    self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """The model's own save_pretrained, then its thresholds beside the weights.

    `bsfa_compile.apply(model, folder)` reads them. Only the main process writes.
    """
    result = getattr(type(self), _METHOD)(self, save_directory, *args, **kwargs)
    state = state_of(self)
    main = args[0] if args else kwargs.get("is_main_process", True)
    if state is not None and main:
        state.thresholds.save(Path(save_directory) / FILE_NAME)
    return result


def follow(model: nn.Module) -> None:
    """Let a model that has save_pretrained save its thresholds too.

    As a bound method on the instance: a deep copy of the model gets one of its own.
    """
    if callable(getattr(type(model), _METHOD, None)):
        setattr(model, _METHOD, MethodType(save_pretrained, model))


def unfollow(model: nn.Module) -> None:
    """Take back `follow`."""
    vars(model).pop(_METHOD, None)
