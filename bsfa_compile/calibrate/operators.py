"""Operators that watch: they return nothing, and are kept in a graph for what they note."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("bsfa", "FRAGMENT")


def watching(name: str, arguments: str, function: Callable[..., None]) -> None:
    """Define bsfa::`name`, whose last argument, `handle`, is written to: no compiler drops it."""
    _LIBRARY.define(
        f"{name}({arguments}, Tensor(a!) handle) -> ()", tags=(torch.Tag.cudagraph_unsafe,)
    )
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bsfa::{name}", _fake, lib=_LIBRARY)


def _fake(*args: object) -> None:
    """Shapes: nothing comes back."""
