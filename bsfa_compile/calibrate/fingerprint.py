"""Recognise a model: one hash of its structure, one of a sample of its weights.

Nothing this package adds to a model (names that start with bsfa_) is seen, so a model has the
same fingerprint before and after it was optimized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bsfa_compile.errors import InputError

_SAMPLES = 64  # values of each parameter that are hashed

Model = nn.Module | torch.export.ExportedProgram  # a GraphModule is an nn.Module


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Hex digests: `structure` of module tree, parameter names and shapes; `weights` of values."""

    structure: str
    weights: str


def fingerprint(model: Model) -> Fingerprint:
    """The fingerprint of a model. Weights are sampled, so it takes milliseconds per 100 layers.

    nn.Module: module names and classes, parameters. GraphModule: parameters and buffers.
    ExportedProgram: its state_dict. Weights hash the bytes as stored: another dtype is another
    hash. Parameters without values (meta) or of a tensor subclass count by name and shape.
    Raises InputError for anything else.
    """
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise InputError(
            "model must be an nn.Module, a torch.fx.GraphModule or an ExportedProgram, "
            f"got {type(model).__name__}"
        )
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for line in _tree(model):
        structure.update(f"{line}\n".encode())
    for name, value in _weights(model):
        structure.update(f"{name} {tuple(value.shape)}\n".encode())
        weights.update(f"{name}\n".encode())
        weights.update(_sample(value))
    return Fingerprint(structure=structure.hexdigest(), weights=weights.hexdigest())


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile(module) returns; any other module itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _ours(name: str) -> bool:
    return any(part.startswith("bsfa_") for part in name.split("."))


def _tree(model: Model) -> Iterator[str]:
    """Names and classes of the modules; nothing for traced graphs, which keep no classes."""
    if isinstance(model, torch.export.ExportedProgram | torch.fx.GraphModule):
        return
    for name, module in unwrap(model).named_modules():
        if not _ours(name):
            yield f"{name} {type(module).__module__}.{type(module).__qualname__}"


def _weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, torch.export.ExportedProgram):
        found = sorted(model.state_dict.items())
    elif isinstance(model, torch.fx.GraphModule):
        found = sorted(model.state_dict().items())
    else:
        found = sorted(unwrap(model).named_parameters(remove_duplicate=False))
    return ((name, value) for name, value in found if not _ours(name))


def _sample(value: Tensor) -> bytes:
    """Bytes of up to `_SAMPLES` values, evenly spread over the tensor."""
    if value.is_meta or value.numel() == 0 or type(value) not in (Tensor, nn.Parameter):
        return b""
    spread = range(_SAMPLES) if value.numel() > _SAMPLES else range(value.numel())
    index = [i * (value.numel() - 1) // max(len(spread) - 1, 1) for i in spread]
    with torch.no_grad():
        taken = value.detach().take(torch.tensor(index, device=value.device)).cpu()
    return taken.view(torch.uint8).numpy().tobytes()
